//go:build unix

package main

import (
	"net/http"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/pgxdrain/pgxdrain/examples/internal/process"
	"github.com/pgxdrain/pgxdrain/examples/internal/servicetest"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m).Run()) }

func TestMiddleware(t *testing.T) {
	t.Parallel()
	program := process.Build(t)
	servicetest.Test(t, program)

	t.Run("what happens before and after each request is logged, also while it drains", func(t *testing.T) {
		t.Parallel()
		s := servicetest.Start(t, program, nil, "pool_initial_wait=0")
		slow := s.InFlight("/api/data?ms=3000", 2)
		sent := time.Now()
		s.Signal(syscall.SIGTERM)
		for range 2 {
			if a := <-slow; a.Status != http.StatusOK {
				t.Errorf("%d %q %v", a.Status, a.Body, a.Err)
			}
		}
		s.EndsWithin(process.Limit, sent, 0)
		s.Logged("readiness fails", "in_flight=2")
		s.Logged("msg=request", "path=/api/data", "status=200", "in_flight=")
		s.Logged("closing the port", "in_flight=0")
	})

	t.Run("what the framework answers by itself is in the service's own way", func(t *testing.T) {
		t.Parallel()
		s := servicetest.Start(t, program, nil)
		if a := s.Do("GET", "/nothing"); a.Status != http.StatusNotFound || a.Body != `{"error":"Not Found"}`+"\n" {
			t.Errorf("%d %q %v", a.Status, a.Body, a.Err)
		}
	})
}
