//! Large payloads that are received straight into the arena, from several clients at once, in
//! pieces of any size, with other records and commits between them.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use blockfilter::config::{DiskConfig, GroupConfig};
use blockfilter::engine::record::{Rng, SimFiles};
use blockfilter::engine::{Files, Open};
use blockfilter::group::conn::{Conn, Progress, Shared};
use blockfilter::group::volume::{Volume, VolumeEvent};
use blockfilter::journal;
use rustix::net::SocketType;

#[path = "common/sim.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod sim;

use sim::{Site, TestClock, connect};

const CLIENTS: usize = 3;
/// Each client has a region of its own, and the last is of other writers.
const REGION: usize = 3 << 20;
const SIZE: usize = (CLIENTS + 1) * REGION;

fn large_site(files: &SimFiles) -> Site {
    let path = Path::new("/large.img");
    let disk = DiskConfig {
        disk: "d0".parse().unwrap(),
        path: path.into(),
        uuid: uuid::Uuid::new_v4(),
        size_bytes: SIZE as u64,
    };
    let config = GroupConfig {
        group: "g".parse().unwrap(),
        uuid: uuid::Uuid::new_v4(),
        disks: vec![disk],
        journal: "/journal".into(),
        journal_bytes: (2 << 20) + (16 << 22),
        chunk_bytes: 4 << 20,
        arena_bytes: 16 << 20,
        fuse: None,
    };
    files.open(path, Open::CreateNew).unwrap().set_len(SIZE as u64).unwrap();
    journal::create(files, &config, &mut |_, _| Ok(())).unwrap();
    Site { config, clock: Arc::new(TestClock::default()) }
}

/// A client with at most one write under way.
struct Client {
    region: usize,
    conn: Conn,
    socket: UnixStream,
    /// What of the request is not sent yet.
    unsent: Vec<u8>,
    /// Its place and bytes; None: the next one may begin.
    write: Option<(usize, Vec<u8>)>,
}

impl Client {
    fn connect(volume: &mut Volume, shared: &mut Shared, region: usize) -> Self {
        let (mut conn, mut socket) = connect(SocketType::STREAM, region as u64, 0);
        assert_eq!(conn.progress(volume, shared, 0), Progress::Input);
        conn.flush_output(0).unwrap();
        let mut greeting = [0; 28];
        socket.read_exact(&mut greeting).unwrap();
        Self { region, conn, socket, unsent: Vec::new(), write: None }
    }

    fn begin(&mut self, rng: &mut Rng) {
        let unit = if rng.below(6) == 0 { 100 } else { 512 };
        let most = [8 << 10, 300 << 10, 1 << 20, 1 << 20, 2 << 20][rng.below(5) as usize] / unit;
        let len = match rng.below(4) {
            0 => (256 << 10).max(most * unit / 1024 * 1024),
            _ => (rng.below(most) + 1) * unit,
        };
        let at = rng.below((REGION as u64 - len) / unit) * unit;
        let at = self.region * REGION + at as usize;
        let data: Vec<u8> =
            (0..len / 4).flat_map(|_| (rng.below(1 << 32) as u32).to_le_bytes()).collect();
        let fua = u8::from(rng.below(4) == 0);
        let mut request = [[0x25, 0x60, 0x95, 0x13], [0, fua, 0, 1]].concat();
        request.extend(7u64.to_be_bytes());
        request.extend((at as u64).to_be_bytes());
        request.extend((data.len() as u32).to_be_bytes());
        request.extend(&data);
        (self.unsent, self.write) = (request, Some((at, data)));
    }

    /// Sends some bytes, if the socket takes them.
    fn send(&mut self, rng: &mut Rng) {
        let most = [30, 70_000, 200_000, 4 << 20][rng.below(4) as usize];
        let count = self.unsent.len().min(most);
        let sent = self.socket.write(&self.unsent[..count]).unwrap_or(0);
        self.unsent.drain(..sent);
    }

    /// Lets the server work; the write that it answered.
    fn progress(&mut self, volume: &mut Volume, shared: &mut Shared) -> Option<(usize, Vec<u8>)> {
        assert_ne!(self.conn.progress(volume, shared, 0), Progress::Closed);
        self.conn.flush_output(0).unwrap();
        let mut answer = [0; 17];
        match self.socket.read(&mut answer) {
            Ok(16) => {
                assert_eq!(answer[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "no error");
                assert!(self.unsent.is_empty(), "answered before it was sent");
                self.write.take()
            }
            other => {
                assert!(other.is_err(), "{other:?}");
                None
            }
        }
    }
}

fn apply(model: &mut [u8], (at, data): &(usize, Vec<u8>)) {
    model[*at..*at + data.len()].copy_from_slice(data);
}

/// Some of what others do to the group meanwhile.
fn disturb(volume: &mut Volume, site: &Site, model: &mut [u8], rng: &mut Rng) {
    let at = CLIENTS * REGION + rng.below(64) as usize * 4096;
    match rng.below(8) {
        0 => {
            let byte = rng.below(255) as u8;
            if volume.write(0, at as u64, &[byte; 4096], false).is_ok() {
                model[at..at + 4096].fill(byte);
            }
        }
        1 => {
            let _ = volume.mark(b"point", false);
        }
        2 => site.clock.advance(30_000),
        _ => {}
    }
}

/// The server's turn.
fn turn(volume: &mut Volume, clients: &mut [Client]) {
    let mut events = Vec::new();
    volume.turn(&mut events);
    for event in events {
        let VolumeEvent::Durable(token) = event else { panic!("{event:?}") };
        clients[(token >> 32) as usize].conn.handle_durable(token);
    }
}

fn assert_holds(volume: &mut Volume, model: &[u8], about: &str) {
    let content = volume.read_blocking(0, 0, SIZE as u64).unwrap();
    let differs = content.iter().zip(model).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{about}");
}

/// I1, I12: what was answered is there, what was cut off is not, and nothing else changed, through
/// restarts of either side.
#[test]
fn large_payloads_arrive_whole_or_not_at_all_whatever_comes_between() {
    for seed in 1..=4 {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let files = SimFiles::new();
        let site = large_site(&files);
        let mut model = vec![0; SIZE];
        let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
        let mut shared = Shared::new(vec!["g.d0".into()], 8 << 20);
        let mut clients: Vec<Client> =
            (0..CLIENTS).map(|i| Client::connect(&mut volume, &mut shared, i)).collect();
        let mut answered = 0;
        for step in 0..4000 {
            let client = &mut clients[rng.below(CLIENTS as u64) as usize];
            match &client.write {
                None => client.begin(&mut rng),
                // Cut off: the request was not sent to its end.
                Some(_) if !client.unsent.is_empty() && rng.below(200) == 0 => {
                    let region = client.region;
                    let new = Client::connect(&mut volume, &mut shared, region);
                    std::mem::replace(client, new).conn.close(&mut volume, &mut shared);
                }
                Some(_) => {
                    client.send(&mut rng);
                    if let Some(write) = client.progress(&mut volume, &mut shared) {
                        apply(&mut model, &write);
                        answered += 1;
                    }
                }
            }
            disturb(&mut volume, &site, &mut model, &mut rng);
            if rng.below(2) == 0 {
                turn(&mut volume, &mut clients);
            }
            if step % 800 == 799 {
                // As by kill -9: requests that were not answered may be there.
                for client in clients.drain(..) {
                    if let Some(write) = client.write.filter(|_| client.unsent.is_empty()) {
                        let (at, len) = (write.0, write.1.len());
                        let now = volume.read_blocking(0, at as u64, len as u64).unwrap();
                        if now != model[at..at + len] {
                            apply(&mut model, &write);
                        }
                    }
                }
                assert_holds(&mut volume, &model, "before the restart");
                drop(volume);
                volume = site.open(Arc::new(files.clone()), "inline").unwrap();
                assert_holds(&mut volume, &model, "after the restart");
                shared = Shared::new(vec!["g.d0".into()], 8 << 20);
                clients =
                    (0..CLIENTS).map(|i| Client::connect(&mut volume, &mut shared, i)).collect();
            }
        }
        assert!(answered > 100, "only {answered} writes came through");
        for client in clients {
            client.conn.close(&mut volume, &mut shared);
        }
        assert_eq!(shared.staged, 0, "what was reserved is given back");
        let free = (0..20).any(|_| volume.land(9, 0, 1 << 20) == Ok(true));
        assert!(free, "the place is free");
    }
}
