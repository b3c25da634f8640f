//! `unprotect`: applies everything to the disks and stops serving them. It
//! needs neither the target nor the agent.

use std::time::Duration;

use blockfilter::config::{GroupConfig, GroupPaths};
use blockfilter::names::Name;
use clap::Args;

use super::Context;
use crate::daemon::control::{AgentRequest, ask_daemon};
use crate::daemon::enlist::Abandoned;
use crate::daemon::{agent, enlist};
use crate::errors::{Exit, Failure, Outcome};
use crate::units::show_bytes;

/// Arguments of `unprotect`.
#[derive(Debug, Args)]
pub struct UnprotectArgs {
    /// The group.
    pub group: Name,
    /// Even while NBD clients use the disks (they get errors), and even if the journal
    /// cannot be used: then it is set aside and what may be lost is said (exit code 3).
    #[arg(short, long)]
    pub force: bool,
}

/// Runs the command.
pub fn run(args: &UnprotectArgs, context: &Context) -> Outcome {
    let dir = &context.dir;
    let (config, paths) = agent::load_config(dir, &args.group)?;
    let _lock = agent::change_lock(dir)?;
    if !args.force || enlist::serves_files(&paths) {
        enlist::check_files(&config)?;
    }
    if !args.force {
        enlist::check_unused(&config, &paths, context.clock.as_ref())?;
    }
    let abandoned = stop(args, context, &config, &paths).inspect_err(|_| {
        // The group still exists: without an agent, the next one watches it.
        let request = AgentRequest::Adopt { group: args.group.clone() };
        let _ = ask_daemon("agent", dir, &request, Duration::from_secs(10));
    })?;
    enlist::remove(&config, &paths)?;
    answer(args, context, &config, abandoned.as_ref());
    match abandoned {
        Some(loss) if !loss.whole => Err(lost(&args.group, &loss)),
        _ => Ok(()),
    }
}

/// Stops serving; on return the disks are plain images.
fn stop(
    args: &UnprotectArgs,
    context: &Context,
    config: &GroupConfig,
    paths: &GroupPaths,
) -> Outcome<Option<Abandoned>> {
    let clock = context.clock.as_ref();
    let request = AgentRequest::Release { group: args.group.clone() };
    match ask_daemon("agent", &context.dir, &request, Duration::from_secs(60)) {
        Err(failure) if failure.exit != Exit::Unreachable => return Err(failure),
        _ => {}
    }
    for role in ["fuse", "replicator"] {
        enlist::end_role(paths, role, clock)?;
    }
    context.output.note("applying the journal to the disks");
    enlist::drain(config, paths, clock, args.force)
}

fn answer(
    args: &UnprotectArgs,
    context: &Context,
    config: &GroupConfig,
    abandoned: Option<&Abandoned>,
) {
    let disks: Vec<_> = config
        .disks
        .iter()
        .map(|d| serde_json::json!({"disk": d.disk, "path": d.path, "size_bytes": d.size_bytes}))
        .collect();
    let mut text =
        format!("group {} is no longer protected; its disks are plain images:\n", args.group);
    for disk in &config.disks {
        text.push_str(&format!("  {}\n", disk.path.display()));
    }
    let journal = abandoned.map(|loss| {
        text.push_str(&format!("the journal was given up: {}\n", loss.why));
        if loss.whole {
            text.push_str("nothing is lost: all that was acknowledged was in memory too\n");
        }
        if let Some(kept) = &loss.kept {
            text.push_str(&format!("it is kept as {}\n", kept.display()));
        }
        serde_json::json!({
            "why": loss.why, "whole": loss.whole, "kept": loss.kept,
            "checkpoint": loss.checkpoint.map(|lsn| lsn.to_string()),
            "lost_at_most_bytes": if loss.whole { Some(0) } else { loss.at_most_bytes },
        })
    });
    let document = serde_json::json!({"group": args.group, "disks": disks, "abandoned": journal});
    context.output.answer("Unprotect", &document, &text);
    context.output.next(&format!(
        "standfast forget {0} --dir DIR --confirm {0}, at the target, once its history is not needed",
        args.group
    ));
}

/// What may be gone, as exactly as it can be told.
fn lost(group: &Name, loss: &Abandoned) -> Failure {
    let why = match (loss.checkpoint, loss.at_most_bytes) {
        (Some(lsn), Some(bytes)) => format!(
            "what was written below position {lsn} is on the disks; of what came later, at most {}, any part may be missing, also what was flushed",
            show_bytes(bytes)
        ),
        _ => "what was written since the last checkpoint, also what was flushed, may be missing; the journal does not say how much".to_owned(),
    };
    let what = format!("group {group} is unprotected, but writes may be lost with its journal");
    Failure::coded(Exit::Partial, 1, what)
        .why(why)
        .hint("check the file systems on the disks before using them")
}
