#!/usr/bin/env bash
# Steps that the quickstart, the tests and the Dockerfile share: packages, build, one line per step.
#
# Source it from bash with `set -euo pipefail`; it runs nothing by itself. Debian 12 and Ubuntu 24.04
# have the same package names for everything here.
# shellcheck disable=SC2034  # what is set here is used by those who source it

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LOGS=$ROOT/build/logs

BUILD_PACKAGES=(
  ca-certificates ccache cmake curl g++ ninja-build pkg-config python3 python3-venv
  libabsl-dev libcpp-httplib-dev libgmock-dev libgrpc++-dev libgtest-dev libhwy-dev libicu-dev
  libpcre2-dev libprotobuf-dev libre2-dev libsentencepiece-dev nlohmann-json3-dev
  prometheus-cpp-dev protobuf-compiler protobuf-compiler-grpc
)

if [[ -t 1 ]]; then
  BOLD=$'\e[1m' RED=$'\e[31m' GREEN=$'\e[32m' PLAIN=$'\e[0m'
else
  BOLD='' RED='' GREEN='' PLAIN=''
fi

die() {
  printf '%s%s%s\n' "$RED" "$*" "$PLAIN" >&2
  exit 1
}

# seconds_since T: T is an earlier $EPOCHREALTIME.
seconds_since() {
  local us=$((${EPOCHREALTIME/[.,]/} - ${1/[.,]/}))
  printf '%d.%d' $((us / 1000000)) $((us % 1000000 / 100000))
}

# step NAME COMMAND...: runs it with its output in build/logs; prints one line with its seconds, and
# the end of the log when it fails.
step() {
  local name=$1 began=$EPOCHREALTIME log code=0
  shift
  mkdir -p "$LOGS"
  log=$LOGS/${name//[^A-Za-z0-9_.-]/-}.log
  "$@" >"$log" 2>&1 || code=$?
  if ((code == 0)); then
    printf '  %sok%s      %-34s %7s s\n' "$GREEN" "$PLAIN" "$name" "$(seconds_since "$began")"
    return 0
  fi
  printf '  %sfailed%s  %-34s %7s s   exit %d, log: %s\n' "$RED" "$PLAIN" "$name" \
    "$(seconds_since "$began")" "$code" "${log#"$ROOT"/}"
  tail -n 40 "$log" | cut -c 1-300 | sed 's/^/    | /'
  return "$code"
}

as_root() {
  if ((EUID == 0)); then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    echo "expected to run as root or to find sudo, got neither: $*" >&2
    return 1
  fi
}

is_installed() {
  [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

# install_packages NAME...: quick and silent when all are there.
install_packages() {
  local name missing=()
  command -v apt-get >/dev/null ||
    { echo "expected Debian 12 or Ubuntu 24.04 (apt-get), install by hand: $*" >&2; return 1; }
  for name in "$@"; do
    is_installed "$name" || missing+=("$name")
  done
  ((${#missing[@]})) || return 0
  as_root apt-get -q -o Acquire::Retries=3 update &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::Retries=3 install -y \
      --no-install-recommends "${missing[@]}"
}

# As many as there are cores, but with about 1.5 GiB of memory each.
num_jobs() {
  local cores kib jobs
  cores=$(nproc)
  kib=$(awk '/^MemAvailable/ { print $2 }' /proc/meminfo)
  jobs=$((kib / 1572864))
  ((jobs < cores)) || jobs=$cores
  ((jobs > 0)) || jobs=1
  echo "$jobs"
}

# build PRESET [TARGET...]: configures and builds build/PRESET.
build() {
  local preset=$1
  shift
  (cd "$ROOT" && cmake --preset "$preset" &&
    cmake --build --preset "$preset" --parallel "$(num_jobs)" ${1+--target "$@"})
}

find_nvcc() {
  command -v nvcc || { [[ -x /usr/local/cuda/bin/nvcc ]] && echo /usr/local/cuda/bin/nvcc; }
}

# A GPU of the generation that the CUDA backend is built for (Hopper).
has_gpu() {
  command -v nvidia-smi >/dev/null &&
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -q '^9\.0'
}

# cuda where such a GPU and nvcc are found, else cpu.
pick_backend() {
  if has_gpu && find_nvcc >/dev/null; then echo cuda; else echo cpu; fi
}

# runtime_packages BINARY...: the packages of the shared libraries it needs, as this system names
# them. Libraries outside the distribution (the CUDA toolkit) are the base image's affair.
runtime_packages() {
  local library
  ldd "$@" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u | while read -r library; do
    library=$(realpath "$library")
    [[ $library == /usr/local/* ]] && continue
    # a merged /usr: the package may list the file under /lib
    dpkg-query -S "$library" 2>/dev/null || dpkg-query -S "${library#/usr}"
  done | cut -d: -f1 | sort -u
}
