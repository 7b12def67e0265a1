#!/usr/bin/env bash
# On a machine with a GPU, most valuable first: builds for it, checks every backend, runs the GPU tests, measures beside rivals, tunes, looks
# for memory errors and races, profiles what is slowest. Writes bench/results/<device>-<date>.json (for bench.report) and, in a
# folder of that name, each stage's log and the rows as they come.
#
#   bench/device_check.sh [--device cuda|cpu] [--size smoke|default] [STAGE...]
#
# A stage has LIMIT seconds (480). One that is finished is not run again, and one that was cut off goes on where it can: run it again.
# Tests that have an outcome are not run again: remove tests.jsonl to have them run.
# Needs torch and, for the tests, pytest; no network. PYTHON: another Python. OUT: another folder. WHEELS: wheels of peers.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
LIMIT=${LIMIT:-480}
DEVICE=cuda
SIZE=default
STAGES=()
while [ $# -gt 0 ]; do
    case $1 in
        --device) DEVICE=$2; shift 2 ;;
        --size) SIZE=$2; shift 2 ;;
        -*) echo "device_check: unknown option $1" >&2; exit 2 ;;
        *) STAGES+=("$1"); shift ;;
    esac
done
[ ${#STAGES[@]} -gt 0 ] || STAGES=(build check tests rows tune sanitizers more_tests profiles)
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

name=$("$PYTHON" -c "
import sys, torch
from sst_fast.backends.tuned import identity
print('-'.join(''.join(c if c.isalnum() else ' ' for c in identity(torch.device('$DEVICE'))['device'].lower()).split()))" 2> /dev/null) ||
    name=$("$PYTHON" -c "import torch; print('-'.join(torch.cuda.get_device_name().lower().split()))") || {
    echo "device_check: PyTorch finds no device '$DEVICE'" >&2
    exit 1
}
# A folder that something was written into within twelve hours is gone on with: midnight does not begin everything anew.
base=$(find "$OUT" -mindepth 1 -maxdepth 1 -type d -name "$name-????-??-??" -mmin -720 2> /dev/null | sort | tail -n 1)
base=${base:-$OUT/$name-$(date +%F)}
mkdir -p "$base"
rows="$base/rows.jsonl"
seconds=2
n=1024 few=64 k=16384 d=512
[ "$SIZE" = smoke ] && seconds=0 n=20 few=2 k=300 d=64
failed=0

# --- the stages: one function each, run in a shell of its own ---------------------------------------------------------

build() {
    if [ "$DEVICE" = cpu ]; then # what is built already serves
        "$PYTHON" setup.py --name
        return
    fi
    if [ -n "${WHEELS:-}" ]; then "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl; fi
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c "import torch
major, minor = torch.cuda.get_device_capability(); print(f'{major}.{minor}' + 'a' * (major == 9))")} \
        SST_FAST_FORCE_CUDA=1 "$PYTHON" setup.py build_ext --inplace || return
    [ -e sst_fast/kernels ] || ln -s ../kernels sst_fast/kernels
    "$PYTHON" -c "import sst_fast; print(*sst_fast.backends('cuda').values(), sep='\n')"
}

check() { "$PYTHON" -m sst_fast.check --device "$DEVICE" --json "$base/check.json"; }

once() { # NAME COMMAND...: unless it has ended well before; once half of the time is over, nothing more is begun
    local mark="$base/$1.done"
    shift
    [ -e "$mark" ] && return
    if [ "$SECONDS" -gt $((LIMIT / 2)) ]; then
        echo "device_check: half of the time is over; run it again to go on"
        return
    fi
    "$@" && touch "$mark"
}

pytest_or_not() { # FILE ARGUMENTS...: outcomes go to FILE as they come; a machine without pytest has no tests
    local outcomes="$base/$1.jsonl" status before
    shift
    if ! "$PYTHON" -c "import pytest" 2> /dev/null; then
        echo "pytest is not installed: not run"
        return
    fi
    touch "$outcomes"
    while before=$(wc -l < "$outcomes"); do
        "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider -p bench.resume --outcomes "$outcomes" "$@"
        status=$?
        # 2: the GPU has refused its work; above 5: the process died. Another goes on, as long as that leads further.
        if { [ $status != 2 ] && [ $status -le 5 ]; } || [ "$(wc -l < "$outcomes")" = "$before" ]; then return $status; fi
    done
}

tests() { pytest_or_not tests -m "gpu and not slow" tests/test_gpu.py; }

more_tests() { pytest_or_not more_tests -m "gpu and slow" tests/test_gpu.py; }

rows() {
    "$PYTHON" -m bench.rows "$rows" --device "$DEVICE" --size "$SIZE" --seconds "$seconds" --within $((LIMIT * 3 / 5))
}

tune() {
    local on=(--k "$k" --d "$d" --device "$DEVICE")
    once tune-bfloat16 "$PYTHON" -m sst_fast.tune --n "$n" "${on[@]}" --dtype bfloat16 || return
    once tune-prototypes "$PYTHON" -m sst_fast.tune --n "$n" "${on[@]}" --dtype bfloat16 --prototypes || return
    once tune-float8 "$PYTHON" -m sst_fast.tune --n "$n" "${on[@]}" --dtype float8_e4m3fn || return
    once tune-few "$PYTHON" -m sst_fast.tune --n "$few" "${on[@]}" --dtype bfloat16
}

sanitizers() {
    if ! command -v compute-sanitizer > /dev/null; then
        echo "compute-sanitizer is not here: the same without it"
        "$PYTHON" -m sst_fast.check reference --device "$DEVICE" --budget 5
        return
    fi
    local bad=0 tool backend
    for tool in memcheck racecheck; do
        for backend in staged triton hopper cuda; do
            echo "$tool, $backend"
            once "$tool-$backend" timeout 75 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$PYTHON" -m sst_fast.check "$backend" --device "$DEVICE" --budget 30 || bad=1
        done
    done
    return $bad
}

profiles() {
    "$PYTHON" -m bench.rows "$rows" --slowest 3 --device "$DEVICE"
}

# --- running them ------------------------------------------------------------------------------------------------------

export -f build check once pytest_or_not tests more_tests rows tune sanitizers profiles
export PYTHON DEVICE SIZE LIMIT base rows seconds n few k d
for stage in "${STAGES[@]}"; do
    if ! declare -F "$stage" > /dev/null; then
        echo "device_check: there is no stage $stage" >&2
        exit 2
    fi
    if [ -e "$base/$stage.done" ]; then
        echo "== $stage: done before"
        continue
    fi
    begin=$SECONDS log="$base/$stage.log"
    touch "$log"
    before=$(wc -l < "$log")
    echo "== $stage"
    timeout --kill-after 10 "$LIMIT" bash -c "$stage" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    echo "== $stage: status $status after $((SECONDS - begin)) s" | tee -a "$base/summary.txt"
    if [ "$status" = 0 ] && [ "$(tail -n +$((before + 1)) "$log" | grep -c "run it again to go on")" = 0 ]; then
        touch "$base/$stage.done"
    elif [ "$status" != 0 ]; then
        failed=1
    fi
    if [ "$stage" = rows ] && [ -e "$rows" ]; then # also where the stage was cut off
        "$PYTHON" -m bench.rows "$rows" --merge "$base.json" && "$PYTHON" -m bench.report "$base.json" > "$base.md"
    fi
done
exit $failed
