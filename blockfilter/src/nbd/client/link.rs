//! One connection of the client: connect, handshake, send, take answers.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::{Answer, ClientError, Inner, Op, RemoteInfo};
use crate::block::{Errno, Extent};
use crate::nbd::listen::{Address, tune};
use crate::nbd::proto::{
    BASE_ALLOCATION, CLIENT_FIXED_NEWSTYLE, CLIENT_NO_ZEROES, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES,
    Fields, MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, Put, STATE_HOLE, STATE_ZERO, chunk, cmd, info,
    opt, rep,
};
use crate::nbd::transmission::{self, Header, ReplyHeader};

/// Either kind of socket.
#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                tune(stream.as_fd(), None);
                Ok(Self::Unix(stream))
            }
            Address::Tcp(text) => {
                let mut last = io::ErrorKind::AddrNotAvailable.into();
                for address in text.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                        Ok(stream) => {
                            tune(stream.as_fd(), Some(&stream));
                            return Ok(Self::Tcp(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    fn timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(s) => s.set_read_timeout(read).and(s.set_write_timeout(write)),
            Self::Tcp(s) => s.set_read_timeout(read).and(s.set_write_timeout(write)),
        }
    }

    fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Unix(s) => s.try_clone().map(Self::Unix),
            Self::Tcp(s) => s.try_clone().map(Self::Tcp),
        }
    }

    fn shutdown(&self) {
        // Fails only when it is down already.
        let _ = match self {
            Self::Unix(s) => s.shutdown(Shutdown::Both),
            Self::Tcp(s) => s.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.read(buf),
            Self::Tcp(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.write(buf),
            Self::Tcp(s) => s.write(buf),
        }
    }
    fn write_vectored(&mut self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.write_vectored(bufs),
            Self::Tcp(s) => s.write_vectored(bufs),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection whose handshake is done.
#[derive(Debug)]
pub(super) struct Link {
    stream: Stream,
    pub(super) info: RemoteInfo,
}

impl Link {
    /// Connects and opens the export; takes at most some tens of seconds.
    pub(super) fn open(address: &Address, export: &str) -> Result<Self, ClientError> {
        let io_error = |source| ClientError::Io { address: address.to_string(), source };
        let mut stream = Stream::connect(address).map_err(io_error)?;
        stream.timeouts(Some(HANDSHAKE_TIMEOUT), Some(HANDSHAKE_TIMEOUT)).map_err(io_error)?;
        let info = negotiate(&mut stream, export).map_err(|failure| match failure {
            Failure::Io(source) => io_error(source),
            Failure::Strange(what) => ClientError::Protocol { address: address.to_string(), what },
            Failure::Refused(message) => {
                ClientError::Refused { export: export.to_owned(), message }
            }
        })?;
        // Sends have no timeout: a slow server must not see its requests twice.
        stream.timeouts(Some(READ_TICK), None).map_err(io_error)?;
        Ok(Self { stream, info })
    }

    pub(super) fn split(self) -> io::Result<(Sink, Source)> {
        let sink = Sink { stream: self.stream.try_clone()?, broken: false };
        let source = Source {
            stream: self.stream,
            window: vec![0; WINDOW],
            start: 0,
            end: 0,
            parts: HashMap::new(),
            checked_us: 0,
        };
        Ok((sink, source))
    }
}

enum Failure {
    Io(io::Error),
    Strange(&'static str),
    Refused(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn negotiate(stream: &mut Stream, export: &str) -> Result<RemoteInfo, Failure> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let mut fields = Fields(&greeting);
    let magics = (fields.u64(), fields.u64(), fields.u16());
    let (Some(MAGIC), Some(OPTION_MAGIC), Some(flags)) = magics else {
        return Err(Failure::Strange("no newstyle greeting"));
    };
    if flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(Failure::Strange("not fixed newstyle"));
    }
    let no_zeroes = if flags & FLAG_NO_ZEROES != 0 { CLIENT_NO_ZEROES } else { 0 };
    let mut hello = Vec::new();
    hello.put32(CLIENT_FIXED_NEWSTYLE | no_zeroes);
    stream.write_all(&hello)?;

    send_option(stream, opt::STRUCTURED_REPLY, &[])?;
    let structured = matches!(read_reply(stream, opt::STRUCTURED_REPLY)?, (rep::ACK, _));
    let mut base_allocation = false;
    if structured {
        let mut data = named(export);
        data.put32(1);
        data.put32(BASE_ALLOCATION.len() as u32);
        data.extend_from_slice(BASE_ALLOCATION.as_bytes());
        send_option(stream, opt::SET_META_CONTEXT, &data)?;
        loop {
            match read_reply(stream, opt::SET_META_CONTEXT)? {
                (rep::META_CONTEXT, _) => base_allocation = true,
                (rep::ACK, _) => break,
                // The same reason comes again, with its text, in answer to GO.
                (code, _) if code & rep::ERROR_BIT != 0 => break,
                _ => return Err(Failure::Strange("an odd reply to SET_META_CONTEXT")),
            }
        }
    }
    let mut data = named(export);
    // Whoever asks for block sizes must keep to them; files are read by the byte.
    data.put16(0);
    send_option(stream, opt::GO, &data)?;
    let mut remote = RemoteInfo {
        size: 0,
        flags: 0,
        block_min: 1,
        block_preferred: 4096,
        structured,
        base_allocation,
    };
    loop {
        match read_reply(stream, opt::GO)? {
            (rep::ACK, _) if remote.flags == 0 => {
                return Err(Failure::Strange("no information about the export"));
            }
            (rep::ACK, _) => return Ok(remote),
            (rep::INFO, data) => take_info(&mut remote, &data),
            (code, data) if code & rep::ERROR_BIT != 0 => {
                let mut text = String::from_utf8_lossy(&data).into_owned();
                if text.is_empty() {
                    text = format!("error {:#x}", code);
                }
                return Err(Failure::Refused(text));
            }
            _ => return Err(Failure::Strange("an odd reply to GO")),
        }
    }
}

fn take_info(remote: &mut RemoteInfo, data: &[u8]) {
    let mut fields = Fields(data);
    match fields.u16() {
        Some(info::EXPORT) => {
            if let (Some(size), Some(flags)) = (fields.u64(), fields.u16()) {
                (remote.size, remote.flags) = (size, flags);
            }
        }
        Some(info::BLOCK_SIZE) => {
            if let (Some(min), Some(preferred)) = (fields.u32(), fields.u32()) {
                (remote.block_min, remote.block_preferred) = (min, preferred);
            }
        }
        _ => {}
    }
}

fn named(export: &str) -> Vec<u8> {
    let mut data = Vec::new();
    data.put32(export.len() as u32);
    data.extend_from_slice(export.as_bytes());
    data
}

fn send_option(stream: &mut Stream, option: u32, data: &[u8]) -> io::Result<()> {
    let mut out = Vec::with_capacity(16 + data.len());
    out.put64(OPTION_MAGIC);
    out.put32(option);
    out.put32(data.len() as u32);
    out.extend_from_slice(data);
    stream.write_all(&out)
}

fn read_reply(stream: &mut Stream, option: u32) -> Result<(u32, Vec<u8>), Failure> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    let mut fields = Fields(&header);
    let parts = (fields.u64(), fields.u32(), fields.u32(), fields.u32());
    let (Some(OPTION_REPLY_MAGIC), Some(echo), Some(kind), Some(len)) = parts else {
        return Err(Failure::Strange("not a reply to an option"));
    };
    if echo != option || len > REPLY_MAX {
        return Err(Failure::Strange("a reply to another option, or an endless one"));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

/// The sending half.
#[derive(Debug)]
pub(super) struct Sink {
    stream: Stream,
    broken: bool,
}

/// Ends a connection from outside.
#[derive(Debug)]
pub(super) struct Stopper(Stream);

impl Stopper {
    pub(super) fn shutdown(&self) {
        self.0.shutdown();
    }
}

impl Sink {
    pub(super) fn stopper(&self) -> io::Result<Stopper> {
        self.stream.try_clone().map(Stopper)
    }

    /// Sends a request; false when the connection is broken, which its reader notices too.
    pub(super) fn send(&mut self, cookie: u64, op: &Op) -> bool {
        let mut header = Vec::with_capacity(crate::nbd::proto::REQUEST_LEN);
        transmission::encode(&mut header, &op.header(cookie));
        let payload: &[u8] = if let Op::Write { data, .. } = op { data } else { &[] };
        if !self.broken && self.write(&header, payload).is_err() {
            self.broken = true;
            self.shutdown();
        }
        !self.broken
    }

    fn write(&mut self, mut header: &[u8], payload: &[u8]) -> io::Result<()> {
        while !header.is_empty() {
            let parts = [io::IoSlice::new(header), io::IoSlice::new(payload)];
            match self.stream.write_vectored(&parts) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) if n < header.len() => header = &header[n..],
                Ok(n) => return self.stream.write_all(&payload[n - header.len()..]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells the server that nothing follows.
    pub(super) fn goodbye(&mut self) {
        let header = Header { flags: 0, kind: cmd::DISC, cookie: 0, offset: 0, len: 0 };
        let mut out = Vec::new();
        transmission::encode(&mut out, &header);
        let _ = self.stream.timeouts(None, Some(Duration::from_millis(200)));
        let _ = self.stream.write_all(&out);
    }

    pub(super) fn shutdown(&self) {
        self.stream.shutdown();
    }
}

/// Why answers ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("closed by the server")]
    Closed,
    #[error("{0}")]
    Strange(&'static str),
    #[error(transparent)]
    BadMagic(#[from] transmission::BadMagic),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The receiving half.
#[derive(Debug)]
pub(super) struct Source {
    stream: Stream,
    window: Vec<u8>,
    start: usize,
    end: usize,
    /// Chunked answers that are not complete.
    parts: HashMap<u64, Part>,
    checked_us: u64,
}

#[derive(Debug, Default)]
struct Part {
    data: Vec<u8>,
    filled: u64,
    extents: Vec<Extent>,
    error: Option<Errno>,
}

impl Source {
    /// Takes answers until the connection ends.
    pub(super) fn run(&mut self, inner: &Inner) -> Lost {
        loop {
            if let Err(lost) = self.answer(inner) {
                return lost;
            }
        }
    }

    fn answer(&mut self, inner: &Inner) -> Result<(), Lost> {
        let window = &self.window[self.start..self.end];
        let Some((header, used)) = transmission::decode_reply(window)? else {
            return self.fill(inner);
        };
        self.start += used;
        match header {
            ReplyHeader::Simple { code, cookie } => {
                let op = inner.find(cookie).ok_or(Lost::Strange("an answer nobody waits for"))?;
                let result = match op {
                    _ if code != 0 => Err(Errno::from_code(code)),
                    Op::Read { len, .. } => {
                        let mut data = vec![0; len as usize];
                        self.take(inner, &mut data)?;
                        Ok(Answer::Data(data))
                    }
                    Op::Extents { .. } => return Err(Lost::Strange("extents in a simple reply")),
                    _ => Ok(Answer::Done),
                };
                inner.complete(cookie, result);
                Ok(())
            }
            ReplyHeader::Chunk { done, kind, cookie, len } => {
                let op = inner.find(cookie).ok_or(Lost::Strange("an answer nobody waits for"))?;
                self.chunk(inner, cookie, &op, kind, len)?;
                if done {
                    let part = self.parts.remove(&cookie).unwrap_or_default();
                    inner.complete(cookie, finish(&op, part)?);
                }
                Ok(())
            }
        }
    }

    fn chunk(
        &mut self,
        inner: &Inner,
        cookie: u64,
        op: &Op,
        kind: u16,
        len: u32,
    ) -> Result<(), Lost> {
        let mut part = self.parts.remove(&cookie).unwrap_or_default();
        match (kind, op) {
            (chunk::NONE, _) if len == 0 => {}
            (chunk::OFFSET_DATA, Op::Read { offset, len: whole }) if len > 8 => {
                let at = Fields(&self.head::<8>(inner)?).u64().unwrap_or(u64::MAX);
                let range = part.claim(*offset, *whole, at, len - 8)?;
                self.take(inner, &mut part.data[range])?;
            }
            (chunk::OFFSET_HOLE, Op::Read { offset, len: whole }) if len == 12 => {
                let head = self.head::<12>(inner)?;
                let mut fields = Fields(&head);
                let at = fields.u64().unwrap_or(u64::MAX);
                let range = part.claim(*offset, *whole, at, fields.u32().unwrap_or(u32::MAX))?;
                part.data[range].fill(0);
            }
            (chunk::BLOCK_STATUS, Op::Extents { .. }) if (12..=REPLY_MAX).contains(&len) => {
                let mut data = vec![0; len as usize];
                self.take(inner, &mut data)?;
                let mut fields = Fields(&data);
                let _context = fields.u32();
                while let (Some(len), Some(state)) = (fields.u32(), fields.u32()) {
                    let hole = state & STATE_HOLE != 0;
                    let zero = state & STATE_ZERO != 0;
                    part.extents.push(Extent { len: u64::from(len), hole, zero });
                }
            }
            (kind, _) if kind & chunk::ERROR_BIT != 0 && len <= REPLY_MAX => {
                let mut data = vec![0; len as usize];
                self.take(inner, &mut data)?;
                let code = Fields(&data).u32().unwrap_or(0);
                part.error = Some(Errno::from_code(code));
            }
            _ => return Err(Lost::Strange("a chunk that does not fit its request")),
        }
        self.parts.insert(cookie, part);
        Ok(())
    }

    fn head<const N: usize>(&mut self, inner: &Inner) -> Result<[u8; N], Lost> {
        let mut head = [0; N];
        self.take(inner, &mut head)?;
        Ok(head)
    }

    /// Fills `buf` from the window, then from the socket.
    fn take(&mut self, inner: &Inner, buf: &mut [u8]) -> Result<(), Lost> {
        let here = buf.len().min(self.end - self.start);
        buf[..here].copy_from_slice(&self.window[self.start..self.start + here]);
        self.start += here;
        let mut done = here;
        while done < buf.len() {
            if buf.len() - done < SMALL {
                self.fill(inner)?;
                let now = (buf.len() - done).min(self.end - self.start);
                let from = self.start;
                buf[done..done + now].copy_from_slice(&self.window[from..from + now]);
                self.start += now;
                done += now;
            } else {
                match self.stream.read(&mut buf[done..]) {
                    Ok(0) => return Err(Lost::Closed),
                    Ok(n) => done += n,
                    Err(error) => self.wait_on(inner, error)?,
                }
            }
        }
        Ok(())
    }

    /// Receives once into the window.
    fn fill(&mut self, inner: &Inner) -> Result<(), Lost> {
        self.window.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        loop {
            match self.stream.read(&mut self.window[self.end..]) {
                Ok(0) => return Err(Lost::Closed),
                Ok(n) => {
                    self.end += n;
                    let now = inner.clock.mono_us();
                    if now >= self.checked_us + READ_TICK.as_micros() as u64 {
                        self.checked_us = now;
                        inner.expire();
                    }
                    return Ok(());
                }
                Err(error) => self.wait_on(inner, error)?,
            }
        }
    }

    /// A timeout is a tick, anything else the end.
    fn wait_on(&mut self, inner: &Inner, error: io::Error) -> Result<(), Lost> {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                inner.expire();
                Ok(())
            }
            io::ErrorKind::Interrupted => Ok(()),
            _ => Err(error.into()),
        }
    }
}

impl Part {
    /// The place of a piece of a read's answer.
    fn claim(
        &mut self,
        offset: u64,
        whole: u32,
        at: u64,
        len: u32,
    ) -> Result<std::ops::Range<usize>, Lost> {
        let start = at.checked_sub(offset);
        let start =
            start.filter(|s| s.checked_add(u64::from(len)).is_some_and(|e| e <= whole.into()));
        let start = start.ok_or(Lost::Strange("data outside of what was asked for"))?;
        if self.data.is_empty() {
            self.data = vec![0; whole as usize];
        }
        self.filled += u64::from(len);
        Ok(start as usize..start as usize + len as usize)
    }
}

fn finish(op: &Op, part: Part) -> Result<Result<Answer, Errno>, Lost> {
    if let Some(errno) = part.error {
        return Ok(Err(errno));
    }
    match op {
        Op::Read { len, .. } if part.filled == u64::from(*len) => Ok(Ok(Answer::Data(part.data))),
        Op::Read { .. } => Err(Lost::Strange("a read answered in part")),
        Op::Extents { .. } if part.extents.iter().any(|e| e.len == 0) => {
            Err(Lost::Strange("an empty extent"))
        }
        Op::Extents { .. } if part.extents.is_empty() => Err(Lost::Strange("no extents")),
        Op::Extents { .. } => Ok(Ok(Answer::Extents(part.extents))),
        _ => Ok(Ok(Answer::Done)),
    }
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a quiet connection looks for requests that are late.
const READ_TICK: Duration = Duration::from_secs(1);
/// Longest reply without data of a disk, in bytes.
const REPLY_MAX: u32 = 64 << 10;
const WINDOW: usize = 256 << 10;
/// What is less goes through the window, to be received with what follows.
const SMALL: usize = 32 << 10;
