package drainhttp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/pgxdrain/pgxdrain"
)

// ReadyOption changes what [Ready] does.
type ReadyOption func(*ready)

// WithDatabaseCheck makes [Ready] fail as well when the database does not answer a ping within timeout, which must be greater
// than 0. The ping takes a connection of the pool, so a pool that is exhausted for that long is unready too, and a database
// that is down makes every instance unready at once: use it only where that is what is wanted.
//
// Probes that come while a ping is under way share it: there is one at a time, however many probe. A ping under way when
// Shutdown is called is broken off.
func WithDatabaseCheck(timeout time.Duration) ReadyOption {
	if timeout <= 0 {
		panic("drainhttp: WithDatabaseCheck must be given a duration greater than 0")
	}
	return func(h *ready) { h.timeout = timeout }
}

// Ready returns a readiness probe: 200 until Shutdown is called, and 503 from then on, before the pool refuses anything, so
// that load balancers can take notice during the initial wait (see [pgxdrain.WithInitialWait]).
//
// The body is a JSON object: ready (boolean), step ([pgxdrain.Step]) and, if it is not ready, reason. Nothing that the
// database or its driver has said is in it but an SQLSTATE. Methods other than GET and HEAD get 405.
func Ready(pool *pgxdrain.Pool, opts ...ReadyOption) http.Handler {
	h := &ready{pool: pool}
	for _, opt := range opts {
		opt(h)
	}
	return readOnly(h)
}

// Live returns a liveness probe: 200 as long as the process serves it, draining and closed included, since a process that is
// killed for not being alive cannot drain. It does not ask the database. The body is a JSON object: live (true) and step
// ([pgxdrain.Step]). Methods other than GET and HEAD get 405.
func Live(pool *pgxdrain.Pool) http.Handler {
	return readOnly(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, liveness{Live: true, Step: step(pool)})
	}))
}

type liveness struct {
	Live bool          `json:"live"`
	Step pgxdrain.Step `json:"step"`
}

type readiness struct {
	Ready  bool          `json:"ready"`
	Step   pgxdrain.Step `json:"step"`
	Reason string        `json:"reason,omitempty"`
}

// ready is the handler of Ready.
type ready struct {
	pool    *pgxdrain.Pool
	timeout time.Duration // of the database check; 0: off

	mu      sync.Mutex
	running *ping // nil: none is under way
}

func (h *ready) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var reason string
	if h.timeout > 0 && !draining(h.pool) {
		reason = h.checkDatabase(r.Context())
	}
	if draining(h.pool) { // looked at last: the ping was broken off by it
		reason = pgxdrain.ErrShuttingDown.Error()
	}
	if reason != "" {
		writeJSON(w, http.StatusServiceUnavailable, readiness{Step: step(h.pool), Reason: reason})
		return
	}
	writeJSON(w, http.StatusOK, readiness{Ready: true, Step: pgxdrain.StepOpen})
}

// ping is a database check under way, shared by the probes that came meanwhile.
type ping struct {
	ctx  context.Context
	done chan struct{} // closed when err is set
	err  error
}

// checkDatabase returns what is wrong with the database, or nothing. It returns by the timeout although hooks of the user's hang.
func (h *ready) checkDatabase(ctx context.Context) (reason string) {
	p := h.join()
	select {
	case <-p.done:
	case <-ctx.Done():
		return "the probe has gone away"
	case <-p.ctx.Done():
		select {
		case <-p.done:
		default:
			return h.tooSlow()
		}
	}
	var answered interface{ SQLState() string }
	switch {
	case p.err == nil:
		return ""
	case errors.As(p.err, &answered):
		return "the database refused the check: SQLSTATE " + answered.SQLState()
	case errors.Is(p.err, context.DeadlineExceeded):
		return h.tooSlow()
	default: // its text may name hosts and users
		return "the database cannot be reached"
	}
}

func (h *ready) tooSlow() string {
	return fmt.Sprintf("the database check was not done within %v", h.timeout)
}

// join returns the ping under way, or a new one.
func (h *ready) join() *ping {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.running != nil {
		return h.running
	}
	// Not the probe's context: others wait for it too. It ends with the first Shutdown, lest the drain wait for it.
	ctx, cancel := h.pool.DrainContext(context.Background())
	ctx, stop := context.WithTimeout(ctx, h.timeout)
	p := &ping{ctx: ctx, done: make(chan struct{})}
	h.running = p
	go func() {
		defer cancel()
		defer stop()
		p.err = h.pool.Ping(ctx)
		h.mu.Lock()
		h.running = nil
		h.mu.Unlock()
		close(p.done)
	}()
	return p
}

// step is the step that the pool is in, without the rest of a report where it can do without.
func step(pool *pgxdrain.Pool) pgxdrain.Step {
	if !draining(pool) {
		return pgxdrain.StepOpen
	}
	return pool.Report().Step
}

// readOnly lets GET and HEAD through.
func readOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			writeJSON(w, http.StatusMethodNotAllowed, refusal{"only GET and HEAD are allowed"})
			return
		}
		next.ServeHTTP(w, r)
	})
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // fails only if the client is gone
}
