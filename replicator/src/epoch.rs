//! From durable batches to epochs, and from epochs to frames. (pure)
//!
//! Owns where epochs end and what may be dropped inside one. Holds: an epoch is
//! whole batches of one incarnation and generation, nothing follows a mark
//! in its epoch; a record is dropped only if all of it is overwritten later in
//! the same epoch, so the state at every epoch's end is exactly the source's
//! prefix; positions have no gap from epoch to epoch. Labels follow the source's
//! clock; a step back of up to five minutes is held back (ruling 19). Before it:
//! the journal's reader. After it: codec and channel.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use blockfilter::journal::format::{
    BATCH_FLUSH, BATCH_MARK, BatchHdr, PAGE, RECS_MAX, RecDesc, RecOp,
};
use blockfilter::names::Lsn;
use zerocopy::FromBytes;

use crate::frame::{FrameParts, Piece};
use crate::wire::{
    CodecId, FRAME_ALIGN, FRAME_EPOCH_END, FRAME_MARK, FRAME_RAW_MAX, FRAME_RECS_MAX, FrameHdr,
    Kind,
};

/// A batch inside a buffer that several batches share.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Its header, checked.
    pub hdr: BatchHdr,
    /// The buffer.
    pub data: Arc<Vec<u8>>,
    /// The batch in it, header page first.
    pub bytes: Range<usize>,
}

impl Batch {
    /// Where the next batch can start at the earliest: behind a chunk's header
    /// page if this one fills its chunk (as the filter counts, too).
    fn end(&self, chunk: u64) -> u64 {
        let end = self.hdr.lsn.get() + u64::from(self.hdr.total_len.get());
        if end.is_multiple_of(chunk) { end + PAGE } else { end }
    }

    fn same_writer(&self, other: &Self) -> bool {
        self.hdr.incarnation == other.hdr.incarnation && self.hdr.generation == other.hdr.generation
    }

    fn descs(&self) -> Result<&[RecDesc], EpochError> {
        let count = usize::from(self.hdr.n_rec.get());
        let bytes = self
            .data
            .get(self.bytes.clone())
            .and_then(|b| b.get(size_of::<BatchHdr>()..))
            .and_then(|b| b.get(..count.min(RECS_MAX) * size_of::<RecDesc>()))
            .ok_or(EpochError(self.hdr.lsn.get(), "descriptors"))?;
        <[RecDesc]>::ref_from_bytes(bytes)
            .map_err(|_| EpochError(self.hdr.lsn.get(), "descriptors"))
    }
}

/// A batch that does not fit the format; reading the journal must start again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the batch at {0} has bad {1}")]
pub struct EpochError(pub u64, pub &'static str);

/// When epochs end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Caught up, after a batch that a FLUSH waited for or was foreseen to: not before,
    /// microseconds.
    /// Each end is a point that the target keeps, and one sync there.
    pub min_us: u64,
    /// Caught up: not after, microseconds.
    pub max_us: u64,
    /// Behind: longest span of the source's time, microseconds.
    pub behind_us: u64,
    /// Most bytes of batches.
    pub bytes: usize,
    /// The journal's chunk size in bytes.
    pub chunk_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            min_us: 20_000,
            max_us: 100_000,
            behind_us: 1_000_000,
            bytes: 32 << 20,
            chunk_bytes: 64 << 20,
        }
    }
}

/// Collects batches into epochs.
#[derive(Debug)]
pub struct Builder {
    limits: Limits,
    /// End of the last epoch that was closed.
    closed: u64,
    /// Position behind the last batch and any padding.
    reached: u64,
    open: Vec<Batch>,
    open_bytes: usize,
    open_since: Option<u64>,
    ready: VecDeque<Epoch>,
    label_us: u64,
}

impl Builder {
    /// Epochs start at `from`.
    pub fn new(limits: Limits, from: Lsn) -> Self {
        Self {
            limits,
            closed: from.0,
            reached: from.0,
            open: Vec::new(),
            open_bytes: 0,
            open_since: None,
            ready: VecDeque::new(),
            label_us: 0,
        }
    }

    /// Where reading goes on.
    pub fn reached(&self) -> Lsn {
        Lsn(self.reached)
    }

    /// Takes what one read of the journal brought: batches in order, and the
    /// position behind them and any padding.
    pub fn push(
        &mut self,
        batches: impl IntoIterator<Item = Batch>,
        next: Lsn,
        now_us: u64,
    ) -> Result<(), EpochError> {
        for batch in batches {
            if batch.hdr.lsn.get() < self.reached {
                return Err(EpochError(batch.hdr.lsn.get(), "position"));
            }
            if self.must_close_before(&batch) {
                self.close(None)?;
            }
            self.reached = batch.end(self.limits.chunk_bytes);
            self.open_bytes += batch.bytes.len();
            self.open_since.get_or_insert(now_us);
            let mark = batch.hdr.flags & BATCH_MARK != 0;
            self.open.push(batch);
            if mark {
                self.close(None)?;
            }
        }
        if next.0 > self.reached {
            self.reached = next.0;
            self.open_since.get_or_insert(now_us);
        }
        Ok(())
    }

    fn must_close_before(&self, batch: &Batch) -> bool {
        let (Some(first), Some(last)) = (self.open.first(), self.open.last()) else {
            return false;
        };
        let span = batch.hdr.mono_us.get().saturating_sub(first.hdr.mono_us.get());
        !last.same_writer(batch)
            || span > self.limits.behind_us
            || self.open_bytes + batch.bytes.len() > self.limits.bytes
    }

    /// The next whole epoch. `caught_up`: nothing more is durable at the source
    /// now, so what is open may be closed by time.
    pub fn poll(&mut self, now_us: u64, caught_up: bool) -> Result<Option<Epoch>, EpochError> {
        if self.ready.is_empty() && caught_up && self.deadline().is_some_and(|at| now_us >= at) {
            self.close(Some(self.reached))?;
        }
        Ok(self.ready.pop_front())
    }

    /// When [`Self::poll`] closes what is open if nothing more comes.
    pub fn deadline(&self) -> Option<u64> {
        let since = self.open_since?;
        let flushed = self.open.last().is_some_and(|b| b.hdr.flags & BATCH_FLUSH != 0);
        Some(since + if flushed { self.limits.min_us } else { self.limits.max_us })
    }

    /// Whether an epoch is complete already.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    fn close(&mut self, to: Option<u64>) -> Result<(), EpochError> {
        let batches = std::mem::take(&mut self.open);
        self.open_bytes = 0;
        self.open_since = None;
        let end = batches.last().map_or(self.closed, |b| b.end(self.limits.chunk_bytes));
        let to = to.unwrap_or(end);
        let epoch = Epoch::from_batches(&batches, Lsn(self.closed), Lsn(to), self.label_us)?;
        if epoch.wall_us != 0 {
            self.label_us = epoch.wall_us;
        }
        self.closed = to;
        self.ready.push_back(epoch);
        Ok(())
    }
}

/// A record that is sent.
#[derive(Clone, Debug)]
struct Sent {
    desc: RecDesc,
    payload: Option<Piece>,
}

/// Whole batches that take effect together.
#[derive(Debug)]
pub struct Epoch {
    /// Where it starts.
    pub from: Lsn,
    /// Where it ends: a recovery point.
    pub to: Lsn,
    /// Of all its batches; 0 if it has none (only padding).
    pub incarnation: u64,
    /// Of all its batches.
    pub generation: u64,
    /// Label: the source's wall clock at the last batch, never smaller than
    /// that of the epoch before unless the clock was set back far.
    pub wall_us: u64,
    /// Its last record is a mark.
    pub mark: bool,
    /// Payload bytes before anything was dropped.
    pub raw_bytes: u64,
    records: Vec<Sent>,
    sent: usize,
    done: bool,
}

impl Epoch {
    fn from_batches(
        batches: &[Batch],
        from: Lsn,
        to: Lsn,
        label_us: u64,
    ) -> Result<Self, EpochError> {
        let last = batches.last();
        let mut epoch = Self {
            from,
            to,
            incarnation: last.map_or(0, |b| b.hdr.incarnation.get()),
            generation: last.map_or(0, |b| b.hdr.generation.get()),
            wall_us: clamp_label(last.map_or(label_us, |b| b.hdr.wall_us.get()), label_us),
            mark: last.is_some_and(|b| b.hdr.flags & BATCH_MARK != 0),
            raw_bytes: 0,
            records: Vec::new(),
            sent: 0,
            done: false,
        };
        let mut covered = Covered::default();
        let mut alone = alone(batches)?;
        for batch in batches.iter().rev() {
            for desc in batch.descs()?.iter().rev() {
                epoch.raw_bytes += u64::from(desc.payload_len());
                if alone.pop() == Some(true) || covered.keeps(desc) {
                    epoch.records.push(sent(batch, desc)?);
                }
            }
        }
        epoch.records.reverse();
        Ok(epoch)
    }

    /// The next frame, of about `payload` bytes before compression; None after
    /// the last. `encode` compresses that many bytes in these pieces, or returns None to
    /// send them as they are.
    pub fn next_frame<E>(
        &mut self,
        group_id: u64,
        payload: usize,
        mut encode: impl FnMut(usize, &[Piece]) -> Result<Option<Vec<u8>>, E>,
    ) -> Result<Option<FrameParts>, E> {
        if self.done {
            return Ok(None);
        }
        let first = self.sent;
        let (descs, mut raw, mut raw_len) = self.take(payload);
        self.done = self.sent == self.records.len();
        let start = if first == 0 { self.from.0 } else { self.records[first].desc.lsn.get() };
        let end = self.records.get(self.sent).map_or(self.to.0, |r| r.desc.lsn.get());
        let packed = if raw.is_empty() { None } else { encode(raw_len, &raw)? };
        let codec = if packed.is_some() { CodecId::Zstd } else { CodecId::None };
        if let Some(packed) = packed {
            raw = vec![packed.into()];
        } else if raw_len > 0 {
            let head = size_of::<FrameHdr>() + size_of_val(descs.as_slice());
            let pad = (head + raw_len).next_multiple_of(FRAME_ALIGN) - head - raw_len;
            if pad > 0 && raw_len + pad <= FRAME_RAW_MAX as usize {
                raw.push(vec![0; pad].into());
                raw_len += pad;
            }
        }
        let mark = if self.mark { FRAME_MARK } else { 0 };
        let hdr = FrameHdr {
            kind: Kind::Epoch as u8,
            flags: if self.done { FRAME_EPOCH_END | mark } else { 0 },
            codec: codec as u8,
            group_id: group_id.into(),
            generation: self.generation.into(),
            incarnation: self.incarnation.into(),
            lsn_from: start.into(),
            lsn_to: end.into(),
            wall_us: self.wall_us.into(),
            raw_len: (raw_len as u32).into(),
            ..Default::default()
        };
        Ok(Some(FrameParts::seal(hdr, &descs, raw)))
    }

    /// The next records for a frame of about `payload` bytes, their payloads and the length
    /// of those.
    fn take(&mut self, payload: usize) -> (Vec<RecDesc>, Vec<Piece>, usize) {
        let (mut descs, mut raw, mut raw_len) = (Vec::new(), Vec::new(), 0);
        while let Some(record) = self.records.get(self.sent) {
            let len = record.desc.payload_len() as usize;
            let full = raw_len + len > payload && !descs.is_empty();
            if full || descs.len() == FRAME_RECS_MAX as usize {
                break;
            }
            let mut desc = record.desc;
            desc.payload_off = 0.into();
            if let Some(piece) = &record.payload {
                desc.payload_off = (raw_len as u32).into();
                Piece::append(&mut raw, piece);
                raw_len += len;
            }
            descs.push(desc);
            self.sent += 1;
        }
        (descs, raw, raw_len)
    }

    /// Fills in the writer of an epoch that has only padding.
    pub fn set_writer(&mut self, incarnation: u64, generation: u64) {
        if self.incarnation == 0 && self.records.is_empty() {
            self.incarnation = incarnation;
            self.generation = generation;
        }
    }
}

fn sent(batch: &Batch, desc: &RecDesc) -> Result<Sent, EpochError> {
    let bad = |what| EpochError(batch.hdr.lsn.get(), what);
    let len = desc.payload_len();
    let mut desc = *desc;
    desc.reserved = 0.into();
    if len == 0 {
        (desc.payload_off, desc.crc) = (0.into(), 0.into());
        return Ok(Sent { desc, payload: None });
    }
    if len > FRAME_RAW_MAX {
        return Err(bad("length of a record"));
    }
    let start = batch.bytes.start + desc.payload_off.get() as usize;
    let range = start..start + len as usize;
    if range.end > batch.bytes.end {
        return Err(bad("payload range"));
    }
    if desc.rec_op() == Some(RecOp::Write) && is_zero(&batch.data[range.clone()]) {
        desc.op = RecOp::Zero as u8;
        (desc.payload_off, desc.crc) = (0.into(), 0.into());
        return Ok(Sent { desc, payload: None });
    }
    Ok(Sent { desc, payload: Some(Piece::new(batch.data.clone(), range)) })
}

/// Whether all bytes are 0.
pub fn is_zero(data: &[u8]) -> bool {
    // Comparing a slice with itself one byte on is one memcmp.
    data.first().is_none_or(|b| *b == 0)
        && data[1.min(data.len())..] == data[..data.len().max(1) - 1]
}

fn clamp_label(wall_us: u64, before_us: u64) -> u64 {
    if wall_us < before_us && before_us - wall_us <= STEP_BACK_US { before_us } else { wall_us }
}

/// Of each record in order, whether no other of the epoch touches any of its bytes: it is kept, and
/// covers nothing. Sorting tells it for less than a [`Covered`] of all of them takes.
fn alone(batches: &[Batch]) -> Result<Vec<bool>, EpochError> {
    let mut ranges = Vec::new();
    let mut count = 0;
    for batch in batches {
        for desc in batch.descs()? {
            let (start, end) = (desc.offset.get(), desc.end());
            let data = matches!(desc.rec_op(), Some(RecOp::Write | RecOp::Zero | RecOp::Trim));
            if data && start < end {
                ranges.push((desc.disk, start, end, count));
            }
            count += 1;
        }
    }
    ranges.sort_unstable();
    let mut alone = vec![false; count];
    let mut reached = (0, 0);
    for (index, &(disk, start, end, record)) in ranges.iter().enumerate() {
        let next = ranges.get(index + 1);
        let meets = next.is_some_and(|&(other, from, ..)| other == disk && from < end);
        alone[record] = !meets && (disk, start) >= reached;
        reached = reached.max((disk, end));
    }
    Ok(alone)
}

/// What later records of the epoch overwrite, per disk: start to end. Those that are [`alone`] may be
/// missing: they cover nothing else.
#[derive(Debug, Default)]
struct Covered {
    ranges: BTreeMap<(u8, u64), u64>,
}

impl Covered {
    /// Going back in order: whether the record is still seen at the end. If so
    /// it covers its range from now on.
    fn keeps(&mut self, desc: &RecDesc) -> bool {
        match desc.rec_op() {
            Some(RecOp::Write | RecOp::Zero | RecOp::Trim) => {}
            Some(RecOp::Nop) => return false,
            Some(RecOp::Resize) => {
                self.ranges.clear();
                return true;
            }
            Some(RecOp::Mark) | None => return true,
        }
        let (disk, start, end) = (desc.disk, desc.offset.get(), desc.end());
        if start == end {
            return false;
        }
        let before = self.ranges.range(..=(disk, start)).next_back();
        if let Some(((d, _), covered_to)) = before
            && *d == disk
            && *covered_to >= end
        {
            return false;
        }
        self.add(disk, start, end);
        true
    }

    fn add(&mut self, disk: u8, mut start: u64, mut end: u64) {
        if let Some(((d, s), e)) = self.ranges.range(..=(disk, start)).next_back()
            && *d == disk
            && *e >= start
        {
            start = *s;
            end = end.max(*e);
        }
        while let Some(((_, s), e)) = self.ranges.range((disk, start)..=(disk, end)).next() {
            let key = (disk, *s);
            end = end.max(*e);
            self.ranges.remove(&key);
        }
        self.ranges.insert((disk, start), end);
    }
}

/// A clock that goes back by up to this holds the labels where they are.
pub const STEP_BACK_US: u64 = 5 * 60 * 1_000_000;

#[cfg(test)]
mod tests;
