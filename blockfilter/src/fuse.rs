//! Step 1, the other way in: disks as files, by FUSE.
//!
//! A process of its own (ruling 22): each file is an NBD client of a socket, and
//! its client reconnects, so a filter that dies and comes back is a pause to the
//! file system above and not an I/O error. The same process shows points and
//! drills at the target.
//!
//! Owns: the mount. [`files`] turns the kernel's requests into the client's.
//! Never: keeps data (no page cache, no write-back cache: what is written has
//! an order as soon as it is answered).

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuser::{Config, MountOption, Session, SessionACL};
use rustix::mm::MlockAllFlags;
use rustix::mount::UnmountFlags;

use crate::engine::Clock;
use crate::nbd::client::{Client, ClientConfig, ClientError};
use crate::nbd::listen::Address;

mod files;

use files::{Disk, Disks};

/// What to show, and where.
#[derive(Clone, Debug)]
pub struct FuseConfig {
    /// The folder; made if missing. It must be empty, and not mounted on.
    pub mountpoint: PathBuf,
    /// The files.
    pub files: Vec<FuseFile>,
    /// How long to wait for the NBD servers at the start.
    pub connect_timeout: Duration,
    /// How long a request may wait for a server that is away before it fails
    /// with EIO; None, the usual, waits for ever, as a file system above needs.
    pub request_timeout: Option<Duration>,
}

impl FuseConfig {
    /// With the usual bounds: a minute for the start, requests wait for ever.
    pub fn new(mountpoint: PathBuf, files: Vec<FuseFile>) -> Self {
        let connect_timeout = Duration::from_secs(60);
        Self { mountpoint, files, connect_timeout, request_timeout: None }
    }
}

/// One disk as a file.
#[derive(Clone, Debug)]
pub struct FuseFile {
    /// Its name in the folder.
    pub name: String,
    /// The server's Unix socket.
    pub socket: PathBuf,
    /// The export's name there.
    pub export: String,
    /// Opens for writing are refused; always so if the export is read-only.
    pub read_only: bool,
}

/// Why disks cannot be shown as files.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// Something is in the folder: mounting would hide it.
    #[error("{0} is not empty: choose an empty folder, or a new one")]
    NotEmpty(PathBuf),
    /// Something is mounted there that is alive.
    #[error("{0} is already a mount point: unmount it, or choose another folder")]
    Mounted(PathBuf),
    /// Two files of one name, or a name with a slash.
    #[error("{0:?} cannot be a file's name here")]
    Name(String),
    /// No connection to a server.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The mount failed.
    #[error("cannot mount on {path}: {source}{hint}")]
    Mount {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// The mount ended by an error.
    #[error("the FUSE mount ended: {0}")]
    Session(io::Error),
}

/// Mounts, calls `ready`, and serves until `stop` becomes true and the mount
/// is no longer in use, or until somebody unmounts it. While it is in use it
/// goes on serving: whoever is above would lose what it has not written yet.
pub fn run(
    config: &FuseConfig,
    clock: &Arc<dyn Clock>,
    stop: &AtomicBool,
    ready: impl FnOnce(),
) -> Result<(), FuseError> {
    avoid_deadlock();
    prepare(&config.mountpoint)?;
    let disks = connect(config, clock)?;
    let path = config.mountpoint.canonicalize().map_err(|source| mount_error(config, source))?;
    let session = Session::new(Disks::new(disks), &path, &options());
    let session = session.map_err(|source| mount_error(config, source))?;
    let session = session.spawn().map_err(|source| mount_error(config, source))?;
    ready();
    let mut told = false;
    while !session.guard.is_finished() {
        if stop.load(Ordering::SeqCst) {
            match unmount(&path, false) {
                Ok(()) => break,
                Err(error) if !told => {
                    tracing::warn!(path = %path.display(), %error, "in use; serving until it is not");
                    told = true;
                }
                Err(_) => {}
            }
        }
        std::thread::sleep(POLL);
    }
    session.join().map_err(FuseError::Session)
}

/// Loop devices and file systems above write back through this process when
/// memory is short: it must not wait for that itself, nor be swapped out.
fn avoid_deadlock() {
    // Both need root, and are inherited by the threads made from now on.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::debug!(%error, "not an I/O flusher");
    }
    if rustix::process::geteuid().is_root() {
        let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
        if let Err(error) = rustix::mm::mlockall(flags) {
            tracing::debug!(%error, "memory is not locked");
        }
    }
}

fn options() -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("standfast".to_owned()),
        MountOption::Subtype("standfast".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::NoAtime,
    ];
    // Others than root may not allow others without a line in /etc/fuse.conf.
    if rustix::process::geteuid().is_root() {
        config.acl = SessionACL::All;
    }
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    config
}

/// Clears away a mount whose process died; makes the folder; refuses one in use.
fn prepare(path: &Path) -> Result<(), FuseError> {
    let failed = |source| FuseError::Mount { path: path.to_owned(), source, hint: "" };
    let not_connected = rustix::io::Errno::NOTCONN.raw_os_error();
    if let Err(error) = std::fs::metadata(path)
        && error.raw_os_error() == Some(not_connected)
    {
        tracing::warn!(path = %path.display(), "unmounting what a dead process left");
        unmount(path, true).map_err(failed)?;
    }
    std::fs::create_dir_all(path).map_err(failed)?;
    let path = path.canonicalize().map_err(failed)?;
    if is_mounted(&path) {
        return Err(FuseError::Mounted(path));
    }
    match std::fs::read_dir(&path).map_err(failed)?.next() {
        None => Ok(()),
        Some(_) => Err(FuseError::NotEmpty(path)),
    }
}

/// Whether something is mounted exactly there.
fn is_mounted(path: &Path) -> bool {
    let Ok(table) = std::fs::read_to_string("/proc/self/mountinfo") else { return false };
    let escaped = path.to_string_lossy().replace('\\', "\\134").replace(' ', "\\040");
    table.lines().any(|line| line.split(' ').nth(4) == Some(&escaped))
}

/// Unmounts; with `lazy` although it is in use.
fn unmount(path: &Path, lazy: bool) -> io::Result<()> {
    let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match rustix::mount::unmount(path, flags) {
        Err(rustix::io::Errno::PERM) => {}
        other => return Ok(other?),
    }
    let mut command = Command::new("fusermount3");
    let how = if lazy { "-uz" } else { "-u" };
    let output = command.args([how, "--"]).arg(path).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

fn connect(config: &FuseConfig, clock: &Arc<dyn Clock>) -> Result<Vec<Disk>, FuseError> {
    let mut disks: Vec<Disk> = Vec::new();
    for file in &config.files {
        let odd = file.name.is_empty() || file.name.contains('/') || file.name.starts_with('.');
        if odd || disks.iter().any(|d| d.name == file.name) {
            return Err(FuseError::Name(file.name.clone()));
        }
        let client = Client::connect(
            ClientConfig {
                connect_timeout: config.connect_timeout,
                request_timeout: config.request_timeout,
                ..ClientConfig::new(Address::Unix(file.socket.clone()), &file.export)
            },
            Arc::clone(clock),
        )?;
        let info = client.info();
        disks.push(Disk {
            name: file.name.clone(),
            size: info.size,
            read_only: file.read_only || info.read_only(),
            client,
        });
    }
    Ok(disks)
}

fn mount_error(config: &FuseConfig, source: io::Error) -> FuseError {
    let hint = if !Path::new("/dev/fuse").exists() {
        "; /dev/fuse is missing: modprobe fuse"
    } else if !rustix::process::geteuid().is_root() {
        "; install fuse3 (fusermount3), or run as root"
    } else {
        ""
    };
    FuseError::Mount { path: config.mountpoint.clone(), source, hint }
}

/// Threads that read the kernel's requests; answers come from the clients' threads.
const THREADS: usize = 2;
const POLL: Duration = Duration::from_millis(100);
