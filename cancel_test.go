package pgxdrain_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
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

// done returns a context that is done: a shutdown with it begins its cancel step at once and has the cancel grace for all.
func doneContext() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

func TestCancelRequestsGoOverTLSWhenTheConnectionDoes(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.PrivateTLS(t).DSN(), "pool_cancel_grace=10s")))
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
	if len(conns) != 3 || len(cancels) != 3 {
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
	look := observer(t, pool)
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
			if len(conns) != 1 || len(cancels) != 1 {
				t.Fatalf("%d connections and %d cancel requests were dialed", len(conns), len(cancels))
			}
			if c := cancels[0]; c.readEnded == 0 || c.closed < c.readEnded || conns[0].closed < c.closed {
				t.Errorf("the cancel request's connection was read to its end at %d and closed at %d, the operation's at %d",
					c.readEnded, c.closed, conns[0].closed)
			}
		})
	}
}

// When no answer comes the wait is over with the cancel step; the operation's socket is closed only then.
func TestCancelRequestWithoutAnAnswerIsClosedBeforeTheOperationsSocket(t *testing.T) {
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
	conns, cancels := d.seen()
	if len(cancels) != 1 || e.Unknown != 1 {
		t.Fatalf("%d cancel requests; %v", len(cancels), e)
	}
	if cancels[0].closed == 0 || conns[0].closed < cancels[0].closed {
		t.Errorf("the cancel request's connection was closed at %d, the operation's at %d", cancels[0].closed, conns[0].closed)
	}
}

// The cancel request is let go only when its statement has ended by itself, and its caller goes on with a statement that the server
// would take it for.
func TestStress_LateCancelRequestHitsNothingElse(t *testing.T) {
	t.Parallel()
	dsn := pgtest.Database(t)
	look := must[*pgx.Conn](t)(pgx.Connect(t.Context(), dsn))
	t.Cleanup(func() { look.Close(context.Background()) })
	if _, err := look.Exec(t.Context(), "create table n (n int)"); err != nil {
		t.Fatal(err)
	}
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

// Statements end about when the cancel requests come, and their callers go on with COMMIT or ROLLBACK whatever the answer was.
func TestStress_CancelRequestHitsOnlyTheStatementThatItIsFor(t *testing.T) {
	t.Parallel()
	dsn := pgtest.Database(t)
	look := must[*pgx.Conn](t)(pgx.Connect(t.Context(), dsn))
	t.Cleanup(func() { look.Close(context.Background()) })
	if _, err := look.Exec(t.Context(), "create table n (n int)"); err != nil {
		t.Fatal(err)
	}
	var done, cancelled, committed atomic.Int64
	work := func(pool *pgxdrain.Pool, sleep time.Duration, rollback bool) {
		ctx := context.Background()
		tx, err := pool.Begin(ctx)
		if err != nil {
			t.Errorf("Begin: %v", err)
			return
		}
		defer tx.Rollback(ctx)
		if _, err := tx.Exec(ctx, "insert into n values (1)"); err != nil {
			t.Errorf("insert: %v", err)
			return
		}
		_, err = tx.Exec(ctx, "select pg_sleep($1)", sleep.Seconds())
		switch state := sqlState(err); {
		case err == nil && rollback:
			if err := tx.Rollback(ctx); err != nil {
				t.Errorf("ROLLBACK: %v", err)
			}
			done.Add(1)
		case err == nil:
			if err := tx.Commit(ctx); err != nil {
				t.Errorf("COMMIT: %v", err)
			}
			done.Add(1)
			committed.Add(1)
		case state != "57014":
			t.Errorf("the statement: %v", err)
		case rollback:
			if err := tx.Rollback(ctx); err != nil {
				t.Errorf("ROLLBACK after 57014: %v", err)
			}
			cancelled.Add(1)
		default:
			if err := tx.Commit(ctx); !errors.Is(err, pgx.ErrTxCommitRollback) {
				t.Errorf("COMMIT after 57014: %v", err)
			}
			cancelled.Add(1)
		}
	}
	var lanes sync.WaitGroup
	for range 4 {
		lanes.Go(func() {
			for range 100 {
				config, err := pgxpool.ParseConfig(withParams(dsn, "pool_cancel_grace=30s&pool_max_conns=2"))
				if err != nil {
					t.Error(err)
					return
				}
				d := newDials(config)
				running := make(chan struct{}, 2)
				pool := newPoolWithConfig(t, config)
				var callers sync.WaitGroup
				for range 2 {
					callers.Go(func() { work(pool, time.Duration(rand.IntN(8000))*time.Microsecond, rand.IntN(2) == 0) })
				}
				for range 2 {
					select {
					case <-running:
					default:
					}
				}
				for n := 0; n < 2 && !t.Failed(); time.Sleep(100 * time.Microsecond) {
					n = 0
					for _, op := range pool.Active() {
						if op.Statement == "select pg_sleep ( $1 )" {
							n++
						}
					}
					if int(pool.Stat().AcquireCount()) == 2 && n == 0 && len(pool.Active()) == 0 {
						break
					}
				}
				time.Sleep(time.Duration(rand.IntN(4000)) * time.Microsecond)
				d.cancelling.Store(true)
				_ = pool.Shutdown(doneContext())
				callers.Wait()
			}
		})
	}
	lanes.Wait()
	t.Logf("%d statements ended by themselves, %d were cancelled", done.Load(), cancelled.Load())
	if done.Load() == 0 || cancelled.Load() == 0 {
		t.Error("nothing was tried")
	}
	var rows int64
	if err := look.QueryRow(t.Context(), "select count(*) from n").Scan(&rows); err != nil || rows != committed.Load() {
		t.Errorf("%d rows, %d were committed; %v", rows, committed.Load(), err)
	}
}
