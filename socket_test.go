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
			r.statementStarts(statement{kind: query, sql: "commit"})
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
	pool, err := New(t.Context(), pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := pool.tracer.record(conn.Conn())
	conn.Release()
	if !r.severUnleased() {
		t.Error("it is idle, and was not severed")
	}
	if conn, err = pool.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := r.lease().cut; got != cutSevered {
		t.Errorf("its outcome is %q", got)
	}
	conn.Release()
	pool.Pool.Close()
}
