//! What may be appended, and how old the recoverable state is. (pure)
//!
//! Owns the checks between a frame that is whole ([`FrameBuf`]) and the store.
//! Holds: an epoch reaches the store whole or not at all; its frames follow each
//! other and the durable end without gap; frames that are durable already are
//! skipped; generation and incarnation never go back; memory for an unfinished
//! epoch is bounded. RPO is computed from heartbeats that return the time of an
//! Ack, never from two wall clocks, is never younger than the truth and None where
//! it cannot be proved. Before it: the channel. After it: the store. It does no I/O.

use std::collections::VecDeque;

use blockfilter::journal::format::RecOp;
use blockfilter::names::Lsn;
use replicator::frame::FrameBuf;
use replicator::session::Heartbeat;
use replicator::wire::Kind;

/// Why a frame is refused; ends the session, nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// The stream does not continue at the durable end, or in its epoch.
    #[error("a frame starts at {found}, but {expected} was expected")]
    Gap {
        /// Where it should start.
        expected: Lsn,
        /// Where it starts.
        found: Lsn,
    },
    /// Another generation than the session's.
    #[error("a frame has generation {found}, the session has {expected}")]
    Generation {
        /// Of the session.
        expected: u64,
        /// Of the frame.
        found: u64,
    },
    /// The incarnation went back or changed inside an epoch.
    #[error("a frame has incarnation {found} after {expected}")]
    Incarnation {
        /// The newest so far.
        expected: u64,
        /// Of the frame.
        found: u64,
    },
    /// An epoch is too large to keep until it is whole.
    #[error("an epoch is larger than {EPOCH_MAX} bytes")]
    TooLarge,
    /// It is not what the protocol says.
    #[error("bad frame: {0}")]
    Bad(&'static str),
}

/// One session's receiving state.
#[derive(Debug)]
pub struct Receiver {
    group_id: u64,
    generation: u64,
    incarnation: u64,
    last: u64,
    disks: Vec<u64>,
    seed: Option<u64>,
    pending: Vec<FrameBuf>,
    pending_bytes: usize,
}

/// Where a session starts.
#[derive(Clone, Debug)]
pub struct Begin {
    /// First 8 bytes of the group's id.
    pub group_id: u64,
    /// The only generation that is accepted.
    pub generation: u64,
    /// Of the newest record.
    pub incarnation: u64,
    /// Durable end.
    pub last: Lsn,
    /// Sizes of the disks in bytes.
    pub disks: Vec<u64>,
    /// Where the seed under way is ordered.
    pub seed: Option<Lsn>,
}

impl Receiver {
    /// A session that starts at the durable end.
    pub fn new(begin: Begin) -> Self {
        Self {
            group_id: begin.group_id,
            generation: begin.generation,
            incarnation: begin.incarnation,
            last: begin.last.0,
            disks: begin.disks,
            seed: begin.seed.map(|s| s.0),
            pending: Vec::new(),
            pending_bytes: 0,
        }
    }

    /// A seed began: the stream continues at `s`.
    pub fn seed_begun(&mut self, s: Lsn, incarnation: u64) {
        self.pending.clear();
        self.pending_bytes = 0;
        (self.last, self.incarnation, self.seed) = (s.0, incarnation, Some(s.0));
    }

    /// Takes a frame of the stream; returns a whole epoch when it is complete.
    /// The caller appends it before the next call.
    pub fn epoch_frame(&mut self, frame: FrameBuf) -> Result<Option<Vec<FrameBuf>>, ReceiveError> {
        self.check(&frame, Kind::Epoch)?;
        let (from, to) = (frame.hdr.lsn_from.get(), frame.hdr.lsn_to.get());
        if to <= self.last && self.pending.is_empty() && from < self.last {
            return Ok(None);
        }
        let expected = self.pending.last().map_or(self.last, |f| f.hdr.lsn_to.get());
        if from != expected {
            return Err(ReceiveError::Gap { expected: Lsn(expected), found: Lsn(from) });
        }
        let incarnation = frame.hdr.incarnation.get();
        let changed = self.pending.first().is_some_and(|f| f.hdr.incarnation != incarnation);
        if incarnation < self.incarnation || changed {
            let expected = self.incarnation;
            return Err(ReceiveError::Incarnation { expected, found: incarnation });
        }
        let end = frame.hdr.is_epoch_end();
        if end && to <= self.last {
            return Err(ReceiveError::Bad("an epoch without length"));
        }
        self.pending_bytes += frame.bytes.len();
        if self.pending_bytes > EPOCH_MAX {
            return Err(ReceiveError::TooLarge);
        }
        self.pending.push(frame);
        if !end {
            return Ok(None);
        }
        (self.last, self.incarnation) = (to, incarnation);
        self.pending_bytes = 0;
        Ok(Some(std::mem::take(&mut self.pending)))
    }

    /// Checks a copied block's frame.
    pub fn copy_frame(&self, frame: &FrameBuf) -> Result<(), ReceiveError> {
        self.check(frame, Kind::Copy)?;
        let Some(s) = self.seed else {
            return Err(ReceiveError::Bad("a copied block outside of a seed"));
        };
        if frame.hdr.lsn_from.get() != s || frame.hdr.lsn_to.get() != s {
            return Err(ReceiveError::Bad("position of a copied block"));
        }
        let size = self.disks.get(frame.hdr.cursor_disk.get() as usize);
        if size.is_none_or(|size| frame.hdr.cursor.get() > *size) {
            return Err(ReceiveError::Bad("cursor of a seed"));
        }
        Ok(())
    }

    fn check(&self, frame: &FrameBuf, kind: Kind) -> Result<(), ReceiveError> {
        if frame.kind() != kind {
            return Err(ReceiveError::Bad("kind"));
        }
        if frame.hdr.group_id.get() != self.group_id {
            return Err(ReceiveError::Bad("group"));
        }
        let found = frame.hdr.generation.get();
        if found != self.generation {
            return Err(ReceiveError::Generation { expected: self.generation, found });
        }
        for desc in frame.descs() {
            let Some(RecOp::Write | RecOp::Zero | RecOp::Trim) = desc.rec_op() else { continue };
            let size = self.disks.get(usize::from(desc.disk));
            if size.is_none_or(|size| desc.end() > *size) {
                return Err(ReceiveError::Bad("range of a record"));
            }
        }
        Ok(())
    }
}

/// Age of the newest recoverable state, from heartbeats.
#[derive(Debug, Default)]
pub struct Rpo {
    /// Admitted position, and when the source had it at the latest, on our
    /// clock. Both grow.
    beats: VecDeque<(u64, u64)>,
    /// When the source had what is recoverable now.
    proved_us: Option<u64>,
}

impl Rpo {
    /// A heartbeat arrived at `now_us`. It was sent no earlier than the Ack it
    /// returns and the time the source held that, and the source had `admitted` at
    /// most its age before: how long the two were on their way does not count.
    pub fn beat(&mut self, beat: &Heartbeat, now_us: u64) {
        let sent = beat.echo.map(|echo| echo.mono_us.saturating_add(echo.held_us).min(now_us));
        // Before our clock began: nothing that we could say.
        let Some(born) = sent.and_then(|sent| sent.checked_sub(beat.age_us)) else { return };
        let admitted = beat.admitted.0;
        if let Some((last, born_before)) = self.beats.back_mut() {
            if *last == admitted {
                *born_before = born.max(*born_before);
                return;
            }
            if *last > admitted {
                // The source forgot what was not durable.
                self.beats.clear();
            }
        }
        if self.beats.len() == BEATS_MAX {
            // Thinning makes the answer older, never younger.
            let mut keep = false;
            self.beats.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.beats.push_back((admitted, born));
    }

    /// The source started again uncleanly: what it said about positions beyond
    /// the durable end no longer holds.
    pub fn source_restarted(&mut self) {
        self.beats.clear();
    }

    /// Everything below `recoverable` can be recovered: the age of that state in
    /// microseconds; None: not provable.
    pub fn rpo_us(&mut self, recoverable: Option<Lsn>, now_us: u64) -> Option<u64> {
        let recoverable = recoverable?.0;
        while let Some((admitted, born)) = self.beats.front()
            && *admitted <= recoverable
        {
            self.proved_us = Some(self.proved_us.map_or(*born, |p| p.max(*born)));
            if self.beats.len() == 1 {
                break;
            }
            self.beats.pop_front();
        }
        self.proved_us.map(|proved| now_us.saturating_sub(proved))
    }
}

/// Most bytes of an epoch's frames.
pub const EPOCH_MAX: usize = 96 << 20;
const BEATS_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use blockfilter::journal::format::RecDesc;
    use replicator::session::Echo;
    use replicator::wire::{FRAME_EPOCH_END, FrameHdr};

    fn receiver() -> Receiver {
        Receiver::new(Begin {
            group_id: 7,
            generation: 1,
            incarnation: 2,
            last: Lsn(100),
            disks: vec![1 << 20],
            seed: Some(Lsn(50)),
        })
    }

    fn frame(from: u64, to: u64, end: bool) -> FrameBuf {
        changed(from, to, end, |_| ())
    }

    fn changed(from: u64, to: u64, end: bool, change: fn(&mut FrameHdr)) -> FrameBuf {
        let mut hdr = FrameHdr {
            kind: Kind::Epoch as u8,
            flags: if end { FRAME_EPOCH_END } else { 0 },
            group_id: 7.into(),
            generation: 1.into(),
            incarnation: 2.into(),
            lsn_from: from.into(),
            lsn_to: to.into(),
            ..Default::default()
        };
        change(&mut hdr);
        FrameBuf::seal(hdr, &[], &[])
    }

    #[test]
    fn an_epoch_comes_out_whole() {
        let mut receiver = receiver();
        assert_eq!(receiver.epoch_frame(frame(100, 150, false)).unwrap(), None);
        let epoch = receiver.epoch_frame(frame(150, 200, true)).unwrap().unwrap();
        assert_eq!(epoch.len(), 2);
        assert!(receiver.epoch_frame(frame(200, 300, true)).unwrap().is_some());
    }

    #[test]
    fn a_gap_ends_the_session_and_a_repeat_is_skipped() {
        let gap = receiver().epoch_frame(frame(101, 150, true));
        assert_eq!(gap, Err(ReceiveError::Gap { expected: Lsn(100), found: Lsn(101) }));
        assert_eq!(receiver().epoch_frame(frame(60, 100, true)), Ok(None));
        assert!(receiver().epoch_frame(frame(60, 120, true)).is_err());
        let mut middle = receiver();
        middle.epoch_frame(frame(100, 150, false)).unwrap();
        assert!(middle.epoch_frame(frame(151, 200, true)).is_err());
    }

    #[test]
    fn other_generations_incarnations_and_groups_are_refused() {
        let refused = |change| receiver().epoch_frame(changed(100, 150, true, change)).is_err();
        assert!(refused(|h| h.generation = 0.into()));
        assert!(refused(|h| h.generation = 2.into()));
        assert!(refused(|h| h.incarnation = 1.into()));
        assert!(refused(|h| h.group_id = 8.into()));
        assert!(!refused(|h| h.incarnation = 3.into()));
        let mut inside = receiver();
        inside.epoch_frame(frame(100, 150, false)).unwrap();
        let other = changed(150, 200, true, |h| h.incarnation = 3.into());
        assert!(inside.epoch_frame(other).is_err());
    }

    #[test]
    fn records_outside_a_disk_are_refused() {
        for (disk, offset) in [(1, 0), (0, (1 << 20) - 511)] {
            let desc = RecDesc {
                op: RecOp::Zero as u8,
                disk,
                offset: offset.into(),
                len: 512.into(),
                lsn: 100.into(),
                ..Default::default()
            };
            let bad = FrameBuf::seal(frame(100, 150, true).hdr, &[desc], &[]);
            assert!(receiver().epoch_frame(bad).is_err());
        }
    }

    #[test]
    fn copies_are_only_taken_at_their_seeds_position() {
        let copy = |from: u64, cursor: u64| {
            let mut hdr = frame(from, from, false).hdr;
            hdr.kind = Kind::Copy as u8;
            hdr.cursor = cursor.into();
            FrameBuf::seal(hdr, &[], &[])
        };
        assert!(receiver().copy_frame(&copy(50, 1 << 20)).is_ok());
        assert!(receiver().copy_frame(&copy(51, 0)).is_err());
        assert!(receiver().copy_frame(&copy(50, (1 << 20) + 1)).is_err());
    }

    fn beat(admitted: u64, age_us: u64, mono_us: u64, held_us: u64) -> Heartbeat {
        let echo = Some(Echo { mono_us, held_us });
        Heartbeat { admitted: Lsn(admitted), age_us, mono_us: 0, echo, held_cpu: None }
    }

    #[test]
    fn rpo_follows_heartbeats_and_grows_when_they_stop() {
        let mut rpo = Rpo::default();
        assert_eq!(rpo.rpo_us(Some(Lsn(10)), 1_000), None);
        rpo.beat(&beat(10, 5, 900, 80), 1_000);
        assert_eq!(rpo.rpo_us(Some(Lsn(9)), 1_000), None);
        assert_eq!(rpo.rpo_us(Some(Lsn(10)), 1_000), Some(25));
        rpo.beat(&beat(10, 5, 1_900, 80), 2_000);
        assert_eq!(rpo.rpo_us(Some(Lsn(10)), 2_000), Some(25));
        rpo.beat(&beat(30, 0, 2_000, 1_000), 3_000);
        assert_eq!(rpo.rpo_us(Some(Lsn(10)), 3_000), Some(1_025));
        assert_eq!(rpo.rpo_us(Some(Lsn(10)), 9_000), Some(7_025));
        assert_eq!(rpo.rpo_us(Some(Lsn(30)), 9_000), Some(6_000));
        assert_eq!(rpo.rpo_us(None, 9_000), None);
    }

    #[test]
    fn a_heartbeat_that_returns_no_time_or_one_before_our_clock_proves_nothing() {
        let mut rpo = Rpo::default();
        rpo.beat(&Heartbeat { echo: None, ..beat(10, 0, 0, 0) }, 1_000);
        rpo.beat(&beat(10, 901, 800, 100), 1_000);
        assert_eq!(rpo.rpo_us(Some(Lsn(10)), 1_000), None);
        rpo.beat(&beat(10, 0, 800, u64::MAX), 1_000);
        assert_eq!(rpo.rpo_us(Some(Lsn(10)), 1_000), Some(0));
    }

    #[test]
    fn rpo_is_never_younger_than_the_truth_however_the_line_delays() {
        // The source has admitted position t at its time t, which is 70 s behind ours.
        const BEHIND: u64 = 70_000_000;
        let mut state = 9_u64;
        let mut random = |limit: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % limit
        };
        let mut rpo = Rpo::default();
        let (mut acked, mut taken, mut arrived, mut held) = (BEHIND, 0, 0, 0);
        for step in 1..2_000_u64 {
            let sent = step * 100_000;
            // Most of the time a line of 1 ms; now and then everything queues for seconds.
            let slow = if step % 300 > 200 { 5_000_000 } else { 1_000 };
            let known = sent - random(60_000);
            let echo = (taken > 0).then(|| Echo { mono_us: acked, held_us: sent - taken });
            let beat = Heartbeat { mono_us: sent, echo, ..beat(known, sent - known, 0, 0) };
            arrived = (sent + BEHIND + random(slow)).max(arrived);
            rpo.beat(&beat, arrived);
            held = known.saturating_sub(random(200_000)).max(held);
            if let Some(shown) = rpo.rpo_us(Some(Lsn(held)), arrived) {
                let truth = arrived - BEHIND - held;
                assert!(shown >= truth, "step {step}: {shown} < {truth}");
            }
            let back = arrived - BEHIND + random(slow);
            if back <= sent + 100_000 {
                (acked, taken) = (arrived, back);
            }
        }
    }

    #[test]
    fn rpo_is_never_negative_and_memory_is_bounded() {
        let mut rpo = Rpo::default();
        rpo.beat(&beat(1, 0, 1_000, 0), 1_000);
        assert_eq!(rpo.rpo_us(Some(Lsn(1)), 500), Some(0));
        for step in 2..100_000 {
            rpo.beat(&beat(step, 0, 1_000 + step, 0), 1_000 + step);
        }
        assert!(rpo.beats.len() <= BEATS_MAX);
        let age = rpo.rpo_us(Some(Lsn(50_000)), 200_000).unwrap();
        assert!(age >= 200_000 - 51_000, "{age}");
    }

    #[test]
    fn an_epoch_that_never_ends_is_bounded() {
        let mut receiver = receiver();
        let body = vec![0; 4 << 20];
        let mut last = Ok(None);
        for step in 0..40 {
            let mut hdr = frame(100 + step, 101 + step, false).hdr;
            hdr.raw_len = (4 << 20).into();
            last = receiver.epoch_frame(FrameBuf::seal(hdr, &[], &body));
            if last.is_err() {
                break;
            }
        }
        assert_eq!(last, Err(ReceiveError::TooLarge));
    }
}
