//! Which chunk is in which slot, and which slots may be used again. (pure)
//!
//! Chunk c holds positions `c*C .. (c+1)*C` and may be in any free slot; its header
//! names it. A slot is free again only when a *durable* super block says that
//! the checkpoint is at or beyond the chunk's end, and the target holds it or a
//! durable freeze released it (I5).

use std::collections::BTreeMap;

use super::format::{PAGE, SLOTS_AT};

/// Sizes that never change for a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkGeometry {
    /// Bytes in a chunk, a power of two.
    pub chunk: u64,
    /// Slots in the file.
    pub slots: u32,
}

impl ChunkGeometry {
    /// The chunk that holds a position.
    pub fn chunk_of(&self, pos: u64) -> u64 {
        pos / self.chunk
    }

    /// A position at a chunk's very start means behind its header: the place of
    /// its first batch. All positions are kept in this form.
    pub fn normal(&self, pos: u64) -> u64 {
        if pos.is_multiple_of(self.chunk) { pos + PAGE } else { pos }
    }

    /// First position behind the chunk that holds `pos`.
    pub fn chunk_end(&self, pos: u64) -> u64 {
        (self.chunk_of(pos) + 1) * self.chunk
    }

    /// Where a slot is in the file.
    pub fn slot_at(&self, slot: u32) -> u64 {
        SLOTS_AT + u64::from(slot) * self.chunk
    }

    /// Bytes of the whole file.
    pub fn file_len(&self) -> u64 {
        self.slot_at(self.slots)
    }
}

/// The slots of one journal.
#[derive(Clone, Debug)]
pub struct Slots {
    geometry: ChunkGeometry,
    used: BTreeMap<u64, u32>,
    free: Vec<u32>,
}

impl Slots {
    /// With the chunks that are in the file now.
    pub fn new(geometry: ChunkGeometry, used: BTreeMap<u64, u32>) -> Self {
        let mut free: Vec<u32> =
            (0..geometry.slots).filter(|s| !used.values().any(|u| u == s)).collect();
        free.reverse();
        Self { geometry, used, free }
    }

    /// Where a position is in the file, if its chunk is there.
    pub fn file_offset(&self, pos: u64) -> Option<u64> {
        let slot = self.used.get(&self.geometry.chunk_of(pos))?;
        Some(self.geometry.slot_at(*slot) + pos % self.geometry.chunk)
    }

    /// Gives the chunk that holds `pos` a slot, if it has none and one is free.
    pub fn assign(&mut self, pos: u64) -> bool {
        let chunk = self.geometry.chunk_of(pos);
        if self.used.contains_key(&chunk) {
            return true;
        }
        match self.free.pop() {
            Some(slot) => {
                self.used.insert(chunk, slot);
                true
            }
            None => false,
        }
    }

    /// Frees every chunk that ends at or below `keep_from`.
    pub fn recycle(&mut self, keep_from: u64) {
        while let Some((&chunk, &slot)) = self.used.first_key_value() {
            if (chunk + 1) * self.geometry.chunk > keep_from {
                return;
            }
            self.used.remove(&chunk);
            self.free.insert(0, slot);
        }
    }

    /// Slots that hold no chunk.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Slots that hold one.
    pub fn used(&self) -> u32 {
        self.used.len() as u32
    }

    /// Chunks that are kept only because the target lacks them.
    pub fn kept_for_shipping(&self, checkpoint: u64) -> u32 {
        let done = |c: &u64| (c + 1) * self.geometry.chunk <= checkpoint;
        self.used.keys().take_while(|c| done(c)).count() as u32
    }

    /// Slots that the redo log needs for itself: a quarter, at least 2, at most half.
    pub fn reserve(&self) -> u32 {
        (self.geometry.slots / 4).max(2).min(self.geometry.slots / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_used_again_only_below_the_kept_position() {
        let geometry = ChunkGeometry { chunk: 1 << 20, slots: 4 };
        let mut slots = Slots::new(geometry, BTreeMap::new());
        for chunk in 0..4u64 {
            assert!(slots.assign(chunk << 20));
        }
        assert!(!slots.assign(4 << 20));
        slots.recycle((1 << 20) - 1);
        assert!(!slots.assign(4 << 20), "chunk 0 is still needed");
        slots.recycle(1 << 20);
        assert!(slots.assign(4 << 20));
        assert_eq!(slots.file_offset(0), None);
        assert_eq!(slots.file_offset((4 << 20) + 5), Some(SLOTS_AT + 5));
    }
}
