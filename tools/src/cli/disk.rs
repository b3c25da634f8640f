//! `disk list` and `disk uri`: how to reach the protected disks.

use blockfilter::names::Name;
use clap::{Args, Subcommand};

use super::Context;
use crate::daemon::{agent, source};
use crate::errors::{Exit, Failure, Outcome};
use crate::output::table;
use crate::units::show_bytes;

/// What can be done with disks.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// List the protected disks.
    List(DiskArgs),
    /// Print the NBD URI of one disk, or of all.
    Uri(DiskArgs),
}

/// Which disks.
#[derive(Debug, Args)]
pub struct DiskArgs {
    /// One disk, or all of a group; all disks if left out.
    #[arg(value_name = "GROUP[.DISK]")]
    pub disk: Option<String>,
}

/// Runs the command.
pub fn run(command: &DiskCommand, context: &Context) -> Outcome {
    let (args, uris) = match command {
        DiskCommand::List(args) => (args, false),
        DiskCommand::Uri(args) => (args, true),
    };
    let wanted = args.disk.as_deref().map(parse_disk).transpose()?;
    crate::daemon::state_dir(&context.dir, "standfast join TOKEN --dir DIR")?;
    let mut disks = Vec::new();
    for name in agent::group_names(&context.dir) {
        if wanted.as_ref().is_some_and(|(group, _)| *group != name) {
            continue;
        }
        let (config, paths) = agent::load_config(&context.dir, &name)?;
        for disk in source::disks(&config, &paths, None) {
            if wanted
                .as_ref()
                .is_none_or(|(_, d)| d.as_ref().is_none_or(|d| d.as_str() == disk.disk))
            {
                disks.push((name.clone(), disk));
            }
        }
    }
    if let (Some(text), true) = (&args.disk, disks.is_empty()) {
        return Err(Failure::coded(
            Exit::NotFound,
            3,
            format!("there is no protected disk {text}"),
        )
        .hint(format!("standfast disk list --dir {}", context.dir.display())));
    }
    if uris && disks.len() == 1 && wanted.is_some_and(|(_, d)| d.is_some()) {
        let uri = disks[0].1.uri.clone().unwrap_or_default();
        context.output.answer("DiskUri", &serde_json::json!({"uri": uri}), &uri);
        return Ok(());
    }
    let documents: Vec<_> = disks
        .iter()
        .map(|(group, d)| {
            serde_json::json!({
                "disk": format!("{group}.{}", d.disk), "group": group, "uri": d.uri,
                "file": d.file, "size_bytes": d.size_bytes, "backing": d.backing,
            })
        })
        .collect();
    let text = if uris {
        disks.iter().filter_map(|(_, d)| d.uri.clone()).map(|u| u + "\n").collect()
    } else {
        let row = |(group, d): &(Name, crate::daemon::status::DiskStatus)| {
            let file = d.file.clone().unwrap_or_else(|| "-".into());
            let backing = d.backing.clone().unwrap_or_default();
            vec![format!("{group}.{}", d.disk), show_bytes(d.size_bytes), backing, file]
        };
        table(&["DISK", "SIZE", "BACKING", "FILE"], disks.iter().map(row).collect())
    };
    context.output.answer("DiskList", &serde_json::json!({"disks": documents}), &text);
    if !uris {
        context.output.next("standfast disk uri GROUP.DISK");
    }
    Ok(())
}

/// `GROUP` or `GROUP.DISK`.
pub fn parse_disk(text: &str) -> Outcome<(Name, Option<Name>)> {
    let (group, disk) = match text.split_once('.') {
        Some((group, disk)) => (group, Some(disk)),
        None => (text, None),
    };
    let parse = |t: &str| t.parse::<Name>().map_err(|e| super::usage_failure(e.to_string()));
    Ok((parse(group)?, disk.map(parse).transpose()?))
}
