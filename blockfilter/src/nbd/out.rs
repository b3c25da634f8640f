//! Answers on their way to a socket, and buffers that are used again.
//!
//! Small answers are collected in one buffer; the data of a large read keeps the buffer
//! that it was read into. Fresh memory is what a large transfer costs most (the
//! kernel clears every page), so a few buffers are kept.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

/// Buffers for later use, of at most so many bytes together.
#[derive(Debug)]
pub struct Buffers {
    spare: Vec<Vec<u8>>,
    bytes: usize,
    max: usize,
}

impl Buffers {
    /// Keeps at most `max` bytes.
    pub fn new(max: usize) -> Self {
        Self { spare: Vec::new(), bytes: 0, max }
    }

    /// A buffer of `len` bytes of any content.
    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let fit = self.spare.iter().enumerate().filter(|(_, b)| b.capacity() >= len);
        let Some((index, _)) = fit.min_by_key(|(_, b)| b.capacity()) else {
            return vec![0; len];
        };
        let mut buf = self.spare.swap_remove(index);
        self.bytes -= buf.capacity();
        buf.resize(len, 0);
        buf
    }

    /// Takes a buffer back.
    pub fn give(&mut self, buf: Vec<u8>) {
        if self.bytes + buf.capacity() <= self.max {
            self.bytes += buf.capacity();
            self.spare.push(buf);
        }
    }
}

/// What is to be sent.
#[derive(Debug)]
pub struct Out {
    pieces: VecDeque<Vec<u8>>,
    /// Bytes of the first piece that were sent.
    sent: usize,
    /// Bytes that wait.
    len: usize,
    /// The last piece is data of a read: nothing is appended to it.
    closed: bool,
    buffers: Buffers,
}

impl Default for Out {
    fn default() -> Self {
        let buffers = Buffers::new(KEEP);
        Self { pieces: VecDeque::new(), sent: 0, len: 0, closed: false, buffers }
    }
}

impl Out {
    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends what `add` appends to a buffer.
    pub fn add(&mut self, add: impl FnOnce(&mut Vec<u8>)) {
        let fresh = self.closed || self.pieces.back().is_none_or(|p| p.len() >= SMALL);
        if fresh {
            let piece = self.buffers.take(0);
            self.pieces.push_back(piece);
            self.closed = false;
        }
        if let Some(piece) = self.pieces.back_mut() {
            let before = piece.len();
            add(piece);
            self.len += piece.len() - before;
        }
    }

    /// A buffer for the data of a read.
    pub fn buffer(&mut self, len: usize) -> Vec<u8> {
        self.buffers.take(len)
    }

    /// Takes such a buffer back.
    pub fn give(&mut self, buf: Vec<u8>) {
        self.buffers.give(buf);
    }

    /// Appends such a buffer.
    pub fn add_data(&mut self, data: Vec<u8>) {
        if data.len() <= SMALL {
            self.add(|piece| piece.extend_from_slice(&data));
            self.buffers.give(data);
            return;
        }
        self.len += data.len();
        self.pieces.push_back(data);
        self.closed = true;
    }

    /// Frees the buffers that are kept: the connection is idle.
    pub fn rest(&mut self) {
        self.buffers = Buffers::new(KEEP);
    }

    /// Calls `write` once with what waits; the bytes that it took are gone.
    pub fn write_with(
        &mut self,
        write: impl FnOnce(&[IoSlice<'_>]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut count = 0;
        for (piece, slice) in self.pieces.iter().zip(&mut slices) {
            let from = if count == 0 { self.sent } else { 0 };
            *slice = IoSlice::new(&piece[from..]);
            count += 1;
        }
        let taken = write(&slices[..count])?;
        self.len -= taken;
        self.sent += taken;
        while let Some(piece) = self.pieces.front() {
            if self.sent < piece.len() {
                break;
            }
            self.sent -= piece.len();
            if let Some(piece) = self.pieces.pop_front() {
                self.buffers.give(piece);
            }
        }
        self.closed &= !self.pieces.is_empty();
        Ok(taken)
    }
}

/// Bytes kept for later answers.
const KEEP: usize = 5 << 20;
/// Data up to this is copied behind other answers, bytes.
const SMALL: usize = 64 << 10;
/// Pieces given to one write.
const SLICES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_leaves_in_order_however_little_the_socket_takes() {
        let mut out = Out::default();
        let mut expect = Vec::new();
        for round in 0..6u8 {
            out.add(|piece| piece.extend_from_slice(&[round; 16]));
            expect.extend_from_slice(&[round; 16]);
            let len = if round % 2 == 0 { 100 } else { SMALL + 1 };
            let mut data = out.buffer(len);
            data.fill(100 + round);
            expect.extend_from_slice(&data);
            out.add_data(data);
        }
        assert_eq!(out.len(), expect.len());
        let mut found = Vec::new();
        while !out.is_empty() {
            let limit = 10_007;
            let taken = out.write_with(|slices| {
                let all = slices.iter().flat_map(|s| s.iter().copied()).take(limit);
                let before = found.len();
                found.extend(all);
                Ok(found.len() - before)
            });
            assert!(taken.is_ok_and(|n| n > 0));
        }
        assert!(found == expect);
    }

    #[test]
    fn no_more_is_kept_than_was_said() {
        let mut buffers = Buffers::new(1000);
        for _ in 0..10 {
            buffers.give(vec![0; 300]);
        }
        assert_eq!(buffers.spare.len(), 3);
        assert_eq!(buffers.take(200).len(), 200);
        assert_eq!(buffers.take(5000).len(), 5000);
    }
}
