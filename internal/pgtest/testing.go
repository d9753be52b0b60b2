package pgtest

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// How long creating and dropping a database may take. It takes a tenth of a second on an idle machine.
const databaseTimeout = 30 * time.Second

// shared is the server that the tests of one process share. What Start returned is kept, the error as well: it would take
// as long to fail for every test.
var shared struct {
	sync.Mutex
	started bool
	server  *Server
	err     error
}

func sharedServer() (*Server, error) {
	shared.Lock()
	defer shared.Unlock()
	if !shared.started {
		shared.started = true
		shared.server, shared.err = Start(context.Background())
	}
	return shared.server, shared.err
}

// Runner runs the tests of a package and then stops the server that they shared. It is made by [Main].
type Runner struct{ m *testing.M }

// Main wraps m so that the server that [Database] started is stopped after the tests. It is for TestMain:
//
//	func TestMain(m *testing.M) { goleak.VerifyTestMain(pgtest.Main(m)) }
//
// Without it nothing is left behind either, but the server is not shut down in an orderly way.
func Main(m *testing.M) *Runner { return &Runner{m} }

// Run runs the tests and returns their exit code, or 1 if they passed and the server could not be stopped.
func (r *Runner) Run() int {
	code := r.m.Run()
	if err := stopShared(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	return code
}

func stopShared() error {
	shared.Lock()
	defer shared.Unlock()
	if shared.server == nil {
		return nil
	}
	err := shared.server.Stop()
	shared.started, shared.server, shared.err = false, nil, nil
	return err
}

// Database creates an empty database for t and returns its DSN, as a superuser. It is on the server that all tests of the
// process share, which is started at the first use; see [Start] for where it comes from. At the cleanup of t the database
// is dropped, with the sessions that are still connected to it. Without a server t fails at once.
func Database(t testing.TB) string {
	t.Helper()
	server, err := sharedServer()
	if err != nil {
		t.Fatal(err)
	}
	name := "pgxdrain_" + strings.ToLower(rand.Text())
	// template0, because CREATE DATABASE fails while anybody is connected to its template, as an autovacuum worker or a
	// user of a server that is not ours may be to template1.
	if err := execute(server.DSN(), "CREATE DATABASE "+name+" TEMPLATE template0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := execute(server.DSN(), "DROP DATABASE "+name+" WITH (FORCE)"); err != nil {
			t.Error(err)
		}
	})
	return withDatabase(server.DSN(), name)
}

// DSN returns the DSN of the server that all tests of the process share, as a superuser. It is for examples, which have no
// testing.TB; tests should use [Database].
func DSN() (string, error) {
	server, err := sharedServer()
	if err != nil {
		return "", err
	}
	return server.DSN(), nil
}

// Private starts a server for t alone, which it may stop, freeze or kill, and stops it at the cleanup of t. It is a local
// server where that works, because that one has a [Server.PostmasterPID], and otherwise a container, unless
// PGXDRAIN_POSTGRES says which. PGXDRAIN_TEST_DSN is not looked at. Without a server t fails at once.
func Private(t testing.TB) *Server {
	t.Helper()
	server, err := startPrivate(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}

func startPrivate(ctx context.Context) (*Server, error) {
	if os.Getenv(envWay) != "" {
		return Start(ctx)
	}
	return startOf(ctx, wayLocal, wayDocker)
}

// execute runs one statement on a connection of its own.
func execute(dsn, statement string) error {
	ctx, cancel := context.WithTimeout(context.Background(), databaseTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, statement); err != nil {
		return fmt.Errorf("pgtest: %s: %w", statement, err)
	}
	return nil
}

// withDatabase returns dsn with another database. A DSN is a URL or, in the dsn way, perhaps PostgreSQL's other form,
// key=value pairs, of which the last one for a key counts.
func withDatabase(dsn, name string) string {
	u, err := url.Parse(dsn)
	if err != nil || u.Scheme == "" {
		return dsn + " dbname=" + name
	}
	u.Path = "/" + name
	query := u.Query()
	query.Del("dbname") // it would override the path
	u.RawQuery = query.Encode()
	return u.String()
}
