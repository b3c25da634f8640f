//! Which processors a thread may use: held on one for a while, or moved off one.
//!
//! What others chose for a thread, before or meanwhile, stays, but for one thing: who chooses the
//! very processor that it is held on is not told from us.

use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// The calling thread, kept on one processor until this is dropped, by the same thread.
#[derive(Debug)]
pub(crate) struct Hold {
    here: CpuSet,
    /// What it might use before.
    before: CpuSet,
}

impl Hold {
    /// On processor `cpu`. None if the thread may not use it, or no other.
    /// `all`: see [`all_allowed`].
    pub(crate) fn on(cpu: usize, all: Option<CpuSet>) -> Option<Self> {
        let allowed = sched_getaffinity(None).ok()?;
        if allowed.count() < 2 || !allowed.is_set(cpu) {
            return None;
        }
        let mut here = CpuSet::new();
        here.set(cpu);
        sched_setaffinity(None, &here).ok()?;
        Some(Self { here, before: back_to(allowed, all) })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if sched_getaffinity(None).is_ok_and(|now| now == self.here) {
            // It fails only if none of them is left, and then the kernel chose already.
            let _ = sched_setaffinity(None, &self.before);
        } else if let Ok(Some(_)) = all_allowed() {
            // The kernel chose, since our processor went away, and would go back to it. Whoever
            // chose fewer meanwhile is right.
            let _ = sched_setaffinity(None, &self.before);
        }
    }
}

/// A processor that one thread offers to another, or none.
#[derive(Debug, Default)]
pub struct Offer(AtomicU32);

impl Offer {
    /// From now on.
    pub(crate) fn set(&self, cpu: Option<usize>) {
        self.0.store(cpu.map_or(0, |cpu| cpu as u32 + 1), Ordering::Relaxed);
    }

    /// A hint: it may be an old one.
    pub(crate) fn get(&self) -> Option<usize> {
        Some(self.0.load(Ordering::Relaxed).checked_sub(1)? as usize)
    }
}

/// The thread that takes an [`Offer`], until this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Guest {
    on: Option<usize>,
    held: Option<Hold>,
}

impl Guest {
    /// To that processor; None: wherever it likes. For the thread that made it.
    pub(crate) fn go(&mut self, to: Option<usize>) {
        if to != self.on {
            self.on = to;
            self.held = None;
            self.held = to.and_then(|cpu| Hold::on(cpu, all_allowed().ok().flatten()));
        }
    }
}

/// Every processor, of which the kernel takes what a thread may use: so those that are added
/// later count.
fn every() -> CpuSet {
    let mut every = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|cpu| every.set(cpu));
    every
}

/// What this thread may use, if nobody chose fewer for it than there are.
pub(crate) fn all_allowed() -> rustix::io::Result<Option<CpuSet>> {
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
pub(crate) fn move_over(all: Option<CpuSet>) -> bool {
    let Ok(allowed) = sched_getaffinity(None) else { return false };
    let mut others = allowed;
    others.unset(sched_getcpu());
    if others.count() == 0 || sched_setaffinity(None, &others).is_err() {
        return false;
    }
    // It fails only if what is allowed has changed meanwhile.
    let _ = sched_setaffinity(None, &back_to(allowed, all));
    true
}

/// What to set so that the thread may use `allowed` again.
fn back_to(allowed: CpuSet, all: Option<CpuSet>) -> CpuSet {
    if all == Some(allowed) { every() } else { allowed }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

    use super::*;

    /// The processors that this thread may use while it tests: two, if there are as many.
    pub(crate) fn two() -> (CpuSet, CpuSet) {
        let before = sched_getaffinity(None).unwrap();
        let mut two = CpuSet::new();
        (0..CpuSet::MAX_CPU).filter(|c| before.is_set(*c)).take(2).for_each(|c| two.set(c));
        sched_setaffinity(None, &two).unwrap();
        (before, two)
    }

    #[test]
    fn a_thread_that_was_held_may_use_what_it_might_before_but_for_what_others_chose() {
        let (before, allowed) = two();
        let held = Hold::on(sched_getcpu(), None);
        assert_eq!(held.is_some(), allowed.count() == 2);
        assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
        drop(held);
        assert_eq!(sched_getaffinity(None).unwrap(), allowed);
        let mut one = CpuSet::new();
        one.set(sched_getcpu());
        let held = Hold { here: allowed, before: allowed };
        sched_setaffinity(None, &one).unwrap();
        drop(held);
        assert_eq!(sched_getaffinity(None).unwrap(), one);
        sched_setaffinity(None, &before).unwrap();
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
    }

    #[test]
    fn a_guest_goes_where_it_is_told_and_then_where_it_likes() {
        let (before, allowed) = two();
        let mut guest = Guest::default();
        let offer = Offer::default();
        assert_eq!(offer.get(), None);
        for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
            offer.set(Some(cpu));
            guest.go(offer.get());
            let now = sched_getaffinity(None).unwrap();
            assert!(now.count() == 1 && now.is_set(cpu));
        }
        // Of a processor that it may not use.
        guest.go((0..CpuSet::MAX_CPU).find(|cpu| !allowed.is_set(*cpu)));
        assert_eq!(sched_getaffinity(None).unwrap(), allowed);
        guest.go(offer.get());
        drop(guest);
        assert_eq!(sched_getaffinity(None).unwrap(), allowed);
        sched_setaffinity(None, &before).unwrap();
    }
}
