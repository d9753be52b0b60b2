// Package drainhttp makes an HTTP service stop with its [pgxdrain.Pool]: [Middleware] counts requests as units of work and
// refuses new ones once the pool does, [Ready] and [Live] answer probes, [Active] is a page of the operations in progress.
//
// It reads the pool and never shuts it down. Nothing is mounted by itself.
package drainhttp

import (
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/pgxdrain/pgxdrain"
)

// MiddlewareOption changes what [Middleware] does.
type MiddlewareOption func(*middleware)

// WithRetryAfter sets what a refused request is told in Retry-After, rounded up to seconds. It must not be negative.
// Defaults to 1 s: the connection is closed, so the next attempt comes to another instance.
func WithRetryAfter(d time.Duration) MiddlewareOption {
	if d < 0 {
		panic("drainhttp: WithRetryAfter must not be given a negative duration")
	}
	return func(m *middleware) { m.retryAfter = strconv.Itoa(int(math.Ceil(d.Seconds()))) }
}

// Middleware makes each request a unit of work of the pool (see [pgxdrain.Pool.Hold]), from before its handler is called until
// the handler has returned or panicked. What the handler acquires with the request's context, or one made from it, is admitted
// while the pool drains, so a request that has begun can finish; the drain waits for it.
//
// Once the pool refuses work, a new request is answered with 503, Connection: close, Retry-After (see [WithRetryAfter]) and a
// JSON object whose error says why; its handler is not called. From the moment [pgxdrain.Pool.Draining] is closed, during the
// initial wait as well, responses say Connection: close, which over HTTP/2 is a GOAWAY, so that clients that keep their
// connections go elsewhere.
//
// At the cancel step of the shutdown the request's context is cancelled with the cause [pgxdrain.ErrShuttingDown].
//
// Panics, [http.ErrAbortHandler] included, go through unchanged. Of a connection that was taken over with Hijack only the time
// until the handler returns is held: who goes on with it in another goroutine has to call Hold there.
func Middleware(pool *pgxdrain.Pool, opts ...MiddlewareOption) func(http.Handler) http.Handler {
	m := middleware{pool: pool, retryAfter: "1"}
	for _, opt := range opts {
		opt(&m)
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { m.serve(w, r, next) })
	}
}

type middleware struct {
	pool       *pgxdrain.Pool
	retryAfter string
}

func (m *middleware) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	ctx, release, err := m.pool.Hold(r.Context())
	if err != nil {
		w.Header().Set("Connection", "close")
		w.Header().Set("Retry-After", m.retryAfter)
		writeJSON(w, http.StatusServiceUnavailable, refusal{"the service is shutting down"})
		return
	}
	defer release()
	w, c := closing(w, m.pool)
	next.ServeHTTP(w, r.WithContext(ctx))
	if c != nil {
		c.beforeHeader() // which net/http writes now if the handler has not
	}
}

// refusal is the body of the response to a request that is refused.
type refusal struct {
	Error string `json:"error"`
}

func draining(pool *pgxdrain.Pool) bool {
	select {
	case <-pool.Draining():
		return true
	default:
		return false
	}
}
