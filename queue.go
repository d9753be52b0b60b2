package pgxdrain

import (
	"context"
	"sync"
	"sync/atomic"
)

// refusedContext is the context that a refused acquisition goes on with: puddle's Acquire returns the Err of a context that
// is done before it does anything else. It keeps the values, where a user's tracer may have its span.
type refusedContext struct {
	context.Context
	by *tracer
}

var done = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

func (refusedContext) Done() <-chan struct{} { return done }
func (refusedContext) Err() error            { return ErrShuttingDown }

// endableContext is the context of an acquisition that the shutdown may end, which its caller is to know from any other end of
// its context: one that may have to wait for a connection to come back, or one of a unit of work.
type endableContext struct {
	context.Context // the caller's
	by              *tracer

	queue    *queue      // nil if it cannot have to wait
	looked   atomic.Bool // at its Done, once
	waiting  context.Context
	stop     context.CancelCauseFunc // of waiting
	next     *endableContext         // in the queue, guarded by its mutex as waiting is
	previous *endableContext
}

// queue is the acquisitions that wait for a connection to come back. puddle's Close leaves those in its semaphore where they are,
// behind a leaked connection for ever; from here they can be freed.
type queue struct {
	mu    sync.Mutex
	first *endableContext
	freed atomic.Bool // they are to wait no more
}

// Done is the caller's own when it is asked for the first time, by puddle's Acquire before it does anything else; most
// acquisitions find a connection then and never ask again. Whoever asks again is about to wait, and gets one that the shutdown
// closes as well. That takes a context.WithCancel, which is more than all else that we do for an acquisition.
func (c *endableContext) Done() <-chan struct{} {
	if c.queue == nil || c.looked.CompareAndSwap(false, true) {
		return c.Context.Done()
	}
	return c.queue.enter(c).Done()
}

func (c *endableContext) Err() error {
	ctx := c.ends()
	err := ctx.Err()
	if err != nil && context.Cause(ctx) == ErrShuttingDown {
		return ErrShuttingDown
	}
	return err
}

// Value finds, in the place of the caller's, the context that Done is of, where the context package asks for that.
func (c *endableContext) Value(key any) any { return c.ends().Value(key) }

// ends is the context that c ends with.
func (c *endableContext) ends() context.Context {
	if c.queue == nil {
		return c.Context
	}
	c.queue.mu.Lock()
	defer c.queue.mu.Unlock()
	if c.waiting == nil {
		return c.Context
	}
	return c.waiting
}

// enter returns the context that c waits with. Contexts are made and ended outside the mutex: the caller's may be made from one of
// ours, whose methods take it.
func (q *queue) enter(c *endableContext) context.Context {
	waiting, stop := context.WithCancelCause(c.Context)
	q.mu.Lock()
	if c.waiting != nil {
		waiting = c.waiting
		q.mu.Unlock()
		stop(nil)
		return waiting
	}
	c.waiting, c.stop = waiting, stop
	freed := q.freed.Load()
	if !freed {
		c.next = q.first
		if c.next != nil {
			c.next.previous = c
		}
		q.first = c
	}
	q.mu.Unlock()
	if freed {
		stop(ErrShuttingDown)
	}
	return waiting
}

// leave is called when c's acquisition is over.
func (q *queue) leave(c *endableContext) {
	if !c.looked.Load() {
		return
	}
	q.mu.Lock()
	stop := c.stop
	if stop == nil {
		c.waiting = c.Context // it is not to enter any more
	}
	if c.next != nil {
		c.next.previous = c.previous
	}
	if c.previous != nil {
		c.previous.next = c.next
	} else if q.first == c {
		q.first = c.next
	}
	c.next, c.previous = nil, nil
	q.mu.Unlock()
	if stop != nil {
		stop(nil)
	}
}

// free ends all that wait, and whoever is about to from now on, with ErrShuttingDown.
func (q *queue) free() {
	var stops []context.CancelCauseFunc
	q.mu.Lock()
	q.freed.Store(true)
	for c := q.first; c != nil; c = c.next {
		stops = append(stops, c.stop)
	}
	q.mu.Unlock()
	for _, stop := range stops {
		stop(ErrShuttingDown)
	}
}
