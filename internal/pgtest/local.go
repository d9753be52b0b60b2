//go:build unix

package pgtest

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

//go:embed local.sh
var localMinder string

const (
	// initdb and the start take about a second together; a loaded machine may need many times that.
	localStartTimeout = time.Minute
	// Longer than the minder's own bounds: 10 s for the fast shutdown, 10 s for the immediate one, 10 s to kill.
	localStopTimeout = 35 * time.Second
	// How often to try again when another process took the free port before postgres bound it.
	localPortTries = 5
)

// local is a server under its minder, the shell script local.sh.
type local struct {
	dir    string
	minder *minder
	life   *os.File // our end of the life pipe: at its end of file no process of the server is left
}

var errPortTaken = errors.New("another process took the port")

func startLocal(ctx context.Context) (*Server, error) {
	initdb, postgres, err := findPrograms()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, localStartTimeout,
		fmt.Errorf("the server was not ready within %v", localStartTimeout))
	defer cancel()
	for try := 1; ; try++ {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		s, err := startLocalOn(ctx, port, initdb, postgres)
		if err == nil || try == localPortTries || !errors.Is(err, errPortTaken) {
			return s, err
		}
	}
}

// programFolders is where Debian's packages install the programs, which they do not put on the PATH. Tests replace it.
var programFolders = "/usr/lib/postgresql/*/bin"

// findPrograms returns the paths of initdb and postgres.
func findPrograms() (initdb, postgres string, err error) {
	initdb, errInitdb := exec.LookPath("initdb")
	postgres, errPostgres := exec.LookPath("postgres")
	if errInitdb == nil && errPostgres == nil {
		return initdb, postgres, nil
	}
	folders, err := filepath.Glob(programFolders)
	if err != nil {
		return "", "", err
	}
	version := func(folder string) int {
		n, _ := strconv.Atoi(filepath.Base(filepath.Dir(folder)))
		return n
	}
	slices.SortFunc(folders, func(a, b string) int { return version(b) - version(a) })
	for _, folder := range folders {
		initdb, errInitdb := exec.LookPath(filepath.Join(folder, "initdb"))
		postgres, errPostgres := exec.LookPath(filepath.Join(folder, "postgres"))
		if errInitdb == nil && errPostgres == nil {
			return initdb, postgres, nil
		}
	}
	return "", "", fmt.Errorf("initdb and postgres are neither on the PATH nor in %s", programFolders)
}

// otherUser returns the user to run PostgreSQL as, since it refuses to run as root: nil for this process's own.
func otherUser() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, fmt.Errorf("PostgreSQL does not run as root, and there is no user postgres or nobody: %w", err)
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// freePort returns a port of the loopback address that was free a moment ago.
func freePort() (int, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// localSettings returns the lines for the end of postgresql.conf. They are there and not on the command line so that a
// test can override them with ALTER SYSTEM.
func localSettings(port int) string {
	return strings.Join([]string{
		"listen_addresses = '127.0.0.1'",
		"port = " + strconv.Itoa(port),
		// A socket's path is limited to some 100 bytes, which a folder below a long TMPDIR exceeds.
		"unix_socket_directories = ''",
		// Nothing outlives the server. What a transaction committed still survives the server's own death, which tests
		// check, because the kernel has it; so synchronous_commit stays on.
		"fsync = off",
		"full_page_writes = off",
		"synchronous_commit = on",
		"max_connections = 500",
		"shared_buffers = 32MB",
		// In files of the data folder: a killed server would leave segments in /dev/shm behind.
		"dynamic_shared_memory_type = mmap",
		"logging_collector = off",
		"log_destination = stderr",
	}, "\n")
}

// localEnv returns the environment of the minder and so of the server.
func localEnv() []string {
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool {
		// PGDATA, PGPORT and their kind would override what the minder says.
		return strings.HasPrefix(kv, "PG") || strings.HasPrefix(kv, "LC_")
	})
	// TZ saves initdb the search for the name of the machine's time zone, about a tenth of a second. On macOS a postmaster
	// whose locale is not set becomes multithreaded and refuses to start. Log messages are looked at below, so English.
	return append(env, "TZ=UTC", "LC_ALL=C")
}

// startLocalOn starts a server on a port, which another process may take first: the error is errPortTaken then.
func startLocalOn(ctx context.Context, port int, initdb, postgres string) (_ *Server, err error) {
	credential, err := otherUser()
	if err != nil {
		return nil, err
	}
	base, err := filepath.Abs(os.TempDir()) // the minder works elsewhere
	if err != nil {
		return nil, err
	}
	l := &local{dir: filepath.Join(base, "pgxdrain-"+strings.ToLower(rand.Text()[:12]))}
	if err := l.start(credential, initdb, postgres, localSettings(port)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.end(""))
		}
	}()

	password := newPassword()
	l.minder.tell(password + "\n")
	address := url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword("postgres", password),
		Host:     net.JoinHostPort("127.0.0.1", strconv.Itoa(port)),
		Path:     "/postgres",
		RawQuery: "sslmode=disable",
	}
	if err := l.waitReady(ctx, address.String()); err != nil {
		return nil, err
	}
	pid, err := l.postmasterPID()
	if err != nil {
		return nil, err
	}
	return &Server{dsn: address.String(), place: l.dir, pid: pid, stop: func() error { return l.end("stop\n") }}, nil
}

// start starts the minder, which waits for the password before it makes anything.
func (l *local) start(credential *syscall.Credential, initdb, postgres, settings string) error {
	life, lifeWrite, err := os.Pipe()
	if err != nil {
		return err
	}
	defer lifeWrite.Close()
	cmd := minderCommand(localMinder, append(localEnv(), "PGXDRAIN_SETTINGS="+settings), l.dir, initdb, postgres)
	cmd.ExtraFiles = []*os.File{lifeWrite}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
	if l.minder, err = startMinder(cmd); err != nil {
		life.Close()
		return err
	}
	l.life = life
	return nil
}

// waitReady returns once a connection has succeeded, or why none will.
func (l *local) waitReady(ctx context.Context, dsn string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	var said bytes.Buffer
	var reader sync.WaitGroup
	reader.Go(func() {
		// Returns at once when the server has exited, and otherwise when the deadline below is set.
		if _, err := said.ReadFrom(l.life); err == nil {
			cancel(errors.New("the server exited"))
		}
	})
	err := connectUntil(ctx, dsn)
	_ = l.life.SetReadDeadline(time.Now())
	reader.Wait()
	_ = l.life.SetReadDeadline(time.Time{})
	if err == nil {
		return nil
	}

	if text := strings.TrimSpace(said.String()); text != "" {
		// The minder's only word is that it could not make the folder.
		return fmt.Errorf("%s (PostgreSQL runs as another user when this process is root: "+
			"set TMPDIR to a folder that every user may write to)", text)
	}
	log, _ := os.ReadFile(filepath.Join(l.dir, "log"))
	if len(log) == 0 {
		return err
	}
	if bytes.Contains(log, []byte("could not bind IPv4 address")) {
		err = fmt.Errorf("%w: %w", err, errPortTaken)
	}
	return fmt.Errorf("%w; the end of its log:\n%s", err, tail(log))
}

// tail returns the last lines of a log.
func tail(log []byte) []byte {
	lines := bytes.SplitAfter(bytes.TrimSpace(log), []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-20):], nil)
}

func (l *local) postmasterPID() (int, error) {
	text, err := os.ReadFile(filepath.Join(l.dir, "data", "postmaster.pid"))
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(text), "\n")
	return strconv.Atoi(first)
}

// end has the minder end the server and waits until nothing is left. order is what to tell it first: "stop\n" for an
// orderly shutdown, "" for an immediate one, for a server that may not have come up.
func (l *local) end(order string) error {
	defer l.life.Close()
	l.minder.tell(order)
	err := l.minder.wait(localStopTimeout)
	if err == nil && l.gone(5*time.Second) {
		return nil
	}

	// The minder was killed, or was told by a signal to end the server. It is the leader of the process group that it
	// shares with the postmaster; while the life pipe is open the group has members, so its number is still theirs.
	gone := l.gone(100 * time.Millisecond)
	for _, signal := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGKILL} { // PostgreSQL's immediate shutdown first
		if gone {
			break
		}
		_ = syscall.Kill(-l.minder.cmd.Process.Pid, signal)
		_ = syscall.Kill(-l.minder.cmd.Process.Pid, syscall.SIGCONT)
		gone = l.gone(10 * time.Second)
	}
	if !gone {
		err = errors.Join(err, errors.New("processes of it are left"))
	}
	if removeErr := os.RemoveAll(l.dir); removeErr != nil {
		err = errors.Join(err, removeErr)
	}
	return err
}

// gone reports whether every process of the server has ended, waiting up to d, which is not 0, for it.
func (l *local) gone(d time.Duration) bool {
	_ = l.life.SetReadDeadline(time.Now().Add(d))
	var b [64]byte
	for {
		n, err := l.life.Read(b[:])
		if n == 0 && err != nil {
			return !errors.Is(err, os.ErrDeadlineExceeded)
		}
	}
}
