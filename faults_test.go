//go:build unix

package pgxdrain_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// leftAtMost is how long after a fault was lifted something of a pool may still run: pgconn gives itself 15 s to close a
// connection in the background.
const leftAtMost = 15*time.Second + late

// labelled runs f so that running finds the goroutines that come of it: a goroutine inherits the labels of the one that starts
// it. goleak cannot tell them from those of the tests that run at the same time.
func labelled(label string, f func()) {
	pprof.Do(context.Background(), pprof.Labels("pgxdrain", label), func(context.Context) { f() })
}

// running returns the stacks of the goroutines under label.
func running(label string) string {
	var b bytes.Buffer
	_ = pprof.Lookup("goroutine").WriteTo(&b, 1)
	var found []string
	for _, stack := range strings.Split(b.String(), "\n\n") {
		if strings.Contains(stack, fmt.Sprintf(`"pgxdrain":%q`, label)) {
			found = append(found, stack)
		}
	}
	return strings.Join(found, "\n\n")
}

// site is a server and the pools that are in front of it when the fault strikes.
type site struct {
	*testing.T
	name    string
	server  *pgtest.Server
	look    *pgx.Conn // past the network
	victims []*victim
	once    sync.Once // of a fault that strikes everywhere
}

// victim is a pool in the middle of something.
type victim struct {
	*testing.T
	site    *site
	label   string // of its goroutines, its sessions, and its tables
	moment  *moment
	network *proxy
	pool    *pgxdrain.Pool
	strike  func()
	struck  chan struct{} // closed when the fault has struck

	dialHangs atomic.Bool
	dialOpens chan struct{} // closed when it hangs no more

	result chan error // of Shutdown
	took   time.Duration
	over   chan struct{}
	calls  []*call
	giveUp context.CancelFunc

	goneAfter time.Duration // after the fault was lifted
	left      string        // the goroutines that were left even then
}

// call is something that a caller of the pool does in a goroutine of its own.
type call struct {
	err   error
	ended chan struct{}
}

func (v *victim) call(f func() error) *call {
	c := &call{ended: make(chan struct{})}
	v.calls = append(v.calls, c)
	go func() {
		defer close(c.ended)
		c.err = f()
	}()
	return c
}

// sessions counts the server's sessions of v's pool for which cond, in SQL, holds.
func (v *victim) sessions(cond string) (n int) {
	err := v.site.look.QueryRow(context.Background(),
		"select count(*) from pg_stat_activity where application_name = $1 and "+cond, v.label).Scan(&n)
	if err != nil {
		v.Fatal(err)
	}
	return n
}

// A moment is what a pool is in the middle of when a fault strikes.
type moment struct {
	name   string
	enter  func(*victim)
	struck func(*victim) // what is done once the fault has struck
	late   bool          // the fault strikes only in the shutdown

	// What the report says of the operation, if the fault itself ends nothing; none if empty.
	outcome pgxdrain.Outcome
	// A row that must be there once the fault was lifted, if the fault itself ends nothing.
	row bool
	// The error of the call is the caller's own.
	own error
	// On every acquisition of an idle connection it is pinged.
	ping bool
	// The server is left with a statement that it can only be asked to cancel, which the fault prevents: it runs on.
	busy bool
}

func (v *victim) warm() {
	var held []*pgxpool.Conn
	for range 3 {
		held = append(held, acquire(v, v.pool))
	}
	for _, c := range held {
		c.Release()
	}
	eventually(v, "they are idle", func() bool { return v.pool.Stat().IdleConns() == 3 })
}

func (v *victim) sleep(ctx context.Context) *call {
	c := v.call(func() error {
		_, err := v.pool.Exec(ctx, "select pg_sleep(60)")
		return err
	})
	eventually(v, "it runs", func() bool { return v.sessions("state = 'active' and query ~ 'pg_sleep'") == 1 })
	return c
}

func (v *victim) waitWaiting(n int) {
	eventually(v, "they wait, or have failed", func() bool {
		for _, c := range v.calls {
			select {
			case <-c.ended:
				return true
			default:
			}
		}
		return v.pool.Report().Waiting == n
	})
}

var moments = []*moment{
	{
		name:  "idle connections only",
		enter: (*victim).warm,
	},
	{
		name:    "statement",
		enter:   func(v *victim) { v.sleep(context.Background()) },
		outcome: pgxdrain.OutcomeUnknown,
		busy:    true,
	},
	{
		name: "idle in transaction",
		enter: func(v *victim) {
			ctx := context.Background()
			tx := must[pgx.Tx](v)(v.pool.Begin(ctx))
			if _, err := tx.Exec(ctx, "create table "+v.label+" (n int)"); err != nil {
				v.Fatal(err)
			}
			v.call(func() error {
				<-v.over
				_, err := tx.Exec(ctx, "select 1")
				_ = tx.Rollback(ctx)
				return err
			})
		},
		outcome: pgxdrain.OutcomeLeaked,
	},
	{
		name: "COMMIT",
		enter: func(v *victim) {
			slowCommit(v, v.site.look, v.label, "8")
			ctx := context.Background()
			v.call(func() error {
				return pgx.BeginFunc(ctx, v.pool, func(tx pgx.Tx) error {
					_, err := tx.Exec(ctx, "insert into "+v.label+" values (1)")
					return err
				})
			})
			eventually(v, "it commits", func() bool { return v.sessions("state = 'active' and query = 'commit'") == 1 })
		},
		outcome: pgxdrain.OutcomeUnknown,
		row:     true,
	},
	{
		name: "COPY that blocks in a write",
		enter: func(v *victim) {
			if _, err := v.site.look.Exec(context.Background(), "create unlogged table "+v.label+" (t text)"); err != nil {
				v.Fatal(err)
			}
			row, rows := []any{strings.Repeat("x", 64<<10)}, 0
			flows := make(chan struct{})
			v.call(func() error {
				_, err := v.pool.CopyFrom(context.Background(), pgx.Identifier{v.label}, []string{"t"},
					pgx.CopyFromFunc(func() ([]any, error) {
						if rows++; rows == 10 {
							close(flows)
						}
						return row, nil
					}))
				return err
			})
			<-flows
		},
		outcome: pgxdrain.OutcomeUnknown,
	},
	{
		name:  "ping of an idle connection",
		enter: (*victim).warm,
		struck: func(v *victim) {
			for range 2 {
				v.call(func() error { return v.pool.Ping(context.Background()) })
			}
			v.waitWaiting(2)
		},
		ping: true,
	},
	{
		name:  "connecting",
		enter: func(*victim) {},
		struck: func(v *victim) {
			for range 6 { // more than there may be connections
				v.call(func() error { return v.pool.Ping(context.Background()) })
			}
			v.waitWaiting(6)
		},
	},
	{
		name: "statement that its caller has given up",
		enter: func(v *victim) {
			ctx, cancel := context.WithCancel(context.Background())
			v.sleep(ctx)
			v.giveUp = cancel
		},
		struck: func(v *victim) {
			v.giveUp()
			<-v.calls[0].ended
		},
		own:  context.Canceled,
		busy: true,
	},
	{
		name:    "cancel request",
		enter:   func(v *victim) { v.network.onCancel = v.strike; v.sleep(context.Background()) },
		late:    true,
		outcome: pgxdrain.OutcomeUnknown,
		busy:    true,
	},
	{
		name:  "Terminate",
		enter: func(v *victim) { v.network.onTerminate = v.strike; v.warm() },
		late:  true,
	},
}

type fault struct {
	name   string
	strike func(*victim)
	lift   func(*victim)

	ends       bool // it ends connections by itself, so that callers have the network's error and not ours
	signals    bool // it needs the server's processes
	everywhere bool // it strikes all that is at the site at once
	noServer   bool // there is none after it
	noCancel   bool // no cancel request comes to the server, not even late
	without    string
}

var faults = []fault{
	{
		name:    "backend stopped",
		strike:  func(v *victim) { v.site.signalBackends(v, syscall.SIGSTOP) },
		lift:    func(v *victim) { v.site.signalBackends(v, syscall.SIGCONT) },
		signals: true,
		without: "connecting", // there is no backend yet: see postmaster stopped
	},
	{
		name:       "postmaster stopped",
		strike:     func(v *victim) { v.site.signal(syscall.SIGSTOP, v.site.server.PostmasterPID()) },
		lift:       func(v *victim) { v.site.signal(syscall.SIGCONT, v.site.server.PostmasterPID()) },
		signals:    true,
		everywhere: true,
		// The backend works on, so the COPY goes on, and the ping succeeds.
		without: "COPY that blocks in a write, ping of an idle connection",
	},
	{
		name:   "network swallows everything",
		strike: func(v *victim) { v.network.swallow(toServer, toClient) },
		lift:   func(v *victim) { v.network.resume() },
	},
	{
		name:   "network swallows what the server says",
		strike: func(v *victim) { v.network.swallow(toClient) },
		lift:   func(v *victim) { v.network.resume() },
		// The server takes the COPY; and it cancels the statement, whose caller hears nothing of it.
		without: "COPY that blocks in a write",
	},
	{
		name: "network swallows everything, SYN packets too",
		strike: func(v *victim) {
			v.network.swallow(toServer, toClient)
			v.dialHangs.Store(true)
		},
		lift: func(v *victim) {
			v.dialHangs.Store(false)
			close(v.dialOpens)
			v.network.resume()
		},
		noCancel: true,
		without:  "cancel request", // it is not even dialed
	},
	{
		name:     "connections reset",
		strike:   func(v *victim) { v.network.reset() },
		lift:     func(v *victim) { v.network.resume() },
		ends:     true,
		noCancel: true,
	},
	{
		name:       "server killed",
		strike:     func(v *victim) { v.site.killServer() },
		lift:       func(*victim) {},
		ends:       true,
		signals:    true,
		everywhere: true,
		noServer:   true,
	},
}

func (s *site) signal(signal syscall.Signal, pids ...int) {
	for _, pid := range pids {
		if err := syscall.Kill(pid, signal); err != nil {
			s.Errorf("%v to %d: %v", signal, pid, err)
		}
	}
}

func (s *site) signalBackends(v *victim, signal syscall.Signal) {
	s.signal(signal, s.backends(v)...)
}

// backends returns the process IDs of the sessions of v's pool.
func (s *site) backends(v *victim) []int {
	rows, err := s.look.Query(context.Background(), "select pid from pg_stat_activity where application_name = $1", v.label)
	if err != nil {
		s.Fatal(err)
	}
	return must[[]int](s)(pgx.CollectRows(rows, pgx.RowTo[int]))
}

// killServer kills the postmaster and its children, so that none gets to say a word.
func (s *site) killServer() {
	postmaster := s.server.PostmasterPID()
	s.signal(syscall.SIGSTOP, postmaster) // it has no more children from here on
	pids := []int{postmaster}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, stat := range stats {
		text, _ := os.ReadFile(stat)
		_, after, _ := strings.Cut(string(text), ") ") // state, parent, …
		if f := strings.Fields(after); len(f) > 1 && f[1] == strconv.Itoa(postmaster) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(stat)))
			pids = append(pids, pid)
		}
	}
	s.signal(syscall.SIGKILL, pids...)
}

func newSite(t *testing.T, name string, server *pgtest.Server, f fault) *site {
	t.Helper()
	if f.signals && server.PostmasterPID() == 0 {
		t.Skip("needs a local server (PGXDRAIN_POSTGRES=local): the processes of this one are not ours to signal")
	}
	s := &site{T: t, name: name, server: server, look: must[*pgx.Conn](t)(pgx.Connect(t.Context(), server.DSN()))}
	t.Cleanup(func() { s.look.Close(context.Background()) })
	return s
}

// enter makes a pool that is in the middle of m.
func (s *site) enter(m *moment, f fault) {
	v := &victim{
		T: s.T, site: s, moment: m, label: fmt.Sprintf("%s_%d", s.name, len(s.victims)),
		struck: make(chan struct{}), dialOpens: make(chan struct{}), result: make(chan error, 1), over: make(chan struct{}),
	}
	v.strike = sync.OnceFunc(func() {
		defer close(v.struck)
		if f.everywhere {
			s.once.Do(func() { f.strike(v) })
			return
		}
		f.strike(v)
	})
	s.victims = append(s.victims, v)
	network, dsn := newProxy(s, s.server.DSN())
	v.network = network
	config := must[*pgxpool.Config](s)(pgxpool.ParseConfig(
		withParams(dsn, "pool_drain_timeout=1500ms&pool_cancel_grace=1s&pool_max_conns=4&application_name="+v.label)))
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if v.dialHangs.Load() { // as a connect does whose packets are lost
			select {
			case <-v.dialOpens:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		return dial(ctx, network, addr)
	}
	config.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return m.ping && v.hasStruck() }
	labelled(v.label, func() {
		v.pool = newPoolWithConfig(s, config)
		m.enter(v)
	})
}

func (v *victim) hasStruck() bool {
	select {
	case <-v.struck:
		return true
	default:
		return false
	}
}

func (v *victim) shutdown() {
	start := time.Now()
	err := v.pool.Shutdown(context.Background())
	v.took = time.Since(start)
	close(v.over)
	v.result <- err
}

func TestFaultHoldsUpNeitherTheReturnNorACallerAndNothingIsLeftOnceItIsLifted(t *testing.T) {
	t.Parallel()
	whole := pgtest.Private(t)
	for i, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			if !f.everywhere {
				newSite(t, fmt.Sprintf("f%d", i), whole, f).run(f, func(*moment) bool { return true })
				return
			}
			newSite(t, fmt.Sprintf("f%d", i), pgtest.Private(t), f).run(f, func(m *moment) bool { return !m.late })
			for _, late := range moments {
				if late.late {
					newSite(t, fmt.Sprintf("f%d", i), pgtest.Private(t), f).run(f, func(m *moment) bool { return m == late })
				}
			}
		})
	}
}

// run has a pool in the middle of each of the moments, strikes them, shuts them down at the same time, lifts the fault, and
// checks each.
func (s *site) run(f fault, which func(*moment) bool) {
	for _, m := range moments {
		if which(m) && !strings.Contains(f.without, m.name) {
			s.enter(m, f)
		}
	}
	for _, v := range s.victims {
		if !v.moment.late {
			v.strike()
		}
	}
	for _, v := range s.victims {
		labelled(v.label, func() {
			if v.moment.struck != nil {
				v.moment.struck(v)
			}
		})
	}
	for _, v := range s.victims {
		labelled(v.label, func() { go v.shutdown() })
	}
	for _, v := range s.victims {
		<-v.over
		for _, c := range v.calls {
			select {
			case <-c.ended:
			case <-time.After(late):
				s.Errorf("%s: a caller is still blocked:\n%s", v.moment.name, running(v.label))
			}
		}
	}
	for _, v := range s.victims {
		select {
		case <-v.struck: // that of Terminate may come when the client has left already
		case <-time.After(timeout):
			s.Errorf("the fault has not struck: %s", v.moment.name)
		}
		f.lift(v)
		if f.everywhere {
			break
		}
	}
	lifted := time.Now()
	for _, v := range s.victims {
		for v.left = running(v.label); v.left != "" && time.Since(lifted) < leftAtMost; v.left = running(v.label) {
			time.Sleep(5 * time.Millisecond)
		}
		v.goneAfter = time.Since(lifted)
	}
	for _, v := range s.victims {
		s.Run(v.moment.name, func(t *testing.T) {
			v.T = t
			v.check(f)
		})
	}
}

func (v *victim) check(f fault) {
	err := <-v.result
	r := v.pool.Report()
	checkReport(v, r)
	if v.took > r.Budget+late {
		v.Errorf("took %v, the budget is %v", v.took, r.Budget)
	}
	for _, c := range v.calls {
		<-c.ended
		switch {
		case v.moment.own != nil:
			if !errors.Is(c.err, v.moment.own) && !f.ends {
				v.Errorf("the caller got %v", c.err)
			}
		case c.err == nil:
			v.Error("the call succeeded")
		case f.ends: // the network's error, or ours, whichever came first
		case !errors.Is(c.err, pgxdrain.ErrShuttingDown):
			v.Errorf("the caller got %v (%T)", c.err, c.err)
		}
	}
	if !f.ends {
		if o := v.moment.outcome; o == "" && len(r.Operations) != 0 || o != "" && (len(r.Operations) != 1 || r.Operations[0].Outcome != o) {
			v.Errorf("want outcome %q, got %v: %+v", o, err, r.Operations)
		}
	}
	if v.left != "" {
		v.Errorf("still running %v after the fault was lifted:\n%s", leftAtMost, v.left)
	}
	v.Logf("Shutdown took %v of %v; nothing was left running %v after the fault was lifted; %v",
		v.took.Round(time.Millisecond), r.Budget, v.goneAfter.Round(time.Millisecond), err)
	if f.noServer {
		return
	}
	if v.moment.row {
		eventually(v, "the row is there", func() bool {
			var n int
			err := v.site.look.QueryRow(context.Background(), "select count(*) from "+v.label).Scan(&n)
			return err == nil && n == 1
		})
	}
	if v.moment.busy && f.noCancel {
		// Nothing tells the server that its client is gone, until it has an answer to give or client_connection_check_interval
		// is set.
		for _, pid := range v.site.backends(v) {
			if _, err := v.site.look.Exec(context.Background(), "select pg_terminate_backend($1)", pid); err != nil {
				v.Error(err)
			}
		}
	}
	eventually(v, "no session of ours is left", func() bool { return v.sessions("true") == 0 })
}

// Each hook hangs from the moment on when operations are in progress: a statement, a transaction that is left idle, and, for the
// hooks on the way to a connection, a caller in the hook.
func TestHooksThatHangHoldUpNeitherTheReturnNorOtherCallers(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*pgxpool.Config, func()){
		"BeforeClose":  func(c *pgxpool.Config, hook func()) { c.BeforeClose = func(*pgx.Conn) { hook() } },
		"AfterRelease": func(c *pgxpool.Config, hook func()) { c.AfterRelease = func(*pgx.Conn) bool { hook(); return true } },
		"PrepareConn": func(c *pgxpool.Config, hook func()) {
			c.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) { hook(); return true, nil }
		},
		"BeforeConnect": func(c *pgxpool.Config, hook func()) {
			c.BeforeConnect = func(context.Context, *pgx.ConnConfig) error { hook(); return nil }
		},
		"AfterConnect": func(c *pgxpool.Config, hook func()) {
			c.AfterConnect = func(context.Context, *pgx.Conn) error { hook(); return nil }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := must[*pgxpool.Config](t)(pgxpool.ParseConfig(
				withParams(pgtest.Database(t), "pool_drain_timeout=1500ms&pool_cancel_grace=1s&pool_max_conns=4")))
			var hangs atomic.Bool
			entered, end := make(chan struct{}, 100), make(chan struct{})
			set(config, func() {
				if hangs.Load() {
					entered <- struct{}{}
					<-end
				}
			})
			ctx := context.Background()
			labelled(t.Name(), func() {
				pool := newPoolWithConfig(t, config)
				look := observer(t, pool)
				tx := must[pgx.Tx](t)(pool.Begin(ctx))
				spare := acquire(t, pool)
				statement, inHook := make(chan error, 1), make(chan error, 1)
				go func() {
					_, err := pool.Exec(ctx, "select pg_sleep(60)")
					statement <- err
				}()
				eventually(t, "it runs", func() bool {
					ops := pool.Active()
					return len(ops) == 3 && ops[2].State == pgxdrain.StateActive && pool.Stat().AcquiredConns() == 3
				})
				switch name {
				case "BeforeConnect", "AfterConnect":
					hangs.Store(true)
					go func() { inHook <- pool.Ping(ctx) }() // on a fourth connection
					<-entered
					spare.Release()
				case "PrepareConn":
					spare.Release()
					hangs.Store(true)
					go func() { inHook <- pool.Ping(ctx) }() // on the third, which is idle
					<-entered
				default:
					hangs.Store(true)
					spare.Release()
					inHook <- pgxdrain.ErrShuttingDown
				}

				e := wantShutdownError(t, shutdownInTime(t, pool))
				if err := <-statement; sqlState(err) != "57014" {
					t.Errorf("the caller of the statement got %v", err)
				}
				if e.Cancelled != 1 || e.Leaked != 1 {
					t.Errorf("got %v", e)
				}
				if name != "BeforeConnect" { // there no connection has been made that the session could be of
					eventually(t, "no session of ours is left", func() bool { return sessions(t, look) == 0 })
				}
				if _, err := tx.Exec(ctx, "select 1"); !errors.Is(err, pgxdrain.ErrShuttingDown) {
					t.Errorf("the caller of the transaction got %v", err)
				}
				close(end)
				_ = tx.Rollback(ctx)
				if err := <-inHook; !errors.Is(err, pgxdrain.ErrShuttingDown) {
					t.Errorf("the caller in the hook got %v (%T)", err, err)
				}
			})
			eventually(t, "nothing is left running once the hook has returned", func() bool { return running(t.Name()) == "" })
		})
	}
}
