//! The journal's on-disk format, version 1. Little endian, sizes in bytes. (pure)
//!
//! ```text
//! file     0            4 KiB   super A
//!          1 MiB        4 KiB   super B          (A and B alternate; highest valid seq wins)
//!          2 MiB …      chunk slots of `chunk_size` each
//! chunk    0            4 KiB   ChunkHdr         (chunk c holds LSNs c*C .. (c+1)*C, in any slot)
//!          4 KiB …      batches, back to back; a PAD batch fills what is left
//! batch    0            128 B   BatchHdr
//!          128          40 B *  RecDesc, at most 99
//!          4 KiB …      payloads: 4 KiB-aligned if at least 4 KiB long, else 512-aligned;
//!                       the batch ends at a multiple of 4 KiB
//! ```
//!
//! The stream is contiguous: LSN p is byte `p % C` of chunk `p / C`, so a batch
//! starts at its own LSN, and the arena holds the same bytes at `p % arena`.
//!
//! *Valid batch*: magic, version, journal id, `lsn` equal to its position,
//! incarnation not below the previous one, `prev_crc` equal to the previous
//! batch's `hdr_crc`, header CRC, every payload CRC. The first invalid batch ends
//! the log, unless a later valid batch carries a `durable` beyond that position:
//! then durable data is damaged and the journal is refused.
//!
//! *Versions*: 1 is the first. A reader refuses a greater one and says so.
//!
//! *What the medium is assumed to do*: a 512-byte sector is written whole or not
//! at all; writes between two syncs reach it in any order and subset; a sync
//! that returned success holds what was written before it.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::names::Lsn;

/// What a record does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RecOp {
    /// Bytes at an offset.
    Write = 1,
    /// The range reads as zeroes and stays allocated if NO_HOLE is set.
    Zero = 2,
    /// The range reads as zeroes and may be deallocated.
    Trim = 3,
    /// A named point; the payload is its tag (may be empty).
    Mark = 4,
    /// The disk's size becomes `offset`.
    Resize = 5,
    /// Nothing; keeps an index in use.
    Nop = 6,
}

impl RecOp {
    /// The operation of a stored value.
    pub const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Write,
            2 => Self::Zero,
            3 => Self::Trim,
            4 => Self::Mark,
            5 => Self::Resize,
            6 => Self::Nop,
            _ => return None,
        })
    }
}

/// Describes one record, in the journal, on the wire and in a segment. 40 bytes.
///
/// In the journal `payload_off` counts from the start of the batch; in a frame
/// it counts from the start of the uncompressed payload. Records without
/// payload (Zero, Trim, Resize, Nop) have `payload_off` and `crc` 0.
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
pub struct RecDesc {
    /// A [`RecOp`].
    pub op: u8,
    /// Index of the disk in its group.
    pub disk: u8,
    /// `REC_*` bits.
    pub flags: U16,
    /// Length of the range in bytes; of a Mark: of its tag.
    pub len: U32,
    /// Byte offset on the disk.
    pub offset: U64,
    /// The record's LSN.
    pub lsn: U64,
    /// Where the payload is (see above).
    pub payload_off: U32,
    /// CRC-32C of the payload, uncompressed.
    pub crc: U32,
    /// 0.
    pub reserved: U64,
}

/// The client asked for FUA.
pub const REC_FUA: u16 = 1;
/// Zero: keep the range allocated.
pub const REC_NO_HOLE: u16 = 2;
/// Mark: made with the application's consent (frozen file systems).
pub const REC_APP: u16 = 4;

impl RecDesc {
    /// The operation, if it is a known one.
    pub const fn rec_op(&self) -> Option<RecOp> {
        RecOp::from_u8(self.op)
    }

    /// Bytes of payload that belong to the record.
    pub fn payload_len(&self) -> u32 {
        match self.rec_op() {
            Some(RecOp::Write | RecOp::Mark) => self.len.get(),
            _ => 0,
        }
    }

    /// First byte behind the record's range on the disk.
    pub fn end(&self) -> u64 {
        self.offset.get() + u64::from(self.len.get())
    }

    /// The LSN, typed.
    pub fn lsn(&self) -> Lsn {
        Lsn(self.lsn.get())
    }
}

/// Head of a batch (one group commit, or part of one). 128 bytes.
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
pub struct BatchHdr {
    /// [`BATCH_MAGIC`].
    pub magic: U32,
    /// [`JOURNAL_VERSION`].
    pub version: u8,
    /// `BATCH_*` bits.
    pub flags: u8,
    /// Number of descriptors.
    pub n_rec: U16,
    /// CRC-32C of the 128 bytes with this field 0, then of the descriptors.
    pub hdr_crc: U32,
    /// `hdr_crc` of the batch before (0 for the stream's first).
    pub prev_crc: U32,
    /// First 8 bytes of the journal's id.
    pub journal_id: U64,
    /// The incarnation that wrote it.
    pub incarnation: U64,
    /// The generation that wrote it.
    pub generation: U64,
    /// Position in the stream.
    pub lsn: U64,
    /// Bytes to the next batch, a multiple of 4 KiB.
    pub total_len: U32,
    /// 0.
    pub reserved0: U32,
    /// The durable position when it was sealed.
    pub durable: U64,
    /// Wall clock when it was sealed, microseconds since 1970.
    pub wall_us: U64,
    /// Monotonic clock when it was sealed, microseconds.
    pub mono_us: U64,
    /// 0.
    pub reserved: [U64; 6],
}

/// Fills the rest of a chunk; no records.
pub const BATCH_PAD: u8 = 1;
/// Last batch before a clean stop: everything below is on the disks.
pub const BATCH_CLEAN: u8 = 2;
/// A FLUSH or FUA waited for it, or was foreseen: a good end for an epoch.
pub const BATCH_FLUSH: u8 = 4;
/// Holds a Mark, as its last record; ends an epoch.
pub const BATCH_MARK: u8 = 8;

/// Head of a chunk. 4 KiB on disk, the rest zero.
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
pub struct ChunkHdr {
    /// [`CHUNK_MAGIC`].
    pub magic: U64,
    /// Version, 1.
    pub version: U32,
    /// CRC-32C of the 64 bytes with this field 0.
    pub crc: U32,
    /// First 8 bytes of the journal's id.
    pub journal_id: U64,
    /// Its number: LSN / chunk size.
    pub chunk_no: U64,
    /// The incarnation that wrote it.
    pub incarnation: U64,
    /// `hdr_crc` of the last batch of the chunk before.
    pub prev_crc: U32,
    /// 0.
    pub reserved0: U32,
    /// 0.
    pub reserved: [U64; 2],
}

/// One disk of the group, in the super block. 96 bytes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SuperDisk {
    /// Random id, given at protect time.
    pub uuid: [u8; 16],
    /// Size in bytes.
    pub size: U64,
    /// The name, zero-padded.
    pub name: [u8; 64],
    /// 0.
    pub reserved: U64,
}

/// An incarnation that ended, and where. 16 bytes.
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
pub struct History {
    /// The incarnation.
    pub incarnation: U64,
    /// Exclusive end of its LSNs.
    pub end: U64,
}

/// The super block. 4096 bytes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct JournalSuper {
    /// [`SUPER_MAGIC`].
    pub magic: [u8; 8],
    /// [`JOURNAL_VERSION`].
    pub version: U32,
    /// CRC-32C of the 4096 bytes with this field 0.
    pub crc: U32,
    /// +1 at every write; copy A has the even ones, B the odd ones.
    pub seq: U64,
    /// This journal.
    pub journal_uuid: [u8; 16],
    /// The group it belongs to.
    pub group_uuid: [u8; 16],
    /// Chunk size in bytes: 1 to 64 MiB, a power of two.
    pub chunk_size: U64,
    /// Number of chunk slots.
    pub n_slots: U32,
    /// A `MODE_*`.
    pub mode: u8,
    /// 1 after a clean stop.
    pub clean: u8,
    /// Number of disks.
    pub n_disks: u8,
    /// Number of history entries in use.
    pub n_history: u8,
    /// +1 at each unclean start.
    pub incarnation: U64,
    /// +1 at each change of who may write.
    pub generation: U64,
    /// All records below are on the disks (ruling 3).
    pub checkpoint: U64,
    /// The batch at `checkpoint` must carry this `prev_crc`.
    pub checkpoint_prev_crc: U32,
    /// 0.
    pub reserved0: U32,
    /// The target holds everything below, durably.
    pub ship_floor: U64,
    /// Frozen: where the kept backlog ended.
    pub frozen_at: U64,
    /// 0.
    pub reserved1: [U64; 8],
    /// Newest last.
    pub history: [History; HISTORY_MAX],
    /// The disks, in the order of their index.
    pub disks: [SuperDisk; DISKS_MAX],
    /// 0.
    pub reserved: [u8; 328],
}

/// Nothing is retained for a target: none was ever seeded.
pub const MODE_NEW: u8 = 0;
/// Batches from `ship_floor` on are kept for the target.
pub const MODE_SHIPPING: u8 = 1;
/// The journal overflowed: recycled by checkpoint only; a full seed is due.
pub const MODE_FROZEN: u8 = 2;

/// Disks in a group.
pub const DISKS_MAX: usize = 32;
/// Ended incarnations that are remembered.
pub const HISTORY_MAX: usize = 32;
/// First bytes of a super block.
pub const SUPER_MAGIC: [u8; 8] = *b"SFJRNL01";
/// First bytes of a chunk.
pub const CHUNK_MAGIC: u64 = u64::from_le_bytes(*b"SFCHUNK1");
/// First bytes of a batch.
pub const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"SFBT");
/// Format version written and understood.
pub const JOURNAL_VERSION: u8 = 1;
/// Unit of positions: batches start at multiples of it.
pub const PAGE: u64 = 4096;
/// Where super block A is.
pub const SUPER_A: u64 = 0;
/// Where super block B is.
pub const SUPER_B: u64 = 1 << 20;
/// Where slot 0 is.
pub const SLOTS_AT: u64 = 2 << 20;
/// Smallest chunk.
pub const CHUNK_MIN: u64 = 1 << 20;
/// Largest chunk.
pub const CHUNK_MAX: u64 = 64 << 20;
/// Fewest chunks in a journal.
pub const SLOTS_MIN: u32 = 4;
/// Descriptors that fit beside the header in the first page.
pub const RECS_MAX: usize = (PAGE as usize - size_of::<BatchHdr>()) / size_of::<RecDesc>();

const _: () = assert!(size_of::<RecDesc>() == 40);
const _: () = assert!(size_of::<BatchHdr>() == 128);
const _: () = assert!(size_of::<ChunkHdr>() == 64);
const _: () = assert!(size_of::<SuperDisk>() == 96);
const _: () = assert!(size_of::<JournalSuper>() == 4096);
const _: () = assert!(RECS_MAX == 99);
const _: () = assert!(RECS_MAX < PAGE as usize, "a record's LSN stays below its batch's end");
