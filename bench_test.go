package pgxdrain_test

import (
	"math"
	"testing"

	"github.com/pgxdrain/pgxdrain/internal/bench"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// BenchmarkPaired does each thing with pgxpool and with pgxdrain by turns; an iteration is a round of two blocks. It reports the
// medians of each, per operation, and that of the ratio. What is compared, and why by turns, is in internal/bench.
//
//	go test -run '^$' -bench Paired -benchtime 200x .
//
// The command in bench/ does the same for the peers as well, and prints a table with the spread.
func BenchmarkPaired(b *testing.B) {
	dsn := pgtest.Database(b)
	for _, c := range bench.Cases() {
		b.Run(c.Name, func(b *testing.B) {
			pair := must[*bench.Pair](b)(c.Open(b.Context(), dsn))
			defer func() {
				if err := pair.Close(); err != nil {
					b.Error(err)
				}
			}()
			if err := pair.WarmUp(); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if err := pair.Round(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(0, "ns/op") // of a round: means nothing
			m := pair.Medians()
			for way, f := range map[string]bench.Figures{c.Ways[0]: m.Base, c.Ways[1]: m.Other} {
				if way == "" {
					continue
				}
				b.ReportMetric(f.Nanoseconds, way+"-ns")
				b.ReportMetric(math.Round(f.Bytes), way+"-B")
				b.ReportMetric(math.Round(f.Allocs), way+"-allocs")
			}
			if pair.Base != nil {
				b.ReportMetric(pair.Ratio().Median, "ratio")
			}
		})
	}
}
