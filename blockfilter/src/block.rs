//! The block contract: what every layer that serves blocks promises.
//!
//! * A write that was answered is seen by every later read, on every connection.
//! * FLUSH: when it is answered, every write answered before it was sent is on
//!   stable storage, whichever connection it came by (so multi-conn is safe).
//! * FUA on any command: that command's own effect is stable when answered.
//! * TRIM and WRITE_ZEROES both read back as zeroes, to the byte, on both sides.
//! * Overlapping requests in flight together take effect in one order, the same
//!   in the journal, on the disk and at the target.
//! * A request that was not answered may or may not have happened, but it does
//!   not happen later: once its connection is gone it is done or dropped.
//!
//! Requests are validated once, at the edge ([`check_range`]), and asserted inside.

use std::fmt::Debug;
use std::io;

/// The errors that NBD and FUSE clients may see. One mapping, here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// Operation not permitted (a write to a read-only export).
    Perm,
    /// The device failed.
    Io,
    /// Out of memory or of a bounded queue.
    NoMem,
    /// The request is not valid.
    Inval,
    /// No space left, or a write past the end.
    NoSpc,
    /// Request too large for this connection.
    Overflow,
    /// Not supported, or not supported fast (FAST_ZERO).
    NotSup,
    /// The server is shutting down.
    Shutdown,
}

impl Errno {
    /// The value on the NBD wire, which is also Linux's errno.
    pub const fn code(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }

    /// The error of a wire value; anything unknown is `Io`.
    pub const fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Perm,
            12 => Self::NoMem,
            22 => Self::Inval,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Io,
        }
    }

    /// What a client is told about a failed system call.
    pub fn from_io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpc,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::Perm,
            io::ErrorKind::OutOfMemory => Self::NoMem,
            io::ErrorKind::InvalidInput => Self::Inval,
            io::ErrorKind::Unsupported => Self::NotSup,
            _ => Self::Io,
        }
    }
}

/// Allocation of a range, for `base:allocation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub len: u64,
    /// Nothing is allocated here.
    pub hole: bool,
    /// The range reads as zeroes.
    pub zero: bool,
}

/// What a client learns of an export when it opens it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes. Any byte below it can be addressed.
    pub size: u64,
    /// Writes are refused with `Perm`.
    pub read_only: bool,
    /// A FLUSH on one connection covers all of them, and all see the same
    /// content. False for exports whose name moves (`latest`).
    pub multi_conn: bool,
    /// Smallest request in bytes: 1 or 512.
    pub block_min: u32,
    /// Preferred request size in bytes.
    pub block_preferred: u32,
    /// WRITE_ZEROES with FAST_ZERO can succeed.
    pub fast_zero: bool,
    /// TRIM is worth sending.
    pub trim: bool,
    /// It tells what the target may lack: the context `standfast:dirty`.
    pub dirty_map: bool,
    /// One line for people.
    pub description: String,
}

/// A disk that can be read and written by blocking calls, one thread a
/// connection (`serve`, views and drills at the target). Offsets and lengths
/// are validated by the caller ([`check_range`]). Any error leaves the range's
/// content undefined, never anything outside it.
pub trait Export: Send + Sync + Debug {
    /// What a client learns on opening.
    fn info(&self) -> ExportInfo;
    /// Fills `buf` from `offset`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno>;
    /// Writes `data` at `offset`; with `fua` it is stable on return.
    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), Errno>;
    /// Makes the range read as zeroes. `no_hole`: keep it allocated. `fast`:
    /// fail with `NotSup` at once unless quicker than writing.
    fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno>;
    /// Deallocates; the range reads as zeroes afterwards.
    fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno>;
    /// Everything answered before the call is stable on return.
    fn flush(&self) -> Result<(), Errno>;
    /// Prefetches; may do nothing.
    fn cache(&self, _offset: u64, _len: u64) -> Result<(), Errno> {
        Ok(())
    }
    /// Extents that start at `offset`, cover at most `len` and at least one
    /// byte; at most `max` of them. Neighbours differ.
    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>, Errno>;
}

/// Flags of [`Export::zero`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// Keep the range allocated.
    pub no_hole: bool,
    /// Fail with `NotSup` rather than be slow.
    pub fast: bool,
    /// Stable on return.
    pub fua: bool,
}

/// Checks `offset + len <= size` without overflow. Reads past the end are
/// `Inval`, writes are `NoSpc` (NBD's rule).
pub fn check_range(offset: u64, len: u64, size: u64, write: bool) -> Result<(), Errno> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ if write => Err(Errno::NoSpc),
        _ => Err(Errno::Inval),
    }
}

/// Smallest unit the filter orders and stores, in bytes.
pub const SECTOR: u64 = 512;
/// Unit of the overlay and of the target's index, in bytes.
pub const BLOCK: u64 = 4096;
/// Largest payload of one request, in bytes (NBD's usual limit).
pub const PAYLOAD_MAX: u32 = 32 << 20;

const _: () = assert!(BLOCK.is_multiple_of(SECTOR) && BLOCK / SECTOR == 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_overflows_is_refused() {
        assert_eq!(check_range(u64::MAX, 2, u64::MAX, true), Err(Errno::NoSpc));
        assert_eq!(check_range(10, 1, 10, false), Err(Errno::Inval));
        assert_eq!(check_range(10, 0, 10, false), Ok(()));
    }
}
