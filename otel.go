package pgxdrain

import (
	"context"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// ScopeName is the instrumentation scope of the pool's telemetry, which is described in docs/telemetry.md.
const ScopeName = "github.com/pgxdrain/pgxdrain"

// scopeVersion is the version of this module that the program was built with.
var scopeVersion = sync.OnceValue(func() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range append(info.Deps, &info.Main) {
			if m.Path == ScopeName {
				return m.Version
			}
		}
	}
	return ""
})

// databaseAttributes says which database a pool is of, in its spans.
func databaseAttributes(cc *pgx.ConnConfig) []attribute.KeyValue {
	const defaultPort = 5432
	attrs := []attribute.KeyValue{
		semconv.DBSystemNamePostgreSQL,
		semconv.DBNamespace(databaseName(cc)),
		semconv.ServerAddress(cc.Host),
	}
	if cc.Port != defaultPort && !strings.HasPrefix(cc.Host, "/") { // of a Unix socket the port is a part of a file's name
		attrs = append(attrs, semconv.ServerPort(int(cc.Port)))
	}
	return attrs
}

// The values of error.type, besides the outcomes of operations.
const (
	errorNotDrained = "not_drained"
	errorNotClosed  = "not_closed" // but drained
)

func errorType(r *Report) string {
	if len(r.Remaining()) > 0 {
		return errorNotDrained
	}
	return errorNotClosed
}

// traceShutdown records a shutdown, from its final report, in spans below ctx's.
//
// The spans are made afterwards, with the times that things had, so that telemetry neither runs in a caller's Release nor
// holds up a step, and no span can be left open.
func traceShutdown(ctx context.Context, s *settings, r *Report, err error) {
	tracer := s.tracerProvider.Tracer(ScopeName,
		trace.WithInstrumentationVersion(scopeVersion()), trace.WithSchemaURL(semconv.SchemaURL))
	end := r.Start.Add(r.Took)
	ctx, span := tracer.Start(ctx, "pgxdrain.shutdown",
		trace.WithTimestamp(r.Start),
		trace.WithAttributes(s.database...),
		trace.WithAttributes(
			semconv.DBClientConnectionPoolName(r.Pool),
			attribute.Float64("pgxdrain.budget", r.Budget.Seconds()),
			attribute.Int("pgxdrain.active", r.Active),
			attribute.Int("pgxdrain.waiting", r.Waiting),
			attribute.Int64("pgxdrain.refused", r.Refused),
			attribute.Int("pgxdrain.admitted", r.Admitted),
			attribute.Int("pgxdrain.drained", r.Drained),
			attribute.Int("pgxdrain.cancelled", r.Cancelled),
			attribute.Int("pgxdrain.severed", r.Severed),
			attribute.Int("pgxdrain.unknown", r.Unknown),
			attribute.Int("pgxdrain.leaked", r.Leaked),
		))
	defer span.End(trace.WithTimestamp(end))
	if !span.IsRecording() && !span.SpanContext().IsValid() { // there is no SDK, and nobody to put the rest together for
		return
	}
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
		span.SetAttributes(semconv.ErrorTypeKey.String(errorType(r)))
	}
	for _, step := range r.steps {
		span.AddEvent(step.name, trace.WithTimestamp(step.at), trace.WithAttributes(
			attribute.Int("pgxdrain.remaining", step.remaining),
			attribute.Int("pgxdrain.waiting", step.waiting),
			attribute.Int("pgxdrain.connections", step.connections),
		))
	}

	ops := tellingMost(r.Operations)
	if left := len(ops) - s.operationSpans; left > 0 {
		ops = ops[:s.operationSpans]
		span.SetAttributes(attribute.Int("pgxdrain.operations.left_out", left))
	}
	for _, op := range ops {
		traceOperation(ctx, tracer, s, r.RefusedAt, op)
	}
	if !r.closeEnd.IsZero() { // it is if the steps were so late that the report was final before
		_, child := tracer.Start(ctx, "pgxdrain.close", trace.WithTimestamp(r.closeStart))
		child.End(trace.WithTimestamp(r.closeEnd))
	}
}

// tellingMost returns ops with those that did not drain first.
func tellingMost(ops []Operation) []Operation {
	ops = slices.Clone(ops)
	slices.SortStableFunc(ops, func(a, b Operation) int {
		switch drained := a.Outcome == OutcomeDrained; {
		case drained == (b.Outcome == OutcomeDrained):
			return 0
		case drained:
			return 1
		default:
			return -1
		}
	})
	return ops
}

// traceOperation records an operation from the moment the shutdown began to wait for it to its end.
func traceOperation(ctx context.Context, tracer trace.Tracer, s *settings, refusedAt time.Time, op Operation) {
	name := "pgxdrain.query"
	switch {
	case op.State == StateHold:
		name = "pgxdrain.hold"
	case !op.TransactionStart.IsZero():
		name = "pgxdrain.transaction"
	}
	began, end := refusedAt, op.AcquiredAt.Add(op.Held)
	if op.AcquiredAt.After(began) {
		began = op.AcquiredAt // it began after the gate had closed
	}
	if end.Before(began) {
		end = began // it ended at that very moment
	}
	_, span := tracer.Start(ctx, name,
		trace.WithTimestamp(began),
		trace.WithLinks(linkTo(op.SpanContext)...),
		trace.WithAttributes(s.database...),
		trace.WithAttributes(operationAttributes(op, s.queryText, began.Sub(op.AcquiredAt))...))
	defer span.End(trace.WithTimestamp(end))
	if op.Outcome != OutcomeDrained {
		span.SetStatus(codes.Error, string(op.Outcome))
		span.SetAttributes(semconv.ErrorTypeKey.String(string(op.Outcome)))
	}
}

func operationAttributes(op Operation, mode QueryText, age time.Duration) []attribute.KeyValue {
	attrs := []attribute.KeyValue{
		attribute.String("pgxdrain.outcome", string(op.Outcome)),
		attribute.String("pgxdrain.state", string(op.State)),
		attribute.Float64("pgxdrain.age", age.Seconds()),
	}
	if op.State != StateHold { // which has no connection
		attrs = append(attrs, attribute.Int64("pgxdrain.backend.pid", int64(op.PID)))
	}
	if op.summary != "" {
		attrs = append(attrs, semconv.DBQuerySummary(op.summary))
	}
	if op.Statement != "" && mode != QueryTextSummary {
		attrs = append(attrs, semconv.DBQueryText(op.Statement))
	}
	if op.BatchSize > 1 { // the convention wants no batch size for a single statement
		attrs = append(attrs, semconv.DBOperationBatchSize(op.BatchSize))
	}
	return attrs
}

func linkTo(sc trace.SpanContext) []trace.Link {
	if !sc.IsValid() {
		return nil
	}
	return []trace.Link{{SpanContext: sc}}
}
