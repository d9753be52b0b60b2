package pgxdrain_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxdrain/pgxdrain"
)

// The steps in virtual time: which comes when, and who is ended in which. The server here is not PostgreSQL but as much of its
// protocol as that takes, because a real one does not keep virtual time. What a real server does is in shutdown_test.go.

// script is a server in the test's bubble. It notes what reaches it, and when.
type script struct {
	start  time.Time
	mu     sync.Mutex
	pid    uint32
	cancel map[uint32]chan struct{}
	doing  map[uint32]string
	events []string
}

func newScript() *script {
	return &script{start: time.Now(), cancel: map[uint32]chan struct{}{}, doing: map[uint32]string{}}
}

func (s *script) dial(context.Context, string, string) (net.Conn, error) {
	client, server := net.Pipe()
	go s.serve(server)
	return client, nil
}

// note takes down the first of each event. Those of the client's orderly Terminate are left out.
func (s *script) note(what string, pid uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	event := fmt.Sprintf("%v %s %s", time.Since(s.start), what, s.doing[pid])
	if !slices.ContainsFunc(s.events, func(e string) bool {
		_, rest, _ := cutFirstWord(e)
		return rest == what+" "+s.doing[pid]
	}) {
		s.events = append(s.events, event)
	}
}

func cutFirstWord(s string) (first, rest string, ok bool) {
	for i, c := range s {
		if c == ' ' {
			return s[:i], s[i+1:], true
		}
	}
	return s, "", false
}

func (s *script) serve(conn net.Conn) {
	defer conn.Close()
	backend := pgproto3.NewBackend(conn, conn)
	startup, err := backend.ReceiveStartupMessage()
	if err != nil {
		return
	}
	if c, ok := startup.(*pgproto3.CancelRequest); ok {
		s.note("cancel", c.ProcessID)
		s.mu.Lock()
		cancelled := s.cancel[c.ProcessID]
		s.mu.Unlock()
		select {
		case cancelled <- struct{}{}:
		default: // nothing that takes notice of it is running
		}
		return
	}
	s.mu.Lock()
	s.pid++
	pid := s.pid
	cancelled := make(chan struct{})
	s.cancel[pid] = cancelled
	s.mu.Unlock()

	tx := byte('I')
	backend.Send(&pgproto3.AuthenticationOk{})
	backend.Send(&pgproto3.ParameterStatus{Name: "standard_conforming_strings", Value: "on"})
	backend.Send(&pgproto3.ParameterStatus{Name: "client_encoding", Value: "UTF8"})
	backend.Send(&pgproto3.BackendKeyData{ProcessID: pid, SecretKey: []byte{1, 2, 3, 4}})
	backend.Send(&pgproto3.ReadyForQuery{TxStatus: tx})
	for backend.Flush() == nil {
		message, err := backend.Receive()
		if err != nil {
			s.note("sever", pid)
			return
		}
		query, ok := message.(*pgproto3.Query)
		if !ok {
			return // Terminate
		}
		s.mu.Lock()
		s.doing[pid] = query.String
		s.mu.Unlock()

		// A client that goes is noticed only when the next message is read, as by a backend that is busy; so the time that
		// a deaf statement takes must be over before the test is.
		answer := pgproto3.BackendMessage(&pgproto3.CommandComplete{CommandTag: []byte("OK")})
		switch query.String {
		case "begin":
			tx = 'T'
		case "sleep":
			select {
			case <-cancelled:
				answer = &pgproto3.ErrorResponse{Severity: "ERROR", Code: "57014", Message: "canceled"}
			case <-time.After(time.Hour):
			}
		case "deaf", "commit":
			time.Sleep(time.Hour)
			tx = 'I'
		case "brief":
			time.Sleep(2500 * time.Millisecond)
		}
		backend.Send(answer)
		backend.Send(&pgproto3.ReadyForQuery{TxStatus: tx})
	}
	s.note("sever", pid)
}

func (s *script) pool(t *testing.T, opts ...pgxdrain.Option) *pgxdrain.Pool {
	config, err := pgxpool.ParseConfig("host=server user=me sslmode=disable pool_max_conns=4")
	if err != nil {
		t.Fatal(err)
	}
	config.ConnConfig.DialFunc = s.dial
	config.ConnConfig.LookupFunc = func(context.Context, string) ([]string, error) { return []string{"server"}, nil }
	opts = append(opts, pgxdrain.WithLogger(slog.New(slog.NewTextHandler(io.Discard, nil))))
	pool, err := pgxdrain.NewWithConfig(context.Background(), config, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return pool
}

// steps takes down when the pool was first seen in each step, looking every tick of the virtual clock.
func steps(pool *pgxdrain.Pool, start time.Time, over <-chan struct{}) <-chan []string {
	result := make(chan []string, 1)
	go func() {
		var seen []string
		last := pgxdrain.Step("")
		for {
			synctest.Wait() // what happens at this instant has happened
			if s := pool.Report().Step; s != last {
				seen = append(seen, fmt.Sprintf("%v %s", time.Since(start), s))
				last = s
			}
			select {
			case <-over:
				result <- seen
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	return result
}

func TestTimeline(t *testing.T) {
	t.Parallel()
	const (
		drainTimeout = 20 * time.Second
		grace        = 4 * time.Second
	)
	secondSignal := errors.New("second signal")
	for name, c := range map[string]struct {
		wait   time.Duration // initial
		ctx    func(context.Context) (context.Context, context.CancelFunc)
		work   []string // statements, each in a caller of its own; "held" and "idle" have none
		steps  []string
		events []string
		took   time.Duration
		want   map[pgxdrain.Outcome]int
		cause  error
	}{
		"all drains": {
			work:  []string{"brief", "brief"},
			steps: []string{"0s drain", "2.5s closed"},
			took:  2500 * time.Millisecond,
			want:  map[pgxdrain.Outcome]int{pgxdrain.OutcomeDrained: 2},
		},
		"the initial wait comes first": {
			wait:  2 * time.Second,
			work:  []string{"brief"},
			steps: []string{"0s unready", "2s drain", "2.5s closed"},
			took:  2500 * time.Millisecond,
			want:  map[pgxdrain.Outcome]int{pgxdrain.OutcomeDrained: 1},
		},
		"the initial wait does not reach into the grace": {
			wait:  time.Hour,
			steps: []string{"0s unready", "16s closed"},
			took:  16 * time.Second,
		},
		"each is ended in its step": {
			wait: 3 * time.Second,
			work: []string{"sleep", "idle", "commit", "deaf"},
			// The one that was idle lets go a second after it was severed, when it next uses its connection.
			steps: []string{"0s unready", "3s drain", "16s cancel", "18s closed"},
			events: []string{
				"16s cancel sleep", "16s cancel deaf", "16s sever begin",
			},
			took: 18 * time.Second,
			want: map[pgxdrain.Outcome]int{
				pgxdrain.OutcomeCancelled: 1, pgxdrain.OutcomeSevered: 1, pgxdrain.OutcomeUnknown: 2,
			},
			cause: context.DeadlineExceeded,
		},
		"a handle that never comes back is left at the deadline": {
			work:   []string{"held"},
			steps:  []string{"0s drain", "16s cancel", "18s close", "20s closed"},
			events: []string{"16s sever held"},
			took:   drainTimeout,
			want:   map[pgxdrain.Outcome]int{pgxdrain.OutcomeLeaked: 1},
			cause:  context.DeadlineExceeded,
		},
		"the grace is at most half of the budget": {
			ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
				return context.WithTimeout(ctx, 2*time.Second)
			},
			work:   []string{"held", "sleep"},
			steps:  []string{"0s drain", "1s cancel", "1.5s close", "2s closed"},
			events: []string{"1s cancel sleep", "1s sever held"},
			took:   2 * time.Second,
			want:   map[pgxdrain.Outcome]int{pgxdrain.OutcomeLeaked: 1, pgxdrain.OutcomeCancelled: 1},
			cause:  context.DeadlineExceeded,
		},
		"a ctx that is cancelled brings the cancel step forward": {
			ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancelCause(ctx)
				time.AfterFunc(5*time.Second, func() { cancel(secondSignal) })
				return ctx, func() { cancel(nil) }
			},
			work:   []string{"held", "deaf"},
			steps:  []string{"0s drain", "5s cancel", "7s close", "9s closed"},
			events: []string{"5s cancel deaf", "5s sever held"},
			took:   9 * time.Second,
			want:   map[pgxdrain.Outcome]int{pgxdrain.OutcomeLeaked: 1, pgxdrain.OutcomeUnknown: 1},
			cause:  secondSignal,
		},
		"a ctx that is done on entry leaves the grace": {
			wait: 10 * time.Second,
			ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
				return context.WithTimeout(ctx, -time.Second)
			},
			work:   []string{"held", "sleep"},
			steps:  []string{"0s cancel", "2s close", "4s closed"},
			events: []string{"0s cancel sleep", "0s sever held"},
			took:   grace,
			want:   map[pgxdrain.Outcome]int{pgxdrain.OutcomeLeaked: 1, pgxdrain.OutcomeCancelled: 1},
			cause:  context.DeadlineExceeded,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newScript()
				pool := server.pool(t, pgxdrain.WithDrainTimeout(drainTimeout), pgxdrain.WithCancelGrace(grace), pgxdrain.WithInitialWait(c.wait))
				over := make(chan struct{})
				var callers sync.WaitGroup
				for _, what := range c.work {
					callers.Go(func() { do(pool, what, over) })
				}
				synctest.Wait()

				ctx := context.Background()
				if c.ctx != nil {
					var cancel context.CancelFunc
					ctx, cancel = c.ctx(ctx)
					defer cancel()
				}
				server.start = time.Now()
				seen := steps(pool, server.start, over)
				err := pool.Shutdown(ctx)
				took := time.Since(server.start)
				close(over)
				if got := <-seen; !slices.Equal(got, c.steps) {
					t.Errorf("steps %q, want %q", got, c.steps)
				}
				if took != c.took {
					t.Errorf("took %v, want %v", took, c.took)
				}
				callers.Wait()
				time.Sleep(2 * time.Hour) // the deaf wake up and see that their clients have gone

				server.mu.Lock()
				var early []string
				for _, e := range server.events {
					if at, _, _ := cutFirstWord(e); len(at) < len("1h0m0s") {
						early = append(early, e)
					}
				}
				server.mu.Unlock()
				slices.Sort(early)
				slices.Sort(c.events)
				if !slices.Equal(early, c.events) {
					t.Errorf("the server saw %q, want %q", early, c.events)
				}

				r := pool.Report()
				checkTimelineReport(t, r, c.want)
				switch {
				case c.cause == nil && err != nil:
					t.Errorf("got %v", err)
				case c.cause != nil && !errors.Is(err, c.cause):
					t.Errorf("got %v, want it to match %v", err, c.cause)
				}
			})
		})
	}
}

// do is a caller that does one thing with a connection.
func do(pool *pgxdrain.Pool, what string, over <-chan struct{}) {
	ctx := context.Background()
	switch what {
	case "held": // and never let go of before the shutdown is over
		conn, err := pool.Acquire(ctx)
		if err != nil {
			return
		}
		conn.Exec(ctx, "held")
		<-over
		conn.Release()
	case "idle": // in a transaction; looked at once a second, and used when it has been severed
		tx, err := pool.Begin(ctx)
		if err != nil {
			return
		}
		time.Sleep(500 * time.Millisecond) // so as not to wake at the instant of a step
		for {
			time.Sleep(time.Second)
			if tx.Conn().PgConn().IsClosed() {
				break
			}
			if pool.Report().Step == pgxdrain.StepCancel {
				tx.Exec(ctx, "select 1")
				break
			}
		}
		tx.Rollback(ctx)
	case "commit":
		pgx.BeginFunc(ctx, pool, func(pgx.Tx) error { return nil })
	default:
		pool.Exec(ctx, what)
	}
}

func checkTimelineReport(t *testing.T, r pgxdrain.Report, want map[pgxdrain.Outcome]int) {
	t.Helper()
	got := map[pgxdrain.Outcome]int{}
	for _, op := range r.Operations {
		got[op.Outcome]++
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("outcomes %v, want %v", got, want)
	}
}
