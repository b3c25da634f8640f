//! One connection of the blocking server: handshake, then turns of one recv,
//! all the requests in it, one send.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustls::{ServerConnection, StreamOwned};

use super::{Member, Peer, Shared};
use crate::block::{Errno, Export};
use crate::nbd::handshake::{
    Handshake, HandshakeConfig, HandshakeEvent, Negotiated, OpenError, TlsMode, default_export,
};
use crate::nbd::listen::Accepted;
use crate::nbd::out::{Buffers, Out};
use crate::nbd::proto::REQUEST_LEN;
use crate::nbd::transmission::{
    self, BadMagic, Decision, EXTENTS_MAX, Header, Limits, Request, allocation_status, reply_data,
    reply_error, reply_ok,
};

/// Why a connection ended. For the log.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the client said good-bye")]
    Goodbye,
    #[error("the client closed")]
    Closed,
    #[error("the server stops")]
    Stopping,
    #[error("handshake: {0}")]
    Handshake(&'static str),
    #[error("it stalled in the midst of a message")]
    Stalled,
    #[error("a request with an impossible payload")]
    TooLarge,
    #[error(transparent)]
    BadMagic(#[from] BadMagic),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The bytes' way.
#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
    /// Between TCP and TLS, or after a failed change.
    None,
}

impl Stream {
    fn timeouts(&self, timeout: std::time::Duration) -> io::Result<()> {
        let timeout = Some(timeout);
        match self {
            Self::Unix(s) => s.set_read_timeout(timeout).and(s.set_write_timeout(timeout)),
            Self::Tcp(s) => s.set_read_timeout(timeout).and(s.set_write_timeout(timeout)),
            Self::Tls(s) => s.sock.set_read_timeout(timeout).and(s.sock.set_write_timeout(timeout)),
            Self::None => Ok(()),
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let result = match self {
                Self::Unix(s) => s.read(buf),
                Self::Tcp(s) => s.read(buf),
                Self::Tls(s) => s.read(buf),
                Self::None => Ok(0),
            };
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // TLS without a proper end: the requests are whole or not by themselves.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
        }
    }

    fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(s) => s.write_all(data),
            Self::Tcp(s) => s.write_all(data),
            Self::Tls(s) => s.write_all(data).and_then(|()| s.flush()),
            Self::None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.write_vectored(slices),
            Self::Tcp(s) => s.write_vectored(slices),
            Self::Tls(s) => s.write_vectored(slices),
            Self::None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Self::Tls(s) = self { s.flush() } else { Ok(()) }
    }

    /// Tells a TLS peer that nothing follows.
    fn finish(&mut self) {
        if let Self::Tls(s) = self {
            s.conn.send_close_notify();
            let _ = s.flush();
        }
    }
}

/// Serves one connection until it ends.
pub(super) fn run(accepted: Accepted, member: &Member) {
    let (stream, address) = match accepted {
        Accepted::Unix(stream) => (Stream::Unix(stream), None),
        Accepted::Tcp(stream, address) => (Stream::Tcp(stream), Some(address)),
    };
    let shared = &member.shared;
    let peer = Peer { address, certificates: Vec::new() };
    let mut opening = Opening { stream, shared, peer, opened: None };
    let end = match opening.handshake() {
        Ok((negotiated, rest)) => {
            member.established();
            opening.transmit(&negotiated, &rest)
        }
        Err(end) => end,
    };
    tracing::debug!(peer = ?address, %end, "NBD connection closed");
}

/// A connection in handshake.
struct Opening<'a> {
    stream: Stream,
    shared: &'a Arc<Shared>,
    peer: Peer,
    /// The export last opened and the name the client used: what INFO told of is what GO serves.
    opened: Option<(String, Arc<dyn Export>)>,
}

impl Opening<'_> {
    fn handshake(&mut self) -> Result<(Negotiated, Vec<u8>), End> {
        let config = &self.shared.config;
        let tls = match (&self.stream, &config.tls) {
            (Stream::Tcp(_), Some(_)) if config.tls_required => TlsMode::Required,
            (Stream::Tcp(_), Some(_)) => TlsMode::Offered,
            _ => TlsMode::Off,
        };
        self.stream.timeouts(config.handshake_timeout)?;
        let mut machine = Handshake::new(HandshakeConfig { tls });
        let mut buf = vec![0; HANDSHAKE_BUF];
        let (mut start, mut end) = (0, 0);
        loop {
            while let Some(event) = machine.poll_event() {
                if let HandshakeEvent::StartTls = event {
                    // Whatever was sent behind STARTTLS is not trusted.
                    (start, end) = (0, 0);
                }
                if let Some(negotiated) = self.react(&mut machine, event)? {
                    return Ok((*negotiated, buf[start..end].to_vec()));
                }
            }
            start += machine.handle_bytes(&buf[start..end]);
            if start < end || machine.is_waiting() {
                continue;
            }
            (start, end) = (0, 0);
            if let Some(event) = machine.poll_event() {
                if let Some(negotiated) = self.react(&mut machine, event)? {
                    return Ok((*negotiated, Vec::new()));
                }
                continue;
            }
            end = self.stream.read(&mut buf)?;
            if end == 0 {
                return Err(End::Closed);
            }
        }
    }

    fn react(
        &mut self,
        machine: &mut Handshake,
        event: HandshakeEvent,
    ) -> Result<Option<Box<Negotiated>>, End> {
        match event {
            HandshakeEvent::Send(bytes) => self.stream.write_all(&bytes)?,
            HandshakeEvent::StartTls => {
                self.start_tls()?;
                machine.tls_started();
            }
            HandshakeEvent::ListExports => machine.listed(self.shared.exports.list(&self.peer)),
            HandshakeEvent::OpenExport { name, .. } => {
                let result = self.open(&name);
                machine.opened(result.map(|export| export.info()));
            }
            HandshakeEvent::Transmission(negotiated) => return Ok(Some(negotiated)),
            HandshakeEvent::Close(why) => {
                self.stream.finish();
                return Err(End::Handshake(why));
            }
        }
        Ok(None)
    }

    fn open(&mut self, name: &str) -> Result<Arc<dyn Export>, OpenError> {
        if self.shared.is_stopping() {
            return Err(OpenError::Shutdown);
        }
        if let Some((same, export)) = &self.opened
            && same == name
        {
            return Ok(Arc::clone(export));
        }
        let exports = &self.shared.exports;
        let list = if name.is_empty() { exports.list(&self.peer) } else { Vec::new() };
        let export = exports.open(default_export(name, &list), &self.peer)?;
        self.opened = Some((name.to_owned(), Arc::clone(&export)));
        Ok(export)
    }

    fn start_tls(&mut self) -> Result<(), End> {
        let Some(config) = &self.shared.config.tls else {
            return Err(End::Handshake("no TLS here"));
        };
        let Stream::Tcp(mut tcp) = std::mem::replace(&mut self.stream, Stream::None) else {
            return Err(End::Handshake("TLS on what is not TCP"));
        };
        let mut tls = ServerConnection::new(Arc::clone(config))?;
        while tls.is_handshaking() {
            tls.complete_io(&mut tcp)?;
        }
        let chain = tls.peer_certificates().unwrap_or_default();
        self.peer.certificates = chain.iter().map(|c| c.clone().into_owned()).collect();
        self.stream = Stream::Tls(Box::new(StreamOwned::new(tls, tcp)));
        self.opened = None;
        Ok(())
    }

    fn transmit(mut self, negotiated: &Negotiated, rest: &[u8]) -> End {
        let Some((_, export)) = self.opened.take() else {
            return End::Handshake("transmission without an export");
        };
        if let Err(error) = self.stream.timeouts(self.shared.config.stall_timeout) {
            return error.into();
        }
        let mut window = vec![0; WINDOW];
        window[..rest.len()].copy_from_slice(rest);
        let mut connection = Connection {
            stream: self.stream,
            shared: self.shared,
            export,
            limits: Limits::new(negotiated),
            window,
            start: 0,
            end: rest.len(),
            out: Out::default(),
            buffers: Buffers::new(KEEP),
        };
        let end = connection.serve();
        connection.stream.finish();
        end
    }
}

/// A connection in transmission.
struct Connection<'a> {
    stream: Stream,
    shared: &'a Arc<Shared>,
    export: Arc<dyn Export>,
    limits: Limits,
    /// Received and not handled: `window[start..end]`.
    window: Vec<u8>,
    start: usize,
    end: usize,
    /// Answers not sent yet.
    out: Out,
    /// For the next large payloads.
    buffers: Buffers,
}

impl Connection<'_> {
    fn serve(&mut self) -> End {
        loop {
            let turn = self.handle_window().and_then(|()| self.send());
            let turn = turn.and_then(|()| self.fill(true));
            if let Err(end) = turn {
                // What was done is answered even when the next request is bad.
                let _ = self.send();
                return end;
            }
        }
    }

    /// Handles all requests that are in the window.
    fn handle_window(&mut self) -> Result<(), End> {
        loop {
            if self.shared.is_stopping() {
                return Err(End::Stopping);
            }
            let window = &self.window[self.start..self.end];
            let Some((header, decision)) = transmission::parse(window, &self.limits)? else {
                return Ok(());
            };
            self.start += REQUEST_LEN;
            let structured = self.limits.structured;
            match decision {
                Decision::Run(request) => self.run(&header, request)?,
                Decision::Empty => self.out.add(|o| reply_ok(o, structured, &header)),
                Decision::Refuse(errno) => {
                    self.out.add(|o| reply_error(o, structured, &header, errno))
                }
                Decision::Drain { len, errno } => {
                    self.drain(len as usize)?;
                    self.out.add(|o| reply_error(o, structured, &header, errno));
                }
                Decision::Goodbye => return Err(End::Goodbye),
                Decision::Close => return Err(End::TooLarge),
            }
            if self.out.len() >= OUT_SEND {
                self.send()?;
            }
        }
    }

    fn run(&mut self, header: &Header, request: Request) -> Result<(), End> {
        let export = &self.export;
        let result = match request {
            Request::Read { offset, len, .. } => return self.read(header, offset, len),
            Request::BlockStatus { offset, len, one } => {
                let max = if one { 1 } else { EXTENTS_MAX };
                match export.extents(offset, u64::from(len), max) {
                    Ok(extents) if !extents.is_empty() => {
                        self.out.add(|o| allocation_status(o, header.cookie, &extents, true));
                        return Ok(());
                    }
                    Ok(_) => Err(Errno::Io),
                    Err(errno) => Err(errno),
                }
            }
            Request::Write { offset, len, fua } => self.write(offset, len as usize, fua)?,
            Request::Zero { offset, len, flags } => export.zero(offset, u64::from(len), flags),
            Request::Trim { offset, len, fua } => export.trim(offset, u64::from(len), fua),
            Request::Cache { offset, len } => export.cache(offset, u64::from(len)),
            Request::Flush => export.flush(),
        };
        match result {
            Ok(()) => self.out.add(|o| reply_ok(o, self.limits.structured, header)),
            Err(errno) => self.out.add(|o| reply_error(o, self.limits.structured, header, errno)),
        }
        Ok(())
    }

    fn read(&mut self, header: &Header, offset: u64, len: u32) -> Result<(), End> {
        let large = len as usize > WINDOW;
        let mut reserved = None;
        if large {
            self.send()?;
            reserved = self.shared.reserve(u64::from(len));
        }
        let structured = self.limits.structured;
        let mut result = Err(Errno::NoMem);
        if !large || reserved.is_some() {
            let mut data = self.out.buffer(len as usize);
            result = self.export.read(offset, &mut data);
            if result.is_ok() {
                self.out.add(|o| reply_data(o, structured, header.cookie, offset, len));
                self.out.add_data(data);
            }
        }
        if let Err(errno) = result {
            self.out.add(|o| reply_error(o, structured, header, errno));
        }
        if large {
            self.send()?;
        }
        Ok(())
    }

    /// Takes a payload in full, then writes it.
    fn write(&mut self, offset: u64, len: usize, fua: bool) -> Result<Result<(), Errno>, End> {
        if len <= WINDOW {
            while self.end - self.start < len {
                self.send()?;
                self.fill(false)?;
            }
            let data = &self.window[self.start..self.start + len];
            let result = self.export.write(offset, data, fua);
            self.start += len;
            return Ok(result);
        }
        self.send()?;
        let Some(_reserved) = self.shared.reserve(len as u64) else {
            self.drain(len)?;
            return Ok(Err(Errno::NoMem));
        };
        let here = self.end - self.start;
        let mut payload = self.buffers.take(len);
        payload[..here].copy_from_slice(&self.window[self.start..self.end]);
        self.start = self.end;
        self.receive(&mut payload[here..])?;
        let result = self.export.write(offset, &payload, fua);
        self.buffers.give(payload);
        Ok(result)
    }

    /// Fills `buf` from the socket, at no less than a slow modem's pace.
    fn receive(&mut self, buf: &mut [u8]) -> Result<(), End> {
        let allowed = self.shared.config.stall_timeout.as_micros() as u64;
        let allowed = allowed + buf.len() as u64 * 1_000_000 / RATE_MIN;
        let deadline = self.shared.clock.mono_us() + allowed;
        let mut done = 0;
        while done < buf.len() {
            match self.stream.read(&mut buf[done..]) {
                Ok(0) => return Err(End::Closed),
                Ok(n) => done += n,
                Err(error) if is_timeout(&error) => return Err(End::Stalled),
                Err(error) => return Err(error.into()),
            }
            if done < buf.len() && self.shared.clock.mono_us() > deadline {
                return Err(End::Stalled);
            }
        }
        Ok(())
    }

    /// Throws `len` bytes of payload away.
    fn drain(&mut self, len: usize) -> Result<(), End> {
        let here = len.min(self.end - self.start);
        self.start += here;
        let mut left = len - here;
        if left == 0 {
            return Ok(());
        }
        // The window is empty now, so it can take what is thrown away.
        (self.start, self.end) = (0, 0);
        self.send()?;
        let mut window = std::mem::take(&mut self.window);
        let mut result = Ok(());
        while left > 0 && result.is_ok() {
            let now = left.min(window.len());
            result = self.receive(&mut window[..now]);
            left -= now;
        }
        self.window = window;
        result
    }

    /// Receives once; `idle`: between requests, where a client may be silent for ever.
    fn fill(&mut self, idle: bool) -> Result<(), End> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            self.window.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let idle = idle && self.end == 0;
        loop {
            match self.stream.read(&mut self.window[self.end..]) {
                Ok(0) => return Err(End::Closed),
                Ok(n) => {
                    self.end += n;
                    return Ok(());
                }
                Err(error) if idle && is_timeout(&error) && !self.shared.is_stopping() => {
                    self.out.rest();
                    self.buffers = Buffers::new(KEEP);
                }
                Err(error) if is_timeout(&error) => return Err(End::Stalled),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn send(&mut self) -> Result<(), End> {
        let any = !self.out.is_empty();
        while !self.out.is_empty() {
            match self.out.write_with(|slices| self.stream.write_vectored(slices)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => return Err(End::Stalled),
                Ok(0) => return Err(End::Closed),
                other => drop(other?),
            }
        }
        if any { Ok(self.stream.flush()?) } else { Ok(()) }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Bytes received at once, and the largest payload that needs no reservation.
const WINDOW: usize = 256 << 10;
/// Payload memory kept for the next one, bytes.
const KEEP: usize = 1 << 20;
/// Answers are sent at the end of a turn, or earlier when there are so many bytes.
const OUT_SEND: usize = 256 << 10;
/// Bytes received at once in handshake; what is left over fits the window.
const HANDSHAKE_BUF: usize = 16 << 10;
/// Slowest payload that is waited for, bytes a second.
const RATE_MIN: u64 = 64 << 10;

const _: () = assert!(HANDSHAKE_BUF < WINDOW && REQUEST_LEN < WINDOW);
