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

	// maxPlainText is how much of a text without its literals is taken apart: the rest of a long one, with all its rows, is not
	// shown anyway.
	maxPlainText = 4 * maxQueryText

	ellipsis = "…"

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
	var last statement
	var lastShown queryText
	return func(sql string, parameterised bool) queryText {
		s := statement{sql, parameterised}
		if sql == "" {
			return queryText{}
		}
		if s == last {
			return lastShown
		}
		shown, ok := seen[s]
		if !ok {
			shown = q.of(sql, parameterised)
			seen[s] = shown
		}
		last, lastShown = s, shown
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
)

// sanitize returns the text of a statement without literals and comments, and a summary of it: the command and its tables.
func sanitize(sql string) (text, summary string) {
	plain, rest, ok := withoutLiterals(sql)
	if !ok {
		return uncertain, uncertain
	}
	text, meta, err := sqllexer.ObfuscateAndNormalize(plain, obfuscator, normalizer, postgres)
	if err != nil {
		return uncertain, uncertain
	}
	if rest {
		text += ellipsis
	}
	command, _ := firstWords(text)
	summary = strings.ToUpper(command)
	if command != "copy" && command != "savepoint" { // their names are not tables to the lexer
		summary = strings.Join(append([]string{summary}, meta.Tables...), " ")
	}
	return text, summary
}

// What PostgreSQL's scan.l takes for an identifier, and for the tag of a dollar quote at the beginning of a text. Bytes above
// ASCII are letters to it.
var (
	identifier  = regexp.MustCompile(`^(?:[A-Za-z_]|[^\x00-\x7f])(?:[A-Za-z0-9_$]|[^\x00-\x7f])*`)
	dollarQuote = regexp.MustCompile(`^\$(?:(?:[A-Za-z_]|[^\x00-\x7f])(?:[A-Za-z0-9_]|[^\x00-\x7f])*)?\$`)
	parameter   = regexp.MustCompile(`^\$[0-9]+`)
	number      = regexp.MustCompile(`^\.?[0-9](?:[Ee][-+][0-9]|[0-9A-Za-z_.])*`) // or more: it is not to be shown
)

// withoutLiterals returns sql with a space in the place of each comment, an empty string in that of each string and 0 in that of each
// number, up to maxPlainText, and whether there is more. It is not ok, and returns what comes before, if it is not certain where one
// of them ends.
//
// go-sqllexer alone does not do: it is made for many databases and takes a text apart other than PostgreSQL does (t."it's", a comment
// after an operator, a/1, nested comments).
func withoutLiterals(sql string) (plain string, rest, ok bool) {
	var b strings.Builder
	word := "" // the identifier right before
	for sql != "" && b.Len() < maxPlainText {
		before := word
		word = ""
		length, ok := 1, true
		switch {
		case strings.HasPrefix(sql, "--"):
			length = lineLength(sql)
			b.WriteByte(' ')
		case strings.HasPrefix(sql, "/*"):
			length, ok = commentLength(sql)
			b.WriteByte(' ')
		case sql[0] == '\'':
			length, ok = stringLength(sql, strings.EqualFold(before, "e"))
			b.WriteString("''")
		case sql[0] == '"':
			end := strings.IndexByte(sql[1:], '"')
			length, ok = end+2, end >= 0
			b.WriteString(sql[:length])
		case sql[0] == '$':
			if p := parameter.FindString(sql); p != "" {
				length = len(p)
				b.WriteString(p)
				break
			}
			tag := dollarQuote.FindString(sql)
			end := strings.Index(sql[len(tag):], tag)
			length, ok = end+2*len(tag), tag != "" && end >= 0
			b.WriteString("''")
		case isDigit(sql[0]), sql[0] == '.' && len(sql) > 1 && isDigit(sql[1]):
			length = len(number.FindString(sql))
			if b.Len() > 0 && strings.IndexByte("/@#!?", b.String()[b.Len()-1]) >= 0 {
				b.WriteByte(' ') // to go-sqllexer a/1 is an identifier
			}
			b.WriteByte('0')
		case isLetter(sql[0]):
			word = identifier.FindString(sql)
			length = len(word)
			b.WriteString(word)
		default:
			b.WriteByte(sql[0])
		}
		if !ok {
			return b.String(), false, false
		}
		sql = sql[length:]
	}
	return b.String(), sql != "", true
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func isLetter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' || c == '_' || c >= utf8.RuneSelf }

// lineLength is the length of the line at the beginning of sql.
func lineLength(sql string) int {
	if n := strings.IndexAny(sql, "\n\r"); n >= 0 {
		return n
	}
	return len(sql)
}

// commentLength is the length of the comment at the beginning of sql, which may have others in it.
func commentLength(sql string) (_ int, ok bool) {
	depth := 0
	for i := 0; i+1 < len(sql); i++ {
		switch sql[i : i+2] {
		case "/*":
			depth++
			i++
		case "*/":
			depth--
			i++
		}
		if depth == 0 {
			return i + 1, true
		}
	}
	return 0, false
}

// stringLength is the length of the string at the beginning of sql. Of one that is not an escape string (E) it depends on the
// session's standard_conforming_strings what a backslash means; it is not ok then.
func stringLength(sql string, escapes bool) (_ int, ok bool) {
	for i := 1; i < len(sql); i++ {
		switch {
		case sql[i] == '\\' && !escapes:
			return 0, false
		case sql[i] == '\\':
			i++
		case strings.HasPrefix(sql[i:], "''"):
			i++
		case sql[i] == '\'':
			return i + 1, true
		}
	}
	return 0, false
}

// firstWords returns the first two words of a statement, in lower case.
func firstWords(sql string) (first, second string) {
	first, sql = firstWord(sql)
	second, _ = firstWord(sql)
	return first, second
}

// firstWord returns the word that sql begins with past white space, comments and semicolons, in lower case, and what comes after it. It
// is empty if anything else comes first.
func firstWord(sql string) (word, rest string) {
	for sql != "" {
		length, ok := 1, true
		switch {
		case strings.HasPrefix(sql, "--"):
			length = lineLength(sql)
		case strings.HasPrefix(sql, "/*"):
			length, ok = commentLength(sql)
		case strings.IndexByte(" \t\n\r\f\v;", sql[0]) >= 0:
		default:
			word = identifier.FindString(sql)
			return strings.ToLower(word), sql[len(word):]
		}
		if !ok {
			return "", ""
		}
		sql = sql[length:]
	}
	return "", ""
}
