package pgxdrain_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/exaring/otelpgx"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// newTracedPool returns a pool whose spans the exporter has as soon as they have ended.
func newTracedPool(t testing.TB, params string, opts ...pgxdrain.Option) (*pgxdrain.Pool, *tracetest.InMemoryExporter, trace.Tracer) {
	t.Helper()
	return newTracedPoolOn(t, withParams(pgtest.Database(t), params), opts...)
}

func newTracedPoolOn(t testing.TB, dsn string, opts ...pgxdrain.Option) (*pgxdrain.Pool, *tracetest.InMemoryExporter, trace.Tracer) {
	t.Helper()
	exporter := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter))
	t.Cleanup(func() { provider.Shutdown(context.Background()) })
	config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(dsn))
	pool := newPoolWithConfig(t, config, append(opts, pgxdrain.WithTracerProvider(provider))...)
	return pool, exporter, provider.Tracer("test")
}

func attributesOf(s tracetest.SpanStub) map[string]any {
	m := map[string]any{}
	for _, kv := range s.Attributes {
		m[string(kv.Key)] = kv.Value.AsInterface()
	}
	return m
}

func TestSpansOfAShutdownHaveEndedWhenItReturns(t *testing.T) {
	t.Parallel()
	pool, exporter, tracer := newTracedPool(t, "pool_max_conns=3&pool_name=orders")
	ctx, request := tracer.Start(testContext(t), "request")
	began := time.Now()
	conn := must[*pgxpool.Conn](t)(pool.Acquire(ctx))
	pid := conn.Conn().PgConn().PID()
	if _, err := conn.Exec(ctx, "select 'secret'"); err != nil {
		t.Fatal(err)
	}
	tx := must[pgx.Tx](t)(pool.Begin(t.Context())) // no span is current
	txPID := tx.Conn().PgConn().PID()

	ctx, stop := tracer.Start(testContext(t), "stop")
	result := startShutdown(t, ctx, pool)
	flip := time.Now()
	conn.Release()
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	returned := time.Now()

	spans := exporter.GetSpans()
	var names []string
	byName := map[string]tracetest.SpanStub{}
	for _, s := range spans {
		names = append(names, s.Name)
		byName[s.Name] = s
	}
	slices.Sort(names)
	if want := []string{"pgxdrain.close", "pgxdrain.query", "pgxdrain.shutdown", "pgxdrain.transaction"}; !slices.Equal(names, want) {
		t.Fatalf("got spans %v, want %v", names, want)
	}

	shutdown := byName["pgxdrain.shutdown"]
	if shutdown.Parent.SpanID() != stop.SpanContext().SpanID() {
		t.Error("pgxdrain.shutdown is not a child of the span in the ctx of Shutdown")
	}
	if scope := shutdown.InstrumentationScope; scope.Name != pgxdrain.ScopeName || scope.SchemaURL != semconv.SchemaURL {
		t.Errorf("the scope is %+v", scope)
	}
	if shutdown.Status.Code != codes.Unset {
		t.Errorf("the status is %v", shutdown.Status)
	}
	got := attributesOf(shutdown)
	config := pool.Config().ConnConfig
	for key, want := range map[string]any{
		"db.client.connection.pool.name": "orders",
		"db.system.name":                 "postgresql",
		"db.namespace":                   config.Database,
		"server.address":                 config.Host,
		"server.port":                    int64(config.Port),
		"pgxdrain.budget":                pool.Report().Budget.Seconds(),
		"pgxdrain.admitted":              int64(0),
		"pgxdrain.cancelled":             int64(0),
		"pgxdrain.severed":               int64(0),
		"pgxdrain.unknown":               int64(0),
		"pgxdrain.active":                int64(2),
		"pgxdrain.waiting":               int64(0),
		"pgxdrain.refused":               int64(0),
		"pgxdrain.drained":               int64(2),
		"pgxdrain.leaked":                int64(0),
	} {
		if got[key] != want {
			t.Errorf("%s = %v, want %v", key, got[key], want)
		}
	}

	for name, want := range map[string]struct {
		state, text, summary string
		linked               bool
		pid                  uint32
	}{
		"pgxdrain.query":       {"idle", "select ?", "SELECT", true, pid},
		"pgxdrain.transaction": {"idle in transaction", "begin", "BEGIN", false, txPID},
	} {
		s := byName[name]
		got := attributesOf(s)
		if s.Parent.SpanID() != shutdown.SpanContext.SpanID() {
			t.Errorf("%s is not a child of pgxdrain.shutdown", name)
		}
		if got["pgxdrain.backend.pid"] != int64(want.pid) || got["db.query.summary"] != want.summary || got["db.namespace"] != config.Database {
			t.Errorf("%s has %v", name, got)
		}
		if got["pgxdrain.state"] != want.state || got["db.query.text"] != want.text || got["pgxdrain.outcome"] != "drained" {
			t.Errorf("%s has %v", name, got)
		}
		if age := got["pgxdrain.age"].(float64); age <= 0 || age > returned.Sub(began).Seconds() {
			t.Errorf("%s: age %v", name, age)
		}
		if !s.StartTime.Equal(pool.Report().RefusedAt) || s.EndTime.Before(flip) || s.EndTime.After(returned) {
			t.Errorf("%s from %v to %v, the gate closed before %v and Shutdown returned at %v", name, s.StartTime, s.EndTime, flip, returned)
		}
		switch {
		case want.linked && (len(s.Links) != 1 || s.Links[0].SpanContext.SpanID() != request.SpanContext().SpanID()):
			t.Errorf("%s is not linked to the span that acquired: %v", name, s.Links)
		case !want.linked && len(s.Links) != 0:
			t.Errorf("%s is linked: %v", name, s.Links)
		}
	}
	closing := byName["pgxdrain.close"]
	if closing.Parent.SpanID() != shutdown.SpanContext.SpanID() || closing.EndTime.After(shutdown.EndTime) {
		t.Errorf("pgxdrain.close is not within pgxdrain.shutdown: %v", closing)
	}
}

func TestSpanOfWhatWasLeftSaysSo(t *testing.T) {
	t.Parallel()
	pool, exporter, _ := newTracedPool(t, "pool_drain_timeout=100ms")
	conn := acquire(t, pool)
	err := pool.Shutdown(context.Background())
	conn.Release()
	for _, s := range exporter.GetSpans() {
		got := attributesOf(s)
		switch s.Name {
		case "pgxdrain.shutdown":
			if s.Status.Code != codes.Error || s.Status.Description != err.Error() || got["error.type"] == nil {
				t.Errorf("%s: status %v, %v", s.Name, s.Status, got)
			}
		case "pgxdrain.query":
			if s.Status.Code != codes.Error || got["error.type"] != "leaked" || got["pgxdrain.outcome"] != "leaked" {
				t.Errorf("%s: status %v, %v", s.Name, s.Status, got)
			}
		}
	}
}

func TestNothingIsTracedInNormalRunning(t *testing.T) {
	t.Parallel()
	pool, exporter, _ := newTracedPool(t, "")
	useEveryHook(t, pool.Pool)
	pool.Active()
	pool.Report()
	if spans := exporter.GetSpans(); len(spans) != 0 {
		t.Errorf("got %d spans", len(spans))
	}
}

func TestDefaultPortAndAbsentNamesAreLeftToTheirConventions(t *testing.T) {
	t.Parallel()
	exporter := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter))
	for dsn, want := range map[string]map[string]any{
		"postgres://me@localhost/":               {"server.address": "localhost", "db.namespace": "me", "server.port": nil},
		"postgres://me@localhost:6432/db":        {"server.address": "localhost", "db.namespace": "db", "server.port": int64(6432)},
		"host=/run/postgresql port=6432 user=me": {"server.address": "/run/postgresql", "db.namespace": "me", "server.port": nil},
	} {
		exporter.Reset()
		config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(dsn))
		pool := newPoolWithConfig(t, config, pgxdrain.WithTracerProvider(provider))
		pool.Close()
		got := attributesOf(withName(t, exporter.GetSpans(), "pgxdrain.shutdown"))
		for key, value := range want {
			if got[key] != value {
				t.Errorf("of %s %s is %v", dsn, key, got[key])
			}
		}
	}
}

func TestSpanAttributesHaveTheTypesOfTheirKeys(t *testing.T) {
	t.Parallel()
	pool, exporter, _ := newTracedPool(t, "")
	b := &pgx.Batch{}
	b.Queue("select 1")
	b.Queue("select pg_sleep(0.2)")
	br := pool.SendBatch(t.Context(), b)
	result := startShutdown(t, testContext(t), pool)
	br.Close()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	want := map[attribute.Key]attribute.Type{
		"pgxdrain.backend.pid":    attribute.INT64,
		"pgxdrain.age":            attribute.FLOAT64,
		"pgxdrain.budget":         attribute.FLOAT64,
		"db.operation.batch.size": attribute.INT64,
	}
	for _, s := range exporter.GetSpans() {
		for _, kv := range s.Attributes {
			if typ, ok := want[kv.Key]; ok && kv.Value.Type() != typ {
				t.Errorf("%s is a %v", kv.Key, kv.Value.Type())
			}
			delete(want, kv.Key)
		}
	}
	if len(want) != 0 {
		t.Errorf("no span has %v", want)
	}
}

// withName finds the only span of that name.
func withName(t testing.TB, spans tracetest.SpanStubs, name string) tracetest.SpanStub {
	t.Helper()
	var found []tracetest.SpanStub
	for _, s := range spans {
		if s.Name == name {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		t.Fatalf("got %d spans %s", len(found), name)
	}
	return found[0]
}

func TestEachStepIsAnEventWithWhatItActedOn(t *testing.T) {
	t.Parallel()
	pool, exporter, _ := newTracedPool(t, "pool_max_conns=2&pool_drain_timeout=3s&pool_cancel_grace=2s&pool_initial_wait=10ms")
	ctx := testContext(t)
	first, second := acquire(t, pool), acquire(t, pool)
	waiting := make(chan error, 1)
	go func() {
		_, err := pool.Exec(ctx, "select 1")
		waiting <- err
	}()
	eventually(t, "a caller waits", func() bool { return pool.Report().Waiting == 1 })
	go first.Exec(ctx, "select pg_sleep(600)") // left to be severed by its caller, who does not release it when it is cancelled
	eventually(t, "a statement runs", func() bool {
		return slices.ContainsFunc(pool.Active(), func(op pgxdrain.Operation) bool { return op.State == pgxdrain.StateActive })
	})
	err := pool.Shutdown(context.Background())
	if err == nil || <-waiting == nil {
		t.Fatal("all has drained")
	}
	first.Release()
	second.Release()

	span := withName(t, exporter.GetSpans(), "pgxdrain.shutdown")
	type event struct {
		name                            string
		remaining, waiting, connections int64
	}
	var got []event
	at := span.StartTime
	for _, e := range span.Events {
		attrs := map[attribute.Key]int64{}
		for _, kv := range e.Attributes {
			attrs[kv.Key] = kv.Value.AsInt64()
		}
		got = append(got, event{e.Name, attrs["pgxdrain.remaining"], attrs["pgxdrain.waiting"], attrs["pgxdrain.connections"]})
		if e.Time.Before(at) || e.Time.After(span.EndTime) {
			t.Errorf("%s at %v, the one before at %v, the end at %v", e.Name, e.Time, at, span.EndTime)
		}
		at = e.Time
		if e.Name == "refuse" && !e.Time.Equal(pool.Report().RefusedAt) {
			t.Errorf("refuse at %v, the gate closed at %v", e.Time, pool.Report().RefusedAt)
		}
	}
	want := []event{{"unready", 2, 1, 2}, {"refuse", 2, 1, 2}, {"cancel", 2, 1, 2}, {"sever", 2, 0, 2}, {"close", 2, 0, 2}}
	if !slices.Equal(got, want) {
		t.Errorf("got events %v, want %v", got, want)
	}
	if got := attributesOf(span)["error.type"]; got != "not_drained" {
		t.Errorf("error.type is %v", got)
	}
}

// Whose provider is shut down right after the pool loses no span, although a BatchSpanProcessor exports in the background.
func TestProviderThatIsShutDownRightAfterThePoolLosesNoSpan(t *testing.T) {
	t.Parallel()
	exporter := &keeping{InMemoryExporter: tracetest.NewInMemoryExporter()}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter, sdktrace.WithBatchTimeout(time.Hour)))
	pool := newPool(t, "pool_drain_timeout=300ms&pool_max_conns=20", pgxdrain.WithTracerProvider(provider))
	for range 20 {
		defer acquire(t, pool).Release()
	}
	err := pool.Shutdown(context.Background())
	if err := provider.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	if n := len(exporter.kept); err == nil || n != 22 {
		t.Errorf("%v: got %d spans, want 20 of operations, and of the shutdown and the close", err, n)
	}
}

// keeping keeps its spans when it is shut down.
type keeping struct {
	*tracetest.InMemoryExporter
	kept tracetest.SpanStubs
}

func (k *keeping) Shutdown(ctx context.Context) error {
	k.kept = k.GetSpans()
	return k.InMemoryExporter.Shutdown(ctx)
}

func TestOfManyOperationsThoseThatDidNotDrainHaveASpanFirstThenTheLongestHeld(t *testing.T) {
	t.Parallel()
	pool, exporter, _ := newTracedPool(t, "pool_max_conns=5&pool_drain_timeout=1s", pgxdrain.WithOperationSpans(3))
	var conns []*pgxpool.Conn
	for range 5 {
		conns = append(conns, acquire(t, pool))
	}
	result := startShutdown(t, context.Background(), pool)
	for _, conn := range conns[:4] {
		conn.Release()
	}
	<-result
	conns[4].Release()

	var pids []int64
	for _, s := range exporter.GetSpans() {
		if s.Name == "pgxdrain.query" {
			pids = append(pids, attributesOf(s)["pgxdrain.backend.pid"].(int64))
		}
	}
	ops := pool.Report().Operations // the longest held first
	want := []int64{int64(ops[4].PID), int64(ops[0].PID), int64(ops[1].PID)}
	if !slices.Equal(pids, want) {
		t.Errorf("got spans of %v, want %v", pids, want)
	}
	if n := attributesOf(withName(t, exporter.GetSpans(), "pgxdrain.shutdown"))["pgxdrain.operations.left_out"]; n != int64(2) {
		t.Errorf("left out: %v", n)
	}
}

func TestOtelpgxInTheSamePool(t *testing.T) {
	t.Parallel()
	exporter := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter))
	reader := sdkmetric.NewManualReader()
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	checkOneScopeEach := func() {
		var rm metricdata.ResourceMetrics
		if err := reader.Collect(t.Context(), &rm); err != nil {
			t.Fatal(err)
		}
		scopes := map[string]string{}
		for _, scope := range rm.ScopeMetrics {
			for _, m := range scope.Metrics {
				if other, ok := scopes[m.Name]; ok {
					t.Errorf("%s is of %s and of %s", m.Name, other, scope.Scope.Name)
				}
				scopes[m.Name] = scope.Scope.Name
			}
		}
		if scopes["pgxpool.acquires"] == "" {
			t.Errorf("otelpgx has no metrics: %v", scopes)
		}
	}
	ctx, request := provider.Tracer("test").Start(testContext(t), "request")
	use := func(newPool func(*pgxpool.Config) (pool *pgxpool.Pool, done func())) []string {
		exporter.Reset()
		config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(pgtest.Database(t)))
		config.ConnConfig.Tracer = otelpgx.NewTracer(otelpgx.WithTracerProvider(provider), otelpgx.WithMeterProvider(meters))
		pool, done := newPool(config)
		if err := otelpgx.RecordStats(pool, otelpgx.WithStatsMeterProvider(meters)); err != nil {
			t.Fatal(err)
		}
		b := &pgx.Batch{}
		b.Queue("create table t (a int)")
		if err := pool.SendBatch(ctx, b).Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := pool.CopyFrom(ctx, pgx.Identifier{"t"}, []string{"a"}, pgx.CopyFromRows([][]any{{1}})); err != nil {
			t.Fatal(err)
		}
		if _, err := pool.Exec(ctx, "select 'a'"); err != nil {
			t.Fatal(err)
		}
		done()
		var names []string
		for _, s := range exporter.GetSpans() {
			if s.EndTime.IsZero() {
				t.Errorf("%s has not ended", s.Name)
			}
			if s.InstrumentationScope.Name != pgxdrain.ScopeName {
				names = append(names, s.Name)
			}
		}
		return names
	}
	want := use(func(config *pgxpool.Config) (*pgxpool.Pool, func()) {
		pool := must[*pgxpool.Pool](t)(pgxpool.NewWithConfig(t.Context(), config))
		return pool, pool.Close
	})
	got := use(func(config *pgxpool.Config) (*pgxpool.Pool, func()) {
		pool := newPoolWithConfig(t, config, pgxdrain.WithTracerProvider(provider), pgxdrain.WithMeterProvider(meters))
		return pool.Pool, func() {
			checkOneScopeEach()
			conn := must[*pgxpool.Conn](t)(pool.Acquire(ctx))
			result := startShutdown(t, testContext(t), pool)
			conn.Release()
			if err := <-result; err != nil {
				t.Error(err)
			}
		}
	})
	if len(want) < 5 || !slices.Equal(got, append(want, "pool.acquire")) {
		t.Errorf("with pgxdrain otelpgx has the spans %q, without it %q", got, want)
	}
	operation := withName(t, exporter.GetSpans(), "pgxdrain.query")
	if len(operation.Links) != 1 || operation.Links[0].SpanContext.SpanID() != request.SpanContext().SpanID() {
		t.Errorf("the operation is linked to %v, not to the span that acquired, %v", operation.Links, request.SpanContext())
	}
	checkOneScopeEach()
}

// hanging is a span processor that never returns.
type hanging struct {
	sdktrace.SpanProcessor
	end chan struct{}
}

func (h hanging) OnStart(context.Context, sdktrace.ReadWriteSpan) {}
func (h hanging) OnEnd(sdktrace.ReadOnlySpan)                     { <-h.end }
func (h hanging) Shutdown(context.Context) error                  { return nil }

func TestTelemetryThatHangsDoesNotHoldUpTheReturn(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"span processor", "metric callback"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			end := make(chan struct{})
			var over sync.WaitGroup
			defer over.Wait()
			defer close(end)
			provider := sdktrace.NewTracerProvider()
			reader := sdkmetric.NewManualReader()
			meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
			var log lines
			pool := newPool(t, "pool_drain_timeout=500ms", pgxdrain.WithTracerProvider(provider), pgxdrain.WithMeterProvider(meters),
				pgxdrain.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
			switch name {
			case "span processor":
				provider.RegisterSpanProcessor(hanging{end: end})
			case "metric callback":
				meter := meters.Meter("test")
				gauge := must[metric.Int64ObservableGauge](t)(meter.Int64ObservableGauge("hanging"))
				entered := make(chan struct{})
				_, err := meter.RegisterCallback(func(context.Context, metric.Observer) error {
					close(entered)
					<-end
					return nil
				}, gauge)
				if err != nil {
					t.Fatal(err)
				}
				over.Go(func() { _ = reader.Collect(context.Background(), &metricdata.ResourceMetrics{}) })
				<-entered
			}
			if err := shutdownInTime(t, pool); err != nil {
				t.Error(err)
			}
			if !strings.Contains(log.String(), "pgxdrain: drained and closed") {
				t.Errorf("the log does not tell of the end: %s", log.String())
			}
			if name == "span processor" && !strings.Contains(collected(t, reader), "pgxdrain.shutdown.duration") {
				t.Error("no metric tells of it")
			}
		})
	}
}

// What is told of a shutdown that did all it can do is in the tables of docs/telemetry.md, under just these names.
func TestEverythingThatIsToldIsDocumented(t *testing.T) {
	t.Parallel()
	doc := string(must[[]byte](t)(os.ReadFile("docs/telemetry.md")))
	var log lines
	reader := sdkmetric.NewManualReader()
	pool, exporter, _ := newTracedPool(t, "pool_max_conns=4&pool_drain_timeout=4s&pool_leak_threshold=1ms", pgxdrain.WithOperationSpans(4),
		pgxdrain.WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))),
		pgxdrain.WithLogger(slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))))
	ctx := testContext(t)
	b := &pgx.Batch{}
	b.Queue("select 1")
	b.Queue("select 2")
	drains, leaks := acquire(t, pool), acquire(t, pool)
	if err := leaks.SendBatch(ctx, b).Close(); err != nil {
		t.Fatal(err)
	}
	tx := must[pgx.Tx](t)(pool.Begin(ctx))
	_, release, err := pool.Hold(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	go pool.Exec(ctx, "select pg_sleep(600)")
	eventually(t, "all is there", func() bool { return len(pool.Active()) == 5 })
	eventually(t, "connections are suspected", func() bool { return strings.Count(log.String(), "leak threshold") >= 2 })
	var open metricdata.ResourceMetrics
	if err := reader.Collect(ctx, &open); err != nil {
		t.Fatal(err)
	}
	result := startShutdown(t, context.Background(), pool)
	drains.Release()
	wantShutdownError(t, <-result)
	leaks.Release()
	tx.Rollback(ctx)

	told := map[string]bool{}
	for _, s := range exporter.GetSpans() {
		told[s.Name] = true
		for _, kv := range s.Attributes {
			told[string(kv.Key)] = true
		}
		for _, e := range s.Events {
			told[e.Name] = true
			for _, kv := range e.Attributes {
				told[string(kv.Key)] = true
			}
		}
	}
	var closed metricdata.ResourceMetrics
	if err := reader.Collect(ctx, &closed); err != nil {
		t.Fatal(err)
	}
	for _, scope := range append(open.ScopeMetrics, closed.ScopeMetrics...) {
		for _, m := range scope.Metrics {
			told[m.Name] = true
		}
	}
	for text := range strings.Lines(log.String()) {
		var line logLine
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatal(err)
		}
		message := strings.TrimPrefix(line["msg"].(string), "pgxdrain: ")
		if !strings.Contains(doc, "| "+message+" |") && !strings.Contains(doc, "| "+message+", ") {
			t.Errorf("the message %q is not documented", message)
		}
		for key := range strings.FieldsSeq(line.keys()) {
			if key != "oldest" { // a group
				told[key] = true
			}
		}
	}
	for name := range told {
		if !strings.Contains(doc, "`"+name+"`") {
			t.Errorf("%s is not documented", name)
		}
	}
	if len(told) < 60 {
		t.Errorf("only %d names: %v", len(told), told)
	}
}
