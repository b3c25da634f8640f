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

use super::write_out::write_out;
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
#[derive(Debug)]
enum Taken<'a> {
    Scratch(Range<usize>),
    Place(&'a [u8]),
}

/// Cuts a write past the page cache into calls. Large pieces that stand in memory as they will in
/// the file, counted in `unit`s, are taken from where they are, the rest from a scratch buffer. (pure)
#[derive(Debug)]
struct Cutter<'a> {
    parts: &'a [&'a [u8]],
    /// Of the first part, what was taken.
    used: usize,
    unit: usize,
}

impl<'a> Cutter<'a> {
    /// What the next call writes, and its length; nothing at the end. It ends on a page, if
    /// `scratch` is whole pages and at least two, and all there is to write is whole pages.
    fn next(&mut self, scratch: &mut [u8]) -> (Vec<Taken<'a>>, usize) {
        let (mut taken, mut filled, mut planned) = (Vec::new(), 0usize, 0usize);
        while let Some(part) = self.parts.first().map(|part| &part[self.used..]) {
            // Without the scratch it is whole units: that tells the place in the unit of the file.
            let until = filled.next_multiple_of(self.unit) - filled;
            let fits = part.as_ptr().align_offset(self.unit) == until;
            let in_place = fits && part.len() >= until + IN_PLACE;
            let page = (planned + 1).next_multiple_of(DIRECT_ALIGN) - planned;
            let now = if in_place && until == 0 {
                // To a page's end, which the part reaches.
                let most = part.len().min(CALL - planned);
                (planned + most) / DIRECT_ALIGN * DIRECT_ALIGN - planned
            } else {
                let most = part.len().min(if in_place { until } else { usize::MAX });
                // The scratch always has the room to reach the page's end.
                let room = (scratch.len() - filled).saturating_sub(DIRECT_ALIGN);
                most.min(room.min(CALL - planned).max(page))
            };
            let bytes = &part[..now];
            if in_place && until == 0 {
                taken.push(Taken::Place(bytes));
            } else {
                scratch[filled..filled + now].copy_from_slice(bytes);
                match taken.last_mut() {
                    Some(Taken::Scratch(range)) => range.end += now,
                    _ => taken.push(Taken::Scratch(filled..filled + now)),
                }
                filled += now;
            }
            planned += now;
            self.used += now;
            if self.used == self.parts[0].len() {
                (self.parts, self.used) = (&self.parts[1..], 0);
            }
            let full = planned >= CALL || scratch.len() - filled < 2 * DIRECT_ALIGN;
            if full && planned.is_multiple_of(DIRECT_ALIGN) {
                break;
            }
        }
        (taken, planned)
    }
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
        if parts.iter().all(|p| is_aligned(p) && p.len().is_multiple_of(DIRECT_ALIGN)) {
            return write_vectored(&self.file, offset, parts);
        }
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

    fn write_from(&self, mut offset: u64, parts: &[&[u8]], unit: usize) -> io::Result<()> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        scratch.resize(SCRATCH + DIRECT_ALIGN, 0);
        let at = scratch.as_ptr().align_offset(DIRECT_ALIGN);
        let scratch = &mut scratch[at..at + SCRATCH];
        let mut cutter = Cutter { parts, used: 0, unit };
        loop {
            let (taken, len) = cutter.next(scratch);
            if len == 0 {
                return Ok(());
            }
            let slices: Vec<&[u8]> = taken
                .iter()
                .map(|taken| match taken {
                    Taken::Scratch(range) => &scratch[range.clone()],
                    Taken::Place(bytes) => bytes,
                })
                .collect();
            write_vectored(&self.file, offset, &slices)?;
            offset += len as u64;
        }
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

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.direct && !is_aligned(data) {
            self.write_all_at(offset, data)?;
            return self.sync_data();
        }
        write_all(offset, data, |data, offset| {
            let slice = [IoSlice::new(data)];
            rustix::io::pwritev2(&self.file, &slice, offset, ReadWriteFlags::DSYNC)
        })
    }

    fn write_out(&self, offset: u64, len: u64) -> io::Result<()> {
        write_out(self.file.as_fd(), offset, len)
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

/// Writes all of `data`, in as many calls of `write` as that takes.
fn write_all(
    mut offset: u64,
    mut data: &[u8],
    write: impl Fn(&[u8], u64) -> Result<usize, Errno>,
) -> io::Result<()> {
    while !data.is_empty() {
        match write(data, offset) {
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

fn write_vectored(file: &std::fs::File, mut offset: u64, parts: &[&[u8]]) -> io::Result<()> {
    if let [part] = parts {
        return write_all(offset, part, |data, offset| rustix::io::pwrite(file, data, offset));
    }
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
/// Most bytes of one call past the page cache whose parts are not all aligned: a frame of 256 KiB with
/// its head. What others want of the device, say a commit where target and source share one, waits
/// behind it. Whole pages, and its pieces fit into one call: each that is not copied ends on a page.
const CALL: usize = 320 << 10;
const _: () = assert!(CALL.is_multiple_of(DIRECT_ALIGN) && 2 * CALL / DIRECT_ALIGN < IOV_MAX);
/// What can be copied first of such a call, bytes: all of it, and the room to reach a page's end.
const SCRATCH: usize = CALL + 2 * DIRECT_ALIGN;
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

    const PARTS: [usize; 9] = [513, 700_000, 4096, 0, 5000, 9_000_000, 1, 300_000, 8191];

    /// Parts of which all but the first lie in memory as they will in the file, but `shift` off;
    /// whole pages in all.
    fn parts(memory: &[u8], shift: usize) -> Vec<&[u8]> {
        let base = memory.as_ptr().align_offset(DIRECT_ALIGN);
        let (mut parts, mut len) = (Vec::new(), 0);
        for (i, part) in PARTS.iter().enumerate() {
            let at = base + i * DIRECT_ALIGN + len % DIRECT_ALIGN + usize::from(i > 0) * shift;
            parts.push(&memory[at..at + part]);
            len += part;
        }
        parts.push(&memory[base + 77..][..len.next_multiple_of(DIRECT_ALIGN) - len]);
        parts
    }

    fn memory() -> Vec<u8> {
        (0..10u32 << 20).map(|i| (i ^ (i >> 9)) as u8).collect()
    }

    #[test]
    fn what_lies_as_in_the_file_is_not_copied_and_every_call_is_whole_pages() {
        let memory = memory();
        for (unit, shift, few) in [
            (SECTOR, 0, true),
            (SECTOR, 1024, true),
            (SECTOR, 7, false),
            (DIRECT_ALIGN, 0, true),
            (DIRECT_ALIGN, 1024, false),
        ] {
            let parts = parts(&memory, shift);
            let mut cutter = Cutter { parts: &parts, used: 0, unit };
            let mut scratch = vec![0; if shift == 7 { SCRATCH } else { 4 * DIRECT_ALIGN }];
            let (mut found, mut copied) = (Vec::new(), 0);
            loop {
                let (taken, len) = cutter.next(&mut scratch);
                if len == 0 {
                    break;
                }
                assert!(len.is_multiple_of(DIRECT_ALIGN) && len <= CALL);
                assert!(taken.len() <= 2 * CALL / DIRECT_ALIGN);
                for taken in taken {
                    match taken {
                        Taken::Scratch(range) => {
                            assert!(range.len().is_multiple_of(unit));
                            copied += range.len();
                            found.extend_from_slice(&scratch[range]);
                        }
                        Taken::Place(bytes) => {
                            assert!(bytes.len().is_multiple_of(unit));
                            assert_eq!(bytes.as_ptr().align_offset(unit), 0);
                            found.extend_from_slice(bytes);
                        }
                    }
                }
            }
            assert!(found == parts.concat());
            assert_eq!(copied < 100_000, few, "{unit} {shift}: {copied} copied");
        }
    }

    /// Behind the first sector 1100 pieces of a page each, all a sector off the file's pages.
    #[test]
    fn a_call_of_many_pieces_ends_on_a_page_too() {
        let memory = memory();
        let base = memory.as_ptr().align_offset(DIRECT_ALIGN);
        let mut parts: Vec<&[u8]> = vec![&memory[base..base + 512]];
        parts.extend((0..1100).map(|i| &memory[base + 512 + i * 8192..][..4096]));
        parts.push(&memory[base + 512..][..3584]);
        let mut cutter = Cutter { parts: &parts, used: 0, unit: SECTOR };
        let (mut scratch, mut all) = (vec![0; SCRATCH], 0);
        loop {
            let (taken, len) = cutter.next(&mut scratch);
            assert!(taken.len() <= 2 * CALL / DIRECT_ALIGN && len <= CALL);
            assert!(len.is_multiple_of(DIRECT_ALIGN));
            all += len;
            if len == 0 {
                break;
            }
        }
        assert_eq!(all, parts.iter().map(|p| p.len()).sum::<usize>());
    }

    #[test]
    fn a_large_write_is_the_same_however_its_parts_lie_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let (path, memory) = (dir.path().join("image"), memory());
        for shift in [0, 512, 4096, 7, 300] {
            std::fs::write(&path, []).unwrap();
            let file = open_real(&path, Open::Disk).unwrap();
            let parts = parts(&memory, shift);
            assert!(is_large(DIRECT_ALIGN as u64, &parts));
            file.write_vectored_at(DIRECT_ALIGN as u64, &parts).unwrap();
            let expect = parts.concat();
            let mut found = vec![0; expect.len()];
            file.read_exact_at(DIRECT_ALIGN as u64, &mut found).unwrap();
            assert!(found == expect, "shift {shift}");
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
