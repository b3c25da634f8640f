//! Every recovery point is an exact prefix of the order of writes, over all disks
//! of its group: old points and new ones, taken while the seed runs, while the
//! stream is cut, and after the writers have stopped.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use e2e::nbd::Client;
use e2e::oracle::{History, Seen};
use e2e::site::Site;
use e2e::writer::{Load, StopOnDrop, run};
use e2e::{Rng, wait_until};
use serde_json::Value;

const DISKS: [&str; 2] = ["data", "log"];

#[test]
fn every_point_is_a_prefix_over_both_disks() {
    let seed = e2e::seed("prefix");
    let clock = e2e::wait::Deadline::after(Duration::from_secs(600));
    let site = Site::start("prefix");
    let images: Vec<_> =
        (0..2).map(|d| site.image(&format!("{}.img", DISKS[d]), d, 16 << 20)).collect();
    let disks: Vec<_> = DISKS.iter().copied().zip(images.iter().map(|p| p.as_path())).collect();
    let uris = site.protect("g", &disks, &[]);
    let history = History::stamped();
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let load = Load {
        uris,
        writers: 3,
        seed,
        requests: u64::MAX,
        rest: Duration::from_millis(3),
        patience: Duration::from_secs(60),
    };
    // A tag and the time at which everything answered before must be in it.
    let mut tags: Vec<(String, u64)> = Vec::new();
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let writers = scope.spawn(|| run(&load, &history, &stop, &done));
        site.wait_protected("g");
        println!("protected after {:?}", clock.elapsed());
        for number in 0..4 {
            wait_for_answers(&done, 400);
            let (tag, floor) = (format!("t{number}"), history.now());
            site.at_agent(&["point", "create", "g", "--tag", &tag]).ok();
            tags.push((tag, floor));
        }
        stop.store(true, Ordering::SeqCst);
        writers.join().unwrap().unwrap();
    });
    let end = history.now();
    println!("{} answers after {:?}", done.load(Ordering::SeqCst), clock.elapsed());
    site.at_agent(&["sync", "g"]).ok();
    println!("synced after {:?}", clock.elapsed());
    let latest = check(&site, &history, "latest", end);
    assert!(latest.visible > 0);
    println!("latest checked after {:?}", clock.elapsed());
    for (tag, floor) in &tags {
        check(&site, &history, &format!("tag:{tag}"), *floor);
    }
    check_many(&site, &history, seed);
}

/// Opens up to thirty points, old and new, oldest first: each holds at least
/// what the one before held.
fn check_many(site: &Site, history: &History, seed: u64) {
    let points: Vec<Value> = site.points("g").into_iter().filter(|p| p["usable"] == true).collect();
    assert!(points.len() >= 5, "only {} points", points.len());
    let mut rng = Rng::new(seed);
    let mut chosen: Vec<usize> = (0..28).map(|_| rng.below(points.len() as u64) as usize).collect();
    chosen.extend([0, points.len() - 1]);
    chosen.sort_unstable();
    chosen.dedup();
    let (mut floor, mut lsn) = (0, 0);
    for index in &chosen {
        let point = &points[*index];
        let at: u64 = point["lsn"].as_str().unwrap().parse().unwrap();
        assert!(at >= lsn, "points are listed in order");
        floor = check(site, history, point["id"].as_str().unwrap(), floor).until;
        lsn = at;
    }
    println!("{} of {} points checked", chosen.len(), points.len());
}

fn check(site: &Site, history: &History, point: &str, floor: u64) -> Seen {
    let read = |disk: &&str| {
        let uri = site.point_uri("g", disk, point);
        Client::connect(&uri, Duration::from_secs(60)).unwrap().read_all().unwrap()
    };
    let data: Vec<Vec<u8>> = DISKS.iter().map(read).collect();
    let disks: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    history.check(&disks, floor).unwrap_or_else(|e| panic!("point {point}: {e}"))
}

fn wait_for_answers(done: &AtomicU64, more: u64) {
    let until = done.load(Ordering::SeqCst) + more;
    wait_until("answers", Duration::from_secs(60), || {
        (done.load(Ordering::SeqCst) >= until).then_some(())
    });
}
