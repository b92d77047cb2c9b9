#!/usr/bin/env bash
# A Slurm of two nodes, n1 and n2, on this host: start_slurm.sh FOLDER. Needs root, and Debian's slurm-wlm and
# munge. Prints what to export; stop_slurm.sh FOLDER ends it. Everything it writes lies in FOLDER.
set -euo pipefail

folder=$(realpath -m "$1")
host=$(hostname)
mkdir -p "$folder/state" "$folder/run"
chmod 755 "$folder" "$folder/run"

free_ports() {
	python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in held))'
}
read -r controller first second < <(free_ports)

head --bytes=1024 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.sock" \
	--pid-file="$folder/run/munged.pid" --log-file="$folder/munged.log" \
	--seed-file="$folder/munge.seed"

cpus=$(nproc)
memory_mb=$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
node() { echo "NodeName=$1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$2 CPUs=$cpus RealMemory=$memory_mb"; }
cat >"$folder/slurm.conf" <<CONF
ClusterName=clinfuse
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=5
$(node n1 "$first")
$(node n2 "$second")
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF

export SLURM_CONF="$folder/slurm.conf"
slurmctld
for name in n1 n2; do
	mkdir -p "$folder/spool-$name"
	slurmd -N "$name"
done
for _ in $(seq 60); do
	answered=$(timeout 20 srun --nodes=2 --ntasks=2 sh -c 'echo $SLURMD_NODENAME' 2>>"$folder/srun.log" | sort | xargs) || true
	if [ "$answered" = "n1 n2" ]; then
		echo "SLURM_CONF=$SLURM_CONF"
		exit 0
	fi
	sleep 0.5
done
echo "expected nodes n1 and n2 to answer srun, got: $answered" >&2
tail --lines=5 "$folder"/*.log >&2
exit 1
