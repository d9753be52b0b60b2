package pgxdrain

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/semconv/v1.43.0/dbconv"
)

// metrics are a pool's instruments. What is there to be looked at while the pool is open is looked at when a reader collects;
// nothing is counted where a connection is acquired or used. What a shutdown did is recorded once, from its final report.
type metrics struct {
	pool  *Pool
	attrs metric.MeasurementOption // the pool's name

	connections dbconv.ClientConnectionCountObservable
	used, idle  metric.MeasurementOption
	max         dbconv.ClientConnectionMaxObservable
	idleMin     dbconv.ClientConnectionIdleMinObservable
	pending     dbconv.ClientConnectionPendingRequestsObservable
	longestHeld metric.Float64ObservableGauge
	observing   metric.Registration

	operations metric.Int64Counter
	refused    metric.Int64Counter
	duration   metric.Float64Histogram
}

// newMetrics makes the instruments and begins to observe p. What goes wrong is handed to OpenTelemetry's error handler: a pool
// is not to fail for want of a metric.
func newMetrics(p *Pool) *metrics {
	meter := p.settings.meterProvider.Meter(ScopeName,
		metric.WithInstrumentationVersion(scopeVersion()), metric.WithSchemaURL(semconv.SchemaURL))
	name := semconv.DBClientConnectionPoolName(p.settings.poolName)
	m := &metrics{pool: p, attrs: metric.WithAttributeSet(attribute.NewSet(name))}

	m.connections = made(dbconv.NewClientConnectionCountObservable(meter))
	state := func(s dbconv.ClientConnectionStateAttr) metric.MeasurementOption {
		return metric.WithAttributeSet(attribute.NewSet(name, m.connections.AttrClientConnectionState(s)))
	}
	m.used, m.idle = state(dbconv.ClientConnectionStateUsed), state(dbconv.ClientConnectionStateIdle)
	m.max = made(dbconv.NewClientConnectionMaxObservable(meter))
	m.idleMin = made(dbconv.NewClientConnectionIdleMinObservable(meter))
	m.pending = made(dbconv.NewClientConnectionPendingRequestsObservable(meter))
	m.longestHeld = made(meter.Float64ObservableGauge("pgxdrain.operation.longest_held", metric.WithUnit("s"),
		metric.WithDescription("How long the operation that is held the longest has been held.")))

	m.operations = made(meter.Int64Counter("pgxdrain.operations", metric.WithUnit("{operation}"),
		metric.WithDescription("The number of operations that a shutdown found in progress, by how they ended.")))
	m.refused = made(meter.Int64Counter("pgxdrain.refused", metric.WithUnit("{request}"),
		metric.WithDescription("The number of acquisitions that were refused before a shutdown had ended.")))
	m.duration = made(meter.Float64Histogram("pgxdrain.shutdown.duration", metric.WithUnit("s"),
		metric.WithDescription("How long a shutdown took."),
		metric.WithExplicitBucketBoundaries(0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 15, 20, 30, 60)))

	m.observing = made(meter.RegisterCallback(m.observe,
		m.connections.Inst(), m.max.Inst(), m.idleMin.Inst(), m.pending.Inst(), m.longestHeld))
	return m
}

func made[T any](instrument T, err error) T {
	if err != nil {
		otel.Handle(err)
	}
	return instrument
}

// observe is called when a reader collects. It holds up no acquisition for longer than it takes to look at a few connections.
func (m *metrics) observe(_ context.Context, o metric.Observer) error {
	used, idle := connectionCounts(m.pool.Pool)
	o.ObserveInt64(m.connections.Inst(), used, m.used)
	o.ObserveInt64(m.connections.Inst(), idle, m.idle)
	o.ObserveInt64(m.max.Inst(), int64(m.pool.user.MaxConns), m.attrs)
	o.ObserveInt64(m.idleMin.Inst(), int64(m.pool.user.MinIdleConns), m.attrs)
	t := m.pool.tracer
	uses := t.reconcile()
	o.ObserveInt64(m.pending.Inst(), int64(t.waiting()), m.attrs)
	o.ObserveFloat64(m.longestHeld, t.longestHeld(uses).Seconds(), m.attrs)
	return nil
}

// connectionCounts counts as pgxpool's Stat does, which holds up acquisitions for as long as it takes to count all connections. In
// exchange, a connection that comes, goes or moves in pgxpool's list meanwhile may be counted twice or not at all.
func connectionCounts(pool *pgxpool.Pool) (used, idle int64) {
	counted := eachConnection(pool, aFew, func(status byte, _ *pgx.Conn) {
		switch status {
		case statusAcquired:
			used++
		case statusIdle:
			idle++
		}
	})
	if !counted {
		stat := pool.Stat()
		return int64(stat.AcquiredConns()), int64(stat.IdleConns())
	}
	return used, idle
}

// longestHeld is how long the longest held of uses and of the units of work has been held, 0 if there is none.
func (t *tracer) longestHeld(uses []use) time.Duration {
	at := now()
	oldest := at
	for _, u := range uses {
		oldest = min(oldest, u.at)
	}
	for _, h := range t.unitsOfWork() {
		oldest = min(oldest, h.at)
	}
	return at - oldest
}

// recordShutdown records a shutdown from its final report, and observes the pool no more. It may hang as long as a reader's
// collection does.
func (m *metrics) recordShutdown(ctx context.Context, r *Report, err error) {
	if m.operations.Enabled(ctx) || m.refused.Enabled(ctx) || m.duration.Enabled(ctx) { // else nobody wants what record puts together
		m.record(ctx, r, err)
	}
	if m.observing != nil {
		if err := m.observing.Unregister(); err != nil {
			otel.Handle(err)
		}
	}
}

func (m *metrics) record(ctx context.Context, r *Report, err error) {
	name := semconv.DBClientConnectionPoolName(r.Pool)
	for _, by := range []struct {
		outcome Outcome
		n       int
	}{
		{OutcomeDrained, r.Drained}, {OutcomeCancelled, r.Cancelled}, {OutcomeSevered, r.Severed},
		{OutcomeUnknown, r.Unknown}, {OutcomeLeaked, r.Leaked},
	} {
		m.operations.Add(ctx, int64(by.n), metric.WithAttributes(name, attribute.String("pgxdrain.outcome", string(by.outcome))))
	}
	m.refused.Add(ctx, r.Refused, m.attrs)
	took := []attribute.KeyValue{name}
	if err != nil {
		took = append(took, semconv.ErrorTypeKey.String(errorType(r)))
	}
	m.duration.Record(ctx, r.Took.Seconds(), metric.WithAttributes(took...))
}
