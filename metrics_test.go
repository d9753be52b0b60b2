package pgxdrain_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/pgxdrain/pgxdrain"
)

// newMeteredPool returns a pool named orders, and what reads its metrics.
func newMeteredPool(t testing.TB, params string) (*pgxdrain.Pool, *sdkmetric.ManualReader) {
	t.Helper()
	reader := sdkmetric.NewManualReader()
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	t.Cleanup(func() { provider.Shutdown(context.Background()) })
	return newPool(t, "pool_name=orders&"+params, pgxdrain.WithMeterProvider(provider)), reader
}

// read returns what there is to read, as "name{attribute=value} unit" without the pool's name, which all have.
func read(t testing.TB, reader *sdkmetric.ManualReader) map[string]float64 {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, scope := range rm.ScopeMetrics {
		if scope.Scope.Name != pgxdrain.ScopeName || scope.Scope.SchemaURL == "" {
			t.Errorf("the scope is %+v", scope.Scope)
		}
		for _, m := range scope.Metrics {
			note := func(attrs attribute.Set, value float64) {
				text := ""
				for _, kv := range attrs.ToSlice() {
					if kv.Key != "db.client.connection.pool.name" {
						text += fmt.Sprintf("%s=%s", kv.Key, kv.Value.String())
					} else if kv.Value.AsString() != "orders" {
						t.Errorf("%s is of the pool %s", m.Name, kv.Value.AsString())
					}
				}
				if attrs.Len() == 0 {
					t.Errorf("%s does not name the pool", m.Name)
				}
				values[fmt.Sprintf("%s{%s} %s", m.Name, text, m.Unit)] = value
			}
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range data.DataPoints {
					note(p.Attributes, float64(p.Value))
				}
			case metricdata.Gauge[float64]:
				for _, p := range data.DataPoints {
					note(p.Attributes, p.Value)
				}
			case metricdata.Histogram[float64]:
				for _, p := range data.DataPoints {
					note(p.Attributes, float64(p.Count))
				}
			default:
				t.Errorf("%s is a %T", m.Name, data)
			}
		}
	}
	return values
}

func TestMetricsOfAnOpenPool(t *testing.T) {
	t.Parallel()
	pool, reader := newMeteredPool(t, "pool_max_conns=2&pool_min_idle_conns=1")
	conn := acquire(t, pool)
	eventually(t, "the other connection is idle", func() bool { return pool.Stat().IdleConns() == 1 })
	want := map[string]float64{
		"db.client.connection.count{db.client.connection.state=used} {connection}": 1,
		"db.client.connection.count{db.client.connection.state=idle} {connection}": 1,
		"db.client.connection.max{} {connection}":                                  2,
		"db.client.connection.idle.min{} {connection}":                             1,
		"db.client.connection.pending_requests{} {request}":                        0,
	}
	const held = "pgxdrain.operation.longest_held{} s"
	check := func() {
		t.Helper()
		got := read(t, reader)
		if s, ok := got[held]; !ok || s <= 0 || s > timeout.Seconds() {
			t.Errorf("%s is %v", held, s)
		}
		delete(got, held)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	check()

	second := acquire(t, pool)
	third := make(chan *pgxpool.Conn)
	go func() {
		c, err := pool.Acquire(testContext(t))
		if err != nil {
			t.Error(err)
		}
		third <- c
	}()
	eventually(t, "a caller waits", func() bool { return pool.Report().Waiting == 1 })
	want["db.client.connection.count{db.client.connection.state=used} {connection}"] = 2
	want["db.client.connection.count{db.client.connection.state=idle} {connection}"] = 0
	want["db.client.connection.pending_requests{} {request}"] = 1
	check()

	conn.Release()
	second.Release()
	(<-third).Release()
	eventually(t, "nothing is acquired", func() bool { return pool.Stat().AcquiredConns() == 0 })
	if s := read(t, reader)[held]; s != 0 {
		t.Errorf("%s is %v, and nothing is held", held, s)
	}
}

func TestMetricsOfAShutdownAreThereWhenItReturnsAndThePoolIsNotObservedAnyMore(t *testing.T) {
	t.Parallel()
	pool, reader := newMeteredPool(t, "pool_drain_timeout=1s&pool_max_conns=3")
	leaked, drained := acquire(t, pool), acquire(t, pool)
	result := startShutdown(t, context.Background(), pool)
	if err := pool.Ping(t.Context()); err == nil {
		t.Fatal("not refused")
	}
	drained.Release()
	if err := <-result; err == nil {
		t.Fatal("all has drained")
	}
	leaked.Release()
	want := map[string]float64{
		"pgxdrain.operations{pgxdrain.outcome=drained} {operation}":   1,
		"pgxdrain.operations{pgxdrain.outcome=cancelled} {operation}": 0,
		"pgxdrain.operations{pgxdrain.outcome=severed} {operation}":   0,
		"pgxdrain.operations{pgxdrain.outcome=unknown} {operation}":   0,
		"pgxdrain.operations{pgxdrain.outcome=leaked} {operation}":    1,
		"pgxdrain.refused{} {request}":                                1,
		"pgxdrain.shutdown.duration{error.type=not_drained} s":        1,
	}
	if got := read(t, reader); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// A view may drop any of the instruments without losing the others.
func TestMetricsThatAreDroppedTakeNoOtherWithThem(t *testing.T) {
	t.Parallel()
	for _, dropped := range []string{"pgxdrain.shutdown.duration", "pgxdrain.operations", "pgxdrain.refused"} {
		reader := sdkmetric.NewManualReader()
		provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithView(
			sdkmetric.NewView(sdkmetric.Instrument{Name: dropped}, sdkmetric.Stream{Aggregation: sdkmetric.AggregationDrop{}})))
		pool := newPool(t, "pool_name=orders", pgxdrain.WithMeterProvider(provider))
		if err := pool.Shutdown(testContext(t)); err != nil {
			t.Fatal(err)
		}
		seen := make(map[string]bool)
		for key := range read(t, reader) {
			name, _, _ := strings.Cut(key, "{")
			seen[name] = true
		}
		for _, name := range []string{"pgxdrain.shutdown.duration", "pgxdrain.operations", "pgxdrain.refused"} {
			if seen[name] == (name == dropped) {
				t.Errorf("%s dropped; %s seen: %v", dropped, name, seen[name])
			}
		}
	}
}
