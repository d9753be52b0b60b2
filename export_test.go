package pgxdrain

// VisibleText is what mode shows of the text of a statement that was executed without arguments.
func VisibleText(mode QueryText, sql string) string { return mode.of(sql, false).text }

// Summary is what spans show of a text in two words.
func Summary(sql string) string { return QueryTextSanitized.of(sql, false).summary }

// EndsTransaction reports whether a statement is taken for a COMMIT.
func EndsTransaction(sql string) bool { return endsTransaction(sql) }
