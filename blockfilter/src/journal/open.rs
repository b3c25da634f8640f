//! Opening a journal: the super block, the chunk map, the scan to the end.
//!
//! Reads only. Replays nothing: it returns the batches that the disks may lack,
//! and the group writes them back before it serves (ruling 4).

use std::collections::BTreeMap;
use std::io;

use super::batch::{SuperError, choose_super, parse_batch, parse_chunk, payloads_ok, short_id};
use super::chunks::{ChunkGeometry, Slots};
use super::format::*;
use super::geometry_of;
use super::recover::{Decision, Seen, decide};
use crate::config::GroupConfig;
use crate::engine::File;

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Reading failed, or making durable what is there.
    #[error("the journal cannot be used: {0}")]
    Io(#[from] io::Error),
    /// No valid super block.
    #[error(transparent)]
    Super(#[from] SuperError),
    /// It belongs to another group.
    #[error("the journal belongs to another group ({found}); this group is {expected}")]
    Foreign {
        /// The group in the super block.
        found: uuid::Uuid,
        /// The group in the configuration.
        expected: uuid::Uuid,
    },
    /// The disks in it are not the configured ones.
    #[error("the journal's disks are not the group's: {0}")]
    Disks(String),
    /// The file is shorter than it says.
    #[error("the journal is {found} bytes long and should be {expected}")]
    Short {
        /// Length found.
        found: u64,
        /// Length expected.
        expected: u64,
    },
    /// Durable records are unreadable: they must not be cut off.
    #[error("the journal is damaged at position {0}, inside what was durable")]
    Damaged(u64),
}

/// A scanned journal.
#[derive(Debug)]
pub struct Scanned {
    /// The newest valid super block.
    pub sup: JournalSuper,
    /// Chunks in the file that are still needed.
    pub slots: Slots,
    /// Valid batches from the checkpoint on, whole, oldest first, pads left out.
    pub batches: Vec<ScannedBatch>,
    /// Where the log ends; the next batch goes here.
    pub end: u64,
    /// CRC of the last batch (pads included).
    pub end_crc: u32,
}

/// One batch as found in the file.
#[derive(Debug)]
pub struct ScannedBatch {
    /// Its header.
    pub hdr: BatchHdr,
    /// Its records.
    pub descs: Vec<RecDesc>,
    /// Where its bytes are in the file.
    pub file_offset: u64,
}

/// Reads the super block and checks that the journal is this group's.
pub fn read_super(file: &dyn File, config: &GroupConfig) -> Result<JournalSuper, OpenError> {
    let mut a = vec![0; PAGE as usize];
    let mut b = vec![0; PAGE as usize];
    let len = file.len()?;
    if len < SLOTS_AT {
        return Err(SuperError::NotAJournal.into());
    }
    file.read_exact_at(SUPER_A, &mut a)?;
    file.read_exact_at(SUPER_B, &mut b)?;
    let sup = choose_super(&a, &b)?;
    if sup.group_uuid != *config.uuid.as_bytes() {
        let found = uuid::Uuid::from_bytes(sup.group_uuid);
        return Err(OpenError::Foreign { found, expected: config.uuid });
    }
    let expected = geometry_of(&sup).file_len();
    if len < expected {
        return Err(OpenError::Short { found: len, expected });
    }
    if usize::from(sup.n_disks) != config.disks.len() {
        return Err(OpenError::Disks(format!("{} are recorded", sup.n_disks)));
    }
    for (have, want) in sup.disks.iter().zip(&config.disks) {
        if have.uuid != *want.uuid.as_bytes() || have.size.get() != want.size_bytes {
            return Err(OpenError::Disks(format!("{} differs", want.disk)));
        }
    }
    Ok(sup)
}

/// Finds which chunk is in which slot; chunks that end at or below `keep_from` are left out.
pub fn read_chunks(
    file: &dyn File,
    sup: &JournalSuper,
    keep_from: u64,
) -> io::Result<BTreeMap<u64, u32>> {
    let geometry = geometry_of(sup);
    let id = short_id(&sup.journal_uuid);
    let mut found: BTreeMap<u64, (u64, u32)> = BTreeMap::new();
    let mut page = vec![0; PAGE as usize];
    for slot in 0..geometry.slots {
        file.read_exact_at(geometry.slot_at(slot), &mut page)?;
        let Some(hdr) = parse_chunk(&page, id) else { continue };
        let chunk = hdr.chunk_no.get();
        if (chunk + 1).saturating_mul(geometry.chunk) <= keep_from {
            continue;
        }
        let incarnation = hdr.incarnation.get();
        let best = found.entry(chunk).or_insert((incarnation, slot));
        if incarnation > best.0 {
            *best = (incarnation, slot);
        }
    }
    Ok(found.into_iter().map(|(chunk, (_, slot))| (chunk, slot)).collect())
}

/// Scans from the checkpoint to the end of the log (table in [`super::recover`]).
pub fn scan(file: &dyn File, config: &GroupConfig) -> Result<Scanned, OpenError> {
    let sup = read_super(file, config)?;
    let checkpoint = sup.checkpoint.get();
    let keep_from = match sup.mode {
        MODE_SHIPPING => checkpoint.min(sup.ship_floor.get()),
        _ => checkpoint,
    };
    let slots = Slots::new(geometry_of(&sup), read_chunks(file, &sup, keep_from)?);
    let mut scanner =
        Scanner { file, geometry: geometry_of(&sup), id: short_id(&sup.journal_uuid) };
    let mut at = checkpoint;
    let mut crc = sup.checkpoint_prev_crc.get();
    // The checkpoint is not below the incarnation's start: what an earlier one left
    // behind its end is never taken, not even if a torn rewrite completes it.
    let mut incarnation = sup.incarnation.get();
    let mut batches = Vec::new();
    loop {
        let found = scanner.batch_at(&slots, at)?;
        let chain = found.as_ref().is_some_and(|(hdr, _, _)| {
            hdr.prev_crc.get() == crc && hdr.incarnation.get() >= incarnation
        });
        let payloads = match &found {
            Some((hdr, descs, offset)) if chain => scanner.payloads_at(hdr, descs, *offset)?,
            _ => false,
        };
        let kept = chain && payloads;
        let durable_beyond = !kept && scanner.durable_beyond(&slots, at)?;
        match decide(Seen { header: found.is_some(), chain, payloads, durable_beyond }) {
            Decision::Keep => {}
            Decision::Stop => break,
            Decision::Refuse => return Err(OpenError::Damaged(at)),
        }
        let Some((hdr, descs, file_offset)) = found else { break };
        crc = hdr.hdr_crc.get();
        incarnation = hdr.incarnation.get();
        at = scanner.geometry.normal(at + u64::from(hdr.total_len.get()));
        batches.push(ScannedBatch { hdr, descs, file_offset });
    }
    Ok(Scanned { sup, slots, batches, end: at, end_crc: crc })
}

struct Scanner<'a> {
    file: &'a dyn File,
    geometry: ChunkGeometry,
    id: u64,
}

impl Scanner<'_> {
    /// The batch at a position if its header is valid for that place.
    fn batch_at(
        &mut self,
        slots: &Slots,
        at: u64,
    ) -> io::Result<Option<(BatchHdr, Vec<RecDesc>, u64)>> {
        let Some(offset) = slots.file_offset(at) else { return Ok(None) };
        let mut page = vec![0; PAGE as usize];
        self.file.read_exact_at(offset, &mut page)?;
        Ok(self.check(&page, at).map(|(hdr, descs)| (hdr, descs, offset)))
    }

    fn check(&self, page: &[u8], at: u64) -> Option<(BatchHdr, Vec<RecDesc>)> {
        let (hdr, descs) = parse_batch(page)?;
        let end = at + u64::from(hdr.total_len.get());
        let here = hdr.lsn.get() == at
            && hdr.journal_id.get() == self.id
            && end <= self.geometry.chunk_end(at);
        here.then_some((hdr, descs))
    }

    fn payloads_at(&self, hdr: &BatchHdr, descs: &[RecDesc], offset: u64) -> io::Result<bool> {
        if hdr.flags & BATCH_PAD != 0 {
            return Ok(descs.is_empty());
        }
        let mut bytes = vec![0; hdr.total_len.get() as usize];
        self.file.read_exact_at(offset, &mut bytes)?;
        Ok(payloads_ok(hdr, descs, &bytes))
    }

    /// Whether a valid batch behind `at` says that the journal was durable beyond it.
    fn durable_beyond(&self, slots: &Slots, at: u64) -> io::Result<bool> {
        let mut from = at;
        loop {
            let end = self.geometry.chunk_end(from);
            if let Some(offset) = slots.file_offset(from) {
                let mut rest = vec![0; (end - from) as usize];
                self.file.read_exact_at(offset, &mut rest)?;
                for (index, page) in rest.chunks_exact(PAGE as usize).enumerate() {
                    let place = from + index as u64 * PAGE;
                    if let Some((hdr, _)) = self.check(page, place)
                        && hdr.durable.get() > at
                    {
                        return Ok(true);
                    }
                }
            } else if from != at {
                return Ok(false);
            }
            from = end + PAGE;
            if slots.file_offset(from).is_none() {
                return Ok(false);
            }
        }
    }
}
