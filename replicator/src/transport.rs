//! One TLS connection that carries frames, for either role.
//!
//! Owns socket, TLS state and the frames that arrived but were not taken. Holds:
//! nothing is allocated for a length that was not checked; incoming frames are
//! bounded in bytes (beyond it the socket is not read); every wait has a
//! timeout; while output waits for the peer, input is read on, so two sides that
//! both send cannot block each other for ever; a peer that says nothing for
//! [`SILENCE_MAX`] is dead. Before it: [`crate::frame`]. After it: the shipper
//! and the target's sessions, one thread each. Never blocks outside of
//! [`Channel::pump`] and what is built on it.

use std::collections::VecDeque;
use std::io::{self, BufRead, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use blockfilter::engine::{Clock, TURN_BYTES, give_way};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

use crate::frame::{FrameBuf, FrameError, FrameParts, check_header};
use crate::identity::{IdentityError, Peer, peer_of, server_name};
use crate::placed::Placed;
use crate::wire::{FRAME_RAW_MAX, FRAME_RECS_MAX, FrameHdr, Kind};

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The network or the socket failed.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// TLS failed: wrong or missing certificate, or damage on the way.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// What arrived is not a valid frame.
    #[error("protocol: {0}")]
    Frame(#[from] FrameError),
    /// The peer's certificate cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing arrived for too long.
    #[error("the peer has been silent for {0} s")]
    Silent(u64),
    /// The handshake or an answer took too long.
    #[error("timed out waiting for the peer")]
    Timeout,
}

/// Wakes a [`Channel::pump`] from another thread.
#[derive(Debug)]
pub struct Waker {
    fd: OwnedFd,
}

impl Waker {
    /// A new one.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { fd })
    }

    /// Ends the current or next wait.
    #[expect(clippy::host_endian_bytes, reason = "an eventfd takes a number of this machine")]
    pub fn wake(&self) {
        // A full counter is already a wake-up.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Waits until it is woken, at most `timeout`; whether it was.
    pub fn wait(&self, timeout: Duration) -> bool {
        self.wait_fds(&mut [PollFd::new(&self.fd, PollFlags::IN)], timeout)
    }

    /// Waits until `other` is readable or it is woken, at most `timeout`.
    pub fn wait_readable(&self, other: impl AsFd, timeout: Duration) {
        let fds = &mut [PollFd::new(&self.fd, PollFlags::IN), PollFd::new(&other, PollFlags::IN)];
        self.wait_fds(fds, timeout);
    }

    fn wait_fds(&self, fds: &mut [PollFd<'_>], timeout: Duration) -> bool {
        // An interrupted or failed wait only ends early.
        let _ = poll(fds, Some(&timespec(timeout)));
        self.drain()
    }

    fn drain(&self) -> bool {
        let mut count = [0; 8];
        rustix::io::read(&self.fd, &mut count).is_ok()
    }
}

fn timespec(timeout: Duration) -> Timespec {
    Timespec { tv_sec: timeout.as_secs().min(3600) as i64, tv_nsec: timeout.subsec_nanos().into() }
}

/// A connection that carries frames.
pub struct Channel {
    socket: TcpStream,
    tls: Connection,
    clock: Arc<dyn Clock>,
    chunk: Vec<u8>,
    /// What came of a frame, and how long it is to be: the header, or the frame once `head_done`.
    partial: Placed,
    partial_len: usize,
    head_done: bool,
    frames: VecDeque<FrameBuf>,
    frames_bytes: usize,
    frame_max: usize,
    heard_us: u64,
    closed: bool,
    patient: bool,
    /// Bytes since others had their turn.
    moved: usize,
    counters: Counters,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// What went over a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes taken by the socket, TLS included.
    pub sent_bytes: u64,
    /// Bytes that arrived.
    pub received_bytes: u64,
    /// Time in which output waited for the peer, microseconds.
    pub blocked_us: u64,
}

impl Channel {
    /// Dials `addr` (`host:port`) and completes the TLS handshake. `timeout`
    /// holds for each of the two.
    pub fn connect(
        addr: &str,
        config: Arc<ClientConfig>,
        clock: Arc<dyn Clock>,
        timeout: Duration,
    ) -> Result<Self, ChannelError> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{addr}: no such host"));
        for resolved in addr.to_socket_addrs()? {
            match TcpStream::connect_timeout(&resolved, timeout) {
                Ok(socket) => {
                    let tls = ClientConnection::new(config, server_name())?;
                    return Self::start(socket, tls.into(), clock, timeout, FRAME_MAX);
                }
                Err(error) => last = error,
            }
        }
        Err(last.into())
    }

    /// Takes a connection that was accepted and completes the TLS handshake. A
    /// frame above [`STRANGER_FRAME_MAX`] ends it until [`Channel::trust_peer`].
    pub fn accept(
        socket: TcpStream,
        config: Arc<ServerConfig>,
        clock: Arc<dyn Clock>,
        timeout: Duration,
    ) -> Result<Self, ChannelError> {
        let tls = ServerConnection::new(config)?;
        Self::start(socket, tls.into(), clock, timeout, STRANGER_FRAME_MAX)
    }

    fn start(
        socket: TcpStream,
        mut tls: Connection,
        clock: Arc<dyn Clock>,
        timeout: Duration,
        frame_max: usize,
    ) -> Result<Self, ChannelError> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        rustix::net::sockopt::set_socket_keepalive(&socket, true).map_err(io::Error::from)?;
        rustix::net::sockopt::set_tcp_keepidle(&socket, Duration::from_secs(10))
            .map_err(io::Error::from)?;
        // The bound on output is ours: the next frame is made when the last is out.
        tls.set_buffer_limit(None);
        let heard_us = clock.mono_us();
        let mut channel = Self {
            socket,
            tls,
            clock,
            chunk: vec![0; TURN_BYTES],
            partial: Placed::default(),
            partial_len: size_of::<FrameHdr>(),
            head_done: false,
            frames: VecDeque::new(),
            frames_bytes: 0,
            frame_max,
            heard_us,
            closed: false,
            patient: false,
            moved: 0,
            counters: Counters::default(),
        };
        if channel.is_local() {
            // Within a machine there is nothing to probe for, and the timers by which BBR paces cost a
            // fifth of the sender's time. Only a matter of speed.
            let _ = rustix::net::sockopt::set_tcp_congestion(&channel.socket, "reno");
        }
        channel.handshake(timeout)?;
        Ok(channel)
    }

    fn handshake(&mut self, timeout: Duration) -> Result<(), ChannelError> {
        let deadline = self.clock.mono_us() + timeout.as_micros() as u64;
        while self.tls.is_handshaking() {
            let left = self.left(deadline)?;
            self.pump(left, None)?;
        }
        Ok(())
    }

    fn left(&self, deadline_us: u64) -> Result<Duration, ChannelError> {
        match deadline_us.saturating_sub(self.clock.mono_us()) {
            0 => Err(ChannelError::Timeout),
            us => Ok(Duration::from_micros(us)),
        }
    }

    /// The peer's verified certificate, if it showed one.
    pub fn peer(&self) -> Result<Option<Peer>, ChannelError> {
        match self.tls.peer_certificates() {
            Some(chain) if !chain.is_empty() => Ok(Some(peer_of(chain)?)),
            _ => Ok(None),
        }
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.socket.peer_addr().ok()
    }

    /// Whether the peer is on this machine.
    pub fn is_local(&self) -> bool {
        let ends = (self.socket.peer_addr(), self.socket.local_addr());
        matches!(ends, (Ok(peer), Ok(here)) if peer.ip() == here.ip())
    }

    /// The peer is known: it may send frames of any valid length from now on.
    pub fn trust_peer(&mut self) {
        self.frame_max = FRAME_MAX;
    }

    /// Whether what is sent and received gives way to others on this machine (see [`give_way`]).
    /// Not at first.
    pub fn set_patient(&mut self, patient: bool) {
        self.patient = patient;
    }

    /// What went over it so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Queues a frame and sends what the socket takes at once. Callers that
    /// send much wait until [`Channel::output_pending`] is false first.
    pub fn send(&mut self, frame: &FrameBuf) -> Result<(), ChannelError> {
        self.tls.writer().write_all(&frame.bytes)?;
        self.write_some()
    }

    /// As [`Channel::send`], of a frame in parts.
    pub fn send_parts(&mut self, frame: &FrameParts) -> Result<(), ChannelError> {
        let body = frame.body.iter().map(AsRef::as_ref);
        let parts: Vec<&[u8]> = std::iter::once(frame.head.as_slice()).chain(body).collect();
        // TLS looks at all parts of a call for each of its records of 16 KiB.
        for parts in parts.chunks(PARTS) {
            let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|p| IoSlice::new(p)).collect();
            let mut rest = slices.as_mut_slice();
            while !rest.is_empty() {
                let taken = self.tls.writer().write_vectored(rest)?;
                if taken == 0 && rest.iter().any(|part| !part.is_empty()) {
                    return Err(io::Error::from(io::ErrorKind::WriteZero).into());
                }
                IoSlice::advance_slices(&mut rest, taken);
            }
        }
        self.write_some()?;
        self.moved(frame.hdr.raw_len.get() as usize);
        Ok(())
    }

    fn moved(&mut self, bytes: usize) {
        self.moved += bytes;
        if self.moved >= TURN_BYTES {
            self.moved = 0;
            if self.patient {
                give_way();
            }
        }
    }

    /// Whether output waits for the peer.
    pub fn output_pending(&self) -> bool {
        self.tls.wants_write()
    }

    /// The next frame that arrived whole.
    pub fn take(&mut self) -> Option<FrameBuf> {
        let frame = self.frames.pop_front()?;
        self.frames_bytes -= frame.bytes.len();
        Some(frame)
    }

    /// Waits until a frame is there, output is drained or `wake` is woken, at
    /// most `timeout`. Returns at once if frames are waiting.
    pub fn pump(&mut self, timeout: Duration, wake: Option<&Waker>) -> Result<(), ChannelError> {
        self.write_some()?;
        let timeout = if self.frames.is_empty() { timeout } else { Duration::ZERO };
        if self.frames.is_empty() && self.closed {
            return Err(ChannelError::Closed);
        }
        let began = self.clock.mono_us();
        let wants_write = self.tls.wants_write();
        let (readable, writable) = self.wait(timeout, wake)?;
        if wants_write && !writable {
            self.counters.blocked_us += self.clock.mono_us().saturating_sub(began);
        }
        if readable {
            self.read_some()?;
        }
        self.write_some()?;
        let silent = self.clock.mono_us().saturating_sub(self.heard_us);
        if self.frames.is_empty() && silent > SILENCE_MAX.as_micros() as u64 {
            return Err(ChannelError::Silent(silent / 1_000_000));
        }
        Ok(())
    }

    /// Waits for a frame, at most `timeout`.
    pub fn recv(&mut self, timeout: Duration) -> Result<FrameBuf, ChannelError> {
        let deadline = self.clock.mono_us() + timeout.as_micros() as u64;
        loop {
            if let Some(frame) = self.take() {
                return Ok(frame);
            }
            let left = self.left(deadline)?;
            self.pump(left, None)?;
        }
    }

    /// Sends what is queued, at most `timeout`; a full input queue does not stop it.
    pub fn flush(&mut self, timeout: Duration) -> Result<(), ChannelError> {
        let deadline = self.clock.mono_us() + timeout.as_micros() as u64;
        while self.tls.wants_write() {
            self.write_some()?;
            if self.tls.wants_write() {
                let left = self.left(deadline)?.min(Duration::from_millis(100));
                let (readable, _) = self.wait(left, None)?;
                if readable && self.frames_bytes < QUEUE_MAX {
                    self.read_some()?;
                }
            }
        }
        Ok(())
    }

    /// Says goodbye in TLS terms; errors no longer matter.
    pub fn close(&mut self) {
        self.tls.send_close_notify();
        let _ = self.flush(Duration::from_secs(1));
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    fn wait(&self, timeout: Duration, wake: Option<&Waker>) -> Result<(bool, bool), ChannelError> {
        let mut interest = PollFlags::empty();
        if self.frames_bytes < QUEUE_MAX && !self.closed {
            interest |= PollFlags::IN;
        }
        if self.tls.wants_write() {
            interest |= PollFlags::OUT;
        }
        let socket = self.socket.as_fd();
        let woken: BorrowedFd<'_> = wake.map_or(socket, |w| w.fd.as_fd());
        let mut fds = [
            PollFd::from_borrowed_fd(socket, interest),
            PollFd::from_borrowed_fd(woken, PollFlags::IN),
        ];
        let count = 1 + usize::from(wake.is_some());
        match poll(&mut fds[..count], Some(&timespec(timeout))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        if let Some(wake) = wake
            && !fds[1].revents().is_empty()
        {
            wake.drain();
        }
        let got = fds[0].revents();
        let bad = got.intersects(PollFlags::ERR | PollFlags::HUP);
        let readable = interest.contains(PollFlags::IN) && (got.contains(PollFlags::IN) || bad);
        let writable = got.contains(PollFlags::OUT) || bad;
        Ok((readable, writable))
    }

    fn write_some(&mut self) -> Result<(), ChannelError> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(n) => self.counters.sent_bytes += n as u64,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn read_some(&mut self) -> Result<(), ChannelError> {
        let mut chunk = std::mem::take(&mut self.chunk);
        let result = self.read_into(&mut chunk);
        self.chunk = chunk;
        result
    }

    fn read_into(&mut self, chunk: &mut [u8]) -> Result<(), ChannelError> {
        while self.frames_bytes < QUEUE_MAX && !self.closed {
            match self.socket.read(chunk) {
                Ok(0) => self.closed = true,
                Ok(n) => {
                    self.heard_us = self.clock.mono_us();
                    self.counters.received_bytes += n as u64;
                    self.decrypt(&chunk[..n])?;
                    self.moved(n);
                    if n < chunk.len() {
                        break;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn decrypt(&mut self, mut data: &[u8]) -> Result<(), ChannelError> {
        while !data.is_empty() {
            self.tls.read_tls(&mut data)?;
            let state = match self.tls.process_new_packets() {
                Ok(state) => state,
                Err(error) => {
                    // The alert tells the peer why.
                    let _ = self.write_some();
                    return Err(error.into());
                }
            };
            self.collect()?;
            if state.peer_has_closed() {
                self.closed = true;
                break;
            }
        }
        Ok(())
    }

    /// Moves decrypted bytes into frames.
    fn collect(&mut self) -> Result<(), ChannelError> {
        loop {
            let missing = self.partial_len - self.partial.len();
            if missing > 0 {
                let mut reader = self.tls.reader();
                let count = match reader.fill_buf() {
                    Ok([]) => return Ok(()),
                    Ok(bytes) => {
                        let count = bytes.len().min(missing);
                        self.partial.extend_from_slice(&bytes[..count]);
                        count
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(e) => return Err(e.into()),
                };
                reader.consume(count);
                continue;
            }
            if !self.head_done
                && let Some(head) = self.partial.first_chunk()
            {
                let hdr = check_header(head)?;
                let total = hdr.total_len();
                if total > self.frame_max {
                    let (value, limit) = (total as u64, self.frame_max as u64);
                    return Err(FrameError::TooLarge { what: "frame", value, limit }.into());
                }
                self.head_done = true;
                let mut placed = placed(&hdr);
                placed.extend_from_slice(&self.partial);
                self.partial = placed;
                self.partial_len = total;
                continue;
            }
            let bytes = std::mem::take(&mut self.partial);
            self.partial_len = size_of::<FrameHdr>();
            self.head_done = false;
            let frame = FrameBuf::from_bytes(bytes)?;
            self.frames_bytes += frame.bytes.len();
            self.frames.push_back(frame);
        }
    }
}

/// Room for a frame. Of a large one, what is written to a sector's start is aligned: the stream's
/// frames are kept whole ([`crate::wire::FRAME_ALIGN`]), of the copy's the body.
fn placed(hdr: &FrameHdr) -> Placed {
    let total = hdr.total_len();
    if total < PLACED {
        return Vec::with_capacity(total).into();
    }
    let head = size_of::<FrameHdr>() + hdr.desc_len();
    Placed::with_room(total, if hdr.kind == Kind::Copy as u8 { head } else { 0 })
}

/// A peer that says nothing for this long is dead.
pub const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Longest frame of a peer that is not known yet, in bytes.
pub const STRANGER_FRAME_MAX: usize = 64 << 10;
/// Frames from this size on have a place, which costs up to a page more, in bytes.
const PLACED: usize = 64 << 10;
/// Parts of a frame that are given to TLS at once.
const PARTS: usize = 64;
/// Input that was not taken; beyond it the socket is not read.
const QUEUE_MAX: usize = 8 << 20;
const FRAME_MAX: usize = size_of::<FrameHdr>()
    + FRAME_RECS_MAX as usize * size_of::<blockfilter::journal::format::RecDesc>()
    + FRAME_RAW_MAX as usize;

#[cfg(test)]
pub(crate) mod tests {
    use std::net::TcpListener;
    use std::path::Path;
    use std::thread;

    use blockfilter::engine::real::{RealClock, RealFiles};
    use blockfilter::engine::replace_file;

    use super::*;
    use crate::identity::{self, Authority, Role};

    const LIMIT: Duration = Duration::from_secs(10);
    const NOW: u64 = 1_795_000_000_000_000;

    fn clock() -> Arc<dyn Clock> {
        Arc::new(RealClock::new())
    }

    pub(crate) fn client_pki(authority: &Authority, name: &str, dir: &Path) {
        let issued = authority.issue(name, Role::Agent, NOW).unwrap();
        for (file, text) in [
            (identity::CA_PEM, &issued.ca_pem),
            (identity::CERT_PEM, &issued.cert_pem),
            (identity::KEY_PEM, &issued.key_pem),
        ] {
            replace_file(&RealFiles, &dir.join(file), text.as_bytes()).unwrap();
        }
    }

    fn pair(
        server: Arc<ServerConfig>,
        client: Arc<ClientConfig>,
    ) -> (Result<Channel, ChannelError>, Result<Channel, ChannelError>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let accepting = thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            Channel::accept(socket, server, clock(), LIMIT)
        });
        let client = Channel::connect(&addr, client, clock(), LIMIT);
        (accepting.join().unwrap(), client)
    }

    fn mutual() -> (Channel, Channel) {
        let dir = tempfile::tempdir().unwrap();
        let (t, a) = (dir.path().join("t"), dir.path().join("a"));
        std::fs::create_dir_all(&a).unwrap();
        let authority = Authority::create(&RealFiles, &t, &[], NOW).unwrap();
        client_pki(&authority, "a1", &a);
        let server = identity::server_tls(&RealFiles, &t, true).unwrap();
        let client = identity::client_tls(&RealFiles, &a).unwrap();
        let (server, client) = pair(server, client);
        let mut server = server.unwrap();
        server.trust_peer();
        (server, client.unwrap())
    }

    fn data(len: usize) -> FrameBuf {
        let hdr =
            FrameHdr { kind: Kind::Copy as u8, raw_len: (len as u32).into(), ..Default::default() };
        FrameBuf::seal(hdr, &[], &vec![5; len])
    }

    #[test]
    fn frames_cross_both_ways_and_the_peer_is_known() {
        let (mut server, mut client) = mutual();
        assert_eq!(server.peer().unwrap().unwrap().name, "a1");
        client.send(&data(100)).unwrap();
        assert_eq!(server.recv(LIMIT).unwrap(), data(100));
        server.send(&data(0)).unwrap();
        assert_eq!(client.recv(LIMIT).unwrap(), data(0));
    }

    #[test]
    fn within_a_machine_nothing_is_probed_for() {
        let (server, client) = mutual();
        for channel in [server, client] {
            let control = rustix::net::sockopt::tcp_congestion(&channel.socket).unwrap();
            assert_eq!(control, "reno");
        }
    }

    #[test]
    fn two_sides_that_both_send_much_do_not_block_each_other() {
        let (mut server, mut client) = mutual();
        let exchange = |channel: &mut Channel| {
            let (mut sent, mut got) = (0, 0);
            while got < 24 || sent < 24 {
                if sent < 24 && !channel.output_pending() {
                    channel.send(&data(1 << 20)).unwrap();
                    sent += 1;
                }
                while channel.take().is_some() {
                    got += 1;
                }
                if got < 24 || channel.output_pending() {
                    channel.pump(LIMIT, None).unwrap();
                }
            }
            channel.flush(LIMIT).unwrap();
        };
        thread::scope(|scope| {
            scope.spawn(|| exchange(&mut server));
            exchange(&mut client);
        });
    }

    #[test]
    fn a_certificate_of_a_foreign_authority_gets_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (t, u, a) = (dir.path().join("t"), dir.path().join("u"), dir.path().join("a"));
        std::fs::create_dir_all(&a).unwrap();
        let ours = Authority::create(&RealFiles, &t, &[], NOW).unwrap();
        let foreign = Authority::create(&RealFiles, &u, &[], NOW).unwrap();
        client_pki(&foreign, "a1", &a);
        // Trusts our target, but shows the foreign certificate.
        replace_file(&RealFiles, &a.join(identity::CA_PEM), ours.ca_pem().as_bytes()).unwrap();
        let server = identity::server_tls(&RealFiles, &t, true).unwrap();
        let client = identity::client_tls(&RealFiles, &a).unwrap();
        let (server, _client) = pair(server, client);
        assert!(matches!(server, Err(ChannelError::Tls(_))));
    }

    #[test]
    fn joining_needs_the_pinned_authority() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&RealFiles, dir.path(), &[], NOW).unwrap();
        let server = identity::server_tls(&RealFiles, dir.path(), true).unwrap();
        let right = identity::joining_tls(authority.ca_sha256()).unwrap();
        let (accepted, client) = pair(server.clone(), right);
        assert_eq!(accepted.unwrap().peer().unwrap(), None);
        client.unwrap();
        let wrong = identity::joining_tls(&"00".repeat(32)).unwrap();
        let (_, client) = pair(server, wrong);
        assert!(matches!(client, Err(ChannelError::Tls(_))));
    }

    #[test]
    fn a_frame_above_the_peers_limit_ends_the_connection() {
        let (mut server, mut client) = mutual();
        server.frame_max = STRANGER_FRAME_MAX;
        client.send(&data(1 << 20)).unwrap();
        assert!(matches!(server.recv(LIMIT), Err(ChannelError::Frame(_))));
    }

    #[test]
    fn a_closed_connection_is_noticed() {
        let (mut server, mut client) = mutual();
        client.close();
        assert!(matches!(server.recv(LIMIT), Err(ChannelError::Closed)));
    }
}
