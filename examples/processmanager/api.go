//go:build unix

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/drainhttp"
)

// routes is what the service serves.
func routes(pool *pgxdrain.Pool, fail func(error)) http.Handler {
	api := http.NewServeMux()
	api.Handle("GET /api/data", data(pool))
	api.HandleFunc("POST /debug/panic", func(http.ResponseWriter, *http.Request) { panic("a bug") })

	mux := http.NewServeMux()
	mux.Handle("/", drainhttp.Middleware(pool)(failing(api, fail)))
	mux.Handle("/health/ready", drainhttp.Ready(pool))
	mux.Handle("/health/live", drainhttp.Live(pool))
	return mux
}

// failing ends the service when a handler panics: nobody knows what state it has left behind. net/http would go on.
func failing(next http.Handler, fail func(error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			v := recover()
			if v == nil {
				return
			}
			if v != http.ErrAbortHandler {
				fail(fmt.Errorf("%s %s panicked: %v", r.Method, r.URL.Path, v))
			}
			panic(v) // net/http logs it and closes the connection
		}()
		next.ServeHTTP(w, r)
	})
}

const maxMilliseconds = 600_000

// data answers after ms milliseconds of work at the server, 5,000 if the request does not say.
func data(pool *pgxdrain.Pool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ms := 5000
		if text := r.URL.Query().Get("ms"); text != "" {
			var err error
			if ms, err = strconv.Atoi(text); err != nil || ms < 0 || ms > maxMilliseconds {
				http.Error(w, fmt.Sprintf("ms must be a number from 0 to %d", maxMilliseconds), http.StatusBadRequest)
				return
			}
		}
		var rows int
		err := pool.QueryRow(r.Context(), "SELECT count(*) FROM pg_sleep($1)", float64(ms)/1000).Scan(&rows)
		if err != nil {
			select {
			case <-pool.Draining(): // it has been ended
				http.Error(w, "the service is shutting down", http.StatusServiceUnavailable)
			default:
				http.Error(w, "the database does not answer", http.StatusInternalServerError)
			}
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]int{"ms": ms, "rows": rows}) // fails only if the client is gone
	}
}
