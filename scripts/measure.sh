#!/usr/bin/env bash
# Measures what README.md says: write rate while seeding, RPO under a steady
# load, time to open points. Prints one table and writes measure.json beside it.
#
#   ./scripts/measure.sh [SECONDS]     length of the RPO load (30)
#
# Environment: M_MIB (image size, 2048; half of it holds data), M_RATE (writes a
# second of the RPO load, 4 KiB each, 2000), M_OUT (measure.json).
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=build
PATH=/usr/bin:/usr/sbin:/bin:/sbin:$PATH
LOAD=${1:-30}
MIB=${M_MIB:-2048}
RATE=${M_RATE:-2000}
OUT=${M_OUT:-measure.json}

for tool in fio jq nbdinfo python3; do
    command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install fio jq libnbd-bin python3" >&2; exit 1; }
done
cargo build --release --quiet

W=$(mktemp -d -t standfast.XXXXXX)
SF=$PWD/build/release/standfast
A=$W/agent
T=$W/target
AGENT=
TARGET=

clean_up() {
    local status=$?
    trap - EXIT INT TERM
    set +e
    [ -d "$A/groups/m" ] && "$SF" unprotect m --force --dir "$A" -q >/dev/null 2>&1
    [ -n "$AGENT" ] && kill "$AGENT" 2>/dev/null
    [ -n "$TARGET" ] && kill "$TARGET" 2>/dev/null
    wait 2>/dev/null
    if [ "$status" = 0 ]; then rm -rf "$W"; else echo "failed; logs are in $W" >&2; fi
    exit "$status"
}
trap clean_up EXIT INT TERM

wait_ready() { # FILE PID
    until grep -q '"ready"' "$1" 2>/dev/null; do
        kill -0 "$2" || return 1
        sleep 0.05
    done
}

"$SF" target init --dir "$T" --listen 127.0.0.1:0 --json >"$W/init.json"
"$SF" target run --dir "$T" >"$W/target.out" 2>"$W/target.log" & TARGET=$!
wait_ready "$W/target.out" "$TARGET"
jq -r .token "$W/init.json" | "$SF" join --token-file - --dir "$A" -q
"$SF" agent run --dir "$A" >"$W/agent.out" 2>"$W/agent.log" & AGENT=$!
wait_ready "$W/agent.out" "$AGENT"

# Half data that compresses like programs do, half holes.
truncate -s "${MIB}M" "$W/disk.img"
tar -cf - -C /usr lib bin 2>/dev/null | head -c $((MIB / 2))M | dd of="$W/disk.img" bs=1M conv=notrunc iflag=fullblock status=none || true
sync "$W/disk.img"

"$SF" protect m disk="$W/disk.img" --dir "$A" --journal-size 2GiB --json >"$W/protect.json" 2>/dev/null
URI=$(jq -r '.disks[0].uri' "$W/protect.json")
SF="$SF" A="$A" T="$T" URI="$URI" LOAD="$LOAD" RATE="$RATE" MIB="$MIB" W="$W" OUT="$OUT" python3 - <<'PY'
import json, os, subprocess, threading, time
e = os.environ
sf, a, t, uri = e["SF"], e["A"], e["T"], e["URI"]

def status(where):
    out = subprocess.run([sf, "status", "m", "--dir", where, "--json"], capture_output=True)
    return json.loads(out.stdout)["groups"][0] if out.returncode == 0 else None

def fio(seconds, *more):
    args = ["fio", "--name=w", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k",
            "--time_based", f"--runtime={seconds}", "--output-format=json", *more]
    out = subprocess.run(args, capture_output=True, text=True, cwd=e["W"])
    text = out.stdout
    return json.loads(text[text.index("{"):])["jobs"][0]["write"]

def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]

result = {}
started = time.monotonic()
seeding = {}
load = threading.Thread(target=lambda: seeding.update(fio(5, "--iodepth=16", "--size=256m")))
load.start()
sent, seconds = 0, None
while True:
    g = status(a)
    if g and g["state"] == "protected":
        seconds = time.monotonic() - started
        break
    if g and g.get("resync"):
        sent = max(sent, g["resync"]["sent_bytes"] or 0)
    if time.monotonic() - started > 600:
        raise SystemExit(f"not protected after 10 minutes: {g}")
    time.sleep(0.1)
load.join()
result["seed_seconds"] = round(seconds, 2)
result["seed_data_mib"] = int(e["MIB"]) // 2
result["write_iops_while_seeding"] = round(seeding["iops"])
subprocess.run([sf, "sync", "m", "--dir", a, "--timeout", "300s", "-q"], check=True)
result["write_iops_replicating"] = round(fio(5, "--iodepth=16", "--size=256m")["iops"])
subprocess.run([sf, "sync", "m", "--dir", a, "--timeout", "300s", "-q"], check=True)

rpo, done = [], threading.Event()
def sample():
    while not done.is_set():
        g = status(t)
        if g and g["rpo_seconds"] is not None:
            rpo.append(g["rpo_seconds"])
        time.sleep(0.05)
sampler = threading.Thread(target=sample)
sampler.start()
steady = fio(int(e["LOAD"]), "--iodepth=16", "--size=512m", f"--rate_iops={e['RATE']}")
done.set(); sampler.join()
result["rpo_load_iops"] = round(steady["iops"])
result["rpo_samples"] = len(rpo)
result["rpo_p50_seconds"] = round(quantile(rpo, 0.5), 4)
result["rpo_p99_seconds"] = round(quantile(rpo, 0.99), 4)
subprocess.run([sf, "sync", "m", "--dir", a, "--timeout", "60s", "-q"], check=True)

points = json.loads(subprocess.run([sf, "point", "list", "m", "--dir", t, "--json", "--limit", "100000"],
                                   capture_output=True, check=True).stdout)["points"]
points = [p for p in points if p["usable"]]
result["points"] = len(points)
reader = r'''
import nbd, sys, time
started = time.monotonic()
h = nbd.NBD(); h.connect_uri(sys.argv[1]); h.pread(4096, 1 << 20)
print((time.monotonic() - started) * 1000)
'''
for name, point in (("newest", points[0]["id"]), ("oldest", points[-1]["id"])):
    times = []
    for _ in range(7):
        out = subprocess.run([sf, "point", "uri", f"m.disk@{point}", "--dir", t, "--json"], capture_output=True, check=True)
        u = json.loads(out.stdout)["uri"]
        times.append(float(subprocess.run(["/usr/bin/python3", "-c", reader, u], capture_output=True, check=True).stdout))
    result[f"open_{name}_first_read_ms"] = round(quantile(times, 0.5), 2)
json.dump(result, open(e["OUT"], "w"), indent=2)
print()
for key, value in result.items():
    print(f"  {key:32} {value}")
PY
