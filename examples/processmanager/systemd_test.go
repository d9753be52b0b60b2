//go:build unix

package main

import (
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/unit"
	"github.com/pgxdrain/pgxdrain/examples/internal/process"
)

func TestSystemdIsToldWhenItIsReadyThatItStopsAndForHowLong(t *testing.T) {
	t.Parallel()
	program := process.Build(t)
	c := newClient(t)
	gate := newGate(t, c.dsn)
	socket := listenForNotices(t)
	s := &service{client: c, Process: process.Start(t, program, []string{
		"DATABASE_URL=" + gate.dsn, "PORT=" + c.port, "NOTIFY_SOCKET=" + socket.path, "WATCHDOG_USEC=1500000",
	})}

	<-gate.reached
	if got := socket.all(); len(got) > 0 {
		t.Errorf("said %q before the database had answered", got)
	}
	gate.open()
	socket.waitFor("READY=1")
	if got := s.get("/health/ready"); got.status != http.StatusOK {
		t.Errorf("readiness is %v when systemd has been told", got)
	}
	socket.waitFor("WATCHDOG=1")

	inFlight := s.slow(1, "/api/data?ms=4000")
	s.Signal(syscall.SIGTERM)
	socket.waitFor("STOPPING=1")
	for range 3 { // of one every second
		notice := socket.waitFor("EXTEND_TIMEOUT_USEC=5000000")
		if !strings.Contains(notice, "STATUS=Stopping (") {
			t.Errorf("no status in %q", notice)
		}
	}
	s.answered(inFlight, http.StatusOK)
	s.Exits(0)
	s.leftClean("asked to stop")
}

func TestUnitOfSystemdAllowsForTheBudgets(t *testing.T) {
	t.Parallel()
	file, err := os.Open("processmanager.service")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	options, err := unit.DeserializeOptions(file)
	if err != nil {
		t.Fatal(err)
	}
	service := map[string]string{}
	for _, option := range options {
		if option.Section == "Service" {
			service[option.Name] = option.Value
		}
	}
	for name, want := range map[string]string{"Type": "notify", "KillMode": "mixed", "DynamicUser": "yes", "Restart": "on-failure"} {
		if service[name] != want {
			t.Errorf("%s=%s, want %s", name, service[name], want)
		}
	}
	seconds := func(name string) time.Duration {
		n, err := strconv.Atoi(service[name])
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		return time.Duration(n) * time.Second
	}
	if got := seconds("TimeoutStartSec"); got <= startTimeout {
		t.Errorf("TimeoutStartSec is %v, and a start may take %v", got, startTimeout)
	}
	if got := seconds("TimeoutStopSec"); got <= defaultShutdownTimeout {
		t.Errorf("TimeoutStopSec is %v, and a shutdown may take %v", got, defaultShutdownTimeout)
	}
	if want := "SHUTDOWN_TIMEOUT=" + defaultShutdownTimeout.String(); !strings.Contains(service["Environment"], want) {
		t.Errorf("Environment=%s, want %s in it", service["Environment"], want)
	}
}

func TestUnitOfSystemdIsWhatSystemdUnderstands(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("PGXDRAIN_SYSTEMD") == "required" {
			t.Fatal(err)
		}
		t.Skip("systemd-analyze is missing (Debian's package systemd)")
	}
	text, err := os.ReadFile("processmanager.service")
	if err != nil {
		t.Fatal(err)
	}
	const installed = "ExecStart=/usr/local/bin/processmanager"
	if !strings.Contains(string(text), installed) {
		t.Fatalf("no %s", installed)
	}
	path := filepath.Join(t.TempDir(), "processmanager.service")
	here := strings.Replace(string(text), installed, "ExecStart="+process.Build(t), 1) // verify wants a program there
	if err := os.WriteFile(path, []byte(here), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), analyze, "verify", path).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// notices is what a process has said to a socket that is systemd's to it.
type notices struct {
	t    *testing.T
	path string
	said chan string
}

func listenForNotices(t *testing.T) *notices {
	t.Helper()
	dir, err := os.MkdirTemp("", "notify") // t.TempDir may be longer than a socket's path may be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := &notices{t, filepath.Join(dir, "socket"), make(chan string, 1000)}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: n.path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			size, err := conn.Read(buf)
			if err != nil {
				return
			}
			n.said <- string(buf[:size])
		}
	}()
	return n
}

// waitFor waits for the next notice that has the line.
func (n *notices) waitFor(line string) (notice string) {
	n.t.Helper()
	for limit := time.After(time.Minute); ; {
		select {
		case notice = <-n.said:
			for l := range strings.Lines(notice) {
				if strings.TrimSuffix(l, "\n") == line {
					return notice
				}
			}
		case <-limit:
			n.t.Fatalf("waited a minute for %s", line)
		}
	}
}

// all returns what has been said and not been waited for.
func (n *notices) all() (notices []string) {
	for {
		select {
		case notice := <-n.said:
			notices = append(notices, notice)
		default:
			return notices
		}
	}
}
