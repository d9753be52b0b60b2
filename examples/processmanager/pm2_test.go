//go:build unix

package main

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgxdrain/pgxdrain/examples/internal/process"
)

func TestPM2(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("pm2"); err != nil {
		if os.Getenv("PGXDRAIN_PM2") == "required" {
			t.Fatal(err)
		}
		t.Skip("pm2 is missing (npm install -g pm2)")
	}
	program := process.Build(t)

	t.Run("start returns when the service is ready", func(t *testing.T) {
		t.Parallel()
		c := newClient(t)
		gate := newGate(t, c.dsn)
		pm2 := newPM2(t, program, "DATABASE_URL="+gate.dsn, "PORT="+c.port)
		pm2.configure("listen_timeout: 20000", "listen_timeout: 300000") // longer than this test waits
		started := pm2.begin("start", "ecosystem.config.js")
		<-gate.reached
		select {
		case <-started:
			t.Error("pm2 start has returned before the database had answered")
		case <-time.After(3 * time.Second): // it has not; nothing tells that it does not mean to
		}
		gate.open()
		<-started
		if got := c.get("/health/ready"); got.status != http.StatusOK {
			t.Errorf("readiness is %v after pm2 start", got)
		}
		pm2.run("stop", "processmanager")
		pm2.hasStopped(0)
		process.WaitNoSession(t, c.dsn)
	})

	for _, command := range []string{"stop", "restart", "reload"} {
		t.Run(command+" sends the shutdown message, and requests in flight are finished", func(t *testing.T) {
			t.Parallel()
			c := newClient(t)
			pm2 := newPM2(t, program, c.env()...)
			pm2.run("start", "ecosystem.config.js")
			before := pm2.app()
			inFlight := c.slow(2, "/api/data?ms=5000") // PM2's default would be to kill it after 1.6 s
			pm2.run(command, "processmanager")
			c.answered(inFlight, http.StatusOK)

			if command == "stop" {
				pm2.hasStopped(0)
			} else {
				after := pm2.app()
				if after.PID == before.PID || after.PID == 0 || after.Env.Status != "online" {
					t.Errorf("%+v after pm2 %s, and %+v before it", after, command, before)
				}
				if got := c.get("/health/ready"); got.status != http.StatusOK {
					t.Errorf("readiness is %v after pm2 %s", got, command)
				}
				pm2.run("stop", "processmanager")
				pm2.hasStopped(0)
			}
			process.WaitNoSession(t, c.dsn)
		})
	}

	t.Run("a service that does not become ready is waited for as long as listen_timeout, and can be stopped", func(t *testing.T) {
		t.Parallel()
		c := newClient(t)
		gate := newGate(t, c.dsn)
		pm2 := newPM2(t, program, "DATABASE_URL="+gate.dsn, "PORT="+c.port)
		pm2.configure("listen_timeout: 20000", "listen_timeout: 2000")
		pm2.run("start", "ecosystem.config.js")
		if got := c.get("/health/ready"); got.err == nil {
			t.Errorf("the port is open: %v", got)
		}
		pm2.run("stop", "processmanager")
		pm2.hasStopped(0)
		if log := pm2.log(); strings.Contains(log, "msg=ready") {
			t.Errorf("it has become ready:\n%s", log)
		}
	})

	t.Run("a second stop ends the requests in flight, with exit code 1", func(t *testing.T) {
		t.Parallel()
		c := newClient(t)
		pm2 := newPM2(t, program, c.env()...)
		pm2.configure("SHUTDOWN_TIMEOUT: '20s'", "SHUTDOWN_TIMEOUT: '60s'")
		pm2.configure("kill_timeout: 30000", "kill_timeout: 90000")
		pm2.run("start", "ecosystem.config.js")
		inFlight := c.slow(2, "/api/data?ms=300000")
		from := time.Now()
		first := pm2.begin("stop", "processmanager")
		process.WaitUntil(t, "it drains", func() bool { return strings.Contains(pm2.log(), "new work is refused") })
		pm2.run("stop", "processmanager")
		<-first
		if took := time.Since(from); took > 30*time.Second { // the budget is a minute
			t.Errorf("took %v", took)
		}
		c.answered(inFlight, http.StatusServiceUnavailable)
		pm2.hasStopped(1)
	})

	t.Run("requests in flight past the budget are ended before kill_timeout, with exit code 1", func(t *testing.T) {
		t.Parallel()
		c := newClient(t)
		pm2 := newPM2(t, program, c.env()...)
		pm2.configure("SHUTDOWN_TIMEOUT: '20s'", "SHUTDOWN_TIMEOUT: '4s'")
		pm2.run("start", "ecosystem.config.js")
		inFlight := c.slow(2, "/api/data?ms=300000")
		pm2.run("stop", "processmanager")
		c.answered(inFlight, http.StatusServiceUnavailable)
		pm2.hasStopped(1)
		process.WaitNoSession(t, c.dsn)
	})
}

func TestConfigOfPM2AllowsForTheBudgets(t *testing.T) {
	t.Parallel()
	node, err := exec.LookPath("node")
	if err != nil {
		if os.Getenv("PGXDRAIN_PM2") == "required" {
			t.Fatal(err)
		}
		t.Skip("node is missing (Debian's package nodejs)")
	}
	out, err := exec.CommandContext(t.Context(), node, "-p", "JSON.stringify(require('./ecosystem.config.js').apps[0])").Output()
	if err != nil {
		t.Fatal(err)
	}
	var app struct {
		Interpreter         string `json:"interpreter"`
		WaitReady           bool   `json:"wait_ready"`
		ShutdownWithMessage bool   `json:"shutdown_with_message"`
		ListenTimeout       int    `json:"listen_timeout"`
		KillTimeout         int    `json:"kill_timeout"`
		Env                 map[string]string
	}
	if err := json.Unmarshal(out, &app); err != nil {
		t.Fatal(err)
	}
	if app.Interpreter != "none" || !app.WaitReady || !app.ShutdownWithMessage {
		t.Errorf("%+v", app)
	}
	if got := time.Duration(app.ListenTimeout) * time.Millisecond; got <= startTimeout {
		t.Errorf("listen_timeout is %v, and a start may take %v", got, startTimeout)
	}
	if got := time.Duration(app.KillTimeout) * time.Millisecond; got <= defaultShutdownTimeout {
		t.Errorf("kill_timeout is %v, and a shutdown may take %v", got, defaultShutdownTimeout)
	}
	if got := app.Env["SHUTDOWN_TIMEOUT"]; got != defaultShutdownTimeout.String() {
		t.Errorf("SHUTDOWN_TIMEOUT is %s, and %v in the code", got, defaultShutdownTimeout)
	}
}

// pm2 is a PM2 with a daemon of its own, which is ended with the test.
type pm2 struct {
	t    *testing.T
	home string // with the config and the program
	env  []string
}

func newPM2(t *testing.T, program string, env ...string) *pm2 {
	t.Helper()
	home, err := os.MkdirTemp("", "pm2") // t.TempDir may be longer than the paths of PM2's sockets may be
	if err != nil {
		t.Fatal(err)
	}
	p := &pm2{t, home, append(os.Environ(), append(env, "PM2_HOME="+filepath.Join(home, ".pm2"), "HOME="+home)...)}
	t.Cleanup(func() {
		p.run("kill")
		if err := os.RemoveAll(home); err != nil {
			t.Error(err)
		}
	})
	config, err := os.ReadFile("ecosystem.config.js")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.config(), config, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(home, "processmanager")); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pm2) config() string { return filepath.Join(p.home, "ecosystem.config.js") }

// configure changes the config.
func (p *pm2) configure(old, new string) {
	p.t.Helper()
	config, err := os.ReadFile(p.config())
	if err != nil {
		p.t.Fatal(err)
	}
	if !strings.Contains(string(config), old) {
		p.t.Fatalf("no %q in\n%s", old, config)
	}
	if err := os.WriteFile(p.config(), []byte(strings.Replace(string(config), old, new, 1)), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// begin runs a command of PM2's and returns a channel that is closed when it has returned.
func (p *pm2) begin(args ...string) <-chan struct{} {
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		p.run(args...)
	}()
	return returned
}

// run runs a command of PM2's and returns what it prints.
func (p *pm2) run(args ...string) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), process.Limit) // not t's context: it is done at the cleanup
	defer cancel()
	cmd := exec.CommandContext(ctx, "pm2", args...)
	cmd.Dir, cmd.Env = p.home, p.env
	out, err := cmd.Output()
	if err != nil {
		p.t.Errorf("pm2 %q: %v\n%s\n%s", args, err, out, p.daemonLog())
	}
	return string(out)
}

// app is what PM2 says of the service.
type app struct {
	PID int `json:"pid"`
	Env struct {
		Status   string `json:"status"`
		ExitCode int    `json:"exit_code"`
		Log      string `json:"pm_err_log_path"`
	} `json:"pm2_env"`
}

func (p *pm2) app() app {
	p.t.Helper()
	out := p.run("jlist")
	var apps []app
	if err := json.Unmarshal([]byte(out[strings.LastIndex("\n"+out, "\n["):]), &apps); err != nil || len(apps) != 1 {
		p.t.Fatalf("pm2 jlist: %v\n%s", err, out)
	}
	return apps[0]
}

func (p *pm2) log() string {
	p.t.Helper()
	log, err := os.ReadFile(p.app().Env.Log)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(log)
}

func (p *pm2) daemonLog() string {
	log, _ := os.ReadFile(filepath.Join(p.home, ".pm2", "pm2.log"))
	return string(log)
}

// hasStopped checks that PM2 has asked the service to stop with its message, that it has exited by itself, and how.
func (p *pm2) hasStopped(code int) {
	p.t.Helper()
	if app := p.app(); app.Env.Status != "stopped" || app.Env.ExitCode != code {
		p.t.Errorf("%+v, want it stopped with exit code %d", app, code)
	}
	log := p.log()
	if !strings.Contains(log, `msg="asked to stop" by="message of PM2"`) || !strings.Contains(log, "msg=exit") {
		p.t.Errorf("was not asked by the message, or has not come to its end:\n%s", log)
	}
	if log := p.daemonLog(); strings.Contains(log, "SIGKILL") {
		p.t.Errorf("was killed:\n%s", log)
	}
}
