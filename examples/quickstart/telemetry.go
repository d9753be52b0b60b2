package main

import (
	"context"
	"errors"
	"io"
	"os"

	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// telemetry is where spans and metrics go.
type telemetry struct {
	traces *sdktrace.TracerProvider
	meters *sdkmetric.MeterProvider
}

// newTelemetry prints the spans on out, and sends spans and metrics to an OpenTelemetry collector as well if the environment names
// one (OTEL_EXPORTER_OTLP_ENDPOINT and its kind).
func newTelemetry(ctx context.Context, out io.Writer) (*telemetry, error) {
	traces := []sdktrace.TracerProviderOption{sdktrace.WithBatcher(&spanTree{out: out})}
	var meters []sdkmetric.Option
	if os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" {
		spans, err := otlptracegrpc.New(ctx)
		if err != nil {
			return nil, err
		}
		metrics, err := otlpmetricgrpc.New(ctx)
		if err != nil {
			return nil, errors.Join(err, spans.Shutdown(ctx))
		}
		traces = append(traces, sdktrace.WithBatcher(spans))
		meters = append(meters, sdkmetric.WithReader(sdkmetric.NewPeriodicReader(metrics)))
	}
	return &telemetry{sdktrace.NewTracerProvider(traces...), sdkmetric.NewMeterProvider(meters...)}, nil
}

// shutdown sends what has not been sent yet.
func (t *telemetry) shutdown(ctx context.Context) error {
	return errors.Join(t.traces.Shutdown(ctx), t.meters.Shutdown(ctx))
}
