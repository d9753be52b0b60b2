package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/drainhttp"
)

func newHandler(log *slog.Logger, pool *pgxdrain.Pool, chaos http.Handler) http.Handler {
	mux := http.NewServeMux()
	// The probes do not ask the database: one that is down would have all pods taken out of the service, or restarted, at once.
	mux.Handle("GET /health", drainhttp.Ready(pool, drainhttp.WithDatabaseCheck(time.Second))) // for people
	mux.Handle("GET /health/ready", drainhttp.Ready(pool))
	mux.Handle("GET /health/live", drainhttp.Live(pool))
	mux.Handle("GET /api/data", drainhttp.Middleware(pool)(&data{log, pool}))
	mux.Handle("/chaos/", chaos)
	return mux
}

// data answers GET /api/data?ms=N after N milliseconds of work in the database.
type data struct {
	log  *slog.Logger
	pool *pgxdrain.Pool
}

const queryCanceled = "57014" // https://www.postgresql.org/docs/current/errcodes-appendix.html

const maxTakes = 10 * time.Minute

func (d *data) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	takes := 5 * time.Second
	if r.URL.Query().Has("ms") {
		ms, err := strconv.Atoi(r.URL.Query().Get("ms"))
		if err != nil || ms < 0 || ms > int(maxTakes.Milliseconds()) {
			reply(w, http.StatusBadRequest, map[string]string{
				"error": fmt.Sprintf("ms must be a whole number from 0 to %d", maxTakes.Milliseconds())})
			return
		}
		takes = time.Duration(ms) * time.Millisecond
	}
	var now time.Time
	err := d.pool.QueryRow(r.Context(), "SELECT now() FROM pg_sleep($1)", takes.Seconds()).Scan(&now)
	switch {
	case err == nil:
		reply(w, http.StatusOK, map[string]time.Time{"now": now})
	case d.cutOff(r.Context(), err):
		reply(w, http.StatusServiceUnavailable, map[string]string{"error": "the service had to stop before this was done"})
	default:
		d.log.Error("request failed", "path", r.URL.Path, "err", err)
		reply(w, http.StatusInternalServerError, map[string]string{"error": "it could not be done"})
	}
}

// cutOff reports whether err is because the shutdown could not wait any longer: the server has cancelled the statement (that is all
// that PostgreSQL says then), or the connection was severed, or the request's context cancelled.
func (d *data) cutOff(ctx context.Context, err error) bool {
	if errors.Is(err, pgxdrain.ErrShuttingDown) || errors.Is(context.Cause(ctx), pgxdrain.ErrShuttingDown) {
		return true
	}
	pgErr := new(pgconn.PgError)
	return errors.As(err, &pgErr) && pgErr.Code == queryCanceled && d.pool.Report().Step != pgxdrain.StepOpen
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // fails only if the client is gone
}
