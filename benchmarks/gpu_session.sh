#!/usr/bin/env bash
# What is measured where there is a GPU, in calls of less than eight minutes, the cheapest and most
# decisive first. In brackets about how long a call takes, by arithmetic: none has run on a GPU yet.
#
#   benchmarks/gpu_session.sh wheels              here, once: what that machine's Python lacks
#   benchmarks/gpu_session.sh versions            packages, GPU, NVDEC, implementations    [20 s]
#   benchmarks/gpu_session.sh limits              convolutions around 2^31 values          [90 s]
#   benchmarks/gpu_session.sh correctness         operators at every shape, GPU tests      [6 min]
#   benchmarks/gpu_session.sh steps [SETUP...]    networks, waits, iterations of 4 to 32   [5 min]
#   benchmarks/gpu_session.sh profile [SETUP...]  slowest kernels of an iteration of 32    [1 min]
#   benchmarks/gpu_session.sh plan                predicted memory beside a real peak      [3 min]
#   benchmarks/gpu_session.sh decoders            DALI's beside PyAV, clips per second     [5 min]
#   benchmarks/gpu_session.sh large               tests of more than 2^31 values           [3 min]
#   benchmarks/gpu_session.sh operators PART      every operator; PART is 1, 2 or 3        [7 min]
#   benchmarks/gpu_session.sh iterations SETUP... every build but compiled ones            [7 min]
#   benchmarks/gpu_session.sh compiled SETUP...   torch.compile builds: minutes each       [8 min]
#   benchmarks/gpu_session.sh merge FILE...       here, at the end: one result file of all calls
#
# SETUP is stage1, stage2_6, stage2_12, stage2_generated, dvdgan_12 or dvdgan_50; iterations takes
# two of them at a time. A call leaves its JSON in $OUT (default: ./gpu-session), also where a part
# of it or the whole process fails, and goes on where it was if it is called again. Carry .whl with
# every call. With DRY=1 commands are printed and not run, with SMALL=1 the calls up to plan take
# networks of a few channels, to see that they run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-gpu-session}
# There python3 has what is needed, here the environment does.
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
BUDGET=${BUDGET:-400}
START_AGAIN=75  # benchmarks/first_hour/parts.py's

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
  export PYTHONPATH="/tmp/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # before torch is imported
  if command -v nvcc > /dev/null && [ ! -e kernels/_csrc.abi3.so ]; then
    # Without it operators run other forms, which versions.json names.
    run "$PYTHON" setup.py -q build_ext --inplace || echo "csrc/ is not built" >&2
  fi
}

# Run for at most so many seconds, by an interrupt, so that what was found until then is written.
# Where the GPU's context is lost, or the process dies, again: it goes on behind what it died of.
within() {  # SECONDS COMMAND...
  local status end=$((SECONDS + $1)) tries
  shift
  for tries in 1 2 3 4 5 6 7 8; do
    status=0
    run timeout -k 15 -s INT $((end - SECONDS)) "$@" || status=$?
    ((status == START_AGAIN || status > 128)) && ((end - SECONDS > 20)) || break
    echo "exit code $status after try $tries: once more, without what it ended in" >&2
  done
  return "$status"
}

first_hour() {  # SECONDS CALL SETUP...
  within "$1" "$PYTHON" -m benchmarks.first_hour "${@:2}" --out "$OUT" --budget $(($1 - 40)) \
    ${SMALL:+--small}
}

# No limit for a test alone: torch.compile takes minutes. And a failed one shows no arguments, which
# may be tensors of gigabytes.
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider -o timeout=0 --tb=short)

pytests() {  # SECONDS CALL ARGUMENTS...
  within "$1" "${PYTEST[@]}" -p benchmarks.first_hour.outcomes --outcomes "$OUT/$2.json" "${@:3}"
}

benchmark() {  # SECONDS ARGUMENTS...; writes after every case
  run timeout -k 15 -s INT "$1" "${PYTEST[@]}" --benchmark --results "$OUT" "${@:2}"
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
wrong() { echo "error: $1" >&2; exit 2; }

# What follows a part that fails is run all the same; the last exit code that is not 0 is ours.
failed=0
and_then() { "$@" || failed=$?; }

case ${1:-} in
  wheels) wheels; exit ;;
  merge) [[ $# -gt 1 ]] || wrong "merge takes result files" ;;
  operators) [[ ${2:-} = [123] ]] || wrong "operators takes 1, 2 or 3" ;;
  iterations | compiled) [[ $# -gt 1 ]] || wrong "$1 takes setups; see benchmarks/setups.py" ;;
  versions | limits | correctness | steps | profile | plan | decoders | large) ;;
  *) usage ;;
esac
[[ $1 = merge ]] || prepare

case $1 in
  merge) run "$PYTHON" benchmarks/merge.py "${@:2}" ;;
  versions) and_then first_hour 90 versions ;;
  limits) and_then first_hour 240 limits ;;
  correctness)
    and_then first_hour 160 correctness
    # Named, because collecting tests/video needs DALI.
    and_then pytests 200 correctness-tests -m gpu -k "not 2_to_the_31" tests/kernels tests/models \
      tests/trainer/test_acceleration.py tests/trainer/test_gpu_monitor.py tests/test_transfers.py
    # What only hardware can get wrong: races, memory that nobody wrote, launches side by side.
    and_then pytests 110 correctness-forms -k "bit_equal or nothing_unwritten or any_layout" \
      tests/kernels
    ;;
  steps) and_then first_hour 470 "$@" ;;
  profile) and_then first_hour 240 "$@" ;;
  plan)
    and_then first_hour 300 memory
    and_then pytests 160 plan-tests -m gpu tests/planning
    ;;
  decoders)
    and_then pytests 120 decoders-tests -m gpu tests/video/test_video_loader.py \
      tests/video/test_what_is_read.py
    and_then benchmark 340 --budget 280 benchmarks/bench_loader.py
    ;;
  large) and_then pytests 450 large-tests -m gpu -k 2_to_the_31 tests/kernels ;;
  operators)
    parts=("frame_norm or conv_gru or spectral" "upsample_conv or separable" "conv2d or conv_pool or step")
    benchmark 470 --budget "$BUDGET" benchmarks/bench_operators.py \
      benchmarks/bench_spectral_norm.py benchmarks/bench_step.py -k "${parts[$2 - 1]}"
    ;;
  iterations | compiled)
    builds="not compiled"
    # The budget starts no new case; one that compiles takes minutes.
    [[ $1 = iterations ]] || { builds="compiled"; BUDGET=200; }
    printf -v setups '%s or ' "${@:2}"
    benchmark 470 --budget "$BUDGET" benchmarks/bench_whole_step.py \
      -k "test_whole_step and not reduced and not counted and $builds and (${setups% or })"
    ;;
esac
exit "$failed"
