# The minder of a local PostgreSQL server: makes its folder, starts it, ends it, removes the folder.
#
# It exists because a Go process cannot promise to clean up: os.Exit, a panic in another goroutine, go test's -timeout,
# Ctrl-C and SIGKILL all skip deferred calls. The minder outlives them. Its standard input is a pipe whose only write end
# is in the Go process (and is close-on-exec, so no child of that process can hold it open): however the process goes, the
# kernel closes the pipe, and the minder reads the end of file.
#
# Lines on standard input: the superuser's password (here, because ps shows arguments), then "stop" for an orderly end.
# Descriptor 3 is the life pipe: the minder reports on it that it could not make the folder, then leaves it to the server
# and its backends, so that its reader meets the end of file when the last of them is gone.
#
# Arguments: the folder to make, initdb, postgres. In the variable PGXDRAIN_SETTINGS: lines for postgresql.conf.
# POSIX sh only: it runs under dash, bash and BusyBox.

dir=$1 initdb=$2 postgres=$3 settings=$PGXDRAIN_SETTINGS
unset PGXDRAIN_MINDER PGXDRAIN_SETTINGS # no business of the server's

# The end of file before the password: the process is gone and there is nothing to clean up yet.
IFS= read -r password || exit 0

# Made here and not by the Go process, so that there is no moment at which the folder exists and the minder does not.
umask 077
mkdir "$dir" 2>&3 || exit 1

(
	cd "$dir" &&
		printf '%s\n' "$password" >password &&
		"$initdb" --pgdata=data --username=postgres --pwfile=password --auth=scram-sha-256 \
			--encoding=UTF8 --locale=C --no-sync &&
		rm password &&
		printf '%s\n' "$settings" >>data/postgresql.conf &&
		exec "$postgres" -D "$dir/data"
) </dev/null >"$dir/log" 2>&1 &
postmaster=$!
exec 3>&-

# each SIGNAL sends it to every process that works in the folder, and fails when there is none. It is for those that the
# postmaster no longer speaks for: initdb and its child, and backends that outlived a killed postmaster because they are
# busy or stopped. A backend is a session of its own, so no process group has them all; the working folder does. Where
# there is no /proc it finds nothing, and the server's own shutdown has to do. (The operator -ef is in POSIX since 2024, in
# dash, bash, ksh and BusyBox for longer; it costs no process for each of a machine's processes, as readlink would.)
each() {
	found=1
	for process in /proc/[0-9]*; do
		# shellcheck disable=SC3013
		if [ "$process/cwd" -ef "$dir/data" ] || [ "$process/cwd" -ef "$dir" ]; then
			kill -s "$1" "${process#/proc/}" && found=0
		fi
	done 2>/dev/null
	return "$found"
}

# end MANNER ends the server and removes the folder. MANNER is "stop" for PostgreSQL's fast shutdown.
end() {
	# A process that was stopped with SIGSTOP acts on no signal but SIGKILL until it is continued.
	if [ "$1" = stop ]; then
		kill -s INT "$postmaster" # PostgreSQL's fast shutdown
	else
		kill -s TERM "$postmaster" # for the subshell above, which ignores SIGINT and SIGQUIT, while it is still in initdb
		kill -s QUIT "$postmaster" # PostgreSQL's immediate shutdown
	fi 2>/dev/null
	each CONT
	kill -s CONT "$postmaster" 2>/dev/null

	# The watchdog bounds the wait below: an immediate shutdown after 10 s, SIGKILL after 20 s. (A postmaster in an immediate
	# shutdown itself kills its backends after 5 s.) It watches for the file "ended" and is not ended by a signal: dash loses
	# a signal that comes just after a subshell was forked, and then the watchdog would fire at a process ID that may be
	# another process's by then.
	(
		steps=0
		while [ -d "$dir" ] && ! [ -e "$dir/ended" ]; do
			case $steps in
			200) kill -s QUIT "$postmaster" ;;
			400) kill -s KILL "$postmaster" ;;
			esac
			steps=$((steps + 1))
			sleep 0.05 || sleep 1 # POSIX has whole seconds only
		done
	) >/dev/null 2>&1 &
	watchdog=$!

	# Only the parent can wait, and until it does the process ID cannot become another process's: that is why the server is
	# the minder's child.
	wait "$postmaster"
	: >"$dir/ended"

	tries=0
	while each KILL && [ "$tries" -lt 20 ]; do
		tries=$((tries + 1))
		sleep 0.1 2>/dev/null || sleep 1
	done

	# A postmaster that was killed leaves postmaster.pid, and the System V shared memory segment that its last word names.
	# The segment is tiny, but it lives until the machine is restarted, and the number of segments is limited.
	if [ -f "$dir/data/postmaster.pid" ]; then
		segment=$(sed -n '7s/.* //p' "$dir/data/postmaster.pid")
		[ -z "$segment" ] || ipcrm -m "$segment"
	fi >/dev/null 2>&1

	# A second time, because a process that was just killed may have made a file after rm had read the folder.
	rm -rf "$dir" || { sleep 1 && rm -rf "$dir"; }
	removed=$?
	wait "$watchdog"
	return "$removed"
}

# Whoever ends the minder by a signal, a job runner that goes through the processes of a job, say, ends the server too.
# The second trap is for those that send it twice; to ignore the signals instead would make the children ignore them.
trap 'trap : HUP INT TERM; end now; exit 1' HUP INT TERM

order=
IFS= read -r order
trap : HUP INT TERM
end "$order"
