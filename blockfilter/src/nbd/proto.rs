//! Numbers of the NBD protocol (NetworkBlockDevice/nbd `doc/proto.md`), and the
//! only place that knows that its integers are big-endian.
//!
//! Fixed newstyle handshake, simple and structured replies. Not here: extended
//! headers (offers of them are refused with `ERR_UNSUP`).

/// `NBDMAGIC`, first in the server's greeting.
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, second in the greeting and first in each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First in each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First in each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First in a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First in a structured reply's chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags of the server: fixed newstyle, no zeroes.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// The server can leave out 124 zeroes after EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 2;
/// The client's answer to [`FLAG_FIXED_NEWSTYLE`].
pub const CLIENT_FIXED_NEWSTYLE: u32 = 1;
/// The client's answer to [`FLAG_NO_ZEROES`].
pub const CLIENT_NO_ZEROES: u32 = 2;

/// Options.
pub mod opt {
    /// Ends the handshake without error replies.
    pub const EXPORT_NAME: u32 = 1;
    /// The client goes away.
    pub const ABORT: u32 = 2;
    /// Lists exports.
    pub const LIST: u32 = 3;
    /// Changes to TLS.
    pub const STARTTLS: u32 = 5;
    /// Tells about an export.
    pub const INFO: u32 = 6;
    /// Tells about an export and begins transmission.
    pub const GO: u32 = 7;
    /// Structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Lists metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub mod rep {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The bit that marks an error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// Not allowed.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// Malformed or out of order.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// Only after STARTTLS.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is going away.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The option's payload is too large.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
}

/// Kinds of [`rep::INFO`].
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is known.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is known.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is known.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is known.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is known.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see one another's writes, and FLUSH covers all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is known.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO is known.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub mod cmd {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect.
    pub const DISC: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Trim.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Allocation.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod cmd_flag {
    /// This command's effect is stable when answered.
    pub const FUA: u16 = 1;
    /// Keep zeroes allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Answer a read in one chunk.
    pub const DF: u16 = 1 << 2;
    /// Answer with one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than be slow.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Chunks of structured replies.
pub mod chunk {
    /// The last chunk of a reply.
    pub const FLAG_DONE: u16 = 1;
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Data.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// The bit that marks an error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = ERROR_BIT | 1;
}

/// `base:allocation`: nothing is allocated.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 2;
/// `standfast:dirty`: it may differ from what the target durably holds.
pub const STATE_DIRTY: u32 = 1;
/// The context of holes and zeroes, which every export has.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The context of what the target may lack, of the disks that a group's filter exports.
///
/// State 0: the target durably holds this extent as it is now. [`STATE_DIRTY`] (the bit of
/// `qemu:dirty-bitmap`): it may not. Clean is never said of what may differ, as far as the
/// target's last word goes and as far as the disk was written through its filter only; dirty is
/// also said of what is equal: of a block of 64 KiB for a change of a part of it, until the
/// target has also taken what was ahead of that when it was found behind, of everything until
/// the first copy is complete, while the group is frozen or its journal or a disk failed, and
/// from a start of the filter until the target holds what was written before it.
pub const STANDFAST_DIRTY: &str = "standfast:dirty";

/// A metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// [`BASE_ALLOCATION`].
    Allocation,
    /// [`STANDFAST_DIRTY`].
    Dirty,
}

impl Context {
    /// In the order of their ids.
    pub const ALL: [Self; 2] = [Self::Allocation, Self::Dirty];

    /// Its id once chosen.
    pub fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Dirty => 2,
        }
    }

    /// Its name, `namespace:leaf`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Allocation => BASE_ALLOCATION,
            Self::Dirty => STANDFAST_DIRTY,
        }
    }

    /// Whether a query names it; in a list a namespace alone stands for all that is in it.
    pub fn is_meant(self, query: &str, list: bool) -> bool {
        query == self.name()
            || (list && query.ends_with(':') && self.name().strip_prefix(query).is_some())
    }
}

/// A set of [`Context`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contexts(u32);

impl Contexts {
    /// Every one.
    pub const ALL: Self = Self(0b11);

    /// With one more.
    #[must_use]
    pub fn with(self, context: Context) -> Self {
        Self(self.0 | 1 << (context.id() - 1))
    }

    /// What both have.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether it is in it.
    pub fn has(self, context: Context) -> bool {
        self.and(Self::default().with(context)).0 != 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Longest string in the protocol, in bytes.
pub const STRING_MAX: usize = 4096;
/// Length of a request's header.
pub const REQUEST_LEN: usize = 28;
/// Length of a simple reply.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of a chunk's header.
pub const CHUNK_LEN: usize = 20;

/// Reads fields from a slice, front to back; a short slice is None, never a panic.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length in four bytes before it, at most [`STRING_MAX`].
    pub fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        if len > STRING_MAX {
            return None;
        }
        std::str::from_utf8(self.bytes(len)?).ok()
    }
}

/// Appends fields to a buffer.
pub trait Put {
    /// Two bytes.
    fn put16(&mut self, value: u16);
    /// Four bytes.
    fn put32(&mut self, value: u32);
    /// Eight bytes.
    fn put64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn put16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }
    fn put32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }
    fn put64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }
}
