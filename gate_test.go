package pgxdrain

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"pgregory.net/rapid"

	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// The model of the gate is who is in, whether it was closed, and whether the token for "empty" is out.
func TestGateCountsExactlyThoseItAdmitted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := newGate()
		in, closed, token := 0, false, false
		leave := func() {
			switch left := g.leaveOpen(); {
			case left == closed:
				t.Fatalf("left while open: %v; closed: %v", left, closed)
			case closed:
				g.leave()
			}
			in--
			token = token || closed && in == 0
		}
		t.Repeat(map[string]func(*rapid.T){
			"enter": func(t *rapid.T) {
				if n, ok := g.enter(); ok {
					in++
					if n != in {
						t.Fatalf("%d in, want %d", n, in)
					}
					if closed {
						t.Fatal("admitted after close")
					}
					return
				}
				if !closed {
					t.Fatal("refused while open")
				}
				token = token || in == 0 // a refusal may say once more that nobody is in
			},
			"enter under": func(t *rapid.T) {
				if in == 0 {
					t.Skip("nobody is in")
				}
				g.enterUnder()
				in++
			},
			"leave": func(t *rapid.T) {
				if in == 0 {
					t.Skip("nobody is in")
				}
				leave()
			},
			"close": func(*rapid.T) {
				if n := g.close(); n != in {
					t.Fatalf("%d in when it closed, want %d", n, in)
				}
				closed = true
				token = token || in == 0
			},
			"take the token": func(t *rapid.T) {
				select {
				case <-g.empty:
					if !token {
						t.Fatal("said to be empty without having been")
					}
					token = false
				default:
					if token {
						t.Fatal("was empty and did not say so")
					}
				}
			},
			"": func(t *rapid.T) {
				if g.count() != in || g.closed() != closed {
					t.Fatalf("count %d, closed %v; want %d, %v", g.count(), g.closed(), in, closed)
				}
			},
		})
	})
}

func TestStress_GateAdmitsNobodyAfterCloseAndSaysWhenTheLastHasLeft(t *testing.T) {
	t.Parallel()
	for range 500 {
		g := newGate()
		var in, admittedLate atomic.Int64
		var closed atomic.Bool
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 50 {
					late := closed.Load()
					if _, ok := g.enter(); !ok {
						continue
					}
					if late {
						admittedLate.Add(1)
					}
					in.Add(1)
					in.Add(-1)
					g.leave()
				}
			})
		}
		g.close()
		closed.Store(true)
		for g.count() > 0 {
			<-g.empty
		}
		if n := in.Load(); n != 0 {
			t.Fatalf("%d in after the gate was empty", n)
		}
		wg.Wait()
		if n := admittedLate.Load(); n != 0 {
			t.Fatalf("%d admitted after close", n)
		}
		if n := g.count(); n != 0 {
			t.Fatalf("count is %d at the end", n)
		}
	}
}

// A machine may be so slow that the report is due before the steps have come to what it is about.
func TestFinalReportIsWholeThoughTheStepsAreLate(t *testing.T) {
	t.Parallel()
	pool, err := New(t.Context(), pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, release, err := pool.Hold(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	pool.shutdown.closeGate()
	conn, err := pool.Acquire(ctx) // as part of a unit of work, it is waited for with that until the cancel step
	if err != nil {
		t.Fatal(err)
	}
	err = pool.shutdown.result()
	conn.Release()
	release()
	pool.Pool.Close()
	if r := pool.Report(); err == nil || r.Active != 1 || r.Admitted != 1 || r.Leaked != 2 {
		t.Errorf("got %v, %+v", err, r)
	}
}

// openAndAcquire makes a pool of a database of the test's own, and acquires a connection of it.
func openAndAcquire(t *testing.T) (*Pool, *pgxpool.Conn) {
	t.Helper()
	pool, err := New(t.Context(), pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return pool, conn
}

// The gate closes between a release and the shutdown's coming to that lease.
func TestLeaseThatEndsAsTheGateClosesIsReported(t *testing.T) {
	t.Parallel()
	pool, conn := openAndAcquire(t)
	in := pool.tracer.gate.close()
	conn.Release()
	left := pool.tracer.gate.count()
	pool.Pool.Close()
	if f := pool.shutdown.followed; in != 1 || left != 0 || len(f) != 1 || f[0].op.Outcome != OutcomeDrained {
		t.Errorf("%d in, %d left; noted: %+v", in, left, f)
	}
}

// BenchmarkHooks is what the hooks of an acquisition and its release take by themselves, and the parts of it that docs/benchmarks.md
// names.
func BenchmarkHooks(b *testing.B) {
	pool, err := New(b.Context(), pgtest.Database(b))
	if err != nil {
		b.Fatal(err)
	}
	defer pool.Close()
	held, err := pool.Acquire(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	defer held.Release()
	t, conn := pool.tracer, held.Conn()
	r := t.record(conn)
	r.release() // the connection stays ours
	defer func() {
		t.gate.enter()
		t.acquired(b.Context(), conn)
	}()

	b.Run("all", func(b *testing.B) {
		ctx := context.Background()
		for b.Loop() {
			ctx := t.TraceAcquireStart(ctx, pool.Pool, pgxpool.TraceAcquireStartData{})
			t.TraceAcquireEnd(ctx, pool.Pool, pgxpool.TraceAcquireEndData{Conn: conn})
			t.TraceRelease(pool.Pool, pgxpool.TraceReleaseData{Conn: conn})
		}
	})
	b.Run("of a statement besides", func(b *testing.B) {
		t.gate.enter()
		t.acquired(b.Context(), conn)
		defer t.TraceRelease(pool.Pool, pgxpool.TraceReleaseData{Conn: conn})
		ctx := context.Background()
		for b.Loop() {
			ctx := t.TraceQueryStart(ctx, conn, pgx.TraceQueryStartData{SQL: "select 1"})
			t.TraceQueryEnd(ctx, conn, pgx.TraceQueryEndData{})
		}
	})
	b.Run("clock", func(b *testing.B) {
		for b.Loop() {
			now()
		}
	})
	b.Run("gate", func(b *testing.B) {
		for b.Loop() {
			t.gate.enter()
			t.gate.leaveOpen()
		}
	})
	b.Run("look-up", func(b *testing.B) {
		for b.Loop() {
			t.record(conn)
			t.record(conn)
		}
	})
	b.Run("phase", func(b *testing.B) {
		for b.Loop() {
			r.phase.Store(leased)
			r.phase.CompareAndSwap(leased, free)
		}
	})
}
