// Bench compares pgxdrain, and what else is put on pgxpool or in its place, with pgxpool, and prints tables in Markdown:
//
//	go run ./bench
//
// It uses the server that DATABASE_URL names, which has to allow 150 connections, or starts one. docs/benchmarks.md says how to read the
// tables.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/pgxdrain/pgxdrain/internal/bench"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

func main() {
	rounds := flag.Int("rounds", 200, "how often each pair is measured; those of which a round takes long, a part of that")
	run := flag.String("run", "", "only what this regular expression matches")
	flag.Parse()
	only, err := regexp.Compile(*run)
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
		err = compare(ctx, os.Stdout, *rounds, only)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func compare(ctx context.Context, out io.Writer, rounds int, only *regexp.Regexp) (err error) {
	dsn := os.Getenv("DATABASE_URL")
	if dsn == "" {
		server, err := pgtest.Start(ctx)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, server.Stop()) }()
		dsn = server.DSN()
	}
	start := time.Now()
	for _, table := range []struct {
		title string
		cases []bench.Case
	}{
		{"pgxdrain beside pgxpool", bench.Cases()},
		{"Peers", peers()},
	} {
		fmt.Fprintf(out, "## %s\n\n", table.title)
		printRow(out, "what", "base", "compared", "base", "compared", "ratio (95 %)", "more by", "B/op", "allocs/op", "target", "rounds")
		printRow(out, "---", "---", "---", "--:", "--:", "--:", "--:", "--:", "--:", "---", "--:")
		for _, c := range table.cases {
			if !only.MatchString(c.Name) {
				continue
			}
			pair, err := measure(ctx, dsn, c, rounds)
			if err != nil {
				return fmt.Errorf("%s: %w", c.Name, err)
			}
			printRow(out, figures(c, pair)...)
		}
		fmt.Fprintln(out)
	}
	fmt.Fprintf(out, "%d rounds, %v.\n", rounds, time.Since(start).Round(time.Second))
	return nil
}

// measure measures a case, in its share of the rounds, and at least once. It opens it anew for each fifth of them: where in memory
// things come to lie makes a difference of some nanoseconds, which would otherwise be the same in all rounds.
func measure(ctx context.Context, dsn string, c bench.Case, rounds int) (*bench.Pair, error) {
	rounds = max(1, int(math.Round(float64(rounds)*c.Rounds)))
	times := min(5, rounds)
	all := new(bench.Pair)
	for i := range times {
		pair, err := measureOnce(ctx, dsn, c, rounds*(i+1)/times-rounds*i/times)
		if err != nil {
			return nil, err
		}
		pair.Results = append(all.Results, pair.Results...)
		all = pair
	}
	return all, nil
}

func measureOnce(ctx context.Context, dsn string, c bench.Case, rounds int) (_ *bench.Pair, err error) {
	pair, err := c.Open(ctx, dsn)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, pair.Close()) }()
	if err := pair.WarmUp(); err != nil {
		return nil, err
	}
	for range rounds {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := pair.Round(); err != nil {
			return nil, err
		}
	}
	return pair, nil
}

// columns are those of a row, and none is a cell for which there is nothing.
const (
	columns = 11
	none    = "–"
)

func printRow(out io.Writer, cells ...string) {
	fmt.Fprintf(out, "| %s |\n", strings.Join(cells, " | "))
}

// figures are the cells of a case: medians, and the ratio with the interval of its median.
func figures(c bench.Case, pair *bench.Pair) []string {
	m := pair.Medians()
	base, compared, ratio, more := none, none, none, none
	bytes, allocs := fmt.Sprintf("%.0f", m.Other.Bytes), fmt.Sprintf("%.0f", m.Other.Allocs)
	timed := m.Other.Nanoseconds > 0
	if timed {
		compared = duration(m.Other.Nanoseconds)
	}
	if pair.Base != nil {
		bytes, allocs = fmt.Sprintf("%.0f, %s", m.Base.Bytes, bytes), fmt.Sprintf("%.0f, %s", m.Base.Allocs, allocs)
	}
	if timed && pair.Base != nil {
		r := pair.Ratio()
		base, ratio = duration(m.Base.Nanoseconds), fmt.Sprintf("%.3f (%.3f to %.3f)", r.Median, r.Low, r.High)
		more = duration(pair.Over(func(r bench.Round) float64 { return r.Other.Nanoseconds - r.Base.Nanoseconds }).Median)
	}
	return []string{c.Name, orNone(c.Ways[0]), c.Ways[1], base, compared, ratio, more, bytes, allocs, orNone(c.Target),
		strconv.Itoa(len(pair.Results))}
}

func orNone(s string) string { return cmp.Or(s, none) }

// duration prints nanoseconds with three digits.
func duration(ns float64) string {
	for _, unit := range []struct {
		ns   float64
		name string
	}{{1e6, "ms"}, {1e3, "µs"}} {
		if math.Abs(ns) >= unit.ns {
			return fmt.Sprintf("%.3g %s", ns/unit.ns, unit.name)
		}
	}
	return fmt.Sprintf("%.0f ns", ns)
}
