//! One process that a daemon keeps running: started, or adopted from the
//! daemon before; started again when it ends, with back-off.
//!
//! [`Worker::poll`] is called about ten times a second and never waits.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::process::{RoleLock, Running, Spawn};
use super::status::ProcessStatus;
use super::supervise::Restarts;

/// A process of one role, of one group.
#[derive(Debug)]
pub struct Worker {
    role: &'static str,
    group: Option<String>,
    lock: PathBuf,
    spawn: Spawn,
    running: Option<Running>,
    restarts: Restarts,
    last_end: Option<String>,
    /// Whether it should run.
    wanted: bool,
}

impl Worker {
    /// A worker that should run; nothing is started before [`Worker::poll`].
    pub fn new(role: &'static str, group: Option<String>, lock: PathBuf, spawn: Spawn) -> Self {
        Self {
            role,
            group,
            lock,
            spawn,
            running: None,
            restarts: Restarts::default(),
            last_end: None,
            wanted: true,
        }
    }

    /// Its role.
    pub fn role(&self) -> &'static str {
        self.role
    }

    /// Looks after it.
    pub fn poll(&mut self, now_us: u64) {
        if let Some(running) = &mut self.running {
            let Some(how) = running.ended() else { return };
            tracing::warn!(role = self.role, group = ?self.group, how, "a process ended");
            self.running = None;
            self.last_end = Some(how);
            if self.wanted {
                self.restarts.ended(now_us);
            }
        }
        if self.wanted && self.restarts.due(now_us) {
            match self.start() {
                Ok(true) => self.restarts.started(now_us),
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(role = self.role, group = ?self.group, %error, "cannot start");
                    self.last_end = Some(error.to_string());
                    self.restarts.ended(now_us);
                }
            }
        }
    }

    fn start(&mut self) -> std::io::Result<bool> {
        if let Some(pid) = RoleLock::holder(&self.lock)? {
            self.running = Running::adopt(pid, &self.lock)?;
            if self.running.is_some() {
                tracing::info!(role = self.role, group = ?self.group, pid, "adopted");
            }
            return Ok(self.running.is_some());
        }
        self.running = Some(Running::spawn(&self.spawn)?);
        Ok(true)
    }

    /// No longer wanted: ends on SIGTERM, or is left alone with `leave`.
    pub fn release(&mut self, leave: bool) {
        self.wanted = false;
        if !leave && let Some(running) = &self.running {
            running.signal(false);
        }
    }

    /// Whether it runs.
    pub fn runs(&mut self) -> bool {
        self.running.as_mut().is_some_and(|r| r.ended().is_none())
    }

    /// How often it ended.
    pub fn restarts(&self) -> u32 {
        self.restarts.count
    }

    /// How it ended last, with the end of its log.
    pub fn last_end(&self) -> Option<String> {
        let how = self.last_end.clone()?;
        let tail = log_tail(&self.spawn.log);
        Some(if tail.is_empty() { how } else { format!("{how}: {tail}") })
    }

    /// For the Status document.
    pub fn status(&self) -> ProcessStatus {
        ProcessStatus {
            role: self.role.to_owned(),
            group: self.group.clone(),
            pid: self.running.as_ref().map(Running::pid),
            restarts: self.restarts.count,
            last_end: self.last_end.clone(),
        }
    }
}

/// The last line of a log that says something, shortened.
pub fn log_tail(log: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
        let mut text = Vec::new();
        file.take(TAIL).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or_default();
    line.chars().take(400).collect()
}

/// Longest wait of a process that was asked to end, before it is killed.
pub const END_TIMEOUT: Duration = Duration::from_secs(10);
const TAIL: u64 = 4096;
