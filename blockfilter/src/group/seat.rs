//! Which processor the group's thread computes on. (the decision is pure)
//!
//! A client's message wakes the thread where the client runs, if the processor where it ran
//! last is busy, say with writing back. Linux leaves the two together there, each waiting for
//! the other to sleep, while that other processor has long been idle: it looks for an idle one
//! only if those that share the cache are little used (`SIS_UTIL`). So this measures how long
//! the thread was ready to run and did not, and moves it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::thread::{sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Moves the thread that made it.
#[derive(Debug)]
pub(super) struct Seat {
    /// The kernel's account of this thread; None where it keeps none.
    account: Option<File>,
    decision: Decision,
}

impl Seat {
    /// For the calling thread.
    pub(super) fn new() -> Self {
        let account = File::open("/proc/thread-self/schedstat").ok();
        Self { account, decision: Decision::default() }
    }

    /// To be called before a wait, at `now` (monotonic microseconds). `others`: write-back or a
    /// copy runs beside it, so other processors are hardly idle. True if it moved.
    pub(super) fn look(&mut self, now: u64, others: bool) -> bool {
        if now < self.decision.due {
            return false;
        }
        let Some(waited) = self.account.as_ref().and_then(waited_us) else { return false };
        let go = self.decision.take(now, waited, others);
        if go {
            move_over();
        }
        go
    }
}

/// How long the thread of this account was ready to run and did not, microseconds.
fn waited_us(account: &File) -> Option<u64> {
    let mut text = [0; 96];
    let len = account.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(&text[..len]).ok()?;
    Some(text.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1000)
}

/// To any other processor that it may use.
fn move_over() {
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let mut others = allowed;
    others.unset(sched_getcpu());
    if others.count() > 0 && sched_setaffinity(None, &others).is_ok() {
        // What it may use stays as it was; it fails only if that has changed meanwhile.
        let _ = sched_setaffinity(None, &allowed);
    }
}

/// When to move. (pure)
#[derive(Debug, Default)]
struct Decision {
    /// Next look, monotonic microseconds.
    due: u64,
    looked: u64,
    waited: u64,
    /// The last look moved it.
    moved: bool,
    gap: u64,
}

impl Decision {
    fn take(&mut self, now: u64, waited: u64, others: bool) -> bool {
        let (elapsed, lost) = (now - self.looked, waited.saturating_sub(self.waited));
        let crowded = lost * CROWDED >= elapsed;
        (self.looked, self.waited, self.due) = (now, waited, now + LOOK);
        let go = crowded && !others && !self.moved;
        if !crowded {
            self.gap = LOOK;
        } else if self.moved {
            // It was no better there.
            self.gap = (self.gap * 2).clamp(LOOK, GAP_MAX);
            self.due = now + self.gap;
        }
        self.moved = go;
        go
    }
}

/// Between two looks, microseconds.
const LOOK: u64 = 1_000;
/// Crowded is who waits for a processor one part of so many of the time.
const CROWDED: u64 = 8;
/// Longest time between two moves that gain nothing, microseconds.
const GAP_MAX: u64 = 64_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_a_processor_moves_once_and_again_only_after_growing_gaps() {
        let mut decision = Decision::default();
        let (mut now, mut waited, mut moves) = (0, 0, Vec::new());
        while now < 1_000_000 {
            let elapsed = decision.due - now;
            (now, waited) = (decision.due.max(now + 1), waited + elapsed / 2);
            if decision.take(now, waited, false) {
                moves.push(now);
            }
        }
        let gaps: Vec<u64> = moves.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.is_sorted() && moves.len() > 5, "{gaps:?}");
        assert_eq!(gaps.last(), Some(&(LOOK + GAP_MAX)));
    }

    #[test]
    fn who_runs_or_has_others_beside_it_stays() {
        let mut decision = Decision::default();
        for round in 1..1000 {
            assert!(!decision.take(round * LOOK, round * LOOK / 20, false));
            assert_eq!(decision.due, (round + 1) * LOOK);
        }
        let mut decision = Decision::default();
        for round in 1..1000 {
            assert!(!decision.take(round * LOOK, round * LOOK / 2, true));
        }
    }

    #[test]
    fn a_move_that_helped_makes_the_next_one_as_quick() {
        let mut decision = Decision::default();
        assert!(decision.take(1000, 500, false));
        assert!(!decision.take(2000, 500, false));
        assert!(decision.take(3000, 1000, false));
        assert_eq!(decision.due, 4000);
    }

    #[test]
    fn a_thread_may_use_what_it_might_before_it_moved() {
        let before = sched_getaffinity(None).unwrap();
        move_over();
        let after = sched_getaffinity(None).unwrap();
        assert!((0..1024).all(|cpu| before.is_set(cpu) == after.is_set(cpu)));
        assert!(waited_us(&File::open("/proc/thread-self/schedstat").unwrap()).is_some());
    }
}
