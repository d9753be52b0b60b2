package bench

import (
	"math"
	"testing"
)

func TestIntervalHasTheMedianInItWith95PercentProbability(t *testing.T) {
	for n := 1; n <= 1000; n++ {
		ranks := make([]float64, n)
		for i := range ranks {
			ranks[n-1-i] = float64(i)
		}
		s := spread(ranks)
		if want := float64(n-1) / 2; s.Median != want {
			t.Errorf("%d values: median %v, want %v", n, s.Median, want)
		}
		if s.Low != float64(n-1)-s.High {
			t.Errorf("%d values: from %v to %v, not in the middle", n, s.Low, s.High)
		}
		// It misses if fewer than Low+1 of the values are below the true median, or above it.
		miss := 0.0
		for k := range int(s.Low) + 1 {
			miss += 2 * math.Exp(logChoose(n, k)-float64(n)*math.Ln2)
		}
		if n >= 6 && miss > 0.05 || n < 6 && s.Low != 0 {
			t.Errorf("%d values: from %v to %v, missed with a probability of %v", n, s.Low, s.High, miss)
		}
	}
}

func logChoose(n, k int) float64 {
	gamma := func(n int) float64 {
		v, _ := math.Lgamma(float64(n + 1))
		return v
	}
	return gamma(n) - gamma(k) - gamma(n-k)
}
