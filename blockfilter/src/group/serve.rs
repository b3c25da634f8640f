//! The loop of a filter process: wait, let ready connections do their requests, let the
//! volume take a turn, hand out what became ready, send.
//!
//! One thread owns everything. It waits in one place for sockets, the engine's
//! eventfd and the next timer (`wait.rs`). The control socket is served here too, so that
//! positions are always consistent.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::net::sockopt;
use rustix::time::Timespec;

use super::awake::Awake;
use super::conn::{Conn, Progress, Shared};
use super::ctl::{Ask, Ctl};
use super::seat::Seat;
use super::undrained;
use super::volume::{Volume, VolumeEvent};
use crate::config::{GroupConfig, GroupPaths};
use crate::control::Reply;
use crate::engine::Clock;

mod wait;

use wait::Wait;

/// A filter process's state.
#[derive(Debug)]
pub struct Server {
    /// First: it is given up before the volume waits for what is under way.
    awake: Awake,
    volume: Volume,
    shared: Shared,
    clock: Arc<dyn Clock>,
    epoll: OwnedFd,
    nbd: UnixListener,
    control: UnixListener,
    conns: BTreeMap<u64, (Conn, u32)>,
    ctls: BTreeMap<u64, Ctl>,
    /// Connections that wait for room, first come first served.
    waiting: VecDeque<u64>,
    /// Those that wait for the payload budget, and its use when they were last tried.
    budget: VecDeque<u64>,
    staged_seen: u64,
    next_id: u64,
    swept_at: u64,
    stopping: Option<(u64, bool)>,
    seat: Seat,
    wait: Wait,
}

impl Server {
    /// Listens on the group's sockets. A stale socket file is replaced; one
    /// that somebody serves is `AddrInUse`.
    pub fn new(mut volume: Volume, config: &GroupConfig, paths: &GroupPaths) -> io::Result<Self> {
        settle(&mut volume)?;
        let clock = volume.clock();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let nbd = listen(&paths.nbd_socket())?;
        let control = listen(&paths.filter_socket())?;
        let add = |fd: BorrowedFd<'_>, id: u64| {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(id), epoll::EventFlags::IN)
        };
        add(volume.fd(), ENGINE)?;
        add(nbd.as_fd(), NBD)?;
        add(control.as_fd(), CONTROL)?;
        let exports = config.disks.iter().map(|d| config.export(&d.disk)).collect();
        let shared = Shared::new(exports, config.arena_bytes / 2);
        let seat = Seat::new(volume.seat());
        Ok(Self {
            awake: Awake::new(),
            volume,
            shared,
            clock,
            epoll,
            nbd,
            control,
            conns: BTreeMap::new(),
            ctls: BTreeMap::new(),
            waiting: VecDeque::new(),
            budget: VecDeque::new(),
            staged_seen: 0,
            next_id: FIRST_ID,
            swept_at: 0,
            stopping: None,
            seat,
            wait: Wait::default(),
        })
    }

    /// Serves until a Stop is carried out.
    pub fn run(mut self) -> io::Result<()> {
        let mut ready: Vec<epoll::Event> = Vec::with_capacity(256);
        let mut events = Vec::new();
        let mut touched: Vec<u64> = Vec::new();
        while !self.finished() {
            self.round(&mut ready, &mut touched, &mut events)?;
        }
        self.finish()
    }

    /// Waits once and does what there is. All three are scratch.
    fn round(
        &mut self,
        ready: &mut Vec<epoll::Event>,
        touched: &mut Vec<u64>,
        events: &mut Vec<VolumeEvent>,
    ) -> io::Result<()> {
        let now = self.wait(ready, touched)?;
        for event in ready {
            match event.data.u64() {
                ENGINE => self.volume.clear(),
                NBD | CONTROL => self.accept(event.data.u64(), now),
                id => {
                    touched.push(id);
                    self.ready(id, event.flags, now);
                }
            }
        }
        let alone = self.wait.is_alone(now);
        self.volume.set_alone(alone);
        if alone && self.volume.is_awaited() {
            // The commit will keep this thread: what is ready goes first.
            self.send(touched, now);
        }
        self.turn(events, touched, now);
        touched.sort_unstable();
        touched.dedup();
        self.send(touched, now);
        self.sweep(now);
        Ok(())
    }

    /// The volume's turn, until nothing new comes of it.
    fn turn(&mut self, events: &mut Vec<VolumeEvent>, touched: &mut Vec<u64>, now: u64) {
        loop {
            let room = self.volume.turn(events);
            let any = !events.is_empty();
            for event in events.drain(..) {
                let (VolumeEvent::Durable(token)
                | VolumeEvent::Lost(token)
                | VolumeEvent::Read { token, .. }
                | VolumeEvent::Extents { token, .. }) = &event;
                let (token, id) = (*token, *token >> 32);
                touched.push(id);
                if let Some(ctl) = self.ctls.get_mut(&id) {
                    match event {
                        VolumeEvent::Lost(_) => ctl.handle_lost(),
                        _ => ctl.handle_durable(token, &self.volume),
                    }
                } else if let Some((conn, _)) = self.conns.get_mut(&id) {
                    match event {
                        VolumeEvent::Durable(_) => conn.handle_durable(token),
                        VolumeEvent::Lost(_) => conn.handle_lost(token),
                        VolumeEvent::Read { result, .. } => conn.handle_read(token, result),
                        VolumeEvent::Extents { result, .. } => {
                            conn.handle_extents(&self.volume, token, result);
                        }
                    }
                }
            }
            let requests = self.control_turn(touched, now);
            let mut again = VecDeque::new();
            if room {
                again.append(&mut self.waiting);
            }
            if self.shared.staged < self.staged_seen {
                again.append(&mut self.budget);
            }
            self.staged_seen = self.shared.staged;
            if !any && !requests && again.is_empty() {
                break;
            }
            for id in again {
                touched.push(id);
                self.progress(id, now);
            }
        }
    }

    /// Lets control connections look at what they wait for, then at what came behind it.
    /// True if that started something.
    fn control_turn(&mut self, touched: &mut Vec<u64>, now: u64) -> bool {
        let mut ready = Vec::new();
        for (id, ctl) in &mut self.ctls {
            if ctl.turn(&mut self.volume, now) {
                touched.push(*id);
            }
            if ctl.has_request() && self.stopping.is_none_or(|(by, _)| by != *id) {
                ready.push(*id);
            }
        }
        let connections = self.conns.len() as u32;
        for id in &ready {
            let Some(ctl) = self.ctls.get_mut(id) else { continue };
            let asked = ctl.next_request(&mut self.volume, connections, now);
            self.handle_asked(*id, asked);
        }
        !ready.is_empty()
    }

    fn ready(&mut self, id: u64, flags: epoll::EventFlags, now: u64) {
        if let Some((_, interest)) = self.conns.get(&id) {
            self.wait.saw(id, now);
            self.awake.heard();
            let reads = interest & epoll::EventFlags::IN.bits() != 0;
            if !reads && flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
                // Nobody waits for the answer; what is not admitted never happens (I12).
                self.close(id);
                return;
            }
            self.progress(id, now);
            return;
        }
        let Some(ctl) = self.ctls.get_mut(&id) else { return };
        let asked = ctl.receive(&mut self.volume, self.conns.len() as u32, now);
        self.handle_asked(id, asked);
    }

    fn handle_asked(&mut self, id: u64, asked: io::Result<Option<Ask>>) {
        match asked {
            Ok(None) => {}
            Ok(Some(Ask::Stop { drain })) => {
                self.stopping.get_or_insert((id, drain));
                self.stop_clients(drain);
            }
            Err(_) => self.close_control(id),
        }
    }

    fn close_control(&mut self, id: u64) {
        self.ctls.remove(&id);
        self.volume.forget(id);
    }

    fn progress(&mut self, id: u64, now: u64) {
        let Some((conn, _)) = self.conns.get_mut(&id) else { return };
        match conn.progress(&mut self.volume, &mut self.shared, now) {
            Progress::Closed => self.close(id),
            Progress::Room => {
                queue_once(&mut self.waiting, id);
                self.interest(id, false, false);
            }
            Progress::Budget => {
                queue_once(&mut self.budget, id);
                self.staged_seen = self.staged_seen.max(self.shared.staged);
                self.interest(id, false, false);
            }
            Progress::Output => self.interest(id, false, false),
            Progress::Input => self.interest(id, true, false),
        }
    }

    fn send(&mut self, touched: &[u64], now: u64) {
        for id in touched {
            if let Some(ctl) = self.ctls.get_mut(id) {
                if ctl.send().is_err() {
                    self.close_control(*id);
                }
                continue;
            }
            // Requests may have waited in the window for answers to leave: as long as
            // all of them leave at once nothing else would wake this connection.
            while let Some((conn, old)) = self.conns.get_mut(id) {
                let had = conn.has_output();
                if conn.flush_output(now).is_err() {
                    self.close(*id);
                    break;
                }
                let left = conn.has_output();
                let input = *old & epoll::EventFlags::IN.bits() != 0;
                if !had || left || input || self.is_queued(*id) {
                    self.interest(*id, input, left);
                    break;
                }
                self.progress(*id, now);
            }
        }
    }

    fn is_queued(&self, id: u64) -> bool {
        self.waiting.contains(&id) || self.budget.contains(&id)
    }

    fn accept(&mut self, from: u64, now: u64) {
        for _ in 0..ACCEPT_MAX {
            let listener = if from == CONTROL { &self.control } else { &self.nbd };
            let socket = match listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::warn!(%error, "a connection cannot be accepted");
                    }
                    return;
                }
            };
            if let Err(error) = self.admit_socket(from, socket, now) {
                tracing::warn!(%error, "a connection cannot be set up");
            }
        }
    }

    fn admit_socket(&mut self, from: u64, socket: UnixStream, now: u64) -> io::Result<()> {
        let limit = if from == CONTROL { CONTROLS_MAX } else { CONNECTIONS_MAX };
        let count = if from == CONTROL { self.ctls.len() } else { self.conns.len() };
        if count >= limit || self.stopping.is_some() {
            return Ok(());
        }
        socket.set_nonblocking(true)?;
        let id = self.next_id;
        self.next_id += 1;
        let data = epoll::EventData::new_u64(id);
        let flags = epoll::EventFlags::IN;
        epoll::add(&self.epoll, socket.as_fd(), data, flags)?;
        if from == CONTROL {
            self.ctls.insert(id, Ctl::new(id, socket));
            return Ok(());
        }
        let _ = sockopt::set_socket_send_buffer_size(socket.as_fd(), SOCKET_BUFFER);
        let _ = sockopt::set_socket_recv_buffer_size(socket.as_fd(), SOCKET_BUFFER);
        let conn = Conn::new(id, socket, now);
        self.conns.insert(id, (conn, flags.bits()));
        // The greeting.
        self.progress(id, now);
        self.send(&[id], now);
        Ok(())
    }

    fn close(&mut self, id: u64) {
        if let Some((mut conn, _)) = self.conns.remove(&id) {
            let _ = conn.flush_output(0);
            self.wait.forget(id);
            let _ = epoll::delete(&self.epoll, conn.fd());
            conn.close(&mut self.volume, &mut self.shared);
        }
        self.waiting.retain(|w| *w != id);
        self.budget.retain(|w| *w != id);
    }

    /// Closes connections that keep something waiting for too long.
    fn sweep(&mut self, now: u64) {
        if now < self.swept_at + SWEEP_EVERY {
            return;
        }
        self.swept_at = now;
        self.conns.values_mut().for_each(|(conn, _)| conn.rest(now));
        self.shared.rest();
        let stuck = |(id, (conn, _)): (&u64, &(Conn, u32))| conn.is_stuck(now).then_some(*id);
        for id in self.conns.iter().filter_map(stuck).collect::<Vec<_>>() {
            tracing::debug!("an NBD connection stalled and is closed");
            self.close(id);
        }
    }

    fn stop_clients(&mut self, drain: bool) {
        for id in self.conns.keys().copied().collect::<Vec<_>>() {
            self.close(id);
        }
        if drain {
            self.volume.filter().request_drain();
        } else {
            self.volume.filter().request_commit();
        }
    }

    fn finished(&mut self) -> bool {
        match self.stopping {
            None => false,
            Some((_, true)) => {
                let filter = self.volume.filter();
                filter.drained() || filter.drain_fails()
            }
            Some((_, false)) => {
                let positions = self.volume.positions();
                positions.durable >= positions.admitted || self.volume.filter().promises_nothing()
            }
        }
    }

    fn finish(mut self) -> io::Result<()> {
        let Some((id, drain)) = self.stopping else { return Ok(()) };
        let failed = if drain { undrained(self.volume.filter()) } else { None };
        if drain && failed.is_none() {
            self.volume.remove_arena();
        }
        if let Some(ctl) = self.ctls.get_mut(&id) {
            ctl.answer(&match &failed {
                Some(error) => Reply::Failed { message: error.to_string() },
                None => Reply::Stopped,
            });
            let _ = ctl.send();
        }
        failed.map_or(Ok(()), |error| Err(io::Error::other(error)))
    }
}

fn queue_once(queue: &mut VecDeque<u64>, id: u64) {
    if !queue.contains(&id) {
        queue.push_back(id);
    }
}

/// Runs the volume until the first super block, which says that the journal is in
/// use, is durable: nothing is served before.
pub fn settle(volume: &mut Volume) -> io::Result<()> {
    let due = volume.filter().super_seq_due();
    wait_until(volume, |v| {
        v.filter().super_seq() >= due || v.positions().mode == crate::control::Mode::Unjournaled
    })
}

/// Takes turns until `done`.
pub fn wait_until(
    volume: &mut Volume,
    mut done: impl FnMut(&mut Volume) -> bool,
) -> io::Result<()> {
    let mut events = Vec::new();
    loop {
        volume.clear();
        volume.turn(&mut events);
        events.clear();
        if done(volume) {
            return Ok(());
        }
        let now = volume.clock().mono_us();
        let left = volume.timeout().map_or(POLL_US, |due| due.saturating_sub(now).min(POLL_US));
        let mut fds = [PollFd::from_borrowed_fd(volume.fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&timespec(left))) {
            Err(rustix::io::Errno::INTR) => {}
            other => {
                other?;
            }
        }
    }
}

fn timespec(us: u64) -> Timespec {
    Timespec { tv_sec: (us / 1_000_000) as i64, tv_nsec: (us % 1_000_000 * 1000) as i64 }
}

/// Longest wait before the volume is looked at again, microseconds.
const POLL_US: u64 = 20_000;

/// Listens on a Unix socket, replacing a stale one.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("{} is served", path.display()),
        ));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    rustix::fs::chmod(path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

const ENGINE: u64 = 0;
const NBD: u64 = 1;
const CONTROL: u64 = 3;
const FIRST_ID: u64 = 16;
/// NBD connections at a time.
const CONNECTIONS_MAX: usize = 256;
/// Control connections at a time.
const CONTROLS_MAX: usize = 64;
/// Connections accepted in a row.
const ACCEPT_MAX: usize = 16;
/// Between looks for stalled connections, microseconds.
const SWEEP_EVERY: u64 = 1_000_000;
/// SO_SNDBUF and SO_RCVBUF, bytes.
const SOCKET_BUFFER: usize = 2 << 20;
