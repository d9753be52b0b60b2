package pgxdrain

import (
	"context"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/trace"
)

// State is what a connection in use is doing, in the words of pg_stat_activity.state.
type State string

const (
	StateActive                   State = "active"                        // a statement runs, or its rows are being read
	StateIdle                     State = "idle"                          // held, outside a transaction, no statement running
	StateIdleInTransaction        State = "idle in transaction"           // in a transaction, no statement running
	StateIdleInTransactionAborted State = "idle in transaction (aborted)" // the same, and a statement of it has failed
	StateCommitting               State = "committing"                    // a COMMIT runs; "active" to pg_stat_activity
)

// Operation is a connection in use, from its acquisition to its release, seen at one moment.
//
// It is made from what pgx's tracer hooks tell. Statements that bypass them, through [pgx.Conn.PgConn], are not seen: the
// connection is held all the same, and what the server says of its transaction is taken up at the next statement.
type Operation struct {
	// PID is the process ID of the server's backend. Behind a pooler the pooler has made it up: it can be found in the
	// pooler's logs, and must never be signalled or given to pg_terminate_backend.
	PID   uint32
	State State

	// Statement is the text of the statement in progress, or else of the last one, as [WithQueryText] allows it to be
	// shown; empty if none has run since the connection was acquired. Of a batch it is the first of its statements.
	Statement string
	// BatchSize is the number of statements if Statement was sent as a batch, else 0.
	BatchSize int

	AcquiredAt       time.Time
	StatementStart   time.Time     // when the statement in progress, or else the last one, began; zero if none has
	TransactionStart time.Time     // when the statement that began the transaction began; zero outside one
	Held             time.Duration // since AcquiredAt, to now or to the operation's end

	// SpanContext is of the span that was current when the connection was acquired; not valid if there was none.
	SpanContext trace.SpanContext

	// Outcome is how the operation ended, in the [Report] of a shutdown; empty while it has not.
	Outcome Outcome
}

// gateClosed is the bit of the gate's word that says so; the others count.
const gateClosed = 1 << 63

// gate admits work and counts it, both in one atomic word, so that nothing gets in uncounted and nothing gets in after it is
// closed. (With a flag beside a WaitGroup, who has looked at the flag before the flip would be added after the wait.)
type gate struct {
	word  atomic.Uint64
	empty chan struct{} // holds a token once a count of 0 was reached with the gate closed; buffered, 1
}

func newGate() gate { return gate{empty: make(chan struct{}, 1)} }

// enter counts one in and reports true, or reports false if the gate is closed.
func (g *gate) enter() bool {
	if g.word.Add(1)&gateClosed == 0 {
		return true
	}
	g.leave()
	return false
}

// enterUnder counts one in whether or not the gate is closed. The caller must have entered and not left yet.
func (g *gate) enterUnder() { g.word.Add(1) }

// leave counts one out.
func (g *gate) leave() {
	if g.word.Add(^uint64(0)) == gateClosed {
		select {
		case g.empty <- struct{}{}:
		default:
		}
	}
}

// close refuses every enter from now on, and returns how many are in at that moment.
func (g *gate) close() int {
	in := g.word.Or(gateClosed) &^ gateClosed
	if in == 0 {
		select {
		case g.empty <- struct{}{}:
		default:
		}
	}
	return int(in)
}

func (g *gate) closed() bool { return g.word.Load()&gateClosed != 0 }

// count is the number of those in. While the gate is closed it may, for an instant, include one that is being refused.
func (g *gate) count() int { return int(g.word.Load() &^ gateClosed) }

// tracer sees a pool from inside, through pgx's hooks: it refuses and counts acquisitions at the gate and keeps a record of
// each connection. It is set as the ConnConfig.Tracer of the pool's own config.
//
// A connection of another pool reaches these hooks too if that pool was made from the raw pool's Config. It has no record
// and its acquisitions are not of our pool, so all of them pass it by.
type tracer struct {
	pool     *pgxpool.Pool
	maxConns int
	gate     gate
	refused  atomic.Int64

	shutdown *shutdown // is told of leases that begin or end while the gate is closed

	mu  sync.Mutex
	set []*record // of the pool's connections that have been acquired once; changes when one comes or goes
}

var (
	_ pgxpool.AcquireTracer = (*tracer)(nil)
	_ pgxpool.ReleaseTracer = (*tracer)(nil)
	_ pgx.QueryTracer       = (*tracer)(nil)
	_ pgx.BatchTracer       = (*tracer)(nil)
	_ pgx.CopyFromTracer    = (*tracer)(nil)
	_ pgx.PrepareTracer     = (*tracer)(nil)
)

func newTracer(maxConns int32) *tracer {
	return &tracer{gate: newGate(), maxConns: int(maxConns)}
}

// composed is a user's tracer with ours.
type composed struct {
	*multitracer.Tracer
	user pgx.QueryTracer
}

// after composes t with the user's tracer, if there is one. Ours comes last, in end hooks as well: the user's span must
// have ended before our release can let a drain finish.
func (t *tracer) after(user pgx.QueryTracer) pgx.QueryTracer {
	if user == nil {
		return t
	}
	return composed{multitracer.New(user, t), user}
}

// withoutOurs takes a pool's tracer out of a config that was obtained from the raw pool or from one of its connections.
func withoutOurs(qt pgx.QueryTracer) pgx.QueryTracer {
	switch qt := qt.(type) {
	case *tracer:
		return nil
	case composed:
		return qt.user
	default:
		return qt
	}
}

// refusedContext is the context that a refused acquisition goes on with: puddle's Acquire returns the Err of a context that
// is done before it does anything else. It keeps the values, where a user's tracer may have its span.
type refusedContext struct {
	context.Context
	by *tracer
}

var done = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

func (refusedContext) Done() <-chan struct{} { return done }
func (refusedContext) Err() error            { return ErrShuttingDown }

func (t *tracer) TraceAcquireStart(ctx context.Context, pool *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	if pool != t.pool {
		return ctx
	}
	if !t.gate.enter() {
		t.refused.Add(1)
		return refusedContext{ctx, t}
	}
	return ctx
}

func (t *tracer) TraceAcquireEnd(ctx context.Context, pool *pgxpool.Pool, data pgxpool.TraceAcquireEndData) {
	if pool != t.pool {
		return
	}
	if c, ok := ctx.(refusedContext); ok && c.by == t {
		return
	}
	if data.Conn == nil { // Err may be nil even so: one of the user's hooks has panicked
		t.gate.leave()
		return
	}
	t.acquired(ctx, data.Conn)
}

func (t *tracer) TraceRelease(_ *pgxpool.Pool, data pgxpool.TraceReleaseData) {
	if r := t.record(data.Conn); r != nil && r.release() {
		t.gate.leave()
	}
}

func (t *tracer) TraceQueryStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	t.statementStarts(conn, statement{kind: query, sql: data.SQL})
	return ctx
}

func (t *tracer) TraceQueryEnd(_ context.Context, conn *pgx.Conn, _ pgx.TraceQueryEndData) {
	t.statementEnds(conn, query)
}

func (t *tracer) TraceBatchStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	// Only the first text is kept, by value: pgx rewrites the queued queries while others may be looking. An empty batch
	// has no hook.
	first := data.Batch.QueuedQueries[0]
	t.statementStarts(conn, statement{kind: batch, sql: first.SQL, batchSize: data.Batch.Len()})
	return ctx
}

func (t *tracer) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}

func (t *tracer) TraceBatchEnd(_ context.Context, conn *pgx.Conn, _ pgx.TraceBatchEndData) {
	t.statementEnds(conn, batch)
}

func (t *tracer) TraceCopyFromStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceCopyFromStartData) context.Context {
	s := statement{kind: copyFrom} // its text is put together by who wants to see it
	if n := len(data.TableName); n > 0 {
		s.table[1] = data.TableName[n-1]
		if n > 1 {
			s.table[0] = data.TableName[n-2]
		}
	}
	t.statementStarts(conn, s)
	return ctx
}

func (t *tracer) TraceCopyFromEnd(_ context.Context, conn *pgx.Conn, _ pgx.TraceCopyFromEndData) {
	t.statementEnds(conn, copyFrom)
}

func (t *tracer) TracePrepareStart(ctx context.Context, conn *pgx.Conn, data pgx.TracePrepareStartData) context.Context {
	t.statementStarts(conn, statement{kind: prepare, sql: data.SQL})
	return ctx
}

func (t *tracer) TracePrepareEnd(_ context.Context, conn *pgx.Conn, data pgx.TracePrepareEndData) {
	t.statementEnds(conn, prepare)
	if data.Err != nil {
		t.statementEnds(conn, copyFrom) // of a table that could not be described: pgx does not call TraceCopyFromEnd then
	}
}

// recordKey is the key of a connection's record in its PgConn's CustomData.
const recordKey = "github.com/pgxdrain/pgxdrain"

// record returns the record of conn, or nil if conn is not of t's pool or was never acquired from it.
// The caller must be the one that has the use of conn.
func (t *tracer) record(conn *pgx.Conn) *record {
	r, _ := conn.PgConn().CustomData()[recordKey].(*record)
	if r == nil || r.tracer != t {
		return nil
	}
	return r
}

// acquired begins a lease of conn. The caller's entry at the gate becomes the lease's.
func (t *tracer) acquired(ctx context.Context, conn *pgx.Conn) {
	r := t.record(conn)
	if r == nil {
		r = t.newRecord(conn)
	}
	r.acquired(ctx)
	if t.gate.closed() {
		t.shutdown.admitted(r)
	}
}

func (t *tracer) statementStarts(conn *pgx.Conn, s statement) {
	if r := t.record(conn); r != nil {
		r.statementStarts(s)
	}
}

func (t *tracer) statementEnds(conn *pgx.Conn, kind statementKind) {
	if r := t.record(conn); r != nil {
		r.statementEnds(kind)
	}
}

func (t *tracer) newRecord(conn *pgx.Conn) *record {
	r := &record{tracer: t, conn: conn, pid: conn.PgConn().PID()}
	conn.PgConn().CustomData()[recordKey] = r

	t.mu.Lock()
	r.index = len(t.set)
	t.set = append(t.set, r)
	crowded := len(t.set) > 2*t.maxConns
	t.mu.Unlock()
	if crowded {
		t.reconcile()
	}
	return r
}

// forget takes out of the set the record of a connection that is about to be closed or is not the pool's any more.
func (t *tracer) forget(r *record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.index < 0 {
		return
	}
	last := len(t.set) - 1
	t.set[r.index] = t.set[last]
	t.set[r.index].index = r.index
	t.set[last] = nil
	t.set = t.set[:last]
	r.index = -1
}

// records returns the records of this moment. Nobody who acquires is held up while the caller goes through them.
func (t *tracer) records() []*record {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.set)
}

// waiting counts the callers that have asked for a connection and not got it yet.
func (t *tracer) waiting() int {
	n := t.gate.count() // read first, so that a lease ending meanwhile cannot make a waiting caller of itself
	for _, r := range t.records() {
		if r.lease().leased {
			n--
		}
	}
	return max(0, n)
}

// reconcile ends the leases of connections that were taken over with Hijack, for which pgx has no hook: they are their
// caller's own and neither counted nor waited for. Left alone they would keep the gate's count up for ever and stay in the set.
//
// A connection that is leased before and after the look, by the same lease, was acquired all the while: a lease begins after
// pgxpool has marked the connection so and ends before it is unmarked. If the pool does not have it then, it was hijacked.
func (t *tracer) reconcile() {
	type leased struct {
		record *record
		number uint32
	}
	var before []leased
	for _, r := range t.records() {
		if l := r.lease(); l.leased {
			before = append(before, leased{r, l.number})
		}
	}
	acquired := t.pool.Stat().AcquiredConns()
	if int(acquired) >= len(before) {
		return
	}
	var conns map[*pgx.Conn]bool
	if acquired > 0 {
		var ok bool
		if conns, ok = acquiredConns(t.pool); !ok {
			return // which of them cannot be told; the last to be released will leave only hijacked ones
		}
	}
	for _, l := range before {
		if !conns[l.record.conn] && l.record.hijacked(l.number) {
			t.forget(l.record)
			t.gate.leave()
		}
	}
}

// acquiredConns returns the connections that are acquired from pool, or false if this version of pgxpool or puddle keeps
// them elsewhere. No public call tells: Stat counts them, and while another connection is acquired a count cannot tell it
// from a hijacked one. So this reads the list that Stat counts, under the lock that Stat takes.
func acquiredConns(pool *pgxpool.Pool) (conns map[*pgx.Conn]bool, ok bool) {
	defer func() {
		if recover() != nil { // reflect's, over a field that is not there or not of this kind
			conns, ok = nil, false
		}
	}()
	const statusAcquired = 2 // puddle's resourceStatusAcquired

	puddlePool := reflect.ValueOf(pool).Elem().FieldByName("p").Elem()
	mux := puddlePool.FieldByName("mux")
	if mux.Type() != reflect.TypeFor[sync.Mutex]() {
		return nil, false
	}
	lock := (*sync.Mutex)(mux.Addr().UnsafePointer())
	lock.Lock()
	defer lock.Unlock()

	conns = make(map[*pgx.Conn]bool)
	all := puddlePool.FieldByName("allResources")
	for i := range all.Len() {
		resource := all.Index(i).Elem()
		if resource.FieldByName("status").Uint() != statusAcquired {
			continue
		}
		conn := resource.FieldByName("value").Elem().FieldByName("conn")
		if conn.Type() != reflect.TypeFor[*pgx.Conn]() {
			return nil, false
		}
		conns[(*pgx.Conn)(conn.UnsafePointer())] = true
	}
	return conns, true
}

// record is what is known of one connection. It is made when the connection is first acquired and reused for its life, so
// that nothing is allocated for an acquisition or a statement.
type record struct {
	tracer *tracer
	conn   *pgx.Conn
	pid    uint32
	index  int // in the tracer's set, guarded by its mutex; -1 once out of it

	mu      sync.Mutex
	current lease // zero while the connection is not acquired
	leases  uint32
}

// lease is one use of a connection, from its acquisition to its release. Its times are by the clock of now.
type lease struct {
	leased bool
	number uint32          // tells a connection's leases apart
	ctx    context.Context // the caller's, for its span
	at     time.Duration

	statement
	statementStart   time.Duration
	running          bool // the statement; otherwise it is the last one
	tx               byte // I, T or E: as the server said at the end of the last statement
	transactionStart time.Duration

	followed *followed // set while a shutdown waits for the lease to end
}

// statement is what a hook told of a statement.
type statement struct {
	kind      statementKind
	sql       string
	table     [2]string // of a COPY: schema and table
	batchSize int
}

// statementKind says by which of pgx's hooks a statement began, and so by which it ends.
type statementKind uint8

const (
	query statementKind = iota + 1
	batch
	copyFrom
	prepare
)

// Clock of the records: reading the monotonic clock alone takes about half as long as time.Now.
var epoch = time.Now()

func now() time.Duration { return time.Since(epoch) }

// The caller of these four must be the one that has the use of the connection.

func (r *record) acquired(ctx context.Context) {
	tx := r.conn.PgConn().TxStatus() // a PrepareConn hook may have begun a transaction
	at := now()
	r.mu.Lock()
	r.leases++
	r.current = lease{leased: true, number: r.leases, ctx: ctx, at: at, tx: 'I'}
	r.current.setTx(tx, at)
	r.mu.Unlock()
}

// release ends the lease, or reports false if there is none: the raw pool's AcquireAllIdle begins none.
func (r *record) release() bool {
	ended, ok := r.endLease(0)
	switch {
	case ended.followed != nil:
		ended.followed.ended(OutcomeDrained)
	case ok && r.tracer.gate.closed():
		r.tracer.shutdown.missed(r, &ended)
	}
	return ok
}

func (r *record) statementStarts(s statement) {
	if r.conn.PgConn().IsBusy() {
		return // pgx is about to refuse it ("conn busy"): the rows of the one in progress are still open
	}
	at := now()
	r.mu.Lock()
	// A query or a COPY that has to be prepared first calls the prepare hooks from within its own.
	if l := &r.current; l.leased && !(s.kind == prepare && l.running) {
		l.statement, l.statementStart, l.running = s, at, true
	}
	r.mu.Unlock()
}

func (r *record) statementEnds(kind statementKind) {
	pgConn := r.conn.PgConn()
	if pgConn.IsBusy() {
		return // the end of one that was refused
	}
	tx := pgConn.TxStatus()
	if pgConn.IsClosed() {
		tx = 'I' // with the connection the transaction is gone
	}
	r.mu.Lock()
	// pgx ends a batch that could not be sent twice.
	if l := &r.current; l.leased && l.running && l.kind == kind {
		l.running = false
		l.setTx(tx, l.statementStart)
	}
	r.mu.Unlock()
}

// The rest may be called by anybody.

// lease returns the current lease, not leased if there is none.
func (r *record) lease() lease {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.current
}

// hijacked ends the lease of that number because its connection is not the pool's any more, or reports false if it has
// ended by itself.
func (r *record) hijacked(number uint32) bool {
	ended, ok := r.endLease(number)
	if ended.followed != nil {
		ended.followed.lost()
	}
	return ok
}

// endLease ends the current lease, if it is of that number or number is 0, and returns it as it was.
func (r *record) endLease(number uint32) (ended lease, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.current.leased || number != 0 && number != r.current.number {
		return lease{}, false
	}
	ended, r.current = r.current, lease{}
	return ended, true
}

// attach lets f follow its lease, or reports false if that has ended or is followed already.
func (r *record) attach(f *followed) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.current.leased || r.current.number != f.lease || r.current.followed != nil {
		return false
	}
	r.current.followed = f
	return true
}

// operation describes the current lease, or returns false if there is none.
func (r *record) operation(text func(string) string) (Operation, bool) {
	l := r.lease()
	if !l.leased {
		return Operation{}, false
	}
	return l.operation(r.pid, text), true
}

// setTx takes up what the server says of the transaction after a statement that began at start.
func (l *lease) setTx(tx byte, start time.Duration) {
	switch {
	case tx == 'I':
		l.transactionStart = 0
	case l.tx == 'I':
		l.transactionStart = start
	}
	l.tx = tx
}

func (l *lease) operation(pid uint32, text func(string) string) Operation {
	wall, clock := time.Now(), now()
	at := func(d time.Duration) time.Time {
		if d == 0 {
			return time.Time{}
		}
		return wall.Add(d - clock)
	}
	return Operation{
		PID:              pid,
		State:            l.state(),
		Statement:        text(l.text()),
		BatchSize:        l.batchSize,
		AcquiredAt:       at(l.at),
		StatementStart:   at(l.statementStart),
		TransactionStart: at(l.transactionStart),
		Held:             clock - l.at,
		SpanContext:      trace.SpanContextFromContext(l.ctx),
	}
}

func (l *lease) state() State {
	switch {
	case l.running && l.tx == 'T' && endsTransaction(l.sql):
		return StateCommitting
	case l.running:
		return StateActive
	case l.tx == 'T':
		return StateIdleInTransaction
	case l.tx == 'E':
		return StateIdleInTransactionAborted
	default:
		return StateIdle
	}
}

func (s *statement) text() string {
	if s.kind != copyFrom {
		return s.sql
	}
	table := pgx.Identifier(s.table[:])
	if s.table[0] == "" {
		table = table[1:]
	}
	return "copy " + table.Sanitize() + " from stdin"
}

// endsTransaction reports whether sql begins with a command that commits a transaction.
func endsTransaction(sql string) bool {
	first, second := firstWords(sql)
	switch first {
	case "commit", "end":
		return true
	case "prepare": // PREPARE TRANSACTION; PREPARE alone names a statement
		return second == "transaction"
	default:
		return false
	}
}
