# shellcheck shell=bash
# Sourced by the scripts beside it.
# shellcheck disable=SC2034  # status is for the caller
await() { # await PID: sets status to the child's own, however often a trap interrupts `wait`
  local last
  wait "$1" 2>/dev/null
  status=$?
  while kill -0 "$1" 2>/dev/null; do
    wait "$1" 2>/dev/null
    status=$?
  done
  wait "$1" 2>/dev/null # a child that ended just as the trap ran
  last=$?
  ((last == 127)) || status=$last # 127: an earlier wait has answered already
}

show_help() { # show_help SCRIPT ARGUMENT...: its head, and the end, if the first argument asks for help
  case ${2-} in -h | --help) ;; *) return ;; esac
  sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$1"
  exit 0
}

workdir_of() { # workdir_of ARGUMENT...: the last value of --workdir=DIR or --workdir DIR
  local argument before='' workdir=''
  for argument; do
    [[ $before == --workdir ]] && workdir=$argument
    [[ $argument == --workdir=* ]] && workdir=${argument#*=}
    before=$argument
  done
  printf '%s' "$workdir"
}
