//! One group's filter over simulated files, driven step by step: the production
//! recovery, filter, volume and journal code, with an engine that carries out
//! operations late and, where nothing orders them, in any order.
//!
//! [`SimGroup`] is one life of the filter process. Its [`Written`] remembers the
//! records in LSN order and what had been promised at which place of the files'
//! log, so that whatever a later life recovers can be judged.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockfilter::block::ZeroFlags;
use blockfilter::config::{DiskConfig, GroupConfig};
use blockfilter::control::Mode;
use blockfilter::engine::queue::{Done, Engine, Op, Target};
use blockfilter::engine::record::{Rng, SimFiles};
use blockfilter::engine::{Clock, Files, Open, read_file};
use blockfilter::group::start::{StartError, recover};
use blockfilter::group::volume::{Refusal, Volume, VolumeEvent};
use blockfilter::journal::create;

/// Bytes of each simulated disk.
pub const DISK: u64 = 256 << 10;
/// Number of disks.
pub const DISKS: usize = 2;

/// A clock that is moved by hand; microseconds.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// Moves it on.
    pub fn advance(&self, us: u64) {
        self.0.fetch_add(us, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn mono_us(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
    fn wall_us(&self) -> u64 {
        1_700_000_000_000_000 + self.mono_us()
    }
}

/// Carries out a few operations each time it is asked for results.
#[derive(Debug)]
struct Late {
    target: Arc<Target>,
    journal: VecDeque<Op>,
    disks: VecDeque<Op>,
    syncs: VecDeque<Op>,
    rng: Rng,
    event: OwnedFd,
}

impl Engine for Late {
    fn submit(&mut self, op: Op) {
        match op {
            Op::JournalWrite { .. } | Op::JournalSync | Op::JournalCommit { .. } => {
                self.journal.push_back(op);
            }
            Op::SyncDisks | Op::WriteSuper(_) | Op::MarkUnjournaled(_) => self.syncs.push_back(op),
            _ => self.disks.push_back(op),
        }
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        for _ in 0..self.rng.below(6) {
            let next = match self.rng.below(3) {
                0 => {
                    // Writes between two syncs reach the file in any order.
                    let is_write = |op: &&Op| matches!(op, Op::JournalWrite { .. });
                    let writes = self.journal.iter().take_while(is_write).count();
                    self.journal.remove(self.rng.below(writes as u64) as usize)
                }
                1 => self.disks.pop_front(),
                _ => self.syncs.pop_front(),
            };
            done.extend(next.map(|op| self.target.execute(op)));
        }
    }

    fn clear(&mut self) {}

    fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn name(&self) -> String {
        "late".into()
    }
}

/// One admitted record.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its LSN.
    pub lsn: u64,
    /// Disk index.
    pub disk: usize,
    /// Byte offset.
    pub offset: u64,
    /// What the range reads as afterwards.
    pub data: Vec<u8>,
}

/// What was durable when the files' log had this length.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    /// Entries in the log.
    pub log_len: usize,
    /// Exclusive end of what is durable.
    pub durable: u64,
    /// What the target was told to hold.
    pub ship_floor: u64,
    /// What the journal keeps.
    pub mode: Mode,
    /// Of the writer.
    pub incarnation: u64,
}

/// Everything written, over all lives.
#[derive(Clone, Debug, Default)]
pub struct Written {
    /// In LSN order.
    pub records: Vec<Record>,
    /// In the order of the log.
    pub promises: Vec<Promise>,
}

impl Written {
    /// The disks with every record below `end`.
    pub fn disks_at(&self, end: u64) -> Vec<Vec<u8>> {
        let mut disks = vec![vec![0; DISK as usize]; DISKS];
        for record in self.records.iter().take_while(|r| r.lsn < end) {
            let at = record.offset as usize;
            disks[record.disk][at..at + record.data.len()].copy_from_slice(&record.data);
        }
        disks
    }

    /// The strongest promise made while the log was at most that long.
    pub fn promised(&self, log_len: usize) -> Option<Promise> {
        self.promises.iter().rev().find(|p| p.log_len <= log_len).copied()
    }

    /// The same history as a life that recovered `[.., end)` knows it.
    pub fn cut(&self, end: u64) -> Self {
        let records = self.records.iter().filter(|r| r.lsn < end).cloned().collect();
        Self { records, promises: Vec::new() }
    }
}

/// One life of a filter.
#[derive(Debug)]
pub struct SimGroup {
    /// The group.
    pub config: GroupConfig,
    /// Its files.
    pub files: SimFiles,
    /// Its volume.
    pub volume: Volume,
    /// What it did.
    pub written: Written,
    clock: Arc<ManualClock>,
    rng: Rng,
    /// Position of the last commit that a target could hold.
    floor: u64,
    /// Requests that are still to come of a client that flushes after every four writes.
    beats: u64,
}

/// A group of small sizes, so that chunks wrap soon. Its arena is a real tmpfs
/// file: [`Arena::drop`] removes it.
pub fn config(id: u128, slots: u64) -> GroupConfig {
    let disk = |number: usize| DiskConfig {
        disk: format!("d{number}").parse().unwrap(),
        path: PathBuf::from(format!("/d{number}")),
        uuid: uuid::Uuid::from_u128(id + 1 + number as u128),
        size_bytes: DISK,
    };
    GroupConfig {
        group: "sim".parse().unwrap(),
        uuid: uuid::Uuid::from_u128(id),
        disks: (0..DISKS).map(disk).collect(),
        journal: PathBuf::from("/journal"),
        journal_bytes: (2 + slots) << 20,
        chunk_bytes: 1 << 20,
        arena_bytes: 2 << 20,
        fuse: None,
    }
}

/// A file system with the group's empty disks and new journal, all durable.
pub fn new_files(config: &GroupConfig) -> SimFiles {
    let files = SimFiles::new();
    for disk in &config.disks {
        files.open(&disk.path, Open::CreateNew).unwrap().set_len(DISK).unwrap();
    }
    create(&files, config, &mut |_, _| Ok(())).unwrap();
    files.settle();
    files
}

/// Removes the arena, as a power cut does.
pub fn lose_memory(config: &GroupConfig) {
    let _ = std::fs::remove_file(config.arena_path());
}

impl SimGroup {
    /// Recovers and goes on from `written`.
    pub fn start(
        config: &GroupConfig,
        files: &SimFiles,
        written: Written,
        seed: u64,
    ) -> Result<Self, StartError> {
        let open = |path: &Path| files.open(path, Open::ReadWrite).unwrap();
        let journal = open(&config.journal);
        let disks = config.disks.iter().map(|disk| open(&disk.path)).collect();
        let shared: Arc<dyn Files> = Arc::new(files.clone());
        let marker = PathBuf::from("/unjournaled");
        let parts = recover(config, shared, journal, disks, marker, 0)?;
        let event = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let engine = Late {
            target: parts.target.clone(),
            journal: VecDeque::new(),
            disks: VecDeque::new(),
            syncs: VecDeque::new(),
            rng: Rng::new(seed ^ 0x5eed),
            event,
        };
        let clock = Arc::new(ManualClock::default());
        let volume = Volume::new(
            parts.filter,
            parts.overlays,
            parts.disks,
            parts.target,
            Box::new(engine),
            clock.clone(),
            config.arena_path(),
        );
        let floor = volume.positions().durable.0;
        let (config, files) = (config.clone(), files.clone());
        let rng = Rng::new(seed);
        let mut life = Self { config, files, volume, written, clock, rng, floor, beats: 0 };
        life.note();
        Ok(life)
    }

    /// A step of the process: time passes, requests come, the volume takes a turn.
    pub fn step(&mut self) {
        let late = if self.rng.below(50) == 0 { 2_000_000 } else { 8_000 };
        self.clock.advance(self.rng.below(late));
        for _ in 0..self.rng.below(4) {
            if self.beats == 0 && self.rng.below(100) == 0 {
                self.beats = 60;
            }
            match self.beats {
                0 => self.request(),
                _ => self.beat(),
            }
        }
        self.volume.set_alone(self.rng.below(4) == 0);
        self.turn();
    }

    /// The volume's turn, without requests.
    pub fn turn(&mut self) {
        let mut events = Vec::new();
        self.volume.turn(&mut events);
        let durable = self.volume.positions().durable.0;
        for event in events {
            if let VolumeEvent::Durable(position) = event {
                assert!(durable >= position, "I4: a flush was answered too early");
            }
        }
        self.note();
    }

    fn note(&mut self) {
        let now = self.volume.positions();
        // Without a journal, durable means synced on the disks and follows applied.
        let bare = now.mode == Mode::Unjournaled;
        let in_order = now.checkpoint <= now.applied && (bare || now.applied <= now.durable);
        assert!(in_order, "{now:?}");
        let log_len = self.files.log_len();
        let promise = Promise {
            log_len,
            durable: now.durable.0,
            ship_floor: self.floor,
            mode: now.mode,
            incarnation: now.incarnation,
        };
        self.written.promises.push(promise);
    }

    fn request(&mut self) {
        let disk = self.rng.below(DISKS as u64) as usize;
        let sectors = DISK / 512;
        let longest = if self.rng.below(10) == 0 { 400 } else { 24 };
        let count = 1 + self.rng.below(longest);
        let first = self.rng.below(sectors - count + 1);
        let (offset, len) = (first * 512, (count * 512) as usize);
        match self.rng.below(100) {
            0..8 => {
                let admitted = self.volume.positions().admitted.0;
                self.volume.flush(admitted);
            }
            8..12 => self.mark(),
            12..14 => {
                self.volume.filter().begin_seed();
            }
            14..30 => {
                // The target got somewhere between its last position and ours.
                let durable = self.volume.positions().durable.0;
                if self.rng.below(3) == 0 && durable > self.floor {
                    self.floor = durable;
                    self.volume.target_holds(1, durable, true);
                }
            }
            30..36 => self.zero(disk, offset, len),
            _ => {
                let byte = 1 + self.rng.below(255) as u8;
                self.write(disk, offset, &vec![byte; len]);
            }
        }
    }

    /// Foreseen flushes: half of what comes before each is written ahead.
    fn beat(&mut self) {
        self.beats -= 1;
        if self.beats.is_multiple_of(5) {
            let admitted = self.volume.positions().admitted.0;
            self.volume.flush(admitted);
            return;
        }
        let disk = self.rng.below(DISKS as u64) as usize;
        let (offset, byte) = (self.rng.below(DISK / 512 - 40) * 512, self.rng.below(255) as u8);
        self.write(disk, offset, &[1 + byte; 40 * 512]);
    }

    fn mark(&mut self) {
        let _ = self.volume.mark(b"tag", false);
    }

    fn zero(&mut self, disk: usize, offset: u64, len: usize) {
        let trim = self.rng.below(2) == 0;
        let mut done = 0;
        while done < len as u64 {
            let left = len as u64 - done;
            let at = offset + done;
            match self.volume.zero(disk as u8, at, left, ZeroFlags::default(), trim) {
                Ok((took, end)) => {
                    self.remember(end - 1, disk, at, vec![0; took as usize]);
                    done += took;
                }
                Err(Refusal::Stalled) => return,
                Err(other) => panic!("a zero was refused: {other:?}"),
            }
        }
    }

    fn write(&mut self, disk: usize, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            match self.volume.write(disk as u8, at, &data[done..], false) {
                Ok((took, end)) => {
                    self.remember(end - 1, disk, at, data[done..done + took].to_vec());
                    done += took;
                }
                // What was not taken was not answered either: it never happened.
                Err(Refusal::Stalled) => return,
                Err(other) => panic!("a write was refused: {other:?}"),
            }
        }
    }

    fn remember(&mut self, lsn: u64, disk: usize, offset: u64, data: Vec<u8>) {
        let last = self.written.records.last().map_or(0, |r| r.lsn);
        assert!(lsn > last, "I1: LSN {lsn} after {last}");
        self.written.records.push(Record { lsn, disk, offset, data });
    }

    /// Every disk as a client reads it now.
    pub fn read_all(&mut self) -> Vec<Vec<u8>> {
        (0..DISKS).map(|d| self.volume.read_blocking(d as u8, 0, DISK).unwrap()).collect()
    }

    /// Drains, as `unprotect` does: the disks are plain images afterwards.
    pub fn drain(&mut self) {
        self.volume.filter().request_drain();
        for _ in 0..100_000 {
            if self.volume.filter().drained() {
                return;
            }
            self.clock.advance(10_000);
            self.turn();
        }
        panic!("it never drained: {:?}", self.volume.positions());
    }
}

/// The backing files' content.
pub fn backing(files: &SimFiles) -> Vec<Vec<u8>> {
    let path = |d: usize| PathBuf::from(format!("/d{d}"));
    (0..DISKS).map(|d| read_file(files, &path(d), DISK).unwrap()).collect()
}
