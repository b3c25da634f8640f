//! Memory for what is read of a journal, used again once nobody holds it. (pure)
//!
//! New memory of megabytes costs as much as reading into it. Holds: a buffer is handed out only
//! when nobody else has it; at most [`KEPT_BYTES`] are kept, and none longer than [`KEPT_US`] after
//! its last use. Time is an argument.

use std::collections::VecDeque;
use std::sync::Arc;

/// What was handed out, the one used last at the end.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    kept: VecDeque<(u64, Arc<Vec<u8>>)>,
    bytes: usize,
}

impl Buffers {
    /// A buffer nobody holds, with room for `want` bytes if there is one, the smallest of those;
    /// else a new one. What is in it is over.
    pub(crate) fn take(&mut self, want: usize, now_us: u64) -> Vec<u8> {
        self.forget(now_us);
        let free = |(_, data): &&(u64, Arc<Vec<u8>>)| {
            Arc::strong_count(data) == 1 && data.capacity() >= want
        };
        let best = self.kept.iter().filter(free).min_by_key(|(_, data)| data.capacity());
        let at = best.and_then(|best| self.kept.iter().position(|kept| std::ptr::eq(kept, best)));
        let data = at.and_then(|at| self.kept.remove(at)).and_then(|(_, data)| {
            self.bytes -= data.capacity();
            Arc::into_inner(data)
        });
        data.unwrap_or_else(|| Vec::with_capacity(want))
    }

    /// Shares a buffer, and keeps it for [`Self::take`].
    pub(crate) fn give(&mut self, data: Vec<u8>, now_us: u64) -> Arc<Vec<u8>> {
        let data = Arc::new(data);
        self.bytes += data.capacity();
        self.kept.push_back((now_us, data.clone()));
        while self.bytes > KEPT_BYTES {
            self.drop_oldest();
        }
        data
    }

    /// Lets go of what was not needed for [`KEPT_US`].
    pub(crate) fn forget(&mut self, now_us: u64) {
        while self.kept.front().is_some_and(|(at, _)| at.saturating_add(KEPT_US) <= now_us) {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some((_, data)) = self.kept.pop_front() {
            self.bytes -= data.capacity();
        }
    }
}

/// Two epochs, and what is read meanwhile.
const KEPT_BYTES: usize = 96 << 20;
const KEPT_US: u64 = 5_000_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

    use super::*;

    const MIB: usize = 1 << 20;

    /// Takes a buffer, fills it and gives it; where it is, too.
    fn used(buffers: &mut Buffers, bytes: usize, now_us: u64) -> (Arc<Vec<u8>>, *const u8) {
        let mut data = buffers.take(bytes, now_us);
        data.resize(data.len().max(bytes), 1);
        let data = buffers.give(data, now_us);
        let at = data.as_ptr();
        (data, at)
    }

    #[test]
    fn a_buffer_is_used_again_only_when_nobody_holds_it() {
        let mut buffers = Buffers::default();
        let (first, at) = used(&mut buffers, MIB, 0);
        let (second, other) = used(&mut buffers, MIB, 0);
        assert_ne!(at, other);
        let held = first.clone();
        drop(first);
        assert_ne!(used(&mut buffers, MIB, 0).1, at, "one still holds it");
        drop((held, second));
        assert_eq!(held_at(&mut buffers, 3), 3, "all three are free");
    }

    /// How many of `count` buffers taken at once had been used before.
    fn held_at(buffers: &mut Buffers, count: usize) -> usize {
        let taken: Vec<_> = (0..count).map(|_| buffers.take(MIB, 0)).collect();
        taken.iter().filter(|data| !data.is_empty()).count()
    }

    #[test]
    fn the_smallest_that_is_large_enough_is_taken() {
        let mut buffers = Buffers::default();
        let all: Vec<_> = [4, 1, 2].map(|mib| used(&mut buffers, mib * MIB, 0)).into();
        let at: Vec<_> = all.iter().map(|(_, at)| *at).collect();
        drop(all);
        let taken = [MIB + 1, MIB + 1, MIB + 1, 1].map(|want| buffers.take(want, 0));
        assert_eq!(taken[0].as_ptr(), at[2]);
        assert_eq!(taken[1].as_ptr(), at[0]);
        assert!(taken[2].is_empty(), "the last one is too small");
        assert_eq!(taken[3].as_ptr(), at[1]);
        assert_eq!(buffers.bytes, 0);
    }

    #[test]
    fn no_more_than_its_bound_is_kept_and_the_newest_of_it() {
        let mut buffers = Buffers::default();
        let all: Vec<_> = (0..60).map(|_| used(&mut buffers, 2 * MIB, 0)).collect();
        assert_eq!((buffers.bytes, buffers.kept.len()), (KEPT_BYTES, 48));
        let newest = all.last().unwrap().1;
        assert_eq!(buffers.kept.back().unwrap().1.as_ptr(), newest);
        let large = used(&mut buffers, KEPT_BYTES + 1, 0).0;
        assert_eq!((buffers.bytes, buffers.kept.len(), Arc::strong_count(&large)), (0, 0, 1));
    }

    #[test]
    fn what_is_not_needed_for_a_while_is_let_go() {
        let mut buffers = Buffers::default();
        drop((used(&mut buffers, MIB, 0), used(&mut buffers, 2 * MIB, 10)));
        buffers.forget(KEPT_US - 1);
        assert_eq!(buffers.bytes, 3 * MIB);
        buffers.forget(KEPT_US);
        assert_eq!(buffers.bytes, 2 * MIB);
        drop(used(&mut buffers, MIB, KEPT_US));
        buffers.forget(KEPT_US + 10);
        assert_eq!(buffers.bytes, 2 * MIB, "it was used again");
        buffers.forget(u64::MAX);
        assert_eq!(buffers.bytes, 0);
    }
}
