#!/usr/bin/env bash
# Builds the CPU image from Dockerfile and runs it as Kubernetes would: another user than root, a
# read-only root file system, no capabilities, no network but its own loopback. It must become ready,
# answer its health check and a request, and exit 0 on SIGTERM.
#
# Needs root on Debian or Ubuntu, no container engine and no registry: the base image is made here
# by mmdebstrap, buildah builds with chroot isolation, podman runs with runc. About 5 minutes the
# first time. Keeps base and layers in build/image-test.
set -euo pipefail
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../deploy/lib.sh"
cd "$ROOT"

((EUID == 0)) || die "tests/image_test.sh: expected to run as root"
WORK=$ROOT/build/image-test
IMAGE=localhost/gla-server:test
BASE=localhost/debian:bookworm
NAME=gla-server-image-test-$$
MODEL_PROMPT='In the beginning God'
mkdir -p "$WORK"

STORAGE=(--root "$WORK/root" --runroot "$WORK/run" --storage-driver vfs)
PODMAN=(podman "${STORAGE[@]}" --cgroup-manager cgroupfs --events-backend file --runtime runc)
export CONTAINERS_CONF=$WORK/containers.conf
printf '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]\n' >"$CONTAINERS_CONF"

cleanup() {
  "${PODMAN[@]}" rm --force --time 0 "$NAME" >/dev/null 2>&1 || true
}
trap cleanup EXIT

make_base() {
  [[ -f $WORK/base.tar ]] || mmdebstrap --variant=minbase bookworm "$WORK/base.tar" || return 1
  buildah "${STORAGE[@]}" inspect --type image "$BASE" >/dev/null 2>&1 && return 0
  local container
  container=$(buildah "${STORAGE[@]}" from scratch) &&
    buildah "${STORAGE[@]}" add --quiet "$container" "$WORK/base.tar" / &&
    buildah "${STORAGE[@]}" commit --quiet --rm "$container" "$BASE"
}

build_image() {
  buildah "${STORAGE[@]}" bud --isolation chroot --format docker --layers --pull-never \
    --build-arg BASE="$BASE" --tag "$IMAGE" .
}

# expect WHAT EXPECTED GOT
expect() {
  [[ $2 == "$3" ]] || { echo "$1: expected $2, got $3"; return 1; }
}

check_config() {
  buildah "${STORAGE[@]}" inspect --type image "$IMAGE" >"$WORK/image.json" &&
    python3 - "$WORK/image.json" <<'END'
import json, sys
config = json.load(open(sys.argv[1]))["Docker"]["config"]
assert config["User"] == "10001:10001", config["User"]
assert config["Entrypoint"] == ["/opt/gla-server/bin/gla-server"], config["Entrypoint"]
assert config["StopSignal"] in ("SIGTERM", "15"), config["StopSignal"]
assert set(config["ExposedPorts"]) == {"8001/tcp", "8002/tcp"}, config["ExposedPorts"]
assert config["Healthcheck"]["Test"][:2] == ["CMD", "/opt/gla-server/bin/gla"], config["Healthcheck"]
labels = config["Labels"]
for key in ("title", "description", "version", "revision", "licenses"):
    assert labels["org.opencontainers.image." + key], key
END
}

run_container() {
  "${PODMAN[@]}" run --detach --name "$NAME" --network none --read-only --read-only-tmpfs=false \
    --cap-drop all --security-opt no-new-privileges --pids-limit 200 "$IMAGE" &&
    SERVER_PID=$("${PODMAN[@]}" inspect --format '{{.State.Pid}}' "$NAME")
}

# The status code of an HTTP page of the container.
http_status() {
  nsenter --target "$SERVER_PID" --net curl -s -o /dev/null -w '%{http_code}' -m 2 \
    "http://127.0.0.1:8002$1" || true
}

wait_ready() {
  local deadline=$((SECONDS + 60))
  until [[ $(http_status /readyz) == 200 ]]; do
    if ((SECONDS > deadline)) || ! kill -0 "$SERVER_PID"; then
      "${PODMAN[@]}" logs "$NAME"
      return 1
    fi
    sleep 0.1
  done
  expect "/livez" 200 "$(http_status /livez)"
}

in_container() {
  "${PODMAN[@]}" exec "$NAME" "$@"
}

check_restrictions() {
  local status=/proc/$SERVER_PID/status
  expect "uid" 10001 "$(awk '/^Uid:/ { print $2 }' "$status")" &&
    expect "effective capabilities" 0000000000000000 "$(awk '/^CapEff:/ { print $2 }' "$status")" &&
    expect "no_new_privs" 1 "$(awk '/^NoNewPrivs:/ { print $2 }' "$status")" &&
    if in_container /bin/sh -c 'touch /x || touch /tmp/x' 2>/dev/null; then
      echo "expected a read-only root file system, could write"
      return 1
    fi &&
    if in_container /bin/sh -c 'command -v cc || command -v g++ || command -v cmake'; then
      echo "expected no compiler in the image"
      return 1
    fi
}

serve_request() {
  in_container gla health --timeout 2 &&
    in_container gla generate --prompt "$MODEL_PROMPT" --max-new-tokens 16 --temperature 0
}

stop_container() {
  "${PODMAN[@]}" stop --time 40 "$NAME" >/dev/null &&
    expect "exit code on SIGTERM" 0 "$("${PODMAN[@]}" inspect --format '{{.State.ExitCode}}' "$NAME")"
}

printf '%sgla-server image%s\n' "$BOLD" "$PLAIN"
step "image tools" install_packages mmdebstrap buildah podman runc conmon util-linux curl python3
step "base image" make_base
step "image build" build_image
step "image configuration" check_config
step "image start" run_container
step "image ready" wait_ready
step "image restrictions" check_restrictions
step "image health and request" serve_request
step "image SIGTERM, exit 0" stop_container
echo "ok: image of $(du -sh --apparent-size "$("${PODMAN[@]}" image mount "$IMAGE")" | cut -f1), built and run"
"${PODMAN[@]}" image unmount "$IMAGE" >/dev/null
