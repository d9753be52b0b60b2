package pgxdrain

import (
	"context"
	"errors"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgconn"
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
	StateHold                     State = "hold"                          // a unit of work between Hold and its release; no connection
)

// Operation is a connection in use, from its acquisition to its release, or a unit of work that [Pool.Hold] counts, seen at one
// moment. A unit of work has only a State, AcquiredAt, Held and SpanContext; the connections it uses are operations of their own.
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
	summary   string // of the same statement
	// BatchSize is the number of statements if Statement was sent as a batch, else 0.
	BatchSize int

	AcquiredAt       time.Time
	StatementStart   time.Time     // when the statement in progress, or else the last one, began; zero if none has
	TransactionStart time.Time     // when the statement that began the transaction began; zero outside one
	Held             time.Duration // since AcquiredAt, to now or to the operation's end

	// SpanContext is of the span that was current when the connection was acquired; not valid if there was none.
	SpanContext trace.SpanContext

	// Of the [Report] of a shutdown.
	Outcome  Outcome // how the operation has ended; empty while it has not
	Admitted bool    // it began after the gate had closed
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

// enter counts one in and returns how many are in with it, or reports false if the gate is closed.
func (g *gate) enter() (in int, ok bool) {
	if w := g.word.Add(1); w&gateClosed == 0 {
		return int(w), true
	}
	g.leave()
	return 0, false
}

// enterUnder counts one in whether or not the gate is closed. The caller must have entered and not left yet.
func (g *gate) enterUnder() (in int) { return int(g.word.Add(1) &^ gateClosed) }

// leaveOpen counts one out if the gate is open, or else reports false: then who leaves was in when it closed.
func (g *gate) leaveOpen() bool {
	for {
		w := g.word.Load()
		if w&gateClosed != 0 {
			return false
		}
		if g.word.CompareAndSwap(w, w-1) {
			return true
		}
	}
}

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
// A connection of another pool reaches these hooks too if that pool was made from the raw pool's Config. Its record is never
// leased and its acquisitions are not of our pool, so all of them pass it by.
type tracer struct {
	pool     *pgxpool.Pool
	maxConns int
	gate     gate
	refused  atomic.Int64
	held     atomic.Int64 // units of work

	shutdown *shutdown     // is told of leases that begin or end while the gate is closed
	leaks    *leakDetector // nil: off

	queue queue // of those that wait for a connection

	mu      sync.Mutex
	set     []*record // of connections, from the dial to the close; changes when one comes or goes
	holds   map[*hold]struct{}
	severed bool // no connection is made any more
}

var (
	_ pgxpool.AcquireTracer = (*tracer)(nil)
	_ pgxpool.ReleaseTracer = (*tracer)(nil)
	_ pgx.QueryTracer       = (*tracer)(nil)
	_ pgx.BatchTracer       = (*tracer)(nil)
	_ pgx.CopyFromTracer    = (*tracer)(nil)
	_ pgx.PrepareTracer     = (*tracer)(nil)
	_ pgx.ConnectTracer     = (*tracer)(nil)
)

func newTracer(maxConns int32) *tracer {
	return &tracer{
		gate:     newGate(),
		maxConns: int(maxConns),
		holds:    make(map[*hold]struct{}),
	}
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

// acquirerKey is the key, in the context of an acquisition, of the span that was current when it began.
type acquirerKey struct{}

// TraceAcquireStart notes the current span, in whose place the user's tracer may put one of its own for the acquisition.
func (c composed) TraceAcquireStart(ctx context.Context, pool *pgxpool.Pool, data pgxpool.TraceAcquireStartData) context.Context {
	if _, ok := c.user.(pgxpool.AcquireTracer); ok {
		ctx = context.WithValue(ctx, acquirerKey{}, trace.SpanFromContext(ctx))
	}
	return c.Tracer.TraceAcquireStart(ctx, pool, data)
}

// acquirer is the span that was current when the acquisition of ctx began.
func acquirer(ctx context.Context) trace.SpanContext {
	if span, ok := ctx.Value(acquirerKey{}).(trace.Span); ok {
		return span.SpanContext()
	}
	return trace.SpanContextFromContext(ctx)
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

func (t *tracer) TraceAcquireStart(ctx context.Context, pool *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	if pool != t.pool {
		return ctx
	}
	in, ok := t.gate.enter()
	if !ok {
		if in, ok = t.enterUnderHold(ctx); !ok {
			t.refused.Add(1)
			return refusedContext{ctx, t}
		}
	}
	underHold := t.held.Load() > 0 && t.acquiresUnderHold(ctx, 1)
	switch {
	case in > t.maxConns: // it may have to wait; units of work are among those in, but how many cannot be told of the same moment
		return &endableContext{Context: ctx, by: t, queue: &t.queue}
	case underHold:
		return &endableContext{Context: ctx, by: t}
	default:
		return ctx
	}
}

func (t *tracer) TraceAcquireEnd(ctx context.Context, pool *pgxpool.Pool, data pgxpool.TraceAcquireEndData) {
	if pool != t.pool {
		return
	}
	switch c := ctx.(type) {
	case refusedContext:
		if c.by == t {
			return
		}
	case *endableContext:
		if c.by == t && c.queue != nil {
			c.queue.leave(c)
		}
	}
	if t.held.Load() > 0 {
		t.acquiresUnderHold(ctx, -1)
	}
	if data.Conn == nil { // Err may be nil even so: one of the user's hooks has panicked
		if errors.Is(data.Err, ErrShuttingDown) {
			t.refused.Add(1)
		}
		t.gate.leave()
		return
	}
	t.acquired(ctx, data.Conn)
}

func (t *tracer) TraceRelease(_ *pgxpool.Pool, data pgxpool.TraceReleaseData) {
	if r := t.record(data.Conn); r != nil {
		r.release()
	}
}

func (t *tracer) TraceQueryStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	t.statementStarts(conn, statement{kind: query, parameterised: hasArguments(data.Args), sql: data.SQL})
	return ctx
}

func (t *tracer) TraceQueryEnd(_ context.Context, conn *pgx.Conn, data pgx.TraceQueryEndData) {
	t.statementEnds(conn, query, data.Err)
}

func (t *tracer) TraceBatchStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	// Only the first text is kept, by value: pgx rewrites the queued queries while others may be looking. An empty batch
	// has no hook.
	first := data.Batch.QueuedQueries[0]
	t.statementStarts(conn, statement{
		kind: batch, parameterised: hasArguments(first.Arguments), sql: first.SQL, batchSize: int32(data.Batch.Len()),
	})
	return ctx
}

func (t *tracer) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}

func (t *tracer) TraceBatchEnd(_ context.Context, conn *pgx.Conn, data pgx.TraceBatchEndData) {
	t.statementEnds(conn, batch, data.Err)
}

func (t *tracer) TraceCopyFromStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceCopyFromStartData) context.Context {
	s := statement{kind: copyFrom} // its text is put together by who wants to see it
	if n := len(data.TableName); n > 0 {
		s.sql = data.TableName[n-1]
		if n > 1 {
			s.schema = data.TableName[n-2]
		}
	}
	t.statementStarts(conn, s)
	return ctx
}

func (t *tracer) TraceCopyFromEnd(_ context.Context, conn *pgx.Conn, data pgx.TraceCopyFromEndData) {
	t.statementEnds(conn, copyFrom, data.Err)
}

func (t *tracer) TracePrepareStart(ctx context.Context, conn *pgx.Conn, data pgx.TracePrepareStartData) context.Context {
	t.statementStarts(conn, statement{kind: prepare, sql: data.SQL})
	return ctx
}

func (t *tracer) TracePrepareEnd(_ context.Context, conn *pgx.Conn, data pgx.TracePrepareEndData) {
	t.statementEnds(conn, prepare, data.Err)
	if data.Err != nil {
		t.statementEnds(conn, copyFrom, data.Err) // of a table that could not be described: pgx does not call TraceCopyFromEnd then
	}
}

func (t *tracer) TraceConnectStart(ctx context.Context, _ pgx.TraceConnectStartData) context.Context {
	return ctx
}

// TraceConnectEnd notes that a connection has been made: what is dialed with its config from now on is something else.
func (t *tracer) TraceConnectEnd(_ context.Context, data pgx.TraceConnectEndData) {
	if data.Conn == nil {
		return
	}
	if s := socketOf(data.Conn.PgConn().Conn()); s != nil && s.record.tracer == t {
		s.connected(data.Conn)
	}
}

// recordKey is the key of a connection's record in its PgConn's CustomData, if the user's AfterNetConnect has hidden its socket.
const recordKey = "github.com/pgxdrain/pgxdrain"

// record returns the record of conn, or nil if conn is not of t's pool, or has its socket hidden and was never acquired.
// The caller must be the one that has the use of conn.
//
// The way through the socket is the usual one because it spares the look-up in a map.
func (t *tracer) record(conn *pgx.Conn) *record {
	s, ok := conn.PgConn().Conn().(*socket)
	if !ok { // there is TLS on top of it, or something of the user's
		return t.recordBelow(conn)
	}
	if s.record.tracer != t {
		return nil
	}
	return &s.record
}

func (t *tracer) recordBelow(conn *pgx.Conn) *record {
	var r *record
	if s := socketOf(conn.PgConn().Conn()); s != nil {
		r = &s.record
	} else {
		r, _ = conn.PgConn().CustomData()[recordKey].(*record)
	}
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
	if t.leaks != nil {
		t.leaks.noteAcquirer(ctx, r)
	}
	if t.gate.closed() {
		t.shutdown.admitted(r, t.holdIn(ctx) != nil)
	}
}

func (t *tracer) statementStarts(conn *pgx.Conn, s statement) {
	if r := t.record(conn); r != nil {
		r.statementStarts(conn.PgConn(), s)
	}
}

func (t *tracer) statementEnds(conn *pgx.Conn, kind statementKind, err error) {
	if r := t.record(conn); r != nil {
		r.statementEnds(conn.PgConn(), kind, err)
	}
}

// newRecord makes the record of a connection whose socket is hidden. Any other has one from the beginning.
func (t *tracer) newRecord(conn *pgx.Conn) *record {
	r := &record{tracer: t, conn: conn, pid: conn.PgConn().PID()}
	conn.PgConn().CustomData()[recordKey] = r
	t.mu.Lock()
	t.keep(r)
	t.mu.Unlock()
	return r
}

// keep takes r into the set. Caller of this method must hold t.mu!
func (t *tracer) keep(r *record) {
	r.index = int32(len(t.set))
	t.set = append(t.set, r)
}

// forget takes out of the set the record of a connection that is closed, or about to be, or is not the pool's any more.
func (t *tracer) forget(r *record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remove(r)
}

// forgetUnleased is forget, unless somebody has acquired the connection: then it is forgotten after the release.
func (t *tracer) forgetUnleased(r *record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.phase.Load() == free {
		t.remove(r)
	}
}

// remove is for forget and forgetUnleased. Caller of this method must hold t.mu!
func (t *tracer) remove(r *record) {
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

// use is a lease as a look has found it.
type use struct {
	record *record
	number uint32
	at     time.Duration // it began
}

// uses returns the leases of this moment.
func (t *tracer) uses() []use {
	records := t.records()
	uses := make([]use, 0, len(records))
	for _, r := range records {
		r.mu.Lock()
		if r.watch() {
			uses = append(uses, use{r, r.current.number, r.current.at})
		}
		r.mu.Unlock()
	}
	return uses
}

// waiting counts the callers that have asked for a connection and not got it yet.
func (t *tracer) waiting() int {
	n := t.gate.count() // read first, so that a lease ending meanwhile cannot make a waiting caller of itself
	n -= len(t.uses())
	t.mu.Lock()
	n -= len(t.holds)
	t.mu.Unlock()
	return max(0, n)
}

// reconcile ends the leases of connections that were taken over with Hijack, for which pgx has no hook: they are their
// caller's own and neither counted nor waited for. Left alone they would keep the gate's count up for ever and stay in the set.
// It returns the others.
//
// A connection that is leased before and after the look, by the same lease, was acquired all the while: a lease begins after
// pgxpool has marked the connection so and ends before it is unmarked. If the pool does not have it then, it was hijacked.
func (t *tracer) reconcile() []use {
	uses := t.uses()
	if len(uses) == 0 {
		return nil
	}
	suspects := make(map[*pgx.Conn]int, len(uses)) // places in uses
	for i, u := range uses {
		suspects[u.record.conn] = i
	}
	acquired := make([]bool, len(uses))
	left := len(uses)
	strikeOut := func(status byte, conn *pgx.Conn) {
		if i, ok := suspects[conn]; ok && status == statusAcquired && !acquired[i] {
			acquired[i] = true
			left--
		}
	}
	switch {
	case !eachConnection(t.pool, aFew, strikeOut):
		if t.pool.Stat().AcquiredConns() > 0 {
			return uses // which of them cannot be told; the last to be released will leave only hijacked ones
		}
	case left > 0:
		eachConnection(t.pool, math.MaxInt, strikeOut) // what is left may only have moved in the list between two looks
	}
	if left == 0 {
		return uses
	}
	own := uses[:0]
	for i, u := range uses {
		switch {
		case acquired[i]:
			own = append(own, u)
		case u.record.hijacked(u.number):
			t.forget(u.record)
			t.gate.leave()
		}
	}
	return own
}

// aFew is how many connections are looked at before puddle's lock is given back: nobody who acquires is to wait for a look.
const aFew = 32

// puddle's resourceStatus.
const (
	statusIdle     = 1
	statusAcquired = 2
)

// eachConnection calls look with the status of each connection of pool, or reports false if this version of pgxpool or puddle keeps
// them elsewhere. conn is nil if it is being made. It takes puddle's lock for atOnce of the connections at a time.
//
// No public call tells which connections are acquired: Stat counts them, and while another connection is acquired a count cannot
// tell it from a hijacked one. So this reads the list that Stat counts, under the lock that Stat takes for the whole of it. What
// can be done outside the lock is: who took it again at once would starve those who acquire meanwhile.
func eachConnection(pool *pgxpool.Pool, atOnce int, look func(status byte, conn *pgx.Conn)) bool {
	at, ok := puddlePlaces()
	if !ok {
		return false
	}
	puddle := *(*unsafe.Pointer)(unsafe.Add(unsafe.Pointer(pool), at.pool))
	mux := (*sync.Mutex)(unsafe.Add(puddle, at.mux))
	all := (*[]unsafe.Pointer)(unsafe.Add(puddle, at.resources))

	type seen struct {
		status byte
		value  unsafe.Pointer // to what does not change any more
	}
	some := make([]seen, 0, min(atOnce, aFew))
	for from, more := 0, true; more; from += len(some) {
		some = some[:0]
		mux.Lock()
		to := min(from+atOnce, len(*all))
		for i := from; i < to; i++ {
			resource := (*all)[i]
			some = append(some, seen{
				*(*byte)(unsafe.Add(resource, at.status)), *(*unsafe.Pointer)(unsafe.Add(resource, at.value)),
			})
		}
		more = to < len(*all)
		mux.Unlock()

		for _, s := range some {
			var conn *pgx.Conn
			if s.value != nil {
				conn = *(**pgx.Conn)(unsafe.Add(s.value, at.conn))
			}
			look(s.status, conn)
		}
	}
	return true
}

// places are the offsets of what eachConnection reads.
type places struct {
	pool           uintptr // in a pgxpool.Pool: the *puddle.Pool
	mux, resources uintptr // in that: a sync.Mutex, and a slice of *puddle.Resource
	status, value  uintptr // in one of those: a byte, and the pointer to a struct
	conn           uintptr // in that: the *pgx.Conn
}

// puddlePlaces finds the places by their names, or reports false if one is not there or not of its type.
var puddlePlaces = sync.OnceValues(func() (at places, ok bool) {
	ok = true
	find := func(in reflect.Type, name string, offset *uintptr, is func(reflect.Type) bool) reflect.Type {
		if !ok || in.Kind() != reflect.Struct {
			ok = false
			return in
		}
		field, found := in.FieldByName(name)
		ok = found && is(field.Type)
		if !ok {
			return in
		}
		*offset = field.Offset
		return field.Type
	}
	isPointer := func(t reflect.Type) bool { return t.Kind() == reflect.Pointer && t.Elem().Kind() == reflect.Struct }
	isList := func(t reflect.Type) bool { return t.Kind() == reflect.Slice && isPointer(t.Elem()) }
	is := func(want reflect.Type) func(reflect.Type) bool { return func(t reflect.Type) bool { return t == want } }

	puddle := elem(find(reflect.TypeFor[pgxpool.Pool](), "p", &at.pool, isPointer))
	find(puddle, "mux", &at.mux, is(reflect.TypeFor[sync.Mutex]()))
	resource := elem(elem(find(puddle, "allResources", &at.resources, isList)))
	find(resource, "status", &at.status, is(reflect.TypeFor[byte]()))
	value := elem(find(resource, "value", &at.value, isPointer))
	find(value, "conn", &at.conn, is(reflect.TypeFor[*pgx.Conn]()))
	return at, ok
})

// elem is what t points to or is a list of, or t itself.
func elem(t reflect.Type) reflect.Type {
	if k := t.Kind(); k == reflect.Pointer || k == reflect.Slice {
		return t.Elem()
	}
	return t
}

// record is what is known of one connection, for the whole of its life, so that nothing is allocated for an acquisition or a
// statement. It is a part of the connection's socket. The fields are in the order of their size: there may be many of it.
type record struct {
	tracer *tracer
	socket *socket // nil if the user's AfterNetConnect has hidden it
	conn   *pgx.Conn
	pid    uint32
	index  int32 // in the tracer's set, guarded by its mutex; -1 once out of it

	phase  atomic.Uint32
	leases uint32
	mu     sync.Mutex

	cancelling    chan struct{} // while a cancel request is under way: closed at its end
	stack         *stack        // for leak detection; made with the first lease that needs it
	cancelPending atomic.Bool   // a cancel request is under way or about to be

	current lease // zero while the phase is free
}

// The phases of a record. An acquisition and a release that nobody looks at take no lock, two atomic operations instead of four:
// acquired fills in the lease while the connection is its caller's alone, and then publishes it by storing leased; release takes
// it back by swapping leased for free. Whoever else wants to see the lease makes it watched first, under the mutex; from then
// on it ends under the mutex only. All else that changes a lease does so under the mutex.
const (
	free uint32 = iota // the lease is nobody's, or that of who is acquiring or has just released the connection
	leased
	watched
)

// watch makes sure that the current lease does not end while the caller has the mutex, or reports false if there is none.
// Caller of this method must hold r.mu!
func (r *record) watch() bool {
	return r.phase.CompareAndSwap(leased, watched) || r.phase.Load() == watched
}

// lease is one use of a connection, from its acquisition to its release. Its times are by the clock of now.
type lease struct {
	ctx context.Context // the caller's, for its span
	at  time.Duration

	statement
	statementStart   time.Duration
	transactionStart time.Duration // of the last one, if tx is I
	followed         *followed     // set while a shutdown waits for the lease to end

	number  uint32 // tells a connection's leases apart
	leased  bool
	running bool // the statement; otherwise it is the last one
	tx      byte // I, T or E: as the server said at the end of the last statement

	// Of leak detection.
	traced    bool // the record's stack is of the caller that acquired it
	suspected bool // it has been held for longer than the threshold, and that was logged

	// Of a shutdown.
	underHold   bool // it waits for a hold instead, however many leases that takes
	cancelAsked bool // it has sent a cancel request
	cancelled   bool // and a statement was cancelled
	cut         severance
}

// severance is what has become of a lease's operation because a shutdown has closed its socket.
type severance uint8

const (
	uncut severance = iota // it has not
	cutSevered
	cutUnknown
)

// statement is what a hook told of a statement.
type statement struct {
	kind          statementKind
	parameterised bool // it was executed with arguments
	batchSize     int32
	sql           string // of a COPY: the table's name
	schema        string // and its schema's, if that was named
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

// The caller of these must be the one that has the use of the connection.

func (r *record) acquired(ctx context.Context) {
	r.leases++
	l := &r.current // zero: setting what is not is half the time of writing it whole
	l.leased, l.number, l.ctx, l.at = true, r.leases, ctx, now()
	if l.tx = r.conn.PgConn().TxStatus(); l.tx != 'I' { // a PrepareConn hook has begun a transaction
		l.transactionStart = l.at
	}
	r.phase.Store(leased)
	if s := r.socket; s != nil && (s.severed.Load() || s.closed.Load()) {
		r.goneBefore()
	}
}

// goneBefore is for a lease of a connection that was severed just before, by severUnleased, or that was closed, which one of the
// user's hooks may not have noticed.
func (r *record) goneBefore() {
	if r.socket.closed.Load() {
		t := r.tracer
		t.mu.Lock()
		if r.index < 0 {
			t.keep(r)
		}
		t.mu.Unlock()
	}
	if r.socket.severed.Load() {
		r.mu.Lock()
		r.cutNow()
		r.mu.Unlock()
	}
}

// cutNow notes that the socket of the current lease, if there is one, is severed. Caller of this method must hold r.mu!
func (r *record) cutNow() {
	if l := &r.current; r.watch() && l.cut == uncut {
		l.cut = l.cutOff()
	}
}

// release ends the lease and leaves the gate. There is none if the raw pool's AcquireAllIdle has acquired the connection.
func (r *record) release() {
	t := r.tracer
	if l := &r.current; r.phase.CompareAndSwap(leased, free) {
		if !t.gate.leaveOpen() { // it closed just now, and the shutdown has not come to this lease
			t.shutdown.missed(r, l)
			t.gate.leave()
		}
		*l = lease{}
		return
	}

	r.awaitCancel()
	ended, ok := r.endLease(0)
	if !ok {
		return
	}
	if ended.cut == uncut && r.socket != nil && r.socket.told.Load() {
		ended.cut = cutSevered // after its last statement, whose answer was there: it listened
	}
	if ended.suspected {
		t.leaks.cameBack(r.pid, &ended)
	}
	switch {
	case ended.followed != nil:
		ended.followed.ended(ended.outcome(), &ended)
	case ended.underHold:
	case t.gate.leaveOpen():
		return
	default:
		t.shutdown.missed(r, &ended)
	}
	t.gate.leave()
}

func (r *record) statementStarts(pgConn *pgconn.PgConn, s statement) {
	if pgConn.IsBusy() {
		return // pgx is about to refuse it ("conn busy"): the rows of the one in progress are still open
	}
	at := now()
	r.mu.Lock()
	if r.cancelling != nil {
		// The cancel request is for the statement before this one. The server drops it if it comes between the two, but
		// it could come late and hit this one, which may be a COMMIT.
		r.mu.Unlock()
		r.awaitCancel()
		r.mu.Lock()
	}
	// A query or a COPY that has to be prepared first calls the prepare hooks from within its own.
	if l := &r.current; l.leased && !(s.kind == prepare && l.running) {
		if l.cut == uncut && r.socket != nil && r.socket.severed.Load() {
			l.cut = cutSevered // during the statement before this one, whose answer was there already
		}
		l.statement, l.statementStart, l.running = s, at, true
	}
	r.mu.Unlock()
}

func (r *record) statementEnds(pgConn *pgconn.PgConn, kind statementKind, err error) {
	if pgConn.IsBusy() {
		return // the end of one that was refused
	}
	tx := pgConn.TxStatus()
	if pgConn.IsClosed() {
		tx = 'I' // with the connection the transaction is gone
		if r.socket != nil && !r.socket.severed.Load() {
			r.socket.givenUp.Store(true)
		}
	}
	r.mu.Lock()
	// pgx ends a batch that could not be sent twice.
	if l := &r.current; l.leased && l.running && l.kind == kind {
		l.ended(tx, err)
	}
	r.mu.Unlock()
}

// The rest may be called by anybody.

// lease returns the current lease, not leased if there is none.
func (r *record) lease() lease {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.watch() {
		return lease{}
	}
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
	if !r.watch() || number != 0 && number != r.current.number {
		return lease{}, false
	}
	ended, r.current = r.current, lease{}
	r.phase.Store(free)
	return ended, true
}

// setUnderHold marks the current lease as part of a unit of work. The caller must have the use of the connection.
func (r *record) setUnderHold() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.watch() {
		r.current.underHold = true
	}
}

// attach lets f follow its lease, or reports false if that has ended or is followed already.
func (r *record) attach(f *followed) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.watch() || r.current.number != f.lease || r.current.followed != nil {
		return false
	}
	r.current.followed = f
	return true
}

// operation describes the lease of that number; the operation has no State if that has ended.
func (r *record) operation(number uint32, at look) Operation {
	l := r.lease()
	if !l.leased || l.number != number {
		return Operation{}
	}
	return l.operation(r.pid, at)
}

// setTx takes up what the server says of the transaction after a statement that began at start.
func (l *lease) setTx(tx byte, start time.Duration) {
	if l.tx == 'I' && tx != 'I' {
		l.transactionStart = start
	}
	l.tx = tx
}

// lastTransaction is when the last transaction began, also if it has ended since; zero if there was none.
func (l *lease) lastTransaction() time.Time {
	if l.transactionStart == 0 {
		return time.Time{}
	}
	return time.Now().Add(l.transactionStart - now())
}

// ended takes up the end of the statement in progress.
func (l *lease) ended(tx byte, err error) {
	l.running = false
	l.setTx(tx, l.statementStart)
	if l.cancelAsked || l.cut != uncut {
		l.answered(err)
	}
}

// answered takes up how a statement has ended that the shutdown laid hands on. (It is apart from ended because pgErr escapes
// to the heap.)
func (l *lease) answered(err error) {
	var pgErr *pgconn.PgError
	byServer := err == nil || errors.As(err, &pgErr)
	if l.cancelAsked && pgErr != nil && pgErr.Code == queryCanceled {
		l.cancelled = true
	}
	if l.cut == cutUnknown && byServer { // the answer was there before the socket was closed
		l.cut = uncut
		if l.tx != 'I' {
			l.cut = cutSevered
		}
	}
}

// queryCanceled is the SQLSTATE of a statement that was cancelled.
const queryCanceled = "57014"

// outcome is that of a lease that a shutdown followed and that has been released.
func (l *lease) outcome() Outcome {
	switch {
	case l.cut == cutSevered:
		return OutcomeSevered
	case l.cut == cutUnknown:
		return OutcomeUnknown
	case l.cancelled:
		return OutcomeCancelled
	default:
		return OutcomeDrained
	}
}

// look is a moment at which operations are looked at, and what may be seen of their statements.
type look struct {
	wall  time.Time
	clock time.Duration
	text  queryTextFunc
}

func lookNow(text queryTextFunc) look {
	wall := time.Now()
	return look{wall, wall.Sub(epoch), text}
}

// time is when the clock of now said d, zero for 0.
func (at look) time(d time.Duration) time.Time {
	if d == 0 {
		return time.Time{}
	}
	return at.wall.Add(d - at.clock)
}

func (l *lease) operation(pid uint32, at look) Operation {
	shown := at.text(l.text(), l.parameterised)
	op := Operation{
		PID:            pid,
		State:          l.state(),
		Statement:      shown.text,
		summary:        shown.summary,
		BatchSize:      int(l.batchSize),
		AcquiredAt:     at.time(l.at),
		StatementStart: at.time(l.statementStart),
		Held:           max(0, at.clock-l.at), // it may have begun since
		SpanContext:    acquirer(l.ctx),
	}
	if l.tx != 'I' {
		op.TransactionStart = at.time(l.transactionStart)
	}
	return op
}

func (l *lease) state() State {
	switch {
	case l.running && l.tx == 'T' && endsTransaction(l.command()):
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
	table := pgx.Identifier{s.schema, s.sql}
	if s.schema == "" {
		table = table[1:]
	}
	return "copy " + table.Sanitize() + " from stdin"
}

// command is the text that was sent, empty for a COPY, which ends no transaction.
func (s *statement) command() string {
	if s.kind == copyFrom {
		return ""
	}
	return s.sql
}

// mayEndTransaction reports whether the statement in progress may have a COMMIT in it, at its beginning or further on.
func (l *lease) mayEndTransaction() bool {
	return l.kind == batch || endsTransaction(l.command()) || strings.Contains(l.command(), ";")
}

// rollsBack reports whether the statement in progress is a ROLLBACK and nothing more.
func (l *lease) rollsBack() bool {
	if l.kind == batch || strings.Contains(strings.TrimRight(l.command(), "; \t\n"), ";") {
		return false
	}
	first, _ := firstWords(l.command())
	return first == "rollback" || first == "abort"
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

// Ending from outside. Only two things may be done to a connection that another goroutine has the use of: asking the server to
// cancel its statement, and closing the socket under it.

// cancel asks the server to cancel the statement in progress, if there is one and it is not a COMMIT, and returns when the server
// has closed the connection of the request, or after cancelTimeout. Nothing else happens on the connection meanwhile: the next
// statement, the release and the close wait for it, so that it cannot hit what comes after, and because PgBouncer 1.18 dies of
// a client that leaves while a cancel request of it is under way (pgbouncer #801, #822).
func (r *record) cancel() {
	r.mu.Lock()
	if !r.watch() || !r.current.cancellable() {
		r.mu.Unlock()
		return
	}
	over := make(chan struct{})
	r.cancelling = over
	r.current.cancelAsked = true
	r.mu.Unlock()

	ctx, stop := context.WithTimeout(context.Background(), cancelTimeout)
	defer stop()
	_ = r.conn.PgConn().CancelRequest(ctx) // what cannot be cancelled is severed

	r.mu.Lock()
	r.cancelling = nil
	r.mu.Unlock()
	close(over)
}

func (r *record) cancellable() bool {
	l := r.lease()
	return l.cancellable()
}

// cancellable reports whether there is a statement that a cancel request may end. A ROLLBACK, too, is left alone: it is over at
// once, and to cancel it only fails it for its caller.
func (l *lease) cancellable() bool {
	return l.leased && l.running && l.cut == uncut && l.state() != StateCommitting && !l.rollsBack()
}

// cancelUnderWay returns what is closed when the cancel request that is under way is over, or nil if none is.
func (r *record) cancelUnderWay() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cancelling
}

// awaitCancel waits until no cancel request is under way, or the shutdown closes the pool: by then the socket is severed, and
// nothing can be sent over it that a late cancel request might hit.
func (r *record) awaitCancel() {
	over := r.cancelUnderWay()
	if over == nil {
		return
	}
	select {
	case <-over:
	case <-r.tracer.shutdown.cancelsOver:
	}
}

// sever closes the socket of the current lease. onlyIdle spares one that has a statement in progress.
func (r *record) sever(onlyIdle bool) {
	r.mu.Lock()
	l := &r.current
	if !r.watch() || l.cut != uncut || onlyIdle && l.running {
		r.mu.Unlock()
		return
	}
	l.cut = l.cutOff()
	if r.socket != nil {
		// Before the lock is given back: the owner's next statement must find the socket severed, or it might be sent
		// although it is taken to have been idle.
		r.socket.severed.Store(true)
	}
	r.mu.Unlock()
	if r.socket != nil {
		r.socket.sever()
		return
	}
	go r.conn.PgConn().Conn().Close() // TLS waits up to 5 s to send its last word
}

// cutOff is what becomes of an operation whose socket is closed now.
func (l *lease) cutOff() severance {
	switch {
	case !l.running || l.kind == prepare:
		return cutSevered
	case l.tx == 'I' || l.mayEndTransaction():
		return cutUnknown
	default:
		return cutSevered
	}
}
