#!/usr/bin/env bash
# Makes the environment, checks style and runs the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install test
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
# Each process has a stretch of the files, so that what a file's tests share is made once, and
# takes tests from another's stretch when its own is done.
"$VENV/bin/python" -m pytest -n "${TEST_PROCESSES:-2}" --dist worksteal "$@"
