package drainhttp

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/pgxdrain/pgxdrain"
)

// A response whose request was in flight when draining began can say "Connection: close" only if somebody looks when its
// header is written: the header belongs to the handler's goroutine until then. So the ResponseWriter has to be wrapped, and a
// wrapper hides every method that it does not declare. Those of net/http's own ResponseWriters are known: they are wrapped
// whole. Another middleware's may have any others: it is left as it is.

// netHTTP is what net/http's ResponseWriters have in common.
type netHTTP interface {
	http.ResponseWriter
	http.Flusher
	io.StringWriter
	FlushError() error
	CloseNotify() <-chan bool
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	EnableFullDuplex() error
}

// http1 is net/http's ResponseWriter of an HTTP/1 request.
type http1 interface {
	netHTTP
	http.Hijacker
	io.ReaderFrom
}

// http2 is net/http's, and x/net/http2's, of an HTTP/2 request.
type http2 interface {
	netHTTP
	http.Pusher
}

// closer is a ResponseWriter that says "Connection: close" if the pool is draining when the header is written.
type closer struct {
	netHTTP
	pool    *pgxdrain.Pool
	written bool // the header, or it was taken over with Hijack: it is not ours to change any more
}

// closing returns w wrapped, and the wrapper. Of another middleware's w the wrapper is nil, and the header is set now.
func closing(w http.ResponseWriter, pool *pgxdrain.Pool) (http.ResponseWriter, *closer) {
	switch whole := w.(type) {
	case http1:
		c := &http1Closer{closer{netHTTP: whole, pool: pool}}
		return c, &c.closer
	case http2:
		c := &http2Closer{closer{netHTTP: whole, pool: pool}}
		return c, &c.closer
	}
	if draining(pool) {
		w.Header().Set("Connection", "close")
	}
	return w, nil
}

// beforeHeader is called before anything that writes the header.
func (c *closer) beforeHeader() {
	if !c.written && draining(c.pool) {
		c.Header().Set("Connection", "close")
	}
	c.written = true
}

func (c *closer) WriteHeader(status int) {
	switch {
	case status == http.StatusSwitchingProtocols: // its header says Connection: Upgrade
		c.written = true
	case status >= 200: // others come before the response's own header
		c.beforeHeader()
	}
	c.netHTTP.WriteHeader(status)
}

func (c *closer) Write(p []byte) (int, error) {
	c.beforeHeader()
	return c.netHTTP.Write(p)
}

func (c *closer) WriteString(s string) (int, error) {
	c.beforeHeader()
	return c.netHTTP.WriteString(s)
}

func (c *closer) Flush() {
	c.beforeHeader()
	c.netHTTP.Flush()
}

func (c *closer) FlushError() error {
	c.beforeHeader()
	return c.netHTTP.FlushError()
}

type http1Closer struct{ closer }

func (c *http1Closer) ReadFrom(r io.Reader) (int64, error) {
	c.beforeHeader()
	return c.netHTTP.(http1).ReadFrom(r)
}

func (c *http1Closer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := c.netHTTP.(http1).Hijack()
	c.written = c.written || err == nil
	return conn, rw, err
}

type http2Closer struct{ closer }

func (c *http2Closer) Push(target string, opts *http.PushOptions) error {
	return c.netHTTP.(http2).Push(target, opts)
}
