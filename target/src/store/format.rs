//! The store's on-disk formats, version 1. Little endian, sizes in bytes. (pure)
//!
//! ```text
//! segment  0            4 KiB    SegHdr, then zeroes
//!          4096 …       frames as received (`replicator::wire`), back to back
//!          end_frames   32 B *   SegPoint, then the tags' bytes      (once sealed)
//!          size - 128   128 B    SegFooter
//! run      0            4 KiB    RunHdr, then zeroes
//!          4096 …       4 KiB *  pages of Entry, sorted by (disk, region, LSN descending)
//!          …            4 KiB *  pages of Wide, LSN descending
//!          …            16 B *   Fence: the first entry of each page of Entry
//! page     0            32 B     PageHdr
//!          32           32 B *   at most 127 Entry or Wide
//! ```
//!
//! A **region** is 1 MiB of a disk, aligned. An Entry never crosses one, so
//! everything that a run knows of a region lies side by side, newest first, and
//! a lookup reads all of it (ruling 15: `{0..255 @ 10}` must be found beside
//! `{5 @ 9}`). Zeroes over more than [`WIDE_REGIONS`] regions are one Wide instead.
//!
//! *LSN* in Entry and Wide: the record's; of copied blocks the position in the
//! era's order of copies, which starts at 0; of a branch the position in it.
//!
//! *Segments* hold whole epochs. An unsealed one ends where the first frame is not
//! whole or does not continue the LSNs; it is cut at the last complete epoch. A
//! sealed one is exactly as its footer and the manifest say; anything else is damage.
//!
//! *Versions*: 1 is the first. A reader refuses a greater one and says so.

use blockfilter::crc32c;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use blockfilter::block::{BLOCK, SECTOR};

/// Head of a segment. 128 bytes.
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
pub struct SegHdr {
    /// [`SEG_MAGIC`].
    pub magic: U64,
    /// [`STORE_VERSION`].
    pub version: U32,
    /// CRC-32C of these 128 bytes with this field 0.
    pub crc: U32,
    /// First 8 bytes of the group's id.
    pub group_id: U64,
    /// The writer's generation.
    pub generation: U64,
    /// Position of the first frame.
    pub lsn_from: U64,
    /// When it was made, microseconds since 1970.
    pub created_us: U64,
    /// Its number in the group (in the drill, for a branch).
    pub id: U32,
    /// Its era; 0 for a branch.
    pub era: U32,
    /// A [`SegKind`].
    pub kind: u8,
    /// 0.
    pub reserved0: [u8; 7],
    /// 0.
    pub reserved: [U64; 8],
}

/// What a segment or run holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SegKind {
    /// Epochs of the stream.
    Stream = 1,
    /// Copied blocks of a reseed.
    Copy = 2,
    /// Writes of a drill.
    Branch = 3,
}

/// Foot of a sealed segment. 128 bytes.
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
pub struct SegFooter {
    /// [`FOOT_MAGIC`].
    pub magic: U64,
    /// [`STORE_VERSION`].
    pub version: U32,
    /// CRC-32C of these 128 bytes with this field 0.
    pub crc: U32,
    /// First 8 bytes of the group's id.
    pub group_id: U64,
    /// Position of the first frame.
    pub lsn_from: U64,
    /// Exclusive end of the last frame.
    pub lsn_to: U64,
    /// Where the frames end in the file and the points start.
    pub end_frames: U64,
    /// The segment's number.
    pub id: U32,
    /// The run that indexed it when it was sealed.
    pub run_id: U32,
    /// Number of frames.
    pub n_frames: U32,
    /// Number of points.
    pub n_points: U32,
    /// Bytes of all tags.
    pub tags_len: U32,
    /// CRC-32C of points and tags.
    pub points_crc: U32,
    /// 0.
    pub reserved: [U64; 7],
}

/// A recovery point in a footer. 32 bytes.
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
pub struct SegPoint {
    /// Exclusive end of its epoch.
    pub lsn: U64,
    /// The incarnation of its epoch.
    pub incarnation: U64,
    /// Its label, microseconds since 1970.
    pub time_us: U64,
    /// 1 crash, 2 app, 3 tagged.
    pub kind: u8,
    /// Bytes of its tag.
    pub tag_len: u8,
    /// 0.
    pub reserved: [u8; 6],
}

/// Head of a run. 128 bytes.
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
pub struct RunHdr {
    /// [`RUN_MAGIC`].
    pub magic: U64,
    /// [`STORE_VERSION`].
    pub version: U32,
    /// CRC-32C of these 128 bytes with this field 0.
    pub crc: U32,
    /// First 8 bytes of the group's id.
    pub group_id: U64,
    /// Lowest LSN that may be in it.
    pub lsn_lo: U64,
    /// Exclusive end of them.
    pub lsn_hi: U64,
    /// Number of entries.
    pub n_entries: U64,
    /// Pages of entries.
    pub n_pages: U32,
    /// Number of wide extents.
    pub n_wide: U32,
    /// CRC-32C of the fences.
    pub fences_crc: U32,
    /// Its number.
    pub id: U32,
    /// 0: of one segment; n: merged from runs of level n - 1.
    pub level: U32,
    /// 0.
    pub reserved0: U32,
    /// 0.
    pub reserved: [U64; 7],
}

/// Head of a page of a run. 32 bytes.
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
pub struct PageHdr {
    /// CRC-32C of the 4 KiB with this field 0.
    pub crc: U32,
    /// The run it belongs to.
    pub run_id: U32,
    /// Its number in the file, counted from 0 behind the run's head.
    pub page: U32,
    /// Items in use.
    pub count: U16,
    /// 1: entries; 2: wide extents.
    pub what: u8,
    /// 0.
    pub reserved0: u8,
    /// 0.
    pub reserved: [U64; 2],
}

/// One range of blocks inside a region, and where its bytes are. 32 bytes.
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
pub struct Entry {
    /// Index of the disk.
    pub disk: u8,
    /// `ENTRY_*` bits.
    pub flags: u8,
    /// Which sectors of the block are covered, if it is one block; else 0xff.
    /// The bits are side by side.
    pub mask: u8,
    /// Bits 32 to 39 of the block's number.
    pub block_hi: u8,
    /// Bits 0 to 31 of the block's number.
    pub block_lo: U32,
    /// Number of blocks, 1 to 256.
    pub nblk: U16,
    /// 0.
    pub reserved: U16,
    /// The segment.
    pub seg: U32,
    /// Where the frame starts in the segment's file.
    pub frame_off: U32,
    /// Where the first covered sector is in the frame's payload, uncompressed.
    pub payload_off: U32,
    /// The record's LSN.
    pub lsn: U64,
}

/// Zeroes over many regions. 32 bytes.
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
pub struct Wide {
    /// Index of the disk.
    pub disk: u8,
    /// `ENTRY_*` bits.
    pub flags: u8,
    /// 0.
    pub reserved: [u8; 6],
    /// First byte.
    pub offset: U64,
    /// Length in bytes.
    pub len: U64,
    /// The record's LSN.
    pub lsn: U64,
}

/// The first entry of a page. 16 bytes.
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
pub struct Fence {
    /// [`region_key`] of its entry.
    pub key: U64,
    /// Its LSN.
    pub lsn: U64,
}

impl Entry {
    /// Number of the first block.
    pub fn block(&self) -> u64 {
        u64::from(self.block_hi) << 32 | u64::from(self.block_lo.get())
    }

    /// Disk and region as one number.
    pub fn key(&self) -> u64 {
        region_key(self.disk, self.block() / REGION_BLOCKS)
    }

    /// First covered sector, counted from the region's start, and how many.
    pub fn sectors(&self) -> (usize, usize) {
        let first = (self.block() % REGION_BLOCKS) as usize * BLOCK_SECTORS;
        if self.nblk.get() == 1 {
            let skip = self.mask.trailing_zeros() as usize;
            return (first + skip, self.mask.count_ones() as usize);
        }
        (first, usize::from(self.nblk.get()) * BLOCK_SECTORS)
    }

    /// Reads as zeroes; no payload.
    pub fn is_zero(&self) -> bool {
        self.flags & ENTRY_ZERO != 0
    }

    /// Inside its region, with a mask that makes sense.
    pub fn is_valid(&self) -> bool {
        let nblk = u64::from(self.nblk.get());
        let inside = nblk >= 1 && self.block() % REGION_BLOCKS + nblk <= REGION_BLOCKS;
        let shifted = self.mask.checked_shr(self.mask.trailing_zeros()).unwrap_or(0);
        inside && shifted != 0 && (shifted & shifted.wrapping_add(1)) == 0
    }
}

/// Disk and region as one number that sorts by disk, then region.
pub const fn region_key(disk: u8, region: u64) -> u64 {
    (disk as u64) << 56 | region
}

/// Splits a record's range into entries. `like` brings disk, flags, segment,
/// frame and LSN; `payload_off` is that of the range's first byte. Offset and
/// length are multiples of a sector.
pub fn split(like: Entry, offset: u64, len: u64, payload_off: u32, out: &mut Vec<Entry>) {
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let block = at / BLOCK;
        let inside = at % BLOCK;
        let (blocks, mask, next) = if inside != 0 || end - at < BLOCK {
            let next = end.min((block + 1) * BLOCK);
            let count = (next - at) / SECTOR;
            (1, (0xffu16 >> (8 - count) << (inside / SECTOR)) as u8, next)
        } else {
            let blocks = (REGION_BLOCKS - block % REGION_BLOCKS).min((end - at) / BLOCK);
            (blocks, 0xff, at + blocks * BLOCK)
        };
        let mut entry = like;
        entry.block_hi = (block >> 32) as u8;
        entry.block_lo = (block as u32).into();
        entry.nblk = (blocks as u16).into();
        entry.mask = mask;
        if !entry.is_zero() {
            entry.payload_off = (payload_off + (at - offset) as u32).into();
        }
        out.push(entry);
        at = next;
    }
}

/// Structs that begin with magic, version and CRC.
macro_rules! sealed {
    ($name:ty, $magic:expr, $what:literal) => {
        impl $name {
            fn checksum(&self) -> u32 {
                let mut copy = *self;
                copy.crc = 0.into();
                crc32c::crc32c(copy.as_bytes())
            }

            /// Fills in magic, version and CRC.
            pub fn seal(mut self) -> Self {
                self.magic = $magic.into();
                self.version = STORE_VERSION.into();
                self.crc = self.checksum().into();
                self
            }

            /// Reads and checks it.
            pub fn check(bytes: &[u8]) -> Result<Self, FormatError> {
                let (this, _) = Self::read_from_prefix(bytes).map_err(|_| FormatError::Short)?;
                if this.magic.get() != $magic {
                    return Err(FormatError::Magic($what));
                }
                if this.version.get() > STORE_VERSION {
                    return Err(FormatError::Newer(this.version.get()));
                }
                if this.crc.get() != this.checksum() {
                    return Err(FormatError::Crc($what));
                }
                Ok(this)
            }
        }
    };
}

sealed!(SegHdr, SEG_MAGIC, "segment");
sealed!(SegFooter, FOOT_MAGIC, "end of a segment");
sealed!(RunHdr, RUN_MAGIC, "index run");

/// Why bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Too few bytes.
    #[error("it is too short")]
    Short,
    /// Another kind of file.
    #[error("it is not a {0}")]
    Magic(&'static str),
    /// Written by a newer version.
    #[error("it has version {0}; this program understands up to {STORE_VERSION}")]
    Newer(u32),
    /// A checksum does not match.
    #[error("the checksum of the {0} does not match")]
    Crc(&'static str),
    /// It contradicts what refers to it.
    #[error("its {0} is not what the manifest says")]
    Other(&'static str),
}

/// Version written and understood, of all of the store's files.
pub const STORE_VERSION: u32 = 1;
/// First bytes of a segment.
pub const SEG_MAGIC: u64 = u64::from_le_bytes(*b"SFSEGMNT");
/// First bytes of a segment's footer.
pub const FOOT_MAGIC: u64 = u64::from_le_bytes(*b"SFSEGEND");
/// First bytes of a run.
pub const RUN_MAGIC: u64 = u64::from_le_bytes(*b"SFIDXRUN");
/// The range reads as zeroes.
pub const ENTRY_ZERO: u8 = 1;
/// Bytes of a region.
pub const REGION: u64 = 1 << 20;
/// Blocks in a region.
pub const REGION_BLOCKS: u64 = REGION / BLOCK;
/// Sectors in a block.
pub const BLOCK_SECTORS: usize = (BLOCK / SECTOR) as usize;
/// Sectors in a region.
pub const REGION_SECTORS: usize = (REGION / SECTOR) as usize;
/// Zeroes over more regions than this are a [`Wide`].
pub const WIDE_REGIONS: u64 = 16;
/// Bytes of a page, and of the head of every file.
pub const PAGE: u64 = 4096;
/// Items in a page.
pub const PAGE_ITEMS: usize = (PAGE as usize - size_of::<PageHdr>()) / size_of::<Entry>();
/// [`PageHdr::what`] of entries.
pub const PAGE_ENTRIES: u8 = 1;
/// [`PageHdr::what`] of wide extents.
pub const PAGE_WIDE: u8 = 2;

const _: () = assert!(size_of::<SegHdr>() == 128);
const _: () = assert!(size_of::<SegFooter>() == 128);
const _: () = assert!(size_of::<SegPoint>() == 32);
const _: () = assert!(size_of::<RunHdr>() == 128);
const _: () = assert!(size_of::<PageHdr>() == 32);
const _: () = assert!(size_of::<Entry>() == 32);
const _: () = assert!(size_of::<Wide>() == 32);
const _: () = assert!(size_of::<Fence>() == 16);
const _: () = assert!(PAGE_ITEMS == 127);
const _: () = assert!(REGION_BLOCKS == 256 && REGION_SECTORS == 2048);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_their_bytes() {
        let entry = Entry {
            disk: 3,
            flags: ENTRY_ZERO,
            mask: 0x0f,
            block_hi: 0x12,
            block_lo: 0x3456_789a.into(),
            nblk: 0x0102.into(),
            reserved: 0.into(),
            seg: 0x1112_1314.into(),
            frame_off: 0x2122_2324.into(),
            payload_off: 0x3132_3334.into(),
            lsn: 0x4142_4344_4546_4748.into(),
        };
        let bytes = [
            3, 1, 0x0f, 0x12, 0x9a, 0x78, 0x56, 0x34, 2, 1, 0, 0, 0x14, 0x13, 0x12, 0x11, 0x24,
            0x23, 0x22, 0x21, 0x34, 0x33, 0x32, 0x31, 0x48, 0x47, 0x46, 0x45, 0x44, 0x43, 0x42,
            0x41,
        ];
        assert_eq!(entry.as_bytes(), bytes);
        assert_eq!(entry.block(), 0x12_3456_789a);
    }

    #[test]
    fn a_segment_header_keeps_its_bytes() {
        let hdr = SegHdr {
            group_id: 0x0102_0304_0506_0708.into(),
            generation: 9.into(),
            lsn_from: 4096.into(),
            created_us: 5.into(),
            id: 7.into(),
            era: 2.into(),
            kind: SegKind::Copy as u8,
            ..Default::default()
        }
        .seal();
        let bytes = hdr.as_bytes();
        assert_eq!(&bytes[..12], b"SFSEGMNT\x01\0\0\0");
        assert_eq!(&bytes[16..24], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(&bytes[24..26], [9, 0]);
        assert_eq!(&bytes[32..35], [0, 16, 0]);
        assert_eq!(&bytes[48..57], [7, 0, 0, 0, 2, 0, 0, 0, 2]);
        assert_eq!(SegHdr::check(bytes), Ok(hdr));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(SegHdr::check(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn run_header_and_footer_keep_their_bytes() {
        let run = RunHdr { n_entries: 5.into(), id: 9.into(), ..Default::default() }.seal();
        assert_eq!(&run.as_bytes()[..12], b"SFIDXRUN\x01\0\0\0");
        assert_eq!(run.as_bytes()[40], 5);
        assert_eq!(run.as_bytes()[60], 9);
        let foot = SegFooter { end_frames: 5.into(), id: 9.into(), ..Default::default() }.seal();
        assert_eq!(&foot.as_bytes()[..12], b"SFSEGEND\x01\0\0\0");
        assert_eq!(foot.as_bytes()[40], 5);
        assert_eq!(foot.as_bytes()[48], 9);
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let mut hdr = SegHdr::default().seal();
        hdr.version = 2.into();
        hdr.crc = hdr.checksum().into();
        assert_eq!(SegHdr::check(hdr.as_bytes()), Err(FormatError::Newer(2)));
    }

    #[test]
    fn split_covers_every_sector_once_and_never_crosses_a_region() {
        for (offset, len) in [
            (0u64, 512u64),
            (512, 512),
            (3584, 1024),
            (4096, 4096),
            (REGION - 512, 1024),
            (REGION - 4096, 3 * REGION),
            (512, 5 * REGION),
            ((1 << 44) + 1536, 70_144),
        ] {
            let mut out = Vec::new();
            split(Entry::default(), offset, len, 100, &mut out);
            let mut at = offset;
            for entry in &out {
                assert!(entry.is_valid(), "{entry:?}");
                let (first, count) = entry.sectors();
                let region = entry.block() / REGION_BLOCKS * REGION;
                assert_eq!(region + first as u64 * SECTOR, at);
                assert_eq!(u64::from(entry.payload_off.get()), 100 + at - offset);
                assert!(first + count <= REGION_SECTORS);
                at += count as u64 * SECTOR;
            }
            assert_eq!(at, offset + len);
        }
    }
}
