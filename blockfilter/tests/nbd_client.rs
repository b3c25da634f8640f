//! Our client against our server, nbdkit, and servers that die.
#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(unreachable_pub, dead_code, reason = "shared by several test programs")]
mod common;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use blockfilter::block::{Errno, Export, ExportInfo, Extent, ZeroFlags};
use blockfilter::engine::real::RealClock;
use blockfilter::nbd::client::{Client, ClientConfig, ClientError, Op};
use blockfilter::nbd::file::FileExport;
use blockfilter::nbd::listen::{Address, Listener};
use blockfilter::nbd::server::{FixedExports, ServerConfig, ServerHandle};
use common::{Served, noise};

fn connect(config: ClientConfig) -> Result<Client, ClientError> {
    Client::connect(config, Arc::new(RealClock::new()))
}

fn config(served: &Served) -> ClientConfig {
    ClientConfig::new(Address::Unix(served.socket()), "disk")
}

#[test]
fn everything_works_over_unix_and_tcp() {
    let served = Served::new(48 << 20);
    let tcp = ClientConfig::new(served.tcp().parse().unwrap(), "disk");
    for config in [config(&served), tcp] {
        let client = connect(config).unwrap();
        let info = client.info();
        assert!(info.structured && info.base_allocation && !info.read_only());
        assert_eq!(info.size, 48 << 20);
        let data = noise(20 << 20, 3);
        client.write(12_345, &data, false).unwrap();
        client.write(7, b"stable", true).unwrap();
        client.flush().unwrap();
        let mut back = vec![0; 20 << 20];
        client.read(12_345, &mut back).unwrap();
        assert!(back == data);
        client.zero(12_345, 1 << 20, ZeroFlags::default()).unwrap();
        client.trim(2 << 20, 46 << 20, true).unwrap();
        client.read(0, &mut back).unwrap();
        assert_eq!(&back[7..13], b"stable");
        assert!(back[13..1 << 20].iter().all(|b| *b == 0));
        assert!(back[2 << 20..].iter().all(|b| *b == 0));
        let extents = client.extents(2 << 20, 46 << 20).unwrap();
        assert_eq!(extents, [Extent { len: 46 << 20, hole: true, zero: true }]);
        assert_eq!(client.write(48 << 20, b"x", false), Err(Errno::NoSpc));
        assert_eq!(client.read(48 << 20, &mut [0]), Err(Errno::Inval));
    }
    let mut other = config(&served);
    other.export = "other".to_owned();
    assert!(matches!(connect(other), Err(ClientError::Refused { .. })));
}

#[test]
fn nobody_there_is_an_error_after_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = ClientConfig::new(Address::Unix(dir.path().join("none")), "disk");
    config.connect_timeout = Duration::from_millis(200);
    assert!(matches!(connect(config), Err(ClientError::Io { .. })));
}

#[test]
fn requests_from_many_threads_survive_restarts_of_the_server() {
    let mut served = Served::new(32 << 20);
    let client = connect(config(&served)).unwrap();
    let stop = AtomicBool::new(false);
    let rounds = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (client, stop, rounds) = (client.clone(), &stop, &rounds);
            scope.spawn(move || {
                let base = thread * (8 << 20);
                let mut seed = thread;
                while !stop.load(Ordering::SeqCst) {
                    seed += 4;
                    let len = 512 << (seed % 11);
                    let data = noise(len, seed);
                    let at = base + (seed * 37 % 1000) * 512;
                    client.write(at, &data, false).unwrap();
                    let mut back = vec![0; len];
                    client.read(at, &mut back).unwrap();
                    assert!(back == data, "seed {seed}");
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for restart in 1..=5 {
            while rounds.load(Ordering::SeqCst) < restart * 200 {
                std::thread::yield_now();
            }
            served.start(false, ServerConfig::default());
        }
        while rounds.load(Ordering::SeqCst) < 1500 {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::SeqCst);
    });
}

/// A server that handles connections as `act` says, to test the client alone.
fn scripted(path: &std::path::Path, act: impl Fn(usize, UnixStream) + Send + 'static) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for (n, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            greet(&mut stream);
            act(n, stream);
        }
    });
}

/// The least handshake: no structured replies; 1 MiB, flags FLUSH and FUA.
fn greet(stream: &mut UnixStream) {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header).unwrap();
        let len = u32::from_be_bytes(header[12..].try_into().unwrap());
        stream.read_exact(&mut vec![0; len as usize]).unwrap();
        let option = &header[8..12];
        let magic = 0x0003_e889_0455_65a9u64.to_be_bytes();
        let reply = |kind: u32, data: &[u8]| {
            let len = (data.len() as u32).to_be_bytes();
            [&magic[..], option, &kind.to_be_bytes(), &len, data].concat()
        };
        if option[3] != 7 {
            stream.write_all(&reply(0x8000_0001, &[])).unwrap();
            continue;
        }
        let export = [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0, 13]].concat();
        stream.write_all(&reply(3, &export)).unwrap();
        stream.write_all(&reply(1, &[])).unwrap();
        return;
    }
}

fn request(stream: &mut UnixStream) -> ([u8; 8], u64) {
    let mut header = [0; 28];
    stream.read_exact(&mut header).unwrap();
    let len = u32::from_be_bytes(header[24..].try_into().unwrap());
    if header[7] == 1 {
        stream.read_exact(&mut vec![0; len as usize]).unwrap();
    }
    (header[8..16].try_into().unwrap(), u64::from_be_bytes(header[16..24].try_into().unwrap()))
}

fn answer(stream: &mut UnixStream, cookie: [u8; 8]) {
    let reply = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &cookie].concat();
    stream.write_all(&reply).unwrap();
}

#[test]
fn only_what_was_not_answered_is_sent_again_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (seen, log) = std::sync::mpsc::channel();
    scripted(&path, move |n, mut stream| {
        let count = if n == 0 { 6 } else { 4 };
        let requests: Vec<_> = (0..count).map(|_| request(&mut stream)).collect();
        seen.send(requests.iter().map(|r| r.1).collect::<Vec<u64>>()).unwrap();
        if n == 0 {
            // The second and the fifth are answered, then it dies.
            answer(&mut stream, requests[4].0);
            answer(&mut stream, requests[1].0);
        } else {
            requests.iter().for_each(|r| answer(&mut stream, r.0));
            let _ = stream.read(&mut [0]);
        }
    });
    let client = connect(ClientConfig::new(Address::Unix(path), "disk")).unwrap();
    let (done, answers) = std::sync::mpsc::channel();
    for i in 0..6u64 {
        let done = done.clone();
        let data = vec![i as u8; 4096].into();
        let op = Op::Write { offset: i * 4096, data, fua: false };
        client.submit(op, Box::new(move |result| done.send((i, result)).unwrap()));
    }
    let mut order: Vec<u64> = (0..6).map(|_| answers.recv().unwrap()).map(|a| a.0).collect();
    assert_eq!(order[..2], [4, 1]);
    order.sort_unstable();
    assert_eq!(order, [0, 1, 2, 3, 4, 5]);
    assert_eq!(log.recv().unwrap(), [0, 4096, 8192, 12_288, 16_384, 20_480]);
    assert_eq!(log.recv().unwrap(), [0, 8192, 12_288, 20_480]);
    drop(done);
    assert!(answers.recv().is_err(), "no callback is called twice");
}

#[test]
fn a_request_without_an_answer_fails_after_its_bound() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (keep, kept) = std::sync::mpsc::channel();
    scripted(&path, move |_, stream| keep.send(stream).unwrap());
    let mut config = ClientConfig::new(Address::Unix(path), "disk");
    config.request_timeout = Some(Duration::from_millis(300));
    let client = connect(config).unwrap();
    assert_eq!(client.flush(), Err(Errno::Io));
    drop(kept);
}

#[test]
fn dropping_the_client_answers_everything() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (keep, kept) = std::sync::mpsc::channel();
    scripted(&path, move |_, stream| keep.send(stream).unwrap());
    let client = connect(ClientConfig::new(Address::Unix(path), "disk")).unwrap();
    let (done, answers) = std::sync::mpsc::channel();
    client.submit(Op::Flush, Box::new(move |result| done.send(result).unwrap()));
    drop(client);
    assert_eq!(answers.recv().unwrap(), Err(Errno::Shutdown));
    drop(kept);
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn nbdkit_is_read_with_its_holes_and_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let child = Command::new("nbdkit")
        .args(["-f", "-U", path.to_str().unwrap(), "--filter=error", "sparse-random"])
        .args(["64M", "seed=1", "error-pread-rate=50%", "percent=50"])
        .spawn();
    let _killed = Killed(child.unwrap_or_else(|e| panic!("nbdkit cannot be started: {e}")));
    let client = connect(ClientConfig::new(Address::Unix(path), "")).unwrap();
    let size = client.info().size;
    let mut at = 0;
    while at < size {
        at += client.extents(at, size - at).unwrap().iter().map(|e| e.len).sum::<u64>();
    }
    assert_eq!(at, size);
    let results: Vec<_> = (0..64).map(|i| client.read(i << 20, &mut [0; 4096])).collect();
    assert!(results.contains(&Ok(())) && results.contains(&Err(Errno::Io)));
}

/// An export that asks for whole sectors of those who ask it.
#[derive(Debug)]
struct Sectors(FileExport);

impl Export for Sectors {
    fn info(&self) -> ExportInfo {
        ExportInfo { block_min: 512, ..self.0.info() }
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.0.read(offset, buf)
    }
    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), Errno> {
        self.0.write(offset, data, fua)
    }
    fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno> {
        self.0.zero(offset, len, flags)
    }
    fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        self.0.trim(offset, len, fua)
    }
    fn flush(&self) -> Result<(), Errno> {
        self.0.flush()
    }
    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>, Errno> {
        self.0.extents(offset, len, max)
    }
}

#[test]
fn bytes_can_be_read_and_written_where_sectors_are_preferred() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk"), [0; 4096]).unwrap();
    let export = Sectors(FileExport::open(&dir.path().join("disk"), false).unwrap());
    let exports = Arc::new(FixedExports(vec![("disk".to_owned(), Arc::new(export))]));
    let address = Address::Unix(dir.path().join("s"));
    let listeners = vec![Listener::bind(&address).unwrap()];
    let clock = Arc::new(RealClock::new());
    let _server = ServerHandle::start(listeners, ServerConfig::default(), exports, clock).unwrap();
    let client = connect(ClientConfig::new(address, "disk")).unwrap();
    assert_eq!(client.info().block_min, 1);
    client.write(13, b"byte", false).unwrap();
    let mut back = [0; 4];
    client.read(13, &mut back).unwrap();
    assert_eq!(&back, b"byte");
}
