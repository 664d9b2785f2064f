#!/usr/bin/env bash
# What is measured where there is a GPU, in calls of less than eight minutes each.
#
#   benchmarks/gpu_session.sh wheels              here, once: what that machine's Python lacks
#   benchmarks/gpu_session.sh tests               tests that need a GPU
#   benchmarks/gpu_session.sh operators PART      every operator; PART is 1, 2 or 3
#   benchmarks/gpu_session.sh steps SETUP...      whole iterations of these setups, without compiled
#   benchmarks/gpu_session.sh compiled SETUP...   their torch.compile builds: minutes each
#   benchmarks/gpu_session.sh plan                the planner's predictions against a real peak
#   benchmarks/gpu_session.sh merge FILE...       here, at the end: one result file of all calls
#
# SETUP is stage1, stage2_6, stage2_12, stage2_generated, dvdgan_12 or dvdgan_50. Two of them fit
# into one call. What is written lies in $OUT (default: ./gpu-session). Carry .whl with every call.
# With DRY=1 commands are printed and not run. Never run on a GPU yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-gpu-session}
# There python3 has what is needed, here the environment does.
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
BUDGET=${BUDGET:-400}

run() {
  printf '+ %s\n' "$*"
  [[ -n ${DRY:-} ]] || "$@"
}

# Nothing can be fetched on the GPU's machine: packages travel as wheels for its Python.
wheels() {
  local exclude
  exclude=$(git rev-parse --git-path info/exclude)
  grep -qx '/.whl/' "$exclude" || run sh -c "echo /.whl/ >> '$exclude'"
  local pure=() binary=() name
  for name in deepspeed hjson; do pure+=("$(grep "^$name==" constraints.txt)"); done
  for name in av msgpack pydantic pydantic_core annotated-types typing-inspection; do
    binary+=("$(grep -i "^${name/_/[-_]}==" constraints.txt)")
  done
  DS_BUILD_OPS=0 run "$PYTHON" -m pip wheel -q --no-deps --no-build-isolation -w .whl "${pure[@]}"
  run "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d .whl "${binary[@]}"
}

prepare() {
  run mkdir -p "$OUT"
  if compgen -G '.whl/*.whl' > /dev/null; then
    run "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target /tmp/site .whl/*.whl
  fi
  export PYTHONPATH="/tmp/site:$PWD" PYTHONUNBUFFERED=1
  if command -v nvcc > /dev/null && [ ! -e kernels/_csrc.abi3.so ]; then
    run "$PYTHON" setup.py -q build_ext --inplace  # csrc/, for this machine's torch
  fi
}

# An interrupt, before the machine's own limit: what was found until then is written. No limit for a
# test alone: torch.compile takes minutes.
interrupted_after() {
  run timeout -s INT "$1" "$PYTHON" -m pytest -q -p no:cacheprovider -o timeout=0 "${@:2}"
}

benchmark() {
  interrupted_after 540 --benchmark --budget "$BUDGET" --results "$OUT" "$@"
}

pytests() {  # SECONDS REPORT ARGUMENTS...
  interrupted_after "$1" --junit-xml "$OUT/$2.xml" "${@:3}"
}

any_of() {  # "a b" → "a or b", for -k
  local joined
  printf -v joined '%s or ' "$@"
  printf '%s' "${joined% or }"
}

case ${1:-} in
  wheels) wheels ;;
  tests)
    prepare
    # Named, because collecting tests/video needs DALI, which is too large to carry.
    pytests 330 gpu-tests -m gpu tests/kernels tests/models \
      tests/trainer/test_acceleration.py tests/trainer/test_gpu_monitor.py tests/test_transfers.py ||
      failed=1  # the others are run all the same
    # What only hardware can get wrong: races, memory that nobody wrote, launches side by side.
    pytests 150 gpu-forms -k "bit_equal or nothing_unwritten or any_layout" tests/kernels
    exit "${failed:-0}"
    ;;
  operators)
    prepare
    case ${2:-} in
      1) benchmark benchmarks/bench_operators.py benchmarks/bench_spectral_norm.py \
           -k "frame_norm or conv_gru or spectral" ;;
      2) benchmark benchmarks/bench_operators.py -k "upsample_conv or separable" ;;
      3) benchmark benchmarks/bench_operators.py benchmarks/bench_step.py \
           -k "conv2d or conv_pool or step" ;;
      *) echo "error: operators takes 1, 2 or 3" >&2; exit 2 ;;
    esac
    ;;
  steps | compiled)
    [[ $# -gt 1 ]] || { echo "error: $1 takes setups; see benchmarks/setups.py" >&2; exit 2; }
    prepare
    builds="not compiled"
    # The budget starts no new case; one that compiles takes minutes.
    [[ $1 = steps ]] || { builds="compiled"; BUDGET=200; }
    benchmark benchmarks/bench_whole_step.py \
      -k "test_whole_step and not reduced and not counted and $builds and ($(any_of "${@:2}"))"
    ;;
  plan)
    prepare
    for stage in 1 2; do
      run sh -c "$PYTHON engine/plan.py --config configs/kinetics600.yaml --stage $stage \
        --gpus 1 --gpu-memory 80 --json > '$OUT/plan-stage$stage.json'"
    done
    pytests 300 plan-tests -m gpu tests/planning
    ;;
  merge)
    [[ $# -gt 1 ]] || { echo "error: merge takes result files" >&2; exit 2; }
    run "$PYTHON" benchmarks/merge.py "${@:2}"
    ;;
  *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
