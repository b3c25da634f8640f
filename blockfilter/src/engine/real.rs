//! Linux behind the [`Files`] and [`File`] traits, by plain system calls.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::{Clock, File, Files, Open};

/// The machine's clocks.
#[derive(Debug)]
pub struct RealClock {
    start: Instant,
}

impl RealClock {
    /// A clock whose monotonic time starts now.
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clock")]
    #[expect(clippy::new_without_default, reason = "reading the clock is not a default value")]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Clock for RealClock {
    fn mono_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clock")]
    fn wall_us(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
    }
}

/// A file or block device of this machine.
#[derive(Debug)]
pub struct RealFile {
    file: std::fs::File,
    device: bool,
    /// Opened with O_DIRECT: memory, offsets and lengths must be aligned.
    direct: bool,
    /// The same file with O_DIRECT, for large writes.
    aside: Option<Aside>,
}

/// A way past the page cache.
#[derive(Debug)]
struct Aside {
    file: std::fs::File,
    /// What is not aligned in memory is copied here first.
    scratch: Mutex<Vec<u8>>,
    /// The file takes memory at multiples of [`SECTOR`], not only of [`DIRECT_ALIGN`].
    sectors: AtomicBool,
}

/// Where bytes of a write past the page cache are.
enum Taken<'a> {
    Scratch(Range<usize>),
    Place(&'a [u8]),
}

impl RealFile {
    /// Takes an open file.
    pub fn new(file: std::fs::File) -> io::Result<Self> {
        let device = file.metadata()?.file_type().is_block_device();
        let direct = rustix::fs::fcntl_getfl(&file)?.contains(OFlags::DIRECT);
        Ok(Self { file, device, direct, aside: None })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        const STEP: u64 = 1 << 20;
        let zeroes = vec![0; STEP.min(len) as usize];
        let mut done = 0;
        while done < len {
            let now = STEP.min(len - done);
            self.file.write_all_at(&zeroes[..now as usize], offset + done)?;
            done += now;
        }
        Ok(())
    }
}

impl Aside {
    /// Offset and length in all are multiples of [`DIRECT_ALIGN`].
    fn write(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        if self.sectors.load(Ordering::Relaxed) {
            match self.write_from(offset, parts, SECTOR) {
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                    self.sectors.store(false, Ordering::Relaxed);
                }
                other => return other,
            }
        }
        self.write_from(offset, parts, DIRECT_ALIGN)
    }

    /// Large pieces that stand in memory as they will in the file, counted in `unit`s, are
    /// written from where they are; the rest is copied.
    fn write_from(&self, offset: u64, parts: &[&[u8]], unit: usize) -> io::Result<()> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        scratch.resize(SCRATCH + DIRECT_ALIGN, 0);
        let at = scratch.as_ptr().align_offset(DIRECT_ALIGN);
        let scratch = &mut scratch[at..at + SCRATCH];
        let (mut to, mut filled, mut planned, mut plan) = (offset, 0usize, 0, Vec::new());
        for mut part in parts.iter().copied() {
            while !part.is_empty() {
                // All but the scratch is whole units: this is the place in the unit of the file.
                let until = filled.next_multiple_of(unit) - filled;
                let fits = part.as_ptr().align_offset(unit) == until;
                let now = match fits && part.len() >= until + IN_PLACE {
                    true if until == 0 => {
                        let now = part.len() / unit * unit;
                        plan.push(Taken::Place(&part[..now]));
                        now
                    }
                    few => {
                        let now = if few { until } else { part.len().min(SCRATCH - filled) };
                        scratch[filled..filled + now].copy_from_slice(&part[..now]);
                        match plan.last_mut() {
                            Some(Taken::Scratch(range)) => range.end += now,
                            _ => plan.push(Taken::Scratch(filled..filled + now)),
                        }
                        filled += now;
                        now
                    }
                };
                part = &part[now..];
                planned += now;
                if filled.is_multiple_of(unit) && planned >= SCRATCH {
                    to += self.write_plan(to, &plan, scratch)?;
                    plan.clear();
                    (filled, planned) = (0, 0);
                }
            }
        }
        self.write_plan(to, &plan, scratch)?;
        Ok(())
    }

    fn write_plan(&self, to: u64, plan: &[Taken<'_>], scratch: &[u8]) -> io::Result<u64> {
        let slices: Vec<&[u8]> = plan
            .iter()
            .map(|from| match from {
                Taken::Scratch(range) => &scratch[range.clone()],
                Taken::Place(bytes) => bytes,
            })
            .collect();
        write_vectored(&self.file, to, &slices)?;
        Ok(slices.iter().map(|s| s.len() as u64).sum())
    }
}

impl File for RealFile {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if !self.direct || is_aligned(buf) {
            return self.file.read_exact_at(buf, offset);
        }
        let mut bounce = vec![0; buf.len() + DIRECT_ALIGN];
        let at = bounce.as_ptr().align_offset(DIRECT_ALIGN);
        let aligned = &mut bounce[at..at + buf.len()];
        self.file.read_exact_at(aligned, offset)?;
        buf.copy_from_slice(aligned);
        Ok(())
    }

    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut slices = [IoSliceMut::new(buf)];
        Ok(rustix::io::preadv2(&self.file, &mut slices, offset, ReadWriteFlags::NOWAIT)?)
    }

    fn write_all_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if !self.direct || is_aligned(data) {
            return self.file.write_all_at(data, offset);
        }
        let mut bounce = vec![0; data.len() + DIRECT_ALIGN];
        let at = bounce.as_ptr().align_offset(DIRECT_ALIGN);
        let aligned = &mut bounce[at..at + data.len()];
        aligned.copy_from_slice(data);
        self.file.write_all_at(aligned, offset)
    }

    fn write_vectored_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        if let Some(aside) = &self.aside
            && is_large(offset, parts)
        {
            match aside.write(offset, parts) {
                // The file system takes no O_DIRECT, or wants more than our alignment.
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
                other => return other,
            }
        }
        write_vectored(&self.file, offset, parts)
    }

    fn write_durable_at(&self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        if self.direct && !is_aligned(data) {
            self.write_all_at(offset, data)?;
            return self.sync_data();
        }
        while !data.is_empty() {
            let slice = [IoSlice::new(data)];
            match rustix::io::pwritev2(&self.file, &slice, offset, ReadWriteFlags::DSYNC) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(done) => {
                    offset += done as u64;
                    data = &data[done..];
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        if self.device {
            return Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.device {
            // It has all its space, and fallocate(2) refuses the plain mode.
            return Ok(());
        }
        Ok(rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, len)?)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, hole, offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::NOSYS) => self.write_zeroes(offset, len),
            // A device of 4 KiB sectors, and a range of 512-byte ones.
            Err(Errno::INVAL) if self.device => self.write_zeroes(offset, len),
            Err(error) => Err(error.into()),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let size = self.len()?;
        if offset >= size {
            return Ok(None);
        }
        if self.device {
            return Ok(Some((offset, size)));
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((offset, size))),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?;
        Ok(Some((start, end)))
    }

    fn is_device(&self) -> bool {
        self.device
    }

    fn is_sparse(&self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let meta = self.file.metadata()?;
        Ok(!self.device && meta.blocks() * 512 < meta.len())
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

/// The machine's file systems.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealFiles;

impl Files for RealFiles {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(open_real(path, how)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir_all(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        std::fs::File::open(dir)?.sync_all()
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn holes_are_true(&self, path: &Path) -> bool {
        let known = [EXT4_MAGIC, XFS_MAGIC, BTRFS_MAGIC, TMPFS_MAGIC];
        rustix::fs::statfs(path).is_ok_and(|s| known.contains(&(s.f_type as u32)))
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail * stat.f_frsize)
    }
}

/// Opens a real file; `Open::Direct` falls back to buffered where the file
/// system refuses O_DIRECT (tmpfs before 6.6, some FUSE).
pub fn open_real(path: &Path, how: Open) -> io::Result<RealFile> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).mode(0o600);
    match how {
        Open::Read => {}
        Open::ReadWrite => {
            options.write(true);
        }
        Open::CreateNew => {
            options.write(true).create_new(true);
        }
        Open::Create => {
            options.write(true).create(true).truncate(false);
        }
        Open::Disk => {
            let file = RealFile::new(options.write(true).open(path)?)?;
            let aside = options.custom_flags(OFlags::DIRECT.bits() as i32).open(path).ok();
            let aside = aside.map(|file| Aside {
                file,
                scratch: Mutex::default(),
                sectors: AtomicBool::new(true),
            });
            return Ok(RealFile { aside, ..file });
        }
        Open::Direct => {
            options.write(true).custom_flags(OFlags::DIRECT.bits() as i32);
            match options.open(path) {
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => options.custom_flags(0),
                other => return RealFile::new(other?),
            };
        }
    }
    RealFile::new(options.open(path)?)
}

fn write_vectored(file: &std::fs::File, mut offset: u64, parts: &[&[u8]]) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|p| IoSlice::new(p)).collect();
    let mut rest = slices.as_mut_slice();
    while !rest.is_empty() {
        let now = rest.len().min(IOV_MAX);
        match rustix::io::pwritev(file, &rest[..now], offset) {
            Ok(0) if rest[..now].iter().any(|s| !s.is_empty()) => {
                return Err(io::ErrorKind::WriteZero.into());
            }
            Ok(done) => {
                offset += done as u64;
                IoSlice::advance_slices(&mut rest, done);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Worth going past the page cache: 24 instead of 270 microseconds of CPU a MiB, and
/// what is written in such runs is seldom read soon.
fn is_large(offset: u64, parts: &[&[u8]]) -> bool {
    let total: usize = parts.iter().map(|p| p.len()).sum();
    total >= LARGE
        && offset.is_multiple_of(DIRECT_ALIGN as u64)
        && total.is_multiple_of(DIRECT_ALIGN)
}

fn is_aligned(buf: &[u8]) -> bool {
    buf.as_ptr().align_offset(DIRECT_ALIGN) == 0
}

/// Alignment that every device and file system takes for O_DIRECT, bytes.
const DIRECT_ALIGN: usize = 4096;
/// What most devices want of memory for O_DIRECT, bytes.
const SECTOR: usize = 512;
/// Pieces of a write past the page cache from this size on are not copied, bytes.
const IN_PLACE: usize = 4096;
/// Vectored writes from this size on go past the page cache ([`Open::Disk`]), bytes.
const LARGE: usize = 256 << 10;
/// Of one write past the page cache that is copied first, bytes.
const SCRATCH: usize = 1 << 20;
/// Linux takes at most this many slices in one call (UIO_MAXIOV).
const IOV_MAX: usize = 1024;

/// statfs(2)'s f_type of the file systems whose SEEK_HOLE is believed.
const EXT4_MAGIC: u32 = 0xef53;
const XFS_MAGIC: u32 = 0x5846_5342;
const BTRFS_MAGIC: u32 = 0x9123_683e;
const TMPFS_MAGIC: u32 = 0x0102_1994;

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Pieces of any length and place in memory, some of them where the file will have them.
    #[test]
    fn a_large_write_is_the_same_however_its_parts_lie_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let memory: Vec<u8> = (0..8u32 << 20).map(|i| (i ^ (i >> 9)) as u8).collect();
        let base = memory.as_ptr().align_offset(DIRECT_ALIGN);
        for (round, shift) in [0, 512, 4096, 7, 300].into_iter().enumerate() {
            std::fs::write(&path, []).unwrap();
            let file = open_real(&path, Open::Disk).unwrap();
            let mut parts: Vec<&[u8]> = Vec::new();
            let mut len = 0;
            // The first is odd; the others begin where the file is at, moved by `shift`.
            for (i, part) in [513, 700_000, 4096, 0, 5000, 2_000_000, 1, 300_000].iter().enumerate()
            {
                let at = base + i * DIRECT_ALIGN + len % DIRECT_ALIGN + usize::from(i > 0) * shift;
                parts.push(&memory[at..at + part]);
                len += part;
            }
            let end = len.next_multiple_of(DIRECT_ALIGN);
            parts.push(&memory[base + 77..][..end - len]);
            assert!(is_large(DIRECT_ALIGN as u64, &parts));
            let aside = file.aside.as_ref().unwrap();
            aside.sectors.store(round % 2 == 0, Ordering::Relaxed);
            aside.write(DIRECT_ALIGN as u64, &parts).unwrap();
            let mut found = vec![0; end];
            file.read_exact_at(DIRECT_ALIGN as u64, &mut found).unwrap();
            assert!(found == parts.concat(), "shift {shift}");
        }
    }

    struct Loop(String);

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["-d", &self.0]).status();
        }
    }

    /// What clients may ask of a disk image they may ask of a device too.
    #[test]
    fn a_block_device_takes_zeroes_of_any_sector_and_allocation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let made = Command::new("losetup")
            .args(["-f", "--show", "--sector-size", "4096"])
            .arg(&path)
            .output();
        let device = match made {
            Ok(out) if out.status.success() => {
                Loop(String::from_utf8(out.stdout).unwrap().trim().to_owned())
            }
            _ => return println!("no loop device here: not tested"),
        };
        let file = open_real(Path::new(&device.0), Open::ReadWrite).unwrap();
        file.punch(512, 1024).unwrap();
        file.allocate(8192, 4096).unwrap();
        let mut found = vec![1; 4096];
        file.read_exact_at(0, &mut found).unwrap();
        let expect: Vec<u8> =
            (0..4096).map(|at| if (512..1536).contains(&at) { 0 } else { 7 }).collect();
        assert!(found == expect);
    }
}
