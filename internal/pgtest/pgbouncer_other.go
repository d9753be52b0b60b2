//go:build !unix

package pgtest

import "testing"

// PgBouncer is not supported on this system: it skips t.
func PgBouncer(t testing.TB, _ string) string {
	t.Helper()
	t.Skip("PgBouncer is not started on this system")
	return ""
}
