//! One connection of the control socket ([`crate::control`]), never blocking.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::volume::Volume;
use crate::control::{LINE_MAX, Reply, Request};
use crate::names::Lsn;

/// What only the server can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Stop the process.
    Stop {
        /// Write everything back first.
        drain: bool,
    },
}

/// A control connection: one request at a time.
#[derive(Debug)]
pub struct Ctl {
    /// Higher than those of connections that were accepted before.
    id: u64,
    stream: UnixStream,
    input: Vec<u8>,
    out: Vec<u8>,
    pending: Option<Pending>,
    follows: bool,
}

#[derive(Debug)]
enum Pending {
    Wait {
        after: Option<Lsn>,
        ship_floor: Option<Lsn>,
        deadline: u64,
    },
    Commit,
    /// The super block with this number makes it durable.
    Seed {
        s: u64,
        seq: u64,
    },
    /// No room for the mark yet.
    Mark {
        tag: Vec<u8>,
        app: bool,
    },
    Marked {
        lsn: u64,
    },
}

impl Ctl {
    /// Takes an accepted socket.
    pub fn new(id: u64, stream: UnixStream) -> Self {
        Self { id, stream, input: Vec::new(), out: Vec::new(), pending: None, follows: false }
    }

    /// When the pending request times out; monotonic microseconds.
    pub fn deadline(&self) -> Option<u64> {
        match self.pending {
            Some(Pending::Wait { deadline, .. }) => Some(deadline),
            _ => None,
        }
    }

    /// Whether it asked for positions as they change, as who copies the journal does.
    pub fn follows(&self) -> bool {
        self.follows
    }

    /// Takes bytes and starts a request. An error or the end closes the connection.
    pub fn receive(
        &mut self,
        volume: &mut Volume,
        connections: u32,
        now: u64,
    ) -> io::Result<Option<Ask>> {
        let mut buf = [0; 4096];
        loop {
            match self.stream.read(&mut buf) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.input.extend_from_slice(&buf[..count]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if self.input.len() > LINE_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        self.next_request(volume, connections, now)
    }

    /// Whether a whole request waits that none before it holds up any more.
    pub fn has_request(&self) -> bool {
        self.pending.is_none() && self.input.contains(&b'\n')
    }

    /// Starts the requests that were received, up to one that has to wait.
    pub fn next_request(
        &mut self,
        volume: &mut Volume,
        connections: u32,
        now: u64,
    ) -> io::Result<Option<Ask>> {
        while self.pending.is_none() {
            let Some(end) = self.input.iter().position(|b| *b == b'\n') else { break };
            let line: Vec<u8> = self.input.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Request::Stop { drain }) => return Ok(Some(Ask::Stop { drain })),
                Ok(request) => self.start(request, volume, connections, now),
                Err(error) => {
                    self.answer(&Reply::Failed { message: format!("not a request: {error}") });
                }
            }
        }
        self.send()?;
        Ok(None)
    }

    fn start(&mut self, request: Request, volume: &mut Volume, connections: u32, now: u64) {
        match request {
            Request::Status => self.answer(&Reply::Status(Box::new(volume.status(connections)))),
            Request::Wait { after, ship_floor, timeout_ms } => {
                self.follows |= after.is_some();
                let deadline = now + timeout_ms.min(WAIT_MAX_MS) * 1000;
                self.pending = Some(Pending::Wait { after, ship_floor, deadline });
            }
            Request::Commit => {
                self.pending = Some(Pending::Commit);
                if volume.flush(self.id << 32) {
                    self.handle_durable(self.id << 32, volume);
                }
            }
            Request::ShipFloor { lsn, whole } => {
                volume.target_holds(self.id, lsn.0, whole);
                self.answer(&Reply::Positions(volume.positions()));
            }
            Request::BeginSeed => match volume.begin_seed() {
                Some(s) => {
                    // Also: what is still under way from older sessions is untrue by now.
                    volume.target_holds(self.id, 0, false);
                    let seq = volume.filter().super_seq_due();
                    self.pending = Some(Pending::Seed { s, seq });
                }
                None => self.answer(&Reply::Failed {
                    message: "a failed journal or disk cannot be seeded from".into(),
                }),
            },
            Request::Mark { tag, app } => {
                let tag = tag.map_or_else(Vec::new, |t| t.as_str().as_bytes().to_vec());
                self.pending = Some(Pending::Mark { tag, app });
            }
            Request::Stop { .. } => {}
        }
        self.turn(volume, now);
    }

    /// Looks whether the pending request is done; true if there is something to send.
    pub fn turn(&mut self, volume: &mut Volume, now: u64) -> bool {
        match self.pending.take() {
            Some(Pending::Wait { after, ship_floor, deadline }) => {
                let positions = volume.positions();
                let durable = after.is_some_and(|lsn| positions.durable > lsn);
                let shipped = ship_floor.is_some_and(|lsn| positions.ship_floor >= lsn);
                if durable || shipped || now >= deadline {
                    self.answer(&Reply::Positions(positions));
                } else {
                    self.pending = Some(Pending::Wait { after, ship_floor, deadline });
                }
            }
            Some(Pending::Seed { s, seq }) => {
                if volume.filter().super_seq() >= seq {
                    self.answer(&Reply::SeedBegun { s: Lsn(s) });
                } else {
                    self.pending = Some(Pending::Seed { s, seq });
                }
            }
            Some(Pending::Mark { tag, app }) => match volume.mark(&tag, app) {
                Ok(lsn) => {
                    self.pending = Some(Pending::Marked { lsn });
                    if volume.wait_durable(lsn, self.id << 32) {
                        self.handle_durable(self.id << 32, volume);
                    }
                }
                Err(_) => self.pending = Some(Pending::Mark { tag, app }),
            },
            other => self.pending = other,
        }
        !self.out.is_empty()
    }

    /// What a Commit or Mark waited for is durable.
    pub fn handle_durable(&mut self, _token: u64, volume: &Volume) {
        let positions = volume.positions();
        match self.pending.take() {
            Some(Pending::Commit) => self.answer(&Reply::Positions(positions)),
            Some(Pending::Marked { lsn }) => {
                self.answer(&Reply::Marked { lsn: Lsn(lsn), incarnation: positions.incarnation });
            }
            other => self.pending = other,
        }
    }

    /// What a Commit or Mark waited for cannot be made durable.
    pub fn handle_lost(&mut self) {
        match self.pending.take() {
            Some(Pending::Commit | Pending::Marked { .. }) => self.answer(&Reply::Failed {
                message: "neither the journal nor the disks can be made durable".into(),
            }),
            other => self.pending = other,
        }
    }

    /// Queues an answer.
    pub fn answer(&mut self, reply: &Reply) {
        match serde_json::to_vec(reply) {
            Ok(line) => {
                self.out.extend_from_slice(&line);
                self.out.push(b'\n');
            }
            Err(error) => tracing::error!(%error, "an answer cannot be encoded"),
        }
    }

    /// Sends queued answers; a client that does not take them is dropped.
    pub fn send(&mut self) -> io::Result<()> {
        let out = std::mem::take(&mut self.out);
        self.stream.write_all(&out)
    }
}

/// Longest wait a client may ask for.
const WAIT_MAX_MS: u64 = 60_000;
