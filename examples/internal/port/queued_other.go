//go:build !unix

package port

import "net"

// queued reports whether the kernel has accepted a connection that l has not. It cannot be asked here.
func queued(*net.TCPListener) bool { return false }
