//! When a copy rests, so that production has the processors. (pure, but for the kernel's account)
//!
//! Priorities decide between threads of one processor. Where there are two, the scheduler may give
//! the copy one of them and have clients and the filter share the other, though it is in the
//! background (`background.rs`). So while a machine computes nearly all the time the copy reads no journal and begins no frame for a
//! quarter of it, as long as the state that it could recover is not a second old: the journal keeps
//! the rest of a peak until there is time. A copy that is older works on.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::background::Standing;

/// What all processors of a machine did since it started, in the kernel's ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spent {
    /// All time of all of them.
    pub all: u64,
    /// Of it with nothing to compute.
    pub idle: u64,
}

impl Spent {
    /// Of this machine; None where its kernel does not say.
    pub fn here() -> Option<Self> {
        let mut text = [0; 256];
        let len = File::open(ACCOUNT).ok()?.read_at(&mut text, 0).ok()?;
        Self::parse(&String::from_utf8_lossy(&text[..len]))
    }

    /// The line of all processors: user, nice, system, idle, waiting for devices, interrupts (two),
    /// stolen (`proc_stat(5)`); guests are in the first two already.
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().next()?.strip_prefix("cpu ")?;
        let fields: Vec<u64> =
            line.split_whitespace().take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
        let idle = fields.get(3)?.saturating_add(*fields.get(4)?);
        Some(Self { all: fields.iter().fold(0, |sum, f| sum.saturating_add(*f)), idle })
    }
}

/// When one session rests. (pure)
#[derive(Debug, Default)]
pub(crate) struct Rest {
    /// Next look at the account, monotonic microseconds.
    due: u64,
    last: Option<Spent>,
    /// Hardly anything was idle between the last two looks.
    full: bool,
}

impl Rest {
    /// Whether [`Rest::look`] is to be called.
    pub(crate) fn is_due(&self, now_us: u64) -> bool {
        now_us >= self.due
    }

    /// Takes what the processors did until `now_us` (monotonic microseconds), if that is known.
    pub(crate) fn look(&mut self, now_us: u64, spent: Option<Spent>) {
        self.due = now_us + LOOK_US;
        self.full = match (self.last, spent) {
            (Some(before), Some(now)) => {
                let all = now.all.saturating_sub(before.all);
                all > 0 && now.idle.saturating_sub(before.idle) * IDLE < all
            }
            _ => false,
        };
        self.last = spent;
    }

    /// Until when it rests, after `now_us`; None: it does not.
    pub(crate) fn until(&self, now_us: u64, standing: Standing) -> Option<u64> {
        let may = self.full && standing.can_wait(OLD_US, ROOM);
        let at = now_us % TURN_US;
        (may && at < REST_US).then(|| now_us - at + REST_US)
    }
}

const ACCOUNT: &str = "/proc/stat";
/// Between two looks, microseconds: 25 ticks of each processor.
const LOOK_US: u64 = 250_000;
/// A machine is full if less than one part of so many was idle.
const IDLE: u64 = 8;
/// Of each so long, microseconds,
const TURN_US: u64 = 40_000;
/// it rests so long: more than the scheduler takes to move who waits.
const REST_US: u64 = 10_000;
/// A copy whose newest recoverable state is as old, microseconds, does not rest.
const OLD_US: u64 = 1_000_000;

/// Nor does one where the journal has no room for so many times what is behind.
pub(crate) const ROOM: u64 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// After two looks between which so many of 1000 ticks were idle.
    fn saw(idle: u64) -> Rest {
        let mut rest = Rest::default();
        rest.look(0, Some(Spent { all: 500, idle: 500 }));
        rest.look(LOOK_US, Some(Spent { all: 1500, idle: 500 + idle }));
        rest
    }

    /// How many of a second's microseconds it rests, and whether every rest ends when it was said to.
    fn rests(rest: &Rest, age_us: u64) -> u64 {
        let standing = Standing {
            seeding: false,
            behind: 100,
            journal: 800,
            age_us: Some(age_us),
            late_us: 0,
        };
        let (mut now, mut rested) = (7_000_000, 0);
        while now < 8_000_000 {
            match rest.until(now, standing) {
                Some(until) => {
                    assert!(until > now && until <= now + REST_US);
                    assert_eq!(rest.until(until - 1, standing), Some(until));
                    rested += until - now;
                    now = until;
                }
                None => now += 1000,
            }
        }
        rested
    }

    #[test]
    fn a_copy_rests_for_a_quarter_where_the_machine_is_full() {
        assert_eq!(rests(&saw(124), 0), 250_000);
        assert_eq!(rests(&saw(125), 0), 0);
        assert_eq!(rests(&saw(0), OLD_US - 1), 250_000);
    }

    #[test]
    fn a_copy_that_is_a_second_old_works_on() {
        assert_eq!(rests(&saw(0), OLD_US), 0);
    }

    #[test]
    fn what_is_not_known_is_not_full() {
        let mut rest = saw(0);
        rest.look(LOOK_US * 2, None);
        assert_eq!(rests(&rest, 0), 0);
        // One figure alone says nothing about now, nor does an account that stands still.
        for _ in 0..2 {
            rest.look(LOOK_US * 3, Some(Spent { all: 9000, idle: 0 }));
            assert_eq!(rests(&rest, 0), 0);
        }
        assert!(!rest.is_due(LOOK_US * 4 - 1) && rest.is_due(LOOK_US * 4));
    }

    #[test]
    fn the_account_is_read_as_the_kernel_writes_it() {
        let text = "cpu  1 2 3 4 5 6 7 8 100 100\ncpu0 9 9 9 9 9 9 9 9 0 0\n";
        assert_eq!(Spent::parse(text), Some(Spent { all: 36, idle: 9 }));
        for bad in ["", "cpu 1 2 3", "cpu0 1 2 3 4 5", "cpu 1 2 x 4 5", "intr 1 2 3 4 5"] {
            assert_eq!(Spent::parse(bad), None, "{bad}");
        }
        assert!(Spent::here().is_some_and(|s| s.all >= s.idle));
    }
}
