//! Making and checking batch and chunk headers and super blocks. (pure)

use crate::crc32c;
use zerocopy::{FromBytes, IntoBytes};

use super::format::*;

/// Finishes a header: fills in its CRC over itself and the descriptors.
pub fn finish_batch(hdr: &mut BatchHdr, descs: &[RecDesc]) {
    hdr.magic = BATCH_MAGIC.into();
    hdr.version = JOURNAL_VERSION;
    hdr.n_rec = (descs.len() as u16).into();
    hdr.hdr_crc = 0.into();
    hdr.hdr_crc = batch_crc(hdr, descs).into();
}

fn batch_crc(hdr: &BatchHdr, descs: &[RecDesc]) -> u32 {
    let zeroed = BatchHdr { hdr_crc: 0.into(), ..*hdr };
    crc32c::crc32c_append(crc32c::crc32c(zeroed.as_bytes()), descs.as_bytes())
}

/// A header page's content, if it is one and its CRC holds. Checks nothing of
/// its place in the stream.
pub fn parse_batch(page: &[u8]) -> Option<(BatchHdr, Vec<RecDesc>)> {
    let (hdr, rest) = BatchHdr::read_from_prefix(page).ok()?;
    let count = usize::from(hdr.n_rec.get());
    if hdr.magic.get() != BATCH_MAGIC || hdr.version != JOURNAL_VERSION || count > RECS_MAX {
        return None;
    }
    let descs = <[RecDesc]>::ref_from_prefix_with_elems(rest, count).ok()?.0.to_vec();
    let total = u64::from(hdr.total_len.get());
    let sized = total >= PAGE && total.is_multiple_of(PAGE) && total <= CHUNK_MAX;
    (sized && batch_crc(&hdr, &descs) == hdr.hdr_crc.get()).then_some((hdr, descs))
}

/// Whether every record of a batch is inside it and its payload CRC holds.
/// `batch` starts at the header page and has `total_len` bytes.
pub fn payloads_ok(hdr: &BatchHdr, descs: &[RecDesc], batch: &[u8]) -> bool {
    descs.iter().enumerate().all(|(index, desc)| {
        let len = desc.payload_len() as usize;
        let from = desc.payload_off.get() as usize;
        desc.rec_op().is_some()
            && desc.lsn.get() == hdr.lsn.get() + index as u64
            && desc.offset.get().checked_add(u64::from(desc.len.get())).is_some()
            && (len == 0
                || from >= PAGE as usize
                    && from.checked_add(len).is_some_and(|end| end <= batch.len())
                    && crc32c::crc32c(&batch[from..from + len]) == desc.crc.get())
    })
}

/// A finished chunk header page.
pub fn chunk_page(journal_id: u64, chunk_no: u64, incarnation: u64, prev_crc: u32) -> Vec<u8> {
    let mut hdr = ChunkHdr {
        magic: CHUNK_MAGIC.into(),
        version: u32::from(JOURNAL_VERSION).into(),
        journal_id: journal_id.into(),
        chunk_no: chunk_no.into(),
        incarnation: incarnation.into(),
        prev_crc: prev_crc.into(),
        ..ChunkHdr::default()
    };
    hdr.crc = crc32c::crc32c(hdr.as_bytes()).into();
    let mut page = vec![0; PAGE as usize];
    page[..size_of::<ChunkHdr>()].copy_from_slice(hdr.as_bytes());
    page
}

/// A chunk header, if the page is one of this journal.
pub fn parse_chunk(page: &[u8], journal_id: u64) -> Option<ChunkHdr> {
    let (hdr, _) = ChunkHdr::read_from_prefix(page).ok()?;
    let zeroed = ChunkHdr { crc: 0.into(), ..hdr };
    let good = hdr.magic.get() == CHUNK_MAGIC
        && hdr.version.get() == u32::from(JOURNAL_VERSION)
        && hdr.journal_id.get() == journal_id
        && crc32c::crc32c(zeroed.as_bytes()) == hdr.crc.get();
    good.then_some(hdr)
}

/// Fills in a super block's CRC.
pub fn finish_super(sup: &mut JournalSuper) {
    sup.crc = 0.into();
    sup.crc = crc32c::crc32c(sup.as_bytes()).into();
}

/// Why a page is not a usable super block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperError {
    /// The magic is not there.
    #[error("there is no journal here")]
    NotAJournal,
    /// The CRC does not hold or a field makes no sense.
    #[error("the super block is damaged")]
    Damaged,
    /// Made by a newer version of this program.
    #[error("the journal has format version {0}; this program understands {JOURNAL_VERSION}")]
    Newer(u32),
}

/// Checks one copy of the super block.
pub fn parse_super(page: &[u8]) -> Result<JournalSuper, SuperError> {
    let (sup, _) = JournalSuper::read_from_prefix(page).map_err(|_| SuperError::Damaged)?;
    if sup.magic != SUPER_MAGIC {
        return Err(SuperError::NotAJournal);
    }
    if sup.version.get() > u32::from(JOURNAL_VERSION) {
        return Err(SuperError::Newer(sup.version.get()));
    }
    let zeroed = JournalSuper { crc: 0.into(), ..sup };
    let chunk = sup.chunk_size.get();
    let sane = crc32c::crc32c(zeroed.as_bytes()) == sup.crc.get()
        && chunk.is_power_of_two()
        && (CHUNK_MIN..=CHUNK_MAX).contains(&chunk)
        && sup.n_slots.get() >= SLOTS_MIN
        && usize::from(sup.n_disks) <= DISKS_MAX
        && usize::from(sup.n_history) <= HISTORY_MAX;
    if sane { Ok(sup) } else { Err(SuperError::Damaged) }
}

/// The newer of the two copies that are valid.
pub fn choose_super(a: &[u8], b: &[u8]) -> Result<JournalSuper, SuperError> {
    match (parse_super(a), parse_super(b)) {
        (Err(newer @ SuperError::Newer(_)), _) | (_, Err(newer @ SuperError::Newer(_))) => {
            Err(newer)
        }
        (Ok(a), Ok(b)) => Ok(if a.seq.get() >= b.seq.get() { a } else { b }),
        (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
        (Err(SuperError::NotAJournal), Err(SuperError::NotAJournal)) => {
            Err(SuperError::NotAJournal)
        }
        (Err(_), Err(_)) => Err(SuperError::Damaged),
    }
}

/// Where the copy with this sequence number goes.
pub fn super_offset(seq: u64) -> u64 {
    if seq.is_multiple_of(2) { SUPER_A } else { SUPER_B }
}

/// The short id that every header carries.
pub fn short_id(uuid: &[u8; 16]) -> u64 {
    let (first, _) = zerocopy::little_endian::U64::read_from_prefix(uuid).expect("16 bytes");
    first.get()
}
