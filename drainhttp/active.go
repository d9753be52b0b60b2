package drainhttp

import (
	"net/http"

	"github.com/pgxdrain/pgxdrain"
)

// Active returns a page of the pool's operations in progress.
func Active(pool *pgxdrain.Pool) http.Handler {
	return readOnly(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, pool.Active())
	}))
}
