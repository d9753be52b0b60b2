package pgxdrain

import (
	"context"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	sqllexer "github.com/DataDog/go-sqllexer"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// ScopeName is the instrumentation scope of the pool's telemetry.
const ScopeName = "github.com/pgxdrain/pgxdrain"

// traceShutdown records a shutdown, from its final report, in spans below ctx's.
//
// The spans are made afterwards, with the times that things had, so that telemetry neither runs in a caller's Release nor
// holds up a step, and no span can be left open.
func traceShutdown(ctx context.Context, s *settings, r *Report, err error) {
	tracer := s.tracerProvider.Tracer(ScopeName, trace.WithSchemaURL(semconv.SchemaURL))
	ctx, span := tracer.Start(ctx, "pgxdrain.shutdown", trace.WithTimestamp(r.Start), trace.WithAttributes(
		semconv.DBSystemNamePostgreSQL,
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
	defer span.End(trace.WithTimestamp(r.Start.Add(r.Took)))
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
		span.SetAttributes(semconv.ErrorType(err))
	}

	for _, op := range r.Operations {
		traceOperation(ctx, tracer, r, op)
	}
	_, child := tracer.Start(ctx, "pgxdrain.close", trace.WithTimestamp(r.closeStart))
	child.End(trace.WithTimestamp(r.closeEnd))
}

// traceOperation records an operation from the moment the shutdown began to wait for it to its end.
func traceOperation(ctx context.Context, tracer trace.Tracer, r *Report, op Operation) {
	name := "pgxdrain.query"
	switch {
	case op.State == StateHold:
		name = "pgxdrain.hold"
	case !op.TransactionStart.IsZero():
		name = "pgxdrain.transaction"
	}
	began := r.refusedAt
	if op.AcquiredAt.After(began) {
		began = op.AcquiredAt // it began after the gate had closed
	}
	_, span := tracer.Start(ctx, name,
		trace.WithTimestamp(began),
		trace.WithLinks(linkTo(op.SpanContext)...),
		trace.WithAttributes(operationAttributes(op, began.Sub(op.AcquiredAt))...))
	defer span.End(trace.WithTimestamp(op.AcquiredAt.Add(op.Held)))
	if op.Outcome != OutcomeDrained {
		span.SetStatus(codes.Error, string(op.Outcome))
		span.SetAttributes(semconv.ErrorTypeKey.String(string(op.Outcome)))
	}
}

func operationAttributes(op Operation, age time.Duration) []attribute.KeyValue {
	attrs := []attribute.KeyValue{
		semconv.DBSystemNamePostgreSQL,
		attribute.String("pgxdrain.outcome", string(op.Outcome)),
		attribute.String("pgxdrain.state", string(op.State)),
		attribute.Float64("pgxdrain.age", age.Seconds()),
		attribute.Int64("pgxdrain.backend.pid", int64(op.PID)),
	}
	if op.Statement != "" {
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

// QueryText is what of a statement's text may be seen in operations, reports, logs, errors and spans.
type QueryText int

const (
	// QueryTextSanitized shows the text with every literal replaced by a question mark, without comments and with its white
	// space folded. A text that cannot be taken apart with certainty (backslashes, nested comments, quotes that do not
	// close) is shown as "?".
	QueryTextSanitized QueryText = iota
	// QueryTextRaw shows the text as the caller gave it, with whatever literals and comments are in it.
	QueryTextRaw
	// QueryTextSummary shows the command and the tables.
	QueryTextSummary
	// QueryTextNone shows nothing.
	QueryTextNone
)

// maxQueryText is the length in bytes that a text is cut to. It is the default of track_activity_query_size, to which
// pg_stat_activity cuts.
const maxQueryText = 1024

func (q QueryText) valid() bool { return q >= QueryTextSanitized && q <= QueryTextNone }

// cached returns a function that gives what may be seen of a text and remembers it: many operations run the same few
// statements. It is for one look at the records, by one goroutine.
func (q QueryText) cached() func(sql string) string {
	seen := make(map[string]string)
	return func(sql string) string {
		text, ok := seen[sql]
		if !ok {
			text = q.of(sql)
			seen[sql] = text
		}
		return text
	}
}

func (q QueryText) of(sql string) string {
	switch q {
	case QueryTextRaw:
		return cut(sql)
	case QueryTextSanitized:
		text, _ := sanitize(sql)
		return cut(text)
	case QueryTextSummary:
		_, summary := sanitize(sql)
		return cut(summary)
	default:
		return ""
	}
}

func cut(text string) string {
	const ellipsis = "…"
	if len(text) <= maxQueryText {
		return text
	}
	end := maxQueryText - len(ellipsis)
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + ellipsis
}

var (
	obfuscator = sqllexer.NewObfuscator()
	normalizer = sqllexer.NewNormalizer(
		sqllexer.WithCollectCommands(true),
		sqllexer.WithCollectTables(true),
		sqllexer.WithKeepSQLAlias(true),
		sqllexer.WithKeepIdentifierQuotation(true),
	)
	postgres = sqllexer.WithDBMS(sqllexer.DBMSPostgres)

	// What is left where the lexer has taken a text apart other than PostgreSQL would: it takes a backslash in any string
	// for an escape, ends a nested comment at its first "*/", and lets an unclosed quote be.
	residue = regexp.MustCompile(`['\\]|/\s*\*|\*\s*/|\$(\D|$)`)
)

// sanitize returns the text of a statement without literals and comments, and a summary of it: the command and its tables.
func sanitize(sql string) (text, summary string) {
	if sql == "" {
		return "", ""
	}
	const uncertain = "?"
	if strings.Contains(sql, `\`) {
		return uncertain, uncertain
	}
	text, meta, err := sqllexer.ObfuscateAndNormalize(sql, obfuscator, normalizer, postgres)
	if err != nil || residue.MatchString(text) {
		return uncertain, uncertain
	}
	command, _ := firstWords(text)
	summary = strings.ToUpper(command)
	if command != "copy" && command != "savepoint" { // their names are not tables to the lexer
		summary = strings.Join(append([]string{summary}, meta.Tables...), " ")
	}
	return text, summary
}

// firstWords returns the first two words of a statement, in lower case, past white space and comments.
func firstWords(sql string) (first, second string) {
	lexer := sqllexer.New(sql, postgres)
	words := make([]string, 0, 2)
	for len(words) < 2 {
		switch token := lexer.Scan(); token.Type {
		case sqllexer.SPACE, sqllexer.COMMENT, sqllexer.MULTILINE_COMMENT:
		case sqllexer.EOF:
			words = append(words, "", "")
		default:
			words = append(words, strings.ToLower(token.Value))
		}
	}
	return words[0], words[1]
}
