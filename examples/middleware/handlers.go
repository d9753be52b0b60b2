package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/labstack/echo/v4"
	"github.com/labstack/echo/v4/middleware"
	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/drainhttp"
)

func newEcho(log *slog.Logger, pool *pgxdrain.Pool, chaos http.Handler) (*echo.Echo, *requests) {
	e := echo.New()
	e.HideBanner, e.HidePort = true, true
	e.StdLogger = slog.NewLogLogger(log.Handler(), slog.LevelWarn) // the server's
	e.HTTPErrorHandler = (&errorHandler{log, pool}).answer

	withDatabase := drainhttp.WithDatabaseCheck(time.Second)
	e.GET("/health", echo.WrapHandler(drainhttp.Ready(pool, withDatabase))) // for people
	e.GET("/health/ready", echo.WrapHandler(drainhttp.Ready(pool)))
	e.GET("/health/live", echo.WrapHandler(drainhttp.Live(pool)))
	e.Any("/chaos/*", echo.WrapHandler(chaos))

	r := &requests{log: log, pool: pool}
	api := e.Group("/api", r.middleware, middleware.Recover()) // not the probes: those go on while the pool refuses
	api.GET("/data", (&data{pool}).get)
	return e, r
}

// data answers GET /api/data?ms=N after N milliseconds of work in the database.
type data struct{ pool *pgxdrain.Pool }

const maxTakes = 10 * time.Minute

func (d *data) get(c echo.Context) error {
	ms := int64(5000)
	if c.QueryParams().Has("ms") {
		if err := echo.QueryParamsBinder(c).MustInt64("ms", &ms).BindError(); err != nil || ms < 0 || ms > maxTakes.Milliseconds() {
			return echo.NewHTTPError(http.StatusBadRequest, fmt.Sprintf("ms must be a whole number from 0 to %d", maxTakes.Milliseconds()))
		}
	}
	var now time.Time
	takes := time.Duration(ms) * time.Millisecond
	err := d.pool.QueryRow(c.Request().Context(), "SELECT now() FROM pg_sleep($1)", takes.Seconds()).Scan(&now)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, map[string]time.Time{"now": now})
}

// errorHandler answers all errors of the service in one way, those of a shutdown as well.
type errorHandler struct {
	log  *slog.Logger
	pool *pgxdrain.Pool
}

func (h *errorHandler) answer(err error, c echo.Context) {
	if c.Response().Committed {
		return
	}
	status, text := http.StatusInternalServerError, "it could not be done"
	known := new(echo.HTTPError)
	switch {
	case h.shuttingDown(err, c):
		status, text = http.StatusServiceUnavailable, "the service is shutting down"
		c.Response().Header().Set("Connection", "close")
		c.Response().Header().Set("Retry-After", "1") // second: there is another instance
	case errors.As(err, &known):
		status, text = known.Code, fmt.Sprint(known.Message)
	default:
		h.log.Error("request failed", "path", c.Path(), "err", err)
	}
	_ = c.JSON(status, map[string]string{"error": text}) // fails only if the client is gone
}

const queryCanceled = "57014" // https://www.postgresql.org/docs/current/errcodes-appendix.html

// shuttingDown reports whether err is a refusal, or because the shutdown could not wait any longer: then the server has
// cancelled the statement (that is all that PostgreSQL says), or the connection was severed, or the request's context cancelled.
func (h *errorHandler) shuttingDown(err error, c echo.Context) bool {
	if errors.Is(err, pgxdrain.ErrShuttingDown) || errors.Is(context.Cause(c.Request().Context()), pgxdrain.ErrShuttingDown) {
		return true
	}
	pgErr := new(pgconn.PgError)
	return errors.As(err, &pgErr) && pgErr.Code == queryCanceled && draining(h.pool)
}
