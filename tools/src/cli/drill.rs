//! `drill start|list|finish`: test failovers, production untouched.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::Context;
use super::point::{GroupPoint, parse_group_point};
use crate::daemon::control::{TargetRequest, ask_daemon, ask_document};
use crate::daemon::mounts::{self, MountFile};
use crate::daemon::target::{TargetConfig, nbd_socket};
use crate::errors::Outcome;
use crate::output::table;
use crate::units::show_seconds;

/// What can be done with drills.
#[derive(Debug, Subcommand)]
pub enum DrillCommand {
    /// Open a point as writable disks; what is written is thrown away.
    Start(StartArgs),
    /// List the drills.
    List,
    /// End a drill and drop what was written in it.
    Finish {
        /// Its id.
        drill: String,
    },
}

/// Arguments of `drill start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// The group and the point (latest if left out).
    #[arg(value_name = "GROUP[@POINT]", value_parser = parse_group_point)]
    pub at: GroupPoint,
    /// Show the disks as files in this folder too.
    #[arg(long, value_name = "DIR")]
    pub fuse: Option<PathBuf>,
}

/// Runs the command.
pub fn run(command: &DrillCommand, context: &Context) -> Outcome {
    TargetConfig::load(&context.dir)?;
    match command {
        DrillCommand::Start(args) => start(args, context),
        DrillCommand::List => list(context),
        DrillCommand::Finish { drill } => finish(drill, context),
    }
}

fn start(args: &StartArgs, context: &Context) -> Outcome {
    let started = context.clock.mono_us();
    let request =
        TargetRequest::DrillStart { group: args.at.group.clone(), point: args.at.point.clone() };
    let mut document = ask_document("target", &context.dir, &request, TIMEOUT)?;
    let drill = document["drill"].as_str().unwrap_or_default().to_owned();
    if let Some(folder) = &args.fuse {
        let files = files_of(&document, context);
        match mounts::mount(&context.dir, folder, files, context.clock.as_ref()) {
            Ok(spec) => {
                let disks = document["disks"].as_array_mut().into_iter().flatten();
                for (disk, path) in disks.zip(spec.paths()) {
                    disk["file"] = path.display().to_string().into();
                }
            }
            Err(failure) => {
                let undo = TargetRequest::DrillFinish { drill };
                let _ = ask_daemon("target", &context.dir, &undo, TIMEOUT);
                return Err(failure);
            }
        }
    }
    let seconds = (context.clock.mono_us() - started) as f64 / 1e6;
    document["seconds"] = seconds.into();
    let mut text = format!(
        "drill {drill}: {} at {} as writable disks ({})\n",
        args.at.group,
        document["point"].as_str().unwrap_or("?"),
        show_seconds(seconds)
    );
    for disk in document["disks"].as_array().into_iter().flatten() {
        let word = |key: &str| disk[key].as_str().unwrap_or("-").to_owned();
        text.push_str(&format!("  {}  {}  {}\n", word("disk"), word("uri"), word("file")));
    }
    context.output.answer("Drill", &document, &text);
    context.output.next(&format!("standfast drill finish {drill} --dir {}", context.dir.display()));
    Ok(())
}

fn files_of(document: &serde_json::Value, context: &Context) -> Vec<MountFile> {
    let disks = document["disks"].as_array().into_iter().flatten();
    disks
        .map(|disk| MountFile {
            name: disk["disk"].as_str().unwrap_or_default().to_owned(),
            socket: nbd_socket(&context.dir),
            export: disk["export"].as_str().unwrap_or_default().to_owned(),
            read_only: false,
        })
        .collect()
}

fn list(context: &Context) -> Outcome {
    let document = ask_document("target", &context.dir, &TargetRequest::DrillList, TIMEOUT)?;
    let rows = document["drills"].as_array().into_iter().flatten().map(|drill| {
        ["drill", "group", "point", "created"]
            .map(|key| drill[key].as_str().unwrap_or("-").to_owned())
            .to_vec()
    });
    let text = table(&["DRILL", "GROUP", "POINT", "STARTED"], rows.collect());
    context.output.answer("DrillList", &document, &text);
    context.output.next("standfast drill finish DRILL");
    Ok(())
}

fn finish(drill: &str, context: &Context) -> Outcome {
    let clock = context.clock.as_ref();
    let all = ask_document("target", &context.dir, &TargetRequest::DrillList, TIMEOUT)?;
    let exports: Vec<String> = all["drills"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|d| d["drill"] == drill)
        .flat_map(|d| d["disks"].as_array().into_iter().flatten())
        .filter_map(|d| d["export"].as_str().map(str::to_owned))
        .collect();
    mounts::unmount_exports(&context.dir, &exports, clock)?;
    let request = TargetRequest::DrillFinish { drill: drill.to_owned() };
    ask_daemon("target", &context.dir, &request, TIMEOUT)?;
    let text = format!("drill {drill} is over; what was written in it is gone");
    context.output.answer("DrillFinish", &serde_json::json!({"drill": drill}), &text);
    context.output.next(&format!("standfast status --dir {}", context.dir.display()));
    Ok(())
}

const TIMEOUT: Duration = Duration::from_secs(60);
