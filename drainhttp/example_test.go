package drainhttp_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/drainhttp"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// databaseURL stands for wherever a service has its connection string from.
func databaseURL() string {
	dsn, err := pgtest.DSN()
	if err != nil {
		log.Fatal(err)
	}
	return dsn
}

// A request that has begun when the service is stopped is served to its end; one that comes later is refused.
func ExampleMiddleware() {
	ctx := context.Background()
	pool, err := pgxdrain.New(ctx, databaseURL(), silent)
	if err != nil {
		log.Fatal(err)
	}
	begun, goOn := make(chan struct{}), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /slow", func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		<-goOn
		var n int
		if err := pool.QueryRow(r.Context(), "select 42").Scan(&n); err != nil { // the request's context: it is admitted
			http.Error(w, "no answer", http.StatusInternalServerError)
			return
		}
		fmt.Fprint(w, n)
	})
	server := httptest.NewServer(drainhttp.Middleware(pool, drainhttp.WithRetryAfter(2*time.Second))(mux))
	get := func() string {
		resp, err := http.Get(server.URL + "/slow")
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return fmt.Sprintf("%d, close: %v, Retry-After: %q, %q", resp.StatusCode, resp.Close, resp.Header.Get("Retry-After"), body)
	}
	first := make(chan string)
	go func() { first <- get() }()
	<-begun

	stopped := make(chan error) // on SIGTERM
	go func() { stopped <- pool.Shutdown(ctx) }()
	for pool.Report().Step != pgxdrain.StepDrain {
		time.Sleep(time.Millisecond)
	}
	fmt.Println(get())
	close(goOn)
	fmt.Println(<-first)
	fmt.Println("the pool:", <-stopped)
	fmt.Println("the server:", server.Config.Shutdown(ctx)) // after the pool: until then it has to answer
	server.Close()
	// Output:
	// 503, close: true, Retry-After: "2", "{\"error\":\"the service is shutting down\"}\n"
	// 200, close: true, Retry-After: "", "42"
	// the pool: <nil>
	// the server: <nil>
}

func ExampleReady() {
	ctx := context.Background()
	pool, err := pgxdrain.New(ctx, databaseURL(), silent)
	if err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/readyz", drainhttp.Ready(pool, drainhttp.WithDatabaseCheck(time.Minute))) // a second, in a service
	mux.Handle("/livez", drainhttp.Live(pool))
	probe := func(path string) {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		fmt.Print(path, " ", w.Code, " ", w.Body)
	}
	probe("/readyz")
	probe("/livez")
	if err := pool.Shutdown(ctx); err != nil {
		log.Fatal(err)
	}
	probe("/readyz")
	probe("/livez")
	// Output:
	// /readyz 200 {"ready":true,"step":"open"}
	// /livez 200 {"live":true,"step":"open"}
	// /readyz 503 {"ready":false,"step":"closed","reason":"pgxdrain: pool is shutting down"}
	// /livez 200 {"live":true,"step":"closed"}
}

// The page shows tables and load: it belongs on a port, or behind a login, that only operators reach.
func ExampleActive() {
	ctx := context.Background()
	pool, err := pgxdrain.New(ctx, databaseURL(), silent)
	if err != nil {
		log.Fatal(err)
	}
	admin := http.NewServeMux()
	admin.Handle("/debug/pgxdrain", drainhttp.Active(pool))
	server := httptest.NewServer(admin) // on 127.0.0.1
	defer server.Close()

	resp, err := http.Get(server.URL + "/debug/pgxdrain") // no browser: JSON
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	fmt.Println(resp.StatusCode, resp.Header.Get("Content-Type"))
	pool.Close()
	// Output: 200 application/json
}
