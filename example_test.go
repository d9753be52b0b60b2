package pgxdrain_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// databaseURL stands for wherever a service has its connection string from.
func databaseURL() string {
	dsn, err := pgtest.DSN()
	if err != nil {
		log.Fatal(err)
	}
	return dsn
}

// silent keeps the log of an example's shutdown out of the output of the tests.
var silent = pgxdrain.WithLogger(slog.New(slog.DiscardHandler))

func ExampleNew() {
	ctx := context.Background()
	pool, err := pgxdrain.New(ctx, databaseURL(), silent) // was pgxpool.New
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	var greeting string
	if err := pool.QueryRow(ctx, "select 'hello, ' || $1", "world").Scan(&greeting); err != nil {
		log.Fatal(err)
	}
	fmt.Println(greeting)
	// Output: hello, world
}

func ExampleNewWithConfig() {
	config, err := pgxpool.ParseConfig(databaseURL())
	if err != nil {
		log.Fatal(err)
	}
	config.MaxConns = 8
	pool, err := pgxdrain.NewWithConfig(context.Background(), config, silent,
		pgxdrain.WithPoolName("orders"),
		pgxdrain.WithDrainTimeout(25*time.Second),
		pgxdrain.WithInitialWait(5*time.Second))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(pool.Report().Pool, pool.Stat().MaxConns())
	pool.Shutdown(alreadyDone()) // no need to wait five seconds in an example
	// Output: orders 8
}

func alreadyDone() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// A service that is stopped by a signal. A second signal cuts the drain short.
func ExamplePool_Shutdown() {
	pool, err := pgxdrain.New(context.Background(), databaseURL(), silent)
	if err != nil {
		log.Fatal(err)
	}

	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM)
	defer signal.Stop(signals)

	finished := make(chan struct{})
	inTransaction := make(chan struct{})
	go func() { // the work of the service
		defer close(finished)
		err := pgx.BeginFunc(context.Background(), pool, func(tx pgx.Tx) error {
			close(inTransaction)
			_, err := tx.Exec(context.Background(), "select pg_sleep(0.2)")
			return err
		})
		fmt.Println("the transaction:", err)
	}()
	<-inTransaction
	signals <- syscall.SIGTERM // stands for kill

	<-signals
	ctx, cancel := context.WithTimeout(context.Background(), 25*time.Second)
	defer cancel()
	go func() {
		select {
		case <-signals:
			cancel()
		case <-ctx.Done():
		}
	}()
	err = pool.Shutdown(ctx)
	<-finished
	fmt.Println("the shutdown:", err)
	fmt.Println("drained:", pool.Report().Drained)
	// Output:
	// the transaction: <nil>
	// the shutdown: <nil>
	// drained: 1
}

// A listener never ends by itself: it has to be told. Its context ends when Shutdown is called.
func ExamplePool_DrainContext() {
	pool, err := pgxdrain.New(context.Background(), databaseURL(), silent)
	if err != nil {
		log.Fatal(err)
	}
	listening := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		ctx, cancel := pool.DrainContext(context.Background())
		defer cancel()
		conn, err := pool.Acquire(ctx)
		if err != nil {
			log.Print(err)
			return
		}
		defer conn.Release()
		if _, err := conn.Exec(ctx, "listen news"); err != nil {
			log.Print(err)
			return
		}
		close(listening)
		for {
			if _, err := conn.Conn().WaitForNotification(ctx); err != nil {
				fmt.Println("the listener stops:", context.Cause(ctx))
				return
			}
		}
	}()
	<-listening
	err = pool.Shutdown(context.Background())
	<-stopped
	fmt.Println("the shutdown:", err)
	// Output:
	// the listener stops: pgxdrain: pool is shutting down
	// the shutdown: <nil>
}

// A request that began before the shutdown goes on acquiring connections until it is done. A new one is refused.
func ExamplePool_Hold() {
	ctx := context.Background()
	pool, err := pgxdrain.New(ctx, databaseURL(), silent)
	if err != nil {
		log.Fatal(err)
	}
	request, release, err := pool.Hold(ctx)
	if err != nil {
		log.Fatal(err) // 503
	}
	stopped := make(chan error)
	go func() { stopped <- pool.Shutdown(ctx) }()
	<-pool.Draining()
	for pool.Report().Step == pgxdrain.StepUnready {
		time.Sleep(time.Millisecond)
	}

	_, err = pool.Exec(request, "select 1")
	fmt.Println("the request:", err)
	_, _, err = pool.Hold(ctx)
	fmt.Println("a new one:", err)
	release()
	fmt.Println("the shutdown:", <-stopped)
	// Output:
	// the request: <nil>
	// a new one: pgxdrain: pool is shutting down
	// the shutdown: <nil>
}

func ExamplePool_Active() {
	ctx := context.Background()
	pool, err := pgxdrain.New(ctx, databaseURL(), silent)
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	tx, err := pool.Begin(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer tx.Rollback(ctx)
	if _, err := tx.Exec(ctx, "select 1 from pg_class where relname = 'secret'"); err != nil {
		log.Fatal(err)
	}
	for _, op := range pool.Active() {
		fmt.Printf("%s: %s\n", op.State, op.Statement)
	}
	// Output: idle in transaction: select ? from pg_class where relname = ?
}

// What could not be drained is named.
func ExampleShutdownError() {
	ctx := context.Background()
	pool, err := pgxdrain.New(ctx, databaseURL(), silent)
	if err != nil {
		log.Fatal(err)
	}
	conn, err := pool.Acquire(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Release() // too late

	ctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	err = pool.Shutdown(ctx)
	var e *pgxdrain.ShutdownError
	if errors.As(err, &e) {
		for _, op := range e.Remaining() {
			fmt.Println(op.Outcome, op.State)
		}
	}
	fmt.Println(errors.Is(err, context.DeadlineExceeded))
	// Output:
	// leaked idle
	// true
}
