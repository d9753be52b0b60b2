//go:build unix

package pgtest

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// minder is a shell script that outlives this process to clean up after it. It ends when its control pipe does. A nil
// *minder minds nothing.
type minder struct {
	cmd     *exec.Cmd
	control *os.File // our end of the control pipe
}

// controls holds the control pipes of the minders that were not waited for. Without it the garbage collector would close
// the pipe of a Server that its user no longer refers to, and so end the server, while its DSN is in use.
var controls = struct {
	sync.Mutex
	open map[*os.File]struct{}
}{open: map[*os.File]struct{}{}}

// minderCommand returns the command that runs a minder's script with arguments and an environment. The script is in the
// environment and not in an argument: who asks ps what this process is should find a line to read, not a page.
func minderCommand(script string, env []string, args ...string) *exec.Cmd {
	cmd := exec.Command("/bin/sh", append([]string{"-c", `eval "$PGXDRAIN_MINDER"`, "pgxdrain-minder"}, args...)...)
	cmd.Env = append(env, "PGXDRAIN_MINDER="+script)
	return cmd
}

// startMinder starts cmd as a minder: with the control pipe as its standard input, and apart from this process's terminal.
func startMinder(cmd *exec.Cmd) (*minder, error) {
	// os.Pipe makes both ends close-on-exec: no other child that this process starts, before or after, can keep the pipe
	// open, and what the minder minds alive with it.
	read, control, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer read.Close()
	cmd.Stdin = read
	// Standard output and error stay /dev/null: go test waits for whoever holds its output open.
	cmd.Dir = "/" // so that no folder is kept busy, and because another user may not be allowed into the caller's
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// A session of its own: Ctrl-C goes to the terminal's foreground process group, and would otherwise end a server
	// before the test that uses it, or the minder before the server.
	cmd.SysProcAttr.Setsid = true
	if err := cmd.Start(); err != nil {
		control.Close()
		return nil, fmt.Errorf("start the minder: %w", err)
	}
	controls.Lock()
	defer controls.Unlock()
	controls.open[control] = struct{}{}
	return &minder{cmd, control}, nil
}

// tell writes to the control pipe. That it fails shows when the minder is waited for: it has exited then.
func (m *minder) tell(text string) {
	if m != nil {
		_, _ = m.control.WriteString(text)
	}
}

// wait closes the control pipe and waits for the minder to exit. After d it kills the minder's process group.
func (m *minder) wait(d time.Duration) error {
	if m == nil {
		return nil
	}
	_ = m.control.Close()
	controls.Lock()
	delete(controls.open, m.control)
	controls.Unlock()
	exited := make(chan error, 1)
	go func() { exited <- m.cmd.Wait() }()
	select {
	case err := <-exited:
		if err != nil {
			return fmt.Errorf("its minder: %w", err)
		}
		return nil
	case <-time.After(d):
		_ = syscall.Kill(-m.cmd.Process.Pid, syscall.SIGKILL)
		<-exited
		return fmt.Errorf("its minder was not done within %v", d)
	}
}

//go:embed docker.sh
var dockerMinder string

// mindContainer has the named container removed when this process is gone, if the docker command is on the PATH; if not,
// nobody does that, and the minder it returns is nil.
func mindContainer(engineHost, name string) (*minder, error) {
	docker, err := exec.LookPath("docker")
	if err != nil {
		return nil, nil
	}
	// The engine that testcontainers found, which need not be the one that the docker command would.
	env := append(os.Environ(), "DOCKER_HOST="+engineHost)
	return startMinder(minderCommand(dockerMinder, env, docker, name))
}
