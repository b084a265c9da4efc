#!/usr/bin/env bash
# A command on the nodes that Slurm gives, as one Ray cluster that lasts as long as the command:
#
#   export MMRAG_RUNS=/shared/runs MMRAG_CORPUS=/shared/corpus     # directories that every node sees
#   sbatch --nodes=1 cluster/slurm.sh python -m jobs.tokenize --config jobs/configs/330m.yaml
#   sbatch --nodes=4 cluster/slurm.sh python -m jobs.train --config jobs/configs/6.8b.yaml
#
# Submitted from the repository, whose .venv (`make setup`) every node sees too. What is said below to
# sbatch fits nodes of eight GPUs; options on the command line win. A partition, an account and the
# kind of GPU are yours to add.
#
# Token: drawn for the job, kept in a directory of MMRAG_RUNS that only its owner reads, gone after it.
# Ports: the head's are 20000 + 4 * (job id modulo 4000) and the two after it, so two jobs do not meet;
#   Ray chooses the others itself, so the nodes of a job have to reach each other on all ports.
# End: five minutes before the time limit the command is sent SIGTERM and the job queued again; a stage
#   goes on where it was. The workers' nodes go first, the head last.
#
#SBATCH --job-name=mmrag
#SBATCH --output=mmrag-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
set -euo pipefail

readonly START_SECONDS=300 # for the head, and again for all nodes
readonly END_SECONDS=240   # for the command, once it was told to end

die() {
	echo "slurm.sh: $*" >&2
	exit 1
}

[[ $# -gt 0 ]] || die "no command given; how it is used stands in its first lines"
[[ -n ${SLURM_JOB_ID:-} ]] || die "this is no Slurm job: submit it with sbatch"
[[ -n ${MMRAG_RUNS:-} ]] || die "MMRAG_RUNS names no directory that every node sees"

cd "${SLURM_SUBMIT_DIR:-$PWD}" # Slurm runs a copy of this file, elsewhere
[[ ! -d .venv/bin ]] || export PATH="$PWD/.venv/bin:$PATH"
command -v ray >/dev/null || die "no ray on PATH and no .venv in $PWD: run make setup"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes[0]}
head_ip=$(getent ahostsv4 "$head_node" | awk 'NR == 1 { print $1 }') || true
[[ -n $head_ip ]] || die "$head_node has no address"
port=$((20000 + 4 * (SLURM_JOB_ID % 4000)))

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-} # srun does not take sbatch's
[[ -n $SRUN_CPUS_PER_TASK ]] || unset SRUN_CPUS_PER_TASK
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true

private=$MMRAG_RUNS/.slurm/$SLURM_JOB_ID
(
	umask 077
	mkdir -p "$private"
	head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$private/token"
)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token

head_step='' workers_step='' command_pid='' requeue='' told=''

running() { [[ -n $1 ]] && kill -0 "$1" 2>/dev/null; }

end_step() { # PID: end it, and wait until it has
	if running "$1"; then
		kill -TERM "$1" 2>/dev/null || true
		wait "$1" 2>/dev/null || true
	fi
}

end_all() {
	end_step "$command_pid"
	end_step "$workers_step"
	end_step "$head_step"
	rm -rf "$private"
}

tell_command() { # told to end: the command is, and whoever waits for it goes on waiting
	told=$SECONDS
	if running "$command_pid"; then
		kill -TERM "$command_pid"
	else
		exit 143 # before there was one
	fi
}

trap end_all EXIT
trap tell_command TERM INT
trap 'requeue=yes; tell_command' USR1

echo "slurm.sh: ${#nodes[@]} nodes, the head on $head_node at $head_ip:$port"
srun --nodes=1 --ntasks=1 --nodelist="$head_node" \
	ray start --head --block --disable-usage-stats --node-ip-address="$head_ip" --port="$port" \
	--dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) \
	--ray-client-server-port=$((port + 2)) --temp-dir="/tmp/ray-$SLURM_JOB_ID" &
head_step=$!
deadline=$((SECONDS + START_SECONDS))
until ray health-check --address "$head_ip:$port" >/dev/null 2>&1; do
	running "$head_step" || die "the head did not start"
	((SECONDS < deadline)) || die "the head does not answer at $head_ip:$port"
	sleep 1
done

if ((${#nodes[@]} > 1)); then
	others=$((${#nodes[@]} - 1))
	srun --nodes="$others" --ntasks="$others" --exclude="$head_node" \
		ray start --block --disable-usage-stats --address="$head_ip:$port" &
	workers_step=$!
fi

export RAY_ADDRESS=$head_ip:$port
python - "${#nodes[@]}" "$START_SECONDS" <<'EOF' || die "not every node has joined"
import sys
import time

import ray

ray.init(log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + float(sys.argv[2])
while (here := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]):
    if time.monotonic() > deadline:
        sys.exit(f"slurm.sh: {here} of {sys.argv[1]} nodes have joined")
    time.sleep(1)
EOF

status=0
"$@" &
command_pid=$!
while running "$command_pid"; do
	if [[ -z $told ]]; then
		wait "$command_pid" || true # a signal ends the waiting, once it was dealt with
	elif ((SECONDS - told > END_SECONDS)); then
		kill -KILL "$command_pid" 2>/dev/null || true
	else
		sleep 0.2
	fi
done
wait "$command_pid" || status=$?

if [[ -n $requeue ]] && ((status != 0)); then
	echo "slurm.sh: the time is over, the job is queued again"
	end_all
	scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
