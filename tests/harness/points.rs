//! Opening points at the target and holding them against the oracle.

use std::time::Duration;

use serde_json::Value;

use crate::Rng;
use crate::nbd::Client;
use crate::oracle::{History, Seen};
use crate::site::Site;

/// Opens one point of all `disks` and checks that it is a prefix that includes
/// everything answered before `floor`.
#[track_caller]
pub fn check(
    site: &Site,
    group: &str,
    disks: &[&str],
    history: &History,
    point: &str,
    floor: u64,
) -> Seen {
    let data: Vec<Vec<u8>> =
        disks.iter().map(|disk| read(&site.point_uri(group, disk, point))).collect();
    let disks: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    history.check(&disks, floor).unwrap_or_else(|e| panic!("point {point}: {e}"))
}

/// Everything that an export holds.
#[track_caller]
pub fn read(uri: &str) -> Vec<u8> {
    let mut client = Client::connect(uri, Duration::from_secs(60)).unwrap();
    client.read_all().unwrap()
}

/// Opens up to `count` usable points chosen by `seed`, the oldest and the newest
/// among them, oldest first: each holds at least what the one before held, and
/// their positions grow strictly. Returns how many were opened.
#[track_caller]
pub fn check_many(
    site: &Site,
    group: &str,
    disks: &[&str],
    history: &History,
    count: u64,
    seed: u64,
) -> usize {
    let points: Vec<Value> =
        site.points(group).into_iter().filter(|p| p["usable"] == true).collect();
    assert!(points.len() >= 2, "only {} usable points", points.len());
    let lsn = |point: &Value| -> u64 { point["lsn"].as_str().unwrap().parse().unwrap() };
    for pair in points.windows(2) {
        assert!(lsn(&pair[0]) < lsn(&pair[1]), "no repeat: {} {}", pair[0], pair[1]);
    }
    let mut rng = Rng::new(seed);
    let mut chosen: Vec<usize> =
        (2..count).map(|_| rng.below(points.len() as u64) as usize).collect();
    chosen.extend([0, points.len() - 1]);
    chosen.sort_unstable();
    chosen.dedup();
    let mut floor = 0;
    for index in &chosen {
        let id = points[*index]["id"].as_str().unwrap();
        floor = check(site, group, disks, history, id, floor).until;
    }
    println!("{} of {} points checked", chosen.len(), points.len());
    chosen.len()
}
