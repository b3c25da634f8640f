//! What the shipper needs of a group on this machine, behind traits, so that
//! tests can stand in for a filter.
//!
//! Owns [`LocalSource`]: the filter's control socket, its journal, its disks by
//! NBD. Every call has a timeout or reads a local file; none blocks the filter.

use std::fmt::Debug;
use std::io;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use blockfilter::block::{Errno, Extent};
use blockfilter::config::{GroupConfig, GroupPaths};
use blockfilter::control::{Client, Positions, Reply, Request, unexpected};
use blockfilter::engine::Clock;
use blockfilter::journal::reader::{JournalReader, ReadError};
use blockfilter::names::Lsn;
use blockfilter::nbd::client::{Answer, Client as NbdClient, ClientConfig, Op};
use blockfilter::nbd::listen::Address;

use crate::background::Priority;
use crate::epoch::Batch;
use crate::rest::Spent;

/// Connections to a group's filter; made anew after each failure.
pub trait Source: Send + Sync + Debug {
    /// A control connection.
    fn control(&self) -> io::Result<Box<dyn Control>>;
    /// The journal.
    fn journal(&self) -> Result<Box<dyn Journal>, ReadError>;
    /// The disks, as their clients see them.
    fn disks(&self) -> io::Result<Box<dyn DiskSource>>;
    /// What its machine's processors did so far; None: not known.
    fn processors(&self) -> Option<Spent>;
    /// Has this process compute while nobody else on its machine wants to, or as before. An error: not
    /// now.
    fn set_background(&self, background: bool) -> io::Result<()>;
}

/// The filter's control socket. After an error it is useless.
pub trait Control: Send {
    /// Positions, once `durable > after`, or after `timeout`; None: at once.
    fn wait(&mut self, after: Option<Lsn>, timeout: Duration) -> io::Result<Positions>;
    /// Batches are kept from the answered position on, durably.
    fn begin_seed(&mut self) -> io::Result<Lsn>;
    /// The target holds everything below `lsn`; `whole`: and a complete copy as of it.
    fn ship_floor(&mut self, lsn: Lsn, whole: bool) -> io::Result<Positions>;
}

/// Durable batches.
pub trait Journal: Send {
    /// Whole batches from `from`, not beyond `durable`, about `max` bytes, and
    /// the position behind them and any padding.
    fn read(&mut self, from: Lsn, durable: Lsn, max: usize)
    -> Result<(Vec<Batch>, Lsn), ReadError>;
}

/// Bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRange {
    /// Index of the disk.
    pub disk: usize,
    /// Where it begins.
    pub offset: u64,
    /// Bytes, at most 32 MiB.
    pub len: u32,
}

/// The disks' content, newest acknowledged writes included.
pub trait DiskSource: Send {
    /// The bytes of a range. `next` will be read next, if nothing changes: it may be read now, so
    /// what a call returns is as old as the call before it.
    fn read(&mut self, range: DiskRange, next: Option<DiskRange>) -> io::Result<Vec<u8>>;
    /// Extents from `offset`, covering at least one and at most `len` bytes.
    fn extents(&mut self, disk: usize, offset: u64, len: u64) -> io::Result<Vec<Extent>>;
}

/// A group whose filter runs on this machine.
#[derive(Clone, Debug)]
pub struct LocalSource {
    config: GroupConfig,
    paths: GroupPaths,
    clock: Arc<dyn Clock>,
    priority: Priority,
}

impl LocalSource {
    /// Of a configured group; nothing is opened yet.
    pub fn new(config: GroupConfig, paths: GroupPaths, clock: Arc<dyn Clock>) -> Self {
        Self { config, paths, clock, priority: Priority::new() }
    }
}

impl Source for LocalSource {
    fn control(&self) -> io::Result<Box<dyn Control>> {
        Ok(Box::new(LocalControl(Client::connect(&self.paths.filter_socket())?)))
    }

    fn journal(&self) -> Result<Box<dyn Journal>, ReadError> {
        Ok(Box::new(LocalJournal { reader: JournalReader::open(&self.config)?, given: Vec::new() }))
    }

    fn disks(&self) -> io::Result<Box<dyn DiskSource>> {
        let mut clients = Vec::with_capacity(self.config.disks.len());
        for disk in &self.config.disks {
            let address = Address::Unix(self.paths.nbd_socket());
            let config = ClientConfig::new(address, &self.config.export(&disk.disk));
            clients.push(NbdClient::connect(config, self.clock.clone()).map_err(io::Error::other)?);
        }
        Ok(Box::new(LocalDisks { clients, ahead: None }))
    }

    fn processors(&self) -> Option<Spent> {
        Spent::here()
    }

    fn set_background(&self, background: bool) -> io::Result<()> {
        self.priority.set(background)
    }
}

struct LocalDisks {
    clients: Vec<NbdClient>,
    /// What was asked for before it is needed.
    ahead: Option<(DiskRange, mpsc::Receiver<Result<Answer, Errno>>)>,
}

impl LocalDisks {
    fn disk(&self, disk: usize) -> io::Result<&NbdClient> {
        self.clients.get(disk).ok_or_else(|| io::Error::other("no such disk"))
    }

    fn ask(&self, range: DiskRange) -> io::Result<mpsc::Receiver<Result<Answer, Errno>>> {
        let (sender, answer) = mpsc::sync_channel(1);
        let op = Op::Read { offset: range.offset, len: range.len };
        let done = Box::new(move |result| drop(sender.send(result)));
        self.disk(range.disk)?.submit(op, done);
        Ok(answer)
    }
}

impl DiskSource for LocalDisks {
    fn read(&mut self, range: DiskRange, next: Option<DiskRange>) -> io::Result<Vec<u8>> {
        let answer = match self.ahead.take() {
            Some((asked, answer)) if asked == range => answer,
            _ => self.ask(range)?,
        };
        if let Some(next) = next {
            self.ahead = Some((next, self.ask(next)?));
        }
        match answer.recv().unwrap_or(Err(Errno::Shutdown)).map_err(failed)? {
            Answer::Data(data) if data.len() == range.len as usize => Ok(data),
            _ => Err(failed(Errno::Io)),
        }
    }

    fn extents(&mut self, disk: usize, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
        self.disk(disk)?.extents(offset, len).map_err(failed)
    }
}

fn failed(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno.code() as i32)
}

struct LocalControl(Client);

impl Control for LocalControl {
    fn wait(&mut self, after: Option<Lsn>, timeout: Duration) -> io::Result<Positions> {
        self.0.wait(after, None, timeout)
    }

    fn begin_seed(&mut self) -> io::Result<Lsn> {
        match self.0.ask(&Request::BeginSeed, ANSWER)? {
            Reply::SeedBegun { s } => Ok(s),
            other => Err(unexpected(&other)),
        }
    }

    fn ship_floor(&mut self, lsn: Lsn, whole: bool) -> io::Result<Positions> {
        self.0.positions(&Request::ShipFloor { lsn, whole }, ANSWER)
    }
}

struct LocalJournal {
    reader: JournalReader,
    /// What was handed out, the newest last: used again once nobody holds it, because new
    /// memory of this size costs as much as the reading.
    given: Vec<Arc<Vec<u8>>>,
}

impl LocalJournal {
    fn buffer(&mut self) -> Vec<u8> {
        let free = self.given.iter().position(|data| Arc::strong_count(data) == 1);
        let free = free.and_then(|at| Arc::into_inner(self.given.remove(at)));
        free.unwrap_or_default()
    }
}

impl Journal for LocalJournal {
    fn read(
        &mut self,
        from: Lsn,
        durable: Lsn,
        max: usize,
    ) -> Result<(Vec<Batch>, Lsn), ReadError> {
        let mut data = self.buffer();
        let (batches, next) = self.reader.read(from, durable, max, &mut data)?;
        let data = Arc::new(data);
        if self.given.len() < GIVEN_MAX && data.capacity() <= GIVEN_BYTES {
            self.given.push(data.clone());
        }
        if next >= durable {
            // What was needed to catch up is not needed any more.
            let over = self.given.len().saturating_sub(GIVEN_NEAR);
            self.given.drain(..over);
        }
        let batches = batches
            .into_iter()
            .map(|b| Batch { hdr: b.hdr, data: data.clone(), bytes: b.bytes })
            .collect();
        Ok((batches, next))
    }
}

/// Buffers kept for the next reads: as many as two epochs and a read need, fewer once the end is
/// reached; and how large, in bytes.
const GIVEN_MAX: usize = 20;
const GIVEN_NEAR: usize = 8;
const GIVEN_BYTES: usize = 8 << 20;
const ANSWER: Duration = Duration::from_secs(10);
