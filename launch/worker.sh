#!/usr/bin/env bash
# A supervised run in the background of one machine, which a dropped connection does not end.
# usage: bash launch/worker.sh start|status|stop|log FOLDER [--once] [-- sedd-train ...]
# --once: without the supervisor, which starts sedd-train again.
# FOLDER, on the machine's own disk, holds log, pid and, at the end, status.
set -uo pipefail
# shellcheck source=launch/functions.sh
source "$(dirname "${BASH_SOURCE[0]}")/functions.sh"
show_help "${BASH_SOURCE[0]}" "$@"
refuse() {
  echo "worker.sh: error: $*" >&2
  exit 2
}
known='start, status, stop, log'
action=${1-} folder=${2-}
case $action in start | status | stop | log) ;; *) refuse "unknown action '$action'; known: $known" ;; esac
[[ $folder ]] || refuse "no folder; write: bash launch/worker.sh $action FOLDER"
[[ $folder == /* ]] || folder=$PWD/$folder
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
runs() { [[ -f $folder/pid && ! -f $folder/status ]] && kill -0 "$(<"$folder/pid")" 2>/dev/null; }

case $action in
  start)
    shift 2
    once=''
    if [[ ${1-} == --once ]]; then once=1 && shift; fi
    [[ ${1-} == -- && $# -gt 1 ]] || refuse "'${1-}' is not -- and a command"
    if [[ $once ]]; then shift; else set -- bash launch/supervise.sh "$@"; fi
    cd "$root" || exit 1
    runs && refuse "a run is going on in $folder (process $(<"$folder/pid")); stop it first"
    mkdir -p "$folder" && rm -f "$folder/status" || exit 1
    # shellcheck disable=SC2016  # for the shell that is started
    setsid nohup bash -c 'folder=$1; shift
      trap "kill -TERM \$child" TERM
      source launch/functions.sh
      "$@" & child=$!
      await $child
      echo $status > "$folder/status"' worker "$(cd "$folder" && pwd)" "$@" \
      >>"$folder/log" 2>&1 </dev/null &
    echo $! >"$folder/pid"
    echo "started, process $!"
    ;;
  status)
    if runs; then
      echo "running, process $(<"$folder/pid"): $(tail -c 400 "$folder/log" | tr '\r' '\n' | tail -n 1)"
    elif [[ -f $folder/status ]]; then
      echo "ended $(<"$folder/status")"
    elif [[ -f $folder/pid ]]; then
      echo "ended lost" # killed, or the machine was started anew
    else
      echo "never started"
    fi
    ;;
  stop)
    runs || exec bash "$root/launch/worker.sh" status "$folder"
    kill -TERM "$(<"$folder/pid")"
    while runs; do sleep 0.2; done
    exec bash "$root/launch/worker.sh" status "$folder"
    ;;
  log) tail -n 100 "$folder/log" ;;
esac
