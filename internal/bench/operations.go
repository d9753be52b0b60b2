package bench

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxdrain/pgxdrain"
)

// Operation is something that services do with a pool.
type Operation struct {
	Name   string
	N      int // as many as take a few milliseconds
	Target string
	Do     func(ctx context.Context, pool *pgxpool.Pool) error
}

// noSlower is the target of what goes to the server.
const noSlower = "≤ 1.01"

// AcquireRelease is what every operation of a pool begins and ends with, by itself.
var AcquireRelease = Operation{"acquire + release", 10_000, "≤ 1.15", func(ctx context.Context, pool *pgxpool.Pool) error {
	conn, err := pool.Acquire(ctx)
	if err == nil {
		conn.Release()
	}
	return err
}}

// Exec is the shortest statement.
var Exec = Operation{`Exec("select 1")`, 100, noSlower, func(ctx context.Context, pool *pgxpool.Pool) error {
	_, err := pool.Exec(ctx, "select 1")
	return err
}}

// Operations are all of them.
var Operations = []Operation{
	AcquireRelease,
	Exec,
	query(1, 100),
	query(100, 50),
	query(10_000, 2),
	{"transaction of 3 statements", 20, noSlower, func(ctx context.Context, pool *pgxpool.Pool) error {
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			for range 3 {
				if _, err := tx.Exec(ctx, "select 1"); err != nil {
					return err
				}
			}
			return nil
		})
	}},
	{"batch of 100", 5, noSlower, func(ctx context.Context, pool *pgxpool.Pool) error {
		var b pgx.Batch
		for range 100 {
			b.Queue("select 1")
		}
		return pool.SendBatch(ctx, &b).Close()
	}},
	{"copy of " + count(10_000, "row"), 1, noSlower, func(ctx context.Context, pool *pgxpool.Pool) error {
		_, err := pool.CopyFrom(ctx, pgx.Identifier{copied}, []string{"n"}, pgx.CopyFromSlice(10_000, func(i int) ([]any, error) {
			return []any{i}, nil
		}))
		return err
	}},
}

func query(rows, n int) Operation {
	return Operation{"Query of " + count(rows, "row"), n, noSlower, func(ctx context.Context, pool *pgxpool.Pool) error {
		rows, err := pool.Query(ctx, "select generate_series(1, $1::int)", rows)
		if err != nil {
			return err
		}
		for rows.Next() {
		}
		return rows.Err()
	}}
}

// count is so many of something in words.
func count(n int, what string) string {
	digits := strconv.Itoa(n)
	if n >= 1000 {
		digits = fmt.Sprintf("%d,%03d", n/1000, n%1000)
	}
	if n != 1 {
		what += "s"
	}
	return digits + " " + what
}

// copied is the table that is copied to, one for each connection. It forgets its rows, so that the last copy is to as short a
// table as the first.
const copied = "pgxdrain_bench"

// Config is that of a pool on which Operations can be done.
func Config(dsn string, maxConns int) (*pgxpool.Config, error) {
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, err
	}
	config.MaxConns = int32(maxConns)
	config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "create temp table "+copied+" (n int) on commit delete rows")
		return err
	}
	return config, nil
}

// silent keeps the log of a shutdown out of the benchmarks' output.
var silent = pgxdrain.WithLogger(slog.New(slog.DiscardHandler))

// Pools makes a pool of each kind from one config.
func Pools(ctx context.Context, config *pgxpool.Config) (plain *pgxpool.Pool, ours *pgxdrain.Pool, err error) {
	plain, err = pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, nil, err
	}
	ours, err = pgxdrain.NewWithConfig(ctx, config, silent)
	if err != nil {
		plain.Close()
		return nil, nil, err
	}
	return plain, ours, nil
}
