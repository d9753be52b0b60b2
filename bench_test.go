package pgxdrain_test

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// BenchmarkPaired does each thing with pgxpool and with pgxdrain by turns, in blocks short enough that whatever else the
// machine is doing befalls both. It reports the median time per operation of each, and the ratio of the two:
//
//	go test -run '^$' -bench Paired -benchtime 200x .
func BenchmarkPaired(b *testing.B) {
	ctx := context.Background()
	dsn := pgtest.Database(b)
	plain := must[*pgxpool.Pool](b)(pgxpool.New(ctx, dsn))
	defer plain.Close()
	ours := must[*pgxdrain.Pool](b)(pgxdrain.New(ctx, dsn, pgxdrain.WithLogger(slog.New(slog.DiscardHandler))))
	defer ours.Close()

	for _, c := range []struct {
		name  string
		block int // operations in a block: about 2 ms
		do    func(*pgxpool.Pool) error
	}{
		{"acquire-release", 5000, func(p *pgxpool.Pool) error {
			c, err := p.Acquire(ctx)
			if err == nil {
				c.Release()
			}
			return err
		}},
		{"exec", 50, func(p *pgxpool.Pool) error {
			_, err := p.Exec(ctx, "select 1")
			return err
		}},
		{"query-100-rows", 20, func(p *pgxpool.Pool) error {
			rows, err := p.Query(ctx, "select generate_series(1, 100)")
			if err != nil {
				return err
			}
			rows.Close()
			return rows.Err()
		}},
		{"transaction-of-3", 10, func(p *pgxpool.Pool) error {
			return pgx.BeginFunc(ctx, p, func(tx pgx.Tx) error {
				for range 3 {
					if _, err := tx.Exec(ctx, "select 1"); err != nil {
						return err
					}
				}
				return nil
			})
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			block := func(p *pgxpool.Pool) float64 {
				start := time.Now()
				for range c.block {
					if err := c.do(p); err != nil {
						b.Fatal(err)
					}
				}
				return float64(time.Since(start).Nanoseconds()) / float64(c.block)
			}
			block(plain) // connect, prepare, warm up
			block(ours.Pool)
			var theirs, mine, ratios []float64
			for i := 0; b.Loop(); i++ {
				var x, y float64
				if i%2 == 0 { // neither always comes second
					x, y = block(plain), block(ours.Pool)
				} else {
					y, x = block(ours.Pool), block(plain)
				}
				theirs, mine, ratios = append(theirs, x), append(mine, y), append(ratios, y/x)
			}
			b.ReportMetric(0, "ns/op") // of a block: means nothing
			b.ReportMetric(median(theirs), "pgxpool-ns")
			b.ReportMetric(median(mine), "pgxdrain-ns")
			b.ReportMetric(median(ratios), "ratio")
		})
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}
