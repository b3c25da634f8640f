//! The processes: agent and target, what they have in common, and the
//! processes that the agent starts.
//!
//! | part | module |
//! |---|---|
//! | the agent | [`agent`] |
//! | what a protected group looks like from its machine | [`source`] |
//! | what the agent asks the target | [`remote`] |
//! | the target's view of a group | [`replica`] |
//! | the target | [`target`] |
//! | points and drills as files | [`mounts`] |
//! | protected disks over NBD on TCP | [`gateway`] |
//! | the application's consent | [`hooks`] |
//! | the Status document | [`status`] |
//! | a process that is kept running | [`worker`] |
//! | whether a disk may be protected | [`backing`] |
//! | making a group and taking it apart | [`enlist`] |
//! | local control sockets: one JSON document a line, each way | [`control`] |
//! | one process of a role at a time; starting, finding, stopping one | [`process`] |
//! | when to start a process again | [`supervise`] |
//! | settings of the C library | [`tunables`] |
//!
//! Nothing here is on the data path: a daemon may be killed at any time, the
//! filters it started keep serving, and the next one finds them (ruling 21).

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockfilter::engine::make_dir;
use blockfilter::engine::real::RealFiles;
use blockfilter::nbd::server::ServerConfig;

use crate::errors::{Failure, IoContext, Outcome};

pub mod agent;
pub mod backing;
pub mod control;
pub mod enlist;
pub mod gateway;
pub mod hooks;
pub mod mounts;
pub mod process;
pub mod remote;
pub mod replica;
pub mod source;
pub mod status;
pub mod supervise;
pub mod target;
pub mod tunables;
pub mod worker;

/// Becomes true when the process is asked to stop (SIGTERM, SIGINT, SIGHUP).
pub fn stop_flag() -> Outcome<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in
        [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP]
    {
        signal_hook::flag::register(signal, stop.clone()).failed("cannot watch for signals")?;
    }
    Ok(stop)
}

/// Waits for `stop`, calling `every` about each `period`.
pub fn run_until(stop: &AtomicBool, period: Duration, mut every: impl FnMut()) {
    while !stop.load(Ordering::SeqCst) {
        every();
        // A signal ends the sleep early only in this thread; the period bounds the delay.
        std::thread::sleep(period);
    }
}

/// Tells systemd; without systemd it does nothing.
pub fn notify_ready(line: &str) {
    let state = [sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status(line)];
    if let Err(error) = sd_notify::notify(false, &state) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}

/// Tells systemd that the process is going.
pub fn notify_stopping() {
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
}

/// Makes a folder that only its owner may enter; its name is durable on return.
pub fn private_dir(dir: &Path) -> Outcome {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let what = || format!("cannot make the folder {}", dir.display());
    if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty() && !p.exists()) {
        private_dir(parent)?;
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).failed(what())?;
    make_dir(&RealFiles, dir).failed(what())?;
    let mode = std::fs::metadata(dir).failed(what())?.permissions().mode();
    if mode & 0o077 != 0 {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).failed(what())?;
    }
    Ok(())
}

/// A state directory must exist; `make` is the command that makes it.
pub fn state_dir(dir: &Path, make: &str) -> Outcome {
    if dir.is_dir() {
        return Ok(());
    }
    Err(Failure::coded(
        crate::errors::Exit::NotFound,
        1,
        format!("there is no state directory {}", dir.display()),
    )
    .hint(make))
}

/// An NBD server's limits, and TLS on TCP if there is a folder of certificates.
pub fn nbd_server(tls: Option<&Path>) -> Outcome<ServerConfig> {
    let mut config = ServerConfig::default();
    if let Some(dir) = tls {
        let tls = replicator::identity::nbd_tls(&RealFiles, dir);
        config.tls = Some(tls.map_err(|e| target::identity_failure(&e))?);
        config.tls_required = true;
    }
    Ok(config)
}
