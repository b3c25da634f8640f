//! `inspect journal|store PATH`: a read-only dump with the production decoders,
//! for when something is wrong. Takes no locks and changes nothing; of a journal
//! that is in use it shows a moment, and its end may be torn.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockfilter::config::{DiskConfig, GroupConfig};
use blockfilter::engine::real::{RealFiles, open_real};
use blockfilter::engine::{File, Open};
use blockfilter::journal::batch::{choose_super, super_offset};
use blockfilter::journal::format::{JournalSuper, PAGE};
use blockfilter::journal::open::{Scanned, read_chunks, scan};
use blockfilter::names::Lsn;
use clap::{Args, Subcommand};
use serde_json::json;
use uuid::Uuid;

use super::Context;
use crate::daemon::status::rfc3339;
use crate::daemon::target::store_failure;
use crate::errors::{Exit, Failure, IoContext, Outcome};

/// What can be looked into.
#[derive(Debug, Subcommand)]
pub enum InspectCommand {
    /// Dump a journal: super block, chunks, and every batch from the checkpoint on.
    Journal(InspectArgs),
    /// Dump a target's store: groups, segments, index runs, points, drills.
    Store(StoreArgs),
}

/// What to look into.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The journal file.
    pub path: PathBuf,
}

/// Arguments of `inspect store`.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// The target's state directory.
    pub path: PathBuf,
    /// Read every frame and index page, and check every checksum.
    #[arg(long)]
    pub deep: bool,
}

/// Runs the command.
pub fn run(command: &InspectCommand, context: &Context) -> Outcome {
    match command {
        InspectCommand::Journal(args) => journal(args, context),
        InspectCommand::Store(args) => store(args, context),
    }
}

fn store(args: &StoreArgs, context: &Context) -> Outcome {
    let files = Arc::new(RealFiles);
    let document = target::store::inspect(files, &args.path, context.clock.clone(), args.deep)
        .map_err(|e| store_failure(&e))?;
    let text = serde_json::to_string_pretty(&document).unwrap_or_default();
    context.output.answer("Store", &document, &text);
    match document["damaged"].as_u64() {
        None | Some(0) => {}
        Some(count) => {
            let what = format!("{count} files of {} are damaged", args.path.display());
            return Err(Failure::coded(Exit::Mismatch, 1, what)
                .hint("the dump says which; points that need them cannot be read"));
        }
    }
    if !args.deep {
        context.output.next("standfast inspect store PATH --deep checks every checksum");
    }
    Ok(())
}

fn journal(args: &InspectArgs, context: &Context) -> Outcome {
    let what = format!("cannot inspect {}", args.path.display());
    let file = open_real(&args.path, Open::Read).failed(what.clone())?;
    let len = file.len().failed(what.clone())?;
    let mut pages = vec![0; 2 * PAGE as usize];
    let (a, b) = pages.split_at_mut(PAGE as usize);
    for (seq, page) in [(0, &mut *a), (1, &mut *b)] {
        if super_offset(seq) + PAGE <= len {
            file.read_exact_at(super_offset(seq), page).failed(what.clone())?;
        }
    }
    let damaged = |why: String| {
        Failure::coded(Exit::WrongState, 10, what.clone())
            .why(why)
            .hint("nothing was changed; unprotect refuses a damaged journal too")
    };
    let sup = choose_super(a, b).map_err(|e| damaged(e.to_string()))?;
    let config = config_of(&sup, &args.path);
    let chunks = read_chunks(&file, &sup, 0).failed(what.clone())?;
    let scanned = scan(&file, &config);
    let mut document = super_json(&sup, &config, len);
    document["chunks"] = json!({"with_header": chunks.len(), "slots": sup.n_slots.get()});
    let mut text = format!(
        "journal {} of group {}\n{}\n",
        Uuid::from_bytes(sup.journal_uuid),
        Uuid::from_bytes(sup.group_uuid),
        serde_json::to_string_pretty(&document).unwrap_or_default()
    );
    match scanned {
        Ok(scanned) => {
            document["end"] = json!(Lsn(scanned.end));
            document["batches"] = batches(&scanned).into();
            text.push_str(&batch_text(&scanned));
            context.output.answer("Journal", &document, &text);
            context.output.next("standfast status GROUP");
            Ok(())
        }
        Err(error) => {
            document["problem"] = error.to_string().into();
            context.output.answer("Journal", &document, &text);
            Err(damaged(error.to_string()))
        }
    }
}

/// The configuration that this journal would belong to.
fn config_of(sup: &JournalSuper, path: &Path) -> GroupConfig {
    let disks = sup.disks.iter().take(usize::from(sup.n_disks)).enumerate();
    let disk = |(index, disk): (usize, &blockfilter::journal::format::SuperDisk)| {
        let end = disk.name.iter().position(|b| *b == 0).unwrap_or(disk.name.len());
        let name = String::from_utf8_lossy(&disk.name[..end]).into_owned();
        let fallback = || format!("disk{index}").parse().ok();
        Some(DiskConfig {
            disk: name.parse().ok().or_else(fallback)?,
            path: PathBuf::new(),
            uuid: Uuid::from_bytes(disk.uuid),
            size_bytes: disk.size.get(),
        })
    };
    let Ok(group) = "inspected".parse() else { unreachable!("a fixed valid name") };
    GroupConfig {
        group,
        uuid: Uuid::from_bytes(sup.group_uuid),
        disks: disks.filter_map(disk).collect(),
        journal: path.to_owned(),
        journal_bytes: 0,
        chunk_bytes: sup.chunk_size.get(),
        arena_bytes: 0,
        fuse: None,
    }
}

fn super_json(sup: &JournalSuper, config: &GroupConfig, len: u64) -> serde_json::Value {
    let history: Vec<_> = sup
        .history
        .iter()
        .take(usize::from(sup.n_history))
        .map(|h| json!({"incarnation": h.incarnation.get(), "end": Lsn(h.end.get())}))
        .collect();
    let disks: Vec<_> = config
        .disks
        .iter()
        .map(|d| json!({"disk": d.disk, "uuid": d.uuid, "size_bytes": d.size_bytes}))
        .collect();
    let modes = ["new", "shipping", "frozen", "unjournaled", "backing_failed"];
    json!({
        "journal_uuid": Uuid::from_bytes(sup.journal_uuid), "group_uuid": config.uuid,
        "version": sup.version.get(), "seq": sup.seq.get(), "file_bytes": len,
        "chunk_bytes": sup.chunk_size.get(), "mode": modes.get(usize::from(sup.mode)),
        "clean": sup.clean == 1, "incarnation": sup.incarnation.get(),
        "generation": sup.generation.get(), "checkpoint": Lsn(sup.checkpoint.get()),
        "ship_floor": Lsn(sup.ship_floor.get()), "history": history, "disks": disks,
    })
}

fn batches(scanned: &Scanned) -> Vec<serde_json::Value> {
    let one = |b: &blockfilter::journal::open::ScannedBatch| {
        let records: Vec<_> = b
            .descs
            .iter()
            .map(|d| {
                let op = d.rec_op().map(|op| format!("{op:?}").to_lowercase());
                json!({
                    "lsn": d.lsn(), "op": op, "disk": d.disk, "offset": d.offset.get(),
                    "len": d.len.get(), "flags": d.flags.get(),
                })
            })
            .collect();
        json!({
            "lsn": Lsn(b.hdr.lsn.get()), "bytes": b.hdr.total_len.get(),
            "incarnation": b.hdr.incarnation.get(), "durable": Lsn(b.hdr.durable.get()),
            "flags": b.hdr.flags, "time": rfc3339(b.hdr.wall_us.get()),
            "file_offset": b.file_offset, "records": records,
        })
    };
    scanned.batches.iter().map(one).collect()
}

fn batch_text(scanned: &Scanned) -> String {
    let mut text = format!("{} batches from the checkpoint on\n", scanned.batches.len());
    for batch in &scanned.batches {
        text.push_str(&format!(
            "{}  {} bytes  {} records  {}\n",
            batch.hdr.lsn.get(),
            batch.hdr.total_len.get(),
            batch.descs.len(),
            rfc3339(batch.hdr.wall_us.get())
        ));
    }
    text.push_str(&format!("{}  end\n", scanned.end));
    text
}
