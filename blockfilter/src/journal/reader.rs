//! Reads whole durable batches for the replicator and for `inspect`: from the
//! arena while they are there, else from the chunk file. Read-only; may be
//! killed at any time; never blocks the filter and takes no lock.
//!
//! The arena is read with `pread`, then its floor is looked at again: if it is still
//! at or below what was read, nothing was overwritten meanwhile (ruling 12). Every batch
//! is checked (place, header CRC, payload CRCs) whichever way it came (I10).

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::batch::{parse_batch, payloads_ok, short_id};
use super::chunks::ChunkGeometry;
use super::format::{BATCH_PAD, BatchHdr, JournalSuper, PAGE, RecDesc};
use super::geometry_of;
use super::open::{OpenError, read_chunks, read_super};
use crate::arena::{ARENA_MAGIC, ArenaHdr, RING_AT, Word};
use crate::config::GroupConfig;
use crate::engine::real::RealFiles;
use crate::engine::{File, Files, Open};
use crate::names::Lsn;

/// A reader of one group's journal.
#[derive(Debug)]
pub struct JournalReader {
    journal: Arc<dyn File>,
    sup: JournalSuper,
    geometry: ChunkGeometry,
    id: u64,
    chunks: BTreeMap<u64, u32>,
    files: Arc<dyn Files>,
    arena_path: PathBuf,
    arena_bytes: u64,
    arena: Option<Arc<dyn File>>,
}

/// One batch inside the buffer that [`JournalReader::read`] filled.
#[derive(Clone, Debug)]
pub struct BatchRef {
    /// Its header, checked.
    pub hdr: BatchHdr,
    /// Its bytes in the buffer, header page first.
    pub bytes: Range<usize>,
}

impl BatchRef {
    /// Its records, checked before, from the buffer it is in.
    pub fn descs(&self, buffer: &[u8]) -> Vec<RecDesc> {
        parse_batch(&buffer[self.bytes.clone()]).map(|(_, descs)| descs).unwrap_or_default()
    }
}

/// Why nothing could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The position is no longer kept (overwritten in the arena, recycled in the file).
    #[error("the journal no longer holds position {0}")]
    Gone(Lsn),
    /// The group started anew after a loss: what was read before may have been taken back.
    #[error("the group is in incarnation {found}, and this reader was opened in {expected}")]
    Incarnation {
        /// When the reader was opened.
        expected: u64,
        /// Now.
        found: u64,
    },
    /// Durable data is damaged.
    #[error("the journal is damaged at position {0}: {1}")]
    Damaged(Lsn, &'static str),
    /// The journal cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The system failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl JournalReader {
    /// Opens journal and arena of a group.
    pub fn open(config: &GroupConfig) -> Result<Self, ReadError> {
        Self::open_in(Arc::new(RealFiles), config)
    }

    /// As [`JournalReader::open`], on any files.
    pub fn open_in(files: Arc<dyn Files>, config: &GroupConfig) -> Result<Self, ReadError> {
        let journal = files.open(&config.journal, Open::Direct)?;
        let sup = read_super(journal.as_ref(), config)?;
        let mut reader = Self {
            journal,
            geometry: geometry_of(&sup),
            id: short_id(&sup.journal_uuid),
            sup,
            chunks: BTreeMap::new(),
            files,
            arena_path: config.arena_path(),
            arena_bytes: config.arena_bytes,
            arena: None,
        };
        reader.find_chunks()?;
        Ok(reader)
    }

    /// Reads whole batches from position `from` (a batch's start, or a chunk's
    /// start) up to at most `durable`, at most about `max` bytes but at least one
    /// batch, into `out` (its content is replaced). PAD batches are skipped. Returns the
    /// batches in order and the position behind the last one (behind any pad).
    /// Headers and payload CRCs are checked.
    pub fn read(
        &mut self,
        from: Lsn,
        durable: Lsn,
        max: usize,
        out: &mut Vec<u8>,
    ) -> Result<(Vec<BatchRef>, Lsn), ReadError> {
        let mut at = self.geometry.normal(from.0);
        loop {
            if at >= durable.0 {
                out.clear();
                return Ok((Vec::new(), Lsn(at)));
            }
            let end = self.geometry.chunk_end(at).min(durable.0);
            let want = (end - at).min((max as u64).next_multiple_of(PAGE).max(PAGE));
            let (batches, next) = match self.read_arena(at, want, out)? {
                Some(found) => found,
                None => self.read_file(at, want, out)?,
            };
            for batch in &batches {
                self.check_incarnation(batch.hdr.incarnation.get())?;
            }
            if !batches.is_empty() {
                return Ok((batches, Lsn(next)));
            }
            at = next;
        }
    }

    /// None: the arena has it no more, or not yet, or not intact; the file decides.
    fn read_arena(
        &mut self,
        at: u64,
        want: u64,
        out: &mut Vec<u8>,
    ) -> Result<Option<(Vec<BatchRef>, u64)>, ReadError> {
        if self.arena.is_none() {
            self.arena = self.open_arena()?;
        }
        let Some(arena) = self.arena.clone() else { return Ok(None) };
        let floor = |arena: &dyn File| -> io::Result<u64> {
            let mut word = [0; 8];
            arena.read_exact_at(Word::Floor as u64, &mut word)?;
            Ok(u64::from_le_bytes(word))
        };
        let mut read = |at: u64, buf: &mut [u8]| {
            arena.read_exact_at(RING_AT + at % self.arena_bytes, buf)?;
            Ok(floor(arena.as_ref())? <= at)
        };
        let found = collect(self.geometry, self.id, at, want, out, &mut read);
        match found {
            Ok(Collected::Some(batches, next)) => Ok(Some((batches, next))),
            Ok(Collected::Missing | Collected::Bad(_)) | Err(_) => {
                // A restarted filter may have made a new one.
                self.arena = None;
                Ok(None)
            }
        }
    }

    /// The arena, if it is of this journal and incarnation.
    fn open_arena(&self) -> Result<Option<Arc<dyn File>>, ReadError> {
        let Ok(arena) = self.files.open(&self.arena_path, Open::Read) else { return Ok(None) };
        let mut hdr = ArenaHdr::default();
        let read = arena.read_exact_at(0, hdr.as_mut_bytes());
        if read.is_err() || hdr.magic != ARENA_MAGIC || hdr.journal_uuid != self.sup.journal_uuid {
            return Ok(None);
        }
        let found = hdr.incarnation.get();
        // The memory of a start that writes the journal back is of none.
        if found != u64::MAX {
            self.check_incarnation(found)?;
        }
        Ok((found == self.sup.incarnation.get()).then_some(arena))
    }

    fn check_incarnation(&self, found: u64) -> Result<(), ReadError> {
        let expected = self.sup.incarnation.get();
        if found > expected {
            return Err(ReadError::Incarnation { expected, found });
        }
        Ok(())
    }

    fn read_file(
        &mut self,
        at: u64,
        want: u64,
        out: &mut Vec<u8>,
    ) -> Result<(Vec<BatchRef>, u64), ReadError> {
        let mut refreshed = false;
        loop {
            let slot = self.chunks.get(&self.geometry.chunk_of(at)).copied();
            let problem = match slot {
                None => None,
                Some(slot) => {
                    let base = self.geometry.slot_at(slot);
                    let chunk = self.geometry.chunk;
                    let journal = self.journal.clone();
                    let mut read = |at: u64, buf: &mut [u8]| {
                        journal.read_exact_at(base + at % chunk, buf)?;
                        Ok(true)
                    };
                    match collect(self.geometry, self.id, at, want, out, &mut read)? {
                        Collected::Some(batches, next) => return Ok((batches, next)),
                        Collected::Missing => None,
                        Collected::Bad(why) => Some(why),
                    }
                }
            };
            if refreshed {
                return Err(match problem {
                    Some(why) => ReadError::Damaged(Lsn(at), why),
                    None => ReadError::Gone(Lsn(at)),
                });
            }
            refreshed = true;
            self.find_chunks()?;
        }
    }

    fn find_chunks(&mut self) -> io::Result<()> {
        self.chunks = read_chunks(self.journal.as_ref(), &self.sup, 0)?;
        Ok(())
    }
}

enum Collected {
    Some(Vec<BatchRef>, u64),
    Missing,
    Bad(&'static str),
}

/// Reads `[at, at + want)` and takes the whole, valid batches at its start.
fn collect(
    geometry: ChunkGeometry,
    id: u64,
    at: u64,
    want: u64,
    out: &mut Vec<u8>,
    read: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<bool>,
) -> io::Result<Collected> {
    out.resize(want as usize, 0);
    if !read(at, out)? {
        return Ok(Collected::Missing);
    }
    let mut batches: Vec<BatchRef> = Vec::new();
    let mut place = 0;
    while place < out.len() {
        let lsn = at + place as u64;
        let parsed = parse_batch(&out[place..]).filter(|(hdr, _)| {
            let end = lsn + u64::from(hdr.total_len.get());
            hdr.lsn.get() == lsn && hdr.journal_id.get() == id && end <= geometry.chunk_end(lsn)
        });
        let Some((hdr, descs)) = parsed else {
            if batches.is_empty() {
                return Ok(Collected::Bad("a batch's header is not valid"));
            }
            break;
        };
        let total = hdr.total_len.get() as usize;
        if hdr.flags & BATCH_PAD != 0 {
            let next = geometry.normal(lsn + total as u64);
            return Ok(Collected::Some(batches, next));
        }
        if place + total > out.len() {
            if !batches.is_empty() {
                break;
            }
            out.resize(total, 0);
            if !read(at, out)? {
                return Ok(Collected::Missing);
            }
        }
        if !payloads_ok(&hdr, &descs, &out[place..place + total]) {
            if batches.is_empty() {
                return Ok(Collected::Bad("a record's checksum does not match"));
            }
            break;
        }
        batches.push(BatchRef { hdr, bytes: place..place + total });
        place += total;
    }
    Ok(Collected::Some(batches, geometry.normal(at + place as u64)))
}
