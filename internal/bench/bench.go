// Package bench is what the benchmarks measure, and how. The root package's benchmarks and the command in bench/ share it.
//
// Two ways to do the same are measured by turns, in blocks of a few milliseconds, so that whatever else the machine is doing
// befalls both. What counts is the ratio of the two blocks of a round, and the median of that over many rounds: a median of
// blocks from different minutes says more about the machine.
package bench

import (
	"context"
	"errors"
	"math"
	"runtime"
	"slices"
	"sync"
	"time"
)

// Case is a thing that can be done in two ways.
type Case struct {
	Name   string
	Ways   [2]string // the base and the one that is compared with it; the base may be "", if there is none
	Rounds float64   // how many of the rounds asked for it gets, as a share: less than 1 if a round of it takes long
	Target string    // of the comparison, in words; may be empty
	Open   func(ctx context.Context, dsn string) (*Pair, error)
}

// Pair is an open Case. Base is nil if there is none.
type Pair struct {
	Base, Other Block
	Close       func() error

	Results []Round
}

// A Block does something a number of times and returns what it takes to do it once.
type Block func() (Figures, error)

// Figures are those of one operation.
type Figures struct {
	Nanoseconds   float64
	Bytes, Allocs float64 // allocated on the heap, by the whole process
}

// Round is what the two ways took, one right after the other.
type Round struct{ Base, Other Figures }

// Round measures both ways once more. Neither always comes second.
func (p *Pair) Round() error {
	var r Round
	base := func() (err error) {
		if p.Base != nil {
			r.Base, err = p.Base()
		}
		return err
	}
	other := func() (err error) {
		r.Other, err = p.Other()
		return err
	}
	first, second := base, other
	if len(p.Results)%2 == 1 {
		first, second = other, base
	}
	if err := first(); err != nil {
		return err
	}
	if err := second(); err != nil {
		return err
	}
	p.Results = append(p.Results, r)
	return nil
}

// WarmUp measures a round that does not count: it connects, prepares, and fills caches.
func (p *Pair) WarmUp() error {
	err := p.Round()
	p.Results = nil
	return err
}

// Medians returns the median of each figure.
func (p *Pair) Medians() Round {
	m := func(figure func(Round) float64) float64 { return p.Over(figure).Median }
	return Round{
		Figures{
			m(func(r Round) float64 { return r.Base.Nanoseconds }),
			m(func(r Round) float64 { return r.Base.Bytes }),
			m(func(r Round) float64 { return r.Base.Allocs }),
		},
		Figures{
			m(func(r Round) float64 { return r.Other.Nanoseconds }),
			m(func(r Round) float64 { return r.Other.Bytes }),
			m(func(r Round) float64 { return r.Other.Allocs }),
		},
	}
}

// Ratio is how long the other way takes, the base being 1.
func (p *Pair) Ratio() Spread {
	return p.Over(func(r Round) float64 { return r.Other.Nanoseconds / r.Base.Nanoseconds })
}

// Over returns the spread of a figure over the rounds.
func (p *Pair) Over(figure func(Round) float64) Spread {
	values := make([]float64, len(p.Results))
	for i, r := range p.Results {
		values[i] = figure(r)
	}
	return spread(values)
}

// Spread is a median and the interval that the true median is in with a probability of at least 95 %; with fewer than six
// values, the range of them.
type Spread struct{ Median, Low, High float64 }

// spread counts out the interval between two of the values themselves, which assumes nothing of how they are distributed: the
// number of values below the true median is that of heads in so many tosses of a coin.
func spread(values []float64) Spread {
	slices.Sort(values)
	n := len(values)
	if n == 0 {
		return Spread{}
	}
	out := max(0, int(float64(n)/2-0.98*math.Sqrt(float64(n)))-1)
	return Spread{(values[(n-1)/2] + values[n/2]) / 2, values[out], values[n-1-out]}
}

// Sequence is a block that does something n times.
func Sequence(n int, do func() error) Block {
	return func() (Figures, error) {
		return Measure(n, func() error {
			for range n {
				if err := do(); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// Parallel is a block in which so many goroutines do something, together n times, each with a context of its own, as the callers
// of a service have. The time is what passes by the clock on the wall, divided by n: the inverse of the throughput.
func Parallel(ctx context.Context, n, goroutines int, do func(context.Context) error) Block {
	each := max(1, n/goroutines)
	return func() (Figures, error) {
		start := make(chan struct{})
		errs := make([]error, goroutines)
		var running sync.WaitGroup
		for i := range goroutines {
			ctx, cancel := context.WithCancel(ctx)
			running.Go(func() {
				defer cancel()
				<-start
				for range each {
					if errs[i] = do(ctx); errs[i] != nil {
						return
					}
				}
			})
		}
		return Measure(each*goroutines, func() error {
			close(start)
			running.Wait()
			return errors.Join(errs...)
		})
	}
}

// Measure returns what it takes do to do something once, of the n times that it does it.
func Measure(n int, do func() error) (Figures, error) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	err := do()
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	return Figures{
		Nanoseconds: float64(took) / float64(n),
		Bytes:       float64(after.TotalAlloc-before.TotalAlloc) / float64(n),
		Allocs:      float64(after.Mallocs-before.Mallocs) / float64(n),
	}, err
}
