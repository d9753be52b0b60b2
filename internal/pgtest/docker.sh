# The minder of a container, for machines on which testcontainers' own reaper is switched off: removes the container when
# the Go process is gone without having done so. As in local.sh, standard input is a pipe whose only write end is in that
# process, so its end of file comes however the process goes.
#
# Lines on standard input: "up" when the engine has made the container, "gone" when it is removed.
# Arguments: the docker command, the container's name.

docker=$1 name=$2 state=
unset PGXDRAIN_MINDER

remove() {
	tries=0
	while [ "$state" != gone ] && [ "$tries" -lt 10 ]; do
		if "$docker" container inspect "$name"; then
			"$docker" rm --force --volumes "$name" && break
		elif [ "$state" = up ]; then
			break
		fi
		# Until "up", the request for the container may still be under way in the engine, and have its effect after this.
		tries=$((tries + 1))
		sleep 1
	done
} >/dev/null 2>&1

trap 'trap : HUP INT TERM; remove; exit 1' HUP INT TERM

while IFS= read -r line; do
	state=$line
done
trap : HUP INT TERM
remove
