//! Points and drills as files: one FUSE process a mount, recorded in
//! `DIR/mounts`, so that it can be listed and ended by another command.
//!
//! A mount outlives the command that made it and the target (its client
//! reconnects). Its record is written before the process starts and removed
//! after it ended; a record without a process is left over and removed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockfilter::engine::Clock;
use blockfilter::engine::real::RealFiles;
use blockfilter::engine::{read_file, replace_file};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::backing;
use super::process::{RoleLock, Running, Spawn};
use super::status::ProcessStatus;
use super::worker::log_tail;
use crate::errors::{Exit, Failure, IoContext, Outcome};

/// What a FUSE process shows, as given to `run-fuse`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// The folder, absolute.
    pub mountpoint: PathBuf,
    /// The lock that the process holds.
    pub lock: PathBuf,
    /// The files.
    pub files: Vec<MountFile>,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountFile {
    /// Its name.
    pub name: String,
    /// The NBD server's socket.
    pub socket: PathBuf,
    /// The export.
    pub export: String,
    /// Whether it cannot be written.
    pub read_only: bool,
}

impl MountSpec {
    /// Reads one.
    pub fn load(path: &Path) -> Outcome<Self> {
        let what = format!("cannot read {}", path.display());
        let text = read_file(&RealFiles, path, 1 << 20).failed(what.clone())?;
        serde_json::from_slice(&text)
            .map_err(|e| Failure::new(Exit::WrongState, what).why(e.to_string()))
    }

    /// Writes it.
    pub fn store(&self, path: &Path) -> Outcome {
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        replace_file(&RealFiles, path, &text).failed(format!("cannot write {}", path.display()))
    }

    /// The files' paths.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.files.iter().map(|f| self.mountpoint.join(&f.name)).collect()
    }

    /// Whether all files are there with some size.
    pub fn shown(&self) -> bool {
        self.paths().iter().all(|p| std::fs::metadata(p).is_ok_and(|m| m.len() > 0))
    }
}

/// How `run-fuse` is started.
pub fn spawn_of(spec: &Path, log: PathBuf) -> Spawn {
    Spawn { arguments: vec![OsString::from("run-fuse"), "--spec".into(), spec.into()], log }
}

fn folder(dir: &Path) -> PathBuf {
    dir.join("mounts")
}

/// All records, with their paths.
fn records(dir: &Path) -> Vec<(PathBuf, MountSpec)> {
    let Ok(entries) = std::fs::read_dir(folder(dir)) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "json"))
        .filter_map(|p| MountSpec::load(&p).ok().map(|spec| (p, spec)))
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// Mounts `files` on `mountpoint` and waits until they are there.
pub fn mount(
    dir: &Path,
    mountpoint: &Path,
    files: Vec<MountFile>,
    clock: &dyn Clock,
) -> Outcome<MountSpec> {
    let what = format!("cannot show files in {}", mountpoint.display());
    super::private_dir(&folder(dir))?;
    std::fs::create_dir_all(mountpoint).failed(what.clone())?;
    let mountpoint = mountpoint.canonicalize().failed(what.clone())?;
    let mut entries = std::fs::read_dir(&mountpoint).failed(what.clone())?;
    if entries.next().is_some() {
        return Err(Failure::coded(Exit::Busy, 17, what)
            .why("the folder is not empty")
            .hint("give an empty folder, or: standfast point unmount DIR"));
    }
    let record = folder(dir).join(format!("{}.json", Uuid::now_v7().simple()));
    let spec = MountSpec { mountpoint, lock: record.with_extension("lock"), files };
    spec.store(&record)?;
    let log = record.with_extension("log");
    let mut process = Running::spawn(&spawn_of(&record, log.clone())).failed(what.clone())?;
    let deadline = clock.mono_us() + MOUNT_US;
    let failure = loop {
        if spec.shown() {
            return Ok(spec);
        }
        if let Some(how) = process.ended() {
            break Failure::new(Exit::Failed, what).why(format!("{how}: {}", log_tail(&log)));
        }
        if clock.mono_us() >= deadline {
            process.signal(true);
            break Failure::new(Exit::TimedOut, what).why("the FUSE process does not get ready");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    forget(&record);
    Err(failure)
}

/// Unmounts what is on `mountpoint`. A loop device on one of its files: busy.
pub fn unmount(dir: &Path, mountpoint: &Path, clock: &dyn Clock) -> Outcome {
    let absolute = std::path::absolute(mountpoint).failed("cannot use the folder")?;
    let place = absolute.canonicalize().unwrap_or(absolute);
    let found = records(dir).into_iter().find(|(_, spec)| spec.mountpoint == place);
    let Some((record, spec)) = found else {
        let what = format!("no point or drill is mounted on {}", place.display());
        return Err(Failure::coded(Exit::NotFound, 9, what)
            .hint(format!("standfast status --dir {} lists processes", dir.display())));
    };
    end(&record, &spec, clock)
}

/// Unmounts every mount that shows one of `exports`.
pub fn unmount_exports(dir: &Path, exports: &[String], clock: &dyn Clock) -> Outcome {
    for (record, spec) in records(dir) {
        if spec.files.iter().any(|f| exports.contains(&f.export)) {
            end(&record, &spec, clock)?;
        }
    }
    Ok(())
}

fn end(record: &Path, spec: &MountSpec, clock: &dyn Clock) -> Outcome {
    for path in spec.paths() {
        if let Some(device) = backing::loop_on(&path, None) {
            let what = format!("{} is in use", spec.mountpoint.display());
            return Err(Failure::coded(Exit::Busy, 18, what)
                .why(format!("{device} is a loop device on {}", path.display()))
                .hint(format!("umount it and losetup -d {device} first")));
        }
    }
    super::enlist::end_lock(&spec.lock, "fuse", clock)?;
    forget(record);
    Ok(())
}

fn forget(record: &Path) {
    for extension in ["lock", "log", "json"] {
        let _ = std::fs::remove_file(record.with_extension(extension));
    }
}

/// The processes of all mounts.
pub fn processes(dir: &Path) -> Vec<ProcessStatus> {
    records(dir)
        .iter()
        .map(|(_, spec)| ProcessStatus {
            role: "fuse".into(),
            pid: RoleLock::holder(&spec.lock).ok().flatten(),
            ..ProcessStatus::default()
        })
        .collect()
}

/// Where an export is shown as a file, if it is.
pub fn file_of(dir: &Path, export: &str) -> Option<PathBuf> {
    records(dir).into_iter().find_map(|(_, spec)| {
        let file = spec.files.iter().find(|f| f.export == export)?;
        Some(spec.mountpoint.join(&file.name))
    })
}

const MOUNT_US: u64 = 30_000_000;
