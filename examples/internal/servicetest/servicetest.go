//go:build unix

// Package servicetest checks what the HTTP examples have in common, each run as a process: what becomes of requests when it is
// told to stop, or fails, and how it ends.
package servicetest

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/pgxdrain/pgxdrain/examples/internal/database"
	"github.com/pgxdrain/pgxdrain/examples/internal/process"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// Service is a run of an example.
type Service struct {
	*process.Process
	t   testing.TB
	dsn string
	url string
}

// Start starts the program on an empty database, with env besides and keys added to its connection string, and waits until it
// serves.
func Start(t testing.TB, program string, env []string, keys ...string) *Service {
	t.Helper()
	return StartCommand(t, []string{program}, env, keys...)
}

// StartCommand is Start with a command that runs the program.
func StartCommand(t testing.TB, command []string, env []string, keys ...string) *Service {
	t.Helper()
	s := &Service{t: t, dsn: pgtest.Database(t)}
	dsn := s.dsn
	for _, key := range keys {
		dsn = database.WithKey(dsn, key)
	}
	s.Process = process.Start(t, command[0], append([]string{"DATABASE_URL=" + dsn, "PORT=0"}, env...), command[1:]...)
	s.WaitFor("msg=serving")
	s.url = "http://127.0.0.1:" + serving.FindStringSubmatch(s.Stderr.String())[1]
	return s
}

var serving = regexp.MustCompile(`msg=serving addr=\S*:(\d+)`)

// Answer is what became of a request.
type Answer struct {
	Status int
	Header http.Header
	Body   string
	Closed bool  // the server has said that it closes the connection
	Sent   int   // connections that it was sent on: the client sends it again when one breaks
	Err    error // there was no answer
}

// refused reports whether the port was closed: nothing was sent. It is "connection reset" if it was closed that very moment.
func (a Answer) refused() bool {
	return a.Sent == 0 && (errors.Is(a.Err, syscall.ECONNREFUSED) || errors.Is(a.Err, syscall.ECONNRESET))
}

// Do sends a request on a connection of its own.
func (s *Service) Do(method, path string) Answer {
	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	return s.do(transport, method, path)
}

func (s *Service) do(transport *http.Transport, method, path string) (a Answer) {
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { a.Sent++ }}
	request, err := http.NewRequestWithContext(httptrace.WithClientTrace(s.t.Context(), trace), method, s.url+path, nil)
	if err != nil {
		a.Err = err
		return a
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		a.Err = err
		return a
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	a.Status, a.Header, a.Body, a.Closed, a.Err = response.StatusCode, response.Header, string(body), response.Close, err
	return a
}

// InFlight sends a request that takes long and returns when the database is at work on n of them.
func (s *Service) InFlight(path string, n int) <-chan Answer {
	s.t.Helper()
	answers := make(chan Answer, n)
	for range n {
		go func() { answers <- s.Do("GET", path) }()
	}
	s.WaitForStatement("%pg_sleep%", n)
	return answers
}

// WaitForStatement waits until n statements that are like the pattern are in progress at the server.
func (s *Service) WaitForStatement(like string, n int) {
	s.t.Helper()
	s.waitForCount(n, `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND state = 'active' AND query LIKE $1 AND pid <> pg_backend_pid()`, like)
}

// waitForCount asks the server until it answers n: no event tells of what others do there.
func (s *Service) waitForCount(n int, query string, args ...any) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.dsn)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for {
		var got int
		if err := conn.QueryRow(ctx, query, args...).Scan(&got); err != nil {
			s.t.Fatalf("%s %v: %d, want %d: %v\n%s", query, args, got, n, err, s.Stderr.String())
		}
		if got == n {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// is checks the status and, of what is not 200, that the body is a JSON object with an error.
func (s *Service) is(a Answer, status int) {
	s.t.Helper()
	if a.Err != nil || a.Status != status {
		s.t.Errorf("%d %q %v, want %d\n%s", a.Status, a.Body, a.Err, status, s.Stderr.String())
		return
	}
	var body struct{ Error string }
	if err := json.Unmarshal([]byte(a.Body), &body); status != http.StatusOK && (err != nil || body.Error == "") {
		s.t.Errorf("%d with %q, which has no error: %v", a.Status, a.Body, err)
	}
}

// EndsWithin checks the exit code, that all phases have been gone through in order, that it took no longer than limit since then,
// and that nothing of the service is left at the server.
func (s *Service) EndsWithin(limit time.Duration, since time.Time, code int) {
	s.t.Helper()
	s.Exits(code)
	if took := time.Since(since); took > limit {
		s.t.Errorf("took %v, which is more than %v:\n%s", took, limit, s.Stderr.String())
	}
	received, drained, exit := "signal received", "pgxdrain: drained and closed", "msg=exit code=0"
	if code != 0 {
		exit = "msg=exit code=1"
	}
	if strings.Contains(s.Stderr.String(), "fatal error") {
		received = "fatal error"
	}
	if strings.Contains(s.Stderr.String(), "pgxdrain: not drained") {
		drained = "pgxdrain: not drained and closed in time"
	}
	s.InOrder("msg=serving", received, "readiness fails", "new work is refused", drained, "closing the port",
		"flushing logs and telemetry", exit)
	if !strings.Contains(s.Stdout.String(), `"Name":"pgxdrain.shutdown"`) {
		s.t.Errorf("the span of the shutdown was not flushed:\n%s", s.Stdout.String())
	}
	process.WaitNoSession(s.t, s.dsn)
	s.waitForCount(0, `SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database
		WHERE d.datname = current_database() AND pid IS DISTINCT FROM pg_backend_pid()`)
}

// generous is longer than any end that is forced at once, and shorter than one that is not.
const generous = 20 * time.Second

// Test runs the tests that every service has to pass.
func Test(t *testing.T, program string) {
	t.Run("on SIGTERM what is in flight gets its answer, what is new is refused, and the exit code is 0", func(t *testing.T) {
		t.Parallel()
		s := Start(t, program, nil, "pool_initial_wait=2s")
		for _, path := range []string{"/health", "/health/ready", "/health/live", "/api/data?ms=0"} {
			a := s.Do("GET", path)
			if s.is(a, http.StatusOK); a.Closed {
				t.Errorf("%s closes the connection", path)
			}
		}
		slow := s.InFlight("/api/data?ms=8000", 1)
		sent := time.Now()
		s.Signal(syscall.SIGTERM)

		s.WaitFor("readiness fails")
		for start := time.Now(); s.Do("GET", "/health/ready").Status != http.StatusServiceUnavailable; {
			if time.Since(start) > time.Second { // half of the initial wait
				t.Fatalf("still ready:\n%s", s.Stderr.String())
			}
		}
		s.is(s.Do("GET", "/health/live"), http.StatusOK)
		a := s.Do("GET", "/api/data?ms=0")
		if s.is(a, http.StatusOK); !a.Closed {
			t.Error("the connection is kept although the service is about to stop")
		}

		s.WaitFor("new work is refused")
		a = s.Do("GET", "/api/data?ms=0")
		if s.is(a, http.StatusServiceUnavailable); !a.Closed || a.Header.Get("Retry-After") == "" {
			t.Errorf("refused, but with %v, closed %v", a.Header, a.Closed)
		}
		if a := s.Do("GET", "/health/ready"); a.Status != http.StatusServiceUnavailable {
			t.Errorf("readiness is %d %v while draining", a.Status, a.Err)
		}
		s.is(s.Do("GET", "/health/live"), http.StatusOK)

		a = <-slow
		if s.is(a, http.StatusOK); !a.Closed {
			t.Error("the connection of the request that was in flight is kept")
		}
		s.EndsWithin(process.Limit, sent, 0)
		s.Logged("still draining", "remaining=")
	})

	t.Run("under load across SIGTERM every request is answered or refused", func(t *testing.T) {
		t.Parallel()
		s := Start(t, program, nil, "pool_initial_wait=1s", "pool_max_conns=4")
		slow := s.InFlight("/api/data?ms=4000", 1)
		load := s.startLoad(8)
		load.waitFor(t, 50)
		sent := time.Now()
		s.Signal(syscall.SIGTERM)
		s.is(<-slow, http.StatusOK)
		s.EndsWithin(process.Limit, sent, 0)
		load.over.Wait()
		if load.answered.Load() <= 50 || load.unavailable.Load() == 0 || load.refused.Load() != 8 {
			t.Errorf("%d answered, %d unavailable, %d refused", load.answered.Load(), load.unavailable.Load(), load.refused.Load())
		}
	})

	t.Run("a request past the budget is cut off and told so, and the exit code is 1", func(t *testing.T) {
		t.Parallel()
		s := Start(t, program, []string{"SHUTDOWN_TIMEOUT=5s"}, "pool_initial_wait=0")
		slow := s.InFlight("/api/data?ms=300000", 1)
		sent := time.Now()
		s.Signal(syscall.SIGTERM)
		s.is(<-slow, http.StatusServiceUnavailable)
		s.EndsWithin(generous, sent, 1)
		s.Logged("pgxdrain: not drained", "outcome=")
	})

	t.Run("a second signal forces at once, and the exit code is 1", func(t *testing.T) {
		for step, wait := range map[string]string{"readiness fails": "40s", "new work is refused": "0"} {
			for _, second := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
				t.Run(step+", "+second.String(), func(t *testing.T) {
					t.Parallel()
					s := Start(t, program, []string{"SHUTDOWN_TIMEOUT=80s"}, "pool_initial_wait="+wait)
					slow := s.InFlight("/api/data?ms=300000", 1)
					s.Signal(syscall.SIGTERM)
					s.WaitFor(step)
					sent := time.Now()
					s.Signal(second)
					s.is(<-slow, http.StatusServiceUnavailable)
					s.EndsWithin(generous, sent, 1)
				})
			}
		}
	})

	for how, logged := range map[string]string{
		"panic":    "chaos: a bug",
		"error":    "chaos: it cannot go on",
		"listener": "use of closed network connection",
	} {
		t.Run("a part of the service that ends by "+how+" goes through the same door, and the exit code is 1", func(t *testing.T) {
			t.Parallel()
			s := Start(t, program, []string{"CHAOS=1"}, "pool_initial_wait=0")
			slow := s.InFlight("/api/data?ms=3000", 1)
			sent := time.Now()
			s.Do("POST", "/chaos/"+how)
			s.is(<-slow, http.StatusOK)
			s.EndsWithin(process.Limit, sent, 1)
			s.Logged("fatal error", logged)
		})
	}

	t.Run("SIGINT ends it as SIGTERM does, and an idle connection does not hold it up", func(t *testing.T) {
		t.Parallel()
		s := Start(t, program, nil)
		transport := new(http.Transport)
		defer transport.CloseIdleConnections()
		s.is(s.do(transport, "GET", "/health/live"), http.StatusOK) // it stays connected
		sent := time.Now()
		s.Signal(syscall.SIGINT)
		s.EndsWithin(generous, sent, 0)
	})

	t.Run("ms is how long it takes, 5000 if it is left out, and a bad one is answered with 400", func(t *testing.T) {
		t.Parallel()
		s := Start(t, program, nil)
		for _, bad := range []string{"", "-1", "1.5", "soon", "NaN", "0x10", "99999999", "99999999999999999999"} {
			s.is(s.Do("GET", "/api/data?ms="+bad), http.StatusBadRequest)
		}
		for query, takes := range map[string]time.Duration{"": 5 * time.Second, "?ms=1000": time.Second} {
			start := time.Now()
			s.is(s.Do("GET", "/api/data"+query), http.StatusOK)
			if took := time.Since(start); took < takes {
				t.Errorf("%q took %v", query, took)
			}
		}
		if a := s.Do("POST", "/chaos/panic"); a.Status != http.StatusNotFound {
			t.Errorf("anybody can break it: %d", a.Status)
		}
	})

	t.Run("a bad setting is named, and nothing is started", func(t *testing.T) {
		t.Parallel()
		taken, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer taken.Close()
		_, takenPort, _ := net.SplitHostPort(taken.Addr().String())
		dsn := pgtest.Database(t)
		for bad, want := range map[string]string{
			"PORT=http":             "PORT must be a number",
			"PORT=-1":               "PORT must be a number",
			"PORT=65536":            "PORT must be a number",
			"PORT=" + takenPort:     "PORT: listen tcp :" + takenPort,
			"SHUTDOWN_TIMEOUT=soon": "SHUTDOWN_TIMEOUT must be a duration",
			"SHUTDOWN_TIMEOUT=25":   "SHUTDOWN_TIMEOUT must be a duration",
			"SHUTDOWN_TIMEOUT=0s":   "SHUTDOWN_TIMEOUT must be a duration",
			"SHUTDOWN_TIMEOUT=-1s":  "SHUTDOWN_TIMEOUT must be a duration",
			"DATABASE_URL=" + database.WithKey(dsn, "pool_initial_wait=soon"): "pool_initial_wait",
			"DATABASE_URL=postgres://app:s3cret@127.0.0.1:1/app":              "the database does not answer",
		} {
			p := process.Start(t, program, []string{"DATABASE_URL=" + dsn, "PORT=0", bad})
			p.Exits(1)
			p.InOrder(want, "msg=exit code=1")
			if out := p.Stderr.String(); strings.Contains(out, "msg=serving") || strings.Contains(out, "s3cret") {
				t.Errorf("%s: serves, or shows the password:\n%s", bad, out)
			}
		}
		process.WaitNoSession(t, dsn)
	})
}

// load is clients that keep their connections and come again and again until the port is closed.
type load struct {
	over                           sync.WaitGroup
	answered, unavailable, refused atomic.Int64
	progress                       chan struct{} // one for each that was answered, as far as there is room
}

func (s *Service) startLoad(clients int) *load {
	l := &load{progress: make(chan struct{}, 1024)}
	for range clients {
		l.over.Go(func() {
			transport := new(http.Transport)
			defer transport.CloseIdleConnections()
			for s.t.Context().Err() == nil && l.request(s, transport) {
			}
		})
	}
	return l
}

// request sends one request and reports whether there is to be another.
func (l *load) request(s *Service, transport *http.Transport) bool {
	a := s.do(transport, "GET", "/api/data?ms=10")
	switch {
	case a.refused():
		l.refused.Add(1)
		return false
	case a.Err != nil || a.Sent != 1:
		s.t.Errorf("a request was lost: sent %d times, %v\n%s", a.Sent, a.Err, s.Stderr.String())
		return false
	case a.Status == http.StatusOK:
		l.answered.Add(1)
		select {
		case l.progress <- struct{}{}:
		default:
		}
		return true
	case a.Status == http.StatusServiceUnavailable:
		l.unavailable.Add(1)
		time.Sleep(10 * time.Millisecond) // long before its Retry-After
		return true
	default:
		s.t.Errorf("%d %q\n%s", a.Status, a.Body, s.Stderr.String())
		return false
	}
}

// waitFor waits until n requests have been answered.
func (l *load) waitFor(t testing.TB, n int) {
	t.Helper()
	for range n {
		select {
		case <-l.progress:
		case <-t.Context().Done():
			t.Fatal(context.Cause(t.Context()))
		}
	}
}
