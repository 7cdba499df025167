#!/usr/bin/env bash
# From nothing to a streamed reply: installs the packages, builds, serves the bundled model on free
# ports of 127.0.0.1, streams a continuation, stops the server. Exit 0 when all of it worked.
#
# Runs on Debian 12 (and, untried, Ubuntu 24.04), as root or with sudo; a second run takes seconds.
# Uses the GPU when there is one and nvcc is found, else the CPU; GLA_BACKEND=cpu|cuda overrides that.
set -euo pipefail
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

BACKEND=${GLA_BACKEND:-$(pick_backend)}
[[ $BACKEND == cpu || $BACKEND == cuda ]] || die "GLA_BACKEND: expected cpu or cuda, got \"$BACKEND\""
BIN=$ROOT/build/release/bin
MODEL=$ROOT/deploy/models/bard-6m
SERVER_LOG=$LOGS/quickstart-server.log
SERVER_PID=

stop_server() {
  [[ -n $SERVER_PID ]] || return 0
  local pid=$SERVER_PID code=0
  SERVER_PID=
  kill -TERM "$pid" 2>/dev/null || true
  wait "$pid" || code=$?
  return "$code"
}
trap 'stop_server || true' EXIT
trap 'exit 130' INT TERM

# Starts the server and sets GRPC_PORT and HTTP_PORT from its ready line.
start_server() {
  "$BIN/gla-server-$BACKEND" --model "$MODEL" --host 127.0.0.1 --port 0 \
    --http-port 0 --log-format text >"$SERVER_LOG" 2>&1 &
  SERVER_PID=$!
  local deadline=$((SECONDS + 120)) line
  while ((SECONDS < deadline)); do
    line=$(grep -m1 'ready:' "$SERVER_LOG" || true)
    if [[ $line =~ ready:\ grpc\ [^\ ]*:([0-9]+)\ http\ [^\ ]*:([0-9]+) ]]; then
      GRPC_PORT=${BASH_REMATCH[1]} HTTP_PORT=${BASH_REMATCH[2]}
      curl -fsS "http://127.0.0.1:$HTTP_PORT/readyz" >/dev/null && return 0
    fi
    kill -0 "$SERVER_PID" 2>/dev/null || break
    sleep 0.05
  done
  cat "$SERVER_LOG"
  return 1
}

printf '%sgla-server quickstart%s, %s backend\n' "$BOLD" "$PLAIN" "$BACKEND"
step "packages" install_packages "${BUILD_PACKAGES[@]}"
step "build gla-server-$BACKEND and gla" build release "gla-server-$BACKEND" gla
step "start, load bard-6m, ready" start_server

printf '\n'
"$BIN/gla" generate --target "127.0.0.1:$GRPC_PORT" --echo --temperature 0.7 --seed 7 \
  --max-new-tokens 120 --prompt 'First Citizen:
Before we proceed' || die "gla generate: expected exit 0, got $?"
printf '\n'

stop_server || die "gla-server-$BACKEND: expected exit 0 on SIGTERM, got $? (log: build/logs)"
cat <<END
${GREEN}ok${PLAIN}: gla-server-$BACKEND loaded bard-6m, streamed a reply and stopped cleanly.

Serve it, or an own checkpoint folder saved by flash-linear-attention, and talk to it:
  build/release/bin/gla-server-$BACKEND --model deploy/models/bard-6m
  build/release/bin/gla generate --prompt 'In the beginning God'
END
