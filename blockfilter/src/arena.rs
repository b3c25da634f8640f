//! The arena: the one copy of recent data in RAM, in a file on tmpfs.
//!
//! A ring of bytes addressed by journal position: position p lives at `p % size`,
//! so the arena holds the very bytes that the journal gets, batch headers
//! included. One contiguous range is at once receive buffer, volatile write
//! cache, source of the journal write, source of the write-back, and what the
//! replicator reads with `pread`.
//!
//! Holds: bytes in `[floor, head)` are never written; bytes in `[head, floor + size)`
//! belong to the engine thread ([`Arena::fill`]). What other processes are told as the floor is
//! raised *before* a byte below it is overwritten (ruling 12), and only then: so a reader in another
//! process that copies and then sees it at or below its range has copied
//! good bytes, and one that is behind finds them for as long as they are there. The process may die at any
//! instruction: what is below `published` is complete (decision 2).
//!
//! ```text
//! 0       4 KiB   ArenaHdr
//! 4 KiB   4 KiB   reserved
//! 8 KiB   size    ring
//! ```

#![expect(unsafe_code, reason = "shared memory is reached through raw pointers, here only")]

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::engine::Clock;

/// Identity of an arena. The positions behind it are atomics of their own.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct ArenaHdr {
    /// [`ARENA_MAGIC`].
    pub magic: [u8; 8],
    /// 1.
    pub version: U32,
    /// 0.
    pub reserved: U32,
    /// The journal that it belongs to.
    pub journal_uuid: [u8; 16],
    /// This boot of the machine: an arena never outlives one.
    pub boot_id: [u8; 16],
    /// The journal's incarnation.
    pub incarnation: U64,
    /// Bytes in the ring.
    pub size: U64,
}

/// Positions kept beside the data, readable by other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Open batch's LSN plus its number of records: everything below is complete.
    Published = 64,
    /// Lowest position whose bytes are still there: given up or not, never above what this
    /// process gave up.
    Floor = 72,
    /// Exclusive end of what is durable in the journal.
    Durable = 80,
    /// Exclusive end of what is written to the disks and, if there is no journal, synced.
    Applied = 88,
    /// `hdr_crc` of the last batch below Applied.
    AppliedCrc = 96,
    /// The target holds everything below, as last told: decides which slots are free.
    ShipFloor = 104,
    /// Syncs of the disks that run, were cut off or failed. Not 0 at a start: what was written
    /// since the checkpoint may be gone, and only writing it again helps.
    Syncing = 112,
}

/// A mapped arena.
#[derive(Debug)]
pub struct Arena {
    /// Addresses. The file has `len` bytes of them from `start` on, the first multiple of [`HUGE`].
    room: MmapRaw,
    start: usize,
    len: usize,
    size: u64,
    /// Bytes at and above are writable up to `floor + size`.
    head: AtomicU64,
    /// Everything below is given up.
    floor: AtomicU64,
}

impl Arena {
    /// Makes a new arena of `size` bytes at `path`, fully allocated (a sparse
    /// tmpfs file could raise SIGBUS). Replaces an old one.
    pub fn create(path: &Path, hdr: &ArenaHdr) -> io::Result<Self> {
        let size = hdr.size.get();
        assert!(size.is_multiple_of(4096) && size > 0);
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
        let file = std::fs::File::from(fd);
        if let Err(error) = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, RING_AT + size)
        {
            let _ = std::fs::remove_file(path);
            return Err(error.into());
        }
        let arena = Self::map(&file, size)?;
        arena.store_bytes(0, hdr.as_bytes());
        Ok(arena)
    }

    /// Opens an existing arena, if there is one of this identity.
    pub fn open(path: &Path, expect: &ArenaHdr) -> io::Result<Option<Self>> {
        let file = match std::fs::OpenOptions::new().read(true).write(true).open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let size = expect.size.get();
        if file.metadata()?.len() != RING_AT + size {
            return Ok(None);
        }
        let mut found = ArenaHdr::default();
        std::os::unix::fs::FileExt::read_exact_at(&file, found.as_mut_bytes(), 0)?;
        if found != *expect {
            return Ok(None);
        }
        let arena = Self::map(&file, size)?;
        let published = arena.word(Word::Published);
        arena.head.store(published.next_multiple_of(4096), Ordering::Relaxed);
        arena.floor.store(arena.word(Word::Floor), Ordering::Relaxed);
        Ok(Some(arena))
    }

    /// The identity of the arena at `path`, if there is one of this boot.
    pub fn identity(path: &Path) -> io::Result<Option<ArenaHdr>> {
        let file = match std::fs::File::open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        if file.metadata()?.len() < RING_AT {
            return Ok(None);
        }
        let mut found = ArenaHdr::default();
        std::os::unix::fs::FileExt::read_exact_at(&file, found.as_mut_bytes(), 0)?;
        let good = found.magic == ARENA_MAGIC && found.boot_id == boot_id()?;
        Ok(good.then_some(found))
    }

    /// A word of the arena at `path`, if there is one of this boot.
    pub fn peek(path: &Path, word: Word) -> io::Result<Option<u64>> {
        if Self::identity(path)?.is_none() {
            return Ok(None);
        }
        let mut bytes = [0; 8];
        let file = std::fs::File::open(path)?;
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, word as u64)?;
        Ok(Some(u64::from_le_bytes(bytes)))
    }

    fn map(file: &std::fs::File, size: u64) -> io::Result<Self> {
        let len = (RING_AT + size) as usize;
        // Of the file, and for reading: so it is no memory, and what is beside the arena is not
        // written by mistake.
        let room = MmapOptions::new().len(len + HUGE).map_raw_read_only(file)?;
        let start = room.as_mut_ptr().align_offset(HUGE);
        assert!(start < HUGE, "bytes have a boundary within HUGE of any address");
        let arena =
            Self { room, start, len, size, head: AtomicU64::new(0), floor: AtomicU64::new(0) };
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces `len` of the pages that `room` has from `start` on, to which there
        // is no pointer yet; `room` unmaps them with its own.
        unsafe { mmap(arena.base().cast(), len, access, flags, file, 0) }?;
        Ok(arena)
    }

    /// Asks for the file's memory in huge pages, also on a tmpfs that does not use them by
    /// itself (Linux 6.1 on): fewer and longer pieces for the journal's device, and fewer
    /// misses of the TLB with each copy. What is refused stays as it is; where memory is in
    /// fragments a start does not wait for it longer than half a second and one page more.
    /// Returns how many bytes are in huge pages.
    pub fn use_huge_pages(&self, clock: &dyn Clock) -> u64 {
        let (since, mut got) = (clock.mono_us(), 0);
        for at in (0..self.len / HUGE * HUGE).step_by(HUGE) {
            let page = self.base().wrapping_add(at).cast();
            // SAFETY: inside the map; the bytes stay, in other memory.
            if unsafe { libc::madvise(page, HUGE, libc::MADV_COLLAPSE) } == 0 {
                got += HUGE as u64;
            }
            if clock.mono_us() - since > HUGE_WAIT {
                break;
            }
        }
        got
    }

    /// Bytes in the ring.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A published position.
    pub fn word(&self, word: Word) -> u64 {
        self.atomic(word).load(Ordering::Acquire)
    }

    /// Publishes a position: all bytes written before are visible to whoever reads it.
    pub fn set_word(&self, word: Word, value: u64) {
        self.atomic(word).store(value, Ordering::Release);
    }

    /// Adds to a word that several threads count in.
    pub fn add_word(&self, word: Word, by: i64) {
        self.atomic(word).fetch_add(by as u64, Ordering::AcqRel);
    }

    /// Sets where writing starts: bytes in `[floor, head)` are frozen from now on.
    pub fn set_bounds(&self, floor: u64, head: u64) {
        assert!(floor <= head && head - floor <= self.size);
        self.set_word(Word::Floor, floor);
        std::sync::atomic::fence(Ordering::SeqCst);
        self.floor.store(floor, Ordering::Release);
        self.head.store(head, Ordering::Release);
    }

    /// Freezes everything below `head`.
    pub fn advance_head(&self, head: u64) {
        assert!(head >= self.head.load(Ordering::Relaxed));
        assert!(head - self.floor.load(Ordering::Relaxed) <= self.size);
        self.head.store(head, Ordering::Release);
    }

    /// Gives up everything below `floor`. Other processes find it until it is overwritten.
    pub fn advance_floor(&self, floor: u64) {
        assert!(floor >= self.floor.load(Ordering::Relaxed));
        assert!(floor <= self.head.load(Ordering::Relaxed));
        self.floor.store(floor, Ordering::Release);
    }

    /// Bytes that can still be written from the head on.
    pub fn room(&self) -> u64 {
        // In this order: no floor seen later is below the one that bounded this head.
        let head = self.head.load(Ordering::Acquire);
        self.floor.load(Ordering::Relaxed) + self.size - head
    }

    /// Copies `data` to position `pos`, at or above the head. Engine thread only.
    pub fn fill(&self, pos: u64, data: &[u8]) {
        let at = self.own_range(pos, data.len() as u64);
        self.store_bytes(at, data);
    }

    /// Lets `read` write up to `len` bytes at position `pos`, at or above the head; what it
    /// returns. Engine thread only.
    pub(crate) fn receive<T>(&self, pos: u64, len: u64, read: impl FnOnce(&mut [u8]) -> T) -> T {
        let at = self.own_range(pos, len);
        // SAFETY: `at + len` is inside the map (own_range asserts it).
        let to = unsafe { self.base().add(at) };
        // SAFETY: bytes from the head on are written and read by the engine thread only, and it
        // is in this call: no other slice of them is alive.
        read(unsafe { std::slice::from_raw_parts_mut(to, len as usize) })
    }

    /// Where the bytes at `pos` are, which may be written. What was there is gone for other processes.
    fn own_range(&self, pos: u64, len: u64) -> usize {
        assert!(pos >= self.head.load(Ordering::Relaxed), "a frozen byte would be written");
        let floor = self.floor.load(Ordering::Relaxed);
        assert!(pos + len <= floor + self.size);
        let needed = (pos + len).saturating_sub(self.size);
        if self.word(Word::Floor) < needed {
            self.set_word(Word::Floor, floor.min(needed + self.size / FLOOR_STEPS));
            std::sync::atomic::fence(Ordering::SeqCst);
        }
        self.ring_offset(pos, len)
    }

    /// The frozen or own bytes at `pos`. The slice must not be held across
    /// [`Arena::advance_floor`] beyond its end or a [`Arena::fill`] of it.
    pub fn bytes(&self, pos: u64, len: u64) -> &[u8] {
        assert!(pos >= self.floor.load(Ordering::Acquire), "the bytes were given up");
        assert!(pos + len <= self.floor.load(Ordering::Acquire) + self.size);
        let at = self.ring_offset(pos, len);
        // SAFETY: `at + len` is inside the map (ring_offset asserts it).
        let from = unsafe { self.base().add(at) };
        // SAFETY: the bytes below the head are not written while the floor is at or
        // below `pos`; the engine thread, the only writer, passes other threads
        // only positions below the head and raises the floor after they are done.
        unsafe { std::slice::from_raw_parts(from, len as usize) }
    }

    /// Where a position is in the mapped memory, for registered buffers.
    pub fn ring_offset(&self, pos: u64, len: u64) -> usize {
        let at = pos % self.size;
        assert!(at + len <= self.size, "a range that wraps is never asked for");
        (RING_AT + at) as usize
    }

    /// The whole mapping, for registration with io_uring.
    pub fn mapping(&self) -> (*mut u8, usize) {
        (self.base(), self.len)
    }

    /// Where the file is mapped.
    fn base(&self) -> *mut u8 {
        self.room.as_mut_ptr().wrapping_add(self.start)
    }

    fn store_bytes(&self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.len);
        // SAFETY: the range is inside the map; the engine thread is the only
        // writer and no slice of this range is alive (see `fill` and `bytes`).
        let to = unsafe { self.base().add(at) };
        // SAFETY: as above; `data` is ordinary memory and cannot overlap the map.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) }
    }

    fn atomic(&self, word: Word) -> &AtomicU64 {
        let at = word as usize;
        assert!(at + 8 <= 4096);
        // SAFETY: inside the first page of the map, 8-aligned (the map is page-aligned).
        let place = unsafe { self.base().add(at) };
        // SAFETY: the word is only ever accessed atomically, lives as long as the map.
        unsafe { AtomicU64::from_ptr(place.cast()) }
    }
}

/// The id of this boot, which an arena must carry.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let id = uuid::Uuid::parse_str(text.trim()).map_err(io::Error::other)?;
    Ok(*id.as_bytes())
}

/// First bytes of an arena.
pub const ARENA_MAGIC: [u8; 8] = *b"SFARENA1";
/// Where the ring starts in the file.
pub const RING_AT: u64 = 8192;

/// The floor is raised at least one part of so many further than it must be, so that not every write raises it.
const FLOOR_STEPS: u64 = 256;
/// Size and alignment of a huge page.
const HUGE: usize = 2 << 20;
/// How long a start looks for huge pages, microseconds: 256 MiB took 0.1 s, and once 0.7.
const HUGE_WAIT: u64 = 500_000;

const _: () = assert!(size_of::<ArenaHdr>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    fn hdr() -> ArenaHdr {
        ArenaHdr { magic: ARENA_MAGIC, version: 1.into(), size: 65536.into(), ..Default::default() }
    }

    #[test]
    fn an_arena_is_found_again_with_its_bytes_and_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let arena = Arena::create(&path, &hdr()).unwrap();
        arena.set_bounds(4096, 4096);
        arena.fill(69_000, b"hello");
        arena.set_word(Word::Published, 69_632);
        drop(arena);
        let arena = Arena::open(&path, &hdr()).unwrap().unwrap();
        assert_eq!(arena.word(Word::Published), 69_632);
        assert_eq!(Arena::peek(&path, Word::Published).unwrap(), None, "of no boot");
        arena.set_bounds(65_536, 69_632);
        assert_eq!(arena.bytes(69_000, 5), b"hello");
        let other = ArenaHdr { incarnation: 2.into(), ..hdr() };
        assert!(Arena::open(&path, &other).unwrap().is_none());
    }

    #[test]
    fn what_is_given_up_is_told_only_before_it_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let arena = Arena::create(&dir.path().join("a"), &hdr()).unwrap();
        arena.set_bounds(4096, 4096);
        arena.fill(4096, &[1; 61_440]);
        arena.advance_head(65_536);
        arena.advance_floor(40_960);
        assert_eq!((arena.word(Word::Floor), arena.room()), (4096, 40_960));
        arena.fill(65_536, &[2; 4096]);
        assert_eq!(arena.word(Word::Floor), 4096, "nothing of that was overwritten");
        arena.receive(69_632, 4096, |buf| buf.fill(3));
        let told = arena.word(Word::Floor);
        assert!((8192..=40_960).contains(&told), "{told}");
        // Up to the last byte that is given up, not beyond.
        arena.advance_head(73_728);
        arena.fill(73_728, &[4; 32_768]);
        assert_eq!((arena.word(Word::Floor), arena.room()), (40_960, 32_768));
    }

    #[test]
    #[should_panic(expected = "given up")]
    fn what_is_given_up_is_not_read_though_it_is_still_there() {
        let dir = tempfile::tempdir().unwrap();
        let arena = Arena::create(&dir.path().join("a"), &hdr()).unwrap();
        arena.set_bounds(4096, 8192);
        arena.advance_floor(8192);
        arena.bytes(4096, 4096);
    }

    /// Each look at it is 100 ms after the one before.
    #[derive(Debug, Default)]
    struct Slow(AtomicU64);

    impl Clock for Slow {
        fn mono_us(&self) -> u64 {
            self.0.fetch_add(100_000, Ordering::Relaxed)
        }
        fn wall_us(&self) -> u64 {
            self.mono_us()
        }
    }

    /// Bytes that the kernel has mapped in huge pages where `arena` is.
    fn huge_mapped(arena: &Arena) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let from = format!("{:x}-", arena.base() as usize);
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&from));
        let line = lines.find(|line| line.starts_with("ShmemPmdMapped:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// Whether this kernel has them, of this size, for whoever asks.
    fn huge_pages_are_known() -> bool {
        let denied = |path: &str, by: &str| {
            std::fs::read_to_string(path).is_ok_and(|text| text.contains(by))
        };
        if denied("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "[deny]")
            || denied("/proc/self/status", "THP_enabled:\t0")
        {
            return false;
        }
        let size = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
        let uname = rustix::system::uname();
        let mut release = uname.release().to_str().unwrap().split(|c: char| !c.is_ascii_digit());
        let mut number = || release.next().unwrap().parse::<u32>().unwrap();
        size.is_ok_and(|size| size.trim() == HUGE.to_string()) && (number(), number()) >= (6, 1)
    }

    #[test]
    fn huge_pages_keep_the_bytes_and_are_what_the_kernel_says() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let size = 16 << 20;
        let arena =
            Arena::create(&dir.path().join("a"), &ArenaHdr { size: size.into(), ..hdr() }).unwrap();
        assert!((arena.base() as usize).is_multiple_of(HUGE));
        arena.set_bounds(4096, 4096);
        let data: Vec<u8> = (0..size - 4096).map(|at| (at % 251) as u8).collect();
        arena.fill(4096, &data);
        arena.set_word(Word::Published, 4096);
        let first = arena.use_huge_pages(&Slow::default());
        assert!(first <= 6 << 21, "the seventh page was asked for after 600 ms");
        assert!(huge_mapped(&arena) >= first);
        let all = arena.use_huge_pages(&crate::engine::real::RealClock::new());
        assert!(huge_mapped(&arena) >= all);
        assert!(all > 0 || !huge_pages_are_known());
        assert_eq!(arena.bytes(4096, size - 4096), data);
        assert_eq!(arena.word(Word::Published), 4096);
        let path = dir.path().join("a");
        assert_eq!(std::fs::read(path).unwrap()[RING_AT as usize + 4096..], data);
    }

    #[test]
    #[should_panic(expected = "a frozen byte would be written")]
    fn frozen_bytes_cannot_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let arena = Arena::create(&dir.path().join("a"), &hdr()).unwrap();
        arena.set_bounds(4096, 4096);
        arena.advance_head(8192);
        arena.fill(8000, b"x");
    }
}
