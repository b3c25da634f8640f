//! `point create|list|uri|mount|unmount`: recovery points.

use std::path::PathBuf;
use std::time::Duration;

use blockfilter::control::{Reply, Request, unexpected};
use blockfilter::names::Name;
use clap::{Args, Subcommand};

use super::disk::parse_disk;
use super::{Context, sync, unix_uri};
use crate::daemon::control::{Resolved, TargetRequest, ask_document};
use crate::daemon::hooks::Hooks;
use crate::daemon::mounts::{self, MountFile};
use crate::daemon::status::rfc3339;
use crate::daemon::target::{TargetConfig, nbd_socket};
use crate::daemon::{agent, remote};
use crate::errors::{Exit, Failure, IoContext, Outcome};
use crate::output::table;
use crate::units::parse_duration;

/// What can be done with points.
#[derive(Debug, Subcommand)]
pub enum PointCommand {
    /// Mark a recovery point and wait until the target holds it (at the agent).
    Create(CreateArgs),
    /// List recovery points, newest first (at the target).
    List(ListArgs),
    /// Print the read-only NBD URI of a disk at a point (at the target).
    Uri {
        /// The disk and the point.
        #[arg(value_name = "GROUP.DISK@POINT")]
        at: String,
    },
    /// Show a point's disks as read-only files (at the target).
    Mount {
        /// The group and the point.
        #[arg(value_name = "GROUP@POINT", value_parser = parse_group_point)]
        at: GroupPoint,
        /// An empty folder.
        #[arg(value_name = "MOUNTPOINT")]
        mountpoint: PathBuf,
    },
    /// End a mount.
    Unmount {
        /// The folder.
        #[arg(value_name = "MOUNTPOINT")]
        mountpoint: PathBuf,
    },
}

/// Arguments of `point create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The group.
    pub group: Name,
    /// Its name, unique in the group.
    #[arg(long)]
    pub tag: Option<Name>,
    /// With the application's consent: runs hooks/freeze and hooks/thaw of the state directory.
    #[arg(long)]
    pub app: bool,
    /// Longest wait for the target; exit code 8 when it passes.
    #[arg(long, default_value = "60s", value_parser = parse_duration)]
    pub timeout: Duration,
}

/// Arguments of `point list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The group.
    pub group: Name,
    /// Only points at or after this time: RFC 3339, or a span before now such as -15m.
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub since: Option<String>,
    /// Only tagged points.
    #[arg(long)]
    pub tagged: bool,
    /// At most so many.
    #[arg(long, default_value_t = 1000)]
    pub limit: usize,
}

/// `GROUP@POINT`, or `GROUP` for its latest point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupPoint {
    /// The group.
    pub group: Name,
    /// The point, as written.
    pub point: String,
}

/// Parses `GROUP[@POINT]`.
pub fn parse_group_point(text: &str) -> Result<GroupPoint, String> {
    let (group, point) = text.split_once('@').unwrap_or((text, "latest"));
    let group = group.parse().map_err(|e| format!("{e}"))?;
    Ok(GroupPoint { group, point: point.to_owned() })
}

/// Runs the command.
pub fn run(command: &PointCommand, context: &Context) -> Outcome {
    match command {
        PointCommand::Create(args) => return create(args, context),
        PointCommand::Unmount { mountpoint } => {
            mounts::unmount(&context.dir, mountpoint, context.clock.as_ref())?;
            let document = serde_json::json!({"mountpoint": mountpoint});
            let text = format!("{} is unmounted", mountpoint.display());
            context.output.answer("PointUnmount", &document, &text);
            context.output.next("standfast point list GROUP");
            return Ok(());
        }
        _ => {}
    }
    TargetConfig::load(&context.dir)?;
    match command {
        PointCommand::List(args) => list(args, context),
        PointCommand::Uri { at } => uri(at, context),
        PointCommand::Mount { at, mountpoint } => mount(at, mountpoint, context),
        PointCommand::Create(_) | PointCommand::Unmount { .. } => Ok(()),
    }
}

fn create(args: &CreateArgs, context: &Context) -> Outcome {
    let started = context.clock.mono_us();
    let (config, paths) = agent::load_config(&context.dir, &args.group)?;
    let mut filter = sync::connect(context, &config, &paths)?;
    if let Some(tag) = &args.tag {
        remote::check_tag(&context.dir, &config, tag, context.clock.clone())?;
    }
    let hooks = match args.app {
        true => Some(Hooks::find(&context.dir)?),
        false => None,
    };
    let request = Request::Mark { tag: args.tag.clone(), app: args.app };
    let mut mark = || {
        let wall_us = context.clock.wall_us();
        filter.ask(&request, MARK_TIMEOUT).map(|reply| (reply, wall_us))
    };
    let marked = match &hooks {
        Some(hooks) => hooks.around(&config, args.tag.as_ref(), context.clock.as_ref(), mark)?,
        None => mark(),
    };
    let (lsn, incarnation, wall_us) = match marked.failed("the point could not be marked")? {
        (Reply::Marked { lsn, incarnation }, wall_us) => (lsn, incarnation, wall_us),
        (other, _) => {
            return Err(Failure::io("the point could not be marked", &unexpected(&other)));
        }
    };
    sync::wait_shipped(context, &config, &paths, lsn, started, args.timeout)?;
    let point = format!("p{incarnation}-{lsn}");
    let document = serde_json::json!({
        "point": point, "lsn": lsn, "time": rfc3339(wall_us), "tag": args.tag,
        "kind": if args.app { "app" } else if args.tag.is_some() { "tagged" } else { "crash" },
    });
    let tag = args.tag.as_ref().map_or(String::new(), |t| format!("  tag:{t}"));
    let text = format!("{point}  {}{tag}", rfc3339(wall_us));
    context.output.answer("Point", &document, &text);
    context.output.next(&format!(
        "standfast drill start {}@{}, at the target",
        args.group,
        args.tag.as_ref().map_or(point, |t| format!("tag:{t}"))
    ));
    Ok(())
}

fn list(args: &ListArgs, context: &Context) -> Outcome {
    let request = TargetRequest::Points {
        group: args.group.clone(),
        since: args.since.clone(),
        tagged: args.tagged,
        limit: args.limit.min(LIMIT_MAX),
    };
    let document = ask_document("target", &context.dir, &request, TIMEOUT)?;
    let rows = document["points"].as_array().into_iter().flatten().map(|point| {
        let word = |key: &str| point[key].as_str().unwrap_or("-").to_owned();
        let usable = if point["usable"] == true { "yes" } else { "no" };
        vec![word("id"), word("time"), word("kind"), word("tag"), usable.to_owned()]
    });
    let text = table(&["POINT", "TIME", "KIND", "TAG", "USABLE"], rows.collect());
    context.output.answer("PointList", &document, &text);
    context.output.next(&format!("standfast point mount {}@POINT MOUNTPOINT", args.group));
    Ok(())
}

fn resolve(group: &Name, disk: Option<&Name>, point: &str, context: &Context) -> Outcome<Resolved> {
    let request = TargetRequest::Resolve {
        group: group.clone(),
        disk: disk.cloned(),
        point: point.to_owned(),
    };
    let document = ask_document("target", &context.dir, &request, TIMEOUT)?;
    serde_json::from_value(document).map_err(|e| {
        Failure::new(Exit::Failed, "the target's answer is not understood").why(e.to_string())
    })
}

fn uri(at: &str, context: &Context) -> Outcome {
    let (disk, point) = at
        .split_once('@')
        .ok_or_else(|| super::usage_failure("write GROUP.DISK@POINT, such as db01.data@latest"))?;
    let (group, disk) = parse_disk(disk)?;
    let disk = disk.ok_or_else(|| super::usage_failure("name a disk: GROUP.DISK@POINT"))?;
    let resolved = resolve(&group, Some(&disk), point, context)?;
    let export = format!("{group}.{disk}@{}", resolved.point);
    let uri = unix_uri(&export, &nbd_socket(&context.dir));
    let document = serde_json::json!({"uri": uri, "point": resolved.point});
    context.output.answer("PointUri", &document, &uri);
    context.output.next(&format!("nbdinfo '{uri}'"));
    Ok(())
}

fn mount(at: &GroupPoint, mountpoint: &std::path::Path, context: &Context) -> Outcome {
    let started = context.clock.mono_us();
    let resolved = resolve(&at.group, None, &at.point, context)?;
    let socket = nbd_socket(&context.dir);
    let file = |disk: &Name| MountFile {
        name: disk.to_string(),
        socket: socket.clone(),
        export: format!("{}.{disk}@{}", at.group, resolved.point),
        read_only: true,
    };
    let files = resolved.disks.iter().map(file).collect();
    let spec = mounts::mount(&context.dir, mountpoint, files, context.clock.as_ref())?;
    let seconds = (context.clock.mono_us() - started) as f64 / 1e6;
    let files: Vec<_> = spec.paths().iter().map(|p| p.display().to_string()).collect();
    let document = serde_json::json!({"files": files, "point": resolved.point, "seconds": seconds});
    context.output.answer("PointMount", &document, &files.join("\n"));
    context.output.next(&format!("standfast point unmount {}", spec.mountpoint.display()));
    Ok(())
}

const TIMEOUT: Duration = Duration::from_secs(30);
const MARK_TIMEOUT: Duration = Duration::from_secs(30);
const LIMIT_MAX: usize = 100_000;
