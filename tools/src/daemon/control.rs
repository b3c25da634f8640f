//! Local control sockets of the daemons: one JSON document a line, each way.
//!
//! A server has a bounded number of connections, each with a bounded line and a
//! timeout; the client blocks with a timeout. Access is by file mode: the
//! socket and its folder belong to one user. Requests are in [`AgentRequest`]
//! and [`TargetRequest`]; a failure travels as a [`Failure`] with its exit code.

use std::fmt::Debug;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use blockfilter::config::short_socket;
use blockfilter::names::Name;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::errors::Failure;

/// What can be asked of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum AgentRequest {
    /// Answered with [`Reply::Pong`].
    Ping,
    /// The Status document, of one group or all.
    Status {
        /// Only this one.
        group: Option<Name>,
    },
    /// A group was made: start its processes. Answered with Done when its
    /// filter (and its files, if it has some) serve.
    Load {
        /// The group.
        group: Name,
    },
    /// Stop watching a group: its replicator and FUSE process are ended, its
    /// filter is left alone and no longer restarted.
    Release {
        /// The group.
        group: Name,
    },
    /// Watch a group again that was released and still exists. Answered at once.
    Adopt {
        /// The group.
        group: Name,
    },
}

/// What can be asked of the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum TargetRequest {
    /// Answered with [`Reply::Pong`].
    Ping,
    /// The Status document, of one group or all.
    Status {
        /// Only this one.
        group: Option<Name>,
    },
    /// Points, newest first: the PointList document.
    Points {
        /// The group.
        group: Name,
        /// Only those labelled at or after this time, as written by the user.
        since: Option<String>,
        /// Only tagged ones.
        tagged: bool,
        /// At most so many.
        limit: usize,
    },
    /// The id of a point and the group's disks: [`Resolved`].
    Resolve {
        /// The group.
        group: Name,
        /// One of its disks, which must exist.
        disk: Option<Name>,
        /// The point, as written by the user.
        point: String,
    },
    /// Starts a drill: the Drill document.
    DrillStart {
        /// The group.
        group: Name,
        /// The point, as written by the user.
        point: String,
    },
    /// All drills: the DrillList document.
    DrillList,
    /// Ends a drill and drops its overlay.
    DrillFinish {
        /// Its id.
        drill: String,
    },
    /// Deletes a group's history.
    Forget {
        /// The group.
        group: Name,
    },
}

/// A point that was looked up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// The point's id.
    pub point: String,
    /// The group's disks, or the one that was asked for.
    pub disks: Vec<Name>,
}

/// Answers of both daemons.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Here.
    Pong {
        /// Process id.
        pid: u32,
        /// Program version.
        version: String,
    },
    /// A document, as it is printed.
    Document {
        /// Its content.
        document: serde_json::Value,
    },
    /// It is done.
    Done,
    /// It failed.
    Failed {
        /// How.
        failure: Failure,
    },
}

impl Reply {
    /// A document.
    pub fn document(value: &impl Serialize) -> Self {
        Self::Document { document: serde_json::to_value(value).unwrap_or_default() }
    }

    /// The answer to Ping.
    pub fn pong() -> Self {
        Self::Pong { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned() }
    }
}

impl From<Result<Reply, Failure>> for Reply {
    fn from(result: Result<Reply, Failure>) -> Self {
        result.unwrap_or_else(|failure| Self::Failed { failure })
    }
}

/// The control socket of the daemon whose state directory is `dir`.
pub fn socket_in(dir: &Path) -> PathBuf {
    short_socket(dir.join("control.sock"))
}

/// Answers requests until `stop`. The caller holds the daemon's lock, so a
/// socket file that is there is left over and replaced.
pub fn serve<Q, H>(socket: &Path, stop: Arc<AtomicBool>, handler: H) -> io::Result<()>
where
    Q: DeserializeOwned + Debug + Send + 'static,
    H: Fn(Q) -> Reply + Send + Sync + 'static,
{
    if let Err(error) = std::fs::remove_file(socket)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    let handler = Arc::new(handler);
    let open = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        while !stop.load(Ordering::SeqCst) {
            let Ok((stream, _)) = listener.accept() else {
                // Out of descriptors, say: give others time to close some.
                std::thread::sleep(Duration::from_millis(50));
                continue;
            };
            if open.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
                open.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (handler, slot) = (handler.clone(), Slot(open.clone()));
            let answer = move || {
                let _slot = slot;
                if let Err(error) = answer::<Q>(stream, handler.as_ref()) {
                    tracing::debug!(%error, "a control connection ended");
                }
            };
            if let Err(error) = std::thread::Builder::new().name("control".into()).spawn(answer) {
                tracing::warn!(%error, "cannot answer a control request");
            }
        }
    };
    std::thread::Builder::new().name("control-accept".into()).spawn(accept)?;
    Ok(())
}

/// One connection's place.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn answer<Q: DeserializeOwned + Debug>(
    stream: UnixStream,
    handler: &dyn Fn(Q) -> Reply,
) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(stream);
    loop {
        let Some(line) = read_line(&mut reader)? else { return Ok(()) };
        let reply = match serde_json::from_str::<Q>(&line) {
            Ok(request) => handler(request),
            Err(error) => Reply::Failed {
                failure: Failure::new(crate::errors::Exit::Usage, "not a request that is known")
                    .why(error.to_string())
                    .hint("use the same version of standfast as the daemon"),
            },
        };
        let mut text = serde_json::to_vec(&reply).map_err(io::Error::other)?;
        text.push(b'\n');
        reader.get_mut().write_all(&text)?;
    }
}

/// A line of at most [`LINE_MAX`] bytes; None at the end.
fn read_line(reader: &mut BufReader<UnixStream>) -> io::Result<Option<String>> {
    let mut line = String::new();
    let read = reader.take(LINE_MAX).read_line(&mut line)?;
    if read == 0 {
        return Ok(None);
    }
    if !line.ends_with('\n') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a line too long or cut off"));
    }
    Ok(Some(line))
}

/// One request and its answer, at most `timeout` apart. No daemon there:
/// `NotFound` or `ConnectionRefused`.
pub fn ask<Q: Serialize>(socket: &Path, request: &Q, timeout: Duration) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    stream.set_read_timeout(Some(timeout))?;
    let mut line = serde_json::to_vec(request).map_err(io::Error::other)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    match read_line(&mut BufReader::new(stream))? {
        Some(text) => serde_json::from_str(&text).map_err(io::Error::other),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Asks the daemon of `role` in `dir`; that it is down is a failure with exit code 7.
pub fn ask_daemon<Q: Serialize>(
    role: &str,
    dir: &Path,
    request: &Q,
    timeout: Duration,
) -> Result<Reply, Failure> {
    match ask(&socket_in(dir), request, timeout) {
        Ok(Reply::Failed { failure }) => Err(failure),
        Ok(reply) => Ok(reply),
        Err(error) if is_down(&error) => Err(Failure::daemon_down(role, dir)),
        Err(error) => Err(Failure::io(format!("the {role} did not answer"), &error)),
    }
}

/// Like [`ask_daemon`], for requests answered with a document.
pub fn ask_document<Q: Serialize>(
    role: &str,
    dir: &Path,
    request: &Q,
    timeout: Duration,
) -> Result<serde_json::Value, Failure> {
    match ask_daemon(role, dir, request, timeout)? {
        Reply::Document { document } => Ok(document),
        other => Err(Failure::new(
            crate::errors::Exit::Failed,
            format!("the {role} gave an unexpected answer"),
        )
        .why(format!("{other:?}"))),
    }
}

/// Whether an error of [`ask`] means that nobody listens.
pub fn is_down(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotADirectory
    )
}

const LINE_MAX: u64 = 16 << 20;
const CONNECTIONS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_answered_and_nonsense_gets_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("c.sock");
        let stop = Arc::new(AtomicBool::new(false));
        serve(&socket, stop, |request: AgentRequest| match request {
            AgentRequest::Ping => Reply::pong(),
            _ => Reply::Done,
        })
        .unwrap();
        let timeout = Duration::from_secs(5);
        let reply = ask(&socket, &AgentRequest::Ping, timeout).unwrap();
        assert!(matches!(reply, Reply::Pong { .. }), "{reply:?}");
        let reply = ask(&socket, &"nonsense", timeout).unwrap();
        assert!(matches!(reply, Reply::Failed { .. }), "{reply:?}");
    }

    #[test]
    fn a_daemon_that_is_down_is_exit_code_7() {
        let dir = tempfile::tempdir().unwrap();
        let timeout = Duration::from_secs(1);
        let failure = ask_daemon("agent", dir.path(), &AgentRequest::Ping, timeout).unwrap_err();
        assert_eq!(failure.exit, crate::errors::Exit::Unreachable);
    }
}
