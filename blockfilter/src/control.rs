//! The filter's local control socket: one JSON document a line, each way.
//!
//! The filter process knows nothing of replication; whoever ships the journal asks here for positions, tells
//! what the target holds ([`Request::ShipFloor`]) and where a seed starts. The
//! client side is blocking and has a timeout on every call.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::names::{Lsn, Name};

/// What can be asked of a running filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum Request {
    /// Everything; answered at once with [`Reply::Status`].
    Status,
    /// Answered with [`Reply::Positions`] once `durable > after`, or the ship
    /// floor reached `ship_floor`, or after `timeout_ms` (at most 60 000).
    Wait {
        /// Wake when the durable position is beyond this.
        after: Option<Lsn>,
        /// Wake when the target holds everything below this.
        ship_floor: Option<Lsn>,
        /// Longest wait.
        timeout_ms: u64,
    },
    /// Makes everything admitted before the call durable in the journal, then
    /// answers with [`Reply::Positions`].
    Commit,
    /// The target holds everything below `lsn`, durably; the journal may
    /// recycle it, unless it is frozen. Answered with [`Reply::Positions`].
    ///
    /// Each one says what is true now, and `standfast:dirty` believes it: a position
    /// below an earlier one means that the target lost what it held (it was restored or
    /// replaced; 0: it holds nothing of ours). What the journal gave up stays given up.
    ShipFloor {
        /// Exclusive end of what the target holds.
        lsn: Lsn,
        /// The target has a complete copy of the disks as of `lsn`: no copy is under way.
        /// An older replicator does not say; then nothing is called clean.
        #[serde(default)]
        whole: bool,
    },
    /// From now on batches are kept for the target from the answered `s` on
    /// (the durable position, rounded down to a batch's start): mode becomes
    /// shipping, durably, before the answer ([`Reply::SeedBegun`]).
    BeginSeed,
    /// Admits a mark as the last record of its batch, commits, and answers
    /// with [`Reply::Marked`] when it is durable.
    Mark {
        /// Its tag, unique in the group (checked by the agent), or None.
        tag: Option<Name>,
        /// Made with the application's consent.
        app: bool,
    },
    /// Stops: with `drain` everything is applied to the backing files and
    /// synced, the journal marked clean, the arena removed; then the process
    /// ends. Answered with [`Reply::Stopped`] just before.
    Stop {
        /// False: leave the arena and journal for the next start.
        drain: bool,
    },
}

/// Positions of a group; `checkpoint <= applied <= durable <= admitted`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Positions {
    /// Exclusive end of what has an LSN.
    pub admitted: Lsn,
    /// Exclusive end of what is durable in the journal.
    pub durable: Lsn,
    /// Exclusive end of what is written to the backing files.
    pub applied: Lsn,
    /// Exclusive end of what is synced there.
    pub checkpoint: Lsn,
    /// The target holds everything below, as last told.
    pub ship_floor: Lsn,
    /// +1 at each unclean start.
    pub incarnation: u64,
    /// +1 at each change of who may write.
    pub generation: u64,
    /// Where earlier incarnations ended: `(incarnation, exclusive end)`.
    pub history: Vec<(u64, Lsn)>,
    /// What the journal keeps.
    pub mode: Mode,
    /// The filter's monotonic clock at this answer, microseconds.
    pub mono_us: u64,
    /// The processor that the group's thread holds and others are to leave: write-back, and a copy
    /// while it is in the background.
    #[serde(default)]
    pub held_cpu: Option<u32>,
}

/// What the journal keeps for the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Nothing: no target was ever seeded.
    #[default]
    New,
    /// Everything from the ship floor on.
    Shipping,
    /// The journal overflowed: nothing; a full seed is due.
    Frozen,
    /// The journal failed: writes go straight to the disks; a full seed with
    /// a fresh journal is due.
    Unjournaled,
    /// A backing file failed: new writes to it are refused; the journal and
    /// the replica are complete.
    BackingFailed,
}

/// Everything a filter tells about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterStatus {
    /// Positions and mode.
    pub positions: Positions,
    /// Process id.
    pub pid: u32,
    /// Bytes of the journal that cannot be recycled now.
    pub journal_used_bytes: u64,
    /// Bytes of all chunk slots.
    pub journal_capacity_bytes: u64,
    /// Bytes of the arena that cannot be overwritten.
    pub arena_used_bytes: u64,
    /// Size of the arena.
    pub arena_capacity_bytes: u64,
    /// `io_uring`, or `blocking (why)`.
    pub io_engine: String,
    /// Client connections.
    pub connections: u32,
    /// Disks with what is wrong with each, if anything.
    pub disks: Vec<DiskStatus>,
    /// Writes admitted since the start, and their payload bytes.
    pub writes: u64,
    /// See `writes`.
    pub write_bytes: u64,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name.
    pub disk: Name,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Why writes to it are refused, if they are.
    pub error: Option<String>,
}

/// Answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// To Status.
    Status(Box<FilterStatus>),
    /// To Wait, Commit and ShipFloor.
    Positions(Positions),
    /// To BeginSeed.
    SeedBegun {
        /// Ship batches from here on.
        s: Lsn,
    },
    /// To Mark.
    Marked {
        /// Exclusive end of its batch: the recovery point's LSN.
        lsn: Lsn,
        /// Its incarnation.
        incarnation: u64,
    },
    /// To Stop.
    Stopped,
    /// The request could not be done.
    Failed {
        /// Why, for people.
        message: String,
    },
}

/// A blocking client of one filter.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects; fails at once when no filter listens.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Asks, and waits at most `timeout` for the answer. After an error the
    /// connection is useless: connect again.
    pub fn ask(&mut self, request: &Request, timeout: Duration) -> io::Result<Reply> {
        self.stream.get_ref().set_read_timeout(Some(timeout))?;
        let mut line = serde_json::to_vec(request).map_err(io::Error::other)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        let mut answer = String::new();
        if self.stream.read_line(&mut answer)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match serde_json::from_str(&answer).map_err(io::Error::other)? {
            Reply::Failed { message } => Err(io::Error::other(message)),
            reply => Ok(reply),
        }
    }

    /// [`Request::Wait`] and its answer.
    pub fn wait(
        &mut self,
        after: Option<Lsn>,
        ship_floor: Option<Lsn>,
        timeout: Duration,
    ) -> io::Result<Positions> {
        let timeout_ms = timeout.as_millis() as u64;
        let request = Request::Wait { after, ship_floor, timeout_ms };
        self.positions(&request, timeout + Duration::from_secs(10))
    }

    /// Any request that is answered with positions.
    pub fn positions(&mut self, request: &Request, timeout: Duration) -> io::Result<Positions> {
        match self.ask(request, timeout)? {
            Reply::Positions(positions) => Ok(positions),
            other => Err(unexpected(&other)),
        }
    }
}

/// An answer of the wrong kind.
pub fn unexpected(reply: &Reply) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("unexpected answer {reply:?}"))
}

/// Longest line either way, in bytes.
pub const LINE_MAX: usize = 1 << 20;
