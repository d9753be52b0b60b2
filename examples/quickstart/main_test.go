//go:build unix

package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m).Run()) }

func TestQuickstart(t *testing.T) {
	t.Parallel()
	program := build(t)

	t.Run("drains everything and exits 0", func(t *testing.T) {
		t.Parallel()
		dsn := pgtest.Database(t)
		p := start(t, program, dsn)
		p.exits(0)

		p.logged("first caller refused", `err="pgxdrain: pool is shutting down"`)
		p.logged("caller got its turn", "waited=")
		for _, operation := range []string{`"quick report"`, "report", "export", "transfer"} {
			p.logged("operation finished", "operation="+operation)
		}
		p.inOrder("signal received", "readiness fails", "first caller refused", "drained and closed")

		counts := p.counts()
		if counts.active < 1 || counts.waiting < 1 || counts.admitted < 1 || counts.refused < 1 {
			t.Errorf("want active operations, waiting and admitted callers, and refused ones: %+v", counts)
		}
		operations := p.table("PID")
		if len(operations) != counts.active+counts.admitted {
			t.Errorf("%d operations in the table, want %d and %d", len(operations), counts.active, counts.admitted)
		}
		for _, row := range operations {
			if row[3] != "drained" {
				t.Errorf("not drained: %q", row)
			}
		}

		spans := p.table("SPAN")
		if first, last := spans[0][0], spans[len(spans)-1][0]; first != "pgxdrain.shutdown" || last != "  pgxdrain.close" {
			t.Errorf("spans from %q to %q", first, last)
		}
		if n := len(spans) - 2; n != len(operations) {
			t.Errorf("%d spans of operations, want %d", n, len(operations))
		}
		for _, name := range []string{"  pgxdrain.query", "  pgxdrain.transaction"} {
			if !slices.ContainsFunc(spans, func(row []string) bool { return row[0] == name }) {
				t.Errorf("no span %q", name)
			}
		}
		waitNoBackend(t, dsn)
	})

	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run("a second signal, "+signal.String()+", brings the end forward and exits 1", func(t *testing.T) {
			t.Parallel()
			dsn := pgtest.Database(t)
			p := start(t, program, withKey(dsn, "pool_drain_timeout=50s"), "-work=1m")
			p.waitFor("first caller refused") // it drains, and the work will not end by itself
			sent := time.Now()
			if err := p.cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			p.exits(1)
			if took := time.Since(sent); took > 20*time.Second { // the cancel grace is 2 s; without the signal it takes 50
				t.Errorf("took %v", took)
			}
			p.forced(dsn)
		})
	}

	t.Run("a budget that runs out exits 1", func(t *testing.T) {
		t.Parallel()
		dsn := pgtest.Database(t)
		p := start(t, program, withKey(dsn, "pool_drain_timeout=2s"), "-work=1m")
		p.exits(1)
		p.forced(dsn)
	})

	t.Run("without DATABASE_URL it leaves no server behind", func(t *testing.T) {
		t.Parallel()
		if os.Getenv("PGXDRAIN_TEST_DSN") != "" {
			t.Skip("PGXDRAIN_TEST_DSN names a server, which is left running")
		}
		p := start(t, program, "", "-work=2s")
		p.exits(0)
		address := regexp.MustCompile(`pool=(\S+)/`).FindStringSubmatch(p.stderr.String())
		if address == nil {
			t.Fatalf("no address in\n%s", p.stderr.String())
		}
		conn, err := net.DialTimeout("tcp", address[1], 5*time.Second)
		if err == nil {
			conn.Close()
			t.Errorf("a server is left at %s", address[1])
		}
	})

	for name, bad := range map[string]struct{ dsn, want string }{
		"a URL that cannot be parsed":      {"postgres://app:s3cret@127.0.0.1:port/app", "invalid port"},
		"a server that cannot be reached":  {"postgres://app:s3cret@127.0.0.1:1/app", "127.0.0.1:1"},
		"pairs that cannot be parsed":      {"host=127.0.0.1 password=s3cret port=port", "invalid port"},
		"a key of pgxdrain's that is bad":  {"postgres://app:s3cret@127.0.0.1:1/app?pool_drain_timeout=soon", "pool_drain_timeout"},
		"a password that cannot be parsed": {"postgres://app:s3cret%zz@127.0.0.1:1/app", "password"},
	} {
		t.Run(name+" exits 1 and shows no password", func(t *testing.T) {
			t.Parallel()
			p := start(t, program, bad.dsn)
			p.exits(1)
			p.inOrder("quickstart: ", bad.want)
			if out := p.stderr.String() + p.stdout.String(); strings.Contains(out, "s3cret") {
				t.Errorf("shows the password:\n%s", out)
			}
		})
	}
}

// build builds the program as the test was built.
func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "quickstart")
	args := []string{"build", "-o", program}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		args = append(args, "-race")
	}
	if out, err := exec.CommandContext(t.Context(), "go", args...).CombinedOutput(); err != nil {
		t.Fatalf("go %q: %v\n%s", args, err, out)
	}
	return program
}

// process is a run of the program.
type process struct {
	t              *testing.T
	ctx            context.Context
	cmd            *exec.Cmd
	stdout, stderr transcript
}

// limit is how long a run may take: a few times what it takes on a busy machine.
const limit = 90 * time.Second

func start(t *testing.T, program, dsn string, args ...string) *process {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	p := &process{t: t, ctx: ctx, cmd: exec.CommandContext(ctx, program, args...)}
	p.cmd.Env = append(os.Environ(), "DATABASE_URL="+dsn)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return p
}

// waitFor waits until text is on stderr.
func (p *process) waitFor(text string) {
	p.t.Helper()
	for {
		grown := p.stderr.grows()
		if strings.Contains(p.stderr.String(), text) {
			return
		}
		select {
		case <-grown:
		case <-p.ctx.Done():
			p.t.Fatalf("no %q within %v:\n%s", text, limit, p.stderr.String())
		}
	}
}

// exits waits for the end and checks the exit code.
func (p *process) exits(code int) {
	p.t.Helper()
	err := p.cmd.Wait()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Fatalf("exit code %d (%v), want %d:\n%s%s", got, p.cmd.ProcessState, code, p.stderr.String(), p.stdout.String())
	}
}

// logged checks that a line on stderr has both texts.
func (p *process) logged(a, b string) {
	p.t.Helper()
	for line := range strings.Lines(p.stderr.String()) {
		if strings.Contains(line, a) && strings.Contains(line, b) {
			return
		}
	}
	p.t.Errorf("no line with %q and %q:\n%s", a, b, p.stderr.String())
}

// inOrder checks that the texts are on stderr one after the other.
func (p *process) inOrder(texts ...string) {
	p.t.Helper()
	rest := p.stderr.String()
	for _, text := range texts {
		_, after, ok := strings.Cut(rest, text)
		if !ok {
			p.t.Errorf("%q is missing or not after those before it in %q:\n%s", text, texts, p.stderr.String())
			return
		}
		rest = after
	}
}

// forced checks that the run tells of operations that had to be ended, and which, and that they were.
func (p *process) forced(dsn string) {
	p.t.Helper()
	p.logged("quickstart: pgxdrain: pool ", "INSERT INTO booking")
	if !slices.ContainsFunc(p.table("PID"), func(row []string) bool { return row[3] != "drained" }) {
		p.t.Errorf("every operation is drained:\n%s", p.stdout.String())
	}
	if root := p.table("SPAN")[0]; root[0] != "pgxdrain.shutdown" || root[3] != "error" {
		p.t.Errorf("the first span is %q", root)
	}
	waitNoBackend(p.t, dsn)
}

type counts struct{ active, waiting, admitted, refused int }

var countsLine = regexp.MustCompile(`(\d+) operations? .* (\d+) callers? .* (\d+) .* turn, (\d+) .* refused`)

func (p *process) counts() counts {
	p.t.Helper()
	found := countsLine.FindStringSubmatch(p.stdout.String())
	if found == nil {
		p.t.Fatalf("no counts:\n%s", p.stdout.String())
	}
	var n [4]int
	for i := range n {
		n[i], _ = strconv.Atoi(found[i+1])
	}
	return counts{n[0], n[1], n[2], n[3]}
}

// columns are at least two spaces apart; one may be empty at the end of a line.
var columns = regexp.MustCompile(`\S  +`)

// table returns the rows of the table on stdout whose first heading is given, each with all columns.
func (p *process) table(heading string) [][]string {
	p.t.Helper()
	var starts []int
	var rows [][]string
	for line := range strings.Lines(p.stdout.String()) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case starts == nil && strings.HasPrefix(line, heading):
			starts = []int{0}
			for _, at := range columns.FindAllStringIndex(line, -1) {
				starts = append(starts, at[1])
			}
		case starts != nil && line == "":
			return rows
		case starts != nil:
			rows = append(rows, cells(line, starts))
		}
	}
	if len(rows) == 0 {
		p.t.Fatalf("no table of %s:\n%s", heading, p.stdout.String())
	}
	return rows
}

func cells(line string, starts []int) []string {
	row := make([]string, len(starts))
	for i, from := range starts {
		to := len(line)
		if i+1 < len(starts) {
			to = min(to, starts[i+1])
		}
		if from < to {
			row[i] = strings.TrimRight(line[from:to], " ")
		}
	}
	return row
}

// waitNoBackend waits until nobody is connected to the database, but for the look itself.
func waitNoBackend(t *testing.T, dsn string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	const backends = `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()`
	for {
		var n int
		if err := conn.QueryRow(ctx, backends).Scan(&n); err != nil {
			t.Fatalf("%d backends left: %v", n, err)
		}
		if n == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond) // no event tells of a backend's end
	}
}

// transcript is what a process has written so far.
type transcript struct {
	mu    sync.Mutex
	text  bytes.Buffer
	grown chan struct{}
}

func (t *transcript) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.grown != nil {
		close(t.grown)
		t.grown = nil
	}
	return t.text.Write(p)
}

func (t *transcript) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.text.String()
}

// grows returns a channel that is closed at the next Write.
func (t *transcript) grows() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.grown == nil {
		t.grown = make(chan struct{})
	}
	return t.grown
}
