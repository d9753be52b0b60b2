package pgxdrain

import (
	"context"
	"errors"
	"sync"
	"testing"
)

// asPuddleWaits asks for Done as puddle does: to look before it tries, and to wait.
func asPuddleWaits(c *endableContext) <-chan struct{} {
	c.Done()
	return c.Done()
}

func TestContextThatWaitsEndsWithItsCallersOrWhenTheQueueIsFreed(t *testing.T) {
	t.Parallel()
	cause := errors.New("the caller's cause")
	for name, c := range map[string]struct {
		end        func(cancel context.CancelCauseFunc, q *queue)
		err, cause error
	}{
		"cancelled":                   {func(cancel context.CancelCauseFunc, _ *queue) { cancel(cause) }, context.Canceled, cause},
		"freed":                       {func(_ context.CancelCauseFunc, q *queue) { q.free() }, ErrShuttingDown, ErrShuttingDown},
		"freed, and cancelled later":  {func(cancel context.CancelCauseFunc, q *queue) { q.free(); cancel(cause) }, ErrShuttingDown, ErrShuttingDown},
		"cancelled by a unit of work": {func(cancel context.CancelCauseFunc, _ *queue) { cancel(ErrShuttingDown) }, ErrShuttingDown, ErrShuttingDown},
	} {
		var q queue
		caller, cancel := context.WithCancelCause(context.WithValue(t.Context(), &q, "a value"))
		waiting := &endableContext{Context: caller, queue: &q}
		ended := asPuddleWaits(waiting)
		child, stop := context.WithCancel(waiting)
		if err := waiting.Err(); err != nil || child.Err() != nil {
			t.Errorf("%s: %v before it ends", name, err)
		}
		c.end(cancel, &q)
		<-ended
		<-child.Done()
		if waiting.Err() != c.err || context.Cause(waiting) != c.cause {
			t.Errorf("%s: got %v because of %v", name, waiting.Err(), context.Cause(waiting))
		}
		if waiting.Value(&q) != "a value" || child.Value(&q) != "a value" {
			t.Errorf("%s: the caller's value is lost", name)
		}
		stop()
		q.leave(waiting)
		if q.first != nil {
			t.Errorf("%s: it is in the queue for ever", name)
		}
		cancel(nil)
	}
}

func TestContextThatDoesNotWaitIsTheCallersAndNotInTheQueue(t *testing.T) { // not parallel: it counts allocations
	var q queue
	caller, cancel := context.WithCancel(t.Context())
	c := &endableContext{Context: caller, queue: &q}
	if allocs := testing.AllocsPerRun(100, func() {
		c.looked.Store(false)
		if c.Done() != caller.Done() {
			t.Error("Done is not the caller's")
		}
	}); allocs != 0 {
		t.Errorf("%v allocations to look", allocs)
	}
	q.leave(c)
	q.free()
	if err := c.Err(); err != nil {
		t.Errorf("ended by the queue, in which it was not: %v", err)
	}
	cancel()
	if err := c.Err(); err != context.Canceled {
		t.Errorf("got %v", err)
	}
}

func TestContextThatWaitsOnceTheQueueIsFreedHasEnded(t *testing.T) {
	t.Parallel()
	var q queue
	q.free()
	c := &endableContext{Context: t.Context(), queue: &q}
	<-asPuddleWaits(c)
	if err := c.Err(); err != ErrShuttingDown {
		t.Errorf("got %v", err)
	}
}

// One of the user's hooks may acquire another connection with the context of an acquisition.
func TestContextsThatWaitWithinOneAnotherAreFreed(t *testing.T) {
	t.Parallel()
	var q queue
	outer := &endableContext{Context: t.Context(), queue: &q}
	asPuddleWaits(outer)
	inner := &endableContext{Context: outer, queue: &q}
	ended := asPuddleWaits(inner)
	q.free()
	<-ended
	q.leave(inner)
	q.leave(outer)
	if err := inner.Err(); err != ErrShuttingDown || q.first != nil {
		t.Errorf("got %v; left in the queue: %v", err, q.first)
	}
}

func TestStress_EveryContextThatWaitsIsFreed(t *testing.T) {
	t.Parallel()
	for range 200 {
		var q queue
		var running sync.WaitGroup
		for i := range 32 {
			running.Go(func() {
				for range 20 {
					c := &endableContext{Context: t.Context(), queue: &q}
					ended := asPuddleWaits(c)
					if i%2 == 0 {
						<-ended
						if err := c.Err(); err != ErrShuttingDown {
							t.Errorf("got %v", err)
						}
					}
					q.leave(c)
				}
			})
		}
		q.free()
		running.Wait()
		if q.first != nil {
			t.Fatal("not all have left")
		}
	}
}

func TestQueueHasThoseThatHaveEnteredAndNotLeft(t *testing.T) {
	t.Parallel()
	for name, leaving := range map[string][]int{
		"none":                       {},
		"the first":                  {3},
		"the last":                   {0},
		"one in the middle":          {1},
		"two in the middle":          {2, 1},
		"two in the middle, turned":  {1, 2},
		"from the middle to the end": {2, 1, 0},
		"all but one":                {0, 2, 3},
		"all":                        {1, 3, 0, 2},
		"one twice":                  {2, 2},
	} {
		var q queue
		var waiting [4]*endableContext
		for i := range waiting {
			waiting[i] = &endableContext{Context: t.Context(), queue: &q}
			asPuddleWaits(waiting[i])
		}
		left := make(map[int]bool)
		for _, i := range leaving {
			q.leave(waiting[i])
			left[i] = true
		}
		q.free()
		for i, c := range waiting {
			if freed := context.Cause(c) == ErrShuttingDown; freed == left[i] {
				t.Errorf("%s leaves: number %d, freed: %v", name, i, freed)
			}
			q.leave(c)
		}
		if q.first != nil {
			t.Errorf("%s leaves first: one is left in the end", name)
		}
	}
}
