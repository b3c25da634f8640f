//! A blocking NBD server: a thread a connection, over [`Export`].
//!
//! Owns: the listening sockets, the table of connections and their limits.
//! Before it come [`super::listen`] (sockets) and the pure
//! [`super::handshake`] and [`super::transmission`]; [`connection`] moves one
//! connection's bytes; behind it is whatever implements [`Exports`].
//!
//! Bounded: connections, connections still in handshake, the time of a
//! handshake, a stalled payload or reply, bytes of large payloads in memory.
//! Never: answers a write before `Export::write` returned, or runs a request
//! whose payload did not arrive in full.

use std::collections::HashMap;
use std::fmt::Debug;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustls::pki_types::CertificateDer;

use super::handshake::OpenError;
use super::listen::{Accepted, Address, Listener};
use crate::block::Export;
use crate::engine::Clock;

mod connection;

/// Who is asking.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where from: None for a Unix socket.
    pub address: Option<SocketAddr>,
    /// The certificate chain it proved to hold, its own first; empty without
    /// TLS or without client certificates.
    pub certificates: Vec<CertificateDer<'static>>,
}

/// What a server serves. Called from any connection's thread.
pub trait Exports: Send + Sync + Debug {
    /// The exports that this peer may see.
    fn list(&self, peer: &Peer) -> Vec<String>;
    /// Opens an export; an empty name was already replaced if there is only one.
    fn open(&self, name: &str, peer: &Peer) -> Result<Arc<dyn Export>, OpenError>;
}

/// A fixed list of exports, the same for everybody.
#[derive(Debug)]
pub struct FixedExports(pub Vec<(String, Arc<dyn Export>)>);

impl Exports for FixedExports {
    fn list(&self, _peer: &Peer) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    fn open(&self, name: &str, _peer: &Peer) -> Result<Arc<dyn Export>, OpenError> {
        let found = self.0.iter().find(|(n, _)| n == name);
        let unknown = || OpenError::Unknown(name.to_owned());
        found.map(|(_, export)| Arc::clone(export)).ok_or_else(unknown)
    }
}

/// Limits and TLS of a server.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Offered on TCP, if given.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Nothing is told on TCP before TLS.
    pub tls_required: bool,
    /// More connections are closed at once.
    pub connections_max: usize,
    /// The same for those still in handshake.
    pub half_open_max: usize,
    /// A whole handshake, TLS included.
    pub handshake_timeout: Duration,
    /// A request or an answer that does not move for so long closes.
    pub stall_timeout: Duration,
    /// Bytes of payloads above 256 KiB that may be in memory, all connections together.
    pub large_bytes_max: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            tls: None,
            tls_required: false,
            connections_max: 256,
            half_open_max: 64,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            large_bytes_max: 256 << 20,
        }
    }
}

/// A running server; stops on drop.
#[derive(Debug)]
pub struct ServerHandle {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    addresses: Vec<Address>,
}

impl ServerHandle {
    /// Serves on `listeners` from a thread of its own.
    pub fn start(
        listeners: Vec<Listener>,
        config: ServerConfig,
        exports: Arc<dyn Exports>,
        clock: Arc<dyn Clock>,
    ) -> io::Result<Self> {
        let mut addresses = Vec::new();
        for listener in &listeners {
            listener.set_nonblocking()?;
            addresses.push(listener.address()?);
        }
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared {
            config,
            exports,
            clock,
            wake,
            stopping: AtomicBool::new(false),
            table: Mutex::default(),
            changed: Condvar::new(),
            large: Mutex::new(0),
            large_freed: Condvar::new(),
        });
        let for_thread = Arc::clone(&shared);
        let acceptor = std::thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn(move || for_thread.accept_loop(&listeners))?;
        Ok(Self { shared, acceptor: Some(acceptor), addresses })
    }

    /// Where it listens, in the order given, ports resolved.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Connections now open.
    pub fn connections(&self) -> usize {
        self.shared.table().entries.len()
    }

    /// Stops listening, lets requests that are being run be answered, closes
    /// all connections. Waits at most 15 s for an export that does not return.
    pub fn stop(&mut self) {
        let Some(acceptor) = self.acceptor.take() else { return };
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_le_bytes());
        let _ = acceptor.join();
        self.shared.large_freed.notify_all();
        for (how, wait) in [(Shutdown::Read, 10), (Shutdown::Both, 5)] {
            let mut table = self.shared.table();
            table.entries.values().for_each(|entry| entry.socket.shutdown(how));
            let end = self.shared.clock.mono_us() + wait * 1_000_000;
            while !table.entries.is_empty() && self.shared.clock.mono_us() < end {
                let tick = Duration::from_millis(100);
                let waited = self.shared.changed.wait_timeout(table, tick);
                table = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            if table.entries.is_empty() {
                break;
            }
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

#[derive(Debug)]
struct Shared {
    config: ServerConfig,
    exports: Arc<dyn Exports>,
    clock: Arc<dyn Clock>,
    wake: OwnedFd,
    stopping: AtomicBool,
    table: Mutex<Table>,
    changed: Condvar,
    /// Bytes of large payloads in memory.
    large: Mutex<u64>,
    large_freed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<u64, Entry>,
    next: u64,
}

#[derive(Debug)]
struct Entry {
    socket: Socket,
    /// Microseconds at which its handshake must be over; None once it is.
    handshake_end: Option<u64>,
}

/// A second descriptor of a connection's socket, to shut it down from outside.
#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn of(accepted: &Accepted) -> io::Result<Self> {
        match accepted {
            Accepted::Unix(stream) => stream.try_clone().map(Self::Unix),
            Accepted::Tcp(stream, _) => stream.try_clone().map(Self::Tcp),
        }
    }

    fn shutdown(&self, how: Shutdown) {
        // Fails only when the peer is gone already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn accept_loop(self: &Arc<Self>, listeners: &[Listener]) {
        let tick = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
        let mut pause = false;
        while !self.is_stopping() {
            let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
            if !pause {
                fds.extend(
                    listeners.iter().map(|l| PollFd::from_borrowed_fd(l.as_fd(), PollFlags::IN)),
                );
            }
            if let Err(error) = rustix::event::poll(&mut fds, Some(&tick))
                && error != rustix::io::Errno::INTR
            {
                tracing::error!(%error, "polling the NBD sockets failed");
                return;
            }
            pause = false;
            for listener in listeners {
                while let Some(accepted) = self.accept(listener, &mut pause) {
                    self.admit(accepted);
                }
            }
            self.close_slow_handshakes();
        }
    }

    fn accept(&self, listener: &Listener, pause: &mut bool) -> Option<Accepted> {
        if self.is_stopping() {
            return None;
        }
        match listener.accept() {
            Ok(accepted) => Some(accepted),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => None,
            Err(error) => {
                // Out of descriptors, mostly: wait a tick instead of spinning.
                tracing::warn!(%error, "an NBD connection could not be accepted");
                *pause = true;
                None
            }
        }
    }

    /// Starts a connection's thread, or closes it when there are too many.
    fn admit(self: &Arc<Self>, accepted: Accepted) {
        let handshake_us = self.config.handshake_timeout.as_micros() as u64;
        let id = {
            let mut table = self.table();
            let half_open = table.entries.values().filter(|e| e.handshake_end.is_some()).count();
            if table.entries.len() >= self.config.connections_max
                || half_open >= self.config.half_open_max
            {
                tracing::warn!("too many NBD connections: one refused");
                return;
            }
            let Ok(socket) = Socket::of(&accepted) else { return };
            let handshake_end = Some(self.clock.mono_us() + handshake_us);
            let id = table.next;
            table.next += 1;
            table.entries.insert(id, Entry { socket, handshake_end });
            id
        };
        // Removed on drop: also when the thread cannot start, or panics.
        let member = Member { shared: Arc::clone(self), id };
        let name = format!("nbd-{id}");
        let thread = std::thread::Builder::new().name(name);
        if let Err(error) = thread.spawn(move || connection::run(accepted, &member)) {
            tracing::warn!(%error, "no thread for an NBD connection");
        }
    }

    fn close_slow_handshakes(&self) {
        let now = self.clock.mono_us();
        for entry in self.table().entries.values() {
            if entry.handshake_end.is_some_and(|end| end <= now) {
                entry.socket.shutdown(Shutdown::Both);
            }
        }
    }

    /// Reserves memory for a large payload; None if there is none for too long.
    fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reserved> {
        let end = self.clock.mono_us() + self.config.stall_timeout.as_micros() as u64;
        let mut used = self.large.lock().unwrap_or_else(PoisonError::into_inner);
        while *used > 0 && *used + bytes > self.config.large_bytes_max {
            if self.is_stopping() || self.clock.mono_us() >= end {
                return None;
            }
            let tick = Duration::from_millis(100);
            let waited = self.large_freed.wait_timeout(used, tick);
            used = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *used += bytes;
        Some(Reserved { shared: Arc::clone(self), bytes })
    }
}

/// A connection's place in the table.
#[derive(Debug)]
struct Member {
    shared: Arc<Shared>,
    id: u64,
}

impl Member {
    /// Its handshake is over.
    fn established(&self) {
        if let Some(entry) = self.shared.table().entries.get_mut(&self.id) {
            entry.handshake_end = None;
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.shared.table().entries.remove(&self.id);
        self.shared.changed.notify_all();
    }
}

/// Bytes reserved for one large payload.
#[derive(Debug)]
struct Reserved {
    shared: Arc<Shared>,
    bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut used = self.shared.large.lock().unwrap_or_else(PoisonError::into_inner);
        *used -= self.bytes;
        self.shared.large_freed.notify_all();
    }
}
