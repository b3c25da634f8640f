//! One failure: what failed, why, what to do, with a stable code and an exit code.
//!
//! Exit codes are those of interface.md b.4. A code `SF-EENN` starts with the
//! exit code it goes with, so that a script that knows only exit codes and a
//! person who looks a code up agree.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// Exit codes (interface.md b.4). Unknown codes mean failure: new ones may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// Something failed that has no code of its own (I/O, a full disk).
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// Done, but not all of it: what is missing is said.
    Partial = 3,
    /// A named thing does not exist.
    NotFound = 4,
    /// Wrong state, foreign, newer or damaged.
    WrongState = 5,
    /// Not authorised; a bad, used or expired token.
    NotAuthorised = 6,
    /// The daemon or the peer cannot be reached.
    Unreachable = 7,
    /// Timed out waiting; the work goes on.
    TimedOut = 8,
    /// A confirmation is needed and there is no terminal.
    Confirm = 9,
    /// An objective is not met.
    Objective = 10,
    /// Busy, locked or already there.
    Busy = 11,
    /// Data does not match.
    Mismatch = 12,
    /// Interrupted by a signal.
    Interrupted = 130,
}

/// A failure as people and programs see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub struct Failure {
    /// Stable code, `SF-` and four digits.
    pub code: String,
    /// The process's exit code.
    pub exit: Exit,
    /// What failed, one sentence without a full stop.
    pub what: String,
    /// Why, if more is known than `what` says.
    pub why: Option<String>,
    /// What to do.
    pub hint: Option<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match &self.why {
            Some(why) => write!(f, ": {why}"),
            None => Ok(()),
        }
    }
}

impl Failure {
    /// A failure with the class's general code (`SF-EE00`).
    pub fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self::coded(exit, 0, what)
    }

    /// A failure with a code of its own: `SF-EENN`.
    pub fn coded(exit: Exit, number: u8, what: impl Into<String>) -> Self {
        let class = if exit == Exit::Interrupted { 13 } else { exit as u8 };
        let code = format!("SF-{class:02}{number:02}");
        Self { code, exit, what: what.into(), why: None, hint: None }
    }

    /// Adds why.
    pub fn why(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    /// Adds what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// An I/O error while doing `what`.
    pub fn io(what: impl Into<String>, error: &io::Error) -> Self {
        let exit = match error.kind() {
            io::ErrorKind::NotFound => Exit::NotFound,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Exit::TimedOut,
            io::ErrorKind::ResourceBusy
            | io::ErrorKind::AddrInUse
            | io::ErrorKind::AlreadyExists => Exit::Busy,
            io::ErrorKind::InvalidData => Exit::WrongState,
            _ => Exit::Failed,
        };
        let failure = Self::coded(exit, 90, what).why(error.to_string());
        match error.kind() {
            io::ErrorKind::StorageFull => failure.hint("free some space and try again"),
            io::ErrorKind::PermissionDenied => {
                failure.hint("run it as the user that owns the state directory (usually root)")
            }
            io::ErrorKind::ReadOnlyFilesystem => failure.hint("make the file system writable"),
            _ => failure,
        }
    }

    /// The daemon of `role` does not answer in `dir`.
    pub fn daemon_down(role: &str, dir: &std::path::Path) -> Self {
        Self::coded(Exit::Unreachable, 1, format!("the {role} in {} is not running", dir.display()))
            .why("nothing answers on its control socket")
            .hint(format!("start it: standfast {role} run --dir {}", dir.display()))
    }

    /// For people: three or four lines.
    pub fn human(&self) -> String {
        let mut text = format!("error {}: {}\n", self.code, self.what);
        if let Some(why) = &self.why {
            text.push_str(&format!("  why:  {why}\n"));
        }
        if let Some(hint) = &self.hint {
            text.push_str(&format!("  do:   {hint}\n"));
        }
        text.push_str(&format!("  read: {DOCS} (exit code {})\n", self.exit as u8));
        text
    }

    /// For programs: the last line on stderr.
    pub fn json(&self) -> String {
        let message = self.to_string();
        serde_json::json!({
            "type": "error", "code": self.code, "exit_code": self.exit as u8,
            "message": message, "hint": self.hint, "docs": DOCS,
        })
        .to_string()
    }
}

/// Where errors are explained.
pub const DOCS: &str = "README.md#errors-and-exit-codes";

/// What every command returns.
pub type Outcome<T = ()> = Result<T, Failure>;

/// `result.failed("while …")`: an I/O error becomes a [`Failure`].
pub trait IoContext<T> {
    /// Says what was being done.
    fn failed(self, what: impl Into<String>) -> Outcome<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn failed(self, what: impl Into<String>) -> Outcome<T> {
        self.map_err(|error| Failure::io(what, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_starts_with_its_exit_code() {
        let failure = Failure::coded(Exit::WrongState, 7, "it failed").why("because").hint("do");
        assert_eq!(failure.code, "SF-0507");
        let json: serde_json::Value = serde_json::from_str(&failure.json()).unwrap();
        assert_eq!(json["exit_code"], 5);
        assert_eq!(json["message"], "it failed: because");
        assert_eq!(failure.human().lines().count(), 4);
    }
}
