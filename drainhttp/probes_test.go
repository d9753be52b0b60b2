package drainhttp_test

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/drainhttp"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// probes serves both probes of pool.
func probes(t testing.TB, pool *pgxdrain.Pool, opts ...drainhttp.ReadyOption) *server {
	mux := http.NewServeMux()
	mux.Handle("/readyz", drainhttp.Ready(pool, opts...))
	mux.Handle("/livez", drainhttp.Live(pool))
	return newServer(t, overHTTP1, mux)
}

func (s *server) checkProbe(t testing.TB, path string, status int, want map[string]any) {
	t.Helper()
	checkProbed(t, s.get(t, path), status, want)
}

func checkProbed(t testing.TB, r response, status int, want map[string]any) {
	t.Helper()
	var got map[string]any
	if err := json.Unmarshal([]byte(r.body), &got); err != nil {
		t.Fatalf("%q: %v", r.body, err)
	}
	same := len(got) == len(want)
	for k, v := range want {
		same = same && got[k] == v
	}
	if r.StatusCode != status || !same || r.Header.Get("Content-Type") != "application/json" || r.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("got %d %v %v, want %d %v", r.StatusCode, got, r.Header, status, want)
	}
}

const shuttingDown = "pgxdrain: pool is shutting down"

func TestReadyFailsFromTheCallOfShutdownOnAndLiveDoesNot(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "", pgxdrain.WithInitialWait(timeout/2))
	s := probes(t, pool, drainhttp.WithDatabaseCheck(timeout))
	s.checkProbe(t, "/readyz", http.StatusOK, map[string]any{"ready": true, "step": "open"})
	s.checkProbe(t, "/livez", http.StatusOK, map[string]any{"live": true, "step": "open"})

	_, release, err := pool.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	result, hurry := startShutdown(t, pool, pgxdrain.StepUnready)
	s.checkProbe(t, "/readyz", http.StatusServiceUnavailable, map[string]any{"ready": false, "step": "unready", "reason": shuttingDown})
	s.checkProbe(t, "/livez", http.StatusOK, map[string]any{"live": true, "step": "unready"})
	if _, err := pool.Exec(t.Context(), "select 1"); err != nil {
		t.Errorf("refused during the initial wait: %v", err)
	}

	release()
	hurry()
	receive(t, "Shutdown returns", result)
	s.checkProbe(t, "/readyz", http.StatusServiceUnavailable, map[string]any{"ready": false, "step": "closed", "reason": shuttingDown})
	s.checkProbe(t, "/livez", http.StatusOK, map[string]any{"live": true, "step": "closed"})
	if refused := pool.Report().Refused; refused != 0 {
		t.Errorf("the probes count as %d refused", refused)
	}
}

func TestDatabaseCheckIsDoneByItsBoundOnAnExhaustedPool(t *testing.T) {
	t.Parallel()
	pool := newPool(t, "pool_max_conns=1")
	conn := acquire(t, pool)
	s := probes(t, pool, drainhttp.WithDatabaseCheck(50*time.Millisecond))
	s.checkProbe(t, "/readyz", http.StatusServiceUnavailable,
		map[string]any{"ready": false, "step": "open", "reason": "the database check was not done within 50ms"})
	conn.Release()
	slow := probes(t, pool, drainhttp.WithDatabaseCheck(timeout))
	slow.checkProbe(t, "/readyz", http.StatusOK, map[string]any{"ready": true, "step": "open"})
}

func TestDatabaseCheckIsDoneByItsBoundAlthoughAHookHangs(t *testing.T) {
	t.Parallel()
	config, err := pgxpool.ParseConfig(pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	hang := make(chan struct{})
	config.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) {
		<-hang
		return true, nil
	}
	pool, err := pgxdrain.NewWithConfig(t.Context(), config, silent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	t.Cleanup(func() { close(hang) })
	s := probes(t, pool, drainhttp.WithDatabaseCheck(50*time.Millisecond))
	for range 3 {
		s.checkProbe(t, "/readyz", http.StatusServiceUnavailable,
			map[string]any{"ready": false, "step": "open", "reason": "the database check was not done within 50ms"})
	}
	if n := pool.Report().Waiting; n != 1 {
		t.Errorf("%d checks under way, want the one that hangs", n)
	}
}

// acquireCounter is a user's tracer that counts acquisitions.
type acquireCounter struct{ started atomic.Int64 }

func (c *acquireCounter) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	c.started.Add(1)
	return ctx
}
func (*acquireCounter) TraceAcquireEnd(context.Context, *pgxpool.Pool, pgxpool.TraceAcquireEndData) {}
func (*acquireCounter) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (*acquireCounter) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func TestProbesShareOneCheckAndShutdownBreaksItOff(t *testing.T) {
	t.Parallel()
	config, err := pgxpool.ParseConfig(withParams(pgtest.Database(t), "pool_max_conns=1"))
	if err != nil {
		t.Fatal(err)
	}
	counter := &acquireCounter{}
	config.ConnConfig.Tracer = counter
	pool, err := pgxdrain.NewWithConfig(t.Context(), config, silent, pgxdrain.WithInitialWait(timeout/2))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	conn := acquire(t, pool)

	const n = 20
	var come atomic.Int64
	ready := drainhttp.Ready(pool, drainhttp.WithDatabaseCheck(time.Hour))
	s := newServer(t, overHTTP1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		come.Add(1)
		ready.ServeHTTP(w, r)
	}))
	var probed []<-chan response
	for range n {
		probed = append(probed, s.start("/"))
	}
	eventually(t, "all probes have come and the check waits for a connection", func() bool {
		return come.Load() == n && pool.Report().Waiting > 0
	})

	result, hurry := startShutdown(t, pool, pgxdrain.StepUnready)
	for _, p := range probed {
		checkProbed(t, receive(t, "the probe", p), http.StatusServiceUnavailable,
			map[string]any{"ready": false, "step": "unready", "reason": shuttingDown})
	}
	if started := counter.started.Load(); started != 2 {
		t.Errorf("%d acquisitions, want the test's and one check's", started)
	}
	eventually(t, "the check has left", func() bool { return pool.Report().Waiting == 0 })
	conn.Release()
	hurry()
	if err := receive(t, "Shutdown returns", result); err != nil {
		t.Error(err)
	}
}

func TestDatabaseCheckSaysWhatIsWrongWithoutTheDriversWords(t *testing.T) {
	t.Parallel()
	with := func(change func(u *url.URL)) string {
		u, err := url.Parse(pgtest.Database(t))
		if err != nil {
			t.Fatal(err)
		}
		change(u)
		return u.String()
	}
	for name, c := range map[string]struct{ dsn, reason string }{
		"no server": {
			with(func(u *url.URL) { u.Host, u.User = "127.0.0.1:1", url.UserPassword("somebody", "hunter2") }),
			"the database cannot be reached",
		},
		"no such database": {
			with(func(u *url.URL) { u.Path = "/nowhere" }),
			"the database refused the check: SQLSTATE 3D000",
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := probes(t, openPool(t, c.dsn), drainhttp.WithDatabaseCheck(timeout))
			r := s.get(t, "/readyz")
			checkProbed(t, r, http.StatusServiceUnavailable, map[string]any{"ready": false, "step": "open", "reason": c.reason})
			for _, secret := range []string{"hunter2", "somebody", "127.0.0.1", "nowhere"} {
				if strings.Contains(r.body, secret) {
					t.Errorf("%q is in %s", secret, r.body)
				}
			}
		})
	}
}

func TestOptionsRefuseDurationsThatMeanNothing(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]func(){
		"WithRetryAfter":    func() { drainhttp.WithRetryAfter(-1) },
		"WithDatabaseCheck": func() { drainhttp.WithDatabaseCheck(0) },
	} {
		func() {
			defer func() {
				if p, _ := recover().(string); !strings.Contains(p, name) {
					t.Errorf("%s: panic %q does not name it", name, p)
				}
			}()
			f()
		}()
	}
}
