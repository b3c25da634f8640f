#!/usr/bin/env bash
# Every check of the project: format, lints, build, all tests, and the main job
# end to end (quickstart). Installs the test tools it needs. The last line is the
# total over all suites.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=build
export CARGO_TERM_COLOR=never

install_tools() {
    local missing=()
    local pair
    for pair in nbdkit:nbdkit nbdinfo:libnbd-bin nbdcopy:libnbd-bin nbdsh:python3-libnbd \
        fio:fio qemu-img:qemu-utils qemu-io:qemu-utils rsync:rsync mkfs.ext4:e2fsprogs losetup:util-linux \
        fusermount3:fuse3 jq:jq; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [ ${#missing[@]} -eq 0 ] && return
    echo "installing: ${missing[*]}"
    if [ "$(id -u)" -eq 0 ]; then
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
    else
        sudo apt-get update -q
        sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
    fi
}

passed=0
failed=0
failures=()

step() { # NAME COMMAND...: one check that either holds or not
    local name=$1
    shift
    echo "== $name"
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        failures+=("$name")
    fi
}

suites() { # all of cargo's suites; their results are added up
    local log
    log=$(mktemp)
    echo "== tests"
    local ok=0
    cargo test --workspace --no-fail-fast 2>&1 | tee "$log" || ok=$?
    local line p f
    while read -r line; do
        p=$(sed -E 's/.* ([0-9]+) passed;.*/\1/' <<<"$line")
        f=$(sed -E 's/.* ([0-9]+) failed;.*/\1/' <<<"$line")
        passed=$((passed + p))
        failed=$((failed + f))
        [ "$f" = 0 ] || failures+=("a test suite")
    done < <(grep -E '^test result:' "$log" || true)
    # A suite that does not compile, or dies, has no result line.
    if [ "$ok" != 0 ] && [ "$failed" = 0 ]; then
        failed=$((failed + 1))
        failures+=("cargo test")
    fi
    rm -f "$log"
}

bench_smoke() { # the harness runs and leaves every cell; what it measured is not looked at
    local results=build/bench/results.json
    rm -f "$results"
    ./scripts/bench.sh --quick || return 1
    local missing
    missing=$(comm -23 <(build/release/bench --list | sort -u) \
        <(jq -r '(.rows + .figures)[].cell' "$results" | sort -u)) || return 1
    [ -z "$missing" ] || { echo "not in $results: $missing"; return 1; }
}

install_tools
step "format" cargo fmt --all --check
step "lints" cargo clippy --workspace --all-targets --quiet -- -D warnings
step "build" cargo build --workspace --quiet
suites
step "quickstart" ./scripts/quickstart.sh
step "benchmarks" bench_smoke

[ "$failed" = 0 ] || printf 'failed: %s\n' "${failures[@]}"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
