#!/usr/bin/env bash
# From a fresh clone to a trained model, its bound, samples and a picture, on a CPU.
# usage: bash launch/quickstart.sh [RUN_FOLDER]     (default runs/quickstart)
set -euo pipefail
began=$(date +%s)
source "$(dirname "$0")/environment.sh"
run=${1:-runs/quickstart}
install plot
# The status makes Ctrl-C end here: stopped by a signal, after a checkpoint, is otherwise a success.
"$VENV/bin/sedd-train" --config=quickstart --workdir="$run" --requeue_status=130
"$VENV/bin/sedd-report" --workdir="$run" --began="$began" \
  --template "The [MASK:6] statement is used to [MASK:10]."
