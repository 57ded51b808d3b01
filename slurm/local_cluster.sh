#!/usr/bin/env bash
# A real one-node SLURM for tests and for trying a sweep out: slurm/local_cluster.sh start|stop|status|env
#
# Debian or Ubuntu packages: slurmctld slurmd slurm-client munge. Works as root without systemd, in a container too.
# Everything (configuration, key, state, logs, sockets) is in one folder, ${SLURM_LOCAL_DIR:-${TMPDIR:-/tmp}/local-slurm-UID}.
# `start` and `stop` can be repeated; `stop` ends only the three daemons that `start` began. Nothing below /etc is touched,
# so clients need SLURM_CONF:  eval "$(slurm/local_cluster.sh env)"
set -euo pipefail

dir=${SLURM_LOCAL_DIR:-${TMPDIR:-/tmp}/local-slurm-$(id -u)}
conf=$dir/slurm.conf
port=${SLURM_LOCAL_PORT:-16817}
host=$(hostname -s)
export SLURM_CONF=$conf
PATH=$PATH:/usr/sbin:/sbin

fail() { echo "error: $*" >&2; exit 1; }

# The process of a daemon that we started: its recorded id, if that process still is that daemon with our files.
ours() {
    local pid
    pid=$(cat "$dir/$1.pid" 2>/dev/null) || return 1
    [ -n "$pid" ] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q "$1.*$dir" && echo "$pid"
}

answers() { timeout 5 sinfo -h -o %T >/dev/null 2>&1; }

await() {  # what, seconds, command…
    local what=$1 left=$(($2 * 5)); shift 2
    until "$@"; do
        left=$((left - 1)); [ "$left" -gt 0 ] || return 1
        sleep 0.2
    done
}

idle() { timeout 5 sinfo -h -o %T 2>/dev/null | grep -Eq '^(idle|mixed|allocated|completing)$'; }

configure() {
    local cpus memory
    cpus=$(nproc); [ "$cpus" -ge 2 ] || cpus=2
    memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    cat >"$conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
SlurmdParameters=config_overrides
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    local program
    for program in munged slurmctld slurmd sinfo; do
        command -v "$program" >/dev/null || fail "no $program here; apt-get install slurmctld slurmd slurm-client munge"
    done
    mkdir -p "$dir"
    [ -O "$dir" ] || fail "$dir belongs to another user; set SLURM_LOCAL_DIR"
    mkdir -p "$dir/state" "$dir/spool"
    chmod 755 "$dir"
    if ours munged >/dev/null && ours slurmctld >/dev/null && ours slurmd >/dev/null && answers; then
        echo "runs already: $dir"
        return
    fi
    stop_daemons
    configure
    if [ ! -s "$dir/munge.key" ]; then
        (umask 077; head -c 128 /dev/urandom >"$dir/munge.key")
    fi
    munged --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
        --seed-file="$dir/munge.seed" --force 2>>"$dir/munged.log" || fail "munged did not start; see $dir/munged.log"
    await munge 10 test -S "$dir/munge.socket" || fail "munged does not answer; see $dir/munged.log"
    slurmctld -f "$conf" -c || fail "slurmctld did not start; see $dir/slurmctld.log"
    await slurmctld 20 answers || fail "slurmctld does not answer; see $dir/slurmctld.log"
    slurmd -f "$conf" || fail "slurmd did not start; see $dir/slurmd.log"
    await node 20 idle || fail "the node does not come up; see $dir/slurmd.log, $dir/slurmctld.log"
    echo "runs: $dir"
    echo "eval \"\$($0 env)\"   makes sbatch, squeue and scontrol use it"
}

stop_daemons() {
    local name pid
    if ours slurmctld >/dev/null && answers; then
        scancel --user="$(id -un)" 2>/dev/null || true
        await jobs 15 eval '[ -z "$(timeout 5 squeue -h -t running,completing 2>/dev/null)" ]' || true
    fi
    for name in slurmd slurmctld munged; do
        pid=$(ours "$name") || continue
        kill "$pid" 2>/dev/null || true
        await "$name" 10 eval "! kill -0 $pid 2>/dev/null" || kill -9 "$pid" 2>/dev/null || true
    done
    rm -f "$dir"/*.pid "$dir"/munge.socket*
}

stop() {
    [ -d "$dir" ] || { echo "not running"; return; }
    stop_daemons
    rm -rf "$dir/state" "$dir/spool"
    echo "stopped"
}

status() {
    local name
    for name in munged slurmctld slurmd; do
        echo "$name: $(ours "$name" || echo not running)"
    done
    answers || { echo "no controller answers"; return 1; }
    timeout 5 sinfo
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    status) status ;;
    env) echo "export SLURM_CONF='$conf'" ;;
    *) echo "usage: $0 start|stop|status|env" >&2; exit 2 ;;
esac
