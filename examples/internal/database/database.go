// Package database gives the examples their PostgreSQL server. A service of yours has its DATABASE_URL and needs none of this.
package database

import (
	"context"
	"log/slog"
	"os"
	"strings"

	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// URL returns the address of the server that DATABASE_URL names, or starts one. The function it returns stops what was
// started.
func URL(ctx context.Context, log *slog.Logger) (dsn string, stop func() error, err error) {
	if dsn := os.Getenv("DATABASE_URL"); dsn != "" {
		return dsn, func() error { return nil }, nil
	}
	log.Info("starting PostgreSQL")
	server, err := pgtest.Start(ctx)
	if err != nil {
		return "", nil, err
	}
	return server.DSN(), server.Stop, nil
}

// WithKey adds a key, such as pool_max_conns=4, to a connection string, which is a URL or key=value pairs. Of a key that is
// there twice the last counts.
func WithKey(dsn, key string) string {
	switch {
	case !strings.HasPrefix(dsn, "postgres"):
		return dsn + " " + key
	case strings.Contains(dsn, "?"):
		return dsn + "&" + key
	default:
		return dsn + "?" + key
	}
}
