//! Writes a disk's dirty pages out in small parts before they are synced.
//!
//! `fdatasync(2)` of an image hands the device all its dirty pages at once, and whoever commits meanwhile
//! waits behind them: with 1 GiB of them a commit took 3 to 8 ms for 0.7 s. So a checkpoint beside clients that wait
//! for commits first writes part by part what was written back since the last that did this, each time waiting until the device
//! has it (`sync_file_range(2)`), as PostgreSQL's `checkpoint_flush_after` does. That makes
//! nothing durable; the sync behind it does, and finds little left.

#![expect(unsafe_code, reason = "nothing safe that we use knows sync_file_range")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Parts of one disk that were written since they were last taken. A hint: what it misses is synced
/// all the same.
#[derive(Debug)]
pub(super) struct Parts {
    /// Bytes of one, as a power of two.
    shift: u32,
    bits: Vec<AtomicU64>,
}

impl Parts {
    /// Of a disk of so many bytes, none of them written.
    pub(super) fn new(size: u64) -> Self {
        let least = size.div_ceil(PARTS_MAX).max(PART_BYTES);
        let shift = least.next_power_of_two().trailing_zeros();
        let words = (size >> shift) / 64 + 1;
        Self { shift, bits: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// These bytes were written.
    pub(super) fn mark(&self, offset: u64, len: u64) {
        for part in offset >> self.shift..(offset + len).div_ceil(1 << self.shift) {
            if let Some(word) = self.bits.get((part / 64) as usize) {
                word.fetch_or(1 << (part % 64), Ordering::Relaxed);
            }
        }
    }

    /// Takes them, lowest first, for `act`: offset and bytes, which may reach beyond the disk's end. Until it
    /// fails or says that it is enough: where it stopped, up to 64 parts are forgotten.
    pub(super) fn take(&self, mut act: impl FnMut(u64, u64) -> io::Result<bool>) -> io::Result<()> {
        for (index, word) in (0..).zip(&self.bits) {
            let mut set = word.swap(0, Ordering::Relaxed);
            while set != 0 {
                let part = index * 64 + u64::from(set.trailing_zeros());
                if !act(part << self.shift, 1 << self.shift)? {
                    return Ok(());
                }
                set &= set - 1;
            }
        }
        Ok(())
    }
}

/// Writes the dirty pages of a range, and waits for it; not durable. An error is a failed write-back, which no
/// later sync may be told of.
pub(super) fn write_out(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else { return Ok(()) };
    if offset.checked_add(len).is_none() {
        return Ok(());
    }
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: no memory is passed, and the descriptor is open for as long as it is borrowed.
    if unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, flags) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Not for this kind of file, or of kernel: what follows syncs it all the same. Any other may be a write-back's.
        Some(libc::ESPIPE | libc::ENOSYS) => Ok(()),
        _ => Err(error),
    }
}

/// Bytes of a part, at least.
const PART_BYTES: u64 = 256 << 10;
/// Parts of a disk, at most: 32 KiB of memory, and as many calls where nothing is dirty.
const PARTS_MAX: u64 = 1 << 18;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

    use std::os::fd::AsFd;

    use super::*;

    fn taken(parts: &Parts, most: usize) -> Vec<(u64, u64)> {
        let mut taken = Vec::new();
        let act = |offset, len| {
            taken.push((offset, len));
            Ok(taken.len() < most)
        };
        parts.take(act).unwrap();
        taken
    }

    #[test]
    fn each_part_that_was_written_is_taken_once() {
        let parts = Parts::new(1 << 30);
        assert_eq!(taken(&parts, 9), []);
        for offset in [0, 4096, (1 << 30) - 4096] {
            parts.mark(offset, 4096);
        }
        parts.mark(100 * PART_BYTES - 1, 2);
        let at = |part: u64| (part * PART_BYTES, PART_BYTES);
        assert_eq!(taken(&parts, 9), [at(0), at(99), at(100), at(4095)]);
        assert_eq!(taken(&parts, 9), []);
        parts.mark(0, 1 << 30);
        assert_eq!(taken(&parts, 3).len(), 3);
        assert_eq!(taken(&parts, 9999).len(), 4096 - 64);
    }

    #[test]
    fn parts_are_few_however_large_the_disk_and_what_is_beyond_its_end_is_no_harm() {
        for size in [1, 4096, PART_BYTES, 1 << 36, (1 << 40) - 512, 1 << 46, u64::MAX >> 1] {
            let parts = Parts::new(size);
            assert!(parts.bits.len() as u64 <= PARTS_MAX / 64 + 1, "{size}");
            parts.mark(size - 1, 1);
            let [(offset, len)] = taken(&parts, 9)[..] else { panic!("{size}") };
            assert!(offset < size && offset + len >= size && len >= PART_BYTES, "{size}");
            parts.mark(size + (len << 7), 1);
        }
    }

    #[test]
    fn an_error_ends_it() {
        let parts = Parts::new(1 << 30);
        parts.mark(0, 1 << 30);
        let mut calls = 0;
        let failed = parts.take(|_, _| {
            calls += 1;
            Err(io::Error::other("broken"))
        });
        assert!(failed.is_err() && calls == 1);
    }

    #[test]
    fn a_file_takes_it_and_what_is_no_file_is_left_to_the_sync() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        write_out(file.as_fd(), 4096, PART_BYTES).unwrap();
        let (pipe, _other) = io::pipe().unwrap();
        write_out(pipe.as_fd(), 0, 4096).unwrap();
    }
}
