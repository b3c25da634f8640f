//! Daemons: started with a ready line, killed with the test.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::wait::{Deadline, wait_until};

/// A process that is killed when this goes out of scope.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    lines: Receiver<String>,
    log: PathBuf,
    /// The ready line it printed (null if none was asked for).
    pub ready: Value,
}

impl Daemon {
    /// Starts it, its stderr going to `log`, and waits for a JSON line of type
    /// `ready` on its stdout.
    #[track_caller]
    pub fn start(command: Command, log: &Path) -> Self {
        let mut daemon = Self::spawn(command, log);
        let deadline = Deadline::after(READY);
        loop {
            match daemon.lines.recv_timeout(deadline.left()) {
                Ok(line) => match serde_json::from_str::<Value>(&line) {
                    Ok(value) if value["type"] == "ready" => {
                        daemon.ready = value;
                        return daemon;
                    }
                    _ => {}
                },
                Err(RecvTimeoutError::Timeout) => {
                    panic!("no ready line within {READY:?}:\n{}", daemon.log_text());
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = daemon.child.wait();
                    panic!("it ended before it was ready ({status:?}):\n{}", daemon.log_text());
                }
            }
        }
    }

    /// Starts it without waiting for anything.
    #[track_caller]
    pub fn spawn(mut command: Command, log: &Path) -> Self {
        let text = format!("{command:?}");
        let stderr = File::options().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{text}: {e}"));
        let (to, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if to.send(line).is_err() {
                    // Nobody reads any more; the pipe must still be drained.
                    continue;
                }
            }
        });
        Self { child, lines, log: log.to_owned(), ready: Value::Null }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to stderr.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// kill -9, and gone when this returns.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM; panics if it does not end within 30 seconds. Returns its exit code.
    pub fn stop(&mut self) -> i32 {
        let _ = kill_process(pid(self.child.id()), Signal::TERM);
        let status = wait_until("a daemon's end after SIGTERM", Duration::from_secs(30), || {
            self.child.try_wait().unwrap()
        });
        status.code().unwrap_or(-1)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// kill -9 of a process that may not be our child; returns when it is gone.
pub fn kill_and_wait(id: u32) {
    let _ = kill_process(pid(id), Signal::KILL);
    wait_until("a killed process to be gone", Duration::from_secs(30), || {
        (!alive(id)).then_some(())
    });
}

/// Whether the process exists and is no zombie.
pub fn alive(id: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// Processes that have `word` (a folder of ours) in their command line.
pub fn mentioning(word: &Path) -> Vec<u32> {
    let word = word.to_string_lossy().into_owned();
    let own = std::process::id();
    let ids = std::fs::read_dir("/proc").unwrap().flatten();
    ids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|id| {
            let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            *id != own && String::from_utf8_lossy(&line).contains(&word)
        })
        .collect()
}

/// Kills what a test left running in its own temporary folder.
pub fn kill_mentioning(folder: &Path) {
    assert!(folder.components().count() > 2, "{} is no folder of a test", folder.display());
    // A supervisor that is still alive may start another while we look.
    for _ in 0..3 {
        for id in mentioning(folder) {
            let _ = kill_process(pid(id), Signal::KILL);
        }
    }
}

fn pid(id: u32) -> Pid {
    Pid::from_raw(id as i32).unwrap()
}

/// Longest time until a daemon is ready.
const READY: Duration = Duration::from_secs(60);
