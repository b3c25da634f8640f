//! Times until something is served: a point of the past, a filter after its death.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::{connect, nbd};
use crate::cells::Subject;
use crate::images::{self, Content};
use crate::peers::nbd_target;
use crate::report::Figure;
use crate::runner::{Runner, journal_for};
use crate::site::{GROUP, Plan, Site};
use crate::{fio, sys};

/// The newest and the oldest point of a small and a large disk with many index entries:
/// from connecting to the first read's answer. The target was just started.
pub(super) fn points(cell: &'static str, runner: &mut Runner) -> Result<Vec<Figure>> {
    runner.clear();
    let entries: u64 = if runner.options.quick { 20_000 } else { 1_000_000 };
    let mut figures = Vec::new();
    for gib in [1, 64] {
        let folder = runner.new_folder()?;
        let image = folder.join("disk.img");
        images::make(&image, gib << 10, Content::Sparse)?;
        let (journal_bytes, journal) = (journal_for(entries * 4500), None);
        let mut site = Site::start(Plan { folder, image, journal_bytes, journal })?;
        let load = ["--rw=randwrite", "--bs=4k", "--iodepth=16"].map(String::from);
        let load = [&load[..], &[format!("--io_size={}", entries * 4096)]].concat();
        let run = fio::run(&nbd_target(&site.uri), &load, None)?;
        ensure!(run.ops as u64 == entries, "fio wrote {} blocks of {entries}", run.ops);
        site.quiesce()?;
        for (name, newest) in [("newest", true), ("oldest", false)] {
            figures.push(point(cell, &mut site, gib, name, newest, entries)?);
        }
    }
    Ok(figures)
}

fn point(
    cell: &'static str,
    site: &mut Site,
    gib: u64,
    name: &str,
    newest: bool,
    entries: u64,
) -> Result<Figure> {
    let (mut reads, mut asked) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        site.start_target()?;
        let list = site.target_command(&["point", "list", GROUP, "--limit", "1000000"])?;
        let points = list["points"].as_array().context("no points")?;
        let mut usable = points.iter().filter(|point| point["usable"] == true);
        let point = if newest { usable.next() } else { usable.next_back() };
        let id = point.and_then(|point| point["id"].as_str()).context("no usable point")?;
        let start = sys::now_us();
        let answer = site.target_command(&["point", "uri", &format!("{GROUP}.d@{id}")])?;
        asked.push(sys::seconds_since(start) * 1000.0);
        let uri = answer["uri"].as_str().context("no URI")?;
        for turn in 0..3 {
            let start = sys::now_us();
            let client = connect(uri, Duration::from_secs(10))?;
            nbd(client.read((turn * gib / 4) << 30, &mut [0; 4096]))?;
            reads.push(sys::seconds_since(start) * 1000.0);
        }
    }
    let title = format!("{name} point, {gib} GiB, {entries} entries: to the first read");
    let uri = crate::stats::median(&asked).unwrap_or(0.0);
    let figure = Figure::of(cell, &title, &reads, "ms").at_most(50.0, 10.0);
    // The largest counts: the first one after a start opens for all that follow.
    let figure = Figure { value: figure.high, ..figure };
    Ok(figure.note(format!("largest of {}; `point uri` {uri:.0} ms before", reads.len())))
}

/// kill -9 of the filter right after writes, until a new one answers a read.
pub(super) fn restart(cell: &'static str, runner: &mut Runner) -> Result<Vec<Figure>> {
    let site = runner.site(Subject::Down, 256 << 20)?;
    let mut seconds = Vec::new();
    for _ in 0..5 {
        let client = connect(&site.uri, Duration::from_secs(10))?;
        for block in 0..256 {
            nbd(client.write(block * 8192, &[7; 4096], false))?;
        }
        drop(client);
        let before = site.filter_pid()?;
        let start = sys::now_us();
        sys::signal(before, Signal::KILL);
        sys::wait_for("the filter's end", Duration::from_secs(60), || {
            Ok((!sys::alive(before)).then_some(()))
        })?;
        let client = connect(&site.uri, Duration::from_secs(60))?;
        nbd(client.read(0, &mut [0; 4096]))?;
        seconds.push(sys::seconds_since(start));
        site.quiesce()?;
    }
    let figure = Figure::of(cell, "kill -9 of the filter until it serves", &seconds, "s");
    Ok(vec![figure.at_most(1.0, 0.3)])
}
