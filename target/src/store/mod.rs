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
use std::time::Duration;

use blockfilter::block::Export;
use blockfilter::engine::{Clock, File, Files, Open, make_dir, no_space, read_file, replace_file};
use blockfilter::journal::format::DISKS_MAX;
use blockfilter::names::{Lsn, Name};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::branch::{Branch, BranchDisk};
use crate::points::{Point, PointError};

mod base;
pub mod format;
pub(crate) mod group;
pub(crate) mod index;
pub(crate) mod ingest;
mod inspect;
pub(crate) mod log;
pub(crate) mod manifest;
pub(crate) mod segment;
pub(crate) mod writer;

use format::{FormatError, STORE_VERSION};
use manifest::DrillRef;

pub use group::GroupStore;
pub use inspect::inspect;
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
    #[error("{0} is in use by another process, also after {s} s", s = LOCK_WAIT_US / 1_000_000)]
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

    pub(crate) fn format(path: &Path, error: FormatError) -> Self {
        match error {
            FormatError::Newer(found) => {
                Self::Newer { path: path.to_owned(), found, known: STORE_VERSION }
            }
            other => Self::damaged(path, other.to_string()),
        }
    }

    /// The disk is full, or a quota or the largest file is reached: nothing was changed, try again when there is space.
    pub fn is_full(&self) -> bool {
        let full = |e: &io::Error| no_space(e) || e.kind() == io::ErrorKind::FileTooLarge;
        matches!(self, Self::Io { source, .. } if full(source))
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
pub struct Store {
    files: Arc<dyn Files>,
    dir: PathBuf,
    clock: Arc<dyn Clock>,
    /// Holds the flock until the store is dropped.
    _lock: Arc<dyn File>,
    groups: RwLock<BTreeMap<Name, Arc<GroupStore>>>,
    unreadable: Vec<(Name, StoreError)>,
    branches: Mutex<BTreeMap<Name, Arc<Branch>>>,
    /// Groups and drills are made and removed one at a time.
    admin: Mutex<()>,
}

/// `STORE`.
#[derive(Debug, Serialize, Deserialize)]
struct StoreFile {
    format: String,
    version: u32,
}

impl Store {
    /// Makes an empty store in `dir` (created if missing) and opens it.
    pub fn create(
        files: Arc<dyn Files>,
        dir: &Path,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, StoreError> {
        let path = dir.join(STORE);
        if files.exists(&path) {
            return Err(StoreError::Exists(dir.to_owned()));
        }
        let groups = dir.join(GROUPS);
        make_dir(files.as_ref(), &groups).map_err(StoreError::io(&groups))?;
        let lock = take_lock(files.as_ref(), dir, clock.as_ref())?;
        let store = StoreFile { format: FORMAT.to_owned(), version: STORE_VERSION };
        let text =
            serde_json::to_vec(&store).map_err(|e| StoreError::damaged(&path, e.to_string()))?;
        replace_file(files.as_ref(), &path, &text).map_err(StoreError::io(&path))?;
        drop(lock);
        Self::open(files, dir, clock)
    }

    /// Opens the store in `dir`, repairs what a crash left, takes the lock.
    pub fn open(
        files: Arc<dyn Files>,
        dir: &Path,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, StoreError> {
        let path = dir.join(STORE);
        if !files.exists(&path) {
            return Err(StoreError::Missing(dir.to_owned()));
        }
        let text =
            read_file(files.as_ref(), &path, STORE_FILE_MAX).map_err(StoreError::io(&path))?;
        let store: StoreFile =
            serde_json::from_slice(&text).map_err(|e| StoreError::damaged(&path, e.to_string()))?;
        if store.format != FORMAT {
            return Err(StoreError::Missing(dir.to_owned()));
        }
        if store.version > STORE_VERSION {
            let (found, known) = (store.version, STORE_VERSION);
            return Err(StoreError::Newer { path, found, known });
        }
        let lock = take_lock(files.as_ref(), dir, clock.as_ref())?;
        let mut this = Self {
            files,
            dir: dir.to_owned(),
            clock,
            _lock: lock,
            groups: RwLock::default(),
            unreadable: Vec::new(),
            branches: Mutex::default(),
            admin: Mutex::default(),
        };
        this.open_groups()?;
        Ok(this)
    }

    fn open_groups(&mut self) -> Result<(), StoreError> {
        let dir = self.dir.join(GROUPS);
        for entry in self.files.list(&dir).map_err(StoreError::io(&dir))? {
            let path = dir.join(&entry);
            if entry.ends_with(MAKING) || entry.ends_with(DELETING) {
                let _ = self.files.remove_dir_all(&path);
                continue;
            }
            let Ok(name) = entry.parse::<Name>() else { continue };
            match self.open_group(&path) {
                Ok(group) => {
                    self.groups_mut().insert(name, group);
                }
                Err(newer @ StoreError::Newer { .. }) => return Err(newer),
                Err(error) => {
                    tracing::error!(group = %name, %error, "the group cannot be opened");
                    self.unreadable.push((name, error));
                }
            }
        }
        Ok(())
    }

    fn open_group(&self, dir: &Path) -> Result<Arc<GroupStore>, StoreError> {
        let (env, writer, points) =
            writer::Writer::open(Arc::clone(&self.files), dir, Arc::clone(&self.clock))?;
        Ok(Arc::new(GroupStore::new(env, writer, points)))
    }

    fn groups_mut(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<Name, Arc<GroupStore>>> {
        self.groups.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Groups that are there but cannot be opened, and why.
    pub fn unreadable(&self) -> &[(Name, StoreError)] {
        &self.unreadable
    }

    /// Adds an empty group, durably.
    pub fn create_group(&self, meta: GroupMeta) -> Result<Arc<GroupStore>, StoreError> {
        let _one = lock(&self.admin);
        check_meta(&meta)?;
        let name = meta.group.clone();
        let groups = self.dir.join(GROUPS);
        let dir = groups.join(name.as_str());
        if self.group(&name).is_some() || self.files.exists(&dir) {
            return Err(StoreError::GroupExists(name));
        }
        let making = groups.join(format!("{name}{MAKING}"));
        if self.files.exists(&making) {
            self.files.remove_dir_all(&making).map_err(StoreError::io(&making))?;
        }
        self.files.create_dir_all(&making).map_err(StoreError::io(&making))?;
        writer::Writer::create(self.files.as_ref(), &making, meta)?;
        self.files.rename(&making, &dir).map_err(StoreError::io(&dir))?;
        self.files.sync_dir(&groups).map_err(StoreError::io(&groups))?;
        let group = self.open_group(&dir)?;
        self.groups_mut().insert(name, Arc::clone(&group));
        Ok(group)
    }

    /// A group.
    pub fn group(&self, name: &Name) -> Option<Arc<GroupStore>> {
        self.groups.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All groups, by name.
    pub fn groups(&self) -> Vec<(Name, Arc<GroupStore>)> {
        let groups = self.groups.read().unwrap_or_else(PoisonError::into_inner);
        groups.iter().map(|(name, group)| (name.clone(), Arc::clone(group))).collect()
    }

    /// Deletes a group, its drills and its history, durably. Open views of it fail.
    pub fn forget(&self, name: &Name) -> Result<(), StoreError> {
        let _one = lock(&self.admin);
        let group = self.group(name).ok_or_else(|| StoreError::NoGroup(name.clone()))?;
        for (drill, _) in group.drills() {
            self.close_branch(&drill.id);
        }
        let dir = group.close();
        self.groups_mut().remove(name);
        let groups = self.dir.join(GROUPS);
        let deleting = groups.join(format!("{name}{DELETING}"));
        if self.files.exists(&deleting) {
            self.files.remove_dir_all(&deleting).map_err(StoreError::io(&deleting))?;
        }
        self.files.rename(&dir, &deleting).map_err(StoreError::io(&dir))?;
        self.files.sync_dir(&groups).map_err(StoreError::io(&groups))?;
        self.files.remove_dir_all(&deleting).map_err(StoreError::io(&deleting))
    }

    /// Starts a drill at a point of a group, durably.
    pub fn start_drill(&self, group: &Name, point: &Point) -> Result<Drill, StoreError> {
        let _one = lock(&self.admin);
        let store = self.group(group).ok_or_else(|| StoreError::NoGroup(group.clone()))?;
        store.view(0, point)?;
        let taken: Vec<Name> = self.drills().into_iter().map(|d| d.id).collect();
        let mut number = store.next_drill();
        let id = loop {
            let id = drill_name(store.meta(), number);
            if !taken.contains(&id) {
                break id;
            }
            number = number.wrapping_add(1);
        };
        let created_us = self.clock.wall_us();
        Branch::create(&store.env, &id)?;
        let drill = DrillRef { id: id.clone(), era: point.era, lsn: point.lsn, created_us };
        store.set_drill(&id, Some(drill))?;
        Ok(Drill { id, group: group.clone(), point: point.clone(), created_us })
    }

    /// All drills.
    pub fn drills(&self) -> Vec<Drill> {
        let all = self.groups().into_iter().flat_map(|(group, store)| {
            store.drills().into_iter().map(move |(d, point)| Drill {
                id: d.id,
                group: group.clone(),
                point,
                created_us: d.created_us,
            })
        });
        all.collect()
    }

    /// Ends a drill and deletes what was written in it. Its exports fail from then on.
    pub fn finish_drill(&self, id: &Name) -> Result<(), StoreError> {
        let _one = lock(&self.admin);
        let (drill, store) = self.find_drill(id)?;
        self.close_branch(id);
        store.set_drill(id, None)?;
        let dir = store.env.dir.join("drills").join(drill.id.as_str());
        self.files.remove_dir_all(&dir).map_err(StoreError::io(&dir))
    }

    fn find_drill(&self, id: &Name) -> Result<(Drill, Arc<GroupStore>), StoreError> {
        let drill = self.drills().into_iter().find(|d| &d.id == id);
        let drill = drill.ok_or_else(|| StoreError::NoDrill(id.to_string()))?;
        let store =
            self.group(&drill.group).ok_or_else(|| StoreError::NoGroup(drill.group.clone()))?;
        Ok((drill, store))
    }

    fn close_branch(&self, id: &Name) {
        if let Some(branch) = lock(&self.branches).remove(id) {
            branch.close();
        }
    }

    /// One disk of a drill, writable; all callers share one branch.
    pub fn drill_export(&self, id: &Name, disk: &Name) -> Result<Arc<dyn Export>, StoreError> {
        let _one = lock(&self.admin);
        let (drill, store) = self.find_drill(id)?;
        let index = store.disk_index(disk);
        let index =
            index.ok_or_else(|| StoreError::NoDisk(drill.group.clone(), disk.to_string()))?;
        let mut branches = lock(&self.branches);
        let branch = match branches.get(id) {
            Some(branch) => Arc::clone(branch),
            None => {
                let branch = Arc::new(Branch::open(&store.env, id)?);
                branches.insert(id.clone(), Arc::clone(&branch));
                branch
            }
        };
        let view = store.view(index, &drill.point)?;
        Ok(Arc::new(BranchDisk::new(branch, view, format!("drill {id} of {}", drill.group))))
    }

    /// Background work of all groups, one step each; returns whether there was
    /// any. Call it every second or so from a thread of its own.
    pub fn maintain(&self) -> Result<bool, StoreError> {
        let (mut worked, mut failed) = (false, None);
        for (_, group) in self.groups() {
            match group.maintain() {
                Ok(some) => worked |= some,
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(worked), Err)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// I20: one process has the store. A simulated file has no descriptor to lock. A
/// process that was killed has it until its last I/O is over, so it is waited for.
fn take_lock(
    files: &dyn Files,
    dir: &Path,
    clock: &dyn Clock,
) -> Result<Arc<dyn File>, StoreError> {
    let path = dir.join(LOCK);
    let file = files.open(&path, Open::Create).map_err(StoreError::io(&path))?;
    let Some(fd) = file.fd() else { return Ok(file) };
    let deadline = clock.mono_us() + LOCK_WAIT_US;
    loop {
        match rustix::fs::flock(fd, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if clock.mono_us() < deadline => {
                std::thread::sleep(LOCK_RETRY);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StoreError::Busy(dir.to_owned())),
            Err(error) => return Err(StoreError::Io { path, source: error.into() }),
        }
    }
    Ok(file)
}

fn check_meta(meta: &GroupMeta) -> Result<(), StoreError> {
    let disks = meta.disks.len();
    if disks == 0 || disks > DISKS_MAX {
        return Err(StoreError::Invalid("a group has 1 to 32 disks"));
    }
    let names: std::collections::BTreeSet<&Name> = meta.disks.iter().map(|d| &d.disk).collect();
    if names.len() != disks {
        return Err(StoreError::Invalid("two disks of the group have the same name"));
    }
    if meta.disks.iter().any(|d| d.size_bytes == 0 || d.size_bytes > DISK_SIZE_MAX) {
        return Err(StoreError::Invalid("a disk has more than 0 bytes and at most 4 PiB"));
    }
    Ok(())
}

/// Short, the same for ever, and in practice different for any two drills.
fn drill_name(meta: &GroupMeta, number: u32) -> Name {
    let hash = Uuid::new_v5(&meta.uuid, format!("drill {number}").as_bytes());
    let text = format!("d{}", &hash.simple().to_string()[..8]);
    text.parse().expect("hexadecimal digits are a name")
}

const STORE: &str = "STORE";
const LOCK: &str = "store.lock";
const GROUPS: &str = "groups";
const FORMAT: &str = "standfast-store";
/// A group's folder while it is made, and while it is deleted; not names of groups.
const MAKING: &str = ".new";
const DELETING: &str = ".deleted";
const STORE_FILE_MAX: u64 = 4096;
const LOCK_WAIT_US: u64 = 5_000_000;
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// Block numbers have 40 bits.
const DISK_SIZE_MAX: u64 = 1 << 52;

#[cfg(test)]
mod tests;
