//go:build unix

package pgtest

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

func TestPgBouncerIsInFrontOfTheServerAndLeavesNothing(t *testing.T) {
	folder := openFolder(t)
	var through string
	t.Run("use", func(t *testing.T) {
		dsn := Database(t)
		t.Setenv("TMPDIR", folder)
		through = PgBouncer(t, dsn)
		conn, err := pgx.Connect(t.Context(), withDatabase(through, "pgbouncer")+"&default_query_exec_mode=simple_protocol")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		var version string
		if err := conn.QueryRow(t.Context(), "show version").Scan(&version); err != nil || !strings.HasPrefix(version, "PgBouncer") {
			t.Errorf("its console says %q, %v", version, err)
		}
		if direct := queryText(t, dsn, "select current_database()"); queryText(t, through, "select current_database()") != direct {
			t.Errorf("another database than %s", direct)
		}
		if processesIn(t, folder) == nil {
			t.Error("no process works in the folder")
		}
	})
	if t.Failed() || through == "" {
		return
	}
	requireNothingIn(t, folder)
	requirePortClosed(t, through)
}

func TestPrivateTLSServerIsReachedByTLSWithItsCertificateVerified(t *testing.T) {
	t.Parallel()
	server := PrivateTLS(t)
	if got := queryText(t, server.DSN(), "select version from pg_stat_ssl where pid = pg_backend_pid()"); !strings.HasPrefix(got, "TLS") {
		t.Errorf("the connection is %q", got)
	}
	plain, err := withTLS(strings.Replace(server.DSN(), "sslmode=verify-full", "sslmode=disable", 1), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if plain == server.DSN() {
		t.Error("the root certificate is the same file")
	}
	if _, err := pgx.Connect(t.Context(), server.DSN()); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("connected although the server has another certificate: %v", err)
	}
}
