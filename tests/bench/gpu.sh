#!/usr/bin/env bash
# All that one GPU is asked: our kernels and steps, and flash-linear-attention's beside them.
#
#   tests/bench/gpu.sh [FOLDER]   JSON, report.md and step_time.svg go there (default build/bench)
#
# GLA_BIN names the folder of the binaries (default build/release/bin), PYTHON the interpreter that
# has torch and fla (default python3). A bench that fails costs only its own figures; the exit code
# is 1 then.
set -euo pipefail
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../deploy/lib.sh"
OUT=$(realpath -m "${1:-$ROOT/build/bench}")
cd "$ROOT"

BIN=${GLA_BIN:-build/release/bin}
PYTHON=${PYTHON:-python3}
SEQS=1,64,256,512
FAILED=0

for name in gla-bench-engine-cuda gla-bench-decode-attention; do
  [[ -x $BIN/$name ]] || die "$BIN/$name: not found; build first (README.md) where nvcc is"
done
mkdir -p "$OUT"
shopt -s nullglob
rm -f "$OUT"/{compare_fla,engine-gla,decode_attention}*.json  # of an earlier run

# into FILE COMMAND...: its output, once it has succeeded.
into() {
  local file=$1
  shift
  "$@" >"$file" || { rm -f "$file"; return 1; }
}

# bench NAME COMMAND...
bench() {
  step "$@" || FAILED=1
}

printf '%sgla-server benches on one GPU%s\n' "$BOLD" "$PLAIN"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || true
bench "decode attention" into "$OUT/decode_attention.json" "$BIN/gla-bench-decode-attention" --json
for config in gla-340m gla-1.3b; do
  for state in float32 int16; do
    bench "$config, $state states" into "$OUT/engine-$config-$state.json" "$BIN/gla-bench-engine" \
      --backend cuda --config "$config" --state-dtype "$state" --seqs "$SEQS" --prompt 2048 \
      --positions 1000,1000000 --mixed 256 --json
  done
done

if reason=$("$PYTHON" -c 'import torch, fla' 2>&1); then
  bench "fla, decode" "$PYTHON" tests/bench/compare_fla_decode.py --json "$OUT/compare_fla_decode.json"
  bench "fla, models" "$PYTHON" tests/bench/compare_fla_model.py --engine '' --seqs "$SEQS" \
    --json "$OUT/compare_fla_model.json"
  bench "fla, operators" "$PYTHON" tests/bench/compare_fla.py --forward-only \
    --library "$BIN/../lib/libgla_ops_cuda.so" --json "$OUT/compare_fla.json"
else
  echo "  skipped flash-linear-attention: $PYTHON cannot import torch and fla (${reason##*$'\n'})"
fi

# Ours comes after compare_fla_model.json, whose limits are of another run's copy rate.
if step "report" into "$OUT/report.md" "$PYTHON" tests/bench/report.py \
  "$OUT"/{compare_fla,engine-gla,decode_attention}*.json --svg "$OUT/step_time.svg"; then
  cat "$OUT/report.md"
else
  FAILED=1
fi
((FAILED == 0))
