#!/usr/bin/env bash
# Us and the peers side by side: builds what is measured, installs what is missing, runs
# the harness (benches/README.md). All arguments are the harness's: --help names them.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=build
PATH=/usr/bin:/usr/sbin:/bin:/sbin:$PATH

install_peers() {
    local missing=() pair
    for pair in fio:fio nbdkit:nbdkit nbdcopy:libnbd-bin qemu-nbd:qemu-utils qemu-img:qemu-utils \
        rsync:rsync; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    # In qemu-system-common before Debian 13, and in qemu-utils in some later releases.
    if ! command -v qemu-storage-daemon >/dev/null; then missing+=(qemu-system-common); fi
    [ ${#missing[@]} -eq 0 ] && return
    if [ "$(id -u)" -ne 0 ]; then
        echo "not installed, so left out: ${missing[*]}" >&2
        return
    fi
    echo "installing: ${missing[*]}" >&2
    apt-get update -q >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >&2
}

install_peers
cargo build --release --quiet
cargo build --release --quiet -p benches
exec build/release/bench "$@"
