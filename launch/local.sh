#!/usr/bin/env bash
# Starts one run as several processes on this machine: the way to try a multi-host run. See --help.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local.sh [--dry-run] [--devices=D] N CONFIG [OVERRIDES...]
       launch/local.sh [--dry-run] [--devices=D] N PROGRAM FLAGS...

Starts N times `python -m fvq_jax.main --distributed --config=CONFIG OVERRIDES...`, or `python -m fvq_jax.PROGRAM FLAGS...
--distributed` for another PROGRAM: tokenize, sample or evaluate. Only the first process prints; the last line of another
one is shown if it fails. If one fails the others are stopped, with SIGTERM and, where that does
not end them in time, SIGKILL. SIGTERM and SIGINT are passed on, so that the run is saved.

  --devices=D  D simulated CPU devices per process; without it process I of N uses GPU I
  --dry-run    print the commands instead of running them
  OVERRIDES    flags of the program: --config.FIELD=VALUE, --workdir=DIR (default runs/local-CONFIG), ...

Environment: PYTHON, the interpreter (.venv/bin/python); PORT of the coordinator on 127.0.0.1 (12355); GRACE, the
seconds between SIGTERM and SIGKILL (60). Exit code: 0 all ended well, 75 interrupted and saved, otherwise that of the
first process that failed; 2 also for wrong arguments.

  launch/local.sh --devices=4 2 configs/fvq16k.py:smoke
  launch/local.sh 8 sample --generator=runs/generator --tokenizer=runs/fvq16k --random=50000 --out=samples
END
}

refuse() {
  echo "launch/local.sh: $1 (see --help)" >&2
  exit 2
}

dry_run='' devices=''
while [[ ${1:-} == -* ]]; do
  case $1 in
    --help | -h) usage && exit ;;
    --dry-run) dry_run=1 ;;
    --devices=*) devices=${1#*=} ;;
    *) refuse "unknown option $1" ;;
  esac
  shift
done
(($# >= 2)) || refuse 'N and CONFIG, or N, PROGRAM and FLAGS, are needed'
[[ $1 =~ ^[1-9][0-9]*$ ]] || refuse "N must be a whole number above 0, not $1"
[[ -z $devices || $devices =~ ^[1-9][0-9]*$ ]] || refuse "--devices must be a whole number above 0, not $devices"
processes=$1 what=$2
shift 2

python=("${PYTHON:-.venv/bin/python}" -m)
case $what in
  # A command of the program, such as extract, comes before its flags.
  tokenize | sample | evaluate) command=("${python[@]}" "fvq_jax.$what" "$@" --distributed) ;;
  *)
    command=("${python[@]}" fvq_jax.main --distributed "--config=$what" "$@")
    if [[ " $*" != *' --workdir'* ]]; then
      name=${what##*/}
      name=${name/.py/}
      command+=("--workdir=runs/local-${name//[^A-Za-z0-9=._]/-}")
    fi
    ;;
esac
environment=("JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12355}" "JAX_NUM_PROCESSES=$processes")
[[ -z $devices ]] || environment+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" XLA_FLAGS=)

declare -A number=() # process id -> number of the process, while it runs
logs=''
for ((i = 0; i < processes; i++)); do
  line=(env "${environment[@]}" "JAX_PROCESS_ID=$i")
  [[ $devices ]] || line+=("JAX_LOCAL_DEVICE_IDS=$i")
  line+=("${command[@]}")
  if [[ $dry_run ]]; then
    printf '%q ' "${line[@]}"
    echo
  elif ((i == 0)); then
    logs=$(mktemp -d)
    trap 'rm -rf "$logs"' EXIT
    trap 'kill -TERM "${!number[@]}" 2>/dev/null || true' INT TERM
    "${line[@]}" &
    number[$!]=$i
  else
    "${line[@]}" >"$logs/$i" 2>&1 &
    number[$!]=$i
  fi
done

# A process that waits for a process that is gone may not react to SIGTERM.
stop_others() {
  kill -TERM "${!number[@]}" 2>/dev/null || true
  for ((tenths = 10 * ${GRACE:-60}; tenths > 0; tenths--)); do
    kill -0 "${!number[@]}" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "${!number[@]}" 2>/dev/null || true
}

# Not by `wait -n`, which may miss a process that ended while a signal was handled.
code=0
while ((${#number[@]})); do
  for pid in "${!number[@]}"; do
    ! kill -0 "$pid" 2>/dev/null || continue
    i=${number[$pid]} status=0
    unset "number[$pid]"
    wait "$pid" || status=$?
    ((status)) || continue
    ((i == 0)) || echo "process $i ended with $status: $(tail -n 1 "$logs/$i")" >&2
    if ((code == 0 || code == 75)); then
      code=$status
      ((status == 75 || ${#number[@]} == 0)) || stop_others
    fi
  done
  sleep 0.1
done
exit "$code"
