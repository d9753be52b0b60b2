# The minder of a PgBouncer: makes its folder, starts it, ends it, removes the folder. As in local.sh, standard input is a pipe
# whose only write end is in the Go process, so its end of file comes however the process goes.
#
# Lines on standard input: "stop", for an end that the Go process waits for. The minder fails if PgBouncer has ended before that.
# Arguments: the folder to make, pgbouncer. In the variable PGXDRAIN_SETTINGS: pgbouncer.ini, which has a password in it.

dir=$1 pgbouncer=$2 settings=$PGXDRAIN_SETTINGS
unset PGXDRAIN_MINDER PGXDRAIN_SETTINGS

umask 077
mkdir "$dir" || exit 1
cd "$dir" || exit 1
printf '%s\n' "$settings" >pgbouncer.ini
"$pgbouncer" pgbouncer.ini </dev/null >out 2>&1 &
pid=$!

end() {
	# PgBouncer's immediate shutdown; SIGINT waits for its clients. It exits with 1, as after its own fatal errors.
	kill -s TERM "$pid" 2>/dev/null
	kill -s CONT "$pid" 2>/dev/null # a test may have stopped it
	wait "$pid" 2>/dev/null
	grep -q 'got SIGTERM' out
	asked=$?
	cd / && rm -rf "$dir"
	return "$asked"
}
trap 'trap : HUP INT TERM; end; exit 1' HUP INT TERM

IFS= read -r order
trap : HUP INT TERM
end
