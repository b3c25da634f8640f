//! Whether a file or block device can be put under protection.
//!
//! A disk is taken only if nobody else uses it: no `flock` of ours, no record
//! lock (qemu's image locks), no loop device on it, no mount, no O_EXCL holder
//! of a block device. Every check opens the file read-only or changes nothing;
//! what was locked to find out is unlocked again. This runs before the filter
//! takes its own lock, which is what excludes a second writer afterwards.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use blockfilter::block::SECTOR;
use blockfilter::engine::File as _;
use blockfilter::engine::real::RealFile;
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::errors::{Exit, Failure};

/// A disk that may be protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Absolute, without symbolic links.
    pub path: PathBuf,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What tells two paths to one file apart from two files.
    pub identity: Identity,
}

/// A file's or device's identity on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// Device and inode of a regular file.
    File(u64, u64),
    /// Device number of a block device.
    Device(u64),
}

/// Why a disk cannot be protected.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// No such file.
    #[error("it does not exist")]
    Missing,
    /// A folder, a socket …
    #[error("it is neither a regular file nor a block device")]
    NotADisk,
    /// Nothing in it.
    #[error("it is empty")]
    Empty,
    /// Not a multiple of the sector size.
    #[error("its size of {0} bytes is not a multiple of {SECTOR}")]
    OddSize(u64),
    /// Someone uses it.
    #[error("{0}")]
    Busy(String),
    /// The system failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl BackingError {
    /// As a failure of the command that wanted the disk at `path`.
    pub fn failure(&self, path: &Path) -> Failure {
        let what = format!("{} cannot be protected", path.display());
        let coded = |exit, number| Failure::coded(exit, number, what.clone()).why(self.to_string());
        match self {
            Self::Missing => {
                coded(Exit::NotFound, 11).hint("give the path of an existing disk image or device")
            }
            Self::NotADisk => {
                coded(Exit::WrongState, 11).hint("give a raw disk image or a block device")
            }
            Self::Empty => coded(Exit::WrongState, 12)
                .hint(format!("give it a size first: truncate -s 10G {}", path.display())),
            Self::OddSize(size) => coded(Exit::WrongState, 13).hint(format!(
                "round it up: truncate -s {} {}",
                size.next_multiple_of(SECTOR),
                path.display()
            )),
            Self::Busy(_) => coded(Exit::Busy, 11)
                .hint("stop what uses it; from then on use the disk through standfast"),
            Self::Io(error) => Failure::io(what, error),
        }
    }
}

/// Checks everything about `path`.
pub fn inspect(path: &Path) -> Result<Backing, BackingError> {
    let path = match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(BackingError::Missing),
        other => other?,
    };
    let metadata = std::fs::metadata(&path)?;
    let identity = identity(&metadata).ok_or(BackingError::NotADisk)?;
    let device = matches!(identity, Identity::Device(_));
    let flags = if device { OFlags::EXCL.bits() as i32 } else { 0 };
    let mut options = std::fs::OpenOptions::new();
    let file = match options.read(true).write(true).custom_flags(flags).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            let users = "it is in use (mounted, swap, part of a volume, or open elsewhere)";
            return Err(BackingError::Busy(users.into()));
        }
        other => other?,
    };
    let size_bytes = check_size(&file)?;
    check_locks(&file)?;
    check_loops(&path, identity)?;
    check_mounts(identity)?;
    Ok(Backing { path, size_bytes, identity })
}

/// The identity of what `path` leads to, if it is a disk that exists.
pub fn identity_of(path: &Path) -> Option<Identity> {
    std::fs::metadata(path).ok().as_ref().and_then(identity)
}

fn identity(metadata: &Metadata) -> Option<Identity> {
    if metadata.file_type().is_block_device() {
        Some(Identity::Device(metadata.rdev()))
    } else if metadata.is_file() {
        Some(Identity::File(metadata.dev(), metadata.ino()))
    } else {
        None
    }
}

fn check_size(file: &File) -> Result<u64, BackingError> {
    match RealFile::new(file.try_clone()?)?.len()? {
        0 => Err(BackingError::Empty),
        size if !size.is_multiple_of(SECTOR) => Err(BackingError::OddSize(size)),
        size => Ok(size),
    }
}

/// Our own lock and record locks: qemu's are open-file-description locks on
/// single bytes, with which a record lock on the whole file collides.
fn check_locks(file: &File) -> Result<(), BackingError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => drop(rustix::fs::flock(file, FlockOperation::Unlock)),
        Err(Errno::WOULDBLOCK) => {
            let who = "another process holds a lock on it (already protected or exported?)";
            return Err(BackingError::Busy(who.into()));
        }
        Err(error) => return Err(BackingError::Io(error.into())),
    }
    match rustix::fs::fcntl_lock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => drop(rustix::fs::fcntl_lock(file, FlockOperation::Unlock)),
        Err(Errno::ACCESS | Errno::AGAIN) => {
            let who = "another process holds a record lock on it (a running virtual machine?)";
            return Err(BackingError::Busy(who.into()));
        }
        Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {}
        Err(error) => return Err(BackingError::Io(error.into())),
    }
    Ok(())
}

/// A loop device on the file, by identity and by path.
fn check_loops(path: &Path, identity: Identity) -> Result<(), BackingError> {
    match loop_on(path, Some(identity)) {
        Some(device) => Err(BackingError::Busy(format!("{device} is a loop device on it"))),
        None => Ok(()),
    }
}

/// The loop device on a file, if there is one. Without an identity only the
/// path is compared and the file is not touched (it may be a FUSE file whose
/// server is gone).
pub fn loop_on(path: &Path, identity: Option<Identity>) -> Option<String> {
    for entry in std::fs::read_dir("/sys/block").ok()?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("loop") {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(entry.path().join("loop/backing_file")) else {
            continue;
        };
        let backing = Path::new(text.trim_end_matches('\n'));
        if backing == path || (identity.is_some() && identity_of(backing) == identity) {
            return Some(format!("/dev/{name}"));
        }
    }
    None
}

/// A process that has a file in `dir` open or works there: `fio (process 12)`.
pub fn user_of(dir: &Path) -> Option<String> {
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let open = std::fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
        let links = open.map(|fd| fd.path()).chain([entry.path().join("cwd")]);
        let inside = |link: PathBuf| std::fs::read_link(link).is_ok_and(|to| to.starts_with(dir));
        if pid != std::process::id() && links.into_iter().any(inside) {
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            return Some(format!("{} (process {pid})", name.trim()));
        }
    }
    None
}

/// A mount of the device itself (O_EXCL finds those of other name spaces).
fn check_mounts(identity: Identity) -> Result<(), BackingError> {
    let Identity::Device(device) = identity else { return Ok(()) };
    let Ok(text) = std::fs::read_to_string("/proc/self/mountinfo") else { return Ok(()) };
    match mounted_at(&text, device) {
        Some(place) => Err(BackingError::Busy(format!("it is mounted on {place}"))),
        None => Ok(()),
    }
}

/// Where a device is mounted, from `/proc/self/mountinfo`.
fn mounted_at(mountinfo: &str, device: u64) -> Option<&str> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let number = format!("{major}:{minor}");
    mountinfo.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        (fields.next()? == number).then(|| fields.nth(1)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_empty_odd_and_wrong_kinds_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        assert!(matches!(inspect(&image), Err(BackingError::Missing)));
        assert!(matches!(inspect(dir.path()), Err(BackingError::NotADisk)));
        let file = File::create(&image).unwrap();
        assert!(matches!(inspect(&image), Err(BackingError::Empty)));
        file.set_len(1000).unwrap();
        assert!(matches!(inspect(&image), Err(BackingError::OddSize(1000))));
        file.set_len(1024).unwrap();
        let backing = inspect(&image).unwrap();
        assert_eq!(backing.size_bytes, 1024);
        let link = dir.path().join("link");
        std::fs::hard_link(&image, &link).unwrap();
        assert_eq!(identity_of(&link), Some(backing.identity));
    }

    #[test]
    fn a_locked_file_is_busy_and_looking_does_not_lock() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let file = File::create(&image).unwrap();
        file.set_len(4096).unwrap();
        inspect(&image).unwrap();
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).unwrap();
        assert!(matches!(inspect(&image), Err(BackingError::Busy(_))));
        drop(file);
        inspect(&image).unwrap();
    }

    #[test]
    fn a_mount_is_found_by_its_device_number() {
        let text =
            "22 1 254:0 / / rw - ext4 /dev/root rw\n36 22 7:3 / /mnt/a rw - ext4 /dev/loop3 rw\n";
        assert_eq!(mounted_at(text, rustix::fs::makedev(7, 3)), Some("/mnt/a"));
        assert_eq!(mounted_at(text, rustix::fs::makedev(7, 4)), None);
    }
}
