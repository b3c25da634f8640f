//! `unprotect`: applies everything to the disks and stops serving them. It
//! needs neither the target nor the agent.

use std::time::Duration;

use blockfilter::names::Name;
use clap::Args;

use super::Context;
use crate::daemon::control::{AgentRequest, ask_daemon};
use crate::daemon::{agent, enlist};
use crate::errors::{Exit, Outcome};

/// Arguments of `unprotect`.
#[derive(Debug, Args)]
pub struct UnprotectArgs {
    /// The group.
    pub group: Name,
    /// Even while clients use the disks: they get errors.
    #[arg(short, long)]
    pub force: bool,
}

/// Runs the command.
pub fn run(args: &UnprotectArgs, context: &Context) -> Outcome {
    let dir = &context.dir;
    let clock = context.clock.as_ref();
    let (config, paths) = agent::load_config(dir, &args.group)?;
    let _lock = agent::change_lock(dir)?;
    if !args.force {
        enlist::check_unused(&config, &paths, clock)?;
    }
    let request = AgentRequest::Release { group: args.group.clone() };
    match ask_daemon("agent", dir, &request, Duration::from_secs(60)) {
        Err(failure) if failure.exit != Exit::Unreachable => return Err(failure),
        _ => {}
    }
    for role in ["fuse", "replicator"] {
        enlist::end_role(&paths, role, clock)?;
    }
    context.output.note("applying the journal to the disks");
    enlist::drain(&config, &paths, clock)?;
    enlist::remove(&config, &paths)?;
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
    let document = serde_json::json!({"group": args.group, "disks": disks});
    context.output.answer("Unprotect", &document, &text);
    context.output.next(&format!(
        "standfast forget {0} --dir DIR --confirm {0}, at the target, once its history is not needed",
        args.group
    ));
    Ok(())
}
