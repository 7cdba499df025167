#!/usr/bin/env bash
# The tests that need a GPU: builds both backends, runs the CUDA ones, then again under
# compute-sanitizer where that is found: memcheck all, initcheck and racecheck the operators. Last
# line: `N passed, N failed`.
set -euo pipefail
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../deploy/lib.sh"
cd "$ROOT"

NVCC=$(find_nvcc) || die "nvcc: expected on the PATH or in /usr/local/cuda/bin, found neither"
RESULTS=$ROOT/build/test-results-cuda
rm -rf "$RESULTS"
mkdir -p "$RESULTS/gtest"

run_cuda_tests() {
  GTEST_OUTPUT="xml:$RESULTS/gtest/" ctest --test-dir build/release -L cuda --output-on-failure \
    --no-tests=error --output-junit "$RESULTS/ctest.xml"
}

cuda_test_names() {
  ctest --test-dir build/release -L cuda -N | sed -n 's/^ *Test *#[0-9]*: //p'
}

printf '%sgla-server CUDA tests%s\n' "$BOLD" "$PLAIN"
step "packages" install_packages "${BUILD_PACKAGES[@]}"
step "build release" build release
step "ctest -L cuda" run_cuda_tests || true

SANITIZER=$(command -v compute-sanitizer || echo "$(dirname "$NVCC")/compute-sanitizer")

# sanitize TOOL NAME PROGRAM ARGUMENT...: counts as one test.
sanitize() {
  local tool=$1 name=$2
  shift 2
  if step "$tool $name" "$SANITIZER" --tool "$tool" --error-exitcode 99 "$@"; then
    echo "passed $tool $name" >>"$RESULTS/sanitizer.txt"
  else
    echo "failed $tool $name" >>"$RESULTS/sanitizer.txt"
  fi
}

if [[ -x $SANITIZER ]]; then
  for name in $(cuda_test_names); do
    program=build/release/bin/$name  # a test that has no program of its own is another one's
    if [[ -x $program ]]; then sanitize memcheck "$name" "$program"; fi
  done
  sanitize memcheck gla-golden-cuda build/release/bin/gla-golden-cuda tests/golden
  for name in attention_backward_test_cuda attention_op_test_cuda; do
    sanitize initcheck "$name" "build/release/bin/$name"
  done
  sanitize racecheck attention_backward_test_cuda build/release/bin/attention_backward_test_cuda \
    '--gtest_filter=*NaN*:*SizesOfTensorCores*'
  # FiniteDifferences and CheckAttention launch what the others launch, or nothing.
  sanitize racecheck attention_op_test_cuda build/release/bin/attention_op_test_cuda \
    '--gtest_filter=Attention.*:*EveryCombination*'
else
  echo "  compute-sanitizer: not found, no sanitizer run"
fi
python3 tests/tally.py "$RESULTS"
