package pgxdrain_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/jackc/puddle/v2"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// late is how long after its deadline Shutdown may return: 50 ms on a quiet machine, and tests share theirs.
const late = 50*time.Millisecond + 2*time.Second

// startShutdown calls Shutdown and returns once the gate is closed.
func startShutdown(t testing.TB, ctx context.Context, pool *pgxdrain.Pool) (result <-chan error) {
	t.Helper()
	c := make(chan error, 1)
	go func() { c <- pool.Shutdown(ctx) }()
	eventually(t, "the gate closes", func() bool {
		s := pool.Report().Step
		return s != pgxdrain.StepOpen && s != pgxdrain.StepUnready
	})
	return c
}

func wantShutdownError(t testing.TB, err error) *pgxdrain.ShutdownError {
	t.Helper()
	var e *pgxdrain.ShutdownError
	if !errors.As(err, &e) {
		t.Fatalf("got %v (%T), want a *ShutdownError", err, err)
	}
	return e
}

// brief is a report without its operations.
func brief(r pgxdrain.Report) string {
	n := len(r.Operations)
	r.Operations = nil
	return fmt.Sprintf("%d operations, %+v", n, r)
}

// checkReport checks what holds of every final report.
func checkReport(t testing.TB, r pgxdrain.Report) {
	t.Helper()
	outcomes := map[pgxdrain.Outcome]int{}
	for _, op := range r.Operations {
		outcomes[op.Outcome]++
	}
	counts := map[pgxdrain.Outcome]int{
		pgxdrain.OutcomeDrained: r.Drained, pgxdrain.OutcomeCancelled: r.Cancelled, pgxdrain.OutcomeSevered: r.Severed,
		pgxdrain.OutcomeUnknown: r.Unknown, pgxdrain.OutcomeLeaked: r.Leaked,
	}
	sum := 0
	for outcome, n := range counts {
		sum += n
		if outcomes[outcome] != n {
			t.Errorf("%d operations %s, the count is %d", outcomes[outcome], outcome, n)
		}
	}
	if sum != len(r.Operations) || r.Active+r.Admitted != sum {
		t.Errorf("the counts do not add up: %s", brief(r))
	}
	if r.Step != pgxdrain.StepClosed || r.Took <= 0 || r.Start.IsZero() {
		t.Errorf("not a final report: %s", brief(r))
	}
}

func TestShutdownOfAnIdlePoolReturnsAtOnceAndClosesIt(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	if err := pool.Ping(testContext(t)); err != nil {
		t.Fatal(err)
	}
	look := observer(t, pool)
	if err := pool.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := pool.Report()
	checkReport(t, r)
	if r.Took > timeout/10 || len(r.Operations) != 0 {
		t.Errorf("got %s", brief(r))
	}
	if n := pool.Stat().TotalConns(); n != 0 {
		t.Errorf("%d connections left in the pool", n)
	}
	eventually(t, "no session of ours is left", func() bool { return sessions(t, look) == 0 })
}

// sessions counts the sessions in the database of look, without its own.
func sessions(t testing.TB, look *pgx.Conn) (n int) {
	t.Helper()
	err := look.QueryRow(t.Context(), `
		select count(*) from pg_stat_activity
		where datname = current_database() and pid <> pg_backend_pid()`).Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestEveryWayToAcquireIsRefusedAtOnceWithExactlyErrShuttingDown(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	db := stdlib.OpenDBFromPool(pool.Pool)
	defer db.Close()
	held := acquire(t, pool)
	result := startShutdown(t, testContext(t), pool)
	defer func() {
		held.Release()
		if err := <-result; err != nil {
			t.Error(err)
		}
	}()

	ctx := context.Background()
	ways := map[string]func() error{
		"Acquire":     func() error { _, err := pool.Acquire(ctx); return err },
		"AcquireFunc": func() error { return pool.AcquireFunc(ctx, nil) },
		"Exec":        func() error { _, err := pool.Exec(ctx, "select 1"); return err },
		"Query":       func() error { _, err := pool.Query(ctx, "select 1"); return err },
		"QueryRow":    func() error { return pool.QueryRow(ctx, "select 1").Scan(nil) },
		"Begin":       func() error { _, err := pool.Begin(ctx); return err },
		"BeginFunc":   func() error { return pgx.BeginFunc(ctx, pool, nil) },
		"SendBatch": func() error {
			b := &pgx.Batch{}
			b.Queue("select 1")
			return pool.SendBatch(ctx, b).Close()
		},
		"CopyFrom": func() error {
			_, err := pool.CopyFrom(ctx, pgx.Identifier{"n"}, []string{"n"}, pgx.CopyFromRows(nil))
			return err
		},
		"Ping":             func() error { return pool.Ping(ctx) },
		"raw pool":         func() error { return pool.Pool.Ping(ctx) },
		"database/sql":     func() error { return db.PingContext(ctx) },
		"database/sql, tx": func() error { _, err := db.BeginTx(ctx, &sql.TxOptions{}); return err },
	}
	start := time.Now()
	for name, way := range ways {
		err := way()
		if err != pgxdrain.ErrShuttingDown {
			t.Errorf("%s: got %v (%T)", name, err, err)
		}
		if !errors.Is(err, puddle.ErrClosedPool) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v matches the wrong errors", name, err)
		}
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("refusing took %v", took)
	}
	if r := pool.Report(); int(r.Refused) != len(ways) {
		t.Errorf("%d refused, want %d", r.Refused, len(ways))
	}
}

func TestAcquisitionsAreRefusedAfterTheShutdownToo(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	pool.Close()
	if err := pool.Ping(t.Context()); err != pgxdrain.ErrShuttingDown {
		t.Errorf("got %v", err)
	}
	if r := pool.Report(); r.Refused != 0 {
		t.Errorf("the final report has changed: %+v", r)
	}
}

// Whatever is going on over a connection that was acquired before the flip goes on.
func TestShutdownLetsWorkInProgressFinish(t *testing.T) {
	t.Parallel()
	for name, work := range map[string]func(ctx context.Context, pool *pgxdrain.Pool, halfway func()) error{
		"statement": func(ctx context.Context, pool *pgxdrain.Pool, halfway func()) error {
			halfway()
			_, err := pool.Exec(ctx, "select pg_sleep(0.3)")
			return err
		},
		"transaction": func(ctx context.Context, pool *pgxdrain.Pool, halfway func()) error {
			return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, "insert into n values (1)"); err != nil {
					return err
				}
				halfway()
				_, err := tx.Exec(ctx, "insert into n select 2 from pg_sleep(0.1)")
				return err
			})
		},
		"rows": func(ctx context.Context, pool *pgxdrain.Pool, halfway func()) error {
			rows, err := pool.Query(ctx, "select repeat('x', 1000) from generate_series(1, 10000)")
			if err != nil {
				return err
			}
			n := 0
			for rows.Next() {
				if n++; n == 5 {
					halfway()
				}
			}
			if n != 10000 {
				return fmt.Errorf("%d rows: %w", n, rows.Err())
			}
			return rows.Err()
		},
		"batch": func(ctx context.Context, pool *pgxdrain.Pool, halfway func()) error {
			b := &pgx.Batch{}
			b.Queue("select 1")
			b.Queue("select pg_sleep(0.1)")
			br := pool.SendBatch(ctx, b)
			if _, err := br.Exec(); err != nil {
				return err
			}
			halfway()
			return br.Close()
		},
		"copy": func(ctx context.Context, pool *pgxdrain.Pool, halfway func()) error {
			n := 0
			_, err := pool.CopyFrom(ctx, pgx.Identifier{"n"}, []string{"n"}, pgx.CopyFromFunc(func() ([]any, error) {
				if n++; n == 5 {
					halfway()
				}
				if n > 1000 {
					return nil, nil
				}
				return []any{n}, nil
			}))
			return err
		},
		"connection held": func(ctx context.Context, pool *pgxdrain.Pool, halfway func()) error {
			return pool.AcquireFunc(ctx, func(c *pgxpool.Conn) error {
				halfway()
				for range 3 {
					if _, err := c.Exec(ctx, "select 1"); err != nil {
						return err
					}
				}
				return nil
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, "")
			if _, err := pool.Exec(t.Context(), "create table n (n int)"); err != nil {
				t.Fatal(err)
			}
			ctx := testContext(t)
			var result <-chan error
			if err := work(ctx, pool, func() {
				if name == "statement" { // nothing is acquired yet
					c := make(chan error, 1)
					go func() {
						for len(pool.Active()) == 0 {
							time.Sleep(time.Millisecond)
						}
						c <- pool.Shutdown(ctx)
					}()
					result = c
					return
				}
				result = startShutdown(t, ctx, pool)
			}); err != nil {
				t.Errorf("the work: %v", err)
			}
			if err := <-result; err != nil {
				t.Errorf("Shutdown: %v", err)
			}
			r := pool.Report()
			checkReport(t, r)
			if r.Active != 1 || r.Drained != 1 {
				t.Errorf("got %s", brief(r))
			}
		})
	}
}

func TestQueuedCallersKeepTheirTurn(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=1")
	held := acquire(t, pool)
	const callers = 10
	result := make(chan error, callers)
	for range callers {
		go func() {
			_, err := pool.Exec(context.Background(), "select 1")
			result <- err
		}()
	}
	eventually(t, "they wait", func() bool { return pool.Report().Waiting == callers })
	shutdown := startShutdown(t, testContext(t), pool)
	held.Release()
	for range callers {
		if err := <-result; err != nil {
			t.Errorf("got %v", err)
		}
	}
	if err := <-shutdown; err != nil {
		t.Error(err)
	}
	r := pool.Report()
	checkReport(t, r)
	if r.Active != 1 || r.Waiting != callers || r.Admitted != callers || r.Drained != callers+1 {
		t.Errorf("got %s", brief(r))
	}
}

func TestShutdownReturnsAtItsDeadlineAndNamesWhatIsLeft(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=12")
	tx := must[pgx.Tx](t)(pool.Begin(testContext(t)))
	if _, err := tx.Exec(t.Context(), "select  $1::text", "argument"); err != nil {
		t.Fatal(err)
	}
	pid := tx.Conn().PgConn().PID()
	var held []*pgxpool.Conn
	for range 11 {
		held = append(held, acquire(t, pool))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	deadline, _ := ctx.Deadline()
	err := pool.Shutdown(ctx)
	if d := time.Until(deadline); d > 0 || d < -late {
		t.Errorf("returned %v before the deadline", d)
	}
	e := wantShutdownError(t, err)
	checkReport(t, e.Report)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v does not match context.DeadlineExceeded", err)
	}
	if len(e.Remaining()) != 12 || e.Leaked != 12 {
		t.Errorf("got %s", brief(e.Report))
	}
	for _, want := range []string{
		"12 of 12 operations", string(pgxdrain.StateIdleInTransaction), fmt.Sprintf("pid %d", pid), `"select  $1::text"`, "and 2 more",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), "argument") {
		t.Errorf("the argument is in: %v", err)
	}
	tx.Rollback(context.Background())
	for _, c := range held {
		c.Release()
	}
}

func TestBudgetIsTheDrainTimeoutWithoutADeadline(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_drain_timeout=200ms")
	conn := acquire(t, pool)
	start := time.Now()
	e := wantShutdownError(t, pool.Shutdown(context.Background()))
	if took := time.Since(start); took < 200*time.Millisecond || took > 200*time.Millisecond+late {
		t.Errorf("took %v", took)
	}
	if e.Budget != 200*time.Millisecond {
		t.Errorf("the budget is %v", e.Budget)
	}
	conn.Release()
}

func TestInitialWaitAdmitsAndIsPartOfTheBudget(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_initial_wait=1h&pool_drain_timeout=400ms&pool_cancel_grace=200ms")
	result := make(chan error, 1)
	go func() { result <- pool.Shutdown(context.Background()) }()
	<-pool.Draining()
	if err := pool.Ping(testContext(t)); err != nil {
		t.Errorf("refused during the initial wait: %v", err)
	}
	if s := pool.Report().Step; s != pgxdrain.StepUnready {
		t.Errorf("the step is %q", s)
	}
	if err := <-result; err != nil {
		t.Error(err)
	}
	if took := pool.Report().Took; took < 200*time.Millisecond || took > 200*time.Millisecond+late {
		t.Errorf("took %v, want the budget less the grace", took)
	}
}

func TestEveryCallOfShutdownWaitsForTheOneAndReturnsItsResult(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_drain_timeout=300ms")
	conn := acquire(t, pool)
	results := make(chan error, 5)
	for range 5 {
		go func() { results <- pool.Shutdown(context.Background()) }()
	}
	first := <-results
	wantShutdownError(t, first)
	for range 4 {
		if err := <-results; err != first {
			t.Errorf("got %v, want the same error", err)
		}
	}
	if err := pool.Shutdown(t.Context()); err != first {
		t.Errorf("later: got %v, want the same error", err)
	}
	pool.Close()
	conn.Release()
}

func TestCancellingAnyCallersCtxEndsTheDrain(t *testing.T) {
	t.Parallel()
	secondSignal := errors.New("second SIGTERM")
	for name, which := range map[string]int{"the first caller's": 0, "a later caller's": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, "pool_drain_timeout=1h&pool_cancel_grace=200ms")
			conn := acquire(t, pool)
			var cancel [2]context.CancelCauseFunc
			results := make(chan error, 2)
			for i := range cancel {
				var ctx context.Context
				ctx, cancel[i] = context.WithCancelCause(t.Context())
				startShutdown(t, ctx, pool) // its own result is the same
				go func() { results <- pool.Shutdown(ctx) }()
			}
			start := time.Now()
			cancel[which](secondSignal)
			for range cancel {
				err := <-results
				if wantShutdownError(t, err); !errors.Is(err, secondSignal) || errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v, want it to match the cause", err)
				}
			}
			if took := time.Since(start); took < 200*time.Millisecond || took > 200*time.Millisecond+late {
				t.Errorf("took %v, want the grace", took)
			}
			cancel[1-which](nil)
			conn.Release()
		})
	}
}

func TestCtxThatIsDoneOnEntryStillDrainsWhatIsIdleAndCloses(t *testing.T) {
	t.Parallel()
	for name, ctx := range map[string]func(context.Context) (context.Context, context.CancelFunc){
		"cancelled": func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return ctx, cancel
		},
		"past its deadline": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, -time.Second)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, "pool_initial_wait=1h")
			if err := pool.Ping(testContext(t)); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := ctx(t.Context())
			defer cancel()
			if err := pool.Shutdown(ctx); err != nil {
				t.Error(err)
			}
			if n := pool.Stat().TotalConns(); n != 0 {
				t.Errorf("%d connections left", n)
			}
		})
	}
}

func TestHijackedConnectionsAreNotWaitedForAndStayUsable(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=4")
	var mine []*pgx.Conn
	hijack := func() {
		conn := acquire(t, pool).Hijack()
		t.Cleanup(func() { conn.Close(context.Background()) })
		mine = append(mine, conn)
	}
	hijack()
	held, hijackedLater := acquire(t, pool), acquire(t, pool)
	result := startShutdown(t, testContext(t), pool)
	if r := pool.Report(); r.Active != 2 {
		t.Errorf("%d active at the flip, want 2: one was hijacked before", r.Active)
	}
	mine = append(mine, hijackedLater.Hijack())
	t.Cleanup(func() { mine[1].Close(context.Background()) })
	held.Release()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	r := pool.Report()
	checkReport(t, r)
	if r.Active != 1 || r.Drained != 1 {
		t.Errorf("got %s, want only the one that was held", brief(r))
	}
	for _, conn := range mine {
		if _, err := conn.Exec(t.Context(), "select 1"); err != nil {
			t.Errorf("a hijacked connection: %v", err)
		}
	}
}

func TestHooksOfTheUserThatHangDoNotHoldUpTheReturn(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*pgxpool.Config, <-chan struct{}){
		"BeforeClose": func(c *pgxpool.Config, end <-chan struct{}) {
			c.BeforeClose = func(*pgx.Conn) { <-end }
		},
		"AfterRelease": func(c *pgxpool.Config, end <-chan struct{}) {
			c.AfterRelease = func(*pgx.Conn) bool { <-end; return true }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.Database(t), "pool_drain_timeout=300ms")))
			end := make(chan struct{})
			set(config, end)
			pool := newPoolWithConfig(t, config)
			acquire(t, pool).Release()
			start := time.Now()
			e := wantShutdownError(t, pool.Shutdown(context.Background()))
			if took := time.Since(start); took > 300*time.Millisecond+late {
				t.Errorf("took %v", took)
			}
			if len(e.Remaining()) != 0 || !strings.Contains(e.Error(), "drained, but not closed") {
				t.Errorf("got %v", e)
			}
			close(end)
		})
	}
}

// blockingHandler hangs in the first line it is given.
type blockingHandler struct {
	slog.Handler
	entered chan struct{}
	end     chan struct{}
	once    *sync.Once
}

func (h blockingHandler) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h blockingHandler) Handle(context.Context, slog.Record) error {
	h.once.Do(func() { close(h.entered) })
	<-h.end
	return nil
}

func TestLogHandlerThatHangsHoldsUpNeitherTheStepsNorTheReturn(t *testing.T) {
	t.Parallel()
	h := blockingHandler{slog.DiscardHandler, make(chan struct{}), make(chan struct{}), new(sync.Once)}
	pool := newPool(t, "pool_drain_timeout=300ms", pgxdrain.WithLogger(slog.New(enabled{h})))
	if err := pool.Ping(testContext(t)); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := pool.Shutdown(context.Background()); err != nil {
		t.Errorf("got %v: all was drained and closed in time", err)
	}
	if took := time.Since(start); took > 300*time.Millisecond+late {
		t.Errorf("took %v", took)
	}
	<-h.entered
	if n := pool.Stat().TotalConns(); n != 0 {
		t.Errorf("%d connections left", n)
	}
	close(h.end)
}

// enabled is a handler that takes every level: slog.DiscardHandler takes none.
type enabled struct{ blockingHandler }

func (enabled) Enabled(context.Context, slog.Level) bool { return true }
func (e enabled) WithAttrs([]slog.Attr) slog.Handler     { return e }
func (e enabled) WithGroup(string) slog.Handler          { return e }

// lines is a log that can be read while it is written.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// A line of the log in JSON, which has the time and the order of an object's keys aside what the handler was given.
type logLine map[string]any

// keys are the line's, in order, without those that every line has.
func (l logLine) keys() string {
	delete(l, "time")
	delete(l, "pool")
	delete(l, "level")
	delete(l, "msg")
	return strings.Join(slices.Sorted(maps.Keys(l)), " ")
}

func TestEveryLogLineHasItsLevelAndItsKeys(t *testing.T) {
	t.Parallel()
	var log lines
	pool := newPool(t, "pool_max_conns=5&pool_name=orders&pool_drain_timeout=6s&pool_cancel_grace=4s",
		pgxdrain.WithLogger(slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))))
	ctx := testContext(t)
	leaked := acquire(t, pool)
	var done sync.WaitGroup
	done.Go(func() { pool.Exec(ctx, "select pg_sleep(600)") }) // cancelled
	done.Go(func() {
		b := &pgx.Batch{}
		b.Queue("select pg_sleep(600)")
		b.Queue("select 2")
		pool.SendBatch(ctx, b).Close()
	})
	rows := must[pgx.Rows](t)(pool.Query(ctx, "select generate_series(1, 1000000)")) // unknown: nobody reads them
	eventually(t, "all run", func() bool {
		n := 0
		for _, op := range pool.Active() {
			if op.State == pgxdrain.StateActive {
				n++
			}
		}
		return n == 3
	})
	if log.String() != "" {
		t.Errorf("logged in normal running: %s", log.String())
	}
	err := pool.Shutdown(context.Background())
	leaked.Release()
	rows.Close()
	done.Wait()
	wantShutdownError(t, err)

	const step = "connections left remaining step waiting"
	const result = "cancelled closed drained leaked refused severed took unknown"
	want := []string{
		"INFO pgxdrain: shutting down, no longer ready: " + step,
		"INFO pgxdrain: draining, new work is refused: " + step,
		"INFO pgxdrain: still draining: left oldest remaining",
		"WARN pgxdrain: ending what is left: cancelling: " + step,
		"WARN pgxdrain: severing what is left: " + step,
		"INFO pgxdrain: closing the pool: " + step,
		"ERROR pgxdrain: not drained: held outcome pid state",
		"ERROR pgxdrain: not drained: held outcome pid state statement",
		"WARN pgxdrain: not drained: held outcome pid state statement",
		"WARN pgxdrain: not drained: batch_size held outcome pid state statement",
		"ERROR pgxdrain: not drained and closed in time: " + result,
	}
	var got []string
	for text := range strings.Lines(log.String()) {
		var line logLine
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatal(err)
		}
		if line["pool"] != "orders" {
			t.Errorf("no pool in %s", text)
		}
		is := fmt.Sprintf("%s %s: ", line["level"], line["msg"])
		if oldest, ok := line["oldest"].(map[string]any); ok && (len(oldest) != 3 || oldest["1"].(map[string]any)["state"] != "idle") {
			t.Errorf("the oldest are %v", oldest)
		}
		got = append(got, is+line.keys())
	}
	got = slices.Compact(got) // of a slow machine, which has more of the lines of every second
	slices.Sort(got[6:])      // the two that began at the same time may come in any order
	slices.Sort(want[6:])
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestShutdownLogsItsProgressAndNothingBefore(t *testing.T) {
	t.Parallel()
	var log lines
	pool := newPool(t, "pool_max_conns=1&pool_name=orders&pool_drain_timeout=1500ms&pool_cancel_grace=100ms",
		pgxdrain.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	conn := acquire(t, pool)
	if _, err := conn.Exec(t.Context(), "select 'secret'"); err != nil {
		t.Fatal(err)
	}
	if s := log.String(); s != "" {
		t.Errorf("logged in normal running: %s", s)
	}
	pool.Close()
	conn.Release()
	got := log.String()
	for _, want := range []string{
		`level=INFO msg="pgxdrain: draining, new work is refused" pool=orders step=refuse remaining=1 waiting=0 connections=1 left=1.`,
		`level=INFO msg="pgxdrain: still draining" pool=orders remaining=1 left=`,
		`level=ERROR msg="pgxdrain: not drained" pool=orders outcome=leaked state=idle held=`,
		`statement="select ?"`,
		`level=ERROR msg="pgxdrain: not drained and closed in time" pool=orders took=`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%s\nis not in\n%s", want, got)
		}
	}
	if strings.Contains(got, "secret") {
		t.Errorf("the secret is in\n%s", got)
	}
}

// Hundreds of callers across the flip: each call is done or refused, and nothing else happens.
func TestStress_CallsAcrossTheFlipAreDoneOrRefused(t *testing.T) {
	t.Parallel()
	for _, maxConns := range []int{1, 4, 32} {
		t.Run(fmt.Sprintf("%d connections", maxConns), func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, fmt.Sprintf("pool_max_conns=%d", maxConns))
			if _, err := pool.Exec(t.Context(), "create table done (n bigint)"); err != nil {
				t.Fatal(err)
			}
			look := observer(t, pool)
			db := stdlib.OpenDBFromPool(pool.Pool)
			defer db.Close()
			ctx := testContext(t)
			ways := []func(n int64) error{
				func(n int64) error {
					_, err := pool.Exec(ctx, "insert into done values ($1)", n)
					return err
				},
				func(n int64) error {
					return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
						_, err := tx.Exec(ctx, "insert into done values ($1)", n)
						return err
					})
				},
				func(n int64) error {
					b := &pgx.Batch{}
					b.Queue("insert into done values ($1)", n)
					b.Queue("select 1")
					return pool.SendBatch(ctx, b).Close()
				},
				func(n int64) error {
					_, err := pool.CopyFrom(ctx, pgx.Identifier{"done"}, []string{"n"}, pgx.CopyFromRows([][]any{{n}}))
					return err
				},
				func(n int64) error {
					return pool.Pool.QueryRow(ctx, "insert into done values ($1) returning n", n).Scan(&n)
				},
				func(n int64) error {
					_, err := db.ExecContext(ctx, "insert into done values ($1)", n)
					return err
				},
			}
			const callers = 300
			var next, done, refused atomic.Int64
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for {
						err := ways[rand.IntN(len(ways))](next.Add(1))
						switch {
						case err == nil:
							done.Add(1)
						case err == pgxdrain.ErrShuttingDown:
							refused.Add(1)
							return
						default:
							t.Errorf("neither done nor refused: %v (%T)", err, err)
							return
						}
					}
				})
			}
			eventually(t, "they are at work", func() bool { return done.Load() > callers })
			if err := pool.Shutdown(ctx); err != nil {
				t.Error(err)
			}
			wg.Wait()
			r := pool.Report()
			checkReport(t, r)
			if refused.Load() != callers || r.Leaked != 0 {
				t.Errorf("%d callers refused, want %d; %d leaked", refused.Load(), callers, r.Leaked)
			}
			var rows, distinct int64
			if err := look.QueryRow(t.Context(), "select count(*), count(distinct n) from done").Scan(&rows, &distinct); err != nil {
				t.Fatal(err)
			}
			if rows != done.Load() || distinct != rows {
				t.Errorf("%d calls were done, the table has %d rows, %d distinct", done.Load(), rows, distinct)
			}
		})
	}
}

// The forced end. Each test brings operations into a state in which they would go on for longer than the budget, and checks
// what their callers, the report and the server say.

// forcedParams leave a second for the drain, half a second for the server to cancel, and as much to sever and close.
const forcedParams = "pool_drain_timeout=2s&pool_cancel_grace=1s&pool_max_conns=4"

// shutdownInTime calls Shutdown and checks that it kept to its budget.
func shutdownInTime(t testing.TB, pool *pgxdrain.Pool) error {
	t.Helper()
	start := time.Now()
	err := pool.Shutdown(context.Background())
	took := time.Since(start)
	r := pool.Report()
	checkReport(t, r)
	if took > r.Budget+late {
		t.Errorf("took %v, the budget is %v", took, r.Budget)
	}
	return err
}

func sqlState(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

// inState waits until the only operation is in that state.
func inState(t testing.TB, pool *pgxdrain.Pool, state pgxdrain.State) {
	t.Helper()
	eventually(t, "it is "+string(state), func() bool {
		ops := pool.Active()
		return len(ops) == 1 && ops[0].State == state
	})
}

// severed waits until the server has no session of the pool left.
func severed(t testing.TB, look *pgx.Conn) {
	t.Helper()
	eventually(t, "no session of ours is left", func() bool { return sessions(t, look) == 0 })
}

func TestRunningStatementIsCancelledAtTheServer(t *testing.T) {
	t.Parallel()
	for name, run := range map[string]func(ctx context.Context, pool *pgxdrain.Pool) error{
		"by itself": func(ctx context.Context, pool *pgxdrain.Pool) error {
			_, err := pool.Exec(ctx, "select pg_sleep(60)")
			return err
		},
		"with arguments": func(ctx context.Context, pool *pgxdrain.Pool) error {
			_, err := pool.Exec(ctx, "select pg_sleep($1)", 60)
			return err
		},
		"in a transaction": func(ctx context.Context, pool *pgxdrain.Pool) error {
			return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, "select pg_sleep(60)")
				return err
			})
		},
		"in a batch": func(ctx context.Context, pool *pgxdrain.Pool) error {
			b := &pgx.Batch{}
			b.Queue("select 1")
			b.Queue("select pg_sleep(60)")
			return pool.SendBatch(ctx, b).Close()
		},
		"from database/sql": func(ctx context.Context, pool *pgxdrain.Pool) error {
			db := stdlib.OpenDBFromPool(pool.Pool)
			defer db.Close()
			_, err := db.ExecContext(ctx, "select pg_sleep(60)")
			return err
		},
		"by a caller that goes on regardless": func(ctx context.Context, pool *pgxdrain.Pool) error {
			return pool.AcquireFunc(ctx, func(c *pgxpool.Conn) error {
				var err error
				for range 3 {
					_, err = c.Exec(ctx, "select pg_sleep(60)")
				}
				return err
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, forcedParams)
			look := observer(t, pool)
			result := make(chan error, 1)
			go func() { result <- run(context.Background(), pool) }()
			inState(t, pool, pgxdrain.StateActive)
			e := wantShutdownError(t, shutdownInTime(t, pool))
			if err := <-result; sqlState(err) != "57014" {
				t.Errorf("the caller got %v", err)
			}
			if e.Cancelled != 1 || len(e.Operations) != 1 {
				t.Errorf("got %v", e)
			}
			severed(t, look)
		})
	}
}

// Each holder notices when it next uses its connection, as a holder does that is at work, and then lets go of it.
func TestConnectionWithoutAStatementIsSevered(t *testing.T) {
	t.Parallel()
	for name, hold := range map[string]struct {
		take  func(t *testing.T, pool *pgxdrain.Pool) (use func() error, release func())
		state pgxdrain.State
	}{
		"transaction left idle": {func(t *testing.T, pool *pgxdrain.Pool) (func() error, func()) {
			tx := must[pgx.Tx](t)(pool.Begin(context.Background()))
			if _, err := tx.Exec(context.Background(), "lock table locked"); err != nil {
				t.Fatal(err)
			}
			use := func() error { return tx.Commit(context.Background()) }
			return use, func() { tx.Rollback(context.Background()) }
		}, pgxdrain.StateIdleInTransaction},
		"failed transaction": {func(t *testing.T, pool *pgxdrain.Pool) (func() error, func()) {
			tx := must[pgx.Tx](t)(pool.Begin(context.Background()))
			tx.Exec(context.Background(), "select 1/0")
			use := func() error { _, err := tx.Exec(context.Background(), "select $1::int", 1); return err }
			return use, func() { tx.Rollback(context.Background()) }
		}, pgxdrain.StateIdleInTransactionAborted},
		"connection just held": {func(t *testing.T, pool *pgxdrain.Pool) (func() error, func()) {
			conn := acquire(t, pool)
			use := func() error { _, err := conn.Exec(context.Background(), "select 1"); return err }
			return use, conn.Release
		}, pgxdrain.StateIdle},
		"LISTEN loop": {func(t *testing.T, pool *pgxdrain.Pool) (func() error, func()) {
			conn := acquire(t, pool)
			if _, err := conn.Exec(context.Background(), "listen news"); err != nil {
				t.Fatal(err)
			}
			use := func() error {
				_, err := conn.Conn().WaitForNotification(context.Background())
				return err
			}
			return use, conn.Release
		}, pgxdrain.StateIdle},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, forcedParams)
			look := observer(t, pool)
			if _, err := look.Exec(t.Context(), "create table locked (n int)"); err != nil {
				t.Fatal(err)
			}
			use, release := hold.take(t, pool)
			inState(t, pool, hold.state)
			result := startShutdown(t, context.Background(), pool)
			if name != "LISTEN loop" { // it is blocked in its use from the beginning
				eventually(t, "the server has rolled back", func() bool { return sessions(t, look) == 0 })
			}
			if err := use(); !errors.Is(err, pgxdrain.ErrShuttingDown) {
				t.Errorf("the next use: %v", err)
			}
			release()
			e := wantShutdownError(t, <-result)
			checkReport(t, e.Report)
			if e.Severed != 1 || e.Operations[0].State != hold.state {
				t.Errorf("got %v", e)
			}
			severed(t, look)
			if _, err := look.Exec(t.Context(), "lock table locked nowait"); err != nil && sqlState(err) != "25P01" {
				t.Errorf("the lock is not gone: %v", err)
			}
		})
	}
}

// The backend is blocked in sending them and takes no cancel request then.
// slowReader is a connection that, once it is told to, keeps what it has read to itself until it is let go.
type slowReader struct {
	net.Conn
	slow atomic.Bool
	read chan struct{} // closed when it has read something
	let  chan struct{}
}

func (c *slowReader) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && c.slow.CompareAndSwap(true, false) {
		close(c.read)
		<-c.let
	}
	return n, err
}

// The answer to its LISTEN is there when its connection is severed; but then it listens on.
func TestListenerThatIsSeveredAfterAnAnswerIsSevered(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.Database(t), "pool_drain_timeout=60s&pool_cancel_grace=6s")))
	dial := config.ConnConfig.DialFunc
	c := &slowReader{read: make(chan struct{}), let: make(chan struct{})}
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil || c.Conn != nil { // a cancel request
			return conn, err
		}
		c.Conn = conn
		return c, nil
	}
	pool := newPoolWithConfig(t, config)
	conn := acquire(t, pool)
	c.slow.Store(true)
	result := make(chan error, 1)
	go func() {
		defer conn.Release()
		_, err := conn.Exec(context.Background(), "listen news")
		if err == nil {
			_, err = conn.Conn().WaitForNotification(context.Background())
		}
		result <- err
	}()
	<-c.read
	shutdown := startShutdown(t, doneContext(), pool)
	eventually(t, "it is severed", func() bool { return pool.Report().Step == pgxdrain.StepClose })
	close(c.let)
	e := wantShutdownError(t, <-shutdown)
	checkReport(t, e.Report)
	if err := <-result; !errors.Is(err, pgxdrain.ErrShuttingDown) || e.Severed != 1 {
		t.Errorf("the listener got %v; %v", err, e)
	}
}

func TestRowsThatNobodyReadsAreCutOff(t *testing.T) {
	t.Parallel()
	pool := newPool(t, forcedParams)
	look := observer(t, pool)
	rows := must[pgx.Rows](t)(pool.Query(context.Background(), "select repeat('x', 1000) from generate_series(1, 1000000)"))
	rows.Next()
	inState(t, pool, pgxdrain.StateActive)
	result := startShutdown(t, context.Background(), pool)
	severed(t, look)
	for rows.Next() {
	}
	if err := rows.Err(); !errors.Is(err, pgxdrain.ErrShuttingDown) {
		t.Errorf("the reader got %v", err)
	}
	e := wantShutdownError(t, <-result)
	checkReport(t, e.Report)
	if e.Unknown != 1 { // outside a transaction, and not answered
		t.Errorf("got %v", e)
	}
}

func TestHandleThatIsNeverReleasedIsLeakedAndItsSessionGone(t *testing.T) {
	t.Parallel()
	for name, leak := range map[string]func(*testing.T, *pgxdrain.Pool) (release func()){
		"connection": func(t *testing.T, pool *pgxdrain.Pool) func() { return acquire(t, pool).Release },
		"transaction": func(t *testing.T, pool *pgxdrain.Pool) func() {
			tx := must[pgx.Tx](t)(pool.Begin(context.Background()))
			return func() { tx.Rollback(context.Background()) }
		},
		"unit of work": func(t *testing.T, pool *pgxdrain.Pool) func() {
			_, release, err := pool.Hold(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return release
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, "pool_drain_timeout=1s")
			look := observer(t, pool)
			release := leak(t, pool)
			e := wantShutdownError(t, shutdownInTime(t, pool))
			if e.Leaked != 1 || len(e.Operations) != 1 {
				t.Errorf("got %v", e)
			}
			severed(t, look)
			release()
			if after := pool.Report(); after.Leaked != 1 || after.Drained != 0 {
				t.Errorf("the report has changed: %s", brief(after))
			}
		})
	}
}

func TestQueuedCallersAreFreedFromBehindALeakedConnection(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_drain_timeout=1s&pool_max_conns=1")
	look := observer(t, pool)
	conn := acquire(t, pool)
	const callers = 20
	result := make(chan error, callers)
	for range callers {
		go func() { result <- pool.Ping(context.Background()) }()
	}
	eventually(t, "they wait", func() bool { return pool.Report().Waiting == callers })
	e := wantShutdownError(t, shutdownInTime(t, pool))
	for range callers {
		if err := <-result; err != pgxdrain.ErrShuttingDown {
			t.Errorf("a queued caller got %v", err)
		}
	}
	if e.Leaked != 1 || e.Waiting != callers || e.Refused != callers || e.Admitted != 0 {
		t.Errorf("got %s", brief(e.Report))
	}
	severed(t, look)
	conn.Release()
}

func TestCallersWaitingWithACtxOfTheirOwnGetItsError(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_drain_timeout=1s&pool_max_conns=1")
	conn := acquire(t, pool)
	defer conn.Release()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := pool.Ping(ctx); err != context.DeadlineExceeded {
		t.Errorf("got %v (%T), want what pgxpool returns", err, err)
	}
	ctx, stop := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, stop)
	if err := pool.Ping(ctx); err != context.Canceled {
		t.Errorf("got %v (%T), want what pgxpool returns", err, err)
	}
}

// committing returns once a caller waits for the COMMIT of a row in the table slow, see slowCommit.
func committing(t testing.TB, ctx context.Context, pool *pgxdrain.Pool) (result <-chan error) {
	t.Helper()
	c := make(chan error, 1)
	go func() {
		c <- pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "insert into slow values (1)")
			return err
		})
	}()
	eventually(t, "it commits", func() bool {
		return slices.ContainsFunc(pool.Active(), func(op pgxdrain.Operation) bool { return op.State == pgxdrain.StateCommitting })
	})
	return c
}

func TestCommitInFlightIsNeverCancelled(t *testing.T) {
	t.Parallel()
	pool := newPool(t, forcedParams)
	look := observer(t, pool)
	slowCommit(t, look, "slow", "5")
	result := committing(t, context.Background(), pool)
	e := wantShutdownError(t, shutdownInTime(t, pool))
	if err := <-result; !errors.Is(err, pgxdrain.ErrShuttingDown) {
		t.Errorf("the caller got %v", err)
	}
	if e.Unknown != 1 {
		t.Errorf("got %v", e)
	}
	eventually(t, "the row is there", func() bool {
		var n int
		return look.QueryRow(t.Context(), "select count(*) from slow").Scan(&n) == nil && n == 1
	})
	severed(t, look)
}

func TestCommitThatEndsDuringTheCancelStepHasDrained(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_drain_timeout=5s&pool_cancel_grace=2500ms")
	slowCommit(t, observer(t, pool), "slow", "3")
	result := committing(t, context.Background(), pool)
	err := shutdownInTime(t, pool)
	if caller := <-result; caller != nil {
		t.Errorf("the caller got %v", caller)
	}
	if r := pool.Report(); err != nil || r.Drained != 1 {
		t.Errorf("got %v, %s", err, brief(r))
	}
}

// A COMMIT that somebody else has cancelled is answered: it is known to have been rolled back.
func TestCommitCancelledBySomebodyElseIsKnown(t *testing.T) {
	t.Parallel()
	pool := newPool(t, forcedParams)
	look := observer(t, pool)
	slowCommit(t, look, "slow", "60")
	result := committing(t, context.Background(), pool)
	pid := only(t, pool).PID
	shutdown := startShutdown(t, context.Background(), pool)
	eventually(t, "the cancel step", func() bool { return pool.Report().Step == pgxdrain.StepCancel })
	if _, err := look.Exec(t.Context(), "select pg_cancel_backend($1)", int32(pid)); err != nil {
		t.Fatal(err)
	}
	if err := <-result; sqlState(err) != "57014" {
		t.Errorf("the caller got %v", err)
	}
	<-shutdown
	if r := pool.Report(); r.Unknown != 0 || r.Drained != 1 {
		t.Errorf("got %s", brief(r))
	}
}

// No cancel request reaches the server here: it runs what it has been sent to the end, after its client has gone.
func TestStatementCutOffWithoutAnAnswerIsUnknown(t *testing.T) {
	t.Parallel()
	const insert = "insert into n select 1 from pg_sleep(3)"
	inTransaction := func(sql string) func(context.Context, *pgxdrain.Pool) error {
		return func(ctx context.Context, pool *pgxdrain.Pool) error {
			return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, sql)
				return err
			})
		}
	}
	for name, c := range map[string]struct {
		run     func(ctx context.Context, pool *pgxdrain.Pool) error
		outcome pgxdrain.Outcome
		rows    int
	}{
		"statement": {func(ctx context.Context, pool *pgxdrain.Pool) error {
			_, err := pool.Exec(ctx, insert)
			return err
		}, pgxdrain.OutcomeUnknown, 1},
		"batch": {func(ctx context.Context, pool *pgxdrain.Pool) error {
			b := &pgx.Batch{}
			b.Queue("insert into n values (2)")
			b.Queue(insert)
			return pool.SendBatch(ctx, b).Close()
		}, pgxdrain.OutcomeUnknown, 2},
		"statement in a transaction": {inTransaction(insert), pgxdrain.OutcomeSevered, 0},
		"text with a COMMIT in it":   {inTransaction(insert + "; commit"), pgxdrain.OutcomeUnknown, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.Database(t), forcedParams)))
			dial := config.ConnConfig.DialFunc
			var deaf atomic.Bool
			config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
				if deaf.Load() {
					return nil, errors.New("no route to host")
				}
				return dial(ctx, network, addr)
			}
			pool := newPoolWithConfig(t, config)
			if _, err := pool.Exec(t.Context(), "create table n (n int)"); err != nil {
				t.Fatal(err)
			}
			look := observer(t, pool)
			deaf.Store(true)

			result := make(chan error, 1)
			go func() { result <- c.run(context.Background(), pool) }()
			eventually(t, "it sleeps", func() bool {
				ops := pool.Active()
				return len(ops) == 1 && ops[0].State == pgxdrain.StateActive && strings.Contains(ops[0].Statement, "insert")
			})
			e := wantShutdownError(t, shutdownInTime(t, pool))
			if err := <-result; !errors.Is(err, pgxdrain.ErrShuttingDown) {
				t.Errorf("the caller got %v", err)
			}
			if len(e.Operations) != 1 || e.Operations[0].Outcome != c.outcome {
				t.Errorf("got %v, want %s", e, c.outcome)
			}
			severed(t, look)
			var n int
			if err := look.QueryRow(t.Context(), "select count(*) from n").Scan(&n); err != nil || n != c.rows {
				t.Errorf("%d rows, %v; want %d", n, err, c.rows)
			}
		})
	}
}

func TestHijackedConnectionsSurviveAForcedEndOfOthers(t *testing.T) {
	t.Parallel()
	pool := newPool(t, forcedParams)
	mine := acquire(t, pool).Hijack()
	defer mine.Close(context.Background())
	held := acquire(t, pool)
	result := make(chan error, 1)
	go func() {
		_, err := held.Exec(context.Background(), "select pg_sleep(60)")
		held.Release()
		result <- err
	}()
	inState(t, pool, pgxdrain.StateActive)
	e := wantShutdownError(t, shutdownInTime(t, pool))
	<-result
	if e.Cancelled != 1 || len(e.Operations) != 1 {
		t.Errorf("got %v", e)
	}
	if _, err := mine.Exec(t.Context(), "select 1"); err != nil {
		t.Errorf("the hijacked connection: %v", err)
	}
}

func TestHoldAdmitsItsAcquisitionsWhileDraining(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=1")
	ctx, release, err := pool.Hold(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if op := only(t, pool); op.State != pgxdrain.StateHold || op.PID != 0 {
		t.Errorf("got %+v", op)
	}
	result := startShutdown(t, testContext(t), pool)
	for range 10 {
		if _, err := pool.Exec(ctx, "select 1"); err != nil {
			t.Fatalf("under the hold: %v", err)
		}
	}
	inner, innerRelease, err := pool.Hold(ctx) // a part of it
	if err != nil {
		t.Fatal(err)
	}
	if err := pool.Ping(inner); err != nil {
		t.Error(err)
	}
	if _, _, err := pool.Hold(t.Context()); err != pgxdrain.ErrShuttingDown {
		t.Errorf("a new one: %v", err)
	}
	if err := pool.Ping(t.Context()); err != pgxdrain.ErrShuttingDown {
		t.Errorf("without it: %v", err)
	}
	if r := pool.Report(); r.Active != 1 || r.Waiting != 0 || r.Step != pgxdrain.StepDrain {
		t.Errorf("got %s", brief(r))
	}
	innerRelease()
	release()
	release()
	if err := <-result; err != nil {
		t.Error(err)
	}
	r := pool.Report()
	checkReport(t, r)
	if r.Drained != 1 || r.Refused != 2 {
		t.Errorf("got %s", brief(r))
	}
	if err := pool.Ping(ctx); err != pgxdrain.ErrShuttingDown {
		t.Errorf("after its release: %v", err)
	}
}

func TestHoldIsCancelledAtTheCancelStepWithCauseErrShuttingDown(t *testing.T) {
	t.Parallel()
	pool := newPool(t, forcedParams)
	ctx, release, err := pool.Hold(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		defer release()
		for {
			if _, err := pool.Exec(ctx, "select pg_sleep(0.01)"); err != nil {
				ended <- err
				return
			}
		}
	}()
	e := wantShutdownError(t, shutdownInTime(t, pool))
	<-ended
	if ctx.Err() != context.Canceled || context.Cause(ctx) != pgxdrain.ErrShuttingDown {
		t.Errorf("got %v, cause %v", ctx.Err(), context.Cause(ctx))
	}
	cancelled := 0
	for _, op := range e.Operations {
		if op.State == pgxdrain.StateHold && op.Outcome == pgxdrain.OutcomeCancelled {
			cancelled++
		}
	}
	if cancelled != 1 || e.Active == 0 {
		t.Errorf("got %v", e)
	}
}

// pgconn cancels whatever runs when its context is cancelled. So a COMMIT is ended first.
func TestCommitInFlightUnderAHoldIsNotCancelledEither(t *testing.T) {
	t.Parallel()
	pool := newPool(t, forcedParams)
	look := observer(t, pool)
	slowCommit(t, look, "slow", "5")
	ctx, release, err := pool.Hold(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	commit, result := committing(t, ctx, pool), make(chan error, 1)
	go func() {
		err := <-commit
		release()
		result <- err
	}()
	e := wantShutdownError(t, shutdownInTime(t, pool))
	if err := <-result; !errors.Is(err, pgxdrain.ErrShuttingDown) {
		t.Errorf("the caller got %v", err)
	}
	if e.Unknown != 1 || e.Cancelled != 1 || context.Cause(ctx) != pgxdrain.ErrShuttingDown {
		t.Errorf("got %v, cause %v", e, context.Cause(ctx))
	}
	eventually(t, "the row is there", func() bool {
		var n int
		return look.QueryRow(t.Context(), "select count(*) from slow").Scan(&n) == nil && n == 1
	})
}

// What a unit of work was doing when it was ended has been cancelled or severed, not drained.
func TestStatementUnderAHoldIsCancelledAtTheServer(t *testing.T) {
	t.Parallel()
	pool := newPool(t, forcedParams)
	ctx, release, err := pool.Hold(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	go func() {
		defer release()
		_, err := pool.Exec(ctx, "select pg_sleep(60)")
		result <- err
	}()
	eventually(t, "it sleeps", func() bool { return len(pool.Active()) == 2 })
	e := wantShutdownError(t, shutdownInTime(t, pool))
	if err := <-result; sqlState(err) != "57014" {
		t.Errorf("the caller got %v", err)
	}
	if e.Cancelled != 2 {
		t.Errorf("got %v", e)
	}
}

// A dialer of the user's that hangs keeps its caller in the acquisition until the context of the unit of work ends.
func TestAcquisitionOfAUnitOfWorkThatIsEndedFailsWithErrShuttingDown(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.Database(t), forcedParams)))
	dialing, end := make(chan struct{}), make(chan struct{})
	config.ConnConfig.DialFunc = func(context.Context, string, string) (net.Conn, error) {
		close(dialing)
		<-end
		return nil, errors.New("ended")
	}
	pool := newPoolWithConfig(t, config)
	t.Cleanup(func() { close(end) })
	ctx, release, err := pool.Hold(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	result := make(chan error, 1)
	go func() {
		_, err := pool.Exec(ctx, "select 1")
		result <- err
	}()
	<-dialing
	wantShutdownError(t, shutdownInTime(t, pool))
	if err := <-result; !errors.Is(err, pgxdrain.ErrShuttingDown) {
		t.Errorf("the caller got %v", err)
	}
}

func TestHoldReleasedBeforeAShutdownAdmitsNothing(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	ctx, release, err := pool.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	release()
	if r := pool.Report(); r.Active != 0 || r.Waiting != 0 {
		t.Errorf("got %s", brief(r))
	}
	if err := pool.Shutdown(testContext(t)); err != nil {
		t.Error(err)
	}
	if err := pool.Ping(ctx); err != pgxdrain.ErrShuttingDown {
		t.Errorf("got %v", err)
	}
}

func TestCtxThatIsDoneOnEntryCancelsSeversAndClosesInTheGracesTime(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_drain_timeout=1h&pool_cancel_grace=1s")
	look := observer(t, pool)
	result := make(chan error, 1)
	go func() {
		_, err := pool.Exec(context.Background(), "select pg_sleep(60)")
		result <- err
	}()
	inState(t, pool, pgxdrain.StateActive)
	conn := acquire(t, pool)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	start := time.Now()
	e := wantShutdownError(t, pool.Shutdown(ctx))
	if took := time.Since(start); took > time.Second+late {
		t.Errorf("took %v", took)
	}
	if err := <-result; sqlState(err) != "57014" {
		t.Errorf("the caller got %v", err)
	}
	if e.Cancelled != 1 || e.Leaked != 1 || !errors.Is(e, context.Canceled) {
		t.Errorf("got %v", e)
	}
	severed(t, look)
	conn.Release()
}

func TestShutdownErrorNamesEachStraggler(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_drain_timeout=1s&pool_name=orders")
	tx := must[pgx.Tx](t)(pool.Begin(t.Context()))
	if _, err := tx.Exec(t.Context(), "select 'secret'"); err != nil {
		t.Fatal(err)
	}
	pid := tx.Conn().PgConn().PID()
	err := shutdownInTime(t, pool)
	tx.Rollback(context.Background())
	want := regexp.MustCompile(fmt.Sprintf(
		`^pgxdrain: pool orders: 1 of 1 operations not drained within 1(\.\d+)?s: leaked: idle in transaction, held for 1(\.\d+)?s, pid %d, "select \?"$`, pid))
	if err == nil || !want.MatchString(err.Error()) {
		t.Errorf("got %v\nwant %v", err, want)
	}
}

func TestLeakDetectionLogsTheStackThatAcquiredOnceAndTheReturn(t *testing.T) {
	t.Parallel()
	var log lines
	pool := newPool(t, "pool_leak_threshold=50ms&pool_name=orders&pool_max_conns=3",
		pgxdrain.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	ctx, cancel := pool.DrainContext(t.Context())
	defer cancel()
	listener := must[*pgxpool.Conn](t)(pool.Acquire(ctx))
	defer listener.Release()
	conn := theLeakyFunction(t, pool)
	const suspected = `level=WARN msg="pgxdrain: connection held for longer than the leak threshold" pool=orders threshold=50ms held=`
	eventually(t, "it is logged", func() bool { return strings.Contains(log.String(), suspected) })
	time.Sleep(200 * time.Millisecond) // for a second line, or one of the listener, that must not come
	conn.Release()
	got := log.String()
	if n := strings.Count(got, suspected); n != 1 {
		t.Errorf("logged %d times:\n%s", n, got)
	}
	for _, want := range []string{
		"theLeakyFunction", "shutdown_test.go:", "state=idle",
		`level=INFO msg="pgxdrain: connection held for longer than the leak threshold came back" pool=orders held=`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is not in\n%s", want, got)
		}
	}
	conn = acquire(t, pool) // the next lease of the same connection is another
	conn.Release()
}

//go:noinline
func theLeakyFunction(t *testing.T, pool *pgxdrain.Pool) *pgxpool.Conn { return acquire(t, pool) }
