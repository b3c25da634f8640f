//! Planning the write-back of a window of durable records. (pure)
//!
//! Of every byte only the newest version in the window is written, in LBA order,
//! neighbours together. The window is durable in the journal (I3) and its
//! records leave the overlay only after all of it was written (I10), so readers find
//! each byte in one of the two.

use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use crate::journal::format::{REC_NO_HOLE, RecDesc, RecOp};

/// One thing to do to a disk's backing file. Of one plan all are disjoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApplyOp {
    /// Write the arena's bytes at these journal positions, one behind the other.
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// `(position, length)`.
        parts: Vec<(u64, u64)>,
    },
    /// Make the range read as zeroes.
    Zero {
        /// Byte offset on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Keep it allocated.
        no_hole: bool,
    },
}

impl ApplyOp {
    /// Bytes to copy to the disk.
    pub fn written(&self) -> u64 {
        match self {
            Self::Write { parts, .. } => parts.iter().map(|(_, len)| len).sum(),
            Self::Zero { .. } => 0,
        }
    }
}

/// A sealed batch that is still in the arena. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SealedBatch {
    /// Its position.
    pub lsn: u64,
    /// The position of the next batch.
    pub end: u64,
    /// Its header's CRC.
    pub hdr_crc: u32,
    /// Its records.
    pub descs: Arc<[RecDesc]>,
}

/// What to do to each disk (by index) for these batches, oldest first.
pub fn plan<'a>(batches: impl Iterator<Item = &'a SealedBatch>) -> Vec<(u8, Vec<ApplyOp>)> {
    let mut disks: BTreeMap<u8, DiskPlan> = BTreeMap::new();
    for batch in batches {
        for desc in batch.descs.iter() {
            let plan = disks.entry(desc.disk).or_default();
            let (from, to) = (desc.offset.get(), desc.end());
            match desc.rec_op() {
                Some(RecOp::Write) => {
                    let pos = batch.lsn + u64::from(desc.payload_off.get());
                    plan.add(from, to, What::Write { pos: pos.wrapping_sub(from) });
                }
                Some(op @ (RecOp::Zero | RecOp::Trim)) => {
                    let no_hole = op == RecOp::Zero && desc.flags.get() & REC_NO_HOLE != 0;
                    plan.add(from, to, What::Zero { no_hole });
                }
                _ => {}
            }
        }
    }
    disks.into_iter().map(|(disk, plan)| (disk, plan.into_ops())).collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Disk byte b is at position `pos + b`, wrapping.
    Write {
        pos: u64,
    },
    Zero {
        no_hole: bool,
    },
}

/// What a disk's records do, oldest first.
#[derive(Debug, Default)]
struct DiskPlan {
    records: Vec<Record>,
}

#[derive(Clone, Copy, Debug)]
struct Record {
    from: u64,
    to: u64,
    /// Later ones win.
    order: u32,
    what: What,
}

impl DiskPlan {
    fn add(&mut self, from: u64, to: u64, what: What) {
        let order = self.records.len() as u32;
        self.records.push(Record { from, to, order, what });
    }

    /// Sweeps over the disk from its start to its end. `open` are the records that began at or
    /// before the place reached, the newest on top; those that ended are dropped
    /// when they come to the top.
    fn into_ops(mut self) -> Vec<ApplyOp> {
        self.records.sort_unstable_by_key(|r| r.from);
        let mut ops: Vec<ApplyOp> = Vec::with_capacity(self.records.len());
        let mut open = BinaryHeap::new();
        let mut next = 0;
        let mut reached = 0;
        loop {
            let Some(&(_, index)) = open.peek() else {
                let Some(record) = self.records.get(next) else { return ops };
                reached = record.from;
                open.push((record.order, next));
                next += 1;
                continue;
            };
            let newest = self.records[index];
            let following = self.records.get(next);
            match following {
                Some(record) if record.from <= reached => {
                    open.push((record.order, next));
                    next += 1;
                }
                _ if newest.to <= reached => {
                    open.pop();
                }
                _ => {
                    let to = following.map_or(newest.to, |r| r.from.min(newest.to));
                    push(&mut ops, reached, to, newest.what);
                    reached = to;
                }
            }
        }
    }
}

/// Appends what becomes of `[from, to)`, behind all that is there.
fn push(ops: &mut Vec<ApplyOp>, from: u64, to: u64, what: What) {
    if join(ops.last_mut(), from, to, what) {
        return;
    }
    ops.push(match what {
        What::Write { pos } => {
            ApplyOp::Write { offset: from, parts: vec![(pos.wrapping_add(from), to - from)] }
        }
        What::Zero { no_hole } => ApplyOp::Zero { offset: from, len: to - from, no_hole },
    });
}

/// Extends the last operation by a range, if that follows it directly.
fn join(last: Option<&mut ApplyOp>, from: u64, to: u64, what: What) -> bool {
    match (last, what) {
        (Some(ApplyOp::Write { offset, parts }), What::Write { pos }) => {
            let total: u64 = parts.iter().map(|(_, len)| len).sum();
            if *offset + total != from
                || parts.len() >= PARTS_MAX
                || total + (to - from) > WRITE_MAX
            {
                return false;
            }
            let start = pos.wrapping_add(from);
            match parts.last_mut() {
                Some((p, len)) if *p + *len == start => *len += to - from,
                _ => parts.push((start, to - from)),
            }
            true
        }
        (Some(ApplyOp::Zero { offset, len, no_hole }), What::Zero { no_hole: same })
            if *no_hole == same && *offset + *len == from =>
        {
            *len += to - from;
            true
        }
        _ => false,
    }
}

/// Most parts of one write (UIO_MAXIOV is 1024).
const PARTS_MAX: usize = 512;
/// Most bytes of one write.
const WRITE_MAX: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn desc(op: RecOp, offset: u64, len: u64, payload_off: u64) -> RecDesc {
        RecDesc {
            op: op as u8,
            offset: offset.into(),
            len: (len as u32).into(),
            payload_off: (payload_off as u32).into(),
            ..RecDesc::default()
        }
    }

    proptest! {
        #[test]
        fn the_plan_equals_applying_every_record_in_order(
            recs in prop::collection::vec((0u8..8, 0u64..40, 1u64..12), 1..40)
        ) {
            let mut disk = vec![0u64; 64];
            let mut batches = Vec::new();
            let (mut lsn, mut pos) = (0, 0);
            for chunk in recs.chunks(5) {
                let mut descs = Vec::new();
                for (kind, offset, len) in chunk {
                    let mut record = match kind {
                        0 => desc(RecOp::Trim, *offset, *len, pos - lsn),
                        1 | 2 => desc(RecOp::Zero, *offset, *len, pos - lsn),
                        _ => desc(RecOp::Write, *offset, *len, pos - lsn),
                    };
                    if *kind == 2 {
                        record.flags = REC_NO_HOLE.into();
                    }
                    descs.push(record);
                    for i in 0..*len {
                        disk[(offset + i) as usize] = match kind {
                            0 | 1 => 7,
                            2 => 8,
                            _ => 1000 + pos + i,
                        };
                    }
                    pos += len;
                }
                batches.push(SealedBatch { lsn, end: pos, hdr_crc: 0, descs: descs.into() });
                lsn = pos;
            }
            let mut found = vec![0u64; 64];
            for (_, ops) in plan(batches.iter()) {
                let mut before: Option<(u64, &ApplyOp)> = None;
                for op in &ops {
                    let (from, to) = match op {
                        ApplyOp::Write { offset, parts } => {
                            let mut at = *offset;
                            for (pos, len) in parts {
                                for i in 0..*len {
                                    found[(at + i) as usize] = 1000 + pos + i;
                                }
                                at += len;
                            }
                            (*offset, at)
                        }
                        ApplyOp::Zero { offset, len, no_hole } => {
                            let value = if *no_hole { 8 } else { 7 };
                            found[*offset as usize..(offset + len) as usize].fill(value);
                            (*offset, offset + len)
                        }
                    };
                    if let Some((end, last)) = before {
                        prop_assert!(end <= from, "in order, and nothing twice");
                        let same = match (last, op) {
                            (ApplyOp::Write { .. }, ApplyOp::Write { .. }) => true,
                            (ApplyOp::Zero { no_hole, .. }, ApplyOp::Zero { no_hole: next, .. }) => {
                                no_hole == next
                            }
                            _ => false,
                        };
                        prop_assert!(end < from || !same, "neighbours together");
                    }
                    before = Some((to, op));
                }
            }
            prop_assert_eq!(found, disk);
        }
    }

    #[test]
    fn a_run_of_neighbours_is_cut_at_the_most_parts_and_the_most_bytes_of_a_write() {
        // Every second position, so that no part joins the one before it.
        let run = |count: u64, len: u64| {
            let descs = (0..count).map(|i| desc(RecOp::Write, i * len, len, 2 * i * len)).collect();
            let batch = SealedBatch { lsn: 0, end: 2 * count * len, hdr_crc: 0, descs };
            let ops = plan([batch].iter()).remove(0).1;
            ops.iter().map(ApplyOp::written).collect::<Vec<_>>()
        };
        let most = PARTS_MAX as u64 * 512;
        assert_eq!(run(PARTS_MAX as u64 + 1, 512), [most, 512]);
        assert_eq!(run(5, 1 << 20), [WRITE_MAX, 1 << 20]);
    }
}
