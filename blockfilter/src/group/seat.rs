//! Which processor the group's thread computes on. (the decision is pure)
//!
//! A client's message wakes the thread where the client runs, if the processor where it ran
//! last is busy, say with writing back. Linux leaves the two together there, each waiting for
//! the other to sleep, while that other processor has long been idle: it looks for an idle one
//! only if those that share the cache are little used (`SIS_UTIL`). So this measures how long
//! the thread was ready to run and did not, and moves it.
//!
//! On two processors there is hardly an idle one to find, and the scheduler pushes the thread to and
//! fro between the client, write-back and a copy. So there it holds its own while it has something to do, and
//! asks write-back and the copy to compute on the other ([`Offer`]); its clients use whichever is
//! free. It lets go twice a second all the
//! same, because it does not know with whom it shares. While it is held there it works in bulk
//! ([`Bulk`]): a client's first message would wake it up, and the client's others would wait behind
//! a batch of one.
//!
//! A thread that carries out commits of a request or a few sleeps for the device again and again.
//! There, without a copy, it holds its own too, but has write-back compute on the same one: that
//! fills the times in which it sleeps, and the client has the other one. Should it have to wait there
//! it lets go, and tries that again only after growing gaps. With more processors it is held nowhere.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu};
use rustix::time::{ClockId, clock_gettime};

use crate::engine::bulk::Bulk;
use crate::engine::cpu::{Hold, Offer, Place, all_allowed, move_over};

/// Moves or holds the thread that made it.
#[derive(Debug)]
pub(super) struct Seat {
    /// The kernel's account of this thread; None where it keeps none.
    account: Option<File>,
    /// See [`all_allowed`].
    all: Option<CpuSet>,
    /// While it is held on one processor.
    held: Option<Hold>,
    /// Meanwhile, where others leave it.
    bulk: Option<Bulk>,
    /// Where write-back is to compute then, and a copy on this machine.
    offer: Arc<Offer>,
    decision: Decision,
}

/// What else of the group computes on this machine now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beside {
    /// Or commits that the engine carries out.
    Nothing,
    WriteBack,
    /// What is to be written back, but is not just now.
    Unapplied,
    /// The device, which this thread waits for in commits of a few requests, whether or not
    /// something is written back too.
    Commits,
    /// The same in commits of many.
    Batches,
    /// A connected copy, whether or not something is written back too.
    Copy,
}

impl Beside {
    /// Of two processors others leave this thread one.
    fn leaves(self) -> bool {
        match self {
            Self::Nothing | Self::Commits => false,
            Self::WriteBack | Self::Unapplied | Self::Batches | Self::Copy => true,
        }
    }
}

impl Seat {
    /// For the calling thread.
    pub(super) fn new(offer: Arc<Offer>) -> Self {
        let account = File::open("/proc/thread-self/schedstat").ok();
        let all = all_allowed().ok().flatten();
        Self { account, all, held: None, bulk: None, offer, decision: Decision::default() }
    }

    /// To be called before a wait, at `now` (monotonic microseconds). True if it moved.
    pub(super) fn look(&mut self, now: u64, beside: Beside) -> bool {
        if now < self.decision.due {
            return false;
        }
        let pair = self.held.is_some() || has_pair();
        let beside = match beside {
            Beside::Batches if !pair => Beside::Commits,
            Beside::Unapplied if !pair => Beside::Nothing,
            _ => beside,
        };
        let matters = pair || !beside.leaves();
        let used = self.account.as_ref().filter(|_| matters).and_then(used);
        match self.decision.take(now, beside, used, self.held.is_some()) {
            Step::Stay => {}
            Step::Move => return move_over(self.all),
            Step::Hold => self.hold(beside),
            Step::LetGo => self.let_go(),
        }
        false
    }

    /// When to look though nothing happens: write-back must not be kept here for nobody, nor it and the
    /// copy away.
    pub(super) fn due(&self) -> Option<u64> {
        (self.offer.get() != Place::Anywhere).then_some(self.decision.due)
    }

    fn hold(&mut self, beside: Beside) {
        if !has_pair() {
            return;
        }
        let cpu = sched_getcpu();
        self.held = Hold::at(Place::On(cpu), self.all);
        if self.held.is_none() {
            return;
        }
        if beside.leaves() {
            self.offer.set(Place::Off(cpu));
            self.bulk = Bulk::begin();
        } else {
            self.offer.set(Place::On(cpu));
        }
    }

    fn let_go(&mut self) {
        self.offer.set(Place::Anywhere);
        self.bulk = None;
        self.held = None;
    }
}

/// Whether this thread may use as many processors as it is held with.
fn has_pair() -> bool {
    sched_getaffinity(None).is_ok_and(|allowed| allowed.count() == PAIR)
}

/// What this thread has used so far, by its account.
fn used(account: &File) -> Option<Used> {
    let mut text = [0; 96];
    let len = account.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(&text[..len]).ok()?;
    let waited = text.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1000;
    // The account's own figure is as old as the last tick.
    let ran = clock_gettime(ClockId::ThreadCPUTime);
    Some(Used { ran: ran.tv_sec as u64 * 1_000_000 + ran.tv_nsec as u64 / 1000, waited })
}

/// How long a thread computed, and how long it was ready and did not, microseconds.
#[derive(Clone, Copy, Debug)]
struct Used {
    ran: u64,
    waited: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Stay,
    Move,
    Hold,
    LetGo,
}

/// When to move, and when to hold. (pure)
#[derive(Debug, Default)]
struct Decision {
    /// Next look, monotonic microseconds.
    due: u64,
    /// The last look that counts: when, beside what, and what was used by then.
    last: Option<(u64, Beside, Used)>,
    /// It moved it.
    moved: bool,
    /// Looks for which it was held.
    turns: u32,
    /// To the look after one that saw no gain, microseconds.
    gap: u64,
    /// It is not held before, monotonic microseconds.
    again: u64,
    /// How long it was not, after it had to wait while it was held, microseconds.
    pause: u64,
}

impl Decision {
    /// `used`: None where that does not matter now, or is not known.
    fn take(&mut self, now: u64, beside: Beside, used: Option<Used>, held: bool) -> Step {
        self.due = now + if beside.leaves() && used.is_some() { LOOK_LEAVES } else { LOOK };
        let last = std::mem::replace(&mut self.last, used.map(|used| (now, beside, used)));
        let spent = match (last, used) {
            (Some((then, with, before)), Some(used))
                if (with == beside || with.leaves() && beside.leaves()) && now > then =>
            {
                let ran = used.ran.saturating_sub(before.ran);
                Some((now - then, Used { ran, waited: used.waited.saturating_sub(before.waited) }))
            }
            _ => None,
        };
        let Some((elapsed, spent)) = spent else {
            self.moved = false;
            return if held { Step::LetGo } else { Step::Stay };
        };
        let crowded = spent.waited * CROWDED >= elapsed;
        if beside.leaves() {
            // Not held beside a stranger who computes all the time.
            self.moved = crowded && !held && !self.moved && beside != Beside::Copy;
            if self.moved {
                return Step::Move;
            }
            return self.hold_off(now, elapsed, spent, held);
        }
        if held {
            return self.keep(now, spent.waited * CROWDED_HELD >= elapsed, TURNS_COMMITS);
        }
        let go = crowded && !self.moved;
        if !crowded {
            self.gap = LOOK;
        } else if self.moved {
            // It was no better there.
            self.gap = (self.gap * 2).clamp(LOOK, GAP_MAX);
            self.due = now + self.gap;
        }
        self.moved = go;
        self.turns = 0;
        match go {
            true => Step::Move,
            false if beside == Beside::Commits && !crowded && now >= self.again => Step::Hold,
            false => Step::Stay,
        }
    }

    /// Whether it is held where others leave: while it works, be it in turns with its client.
    fn hold_off(&mut self, now: u64, elapsed: u64, spent: Used, held: bool) -> Step {
        // Or its clients want to.
        let busy = spent.ran + spent.waited;
        let unfair = spent.waited > spent.ran * UNFAIR;
        if held && busy * IDLE < elapsed {
            return Step::LetGo;
        }
        if held {
            return self.keep(now, unfair, TURNS_MAX);
        }
        self.turns = 0;
        let hold = busy * BUSY >= elapsed && !unfair && now >= self.again;
        if hold { Step::Hold } else { Step::Stay }
    }

    /// Whether it is held any longer: not where it waits too much, be it for write-back itself, and not for
    /// more than so many looks.
    fn keep(&mut self, now: u64, crowded: bool, turns: u32) -> Step {
        self.turns += 1;
        if crowded {
            self.pause = (self.pause * 2).clamp(LOOK, GAP_MAX);
            self.again = now + self.pause;
        } else if self.turns >= CALM {
            self.pause = 0;
        }
        if crowded || self.turns >= turns { Step::LetGo } else { Step::Stay }
    }
}

/// Between two looks, microseconds.
const LOOK: u64 = 1_000;
/// The same where others leave, whose turns are longer.
const LOOK_LEAVES: u64 = 8_000;
/// Looks for which it is held at a time there.
const TURNS_MAX: u32 = 64;
/// The same for commits without one.
const TURNS_COMMITS: u32 = 512;
/// Looks that it has to be held without waiting for the gaps to be short again.
const CALM: u32 = 32;
/// Crowded is who waits for a processor one part of so many of the time.
const CROWDED: u64 = 8;
/// The same while it is held for commits: with its client it would wait longer.
const CROWDED_HELD: u64 = 4;
/// Where others leave it is held if it computes, or could, for one part of so many of the time,
const BUSY: u64 = 4;
/// and let go where for less than one of so many.
const IDLE: u64 = 8;
/// Waiting so many times as long as computing is more than sharing.
const UNFAIR: u64 = 3;
/// Processors with which it is held. With three it was not measured.
const PAIR: u32 = 2;
/// Longest time between two moves, or holds, that gain nothing, microseconds.
const GAP_MAX: u64 = 64_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

    use rustix::thread::sched_setaffinity;

    use super::*;
    use crate::engine::bulk::policy;
    use crate::engine::cpu::tests::two;

    fn waited(waited: u64) -> Option<Used> {
        Some(Used { ran: 0, waited })
    }

    #[test]
    fn who_waits_for_a_processor_moves_once_and_again_only_after_growing_gaps() {
        let mut decision = Decision::default();
        let (mut now, mut sum, mut moves) = (0, 0, Vec::new());
        while now < 1_000_000 {
            let elapsed = decision.due - now;
            (now, sum) = (decision.due.max(now + 1), sum + elapsed / 2);
            if decision.take(now, Beside::Nothing, waited(sum), false) == Step::Move {
                moves.push(now);
            }
        }
        let gaps: Vec<u64> = moves.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.is_sorted() && moves.len() > 5, "{gaps:?}");
        assert_eq!(gaps.last(), Some(&(LOOK + GAP_MAX)));
    }

    #[test]
    fn who_runs_or_has_write_back_beside_it_stays() {
        let mut decision = Decision::default();
        for round in 1..1000 {
            let step =
                decision.take(round * LOOK, Beside::Nothing, waited(round * LOOK / 20), false);
            assert_eq!((step, decision.due), (Step::Stay, (round + 1) * LOOK));
        }
        // What it waited beside others does not count afterwards.
        let mut take = |now, beside, used| decision.take(now, beside, used, false);
        assert_eq!(take(1_000_000, Beside::WriteBack, None), Step::Stay);
        assert_eq!(take(1_001_000, Beside::Nothing, waited(900_000)), Step::Stay);
        assert_eq!(take(1_002_000, Beside::Nothing, waited(900_500)), Step::Move);
    }

    #[test]
    fn a_move_that_helped_makes_the_next_one_as_quick() {
        let mut decision = Decision::default();
        let mut take =
            |now, sum| (decision.take(now, Beside::Nothing, waited(sum), false), decision.due);
        assert_eq!(take(1000, 0).0, Step::Stay);
        assert_eq!(take(2000, 500).0, Step::Move);
        assert_eq!(take(3000, 500).0, Step::Stay);
        assert_eq!(take(4000, 1000), (Step::Move, 5000));
    }

    /// Looks beside a copy, each after `LOOK_LEAVES`, of which so much in a hundred was computed
    /// and waited; what is told is done.
    fn beside_copy(decision: &mut Decision, parts: &[(u64, u64)]) -> Vec<Step> {
        let (mut now, mut used, mut held) = (0, Used { ran: 0, waited: 0 }, false);
        decision.take(now, Beside::Copy, Some(used), held);
        let mut steps = Vec::new();
        for (ran, waited) in parts {
            now += LOOK_LEAVES;
            used.ran += LOOK_LEAVES * ran / 100;
            used.waited += LOOK_LEAVES * waited / 100;
            let step = decision.take(now, Beside::Copy, Some(used), held);
            held = step == Step::Hold || held && step != Step::LetGo;
            steps.push(step);
        }
        steps
    }

    #[test]
    fn beside_a_copy_it_holds_its_processor_while_it_works_and_does_not_starve() {
        let steps = [
            ((20, 0), Step::Stay),
            ((30, 0), Step::Hold),
            ((14, 0), Step::Stay),
            ((12, 0), Step::LetGo),
            ((10, 20), Step::Hold),
            ((10, 35), Step::LetGo),
            ((45, 50), Step::Hold),
            ((95, 0), Step::Stay),
            ((10, 90), Step::LetGo),
            ((10, 90), Step::Stay),
        ];
        let (parts, expected): (Vec<_>, Vec<_>) = steps.into_iter().unzip();
        assert_eq!(beside_copy(&mut Decision::default(), &parts), expected);
    }

    #[test]
    fn who_starves_only_while_held_beside_a_copy_is_held_after_growing_gaps() {
        let mut decision = Decision::default();
        let (mut now, mut used, mut held) = (1, Used { ran: 0, waited: 0 }, false);
        let mut holds = Vec::new();
        for _ in 0..200 {
            let step = decision.take(now, Beside::Copy, Some(used), held);
            if step == Step::Hold {
                holds.push(now);
            }
            held = step == Step::Hold || held && step != Step::LetGo;
            now = decision.due;
            used.ran += LOOK_LEAVES / 10;
            used.waited += LOOK_LEAVES * if held { 9 } else { 0 } / 10;
            // Working without waiting for one.
            used.ran += LOOK_LEAVES * if held { 0 } else { 8 } / 10;
        }
        let gaps: Vec<u64> = holds.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.is_sorted() && gaps.len() > 10, "{gaps:?}");
        assert!(gaps.last() > Some(&GAP_MAX), "{gaps:?}");
    }

    #[test]
    fn what_is_held_is_let_go_now_and_then_and_when_the_copy_or_the_account_is_gone() {
        let mut decision = Decision::default();
        let steps = beside_copy(&mut decision, &[(50, 50); 200]);
        let turns = usize::try_from(TURNS_MAX).unwrap();
        assert_eq!(
            (steps[0], steps[turns], steps[turns + 1]),
            (Step::Hold, Step::LetGo, Step::Hold)
        );
        assert_eq!(steps.iter().filter(|s| **s == Step::LetGo).count(), 200 / (turns + 1));
        assert_eq!(decision.take(1 << 40, Beside::Copy, None, true), Step::LetGo);
        beside_copy(&mut decision, &[(50, 50); 2]);
        for now in [1 << 41, 1 << 42] {
            assert_eq!(decision.take(now, Beside::Nothing, waited(900_000), true), Step::LetGo);
            decision.take(now + 1, Beside::Copy, waited(900_000), true);
        }
    }

    /// Looks beside commits, each when due, that waited so much of the time in a hundred, held or
    /// not; what is told is done. When it was held, and when it moved.
    fn beside_commits(decision: &mut Decision, looks: u32, waited: [u64; 2]) -> [Vec<u64>; 2] {
        let (mut now, mut used, mut held) = (decision.due, Used { ran: 0, waited: 0 }, false);
        let (mut holds, mut moves) = (Vec::new(), Vec::new());
        for _ in 0..looks {
            let step = decision.take(now, Beside::Commits, Some(used), held);
            match step {
                Step::Hold => holds.push(now),
                Step::Move => moves.push(now),
                Step::Stay | Step::LetGo => {}
            }
            held = step == Step::Hold || held && step != Step::LetGo;
            used.waited += (decision.due - now) * waited[usize::from(held)] / 100;
            now = decision.due;
        }
        [holds, moves]
    }

    #[test]
    fn who_carries_out_commits_holds_its_processor_and_lets_go_now_and_then() {
        let [holds, moves] = beside_commits(&mut Decision::default(), 1200, [5, 5]);
        let again = u64::from(TURNS_COMMITS + 1) * LOOK;
        assert_eq!((holds, moves), (vec![LOOK, LOOK + again, LOOK + again * 2], vec![]));
    }

    #[test]
    fn where_commits_wait_only_while_held_they_are_held_after_growing_gaps() {
        let mut decision = Decision::default();
        let [holds, moves] = beside_commits(&mut decision, 1000, [5, 40]);
        assert!(moves.is_empty(), "{moves:?}");
        let gaps: Vec<u64> = holds.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.is_sorted() && gaps.len() > 10, "{gaps:?}");
        assert_eq!(gaps.last(), Some(&(LOOK + GAP_MAX)));
        // A calm hold ends that.
        assert_eq!(decision.pause, GAP_MAX);
        assert_eq!(beside_commits(&mut decision, CALM * 8, [5, 5])[0].len(), 1);
        assert_eq!(decision.pause, 0);
    }

    #[test]
    fn commits_are_not_held_where_they_wait_anyway() {
        let [holds, moves] = beside_commits(&mut Decision::default(), 100, [40, 40]);
        assert!(holds.is_empty() && moves.len() > 5, "{holds:?} {moves:?}");
    }

    #[test]
    fn a_hold_for_commits_ends_with_them_with_the_account_and_when_a_copy_begins() {
        for (beside, used) in [
            (Beside::Nothing, waited(0)),
            (Beside::WriteBack, None),
            (Beside::Copy, waited(0)),
            (Beside::Commits, None),
        ] {
            let mut decision = Decision::default();
            assert_eq!(decision.take(1, Beside::Commits, waited(0), false), Step::Stay);
            assert_eq!(decision.take(1001, Beside::Commits, waited(0), false), Step::Hold);
            assert_eq!(decision.take(2001, Beside::Commits, waited(0), true), Step::Stay);
            assert_eq!(decision.take(3001, beside, used, true), Step::LetGo);
        }
        // One for a copy is none for commits: it asks for something else.
        let mut decision = Decision::default();
        decision.take(1, Beside::Copy, waited(0), true);
        assert_eq!(decision.take(1001, Beside::Commits, waited(0), true), Step::LetGo);
    }

    #[test]
    fn it_is_held_for_a_copy_for_batches_and_for_write_back_alike() {
        let mut decision = Decision::default();
        let (mut now, mut used, mut held) = (0, Used { ran: 0, waited: 0 }, false);
        let mut steps = Vec::new();
        for beside in [Beside::Unapplied, Beside::Batches, Beside::Copy, Beside::WriteBack] {
            let step = decision.take(now, beside, Some(used), held);
            held = step == Step::Hold || held && step != Step::LetGo;
            steps.push(step);
            now = decision.due;
            used.ran += LOOK_LEAVES / 2;
        }
        assert_eq!(steps, [Step::Stay, Step::Hold, Step::Stay, Step::Stay]);
        // Alone it moves again.
        assert_eq!(decision.take(now, Beside::Nothing, Some(used), held), Step::LetGo);
    }

    #[test]
    fn where_no_copy_is_it_moves_once_from_where_it_waits_before_it_is_held() {
        for (beside, expected) in [
            (Beside::Unapplied, [Step::Stay, Step::Move, Step::Hold, Step::Stay]),
            (Beside::Batches, [Step::Stay, Step::Move, Step::Hold, Step::Stay]),
            (Beside::Copy, [Step::Stay, Step::Hold, Step::Stay, Step::Stay]),
        ] {
            let mut decision = Decision::default();
            let (mut now, mut used, mut held) = (0, Used { ran: 0, waited: 0 }, false);
            let steps = expected.map(|_| {
                let step = decision.take(now, beside, Some(used), held);
                held = step == Step::Hold || held && step != Step::LetGo;
                now = decision.due;
                used.ran += LOOK_LEAVES / 4;
                used.waited += LOOK_LEAVES / 4;
                step
            });
            assert_eq!(steps, expected);
        }
    }

    #[test]
    fn with_more_processors_than_two_it_is_held_for_nobody() {
        let allowed = sched_getaffinity(None).unwrap();
        let mut seat = Seat::new(Arc::default());
        for beside in [Beside::Copy, Beside::WriteBack, Beside::Batches, Beside::Commits] {
            seat.hold(beside);
            assert_eq!(seat.held.is_some(), allowed.count() == PAIR);
            seat.let_go();
        }
        // Nor is it looked for there.
        seat.look(1, Beside::Unapplied);
        let kept = seat.decision.last.map(|(_, beside, _)| beside);
        let pair = allowed.count() == PAIR;
        assert_eq!(kept, Some(if pair { Beside::Unapplied } else { Beside::Nothing }));
        assert_eq!(sched_getaffinity(None).unwrap(), allowed);
    }

    #[test]
    fn write_back_is_asked_onto_its_processor_beside_small_commits_and_off_it_elsewhere() {
        let (before, allowed) = two();
        let offer = Arc::new(Offer::default());
        let mut seat = Seat::new(offer.clone());
        let held = allowed.count() == PAIR;
        let there =
            |place: fn(usize) -> Place| if held { place(sched_getcpu()) } else { Place::Anywhere };
        for (beside, place, in_bulk) in [
            (Beside::Copy, Place::Off as fn(usize) -> Place, true),
            (Beside::WriteBack, Place::Off, true),
            (Beside::Batches, Place::Off, true),
            (Beside::Commits, Place::On, false),
        ] {
            seat.hold(beside);
            assert_eq!((offer.get(), seat.due().is_some()), (there(place), held));
            let batch = held && in_bulk;
            assert_eq!(policy(), if batch { libc::SCHED_BATCH } else { libc::SCHED_OTHER });
            assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
            seat.let_go();
            assert_eq!((offer.get(), policy()), (Place::Anywhere, libc::SCHED_OTHER));
            assert_eq!(sched_getaffinity(None).unwrap(), allowed);
        }
        sched_setaffinity(None, &before).unwrap();
    }

    #[test]
    fn the_kernel_keeps_an_account() {
        assert!(used(&File::open("/proc/thread-self/schedstat").unwrap()).is_some());
    }
}
