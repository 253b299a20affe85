#!/usr/bin/env bash
# Runs the program on a TPU slice of Google Cloud until it is done, whatever becomes of the slice. See --help.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- [PROGRAM] FLAGS...]

  run      everything: create or reuse the slice, install this checkout on every worker, start the program on all of them,
           show what worker 0 prints, and after a preemption do it again, until the program says it is done. Ctrl-C ends
           only this script; `run` with the same arguments takes up a program that is still running
  create   only create the slice, and wait until it is there
  logs     show what worker 0 prints
  status   the state of the slice and of the program on every worker
  stop     have the program save and end; a `run` elsewhere ends too
  delete   delete the slice (the bucket keeps the run)

  --type=TYPE       type of the slice: v5litepod-256, v5p-64, v6e-16, ... (create, run)
  --version=NAME    runtime version of its machines (default: the one for TYPE)
  --spot            cheaper, may be preempted at any time
  --slices=N        N slices joined by the data centre network (default 1)
  --project=ID      default: gcloud's
  --retries=N       failures in a row after which `run` gives up (3)
  --create=FLAG     one more flag of `gcloud compute tpus queued-resources create`; may be repeated
  --ssh=FLAG        one more flag of gcloud's ssh and scp, such as --ssh=--tunnel-through-iap; may be repeated
  --dry-run         print the commands for a slice that does not exist yet, instead of running them

PROGRAM is tokenize, sample or evaluate; without it the program is the training, fvq_jax.main.
In FLAGS, gs://BUCKET/PATH is a mounted bucket: every worker mounts it and the program gets the mounted folder.

Environment: POLL, seconds between two looks at a slice (30); GRACE, seconds that the other workers have to end after the
first one has ended (300). Exit code: that of the program: 0 done, 2 bad input (never tried again), 75 stopped and saved,
anything else after N retries; 1 also where Google Cloud does not answer.

  launch/tpu_pod.sh run --name=fvq --zone=us-west4-a --type=v5litepod-256 --spot -- \
      --config=configs/fvq262k.py:batch=4096 --config.mesh.codebook=4 --workdir=gs://BUCKET/runs/fvq262k
END
}

fail() {
  echo "launch/tpu_pod.sh: $2" >&2
  exit "$1"
}
say() { echo "tpu_pod: $*" >&2; }

case ${1:---help} in
  --help | -h) usage && exit ;;
  run | create | logs | status | stop | delete) subcommand=$1 && shift ;;
  *) fail 2 "unknown command $1 (see --help)" ;;
esac
name='' zone='' type='' version='' slices=1 retries=3 dry_run=''
tier=() project=() more_create=() more_ssh=()
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --project=*) project=("$1") ;;
    --spot) tier=(--spot) ;;
    --create=*) more_create+=("${1#*=}") ;;
    --ssh=*) more_ssh+=("${1#*=}") ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) fail 2 "unknown option $1 (see --help; flags of the program come after --)" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail 2 '--name is needed: lower-case letters, digits and dashes'
[[ $zone ]] || fail 2 '--zone is needed'
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail 2 "--slices must be a whole number above 0, not $slices"
[[ $retries =~ ^[0-9]+$ ]] || fail 2 "--retries must be a whole number, not $retries"
if [[ $subcommand == run || $subcommand == create ]]; then
  [[ $type ]] || fail 2 '--type is needed'
  case $version:$type in
    :v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    :v5p-*) version=v2-alpha-tpuv5 ;;
    :v6e-*) version=v2-alpha-tpuv6e ;;
    :v[234]-*) version=tpu-ubuntu2204-base ;;
    :*) fail 2 "--version is needed: the runtime of $type is not known here" ;;
  esac
fi
if [[ $subcommand == run && ! ${1:-} =~ ^(tokenize|sample|evaluate)$ ]] &&
  [[ " $*" != *' --config='* || " $*" != *' --workdir='* ]]; then
  fail 2 'after -- the program needs --config=FILE and --workdir=DIR'
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

where=("--zone=$zone" "${project[@]}")
queued=(gcloud compute tpus queued-resources)
poll=${POLL:-30} grace=${GRACE:-300}
state='' failures=0

run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# ask ANSWER FUNCTION...: sets `reply` to what the function prints; in a dry run to ANSWER.
ask() {
  reply=$1
  shift
  if [[ $dry_run ]]; then "$@"; else reply=$("$@"); fi
}

# on WHICH ARGUMENTS...: launch/tpu_worker.sh on worker 0 of slice 0, or on all workers of all slices.
on() {
  local which=$1 line
  shift
  printf -v line '%q ' fvq_jax/launch/tpu_worker.sh "$@"
  # A machine that is gone does not close its connections, and gcloud tries ten times to make one.
  run "${queued[@]}" ssh "$name" "${where[@]}" "--node=$which" "--worker=$which" \
    --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oConnectTimeout=15 "${more_ssh[@]}" "--command=${line% }"
}

# Sets `reply`: ABSENT, or the state of the slice. A slice with a machine that is gone counts as SUSPENDED.
look() {
  ask "${assumed:-ABSENT}" run "${queued[@]}" list "${where[@]}" "--filter=name~/$name\$" \
    '--format=value(state.state)' || return
  reply=${reply:-ABSENT}
  [[ $reply == ACTIVE ]] || return 0
  ask READY run gcloud compute tpus tpu-vm list "${where[@]}" "--filter=queuedResource~/$name\$" \
    '--format=value(state)' || return
  case $reply in
    *PREEMPTED* | *TERMINATED* | *STOPPED*) reply=SUSPENDED ;;
    *) reply=ACTIVE ;;
  esac
}

# Sets `state`. Google Cloud may not answer for a while; if it has never answered, something is wrong with the command.
look_patiently() {
  local tries=0
  until look; do
    [[ $state ]] || fail 1 'gcloud ended with an error, see the lines above'
    ((++tries < 20)) || fail 1 "gcloud does not say what became of $name; a program on it runs on: try again later"
    sleep "$poll"
  done
  state=$reply
}

count_failure() {
  ((++failures <= retries)) || fail "$1" "$2; gave up after $failures failures in a row"
  say "$2; trying again ($failures of $retries)"
  sleep "$poll"
}

create() {
  local nodes=("--node-id=$name")
  ((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$name")
  say "creating $name: $slices x $type"
  run "${queued[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--runtime-version=$version" "${nodes[@]}" \
    "${tier[@]}" "${more_create[@]}"
}

delete() { run "${queued[@]}" delete "$name" "${where[@]}" --force --quiet; }

# Returns when the slice is ACTIVE, see `look`.
ensure_slice() {
  while look_patiently && [[ $state != ACTIVE ]]; do
    case $state in
      ABSENT)
        create || count_failure 1 "$name could not be created"
        assumed=ACTIVE
        ;;
      SUSPENDED) delete || count_failure 1 "$name could not be deleted" ;;
      FAILED)
        count_failure 1 "the request for $name failed: $("${queued[@]}" describe "$name" "${where[@]}" 2>&1 | tr '\n' ' ')"
        delete || true
        ;;
      *) say "$name is $state" && sleep "$poll" ;;
    esac
  done
}

install() {
  local archive=${TMPDIR:-/tmp}/fvq_jax-$name.tar.gz files=(fvq_jax configs launch requirements.txt)
  run tar -czf "$archive" --exclude=__pycache__ "${files[@]}" &&
    run "${queued[@]}" scp "$archive" "$name:fvq_jax.tar.gz" "${where[@]}" --node=all --worker=all "${more_ssh[@]}" &&
    run "${queued[@]}" ssh "$name" "${where[@]}" --node=all --worker=all "${more_ssh[@]}" \
      '--command=mkdir -p fvq_jax && tar -xzf fvq_jax.tar.gz -C fvq_jax && fvq_jax/launch/tpu_worker.sh install'
}

# Sets `states`: the state of the program on the workers that answer, one line for each different answer.
collect() {
  ask 'fvq_jax-status worker ended 0' on all status || [[ $reply == *fvq_jax-status* ]] || return
  states=$(grep -o 'fvq_jax-status .*' <<<"$reply" | cut -d ' ' -f 3- | sort -u)
}

# Shows the log until the program has ended on all workers; sets `outcome`: its exit code, stopped or lost.
follow() {
  local silent=0 waited=0
  while :; do
    on 0 log || true
    look_patiently
    if [[ $state != ACTIVE ]]; then
      outcome=lost
      return
    fi
    if ! collect; then
      ((++silent < 20)) || fail 1 "$name is up and its workers do not answer; a program on them runs on"
    elif [[ $states != *running* ]]; then
      break
    elif [[ $states != running ]] && ((waited >= grace)); then
      say 'a worker has ended and others have not: ending them'
      on all kill || true
    elif [[ $states != running ]]; then
      ((waited += ${poll%.*} + 1))
    fi
    sleep "$poll"
  done
  case $'\n'$states$'\n' in
    *$'\n'stopped*) outcome=stopped ;;
    *$'\n'none$'\n'*) outcome=lost ;; # a machine that was made anew
    *' 2'$'\n'*) outcome=2 ;;
    *' 75'$'\n'*) outcome=75 ;;
    $'\n''ended 0'$'\n') outcome=0 ;;
    *) outcome=$(awk '$2 {print $2; exit}' <<<"$states") ;;
  esac
}

# The program runs already: nothing is installed, and its flags must be those that were given.
take_up() {
  local code=0
  on 0 start "$@" || code=$?
  ((code != 2)) || fail 2 "another run is in progress on $name: stop it first, or give its flags"
}

run_until_done() {
  local installed=''
  while :; do
    ensure_slice
    if [[ ! $dry_run ]] && collect && [[ $states == *running* ]]; then
      take_up "$@"
    elif ! { { [[ $installed ]] || install; } && installed=1 && on all start "$@"; }; then
      installed=''
      count_failure 1 'the program could not be started on all workers'
      continue
    fi
    say 'the program runs on all workers; Ctrl-C leaves it running'
    follow
    case $outcome in
      0) say 'done' && return ;;
      2) fail 2 'bad input, see the last lines above: not trying again' ;;
      stopped) say 'stopped and saved; run goes on with it' && exit 75 ;;
      75) failures=0 && say 'interrupted and saved: starting again' ;;
      lost) failures=0 installed='' && say "$name was preempted: starting again" ;;
      *) count_failure "$outcome" "the program ended with $outcome" ;;
    esac
  done
}

case $subcommand in
  run) run_until_done "$@" ;;
  create) ensure_slice ;;
  logs) on 0 log ;;
  status)
    assumed=ACTIVE
    look_patiently
    echo "$name $state"
    [[ $state != ACTIVE ]] || on all status
    ;;
  stop) on all stop ;;
  delete)
    assumed=ACTIVE
    look_patiently
    if [[ $state == ABSENT ]]; then say "there is no $name"; else delete; fi
    ;;
esac
