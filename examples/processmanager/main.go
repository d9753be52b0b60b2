//go:build unix

// Processmanager is an HTTP service that PM2 and systemd start, watch and stop: it tells them when it is ready, that it is
// stopping, and how far it is.
//
// This file is the service, to be copied. What it says to PM2 and systemd is in manager.go, what it serves in api.go.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/examples/internal/database"
	"go.opentelemetry.io/otel/exporters/stdout/stdouttrace"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// What systemd and PM2 are told to wait for (processmanager.service, ecosystem.config.js) has to be longer.
const (
	startTimeout           = 15 * time.Second
	defaultShutdownTimeout = 20 * time.Second
)

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	code := 0
	if err := run(log); err != nil {
		log.Error("processmanager failed", "err", err)
		code = 1
	}
	log.Info("exit", "code", code) // 7
	os.Exit(code)
}

// run returns an error if the service could not start, has failed, or could not stop without ending work by force.
func run(log *slog.Logger) (err error) {
	timeout, err := shutdownTimeout()
	if err != nil {
		return err
	}
	manager, err := newManager(log)
	if err != nil {
		return err
	}
	ctx := manager.asksToStop()
	log.Info("starting")
	failed := make(chan error, 1)
	fail := func(err error) { // ends the service as a signal does, and makes its exit code 1
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
	pool, err := pgxdrain.New(ctx, dsn, pgxdrain.WithLogger(log), pgxdrain.WithTracerProvider(telemetry))
	if err != nil {
		return err
	}
	defer pool.Close() // where it does not come to the Shutdown below; after that it does nothing

	server := &http.Server{Handler: routes(pool, fail)}
	defer server.Close()
	if listener, err := start(ctx, pool); err == nil {
		go func() { fail(server.Serve(listener)) }()
		go manager.watch(listener.Addr())
		manager.ready()
		log.Info("ready", "address", listener.Addr())
	} else if ctx.Err() == nil { // else it was asked to stop before the start was done
		fail(fmt.Errorf("cannot start: %w", err))
	}

	// 1. The signal, or PM2's message. From here a second one cuts short what is waited for. A fatal error goes through the same
	// door.
	select {
	case <-ctx.Done():
		log.Info("asked to stop", "by", context.Cause(ctx))
	case err = <-failed:
		log.Error("fatal error", "err", err)
	}
	deadline := time.Now().Add(timeout)
	again := manager.asksToStop()
	stopTelling := manager.stopping(pool, deadline)
	defer stopTelling()

	// 2. Unready, 3. refuse, 4. finish the requests in flight, 5. close the database: the pool logs each. The server goes on
	// listening meanwhile: it answers probes, and who comes too late gets 503. The end of the budget is kept for the rest.
	rest := min(timeout/4, 2*time.Second)
	draining, cancel := context.WithDeadline(again, deadline.Add(-rest))
	defer cancel()
	log.Info("readiness fails")
	err = errors.Join(err, pool.Shutdown(draining))

	// The last responses have to leave.
	closing, cancel := context.WithDeadline(again, deadline.Add(-rest/2))
	defer cancel()
	if e := server.Shutdown(closing); e != nil {
		err = errors.Join(err, fmt.Errorf("not all connections were closed: %w", e))
	}

	// 6. Flush logs and telemetry, last, for they tell of all the rest. The log is not buffered.
	log.Info("flushing logs and telemetry")
	flush, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	err = errors.Join(err, telemetry.Shutdown(flush))
	select {
	case late := <-failed: // while it was stopping
		if !errors.Is(late, http.ErrServerClosed) {
			err = errors.Join(err, late)
		}
	default:
	}
	return err
}

// start returns a listener on the port once the database can be reached.
func start(ctx context.Context, pool *pgxdrain.Pool) (net.Listener, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := pool.Ping(ctx); err != nil {
		return nil, err
	}
	port := os.Getenv("PORT")
	if port == "" {
		port = "3000"
	}
	return net.Listen("tcp", ":"+port)
}

// shutdownTimeout returns the whole budget from the signal to the exit.
func shutdownTimeout() (time.Duration, error) {
	text := os.Getenv("SHUTDOWN_TIMEOUT")
	if text == "" {
		return defaultShutdownTimeout, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("SHUTDOWN_TIMEOUT must be a duration greater than 0, such as 20s, and is %q", text)
	}
	return d, nil
}
