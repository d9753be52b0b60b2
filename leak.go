package pgxdrain

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"time"
)

// leakDetector logs connections that are held for long, with the stack that acquired them.
type leakDetector struct {
	threshold time.Duration
	log       func() *slog.Logger
	text      queryTextFunc
}

// stack holds the innermost frames of a caller. 32 reach through a router and its middleware.
type stack [32]uintptr

// watchedKey is the key by which a context of DrainContext says so.
type watchedKey struct{ *tracer }

// noteAcquirer keeps the stack of the caller that is acquiring r, unless its context is from DrainContext: who listens or polls
// means to keep the connection.
func (d *leakDetector) noteAcquirer(ctx context.Context, r *record) {
	if ctx.Value(watchedKey{r.tracer}) != nil {
		return
	}
	if r.stack == nil {
		r.stack = new(stack)
	}
	clear(r.stack[:])
	runtime.Callers(4, r.stack[:]) // from pgxpool's frames on: without Callers, this, acquired and the hook
	r.mu.Lock()
	r.current.traced = true
	r.mu.Unlock()
}

// run looks at the leases until the pool has shut down.
func (d *leakDetector) run(t *tracer) {
	tick := time.NewTicker(min(max(d.threshold/10, time.Millisecond), time.Second))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			d.look(t)
		case <-t.shutdown.done:
			return
		}
	}
}

func (d *leakDetector) look(t *tracer) {
	t.reconcile()
	for _, r := range t.records() {
		r.mu.Lock()
		l := &r.current
		if !r.watch() || l.suspected || !l.traced || now()-l.at < d.threshold {
			r.mu.Unlock()
			continue
		}
		l.suspected = true
		suspect, frames := *l, *r.stack
		r.mu.Unlock()
		op := suspect.operation(r.pid, lookNow(d.text))
		d.log().Warn("pgxdrain: connection held for longer than the leak threshold", "threshold", d.threshold,
			"held", op.Held.Round(time.Millisecond), "pid", op.PID, "state", op.State, "statement", op.Statement,
			"acquired_by", frames.String())
	}
}

func (d *leakDetector) cameBack(pid uint32, l *lease) {
	d.log().Info("pgxdrain: connection held for longer than the leak threshold came back",
		"held", (now() - l.at).Round(time.Millisecond), "pid", pid)
}

// String is the stack as panics print it, a function and its place a frame.
func (s *stack) String() string {
	n := slices.Index(s[:], 0)
	if n < 0 {
		n = len(s)
	}
	var b strings.Builder
	frames := runtime.CallersFrames(s[:n])
	for {
		frame, more := frames.Next()
		fmt.Fprintf(&b, "%s\n\t%s:%d\n", frame.Function, frame.File, frame.Line)
		if !more {
			return b.String()
		}
	}
}
