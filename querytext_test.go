package pgxdrain_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"pgregory.net/rapid"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

func TestQueryTextShowsWhatItsModeAllows(t *testing.T) {
	t.Parallel()
	const s = "hunter2"
	long := "select " + strings.Repeat("a_column, ", 200) + "ü"
	for _, c := range []struct{ sql, sanitized, summary string }{
		{"select 1", "select ?", "SELECT"},
		{"select * from users where name = '" + s + "' -- " + s, "select * from users where name = ?", "SELECT users"},
		{"/* " + s + " */ insert into t (a) values ($1)", "insert into t ( a ) values ( $1 )", "INSERT t"},
		{"select $$" + s + "$$, $x$ " + s + " $x$", "select ?, ?", "SELECT"},
		{"alter role me password '" + s + "'", "alter role me password ?", "ALTER"},
		{`select E'it\'s', '` + s + "'", "select E ?, ?", "SELECT"},
		{"/* /* nested */ " + s + " */ select 1", "select ?", "SELECT"},
		{"select 1 -- \r, '\n" + s + "'", "select ?, ?", "SELECT"}, // a carriage return ends a comment
		// What is in it depends on standard_conforming_strings, or cannot be told.
		{`select 'C:\', '` + s + `', 'D:\'`, "?", "?"},
		{"select '" + s, "?", "?"},
		{"select $x$" + s, "?", "?"},
		{"select 1 /* " + s, "?", "?"},
	} {
		for mode, want := range map[pgxdrain.QueryText]string{
			pgxdrain.QueryTextSanitized: c.sanitized,
			pgxdrain.QueryTextSummary:   c.summary,
			pgxdrain.QueryTextRaw:       c.sql,
			pgxdrain.QueryTextNone:      "",
		} {
			if got := pgxdrain.VisibleText(mode, c.sql); got != want {
				t.Errorf("mode %d of %q: got %q, want %q", mode, c.sql, got, want)
			}
		}
	}
	for _, mode := range []pgxdrain.QueryText{pgxdrain.QueryTextSanitized, pgxdrain.QueryTextRaw} {
		if got := pgxdrain.VisibleText(mode, long); len(got) > 1024 || !strings.HasSuffix(got, "…") || !strings.HasPrefix(got, "select a_column, ") {
			t.Errorf("mode %d: a long text was cut to %d bytes: %q", mode, len(got), got)
		}
	}
	if got := pgxdrain.Summary("select * from " + strings.Repeat("a_table, ", 200) + "t"); len(got) > 255 || !strings.HasPrefix(got, "SELECT a_table") {
		t.Errorf("a long summary was cut to %d bytes: %q", len(got), got)
	}
}

// The pieces that a statement may be made of, by PostgreSQL's rules of where each ends.
var (
	secretPieces = []string{
		"'hunter2'", "'it''s hunter2'", `E'\' hunter2 \\'`, `e'it''s \'hunter2'`, "$$hunter2 ' -- $$", "$t$ $$ hunter2 \" $t$", "$тег$ ' hunter2 $тег$",
		"U&'hunter2'", "N'hunter2'", "4242424242", "4242_4242_42", "1.5e+42424242", "0x42424242", "0b101010_42424242", ".42424242",
		"-- hunter2 '\n", "-- hunter2 \"\r", "/* hunter2 ' */", "/* /* \" */ hunter2 /**/ $$ */", "/***/", "/*/ hunter2 */",
	}
	plainPieces = []string{
		"select", "from", "insert", "e", "E", "U&", "a$b", "a$", "ü", "t.a", "$1", "é$$",
		`"it's"`, `t."it's"`, `"a""b"`, `"--"`, `"$$"`, `"/*"`, `a"'"`, "+", "-", "*", "/", "@", "#", "!", "?", "=", "<>", "::", "->>", "&&",
		"(", ")", ",", ";", "[1:2]", " ", "\n", "\t", "\r",
	}
	word     = regexp.MustCompile(`^([\w$.]|[^\x00-\x7f])`)
	wordEnd  = regexp.MustCompile(`([\w$]|[^\x00-\x7f])$`)
	operator = regexp.MustCompile(`[-+*/@#!?=<>:&]`)
)

func TestSanitizedTextHasNothingOfLiteralsAndCommentsWhateverStandsBesideThem(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		sql := "select"
		for _, piece := range rapid.SliceOfN(rapid.OneOf(rapid.SampledFrom(secretPieces), rapid.SampledFrom(plainPieces)), 1, 12).Draw(t, "pieces") {
			comment := strings.HasPrefix(piece, "--") || strings.HasPrefix(piece, "/*")
			switch last := sql[len(sql)-1:]; {
			case wordEnd.MatchString(sql) && word.MatchString(piece), // would be one word
				operator.MatchString(last) && operator.MatchString(piece[:1]) && !comment, // may begin a comment
				last == "/" && strings.HasPrefix(piece, "*"),
				last == "." || piece[0] == '.' || piece[0] == '"' && strings.HasSuffix(sql, "&"):
				sql += " "
			}
			sql += piece
		}
		for _, text := range []string{pgxdrain.VisibleText(pgxdrain.QueryTextSanitized, sql), pgxdrain.Summary(sql)} {
			if text == "?" {
				t.Fatalf("%q is taken for uncertain", sql)
			}
			if strings.Contains(text, "hunter2") || strings.Contains(text, "42") {
				t.Fatalf("%q is shown as %q", sql, text)
			}
		}
	})
}

func TestTextOfAStatementWithArgumentsIsShownAsItIs(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	conn := acquire(t, pool)
	defer conn.Release()
	ctx := testContext(t)
	for _, c := range []struct {
		sql, want string
		args      []any
	}{
		{"select 'a', $1::int -- b", "select 'a', $1::int -- b", []any{1}},
		{"select  $1::text", "select  $1::text", []any{pgx.QueryExecModeSimpleProtocol, "x"}},
		{"select @n::int, 'a'", "select @n::int, 'a'", []any{pgx.NamedArgs{"n": 1}}},
		{"select @n::int, 'a'", "select @n::int, 'a'", []any{pgx.StrictNamedArgs{"n": 1}}},
		// No arguments, but options for pgx.
		{"select 'a' -- b", "select ?", []any{pgx.QueryExecModeExec}},
		{"select 'a'", "select ?", []any{pgx.QueryResultFormats{0}}},
		{"select 'a'", "select ?", []any{pgx.NamedArgs{}}},
		{"select 'a'", "select ?", nil},
	} {
		rows := must[pgx.Rows](t)(conn.Query(ctx, c.sql, c.args...))
		if rows.Close(); rows.Err() != nil {
			t.Fatal(rows.Err())
		}
		if got := only(t, pool).Statement; got != c.want {
			t.Errorf("%q with %v is shown as %q, want %q", c.sql, c.args, got, c.want)
		}
	}
	b := &pgx.Batch{}
	b.Queue("select 'a', $1::int", 1)
	b.Queue("select 2")
	if err := conn.SendBatch(ctx, b).Close(); err != nil {
		t.Fatal(err)
	}
	if got := only(t, pool).Statement; got != "select 'a', $1::int" {
		t.Errorf("of a batch %q is shown", got)
	}
}

// secret is planted in what must not be seen.
const secret = "hunter2"

// plant runs a statement with the secret in it. It may go on until the shutdown cancels it.
type plant func(context.Context, *pgxpool.Conn) error

func exec(sql string, args ...any) plant {
	return func(ctx context.Context, conn *pgxpool.Conn) error {
		_, err := conn.Exec(ctx, sql, args...)
		return err
	}
}

func fails(sql string, args ...any) plant {
	return func(ctx context.Context, conn *pgxpool.Conn) error {
		if _, err := conn.Exec(ctx, sql, args...); err == nil {
			return fmt.Errorf("%q has not failed", sql)
		}
		return nil
	}
}

func TestPlantedSecretsAreInNoOutput(t *testing.T) {
	t.Parallel()
	arguments := map[string]plant{
		"argument":        exec("select $1::text", secret),
		"simple protocol": exec("select $1::text", pgx.QueryExecModeSimpleProtocol, secret),
		"named argument":  exec("select @a::text", pgx.NamedArgs{"a": secret}),
		"prepared by name": func(ctx context.Context, conn *pgxpool.Conn) error {
			if _, err := conn.Conn().Prepare(ctx, "by_name", "select $1::text"); err != nil {
				return err
			}
			_, err := conn.Exec(ctx, "by_name", secret)
			return err
		},
		"batch": func(ctx context.Context, conn *pgxpool.Conn) error {
			b := &pgx.Batch{}
			b.Queue("select $1::text", secret)
			b.Queue("select $1::text", secret)
			return conn.SendBatch(ctx, b).Close()
		},
		"rows of a copy": func(ctx context.Context, conn *pgxpool.Conn) error {
			_, err := conn.CopyFrom(ctx, pgx.Identifier{"t"}, []string{"a"}, pgx.CopyFromRows([][]any{{secret}}))
			return err
		},
		"an error that echoes an argument": fails("select $1::text::int", pgx.QueryExecModeExec, secret),
		"a statement that is cancelled":    fails("select $1::text, pg_sleep(600)", secret),
	}
	literals := map[string]plant{
		"literal":                exec("select '" + secret + "'"),
		"line comment":           exec("select 1 --" + secret),
		"comment after operator": exec("select 1 +--" + secret + "\n1"),
		"nested comment":         exec("/* /* */ " + secret + " */ select 1"),
		"dollar quotes":          exec("select $x$" + secret + "$x$, $$ '" + secret + "$$"),
		"escape string":          exec(`select E'\'` + secret + `'`),
		"Unicode string":         exec("select U&'" + secret + "'"),
		"after a quoted name":    exec(`select a."it's", '` + secret + `' from (select 1 as "it's") a`),
		"password of a role":     fails("alter role nobody password '" + secret + "'"),
		"DO":                     exec("do $$ begin perform '" + secret + "'; end $$"),
		"several statements":     exec("select 1; select '" + secret + "'"),
		"batch with a literal": func(ctx context.Context, conn *pgxpool.Conn) error {
			b := &pgx.Batch{}
			b.Queue("select '" + secret + "'")
			return conn.SendBatch(ctx, b).Close()
		},
		"prepared with a literal": func(ctx context.Context, conn *pgxpool.Conn) error {
			_, err := conn.Conn().Prepare(ctx, "literal", "select '"+secret+"'")
			return err
		},
		"COPY":                    exec("copy (select '" + secret + "') to program 'cat >/dev/null # " + secret + "'"),
		"server's error":          fails("select '" + secret + "'::int"),
		"error in a transaction":  fails("begin; select '" + secret + "'::int"),
		"statement cancelled":     fails("select '" + secret + "', pg_sleep(600)"),
		"backslash":               exec(`select '\` + secret + `'`),
		"a text that has no end":  fails("select '" + secret),
		"a comment without end":   fails("select 1 /* " + secret),
		"dollar quotes, unclosed": fails("select $a$ " + secret),
	}
	for mode, plants := range map[pgxdrain.QueryText][]map[string]plant{
		pgxdrain.QueryTextSanitized: {arguments, literals},
		pgxdrain.QueryTextSummary:   {arguments, literals},
		pgxdrain.QueryTextNone:      {arguments, literals},
		pgxdrain.QueryTextRaw:       {arguments},
	} {
		t.Run(fmt.Sprintf("mode %d", mode), func(t *testing.T) {
			t.Parallel()
			all := map[string]plant{}
			for _, p := range plants {
				maps.Copy(all, p)
			}
			hunt(t, mode, all)
		})
	}
}

// hunt runs each plant on a connection of its own, ends them all by force, and looks for the secret in all that is told of it.
func hunt(t *testing.T, mode pgxdrain.QueryText, plants map[string]plant) {
	var log lines
	reader := sdkmetric.NewManualReader()
	pool, exporter, tracer := newTracedPoolOn(t, withParams(withSecretPassword(t, pgtest.Database(t)), fmt.Sprintf("pool_max_conns=%d&pool_drain_timeout=2s&pool_cancel_grace=1500ms&pool_leak_threshold=1ms", len(plants)+1)),
		pgxdrain.WithQueryText(mode),
		pgxdrain.WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))),
		pgxdrain.WithLogger(slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))))
	if _, err := pool.Exec(testContext(t), "create table t (a text)"); err != nil {
		t.Fatal(err)
	}

	ctx, span := tracer.Start(testContext(t), "planting")
	defer span.End()
	release := make(chan struct{})
	var running sync.WaitGroup
	var planted atomic.Int64
	sleeping := 0
	for name, plant := range plants {
		if strings.Contains(name, "cancelled") {
			sleeping++
		}
		conn := must[*pgxpool.Conn](t)(pool.Acquire(ctx))
		running.Go(func() {
			defer conn.Release()
			if err := plant(ctx, conn); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			planted.Add(1)
			<-release
		})
	}
	eventually(t, "all is planted", func() bool {
		active := 0
		for _, op := range pool.Active() {
			if op.State == pgxdrain.StateActive {
				active++
			}
		}
		return active == sleeping && int(planted.Load())+sleeping == len(plants)
	})

	outputs := map[string]string{"active": fmt.Sprintf("%+v", pool.Active())}
	outputs["metrics"] = collected(t, reader)
	err := pool.Shutdown(context.Background())
	close(release)
	running.Wait()
	outputs["error"] = err.Error()
	outputs["error in full"] = fmt.Sprintf("%+v", err)
	outputs["report"] = fmt.Sprintf("%+v", pool.Report())
	outputs["metrics of the shutdown"] = collected(t, reader)
	outputs["spans"] = fmt.Sprintf("%+v", exporter.GetSpans())
	outputs["log"] = log.String()
	for name, output := range outputs {
		if strings.Contains(output, secret) {
			t.Errorf("the secret is in the %s: %s", name, around(output, secret))
		}
		if !strings.Contains(output, pool.Report().Pool) && name != "active" {
			t.Errorf("the %s does not even name the pool: %s", name, output)
		}
	}
	if n := strings.Count(outputs["log"], "pgxdrain: not drained"); n <= len(plants)/2 {
		t.Errorf("the log tells of %d stragglers, there were %d plants", n, len(plants))
	}
	if mode != pgxdrain.QueryTextNone && strings.Count(strings.ToLower(outputs["log"]), "select") < len(plants)/2 {
		t.Errorf("no texts in the log")
	}
}

// withSecretPassword returns dsn for another user, whose password is the secret, written in percents.
func withSecretPassword(t *testing.T, dsn string) string {
	t.Helper()
	conn := must[*pgx.Conn](t)(pgx.Connect(testContext(t), dsn))
	user := "u_" + conn.Config().Database
	if _, err := conn.Exec(t.Context(), "create role "+user+" superuser login password '"+secret+"'"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer conn.Close(context.Background())
		if _, err := conn.Exec(context.Background(), "drop owned by "+user+"; drop role "+user); err != nil {
			t.Error(err)
		}
	})
	percents := ""
	for _, b := range []byte(secret) {
		percents += fmt.Sprintf("%%%02x", b)
	}
	config := conn.Config()
	return fmt.Sprintf("postgres://%s:%s@%s/%s?sslmode=disable",
		user, percents, net.JoinHostPort(config.Host, strconv.Itoa(int(config.Port))), config.Database)
}

// collected is what a reader sees of the metrics.
func collected(t testing.TB, reader sdkmetric.Reader) string {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(testContext(t), &rm); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(rm.ScopeMetrics)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func around(text, part string) string {
	at := strings.Index(text, part)
	return text[max(0, at-200):min(len(text), at+100)]
}

func TestErrorsOfNewShowNoPassword(t *testing.T) {
	t.Parallel()
	for _, dsn := range []string{
		"postgres://me:hunter2@127.0.0.1:1/db?%s",
		"postgres://me:%%68unter2@127.0.0.1:1/db?%s",
		"postgres://127.0.0.1:1/db?user=me&password=hunter2&%s",
		"host=127.0.0.1 port=1 user=me password=hunter2 %s",
		"host=127.0.0.1 port=1 user=me password='hunter2 x' %s",
	} {
		for _, key := range []string{"pool_drain_timeout=soon", "pool_cancel_grace=0", "pool_initial_wait=-1s", "pool_leak_threshold=x", "pool_name=", "pool_max_conns=x"} {
			dsn := fmt.Sprintf(dsn, key)
			_, err := pgxdrain.New(t.Context(), dsn)
			if err == nil {
				t.Errorf("no error of %s", dsn)
				continue
			}
			if strings.Contains(fmt.Sprintf("%v %+v", err, err), secret) {
				t.Errorf("%s gives %v", dsn, err)
			}
		}
	}
}
