//! kill -9 of everything between the disk and the replica, at random, while it
//! is being written: the stream resumes where the target is durable, with no
//! gap and no repeat, and every point stays a prefix.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use e2e::oracle::History;
use e2e::points::{check, check_many};
use e2e::process::kill_and_wait;
use e2e::site::Site;
use e2e::wait::Deadline;
use e2e::writer::{Load, StopOnDrop, run};
use e2e::{Rng, wait_until};

const DISKS: [&str; 2] = ["a", "b"];

struct Setup {
    site: Site,
    load: Load,
    history: History,
    stop: AtomicBool,
    done: AtomicU64,
}

fn setup(name: &str, seed: u64, size: u64, more: &[&str]) -> Setup {
    let site = Site::start(name);
    let images: Vec<_> =
        (0..2).map(|d| site.image(&format!("{}.img", DISKS[d]), d, size)).collect();
    let disks: Vec<(&str, &Path)> =
        DISKS.iter().copied().zip(images.iter().map(|p| p.as_path())).collect();
    let uris = site.protect("g", &disks, more);
    let rest = Duration::from_millis(2);
    let patience = Duration::from_secs(60);
    let load = Load { uris, writers: 3, seed, requests: u64::MAX, rest, patience };
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    Setup { site, load, history: History::stamped(), stop, done }
}

#[test]
fn the_stream_survives_kills_of_replicator_target_filter_and_agent() {
    let seed = e2e::seed("kill stream");
    let mut rng = Rng::new(seed);
    let mut s = setup("stream", seed, 12 << 20, &[]);
    let mut killed = [0; 4];
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&s.stop);
        let writers = scope.spawn(|| run(&s.load, &s.history, &s.stop, &s.done));
        for round in 0..16 {
            wait_for_answers(&s.done, &s.stop, 30 + rng.below(250));
            // The first ones hit the seed.
            let role = if round < 3 { round % 2 } else { rng.below(4) as usize };
            killed[role] += 1;
            match role {
                0 => kill_role(&s.site, "replicator"),
                1 => {
                    s.site.target = None;
                    s.site.start_target();
                }
                2 => kill_role(&s.site, "filter"),
                _ => {
                    s.site.agent = None;
                    s.site.start_agent();
                }
            }
        }
        wait_for_answers(&s.done, &s.stop, 200);
        s.stop.store(true, Ordering::SeqCst);
        writers.join().unwrap().unwrap();
    });
    println!("kills of replicator, target, filter, agent: {killed:?}");
    let end = s.history.now();
    s.site.wait_protected("g");
    s.site.at_agent(&["sync", "g", "--timeout", "90s"]).ok();
    check(&s.site, "g", &DISKS, &s.history, "latest", end);
    check_many(&s.site, "g", &DISKS, &s.history, 20, seed);
}

#[test]
fn a_full_journal_freezes_never_blocks_and_seeds_again_while_old_points_stay() {
    let seed = e2e::seed("freeze");
    let mut s = setup("freeze", seed, 8 << 20, &["--journal-size", "24MiB"]);
    let mut old = String::new();
    let mut old_floor = 0;
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&s.stop);
        let writers = scope.spawn(|| run(&s.load, &s.history, &s.stop, &s.done));
        s.site.wait_protected("g");
        old_floor = s.history.now();
        s.site.at_agent(&["point", "create", "g", "--tag", "before"]).ok();
        s.site.target = None;
        let deadline = Deadline::after(Duration::from_secs(90));
        wait_until("the group to freeze", Duration::from_secs(95), || {
            let state = s.site.group_status("g").unwrap_or_default()["state"].clone();
            assert!(!deadline.passed(), "it does not freeze: {state}");
            (state == "frozen").then_some(())
        });
        // Production goes on.
        wait_for_answers(&s.done, &s.stop, 500);
        s.site.start_target();
        let points = s.site.points("g");
        let tagged = points.iter().find(|p| p["tag"] == "before").expect("the tag is kept");
        old = tagged["id"].as_str().unwrap().to_owned();
        check(&s.site, "g", &DISKS, &s.history, &old, old_floor);
        // A new replicator connects at once; this one may wait a minute by now.
        kill_role(&s.site, "replicator");
        s.site.wait_protected("g");
        wait_for_answers(&s.done, &s.stop, 100);
        s.stop.store(true, Ordering::SeqCst);
        writers.join().unwrap().unwrap();
    });
    let end = s.history.now();
    s.site.at_agent(&["sync", "g", "--timeout", "90s"]).ok();
    check(&s.site, "g", &DISKS, &s.history, "latest", end);
    check(&s.site, "g", &DISKS, &s.history, &old, old_floor);
    check_many(&s.site, "g", &DISKS, &s.history, 16, seed);
}

fn kill_role(site: &Site, role: &str) {
    let pid = site.wait_pid(role, "g", None);
    kill_and_wait(pid);
}

fn wait_for_answers(done: &AtomicU64, stop: &AtomicBool, more: u64) {
    let until = done.load(Ordering::SeqCst) + more;
    wait_until("answers", Duration::from_secs(60), || {
        let ready = done.load(Ordering::SeqCst) >= until || stop.load(Ordering::SeqCst);
        ready.then_some(())
    });
    assert!(!stop.load(Ordering::SeqCst), "the writers stopped");
}

/// Nice values of a process: its session's, if the kernel has such groups, and those of its threads.
fn nice(pid: u32) -> (Option<String>, Vec<String>) {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let process = Path::new("/proc").join(pid.to_string());
    let last = |text: String| text.split_whitespace().next_back().map(str::to_owned);
    let session = read(&process.join("autogroup")).and_then(last);
    let threads = std::fs::read_dir(process.join("task")).unwrap();
    // Behind the name: state, and sixteen fields on the nice value (`proc_pid_stat(5)`).
    let field =
        |stat: String| stat.rsplit(')').next()?.split_whitespace().nth(16).map(str::to_owned);
    let of = |entry: std::io::Result<std::fs::DirEntry>| read(&entry.unwrap().path().join("stat"));
    (session, threads.filter_map(of).filter_map(field).collect())
}

#[test]
fn a_complete_copy_is_in_the_background_and_its_filter_is_not() {
    let site = Site::start("background");
    let image = site.image("a.img", 0, 4 << 20);
    site.protect("g", &[("a", &image)], &[]);
    site.wait_protected("g");
    let ours = nice(std::process::id()).1.remove(0);
    // Who may not take it back leaves its threads alone.
    let change = |nice| rustix::process::setpriority_process(None, nice).is_ok();
    let usual = ours.parse().unwrap();
    let able = std::thread::scope(|s| s.spawn(|| change(19) && change(usual)).join().unwrap());
    for _ in 0..2 {
        let replicator = site.wait_pid("replicator", "g", None);
        wait_until("the copy to be in the background", Duration::from_secs(60), || {
            let (session, threads) = nice(replicator);
            let all = threads.len() > 1 && (!able || threads.iter().all(|nice| nice == "19"));
            (all && session.is_none_or(|nice| nice == "19")).then_some(())
        });
        let (session, threads) = nice(site.wait_pid("filter", "g", None));
        assert!(session.is_none_or(|nice| nice == "0"), "who serves clients is not in it");
        assert!(!threads.is_empty() && threads.iter().all(|nice| *nice == ours), "{threads:?}");
        kill_role(&site, "replicator");
        site.wait_pid("replicator", "g", Some(replicator));
    }
}
