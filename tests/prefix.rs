//! Every recovery point is an exact prefix of the order of writes, over all disks
//! of its group: old points and new ones, those of the seed's end and tagged
//! ones, while several writers write to both disks.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use e2e::oracle::History;
use e2e::points::{check, check_many, read};
use e2e::site::Site;
use e2e::wait_until;
use e2e::writer::{Load, StopOnDrop, run};

const DISKS: [&str; 2] = ["data", "log"];

#[test]
fn every_point_is_a_prefix_over_both_disks() {
    let seed = e2e::seed("prefix");
    let site = Site::start("prefix");
    let images: Vec<_> =
        (0..2).map(|d| site.image(&format!("{}.img", DISKS[d]), d, 16 << 20)).collect();
    let disks: Vec<_> = DISKS.iter().copied().zip(images.iter().map(|p| p.as_path())).collect();
    let uris = site.protect("g", &disks, &[]);
    let history = History::stamped();
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let rest = Duration::from_millis(2);
    let patience = Duration::from_secs(60);
    let load = Load { uris, writers: 3, seed, requests: u64::MAX, rest, patience };
    // A tag and the time at which everything answered before must be in it.
    let mut tags: Vec<(String, u64)> = Vec::new();
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let writers = scope.spawn(|| run(&load, &history, &stop, &done));
        site.wait_protected("g");
        for number in 0..4 {
            wait_for_answers(&done, 500);
            let (tag, floor) = (format!("t{number}"), history.now());
            site.at_agent(&["point", "create", "g", "--tag", &tag]).ok();
            tags.push((tag, floor));
        }
        stop.store(true, Ordering::SeqCst);
        writers.join().unwrap().unwrap();
    });
    let end = history.now();
    site.at_agent(&["sync", "g"]).ok();
    let latest = check(&site, "g", &DISKS, &history, "latest", end);
    assert!(latest.visible > 0);
    for (tag, floor) in &tags {
        check(&site, "g", &DISKS, &history, &format!("tag:{tag}"), *floor);
    }
    assert!(check_many(&site, "g", &DISKS, &history, 30, seed) >= 5);
    // The images themselves, once they are plain again, equal the latest point.
    let replica: Vec<Vec<u8>> =
        DISKS.iter().map(|disk| read(&site.point_uri("g", disk, "latest"))).collect();
    site.at_agent(&["unprotect", "g"]).ok();
    for (image, replica) in images.iter().zip(&replica) {
        assert!(std::fs::read(image).unwrap() == *replica, "{} differs", image.display());
    }
    println!("{} answers", done.load(Ordering::SeqCst));
}

#[test]
fn a_write_on_one_disk_answered_before_one_on_another_is_never_missing() {
    let site = Site::start("ping-pong");
    let images: Vec<_> =
        (0..2).map(|d| site.image(&format!("{}.img", DISKS[d]), d, 2 << 20)).collect();
    let disks: Vec<_> = DISKS.iter().copied().zip(images.iter().map(|p| p.as_path())).collect();
    let uris = site.protect("g", &disks, &[]);
    site.wait_protected("g");
    let mut clients: Vec<_> = uris
        .iter()
        .map(|uri| e2e::nbd::Client::connect(uri, Duration::from_secs(60)).unwrap())
        .collect();
    // Disk A gets n, and only when that is answered disk B gets n.
    for n in 1..=3000_u64 {
        let mut sector = [0; 512];
        sector[..8].copy_from_slice(&n.to_le_bytes());
        for client in &mut clients {
            client.write(0, &sector, n % 50 == 0).unwrap();
        }
    }
    site.at_agent(&["sync", "g"]).ok();
    let points = site.points("g");
    let mut before = 0;
    for point in points.iter().filter(|p| p["usable"] == true) {
        let id = point["id"].as_str().unwrap();
        let n = |disk: &str| {
            let uri = site.point_uri("g", disk, id);
            let mut client = e2e::nbd::Client::connect(&uri, Duration::from_secs(60)).unwrap();
            let mut sector = [0; 512];
            client.read(0, &mut sector).unwrap();
            u64::from_le_bytes(sector[..8].try_into().unwrap())
        };
        let (a, b) = (n("data"), n("log"));
        if b > 3000 {
            continue; // What was there before the first of these writes.
        }
        assert!(a == b || a == b + 1, "{id}: {a} on one disk and {b} on the other");
        assert!(a >= before, "{id}: back from {before} to {a}");
        before = a;
    }
    assert_eq!(before, 3000, "the newest point has the last write");
}

fn wait_for_answers(done: &AtomicU64, more: u64) {
    let until = done.load(Ordering::SeqCst) + more;
    wait_until("answers", Duration::from_secs(60), || {
        (done.load(Ordering::SeqCst) >= until).then_some(())
    });
}
