package pgxdrain

import (
	"regexp"
	"strings"
	"unicode/utf8"

	sqllexer "github.com/DataDog/go-sqllexer"
	"github.com/jackc/pgx/v5"
)

// QueryText is what of a statement's text may be seen in operations, reports, logs, errors and spans. Texts are cut to 1024
// bytes, summaries to 255.
type QueryText int

const (
	// QueryTextSanitized shows the text of a statement that was executed with arguments as it is, for who passes values as
	// arguments has said which parts are not for show; a literal or comment that is in such a text all the same is seen. (So
	// the semantic conventions want it.) Any other text is shown with every literal replaced by a question mark, without
	// comments and with its white space folded; one that cannot be taken apart with certainty (backslashes, nested comments,
	// quotes that do not close) as "?".
	QueryTextSanitized QueryText = iota
	// QueryTextRaw shows the text as the caller gave it, with whatever literals and comments are in it.
	QueryTextRaw
	// QueryTextSummary shows the command and the tables, or "?" if the text cannot be taken apart with certainty.
	QueryTextSummary
	// QueryTextNone shows nothing.
	QueryTextNone
)

const (
	// maxQueryText is the length in bytes that a text is cut to. It is the default of track_activity_query_size, to which
	// pg_stat_activity cuts.
	maxQueryText = 1024

	// maxQuerySummary is the longest summary that the semantic conventions allow.
	maxQuerySummary = 255

	// uncertain is shown of a text that cannot be taken apart with certainty.
	uncertain = "?"
)

func (q QueryText) valid() bool { return q >= QueryTextSanitized && q <= QueryTextNone }

// queryTextFunc gives what may be seen of a statement's text. parameterised says that it was executed with arguments.
type queryTextFunc func(sql string, parameterised bool) queryText

// queryText is what may be seen of a statement's text.
type queryText struct {
	text    string
	summary string // "" if the mode shows nothing, or it is uncertain
}

// cached returns of, which remembers: many operations run the same few statements. It is for one look at the records, by one
// goroutine.
func (q QueryText) cached() queryTextFunc {
	type statement struct {
		sql           string
		parameterised bool
	}
	seen := make(map[statement]queryText)
	return func(sql string, parameterised bool) queryText {
		s := statement{sql, parameterised}
		shown, ok := seen[s]
		if !ok {
			shown = q.of(sql, parameterised)
			seen[s] = shown
		}
		return shown
	}
}

// of is a queryTextFunc.
func (q QueryText) of(sql string, parameterised bool) (shown queryText) {
	if q == QueryTextNone || sql == "" {
		return queryText{}
	}
	text, summary := sanitize(sql)
	summary = cut(summary, maxQuerySummary)
	switch {
	case q == QueryTextSummary:
		shown.text = summary
	case q == QueryTextRaw || parameterised:
		shown.text = cut(sql, maxQueryText)
	default:
		shown.text = cut(text, maxQueryText)
	}
	if summary != uncertain {
		shown.summary = summary
	}
	return shown
}

// hasArguments reports whether args, as pgx's methods take them, have arguments and not only options for pgx among them.
func hasArguments(args []any) bool {
	for _, arg := range args {
		switch arg := arg.(type) {
		case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
		case pgx.NamedArgs:
			return len(arg) > 0
		case pgx.StrictNamedArgs:
			return len(arg) > 0
		case pgx.QueryRewriter: // makes a text of its own
		default:
			return true
		}
	}
	return false
}

// cut shortens text to at most limit bytes.
func cut(text string, limit int) string {
	const ellipsis = "…"
	if len(text) <= limit {
		return text
	}
	end := limit - len(ellipsis)
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + ellipsis
}

var (
	obfuscator = sqllexer.NewObfuscator()
	normalizer = sqllexer.NewNormalizer(
		sqllexer.WithCollectCommands(true),
		sqllexer.WithCollectTables(true),
		sqllexer.WithKeepSQLAlias(true),
		sqllexer.WithKeepIdentifierQuotation(true),
	)
	postgres = sqllexer.WithDBMS(sqllexer.DBMSPostgres)

	// What is left where the lexer has taken a text apart other than PostgreSQL would: it takes a backslash in any string
	// for an escape, ends a nested comment at its first "*/", and lets an unclosed quote be.
	residue = regexp.MustCompile(`['\\]|/\s*\*|\*\s*/|\$(\D|$)`)
)

// sanitize returns the text of a statement without literals and comments, and a summary of it: the command and its tables.
func sanitize(sql string) (text, summary string) {
	if strings.Contains(sql, `\`) {
		return uncertain, uncertain
	}
	text, meta, err := sqllexer.ObfuscateAndNormalize(sql, obfuscator, normalizer, postgres)
	if err != nil || residue.MatchString(text) {
		return uncertain, uncertain
	}
	command, _ := firstWords(text)
	summary = strings.ToUpper(command)
	if command != "copy" && command != "savepoint" { // their names are not tables to the lexer
		summary = strings.Join(append([]string{summary}, meta.Tables...), " ")
	}
	return text, summary
}

// firstWords returns the first two words of a statement, in lower case, past white space and comments.
func firstWords(sql string) (first, second string) {
	lexer := sqllexer.New(sql, postgres)
	words := make([]string, 0, 2)
	for len(words) < 2 {
		switch token := lexer.Scan(); token.Type {
		case sqllexer.SPACE, sqllexer.COMMENT, sqllexer.MULTILINE_COMMENT:
		case sqllexer.EOF:
			words = append(words, "", "")
		default:
			words = append(words, strings.ToLower(token.Value))
		}
	}
	return words[0], words[1]
}
