//! A copy in the background: it computes while nobody else on its machine wants to.
//!
//! Linux gives processors to groups of tasks first, and to the tasks of a group then. With
//! `CONFIG_SCHED_AUTOGROUP` each session (`setsid(2)`) is a group, unless it is in a cgroup with a
//! weight: there a nice value counts only beside what the process itself runs, the session's own
//! beside all others (`sched(7)`). So both are lowered. A copy that falls too far behind, or that is
//! a seed, is not in the background: there it would get what is left, and that may be nothing.

use std::fs;
use std::io;
use std::path::Path;

use rustix::process::{
    Pid, Resource, getpid, getpriority_process, getrlimit, getsid, setpriority_process,
};
use rustix::thread::{CapabilitySet, capabilities};

/// How a process stands beside others, and how it did when this was made.
#[derive(Clone, Debug)]
pub(crate) struct Priority {
    /// Nice value of its threads; None: the kernel would not let it take a change back.
    threads: Option<i32>,
    /// Nice value of its session's group; None: it does not lead the session, or there is none.
    session: Option<i32>,
}

impl Priority {
    /// Of this process.
    pub(crate) fn new() -> Self {
        let leads = getsid(None).is_ok_and(|leader| leader == getpid());
        let session = leads.then(|| fs::read_to_string(SESSION).ok()).flatten();
        let threads = getpriority_process(None).ok().filter(|nice| may_undo(*nice));
        Self { threads, session: session.as_deref().and_then(parse) }
    }

    /// In the background, or as before. Fails where the kernel wants it later: others in the
    /// system did the same in the last 0.1 s.
    pub(crate) fn set(&self, background: bool) -> io::Result<()> {
        let nice = |usual: i32| if background { LOWEST.max(usual) } else { usual };
        if let Some(usual) = self.session {
            fs::write(SESSION, nice(usual).to_string())?;
        }
        let Some(usual) = self.threads else { return Ok(()) };
        for entry in fs::read_dir(Path::new("/proc/self/task"))? {
            let tid = entry?.file_name().to_str().and_then(|tid| tid.parse().ok());
            match tid.and_then(Pid::from_raw).map(|tid| setpriority_process(Some(tid), nice(usual)))
            {
                // It ended meanwhile.
                None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => {}
                Some(Err(error)) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Whether a thread's nice value can be lowered to this one again.
fn may_undo(nice: i32) -> bool {
    let least = i64::from(20 - nice);
    let limit = getrlimit(Resource::Nice).current.map_or(i64::MAX, |limit| limit as i64);
    let able =
        capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_NICE));
    able || limit >= least
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
}

impl Standing {
    /// Whether less than all can be done for the copy as long as its age is less than this,
    /// microseconds.
    pub(crate) fn can_wait(self, age_us: u64) -> bool {
        let roomy = self.behind <= self.journal / ROOM;
        !self.seeding && roomy && self.age_us.is_some_and(|age| age < age_us)
    }
}

impl Background {
    /// What to set at `now_us` (monotonic microseconds), if that is not what is.
    pub(crate) fn change(&self, now_us: u64, standing: Standing) -> Option<bool> {
        if now_us < self.due {
            return None;
        }
        let old = if self.is == Some(true) { OLD_US } else { OLD_US / 2 };
        let wanted = standing.can_wait(old);
        (self.is != Some(wanted)).then_some(wanted)
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
/// A copy whose newest recoverable state is as old, microseconds, is not in the background until it
/// is half as old: a third of the 15 s that a policy promises if nothing else is said.
const OLD_US: u64 = 5_000_000;
/// Nor is one where the journal has no room for so many times what is behind.
const ROOM: u64 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    const YOUNG: Standing =
        Standing { seeding: false, behind: 100, journal: 400, age_us: Some(OLD_US / 2 - 1) };

    /// What a session that knows nothing yet sets.
    fn first(standing: Standing) -> Option<bool> {
        Background::default().change(0, standing)
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
    fn it_comes_back_only_when_it_is_half_as_old_as_when_it_left() {
        let mut background = Background::default();
        let aged = |age| Standing { age_us: Some(age), ..YOUNG };
        background.tried(0, true, true);
        let now = PAUSE_US;
        assert_eq!(background.change(now, aged(OLD_US - 1)), None);
        assert_eq!(background.change(now, aged(OLD_US)), Some(false));
        background.tried(now, false, true);
        let now = now + PAUSE_US;
        assert_eq!(background.change(now, aged(OLD_US / 2)), None);
        assert_eq!(background.change(now, aged(OLD_US / 2 - 1)), Some(true));
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
}
