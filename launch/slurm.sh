#!/usr/bin/env bash
#SBATCH --job-name=sedd
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# Trains, scores or samples on GPU nodes under SLURM. From the repository's folder:
#   bash launch/slurm.sh [--dry-run] --nodes=2 --gpus-per-node=8 [more of sbatch's flags] -- \
#     [train] --config=... --workdir=SHARED_FOLDER ...
#   ... -- eval likelihood --workdir=SHARED_FOLDER ...   or: ... -- sample --workdir=... --out=FILE
# It submits itself; inside the job one srun starts a process per GPU, because jax's SLURM detection
# gives each process the one GPU of its SLURM_LOCALID. --gpus-per-node leaves all of a node's GPUs
# visible to each process, which that numbering and NCCL's peer-to-peer copies need.
#
# The job is requeued if it was stopped and is still SLURM's to run: after scancel JOB it is not.
# That is for train, which goes on from its checkpoint. eval and sample have none: they run once, to
# the end of the time, and are not requeued.
#
# VENV (.venv) names the virtual environment; SUPERVISE_* are those of supervise.sh.
set -uo pipefail

# B: in --signal: the batch shell alone gets the signal, 120 s before the end. It must not pass TERM to srun,
# which answers by SIGKILL to its tasks; scancel --signal signals the tasks and not this shell.

refuse() {
  echo "slurm.sh: error: $*" >&2
  exit 2
}

dry='' flags=() gpus='' nodes=''
cd "${SEDD_INSIDE:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit 2
# shellcheck source=launch/functions.sh
source launch/functions.sh
if [[ ! ${SEDD_INSIDE-} ]]; then
  show_help launch/slurm.sh "$@"
  while (($#)) && [[ $1 != -- ]]; do
    case $1 in
      --dry-run) dry=1 ;;
      --nodes=*) nodes=${1#*=} flags+=("$1") ;;
      --gpus-per-node=*) gpus=${1##*[=:]} flags+=("$1") ;;
      --*=* | --exclusive) flags+=("$1") ;;
      *) refuse "'$1' is not one of sbatch's --flag=value; write the command and its arguments after --" ;;
    esac
    shift
  done
  [[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse "--nodes '$nodes' is not a whole number >= 1; write --nodes=2"
  [[ $gpus =~ ^[1-9][0-9]*$ ]] ||
    refuse "--gpus-per-node '$gpus' does not end in a whole number >= 1; write --gpus-per-node=8 or a100:8"
  [[ ${1-} == -- ]] || refuse "no -- and the arguments of the command; write -- --config=... --workdir=..."
  shift
fi
arguments=("$@") command=train
if [[ ${1-} && $1 != -* ]]; then
  command=$1
  shift
fi
case $command in
  train)
    [[ $(workdir_of "$@") ]] ||
      refuse "no --workdir=DIR among the arguments of sedd-train; give a shared folder"
    ;;
  eval | sample) flags+=(--no-requeue) ;;
  *) refuse "unknown command '$command'; known for several processes: train, eval, sample" ;;
esac

if [[ ! ${SEDD_INSIDE-} ]]; then
  submit=(sbatch "${flags[@]}" "--ntasks-per-node=$gpus" "--export=ALL,SEDD_INSIDE=$PWD" launch/slurm.sh "${arguments[@]}")
  if [[ ! $dry ]]; then
    command -v sbatch >/dev/null || refuse "no command 'sbatch'; run this on a login node of SLURM"
    exec "${submit[@]}"
  fi
  printf '%q ' "${submit[@]}"
  echo
fi
# shellcheck source=launch/flags/gpu.sh
source launch/flags/gpu.sh
step=(srun --kill-on-bad-exit=1 "${VENV:-.venv}/bin/sedd-$command" "$@")
if [[ $command != train ]]; then
  if [[ $dry ]]; then
    printf '%q ' "${step[@]}"
    echo
    exit
  fi
  trap : TERM # 120 s before the end, when train writes its checkpoint
  "${step[@]}"
  exit
fi
if [[ $dry ]]; then
  SUPERVISE_STOP='' exec bash launch/supervise.sh --dry-run -- "${step[@]}"
fi

signalled=''
export SUPERVISE_STOP="scancel --signal=TERM $SLURM_JOB_ID"
trap 'signalled=1; kill -TERM "$supervisor" 2>/dev/null' TERM
bash launch/supervise.sh -- "${step[@]}" &
supervisor=$!
await "$supervisor"

# srun's status is the highest of its tasks', so the 75 of those that were stopped can be hidden
# behind the 137 of one that --kill-on-bad-exit ended while it was leaving.
case $status in 0 | 2 | 3) exit "$status" ;; esac
[[ $signalled || $status == 75 ]] || exit "$status"
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [[ $state != RUNNING ]]; then
  echo "slurm.sh: stopped at status $status; the job is ${state:-unknown to squeue}, so it is not requeued" >&2
  exit "$status"
fi
echo "slurm.sh: stopped at status $status; requeueing job $SLURM_JOB_ID" >&2
scontrol requeue "$SLURM_JOB_ID" ||
  echo "slurm.sh: scontrol requeue ended with status $?; submit the job again to go on" >&2
exit "$status"
