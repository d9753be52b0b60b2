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

func TestHTTPServer(t *testing.T) {
	t.Parallel()
	program := process.Build(t)
	servicetest.Test(t, program)

	t.Run("a transaction past the budget is rolled back, and its locks are gone", func(t *testing.T) {
		t.Parallel()
		s := servicetest.Start(t, program, []string{"SHUTDOWN_TIMEOUT=3s"}, "pool_initial_wait=0")
		slow := s.InFlight("/api/data?ms=20000", 1)
		s.WaitForStatement("%FROM booking, pg_sleep%", 1)
		sent := time.Now()
		s.Signal(syscall.SIGTERM)
		if a := <-slow; a.Status != http.StatusServiceUnavailable {
			t.Errorf("%d %q %v", a.Status, a.Body, a.Err)
		}
		s.EndsWithin(20*time.Second, sent, 1)
	})
}
