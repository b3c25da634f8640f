//! One session at the source.
//!
//! One thread: takes what arrived, tells heartbeats, reads the journal while
//! nothing waits to be sent, or ahead if there is much, sends the stream before copies. An epoch is
//! started only while the window has room and is then sent to its end. It is in the background where it
//! can be, and rests where processors are full.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockfilter::control::{Mode, Positions};
use blockfilter::engine::cpu::{Guest, Place};
use blockfilter::journal::reader::ReadError;
use blockfilter::names::Lsn;

use super::{SessionError, Shipper};
use crate::ahead::Ahead;
use crate::background::{Background, Standing};
use crate::codec::{Controller, Encoder};
use crate::epoch::{Builder, Epoch, Limits};
use crate::feed::{Feed, Known};
use crate::frame::FrameBuf;
use crate::pace::Meter;
use crate::rest::{ROOM, Rest};
use crate::seed::{Copier, CopyHead, SeedPlan, Step};
use crate::session::{
    Ack, DiskInfo, Echo, ErrorMessage, HEARTBEAT_US, Heartbeat, Hello, HelloAck, SeedBegin,
    SeedEnd, Start, decide, group_id, held, is_seed_over, is_whole, keeps_up, seed_again,
};
use crate::source::{Control, Journal};
use crate::status::{SeedProgress, State};
use crate::transport::{Channel, Waker};
use crate::wire::{Kind, WIRE_VERSION};

/// A copy under way.
struct Seeding {
    plan: SeedPlan,
    copier: Copier,
    /// Read, but not sent yet.
    step: Option<Step>,
    /// Everything is read and sent; the seed ends once durable beyond this.
    end: Option<Lsn>,
    /// The end was told, after the heartbeat of this time.
    ended: Option<u64>,
    meter: Meter,
    done: u64,
    sent_bytes: u64,
}

struct Session<'a> {
    shipper: &'a Shipper,
    channel: &'a mut Channel,
    /// The target is on this machine.
    is_local: bool,
    feed: Feed,
    wake: Arc<Waker>,
    journal: Ahead,
    /// Why nothing more can be read. Told once the epoch under way is sent; damage only when the target
    /// holds everything before it.
    unreadable: Option<ReadError>,
    builder: Builder,
    epoch: Option<Epoch>,
    seeding: Option<Seeding>,
    group_id: u64,
    generation: u64,
    codec: Controller,
    encoder: Encoder,
    shipped: Lsn,
    target_durable: Lsn,
    /// What the filter was told last by this session's feed: to where, and whether of a
    /// complete copy.
    told: Option<(Lsn, bool)>,
    /// Sent epochs that are not acknowledged: end and bytes.
    window: std::collections::VecDeque<(Lsn, u64)>,
    window_bytes: u64,
    epoch_bytes: u64,
    heartbeat_due: u64,
    /// Time of the newest heartbeat, by our clock.
    beat_us: u64,
    /// When HELLO was sent.
    asked_us: u64,
    /// The newest Ack's time by the target's clock, and when it was taken by ours.
    ack_us: Option<(u64, u64)>,
    rtt_us: u64,
    /// Age of the newest recoverable state, told by the target after our heartbeat of this time: so it
    /// is not older than that and what passed since.
    rpo: Option<(u64, u64)>,
    background: Background,
    rest: Rest,
    /// This thread, beside one that the filter holds a processor for.
    guest: Guest,
    /// The processor that the target was last told to leave free.
    told_cpu: Option<u32>,
    stream_turns: u32,
    wire_base: u64,
}

/// Runs one session; only errors end it, or `stop`.
pub(super) fn session(
    shipper: &Shipper,
    channel: &mut Channel,
    journal_lost: Option<Lsn>,
    stop: &AtomicBool,
) -> Result<(), SessionError> {
    let wake = Arc::new(Waker::new().map_err(SessionError::Filter)?);
    let mut control = shipper.source.control().map_err(SessionError::Filter)?;
    let positions = control.wait(None, Duration::ZERO).map_err(SessionError::Filter)?;
    let asked_us = shipper.clock.mono_us();
    let ack = greet(shipper, channel, &positions)?;
    let rtt_us = shipper.clock.mono_us().saturating_sub(asked_us);
    let start = decide(&positions, &ack);
    // Before anything can fail: it may be less than the filter believes.
    let (from, whole) = held(&start, &ack);
    control.ship_floor(from, whole).map_err(SessionError::Filter)?;
    let mut journal = shipper.source.journal()?;
    let start = unless_lost(start, journal.as_mut(), positions.durable, &ack, journal_lost)?;
    let (from, plan) = begin(shipper, channel, control.as_mut(), &positions, start)?;
    // Follows only now: what it knows is not from before a seed began.
    let feed = Feed::start(&shipper.source, &shipper.clock, &wake).map_err(SessionError::Filter)?;
    let known = feed.known().map_err(SessionError::Filter)?;
    let limits = Limits { chunk_bytes: shipper.group.chunk_bytes, ..Limits::default() };
    let is_local = channel.is_local();
    let codec = if is_local { Controller::uncompressed() } else { Controller::default() };
    let journal = Ahead::new(journal, wake.clone()).map_err(|e| SessionError::Journal(e.into()))?;
    let mut session = Session {
        shipper,
        channel,
        feed,
        is_local,
        wake,
        journal,
        unreadable: None,
        builder: Builder::new(limits, from),
        epoch: None,
        seeding: None,
        group_id: group_id(&shipper.group.uuid),
        generation: known.positions.generation,
        codec,
        encoder: Encoder::new().map_err(SessionError::Codec)?,
        shipped: from,
        target_durable: from,
        told: None,
        window: Default::default(),
        window_bytes: 0,
        epoch_bytes: 0,
        heartbeat_due: 0,
        beat_us: 0,
        asked_us,
        ack_us: None,
        rtt_us,
        rpo: None,
        background: Background::default(),
        rest: Rest::default(),
        guest: Guest::default(),
        told_cpu: None,
        stream_turns: 0,
        wire_base: 0,
    };
    shipper.shown.update(|s| session.wire_base = s.wire_bytes);
    if let Some(plan) = plan {
        session.start_copier(plan)?;
    }
    session.show(&known, None);
    session.run(stop)
}

/// `start`, or a copy where the journal has not what that needs.
fn unless_lost(
    start: Start,
    journal: &mut dyn Journal,
    durable: Lsn,
    ack: &HelloAck,
    journal_lost: Option<Lsn>,
) -> Result<Start, SessionError> {
    let (Start::Stream { from } | Start::ResumeSeed { from, .. }) = start else { return Ok(start) };
    match journal.read(from, durable, 4096) {
        Ok(_) => Ok(start),
        Err(ReadError::Gone(_)) => Ok(seed_again(ack, "the journal no longer holds it")),
        Err(ReadError::Damaged(at, _)) if journal_lost == Some(at) => {
            Ok(seed_again(ack, "the journal is damaged"))
        }
        Err(error) => Err(error.into()),
    }
}

fn greet(
    shipper: &Shipper,
    channel: &mut Channel,
    positions: &Positions,
) -> Result<HelloAck, SessionError> {
    let hello = Hello {
        version: WIRE_VERSION,
        group: shipper.group.group.clone(),
        group_uuid: shipper.group.uuid,
        disks: shipper
            .group
            .disks
            .iter()
            .map(|d| DiskInfo { disk: d.disk.clone(), uuid: d.uuid, size_bytes: d.size_bytes })
            .collect(),
        generation: positions.generation,
        incarnation: positions.incarnation,
        history: positions.history.clone(),
        durable: positions.durable,
        ship_floor: positions.ship_floor,
        mode: positions.mode,
    };
    channel.send(&FrameBuf::message(Kind::Hello, &hello)?)?;
    let answer = channel.recv(ANSWER_MAX)?;
    match answer.kind() {
        Kind::HelloAck => Ok(answer.parse()?),
        Kind::Error => Err(SessionError::Told(answer.parse()?)),
        _ => Err(SessionError::OutOfTurn),
    }
}

/// Does what was decided; returns where the stream starts and a copy to run.
fn begin(
    shipper: &Shipper,
    channel: &mut Channel,
    control: &mut dyn Control,
    before: &Positions,
    start: Start,
) -> Result<(Lsn, Option<SeedPlan>), SessionError> {
    let disks: Vec<u64> = shipper.group.disks.iter().map(|d| d.size_bytes).collect();
    match start {
        Start::Fenced { generation } => Err(SessionError::Fenced(generation)),
        Start::Diverged { why } => Err(SessionError::Diverged(why)),
        Start::Stream { from } => Ok((from, None)),
        Start::ResumeSeed { from, seed } => {
            tracing::info!(group = %shipper.group.group, %from, "the seed goes on");
            let cursor = (seed.cursor_disk, seed.cursor);
            Ok((from, Some(SeedPlan { s: seed.s, first: seed.first, cursor, disks })))
        }
        Start::Seed { first, reason } => {
            // Durable at the filter before the target hears of it.
            let s = control.begin_seed().map_err(SessionError::Filter)?;
            let positions = control.wait(None, Duration::ZERO).map_err(SessionError::Filter)?;
            if positions.incarnation != before.incarnation {
                return Err(SessionError::Frozen);
            }
            tracing::info!(group = %shipper.group.group, %s, reason, "a full copy starts");
            let message = SeedBegin {
                s,
                incarnation: positions.incarnation,
                generation: positions.generation,
            };
            channel.send(&FrameBuf::message(Kind::SeedBegin, &message)?)?;
            Ok((s, Some(SeedPlan { s, first, cursor: (0, 0), disks })))
        }
    }
}

impl Session<'_> {
    fn start_copier(&mut self, plan: SeedPlan) -> Result<(), SessionError> {
        let source = self.shipper.source.clone();
        let copier =
            Copier::start(source, plan.clone(), self.wake.clone()).map_err(SessionError::Disks)?;
        let done = plan.done(plan.cursor);
        self.seeding = Some(Seeding {
            plan,
            copier,
            step: None,
            end: None,
            ended: None,
            meter: Meter::default(),
            done,
            sent_bytes: 0,
        });
        Ok(())
    }

    fn run(&mut self, stop: &AtomicBool) -> Result<(), SessionError> {
        let mut expected = self.now();
        while !stop.load(Ordering::SeqCst) {
            let known = self.feed.known().map_err(SessionError::Filter)?;
            if matches!(known.positions.mode, Mode::Frozen | Mode::New | Mode::Unjournaled) {
                return Err(SessionError::Frozen);
            }
            if known.positions.generation != self.generation {
                return Err(SessionError::Fenced(known.positions.generation));
            }
            while let Some(frame) = self.channel.take() {
                self.take(&frame, &known)?;
            }
            let now = self.now();
            let standing = self.standing(&known, now, now.saturating_sub(expected));
            self.stand_back(standing, now);
            let held = self.step_aside(&known);
            self.heartbeat(&known, held, now)?;
            let timeout = match self.rests_until(standing, now) {
                Some(until) => {
                    Duration::from_micros(until.min(self.heartbeat_due).saturating_sub(now))
                }
                None => self.work(&known, now)?,
            };
            // From before the work: who is starved may be so in it.
            expected = now + timeout.as_micros() as u64;
            self.channel.pump(timeout, Some(&self.wake.clone()))?;
        }
        self.channel.send(&FrameBuf::message(Kind::Bye, &())?)?;
        Ok(())
    }

    fn standing(&self, known: &Known, now: u64, late_us: u64) -> Standing {
        let aged = |(rpo, at): (u64, u64)| rpo.saturating_add(now.saturating_sub(at));
        Standing {
            seeding: self.seeding.is_some(),
            behind: known.positions.admitted.0.saturating_sub(self.target_durable.0),
            journal: self.shipper.group.journal_bytes,
            age_us: self.rpo.map(aged),
            late_us,
        }
    }

    /// Has production's work come first, or not.
    fn stand_back(&mut self, standing: Standing, now: u64) {
        if let Some(background) = self.background.change(now, standing) {
            let done = self.shipper.source.set_background(background);
            if let Err(error) = &done {
                tracing::debug!(%error, background, "the copy's priority cannot be changed now");
            }
            self.background.tried(now, background, done.is_ok());
        }
    }

    /// Leaves the processor free that the filter holds, while production's work comes first. Which one the
    /// target is to leave, if it is on this machine.
    fn step_aside(&mut self, known: &Known) -> Option<u32> {
        let held = known.positions.held_cpu.filter(|_| self.background.is());
        let place = Place::leaving_free(held);
        self.guest.go(place);
        self.journal.compute_at(place);
        held.filter(|_| self.is_local)
    }

    /// Until when nothing is read and no frame begun, after `now`.
    fn rests_until(&mut self, standing: Standing, now: u64) -> Option<u64> {
        if standing.behind == 0 || !standing.can_wait(u64::MAX, ROOM) {
            return None;
        }
        if self.rest.is_due(now) {
            self.rest.look(now, self.shipper.source.processors());
        }
        self.rest.until(now, standing)
    }

    /// Reads and sends what may be sent now; how long to wait then.
    fn work(&mut self, known: &Known, now: u64) -> Result<Duration, SessionError> {
        self.read_journal(known, now)?;
        let sent = !self.channel.output_pending() && self.send_one(known, now)?;
        let counters = self.channel.counters();
        self.codec.observe(counters.sent_bytes, counters.blocked_us, now);
        Ok(if sent { Duration::ZERO } else { self.timeout(known, now) })
    }

    fn now(&self) -> u64 {
        self.shipper.clock.mono_us()
    }

    fn timeout(&self, known: &Known, now: u64) -> Duration {
        let at_end = self.is_at_end(known);
        let idle = self.epoch.is_none() && !self.builder.has_ready();
        if idle && !at_end && !self.journal.is_reading() {
            return Duration::ZERO;
        }
        let room = self.window_bytes < WINDOW_BYTES;
        let closes = self.builder.deadline().filter(|_| idle && room && at_end);
        let next = closes.map_or(self.heartbeat_due, |at| at.min(self.heartbeat_due));
        Duration::from_micros(next.saturating_sub(now).clamp(200, HEARTBEAT_US))
    }

    fn take(&mut self, frame: &FrameBuf, known: &Known) -> Result<(), SessionError> {
        match frame.kind() {
            Kind::Ack => {
                let ack: Ack = frame.parse()?;
                self.acknowledged(&ack, known);
                Ok(())
            }
            Kind::Error => {
                let message: ErrorMessage = frame.parse()?;
                Err(SessionError::Told(message))
            }
            Kind::Bye => Err(SessionError::Channel(crate::transport::ChannelError::Closed)),
            _ => Err(SessionError::OutOfTurn),
        }
    }

    fn acknowledged(&mut self, ack: &Ack, known: &Known) {
        let now = self.now();
        if let Some(echo) = ack.echo_us {
            self.rtt_us = now.saturating_sub(echo);
        }
        self.rpo = ack.rpo_us.zip(ack.echo_us);
        self.channel.set_patient(keeps_up(ack.rpo_us));
        self.ack_us = ack.mono_us.map(|theirs| (theirs, now));
        // An Ack from before a SeedBegin that is on its way says an older position.
        if ack.durable > self.target_durable && ack.durable <= self.shipped {
            self.target_durable = ack.durable;
        }
        if self.seeding.as_ref().is_some_and(|s| is_seed_over(s.ended, ack)) {
            self.seeding = None;
            tracing::info!(group = %self.shipper.group.group, "the copy is complete");
        }
        let whole = self.seeding.is_none() && is_whole(ack.durable, ack.seed, ack.consistent);
        let told = (ack.durable, whole);
        if ack.durable == self.target_durable && self.told != Some(told) {
            self.told = Some(told);
            self.feed.set_floor(told.0, told.1);
        }
        while let Some((end, bytes)) = self.window.front().copied()
            && end <= self.target_durable
        {
            self.window.pop_front();
            self.window_bytes -= bytes;
        }
        self.show(known, Some(ack));
    }

    /// If one is due, or that is not what the target was told to leave free.
    fn heartbeat(
        &mut self,
        known: &Known,
        held_cpu: Option<u32>,
        now: u64,
    ) -> Result<(), SessionError> {
        if now < self.heartbeat_due && held_cpu == self.told_cpu {
            return Ok(());
        }
        let beat = Heartbeat {
            admitted: known.positions.admitted,
            age_us: now.saturating_sub(known.at_us),
            mono_us: now,
            echo: self
                .ack_us
                .map(|(mono_us, at)| Echo { mono_us, held_us: now.saturating_sub(at) }),
            held_cpu,
        };
        self.channel.send(&FrameBuf::message(Kind::Heartbeat, &beat)?)?;
        self.heartbeat_due = now + HEARTBEAT_US;
        self.beat_us = now;
        self.told_cpu = held_cpu;
        Ok(())
    }

    fn read_journal(&mut self, known: &Known, now: u64) -> Result<(), SessionError> {
        let durable = known.positions.durable;
        let over = match self.unreadable {
            Some(ReadError::Damaged(..)) => self.holds_nothing(),
            _ => self.epoch.is_none(),
        };
        if let Some(error) = self.unreadable.take_if(|_| over) {
            return Err(error.into());
        }
        for _ in 0..READS {
            let from = self.builder.reached();
            let sends = self.epoch.is_some() && !self.journal.is_reading();
            let later = sends && !Ahead::is_far(from, durable);
            let ended = self.unreadable.is_some() || from >= durable;
            if later || ended || self.builder.has_ready() {
                break;
            }
            match self.journal.read(from, durable) {
                Ok(Some((batches, next))) => self.builder.push(batches, next, now)?,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(group = %self.shipper.group.group, %error, "reading the journal");
                    self.unreadable = Some(error);
                }
            }
        }
        if self.epoch.is_none() && self.window_bytes < WINDOW_BYTES {
            let at_end = self.is_at_end(known);
            if let Some(mut epoch) = self.builder.poll(now, at_end)? {
                epoch.set_writer(known.positions.incarnation, known.positions.generation);
                self.epoch_bytes = 0;
                self.epoch = Some(epoch);
            }
        }
        Ok(())
    }

    /// Whether everything is read that is durable, or that can be. What is before damage is an epoch,
    /// too: only a session that begins at the damage can tell that it must copy again.
    fn is_at_end(&self, known: &Known) -> bool {
        let damaged = matches!(self.unreadable, Some(ReadError::Damaged(..)));
        damaged || self.builder.reached() >= known.positions.durable
    }

    /// Whether everything that was read is durable at the target.
    fn holds_nothing(&self) -> bool {
        let open = self.builder.deadline().is_some() || self.builder.has_ready();
        self.epoch.is_none() && !open && self.window.is_empty()
    }

    /// Sends one frame if there is one: of the stream first, but of the copy
    /// at least every eighth, so that it ends some day.
    fn send_one(&mut self, known: &Known, now: u64) -> Result<bool, SessionError> {
        let copy_turn = self.stream_turns >= COPY_EVERY;
        if (copy_turn || self.epoch.is_none()) && self.send_copy(known, now)? {
            self.stream_turns = 0;
            return Ok(true);
        }
        let sent = self.send_epoch_frame()?;
        self.stream_turns += u32::from(sent);
        Ok(sent)
    }

    fn send_epoch_frame(&mut self) -> Result<bool, SessionError> {
        let Some(epoch) = &mut self.epoch else { return Ok(false) };
        let level = self.codec.level();
        let (encoder, codec, clock) = (&mut self.encoder, &mut self.codec, &self.shipper.clock);
        let mut raw_len = 0;
        let frame = epoch
            .next_frame(self.group_id, level.frame_bytes(), |len, raw| {
                let began = clock.mono_us();
                let packed = encoder.encode(level, raw)?;
                let size = packed.as_ref().map_or(len, Vec::len);
                codec.encoded(level, len, size, clock.mono_us().saturating_sub(began));
                raw_len = len as u64;
                Ok(packed)
            })
            .map_err(SessionError::Codec)?;
        let Some(frame) = frame else {
            self.epoch = None;
            return Ok(false);
        };
        self.channel.send_parts(&frame)?;
        self.epoch_bytes += frame.total_len() as u64;
        self.window_bytes += frame.total_len() as u64;
        if frame.hdr.is_epoch_end() {
            self.shipped = epoch.to;
            self.window.push_back((epoch.to, self.epoch_bytes));
            self.epoch = None;
        }
        self.count(raw_len);
        Ok(true)
    }

    fn send_copy(&mut self, known: &Known, now: u64) -> Result<bool, SessionError> {
        let Some(seeding) = &mut self.seeding else { return Ok(false) };
        if seeding.ended.is_some() {
            return Ok(false);
        }
        let durable = known.positions.durable;
        if let Some(end) = seeding.end {
            // Everything read is durable at the source: `durable` is a batch's end.
            if durable < end {
                return Ok(false);
            }
            self.channel.send(&FrameBuf::message(Kind::SeedEnd, &SeedEnd { e: durable })?)?;
            seeding.ended = Some(self.beat_us);
            self.heartbeat_due = now;
            return Ok(true);
        }
        if seeding.step.is_none() {
            let Some(step) = seeding.copier.next() else { return Ok(false) };
            seeding.step = Some(step.map_err(SessionError::Disks)?);
        }
        let Some(step) = seeding.step.take_if(|step| durable >= step.h) else { return Ok(false) };
        let head = CopyHead {
            group_id: self.group_id,
            generation: self.generation,
            incarnation: known.positions.incarnation,
        };
        let level = self.codec.level();
        let began = self.shipper.clock.mono_us();
        let packed = self.encoder.encode(level, &[&step.payload]).map_err(SessionError::Codec)?;
        let cpu_us = self.shipper.clock.mono_us().saturating_sub(began);
        let size = packed.as_ref().map_or(step.payload.len(), Vec::len);
        let raw_len = step.payload.len() as u64;
        self.codec.encoded(level, step.payload.len(), size, cpu_us);
        let done = seeding.plan.done(step.cursor);
        if step.last {
            seeding.end = Some(step.h);
        }
        self.channel.send_parts(&step.frame(&seeding.plan, &head, packed))?;
        seeding.meter.add(done.saturating_sub(seeding.done), now);
        seeding.done = done;
        seeding.sent_bytes += raw_len;
        self.count(raw_len);
        Ok(true)
    }

    fn count(&self, raw: u64) {
        let wire = self.wire_base + self.channel.counters().sent_bytes;
        self.shipper.shown.update(|s| {
            s.raw_bytes += raw;
            s.wire_bytes = wire;
        });
    }

    fn show(&self, known: &Known, ack: Option<&Ack>) {
        let backlog = known.positions.admitted.0.saturating_sub(self.target_durable.0);
        let seed = self.seeding.as_ref().map(|seeding| SeedProgress {
            done_bytes: seeding.done,
            total_bytes: seeding.plan.total(),
            rate_bytes_per_second: seeding.meter.rate(),
            eta_seconds: seeding.meter.eta_seconds(seeding.plan.total() - seeding.done),
            sent_bytes: seeding.sent_bytes,
        });
        self.shipper.shown.update(|s| {
            s.connected = true;
            s.error = None;
            s.hint = None;
            s.retry_us = None;
            s.shipped = Some(self.shipped);
            s.target_durable = Some(self.target_durable);
            s.backlog_bytes = backlog;
            s.rtt_us = Some(self.rtt_us);
            s.codec = self.codec.level().as_str().to_owned();
            s.seed = seed;
            if let Some(ack) = ack {
                s.consistent = ack.consistent.is_some();
                s.recoverable = ack.consistent;
                s.recoverable_to_us = ack.recoverable_us;
                s.rpo_seconds = ack.rpo_us.map(|us| us as f64 / 1e6);
                // The Ack was made after what it echoes was sent, and no one knows how
                // long it was on its way.
                s.heard_us = ack.echo_us.unwrap_or(self.asked_us);
            }
            let behind = s.rpo_seconds.is_none_or(|rpo| rpo > LAGGING_SECONDS);
            s.state = match () {
                () if self.seeding.is_some() => State::Seeding,
                () if behind && backlog > LAGGING_BYTES => State::Lagging,
                () => State::Streaming,
            };
        });
    }
}

const ANSWER_MAX: Duration = Duration::from_secs(15);
/// Sent and not acknowledged; an epoch that was started is finished.
const WINDOW_BYTES: u64 = 64 << 20;
/// Reads of the journal before the connection is looked after again.
const READS: usize = 4;
const COPY_EVERY: u32 = 8;
const LAGGING_SECONDS: f64 = 5.0;
const LAGGING_BYTES: u64 = 16 << 20;
