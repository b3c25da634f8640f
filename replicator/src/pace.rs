//! How long to wait before the next try, and how fast things go. (pure)
//!
//! Owns back-off and rate measurement. Time and randomness are arguments.

/// Waits of 1, 2, 4, 8 … 60 s with jitter, back to 1 s after a session that held.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    failures: u32,
    step_us: u64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(STEP_US)
    }
}

impl Backoff {
    /// With a first wait of up to `step_us` instead of a second.
    pub const fn new(step_us: u64) -> Self {
        Self { failures: 0, step_us }
    }

    /// A try failed; the wait before the next, microseconds: between half and
    /// all of the step, chosen by `random`.
    pub fn failed(&mut self, random: u64) -> u64 {
        let limit = self.step_us.saturating_mul(LIMIT_STEPS);
        let step = self.step_us.saturating_mul(1 << self.failures.min(10)).min(limit);
        self.failures = self.failures.saturating_add(1);
        step / 2 + random % (step / 2 + 1)
    }

    /// A session held.
    pub fn worked(&mut self) {
        self.failures = 0;
    }
}

/// Bytes per second over the last few seconds, and what is left of a job.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    since_us: u64,
    bytes: u64,
    rate: f64,
}

impl Meter {
    /// `bytes` more were done at `now_us`.
    pub fn add(&mut self, bytes: u64, now_us: u64) {
        if self.since_us == 0 {
            self.since_us = now_us;
        }
        self.bytes += bytes;
        let elapsed = now_us.saturating_sub(self.since_us);
        if elapsed >= WINDOW_US {
            let rate = self.bytes as f64 * 1e6 / elapsed as f64;
            self.rate = if self.rate == 0.0 { rate } else { self.rate * 0.7 + rate * 0.3 };
            self.bytes = 0;
            self.since_us = now_us;
        }
    }

    /// Bytes per second; 0: not known yet.
    pub fn rate(&self) -> u64 {
        self.rate as u64
    }

    /// Seconds for `left` more bytes, if the rate is known.
    pub fn eta_seconds(&self, left: u64) -> Option<f64> {
        (self.rate >= 1.0).then(|| left as f64 / self.rate)
    }
}

const STEP_US: u64 = 1_000_000;
/// Longest wait, in first steps.
const LIMIT_STEPS: u64 = 60;
const WINDOW_US: u64 = 500_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_minute_and_start_over() {
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..8).map(|_| backoff.failed(u64::MAX - 1) / 1_000_000).collect();
        assert!(waits.windows(2).all(|w| w[0] <= w[1] || w[1] >= 30), "{waits:?}");
        for _ in 0..100 {
            let wait = backoff.failed(7);
            assert!((30_000_000..=60_000_000).contains(&wait));
        }
        backoff.worked();
        assert!(backoff.failed(12_345) <= STEP_US);
    }

    #[test]
    fn the_rest_of_a_steady_job_is_estimated() {
        let mut meter = Meter::default();
        for step in 1..=100 {
            meter.add(1000, step * 100_000);
        }
        let eta = meter.eta_seconds(100_000).unwrap();
        assert!((9.0..11.5).contains(&eta), "{eta}");
    }
}
