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
