//! Which blocks may differ from what the target durably holds. (pure)
//!
//! Owns two bitmaps a disk, a bit for each [`DIRTY_BLOCK`] bytes, and what the target last said of
//! itself. Every change of a disk sets bits in `current`, begun at the LSN `mark`. When the target
//! holds everything below `mark`, all that `previous` names is over there: `previous` becomes what
//! `current` was, and a new `current` begins at the head. When it holds everything up to the head,
//! both are empty at once. So bits go away only by what was confirmed after they were set, and an
//! idle disk is clean with the last confirmation.
//!
//! Holds (I26): clean is said only of a block that no record at or above the target's position
//! touched, while the target's copy is *whole* and that position is at or above `known`: of older
//! records nothing is known here (after a start, a seed or a target that fell back). Dirty may be
//! said of what is equal. Before it: [`crate::filter`], which sets bits at admission, before the
//! write is answered. After it: `standfast:dirty` of the NBD server. It never does I/O.

use std::collections::BTreeMap;

/// A part of a disk that is alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyExtent {
    /// In bytes.
    pub len: u64,
    /// It may differ from what the target durably holds.
    pub dirty: bool,
}

/// The maps of a group's disks.
#[derive(Debug)]
pub struct Dirty {
    /// By disk index, as far as disks were written.
    disks: Vec<Maps>,
    /// `current` has every record from here on, `previous` the ones before.
    mark: u64,
    /// The maps have every record from here on that the target may lack.
    known: u64,
    /// The target holds everything below.
    floor: u64,
    /// The target has a complete copy of the disks as of `floor`.
    whole: bool,
    /// Who said so; see [`Dirty::told`].
    teller: u64,
}

#[derive(Debug, Default)]
struct Maps {
    current: Bits,
    previous: Bits,
}

/// Bits in pages that are there once one of their bits was set.
#[derive(Debug, Default)]
struct Bits(BTreeMap<u64, Box<Page>>);

type Page = [u64; WORDS];

impl Dirty {
    /// Nothing is known of the target, nor of records below `head`.
    pub fn new(head: u64) -> Self {
        Self { disks: Vec::new(), mark: head, known: head, floor: 0, whole: false, teller: 0 }
    }

    /// A record that gets the next LSN changes `[offset, offset + len)` of a disk.
    pub fn set(&mut self, disk: u8, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let disk = usize::from(disk);
        if disk >= self.disks.len() {
            self.disks.resize_with(disk + 1, Maps::default);
        }
        let (first, last) = (offset / DIRTY_BLOCK, (offset + len - 1) / DIRTY_BLOCK);
        self.disks[disk].current.set(first, last);
    }

    /// The target holds everything below `floor`, durably; `whole`: and a complete copy below
    /// it. `head` is the end of what has an LSN. What a lower `teller` says after a higher one
    /// spoke is from an older session and may be long untrue: it is ignored, and the answer false.
    pub fn told(&mut self, teller: u64, floor: u64, whole: bool, head: u64) -> bool {
        if teller < self.teller {
            return false;
        }
        self.teller = teller;
        if floor < self.floor {
            // It lost what it held (it was restored or replaced), and we threw away what
            // that was.
            self.forget(head);
        }
        (self.floor, self.whole) = (floor, whole);
        if floor >= head {
            self.disks.clear();
            self.mark = head;
        } else if floor >= self.mark {
            for maps in &mut self.disks {
                maps.previous = std::mem::take(&mut maps.current);
            }
            self.mark = head;
        }
        true
    }

    /// Nothing is known any more of the target, nor of records below `head`.
    pub fn forget(&mut self, head: u64) {
        self.disks.clear();
        (self.mark, self.known, self.whole) = (head, head, false);
    }

    /// Whether anything can be clean.
    pub fn is_known(&self) -> bool {
        self.whole && self.floor >= self.known
    }

    /// Extents from `offset`, at most `max`, that cover at most `len` bytes; neighbours differ.
    /// At least one, unless `len` or `max` is 0.
    pub fn extents(&self, disk: u8, offset: u64, len: u64, max: usize) -> Vec<DirtyExtent> {
        let mut extents = Vec::new();
        let nothing = Maps::default();
        let maps = self.disks.get(usize::from(disk)).unwrap_or(&nothing);
        let (mut at, end) = (offset, offset + len);
        let known = self.is_known();
        while at < end && extents.len() < max {
            let block = at / DIRTY_BLOCK;
            let dirty = !known || maps.is_set(block);
            let next = match known {
                true => maps.run_end(block, end.div_ceil(DIRTY_BLOCK), dirty) * DIRTY_BLOCK,
                false => end,
            };
            let next = next.min(end);
            extents.push(DirtyExtent { len: next - at, dirty });
            at = next;
        }
        extents
    }
}

impl Maps {
    fn is_set(&self, block: u64) -> bool {
        self.run_end(block, block + 1, false) == block
    }

    /// The first block from `from` on, below `end`, that is not as `set` says; else `end`.
    /// By pages: one request may ask for the whole of a disk of which little was written.
    fn run_end(&self, from: u64, end: u64, set: bool) -> u64 {
        let mut at = from;
        while at < end {
            let page = at / PAGE_BITS;
            let pages = [self.current.page(page), self.previous.page(page)];
            if let Some(bit) = first_other(pages, (at % PAGE_BITS) as usize, set) {
                return end.min(page * PAGE_BITS + bit as u64);
            }
            at = (page + 1) * PAGE_BITS;
        }
        end
    }
}

impl Bits {
    fn page(&self, number: u64) -> Option<&Page> {
        self.0.get(&number).map(Box::as_ref)
    }

    /// Sets blocks `first..=last`.
    fn set(&mut self, first: u64, last: u64) {
        let mut at = first;
        while at <= last {
            let page = at / PAGE_BITS;
            let end = last.min(page * PAGE_BITS + PAGE_BITS - 1);
            let words = self.0.entry(page).or_insert_with(|| Box::new([0; WORDS]));
            fill(words, (at % PAGE_BITS) as usize, (end % PAGE_BITS) as usize);
            at = end + 1;
        }
    }
}

/// The first bit from `from` on that is not as `set` says in the union of two pages.
fn first_other(pages: [Option<&Page>; 2], from: usize, set: bool) -> Option<usize> {
    if pages == [None, None] {
        return set.then_some(from);
    }
    let mut mask = u64::MAX << (from % 64);
    for index in from / 64..WORDS {
        let word = pages.iter().flatten().fold(0, |word, page| word | page[index]);
        let others = if set { !word } else { word } & mask;
        if others != 0 {
            return Some(index * 64 + others.trailing_zeros() as usize);
        }
        mask = u64::MAX;
    }
    None
}

/// Sets bits `first..=last`.
fn fill(words: &mut Page, first: usize, last: usize) {
    let head = u64::MAX << (first % 64);
    let tail = u64::MAX >> (63 - last % 64);
    let (first, last) = (first / 64, last / 64);
    if first == last {
        words[first] |= head & tail;
        return;
    }
    words[first] |= head;
    words[first + 1..last].fill(u64::MAX);
    words[last] |= tail;
}

/// What one bit stands for, bytes.
pub const DIRTY_BLOCK: u64 = 64 << 10;
/// Words of 64 bits in a page: 4 KiB for 2 GiB of a disk.
const WORDS: usize = 512;
const PAGE_BITS: u64 = 64 * WORDS as u64;

#[cfg(test)]
mod tests;
