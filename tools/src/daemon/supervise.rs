//! When to start a process again. (pure)
//!
//! The first end after a quiet time is answered at once, because a filter that
//! is not there is production that waits; starts in a row are 100 ms, 200 ms,
//! 400 ms, 800 ms apart and never more. A process that ran for a second starts the row anew, however often it
//! ends: once a second is no load. Time is an argument.

/// The restarts of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restarts {
    /// How often it was started again.
    pub count: u32,
    in_a_row: u32,
    started_us: u64,
    due_us: u64,
}

impl Restarts {
    /// The process was started (the first start is not a restart) or found running.
    pub fn started(&mut self, now_us: u64) {
        self.started_us = now_us;
    }

    /// The process ended: it is due again at [`Restarts::due`].
    pub fn ended(&mut self, now_us: u64) {
        self.count = self.count.saturating_add(1);
        if now_us.saturating_sub(self.started_us) >= QUIET_US {
            self.in_a_row = 0;
        }
        let wait = match self.in_a_row {
            0 => 0,
            n => (FIRST_US << (n - 1).min(16)).min(LONGEST_US),
        };
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.due_us = now_us.max(self.started_us.saturating_add(wait));
    }

    /// Whether it may be started now.
    pub fn due(&self, now_us: u64) -> bool {
        now_us >= self.due_us
    }
}

const FIRST_US: u64 = 100_000;
const LONGEST_US: u64 = 800_000;
const QUIET_US: u64 = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_is_answered_at_once_and_a_row_backs_off_to_less_than_a_second() {
        let mut restarts = Restarts::default();
        let mut now = 50_000_000;
        let mut waits = Vec::new();
        for _ in 0..10 {
            restarts.started(now);
            restarts.ended(now);
            let mut waited = 0;
            while !restarts.due(now) {
                now += 100_000;
                waited += 1;
            }
            waits.push(waited);
        }
        assert_eq!(waits, [0, 1, 2, 4, 8, 8, 8, 8, 8, 8]);
        restarts.started(now);
        restarts.ended(now + QUIET_US);
        assert!(restarts.due(now + QUIET_US));
        assert_eq!(restarts.count, 11);
    }

    #[test]
    fn a_process_that_ran_for_a_second_is_started_at_once_every_time() {
        let mut restarts = Restarts::default();
        for now in (1..100).map(|i| i * QUIET_US) {
            restarts.started(now);
            restarts.ended(now + QUIET_US);
            assert!(restarts.due(now + QUIET_US), "after {} ends", restarts.count);
        }
    }
}
