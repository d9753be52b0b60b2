// Package process runs an example as a process for its test: built as the test was built, watched by what it prints, sent
// signals, and judged by its exit code and by the sessions that it leaves at the server.
package process

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Limit is how long a run may take: a few times what it takes on a busy machine. A process that goes on for longer is killed,
// which [Process.Exits] sees by its exit code.
const Limit = 90 * time.Second

// Build builds the main package in the test's folder, with the race detector if the test has it, and returns the program's
// path.
func Build(t testing.TB) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "program")
	args := []string{"build", "-o", program}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		args = append(args, "-race")
	}
	if out, err := exec.CommandContext(t.Context(), "go", args...).CombinedOutput(); err != nil {
		t.Fatalf("go %q: %v\n%s", args, err, out)
	}
	return program
}

// Process is a run of a program.
type Process struct {
	Stdout, Stderr Transcript

	t    testing.TB
	ctx  context.Context
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // of cmd.Wait
}

// Start starts the program with env added to this process's own environment. It is killed at the end of t if it has not ended by
// then.
func Start(t testing.TB, program string, env []string, args ...string) *Process {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Limit)
	p := &Process{t: t, ctx: ctx, cmd: exec.CommandContext(ctx, program, args...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.Stdout, &p.Stderr
	if err := p.cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		p.err = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		cancel()
		<-p.done
	})
	return p
}

// Signal sends the process a signal, unless it has ended.
func (p *Process) Signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Fatalf("signal %v: %v\n%s", s, err, p.Stderr.String())
	}
}

// PID returns the process's PID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// WaitFor waits until text is on stderr.
func (p *Process) WaitFor(text string) {
	p.t.Helper()
	for {
		grown := p.Stderr.grows()
		if strings.Contains(p.Stderr.String(), text) {
			return
		}
		select {
		case <-grown:
		case <-p.done:
			if !strings.Contains(p.Stderr.String(), text) {
				p.t.Fatalf("no %q before the end (%v):\n%s", text, p.err, p.Stderr.String())
			}
		}
	}
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// ExitCode waits for the end and returns the exit code, which is -1 if the process was killed.
func (p *Process) ExitCode() int {
	p.t.Helper()
	<-p.done
	if exit := new(exec.ExitError); p.err != nil && !errors.As(p.err, &exit) {
		p.t.Fatal(p.err)
	}
	return p.cmd.ProcessState.ExitCode()
}

// Exits waits for the end and checks the exit code.
func (p *Process) Exits(code int) {
	p.t.Helper()
	if got := p.ExitCode(); got != code {
		p.t.Fatalf("exit code %d (%v), want %d:\n%s%s", got, p.cmd.ProcessState, code, p.Stderr.String(), p.Stdout.String())
	}
}

// Logged checks that a line on stderr has all the texts.
func (p *Process) Logged(texts ...string) {
	p.t.Helper()
	for line := range strings.Lines(p.Stderr.String()) {
		if !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(line, text) }) {
			return
		}
	}
	p.t.Errorf("no line with all of %q:\n%s", texts, p.Stderr.String())
}

// InOrder checks that the texts are on stderr one after the other.
func (p *Process) InOrder(texts ...string) {
	p.t.Helper()
	rest := p.Stderr.String()
	for _, text := range texts {
		_, after, ok := strings.Cut(rest, text)
		if !ok {
			p.t.Errorf("%q is missing or not after those before it in %q:\n%s", text, texts, p.Stderr.String())
			return
		}
		rest = after
	}
}

// WaitNoSession waits until nobody is connected to the database, but for the look itself.
func WaitNoSession(t testing.TB, dsn string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	const sessions = `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()`
	for {
		var n int
		if err := conn.QueryRow(ctx, sessions).Scan(&n); err != nil {
			t.Fatalf("%d sessions left: %v", n, err)
		}
		if n == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond) // no event tells of a session's end
	}
}

// WaitUntil waits for something that no event tells of, for a minute at most.
func WaitUntil(t testing.TB, what string, is func() bool) {
	t.Helper()
	for start := time.Now(); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > time.Minute {
			t.Fatalf("waited a minute until %s", what)
		}
	}
}

// FreePort returns a TCP port of 127.0.0.1 that nobody listened on a moment ago.
func FreePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// Transcript is what a process has written so far.
type Transcript struct {
	mu    sync.Mutex
	text  bytes.Buffer
	grown chan struct{}
}

func (t *Transcript) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.grown != nil {
		close(t.grown)
		t.grown = nil
	}
	return t.text.Write(p)
}

func (t *Transcript) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.text.String()
}

// grows returns a channel that is closed at the next Write.
func (t *Transcript) grows() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.grown == nil {
		t.grown = make(chan struct{})
	}
	return t.grown
}
