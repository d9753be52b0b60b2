package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/pgxdrain/pgxdrain"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
	"github.com/riverqueue/river/rivertype"
)

const (
	maxWorkers = 10
	maxConns   = maxWorkers + 4 // River's own statements must not have to wait for a job's connection
)

// newClient makes River's client on the raw pool, which is drained all the same. It does not start it.
func newClient(pool *pgxdrain.Pool, log *slog.Logger, fail func(error)) (*river.Client[pgx.Tx], error) {
	workers := river.NewWorkers()
	river.AddWorker(workers, &invoicing{pool: pool})
	return river.NewClient(riverpgxv5.New(pool.Pool), &river.Config{
		Queues:       map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: maxWorkers}},
		Workers:      workers,
		Middleware:   []rivertype.Middleware{&held{pool: pool}},
		ErrorHandler: &panics{fail: fail},
		Logger:       log,
	})
}

// start makes the tables, inserts some jobs, to have some, and starts River. When it returns nil the database has answered.
func start(ctx context.Context, pool *pgxdrain.Pool, jobs *river.Client[pgx.Tx], insert int) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	migrator, err := rivermigrate.New(riverpgxv5.New(pool.Pool), nil)
	if err != nil {
		return err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return err
	}
	if _, err := pool.Exec(ctx, invoiceTable); err != nil {
		return err
	}
	for range insert {
		if _, err := jobs.Insert(ctx, invoiceArgs{Takes: 4 * time.Second}, nil); err != nil {
			return err
		}
	}
	return jobs.Start(context.WithoutCancel(ctx)) // jobs run with this context: the signal must not cut them off
}

// held makes each job a unit of work of the pool: it shows among the pool's operations in progress from its beginning to its end,
// also between two statements, and a shutdown of the pool waits for it.
type held struct {
	river.MiddlewareDefaults
	pool *pgxdrain.Pool
}

func (h *held) Work(ctx context.Context, _ *rivertype.JobRow, work func(context.Context) error) error {
	ctx, release, err := h.pool.Hold(ctx)
	if err != nil {
		return err
	}
	defer release()
	return work(ctx)
}

// panics ends the worker when a job panics: nobody knows what state it has left behind. River notes the panic as the job's error,
// and it is tried again later. Without this River goes on.
type panics struct{ fail func(error) }

func (p *panics) HandleError(context.Context, *rivertype.JobRow, error) *river.ErrorHandlerResult {
	return nil
}

func (p *panics) HandlePanic(_ context.Context, job *rivertype.JobRow, value any, _ string) *river.ErrorHandlerResult {
	p.fail(fmt.Errorf("job %d panicked: %v", job.ID, value))
	return nil
}

// inHand returns the number of jobs that run.
func inHand(pool *pgxdrain.Pool) int {
	n := 0
	for _, op := range pool.Active() {
		if op.State == pgxdrain.StateHold {
			n++
		}
	}
	return n
}

// tellProgress logs once a second how many jobs are still in hand, until the function it returns is called.
func tellProgress(log *slog.Logger, pool *pgxdrain.Pool) (stop func()) {
	stopping := make(chan struct{})
	var telling sync.WaitGroup
	telling.Go(func() {
		every := time.NewTicker(time.Second)
		defer every.Stop()
		for {
			select {
			case <-every.C:
				log.Info("jobs are still in hand", "jobs", inHand(pool))
			case <-stopping:
				return
			}
		}
	})
	return func() {
		close(stopping)
		telling.Wait()
	}
}

// handBackTheRest does for jobs that have not returned what River does for those that have: it lets another worker have them at
// once, where River's rescuer would take an hour. It is called when the pool has been shut down, and so the session of each of
// these jobs has been ended: whatever the job's goroutine does, it commits nothing any more. A COMMIT that was under way then
// holds a lock on the job's row, which is waited for.
func handBackTheRest(ctx context.Context, log *slog.Logger, pool *pgxdrain.Pool, clientID string) (err error) {
	conn, err := pgx.ConnectConfig(ctx, pool.Config().ConnConfig)
	if err != nil {
		return fmt.Errorf("cannot hand back jobs: %w", err)
	}
	defer func() { err = errors.Join(err, conn.Close(ctx)) }()
	done, err := conn.Exec(ctx, `UPDATE river_job SET state = 'available', scheduled_at = now(), attempt = attempt - 1
		WHERE state = 'running' AND attempted_by[cardinality(attempted_by)] = $1`, clientID)
	if err != nil {
		return fmt.Errorf("cannot hand back jobs: %w", err)
	}
	if n := done.RowsAffected(); n > 0 {
		log.Warn("handed back jobs that did not return", "jobs", n)
	}
	return nil
}
