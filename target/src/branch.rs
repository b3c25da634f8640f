//! Writes on top of a view: the log of one drill.
//!
//! Owns `drills/<id>/`: segments and runs as the group's, in a space of LSNs of its
//! own that starts at 0; the parent is the point in the group's manifest. Holds:
//! every write is in the index before it is answered, so all connections see it;
//! FLUSH and FUA sync the log, and a log is always cut to a prefix, so what was
//! flushed is whole after a crash. Before it: a view. After it: NBD. It never
//! touches the group's own history.

use blockfilter::crc32c;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use blockfilter::block::{Errno, Export, ExportInfo, Extent, SECTOR, ZeroFlags};
use blockfilter::journal::format::{RecDesc, RecOp};
use blockfilter::names::Name;
use replicator::frame::FrameBuf;
use replicator::wire::{FRAME_EPOCH_END, FrameHdr, Kind};

use crate::store::StoreError;
use crate::store::format::{REGION, SegKind};
use crate::store::ingest::{Indexed, Place, index_frame};
use crate::store::log::{Log, LogSnap, Plan, ROLL_BYTES};
use crate::store::manifest::{BranchManifest, Documents};
use crate::store::segment::Env;
use crate::store::writer::clean_logs;
use crate::view::{ExtentList, Flat, FrameCache, Source, View, fill, for_regions};

/// The writes of one drill, over all its disks.
#[derive(Debug)]
pub(crate) struct Branch {
    env: Env,
    writer: Mutex<BranchWriter>,
    snapshot: RwLock<LogSnap>,
    frames: FrameCache,
}

#[derive(Debug)]
struct BranchWriter {
    log: Log,
    documents: Documents,
    /// Why nothing is accepted any more.
    failed: Option<String>,
}

impl Branch {
    fn dir(parent: &Env, id: &Name) -> PathBuf {
        parent.dir.join("drills").join(id.as_str())
    }

    /// Makes an empty branch; durable on return. The group's manifest must name it next.
    pub(crate) fn create(parent: &Env, id: &Name) -> Result<(), StoreError> {
        let dir = Self::dir(parent, id);
        let files = parent.files.as_ref();
        if files.exists(&dir) {
            files.remove_dir_all(&dir).map_err(StoreError::io(&dir))?;
        }
        for sub in [dir.join("seg"), dir.join("idx")] {
            files.create_dir_all(&sub).map_err(StoreError::io(&sub))?;
        }
        let manifest = BranchManifest { next_id: 1, ..Default::default() };
        Documents::new(&dir).replace(files, &manifest)?;
        let drills = parent.dir.join("drills");
        files.sync_dir(&drills).map_err(StoreError::io(&drills))
    }

    /// Opens a branch, repairs what a crash left.
    pub(crate) fn open(parent: &Env, id: &Name) -> Result<Self, StoreError> {
        let dir = Self::dir(parent, id);
        let files = Arc::clone(&parent.files);
        let (documents, manifest) = Documents::load::<BranchManifest>(files.as_ref(), &dir)?;
        clean_logs(files.as_ref(), &dir, std::iter::once(&manifest.log), None)?;
        let (sizes, clock) = (parent.sizes.clone(), Arc::clone(&parent.clock));
        let env = Env::new(files, dir, parent.group_id, sizes, clock, manifest.next_id);
        let opened = Log::open(&env, SegKind::Branch, 0, manifest.log, None)?;
        let snapshot = RwLock::new(opened.log.snapshot());
        let writer = BranchWriter { log: opened.log, documents, failed: opened.failure };
        let frames = FrameCache::new(FRAMES_MAX);
        Ok(Self { env, writer: Mutex::new(writer), snapshot, frames })
    }

    /// Refuses everything from now on.
    pub(crate) fn close(&self) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.failed = Some("the drill was finished".to_owned());
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = LogSnap::default();
    }

    fn writable(&self) -> Result<MutexGuard<'_, BranchWriter>, Errno> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if writer.failed.is_some() { Err(Errno::Io) } else { Ok(writer) }
    }

    fn refuse(&self, writer: &mut BranchWriter, error: &StoreError) -> Errno {
        if error.is_full() {
            self.tidy(writer);
            return Errno::NoSpc;
        }
        tracing::error!(%error, "a drill's log failed");
        writer.failed = Some(error.to_string());
        Errno::Io
    }

    /// Removes what a full disk left behind.
    fn tidy(&self, writer: &BranchWriter) {
        let refs = std::iter::once(&writer.log.refs);
        // What cannot be removed now goes when the branch is opened again.
        let _ = clean_logs(self.env.files.as_ref(), &self.env.dir, refs, None);
    }

    fn snapshot(&self) -> LogSnap {
        self.snapshot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Appends one record.
    fn append(
        &self,
        writer: &mut BranchWriter,
        op: RecOp,
        disk: u8,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> Result<(), Errno> {
        if writer.log.is_due(self.env.clock.mono_us(), ROLL_BYTES)
            && let Err(error) = self.roll(writer)
        {
            return Err(self.refuse(writer, &error));
        }
        let Some(open) = &mut writer.log.open else { return Err(Errno::Io) };
        let lsn = open.lsn_to;
        let desc = RecDesc {
            op: op as u8,
            disk,
            len: len.into(),
            offset: offset.into(),
            lsn: lsn.into(),
            crc: if data.is_empty() { 0 } else { crc32c::crc32c(data) }.into(),
            ..Default::default()
        };
        let hdr = FrameHdr {
            kind: Kind::Epoch as u8,
            flags: FRAME_EPOCH_END,
            group_id: self.env.group_id.into(),
            lsn_from: lsn.into(),
            lsn_to: (lsn + 1).into(),
            raw_len: (data.len() as u32).into(),
            ..Default::default()
        };
        let frame = [FrameBuf::seal(hdr, &[desc], data)];
        let mut indexed = Indexed::default();
        let place = Place { seg: open.meta.id, frame_off: open.end, copy_from: None };
        index_frame(&frame[0], place, &self.env.sizes, &mut indexed).map_err(|_| Errno::Inval)?;
        if let Err(error) = open.write(&frame, false) {
            return Err(self.refuse(writer, &error));
        }
        open.advance(&frame, lsn + 1, &indexed);
        Ok(())
    }

    /// Renews the open segment, and merges runs when that is due.
    fn roll(&self, writer: &mut BranchWriter) -> Result<(), StoreError> {
        let plan = writer.log.plan(&self.env, Some(0), 0)?;
        self.put(writer, plan)?;
        let Some(due) = writer.log.due(&self.env) else { return Ok(()) };
        let merged = due.run(&self.env).and_then(|run| {
            let plan = writer.log.plan_merge(&self.env, &due, run);
            plan.map_or(Ok(()), |plan| self.put(writer, plan))
        });
        match merged {
            // Merging saves time only; it waits for space.
            Err(error) if error.is_full() => {
                self.tidy(writer);
                Ok(())
            }
            merged => merged,
        }
    }

    /// Puts a plan in force; readers see it at once.
    fn put(&self, writer: &mut BranchWriter, plan: Plan) -> Result<(), StoreError> {
        let manifest = BranchManifest { log: plan.refs.clone(), next_id: self.env.next_id() };
        writer.documents.replace(self.env.files.as_ref(), &manifest)?;
        writer.log.adopt(&self.env, plan);
        let snapshot = writer.log.snapshot();
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = snapshot;
        Ok(())
    }

    fn sync(&self, writer: &mut BranchWriter) -> Result<(), Errno> {
        let Some(open) = &mut writer.log.open else { return Ok(()) };
        if open.broken {
            // What it holds is durable only once it is rescued into another file.
            return match self.roll(writer) {
                Ok(()) => Ok(()),
                Err(error) => Err(self.refuse(writer, &error)),
            };
        }
        match open.sync() {
            Ok(()) => Ok(()),
            Err(error) => Err(self.refuse(writer, &error)),
        }
    }
}

/// One disk of a drill: the branch over the view.
#[derive(Debug)]
pub(crate) struct BranchDisk {
    branch: Arc<Branch>,
    view: View,
    disk: u8,
    description: String,
}

impl BranchDisk {
    pub(crate) fn new(branch: Arc<Branch>, view: View, description: String) -> Self {
        let disk = view.disk();
        Self { branch, view, disk, description }
    }

    fn region(&self, log: &LogSnap, region: u64) -> Result<Flat, Errno> {
        let mut flat = Flat::new();
        flat.add_log(log, self.disk, region, u64::MAX).map_err(|error| {
            tracing::error!(%error, "a drill's index cannot be read");
            Errno::Io
        })?;
        Ok(flat.finish(Source::Base))
    }

    /// Writes whole sectors, in parts that fit a frame.
    fn write_sectors(
        &self,
        writer: &mut BranchWriter,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Errno> {
        let mut at = offset;
        for part in data.chunks(WRITE_STEP) {
            let len = part.len() as u32;
            self.branch.append(writer, RecOp::Write, self.disk, at, len, part)?;
            at += u64::from(len);
        }
        Ok(())
    }

    /// Completes the range to whole sectors from what is there, and writes it.
    fn write_any(&self, writer: &mut BranchWriter, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let end = offset + data.len() as u64;
        if offset.is_multiple_of(SECTOR) && end.is_multiple_of(SECTOR) {
            return self.write_sectors(writer, offset, data);
        }
        let first = offset / SECTOR * SECTOR;
        let mut whole = vec![0; (end.next_multiple_of(SECTOR) - first) as usize];
        let visible = (self.view.size().min(first + whole.len() as u64) - first) as usize;
        // Only the first and last sector can be incomplete.
        let sector = SECTOR as usize;
        let head = sector.min(visible);
        self.read(first, &mut whole[..head])?;
        let tail = whole.len() - sector;
        if tail > 0 && tail < visible {
            self.read(first + tail as u64, &mut whole[tail..visible])?;
        }
        let inside = (offset - first) as usize;
        whole[inside..inside + data.len()].copy_from_slice(data);
        self.write_sectors(writer, first, &whole)
    }

    fn clear(&self, op: RecOp, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        let mut writer = self.branch.writable()?;
        let end = offset + len;
        let low = offset.next_multiple_of(SECTOR).min(end);
        // The disk's last bytes fill their sector.
        let high = if end == self.view.size() { end.next_multiple_of(SECTOR) } else { end };
        let high = (high / SECTOR * SECTOR).max(low);
        if offset < low {
            self.write_any(&mut writer, offset, &vec![0; (low - offset) as usize])?;
        }
        let mut at = low;
        while at < high {
            let now = CLEAR_STEP.min(high - at);
            self.branch.append(&mut writer, op, self.disk, at, now as u32, &[])?;
            at += now;
        }
        if high < end {
            self.write_any(&mut writer, high, &vec![0; (end - high) as usize])?;
        }
        if fua { self.branch.sync(&mut writer) } else { Ok(()) }
    }
}

impl Export for BranchDisk {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: self.view.size(),
            read_only: false,
            multi_conn: true,
            block_min: 1,
            block_preferred: 4096,
            fast_zero: true,
            trim: true,
            dirty_map: false,
            description: self.description.clone(),
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let log = self.branch.snapshot();
        let (env, frames) = (&self.branch.env, &self.branch.frames);
        for_regions(offset, buf, |region, inside, part| {
            let flat = self.region(&log, region)?;
            fill(env, frames, &flat, inside, part, |_, at, bytes| {
                self.view.read(region * REGION + at, bytes)
            })
        })
    }

    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), Errno> {
        let mut writer = self.branch.writable()?;
        self.write_any(&mut writer, offset, data)?;
        if fua { self.branch.sync(&mut writer) } else { Ok(()) }
    }

    fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno> {
        self.clear(RecOp::Zero, offset, len, flags.fua)
    }

    fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        self.clear(RecOp::Trim, offset, len, fua)
    }

    fn flush(&self) -> Result<(), Errno> {
        let mut writer = self.branch.writable()?;
        self.branch.sync(&mut writer)
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>, Errno> {
        let log = self.branch.snapshot();
        let mut list = ExtentList::new(max);
        let end = offset.saturating_add(len).min(self.view.size());
        let mut at = offset;
        for _ in 0..EXTENT_REGIONS {
            if at >= end || list.is_full() {
                break;
            }
            let region = at / REGION;
            for piece in &self.region(&log, region)?.pieces {
                let from = region * REGION + u64::from(piece.first) * SECTOR;
                let to = (from + u64::from(piece.count) * SECTOR).min(end);
                let from = from.max(at);
                if from >= to {
                    continue;
                }
                match piece.source {
                    Source::Base => {
                        // A part that the view does not describe ends the answer.
                        let known = self.view.extents(from, to - from, max)?;
                        let covered: u64 = known.iter().map(|e| e.len).sum();
                        known.iter().for_each(|e| list.push(e.len, e.zero));
                        if covered < to - from {
                            return Ok(list.extents);
                        }
                    }
                    source => list.push(to - from, source == Source::Zero),
                }
            }
            at = (region + 1) * REGION;
        }
        Ok(list.extents)
    }
}

/// Most payload bytes of one record: a frame's limit.
const WRITE_STEP: usize = 1 << 20;
/// Most bytes of one zero or trim record: less than 4 GiB.
const CLEAR_STEP: u64 = 1 << 30;
/// Bytes of opened frames a drill keeps.
const FRAMES_MAX: usize = 16 << 20;
/// Regions that one question about extents looks at.
const EXTENT_REGIONS: usize = 1024;
