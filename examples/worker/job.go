package main

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/pgxdrain/pgxdrain"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
)

// invoiceTable has nothing against a second invoice of a job, so that one would be seen.
const invoiceTable = `CREATE TABLE IF NOT EXISTS invoice (job_id bigint NOT NULL)`

// invoiceArgs is a job: write an invoice.
type invoiceArgs struct {
	Takes time.Duration `json:"takes"`
	Fault string        `json:"fault,omitempty"` // to see what becomes of it: "panic", "deaf" to its context, "stuck" for ever
}

func (invoiceArgs) Kind() string { return "invoice" }

type invoicing struct {
	river.WorkerDefaults[invoiceArgs]
	pool *pgxdrain.Pool
}

// Work reads what is to go into the invoice, on a connection for each statement, and writes it in a transaction, which makes the
// job completed as well: there is either both or neither.
func (w *invoicing) Work(ctx context.Context, job *river.Job[invoiceArgs]) error {
	switch job.Args.Fault {
	case "panic":
		panic("a bug")
	case "deaf":
		ctx = context.WithoutCancel(ctx)
	case "stuck":
		select {}
	}
	const reads, read = 3, "SELECT pg_sleep($1)"
	takes := (job.Args.Takes / (reads + 1)).Seconds()
	for range reads {
		if _, err := w.pool.Exec(ctx, read, takes); err != nil {
			return err
		}
	}
	return pgx.BeginFunc(ctx, w.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "INSERT INTO invoice VALUES ($1)", job.ID); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, read, takes); err != nil {
			return err
		}
		_, err := river.JobCompleteTx[*riverpgxv5.Driver](ctx, tx, job)
		return err
	})
}
