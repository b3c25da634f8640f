//! What is due: commit, apply, checkpoint, super block, freeze. (pure)

use super::{
    AHEAD_BYTES, APPLY_AFTER, Action, CHECKPOINT_AFTER, CHECKPOINT_AFTER_BUSY, COMMIT_AFTER,
    COMMIT_BYTES, Commit, Filter, Marker, Memory, Segment, Stall, Step, WINDOW_MAX,
};
use crate::control::Mode;
use crate::journal::batch::finish_super;
use crate::journal::format::*;

impl Filter {
    /// What to do now, if anything. Call until None after every event.
    pub fn poll_action(&mut self, mem: &mut impl Memory, now: u64) -> Option<Action> {
        if self.mode == Mode::Unjournaled {
            return self.poll_unjournaled(mem, now);
        }
        self.maybe_freeze();
        self.poll_commit(mem, now)
            .or_else(|| self.poll_apply(now))
            .or_else(|| self.poll_checkpoint(now))
            .or_else(|| self.poll_super())
    }

    /// When to call [`Filter::poll_action`] again if nothing happens; monotonic microseconds.
    pub fn poll_timeout(&self) -> Option<u64> {
        let mut due: Option<u64> = None;
        let mut at = |t: u64| due = Some(due.map_or(t, |d| d.min(t)));
        if self.marker_failed {
            return Some(self.retry_marker_at);
        }
        if self.promises_nothing() {
            return None;
        }
        if self.mode == Mode::Unjournaled {
            return self.timeout_unjournaled();
        }
        let unsealed = !self.open.descs.is_empty() || !self.segments.is_empty();
        match self.held() {
            Some(since) => at(since + COMMIT_AFTER),
            None if unsealed && self.commit.is_none() => at(self.open.since + COMMIT_AFTER),
            None => {}
        }
        if self.failed.contains(&true) {
            return due;
        }
        if self.apply_limit() > self.applied && self.apply.is_none() {
            at((self.applied_at + APPLY_AFTER).max(self.retry_apply_at));
        }
        if self.applied > self.sync_reached() && !self.is_checkpointing() {
            at(self.checkpoint_due());
        }
        due
    }

    /// The same without a journal. What runs wakes the caller when it is done.
    fn timeout_unjournaled(&self) -> Option<u64> {
        if self.failed.contains(&true) || self.apply.is_some() || self.syncing.is_some() {
            return None;
        }
        match self.marker {
            Marker::Applying => return Some(self.retry_apply_at),
            Marker::Due => return Some(self.retry_marker_at),
            Marker::Syncing | Marker::Running => return None,
            Marker::NotNeeded | Marker::Done => {}
        }
        let unsealed = (!self.open.descs.is_empty()).then_some(self.open.since + COMMIT_AFTER);
        let apply = (self.apply_limit() > self.applied)
            .then_some((self.applied_at + APPLY_AFTER).max(self.retry_apply_at));
        let sync = (self.applied > self.durable).then_some(self.checkpoint_at + CHECKPOINT_AFTER);
        [unsealed, apply, sync].into_iter().flatten().min()
    }

    /// What may be applied now ends here (I3).
    pub(super) fn apply_limit(&self) -> u64 {
        match self.marker {
            Marker::Done => self.open.lsn,
            _ => self.durable,
        }
    }

    /// The disks are synced up to here.
    pub(super) fn sync_reached(&self) -> u64 {
        match self.mode {
            Mode::Unjournaled => self.durable,
            _ => self.synced.map_or(self.sup.checkpoint.get(), |s| s.0),
        }
    }

    /// When a checkpoint is due if not for the bytes: soon when nothing is written any
    /// more or slots get scarce, else late, so that what is written again and again
    /// goes to the disks once.
    fn checkpoint_due(&self) -> u64 {
        let quiet = self.apply_limit() <= self.applied && self.apply.is_none();
        let scarce = self.slots.free() <= self.slots.reserve();
        if quiet {
            self.checkpoint_at.max(self.applied_at) + CHECKPOINT_AFTER
        } else if scarce {
            self.checkpoint_at + CHECKPOINT_AFTER
        } else {
            self.checkpoint_at + CHECKPOINT_AFTER_BUSY
        }
    }

    pub(super) fn poll_commit(&mut self, mem: &mut impl Memory, now: u64) -> Option<Action> {
        let held = self.held().is_some();
        if held || self.commit.is_none() {
            let due = self.commit_due(now);
            let bytes = self.open.fill - self.open.lsn;
            if due || (!held && self.foresee.is_halfway() && bytes >= AHEAD_BYTES) {
                self.begin_commit(due, mem, now);
            }
        }
        let commit = self.commit.as_mut()?;
        let alone = commit.writes.len() == 1 && !commit.begun && commit.sync == Step::Due;
        if let Some(Segment { pos, len }) = commit.writes.pop() {
            let at = self.slots.file_offset(pos).expect("I5: its chunk has a slot");
            // A synchronous write promises only its own bytes.
            if alone {
                commit.sync = Step::Running;
                return Some(Action::JournalCommit { at, pos, len });
            }
            commit.begun = true;
            commit.in_flight += 1;
            return Some(Action::JournalWrite { at, pos, len });
        }
        if commit.in_flight == 0 && commit.sync == Step::Due {
            commit.sync = Step::Running;
            return Some(Action::JournalSync);
        }
        None
    }

    /// Seals what is open, and begins a commit of it or adds it to the one that is held.
    /// Only if it is due will it be synced.
    fn begin_commit(&mut self, due: bool, mem: &mut impl Memory, now: u64) {
        let sync = if due { Step::Due } else { Step::Held(self.open.since) };
        if due {
            self.force_commit = false;
        } else {
            self.foresee.begun_ahead();
        }
        // A flush is foreseen for what is written ahead, if nobody waits yet.
        self.seal(if due { 0 } else { BATCH_FLUSH }, mem, now);
        let mut writes: Vec<Segment> = self.segments.drain(..).rev().collect();
        let end = self.open.lsn;
        if let Some(held) = &mut self.commit {
            writes.append(&mut held.writes);
            (held.end, held.writes, held.sync) = (end, writes, sync);
        } else if !writes.is_empty() {
            self.commit = Some(Commit { end, writes, begun: false, in_flight: 0, sync });
        }
    }

    /// Bytes that are not durable in the journal yet.
    pub fn undurable(&self) -> u64 {
        self.open.fill.saturating_sub(self.durable)
    }

    pub(super) fn commit_due(&self, now: u64) -> bool {
        let nothing = self.open.descs.is_empty() && self.segments.is_empty();
        let since = match self.held() {
            None if nothing => return false,
            held => held.unwrap_or(self.open.since),
        };
        self.is_awaited()
            || self.force_commit
            || self.drain
            || self.pressed.is_some()
            || self.undurable() >= COMMIT_BYTES
            || now >= since + COMMIT_AFTER
    }

    pub(super) fn poll_apply(&mut self, now: u64) -> Option<Action> {
        let limit = self.apply_limit();
        if self.apply.is_some() || limit <= self.applied || now < self.retry_apply_at {
            return None;
        }
        if self.failed.contains(&true) {
            return None;
        }
        let behind = limit - self.applied;
        let due = self.drain
            || self.pressed.is_some()
            || behind >= self.config.arena / 4
            || now >= self.applied_at + APPLY_AFTER;
        if !due {
            return None;
        }
        let mut to = self.applied;
        for batch in &self.sealed {
            let end = self.config.geometry.normal(batch.end);
            if end > limit || (end - self.applied > WINDOW_MAX && to > self.applied) {
                break;
            }
            to = end;
        }
        if to == self.applied {
            return None;
        }
        assert!(to <= limit, "I3: only durable records are applied");
        self.apply = Some(to);
        Some(Action::Apply { to })
    }

    /// The disks are synced, or the super block that says so is not durable yet: until it is,
    /// no slot is free again, and another checkpoint would come too early.
    fn is_checkpointing(&self) -> bool {
        self.syncing.is_some() || self.synced.is_some()
    }

    /// Bytes below `reached`, a durable checkpoint, that only the target's copy will free.
    fn kept(&self, reached: u64) -> u64 {
        u64::from(self.slots.kept_for_shipping(reached)) * self.config.geometry.chunk
    }

    pub(super) fn poll_checkpoint(&mut self, now: u64) -> Option<Action> {
        let reached = self.sync_reached();
        if self.is_checkpointing() || self.applied <= reached || self.failed.contains(&true) {
            return None;
        }
        let due = self.pressed == Some(Stall::Journal)
            || self.spacing.is_due(self.applied - reached, || self.kept(reached))
            || now >= self.checkpoint_due()
            || (self.drain && self.applied == self.open.lsn);
        if !due {
            return None;
        }
        self.checkpoint_at = now;
        self.spacing.begun(reached, self.applied, self.open.fill);
        self.syncing = Some((self.applied, self.applied_crc));
        Some(Action::SyncDisks)
    }

    pub(super) fn poll_super(&mut self) -> Option<Action> {
        if self.writing_sup.is_some() {
            return None;
        }
        let finished = self.open.descs.is_empty() && self.sync_reached() == self.open.lsn;
        let clean = self.drain && finished && self.commit.is_none() && self.apply.is_none();
        if !self.want_sup && self.synced.is_none() && !(clean && self.sup.clean == 0) {
            return None;
        }
        let mut next = self.sup;
        next.seq = (self.sup.seq.get() + 1).into();
        next.mode = match self.mode {
            Mode::Shipping => MODE_SHIPPING,
            Mode::Frozen => MODE_FROZEN,
            Mode::BackingFailed => self.sup.mode,
            Mode::New | Mode::Unjournaled => MODE_NEW,
        };
        if next.mode == MODE_FROZEN && self.sup.mode != MODE_FROZEN {
            next.frozen_at = self.durable.into();
        }
        next.clean = u8::from(clean);
        next.ship_floor = self.ship_floor.into();
        if let Some((pos, crc)) = self.synced {
            assert!(pos <= self.durable && pos >= self.sup.checkpoint.get(), "I6");
            next.checkpoint = pos.into();
            next.checkpoint_prev_crc = crc.into();
        }
        finish_super(&mut next);
        self.want_sup = false;
        self.writing_sup = Some(Box::new(next));
        Some(Action::WriteSuper(Box::new(next)))
    }

    /// Without a journal, durable means on the disks and synced.
    pub(super) fn poll_unjournaled(&mut self, mem: &mut impl Memory, now: u64) -> Option<Action> {
        if self.failed.contains(&true) {
            // A sync that failed is never tried again and believed (decision 9).
            return None;
        }
        match self.marker {
            Marker::Applying if self.apply.is_some() || self.syncing.is_some() => return None,
            Marker::Applying if self.applied < self.durable => {
                self.pressed.get_or_insert(Stall::Arena);
                return self.poll_apply(now);
            }
            Marker::Applying => {
                self.marker = Marker::Syncing;
                self.syncing = Some((self.applied, self.applied_crc));
                return Some(Action::SyncDisks);
            }
            Marker::Due if now < self.retry_marker_at => return None,
            Marker::Due => {
                self.marker = Marker::Running;
                return Some(Action::MarkUnjournaled);
            }
            Marker::Syncing | Marker::Running => return None,
            Marker::NotNeeded | Marker::Done => {}
        }
        if self.commit_due(now) || self.drain {
            self.seal(0, mem, now);
            self.segments.clear();
            self.force_commit = false;
        }
        // Who is served but not told yet waits for nothing.
        let awaited = self.waiters.iter().map(|w| w.0).find(|pos| *pos > self.durable);
        if awaited.is_some() && self.pressed.is_none() {
            self.pressed = Some(Stall::Arena);
        }
        // Not behind one apply after the other: clients wait, and the arena fills up.
        let unsynced = self.applied.saturating_sub(self.durable);
        if awaited.is_some_and(|pos| pos <= self.applied) || unsynced >= self.config.arena / 4 {
            return self.sync_unjournaled(now).or_else(|| self.poll_apply(now));
        }
        if let Some(action) = self.poll_apply(now) {
            return Some(action);
        }
        let due = awaited.is_some()
            || self.drain
            || self.pressed.is_some()
            || now >= self.checkpoint_at + CHECKPOINT_AFTER;
        if due && self.apply.is_none() { self.sync_unjournaled(now) } else { None }
    }

    fn sync_unjournaled(&mut self, now: u64) -> Option<Action> {
        if self.syncing.is_some() || self.applied <= self.durable {
            return None;
        }
        self.checkpoint_at = now;
        self.syncing = Some((self.applied, self.applied_crc));
        Some(Action::SyncDisks)
    }

    pub(super) fn maybe_freeze(&mut self) {
        if self.mode != Mode::Shipping || self.slots.free() > self.slots.reserve() {
            return;
        }
        let checkpoint = self.sup.checkpoint.get();
        let kept = self.slots.kept_for_shipping(checkpoint);
        if kept + self.slots.reserve() >= self.config.geometry.slots {
            self.mode = Mode::Frozen;
            self.want_sup = true;
        }
    }
}
