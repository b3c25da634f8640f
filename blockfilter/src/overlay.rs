//! The newest acknowledged version of what is not yet on the disk. (pure)
//!
//! Writes are kept by 4 KiB block with a sector mask; TRIM and ZERO are extents
//! (ruling 7: mkfs sends one 512 MiB discard). A lookup takes, sector by sector,
//! whichever of the two has the higher LSN (I9, I11). Entries leave only below
//! the position up to which the disk was written (I10).

use std::collections::{BTreeMap, HashMap};

use rustc_hash::FxBuildHasher;

use crate::block::{BLOCK, SECTOR};

/// Where a range's newest bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// At this journal position, in the arena.
    Arena(u64),
    /// Zeroes.
    Zero,
    /// On the disk.
    Disk,
}

/// A part of a looked-up range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Byte offset on the disk.
    pub offset: u64,
    /// Bytes, never 0.
    pub len: u64,
    /// Where they are.
    pub source: Source,
}

/// One disk's overlay.
#[derive(Debug, Default)]
pub struct Overlay {
    blocks: HashMap<u64, Entry, FxBuildHasher>,
    /// First byte → (end, LSN); disjoint.
    zeroes: BTreeMap<u64, (u64, u64)>,
}

/// A version of a block. `base` is the journal position at which the block's
/// first byte would be: sector s is at `base + s * 512` if bit s of `mask` is set.
#[derive(Debug)]
struct Entry {
    lsn: u64,
    base: u64,
    mask: u8,
    older: Option<Box<Entry>>,
}

impl Overlay {
    /// A WRITE of `[offset, offset + len)`, sector-aligned, whose payload is at
    /// journal position `pos`. LSNs must not decrease from call to call.
    pub fn insert_write(&mut self, lsn: u64, offset: u64, len: u64, pos: u64) {
        debug_assert!(offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR));
        let end = offset + len;
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            let start = block * BLOCK;
            let mask = sector_mask(offset.max(start) - start, end.min(start + BLOCK) - start);
            // May wrap for a payload shorter than the block; only masked sectors are used.
            let base = pos.wrapping_add(start.wrapping_sub(offset));
            let entry = Entry { lsn, base, mask, older: None };
            if let Some(old) = self.blocks.insert(block, entry)
                && mask != 0xff
                && let Some(new) = self.blocks.get_mut(&block)
            {
                debug_assert!(old.lsn <= lsn);
                new.older = prune(Some(Box::new(old)), mask);
            }
        }
    }

    /// A TRIM or ZERO of `[offset, offset + len)`, sector-aligned.
    pub fn insert_zero(&mut self, lsn: u64, offset: u64, len: u64) {
        debug_assert!(offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR));
        if len == 0 {
            return;
        }
        let end = offset + len;
        let first = self.zeroes.range(..offset).next_back().filter(|(_, v)| v.0 > offset);
        let from = first.map_or(offset, |(start, _)| *start);
        let covered: Vec<_> = self.zeroes.range(from..end).map(|(k, v)| (*k, *v)).collect();
        for (start, (old_end, old_lsn)) in covered {
            self.zeroes.remove(&start);
            if start < offset {
                self.zeroes.insert(start, (offset, old_lsn));
            }
            if old_end > end {
                self.zeroes.insert(end, (old_end, old_lsn));
            }
        }
        self.zeroes.insert(offset, (end, lsn));
    }

    /// Drops what a write below `applied` left in its range.
    pub fn remove_write(&mut self, applied: u64, offset: u64, len: u64) {
        for block in offset / BLOCK..(offset + len).div_ceil(BLOCK) {
            if let Some(entry) = self.blocks.get_mut(&block) {
                if entry.lsn < applied {
                    self.blocks.remove(&block);
                } else {
                    entry.cut_below(applied);
                }
            }
        }
    }

    /// Drops zero extents below `applied` that overlap the range.
    pub fn remove_zero(&mut self, applied: u64, offset: u64, len: u64) {
        let end = offset + len;
        let first = self.zeroes.range(..offset).next_back().filter(|(_, v)| v.0 > offset);
        let from = first.map_or(offset, |(start, _)| *start);
        let gone: Vec<u64> = self
            .zeroes
            .range(from..end)
            .filter(|(_, (_, lsn))| *lsn < applied)
            .map(|(start, _)| *start)
            .collect();
        for start in gone {
            self.zeroes.remove(&start);
        }
    }

    /// Whether everything is on the disk.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.zeroes.is_empty()
    }

    /// Entries held, for the memory bound.
    pub fn len(&self) -> usize {
        self.blocks.len() + self.zeroes.len()
    }

    /// Splits `[offset, offset + len)` by where the newest bytes are. `out` is
    /// cleared first; neighbours that continue each other are one piece. Ends early after
    /// `max` pieces.
    pub fn lookup(&self, offset: u64, len: u64, max: usize, out: &mut Vec<Piece>) {
        out.clear();
        if len == 0 {
            return;
        }
        if self.is_empty() {
            out.push(Piece { offset, len, source: Source::Disk });
            return;
        }
        let end = offset + len;
        let mut at = offset;
        while at < end && out.len() <= max {
            let start = at / BLOCK * BLOCK;
            let stop = end.min(start + BLOCK);
            let (stop, source) = match self.blocks.get(&(start / BLOCK)) {
                Some(entry) if entry.mask == 0xff && self.zeroes.is_empty() => {
                    (stop, Source::Arena(entry.base + (at - start)))
                }
                Some(entry) => {
                    self.lookup_sectors(entry, at, stop, out);
                    at = stop;
                    continue;
                }
                None => self.zero_or_disk(at, stop),
            };
            push(out, at, stop, source);
            at = stop;
        }
        out.truncate(max);
    }

    /// Where a range begins of which nothing was written, and how far that goes.
    fn zero_or_disk(&self, at: u64, stop: u64) -> (u64, Source) {
        if self.zeroes.is_empty() {
            return (stop, Source::Disk);
        }
        match self.zeroes.range(..=at).next_back() {
            Some((_, (end, _))) if *end > at => (stop.min(*end), Source::Zero),
            _ => {
                let next = self.zeroes.range(at..).next();
                (next.map_or(stop, |(start, _)| stop.min(*start)), Source::Disk)
            }
        }
    }

    fn lookup_sectors(&self, entry: &Entry, from: u64, to: u64, out: &mut Vec<Piece>) {
        let block = from / BLOCK * BLOCK;
        let mut at = from;
        while at < to {
            let sector = (at - block) / SECTOR;
            let stop = to.min(block + (sector + 1) * SECTOR);
            let write = entry.newest(1 << sector);
            let zero = self.zero_at(at);
            let source = match (write, zero) {
                (Some(w), Some(z)) if z > w.lsn => Source::Zero,
                (Some(w), _) => Source::Arena(w.base.wrapping_add(at - block)),
                (None, Some(_)) => Source::Zero,
                (None, None) => Source::Disk,
            };
            push(out, at, stop, source);
            at = stop;
        }
    }

    fn zero_at(&self, at: u64) -> Option<u64> {
        let (_, (end, lsn)) = self.zeroes.range(..=at).next_back()?;
        (*end > at).then_some(*lsn)
    }
}

impl Entry {
    fn newest(&self, bit: u8) -> Option<&Self> {
        let mut entry = Some(self);
        while let Some(e) = entry {
            if e.mask & bit != 0 {
                return Some(e);
            }
            entry = e.older.as_deref();
        }
        None
    }

    fn cut_below(&mut self, applied: u64) {
        let mut at = self;
        loop {
            if at.older.as_ref().is_some_and(|o| o.lsn < applied) {
                at.older = None;
                return;
            }
            match at.older.as_deref_mut() {
                Some(older) => at = older,
                None => return,
            }
        }
    }
}

/// Drops versions whose every sector is covered by newer ones.
fn prune(entry: Option<Box<Entry>>, covered: u8) -> Option<Box<Entry>> {
    let mut entry = entry?;
    if entry.mask & !covered == 0 {
        return prune(entry.older.take(), covered);
    }
    let covered = covered | entry.mask;
    entry.older = prune(entry.older.take(), covered);
    Some(entry)
}

fn sector_mask(from: u64, to: u64) -> u8 {
    let (first, last) = (from / SECTOR, to.div_ceil(SECTOR));
    let ones = |n: u64| ((1u16 << n) - 1) as u8;
    ones(last) & !ones(first)
}

fn push(out: &mut Vec<Piece>, from: u64, to: u64, source: Source) {
    let len = to - from;
    if let Some(last) = out.last_mut() {
        let joins = match (last.source, source) {
            (Source::Arena(a), Source::Arena(b)) => a + last.len == b,
            (a, b) => a == b,
        };
        if joins && last.offset + last.len == from {
            last.len += len;
            return;
        }
    }
    out.push(Piece { offset: from, len, source });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Act {
        Write(u64, u64),
        Zero(u64, u64),
        Apply(u64),
    }

    fn act() -> impl Strategy<Value = Act> {
        let range = (0u64..64, 1u64..24);
        prop_oneof![
            4 => range.clone().prop_map(|(o, l)| Act::Write(o, l)),
            2 => range.prop_map(|(o, l)| Act::Zero(o, l)),
            1 => (0u64..12).prop_map(Act::Apply),
        ]
    }

    /// One record in the model: LSN, first sector, sectors, payload position.
    type Rec = (u64, u64, u64, Option<u64>);

    fn check(overlay: &Overlay, live: &[Rec], sectors: u64) {
        let mut pieces = Vec::new();
        overlay.lookup(0, sectors * SECTOR, usize::MAX, &mut pieces);
        let mut few = Vec::new();
        overlay.lookup(0, sectors * SECTOR, 3, &mut few);
        assert_eq!(few, pieces[..pieces.len().min(3)]);
        let mut at = 0;
        for piece in &pieces {
            assert_eq!(piece.offset, at);
            for i in 0..piece.len / SECTOR {
                let s = at / SECTOR + i;
                let newest = live.iter().rev().find(|r| r.1 <= s && s < r.1 + r.2);
                let expect = match newest {
                    None => Source::Disk,
                    Some((_, _, _, None)) => Source::Zero,
                    Some((_, first, _, Some(pos))) => Source::Arena(pos + (s - first) * SECTOR),
                };
                let found = match piece.source {
                    Source::Arena(p) => Source::Arena(p + i * SECTOR),
                    other => other,
                };
                assert_eq!(found, expect, "sector {s}");
            }
            at += piece.len;
        }
        assert_eq!(at, sectors * SECTOR);
    }

    proptest! {
        #[test]
        fn lookup_finds_the_newest_version_of_every_sector(acts in prop::collection::vec(act(), 1..60)) {
            let mut overlay = Overlay::default();
            let mut live: Vec<Rec> = Vec::new();
            let (mut lsn, mut pos) = (4096, 8192);
            for act in acts {
                match act {
                    Act::Write(first, n) => {
                        overlay.insert_write(lsn, first * SECTOR, n * SECTOR, pos);
                        live.push((lsn, first, n, Some(pos)));
                        pos += n * SECTOR;
                        lsn += 1;
                    }
                    Act::Zero(first, n) => {
                        overlay.insert_zero(lsn, first * SECTOR, n * SECTOR);
                        live.push((lsn, first, n, None));
                        lsn += 1;
                    }
                    Act::Apply(n) => {
                        let gone: Vec<Rec> = live.drain(..live.len().min(n as usize)).collect();
                        let Some(applied) = gone.last().map(|r| r.0 + 1) else { continue };
                        for (_, first, n, pos) in gone {
                            match pos {
                                Some(_) => overlay.remove_write(applied, first * SECTOR, n * SECTOR),
                                None => overlay.remove_zero(applied, first * SECTOR, n * SECTOR),
                            }
                        }
                    }
                }
                check(&overlay, &live, 96);
            }
            if live.is_empty() {
                prop_assert!(overlay.is_empty());
            }
        }
    }

    #[test]
    fn a_large_discard_is_one_entry() {
        let mut overlay = Overlay::default();
        overlay.insert_zero(1, 0, 512 << 20);
        assert_eq!(overlay.len(), 1);
    }
}
