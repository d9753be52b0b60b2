package pgxdrain

import (
	"context"
	"maps"
	"net"
	"slices"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgconn"
)

// socket is the net.Conn that a connection was dialed as.
type socket struct {
	net.Conn
	tracer  *tracer
	attempt *attempt
	stop    context.CancelFunc // of the dial's context
	record  atomic.Pointer[record]
	severed atomic.Bool
}

// attempt is the making of one connection, perhaps by several dials.
type attempt struct{ succeeded, severed atomic.Bool }

// errSevered is what the user of a connection gets whose socket was closed under it.
//
// To net.Error it is a timeout, because pgconn keeps that for its caller in every case. Of any other error that a statement
// without arguments, as COMMIT is, meets while it waits for its answer, pgconn 5.12 leaves only "conn closed"
// (MultiResultReader.NextResult drops what peekMessage returns).
var errSevered net.Error = severedError{}

type severedError struct{}

func (severedError) Error() string   { return "pgxdrain: connection severed: pool is shutting down" }
func (severedError) Unwrap() error   { return ErrShuttingDown }
func (severedError) Timeout() bool   { return true }
func (severedError) Temporary() bool { return false }

// dialer wraps the dial function of a connection that is about to be made.
func (t *tracer) dialer(dial pgconn.DialFunc) pgconn.DialFunc {
	a := &attempt{}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if a.succeeded.Load() {
			// A cancel request: ours, or one that pgconn makes when it gives a connection up. After the socket was severed
			// that would only go out, perhaps into a dead network, to ask for what we have asked already.
			if a.severed.Load() {
				return nil, errSevered
			}
			return dial(ctx, network, addr)
		}

		ctx, stop := context.WithCancel(ctx)
		s := &socket{tracer: t, attempt: a, stop: stop}
		if !t.own(s) {
			stop()
			return nil, errSevered
		}
		conn, err := dial(ctx, network, addr)
		if err != nil {
			t.disown(s)
			stop()
			if s.severed.Load() {
				err = errSevered
			}
			return nil, err
		}
		if !s.dialed(conn) {
			conn.Close()
			return nil, errSevered
		}
		return s, nil
	}
}

// own takes s into the set, unless no connection is to be made any more.
func (t *tracer) own(s *socket) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.severed {
		return false
	}
	t.sockets[s] = struct{}{}
	return true
}

// disown takes s out of the set: it is closed, or not the pool's any more.
func (t *tracer) disown(s *socket) {
	if s == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.sockets, s)
}

// dialed gives s its connection, or reports false if it was severed meanwhile.
func (s *socket) dialed(conn net.Conn) bool {
	s.tracer.mu.Lock()
	defer s.tracer.mu.Unlock()
	s.Conn = conn
	return !s.severed.Load()
}

func (s *socket) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if err != nil && s.severed.Load() {
		err = errSevered
	}
	return n, err
}

func (s *socket) Write(b []byte) (int, error) {
	if s.severed.Load() {
		return 0, errSevered
	}
	n, err := s.Conn.Write(b)
	if err != nil && s.severed.Load() {
		err = errSevered
	}
	return n, err
}

func (s *socket) Close() error {
	if r := s.record.Load(); r != nil {
		r.awaitCancel()
	}
	s.tracer.disown(s)
	s.stop()
	return s.Conn.Close()
}

// NetConn returns the connection that the dial function made.
func (s *socket) NetConn() net.Conn { return s.Conn }

// sever closes the connection, or gives up making it.
func (s *socket) sever() {
	s.attempt.severed.Store(true)
	s.severed.Store(true)
	s.stop()
	s.tracer.mu.Lock()
	conn := s.Conn
	s.tracer.mu.Unlock()
	if conn != nil {
		go conn.Close() // of the user's dialer: it may hang
	}
}

// severConnecting gives up the connections that are being made, and lets no more be made.
func (t *tracer) severConnecting() {
	t.severSockets(func(s *socket) bool { return !s.attempt.succeeded.Load() })
}

// severAll closes every socket of the pool that is still open.
func (t *tracer) severAll() { t.severSockets(func(*socket) bool { return true }) }

func (t *tracer) severSockets(which func(*socket) bool) {
	t.mu.Lock()
	t.severed = true
	sockets := slices.Collect(maps.Keys(t.sockets))
	t.mu.Unlock()
	for _, s := range sockets {
		if which(s) {
			s.sever()
		}
	}
}

// socketOf finds the socket under what pgconn, TLS or the user's AfterNetConnect have put on top of it.
func socketOf(conn net.Conn) *socket {
	for {
		switch c := conn.(type) {
		case *socket:
			return c
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return nil
		}
	}
}
