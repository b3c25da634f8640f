//! The one way to storage and to the clock.
//!
//! Everything durable goes through [`Files`] and [`File`]. [`real`] is Linux;
//! [`record`] is a file system in memory that knows what was synced and can
//! produce every state a power cut may leave, and injects faults. The journal's
//! engine (`uring`, `blocking`) moves the same files' bytes asynchronously.
//!
//! Errors are final for the file they happened on (decision 9): [`Latched`]
//! remembers the first failed write or sync, and every later write or sync of
//! that file reports it.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

pub mod blocking;
pub(crate) mod bulk;
pub mod cpu;
pub mod queue;
pub mod real;
pub mod record;
pub mod uring;
mod write_out;

/// Bytes that bulk work moves, or one larger piece, before it calls [`give_way`].
pub const TURN_BYTES: usize = 256 << 10;

/// Lets others have the processor, and gives up what is left of the slice. For bulk work on a
/// machine with clients, as long as it keeps up: Linux leaves a thread that computes alone until
/// its slice is used up, which is looked at every tick (4 ms at 250 Hz), and a client
/// that wakes up meanwhile waits. Beside others that compute all the time it gets much less than its
/// share (since Linux 6.18), so work that is behind must not call it.
pub fn give_way() {
    std::thread::yield_now();
}

/// Where time comes from. Pure parts take values, never the clock.
pub trait Clock: Send + Sync + Debug {
    /// Microseconds since some start, never going back.
    fn mono_us(&self) -> u64;
    /// Microseconds since 1970-01-01 UTC; may jump.
    fn wall_us(&self) -> u64;
}

/// One open file. All offsets and lengths are bytes. Calls are complete or
/// failed: short transfers and EINTR are looped over inside.
pub trait File: Send + Sync + Debug {
    /// Fills `buf`; past the end it is an `UnexpectedEof`.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Reads at most `buf.len()` bytes that are in memory already; `WouldBlock` if none are.
    fn read_nowait(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    /// Writes all of `data`. Durable only after a later successful sync.
    fn write_all_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Writes `parts` one behind the other from `offset`.
    fn write_vectored_at(&self, mut offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        for part in parts {
            self.write_all_at(offset, part)?;
            offset += part.len() as u64;
        }
        Ok(())
    }
    /// Writes all of `data`, which is durable on return; what was written before
    /// need not be.
    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all_at(offset, data)?;
        self.sync_data()
    }
    /// Starts writing what is in memory only of a range, and waits for it, where that can be: not durable. An error
    /// is a failed write, which a later sync may not tell again.
    fn write_out(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
    /// fdatasync: data and what is needed to read it back is durable.
    fn sync_data(&self) -> io::Result<()>;
    /// Length in bytes (of a block device: its size).
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Truncates or extends with a hole.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Allocates the range without changing what it reads as.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Deallocates where it can; the range reads as zeroes afterwards, always.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Next allocated range at or after `offset`: `(start, end)`, or None when
    /// only a hole is left. Valid for data that was synced first.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>>;
    /// A block device: it needs no space of a file system.
    fn is_device(&self) -> bool {
        false
    }
    /// Whether writing may need space that is not allocated yet.
    fn is_sparse(&self) -> io::Result<bool> {
        Ok(false)
    }
    /// The descriptor, for io_uring; None for a simulated file.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
}

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// Must exist.
    Read,
    /// Must exist.
    ReadWrite,
    /// Must not exist (O_EXCL).
    CreateNew,
    /// Created if missing, kept if not.
    Create,
    /// Must exist; large vectored writes may go past the page cache.
    Disk,
    /// Must exist; O_DIRECT where the file system takes it.
    Direct,
}

/// A file system. Names made or removed are durable after [`Files::sync_dir`].
pub trait Files: Send + Sync + Debug {
    /// Opens a file.
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>>;
    /// Replaces `to` by `from`, atomically.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes a folder and its missing parents.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Removes a folder with everything in it.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Names (last part only) in a folder, sorted.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Makes the names in `dir` durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Whether the path exists.
    fn exists(&self, path: &Path) -> bool;
    /// Whether holes of files here are holes (ruling 20): ext4, xfs, btrfs, tmpfs.
    fn holes_are_true(&self, _path: &Path) -> bool {
        true
    }
    /// Bytes free for us on the file system that holds `path`.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
}

/// Makes a folder and its missing parents; their names are durable on return.
pub fn make_dir(files: &dyn Files, path: &Path) -> io::Result<()> {
    let missing = path.ancestors().take_while(|p| !files.exists(p)).count();
    files.create_dir_all(path)?;
    // The last name even if it was there: its maker may have died before this.
    path.ancestors().skip(1).take(missing.max(1)).try_for_each(|dir| match dir.as_os_str() {
        name if name.is_empty() => files.sync_dir(Path::new(".")),
        _ => files.sync_dir(dir),
    })
}

/// Writes `data` to `path` so that after a crash either the old or the new
/// content is there: temporary file, sync, rename, sync of the folder.
pub fn replace_file(files: &dyn Files, path: &Path, data: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    if files.exists(&temporary) {
        files.remove(&temporary)?;
    }
    let file = files.open(&temporary, Open::CreateNew)?;
    file.write_all_at(0, data)?;
    file.sync_data()?;
    files.rename(&temporary, path)?;
    match path.parent() {
        Some(dir) => files.sync_dir(dir),
        None => Ok(()),
    }
}

/// Reads a whole file of at most `max` bytes.
pub fn read_file(files: &dyn Files, path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let file = files.open(path, Open::Read)?;
    let len = file.len()?;
    if len > max {
        let message = format!("{} is {len} bytes; at most {max} are expected", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut data = vec![0; len as usize];
    file.read_exact_at(0, &mut data)?;
    Ok(data)
}

/// The file system, or our share of it, is full.
pub fn no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A file whose first failed write or sync is remembered for ever (decision 9).
#[derive(Debug)]
pub struct Latched {
    inner: Arc<dyn File>,
    failed: OnceLock<io::ErrorKind>,
    full_is_final: bool,
    /// One sync at a time: of two at once Linux tells only one of a failed write-back.
    syncing: Mutex<()>,
}

impl Latched {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn File>) -> Self {
        Self { inner, failed: OnceLock::new(), full_is_final: true, syncing: Mutex::new(()) }
    }

    /// As [`Latched::new`], but a write that found no space may be tried again (ruling 6).
    pub fn retried_when_full(inner: Arc<dyn File>) -> Self {
        Self { full_is_final: false, ..Self::new(inner) }
    }

    /// The first failure, if there was one.
    pub fn failure(&self) -> Option<io::ErrorKind> {
        self.failed.get().copied()
    }

    fn guard<T>(
        &self,
        full_is_final: bool,
        act: impl FnOnce(&dyn File) -> io::Result<T>,
    ) -> io::Result<T> {
        if let Some(kind) = self.failed.get() {
            return Err(io::Error::new(*kind, "an earlier write or sync of this file failed"));
        }
        act(self.inner.as_ref()).inspect_err(|error| {
            if full_is_final || !no_space(error) {
                let _ = self.failed.set(error.kind());
            }
        })
    }
}

impl File for Latched {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact_at(offset, buf)
    }
    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read_nowait(offset, buf)
    }
    fn write_all_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.guard(self.full_is_final, |f| f.write_all_at(offset, data))
    }
    fn write_vectored_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.guard(self.full_is_final, |f| f.write_vectored_at(offset, parts))
    }
    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.guard(true, |f| f.write_durable_at(offset, data))
    }
    fn write_out(&self, offset: u64, len: u64) -> io::Result<()> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.guard(true, |f| f.write_out(offset, len))
    }
    fn sync_data(&self) -> io::Result<()> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.guard(true, |f| f.sync_data())
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.guard(self.full_is_final, |f| f.set_len(len))
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.guard(self.full_is_final, |f| f.punch(offset, len))
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.inner.next_data(offset)
    }
    fn is_device(&self) -> bool {
        self.inner.is_device()
    }
    fn is_sparse(&self) -> io::Result<bool> {
        self.inner.is_sparse()
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }
}
