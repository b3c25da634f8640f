//! One disk at one point, read-only, without copying anything first.
//!
//! Owns the way from a region to the bytes: newest to oldest through the era's
//! stream below the point, its copies, older eras, then the base; it stops when all
//! sectors are found. Holds: opening costs the same however long the history is;
//! what a view shows never changes; no byte is served before the CRCs of its frame
//! and record were checked, damage is EIO for what it covers. Before it: the store's
//! snapshot. After it: NBD, FUSE, branches. It never writes.
//!
//! Regions are resolved once and kept; so are opened frames, both within bounds.

use std::hash::Hash;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use blockfilter::block::{Errno, Export, ExportInfo, Extent, SECTOR, ZeroFlags};
use lru::LruCache;

use crate::points::Point;
use crate::store::DiskMeta;
use crate::store::format::{Entry, REGION, REGION_SECTORS, Wide, region_key};
use crate::store::group::Snapshot;
use crate::store::index::Walk;
use crate::store::ingest::open_payload;
use crate::store::log::LogSnap;
use crate::store::segment::Env;

/// One disk as it was at a point. Clones share what was read; so do views of the
/// same disk and point that are open together.
#[derive(Clone, Debug)]
pub struct View {
    core: Arc<ViewCore>,
    multi_conn: bool,
}

/// What all views of one disk at one point share.
#[derive(Debug)]
pub(crate) struct ViewCore {
    env: Arc<Env>,
    snapshot: Arc<Snapshot>,
    disk: u8,
    size: u64,
    era: u32,
    lsn: u64,
    description: String,
    regions: Mutex<Weighed<u64, Flat>>,
    frames: FrameCache,
}

/// Where a sector's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// They are zeroes.
    Zero,
    /// In the base.
    Base,
    /// In a frame's payload.
    Frame { seg: u32, frame_off: u32, payload_off: u32 },
}

/// Some sectors of a region, counted from its start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) first: u16,
    pub(crate) count: u16,
    pub(crate) source: Source,
}

/// A region, resolved.
#[derive(Debug)]
pub(crate) struct Flat {
    /// Which sectors have a source.
    have: [u64; REGION_SECTORS / 64],
    missing: usize,
    pub(crate) pieces: Vec<Piece>,
}

impl Flat {
    pub(crate) fn new() -> Self {
        let have = [0; REGION_SECTORS / 64];
        Self { have, missing: REGION_SECTORS, pieces: Vec::new() }
    }

    /// Gives the sectors that have no source yet this one; `source` is that of the
    /// first sector of the range.
    fn cover(&mut self, first: usize, count: usize, source: Source) {
        let mut at = first;
        let end = first + count;
        while at < end {
            if self.have[at / 64] >> (at % 64) & 1 != 0 {
                at += 1;
                continue;
            }
            let start = at;
            while at < end && self.have[at / 64] >> (at % 64) & 1 == 0 {
                self.have[at / 64] |= 1 << (at % 64);
                at += 1;
            }
            self.missing -= at - start;
            let source = source.later((start - first) as u64 * SECTOR);
            let (first, count) = (start as u16, (at - start) as u16);
            self.pieces.push(Piece { first, count, source });
        }
    }

    fn cover_entry(&mut self, entry: &Entry) {
        let (first, count) = entry.sectors();
        let source = if entry.is_zero() {
            Source::Zero
        } else {
            Source::Frame {
                seg: entry.seg.get(),
                frame_off: entry.frame_off.get(),
                payload_off: entry.payload_off.get(),
            }
        };
        self.cover(first, count, source);
    }

    fn cover_wide(&mut self, wide: &Wide, region: u64) {
        let start = wide.offset.get().max(region * REGION) - region * REGION;
        let end = (wide.offset.get() + wide.len.get()).min((region + 1) * REGION) - region * REGION;
        self.cover((start / SECTOR) as usize, ((end - start) / SECTOR) as usize, Source::Zero);
    }

    /// Adds what a log says of a region below `below`.
    pub(crate) fn add_log(
        &mut self,
        log: &LogSnap,
        disk: u8,
        region: u64,
        below: u64,
    ) -> io::Result<()> {
        let key = region_key(disk, region);
        let mut wides = Vec::new();
        if let Some(table) = &log.memtable {
            table.wides(disk, region, below, &mut wides);
            self.add_layer(region, &wides, |see| {
                table.visit(key, below, see);
                Ok(())
            })?;
        }
        for run in log.runs.iter().filter(|run| run.meta.lo < below) {
            if self.missing == 0 {
                return Ok(());
            }
            wides.clear();
            run.wides(disk, region, below, &mut wides);
            self.add_layer(region, &wides, |see| run.visit(key, below, see))?;
        }
        Ok(())
    }

    fn add_layer(
        &mut self,
        region: u64,
        wides: &[Wide],
        visit: impl FnOnce(&mut dyn FnMut(&Entry) -> Walk) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut wides = wides.iter().peekable();
        visit(&mut |entry| {
            while let Some(wide) = wides.next_if(|w| w.lsn.get() > entry.lsn.get()) {
                self.cover_wide(wide, region);
            }
            self.cover_entry(entry);
            if self.missing == 0 { Walk::Stop } else { Walk::On }
        })?;
        for wide in wides {
            self.cover_wide(wide, region);
        }
        Ok(())
    }

    /// Gives everything that is left this source, and sorts.
    pub(crate) fn finish(mut self, rest: Source) -> Self {
        if self.missing > 0 {
            self.cover(0, REGION_SECTORS, rest);
        }
        self.pieces.sort_unstable_by_key(|p| p.first);
        self
    }
}

impl Source {
    /// The source `bytes` behind this one.
    fn later(self, bytes: u64) -> Self {
        match self {
            Self::Frame { seg, frame_off, payload_off } => {
                Self::Frame { seg, frame_off, payload_off: payload_off + bytes as u32 }
            }
            other => other,
        }
    }
}

impl View {
    pub(crate) fn new(core: Arc<ViewCore>) -> Self {
        Self { core, multi_conn: true }
    }

    /// Never advertises multi-conn: it was opened by a name that moves (ruling 17).
    pub fn single_conn(mut self) -> Self {
        self.multi_conn = false;
        self
    }

    /// The index of its disk.
    pub(crate) fn disk(&self) -> u8 {
        self.core.disk
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.core.size
    }
}

impl ViewCore {
    pub(crate) fn new(
        env: Arc<Env>,
        snapshot: Arc<Snapshot>,
        meta: &DiskMeta,
        disk: u8,
        point: &Point,
    ) -> Self {
        Self {
            env,
            snapshot,
            disk,
            size: meta.size_bytes,
            era: point.era,
            lsn: point.lsn.0,
            description: format!("{} at {}", meta.disk, point.id()),
            regions: Mutex::new(Weighed::new(REGIONS_MAX)),
            frames: FrameCache::new(FRAMES_MAX),
        }
    }

    fn region(&self, region: u64) -> Result<Arc<Flat>, Errno> {
        let known = self.regions.lock().unwrap_or_else(PoisonError::into_inner).get(&region);
        if let Some(flat) = known {
            return Ok(flat);
        }
        let flat = Arc::new(self.flatten(region).map_err(|error| {
            tracing::error!(view = %self.description, region, %error, "index cannot be read");
            Errno::Io
        })?);
        let weight = size_of::<Flat>() + flat.pieces.len() * size_of::<Piece>();
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        regions.put(region, Arc::clone(&flat), weight);
        Ok(flat)
    }

    fn flatten(&self, region: u64) -> io::Result<Flat> {
        let mut flat = Flat::new();
        for era in self.snapshot.eras.iter().rev().filter(|e| e.era <= self.era) {
            let below = if era.era == self.era { self.lsn } else { u64::MAX };
            for (log, below) in [(&era.stream, below), (&era.copy, u64::MAX)] {
                if flat.missing > 0 {
                    flat.add_log(log, self.disk, region, below)?;
                }
            }
        }
        let base = usize::from(self.disk) < self.snapshot.bases.len();
        Ok(flat.finish(if base { Source::Base } else { Source::Zero }))
    }

    fn read_base(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let base = self.snapshot.bases.get(usize::from(self.disk)).ok_or(Errno::Io)?;
        base.read_exact_at(offset, buf).map_err(|error| {
            tracing::error!(view = %self.description, offset, %error, "base cannot be read");
            Errno::Io
        })
    }
}

/// Walks the parts of `[offset, offset + buf.len())` region by region.
pub(crate) fn for_regions<'a>(
    offset: u64,
    mut buf: &'a mut [u8],
    mut part: impl FnMut(u64, u64, &'a mut [u8]) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let mut at = offset;
    while !buf.is_empty() {
        let now = (REGION - at % REGION).min(buf.len() as u64);
        let (head, tail) = buf.split_at_mut(now as usize);
        part(at / REGION, at % REGION, head)?;
        buf = tail;
        at += now;
    }
    Ok(())
}

/// Fills `buf` from the pieces of a region, from `inside` on; `other` reads what is
/// in no frame.
pub(crate) fn fill(
    env: &Env,
    frames: &FrameCache,
    flat: &Flat,
    inside: u64,
    buf: &mut [u8],
    mut other: impl FnMut(Source, u64, &mut [u8]) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let end = inside + buf.len() as u64;
    let start = flat.pieces.partition_point(|p| piece_range(p).1 <= inside);
    for piece in &flat.pieces[start..] {
        let (from, to) = piece_range(piece);
        if from >= end {
            break;
        }
        let (low, high) = (from.max(inside), to.min(end));
        let part = &mut buf[(low - inside) as usize..(high - inside) as usize];
        match piece.source.later(low - from) {
            Source::Zero => part.fill(0),
            Source::Frame { seg, frame_off, payload_off } => {
                let payload = frames.get(env, seg, frame_off)?;
                let bytes = payload.get(payload_off as usize..).and_then(|p| p.get(..part.len()));
                part.copy_from_slice(bytes.ok_or(Errno::Io)?);
            }
            source => other(source, low, part)?,
        }
    }
    Ok(())
}

fn piece_range(piece: &Piece) -> (u64, u64) {
    let first = u64::from(piece.first) * SECTOR;
    (first, first + u64::from(piece.count) * SECTOR)
}

impl Export for View {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: self.core.size,
            read_only: true,
            multi_conn: self.multi_conn,
            block_min: 1,
            block_preferred: 64 << 10,
            fast_zero: false,
            trim: false,
            dirty_map: false,
            description: self.core.description.clone(),
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let core = &self.core;
        for_regions(offset, buf, |region, inside, part| {
            let flat = core.region(region)?;
            fill(&core.env, &core.frames, &flat, inside, part, |_, at, bytes| {
                core.read_base(region * REGION + at, bytes)
            })
        })
    }

    fn write(&self, _offset: u64, _data: &[u8], _fua: bool) -> Result<(), Errno> {
        Err(Errno::Perm)
    }

    fn zero(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> Result<(), Errno> {
        Err(Errno::Perm)
    }

    fn trim(&self, _offset: u64, _len: u64, _fua: bool) -> Result<(), Errno> {
        Err(Errno::Perm)
    }

    fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>, Errno> {
        let mut list = ExtentList::new(max);
        let end = offset.saturating_add(len).min(self.core.size);
        let mut at = offset;
        for _ in 0..EXTENT_REGIONS {
            if at >= end || list.is_full() {
                break;
            }
            let region = at / REGION;
            let flat = self.core.region(region)?;
            for piece in &flat.pieces {
                let (from, to) = piece_range(piece);
                let from = (region * REGION + from).max(at);
                let to = (region * REGION + to).min(end);
                if from < to {
                    self.core.piece_extents(piece.source, from, to, &mut list);
                }
            }
            at = (region + 1) * REGION;
        }
        Ok(list.extents)
    }
}

impl ViewCore {
    fn piece_extents(&self, source: Source, from: u64, to: u64, list: &mut ExtentList) {
        match source {
            Source::Zero => list.push(to - from, true),
            Source::Frame { .. } => list.push(to - from, false),
            Source::Base => {
                let Some(base) = self.snapshot.bases.get(usize::from(self.disk)) else { return };
                let mut at = from;
                while at < to {
                    // What cannot be told is data.
                    let next = base.next_data(at).unwrap_or(Some((at, to)));
                    let (start, end) = next.map_or((to, to), |(s, e)| (s.min(to), e.min(to)));
                    list.push(start - at, true);
                    list.push(end - start, false);
                    at = end.max(start).max(at + 1);
                }
            }
        }
    }
}

/// Collects extents, joining neighbours of one kind.
#[derive(Debug)]
pub(crate) struct ExtentList {
    pub(crate) extents: Vec<Extent>,
    max: usize,
    full: bool,
}

impl ExtentList {
    pub(crate) fn new(max: usize) -> Self {
        Self { extents: Vec::new(), max: max.max(1), full: false }
    }

    /// Nothing more is taken.
    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    pub(crate) fn push(&mut self, len: u64, zero: bool) {
        if len == 0 || self.full {
            return;
        }
        let room = self.extents.len() < self.max;
        match self.extents.last_mut() {
            Some(last) if last.zero == zero => last.len += len,
            _ if !room => self.full = true,
            _ => self.extents.push(Extent { len, hole: zero, zero }),
        }
    }
}

/// Opened frames, checked, within a bound.
#[derive(Debug)]
pub(crate) struct FrameCache {
    frames: Mutex<Weighed<(u32, u32), Vec<u8>>>,
}

impl FrameCache {
    pub(crate) fn new(max: usize) -> Self {
        Self { frames: Mutex::new(Weighed::new(max)) }
    }

    /// A frame's payload.
    fn get(&self, env: &Env, seg: u32, frame_off: u32) -> Result<Arc<Vec<u8>>, Errno> {
        let key = (seg, frame_off);
        let known = self.frames.lock().unwrap_or_else(PoisonError::into_inner).get(&key);
        if let Some(payload) = known {
            return Ok(payload);
        }
        let read = env.read_frame(seg, u64::from(frame_off));
        let payload = read.and_then(|frame| {
            let payload = open_payload(&frame).map_err(|e| io::Error::other(e.to_string()))?;
            Ok(payload.into_owned())
        });
        let payload = Arc::new(payload.map_err(|error| {
            tracing::error!(seg, frame_off, %error, "a frame cannot be read");
            Errno::Io
        })?);
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        frames.put(key, Arc::clone(&payload), payload.len() + 64);
        Ok(payload)
    }
}

/// A cache of shared values with a bound on the sum of their weights.
#[derive(Debug)]
struct Weighed<K: Hash + Eq, V> {
    map: LruCache<K, (Arc<V>, usize)>,
    weight: usize,
    max: usize,
}

impl<K: Hash + Eq, V> Weighed<K, V> {
    fn new(max: usize) -> Self {
        Self { map: LruCache::unbounded(), weight: 0, max }
    }

    fn get(&mut self, key: &K) -> Option<Arc<V>> {
        self.map.get(key).map(|(value, _)| Arc::clone(value))
    }

    fn put(&mut self, key: K, value: Arc<V>, weight: usize) {
        if let Some((_, old)) = self.map.put(key, (value, weight)) {
            self.weight -= old;
        }
        self.weight += weight;
        while self.weight > self.max && self.map.len() > 1 {
            if let Some((_, (_, old))) = self.map.pop_lru() {
                self.weight -= old;
            }
        }
    }
}

/// Bytes of resolved regions a view keeps.
const REGIONS_MAX: usize = 16 << 20;
/// Bytes of opened frames a view keeps.
const FRAMES_MAX: usize = 48 << 20;
/// Regions that one question about extents looks at.
const EXTENT_REGIONS: usize = 1024;
