//! What a replicator tells about itself, and the socket on which it does.
//!
//! One JSON line for each line asked, whatever it says. Owns the socket file;
//! starting replaces one that a killed replicator left. Never waits for the
//! shipper.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use blockfilter::engine::Clock;
use blockfilter::names::Lsn;
use serde::{Deserialize, Serialize};

use crate::transport::Waker;

/// What a replicator does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// No session; trying.
    #[default]
    Connecting,
    /// A full copy is under way.
    Seeding,
    /// The target follows closely.
    Streaming,
    /// The target follows, but is behind.
    Lagging,
    /// The journal overflowed; a full copy is due.
    Frozen,
    /// The target holds what the source never had; nothing is sent.
    Diverged,
    /// The target refuses this machine or group, or a newer generation writes.
    Refused,
    /// Told to stop.
    Stopped,
}

/// A replicator's status, one JSON document.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplicatorStatus {
    /// What it does.
    pub state: State,
    /// Whether a session is up.
    pub connected: bool,
    /// The target's address.
    pub target: Option<String>,
    /// End of the last epoch that was sent.
    pub shipped: Option<Lsn>,
    /// The target holds everything below, durably.
    pub target_durable: Option<Lsn>,
    /// The target can serve a state of this group.
    pub consistent: bool,
    /// The target's newest usable point.
    pub recoverable: Option<Lsn>,
    /// The source's clock there, microseconds since 1970.
    pub recoverable_to_us: Option<u64>,
    /// Journal bytes that the target does not hold.
    pub backlog_bytes: u64,
    /// Age of the newest recoverable state; None: not provable.
    pub rpo_seconds: Option<f64>,
    /// The last round trip, microseconds.
    pub rtt_us: Option<u64>,
    /// A full copy under way.
    pub seed: Option<SeedProgress>,
    /// How it compresses.
    pub codec: String,
    /// Payload bytes sent since the start, before compression.
    pub raw_bytes: u64,
    /// Bytes on the wire since the start.
    pub wire_bytes: u64,
    /// Sessions that were started.
    pub sessions: u64,
    /// Why there is no session, or the last one ended.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// Seconds to the next try.
    pub retry_in: Option<f64>,
    /// The figures of the target are not older than this, on our clock.
    #[serde(skip)]
    pub(crate) heard_us: u64,
    /// When the next try is, on our clock.
    #[serde(skip)]
    pub(crate) retry_us: Option<u64>,
}

/// Progress of a full copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SeedProgress {
    /// Bytes of the disks that were looked at.
    pub done_bytes: u64,
    /// Bytes of all disks.
    pub total_bytes: u64,
    /// Bytes looked at a second.
    pub rate_bytes_per_second: u64,
    /// Seconds left, once the rate is known.
    pub eta_seconds: Option<f64>,
    /// Bytes of blocks that were sent.
    pub sent_bytes: u64,
}

/// The status that the shipper writes and the socket reads.
#[derive(Clone, Debug, Default)]
pub struct Shown(Arc<Mutex<ReplicatorStatus>>);

impl Shown {
    /// Changes it.
    pub fn update(&self, change: impl FnOnce(&mut ReplicatorStatus)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The status at `now_us`: ages go on growing while nothing is heard.
    pub fn get(&self, now_us: u64) -> ReplicatorStatus {
        let mut status = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let age = now_us.saturating_sub(status.heard_us) as f64 / 1e6;
        status.rpo_seconds = status.rpo_seconds.map(|rpo| rpo + age);
        status.retry_in = status.retry_us.map(|at| at.saturating_sub(now_us) as f64 / 1e6);
        status
    }
}

/// Answers on a Unix socket until dropped.
#[derive(Debug)]
pub struct StatusSocket {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    wake: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl StatusSocket {
    /// Starts answering. The caller makes sure that it is the group's only replicator.
    pub fn start(path: &Path, shown: Shown, clock: Arc<dyn Clock>) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(Waker::new()?);
        let (stopping, waking) = (stop.clone(), wake.clone());
        let thread = std::thread::Builder::new().name("sf-status".into()).spawn(move || {
            while !stopping.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let answer = serde_json::to_vec(&shown.get(clock.mono_us()));
                        // A caller that went away is its own business.
                        let _ = answer.map_err(io::Error::other).and_then(|a| reply(&stream, a));
                    }
                    Err(_) => waking.wait_readable(&listener, Duration::from_secs(1)),
                }
            }
        })?;
        Ok(Self { path: path.to_owned(), stop, wake, thread: Some(thread) })
    }
}

fn reply(mut stream: &UnixStream, mut answer: Vec<u8>) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(CALLER_MAX))?;
    stream.set_write_timeout(Some(CALLER_MAX))?;
    let mut line = Vec::new();
    BufReader::new(stream.take(LINE_MAX)).read_until(b'\n', &mut line)?;
    answer.push(b'\n');
    stream.write_all(&answer)
}

impl Drop for StatusSocket {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

const CALLER_MAX: Duration = Duration::from_secs(1);
const LINE_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use blockfilter::engine::real::RealClock;

    #[test]
    fn the_socket_answers_and_replaces_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.sock");
        drop(UnixListener::bind(&path).unwrap());
        let shown = Shown::default();
        shown.update(|s| s.backlog_bytes = 7);
        let socket = StatusSocket::start(&path, shown, Arc::new(RealClock::new())).unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"{\"cmd\":\"status\"}\n").unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        let status: ReplicatorStatus = serde_json::from_str(&line).unwrap();
        assert_eq!(status.backlog_bytes, 7);
        assert_eq!(status.state, State::Connecting);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn rpo_grows_while_nothing_is_heard() {
        let shown = Shown::default();
        shown.update(|s| (s.rpo_seconds, s.heard_us) = (Some(0.5), 1_000_000));
        assert_eq!(shown.get(3_000_000).rpo_seconds, Some(2.5));
        assert_eq!(shown.get(0).rpo_seconds, Some(0.5));
    }
}
