//! One group's store: the writer's side and the way to its points.

use std::sync::Arc;

use blockfilter::names::{Lsn, Name};

use super::{AppendError, FrameBuf, GroupState, StoreError};
use crate::points::{Point, PointError, PointQuery, PointSpec};
use crate::view::View;

/// One group. Shared: one writer (a session), any number of readers.
#[derive(Debug)]
pub struct GroupStore {}

impl GroupStore {
    /// The group's state now; never waits for a write.
    pub fn state(&self) -> GroupState {
        unreachable!("not built")
    }

    /// Starts a seed whose copies are ordered at `s`; durable on return. If no
    /// usable point exists it is a *first* seed: everything half-seeded is dropped,
    /// and blocks that are not copied read as zeroes. Else a reseed: old points
    /// stay usable. `last` becomes `s`, the group's generation `generation`.
    pub fn begin_seed(
        &self,
        _s: Lsn,
        _incarnation: u64,
        _generation: u64,
    ) -> Result<(), AppendError> {
        Err(AppendError::NoSeed)
    }

    /// Appends all frames of one epoch; the last has EPOCH_END. On return the
    /// epoch and its point are durable; the new `last` is returned.
    pub fn append_epoch(&self, _frames: &[FrameBuf]) -> Result<Lsn, AppendError> {
        Err(AppendError::NoSeed)
    }

    /// Takes a Copy frame of the seed under way. Durable after [`Self::sync_copy`].
    pub fn append_copy(&self, _frame: &FrameBuf) -> Result<(), AppendError> {
        Err(AppendError::NoSeed)
    }

    /// Makes the copies so far durable and returns the cursor of the last one.
    pub fn sync_copy(&self) -> Result<(u32, u64), AppendError> {
        Err(AppendError::NoSeed)
    }

    /// Everything is copied: the group is consistent once `last >= e`. Syncs the
    /// copies first; durable on return. Repeating it is harmless.
    pub fn end_seed(&self, _e: Lsn) -> Result<(), AppendError> {
        Err(AppendError::NoSeed)
    }

    /// Raises the generation, durably; lower ones are refused from then on (I19).
    pub fn raise_generation(&self, _generation: u64) -> Result<(), AppendError> {
        Err(AppendError::NoSeed)
    }

    /// Points, newest first.
    pub fn points(&self, _query: PointQuery) -> Vec<Point> {
        Vec::new()
    }

    /// The oldest usable point.
    pub fn oldest(&self) -> Option<Point> {
        None
    }

    /// The newest usable point.
    pub fn newest(&self) -> Option<Point> {
        None
    }

    /// Number of points.
    pub fn point_count(&self) -> usize {
        0
    }

    /// All tags in use.
    pub fn tags(&self) -> Vec<Name> {
        Vec::new()
    }

    /// Whether a point has this tag.
    pub fn has_tag(&self, _tag: &Name) -> bool {
        false
    }

    /// Chooses the point that `spec` names; relative times count from the store's clock.
    pub fn resolve(&self, spec: &PointSpec) -> Result<Point, PointError> {
        Err(PointError::Missing(spec.clone()))
    }

    /// The index of a disk.
    pub fn disk_index(&self, _disk: &Name) -> Option<u8> {
        None
    }

    /// Opens one disk at a point: no copying, no waiting for writers.
    pub fn view(&self, _disk: u8, _point: &Point) -> Result<View, StoreError> {
        Err(StoreError::Invalid("not built"))
    }

    /// Merges index runs where that is due; returns whether there was work. Call
    /// it from a background thread every second or so.
    pub fn maintain(self: &Arc<Self>) -> Result<bool, StoreError> {
        Ok(false)
    }
}
