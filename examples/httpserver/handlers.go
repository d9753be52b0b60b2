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

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/drainhttp"
)

func newHandler(log *slog.Logger, pool *pgxdrain.Pool, chaos http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /health", drainhttp.Ready(pool, drainhttp.WithDatabaseCheck(time.Second))) // for people: it asks the database
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

type booking struct {
	Accounts int       `json:"accounts"`
	Sum      int       `json:"sum"`
	Began    time.Time `json:"began"`
	Ended    time.Time `json:"ended"`
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
	b, err := d.book(r.Context(), takes)
	switch {
	case err == nil:
		reply(w, http.StatusOK, b)
	case d.cutOff(r.Context(), err):
		reply(w, http.StatusServiceUnavailable, map[string]string{"error": "the service had to stop before this was done"})
	default:
		d.log.Error("request failed", "path", r.URL.Path, "err", err)
		reply(w, http.StatusInternalServerError, map[string]string{"error": "it could not be done"})
	}
}

// book takes a connection three times, one after the other. It can go on doing so while the pool drains, because it does it with
// the request's context.
func (d *data) book(ctx context.Context, takes time.Duration) (b booking, err error) {
	half := (takes / 2).Seconds()
	if err := d.pool.QueryRow(ctx, "SELECT now() FROM pg_sleep($1)", half).Scan(&b.Began); err != nil {
		return b, err
	}
	err = pgx.BeginFunc(ctx, d.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "CREATE TEMP TABLE booking (account text, amount int) ON COMMIT DROP"); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "INSERT INTO booking VALUES ('alice', -10), ('bob', 10)"); err != nil {
			return err
		}
		const balance = "SELECT count(*), sum(amount) FROM booking, pg_sleep($1)"
		return tx.QueryRow(ctx, balance, half).Scan(&b.Accounts, &b.Sum)
	})
	if err != nil {
		return b, err
	}
	return b, d.pool.QueryRow(ctx, "SELECT now()").Scan(&b.Ended)
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
