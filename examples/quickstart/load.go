package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/pgxdrain/pgxdrain"
)

// conns is so small a pool that callers have to wait: the operations of load take all of it.
const conns = 4

// load is the work of the service: a few long operations, and callers who come all the time and want little.
type load struct {
	pool *pgxdrain.Pool
	log  *slog.Logger

	running     sync.WaitGroup
	noMore      chan struct{} // closed: no more callers come
	showRefusal sync.Once
}

const callersEvery = 200 * time.Millisecond

func startLoad(pool *pgxdrain.Pool, log *slog.Logger, longest time.Duration) *load {
	l := &load{pool: pool, log: log, noMore: make(chan struct{})}
	l.operation("quick report", l.query, longest/3)
	l.operation("report", l.query, longest/2)
	l.operation("export", l.export, longest*3/4)
	l.operation("transfer", l.transfer, longest)
	l.running.Go(l.comeAndGo)
	l.running.Go(l.unready)
	go l.signalWhenBusy()
	return l
}

// stop sends no more callers and waits a moment for what is still to be logged.
func (l *load) stop() {
	close(l.noMore)
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		l.running.Wait()
	}()
	select {
	case <-finished:
	case <-time.After(time.Second): // operations that were ended by force may not know yet
	}
}

func (l *load) operation(name string, f func(context.Context, time.Duration) error, takes time.Duration) {
	l.running.Go(func() {
		if err := f(context.Background(), takes); err != nil {
			l.log.Error("operation failed", "operation", name, "err", err)
			return
		}
		l.log.Info("operation finished", "operation", name)
	})
}

// query is one long statement.
func (l *load) query(ctx context.Context, takes time.Duration) error {
	_, err := l.pool.Exec(ctx, "SELECT count(*) FROM generate_series(1, 1000), pg_sleep($1)", takes.Seconds())
	return err
}

// export is rows that are read slowly.
func (l *load) export(ctx context.Context, takes time.Duration) error {
	const n = 20
	rows, err := l.pool.Query(ctx, "SELECT id, 'somebody' AS name FROM generate_series(1, $1::int) AS id", n)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		time.Sleep(takes / n)
	}
	return rows.Err()
}

// transfer is a transaction that waits for somebody else before its COMMIT.
func (l *load) transfer(ctx context.Context, takes time.Duration) error {
	return pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "CREATE TEMP TABLE booking (account text, amount int) ON COMMIT DROP"); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "INSERT INTO booking VALUES ('alice', -10), ('bob', 10)"); err != nil {
			return err
		}
		time.Sleep(takes)
		return nil
	})
}

// comeAndGo is the callers, who come whatever state the service is in.
func (l *load) comeAndGo() {
	every := time.NewTicker(callersEvery)
	defer every.Stop()
	for {
		select {
		case <-every.C:
			l.running.Go(l.call)
		case <-l.noMore:
			return
		}
	}
}

// call is one caller.
func (l *load) call() {
	start := time.Now()
	_, err := l.pool.Exec(context.Background(), "SELECT 'hello', pg_sleep(0.1)")
	waited := time.Since(start)
	switch {
	case errors.Is(err, pgxdrain.ErrShuttingDown):
		l.showRefusal.Do(func() { l.log.Warn("first caller refused", "after", waited, "err", err) }) // an HTTP server answers 503
	case err != nil:
		l.log.Error("caller failed", "err", err)
	case l.isDraining():
		l.log.Info("caller got its turn", "waited", waited.Round(time.Millisecond))
	}
}

// isDraining is what a readiness probe asks.
func (l *load) isDraining() bool {
	select {
	case <-l.pool.Draining():
		return true
	default:
		return false
	}
}

// unready stands for the load balancer, which asks the readiness probe.
func (l *load) unready() {
	<-l.pool.Draining()
	l.log.Info("readiness fails, callers are still let in")
}

// signalWhenBusy sends this process a SIGTERM in the middle of the work: when all connections are in use and callers wait.
func (l *load) signalWhenBusy() {
	for start := time.Now(); time.Since(start) < 5*time.Second; time.Sleep(10 * time.Millisecond) {
		if l.isDraining() {
			return // somebody else has sent one, and a second would be the end
		}
		if r := l.pool.Report(); r.Active == conns && r.Waiting >= 2 {
			break
		}
	}
	r := l.pool.Report()
	l.log.Info("sending SIGTERM to this process", "active", r.Active, "waiting", r.Waiting)
	self, err := os.FindProcess(os.Getpid())
	if err == nil {
		err = self.Signal(syscall.SIGTERM)
	}
	if err != nil {
		l.log.Error("cannot send SIGTERM: press Ctrl-C", "err", err)
	}
}
