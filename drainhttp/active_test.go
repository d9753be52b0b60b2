package drainhttp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/drainhttp"
)

var screenshot = flag.String("screenshot", "", "write a picture of the page, as Chromium shows it, to this file")

const browserAccept = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"

func (s *server) getAs(t testing.TB, path, accept string) response {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, s.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	r := read(s.client.Do(req))
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r
}

// activeJSON is the JSON of the page, by the keys that docs/http.md lists and no others.
type activeJSON struct {
	Pool     string    `json:"pool"`
	At       time.Time `json:"at"`
	Step     string    `json:"step"`
	Active   int       `json:"active"`
	Waiting  int       `json:"waiting"`
	Shutdown *struct {
		StartedAt time.Time `json:"started_at"`
		Budget    float64   `json:"budget_seconds"`
		Took      float64   `json:"took_seconds"`
		Left      float64   `json:"left_seconds"`
		Active    int       `json:"active"`
		Admitted  int       `json:"admitted"`
		Refused   int       `json:"refused"`
		Drained   int       `json:"drained"`
		Cancelled int       `json:"cancelled"`
		Severed   int       `json:"severed"`
		Unknown   int       `json:"unknown"`
		Leaked    int       `json:"leaked"`
	} `json:"shutdown"`
	Operations []struct {
		PID              uint32    `json:"pid"`
		State            string    `json:"state"`
		Outcome          string    `json:"outcome"`
		Statement        string    `json:"statement"`
		BatchSize        int       `json:"batch_size"`
		AcquiredAt       time.Time `json:"acquired_at"`
		Held             float64   `json:"held_seconds"`
		StatementStart   time.Time `json:"statement_start"`
		TransactionStart time.Time `json:"transaction_start"`
		Transaction      float64   `json:"transaction_seconds"`
	} `json:"operations"`
	More int `json:"more"`
}

func (s *server) activeJSON(t testing.TB) (page activeJSON) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(s.get(t, "/").body))
	d.DisallowUnknownFields()
	if err := d.Decode(&page); err != nil {
		t.Fatal(err)
	}
	return page
}

func begin(t testing.TB, pool *pgxdrain.Pool, sql string) pgx.Tx {
	t.Helper()
	tx, err := pool.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Rollback(context.Background()) })
	if _, err := tx.Exec(context.Background(), sql); err != nil {
		t.Fatal(err)
	}
	return tx
}

func acquire(t testing.TB, pool *pgxdrain.Pool) *pgxpool.Conn {
	t.Helper()
	conn, err := pool.Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Release)
	return conn
}

func TestJSONOfThePageSaysWhatActiveAndReportSay(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_name=orders", longGrace)
	s := newServer(t, overHTTP1, drainhttp.Active(pool))
	if page := s.activeJSON(t); page.Pool != "orders" || page.Step != "open" || page.Shutdown != nil || page.Operations == nil || page.Active != 0 {
		t.Errorf("of an idle pool: %+v", page)
	}

	tx := begin(t, pool, "select 1, 'secret'")
	conn := acquire(t, pool)
	batch := &pgx.Batch{}
	batch.Queue("select 2")
	batch.Queue("select 3")
	if err := conn.SendBatch(t.Context(), batch).Close(); err != nil {
		t.Fatal(err)
	}
	result, hurry := startShutdown(t, pool, pgxdrain.StepDrain)
	if _, err := pool.Exec(t.Context(), "select 4"); err == nil {
		t.Fatal("not refused")
	}
	eventually(t, "all times are more than nothing, to the millisecond", func() bool { return pool.Report().Took > 2*time.Millisecond })
	page := s.activeJSON(t)
	ops := pool.Active()
	if page.Step != "drain" || page.Active != 2 || len(page.Operations) != 2 || page.More != 0 || page.Waiting != 0 {
		t.Fatalf("while draining: %+v", page)
	}
	if d := page.Shutdown; d.Active != 2 || d.Refused != 1 || d.Budget < 1 || d.Left < 1 || d.Left > d.Budget ||
		d.Took <= 0 || time.Since(d.StartedAt) > time.Hour {
		t.Errorf("shutdown: %+v", d)
	}
	first, second := page.Operations[0], page.Operations[1]
	if first.PID != ops[0].PID || first.State != "idle in transaction" || first.Statement != "select ?, ?" || first.Held <= 0 ||
		first.Transaction <= 0 || first.TransactionStart.IsZero() || first.StatementStart.IsZero() ||
		first.AcquiredAt.Sub(ops[0].AcquiredAt).Abs() > time.Second || first.BatchSize != 0 || first.Outcome != "" {
		t.Errorf("the transaction: %+v", first)
	}
	if second.PID != ops[1].PID || second.State != "idle" || second.Statement != "select ?" || second.BatchSize != 2 ||
		second.Transaction != 0 || !second.TransactionStart.IsZero() {
		t.Errorf("the batch: %+v", second)
	}

	hurry()
	eventually(t, "the connections are severed", func() bool { return tx.Conn().Ping(t.Context()) != nil })
	tx.Rollback(t.Context())
	conn.Release()
	receive(t, "Shutdown returns", result)
	page = s.activeJSON(t)
	if page.Step != "closed" || page.Active != 0 || page.Shutdown.Severed != 2 || page.Shutdown.Left != 0 || len(page.Operations) != 2 ||
		page.Operations[0].Outcome != "severed" {
		t.Errorf("in the end: %+v", page)
	}
}

func TestPageIsHTMLForBrowsersAndJSONForPrograms(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	s := newServer(t, overHTTP1, drainhttp.Active(pool))
	const html, json = "text/html; charset=utf-8", "application/json"
	for _, c := range []struct{ path, accept, want string }{
		{"/", browserAccept, html},
		{"/", "", json},
		{"/", "*/*", json},
		{"/", "application/json", json},
		{"/", "application/json, text/html;q=0.9", json},
		{"/", "application/json;q=0.5, text/html", html},
		{"/", "text/html;q=0", json},
		{"/", ";;;,", json},
		{"/?format=json", browserAccept, json},
		{"/?format=html", "application/json", html},
	} {
		r := s.getAs(t, c.path, c.accept)
		if got := r.Header.Get("Content-Type"); r.StatusCode != http.StatusOK || got != c.want {
			t.Errorf("%s with Accept %q: %d %s, want %s", c.path, c.accept, r.StatusCode, got, c.want)
		}
	}
}

func TestPageKeepsOutOfCachesAndFramesAndLoadsNothing(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	s := newServer(t, overHTTP1, drainhttp.Active(pool))
	for _, accept := range []string{browserAccept, "application/json"} {
		h := s.getAs(t, "/", accept).Header
		for key, want := range map[string]string{
			"Cache-Control":          "no-store",
			"X-Frame-Options":        "DENY",
			"X-Content-Type-Options": "nosniff",
			"Referrer-Policy":        "no-referrer",
			"Vary":                   "Accept",
		} {
			if got := h.Get(key); got != want {
				t.Errorf("%s: %s is %q, want %q", accept, key, got, want)
			}
		}
		csp := h.Get("Content-Security-Policy")
		for _, directive := range []string{"default-src 'none'", "style-src 'sha256-", "frame-ancestors 'none'", "form-action 'none'"} {
			if !strings.Contains(csp, directive) {
				t.Errorf("%s: no %s in %q", accept, directive, csp)
			}
		}
	}
	if s.getAs(t, "/", browserAccept).Header.Get("Refresh") == "" {
		t.Error("the page does not load itself again")
	}
	pool.Close()
	if s.getAs(t, "/", browserAccept).Header.Get("Refresh") != "" {
		t.Error("the page loads itself again although nothing can change")
	}
}

func TestPageEscapesAHostileStatement(t *testing.T) {
	t.Parallel()
	const hostile = `select 1 as "<script>alert(1)</script>" /* </code></td><img src=x onerror=alert(2)> */ where '"' = '"'`
	pool := newPool(t, "", pgxdrain.WithQueryText(pgxdrain.QueryTextRaw), pgxdrain.WithPoolName(`<b onclick="alert(3)">`))
	begin(t, pool, hostile)
	s := newServer(t, overHTTP1, drainhttp.Active(pool))
	body := s.getAs(t, "/", browserAccept).body
	for _, tag := range []string{"<script", "<img", "<b "} {
		if strings.Contains(body, tag) {
			t.Errorf("%q is in the page", tag)
		}
	}
	if !strings.Contains(body, "&lt;script&gt;alert(1)&lt;/script&gt;") {
		t.Error("the statement is not in the page")
	}
	if got := s.activeJSON(t).Operations[0].Statement; got != hostile {
		t.Errorf("in JSON: %q", got)
	}
}

func TestLongListIsCutAndSaysSo(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	for range 203 {
		_, release, err := pool.Hold(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer release()
	}
	s := newServer(t, overHTTP1, drainhttp.Active(pool))
	if page := s.activeJSON(t); page.Active != 203 || len(page.Operations) != 200 || page.More != 3 {
		t.Errorf("%d active, %d shown, %d more", page.Active, len(page.Operations), page.More)
	}
	body := s.getAs(t, "/", browserAccept).body
	if n := strings.Count(body, "<tr>"); n != 201 || !strings.Contains(body, "and 3 more") {
		t.Errorf("%d rows in HTML", n)
	}
}

func TestPageOfAnIdlePoolSaysSo(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	s := newServer(t, overHTTP1, drainhttp.Active(pool))
	if body := s.getAs(t, "/", browserAccept).body; !strings.Contains(body, "Nothing is in progress.") {
		t.Errorf("%s", body)
	}
	pool.Close()
	if body := s.getAs(t, "/", browserAccept).body; !strings.Contains(body, "Everything has drained.") {
		t.Errorf("%s", body)
	}
}

// busy brings pool into the middle of a drain with one operation of each state, some that have drained and some refused.
func busy(t *testing.T, pool *pgxdrain.Pool) {
	ctx, cancel := context.WithCancel(context.Background())
	exec := func(tx pgx.Tx, sql string) {
		if _, err := tx.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	begin(t, pool, "create table account (id int primary key, owner text, balance numeric)").Commit(t.Context())
	begin(t, pool, "create table audit (id int, constraint balanced check (id > 0))").Commit(t.Context())

	request, release, err := pool.Hold(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	transfer := begin(t, pool, "insert into account values (1, 'alice', 10), (2, 'bob', 20)")
	exec(transfer, "update account set balance = balance - 5 where owner = 'alice'")
	failed := begin(t, pool, "select 1")
	failed.Exec(t.Context(), "insert into audit (id) values (-1)")
	batch := &pgx.Batch{}
	for range 250 {
		batch.Queue("select owner from account where id = 7")
	}
	imported := acquire(t, pool)
	if err := imported.SendBatch(t.Context(), batch).Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cancel)
	for _, sql := range []string{
		"select owner, sum(balance) from account a left join audit using (id), pg_sleep(1000) where a.id <> 42 group by owner order by 2 desc",
		"select pg_sleep(1000)",
	} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			pool.Exec(request, sql)
		}()
		t.Cleanup(func() { cancel(); <-done })
	}
	var drained []*pgxpool.Conn
	for range 5 {
		drained = append(drained, acquire(t, pool))
	}
	eventually(t, "both statements run", func() bool {
		n := 0
		for _, op := range pool.Active() {
			if op.State == pgxdrain.StateActive {
				n++
			}
		}
		return n == 2
	})
	startShutdown(t, pool, pgxdrain.StepDrain)
	for _, conn := range drained {
		conn.Release()
	}
	for range 31 {
		pool.Exec(t.Context(), "select 1")
	}
}

func TestChromiumRendersThePageWithoutViolationsOfItsPolicy(t *testing.T) {
	t.Parallel()
	program := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		if os.Getenv("PGXDRAIN_CHROMIUM") == "required" {
			t.Fatal("no chromium on the PATH")
		}
		t.Skip("chromium is missing (Debian's package chromium)")
	}
	pool := newPool(t, "pool_name=orders&pool_max_conns=16")
	busy(t, pool)
	s := newServer(t, overHTTP1, drainhttp.Active(pool))

	chromium := func(args ...string) (stdout, stderr string) {
		ctx, cancel := context.WithTimeout(context.Background(), 2*timeout)
		defer cancel()
		args = append(args, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
			"--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
			"--enable-logging=stderr", "--user-data-dir="+t.TempDir(), s.URL)
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.WaitDelay = time.Second
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			t.Fatalf("%v\n%s", err, &errs)
		}
		return out.String(), errs.String()
	}
	dom, console := chromium("--dump-dom")
	if !strings.Contains(dom, "select pg_sleep ( ? )") || !strings.Contains(dom, `data-state="idle in transaction (aborted)"`) {
		t.Errorf("not the page:\n%s", dom)
	}
	if strings.Contains(console, "Content Security Policy") {
		t.Error(console)
	}
	if *screenshot == "" {
		return
	}
	file, err := filepath.Abs(*screenshot)
	if err != nil {
		t.Fatal(err)
	}
	chromium("--window-size=1040,620", "--screenshot="+file)
}

func TestOnlyGETAndHEADAreAllowed(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	for name, h := range map[string]http.Handler{
		"Ready": drainhttp.Ready(pool), "Live": drainhttp.Live(pool), "Active": drainhttp.Active(pool),
	} {
		s := newServer(t, overHTTP1, h)
		for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions} {
			req, err := http.NewRequest(method, s.URL, nil)
			if err != nil {
				t.Fatal(err)
			}
			r := read(s.client.Do(req))
			if r.err != nil || r.StatusCode != http.StatusMethodNotAllowed || r.Header.Get("Allow") != "GET, HEAD" {
				t.Errorf("%s: %s: %+v", name, method, r)
			}
		}
		r := read(s.client.Head(s.URL))
		if r.err != nil || r.StatusCode != http.StatusOK || r.body != "" || r.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: HEAD: %+v", name, r)
		}
	}
}
