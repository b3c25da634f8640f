//! From a received frame to index entries and a point. (pure)
//!
//! Owns the check of what records mean for this group: known disk, inside it,
//! whole sectors. The frame itself was checked by `replicator::frame` already.
//! Nothing is decompressed here but the frame that carries a mark's tag.

use blockfilter::crc32c;
use std::borrow::Cow;

use blockfilter::block::SECTOR;
use blockfilter::journal::format::{REC_APP, RecDesc, RecOp};
use blockfilter::names::Name;
use replicator::frame::{FrameBuf, FrameError};

use super::AppendError;
use super::format::{ENTRY_ZERO, Entry, REGION, WIDE_REGIONS, Wide, split};

/// What some frames add to the index.
#[derive(Debug, Default)]
pub(crate) struct Indexed {
    pub(crate) entries: Vec<Entry>,
    pub(crate) wides: Vec<Wide>,
    /// The last mark: its tag, and whether the application agreed.
    pub(crate) mark: Option<(Option<Name>, bool)>,
}

/// Where a frame is, and how its records are ordered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) seg: u32,
    pub(crate) frame_off: u64,
    /// Copies are ordered by arrival: the position of the frame's first record.
    pub(crate) copy_from: Option<u64>,
}

/// Adds a frame's records. `sizes` are the disks' sizes in bytes.
pub(crate) fn index_frame(
    frame: &FrameBuf,
    place: Place,
    sizes: &[u64],
    out: &mut Indexed,
) -> Result<(), AppendError> {
    let frame_off =
        u32::try_from(place.frame_off).map_err(|_| AppendError::Invalid("epoch too large"))?;
    for (i, desc) in frame.descs().iter().enumerate() {
        let op = desc.rec_op().ok_or(AppendError::Invalid("operation"))?;
        match op {
            RecOp::Nop => continue,
            RecOp::Resize => return Err(AppendError::Invalid("resizing is not supported yet")),
            RecOp::Mark => {
                out.mark = Some((tag(frame, desc), desc.flags.get() & REC_APP != 0));
                continue;
            }
            RecOp::Write | RecOp::Zero | RecOp::Trim => check_range(desc, sizes)?,
        }
        let lsn = place.copy_from.map_or(desc.lsn.get(), |from| from + i as u64);
        let (offset, len) = (desc.offset.get(), u64::from(desc.len.get()));
        let flags = if op == RecOp::Write { 0 } else { ENTRY_ZERO };
        let regions = (offset + len).div_ceil(REGION) - offset / REGION;
        if flags != 0 && regions > WIDE_REGIONS {
            out.wides.push(Wide {
                disk: desc.disk,
                flags,
                reserved: [0; 6],
                offset: offset.into(),
                len: len.into(),
                lsn: lsn.into(),
            });
            continue;
        }
        let like = Entry {
            disk: desc.disk,
            flags,
            seg: if flags == 0 { place.seg.into() } else { 0.into() },
            frame_off: if flags == 0 { frame_off.into() } else { 0.into() },
            lsn: lsn.into(),
            ..Default::default()
        };
        split(like, offset, len, desc.payload_off.get(), &mut out.entries);
    }
    Ok(())
}

/// Checks that a record lies inside its disk, in whole sectors.
pub(crate) fn check_range(desc: &RecDesc, sizes: &[u64]) -> Result<(), AppendError> {
    let size = sizes.get(usize::from(desc.disk)).ok_or(AppendError::Invalid("disk"))?;
    let (offset, len) = (desc.offset.get(), u64::from(desc.len.get()));
    if len == 0 || offset % SECTOR != 0 || len % SECTOR != 0 {
        return Err(AppendError::Invalid("a record is not in whole sectors"));
    }
    if offset.checked_add(len).is_none_or(|end| end > size.next_multiple_of(SECTOR)) {
        return Err(AppendError::Invalid("a record lies beyond its disk's end"));
    }
    Ok(())
}

/// A frame's payload, uncompressed, with the CRC of every record checked.
pub(crate) fn open_payload(frame: &FrameBuf) -> Result<Cow<'_, [u8]>, FrameError> {
    let payload = frame.payload()?;
    if frame.is_one_record() {
        return Ok(payload);
    }
    for desc in frame.descs().iter().filter(|d| d.payload_len() > 0) {
        let bytes = record_payload(&payload, desc).ok_or(FrameError::Bad("payload range"))?;
        if crc32c::crc32c(bytes) != desc.crc.get() {
            return Err(FrameError::Crc("record"));
        }
    }
    Ok(payload)
}

/// A record's bytes in its frame's payload.
pub(crate) fn record_payload<'a>(payload: &'a [u8], desc: &RecDesc) -> Option<&'a [u8]> {
    payload.get(desc.payload_off.get() as usize..)?.get(..desc.payload_len() as usize)
}

/// A mark's tag. One that is not a name is dropped: the point stays, and the
/// stream goes on.
fn tag(frame: &FrameBuf, desc: &RecDesc) -> Option<Name> {
    let payload = open_payload(frame).ok()?;
    std::str::from_utf8(record_payload(&payload, desc)?).ok()?.parse().ok()
}
