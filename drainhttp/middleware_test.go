package drainhttp_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/drainhttp"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(pgtest.Main(m),
		// pgxpool's Close does not wait for them (pgx #1641).
		goleak.IgnoreAnyFunction("github.com/jackc/pgx/v5/pgxpool.(*Pool).backgroundHealthCheck"),
		goleak.IgnoreAnyFunction("github.com/jackc/pgx/v5/pgxpool.(*Pool).triggerHealthCheck.func1"),
	)
}

// timeout is how long a test waits for something that should happen at once.
const timeout = 30 * time.Second

var silent = pgxdrain.WithLogger(slog.New(slog.DiscardHandler))

// newPool returns a pool on an empty database of its own. It is closed at the end of t.
func newPool(t testing.TB, params string, opts ...pgxdrain.Option) *pgxdrain.Pool {
	t.Helper()
	return openPool(t, withParams(pgtest.Database(t), params), opts...)
}

func openPool(t testing.TB, dsn string, opts ...pgxdrain.Option) *pgxdrain.Pool {
	t.Helper()
	pool, err := pgxdrain.New(context.Background(), dsn, append([]pgxdrain.Option{silent}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func withParams(dsn, params string) string {
	switch {
	case params == "":
		return dsn
	case strings.Contains(dsn, "?"):
		return dsn + "&" + params
	default:
		return dsn + "?" + params
	}
}

// eventually waits for something that no event tells of.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain: %s", timeout, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// receive waits for what should come at once.
func receive[T any](t testing.TB, what string, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(timeout):
		t.Fatalf("waited %v in vain: %s", timeout, what)
		panic("not reached")
	}
}

// startShutdown shuts pool down in the background and returns once it is in step. hurry ends the drain.
func startShutdown(t testing.TB, pool *pgxdrain.Pool, step pgxdrain.Step) (result <-chan error, hurry func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*timeout)
	t.Cleanup(cancel)
	done := make(chan error, 1)
	go func() { done <- pool.Shutdown(ctx) }()
	eventually(t, fmt.Sprintf("the shutdown is in step %q", step), func() bool { return pool.Report().Step == step })
	return done, cancel
}

// longGrace gives handlers on a slow machine the time to answer once a drain has been ended. A shutdown takes it only if one does not.
var longGrace = pgxdrain.WithCancelGrace(timeout)

// protocol is a way to speak HTTP.
type protocol string

const (
	overHTTP1 protocol = "HTTP/1.1"
	overTLS   protocol = "HTTP/2 over TLS"
	overH2C   protocol = "HTTP/2 without TLS"
)

// everyProtocol runs test once for each protocol.
func everyProtocol(t *testing.T, test func(t *testing.T, p protocol)) {
	t.Parallel()
	for _, p := range []protocol{overHTTP1, overTLS, overH2C} {
		t.Run(string(p), func(t *testing.T) {
			t.Parallel()
			test(t, p)
		})
	}
}

// server is a server with a client that speaks its protocol only.
type server struct {
	*httptest.Server
	client *http.Client
	log    *lockedBuffer // of the server's errors

	opened, closed atomic.Int64 // connections
}

func newServer(t testing.TB, p protocol, h http.Handler) *server {
	t.Helper()
	s := &server{Server: httptest.NewUnstartedServer(h), log: &lockedBuffer{}}
	s.Config.ErrorLog = log.New(s.log, "", 0)
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			s.opened.Add(1)
		case http.StateClosed, http.StateHijacked:
			s.closed.Add(1)
		}
	}
	switch p {
	case overHTTP1:
		s.Start()
		s.client = s.Client()
	case overTLS:
		s.EnableHTTP2 = true
		s.StartTLS()
		s.client = s.Client()
	case overH2C:
		var protocols http.Protocols
		protocols.SetUnencryptedHTTP2(true)
		s.Config.Protocols = &protocols
		s.Start()
		s.client = &http.Client{Transport: &http.Transport{Protocols: &protocols}}
	}
	s.client.Timeout = timeout
	t.Cleanup(func() {
		s.client.CloseIdleConnections()
		s.Close()
	})
	return s
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// response is a response that has been read to its end.
type response struct {
	*http.Response
	body string
	err  error
}

func read(resp *http.Response, err error) response {
	if err != nil {
		return response{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return response{resp, string(body), err}
}

// start sends a request in the background.
func (s *server) start(path string) <-chan response {
	done := make(chan response, 1)
	go func() { done <- read(s.client.Get(s.URL + path)) }()
	return done
}

func (s *server) get(t testing.TB, path string) response {
	t.Helper()
	r := receive(t, "a response", s.start(path))
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r
}

// checkSaysClose checks that the client was told not to use its connection again. net/http's HTTP/2 says it with a GOAWAY.
func (s *server) checkSaysClose(t testing.TB, p protocol, r response) {
	t.Helper()
	if p == overHTTP1 {
		if !r.Close {
			t.Errorf("%d without Connection: close", r.StatusCode)
		}
		return
	}
	eventually(t, "the server has sent a GOAWAY and the connection is closed", func() bool { return s.closed.Load() == s.opened.Load() })
}

func TestRequestThatHasBegunGoesOnAcquiringWhileNewOnesAreRefused(t *testing.T) {
	everyProtocol(t, func(t *testing.T, p protocol) {
		pool := newPool(t, "pool_max_conns=2")
		begun, goOn := make(chan struct{}), make(chan struct{})
		s := newServer(t, p, drainhttp.Middleware(pool, drainhttp.WithRetryAfter(1500*time.Millisecond))(
			http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				close(begun) // panics if a refused request comes here
				<-goOn
				for range 3 {
					if _, err := pool.Exec(r.Context(), "select 1"); err != nil {
						http.Error(w, err.Error(), http.StatusInternalServerError)
						return
					}
				}
				io.WriteString(w, "done")
			})))
		first := s.start("/")
		receive(t, "the request begins", begun)
		result, _ := startShutdown(t, pool, pgxdrain.StepDrain)

		refused := s.get(t, "/")
		h := refused.Header
		var body struct{ Error string }
		if err := json.Unmarshal([]byte(refused.body), &body); err != nil || body.Error == "" {
			t.Errorf("body %q: %v", refused.body, err)
		}
		if refused.StatusCode != http.StatusServiceUnavailable || h.Get("Retry-After") != "2" ||
			h.Get("Content-Type") != "application/json" || h.Get("Cache-Control") != "no-store" {
			t.Errorf("refused with %d %v", refused.StatusCode, h)
		}
		if p == overHTTP1 && !refused.Close {
			t.Error("refused without Connection: close")
		}

		close(goOn)
		r := receive(t, "the response", first)
		if r.err != nil || r.StatusCode != http.StatusOK || r.body != "done" {
			t.Fatalf("the request that had begun got %+v", r)
		}
		s.checkSaysClose(t, p, r)
		if err := receive(t, "Shutdown returns", result); err != nil {
			t.Error(err)
		}
		if report := pool.Report(); report.Drained != 1 || report.Refused != 1 {
			t.Errorf("drained %d, refused %d; want 1 of each", report.Drained, report.Refused)
		}
	})
}

func TestRequestsDuringTheInitialWaitAreServedAndToldToGoElsewhere(t *testing.T) {
	everyProtocol(t, func(t *testing.T, p protocol) {
		pool := newPool(t, "", pgxdrain.WithInitialWait(timeout/2))
		s := newServer(t, p, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/empty" {
				return
			}
			if _, err := pool.Exec(r.Context(), "select 1"); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
			}
			io.WriteString(w, "done")
		})))
		if r := s.get(t, "/"); r.StatusCode != http.StatusOK || r.Close {
			t.Fatalf("before the shutdown: %d, Connection: close is %v", r.StatusCode, r.Close)
		}
		startShutdown(t, pool, pgxdrain.StepUnready)
		for _, path := range []string{"/", "/empty"} {
			r := s.get(t, path)
			if r.StatusCode != http.StatusOK {
				t.Errorf("%s: %d %s", path, r.StatusCode, r.body)
			}
			s.checkSaysClose(t, p, r)
		}
		if n := s.opened.Load(); n != 2 { // the first request's, which is told, and one more
			t.Errorf("%d connections were opened, want 2", n)
		}
	})
}

// Each way of writing the header, in a request that began before the shutdown.
func TestEveryWayToWriteAHeaderSaysCloseWhenDraining(t *testing.T) {
	t.Parallel()
	ways := map[string]func(w http.ResponseWriter){
		"nothing":                 func(http.ResponseWriter) {},
		"WriteHeader":             func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) },
		"WriteHeader after a 103": func(w http.ResponseWriter) { w.WriteHeader(http.StatusEarlyHints); w.WriteHeader(http.StatusOK) },
		"Write":                   func(w http.ResponseWriter) { w.Write([]byte("x")) },
		"WriteString":             func(w http.ResponseWriter) { io.WriteString(w, "x") },
		"ReadFrom":                func(w http.ResponseWriter) { w.(io.ReaderFrom).ReadFrom(strings.NewReader("x")) },
		"Flush":                   func(w http.ResponseWriter) { w.(http.Flusher).Flush() },
		"FlushError":              func(w http.ResponseWriter) { http.NewResponseController(w).Flush() },
	}
	for name, write := range ways {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, "")
			begun, goOn := make(chan struct{}), make(chan struct{})
			s := newServer(t, overHTTP1, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				close(begun)
				<-goOn
				write(w)
			})))
			done := s.start("/")
			receive(t, "the request begins", begun)
			startShutdown(t, pool, pgxdrain.StepDrain)
			close(goOn)
			if r := receive(t, "the response", done); r.err != nil || !r.Close {
				t.Errorf("no Connection: close (err %v)", r.err)
			}
		})
	}
}

func TestHeaderThatWasWrittenBeforeTheDrainAndOneThatUpgradesAreLeftAlone(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_initial_wait=15s")
	begun, goOn := make(chan struct{}), make(chan struct{})
	s := newServer(t, overHTTP1, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/upgrade" {
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set("Upgrade", "echo")
			w.WriteHeader(http.StatusSwitchingProtocols)
			return
		}
		w.WriteHeader(http.StatusOK)
		w.Header().Set("Connection", "to be ignored")
		close(begun)
		<-goOn
		io.WriteString(w, "done")
		if got := w.Header().Get("Connection"); got != "to be ignored" { // the handler's own by now, other goroutines may read it
			t.Errorf("Connection was set to %q after the header had been written", got)
		}
	})))
	done := s.start("/")
	receive(t, "the header is written", begun)
	startShutdown(t, pool, pgxdrain.StepUnready)
	close(goOn)
	if r := receive(t, "the response", done); r.err != nil || r.Header.Get("Connection") != "" || r.body != "done" {
		t.Errorf("%+v", r)
	}
	conn := s.dial(t)
	fmt.Fprintf(conn, "GET /upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || strings.Join(resp.Header.Values("Connection"), ",") != "Upgrade" {
		t.Errorf("upgrade: %v %v", resp, err)
	}
}

// dial returns a connection to s, to speak over by hand.
func (s *server) dial(t testing.TB) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(timeout))
	return conn
}

// abilities are the methods that handlers, and http.ResponseController, look for in a ResponseWriter.
func abilities(w http.ResponseWriter) string {
	has := []bool{}
	add := func(ok bool) { has = append(has, ok) }
	_, ok := w.(http.Flusher)
	add(ok)
	_, ok = w.(interface{ FlushError() error })
	add(ok)
	_, ok = w.(http.Hijacker)
	add(ok)
	_, ok = w.(http.Pusher)
	add(ok)
	_, ok = w.(io.ReaderFrom)
	add(ok)
	_, ok = w.(io.StringWriter)
	add(ok)
	_, ok = w.(interface{ CloseNotify() <-chan bool })
	add(ok)
	_, ok = w.(interface{ SetReadDeadline(time.Time) error })
	add(ok)
	_, ok = w.(interface{ SetWriteDeadline(time.Time) error })
	add(ok)
	_, ok = w.(interface{ EnableFullDuplex() error })
	add(ok)
	return fmt.Sprint(has)
}

func TestHandlerCanDoWithItsResponseWriterWhatItCouldWithout(t *testing.T) {
	everyProtocol(t, func(t *testing.T, p protocol) {
		pool := newPool(t, "")
		show := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			told := abilities(w)
			if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(timeout)); err != nil {
				told = err.Error()
			}
			io.WriteString(w, told)
		})
		mux := http.NewServeMux()
		mux.Handle("/without", show)
		mux.Handle("/with", drainhttp.Middleware(pool)(show))
		mux.Handle("/nested", drainhttp.Middleware(pool)(drainhttp.Middleware(pool)(show)))
		s := newServer(t, p, mux)
		want := s.get(t, "/without").body
		for _, path := range []string{"/with", "/nested"} {
			if got := s.get(t, path).body; got != want {
				t.Errorf("%s:\n got %s\nwant %s", path, got, want)
			}
		}
	})
}

// countingWriter is another middleware's ResponseWriter, with a method of its own.
type countingWriter struct{ http.ResponseWriter }

func (countingWriter) Count() int { return 42 }

func TestResponseWriterOfAnotherMiddlewareIsPassedOnAsItIs(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "", pgxdrain.WithInitialWait(timeout/2))
	inner := drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, w.(interface{ Count() int }).Count())
	}))
	s := newServer(t, overHTTP1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inner.ServeHTTP(countingWriter{w}, r)
	}))
	if r := s.get(t, "/"); r.body != "42" || r.Close {
		t.Errorf("%q, Connection: close is %v", r.body, r.Close)
	}
	startShutdown(t, pool, pgxdrain.StepUnready)
	if r := s.get(t, "/"); r.body != "42" || !r.Close {
		t.Errorf("during the initial wait: %q, Connection: close is %v", r.body, r.Close)
	}
}

func TestContextOfARequestIsCancelledAtTheCancelStepWithCauseErrShuttingDown(t *testing.T) {
	everyProtocol(t, func(t *testing.T, p protocol) {
		pool := newPool(t, "", longGrace)
		begun, cause := make(chan struct{}), make(chan error, 1)
		s := newServer(t, p, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			close(begun)
			<-r.Context().Done()
			cause <- context.Cause(r.Context())
			http.Error(w, "ended", http.StatusServiceUnavailable)
		})))
		done := s.start("/")
		receive(t, "the request begins", begun)
		result, hurry := startShutdown(t, pool, pgxdrain.StepDrain)
		hurry()
		if err := receive(t, "the handler's context ends", cause); err != pgxdrain.ErrShuttingDown {
			t.Errorf("cause %v", err)
		}
		if r := receive(t, "the response", done); r.err != nil || r.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("%+v", r)
		}
		var e *pgxdrain.ShutdownError
		if err := receive(t, "Shutdown returns", result); !errors.As(err, &e) || e.Cancelled != 1 {
			t.Errorf("Shutdown returned %v, want one cancelled", err)
		}
	})
}

func TestHandlerBlockedInAStatementIsFreedWhenTheBudgetIsOver(t *testing.T) {
	everyProtocol(t, func(t *testing.T, p protocol) {
		pool := newPool(t, "", longGrace)
		s := newServer(t, p, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, err := pool.Exec(r.Context(), "select pg_sleep(1000)")
			var pgErr *pgconn.PgError
			if !errors.As(err, &pgErr) || pgErr.Code != "57014" {
				t.Errorf("the statement ended with %v", err)
			}
			w.WriteHeader(http.StatusServiceUnavailable)
		})))
		done := s.start("/")
		eventually(t, "the statement runs", func() bool {
			for _, op := range pool.Active() {
				if op.State == pgxdrain.StateActive {
					return true
				}
			}
			return false
		})
		result, hurry := startShutdown(t, pool, pgxdrain.StepDrain)
		hurry()
		if r := receive(t, "the response", done); r.err != nil || r.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("%+v", r)
		}
		if err := receive(t, "Shutdown returns", result); err == nil {
			t.Error("Shutdown returned nil although it had to cancel")
		}
	})
}

func TestNestedMiddlewareHoldsTheRequestAndItsPart(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	middleware := drainhttp.Middleware(pool)
	begun, goOn := make(chan struct{}), make(chan struct{})
	h := middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		<-goOn
		inner := middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { // begins while new work is refused
			if _, err := pool.Exec(r.Context(), "select 1"); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
			}
		}))
		inner.ServeHTTP(w, r)
	}))
	s := newServer(t, overHTTP1, h)
	done := s.start("/")
	receive(t, "the request begins", begun)
	result, _ := startShutdown(t, pool, pgxdrain.StepDrain)
	close(goOn)
	if r := receive(t, "the response", done); r.err != nil || r.StatusCode != http.StatusOK || !r.Close {
		t.Errorf("%+v", r)
	}
	if err := receive(t, "Shutdown returns", result); err != nil {
		t.Error(err)
	}
}

func TestPanicGoesThroughUnchangedAndEndsTheUnitOfWork(t *testing.T) {
	t.Parallel()
	for name, value := range map[string]any{"a value": "thrown", "http.ErrAbortHandler": http.ErrAbortHandler} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, "")
			begun, goOn, caught := make(chan struct{}), make(chan struct{}), make(chan any, 1)
			h := drainhttp.Middleware(pool)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				close(begun)
				<-goOn
				panic(value)
			}))
			s := newServer(t, overHTTP1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				defer func() {
					p := recover()
					caught <- p
					panic(p)
				}()
				h.ServeHTTP(w, r)
			}))
			done := s.start("/")
			receive(t, "the request begins", begun)
			result, _ := startShutdown(t, pool, pgxdrain.StepDrain)
			close(goOn)
			if got := receive(t, "the panic", caught); got != value {
				t.Errorf("panic %v, want %v", got, value)
			}
			if r := receive(t, "the end", done); r.err == nil {
				t.Errorf("the client got %d", r.StatusCode)
			}
			if err := receive(t, "Shutdown returns", result); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestStreamGoesOnWhileDrainingAndEndsAtTheCancelStep(t *testing.T) {
	everyProtocol(t, func(t *testing.T, p protocol) {
		pool := newPool(t, "", longGrace)
		events := make(chan string)
		s := newServer(t, p, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			for {
				select {
				case e := <-events:
					fmt.Fprintf(w, "data: %s\n\n", e)
				case <-r.Context().Done():
					fmt.Fprintf(w, "data: %v\n\n", context.Cause(r.Context()))
					return
				}
				w.(http.Flusher).Flush()
			}
		})))
		go func() { events <- "one" }()
		resp, err := s.client.Get(s.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		lines := bufio.NewScanner(resp.Body)
		next := func() string {
			lines.Scan()
			line := lines.Text()
			lines.Scan()
			return line
		}
		if got := next(); got != "data: one" {
			t.Errorf("got %q", got)
		}
		result, hurry := startShutdown(t, pool, pgxdrain.StepDrain)
		go func() { events <- "two" }()
		if got := next(); got != "data: two" {
			t.Errorf("while draining: %q", got)
		}
		hurry()
		if got := next(); got != "data: "+pgxdrain.ErrShuttingDown.Error() {
			t.Errorf("last event %q", got)
		}
		var e *pgxdrain.ShutdownError
		if err := receive(t, "Shutdown returns", result); !errors.As(err, &e) || e.Cancelled != 1 {
			t.Errorf("Shutdown returned %v, want one cancelled", err)
		}
	})
}

// hijack takes the connection over, for a protocol of lines that echo serves.
func hijack(w http.ResponseWriter) (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return nil, nil, err
	}
	fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	return conn, rw, rw.Flush()
}

func echo(rw *bufio.ReadWriter) {
	for {
		line, err := rw.ReadString('\n')
		if err != nil {
			return
		}
		rw.WriteString(line)
		rw.Flush()
	}
}

// upgraded returns a connection that a handler has taken over.
func (s *server) upgraded(t *testing.T) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn := s.dial(t)
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("upgrade: %v %v", resp, err)
	}
	return conn, r
}

func checkEcho(t *testing.T, conn net.Conn, r *bufio.Reader) {
	t.Helper()
	fmt.Fprintln(conn, "hello")
	if line, err := r.ReadString('\n'); line != "hello\n" {
		t.Errorf("echo %q, %v", line, err)
	}
}

func TestHijackedConnectionIsHeldUntilItsHandlerReturns(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	var header http.Header
	s := newServer(t, overHTTP1, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, rw, err := hijack(w)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		header = w.Header()
		echo(rw)
	})))
	conn, r := s.upgraded(t)
	result, _ := startShutdown(t, pool, pgxdrain.StepDrain)
	checkEcho(t, conn, r)
	if n := len(pool.Active()); n != 1 {
		t.Errorf("%d active while the handler has the connection, want 1", n)
	}
	conn.Close()
	if err := receive(t, "Shutdown returns", result); err != nil {
		t.Error(err)
	}
	if len(header) != 0 {
		t.Errorf("%v was set after the connection had been taken over", header)
	}
}

func TestHijackedConnectionWhoseHandlerHasReturnedOrPanickedIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(){
		"returned": func() {},
		"panicked": func() { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := newPool(t, "")
			var echoing sync.WaitGroup
			s := newServer(t, overHTTP1, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				conn, rw, err := hijack(w)
				if err != nil {
					t.Error(err)
					return
				}
				echoing.Go(func() {
					defer conn.Close()
					echo(rw)
				})
				end()
			})))
			conn, r := s.upgraded(t)
			checkEcho(t, conn, r)
			result, _ := startShutdown(t, pool, pgxdrain.StepClosed)
			if err := receive(t, "Shutdown returns", result); err != nil {
				t.Error(err)
			}
			checkEcho(t, conn, r)
			conn.Close()
			echoing.Wait()
		})
	}
}

func TestClientThatGoesAwayWhileDrainingEndsItsUnitOfWork(t *testing.T) {
	everyProtocol(t, func(t *testing.T, p protocol) {
		pool := newPool(t, "")
		begun, cause := make(chan struct{}), make(chan error, 1)
		s := newServer(t, p, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			close(begun)
			_, err := pool.Exec(r.Context(), "select pg_sleep(1000)")
			if err == nil {
				t.Error("the statement has ended by itself")
			}
			cause <- context.Cause(r.Context())
		})))
		ctx, leave := context.WithCancel(context.Background())
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan response, 1)
		go func() { done <- read(s.client.Do(req)) }()
		receive(t, "the request begins", begun)
		result, _ := startShutdown(t, pool, pgxdrain.StepDrain)
		leave()
		receive(t, "the client has left", done)
		if err := receive(t, "the handler's context ends", cause); err != context.Canceled {
			t.Errorf("cause %v, want that of a client that has gone", err)
		}
		if err := receive(t, "Shutdown returns", result); err != nil {
			t.Error(err)
		}
	})
}

func TestRefusedRequestWithABodyGetsItsAnswer(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	pool.Close()
	s := newServer(t, overHTTP1, drainhttp.Middleware(pool)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("the handler was called")
	})))

	t.Run("that waits for 100 Continue", func(t *testing.T) {
		conn := s.dial(t)
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
		checkRefused(t, read(http.ReadResponse(bufio.NewReader(conn), nil))) // at once, without a 100 before it
	})
	t.Run("that is sent whole before the answer is read", func(t *testing.T) {
		conn := s.dial(t)
		body := strings.Repeat("x", 200<<10)
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		r := bufio.NewReader(conn)
		checkRefused(t, read(http.ReadResponse(r, nil)))
		if _, err := r.ReadByte(); err != io.EOF {
			t.Errorf("after the refusal: %v, want EOF", err)
		}
	})
	t.Run("of 64 MB from Go's client", func(t *testing.T) {
		checkRefused(t, read(s.client.Post(s.URL, "text/plain", io.LimitReader(zeros{}, 64<<20))))
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func checkRefused(t *testing.T, r response) {
	t.Helper()
	if r.err != nil || r.StatusCode != http.StatusServiceUnavailable || !r.Close || !strings.Contains(r.body, "error") {
		t.Errorf("%+v", r)
	}
}

func TestHTTP10ClientThatKeepsItsConnectionIsToldToo(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "", pgxdrain.WithInitialWait(timeout/2))
	s := newServer(t, overHTTP1, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "4")
		io.WriteString(w, "done")
	})))
	conn := s.dial(t)
	r := bufio.NewReader(conn)
	get := func() response {
		fmt.Fprintf(conn, "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
		return read(http.ReadResponse(r, nil))
	}
	if r := get(); r.err != nil || r.Header.Get("Connection") != "keep-alive" {
		t.Errorf("before: %+v", r)
	}
	startShutdown(t, pool, pgxdrain.StepUnready)
	if r := get(); r.err != nil || r.Header.Get("Connection") != "close" || r.body != "done" {
		t.Errorf("during the initial wait: %+v", r)
	}
}

func TestPipelinedRequestIsAnsweredAndTheRestIsTheClientsToSendAgain(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "")
	begun, goOn := make(chan struct{}), make(chan struct{})
	s := newServer(t, overHTTP1, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(begun) // panics the second time
		<-goOn
		io.WriteString(w, "done")
	})))
	conn := s.dial(t)
	fmt.Fprint(conn, strings.Repeat("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 3))
	receive(t, "the first begins", begun)
	result, _ := startShutdown(t, pool, pgxdrain.StepDrain)
	close(goOn)
	r := bufio.NewReader(conn)
	if first := read(http.ReadResponse(r, nil)); first.err != nil || !first.Close || first.body != "done" {
		t.Errorf("%+v", first)
	}
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("after the response that says close: %v, want EOF", err)
	}
	if err := receive(t, "Shutdown returns", result); err != nil {
		t.Error(err)
	}
}

// Every request gets all of a 200, or a 503 after which its connection is closed, as long as the http.Server is up.
func TestStress_RequestsAcrossAShutdownAreServedOrRefused(t *testing.T) {
	everyProtocol(t, func(t *testing.T, p protocol) {
		for _, wait := range []time.Duration{0, 100 * time.Millisecond} {
			t.Run(fmt.Sprintf("initial wait %v", wait), func(t *testing.T) {
				t.Parallel()
				const clients, body = 16, "0123456789abcdef"
				pool := newPool(t, "pool_max_conns=4", pgxdrain.WithInitialWait(wait))
				s := newServer(t, p, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					for range 2 {
						if _, err := pool.Exec(r.Context(), "select 1"); err != nil {
							http.Error(w, err.Error(), http.StatusInternalServerError)
							return
						}
					}
					for range 1 << 10 { // more than net/http buffers
						io.WriteString(w, body)
					}
				})))
				var served, refused atomic.Int64
				var running sync.WaitGroup
				for range clients {
					running.Go(func() {
						for after := 0; after < 3; { // go on for a while once it refuses
							r := read(s.client.Get(s.URL))
							switch {
							case r.err != nil:
								t.Error(r.err)
								return
							case r.StatusCode == http.StatusOK && len(r.body) == len(body)<<10:
								served.Add(1)
							case r.StatusCode == http.StatusServiceUnavailable && (r.Close || p != overHTTP1):
								refused.Add(1)
								after++
							default:
								t.Errorf("%d, Connection: close is %v, body of %d bytes: %.100s", r.StatusCode, r.Close, len(r.body), r.body)
								return
							}
						}
					})
				}
				eventually(t, "the load is there", func() bool { return served.Load() > 10*clients })
				if err := pool.Shutdown(context.Background()); err != nil {
					t.Error(err)
				}
				running.Wait()
			})
		}
	})
}

func TestRequestsThatHaveBegunAreServedWhicheverIsShutDownFirst(t *testing.T) {
	everyProtocol(t, func(t *testing.T, p protocol) {
		for _, order := range []string{"server, pool", "pool, server", "both"} {
			t.Run(order, func(t *testing.T) {
				t.Parallel()
				const requests = 8
				pool := newPool(t, "pool_max_conns=2")
				var begun sync.WaitGroup
				begun.Add(requests)
				goOn := make(chan struct{})
				s := newServer(t, p, drainhttp.Middleware(pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/first" {
						return
					}
					begun.Done()
					<-goOn
					if _, err := pool.Exec(r.Context(), "select 1"); err != nil {
						http.Error(w, err.Error(), http.StatusInternalServerError)
						return
					}
					io.WriteString(w, "done")
				})))
				// So that all go over one connection where they can: of several, dialed at once, net/http's client leaves some unused,
				// for which Server.Shutdown can wait for ever over HTTP/2.
				s.get(t, "/first")
				var done []<-chan response
				for range requests {
					done = append(done, s.start("/"))
				}
				begun.Wait()

				ctx, cancel := context.WithTimeout(context.Background(), timeout)
				defer cancel()
				serverStops := make(chan struct{})
				s.Config.RegisterOnShutdown(func() { close(serverStops) })
				stopServer := func() error { return s.Config.Shutdown(ctx) }
				stopPool := func() error { return pool.Shutdown(ctx) }
				results := make(chan error, 2)
				go func() {
					switch order {
					case "server, pool":
						results <- stopServer()
						results <- stopPool()
					case "pool, server":
						results <- stopPool()
						results <- stopServer()
					case "both":
						go func() { results <- stopServer() }()
						results <- stopPool()
					}
				}()
				switch order {
				case "server, pool":
					receive(t, "the server stops", serverStops)
				case "pool, server":
					receive(t, "the pool drains", pool.Draining())
				case "both":
					receive(t, "the server stops", serverStops)
					receive(t, "the pool drains", pool.Draining())
				}
				close(goOn)
				for _, d := range done {
					if r := receive(t, "a response", d); r.err != nil || r.StatusCode != http.StatusOK || r.body != "done" {
						t.Errorf("%+v", r)
					}
				}
				for range 2 {
					if err := receive(t, "both have stopped", results); err != nil {
						t.Error(err)
					}
				}
			})
		}
	})
}
