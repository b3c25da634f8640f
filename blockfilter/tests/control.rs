//! The control socket of a filter.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::Duration;

use blockfilter::config::GroupPaths;
use blockfilter::control::{Reply, Request};
use blockfilter::engine::real::RealFiles;
use blockfilter::group;
use blockfilter::names::Lsn;

#[path = "common/sim.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod sim;

/// The next agent may adopt a filter of another version.
#[test]
fn an_older_replicator_claims_no_complete_copy_and_more_fields_are_ignored() {
    let told = Request::ShipFloor { lsn: Lsn(4096), whole: true };
    let mut json = serde_json::to_value(&told).unwrap();
    let fields = json.as_object_mut().unwrap();
    fields.insert("from_the_future".into(), true.into());
    assert_eq!(serde_json::from_value::<Request>(json.clone()).unwrap(), told);
    json.as_object_mut().unwrap().remove("whole");
    let older = Request::ShipFloor { lsn: Lsn(4096), whole: false };
    assert_eq!(serde_json::from_value::<Request>(json).unwrap(), older);
}

/// Requests sent in one go are all answered, in order, also behind one that had to wait.
#[test]
fn requests_behind_one_that_waits_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let site = sim::site(dir.path(), 6);
    site.create(&RealFiles);
    let paths = GroupPaths::new(dir.path(), &site.config.group);
    std::fs::create_dir_all(paths.dir()).unwrap();
    let (ready, is_ready) = channel();
    let (config, at) = (site.config.clone(), paths.clone());
    let filter = std::thread::spawn(move || group::run(&config, &at, || ready.send(()).unwrap()));
    is_ready.recv_timeout(Duration::from_secs(60)).unwrap();
    let mut stream = UnixStream::connect(paths.filter_socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let wait = Request::Wait { after: Some(Lsn(u64::MAX)), ship_floor: None, timeout_ms: 50 };
    let mut text = Vec::new();
    for request in [&wait, &Request::Status, &Request::Commit, &Request::Stop { drain: true }] {
        serde_json::to_writer(&mut text, request).unwrap();
        text.push(b'\n');
    }
    stream.write_all(&text).unwrap();
    let mut lines = BufReader::new(stream).lines();
    let mut next = || -> Reply {
        let line = lines.next().unwrap().expect("an answer within 20 s");
        serde_json::from_str(&line).unwrap()
    };
    assert!(matches!(next(), Reply::Positions(_)));
    assert!(matches!(next(), Reply::Status(_)));
    assert!(matches!(next(), Reply::Positions(_)));
    assert!(matches!(next(), Reply::Stopped));
    filter.join().unwrap().unwrap();
}
