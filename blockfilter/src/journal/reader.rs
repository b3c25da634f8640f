//! Reads whole durable batches for the replicator and for `inspect`: from the
//! arena while they are there, else from the chunk file. Read-only; may be
//! killed at any time; never blocks the filter.

use std::io;
use std::ops::Range;

use super::format::BatchHdr;
use crate::config::GroupConfig;
use crate::names::Lsn;

/// A reader of one group's journal.
#[derive(Debug)]
pub struct JournalReader {}

/// One batch inside the buffer that [`JournalReader::read`] filled.
#[derive(Clone, Debug)]
pub struct BatchRef {
    /// Its header, checked.
    pub hdr: BatchHdr,
    /// Its bytes in the buffer, header page first.
    pub bytes: Range<usize>,
}

/// Why nothing could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The position is no longer kept (overwritten in the arena, recycled in the file).
    #[error("the journal no longer holds position {0}")]
    Gone(Lsn),
    /// Durable data is damaged.
    #[error("the journal is damaged at position {0}: {1}")]
    Damaged(Lsn, &'static str),
    /// The system failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl JournalReader {
    /// Opens journal and arena of a group.
    pub fn open(_config: &GroupConfig) -> Result<Self, ReadError> {
        Err(ReadError::Io(io::ErrorKind::Unsupported.into()))
    }

    /// Reads whole batches from position `from` (a batch's start, or a chunk's
    /// start) up to at most `durable`, at most about `max` bytes but at least one
    /// batch, into `out` (cleared first). PAD batches are skipped. Returns the
    /// batches in order and the position behind the last one (behind any pad).
    /// Headers and payload CRCs are checked.
    pub fn read(
        &mut self,
        from: Lsn,
        _durable: Lsn,
        _max: usize,
        _out: &mut Vec<u8>,
    ) -> Result<(Vec<BatchRef>, Lsn), ReadError> {
        Err(ReadError::Gone(from))
    }
}
