//! An NBD client that survives its server: it reconnects and sends again what
//! was not answered.
//!
//! Owns: the requests in flight. Before it come FUSE ([`crate::fuse`]) and
//! whoever reads a live disk (the seed); behind it is one NBD connection at a
//! time ([`link`]).
//!
//! Holds: a request is sent once on each connection, and again on the next one
//! only if it was not answered; a request is answered once. The server promises
//! that a request of a lost connection does not happen later
//! ([`crate::block`]), which makes sending it again safe; so this client never
//! hangs up on a server that is only slow. Bytes in flight are bounded.
//!
//! Threads: callers send; a reader a connection takes answers and runs the
//! callbacks; a supervisor connects. Callbacks must not block, nor submit.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::listen::Address;
use super::proto::{cmd, cmd_flag};
use super::transmission::Header;
use crate::block::{Errno, Extent, PAYLOAD_MAX, ZeroFlags};
use crate::engine::Clock;

mod link;

use link::{Link, Sink, Stopper};

/// What a client connects to, and its bounds.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The server.
    pub address: Address,
    /// The export's name.
    pub export: String,
    /// How long [`Client::connect`] tries.
    pub connect_timeout: Duration,
    /// A request unanswered for so long, over however many connections, fails
    /// with `Io`; None waits for ever.
    pub request_timeout: Option<Duration>,
    /// Bytes of payloads in flight; a submit beyond it waits.
    pub in_flight_max: u64,
}

impl ClientConfig {
    /// With the usual bounds: 10 s to connect, 120 s a request, 64 MiB in flight.
    pub fn new(address: Address, export: &str) -> Self {
        Self {
            address,
            export: export.to_owned(),
            connect_timeout: Duration::from_secs(10),
            request_timeout: Some(Duration::from_secs(120)),
            in_flight_max: 64 << 20,
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens, or the connection broke.
    #[error("cannot reach the NBD server at {address}: {source}")]
    Io {
        /// The server.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The server does not have the export, or refuses it.
    #[error("the NBD server refuses export {export:?}: {message}")]
    Refused {
        /// The export's name.
        export: String,
        /// In the server's words, or ours.
        message: String,
    },
    /// Not NBD, or an NBD this client does not speak.
    #[error("the NBD server at {address} speaks strangely: {what}")]
    Protocol {
        /// The server.
        address: String,
        /// What was odd.
        what: &'static str,
    },
    /// After a reconnect the export was another one.
    #[error("export {export:?} changed from {was} to {is} bytes")]
    Changed {
        /// The export's name.
        export: String,
        /// Bytes before.
        was: u64,
        /// Bytes now.
        is: u64,
    },
}

/// What the server told of the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteInfo {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags ([`super::proto::flag`]).
    pub flags: u16,
    /// Smallest request in bytes: 1, unless the server insists on more.
    pub block_min: u32,
    /// Preferred request in bytes.
    pub block_preferred: u32,
    /// Reads are answered in chunks.
    pub structured: bool,
    /// Extents can be asked for.
    pub base_allocation: bool,
}

impl RemoteInfo {
    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.flags & super::proto::flag::READ_ONLY != 0
    }
}

/// A request.
#[derive(Clone, Debug)]
pub enum Op {
    /// Answered with [`Answer::Data`].
    Read {
        /// In bytes.
        offset: u64,
        /// In bytes, at most [`PAYLOAD_MAX`].
        len: u32,
    },
    /// Answered with [`Answer::Done`].
    Write {
        /// In bytes.
        offset: u64,
        /// At most [`PAYLOAD_MAX`] bytes.
        data: Arc<[u8]>,
        /// Stable when answered.
        fua: bool,
    },
    /// Answered with [`Answer::Done`].
    Zero {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u32,
        /// How.
        flags: ZeroFlags,
    },
    /// Answered with [`Answer::Done`].
    Trim {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u32,
        /// Stable when answered.
        fua: bool,
    },
    /// Answered with [`Answer::Done`].
    Flush,
    /// Answered with [`Answer::Extents`].
    Extents {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u32,
    },
}

impl Op {
    fn header(&self, cookie: u64) -> Header {
        let fua_flag = |fua: bool| if fua { cmd_flag::FUA } else { 0 };
        let (kind, flags, offset, len) = match self {
            Self::Read { offset, len } => (cmd::READ, 0, *offset, *len),
            Self::Write { offset, data, fua } => {
                (cmd::WRITE, fua_flag(*fua), *offset, data.len() as u32)
            }
            Self::Zero { offset, len, flags } => {
                let hole = if flags.no_hole { cmd_flag::NO_HOLE } else { 0 };
                let fast = if flags.fast { cmd_flag::FAST_ZERO } else { 0 };
                (cmd::WRITE_ZEROES, fua_flag(flags.fua) | hole | fast, *offset, *len)
            }
            Self::Trim { offset, len, fua } => (cmd::TRIM, fua_flag(*fua), *offset, *len),
            Self::Flush => (cmd::FLUSH, 0, 0, 0),
            Self::Extents { offset, len } => (cmd::BLOCK_STATUS, 0, *offset, *len),
        };
        Header { flags, kind, cookie, offset, len }
    }

    /// Bytes it keeps in memory.
    fn weight(&self) -> u64 {
        WEIGHT_MIN
            + match self {
                Self::Read { len, .. } => u64::from(*len),
                Self::Write { data, .. } => data.len() as u64,
                _ => 0,
            }
    }

    fn too_large(&self) -> bool {
        self.weight() > WEIGHT_MIN + u64::from(PAYLOAD_MAX)
    }
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done.
    Done,
    /// The bytes asked for.
    Data(Vec<u8>),
    /// Extents from the offset asked for on: at least one.
    Extents(Vec<Extent>),
}

/// Takes the answer, on the reader's thread; must not block.
pub type Callback = Box<dyn FnOnce(Result<Answer, Errno>) + Send>;

/// A handle; clones share the connection, which ends with the last of them.
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
    _life: Arc<Life>,
}

#[derive(Debug)]
struct Life(Arc<Inner>);

impl Drop for Life {
    fn drop(&mut self) {
        self.0.stop();
    }
}

#[derive(Debug)]
struct Inner {
    config: ClientConfig,
    clock: Arc<dyn Clock>,
    info: RemoteInfo,
    stopping: AtomicBool,
    /// Taken before `state`, and held while a request is registered and sent:
    /// so it is sent once on each connection.
    sink: Mutex<Option<Sink>>,
    state: Mutex<State>,
    /// Ends the connection though `sink` may be held by a send that hangs.
    stopper: Mutex<Option<Stopper>>,
    /// Signalled when bytes in flight get fewer, and on stop.
    room: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By cookie: the order of submission.
    pending: BTreeMap<u64, Pending>,
    next: u64,
    in_flight: u64,
}

struct Pending {
    op: Op,
    /// None: it failed by timeout, and only its late answer is awaited.
    done: Option<Callback>,
    /// Microseconds.
    deadline: u64,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects, trying again until `connect_timeout` while nobody listens.
    pub fn connect(config: ClientConfig, clock: Arc<dyn Clock>) -> Result<Self, ClientError> {
        let end = clock.mono_us() + micros(config.connect_timeout);
        let mut wait = BACKOFF_MIN;
        let link = loop {
            match Link::open(&config.address, &config.export) {
                Ok(link) => break link,
                Err(error @ ClientError::Io { .. }) if clock.mono_us() + micros(wait) < end => {
                    tracing::debug!(%error, "trying again");
                    std::thread::sleep(wait);
                    wait = (wait * 2).min(BACKOFF_MAX);
                }
                Err(error) => return Err(error),
            }
        };
        let inner = Arc::new(Inner {
            config,
            clock,
            info: link.info,
            stopping: AtomicBool::new(false),
            sink: Mutex::default(),
            state: Mutex::default(),
            stopper: Mutex::default(),
            room: Condvar::new(),
        });
        let supervisor = Arc::clone(&inner);
        std::thread::Builder::new()
            .name("nbd-client".to_owned())
            .spawn(move || supervisor.supervise(link))
            .map_err(|source| inner.io_error(source))?;
        let life = Arc::new(Life(Arc::clone(&inner)));
        Ok(Self { inner, _life: life })
    }

    /// What the server told of the export; the same on every connection.
    pub fn info(&self) -> RemoteInfo {
        self.inner.info
    }

    /// Sends a request; `done` is called exactly once. Waits while too much is
    /// in flight or the socket is full; not to be called from a callback.
    pub fn submit(&self, op: Op, done: Callback) {
        let inner = &self.inner;
        if op.too_large() {
            return done(Err(Errno::Inval));
        }
        let timeout = inner.config.request_timeout.map_or(u64::MAX, micros);
        let deadline = inner.clock.mono_us().saturating_add(timeout);
        let weight = op.weight();
        if !inner.wait_for_room(weight, deadline) {
            let stopping = inner.stopping.load(Ordering::SeqCst);
            return done(Err(if stopping { Errno::Shutdown } else { Errno::Io }));
        }
        let mut sink = inner.sink();
        let cookie = {
            let mut state = inner.state();
            let cookie = state.next;
            state.next += 1;
            let pending = Pending { op: op.clone(), done: Some(done), deadline };
            state.pending.insert(cookie, pending);
            cookie
        };
        if let Some(sink) = sink.as_mut() {
            // A failed send ends the connection; the next one sends it again.
            sink.send(cookie, &op);
        }
        drop(sink);
        if inner.stopping.load(Ordering::SeqCst) {
            inner.fail_all();
        }
    }

    /// Sends a request and waits for its answer.
    pub fn call(&self, op: Op) -> Result<Answer, Errno> {
        let (sender, receiver) = sync_channel(1);
        self.submit(op, Box::new(move |result| drop(sender.send(result))));
        receiver.recv().unwrap_or(Err(Errno::Shutdown))
    }

    /// Fills `buf` from `offset`.
    pub fn read(&self, mut offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        for part in buf.chunks_mut(PART) {
            let len = part.len() as u32;
            match self.call(Op::Read { offset, len })? {
                Answer::Data(data) if data.len() == part.len() => part.copy_from_slice(&data),
                _ => return Err(Errno::Io),
            }
            offset += u64::from(len);
        }
        Ok(())
    }

    /// Writes `data` at `offset`.
    pub fn write(&self, mut offset: u64, data: &[u8], fua: bool) -> Result<(), Errno> {
        for part in data.chunks(PART) {
            self.call(Op::Write { offset, data: part.into(), fua })?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Makes a range zero.
    pub fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno> {
        for_pieces(offset, len, |offset, len| self.call(Op::Zero { offset, len, flags }))
    }

    /// Makes a range a hole.
    pub fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        for_pieces(offset, len, |offset, len| self.call(Op::Trim { offset, len, fua }))
    }

    /// Makes stable what was answered.
    pub fn flush(&self) -> Result<(), Errno> {
        self.call(Op::Flush).map(|_| ())
    }

    /// Extents from `offset` on: at least one, not necessarily all of `len`;
    /// all data where the server cannot tell.
    pub fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        if !self.inner.info.base_allocation {
            return Ok(vec![Extent { len, hole: false, zero: false }]);
        }
        let len = len.min(PIECE) as u32;
        match self.call(Op::Extents { offset, len })? {
            Answer::Extents(extents) => Ok(extents),
            _ => Err(Errno::Io),
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sink(&self) -> MutexGuard<'_, Option<Sink>> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopper(&self) -> MutexGuard<'_, Option<Stopper>> {
        self.stopper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io_error(&self, source: std::io::Error) -> ClientError {
        ClientError::Io { address: self.config.address.to_string(), source }
    }

    /// Reserves `weight` of what may be in flight; false after `deadline` or on stop.
    fn wait_for_room(&self, weight: u64, deadline: u64) -> bool {
        let mut state = self.state();
        loop {
            if self.stopping.load(Ordering::SeqCst) || self.clock.mono_us() >= deadline {
                return false;
            }
            if state.in_flight == 0 || state.in_flight + weight <= self.config.in_flight_max {
                state.in_flight += weight;
                return true;
            }
            let waited = self.room.wait_timeout(state, TICK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs connections, one after the other, until the client is dropped.
    fn supervise(self: &Arc<Self>, first: Link) {
        let mut next = Some(first);
        let mut wait = BACKOFF_MIN;
        while let Some(link) = next {
            let start = self.clock.mono_us();
            if let Err(error) = self.run_link(link) {
                tracing::warn!(%error, "an NBD connection could not be used");
            }
            if self.clock.mono_us() - start > micros(BACKOFF_MAX) {
                wait = BACKOFF_MIN;
            } else {
                self.pause(&mut wait);
            }
            next = self.reconnect();
        }
        self.fail_all();
    }

    /// Waits, and doubles the next wait. Ends early on stop.
    fn pause(&self, wait: &mut Duration) {
        let state = self.state();
        if !self.stopping.load(Ordering::SeqCst) {
            // Other wake-ups only make it try sooner.
            drop(self.room.wait_timeout(state, *wait));
        }
        *wait = (*wait * 2).min(BACKOFF_MAX);
    }

    /// Uses a connection until it breaks.
    fn run_link(self: &Arc<Self>, link: Link) -> std::io::Result<()> {
        let (mut sink, mut source) = link.split()?;
        *self.stopper() = Some(sink.stopper()?);
        if self.stopping.load(Ordering::SeqCst) {
            return Ok(());
        }
        let stopper = sink.stopper()?;
        let mut installed = self.sink();
        // Answers must be taken while requests are sent again, or both ends wait.
        let inner = Arc::clone(self);
        let reader =
            std::thread::Builder::new().name("nbd-answers".to_owned()).spawn(move || {
                let why = source.run(&inner);
                tracing::debug!(%why, "NBD connection lost");
                // Ends a send that hangs on a connection that nobody reads.
                stopper.shutdown();
            })?;
        let again = self.unanswered();
        if !again.is_empty() {
            tracing::info!(requests = again.len(), "NBD connection is back; sending again");
        }
        for (cookie, op) in again {
            if !sink.send(cookie, &op) {
                break;
            }
        }
        *installed = Some(sink);
        drop(installed);
        let _ = reader.join();
        *self.sink() = None;
        Ok(())
    }

    /// What is to be sent on a new connection, in order; what failed by timeout is dropped.
    fn unanswered(&self) -> Vec<(u64, Op)> {
        let mut state = self.state();
        let late = state.pending.iter().filter(|(_, p)| p.done.is_none());
        let late: Vec<u64> = late.map(|(cookie, _)| *cookie).collect();
        for cookie in late {
            state.remove(cookie);
        }
        self.room.notify_all();
        state.pending.iter().map(|(cookie, p)| (*cookie, p.op.clone())).collect()
    }

    /// A new connection to the same export; None on stop.
    fn reconnect(&self) -> Option<Link> {
        let mut wait = BACKOFF_MIN;
        loop {
            if self.stopping.load(Ordering::SeqCst) {
                return None;
            }
            let opened = Link::open(&self.config.address, &self.config.export);
            match opened.and_then(|link| self.same_export(link)) {
                Ok(link) => return Some(link),
                Err(error) => tracing::debug!(%error, "not yet connected again"),
            }
            self.expire();
            self.pause(&mut wait);
        }
    }

    fn same_export(&self, link: Link) -> Result<Link, ClientError> {
        let (was, is) = (self.info.size, link.info.size);
        let same = was == is
            && self.info.read_only() == link.info.read_only()
            && self.info.base_allocation == link.info.base_allocation;
        if same {
            return Ok(link);
        }
        Err(ClientError::Changed { export: self.config.export.clone(), was, is })
    }

    /// Fails what waited too long.
    fn expire(&self) {
        let now = self.clock.mono_us();
        let mut late = Vec::new();
        for pending in self.state().pending.values_mut() {
            if pending.deadline <= now {
                late.extend(pending.done.take());
            }
        }
        for done in late {
            done(Err(Errno::Io));
        }
    }

    /// The request of a cookie, if it is in flight.
    fn find(&self, cookie: u64) -> Option<Op> {
        self.state().pending.get(&cookie).map(|p| p.op.clone())
    }

    /// Answers a request.
    fn complete(&self, cookie: u64, result: Result<Answer, Errno>) {
        let pending = self.state().remove(cookie);
        self.room.notify_all();
        if let Some(done) = pending.and_then(|p| p.done) {
            done(result);
        }
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Whoever holds the sink is sending: then there is no time for good-byes.
        if let Ok(mut sink) = self.sink.try_lock()
            && let Some(sink) = sink.as_mut()
        {
            sink.goodbye();
        }
        if let Some(stopper) = self.stopper().as_ref() {
            stopper.shutdown();
        }
        // Taken so that nobody is between looking at `stopping` and waiting.
        drop(self.state());
        self.room.notify_all();
    }

    fn fail_all(&self) {
        let all = std::mem::take(&mut self.state().pending);
        for done in all.into_values().filter_map(|p| p.done) {
            done(Err(Errno::Shutdown));
        }
    }
}

impl State {
    fn remove(&mut self, cookie: u64) -> Option<Pending> {
        let pending = self.pending.remove(&cookie)?;
        self.in_flight -= pending.op.weight();
        Some(pending)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn for_pieces(
    mut offset: u64,
    mut len: u64,
    mut act: impl FnMut(u64, u32) -> Result<Answer, Errno>,
) -> Result<(), Errno> {
    while len > 0 {
        let now = len.min(PIECE);
        act(offset, now as u32)?;
        (offset, len) = (offset + now, len - now);
    }
    Ok(())
}

/// What a request without payload weighs, in bytes.
const WEIGHT_MIN: u64 = 512;
/// Longest read or write sent as one, in bytes.
const PART: usize = 8 << 20;
/// Longest request without payload, in bytes.
const PIECE: u64 = 1 << 30;
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(500);

const _: () = assert!(PART <= PAYLOAD_MAX as usize && PIECE <= u32::MAX as u64);
