#!/usr/bin/env bash
# Is the package right and fast on this accelerator? The golden and kernel tests on it, then benchmarks/device.py, in
# under 8 minutes. For a bare machine without a network: Python 3.12, jax with CUDA and what stands on it, torch.
# usage: bash launch/device_check.sh fetch [--wheels=DIR] [--python=3.12] [--against=ORIGINAL]   where there is a network
#        bash launch/device_check.sh run [--wheels=DIR] [--out=DIR] [--against=ORIGINAL] [--before=CHECKOUT]
#                                        [--platform=gpu] [--seconds=470] [-- arguments of device.py]
#   fetch  fills the folder of wheels (default .device/wheels, ignored by git) with what such a machine lacks, and copies
#          the original's code to .device/original: carry .device to the machine beside the checkout
#   run    installs what is missing into .device/venv, offline, and the checkout; then the tests, then the benchmark, each
#          under its own limit, and a summary. All results are in --out (default $OUT, else .device/out): tests.txt,
#          device.txt, device.json (after every row), summary.txt. --against is .device/original if that is there.
# Status: 0 if all parts succeeded, 1 if one did not, 2 for a mistake in the arguments.
set -uo pipefail
# shellcheck source=launch/functions.sh
source "$(dirname "${BASH_SOURCE[0]}")/functions.sh"
show_help "${BASH_SOURCE[0]}" "$@"
began=$(date +%s)

# Pure Python or for CPython 3.12 on Linux x86_64: 14 MB. What a machine has already is not installed again.
wheels_needed=(ml-collections grain array_record tensorflow-datasets tensorboardX importlib_resources immutabledict dm-tree
  simple-parsing tensorflow-metadata toml docstring-parser googleapis-common-protos termcolor more-itertools sentencepiece
  omegaconf einops pytest pytest-xdist execnet iniconfig pluggy setuptools)
sources_needed=(antlr4-python3-runtime==4.9.3 promise) # published as sources alone, made into wheels by fetch
tests=(tests/test_golden.py tests/test_attention.py tests/test_vocab_reduce.py tests/test_matmul.py
  tests/test_transformer.py)

refuse() {
  echo "device_check.sh: error: $*" >&2
  exit 2
}
say() { echo "[$(($(date +%s) - began)) s] $*"; }
left() { echo $((began + seconds - $(date +%s))); }
least() { echo $(($1 < $2 ? $1 : $2)); }

action=${1-}
case $action in
  fetch | run) shift ;;
  *) refuse "unknown command '$action'; known: fetch, run" ;;
esac
absolute() { [[ $1 == /* ]] && echo "$1" || echo "$PWD/$1"; }
home=$(cd "$(dirname "$0")/.." && pwd)
folder=$home/.device
wheels=$folder/wheels python=3.12 out=$(absolute "${OUT:-$folder/out}") against='' before='' platform=gpu seconds=470
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --wheels=*) wheels=$(absolute "${1#*=}") ;;
    --python=*) python=${1#*=} ;;
    --out=*) out=$(absolute "${1#*=}") ;;
    --against=*) against=$(absolute "${1#*=}") ;;
    --before=*) before=$(absolute "${1#*=}") ;;
    --platform=*) platform=${1#*=} ;;
    --seconds=*) seconds=${1#*=} ;;
    *) refuse "unknown flag '$1'; see the head of launch/device_check.sh, and write device.py's arguments after --" ;;
  esac
  shift
done
if [[ ${1-} == -- ]]; then shift; fi
[[ $seconds =~ ^[1-9][0-9]*$ ]] || refuse "--seconds '$seconds' is not a whole number of seconds; write --seconds=470"
for path in "$against" "$before"; do
  [[ -z $path || -d $path ]] || refuse "there is no folder '$path'; write --against=ORIGINAL and --before=CHECKOUT"
done
cd "$home" || exit

if [[ $action == fetch ]]; then
  set -e
  mkdir -p "$folder" "$wheels"
  platforms=()
  for version in _2_28 _2_27 _2_24 _2_17 2014 1; do platforms+=(--platform "manylinux${version}_x86_64"); done
  python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$python" \
    "${platforms[@]}" --dest "$wheels" "${wheels_needed[@]}"
  python3 -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "${sources_needed[@]}"
  if [[ $against ]]; then
    rm -rf "$folder/original"
    cp -r "$against" "$folder/original"
    rm -rf "$folder/original/.git"
  fi
  say "$(du -sh "$wheels" | cut -f1) in $wheels; carry $folder to the machine"
  exit
fi

[[ -d $wheels ]] || refuse "there is no folder of wheels '$wheels'; run 'device_check.sh fetch' where there is a network"
[[ -z $against && -d $folder/original ]] && against=$folder/original
mkdir -p "$out"
venv=$folder/venv summary=$out/summary.txt failed=0
: >"$summary"
rm -f "$out"/{install,about,tests,device}.txt "$out/device.json" # of an earlier run

part() { # part NAME SECONDS COMMAND...: its output to out/NAME.txt and its verdict to the summary
  local name=$1 limit status=0 verdict
  limit=$(least "$2" "$(left)")
  shift 2
  if ((limit < 5)); then
    verdict='not run: no time left' status=1
  else
    say "$name, at most $limit s"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1 </dev/null || status=$?
    case $status in
      0) verdict='done' ;;
      124 | 137) verdict="stopped after $limit s" ;;
      *) verdict="failed with status $status" ;;
    esac
  fi
  echo "$name: $verdict (at $(($(date +%s) - began)) s)" >>"$summary"
  if ((status)); then
    failed=1
    tail -n 2 "$out/$name.txt" 2>/dev/null | cut -c1-150 | sed 's/^/    /' >>"$summary"
  fi
  return "$status"
}

# shellcheck disable=SC2329 # called in a shell of part
install() { # into a virtual environment that sees the machine's packages, by their paths: it may be one itself
  "$venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear --without-pip "$venv" || return
  local site missing pip
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
  python3 -c '
import os, sys, sysconfig
stdlib = sysconfig.get_path("stdlib")
print(*(p for p in sys.path if os.path.isdir(p) and p not in (stdlib, f"{stdlib}/lib-dynload")), sep="\n")
' >"$site/machine.pth"
  missing=$("$venv/bin/python" -c '
import importlib.metadata, pathlib, sys
installed = {(found.name or "").lower().replace("-", "_") for found in importlib.metadata.distributions()}
installed.discard("setuptools")  # which may be too old to build the checkout
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    if wheel.name.split("-")[0].lower() not in installed:
        print(wheel)
' "$wheels") || return
  pip=(python3 -m pip --python "$venv/bin/python" install --quiet --no-index --no-deps --no-cache-dir --ignore-installed)
  if [[ $missing ]]; then
    mapfile -t missing <<<"$missing"
    echo "installing: ${missing[*]##*/}"
    "${pip[@]}" "${missing[@]}" || return
  fi
  "${pip[@]}" --no-build-isolation --editable .
}

# shellcheck disable=SC2329
about() { # what the figures are of
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  git rev-parse HEAD
  python -c 'import jax; print("jax", jax.__version__, jax.devices())'
}

export -f install about
export venv wheels PYTHONUNBUFFERED=1
part install 60 bash -c install
PATH=$venv/bin:$PATH
part about 40 bash -c about
export SEDD_TEST_PLATFORM=$platform
processes=$(least 8 "$(nproc)")
# -v: a test that failed is named at once, whatever happens to the others.
part tests 130 python -m pytest -v -n "$processes" -p no:cacheprovider "${tests[@]}"
sides=(${against:+"--against=$against"} ${before:+"--before=$before"})
budget=$(($(left) - 15)) # the rest is for its last row and its tables
part device $((budget + 10)) python benchmarks/device.py --budget="$budget" --json="$out/device.json" \
  ${sides[@]+"${sides[@]}"} "$@"

{
  grep -E '^jax |^[0-9a-f]{40}$|MiB' "$out/about.txt"
  echo "tests: $(grep -c '\] PASSED' "$out/tests.txt") passed, $(grep -c '\] SKIPPED' "$out/tests.txt") skipped; failed:"
  grep -oE '(FAILED|ERROR) tests/[^ ]+' "$out/tests.txt" | sort -u | head -n 12
  grep -E '^\||; jax' "$out/device.txt" || grep -F 's left]' "$out/device.txt" | cut -c1-150
} >>"$summary" 2>&1
cat "$summary"
say "all of it: $out"
exit "$failed"
