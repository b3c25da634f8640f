//! Peers and the plain export: servers on a Unix socket, started fresh for each run.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::cells::Subject;
use crate::sys::{Proc, wait_for};

/// A server that runs, and how fio reaches it.
#[derive(Debug)]
pub(crate) struct Running {
    /// Engine and place, as fio's options.
    pub(crate) target: Vec<String>,
    /// Its processes with their roles.
    pub(crate) roles: Vec<(String, u32)>,
    /// Ended in this order.
    _procs: Vec<Proc>,
}

/// What peers work on.
#[derive(Debug)]
pub(crate) struct Files<'a> {
    /// For sockets and logs.
    pub(crate) folder: &'a Path,
    /// The image that is served.
    pub(crate) image: &'a Path,
    /// The image that a mirror copies to.
    pub(crate) mirror: &'a Path,
    /// Bytes of both.
    pub(crate) size: u64,
}

/// fio's options for an NBD URI.
pub(crate) fn nbd_target(uri: &str) -> Vec<String> {
    vec!["--ioengine=nbd".into(), format!("--uri={uri}")]
}

/// Starts `subject`.
pub(crate) fn start(subject: Subject, files: &Files<'_>) -> Result<Running> {
    let image = files.image.display().to_string();
    let bare = |engine: &str, direct: u8| Running {
        target: vec![
            format!("--ioengine={engine}"),
            format!("--direct={direct}"),
            format!("--filename={image}"),
        ],
        roles: Vec::new(),
        _procs: Vec::new(),
    };
    let socket = files.folder.join("peer.sock");
    let _ = std::fs::remove_file(&socket);
    match subject {
        Subject::BareDirect => Ok(bare("libaio", 1)),
        Subject::BareBuffered => Ok(bare("psync", 0)),
        Subject::MirrorBlocking => mirror(files, &socket, "write-blocking"),
        Subject::MirrorBackground => mirror(files, &socket, "background"),
        _ => {
            let mut command = command(subject, files, &socket)?;
            let server = serve(&mut command, &socket, files.folder)?;
            let roles = vec![("peer".to_owned(), server.pid())];
            Ok(Running { target: nbd_target(&uri(&socket)), roles, _procs: vec![server] })
        }
    }
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

fn command(subject: Subject, files: &Files<'_>, socket: &Path) -> Result<Command> {
    let mut command;
    match subject {
        Subject::Serve => {
            command = Command::new(crate::program()?);
            command.arg("serve").arg(files.image).arg("--nbd");
            command.arg(format!("unix:{}", socket.display()));
        }
        Subject::NbdkitFile => command = nbdkit_file(files.image, socket),
        Subject::NbdkitMemory => {
            command = Command::new("nbdkit");
            command.arg("-f").arg("-U").arg(socket).args(["memory", &files.size.to_string()]);
        }
        Subject::QemuThreads | Subject::QemuUring => {
            let aio = if subject == Subject::QemuUring { "io_uring" } else { "threads" };
            command = Command::new("qemu-nbd");
            command.args(["-t", "-f", "raw", "--cache=writeback"]).arg(format!("--aio={aio}"));
            command.arg("-k").arg(socket).arg(files.image);
        }
        _ => bail!("{} is no server of one process", subject.name()),
    }
    Ok(command)
}

/// `nbdkit file`.
pub(crate) fn nbdkit_file(image: &Path, socket: &Path) -> Command {
    let mut command = Command::new("nbdkit");
    command.arg("-f").arg("-U").arg(socket).arg("file").arg(image);
    command
}

/// Starts a server and waits until it listens.
pub(crate) fn serve(command: &mut Command, socket: &Path, folder: &Path) -> Result<Proc> {
    let _ = std::fs::remove_file(socket);
    let mut server = Proc::spawn(command, &folder.join("peer.log"))?;
    wait_for(&format!("{command:?}"), START, || {
        server.check()?;
        Ok(UnixStream::connect(socket).ok().map(|_| ()))
    })?;
    Ok(server)
}

/// A mirror from the image to nbdkit over the other one, both equal at the start.
fn mirror(files: &Files<'_>, socket: &Path, copy_mode: &str) -> Result<Running> {
    let copy = files.folder.join("copy.sock");
    let qmp = files.folder.join("qmp.sock");
    let backend = serve(&mut nbdkit_file(files.mirror, &copy), &copy, files.folder)?;
    let mut command = Command::new("qemu-storage-daemon");
    let image = files.image.display();
    command.args(["--blockdev", &format!("driver=file,node-name=src,filename={image}")]);
    let to = format!("driver=nbd,node-name=dst,server.type=unix,server.path={}", copy.display());
    command.args(["--blockdev", &to]);
    // In order: with the NBD server's socket, the monitor's is there too.
    command.args(["--chardev", &format!("socket,id=q,path={},server=on,wait=off", qmp.display())]);
    command.args(["--monitor", "chardev=q"]);
    command.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())]);
    command.args(["--export", "type=nbd,id=e,node-name=src,name=,writable=on"]);
    let daemon = serve(&mut command, socket, files.folder)?;
    let mut monitor = Monitor::open(&qmp)?;
    // Both images are equal, so nothing need be copied before the mirror is ready.
    monitor.call(
        "blockdev-mirror",
        &json!({"job-id": "m", "device": "src", "target": "dst",
        "sync": "none", "copy-mode": copy_mode}),
    )?;
    wait_for("the mirror to be ready", START, || {
        let jobs = monitor.call("query-block-jobs", &json!({}))?;
        Ok((jobs[0]["ready"] == true).then_some(()))
    })?;
    let roles = vec![("peer".into(), daemon.pid()), ("peer target".into(), backend.pid())];
    Ok(Running { target: nbd_target(&uri(socket)), roles, _procs: vec![daemon, backend] })
}

/// QEMU's control socket.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn open(path: &PathBuf) -> Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(START))?;
        let mut monitor = Self(BufReader::new(stream));
        monitor.call("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn call(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        let line = json!({"execute": name, "arguments": arguments}).to_string();
        self.0.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                bail!("qemu-storage-daemon hung up");
            }
            let mut answer: Value = serde_json::from_str(&line)?;
            if !answer["error"].is_null() {
                bail!("{name}: {}", answer["error"]["desc"]);
            }
            if !answer["return"].is_null() {
                return Ok(answer["return"].take());
            }
        }
    }
}

const START: Duration = Duration::from_secs(30);
