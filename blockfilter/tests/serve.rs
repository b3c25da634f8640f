//! A filter process's loop with real sockets, in a thread: large payloads that stall,
//! the control socket, a clean stop.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use blockfilter::config::{DiskConfig, GroupConfig, GroupPaths};
use blockfilter::control::{Client, Reply, Request};
use blockfilter::engine::real::RealFiles;
use blockfilter::group;
use blockfilter::journal;
use blockfilter::names::Lsn;

const DISK: u64 = 64 << 20;
const WAIT: Duration = Duration::from_secs(30);

struct Filter {
    config: GroupConfig,
    paths: GroupPaths,
    thread: Option<JoinHandle<()>>,
}

fn start(dir: &Path) -> Filter {
    let group = "g".parse().unwrap();
    let paths = GroupPaths::new(dir, &group);
    std::fs::create_dir_all(paths.dir()).unwrap();
    let path = dir.join("d.img");
    std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    let disk = DiskConfig {
        disk: "d".parse().unwrap(),
        path,
        uuid: uuid::Uuid::new_v4(),
        size_bytes: DISK,
    };
    let config = GroupConfig {
        group,
        uuid: uuid::Uuid::new_v4(),
        disks: vec![disk],
        journal: paths.journal(),
        journal_bytes: 34 << 20,
        chunk_bytes: 4 << 20,
        arena_bytes: 8 << 20,
        fuse: None,
    };
    journal::create(&RealFiles, &config, &mut |_, _| Ok(())).unwrap();
    let mut filter = Filter { config, paths, thread: None };
    filter.run();
    filter
}

impl Filter {
    fn run(&mut self) {
        let (config, paths) = (self.config.clone(), self.paths.clone());
        let (ready, is_ready) = std::sync::mpsc::channel();
        self.thread = Some(std::thread::spawn(move || {
            group::run(&config, &paths, || ready.send(()).unwrap()).unwrap();
        }));
        is_ready.recv_timeout(WAIT).unwrap();
    }

    fn ask(&self, request: &Request) -> Reply {
        let mut client = Client::connect(&self.paths.filter_socket()).unwrap();
        client.ask(request, WAIT).unwrap()
    }

    fn stop(&mut self, drain: bool) {
        assert_eq!(self.ask(&Request::Stop { drain }), Reply::Stopped);
        self.thread.take().unwrap().join().unwrap();
    }

    /// A connection in transmission, by the `nbd` crate's client.
    fn connect(&self) -> UnixStream {
        let mut stream = UnixStream::connect(self.paths.nbd_socket()).unwrap();
        stream.set_read_timeout(Some(WAIT)).unwrap();
        stream.set_write_timeout(Some(WAIT)).unwrap();
        let export = nbd::client::handshake(&mut stream, b"g.d").unwrap();
        assert_eq!(export.size, DISK);
        stream
    }
}

fn header(kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 0];
    for part in [&kind.to_be_bytes()[..], &cookie.to_be_bytes(), &offset.to_be_bytes()] {
        bytes.extend_from_slice(part);
    }
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

fn expect_ok(stream: &mut UnixStream, cookie: u64) {
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4], "no error");
    assert_eq!(reply[8..], cookie.to_be_bytes());
}

/// Ruling 11: half-received payloads hold no journal position, no arena, and at most
/// their budget; small writes of others go on, and all finish when they are complete.
#[test]
fn half_received_payloads_block_nobody_and_finish_later() {
    let dir = tempfile::tempdir().unwrap();
    let mut filter = start(dir.path());
    let len: u32 = 12 << 20;
    let half = len as usize / 2;
    let payload = |i: usize| vec![i as u8 + 1; half];
    let mut large: Vec<UnixStream> = (0..4).map(|_| filter.connect()).collect();
    // Each from a thread of its own: those without budget are not read from.
    std::thread::scope(|scope| {
        let mut first = large.remove(0);
        first.write_all(&header(1, 0, 0, len)).unwrap();
        first.write_all(&payload(0)).unwrap();
        for (i, stream) in large.iter_mut().enumerate() {
            scope.spawn(move || {
                let i = i + 1;
                stream.write_all(&header(1, i as u64, i as u64 * u64::from(len), len)).unwrap();
                stream.write_all(&payload(i)).unwrap();
                stream.write_all(&payload(i)).unwrap();
                expect_ok(stream, i as u64);
            });
        }
        let mut small = filter.connect();
        for i in 0..100u64 {
            small.write_all(&header(1, i, (60 << 20) + i * 4096, 4096)).unwrap();
            small.write_all(&[7; 4096]).unwrap();
            expect_ok(&mut small, i);
        }
        small.write_all(&header(3, 1000, 0, 0)).unwrap();
        expect_ok(&mut small, 1000);
        first.write_all(&payload(0)).unwrap();
        expect_ok(&mut first, 0);
    });
    filter.stop(true);
    let image = std::fs::read(dir.path().join("d.img")).unwrap();
    for i in 0..4usize {
        let range = i * len as usize..(i + 1) * len as usize;
        assert!(image[range].iter().all(|b| *b == i as u8 + 1), "payload {i}");
    }
}

/// I12: a payload that its connection did not finish never happens.
#[test]
fn an_unfinished_write_of_a_dead_connection_never_happens() {
    let dir = tempfile::tempdir().unwrap();
    let mut filter = start(dir.path());
    for cut in [0, 1, 511, 4096, 65_535, 65_536, 200_000] {
        let mut stream = filter.connect();
        stream.write_all(&header(1, 1, 0, 256 << 10)).unwrap();
        stream.write_all(&vec![9; cut]).unwrap();
        drop(stream);
    }
    let mut small = filter.connect();
    small.write_all(&header(3, 5, 0, 0)).unwrap();
    expect_ok(&mut small, 5);
    filter.stop(true);
    assert!(std::fs::read(dir.path().join("d.img")).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn the_control_socket_tells_positions_and_a_stop_without_drain_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    let mut filter = start(dir.path());
    let Reply::SeedBegun { s } = filter.ask(&Request::BeginSeed) else { panic!() };
    let mut stream = filter.connect();
    stream.write_all(&header(1, 1, 4096, 4096)).unwrap();
    stream.write_all(&[3; 4096]).unwrap();
    expect_ok(&mut stream, 1);
    let tag = Some("before".parse().unwrap());
    let Reply::Marked { lsn, incarnation } = filter.ask(&Request::Mark { tag, app: false }) else {
        panic!()
    };
    assert!(lsn > s && incarnation == 1);
    let Reply::Positions(positions) = filter.ask(&Request::Commit) else { panic!() };
    assert!(positions.durable >= lsn && positions.checkpoint <= positions.applied);
    let wait = Request::Wait { after: Some(Lsn(0)), ship_floor: None, timeout_ms: 1000 };
    assert!(matches!(filter.ask(&wait), Reply::Positions(_)));
    drop(stream);
    filter.stop(false);
    filter.run();
    let Reply::Status(status) = filter.ask(&Request::Status) else { panic!() };
    assert_eq!(status.positions.incarnation, 1, "nothing was lost");
    let mut stream = filter.connect();
    stream.write_all(&header(0, 2, 4096, 4096)).unwrap();
    expect_ok(&mut stream, 2);
    let mut data = [0; 4096];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(data, [3; 4096]);
    drop(stream);
    filter.stop(true);
    assert!(!filter.config.arena_path().exists(), "a drained group leaves nothing behind");
}
