package pgxdrain_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
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
	conn := must[*pgxpool.Conn](t)(pool.Acquire(ctx))
	if _, err := conn.Exec(ctx, "select 'secret'"); err != nil {
		t.Fatal(err)
	}
	tx := must[pgx.Tx](t)(pool.Begin(t.Context())) // no span is current
	heldFor := time.Now()

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
	if shutdown.InstrumentationScope.Name != pgxdrain.ScopeName {
		t.Errorf("the scope is %q", shutdown.InstrumentationScope.Name)
	}
	if shutdown.Status.Code != codes.Unset {
		t.Errorf("the status is %v", shutdown.Status)
	}
	got := attributesOf(shutdown)
	for key, want := range map[string]any{
		"db.client.connection.pool.name": "orders",
		"db.system.name":                 "postgresql",
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
		state, text string
		linked      bool
	}{
		"pgxdrain.query":       {"idle", "select ?", true},
		"pgxdrain.transaction": {"idle in transaction", "begin", false},
	} {
		s := byName[name]
		got := attributesOf(s)
		if s.Parent.SpanID() != shutdown.SpanContext.SpanID() {
			t.Errorf("%s is not a child of pgxdrain.shutdown", name)
		}
		if got["pgxdrain.state"] != want.state || got["db.query.text"] != want.text || got["pgxdrain.outcome"] != "drained" {
			t.Errorf("%s has %v", name, got)
		}
		if age := got["pgxdrain.age"].(float64); age < 0 || age > flip.Sub(heldFor).Seconds()+1 {
			t.Errorf("%s: age %v", name, age)
		}
		if s.StartTime.After(flip) || s.EndTime.Before(flip) || s.EndTime.After(returned) {
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
