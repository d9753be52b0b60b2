// Package chaos breaks an example on request, to see that it stops in good order then as well. A service of yours breaks by
// itself and needs none of this.
package chaos

import (
	"errors"
	"net"
	"net/http"
	"os"
)

// Handler answers POST /chaos/{how}: panic and error run, through background, a part of the service that ends so; listener closes
// the listener under the server. All of it is 404 unless the variable CHAOS is 1.
func Handler(background func(part func() error), listener net.Listener) http.Handler {
	mux := http.NewServeMux()
	if os.Getenv("CHAOS") != "1" {
		return mux
	}
	mux.HandleFunc("POST /chaos/panic", func(http.ResponseWriter, *http.Request) {
		background(func() error { panic("chaos: a bug") })
	})
	mux.HandleFunc("POST /chaos/error", func(http.ResponseWriter, *http.Request) {
		background(func() error { return errors.New("chaos: it cannot go on") })
	})
	mux.HandleFunc("POST /chaos/listener", func(http.ResponseWriter, *http.Request) {
		_ = listener.Close()
	})
	return mux
}
