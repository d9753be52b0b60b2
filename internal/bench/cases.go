package bench

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/puddle/v2"

	"github.com/pgxdrain/pgxdrain"
)

// Ours are the ways of what compares the two pools.
var Ours = [2]string{"pgxpool", "pgxdrain"}

// Cases are the comparisons of pgxdrain with pgxpool.
func Cases() []Case {
	var cases []Case
	for _, op := range Operations {
		cases = append(cases, sequence(op))
	}
	for _, conns := range []int{4, 64} {
		for _, goroutines := range []int{2, 8, 64, 512} {
			cases = append(cases, parallel(goroutines, conns))
		}
	}
	for _, conns := range []int{1, 8, 64} {
		cases = append(cases, drainEnd(conns))
	}
	cases = append(cases, refusal(1), refusal(512))
	cases = append(cases, look("Active()", activeOnce)...)
	cases = append(cases, look("a metrics read", collectOnce)...)
	return append(cases, memory)
}

func sequence(op Operation) Case {
	return Case{op.Name, Ours, 1, op.Target, func(ctx context.Context, dsn string) (*Pair, error) {
		return pairOf(ctx, dsn, 4, func(pool *pgxpool.Pool) Block {
			return Sequence(op.N, func() error { return op.Do(ctx, pool) })
		})
	}}
}

// parallel has blocks long enough for callers to be preempted while they have a connection, so that others have to wait.
func parallel(goroutines, conns int) Case {
	return Case{InParallel(AcquireRelease, goroutines, conns), Ours, 0.5, "≤ 1.10", func(ctx context.Context, dsn string) (*Pair, error) {
		return pairOf(ctx, dsn, conns, func(pool *pgxpool.Pool) Block {
			return Parallel(ctx, 5*AcquireRelease.N, goroutines, func(ctx context.Context) error { return AcquireRelease.Do(ctx, pool) })
		})
	}}
}

// InParallel names an operation that so many goroutines do.
func InParallel(op Operation, goroutines, conns int) string {
	return fmt.Sprintf("%s, %s, %s", op.Name, count(goroutines, "goroutine"), count(conns, "connection"))
}

func pairOf(ctx context.Context, dsn string, conns int, block func(*pgxpool.Pool) Block) (*Pair, error) {
	config, err := Config(dsn, conns)
	if err != nil {
		return nil, err
	}
	plain, ours, err := Pools(ctx, config)
	if err != nil {
		return nil, err
	}
	return &Pair{Base: block(plain), Other: block(ours.Pool), Close: func() error {
		plain.Close()
		return ours.Shutdown(context.Background())
	}}, nil
}

// drainEnd is the time from the last release to the end of a shutdown that waits for it, beside that of a Close of pgxpool that
// is called right after the release. Each round takes a new pool.
func drainEnd(conns int) Case {
	name := "last release to the return of Shutdown, " + count(conns, "connection")
	return Case{name, Ours, 8 / float64(12+conns), "≤ 100 µs more", func(ctx context.Context, dsn string) (*Pair, error) {
		config, err := pgxpool.ParseConfig(dsn)
		if err != nil {
			return nil, err
		}
		config.MaxConns = int32(conns)
		base := func() (Figures, error) {
			pool, err := pgxpool.NewWithConfig(ctx, config)
			if err != nil {
				return Figures{}, err
			}
			last, err := lastOf(ctx, pool, conns)
			if err != nil {
				return Figures{}, err
			}
			time.Sleep(asleep)
			return Measure(1, func() error {
				last.Release()
				pool.Close()
				return nil
			})
		}
		other := func() (Figures, error) {
			pool, err := pgxdrain.NewWithConfig(ctx, config, silent)
			if err != nil {
				return Figures{}, err
			}
			last, err := lastOf(ctx, pool.Pool, conns)
			if err != nil {
				return Figures{}, err
			}
			result := drain(pool)
			return Measure(1, func() error {
				last.Release()
				return <-result
			})
		}
		return &Pair{Base: base, Other: other, Close: func() error { return nil }}, nil
	}}
}

// asleep is how long it is quiet before the last release, until goroutines, threads and cores have gone to sleep.
const asleep = 5 * time.Millisecond

// lastOf makes so many connections and releases all but one.
func lastOf(ctx context.Context, pool *pgxpool.Pool, conns int) (*pgxpool.Conn, error) {
	var last *pgxpool.Conn
	for range conns {
		conn, err := pool.Acquire(ctx)
		if err != nil {
			return nil, err
		}
		if last != nil {
			defer last.Release()
		}
		last = conn
	}
	return last, nil
}

// drain begins a shutdown and returns when it waits for what is acquired.
func drain(pool *pgxdrain.Pool) (result <-chan error) {
	returned := make(chan error, 1)
	go func() { returned <- pool.Shutdown(context.Background()) }()
	for pool.Report().Step != pgxdrain.StepDrain {
		time.Sleep(100 * time.Microsecond)
	}
	time.Sleep(asleep)
	return returned
}

// refusal is an acquisition that fails because the pool drains, beside one that fails because a pgxpool is closed.
func refusal(callers int) Case {
	name := "acquisition refused, " + count(callers, "caller")
	return Case{name, Ours, 1, "≤ 1 µs", func(ctx context.Context, dsn string) (*Pair, error) {
		config, err := pgxpool.ParseConfig(dsn)
		if err != nil {
			return nil, err
		}
		plain, err := pgxpool.NewWithConfig(ctx, config)
		if err != nil {
			return nil, err
		}
		plain.Close()
		ours, err := pgxdrain.NewWithConfig(ctx, config, silent, pgxdrain.WithDrainTimeout(24*time.Hour))
		if err != nil {
			return nil, err
		}
		held, err := ours.Acquire(ctx)
		if err != nil {
			return nil, err
		}
		result := drain(ours)
		refused := func(pool *pgxpool.Pool, want error) Block {
			return Parallel(ctx, 10_000, callers, func(ctx context.Context) error {
				if _, err := pool.Acquire(ctx); err != want {
					return fmt.Errorf("an acquisition that should be refused gave %v", err)
				}
				return nil
			})
		}
		return &Pair{
			Base:  refused(plain, puddle.ErrClosedPool),
			Other: refused(ours.Pool, pgxdrain.ErrShuttingDown),
			Close: func() error {
				held.Release()
				return <-result
			},
		}, nil
	}}
}
