//go:build unix

package port

import (
	"net"

	"golang.org/x/sys/unix"
)

// queued reports whether the kernel has accepted a connection that l has not.
func queued(l *net.TCPListener) bool {
	raw, err := l.SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	_ = raw.Control(func(fd uintptr) {
		n, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	})
	return n > 0
}
