// Package port closes the port of an [http.Server] without losing a request.
//
// Server.Shutdown alone loses some while clients go on connecting. The kernel resets the connections that it has accepted for the
// server when the port is closed, and the server itself drops each request that it reads after Shutdown was called (conn.serve
// in net/http's server.go, at "shuttingDown"). It cannot be seen behind a load balancer that sends nothing any more.
package port

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Port is the listener of one server.
type Port struct {
	*net.TCPListener
	closing atomic.Bool

	mu     sync.Mutex
	states map[net.Conn]http.ConnState
	counts map[http.ConnState]int // of states
	closed bool                   // there will be no more connections
	quiet  chan struct{}          // closed when it is closed and no connection is new or active
}

// Listen listens on a TCP address.
func Listen(address string) (*Port, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	return &Port{
		TCPListener: l.(*net.TCPListener),
		states:      make(map[net.Conn]http.ConnState),
		counts:      make(map[http.ConnState]int),
		quiet:       make(chan struct{}),
	}, nil
}

// Accept is for the server. While the port is being closed it accepts those whom the kernel has accepted already, and then
// closes the listener in the same breath: who connects between these two system calls is reset, which was seen twice in 1,000
// closes under 8 clients who did nothing but connect.
func (p *Port) Accept() (net.Conn, error) {
	for {
		if p.closing.Load() && !queued(p.TCPListener) {
			_ = p.Close()
			p.note(func() { p.closed = true })
			return nil, http.ErrServerClosed
		}
		conn, err := p.TCPListener.Accept()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded): // Shutdown has woken it
			_ = p.SetDeadline(time.Now().Add(100 * time.Millisecond)) // lest it wait for one who was queued and has left
		case errors.Is(err, net.ErrClosed):
			p.note(func() { p.closed = true })
			return nil, err
		default:
			return conn, err
		}
	}
}

// ConnState is for the server's field of that name.
func (p *Port) ConnState(conn net.Conn, state http.ConnState) {
	p.note(func() {
		if old, ok := p.states[conn]; ok {
			p.counts[old]--
		}
		if state == http.StateClosed || state == http.StateHijacked { // the server has nothing to do with it any more
			delete(p.states, conn)
			return
		}
		p.states[conn] = state
		p.counts[state]++
	})
}

// note changes what is known.
func (p *Port) note(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	wasQuiet := p.isQuiet()
	change()
	if p.isQuiet() && !wasQuiet {
		close(p.quiet)
	}
}

// Caller of this method must hold the mutex!
func (p *Port) isQuiet() bool {
	return p.closed && p.counts[http.StateNew]+p.counts[http.StateActive] == 0
}

// String says how many connections there are: new without a request, active in one, idle after one.
func (p *Port) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("%d active, %d idle, %d new", p.counts[http.StateActive], p.counts[http.StateIdle], p.counts[http.StateNew])
}

// Shutdown closes the port, lets the server answer whoever has connected, and shuts it down, which closes the connections that
// are idle. When ctx ends it closes the others, and returns an error if there were requests in them. It returns by then.
//
// A connection without a request is waited for until the server's ReadHeaderTimeout. One that was hijacked is neither waited for
// nor closed, as by [http.Server.Shutdown].
func (p *Port) Shutdown(ctx context.Context, server *http.Server) error {
	p.closing.Store(true)
	_ = p.SetDeadline(time.Now()) // fails only if the listener is closed already
	select {
	case <-p.quiet:
	case <-ctx.Done():
	}
	if server.Shutdown(ctx) == nil || ctx.Err() == nil { // else it only says again that the listener is closed
		return nil
	}
	p.mu.Lock()
	cut := p.counts[http.StateActive]
	p.mu.Unlock()
	_ = server.Close()
	if cut > 0 {
		return fmt.Errorf("%d connections were closed in the middle of a request: %w", cut, context.Cause(ctx))
	}
	return nil
}
