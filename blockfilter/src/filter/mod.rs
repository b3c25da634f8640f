//! The order of writes, group commit, and who waits for what. (pure)
//!
//! A record gets its LSN when its payload is complete ([`Filter::admit`], I1). It
//! sits in the open batch; the batch is sealed when it is full or when a commit
//! is due or begins ahead; sealed bytes go to the journal in one run of writes and one sync;
//! then they are durable, flush waiters wake, and the records may be applied to the
//! disks (I3). A checkpoint syncs the disks and then says so in the super block.
//! After each event [`Filter::poll_action`] hands out what to do next.
//!
//! ```text
//!             target seeded          journal full of unshipped chunks
//!   [New] ───────────────▶ [Shipping] ───────────────▶ [Frozen]
//!     ▲ any of these           ▲──────── new seed ─────────┘
//!     │   journal write or sync fails ─▶ [Unjournaled]: writes go straight to the disks
//!     └── a disk fails ─▶ [BackingFailed]: that disk refuses writes, journal and arena keep theirs
//! ```
//!
//! Replication trouble never fails or blocks a write: a full journal freezes
//! (ruling 9). Nothing here does I/O or reads a clock.

mod admit;
mod foresee;
mod poll;
mod spacing;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;

use self::foresee::Foresee;
use self::spacing::Spacing;
use crate::apply::SealedBatch;
use crate::block::Errno;
use crate::control::{Mode, Positions};
use crate::dirty::{Dirty, DirtyExtent};
use crate::engine::no_space;
use crate::journal::chunks::{ChunkGeometry, Slots};
use crate::journal::format::*;
use crate::names::Lsn;

/// The memory that positions live in: the arena.
pub trait Memory {
    /// Writes bytes at a position that is not frozen.
    fn fill(&mut self, pos: u64, data: &[u8]);
    /// Bytes below `head` will not be written again.
    fn freeze(&mut self, head: u64);
    /// Everything below this record position is complete.
    fn publish(&mut self, admitted: u64);
    /// A restart has nothing below `pos`, where a batch with this CRC ends, to write to the
    /// disks; bytes below `floor` may be overwritten.
    fn release(&mut self, pos: u64, crc: u32, floor: u64);
}

/// A record to admit.
#[derive(Clone, Copy, Debug)]
pub struct NewRecord<'a> {
    /// What it does.
    pub op: RecOp,
    /// `REC_*` bits.
    pub flags: u16,
    /// Disk index.
    pub disk: u8,
    /// Byte offset, a multiple of 512.
    pub offset: u64,
    /// Bytes of the range, a multiple of 512 (Mark: of the tag).
    pub len: u32,
    /// The payload: `len` bytes for Write and Mark, else empty.
    pub payload: &'a [u8],
}

/// A record that got its LSN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Its LSN.
    pub lsn: u64,
    /// The position of its payload.
    pub pos: u64,
}

/// Why a record has to wait; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stall {
    /// The arena is full of records that are not on the disks.
    Arena,
    /// No chunk slot is free.
    Journal,
}

/// What to do next. Each is answered by the `handle_*` of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Write the arena's `[pos, pos + len)` at this offset of the journal.
    JournalWrite {
        /// Offset in the journal file.
        at: u64,
        /// Position.
        pos: u64,
        /// Bytes, a multiple of 4 KiB.
        len: u64,
    },
    /// Sync the journal.
    JournalSync,
    /// Both at once: a commit of one piece. Answered by [`Filter::handle_journal_sync`].
    JournalCommit {
        /// Offset in the journal file.
        at: u64,
        /// Position.
        pos: u64,
        /// Bytes, a multiple of 4 KiB.
        len: u64,
    },
    /// Write the window's records ([`Filter::window`]) to the disks.
    Apply {
        /// Exclusive end of the window.
        to: u64,
    },
    /// Sync every disk that was written since the last time.
    SyncDisks,
    /// Write this super block, and sync.
    WriteSuper(Box<JournalSuper>),
    /// Record durably, outside the journal, that it must never be replayed.
    MarkUnjournaled,
}

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct FilterConfig {
    /// Of the journal.
    pub geometry: ChunkGeometry,
    /// Bytes in the arena.
    pub arena: u64,
}

impl FilterConfig {
    /// Largest payload of one record: larger requests become several records.
    pub fn record_max(&self) -> u64 {
        (self.geometry.chunk / 4).min(1 << 20)
    }
}

/// Where a filter starts from, as recovery found it.
#[derive(Debug)]
pub struct Start {
    /// The durable super block.
    pub sup: JournalSuper,
    /// The chunks in the file.
    pub slots: Slots,
    /// Everything below is on the disks (not necessarily synced).
    pub applied: u64,
    /// CRC of the batch before `applied`.
    pub applied_crc: u32,
    /// Everything below is durable in the journal.
    pub durable: u64,
    /// Batches from `applied` on, sealed.
    pub sealed: Vec<SealedBatch>,
    /// Records of the open batch, already in the arena.
    pub open: Vec<RecDesc>,
    /// The journal must not be used.
    pub unjournaled: bool,
}

/// One group's order of writes.
#[derive(Debug)]
pub struct Filter {
    config: FilterConfig,
    journal_id: u64,
    open: OpenBatch,
    prev_crc: u32,
    sealed: VecDeque<SealedBatch>,
    segments: VecDeque<Segment>,
    commit: Option<Commit>,
    durable: u64,
    applied: u64,
    applied_crc: u32,
    ship_floor: u64,
    dirty: Dirty,
    mode: Mode,
    slots: Slots,
    sup: JournalSuper,
    writing_sup: Option<Box<JournalSuper>>,
    want_sup: bool,
    marker: Marker,
    /// The note could not be written; it is tried again at `retry_marker_at`.
    marker_failed: bool,
    retry_marker_at: u64,
    apply: Option<u64>,
    applied_at: u64,
    /// Position and CRC that the running sync of the disks will cover.
    syncing: Option<(u64, u32)>,
    synced: Option<(u64, u32)>,
    checkpoint_at: u64,
    spacing: Spacing,
    waiters: VecDeque<(u64, u64)>,
    foresee: Foresee,
    pressed: Option<Stall>,
    force_commit: bool,
    drain: bool,
    retry_apply_at: u64,
    failed: [bool; DISKS_MAX],
    no_space: [bool; DISKS_MAX],
    wall: u64,
}

#[derive(Debug)]
struct OpenBatch {
    lsn: u64,
    /// Where the next payload may start.
    fill: u64,
    descs: Vec<RecDesc>,
    since: u64,
    /// The chunk's header is in the arena.
    chunk_open: bool,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    pos: u64,
    len: u64,
}

#[derive(Debug)]
struct Commit {
    end: u64,
    writes: Vec<Segment>,
    /// One of several writes was started.
    begun: bool,
    in_flight: usize,
    sync: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Begun ahead: what is admitted until it is due joins it. With when its first record
    /// came.
    Held(u64),
    Due,
    Running,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marker {
    NotNeeded,
    /// What the journal made durable goes to the disks first: it will not be replayed.
    Applying,
    Syncing,
    Due,
    Running,
    Done,
}

/// Where the next record goes.
struct Place {
    pad: bool,
    seal: bool,
    lsn: u64,
    pos: u64,
    end: u64,
}

impl Filter {
    /// Continues from what recovery found. `now` is monotonic, microseconds.
    pub fn new(config: FilterConfig, start: Start, now: u64) -> Self {
        let journal_id = crate::journal::batch::short_id(&start.sup.journal_uuid);
        let sealed: VecDeque<SealedBatch> = start.sealed.into();
        let last = sealed.back();
        let open_lsn = config.geometry.normal(last.map_or(start.applied, |b| b.end));
        let prev_crc = last.map_or(start.applied_crc, |b| b.hdr_crc);
        let mode = match start.sup.mode {
            _ if start.unjournaled => Mode::Unjournaled,
            MODE_SHIPPING => Mode::Shipping,
            MODE_FROZEN => Mode::Frozen,
            _ => Mode::New,
        };
        let fill = start
            .open
            .iter()
            .filter(|d| d.payload_len() > 0)
            .map(|d| open_lsn + u64::from(d.payload_off.get()) + u64::from(d.payload_len()));
        let fill = fill.max().unwrap_or(0).max(open_lsn + PAGE);
        let starts_chunk = open_lsn % config.geometry.chunk == PAGE;
        let chunk_open = !start.open.is_empty() || !starts_chunk;
        let admitted = open_lsn + start.open.len() as u64;
        let journal = u64::from(config.geometry.slots) * config.geometry.chunk;
        let open = OpenBatch { lsn: open_lsn, fill, descs: start.open, since: now, chunk_open };
        let mut filter = Self {
            config,
            journal_id,
            open,
            prev_crc,
            sealed,
            segments: VecDeque::new(),
            commit: None,
            durable: start.durable,
            applied: start.applied,
            applied_crc: start.applied_crc,
            ship_floor: start.sup.ship_floor.get(),
            dirty: Dirty::new(admitted),
            mode,
            slots: start.slots,
            sup: start.sup,
            writing_sup: None,
            want_sup: true,
            marker: if start.unjournaled { Marker::Done } else { Marker::NotNeeded },
            marker_failed: false,
            retry_marker_at: 0,
            apply: None,
            applied_at: now,
            syncing: None,
            synced: None,
            checkpoint_at: now,
            spacing: Spacing::new(journal),
            waiters: VecDeque::new(),
            foresee: Foresee::default(),
            pressed: None,
            force_commit: false,
            drain: false,
            retry_apply_at: 0,
            failed: [false; DISKS_MAX],
            no_space: [false; DISKS_MAX],
            wall: 0,
        };
        filter.queue_undurable();
        filter.check();
        filter
    }

    /// The wall clock, microseconds since 1970: batches sealed from now on carry it.
    pub fn set_wall(&mut self, wall_us: u64) {
        self.wall = wall_us;
    }

    /// Calls `token` back once everything below `pos` is durable; false if it
    /// is already (I4).
    pub fn wait_durable(&mut self, pos: u64, token: u64) -> bool {
        self.foresee.flushed();
        if pos <= self.durable {
            return false;
        }
        debug_assert!(self.waiters.back().is_none_or(|w| w.0 <= pos));
        self.waiters.push_back((pos, token));
        true
    }

    /// Somebody waits for something to be durable, or is about to.
    pub fn is_awaited(&self) -> bool {
        !self.waiters.is_empty() || self.foresee.due()
    }

    /// When the first record came of a commit that was begun ahead and is not due yet.
    fn held(&self) -> Option<u64> {
        match self.commit.as_ref()?.sync {
            Step::Held(since) => Some(since),
            Step::Due | Step::Running => None,
        }
    }

    /// A record waits for room or may soon, everything is to be written back, or only the disks make anything durable:
    /// a checkpoint must be quick.
    pub fn is_pressed(&self) -> bool {
        let scarce = self.slots.free() <= self.slots.reserve();
        scarce || self.pressed.is_some() || self.drain || self.mode == Mode::Unjournaled
    }

    /// The commit is awaited, and nothing else of the journal is being synced.
    pub fn commits_at_once(&self) -> bool {
        self.is_awaited() && self.writing_sup.is_none()
    }

    /// Tokens whose wait is over; false: what they wait for can never be promised.
    pub fn poll_waiter(&mut self) -> Option<(u64, bool)> {
        let (pos, token) = *self.waiters.front()?;
        let durable = pos <= self.durable;
        if !durable && !self.promises_nothing() {
            return None;
        }
        self.waiters.pop_front();
        Some((token, durable))
    }

    /// Nobody waits for these tokens any more.
    pub fn forget(&mut self, is_gone: impl Fn(u64) -> bool) {
        self.waiters.retain(|(_, token)| !is_gone(*token));
    }

    /// Neither the journal nor the disks can make anything durable any more.
    pub fn promises_nothing(&self) -> bool {
        self.mode == Mode::Unjournaled && self.stall_is_final()
    }

    /// Exclusive end of the records that have an LSN.
    pub fn admitted(&self) -> u64 {
        self.open.lsn + self.open.descs.len() as u64
    }

    /// Whether any of them are not known to be written to their disks.
    pub fn has_unapplied(&self) -> bool {
        self.applied < self.admitted()
    }

    /// Whether writes to a disk must be refused.
    pub fn refusal(&self, disk: u8) -> Option<Errno> {
        let disk = usize::from(disk);
        if self.failed[disk] {
            Some(Errno::Io)
        } else if self.no_space[disk] {
            Some(Errno::NoSpc)
        } else if self.drain {
            Some(Errno::Shutdown)
        } else {
            None
        }
    }

    /// A stalled record will not get room: a disk failed and pins the arena, or the
    /// journal failed and it cannot even be noted that it must not be replayed.
    pub fn stall_is_final(&self) -> bool {
        self.failed.contains(&true) || self.marker_failed
    }

    /// Commit soon, whoever waits.
    pub fn request_commit(&mut self) {
        self.force_commit = true;
    }

    /// Apply everything and mark the journal clean; then [`Filter::drained`].
    pub fn request_drain(&mut self) {
        self.drain = true;
        self.want_sup = true;
        // A disk that was full is tried at once, and once.
        self.no_space = [false; DISKS_MAX];
        self.retry_apply_at = 0;
    }

    /// The drain ends without being complete: a disk or the note of the journal's death failed,
    /// or a disk is full. Journal and arena keep what is not written.
    pub fn drain_fails(&self) -> bool {
        self.stall_is_final() || (self.drain && self.is_full())
    }

    /// Whether a disk had no room for what was written back.
    pub fn is_full(&self) -> bool {
        self.no_space.contains(&true)
    }

    /// The drain is complete: every disk is a plain image again (I25).
    pub fn drained(&self) -> bool {
        let idle = self.commit.is_none() && self.apply.is_none() && self.writing_sup.is_none();
        let all = self.admitted() == self.open.lsn && self.applied == self.open.lsn;
        let synced = self.syncing.is_none();
        match self.mode {
            Mode::Unjournaled => {
                self.drain && idle && all && synced && self.durable >= self.applied
            }
            _ => self.drain && idle && all && synced && self.sup.clean == 1,
        }
    }

    /// The target says what it holds, for the journal and for [`Filter::dirty`]; the parameters
    /// are those of [`Dirty::told`].
    pub fn target_holds(&mut self, teller: u64, pos: u64, whole: bool) {
        // What was never durable here is not what the disks hold.
        let held = (pos <= self.durable).then(|| self.config.geometry.normal(pos));
        let whole = whole && held.is_some();
        if self.dirty.told(teller, held.unwrap_or(0), whole, self.admitted()) {
            self.ship_floor(pos);
        }
    }

    /// What of a disk may differ from what the target durably holds; see [`Dirty::extents`].
    /// Everything, unless the target has a complete copy and all that it lacks is known.
    pub fn dirty(&self, disk: u8, offset: u64, len: u64, max: usize) -> Vec<DirtyExtent> {
        // A failed disk may show older content than it was given. While frozen a copy is due.
        if self.mode != Mode::Shipping {
            return vec![DirtyExtent { len, dirty: true }];
        }
        self.dirty.extents(disk, offset, len, max)
    }

    /// The target holds everything below `pos`.
    fn ship_floor(&mut self, pos: u64) {
        let shipping = match self.mode {
            Mode::Shipping => true,
            Mode::BackingFailed => self.sup.mode == MODE_SHIPPING,
            _ => false,
        };
        if shipping && pos <= self.durable {
            self.ship_floor = self.ship_floor.max(pos);
            self.recycle();
        }
    }

    /// Keeps batches for the target from the returned position on. It holds
    /// at once; durably after the next super block ([`Filter::super_seq_due`]).
    pub fn begin_seed(&mut self) -> Option<u64> {
        if matches!(self.mode, Mode::Unjournaled | Mode::BackingFailed) {
            return None;
        }
        self.mode = Mode::Shipping;
        self.ship_floor = self.durable;
        self.dirty.forget(self.admitted());
        self.want_sup = true;
        Some(self.durable)
    }

    /// The sequence number that a super block must reach to hold all that was
    /// decided until now.
    pub fn super_seq_due(&self) -> u64 {
        let written = self.writing_sup.as_ref().map_or(&self.sup, |s| s).seq.get();
        written + u64::from(self.want_sup)
    }

    /// The sequence number of the durable super block.
    pub fn super_seq(&self) -> u64 {
        self.sup.seq.get()
    }

    /// The batches to apply up to `to`, oldest first.
    pub fn window(&self, to: u64) -> impl DoubleEndedIterator<Item = &SealedBatch> {
        let normal = move |b: &&SealedBatch| self.config.geometry.normal(b.end) <= to;
        let count = self.sealed.iter().take_while(normal).count();
        self.sealed.range(..count)
    }

    /// Where the running apply ends.
    pub fn applying(&self) -> Option<u64> {
        self.apply
    }

    /// Largest payload of one record.
    pub fn record_max(&self) -> u64 {
        self.config.record_max()
    }

    /// All positions.
    pub fn positions(&self, mono_us: u64) -> Positions {
        let used = usize::from(self.sup.n_history);
        let history = self.sup.history[..used.min(HISTORY_MAX)].iter();
        Positions {
            admitted: Lsn(self.admitted()),
            durable: Lsn(self.durable),
            applied: Lsn(self.applied),
            checkpoint: Lsn(self.sup.checkpoint.get()),
            ship_floor: Lsn(self.ship_floor),
            incarnation: self.sup.incarnation.get(),
            generation: self.sup.generation.get(),
            history: history.map(|h| (h.incarnation.get(), Lsn(h.end.get()))).collect(),
            mode: self.mode,
            mono_us,
            held_cpu: None,
        }
    }

    /// Bytes of chunks that cannot be recycled, and of all slots.
    pub fn journal_use(&self) -> (u64, u64) {
        let geometry = self.config.geometry;
        (u64::from(self.slots.used()) * geometry.chunk, u64::from(geometry.slots) * geometry.chunk)
    }

    /// One of the commit's journal writes is done.
    pub fn handle_journal_write(&mut self, result: &io::Result<()>) {
        match (result, self.commit.as_mut()) {
            (Err(_), _) => self.lose_journal(),
            (Ok(()), Some(commit)) => commit.in_flight -= 1,
            (Ok(()), None) => {}
        }
    }

    /// The commit's sync is done: its end is durable.
    pub fn handle_journal_sync(&mut self, result: &io::Result<()>) {
        match (result, self.commit.take()) {
            (Err(_), _) => self.lose_journal(),
            (Ok(()), Some(commit)) => {
                assert!(commit.end >= self.durable && commit.writes.is_empty());
                self.durable = commit.end;
                self.check();
            }
            (Ok(()), None) => {}
        }
    }

    /// The window was written to the disks. On an error nothing of it counts.
    pub fn handle_apply(
        &mut self,
        result: Result<(), (u8, io::Error)>,
        mem: &mut impl Memory,
        now: u64,
    ) {
        let Some(to) = self.apply.take() else { return };
        self.applied_at = now;
        if let Err((disk, error)) = result {
            if no_space(&error) {
                self.no_space[usize::from(disk)] = true;
                self.retry_apply_at = now + RETRY_AFTER;
            } else {
                self.lose_disk(disk);
            }
            return;
        }
        self.no_space = [false; DISKS_MAX];
        while let Some(batch) = self.sealed.front() {
            if self.config.geometry.normal(batch.end) > to {
                break;
            }
            self.applied_crc = batch.hdr_crc;
            self.sealed.pop_front();
        }
        self.applied = to;
        if self.marker != Marker::Done {
            mem.release(to, self.applied_crc, self.released());
        }
        if self.pressed == Some(Stall::Arena) {
            self.pressed = None;
        }
        self.check();
    }

    /// The disks are synced up to where the sync started.
    pub fn handle_sync_disks(&mut self, result: Result<(), u8>, mem: &mut impl Memory) {
        let Some((pos, crc)) = self.syncing.take() else { return };
        match result {
            Err(disk) => self.lose_disk(disk),
            Ok(()) if self.marker == Marker::Syncing => self.marker = Marker::Due,
            Ok(()) if self.marker == Marker::Done => {
                self.durable = pos;
                mem.release(pos, crc, self.released());
                if self.pressed == Some(Stall::Arena) {
                    self.pressed = None;
                }
                self.check();
            }
            // Begun before the journal was lost: what the note waits for syncs once more.
            Ok(()) if self.mode == Mode::Unjournaled => {}
            Ok(()) => {
                let full = self.pressed == Some(Stall::Journal);
                self.spacing.ended(self.open.fill, full);
                self.synced = Some((pos, crc));
            }
        }
    }

    /// The super block is durable.
    pub fn handle_write_super(&mut self, result: &io::Result<()>) {
        let Some(sup) = self.writing_sup.take() else { return };
        if result.is_err() {
            self.lose_journal();
            return;
        }
        if self.synced.is_some_and(|s| s.0 <= sup.checkpoint.get()) {
            self.synced = None;
        }
        self.sup = *sup;
        if self.pressed == Some(Stall::Journal) {
            self.pressed = None;
        }
        self.recycle();
    }

    /// The note that the journal is dead is durable. Until it is, nothing newer than the
    /// journal may reach the disks: a start would replay the journal over it.
    pub fn handle_mark_unjournaled(&mut self, result: &io::Result<()>, now: u64) {
        self.marker_failed = result.is_err();
        self.retry_marker_at = now + RETRY_AFTER;
        self.marker = if self.marker_failed { Marker::Due } else { Marker::Done };
    }

    /// A journal error is final (ruling 6): no retry into the same file.
    fn lose_journal(&mut self) {
        if self.mode != Mode::Unjournaled {
            self.mode = Mode::Unjournaled;
            self.marker = Marker::Applying;
            self.commit = None;
            // Nobody waits for a slot any more.
            self.pressed = None;
            self.segments.clear();
            self.synced = None;
        }
    }

    /// Whether a disk failed.
    pub fn lost_a_disk(&self) -> bool {
        self.failed.contains(&true)
    }

    fn lose_disk(&mut self, disk: u8) {
        self.failed[usize::from(disk)] = true;
        if self.mode != Mode::Unjournaled {
            self.mode = Mode::BackingFailed;
        }
    }

    fn recycle(&mut self) {
        let checkpoint = self.sup.checkpoint.get();
        let keep = match (self.mode, self.sup.mode) {
            (Mode::New, MODE_NEW) | (Mode::Frozen, MODE_FROZEN) => checkpoint,
            _ => checkpoint.min(self.ship_floor),
        };
        self.slots.recycle(keep);
    }

    /// The order of positions (design README).
    fn check(&self) {
        let checkpoint = self.sup.checkpoint.get();
        assert!(checkpoint <= self.applied, "checkpoint {checkpoint} > applied {}", self.applied);
        let unjournaled = self.mode == Mode::Unjournaled;
        assert!(self.applied <= self.durable || unjournaled, "I3: applied beyond durable");
        assert!(self.durable <= self.open.lsn);
    }
}

/// Longest time between an admission and its commit, microseconds.
pub const COMMIT_AFTER: u64 = 20_000;
/// Bytes that make a commit due.
pub const COMMIT_BYTES: u64 = 1 << 20;
/// Bytes of the open batch, header page included, from which on a commit may begin ahead, where
/// half of what comes before a foreseen flush is there: they are written while the rest comes.
const AHEAD_BYTES: u64 = 32 << 10;
/// Apply at least this often, microseconds.
pub const APPLY_AFTER: u64 = 300_000;
/// Checkpoint so long after the last write or checkpoint, microseconds.
pub const CHECKPOINT_AFTER: u64 = 1_000_000;
/// Checkpoint at least this often while writes go on, microseconds.
pub const CHECKPOINT_AFTER_BUSY: u64 = 10_000_000;
/// Wait before an apply is tried again after ENOSPC, or the note after an error, microseconds.
pub const RETRY_AFTER: u64 = 1_000_000;
/// Most bytes of one apply window.
pub const WINDOW_MAX: u64 = 64 << 20;
/// Most bytes of one batch, unless one record is larger.
pub const BATCH_MAX: u64 = 4 << 20;
/// Most bytes of one journal write.
pub const SEGMENT_MAX: u64 = 4 << 20;
