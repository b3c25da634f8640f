//! One group's disks without sockets: the filter, the overlays and the engine put
//! together. What a front end does is [`Volume::write`], [`Volume::zero`],
//! [`Volume::read`], [`Volume::flush`]; after each round [`Volume::turn`] takes
//! completions, starts what is due and tells who is served.
//!
//! Holds I2: an answered write is in the overlay and published in the arena. Runs on
//! one thread; never blocks except to complete a write that is no multiple of a sector.

mod admit;
mod here;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use self::here::Commit;
use self::here::Here;
use super::landing::Landing;
use crate::apply::SealedBatch;
use crate::arena::{Arena, Word};
use crate::block::{BLOCK, Errno, Extent};
use crate::control::{DiskStatus, FilterStatus, Positions};
use crate::dirty::DirtyExtent;
use crate::engine::cpu::Offer;
use crate::engine::queue::{Done, Engine, Op, Target};
use crate::engine::{Clock, Files, no_space};
use crate::filter::{Action, COMMIT_BYTES, Filter, Memory};
use crate::journal::format::RecOp;
use crate::names::Name;
use crate::nbd::transmission::EXTENTS_MAX;
use crate::overlay::{Overlay, Piece, Source};

/// The arena as the filter writes it.
#[derive(Clone, Debug)]
pub struct ArenaMemory(pub Arc<Arena>);

impl Memory for ArenaMemory {
    fn fill(&mut self, pos: u64, data: &[u8]) {
        self.0.fill(pos, data);
    }
    fn freeze(&mut self, head: u64) {
        self.0.advance_head(head);
    }
    fn publish(&mut self, admitted: u64) {
        self.0.set_word(Word::Published, admitted);
    }
    fn release(&mut self, pos: u64, crc: u32, floor: u64) {
        // In this order, so that a start after a kill between any two finds
        // either the CRC or the batches that carry it.
        self.0.set_word(Word::AppliedCrc, (pos >> 12) << 32 | u64::from(crc));
        self.0.set_word(Word::Applied, pos);
        self.0.advance_floor(floor);
    }
}

/// What a disk is, to the volume.
#[derive(Clone, Debug)]
pub struct VolumeDisk {
    /// Its name.
    pub name: Name,
    /// Size in bytes.
    pub size: u64,
    /// Its file, to ask for free space.
    pub path: PathBuf,
    /// Not fully allocated: writes may need space.
    pub sparse: bool,
    /// A block device.
    pub device: bool,
}

/// Why a request was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Answer this error.
    Fail(Errno),
    /// Try again after [`Volume::turn`] returned true.
    Stalled,
}

/// How far a read got.
#[derive(Debug)]
pub enum ReadOutcome {
    /// The buffer, filled.
    Done(Vec<u8>),
    /// [`VolumeEvent::Read`] will bring it.
    Pending,
    /// As if it had not been asked: see [`Volume::can_read`]. The buffer, of any content.
    Held(Vec<u8>),
}

/// What became ready in a turn.
#[derive(Debug)]
pub enum VolumeEvent {
    /// What the token waited for is durable.
    Durable(u64),
    /// What the token waited for cannot be made durable.
    Lost(u64),
    /// A read is done.
    Read {
        /// As given.
        token: u64,
        /// The bytes.
        result: Result<Vec<u8>, Errno>,
    },
    /// Extents are known.
    Extents {
        /// As given.
        token: u64,
        /// Neighbours differ.
        result: Result<Vec<Extent>, Errno>,
    },
}

/// One group's disks.
#[derive(Debug)]
pub struct Volume {
    filter: Filter,
    overlays: Vec<Overlay>,
    disks: Vec<VolumeDisk>,
    memory: ArenaMemory,
    target: Arc<Target>,
    engine: Box<dyn Engine>,
    clock: Arc<dyn Clock>,
    arena_path: PathBuf,
    files: Arc<dyn Files>,
    landing: Option<Landing>,
    /// How many payloads still are not landed.
    landings_left_out: u32,
    /// What was moved out of its place, by owner.
    moved_out: HashMap<u64, Vec<u8>>,
    /// What a finished write-back has still to take out of the overlays.
    retiring: Option<VecDeque<SealedBatch>>,
    pieces: Vec<Piece>,
    done: Vec<Done>,
    /// Extent queries in flight: the overlay's part of each.
    extents: HashMap<u64, Vec<Piece>>,
    /// Bytes of reads and questions in flight, whoever asked, and whether some were held back.
    reading: u64,
    reads_held: bool,
    free: Vec<u64>,
    free_at: u64,
    errors: Vec<Option<String>>,
    journal_error: Option<String>,
    /// See [`Volume::set_alone`], and until when it is not acted upon.
    alone: bool,
    here: Here,
    calm: Calm,
    writes: u64,
    write_bytes: u64,
}

impl Volume {
    /// Puts the parts together; `overlays` hold every record of the filter's start.
    pub fn new(
        filter: Filter,
        overlays: Vec<Overlay>,
        disks: Vec<VolumeDisk>,
        target: Arc<Target>,
        engine: Box<dyn Engine>,
        clock: Arc<dyn Clock>,
        arena_path: PathBuf,
    ) -> Self {
        let count = disks.len();
        Self {
            filter,
            overlays,
            memory: ArenaMemory(target.arena.clone()),
            files: target.files.clone(),
            disks,
            target,
            engine,
            clock,
            arena_path,
            landing: None,
            landings_left_out: 0,
            moved_out: HashMap::new(),
            retiring: None,
            pieces: Vec::new(),
            done: Vec::new(),
            extents: HashMap::new(),
            reading: 0,
            reads_held: false,
            free: vec![u64::MAX; count],
            free_at: 0,
            errors: vec![None; count],
            journal_error: None,
            alone: false,
            here: Here::default(),
            calm: Calm::default(),
            writes: 0,
            write_bytes: 0,
        }
    }

    /// Whether a disk may be asked for bytes or extents (I24). If not: when [`Volume::turn`]
    /// returned true. A disk that hangs keeps them after the connection that asked is gone.
    pub fn can_read(&mut self) -> bool {
        self.reads_held = self.reading >= READING_MAX;
        !self.reads_held
    }

    /// Fills `buf` from `offset` on, or starts a read that brings it later.
    pub fn read(&mut self, token: u64, disk: u8, offset: u64, mut buf: Vec<u8>) -> ReadOutcome {
        let gaps = self.read_now(disk, offset, &mut buf);
        if gaps.is_empty() {
            return ReadOutcome::Done(buf);
        }
        if !self.can_read() {
            return ReadOutcome::Held(buf);
        }
        self.reading += buf.len() as u64;
        self.engine.submit(Op::Read { token, disk, gaps, buf });
        ReadOutcome::Pending
    }

    /// Copies what is in memory; returns the rest as `(offset, len, place)`.
    fn read_now(&mut self, disk: u8, offset: u64, buf: &mut [u8]) -> Vec<(u64, u64, usize)> {
        let mut pieces = std::mem::take(&mut self.pieces);
        self.overlays[usize::from(disk)].lookup(offset, buf.len() as u64, usize::MAX, &mut pieces);
        let file = &self.target.disks[usize::from(disk)];
        let mut gaps = Vec::new();
        for piece in &pieces {
            let at = (piece.offset - offset) as usize;
            let to = &mut buf[at..at + piece.len as usize];
            match piece.source {
                Source::Zero => to.fill(0),
                Source::Arena(pos) => to.copy_from_slice(self.memory.0.bytes(pos, piece.len)),
                Source::Disk => {
                    let got = file.read_nowait(piece.offset, to).unwrap_or(0);
                    if got < to.len() {
                        let done = got as u64;
                        gaps.push((piece.offset + done, piece.len - done, at + got));
                    }
                }
            }
        }
        self.pieces = pieces;
        gaps
    }

    /// Reads at once, from the disk if need be.
    pub fn read_blocking(&mut self, disk: u8, offset: u64, len: u64) -> Result<Vec<u8>, Refusal> {
        let mut out = vec![0; len as usize];
        let gaps = self.read_now(disk, offset, &mut out);
        let file = &self.target.disks[usize::from(disk)];
        for (offset, len, at) in gaps {
            file.read_exact_at(offset, &mut out[at..at + len as usize])
                .map_err(|e| Refusal::Fail(Errno::from_io(&e)))?;
        }
        Ok(out)
    }

    /// Starts to find the allocation of a range; overlay first, then the file (ruling 20).
    /// The answer may cover only its first part, as large as one question may cost.
    pub fn extents(&mut self, token: u64, disk: u8, offset: u64, len: u64) {
        let mut pieces = Vec::new();
        let overlay = &self.overlays[usize::from(disk)];
        // Block by block.
        let len = if overlay.is_empty() { len } else { len.min(EXTENTS_BYTES) };
        overlay.lookup(offset, len, EXTENTS_MAX, &mut pieces);
        let disk_pieces = pieces.iter().filter(|p| p.source == Source::Disk);
        let ranges = disk_pieces.map(|p| (p.offset, p.len)).collect();
        self.extents.insert(token, pieces);
        self.reading += EXTENTS_COST;
        self.engine.submit(Op::Extents { token, disk, ranges, max: EXTENTS_MAX });
    }

    /// As [`Filter::dirty`].
    pub fn dirty(&self, disk: u8, offset: u64, len: u64, max: usize) -> Vec<DirtyExtent> {
        self.filter.dirty(disk, offset, len, max)
    }

    /// Everything answered before is durable: true at once, else
    /// [`VolumeEvent::Durable`] follows.
    pub fn flush(&mut self, token: u64) -> bool {
        self.wait_durable(self.filter.admitted(), token)
    }

    /// As [`Volume::flush`], for a position.
    pub fn wait_durable(&mut self, pos: u64, token: u64) -> bool {
        // Also where it was foreseen, and is durable already.
        self.calm.awaited();
        !self.filter.wait_durable(pos, token)
    }

    /// As [`Filter::target_holds`]. Said in the arena before a slot that this frees can be
    /// used: a start after a kill must find it free too (I5).
    pub fn target_holds(&mut self, teller: u64, pos: u64, whole: bool) {
        self.filter.target_holds(teller, pos, whole);
        self.publish();
    }

    /// As [`Filter::begin_seed`].
    pub fn begin_seed(&mut self) -> Option<u64> {
        let s = self.filter.begin_seed();
        self.publish();
        s
    }

    /// Whether only one connection is active. Then a commit that it waits for, or will
    /// as is foreseen, is carried out by the caller of [`Volume::turn`].
    pub fn set_alone(&mut self, alone: bool) {
        self.alone = alone;
    }

    /// Whether [`Volume::turn`] may begin a commit that is awaited.
    pub fn is_awaited(&self) -> bool {
        self.filter.is_awaited()
    }

    /// Whether records are being written to their disks, by another thread.
    pub fn is_applying(&self) -> bool {
        self.filter.applying().is_some()
    }

    /// Whether there are any that are not known to be written to their disks.
    pub fn has_unapplied(&self) -> bool {
        self.filter.has_unapplied()
    }

    /// The last commit that clients waited for, if that was lately: whether the caller of [`Volume::turn`]
    /// carried it out.
    pub fn commits(&mut self, now: u64) -> Option<Commit> {
        if self.filter.is_awaited() {
            self.here.awaited(now);
        }
        self.here.recent(now)
    }

    /// See [`Target::seat`].
    pub fn seat(&self) -> Arc<Offer> {
        self.target.seat.clone()
    }

    /// Makes [`Volume::fd`] unreadable until more is done.
    pub fn clear(&mut self) {
        self.engine.clear();
    }

    /// Takes completions, starts what is due, and appends what became ready.
    /// True if stalled requests may be tried again.
    pub fn turn(&mut self, events: &mut Vec<VolumeEvent>) -> bool {
        let now = self.clock.mono_us();
        self.filter.set_wall(self.clock.wall_us());
        if now >= self.free_at {
            self.free_at = now + SPACE_CHECK_EVERY;
            self.check_space();
        }
        // Before a checkpoint begins.
        let calm = self.calm.look(now, self.filter.is_pressed());
        self.target.calm.store(calm, Ordering::Relaxed);
        let mut room = false;
        loop {
            let mut done = std::mem::take(&mut self.done);
            self.engine.reap(&mut done);
            for item in done.drain(..) {
                // Without a journal it is a sync of the disks that makes room. One that fails ends
                // the wait too, with an error.
                room |= matches!(
                    item,
                    Done::Apply(Err(_))
                        | Done::WriteSuper(_)
                        | Done::MarkUnjournaled(_)
                        | Done::SyncDisks(_)
                );
                self.handle(item, events, now);
            }
            self.done = done;
            room |= self.retire(now);
            if self.reads_held && self.reading < READING_MAX {
                self.reads_held = false;
                room = true;
            }
            let mut acted = false;
            while let Some(action) = self.filter.poll_action(&mut self.memory, now) {
                self.start(action);
                acted = true;
            }
            if !acted {
                break;
            }
        }
        self.publish();
        while let Some((token, durable)) = self.filter.poll_waiter() {
            events.push(match durable {
                true => VolumeEvent::Durable(token),
                false => VolumeEvent::Lost(token),
            });
        }
        room
    }

    fn start(&mut self, action: Action) {
        let op = match action {
            Action::JournalWrite { at, pos, len } => Op::JournalWrite { at, pos, len },
            Action::JournalSync => Op::JournalSync,
            Action::JournalCommit { at, pos, len } => Op::JournalCommit { at, pos, len },
            Action::Apply { to } => Op::Apply(self.filter.window(to).cloned().collect()),
            Action::SyncDisks => Op::SyncDisks,
            Action::WriteSuper(sup) => Op::WriteSuper(sup),
            Action::MarkUnjournaled => Op::MarkUnjournaled(self.positions().incarnation),
        };
        match self.is_here(&op) {
            true => self.commit_here(op),
            false => self.engine.submit(op),
        }
    }

    /// Whether this part of a commit is carried out in this thread: with one client, which waits
    /// or is about to, handing the work over and back costs more than it gains. Not where
    /// [`Here`] says that it was slow lately, nor a part if much is not durable yet.
    fn is_here(&self, op: &Op) -> bool {
        let part = match op {
            Op::JournalWrite { .. } | Op::JournalSync => self.filter.undurable() <= COMMIT_BYTES,
            Op::JournalCommit { .. } => true,
            _ => false,
        };
        part && self.alone && self.filter.commits_at_once() && self.here.may(self.clock.mono_us())
    }

    fn commit_here(&mut self, op: Op) {
        let (before, bytes) = (self.clock.mono_us(), self.filter.undurable());
        self.done.push(self.target.execute(op));
        self.here.took(before, self.clock.mono_us(), bytes);
    }

    fn handle(&mut self, done: Done, events: &mut Vec<VolumeEvent>, now: u64) {
        match done {
            Done::JournalWrite(result) => {
                self.note_journal(&result);
                self.filter.handle_journal_write(&result);
            }
            Done::JournalSync(result) => {
                self.here.ended();
                self.note_journal(&result);
                self.filter.handle_journal_sync(&result);
            }
            Done::WriteSuper(result) => {
                self.note_journal(&result);
                self.filter.handle_write_super(&result);
            }
            Done::MarkUnjournaled(result) => {
                if let Err(error) = &result {
                    tracing::error!(%error, "the note that the journal is dead cannot be written");
                }
                self.filter.handle_mark_unjournaled(&result, now);
            }
            Done::Apply(result) => {
                if let Err((disk, error)) = &result {
                    match no_space(error) {
                        true => self.note_full(*disk, error),
                        false => self.note_disk(*disk, error),
                    }
                    self.filter.handle_apply(result, &mut self.memory, now);
                } else if let Some(to) = self.filter.applying() {
                    self.retiring = Some(self.filter.window(to).cloned().collect());
                }
            }
            Done::SyncDisks(result) => {
                if let Err((disk, error)) = &result {
                    self.note_disk(*disk, error);
                }
                let result = result.map_err(|(disk, _)| disk);
                self.filter.handle_sync_disks(result, &mut self.memory);
            }
            Done::Read { token, buf, result } => {
                self.reading -= buf.len() as u64;
                let result = result.map(|()| buf).map_err(|e| Errno::from_io(&e));
                events.push(VolumeEvent::Read { token, result });
            }
            Done::Extents { token, result } => {
                self.reading -= EXTENTS_COST;
                let pieces = self.extents.remove(&token).unwrap_or_default();
                let result =
                    result.map(|e| merge_extents(&pieces, e)).map_err(|e| Errno::from_io(&e));
                events.push(VolumeEvent::Extents { token, result });
            }
        }
    }

    /// Applied records leave the overlay, only now that all are on the disks (I10), and only some
    /// a turn: clients wait meanwhile. Oldest first, each batch up to its own end, so that the
    /// overlays have all that is newer and nothing older (I9). Then the memory is free: true.
    fn retire(&mut self, now: u64) -> bool {
        let Some(batches) = &mut self.retiring else { return false };
        let mut blocks = 0;
        while blocks < RETIRE_BLOCKS
            && let Some(batch) = batches.pop_front()
        {
            for desc in &*batch.descs {
                let overlay = &mut self.overlays[usize::from(desc.disk)];
                let (offset, len) = (desc.offset.get(), u64::from(desc.len.get()));
                blocks += 1;
                match desc.rec_op() {
                    Some(RecOp::Write) => {
                        overlay.remove_write(batch.end, offset, len);
                        blocks += len / BLOCK;
                    }
                    Some(RecOp::Zero | RecOp::Trim) => overlay.remove_zero(batch.end, offset, len),
                    _ => {}
                }
            }
        }
        let done = batches.is_empty();
        if done {
            self.retiring = None;
            self.filter.handle_apply(Ok(()), &mut self.memory, now);
        }
        done
    }

    fn publish(&self) {
        let positions = self.filter.positions(0);
        let arena = &self.memory.0;
        arena.set_word(Word::Durable, positions.durable.0);
        arena.set_word(Word::ShipFloor, positions.ship_floor.0);
    }

    fn note_journal(&mut self, result: &io::Result<()>) {
        if let Err(error) = result
            && self.journal_error.is_none()
        {
            tracing::error!(%error, "the journal failed; writes go straight to the disks from now on");
            self.journal_error = Some(error.to_string());
        }
    }

    fn note_disk(&mut self, disk: u8, error: &io::Error) {
        let slot = &mut self.errors[usize::from(disk)];
        if slot.is_none() {
            tracing::error!(disk = %self.disks[usize::from(disk)].name, %error, "a disk failed");
        }
        *slot = Some(error.to_string());
    }

    /// It is tried again: said once, then `status` says it.
    fn note_full(&self, disk: u8, error: &io::Error) {
        if self.filter.refusal(disk) != Some(Errno::NoSpc) {
            tracing::warn!(disk = %self.disks[usize::from(disk)].name, %error, "a disk is full");
        }
    }

    fn check_space(&mut self) {
        for (disk, free) in self.disks.iter().zip(&mut self.free) {
            if disk.sparse {
                *free = self.files.free_bytes(&disk.path).unwrap_or(u64::MAX);
            }
        }
    }

    fn applied(&self) -> u64 {
        self.filter.positions(0).applied.0
    }

    /// Largest payload of one record.
    pub fn record_max(&self) -> u64 {
        self.filter.record_max()
    }

    /// The filter, for its positions and requests.
    pub fn filter(&mut self) -> &mut Filter {
        &mut self.filter
    }

    /// The disks.
    pub fn disks(&self) -> &[VolumeDisk] {
        &self.disks
    }

    /// Positions now.
    pub fn positions(&self) -> Positions {
        let held_cpu = self.target.seat.get().left_free();
        Positions { held_cpu, ..self.filter.positions(self.clock.mono_us()) }
    }

    /// Nobody waits for what `owner` asked: tokens carry it in their upper half.
    pub fn forget(&mut self, owner: u64) {
        self.take_back(owner);
        self.filter.forget(|token| token >> 32 == owner);
    }

    /// Monotonic time at which [`Volume::turn`] is due if nothing happens.
    pub fn timeout(&self) -> Option<u64> {
        if self.retiring.is_some() { Some(0) } else { self.filter.poll_timeout() }
    }

    /// Readable when [`Volume::turn`] has something to do.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.engine.fd()
    }

    /// The clock that its times are of.
    pub fn clock(&self) -> Arc<dyn Clock> {
        self.clock.clone()
    }

    /// Removes the arena's file; nothing in it is needed after a drain.
    pub fn remove_arena(&self) {
        if let Err(error) = std::fs::remove_file(&self.arena_path) {
            tracing::warn!(%error, "the arena cannot be removed");
        }
    }

    /// For `status`.
    pub fn status(&self, connections: u32) -> FilterStatus {
        let positions = self.positions();
        let (journal_used_bytes, journal_capacity_bytes) = self.filter.journal_use();
        let full = "its file system is full; writes are refused until there is room";
        let disks = self.disks.iter().enumerate().map(|(index, disk)| DiskStatus {
            disk: disk.name.clone(),
            size_bytes: disk.size,
            error: self.errors[index].clone().or(self.is_full(index, 0).then(|| full.into())),
        });
        FilterStatus {
            pid: std::process::id(),
            journal_used_bytes,
            journal_capacity_bytes,
            arena_used_bytes: self.filter.arena_use(),
            arena_capacity_bytes: self.memory.0.size(),
            io_engine: self.engine.name(),
            connections,
            disks: disks.collect(),
            writes: self.writes,
            write_bytes: self.write_bytes,
            positions,
        }
    }
}

/// Puts the overlay's pieces and the file's extents of the disk pieces together, up to
/// where the file's end early.
fn merge_extents(pieces: &[Piece], from_disk: Vec<Vec<Extent>>) -> Vec<Extent> {
    let mut merged: Vec<Extent> = Vec::new();
    let mut add = |extent: Extent| match merged.last_mut() {
        Some(last) if last.hole == extent.hole && last.zero == extent.zero => {
            last.len += extent.len
        }
        _ => merged.push(extent),
    };
    let mut from_disk = from_disk.into_iter();
    for piece in pieces {
        match piece.source {
            Source::Arena(_) => add(Extent { len: piece.len, hole: false, zero: false }),
            Source::Zero => add(Extent { len: piece.len, hole: true, zero: true }),
            Source::Disk => {
                let extents = from_disk.next().unwrap_or_default();
                let covered: u64 = extents.iter().map(|extent| extent.len).sum();
                extents.into_iter().for_each(&mut add);
                if covered < piece.len {
                    break;
                }
            }
        }
    }
    merged
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Nobody takes a turn any more, and the engine waits for what is under way.
        self.target.calm.store(false, Ordering::Relaxed);
    }
}

/// Clients wait for commits if one did in the last so many microseconds.
const AWAITED_LATELY: u64 = 1_000_000;
/// Whether a checkpoint stands in somebody's way, and need not be quick. (pure)
#[derive(Debug, Default)]
struct Calm {
    /// Somebody waited for a commit since the last look.
    awaited: bool,
    /// When that was so last.
    at: Option<u64>,
}

impl Calm {
    fn awaited(&mut self) {
        self.awaited = true;
    }

    /// `pressed`: the checkpoint must be quick.
    fn look(&mut self, now: u64, pressed: bool) -> bool {
        if std::mem::take(&mut self.awaited) {
            self.at = Some(now);
        }
        !pressed && self.at.is_some_and(|at| now < at + AWAITED_LATELY)
    }
}

/// Most bytes of a disk with unapplied writes that one question for extents is answered for.
const EXTENTS_BYTES: u64 = 64 << 20;
/// What a question for extents counts, bytes: more than its pieces and the longest answer in both
/// contexts, so that few at a time make the group's thread search its memory.
pub const EXTENTS_COST: u64 = 1 << 20;
/// Nothing is read while so much is on its way from the disks, bytes.
pub const READING_MAX: u64 = 64 << 20;
/// Records and blocks that leave the overlays in one turn.
const RETIRE_BLOCKS: u64 = 512;
/// Bytes that stay free on a file system that holds a sparse image.
pub const SPACE_MARGIN: u64 = 16 << 20;
const SPACE_CHECK_EVERY: u64 = 50_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_calm_for_a_while_after_a_flush_unless_somebody_waits_for_it() {
        let mut calm = Calm::default();
        assert!(!calm.look(0, false));
        calm.awaited();
        assert!(!calm.look(7, true) && calm.look(7, false));
        assert!(calm.look(6 + AWAITED_LATELY, false) && !calm.look(7 + AWAITED_LATELY, false));
        calm.awaited();
        assert!(calm.look(8 + AWAITED_LATELY, false));
    }

    #[test]
    fn what_follows_an_answer_that_ended_early_is_not_told() {
        let piece = |offset, source| Piece { offset, len: 4096, source };
        let pieces = [
            piece(0, Source::Arena(8192)),
            piece(4096, Source::Disk),
            piece(8192, Source::Zero),
            piece(12288, Source::Disk),
        ];
        let hole = |len| Extent { len, hole: true, zero: true };
        let data = |len| Extent { len, hole: false, zero: false };
        let all = merge_extents(&pieces, vec![vec![hole(4096)], vec![hole(4096)]]);
        assert_eq!(all, [data(4096), hole(12288)]);
        let second_missing = merge_extents(&pieces, vec![vec![hole(4096)]]);
        assert_eq!(second_missing, [data(4096), hole(8192)]);
        let first_cut = merge_extents(&pieces, vec![vec![hole(512)]]);
        assert_eq!(first_cut, [data(4096), hole(512)]);
    }
}
