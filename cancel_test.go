package pgxdrain_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// dials records what a pool does with its user's DialFunc.
type dials struct {
	dial pgconn.DialFunc

	// For the connections of cancel requests: those dialed once cancelling is set.
	cancelling atomic.Bool
	beforeDial func()
	afterRead  func() // with what was read in hand

	mu     sync.Mutex
	clock  int
	conns  []*dialed
	open   int // cancel connections
	atOnce int // the most of them
}

// dialed is a connection, with the moments of what happened to it by the clock of its dials; 0 for never.
type dialed struct {
	net.Conn
	dials  *dials
	cancel bool
	sent   []byte

	readEnded, closed int
}

func newDials(config *pgxpool.Config) *dials {
	d := &dials{dial: config.ConnConfig.DialFunc, beforeDial: func() {}, afterRead: func() {}}
	config.ConnConfig.DialFunc = d.Dial
	return d
}

func (d *dials) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c := &dialed{dials: d, cancel: d.cancelling.Load()}
	if c.cancel {
		d.mu.Lock()
		d.open++
		d.atOnce = max(d.atOnce, d.open)
		d.mu.Unlock()
		d.beforeDial()
	}
	conn, err := d.dial(ctx, network, addr)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		if c.cancel {
			d.open--
		}
		return nil, err
	}
	c.Conn = conn
	d.conns = append(d.conns, c)
	return c, nil
}

// now is the next tick of the clock. Caller of this method must hold d.mu!
func (d *dials) now() int {
	d.clock++
	return d.clock
}

func (c *dialed) Write(b []byte) (int, error) {
	c.dials.mu.Lock()
	c.sent = append(c.sent, b...)
	c.dials.mu.Unlock()
	return c.Conn.Write(b)
}

func (c *dialed) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.cancel {
		c.dials.afterRead()
	}
	if err != nil {
		c.dials.mu.Lock()
		if c.readEnded == 0 {
			c.readEnded = c.dials.now()
		}
		c.dials.mu.Unlock()
	}
	return n, err
}

func (c *dialed) Close() error {
	c.dials.mu.Lock()
	if c.closed == 0 {
		c.closed = c.dials.now()
		if c.cancel {
			c.dials.open--
		}
	}
	c.dials.mu.Unlock()
	return c.Conn.Close()
}

// seen returns the connections by what they were for, as they are now.
func (d *dials) seen() (conns, cancels []dialed) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.conns {
		if c.cancel {
			cancels = append(cancels, *c)
		} else {
			conns = append(conns, *c)
		}
	}
	return conns, cancels
}

// doneContext returns a context that is done: a shutdown with it begins its cancel step at once and has the cancel grace for all.
func doneContext() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

func TestCancelRequestsGoOverTLSWhenTheConnectionDoes(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.PrivateTLS(t).DSN(), "pool_cancel_grace=30s")))
	d := newDials(config)
	pool := newPoolWithConfig(t, config)
	result := sleeping(t, pool, 3)
	d.cancelling.Store(true)
	wantShutdownError(t, pool.Shutdown(doneContext()))
	for range 3 {
		if err := <-result; sqlState(err) != "57014" {
			t.Errorf("the caller got %v", err)
		}
	}
	conns, cancels := d.seen()
	if len(conns) != 3 || len(cancels) < 3 { // more on a machine so slow that one is sent again
		t.Errorf("%d connections and %d cancel requests were dialed, want 3 and 3", len(conns), len(cancels))
	}
	for _, c := range cancels {
		if startCode(c.sent) != sslRequestCode || bytes.Contains(c.sent, binary.BigEndian.AppendUint32(nil, cancelRequestCode)) {
			t.Errorf("a cancel request was sent as % x", c.sent)
		}
	}
}

// sleeping returns once n callers have a statement running at the server, each on a connection of its own.
func sleeping(t testing.TB, pool *pgxdrain.Pool, n int) (result <-chan error) {
	t.Helper()
	config := pool.Config().ConnConfig
	config.DialFunc = (&net.Dialer{}).DialContext // not one that counts
	look := must[*pgx.Conn](t)(pgx.ConnectConfig(t.Context(), config))
	defer look.Close(context.Background())
	c := make(chan error, n)
	for range n {
		go func() {
			_, err := pool.Exec(context.Background(), "select pg_sleep(60)")
			c <- err
		}()
	}
	eventually(t, "they run", func() bool {
		var active int
		err := look.QueryRow(t.Context(), `
			select count(*) from pg_stat_activity
			where datname = current_database() and state = 'active' and query = 'select pg_sleep(60)'`).Scan(&active)
		if err != nil {
			t.Fatal(err)
		}
		return active == n
	})
	return c
}

func TestCancelRequestsGoOutInParallelUpToTheBound(t *testing.T) {
	t.Parallel()
	const bound, statements = 32, 70
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.Database(t), "pool_max_conns=70&pool_cancel_grace=30s")))
	d := newDials(config)
	var arrived atomic.Int64
	full := make(chan struct{})
	d.beforeDial = func() { // nobody goes on before as many as may are there
		if arrived.Add(1) == bound {
			close(full)
		}
		select {
		case <-full:
		case <-time.After(timeout / 3):
		}
	}
	pool := newPoolWithConfig(t, config)
	result := sleeping(t, pool, statements)
	d.cancelling.Store(true)
	e := wantShutdownError(t, pool.Shutdown(doneContext()))
	for range statements {
		if err := <-result; sqlState(err) != "57014" {
			t.Errorf("a caller got %v", err)
		}
	}
	checkReport(t, e.Report)
	if e.Cancelled != statements {
		t.Errorf("%d cancelled, want %d", e.Cancelled, statements)
	}
	if d.atOnce != bound {
		t.Errorf("%d cancel requests at once, want %d", d.atOnce, bound)
	}
	if _, cancels := d.seen(); len(cancels) < statements {
		t.Errorf("%d cancel requests for %d statements", len(cancels), statements)
	}
}

// PgBouncer 1.18 dies of a client that leaves while a cancel request of it is under way, and of a cancel request whose connection is
// closed before it has been passed on.
func TestCancelRequestIsAwaitedToTheServersCloseBeforeAnythingElseCloses(t *testing.T) {
	t.Parallel()
	for name, ends := range map[string]struct{ byItself bool }{
		"statement that ends by itself meanwhile": {true},
		"statement that is cancelled":             {false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.Database(t), "pool_cancel_grace=60s&pool_max_conns=1")))
			d := newDials(config)
			answered, goOn := make(chan struct{}), make(chan struct{})
			d.afterRead = sync.OnceFunc(func() { close(answered); <-goOn })
			copying := &blockedCopy{blocked: make(chan struct{}), end: make(chan struct{})}
			end := sync.OnceFunc(func() { close(copying.end) })
			defer end()
			dialing := make(chan struct{})
			d.beforeDial = sync.OnceFunc(func() {
				if ends.byItself {
					end()
					<-dialing
				}
			})
			pool := newPoolWithConfig(t, config)
			var returned, releasing atomic.Bool
			result := make(chan error, 1)
			if ends.byItself {
				if _, err := pool.Exec(t.Context(), "create table n (n int)"); err != nil {
					t.Fatal(err)
				}
				go func() {
					conn, err := pool.Acquire(context.Background())
					if err == nil {
						_, err = conn.CopyFrom(context.Background(), pgx.Identifier{"n"}, []string{"n"}, copying)
						close(dialing) // the cancel request goes out now
						releasing.Store(true)
						conn.Release()
					}
					returned.Store(true)
					result <- err
				}()
				<-copying.blocked
			} else {
				sleep := sleeping(t, pool, 1)
				go func() {
					err := <-sleep
					returned.Store(true)
					result <- err
				}()
			}

			d.cancelling.Store(true)
			var over atomic.Bool
			shutdown := make(chan error, 1)
			go func() {
				err := pool.Shutdown(doneContext())
				over.Store(true)
				shutdown <- err
			}()
			<-answered // the server has closed the connection; to us that is still on its way
			if ends.byItself {
				eventually(t, "its caller is releasing", releasing.Load)
			}
			time.Sleep(200 * time.Millisecond) // for what must not happen there is no event
			conns, cancels := d.seen()
			if returned.Load() || over.Load() || conns[0].closed != 0 || cancels[0].closed != 0 {
				t.Errorf("not waited for: caller back %v, shutdown over %v, %+v, %+v", returned.Load(), over.Load(), conns[0], cancels[0])
			}
			close(goOn)

			err := <-result
			if ends.byItself && err != nil || !ends.byItself && sqlState(err) != "57014" {
				t.Errorf("the caller got %v", err)
			}
			if err := <-shutdown; (err == nil) != ends.byItself {
				t.Errorf("Shutdown returned %v", err)
			}
			conns, cancels = d.seen()
			if len(conns) != 1 {
				t.Fatalf("%d connections were dialed", len(conns))
			}
			for _, c := range cancels {
				if c.readEnded == 0 || c.closed < c.readEnded || conns[0].closed < c.closed {
					t.Errorf("the cancel request's connection was read to its end at %d and closed at %d, the operation's at %d",
						c.readEnded, c.closed, conns[0].closed)
				}
			}
		})
	}
}

// When no answer comes neither the caller nor Shutdown waits for it, but the sockets do, for a time.
func TestCancelRequestWithoutAnAnswerHoldsUpNobodyAndIsClosedBeforeTheOperationsSocket(t *testing.T) {
	t.Parallel()
	network, dsn := newProxy(t, pgtest.Database(t))
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(dsn, "pool_cancel_grace=1s")))
	d := newDials(config)
	pool := newPoolWithConfig(t, config)
	result := sleeping(t, pool, 1)
	network.swallow(toClient)
	d.cancelling.Store(true)
	start := time.Now()
	e := wantShutdownError(t, pool.Shutdown(doneContext()))
	if took := time.Since(start); took > time.Second+late {
		t.Errorf("took %v", took)
	}
	if err := <-result; !errors.Is(err, pgxdrain.ErrShuttingDown) {
		t.Errorf("the caller got %v", err)
	}
	if e.Unknown != 1 {
		t.Errorf("got %v", e)
	}
	network.resume()
	var conns, cancels []dialed
	eventually(t, "the sockets are closed", func() bool {
		conns, cancels = d.seen()
		return conns[0].closed != 0
	})
	if len(cancels) != 1 || cancels[0].closed == 0 || conns[0].closed < cancels[0].closed {
		t.Errorf("%d cancel requests; the operation's connection was closed at %d: %+v", len(cancels), conns[0].closed, cancels)
	}
}

// The cancel request is let go only when its statement has ended by itself, and its caller goes on with a statement that the server
// would take it for.
// A ROLLBACK is over at once; to cancel it would only fail it.
func TestRollbackInFlightIsNotCancelled(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	network, dsn := newProxy(t, pgtest.Database(t))
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(dsn, "pool_cancel_grace=60s")))
	d := newDials(config)
	pool := newPoolWithConfig(t, config)
	sleeper := sleeping(t, pool, 1)
	tx := must[pgx.Tx](t)(pool.Begin(ctx))
	if _, err := tx.Exec(ctx, "select 1"); err != nil {
		t.Fatal(err)
	}

	network.swallow(toServer)
	result := make(chan error, 1)
	go func() { result <- tx.Rollback(ctx) }()
	eventually(t, "it rolls back", func() bool {
		return slices.ContainsFunc(pool.Active(), func(op pgxdrain.Operation) bool {
			return op.PID == tx.Conn().PgConn().PID() && op.State == pgxdrain.StateActive
		})
	})
	d.cancelling.Store(true)
	shutdown := startShutdown(t, doneContext(), pool)
	eventually(t, "the other statement is being cancelled", func() bool {
		_, cancels := d.seen()
		return len(cancels) > 0
	})
	network.resume()

	if err := <-result; err != nil {
		t.Errorf("the ROLLBACK: %v", err)
	}
	e := wantShutdownError(t, <-shutdown)
	checkReport(t, e.Report)
	if err := <-sleeper; sqlState(err) != "57014" || e.Cancelled != 1 || e.Drained != 1 {
		t.Errorf("the sleeper got %v; %v", err, e)
	}
	_, cancels := d.seen()
	for _, c := range cancels {
		if pid := binary.BigEndian.AppendUint32(nil, tx.Conn().PgConn().PID()); bytes.Contains(c.sent, pid) {
			t.Error("a cancel request was sent for it")
		}
	}
}

func TestStress_LateCancelRequestHitsNothingElse(t *testing.T) {
	t.Parallel()
	dsn := pgtest.Database(t)
	look := must[*pgx.Conn](t)(pgx.Connect(t.Context(), dsn))
	t.Cleanup(func() { look.Close(context.Background()) })
	slowCommit(t, look, "n", "0.03") // so that a request that is not waited for would hit it
	const rounds = 100
	for range rounds {
		config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(dsn, "pool_cancel_grace=30s&pool_max_conns=1")))
		d := newDials(config)
		copying := &blockedCopy{blocked: make(chan struct{}), end: make(chan struct{})}
		ended := make(chan struct{})
		d.beforeDial = func() {
			close(copying.end)
			<-ended
		}
		pool := newPoolWithConfig(t, config)
		ctx := context.Background()
		tx := must[pgx.Tx](t)(pool.Begin(ctx))
		result := make(chan error, 1)
		go func() {
			_, err := tx.CopyFrom(ctx, pgx.Identifier{"n"}, []string{"n"}, copying)
			close(ended)
			result <- errors.Join(err, tx.Commit(ctx))
		}()
		<-copying.blocked
		d.cancelling.Store(true)
		err := pool.Shutdown(doneContext())
		if err := <-result; err != nil {
			t.Fatalf("the COPY ended by itself, and then the caller got %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, cancels := d.seen(); len(cancels) != 1 || cancels[0].readEnded == 0 {
			t.Fatalf("the cancel request was not sent: %+v", cancels)
		}
	}
	var rows int
	if err := look.QueryRow(t.Context(), "select count(*) from n").Scan(&rows); err != nil || rows != rounds {
		t.Errorf("%d rows, want %d; %v", rows, rounds, err)
	}
}

// Statements end about when the cancel requests come, and their callers go on with COMMIT or ROLLBACK whatever the answer was. A
// connection that had no statement just then is severed.
func TestStress_CancelRequestHitsOnlyTheStatementThatItIsFor(t *testing.T) {
	t.Parallel()
	dsn := pgtest.Database(t)
	look := must[*pgx.Conn](t)(pgx.Connect(t.Context(), dsn))
	t.Cleanup(func() { look.Close(context.Background()) })
	if _, err := look.Exec(t.Context(), "create table n (n int)"); err != nil {
		t.Fatal(err)
	}
	var ended, cancelled, severed, committed, unknown atomic.Int64
	call := func(pool *pgxdrain.Pool, begun *sync.WaitGroup) {
		ctx := context.Background()
		tx, err := pool.Begin(ctx)
		if err == nil {
			_, err = tx.Exec(ctx, "insert into n values (1)")
		}
		begun.Done()
		if err != nil {
			t.Errorf("Begin and insert: %v", err)
			return
		}
		defer tx.Rollback(ctx)
		end, after := tx.Rollback, "ROLLBACK"
		if rand.IntN(2) == 0 {
			end, after = tx.Commit, "COMMIT"
		}

		_, err = tx.Exec(ctx, "select pg_sleep($1)", rand.Float64()*0.012)
		answered := err == nil
		switch {
		case answered:
			ended.Add(1)
		case sqlState(err) == "57014":
			cancelled.Add(1)
		case errors.Is(err, pgxdrain.ErrShuttingDown):
			severed.Add(1)
			return
		default:
			t.Errorf("the statement: %v", err)
			return
		}
		switch err := end(ctx); {
		case errors.Is(err, pgxdrain.ErrShuttingDown):
			if after == "COMMIT" && answered {
				unknown.Add(1)
			}
		case err == nil && after == "COMMIT" && answered:
			committed.Add(1)
		case err == nil && after == "ROLLBACK":
		case errors.Is(err, pgx.ErrTxCommitRollback) && !answered:
		default:
			t.Errorf("%s after an answer (%v): %v", after, answered, err)
		}
	}
	var lanes sync.WaitGroup
	for range 4 {
		lanes.Go(func() {
			for range 100 {
				pool, err := pgxdrain.New(context.Background(), withParams(dsn, "pool_cancel_grace=30s&pool_max_conns=2"),
					pgxdrain.WithLogger(slog.New(slog.DiscardHandler)))
				if err != nil {
					t.Error(err)
					return
				}
				var begun, callers sync.WaitGroup
				begun.Add(2)
				for range 2 {
					callers.Go(func() { call(pool, &begun) })
				}
				begun.Wait()
				time.Sleep(time.Duration(rand.IntN(6000)) * time.Microsecond)
				_ = pool.Shutdown(doneContext())
				callers.Wait()
			}
		})
	}
	lanes.Wait()
	t.Logf("%d statements ended by themselves, %d were cancelled, %d were severed before; %d COMMITs were cut off",
		ended.Load(), cancelled.Load(), severed.Load(), unknown.Load())
	if ended.Load() == 0 || cancelled.Load() == 0 {
		t.Error("nothing was tried")
	}
	var rows int64
	err := look.QueryRow(t.Context(), "select count(*) from n").Scan(&rows)
	if err != nil || rows < committed.Load() || rows > committed.Load()+unknown.Load() {
		t.Errorf("%d rows; %d COMMITs were answered, and %d cut off; %v", rows, committed.Load(), unknown.Load(), err)
	}
}
