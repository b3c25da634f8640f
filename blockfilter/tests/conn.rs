//! One connection, driven by hand: what it may keep waiting, and what must wake it.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockfilter::engine::Clock;
use blockfilter::engine::queue::Op;
use blockfilter::engine::record::SimFiles;
use blockfilter::group::conn::{Conn, Progress, Shared};
use blockfilter::group::volume::{READING_MAX, VolumeEvent};
use rustix::net::SocketType;

#[path = "common/sim.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod sim;

use sim::*;

fn shared() -> Shared {
    Shared::new(vec!["g.d0".into(), "g.d1".into()], 1 << 20)
}

/// A request for `len` bytes from the start.
fn request(command: u8, cookie: u64, len: u32) -> Vec<u8> {
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend([0, 0, 0, command]);
    request.extend(cookie.to_be_bytes());
    request.extend([0; 8]);
    request.extend(len.to_be_bytes());
    request
}

/// Whatever was received is carried out, however many receives it took: the socket may be
/// empty then, and would never call for it again.
#[test]
fn the_last_request_received_in_a_turn_is_answered() {
    for count in 10..24 {
        let files = SimFiles::new();
        let site = site(Path::new("/"), 6);
        site.create(&files);
        let mut volume = site.open(Arc::new(files), "inline").unwrap();
        // One packet a receive.
        let (mut conn, mut client) = connect(SocketType::SEQPACKET, 1, site.clock.mono_us());
        let mut shared = shared();
        for cookie in 0..count {
            client.write_all(&request(3, cookie, 0)).unwrap();
        }
        // As often as the socket calls.
        let readable = |conn: &Conn| {
            let flags = rustix::event::PollFlags::IN;
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(conn.fd(), flags)];
            let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            rustix::event::poll(&mut fds, Some(&now)).unwrap() > 0
        };
        while readable(&conn) {
            assert_eq!(conn.progress(&mut volume, &mut shared, 0), Progress::Input);
        }
        conn.flush_output(0).unwrap();
        let mut answers = vec![0; 1 << 16];
        let got = client.read(&mut answers).unwrap();
        let last = &answers[got - 8..got];
        assert_eq!(last, (count - 1).to_be_bytes(), "{count} requests");
    }
}

/// I24: requests without payload are bounded too.
#[test]
fn a_client_cannot_keep_any_number_of_flushes_waiting() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let mut volume = site.open(Arc::new(files), "inline").unwrap();
    volume.write(0, 0, &[1; 512], false).unwrap();
    let (mut conn, mut client) = connect(SocketType::STREAM, 1, site.clock.mono_us());
    let mut shared = shared();
    for cookie in 0.. {
        assert!(cookie < 20_000, "all of them wait");
        match client.write(&request(3, cookie, 0)) {
            Ok(count) => assert_eq!(count, 28),
            Err(_) => panic!("the socket is full"),
        }
        if conn.progress(&mut volume, &mut shared, 0) == Progress::Output {
            break;
        }
    }
}

/// A client that keeps asking in its handshake and takes the answers gains no time by it.
#[test]
fn a_handshake_has_ten_seconds_whatever_the_client_says() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let mut volume = site.open(Arc::new(files), "inline").unwrap();
    let (ours, mut client) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut shared = Shared::new(vec!["g.d0".into()], 1 << 20);
    let mut conn = Conn::new(1, ours, 0);
    client.write_all(&3u32.to_be_bytes()).unwrap();
    let mut answers = vec![0; 1 << 16];
    for second in 0..=10 {
        let now = second * 1_000_000;
        assert!(!conn.is_stuck(now), "{second} s");
        client.write_all(b"IHAVEOPT\0\0\0\x03\0\0\0\0").unwrap();
        assert_eq!(conn.progress(&mut volume, &mut shared, now), Progress::Input);
        conn.flush_output(now).unwrap();
        assert!(client.read(&mut answers).unwrap() > 0);
    }
    assert!(conn.is_stuck(10_100_000));
}

/// I24: a disk that hangs keeps what was asked of it after the client is gone. However often
/// clients come again, that is bounded, and who was held back goes on when the disk does.
#[test]
fn clients_that_come_and_go_cannot_make_the_reads_of_a_disk_that_hangs_pile_up() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let hangs = Arc::new(AtomicBool::new(true));
    let reads = |op: &Op| matches!(op, Op::Read { .. });
    let mut volume = site
        .open_with(Arc::new(files), |target| Box::new(Hanging::new(target, reads, &hangs)))
        .unwrap();
    let mut shared = shared();
    let (len, now) = (1 << 16, site.clock.mono_us());
    let (mut asked, mut id) = (0, 0);
    let (mut held, mut client) = loop {
        let (mut conn, mut client) = connect(SocketType::STREAM, id, now);
        let ask = |client: &mut UnixStream| client.write_all(&request(0, id, len)).unwrap();
        let mut progress = Progress::Input;
        while progress == Progress::Input {
            ask(&mut client);
            progress = conn.progress(&mut volume, &mut shared, now);
            conn.flush_output(now).unwrap();
            asked += u64::from(len);
        }
        if progress == Progress::Room {
            break (conn, client);
        }
        assert_eq!(progress, Progress::Output);
        conn.close(&mut volume, &mut shared);
        id += 1;
        assert!(asked < 4 * READING_MAX, "{id} clients, {asked} bytes");
    };
    assert!(asked > READING_MAX && id > 2);
    // What is in memory needs no disk.
    volume.write(0, 0, &vec![1; len as usize], false).unwrap();
    let (mut other, mut socket) = connect(SocketType::STREAM, id + 1, now);
    socket.write_all(&request(0, 1, len)).unwrap();
    assert_eq!(other.progress(&mut volume, &mut shared, now), Progress::Input);
    other.flush_output(now).unwrap();
    let (mut answers, mut seen) = (vec![0; 1 << 20], 0);
    while let Ok(count) = socket.read(&mut answers) {
        seen += count;
    }
    assert!(seen > len as usize, "it is answered at once");
    let mut events = Vec::new();
    assert!(!volume.turn(&mut events) && events.is_empty());
    hangs.store(false, Ordering::SeqCst);
    assert!(volume.turn(&mut events), "there is room again");
    assert!(!volume.turn(&mut events), "said once");
    for event in events.drain(..) {
        let VolumeEvent::Read { token, result } = event else { panic!("{event:?}") };
        if token >> 32 == id {
            held.handle_read(token, result);
        }
    }
    let (mut bytes, mut got) = (vec![0; 1 << 20], 0);
    let last = loop {
        let progress = held.progress(&mut volume, &mut shared, now);
        volume.turn(&mut events);
        for event in events.drain(..) {
            let VolumeEvent::Read { token, result } = event else { panic!("{event:?}") };
            held.handle_read(token, result);
        }
        held.flush_output(now).unwrap();
        match client.read(&mut bytes) {
            Ok(count) => got += count,
            Err(_) => break progress,
        }
    };
    assert_eq!(last, Progress::Input);
    assert!(got > len as usize);
}

/// I24: nor can they pile up waits for a journal that hangs.
#[test]
fn nobody_waits_for_what_a_client_asked_that_is_gone() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let mut volume = site.open(Arc::new(files), "inline").unwrap();
    let mut shared = shared();
    let mut clients = Vec::new();
    volume.write(0, 0, &[1; 512], false).unwrap();
    for id in 0..2 {
        let (mut conn, mut client) = connect(SocketType::STREAM, id, 0);
        client.write_all(&request(3, 1, 0)).unwrap();
        assert_eq!(conn.progress(&mut volume, &mut shared, 0), Progress::Input);
        clients.push((conn, client));
    }
    for (conn, _) in clients {
        assert!(volume.is_awaited());
        conn.close(&mut volume, &mut shared);
    }
    assert!(!volume.is_awaited());
}
