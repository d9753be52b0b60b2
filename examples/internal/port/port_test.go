//go:build unix

package port

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// serve serves on a port of its own until the end of t.
func serve(t *testing.T, handler http.HandlerFunc, accepted ...func()) (*Port, *http.Server, <-chan error) {
	t.Helper()
	p, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second}
	server.ConnState = func(conn net.Conn, state http.ConnState) {
		p.ConnState(conn, state)
		for _, f := range accepted {
			f()
		}
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(p) }()
	t.Cleanup(func() { _ = server.Close() })
	return p, server, served
}

func TestWhoHasConnectedIsAnsweredAlthoughTheServerHasNotAcceptedHimYet(t *testing.T) {
	t.Parallel()
	goOn := make(chan struct{})
	inHook := make(chan struct{})
	var once sync.Once
	p, server, served := serve(t, func(http.ResponseWriter, *http.Request) {}, func() {
		once.Do(func() { // on the goroutine that accepts: the others have to stay with the kernel
			close(inHook)
			<-goOn
		})
	})
	first := dial(t, p)
	<-inHook
	clients := []net.Conn{first}
	for range 10 {
		clients = append(clients, dial(t, p))
	}
	for _, c := range clients[1:] {
		ask(t, c)
	}
	ended := make(chan error, 1)
	go func() { ended <- p.Shutdown(t.Context(), server) }()
	for !p.closing.Load() {
		time.Sleep(time.Millisecond)
	}
	close(goOn)
	for _, c := range clients[1:] {
		answered(t, c)
	}
	ask(t, first) // who was accepted before has time to send his request
	answered(t, first)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", p.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error(err)
	}
}

func dial(t *testing.T, p *Port) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", p.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func ask(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: example\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
}

func answered(t *testing.T, c net.Conn) {
	t.Helper()
	answer, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 OK") {
		t.Errorf("%q %v", answer, err)
	}
}

func TestRequestInProgressIsWaitedForAndCutOffWhenTheContextEnds(t *testing.T) {
	t.Parallel()
	for _, inTime := range []bool{true, false} {
		began, end := make(chan struct{}), make(chan struct{})
		p, server, _ := serve(t, func(http.ResponseWriter, *http.Request) {
			close(began)
			<-end
		})
		answer := make(chan error, 1)
		go func() {
			response, err := http.Get("http://" + p.Addr().String())
			if err == nil {
				response.Body.Close()
			}
			answer <- err
		}()
		<-began
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- p.Shutdown(ctx, server) }()
		select {
		case err := <-ended:
			t.Fatalf("has not waited: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
		if inTime {
			close(end)
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if err := <-answer; err != nil {
				t.Error(err)
			}
		} else {
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) || !strings.HasPrefix(err.Error(), "1 connections") {
				t.Errorf("%v", err)
			}
			if err := <-answer; !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			close(end)
		}
		cancel()
	}
}

func TestConnectionsWithoutARequestAreClosed(t *testing.T) {
	t.Parallel()
	p, server, _ := serve(t, func(http.ResponseWriter, *http.Request) {})
	unused := dial(t, p)
	idle := new(http.Transport)
	defer idle.CloseIdleConnections()
	request, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+p.Addr().String(), nil)
	response, err := idle.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := p.Shutdown(ctx, server); err != nil {
		t.Error(err)
	}
	if n, err := unused.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d", n)
	}
}

func TestPortWhoseListenerHasDiedIsShutDownAllTheSame(t *testing.T) {
	t.Parallel()
	p, server, served := serve(t, func(http.ResponseWriter, *http.Request) {})
	p.Close()
	if err := <-served; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := p.Shutdown(ctx, server); err != nil || ctx.Err() != nil {
		t.Error(err, ctx.Err())
	}
}
