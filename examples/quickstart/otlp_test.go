//go:build unix

package main

import (
	"context"
	"flag"
	"net"
	"os"
	"slices"
	"sync"
	"testing"

	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/examples/internal/database"
	"github.com/pgxdrain/pgxdrain/examples/internal/process"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

var picturePath = flag.String("picture", "", "write a picture of the trace to this file")

func TestQuickstartExportsTheTraceOfAProcessThatHasExited(t *testing.T) {
	t.Parallel()
	collector := startCollector(t)
	program := process.Build(t)
	dsn := database.WithKey(pgtest.Database(t), "pool_drain_timeout=6s") // two stay on beyond the drain, which ends after 4 s
	p := process.Start(t, program, []string{"DATABASE_URL=" + dsn, "OTEL_EXPORTER_OTLP_ENDPOINT=http://" + collector.address}, "-work=10s")
	p.Exits(1)

	collector.mu.Lock()
	defer collector.mu.Unlock()
	var root *tracepb.Span
	outcomes := map[string]int64{}
	for _, span := range collector.spans {
		switch span.Name {
		case "pgxdrain.shutdown":
			root = span
		case "pgxdrain.close":
		default:
			outcomes[attribute(span, "pgxdrain.outcome").GetStringValue()]++
		}
		if span.EndTimeUnixNano < span.StartTimeUnixNano || span.EndTimeUnixNano == 0 {
			t.Errorf("%s has not ended", span.Name)
		}
	}
	if root == nil {
		t.Fatalf("no pgxdrain.shutdown among %d spans:\n%s", len(collector.spans), p.Stderr.String())
	}
	for _, span := range collector.spans {
		if span != root && !slices.Equal(span.ParentSpanId, root.SpanId) {
			t.Errorf("%s is not below the shutdown", span.Name)
		}
	}
	for _, outcome := range []string{"drained", "cancelled", "severed", "unknown", "leaked"} {
		if want := attribute(root, "pgxdrain."+outcome).GetIntValue(); outcomes[outcome] != want {
			t.Errorf("%d operations %s, the shutdown has %d", outcomes[outcome], outcome, want)
		}
	}
	if outcomes["drained"] == int64(len(collector.spans)-2) || root.Status.GetCode() != tracepb.Status_STATUS_CODE_ERROR {
		t.Errorf("all has drained, the status is %v", root.Status)
	}
	var steps []string
	for _, event := range root.Events {
		steps = append(steps, event.Name)
	}
	if want := []string{"unready", "refuse", "cancel"}; len(steps) < 4 || !slices.Equal(steps[:3], want) || steps[len(steps)-1] != "close" {
		t.Errorf("the events are %q", steps)
	}
	for _, name := range []string{"pgxdrain.operations", "pgxdrain.refused", "pgxdrain.shutdown.duration"} {
		if !slices.Contains(collector.metrics, name) {
			t.Errorf("no metric %s among %q", name, collector.metrics)
		}
	}

	if *picturePath != "" {
		if err := os.WriteFile(*picturePath, picture(root, collector.spans), 0o644); err != nil {
			t.Error(err)
		}
	}
}

func attribute(span *tracepb.Span, key string) *commonpb.AnyValue {
	for _, kv := range span.Attributes {
		if kv.Key == key {
			return kv.Value
		}
	}
	return nil
}

// collector is an OTLP receiver that keeps what is of pgxdrain.
type collector struct {
	collectortrace.UnimplementedTraceServiceServer
	address string

	mu      sync.Mutex
	spans   []*tracepb.Span
	metrics []string
}

func startCollector(t *testing.T) *collector {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &collector{address: l.Addr().String()}
	server := grpc.NewServer()
	collectortrace.RegisterTraceServiceServer(server, c)
	collectormetrics.RegisterMetricsServiceServer(server, metricsCollector{collector: c})
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		server.Stop()
		serving.Wait()
	})
	return c
}

func (c *collector) Export(_ context.Context, request *collectortrace.ExportTraceServiceRequest) (*collectortrace.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, resource := range request.ResourceSpans {
		for _, scope := range resource.ScopeSpans {
			if scope.Scope.Name == pgxdrain.ScopeName {
				c.spans = append(c.spans, scope.Spans...)
			}
		}
	}
	return &collectortrace.ExportTraceServiceResponse{}, nil
}

// metricsCollector is apart because its method has the same name.
type metricsCollector struct {
	collectormetrics.UnimplementedMetricsServiceServer
	*collector
}

func (c metricsCollector) Export(_ context.Context, request *collectormetrics.ExportMetricsServiceRequest) (*collectormetrics.ExportMetricsServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, resource := range request.ResourceMetrics {
		for _, scope := range resource.ScopeMetrics {
			if scope.Scope.Name != pgxdrain.ScopeName {
				continue
			}
			for _, m := range scope.Metrics {
				c.collector.metrics = append(c.collector.metrics, m.Name)
			}
		}
	}
	return &collectormetrics.ExportMetricsServiceResponse{}, nil
}
