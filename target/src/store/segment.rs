//! Segments: frames as received, in files that are only appended to.
//!
//! Owns one open segment ([`OpenSeg`]) and reading from all ([`SegPool`]). Holds:
//! bytes below `end` are whole epochs; they are durable when the append returned;
//! a file on which a write or sync failed is never written again (decision 9).
//! After a start nothing is believed of the page cache: what is read back whole is
//! written again and synced before it counts, because the sync that should have
//! made it durable may be the one that failed. Before it: checked frames. After
//! it: the index. It never decompresses and never decides what may be appended.

use blockfilter::crc32c;
use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use blockfilter::engine::{Clock, File, Files, Latched, Open};
use blockfilter::names::Name;
use lru::LruCache;
use replicator::frame::{FrameBuf, check_header};
use replicator::wire::{FrameHdr, Kind};
use zerocopy::{FromBytes, IntoBytes};

use super::StoreError;
use super::format::{FormatError, PAGE, SegFooter, SegHdr, SegKind, SegPoint};
use super::index::Memtable;
use super::ingest::{Indexed, Place, index_frame};
use super::manifest::{SealRef, SegRef};
use crate::points::{PointKind, PointRec, label};

/// What all files of one group, or of one drill, share.
#[derive(Debug)]
pub(crate) struct Env {
    pub(crate) files: Arc<dyn Files>,
    /// The folder that has `seg` and `idx` in it.
    pub(crate) dir: PathBuf,
    pub(crate) group_id: u64,
    /// Sizes of the disks in bytes.
    pub(crate) sizes: Vec<u64>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) pool: SegPool,
    next_id: AtomicU32,
}

impl Env {
    /// `next_id` is above all numbers in use.
    pub(crate) fn new(
        files: Arc<dyn Files>,
        dir: PathBuf,
        group_id: u64,
        sizes: Vec<u64>,
        clock: Arc<dyn Clock>,
        next_id: u32,
    ) -> Self {
        let next_id = AtomicU32::new(next_id);
        Self { files, dir, group_id, sizes, clock, pool: SegPool::default(), next_id }
    }

    pub(crate) fn seg_dir(&self) -> PathBuf {
        self.dir.join("seg")
    }

    pub(crate) fn idx_dir(&self) -> PathBuf {
        self.dir.join("idx")
    }

    /// A number that no file has.
    pub(crate) fn take_id(&self) -> u32 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// What [`Self::take_id`] answers next.
    pub(crate) fn next_id(&self) -> u32 {
        self.next_id.load(Ordering::Relaxed)
    }

    /// Reads one frame of a segment and checks all of it.
    pub(crate) fn read_frame(&self, seg: u32, offset: u64) -> io::Result<FrameBuf> {
        let file = self.pool.file(self, seg)?;
        let frame = read_frame(file.as_ref(), offset, u64::MAX)?;
        if frame.hdr.group_id.get() != self.group_id {
            return Err(invalid("a frame of another group"));
        }
        Ok(frame)
    }
}

fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

/// Reads a frame that must end at or below `limit`.
pub(super) fn read_frame(file: &dyn File, offset: u64, limit: u64) -> io::Result<FrameBuf> {
    let mut head = [0; size_of::<FrameHdr>()];
    if offset + head.len() as u64 > limit {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    file.read_exact_at(offset, &mut head)?;
    let hdr = check_header(&head).map_err(|e| invalid(e.to_string()))?;
    if offset + hdr.total_len() as u64 > limit {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut bytes = vec![0; hdr.total_len()];
    bytes[..head.len()].copy_from_slice(&head);
    file.read_exact_at(offset + head.len() as u64, &mut bytes[head.len()..])?;
    FrameBuf::from_bytes(bytes).map_err(|e| invalid(e.to_string()))
}

/// Whether an error of [`read_frame`] is about what was read, not the reading.
pub(super) fn is_damage(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
}

/// Opens segments for reading; keeps a bounded number open.
#[derive(Debug)]
pub(crate) struct SegPool {
    names: RwLock<HashMap<u32, String>>,
    open: Mutex<LruCache<u32, Arc<dyn File>>>,
}

impl Default for SegPool {
    fn default() -> Self {
        let open = Mutex::new(LruCache::new(POOL_FILES));
        Self { names: RwLock::default(), open }
    }
}

impl SegPool {
    /// Makes a segment known, or known by another file.
    pub(crate) fn insert(&self, meta: &SegRef) {
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        names.insert(meta.id, meta.name());
        self.open.lock().unwrap_or_else(PoisonError::into_inner).pop(&meta.id);
    }

    fn file(&self, env: &Env, id: u32) -> io::Result<Arc<dyn File>> {
        if let Some(file) = self.open.lock().unwrap_or_else(PoisonError::into_inner).get(&id) {
            return Ok(Arc::clone(file));
        }
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let name = names.get(&id).ok_or_else(|| invalid(format!("no segment {id}")))?;
        let file = env.files.open(&env.seg_dir().join(name), Open::Read)?;
        self.open.lock().unwrap_or_else(PoisonError::into_inner).put(id, Arc::clone(&file));
        Ok(file)
    }
}

/// A point with its tag.
pub(crate) type Tagged = (PointRec, Option<Name>);

/// The segment that is being written.
#[derive(Debug)]
pub(crate) struct OpenSeg {
    pub(crate) meta: SegRef,
    pub(crate) kind: SegKind,
    pub(crate) era: u32,
    pub(crate) path: PathBuf,
    raw: Arc<dyn File>,
    file: Latched,
    /// End of the last whole epoch in the file.
    pub(crate) end: u64,
    /// The bytes before it in its page.
    tail: Vec<u8>,
    pub(crate) n_frames: u32,
    /// Exclusive end of the LSNs in it.
    pub(crate) lsn_to: u64,
    pub(crate) points: Vec<Tagged>,
    pub(crate) memtable: Arc<Memtable>,
    pub(crate) opened_us: u64,
    /// A write failed for want of space: rescue it into another file.
    pub(crate) broken: bool,
}

impl OpenSeg {
    /// Makes an empty segment; durable on return, also its name.
    pub(crate) fn create(
        env: &Env,
        kind: SegKind,
        era: u32,
        generation: u64,
        from: u64,
    ) -> Result<Self, StoreError> {
        let meta = SegRef { id: env.take_id(), generation, attempt: 0, from, sealed: None };
        let this = Self::start(env, meta, kind, era)?;
        this.file.sync_data().map_err(StoreError::io(&this.path))?;
        let dir = env.seg_dir();
        env.files.sync_dir(&dir).map_err(StoreError::io(&dir))?;
        env.pool.insert(&meta);
        Ok(this)
    }

    /// Makes the file and writes its head.
    fn start(env: &Env, meta: SegRef, kind: SegKind, era: u32) -> Result<Self, StoreError> {
        let path = env.seg_dir().join(meta.name());
        if env.files.exists(&path) {
            env.files.remove(&path).map_err(StoreError::io(&path))?;
        }
        env.files.open(&path, Open::CreateNew).map_err(StoreError::io(&path))?;
        let raw = env.files.open(&path, Open::Disk).map_err(StoreError::io(&path))?;
        let hdr = SegHdr {
            group_id: env.group_id.into(),
            generation: meta.generation.into(),
            lsn_from: meta.from.into(),
            created_us: env.clock.wall_us().into(),
            id: meta.id.into(),
            era: era.into(),
            kind: kind as u8,
            ..Default::default()
        };
        let mut head = [0; PAGE as usize];
        head[..size_of::<SegHdr>()].copy_from_slice(hdr.seal().as_bytes());
        raw.write_all_at(0, &head).map_err(StoreError::io(&path))?;
        Ok(Self::over(env, meta, kind, era, path, raw))
    }

    fn over(
        env: &Env,
        meta: SegRef,
        kind: SegKind,
        era: u32,
        path: PathBuf,
        raw: Arc<dyn File>,
    ) -> Self {
        Self {
            meta,
            kind,
            era,
            path,
            file: Latched::new(Arc::clone(&raw)),
            raw,
            end: PAGE,
            tail: Vec::new(),
            n_frames: 0,
            lsn_to: meta.from,
            points: Vec::new(),
            memtable: Arc::new(Memtable::default()),
            opened_us: env.clock.mono_us(),
            broken: false,
        }
    }

    /// Writes frames behind the last epoch, with `sync` durably. Whole pages, so that a
    /// large epoch can go past the page cache: the page that holds the end is written
    /// again, with the same bytes and new ones behind them. On failure what
    /// was written is cut off as far as possible; a full disk marks the segment
    /// broken, nothing else may be tried on this file.
    pub(crate) fn write(&mut self, frames: &[FrameBuf], sync: bool) -> Result<(), StoreError> {
        let bytes: u64 = frames.iter().map(|f| f.bytes.len() as u64).sum();
        let end = self.end + bytes;
        let pad = [0; PAGE as usize];
        let pad = &pad[..(end.next_multiple_of(PAGE) - end) as usize];
        let mut parts = vec![self.tail.as_slice()];
        parts.extend(frames.iter().map(|f| &f.bytes[..]));
        parts.push(pad);
        let written = self.file.write_vectored_at(self.end / PAGE * PAGE, &parts);
        let done = written.and_then(|()| if sync { self.file.sync_data() } else { Ok(()) });
        if done.is_err() {
            self.broken = true;
            let _ = self.raw.set_len(self.end);
        }
        done.map_err(StoreError::io(&self.path))
    }

    /// Counts frames that [`Self::write`] wrote and shows them to readers.
    pub(crate) fn advance(&mut self, frames: &[FrameBuf], lsn_to: u64, indexed: &Indexed) {
        assert!(lsn_to >= self.lsn_to, "LSNs only grow");
        self.memtable.push(&indexed.entries, &indexed.wides);
        for frame in frames {
            let bytes = &frame.bytes;
            self.end += bytes.len() as u64;
            self.tail.extend_from_slice(&bytes[bytes.len().saturating_sub(PAGE as usize)..]);
            let over = self.tail.len() - (self.end % PAGE) as usize;
            self.tail.drain(..over);
        }
        self.n_frames += frames.len() as u32;
        self.lsn_to = lsn_to;
    }

    /// Makes everything written durable.
    pub(crate) fn sync(&mut self) -> Result<(), StoreError> {
        let done = self.file.sync_data();
        self.broken |= done.is_err();
        done.map_err(StoreError::io(&self.path))
    }

    /// Writes the footer; durable on return. May be repeated.
    pub(crate) fn seal(&mut self, env: &Env, run_id: u32) -> Result<SealRef, StoreError> {
        let mut tail = Vec::new();
        let mut tags = Vec::new();
        for (rec, tag) in &self.points {
            let tag = tag.as_ref().map_or("", Name::as_str);
            let point = SegPoint {
                lsn: rec.lsn.into(),
                incarnation: rec.incarnation.into(),
                time_us: rec.time_us.into(),
                kind: kind_code(rec.kind),
                tag_len: tag.len() as u8,
                reserved: [0; 6],
            };
            tail.extend_from_slice(point.as_bytes());
            tags.extend_from_slice(tag.as_bytes());
        }
        tail.extend_from_slice(&tags);
        let footer = SegFooter {
            group_id: env.group_id.into(),
            lsn_from: self.meta.from.into(),
            lsn_to: self.lsn_to.into(),
            end_frames: self.end.into(),
            id: self.meta.id.into(),
            run_id: run_id.into(),
            n_frames: self.n_frames.into(),
            n_points: (self.points.len() as u32).into(),
            tags_len: (tags.len() as u32).into(),
            points_crc: crc32c::crc32c(&tail).into(),
            ..Default::default()
        };
        tail.extend_from_slice(footer.seal().as_bytes());
        let bytes = self.end + tail.len() as u64;
        let done = self.file.write_all_at(self.end, &tail);
        let done = done.and_then(|()| self.file.set_len(bytes));
        let done = done.and_then(|()| self.file.sync_data());
        if done.is_err() {
            self.broken = true;
            let _ = self.raw.set_len(self.end);
        }
        done.map_err(StoreError::io(&self.path))?;
        Ok(SealRef { to: self.lsn_to, end_frames: self.end, bytes })
    }

    /// Copies a broken segment's whole epochs into a new file, durable on return.
    /// Offsets stay the same, so its index stays right.
    pub(crate) fn rescue(&self, env: &Env) -> Result<Self, StoreError> {
        let meta = SegRef { attempt: self.meta.attempt + 1, ..self.meta };
        let mut this = Self::start(env, meta, self.kind, self.era)?;
        let mut at = PAGE;
        while at < self.end {
            let frame = read_frame(self.raw.as_ref(), at, self.end)
                .map_err(|e| StoreError::Failed(format!("{}: {e}", self.path.display())))?;
            this.file.write_all_at(at, &frame.bytes).map_err(StoreError::io(&this.path))?;
            at += frame.bytes.len() as u64;
        }
        this.file.sync_data().map_err(StoreError::io(&this.path))?;
        let dir = env.seg_dir();
        env.files.sync_dir(&dir).map_err(StoreError::io(&dir))?;
        this.end = self.end;
        this.tail.clone_from(&self.tail);
        this.n_frames = self.n_frames;
        this.lsn_to = self.lsn_to;
        this.points = self.points.clone();
        this.memtable = Arc::clone(&self.memtable);
        this.opened_us = self.opened_us;
        Ok(this)
    }
}

/// What was found in an open segment after a start.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) seg: OpenSeg,
    /// Where incarnations begin: `(incarnation, LSN)`.
    pub(crate) incarnations: Vec<(u64, u64)>,
    /// Why nothing may be appended: damage in acknowledged data, or it cannot be
    /// read or made durable again.
    pub(crate) failure: Option<String>,
}

/// Reads an open segment back, cuts it at the last whole epoch, makes that durable.
pub(crate) fn recover(
    env: &Env,
    meta: SegRef,
    kind: SegKind,
    era: u32,
    last_label: Option<u64>,
) -> Result<Recovered, StoreError> {
    let path = env.seg_dir().join(meta.name());
    let raw = env.files.open(&path, Open::Disk).map_err(StoreError::io(&path))?;
    let mut head = [0; size_of::<SegHdr>()];
    raw.read_exact_at(0, &mut head).map_err(StoreError::io(&path))?;
    let hdr = SegHdr::check(&head).map_err(|e| StoreError::format(&path, e))?;
    let same = hdr.group_id.get() == env.group_id
        && hdr.id.get() == meta.id
        && hdr.lsn_from.get() == meta.from
        && hdr.kind == kind as u8;
    if !same {
        return Err(StoreError::format(&path, FormatError::Other("head")));
    }
    let len = raw.len().map_err(StoreError::io(&path))?;
    let mut seg = OpenSeg::over(env, meta, kind, era, path.clone(), raw);
    let mut scan = Scan { last_label, ..Scan::default() };
    let mut failure = None;
    if let Err(error) = scan.run(env, &mut seg, len) {
        // Not damage: it may pass, so nothing is cut and nothing may be added.
        failure = Some(format!("{} cannot be read: {error}", path.display()));
    } else if kind == SegKind::Stream
        && seg.end < len
        && proves_damage(env, seg.raw.as_ref(), seg.end, len)
    {
        let at = seg.end;
        failure = Some(format!("{} is damaged at byte {at}", path.display()));
    } else if let Err(error) = settle(&seg) {
        failure = Some(format!("{}: {error}", path.display()));
    }
    seg.broken = failure.is_some();
    env.pool.insert(&meta);
    Ok(Recovered { seg, incarnations: scan.incarnations, failure })
}

/// Indexes a sealed segment again, when its run is lost.
pub(crate) fn reindex(
    env: &Env,
    meta: SegRef,
    kind: SegKind,
    era: u32,
) -> Result<Arc<Memtable>, StoreError> {
    let path = env.seg_dir().join(meta.name());
    let raw = env.files.open(&path, Open::Read).map_err(StoreError::io(&path))?;
    let end = meta.sealed.map_or(0, |s| s.end_frames);
    let mut seg = OpenSeg::over(env, meta, kind, era, path, raw);
    Scan::default().run(env, &mut seg, end).map_err(StoreError::io(&seg.path))?;
    if seg.end != end {
        return Err(StoreError::damaged(&seg.path, format!("the frame at byte {}", seg.end)));
    }
    Ok(seg.memtable)
}

#[derive(Debug, Default)]
struct Scan {
    last_label: Option<u64>,
    incarnations: Vec<(u64, u64)>,
}

impl Scan {
    /// Reads whole epochs until one is not whole or does not continue. An error
    /// says that the file could not be read, which proves nothing of what it holds.
    fn run(&mut self, env: &Env, seg: &mut OpenSeg, len: u64) -> io::Result<()> {
        let copy = seg.kind == SegKind::Copy;
        let mut epoch: Vec<FrameBuf> = Vec::new();
        let mut indexed = Indexed::default();
        let (mut at, mut next) = (seg.end, seg.lsn_to);
        loop {
            let frame = match read_frame(seg.raw.as_ref(), at, len) {
                Ok(frame) => frame,
                Err(error) if is_damage(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
            let hdr = frame.hdr;
            let kind = if copy { Kind::Copy } else { Kind::Epoch };
            let continues = copy || hdr.lsn_from.get() == next;
            if hdr.group_id.get() != env.group_id || frame.kind() != kind || !continues {
                return Ok(());
            }
            let copy_from = copy.then_some(next);
            let place = Place { seg: seg.meta.id, frame_off: at, copy_from };
            if index_frame(&frame, place, &env.sizes, &mut indexed).is_err() {
                return Ok(());
            }
            at += frame.bytes.len() as u64;
            next = if copy { next + u64::from(hdr.n_rec.get()) } else { hdr.lsn_to.get() };
            epoch.push(frame);
            if !copy && !hdr.is_epoch_end() {
                continue;
            }
            if seg.kind == SegKind::Stream {
                self.point(seg, &hdr, indexed.mark.take());
            }
            seg.advance(&epoch, next, &indexed);
            epoch.clear();
            indexed = Indexed::default();
        }
    }

    fn point(&mut self, seg: &mut OpenSeg, hdr: &FrameHdr, mark: Option<(Option<Name>, bool)>) {
        let incarnation = hdr.incarnation.get();
        if self.incarnations.last().is_none_or(|last| last.0 != incarnation) {
            self.incarnations.push((incarnation, seg.lsn_to));
        }
        let point = point_of(seg.era, hdr, mark, self.last_label);
        self.last_label = Some(point.0.time_us);
        seg.points.push(point);
    }
}

/// The point at the end of an epoch whose last frame has this header.
pub(crate) fn point_of(
    era: u32,
    hdr: &FrameHdr,
    mark: Option<(Option<Name>, bool)>,
    last_label: Option<u64>,
) -> Tagged {
    let (tag, kind) = match mark {
        Some((tag, true)) => (tag, PointKind::App),
        Some((Some(tag), false)) => (Some(tag), PointKind::Tagged),
        _ => (None, PointKind::Crash),
    };
    let rec = PointRec {
        era,
        lsn: hdr.lsn_to.get(),
        incarnation: hdr.incarnation.get(),
        time_us: label(hdr.wall_us.get(), last_label),
        kind,
    };
    (rec, tag)
}

/// Whether bytes behind a break can only be there if the break was whole once:
/// every epoch is synced before the next is written, so a frame behind the end of
/// another epoch proves that what lies before it was acknowledged. Frames of another
/// group prove nothing: they may be payload, of a disk that holds a store.
fn proves_damage(env: &Env, file: &dyn File, from: u64, len: u64) -> bool {
    let mut bytes = vec![0; (len - from).min(DAMAGE_SCAN_MAX) as usize];
    if file.read_exact_at(from, &mut bytes).is_err() {
        return true;
    }
    let magic = replicator::wire::FRAME_MAGIC.to_le_bytes();
    let mut ended = false;
    let mut at = 0;
    while let Some(head) = bytes.get(at..).and_then(|b| b.first_chunk()) {
        match check_header(head) {
            Ok(hdr)
                if head.starts_with(&magic)
                    && hdr.frame_kind() == Some(Kind::Epoch)
                    && hdr.group_id.get() == env.group_id =>
            {
                if ended {
                    return true;
                }
                ended = hdr.is_epoch_end();
                at += hdr.total_len();
            }
            _ => at += 1,
        }
    }
    false
}

/// Cuts the file at its end, writes what is there again, and syncs.
fn settle(seg: &OpenSeg) -> io::Result<()> {
    seg.raw.set_len(seg.end)?;
    let mut buffer = vec![0; SETTLE_STEP.min(seg.end) as usize];
    let mut at = 0;
    while at < seg.end {
        let now = SETTLE_STEP.min(seg.end - at) as usize;
        seg.raw.read_exact_at(at, &mut buffer[..now])?;
        seg.raw.write_all_at(at, &buffer[..now])?;
        at += now as u64;
    }
    seg.raw.sync_data()
}

/// Reads the points of a sealed segment and compares it with the manifest.
pub(crate) fn read_footer(env: &Env, meta: &SegRef, era: u32) -> Result<Vec<Tagged>, StoreError> {
    let path = env.seg_dir().join(meta.name());
    let sealed = meta.sealed.ok_or_else(|| StoreError::damaged(&path, "it is not sealed"))?;
    let bad = |e| StoreError::format(&path, e);
    let file = env.files.open(&path, Open::Read).map_err(StoreError::io(&path))?;
    if file.len().map_err(StoreError::io(&path))? != sealed.bytes {
        return Err(bad(FormatError::Other("length")));
    }
    let tail_len = sealed.bytes.checked_sub(sealed.end_frames).filter(|n| *n < FOOTER_MAX);
    let mut tail = vec![0; tail_len.ok_or_else(|| bad(FormatError::Other("footer")))? as usize];
    file.read_exact_at(sealed.end_frames, &mut tail).map_err(StoreError::io(&path))?;
    let at = tail.len().checked_sub(size_of::<SegFooter>());
    let (points, footer) = tail.split_at(at.ok_or_else(|| bad(FormatError::Short))?);
    let footer = SegFooter::check(footer).map_err(bad)?;
    let same = footer.group_id.get() == env.group_id
        && footer.id.get() == meta.id
        && (footer.lsn_from.get(), footer.lsn_to.get()) == (meta.from, sealed.to)
        && footer.end_frames.get() == sealed.end_frames;
    if !same {
        return Err(bad(FormatError::Other("footer")));
    }
    if crc32c::crc32c(points) != footer.points_crc.get() {
        return Err(bad(FormatError::Crc("points")));
    }
    let count = footer.n_points.get() as usize;
    let (recs, mut tags) = <[SegPoint]>::ref_from_prefix_with_elems(points, count)
        .map_err(|_| bad(FormatError::Other("points")))?;
    let mut out = Vec::with_capacity(count);
    for point in recs {
        let (tag, rest) = tags
            .split_at_checked(usize::from(point.tag_len))
            .ok_or_else(|| bad(FormatError::Other("tags")))?;
        tags = rest;
        let rec = PointRec {
            era,
            lsn: point.lsn.get(),
            incarnation: point.incarnation.get(),
            time_us: point.time_us.get(),
            kind: kind_of(point.kind).ok_or_else(|| bad(FormatError::Other("points")))?,
        };
        out.push((rec, std::str::from_utf8(tag).ok().and_then(|t| t.parse().ok())));
    }
    Ok(out)
}

const fn kind_code(kind: PointKind) -> u8 {
    match kind {
        PointKind::Crash => 1,
        PointKind::App => 2,
        PointKind::Tagged => 3,
    }
}

const fn kind_of(code: u8) -> Option<PointKind> {
    Some(match code {
        1 => PointKind::Crash,
        2 => PointKind::App,
        3 => PointKind::Tagged,
        _ => return None,
    })
}

/// Segments that are open for reading at once, per group and per drill.
const POOL_FILES: NonZeroUsize = NonZeroUsize::new(128).expect("not zero");
/// Bytes that are rewritten at once after a start.
const SETTLE_STEP: u64 = 1 << 20;
/// Most bytes behind a break that are searched for proof of damage.
const DAMAGE_SCAN_MAX: u64 = 256 << 20;
/// Points of a segment: far more than fit between two rolls.
const FOOTER_MAX: u64 = 256 << 20;
