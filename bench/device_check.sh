#!/usr/bin/env bash
# On a machine with a GPU: builds, runs the GPU tests, looks for memory errors and races, measures beside the peers, and writes
#   bench/results/<device>-<date>.json (the benchmarks) and .txt (what was run, and how it ended).
# Needs no network: torch, pytest, pytest-benchmark, hypothesis are expected; wheels of peers may lie in $WHEELS.
# SIZE=smoke|default|full and SECONDS_EACH choose how much is measured; PYTHON another Python.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SIZE=${SIZE:-default}
SECONDS_EACH=${SECONDS_EACH:-2}
OUT=${OUT:-bench/results}
mkdir -p "$OUT"

device=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-').lower())") || {
    echo "device_check: PyTorch finds no GPU" >&2
    exit 1
}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c "import torch
major, minor = torch.cuda.get_device_capability(); print(f'{major}.{minor}' + 'a' * (major == 9))")}
base="$OUT/$device-$(date +%F)"
log="$base.txt"
: > "$log"
failed=0

step() { # name, command...
    local name=$1 begin=$SECONDS
    shift
    echo "== $name: $*" | tee -a "$log"
    if "$@" > >(tee "$base.last" | tail -n 40) 2>&1; then
        echo "== $name: passed in $((SECONDS - begin)) s" | tee -a "$log"
    else
        echo "== $name: FAILED ($?) in $((SECONDS - begin)) s" | tee -a "$log"
        tail -n 60 "$base.last" >> "$log"
        failed=1
    fi
    rm -f "$base.last"
}

if [ -n "${WHEELS:-}" ]; then
    step "wheels of peers" "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
step "build" env SST_FAST_FORCE_CUDA=1 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
step "versions" "$PYTHON" -c "import sst_fast; from bench.conftest import about; import torch
print(about(torch.device('cuda'))); print(*sst_fast.backends('cuda').values(), sep='\n')"
"$PYTHON" -c "import torch; from bench.conftest import about; print(about(torch.device('cuda')))" >> "$log"
step "GPU tests" "$PYTHON" -m pytest -q -m gpu tests
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -m "gpu and not slow" -k "queue or small" tests
    done
else
    echo "== compute-sanitizer is not installed: not run" | tee -a "$log"
fi
step "benchmarks" "$PYTHON" -m pytest bench -q --device cuda --size "$SIZE" --seconds "$SECONDS_EACH" \
    --benchmark-json "$base.full"
if [ -f "$base.full" ]; then
    "$PYTHON" -m bench.report "$base.full" --keep "$base.json" && rm "$base.full" || failed=1
    "$PYTHON" -m bench.report "$base.json" > "$base.md" || failed=1
fi
exit $failed
