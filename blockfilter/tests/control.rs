//! The control socket of a filter.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use blockfilter::config::GroupPaths;
use blockfilter::control::{Reply, Request};
use blockfilter::engine::Clock;
use blockfilter::engine::real::{RealClock, RealFiles};
use blockfilter::group;
use blockfilter::names::Lsn;
use blockfilter::nbd::client::{Client, ClientConfig};
use blockfilter::nbd::listen::Address;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

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

const PATIENCE_US: u64 = 20_000_000;

/// A group that runs, and a connection to its control socket.
struct Running {
    site: sim::Site,
    paths: GroupPaths,
    filter: JoinHandle<()>,
    stream: UnixStream,
    lines: std::io::Lines<BufReader<UnixStream>>,
}

impl Running {
    fn start(dir: &std::path::Path) -> Self {
        let site = sim::site(dir, 6);
        site.create(&RealFiles);
        let paths = GroupPaths::new(dir, &site.config.group);
        std::fs::create_dir_all(paths.dir()).unwrap();
        let (ready, is_ready) = channel();
        let (config, at) = (site.config.clone(), paths.clone());
        let run = move || group::run(&config, &at, || ready.send(()).unwrap()).unwrap();
        let filter = std::thread::spawn(run);
        is_ready.recv_timeout(Duration::from_secs(60)).unwrap();
        let stream = UnixStream::connect(paths.filter_socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        Self { site, paths, filter, stream, lines }
    }

    fn ask(&mut self, requests: &[&Request]) {
        let mut text = Vec::new();
        for request in requests {
            serde_json::to_writer(&mut text, request).unwrap();
            text.push(b'\n');
        }
        self.stream.write_all(&text).unwrap();
    }

    fn next(&mut self) -> Reply {
        let line = self.lines.next().unwrap().expect("an answer within 20 s");
        serde_json::from_str(&line).unwrap()
    }

    fn held_cpu(&mut self, wait: &Request) -> Option<u32> {
        self.ask(&[wait]);
        match self.next() {
            Reply::Positions(positions) => positions.held_cpu,
            other => panic!("{other:?}"),
        }
    }
}

/// Requests sent in one go are all answered, in order, also behind one that had to wait.
#[test]
fn requests_behind_one_that_waits_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let mut group = Running::start(dir.path());
    let wait = Request::Wait { after: Some(Lsn(u64::MAX)), ship_floor: None, timeout_ms: 50 };
    group.ask(&[&wait, &Request::Status, &Request::Commit, &Request::Stop { drain: true }]);
    assert!(matches!(group.next(), Reply::Positions(_)));
    assert!(matches!(group.next(), Reply::Status(_)));
    assert!(matches!(group.next(), Reply::Positions(_)));
    assert!(matches!(group.next(), Reply::Stopped));
    group.filter.join().unwrap();
}

/// Ends the load, also if the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Where there are two, while its clients keep it busy.
#[test]
fn who_asks_is_told_of_the_processor_that_a_busy_group_holds() {
    let allowed = sched_getaffinity(None).unwrap();
    let mut two = CpuSet::new();
    (0..CpuSet::MAX_CPU).filter(|c| allowed.is_set(*c)).take(2).for_each(|c| two.set(c));
    // What is started from here on may use no other.
    sched_setaffinity(None, &two).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut group = Running::start(dir.path());
    let address = Address::Unix(group.paths.nbd_socket());
    let export = group.site.config.export(&group.site.config.disks[0].disk);
    let clock: Arc<dyn Clock> = Arc::new(RealClock::new());
    let client = Client::connect(ClientConfig::new(address, &export), clock.clone()).unwrap();
    let ask = Request::Wait { after: None, ship_floor: None, timeout_ms: 0 };
    let stop = AtomicBool::new(false);
    let expected = two.count() == 2;
    assert_eq!(group.held_cpu(&ask), None, "nobody writes");
    std::thread::scope(|scope| {
        let stop = Stop(&stop);
        scope.spawn(|| {
            while !stop.0.load(Ordering::SeqCst) {
                client.write(0, &[7; 4096], false).unwrap();
            }
        });
        let until = clock.mono_us() + PATIENCE_US;
        let held = loop {
            let held = group.held_cpu(&ask);
            if held.is_some() || !expected || clock.mono_us() > until {
                break held;
            }
        };
        assert_eq!(held.is_some(), expected);
        assert!(held.is_none_or(|cpu| two.is_set(cpu as usize)));
    });
    // It has nothing to do any more, not even to answer, and lets go all the same.
    let nothing = Request::Wait { after: Some(Lsn(u64::MAX)), ship_floor: None, timeout_ms: 1_000 };
    assert_eq!([(); 2].map(|()| group.held_cpu(&nothing)), [None; 2]);
    drop(client);
    group.ask(&[&Request::Stop { drain: true }]);
    assert!(matches!(group.next(), Reply::Stopped));
    group.filter.join().unwrap();
}
