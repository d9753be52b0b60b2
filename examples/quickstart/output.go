package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/pgxdrain/pgxdrain"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// printReport prints a table of the operations of a shutdown. State and statement are as they were at the gate's closing.
func printReport(out io.Writer, r pgxdrain.Report) {
	fmt.Fprintf(out, "\nWhen the gate closed %d operations were active and %d callers waiting. %d of these got their turn, %d later ones were refused.\n\n",
		r.Active, r.Waiting, r.Admitted, r.Refused)
	table := newTable(out)
	fmt.Fprintln(table, "PID\tSTATE\tHELD\tOUTCOME\tSTATEMENT")
	for _, op := range r.Operations {
		fmt.Fprintf(table, "%d\t%s\t%v\t%s\t%s\n", op.PID, op.State, op.Held.Round(time.Millisecond), op.Outcome, op.Statement)
	}
	_ = table.Flush()
}

// spanTree is an exporter that prints the spans it was given when it is shut down. A service has one that sends them away.
type spanTree struct {
	out io.Writer

	mu    sync.Mutex
	spans []sdktrace.ReadOnlySpan
}

var _ sdktrace.SpanExporter = (*spanTree)(nil)

func (s *spanTree) ExportSpans(_ context.Context, spans []sdktrace.ReadOnlySpan) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spans = append(s.spans, spans...)
	return nil
}

func (s *spanTree) Shutdown(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	below := make(map[trace.SpanID][]sdktrace.ReadOnlySpan)
	for _, span := range s.spans {
		below[span.Parent().SpanID()] = append(below[span.Parent().SpanID()], span)
	}

	fmt.Fprintln(s.out)
	table := newTable(s.out)
	fmt.Fprintln(table, "SPAN\tSTART\tDURATION\tOUTCOME")
	var walk func(parent trace.SpanID, depth int, zero time.Time)
	walk = func(parent trace.SpanID, depth int, zero time.Time) {
		spans := below[parent]
		slices.SortStableFunc(spans, func(a, b sdktrace.ReadOnlySpan) int {
			return cmp.Or(a.StartTime().Compare(b.StartTime()), a.EndTime().Compare(b.EndTime()))
		})
		for _, span := range spans {
			if depth == 0 {
				zero = span.StartTime()
			}
			fmt.Fprintf(table, "%s%s\t+%v\t%v\t%v\n", strings.Repeat("  ", depth), span.Name(),
				span.StartTime().Sub(zero).Round(time.Millisecond),
				span.EndTime().Sub(span.StartTime()).Round(time.Millisecond), outcome(span))
			walk(span.SpanContext().SpanID(), depth+1, zero)
		}
	}
	walk(trace.SpanID{}, 0, time.Time{})
	return table.Flush()
}

// outcome returns that of an operation's span, and of another only whether it failed.
func outcome(span sdktrace.ReadOnlySpan) string {
	for _, a := range span.Attributes() {
		if a.Key == "pgxdrain.outcome" {
			return a.Value.AsString()
		}
	}
	if span.Status().Code == codes.Error {
		return "error"
	}
	return ""
}

func newTable(out io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(out, 0, 0, 2, ' ', 0) }
