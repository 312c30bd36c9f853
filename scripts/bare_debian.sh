#!/usr/bin/env bash
# Is README's `make demo` enough? Makes a bare Debian in a new folder, clones this checkout's last commit into it, runs
# `make demo` there and prints the seconds from the clone to the end. Nothing is typed in between.
#
#   sudo scripts/bare_debian.sh FOLDER [SUITE]        SUITE: bookworm (Python 3.11) or trixie (3.13); trixie by default
#
# The folder is a root of its own to what runs in it (a chroot would deny the sandbox of `make eval` its user namespace).
# From this machine go in: the name server, pip's settings in the environment (PIP_*), and the certificates that
# PIP_CERT and SSL_CERT_FILE name. Needs root, debootstrap and util-linux; the folder stays, about 2 GB.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

[[ $# -eq 1 || $# -eq 2 ]] || fail "usage: sudo $0 FOLDER [SUITE]"
suite=${2:-trixie}
[[ $(id -u) -eq 0 ]] || fail "a root folder is made and mounted by root alone: sudo $0 $*"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"
[[ ! -e $1 || -z $(ls -A "$1") ]] || fail "$1: must be a new or an empty folder"
checkout=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
root=$(cd "$1" && pwd)

echo "== a bare Debian $suite in $root, with what README names"
debootstrap --variant=minbase --include=ca-certificates,git,make,python3,python3-venv,iverilog,bubblewrap \
  "$suite" "$root" >"$root.debootstrap.log" 2>&1 || fail "debootstrap: see $root.debootstrap.log"
rm -rf "$root/var/cache/apt/archives"
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
for certificates in "${PIP_CERT:-}" "${SSL_CERT_FILE:-}"; do
  [[ -z $certificates ]] || install -D -m 644 "$certificates" "$root$certificates"
done
git -C "$checkout" bundle create --quiet "$root/root/gemma_tpu.bundle" HEAD
echo "== commit $(git -C "$checkout" log -1 --format='%h %s')"

settings=(HOME=/root LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin)
for name in "${!PIP_@}" ${SSL_CERT_FILE:+SSL_CERT_FILE}; do settings+=("$name=${!name}"); done

# shellcheck disable=SC2016  # the inner shells expand these
unshare --mount --pid --ipc --fork bash -euc '
  root=$1; shift
  mount --bind "$root" "$root"
  mount -t proc proc "$root/proc"
  mount --rbind /dev "$root/dev"
  mount -t tmpfs tmpfs "$root/tmp"
  cd "$root"; mkdir -p .outside
  pivot_root . .outside
  umount --lazy /.outside; rmdir /.outside
  exec env --ignore-environment "$@" bash -euc "
    python3 --version; cd /root; SECONDS=0
    git clone --quiet gemma_tpu.bundle gemma_tpu
    cd gemma_tpu
    make demo
    echo \"== clone to the end of make demo: \$SECONDS s\""
' inner "$root" "${settings[@]}"
