#!/usr/bin/env bash
# A newcomer's first hour, from nothing: makes a clean Debian 12 root, puts the committed tree in it,
# and runs the two commands of the README there, twice. For a person or a release, not part of
# tests/run.sh: it takes as long as everything built from scratch.
#
#   tests/fresh_root_test.sh [--worktree] [FOLDER]
#     FOLDER      where the root is made (default: a temporary one)
#     --worktree  the files as they are, instead of those of the last commit
#
# Needs root and mmdebstrap. Proxy and pip settings of the caller are passed on.
set -euo pipefail
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../deploy/lib.sh"
cd "$ROOT"

((EUID == 0)) || die "tests/fresh_root_test.sh: expected to run as root"
WORKTREE=${GLA_FRESH_ROOT_WORKTREE-}
if [[ ${1-} == --worktree ]]; then
  WORKTREE=yes
  shift
fi
NEW=${1:-$(mktemp -d)}
TREE=/src/gla-server

# In a mount namespace of its own, so that nothing stays mounted whatever happens.
if [[ -z ${GLA_FRESH_ROOT_INSIDE-} ]]; then
  export GLA_FRESH_ROOT_INSIDE=yes GLA_FRESH_ROOT_WORKTREE=$WORKTREE
  exec unshare --mount --propagation private --pid --fork --kill-child \
    "$ROOT/tests/fresh_root_test.sh" "$NEW"
fi

pack_tree() {
  if [[ -n $WORKTREE ]]; then
    git ls-files -z --cached --others --exclude-standard | tar -c --null -T -
  else
    git archive HEAD
  fi
}

make_root() {
  mmdebstrap --variant=minbase bookworm "$NEW/debian" &&
    mkdir -p "$NEW/debian$TREE" && pack_tree | tar -x -C "$NEW/debian$TREE" &&
    cp /etc/resolv.conf "$NEW/debian/etc/resolv.conf" &&
    # a proxy's own certificate authority, where pip is told to trust one
    if [[ -n ${PIP_CERT-} ]]; then cp "$PIP_CERT" "$NEW/debian/etc/pip-ca.crt"; fi
}

mount_root() {
  mount -t proc proc "$NEW/debian/proc" && mount --rbind /sys "$NEW/debian/sys" &&
    mount --rbind /dev "$NEW/debian/dev" && mount -t tmpfs tmpfs "$NEW/debian/tmp"
}

# Nothing of the caller's environment but what reaches the network.
in_root() {
  local pass=() name
  for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY PIP_INDEX_URL; do
    [[ -n ${!name-} ]] && pass+=("$name=${!name}")
  done
  [[ -n ${PIP_CERT-} ]] && pass+=("PIP_CERT=/etc/pip-ca.crt")
  chroot "$NEW/debian" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/root LANG=C.UTF-8 "${pass[@]}" "$@"
}

timed() {
  local began=$EPOCHREALTIME
  printf '%s--- %s%s\n' "$BOLD" "$*" "$PLAIN"
  in_root "$@"
  printf '%s--- exit 0 after %s s%s\n' "$BOLD" "$(seconds_since "$began")" "$PLAIN"
}

printf '%sgla-server in a fresh Debian 12 at %s%s\n' "$BOLD" "$NEW/debian" "$PLAIN"
step "mmdebstrap, git archive" make_root
step "mounts" mount_root
for _ in first second; do
  timed "$TREE/deploy/quickstart.sh"
  timed "$TREE/tests/run.sh"
done
echo "${GREEN}ok${PLAIN}: both commands, twice, from nothing"
