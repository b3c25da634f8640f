//! Reads whole durable batches for the replicator and for `inspect`: from the
//! arena while they are there, else from the chunk file. Read-only; may be
//! killed at any time; never blocks the filter and takes no lock.
//!
//! The arena is read with `pread`, by pieces, and its floor is looked at again after each: if it is
//! still at or below what was read, nothing of that was overwritten meanwhile (ruling 12). Every batch
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
    /// batch, into `out` (what was in it is over; it may be longer than what is read). PAD
    /// batches are skipped. Returns the batches in order and the position behind the last one
    /// (behind any pad).
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
        let found = collect(self.geometry, self.id, (at, want, ARENA_PIECE), out, &mut read);
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
                Some(slot) => match self.read_slot(slot, at, want, out)? {
                    Collected::Some(batches, next) => return Ok((batches, next)),
                    Collected::Missing => None,
                    Collected::Bad(why) => Some(why),
                },
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

    /// From the slot that holds `at`. A sector that cannot be read is damage like any other, and
    /// what is before it is not. Should it only be so for a while, several sessions have to find it
    /// at the same place before anything follows from it.
    fn read_slot(&self, slot: u32, at: u64, want: u64, out: &mut Vec<u8>) -> io::Result<Collected> {
        let (base, chunk) = (self.geometry.slot_at(slot), self.geometry.chunk);
        let mut read = |at: u64, buf: &mut [u8]| {
            self.journal.read_exact_at(base + at % chunk, buf)?;
            Ok(true)
        };
        match collect(self.geometry, self.id, (at, want, want as usize), out, &mut read) {
            Err(error) if is_lost(&error) => {
                tracing::warn!(%error, at, "reading the journal, now by pages");
            }
            found => return found,
        }
        let mut read_or_lost = |at: u64, buf: &mut [u8]| match read(at, buf) {
            Err(error) if is_lost(&error) => Ok(false),
            done => done,
        };
        let by_pages = (at, want, PAGE as usize);
        Ok(match collect(self.geometry, self.id, by_pages, out, &mut read_or_lost)? {
            Collected::Missing => Collected::Bad("a sector cannot be read"),
            found => found,
        })
    }

    fn find_chunks(&mut self) -> io::Result<()> {
        self.chunks = read_chunks(self.journal.as_ref(), &self.sup, 0)?;
        Ok(())
    }
}

/// Whether the device, or what is in front of it, cannot read this.
fn is_lost(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    code.is_some_and(|code| [Errno::IO, Errno::NODATA, Errno::ILSEQ, Errno::BADMSG].contains(&code))
}

enum Collected {
    Some(Vec<BatchRef>, u64),
    Missing,
    Bad(&'static str),
}

/// Reads `[at, at + want)` by about `piece` bytes, and takes the whole, valid batches at its start.
/// What was read is checked while the processor has it: by pieces, if reading costs no more for that.
fn collect(
    geometry: ChunkGeometry,
    id: u64,
    (at, want, piece): (u64, u64, usize),
    out: &mut Vec<u8>,
    read: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<bool>,
) -> io::Result<Collected> {
    let want = want as usize;
    // What is behind is from an earlier read.
    let mut filled = 0;
    let mut fill = |out: &mut Vec<u8>, filled: &mut usize, to: usize| {
        let from = std::mem::replace(filled, to);
        out.resize(out.len().max(to), 0);
        read(at + from as u64, &mut out[from..to])
    };
    let mut batches: Vec<BatchRef> = Vec::new();
    let mut place = 0;
    while place < want {
        let next = want.min(place + piece);
        if place + PAGE as usize > filled && !fill(out, &mut filled, next)? {
            return Ok(taken(geometry, at, batches, place).unwrap_or(Collected::Missing));
        }
        let lsn = at + place as u64;
        let parsed = parse_batch(&out[place..filled]).filter(|(hdr, _)| {
            let end = lsn + u64::from(hdr.total_len.get());
            hdr.lsn.get() == lsn && hdr.journal_id.get() == id && end <= geometry.chunk_end(lsn)
        });
        let Some((hdr, descs)) = parsed else {
            let bad = Collected::Bad("a batch's header is not valid");
            return Ok(taken(geometry, at, batches, place).unwrap_or(bad));
        };
        let end = place + hdr.total_len.get() as usize;
        if hdr.flags & BATCH_PAD != 0 {
            return Ok(Collected::Some(batches, geometry.normal(at + end as u64)));
        }
        if end > want && !batches.is_empty() {
            break;
        }
        let next = end.max(want.min(filled + piece));
        if end > filled && !fill(out, &mut filled, next)? {
            return Ok(taken(geometry, at, batches, place).unwrap_or(Collected::Missing));
        }
        if !payloads_ok(&hdr, &descs, &out[place..end]) {
            let bad = Collected::Bad("a record's checksum does not match");
            return Ok(taken(geometry, at, batches, place).unwrap_or(bad));
        }
        batches.push(BatchRef { hdr, bytes: place..end });
        place = end;
    }
    Ok(Collected::Some(batches, geometry.normal(at + place as u64)))
}

/// What was collected before `place`, if there is any.
fn taken(
    geometry: ChunkGeometry,
    at: u64,
    batches: Vec<BatchRef>,
    place: usize,
) -> Option<Collected> {
    let next = geometry.normal(at + place as u64);
    (!batches.is_empty()).then_some(Collected::Some(batches, next))
}

/// Bytes of the arena that are read, then checked: they fit in a processor's own cache with what
/// they are read from.
const ARENA_PIECE: usize = 256 << 10;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

    use super::super::batch::finish_batch;
    use super::super::format::RecOp;
    use super::*;
    use crate::crc32c;

    const GEOMETRY: ChunkGeometry = ChunkGeometry { chunk: 1 << 20, slots: 2 };
    const PAGES: usize = PAGE as usize;

    /// A batch of one record, with so many pages in all.
    fn batch(lsn: u64, pages: usize, flags: u8) -> Vec<u8> {
        let mut bytes = vec![lsn as u8; pages * PAGES];
        let payload = &bytes[PAGES..];
        let desc = RecDesc {
            op: RecOp::Write as u8,
            len: (payload.len() as u32).into(),
            lsn: lsn.into(),
            payload_off: (PAGE as u32).into(),
            crc: crc32c::crc32c(payload).into(),
            ..Default::default()
        };
        let descs = &[desc][..usize::from(flags & BATCH_PAD == 0)];
        let total_len = (bytes.len() as u32).into();
        let mut hdr = BatchHdr { flags, lsn: lsn.into(), total_len, ..Default::default() };
        finish_batch(&mut hdr, descs);
        bytes[..size_of::<BatchHdr>()].copy_from_slice(hdr.as_bytes());
        bytes[size_of::<BatchHdr>()..][..descs.as_bytes().len()].copy_from_slice(descs.as_bytes());
        bytes
    }

    /// What is found of `stream` from `PAGE` on, reading by `piece`: batches, and the end. Whoever
    /// reads from `gone` on is told that it is no more there.
    fn found(stream: &[u8], want: usize, piece: usize, gone: u64) -> Option<(Vec<BatchRef>, u64)> {
        let mut out = vec![7; 3];
        let mut read_to = PAGE;
        let mut read = |at: u64, buf: &mut [u8]| {
            assert_eq!(at, read_to, "everything is read once");
            read_to += buf.len() as u64;
            buf.copy_from_slice(&stream[at as usize - PAGES..][..buf.len()]);
            Ok(at < gone)
        };
        match collect(GEOMETRY, 0, (PAGE, want as u64, piece), &mut out, &mut read).unwrap() {
            Collected::Some(batches, next) => {
                for batch in &batches {
                    let at = batch.hdr.lsn.get() as usize - PAGES;
                    assert_eq!(out[batch.bytes.clone()], stream[at..at + batch.bytes.len()]);
                }
                Some((batches, next))
            }
            Collected::Missing | Collected::Bad(_) => None,
        }
    }

    fn stream(pages: &[usize]) -> Vec<u8> {
        pages.iter().fold(Vec::new(), |mut stream, pages| {
            let lsn = PAGE + stream.len() as u64;
            stream.extend(batch(lsn, *pages, 0));
            stream
        })
    }

    #[test]
    fn by_pieces_is_read_what_is_read_at_once() {
        let mut stream = stream(&[3, 2, 9, 2, 4]);
        let pad = batch(PAGE + stream.len() as u64, 6, BATCH_PAD);
        stream.extend(pad);
        for want in (1..=stream.len() / PAGES).map(|pages| pages * PAGES) {
            let (all, end) = found(&stream, want, want, u64::MAX).unwrap();
            assert!(!all.is_empty(), "one at least, however little is wanted");
            for piece in (1..12).map(|pages| pages * PAGES) {
                let (batches, next) = found(&stream, want, piece, u64::MAX).unwrap();
                assert_eq!((batches.len(), next), (all.len(), end), "{want} by {piece}");
            }
        }
        assert_eq!(found(&stream, stream.len(), PAGES, u64::MAX).unwrap().0.len(), 5);
    }

    #[test]
    fn what_was_read_before_a_piece_that_is_gone_or_damaged_counts() {
        let mut stream = stream(&[3, 2, 9, 2]);
        let third = PAGE * 6;
        let whole = |found: Option<(Vec<BatchRef>, u64)>| found.map(|(b, next)| (b.len(), next));
        let by_pages = |stream: &[u8], gone| whole(found(stream, stream.len(), PAGES, gone));
        assert_eq!(by_pages(&stream, third), Some((2, third)));
        assert_eq!(by_pages(&stream, third + PAGE), Some((2, third)));
        assert_eq!(by_pages(&stream, PAGE), None);
        assert_eq!(by_pages(&stream, 2 * PAGE), None);
        stream[7 * PAGES] ^= 1;
        assert_eq!(by_pages(&stream, u64::MAX), Some((2, third)));
        stream[5 * PAGES] ^= 1;
        assert_eq!(by_pages(&stream, u64::MAX), Some((2, third)));
        stream[PAGES] ^= 1;
        assert_eq!(by_pages(&stream, u64::MAX), None);
    }
}
