// Kubernetes is a service that is rolled out, scaled down and evicted without anybody noticing.
//
// This file is the service from its start to its exit, to be copied. What it answers is in handlers.go; deployment.yaml and
// Dockerfile go with it, and with the budgets below.
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

const (
	defaultPort = "3000" // containerPort

	// defaultTimeout is the whole time from SIGTERM to the exit. With the sleep of preStop before it and a margin it has to fit into
	// terminationGracePeriodSeconds: 2 s + 25 s + 3 s = 30 s. main_test.go does this sum with the numbers of deployment.yaml.
	defaultTimeout = 25 * time.Second

	// propagation is how long requests are let in after SIGTERM: the time that it takes until kube-proxies, ingresses and load
	// balancers everywhere have taken notice of an endpoint that is gone, a few seconds (see docs/kubernetes.md).
	propagation = 5 * time.Second
)

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	code := 0
	if err := run(log); err != nil {
		log.Error("kubernetes failed", "err", err)
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
		pgxdrain.WithInitialWait(propagation),
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

	// 1. SIGTERM, which the kubelet sends when preStop has returned, or the end of a part of the service. From here a signal
	// forces. The kubelet sends no second one: SIGKILL is next.
	<-ctx.Done()
	if err := context.Cause(failed); err != nil {
		log.Error("fatal error", "err", err)
	} else {
		log.Info("signal received", "signal", context.Cause(ctx))
	}
	deadline := time.Now().Add(timeout)
	force, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)

	// 2. Unready, but open for the propagation. Meanwhile responses ask for their connections to be closed: the clients' next ones
	//    go to other pods.
	// 3. Refuse: who is routed here all the same gets 503 from the middleware. An ingress can be told to try another pod then.
	// 4. Finish what is in flight. Each request is a unit of work of the pool, so the pool waits for the requests; those that take
	//    too long get their contexts cancelled and, as the server is still there, can answer.
	// 5. Close the database. Nobody uses it any more.
	drain, cancel := context.WithDeadline(force, deadline.Add(-timeout/5))
	defer cancel()
	log.Info("readiness fails", "connections", door)
	err = pool.Shutdown(drain)

	// Close the port and the connections. All handlers have returned; this is for the last answers to leave. It has a short time
	// of its own, because drain may be done by now. Connections that were hijacked (WebSockets) are neither waited for nor closed.
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

// settings returns PORT and SHUTDOWN_TIMEOUT.
func settings() (port string, timeout time.Duration, err error) {
	port, timeout = defaultPort, defaultTimeout
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
