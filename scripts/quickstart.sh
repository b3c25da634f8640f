#!/usr/bin/env bash
# Standfast's main job on real input, in front of you: a disk image with a real
# file system is protected while it is mounted and written, and opened at the
# target as it was at two moments; every file is compared with what it was then.
#
#   ./scripts/quickstart.sh          runs, prints a table, cleans up
#   ./scripts/quickstart.sh --keep   leaves everything running and prints URIs
#
# Environment: QS_SOURCE (folder whose files fill the image, /usr/share), QS_MIB
# (how much of it, 300). Needs root for mounts; without root or loop
# devices the same is done over NBD alone.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=build
export CARGO_TERM_COLOR=never
PATH=/usr/bin:/usr/sbin:/bin:/sbin:$PATH

KEEP=0
for argument in "$@"; do
    case $argument in
    --keep) KEEP=1 ;;
    *)
        echo "usage: $0 [--keep]" >&2
        exit 2
        ;;
    esac
done
SOURCE=${QS_SOURCE:-/usr/share}
MIB=${QS_MIB:-300}

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
note() { printf '   %s\n' "$*"; }
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.2f", b - a }'; }

install_missing() {
    local missing=() pair
    for pair in mkfs.ext4:e2fsprogs debugfs:e2fsprogs losetup:util-linux fusermount3:fuse3 \
        nbdinfo:libnbd-bin nbdcopy:libnbd-bin qemu-img:qemu-utils jq:jq cc:gcc; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [ ${#missing[@]} -eq 0 ] && return
    say "Installing ${missing[*]}"
    local sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -q
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -q --no-install-recommends "${missing[@]}"
}

# Without root, FUSE or loop devices everything goes over NBD.
can_mount() {
    [ -z "${QS_NBD_ONLY:-}" ] && [ "$(id -u)" -eq 0 ] && [ -c /dev/fuse ] && [ -e /dev/loop-control ] || return 1
    local device
    device=$(losetup -f 2>/dev/null) || return 1
    [ -b "$device" ]
}

W=$(mktemp -d -t standfast.XXXXXX)
SF=${QS_BINARY:-$PWD/build/release/standfast}
A=$W/agent
T=$W/target
WRITER=
AGENT=
TARGET=
MOUNTS=()
LOOPS=()

umount_all() {
    local i
    for ((i = ${#MOUNTS[@]} - 1; i >= 0; i--)); do umount "${MOUNTS[i]}" 2>/dev/null || true; done
    for ((i = ${#LOOPS[@]} - 1; i >= 0; i--)); do losetup -d "${LOOPS[i]}" 2>/dev/null || true; done
    MOUNTS=()
    LOOPS=()
}

clean_up() {
    local status=$?
    trap - EXIT INT TERM
    set +e
    stop_writer
    if [ "$KEEP" = 1 ] && [ "$status" = 0 ]; then
        return
    fi
    umount_all
    for m in "$W"/points/*; do [ -d "$m" ] && "$SF" point unmount "$m" --dir "$T" -q >/dev/null 2>&1; done
    [ -d "$A/groups/demo" ] && "$SF" unprotect demo --force --dir "$A" -q >/dev/null 2>&1
    for drill in $("$SF" drill list --dir "$T" --json 2>/dev/null | jq -r '.drills[].drill' 2>/dev/null); do
        "$SF" drill finish "$drill" --dir "$T" -q >/dev/null 2>&1
    done
    [ -n "$AGENT" ] && kill "$AGENT" 2>/dev/null
    [ -n "$TARGET" ] && kill "$TARGET" 2>/dev/null
    wait 2>/dev/null
    if [ "$status" = 0 ]; then
        rm -rf "$W"
    else
        echo "failed; logs and data are in $W" >&2
        for log in "$W"/*.log "$A"/groups/demo/*.log; do
            [ -s "$log" ] && { echo "--- ${log##*/}" >&2 && tail -n 5 "$log" >&2; }
        done
    fi
    exit "$status"
}

stop_writer() {
    [ -n "$WRITER" ] || return 0
    touch "$W/stop"
    wait "$WRITER" 2>/dev/null || true
    WRITER=
}

wait_ready() { # PID FILE: the daemon's ready line
    local i
    for ((i = 0; i < 300; i++)); do
        grep -q '"type":"ready"' "$2" 2>/dev/null && return 0
        kill -0 "$1" 2>/dev/null || return 1
        sleep 0.1
    done
    return 1
}

start_daemons() {
    say "Target and agent, on loopback, in $W"
    local init token
    init=$("$SF" target init --dir "$T" --listen 127.0.0.1:0 --json)
    token=$(jq -r .token <<<"$init")
    "$SF" target run --dir "$T" >"$W/target.out" 2>"$W/target.log" &
    TARGET=$!
    wait_ready "$TARGET" "$W/target.out"
    printf '%s' "$token" | "$SF" join --token-file - --dir "$A" -q >/dev/null
    "$SF" agent run --dir "$A" >"$W/agent.out" 2>"$W/agent.log" &
    AGENT=$!
    wait_ready "$AGENT" "$W/agent.out"
    note "target listens on $(jq -r .listen <<<"$init"); the agent joined with a one-use token"
}

# Copies real files, at most $MIB MiB of them, into a folder.
copy_files() { # FOLDER
    find "$SOURCE" -xdev -type f -size -8M -printf '%s\t%P\n' 2>/dev/null |
        awk -F '\t' -v limit=$((MIB << 20)) 'n + $1 + 4096 <= limit { n += $1 + 4096; print $2 }' >"$W/list"
    tar -C "$SOURCE" --verbatim-files-from -cf - -T "$W/list" 2>"$W/tar.log" | tar -C "$1" -xf -
    note "$(wc -l <"$W/list") files"
}

sums() { # FOLDER: checksum of every file, sorted
    (cd "$1" && find . -xdev -type f -not -path './lost+found/*' -print0 | sort -z | xargs -0 -r sha256sum)
}

compare() { # WHAT RECORDED FOUND
    if cmp -s "$2" "$3"; then
        note "$1: $(wc -l <"$3") files, every checksum is what it was"
        return 0
    fi
    diff "$2" "$3" | head -10 >&2 || true
    echo "$1: the files differ" >&2
    return 1
}

attach() { # FILE [OPTIONS…]: a loop device
    local device
    device=$(losetup --direct-io=on --sector-size 4096 -f --show "${@:2}" "$1")
    LOOPS+=("$device")
    DEVICE=$device
}

writer() { # FOLDER: keeps writing files until told to stop
    local n=0
    while [ ! -e "$W/stop" ]; do
        n=$((n + 1))
        # While a moment is recorded nothing may change between the record and the mark.
        (
            flock 9
            mkdir -p "$1/live"
            head -c $((RANDOM * 8 + 1)) /dev/urandom >"$1/live/$((n % 200))"
            [ $((n % 10)) -ne 0 ] || sync -f "$1/live"
        ) 9>"$W/writer.lock"
        sleep 0.01
    done
}

group_json() { "$SF" status demo --dir "$A" --json 2>/dev/null | jq -c '.groups[0]'; }

protect_and_wait() { # OPTIONS…: returns once protected; the seed's numbers are kept
    "$SF" protect demo disk="$W/disk.img" --dir "$A" --journal-size 1GiB "$@" --json >"$W/protect.json" 2>"$W/protect.log" ||
        { cat "$W/protect.log" >&2; return 1; }
    note "protected; the disk is $(jq -r '.disks[0].uri' "$W/protect.json")"
    SEED_STARTED=$(now)
}

watch_seed() {
    say "Seeding, while the disk is written"
    local g done total rate state shown=0
    while :; do
        g=$(group_json) || g=
        state=$(jq -r '.state // "?"' <<<"${g:-{\}}")
        done=$(jq -r '.resync.sent_bytes // 0' <<<"${g:-{\}}")
        total=$(((done + $(jq -r '.resync.remaining_bytes // 0' <<<"${g:-{\}}"))))
        rate=$(jq -r '(.resync.rate_bytes_per_second // 0) | floor' <<<"${g:-{\}}")
        if [ "$total" -gt 0 ]; then
            bar "$done" "$total" "$rate"
            shown=1
        fi
        [ "$state" = protected ] && break
        [ "$(awk -v s="$(since "$SEED_STARTED")" 'BEGIN { print (s > 600) }')" = 1 ] &&
            { echo "not protected after 10 minutes: $g" >&2; return 1; }
        sleep 0.2
    done
    SEED_SECONDS=$(since "$SEED_STARTED")
    [ "$shown" = 0 ] || [ ! -t 2 ] || printf '\n' >&2
    note "protected after $SEED_SECONDS s"
}

LAST_BAR=0
bar() { # DONE TOTAL RATE
    local width=30 filled
    filled=$(($1 * width / $2))
    if [ -t 2 ]; then
        printf '\r   [%-*s] %d of %d MiB, %d MiB/s   ' "$width" "$(printf '%*s' "$filled" '' | tr ' ' '#')" \
            $(($1 >> 20)) $(($2 >> 20)) $(($3 >> 20)) >&2
    elif [ $((SECONDS - LAST_BAR)) -ge 2 ]; then
        LAST_BAR=$SECONDS
        note "seeded $(($1 >> 20)) of $(($2 >> 20)) MiB, $(($3 >> 20)) MiB/s"
    fi
}

# The group's RPO as the agent reports it, over a few seconds: median and largest.
measure_rpo() {
    local i
    for ((i = 0; i < 30; i++)); do
        group_json | jq -r '.rpo_seconds // empty'
        sleep 0.1
    done | sort -n >"$W/rpo"
    RPO_P50=$(awk '{ a[NR] = $1 } END { print NR ? a[int((NR + 1) / 2)] : "?" }' "$W/rpo")
    RPO_MAX=$(tail -n 1 "$W/rpo")
}

open_point() { # POINT NAME RECORDED: mounts it at the target and compares everything
    local point=$1 name=$2 recorded=$3 started drill device
    say "Opening demo@$point at the target"
    started=$(now)
    mkdir -p "$W/points"
    "$SF" point mount "demo@$point" "$W/points/$name" --dir "$T" --json >"$W/$name.json"
    OPEN_SECONDS=$(since "$started")
    note "open after $OPEN_SECONDS s: $(jq -r '.files[0]' "$W/$name.json") (point $(jq -r .point "$W/$name.json"))"
    # A live file system's journal has to be replayed, which needs a writable
    # disk: a drill at the very same point is one, and production sees nothing.
    point=$(jq -r .point "$W/$name.json")
    "$SF" drill start "demo@$point" --fuse "$W/drills/$name" --dir "$T" --json >"$W/drill-$name.json"
    drill=$(jq -r .drill "$W/drill-$name.json")
    local file
    file=$(jq -r '.disks[0].file' "$W/drill-$name.json")
    e2fsck -fy "$file" >"$W/fsck-$name.log" 2>&1 || [ $? -eq 1 ]
    e2fsck -fn "$file" >>"$W/fsck-$name.log" 2>&1
    note "fsck: clean"
    attach "$file" -r
    device=$DEVICE
    mkdir -p "$W/mnt-$name"
    mount -o ro "$device" "$W/mnt-$name"
    MOUNTS+=("$W/mnt-$name")
    sums "$W/mnt-$name" >"$W/found-$name"
    compare "demo@$point" "$recorded" "$W/found-$name"
    cmp -s <(head -c 4096 "$file" | head -c 1024) <(head -c 1024 "$(jq -r '.files[0]' "$W/$name.json")") ||
        { echo "the drill and the point differ where nothing was written" >&2; return 1; }
    if [ "$KEEP" = 0 ]; then
        umount_one "$W/mnt-$name" "$device"
        "$SF" drill finish "$drill" --dir "$T" -q >/dev/null
        "$SF" point unmount "$W/points/$name" --dir "$T" -q >/dev/null
    fi
}

umount_one() { # FOLDER DEVICE
    umount "$1"
    losetup -d "$2"
    MOUNTS=("${MOUNTS[@]/$1/}")
    LOOPS=("${LOOPS[@]/$2/}")
}

# Freezes the file system, records every checksum's moment, and marks the point in
# between: what is recorded is what the point holds.
record_and_mark() { # TAG RECORD
    (
        flock 9
        sync -f "$W/mnt"
        sums "$W/mnt" >"$2"
        if [ -n "$1" ]; then
            "$SF" point create demo --tag "$1" --dir "$A" --json >"$W/point-$1.json"
        else
            "$SF" sync demo --dir "$A" --json >"$W/sync.json"
        fi
    ) 9>"$W/writer.lock"
}

with_mounts() {
    say "An image with an ext4 file system and real files from $SOURCE"
    truncate -s $((MIB * 2 + 256))M "$W/disk.img"
    mkfs.ext4 -q -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 "$W/disk.img"
    mkdir -p "$W/mnt" "$W/fuse"
    mount -o loop "$W/disk.img" "$W/mnt"
    MOUNTS+=("$W/mnt")
    copy_files "$W/mnt"
    umount "$W/mnt"
    MOUNTS=()
    note "$(du -h "$W/disk.img" | cut -f1) used of $(du -h --apparent-size "$W/disk.img" | cut -f1)"

    start_daemons
    say "Protecting it, and using it at once: FUSE file, loop device, mount, writes"
    protect_and_wait --fuse "$W/fuse"
    attach "$W/fuse/disk"
    mount "$DEVICE" "$W/mnt"
    MOUNTS+=("$W/mnt")
    writer "$W/mnt" &
    WRITER=$!
    watch_seed

    say "A named point, while files are written"
    record_and_mark before "$W/recorded-before"
    note "$(jq -r '.point + "  " + .time' "$W/point-before.json")  tag:before"
    sleep 2
    measure_rpo
    rm -rf "$W/mnt/$(ls "$W/mnt" | grep -v -e lost+found -e live | head -1)"
    sleep 1
    stop_writer
    record_and_mark "" "$W/recorded-latest"
    note "synced in $(jq -r .seconds "$W/sync.json") s"
    cmp -s "$W/recorded-before" "$W/recorded-latest" && { echo "nothing was written in between" >&2; return 1; }

    open_point tag:before before "$W/recorded-before"
    OPEN_BEFORE=$OPEN_SECONDS
    open_point latest latest "$W/recorded-latest"
}

# The same without root: the file system is made with mke2fs -d, the writer
# writes blocks through NBD, and the copies are compared byte for byte.
over_nbd() {
    say "No root, FUSE or loop devices: the same over NBD alone"
    mkdir -p "$W/files"
    copy_files "$W/files"
    truncate -s $((MIB * 2 + 256))M "$W/disk.img"
    mke2fs -q -t ext4 -b 4096 -d "$W/files" "$W/disk.img"
    start_daemons
    protect_and_wait
    local uri
    uri=$(jq -r '.disks[0].uri' "$W/protect.json")
    : >"$W/writer.lock"
    nbd_writer "$uri" &
    WRITER=$!
    watch_seed
    stop_writer
    nbdcopy --flush "$uri" "$W/before.raw"
    "$SF" point create demo --tag before --dir "$A" --json >"$W/point-before.json"
    rm -f "$W/stop"
    nbd_writer "$uri" &
    WRITER=$!
    sleep 2
    measure_rpo
    stop_writer
    "$SF" sync demo --dir "$A" --json >"$W/sync.json"
    nbdcopy --flush "$uri" "$W/latest.raw"
    local started point
    for point in tag:before latest; do
        local name=${point#tag:}
        started=$(now)
        uri=$("$SF" point uri "demo.disk@$point" --dir "$T" --json | jq -r .uri)
        nbdinfo --size "$uri" >/dev/null
        OPEN_SECONDS=$(since "$started")
        [ "$name" = before ] && OPEN_BEFORE=$OPEN_SECONDS
        nbdcopy "$uri" "$W/copy.raw"
        cmp "$W/copy.raw" "$W/$name.raw"
        e2fsck -fn "$W/copy.raw" >"$W/fsck-$name.log" 2>&1
        debugfs -R "rdump / $W/out-$name" "$W/copy.raw" >/dev/null 2>&1 || true
        note "demo@$point: byte for byte the same, fsck clean"
        rm -f "$W/copy.raw"
    done
    sums "$W/files" >"$W/recorded-latest"
}

# Writes into a part of the disk that the file system does not use: its last MiBs.
nbd_writer() { # URI
    local size n=0
    size=$(nbdinfo --size "$1")
    while [ ! -e "$W/stop" ]; do
        n=$((n + 1))
        qemu-io -f raw -c "write -q -P $((n % 250 + 1)) $((size - (n % 16 + 1) * 65536)) 4096" "$1" >/dev/null 2>&1 || true
    done
}

result() {
    local target points group bytes rate
    group=$(group_json)
    target=$("$SF" status demo --dir "$T" --json | jq -c '.groups[0]')
    points=$(jq -r '.points.count // "?"' <<<"$target")
    bytes=$(du -B1 "$W/disk.img" | cut -f1)
    rate=$(awk -v b="$bytes" -v s="$SEED_SECONDS" 'BEGIN { printf "%.0f", b / s / 1048576 }')
    say "Result"
    printf '   %-26s %s\n' \
        "seeded" "$((bytes >> 20)) MiB in $SEED_SECONDS s ($rate MiB/s), while written" \
        "RPO under load" "median ${RPO_P50} s, largest ${RPO_MAX} s" \
        "sync" "$(jq -r .seconds "$W/sync.json") s" \
        "time to open a point" "${OPEN_BEFORE} s (tag:before), ${OPEN_SECONDS} s (latest)" \
        "recovery points" "$points" \
        "result" "PASS: both points hold exactly what was there"
    if [ "$KEEP" = 1 ]; then
        say "Still running (--keep)"
        note "agent   standfast status --dir $A"
        note "target  standfast point list demo --dir $T"
        note "disk    $(jq -r '.disks[0].uri' "$W/protect.json")"
        note "point   $("$SF" point uri demo.disk@tag:before --dir "$T" --json | jq -r .uri)"
        note "stop    standfast unprotect demo --force --dir $A; kill $AGENT $TARGET; rm -rf $W"
        disown -a
    fi
}

trap clean_up EXIT
trap 'exit 130' INT TERM
install_missing
if [ -z "${QS_BINARY:-}" ]; then
    say "Building"
    cargo build --release --quiet -p tools
fi
if can_mount; then with_mounts; else over_nbd; fi
result
