#!/usr/bin/env bash
# Runs sedd-train until it is finished: a run that died is started again and goes on from its newest
# checkpoint, a mistake that a person must correct is not.
# usage: bash launch/supervise.sh [--dry-run] -- sedd-train --workdir=DIR ...
#
# exit status   0  finished
#            2, 3  a mistake, or training that cannot go on: never retried
#              75  stopped by a signal after a checkpoint: run again to go on
#           other  the last failure, after SUPERVISE_ATTEMPTS in a row without a new checkpoint
#
# SUPERVISE_ATTEMPTS (5)       failures in a row without a new checkpoint before it gives up
# SUPERVISE_BACKOFF (5)        seconds before the first restart; doubled at each further one
# SUPERVISE_BACKOFF_MAX (300)  seconds, the longest of these waits
# SUPERVISE_STOP (empty)       command that asks the child to stop, in place of a signal to it
set -uo pipefail

# shellcheck source=launch/functions.sh
source "$(dirname "${BASH_SOURCE[0]}")/functions.sh"
show_help "${BASH_SOURCE[0]}" "$@"
say() { printf '%(%Y-%m-%dT%H:%M:%S%z)T supervise: %s\n' -1 "$*" >&2; }
refuse() { # a mistake in the arguments or the environment
  say "error: $*"
  exit 2
}
whole() { # whole NAME VALUE LEAST
  [[ $2 =~ ^[1-9]?[0-9]{1,5}$ && $2 -ge $3 ]] ||
    refuse "$1 '$2' is not allowed; it must be a whole number >= $3 and < 1000000"
}

attempts=${SUPERVISE_ATTEMPTS:-5} backoff=${SUPERVISE_BACKOFF:-5} longest=${SUPERVISE_BACKOFF_MAX:-300}
whole SUPERVISE_ATTEMPTS "$attempts" 1
whole SUPERVISE_BACKOFF "$backoff" 0
whole SUPERVISE_BACKOFF_MAX "$longest" 0
dry=
if [[ ${1-} == --dry-run ]]; then
  dry=1
  shift
fi
[[ ${1-} == -- && $# -gt 1 ]] ||
  refuse "'${1-}' is not -- and a command; write: bash launch/supervise.sh -- sedd-train --workdir=DIR ..."
shift

workdir=$(workdir_of "$@") names_status=''
for argument; do
  [[ $argument == --requeue_status || $argument == --requeue_status=* ]] && names_status=1
done
[[ $workdir ]] || refuse "the command has no --workdir=DIR; its checkpoints tell whether a restart helped"
[[ $names_status ]] || set -- "$@" --requeue_status=75
command=$(printf '%q ' "$@")
if [[ $dry ]]; then
  printf '%s\n' "${command% }"
  exit 0
fi
command -v -- "$1" >/dev/null || refuse "no command '$1'; install the package here, or give its path"

newest() { # the newest checkpoint's step; -1 if there is none
  local folder step most=-1
  for folder in "$workdir"/checkpoints/*/; do
    step=$(basename "$folder")
    [[ $step =~ ^[0-9]{1,15}$ ]] && ((10#$step > most)) && most=$((10#$step))
  done
  printf '%s' "$most"
}
named() { if (($1 < 0)); then printf 'none'; else printf '%s' "$1"; fi; }

# The child has a process group of its own: Ctrl-C in a terminal reaches every process of the group
# in the foreground, and a second signal ends sedd-train at once, without a checkpoint.
set -m
child='' sleeper='' stop=''
asked() { # asked TERM|INT
  stop=$1
  say "caught SIG$1"
  forward
  [[ $sleeper ]] && kill "$sleeper" 2>/dev/null
}
forward() {
  [[ $child ]] || return 0
  if [[ ${SUPERVISE_STOP-} ]]; then
    bash -c "$SUPERVISE_STOP" || say "'$SUPERVISE_STOP' ended with status $?"
  else
    kill -s "$stop" "$child" 2>/dev/null
  fi
}
trap 'asked TERM' TERM
trap 'asked INT' INT

failures=0 wait_for=$backoff
while :; do
  [[ $stop ]] && exit 75
  began=$(newest) at=$SECONDS
  say "starting at checkpoint $(named "$began"): ${command% }"
  "$@" </dev/null &
  child=$!
  [[ $stop ]] && forward # caught before there was a child
  await "$child"
  child=''
  now=$(newest)
  ended="ended with status $status after $((SECONDS - at)) s at checkpoint $(named "$now")"
  case $status in
    0) say "$ended: finished" ;;
    75) say "$ended: stopped by a signal; run it again to go on" ;;
    2 | 3) say "$ended: not started again, this needs a person; see the error above" ;;
  esac
  case $status in 0 | 75 | 2 | 3) exit "$status" ;; esac
  if [[ $stop ]]; then
    say "$ended, after SIG$stop: not started again"
    exit "$status"
  fi
  if ((now > began)); then
    failures=0 wait_for=$backoff
  fi
  ((failures += 1))
  if ((failures >= attempts)); then
    say "$ended: gave up after $failures failures in a row without a new checkpoint in $workdir/checkpoints"
    exit "$status"
  fi
  ((wait_for > longest)) && wait_for=$longest
  say "$ended: failure $failures of $attempts; starting again in $wait_for s"
  sleep "$wait_for" &
  sleeper=$!
  [[ $stop ]] && kill "$sleeper" 2>/dev/null # caught before there was a sleep
  wait "$sleeper" 2>/dev/null
  sleeper=''
  ((wait_for *= 2))
done
