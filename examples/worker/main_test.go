//go:build unix

package main

import (
	"context"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/pgxdrain/pgxdrain/examples/internal/process"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m).Run()) }

// phases are what a run logs from the signal to its exit, in this order.
var phases = []string{
	"readiness fails", "refusing: no more jobs", "finishing the jobs in hand", "closing the database", "flushing logs", "exit",
}

func TestWorker(t *testing.T) {
	t.Parallel()
	program := process.Build(t)

	t.Run("finishes the jobs in hand, takes no other, and exits 0", func(t *testing.T) {
		t.Parallel()
		w := open(t).launch(program)
		inHand := w.insertInHand(maxWorkers, invoiceArgs{Takes: 3 * time.Second})
		w.Signal(syscall.SIGTERM)
		w.WaitFor("finishing the jobs in hand")
		if got := w.get("/health/ready"); got != http.StatusServiceUnavailable {
			t.Errorf("readiness is %d after the signal", got)
		}
		if got := w.get("/health/live"); got != http.StatusOK {
			t.Errorf("liveness is %d after the signal", got)
		}
		late := w.insert(invoiceArgs{})
		w.Exits(0)

		w.InOrder(append([]string{"signal received"}, phases...)...)
		w.Logged("jobs are still in hand", "jobs=10")
		w.Logged("msg=exit", "code=0")
		for _, id := range inHand {
			w.is(id, "completed", 1)
		}
		w.is(late, "available", 0)
		w.leftClean()
	})

	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run("a second signal, "+signal.String()+", hands back the jobs in hand and exits 1", func(t *testing.T) {
			t.Parallel()
			w := open(t).launch(program, "SHUTDOWN_TIMEOUT=60s")
			inHand := w.insertInHand(maxWorkers, invoiceArgs{Takes: 5 * time.Minute})
			w.Signal(syscall.SIGTERM)
			w.WaitFor("finishing the jobs in hand")
			w.Signal(signal)
			w.exitsWithin(30*time.Second, 1)

			w.InOrder(append([]string{"signal received"}, phases...)...)
			for _, id := range inHand {
				w.isHandedBack(id)
			}
			w.leftClean()
		})
	}

	t.Run("a budget that runs out hands back the jobs in hand and exits 1", func(t *testing.T) {
		t.Parallel()
		w := open(t).launch(program, "SHUTDOWN_TIMEOUT=8s")
		inHand := w.insertInHand(maxWorkers, invoiceArgs{Takes: 5 * time.Minute})
		w.Signal(syscall.SIGTERM)
		w.exitsWithin(30*time.Second, 1)

		w.InOrder(append([]string{"signal received"}, phases...)...)
		for _, id := range inHand {
			w.isHandedBack(id)
		}
		w.leftClean()
	})

	for _, fault := range []string{"deaf", "stuck"} {
		t.Run("a job that is "+fault+" does not hold up the exit and is handed back", func(t *testing.T) {
			t.Parallel()
			w := open(t).launch(program, "SHUTDOWN_TIMEOUT=8s")
			inHand := w.insertInHand(2, invoiceArgs{Takes: 5 * time.Minute, Fault: fault})
			w.Signal(syscall.SIGTERM)
			w.exitsWithin(30*time.Second, 1)

			w.InOrder("signal received", "handing back the jobs that are left", "closing the database",
				"handed back jobs that did not return", "flushing logs", "exit")
			for _, id := range inHand {
				w.isHandedBack(id)
			}
			w.leftNoSession()
		})
	}

	t.Run("signals that come until the last moment leave it its exit code", func(t *testing.T) {
		t.Parallel()
		w := open(t).launch(program)
		w.WaitFor("msg=ready")
		for ended := false; !ended; {
			w.Signal(syscall.SIGTERM)
			select {
			case <-w.Done():
				ended = true
			case <-time.After(time.Millisecond):
			}
		}
		if code := w.ExitCode(); code != 0 && code != 1 {
			t.Errorf("exit code %d:\n%s", code, w.Stderr.String())
		}
	})

	t.Run("a panic ends it through the same door, with the other jobs finished, and exits 1", func(t *testing.T) {
		t.Parallel()
		w := open(t).launch(program)
		other := w.insertInHand(1, invoiceArgs{Takes: 3 * time.Second})[0]
		bad := w.insert(invoiceArgs{Fault: "panic"})
		w.Exits(1)

		w.InOrder(append([]string{"fatal error"}, phases...)...)
		w.Logged("fatal error", "panicked: a bug")
		w.is(other, "completed", 1)
		if job := w.job(bad); job.state != "available" && job.state != "retryable" || job.invoices != 0 || job.errors != 1 {
			t.Errorf("the job that panicked is %+v", job)
		}
		w.leftClean()
	})

	t.Run("a database that cannot be reached ends it through the same door and exits 1", func(t *testing.T) {
		t.Parallel()
		p := process.Start(t, program, []string{
			"DATABASE_URL=postgres://app:s3cret@127.0.0.1:1/app", "PORT=" + process.FreePort(t),
		})
		p.Exits(1)
		p.InOrder(append([]string{"fatal error"}, phases...)...)
		if strings.Contains(p.Stderr.String(), "s3cret") {
			t.Errorf("shows the password:\n%s", p.Stderr.String())
		}
	})

	for _, bad := range []string{"soon", "0", "-1s"} {
		t.Run("SHUTDOWN_TIMEOUT="+bad+" is an error before the start", func(t *testing.T) {
			t.Parallel()
			p := process.Start(t, program, []string{"DATABASE_URL=postgres://127.0.0.1:1/app", "SHUTDOWN_TIMEOUT=" + bad})
			p.Exits(1)
			p.Logged("SHUTDOWN_TIMEOUT must be a duration greater than 0", bad)
			if strings.Contains(p.Stderr.String(), "starting") {
				t.Errorf("has started:\n%s", p.Stderr.String())
			}
		})
	}

	t.Run("a port that is taken exits 1", func(t *testing.T) {
		t.Parallel()
		taken, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer taken.Close()
		_, port, _ := net.SplitHostPort(taken.Addr().String())
		p := process.Start(t, program, []string{"DATABASE_URL=" + pgtest.Database(t), "PORT=" + port})
		p.Exits(1)
		p.Logged("worker failed", "address already in use")
	})
}

// Twenty runs on one database, one after the other, each ended at a random moment, in one of three ways, while jobs come all the
// time: each job has had its effect exactly once in the end.
func TestStress_NoJobIsLostOrRunToItsEndTwiceAcrossTwentyRestarts(t *testing.T) {
	t.Parallel()
	program := process.Build(t)
	db := open(t)

	inserting, stop := context.WithCancel(t.Context())
	inserted := make(chan int)
	go func() {
		n := 0
		defer func() { inserted <- n }()
		for inserting.Err() == nil {
			args := invoiceArgs{Takes: rand.N(400 * time.Millisecond)}
			if n%10 == 0 {
				args.Takes = 2 * time.Second // longer than the smallest budget
			}
			if n%20 == 0 {
				args.Fault = "deaf"
			}
			if _, err := db.jobs.Insert(t.Context(), args, nil); err != nil {
				t.Error(err)
				return
			}
			n++
			time.Sleep(rand.N(300 * time.Millisecond)) // load, not synchronization
		}
	}()

	forced := 0
	for i := range 20 {
		timeout := "20s"
		if i%4 == 3 {
			timeout = "2s" // a second of it for the jobs
		}
		w := db.launch(program, "SHUTDOWN_TIMEOUT="+timeout)
		w.WaitFor("starting")
		time.Sleep(rand.N(2 * time.Second)) // the random moment
		w.Signal(syscall.SIGTERM)
		if i%4 == 1 {
			w.WaitFor("readiness fails")
			time.Sleep(rand.N(100 * time.Millisecond))
			w.Signal(syscall.SIGTERM)
		}
		<-w.Done()
		if w.ExitCode() == 0 {
			w.InOrder(append([]string{"signal received"}, phases...)...)
		} else {
			forced++
			w.Exits(1)
			w.Logged("handing back the jobs that are left")
		}
		if n := db.count("SELECT count(*) FROM river_job WHERE state = 'running'"); n > 0 {
			t.Errorf("run %d has left %d jobs behind that nobody works on:\n%s", i, n, w.Stderr.String())
		}
	}
	stop()
	n := <-inserted

	w := db.launch(program)
	process.WaitUntil(t, "all jobs are done", func() bool {
		return db.count("SELECT count(*) FROM river_job WHERE state <> 'completed'") == 0
	})
	w.Signal(syscall.SIGTERM)
	w.Exits(0)

	handedBack := db.count("SELECT count(*) FROM river_job WHERE cardinality(attempted_by) > 1")
	deaf := db.count("SELECT count(*) FROM river_job WHERE cardinality(attempted_by) > 1 AND args ? 'fault'")
	t.Logf("%d jobs; %d of 20 runs were forced; %d jobs were handed back, %d of them deaf", n, forced, handedBack, deaf)
	if forced == 0 || handedBack == deaf || deaf == 0 {
		t.Error("nothing was forced: this has shown nothing")
	}
	if n != db.count("SELECT count(*) FROM river_job") {
		t.Errorf("%d jobs were inserted", n)
	}
	if n := db.count(`SELECT count(*) FROM river_job LEFT JOIN (SELECT job_id, count(*) AS n FROM invoice GROUP BY 1) AS i
		ON job_id = id WHERE n IS DISTINCT FROM 1`); n > 0 {
		t.Errorf("%d jobs have not had their effect exactly once", n)
	}
	w.leftClean()
}

// db is a database with River's tables, and a client that only inserts.
type db struct {
	t    *testing.T
	dsn  string
	pool *pgxpool.Pool
	jobs *river.Client[pgx.Tx]
}

func open(t *testing.T) *db {
	t.Helper()
	db := &db{t: t, dsn: pgtest.Database(t)}
	pool, err := pgxpool.New(t.Context(), db.dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	db.pool = pool
	migrator, err := rivermigrate.New(riverpgxv5.New(pool), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := migrator.Migrate(t.Context(), rivermigrate.DirectionUp, nil); err != nil {
		t.Fatal(err)
	}
	if db.jobs, err = river.NewClient(riverpgxv5.New(pool), &river.Config{}); err != nil {
		t.Fatal(err)
	}
	return db
}

func (db *db) insert(args invoiceArgs) (id int64) {
	db.t.Helper()
	done, err := db.jobs.Insert(db.t.Context(), args, nil)
	if err != nil {
		db.t.Fatal(err)
	}
	return done.Job.ID
}

func (db *db) count(query string) (n int) {
	db.t.Helper()
	if err := db.pool.QueryRow(db.t.Context(), query).Scan(&n); err != nil {
		db.t.Fatal(err)
	}
	return n
}

type job struct {
	state                     string
	attempt, errors, invoices int
}

func (db *db) job(id int64) (j job) {
	db.t.Helper()
	err := db.pool.QueryRow(db.t.Context(), `SELECT state::text, attempt, coalesce(cardinality(errors), 0),
		(SELECT count(*) FROM invoice WHERE job_id = id) FROM river_job WHERE id = $1`, id).
		Scan(&j.state, &j.attempt, &j.errors, &j.invoices)
	if err != nil {
		db.t.Fatal(err)
	}
	return j
}

// is checks what has become of a job.
func (db *db) is(id int64, state string, invoices int) {
	db.t.Helper()
	if job := db.job(id); job.state != state || job.invoices != invoices {
		db.t.Errorf("job %d is %+v, want it %s with %d invoices", id, job, state, invoices)
	}
}

// isHandedBack checks that any worker may take the job at once, and that the attempt does not count.
func (db *db) isHandedBack(id int64) {
	db.t.Helper()
	if got, want := db.job(id), (job{state: "available"}); got != want {
		db.t.Errorf("job %d is %+v, want %+v", id, got, want)
	}
}

// worker is a run of the program on a database.
type worker struct {
	*process.Process
	*db
	port string
}

func (db *db) launch(program string, env ...string) *worker {
	db.t.Helper()
	port := process.FreePort(db.t)
	env = append(env, "DATABASE_URL="+db.dsn, "PORT="+port)
	return &worker{process.Start(db.t, program, env, "-jobs=0"), db, port}
}

// insertInHand inserts jobs and waits until all of them run.
func (w *worker) insertInHand(n int, args invoiceArgs) (ids []int64) {
	w.t.Helper()
	w.WaitFor("msg=ready")
	if got := w.get("/health/ready"); got != http.StatusOK {
		w.t.Errorf("readiness is %d before the signal", got)
	}
	for range n {
		ids = append(ids, w.insert(args))
	}
	process.WaitUntil(w.t, "all jobs run", func() bool {
		return w.count("SELECT count(*) FROM river_job WHERE state = 'running'") == n
	})
	return ids
}

func (w *worker) get(path string) (status int) {
	w.t.Helper()
	resp, err := http.Get("http://127.0.0.1:" + w.port + path)
	if err != nil {
		w.t.Fatalf("%v\n%s", err, w.Stderr.String())
	}
	resp.Body.Close()
	return resp.StatusCode
}

func (w *worker) exitsWithin(limit time.Duration, code int) {
	w.t.Helper()
	from := time.Now()
	w.Exits(code)
	if took := time.Since(from); took > limit {
		w.t.Errorf("the exit took %v, want %v at most:\n%s", took, limit, w.Stderr.String())
	}
}

// leftClean checks that River had the database until it had stopped: nothing that it wanted to write was refused, and it does
// not lead any more. And that the run has left no session behind.
func (w *worker) leftClean() {
	w.t.Helper()
	w.Logged("pgxdrain: drained and closed", "refused=0")
	if n := w.count("SELECT count(*) FROM river_leader"); n > 0 {
		w.t.Error("the worker still leads, for others to wait for")
	}
	if !strings.Contains(w.Stdout.String(), `"pgxdrain.shutdown"`) {
		w.t.Errorf("the span of the shutdown was not flushed:\n%s", w.Stdout.String())
	}
	w.leftNoSession()
}

// leftNoSession is the last that a test asks: it closes the test's own.
func (w *worker) leftNoSession() {
	w.t.Helper()
	w.pool.Close()
	process.WaitNoSession(w.t, w.dsn)
}
