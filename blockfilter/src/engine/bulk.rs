//! Threads that work in bulk: whoever they would interrupt by waking up goes on.
//!
//! Under `SCHED_BATCH` a thread that wakes up waits for its processor until the one that runs
//! there sleeps or has used up its slice, a few milliseconds (`sched(7)`; only whoever runs under
//! `SCHED_IDLE` makes room at once). While it computes its share is the same; one that often sleeps gets
//! less beside others that never do. What is started meanwhile inherits it, io_uring's workers too.

#![expect(unsafe_code, reason = "nothing safe that we use knows the policies")]

/// The calling thread works in bulk until this is dropped, by the same thread.
#[derive(Debug)]
pub(crate) struct Bulk(());

impl Bulk {
    /// None, and nothing is changed, if somebody chose a policy for it, or if the kernel refuses.
    pub(crate) fn begin() -> Option<Self> {
        change(libc::SCHED_OTHER, libc::SCHED_BATCH).then(|| Self(()))
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        // What others chose meanwhile stays.
        change(libc::SCHED_BATCH, libc::SCHED_OTHER);
    }
}

fn change(from: libc::c_int, to: libc::c_int) -> bool {
    let param = libc::sched_param { sched_priority: 0 };
    if policy() != from {
        return false;
    }
    // SAFETY: zero is the calling thread; the kernel only reads `param`, which lives on.
    unsafe { libc::sched_setscheduler(0, to, &raw const param) == 0 }
}

/// The calling thread's.
pub(crate) fn policy() -> libc::c_int {
    // SAFETY: zero is the calling thread, and nothing but the answer is written.
    unsafe { libc::sched_getscheduler(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_works_in_bulk_for_a_while_and_those_it_starts_as_it_does() {
        let bulk = Bulk::begin();
        assert!(bulk.is_some());
        assert_eq!(policy(), libc::SCHED_BATCH);
        assert!(Bulk::begin().is_none());
        assert_eq!(std::thread::spawn(policy).join().ok(), Some(libc::SCHED_BATCH));
        drop(bulk);
        assert_eq!(policy(), libc::SCHED_OTHER);
    }

    #[test]
    fn what_others_chose_stays() {
        let bulk = Bulk::begin();
        assert!(change(libc::SCHED_BATCH, libc::SCHED_IDLE));
        drop(bulk);
        assert_eq!(policy(), libc::SCHED_IDLE);
        assert!(Bulk::begin().is_none());
        assert_eq!(policy(), libc::SCHED_IDLE);
    }
}
