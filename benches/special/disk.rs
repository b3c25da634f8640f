//! What a protected group costs that is no time: device flushes and memory.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{connect, nbd};
use crate::cells::Subject;
use crate::fio;
use crate::peers::nbd_target;
use crate::report::Figure;
use crate::runner::Runner;

/// FLUSH with nothing new: the device's own count of flushes, before and after 1000.
pub(super) fn flush(cell: &'static str, runner: &mut Runner) -> Result<Vec<Figure>> {
    let site = runner.site(Subject::Down, 0)?;
    site.quiesce()?;
    let client = connect(&site.uri, Duration::from_secs(10))?;
    let folder = runner.folder();
    let title = "device flushes for 1000 FLUSHes with nothing new";
    let none = |why: &str| Ok(vec![Figure::none(cell, title, why.into(), false)]);
    let Some(before) = device_flushes(folder) else {
        return none("the kernel does not count this device's flushes");
    };
    let mut probe = File::create(folder.join("probe"))?;
    for _ in 0..PROBES {
        probe.write_all(b"x")?;
        probe.sync_data()?;
    }
    if device_flushes(folder).unwrap_or(0) < before + PROBES {
        return none("the device is not flushed even for fdatasync, so nothing can be told");
    }
    let mut counts = Vec::new();
    for _ in 0..3 {
        nbd(client.write(0, &[0; 4096], false))?;
        nbd(client.flush())?;
        let before = device_flushes(folder).context("no count")?;
        for _ in 0..1000 {
            nbd(client.flush())?;
        }
        counts.push((device_flushes(folder).context("no count")? - before) as f64);
    }
    let figure = Figure::of(cell, title, &counts, "").at_most(0.0, 0.0);
    // Others flush the device too; only they can make it more than the least.
    let figure = Figure { value: figure.low, ..figure };
    Ok(vec![figure.note("least of 3: others' flushes are counted too")])
}

/// Flushes that the device of `folder` has completed.
fn device_flushes(folder: &Path) -> Option<u64> {
    let device = folder.metadata().ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let node = Path::new("/sys/dev/block").join(format!("{major}:{minor}")).canonicalize().ok()?;
    // A partition's flushes are counted at its disk.
    let disk = if node.join("partition").exists() { node.parent()? } else { &node };
    let text = std::fs::read_to_string(disk.join("stat")).ok()?;
    text.split_whitespace().nth(FLUSHES)?.parse().ok()
}

/// The filter's memory at its highest against the bound of the design.
pub(super) fn memory(cell: &'static str, runner: &mut Runner) -> Result<Vec<Figure>> {
    let seconds = runner.options.seconds;
    let size = runner.options.size_mib << 20;
    // What a filter served before is in its highest memory, too.
    let site = runner.fresh_site(Subject::Down, 3 * seconds * (1000 << 20) + (1 << 30))?;
    let arena = site.arena_bytes()?;
    // A + 40 A/4096 + S/32768 + 256 KiB a connection + 8 MiB.
    let bound = arena + 40 * arena / 4096 + size / 32768 + (256 << 10) + (8 << 20);
    let small = [["--rw=randwrite", "--bs=4k", "--iodepth=16"]];
    let large = [["--rw=write", "--bs=1m", "--iodepth=4"], ["--rw=read", "--bs=1m", "--iodepth=4"]];
    let mut figures = Vec::new();
    for (what, loads, in_flight) in [
        ("filter's memory at its highest", small.as_slice(), 0),
        // A connection's reads come on top.
        ("the same, with requests of 1 MiB behind it", large.as_slice(), IN_FLIGHT),
    ] {
        for load in loads {
            fio::run(&nbd_target(&site.uri), &load.map(String::from), Some(seconds))?;
        }
        let highest = highest(site.filter_pid()?)?;
        let bound = ((bound + in_flight) >> 10) as f64 / 1024.0;
        let note = format!("256 KiB a connection, {} MiB in flight", in_flight >> 20);
        let figure = Figure::of(cell, what, &[highest], "MiB");
        figures.push(figure.at_most(bound.round(), bound.round()).note(note));
    }
    Ok(figures)
}

/// The highest memory of a process, in MiB. Its program's own pages are the page cache's, and no
/// part of it.
fn highest(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = |name: &str| -> Option<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse().ok()
    };
    let program = kib("RssFile").unwrap_or(0.0);
    Ok((kib("VmHWM").context("no VmHWM")? - program) / 1024.0)
}

/// Bytes of reads that a connection may have under way: the filter's own limit.
const IN_FLIGHT: u64 = 16 << 20;
/// Syncs that must each be seen as a flush of the device.
const PROBES: u64 = 10;
/// Position of the completed flushes in a disk's stat file.
const FLUSHES: usize = 15;
