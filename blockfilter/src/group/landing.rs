//! One large payload on its way from a client straight into the arena.
//!
//! Its bytes lie where its record will have them: behind the header page of an empty batch, above
//! everything that is published, so until the record is admitted nobody knows of them (I1, I12).
//! There is one at a time; whatever is admitted before it is complete takes the place, and what had
//! come is moved out first.

use crate::crc32c;
use std::io;

use crate::arena::Arena;

/// Where the payload goes and what of it is there.
#[derive(Debug)]
pub(super) struct Landing {
    /// The connection that receives it.
    pub(super) owner: u64,
    /// Its first byte's position.
    pub(super) pos: u64,
    /// Bytes.
    pub(super) len: u64,
    filled: u64,
    crc: u32,
}

impl Landing {
    /// Nothing came yet.
    pub(super) fn new(owner: u64, pos: u64, len: u64) -> Self {
        Self { owner, pos, len, filled: 0, crc: 0 }
    }

    /// Lets `read` put the next bytes there; it says how many it had.
    pub(super) fn receive(
        &mut self,
        arena: &Arena,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let room = (self.len - self.filled).min(STEP);
        let (count, crc) = arena.receive(self.pos + self.filled, room, |to| {
            let count = read(to)?;
            io::Result::Ok((count, crc32c::crc32c_append(self.crc, &to[..count])))
        })?;
        self.filled += count as u64;
        self.crc = crc;
        Ok(count)
    }

    /// The CRC of the whole.
    pub(super) fn crc(&self) -> u32 {
        assert_eq!(self.filled, self.len, "I1: only what is complete is admitted");
        self.crc
    }

    /// A buffer of the payload's length that begins with what came.
    pub(super) fn move_out(self, arena: &Arena) -> Vec<u8> {
        let mut buf = vec![0; self.len as usize];
        buf[..self.filled as usize].copy_from_slice(arena.bytes(self.pos, self.filled));
        buf
    }
}

/// Received at once, bytes: the sum finds it in the cache.
const STEP: u64 = 256 << 10;
