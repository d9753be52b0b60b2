package pgxdrain_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/puddle/v2"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// route is a way to a database of a test's own.
type route struct {
	dsn     string
	look    *pgx.Conn // past the pooler
	console *pgx.Conn // of the pooler, nil if there is none
}

func (r *route) pool(t testing.TB, params string) *pgxdrain.Pool {
	t.Helper()
	return newPoolWithConfig(t, must[*pgxpool.Config](t)(pgxpool.ParseConfig(withParams(r.dsn, params))))
}

// checkNothingLeft waits until there is no session of ours at the server. Those that a pooler has there stay: then it waits until
// they have nothing to do, and the pooler has no client of ours.
func (r *route) checkNothingLeft(t testing.TB) {
	t.Helper()
	if r.console == nil {
		eventually(t, "no session of ours is left", func() bool { return sessions(t, r.look) == 0 })
		return
	}
	eventually(t, "the pooler has no client of ours", func() bool { return r.clients(t) == 0 })
	eventually(t, "no session of the pooler's is busy or in a transaction", func() bool {
		var n int
		err := r.look.QueryRow(t.Context(), `
			select count(*) from pg_stat_activity
			where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'`).Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n == 0
	})
}

// clients counts the pooler's clients in r's database.
func (r *route) clients(t testing.TB) (n int) {
	t.Helper()
	for _, client := range r.show(t, "show clients") {
		if client["database"] == r.look.Config().Database {
			n++
		}
	}
	return n
}

// show asks the pooler's console, which speaks the simple protocol only and has no types that pgx knows.
func (r *route) show(t testing.TB, command string) (rows []map[string]string) {
	t.Helper()
	results, err := r.console.PgConn().Exec(context.Background(), command).ReadAll()
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	for _, result := range results {
		for _, values := range result.Rows {
			row := map[string]string{}
			for i, f := range result.FieldDescriptions {
				row[f.Name] = string(values[i])
			}
			rows = append(rows, row)
		}
	}
	return rows
}

// forcedEnds are the ends that operations come to at the deadline, by whichever route the server is reached.
var forcedEnds = map[string]func(*testing.T, *route){
	"running statements are cancelled": func(t *testing.T, r *route) {
		pool := r.pool(t, forcedParams)
		result := make(chan error, 3)
		for range 3 {
			go func() {
				_, err := pool.Exec(context.Background(), "select pg_sleep(60)")
				result <- err
			}()
		}
		r.waitActive(t, 3)
		e := wantShutdownError(t, shutdownInTime(t, pool))
		for range 3 {
			if err := <-result; sqlState(err) != "57014" {
				t.Errorf("the caller got %v", err)
			}
		}
		if e.Cancelled != 3 || len(e.Operations) != 3 {
			t.Errorf("got %v", e)
		}
		r.checkNothingLeft(t)
	},

	"transaction left idle is severed": func(t *testing.T, r *route) {
		if _, err := r.look.Exec(t.Context(), "create table n (n int)"); err != nil {
			t.Fatal(err)
		}
		pool := r.pool(t, forcedParams)
		tx := must[pgx.Tx](t)(pool.Begin(context.Background()))
		if _, err := tx.Exec(context.Background(), "lock table n"); err != nil {
			t.Fatal(err)
		}
		result := startShutdown(t, context.Background(), pool)
		if _, err := r.look.Exec(t.Context(), "insert into n values (1)"); err != nil { // waits for the lock
			t.Fatal(err)
		}
		_, err := tx.Exec(context.Background(), "select 1")
		tx.Rollback(context.Background())
		if !errors.Is(err, pgxdrain.ErrShuttingDown) {
			t.Errorf("the caller got %v", err)
		}
		e := wantShutdownError(t, <-result)
		checkReport(t, e.Report)
		if e.Severed != 1 {
			t.Errorf("got %v", e)
		}
		r.checkNothingLeft(t)
	},

	"connection held and never released is severed": func(t *testing.T, r *route) {
		pool := r.pool(t, forcedParams)
		conn := acquire(t, pool)
		e := wantShutdownError(t, shutdownInTime(t, pool))
		if e.Leaked != 1 {
			t.Errorf("got %v", e)
		}
		r.checkNothingLeft(t)
		if _, err := conn.Exec(context.Background(), "select 1"); !errors.Is(err, pgxdrain.ErrShuttingDown) {
			t.Errorf("the caller got %v", err)
		}
		conn.Release()
	},

	"rows that nobody reads on are severed": func(t *testing.T, r *route) {
		pool := r.pool(t, forcedParams)
		rows := must[pgx.Rows](t)(pool.Query(context.Background(), "select repeat('x', 1000) from generate_series(1, 1000000)"))
		if !rows.Next() {
			t.Fatal(rows.Err())
		}
		e := wantShutdownError(t, shutdownInTime(t, pool))
		if e.Unknown != 1 {
			t.Errorf("got %v", e)
		}
		r.checkNothingLeft(t)
		for rows.Next() {
		}
		if err := rows.Err(); !errors.Is(err, pgxdrain.ErrShuttingDown) {
			t.Errorf("the caller got %v", err)
		}
	},

	"COMMIT in flight is not cancelled": func(t *testing.T, r *route) {
		slowCommit(t, r.look, "slow", "3")
		pool := r.pool(t, forcedParams)
		result := make(chan error, 1)
		go func() {
			result <- pgx.BeginFunc(context.Background(), pool, func(tx pgx.Tx) error {
				_, err := tx.Exec(context.Background(), "insert into slow values (1)")
				return err
			})
		}()
		r.waitActive(t, 1)
		eventually(t, "it commits", func() bool { return only(t, pool).State == pgxdrain.StateCommitting })
		e := wantShutdownError(t, shutdownInTime(t, pool))
		if err := <-result; !errors.Is(err, pgxdrain.ErrShuttingDown) {
			t.Errorf("the caller got %v", err)
		}
		if e.Unknown != 1 {
			t.Errorf("got %v", e)
		}
		eventually(t, "the row is there", func() bool {
			var n int
			return r.look.QueryRow(t.Context(), "select count(*) from slow").Scan(&n) == nil && n == 1
		})
		r.checkNothingLeft(t)
	},

	"callers in the queue are freed": func(t *testing.T, r *route) {
		pool := r.pool(t, "pool_drain_timeout=1s&pool_max_conns=1")
		conn := acquire(t, pool)
		result := make(chan error, 5)
		for range 5 {
			go func() { result <- pool.Ping(context.Background()) }()
		}
		eventually(t, "they wait", func() bool { return pool.Report().Waiting == 5 })
		wantShutdownError(t, shutdownInTime(t, pool))
		for range 5 {
			if err := <-result; err != pgxdrain.ErrShuttingDown {
				t.Errorf("a caller got %v", err)
			}
		}
		r.checkNothingLeft(t)
		conn.Release()
	},

	"caller that waits for a notification is severed": func(t *testing.T, r *route) {
		pool := r.pool(t, forcedParams)
		conn := acquire(t, pool)
		if _, err := conn.Exec(context.Background(), "listen c"); err != nil {
			t.Fatal(err)
		}
		result := make(chan error, 1)
		go func() {
			_, err := conn.Conn().WaitForNotification(context.Background())
			conn.Release()
			result <- err
		}()
		e := wantShutdownError(t, shutdownInTime(t, pool))
		if err := <-result; !errors.Is(err, pgxdrain.ErrShuttingDown) {
			t.Errorf("the caller got %v", err)
		}
		if e.Severed != 1 {
			t.Errorf("got %v", e)
		}
		r.checkNothingLeft(t)
	},
}

// waitActive waits until n sessions are active at the server.
func (r *route) waitActive(t testing.TB, n int) {
	t.Helper()
	eventually(t, "they run", func() bool {
		var active int
		err := r.look.QueryRow(t.Context(), `
			select count(*) from pg_stat_activity
			where datname = current_database() and pid <> pg_backend_pid() and state = 'active'`).Scan(&active)
		if err != nil {
			t.Fatal(err)
		}
		return active == n
	})
}

func TestForcedEndOverTLS(t *testing.T) {
	t.Parallel()
	server := must[*url.URL](t)(url.Parse(pgtest.PrivateTLS(t).DSN()))
	admin := must[*pgx.Conn](t)(pgx.Connect(t.Context(), server.String()))
	t.Cleanup(func() { admin.Close(context.Background()) })
	var mu sync.Mutex
	databases := 0
	for name, test := range forcedEnds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mu.Lock()
			databases++
			dsn := *server
			dsn.Path = fmt.Sprintf("/d%d", databases)
			_, err := admin.Exec(t.Context(), "create database "+dsn.Path[1:])
			mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			r := &route{dsn: dsn.String(), look: must[*pgx.Conn](t)(pgx.Connect(t.Context(), dsn.String()))}
			t.Cleanup(func() { r.look.Close(context.Background()) })
			test(t, r)
		})
	}
}

// throughPgBouncer returns the route through a PgBouncer to a database of t's own. front is any DSN that leads through it.
func throughPgBouncer(t testing.TB, front string) *route {
	t.Helper()
	dsn := pgtest.Database(t)
	database := must[*url.URL](t)(url.Parse(dsn)).Path
	through := must[*url.URL](t)(url.Parse(front))
	through.Path = "/pgbouncer"
	r := &route{
		look:    must[*pgx.Conn](t)(pgx.Connect(t.Context(), dsn)),
		console: must[*pgx.Conn](t)(pgx.Connect(t.Context(), through.String())),
	}
	through.Path = database
	r.dsn = through.String()
	t.Cleanup(func() {
		r.look.Close(context.Background())
		r.console.Close(context.Background())
	})
	return r
}

func TestForcedEndThroughPgBouncer(t *testing.T) {
	t.Parallel()
	front := pgtest.PgBouncer(t, pgtest.Database(t))
	for name, test := range forcedEnds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, throughPgBouncer(t, front))
		})
	}
}

func TestPIDBehindPgBouncerIsThePoolersOwn(t *testing.T) {
	t.Parallel()
	r := throughPgBouncer(t, pgtest.PgBouncer(t, pgtest.Database(t)))
	pool := r.pool(t, "")
	conn := acquire(t, pool)
	defer conn.Release()
	var backend uint32
	if err := conn.QueryRow(t.Context(), "select pg_backend_pid()").Scan(&backend); err != nil {
		t.Fatal(err)
	}
	if pid := only(t, pool).PID; pid == backend || pid != conn.Conn().PgConn().PID() {
		t.Errorf("the PID is %d, the backend's is %d", pid, backend)
	}
}

// A statement for which PgBouncer has no connection to the server left waits in PgBouncer, where a cancel request does nothing for
// it: it is severed, and never comes to the server.
func TestStatementThatWaitsInPgBouncerIsEndedAndNeverRuns(t *testing.T) {
	t.Parallel()
	const servers, statements = 50, 60 // servers as internal/pgtest has set PgBouncer's default_pool_size
	r := throughPgBouncer(t, pgtest.PgBouncer(t, pgtest.Database(t)))
	if _, err := r.look.Exec(t.Context(), "create table n (n int)"); err != nil {
		t.Fatal(err)
	}
	pool := r.pool(t, "pool_max_conns=60&pool_drain_timeout=6s&pool_cancel_grace=3s")
	result := make(chan error, statements)
	for range statements {
		go func() {
			_, err := pool.Exec(context.Background(), "with w as materialized (select pg_sleep(60)) insert into n select 1 from w")
			result <- err
		}()
	}
	r.waitActive(t, servers)
	eventually(t, "all have been sent", func() bool { return len(pool.Active()) == statements })
	e := wantShutdownError(t, shutdownInTime(t, pool))
	cancelled, severed := 0, 0
	for range statements {
		switch err := <-result; {
		case sqlState(err) == "57014":
			cancelled++
		case errors.Is(err, pgxdrain.ErrShuttingDown):
			severed++
		default:
			t.Errorf("a caller got %v", err)
		}
	}
	t.Logf("%d cancelled, %d severed", cancelled, severed)
	// On a slow machine a connection may be severed after its caller has been told 57014 and before it is released.
	if e.Cancelled+e.Severed != cancelled || e.Unknown != severed {
		t.Errorf("%d callers were cancelled, %d severed; got %s", cancelled, severed, brief(e.Report))
	}
	r.checkNothingLeft(t)
	var rows int
	if err := r.look.QueryRow(t.Context(), "select count(*) from n").Scan(&rows); err != nil || rows != 0 {
		t.Errorf("%d rows, want none; %v", rows, err)
	}
}

// PgBouncer 1.18 dies of a cancel request that is not waited for (pgbouncer #801, #822).
func TestStress_PgBouncerLivesThroughAHundredForcedShutdownsUnderLoad(t *testing.T) {
	t.Parallel()
	r := throughPgBouncer(t, pgtest.PgBouncer(t, pgtest.Database(t)))
	if _, err := r.look.Exec(t.Context(), "create table n (n int)"); err != nil {
		t.Fatal(err)
	}
	version := r.show(t, "show version") // the console's connection lives as long as the process
	var left, cancelled, other atomic.Int64
	left.Store(100)
	statements := []string{
		"select pg_sleep(3)",
		"select pg_sleep(0.05)",
		"insert into n select 1 from pg_sleep(0.01)",
		"select count(*) from generate_series(1, 3000000)",
		"select 1",
	}
	var lanes sync.WaitGroup
	for range 3 {
		lanes.Go(func() {
			for n := left.Add(-1); n >= 0 && !t.Failed(); n = left.Add(-1) {
				params := fmt.Sprintf("pool_max_conns=16&pool_drain_timeout=%dms", 200+n*2)
				config, err := pgxpool.ParseConfig(withParams(r.dsn, params))
				if err != nil {
					t.Error(err)
					return
				}
				pool := newPoolWithConfig(t, config)
				var callers sync.WaitGroup
				for i := range 24 {
					callers.Go(func() {
						for ctx := context.Background(); ; {
							var err error
							if statement := statements[i%len(statements)]; i%3 == 0 {
								err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
									_, err := tx.Exec(ctx, statement)
									return err
								})
							} else {
								_, err = pool.Exec(ctx, statement)
							}
							switch {
							case err == nil:
							case sqlState(err) == "57014":
								cancelled.Add(1)
							case errors.Is(err, pgxdrain.ErrShuttingDown), errors.Is(err, pgx.ErrTxCommitRollback),
								errors.Is(err, puddle.ErrClosedPool): // on the way to a connection at the deadline
								other.Add(1)
								return
							default:
								t.Errorf("a caller got %v", err)
								return
							}
						}
					})
				}
				eventually(t, "they are at work", func() bool { return len(pool.Active()) >= 8 })
				start := time.Now()
				err = pool.Shutdown(context.Background())
				report := pool.Report()
				if took := time.Since(start); took > report.Budget+late {
					t.Errorf("took %v, the budget is %v", took, report.Budget)
				}
				checkReport(t, report)
				if err == nil {
					t.Error("nothing was ended")
				}
				callers.Wait()
			}
		})
	}
	lanes.Wait()
	t.Logf("%d statements cancelled, %d callers refused or severed", cancelled.Load(), other.Load())
	if now := r.show(t, "show version"); fmt.Sprint(now) != fmt.Sprint(version) {
		t.Errorf("PgBouncer's console said %v, and now %v", version, now)
	}
	if cancelled.Load() == 0 {
		t.Error("there was no load")
	}
	// Not every statement comes to be cancelled in a tenth of a second by way of a pooler; but then it ends by itself.
	r.checkNothingLeft(t)
}
