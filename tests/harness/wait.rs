//! Waiting: until a condition holds or a deadline passes, and then it says which.

use std::time::Duration;

use blockfilter::engine::Clock as _;
use blockfilter::engine::real::RealClock;

/// Looks at `ready` until it gives a value; panics with `what` after `limit`.
pub fn wait_until<T>(what: &str, limit: Duration, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Deadline::after(limit);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(!deadline.passed(), "waited {limit:?} in vain for {what}");
        pause();
    }
}

/// A moment in the future.
#[derive(Debug)]
pub struct Deadline {
    clock: RealClock,
    limit: Duration,
}

impl Deadline {
    /// That far from now.
    pub fn after(limit: Duration) -> Self {
        Self { clock: RealClock::new(), limit }
    }

    /// Whether it is over.
    pub fn passed(&self) -> bool {
        self.left().is_zero()
    }

    /// How long it still is.
    pub fn left(&self) -> Duration {
        self.limit.saturating_sub(self.elapsed())
    }

    /// How long it has been.
    pub fn elapsed(&self) -> Duration {
        Duration::from_micros(self.clock.mono_us())
    }
}

/// A few milliseconds between two looks at something.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}

/// Keeps a load from taking the whole machine; never a way to wait for something.
pub fn rest(time: Duration) {
    if !time.is_zero() {
        std::thread::sleep(time);
    }
}
