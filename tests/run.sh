#!/usr/bin/env bash
# The one command that builds and runs every test that needs no GPU. Last line: `N passed, N failed`.
#
#   tests/run.sh               packages, release build, every test
#   tests/run.sh --sanitizers  also the address and thread sanitizer builds, about as long again each
#   tests/run.sh --image       also builds and runs the container image (tests/image_test.sh)
#
# Runs on Debian 12 (and, untried, Ubuntu 24.04), as root or with sudo. tests/run_cuda.sh is for a GPU.
set -euo pipefail
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../deploy/lib.sh"
cd "$ROOT"

SANITIZERS='' IMAGE=''
for argument in "$@"; do
  case $argument in
    --sanitizers) SANITIZERS=yes ;;
    --image) IMAGE=yes ;;
    *) die "usage: tests/run.sh [--sanitizers] [--image], got \"$argument\"" ;;
  esac
done

RESULTS=$ROOT/build/test-results
VENV=$ROOT/build/venv
BEGAN=$EPOCHREALTIME
rm -rf "$RESULTS"
mkdir -p "$RESULTS"

# Made again only when tests/requirements.txt changes.
make_venv() {
  local want
  want=$(sha256sum tests/requirements.txt)
  [[ -f $VENV/made-from && $(<"$VENV/made-from") == "$want" ]] && return 0
  rm -rf "$VENV" && python3 -m venv "$VENV" &&
    "$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps \
      -r tests/requirements.txt &&
    echo "$want" >"$VENV/made-from"
}

# run_ctest RESULT FOLDER ARGUMENT...: every GoogleTest case ends up in RESULT/gtest.
run_ctest() {
  local result=$RESULTS/$1 folder=$2
  shift 2
  mkdir -p "$result/gtest"
  GTEST_OUTPUT="xml:$result/gtest/" ctest --test-dir "$folder" --output-on-failure --no-tests=error \
    --output-junit "$result/ctest.xml" "$@"
}

# script NAME COMMAND...: a step that counts as one test.
script() {
  if step "$@"; then
    echo "passed $1" >>"$RESULTS/scripts.txt"
  else
    echo "failed $1" >>"$RESULTS/scripts.txt"
  fi
}

# need NAME COMMAND...: a step without which there is nothing to test.
need() {
  step "$@" && return 0
  echo "0 passed, 1 failed"
  exit 1
}

check_format() {
  find kernels server client tests -regex '.*\.\(cc\|h\|cu\|cuh\)' \
    -exec "$VENV/bin/clang-format" --dry-run --Werror {} +
}

check_scripts() {
  find deploy tests -name '*.sh' -exec "$VENV/bin/shellcheck" -x .ci/run {} +
}

sanitizer_options() {
  # the deeply bound SentencePiece module frees with libc what libstdc++ allocated
  export ASAN_OPTIONS=detect_stack_use_after_return=1:alloc_dealloc_mismatch=0
  export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
  export TSAN_OPTIONS="ignore_noninstrumented_modules=1:halt_on_error=1:suppressions=$ROOT/tests/testing/tsan.supp"
}

# sanitize PRESET FOLDER...: the tests of tests/FOLDER, on the CPU backend.
sanitize() {
  local preset=$1 folder targets=()
  shift
  for folder in "$@"; do
    targets+=("tests/$folder/all")
  done
  step "build $preset" build "$preset" "${targets[@]}" || return 1
  for folder in "$@"; do
    step "$preset $folder" run_ctest "$preset/$folder" "build/$preset/tests/$folder" || true
  done
}

# sanitize_server PRESET TEST...: end-to-end tests on the server of that build, with the release client.
sanitize_server() {
  local preset=$1
  shift
  step "build $preset server" build "$preset" gla-server-cpu || return 1
  GLA_SERVER=$ROOT/build/$preset/bin/gla-server-cpu GLA_CHURN_STREAMS=3000 step "$preset server" \
    "$VENV/bin/python" -m pytest -q -p no:cacheprovider "$@" --junitxml="$RESULTS/$preset-e2e.xml" || true
}

printf '%sgla-server tests%s\n' "$BOLD" "$PLAIN"
need "packages" install_packages "${BUILD_PACKAGES[@]}"
need "python environment" make_venv
need "build release" build release

step "ctest" run_ctest ctest build/release -LE cuda || true
step "pytest" "$VENV/bin/python" -m pytest -q -p no:cacheprovider tests \
  --junitxml="$RESULTS/pytest.xml" || true
script "clang-format" check_format
script "shellcheck" check_scripts
if [[ -n $SANITIZERS ]]; then
  sanitizer_options
  e2e=(tests/e2e/{churn,session}_test.py)
  { sanitize asan kernels model engine service && sanitize_server asan "${e2e[@]}"; } ||
    echo "failed build asan" >>"$RESULTS/scripts.txt"
  { sanitize tsan engine service && sanitize_server tsan "${e2e[@]}"; } ||
    echo "failed build tsan" >>"$RESULTS/scripts.txt"
fi
if [[ -n $IMAGE ]]; then
  script "image" tests/image_test.sh
fi

printf '  total      %41s s\n' "$(seconds_since "$BEGAN")"
python3 tests/tally.py "$RESULTS"
