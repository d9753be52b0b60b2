package pgxdrain

import (
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"
)

// hold is a unit of work that [Pool.Hold] counts.
type hold struct {
	tracer *tracer
	parent *hold // the unit of work that it is a part of, or nil
	at     time.Duration
	ctx    context.Context
	cancel context.CancelCauseFunc

	acquiring atomic.Int64 // acquisitions under way with its context; means nothing once it is released

	mu       sync.Mutex
	released bool
	refused  bool // nothing is admitted under it any more, and its context is cancelled
	followed *followed
}

// holdKey is the key of a hold in the context that Pool.Hold returns.
type holdKey struct{ *tracer }

// holdIn returns the hold that ctx belongs to, or nil.
func (t *tracer) holdIn(ctx context.Context) *hold {
	if ctx == nil { // of no lease
		return nil
	}
	h, _ := ctx.Value(holdKey{t}).(*hold)
	return h
}

// enterUnderHold counts in an acquisition of a unit of work that was admitted before.
func (t *tracer) enterUnderHold(ctx context.Context) (in int, ok bool) {
	h := t.holdIn(ctx)
	if h == nil {
		return 0, false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.released || h.refused {
		return 0, false
	}
	return t.gate.enterUnder(), true
}

// hold begins a unit of work, or reports false if the gate is closed.
func (t *tracer) hold(ctx context.Context) (*hold, bool) {
	parent := t.holdIn(ctx)
	if parent != nil {
		if _, ok := t.enterUnderHold(ctx); !ok {
			return nil, false
		}
	} else if _, ok := t.gate.enter(); !ok {
		return nil, false
	}
	h := &hold{tracer: t, parent: parent, at: now()}
	ctx, h.cancel = context.WithCancelCause(ctx)
	h.ctx = context.WithValue(ctx, holdKey{t}, h)
	t.held.Add(1)
	t.mu.Lock()
	t.holds[h] = struct{}{}
	t.mu.Unlock()
	return h, true
}

// unitsOfWork returns the holds of this moment.
func (t *tracer) unitsOfWork() []*hold {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Keys(t.holds))
}

// release ends the unit of work. It may be called more than once, by anybody.
func (h *hold) release() {
	h.mu.Lock()
	if h.released {
		h.mu.Unlock()
		return
	}
	h.released = true
	f, refused := h.followed, h.refused
	h.mu.Unlock()

	outcome, cause := OutcomeDrained, context.Canceled
	if refused {
		outcome, cause = OutcomeCancelled, ErrShuttingDown
	}
	h.cancel(cause)
	t := h.tracer
	t.mu.Lock()
	delete(t.holds, h)
	t.mu.Unlock()
	if f != nil {
		f.ended(outcome, nil)
	}
	t.held.Add(-1)
	t.gate.leave()
}

// attach lets f follow the unit of work, or reports false if that has ended or is followed already.
func (h *hold) attach(f *followed) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.released || h.followed != nil {
		return false
	}
	h.followed = f
	return true
}

// refuse admits nothing more under the unit of work.
func (h *hold) refuse() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refused = true
}

// acquiresUnderHold notes that an acquisition begins or ends, or reports false if ctx is of no unit of work.
func (t *tracer) acquiresUnderHold(ctx context.Context, n int64) bool {
	h := t.holdIn(ctx)
	if h == nil {
		return false
	}
	h.acquiring.Add(n)
	return true
}

// endUnitsOfWork cancels the contexts of the units of work, or only of those with nothing under way: no acquisition, which is
// freed with ErrShuttingDown and would find its context cancelled instead, and no statement. pgconn would break off the
// statement, and so have it cancelled at the server even if it is a COMMIT; we have it cancelled unless it is one, and its
// connection severed then.
func (t *tracer) endUnitsOfWork(all bool) {
	busy := make(map[*hold]bool)
	markBusy := func(h *hold) {
		for ; h != nil; h = h.parent { // whose context is that of its parts, too
			busy[h] = true
		}
	}
	for _, r := range t.records() {
		if h := t.holdIn(r.lease().ctx); h != nil {
			r.sever(true)
			if l := r.lease(); l.leased && l.cut == uncut {
				markBusy(h)
			}
		}
	}
	holds := t.unitsOfWork()
	for _, h := range holds {
		if h.acquiring.Load() > 0 {
			markBusy(h)
		}
	}
	for _, h := range holds {
		if all || !busy[h] {
			h.cancel(ErrShuttingDown)
		}
	}
}

func (h *hold) operation() Operation {
	held := now() - h.at
	return Operation{
		State:       StateHold,
		AcquiredAt:  time.Now().Add(-held),
		Held:        held,
		SpanContext: trace.SpanContextFromContext(h.ctx),
	}
}
