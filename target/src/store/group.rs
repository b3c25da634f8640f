//! One group's store: what a session appends, and the way to the points.
//!
//! Owns the group's writer state and what readers see of it. Holds: a call that
//! returned success is durable; a call that failed had no effect; the first failed
//! write or sync that is not a full disk is final until the store is opened again
//! (decision 9), and old points stay readable all the same; lower generations are
//! refused (I19); the last usable point never goes back (I15). Before it: the
//! receiver. After it: views. It does not know sessions: that there is one at a
//! time is the receiver's business, calls are merely one at a time here.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use blockfilter::names::{Lsn, Name};
use replicator::wire::Kind;

use super::ingest::{Indexed, Place, index_frame};
use super::log::{LogSnap, ROLL_BYTES, UNMERGED_MAX};
use super::manifest::DrillRef;
use super::segment::{Env, point_of};
use super::writer::Writer;
use super::{AppendError, FrameBuf, GroupMeta, GroupState, SeedState, StoreError};
use crate::points::{EraEnd, Point, PointError, PointQuery, PointSet, PointSpec};
use crate::view::{View, ViewCore};

/// One group. Shared: one writer (a session), any number of readers.
#[derive(Debug)]
pub struct GroupStore {
    pub(crate) env: Arc<Env>,
    meta: GroupMeta,
    pub(super) writer: Mutex<Writer>,
    snapshot: RwLock<Arc<Snapshot>>,
    points: RwLock<PointSet>,
    status: Mutex<Status>,
    merging: Mutex<()>,
    /// Views that are open, to share what they read.
    views: Mutex<Views>,
}

/// By disk, era and LSN.
type Views = HashMap<(u8, u32, Lsn), Weak<ViewCore>>;

/// What views read: the layers of every era. Replaced as a whole, never changed.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// Oldest first.
    pub(crate) eras: Vec<EraSnap>,
    pub(crate) bases: Vec<Arc<dyn blockfilter::engine::File>>,
}

/// The layers of one era.
#[derive(Debug)]
pub(crate) struct EraSnap {
    pub(crate) era: u32,
    pub(crate) stream: LogSnap,
    pub(crate) copy: LogSnap,
}

/// What [`GroupStore::state`] tells besides the description.
#[derive(Clone, Debug, Default)]
pub(super) struct Status {
    pub(super) generation: u64,
    pub(super) incarnation: u64,
    pub(super) last: Lsn,
    pub(super) history: Vec<(u64, Lsn)>,
    pub(super) seed: Option<SeedState>,
    pub(super) failed: Option<String>,
    pub(super) stored_bytes: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl GroupStore {
    /// Takes an opened group.
    pub(super) fn new(env: Arc<Env>, writer: Writer, points: PointSet) -> Self {
        let this = Self {
            env,
            meta: writer.manifest.meta.clone(),
            snapshot: RwLock::default(),
            points: RwLock::new(points),
            status: Mutex::default(),
            merging: Mutex::default(),
            views: Mutex::default(),
            writer: Mutex::new(writer),
        };
        this.publish(&lock(&this.writer));
        this
    }

    /// Shows readers the writer's state.
    pub(super) fn publish(&self, writer: &Writer) {
        let snapshot = Arc::new(writer.snapshot());
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = snapshot;
        *lock(&self.status) = writer.status();
    }

    fn read_points<T>(&self, read: impl FnOnce(&PointSet) -> T) -> T {
        read(&self.points.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write_points<T>(&self, write: impl FnOnce(&mut PointSet) -> T) -> T {
        write(&mut self.points.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// The group's description.
    pub fn meta(&self) -> &GroupMeta {
        &self.meta
    }

    /// The group's state now; never waits for a write.
    pub fn state(&self) -> GroupState {
        let status = lock(&self.status).clone();
        GroupState {
            meta: self.meta.clone(),
            generation: status.generation,
            incarnation: status.incarnation,
            last: status.last,
            last_consistent: self.newest().map(|p| p.lsn),
            history: status.history,
            seed: status.seed,
            failed: status.failed,
            stored_bytes: status.stored_bytes,
        }
    }

    /// The writer, unless it failed.
    pub(super) fn writable(&self) -> Result<MutexGuard<'_, Writer>, AppendError> {
        let writer = lock(&self.writer);
        match &writer.failed {
            Some(why) => Err(AppendError::Failed(why.clone())),
            None => Ok(writer),
        }
    }

    /// Turns an error of the store into what the session is told. Anything but a
    /// full disk is final.
    pub(super) fn refuse(&self, writer: &mut Writer, error: StoreError) -> AppendError {
        if error.is_full() {
            writer.tidy(&self.env);
            return AppendError::Full;
        }
        let why = error.to_string();
        tracing::error!(group = %self.meta.group, %why, "the group's store failed");
        writer.failed = Some(why.clone());
        lock(&self.status).failed = Some(why.clone());
        AppendError::Failed(why)
    }

    /// Starts a seed whose copies are ordered at `s`; durable on return. If no
    /// usable point exists it is a *first* seed: everything half-seeded is dropped,
    /// and blocks that are not copied read as zeroes. Else a reseed: old points
    /// stay usable. `last` becomes `s`, the group's generation `generation`.
    pub fn begin_seed(&self, s: Lsn, incarnation: u64, generation: u64) -> Result<(), AppendError> {
        let mut writer = self.writable()?;
        writer.check_generation(generation)?;
        let before = self.newest();
        let first = before.is_none();
        let begun = writer.begin_seed(&self.env, first, s, incarnation, generation);
        if let Err(error) = begun {
            return Err(self.refuse(&mut writer, error));
        }
        let ends = writer.era_ends();
        self.write_points(|points| points.set_eras(ends));
        self.publish(&writer);
        assert_eq!(self.newest(), before, "I15: a seed does not take the last usable point");
        Ok(())
    }

    /// Appends all frames of one epoch; the last has EPOCH_END. On return the
    /// epoch and its point are durable; the new `last` is returned.
    pub fn append_epoch(&self, frames: &[FrameBuf]) -> Result<Lsn, AppendError> {
        let mut writer = self.writable()?;
        let last_frame = writer.check_epoch(frames)?;
        let rolled = self.roll(&mut writer, false)?;
        let last_label = self.read_points(PointSet::last_time);
        let era = writer.era_mut()?;
        let Some(open) = &mut era.stream.open else {
            return Err(AppendError::Invalid("no open segment"));
        };
        let mut indexed = Indexed::default();
        let mut frame_off = open.end;
        for frame in frames {
            let place = Place { seg: open.meta.id, frame_off, copy_from: None };
            index_frame(frame, place, &self.env.sizes, &mut indexed)?;
            frame_off += frame.bytes.len() as u64;
        }
        if let Err(error) = open.write(frames, true) {
            return Err(self.refuse(&mut writer, error));
        }
        let point = point_of(era.era, &last_frame, indexed.mark.take(), last_label);
        let last = Lsn(last_frame.lsn_to.get());
        open.points.push(point.clone());
        open.advance(frames, last.0, &indexed);
        writer.advance(last, last_frame.incarnation.get());
        // Readers get a point only when all of its index is there.
        self.write_points(|points| points.push(point.0, point.1));
        *lock(&self.status) = writer.status();
        if rolled && writer.unmerged() > UNMERGED_MAX {
            self.merge(&mut writer)?;
        }
        Ok(last)
    }

    /// Seals and renews the open segment if that is due; whether it was.
    fn roll(&self, writer: &mut Writer, copy: bool) -> Result<bool, AppendError> {
        let now_us = self.env.clock.mono_us();
        if !writer.log(copy)?.is_due(now_us, writer.roll_bytes) {
            return Ok(false);
        }
        let generation = writer.manifest.generation;
        if let Err(error) = writer.change_log(&self.env, copy, Some(generation)) {
            return Err(self.refuse(writer, error));
        }
        self.publish(writer);
        Ok(true)
    }

    /// Takes a Copy frame of the seed under way. Durable after [`Self::sync_copy`].
    pub fn append_copy(&self, frame: &FrameBuf) -> Result<(), AppendError> {
        let mut writer = self.writable()?;
        writer.check_generation_is(frame.hdr.generation.get())?;
        let seed = writer.copying().ok_or(AppendError::NoSeed)?;
        if frame.kind() != Kind::Copy
            || frame.hdr.lsn_from.get() != seed.s.0
            || frame.hdr.group_id.get() != self.env.group_id
        {
            return Err(AppendError::Invalid("not a copy of this seed"));
        }
        if seed.first {
            writer.copy_to_base(&self.env, frame).map_err(|e| match e {
                Ok(refused) => refused,
                Err(error) => self.refuse(&mut writer, error),
            })?;
        } else {
            self.copy_to_log(&mut writer, frame)?;
        }
        writer.copied = (frame.hdr.cursor_disk.get(), frame.hdr.cursor.get());
        Ok(())
    }

    fn copy_to_log(&self, writer: &mut Writer, frame: &FrameBuf) -> Result<(), AppendError> {
        self.roll(writer, true)?;
        let era = writer.era_mut()?;
        let Some(open) = &mut era.copy.open else {
            return Err(AppendError::Invalid("no open segment"));
        };
        let mut indexed = Indexed::default();
        let (frame_off, from) = (open.end, open.lsn_to);
        let place = Place { seg: open.meta.id, frame_off, copy_from: Some(from) };
        index_frame(frame, place, &self.env.sizes, &mut indexed)?;
        let frames = std::slice::from_ref(frame);
        if let Err(error) = open.write(frames, false) {
            return Err(self.refuse(writer, error));
        }
        open.advance(frames, from + u64::from(frame.hdr.n_rec.get()), &indexed);
        Ok(())
    }

    /// Makes the copies so far durable and returns the cursor of the last one.
    pub fn sync_copy(&self) -> Result<(u32, u64), AppendError> {
        let mut writer = self.writable()?;
        writer.copying().ok_or(AppendError::NoSeed)?;
        if let Err(error) = writer.sync_copy(&self.env) {
            return Err(self.refuse(&mut writer, error));
        }
        *lock(&self.status) = writer.status();
        Ok(writer.cursor)
    }

    /// Everything is copied: the group is consistent once `last >= e`. Syncs the
    /// copies first; durable on return. Repeating it is harmless.
    pub fn end_seed(&self, e: Lsn) -> Result<(), AppendError> {
        let mut writer = self.writable()?;
        let Some(seed) = writer.copying() else {
            let ended =
                writer.manifest.eras.last().is_some_and(|era| era.end == Some(e.max(era.s)));
            return if ended { Ok(()) } else { Err(AppendError::NoSeed) };
        };
        let label = self.read_points(PointSet::last_time);
        let wall_us = crate::points::label(self.env.clock.wall_us(), label);
        let start = match writer.end_seed(&self.env, e.max(seed.s), wall_us) {
            Ok(start) => start,
            Err(error) => return Err(self.refuse(&mut writer, error)),
        };
        let ends = writer.era_ends();
        self.write_points(|points| {
            points.set_eras(ends);
            if let Some(rec) = start {
                points.push(rec, None);
            }
        });
        self.publish(&writer);
        Ok(())
    }

    /// Raises the generation, durably; lower ones are refused from then on (I19).
    pub fn raise_generation(&self, generation: u64) -> Result<(), AppendError> {
        let mut writer = self.writable()?;
        writer.check_generation(generation)?;
        let mut manifest = writer.manifest.clone();
        manifest.generation = generation;
        if let Err(error) = writer.commit(&self.env, manifest) {
            return Err(self.refuse(&mut writer, error));
        }
        *lock(&self.status) = writer.status();
        Ok(())
    }

    /// Points, newest first.
    pub fn points(&self, query: PointQuery) -> Vec<Point> {
        self.read_points(|points| points.list(query))
    }

    /// The oldest usable point.
    pub fn oldest(&self) -> Option<Point> {
        self.read_points(PointSet::oldest)
    }

    /// The newest usable point.
    pub fn newest(&self) -> Option<Point> {
        self.read_points(PointSet::newest)
    }

    /// Number of points.
    pub fn point_count(&self) -> usize {
        self.read_points(PointSet::len)
    }

    /// All tags in use.
    pub fn tags(&self) -> Vec<Name> {
        self.read_points(PointSet::tags)
    }

    /// Whether a point has this tag.
    pub fn has_tag(&self, tag: &Name) -> bool {
        self.tags().contains(tag)
    }

    /// Chooses the point that `spec` names; relative times count from the store's clock.
    pub fn resolve(&self, spec: &PointSpec) -> Result<Point, PointError> {
        let now_us = self.env.clock.wall_us();
        self.read_points(|points| points.resolve(spec, now_us))
    }

    /// The index of a disk.
    pub fn disk_index(&self, disk: &Name) -> Option<u8> {
        self.meta.disks.iter().position(|d| &d.disk == disk).map(|i| i as u8)
    }

    /// Opens one disk at a point: no copying, no waiting for writers.
    pub fn view(&self, disk: u8, point: &Point) -> Result<View, StoreError> {
        let Some(meta) = self.meta.disks.get(usize::from(disk)) else {
            return Err(StoreError::NoDisk(self.meta.group.clone(), disk.to_string()));
        };
        // Asked again under the lock that drops eras, so that what is dropped
        // meanwhile is refused.
        let snapshot = self.read_points(|points| {
            points.check(point)?;
            let snapshot = self.snapshot.read().unwrap_or_else(PoisonError::into_inner);
            Ok::<_, PointError>(Arc::clone(&snapshot))
        })?;
        let mut views = lock(&self.views);
        let key = (disk, point.era, point.lsn);
        if let Some(core) = views.get(&key).and_then(Weak::upgrade) {
            return Ok(View::new(core));
        }
        views.retain(|_, core| core.strong_count() > 0);
        let core = ViewCore::new(Arc::clone(&self.env), snapshot, meta, disk, point);
        let core = Arc::new(core);
        views.insert(key, Arc::downgrade(&core));
        Ok(View::new(core))
    }

    /// The drills of this group, with their points.
    pub(crate) fn drills(&self) -> Vec<(DrillRef, Point)> {
        let drills = lock(&self.writer).manifest.drills.clone();
        self.read_points(|points| {
            let at = |d: DrillRef| points.at(d.era, d.lsn).map(|point| (d, point));
            drills.into_iter().filter_map(at).collect()
        })
    }

    /// Adds a drill, or with None removes it; durable on return.
    pub(crate) fn set_drill(&self, id: &Name, drill: Option<DrillRef>) -> Result<(), StoreError> {
        let mut writer = lock(&self.writer);
        if let Some(why) = &writer.failed {
            return Err(StoreError::Failed(why.clone()));
        }
        let done = writer.set_drill(&self.env, id, drill);
        if let Err(error) = &done
            && !error.is_full()
        {
            writer.failed = Some(error.to_string());
            lock(&self.status).failed.clone_from(&writer.failed);
        }
        done
    }

    /// A number for the next drill's name.
    pub(crate) fn next_drill(&self) -> u32 {
        lock(&self.writer).manifest.next_drill
    }

    /// Merges index runs where that is due; returns whether there was work. Call
    /// it from a background thread every second or so.
    pub fn maintain(&self) -> Result<bool, StoreError> {
        let Ok(_one) = self.merging.try_lock() else { return Ok(false) };
        let (due, at) = {
            let Ok(mut writer) = self.writable() else { return Ok(false) };
            let Some(due) = writer.due(&self.env) else { return Ok(false) };
            writer.making = Some(due.0.meta);
            due
        };
        let run = match due.run(&self.env) {
            Ok(run) => run,
            // Merging saves time only; it waits for space.
            Err(error) if error.is_full() => return Ok(false),
            Err(error) => return Err(error),
        };
        let Ok(mut writer) = self.writable() else { return Ok(false) };
        writer.making = None;
        if let Err(error) = writer.finish_merge(&self.env, at, &due, run) {
            return match self.refuse(&mut writer, error) {
                AppendError::Full => Ok(false),
                error => Err(StoreError::Failed(error.to_string())),
            };
        }
        self.publish(&writer);
        Ok(true)
    }

    /// The same while appending, when background work does not keep up.
    fn merge(&self, writer: &mut Writer) -> Result<(), AppendError> {
        let Ok(_one) = self.merging.try_lock() else { return Ok(()) };
        let Some((due, at)) = writer.due(&self.env) else { return Ok(()) };
        let merged = due.run(&self.env);
        match merged.and_then(|run| writer.finish_merge(&self.env, at, &due, run)) {
            Ok(()) => self.publish(writer),
            // The epoch is durable; on a full disk only the merge waits for space.
            Err(error) => {
                self.refuse(writer, error);
            }
        }
        Ok(())
    }

    /// Seals segments at `bytes` instead of 64 MiB, so that tests see many.
    pub fn set_roll_bytes(&self, bytes: u64) {
        lock(&self.writer).roll_bytes = bytes.clamp(1, ROLL_BYTES);
    }

    /// Refuses everything from now on: the group is being deleted. A merge under way
    /// is over on return, so that it writes nothing where another group may be made.
    pub(super) fn close(&self) -> PathBuf {
        let why = "the group was deleted".to_owned();
        lock(&self.writer).failed = Some(why.clone());
        lock(&self.status).failed = Some(why);
        drop(lock(&self.merging));
        self.write_points(|points| points.set_eras(Vec::<EraEnd>::new()));
        self.env.dir.clone()
    }
}
