//! A plain file or block device as an [`Export`]: no journal, no protection.
//!
//! Owns: the descriptor and its lock. A writable open holds an exclusive
//! `flock` (of a device also O_EXCL), so a second one is refused while this
//! process, or I/O that a dead one left in flight, still has the file.
//! Durability: FLUSH and FUA are `fdatasync`; the first one that fails is
//! remembered, and every later write, FLUSH and FUA fails too (decision 9).

use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Advice, FallocateFlags, FlockOperation, OFlags};

use crate::block::{Errno, Export, ExportInfo, Extent, ZeroFlags};
use crate::engine::File;
use crate::engine::real::RealFile;

/// A file being served.
#[derive(Debug)]
pub struct FileExport {
    file: RealFile,
    size: u64,
    read_only: bool,
    /// SEEK_DATA tells the truth here once data is synced.
    seekable: bool,
    /// Something was written since the last successful sync.
    dirty: AtomicBool,
    /// One sync at a time: the kernel reports a failed one to one caller only.
    syncing: Mutex<()>,
    /// A sync failed: the file's content can no longer be promised.
    failed: AtomicBool,
    description: String,
}

/// Why a file cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It does not exist.
    #[error("{0} does not exist")]
    Missing(PathBuf),
    /// Somebody else has it open for writing, or the kernel uses the device.
    #[error(
        "{0} is in use: another process serves or protects it, or it is mounted; \
         stop that first, or use it read-only"
    )]
    Busy(PathBuf),
    /// Neither a regular file nor a block device.
    #[error("{0} is neither a regular file nor a block device")]
    Kind(PathBuf),
    /// A system call failed.
    #[error("cannot open {path}: {source}")]
    Io {
        /// What was opened.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl FileExport {
    /// Opens `path`, of any size in bytes.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, FileError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => FileError::Missing(path.to_owned()),
            io::ErrorKind::ResourceBusy => FileError::Busy(path.to_owned()),
            _ => FileError::Io { path: path.to_owned(), source },
        };
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(FileError::Kind(path.to_owned()));
        }
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(!read_only);
        if kind.is_block_device() && !read_only {
            options.custom_flags(OFlags::EXCL.bits() as i32);
        }
        let file = options.open(path).map_err(failed)?;
        if !read_only {
            let lock = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
            match lock {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(FileError::Busy(path.to_owned()));
                }
                Err(error) => return Err(failed(error.into())),
            }
        }
        let seekable = kind.is_file() && holes_are_reliable(&file);
        let file = RealFile::new(file).map_err(failed)?;
        let size = file.len().map_err(failed)?;
        Ok(Self {
            file,
            size,
            read_only,
            seekable,
            dirty: AtomicBool::new(false),
            syncing: Mutex::new(()),
            failed: AtomicBool::new(false),
            description: path.display().to_string(),
        })
    }

    fn sync(&self) -> Result<(), Errno> {
        let _turn = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        self.dirty.store(false, Ordering::SeqCst);
        self.file.sync_data().map_err(|error| {
            self.failed.store(true, Ordering::SeqCst);
            tracing::error!(%error, file = self.description, "fdatasync failed; no more writes");
            Errno::Io
        })
    }

    fn check(&self) -> Result<(), Errno> {
        if self.failed.load(Ordering::SeqCst) { Err(Errno::Io) } else { Ok(()) }
    }

    /// After a write, before it is answered: tells later syncs, or syncs now.
    fn written(&self, fua: bool) -> Result<(), Errno> {
        self.dirty.store(true, Ordering::SeqCst);
        if fua { self.sync() } else { Ok(()) }
    }

    /// False if the file system cannot do it quickly.
    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<bool, Errno> {
        use rustix::io::Errno as Sys;
        let Some(fd) = self.file.fd() else { return Ok(false) };
        loop {
            match rustix::fs::fallocate(fd, flags | FallocateFlags::KEEP_SIZE, offset, len) {
                Ok(()) => return Ok(true),
                Err(Sys::OPNOTSUPP | Sys::NODEV | Sys::NOSYS) => return Ok(false),
                Err(Sys::INTR) => {}
                Err(error) => return Err(Errno::from_io(&error.into())),
            }
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        const STEP: u64 = 1 << 20;
        let zeroes = vec![0; STEP.min(len) as usize];
        let mut done = 0;
        while done < len {
            let now = STEP.min(len - done);
            let part = &zeroes[..now as usize];
            self.file.write_all_at(offset + done, part).map_err(|e| Errno::from_io(&e))?;
            done += now;
        }
        Ok(())
    }
}

impl Export for FileExport {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: self.size,
            read_only: self.read_only,
            multi_conn: true,
            block_min: 1,
            block_preferred: 4096,
            fast_zero: !self.read_only,
            trim: !self.read_only,
            dirty_map: false,
            description: self.description.clone(),
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.file.read_exact_at(offset, buf).map_err(|e| Errno::from_io(&e))
    }

    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), Errno> {
        self.check()?;
        let result = self.file.write_all_at(offset, data).map_err(|e| Errno::from_io(&e));
        self.written(fua && result.is_ok())?;
        result
    }

    fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno> {
        self.check()?;
        let device = self.file.is_device();
        // A device told to zero a range without unmapping it may write it all.
        let done = match flags.no_hole {
            true if device => false,
            true => self.fallocate(FallocateFlags::ZERO_RANGE, offset, len)?,
            false => self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len)?,
        };
        if !done && flags.fast {
            return Err(Errno::NotSup);
        }
        let result = if done { Ok(()) } else { self.write_zeroes(offset, len) };
        self.written(flags.fua && result.is_ok())?;
        result
    }

    fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        self.zero(offset, len, ZeroFlags { no_hole: false, fast: false, fua })
    }

    fn flush(&self) -> Result<(), Errno> {
        if self.read_only { Ok(()) } else { self.sync() }
    }

    fn cache(&self, offset: u64, len: u64) -> Result<(), Errno> {
        if let (Some(fd), Some(len)) = (self.file.fd(), std::num::NonZeroU64::new(len)) {
            // Advice: failing to prefetch is no failure.
            let _ = rustix::fs::fadvise(fd, offset, Some(len), Advice::WillNeed);
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>, Errno> {
        let data = |len| Extent { len, hole: false, zero: false };
        let hole = |len| Extent { len, hole: true, zero: true };
        if !self.seekable {
            return Ok(vec![data(len)]);
        }
        // Dirty pages over a hole must be allocated before holes can be believed.
        if self.read_only || self.dirty.load(Ordering::SeqCst) {
            self.sync()?;
        }
        let end = offset + len;
        let (mut at, mut extents) = (offset, Vec::new());
        while at < end && extents.len() < max {
            let next = self.file.next_data(at).map_err(|e| Errno::from_io(&e))?;
            let (start, stop) = next.unwrap_or((end, end));
            let (start, stop) = (start.clamp(at, end), stop.min(end));
            if start > at {
                extents.push(hole(start - at));
                at = start;
                if extents.len() == max {
                    break;
                }
            }
            if stop > at {
                extents.push(data(stop - at));
                at = stop;
            } else if start < end {
                // The file changed between the two seeks: what is left may be data.
                extents.push(data(end - at));
                at = end;
            }
        }
        Ok(extents)
    }
}

/// Whether SEEK_HOLE can be believed after a sync (ruling 20).
fn holes_are_reliable(file: &std::fs::File) -> bool {
    const EXT4: u64 = 0xef53;
    const XFS: u64 = 0x5846_5342;
    const BTRFS: u64 = 0x9123_683e;
    const TMPFS: u64 = 0x0102_1994;
    let magic = rustix::fs::fstatfs(file).map(|s| s.f_type as u64);
    matches!(magic, Ok(EXT4 | XFS | BTRFS | TMPFS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(size: u64) -> (tempfile::TempDir, FileExport) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        let export = FileExport::open(&path, false).unwrap();
        (dir, export)
    }

    #[test]
    fn a_second_writable_open_is_refused_and_a_read_only_one_is_not() {
        let (dir, first) = export(5000);
        let path = dir.path().join("disk");
        assert!(matches!(FileExport::open(&path, false), Err(FileError::Busy(_))));
        let second = FileExport::open(&path, true).unwrap();
        first.write(4999, b"z", true).unwrap();
        let mut byte = [0];
        second.read(4999, &mut byte).unwrap();
        assert_eq!((byte[0], second.info().size), (b'z', 5000));
        drop(first);
        FileExport::open(&path, false).unwrap();
    }

    #[test]
    fn what_is_not_a_disk_is_refused_by_kind() {
        let dir = tempfile::tempdir().unwrap();
        let missing = FileExport::open(&dir.path().join("no"), false);
        assert!(matches!(missing, Err(FileError::Missing(_))));
        let kind = FileExport::open(dir.path(), true);
        assert!(matches!(kind, Err(FileError::Kind(_))));
    }

    #[test]
    fn trim_and_zero_read_back_as_zeroes_to_the_byte() {
        let (_dir, disk) = export(64 << 10);
        let flags = [
            ZeroFlags::default(),
            ZeroFlags { no_hole: true, ..ZeroFlags::default() },
            ZeroFlags { fua: true, ..ZeroFlags::default() },
        ];
        for flags in flags {
            disk.write(0, &[7; 64 << 10], false).unwrap();
            disk.zero(4097, 9001, flags).unwrap();
            disk.trim(30_000, 30_001, flags.fua).unwrap();
            let mut back = vec![1; 64 << 10];
            disk.read(0, &mut back).unwrap();
            for (at, byte) in back.iter().enumerate() {
                let zero = (4097..13_098).contains(&at) || (30_000..60_001).contains(&at);
                assert_eq!(*byte == 0, zero, "{at}");
            }
        }
    }

    #[test]
    fn extents_cover_the_range_and_never_call_data_a_hole() {
        let (_dir, disk) = export((1 << 20) + 100);
        disk.write(300_000, &[1; 100_000], false).unwrap();
        for (offset, len) in [(0, (1 << 20) + 100), (310_000, 10), (1 << 20, 100), (299_999, 2)] {
            let extents = disk.extents(offset, len, 64).unwrap();
            assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), len);
            let mut at = offset;
            for extent in extents {
                let overlaps = at < 400_000 && at + extent.len > 300_000;
                assert!(!(extent.hole && overlaps), "{extent:?} at {at}");
                at += extent.len;
            }
        }
        assert_eq!(disk.extents(0, 1 << 20, 1).unwrap().len(), 1);
    }
}
