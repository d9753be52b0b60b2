package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/pgxdrain/pgxdrain"
)

// What takes more connections than a server has room for: they end in a goroutine of this process, which says as much of
// PostgreSQL's protocol as they need.

// crowded is how many operations are in progress when a look at all of them is measured.
const crowded = 10_000

// Nowhere is the config of a pool of so many connections that lead to no server.
func Nowhere(conns int) (*pgxpool.Config, error) {
	config, err := pgxpool.ParseConfig("host=nowhere user=nobody sslmode=disable default_query_exec_mode=simple_protocol")
	if err != nil {
		return nil, err
	}
	config.MaxConns = int32(conns)
	config.ConnConfig.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil }
	config.ConnConfig.DialFunc = func(context.Context, string, string) (net.Conn, error) {
		client, server := net.Pipe()
		go answer(server)
		return client, nil
	}
	return config, nil
}

// answer is a server that takes every statement for a BEGIN.
func answer(conn net.Conn) {
	defer conn.Close()
	backend := pgproto3.NewBackend(conn, conn)
	if _, err := backend.ReceiveStartupMessage(); err != nil {
		return
	}
	backend.Send(&pgproto3.AuthenticationOk{})
	backend.Send(&pgproto3.BackendKeyData{ProcessID: 1, SecretKey: make([]byte, 4)})
	backend.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	for backend.Flush() == nil {
		message, err := backend.Receive()
		if err != nil {
			return
		}
		if _, ok := message.(*pgproto3.Query); !ok {
			return // Terminate
		}
		backend.Send(&pgproto3.CommandComplete{CommandTag: []byte("BEGIN")})
		backend.Send(&pgproto3.ReadyForQuery{TxStatus: 'T'})
	}
}

// crowd is a pool with so many operations in progress, half of them in a transaction, and room for a few more. The connections were
// acquired in another order than they were made in, as after a while they are.
func crowd(ctx context.Context, operations int, opts ...pgxdrain.Option) (_ *pgxdrain.Pool, disperse func() error, _ error) {
	config, err := Nowhere(operations + 10)
	if err != nil {
		return nil, nil, err
	}
	pool, err := pgxdrain.NewWithConfig(ctx, config, append(opts, silent)...)
	if err != nil {
		return nil, nil, err
	}
	var conns []*pgxpool.Conn
	release := func() {
		for _, c := range conns {
			c.Release()
		}
		conns = nil
	}
	disperse = func() error {
		release()
		return pool.Shutdown(context.Background())
	}
	acquireAll := func(do func(i int, c *pgxpool.Conn) error) error {
		for i := range operations {
			c, err := pool.Acquire(ctx)
			if err != nil {
				return err
			}
			conns = append(conns, c)
			if err := do(i, c); err != nil {
				return err
			}
		}
		return nil
	}
	err = acquireAll(func(int, *pgxpool.Conn) error { return nil })
	if err == nil {
		rand.New(rand.NewPCG(1, 2)).Shuffle(len(conns), func(i, j int) { conns[i], conns[j] = conns[j], conns[i] })
		release() // the last that was released is the next that is acquired
		err = acquireAll(func(i int, c *pgxpool.Conn) error {
			if i%2 == 0 {
				return nil
			}
			_, err := c.Exec(ctx, "begin")
			return err
		})
	}
	if err != nil {
		return nil, nil, errors.Join(err, disperse())
	}
	return pool, disperse, nil
}

// activeOnce is a look at all operations by Active.
func activeOnce() (do func(*pgxdrain.Pool), _ pgxdrain.Option) {
	return func(p *pgxdrain.Pool) { p.Active() }, silent
}

// collectOnce is a look at all operations by a reader of metrics.
func collectOnce() (do func(*pgxdrain.Pool), _ pgxdrain.Option) {
	reader := metric.NewManualReader()
	var collected metricdata.ResourceMetrics
	return func(*pgxdrain.Pool) {
		if err := reader.Collect(context.Background(), &collected); err != nil || len(collected.ScopeMetrics) != 1 {
			panic(fmt.Sprintf("collected %d scopes: %v", len(collected.ScopeMetrics), err))
		}
	}, pgxdrain.WithMeterProvider(metric.NewMeterProvider(metric.WithReader(reader)))
}

// look is something that looks at all operations: how long it takes, and how long those who acquire wait meanwhile.
func look(name string, once func() (do func(*pgxdrain.Pool), _ pgxdrain.Option)) []Case {
	cases := []Case{{name + " over " + count(crowded, "operation"), [2]string{"", "pgxdrain"}, 0.5, "≤ 5 ms",
		func(ctx context.Context, _ string) (*Pair, error) {
			do, option := once()
			pool, disperse, err := crowd(ctx, crowded, option)
			if err != nil {
				return nil, err
			}
			return &Pair{Close: disperse, Other: Sequence(1, func() error {
				do(pool)
				return nil
			})}, nil
		}}}
	for _, quantile := range []struct {
		name string
		of   float64
	}{{"p50", 0.5}, {"p99", 0.99}, {"longest of 10,000", 1}} {
		cases = append(cases, Case{
			fmt.Sprintf("%s beside %s over %s: %s", AcquireRelease.Name, name, count(crowded, "operation"), quantile.name),
			[2]string{"alone", "beside"}, 0.5, "≤ 10 µs more",
			func(ctx context.Context, _ string) (*Pair, error) {
				do, option := once()
				pool, disperse, err := crowd(ctx, crowded, option)
				if err != nil {
					return nil, err
				}
				alone := func() (Figures, error) { return waits(ctx, pool.Pool, quantile.of) }
				beside := func() (Figures, error) {
					defer repeatedly(func() { do(pool) })()
					return waits(ctx, pool.Pool, quantile.of)
				}
				return &Pair{Base: alone, Other: beside, Close: disperse}, nil
			}})
	}
	return cases
}

// repeatedly does something over and over, from before it returns until stop returns.
func repeatedly(do func()) (stop func()) {
	var enough atomic.Bool
	begun, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		do()
		close(begun)
		for !enough.Load() {
			do()
		}
	}()
	<-begun
	return func() {
		enough.Store(true)
		<-over
	}
}

// waits returns, as Nanoseconds, that quantile of how long acquisitions with their releases take, one by one.
func waits(ctx context.Context, pool *pgxpool.Pool, quantile float64) (Figures, error) {
	took := make([]time.Duration, 10_000)
	for i := range took {
		start := time.Now()
		if err := AcquireRelease.Do(ctx, pool); err != nil {
			return Figures{}, err
		}
		took[i] = time.Since(start)
	}
	slices.Sort(took)
	return Figures{Nanoseconds: float64(took[min(int(quantile*float64(len(took))), len(took)-1)])}, nil
}

// memory is what a connection of a pool keeps on the heap, its share of the pool itself included, after a transaction has begun on
// it and while it is held: then a pool knows the most of it.
var memory = Case{"heap per connection", Ours, 0.05, "≤ 256 B more", func(ctx context.Context, _ string) (*Pair, error) {
	const conns = 1000
	config, err := Nowhere(conns)
	if err != nil {
		return nil, err
	}
	block := func(open func() (*pgxpool.Pool, func(), error)) Block {
		return func() (Figures, error) {
			var before, after runtime.MemStats
			collect(&before)
			pool, closePool, err := open()
			if err != nil {
				return Figures{}, err
			}
			defer closePool()
			var held []*pgxpool.Conn
			for range conns {
				c, err := pool.Acquire(ctx)
				if err != nil {
					return Figures{}, err
				}
				defer c.Release()
				held = append(held, c)
				if _, err := c.Exec(ctx, "begin"); err != nil {
					return Figures{}, err
				}
			}
			collect(&after)
			runtime.KeepAlive(held)
			return Figures{
				Bytes:  float64(after.HeapAlloc-before.HeapAlloc) / conns,
				Allocs: float64(after.HeapObjects-before.HeapObjects) / conns,
			}, nil
		}
	}
	return &Pair{
		Base: block(func() (*pgxpool.Pool, func(), error) {
			pool, err := pgxpool.NewWithConfig(ctx, config)
			if err != nil {
				return nil, nil, err
			}
			return pool, pool.Close, nil
		}),
		Other: block(func() (*pgxpool.Pool, func(), error) {
			pool, err := pgxdrain.NewWithConfig(ctx, config, silent)
			if err != nil {
				return nil, nil, err
			}
			return pool.Pool, pool.Close, nil
		}),
		Close: func() error { return nil },
	}, nil
}}

// collect reads the statistics of a heap that has nothing on it that is not in use.
func collect(stats *runtime.MemStats) {
	runtime.GC()
	runtime.GC() // the first one only takes what sync.Pools hold to where the second collects it
	runtime.ReadMemStats(stats)
}
