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
	"time"

	"github.com/pgxdrain/pgxdrain/internal/bench"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

func main() {
	rounds := flag.Int("rounds", 300, "how often each pair is measured; those of which a round takes long, a part of that")
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
		fmt.Fprintln(out, "| | base | compared | base | compared | ratio (95 %) | more by | B/op | allocs/op | target | rounds |")
		fmt.Fprintln(out, "|---|---|---|--:|--:|--:|--:|--:|--:|---|--:|")
		for _, c := range table.cases {
			if !only.MatchString(c.Name) {
				continue
			}
			if err := row(ctx, out, dsn, c, rounds); err != nil {
				return fmt.Errorf("%s: %w", c.Name, err)
			}
		}
		fmt.Fprintln(out)
	}
	fmt.Fprintf(out, "%d rounds, %v.\n", rounds, time.Since(start).Round(time.Second))
	return nil
}

// row measures a case and prints its row.
func row(ctx context.Context, out io.Writer, dsn string, c bench.Case, rounds int) (err error) {
	pair, err := c.Open(ctx, dsn)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pair.Close()) }()
	if err := pair.WarmUp(); err != nil {
		return err
	}
	for range max(1, int(math.Round(float64(rounds)*c.Rounds))) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := pair.Round(); err != nil {
			return err
		}
	}
	printRow(out, c, pair)
	return nil
}

// printRow prints the medians of a pair. What it does not have is a dash.
func printRow(out io.Writer, c bench.Case, pair *bench.Pair) {
	m := pair.Medians()
	times := [2]string{none, none}
	ratio, more := none, none
	if m.Other.Nanoseconds > 0 {
		times[1] = duration(m.Other.Nanoseconds)
	}
	bytes, allocs := fmt.Sprintf("%.0f", m.Other.Bytes), fmt.Sprintf("%.0f", m.Other.Allocs)
	if pair.Base != nil {
		bytes, allocs = fmt.Sprintf("%.0f, %s", m.Base.Bytes, bytes), fmt.Sprintf("%.0f, %s", m.Base.Allocs, allocs)
		if m.Base.Nanoseconds > 0 {
			times[0] = duration(m.Base.Nanoseconds)
			r := pair.Ratio()
			ratio = fmt.Sprintf("%.3f (%.3f to %.3f)", r.Median, r.Low, r.High)
			more = duration(pair.Over(func(r bench.Round) float64 { return r.Other.Nanoseconds - r.Base.Nanoseconds }).Median)
		}
	}
	fmt.Fprintf(out, "| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s | %d |\n", c.Name, cmp.Or(c.Ways[0], none), c.Ways[1],
		times[0], times[1], ratio, more, bytes, allocs, cmp.Or(c.Target, none), len(pair.Results))
}

const none = "–"

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
