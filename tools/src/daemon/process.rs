//! One process of a role at a time: its lock, how it is started, found and ended.
//!
//! A process of a role holds `flock` on a lock file with its pid in it, for as
//! long as it lives; whoever can take the lock knows that there is none. So an
//! agent that starts finds the processes of the one before and adopts them
//! (ruling 21) without trusting a pid that may have been given to another.
//!
//! Processes get a session of their own, no parent-death signal, no stdout, and
//! a log file (or the journal's socket, under systemd), so that neither a
//! terminal that closes nor a pipe that breaks stops them.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal};

/// A lock that says who holds it.
#[derive(Debug)]
pub struct RoleLock {
    _file: File,
}

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("held by process {}", .0.map_or("?".to_owned(), |p| p.to_string()))]
    Held(Option<u32>),
    /// The system failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl RoleLock {
    /// Takes the lock within 0.2 s or says who has it. Freed when the process ends.
    pub fn take(path: &Path) -> Result<Self, LockError> {
        let mut file = open_lock(path)?;
        // `holder` takes the lock for an instant, so one refusal proves nothing.
        for attempt in 0..ATTEMPTS {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if attempt + 1 < ATTEMPTS => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(LockError::Held(read_pid(&mut file)));
                }
                Err(error) => return Err(LockError::Io(error.into())),
            }
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self { _file: file })
    }

    /// The process that holds the lock, if one does.
    pub fn holder(path: &Path) -> io::Result<Option<u32>> {
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(None),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(Some(read_pid(&mut file).unwrap_or(0))),
            Err(error) => Err(error.into()),
        }
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// How to start a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spawn {
    /// Arguments behind the program's name.
    pub arguments: Vec<std::ffi::OsString>,
    /// Where its stderr goes.
    pub log: PathBuf,
}

/// A running process, started or found.
#[derive(Debug)]
pub enum Running {
    /// A child of ours.
    Child(Child),
    /// Started by a daemon before us.
    Adopted {
        /// Its process id.
        pid: u32,
        /// Becomes readable when it ends.
        pidfd: OwnedFd,
    },
}

impl Running {
    /// Starts this same program with other arguments.
    pub fn spawn(how: &Spawn) -> io::Result<Self> {
        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        command.args(&how.arguments).stdin(Stdio::null()).stdout(Stdio::null());
        if std::env::var_os("JOURNAL_STREAM").is_none() {
            command.stderr(open_log(&how.log)?);
        }
        command.env_remove("NOTIFY_SOCKET").env_remove("LISTEN_FDS").env_remove("LISTEN_PID");
        Ok(Self::Child(command.spawn()?))
    }

    /// Takes over the holder of a role's lock; None if it is just gone.
    pub fn adopt(pid: u32, lock: &Path) -> io::Result<Option<Self>> {
        let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let pidfd = match rustix::process::pidfd_open(id, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The pid was read before the descriptor was open: it must still hold the lock.
        Ok((RoleLock::holder(lock)? == Some(pid)).then_some(Self::Adopted { pid, pidfd }))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        match self {
            Self::Child(child) => child.id(),
            Self::Adopted { pid, .. } => *pid,
        }
    }

    /// Whether it still runs; how it ended, as far as that can be known.
    pub fn ended(&mut self) -> Option<String> {
        match self {
            Self::Child(child) => match child.try_wait() {
                Ok(None) => None,
                Ok(Some(status)) => Some(status.to_string()),
                Err(error) => Some(error.to_string()),
            },
            Self::Adopted { pidfd, .. } => {
                let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
                let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
                match rustix::event::poll(&mut fds, Some(&now)) {
                    Ok(n) if n > 0 => Some("ended".into()),
                    _ => None,
                }
            }
        }
    }

    /// Sends SIGTERM, or SIGKILL with `hard`. Errors mean that it is gone.
    pub fn signal(&self, hard: bool) {
        let signal = if hard { Signal::KILL } else { Signal::TERM };
        let _ = match self {
            Self::Child(child) => i32::try_from(child.id())
                .ok()
                .and_then(Pid::from_raw)
                .map(|pid| rustix::process::kill_process(pid, signal)),
            Self::Adopted { pidfd, .. } => Some(rustix::process::pidfd_send_signal(pidfd, signal)),
        };
    }
}

/// A log that is cut off at its start once it is large.
fn open_log(path: &Path) -> io::Result<File> {
    if std::fs::metadata(path).is_ok_and(|m| m.len() > LOG_MAX) {
        let mut old = path.as_os_str().to_owned();
        old.push(".1");
        std::fs::rename(path, old)?;
    }
    std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Gives this process a session of its own, so that signals of the starter's
/// terminal do not reach it.
pub fn detach() {
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!(%error, "already leads a session");
    }
}

const LOG_MAX: u64 = 4 << 20;
const ATTEMPTS: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_once_and_names_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.lock");
        assert_eq!(RoleLock::holder(&path).unwrap(), None);
        let held = RoleLock::take(&path).unwrap();
        assert_eq!(RoleLock::holder(&path).unwrap(), Some(std::process::id()));
        let Err(LockError::Held(pid)) = RoleLock::take(&path) else { panic!("taken twice") };
        assert_eq!(pid, Some(std::process::id()));
        drop(held);
        assert_eq!(RoleLock::holder(&path).unwrap(), None);
    }

    #[test]
    fn a_holder_can_be_adopted_and_a_stranger_cannot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.lock");
        let _held = RoleLock::take(&path).unwrap();
        let mut adopted = Running::adopt(std::process::id(), &path).unwrap().unwrap();
        assert_eq!(adopted.pid(), std::process::id());
        assert_eq!(adopted.ended(), None);
        assert!(Running::adopt(1, &path).unwrap().is_none());
    }
}
