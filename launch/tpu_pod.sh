#!/usr/bin/env bash
# A run on a Cloud TPU slice, from your own machine with gcloud.
# usage: bash launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [flags] [--dry-run] [-- [train] ARGUMENTS]
#   create   ask for the slice: --type=v4-64, v5e-64, v5p-64 or v6e-64; [--spot] [--queued] [--runtime=VERSION]
#   install  copy the commit that is checked out here to every worker and install it there
#   run      start sedd-train on every worker, supervised, in the background; --workdir must be on a
#            mount that all workers share (Filestore or gcsfuse): gs:// is refused. After -- also
#            eval or sample and its arguments, which runs once; worker 0's log has what it prints
#   status, logs, stop (TERM, wait for the checkpoint), delete
#   watch    create, install and run; again when the slice is preempted; until the run has ended
# --project=PROJECT of gcloud; --mount=COMMAND runs on every worker at install, to mount the shared folder;
# --dry-run prints the commands. A slice made elsewhere is used by leaving out create.
set -uo pipefail
# shellcheck source=launch/functions.sh
source "$(dirname "${BASH_SOURCE[0]}")/functions.sh"
show_help "${BASH_SOURCE[0]}" "$@"

known='create, install, run, status, logs, stop, delete, watch'
refuse() {
  echo "tpu_pod.sh: error: $*" >&2
  exit 2
}
say() { echo "$(date -u +%FT%TZ) tpu_pod.sh: $*" >&2; }

action=${1-}
case $action in
  create | install | run | status | logs | stop | delete | watch) shift ;;
  *) refuse "unknown command '$action'; known: $known" ;;
esac
name='' zone='' type='' runtime='' project='' mount='' spot='' queued='' dry=''
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --mount=*) mount=${1#*=} ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --dry-run) dry=1 ;;
    *) refuse "unknown flag '$1'; see the head of launch/tpu_pod.sh, and write the command and its arguments after --" ;;
  esac
  shift
done
if [[ ${1-} == -- ]]; then shift; fi
command=train
if [[ ${1-} && $1 != -* ]]; then
  command=$1
  shift
fi
case $command in
  train | eval | sample) ;;
  *) refuse "unknown command '$command' after --; known for several processes: train, eval, sample" ;;
esac
arguments=("$@")
[[ $name ]] || refuse "--name is missing; write --name=my-slice"
[[ $zone ]] || refuse "--zone is missing; write --zone=us-central2-b"
[[ $type == v5e-* ]] && type=v5litepod-${type#v5e-} # as Cloud TPU calls it
case $action in create | watch)
  case $type in # the runtimes that Google documents for JAX
    v4-*) : "${runtime:=tpu-ubuntu2204-base}" ;;
    v5litepod-*) : "${runtime:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${runtime:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${runtime:=v2-alpha-tpuv6e}" ;;
    *) refuse "unknown --type '$type'; known: v4-N, v5e-N, v5p-N, v6e-N" ;;
  esac ;;
esac
case $action in run | watch)
  workdir=$(workdir_of ${arguments[@]+"${arguments[@]}"})
  [[ $workdir == /* || $command != train ]] || # of eval and sample it may be a hub id
    refuse "--workdir '$workdir' is not an absolute path; give a folder on a mount that all workers share" ;;
esac

place=("--zone=$zone")
[[ $project ]] && place+=("--project=$project")
do_() { # prints the command in a dry run, and runs it otherwise
  if [[ $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpu() { do_ gcloud compute tpus "$@"; }
on() { # on all|0 COMMAND
  tpu tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"
}
worker() { echo "[ ! -d ~/sedd_jax ] && echo 'not installed' || bash ~/sedd_jax/launch/worker.sh $1 ~/sedd_run"; }

create() {
  local flags=("$name" "${place[@]}" "--accelerator-type=$type")
  [[ $spot ]] && flags+=(--spot)
  if [[ $queued ]]; then
    tpu queued-resources create "${flags[@]}" "--node-id=$name" "--runtime-version=$runtime"
  else
    tpu tpu-vm create "${flags[@]}" "--version=$runtime"
  fi
}
delete() {
  if [[ $queued ]]; then
    tpu queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    tpu tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}
install() {
  local root archive commands
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  archive=${TMPDIR:-/tmp}/sedd_jax-$name.tar.gz
  do_ git -C "$root" archive --format=tar.gz "--output=$archive" HEAD || return
  tpu tpu-vm scp "$archive" "$name:sedd_jax.tar.gz" "${place[@]}" --worker=all || return
  # The runtimes hold Python 3.10; uv brings the 3.11 or newer that the package needs.
  commands='set -e; rm -rf ~/sedd_jax; mkdir ~/sedd_jax; tar -xzf ~/sedd_jax.tar.gz -C ~/sedd_jax; cd ~/sedd_jax'
  commands+='; python3 -m pip install --quiet --user uv; python3 -m uv venv --quiet --python 3.12 .venv'
  commands+="; python3 -m uv pip install --quiet --python .venv/bin/python '.[tpu]'"
  [[ $mount ]] && commands+="; $mount"
  on all "$commands"
}
run() {
  local quoted once=''
  quoted=$(printf ' %q' ".venv/bin/sedd-$command" "${arguments[@]}" --join_timeout=300)
  [[ $command == train ]] || once=' --once'
  # Every worker restarts its own process and must find the others: waits of at most 30 s and a
  # heartbeat of 100 s end within the 300 s in which the first to be back waits for the last. One that
  # is back before the others have noticed fails a few times more, hence 20 attempts.
  on all "cd ~/sedd_jax && . launch/flags/tpu.sh && SUPERVISE_ATTEMPTS=20 SUPERVISE_BACKOFF_MAX=30 bash launch/worker.sh start ~/sedd_run$once --$quoted"
}
state() { # READY, PREEMPTED, ..., ABSENT
  local found
  found=$(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" '--format=value(state)' 2>&1)
  case $? in
    0) echo "${found##*$'\n'}" ;;
    *) if [[ $found == *NOT_FOUND* || $found == *"not found"* ]]; then echo ABSENT; else echo "UNKNOWN: $found"; fi ;;
  esac
}
request_state() { # of the queued resource
  [[ $queued ]] || return 0
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)' 2>/dev/null
}
watch() {
  local pause=${TPU_POD_PAUSE:-60} now request ended
  if [[ $dry ]]; then
    create && tpu tpu-vm describe "$name" "${place[@]}" '--format=value(state)' && install && run &&
      on 0 "$(worker status)" && echo '# and when the slice was preempted:' && delete && create
    return
  fi
  while :; do
    now=$(state) request=$(request_state)
    case $now in
      READY)
        ended=$(on 0 "$(worker status)" 2>/dev/null | tail -n 1)
        case $ended in
          running*) ;;
          'ended 0') say "finished; the slice still exists: delete it" && return 0 ;;
          'ended 75' | 'ended lost')
            say "the run was stopped ($ended): starting it again"
            run
            ;;
          'ended '[0-9]*)
            say "the run $ended, which is not started again; see: bash launch/tpu_pod.sh logs"
            return "${ended#ended }"
            ;;
          'not installed' | 'never started') say "installing and starting" && install && run ;;
          *) say "no answer from worker 0; asking again" ;; # installing now could hit a run
        esac
        ;;
      PREEMPTED | TERMINATED | STOPPED)
        say "the slice is $now: making it anew"
        delete && create
        ;;
      ABSENT)
        case $request in
          SUSPENDED | FAILED) say "the request is $request: making it anew" && delete && create ;;
          '') say "there is no slice: asking for one" && create ;;
          *) say "waiting for the slice, the request is $request" ;;
        esac
        ;;
      *'attribute [project]'*) refuse "gcloud knows no project; give --project=PROJECT" ;;
      *) say "the slice is $now" ;; # CREATING, DELETING, or gcloud could not tell
    esac
    sleep "$pause"
  done
}

[[ $dry ]] || command -v gcloud >/dev/null || refuse "no command 'gcloud'; install the Google Cloud CLI"
case $action in
  status)
    tpu tpu-vm describe "$name" "${place[@]}" '--format=value(state)'
    on all "$(worker status)"
    ;;
  logs) on all "$(worker log)" ;;
  stop) on all "$(worker stop)" ;;
  *) "$action" ;;
esac
