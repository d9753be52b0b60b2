package pgxdrain_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
)

// proxy is the network between a pool and its server, which a test can break and mend.
//
// Broken, it loses nothing for good: what the kernels of both sides have taken is delivered when it is mended, as TCP does after
// a network comes back.
type proxy struct {
	server   string
	listener net.Listener
	wg       sync.WaitGroup

	// Called before a cancel request, or a Terminate, is passed on; neither is seen inside TLS. Set before any use.
	onCancel, onTerminate func()

	mu    sync.Mutex
	flows [2]chan struct{} // towards the server, towards the client: closed while it flows
	cut   bool             // new connections are reset
	conns map[net.Conn]struct{}
	ended bool
}

const (
	toServer = iota
	toClient
)

// newProxy starts a proxy before the server of dsn and returns it with the DSN that leads through it.
func newProxy(t testing.TB, dsn string) (_ *proxy, through string) {
	t.Helper()
	u := must[*url.URL](t)(url.Parse(dsn))
	p := &proxy{
		server:      u.Host,
		listener:    must[net.Listener](t)(net.Listen("tcp4", "127.0.0.1:0")),
		onCancel:    func() {},
		onTerminate: func() {},
		conns:       make(map[net.Conn]struct{}),
	}
	p.resume()
	p.wg.Go(p.accept)
	t.Cleanup(p.end)
	u.Host = p.listener.Addr().String()
	return p, u.String()
}

func (p *proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.link(client) })
	}
}

func (p *proxy) link(client net.Conn) {
	p.mu.Lock()
	cut := p.cut
	p.mu.Unlock()
	if cut {
		reset(client)
		return
	}
	if !p.track(client) {
		return
	}
	defer p.close(client)

	// The client speaks first. The server hears of it when there is something to pass on.
	first := make([]byte, 16<<10)
	p.awaitFlow(toServer)
	n, err := client.Read(first)
	if err != nil {
		return
	}
	if startCode(first[:n]) == cancelRequestCode {
		p.onCancel()
	}
	p.awaitFlow(toServer)
	server, err := net.Dial("tcp", p.server)
	if err != nil || !p.track(server) {
		return
	}
	defer p.close(server)
	if _, err := server.Write(first[:n]); err != nil {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { p.pump(server, client, toServer) })
	both.Go(func() { p.pump(client, server, toClient) })
	both.Wait()
}

// track takes conn down, so that it can be reset, or closes it if the proxy has ended.
func (p *proxy) track(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		conn.Close()
		return false
	}
	p.conns[conn] = struct{}{}
	return true
}

func (p *proxy) close(conn net.Conn) {
	p.mu.Lock()
	delete(p.conns, conn)
	p.mu.Unlock()
	conn.Close()
}

var terminate = []byte{'X', 0, 0, 0, 4}

// pump copies from one side to the other while that direction flows, the end of file as well.
func (p *proxy) pump(to, from net.Conn, direction int) {
	b := make([]byte, 16<<10)
	for {
		p.awaitFlow(direction)
		n, err := from.Read(b)
		if direction == toServer && bytes.HasSuffix(b[:n], terminate) {
			p.onTerminate()
		}
		p.awaitFlow(direction)
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				from.Close()
				return
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			_ = to.(*net.TCPConn).CloseWrite()
			return
		case err != nil: // a reset is passed on, too
			reset(to)
			return
		}
	}
}

// What a client's first message says it is, in its second word.
const (
	cancelRequestCode = 80877102
	sslRequestCode    = 80877103
)

func startCode(message []byte) uint32 {
	if len(message) < 8 {
		return 0
	}
	return binary.BigEndian.Uint32(message[4:])
}

func reset(conn net.Conn) {
	_ = conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

func (p *proxy) awaitFlow(direction int) {
	p.mu.Lock()
	flow := p.flows[direction]
	p.mu.Unlock()
	<-flow
}

// swallow keeps what comes, in these directions, while connections stay open. New ones are accepted; nothing more.
func (p *proxy) swallow(directions ...int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range directions {
		p.flows[d] = make(chan struct{})
	}
}

// reset resets every connection, and those that come.
func (p *proxy) reset() {
	p.mu.Lock()
	p.cut = true
	p.mu.Unlock()
	p.resetAll()
}

// resetAll resets every connection that there is.
func (p *proxy) resetAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		reset(conn)
	}
}

// resume mends the network.
func (p *proxy) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = false
	for d, flow := range p.flows {
		if flow == nil {
			p.flows[d] = make(chan struct{})
		}
		select {
		case <-p.flows[d]:
		default:
			close(p.flows[d])
		}
	}
}

func (p *proxy) end() {
	p.listener.Close()
	p.mu.Lock()
	p.ended = true
	for conn := range p.conns {
		conn.Close()
	}
	p.mu.Unlock()
	p.resume()
	p.wg.Wait()
}
