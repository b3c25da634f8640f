//! A line between agent and target that is cut, goes silent or slows down at random
//! moments of a disk in use: the stream resumes with no gap and no repeat, and
//! while nothing gets through, status says how much and how old.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use e2e::oracle::History;
use e2e::points::{check, check_many};
use e2e::proxy::{Line, PassOnDrop, Proxy, start};
use e2e::site::Site;
use e2e::wait::Deadline;
use e2e::writer::{Load, StopOnDrop, run};
use e2e::{Rng, wait_until};
use serde_json::Value;

const DISKS: [&str; 2] = ["a", "b"];

#[test]
fn the_stream_survives_a_line_that_is_cut_silent_and_slow() {
    let seed = e2e::seed("network");
    let mut rng = Rng::new(seed);
    let (site, proxy) = start("network");
    let began = Deadline::after(Duration::ZERO);
    let images: Vec<_> =
        (0..2).map(|d| site.image(&format!("{}.img", DISKS[d]), d, 12 << 20)).collect();
    let disks: Vec<(&str, &Path)> =
        DISKS.iter().copied().zip(images.iter().map(|p| p.as_path())).collect();
    // Room for all that is written: an overflow would cost a copy of its own.
    let uris = site.protect("g", &disks, &["--journal-size", "512MiB"]);
    let (rest, patience) = (Duration::from_millis(8), Duration::from_secs(60));
    let load = Load { uris, writers: 3, seed, requests: u64::MAX, rest, patience };
    let history = History::stamped();
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let _pass = PassOnDrop(&proxy);
        let writers = scope.spawn(|| run(&load, &history, &stop, &done));
        // Cuts are few: each try that fails doubles the wait before the next.
        let mut faults = [0, 1, 2, 0, 1, 2];
        for i in (1..faults.len()).rev() {
            faults.swap(i, rng.below(i as u64 + 1) as usize);
        }
        println!("faults: {faults:?}");
        for (round, fault) in faults.into_iter().enumerate() {
            wait_connected(&site);
            println!("{:?}: fault {fault}", began.elapsed());
            wait_for_answers(&done, &stop, 30 + rng.below(100));
            match fault {
                0 => proxy.cut(),
                1 => proxy.set(Line::Holds),
                _ => proxy.set(Line::Slow(Duration::from_millis(5 + rng.below(60)))),
            }
            wait_for_answers(&done, &stop, 50 + rng.below(150));
            // A silent line comes back with what it held, or is found dead.
            if fault == 1 && round % 2 == 0 {
                proxy.cut();
            }
            proxy.set(Line::Passes);
        }
        site.wait_protected("g");
        println!("{:?}: protected", began.elapsed());
        status_is_honest_while_nothing_gets_through(&site, &proxy, &done, &stop);
        proxy.set(Line::Passes);
        wait_for_answers(&done, &stop, 200);
        stop.store(true, Ordering::SeqCst);
        writers.join().unwrap().unwrap();
    });
    let end = history.now();
    site.wait_protected("g");
    site.at_agent(&["sync", "g", "--timeout", "60s"]).ok();
    check(&site, "g", &DISKS, &history, "latest", end);
    check_many(&site, "g", &DISKS, &history, 20, seed);
    assert_eq!(seeds(&site), 1, "no cut cost a new copy");
}

fn status_is_honest_while_nothing_gets_through(
    site: &Site,
    proxy: &Proxy,
    done: &AtomicU64,
    stop: &AtomicBool,
) {
    wait_until("an RPO at both ends", Duration::from_secs(30), || {
        rpo(&site.group_status("g")?).and(rpo(&site.replica_status("g")?))
    });
    proxy.set(Line::Holds);
    // Three writers: what is answered last was asked for after the line went silent.
    wait_for_answers(done, stop, 20);
    let missing = Deadline::after(Duration::ZERO);
    let mut backlog = 0;
    for _ in 0..4 {
        wait_for_answers(done, stop, 200);
        let least = missing.elapsed().as_secs_f64();
        let (source, replica) =
            (site.group_status("g").unwrap(), site.replica_status("g").unwrap());
        for status in [&source, &replica] {
            let shown = rpo(status).expect("it was known before");
            assert!(shown >= least, "RPO {shown} s, but {least} s are missing: {status}");
        }
        let now = source["backlog_bytes"].as_u64().unwrap();
        assert!(now > backlog, "the backlog grows: {now} after {backlog}");
        backlog = now;
    }
}

fn rpo(status: &Value) -> Option<f64> {
    status["rpo_seconds"].as_f64()
}

fn wait_connected(site: &Site) {
    wait_until("a session", Duration::from_secs(40), || {
        (site.replica_status("g")?["link"]["connected"] == true).then_some(())
    });
}

fn wait_for_answers(done: &AtomicU64, stop: &AtomicBool, more: u64) {
    let until = done.load(Ordering::SeqCst) + more;
    wait_until("answers", Duration::from_secs(60), || {
        let ready = done.load(Ordering::SeqCst) >= until || stop.load(Ordering::SeqCst);
        ready.then_some(())
    });
    assert!(!stop.load(Ordering::SeqCst), "the writers stopped");
}

/// Copies that were started, by the manifest in force.
fn seeds(site: &Site) -> usize {
    let group = site.target_dir().join("groups/g");
    let current = std::fs::read_to_string(group.join("CURRENT")).unwrap();
    let text = std::fs::read_to_string(group.join(current.trim())).unwrap();
    let manifest: Value = serde_json::from_str(text.split_once('\n').unwrap().1).unwrap();
    manifest["eras"].as_array().unwrap().len()
}
