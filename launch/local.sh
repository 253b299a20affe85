#!/usr/bin/env bash
# Starts one run as several processes on this machine, on simulated CPU devices: the way to try a multi-host run.
set -euo pipefail

usage() {
  cat <<EOF
usage: launch/local.sh [--dry-run] PROCESSES DEVICES_PER_PROCESS ARGUMENTS...

Starts PROCESSES times \`python -m fvq_jax.main --distributed ARGUMENTS\`, with DEVICES_PER_PROCESS simulated CPU
devices each; only the first prints. Ends when all have ended, with the first exit code that is not 0.
  --dry-run   print the commands instead of running them
  PYTHON      (environment) the interpreter, default .venv/bin/python
  PORT        (environment) of the coordinator on 127.0.0.1, default 12355

  launch/local.sh 2 4 --config=configs/fvq16k.py:smoke --workdir=runs/two-processes
EOF
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
if [[ ${1:-} == --help || $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || ! $2 =~ ^[1-9][0-9]*$ ]]; then
  usage
  [[ ${1:-} == --help ]] && exit 0 || exit 2
fi
processes=$1 devices=$2
shift 2

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices XLA_FLAGS=
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12355} JAX_NUM_PROCESSES=$processes
command=("${PYTHON:-.venv/bin/python}" -m fvq_jax.main --distributed "$@")
if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    echo "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices XLA_FLAGS= JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" \
      "JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$i ${command[*]}"
  done
  exit 0
fi

logs=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  if ((i == 0)); then
    JAX_PROCESS_ID=0 "${command[@]}" &
  else
    JAX_PROCESS_ID=$i "${command[@]}" >"$logs/$i" 2>&1 &
  fi
  pids+=($!)
done

code=0
for ((i = 0; i < processes; i++)); do
  status=0
  # A signal ends `wait` early, with the processes still saving: wait on until this one has ended.
  while wait "${pids[i]}" || status=$?; ((status > 128)) && kill -0 "${pids[i]}" 2>/dev/null; do status=0; done
  if ((status != 0)); then
    ((code != 0)) || code=$status
    ((i == 0)) || echo "process $i ended with $status: $(tail -n 1 "$logs/$i")" >&2
  fi
done
rm -rf "$logs"
exit "$code"
