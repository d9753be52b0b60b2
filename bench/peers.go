package main

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/exaring/otelpgx"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pgxdrain/pgxdrain/internal/bench"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// conns is how many connections a pool of a peer may have.
const conns = 8

// peers are the comparisons of pgxpool with what else is put on it or in its place, and of what stands on top of a pool, on either.
func peers() []bench.Case {
	var cases []bench.Case
	for _, op := range []bench.Operation{bench.AcquireRelease, bench.Exec} {
		cases = append(cases, traced(op), tracedAndDrained(op))
	}
	for _, goroutines := range []int{1, 64} {
		cases = append(cases, wrapped(goroutines))
	}
	return append(cases, wrappedExec, overSQL, overRiver)
}

// traced is a pgxpool with otelpgx beside a bare one.
func traced(op bench.Operation) bench.Case {
	ways := [2]string{"pgxpool", "pgxpool + otelpgx"}
	return bench.Case{Name: op.Name, Ways: ways, Rounds: 1, Open: func(ctx context.Context, dsn string) (*bench.Pair, error) {
		ctx, tracer, end := recording(ctx)
		bare, err := bench.Config(dsn, conns)
		if err != nil {
			return nil, err
		}
		with := bare.Copy()
		with.ConnConfig.Tracer = tracer
		base, err := pgxpool.NewWithConfig(ctx, bare)
		if err != nil {
			return nil, err
		}
		other, err := pgxpool.NewWithConfig(ctx, with)
		if err != nil {
			return nil, err
		}
		return &bench.Pair{Base: blockOf(ctx, op, base), Other: blockOf(ctx, op, other), Close: func() error {
			base.Close()
			other.Close()
			end()
			return nil
		}}, nil
	}}
}

// tracedAndDrained is a pgxdrain with otelpgx beside a pgxpool with it.
func tracedAndDrained(op bench.Operation) bench.Case {
	ways := [2]string{"pgxpool + otelpgx", "pgxdrain + otelpgx"}
	return bench.Case{Name: op.Name, Ways: ways, Rounds: 1, Open: func(ctx context.Context, dsn string) (*bench.Pair, error) {
		ctx, tracer, end := recording(ctx)
		config, err := bench.Config(dsn, conns)
		if err != nil {
			return nil, err
		}
		config.ConnConfig.Tracer = tracer
		base, other, err := bench.Pools(ctx, config)
		if err != nil {
			return nil, err
		}
		return &bench.Pair{Base: blockOf(ctx, op, base), Other: blockOf(ctx, op, other.Pool), Close: func() error {
			defer end()
			base.Close()
			return other.Shutdown(context.Background())
		}}, nil
	}}
}

// recording returns a context with a span that records, without which otelpgx does nothing, and an otelpgx whose spans are made as
// in a service and then thrown away.
func recording(ctx context.Context) (_ context.Context, _ pgx.QueryTracer, end func()) {
	provider := sdktrace.NewTracerProvider()
	ctx, span := provider.Tracer("bench").Start(ctx, "bench")
	return ctx, otelpgx.NewTracer(otelpgx.WithTracerProvider(provider)), func() { span.End() }
}

func blockOf(ctx context.Context, op bench.Operation, pool *pgxpool.Pool) bench.Block {
	return bench.Sequence(op.N, func() error { return op.Do(ctx, pool) })
}

// wrapper is the other way to know what a pool is doing: a type around it that keeps the set of connections in use under a mutex.
// It does no more than it must for that.
type wrapper struct {
	pool *pgxpool.Pool

	mu    sync.Mutex
	inUse map[*wrappedConn]struct{}
}

type wrappedConn struct {
	*pgxpool.Conn
	wrapper *wrapper

	// Guarded by the wrapper's mutex.
	at, statementStart time.Time
	statement          string
	running            bool
}

func newWrapper(pool *pgxpool.Pool) *wrapper {
	return &wrapper{pool: pool, inUse: make(map[*wrappedConn]struct{})}
}

func (w *wrapper) Acquire(ctx context.Context) (*wrappedConn, error) {
	conn, err := w.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	c := &wrappedConn{Conn: conn, wrapper: w, at: time.Now()}
	w.mu.Lock()
	w.inUse[c] = struct{}{}
	w.mu.Unlock()
	return c, nil
}

func (c *wrappedConn) Release() {
	c.wrapper.mu.Lock()
	delete(c.wrapper.inUse, c)
	c.wrapper.mu.Unlock()
	c.Conn.Release()
}

func (w *wrapper) Exec(ctx context.Context, sql string) error {
	c, err := w.Acquire(ctx)
	if err != nil {
		return err
	}
	defer c.Release()
	w.mu.Lock()
	c.statement, c.statementStart, c.running = sql, time.Now(), true
	w.mu.Unlock()
	_, err = c.Exec(ctx, sql)
	w.mu.Lock()
	c.running = false
	w.mu.Unlock()
	return err
}

var wrapperWays = [2]string{"pgxpool", "wrapper with a mutex"}

func wrapped(goroutines int) bench.Case {
	op := bench.AcquireRelease
	return bench.Case{Name: bench.InParallel(op, goroutines, conns), Ways: wrapperWays, Rounds: 1, Open: func(ctx context.Context, dsn string) (*bench.Pair, error) {
		return beside(ctx, dsn, func(pool *pgxpool.Pool) (bench.Block, bench.Block) {
			w := newWrapper(pool)
			return bench.Parallel(ctx, op.N, goroutines, func(ctx context.Context) error { return op.Do(ctx, pool) }),
				bench.Parallel(ctx, op.N, goroutines, func(ctx context.Context) error {
					c, err := w.Acquire(ctx)
					if err == nil {
						c.Release()
					}
					return err
				})
		})
	}}
}

var wrappedExec = bench.Case{Name: bench.Exec.Name, Ways: wrapperWays, Rounds: 1, Open: func(ctx context.Context, dsn string) (*bench.Pair, error) {
	return beside(ctx, dsn, func(pool *pgxpool.Pool) (bench.Block, bench.Block) {
		w := newWrapper(pool)
		return blockOf(ctx, bench.Exec, pool),
			bench.Sequence(bench.Exec.N, func() error { return w.Exec(ctx, "select 1") })
	})
}}

// beside opens a pair that shares a pgxpool.
func beside(ctx context.Context, dsn string, blocks func(*pgxpool.Pool) (base, other bench.Block)) (*bench.Pair, error) {
	config, err := bench.Config(dsn, conns)
	if err != nil {
		return nil, err
	}
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	base, other := blocks(pool)
	return &bench.Pair{Base: base, Other: other, Close: func() error {
		pool.Close()
		return nil
	}}, nil
}

// overSQL is database/sql on top of either pool.
var overSQL = bench.Case{Name: `database/sql: Exec("select 1")`, Ways: bench.Ours, Rounds: 1, Open: func(ctx context.Context, dsn string) (*bench.Pair, error) {
	return onEither(ctx, dsn, func(pool *pgxpool.Pool, _ int) (bench.Block, func() error, error) {
		db := stdlib.OpenDBFromPool(pool)
		return bench.Sequence(bench.Exec.N, func() error {
			_, err := db.ExecContext(ctx, "select 1")
			return err
		}), db.Close, nil
	})
}}

// jobs is how many jobs a block of River's inserts at once and works off.
const jobs = 500

// overRiver is River on top of either pool.
var overRiver = bench.Case{Name: "River: a job inserted and worked", Ways: bench.Ours, Rounds: 0.1, Open: func(ctx context.Context, dsn string) (*bench.Pair, error) {
	return onEither(ctx, dsn, func(pool *pgxpool.Pool, i int) (bench.Block, func() error, error) {
		return riverOn(ctx, pool, [2]string{"pgxdrain_bench_base", "pgxdrain_bench_other"}[i])
	})
}}

// onEither opens a pair of what is made on top of a pgxpool and of a pgxdrain.
func onEither(ctx context.Context, dsn string, on func(pool *pgxpool.Pool, i int) (bench.Block, func() error, error)) (*bench.Pair, error) {
	config, err := bench.Config(dsn, conns)
	if err != nil {
		return nil, err
	}
	plain, drained, err := bench.Pools(ctx, config)
	if err != nil {
		return nil, err
	}
	var blocks [2]bench.Block
	var closes [2]func() error
	for i, pool := range []*pgxpool.Pool{plain, drained.Pool} {
		if blocks[i], closes[i], err = on(pool, i); err != nil {
			return nil, err
		}
	}
	return &bench.Pair{Base: blocks[0], Other: blocks[1], Close: func() error {
		err := errors.Join(closes[0](), closes[1]())
		plain.Close()
		return errors.Join(err, drained.Shutdown(context.Background()))
	}}, nil
}

// job is one that has nothing to do but to say that it was worked.
type job struct{}

func (job) Kind() string { return "nothing" }

type worker struct {
	river.WorkerDefaults[job]
	worked chan struct{}
}

func (w *worker) Work(context.Context, *river.Job[job]) error {
	w.worked <- struct{}{}
	return nil
}

// riverOn starts River on a pool. Each has a schema of its own, so that none works the other's jobs.
func riverOn(ctx context.Context, pool *pgxpool.Pool, schema string) (bench.Block, func() error, error) {
	quiet := slog.New(slog.DiscardHandler)
	if _, err := pool.Exec(ctx, "create schema "+schema); err != nil {
		return nil, nil, err
	}
	driver := riverpgxv5.New(pool)
	migrator, err := rivermigrate.New(driver, &rivermigrate.Config{Logger: quiet, Schema: schema})
	if err != nil {
		return nil, nil, err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return nil, nil, err
	}

	worked := make(chan struct{}, jobs)
	workers := river.NewWorkers()
	river.AddWorker(workers, &worker{worked: worked})
	client, err := river.NewClient(driver, &river.Config{
		FetchCooldown: river.FetchCooldownMin, // the jobs are what is to take the time
		Logger:        quiet,
		Queues:        map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 100}},
		Schema:        schema,
		Workers:       workers,
	})
	if err != nil {
		return nil, nil, err
	}
	if err := client.Start(ctx); err != nil {
		return nil, nil, err
	}
	inserted := make([]river.InsertManyParams, jobs)
	for i := range inserted {
		inserted[i].Args = job{}
	}
	block := func() (bench.Figures, error) {
		return bench.Measure(jobs, func() error {
			if _, err := client.InsertMany(ctx, inserted); err != nil {
				return err
			}
			for range jobs {
				<-worked
			}
			return nil
		})
	}
	return block, func() error {
		err := client.Stop(context.Background())
		_, dropErr := pool.Exec(context.Background(), "drop schema "+schema+" cascade")
		return errors.Join(err, dropErr)
	}, nil
}
