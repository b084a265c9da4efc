#!/usr/bin/env bash
# Stages of one experiment, one after the other; each is told what stands behind their names:
#   cluster/stages.sh tokenize,train,evaluate --config jobs/configs/330m.yaml train.micro_batches=64
# A finished stage ends at once and a stopped one goes on where it was, so the same command goes on
# where the last one ended. It ends with the first stage that fails. Plain words only: what submits a
# command to Ray does not keep the quotes of a longer one.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
	echo "usage: $0 STAGE[,STAGE...] [--config FILE] [key.sub=value ...]" >&2
	exit 2
fi
IFS=, read -ra stages <<<"$1"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." # paths in an experiment are relative to the repository
for stage in "${stages[@]}"; do
	echo "== $stage"
	python -m "jobs.$stage" "$@"
done
