// Quickstart stops a service in the middle of its work and shows what becomes of the work.
//
// This file is the service: what it does from the signal to its exit is what a service of yours would do. The work that it
// is given is in load.go, what it prints at the end in output.go.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/examples/internal/database"
)

func main() {
	longest := flag.Duration("work", 4*time.Second, "how long the longest operation takes; with 1m it has to be ended by force")
	timeout := flag.Duration("timeout", 10*time.Second, "the whole budget of the shutdown; less than what is left until SIGKILL")
	flag.Parse()
	if err := run(*longest, *timeout); err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

// run returns an error if the service could not start, or could not stop without ending work by force.
func run(longest, timeout time.Duration) (err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	// Never undone: a signal that comes in the last moment must not end the process before its exit code does.
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)

	dsn, stopServer, err := database.URL(ctx, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopServer()) }()

	telemetry, err := newTelemetry(ctx, os.Stdout)
	if err != nil {
		return err
	}
	pool, err := pgxdrain.New(ctx, database.WithKey(dsn, fmt.Sprintf("pool_max_conns=%d", conns)),
		pgxdrain.WithLogger(log),
		pgxdrain.WithTracerProvider(telemetry.traces),
		pgxdrain.WithMeterProvider(telemetry.meters),
		pgxdrain.WithInitialWait(500*time.Millisecond), // behind a load balancer: as long as it takes to notice
		pgxdrain.WithDrainTimeout(timeout),
	)
	if err != nil {
		return err
	}
	defer pool.Close() // where it does not come to the Shutdown below; after that it does nothing
	if err := reach(ctx, pool); err != nil {
		return err
	}

	// The work has no part in ctx: the signal must not cut it off.
	work := startLoad(pool, log, longest)

	// The signal. From here a second one cancels again.
	<-ctx.Done()
	log.Info("signal received")
	again, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)

	// Unready (pool.Draining), refuse, drain, close the database. A second signal brings the end forward.
	err = pool.Shutdown(again)
	work.stop()
	printReport(os.Stdout, pool.Report())

	// Flush logs and telemetry, last, for they tell of all the rest. The log is not buffered. This context is a new one: the
	// others may be done by now.
	flush, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return errors.Join(err, telemetry.shutdown(flush))
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
