package pgxdrain

// VisibleText is what mode shows of a statement's text.
func VisibleText(mode QueryText, sql string) string { return mode.of(sql, false).text }
