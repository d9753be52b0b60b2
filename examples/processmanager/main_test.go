//go:build unix

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/pgxdrain/pgxdrain/examples/internal/process"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m).Run()) }

// phases are what a run logs from the signal to its exit, in this order.
var phases = []string{
	"readiness fails", "draining, new work is refused", "drained and closed", "flushing logs", "msg=exit",
}

func TestService(t *testing.T) {
	t.Parallel()
	program := process.Build(t)

	t.Run("finishes the requests in flight, refuses others, and exits 0", func(t *testing.T) {
		t.Parallel()
		s := launch(t, program)
		if got := s.get("/health/ready"); got.status != http.StatusOK {
			t.Errorf("readiness is %v before the signal", got)
		}
		inFlight := s.slow(8, "/api/data?ms=3000")
		s.Signal(syscall.SIGTERM)
		s.WaitFor("new work is refused")
		for path, want := range map[string]int{
			"/health/ready":  http.StatusServiceUnavailable,
			"/health/live":   http.StatusOK,
			"/api/data?ms=0": http.StatusServiceUnavailable,
		} {
			if got := s.get(path); got.status != want {
				t.Errorf("%s is %v while draining, want %d", path, got, want)
			}
		}
		s.answered(inFlight, http.StatusOK)
		s.Exits(0)
		s.leftClean("asked to stop")
	})

	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run("a second signal, "+signal.String()+", ends the requests in flight and exits 1", func(t *testing.T) {
			t.Parallel()
			s := launch(t, program, "SHUTDOWN_TIMEOUT=60s")
			inFlight := s.slow(4, "/api/data?ms=300000")
			s.Signal(syscall.SIGTERM)
			s.WaitFor("new work is refused")
			s.Signal(signal)
			s.exitsWithin(30*time.Second, 1)
			s.answered(inFlight, http.StatusServiceUnavailable)
			s.leftForced()
		})
	}

	t.Run("a budget that runs out ends the requests in flight and exits 1", func(t *testing.T) {
		t.Parallel()
		s := launch(t, program, "SHUTDOWN_TIMEOUT=6s")
		inFlight := s.slow(4, "/api/data?ms=300000")
		s.Signal(syscall.SIGTERM)
		s.exitsWithin(30*time.Second, 1)
		s.answered(inFlight, http.StatusServiceUnavailable)
		s.leftForced()
	})

	t.Run("signals that come until the last moment leave it its exit code", func(t *testing.T) {
		t.Parallel()
		w := launch(t, program)
		for ended := false; !ended; {
			w.Signal(syscall.SIGTERM)
			select {
			case <-w.Done():
				ended = true
			case <-time.After(time.Millisecond):
			}
		}
		if code := w.ExitCode(); code != 0 && code != 1 {
			t.Errorf("exit code %d:\n%s", code, w.Stderr.String())
		}
	})

	t.Run("a panic ends it through the same door, with the other requests finished, and exits 1", func(t *testing.T) {
		t.Parallel()
		s := launch(t, program)
		inFlight := s.slow(2, "/api/data?ms=3000")
		if resp, err := http.Post(s.url("/debug/panic"), "", nil); err == nil {
			resp.Body.Close()
			t.Errorf("the request that panicked was answered: %s", resp.Status)
		}
		s.answered(inFlight, http.StatusOK)
		s.Exits(1)
		s.Logged("fatal error", "POST /debug/panic panicked: a bug")
		s.leftClean("fatal error")
	})

	t.Run("a database that cannot be reached ends it through the same door and exits 1", func(t *testing.T) {
		t.Parallel()
		p := process.Start(t, program, []string{
			"DATABASE_URL=postgres://app:s3cret@127.0.0.1:1/app", "PORT=" + process.FreePort(t),
		})
		p.Exits(1)
		p.InOrder(append([]string{"fatal error", "cannot start"}, phases...)...)
		if strings.Contains(p.Stderr.String(), "s3cret") {
			t.Errorf("shows the password:\n%s", p.Stderr.String())
		}
	})

	t.Run("a port that is taken exits 1", func(t *testing.T) {
		t.Parallel()
		taken, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer taken.Close()
		_, port, _ := net.SplitHostPort(taken.Addr().String())
		p := process.Start(t, program, []string{"DATABASE_URL=" + pgtest.Database(t), "PORT=" + port})
		p.Exits(1)
		p.Logged("fatal error", "cannot start", "address already in use")
	})

	t.Run("a signal during the start ends it with exit code 0", func(t *testing.T) {
		t.Parallel()
		gate := newGate(t, pgtest.Database(t))
		p := process.Start(t, program, []string{"DATABASE_URL=" + gate.dsn, "PORT=" + process.FreePort(t)})
		<-gate.reached
		p.Signal(syscall.SIGTERM)
		p.Exits(0)
	})

	for name, env := range map[string]string{
		"a duration":     "SHUTDOWN_TIMEOUT=soon",
		"positive":       "SHUTDOWN_TIMEOUT=0s",
		"a descriptor":   "NODE_CHANNEL_FD=three",
		"a mode we know": "NODE_CHANNEL_FD=3,NODE_CHANNEL_SERIALIZATION_MODE=advanced",
	} {
		t.Run(env+" is an error before the start: it is not "+name, func(t *testing.T) {
			t.Parallel()
			p := process.Start(t, program, append(strings.Split(env, ","), "DATABASE_URL=postgres://127.0.0.1:1/app"))
			p.Exits(1)
			key, value, _ := strings.Cut(env[strings.LastIndex(env, ",")+1:], "=")
			p.Logged("processmanager failed", key+" must be", value)
			if strings.Contains(p.Stderr.String(), "starting") {
				t.Errorf("has started:\n%s", p.Stderr.String())
			}
		})
	}

	t.Run("ms is a number of milliseconds, 5,000 by default", func(t *testing.T) {
		t.Parallel()
		s := launch(t, program)
		for _, bad := range []string{"soon", "-1", "600001", "1.5"} {
			if got := s.get("/api/data?ms=" + bad); got.status != http.StatusBadRequest {
				t.Errorf("ms=%s: %v", bad, got)
			}
		}
		if got := s.get("/api/data"); got.status != http.StatusOK || !strings.Contains(got.body, `"ms":5000`) {
			t.Errorf("without ms: %v", got)
		}
		s.Signal(syscall.SIGTERM)
		s.Exits(0)
	})
}

// service is a run of the program.
type service struct {
	*process.Process
	client
}

func launch(t *testing.T, program string, env ...string) *service {
	t.Helper()
	c := newClient(t)
	s := &service{process.Start(t, program, append(env, c.env()...)), c}
	s.WaitFor("msg=ready")
	return s
}

func (s *service) exitsWithin(limit time.Duration, code int) {
	s.t.Helper()
	from := time.Now()
	s.Exits(code)
	if took := time.Since(from); took > limit {
		s.t.Errorf("the exit took %v, want %v at most:\n%s", took, limit, s.Stderr.String())
	}
}

// leftClean checks that nothing had to be ended, that the phases are in their order, and that nothing is left at the server.
func (s *service) leftClean(because string) {
	s.t.Helper()
	s.InOrder(append([]string{because}, phases...)...)
	s.flushed()
	process.WaitNoSession(s.t, s.dsn)
}

// leftForced checks the same of a run that had to end requests.
func (s *service) leftForced() {
	s.t.Helper()
	s.InOrder("asked to stop", "readiness fails", "draining, new work is refused", "not drained and closed in time",
		"flushing logs", "msg=exit")
	s.flushed()
	process.WaitNoSession(s.t, s.dsn)
}

func (s *service) flushed() {
	s.t.Helper()
	if !strings.Contains(s.Stdout.String(), `"pgxdrain.shutdown"`) {
		s.t.Errorf("the span of the shutdown was not flushed:\n%s", s.Stdout.String())
	}
}

// client asks a run of the program, which has a database and a port of its own.
type client struct {
	t         *testing.T
	dsn, port string
}

func newClient(t *testing.T) client {
	t.Helper()
	return client{t, pgtest.Database(t), process.FreePort(t)}
}

func (c client) env() []string { return []string{"DATABASE_URL=" + c.dsn, "PORT=" + c.port} }

func (c client) url(path string) string { return "http://127.0.0.1:" + c.port + path }

type answer struct {
	status int
	body   string
	err    error
}

func (c client) get(path string) (a answer) {
	resp, err := http.Get(c.url(path))
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, string(body), err}
}

// slow sends requests and waits until the server works on the statements of as many as the pool has connections for.
func (c client) slow(n int, path string) <-chan answer {
	c.t.Helper()
	answers := make(chan answer, n)
	var asking sync.WaitGroup
	for range n {
		asking.Go(func() { answers <- c.get(path) })
	}
	go func() {
		asking.Wait()
		close(answers)
	}()
	conn, err := pgx.Connect(c.t.Context(), c.dsn)
	if err != nil {
		c.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	process.WaitUntil(c.t, "the requests are in flight", func() bool {
		var active int
		if err := conn.QueryRow(c.t.Context(), `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND state = 'active' AND pid <> pg_backend_pid()`).Scan(&active); err != nil {
			c.t.Fatal(err)
		}
		return active >= min(n, 4) // the least that a pool has
	})
	return answers
}

// answered checks that each request was answered so.
func (c client) answered(answers <-chan answer, status int) {
	c.t.Helper()
	for a := range answers {
		if a.err != nil || a.status != status {
			c.t.Errorf("a request in flight was answered with %v, want %d", a, status)
		}
	}
}

// gate is a way to a database that is closed at first: the server seems not to answer.
type gate struct {
	dsn     string        // through the gate
	reached chan struct{} // closed when somebody wants to pass
	open    func()
}

func newGate(t *testing.T, dsn string) *gate {
	t.Helper()
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	network, address := pgconn.NetworkAddress(config.Host, config.Port)
	opened := make(chan struct{})
	g := &gate{
		dsn: (&url.URL{
			Scheme: "postgres", User: url.UserPassword(config.User, config.Password), Host: l.Addr().String(), Path: "/" + config.Database,
		}).String(),
		reached: make(chan struct{}),
		open:    sync.OnceFunc(func() { close(opened) }),
	}
	reached := sync.OnceFunc(func() { close(g.reached) })
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			reached()
			go func() {
				defer from.Close()
				select {
				case <-opened:
				case <-t.Context().Done():
					return
				}
				to, err := net.Dial(network, address)
				if err != nil {
					return
				}
				defer to.Close()
				go func() {
					defer from.Close()
					defer to.Close()
					_, _ = io.Copy(to, from)
				}()
				_, _ = io.Copy(from, to)
			}()
		}
	}()
	return g
}

func (a answer) String() string { return fmt.Sprintf("%d %q %v", a.status, a.body, a.err) }
