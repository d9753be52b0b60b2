// Package pgtest gives tests and runnable examples a real PostgreSQL server.
//
// There are three ways to one, tried in this order:
//
//   - dsn: the server that the environment variable PGXDRAIN_TEST_DSN names, as a superuser. It is used as it is and left
//     running.
//   - docker: a container of the image that PGXDRAIN_POSTGRES_IMAGE names (postgres:17-alpine if unset), through
//     testcontainers-go, whose own environment variables (TESTCONTAINERS_…, DOCKER_HOST) apply.
//   - local: PostgreSQL's programs initdb and postgres, on the PATH or, as Debian installs them, in
//     /usr/lib/postgresql/VERSION/bin, the newest version first. Not on Windows.
//
// PGXDRAIN_POSTGRES=docker or PGXDRAIN_POSTGRES=local allows only that way: then a machine without it fails tests, so that
// no job that is there to test one way passes by another. PGXDRAIN_TEST_DSN is then not looked at.
//
// Whatever is started is gone with the process that started it: see [Server.Stop].
package pgtest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// A way is how a server is come by. Its text is what Way returns and what PGXDRAIN_POSTGRES holds.
type way string

const (
	wayDSN    way = "dsn"
	wayDocker way = "docker"
	wayLocal  way = "local"
)

// The environment variables that choose the way.
const (
	envDSN   = "PGXDRAIN_TEST_DSN"
	envWay   = "PGXDRAIN_POSTGRES"
	envImage = "PGXDRAIN_POSTGRES_IMAGE"
)

// Server is a running PostgreSQL server.
type Server struct {
	dsn   string
	way   way
	place string // its folder, or its container's name
	pid   int
	stop  func() error

	stopOnce sync.Once
	stopErr  error
}

// Start starts a server, or reaches the one that PGXDRAIN_TEST_DSN names, and returns once a connection to it has
// succeeded. The ways are tried in the order of the package's documentation, and the next one only when the one before it
// is absent or fails; if none works, the error names each and what was wrong with it.
//
// ctx bounds the start, not the server's life. Start has bounds of its own as well: a minute for each way, but five for
// Docker when it is the only way allowed. A Docker engine that cannot pull the image is given up at the first failed
// attempt when another way is left, so it usually costs little; where it costs the minute, PGXDRAIN_POSTGRES=local saves it.
//
// A server that Start started has fsync off, allows 500 connections and is reached by password on a loopback address (the
// local way) or on the address that the Docker engine publishes.
func Start(ctx context.Context) (*Server, error) {
	switch forced := way(os.Getenv(envWay)); forced {
	case "":
	case wayDocker:
		return startOf(ctx, wayDocker)
	case wayLocal:
		return startOf(ctx, wayLocal)
	default:
		return nil, fmt.Errorf("pgtest: %s is %q: set it to docker or local, or unset it", envWay, string(forced))
	}
	if os.Getenv(envDSN) != "" {
		// A server that was named and cannot be reached is a mistake to report, not a reason to test on another one.
		return startOf(ctx, wayDSN)
	}
	return startOf(ctx, wayDSN, wayDocker, wayLocal)
}

// DSN returns the server's address for pgx, pgxpool and database/sql, as a superuser: a URL of the form
// postgres://user:password@host:port/database?sslmode=disable, or in the dsn way PGXDRAIN_TEST_DSN as it is.
func (s *Server) DSN() string { return s.dsn }

// Way returns how the server was come by: "dsn", "docker" or "local".
func (s *Server) Way() string { return string(s.way) }

// PostmasterPID returns the process ID of a local server, and 0 in the other ways. Tests may send it any signal, SIGSTOP
// and SIGKILL included; Stop copes with what they left. A postmaster that was killed stays a zombie until Stop.
func (s *Server) PostmasterPID() int { return s.pid }

// Stop ends the server, with the sessions it has, and removes what Start made: no process, folder or container is left
// when it has returned nil. In the dsn way it leaves the server alone. A call after the first returns what that one
// returned. It takes at most about half a minute, which only a server that does not answer takes.
//
// A process that ends without Stop, be it by os.Exit, a panic, a signal or SIGKILL, leaves nothing behind either: what
// Stop does is then done from outside the process, at once and without the orderly shutdown. (In the docker way this takes
// testcontainers' reaper, or where TESTCONTAINERS_RYUK_DISABLED is set the docker command on the PATH.)
func (s *Server) Stop() error {
	s.stopOnce.Do(func() {
		if err := s.stop(); err != nil {
			s.stopErr = fmt.Errorf("pgtest: stop the %s server %s: %w", s.way, s.place, err)
		}
	})
	return s.stopErr
}

// startOf starts a server by the first of the ways that works.
func startOf(ctx context.Context, ways ...way) (*Server, error) {
	var errs []error
	for _, w := range ways {
		var s *Server
		var err error
		switch w {
		case wayDSN:
			s, err = startDSN(ctx)
		case wayDocker:
			s, err = startDocker(ctx, len(ways) == 1)
		case wayLocal:
			s, err = startLocal(ctx)
		}
		if err == nil {
			s.way = w
			return s, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", w, err))
	}
	return nil, fmt.Errorf("pgtest: no PostgreSQL server: %w", errors.Join(errs...))
}

// startDSN reaches the server that PGXDRAIN_TEST_DSN names.
func startDSN(ctx context.Context) (*Server, error) {
	dsn := os.Getenv(envDSN)
	if dsn == "" {
		return nil, fmt.Errorf("%s is not set", envDSN)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", envDSN, err)
	}
	defer conn.Close(ctx)
	return &Server{dsn: dsn, stop: func() error { return nil }}, nil
}

// connectUntil tries to connect until it succeeds or ctx is done.
func connectUntil(ctx context.Context, dsn string) error {
	attempt := func() error {
		// A port that is published before the server listens may accept a connection and never answer on it.
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		conn, err := pgx.Connect(ctx, dsn)
		if err != nil {
			return err
		}
		return conn.Close(ctx)
	}
	for {
		if attempt() == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// newPassword returns a random password that needs no quoting anywhere. Servers listen on a port that other users of the
// machine can reach, and a superuser can run programs.
func newPassword() string { return rand.Text() }
