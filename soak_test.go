package pgxdrain_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"reflect"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/jackc/puddle/v2"
	"go.opentelemetry.io/otel/trace"

	"github.com/pgxdrain/pgxdrain"
	"github.com/pgxdrain/pgxdrain/internal/pgtest"
)

// The soak: rounds of random work, random faults and a shutdown, each of which compares what the shutdown reported and what the
// callers were told with the rows that the server has. Everything random in a round is in its plan, which its seed gives. The
// same seed gives the same plan; what happens at the same time is up to the machine, so a failure may need several runs of it.
var (
	soakFor  = flag.Duration("soak", 5*time.Second, "how long TestSoak goes on; needs -timeout if that is 10m or more")
	soakSeed = flag.Uint64("soak.seed", 0, "the seed of the only plan that TestSoak is to run, again and again")
)

const (
	soakAtOnce = 4 // rounds; most of one is waiting

	// soakSoon bounds what should happen at once: the end of the sessions, and of the callers, after a shutdown.
	soakSoon = 10 * time.Second

	// soakLong is the length of statements that only a cancel ends in time, and soakStalled theirs where a stalled network may
	// keep the cancel away.
	soakLong    = 20 * time.Second
	soakStalled = 2 * time.Second

	// soakSlack is what the times of a round may be off by, because the test and the pool read the clock at different moments.
	soakSlack = 5 * time.Millisecond

	soakFailures = 5 // rounds, after which the soak gives up
)

func TestSoak(t *testing.T) {
	db := must[*pgxpool.Pool](t)(pgxpool.New(t.Context(), withParams(pgtest.Database(t), "pool_max_conns=4")))
	t.Cleanup(db.Close)
	if _, err := db.Exec(t.Context(), `
		create table soak (round bigint, unit bigint, n int, delay float8);
		create index on soak (round);
		create function soak_delay() returns trigger language plpgsql as 'begin perform pg_sleep(new.delay); return null; end';
		create constraint trigger delay after insert on soak deferrable initially deferred
			for each row when (new.delay > 0) execute function soak_delay()`); err != nil {
		t.Fatal(err)
	}

	end := time.Now().Add(*soakFor)
	if d, ok := t.Deadline(); ok && d.Add(-time.Minute).Before(end) {
		end = d.Add(-time.Minute)
		t.Logf("ends a minute before the -timeout, after %v", time.Until(end).Round(time.Second))
	}
	seed := *soakSeed
	if seed == 0 {
		seed = rand.Uint64N(math.MaxInt64)
	}

	s := &soak{t: t, db: db, outcomes: map[pgxdrain.Outcome]int{}, told: map[string]int{}}
	goroutines := countGoroutines() + soakAtOnce + 1 // the workers and who looks after them
	var running sync.RWMutex                         // locked for writing while no round is to run
	var workers sync.WaitGroup
	for range soakAtOnce {
		workers.Go(func() {
			for time.Now().Before(end) && s.failed.Load() < soakFailures {
				n := s.rounds.Add(1)
				of := seed
				if *soakSeed == 0 {
					of += uint64(n)
				}
				running.RLock()
				s.round(newSoakPlan(of), n)
				running.RUnlock()
			}
		})
	}
	checked := make(chan struct{})
	over := make(chan struct{})
	go func() {
		defer close(checked)
		for last := false; !last; {
			select {
			case <-over:
				last = true
			case <-time.After(30 * time.Second):
			}
			running.Lock()
			s.checkGoroutines(goroutines)
			running.Unlock()
		}
	}()
	workers.Wait()
	close(over)
	<-checked
	s.checkRowsStayed()
	fmt.Println(s.summary())
}

func TestSoakPlanIsThatOfItsSeed(t *testing.T) {
	t.Parallel()
	for seed := range uint64(50) {
		if !reflect.DeepEqual(newSoakPlan(seed), newSoakPlan(seed)) {
			t.Fatalf("seed %d gives different plans", seed)
		}
	}
}

// soak is the state of all rounds.
type soak struct {
	t      *testing.T
	db     *pgxpool.Pool // the test's own, to look at the server and to harm it
	rounds atomic.Int64
	failed atomic.Int64

	mu         sync.Mutex
	lateness   []time.Duration // of each Shutdown, after its deadline
	nils       int             // shutdowns that returned nil
	unclosed   int             // shutdowns that drained all and did not close the pool in time
	outcomes   map[pgxdrain.Outcome]int
	told       map[string]int // what callers were told of units
	refused    int64
	closedOn   int // acquisitions that failed with pgxpool's own error, of a closed pool
	statements int // events
	gone       time.Duration
	left       int // statements that went on at the server until the test ended them
	rows       map[int64]int64
}

func (s *soak) checkGoroutines(most int) {
	s.db.Reset()                        // pgconn starts a goroutine for a connection when a write takes long
	deadline := time.Now().Add(timeout) // and gives one that was given up 15 s
	for countGoroutines() > most {
		if time.Now().After(deadline) {
			var b strings.Builder
			_ = pprof.Lookup("goroutine").WriteTo(&b, 1)
			s.t.Errorf("goroutines are left: %d, more than %d\n%s", countGoroutines(), most, b.String())
			s.failed.Add(soakFailures)
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func countGoroutines() int { return pprof.Lookup("goroutine").Count() }

// checkRowsStayed checks that no row came or went after its round was checked.
func (s *soak) checkRowsStayed() {
	rows, err := s.db.Query(context.Background(), "select round, count(*) from soak group by round")
	now := map[int64]int64{}
	var round, n int64
	if err == nil {
		_, err = pgx.ForEachRow(rows, []any{&round, &n}, func() error { now[round] = n; return nil })
	}
	if err != nil {
		s.t.Error(err)
	}
	for round, n := range now {
		if s.rows[round] != n {
			s.t.Errorf("round %d had %d rows when it was checked and has %d now", round, s.rows[round], n)
		}
	}
}

func (s *soak) summary() string {
	slices.Sort(s.lateness)
	at := func(q float64) time.Duration {
		if len(s.lateness) == 0 {
			return 0
		}
		return s.lateness[int(q*float64(len(s.lateness)-1))].Round(10 * time.Microsecond)
	}
	return fmt.Sprintf("soak: %d rounds (%d shutdowns nil, %d drained and not closed), %d failed; operations %v; %d refused, %d let in and then closed on; units told %v; %d events; "+
		"lateness p50 %v p90 %v p99 %v max %v; sessions gone within %v, %d statements left running",
		len(s.lateness), s.nils, s.unclosed, s.failed.Load(), s.outcomes, s.refused, s.closedOn, s.told, s.statements,
		at(0.5), at(0.9), at(0.99), at(1), s.gone.Round(time.Millisecond), s.left)
}

// The plan.

type soakPlan struct {
	seed     uint64
	params   string // of the connection string
	maxConns int
	budget   time.Duration
	grace    time.Duration
	wait     time.Duration // the initial wait
	warmup   time.Duration // from the first operation to the shutdown

	ending      string        // how the first Shutdown is called
	hurryAfter  time.Duration // its ctx is cancelled, if ending is "cancelled"
	second      bool          // it is called by another goroutine too,
	secondAfter time.Duration // so long after the first,
	secondEnds  time.Duration // with a ctx that ends so long after that; 0: never

	proxied bool
	forward bool // what a stall kept back goes on in the end, instead of being thrown away
	faults  []soakFault
	callers [][]soakStep
}

type soakFault struct {
	kind string
	at   time.Duration // after the call of Shutdown; before it, if negative
	pick float64       // which backend
}

// soakStep is one thing that a caller does. What its fields mean is up to the kind.
type soakStep struct {
	kind    string
	pause   time.Duration // before it
	timeout time.Duration // of the caller's own ctx; 0: none
	sleep   time.Duration // of a statement, at the server
	delay   time.Duration // of a COMMIT, at the server
	think   time.Duration // by the caller, in the middle
	n       int
	raw     bool // goes by the embedded pgxpool.Pool
	ignore  bool // errors
	leak    bool // the handle is kept until the shutdown is over
	inner   []soakStep
}

// soakKinds are the kinds of steps with their weights.
var soakKinds = []struct {
	kind   string
	weight int
}{
	{"insert", 14}, {"row", 4}, {"failing", 3}, {"returning", 3}, {"rows", 3}, {"tx", 16}, {"func", 4}, {"multi", 4},
	{"batch", 5}, {"batchtx", 3}, {"copy", 5}, {"held", 6}, {"listen", 2}, {"hold", 4}, {"hijack", 1}, {"leak", 1},
	{"sql", 5}, {"sqltx", 5}, {"idle", 1}, {"ping", 1},
}

type soakDice struct{ *rand.Rand }

func (d soakDice) chance(p float64) bool { return d.Float64() < p }

// between is spread evenly over the logarithms: many short times, a few long ones.
func (d soakDice) between(least, most time.Duration) time.Duration {
	f := float64(least) * math.Pow(float64(most)/float64(least), d.Float64())
	return time.Duration(f).Round(10 * time.Microsecond)
}

func pickOf[T any](d soakDice, of ...T) T { return of[d.IntN(len(of))] }

func newSoakPlan(seed uint64) soakPlan {
	d := soakDice{rand.New(rand.NewPCG(seed, 1))}
	p := soakPlan{
		seed:     seed,
		maxConns: 1 + d.IntN(8),
		budget:   d.between(200*time.Millisecond, 1500*time.Millisecond),
		grace:    d.between(80*time.Millisecond, 800*time.Millisecond),
		warmup:   d.between(time.Millisecond, 300*time.Millisecond),
		ending:   pickOf(d, "deadline", "deadline", "deadline", "timeout", "timeout", "close", "cancelled", "done", "expired"),
		second:   d.chance(0.25),
	}
	p.params = fmt.Sprintf("pool_max_conns=%d&default_query_exec_mode=%s", p.maxConns,
		pickOf(d, "cache_statement", "cache_statement", "cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol"))
	if d.chance(0.2) {
		p.params += "&pool_max_conn_lifetime=150ms"
	}
	if d.chance(0.2) {
		p.params += fmt.Sprintf("&pool_min_conns=%d", 1+d.IntN(p.maxConns))
	}
	if d.chance(0.3) {
		p.wait = d.between(5*time.Millisecond, 300*time.Millisecond)
	}
	if p.ending == "cancelled" {
		p.hurryAfter = d.between(time.Millisecond, p.budget)
	}
	if p.second {
		p.secondAfter = d.between(100*time.Microsecond, p.budget)
		if d.chance(0.5) {
			p.secondEnds = d.between(time.Millisecond, p.budget)
		}
	}

	when := func() time.Duration {
		return time.Duration(d.Float64()*float64(p.warmup+p.budget)) - p.warmup
	}
	if d.chance(0.4) {
		for range 1 + d.IntN(5) {
			p.faults = append(p.faults, soakFault{kind: pickOf(d, "terminate", "cancel"), at: when(), pick: d.Float64()})
		}
	}
	if p.proxied = d.chance(0.2); p.proxied {
		p.forward = d.chance(0.5)
		switch d.IntN(4) {
		case 0:
			p.faults = append(p.faults, soakFault{kind: "reset", at: when()})
		case 1:
			at := when()
			p.faults = append(p.faults, soakFault{kind: "stall", at: at},
				soakFault{kind: "flow", at: at + d.between(5*time.Millisecond, p.budget)})
		default:
			p.faults = append(p.faults, soakFault{kind: "stall", at: when()})
		}
	}
	slices.SortStableFunc(p.faults, func(a, b soakFault) int { return int(a.at - b.at) })

	long := soakLong
	if p.proxied {
		long = soakStalled
	}
	for range 1 + d.IntN(p.maxConns*2+2) {
		steps := make([]soakStep, 1+d.IntN(30))
		for i := range steps {
			steps[i] = newSoakStep(d, long)
		}
		p.callers = append(p.callers, steps)
	}
	return p
}

func newSoakStep(d soakDice, long time.Duration) soakStep {
	total := 0
	for _, k := range soakKinds {
		total += k.weight
	}
	x, kind := d.IntN(total), ""
	for _, k := range soakKinds {
		if x -= k.weight; x < 0 {
			kind = k.kind
			break
		}
	}
	return newSoakStepOf(d, kind, long)
}

func newSoakStepOf(d soakDice, kind string, long time.Duration) soakStep {
	s := soakStep{kind: kind, n: 1 + d.IntN(4), raw: d.chance(0.2), ignore: d.chance(0.2)}
	span := func(p float64) time.Duration { // 0 with the probability 1-p
		switch {
		case !d.chance(p):
			return 0
		case d.chance(0.12):
			return long
		default:
			return d.between(time.Millisecond, 700*time.Millisecond)
		}
	}
	if d.chance(0.5) {
		s.pause = d.between(100*time.Microsecond, 30*time.Millisecond)
	}
	if d.chance(0.15) {
		s.timeout = d.between(time.Millisecond, 600*time.Millisecond)
	}
	// A COMMIT is never cancelled, and a caller that thinks is never woken.
	s.sleep, s.delay, s.think = span(0.25), min(span(0.15), time.Second), min(span(0.3), soakStalled)
	switch kind {
	case "tx", "func", "sqltx", "leak":
		inner := []string{"insert", "insert", "insert", "batch", "copy", "savepoint", "undone", "failing", "rows"}
		if kind == "sqltx" {
			inner = []string{"insert", "insert", "insert", "failing"}
		}
		for range d.IntN(4) {
			s.inner = append(s.inner, newSoakStepOf(d, pickOf(d, inner...), long))
		}
	case "held":
		for range d.IntN(4) {
			s.inner = append(s.inner, newSoakStepOf(d, pickOf(d, "insert", "insert", "failing", "tx", "batch", "copy", "multi", "rows"), long))
		}
	case "hold":
		for range 1 + d.IntN(5) {
			s.inner = append(s.inner, newSoakStepOf(d, pickOf(d, "insert", "insert", "tx", "func", "batch", "held", "rows", "sql"), long))
		}
		s.leak = d.chance(0.1)
	case "copy":
		s.leak = d.chance(0.1)
	}
	s.leak = s.leak || kind == "leak"
	return s
}

// A round.

// soakRound is one pool, from its making to the checking of its shutdown.
type soakRound struct {
	*soak
	plan   soakPlan
	number int64
	name   string // application_name of its sessions
	pool   *pgxdrain.Pool
	sql    *sql.DB
	proxy  *proxy

	over    chan struct{}  // the shutdown is, and what was leaked is to be given back
	callers sync.WaitGroup //
	busy    atomic.Int64   // callers that are not waiting for over

	mu           sync.Mutex
	leases       []*soakLease
	held         map[*pgx.Conn]*soakLease
	units        []*soakUnit
	failedTo     []soakEvent // acquisitions
	refusals     int64       // acquisitions that failed with ErrShuttingDown
	idleRefusals int64       // calls of AcquireAllIdle that may have been refused
	targets      []soakTarget
	problems     []string

	// Of the shutdown.
	called   time.Time
	observed time.Time // the gate was seen closed
	made     time.Time // the report
	returned time.Time
	refuseAt time.Time
	cancelAt time.Time
	deadline time.Time
	result   error
}

// soakTarget is a backend that the test has harmed.
type soakTarget struct {
	kind string
	pid  uint32
	at   time.Time
}

// soakLease is what the test knows of one operation: a use of a connection, or a unit of work.
type soakLease struct {
	id       uint64
	caller   int
	kind     string
	hold     bool // a unit of work
	pid      uint32
	begun    time.Time // by pgx's hooks, which call the pool's own just after the test's
	used     time.Time // its first statement
	released time.Time
	hijacked time.Time
	holdCut  time.Time // a statement was cut off by the context of a unit of work
	events   []soakEvent

	reported []pgxdrain.Operation
}

// soakEvent is the end of a call that a caller made.
type soakEvent struct {
	at   time.Time
	what string
	risk bool  // if cut off it may have taken effect: a COMMIT, or a statement outside a transaction
	own  error // of the caller's own context
	ours bool  // that context was cancelled by the shutdown
	err  error
}

// soakUnit is a set of rows that come to be all together or not at all, and what its caller was told of it.
type soakUnit struct {
	id     int64
	kind   string
	caller int
	lease  *soakLease
	want   int
	sent   bool // what makes the rows permanent was asked for, so that without an answer they may be there
	ended  bool // the caller was told something; not so if it never asked
	err    error
}

func (s *soak) round(plan soakPlan, number int64) {
	r := &soakRound{
		soak: s, plan: plan, number: number,
		name: fmt.Sprintf("soak %d", number),
		over: make(chan struct{}),
		held: map[*pgx.Conn]*soakLease{},
	}
	r.run()
	if len(r.problems) == 0 {
		return
	}
	s.failed.Add(1)
	p := plan
	p.callers = nil
	s.t.Errorf("round %d failed. Replay (the same plan, again and again; its timing may differ) with\n"+
		"\tgo test -race -run 'TestSoak$' -soak=1m -soak.seed=%d .\n%+v, %d callers\nbudget: cancel at +%v, deadline +%v; returned +%v: %v\n%s",
		number, plan.seed, p, len(plan.callers), r.cancelAt.Sub(r.called), r.deadline.Sub(r.called), r.returned.Sub(r.called), r.result,
		strings.Join(r.problems[:min(len(r.problems), 8)], "\n"))
}

// wrong notes that something is not as it should be, with all that is known of a lease, if there is one.
func (r *soakRound) wrong(l *soakLease, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.mu.Lock()
	defer r.mu.Unlock()
	if l != nil {
		text += "\n" + r.describe(l)
	}
	r.problems = append(r.problems, text)
}

func (r *soakRound) describe(l *soakLease) string {
	var b strings.Builder
	at := func(t time.Time) string {
		if t.IsZero() {
			return "-"
		}
		return t.Sub(r.called).Round(10 * time.Microsecond).String()
	}
	fmt.Fprintf(&b, "    lease %d, caller %d, %s, pid %d: begun %s, first statement %s, released %s, hijacked %s, cut by its unit of work %s\n",
		l.id, l.caller, l.kind, l.pid, at(l.begun), at(l.used), at(l.released), at(l.hijacked), at(l.holdCut))
	for _, op := range l.reported {
		fmt.Fprintf(&b, "    reported: %s: %s, %q, held %v\n", op.Outcome, op.State, op.Statement, op.Held)
	}
	for _, e := range l.events {
		fmt.Fprintf(&b, "    %s %s: %v (own ctx: %v, ours: %v)\n", at(e.at), e.what, e.err, e.own, e.ours)
	}
	for _, u := range r.units {
		if u.lease == l {
			fmt.Fprintf(&b, "    unit %d, %s, %d rows: sent %v, ended %v: %v\n", u.id, u.kind, u.want, u.sent, u.ended, u.err)
		}
	}
	for _, t := range r.targets {
		if t.pid == l.pid {
			fmt.Fprintf(&b, "    %s by the test %s\n", t.kind, at(t.at))
		}
	}
	return b.String()
}

func (r *soakRound) run() {
	if err := r.open(); err != nil {
		r.wrong(nil, "no pool: %v", err)
		return
	}
	defer r.sql.Close()
	if r.proxy != nil {
		defer r.proxy.end()
	}

	r.busy.Add(int64(len(r.plan.callers)))
	for i, steps := range r.plan.callers {
		r.callers.Go(func() {
			defer r.busy.Add(-1)
			(&soakCaller{soakRound: r, number: i}).run(steps)
		})
	}
	// The first faults come before the shutdown.
	start := time.Now().Add(r.plan.warmup)
	faults := make(chan struct{})
	go func() {
		defer close(faults)
		for _, f := range r.plan.faults {
			time.Sleep(time.Until(start.Add(f.at)))
			r.inject(f)
		}
	}()
	time.Sleep(time.Until(start))
	r.shutdown()
	<-faults
	if r.proxy != nil {
		if !r.plan.forward { // what a stall has kept back is lost
			r.proxy.resetAll()
		}
		r.proxy.resume()
	}

	if !r.soon(func() bool { return r.busy.Load() == 0 }) {
		r.wrong(nil, "%d callers do not return after the shutdown\n%s", r.busy.Load(), stacks())
	}
	r.awaitSessions(true)
	close(r.over)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.callers.Wait()
	}()
	select {
	case <-ended:
	case <-time.After(timeout):
		r.wrong(nil, "callers do not return after what they leaked was given back\n%s", stacks())
		return
	}
	r.awaitSessions(false)
	// One that was finished in the background after the pool was closed stays among the idle ones of puddle's count, although it is
	// closed.
	if !r.soon(func() bool { return r.pool.Stat().AcquiredConns()+r.pool.Stat().ConstructingConns() == 0 }) {
		stat := r.pool.Stat()
		r.wrong(nil, "connections are left in the pool: %d acquired, %d being made", stat.AcquiredConns(), stat.ConstructingConns())
	}
	r.check()
}

func stacks() string {
	var b strings.Builder
	_ = pprof.Lookup("goroutine").WriteTo(&b, 1)
	return b.String()
}

// soon waits for something and reports whether it has happened.
func (r *soakRound) soon(is func() bool) bool {
	for end := time.Now().Add(soakSoon); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

func (r *soakRound) open() error {
	dsn := r.db.Config().ConnString()
	if r.plan.proxied {
		r.proxy, dsn = newProxy(r.t, dsn)
	}
	config, err := pgxpool.ParseConfig(withParams(dsn, r.plan.params))
	if err != nil {
		return err
	}
	config.ConnConfig.RuntimeParams["application_name"] = r.name
	config.ConnConfig.Tracer = soakTracer{r}
	opts := []pgxdrain.Option{
		pgxdrain.WithLogger(slog.New(slog.NewTextHandler(io.Discard, nil))),
		pgxdrain.WithQueryText(pgxdrain.QueryTextRaw),
		pgxdrain.WithDrainTimeout(r.plan.budget),
		pgxdrain.WithCancelGrace(r.plan.grace),
		pgxdrain.WithInitialWait(r.plan.wait),
	}
	r.pool, err = pgxdrain.NewWithConfig(context.Background(), config, opts...)
	if err != nil {
		return err
	}
	r.sql = stdlib.OpenDBFromPool(r.pool.Pool)
	return nil
}

// shutdown shuts the pool down as planned, and works out when its steps were due.
func (r *soakRound) shutdown() {
	p := &r.plan
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r.called = time.Now()
	r.deadline = r.called.Add(p.budget)
	var hurried []time.Time // when the contexts have ended
	var mu sync.Mutex
	hurry := func(end func()) {
		mu.Lock()
		hurried = append(hurried, time.Now())
		mu.Unlock()
		end()
	}
	var timers []*time.Timer
	switch p.ending {
	case "deadline":
		ctx, cancel = context.WithDeadline(ctx, r.deadline)
		defer cancel()
	case "cancelled":
		if r.number%2 == 0 {
			ctx, cancel = context.WithDeadline(ctx, r.deadline)
			defer cancel()
		}
		timers = append(timers, time.AfterFunc(p.hurryAfter, func() { hurry(cancel) }))
	case "done":
		hurry(cancel)
	case "expired":
		ctx, cancel = context.WithDeadline(ctx, r.called.Add(-time.Second))
		defer cancel()
		r.deadline = r.called.Add(p.grace)
		hurried = append(hurried, r.called)
	}

	type ended struct {
		at  time.Time
		err error
	}
	first, second := make(chan ended, 1), make(chan ended, 1)
	go func() {
		if p.ending == "close" {
			r.pool.Close()
			at := time.Now()
			first <- ended{at, r.pool.Shutdown(context.Background())}
			return
		}
		err := r.pool.Shutdown(ctx)
		first <- ended{time.Now(), err}
	}()
	if p.second {
		go func() {
			time.Sleep(p.secondAfter)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if p.secondEnds > 0 {
				defer time.AfterFunc(p.secondEnds, func() { hurry(cancel) }).Stop()
			}
			err := r.pool.Shutdown(ctx)
			second <- ended{time.Now(), err}
		}()
	}
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for r.observed.IsZero() {
			if s := r.pool.Report().Step; s != pgxdrain.StepOpen && s != pgxdrain.StepUnready {
				r.observed = time.Now()
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()

	e := <-first
	r.returned, r.result = e.at, e.err
	report := r.pool.Report()
	r.made = report.Start.Add(report.Took)
	if p.second {
		e2 := <-second
		if !sameResult(e.err, e2.err) {
			r.wrong(nil, "the second Shutdown returned %v, the first %v", e2.err, e.err)
		}
		// One that was called after the end returns at once; the others together.
		if at := e2.at; p.secondAfter < e.at.Sub(r.called)-soakSlack && at.Sub(e.at).Abs() > late {
			r.wrong(nil, "the second Shutdown returned %v after the first", at.Sub(e.at))
		}
	}
	<-watched
	for _, t := range timers {
		t.Stop()
	}
	if third := r.pool.Shutdown(context.Background()); !sameResult(third, e.err) || !sameReport(report, r.pool.Report()) {
		r.wrong(nil, "the result has changed: %v, then %v", e.err, third)
	}

	mu.Lock()
	defer mu.Unlock()
	budget := r.deadline.Sub(r.called)
	r.cancelAt = r.deadline.Add(-min(p.grace, budget/2))
	if p.ending == "expired" {
		r.cancelAt = r.called
	}
	for _, at := range hurried {
		if at.Before(r.cancelAt) {
			r.cancelAt = at
			if d := at.Add(p.grace); d.Before(r.deadline) {
				r.deadline = d
			}
		}
	}
	r.refuseAt = r.called.Add(p.wait)
	if r.refuseAt.After(r.cancelAt) {
		r.refuseAt = r.cancelAt
	}
	lateness := r.returned.Sub(r.deadline)
	if lateness > late {
		r.wrong(nil, "Shutdown returned %v after its deadline", lateness)
	}
	r.soak.mu.Lock()
	r.lateness = append(r.lateness, max(0, lateness))
	r.soak.mu.Unlock()
}

func sameResult(a, b error) bool {
	var x, y *pgxdrain.ShutdownError
	if !errors.As(a, &x) || !errors.As(b, &y) {
		return a == nil && b == nil
	}
	return sameReport(x.Report, y.Report) && errors.Is(a, context.DeadlineExceeded) == errors.Is(b, context.DeadlineExceeded)
}

func sameReport(a, b pgxdrain.Report) bool {
	exported := func(r pgxdrain.Report) (f []any) {
		for i, v := 0, reflect.ValueOf(r); i < v.NumField(); i++ {
			if v.Type().Field(i).IsExported() {
				f = append(f, v.Field(i).Interface())
			}
		}
		return f
	}
	return reflect.DeepEqual(exported(a), exported(b))
}

// inject does harm.
func (r *soakRound) inject(f soakFault) {
	switch f.kind {
	case "stall":
		r.proxy.swallow(toServer, toClient)
		return
	case "flow":
		r.proxy.resume()
		return
	case "reset":
		r.proxy.resetAll()
		return
	}
	ctx := context.Background()
	rows, _ := r.db.Query(ctx, "select pid from pg_stat_activity where application_name = $1 order by pid", r.name)
	pids, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	if err != nil {
		r.wrong(nil, "the test's own connection: %v", err)
	}
	if len(pids) == 0 {
		return
	}
	pid := pids[int(f.pick*float64(len(pids)))]
	r.mu.Lock()
	r.targets = append(r.targets, soakTarget{f.kind, uint32(pid), time.Now()})
	r.mu.Unlock()
	if _, err := r.db.Exec(ctx, fmt.Sprintf("select pg_%s_backend($1)", f.kind), pid); err != nil {
		r.wrong(nil, "the test's own connection: %v", err)
	}
}

// awaitSessions waits until the server has no session of the pool any more, except those that callers took over.
func (r *soakRound) awaitSessions(exceptHijacked bool) {
	ctx := context.Background()
	var left []string
	var pids []uint32
	var busy bool // all of them
	look := func() bool {
		rows, _ := r.db.Query(ctx, `select pid, coalesce(state, '-'), left(query, 100) from pg_stat_activity where application_name = $1`, r.name)
		left, pids, busy = nil, nil, true
		var pid int32
		var state, text string
		_, err := pgx.ForEachRow(rows, []any{&pid, &state, &text}, func() error {
			if !exceptHijacked || !r.isHijacked(uint32(pid)) {
				pids = append(pids, uint32(pid))
				busy = busy && state == "active"
				left = append(left, fmt.Sprintf("pid %d: %s: %s", pid, state, text))
			}
			return nil
		})
		if err != nil {
			r.wrong(nil, "the test's own connection: %v", err)
			return true
		}
		return len(left) == 0
	}
	start := time.Now()
	for ; !look(); time.Sleep(10 * time.Millisecond) {
		if time.Since(start) < soakSoon {
			continue
		}
		if busy && r.allCutOff(pids) {
			// The cancel request was not answered within its part of the grace. A backend that is busy does not notice that
			// its client has gone; that is a limit, not a wrong outcome.
			r.soak.mu.Lock()
			r.left += len(left)
			r.soak.mu.Unlock()
			r.t.Logf("seed %d: left running, severed after %v for a cancel request: %s",
				r.plan.seed, r.deadline.Sub(r.cancelAt)/2, strings.Join(left, "; "))
		} else {
			r.wrong(nil, "sessions are left: %s", strings.Join(left, "; "))
		}
		for _, pid := range pids {
			_, _ = r.db.Exec(ctx, "select pg_terminate_backend($1)", int32(pid))
		}
		r.soon(look)
		break
	}
	r.soak.mu.Lock()
	r.gone = max(r.gone, time.Since(start))
	r.soak.mu.Unlock()
}

func (r *soakRound) isHijacked(pid uint32) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.leases, func(l *soakLease) bool { return l.pid == pid && !l.hijacked.IsZero() })
}

// allCutOff reports whether each of the backends was in the middle of a statement when its operation was severed.
func (r *soakRound) allCutOff(pids []uint32) bool {
	report := r.pool.Report()
	for _, pid := range pids {
		if !slices.ContainsFunc(report.Operations, func(op pgxdrain.Operation) bool {
			return op.PID == pid && (op.Outcome == pgxdrain.OutcomeUnknown || op.Outcome == pgxdrain.OutcomeSevered || op.Outcome == pgxdrain.OutcomeLeaked)
		}) {
			return false
		}
	}
	return true
}

// soakTracer tells the round of its leases.
type soakTracer struct{ r *soakRound }

type (
	soakCallerKey struct{}
	soakLeaseKey  struct{}
)

// newLease makes a lease and a context whose span says which it is. That tells the operations of a report apart where the pool sees
// the context: a unit of work, and AcquireAllIdle. An acquisition's own span is its tracer's affair; it is told by its connection
// and when that was acquired. Caller of this method must hold r.mu!
func (r *soakRound) newLease(ctx context.Context, c *soakCaller) (context.Context, *soakLease) {
	l := &soakLease{id: uint64(len(r.leases) + 1), caller: c.number, kind: c.kind}
	r.leases = append(r.leases, l)
	var span trace.SpanContextConfig
	binary.BigEndian.PutUint64(span.TraceID[:], uint64(r.number))
	binary.BigEndian.PutUint64(span.SpanID[:], l.id)
	return trace.ContextWithSpanContext(ctx, trace.NewSpanContext(span)), l
}

func (t soakTracer) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	c, ok := ctx.Value(soakCallerKey{}).(*soakCaller)
	if !ok {
		return ctx
	}
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	c.lease = nil
	ctx, l := t.r.newLease(ctx, c)
	return context.WithValue(ctx, soakLeaseKey{}, l)
}

func (t soakTracer) TraceAcquireEnd(ctx context.Context, _ *pgxpool.Pool, data pgxpool.TraceAcquireEndData) {
	l, ok := ctx.Value(soakLeaseKey{}).(*soakLease)
	if !ok {
		return
	}
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	if data.Conn == nil {
		if errors.Is(data.Err, pgxdrain.ErrShuttingDown) {
			t.r.refusals++
		}
		return
	}
	t.r.begins(data.Conn, l)
	ctx.Value(soakCallerKey{}).(*soakCaller).lease = l
}

// begins notes the acquisition of a connection. Caller of this method must hold r.mu!
func (r *soakRound) begins(conn *pgx.Conn, l *soakLease) {
	l.pid, l.begun = conn.PgConn().PID(), time.Now()
	r.held[conn] = l
}

func (t soakTracer) TraceRelease(_ *pgxpool.Pool, data pgxpool.TraceReleaseData) {
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	if l := t.r.held[data.Conn]; l != nil {
		l.released = time.Now()
		delete(t.r.held, data.Conn)
	}
}

func (t soakTracer) starts(ctx context.Context, conn *pgx.Conn) context.Context {
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	if l := t.r.held[conn]; l != nil && l.used.IsZero() {
		l.used = time.Now()
	}
	return ctx
}

func (t soakTracer) ends(ctx context.Context, conn *pgx.Conn, err error) {
	if err == nil || !conn.IsClosed() || !errors.Is(err, context.Canceled) || !endedByShutdown(ctx) || ctx.Value(soakHoldKey{}) == nil {
		return
	}
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	if l := t.r.held[conn]; l != nil {
		l.holdCut = time.Now()
	}
}

func (t soakTracer) TraceQueryStart(ctx context.Context, conn *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return t.starts(ctx, conn)
}

func (t soakTracer) TraceQueryEnd(ctx context.Context, conn *pgx.Conn, data pgx.TraceQueryEndData) {
	t.ends(ctx, conn, data.Err)
}

func (t soakTracer) TraceBatchStart(ctx context.Context, conn *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return t.starts(ctx, conn)
}

func (t soakTracer) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}

func (t soakTracer) TraceBatchEnd(ctx context.Context, conn *pgx.Conn, data pgx.TraceBatchEndData) {
	t.ends(ctx, conn, data.Err)
}

func (t soakTracer) TraceCopyFromStart(ctx context.Context, conn *pgx.Conn, _ pgx.TraceCopyFromStartData) context.Context {
	return t.starts(ctx, conn)
}

func (t soakTracer) TraceCopyFromEnd(ctx context.Context, conn *pgx.Conn, data pgx.TraceCopyFromEndData) {
	t.ends(ctx, conn, data.Err)
}

// endedByShutdown reports whether ctx was cancelled by the shutdown and not by its caller.
func endedByShutdown(ctx context.Context) bool { return context.Cause(ctx) == pgxdrain.ErrShuttingDown }

type soakHoldKey struct{}

// The callers.

// soakCaller is a goroutine that works with the pool, one step after the other.
type soakCaller struct {
	*soakRound
	number int
	kind   string     // of the step in progress
	lease  *soakLease // of the last acquisition, nil if that failed; guarded by the round's mutex
	turned int        // away, so many times
}

// soakDB is what the pool, the raw pool, a connection and a transaction have in common.
type soakDB interface {
	Begin(ctx context.Context) (pgx.Tx, error)
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
	CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, source pgx.CopyFromSource) (int64, error)
}

const (
	soakInsert     = "insert into soak select $1::bigint, $2::bigint, $3::int, $4::float8"
	soakInsertSlow = soakInsert + " from pg_sleep($5::float8)"
)

func (c *soakCaller) run(steps []soakStep) {
	for _, s := range steps {
		time.Sleep(s.pause)
		ctx := context.WithValue(context.Background(), soakCallerKey{}, c)
		c.step(ctx, nil, s)
		if c.turned > 2 {
			return
		}
	}
}

// step does s with db, or with the pool if that is nil.
func (c *soakCaller) step(ctx context.Context, db soakDB, s soakStep) {
	if s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.timeout)
		defer cancel()
	}
	if db == nil {
		c.kind = s.kind
		c.forget()
		db = c.pool
		if s.raw {
			db = c.pool.Pool
		}
	}
	switch s.kind {
	case "insert":
		c.insert(ctx, db, s)
	case "row":
		c.row(ctx, db, s)
	case "failing":
		_, err := db.Exec(ctx, soakInsert+" where 1 / $5::int > 0", c.soakRound.number, int64(0), 0, 0.0, 0)
		c.did(ctx, "a statement that fails", true, err)
	case "returning":
		c.returning(ctx, db, s)
	case "rows":
		c.rows(ctx, db, s)
	case "tx":
		c.tx(ctx, db, s)
	case "func":
		c.txFunc(ctx, db, s)
	case "multi":
		c.multi(ctx, db, s)
	case "batch", "batchtx":
		c.batch(ctx, db, s)
	case "copy":
		c.copy(ctx, db, s)
	case "held", "listen", "hijack", "leak":
		c.acquire(ctx, s)
	case "hold":
		c.hold(ctx, s)
	case "sql":
		c.sqlExec(ctx, s)
	case "sqltx":
		c.sqlTx(ctx, s)
	case "idle":
		c.allIdle(ctx, s)
	case "ping":
		c.did(ctx, "ping", false, c.pool.Ping(ctx))
	default:
		panic(s.kind)
	}
}

// forget has what follows not taken for a part of the last acquisition.
func (c *soakCaller) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lease = nil
}

// park waits until the shutdown is over. What does so is not expected to return before.
func (c *soakCaller) park() {
	c.busy.Add(-1)
	<-c.over
	c.busy.Add(1)
}

// did notes how a call ended, and returns its error.
func (c *soakCaller) did(ctx context.Context, what string, risk bool, err error) error {
	e := soakEvent{at: time.Now(), what: what, risk: risk, err: err, own: ctx.Err(), ours: endedByShutdown(ctx)}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.lease != nil:
		c.lease.events = append(c.lease.events, e)
	case err != nil:
		c.failedTo = append(c.failedTo, e)
		if errors.Is(err, puddle.ErrClosedPool) { // as ErrShuttingDown is, too
			c.turned++
		}
	}
	return err
}

// unit begins a unit whose rows are there if all that is sent succeeds.
func (c *soakCaller) unit(kind string, want int) *soakUnit {
	c.mu.Lock()
	defer c.mu.Unlock()
	u := &soakUnit{id: int64(len(c.units) + 1), kind: kind, caller: c.number, want: want}
	c.units = append(c.units, u)
	return u
}

// tell notes what the caller was told of u.
func (c *soakCaller) tell(u *soakUnit, sent bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	u.lease, u.sent, u.ended, u.err = c.lease, sent && c.lease != nil, true, err
}

// autocommit is a unit that is sent at once.
func (c *soakCaller) autocommit(ctx context.Context, what string, rows int, f func(id int64) error) {
	u := c.unit(what, rows)
	err := f(u.id)
	c.did(ctx, what, true, err)
	c.tell(u, true, err)
}

func (c *soakCaller) args(unit int64, n int, delay time.Duration) []any {
	return []any{c.soakRound.number, unit, n, delay.Seconds()}
}

// exec inserts a row.
func (c *soakCaller) exec(ctx context.Context, db soakDB, unit int64, s soakStep) error {
	args := c.args(unit, 0, s.delay)
	if s.sleep == 0 {
		_, err := db.Exec(ctx, soakInsert, args...)
		return err
	}
	_, err := db.Exec(ctx, soakInsertSlow, append(args, s.sleep.Seconds())...)
	return err
}

func (c *soakCaller) insert(ctx context.Context, db soakDB, s soakStep) {
	c.autocommit(ctx, "insert", 1, func(id int64) error { return c.exec(ctx, db, id, s) })
}

func (c *soakCaller) row(ctx context.Context, db soakDB, s soakStep) {
	c.autocommit(ctx, "insert returning a row", 1, func(id int64) error {
		var n int
		return db.QueryRow(ctx, soakInsertSlow+" returning n", append(c.args(id, 7, s.delay), s.sleep.Seconds())...).Scan(&n)
	})
}

func (c *soakCaller) returning(ctx context.Context, db soakDB, s soakStep) {
	const rows = 50
	c.autocommit(ctx, "insert returning rows", rows, func(id int64) error {
		return c.read(ctx, db, s, soakInsert+" from generate_series(1, 50) returning repeat('x', 2000)", c.args(id, 1, 0)...)
	})
}

func (c *soakCaller) rows(ctx context.Context, db soakDB, s soakStep) {
	err := c.read(ctx, db, s, "select repeat('x', 2000) from generate_series(1, 2000)")
	c.did(ctx, "rows", true, err)
}

// read reads some rows, and stops in the middle to think.
func (c *soakCaller) read(ctx context.Context, db soakDB, s soakStep, sql string, args ...any) error {
	rows, err := db.Query(ctx, sql, args...)
	if err != nil {
		return err
	}
	for n := 0; rows.Next(); n++ {
		if n == s.n {
			time.Sleep(s.think)
		}
	}
	return rows.Err()
}

// multi is several statements in one string, in a transaction of their own or as what the server makes one of.
func (c *soakCaller) multi(ctx context.Context, db soakDB, s soakStep) {
	c.autocommit(ctx, "multi", s.n, func(id int64) error {
		var b strings.Builder
		if s.raw {
			b.WriteString("begin; ")
		}
		for i := range s.n {
			fmt.Fprintf(&b, "insert into soak values (%d, %d, %d, %v); ", c.soakRound.number, id, i, s.delay.Seconds()/float64(s.n))
		}
		fmt.Fprintf(&b, "select pg_sleep(%v)", s.sleep.Seconds())
		if s.raw {
			b.WriteString("; commit")
		}
		_, err := db.Exec(ctx, b.String())
		return err
	})
}

func (c *soakCaller) batch(ctx context.Context, db soakDB, s soakStep) {
	c.autocommit(ctx, s.kind, s.n, func(id int64) error { return c.sendBatch(ctx, db, s, id) })
}

func (c *soakCaller) sendBatch(ctx context.Context, db soakDB, s soakStep, id int64) error {
	var b pgx.Batch
	if s.kind == "batchtx" {
		b.Queue("begin")
	}
	for i := range s.n {
		b.Queue(soakInsert, c.args(id, i, s.delay/time.Duration(s.n))...)
	}
	if s.sleep > 0 {
		b.Queue("select pg_sleep($1)", s.sleep.Seconds())
	}
	if s.kind == "batchtx" {
		b.Queue("commit")
	}
	br := db.SendBatch(ctx, &b)
	_, err := br.Exec()
	if err == nil {
		time.Sleep(s.think)
	}
	return errors.Join(err, br.Close())
}

func (c *soakCaller) copy(ctx context.Context, db soakDB, s soakStep) {
	c.autocommit(ctx, "copy", s.n, func(id int64) error { return c.copyFrom(ctx, db, s, id) })
}

func (c *soakCaller) copyFrom(ctx context.Context, db soakDB, s soakStep, id int64) error {
	n := 0
	_, err := db.CopyFrom(ctx, pgx.Identifier{"soak"}, []string{"round", "unit", "n", "delay"}, pgx.CopyFromFunc(func() ([]any, error) {
		if n++; n > s.n {
			return nil, nil
		}
		if n == s.n {
			if s.leak {
				c.park()
			}
			time.Sleep(s.think)
		}
		return c.args(id, n, s.delay/time.Duration(s.n)), nil
	}))
	return err
}

// inTx does one step of a transaction and returns how many rows it has added.
func (c *soakCaller) inTx(ctx context.Context, tx pgx.Tx, u *soakUnit, s soakStep) (rows int, err error) {
	if s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.timeout)
		defer cancel()
	}
	rows, risk := 1, false
	switch s.kind {
	case "insert":
		err = c.exec(ctx, tx, u.id, s)
	case "batch":
		rows, risk, err = s.n, true, c.sendBatch(ctx, tx, s, u.id)
	case "copy":
		s.leak = false
		rows, err = s.n, c.copyFrom(ctx, tx, s, u.id)
	case "failing":
		rows = 0
		_, err = tx.Exec(ctx, "select 1 / $1::int", 0)
	case "rows":
		rows, err = 0, c.read(ctx, tx, s, "select repeat('x', 2000) from generate_series(1, 500)")
	case "savepoint", "undone":
		var inner pgx.Tx
		if inner, err = tx.Begin(ctx); err != nil {
			break
		}
		if err = c.did(ctx, "insert below a savepoint", false, c.exec(ctx, inner, u.id, s)); err != nil {
			c.did(ctx, "rollback to a savepoint", false, inner.Rollback(ctx))
			break
		}
		if s.kind == "savepoint" {
			err = inner.Commit(ctx)
		} else {
			rows, err = 0, inner.Rollback(ctx)
		}
	}
	if c.did(ctx, s.kind+" in a transaction", risk, err); err != nil {
		rows = 0
	}
	time.Sleep(s.think)
	return rows, err
}

// fill does all steps of a transaction, or those until one fails.
func (c *soakCaller) fill(ctx context.Context, tx pgx.Tx, u *soakUnit, s soakStep) error {
	err := c.did(ctx, "insert in a transaction", false, c.exec(ctx, tx, u.id, s))
	if err == nil {
		u.want++
	}
	for _, inner := range s.inner {
		if err != nil && !s.ignore {
			return err
		}
		var rows int
		rows, err = c.inTx(ctx, tx, u, inner)
		u.want += rows
	}
	if s.ignore {
		return nil
	}
	return err
}

func (c *soakCaller) tx(ctx context.Context, db soakDB, s soakStep) {
	u := c.unit("transaction", 0)
	tx, err := db.Begin(ctx)
	if c.did(ctx, "begin", true, err) != nil {
		c.tell(u, false, err)
		return
	}
	err = c.fill(ctx, tx, u, s)
	if s.leak {
		c.tell(u, false, errors.New("the caller keeps it"))
		c.park()
	}
	if err != nil || s.leak {
		c.did(ctx, "rollback", false, tx.Rollback(context.Background()))
		c.tell(u, false, err)
		return
	}
	err = tx.Commit(ctx)
	c.did(ctx, "commit", true, err)
	c.tell(u, true, err)
}

func (c *soakCaller) txFunc(ctx context.Context, db soakDB, s soakStep) {
	u := c.unit("BeginFunc", 0)
	begun, filled := false, false
	err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		c.did(ctx, "begin", true, nil)
		err := c.fill(ctx, tx, u, s)
		begun, filled = true, err == nil
		return err
	})
	if filled || !begun { // else it is the error of what is noted already
		c.did(ctx, "BeginFunc", true, err)
	}
	c.tell(u, filled, err)
}

// acquire is what is done with a connection that is held.
func (c *soakCaller) acquire(ctx context.Context, s soakStep) {
	if s.kind == "listen" && s.raw {
		var done context.CancelFunc
		ctx, done = c.pool.DrainContext(ctx)
		defer done()
	}
	conn, err := c.pool.Acquire(ctx)
	if err != nil {
		c.did(ctx, "acquire", false, err)
		return
	}
	switch s.kind {
	case "held":
		defer conn.Release()
		for _, inner := range s.inner {
			c.step(ctx, conn, inner)
			time.Sleep(inner.think)
		}
		time.Sleep(s.think)
	case "listen":
		defer conn.Release()
		_, err := conn.Exec(ctx, "listen soak")
		for c.did(ctx, "listen", true, err) == nil {
			_, err = conn.Conn().WaitForNotification(ctx)
		}
	case "leak":
		if len(s.inner) > 0 {
			c.tx(context.WithoutCancel(ctx), conn, s)
		} else {
			c.park()
		}
		conn.Release()
	case "hijack":
		time.Sleep(s.pause)
		c.mu.Lock()
		c.lease.hijacked = time.Now()
		c.mu.Unlock()
		own := conn.Hijack()
		ctx := context.WithoutCancel(ctx)
		c.insert(ctx, own, soakStep{})
		c.park()
		c.insert(ctx, own, soakStep{})
		_ = own.Close(ctx)
	}
}

func (c *soakCaller) hold(ctx context.Context, s soakStep) {
	c.mu.Lock()
	ctx, l := c.newLease(ctx, c)
	l.hold = true
	c.mu.Unlock()
	hctx, release, err := c.pool.Hold(ctx)
	if err != nil {
		c.mu.Lock()
		c.refusals++
		c.mu.Unlock()
		c.did(ctx, "hold", false, err)
		return
	}
	c.mu.Lock()
	l.begun = time.Now()
	c.mu.Unlock()
	hctx = context.WithValue(hctx, soakHoldKey{}, true)
	for _, inner := range s.inner {
		time.Sleep(inner.pause)
		c.forget()
		if inner.kind == "held" || inner.kind == "sql" {
			c.step(hctx, nil, inner)
		} else {
			c.step(hctx, c.pool, inner)
		}
		if hctx.Err() != nil && !s.ignore {
			break
		}
	}
	if s.leak {
		c.park()
	}
	at := time.Now()
	release()
	release()
	c.mu.Lock()
	l.released = at
	c.mu.Unlock()
}

func (c *soakCaller) sqlExec(ctx context.Context, s soakStep) {
	c.autocommit(ctx, "insert by database/sql", 1, func(id int64) error {
		_, err := c.sql.ExecContext(ctx, soakInsertSlow, append(c.args(id, 0, s.delay), s.sleep.Seconds())...)
		return err
	})
}

func (c *soakCaller) sqlTx(ctx context.Context, s soakStep) {
	u := c.unit("transaction by database/sql", 0)
	tx, err := c.sql.BeginTx(ctx, nil)
	if c.did(ctx, "begin by database/sql", true, err) != nil {
		c.tell(u, false, err)
		return
	}
	for _, inner := range append([]soakStep{s}, s.inner...) {
		if inner.kind == "failing" {
			_, err = tx.ExecContext(ctx, "select 1 / $1::int", 0)
		} else if _, err = tx.ExecContext(ctx, soakInsertSlow, append(c.args(u.id, 0, inner.delay), inner.sleep.Seconds())...); err == nil {
			u.want++
		}
		if c.did(ctx, "statement by database/sql", false, err) != nil && !s.ignore {
			c.did(ctx, "rollback by database/sql", false, tx.Rollback())
			c.tell(u, false, err)
			return
		}
		time.Sleep(inner.think)
	}
	err = tx.Commit()
	c.did(ctx, "commit by database/sql", true, err)
	c.tell(u, true, err)
}

func (c *soakCaller) allIdle(ctx context.Context, s soakStep) {
	c.mu.Lock()
	ctx, first := c.newLease(ctx, c)
	c.mu.Unlock()
	conns := c.pool.AcquireAllIdle(ctx)
	if len(conns) == 0 {
		c.mu.Lock()
		c.idleRefusals++
		c.mu.Unlock()
	}
	for i, conn := range conns {
		c.mu.Lock()
		l := first
		if i > 0 { // they share the span
			l = &soakLease{id: first.id, caller: c.number, kind: c.kind}
			c.leases = append(c.leases, l)
		}
		c.begins(conn.Conn(), l)
		c.lease = l
		c.mu.Unlock()
		c.insert(ctx, conn, s)
		conn.Release()
	}
}

// The check.

// roundTB collects the failures of a helper for the round's own report.
type roundTB struct {
	testing.TB
	r *soakRound
}

func (t roundTB) Helper()                           {}
func (t roundTB) Errorf(format string, args ...any) { t.r.wrong(nil, format, args...) }

// How a call ended, as far as it tells who is to blame.
const (
	soakOK        = "ok"
	soakShutting  = "ErrShuttingDown"
	soakCanceled  = "57014"
	soakOwn       = "its own failure"
	soakCtx       = "its own context"
	soakDrainCtx  = "a context that the shutdown cancelled"
	soakConn      = "the connection broke"
	soakClosed    = "it was over already"
	soakUnheardOf = "unheard of"
)

func (e soakEvent) how() string {
	var pgErr *pgconn.PgError
	switch err := e.err; {
	case err == nil:
		return soakOK
	case errors.Is(err, pgxdrain.ErrShuttingDown):
		return soakShutting
	case errors.As(err, &pgErr) && pgErr.Code == "57014":
		return soakCanceled
	case pgErr != nil && pgErr.Severity == "FATAL":
		return soakConn
	case pgErr != nil && (pgErr.Code == "22012" || pgErr.Code == "25P02"), errors.Is(err, pgx.ErrTxCommitRollback):
		return soakOwn
	case pgErr != nil:
		return soakUnheardOf
	case e.own != nil && errors.Is(err, e.own) && e.ours:
		return soakDrainCtx
	case e.own != nil && errors.Is(err, e.own):
		return soakCtx
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return soakUnheardOf
	case errors.Is(err, pgx.ErrTxClosed), errors.Is(err, sql.ErrTxDone), errors.Is(err, sql.ErrConnDone), errors.Is(err, driver.ErrBadConn),
		errors.Is(err, puddle.ErrClosedPool):
		return soakClosed
	default:
		return soakConn
	}
}

// answered reports whether the server has said that it did not do what was asked.
func answered(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Severity != "FATAL" || errors.Is(err, pgx.ErrTxCommitRollback)
}

// harmed reports whether the test has harmed the backend before a moment, in one of these ways.
func (r *soakRound) harmed(pid uint32, before time.Time, kinds ...string) bool {
	return slices.ContainsFunc(r.targets, func(t soakTarget) bool {
		return (t.pid == pid || pid == 0) && t.at.Before(before) && slices.Contains(kinds, t.kind)
	})
}

func (r *soakRound) check() {
	report := r.pool.Report()
	checkReport(roundTB{r.t, r}, report)
	r.checkResult(&report)

	there := map[int64]int{}
	rows, _ := r.db.Query(context.Background(), "select unit, count(*) from soak where round = $1 group by unit", r.number)
	var unit int64
	var n, sum int
	if _, err := pgx.ForEachRow(rows, []any{&unit, &n}, func() error { there[unit] = n; sum += n; return nil }); err != nil {
		r.wrong(nil, "the test's own connection: %v", err)
		return
	}

	for _, op := range report.Operations {
		l := r.leaseOf(op)
		if l == nil {
			r.wrong(nil, "an operation of nobody: %+v", op)
			continue
		}
		l.reported = append(l.reported, op)
	}
	for _, l := range r.leases {
		r.checkLease(l)
	}
	for _, e := range r.failedTo {
		r.checkAcquisition(e)
	}
	for _, u := range r.units {
		r.checkUnit(u, there[u.id])
	}
	if ops := r.pool.Active(); len(ops) != 0 {
		r.wrong(nil, "still active: %+v", ops)
	}

	r.soak.mu.Lock()
	defer r.soak.mu.Unlock()
	for _, op := range report.Operations {
		r.outcomes[op.Outcome]++
	}
	if r.result == nil {
		r.nils++
	}
	r.refused += report.Refused
	for _, l := range r.leases {
		r.statements += len(l.events)
	}
	if r.rows == nil {
		r.rows = map[int64]int64{}
	}
	r.rows[r.number] = int64(sum)
}

// leaseOf returns the lease that an operation is of, or nil.
func (r *soakRound) leaseOf(op pgxdrain.Operation) *soakLease {
	span := op.SpanContext.SpanID()
	id := binary.BigEndian.Uint64(span[:])
	for _, l := range r.leases {
		if l.id == id && l.pid == op.PID {
			return l
		}
	}
	for _, l := range r.leases {
		if l.pid == op.PID && !l.begun.After(op.AcquiredAt) && (l.released.IsZero() || !l.released.Before(op.AcquiredAt)) {
			return l
		}
	}
	return nil
}

func (r *soakRound) checkResult(report *pgxdrain.Report) {
	if report.Refused > r.refusals+r.idleRefusals {
		r.wrong(nil, "%d acquisitions reported as refused, %d were", report.Refused, r.refusals+r.idleRefusals)
	}
	if r.result == nil {
		if n := len(report.Remaining()); n != 0 {
			r.wrong(nil, "Shutdown returned nil and left %d operations", n)
		}
		return
	}
	var e *pgxdrain.ShutdownError
	if !errors.As(r.result, &e) {
		r.wrong(nil, "Shutdown returned %v (%T)", r.result, r.result)
		return
	}
	if !sameReport(e.Report, *report) {
		r.wrong(nil, "the error's report is %s, the pool's %s", brief(e.Report), brief(*report))
	}
	if len(report.Remaining()) == 0 && !r.plan.proxied {
		// Not a wrong outcome: on a busy machine, connections that are being made may take longer to give up than a grace.
		r.t.Logf("seed %d: returned %v after the deadline: %v", r.plan.seed, r.returned.Sub(r.deadline), r.result)
		r.soak.mu.Lock()
		r.unclosed++
		r.soak.mu.Unlock()
	}
	if !errors.Is(e, context.DeadlineExceeded) && !errors.Is(e, context.Canceled) {
		r.wrong(nil, "the error's cause is %v", errors.Unwrap(e))
	}
}

func (r *soakRound) checkLease(l *soakLease) {
	var outcome pgxdrain.Outcome
	if len(l.reported) > 0 {
		outcome = l.reported[0].Outcome
	}
	wrong := func(format string, args ...any) { r.wrong(l, format, args...) }
	cut := slices.Contains([]pgxdrain.Outcome{pgxdrain.OutcomeSevered, pgxdrain.OutcomeUnknown, pgxdrain.OutcomeLeaked}, outcome)

	switch {
	case len(l.reported) > 1:
		wrong("reported %d times", len(l.reported))
		return
	case l.begun.IsZero():
		if outcome != "" {
			wrong("reported, and never began")
		}
		return
	case !l.hijacked.IsZero():
		if l.hijacked.After(r.cancelAt.Add(-10 * soakSlack)) {
			return // it may have been severed first
		}
		if outcome != "" {
			wrong("reported, although it was hijacked")
		}
		for _, e := range l.events {
			if e.err != nil && e.at.After(l.hijacked) && !r.harmed(l.pid, e.at, "terminate", "cancel") && !r.plan.proxied {
				wrong("hijacked, and harmed: %v", e.err)
			}
		}
		return
	}

	active := l.used.Before(r.called) && !l.used.IsZero() || l.hold && l.begun.Before(r.called)
	if active && outcome == "" && l.released.After(r.observed) {
		wrong("active when the gate closed, and not reported")
	}
	switch outcome {
	case pgxdrain.OutcomeLeaked:
		if !l.released.IsZero() && l.released.Before(r.returned.Add(-late/4)) {
			wrong("leaked, and released %v before Shutdown returned", r.returned.Sub(l.released))
		}
	case pgxdrain.OutcomeUnknown: // whether or not it was released
	case pgxdrain.OutcomeDrained, pgxdrain.OutcomeCancelled, pgxdrain.OutcomeSevered:
		if l.released.IsZero() || l.released.After(r.returned.Add(soakSlack)) {
			wrong("%s, and not released", outcome)
		}
	}
	if l.hold {
		switch {
		case outcome == pgxdrain.OutcomeDrained && l.released.After(r.cancelAt.Add(late/4)),
			outcome == pgxdrain.OutcomeCancelled && l.released.Before(r.cancelAt.Add(-soakSlack)),
			outcome == pgxdrain.OutcomeSevered, outcome == pgxdrain.OutcomeUnknown:
			wrong("a unit of work, released %v after the cancel step was due, is %s", l.released.Sub(r.cancelAt), outcome)
		}
		return
	}
	if !l.holdCut.IsZero() && (outcome == pgxdrain.OutcomeDrained || outcome == "" && r.reportable(l)) {
		wrong("a statement was cut off by the context of its unit of work, and the outcome is %q", outcome)
	}

	canceled, failed, broken, unanswered := false, false, false, false
	for _, e := range l.events {
		ended := fmt.Sprintf("%s ended %v after the cancel step was due", e.what, e.at.Sub(r.cancelAt).Round(10*time.Microsecond))
		early := e.at.Before(r.cancelAt.Add(-soakSlack))
		how := e.how()
		switch how {
		case soakShutting:
			if early || !cut && !(outcome == "" && l.begun.After(r.deadline.Add(-soakSlack))) { // too late for the report
				wrong("%s: %v; outcome %q", ended, e.err, outcome)
			}
		case soakCanceled:
			canceled = true
			if !r.harmed(l.pid, e.at, "cancel") && (early || !cut && outcome != pgxdrain.OutcomeCancelled) {
				wrong("%s: %v; outcome %q", ended, e.err, outcome)
			}
		case soakConn:
			// Of a batch that the server has cancelled and that was then severed, only the first is told; of a COPY that the caller's
			// context has ended, only that the connection is closed.
			if !broken && !(failed && cut) && e.own == nil && !r.plan.proxied && !r.harmed(l.pid, e.at, "terminate") {
				wrong("%s: %v; outcome %q", ended, e.err, outcome)
			}
		case soakClosed:
			if !failed && !cut && e.own == nil && !r.plan.proxied && !r.harmed(l.pid, e.at, "terminate") {
				wrong("%s: %v; outcome %q", ended, e.err, outcome)
			}
		case soakUnheardOf:
			wrong("%s: %v; outcome %q", ended, e.err, outcome)
		}
		failed = failed || how != soakOK
		broken = broken || slices.Contains([]string{soakShutting, soakCtx, soakDrainCtx, soakConn, soakClosed}, how)
		// What has come by the time that the report is made may still be unread.
		unanswered = unanswered || e.risk && (how != soakOK && !answered(e.err) || e.at.After(r.made.Add(-soakSlack)))
	}
	switch {
	case outcome == pgxdrain.OutcomeCancelled && !canceled:
		wrong("cancelled, and no caller was told so")
	case outcome == pgxdrain.OutcomeUnknown && !unanswered && len(l.events) > 0: // database/sql tries again, and tells of that
		wrong("unknown, and the caller knows")
	}
}

// reportable reports whether a lease that was cut off must be in the report: not if it began in the cancel step.
func (r *soakRound) reportable(l *soakLease) bool { return l.begun.Before(r.cancelAt) }

func (r *soakRound) checkAcquisition(e soakEvent) {
	switch e.how() {
	case soakShutting:
		// A context of DrainContext ends before the gate closes.
		if !e.at.Before(r.refuseAt.Add(-soakSlack)) || e.ours && !e.at.Before(r.called) {
			return
		}
	case soakCtx:
		return
	case soakDrainCtx:
		// A listener with a context of DrainContext, and database/sql, which looks at the context itself.
		if e.what == "acquire" || strings.HasSuffix(e.what, "database/sql") {
			return
		}
	case soakClosed:
		// It was let in before, and was still on its way to a connection at the deadline, when the pool is closed whatever happens.
		if errors.Is(e.err, puddle.ErrClosedPool) && !e.at.Before(r.deadline.Add(-soakSlack)) {
			r.soak.mu.Lock()
			defer r.soak.mu.Unlock()
			r.closedOn++
			return
		}
	case soakConn:
		if r.plan.proxied || r.harmed(0, e.at, "terminate") {
			return
		}
	}
	r.wrong(nil, "%s got no connection %v after the refusing was due, because of: %v (own ctx: %v, ours: %v)",
		e.what, e.at.Sub(r.refuseAt), e.err, e.own, e.ours)
}

func (r *soakRound) checkUnit(u *soakUnit, n int) {
	l, outcome := u.lease, pgxdrain.Outcome("")
	if l == nil {
		l = &soakLease{caller: u.caller}
	} else if len(l.reported) > 0 {
		outcome = l.reported[0].Outcome
	}
	e := soakEvent{err: u.err}
	told := "failure, not there"
	switch {
	case !u.ended:
		r.wrong(l, "unit %d (%s) never ended", u.id, u.kind)
	case r.plan.proxied && u.kind == "insert by database/sql":
		// Of a connection that was reset, pgconn may leave "conn closed" for an error, and call that safe to retry although the
		// statement was sent: database/sql then sends it twice. That is so without pgxdrain.
		told = "not decidable"
	case u.sent && u.err == nil:
		told = "success"
		if n != u.want {
			r.wrong(l, "unit %d (%s): its caller was told of success; %d rows are there of %d", u.id, u.kind, n, u.want)
			for _, other := range r.leases { // database/sql may have tried it before
				if other.caller == u.caller && other != l && other.kind == l.kind {
					r.wrong(other, "another lease of that caller")
				}
			}
		}
	case u.lease == nil:
		told = "no connection"
		fallthrough
	case n == 0 || !u.sent:
		if n != 0 {
			r.wrong(l, "unit %d (%s) was not sent, and %d rows are there", u.id, u.kind, n)
		}
	default:
		told = "failure, there"
		switch {
		case n != u.want:
			r.wrong(l, "unit %d (%s): %d rows are there of %d", u.id, u.kind, n, u.want)
		case answered(u.err),
			e.how() == soakShutting && outcome != pgxdrain.OutcomeUnknown,
			outcome == pgxdrain.OutcomeCancelled && e.how() == soakShutting:
			r.wrong(l, "unit %d (%s) is there; its caller was told %v, the outcome is %q", u.id, u.kind, u.err, outcome)
		}
	}
	r.soak.mu.Lock()
	defer r.soak.mu.Unlock()
	r.told[told]++
}
