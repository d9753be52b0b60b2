//go:build unix

package main

import (
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgxdrain/pgxdrain/examples/internal/database"
	"github.com/pgxdrain/pgxdrain/examples/internal/process"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m).Run()) }

func TestQuickstart(t *testing.T) {
	t.Parallel()
	program := process.Build(t)

	t.Run("drains everything and exits 0", func(t *testing.T) {
		t.Parallel()
		dsn := pgtest.Database(t)
		p := start(t, program, dsn)
		p.Exits(0)

		p.Logged("first caller refused", `err="pgxdrain: pool is shutting down"`)
		p.Logged("caller got its turn", "waited=")
		for _, operation := range []string{`"quick report"`, "report", "export", "transfer"} {
			p.Logged("operation finished", "operation="+operation)
		}
		p.InOrder("signal received", "readiness fails", "first caller refused", "drained and closed")

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
		process.WaitNoSession(t, dsn)
	})

	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run("a second signal, "+signal.String()+", brings the end forward and exits 1", func(t *testing.T) {
			t.Parallel()
			dsn := pgtest.Database(t)
			p := start(t, program, database.WithKey(dsn, "pool_drain_timeout=50s"), "-work=1m")
			p.WaitFor("first caller refused") // it drains, and the work will not end by itself
			sent := time.Now()
			p.Signal(signal)
			p.Exits(1)
			if took := time.Since(sent); took > 20*time.Second { // the cancel grace is 2 s; without the signal it takes 50
				t.Errorf("took %v", took)
			}
			p.forced(dsn)
		})
	}

	t.Run("a budget that runs out exits 1", func(t *testing.T) {
		t.Parallel()
		dsn := pgtest.Database(t)
		p := start(t, program, dsn, "-timeout=2s", "-work=1m")
		p.Exits(1)
		p.forced(dsn)
	})

	t.Run("without DATABASE_URL it leaves no server behind", func(t *testing.T) {
		t.Parallel()
		if os.Getenv("PGXDRAIN_TEST_DSN") != "" {
			t.Skip("PGXDRAIN_TEST_DSN names a server, which is left running")
		}
		p := start(t, program, "", "-work=2s")
		p.Exits(0)
		address := regexp.MustCompile(`pool=(\S+)/`).FindStringSubmatch(p.Stderr.String())
		if address == nil {
			t.Fatalf("no address in\n%s", p.Stderr.String())
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
			p.Exits(1)
			p.InOrder("quickstart: ", bad.want)
			if out := p.Stderr.String() + p.Stdout.String(); strings.Contains(out, "s3cret") {
				t.Errorf("shows the password:\n%s", out)
			}
		})
	}
}

// quickstart is a run of the program.
type quickstart struct {
	*process.Process
	t *testing.T
}

func start(t *testing.T, program, dsn string, args ...string) quickstart {
	t.Helper()
	return quickstart{process.Start(t, program, []string{"DATABASE_URL=" + dsn}, args...), t}
}

// forced checks that the run tells of operations that had to be ended, and which, and that they were.
func (p quickstart) forced(dsn string) {
	p.t.Helper()
	p.Logged("quickstart: pgxdrain: pool ", "INSERT INTO booking")
	if !slices.ContainsFunc(p.table("PID"), func(row []string) bool { return row[3] != "drained" }) {
		p.t.Errorf("every operation is drained:\n%s", p.Stdout.String())
	}
	if root := p.table("SPAN")[0]; root[0] != "pgxdrain.shutdown" || root[3] != "error" {
		p.t.Errorf("the first span is %q", root)
	}
	process.WaitNoSession(p.t, dsn)
}

type counts struct{ active, waiting, admitted, refused int }

var countsLine = regexp.MustCompile(`(\d+) operations? .* (\d+) callers? .* (\d+) .* turn, (\d+) .* refused`)

func (p quickstart) counts() counts {
	p.t.Helper()
	found := countsLine.FindStringSubmatch(p.Stdout.String())
	if found == nil {
		p.t.Fatalf("no counts:\n%s", p.Stdout.String())
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
func (p quickstart) table(heading string) [][]string {
	p.t.Helper()
	var starts []int
	var rows [][]string
	for line := range strings.Lines(p.Stdout.String()) {
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
		p.t.Fatalf("no table of %s:\n%s", heading, p.Stdout.String())
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
