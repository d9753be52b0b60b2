package pgxdrain

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// socket is the net.Conn that a connection was dialed as.
type socket struct {
	net.Conn
	record  record
	attempt *attempt
	stop    context.CancelFunc // of the dial's context, until the connection has been made; guarded by the tracer's mutex

	closed  atomic.Bool // by its user
	severed atomic.Bool
	told    atomic.Bool // its user has been told that it is severed
	givenUp atomic.Bool // its user has given up a statement; pgconn is having that cancelled, and closes the connection

	deadline sync.Mutex // held while one is set
	closing  bool       // because it is severed; guarded by deadline
}

// attempt is the making of one connection, perhaps by several dials.
type attempt struct {
	succeeded atomic.Bool
	quiet     atomic.Bool // pgconn is to send no cancel request for it any more
}

// errSevered is what the user of a connection gets whose socket was closed under it.
//
// To net.Error it is a timeout, because pgconn keeps that for its caller in every case. Of any other error that a statement
// without arguments, as COMMIT is, meets while it waits for its answer, pgconn 5.12 leaves only "conn closed"
// (MultiResultReader.NextResult drops what peekMessage returns).
var errSevered net.Error = severedError{}

// errNotConnected is what a caller gets whose connection was severed while it was being made. It is no timeout: pgxpool's Close
// cancels the context of the making, and pgconn would put context.Canceled in the place of one.
var errNotConnected = fmt.Errorf("pgxdrain: connection severed: %w", ErrShuttingDown)

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
			// A cancel request: ours, or one that pgconn makes when it gives a connection up.
			if a.quiet.Load() {
				return nil, errSevered
			}
			return dial(ctx, network, addr)
		}

		ctx, stop := context.WithCancel(ctx)
		s := &socket{attempt: a, stop: stop}
		s.record.tracer, s.record.socket, s.record.index = t, s, -1
		if !t.own(s) {
			stop()
			return nil, errNotConnected
		}
		conn, err := dial(ctx, network, addr)
		if err != nil {
			t.forget(&s.record)
			stop()
			if s.severed.Load() {
				err = errNotConnected
			}
			return nil, err
		}
		if !s.dialed(conn) {
			conn.Close()
			return nil, errNotConnected
		}
		return s, nil
	}
}

// isSevered reports whether no connection is made any more.
func (t *tracer) isSevered() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.severed
}

// own takes s into the set, unless no connection is to be made any more.
func (t *tracer) own(s *socket) bool {
	t.mu.Lock()
	severed := t.severed
	if !severed {
		t.keep(&s.record)
	}
	crowded := len(t.set) > 2*t.maxConns
	t.mu.Unlock()
	if crowded { // by connections that were taken over with Hijack
		t.reconcile()
	}
	return !severed
}

// dialed gives s its connection, or reports false if it was severed meanwhile.
func (s *socket) dialed(conn net.Conn) bool {
	t := s.record.tracer
	t.mu.Lock()
	defer t.mu.Unlock()
	s.Conn = conn
	return !s.severed.Load()
}

// connected notes that the connection has been made. The context of the dial has no meaning for it any more; it and those that it
// was made from are more to keep than the socket.
func (s *socket) connected(conn *pgx.Conn) {
	s.record.conn, s.record.pid = conn, conn.PgConn().PID()
	s.attempt.succeeded.Store(true)
	s.endDial()
}

// endDial ends the context of the dial.
func (s *socket) endDial() {
	t := s.record.tracer
	t.mu.Lock()
	stop := s.stop
	s.stop = nil
	t.mu.Unlock()
	if stop != nil {
		stop()
	}
}

func (s *socket) Read(b []byte) (int, error) {
	if s.severed.Load() {
		return 0, s.severedError()
	}
	n, err := s.Conn.Read(b)
	if err != nil && s.severed.Load() {
		err = s.severedError()
	}
	return n, err
}

func (s *socket) Write(b []byte) (int, error) {
	if s.severed.Load() {
		return 0, s.severedError()
	}
	n, err := s.Conn.Write(b)
	if err != nil && s.severed.Load() {
		err = s.severedError()
	}
	return n, err
}

// severedError tells pgconn that the socket was severed.
func (s *socket) severedError() error {
	s.told.Store(true)
	if !s.attempt.succeeded.Load() {
		return errNotConnected
	}
	return errSevered
}

func (s *socket) Close() error {
	s.closed.Store(true) // first: whoever begins or ends a lease looks at it afterwards
	s.record.tracer.forgetUnleased(&s.record)
	s.endDial()
	s.record.awaitCancel()
	if s.severed.Load() {
		return nil // sever closes it
	}
	return s.Conn.Close()
}

// The deadline that sever has set is the last.

func (s *socket) SetDeadline(t time.Time) error { return s.setDeadline(t, net.Conn.SetDeadline) }
func (s *socket) SetReadDeadline(t time.Time) error {
	return s.setDeadline(t, net.Conn.SetReadDeadline)
}
func (s *socket) SetWriteDeadline(t time.Time) error {
	return s.setDeadline(t, net.Conn.SetWriteDeadline)
}

func (s *socket) setDeadline(t time.Time, set func(net.Conn, time.Time) error) error {
	s.deadline.Lock()
	defer s.deadline.Unlock()
	if s.severed.Load() {
		return nil
	}
	return set(s.Conn, t)
}

// NetConn returns the connection that the dial function made.
func (s *socket) NetConn() net.Conn { return s.Conn }

// sever closes the connection, or gives up making it. Who reads or writes is freed now; while a cancel request of the connection is
// under way, the close waits for it.
func (s *socket) sever() {
	// Where a statement was in progress we have asked the server to cancel it already, or have not because it is a COMMIT. Where
	// it had been given up before, nobody else asks.
	if !s.givenUp.Load() {
		s.attempt.quiet.Store(true)
	}
	s.severed.Store(true)
	s.endDial()
	t := s.record.tracer
	t.mu.Lock()
	conn := s.Conn
	t.mu.Unlock()
	if conn == nil {
		return
	}
	s.deadline.Lock() // who has seen that it is not severed has set theirs
	_ = conn.SetDeadline(time.Unix(1, 0))
	closing := s.closing
	s.closing = true
	s.deadline.Unlock()
	if closing {
		return
	}
	go func() { // conn is of the user's dialer: its Close may hang
		if over := s.record.cancelUnderWay(); over != nil {
			<-over
		}
		conn.Close()
	}()
}

// severConnecting gives up the connections that are being made, and lets no more be made.
func (t *tracer) severConnecting() {
	t.severSockets(func(s *socket) bool { return !s.attempt.succeeded.Load() })
}

// severUnleased closes the sockets of the connections that nobody has acquired, and lets no more be made. It frees the callers
// who wait for one that is being made, or for what is done with one before they get it: the ping after it was idle, and what the
// user's hooks run. That has to come well before pgxpool is closed, which would give them its own errors.
func (t *tracer) severUnleased() {
	t.severSockets(func(s *socket) bool { return s.record.severUnleased() })
}

// severUnleased marks the connection as severed, or reports false if it is acquired.
func (r *record) severUnleased() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.watch() && !r.socket.severed.Load() {
		return false
	}
	r.socket.severed.Store(true)
	r.cutNow() // acquired meanwhile; if it is later, acquired sees that it is severed
	return true
}

// severAll closes every socket of the pool that is still open.
func (t *tracer) severAll() { t.severSockets(func(*socket) bool { return true }) }

func (t *tracer) severSockets(which func(*socket) bool) {
	t.mu.Lock()
	t.severed = true
	set := slices.Clone(t.set)
	t.mu.Unlock()
	for _, r := range set {
		if s := r.socket; s != nil && which(s) {
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
