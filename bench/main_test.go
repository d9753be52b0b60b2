package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/pgxdrain/pgxdrain/internal/bench"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m).Run()) }

// The command is built without the race detector, which allows 8,128 goroutines.
func TestCommandPrintsARowWithFiguresForEachCase(t *testing.T) {
	program := filepath.Join(t.TempDir(), "bench")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program).CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	cmd := exec.CommandContext(t.Context(), program, "-rounds", "1")
	cmd.Env = append(os.Environ(), "DATABASE_URL="+pgtest.Database(t))
	cmd.Stderr = new(strings.Builder)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, cmd.Stderr)
	}

	rows := make(map[string][]string) // by name and ways
	for line := range strings.Lines(string(out)) {
		if cells := strings.Split(strings.Trim(line, "| \n"), " | "); len(cells) == columns {
			rows[strings.Join(cells[:3], " | ")] = cells
		}
	}
	for _, c := range append(bench.Cases(), peers()...) {
		cells, ok := rows[strings.Join([]string{c.Name, orNone(c.Ways[0]), c.Ways[1]}, " | ")]
		if !ok {
			t.Errorf("no row of %q, %q", c.Name, c.Ways)
			continue
		}
		if compared, bytes := cells[4], cells[7]; compared == none && bytes == "0" {
			t.Errorf("a row without figures: %q", cells)
		}
		if n, err := strconv.Atoi(cells[columns-1]); err != nil || n < 1 {
			t.Errorf("a row without rounds: %q", cells)
		}
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}
