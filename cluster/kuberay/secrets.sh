#!/usr/bin/env bash
# Makes the secrets that the manifests name, each once: cluster/kuberay/secrets.sh NAMESPACE
# A secret that is there stays as it is, so the script may be run again. Values are drawn here, go to
# the cluster through a pipe, and are neither printed nor seen among the arguments of a process.
#
#   mmrag-ray-token        auth_token  who may reach the Ray clusters and submit jobs
#   mmrag-redis            password    of Redis, where Ray's heads keep what they know
#   mmrag-mlflow-database  password    of MLflow's PostgreSQL
#   mmrag-api-keys         keys        of the endpoint's callers, one a line: edit it to give them out
#
# To read one:  kubectl -n NAMESPACE get secret mmrag-api-keys -o jsonpath='{.data.keys}' | base64 -d
set -euo pipefail

if [[ $# -ne 1 ]]; then
	echo "usage: $0 NAMESPACE" >&2
	exit 2
fi
namespace=$1

secret() { # NAME KEY
	if kubectl --namespace "$namespace" get secret "$1" >/dev/null 2>&1; then
		echo "$1 is there already"
	else
		openssl rand -hex 32 |
			kubectl --namespace "$namespace" create secret generic "$1" --from-file="$2"=/dev/stdin
	fi
}

kubectl get namespace "$namespace" >/dev/null 2>&1 || kubectl create namespace "$namespace"
secret mmrag-ray-token auth_token
secret mmrag-redis password
secret mmrag-mlflow-database password
secret mmrag-api-keys keys
