#!/usr/bin/env bash
# The tests that need a GPU: builds both backends, runs the CUDA ones, then again under
# compute-sanitizer memcheck where that tool is found. Last line: `N passed, N failed`.
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

MEMCHECK=$(command -v compute-sanitizer || echo "$(dirname "$NVCC")/compute-sanitizer")
if [[ -x $MEMCHECK ]]; then
  for name in $(cuda_test_names); do
    if step "memcheck $name" "$MEMCHECK" --tool memcheck --error-exitcode 99 "build/release/bin/$name"
    then
      echo "passed memcheck $name" >>"$RESULTS/memcheck.txt"
    else
      echo "failed memcheck $name" >>"$RESULTS/memcheck.txt"
    fi
  done
else
  echo "  compute-sanitizer: not found, memcheck not run"
fi
python3 tests/tally.py "$RESULTS"
