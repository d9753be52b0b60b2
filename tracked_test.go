package pgxdrain_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/trace"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/bench"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// observer looks at a test's database from outside the pool.
func observer(t testing.TB, pool *pgxdrain.Pool) *pgx.Conn {
	t.Helper()
	conn := must[*pgx.Conn](t)(pgx.ConnectConfig(t.Context(), pool.Config().ConnConfig))
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// serverSide is what pg_stat_activity shows of a backend.
type serverSide struct {
	State, Query          string
	QueryStart, XactStart time.Time
}

func lookAt(t testing.TB, conn *pgx.Conn, pid uint32) (s serverSide, ok bool) {
	t.Helper()
	err := conn.QueryRow(t.Context(), `
		select coalesce(state, ''), query, coalesce(query_start, 'epoch'), coalesce(xact_start, 'epoch')
		from pg_stat_activity where pid = $1`, int32(pid)).Scan(&s.State, &s.Query, &s.QueryStart, &s.XactStart)
	if errors.Is(err, pgx.ErrNoRows) {
		return s, false
	}
	if err != nil {
		t.Fatal(err)
	}
	return s, true
}

// only returns the one operation in progress.
func only(t testing.TB, pool *pgxdrain.Pool) pgxdrain.Operation {
	t.Helper()
	ops := pool.Active()
	if len(ops) != 1 {
		t.Fatalf("%d operations active, want 1: %+v", len(ops), ops)
	}
	return ops[0]
}

// slowCommit makes a table, each insert into which makes its transaction's COMMIT take that long.
func slowCommit(t testing.TB, conn *pgx.Conn, table string, seconds string) {
	t.Helper()
	_, err := conn.Exec(t.Context(), `
		create table `+table+` (n int);
		create function wait_for_`+table+`() returns trigger language plpgsql as 'begin perform pg_sleep(`+seconds+`); return null; end';
		create constraint trigger wait after insert on `+table+` deferrable initially deferred
			for each row execute function wait_for_`+table+`()`)
	if err != nil {
		t.Fatal(err)
	}
}

// blockedCopy is a source that gives one row and then blocks until it is told to end.
type blockedCopy struct {
	rows    int
	blocked chan struct{}
	end     chan struct{}
}

func (b *blockedCopy) Next() bool {
	b.rows++
	if b.rows == 2 {
		close(b.blocked)
		<-b.end
	}
	return b.rows == 1
}
func (b *blockedCopy) Values() ([]any, error) { return []any{1}, nil }
func (b *blockedCopy) Err() error             { return nil }

// Each case brings a connection into a state, waits until the server shows that it is there, and says what the record must
// show. What it started is ended, and its connection released, by the function that it returns.
func TestRecordOfEachKindOfOperationIsWhatPgStatActivityShows(t *testing.T) {
	t.Parallel()
	const begun = "a transaction"
	for _, c := range []struct {
		name      string
		start     func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) (end func())
		state     pgxdrain.State
		server    string // the state in pg_stat_activity, if it has another word
		statement string
		batch     int
		tx        string
	}{
		{
			name: "statement",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				go pool.Exec(ctx, "select pg_sleep(60), 'secret'")
				return nil
			},
			state: pgxdrain.StateActive, statement: "select pg_sleep ( ? ), ?",
		}, {
			name: "prepared statement",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				go pool.Exec(ctx, "select pg_sleep($1)", 60)
				return nil
			},
			state: pgxdrain.StateActive, statement: "select pg_sleep($1)",
		}, {
			name: "statement in a transaction",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				tx := must[pgx.Tx](t)(pool.Begin(ctx))
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					tx.Exec(ctx, "select pg_sleep(60)")
				}()
				return func() { <-ended; tx.Rollback(context.Background()) }
			},
			state: pgxdrain.StateActive, statement: "select pg_sleep ( ? )", tx: begun,
		}, {
			name: "rows being read",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				rows := must[pgx.Rows](t)(pool.Query(ctx, "select repeat('x', 1000) from generate_series(1, 1000000)"))
				rows.Next()
				return rows.Close
			},
			state: pgxdrain.StateActive, statement: "select repeat ( ? ) from generate_series ( ? )",
		}, {
			name: "batch",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				var b pgx.Batch
				b.Queue("select 1")
				b.Queue("select pg_sleep(60)")
				br := pool.SendBatch(ctx, &b)
				return func() { br.Close() }
			},
			state: pgxdrain.StateActive, statement: "select ?", batch: 2,
		}, {
			name: "copy",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				source := &blockedCopy{blocked: make(chan struct{}), end: make(chan struct{})}
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					pool.CopyFrom(ctx, pgx.Identifier{"public", "n"}, []string{"n"}, source)
				}()
				<-source.blocked
				return func() { close(source.end); <-ended }
			},
			state: pgxdrain.StateActive, statement: `copy "public"."n" from stdin`,
		}, {
			name: "transaction left idle",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				tx := must[pgx.Tx](t)(pool.Begin(ctx))
				tx.Exec(ctx, "insert into n values (1)")
				return func() { tx.Rollback(context.Background()) }
			},
			state: pgxdrain.StateIdleInTransaction, statement: "insert into n values ( ? )", tx: begun,
		}, {
			name: "transaction begun by a batch",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				var b pgx.Batch
				b.BeginTx(pgx.TxOptions{IsoLevel: pgx.Serializable})
				b.Queue("insert into n values (1)")
				br := pool.SendBatch(ctx, &b)
				if err := br.Close(); err != nil {
					t.Fatal(err)
				}
				return func() { br.Tx().Rollback(context.Background()) }
			},
			state: pgxdrain.StateIdleInTransaction, statement: "begin isolation level serializable", batch: 2, tx: begun,
		}, {
			name: "transaction that no method name tells of",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				conn := acquire(t, pool)
				conn.Exec(ctx, "select 1; /* off we go */ begin; select 2")
				return func() { conn.Exec(ctx, "rollback"); conn.Release() }
			},
			state: pgxdrain.StateIdleInTransaction, statement: "select ?; begin; select ?", tx: begun,
		}, {
			name: "failed transaction",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				tx := must[pgx.Tx](t)(pool.Begin(ctx))
				tx.Exec(ctx, "select 1/0")
				return func() { tx.Rollback(context.Background()) }
			},
			state: pgxdrain.StateIdleInTransactionAborted, statement: "select ? / ?", tx: begun,
		}, {
			name: "connection just held",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				conn := acquire(t, pool)
				conn.Exec(ctx, "select 1")
				return conn.Release
			},
			state: pgxdrain.StateIdle, statement: "select ?",
		}, {
			name: "transaction that has ended, its connection held",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				conn := acquire(t, pool)
				tx := must[pgx.Tx](t)(conn.Begin(ctx))
				if err := tx.Commit(ctx); err != nil {
					t.Fatal(err)
				}
				return conn.Release
			},
			state: pgxdrain.StateIdle, statement: "commit",
		}, {
			name: "LISTEN loop",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				conn := acquire(t, pool)
				conn.Exec(ctx, "listen news")
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					conn.Conn().WaitForNotification(ctx)
				}()
				return func() { <-ended; conn.Release() }
			},
			state: pgxdrain.StateIdle, statement: "listen news",
		}, {
			name: "COMMIT",
			start: func(t *testing.T, ctx context.Context, pool *pgxdrain.Pool) func() {
				tx := must[pgx.Tx](t)(pool.Begin(ctx))
				if _, err := tx.Exec(ctx, "insert into slow values (1)"); err != nil {
					t.Fatal(err)
				}
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					tx.Commit(ctx)
				}()
				return func() { <-ended }
			},
			state: pgxdrain.StateCommitting, server: "active", statement: "commit", tx: begun,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, "")
			look := observer(t, pool)
			if _, err := look.Exec(t.Context(), "create table n (n int)"); err != nil {
				t.Fatal(err)
			}
			slowCommit(t, look, "slow", "60")

			ctx, cancel := context.WithCancel(testContext(t))
			before := time.Now()
			end := c.start(t, ctx, pool)
			t.Cleanup(func() { // before the pool's own
				cancel()
				if end != nil {
					end()
				}
			})

			wantServer := c.server
			if wantServer == "" {
				wantServer = string(c.state)
			}
			var op pgxdrain.Operation
			var server serverSide
			defer func() {
				if t.Failed() {
					t.Logf("last seen: %+v; on the server: %+v", op, server)
				}
			}()
			eventually(t, "the server shows "+wantServer, func() bool {
				ops := pool.Active()
				if len(ops) != 1 {
					return false
				}
				op = ops[0]
				var ok bool
				server, ok = lookAt(t, look, op.PID)
				return ok && server.State == wantServer && op.State == c.state && op.Statement == c.statement
			})

			if op.Outcome != "" || op.BatchSize != c.batch {
				t.Errorf("outcome %q, batch size %d; want none and %d", op.Outcome, op.BatchSize, c.batch)
			}
			// Our clock starts before the server's, which is a different one only in the resolution of its text.
			near := func(what string, ours, theirs time.Time) {
				if ours.Before(before.Add(-time.Millisecond)) || theirs.Sub(ours) > time.Second || ours.Sub(theirs) > time.Second {
					t.Errorf("%s: %v, the server says %v", what, ours, theirs)
				}
			}
			near("acquired", op.AcquiredAt, op.AcquiredAt)
			near("statement start", op.StatementStart, server.QueryStart)
			switch {
			case c.state == pgxdrain.StateIdleInTransactionAborted: // the server has forgotten when it began
				near("transaction start", op.TransactionStart, op.TransactionStart)
			case c.tx == begun:
				near("transaction start", op.TransactionStart, server.XactStart)
			case !op.TransactionStart.IsZero():
				t.Errorf("transaction start %v outside a transaction", op.TransactionStart)
			}
			if op.Held <= 0 || op.Held > time.Since(before) {
				t.Errorf("held for %v", op.Held)
			}
		})
	}
}

func TestStatementRefusedBecauseRowsAreOpenLeavesTheRecordToThem(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	conn := acquire(t, pool)
	defer conn.Release()
	rows := must[pgx.Rows](t)(conn.Query(t.Context(), "select 1 as first"))
	if _, err := conn.Exec(t.Context(), "select 2 as second"); err == nil {
		t.Fatal("a second statement was not refused")
	}
	if op := only(t, pool); op.State != pgxdrain.StateActive || op.Statement != "select ? as first" {
		t.Errorf("got %+v", op)
	}
	rows.Close()
	if op := only(t, pool); op.State != pgxdrain.StateIdle || op.Statement != "select ? as first" {
		t.Errorf("after Close: got %+v", op)
	}
}

// pgx calls end hooks that have no start, twice, or not at all.
func TestStatementsThatFailBeforeTheyAreSentLeaveTheConnectionIdle(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	for name, fail := range map[string]func(ctx context.Context, c *pgxpool.Conn) error{
		"copy into a table that is not there": func(ctx context.Context, c *pgxpool.Conn) error {
			_, err := c.CopyFrom(ctx, pgx.Identifier{"missing"}, []string{"n"}, pgx.CopyFromRows(nil))
			return err
		},
		"copy that has failed before, from the cache": func(ctx context.Context, c *pgxpool.Conn) error {
			c.CopyFrom(ctx, pgx.Identifier{"missing"}, []string{"n"}, pgx.CopyFromRows(nil))
			_, err := c.CopyFrom(ctx, pgx.Identifier{"missing"}, []string{"n"}, pgx.CopyFromRows(nil))
			return err
		},
		"batch that does not parse": func(ctx context.Context, c *pgxpool.Conn) error {
			var b pgx.Batch
			b.Queue("selec 1")
			return c.SendBatch(ctx, &b).Close()
		},
		"query with too few arguments": func(ctx context.Context, c *pgxpool.Conn) error {
			rows, err := c.Query(ctx, "select $1::int, $2::int", 1)
			rows.Close()
			return err
		},
		"query that cannot be rewritten": func(ctx context.Context, c *pgxpool.Conn) error {
			_, err := c.Query(ctx, "select @a", pgx.StrictNamedArgs{})
			return err
		},
		"statement with a ctx that is done": func(ctx context.Context, c *pgxpool.Conn) error {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			_, err := c.Exec(ctx, "select 1")
			return err
		},
		"prepare that does not parse": func(ctx context.Context, c *pgxpool.Conn) error {
			_, err := c.Conn().Prepare(ctx, "p", "selec 1")
			return err
		},
	} {
		conn := acquire(t, pool)
		if err := fail(t.Context(), conn); err == nil {
			t.Errorf("%s: did not fail", name)
		}
		if op := only(t, pool); op.State != pgxdrain.StateIdle {
			t.Errorf("%s: the state is %q", name, op.State)
		}
		conn.Release()
	}
}

func TestRecordIsReusedAndStartsAnewWithEachAcquisition(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=1")
	conn := acquire(t, pool)
	if _, err := conn.Exec(t.Context(), "select 1"); err != nil {
		t.Fatal(err)
	}
	first := only(t, pool)
	conn.Release()
	if ops := pool.Active(); len(ops) != 0 {
		t.Fatalf("active after the release: %+v", ops)
	}
	conn = acquire(t, pool)
	defer conn.Release()
	second := only(t, pool)
	if second.PID != first.PID || !second.AcquiredAt.After(first.AcquiredAt) ||
		second.Statement != "" || !second.StatementStart.IsZero() || second.State != pgxdrain.StateIdle {
		t.Errorf("got %+v after %+v", second, first)
	}
}

func TestActiveIsLongestHeldFirst(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=4")
	var pids []uint32
	for range 4 {
		conn := acquire(t, pool)
		defer conn.Release()
		pids = append(pids, conn.Conn().PgConn().PID())
	}
	for i, op := range pool.Active() {
		if op.PID != pids[i] {
			t.Errorf("place %d: pid %d, want %d", i, op.PID, pids[i])
		}
	}
}

func TestSpanContextIsTheCallers(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	sc := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}})
	conn := must[*pgxpool.Conn](t)(pool.Acquire(trace.ContextWithSpanContext(t.Context(), sc)))
	defer conn.Release()
	if got := only(t, pool).SpanContext; !got.Equal(sc) {
		t.Errorf("got %v", got)
	}
}

func TestWaitingCountsCallersWithoutAConnection(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=1")
	held := acquire(t, pool)
	ctx, cancel := context.WithCancel(testContext(t))
	result := make(chan error)
	for range 3 {
		go func() { result <- pool.Ping(ctx) }()
	}
	eventually(t, "three callers wait", func() bool { return pool.Report().Waiting == 3 })
	if r := pool.Report(); r.Active != 1 || r.Step != pgxdrain.StepOpen || r.Refused != 0 {
		t.Errorf("got %s", brief(r))
	}
	cancel()
	for range 3 {
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
	if n := pool.Report().Waiting; n != 0 {
		t.Errorf("%d waiting after they gave up", n)
	}
	held.Release()
}

func TestConnectionThatCannotBeMadeIsNotCounted(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(pgtest.Database(t)))
	config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		if _, err := conn.Exec(ctx, "select 1"); err != nil {
			return err
		}
		return errors.New("not this one")
	}
	pool := newPoolWithConfig(t, config)
	if err := pool.Ping(testContext(t)); err == nil || !strings.Contains(err.Error(), "not this one") {
		t.Fatalf("got %v", err)
	}
	if r := pool.Report(); r.Active != 0 || r.Waiting != 0 {
		t.Errorf("got %s", brief(r))
	}
}

func TestHookThatPanicsWhileAConnectionIsAcquiredIsNotCounted(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(pgtest.Database(t)))
	angry := true
	config.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) {
		if angry {
			angry = false
			panic("the user's")
		}
		return true, nil
	}
	// Not closed: pgxpool never gets the connection back that a panic leaves acquired, and its Close would wait for ever.
	pool := must[*pgxdrain.Pool](t)(pgxdrain.NewWithConfig(t.Context(), config))
	func() {
		defer func() {
			if p := recover(); p != "the user's" {
				t.Errorf("got panic %v", p)
			}
		}()
		pool.Ping(testContext(t))
	}()
	if r := pool.Report(); r.Active != 0 || r.Waiting != 0 {
		t.Errorf("got %s", brief(r))
	}
}

// Statements of the user's hooks run outside any lease. A transaction that PrepareConn begins is in the lease that follows.
func TestStatementsOfTheUsersHooksComeOutRight(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.Database(t), "pool_max_conns=1")))
	run := func(conn *pgx.Conn, sql string) bool {
		_, err := conn.Exec(context.Background(), sql)
		return err == nil
	}
	config.AfterConnect = func(_ context.Context, conn *pgx.Conn) error { run(conn, "select 'after connect'"); return nil }
	config.PrepareConn = func(_ context.Context, conn *pgx.Conn) (bool, error) { return run(conn, "begin"), nil }
	released := make(chan struct{})
	config.AfterRelease = func(conn *pgx.Conn) bool {
		defer close(released)
		return run(conn, "select 'after release'")
	}
	pool := newPoolWithConfig(t, config)

	conn := acquire(t, pool)
	if op := only(t, pool); op.State != pgxdrain.StateIdleInTransaction || op.TransactionStart.IsZero() || op.Statement != "" {
		t.Errorf("begun by PrepareConn: got %+v", op)
	}
	if _, err := conn.Exec(t.Context(), "commit"); err != nil {
		t.Fatal(err)
	}
	if op := only(t, pool); op.State != pgxdrain.StateIdle || !op.TransactionStart.IsZero() {
		t.Errorf("after commit: got %+v", op)
	}
	conn.Release()
	if ops := pool.Active(); len(ops) != 0 {
		t.Errorf("active in AfterRelease: %+v", ops)
	}
	<-released
}

func TestConnectionDestroyedOnReleaseIsForgotten(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=1")
	for range 3 {
		conn := acquire(t, pool)
		if _, err := conn.Exec(t.Context(), "begin"); err != nil {
			t.Fatal(err)
		}
		conn.Release() // in a transaction: pgxpool destroys it
		if ops := pool.Active(); len(ops) != 0 {
			t.Fatalf("active after the release: %+v", ops)
		}
	}
	if r := pool.Report(); r.Waiting != 0 {
		t.Errorf("%d waiting", r.Waiting)
	}
}

func TestConnectionClosedByItsHolderIsActiveUntilItIsReleased(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	conn := acquire(t, pool)
	conn.Exec(t.Context(), "begin")
	conn.Conn().Close(t.Context())
	conn.Exec(t.Context(), "select 1") // fails
	if op := only(t, pool); op.State != pgxdrain.StateIdle || !op.TransactionStart.IsZero() {
		t.Errorf("got %+v", op)
	}
	conn.Release()
	if ops := pool.Active(); len(ops) != 0 {
		t.Errorf("active after the release: %+v", ops)
	}
}

func TestHijackedConnectionIsItsCallersOwnWhileOthersAreHeld(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=2")
	hijacked := acquire(t, pool).Hijack()
	defer hijacked.Close(context.Background())
	held := acquire(t, pool)
	if op := only(t, pool); op.PID != held.Conn().PgConn().PID() {
		t.Errorf("got pid %d, want that of the connection that is held, not of the hijacked one", op.PID)
	}
	if r := pool.Report(); r.Active != 1 || r.Waiting != 0 {
		t.Errorf("got %s", brief(r))
	}
	if _, err := hijacked.Exec(t.Context(), "select 1"); err != nil {
		t.Error(err)
	}
	if n := len(pool.Active()); n != 1 {
		t.Errorf("%d active after the hijacked connection was used, want 1", n)
	}
	held.Release()
}

// A hijacked connection is reported by no hook. Records of them must not pile up in a service that keeps hijacking.
func TestHijackedConnectionsDoNotPileUp(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=2")
	for range 50 {
		acquire(t, pool).Hijack().Close(t.Context())
	}
	if r := pool.Report(); r.Active != 0 || r.Waiting != 0 {
		t.Errorf("got %s", brief(r))
	}
	if err := pool.Shutdown(testContext(t)); err != nil {
		t.Error(err)
	}
}

func TestCommitIsRecognisedWhateverComesBeforeIt(t *testing.T) {
	t.Parallel()
	for sql, want := range map[string]bool{
		"commit": true, "COMMIT": true, "Commit;": true, " \n\tcommit and chain": true, "end": true, "END TRANSACTION": true,
		"/* a */commit": true, "/* /* a */ */ commit": true, "-- a\ncommit": true, "-- a\rcommit": true, ";commit": true,
		`commit; select 'a\'`: true, "prepare transaction 'x'": true, "prepare/**/transaction 'x'": true,
		strings.Repeat("/* a long one */ ", 1000) + "commit": true,

		"": false, "/* commit": false, "-- commit": false, "commits": false, "commit_log": false, `"commit"`: false, "'commit'": false,
		"select 1 -- commit": false, "rollback": false, "prepare c as commit": false, "endless": false, "begin": false,
	} {
		if got := pgxdrain.EndsTransaction(sql); got != want {
			t.Errorf("%.40q: got %v", sql, got)
		}
	}
}

// pgxpool's list is looked at in parts. Where a connection is destroyed the last of the list takes its place, perhaps before the part
// that is looked at next.
func TestStress_ConnectionsThatMoveInTheListAreNotTakenForHijacked(t *testing.T) {
	t.Parallel()
	const held, coming = 60, 60
	pool := must[*pgxdrain.Pool](t)(pgxdrain.NewWithConfig(t.Context(), must[*pgxpool.Config](t)(bench.Nowhere(held+coming)), silent))
	defer pool.Close()
	var conns []*pgxpool.Conn
	for range held + coming {
		conns = append(conns, acquire(t, pool))
	}
	for i, c := range conns {
		if i%2 == 0 {
			defer c.Release()
		} else {
			c.Conn().Close(t.Context())
			c.Release()
		}
	}
	stop := make(chan struct{})
	var churning sync.WaitGroup
	for range 2 {
		churning.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				var some []*pgxpool.Conn
				for range coming / 2 {
					some = append(some, acquire(t, pool))
				}
				for _, c := range some {
					c.Conn().Close(t.Context())
					c.Release()
				}
			}
		})
	}
	for range 2000 {
		if n := len(pool.Active()); n < held {
			t.Errorf("%d of at least %d operations", n, held)
			break
		}
	}
	close(stop)
	churning.Wait()
}

// connectHook is a tracer of a user's that runs a statement as soon as a connection has been made.
type connectHook struct{ err error }

func (*connectHook) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (*connectHook) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (*connectHook) TraceConnectStart(ctx context.Context, _ pgx.TraceConnectStartData) context.Context {
	return ctx
}
func (h *connectHook) TraceConnectEnd(ctx context.Context, data pgx.TraceConnectEndData) {
	if data.Conn != nil {
		_, h.err = data.Conn.Exec(ctx, "set application_name = 'hooked'")
	}
}

func TestStatementOfATracerAtTheEndOfConnectingPassesByTheRecord(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(pgtest.Database(t)))
	hook := &connectHook{}
	config.ConnConfig.Tracer = hook
	pool := newPoolWithConfig(t, config)
	conn := acquire(t, pool)
	defer conn.Release()
	var name string
	if err := conn.QueryRow(t.Context(), "show application_name").Scan(&name); err != nil || name != "hooked" || hook.err != nil {
		t.Errorf("got %q, %v; in the hook %v", name, err, hook.err)
	}
	if ops := pool.Active(); len(ops) != 1 || ops[0].Statement != "show application_name" {
		t.Errorf("got %+v", ops)
	}
}

// A statement of a hook may have lost the connection without the hook's noticing.
func TestConnectionThatWasClosedBeforeItWasAcquiredIsActiveUntilItIsReleased(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(pgtest.Database(t)))
	config.PrepareConn = func(ctx context.Context, conn *pgx.Conn) (bool, error) {
		conn.Exec(ctx, "select pg_terminate_backend(pg_backend_pid())")
		return true, nil
	}
	pool := newPoolWithConfig(t, config, pgxdrain.WithDrainTimeout(500*time.Millisecond))
	for range 3 {
		conn := acquire(t, pool)
		if ops, r := pool.Active(), pool.Report(); len(ops) != 1 || r.Waiting != 0 {
			t.Errorf("%d operations active, want 1; %d waiting", len(ops), r.Waiting)
		}
		conn.Release()
		if n := len(pool.Active()); n != 0 {
			t.Errorf("%d operations active after the release", n)
		}
	}
	conn := acquire(t, pool)
	err := pool.Shutdown(t.Context())
	conn.Release()
	if r := pool.Report(); err == nil || r.Active != 1 || r.Leaked != 1 {
		t.Errorf("got %v, %s", err, brief(r))
	}
}
