//go:build unix

package pgtest

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/testcontainers/testcontainers-go"
	"go.uber.org/goleak"
)

const envChild = "PGXDRAIN_PGTEST_CHILD"

func TestMain(m *testing.M) {
	if mode := os.Getenv(envChild); mode != "" && mode != "timeout" {
		child(mode)
		return
	}
	goleak.VerifyTestMain(Main(m))
}

// --- The ways ---

func TestStartReachesTheServerThatTheVariableNamesAndStopLeavesItAlone(t *testing.T) {
	server := Private(t)
	u, err := url.Parse(server.DSN())
	if err != nil {
		t.Fatal(err)
	}
	password, _ := u.User.Password()
	for form, dsn := range map[string]string{
		"URL": server.DSN(),
		"key=value": fmt.Sprintf("host=%s port=%s user=%s password=%s dbname=postgres sslmode=disable",
			u.Hostname(), u.Port(), u.User.Username(), password),
	} {
		t.Run(form, func(t *testing.T) {
			t.Setenv(envWay, "")
			t.Setenv(envDSN, dsn)
			named, err := Start(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if named.Way() != "dsn" || named.DSN() != dsn || named.PostmasterPID() != 0 {
				t.Errorf("way %q, DSN %q, PID %d", named.Way(), named.DSN(), named.PostmasterPID())
			}
			if err := execute(dsn, "CREATE DATABASE other"); err != nil {
				t.Fatal(err)
			}
			if got := queryText(t, withDatabase(dsn, "other"), "SELECT current_database()"); got != "other" {
				t.Errorf("with another database the DSN reaches %q", got)
			}
			if err := execute(dsn, "DROP DATABASE other"); err != nil {
				t.Fatal(err)
			}
			if err := named.Stop(); err != nil {
				t.Fatal(err)
			}
			if got := queryText(t, dsn, "SELECT 1::text"); got != "1" {
				t.Errorf("after Stop: %q", got)
			}
		})
	}
}

func TestStartFailsWhenTheServerThatTheVariableNamesCannotBeReached(t *testing.T) {
	t.Setenv(envWay, "")
	t.Setenv(envDSN, fmt.Sprintf("postgres://someone:secret@127.0.0.1:%d/postgres", unusedPort(t)))
	_, err := Start(t.Context())
	if err == nil {
		t.Fatal("another server was started in its place")
	}
	requireText(t, err.Error(), "pgtest: ", envDSN)
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("the error shows the password: %v", err)
	}
}

func TestStartNamesABadValueOfTheVariable(t *testing.T) {
	t.Setenv(envWay, "podman")
	_, err := Start(t.Context())
	if err == nil {
		t.Fatal("no error")
	}
	requireText(t, err.Error(), "pgtest: ", envWay, `"podman"`, "docker", "local")
}

func TestStartFailsWhenTheForcedWayIsAbsent(t *testing.T) {
	t.Run("docker", func(t *testing.T) {
		t.Setenv(envWay, "docker")
		withoutDocker(t)
		_, err := Start(t.Context())
		if err == nil {
			t.Fatal("a server was started in another way")
		}
		requireText(t, err.Error(), "pgtest: ", "docker: ")
	})
	t.Run("local", func(t *testing.T) {
		t.Setenv(envWay, "local")
		withoutPrograms(t)
		_, err := Start(t.Context())
		if err == nil {
			t.Fatal("a server was started in another way")
		}
		requireText(t, err.Error(), "pgtest: ", "local: ", "initdb and postgres", programFolders)
	})
}

func TestStartNamesEachWayAndWhyItFailed(t *testing.T) {
	t.Setenv(envWay, "")
	t.Setenv(envDSN, "")
	withoutDocker(t)
	withoutPrograms(t)
	_, err := Start(t.Context())
	if err == nil {
		t.Fatal("no error")
	}
	requireText(t, err.Error(), "pgtest: ", "dsn: "+envDSN+" is not set", "docker: ", "local: initdb and postgres")
}

func TestStartFallsThroughToLocalWhenTheEngineHangs(t *testing.T) {
	if testing.Short() {
		t.Skip("left out by -short: takes as long as the engine is given to answer")
	}
	requireLocal(t)
	t.Parallel()
	// Accepts connections, and that is all: as an engine that is stuck, or the wrong port, does.
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := startChild(t, "stop", "DOCKER_HOST=tcp://"+l.Addr().String(), envWay+"=", envDSN+"=")
	if c.server.Way != "local" {
		t.Errorf("the way is %q", c.server.Way)
	}
	c.finish(t)
	c.requireNothingLeft(t)
}

func TestALocalServerIsFastAndStillDurableAgainstItsOwnDeath(t *testing.T) {
	requireLocal(t)
	t.Parallel()
	server := startForTest(t, wayLocal)
	if server.Way() != "local" || server.PostmasterPID() == 0 {
		t.Errorf("way %q, PID %d", server.Way(), server.PostmasterPID())
	}
	for setting, want := range map[string]string{
		"fsync": "off", "full_page_writes": "off", "synchronous_commit": "on", "max_connections": "500",
		"server_encoding": "UTF8", "lc_collate": "C", "unix_socket_directories": "", "is_superuser": "on",
	} {
		if setting == "lc_collate" {
			// No longer a setting since PostgreSQL 16.
			if got := queryText(t, server.DSN(), "SELECT datcollate FROM pg_database WHERE datname = 'postgres'"); got != want {
				t.Errorf("collation %q, want %q", got, want)
			}
			continue
		}
		if got := queryText(t, server.DSN(), "SHOW "+setting); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	if got := queryText(t, server.DSN(), "SELECT pg_read_file('postmaster.pid')"); !strings.HasPrefix(got, fmt.Sprint(server.PostmasterPID(), "\n")) {
		t.Errorf("PostmasterPID is %d, postmaster.pid says %q", server.PostmasterPID(), got)
	}
	u, err := url.Parse(server.DSN())
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword("postgres", "postgres")
	if err := execute(u.String(), "SELECT 1"); err == nil {
		t.Error("the server lets in whoever guesses a password")
	}
}

func TestARunningLocalServerHasNoGoroutine(t *testing.T) {
	requireLocal(t)
	// Not parallel: others' goroutines would be found.
	before := goleak.IgnoreCurrent()
	server := startForTest(t, wayLocal)
	goleak.VerifyNone(t, before)
	if err := server.Stop(); err != nil {
		t.Error(err)
	}
	goleak.VerifyNone(t, before)
}

func TestALocalServerReportsThatItsPortIsTaken(t *testing.T) {
	requireLocal(t)
	t.Parallel()
	initdb, postgres, err := findPrograms()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	// The listener accepts in the kernel and never answers: only that postgres exits tells.
	_, err = startLocalOn(t.Context(), l.Addr().(*net.TCPAddr).Port, initdb, postgres)
	if !errors.Is(err, errPortTaken) {
		t.Errorf("startLocal would not try another port: %v", err)
	}
}

func TestAStartErrorHasTheEndOfTheLog(t *testing.T) {
	requireLocal(t)
	t.Parallel()
	initdb, _, err := findPrograms()
	if err != nil {
		t.Fatal(err)
	}
	_, err = startLocalOn(t.Context(), unusedPort(t), initdb, initdb)
	if err == nil {
		t.Fatal("initdb was taken for postgres")
	}
	requireText(t, err.Error(), "the server exited", "initdb: error")
}

func TestStartEndsWithItsContextAndLeavesNothing(t *testing.T) {
	requireLocal(t)
	for _, after := range []time.Duration{0, 50 * time.Millisecond, 300 * time.Millisecond} {
		t.Run(after.String(), func(t *testing.T) {
			folder := openFolder(t)
			t.Setenv("TMPDIR", folder)
			cause := errors.New("the caller had enough")
			ctx, cancel := context.WithTimeoutCause(t.Context(), after, cause)
			defer cancel()
			if _, err := startOf(ctx, wayLocal); !errors.Is(err, cause) {
				t.Errorf("the error does not tell why: %v", err)
			}
			requireNothingIn(t, folder)
		})
	}
}

func TestAFolderThatTheOtherUserCannotWriteToIsNamed(t *testing.T) {
	requireLocal(t)
	if os.Geteuid() != 0 {
		t.Skip("only root starts PostgreSQL as another user")
	}
	folder := t.TempDir()
	t.Setenv("TMPDIR", folder)
	_, err := startOf(t.Context(), wayLocal)
	if err == nil {
		t.Fatal("no error")
	}
	requireText(t, err.Error(), folder, "Permission denied", "TMPDIR")
}

func TestADockerServerAnswers(t *testing.T) {
	requireDocker(t)
	t.Parallel()
	server := startForTest(t, wayDocker)
	if server.Way() != "docker" || server.PostmasterPID() != 0 {
		t.Errorf("way %q, PID %d", server.Way(), server.PostmasterPID())
	}
	for setting, want := range map[string]string{
		"fsync": "off", "synchronous_commit": "on", "max_connections": "500", "is_superuser": "on",
	} {
		if got := queryText(t, server.DSN(), "SHOW "+setting); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	requireNoContainer(t, server.place, 0)
}

// --- For tests ---

func TestDatabasesAreEmptyAndApartFromEachOther(t *testing.T) {
	t.Parallel()
	one, two := Database(t), Database(t)
	if one == two {
		t.Fatal("the same database twice")
	}
	if err := execute(one, "CREATE TABLE t ()"); err != nil {
		t.Fatal(err)
	}
	const tables = "SELECT count(*)::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"
	if got := queryText(t, one, tables); got != "1" {
		t.Errorf("%s tables in the first", got)
	}
	if got := queryText(t, two, tables); got != "0" {
		t.Errorf("%s tables in the second", got)
	}
}

func TestADatabaseIsDroppedWithItsSessionsAtTheCleanup(t *testing.T) {
	t.Parallel()
	var dsn string
	var pool *pgxpool.Pool
	t.Run("a test", func(t *testing.T) {
		dsn = Database(t)
		var err error
		if pool, err = pgxpool.New(t.Context(), dsn); err != nil {
			t.Fatal(err)
		}
		if err := pool.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	defer pool.Close()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	server, err := sharedServer()
	if err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(u.Path, "/")
	if got := queryText(t, server.DSN(), "SELECT count(*)::text FROM pg_database WHERE datname = '"+name+"'"); got != "0" {
		t.Errorf("%s is left", name)
	}
}

func TestManyTestsMayAskForADatabaseAtOnce(t *testing.T) {
	t.Parallel()
	for range 8 {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			queryText(t, Database(t), "SELECT 1::text")
		})
	}
}

func TestWithDatabase(t *testing.T) {
	t.Parallel()
	for dsn, want := range map[string]string{
		"postgres://u:p%40@h:1/a?sslmode=disable": "postgres://u:p%40@h:1/b?sslmode=disable",
		"postgresql://h": "postgresql://h/b",
		"postgres://h/a?dbname=c&connect_timeout=1": "postgres://h/b?connect_timeout=1",
		"host=h dbname=a": "host=h dbname=a dbname=b",
		"host=/run/postgresql user=u password='a b%zz'": "host=/run/postgresql user=u password='a b%zz' dbname=b",
	} {
		if got := withDatabase(dsn, "b"); got != want {
			t.Errorf("%s: got %s, want %s", dsn, got, want)
		}
		config, err := pgx.ParseConfig(withDatabase(dsn, "b"))
		if err != nil {
			t.Errorf("%s: %v", dsn, err)
		} else if config.Database != "b" {
			t.Errorf("%s: pgx reads database %q", dsn, config.Database)
		}
	}
}

func TestAPrivateServerIsApartFromOthers(t *testing.T) {
	t.Parallel()
	one, two := Private(t), Private(t)
	if one.DSN() == two.DSN() {
		t.Fatal("the same server twice")
	}
	if err := one.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := one.Stop(); err != nil {
		t.Errorf("the second Stop: %v", err)
	}
	if err := execute(one.DSN(), "SELECT 1"); err == nil {
		t.Error("it still answers")
	}
	if err := execute(two.DSN(), "SELECT 1"); err != nil {
		t.Errorf("the other one went with it: %v", err)
	}
}

// --- Stop, whatever was done to a local server ---

func TestStopLeavesNothingOfALocalServer(t *testing.T) {
	requireLocal(t)
	// Busy in a loop that looks neither at its client nor at the postmaster.
	const busy = "DO 'BEGIN LOOP END LOOP; END'"
	signalPID := func(t *testing.T, pid int, signal syscall.Signal) {
		if err := syscall.Kill(pid, signal); err != nil {
			t.Fatal(err)
		}
	}
	for name, hurt := range map[string]func(t *testing.T, s *Server, backend int){
		"running":         func(*testing.T, *Server, int) {},
		"frozen":          func(t *testing.T, s *Server, _ int) { signalPID(t, s.PostmasterPID(), syscall.SIGSTOP) },
		"killed":          func(t *testing.T, s *Server, _ int) { signalPID(t, s.PostmasterPID(), syscall.SIGKILL) },
		"a backend froze": func(t *testing.T, _ *Server, backend int) { signalPID(t, backend, syscall.SIGSTOP) },
		"all of it froze, then killed": func(t *testing.T, s *Server, backend int) {
			signalPID(t, backend, syscall.SIGSTOP)
			signalPID(t, s.PostmasterPID(), syscall.SIGSTOP)
			signalPID(t, s.PostmasterPID(), syscall.SIGKILL)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startForTest(t, wayLocal)
			segment := sharedMemory(t, server.place)
			conn, err := pgx.Connect(t.Context(), server.DSN())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close(context.Background())
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = conn.Exec(t.Context(), busy)
			}()
			backend := int(conn.PgConn().PID())
			eventually(t, "the statement runs", func() bool {
				return queryText(t, server.DSN(), fmt.Sprintf("SELECT state FROM pg_stat_activity WHERE pid = %d", backend)) == "active"
			})
			hurt(t, server, backend)
			if err := server.Stop(); err != nil {
				t.Error(err)
			}
			if left := processesIn(t, server.place); len(left) > 0 {
				t.Errorf("processes are left: %v", left)
			}
			if _, err := os.Stat(server.place); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the folder is left: %v", err)
			}
			requirePortClosed(t, server.DSN())
			requireNoSharedMemory(t, segment)
			<-done
		})
	}
}

func TestStopSaysThatTheMinderWasKilledAndCleansUpItself(t *testing.T) {
	requireLocal(t)
	t.Parallel()
	server, err := startOf(t.Context(), wayLocal)
	if err != nil {
		t.Fatal(err)
	}
	segment := sharedMemory(t, server.place)
	if err := syscall.Kill(minderPID(t, server), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := server.Stop(); err == nil {
		t.Error("no error")
	} else {
		requireText(t, err.Error(), "pgtest: ", server.place, "killed")
		if strings.Contains(err.Error(), "are left") {
			t.Error(err)
		}
	}
	requireNothingIn(t, server.place)
	requirePortClosed(t, server.DSN())
	requireNoSharedMemory(t, segment)
}

func TestAMinderThatIsToldToTerminateEndsTheServer(t *testing.T) {
	requireLocal(t)
	t.Parallel()
	server, err := startOf(t.Context(), wayLocal)
	if err != nil {
		t.Fatal(err)
	}
	segment := sharedMemory(t, server.place)
	if err := syscall.Kill(minderPID(t, server), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	requireNothingIn(t, server.place)
	requirePortClosed(t, server.DSN())
	requireNoSharedMemory(t, segment)
	if err := server.Stop(); err == nil {
		t.Error("Stop does not say so")
	}
}

// --- A process that ends leaves nothing, however it ends ---

// endings are the ways in which a process with a running server ends.
var endings = []struct {
	name  string
	child string           // what the child does after it has reported its server
	with  syscall.Signal   // what it is then sent, if not 0
	want  func(error) bool // how it must have ended, so that the test is of what it says
}{
	{"Stop and return", "stop", 0, func(err error) bool { return err == nil }},
	{"return without Stop", "return", 0, func(err error) bool { return err == nil }},
	{"os.Exit", "exit", 0, exitedWith(3)},
	{"panic in a goroutine", "panic", 0, exitedWith(2)},
	{"go test -timeout", "timeout", 0, exitedWith(2)},
	{"SIGINT", "wait", syscall.SIGINT, endedBy(syscall.SIGINT)},
	{"SIGTERM", "wait", syscall.SIGTERM, endedBy(syscall.SIGTERM)},
	{"SIGKILL", "wait", syscall.SIGKILL, endedBy(syscall.SIGKILL)},
	{"SIGKILL with the server frozen", "freeze", syscall.SIGKILL, endedBy(syscall.SIGKILL)},
	{"SIGKILL with another child alive", "child", syscall.SIGKILL, endedBy(syscall.SIGKILL)},
}

func TestAProcessThatEndsLeavesNothingOfALocalServer(t *testing.T) {
	requireLocal(t)
	for _, e := range endings {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			c := startChild(t, e.child, envWay+"=local")
			c.endBy(t, e.with, e.want)
			c.requireNothingLeft(t)
		})
	}
}

func TestAProcessThatEndsLeavesNothingOfADockerServer(t *testing.T) {
	requireDocker(t)
	for _, e := range endings {
		if e.child == "freeze" {
			continue // there is no process ID to freeze
		}
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			c := startChild(t, e.child, envWay+"=docker")
			c.endBy(t, e.with, e.want)
			if e.child == "stop" && c.stderr.Len() > 0 {
				t.Errorf("testcontainers is not silent: %s", c.stderr.String())
			}
			// The reaper gives a process ten seconds to come back.
			requireNoContainer(t, c.server.Place, 30*time.Second)
			requirePortClosed(t, c.server.DSN)
		})
	}
}

func TestAProcessKilledWhileItsServerStartsLeavesNothing(t *testing.T) {
	requireLocal(t)
	// From before initdb has made anything until the server is about to be ready.
	for _, after := range []time.Duration{0, 20, 100, 200, 300, 400, 500, 700} {
		t.Run(fmt.Sprintf("after %v", after*time.Millisecond), func(t *testing.T) {
			t.Parallel()
			folder := openFolder(t)
			cmd := childCommand(t, "start", envWay+"=local", "TMPDIR="+folder)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the server's folder is made", func() bool { return len(entries(t, folder)) > 0 })
			segment := func() string { // as long as there is one
				for _, name := range entries(t, folder) {
					if text, err := os.ReadFile(filepath.Join(folder, name, "data", "postmaster.pid")); err == nil {
						return sharedMemoryIn(text)
					}
				}
				return ""
			}
			time.Sleep(after * time.Millisecond) // not for an event: for a moment that no event marks
			seen := segment()
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			requireNothingIn(t, folder)
			requireNoSharedMemory(t, seen)
		})
	}
}

func TestCtrlCIsNotForTheServer(t *testing.T) {
	requireLocal(t)
	t.Parallel()
	// The child leads a process group, as a program does in a terminal; it takes the signal, and the server must not.
	c := startChild(t, "interrupt", envWay+"=local")
	if err := syscall.Kill(-c.cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	c.finish(t)
	if c.err != nil {
		t.Errorf("the server went with the signal: %v: %s", c.err, c.stderr.String())
	}
	c.requireNothingLeft(t)
}

func TestWithoutAServerATestFails(t *testing.T) {
	t.Parallel()
	cmd := childCommand(t, "timeout", envWay+"=nothing")
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("it passed or was skipped: %s", out)
	}
	requireText(t, string(out), "--- FAIL", envWay)
}

// --- The child ---

// childServer is what a child tells of its server, as a line of JSON on its standard output.
type childServer struct {
	DSN, Way, Place string
	Segment         string // of a local server's shared memory
}

// child is the whole program of a re-executed test binary.
func child(mode string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	server, err := Start(context.Background())
	fail(err)
	interrupts := make(chan os.Signal, 1)
	if mode == "interrupt" {
		signal.Notify(interrupts, os.Interrupt)
	}
	if mode == "child" {
		cmd := exec.Command("sleep", "3600")
		cmd.Stdin, err = os.Open(os.DevNull)
		fail(err)
		fail(cmd.Start())
		// Its end is the test's business, by way of the process group.
	}
	if mode == "freeze" {
		fail(syscall.Kill(server.PostmasterPID(), syscall.SIGSTOP))
	}
	report(server)
	switch mode {
	case "stop":
		fail(server.Stop())
	case "return":
	case "exit":
		os.Exit(3)
	case "panic":
		go panic("as planned")
		select {}
	case "interrupt":
		<-interrupts
		fail(execute(server.DSN(), "SELECT 1"))
	default:
		select {}
	}
}

func report(server *Server) {
	told := childServer{DSN: server.DSN(), Way: server.Way(), Place: server.place}
	if text, err := os.ReadFile(filepath.Join(server.place, "data", "postmaster.pid")); err == nil {
		told.Segment = sharedMemoryIn(text)
	}
	line, err := json.Marshal(told)
	if err != nil {
		panic(err)
	}
	fmt.Printf("%s\n", line)
}

// TestHang is the child of the endings that need go test itself.
func TestHang(t *testing.T) {
	if os.Getenv(envChild) != "timeout" {
		t.Skip("runs only as the child of another test")
	}
	Database(t)
	server, err := sharedServer()
	if err != nil {
		t.Fatal(err)
	}
	report(server)
	select {}
}

// childProcess is a child as its parent sees it.
type childProcess struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer
	folder string // its TMPDIR
	server childServer
	finish func(*testing.T) // waits for it to end, once
	err    error            // how it ended
}

// childCommand returns the command that runs this test binary as a child, with env added to the environment.
func childCommand(t *testing.T, mode string, env ...string) *exec.Cmd {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary)
	if mode == "timeout" {
		// Time to start a server on a busy machine, and no more.
		cmd.Args = append(cmd.Args, "-test.run=^TestHang$", "-test.timeout=8s")
	}
	cmd.Env = append(os.Environ(), append([]string{envChild + "=" + mode}, env...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// startChild starts a child and returns when it has told of its server.
func startChild(t *testing.T, mode string, env ...string) *childProcess {
	t.Helper()
	c := &childProcess{folder: openFolder(t)}
	c.cmd = childCommand(t, mode, append(env, "TMPDIR="+c.folder)...)
	c.cmd.Stderr = &c.stderr
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	var once sync.Once
	c.finish = func(t *testing.T) {
		t.Helper()
		once.Do(func() {
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				// Comes to its end only when nobody holds the output open any more, as go test's wait does.
				_, _ = io.Copy(io.Discard, lines)
				c.err = c.cmd.Wait()
			}()
			select {
			case <-ended:
			case <-time.After(time.Minute):
				t.Error("the child did not end, or something holds its output open")
				_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
				<-ended
			}
		})
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL) // with the child's children
		c.finish(t)
	})
	line, err := lines.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &c.server)
	}
	if err != nil {
		c.finish(t)
		t.Fatalf("the child did not tell of a server: %v: %s: %s", err, line, c.stderr.String())
	}
	return c
}

// endBy sends the child a signal, if it is not 0, waits for its end and requires it to be as wanted.
func (c *childProcess) endBy(t *testing.T, signal syscall.Signal, want func(error) bool) {
	t.Helper()
	if signal != 0 {
		if err := c.cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
	}
	c.finish(t)
	if !want(c.err) {
		t.Fatalf("the child ended otherwise: %v: %s", c.err, c.stderr.String())
	}
}

// requireNothingLeft requires that soon nothing of a local server is left.
func (c *childProcess) requireNothingLeft(t *testing.T) {
	t.Helper()
	requireNothingIn(t, c.folder)
	requirePortClosed(t, c.server.DSN)
	requireNoSharedMemory(t, c.server.Segment)
}

func exitedWith(code int) func(error) bool {
	return func(err error) bool {
		var exit *exec.ExitError
		return errors.As(err, &exit) && exit.ExitCode() == code
	}
}

func endedBy(signal syscall.Signal) func(error) bool {
	return func(err error) bool {
		var exit *exec.ExitError
		return errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == signal
	}
}

// --- What tests need and require ---

// requireLocal skips t on a machine without PostgreSQL's programs, unless the local way is forced.
func requireLocal(t *testing.T) {
	t.Helper()
	if _, _, err := findPrograms(); err != nil {
		if os.Getenv(envWay) == string(wayLocal) {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// dockerMissing tells what the docker way lacks on this machine, if anything. It starts a container to know, because the
// image of testcontainers' reaper or a host to reach the container by can be missing as well.
var dockerMissing = sync.OnceValue(func() error {
	silenceTestcontainers()
	ctx, cancel := context.WithTimeout(context.Background(), dockerEngineTimeout)
	defer cancel()
	engine, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		return fmt.Errorf("no Docker engine: %w", err)
	}
	defer engine.Close()
	if _, err := engine.ImageInspect(ctx, cmp.Or(os.Getenv(envImage), defaultImage)); err != nil {
		return fmt.Errorf("no image (%s names another): %w", envImage, err)
	}
	server, err := startDocker(context.Background(), false)
	if err != nil {
		return err
	}
	return server.Stop()
})

// requireDocker skips t on a machine that cannot start a container at once, unless the docker way is forced.
func requireDocker(t *testing.T) {
	t.Helper()
	if os.Getenv(envWay) == string(wayDocker) {
		return
	}
	if err := dockerMissing(); err != nil {
		t.Skip("the docker way is not tested: ", err)
	}
}

// withoutDocker makes the docker way fail at once, whatever the machine has: testcontainers looks for an engine in more
// places than the environment can close, but an upper-case name is no image's.
func withoutDocker(t *testing.T) { t.Setenv(envImage, "Not/An/Image") }

// withoutPrograms hides PostgreSQL's programs.
func withoutPrograms(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	folders := programFolders
	programFolders = filepath.Join(t.TempDir(), "*", "bin")
	t.Cleanup(func() { programFolders = folders })
}

// startForTest starts a server in one way and stops it at the cleanup of t.
func startForTest(t *testing.T, w way) *Server {
	t.Helper()
	server, err := startOf(t.Context(), w)
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

// queryText returns the one text that a query returns.
func queryText(t *testing.T, dsn, query string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var text string
	if err := conn.QueryRow(t.Context(), query).Scan(&text); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return text
}

func requireText(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q is not in: %s", part, text)
		}
	}
}

// eventually waits until is returns true, and fails t when it does not in a time that only a bug exceeds.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	eventuallyWithin(t, 30*time.Second, what, is)
}

func eventuallyWithin(t *testing.T, d time.Duration, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(d); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so after %v: %s", d, what)
		}
	}
}

// openFolder returns a folder that every user may write to, as TMPDIR is: t.TempDir is below one that is closed to others.
func openFolder(t *testing.T) string {
	t.Helper()
	folder, err := os.MkdirTemp("", "pgtest-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(folder); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(folder, 0o777); err != nil {
		t.Fatal(err)
	}
	return folder
}

func entries(t *testing.T, folder string) []string {
	t.Helper()
	list, err := os.ReadDir(folder)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	names := make([]string, len(list))
	for i, entry := range list {
		names[i] = entry.Name()
	}
	return names
}

// requireNothingIn requires that soon a folder is empty or gone, and no process works in it or has it in its arguments.
func requireNothingIn(t *testing.T, folder string) {
	t.Helper()
	eventually(t, "no process and no file is left in "+folder, func() bool {
		return len(processesIn(t, folder)) == 0 && len(entries(t, folder)) == 0
	})
}

// processesIn returns the processes that work in a folder or have it in their arguments, where there is a /proc to tell:
// the minder, initdb, the postmaster, and the backends, which overwrite their arguments. Zombies have neither.
func processesIn(t *testing.T, folder string) []string {
	t.Helper()
	proc, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, process := range proc {
		// Errors are those of processes that ended meanwhile.
		cwd, _ := os.Readlink(filepath.Join(process, "cwd"))
		args, _ := os.ReadFile(filepath.Join(process, "cmdline"))
		if process != fmt.Sprintf("/proc/%d", os.Getpid()) && (strings.HasPrefix(cwd, folder) || bytes.Contains(args, []byte(folder))) {
			found = append(found, process+" "+string(bytes.ReplaceAll(args, []byte{0}, []byte{' '})))
		}
	}
	return found
}

func requirePortClosed(t *testing.T, dsn string) {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, u.Host+" is closed", func() bool {
		conn, err := net.DialTimeout("tcp", u.Host, time.Second)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// sharedMemory returns the ID of a local server's System V shared memory segment, which outlives a process that is killed.
func sharedMemory(t *testing.T, folder string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(folder, "data", "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	return sharedMemoryIn(text)
}

func sharedMemoryIn(postmasterPID []byte) string {
	lines := strings.Split(string(postmasterPID), "\n")
	if len(lines) < 7 {
		return ""
	}
	words := strings.Fields(lines[6])
	if len(words) < 2 {
		return ""
	}
	return words[1]
}

// requireNoSharedMemory requires that soon a segment is gone, where there is a /proc to tell.
func requireNoSharedMemory(t *testing.T, id string) {
	t.Helper()
	eventually(t, "the shared memory segment "+id+" is removed", func() bool {
		text, _ := os.ReadFile("/proc/sysvipc/shm")
		for line := range strings.Lines(string(text)) {
			if words := strings.Fields(line); len(words) > 1 && words[1] == id {
				return false
			}
		}
		return true
	})
}

// requireNoContainer requires that within d a container is gone, if there is a docker command to tell.
func requireNoContainer(t *testing.T, name string, d time.Duration) {
	t.Helper()
	docker, err := exec.LookPath("docker")
	if err != nil {
		return
	}
	eventuallyWithin(t, d, "the container "+name+" is removed", func() bool {
		out, err := exec.Command(docker, "ps", "--all", "--quiet", "--filter", "name="+name).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return len(out) == 0
	})
}

// unusedPort returns a port that nobody listens on, as far as anybody can know.
func unusedPort(t *testing.T) int {
	t.Helper()
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// minderPID returns the process ID of a local server's minder: it leads the postmaster's process group.
func minderPID(t *testing.T, server *Server) int {
	t.Helper()
	pid, err := syscall.Getpgid(server.PostmasterPID())
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
