//! Which processor the group's thread computes on. (the decision is pure)
//!
//! A client's message wakes the thread where the client runs, if the processor where it ran
//! last is busy, say with writing back. Linux leaves the two together there, each waiting for
//! the other to sleep, while that other processor has long been idle: it looks for an idle one
//! only if those that share the cache are little used (`SIS_UTIL`). So this measures how long
//! the thread was ready to run and did not, and moves it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Moves the thread that made it.
#[derive(Debug)]
pub(super) struct Seat {
    /// The kernel's account of this thread; None where it keeps none.
    account: Option<File>,
    /// See [`all_allowed`].
    all: Option<CpuSet>,
    decision: Decision,
}

impl Seat {
    /// For the calling thread.
    pub(super) fn new() -> Self {
        let account = File::open("/proc/thread-self/schedstat").ok();
        Self { account, all: all_allowed().ok().flatten(), decision: Decision::default() }
    }

    /// To be called before a wait, at `now` (monotonic microseconds). `others`: write-back or a
    /// copy runs beside it, so other processors are hardly idle. True if it moved.
    pub(super) fn look(&mut self, now: u64, others: bool) -> bool {
        if now < self.decision.due {
            return false;
        }
        let account = self.account.as_ref().filter(|_| !others);
        self.decision.take(now, account.and_then(waited_us)) && move_over(self.all)
    }
}

/// How long the thread of this account was ready to run and did not, microseconds.
fn waited_us(account: &File) -> Option<u64> {
    let mut text = [0; 96];
    let len = account.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(&text[..len]).ok()?;
    Some(text.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1000)
}

/// Every processor, of which the kernel takes what a thread may use: so those that are added
/// later count.
fn every() -> CpuSet {
    let mut every = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|cpu| every.set(cpu));
    every
}

/// What this thread may use, if nobody chose fewer for it than there are.
fn all_allowed() -> rustix::io::Result<Option<CpuSet>> {
    let allowed = sched_getaffinity(None)?;
    sched_setaffinity(None, &every())?;
    let all = sched_getaffinity(None)?;
    if all != allowed {
        sched_setaffinity(None, &allowed)?;
    }
    Ok((all == allowed).then_some(all))
}

/// To any other processor that it may use. False if there is none. `all`: see
/// [`all_allowed`].
fn move_over(all: Option<CpuSet>) -> bool {
    let Ok(allowed) = sched_getaffinity(None) else { return false };
    let mut others = allowed;
    others.unset(sched_getcpu());
    if others.count() == 0 || sched_setaffinity(None, &others).is_err() {
        return false;
    }
    let back = if all == Some(allowed) { every() } else { allowed };
    // It fails only if what is allowed has changed meanwhile.
    let _ = sched_setaffinity(None, &back);
    true
}

/// When to move. (pure)
#[derive(Debug, Default)]
struct Decision {
    /// Next look, monotonic microseconds.
    due: u64,
    /// The last look: when, and how long the thread had waited.
    last: Option<(u64, u64)>,
    /// It moved it.
    moved: bool,
    /// To the look after one that saw no gain, microseconds.
    gap: u64,
}

impl Decision {
    /// `waited`: how long the thread was ready and did not run so far; None where that does
    /// not matter now.
    fn take(&mut self, now: u64, waited: Option<u64>) -> bool {
        self.due = now + LOOK;
        let last = std::mem::replace(&mut self.last, waited.map(|waited| (now, waited)));
        let (Some((then, before)), Some(waited)) = (last, waited) else {
            self.moved = false;
            return false;
        };
        let crowded = waited.saturating_sub(before) * CROWDED >= now - then;
        let go = crowded && !self.moved;
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
            if decision.take(now, Some(waited)) {
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
            assert!(!decision.take(round * LOOK, Some(round * LOOK / 20)));
            assert_eq!(decision.due, (round + 1) * LOOK);
        }
        // What it waited beside others does not count afterwards.
        assert!(!decision.take(1_000_000, None));
        assert!(!decision.take(1_001_000, Some(900_000)));
        assert!(decision.take(1_002_000, Some(900_500)));
    }

    #[test]
    fn a_move_that_helped_makes_the_next_one_as_quick() {
        let mut decision = Decision::default();
        assert!(!decision.take(1000, Some(0)));
        assert!(decision.take(2000, Some(500)));
        assert!(!decision.take(3000, Some(500)));
        assert!(decision.take(4000, Some(1000)));
        assert_eq!(decision.due, 5000);
    }

    #[test]
    fn a_thread_may_use_what_it_might_before_it_moved() {
        let before = sched_getaffinity(None).unwrap();
        let all = all_allowed().unwrap();
        assert_eq!(move_over(all), before.count() > 1);
        assert_eq!(sched_getaffinity(None).unwrap(), before);
        let mut one = CpuSet::new();
        one.set(sched_getcpu());
        sched_setaffinity(None, &one).unwrap();
        assert_eq!(all_allowed().unwrap().is_some(), before.count() == 1);
        assert!(!move_over(None));
        assert_eq!(sched_getaffinity(None).unwrap(), one);
        sched_setaffinity(None, &before).unwrap();
        assert!(waited_us(&File::open("/proc/thread-self/schedstat").unwrap()).is_some());
    }
}
