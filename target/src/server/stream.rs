//! One replication session at the target: frames to the store, acknowledgements back.
//!
//! Two threads: the session's own ([`Line`]) receives, decrypts and checks frames and sends
//! acknowledgements; the other ([`Keeper`]) carries frames out, in order, at most
//! an epoch behind ([`handover`]): the next one is received while a disk writes or syncs the last one, and a
//! slow one does not make the target look dead.
//!
//! Holds: every change of the store happens under the group's lock by the session
//! that holds the group; an Ack says only what is durable; copies are made
//! durable at least every 64 MiB or second.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use blockfilter::engine::cpu::{Guest, Offer, Place};
use crossbeam::channel::RecvTimeoutError;
use replicator::frame::{FrameBuf, FrameError};
use replicator::session::{
    Ack, ErrorCode, ErrorMessage, Heartbeat, Hello, HelloAck, SeedBegin, SeedEnd, Want, group_id,
    keeps_up,
};
use replicator::transport::{Channel, ChannelError, Waker};
use replicator::wire::Kind;

use super::handover::{Giver, Taker, handover};
use super::requests::{error, refuse};
use super::{GroupLink, Shared, lock, seed_at};
use crate::receiver::{Begin, ReceiveError, Receiver};
use crate::store::{AppendError, GroupState, GroupStore};

/// Why a session ends.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error(transparent)]
    Append(#[from] AppendError),
    #[error("a newer session took over")]
    Replaced,
    #[error("the peer said goodbye")]
    Bye,
}

/// What both threads of a session use.
struct Session<'a> {
    shared: &'a Shared,
    store: &'a GroupStore,
    link: Arc<GroupLink>,
    id: u64,
    wake: &'a Waker,
    /// Something changed that the source should know.
    ack_due: AtomicBool,
    /// The source's clock in its last heartbeat; 0: none came.
    echo_us: AtomicU64,
    /// Where both compute: off the processor that a source on this machine holds for its clients.
    place: Offer,
    /// The source is on this machine.
    local: bool,
    /// The keeper ended.
    ended: AtomicBool,
}

/// Of the keeper, until it ends.
struct Runs<'a>(&'a Session<'a>);

impl Drop for Runs<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::SeqCst);
        self.0.wake.wake();
    }
}

/// The thread that owns the connection.
struct Line<'a> {
    session: &'a Session<'a>,
    acked_us: u64,
    /// The keeper had no place for it yet.
    held: Option<FrameBuf>,
}

/// The thread that changes the store.
struct Keeper<'a> {
    session: &'a Session<'a>,
    receiver: Receiver,
    unsynced: u64,
    synced_us: u64,
}

/// Runs a session from HELLO to its end.
pub(super) fn run(
    shared: &Arc<Shared>,
    channel: &mut Channel,
    store: &Arc<GroupStore>,
    hello: &Hello,
    from: &str,
) -> Result<(), ChannelError> {
    let link = shared.link(&hello.group);
    let id = shared.next_session.fetch_add(1, Ordering::SeqCst);
    let wake = Arc::new(Waker::new()?);
    let state = match take_over(&link, store, hello, id, &wake) {
        Ok(state) => state,
        Err(why) => return refuse(channel, why),
    };
    if hello.generation >= state.generation {
        let mut watch = lock(&link.watch);
        watch.session = id;
        watch.peer = Some(from.to_owned());
        watch.diverged = None;
        if watch.incarnation != hello.incarnation {
            watch.incarnation = hello.incarnation;
            watch.rpo.source_restarted();
        }
    }
    let result = session(shared, channel, store, &link, hello, &state, id, &wake);
    let mut watch = lock(&link.watch);
    if watch.session == id {
        watch.session = 0;
        watch.peer = None;
    }
    drop(watch);
    tracing::info!(group = %hello.group, from, "session ended");
    result
}

/// Makes this the group's session: the older one can append nothing more when
/// the state is read (ruling 13).
fn take_over(
    link: &GroupLink,
    store: &GroupStore,
    hello: &Hello,
    id: u64,
    wake: &Arc<Waker>,
) -> Result<GroupState, ErrorMessage> {
    let mut writer = lock(&link.writer);
    let state = store.state();
    if let Some(why) = &state.failed {
        let hint = "look at the target's disk, then restart the target";
        return Err(error(
            ErrorCode::Storage,
            format!("the group's store failed: {why}"),
            Some(hint),
        ));
    }
    if hello.generation < state.generation {
        // Answered with HelloAck; the older session of the right generation stays.
        return Ok(state);
    }
    link.session.store(id, Ordering::SeqCst);
    if let Some(older) = writer.replace(wake.clone()) {
        older.wake();
    }
    if hello.generation > state.generation {
        store.raise_generation(hello.generation).map_err(|e| {
            error(ErrorCode::Storage, format!("the generation could not be stored: {e}"), None)
        })?;
        return Ok(store.state());
    }
    Ok(state)
}

#[expect(clippy::too_many_arguments, reason = "called once; they are the session's parts")]
fn session(
    shared: &Shared,
    channel: &mut Channel,
    store: &GroupStore,
    link: &Arc<GroupLink>,
    hello: &Hello,
    state: &GroupState,
    id: u64,
    wake: &Waker,
) -> Result<(), ChannelError> {
    let ack = hello_ack(state, hello);
    channel.send(&FrameBuf::message(Kind::HelloAck, &ack)?)?;
    if ack.want == Want::Fenced {
        return channel.flush(Duration::from_secs(1));
    }
    let receiver = Receiver::new(Begin {
        group_id: group_id(&hello.group_uuid),
        generation: hello.generation,
        incarnation: state.incarnation,
        last: state.last,
        disks: state.meta.disks.iter().map(|d| d.size_bytes).collect(),
        seed: state.seed.map(|s| s.s),
    });
    let session = Session {
        shared,
        store,
        link: link.clone(),
        id,
        wake,
        ack_due: true.into(),
        echo_us: 0.into(),
        place: Offer::default(),
        local: channel.is_local(),
        ended: false.into(),
    };
    let ended = session.run(channel, receiver);
    session.leave();
    match ended {
        Err(StreamError::Channel(error)) => Err(error),
        Err(StreamError::Bye) | Ok(()) => Ok(()),
        Err(why) => refuse(channel, told(&why)),
    }
}

fn hello_ack(state: &GroupState, hello: &Hello) -> HelloAck {
    let seed = seed_at(state);
    let want = match (&seed, state.last_consistent) {
        _ if hello.generation < state.generation => Want::Fenced,
        (Some(seed), _) if !seed.ended => Want::ResumeSeed,
        (None, None) => Want::Seed,
        _ => Want::Stream,
    };
    HelloAck {
        want,
        generation: state.generation,
        incarnation: state.incarnation,
        last: state.last,
        consistent: state.last_consistent,
        seed,
    }
}

/// What the source is told about an end.
fn told(why: &StreamError) -> ErrorMessage {
    let (code, hint) = match why {
        StreamError::Replaced => (ErrorCode::Busy, Some("another session of this group runs")),
        StreamError::Append(AppendError::Generation { .. }) => (ErrorCode::Fenced, None),
        StreamError::Append(AppendError::Full) => {
            (ErrorCode::Storage, Some("make space at the target; the source goes on by itself"))
        }
        StreamError::Append(AppendError::Failed(_)) => {
            (ErrorCode::Storage, Some("look at the target's disk, then restart the target"))
        }
        _ => (ErrorCode::Protocol, None),
    };
    error(code, why.to_string(), hint)
}

impl Session<'_> {
    fn run(&self, channel: &mut Channel, receiver: Receiver) -> Result<(), StreamError> {
        let (to_keeper, frames) = handover(|| self.wake.wake());
        let synced_us = self.shared.clock.mono_us();
        std::thread::scope(|scope| {
            let keeper = std::thread::Builder::new().name("sf-keeper".into());
            let keeper = keeper.spawn_scoped(scope, move || {
                let _runs = Runs(self);
                Keeper { session: self, receiver, unsynced: 0, synced_us }.run(&frames)
            });
            let keeper = keeper.map_err(ChannelError::Io)?;
            let mut line = Line { session: self, acked_us: 0, held: None };
            let carried = line.run(channel, to_keeper);
            let kept = keeper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            kept.and(carried)
        })
    }

    /// The right to change the store, while this is the group's session.
    fn writer(&self) -> Result<MutexGuard<'_, impl Sized>, StreamError> {
        let writer = lock(&self.link.writer);
        self.check_replaced()?;
        Ok(writer)
    }

    fn check_replaced(&self) -> Result<(), StreamError> {
        match self.link.session.load(Ordering::SeqCst) == self.id {
            true => Ok(()),
            false => Err(StreamError::Replaced),
        }
    }

    /// Takes the processor that a heartbeat tells of. As it arrives: it may wait long for the keeper.
    fn leave_free(&self, frame: &FrameBuf) -> Result<(), StreamError> {
        if self.local && frame.kind() == Kind::Heartbeat {
            let beat: Heartbeat = frame.parse()?;
            self.place.set(Place::leaving_free(beat.held_cpu));
        }
        Ok(())
    }

    fn ack_is_due(&self) {
        self.ack_due.store(true, Ordering::SeqCst);
        self.wake.wake();
    }

    fn ack(&self) -> Ack {
        // First: who sees its heartbeat echoed takes the state for newer.
        let echo_us = self.echo_us.load(Ordering::SeqCst);
        let state = self.store.state();
        let now = self.shared.clock.mono_us();
        let rpo_us = lock(&self.link.watch).rpo.rpo_us(state.last_consistent, now);
        Ack {
            durable: state.last,
            incarnation: state.incarnation,
            seed: seed_at(&state),
            consistent: state.last_consistent,
            rpo_us,
            echo_us: (echo_us > 0).then_some(echo_us),
            mono_us: Some(now),
            recoverable_us: self.store.newest().map(|p| p.time_us),
        }
    }

    fn leave(&self) {
        let mut writer = lock(&self.link.writer);
        if self.check_replaced().is_ok() {
            self.link.session.store(0, Ordering::SeqCst);
            *writer = None;
        }
    }
}

impl Line<'_> {
    /// Until the connection or the keeper ends, another session takes over, or the target stops.
    fn run(&mut self, channel: &mut Channel, to_keeper: Giver) -> Result<(), StreamError> {
        let carried = self.carry(channel, &to_keeper);
        // What came before a line broke is carried out, however long a disk hangs: the source may
        // be gone for good. If we stop, it sends again what was not acknowledged.
        while carried.is_err()
            && let Some(frame) = self.held.take().or_else(|| channel.take())
        {
            if !to_keeper.give_anyway(frame) {
                break;
            }
        }
        carried
    }

    fn carry(&mut self, channel: &mut Channel, to_keeper: &Giver) -> Result<(), StreamError> {
        let session = self.session;
        let over =
            || session.ended.load(Ordering::SeqCst) || session.shared.stop.load(Ordering::SeqCst);
        let mut guest = Guest::default();
        while !over() {
            guest.go(session.place.get());
            session.check_replaced()?;
            self.answer(channel)?;
            let Some(frame) = self.held.take().or_else(|| channel.take()) else {
                channel.pump(PUMP, Some(session.wake))?;
                continue;
            };
            session.leave_free(&frame)?;
            self.held = to_keeper.give(frame);
            if self.held.is_some() {
                session.wake.wait(PUMP);
                // What an answer before left to be sent.
                match channel.pump(Duration::ZERO, None) {
                    Ok(()) | Err(ChannelError::Closed) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Acknowledges what changed. Also when nothing did: over a slow line heartbeats wait behind
    /// data, and the source must not take us for dead.
    fn answer(&mut self, channel: &mut Channel) -> Result<(), StreamError> {
        let session = self.session;
        let now = session.shared.clock.mono_us();
        let quiet = now.saturating_sub(self.acked_us) >= QUIET_US;
        let due = session.ack_due.load(Ordering::SeqCst) || quiet;
        if due && !channel.output_pending() {
            session.ack_due.store(false, Ordering::SeqCst);
            let ack = session.ack();
            channel.set_patient(keeps_up(ack.rpo_us));
            channel.send(&FrameBuf::message(Kind::Ack, &ack)?)?;
            self.acked_us = now;
        }
        Ok(())
    }
}

impl Keeper<'_> {
    /// Until the line ends; what it handed over is carried out first. Not if the target stops: the
    /// source sends it again.
    fn run(&mut self, frames: &Taker<impl Fn()>) -> Result<(), StreamError> {
        let mut guest = Guest::default();
        while !self.session.shared.stop.load(Ordering::SeqCst) {
            guest.go(self.session.place.get());
            match frames.take(PUMP) {
                Ok(frame) => self.take(frame)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.sync_copies(),
            }
            self.sync_copies_if_due()?;
        }
        self.sync_copies()
    }

    fn take(&mut self, frame: FrameBuf) -> Result<(), StreamError> {
        match frame.kind() {
            Kind::Epoch => {
                if let Some(epoch) = self.receiver.epoch_frame(frame)? {
                    let writer = self.session.writer()?;
                    self.session.store.append_epoch(&epoch)?;
                    drop(writer);
                    self.session.ack_is_due();
                }
            }
            Kind::Copy => {
                self.receiver.copy_frame(&frame)?;
                let writer = self.session.writer()?;
                self.session.store.append_copy(&frame)?;
                drop(writer);
                self.unsynced += frame.bytes.len() as u64;
                if self.unsynced >= COPY_SYNC_BYTES {
                    self.sync_copies()?;
                }
            }
            Kind::Heartbeat => self.heartbeat(&frame.parse()?)?,
            Kind::SeedBegin => self.seed_begin(&frame.parse()?)?,
            Kind::SeedEnd => {
                let end: SeedEnd = frame.parse()?;
                let writer = self.session.writer()?;
                self.session.store.end_seed(end.e)?;
                drop(writer);
                self.unsynced = 0;
                self.session.ack_is_due();
            }
            Kind::Error => {
                let message: ErrorMessage = frame.parse()?;
                tracing::warn!(code = ?message.code, message = %message.message, "the source gave up");
                if message.code == ErrorCode::Diverged {
                    let mut watch = lock(&self.session.link.watch);
                    self.session.check_replaced()?;
                    watch.diverged = Some(message.message);
                }
                return Err(StreamError::Bye);
            }
            Kind::Bye => return Err(StreamError::Bye),
            _ => return Err(ReceiveError::Bad("kind of message").into()),
        }
        Ok(())
    }

    fn seed_begin(&mut self, begin: &SeedBegin) -> Result<(), StreamError> {
        let writer = self.session.writer()?;
        self.session.store.begin_seed(begin.s, begin.incarnation, begin.generation)?;
        drop(writer);
        self.receiver.seed_begun(begin.s, begin.incarnation);
        self.unsynced = 0;
        self.session.ack_is_due();
        Ok(())
    }

    fn heartbeat(&mut self, beat: &Heartbeat) -> Result<(), StreamError> {
        let mut watch = lock(&self.session.link.watch);
        self.session.check_replaced()?;
        watch.rpo.beat(beat, self.session.shared.clock.mono_us());
        watch.admitted = Some(beat.admitted);
        self.session.echo_us.store(beat.mono_us, Ordering::SeqCst);
        self.session.ack_is_due();
        Ok(())
    }

    fn sync_copies_if_due(&mut self) -> Result<(), StreamError> {
        let now = self.session.shared.clock.mono_us();
        if self.unsynced > 0 && now.saturating_sub(self.synced_us) >= COPY_SYNC_US {
            self.sync_copies()?;
        }
        Ok(())
    }

    fn sync_copies(&mut self) -> Result<(), StreamError> {
        if self.unsynced > 0 {
            let writer = self.session.writer()?;
            self.session.store.sync_copy()?;
            drop(writer);
            self.unsynced = 0;
            self.session.ack_is_due();
        }
        self.synced_us = self.session.shared.clock.mono_us();
        Ok(())
    }
}

const PUMP: Duration = Duration::from_millis(200);
const COPY_SYNC_BYTES: u64 = 64 << 20;
const QUIET_US: u64 = 2_000_000;
const COPY_SYNC_US: u64 = 1_000_000;
