//! The operations of one group's engine, and the threads that carry them out by
//! plain system calls.
//!
//! The group's thread submits [`Op`]s and reaps [`Done`]s; it never blocks. Operations of
//! one [`Lane`] are carried out in order; lanes are independent. The
//! filter has at most one apply, one sync, one super block and a handful of
//! journal writes under way, and the volume bounds its reads, so
//! the channels are bounded by what is submitted.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};
use rustix::event::{EventfdFlags, eventfd};
use zerocopy::IntoBytes;

use super::bulk::Bulk;
use super::cpu::{Guest, Offer};
use super::{File, Files, TURN_BYTES, give_way};
use crate::apply::{ApplyOp, SealedBatch, plan};
use crate::arena::{Arena, Word};
use crate::block::Extent;
use crate::journal::batch::super_offset;
use crate::journal::format::JournalSuper;
use crate::journal::note::{self, Note};

/// Something to do.
#[derive(Debug)]
pub enum Op {
    /// Write the arena's `[pos, pos + len)` at this offset of the journal.
    JournalWrite {
        /// Offset in the journal file.
        at: u64,
        /// Position.
        pos: u64,
        /// Bytes.
        len: u64,
    },
    /// Sync the journal.
    JournalSync,
    /// Write the arena's `[pos, pos + len)` durably (RWF_DSYNC: other writes are
    /// not covered). Answered by [`Done::JournalSync`].
    JournalCommit {
        /// Offset in the journal file.
        at: u64,
        /// Position.
        pos: u64,
        /// Bytes.
        len: u64,
    },
    /// Write these batches, oldest first, to the disks.
    Apply(Vec<SealedBatch>),
    /// Sync each disk that was written since the last time.
    SyncDisks,
    /// Write and sync a super block.
    WriteSuper(Box<JournalSuper>),
    /// Write the note that the journal is dead and this incarnation in use.
    MarkUnjournaled(u64),
    /// Read these gaps of a disk into `buf`: `(disk offset, bytes, place in buf)`.
    Read {
        /// Comes back in the answer.
        token: u64,
        /// Disk index.
        disk: u8,
        /// What to read.
        gaps: Vec<(u64, u64, usize)>,
        /// Filled.
        buf: Vec<u8>,
    },
    /// Allocation of a disk's ranges `(offset, bytes)`.
    Extents {
        /// Comes back in the answer.
        token: u64,
        /// Disk index.
        disk: u8,
        /// Where to look.
        ranges: Vec<(u64, u64)>,
        /// Extents after which the answer may end.
        max: usize,
    },
}

/// Something done; the variants answer those of [`Op`].
#[derive(Debug)]
pub enum Done {
    /// One write.
    JournalWrite(io::Result<()>),
    /// The sync, or the commit.
    JournalSync(io::Result<()>),
    /// All, or the first disk that failed.
    Apply(Result<(), (u8, io::Error)>),
    /// All, or the first disk that failed and how.
    SyncDisks(Result<(), (u8, io::Error)>),
    /// The super block.
    WriteSuper(io::Result<()>),
    /// The note. Until it is durable, nothing newer than the journal goes to the disks.
    MarkUnjournaled(io::Result<()>),
    /// The buffer, filled unless `result` is an error.
    Read {
        /// Of the operation.
        token: u64,
        /// Of the operation.
        buf: Vec<u8>,
        /// Whether it is filled.
        result: io::Result<()>,
    },
    /// One list of extents a range.
    Extents {
        /// Of the operation.
        token: u64,
        /// In the order of the ranges.
        result: io::Result<Vec<Vec<Extent>>>,
    },
}

/// Carries out operations; see `uring`, `blocking`, and [`Inline`] for tests.
pub trait Engine: std::fmt::Debug {
    /// Starts an operation.
    fn submit(&mut self, op: Op);
    /// Takes what is done, without waiting.
    fn reap(&mut self, done: &mut Vec<Done>);
    /// Makes [`Engine::fd`] unreadable until more is done; reap afterwards.
    fn clear(&mut self);
    /// Readable when something was done since [`Engine::clear`].
    fn fd(&self) -> BorrowedFd<'_>;
    /// For `status`: `io_uring`, or `blocking (why)`.
    fn name(&self) -> String;
}

/// The files of one group.
#[derive(Debug)]
pub struct Target {
    /// The journal.
    pub journal: Arc<dyn File>,
    /// The backing files, by index.
    pub disks: Vec<Arc<dyn File>>,
    /// Whether holes of each disk can be believed (ruling 20).
    pub holes: Vec<bool>,
    /// Of each disk, what was written since which sync.
    pub writes: Vec<Writes>,
    /// What [`Word::Syncing`] counted at the start and was written again since: of the next
    /// sync of all disks that succeeds.
    pub written_again: AtomicU64,
    /// The memory.
    pub arena: Arc<Arena>,
    /// Where write-back computes while it keeps up.
    pub seat: Arc<Offer>,
    /// For the note.
    pub files: Arc<dyn Files>,
    /// The note.
    pub marker: PathBuf,
}

/// What was written to a disk and not synced yet.
#[derive(Debug)]
pub struct Writes {
    /// Since the last sync of a checkpoint.
    dirty: AtomicBool,
    /// Counts up before and after each write-back.
    count: AtomicU64,
    /// The count that a question for holes synced.
    seen: Mutex<Option<u64>>,
}

impl Default for Writes {
    /// Of what an earlier process wrote nothing is known.
    fn default() -> Self {
        Self { dirty: true.into(), count: 0.into(), seen: Mutex::new(None) }
    }
}

impl Writes {
    fn mark(&self) {
        self.count.fetch_add(1, Ordering::AcqRel);
        self.dirty.store(true, Ordering::Release);
    }
}

/// Where and how write-back computes, until this is dropped.
#[derive(Debug, Default)]
struct Placement {
    guest: Guest,
    bulk: Option<Bulk>,
}

impl Target {
    /// Carries out an operation by blocking calls.
    pub fn execute(&self, op: Op) -> Done {
        match op {
            Op::JournalWrite { at, pos, len } => {
                Done::JournalWrite(self.journal.write_all_at(at, self.arena.bytes(pos, len)))
            }
            Op::JournalSync => Done::JournalSync(self.journal.sync_data()),
            Op::JournalCommit { at, pos, len } => {
                Done::JournalSync(self.journal.write_durable_at(at, self.arena.bytes(pos, len)))
            }
            Op::Apply(batches) => Done::Apply(self.apply(&plan(batches.iter()))),
            Op::SyncDisks => Done::SyncDisks(self.sync_disks()),
            Op::WriteSuper(sup) => Done::WriteSuper(self.write_super(&sup)),
            Op::MarkUnjournaled(incarnation) => {
                let note = Note { incarnation, given_up: false };
                Done::MarkUnjournaled(note::write(self.files.as_ref(), &self.marker, note))
            }
            Op::Read { token, disk, gaps, mut buf } => {
                let result = gaps.iter().try_for_each(|(offset, len, at)| {
                    let to = &mut buf[*at..*at + *len as usize];
                    self.disks[usize::from(disk)].read_exact_at(*offset, to)
                });
                Done::Read { token, buf, result }
            }
            Op::Extents { token, disk, ranges, max } => {
                Done::Extents { token, result: self.extents(disk, &ranges, max) }
            }
        }
    }

    fn apply(&self, disks: &[(u8, Vec<ApplyOp>)]) -> Result<(), (u8, io::Error)> {
        let mut placement = Placement::default();
        self.place(&mut placement);
        for (index, ops) in disks {
            let writes = &self.writes[usize::from(*index)];
            writes.mark();
            let done = self.apply_all(*index, ops, &mut placement);
            // Again: a sync that ran meanwhile took the mark, and may have missed the rest (I6).
            writes.mark();
            done.map_err(|e| (*index, e))?;
        }
        Ok(())
    }

    /// Whether write-back keeps up. Else clients will wait for room, and it gives way to nobody.
    fn place(&self, placement: &mut Placement) -> bool {
        let keeps_up = self.arena.room() > self.arena.size() / 2;
        placement.guest.go(self.seat.get().filter(|_| keeps_up));
        if !keeps_up {
            placement.bulk = None;
        } else if placement.bulk.is_none() {
            placement.bulk = Bulk::begin();
        }
        keeps_up
    }

    fn apply_all(&self, index: u8, ops: &[ApplyOp], placement: &mut Placement) -> io::Result<()> {
        let mut moved = 0;
        for op in ops {
            self.apply_one(index, op)?;
            moved += APPLY_COST + op.written();
            if moved >= TURN_BYTES as u64 {
                moved = 0;
                if self.place(placement) {
                    give_way();
                }
            }
        }
        Ok(())
    }

    fn apply_one(&self, index: u8, op: &ApplyOp) -> io::Result<()> {
        let disk = &self.disks[usize::from(index)];
        match op {
            ApplyOp::Write { offset, parts } => {
                let bytes = |(pos, len): &(u64, u64)| self.arena.bytes(*pos, *len);
                match &parts[..] {
                    [part] => disk.write_vectored_at(*offset, &[bytes(part)]),
                    _ => disk
                        .write_vectored_at(*offset, &parts.iter().map(bytes).collect::<Vec<_>>()),
                }
            }
            ApplyOp::Zero { offset, len, no_hole } => {
                disk.punch(*offset, *len)?;
                if !*no_hole {
                    return Ok(());
                }
                match disk.allocate(*offset, *len) {
                    // It reads as zeroes; more this file system cannot do.
                    Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
                    other => other,
                }
            }
        }
    }

    fn sync_disks(&self) -> Result<(), (u8, io::Error)> {
        let again = self.written_again.load(Ordering::Acquire);
        for (index, writes) in self.writes.iter().enumerate() {
            if writes.dirty.swap(false, Ordering::AcqRel) {
                self.sync_disk(index).map_err(|e| (index as u8, e))?;
            }
        }
        self.written_again.fetch_sub(again, Ordering::AcqRel);
        self.arena.add_word(Word::Syncing, -(again as i64));
        Ok(())
    }

    /// Syncs a disk, counted in the arena while it runs: an error is told only once, so one
    /// that failed or was cut off stays counted.
    fn sync_disk(&self, index: usize) -> io::Result<()> {
        self.arena.add_word(Word::Syncing, 1);
        self.disks[index].sync_data()?;
        self.arena.add_word(Word::Syncing, -1);
        Ok(())
    }

    /// Syncs what was written back since the last time, for a question for holes.
    fn sync_for_holes(&self, index: usize) -> io::Result<()> {
        let writes = &self.writes[index];
        let mut seen = writes.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let count = writes.count.load(Ordering::Acquire);
        if *seen != Some(count) {
            self.sync_disk(index)?;
            *seen = Some(count);
        }
        Ok(())
    }

    fn write_super(&self, sup: &JournalSuper) -> io::Result<()> {
        self.journal.write_all_at(super_offset(sup.seq.get()), sup.as_bytes())?;
        self.journal.sync_data()
    }

    /// Holes count only after what we wrote is synced, and only where the file
    /// system is known to tell the truth (ruling 20).
    fn extents(
        &self,
        disk: u8,
        ranges: &[(u64, u64)],
        mut max: usize,
    ) -> io::Result<Vec<Vec<Extent>>> {
        let file = &self.disks[usize::from(disk)];
        if !self.holes[usize::from(disk)] {
            let data = |len| vec![Extent { len, hole: false, zero: false }];
            return Ok(ranges.iter().map(|(_, len)| data(*len)).collect());
        }
        self.sync_for_holes(usize::from(disk))?;
        let mut found = Vec::new();
        for (offset, len) in ranges {
            let extents = file_extents(file.as_ref(), *offset, *len, max)?;
            max = max.saturating_sub(extents.len());
            found.push(extents);
            if max == 0 {
                break;
            }
        }
        Ok(found)
    }
}

/// Extents of a file's range by SEEK_DATA and SEEK_HOLE, from its start on; not many
/// more than `max`.
fn file_extents(file: &dyn File, offset: u64, len: u64, max: usize) -> io::Result<Vec<Extent>> {
    let end = offset + len;
    let mut at = offset;
    let mut extents = Vec::new();
    while at < end && extents.len() < max {
        let (from, to) = file.next_data(at)?.unwrap_or((end, end));
        let (from, to) = (from.clamp(at, end), to.min(end));
        if from > at {
            extents.push(Extent { len: from - at, hole: true, zero: true });
        }
        if to > from {
            extents.push(Extent { len: to - from, hole: false, zero: false });
        }
        at = to.max(from);
    }
    Ok(extents)
}

/// Which thread an operation belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Journal,
    Disks,
    Syncs,
    Reads,
    Holes,
}

fn lane_of(op: &Op) -> Lane {
    match op {
        Op::JournalWrite { .. }
        | Op::JournalSync
        | Op::JournalCommit { .. }
        | Op::WriteSuper(_) => Lane::Journal,
        Op::Apply(_) => Lane::Disks,
        // Beside the others: a sync of the disks may take seconds. The arena must not fill up
        // behind it, nor a freeze wait for it.
        Op::SyncDisks | Op::MarkUnjournaled(_) => Lane::Syncs,
        Op::Read { .. } => Lane::Reads,
        // They sync the disk first: no read waits behind that.
        Op::Extents { .. } => Lane::Holes,
    }
}

/// Threads that execute operations and signal an eventfd. Dropping it waits until
/// everything submitted is done: nothing of ours reaches a file later (I12).
#[derive(Debug)]
pub struct Lanes {
    /// None only while it is dropped.
    ops: Option<Senders>,
    threads: Vec<JoinHandle<()>>,
    done: Receiver<Done>,
    event: Arc<OwnedFd>,
}

#[derive(Debug)]
struct Senders {
    journal: Sender<Op>,
    disks: Sender<Op>,
    syncs: Sender<Op>,
    reads: Sender<Op>,
    holes: Sender<Op>,
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.ops = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Lanes {
    /// Starts the threads; they end when this is dropped.
    pub fn start(target: &Arc<Target>, readers: usize) -> io::Result<Self> {
        let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let (to_done, done) = unbounded();
        let mut threads = Vec::new();
        let mut start = |name: &str, count: usize| -> io::Result<Sender<Op>> {
            // What is submitted bounds it; a bounded channel would take all its memory now.
            let (sender, ops) = unbounded::<Op>();
            for _ in 0..count {
                let (ops, to_done) = (ops.clone(), to_done.clone());
                let (target, event) = (target.clone(), event.clone());
                let thread = std::thread::Builder::new().name(name.into());
                threads.push(thread.spawn(move || {
                    for op in ops {
                        if to_done.send(target.execute(op)).is_err() {
                            return;
                        }
                        let _ = rustix::io::write(&event, &1u64.to_le_bytes());
                    }
                })?);
            }
            Ok(sender)
        };
        let journal = start("sf-journal", 1)?;
        let disks = start("sf-disks", 1)?;
        let syncs = start("sf-syncs", 1)?;
        let reads = start("sf-reads", readers)?;
        let holes = start("sf-holes", 1)?;
        let ops = Some(Senders { journal, disks, syncs, reads, holes });
        Ok(Self { ops, threads, done, event })
    }

    /// Hands an operation to its thread.
    pub fn submit(&self, op: Op) {
        let ops = self.ops.as_ref().expect("not dropped");
        let lane = match lane_of(&op) {
            Lane::Journal => &ops.journal,
            Lane::Disks => &ops.disks,
            Lane::Syncs => &ops.syncs,
            Lane::Reads => &ops.reads,
            Lane::Holes => &ops.holes,
        };
        lane.send(op).expect("the threads live as long as their channel");
    }

    /// Takes what is done.
    pub fn reap(&self, done: &mut Vec<Done>) {
        done.extend(self.done.try_iter());
    }

    /// Resets the eventfd.
    pub fn clear(&self) {
        reset(&self.event);
    }

    /// Makes the eventfd readable.
    pub fn signal(&self) {
        let _ = rustix::io::write(&self.event, &1u64.to_le_bytes());
    }

    /// The eventfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Executes at once, in the caller's thread: deterministic, for tests.
#[derive(Debug)]
pub struct Inline {
    target: Arc<Target>,
    done: Vec<Done>,
    event: OwnedFd,
}

impl Inline {
    /// Over any files.
    pub fn new(target: Arc<Target>) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { target, done: Vec::new(), event })
    }
}

impl Engine for Inline {
    fn submit(&mut self, op: Op) {
        let done = self.target.execute(op);
        self.done.push(done);
        let _ = rustix::io::write(&self.event, &1u64.to_le_bytes());
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        done.append(&mut self.done);
    }

    fn clear(&mut self) {
        reset(&self.event);
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn name(&self) -> String {
        "inline".into()
    }
}

fn reset(event: &OwnedFd) {
    let mut count = [0; 8];
    let _ = rustix::io::read(event, &mut count);
}

/// What an operation of the write-back costs beside its bytes, as bytes.
const APPLY_COST: u64 = 16 << 10;

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use crossbeam::channel::bounded;
    use rustix::thread::{sched_getaffinity, sched_setaffinity};

    use super::*;
    use crate::arena::{ARENA_MAGIC, ArenaHdr};
    use crate::engine::Open;
    use crate::engine::bulk::policy;
    use crate::engine::cpu::tests::two;
    use crate::engine::record::SimFiles;
    use crate::journal::format::{RecDesc, RecOp};

    const LONG: Duration = Duration::from_secs(60);

    /// A disk whose second write waits until told, and that counts its syncs and the processors
    /// that each write might use, and keeps its policy.
    #[derive(Debug)]
    struct Slow {
        inner: Arc<dyn File>,
        computed: Mutex<Vec<(u32, i32)>>,
        begun: Sender<()>,
        go: Receiver<()>,
        syncs: AtomicUsize,
        broken: AtomicBool,
    }

    impl File for Slow {
        fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            self.inner.read_exact_at(offset, buf)
        }
        fn write_all_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            let might_use = sched_getaffinity(None).unwrap().count();
            self.computed.lock().unwrap().push((might_use, policy()));
            if offset > 0 {
                self.begun.send(()).unwrap();
                self.go.recv_timeout(LONG).unwrap();
            }
            self.inner.write_all_at(offset, data)
        }
        fn sync_data(&self) -> io::Result<()> {
            self.syncs.fetch_add(1, Ordering::SeqCst);
            match self.broken.load(Ordering::SeqCst) {
                true => Err(io::Error::other("broken")),
                false => self.inner.sync_data(),
            }
        }
        fn len(&self) -> io::Result<u64> {
            self.inner.len()
        }
        fn set_len(&self, len: u64) -> io::Result<()> {
            self.inner.set_len(len)
        }
        fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
            self.inner.allocate(offset, len)
        }
        fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
            self.inner.punch(offset, len)
        }
        fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
            self.inner.next_data(offset)
        }
        fn fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
    }

    fn target(dir: &Path) -> (Arc<Target>, Arc<Slow>, Receiver<()>, Sender<()>) {
        let files = SimFiles::new();
        let inner = files.open(Path::new("/d"), Open::CreateNew).unwrap();
        inner.set_len(1 << 20).unwrap();
        let ((begun, has_begun), (tell, go)) = (bounded(1), bounded(1));
        let (syncs, broken, computed) = Default::default();
        let slow = Arc::new(Slow { inner, computed, begun, go, syncs, broken });
        let size = 65536.into();
        let hdr = ArenaHdr { magic: ARENA_MAGIC, version: 1.into(), size, ..Default::default() };
        let arena = Arena::create(&dir.join("arena"), &hdr).unwrap();
        arena.set_bounds(0, 0);
        arena.fill(0, &[7; 8192]);
        arena.advance_head(8192);
        let target = Target {
            journal: files.open(Path::new("/j"), Open::CreateNew).unwrap(),
            disks: vec![slow.clone()],
            holes: vec![true],
            writes: vec![Writes::default()],
            written_again: 0.into(),
            arena: Arc::new(arena),
            seat: Arc::default(),
            files: Arc::new(files),
            marker: "/unjournaled".into(),
        };
        (Arc::new(target), slow, has_begun, tell)
    }

    /// Writes a block at each of these offsets of the first disk.
    fn batch(offsets: &[u64]) -> SealedBatch {
        let desc = |offset: &u64| RecDesc {
            op: RecOp::Write as u8,
            offset: (*offset).into(),
            len: 4096.into(),
            ..RecDesc::default()
        };
        let descs = offsets.iter().map(desc).collect();
        SealedBatch { lsn: 0, end: 8192, hdr_crc: 0, descs }
    }

    /// I6: what is written while a sync runs is not taken for synced by it.
    #[test]
    fn a_sync_in_the_midst_of_an_apply_does_not_count_for_its_rest() {
        let dir = tempfile::tempdir().unwrap();
        let (target, slow, has_begun, tell) = target(dir.path());
        let apply = Op::Apply(vec![batch(&[0, 8192])]);
        std::thread::scope(|scope| {
            let applying = scope.spawn(|| target.execute(apply));
            has_begun.recv_timeout(LONG).unwrap();
            assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Ok(()))));
            tell.send(()).unwrap();
            assert!(matches!(applying.join().unwrap(), Done::Apply(Ok(()))));
        });
        assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Ok(()))));
        assert_eq!(slow.syncs.load(Ordering::SeqCst), 2);
        assert_eq!(target.arena.word(Word::Syncing), 0);
    }

    #[test]
    fn write_back_computes_where_it_is_offered_a_seat_and_in_bulk_while_it_keeps_up() {
        let dir = tempfile::tempdir().unwrap();
        let (target, slow, has_begun, tell) = target(dir.path());
        let (before, allowed) = two();
        target.seat.set(Some(rustix::thread::sched_getcpu()));
        // A turn and one more.
        let blocks: Vec<u64> = (0..14).map(|i| i * 8192).collect();
        std::thread::scope(|scope| {
            let all = scope.spawn(|| {
                let done = target.execute(Op::Apply(vec![batch(&blocks)]));
                (done, sched_getaffinity(None).unwrap(), policy())
            });
            for _ in 1..blocks.len() {
                has_begun.recv_timeout(LONG).unwrap();
                // Most of the memory waits for it.
                target.arena.advance_head(60_000);
                tell.send(()).unwrap();
            }
            let (done, after, then) = all.join().unwrap();
            assert!(matches!(done, Done::Apply(Ok(()))));
            assert_eq!((after, then), (allowed, libc::SCHED_OTHER));
        });
        let mut expected = vec![(1, libc::SCHED_BATCH); 13];
        expected.push((allowed.count(), libc::SCHED_OTHER));
        assert_eq!(*slow.computed.lock().unwrap(), expected);
        sched_setaffinity(None, &before).unwrap();
    }

    /// What was written again counts as unsynced until a sync of all disks succeeded.
    #[test]
    fn what_was_written_again_stays_noted_until_it_is_synced() {
        let dir = tempfile::tempdir().unwrap();
        let (target, slow, ..) = target(dir.path());
        target.arena.set_word(Word::Syncing, 3);
        target.written_again.store(3, Ordering::SeqCst);
        slow.broken.store(true, Ordering::SeqCst);
        assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Err(_))));
        assert_eq!(target.arena.word(Word::Syncing), 4);
        slow.broken.store(false, Ordering::SeqCst);
        target.writes[0].mark();
        assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Ok(()))));
        assert_eq!(target.arena.word(Word::Syncing), 1);
    }

    #[test]
    fn a_question_for_holes_syncs_only_what_was_written_since_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let (target, slow, ..) = target(dir.path());
        let ask = || {
            let question = Op::Extents { token: 1, disk: 0, ranges: vec![(0, 4096)], max: 1 };
            assert!(matches!(target.execute(question), Done::Extents { result: Ok(_), .. }));
            slow.syncs.load(Ordering::SeqCst)
        };
        assert_eq!((ask(), ask()), (1, 1));
        let apply = Op::Apply(vec![batch(&[0])]);
        assert!(matches!(target.execute(apply), Done::Apply(Ok(()))));
        assert_eq!((ask(), ask()), (2, 2));
        assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Ok(()))));
        assert_eq!(slow.syncs.load(Ordering::SeqCst), 3, "the checkpoint's sync is its own");
    }

    /// Whoever is told of a failed sync, the next start must know.
    #[test]
    fn a_sync_that_failed_in_a_query_of_holes_stays_noted() {
        let dir = tempfile::tempdir().unwrap();
        let (target, slow, ..) = target(dir.path());
        slow.broken.store(true, Ordering::SeqCst);
        let query = Op::Extents { token: 1, disk: 0, ranges: vec![(0, 4096)], max: 1 };
        assert!(matches!(target.execute(query), Done::Extents { result: Err(_), .. }));
        slow.broken.store(false, Ordering::SeqCst);
        assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Ok(()))));
        assert_ne!(target.arena.word(Word::Syncing), 0);
    }
}
