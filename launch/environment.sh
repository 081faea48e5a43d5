# shellcheck shell=bash
# Sourced by the scripts beside it: makes the virtual environment and installs the package for CPU.
# VENV names the environment's folder (default .venv), PYTHON the interpreter (default python3).
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV=${VENV:-.venv}
export JAX_PLATFORMS=cpu
# Huge pages for XLA's buffers: a fifth off a CPU training step, which otherwise takes its time to
# map fresh memory at every call. A C library that does not know the setting ignores it.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1

install() { # install EXTRA: this checkout, editable, with that extra
  if ! [ -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "${PYTHON:-python3} is older than Python 3.11; set PYTHON to a newer one" >&2
      exit 2
    }
    echo "making a virtual environment in $VENV and installing (about a minute)"
    "${PYTHON:-python3}" -m venv "$VENV"
  fi
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
}
