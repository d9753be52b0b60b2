package main

import (
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/pgxdrain/pgxdrain"
)

// requests makes each request a unit of work of the pool, and counts them.
//
// echo.WrapMiddleware(drainhttp.Middleware(pool)) would do the first part in a line. Written for Echo it refuses by an error, as
// Echo's own middleware does: it comes to the service's HTTPErrorHandler, and to whatever else looks at errors.
type requests struct {
	log  *slog.Logger
	pool *pgxdrain.Pool
	n    atomic.Int64
}

func (r *requests) inFlight() int64 { return r.n.Load() }

// middleware has to be the outermost, lest others acquire from the pool before it, or after it.
func (r *requests) middleware(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		// Before: from here the drain waits for the request, and what it acquires with its context is admitted.
		ctx, release, err := r.pool.Hold(c.Request().Context())
		if err != nil {
			return err // 503, see answerError
		}
		defer release()
		r.n.Add(1)
		defer r.n.Add(-1)
		c.SetRequest(c.Request().WithContext(ctx))
		c.Response().Before(func() {
			if draining(r.pool) {
				c.Response().Header().Set("Connection", "close") // the client's next request goes to another instance
			}
		})
		start := time.Now()

		if err := next(c); err != nil {
			c.Error(err) // now, and not after the middleware: the request is held until it has its answer
		}

		// After. The log is that of a drain, too: it says who is still there.
		r.log.Info("request", "method", c.Request().Method, "path", c.Path(), "status", c.Response().Status,
			"took", time.Since(start).Round(time.Millisecond), "in_flight", r.inFlight())
		return nil
	}
}

func draining(pool *pgxdrain.Pool) bool {
	select {
	case <-pool.Draining():
		return true
	default:
		return false
	}
}
