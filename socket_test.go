package pgxdrain

import (
	"context"
	"errors"
	"testing"

	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// pgconn has a statement cancelled that its caller gives up. That must not be kept from it because the shutdown finds the connection
// without a statement and severs it; but a COMMIT under which it is severed must not be cancelled so.
func TestPgconnsOwnCancelRequestIsRefusedOnlyForAStatementThatWasCutOff(t *testing.T) {
	t.Parallel()
	dsn := pgtest.Database(t)
	for name, c := range map[string]struct {
		sever   func(*record)
		refused bool
	}{
		"given up, and not released yet": {func(r *record) { r.sever(true) }, false},
		"given up and released":          {func(r *record) { r.endLease(0); r.severUnleased(); r.socket.sever() }, false},
		"cut off": {func(r *record) {
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
		c.sever(pool.tracer.record(conn.Conn()))
		err = conn.Conn().PgConn().CancelRequest(context.Background())
		if errors.Is(err, ErrShuttingDown) != c.refused || !c.refused && err != nil {
			t.Errorf("%s: got %v", name, err)
		}
		conn.Release()
		pool.Pool.Close()
	}
}
