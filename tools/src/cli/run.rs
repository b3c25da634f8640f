//! Hidden commands that the daemons start as processes of their own: a group's
//! filter, its replicator, a FUSE front end.
//!
//! Each leaves the starter's session, takes its role's lock (so that there is
//! one of its kind and the next agent finds it) and runs until it is told to stop.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockfilter::config::GroupPaths;
use blockfilter::control::{Client, Request};
use blockfilter::engine::real::RealFiles;
use blockfilter::fuse::{FuseConfig, FuseError, FuseFile};
use blockfilter::names::Name;
use clap::Args;
use replicator::shipper::{self, ReplicatorConfig};

use super::Context;
use crate::daemon::mounts::{self, MountSpec};
use crate::daemon::{self, agent, process};
use crate::errors::{Exit, Failure, Outcome};

/// Arguments of `run-filter` and `run-replicator`.
#[derive(Debug, Args)]
pub struct GroupArgs {
    /// The group.
    pub group: Name,
}

/// The filter process of a group (decision 4: no replication code in it).
///
/// SIGTERM, as at shutdown, applies everything and marks the journal clean:
/// the arena does not outlive the machine.
pub fn filter(args: &GroupArgs, context: &Context) -> Outcome {
    process::detach();
    end_on_panic();
    let stop = daemon::stop_flag()?;
    let (config, paths) = agent::load_config(&context.dir, &args.group)?;
    let _role = agent::take_role(&paths, "filter")?;
    let watched = paths.clone();
    let watch = move || stop_filter_on(&stop, &watched);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(watch)
        .map_err(|e| Failure::io("cannot start a thread", &e))?;
    let ready = || tracing::info!(group = %args.group, "the filter serves");
    blockfilter::group::run(&config, &paths, ready).map_err(|error| {
        Failure::new(Exit::WrongState, format!("the filter of {} ended", args.group))
            .why(error.to_string())
    })
}

/// The replicator process of a group; it may be killed at any time.
pub fn replicator(args: &GroupArgs, context: &Context) -> Outcome {
    daemon::tunables::apply();
    process::detach();
    let stop = daemon::stop_flag()?;
    let (group, paths) = agent::load_config(&context.dir, &args.group)?;
    let _role = agent::take_role(&paths, "replicator")?;
    let config = ReplicatorConfig { group, paths, agent_dir: context.dir.clone() };
    // Production first: what a full processor delays is the copy, and status says by how much. This
    // counts beside tasks of the same group only; a session lowers the group's own value.
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::warn!(%error, "the replicator runs at the priority of production");
    }
    shipper::run(&config, &RealFiles, &context.clock, &stop).map_err(|error| {
        Failure::new(Exit::Failed, format!("the replicator of {} ended", args.group))
            .why(error.to_string())
    })
}

/// A broken invariant in any thread ends the process at once: clients reconnect and
/// the next start takes the arena over. A process that lives on without one
/// of its threads would keep them waiting for ever.
fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}

/// Arguments of `run-fuse`.
#[derive(Debug, Args)]
pub struct FuseArgs {
    /// What to show, and where: a [`MountSpec`].
    #[arg(long, value_name = "FILE")]
    pub spec: PathBuf,
}

/// A FUSE process: a group's files, or a point's or drill's.
///
/// SIGTERM unmounts; while the mount is in use it goes on serving.
pub fn fuse(args: &FuseArgs, context: &Context) -> Outcome {
    process::detach();
    let stop = daemon::stop_flag()?;
    let spec = MountSpec::load(&args.spec)?;
    let _role = agent::take_lock_of(&spec.lock, "FUSE process")?;
    let file = |f: &mounts::MountFile| FuseFile {
        name: f.name.clone(),
        socket: f.socket.clone(),
        export: f.export.clone(),
        read_only: f.read_only,
    };
    let files = spec.files.iter().map(file).collect();
    let config = FuseConfig::new(spec.mountpoint.clone(), files);
    let ready = || tracing::info!(path = %spec.mountpoint.display(), "mounted");
    blockfilter::fuse::run(&config, &context.clock, &stop, ready).map_err(|error| {
        let exit = match error {
            FuseError::NotEmpty(_) | FuseError::Mounted(_) => Exit::Busy,
            _ => Exit::Failed,
        };
        let what = format!("cannot show files in {}", spec.mountpoint.display());
        Failure::coded(exit, 17, what).why(error.to_string())
    })
}

/// Once a signal came: tells the filter to stop, as often as needed.
fn stop_filter_on(stop: &Arc<AtomicBool>, paths: &GroupPaths) {
    loop {
        if stop.load(Ordering::SeqCst) {
            let asked = Client::connect(&paths.filter_socket())
                .and_then(|mut c| c.ask(&Request::Stop { drain: true }, STOP_TIMEOUT));
            match asked {
                Ok(_) => return,
                Err(error) => tracing::warn!(%error, "the filter does not stop yet"),
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

const STOP_TIMEOUT: Duration = Duration::from_secs(600);

/// Added to the replicator's nice value.
const NICE: i32 = 10;
