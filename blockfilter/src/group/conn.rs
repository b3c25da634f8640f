//! One NBD connection on a socket that never blocks.
//!
//! Requests are read many at a time into a window; small payloads go from there into the
//! arena. A large one is received straight into its place there, or, if another is on its way, is
//! larger than a record or no whole number of sectors, into a buffer of its own. Its size was
//! reserved before its first byte is read (ruling 11), because a place can be lost. A payload that
//! is not complete never gets an LSN (I1, I12). Requests of one connection are
//! admitted in order; answers go out as they are ready.
//!
//! Holds: what a client makes us keep is bounded (I24): the window, [`OUT_MAX`] bytes
//! of answers, [`IN_FLIGHT_MAX`] bytes of reads under way, its share of the
//! payload budget.

mod payload;

use std::collections::HashMap;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags};

use super::volume::{EXTENTS_COST, ReadOutcome, Refusal, Volume};
use crate::block::{Errno, ExportInfo, Extent, ZeroFlags};
use crate::nbd::handshake::{
    Handshake, HandshakeConfig, HandshakeEvent, OpenError, TlsMode, default_export,
};
use crate::nbd::out::{Buffers, Out};
use crate::nbd::proto::{Context, REQUEST_LEN};
use crate::nbd::transmission::{
    Decision, EXTENTS_MAX, Header, Limits, Request, allocation_status, dirty_status, parse,
    payload_len, reply_data, reply_error, reply_ok,
};

/// What all connections of a group share.
#[derive(Debug)]
pub struct Shared {
    /// Export names, by disk index.
    pub exports: Vec<String>,
    /// Bytes of unfinished payloads now.
    pub staged: u64,
    /// At most this many (ruling 11).
    pub staged_max: u64,
    /// For the next payloads.
    pub buffers: Buffers,
}

impl Shared {
    /// Nothing is under way.
    pub fn new(exports: Vec<String>, staged_max: u64) -> Self {
        Self { exports, staged: 0, staged_max, buffers: Buffers::new(BUFFERS_KEEP) }
    }

    /// Frees memory that nobody needs now.
    pub fn rest(&mut self) {
        if self.staged == 0 {
            self.buffers = Buffers::new(BUFFERS_KEEP);
        }
    }
}

/// Why a connection makes no progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It needs bytes from the client.
    Input,
    /// It waits for room in the arena or the journal, or for the group's reads.
    Room,
    /// It waits for its share of the payload budget.
    Budget,
    /// Its answers must leave first, or its reads finish.
    Output,
    /// It is over.
    Closed,
}

/// One connection.
#[derive(Debug)]
pub struct Conn {
    id: u64,
    socket: UnixStream,
    phase: Phase,
    window: Vec<u8>,
    start: usize,
    end: usize,
    /// Received at once when nothing is known of what comes: behind a large payload only the
    /// next header, so that another one need not be copied out of the window.
    ahead: usize,
    out: Out,
    job: Option<Job>,
    /// Of the payload budget, bytes.
    reserved: u64,
    waiting: HashMap<u32, Waiting>,
    waiting_bytes: u64,
    next_seq: u32,
    goodbye: bool,
    /// Bytes received so far, wrapping.
    received: u64,
    /// The last receive got less than it had room for: the socket is empty, and the
    /// next bytes make it readable again.
    drained: bool,
    /// When the handshake, a payload or the sending of answers last moved.
    moved_at: u64,
}

#[derive(Debug)]
enum Phase {
    Handshake(Box<Handshake>),
    Transmission { limits: Limits, disk: u8 },
}

/// A request that is not admitted yet, or only in part.
#[derive(Debug)]
enum Job {
    /// The payload is being received into `buf`, or into the arena while that is empty.
    Fill { header: Header, offset: u64, fua: bool, buf: Vec<u8>, filled: usize },
    /// The payload is complete; `done` bytes of it are admitted.
    Admit { header: Header, offset: u64, fua: bool, buf: Vec<u8>, done: usize },
    /// A range becomes zeroes; the first `done` bytes are admitted.
    Zero { header: Header, offset: u64, len: u64, flags: ZeroFlags, trim: bool, done: u64 },
    /// It needs a disk, and too much is being read.
    Ask { header: Header, request: Request },
    /// A refused payload is thrown away.
    Drain { header: Header, left: u64, errno: Errno },
}

/// A request whose answer comes later.
#[derive(Debug)]
struct Waiting {
    header: Header,
    bytes: u64,
    one: bool,
}

impl Conn {
    /// Starts the handshake.
    pub fn new(id: u64, socket: UnixStream, now: u64) -> Self {
        let config = HandshakeConfig { tls: TlsMode::Off };
        Self {
            id,
            socket,
            phase: Phase::Handshake(Box::new(Handshake::new(config))),
            window: vec![0; WINDOW],
            start: 0,
            end: 0,
            ahead: WINDOW,
            out: Out::default(),
            job: None,
            reserved: 0,
            waiting: HashMap::new(),
            waiting_bytes: 0,
            next_seq: 0,
            goodbye: false,
            received: 0,
            drained: false,
            moved_at: now,
        }
    }

    /// The descriptor to poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Answers wait for the socket.
    pub fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// Bytes received so far, wrapping.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// It made no progress for too long in a state that the client must end.
    pub fn is_stuck(&self, now: u64) -> bool {
        let limit = match (&self.phase, &self.job) {
            (Phase::Handshake(_), _) => HANDSHAKE_MAX,
            (_, Some(Job::Fill { .. } | Job::Drain { .. })) => STALL_MAX,
            _ if self.has_output() => STALL_MAX,
            _ => return false,
        };
        now.saturating_sub(self.moved_at) > limit
    }

    /// Frees memory that an idle connection does not need.
    pub fn rest(&mut self, now: u64) {
        if now.saturating_sub(self.moved_at) > REST_AFTER {
            self.out.rest();
        }
    }

    /// Does what can be done now.
    pub fn progress(&mut self, volume: &mut Volume, shared: &mut Shared, now: u64) -> Progress {
        match self.try_progress(volume, shared, now) {
            Ok(progress) => progress,
            Err(error) => {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::debug!(%error, "an NBD connection ends");
                }
                Progress::Closed
            }
        }
    }

    fn try_progress(
        &mut self,
        volume: &mut Volume,
        shared: &mut Shared,
        now: u64,
    ) -> io::Result<Progress> {
        for round in 0.. {
            if let Phase::Handshake(_) = self.phase {
                self.moved_at = self.moved_at.min(now);
                if !self.shake(volume, shared)? {
                    return Ok(Progress::Closed);
                }
            }
            if let Phase::Transmission { limits, disk } = self.phase {
                match self.requests(volume, shared, limits, disk, now)? {
                    Progress::Input => {}
                    other => return Ok(other),
                }
            }
            // Fairness: others first. Only after what was received is done: nothing but
            // the socket, which may be empty by now, brings us here again.
            if round == ROUNDS || !self.receive(now)? {
                break;
            }
        }
        Ok(Progress::Input)
    }

    /// Steps the handshake; false when it ended the connection.
    fn shake(&mut self, volume: &Volume, shared: &Shared) -> io::Result<bool> {
        let Phase::Handshake(handshake) = &mut self.phase else { return Ok(true) };
        loop {
            let Some(event) = handshake.poll_event() else {
                let taken = handshake.handle_bytes(&self.window[self.start..self.end]);
                self.start += taken;
                match taken {
                    0 => return Ok(true),
                    _ => continue,
                }
            };
            match event {
                HandshakeEvent::Send(bytes) => self.out.add(|o| o.extend_from_slice(&bytes)),
                // Never offered: the socket is of this machine.
                HandshakeEvent::StartTls => return Ok(false),
                HandshakeEvent::ListExports => handshake.listed(shared.exports.iter()),
                HandshakeEvent::OpenExport { name, .. } => {
                    let name = default_export(&name, &shared.exports);
                    let found = shared.exports.iter().position(|e| e == name);
                    handshake.opened(match found {
                        Some(index) => Ok(export_info(volume, index)),
                        None => Err(OpenError::Unknown(name.to_owned())),
                    });
                }
                HandshakeEvent::Transmission(negotiated) => {
                    let name = default_export(&negotiated.name, &shared.exports);
                    let disk = shared.exports.iter().position(|e| e == name).unwrap_or(0) as u8;
                    self.phase = Phase::Transmission { limits: Limits::new(&negotiated), disk };
                    return Ok(true);
                }
                HandshakeEvent::Close(why) => {
                    tracing::debug!(why, "an NBD handshake ends");
                    let _ = self.send();
                    return Ok(false);
                }
            }
        }
    }

    fn requests(
        &mut self,
        volume: &mut Volume,
        shared: &mut Shared,
        limits: Limits,
        disk: u8,
        now: u64,
    ) -> io::Result<Progress> {
        loop {
            if self.out.len() > OUT_MAX || self.waiting_bytes > IN_FLIGHT_MAX {
                return Ok(Progress::Output);
            }
            match self.step_job(volume, shared, limits, disk, now)? {
                Some(progress) => return Ok(progress),
                None if self.job.is_some() => continue,
                None => {}
            }
            if self.goodbye {
                let idle = self.waiting.is_empty() && !self.has_output();
                return Ok(if idle { Progress::Closed } else { Progress::Output });
            }
            let window = &self.window[self.start..self.end];
            let bad = |e| io::Error::new(io::ErrorKind::InvalidData, e);
            let Some((header, decision)) = parse(window, &limits).map_err(bad)? else {
                return Ok(Progress::Input);
            };
            self.moved_at = now;
            let payload = payload_len(&header) as usize;
            let in_window = window.len() - REQUEST_LEN >= payload;
            if let Decision::Run(Request::Write { offset, fua, .. }) = decision {
                if in_window {
                    let from = self.start + REQUEST_LEN;
                    self.start = from + payload;
                    self.write_now(
                        volume,
                        limits,
                        disk,
                        (header, offset, fua),
                        from..from + payload,
                    );
                    continue;
                }
                if payload <= SMALL {
                    self.ahead = WINDOW;
                    return Ok(Progress::Input);
                }
                match self.begin_payload(volume, shared, disk, (header, offset, fua)) {
                    Some(progress) => return Ok(progress),
                    None => continue,
                }
            }
            self.ahead = WINDOW;
            self.start += REQUEST_LEN;
            self.decide(volume, limits, disk, header, decision);
            if matches!(decision, Decision::Close) {
                return Ok(Progress::Closed);
            }
        }
    }

    /// Carries on with a request that was begun. None: go on.
    fn step_job(
        &mut self,
        volume: &mut Volume,
        shared: &mut Shared,
        limits: Limits,
        disk: u8,
        now: u64,
    ) -> io::Result<Option<Progress>> {
        match self.job.take() {
            None => Ok(None),
            Some(Job::Fill { header, offset, fua, buf, filled }) => {
                let (buf, filled) = self.fill_payload(volume, &header, buf, filled, now)?;
                if filled < header.len as usize {
                    self.job = Some(Job::Fill { header, offset, fua, buf, filled });
                    return Ok(Some(Progress::Input));
                }
                self.payload_done(volume, shared, limits, disk, (header, offset, fua), buf);
                Ok(None)
            }
            Some(Job::Admit { header, offset, fua, buf, mut done }) => {
                let result = admit_write(volume, disk, offset, &buf, &mut done, fua);
                if matches!(result, Err(Refusal::Stalled)) {
                    self.job = Some(Job::Admit { header, offset, fua, buf, done });
                    return Ok(Some(Progress::Room));
                }
                if self.reserved > 0 {
                    self.give_back(shared);
                    shared.buffers.give(buf);
                }
                self.admitted(volume, limits, header, fua, result);
                Ok(None)
            }
            Some(Job::Zero { header, offset, len, flags, trim, mut done }) => {
                let mut end = Ok(0);
                while done < len {
                    end = volume.zero(disk, offset + done, len - done, flags, trim).map(
                        |(n, end)| {
                            done += n;
                            end
                        },
                    );
                    if end.is_err() {
                        break;
                    }
                }
                if matches!(end, Err(Refusal::Stalled)) {
                    self.job = Some(Job::Zero { header, offset, len, flags, trim, done });
                    return Ok(Some(Progress::Room));
                }
                self.admitted(volume, limits, header, flags.fua, end);
                Ok(None)
            }
            Some(Job::Ask { header, request }) if !volume.can_read() => {
                self.job = Some(Job::Ask { header, request });
                Ok(Some(Progress::Room))
            }
            Some(Job::Ask { header, request }) => {
                self.run(volume, limits, disk, header, request);
                Ok(self.job.is_some().then_some(Progress::Room))
            }
            Some(Job::Drain { header, left, errno }) => {
                self.drain_payload(limits, header, left, errno, now)
            }
        }
    }

    /// A write whose payload is in the window.
    fn write_now(
        &mut self,
        volume: &mut Volume,
        limits: Limits,
        disk: u8,
        (header, offset, fua): (Header, u64, bool),
        range: std::ops::Range<usize>,
    ) {
        let mut done = 0;
        let data = &self.window[range];
        let result = admit_write(volume, disk, offset, data, &mut done, fua);
        if matches!(result, Err(Refusal::Stalled)) {
            let buf = data.to_vec();
            self.job = Some(Job::Admit { header, offset, fua, buf, done });
            return;
        }
        self.admitted(volume, limits, header, fua, result);
    }

    /// Answers an admitted change, or waits for it to be durable.
    fn admitted(
        &mut self,
        volume: &mut Volume,
        limits: Limits,
        header: Header,
        fua: bool,
        result: Result<u64, Refusal>,
    ) {
        match result {
            Err(Refusal::Fail(errno)) => {
                self.out.add(|o| reply_error(o, limits.structured, &header, errno));
            }
            Ok(end) if fua => {
                let token = self.wait(header, 0, false);
                if volume.wait_durable(end, token) {
                    self.handle_durable(token);
                }
            }
            Ok(_) | Err(Refusal::Stalled) => {
                self.out.add(|o| reply_ok(o, limits.structured, &header))
            }
        }
    }

    fn decide(
        &mut self,
        volume: &mut Volume,
        limits: Limits,
        disk: u8,
        header: Header,
        decision: Decision,
    ) {
        let structured = limits.structured;
        match decision {
            Decision::Empty => self.out.add(|o| reply_ok(o, structured, &header)),
            Decision::Refuse(errno) => self.out.add(|o| reply_error(o, structured, &header, errno)),
            Decision::Drain { len, errno } => {
                self.job = Some(Job::Drain { header, left: u64::from(len), errno });
            }
            Decision::Goodbye => self.goodbye = true,
            Decision::Close => {}
            Decision::Run(request) => self.run(volume, limits, disk, header, request),
        }
    }

    fn run(
        &mut self,
        volume: &mut Volume,
        limits: Limits,
        disk: u8,
        header: Header,
        request: Request,
    ) {
        let structured = limits.structured;
        match request {
            Request::Read { offset, len, .. } => {
                let token = self.wait(header, u64::from(len), false);
                let buf = self.out.buffer(len as usize);
                match volume.read(token, disk, offset, buf) {
                    ReadOutcome::Done(data) => self.handle_read(token, Ok(data)),
                    ReadOutcome::Pending => {}
                    ReadOutcome::Held(buf) => {
                        self.take(token);
                        self.out.give(buf);
                        self.job = Some(Job::Ask { header, request });
                    }
                }
            }
            Request::Flush => {
                let token = self.wait(header, 0, false);
                if volume.flush(token) {
                    self.handle_durable(token);
                }
            }
            Request::BlockStatus { offset, len, one } => {
                if !limits.contexts.has(Context::Allocation) {
                    // No question to the file: the answer is in memory.
                    return self.add_dirty(volume, disk, header, one);
                }
                if !volume.can_read() {
                    self.job = Some(Job::Ask { header, request });
                    return;
                }
                let token = self.wait(header, EXTENTS_COST, one);
                volume.extents(token, disk, offset, u64::from(len));
            }
            Request::Cache { .. } => self.out.add(|o| reply_ok(o, structured, &header)),
            Request::Trim { offset, len, fua } => {
                let flags = ZeroFlags { fua, ..ZeroFlags::default() };
                let len = u64::from(len);
                self.job = Some(Job::Zero { header, offset, len, flags, trim: true, done: 0 });
            }
            Request::Zero { offset, len, flags } => {
                let len = u64::from(len);
                self.job = Some(Job::Zero { header, offset, len, flags, trim: false, done: 0 });
            }
            Request::Write { .. } => unreachable!("writes are handled with their payload"),
        }
    }

    fn wait(&mut self, header: Header, bytes: u64, one: bool) -> u64 {
        let bytes = bytes.max(WAIT_COST);
        let seq = self.next_seq;
        self.next_seq = self.next_seq.wrapping_add(1);
        self.waiting.insert(seq, Waiting { header, bytes, one });
        self.waiting_bytes += bytes;
        self.id << 32 | u64::from(seq)
    }

    fn take(&mut self, token: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&(token as u32))?;
        self.waiting_bytes -= waiting.bytes;
        Some(waiting)
    }

    fn structured(&self) -> bool {
        matches!(self.phase, Phase::Transmission { limits, .. } if limits.structured)
    }

    /// What a request waited for is durable.
    pub fn handle_durable(&mut self, token: u64) {
        let structured = self.structured();
        if let Some(waiting) = self.take(token) {
            self.out.add(|o| reply_ok(o, structured, &waiting.header));
        }
    }

    /// What a request waited for cannot be made durable.
    pub fn handle_lost(&mut self, token: u64) {
        let structured = self.structured();
        if let Some(waiting) = self.take(token) {
            self.out.add(|o| reply_error(o, structured, &waiting.header, Errno::Io));
        }
    }

    /// A read's bytes are there.
    pub fn handle_read(&mut self, token: u64, result: Result<Vec<u8>, Errno>) {
        let structured = self.structured();
        let Some(Waiting { header, .. }) = self.take(token) else { return };
        match result {
            Ok(data) => {
                let Header { cookie, offset, len, .. } = header;
                self.out.add(|o| reply_data(o, structured, cookie, offset, len));
                self.out.add_data(data);
            }
            Err(errno) => self.out.add(|o| reply_error(o, structured, &header, errno)),
        }
    }

    /// The allocation of a range is known.
    pub fn handle_extents(
        &mut self,
        volume: &Volume,
        token: u64,
        result: Result<Vec<Extent>, Errno>,
    ) {
        let Phase::Transmission { limits, disk } = self.phase else { return };
        let Some(Waiting { header, one, .. }) = self.take(token) else { return };
        match result {
            Ok(extents) => {
                let extents = &extents[..extents.len().min(extents_max(one))];
                let more = limits.contexts.has(Context::Dirty);
                self.out.add(|o| allocation_status(o, header.cookie, extents, !more));
                if more {
                    self.add_dirty(volume, disk, header, one);
                }
            }
            Err(errno) => self.out.add(|o| reply_error(o, limits.structured, &header, errno)),
        }
    }

    /// Ends an answer with what the target may lack now.
    fn add_dirty(&mut self, volume: &Volume, disk: u8, header: Header, one: bool) {
        let len = u64::from(header.len);
        let extents = volume.dirty(disk, header.offset, len, extents_max(one));
        self.out.add(|o| dirty_status(o, header.cookie, &extents, true));
    }

    /// Sends what is there; what the socket does not take stays.
    pub fn flush_output(&mut self, now: u64) -> io::Result<()> {
        // The handshake's time is for the whole of it.
        if self.send()? > 0 && !matches!(self.phase, Phase::Handshake(_)) {
            self.moved_at = now;
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<usize> {
        let mut total = 0;
        while !self.out.is_empty() {
            let socket = &self.socket;
            let send = |slices: &[IoSlice<'_>]| match slices {
                [one] => Ok(rustix::net::send(socket, one, SendFlags::NOSIGNAL)?),
                all => (&*socket).write_vectored(all),
            };
            match self.out.write_with(send) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => total += other?,
            }
        }
        Ok(total)
    }

    /// Receives into the window; false when the socket has nothing now.
    fn receive(&mut self, now: u64) -> io::Result<bool> {
        if std::mem::take(&mut self.drained) {
            return Ok(false);
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.window.len() - self.end < WINDOW / 2 {
            self.window.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut window = std::mem::take(&mut self.window);
        let room = (window.len() - self.end).min(self.ahead);
        let count = self.recv_into(&mut window[self.end..self.end + room]);
        self.window = window;
        let count = count?;
        self.end += count;
        self.drained = count > 0 && count < room;
        if count > 0 && !matches!(self.phase, Phase::Handshake(_)) {
            self.moved_at = now;
        }
        Ok(count > 0)
    }

    /// Receives some bytes; 0 when there are none now. The end is an error.
    fn recv_into(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            return match rustix::net::recv(&self.socket, &mut *buf, RecvFlags::empty()) {
                Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((count, _)) => {
                    self.received = self.received.wrapping_add(count as u64);
                    Ok(count)
                }
                Err(rustix::io::Errno::AGAIN) => Ok(0),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Gives back what it reserved. What it did not finish never happens (I12).
    pub fn close(mut self, volume: &mut Volume, shared: &mut Shared) {
        self.give_back(shared);
        volume.forget(self.id);
    }
}

/// Admits what is left of a payload; the position that FUA waits for.
fn admit_write(
    volume: &mut Volume,
    disk: u8,
    offset: u64,
    data: &[u8],
    done: &mut usize,
    fua: bool,
) -> Result<u64, Refusal> {
    let mut end = 0;
    while *done < data.len() {
        let (count, reached) = volume.write(disk, offset + *done as u64, &data[*done..], fua)?;
        *done += count;
        end = reached;
    }
    Ok(end)
}

fn extents_max(one: bool) -> usize {
    if one { 1 } else { EXTENTS_MAX }
}

fn export_info(volume: &Volume, index: usize) -> ExportInfo {
    let disk = &volume.disks()[index];
    ExportInfo {
        size: disk.size,
        read_only: false,
        multi_conn: true,
        block_min: 1,
        block_preferred: 4096,
        fast_zero: true,
        trim: true,
        dirty_map: true,
        description: format!("protected disk {}", disk.name),
    }
}

/// Receive window, bytes.
const WINDOW: usize = 256 << 10;
/// Payloads up to this wait in the window until they are complete.
const SMALL: usize = 64 << 10;
/// No request is begun while more than this waits to be sent, bytes.
const OUT_MAX: usize = 4 << 20;
/// No request is begun while reads of more than this are under way, bytes.
const IN_FLIGHT_MAX: u64 = 16 << 20;
/// What a request that waits counts at least, bytes: it bounds their number.
const WAIT_COST: u64 = 4096;
/// Receives in a row before the others get their turn.
const ROUNDS: usize = 16;
/// Payload buffers kept for later, bytes.
const BUFFERS_KEEP: usize = 8 << 20;
/// A connection is idle after this, microseconds.
const REST_AFTER: u64 = 1_000_000;
/// The whole handshake, microseconds.
const HANDSHAKE_MAX: u64 = 10_000_000;
/// A payload or the sending of answers that does not move, microseconds.
const STALL_MAX: u64 = 30_000_000;
