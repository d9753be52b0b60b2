// Worker works off a queue of River jobs and can be stopped at any moment: no job is lost, none is run to its end twice.
//
// This file is the service, to be copied. What it needs of River is in river.go, the job that it works off in job.go.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/examples/internal/database"
	"go.opentelemetry.io/otel/exporters/stdout/stdouttrace"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

func main() {
	insert := flag.Int("jobs", 20, "how many jobs to insert at the start")
	flag.Parse()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	code := 0
	if err := run(log, *insert); err != nil {
		log.Error("worker failed", "err", err)
		code = 1
	}
	log.Info("exit", "code", code) // 7
	os.Exit(code)
}

// run returns an error if the worker could not start, has failed, or could not stop without taking jobs from their workers.
func run(log *slog.Logger, insert int) (err error) {
	timeout, err := shutdownTimeout()
	if err != nil {
		return err
	}
	// Never undone: a signal that comes in the last moment must not end the process before its exit code does.
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	log.Info("starting")
	failed := make(chan error, 1)
	fail := func(err error) { // ends the worker as a signal does, and makes its exit code 1
		select {
		case failed <- err:
		default: // it is on its way already
		}
	}

	dsn, stopServer, err := database.URL(ctx, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopServer()) }()

	spans, err := stdouttrace.New() // a service has an exporter that sends them away
	if err != nil {
		return err
	}
	telemetry := sdktrace.NewTracerProvider(sdktrace.WithBatcher(spans))
	pool, err := pgxdrain.New(ctx, database.WithKey(dsn, fmt.Sprintf("pool_max_conns=%d", maxConns)),
		pgxdrain.WithLogger(log), pgxdrain.WithTracerProvider(telemetry))
	if err != nil {
		return err
	}
	defer pool.Close() // where it does not come to the Shutdown below; after that it does nothing
	jobs, err := newClient(pool, log, fail)
	if err != nil {
		return err
	}

	var ready atomic.Bool
	probes := &http.Server{Handler: health(&ready)}
	defer probes.Close() // last: whoever asks is told until the end
	listener, err := net.Listen("tcp", ":"+port())
	if err != nil {
		return err
	}
	go func() { fail(probes.Serve(listener)) }()

	if err := start(ctx, pool, jobs, insert); err == nil {
		ready.Store(true)
		log.Info("ready", "port", port())
	} else if ctx.Err() == nil { // else the signal came before the start was done
		fail(fmt.Errorf("cannot start: %w", err))
	}

	// 1. The signal. From here a second one cuts short what is waited for. A fatal error goes through the same door.
	select {
	case <-ctx.Done():
		log.Info("signal received", "signal", context.Cause(ctx))
	case err = <-failed:
		log.Error("fatal error", "err", err)
	}
	deadline := time.Now().Add(timeout)
	again, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)

	// 2. Unready. The probes go on answering.
	ready.Store(false)
	log.Info("readiness fails")

	// The end of the budget is kept, a quarter each, for River to hand jobs back, for the pool to end what is left, for jobs that
	// are left even then, and for telemetry.
	grace := min(timeout/2, 4*time.Second)

	// 3. Refuse: no more jobs are fetched. 4. Finish the jobs in hand. The pool is open until River has stopped: River needs it
	// for the jobs, and then to say what has become of them.
	log.Info("refusing: no more jobs are fetched")
	log.Info("finishing the jobs in hand", "jobs", inHand(pool), "left", time.Until(deadline.Add(-grace)).Round(time.Millisecond))
	stopTelling := tellProgress(log, pool)
	finish, cancel := context.WithDeadlineCause(again, deadline.Add(-grace), errors.New("their time is up"))
	defer cancel()
	if jobs.Stop(finish) != nil {
		if soonest := time.Now().Add(grace); soonest.Before(deadline) { // a second signal
			deadline = soonest
		}
		log.Warn("handing back the jobs that are left", "jobs", inHand(pool), "because", context.Cause(finish))
		err = errors.Join(err, fmt.Errorf("jobs were handed back: %w", context.Cause(finish)))
		handBack, cancel := context.WithDeadline(context.Background(), deadline.Add(-grace*3/4))
		defer cancel()
		if jobs.StopAndCancel(handBack) != nil {
			err = errors.Join(err, errors.New("and some have not returned"))
		}
	}
	stopTelling()

	// 5. Close the database. Nothing is left in it, unless a job pays no heed to its context.
	log.Info("closing the database")
	closing, cancel := context.WithDeadline(again, deadline.Add(-grace/2))
	defer cancel()
	err = errors.Join(err, pool.Shutdown(closing))
	if err != nil {
		tidy, cancel := context.WithDeadline(context.Background(), deadline.Add(-grace/4))
		defer cancel()
		err = errors.Join(err, handBackTheRest(tidy, log, pool, jobs.ID()))
	}

	// 6. Flush logs and telemetry, last, for they tell of all the rest. The log is not buffered.
	log.Info("flushing logs and telemetry")
	flush, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	err = errors.Join(err, telemetry.Shutdown(flush))
	select {
	case late := <-failed: // while it was stopping
		err = errors.Join(err, late)
	default:
	}
	return err
}

// shutdownTimeout returns the whole budget from the signal to the exit: SHUTDOWN_TIMEOUT, or 20 s, which leaves 10 of the 30 that
// Kubernetes gives.
func shutdownTimeout() (time.Duration, error) {
	text := os.Getenv("SHUTDOWN_TIMEOUT")
	if text == "" {
		return 20 * time.Second, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("SHUTDOWN_TIMEOUT must be a duration greater than 0, such as 20s, and is %q", text)
	}
	return d, nil
}

func port() string {
	if port := os.Getenv("PORT"); port != "" {
		return port
	}
	return "3000"
}

// health answers probes: alive as long as it answers, ready while jobs are fetched.
func health(ready *atomic.Bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health/live", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /health/ready", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
		}
	})
	return mux
}
