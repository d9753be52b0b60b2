// Package pgxdrain is a drop-in for pgxpool that can be stopped at any moment, under load, without anybody noticing.
//
// [New] replaces pgxpool.New without another change to a service. The pool it returns is a real *pgxpool.Pool that knows
// every query and transaction in progress. In the service's shutdown hook, [Pool.Shutdown] refuses new work, lets the work
// in progress finish, closes the pool, says what happened, and returns by its deadline whatever happens.
package pgxdrain

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// Defaults of the options. A container is given 30 seconds between SIGTERM and SIGKILL by Kubernetes
// (terminationGracePeriodSeconds); 20 leave 10 for what a service does before and after its pool.
const (
	defaultDrainTimeout = 20 * time.Second
	defaultCancelGrace  = 2 * time.Second
)

// defaultOperationSpans keeps the trace of a shutdown of a large pool readable, and clear of the 2048 spans that a
// BatchSpanProcessor holds.
const defaultOperationSpans = 128

// Pool is a [pgxpool.Pool] that can be drained. Every method that is not described here is pgxpool's own, with its types,
// results and errors; the embedded *pgxpool.Pool may be handed to any library that wants one (River, database/sql through
// pgx/v5/stdlib) and what it does is seen and drained all the same.
//
// Once a shutdown has closed the gate, every acquisition, by whichever way, fails at once with [ErrShuttingDown].
type Pool struct {
	*pgxpool.Pool

	settings settings
	user     *pgxpool.Config // what Config hands out: without our tracer and our keys
	tracer   *tracer

	metrics  *metrics
	draining context.Context // done, with cause ErrShuttingDown, from the moment Shutdown is called
	shutdown *shutdown
}

// New creates a [Pool]. connString is pgxpool's, with these keys besides, each of which wins over the [Option] for the same
// setting, so that an operator can tune a service without a build:
//
//   - pool_drain_timeout: duration greater than 0 (default 20s), see [WithDrainTimeout]
//   - pool_cancel_grace: duration greater than 0 (default 2s), see [WithCancelGrace]
//   - pool_initial_wait: duration 0 or greater (default 0), see [WithInitialWait]
//   - pool_leak_threshold: duration 0 or greater (default 0, meaning off), see [WithLeakDetection]
//   - pool_name: string (default host:port/database), see [WithPoolName]
//
// A string that pgxpool would not parse gives pgxpool's own error; a bad value of one of the keys above gives an error of
// the same type that names the key. Neither shows the password.
func New(ctx context.Context, connString string, opts ...Option) (*Pool, error) {
	config, err := pgxpool.ParseConfig(connString)
	if err != nil {
		return nil, err
	}
	return NewWithConfig(ctx, config, opts...)
}

// NewWithConfig creates a [Pool] from config, which must have been created by [pgxpool.ParseConfig]; it panics, as
// pgxpool.NewWithConfig does, if it was not. config is copied and never changed: changes made to it afterwards have no
// effect. A tracer in config.ConnConfig.Tracer is kept and called before the pool's own. The connection-string keys of [New]
// are read from config as well.
func NewWithConfig(ctx context.Context, config *pgxpool.Config, opts ...Option) (*Pool, error) {
	if config.ConnConfig == nil {
		_, err := pgxpool.NewWithConfig(ctx, config) // panics, with its own message
		return nil, err
	}

	user := config.Copy()
	user.ConnConfig.Tracer = withoutOurs(user.ConnConfig.Tracer)
	settings, err := newSettings(user, opts)
	if err != nil {
		return nil, err
	}

	t := newTracer(user.MaxConns)
	own := user.Copy()
	own.ConnConfig.Tracer = t.after(user.ConnConfig.Tracer)
	own.BeforeConnect = func(ctx context.Context, cc *pgx.ConnConfig) error {
		if user.BeforeConnect != nil {
			if err := user.BeforeConnect(ctx, cc); err != nil {
				return err
			}
		}
		if t.isSevered() { // while the hook ran: pgxpool is closed, and would make context.Canceled of the dialer's error
			return ErrShuttingDown
		}
		cc.Tracer = t.after(withoutOurs(cc.Tracer)) // the hook may have set a tracer of its own for this connection
		cc.DialFunc = t.dialer(cc.DialFunc)
		return nil
	}
	if user.AfterConnect != nil {
		own.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			if err := user.AfterConnect(ctx, conn); err != nil {
				return err
			}
			if t.isSevered() { // otherwise the caller would be told that the pool is closed
				return ErrShuttingDown
			}
			return nil
		}
	}
	own.BeforeClose = func(conn *pgx.Conn) {
		if r := t.record(conn); r != nil && (r.socket == nil || r.socket.closed.Load()) {
			t.forget(r) // any other is forgotten when its socket is closed
		}
		if user.BeforeClose != nil {
			user.BeforeClose(conn)
		}
	}

	pool, err := pgxpool.NewWithConfig(ctx, own)
	if err != nil {
		return nil, err
	}
	// Nobody can acquire before New has returned, so the hooks that read t.pool happen after this write. The hooks that
	// run already, of connections made in the background for MinConns, do not read it.
	t.pool = pool

	p := &Pool{Pool: pool, settings: settings, user: user, tracer: t}
	p.shutdown = newShutdown(p)
	p.metrics = newMetrics(p)
	if settings.leakThreshold > 0 {
		t.leaks = &leakDetector{
			threshold: settings.leakThreshold,
			log:       func() *slog.Logger { return p.settings.log().With("pool", settings.poolName) },
			text:      settings.queryText.of,
		}
		go t.leaks.run(t)
	}
	return p, nil
}

// Close is [Pool.Shutdown] with the configured timeout as its budget (see [WithDrainTimeout]). Unlike pgxpool's Close it
// does not wait for ever for a connection that is never released. What Shutdown would have returned is logged. It is safe to
// call more than once, and after Shutdown.
func (p *Pool) Close() {
	_ = p.Shutdown(context.Background()) // reported by the shutdown's last log line
}

// Active returns the operations in progress: the connections that are acquired, each with its statement and its transaction,
// the longest held first. It is a snapshot; each entry is consistent in itself. Callers that still wait for a connection
// have none; [Report.Waiting] counts them. A connection that was taken over with Hijack is its caller's own and is left out.
func (p *Pool) Active() []Operation { return p.operations(p.tracer.reconcile()) }

// operations describes uses and the units of work of this moment, the longest held first.
//
// The uses are sorted first, because an Operation is large to move about, but described in the order of the set, which is nearer
// to that of the memory.
func (p *Pool) operations(uses []use) []Operation {
	sorted := order(len(uses), func(a, b int32) int {
		ua, ub := &uses[a], &uses[b]
		if ua.at != ub.at {
			return cmp.Compare(ua.at, ub.at)
		}
		return cmp.Compare(ua.record.pid, ub.record.pid)
	})
	place := make([]int32, len(uses)) // among the operations
	for i, u := range sorted {
		place[u] = int32(i)
	}

	holds := p.tracer.unitsOfWork()
	ops := make([]Operation, len(uses), len(uses)+len(holds))
	at := lookNow(p.settings.queryText.cached())
	for i, u := range uses {
		ops[place[i]] = u.record.operation(u.number, at)
	}
	ops = slices.DeleteFunc(ops, func(op Operation) bool { return op.State == "" }) // it has ended since
	if len(holds) == 0 {
		return ops
	}
	for _, h := range holds {
		ops = append(ops, h.operation())
	}
	return longestHeldFirst(ops)
}

// longestHeldFirst returns ops sorted.
func longestHeldFirst(ops []Operation) []Operation {
	sorted := make([]Operation, 0, len(ops))
	for _, i := range order(len(ops), func(a, b int32) int {
		return cmp.Or(ops[a].AcquiredAt.Compare(ops[b].AcquiredAt), cmp.Compare(ops[a].PID, ops[b].PID))
	}) {
		sorted = append(sorted, ops[i])
	}
	return sorted
}

// order returns the places of n things, sorted by what compare says of them: so what is large need not be moved to be sorted.
func order(n int, compare func(a, b int32) int) []int32 {
	places := make([]int32, n)
	for i := range places {
		places[i] = int32(i)
	}
	slices.SortFunc(places, compare)
	return places
}

// Draining returns a channel that is closed when Shutdown or Close is called: before the gate closes, while the initial
// wait runs. Readiness probes and loops that take in work should look at it. See also [Pool.DrainContext].
func (p *Pool) Draining() <-chan struct{} { return p.draining.Done() }

// DrainContext returns a copy of ctx that is cancelled, with the cause [ErrShuttingDown], when Shutdown is called. It is for
// work that would not end by itself: a LISTEN loop, a poller. Work that should be left to finish must not use it. The
// CancelFunc releases what the context holds and should be called as soon as the work is done.
func (p *Pool) DrainContext(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.WithValue(ctx, watchedKey{p.tracer}, true))
	if p.draining.Err() != nil {
		cancel(ErrShuttingDown) // now: AfterFunc would do it a moment later, in a goroutine
	}
	stop := context.AfterFunc(p.draining, func() { cancel(ErrShuttingDown) })
	return ctx, func() {
		stop()
		cancel(context.Canceled)
	}
}

// Hold counts ctx's unit of work, such as a request or a job, as active until release is called, and returns a context for it:
// acquisitions with that context, or one made from it, are admitted while the pool drains. So work that began before a shutdown
// can go on acquiring connections one after the other until it is done, while new work is refused. Once the gate has closed
// Hold itself returns [ErrShuttingDown], unless ctx is of a unit of work already.
//
// When the shutdown comes to its cancel step, the context is cancelled with the cause ErrShuttingDown and nothing more is
// admitted under it. release may be called more than once; if it is never called, the shutdown waits for it until then, and
// reports the unit of work as leaked.
func (p *Pool) Hold(ctx context.Context) (_ context.Context, release func(), _ error) {
	h, ok := p.tracer.hold(ctx)
	if !ok {
		p.tracer.refused.Add(1)
		return nil, nil, ErrShuttingDown
	}
	return h.ctx, h.release, nil
}

// AcquireAllIdle is pgxpool's AcquireAllIdle, counted: the connections it returns are active until they are released. While
// the pool refuses work it returns none.
func (p *Pool) AcquireAllIdle(ctx context.Context) []*pgxpool.Conn {
	if _, ok := p.tracer.gate.enter(); !ok {
		p.tracer.refused.Add(1)
		return nil
	}
	defer p.tracer.gate.leave()
	conns := p.Pool.AcquireAllIdle(ctx)
	for _, c := range conns {
		p.tracer.gate.enterUnder() // our own entry is still in
		p.tracer.acquired(ctx, c.Conn())
	}
	return conns
}

// Config returns a copy of the config that the pool was made from, without what pgxdrain added: it can build another pool,
// of pgxdrain or of pgxpool. The connection-string keys of [New] are taken out of its RuntimeParams, where the server would
// refuse them; [pgxpool.Config.ConnString] still has them.
func (p *Pool) Config() *pgxpool.Config { return p.user.Copy() }

// Option changes a setting of a pool. See [New] for the connection-string keys that do the same.
type Option func(*settings)

// WithDrainTimeout sets the whole budget of a Shutdown whose ctx has no deadline, and of Close: initial wait, drain and close
// together. It must be greater than 0. Defaults to 20 s.
func WithDrainTimeout(d time.Duration) Option {
	return func(s *settings) { s.drainTimeout = d }
}

// WithCancelGrace sets how much of the end of the budget is kept for what comes after the drain. Half of it is for the server
// to cancel statements, half to sever what is left and to close the pool. It must be greater than 0; at most half of the budget
// is kept. Defaults to 2 s.
func WithCancelGrace(d time.Duration) Option {
	return func(s *settings) { s.cancelGrace = d }
}

// WithInitialWait sets how long a shutdown goes on admitting work after [Pool.Draining] was closed, so that load balancers
// can take notice before the first refusal. It is part of the budget and never reaches into the cancel grace. Defaults to 0.
func WithInitialWait(d time.Duration) Option {
	return func(s *settings) { s.initialWait = d }
}

// WithLeakDetection logs each connection that is held for longer than d, with the stack of the caller that acquired it, and
// again when it comes back. It costs an acquisition the walk of its stack, about a microsecond. Connections acquired with a
// context of [Pool.DrainContext] are exempt: listeners and pollers mean to keep them. 0, the default, turns it off and costs
// nothing.
func WithLeakDetection(d time.Duration) Option {
	return func(s *settings) { s.leakThreshold = d }
}

// WithLogger sets the logger of the progress and the result of a shutdown, and of leak detection if that is on; otherwise the
// pool logs nothing in normal running. Defaults to what [slog.Default] returns at the time.
func WithLogger(l *slog.Logger) Option {
	return func(s *settings) { s.logger = l }
}

// WithTracerProvider sets the provider of the spans of a shutdown. Defaults to the global one, [otel.GetTracerProvider].
func WithTracerProvider(tp trace.TracerProvider) Option {
	return func(s *settings) { s.tracerProvider = tp }
}

// WithOperationSpans sets how many of its operations a shutdown makes a span for, n or fewer; those that did not drain go first,
// then those held the longest. It must not be negative. Defaults to 128.
func WithOperationSpans(n int) Option {
	return func(s *settings) { s.operationSpans = n }
}

// WithMeterProvider sets the provider of the pool's metrics. Defaults to the global one, [otel.GetMeterProvider].
func WithMeterProvider(mp metric.MeterProvider) Option {
	return func(s *settings) { s.meterProvider = mp }
}

// WithPoolName sets the name that logs, reports and telemetry give the pool (db.client.connection.pool.name). Defaults to
// host:port/database.
func WithPoolName(name string) Option {
	return func(s *settings) { s.poolName = name }
}

// WithQueryText sets what of a statement's text may be seen in operations, reports, logs, errors and spans. Arguments never
// are. Defaults to [QueryTextSanitized].
func WithQueryText(mode QueryText) Option {
	return func(s *settings) { s.queryText = mode }
}

// settings is what the options and the connection-string keys come to.
type settings struct {
	drainTimeout   time.Duration
	cancelGrace    time.Duration
	initialWait    time.Duration
	leakThreshold  time.Duration // 0: off
	logger         *slog.Logger  // nil: slog.Default at the time
	tracerProvider trace.TracerProvider
	operationSpans int
	meterProvider  metric.MeterProvider
	poolName       string
	queryText      QueryText

	database []attribute.KeyValue // what the pool's spans say of it
}

// newSettings applies the options and then the connection-string keys, which it takes out of config.
func newSettings(config *pgxpool.Config, opts []Option) (settings, error) {
	cc := config.ConnConfig
	s := settings{
		drainTimeout:   defaultDrainTimeout,
		cancelGrace:    defaultCancelGrace,
		tracerProvider: otel.GetTracerProvider(),
		operationSpans: defaultOperationSpans,
		meterProvider:  otel.GetMeterProvider(),
		poolName:       address(cc),
		database:       databaseAttributes(cc),
	}
	for _, opt := range opts {
		opt(&s)
	}

	durations := []struct {
		key, option string
		value       *time.Duration
		least       time.Duration
		rule        string
	}{
		{"pool_drain_timeout", "WithDrainTimeout", &s.drainTimeout, 1, "must be greater than 0"},
		{"pool_cancel_grace", "WithCancelGrace", &s.cancelGrace, 1, "must be greater than 0"},
		{"pool_initial_wait", "WithInitialWait", &s.initialWait, 0, "must not be negative"},
		{"pool_leak_threshold", "WithLeakDetection", &s.leakThreshold, 0, "must not be negative"},
	}
	for _, d := range durations {
		if *d.value < d.least {
			return s, fmt.Errorf("pgxdrain: %s %s, got %v", d.option, d.rule, *d.value)
		}
		text, ok := takeParam(cc, d.key)
		if !ok {
			continue
		}
		v, err := time.ParseDuration(text)
		if err != nil {
			return s, pgconn.NewParseConfigError(address(cc), "cannot parse "+d.key, err)
		}
		if v < d.least {
			return s, pgconn.NewParseConfigError(address(cc), d.key+" "+d.rule, nil)
		}
		*d.value = v
	}
	if name, ok := takeParam(cc, "pool_name"); ok {
		s.poolName = name
	}

	switch {
	case s.poolName == "":
		return s, fmt.Errorf("pgxdrain: the pool name (WithPoolName, pool_name) must not be empty")
	case s.tracerProvider == nil:
		return s, fmt.Errorf("pgxdrain: WithTracerProvider must not be given nil")
	case s.operationSpans < 0:
		return s, fmt.Errorf("pgxdrain: WithOperationSpans must not be negative, got %d", s.operationSpans)
	case s.meterProvider == nil:
		return s, fmt.Errorf("pgxdrain: WithMeterProvider must not be given nil")
	case !s.queryText.valid():
		return s, fmt.Errorf("pgxdrain: WithQueryText: %d is not one of its modes", s.queryText)
	}
	return s, nil
}

// address stands for the connection string in names and errors: what pgconn leaves of one has its password taken out by best
// effort.
func address(cc *pgx.ConnConfig) string {
	return net.JoinHostPort(cc.Host, strconv.Itoa(int(cc.Port))) + "/" + databaseName(cc)
}

// databaseName is what the server takes for the database's name if the configuration has none.
func databaseName(cc *pgx.ConnConfig) string { return cmp.Or(cc.Database, cc.User) }

// takeParam takes a pool key out of the parameters that would be sent to the server, as pgxpool.ParseConfig does.
func takeParam(cc *pgx.ConnConfig, key string) (value string, ok bool) {
	value, ok = cc.RuntimeParams[key]
	delete(cc.RuntimeParams, key)
	return value, ok
}

// log returns the logger to use now.
func (s *settings) log() *slog.Logger {
	return cmp.Or(s.logger, slog.Default())
}
