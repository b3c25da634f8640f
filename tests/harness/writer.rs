//! Writers that keep the [`History`]: random writes, zeroes, trims and flushes
//! over several disks, one request at a time each, reconnecting when the server
//! goes away and going on with something new (what was not answered stays
//! undecided).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::Rng;
use crate::nbd::{Client, NbdError};
use crate::oracle::{ActId, History, SECTOR, payload};
use crate::wait::{Deadline, pause, rest};

/// What the writers do.
#[derive(Clone, Debug)]
pub struct Load {
    /// One URI a disk, in the order of the history's disks.
    pub uris: Vec<String>,
    /// Writers at once, each with a connection to every disk.
    pub writers: u64,
    /// Start of the random choices.
    pub seed: u64,
    /// A writer stops after so many requests (or when told).
    pub requests: u64,
    /// Each writer rests so long after a request; zero for as fast as it goes.
    pub rest: Duration,
    /// Longest time without a server before the test fails.
    pub patience: Duration,
}

/// Runs the writers until they are done or `stop` is set; `done` counts answers.
/// Returns the first surprise, if there was one.
pub fn run(
    load: &Load,
    history: &History,
    stop: &AtomicBool,
    done: &AtomicU64,
) -> Result<(), String> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..load.writers)
            .map(|number| scope.spawn(move || Writer::new(load, history, number).run(stop, done)))
            .collect();
        let results: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
        stop.store(true, Ordering::SeqCst);
        results.into_iter().try_for_each(|r| r.map_err(|_| "a writer panicked".to_owned())?)
    })
}

/// Stops the writers when it goes out of scope, so that a test that fails does
/// not wait for them.
#[derive(Debug)]
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct Writer<'a> {
    load: &'a Load,
    history: &'a History,
    rng: Rng,
    clients: Vec<Option<Client>>,
    /// Requests whose answers were lost with their connection, by disk.
    undecided: Vec<Vec<ActId>>,
}

impl<'a> Writer<'a> {
    fn new(load: &'a Load, history: &'a History, number: u64) -> Self {
        let rng = Rng::new(load.seed.wrapping_mul(1_000_003).wrapping_add(number));
        let disks = load.uris.len();
        let clients = (0..disks).map(|_| None).collect();
        Self { load, history, rng, clients, undecided: vec![Vec::new(); disks] }
    }

    fn run(mut self, stop: &AtomicBool, done: &AtomicU64) -> Result<(), String> {
        for _ in 0..self.load.requests {
            if stop.load(Ordering::SeqCst) {
                break;
            }
            let disk = self.rng.below(self.clients.len() as u64) as usize;
            self.connect(disk, stop)?;
            if self.request(disk)? {
                done.fetch_add(1, Ordering::SeqCst);
            }
            rest(self.load.rest);
        }
        for disk in 0..self.clients.len() {
            if !self.undecided[disk].is_empty() {
                self.connect(disk, stop)?;
            }
        }
        self.clients.into_iter().flatten().for_each(Client::disconnect);
        Ok(())
    }

    fn connect(&mut self, disk: usize, stop: &AtomicBool) -> Result<(), String> {
        let deadline = Deadline::after(self.load.patience);
        while self.clients[disk].is_none() {
            match Client::connect(&self.load.uris[disk], Duration::from_secs(60)) {
                Ok(client) => {
                    self.clients[disk] = Some(client);
                    for id in std::mem::take(&mut self.undecided[disk]) {
                        self.history.abandoned(id);
                    }
                }
                Err(error) if deadline.passed() || stop.load(Ordering::SeqCst) => {
                    return Err(format!("no server at {}: {error}", self.load.uris[disk]));
                }
                Err(_) => pause(),
            }
        }
        Ok(())
    }

    /// One random request; false if the connection was lost.
    fn request(&mut self, disk: usize) -> Result<bool, String> {
        let Some(mut client) = self.clients[disk].take() else { return Ok(false) };
        let sectors = client.size / SECTOR as u64;
        let longest = match self.rng.below(40) {
            0 => 2048,
            1..8 => 256,
            _ => 16,
        };
        let count = 1 + self.rng.below(longest.min(sectors));
        // Half of it in one hot place, so that requests overlap.
        let area = if self.rng.below(2) == 0 { sectors.min(1024).max(count) } else { sectors };
        let first = self.rng.below(area - count + 1);
        let (offset, len) = (first * SECTOR as u64, (count * SECTOR as u64) as u32);
        let fua = self.rng.below(16) == 0;
        let kind = self.rng.below(100);
        let mut id = None;
        let mut note = |zero| *id.insert(self.history.issue(disk, first, count, zero));
        let result = match kind {
            0..6 => client.flush(),
            6..12 => {
                note(true);
                client.trim(offset, len, fua)
            }
            12..20 => {
                note(true);
                client.zero(offset, len, fua)
            }
            _ => {
                let data = payload(disk, first, count, note(false));
                client.write(offset, &data, fua)
            }
        };
        match result {
            Ok(()) => {
                id.into_iter().for_each(|id| self.history.answered(id));
                self.clients[disk] = Some(client);
                Ok(true)
            }
            Err(NbdError::Refused(error)) => {
                Err(format!("disk {disk}: request at {offset}+{len} failed with error {error}"))
            }
            Err(NbdError::Lost(_)) => {
                self.undecided[disk].extend(id);
                Ok(false)
            }
        }
    }
}
