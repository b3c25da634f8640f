//! Bytes in memory that O_DIRECT takes. (pure)

use std::ops::Deref;

/// Bytes of which one stands at a multiple of [`ALIGN`] in memory, if it was made by
/// [`Self::with_room`] and not cloned since; else anywhere. What is written from there
/// past the page cache need not be copied.
#[derive(Debug, Default)]
pub struct Placed {
    data: Vec<u8>,
    /// Unused bytes before.
    start: usize,
}

impl Placed {
    /// No bytes, with room for `len`. The byte at `at` will be aligned.
    pub fn with_room(len: usize, at: usize) -> Self {
        let mut data: Vec<u8> = Vec::with_capacity(len + ALIGN);
        // Only a matter of speed: a Vec that moved stays right.
        let start = data.as_ptr().wrapping_add(at).align_offset(ALIGN).min(ALIGN);
        data.resize(start, 0);
        Self { data, start }
    }

    /// Adds bytes; beyond the room all of them move to another place.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.data.extend_from_slice(bytes);
    }
}

impl Deref for Placed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.data[self.start..]
    }
}

impl From<Vec<u8>> for Placed {
    fn from(data: Vec<u8>) -> Self {
        Self { data, start: 0 }
    }
}

impl Clone for Placed {
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

impl PartialEq for Placed {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Placed {}

/// Of a page, which every device takes, in bytes.
const ALIGN: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_asked_for_is_aligned_and_stays_there_within_the_room() {
        for at in [0, 1, 176, 4095, 4096] {
            let mut placed = Placed::with_room(10_000, at);
            placed.extend_from_slice(&[1; 5000]);
            placed.extend_from_slice(&[2; 5000]);
            assert_eq!(placed[at..].as_ptr().align_offset(ALIGN), 0);
            assert_eq!((placed.len(), placed[4999], placed[5000]), (10_000, 1, 2));
            assert_eq!(placed.clone(), placed);
        }
    }
}
