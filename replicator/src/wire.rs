//! The wire format between replicator and target, version 1, inside TLS 1.3.
//! Little endian, sizes in bytes. (pure)
//!
//! ```text
//! frame    0       128 B    FrameHdr
//!          128     40 B *   RecDesc (data frames only), stored and sent uncompressed
//!          …       enc_len  body: payloads as one blob, compressed as `codec` says, perhaps
//!                           with zeroes behind them that belong to no record;
//!                           of the other kinds: a JSON document
//! ```
//!
//! Data frames are stored in segments exactly as they were received (decision
//! 8): ingest checks three CRCs and decompresses nothing.
//!
//! *Kinds.* `Epoch`: records of whole batches `[lsn_from, lsn_to)`, LSN order,
//! dense over frames; the last frame of an epoch has EPOCH_END and its `lsn_to` is
//! a recovery point; frames of an unfinished epoch count for nothing. `Copy`: blocks
//! of a seed or resync, all at LSN `lsn_from == lsn_to == s`, only `Write` and `Zero`.
//! `Hello`, `HelloAck`, `SeedBegin`, `SeedEnd`, `Heartbeat`, `Ack`, `Error`,
//! `Rpc`, `RpcReply`, `Bye`: JSON bodies ([`crate::session`]), so that sites may be
//! upgraded one at a time (unknown fields are ignored).
//!
//! *Limits.* A frame has at most [`FRAME_RECS_MAX`] records, [`FRAME_RAW_MAX`]
//! bytes of payload and [`FRAME_JSON_MAX`] of JSON; a reader checks them before it
//! allocates. Unknown version, kind or codec, or a failed CRC ends the session.

use blockfilter::journal::format::RecDesc;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use crate::frame::{FrameBuf, FrameError, check_header};

/// Head of every frame. 128 bytes.
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
pub struct FrameHdr {
    /// [`FRAME_MAGIC`].
    pub magic: U32,
    /// [`WIRE_VERSION`].
    pub version: u8,
    /// A [`Kind`].
    pub kind: u8,
    /// `FRAME_*` bits.
    pub flags: u8,
    /// A [`CodecId`].
    pub codec: u8,
    /// CRC-32C of these 128 bytes with this field 0.
    pub hdr_crc: U32,
    /// CRC-32C of the descriptors.
    pub desc_crc: U32,
    /// CRC-32C of the body as sent and stored.
    pub body_crc: U32,
    /// Number of descriptors.
    pub n_rec: U32,
    /// First half of the group's id ([`crate::session::group_id`]).
    pub group_id: U64,
    /// The writer's generation.
    pub generation: U64,
    /// The incarnation that the records belong to.
    pub incarnation: U64,
    /// Where the frame's records start (for Copy: s).
    pub lsn_from: U64,
    /// Where they end, exclusive (for Copy: s).
    pub lsn_to: U64,
    /// Epoch: the source's wall clock at the end of its last batch, microseconds.
    pub wall_us: U64,
    /// Payload bytes before compression.
    pub raw_len: U32,
    /// Body bytes as sent and stored.
    pub enc_len: U32,
    /// Copy: the disk of `cursor`.
    pub cursor_disk: U32,
    /// 0.
    pub reserved0: U32,
    /// Copy: everything of `cursor_disk` below this byte offset has been sent,
    /// this frame included; lower disk indexes are complete.
    pub cursor: U64,
    /// 0.
    pub reserved: [U64; 4],
}

/// Kinds of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Records of the stream.
    Epoch = 1,
    /// Blocks of a seed or resync.
    Copy = 2,
    /// Source to target, first.
    Hello = 16,
    /// Target to source, the answer.
    HelloAck = 17,
    /// A seed or resync starts at s.
    SeedBegin = 18,
    /// It is complete once everything below e is applied.
    SeedEnd = 19,
    /// Source to target: `{admitted, age_us, mono_us, echo}`, at least every 100 ms.
    Heartbeat = 20,
    /// Target to source: what is durable, and when it said so.
    Ack = 21,
    /// Either side, before it closes: what failed, why, what to do.
    Error = 22,
    /// A request of the agent (enrol, look a name up).
    Rpc = 23,
    /// Its answer.
    RpcReply = 24,
    /// A clean goodbye.
    Bye = 25,
}

impl Kind {
    /// The kind of a wire value.
    pub const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Epoch,
            2 => Self::Copy,
            16 => Self::Hello,
            17 => Self::HelloAck,
            18 => Self::SeedBegin,
            19 => Self::SeedEnd,
            20 => Self::Heartbeat,
            21 => Self::Ack,
            22 => Self::Error,
            23 => Self::Rpc,
            24 => Self::RpcReply,
            25 => Self::Bye,
            _ => return None,
        })
    }
}

/// How a body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CodecId {
    /// As it is.
    None = 0,
    /// One zstd frame, any level.
    Zstd = 1,
}

impl CodecId {
    /// The codec of a wire value.
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::None),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Last frame of an epoch: `lsn_to` is a recovery point.
pub const FRAME_EPOCH_END: u8 = 1;
/// The epoch ends with a Mark record.
pub const FRAME_MARK: u8 = 2;

/// First bytes of a frame.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"SFFR");
/// Version written and understood.
pub const WIRE_VERSION: u8 = 1;
/// Most descriptors in a frame.
pub const FRAME_RECS_MAX: u32 = 4096;
/// Uncompressed frames with a payload are a multiple of this long, in bytes: zeroes behind the
/// last payload make up for it. So the target, which keeps frames one behind the other, can write
/// them past its page cache from where they are, as long as no others are between them.
pub const FRAME_ALIGN: usize = 512;
/// Most payload bytes in a frame, before compression (and so stored).
pub const FRAME_RAW_MAX: u32 = 4 << 20;
/// Largest JSON body.
pub const FRAME_JSON_MAX: u32 = 1 << 20;

const _: () = assert!(size_of::<FrameHdr>() == 128);
const _: () = assert!(size_of::<RecDesc>() == 40);
