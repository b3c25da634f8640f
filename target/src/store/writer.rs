//! The state that one group's appends change, and its recovery at a start.
//!
//! Owns the manifest in force, the logs and the base. Every structural change goes
//! the same way: plan (files written and synced), manifest, adopt. Used by
//! [`super::group`] under its lock only.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use blockfilter::engine::{Clock, Files, read_file, replace_file};
use blockfilter::journal::format::RecOp;
use blockfilter::names::{Lsn, Name};
use replicator::frame::FrameBuf;
use replicator::wire::{FrameHdr, Kind};
use serde::{Deserialize, Serialize};

use super::base::Base;
use super::format::SegKind;
use super::group::{EraSnap, Snapshot, Status};
use super::index::Run;
use super::ingest::{check_range, open_payload, record_payload};
use super::log::{Due, Log, Opened, ROLL_BYTES};
use super::manifest::{BaseRef, Documents, DrillRef, EraRef, LogRef, Manifest, RunRef, SegRef};
use super::segment::{Env, Tagged};
use super::{AppendError, GroupMeta, SeedState, StoreError};
use crate::points::{EraEnd, PointKind, PointRec, PointSet};

/// See the module.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(super) manifest: Manifest,
    documents: Documents,
    /// One for each era of the manifest, oldest first.
    eras: Vec<EraLogs>,
    base: Option<Base>,
    pub(super) last: Lsn,
    incarnation: u64,
    history: Vec<(u64, Lsn)>,
    /// What is durable of the copies.
    pub(super) cursor: (u32, u64),
    /// What was received of them.
    pub(super) copied: (u32, u64),
    pub(super) failed: Option<String>,
    pub(super) roll_bytes: u64,
    /// The run that a merge outside of the lock writes.
    pub(super) making: Option<RunRef>,
}

/// The logs of one era.
#[derive(Debug)]
pub(super) struct EraLogs {
    pub(super) era: u32,
    pub(super) stream: Log,
    pub(super) copy: Log,
}

/// `SEED`: how far the copies of a seed are durable.
#[derive(Debug, Default, Serialize, Deserialize)]
struct SeedFile {
    era: u32,
    disk: u32,
    byte: u64,
    /// Records in the log of copies (reseed).
    copies: u64,
}

impl Writer {
    /// Makes an empty group in an empty folder; durable, but not the folder's name.
    pub(super) fn create(files: &dyn Files, dir: &Path, meta: GroupMeta) -> Result<(), StoreError> {
        for name in ["seg", "idx", "drills"] {
            let sub = dir.join(name);
            files.create_dir_all(&sub).map_err(StoreError::io(&sub))?;
        }
        let manifest = Manifest {
            meta,
            generation: 0,
            incarnation: 0,
            history: Vec::new(),
            eras: Vec::new(),
            base: None,
            oldest: None,
            drills: Vec::new(),
            next_era: 1,
            next_id: 1,
            next_drill: 1,
        };
        Documents::new(dir).replace(files, &manifest)
    }

    /// Opens a group, repairs what a crash left, and finds its points.
    pub(super) fn open(
        files: Arc<dyn Files>,
        dir: &Path,
        clock: Arc<dyn Clock>,
    ) -> Result<(Arc<Env>, Self, PointSet), StoreError> {
        let (documents, manifest) = Documents::load::<Manifest>(files.as_ref(), dir)?;
        clean(files.as_ref(), dir, &manifest)?;
        let sizes = manifest.meta.disks.iter().map(|d| d.size_bytes).collect();
        let group_id = replicator::session::group_id(&manifest.meta.uuid);
        let env = Env::new(files, dir.to_owned(), group_id, sizes, clock, manifest.next_id);
        let mut this = Self {
            documents,
            eras: Vec::new(),
            base: None,
            last: Lsn(0),
            incarnation: manifest.incarnation,
            history: manifest.history.clone(),
            cursor: (0, 0),
            copied: (0, 0),
            failed: None,
            roll_bytes: ROLL_BYTES,
            making: None,
            manifest,
        };
        let mut points = PointSet::default();
        points.set_eras(this.era_ends());
        for i in 0..this.manifest.eras.len() {
            this.open_era(&env, i, &mut points)?;
        }
        if let Some(meta) = &this.manifest.base {
            this.base = Some(Base::open(&env, meta)?);
        }
        this.open_seed(&env);
        let refs = |e: &EraLogs| (e.stream.refs.clone(), e.copy.refs.clone());
        let mut manifest = this.manifest.clone();
        for (era, logs) in manifest.eras.iter_mut().zip(&this.eras) {
            (era.stream, era.copy) = refs(logs);
        }
        if manifest != this.manifest {
            this.commit(&env, manifest)?;
        }
        Ok((Arc::new(env), this, points))
    }

    fn open_era(&mut self, env: &Env, i: usize, points: &mut PointSet) -> Result<(), StoreError> {
        let era = self.manifest.eras[i].clone();
        if let Some(rec) = start_point(&era) {
            points.push(rec, None);
        }
        let label = points.last_time();
        let stream = Log::open(env, SegKind::Stream, era.era, era.stream, label)?;
        let copy = Log::open(env, SegKind::Copy, era.era, era.copy, None)?;
        let Opened { log: stream, points: found, incarnations, failure } = stream;
        self.failed = self.failed.take().or(failure).or(copy.failure);
        for (rec, tag) in found as Vec<Tagged> {
            points.push(rec, tag);
        }
        self.last = Lsn(stream.end(era.s.0));
        for (incarnation, from) in incarnations {
            self.note_incarnation(incarnation, Lsn(from));
        }
        self.eras.push(EraLogs { era: era.era, stream, copy: copy.log });
        Ok(())
    }

    /// Finds how far an unfinished seed is durable.
    fn open_seed(&mut self, env: &Env) {
        let Some(era) = self.manifest.eras.last() else { return };
        if era.end.is_some() {
            return;
        }
        let text = read_file(env.files.as_ref(), &env.dir.join(SEED), SEED_MAX);
        let seed: Option<SeedFile> = text.ok().and_then(|t| serde_json::from_slice(&t).ok());
        let Some(seed) = seed.filter(|seed| seed.era == era.era) else { return };
        let copies = self.eras.last().map_or(0, |e| e.copy.end(0));
        if copies < seed.copies {
            let why =
                format!("{} of {} copied records are lost", seed.copies - copies, seed.copies);
            self.failed = self.failed.take().or(Some(why));
        }
        self.cursor = (seed.disk, seed.byte);
        self.copied = self.cursor;
    }

    fn note_incarnation(&mut self, incarnation: u64, from: Lsn) {
        if incarnation > self.incarnation {
            self.history.push((self.incarnation, from));
            self.history.drain(..self.history.len().saturating_sub(HISTORY_MAX));
            self.incarnation = incarnation;
        }
    }

    /// What readers see.
    pub(super) fn snapshot(&self) -> Snapshot {
        let era = |e: &EraLogs| EraSnap {
            era: e.era,
            stream: e.stream.snapshot(),
            copy: e.copy.snapshot(),
        };
        Snapshot {
            eras: self.eras.iter().map(era).collect(),
            bases: self.base.as_ref().map_or_else(Vec::new, Base::files),
        }
    }

    /// What is told of the group.
    pub(super) fn status(&self) -> Status {
        let bytes = self.eras.iter().map(|e| e.stream.bytes() + e.copy.bytes());
        Status {
            generation: self.manifest.generation,
            incarnation: self.incarnation,
            last: self.last,
            history: self.history.clone(),
            seed: self.seed(),
            failed: self.failed.clone(),
            stored_bytes: bytes.sum(),
        }
    }

    /// The seed that is not complete yet.
    fn seed(&self) -> Option<SeedState> {
        let era = self.manifest.eras.last()?;
        if era.end.is_some_and(|end| self.last >= end) {
            return None;
        }
        Some(SeedState { first: era.first, s: era.s, end: era.end, cursor: self.cursor })
    }

    /// The seed that still copies.
    pub(super) fn copying(&self) -> Option<SeedState> {
        self.seed().filter(|seed| seed.end.is_none())
    }

    /// Where each era becomes usable.
    pub(super) fn era_ends(&self) -> Vec<EraEnd> {
        self.manifest.eras.iter().map(|e| EraEnd { era: e.era, end: e.end }).collect()
    }

    /// The era that is written to.
    pub(super) fn era_mut(&mut self) -> Result<&mut EraLogs, AppendError> {
        self.eras.last_mut().ok_or(AppendError::NoSeed)
    }

    /// A log of the era that is written to.
    pub(super) fn log(&self, copy: bool) -> Result<&Log, AppendError> {
        let era = self.eras.last().ok_or(AppendError::NoSeed)?;
        Ok(if copy { &era.copy } else { &era.stream })
    }

    /// I19: generations do not go back.
    pub(super) fn check_generation(&self, found: u64) -> Result<(), AppendError> {
        let current = self.manifest.generation;
        if found < current {
            return Err(AppendError::Generation { found, current });
        }
        Ok(())
    }

    /// Frames must be of the generation in force.
    pub(super) fn check_generation_is(&self, found: u64) -> Result<(), AppendError> {
        let current = self.manifest.generation;
        if found != current {
            return Err(AppendError::Generation { found, current });
        }
        Ok(())
    }

    /// Checks that frames are one whole epoch that continues the stream; returns
    /// the header of the last.
    pub(super) fn check_epoch(&self, frames: &[FrameBuf]) -> Result<FrameHdr, AppendError> {
        let last = frames.last().ok_or(AppendError::Invalid("an epoch without frames"))?.hdr;
        if self.eras.is_empty() {
            return Err(AppendError::NoSeed);
        }
        let incarnation = last.incarnation.get();
        let mut next = self.last;
        for (i, frame) in frames.iter().enumerate() {
            let hdr = &frame.hdr;
            if frame.kind() != Kind::Epoch || hdr.is_epoch_end() != (i + 1 == frames.len()) {
                return Err(AppendError::Invalid("the frames are not one epoch"));
            }
            if hdr.group_id.get() != replicator::session::group_id(&self.manifest.meta.uuid) {
                return Err(AppendError::Invalid("a frame of another group"));
            }
            self.check_generation_is(hdr.generation.get())?;
            if hdr.incarnation.get() != incarnation {
                return Err(AppendError::Invalid("an epoch of two incarnations"));
            }
            if hdr.lsn_from.get() != next.0 {
                let found = Lsn(hdr.lsn_from.get());
                return Err(AppendError::Gap { expected: next, found });
            }
            next = Lsn(hdr.lsn_to.get());
        }
        if incarnation < self.incarnation {
            let current = self.incarnation;
            return Err(AppendError::Incarnation { found: incarnation, current });
        }
        if next == self.last {
            return Err(AppendError::Invalid("an epoch without LSNs"));
        }
        Ok(last)
    }

    /// An epoch is durable.
    pub(super) fn advance(&mut self, last: Lsn, incarnation: u64) {
        self.note_incarnation(incarnation, self.last);
        self.last = last;
    }

    /// Puts a manifest in force.
    pub(super) fn commit(&mut self, env: &Env, mut manifest: Manifest) -> Result<(), StoreError> {
        manifest.incarnation = self.incarnation;
        manifest.history.clone_from(&self.history);
        manifest.next_id = env.next_id();
        self.documents.replace(env.files.as_ref(), &manifest)?;
        self.manifest = manifest;
        Ok(())
    }

    /// Rolls, rescues or (without `next`) seals a log of the newest era.
    pub(super) fn change_log(
        &mut self,
        env: &Env,
        copy: bool,
        next: Option<u64>,
    ) -> Result<(), StoreError> {
        let mut manifest = self.manifest.clone();
        let (Some(logs), Some(era)) = (self.eras.last_mut(), manifest.eras.last_mut()) else {
            return Ok(());
        };
        let (log, refs, start) = match copy {
            true => (&mut logs.copy, &mut era.copy, 0),
            false => (&mut logs.stream, &mut era.stream, era.s.0),
        };
        let plan = log.plan(env, next, start)?;
        refs.clone_from(&plan.refs);
        self.commit(env, manifest)?;
        if let Some(logs) = self.eras.last_mut() {
            let log = if copy { &mut logs.copy } else { &mut logs.stream };
            log.adopt(env, plan);
        }
        Ok(())
    }

    /// See [`super::GroupStore::begin_seed`].
    pub(super) fn begin_seed(
        &mut self,
        env: &Env,
        first: bool,
        s: Lsn,
        incarnation: u64,
        generation: u64,
    ) -> Result<(), StoreError> {
        let unfinished = self.seed().is_some();
        if !first && !unfinished && self.log(false).is_ok_and(|log| log.open.is_some()) {
            self.change_log(env, false, None)?;
        }
        let mut manifest = self.manifest.clone();
        let era = manifest.next_era;
        let mut base = None;
        if first {
            manifest.eras.clear();
            let meta = BaseRef { n: env.take_id(), era, lsn: s };
            base = Some(Base::create(env, &meta)?);
            manifest.base = Some(meta);
        } else if unfinished {
            manifest.eras.pop();
        }
        manifest.eras.push(EraRef {
            era,
            first,
            s,
            end: None,
            start_point_us: None,
            incarnation,
            stream: LogRef::default(),
            copy: LogRef::default(),
        });
        manifest.generation = generation;
        manifest.next_era += 1;
        let (old_incarnation, old_history) = (self.incarnation, self.history.clone());
        if first || incarnation < self.incarnation {
            self.history.clear();
            self.incarnation = incarnation;
        }
        self.note_incarnation(incarnation, self.last);
        if let Err(error) = self.commit(env, manifest) {
            (self.incarnation, self.history) = (old_incarnation, old_history);
            return Err(error);
        }
        let kept = &self.manifest.eras;
        self.eras.retain(|e| kept.iter().any(|k| k.era == e.era));
        let (stream, copy) = (Log::new(SegKind::Stream, era), Log::new(SegKind::Copy, era));
        self.eras.push(EraLogs { era, stream, copy });
        if base.is_some() {
            self.base = base;
        }
        self.last = s;
        (self.cursor, self.copied) = ((0, 0), (0, 0));
        self.tidy(env);
        Ok(())
    }

    /// Removes what neither the manifest nor a merge under way names. What cannot be
    /// removed now goes at the next start; drills are made outside of our lock.
    pub(super) fn tidy(&self, env: &Env) {
        let files = env.files.as_ref();
        let logs = self.manifest.eras.iter().flat_map(|e| [&e.stream, &e.copy]);
        let _ = clean_logs(files, &env.dir, logs, self.making.as_ref());
        let _ = clean_bases(files, &env.dir, &self.manifest);
    }

    /// Writes a first seed's copies to the base. The outer error is what the
    /// session is told if it is `Ok`, else the store's.
    pub(super) fn copy_to_base(
        &mut self,
        env: &Env,
        frame: &FrameBuf,
    ) -> Result<(), Result<AppendError, StoreError>> {
        let payload = open_payload(frame)
            .map_err(|_| Ok(AppendError::Invalid("the payload does not match its checksum")))?;
        for desc in frame.descs() {
            check_range(desc, &env.sizes).map_err(Ok)?;
        }
        let Some(base) = &mut self.base else { return Err(Ok(AppendError::NoSeed)) };
        for desc in frame.descs() {
            let (disk, offset) = (desc.disk, desc.offset.get());
            match desc.rec_op() {
                Some(RecOp::Write) => {
                    let bytes = record_payload(&payload, desc)
                        .ok_or(Ok(AppendError::Invalid("payload range")))?;
                    base.write(disk, offset, bytes).map_err(Err)?;
                }
                Some(RecOp::Zero) => {
                    base.zero(disk, offset, desc.len.get().into()).map_err(Err)?;
                }
                _ => return Err(Ok(AppendError::Invalid("operation of a copied block"))),
            }
        }
        Ok(())
    }

    /// Makes copies durable, then the cursor.
    pub(super) fn sync_copy(&mut self, env: &Env) -> Result<(), StoreError> {
        if self.copied == self.cursor {
            return Ok(());
        }
        if let Some(base) = &mut self.base {
            base.sync()?;
        }
        let Some(era) = self.eras.last_mut() else { return Ok(()) };
        if let Some(open) = &mut era.copy.open {
            open.sync()?;
        }
        let (disk, byte) = self.copied;
        let seed = SeedFile { era: era.era, disk, byte, copies: era.copy.end(0) };
        let path = env.dir.join(SEED);
        let text =
            serde_json::to_vec(&seed).map_err(|e| StoreError::damaged(&path, e.to_string()))?;
        replace_file(env.files.as_ref(), &path, &text).map_err(StoreError::io(&path))?;
        self.cursor = self.copied;
        Ok(())
    }

    /// See [`super::GroupStore::end_seed`]; returns the point at `s`, if there is one.
    pub(super) fn end_seed(
        &mut self,
        env: &Env,
        e: Lsn,
        wall_us: u64,
    ) -> Result<Option<PointRec>, StoreError> {
        self.sync_copy(env)?;
        if let Some(base) = &mut self.base {
            base.sync()?;
        }
        if self.log(true).is_ok_and(|log| log.open.is_some()) {
            self.change_log(env, true, None)?;
        }
        let mut manifest = self.manifest.clone();
        let Some(era) = manifest.eras.last_mut() else { return Ok(None) };
        era.end = Some(e);
        if e == era.s && self.last == era.s {
            era.start_point_us = Some(wall_us);
        }
        let start = start_point(era);
        self.commit(env, manifest)?;
        let _ = env.files.remove(&env.dir.join(SEED));
        Ok(start)
    }

    /// Adds a drill, or with None removes it.
    pub(super) fn set_drill(
        &mut self,
        env: &Env,
        id: &Name,
        drill: Option<DrillRef>,
    ) -> Result<(), StoreError> {
        let mut manifest = self.manifest.clone();
        manifest.drills.retain(|d| &d.id != id);
        if let Some(drill) = drill {
            manifest.next_drill += 1;
            manifest.drills.push(drill);
        }
        self.commit(env, manifest)
    }

    /// Number of runs of the stream that were never merged.
    pub(super) fn unmerged(&self) -> usize {
        self.eras.last().map_or(0, |e| e.stream.unmerged())
    }

    /// A merge that is due, and of which log: era and whether the copies'.
    pub(super) fn due(&self, env: &Env) -> Option<(Due, (u32, bool))> {
        self.eras.iter().find_map(|e| {
            let stream = e.stream.due(env).map(|due| (due, (e.era, false)));
            stream.or_else(|| e.copy.due(env).map(|due| (due, (e.era, true))))
        })
    }

    /// Puts a merged run in force, if its sources still are.
    pub(super) fn finish_merge(
        &mut self,
        env: &Env,
        (era, copy): (u32, bool),
        due: &Due,
        run: Run,
    ) -> Result<(), StoreError> {
        let made = env.idx_dir().join(run.meta.name());
        let i = self.eras.iter().position(|e| e.era == era);
        let plan = i.and_then(|i| {
            let logs = &self.eras[i];
            let log = if copy { &logs.copy } else { &logs.stream };
            Some((i, log.plan_merge(env, due, run)?))
        });
        let Some((i, plan)) = plan else {
            let _ = env.files.remove(&made);
            return Ok(());
        };
        let mut manifest = self.manifest.clone();
        let refs = &mut manifest.eras[i];
        let refs = if copy { &mut refs.copy } else { &mut refs.stream };
        refs.clone_from(&plan.refs);
        self.commit(env, manifest)?;
        let logs = &mut self.eras[i];
        let log = if copy { &mut logs.copy } else { &mut logs.stream };
        log.adopt(env, plan);
        Ok(())
    }
}

/// The point at the start of an era during whose seed nothing was written.
fn start_point(era: &EraRef) -> Option<PointRec> {
    let time_us = era.start_point_us?;
    let (lsn, incarnation) = (era.s.0, era.incarnation);
    Some(PointRec { era: era.era, lsn, incarnation, time_us, kind: PointKind::Crash })
}

/// Removes files that the manifest does not name: left over from a crash.
fn clean(files: &dyn Files, dir: &Path, manifest: &Manifest) -> Result<(), StoreError> {
    clean_logs(files, dir, manifest.eras.iter().flat_map(|e| [&e.stream, &e.copy]), None)?;
    let drills = manifest.drills.iter().map(|d| d.id.to_string()).collect();
    keep_only(files, &dir.join("drills"), &drills)?;
    clean_bases(files, dir, manifest)
}

fn clean_bases(files: &dyn Files, dir: &Path, manifest: &Manifest) -> Result<(), StoreError> {
    let disks = 0..manifest.meta.disks.len();
    let bases: Vec<String> =
        manifest.base.iter().flat_map(|b| disks.clone().map(|i| b.name(i))).collect();
    for name in files.list(dir).map_err(StoreError::io(dir))? {
        if name.ends_with(".base") && !bases.contains(&name) {
            let _ = files.remove(&dir.join(name));
        }
    }
    Ok(())
}

/// Removes segments and runs that no log names, but a run that is `making`.
pub(crate) fn clean_logs<'a>(
    files: &dyn Files,
    dir: &Path,
    logs: impl Iterator<Item = &'a LogRef>,
    making: Option<&RunRef>,
) -> Result<(), StoreError> {
    let mut segs = HashSet::new();
    let mut runs: HashSet<String> = making.iter().map(|r| r.name()).collect();
    for log in logs {
        segs.extend(log.segs.iter().map(SegRef::name));
        runs.extend(log.runs.iter().map(RunRef::name));
    }
    keep_only(files, &dir.join("seg"), &segs)?;
    keep_only(files, &dir.join("idx"), &runs)
}

fn keep_only(files: &dyn Files, dir: &Path, named: &HashSet<String>) -> Result<(), StoreError> {
    for name in files.list(dir).map_err(StoreError::io(dir))? {
        if !named.contains(&name) {
            let path = dir.join(&name);
            let _ = files.remove(&path).or_else(|_| files.remove_dir_all(&path));
        }
    }
    Ok(())
}

const SEED: &str = "SEED";
const SEED_MAX: u64 = 4096;
/// Ended incarnations that are remembered.
const HISTORY_MAX: usize = 64;
