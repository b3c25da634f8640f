//! A copy in the background: it computes while nobody else on its machine wants to.
//!
//! Linux gives processors to groups of tasks first, and to the tasks of a group then. With
//! `CONFIG_SCHED_AUTOGROUP` each session (`setsid(2)`) is a group, unless it is in a cgroup with a
//! weight: there a nice value counts only beside what the process itself runs, the session's own
//! beside all others (`sched(7)`). So both are lowered. A copy that falls too far behind, or that is
//! a seed, is not in the background: there it would get what is left, and that may be nothing.

use std::fs;
use std::io;
use std::thread;

use rustix::process::{Pid, getpid, getpriority_process, getsid, setpriority_process};

/// How a process stands beside others, and how it did when this was made.
#[derive(Clone, Debug)]
pub(crate) struct Priority {
    /// Nice value of its threads; None: the kernel would not let it take a change back.
    threads: Option<i32>,
    /// Nice value of its session's group; None: it does not lead the session, there is none, or it
    /// was raised, which is not ours to take back.
    session: Option<i32>,
}

impl Priority {
    /// Of this process.
    pub(crate) fn new() -> Self {
        let leads = getsid(None).is_ok_and(|leader| leader == getpid());
        let session = leads.then(|| fs::read_to_string(SESSION).ok()).flatten();
        let session = session.as_deref().and_then(parse).filter(|nice| *nice >= 0);
        let threads = getpriority_process(None).ok().filter(|nice| may_undo(*nice));
        Self { threads, session }
    }

    /// In the background, or as before. Fails where the kernel wants it later: others in the
    /// system did the same in the last 0.1 s.
    pub(crate) fn set(&self, background: bool) -> io::Result<()> {
        let nice = |usual: i32| if background { LOWEST.max(usual) } else { usual };
        let threads = self.threads.map_or(Ok(()), |usual| set_threads(nice(usual)));
        let session = self.session.map(|usual| fs::write(SESSION, nice(usual).to_string()));
        match session {
            Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
            Some(Err(error)) => tracing::debug!(%error, "the session's priority cannot be changed"),
            Some(Ok(())) | None => {}
        }
        if let Err(error) = threads {
            tracing::debug!(%error, "the threads' priority cannot be changed");
        }
        Ok(())
    }
}

fn set_threads(nice: i32) -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/task")? {
        let tid = entry?.file_name().to_str().and_then(|tid| tid.parse().ok());
        match tid.and_then(Pid::from_raw).map(|tid| setpriority_process(Some(tid), nice)) {
            // It ended meanwhile.
            None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => {}
            Some(Err(error)) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whether a thread's nice value can be lowered to this one again: one that ends then finds out, for what
/// a process may do is not all in its capabilities.
fn may_undo(nice: i32) -> bool {
    let tried = move || {
        setpriority_process(None, LOWEST.max(nice)).is_ok()
            && setpriority_process(None, nice).is_ok()
    };
    thread::Builder::new().spawn(tried).is_ok_and(|thread| thread.join().unwrap_or(false))
}

/// "/autogroup-25 nice 0"
fn parse(text: &str) -> Option<i32> {
    text.split_whitespace().next_back()?.parse().ok()
}

/// When a session's copy is in the background. (pure)
#[derive(Debug, Default)]
pub(crate) struct Background {
    /// No change before, monotonic microseconds.
    due: u64,
    /// What was set last.
    is: Option<bool>,
    /// Not in the background before, monotonic microseconds.
    not_before: u64,
}

/// What decides that, and whether the copy rests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    /// Disks are being copied, and the stream must outrun that.
    pub seeding: bool,
    /// Bytes of the journal that the target does not hold.
    pub behind: u64,
    /// Size of the journal, bytes.
    pub journal: u64,
    /// Age of the newest recoverable state, microseconds; None: not known.
    pub age_us: Option<u64>,
    /// How much later than it wanted to the session looks, microseconds.
    pub late_us: u64,
}

impl Standing {
    /// Whether less than all can be done for the copy as long as it is younger than `age_us`,
    /// microseconds, and the journal has room for `times` what is behind.
    pub(crate) fn can_wait(self, age_us: u64, times: u64) -> bool {
        let roomy = self.behind <= self.journal / times;
        !self.seeding && roomy && self.age_us.is_some_and(|age| age < age_us)
    }
}

impl Background {
    /// What to set at `now_us` (monotonic microseconds), if that is not what is.
    pub(crate) fn change(&mut self, now_us: u64, standing: Standing) -> Option<bool> {
        if standing.late_us >= LATE_US {
            self.not_before = now_us + STARVED_US;
        }
        if now_us < self.due {
            return None;
        }
        let stays = self.is == Some(true);
        let (age, times) = if stays { (OLD_US, ROOM) } else { (OLD_US / 2, 2 * ROOM) };
        let wanted = now_us >= self.not_before && standing.can_wait(age, times);
        (self.is != Some(wanted)).then_some(wanted)
    }

    /// Whether it is in the background.
    pub(crate) fn is(&self) -> bool {
        self.is == Some(true)
    }

    /// What came of setting that. If it failed it is tried again.
    pub(crate) fn tried(&mut self, now_us: u64, background: bool, done: bool) {
        self.due = now_us + PAUSE_US;
        self.is = done.then_some(background);
    }
}

const SESSION: &str = "/proc/self/autogroup";
const LOWEST: i32 = 19;
/// Between two changes, microseconds: the kernel takes locks of all processors for one.
const PAUSE_US: u64 = 250_000;
/// A copy whose newest recoverable state is as old, microseconds, leaves the background until it
/// is half as old: a fifth of the 15 s that a policy promises if nothing else is said.
const OLD_US: u64 = 3_000_000;
/// So does one where the journal has no room for so many times what is behind, until it has twice that.
const ROOM: u64 = 4;
/// And one that looks so much later than it wanted to, microseconds: what others leave it may be nothing.
const LATE_US: u64 = 1_000_000;
/// For so long, microseconds.
const STARVED_US: u64 = 5_000_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

    use super::*;

    const YOUNG: Standing = Standing {
        seeding: false,
        behind: 100,
        journal: 800,
        age_us: Some(OLD_US / 2 - 1),
        late_us: LATE_US - 1,
    };

    /// What a session that knows nothing yet sets.
    fn first(standing: Standing) -> Option<bool> {
        Background::default().change(0, standing)
    }

    /// What one sets that is in the background, or not.
    fn then(is: bool, standing: Standing) -> Option<bool> {
        let mut background = Background::default();
        background.tried(0, is, true);
        background.change(PAUSE_US, standing)
    }

    #[test]
    fn a_young_copy_with_room_in_the_journal_is_in_the_background_and_no_other() {
        assert_eq!(first(YOUNG), Some(true));
        assert_eq!(first(Standing { seeding: true, ..YOUNG }), Some(false));
        assert_eq!(first(Standing { behind: 101, ..YOUNG }), Some(false));
        assert_eq!(first(Standing { age_us: None, ..YOUNG }), Some(false));
        assert_eq!(first(Standing { age_us: Some(OLD_US / 2), ..YOUNG }), Some(false));
    }

    #[test]
    fn it_comes_back_only_when_it_is_well_away_from_why_it_left() {
        let aged = |age| Standing { age_us: Some(age), ..YOUNG };
        assert_eq!(then(true, aged(OLD_US - 1)), None);
        assert_eq!(then(true, aged(OLD_US)), Some(false));
        assert_eq!(then(false, aged(OLD_US / 2)), None);
        assert_eq!(then(false, aged(OLD_US / 2 - 1)), Some(true));
        let behind = |behind| Standing { behind, ..YOUNG };
        assert_eq!(then(true, behind(200)), None);
        assert_eq!(then(true, behind(201)), Some(false));
        assert_eq!(then(false, behind(101)), None);
        assert_eq!(then(false, behind(100)), Some(true));
        assert_eq!(then(true, Standing { seeding: true, ..YOUNG }), Some(false));
    }

    #[test]
    fn one_that_is_starved_is_not_for_a_while() {
        let mut background = Background::default();
        background.tried(0, true, true);
        let now = PAUSE_US - 1;
        assert_eq!(background.change(now, Standing { late_us: LATE_US, ..YOUNG }), None);
        assert_eq!(background.change(now + 1, YOUNG), Some(false), "it is not forgotten");
        background.tried(now + 1, false, true);
        assert_eq!(background.change(now + STARVED_US - 1, YOUNG), None);
        assert_eq!(background.change(now + STARVED_US, YOUNG), Some(true));
    }

    #[test]
    fn changes_are_seldom_and_one_that_failed_is_tried_again() {
        let mut background = Background::default();
        background.tried(7, true, false);
        assert_eq!(background.change(PAUSE_US + 6, YOUNG), None);
        assert_eq!(background.change(PAUSE_US + 7, YOUNG), Some(true));
        background.tried(PAUSE_US + 7, true, true);
        assert_eq!(background.change(PAUSE_US * 3, YOUNG), None);
    }

    #[test]
    fn the_kernel_s_words_are_read() {
        assert_eq!(parse("/autogroup-4065 nice 0\n"), Some(0));
        assert_eq!(parse("/autogroup-1 nice -5\n"), Some(-5));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn threads_are_lowered_and_come_back_if_they_may() {
        let usual = getpriority_process(None).unwrap();
        let priority = Priority { threads: Some(usual), session: None };
        // Of a thread that ends: who may not undo it has one less to care about.
        let seen = thread::spawn(move || {
            let mine = || getpriority_process(None).unwrap();
            if !may_undo(usual) {
                return None;
            }
            priority.set(true).unwrap();
            let low = mine();
            priority.set(false).unwrap();
            Some((low, mine()))
        });
        if let Some(seen) = seen.join().unwrap() {
            assert_eq!(seen, (LOWEST.max(usual), usual));
        }
    }
}
