//! The agent: keeps the processes of every protected group running, and answers
//! `status`.
//!
//! Owns `DIR/agent.lock`, the control socket and the supervision of filters,
//! replicators and FUSE processes. It is on nobody's data path: when it stops
//! or is killed the others go on, and the next agent adopts them (ruling 21).
//! SIGTERM therefore stops the agent only; `unprotect` stops a group.
//!
//! A group exists once its `group.json` does (written last by `protect`,
//! removed first by `unprotect`); a group's folder without it is left over from
//! a command that was cut off and is removed at start.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockfilter::config::{GroupConfig, GroupPaths};
use blockfilter::engine::Clock;
use blockfilter::engine::real::RealFiles;
use blockfilter::names::Name;

use super::control::{self, AgentRequest, Reply};
use super::gateway;
use super::mounts::{self, MountFile, MountSpec};
use super::process::{LockError, RoleLock, Spawn};
use super::source;
use super::status::{ProcessStatus, Status};
use super::worker::Worker;
use crate::errors::{Exit, Failure, IoContext, Outcome};
use crate::output::Output;

/// The daemon's state.
#[derive(Debug)]
pub struct Agent {
    dir: PathBuf,
    clock: Arc<dyn Clock>,
    groups: Mutex<BTreeMap<Name, Managed>>,
    /// Processes of released groups, until they ended: they are our children.
    leaving: Mutex<Vec<Worker>>,
}

#[derive(Debug)]
struct Managed {
    config: GroupConfig,
    paths: GroupPaths,
    workers: Vec<Worker>,
}

/// Runs the agent until it is told to stop.
pub fn run(
    dir: &Path,
    nbd: Option<(&str, Option<&Path>)>,
    clock: Arc<dyn Clock>,
    output: Output,
) -> Outcome {
    let stop = super::stop_flag()?;
    let _lock = take_lock(dir)?;
    let groups_dir = dir.join("groups");
    super::private_dir(&groups_dir)?;
    let agent = Arc::new(Agent {
        dir: dir.to_owned(),
        clock,
        groups: Mutex::default(),
        leaving: Mutex::default(),
    });
    remove_left_over(dir)?;
    for name in group_names(dir) {
        if let Err(failure) = agent.load(&name) {
            output.warn(&format!("group {name} is not served: {failure}"));
        }
    }
    agent.poll();
    let socket = control::socket_in(dir);
    let answering = agent.clone();
    control::serve(&socket, stop.clone(), move |request| answering.answer(request))
        .failed(format!("cannot listen on {}", socket.display()))?;
    let mut gateway =
        nbd.map(|(at, tls)| gateway::serve(dir, at, tls, agent.clock.clone())).transpose()?;
    let nbd = gateway.as_ref().and_then(|g| g.addresses().first()).map(ToString::to_string);
    let count = agent.lock().len();
    output.ready(serde_json::json!({
        "role": "agent", "dir": dir, "control": socket, "groups": count, "nbd": nbd,
        "pid": std::process::id(),
    }));
    super::notify_ready(&format!("{count} groups"));
    super::run_until(&stop, POLL, || agent.poll());
    super::notify_stopping();
    if let Some(gateway) = &mut gateway {
        gateway.stop();
    }
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

fn take_lock(dir: &Path) -> Outcome<RoleLock> {
    RoleLock::take(&dir.join("agent.lock")).map_err(|error| match error {
        LockError::Held(_) => {
            let what = format!("another agent runs in {}", dir.display());
            Failure::coded(Exit::Busy, 2, what)
                .why(error.to_string())
                .hint(format!("standfast status --dir {}", dir.display()))
        }
        LockError::Io(error) => Failure::io(format!("cannot lock {}", dir.display()), &error),
    })
}

/// Groups that exist: those with a `group.json`.
pub fn group_names(dir: &Path) -> Vec<Name> {
    let Ok(entries) = std::fs::read_dir(dir.join("groups")) else { return Vec::new() };
    let mut names: Vec<Name> = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|name| GroupPaths::new(dir, name).config().exists())
        .collect();
    names.sort();
    names
}

/// The configuration of a group of this agent.
pub fn load_config(dir: &Path, group: &Name) -> Outcome<(GroupConfig, GroupPaths)> {
    let paths = GroupPaths::new(dir, group);
    if !paths.config().exists() {
        let what = format!("there is no group {group} in {}", dir.display());
        return Err(Failure::coded(Exit::NotFound, 2, what)
            .hint(format!("standfast status --dir {}", dir.display())));
    }
    let config = GroupConfig::load(&RealFiles, &paths)
        .failed(format!("cannot read the configuration of group {group}"))?;
    Ok((config, paths))
}

/// Held by `protect` and `unprotect` while they make or remove a group.
pub fn change_lock(dir: &Path) -> Outcome<RoleLock> {
    RoleLock::take(&dir.join("change.lock")).map_err(|error| match error {
        LockError::Held(_) => {
            Failure::coded(Exit::Busy, 3, "another protect or unprotect is running")
                .why(error.to_string())
                .hint("wait until it is done")
        }
        LockError::Io(error) => Failure::io(format!("cannot lock {}", dir.display()), &error),
    })
}

/// Removes what a protect or unprotect that was cut off left. Not while one runs.
fn remove_left_over(dir: &Path) -> Outcome {
    let Ok(_lock) = change_lock(dir) else { return Ok(()) };
    let groups = dir.join("groups");
    for entry in std::fs::read_dir(&groups).failed("cannot list the groups")?.flatten() {
        let path = entry.path();
        if !path.is_dir() || path.join("group.json").exists() {
            continue;
        }
        if RoleLock::holder(&path.join("filter.lock")).failed("cannot look for a filter")?.is_some()
        {
            continue;
        }
        tracing::warn!(path = %path.display(), "removing a half-made group");
        std::fs::remove_dir_all(&path).failed(format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

impl Agent {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Name, Managed>> {
        // A panicked holder leaves the map whole: workers are moved in one step.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leaving(&self) -> MutexGuard<'_, Vec<Worker>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, request: AgentRequest) -> Reply {
        let result = match request {
            AgentRequest::Ping => Ok(Reply::pong()),
            AgentRequest::Status { group } => self.status(group.as_ref()),
            AgentRequest::Load { group } => self.load_and_wait(&group),
            AgentRequest::Release { group } => self.release(&group),
            AgentRequest::Adopt { group } => self.adopt(&group),
        };
        result.into()
    }

    /// Looks after every process once.
    fn poll(&self) {
        let now = self.clock.mono_us();
        let mut groups = self.lock();
        for managed in groups.values_mut() {
            managed.workers.iter_mut().for_each(|worker| worker.poll(now));
        }
        drop(groups);
        self.leaving().retain_mut(|worker| {
            worker.poll(now);
            worker.runs()
        });
    }

    fn load(&self, group: &Name) -> Outcome {
        let (config, paths) = load_config(&self.dir, group)?;
        let workers = workers(&self.dir, &config, &paths)?;
        let managed = Managed { config, paths, workers };
        self.lock().insert(group.clone(), managed);
        Ok(())
    }

    /// Starts a group and waits until its filter answers and its files are there.
    fn load_and_wait(&self, group: &Name) -> Result<Reply, Failure> {
        if self.lock().contains_key(group) {
            return Ok(Reply::Done);
        }
        self.load(group)?;
        let deadline = self.clock.mono_us() + START_TIMEOUT_US;
        loop {
            self.poll();
            let (config, paths) = load_config(&self.dir, group)?;
            if source::serves(&config, &paths) {
                return Ok(Reply::Done);
            }
            let failed = self.lock().get(group).and_then(|m| {
                m.workers.iter().find(|w| w.restarts() >= 3).map(|w| (w.role(), w.last_end()))
            });
            if let Some((role, end)) = failed {
                return Err(Failure::new(
                    Exit::Failed,
                    format!("the {role} of {group} does not start"),
                )
                .why(end.unwrap_or_else(|| "it ended three times".into()))
                .hint(format!("see {}", paths.dir().join(format!("{role}.log")).display())));
            }
            if self.clock.mono_us() >= deadline {
                return Err(Failure::new(
                    Exit::TimedOut,
                    format!("group {group} does not serve yet"),
                )
                .hint(format!("standfast status {group} --dir {}", self.dir.display())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn adopt(&self, group: &Name) -> Result<Reply, Failure> {
        if !self.lock().contains_key(group) {
            self.load(group)?;
        }
        Ok(Reply::Done)
    }

    /// Ends replicator and FUSE process and waits for them; the filter stays.
    fn release(&self, group: &Name) -> Result<Reply, Failure> {
        let Some(managed) = self.lock().remove(group) else { return Ok(Reply::Done) };
        let mut workers = managed.workers;
        for worker in &mut workers {
            worker.release(worker.role() == "filter");
        }
        let deadline = self.clock.mono_us() + RELEASE_TIMEOUT_US;
        let busy = loop {
            let mut others = workers.iter_mut().filter(|w| w.role() != "filter");
            let Some(role) = others.find_map(|w| w.runs().then(|| w.role())) else { break None };
            if self.clock.mono_us() >= deadline {
                break Some(role);
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        self.leaving().extend(workers);
        match busy {
            None => Ok(Reply::Done),
            Some(role) => {
                let what = format!("the {role} of {group} does not end");
                Err(Failure::new(Exit::TimedOut, what).hint("try again"))
            }
        }
    }

    fn status(&self, group: Option<&Name>) -> Result<Reply, Failure> {
        let mut processes = vec![ProcessStatus {
            role: "agent".into(),
            pid: Some(std::process::id()),
            ..ProcessStatus::default()
        }];
        let mut wanted = Vec::new();
        let mut ends = BTreeMap::new();
        for (name, managed) in self.lock().iter() {
            if group.is_none_or(|g| g == name) {
                processes.extend(managed.workers.iter().map(Worker::status));
                let filter = managed.workers.iter().find(|w| w.role() == "filter");
                ends.insert(name.to_string(), filter.and_then(Worker::last_end));
                wanted.push((managed.config.clone(), managed.paths.clone()));
            }
        }
        if wanted.is_empty()
            && let Some(group) = group
        {
            load_config(&self.dir, group)?;
        }
        let mut status = document(&self.dir, &wanted, processes);
        for group in status.groups.iter_mut().filter(|g| g.lsn.durable.is_none()) {
            group.reasons.extend(ends.remove(&group.group).flatten());
        }
        Ok(Reply::document(&status))
    }
}

/// The Status document of groups, from what their processes answer.
pub fn document(
    dir: &Path,
    groups: &[(GroupConfig, GroupPaths)],
    processes: Vec<ProcessStatus>,
) -> Status {
    let views: Vec<_> = groups.iter().map(|(config, paths)| source::ask(config, paths)).collect();
    let io_engine = views.iter().find_map(|v| v.filter.as_ref().map(|f| f.io_engine.clone()));
    let groups =
        groups.iter().zip(&views).map(|((c, p), view)| source::group_status(c, p, view)).collect();
    Status {
        schema: "standfast/v1/Status".into(),
        role: "agent".into(),
        groups,
        processes,
        io_engine,
        control_socket: Some(control::socket_in(dir).display().to_string()),
        nbd: Vec::new(),
    }
}

/// The processes of a group.
fn workers(dir: &Path, config: &GroupConfig, paths: &GroupPaths) -> Outcome<Vec<Worker>> {
    let group = config.group.to_string();
    let log = |role: &str| paths.dir().join(format!("{role}.log"));
    let worker = |role: &'static str, spawn: Spawn| {
        Worker::new(role, Some(group.clone()), role_lock(paths, role), spawn)
    };
    let run = |role: &'static str| {
        let mut arguments: Vec<OsString> = vec![format!("run-{role}").into(), "--dir".into()];
        arguments.push(dir.into());
        arguments.push(group.clone().into());
        worker(role, Spawn { arguments, log: log(role) })
    };
    let mut workers = vec![run("filter"), run("replicator")];
    if let Some(mountpoint) = &config.fuse {
        let file = |d: &blockfilter::config::DiskConfig| MountFile {
            name: d.disk.to_string(),
            socket: paths.nbd_socket(),
            export: config.export(&d.disk),
            read_only: false,
        };
        let spec = MountSpec {
            mountpoint: mountpoint.clone(),
            lock: role_lock(paths, "fuse"),
            files: config.disks.iter().map(file).collect(),
        };
        let path = paths.dir().join("fuse.json");
        spec.store(&path)?;
        workers.push(worker("fuse", mounts::spawn_of(&path, log("fuse"))));
    }
    Ok(workers)
}

/// The lock that the process of a role of a group holds.
pub fn role_lock(paths: &GroupPaths, role: &str) -> PathBuf {
    paths.dir().join(format!("{role}.lock"))
}

/// Takes a role's lock for this process, for as long as it lives.
pub fn take_role(paths: &GroupPaths, role: &str) -> Outcome<RoleLock> {
    take_lock_of(&role_lock(paths, role), role)
}

/// Takes the lock at `path` for this process, for as long as it lives.
pub fn take_lock_of(path: &Path, role: &str) -> Outcome<RoleLock> {
    RoleLock::take(path).map_err(|error| {
        Failure::coded(Exit::Busy, 4, format!("another {role} of this kind runs"))
            .why(error.to_string())
    })
}

const POLL: Duration = Duration::from_millis(100);
const START_TIMEOUT_US: u64 = 90_000_000;
const RELEASE_TIMEOUT_US: u64 = 30_000_000;
