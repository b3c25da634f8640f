//! Making a group and taking it apart: the steps of `protect` and `unprotect`
//! on this machine's files.
//!
//! A group exists from the moment its `group.json` is durable until that file
//! is removed; everything before and after is undone or finished by whoever
//! comes next. The disks themselves are not changed by any step here except
//! [`take_apart`], which lets the filter write back what the journal holds.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockfilter::config::{GroupConfig, GroupPaths};
use blockfilter::control::{Client, Reply, Request};
use blockfilter::engine::real::RealFiles;
use blockfilter::engine::{Clock, File, Files, Open};
use blockfilter::group::RunError;
use blockfilter::journal::format::JournalSuper;
use blockfilter::journal::open::{read_chunks, read_super};
use blockfilter::names::Name;

use super::agent::{group_names, load_config, role_lock};
use super::backing;
use super::process::{RoleLock, Running};
use super::source::ask_filter;
use crate::errors::{Exit, Failure, IoContext, Outcome};
use crate::units::show_bytes;

/// Refuses a disk that a group of this agent already has, and a journal that
/// one of them uses.
pub fn check_unprotected(dir: &Path, group: &Name, paths: &[PathBuf]) -> Outcome {
    for name in group_names(dir) {
        if name == *group {
            let what = format!("group {group} is already protected here");
            return Err(Failure::coded(Exit::Busy, 12, what)
                .hint(format!("standfast status {group} --dir {}", dir.display())));
        }
        let (config, _) = load_config(dir, &name)?;
        for disk in &config.disks {
            let taken = backing::identity_of(&disk.path);
            let clash = |path: &&PathBuf| {
                **path == disk.path || (taken.is_some() && backing::identity_of(path) == taken)
            };
            if let Some(path) = paths.iter().find(clash) {
                let what = format!("{} is already protected", path.display());
                return Err(Failure::coded(Exit::Busy, 13, what)
                    .why(format!("it is disk {}.{}", config.group, disk.disk))
                    .hint(format!("standfast unprotect {} first", config.group)));
            }
        }
    }
    Ok(())
}

/// Nothing where the journal will be, room for it, and for the arena in memory.
pub fn check_room(config: &GroupConfig) -> Outcome {
    if config.journal.exists() {
        let what = format!("{} exists already", config.journal.display());
        return Err(Failure::coded(Exit::Busy, 14, what)
            .why("a journal is never made over another file")
            .hint("remove it, or choose another path with --journal"));
    }
    let folder = config.journal.parent().unwrap_or(Path::new("/"));
    // The group's own folder is made later: ask the nearest one that exists.
    let existing = folder.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let room = |path: &Path, need: u64, what: &str, option: &str| {
        let free =
            RealFiles.free_bytes(path).failed(format!("cannot look at {}", path.display()))?;
        if free >= need {
            return Ok(());
        }
        Err(Failure::coded(Exit::Failed, 11, format!("not enough room for the {what}"))
            .why(format!(
                "{} are needed in {}, {} are free",
                show_bytes(need),
                path.display(),
                show_bytes(free)
            ))
            .hint(format!("free some space, or give a smaller {option}")))
    };
    room(
        existing,
        config.journal_bytes + MARGIN,
        "journal",
        "--journal-size, or --journal PATH on another file system",
    )?;
    room(Path::new("/dev/shm"), config.arena_bytes, "arena", "--arena-size")
}

/// Makes folder, journal and configuration of a group, in this order, or
/// nothing: on a failure or when `stop` becomes true all is removed again.
pub fn make(
    config: &GroupConfig,
    paths: &GroupPaths,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64, u64),
) -> Outcome {
    super::private_dir(paths.dir())?;
    let mut step = |done, total| {
        progress(done, total);
        match stop.load(Ordering::SeqCst) {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => Ok(()),
        }
    };
    let made = blockfilter::journal::create(&RealFiles, config, &mut step)
        .map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => {
                Failure::new(Exit::Interrupted, "interrupted; nothing was changed")
            }
            _ => {
                Failure::io(format!("cannot make the journal {}", config.journal.display()), &error)
            }
        })
        .and_then(|()| {
            config.store(&RealFiles, paths).failed("cannot write the group's configuration")
        });
    if made.is_err() {
        let _ = std::fs::remove_file(&config.journal);
        let _ = std::fs::remove_dir_all(paths.dir());
    }
    made
}

/// Refuses while a file under `--fuse` is in use: nothing can take it away from a loop
/// device or an open descriptor, only its users can let go.
pub fn check_files(config: &GroupConfig) -> Outcome {
    let Some(dir) = &config.fuse else { return Ok(()) };
    let busy = |why: String, hint: String| {
        Failure::coded(Exit::Busy, 15, format!("the disks of group {} are in use", config.group))
            .why(why)
            .hint(hint)
    };
    for disk in config.disks.iter().map(|d| dir.join(d.disk.as_str())) {
        if let Some(device) = backing::loop_on(&disk, None) {
            let why = format!("{device} is a loop device on {}", disk.display());
            return Err(busy(why, format!("unmount {device}, losetup -d {device}, try again")));
        }
    }
    match backing::user_of(dir) {
        Some(user) => {
            Err(busy(format!("{user} uses {}", dir.display()), "end it and try again".into()))
        }
        None => Ok(()),
    }
}

/// Whether a group's files are served at all.
pub fn serves_files(paths: &GroupPaths) -> bool {
    RoleLock::holder(&role_lock(paths, "fuse")).is_ok_and(|p| p.is_some())
}

/// Refuses while NBD clients are connected; those that go get a moment.
pub fn check_unused(config: &GroupConfig, paths: &GroupPaths, clock: &dyn Clock) -> Outcome {
    let busy = |why: String| {
        Failure::coded(Exit::Busy, 15, format!("the disks of group {} are in use", config.group))
            .why(why)
            .hint("unmount and detach them first, or say --force")
    };
    // The replicator's and the FUSE process's connections are ours.
    let deadline = clock.mono_us() + GRACE_US;
    let ours =
        u32::from(RoleLock::holder(&role_lock(paths, "replicator")).is_ok_and(|p| p.is_some()))
            + u32::from(config.fuse.is_some()) * config.disks.len() as u32;
    while let Some(status) = ask_filter(paths) {
        if status.connections <= ours {
            break;
        }
        if clock.mono_us() >= deadline {
            return Err(busy(format!("{} NBD connections are open", status.connections - ours)));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Ends the process of a role without an agent, and waits for it.
pub fn end_role(paths: &GroupPaths, role: &str, clock: &dyn Clock) -> Outcome {
    end_lock(&role_lock(paths, role), role, clock)
}

/// Ends the process that holds a role's lock, if there is one, and waits for it.
pub fn end_lock(lock: &Path, role: &str, clock: &dyn Clock) -> Outcome {
    let what = || format!("cannot end the {role}");
    let Some(pid) = RoleLock::holder(lock).failed(what())? else { return Ok(()) };
    let Some(mut process) = Running::adopt(pid, lock).failed(what())? else { return Ok(()) };
    process.signal(false);
    let started = clock.mono_us();
    while process.ended().is_none() {
        let waited = clock.mono_us() - started;
        if waited > 2 * END_US {
            let what = format!("the {role} (process {pid}) does not end");
            return Err(Failure::coded(Exit::Busy, 19, what)
                .why("its files may be in use")
                .hint("unmount and close what uses them, and try again"));
        }
        // A FUSE process that is in use serves on: killing it would cost its user writes.
        if waited > END_US && role != "fuse" {
            process.signal(true);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// What went with a journal that was given up.
#[derive(Debug)]
pub struct Abandoned {
    /// Why it had to be.
    pub why: String,
    /// All that was acknowledged was in memory too, and is on the disks.
    pub whole: bool,
    /// Writes below this position are on the disks; None if that cannot be told.
    pub checkpoint: Option<u64>,
    /// The journal held at most so much behind it.
    pub at_most_bytes: Option<u64>,
    /// Where the journal is now.
    pub kept: Option<PathBuf>,
}

/// Applies everything to the disks and ends the filter; without a filter it
/// recovers and applies in this process. On return the disks are plain images. With
/// `force` a journal that cannot be used is given up.
pub fn drain(
    config: &GroupConfig,
    paths: &GroupPaths,
    clock: &dyn Clock,
    force: bool,
) -> Outcome<Option<Abandoned>> {
    let lock = role_lock(paths, "filter");
    let what = format!("cannot apply the journal of group {} to its disks", config.group);
    let hint = "nothing is lost: the journal and the disks stay as they are; repair and try again";
    if let Ok(mut filter) = Client::connect(&paths.filter_socket()) {
        match filter.ask(&Request::Stop { drain: true }, DRAIN_TIMEOUT) {
            Ok(Reply::Stopped) => {}
            // A start writes again what a disk did not take.
            Ok(Reply::Failed { message }) => tracing::warn!(message, "the filter could not drain"),
            Ok(other) => return Err(Failure::new(Exit::Failed, what).why(format!("{other:?}"))),
            // It may have died on the way: the recovery below is right for that too.
            Err(error) => tracing::warn!(%error, "the filter did not confirm its stop"),
        }
    }
    let deadline = clock.mono_us() + FILTER_END_US;
    while RoleLock::holder(&lock).failed(what.clone())?.is_some() {
        if clock.mono_us() >= deadline {
            return Err(Failure::coded(Exit::Busy, 16, what)
                .why("the filter still runs and does not answer")
                .hint(hint));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _held = RoleLock::take(&lock)
        .map_err(|error| Failure::coded(Exit::Busy, 16, what.clone()).why(error.to_string()))?;
    let given_up = blockfilter::group::is_given_up(paths).failed(what.clone())?;
    let kept = kept_journal(config, paths);
    let error = match blockfilter::group::drain(config, paths) {
        // By an unprotect that did not come to its end, or before the note was written.
        Ok(()) if given_up || kept.exists() => {
            return Ok(Some(Abandoned {
                why: "the journal was given up before".to_owned(),
                whole: false,
                checkpoint: None,
                at_most_bytes: None,
                kept: kept.exists().then_some(kept),
            }));
        }
        Ok(()) => return Ok(None),
        Err(error) => error,
    };
    let hopeless = match &error {
        RunError::Start(e) => e.is_of_journal(config),
        RunError::DiskFailed | RunError::DiskFull | RunError::Serve(_) => false,
    };
    if hopeless && force {
        return abandon(config, paths, &error).map(Some);
    }
    let exit = match error {
        RunError::Start(_) => Exit::WrongState,
        _ => Exit::Failed,
    };
    let force = format!("standfast unprotect {} --force", config.group);
    let hint = if matches!(error, RunError::DiskFull) {
        "free space where the disks are, and try again".to_owned()
    } else if kept.exists() {
        let kept = kept.display();
        format!("the journal was given up before and is kept at {kept}; {force} goes on")
    } else if hopeless {
        format!("{hint}; {force} gives the journal up")
    } else {
        hint.to_owned()
    };
    Err(Failure::coded(exit, 23, what).why(error.to_string()).hint(hint))
}

/// Where a journal that is given up is kept.
fn kept_journal(config: &GroupConfig, paths: &GroupPaths) -> PathBuf {
    let inside = config.journal.starts_with(paths.dir());
    let folder = if inside { paths.dir().ancestors().nth(2) } else { config.journal.parent() };
    let name = format!("{}-{}.abandoned", config.group, config.uuid.simple());
    folder.unwrap_or(Path::new("/")).join(name)
}

/// Drains without the journal, which is first put under another name: from then on
/// nothing that fails can make it vanish, and another unprotect sees that it is kept.
fn abandon(config: &GroupConfig, paths: &GroupPaths, error: &RunError) -> Outcome<Abandoned> {
    let what = format!("cannot end group {} without its journal", config.group);
    blockfilter::group::check_disks(config).map_err(|e| {
        Failure::coded(Exit::Failed, 24, what.clone())
            .why(e.to_string())
            .hint("nothing was changed; free the disks and try again")
    })?;
    let kept = kept_journal(config, paths);
    let journal = if config.journal.exists() { &config.journal } else { &kept };
    let span = journal_span(journal, config);
    let incarnation = super_of(journal, config).map_or(0, |(_, sup)| sup.incarnation.get());
    match std::fs::rename(&config.journal, &kept) {
        Ok(()) => sync_parent(&kept).failed("cannot set the journal aside")?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Failure::io("cannot set the journal aside", &error)),
    }
    let whole =
        blockfilter::group::drain_without_journal(config, paths, incarnation).map_err(|e| {
            let hint = format!("the journal is kept at {}; try again", kept.display());
            Failure::coded(Exit::Failed, 24, what).why(e.to_string()).hint(hint)
        })?;
    Ok(Abandoned {
        why: error.to_string(),
        whole,
        checkpoint: span.map(|(checkpoint, _)| checkpoint),
        at_most_bytes: span.map(|(_, bytes)| bytes),
        kept: kept.exists().then_some(kept),
    })
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |dir| RealFiles.sync_dir(dir))
}

/// The journal's checkpoint, and how much may be in it from there on.
fn journal_span(journal: &Path, config: &GroupConfig) -> Option<(u64, u64)> {
    let (file, sup) = super_of(journal, config)?;
    let checkpoint = sup.checkpoint.get();
    let last = *read_chunks(file.as_ref(), &sup, checkpoint).ok()?.last_key_value()?.0;
    let end = (last + 1).saturating_mul(sup.chunk_size.get());
    Some((checkpoint, end.saturating_sub(checkpoint)))
}

fn super_of(journal: &Path, config: &GroupConfig) -> Option<(Arc<dyn File>, JournalSuper)> {
    let file = RealFiles.open(journal, Open::Read).ok()?;
    let sup = read_super(file.as_ref(), config).ok()?;
    Some((file, sup))
}

/// Removes a drained group: configuration first, so that it no longer exists,
/// then journal and folder.
pub fn remove(config: &GroupConfig, paths: &GroupPaths) -> Outcome {
    let what = format!("cannot remove the files of group {}", config.group);
    RealFiles.remove(&paths.config()).failed(what.clone())?;
    RealFiles.sync_dir(paths.dir()).failed(what.clone())?;
    for path in [config.journal.clone(), config.arena_path()] {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::io(format!("cannot remove {}", path.display()), &error));
            }
            _ => {}
        }
    }
    for socket in [paths.filter_socket(), paths.nbd_socket(), paths.replicator_socket()] {
        let _ = std::fs::remove_file(socket);
    }
    RealFiles.remove_dir_all(paths.dir()).failed(what)
}

/// What a file system keeps for itself beside the journal.
const MARGIN: u64 = 16 << 20;
const GRACE_US: u64 = 2_000_000;
const END_US: u64 = 10_000_000;
const FILTER_END_US: u64 = 60_000_000;
/// A drain writes at most a journal's worth of blocks.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3600);
