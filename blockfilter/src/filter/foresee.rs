//! Foresees the next flush of a client that flushes after every so many writes, so that
//! half of the commit is written while the rest still comes, and the commit runs while the client
//! still takes the answers of its writes. (pure)
//!
//! It counts the records and waits of the whole group: several clients, or points made
//! meanwhile, only make it foresee less. A wrong guess costs a write, a batch's header and one
//! early commit, which with one active client holds the group's thread for as long as the journal
//! takes: what was not foreseen right is not foreseen again before an interval was repeated
//! [`REGULAR`] times.

/// When a flush is about to come.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Foresee {
    /// Records since the last flush.
    since: u32,
    /// Records between the two flushes before.
    interval: u32,
    /// How often in a row it was that many.
    times: u32,
    /// Of the records since the last flush some were written ahead.
    ahead: bool,
}

impl Foresee {
    /// A record was admitted.
    pub(super) fn wrote(&mut self) {
        self.since = self.since.saturating_add(1);
    }

    /// A flush came. One with nothing new before it tells nothing.
    pub(super) fn flushed(&mut self) {
        if self.since == 0 {
            return;
        }
        self.times = if self.since == self.interval { self.times.saturating_add(1) } else { 0 };
        self.interval = self.since;
        (self.since, self.ahead) = (0, false);
    }

    /// As many records came as every time before the last flushes.
    pub(super) fn due(&self) -> bool {
        self.times >= REGULAR && self.since == self.interval
    }

    /// Half of the records came that come before the flush that is foreseen, and so few more
    /// that the rest is still worth a write of its own.
    pub(super) fn is_halfway(&self) -> bool {
        let (from, to) = (self.interval.div_ceil(2), self.interval - self.interval / 4);
        self.times >= REGULAR && !self.ahead && (from..to).contains(&self.since)
    }

    /// What came is being written: once before each flush.
    pub(super) fn begun_ahead(&mut self) {
        self.ahead = true;
    }
}

/// Repeats of an interval that make the next flush foreseen.
const REGULAR: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    fn round(foresee: &mut Foresee, writes: u32) {
        (0..writes).for_each(|_| foresee.wrote());
        foresee.flushed();
    }

    #[test]
    fn a_flush_is_foreseen_after_equal_intervals_and_at_their_end_only() {
        for interval in [1, 2, 32] {
            let mut foresee = Foresee::default();
            for _ in 0..=REGULAR {
                assert!(!foresee.due());
                round(&mut foresee, interval);
            }
            assert!(!foresee.is_halfway());
            for write in 1..=interval {
                foresee.wrote();
                assert_eq!(foresee.due(), write == interval, "{write} of {interval}");
                let halfway = write * 2 >= interval && write < interval - interval / 4;
                assert_eq!(foresee.is_halfway(), halfway, "{write} of {interval}");
            }
            foresee.flushed();
            // What comes behind a flush with nothing between changes nothing.
            foresee.flushed();
            assert!(!foresee.due());
            (0..interval).for_each(|_| foresee.wrote());
            assert!(foresee.due());
        }
    }

    #[test]
    fn it_is_halfway_once_before_each_flush() {
        let mut foresee = Foresee::default();
        (0..=REGULAR).for_each(|_| round(&mut foresee, 32));
        for _ in 0..2 {
            (0..16).for_each(|_| foresee.wrote());
            assert!(foresee.is_halfway());
            foresee.begun_ahead();
            for _ in 16..32 {
                assert!(!foresee.is_halfway());
                foresee.wrote();
            }
            foresee.flushed();
        }
    }

    #[test]
    fn writes_without_a_flush_are_committed_early_once() {
        let mut foresee = Foresee::default();
        (0..=REGULAR).for_each(|_| round(&mut foresee, 1));
        foresee.wrote();
        assert!(foresee.due());
        for _ in 0..100 {
            foresee.wrote();
            assert!(!foresee.due());
        }
        round(&mut foresee, 0);
        foresee.wrote();
        assert!(!foresee.due(), "the interval has changed");
    }
}
