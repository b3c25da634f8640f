//! The target's store: everything that the only other copy of people's data is
//! kept in.
//!
//! ```text
//! T/STORE                       format and version
//! T/store.lock                  flock of the one process that has it open (I20)
//! T/groups/G/CURRENT            name of the manifest in force
//!           /MANIFEST-n         JSON with version and CRC: what exists (I18)
//!           /seg/*.seg          frames as received, immutable once sealed
//!           /idx/*.run          sorted index of one interval of LSNs
//!           /disk-<i>.<n>.base  the disk below the retained history, sparse
//!           /SEED               how far an unfinished copy is durable
//!           /drills/<id>/…      branches: the same again, per drill
//! ```
//!
//! *Order.* A group's history is a list of **eras**; a seed starts one. In an
//! era, copied blocks come first (ruling 1: they are ordered at `s`), then the
//! stream's records by LSN. The first era's copies are the base. So LSNs may
//! jump at a seed, and old points never change.
//!
//! Owns the folder and the list of groups. Before it: the receiver, which hands
//! over checked frames. After it: points, views, branches. It never speaks to
//! the network and never decides who may write; it refuses older generations
//! (I19).

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use blockfilter::block::Export;
use blockfilter::engine::{Clock, File, Files, Open};
use blockfilter::names::{Lsn, Name};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::points::{Point, PointError};

mod group;

pub use group::GroupStore;
pub use replicator::frame::FrameBuf;

/// One disk of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMeta {
    /// Its name in the group.
    pub disk: Name,
    /// Random id, given at protect time.
    pub uuid: Uuid,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// What a group is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMeta {
    /// Its name.
    pub group: Name,
    /// Random id, given at protect time.
    pub uuid: Uuid,
    /// The agent that may write it.
    pub owner: String,
    /// The disks; the position in this list is the index used in records.
    pub disks: Vec<DiskMeta>,
}

/// A group's state, all durable.
#[derive(Clone, Debug)]
pub struct GroupState {
    /// What it is.
    pub meta: GroupMeta,
    /// Frames of lower generations are refused.
    pub generation: u64,
    /// Of the newest record.
    pub incarnation: u64,
    /// Durable end of the stream; the next epoch starts here.
    pub last: Lsn,
    /// The newest usable point.
    pub last_consistent: Option<Lsn>,
    /// Incarnations that ended, and where: `(incarnation, exclusive end)`.
    pub history: Vec<(u64, Lsn)>,
    /// An unfinished seed: until `last >= end`.
    pub seed: Option<SeedState>,
    /// A write or sync failed: nothing is accepted until the store is opened
    /// again; old points can still be read.
    pub failed: Option<String>,
    /// Bytes of segments and index runs.
    pub stored_bytes: u64,
}

/// A copy of the disks that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeedState {
    /// No usable point exists yet; blocks that are zero may be omitted.
    pub first: bool,
    /// Where the copies are ordered.
    pub s: Lsn,
    /// The state is consistent from here on; None: not all is copied yet.
    pub end: Option<Lsn>,
    /// All of lower disks, and of this disk below this byte, is durable.
    pub cursor: (u32, u64),
}

/// A writable copy of the disks at a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drill {
    /// Its name: also in export names, `drill.<id>.<disk>`.
    pub id: Name,
    /// The group.
    pub group: Name,
    /// Where it started.
    pub point: Point,
    /// When, microseconds since 1970.
    pub created_us: u64,
}

/// Why the store or a group cannot be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error("{0} is in use by another process")]
    Busy(PathBuf),
    /// There is no store.
    #[error("{0} is not a target's store; `standfast target init` makes one")]
    Missing(PathBuf),
    /// There is one already.
    #[error("{0} is a target's store already")]
    Exists(PathBuf),
    /// Written by a newer version.
    #[error("{path} has version {found}; this program understands up to {known}: use a newer one")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest understood.
        known: u32,
    },
    /// A file is not what was written.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The name is taken.
    #[error("group {0} exists already")]
    GroupExists(Name),
    /// No such group.
    #[error("there is no group {0}")]
    NoGroup(Name),
    /// No such disk.
    #[error("group {0} has no disk {1}")]
    NoDisk(Name, String),
    /// No such drill.
    #[error("there is no drill {0}")]
    NoDrill(String),
    /// The description of a group makes no sense.
    #[error("{0}")]
    Invalid(&'static str),
    /// No such point.
    #[error(transparent)]
    Point(#[from] PointError),
    /// The system failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An earlier failure is final until the store is opened again.
    #[error("an earlier write or sync failed: {0}")]
    Failed(String),
}

impl StoreError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }

    /// The disk is full: nothing was changed, try again when there is space.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }
}

/// Why frames are not accepted. Nothing of the call has an effect then.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// The stream does not continue where the store ends.
    #[error("the stream continues at {found}, but the store ends at {expected}")]
    Gap {
        /// Where the next epoch must start.
        expected: Lsn,
        /// Where it starts.
        found: Lsn,
    },
    /// The writer is of another generation (fenced if older).
    #[error("generation {found} may not write; the group is at generation {current}")]
    Generation {
        /// Of the frame.
        found: u64,
        /// Of the group.
        current: u64,
    },
    /// The incarnation went back.
    #[error("incarnation {found} is older than {current}")]
    Incarnation {
        /// Of the frame.
        found: u64,
        /// Of the group.
        current: u64,
    },
    /// No seed has begun, or none is under way.
    #[error("no seed is under way")]
    NoSeed,
    /// The frames are not what the protocol says.
    #[error("bad frame: {0}")]
    Invalid(&'static str),
    /// The target's file system is full; retry later.
    #[error("the target's file system is full")]
    Full,
    /// A write or sync failed; final until the store is opened again.
    #[error("the group's store failed: {0}")]
    Failed(String),
}

/// The whole store. Only one process has it open.
#[derive(Debug)]
pub struct Store {}

impl Store {
    /// Makes an empty store in `dir` (created if missing) and opens it.
    pub fn create(
        _files: Arc<dyn Files>,
        dir: &Path,
        _clock: Arc<dyn Clock>,
    ) -> Result<Self, StoreError> {
        Err(StoreError::Exists(dir.to_owned()))
    }

    /// Opens the store in `dir`, repairs what a crash left, takes the lock.
    pub fn open(
        _files: Arc<dyn Files>,
        dir: &Path,
        _clock: Arc<dyn Clock>,
    ) -> Result<Self, StoreError> {
        Err(StoreError::Missing(dir.to_owned()))
    }

    /// Adds an empty group, durably.
    pub fn create_group(&self, meta: GroupMeta) -> Result<Arc<GroupStore>, StoreError> {
        Err(StoreError::GroupExists(meta.group))
    }

    /// A group.
    pub fn group(&self, _name: &Name) -> Option<Arc<GroupStore>> {
        None
    }

    /// All groups, by name.
    pub fn groups(&self) -> Vec<(Name, Arc<GroupStore>)> {
        Vec::new()
    }

    /// Deletes a group and its history, durably. Its sessions and exports must be
    /// closed first; views that are still open fail.
    pub fn forget(&self, name: &Name) -> Result<(), StoreError> {
        Err(StoreError::NoGroup(name.clone()))
    }

    /// Starts a drill at a point of a group, durably.
    pub fn start_drill(&self, group: &Name, _point: &Point) -> Result<Drill, StoreError> {
        Err(StoreError::NoGroup(group.clone()))
    }

    /// All drills.
    pub fn drills(&self) -> Vec<Drill> {
        Vec::new()
    }

    /// Ends a drill and deletes what was written in it. Its exports fail from then on.
    pub fn finish_drill(&self, id: &Name) -> Result<(), StoreError> {
        Err(StoreError::NoDrill(id.to_string()))
    }

    /// One disk of a drill, writable; all callers share one branch.
    pub fn drill_export(&self, id: &Name, _disk: &Name) -> Result<Arc<dyn Export>, StoreError> {
        Err(StoreError::NoDrill(id.to_string()))
    }

    /// Background work of all groups, one step each; returns whether there was
    /// any. Call it every second or so from a thread of its own.
    pub fn maintain(&self) -> Result<bool, StoreError> {
        Ok(false)
    }
}
