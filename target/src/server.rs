//! The target's side of replication: listener, sessions, joining.
//!
//! Owns connections and, per group, which session may write and what its
//! heartbeats prove. One thread a connection. Holds: a peer without certificate
//! may only join, gets 64 KiB to say so, and cannot keep agents out: those that
//! showed no certificate yet are counted apart, and the oldest of too many is cut
//! off for the next; a group's data is taken from its
//! owner only; a HELLO ends the older session under the group's lock before the
//! durable end is read (ruling 13), so two sessions never both append; what is
//! acknowledged is durable. Before it: [`crate::receiver`]. After it:
//! [`crate::store`]. It never dials and never starts anything on its own.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use blockfilter::engine::{Clock, Files};
use blockfilter::names::{Lsn, Name};
use replicator::identity::{Authority, IdentityError, server_tls};
use replicator::session::SeedAt;
use replicator::token::Tokens;
use replicator::transport::{Channel, Waker};
use serde::Serialize;

use crate::receiver::Rpo;
use crate::store::{GroupState, Store};

mod handover;
mod requests;
mod stream;

/// What a server needs.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// `host:port`; port 0 takes a free one.
    pub listen: String,
    /// Folder of authority and server certificate (`T/pki`).
    pub pki: PathBuf,
    /// Folder of tokens (`T/tokens`).
    pub tokens: PathBuf,
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("cannot listen on {0}: {1}")]
    Listen(String, io::Error),
    /// Keys or certificates.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The system failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// State of a group at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// Nothing was copied yet.
    Empty,
    /// The first copy is under way; nothing is recoverable.
    Seeding,
    /// A later copy is under way; old points are recoverable.
    Resyncing,
    /// The newest state is recoverable and the source is connected.
    Consistent,
    /// The newest state that was received is recoverable; the source is away.
    Disconnected,
    /// Source and target hold histories that do not agree.
    Diverged,
}

impl ReplicaState {
    /// As in interface.md §1.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Seeding => "seeding",
            Self::Resyncing => "resyncing",
            Self::Consistent => "consistent",
            Self::Disconnected => "disconnected",
            Self::Diverged => "diverged",
        }
    }
}

/// One group at the target.
#[derive(Clone, Debug, Serialize)]
pub struct ReplicaStatus {
    /// Its name.
    pub group: Name,
    /// Its state.
    pub state: ReplicaState,
    /// Whether a session of its owner is up.
    pub connected: bool,
    /// Who may write it.
    pub owner: String,
    /// Where the session comes from.
    pub peer: Option<String>,
    /// +1 at each change of who may write.
    pub generation: u64,
    /// Of the newest record.
    pub incarnation: u64,
    /// Durable end of the stream.
    pub last: Lsn,
    /// The newest usable point.
    pub recoverable: Option<Lsn>,
    /// The source's clock there, microseconds since 1970.
    pub recoverable_to_us: Option<u64>,
    /// Age of the newest recoverable state; None: not provable.
    pub rpo_seconds: Option<f64>,
    /// What the source last said it had given LSNs to.
    pub admitted: Option<Lsn>,
    /// A copy that is under way.
    pub seed: Option<SeedAt>,
    /// Why nothing is accepted.
    pub error: Option<String>,
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct TargetHandle {
    shared: Arc<Shared>,
    addr: SocketAddr,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

/// What all threads of a server share.
#[derive(Debug)]
struct Shared {
    store: Arc<Store>,
    files: Arc<dyn Files>,
    clock: Arc<dyn Clock>,
    authority: Authority,
    tokens: Tokens,
    tls: Arc<rustls::ServerConfig>,
    groups: Mutex<BTreeMap<Name, Arc<GroupLink>>>,
    stop: AtomicBool,
    wake: Waker,
    /// Connections of peers with a certificate.
    known: AtomicUsize,
    strangers: Mutex<Strangers>,
    next_session: AtomicU64,
}

/// Connections without a certificate, yet or at all.
#[derive(Debug, Default)]
struct Strangers {
    /// By age: those that were not cut off.
    open: BTreeMap<u64, TcpStream>,
    next: u64,
    /// Theirs, and of those that were cut off and are about to end.
    threads: usize,
}

/// One of [`Strangers`], until dropped.
struct Stranger {
    shared: Arc<Shared>,
    id: u64,
}

impl Stranger {
    /// Takes a place, if need be the oldest one's; None if those that were cut off
    /// do not end as fast as new ones come.
    fn enter(shared: &Arc<Shared>, socket: &TcpStream) -> io::Result<Option<Self>> {
        let socket = socket.try_clone()?;
        let mut strangers = lock(&shared.strangers);
        if strangers.threads >= 2 * STRANGERS_MAX {
            return Ok(None);
        }
        if strangers.open.len() >= STRANGERS_MAX
            && let Some((_, oldest)) = strangers.open.pop_first()
        {
            // It may be gone already.
            let _ = oldest.shutdown(Shutdown::Both);
        }
        let id = strangers.next;
        strangers.next += 1;
        strangers.threads += 1;
        strangers.open.insert(id, socket);
        Ok(Some(Self { shared: shared.clone(), id }))
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut strangers = lock(&self.shared.strangers);
        strangers.open.remove(&self.id);
        strangers.threads -= 1;
    }
}

/// A connection of a peer with a certificate, until dropped.
struct Known<'a>(&'a AtomicUsize);

impl<'a> Known<'a> {
    /// None if there are too many.
    fn enter(count: &'a AtomicUsize) -> Option<Self> {
        let this = Self(count);
        (count.fetch_add(1, Ordering::SeqCst) < KNOWN_MAX).then_some(this)
    }
}

impl Drop for Known<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Who writes a group, and what is known of its source. In memory only.
#[derive(Debug, Default)]
struct GroupLink {
    /// Held over every change of the group's store, and over a HELLO. What wakes the session
    /// that may write.
    writer: Mutex<Option<Arc<Waker>>>,
    /// That session, 0: none. Changed only under the lock, and told without waiting for it.
    session: AtomicU64,
    watch: Mutex<Watch>,
}

#[derive(Debug, Default)]
struct Watch {
    rpo: Rpo,
    incarnation: u64,
    admitted: Option<Lsn>,
    session: u64,
    peer: Option<String>,
    diverged: Option<String>,
}

/// Starts the server; it listens when this returns.
pub fn start(
    store: Arc<Store>,
    files: Arc<dyn Files>,
    clock: Arc<dyn Clock>,
    config: &ServerConfig,
) -> Result<TargetHandle, ServerError> {
    let tls = server_tls(files.as_ref(), &config.pki, true)?;
    let authority = Authority::load(files.as_ref(), &config.pki)?;
    let listener =
        bind(&config.listen).map_err(|e| ServerError::Listen(config.listen.clone(), e))?;
    let addr = listener.local_addr()?;
    let shared = Arc::new(Shared {
        store,
        files,
        clock,
        authority,
        tokens: Tokens::new(&config.tokens),
        tls,
        groups: Mutex::default(),
        stop: AtomicBool::new(false),
        wake: Waker::new()?,
        known: AtomicUsize::new(0),
        strangers: Mutex::default(),
        next_session: AtomicU64::new(1),
    });
    let accepting = shared.clone();
    let acceptor = std::thread::Builder::new()
        .name("sf-accept".into())
        .spawn(move || accept_loop(&accepting, &listener))?;
    Ok(TargetHandle { shared, addr, acceptor: Mutex::new(Some(acceptor)) })
}

fn bind(listen: &str) -> io::Result<TcpListener> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no such address");
    for addr in listen.to_socket_addrs()? {
        match TcpListener::bind(addr) {
            Ok(listener) => {
                listener.set_nonblocking(true)?;
                return Ok(listener);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn accept_loop(shared: &Arc<Shared>, listener: &TcpListener) {
    let mut sessions: Vec<JoinHandle<()>> = Vec::new();
    while !shared.stop.load(Ordering::SeqCst) {
        sessions.retain(|session| !session.is_finished());
        match listener.accept() {
            Ok((socket, from)) => match spawn_session(shared, socket) {
                Ok(session) => sessions.extend(session),
                Err(error) => tracing::warn!(%from, %error, "no thread for a connection"),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                shared.wake.wait_readable(listener, Duration::from_millis(1000));
            }
            Err(error) => {
                // Out of descriptors, or a connection that died in the queue.
                tracing::warn!(%error, "accept failed");
                shared.wake.wait(Duration::from_millis(100));
            }
        }
    }
    // Sessions that replicate end within moments; others may only be waiting for
    // a peer to speak, and hold nothing.
    let deadline = shared.clock.mono_us() + STOP_US;
    while sessions.iter().any(|s| !s.is_finished()) && shared.clock.mono_us() < deadline {
        shared.wake.wait(Duration::from_millis(10));
    }
}

fn spawn_session(shared: &Arc<Shared>, socket: TcpStream) -> io::Result<Option<JoinHandle<()>>> {
    let Some(stranger) = Stranger::enter(shared, &socket)? else {
        tracing::warn!("too many connections without a certificate; one was dropped");
        return Ok(None);
    };
    let owned = shared.clone();
    let thread = std::thread::Builder::new()
        .name("sf-session".into())
        .spawn(move || serve(&owned, socket, stranger));
    thread.map(Some)
}

fn serve(shared: &Arc<Shared>, socket: TcpStream, stranger: Stranger) {
    let from = socket.peer_addr().map(|a| a.to_string()).unwrap_or_default();
    let channel = Channel::accept(socket, shared.tls.clone(), shared.clock.clone(), HANDSHAKE_MAX);
    match channel {
        Ok(channel) => requests::serve(shared, channel, &from, stranger),
        Err(error) => tracing::info!(from, %error, "a connection failed in its handshake"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn link(&self, group: &Name) -> Arc<GroupLink> {
        lock(&self.groups).entry(group.clone()).or_default().clone()
    }
}

impl TargetHandle {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// All groups of the store.
    pub fn status(&self) -> Vec<ReplicaStatus> {
        let groups = self.shared.store.groups();
        groups
            .into_iter()
            .map(|(name, store)| {
                let state = store.state();
                let newest = store.newest().map(|p| p.time_us);
                self.shared.group_status(name, &state, newest)
            })
            .collect()
    }

    /// Ends a group's session, so that it can be forgotten: nothing is appended
    /// once this returned, until its source connects again.
    pub fn disconnect(&self, group: &Name) {
        let link = self.shared.link(group);
        let mut writer = lock(&link.writer);
        link.session.store(0, Ordering::SeqCst);
        if let Some(wake) = writer.take() {
            wake.wake();
        }
    }

    /// Ends all sessions and the listener; everything acknowledged is durable.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake.wake();
        for link in lock(&self.shared.groups).values() {
            if let Some(wake) = &*lock(&link.writer) {
                wake.wake();
            }
        }
        if let Some(acceptor) = lock(&self.acceptor).take() {
            let _ = acceptor.join();
        }
    }
}

impl Drop for TargetHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn group_status(
        &self,
        group: Name,
        state: &GroupState,
        newest_us: Option<u64>,
    ) -> ReplicaStatus {
        let link = self.link(&group);
        let mut watch = lock(&link.watch);
        let connected = watch.session != 0;
        let rpo_us = watch.rpo.rpo_us(state.last_consistent, self.clock.mono_us());
        ReplicaStatus {
            group,
            state: replica_state(state, connected, watch.diverged.is_some()),
            connected,
            owner: state.meta.owner.clone(),
            peer: watch.peer.clone(),
            generation: state.generation,
            incarnation: state.incarnation,
            last: state.last,
            recoverable: state.last_consistent,
            recoverable_to_us: newest_us,
            rpo_seconds: rpo_us.map(|us| us as f64 / 1e6),
            admitted: watch.admitted,
            seed: seed_at(state),
            error: state.failed.clone().or_else(|| watch.diverged.clone()),
        }
    }
}

/// Derives a group's state. (pure)
fn replica_state(state: &GroupState, connected: bool, diverged: bool) -> ReplicaState {
    match (&state.seed, state.last_consistent) {
        _ if diverged => ReplicaState::Diverged,
        (Some(_), None) => ReplicaState::Seeding,
        (Some(_), Some(_)) => ReplicaState::Resyncing,
        (None, None) => ReplicaState::Empty,
        (None, Some(_)) if connected => ReplicaState::Consistent,
        (None, Some(_)) => ReplicaState::Disconnected,
    }
}

fn seed_at(state: &GroupState) -> Option<SeedAt> {
    state.seed.map(|seed| SeedAt {
        first: seed.first,
        s: seed.s,
        cursor_disk: seed.cursor.0,
        cursor: seed.cursor.1,
        ended: seed.end.is_some(),
    })
}

/// Most connections of peers with a certificate at a time.
const KNOWN_MAX: usize = 256;
/// Most others.
const STRANGERS_MAX: usize = 64;
/// Longest wait for sessions at a stop.
const STOP_US: u64 = 5_000_000;
/// TLS handshake, and the first message after it.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
