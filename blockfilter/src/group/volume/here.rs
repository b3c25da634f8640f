//! When commits are made in the group's thread. (pure)

/// A commit that clients wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// Of a request or a few, in the group's thread.
    Small,
    /// Of many requests, or large ones, there too.
    Batch,
    /// Carried out by the engine, or by a sync of the disks.
    Elsewhere,
}

/// How it went lately.
#[derive(Debug, Default)]
pub(super) struct Here {
    /// Not before, monotonic microseconds.
    from: u64,
    /// What the parts of this commit took there until now, microseconds.
    parts: u64,
    /// The end of the last part, if there was one, and what that was.
    last: Option<(u64, Commit)>,
    /// When clients were last seen to wait for one.
    awaited: Option<u64>,
}

impl Here {
    pub(super) fn may(&self, now: u64) -> bool {
        now >= self.from
    }

    /// Clients wait for one now.
    pub(super) fn awaited(&mut self, now: u64) {
        self.awaited = Some(now);
    }

    /// The last one, if that was lately.
    pub(super) fn recent(&self, now: u64) -> Option<Commit> {
        let lately = |at: u64| now < at + HERE_LATELY;
        let here = self.last.filter(|(last, _)| lately(*last)).map(|(_, commit)| commit);
        here.or(self.awaited.filter(|at| lately(*at)).map(|_| Commit::Elsewhere))
    }

    /// A part of one was made there, between these times, when so many bytes were not durable.
    pub(super) fn took(&mut self, before: u64, after: u64, bytes: u64) {
        self.parts += after.saturating_sub(before);
        let size = if bytes < BATCH_BYTES { Commit::Small } else { Commit::Batch };
        self.last = Some((after, size));
        if self.parts > HERE_MAX {
            self.from = after + (self.parts * HERE_PAUSE).clamp(HERE_PAUSE_MIN, HERE_PAUSE_MAX);
        }
    }

    /// That was the last part.
    pub(super) fn ended(&mut self) {
        self.parts = 0;
    }
}

/// A commit in the group's thread that took longer than this, microseconds, ...
const HERE_MAX: u64 = 5_000;
/// ... lets the engine do them for so many times as long: such ones, up to 4 s, keep the thread
/// for a sixteenth of the time at most, ...
const HERE_PAUSE: u64 = 15;
/// ... but at least for so long, and, where the journal hung for seconds, at most, microseconds.
const HERE_PAUSE_MIN: u64 = 250_000;
const HERE_PAUSE_MAX: u64 = 60_000_000;
/// What commits are is what the last one was that is no older, microseconds.
const HERE_LATELY: u64 = 5_000;
/// So many bytes of the journal, heads included, are no commit of a few requests of 4 KiB.
const BATCH_BYTES: u64 = 32 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_commits_of_seconds_at_most_keep_the_thread_for_a_sixteenth_of_the_time_at_most() {
        let (mut here, mut now, mut kept) = (Here::default(), 0, 0);
        assert_eq!(here.recent(now), None);
        for took in [200, HERE_MAX, HERE_MAX + 1, 7_000, 40_000, 2_000_000] {
            let part = took / 3;
            here.took(now, now + part, 4096);
            assert_eq!(here.may(now + part), part <= HERE_MAX);
            here.took(now + part, now + took, 8192);
            here.ended();
            now += took;
            assert_eq!(here.recent(now + HERE_LATELY - 1), Some(Commit::Small));
            assert_eq!(here.recent(now + HERE_LATELY), None);
            let slow = took > HERE_MAX;
            assert_eq!(here.may(now), !slow);
            if slow {
                kept += took;
                assert!(!here.may(now + (took * 14).max(249_999)));
                now += (took * 15).max(250_000);
                assert!(here.may(now));
            }
        }
        assert!(kept * 16 <= now);
        here.took(now, now + 3_600_000_000, 0);
        assert!(!here.may(now + 3_660_000_000 - 1));
        assert!(here.may(now + 3_660_000_000));
    }

    #[test]
    fn a_commit_of_many_requests_is_a_batch_and_one_of_the_engine_is_told_apart() {
        let mut here = Here::default();
        for (bytes, size) in [(BATCH_BYTES, Commit::Batch), (BATCH_BYTES - 1, Commit::Small)] {
            here.took(0, 100, bytes);
            assert_eq!(here.recent(100), Some(size));
        }
        here.awaited(300);
        assert_eq!(here.recent(99 + HERE_LATELY), Some(Commit::Small));
        assert_eq!(here.recent(100 + HERE_LATELY), Some(Commit::Elsewhere));
        assert_eq!(here.recent(300 + HERE_LATELY), None);
    }
}
