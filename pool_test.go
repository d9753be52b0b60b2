package pgxdrain_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/goleak"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(pgtest.Main(m),
		// pgxpool's Close does not wait for them (pgx #1641).
		goleak.IgnoreAnyFunction("github.com/jackc/pgx/v5/pgxpool.(*Pool).backgroundHealthCheck"),
		goleak.IgnoreAnyFunction("github.com/jackc/pgx/v5/pgxpool.(*Pool).triggerHealthCheck.func1"),
	)
}

// timeout is how long a test waits for something that should happen at once.
const timeout = 30 * time.Second

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	t.Cleanup(cancel)
	return ctx
}

// newPool returns a pool on an empty database of its own, with connection-string parameters such as "pool_max_conns=2". It is
// closed at the end of t; what is still held then is the test's to release first.
func newPool(t testing.TB, params string, opts ...pgxdrain.Option) *pgxdrain.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(withParams(pgtest.Database(t), params))
	if err != nil {
		t.Fatal(err)
	}
	return newPoolWithConfig(t, config, opts...)
}

func newPoolWithConfig(t testing.TB, config *pgxpool.Config, opts ...pgxdrain.Option) *pgxdrain.Pool {
	t.Helper()
	opts = append([]pgxdrain.Option{pgxdrain.WithLogger(slog.New(slog.NewTextHandler(io.Discard, nil)))}, opts...)
	pool, err := pgxdrain.NewWithConfig(context.Background(), config, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func withParams(dsn, params string) string {
	if params == "" {
		return dsn
	}
	if strings.Contains(dsn, "?") {
		return dsn + "&" + params
	}
	return dsn + "?" + params
}

// eventually waits for something that no event tells of, such as what the server shows of us.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain: %s", timeout, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func acquire(t testing.TB, pool *pgxdrain.Pool) *pgxpool.Conn {
	t.Helper()
	return must[*pgxpool.Conn](t)(pool.Acquire(testContext(t)))
}

func TestBadConnStringGivesPgxpoolsOwnError(t *testing.T) {
	t.Parallel()
	for _, s := range []string{
		"postgres://user:hunter2@localhost:port/db",
		"postgres://user:hunter2@localhost/db?pool_max_conns=none",
		"postgres://user:hunter2@localhost/db?pool_max_conns=0",
		"host=localhost password=hunter2 pool_max_conn_lifetime=long",
		"nonsense",
	} {
		_, want := pgxpool.New(t.Context(), s)
		_, got := pgxdrain.New(t.Context(), s)
		if want == nil || got == nil || got.Error() != want.Error() || reflect.TypeOf(got) != reflect.TypeOf(want) {
			t.Errorf("%s:\n got %v\nwant %v", s, got, want)
		}
	}
}

func TestConfigNotMadeByParseConfigPanicsWithPgxpoolsMessage(t *testing.T) {
	t.Parallel()
	panicOf := func(f func()) (p any) {
		defer func() { p = recover() }()
		f()
		return nil
	}
	for name, config := range map[string]*pgxpool.Config{
		"empty":             {},
		"with a ConnConfig": {ConnConfig: &pgx.ConnConfig{}},
		"nil":               nil,
	} {
		want := panicOf(func() { pgxpool.NewWithConfig(t.Context(), config) })
		got := panicOf(func() { pgxdrain.NewWithConfig(t.Context(), config) })
		if want == nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: got panic %v, want %v", name, got, want)
		}
	}
}

func TestBadSettingIsAnErrorThatNamesItAndHidesThePassword(t *testing.T) {
	t.Parallel()
	const password = `hunter2\'s s@cret`
	for _, c := range []struct {
		key, value, want string
		opt              pgxdrain.Option
	}{
		{key: "pool_drain_timeout", value: "soon", want: "cannot parse pool_drain_timeout"},
		{key: "pool_drain_timeout", value: "0s", want: "pool_drain_timeout must be greater than 0"},
		{key: "pool_drain_timeout", value: "-1s", want: "pool_drain_timeout must be greater than 0"},
		{key: "pool_cancel_grace", value: "2", want: "cannot parse pool_cancel_grace"},
		{key: "pool_cancel_grace", value: "0", want: "pool_cancel_grace must be greater than 0"},
		{key: "pool_initial_wait", value: "-1ms", want: "pool_initial_wait must not be negative"},
		{key: "pool_leak_threshold", value: "-1s", want: "pool_leak_threshold must not be negative"},
		{key: "pool_name", value: "''", want: "pool_name"},
		{opt: pgxdrain.WithDrainTimeout(0), want: "WithDrainTimeout must be greater than 0, got 0s"},
		{opt: pgxdrain.WithCancelGrace(-time.Second), want: "WithCancelGrace must be greater than 0, got -1s"},
		{opt: pgxdrain.WithInitialWait(-1), want: "WithInitialWait must not be negative, got -1ns"},
		{opt: pgxdrain.WithPoolName(""), want: "WithPoolName"},
		{opt: pgxdrain.WithTracerProvider(nil), want: "WithTracerProvider"},
		{opt: pgxdrain.WithQueryText(9), want: "WithQueryText: 9"},
	} {
		connString := "host=localhost dbname=app user=app password='" + password + "'"
		var opts []pgxdrain.Option
		if c.opt != nil {
			opts = append(opts, c.opt)
		} else {
			connString += " " + c.key + "=" + c.value
		}
		pool, err := pgxdrain.New(t.Context(), connString, opts...)
		if pool != nil || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s=%s: got %v, %v; want an error with %q", c.key, c.value, pool, err, c.want)
			continue
		}
		if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "s@cret") {
			t.Errorf("%s=%s: the password is in: %v", c.key, c.value, err)
		}
		var parseError *pgconn.ParseConfigError
		if c.opt == nil && c.key != "pool_name" && !errors.As(err, &parseError) {
			t.Errorf("%s=%s: got a %T, want pgxpool's type", c.key, c.value, err)
		}
	}
}

func TestConnectionStringKeysWinOverOptionsAndAreNotSentToTheServer(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_drain_timeout=7s&pool_cancel_grace=1s&pool_initial_wait=1ms&pool_name=orders",
		pgxdrain.WithDrainTimeout(time.Hour), pgxdrain.WithPoolName("other"))
	if err := pool.Ping(testContext(t)); err != nil {
		t.Fatal(err)
	}
	pool.Close()
	if r := pool.Report(); r.Pool != "orders" || r.Budget != 7*time.Second {
		t.Errorf("got the pool name %q and a budget of %v, want those of the connection string", r.Pool, r.Budget)
	}
}

func TestPoolNameDefaultsToHostPortAndDatabase(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig("host=::1 port=6543 dbname=app user=me"))
	pool := newPoolWithConfig(t, config)
	if got := pool.Report().Pool; got != "[::1]:6543/app" {
		t.Errorf("got %q", got)
	}
}

// recorder is a user's tracer. It notes which hooks it has seen, and what the pool says at that moment.
type recorder struct {
	mu     sync.Mutex
	seen   map[string]int
	onHook func(hook string)
}

func (r *recorder) note(hook string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen == nil {
		r.seen = map[string]int{}
	}
	r.seen[hook]++
	if r.onHook != nil {
		r.onHook(hook)
	}
}

type recorderKey struct{}

func (r *recorder) start(ctx context.Context, hook string) context.Context {
	r.note(hook)
	return context.WithValue(ctx, recorderKey{}, hook)
}

func (r *recorder) end(ctx context.Context, hook string) {
	if ctx.Value(recorderKey{}) == nil {
		hook += " without its context"
	}
	r.note(hook)
}

func (r *recorder) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return r.start(ctx, "query start")
}
func (r *recorder) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryEndData) {
	r.end(ctx, "query end")
}
func (r *recorder) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return r.start(ctx, "batch start")
}
func (r *recorder) TraceBatchQuery(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchQueryData) {
	r.end(ctx, "batch query")
}
func (r *recorder) TraceBatchEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchEndData) {
	r.end(ctx, "batch end")
}
func (r *recorder) TraceCopyFromStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceCopyFromStartData) context.Context {
	return r.start(ctx, "copy start")
}
func (r *recorder) TraceCopyFromEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceCopyFromEndData) {
	r.end(ctx, "copy end")
}
func (r *recorder) TracePrepareStart(ctx context.Context, _ *pgx.Conn, _ pgx.TracePrepareStartData) context.Context {
	return r.start(ctx, "prepare start")
}
func (r *recorder) TracePrepareEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TracePrepareEndData) {
	r.end(ctx, "prepare end")
}
func (r *recorder) TraceConnectStart(ctx context.Context, _ pgx.TraceConnectStartData) context.Context {
	return r.start(ctx, "connect start")
}
func (r *recorder) TraceConnectEnd(ctx context.Context, _ pgx.TraceConnectEndData) {
	r.end(ctx, "connect end")
}
func (r *recorder) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	return r.start(ctx, "acquire start")
}
func (r *recorder) TraceAcquireEnd(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireEndData) {
	r.end(ctx, "acquire end")
}
func (r *recorder) TraceRelease(*pgxpool.Pool, pgxpool.TraceReleaseData) { r.note("release") }

// useEveryHook does something of every kind on pool.
func useEveryHook(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	ctx := testContext(t)
	err := pool.AcquireFunc(ctx, func(c *pgxpool.Conn) error {
		_, err := c.Exec(ctx, "create temp table n (n int)")
		if err != nil {
			return err
		}
		var b pgx.Batch
		b.Queue("select 1")
		if err := c.SendBatch(ctx, &b).Close(); err != nil {
			return err
		}
		_, err = c.CopyFrom(ctx, pgx.Identifier{"n"}, []string{"n"}, pgx.CopyFromRows([][]any{{1}}))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestUsersTracerSeesEveryHookAndOursComesAfterIt(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(pgtest.Database(t)))
	user := &recorder{}
	config.ConnConfig.Tracer = user
	pool := newPoolWithConfig(t, config)
	activeAtRelease := -1
	user.onHook = func(hook string) {
		if hook == "release" {
			activeAtRelease = len(pool.Active())
		}
	}
	useEveryHook(t, pool.Pool)

	want := map[string]int{
		"acquire start": 1, "acquire end": 1, "release": 1, "connect start": 1, "connect end": 1,
		"query start": 1, "query end": 1, "copy start": 1, "copy end": 1,
		"batch start": 1, "batch query": 1, "batch end": 1, "prepare start": 1, "prepare end": 1,
	}
	user.mu.Lock()
	defer user.mu.Unlock()
	if !reflect.DeepEqual(user.seen, want) {
		t.Errorf("saw %v,\n want %v", user.seen, want)
	}
	if activeAtRelease != 1 {
		t.Errorf("%d active in the user's release hook, want 1: ours must come after it", activeAtRelease)
	}
}

func TestTracerSetByABeforeConnectHookIsKeptBesideOurs(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(pgtest.Database(t)))
	user := &recorder{}
	config.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error {
		cc.Tracer = user
		return nil
	}
	pool := newPoolWithConfig(t, config)
	conn := acquire(t, pool)
	defer conn.Release()
	if _, err := conn.Exec(t.Context(), "select 1"); err != nil {
		t.Fatal(err)
	}
	user.mu.Lock()
	defer user.mu.Unlock()
	if user.seen["query end"] != 1 {
		t.Errorf("the hook's tracer saw %v", user.seen)
	}
	if ops := pool.Active(); len(ops) != 1 || ops[0].Statement != "select ?" {
		t.Errorf("the pool saw %+v", ops)
	}
}

func TestUsersConfigIsNeverChanged(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.Database(t), "pool_name=x&pool_drain_timeout=9s")))
	before := config.Copy()
	pool := newPoolWithConfig(t, config)
	if err := pool.Ping(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if config.ConnConfig.Tracer != nil || config.BeforeConnect != nil || config.BeforeClose != nil ||
		!reflect.DeepEqual(config.ConnConfig.RuntimeParams, before.ConnConfig.RuntimeParams) {
		t.Errorf("the config was changed: %+v", config)
	}
	// Nor does changing it afterwards change the pool.
	config.ConnConfig.RuntimeParams["no_such_parameter"] = "x"
	config.ConnConfig.Host = "no.such.host.invalid"
	pool.Reset()
	if err := pool.Ping(testContext(t)); err != nil {
		t.Error(err)
	}
}

// A pool made from another's config must work, be drained by itself, and leave the other's count alone.
func TestConfigBuildsPoolsThatDoNotCountForEachOther(t *testing.T) {
	t.Parallel()
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(pgtest.Database(t), "pool_name=first&pool_initial_wait=1ms")))
	user := &recorder{}
	config.ConnConfig.Tracer = user
	first := newPoolWithConfig(t, config)
	held := acquire(t, first)
	defer held.Release()

	plain := func(c *pgxpool.Config) *pgxpool.Pool {
		p := must[*pgxpool.Pool](t)(pgxpool.NewWithConfig(t.Context(), c))
		t.Cleanup(p.Close)
		return p
	}
	withTracer := func(cc *pgx.ConnConfig) *pgxpool.Config {
		c := first.Config()
		c.ConnConfig.Tracer = cc.Tracer
		return c
	}
	for name, second := range map[string]*pgxpool.Pool{
		"pgxpool of Config":                     plain(first.Config()),
		"pgxpool of the raw pool's Config":      plain(first.Pool.Config()),
		"pgxdrain of Config":                    newPoolWithConfig(t, first.Config()).Pool,
		"pgxdrain of the raw pool's Config":     newPoolWithConfig(t, first.Pool.Config()).Pool,
		"pgxdrain of a connection's ConnConfig": newPoolWithConfig(t, withTracer(held.Conn().Config())).Pool,
	} {
		user.mu.Lock()
		clear(user.seen)
		user.mu.Unlock()
		useEveryHook(t, second)
		conn := must[*pgxpool.Conn](t)(second.Acquire(t.Context()))
		if r := first.Report(); r.Active != 1 || r.Waiting != 0 {
			t.Errorf("%s: the first pool counts %d active, %d waiting; want 1, 0", name, r.Active, r.Waiting)
		}
		conn.Release()
		user.mu.Lock()
		if n := user.seen["acquire end"]; n != 2 {
			t.Errorf("%s: the user's tracer saw %d acquisitions, want 2", name, n)
		}
		user.mu.Unlock()
	}
	held.Release()
	if err := first.Shutdown(testContext(t)); err != nil {
		t.Error(err)
	}
}

func TestAcquireAllIdleIsCountedAndRefused(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=3")
	var conns []*pgxpool.Conn
	for range 3 {
		conns = append(conns, acquire(t, pool))
	}
	for _, c := range conns {
		c.Release()
	}
	conns = pool.AcquireAllIdle(t.Context())
	if len(conns) != 3 || len(pool.Active()) != 3 {
		t.Fatalf("got %d connections, %d active; want 3, 3", len(conns), len(pool.Active()))
	}
	result := make(chan error, 1)
	go func() { result <- pool.Shutdown(testContext(t)) }()
	eventually(t, "the gate closes", func() bool { return pool.Report().Step == pgxdrain.StepDrain })
	if more := pool.AcquireAllIdle(t.Context()); more != nil {
		t.Errorf("got %d connections while draining", len(more))
	}
	for _, c := range conns {
		c.Release()
	}
	if err := <-result; err != nil {
		t.Error(err)
	}
	if r := pool.Report(); r.Active != 3 || r.Drained != 3 || r.Refused != 1 {
		t.Errorf("got %s", brief(r))
	}
}

func TestReleaseWithoutACountedAcquireIsTolerated(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	if err := pool.Ping(testContext(t)); err != nil {
		t.Fatal(err)
	}
	for _, c := range pool.Pool.AcquireAllIdle(t.Context()) { // the raw pool's: no hook sees it
		c.Release()
	}
	conn := acquire(t, pool)
	conn.Release()
	conn.Release()
	if r := pool.Report(); r.Active != 0 || r.Waiting != 0 {
		t.Errorf("got %s", brief(r))
	}
	if err := pool.Shutdown(testContext(t)); err != nil {
		t.Error(err)
	}
}

func TestDrainContextEndsWithCauseErrShuttingDownWhenShutdownIsCalled(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_initial_wait=100ms")
	ctx, cancel := pool.DrainContext(t.Context())
	defer cancel()
	released, release := pool.DrainContext(t.Context())
	release()
	if err := context.Cause(released); err != context.Canceled {
		t.Errorf("released: got cause %v", err)
	}
	select {
	case <-pool.Draining():
		t.Fatal("draining before Shutdown")
	default:
	}
	result := make(chan error, 1)
	go func() { result <- pool.Shutdown(testContext(t)) }()
	<-ctx.Done()
	<-pool.Draining()
	if err := pool.Ping(t.Context()); err != nil {
		t.Errorf("refused during the initial wait: %v", err)
	}
	if ctx.Err() != context.Canceled || !errors.Is(context.Cause(ctx), pgxdrain.ErrShuttingDown) {
		t.Errorf("got %v, cause %v", ctx.Err(), context.Cause(ctx))
	}
	late, cancel := pool.DrainContext(t.Context())
	defer cancel()
	if !errors.Is(context.Cause(late), pgxdrain.ErrShuttingDown) {
		t.Error("a context made while draining is not done")
	}
	if err := <-result; err != nil {
		t.Error(err)
	}
}

// pgxpool is measured beside us in the same way, so that what pgx allocates counts for both.
func TestNothingOnTheHotPathAllocates(t *testing.T) {
	dsn := pgtest.Database(t)
	ctx := t.Context()
	plain := must[*pgxpool.Pool](t)(pgxpool.New(ctx, dsn))
	defer plain.Close()
	ours := must[*pgxdrain.Pool](t)(pgxdrain.New(ctx, dsn, pgxdrain.WithLogger(slog.New(slog.DiscardHandler))))
	defer ours.Close()
	if _, err := plain.Exec(ctx, "create table n (n int)"); err != nil {
		t.Fatal(err)
	}
	check := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	for _, c := range []struct {
		name string
		do   func(*pgxpool.Pool)
	}{
		{"acquire and release", func(p *pgxpool.Pool) {
			c, err := p.Acquire(ctx)
			check(err)
			c.Release()
		}},
		{"Exec", func(p *pgxpool.Pool) {
			_, err := p.Exec(ctx, "select 1")
			check(err)
		}},
		{"QueryRow", func(p *pgxpool.Pool) {
			var n int
			check(p.QueryRow(ctx, "select $1::int", 1).Scan(&n))
		}},
		{"transaction", func(p *pgxpool.Pool) {
			check(pgx.BeginFunc(ctx, p, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, "select 1")
				return err
			}))
		}},
		{"batch", func(p *pgxpool.Pool) {
			var b pgx.Batch
			b.Queue("select 1")
			b.Queue("select 2")
			check(p.SendBatch(ctx, &b).Close())
		}},
		{"copy", func(p *pgxpool.Pool) {
			_, err := p.CopyFrom(ctx, pgx.Identifier{"n"}, []string{"n"}, pgx.CopyFromRows([][]any{{1}}))
			check(err)
		}},
	} {
		// The least of many: a collection empties what is kept in sync.Pools, and the race detector drops from them at random.
		least := func(p *pgxpool.Pool) float64 {
			c.do(p) // connects, prepares
			n := math.Inf(1)
			for range 200 {
				n = min(n, testing.AllocsPerRun(1, func() { c.do(p) }))
			}
			return n
		}
		if want, got := least(plain), least(ours.Pool); got > want {
			t.Errorf("%s: %v allocations, pgxpool has %v", c.name, got, want)
		}
	}
}
