//! A group over any files, driven by hand, and the model that it is held against.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![allow(unreachable_pub, reason = "a part of one test")]

use blockfilter::block::ZeroFlags;
use blockfilter::config::{DiskConfig, GroupConfig};
use blockfilter::crc32c;
use blockfilter::engine::blocking::Blocking;
use blockfilter::engine::queue::{Done, Engine, Inline, Op, Target};
use blockfilter::engine::record::Rng;
use blockfilter::engine::uring::Uring;
use blockfilter::engine::{Clock, Files, Open};
use blockfilter::group::conn::Conn;
use blockfilter::group::serve::{settle, wait_until};
use blockfilter::group::start::recover;
use blockfilter::group::volume::{Refusal, Volume, VolumeEvent};
use blockfilter::journal;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub const DISKS: usize = 2;
pub const DISK: u64 = 256 * 512;

/// Time that moves only when a test says so: by hand, or so far with each look.
#[derive(Debug, Default)]
pub struct TestClock {
    now: AtomicU64,
    /// How far each look moves it, microseconds.
    pub step: AtomicU64,
}

impl TestClock {
    pub fn advance(&self, us: u64) {
        self.now.fetch_add(us, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn mono_us(&self) -> u64 {
        self.now.fetch_add(self.step.load(Ordering::SeqCst), Ordering::SeqCst)
    }
    fn wall_us(&self) -> u64 {
        1_700_000_000_000_000 + self.mono_us()
    }
}

pub struct Site {
    pub config: GroupConfig,
    pub clock: Arc<TestClock>,
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.config.arena_path());
    }
}

pub fn site(dir: &Path, chunks: u64) -> Site {
    let disk = |i: usize| DiskConfig {
        disk: format!("d{i}").parse().unwrap(),
        path: dir.join(format!("d{i}.img")),
        uuid: uuid::Uuid::new_v4(),
        size_bytes: DISK,
    };
    let config = GroupConfig {
        group: "g".parse().unwrap(),
        uuid: uuid::Uuid::new_v4(),
        disks: (0..DISKS).map(disk).collect(),
        journal: dir.join("journal"),
        journal_bytes: (2 << 20) + (chunks << 20),
        chunk_bytes: 1 << 20,
        arena_bytes: 2 << 20,
        fuse: None,
    };
    Site { config, clock: Arc::new(TestClock::default()) }
}

impl Site {
    pub fn create(&self, files: &dyn Files) {
        for disk in &self.config.disks {
            let file = files.open(&disk.path, Open::CreateNew).unwrap();
            file.set_len(DISK).unwrap();
            file.sync_data().unwrap();
        }
        journal::create(files, &self.config, &mut |_, _| Ok(())).unwrap();
    }

    pub fn open(&self, files: Arc<dyn Files>, engine: &str) -> Result<Volume, String> {
        self.open_with(files, |target| match engine {
            "inline" => Box::new(Inline::new(target).unwrap()),
            "blocking" => Box::new(Blocking::new(&target, "test").unwrap()),
            _ => Box::new(Uring::new(&target).unwrap()),
        })
    }

    pub fn open_with(
        &self,
        files: Arc<dyn Files>,
        engine: impl FnOnce(Arc<Target>) -> Box<dyn Engine>,
    ) -> Result<Volume, String> {
        let journal = files.open(&self.config.journal, Open::Direct).unwrap();
        let disks = self.config.disks.iter();
        let disks = disks.map(|d| files.open(&d.path, Open::ReadWrite).unwrap()).collect();
        let marker = self.config.journal.with_file_name("unjournaled");
        let now = self.clock.mono_us();
        let parts =
            recover(&self.config, files, journal, disks, marker, now).map_err(|e| e.to_string())?;
        let engine = engine(parts.target.clone());
        let path = self.config.arena_path();
        let clock = self.clock.clone();
        let (filter, overlays) = (parts.filter, parts.overlays);
        let mut volume =
            Volume::new(filter, overlays, parts.disks, parts.target, engine, clock, path);
        settle(&mut volume).unwrap();
        Ok(volume)
    }

    /// As after a power cut: the memory is gone.
    pub fn lose_memory(&self) {
        let _ = std::fs::remove_file(self.config.arena_path());
    }
}

/// Disks that do not carry out some operations while they hang.
#[derive(Debug)]
pub struct Hanging {
    inner: Inline,
    which: fn(&Op) -> bool,
    hangs: Arc<AtomicBool>,
    kept: Vec<Op>,
}

impl Hanging {
    pub fn new(target: Arc<Target>, which: fn(&Op) -> bool, hangs: &Arc<AtomicBool>) -> Self {
        let inner = Inline::new(target).unwrap();
        Self { inner, which, hangs: hangs.clone(), kept: Vec::new() }
    }
}

impl Engine for Hanging {
    fn submit(&mut self, op: Op) {
        match (self.which)(&op) && self.hangs.load(Ordering::SeqCst) {
            true => self.kept.push(op),
            false => self.inner.submit(op),
        }
    }
    fn reap(&mut self, done: &mut Vec<Done>) {
        if !self.hangs.load(Ordering::SeqCst) {
            self.kept.drain(..).for_each(|op| self.inner.submit(op));
        }
        self.inner.reap(done);
    }
    fn clear(&mut self) {
        self.inner.clear();
    }
    fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd()
    }
    fn name(&self) -> String {
        "hanging".into()
    }
}

/// A connection over a socket of this kind, its handshake for the first disk sent, and the
/// client's end.
pub fn connect(kind: rustix::net::SocketType, id: u64, now: u64) -> (Conn, UnixStream) {
    let flags = rustix::net::SocketFlags::NONBLOCK | rustix::net::SocketFlags::CLOEXEC;
    let unix = rustix::net::AddressFamily::UNIX;
    let (ours, theirs) = rustix::net::socketpair(unix, kind, flags, None).unwrap();
    let mut client = UnixStream::from(theirs);
    let name = [&4u32.to_be_bytes(), b"g.d0".as_slice()].concat();
    let hello = [&3u32.to_be_bytes(), b"IHAVEOPT".as_slice(), &1u32.to_be_bytes(), &name];
    client.write_all(&hello.concat()).unwrap();
    (Conn::new(id, ours.into(), now), client)
}

/// The disks as plain bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Model(pub Vec<Vec<u8>>);

impl Model {
    pub fn new() -> Self {
        Self(vec![vec![0; DISK as usize]; DISKS])
    }
    pub fn hash(&self) -> u64 {
        let crc = |d: &Vec<u8>| u64::from(crc32c::crc32c(d));
        self.0.iter().fold(7, |h: u64, d| h.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ crc(d))
    }
}

#[derive(Clone, Debug)]
pub enum Act {
    Write { disk: u8, offset: u64, data: Vec<u8>, fua: bool },
    Zero { disk: u8, offset: u64, len: u64, trim: bool },
    Flush,
    Wait(u64),
}

pub fn random_act(rng: &mut Rng, stamp: u64) -> Act {
    let disk = rng.below(DISKS as u64) as u8;
    let unit = if rng.below(8) == 0 { 100 } else { 512 };
    let offset = rng.below(DISK / unit - 1) * unit;
    let most = if rng.below(6) == 0 { 80 * 512 } else { 12 * 512 };
    let len = ((rng.below(most / unit) + 1) * unit).min(DISK - offset);
    match rng.below(20) {
        0..=11 => {
            let mut data = vec![0; len as usize];
            for (i, chunk) in data.chunks_mut(8).enumerate() {
                let word = (stamp << 16 | (i as u64 & 0xffff)).to_le_bytes();
                chunk.copy_from_slice(&word[..chunk.len()]);
            }
            Act::Write { disk, offset, data, fua: rng.below(8) == 0 }
        }
        12..=14 => Act::Zero { disk, offset, len, trim: rng.below(2) == 0 },
        15..=16 => Act::Flush,
        _ => Act::Wait(rng.below(150_000)),
    }
}

pub fn until<T>(volume: &mut Volume, mut act: impl FnMut(&mut Volume) -> Result<T, Refusal>) -> T {
    let mut found = None;
    wait_until(volume, |v| {
        match act(v) {
            Ok(value) => found = Some(value),
            Err(Refusal::Stalled) => {}
            Err(Refusal::Fail(errno)) => panic!("refused: {errno:?}"),
        }
        found.is_some()
    })
    .unwrap();
    found.unwrap()
}

/// Waits until everything admitted is durable; somebody waits for it already.
pub fn settle_all(volume: &mut Volume) {
    let end = volume.positions().admitted;
    wait_until(volume, |v| v.positions().durable >= end).unwrap();
    volume.turn(&mut Vec::<VolumeEvent>::new());
}

/// Carries out an act on both; true if everything before it is durable on return.
pub fn carry_out(volume: &mut Volume, model: &mut Model, clock: &TestClock, act: &Act) -> bool {
    let durable = match act {
        Act::Write { disk, offset, data, fua } => {
            let (mut done, mut end) = (0, 0);
            while done < data.len() {
                let at = offset + done as u64;
                let (n, e) = until(volume, |v| v.write(*disk, at, &data[done..], *fua));
                done += n;
                end = e;
            }
            let from = *offset as usize;
            model.0[usize::from(*disk)][from..from + data.len()].copy_from_slice(data);
            if *fua && !volume.wait_durable(end, 1) {
                settle_all(volume);
            }
            *fua
        }
        Act::Zero { disk, offset, len, trim } => {
            let mut done = 0;
            while done < *len {
                let flags = ZeroFlags::default();
                done += until(volume, |v| v.zero(*disk, offset + done, len - done, flags, *trim)).0;
            }
            let range = *offset as usize..(offset + len) as usize;
            model.0[usize::from(*disk)][range].fill(0);
            false
        }
        Act::Flush => {
            if !volume.flush(2) {
                settle_all(volume);
            }
            true
        }
        Act::Wait(us) => {
            clock.advance(*us);
            false
        }
    };
    volume.turn(&mut Vec::new());
    durable
}

pub fn content(volume: &mut Volume) -> Model {
    let mut disks = Vec::new();
    for d in 0..DISKS {
        disks.push(volume.read_blocking(d as u8, 0, DISK).unwrap());
    }
    Model(disks)
}

pub fn stripe(offset: u64, byte: u8) -> Act {
    Act::Write { disk: 0, offset, data: vec![byte; 4096], fua: false }
}

/// Turns, a tenth of a second apart.
pub fn turns(volume: &mut Volume, clock: &TestClock, count: usize) -> Vec<VolumeEvent> {
    let mut events = Vec::new();
    for _ in 0..count {
        clock.advance(100_000);
        volume.turn(&mut events);
    }
    events
}
