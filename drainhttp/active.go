package drainhttp

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/pgxdrain/pgxdrain"
)

// Active returns a page of the pool's operations in progress, the longest held first, and of its shutdown, if there is one. Once
// that is over the page shows what did not drain. It is a snapshot; as a page it loads itself again every 2 seconds until the
// shutdown is over. It changes nothing and nothing can be done on it.
//
// A browser gets HTML, whoever does not name text/html in Accept, or asks with ?format=json, gets JSON: an object whose keys
// docs/http.md lists. Both show at most 200 operations and how many more there are.
//
// Of statements it shows what [pgxdrain.WithQueryText] allows, sanitized by default, and never arguments. Even so it tells a
// stranger about tables and load: mount it where only operators come. It sends headers that keep it out of caches and frames.
// Methods other than GET and HEAD get 405.
func Active(pool *pgxdrain.Pool) http.Handler {
	return readOnly(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Security-Policy", contentSecurityPolicy)
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Vary", "Accept")
		p := newPage(pool)
		if !wantsHTML(r) {
			writeJSON(w, http.StatusOK, p)
			return
		}
		var b bytes.Buffer
		if err := pageTemplate.Execute(&b, p); err != nil {
			panic(err) // the template is ours: a test would have found it
		}
		h.Set("Content-Type", "text/html; charset=utf-8")
		if p.Step != pgxdrain.StepClosed {
			h.Set("Refresh", "2")
		}
		_, _ = w.Write(b.Bytes())
	}))
}

// maxShown is how many operations the page shows. An operator wants the oldest, and a pool seldom has more connections.
const maxShown = 200

// page is what Active shows. Its JSON is documented in docs/http.md.
type page struct {
	Pool       string        `json:"pool"`
	At         time.Time     `json:"at"`
	Step       pgxdrain.Step `json:"step"`
	Active     int           `json:"active"`
	Waiting    int           `json:"waiting"`
	Shutdown   *progress     `json:"shutdown"`
	Operations []operation   `json:"operations"`
	More       int           `json:"more"`
}

// progress is of a shutdown.
type progress struct {
	StartedAt time.Time `json:"started_at"`
	Budget    seconds   `json:"budget_seconds"`
	Took      seconds   `json:"took_seconds"`
	Left      seconds   `json:"left_seconds"`
	Active    int       `json:"active"`
	Admitted  int       `json:"admitted"`
	Refused   int64     `json:"refused"`
	Drained   int       `json:"drained"`
	Cancelled int       `json:"cancelled"`
	Severed   int       `json:"severed"`
	Unknown   int       `json:"unknown"`
	Leaked    int       `json:"leaked"`
}

type operation struct {
	PID              uint32           `json:"pid,omitempty"`
	State            pgxdrain.State   `json:"state"`
	Outcome          pgxdrain.Outcome `json:"outcome,omitempty"`
	Statement        string           `json:"statement,omitempty"`
	BatchSize        int              `json:"batch_size,omitempty"`
	AcquiredAt       time.Time        `json:"acquired_at"`
	Held             seconds          `json:"held_seconds"`
	StatementStart   time.Time        `json:"statement_start,omitzero"`
	TransactionStart time.Time        `json:"transaction_start,omitzero"`
	Transaction      seconds          `json:"transaction_seconds,omitempty"`
}

func newPage(pool *pgxdrain.Pool) page {
	ops, report := pool.Active(), pool.Report()
	p := page{
		Pool:       report.Pool,
		At:         rounded(time.Now()),
		Step:       report.Step,
		Active:     len(ops),
		Waiting:    report.Waiting,
		Operations: []operation{},
	}
	if !report.Start.IsZero() {
		p.Shutdown = &progress{
			StartedAt: rounded(report.Start),
			Budget:    seconds(report.Budget),
			Took:      seconds(report.Took),
			Left:      seconds(max(0, report.Budget-report.Took)),
			Active:    report.Active,
			Admitted:  report.Admitted,
			Refused:   report.Refused,
			Drained:   report.Drained,
			Cancelled: report.Cancelled,
			Severed:   report.Severed,
			Unknown:   report.Unknown,
			Leaked:    report.Leaked,
		}
	}
	if report.Step == pgxdrain.StepClosed {
		ops, p.Shutdown.Left = report.Remaining(), 0
	}
	p.More = max(0, len(ops)-maxShown)
	for _, op := range ops[:len(ops)-p.More] {
		o := operation{
			PID:              op.PID,
			State:            op.State,
			Outcome:          op.Outcome,
			Statement:        op.Statement,
			BatchSize:        op.BatchSize,
			AcquiredAt:       rounded(op.AcquiredAt),
			Held:             seconds(op.Held),
			StatementStart:   rounded(op.StatementStart),
			TransactionStart: rounded(op.TransactionStart),
		}
		if !op.TransactionStart.IsZero() {
			o.Transaction = seconds(op.AcquiredAt.Add(op.Held).Sub(op.TransactionStart))
		}
		p.Operations = append(p.Operations, o)
	}
	return p
}

func rounded(t time.Time) time.Time { return t.UTC().Truncate(time.Millisecond) }

// seconds is a duration that is a number of seconds in JSON, and short for people.
type seconds time.Duration

func (s seconds) MarshalJSON() ([]byte, error) {
	return strconv.AppendFloat(nil, time.Duration(s).Seconds(), 'f', 3, 64), nil
}

func (s seconds) String() string {
	switch d := time.Duration(s); {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%d min %02d s", int(d.Minutes()), int(d.Seconds())%60)
	default:
		return fmt.Sprintf("%d h %02d min", int(d.Hours()), int(d.Minutes())%60)
	}
}

// Number is for the attributes of a progress element.
func (s seconds) Number() string { return strconv.FormatFloat(time.Duration(s).Seconds(), 'f', 3, 64) }

// wantsHTML reports whether r is a browser's: programs that do not say what they want, such as curl, get JSON.
func wantsHTML(r *http.Request) bool {
	switch r.URL.Query().Get("format") {
	case "json":
		return false
	case "html":
		return true
	}
	quality := map[string]float64{}
	for part := range strings.SplitSeq(strings.Join(r.Header.Values("Accept"), ","), ",") {
		t, params, err := mime.ParseMediaType(part)
		if err != nil {
			continue
		}
		quality[t] = 1
		if q, err := strconv.ParseFloat(params["q"], 64); err == nil {
			quality[t] = q
		}
	}
	return quality["text/html"] > 0 && quality["text/html"] >= quality["application/json"]
}

var (
	//go:embed active.css
	css string
	//go:embed active.html
	html string

	pageTemplate = template.Must(template.New("active").Funcs(template.FuncMap{
		"css":   func() template.CSS { return template.CSS(css) },
		"says":  func(s pgxdrain.Step) string { return stepSays[s] },
		"steps": func() []pgxdrain.Step { return steps },
	}).Parse(html))

	// Nothing is loaded and nothing runs; the style is the page's own.
	contentSecurityPolicy = "default-src 'none'; style-src 'sha256-" + sha256Of(css) +
		"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

func sha256Of(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// steps are those of a shutdown, in their order.
var steps = []pgxdrain.Step{
	pgxdrain.StepUnready, pgxdrain.StepDrain, pgxdrain.StepCancel, pgxdrain.StepSever, pgxdrain.StepClose, pgxdrain.StepClosed,
}

var stepSays = map[pgxdrain.Step]string{
	pgxdrain.StepOpen:    "Open.",
	pgxdrain.StepUnready: "Unready: work is still admitted.",
	pgxdrain.StepDrain:   "Draining: new work is refused, work in progress goes on.",
	pgxdrain.StepCancel:  "Ending what is left: statements are being cancelled.",
	pgxdrain.StepSever:   "Ending what is left: connections are being severed.",
	pgxdrain.StepClose:   "Closing the pool.",
	pgxdrain.StepClosed:  "Closed.",
}
