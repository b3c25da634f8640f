//! `protect`: puts disks under protection while they stay plain images.
//!
//! In this order, each step undone if a later one fails: look at the disks and
//! the room, ask the target for the name, make folder and journal, write the
//! configuration (from here the group exists), have the agent start it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockfilter::config::{DiskConfig, GroupConfig, GroupPaths};
use blockfilter::engine::make_dir;
use blockfilter::engine::real::RealFiles;
use blockfilter::names::Name;
use clap::Args;
use uuid::Uuid;

use super::{Context, usage_failure};
use crate::daemon::control::{AgentRequest, ask_daemon};
use crate::daemon::{self, agent, backing, enlist, remote, source};
use crate::errors::{Exit, Failure, Outcome};
use crate::progress::{Progress, Step};
use crate::units::{parse_size, plan_journal, show_bytes};

/// Arguments of `protect`.
#[derive(Debug, Args)]
pub struct ProtectArgs {
    /// The group's name.
    pub group: Name,
    /// The disks, each with a name and the path of its image or device.
    #[arg(required = true, value_name = "DISK=PATH", value_parser = parse_disk)]
    pub disks: Vec<(Name, PathBuf)>,
    /// The journal's file, if not in the state directory; best on a disk of its own.
    #[arg(long, value_name = "PATH")]
    pub journal: Option<PathBuf>,
    /// The journal's size: it must hold what is written while the target is away.
    #[arg(long, default_value = "4GiB", value_parser = parse_size)]
    pub journal_size: u64,
    /// Show the disks as files in this folder too.
    #[arg(long, value_name = "DIR")]
    pub fuse: Option<PathBuf>,
    /// The policy; there is one.
    #[arg(long, default_value = "default", value_parser = ["default"])]
    pub policy: String,
    /// Return when the target has a complete copy.
    #[arg(long)]
    pub wait: bool,
    /// Memory for recent writes.
    #[arg(long, default_value = "256MiB", value_parser = parse_size, hide = true, env = "STANDFAST_ARENA_SIZE")]
    pub arena_size: u64,
}

fn parse_disk(text: &str) -> Result<(Name, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write DISK=PATH")?;
    if path.is_empty() {
        return Err("the path is missing".into());
    }
    Ok((name.parse().map_err(|e| format!("{e}"))?, path.into()))
}

/// Runs the command.
pub fn run(args: &ProtectArgs, context: &Context) -> Outcome {
    let dir = &context.dir;
    daemon::state_dir(dir, "standfast join TOKEN --dir DIR")?;
    ask_daemon("agent", dir, &AgentRequest::Ping, Duration::from_secs(5))?;
    let stop = daemon::stop_flag()?;
    let config = {
        let _lock = agent::change_lock(dir)?;
        let config = plan(args, dir)?;
        let paths = GroupPaths::new(dir, &config.group);
        enlist::check_room(&config)?;
        remote::check_group(dir, &config, context.clock.clone())?;
        make(&config, &paths, context, &stop)?;
        if let Err(failure) = start(&config, dir) {
            undo(&config, &paths, context);
            return Err(failure);
        }
        config
    };
    if args.wait {
        wait(&config, context, &stop)?;
    }
    answer(&config, context);
    Ok(())
}

/// Checks what was asked for and decides the rest.
fn plan(args: &ProtectArgs, dir: &Path) -> Outcome<GroupConfig> {
    if args.disks.len() > DISKS_MAX {
        return Err(usage_failure(format!("a group has at most {DISKS_MAX} disks")));
    }
    let given: Vec<PathBuf> = args.disks.iter().map(|(_, p)| p.clone()).collect();
    enlist::check_unprotected(dir, &args.group, &given)?;
    let mut disks: Vec<DiskConfig> = Vec::new();
    let mut seen = Vec::new();
    for (disk, path) in &args.disks {
        let found = backing::inspect(path).map_err(|e| e.failure(path))?;
        if disks.iter().any(|d| d.disk == *disk) || seen.contains(&found.identity) {
            return Err(usage_failure(format!("{disk}={} is there twice", path.display())));
        }
        seen.push(found.identity);
        disks.push(DiskConfig {
            disk: disk.clone(),
            path: found.path,
            uuid: Uuid::new_v4(),
            size_bytes: found.size_bytes,
        });
    }
    let paths = GroupPaths::new(dir, &args.group);
    let plan = plan_journal(args.journal_size, args.arena_size).map_err(usage_failure)?;
    let absolute = |path: &Path| {
        std::path::absolute(path)
            .map_err(|e| Failure::io(format!("cannot use {}", path.display()), &e))
    };
    let journal = args.journal.as_deref().map(absolute).transpose()?;
    let fuse = args.fuse.as_deref().map(absolute).transpose()?;
    if let Some(folder) = &fuse {
        check_folder(folder)?;
    }
    Ok(GroupConfig {
        group: args.group.clone(),
        uuid: Uuid::new_v4(),
        disks,
        journal: journal.unwrap_or_else(|| paths.journal()),
        journal_bytes: plan.journal_bytes,
        chunk_bytes: plan.chunk_bytes,
        arena_bytes: plan.arena_bytes,
        fuse,
    })
}

/// The folder for FUSE files: made if missing, empty.
fn check_folder(folder: &Path) -> Outcome {
    let what = format!("cannot show files in {}", folder.display());
    make_dir(&RealFiles, folder).map_err(|e| Failure::io(what.clone(), &e))?;
    let mut entries = std::fs::read_dir(folder).map_err(|e| Failure::io(what.clone(), &e))?;
    if entries.next().is_some() {
        return Err(Failure::coded(Exit::Busy, 17, what)
            .why("the folder is not empty")
            .hint("give an empty folder with --fuse"));
    }
    Ok(())
}

fn make(
    config: &GroupConfig,
    paths: &GroupPaths,
    context: &Context,
    stop: &Arc<AtomicBool>,
) -> Outcome {
    context.output.note(&format!(
        "making a journal of {} at {}",
        show_bytes(config.journal_bytes),
        config.journal.display()
    ));
    let mut progress = Progress::new(context.output, "journal", context.clock.mono_us());
    let made = enlist::make(config, paths, stop, &mut |done, total| {
        let step = Step { done, total, ..Step::default() };
        progress.update(step, context.clock.mono_us());
    });
    progress.finish();
    made
}

fn start(config: &GroupConfig, dir: &Path) -> Outcome {
    let request = AgentRequest::Load { group: config.group.clone() };
    ask_daemon("agent", dir, &request, Duration::from_secs(120)).map(drop)
}

/// Takes a group apart that could not be started.
fn undo(config: &GroupConfig, paths: &GroupPaths, context: &Context) {
    let request = AgentRequest::Release { group: config.group.clone() };
    let _ = ask_daemon("agent", &context.dir, &request, Duration::from_secs(60));
    let undone = enlist::end_role(paths, "filter", context.clock.as_ref())
        .and_then(|()| enlist::drain(config, paths, context.clock.as_ref(), false))
        .and_then(|_| enlist::remove(config, paths));
    if let Err(failure) = undone {
        let group = &config.group;
        context.output.warn(&format!("{failure}; use: standfast unprotect {group}"));
    }
}

/// Shows the seed until the group is protected.
fn wait(config: &GroupConfig, context: &Context, stop: &AtomicBool) -> Outcome {
    let paths = GroupPaths::new(&context.dir, &config.group);
    let total: u64 = config.disks.iter().map(|d| d.size_bytes).sum();
    let mut progress = Progress::new(context.output, "seed", context.clock.mono_us());
    loop {
        let view = source::ask(config, &paths);
        let judgement = source::judge(&view);
        match judgement.state {
            "protected" => break,
            "fenced" | "unjournaled" | "backing_failed" => {
                progress.finish();
                let what = format!("group {} is {}", config.group, judgement.state);
                return Err(
                    Failure::coded(Exit::WrongState, 14, what).why(judgement.reasons.join("; "))
                );
            }
            _ => {}
        }
        if stop.load(Ordering::SeqCst) {
            progress.finish();
            let hint = format!("it goes on; standfast status {}", config.group);
            return Err(Failure::new(Exit::Interrupted, "interrupted while waiting").hint(hint));
        }
        let seed = view.replicator.and_then(|r| r.seed);
        let step = seed.map_or(Step { total, ..Step::default() }, |s| Step {
            done: s.done_bytes,
            total: s.total_bytes,
            rate: s.rate_bytes_per_second,
            eta: s.eta_seconds,
        });
        progress.update(step, context.clock.mono_us());
        std::thread::sleep(Duration::from_millis(200));
    }
    progress.finish();
    Ok(())
}

fn answer(config: &GroupConfig, context: &Context) {
    let paths = GroupPaths::new(&context.dir, &config.group);
    let disks = source::disks(config, &paths, None);
    let documents: Vec<_> = disks
        .iter()
        .map(|d| {
            serde_json::json!({
                "disk": d.disk, "uri": d.uri, "file": d.file, "size_bytes": d.size_bytes,
                "backing": d.backing,
            })
        })
        .collect();
    let mut text = format!("group {} is served; use the disks only through:\n", config.group);
    for disk in &disks {
        text.push_str(&format!(
            "  {}.{}  {}\n",
            config.group,
            disk.disk,
            disk.uri.as_deref().unwrap_or("-")
        ));
        if let Some(file) = &disk.file {
            text.push_str(&format!(
                "    file {file}  (losetup --direct-io=on --sector-size 4096 -f --show {file})\n"
            ));
        }
    }
    let document = serde_json::json!({"group": config.group, "disks": documents});
    context.output.answer("Protect", &document, &text);
    context.output.next(&format!(
        "standfast status {} --dir {}",
        config.group,
        context.dir.display()
    ));
}

/// Disks of one group.
const DISKS_MAX: usize = 32;
