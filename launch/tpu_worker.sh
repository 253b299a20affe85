#!/usr/bin/env bash
# What launch/tpu_pod.sh has every worker of a TPU slice do. It can be called by hand on a worker too. See --help.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_worker.sh [--dry-run] install | start FLAGS... | status | log | stop | kill

  install   a virtual environment with the requirements and jax[tpu], unless it is there already
  start     `python -m fvq_jax.main --distributed FLAGS...`, independent of this session; nothing if it runs already. If
            the first of FLAGS is tokenize, sample or evaluate, that program is started and not fvq_jax.main.
            In FLAGS gs://BUCKET/PATH becomes ~/gcs/BUCKET/PATH, where the bucket is mounted with gcsfuse
  status    one line: fvq_jax-status HOST none | running | ended CODE | stopped CODE
  log       what the program prints, until it ends
  stop      SIGTERM, then waits until the run is saved
  kill      SIGKILL, for a program that does not end
  --dry-run print the commands instead of running them

State and log are in ~/.fvq_jax. Environment: GRACE, the seconds that stop waits (300).
END
}

dry_run=''
if [[ ${1:-} == --dry-run ]]; then dry_run=1 && shift; fi
subcommand=${1:---help}
shift || true
case $subcommand in
  --help | -h) usage && exit ;;
  install | start | status | log | stop | kill | supervise) ;;
  *) echo "launch/tpu_worker.sh: unknown command $subcommand (see --help)" >&2 && exit 2 ;;
esac

state=$HOME/.fvq_jax
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $dry_run ]] || mkdir -p "$state"

run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Whether the program runs. After a restart of the machine the process id could belong to another program.
running() {
  [[ -s $state/pid ]] && tr '\0' ' ' 2>/dev/null <"/proc/$(<"$state/pid")/cmdline" | grep -q 'fvq_jax\.'
}

# Sets `program` to the program with its flags; a command of the program, such as extract, comes before the flags.
choose() {
  case ${1:-} in
    tokenize | sample | evaluate) program=("fvq_jax.$1" "${@:2}" --distributed) ;;
    *) program=(fvq_jax.main --distributed "$@") ;;
  esac
}

install() {
  local wanted
  wanted=$(sha256sum requirements.txt)
  if [[ -x .venv/bin/python && -f .venv/installed && $(<.venv/installed) == "$wanted" ]]; then return; fi
  export PATH=$HOME/.local/bin:$PATH
  # The system's Python may be older than this package wants; uv brings one.
  command -v uv >/dev/null || run bash -o pipefail -c 'curl -LsSf https://astral.sh/uv/install.sh | sh'
  run uv venv --quiet --clear --python 3.12 .venv
  run uv pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]'
  if [[ ! $dry_run ]]; then echo "$wanted" >.venv/installed; fi
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc source
  source="deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main"
  run sudo curl -sSf -o "$key" https://packages.cloud.google.com/apt/doc/apt-key.gpg
  run sudo bash -c "echo '$source' >/etc/apt/sources.list.d/gcsfuse.list"
  run sudo apt-get update -qq
  # On a new machine another installation may hold the lock.
  run sudo apt-get install -qq -y -o DPkg::Lock::Timeout=300 gcsfuse
}

# No caches of metadata: the hosts of a run wait for each other's files. No streaming writes: what is synced is kept.
mount_bucket() {
  local folder=$HOME/gcs/$1
  if mountpoint -q "$folder"; then return; fi
  command -v gcsfuse >/dev/null || install_gcsfuse
  run mkdir -p "$folder"
  run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --enable-streaming-writes=false "$1" "$folder"
}

start() {
  local arguments=() argument flag bucket path
  for argument; do
    if [[ $argument =~ ^(--[A-Za-z0-9_.-]+=)?gs://([a-z0-9][a-z0-9._-]*)(/.*)?$ ]]; then
      flag=${BASH_REMATCH[1]} bucket=${BASH_REMATCH[2]} path=${BASH_REMATCH[3]}
      mount_bucket "$bucket"
      argument=$flag$HOME/gcs/$bucket$path
    fi
    arguments+=("$argument")
  done
  if [[ $dry_run ]]; then
    choose "${arguments[@]}"
    run .venv/bin/python -m "${program[@]}"
    return
  fi
  if running; then
    [[ $(<"$state/arguments") == "${arguments[*]}" ]] && return
    echo "$HOSTNAME: a run with other flags is in progress (stop it first): $(<"$state/arguments")" >&2
    return 2
  fi
  rm -f "$state"/{pid,code,stopped}
  [[ ! -f $state/log ]] || mv "$state/log" "$state/log.before"
  echo "${arguments[*]}" >"$state/arguments"
  setsid --fork "$BASH" launch/tpu_worker.sh supervise "${arguments[@]}" >"$state/log" 2>&1 </dev/null
  until [[ -s $state/pid ]]; do sleep 0.1; done
}

# Runs detached from any session: starts the program and notes how it ended.
supervise() {
  trap : TERM INT # a machine that shuts down signals every process; the program's exit code still has to be noted
  choose "$@"
  .venv/bin/python -m "${program[@]}" &
  echo $! >"$state/pid"
  local code=0
  while wait $! || code=$?; ((code > 128)) && kill -0 $! 2>/dev/null; do code=0; done
  echo "$code" >"$state/code.new"
  mv "$state/code.new" "$state/code"
}

status() {
  local what=none
  if running; then
    what=running
  elif [[ -s $state/pid ]]; then
    # The exit code is noted right after the program ends, but never if the machine itself went down.
    for ((tenths = 20; tenths > 0; tenths--)); do
      [[ ! -s $state/code ]] || break
      sleep 0.1
    done
    what="ended $(cat "$state/code" 2>/dev/null || echo 137)"
    [[ ! -f $state/stopped ]] || what=${what/ended/stopped}
  fi
  echo "fvq_jax-status $HOSTNAME $what"
}

end() {
  if [[ $dry_run ]]; then
    echo "kill -$1 \$(cat $state/pid)"
    return
  fi
  if ! running; then return; fi
  if [[ $1 == TERM ]]; then touch "$state/stopped"; fi
  kill "-$1" "$(<"$state/pid")"
  for ((tenths = 10 * ${GRACE:-300}; tenths > 0; tenths--)); do
    running || break
    sleep 0.1
  done
}

case $subcommand in
  install) install ;;
  start) start "$@" ;;
  supervise) supervise "$@" ;;
  status) status ;;
  log) [[ ! -s $state/pid ]] || run tail -n 1000 -F "--pid=$(<"$state/pid")" "$state/log" 2>/dev/null ;;
  stop) end TERM && status ;;
  kill) end KILL && status ;;
esac
