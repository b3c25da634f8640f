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
use super::cpu::{Guest, Offer, Place};
use super::write_out::Parts;
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
    /// Clients wait for commits, and none for room: a checkpoint does not hurry.
    pub calm: AtomicBool,
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
    /// Where.
    parts: Parts,
}

impl Writes {
    /// Of a disk of so many bytes. Of what an earlier process wrote nothing is known.
    pub fn new(size: u64) -> Self {
        let (count, seen) = (0.into(), Mutex::new(None));
        Self { dirty: true.into(), count, seen, parts: Parts::new(size) }
    }

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
        placement.guest.go(if keeps_up { self.seat.get() } else { Place::Anywhere });
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
                self.writes[usize::from(index)].parts.mark(*offset, op.written());
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
                let synced = self.write_out(index).and_then(|()| self.sync_disk(index));
                synced.map_err(|e| (index as u8, e))?;
            }
        }
        self.written_again.fetch_sub(again, Ordering::AcqRel);
        self.arena.add_word(Word::Syncing, -(again as i64));
        Ok(())
    }

    /// Has a disk's device take what was written back, so that the sync behind it is short: for as long as
    /// nobody waits for that, and once more what came meanwhile. Counted as [`Target::sync_disk`]'s.
    fn write_out(&self, index: usize) -> io::Result<()> {
        self.counted(|| {
            for _ in 0..2 {
                self.writes[index].parts.take(|offset, len| {
                    let calm = self.calm.load(Ordering::Relaxed);
                    if calm {
                        self.disks[index].write_out(offset, len)?;
                    }
                    Ok(calm)
                })?;
            }
            Ok(())
        })
    }

    /// Syncs a disk.
    fn sync_disk(&self, index: usize) -> io::Result<()> {
        self.counted(|| self.disks[index].sync_data())
    }

    /// Counts in the arena what may be told of a failed write-back, while it runs: it is told only once, so what
    /// failed or was cut off stays counted.
    fn counted(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.arena.add_word(Word::Syncing, 1);
        sync()?;
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
mod tests;
