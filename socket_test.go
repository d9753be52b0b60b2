package pgxdrain

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// pgconn has a statement cancelled that its caller gives up. That must not be kept from it because its connection is severed just then.
// But a COMMIT must not be cancelled so under which its connection was severed, and for the rest nothing is left to be asked.
func TestPgconnsOwnCancelRequestGoesOutOnlyForAStatementThatWasGivenUp(t *testing.T) {
	t.Parallel()
	dsn := pgtest.Database(t)
	giveUp := func(conn *pgxpool.Conn) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		if _, err := conn.Exec(ctx, "select pg_sleep(60)"); err == nil {
			t.Error("the statement ended")
		}
	}
	for name, c := range map[string]struct {
		sever   func(*pgxpool.Conn, *record)
		refused bool
	}{
		"given up, and not released yet": {func(conn *pgxpool.Conn, r *record) { giveUp(conn); r.sever(true) }, false},
		"given up and released": {func(conn *pgxpool.Conn, r *record) {
			giveUp(conn)
			r.endLease(0)
			r.severUnleased()
			r.socket.sever()
		}, false},
		"just held": {func(_ *pgxpool.Conn, r *record) { r.sever(true) }, true},
		"cut off": {func(_ *pgxpool.Conn, r *record) {
			r.statementStarts(r.conn.PgConn(), statement{kind: query, sql: "commit"})
			r.sever(false)
		}, true},
	} {
		pool, err := New(t.Context(), dsn)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		pgConn := conn.Conn().PgConn()
		c.sever(conn, pool.tracer.record(conn.Conn()))
		err = pgConn.CancelRequest(context.Background())
		if errors.Is(err, ErrShuttingDown) != c.refused || !c.refused && err != nil {
			t.Errorf("%s: got %v", name, err)
		}
		conn.Release()
		pool.Pool.Close()
	}
}

// The cancel step severs an idle connection just before somebody acquires it.
func TestConnectionSeveredJustBeforeItIsAcquiredIsReportedAsSevered(t *testing.T) {
	t.Parallel()
	pool, conn := openAndAcquire(t)
	r := pool.tracer.record(conn.Conn())
	conn.Release()
	if !r.severUnleased() {
		t.Error("it is idle, and was not severed")
	}
	conn, err := pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := r.lease().cut; got != cutSevered {
		t.Errorf("its outcome is %q", got)
	}
	conn.Release()
	pool.Pool.Close()
}

// What the pool keeps of its connections neither lacks one nor grows, however a connection goes.
func TestSetIsOfThePoolsConnections(t *testing.T) {
	t.Parallel()
	terminate := func(t *testing.T, conn *pgxpool.Conn) {
		if _, err := conn.Exec(t.Context(), "select pg_terminate_backend(pg_backend_pid())"); err == nil {
			t.Error("terminated without an error")
		}
	}
	for name, use := range map[string]func(t *testing.T, conn *pgxpool.Conn){
		"released":            func(_ *testing.T, conn *pgxpool.Conn) { conn.Release() },
		"in a transaction":    func(t *testing.T, conn *pgxpool.Conn) { conn.Exec(t.Context(), "begin"); conn.Release() },
		"closed":              func(t *testing.T, conn *pgxpool.Conn) { conn.Conn().Close(t.Context()); conn.Release() },
		"terminated":          func(t *testing.T, conn *pgxpool.Conn) { terminate(t, conn); conn.Release() },
		"hijacked and closed": func(t *testing.T, conn *pgxpool.Conn) { conn.Hijack().Close(t.Context()) },
		"hijacked and kept": func(t *testing.T, conn *pgxpool.Conn) {
			c := conn.Hijack()
			t.Cleanup(func() { c.Close(context.Background()) })
		},
		"given up": func(t *testing.T, conn *pgxpool.Conn) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			conn.Exec(ctx, "select pg_sleep(60)")
			conn.Release()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool, err := New(t.Context(), pgtest.Database(t))
			if err != nil {
				t.Fatal(err)
			}
			defer pool.Close()
			for range 3 {
				conn, err := pool.Acquire(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if uses := pool.tracer.reconcile(); len(uses) != 1 {
					t.Fatalf("%d leases of one connection", len(uses))
				}
				use(t, conn)
			}
			deadline := time.Now().Add(10 * time.Second)
			for {
				pool.tracer.reconcile()
				used, idle := connectionCounts(pool.Pool)
				stat := pool.Stat()
				if kept := len(pool.tracer.records()); kept == int(stat.TotalConns()) && int(used+idle) == kept {
					return
				} else if time.Now().After(deadline) {
					t.Fatalf("kept %d, counted %d used and %d idle, of %d", kept, used, idle, stat.TotalConns())
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
}
