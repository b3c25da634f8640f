//! How many bytes are written before a checkpoint is due for them. (pure)
//!
//! A checkpoint writes each block once that was written since the last one, so the farther apart
//! they are the less the disks have to do; but while one runs, clients go on writing to the
//! journal, and it must not fill up meanwhile. So they are half of the journal apart where
//! the last one was quick, a quarter where it was slow or nothing is known, else between; and nearer by
//! what the journal keeps for the target, since no checkpoint frees that. PostgreSQL spaces
//! its checkpoints by a share of `max_wal_size` for the same reason.

/// Where the next checkpoint is due.
#[derive(Debug)]
pub(super) struct Spacing {
    /// Bytes in the journal.
    journal: u64,
    /// How far apart they could be, by the last one, if the journal kept nothing for the target.
    apart: u64,
    running: Option<Running>,
}

/// A checkpoint that runs, by positions.
#[derive(Clone, Copy, Debug)]
struct Running {
    /// The one before.
    from: u64,
    /// It covers what is below.
    to: u64,
    /// What was admitted when it began.
    admitted: u64,
    /// Clients wrote as fast as it let them.
    pressed: bool,
}

impl Spacing {
    pub(super) fn new(journal: u64) -> Self {
        Self { journal, apart: least(journal), running: None }
    }

    /// Whether so many bytes since the last checkpoint make one due. `kept`: other bytes of
    /// the journal that no checkpoint frees.
    pub(super) fn is_due(&self, bytes: u64, kept: impl FnOnce() -> u64) -> bool {
        bytes >= least(self.journal) && bytes >= self.due(kept())
    }

    fn due(&self, kept: u64) -> u64 {
        let fillable = (self.journal / 4 * 3).max(1);
        let left = u128::from(fillable.saturating_sub(kept));
        let due = u128::from(self.apart) * left / u128::from(fillable);
        let most = (self.journal / 2).min(MOST);
        u64::try_from(due).unwrap_or(most).clamp(least(self.journal), most)
    }

    /// One begins, from the last one's position to its own.
    pub(super) fn begun(&mut self, from: u64, to: u64, admitted: u64) {
        self.running = Some(Running { from, to, admitted, pressed: false });
    }

    /// A write waits because the arena is full.
    pub(super) fn waits(&mut self) {
        if let Some(running) = &mut self.running {
            running.pressed = true;
        }
    }

    /// It ended. `full`: writes wait because the journal is. One that covers less than a quarter
    /// of the journal tells too little.
    pub(super) fn ended(&mut self, admitted: u64, full: bool) {
        let Some(Running { from, to, admitted: before, pressed }) = self.running.take() else {
            return;
        };
        let covered = to - from;
        if full {
            self.apart = least(self.journal);
        }
        if full || covered < least(self.journal) {
            return;
        }
        // With as much for each byte as this time, three quarters are full when the next one ends.
        let filled = u128::from((admitted - from).max(1));
        let apart = u128::from(self.journal) * 3 / 4 * u128::from(covered) / filled;
        let apart = u64::try_from(apart).unwrap_or(u64::MAX);
        // Where clients paused meanwhile nobody knows whether it was quick; and where it was over
        // before much came, little is gained.
        let paused = admitted - before < covered / 16 && !pressed;
        self.apart = if paused { apart.min(self.apart) } else { apart };
    }
}

fn least(journal: u64) -> u64 {
    (journal / 4).min(MOST)
}

/// A start after a power cut replays this, and what came while the checkpoint ran.
const MOST: u64 = 8 << 30;

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// One that covers so much, with so much behind it when it ends.
    fn end(spacing: &mut Spacing, covered: u64, behind: u64) -> u64 {
        end_with(spacing, covered, 0, behind)
    }

    /// The same, with `backlog` behind it when it begins.
    fn end_with(spacing: &mut Spacing, covered: u64, backlog: u64, behind: u64) -> u64 {
        let (from, to) = (100 * GIB, 100 * GIB + covered);
        spacing.begun(from, to, to + backlog);
        spacing.ended(to + behind, false);
        spacing.due(0)
    }

    #[test]
    fn it_is_a_quarter_of_the_journal_until_a_checkpoint_was_quick_and_again_after_a_slow_one() {
        let mut spacing = Spacing::new(8 * GIB);
        assert_eq!(spacing.due(0), 2 * GIB);
        assert_eq!(end(&mut spacing, 2 * GIB, GIB), 4 * GIB);
        assert_eq!(end(&mut spacing, 2 * GIB, 2 * GIB), 3 * GIB);
        assert_eq!(end(&mut spacing, 2 * GIB, 6 * GIB), 2 * GIB);
        assert!(spacing.is_due(2 * GIB, || 0) && !spacing.is_due(2 * GIB - 1, || 8 * GIB));
    }

    #[test]
    fn one_that_covers_little_or_that_clients_paused_beside_tells_nothing() {
        let mut spacing = Spacing::new(8 * GIB);
        assert_eq!(end(&mut spacing, GIB, GIB / 2), 2 * GIB);
        assert_eq!(end(&mut spacing, 2 * GIB, GIB / 9), 2 * GIB);
        assert_eq!(end(&mut spacing, 2 * GIB, GIB), 4 * GIB);
        assert_eq!(end(&mut spacing, 2 * GIB, 0), 4 * GIB);
        // But one that held them up tells all there is.
        spacing = Spacing::new(8 * GIB);
        spacing.waits();
        assert_eq!(end(&mut spacing, 2 * GIB, GIB / 9), 2 * GIB, "none was running yet");
        spacing.begun(0, 2 * GIB, 2 * GIB);
        spacing.waits();
        spacing.ended(2 * GIB + GIB / 9, false);
        assert_eq!(spacing.due(0), 4 * GIB);
        // What waited to be written back already when it began fills the journal all the same.
        assert_eq!(end_with(&mut spacing, 2 * GIB, 2 * GIB, 2 * GIB), 3 * GIB);
        spacing.ended(0, true);
        assert_eq!(spacing.due(0), 3 * GIB, "none was running");
    }

    #[test]
    fn what_is_kept_for_the_target_brings_the_next_one_nearer() {
        let mut spacing = Spacing::new(8 * GIB);
        assert_eq!(end(&mut spacing, 2 * GIB, GIB), 4 * GIB);
        // Half of what it covers comes while it runs, so with what is kept three quarters are full at its end.
        for (kept, due) in
            [(0, 4 * GIB), (GIB, 10 * GIB / 3), (2 * GIB, 8 * GIB / 3), (9 * GIB, 2 * GIB)]
        {
            assert!(spacing.is_due(due, || kept) && !spacing.is_due(due - 1, || kept), "{kept}");
        }
    }

    #[test]
    fn a_journal_that_is_full_has_a_checkpoint_at_a_quarter() {
        let mut spacing = Spacing::new(8 * GIB);
        assert_eq!(end(&mut spacing, 2 * GIB, GIB), 4 * GIB);
        spacing.begun(0, GIB, 2 * GIB);
        spacing.ended(8 * GIB, true);
        assert_eq!(spacing.due(0), 2 * GIB);
    }

    #[test]
    fn a_large_journal_is_not_replayed_whole() {
        let mut spacing = Spacing::new(80 * GIB);
        assert_eq!(end(&mut spacing, 20 * GIB, 2 * GIB), MOST);
        assert!(spacing.is_due(MOST, || 0));
        spacing = Spacing::new(u64::MAX);
        assert_eq!(end(&mut spacing, u64::MAX / 2, u64::MAX / 8), MOST);
    }
}
