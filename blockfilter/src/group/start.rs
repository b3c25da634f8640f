//! Bringing a group up: locks, recovery, engine.
//!
//! *Warm*: the arena of the same boot, journal and incarnation is there; nothing was
//! lost; the same incarnation goes on. *Clean*: the last stop drained. *Cold*: power was
//! lost: sync the journal, scan it, write the records back, sync the disks, and only
//! then a super block with the new checkpoint and the next incarnation (ruling 4).

use crate::crc32c;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use zerocopy::IntoBytes;

use super::volume::{ArenaMemory, Volume, VolumeDisk};
use crate::apply::SealedBatch;
use crate::arena::{ARENA_MAGIC, Arena, ArenaHdr, Word, boot_id};
use crate::config::{GroupConfig, GroupPaths};
use crate::engine::blocking::Blocking;
use crate::engine::queue::{Done, Engine, Inline, Op, Target, Writes};
use crate::engine::real::{RealClock, RealFiles};
use crate::engine::uring::Uring;
use crate::engine::{Clock, File, Files, Latched, Open};
use crate::filter::{Filter, FilterConfig, Memory, Start};
use crate::journal::batch::{finish_super, parse_batch, payloads_ok, super_offset};
use crate::journal::format::*;
use crate::journal::note::{self, Note};
use crate::journal::open::{OpenError, Scanned, read_chunks, read_super, scan};
use crate::journal::{chunks::Slots, first_super, geometry_of};
use crate::overlay::Overlay;

/// Why a group cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file could not be opened or read.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process holds a file, or a dead one's I/O is still under way.
    #[error("{0} is in use by another process")]
    Busy(PathBuf),
    /// The backing file is not as long as it was.
    #[error("{path} is {found} bytes long; it was protected with {expected}")]
    Size {
        /// Which.
        path: PathBuf,
        /// Now.
        found: u64,
        /// At protect time.
        expected: u64,
    },
    /// The journal cannot be used.
    #[error("{path}: {source}")]
    Journal {
        /// The journal.
        path: PathBuf,
        /// Why.
        source: OpenError,
    },
    /// Writing back what the journal holds failed.
    #[error("writing the journal back to the disks failed: {0}")]
    Replay(io::Error),
    /// The arena or the engine cannot be made.
    #[error("{0}")]
    System(String),
}

impl StartError {
    /// Whether it is the journal that cannot be used.
    pub fn is_of_journal(&self, config: &GroupConfig) -> bool {
        match self {
            Self::Journal { .. } => true,
            Self::File { path, .. } => *path == config.journal,
            _ => false,
        }
    }
}

/// Everything that a volume is made of, before the engine.
#[derive(Debug)]
pub struct Parts {
    /// Files and arena.
    pub target: Arc<Target>,
    /// The filter, ready to admit.
    pub filter: Filter,
    /// With every record that is not on the disks.
    pub overlays: Vec<Overlay>,
    /// The disks.
    pub disks: Vec<VolumeDisk>,
}

/// Opens and recovers the group of `paths` on this machine.
pub fn open(config: &GroupConfig, paths: &GroupPaths) -> Result<Volume, StartError> {
    let files: Arc<dyn Files> = Arc::new(RealFiles);
    let clock: Arc<dyn Clock> = Arc::new(RealClock::new());
    let marker = marker(paths);
    let journal = match open_locked(files.as_ref(), &config.journal, Open::Direct) {
        Err(StartError::File { source, .. }) if files.exists(&marker) => {
            tracing::error!(error = %source, "the failed journal cannot be opened any more");
            no_journal(files.as_ref())?
        }
        other => other?,
    };
    let disks = open_disks(config, files.as_ref())?;
    let parts = recover(config, files, journal, disks, marker, clock.mono_us())?;
    // Before the engine pins the arena's pages.
    let huge = parts.target.arena.use_huge_pages(clock.as_ref());
    tracing::debug!(bytes = huge, "huge pages of the arena");
    let engine = choose_engine(&parts.target)?;
    Ok(Volume::new(
        parts.filter,
        parts.overlays,
        parts.disks,
        parts.target,
        engine,
        clock,
        config.arena_path(),
    ))
}

/// Whether journal and disk are on different devices. On one device what is written twice
/// had better stay in the page cache for a while: some of it is overwritten there.
fn apart(journal: &Path, disk: &Path) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let device = |path: &Path| {
        let meta = std::fs::metadata(path).ok()?;
        Some(if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() })
    };
    device(journal) != device(disk)
}

/// The note that a group's journal is dead.
pub fn marker(paths: &GroupPaths) -> PathBuf {
    paths.dir().join("unjournaled")
}

/// Stands in for a dead journal that cannot be opened: nothing can be read from it, and
/// writing is refused. The locks on the disks keep a second process away.
fn no_journal(files: &dyn Files) -> Result<Arc<dyn File>, StartError> {
    let path = PathBuf::from("/dev/null");
    files.open(&path, Open::Read).map_err(|source| StartError::File { path, source })
}

/// Opens a file and locks that very descriptor, which all later I/O uses: the lock is
/// held until the last I/O of a dead process is done (ruling 5).
fn open_locked(files: &dyn Files, path: &Path, how: Open) -> Result<Arc<dyn File>, StartError> {
    let error = |source| StartError::File { path: path.to_owned(), source };
    let file = files.open(path, how).map_err(error)?;
    if let Some(fd) = file.fd() {
        let mut left = LOCK_WAIT;
        while let Err(e) = flock(fd, FlockOperation::NonBlockingLockExclusive) {
            if e != rustix::io::Errno::WOULDBLOCK {
                return Err(error(e.into()));
            }
            if left.is_zero() {
                return Err(StartError::Busy(path.to_owned()));
            }
            std::thread::sleep(LOCK_STEP);
            left = left.saturating_sub(LOCK_STEP);
        }
    }
    Ok(file)
}

fn choose_engine(target: &Arc<Target>) -> Result<Box<dyn Engine>, StartError> {
    let system = |e: io::Error| StartError::System(format!("the I/O engine cannot start: {e}"));
    let asked = std::env::var("STANDFAST_IO_ENGINE").unwrap_or_default();
    if asked == "blocking" {
        return Ok(Box::new(Blocking::new(target, "asked for").map_err(system)?));
    }
    match Uring::new(target) {
        Ok(engine) => Ok(Box::new(engine)),
        Err(error) if asked == "io_uring" => Err(system(error)),
        Err(error) => {
            tracing::warn!(%error, "io_uring is refused; plain system calls do the same work");
            let why = format!("io_uring refused: {error}");
            Ok(Box::new(Blocking::new(target, &why).map_err(system)?))
        }
    }
}

/// Recovers over any files; see the module's text. `now` is monotonic microseconds.
pub fn recover(
    config: &GroupConfig,
    files: Arc<dyn Files>,
    journal: Arc<dyn File>,
    disks: Vec<Arc<dyn File>>,
    marker: PathBuf,
    now: u64,
) -> Result<Parts, StartError> {
    let volume_disks = check_disks(config, &disks)?;
    // Left by a process that died over it.
    let _ = std::fs::remove_file(again_path(config));
    let journal: Arc<dyn File> = Arc::new(Latched::new(journal));
    let (sup, noted) = find_super(config, files.as_ref(), journal.as_ref(), &marker)?;
    let dead = noted.is_some();
    let make = |arena: Arc<Arena>| {
        Arc::new(Target {
            journal: journal.clone(),
            disks: disks.iter().map(latched).collect(),
            holes: config.disks.iter().map(|d| files.holes_are_true(&d.path)).collect(),
            writes: config.disks.iter().map(|d| Writes::new(d.size_bytes)).collect(),
            written_again: 0.into(),
            arena,
            calm: false.into(),
            seat: Arc::default(),
            files: files.clone(),
            marker: marker.clone(),
        })
    };
    let geometry = geometry_of(&sup);
    let filter_config = FilterConfig { geometry, arena: config.arena_bytes };
    let parts = |start: Start, target| Parts {
        target,
        overlays: overlays_of(&start, config.disks.len()),
        filter: Filter::new(filter_config, start, now),
        disks: volume_disks,
    };
    let path = config.arena_path();
    let hdr = arena_hdr(&sup, config.arena_bytes)?;
    if let Some(arena) = Arena::open(&path, &hdr).map_err(arena_error)? {
        match warm(&sup, journal.as_ref(), &arena, dead) {
            Ok(Some(start)) => {
                let syncing = arena.word(Word::Syncing);
                if syncing != 0 && !dead {
                    write_again(config, &journal, start.applied, &make)?;
                }
                let parts = parts(start, make(Arc::new(arena)));
                if !dead {
                    parts.target.written_again.store(syncing, Ordering::Release);
                }
                return Ok(parts);
            }
            Ok(None) => {}
            Err(why) => tracing::error!(
                why,
                "the arena is damaged; acknowledged writes that were never flushed may be lost"
            ),
        }
    }
    let start = match noted {
        Some(noted) => bare(sup, noted, files.as_ref(), &marker)?,
        None => cold(config, &journal, sup, &make).map_err(|e| e.into_start(config))?,
    };
    let arena = Arc::new(new_arena(config, &start)?);
    Ok(parts(start, make(arena)))
}

fn latched(disk: &Arc<dyn File>) -> Arc<dyn File> {
    Arc::new(Latched::retried_when_full(disk.clone()))
}

fn open_disks(config: &GroupConfig, files: &dyn Files) -> Result<Vec<Arc<dyn File>>, StartError> {
    let mut disks = Vec::new();
    for disk in &config.disks {
        let how = if apart(&config.journal, &disk.path) { Open::Disk } else { Open::ReadWrite };
        disks.push(open_locked(files, &disk.path, how)?);
    }
    Ok(disks)
}

/// See [`super::check_disks`].
pub(super) fn try_disks(config: &GroupConfig) -> Result<(), StartError> {
    check_disks(config, &open_disks(config, &RealFiles)?).map(drop)
}

/// Syncs the disks, counted in the arena as any other sync of them.
pub(super) fn sync_disks(config: &GroupConfig) -> Result<(), StartError> {
    let path = config.arena_path();
    let hdr = Arena::identity(&path).map_err(arena_error)?;
    let arena = hdr.map_or(Ok(None), |hdr| Arena::open(&path, &hdr)).map_err(arena_error)?;
    let count = |by| arena.iter().for_each(|a| a.add_word(Word::Syncing, by));
    let disks = open_disks(config, &RealFiles)?;
    count(1);
    for (file, disk) in disks.iter().zip(&config.disks) {
        let error = |source| StartError::File { path: disk.path.clone(), source };
        file.sync_data().map_err(error)?;
    }
    count(-1);
    Ok(())
}

/// The disks must be as long as they were when they were protected.
fn check_disks(
    config: &GroupConfig,
    disks: &[Arc<dyn File>],
) -> Result<Vec<VolumeDisk>, StartError> {
    let mut found_disks = Vec::new();
    for (disk, file) in config.disks.iter().zip(disks) {
        let error = |source| StartError::File { path: disk.path.clone(), source };
        let found = file.len().map_err(error)?;
        if found != disk.size_bytes {
            let (path, expected) = (disk.path.clone(), disk.size_bytes);
            return Err(StartError::Size { path, found, expected });
        }
        found_disks.push(VolumeDisk {
            name: disk.disk.clone(),
            size: disk.size_bytes,
            path: disk.path.clone(),
            sparse: !file.is_device() && file.is_sparse().unwrap_or(true),
            device: file.is_device(),
        });
    }
    Ok(found_disks)
}

/// An empty arena at the start's position; `Published`, set last, makes it valid.
fn new_arena(config: &GroupConfig, start: &Start) -> Result<Arena, StartError> {
    let geometry = geometry_of(&start.sup);
    let hdr = arena_hdr(&start.sup, config.arena_bytes)?;
    let arena = Arena::create(&config.arena_path(), &hdr).map_err(arena_error)?;
    let open = geometry.normal(start.applied);
    let head = if open % geometry.chunk == PAGE { open - PAGE } else { open };
    arena.set_bounds(head, head);
    arena.set_word(Word::Applied, start.applied);
    arena.set_word(Word::Durable, start.durable);
    let tag = (start.applied >> 12) << 32;
    arena.set_word(Word::AppliedCrc, tag | u64::from(start.applied_crc));
    arena.set_word(Word::Published, open);
    Ok(arena)
}

fn arena_error(error: io::Error) -> StartError {
    StartError::System(format!("the arena on /dev/shm cannot be made: {error}"))
}

fn arena_hdr(sup: &JournalSuper, size: u64) -> Result<ArenaHdr, StartError> {
    Ok(ArenaHdr {
        magic: ARENA_MAGIC,
        version: 1.into(),
        reserved: 0.into(),
        journal_uuid: sup.journal_uuid,
        boot_id: boot_id().map_err(arena_error)?,
        incarnation: sup.incarnation,
        size: size.into(),
    })
}

/// Takes over the arena of a process that died. None if it was never finished.
fn warm(
    sup: &JournalSuper,
    journal: &dyn File,
    arena: &Arena,
    dead: bool,
) -> Result<Option<Start>, &'static str> {
    let published = arena.word(Word::Published);
    if published == 0 {
        return Ok(None);
    }
    let geometry = geometry_of(sup);
    let (applied, durable) = (arena.word(Word::Applied), arena.word(Word::Durable));
    let open_lsn = published / PAGE * PAGE;
    if applied > open_lsn || open_lsn - applied > arena.size() {
        return Err("its positions contradict each other");
    }
    let whole_chunk = open_lsn % geometry.chunk == PAGE && published == open_lsn;
    let head = if whole_chunk { open_lsn - PAGE } else { open_lsn };
    // The page of a chunk's header may have to be written to the journal again.
    let floor = if applied % geometry.chunk == PAGE { applied - PAGE } else { applied };
    arena.set_bounds(floor.min(head), head);
    let mut sealed = Vec::new();
    let (mut crc, mut first_prev) = (None, None);
    let mut at = geometry.normal(applied);
    while at < open_lsn {
        let (hdr, descs) = parse_batch(arena.bytes(at, PAGE)).ok_or("a sealed batch is damaged")?;
        let total = u64::from(hdr.total_len.get());
        let pad = hdr.flags & BATCH_PAD != 0;
        let chained = crc.is_none_or(|crc| crc == hdr.prev_crc.get());
        if hdr.lsn.get() != at || !chained || at + total > geometry.chunk_end(at) {
            return Err("a sealed batch is out of place");
        }
        if !pad && !payloads_ok(&hdr, &descs, arena.bytes(at, total)) {
            return Err("a record's checksum does not match");
        }
        first_prev.get_or_insert(hdr.prev_crc.get());
        let hdr_crc = hdr.hdr_crc.get();
        crc = Some(hdr_crc);
        sealed.push(SealedBatch { lsn: at, end: at + total, hdr_crc, descs: descs.into() });
        at = geometry.normal(at + total);
    }
    let word = arena.word(Word::AppliedCrc);
    let tagged = (word >> 32 == (applied >> 12) & 0xffff_ffff).then_some(word as u32);
    let applied_crc = first_prev.or(tagged).ok_or("the checksum chain is lost")?;
    let open = open_records(arena, open_lsn, published - open_lsn)?;
    // The dead process may have given up slots by a newer floor than the durable one.
    let ship_floor = sup.ship_floor.get().max(arena.word(Word::ShipFloor));
    let checkpoint = sup.checkpoint.get();
    let keep = if sup.mode == MODE_SHIPPING { ship_floor.min(checkpoint) } else { checkpoint };
    let used = match read_chunks(journal, sup, keep) {
        Ok(used) => used,
        Err(_) if dead => Default::default(),
        Err(_) => return Err("the journal cannot be read"),
    };
    Ok(Some(Start {
        slots: Slots::new(geometry, used),
        sup: JournalSuper { ship_floor: ship_floor.into(), ..*sup },
        applied,
        applied_crc,
        // With a journal, what was applied was durable before (I3), even if the dead
        // process did not come to say so. Without one nothing counts as synced before the first
        // sync: what is older than the arena may have had a journal until now.
        durable: if dead { sup.checkpoint.get() } else { durable.max(applied) },
        sealed,
        open,
        unjournaled: dead,
    }))
}

/// The records of the open batch: complete up to the published count (I2).
fn open_records(arena: &Arena, lsn: u64, count: u64) -> Result<Vec<RecDesc>, &'static str> {
    let mut descs = Vec::new();
    for index in 0..count {
        let at = lsn + size_of::<BatchHdr>() as u64 + index * size_of::<RecDesc>() as u64;
        let bytes = arena.bytes(at, size_of::<RecDesc>() as u64);
        let desc = <RecDesc as zerocopy::FromBytes>::read_from_bytes(bytes)
            .map_err(|_| "a record is damaged")?;
        let len = u64::from(desc.payload_len());
        let good = desc.lsn.get() == lsn + index
            && (len == 0
                || crc32c::crc32c(arena.bytes(lsn + u64::from(desc.payload_off.get()), len))
                    == desc.crc.get());
        if !good {
            return Err("a record of the open batch is damaged");
        }
        descs.push(desc);
    }
    Ok(descs)
}

/// The super block, and the note if the journal is dead.
fn find_super(
    config: &GroupConfig,
    files: &dyn Files,
    journal: &dyn File,
    marker: &Path,
) -> Result<(JournalSuper, Option<Note>), StartError> {
    let noted = note::read(files, marker)
        .map_err(|source| StartError::File { path: marker.to_owned(), source })?;
    let in_journal = |source| StartError::Journal { path: config.journal.clone(), source };
    let found = read_super(journal, config);
    let sup = match noted {
        Some(noted) => {
            dead_super(config, found.ok(), noted.incarnation).map_err(|e| in_journal(e.into()))?
        }
        None => found.map_err(in_journal)?,
    };
    Ok((sup, noted))
}

/// The super block of a group whose journal is dead: of the journal, if it can still be
/// read, with the incarnation in use. An arena that is not older holds what was
/// acknowledged: its identity comes first.
fn dead_super(
    config: &GroupConfig,
    found: Option<JournalSuper>,
    noted: u64,
) -> io::Result<JournalSuper> {
    let mut sup = match found {
        Some(sup) => sup,
        None => first_super(config)?,
    };
    sup.incarnation = sup.incarnation.get().max(noted).into();
    if let Some(arena) = Arena::identity(&config.arena_path())?
        && arena.incarnation.get() != u64::MAX
        && arena.incarnation >= sup.incarnation
    {
        if arena.journal_uuid != sup.journal_uuid {
            // Made when the journal could not be read: its positions are of that time.
            sup = first_super(config)?;
            sup.journal_uuid = arena.journal_uuid;
        }
        sup.incarnation = arena.incarnation;
    }
    Ok(sup)
}

/// A start without a journal and without an arena: the disks are the truth. Positions are
/// given again from the checkpoint on, so under the next incarnation, durably (I8).
fn bare(
    mut sup: JournalSuper,
    noted: Note,
    files: &dyn Files,
    marker: &Path,
) -> Result<Start, StartError> {
    let incarnation = sup.incarnation.get() + 1;
    note::write(files, marker, Note { incarnation, ..noted })
        .map_err(|source| StartError::File { path: marker.to_owned(), source })?;
    sup.incarnation = incarnation.into();
    let at = geometry_of(&sup).normal(sup.checkpoint.get());
    Ok(Start {
        slots: Slots::new(geometry_of(&sup), Default::default()),
        sup,
        applied: at,
        applied_crc: sup.checkpoint_prev_crc.get(),
        durable: at,
        sealed: Vec::new(),
        open: Vec::new(),
        unjournaled: true,
    })
}

/// The memory of [`write_again`].
fn again_path(config: &GroupConfig) -> PathBuf {
    config.arena_path().with_extension("again")
}

/// A sync of the disks failed, or the process died in one and took the answer with it: the
/// kernel may have dropped what was written since the checkpoint, and a second sync would
/// say that all is well (decision 9). It is all in the journal: write it once more.
fn write_again(
    config: &GroupConfig,
    journal: &Arc<dyn File>,
    applied: u64,
    make: &dyn Fn(Arc<Arena>) -> Arc<Target>,
) -> Result<(), StartError> {
    let mut scanned = scan(journal.as_ref(), config)
        .map_err(|source| StartError::Journal { path: config.journal.clone(), source })?;
    if scanned.end < applied {
        let message = "the journal ends before what was written back";
        return Err(StartError::Replay(io::Error::other(message)));
    }
    scanned.batches.retain(|b| b.hdr.lsn.get() < applied);
    let path = again_path(config);
    let done = write_back(config, &path, journal.as_ref(), &scanned, make);
    let _ = std::fs::remove_file(&path);
    done.map(drop).map_err(|e| e.into_start(config))
}

enum ColdError {
    Journal(OpenError),
    Replay(io::Error),
    Start(StartError),
}

impl ColdError {
    fn into_start(self, config: &GroupConfig) -> StartError {
        match self {
            Self::Journal(source) => StartError::Journal { path: config.journal.clone(), source },
            Self::Replay(error) => StartError::Replay(error),
            Self::Start(error) => error,
        }
    }
}

fn cold(
    config: &GroupConfig,
    journal: &Arc<dyn File>,
    sup: JournalSuper,
    make: &dyn Fn(Arc<Arena>) -> Arc<Target>,
) -> Result<Start, ColdError> {
    let unusable = |error: io::Error| ColdError::Journal(error.into());
    journal.sync_data().map_err(unusable)?;
    let scanned = scan(journal.as_ref(), config).map_err(ColdError::Journal)?;
    let clean = sup.clean == 1 && scanned.batches.is_empty();
    let mut next = sup;
    if !clean {
        replay(config, journal.as_ref(), &scanned, make)?;
        next.seq = (sup.seq.get() + 1).into();
        next.clean = 0;
        next.checkpoint = scanned.end.into();
        next.checkpoint_prev_crc = scanned.end_crc.into();
        push_history(&mut next, sup.incarnation.get(), scanned.end);
        next.incarnation = (sup.incarnation.get() + 1).into();
        finish_super(&mut next);
        journal
            .write_all_at(super_offset(next.seq.get()), next.as_bytes())
            .and_then(|()| journal.sync_data())
            .map_err(unusable)?;
        tracing::warn!(
            incarnation = next.incarnation.get(),
            end = scanned.end,
            "unclean start: writes that were never flushed and not yet in the journal are gone"
        );
    }
    Ok(Start {
        sup: next,
        slots: scanned.slots,
        applied: scanned.end,
        applied_crc: scanned.end_crc,
        durable: scanned.end,
        sealed: Vec::new(),
        open: Vec::new(),
        unjournaled: false,
    })
}

fn push_history(sup: &mut JournalSuper, incarnation: u64, end: u64) {
    let count = usize::from(sup.n_history);
    if count == HISTORY_MAX {
        sup.history.copy_within(1.., 0);
    } else {
        sup.n_history += 1;
    }
    let last = usize::from(sup.n_history) - 1;
    sup.history[last] = History { incarnation: incarnation.into(), end: end.into() };
}

/// Writes the scanned batches back, then syncs the disks.
fn replay(
    config: &GroupConfig,
    journal: &dyn File,
    scanned: &Scanned,
    make: &dyn Fn(Arc<Arena>) -> Arc<Target>,
) -> Result<(), ColdError> {
    let mut engine = write_back(config, &config.arena_path(), journal, scanned, make)?;
    engine.submit(Op::SyncDisks);
    finish(&mut engine).map_err(ColdError::Replay)
}

/// Writes the scanned batches to the disks through the same plan as a running apply, half an
/// arena at a time, with an arena at `path`.
fn write_back(
    config: &GroupConfig,
    path: &Path,
    journal: &dyn File,
    scanned: &Scanned,
    make: &dyn Fn(Arc<Arena>) -> Arc<Target>,
) -> Result<Inline, ColdError> {
    let hdr = arena_hdr(&scanned.sup, config.arena_bytes).map_err(ColdError::Start)?;
    let hdr = ArenaHdr { incarnation: u64::MAX.into(), ..hdr };
    let arena = Arena::create(path, &hdr).map_err(|e| ColdError::Start(arena_error(e)))?;
    let arena = Arc::new(arena);
    let mut engine = Inline::new(make(arena.clone())).map_err(ColdError::Replay)?;
    let mut memory = ArenaMemory(arena.clone());
    let start = scanned.sup.checkpoint.get();
    arena.set_bounds(start, start);
    let mut window: Vec<SealedBatch> = Vec::new();
    let mut bytes = Vec::new();
    let flush = |engine: &mut Inline, window: &mut Vec<SealedBatch>| {
        engine.submit(Op::Apply(std::mem::take(window)));
        finish(engine)
    };
    for batch in &scanned.batches {
        let total = u64::from(batch.hdr.total_len.get());
        let lsn = batch.hdr.lsn.get();
        if batch.hdr.flags & BATCH_PAD != 0 {
            continue;
        }
        if lsn + total > window.first().map_or(lsn, |b| b.lsn) + config.arena_bytes / 2 {
            flush(&mut engine, &mut window).map_err(ColdError::Replay)?;
        }
        if window.is_empty() {
            memory.freeze(lsn.max(start));
            arena.advance_floor(lsn.max(start));
        }
        bytes.resize(total as usize, 0);
        journal.read_exact_at(batch.file_offset, &mut bytes).map_err(ColdError::Replay)?;
        memory.fill(lsn, &bytes);
        window.push(SealedBatch {
            lsn,
            end: lsn + total,
            hdr_crc: batch.hdr.hdr_crc.get(),
            descs: batch.descs.clone().into(),
        });
    }
    flush(&mut engine, &mut window).map_err(ColdError::Replay)?;
    Ok(engine)
}

fn finish(engine: &mut Inline) -> io::Result<()> {
    let mut done = Vec::new();
    engine.reap(&mut done);
    for item in done {
        if let Done::Apply(Err((_, e))) | Done::SyncDisks(Err((_, e))) = item {
            return Err(e);
        }
    }
    Ok(())
}

fn overlays_of(start: &Start, disks: usize) -> Vec<Overlay> {
    let mut overlays: Vec<Overlay> = (0..disks).map(|_| Overlay::default()).collect();
    let geometry = geometry_of(&start.sup);
    let open_lsn = geometry.normal(start.sealed.last().map_or(start.applied, |b| b.end));
    let sealed = start.sealed.iter().flat_map(|b| b.descs.iter().map(|d| (b.lsn, d)));
    let open = start.open.iter().map(|d| (open_lsn, d));
    for (batch, desc) in sealed.chain(open) {
        let Some(overlay) = overlays.get_mut(usize::from(desc.disk)) else { continue };
        let (lsn, offset, len) = (desc.lsn.get(), desc.offset.get(), u64::from(desc.len.get()));
        match desc.rec_op() {
            Some(RecOp::Write) => {
                overlay.insert_write(lsn, offset, len, batch + u64::from(desc.payload_off.get()));
            }
            Some(RecOp::Zero | RecOp::Trim) => overlay.insert_zero(lsn, offset, len),
            _ => {}
        }
    }
    overlays
}

/// How long a dead process's I/O is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(60);
const LOCK_STEP: Duration = Duration::from_millis(20);
