#!/usr/bin/env bash
# End the Slurm that start_slurm.sh FOLDER has started, and its jobs.
set -uo pipefail

folder=$(realpath -m "$1")
export SLURM_CONF="$folder/slurm.conf"
timeout 20 scancel --user=root --quiet --full 2>/dev/null
for _ in $(seq 60); do # a daemon that ends first would leave its job's processes behind
	[ -z "$(timeout 20 squeue --noheader 2>/dev/null)" ] && break
	sleep 0.25
done
for name in slurmd-n1 slurmd-n2 slurmctld munged; do
	pid=$(cat "$folder/run/$name.pid" 2>/dev/null) && kill "$pid" 2>/dev/null
done
for _ in $(seq 40); do
	alive=0
	for file in "$folder"/run/*.pid; do
		[ -e "$file" ] && kill -0 "$(cat "$file")" 2>/dev/null && alive=1
	done
	[ "$alive" = 0 ] && exit 0
	sleep 0.25
done
echo "expected slurmctld, slurmd and munged to end, some have not: $folder/run" >&2
exit 1
