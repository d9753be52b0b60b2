package drainhttp_test

import (
	"net/http"
	"testing"

	"github.com/pgxdrain/pgxdrain/drainhttp"
)

// BenchmarkMiddleware calls a handler that does nothing bare, under a Hold alone, and under the middleware, each with the
// ResponseWriter of a real server:
//
//	go test -run '^$' -bench Middleware ./drainhttp
func BenchmarkMiddleware(b *testing.B) {
	pool := newPool(b, "")
	nothing := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	for _, c := range []struct {
		name    string
		handler http.Handler
	}{
		{"bare", nothing},
		{"hold", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx, release, err := pool.Hold(r.Context())
			if err != nil {
				b.Error(err)
				return
			}
			defer release()
			nothing.ServeHTTP(w, r.WithContext(ctx))
		})},
		{"middleware", drainhttp.Middleware(pool)(nothing)},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			s := newServer(b, overHTTP1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for b.Loop() {
					c.handler.ServeHTTP(w, r)
				}
			}))
			s.client.Timeout = 0
			s.get(b, "/")
		})
	}
}
