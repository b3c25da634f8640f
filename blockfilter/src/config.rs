//! What a group is made of, as kept in `DIR/groups/GROUP/group.json`, and where
//! its files are. Written by the agent at protect time, read by the filter, the
//! replicator and the FUSE front end.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::engine::{Files, read_file, replace_file};
use crate::names::Name;

/// One protected disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Its name in the group.
    pub disk: Name,
    /// The backing file or block device, absolute.
    pub path: PathBuf,
    /// Random id, given at protect time.
    pub uuid: Uuid,
    /// Size in bytes at protect time.
    pub size_bytes: u64,
}

/// One group: disks that share a journal, and so one order of writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupConfig {
    /// Its name.
    pub group: Name,
    /// Random id, given at protect time.
    pub uuid: Uuid,
    /// The disks; the position in this list is the index used in records.
    pub disks: Vec<DiskConfig>,
    /// The journal file, absolute.
    pub journal: PathBuf,
    /// Size of the journal file in bytes.
    pub journal_bytes: u64,
    /// Chunk size in bytes.
    pub chunk_bytes: u64,
    /// Size of the arena in bytes: a multiple of the chunk size, at least two chunks.
    pub arena_bytes: u64,
    /// Folder in which the disks appear as files.
    pub fuse: Option<PathBuf>,
}

impl GroupConfig {
    /// Reads `group.json` of the group in `dir`.
    pub fn load(files: &dyn Files, paths: &GroupPaths) -> io::Result<Self> {
        let text = read_file(files, &paths.config(), CONFIG_MAX)?;
        serde_json::from_slice(&text).map_err(|e| {
            let message = format!("{} is damaged: {e}", paths.config().display());
            io::Error::new(io::ErrorKind::InvalidData, message)
        })
    }

    /// Replaces `group.json`, durably.
    pub fn store(&self, files: &dyn Files, paths: &GroupPaths) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        replace_file(files, &paths.config(), &text)
    }

    /// The index of a disk.
    pub fn disk_index(&self, disk: &Name) -> Option<u8> {
        self.disks.iter().position(|d| &d.disk == disk).map(|i| i as u8)
    }

    /// The arena's file on tmpfs.
    pub fn arena_path(&self) -> PathBuf {
        Path::new("/dev/shm").join(format!("standfast-{}", self.uuid.simple()))
    }

    /// The NBD export name of a disk: `GROUP.DISK`.
    pub fn export(&self, disk: &Name) -> String {
        format!("{}.{disk}", self.group)
    }
}

/// Where the files of one group are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupPaths {
    dir: PathBuf,
}

impl GroupPaths {
    /// Of `group` below the state directory `dir`.
    pub fn new(dir: &Path, group: &Name) -> Self {
        Self { dir: dir.join("groups").join(group.as_str()) }
    }

    /// The group's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.join("group.json")
    }

    /// The journal's usual place.
    pub fn journal(&self) -> PathBuf {
        self.dir.join("journal")
    }

    /// The filter's control socket ([`crate::control`]).
    pub fn filter_socket(&self) -> PathBuf {
        short_socket(self.dir.join("filter.sock"))
    }

    /// The filter's NBD socket.
    pub fn nbd_socket(&self) -> PathBuf {
        short_socket(self.dir.join("nbd.sock"))
    }

    /// The replicator's status socket.
    pub fn replicator_socket(&self) -> PathBuf {
        short_socket(self.dir.join("replicator.sock"))
    }
}

/// A socket's path is at most 107 bytes; a longer one becomes a hashed path in
/// `/run/standfast` (or `/tmp` where that cannot be made).
pub fn short_socket(path: PathBuf) -> PathBuf {
    if path.as_os_str().len() <= SOCKET_PATH_MAX {
        return path;
    }
    let id = Uuid::new_v5(&Uuid::NAMESPACE_URL, path.as_os_str().as_encoded_bytes());
    let dir = Path::new("/run/standfast");
    let dir = if std::fs::create_dir_all(dir).is_ok() { dir } else { Path::new("/tmp") };
    dir.join(format!("{}.sock", id.simple()))
}

/// sockaddr_un.sun_path less its terminating zero.
pub const SOCKET_PATH_MAX: usize = 107;
const CONFIG_MAX: u64 = 1 << 20;
