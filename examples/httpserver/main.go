// Httpserver is a net/http service that can be stopped at any moment: who has sent a request gets an answer.
//
// This file is the service from its start to its exit, to be copied. What it answers is in handlers.go.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/examples/internal/chaos"
	"github.com/pgxdrain/pgxdrain/examples/internal/database"
	"github.com/pgxdrain/pgxdrain/examples/internal/port"
	"go.opentelemetry.io/otel/exporters/stdout/stdouttrace"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	code := 0
	if err := run(log); err != nil {
		log.Error("httpserver failed", "err", err)
		code = 1
	}
	log.Info("exit", "code", code) // 7
	os.Exit(code)
}

// run returns an error if the service could not start, has failed, or could not stop without cutting requests off.
func run(log *slog.Logger) (err error) {
	portNumber, timeout, err := settings()
	if err != nil {
		return err
	}
	// failed is done when a part of the service has failed, and ctx then or on a signal.
	failed, fail := context.WithCancelCause(context.Background())
	defer fail(nil)
	// Never undone: a signal that comes in the last moment must not end the process before its exit code does.
	ctx, _ := signal.NotifyContext(failed, syscall.SIGTERM, os.Interrupt)

	dsn, stopDatabase, err := database.URL(ctx, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopDatabase()) }()
	spans, err := stdouttrace.New() // a service has an exporter that sends them away
	if err != nil {
		return err
	}
	telemetry := sdktrace.NewTracerProvider(sdktrace.WithBatcher(spans))
	pool, err := pgxdrain.New(ctx, dsn,
		pgxdrain.WithLogger(log),
		pgxdrain.WithTracerProvider(telemetry),
		pgxdrain.WithInitialWait(2*time.Second), // as long as a load balancer takes to notice
	)
	if err != nil {
		return err
	}
	defer pool.Close() // where it does not come to the Shutdown below; after that it does nothing
	if err := reach(ctx, pool); err != nil {
		return err
	}
	door, err := port.Listen(":" + portNumber)
	if err != nil {
		return fmt.Errorf("PORT: %w", err)
	}
	background := func(part func() error) { go guard(log, fail, part) }
	server := &http.Server{
		Handler:           newHandler(log, pool, chaos.Handler(background, door)),
		ReadHeaderTimeout: 2 * time.Second, // so long a connection without a request can hold up the end
		ConnState:         door.ConnState,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	background(func() error { return server.Serve(door) })
	log.Info("serving", "addr", door.Addr())

	// 1. The signal, or the end of a part of the service. From here a signal forces.
	<-ctx.Done()
	if err := context.Cause(failed); err != nil {
		log.Error("fatal error", "err", err)
	} else {
		log.Info("signal received", "signal", context.Cause(ctx))
	}
	deadline := time.Now().Add(timeout)
	force, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)

	// 2. Unready. The port stays open, and requests are let in, while load balancers take notice.
	// 3. Refuse: requests are answered with 503 by the middleware. The port stays open all the same: a closed one would reset
	//    those who are connecting, and nobody could look at the probes.
	// 4. Finish what is in flight. Each request is a unit of work of the pool, so the pool waits for the requests; those that take
	//    too long get their contexts cancelled and, as the server is still there, can answer.
	// 5. Close the database. Nobody uses it any more.
	drain, cancel := context.WithDeadline(force, deadline.Add(-timeout/5))
	defer cancel()
	log.Info("readiness fails", "connections", door)
	err = pool.Shutdown(drain)

	// Close the port and the connections. All handlers have returned; this is for the last answers to leave. It has a short time
	// of its own, because drain may be done by now. Connections that were hijacked (WebSockets) are neither waited for nor
	// closed: whoever has taken one over ends it when pool.Draining is closed.
	log.Info("closing the port", "connections", door)
	answer, cancel := context.WithTimeout(context.Background(), timeout/10)
	defer cancel()
	err = errors.Join(err, door.Shutdown(answer, server))

	// 6. Flush logs and telemetry, last, for they tell of all the rest. The log is not buffered.
	log.Info("flushing logs and telemetry")
	flush, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	return errors.Join(context.Cause(failed), err, telemetry.Shutdown(flush))
}

// guard runs a part of the service. When it fails or panics the service stops, as it does on a signal.
func guard(log *slog.Logger, fail context.CancelCauseFunc, part func() error) {
	defer func() {
		if p := recover(); p != nil {
			log.Error("panic", "value", p, "stack", string(debug.Stack()))
			fail(fmt.Errorf("panic: %v", p))
		}
	}()
	if err := part(); err != nil && !errors.Is(err, http.ErrServerClosed) {
		fail(err)
	}
}

// reach returns an error if the database cannot be reached in time.
func reach(ctx context.Context, pool *pgxdrain.Pool) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := pool.Ping(ctx); err != nil {
		return fmt.Errorf("the database does not answer: %w", err)
	}
	return nil
}

// settings returns PORT, 3000 by default, and SHUTDOWN_TIMEOUT, the whole time from the signal to the exit. 25 s, the default,
// leave 5 of the 30 that Kubernetes gives.
func settings() (port string, timeout time.Duration, err error) {
	port, timeout = "3000", 25*time.Second
	if text := os.Getenv("PORT"); text != "" {
		if _, err := strconv.ParseUint(text, 10, 16); err != nil {
			return "", 0, fmt.Errorf("PORT must be a number from 0 to 65535, and is %q", text)
		}
		port = text
	}
	if text := os.Getenv("SHUTDOWN_TIMEOUT"); text != "" {
		timeout, err = time.ParseDuration(text)
		if err != nil || timeout <= 0 {
			return "", 0, fmt.Errorf("SHUTDOWN_TIMEOUT must be a duration greater than 0, such as 25s, and is %q", text)
		}
	}
	return port, timeout, nil
}
