//! How the loop waits: awake while that pays, and with one connection outside of epoll.
//!
//! While one connection alone sends anything it is not in epoll. What its client sends then
//! has nobody to tell, for which the client paid with each send, and the loop
//! receives without asking first. It sleeps on that socket and on epoll's own
//! descriptor, so nothing is missed.

use std::io;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, epoll, poll};

use super::super::ctl::Ctl;
use super::super::seat::Beside;
use super::super::volume::Commit;
use super::{SWEEP_EVERY, Server, timespec};

/// What was learned from the last waits.
#[derive(Debug, Default)]
pub(super) struct Wait {
    spin: Spin,
    alone: Alone,
    /// The connection that is not in epoll.
    direct: Option<u64>,
    /// What was asked for last was there at once: it is received from without asking.
    eager: bool,
    /// When the others were asked last, monotonic microseconds.
    asked_at: u64,
}

impl Wait {
    /// A connection sent something.
    pub(super) fn saw(&mut self, id: u64, now: u64) {
        self.alone.saw(id, now);
    }

    /// A connection ended.
    pub(super) fn forget(&mut self, id: u64) {
        self.direct = self.direct.filter(|direct| *direct != id);
    }

    /// No other connection than the last sent anything for a while.
    pub(super) fn is_alone(&self, now: u64) -> bool {
        self.alone.is(now)
    }
}

/// Whether waiting awake pays: it did the last time, or it is time to try again.
#[derive(Debug, Default)]
struct Spin {
    skip: u32,
    lost: u32,
}

impl Spin {
    fn begin(&mut self) -> bool {
        let now = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        now
    }

    /// `waited`: it came meanwhile. What was there at once says nothing: beside a client on the same processor
    /// all that comes does so while this sleeps.
    fn found(&mut self, waited: bool) {
        if waited {
            self.lost = 0;
        }
    }

    /// `preempted`: somebody else needs this processor.
    fn lost(&mut self, preempted: bool) {
        self.lost = if preempted { SPIN_SKIP_MAX } else { (self.lost * 2 + 1).min(SPIN_SKIP_MAX) };
        self.skip = self.lost;
    }
}

/// Which connection was active last, and until when others were.
#[derive(Debug, Default)]
struct Alone {
    last: u64,
    others_until: u64,
}

impl Alone {
    fn saw(&mut self, id: u64, now: u64) {
        if self.last != id {
            (self.last, self.others_until) = (id, now);
        }
    }

    fn is(&self, now: u64) -> bool {
        now >= self.others_until + ALONE_AFTER
    }
}

impl Server {
    /// Waits for something to do: awake for as long as that was worth it lately. What epoll
    /// tells is in `ready`, a connection that was served already in `touched`. Returns the time.
    pub(super) fn wait(
        &mut self,
        ready: &mut Vec<epoll::Event>,
        touched: &mut Vec<u64>,
    ) -> io::Result<u64> {
        ready.clear();
        touched.clear();
        let start = self.clock.mono_us();
        self.awake.look(start);
        let beside = self.beside(start);
        if self.seat.look(start, beside) {
            self.wait.spin = Spin::default();
        }
        self.choose_direct(start);
        if self.wait.eager && start < self.wait.asked_at + ASK_EVERY {
            if self.receive_direct(touched, start) {
                return Ok(start);
            }
            self.wait.eager = false;
        }
        let due = self.due(start);
        let start = self.clock.mono_us();
        let mut now = start;
        if due > start && self.wait.spin.begin() {
            let until = due.min(start + SPIN_MAX);
            loop {
                if self.look(now, 0, ready, touched)? {
                    self.wait.eager = now == start;
                    self.wait.spin.found(now > start);
                    return Ok(now);
                }
                let before = now;
                now = self.clock.mono_us();
                if now >= until || now - before > SPIN_MAX {
                    self.wait.spin.lost(now - before > SPIN_MAX);
                    self.wait.eager = false;
                    break;
                }
            }
        }
        self.look(now, due.saturating_sub(now), ready, touched)?;
        Ok(self.clock.mono_us())
    }

    fn beside(&mut self, now: u64) -> Beside {
        if self.ctls.values().any(Ctl::follows) {
            return Beside::Copy;
        }
        match self.volume.commits(now) {
            Some(Commit::Small) => Beside::Commits,
            Some(Commit::Batch) => Beside::Batches,
            None if self.volume.is_applying() => Beside::WriteBack,
            None if self.volume.has_unapplied() => Beside::Unapplied,
            Some(Commit::Elsewhere) | None => Beside::Nothing,
        }
    }

    /// When something is due though nothing happens; monotonic microseconds.
    fn due(&self, now: u64) -> u64 {
        let ctl = self.ctls.values().filter_map(Ctl::deadline).min();
        let ours = self.awake.due().into_iter().chain(self.seat.due());
        let due = self.volume.timeout().into_iter().chain(ctl).chain(ours).min();
        due.unwrap_or(u64::MAX).min(now + SWEEP_EVERY)
    }

    /// Waits for at most so long, and takes what is ready; true if there was anything.
    fn look(
        &mut self,
        now: u64,
        us: u64,
        ready: &mut Vec<epoll::Event>,
        touched: &mut Vec<u64>,
    ) -> io::Result<bool> {
        self.wait.asked_at = now;
        let direct = self.wait.direct.and_then(|id| self.conns.get(&id));
        let Some((conn, _)) = direct else {
            self.poll(ready, us)?;
            return Ok(!ready.is_empty());
        };
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = [readable(self.epoll.as_fd()), readable(conn.fd())];
        match poll(&mut fds, Some(&timespec(us))) {
            Err(rustix::io::Errno::INTR) | Ok(0) => return Ok(false),
            other => other?,
        };
        let [others, readable] = fds.map(|fd| !fd.revents().is_empty());
        if others {
            self.poll(ready, 0)?;
        }
        let now = if us > 0 { self.clock.mono_us() } else { now };
        Ok((readable && self.receive_direct(touched, now)) || !ready.is_empty())
    }

    fn poll(&self, ready: &mut Vec<epoll::Event>, us: u64) -> io::Result<()> {
        ready.clear();
        let room = rustix::buffer::spare_capacity(ready);
        match epoll::wait(&self.epoll, room, Some(&timespec(us))) {
            Err(rustix::io::Errno::INTR) => Ok(()),
            other => Ok(other.map(|_| ())?),
        }
    }

    /// Serves the connection that is not in epoll; true if it had sent anything.
    fn receive_direct(&mut self, touched: &mut Vec<u64>, now: u64) -> bool {
        let Some(id) = self.wait.direct else { return false };
        let Some((conn, _)) = self.conns.get(&id) else { return false };
        let before = conn.received();
        self.progress(id, now);
        if self.conns.get(&id).is_some_and(|(conn, _)| conn.received() == before) {
            return false;
        }
        self.wait.saw(id, now);
        self.awake.heard();
        touched.push(id);
        true
    }

    /// Takes a connection that is alone out of epoll, and one that is not any more back.
    fn choose_direct(&mut self, now: u64) {
        let (alone, id) = (self.wait.is_alone(now), self.wait.alone.last);
        if let Some(direct) = self.wait.direct {
            // If epoll does not take it now, it is served as it is, and tried again.
            if direct != id && self.put_back(direct).is_ok() {
                self.wait.direct = None;
            }
            return;
        }
        let Some((conn, interest)) = self.conns.get(&id) else { return };
        let reads = *interest == epoll::EventFlags::IN.bits();
        if alone && reads && epoll::delete(&self.epoll, conn.fd()).is_ok() {
            self.wait.direct = Some(id);
        }
    }

    /// Puts a connection back into epoll, with what it waits for now.
    fn put_back(&self, id: u64) -> rustix::io::Result<()> {
        let Some((conn, interest)) = self.conns.get(&id) else { return Ok(()) };
        let flags = epoll::EventFlags::from_bits_retain(*interest);
        epoll::add(&self.epoll, conn.fd(), epoll::EventData::new_u64(id), flags)
    }

    /// Polls for input only if the connection can use it, for output only if some did
    /// not leave at once: `send` comes after everything else.
    pub(super) fn interest(&mut self, id: u64, input: bool, output: bool) {
        let Some((conn, old)) = self.conns.get_mut(&id) else { return };
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN, input);
        flags.set(epoll::EventFlags::OUT, output);
        if *old == flags.bits() {
            return;
        }
        *old = flags.bits();
        if self.wait.direct != Some(id) {
            let data = epoll::EventData::new_u64(id);
            if let Err(error) = epoll::modify(&self.epoll, conn.fd(), data, flags) {
                tracing::warn!(%error, "a connection cannot be polled");
            }
            return;
        }
        self.wait.direct = None;
        if let Err(error) = self.put_back(id) {
            // Nobody would see when it can go on.
            tracing::warn!(%error, "a connection cannot be polled and ends");
            self.close(id);
        }
    }
}

/// Longest wait awake, microseconds: the answer of a client that has nothing else to do.
const SPIN_MAX: u64 = 50;
/// Longest time without asking the others, microseconds.
const ASK_EVERY: u64 = 20;
/// Most waits between two tries to wait awake.
const SPIN_SKIP_MAX: u32 = 255;
/// A connection is alone when no other sent anything for so long, microseconds.
const ALONE_AFTER: u64 = 10_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use super::*;
    use crate::config::{DiskConfig, GroupConfig, GroupPaths};
    use crate::engine::real::RealFiles;
    use crate::group::start;

    /// Microseconds.
    const WAIT: u64 = 30_000_000;
    const DISK: u64 = 4 << 20;

    fn server(dir: &Path) -> (Server, GroupPaths) {
        let group = "g".parse().unwrap();
        let paths = GroupPaths::new(dir, &group);
        std::fs::create_dir_all(paths.dir()).unwrap();
        let path = dir.join("d.img");
        std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
        let (disk, uuid) = ("d".parse().unwrap(), uuid::Uuid::new_v4());
        let config = GroupConfig {
            group,
            uuid: uuid::Uuid::new_v4(),
            disks: vec![DiskConfig { disk, path, uuid, size_bytes: DISK }],
            journal: paths.journal(),
            journal_bytes: 34 << 20,
            chunk_bytes: 4 << 20,
            arena_bytes: 8 << 20,
            fuse: None,
        };
        crate::journal::create(&RealFiles, &config, &mut |_, _| Ok(())).unwrap();
        let volume = start::open(&config, &paths).unwrap();
        (Server::new(volume, &config, &paths).unwrap(), paths)
    }

    #[test]
    fn only_what_comes_meanwhile_makes_it_worth_waiting_awake() {
        let mut spin = Spin::default();
        let mut tried = 0;
        for _ in 0..2000 {
            if spin.begin() {
                tried += 1;
                // Much is there at once in between.
                spin.found(false);
                spin.lost(false);
            }
        }
        assert!(tried < 20, "{tried}");
        while !spin.begin() {}
        for _ in 0..100 {
            spin.found(true);
            assert!(spin.begin());
        }
    }

    /// Rounds of the loop until `done`.
    fn rounds(server: &mut Server, mut done: impl FnMut(&Server) -> bool) {
        let (mut ready, mut touched, mut events) = (Vec::with_capacity(16), Vec::new(), Vec::new());
        let until = server.clock.mono_us() + WAIT;
        while !done(server) {
            server.round(&mut ready, &mut touched, &mut events).unwrap();
            assert!(server.clock.mono_us() < until);
        }
    }

    /// A client, and its connection.
    fn connect(server: &mut Server, paths: &GroupPaths) -> (UnixStream, u64) {
        let mut stream = UnixStream::connect(paths.nbd_socket()).unwrap();
        let client = std::thread::spawn(move || {
            nbd::client::handshake(&mut stream, b"g.d").unwrap();
            stream
        });
        rounds(server, |_| client.is_finished());
        let stream = client.join().unwrap();
        stream.set_nonblocking(true).unwrap();
        (stream, server.next_id - 1)
    }

    fn ask(stream: &mut UnixStream, command: u8, len: u32) {
        let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, command];
        request.extend([0; 16]);
        request.extend(len.to_be_bytes());
        stream.write_all(&request).unwrap();
    }

    /// Takes so many bytes of answers.
    fn answered(server: &mut Server, stream: &mut UnixStream, bytes: usize) {
        let mut left = vec![0; bytes];
        let mut done = 0;
        rounds(server, |_| {
            done += stream.read(&mut left[done..]).unwrap_or(0);
            done == bytes
        });
    }

    /// One request after the other until it is not in epoll any more.
    fn until_direct(server: &mut Server, (stream, id): &mut (UnixStream, u64)) {
        let until = server.clock.mono_us() + WAIT;
        while server.wait.direct != Some(*id) {
            ask(stream, 3, 0);
            answered(server, stream, 16);
            assert!(server.clock.mono_us() < until);
        }
    }

    /// A client whose connection is not in epoll, and one whose connection is.
    fn direct_beside_another(
        server: &mut Server,
        paths: &GroupPaths,
    ) -> ((UnixStream, u64), (UnixStream, u64)) {
        let other = connect(server, paths);
        let mut stream = connect(server, paths);
        until_direct(server, &mut stream);
        (stream, other)
    }

    #[test]
    fn a_connection_that_is_alone_is_served_without_epoll_and_others_are_heard_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let (mut server, paths) = server(dir.path());
        let mut first = connect(&mut server, &paths);
        until_direct(&mut server, &mut first);
        let id = first.1;
        assert!(epoll::delete(&server.epoll, server.conns[&id].0.fd()).is_err(), "it is not there");
        let mut second = connect(&mut server, &paths);
        rounds(&mut server, |server| server.wait.direct != Some(id));
        ask(&mut first.0, 3, 0);
        ask(&mut second.0, 3, 0);
        answered(&mut server, &mut first.0, 16);
        answered(&mut server, &mut second.0, 16);
        until_direct(&mut server, &mut second);
        ask(&mut first.0, 3, 0);
        answered(&mut server, &mut first.0, 16);
        // Whoever is left is alone again.
        drop(second);
        rounds(&mut server, |server| server.conns.len() == 1);
        until_direct(&mut server, &mut first);
        drop(first);
        rounds(&mut server, |server| server.conns.is_empty() && server.wait.direct.is_none());
    }

    #[test]
    fn answers_that_do_not_fit_the_socket_leave_though_its_connection_was_not_in_epoll() {
        let dir = tempfile::tempdir().unwrap();
        let (mut server, paths) = server(dir.path());
        let mut client = connect(&mut server, &paths);
        until_direct(&mut server, &mut client);
        for _ in 0..32 {
            ask(&mut client.0, 0, 1 << 20);
        }
        rounds(&mut server, |server| {
            server.wait.direct.is_none() && server.conns[&client.1].0.has_output()
        });
        answered(&mut server, &mut client.0, 32 * (16 + (1 << 20)));
        until_direct(&mut server, &mut client);
    }

    #[test]
    fn one_look_sees_the_connection_outside_of_epoll_and_others() {
        let dir = tempfile::tempdir().unwrap();
        let (mut server, paths) = server(dir.path());
        let (mut stream, mut other) = direct_beside_another(&mut server, &paths);
        let (mut ready, mut touched) = (Vec::with_capacity(16), Vec::new());
        for from in [&mut stream, &mut other] {
            ask(&mut from.0, 3, 0);
            let now = server.clock.mono_us();
            assert!(server.look(now, WAIT, &mut ready, &mut touched).unwrap());
            assert!(server.clock.mono_us() < now + WAIT);
        }
        assert_eq!(touched, [stream.1]);
        assert!(ready.iter().any(|event| event.data.u64() == other.1));
    }

    #[test]
    fn a_connection_that_always_sends_starves_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let (mut server, paths) = server(dir.path());
        let (mut stream, mut other) = direct_beside_another(&mut server, &paths);
        let mut left = [0; 4096];
        let mut busy = |server: &Server| {
            ask(&mut stream.0, 3, 0);
            let _ = stream.0.read(&mut left);
            server.wait.eager
        };
        rounds(&mut server, &mut busy);
        ask(&mut other.0, 3, 0);
        let mut left = [0; 16];
        rounds(&mut server, |server| {
            busy(server);
            matches!(other.0.read(&mut left), Ok(16))
        });
    }
}
