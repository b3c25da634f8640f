//! `status`: the truth about every group, from the daemon; with the daemon
//! down, what the group's own processes still tell, and exit code 7.

use std::path::Path;
use std::time::Duration;

use blockfilter::config::GroupPaths;
use blockfilter::names::Name;
use clap::Args;

use super::Context;
use crate::daemon::control::{AgentRequest, TargetRequest, ask_document};
use crate::daemon::process::RoleLock;
use crate::daemon::status::{ProcessStatus, Status};
use crate::daemon::{self, agent};
use crate::errors::{Exit, Failure, Outcome};

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Only this group.
    pub group: Option<Name>,
}

/// Runs the command.
pub fn run(args: &StatusArgs, context: &Context) -> Outcome {
    let (status, down) = fetch(args.group.as_ref(), context)?;
    context.output.answer("Status", &status, &status.text());
    if let Some(failure) = down {
        return Err(failure);
    }
    context.output.next(match (status.role.as_str(), status.groups.is_empty()) {
        ("agent", true) => "standfast protect GROUP DISK=PATH --dir DIR",
        ("agent", false) => "standfast point create GROUP --tag NAME --dir DIR",
        (_, true) => "standfast join TOKEN --dir DIR, on the machine to protect",
        _ => "standfast point list GROUP --dir DIR",
    });
    Ok(())
}

/// The document, and the failure to end with if the daemon is down.
pub fn fetch(group: Option<&Name>, context: &Context) -> Outcome<(Status, Option<Failure>)> {
    daemon::state_dir(&context.dir, "standfast target init, or standfast join TOKEN")?;
    let group = group.cloned();
    let answer = if is_target(&context.dir) {
        ask_document("target", &context.dir, &TargetRequest::Status { group }, TIMEOUT)
    } else {
        let request = AgentRequest::Status { group: group.clone() };
        match ask_document("agent", &context.dir, &request, TIMEOUT) {
            Err(failure) if failure.exit == Exit::Unreachable => {
                return Ok((without_agent(&context.dir, group.as_ref())?, Some(failure)));
            }
            other => other,
        }
    }?;
    let status = serde_json::from_value(answer).map_err(|e| {
        Failure::new(Exit::Failed, "the daemon's status is not understood").why(e.to_string())
    })?;
    Ok((status, None))
}

/// Whether a state directory is a target's.
pub fn is_target(dir: &Path) -> bool {
    dir.join("target.json").exists()
}

/// Filters and replicators go on without the agent, so they are asked directly.
fn without_agent(dir: &Path, group: Option<&Name>) -> Outcome<Status> {
    let mut groups = Vec::new();
    let mut processes = Vec::new();
    for name in agent::group_names(dir) {
        if group.is_some_and(|g| *g != name) {
            continue;
        }
        let (config, paths) = agent::load_config(dir, &name)?;
        processes.extend(
            ["filter", "replicator", "fuse"].iter().filter_map(|r| process(&paths, &name, r)),
        );
        groups.push((config, paths));
    }
    if let (Some(group), true) = (group, groups.is_empty()) {
        agent::load_config(dir, group)?;
    }
    Ok(agent::document(dir, &groups, processes))
}

fn process(paths: &GroupPaths, group: &Name, role: &str) -> Option<ProcessStatus> {
    let pid = RoleLock::holder(&agent::role_lock(paths, role)).ok()??;
    Some(ProcessStatus {
        role: role.into(),
        group: Some(group.to_string()),
        pid: Some(pid),
        ..ProcessStatus::default()
    })
}

const TIMEOUT: Duration = Duration::from_secs(15);
