package pgxdrain

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/puddle/v2"
)

// ErrShuttingDown is the error of an acquisition that was refused because the pool is shutting down, or has shut down. Nothing
// was sent to the server: the work can be given back to its queue, or the request answered with 503. It is also the cause of a
// context of [Pool.DrainContext] or [Pool.Hold] that was cancelled.
//
// errors.Is finds it in the error of whoever uses a connection that a shutdown has severed; there something was sent.
// It matches puddle.ErrClosedPool as well, which a closed pgxpool returns, and never context.Canceled.
var ErrShuttingDown error = shuttingDownError{}

type shuttingDownError struct{}

func (shuttingDownError) Error() string { return "pgxdrain: pool is shutting down" }

func (shuttingDownError) Is(target error) bool { return target == puddle.ErrClosedPool }

// Outcome is how an operation that a shutdown waited for has ended.
type Outcome string

const (
	// OutcomeDrained: the shutdown left it alone, and its connection was released.
	OutcomeDrained Outcome = "drained"
	// OutcomeCancelled: its statement was cancelled at the server, its caller was told so by the server (SQLSTATE 57014), and its
	// connection was released. Of a unit of work ([Pool.Hold]): its context was cancelled, and it ended.
	OutcomeCancelled Outcome = "cancelled"
	// OutcomeSevered: its connection was closed under it, and then released. The server rolls back its transaction, if it had one.
	OutcomeSevered Outcome = "severed"
	// OutcomeUnknown: its connection was closed while a COMMIT, or a statement or batch outside a transaction, had no answer
	// yet. What was sent may or may not have taken effect.
	OutcomeUnknown Outcome = "unknown"
	// OutcomeLeaked: its connection had not been released when Shutdown returned. It was closed at the server all the same, and
	// a transaction in it is rolled back. Of a unit of work: it had not ended.
	OutcomeLeaked Outcome = "leaked"
)

// Step is a step of a shutdown. They come in the order of the constants.
type Step string

const (
	StepOpen    Step = "open"    // Shutdown has not been called
	StepUnready Step = "unready" // Draining is closed; still admitting, for the initial wait
	StepDrain   Step = "drain"   // refusing; waiting for the work in progress
	StepCancel  Step = "cancel"  // freeing those who wait, cancelling statements, closing connections without one
	StepSever   Step = "sever"   // closing the connections that are left
	StepClose   Step = "close"   // closing the pool
	StepClosed  Step = "closed"  // the report is final
)

// Report says what a shutdown did, or has done so far.
//
// Operations are those that were active when the gate closed, and those that were admitted since: of callers who were waiting
// for a connection then and got their turn, and, if they were still active at the cancel step, those of units of work
// ([Pool.Hold]). In a final report each has exactly one outcome: Active + Admitted, len(Operations) and the sum of the outcomes
// are the same.
type Report struct {
	Pool   string // the pool's name
	Step   Step
	Budget time.Duration // from Start to the deadline; 0 before a shutdown
	Start  time.Time     // when Shutdown was called; zero before
	Took   time.Duration // since Start, to now or to the return of Shutdown

	RefusedAt time.Time // when the gate closed; zero before

	Active   int   // operations active when the gate closed; before that, now
	Waiting  int   // callers waiting for a connection when the gate closed; before that, now
	Admitted int   // operations that began since
	Refused  int64 // acquisitions that failed with ErrShuttingDown since the gate closed

	// Operations by outcome.
	Drained, Cancelled, Severed, Unknown, Leaked int

	// Operations, the longest held first. One that is in progress is shown as it is now. One that has ended is shown with its
	// Outcome and how long it was Held, and otherwise as it was when the gate closed; if it began later (Admitted), with its
	// last statement and transaction.
	Operations []Operation

	steps                []stepTaken
	closeStart, closeEnd time.Time // of pgxpool's Close
	closed               bool      // it had returned by closeEnd
}

// stepTaken is a step of a shutdown that has begun, with what it found to act on.
type stepTaken struct {
	name        string // unready, refuse, cancel, sever or close
	at          time.Time
	remaining   int // operations that had not ended
	waiting     int // callers waiting for a connection
	connections int // of the pool, also those that were being made

	left time.Duration // to the deadline
}

// Remaining returns the operations that have not ended yet, and of a final report the stragglers: all that did not drain.
func (r *Report) Remaining() []Operation {
	var ops []Operation
	for _, op := range r.Operations {
		if op.Outcome == "" || r.Step == StepClosed && op.Outcome != OutcomeDrained {
			ops = append(ops, op)
		}
	}
	return ops
}

// ShutdownError is the error of a shutdown that did not end by itself: the pool could not be drained and closed in time.
// errors.Is finds context.DeadlineExceeded in it, or, if the ctx of a Shutdown was cancelled, the cause of that.
type ShutdownError struct {
	Report
	cause error
}

// maxNamed is how many stragglers an error's text names.
const maxNamed = 10

func (e *ShutdownError) Error() string {
	var b strings.Builder
	left := e.Remaining()
	fmt.Fprintf(&b, "pgxdrain: pool %s: ", e.Pool)
	if len(left) == 0 {
		fmt.Fprintf(&b, "drained, but not closed within %v: a connection is not back or does not close", e.Took.Round(time.Millisecond))
	} else {
		fmt.Fprintf(&b, "%d of %d operations not drained within %v: ", len(left), len(e.Operations), e.Took.Round(time.Millisecond))
	}
	for i, op := range left {
		if i > 0 {
			b.WriteString("; ")
		}
		if i == maxNamed {
			fmt.Fprintf(&b, "and %d more", len(left)-i)
			break
		}
		b.WriteString(op.describe())
	}
	return b.String()
}

func (e *ShutdownError) Unwrap() error { return e.cause }

// describe names an operation in an error's text and in progress lines.
func (op Operation) describe() string {
	var b strings.Builder
	if op.Outcome != "" {
		fmt.Fprintf(&b, "%s: ", op.Outcome)
	}
	fmt.Fprintf(&b, "%s, held for %v, pid %d", op.State, op.Held.Round(time.Millisecond), op.PID)
	if op.Statement != "" {
		fmt.Fprintf(&b, ", %q", op.Statement)
	}
	return b.String()
}

// Shutdown drains the pool, ends what is left, and closes it. In this order it
//
//  1. closes [Pool.Draining], so that readiness fails, and goes on admitting work for the initial wait ([WithInitialWait]);
//  2. refuses: from now on every acquisition fails at once with [ErrShuttingDown], unless it is part of a unit of work that was
//     admitted before ([Pool.Hold]). Callers already waiting for a connection keep their turn; on connections already held,
//     statements, transactions, rows, batches and copies go on;
//  3. drains: waits until every connection has been released and every unit of work has ended;
//  4. cancels, if some have not: frees the callers that still wait, cancels the contexts of units of work, asks the server to
//     cancel the statements in progress, except a COMMIT, and closes the connections that have none;
//  5. severs: closes the connections that are left;
//  6. closes the pool, as pgxpool's Close does.
//
// It returns nil if nothing had to be ended and the pool was closed in time, and else a *[ShutdownError] that names each
// operation that was ended or left.
//
// The deadline is ctx's, or the drain timeout from now ([WithDrainTimeout]) if ctx has none. Shutdown returns by then, whatever
// happens. Step 4 begins the cancel grace ([WithCancelGrace]) before the deadline, or at once when ctx is cancelled before its
// deadline, as a second SIGTERM would do it: then the deadline is the cancel grace from there. So it is too if ctx is done
// already: even then Shutdown goes through all its steps.
//
// Shutdown may be called again, at the same time or later: every call waits for the one shutdown and returns its result.
// When the ctx of any of them ends, step 4 begins.
//
// A connection taken over with Hijack is its caller's own: Shutdown neither waits for it nor closes it. The goroutine of a
// caller that never releases its connection cannot be ended; pgxpool's Close is left waiting for it, in a goroutine as well.
func (p *Pool) Shutdown(ctx context.Context) error {
	s := p.shutdown
	s.once.Do(func() { s.begin(ctx) })
	select {
	case <-s.done:
		return s.result()
	case <-s.overdue.rang:
		return s.result()
	case <-ctx.Done():
		s.hurry(context.Cause(ctx))
	}
	select {
	case <-s.done:
	case <-s.overdue.rang:
	}
	return s.result()
}

// Report says what the shutdown has done so far, or, once it is over, what it did. Before one it says what is going on now.
func (p *Pool) Report() Report {
	p.tracer.reconcile()
	return p.shutdown.report()
}

// shutdown is the one shutdown of a pool. It exists from the beginning and begins with the first call of Shutdown.
type shutdown struct {
	pool    *Pool
	unready context.CancelCauseFunc // ends Pool.draining
	once    sync.Once               // begin
	done    chan struct{}

	refuseAt *alarm // the initial wait ends
	cancelAt *alarm // the drain ends
	severAt  *alarm // the cancelling ends
	deadline *alarm
	overdue  *alarm // Shutdown returns, although a log handler or a span processor does not

	cancels     sync.WaitGroup // cancel requests under way
	asked       bool           // one was begun; run's own
	cancelsOver chan struct{}  // closed when nobody is to wait for them any more: what they are of has left, or is severed

	ctx context.Context // of the call that began it, for its values; never done

	// What is logged is written by a goroutine of its own: a handler that hangs holds up no step.
	toTell  chan func(*slog.Logger)
	telling sync.WaitGroup // all that is logged, traced and measured

	closeGate func()       // begins to refuse, once
	result    func() error // makes the report final, once, and returns the error that goes with it

	mu       sync.Mutex
	step     Step
	plan     plan
	hurried  bool
	cause    error  // of the ShutdownError, if there is to be one
	noted    Report // what has been noted so far, and in the end the final report
	inAtFlip int    // at the gate, when it closed
	followed []*followed
}

const (
	// reconcileEvery is the interval between looks for connections that were hijacked, which no event tells of: the longest
	// that one of them can hold up the end of a drain.
	reconcileEvery = 20 * time.Millisecond

	progressEvery = time.Second

	// cancelEvery is the interval at which a caller that goes on after its statement was cancelled has the next one
	// cancelled as well.
	cancelEvery = 50 * time.Millisecond

	// cancelsAtOnce bounds the cancel requests under way: the server starts a process for each.
	cancelsAtOnce = 32

	// cancelTimeout bounds a cancel request by itself, as pgconn bounds those that it sends in the background. It may outlast the
	// shutdown: PgBouncer 1.18 dies of one whose connection is closed before PgBouncer has passed it on.
	cancelTimeout = 15 * time.Second

	// overdueAfter is how long after the deadline the last lines and spans may take.
	overdueAfter = 25 * time.Millisecond
)

func newShutdown(p *Pool) *shutdown {
	s := &shutdown{
		pool:        p,
		done:        make(chan struct{}),
		cancelsOver: make(chan struct{}),
		toTell:      make(chan func(*slog.Logger), 1024), // a line a second and a few: not full unless the handler hangs
		step:        StepOpen,
		cause:       context.DeadlineExceeded,
		noted:       Report{Pool: p.settings.poolName},
	}
	s.closeGate = sync.OnceFunc(s.takeDown)
	s.result = sync.OnceValue(s.makeFinal)
	p.draining, s.unready = context.WithCancelCause(context.Background())
	p.tracer.shutdown = s
	return s
}

// begin makes the plan and starts the shutdown in the background: it has to go on whatever becomes of its caller.
func (s *shutdown) begin(ctx context.Context) {
	settings := &s.pool.settings
	s.ctx = context.WithoutCancel(ctx)
	start := time.Now()
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = start.Add(settings.drainTimeout)
	}
	p := newPlan(start, deadline, settings.initialWait, settings.cancelGrace)
	s.refuseAt, s.cancelAt, s.severAt = newAlarm(p.refuse), newAlarm(p.cancel), newAlarm(p.sever)
	s.deadline, s.overdue = newAlarm(p.deadline), newAlarm(p.deadline.Add(overdueAfter))
	s.note(func(r *Report) { s.plan, r.Start = p, start })
	if ctx.Err() != nil {
		s.hurry(context.Cause(ctx))
	}
	go s.run()
}

// run is the shutdown, step by step.
func (s *shutdown) run() {
	s.telling.Go(s.log)
	s.stopBeingReady()
	s.refuse()
	if !s.drain() && !s.cancel() {
		s.sever()
	}
	s.close()
	s.finish()
	s.telling.Wait()
	s.overdue.timer.Stop()
	close(s.done)
}

// stopBeingReady lets everybody know, and waits, still admitting, for the load balancers to take it in.
func (s *shutdown) stopBeingReady() {
	s.note(func(*Report) { s.step = StepUnready })
	s.unready(ErrShuttingDown)
	s.tellStep(s.found(stepTaken{name: "unready", at: time.Now(), waiting: s.pool.tracer.waiting()}),
		slog.LevelInfo, "pgxdrain: shutting down, no longer ready")
	<-s.refuseAt.rang
}

// refuse closes the gate and says so.
func (s *shutdown) refuse() {
	s.closeGate()
	r := s.report()
	s.tellStep(s.found(stepTaken{name: "refuse", at: r.RefusedAt, waiting: r.Waiting}),
		slog.LevelInfo, "pgxdrain: draining, new work is refused")
}

// takeDown closes the gate and takes down what is active behind it. It is called through closeGate, once.
func (s *shutdown) takeDown() {
	t := s.pool.tracer
	t.reconcile()
	admitted := t.gate.close()
	s.note(func(r *Report) {
		s.inAtFlip = admitted
		r.RefusedAt = time.Now()
	})
	s.followAll(false)
	s.note(func(*Report) { s.step = StepDrain })
}

// drain waits until all that was admitted has left, and reports whether it has before it was time to end it.
func (s *shutdown) drain() bool {
	gate := &s.pool.tracer.gate
	look := time.NewTicker(reconcileEvery)
	defer look.Stop()
	progress := time.NewTicker(progressEvery)
	defer progress.Stop()
	for gate.count() > 0 {
		select {
		case <-gate.empty:
		case <-look.C:
			s.pool.tracer.reconcile()
		case <-progress.C:
			s.tellProgress()
		case <-s.cancelAt.rang:
			return false
		}
	}
	return true
}

// cancel lets go those who wait, and ends what it can through the server. It reports whether all has left before it was time to
// sever what is left.
func (s *shutdown) cancel() bool {
	t := s.pool.tracer
	s.note(func(*Report) { s.step = StepCancel })
	step := stepTaken{name: "cancel", at: time.Now(), waiting: t.waiting()}
	t.queue.free() // first: from now on a lease that begins is followed, under a hold or not
	t.reconcile()
	s.followAll(true)
	s.tellStep(s.found(step), slog.LevelWarn, "pgxdrain: ending what is left: cancelling")

	t.severUnleased()
	for _, h := range t.unitsOfWork() {
		h.refuse()
	}
	for _, r := range t.records() {
		r.sever(true) // a cancel request does nothing for a connection without a statement
	}
	ctx, stop := context.WithDeadline(context.Background(), s.severTime()) // none is sent after that
	defer stop()
	slots := make(chan struct{}, cancelsAtOnce)
	again := time.NewTicker(cancelEvery)
	defer again.Stop()
	for t.gate.count() > 0 {
		for _, r := range t.records() {
			s.cancelStatement(ctx, r, slots)
		}
		t.endUnitsOfWork(false)
		select {
		case <-t.gate.empty:
		case <-again.C:
			t.reconcile()
		case <-s.severAt.rang:
			return false
		}
	}
	return true
}

// cancelStatement has the statement in progress cancelled, in the background, unless that is under way already.
func (s *shutdown) cancelStatement(ctx context.Context, r *record, slots chan struct{}) {
	if !r.cancellable() || !r.cancelPending.CompareAndSwap(false, true) {
		return
	}
	s.asked = true
	s.cancels.Go(func() {
		defer r.cancelPending.Store(false)
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
			r.cancel()
		case <-ctx.Done():
		}
	})
}

// sever closes the sockets of what is left. A backend that is busy does not notice that its client is gone, which is why a
// cancel was tried before.
func (s *shutdown) sever() {
	t := s.pool.tracer
	s.note(func(*Report) { s.step = StepSever })
	t.reconcile()
	s.followAll(true)
	s.tellStep(s.found(stepTaken{name: "sever", at: time.Now(), waiting: t.waiting()}), slog.LevelWarn, "pgxdrain: severing what is left")
	for _, r := range t.records() {
		r.sever(false)
	}
	if len(t.unitsOfWork()) > 0 {
		// Their contexts go last: who was blocked is to see why, and not find its context done.
		select {
		case <-t.gate.empty:
		case <-time.After(cancelEvery):
		case <-s.deadline.rang:
		}
		t.endUnitsOfWork(true)
	}
}

// close closes the pool. pgxpool's Close waits for every connection to come back, and up to 15 s for each to close, and
// cannot be told to stop: at the deadline the sockets are closed under it and it is left to itself.
func (s *shutdown) close() {
	t := s.pool.tracer
	s.note(func(*Report) { s.step = StepClose })
	step := s.found(stepTaken{name: "close", at: time.Now(), waiting: t.waiting()})
	close(s.cancelsOver)
	t.severConnecting() // nobody is to use them
	s.awaitWaiting()
	s.note(func(r *Report) { r.closeStart = time.Now() })
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.pool.Pool.Close()
	}()
	s.tellStep(step, slog.LevelInfo, "pgxdrain: closing the pool") // while the server ends the sessions
	inTime := false
	select {
	case <-closed:
		inTime = true
	case <-s.deadline.rang:
		t.reconcile()
		t.severAll()
	}
	s.note(func(r *Report) { r.closed, r.closeEnd = inTime, time.Now() })
	s.awaitCancels()
}

// awaitWaiting gives the callers that were freed the time to leave: to whom pgxpool's Close meets on the way to a connection it
// gives an error of its own. It could not return before they have left either.
func (s *shutdown) awaitWaiting() {
	if s.pool.tracer.waiting() == 0 {
		return
	}
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for s.pool.tracer.waiting() > 0 {
		select {
		case <-s.pool.tracer.gate.empty:
		case <-look.C:
		case <-s.deadline.rang:
			return
		}
	}
}

// awaitCancels waits until no cancel request is under way, or the deadline is there. What is left of them then goes on by itself.
func (s *shutdown) awaitCancels() {
	if !s.asked {
		return
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		s.cancels.Wait()
	}()
	select {
	case <-over:
	case <-s.deadline.rang:
	}
}

// finish makes the report final and tells of it.
// None of log, spans and metrics holds up another if its handler, processor or reader hangs.
func (s *shutdown) finish() {
	err := s.result()
	for _, a := range []*alarm{s.refuseAt, s.cancelAt, s.severAt, s.deadline} {
		a.timer.Stop()
	}
	report := s.report()
	s.tell(func(log *slog.Logger) { logResult(s.ctx, log, &report, err) })
	close(s.toTell)
	s.telling.Go(func() { traceShutdown(s.ctx, &s.pool.settings, &report, err) })
	s.telling.Go(func() { s.pool.metrics.recordShutdown(s.ctx, &report, err) })
}

// makeFinal gives every operation that has no outcome its last one. It is called through result.
func (s *shutdown) makeFinal() error {
	// If the steps are late, on a machine that has no time for them, they are not to change what is reported now.
	s.closeGate()
	t := s.pool.tracer
	t.queue.free()
	t.reconcile()
	s.followAll(true)
	for _, r := range t.records() {
		r.sever(false)
	}
	at := lookNow(s.pool.settings.queryText.cached())
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.followed {
		if f.op.Outcome == "" && !f.hijacked {
			f.op = f.seen(at)
			f.op.Outcome = f.lastOutcome()
		}
	}
	r := s.reportLocked()
	s.step, r.Step = StepClosed, StepClosed
	s.noted, s.followed = r, nil
	if len(r.Remaining()) == 0 && r.closed {
		return nil
	}
	return &ShutdownError{Report: r.clone(), cause: s.cause}
}

// hurry brings the end of the drain forward to now, because of cause.
func (s *shutdown) hurry(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hurried || s.step == StepClosed {
		return
	}
	s.hurried, s.cause = true, cause
	s.plan = s.plan.hurry(time.Now(), s.pool.settings.cancelGrace)
	s.refuseAt.set(s.plan.refuse)
	s.cancelAt.set(s.plan.cancel)
	s.severAt.set(s.plan.sever)
	s.deadline.set(s.plan.deadline)
	s.overdue.set(s.plan.deadline.Add(overdueAfter))
}

// severTime is when the cancelling will be ended.
func (s *shutdown) severTime() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plan.sever
}

// note changes what is known of the shutdown.
func (s *shutdown) note(change func(*Report)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.step == StepClosed {
		return // run was so late that the report is final already
	}
	change(&s.noted)
}

// report is what Pool.Report returns.
func (s *shutdown) report() Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reportLocked()
}

// Caller of this method must hold s.mu!
func (s *shutdown) reportLocked() Report {
	if s.step == StepClosed {
		return s.noted.clone()
	}
	r := s.noted
	r.Step = s.step
	if !r.Start.IsZero() {
		r.Budget, r.Took = s.plan.deadline.Sub(r.Start), time.Since(r.Start)
	}
	if r.RefusedAt.IsZero() {
		r.Waiting = s.pool.tracer.waiting()
		r.Operations = s.pool.operations(s.pool.tracer.uses())
		r.Active = len(r.Operations)
		return r
	}
	r.Refused = s.pool.tracer.refused.Load()
	at := lookNow(s.pool.settings.queryText.cached())
	notWaiting := 0
	for _, f := range s.followed {
		if !f.op.Admitted {
			notWaiting++
		}
		switch {
		case f.hijacked:
			continue
		case f.op.Admitted:
			r.Admitted++
		default:
			r.Active++
		}
		r.Operations = append(r.Operations, f.seen(at))
	}
	r.Waiting = s.inAtFlip - notWaiting
	r.Operations = longestHeldFirst(r.Operations)
	r.count()
	return r
}

func (r *Report) clone() Report {
	c := *r
	c.Operations = slices.Clone(r.Operations)
	return c
}

// count counts the operations by outcome.
func (r *Report) count() {
	counts := map[Outcome]int{}
	for _, op := range r.Operations {
		counts[op.Outcome]++
	}
	r.Drained, r.Cancelled, r.Severed = counts[OutcomeDrained], counts[OutcomeCancelled], counts[OutcomeSevered]
	r.Unknown, r.Leaked = counts[OutcomeUnknown], counts[OutcomeLeaked]
}

// plan is how a budget is shared among the steps.
type plan struct {
	refuse   time.Time // the initial wait ends
	cancel   time.Time // the drain ends
	sever    time.Time // half of what is left then is for the server to cancel, half to sever and close
	deadline time.Time
}

// newPlan divides the time from start to deadline. If there is none it grants a grace, to end what is left.
func newPlan(start, deadline time.Time, initialWait, grace time.Duration) plan {
	budget := deadline.Sub(start)
	if budget <= 0 {
		return plan{refuse: start, cancel: start, deadline: start.Add(grace)}.halved()
	}
	cancel := deadline.Add(-min(grace, budget/2))
	refuse := start.Add(initialWait)
	if refuse.After(cancel) {
		refuse = cancel
	}
	return plan{refuse: refuse, cancel: cancel, deadline: deadline}.halved()
}

// hurry ends the drain now, and leaves a grace from here unless the deadline is nearer.
func (p plan) hurry(now time.Time, grace time.Duration) plan {
	if !now.Before(p.cancel) {
		return p
	}
	p.cancel = now
	if p.refuse.After(now) {
		p.refuse = now
	}
	if d := now.Add(grace); d.Before(p.deadline) {
		p.deadline = d
	}
	return p.halved()
}

func (p plan) halved() plan {
	p.sever = p.cancel.Add(p.deadline.Sub(p.cancel) / 2)
	return p
}

// alarm is a moment to wait for that can be brought forward.
type alarm struct {
	rang  chan struct{} // closed at the moment
	timer *time.Timer
}

func newAlarm(at time.Time) *alarm {
	a := &alarm{rang: make(chan struct{})}
	ring := sync.OnceFunc(func() { close(a.rang) }) // a timer that was set again after it fired fires twice
	a.timer = time.AfterFunc(time.Until(at), ring)
	return a
}

func (a *alarm) set(at time.Time) { a.timer.Reset(time.Until(at)) }

// followed is an operation that the shutdown waits for, until it has an outcome: a lease or a unit of work.
type followed struct {
	shutdown *shutdown
	record   *record
	lease    uint32
	hold     *hold // instead of the record and its lease

	// Guarded by the shutdown's mutex.
	op       Operation // as it was when the following began, but for its outcome
	hijacked bool      // its connection is not the pool's any more
}

// followAll begins to follow all that is in progress and is not followed already.
func (s *shutdown) followAll(admitted bool) {
	at := lookNow(s.pool.settings.queryText.cached())
	for _, r := range s.pool.tracer.records() {
		s.follow(r, r.lease(), at, admitted)
	}
	for _, h := range s.pool.tracer.unitsOfWork() {
		f := &followed{shutdown: s, hold: h, op: h.operation()}
		f.op.Admitted = admitted
		if h.attach(f) {
			s.note(func(*Report) { s.followed = append(s.followed, f) })
		}
	}
}

// follow begins to follow the lease l of r, unless that is none, is over, or is followed already.
func (s *shutdown) follow(r *record, l lease, at look, admitted bool) {
	if !l.leased || l.followed != nil {
		return
	}
	f := &followed{shutdown: s, record: r, lease: l.number, op: l.operation(r.pid, at)}
	f.op.Admitted = admitted
	if r.attach(f) {
		s.note(func(*Report) { s.followed = append(s.followed, f) })
	}
}

// admitted follows a lease that began while the gate was closed because its caller was waiting when it closed. One of a unit of
// work is left to that until the cancel step.
func (s *shutdown) admitted(r *record, underHold bool) {
	if underHold && !s.pool.tracer.queue.freed.Load() {
		r.setUnderHold()
		return
	}
	s.follow(r, r.lease(), lookNow(s.pool.settings.queryText.of), true)
}

// missed notes a lease that was there when the gate closed and has ended before refuse came to it.
func (s *shutdown) missed(r *record, l *lease) {
	f := &followed{shutdown: s, record: r, lease: l.number, op: l.operation(r.pid, lookNow(s.pool.settings.queryText.of))}
	s.note(func(*Report) { s.followed = append(s.followed, f) })
	f.ended(OutcomeDrained, l)
}

// ended notes the outcome of f, unless it has its last one already. l is its lease as it was in the end, nil for a hold.
func (f *followed) ended(outcome Outcome, l *lease) {
	var last Operation
	if l != nil { // not under the mutex: the text is taken apart
		last = l.operation(f.record.pid, lookNow(f.shutdown.pool.settings.queryText.of))
	}
	f.shutdown.note(func(*Report) {
		if f.op.Outcome != "" {
			return
		}
		f.op.Outcome = outcome
		f.op.Held = time.Since(f.op.AcquiredAt)
		if f.op.Admitted && l != nil { // when it was followed nothing had happened in it yet
			f.op.Statement, f.op.summary = last.Statement, last.summary
			f.op.BatchSize, f.op.StatementStart = last.BatchSize, last.StatementStart
			f.op.TransactionStart = l.lastTransaction()
		}
	})
}

// lost notes that f's connection was taken over with Hijack.
func (f *followed) lost() {
	f.shutdown.note(func(*Report) { f.hijacked = true })
}

// seen is f as it is now, or as it ended. Caller of this method must hold the shutdown's mutex!
func (f *followed) seen(at look) Operation {
	switch {
	case f.op.Outcome != "":
		return f.op
	case f.hold != nil:
		return f.hold.operation()
	}
	op := f.op
	if l := f.record.lease(); l.leased && l.number == f.lease {
		op = l.operation(f.record.pid, at)
		op.Admitted = f.op.Admitted
	}
	return op
}

// lastOutcome is that of an operation which has not ended when the report is made final. What it may have changed is more to
// know than that its connection is not back.
func (f *followed) lastOutcome() Outcome {
	if f.hold == nil && f.record.lease().cut == cutUnknown {
		return OutcomeUnknown
	}
	return OutcomeLeaked
}

// log writes what there is to tell, until finish has told the last of it.
func (s *shutdown) log() {
	log := s.pool.settings.log().With("pool", s.pool.settings.poolName) // here, because it calls the handler as well
	for f := range s.toTell {
		f(log)
	}
}

// tell has f called when those before it have returned. It is for run's steps only: finish ends it.
func (s *shutdown) tell(f func(*slog.Logger)) {
	select {
	case s.toTell <- f:
	default: // the handler hangs
	}
}

// found completes what a step that begins has found, and notes it.
func (s *shutdown) found(step stepTaken) stepTaken {
	r := s.report()
	step.remaining, step.left = len(r.Remaining()), r.left()
	step.connections = int(s.pool.Stat().TotalConns())
	s.note(func(r *Report) { r.steps = append(r.steps, step) })
	return step
}

func (s *shutdown) tellStep(step stepTaken, level slog.Level, message string) {
	s.tell(func(log *slog.Logger) {
		log.Log(s.ctx, level, message, "step", step.name, "remaining", step.remaining, "waiting", step.waiting,
			"connections", step.connections, "left", step.left)
	})
}

func (s *shutdown) tellProgress() {
	r := s.report()
	s.tell(func(log *slog.Logger) {
		remaining := r.Remaining()
		var oldest []slog.Attr
		for i, op := range remaining[:min(3, len(remaining))] {
			oldest = append(oldest, slog.GroupAttrs(strconv.Itoa(i+1), op.logAttrs()...))
		}
		log.LogAttrs(s.ctx, slog.LevelInfo, "pgxdrain: still draining", slog.Int("remaining", len(remaining)),
			slog.Duration("left", r.left()), slog.GroupAttrs("oldest", oldest...))
	})
}

// left is the time to the deadline.
func (r *Report) left() time.Duration { return (r.Budget - r.Took).Round(time.Millisecond) }

// logAttrs describes an operation in a log line.
func (op Operation) logAttrs() []slog.Attr {
	var attrs []slog.Attr
	if op.Outcome != "" {
		attrs = append(attrs, slog.String("outcome", string(op.Outcome)))
	}
	attrs = append(attrs, slog.String("state", string(op.State)), slog.Duration("held", op.Held.Round(time.Millisecond)))
	if op.State != StateHold { // which has no connection
		attrs = append(attrs, slog.Uint64("pid", uint64(op.PID)))
	}
	if op.Statement != "" {
		attrs = append(attrs, slog.String("statement", op.Statement))
	}
	if op.BatchSize > 0 {
		attrs = append(attrs, slog.Int("batch_size", op.BatchSize))
	}
	return attrs
}

func logResult(ctx context.Context, log *slog.Logger, r *Report, err error) {
	for _, op := range r.Remaining() {
		level := slog.LevelWarn
		if op.Outcome == OutcomeUnknown || op.Outcome == OutcomeLeaked { // somebody has to look into it
			level = slog.LevelError
		}
		log.LogAttrs(ctx, level, "pgxdrain: not drained", op.logAttrs()...)
	}
	level, message := slog.LevelInfo, "pgxdrain: drained and closed"
	if err != nil {
		level, message = slog.LevelError, "pgxdrain: not drained and closed in time"
	}
	log.Log(ctx, level, message, "took", r.Took.Round(time.Millisecond),
		"drained", r.Drained, "cancelled", r.Cancelled, "severed", r.Severed, "unknown", r.Unknown, "leaked", r.Leaked,
		"refused", r.Refused, "closed", r.closed)
}
