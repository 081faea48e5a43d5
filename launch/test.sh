#!/usr/bin/env bash
# Makes the environment, checks style and runs the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install test
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/python" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadgroup "$@"
