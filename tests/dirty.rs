//! `standfast:dirty` as other people's clients see it: what the target may lack, through a first
//! copy, an absence of the target and the death of the filter.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::process::Command;
use std::time::Duration;

use e2e::process::kill_and_wait;
use e2e::proxy::{Line, PassOnDrop, start};
use e2e::run::{finish, require, tool};
use e2e::site::Site;
use e2e::wait_until;

const SIZE: u64 = 8 << 20;
const BLOCK: u64 = 64 << 10;
const LIMIT: Duration = Duration::from_secs(90);

/// Block numbers of what is dirty; None while the disk cannot be reached.
fn map(uri: &str) -> Option<Vec<u64>> {
    let done = tool("nbdinfo", &["--map=standfast:dirty", "--json", uri]);
    let json = (done.code() == 0).then(|| done.json())?;
    let mut dirty = Vec::new();
    let mut at = 0;
    for extent in json.as_array().unwrap() {
        let number = |key: &str| extent[key].as_u64().unwrap();
        assert_eq!(number("offset"), at, "{json}");
        at += number("length");
        match number("type") {
            0 => {}
            1 => dirty.extend(number("offset") / BLOCK..at / BLOCK),
            other => panic!("type {other}: {json}"),
        }
    }
    assert_eq!(at, SIZE, "{json}");
    Some(dirty)
}

#[track_caller]
fn wait_clean(site: &Site, uri: &str) {
    let deadline = e2e::wait::Deadline::after(LIMIT);
    wait_until("all to be clean", LIMIT * 2, || {
        let dirty = map(uri);
        assert!(!deadline.passed(), "{dirty:?}\n{}", site.logs());
        dirty?.is_empty().then_some(())
    });
}

/// Into the first block.
fn write(uri: &str) {
    tool("qemu-io", &["-f", "raw", "-c", "write -P 5 4k 4k", "-c", "flush", uri]).ok();
}

fn nbdsh(uri: &str, script: &str) {
    let mut nbdsh = Command::new("nbdsh");
    // The bindings are the system's, whatever python comes first in PATH.
    nbdsh.env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    nbdsh.args(["-c", &script.replace("URI", uri)]);
    finish(nbdsh, Duration::from_secs(60)).ok();
}

/// Changes parts of blocks 3, 8, 9 and 20, and asks for both contexts at once.
const TWO_CONTEXTS: &str = r#"
B = 65536
h.add_meta_context("standfast:dirty")
h.add_meta_context("base:allocation")
h.connect_uri("URI")
assert h.can_meta_context("standfast:dirty") and h.can_meta_context("base:allocation")
h.pwrite(b"d" * 512, 3 * B + 512)
h.pwrite(b"d" * 2, 9 * B - 1)
h.zero(4096, 20 * B)
h.flush()
def ask(length, offset, flags=0):
    found = {}
    def extents(context, at, entries, err):
        assert context not in found and at == offset
        found[context] = list(zip(entries[::2], entries[1::2]))
    h.block_status(length, offset, extents, flags)
    assert set(found) == {"standfast:dirty", "base:allocation"}, found
    return found
all = ask(h.get_size(), 0)
dirty = [(3 * B, 0), (B, 1), (4 * B, 0), (2 * B, 1), (10 * B, 0), (B, 1), (h.get_size() - 21 * B, 0)]
assert all["standfast:dirty"] == dirty, all
assert sum(length for length, _ in all["base:allocation"]) == h.get_size(), all
assert ask(3 * B, 3 * B + 100)["standfast:dirty"] == [(B - 100, 1), (2 * B + 100, 0)]
for offset, state in ((0, 0), (8 * B, 1)):
    one = ask(h.get_size() - offset, offset, nbd.CMD_FLAG_REQ_ONE)
    assert [len(extents) for extents in one.values()] == [1, 1], one
    assert one["standfast:dirty"][0][1] == state, one
h.shutdown()
"#;

const ONLY_THE_MAP: &str = r#"
h.add_meta_context("standfast:dirty")
h.connect_uri("URI")
assert not h.can_meta_context("base:allocation")
found = []
h.block_status(h.get_size(), 0, lambda context, at, entries, err: found.append((context, entries)))
assert [context for context, _ in found] == ["standfast:dirty"], found
h.shutdown()
"#;

#[test]
fn clean_is_exactly_what_the_target_has_and_nothing_while_that_is_unknown() {
    require(&["nbdinfo", "nbdsh", "qemu-io"]);
    let (mut site, proxy) = start("dirty");
    let _pass = PassOnDrop(&proxy);
    let image = site.image("d.img", 0, SIZE);
    let everything: Vec<u64> = (0..SIZE / BLOCK).collect();
    // Enough to greet and begin, not for 6 MiB of stamps.
    proxy.set(Line::Only(2 << 20));
    let uri = site.protect("g", &[("d", &image)], &["--journal-size", "64MiB"]).remove(0);
    let seeding = || site.group_status("g").is_some_and(|s| s["state"] == "seeding");
    wait_until("the copy to begin", LIMIT, || seeding().then_some(()));
    write(&uri);
    assert_eq!(map(&uri).unwrap(), everything);
    assert!(seeding());
    let listed = tool("nbdinfo", &["--json", &uri]).ok().json();
    let contexts = &listed["exports"][0]["contexts"];
    assert_eq!(*contexts, serde_json::json!(["base:allocation", "standfast:dirty"]), "{listed}");
    proxy.set(Line::Passes);
    site.wait_protected("g");
    wait_clean(&site, &uri);

    site.target = None;
    nbdsh(&uri, TWO_CONTEXTS);
    nbdsh(&uri, ONLY_THE_MAP);
    assert_eq!(map(&uri).unwrap(), [3, 8, 9, 20]);
    site.start_target();
    wait_clean(&site, &uri);

    site.target = None;
    write(&uri);
    assert_eq!(map(&uri).unwrap(), [0]);
    kill_and_wait(site.wait_pid("filter", "g", None));
    let after = wait_until("the next filter", LIMIT, || map(&uri));
    assert_eq!(after, everything, "what the dead one knew is gone");
    site.start_target();
    // A new one connects at once; this one may wait longer by now.
    kill_and_wait(site.wait_pid("replicator", "g", None));
    wait_clean(&site, &uri);
}
