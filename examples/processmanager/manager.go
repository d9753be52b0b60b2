//go:build unix

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/pgxdrain/pgxdrain"
)

// manager is whoever has started the process: PM2, systemd, or neither. What is said to one that is not there goes nowhere.
type manager struct {
	log *slog.Logger
	pm2 *os.File // Node's IPC channel, or nil

	asks chan error // PM2's shutdown messages
}

// newManager finds out what there is from the environment: NODE_CHANNEL_FD is set by Node's child_process, with which PM2 starts
// whatever it starts; NOTIFY_SOCKET, which the daemon package reads, by systemd. Processes that this one starts get no channel.
func newManager(log *slog.Logger) (*manager, error) {
	m := &manager{log: log, asks: make(chan error)}
	text, ok := os.LookupEnv("NODE_CHANNEL_FD")
	if !ok {
		return m, nil
	}
	fd, err := strconv.Atoi(text)
	if err != nil {
		return nil, fmt.Errorf("NODE_CHANNEL_FD must be a number and is %q", text)
	}
	if mode := os.Getenv("NODE_CHANNEL_SERIALIZATION_MODE"); mode != "" && mode != "json" {
		return nil, fmt.Errorf("NODE_CHANNEL_SERIALIZATION_MODE must be json and is %q", mode)
	}
	if err := errors.Join(os.Unsetenv("NODE_CHANNEL_FD"), os.Unsetenv("NODE_CHANNEL_SERIALIZATION_MODE")); err != nil {
		return nil, err
	}
	syscall.CloseOnExec(fd)
	m.pm2 = os.NewFile(uintptr(fd), "NODE_CHANNEL_FD")
	go m.listen()
	return m, nil
}

// listen reads PM2's messages, a JSON value a line. If PM2 goes away the service stays.
func (m *manager) listen() {
	messages := json.NewDecoder(m.pm2)
	for {
		var message any
		if err := messages.Decode(&message); err != nil {
			if !errors.Is(err, io.EOF) {
				m.log.Warn("PM2 cannot be understood any more", "err", err)
			}
			return
		}
		if message == "shutdown" {
			m.asks <- errors.New("message of PM2")
		}
	}
}

// asksToStop returns a context that is done when a signal, or a message of PM2's, asks the process to stop: one that no earlier
// context has taken. It is never undone: a signal that comes in the last moment must not end the process before its exit code
// does.
func (m *manager) asksToStop() context.Context {
	signalled, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	ctx, cancel := context.WithCancelCause(signalled)
	go func() {
		select {
		case ask := <-m.asks:
			cancel(ask)
		case <-ctx.Done():
		}
	}()
	return ctx
}

// ready says that requests are served: pm2 start and systemctl start wait for it.
func (m *manager) ready() {
	m.notify(daemon.SdNotifyReady + "\nSTATUS=Serving")
	if m.pm2 != nil {
		if _, err := m.pm2.WriteString("\"ready\"\n"); err != nil {
			m.log.Warn("cannot tell PM2", "err", err)
		}
	}
}

// extension is how long a message gives the service to send the next. They are sent every second, so that systemd ends a service
// that hangs soon after it should have, however long its TimeoutStopSec.
const extension = 5 * time.Second

// stopping says that the service stops, and then, every second until the function it returns is called, how far it is. systemd
// prolongs TimeoutStopSec meanwhile, if that is less than the budget. PM2 has no such message: its kill_timeout is all there is.
func (m *manager) stopping(pool *pgxdrain.Pool, deadline time.Time) (stop func()) {
	m.notify(daemon.SdNotifyStopping)
	done := make(chan struct{})
	var telling sync.WaitGroup
	telling.Go(func() {
		every := time.NewTicker(time.Second)
		defer every.Stop()
		for {
			report := pool.Report()
			m.notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d\nSTATUS=Stopping (%s): %d operations and %v left",
				extension.Microseconds(), report.Step, len(report.Remaining()), max(0, time.Until(deadline)).Round(time.Second)))
			select {
			case <-every.C:
			case <-done:
				return
			}
		}
	})
	return func() {
		close(done)
		telling.Wait()
	}
}

// watch tells systemd, if the unit has a WatchdogSec, that the service is alive, as long as it answers: while it stops as well.
func (m *manager) watch(address net.Addr) {
	within, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		m.log.Warn("no watchdog", "err", err)
	}
	if within == 0 {
		return
	}
	client := http.Client{Timeout: within / 2}
	probe := fmt.Sprintf("http://127.0.0.1:%d/health/live", address.(*net.TCPAddr).Port)
	for range time.Tick(within / 3) {
		resp, err := client.Get(probe)
		if err != nil {
			continue
		}
		resp.Body.Close()
		m.notify(daemon.SdNotifyWatchdog)
	}
}

// notify sends a message to systemd.
func (m *manager) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		m.log.Warn("cannot tell systemd", "err", err)
	}
}
