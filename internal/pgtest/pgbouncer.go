//go:build unix

package pgtest

import (
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

//go:embed pgbouncer.sh
var pgbouncerMinder string

// Set to "required" it fails a test that PgBouncer is missing for.
const envPgBouncer = "PGXDRAIN_PGBOUNCER"

// A start takes a few hundredths of a second.
const (
	pgbouncerStartTimeout = 30 * time.Second
	pgbouncerStopTimeout  = 30 * time.Second
)

// PgBouncer starts a PgBouncer in front of the server of dsn, for t alone, and returns dsn as it is reached through it: by
// transaction pooling, for any database of that server. (So statements cannot be prepared: pgx is told to do without.) It is
// stopped at the cleanup of t, which fails t if it has died before.
//
// A database named pgbouncer, at the same address, is PgBouncer's console, which takes the simple protocol only.
//
// Where no pgbouncer is installed, t is skipped, unless PGXDRAIN_PGBOUNCER=required is set: then it fails.
func PgBouncer(t testing.TB, dsn string) string {
	t.Helper()
	program, err := findPgBouncer()
	switch {
	case err == nil:
	case os.Getenv(envPgBouncer) == "required":
		t.Fatal(err)
	default:
		t.Skip(err)
	}
	for try := 1; ; try++ {
		through, stop, err := startPgBouncer(program, dsn)
		if err == nil {
			t.Cleanup(func() {
				if err := stop(); err != nil {
					t.Errorf("pgtest: PgBouncer has died, or could not be stopped: %v", err)
				}
			})
			return through
		}
		if try == localPortTries || !errors.Is(err, errPortTaken) {
			t.Fatalf("pgtest: PgBouncer: %v", err)
		}
	}
}

func findPgBouncer() (string, error) {
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		// Debian installs it where only root's PATH leads.
		if program, err = exec.LookPath("/usr/sbin/pgbouncer"); err != nil {
			return "", fmt.Errorf("pgbouncer is neither on the PATH nor in /usr/sbin: install it (apt-get install pgbouncer)")
		}
	}
	return program, nil
}

func startPgBouncer(program, dsn string) (through string, stop func() error, err error) {
	u, err := url.Parse(dsn)
	if err != nil {
		return "", nil, err
	}
	port, err := freePort()
	if err != nil {
		return "", nil, err
	}
	credential, err := otherUser() // it does not run as root either
	if err != nil {
		return "", nil, err
	}
	base, err := filepath.Abs(os.TempDir())
	if err != nil {
		return "", nil, err
	}
	dir := filepath.Join(base, "pgxdrain-"+strings.ToLower(rand.Text()[:12]))
	env := append(localEnv(), "PGXDRAIN_SETTINGS="+pgbouncerSettings(u, port))
	cmd := minderCommand(pgbouncerMinder, env, dir, program)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
	mind, err := startMinder(cmd)
	if err != nil {
		return "", nil, err
	}
	stop = func() error {
		mind.tell("stop\n")
		return mind.wait(pgbouncerStopTimeout)
	}

	ctx, cancel := context.WithTimeoutCause(context.Background(), pgbouncerStartTimeout,
		fmt.Errorf("not ready within %v", pgbouncerStartTimeout))
	defer cancel()
	u.Host = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	query := u.Query()
	query.Set("sslmode", "disable")
	query.Set("default_query_exec_mode", "exec")
	u.RawQuery = query.Encode()
	if err := connectUntil(ctx, u.String()); err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "out"))
		if strings.Contains(string(log), "Address already in use") {
			err = errPortTaken
		}
		return "", nil, fmt.Errorf("%w; the end of its log:\n%s", errors.Join(err, stop()), tail(log))
	}
	return u.String(), stop, nil
}

// pgbouncerSettings returns pgbouncer.ini. Who connects is not asked for a password: the server's is in there.
func pgbouncerSettings(server *url.URL, port int) string {
	password, _ := server.User.Password()
	return strings.Join([]string{
		"[databases]",
		fmt.Sprintf("* = host=%s port=%s user=%s password=%s", server.Hostname(), server.Port(), server.User.Username(), password),
		"[pgbouncer]",
		"listen_addr = 127.0.0.1",
		"listen_port = " + strconv.Itoa(port),
		"unix_socket_dir =",
		"auth_type = any",
		"pool_mode = transaction",
		"default_pool_size = 50",
		"max_client_conn = 1000",
		"ignore_startup_parameters = extra_float_digits",
	}, "\n")
}
