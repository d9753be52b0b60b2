//go:build unix

package main

import (
	"bytes"
	"cmp"
	"fmt"
	"html"
	"slices"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
)

var colors = map[string]string{
	"":          "#5b6b7f", // of the shutdown and the close
	"drained":   "#3f9d5d",
	"cancelled": "#d99a2b",
	"severed":   "#d0623a",
	"unknown":   "#a8479e",
	"leaked":    "#b3261e",
}

// picture draws a trace as tracing backends do: a bar for each span, with the root's events as lines.
func picture(root *tracepb.Span, spans []*tracepb.Span) []byte {
	const width, left, right, top, row = 1000, 200, 20, 64, 26
	spans = slices.Clone(spans)
	slices.SortFunc(spans, func(a, b *tracepb.Span) int {
		if a == root || b == root {
			return cmp.Compare(b.EndTimeUnixNano-b.StartTimeUnixNano, a.EndTimeUnixNano-a.StartTimeUnixNano)
		}
		return cmp.Or(cmp.Compare(a.StartTimeUnixNano, b.StartTimeUnixNano), cmp.Compare(a.EndTimeUnixNano, b.EndTimeUnixNano))
	})
	total := float64(root.EndTimeUnixNano - root.StartTimeUnixNano)
	x := func(at uint64) float64 {
		return left + (width-left-right)*float64(at-root.StartTimeUnixNano)/total
	}
	height := top + row*len(spans) + 12

	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="system-ui, sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" rx="8" fill="#fbfbfa"/>`+"\n", width, height)
	for i, event := range root.Events {
		at := x(event.TimeUnixNano)
		anchor := "start"
		if at > width-right-60 {
			anchor = "end"
		}
		// By turns above and below each other: some are within milliseconds.
		fmt.Fprintf(&b, `<path d="M%.1f %dV%d" stroke="#9aa5b1" stroke-dasharray="3 3"/><text x="%.1f" y="%d" text-anchor="%s" fill="#5b6b7f">%s +%v</text>`+"\n",
			at, 22+16*(i%2), height-8, at, 18+16*(i%2), anchor, event.Name, since(root, event.TimeUnixNano))
	}
	for i, span := range spans {
		y := top + row*i
		from, to := x(span.StartTimeUnixNano), x(span.EndTimeUnixNano)
		outcome := attribute(span, "pgxdrain.outcome").GetStringValue()
		label := outcome
		if summary := attribute(span, "db.query.summary").GetStringValue(); summary != "" {
			label += ", " + summary
		}
		if state := attribute(span, "pgxdrain.state").GetStringValue(); state != "" {
			label += ", " + state
		}
		indent := 28
		if span == root {
			indent, label = 12, attribute(span, "error.type").GetStringValue()
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" fill="#1f2933">%s</text>`, indent, y+16, span.Name)
		fmt.Fprintf(&b, `<rect x="%.1f" y="%d" width="%.1f" height="16" rx="3" fill="%s"/>`, from, y+4, max(2, to-from), colors[outcome])
		if to-from > 7*float64(len(label)) {
			fmt.Fprintf(&b, `<text x="%.1f" y="%d" fill="#fff">%s</text>`+"\n", from+6, y+16, html.EscapeString(label))
		} else {
			fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="end" fill="#1f2933">%s</text>`+"\n", from-6, y+16, html.EscapeString(label))
		}
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

func since(root *tracepb.Span, at uint64) time.Duration {
	return time.Duration(at - root.StartTimeUnixNano).Round(10 * time.Millisecond)
}
