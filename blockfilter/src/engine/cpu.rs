//! Which processors a thread may use: held on one or off one for a while, or moved off one.
//!
//! What others chose for a thread, before or meanwhile, stays, but for one thing: who chooses the
//! very processor that it is held on is not told from us.

use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Where one thread asks others to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// Wherever they like.
    #[default]
    Anywhere,
    /// On this processor.
    On(usize),
    /// On the other one, where there are two.
    Off(usize),
}

impl Place {
    /// Off this processor, if there is one.
    pub fn leaving_free(cpu: Option<u32>) -> Self {
        cpu.map_or(Self::Anywhere, |cpu| Self::Off(cpu as usize))
    }

    /// The processor that they leave to others.
    pub fn left_free(self) -> Option<u32> {
        match self {
            Self::Off(cpu) => u32::try_from(cpu).ok(),
            Self::Anywhere | Self::On(_) => None,
        }
    }
}

/// The calling thread, kept in a place until this is dropped, by the same thread.
#[derive(Debug)]
pub(crate) struct Hold {
    here: CpuSet,
    /// What it might use before.
    before: CpuSet,
}

impl Hold {
    /// None if the thread may not use that processor, or no other, or more than one other than it is to
    /// leave, and so where there is nothing to keep. `all`: see [`all_allowed`].
    pub(crate) fn at(place: Place, all: Option<CpuSet>) -> Option<Self> {
        let (Place::On(cpu) | Place::Off(cpu)) = place else { return None };
        let allowed = sched_getaffinity(None).ok()?;
        if allowed.count() < 2 || cpu >= CpuSet::MAX_CPU || !allowed.is_set(cpu) {
            return None;
        }
        let mut here = CpuSet::new();
        here.set(cpu);
        if matches!(place, Place::Off(_)) {
            if allowed.count() > 2 {
                return None;
            }
            here = allowed;
            here.unset(cpu);
        }
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

/// A [`Place`] that one thread tells others: a hint, which may be an old one.
#[derive(Debug, Default)]
pub struct Offer(AtomicU32);

impl Offer {
    /// From now on.
    pub fn set(&self, place: Place) {
        let word = match place {
            Place::Anywhere => 0,
            Place::On(cpu) => cpu * 2 + 2,
            Place::Off(cpu) => cpu * 2 + 3,
        };
        self.0.store(word as u32, Ordering::Relaxed);
    }

    /// As last told.
    pub fn get(&self) -> Place {
        let word = self.0.load(Ordering::Relaxed) as usize;
        match word.checked_sub(2) {
            None => Place::Anywhere,
            Some(rest) if rest % 2 == 0 => Place::On(rest / 2),
            Some(rest) => Place::Off(rest / 2),
        }
    }
}

/// The thread that takes an [`Offer`], until this is dropped, by the same thread.
#[derive(Debug, Default)]
pub struct Guest {
    at: Place,
    held: Option<Hold>,
}

impl Guest {
    /// To that place, where that is possible; else it computes wherever it likes. For the thread
    /// that made it.
    pub fn go(&mut self, to: Place) {
        if to != self.at {
            self.at = to;
            self.held = None;
            self.held = Hold::at(to, all_allowed().ok().flatten());
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
        let held = Hold::at(Place::On(sched_getcpu()), None);
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
        assert_eq!(offer.get(), Place::Anywhere);
        for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
            let two = allowed.count() == 2;
            for (place, there, count) in [
                (Place::On(cpu), true, 1),
                (Place::Off(cpu), !two, allowed.count() - u32::from(two)),
            ] {
                offer.set(place);
                assert_eq!(offer.get(), place);
                guest.go(offer.get());
                let now = sched_getaffinity(None).unwrap();
                assert_eq!((now.is_set(cpu), now.count()), (there, count));
            }
        }
        // Of processors that it may not use, or that there cannot be.
        let other = (0..CpuSet::MAX_CPU).find(|cpu| !allowed.is_set(*cpu)).unwrap();
        for cpu in [other, CpuSet::MAX_CPU, u32::MAX as usize] {
            for place in [Place::On(cpu), Place::Off(cpu)] {
                guest.go(place);
                assert_eq!(sched_getaffinity(None).unwrap(), allowed);
            }
        }
        guest.go(offer.get());
        drop(guest);
        assert_eq!(sched_getaffinity(None).unwrap(), allowed);
        sched_setaffinity(None, &before).unwrap();
    }
}
