//! The first copy against programs that copy images.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::images::{self, Content, Folios};
use crate::peers::{nbdkit_file, serve};
use crate::report::Figure;
use crate::runner::Runner;
use crate::site::{Plan, Site};
use crate::sys;

/// A program that copies `from` to a new file `to`; its name, what it needs, how.
type Copier = (&'static str, &'static [&'static str], fn(&Path, &Path, &Path) -> Result<()>);

/// An image of half data, half holes: MiB of data a second until the copy is durable. Ours
/// goes through TLS and counts from the return of `protect`, which is told apart.
pub(super) fn seed(cell: &'static str, runner: &mut Runner) -> Result<Vec<Figure>> {
    runner.clear();
    let mib = runner.options.size_mib;
    let folder = runner.new_folder()?;
    let image = folder.join("source.img");
    images::make(&image, mib, Content::HalfHoles)?;
    let data = (mib / 2) as f64;
    let (mut ours, mut protects) = (Vec::new(), Vec::new());
    let mut theirs: Vec<Vec<f64>> = COPIERS.iter().map(|_| Vec::new()).collect();
    for _ in 0..runner.options.reps {
        sys::check_stop()?;
        sys::sync_fs(&folder)?;
        images::cache(&image, Folios::Large)?;
        let (journal_bytes, journal) = (JOURNAL, None);
        let own = runner.new_folder()?;
        let site = Site::start(Plan { folder: own, image: image.clone(), journal_bytes, journal })?;
        ours.push(data / (site.seed_seconds - site.protect_seconds));
        protects.push(site.protect_seconds);
        drop(site);
        for ((_, programs, copy), rates) in COPIERS.iter().zip(&mut theirs) {
            if !programs.iter().all(|program| sys::has(program)) {
                continue;
            }
            sys::sync_fs(&folder)?;
            images::cache(&image, Folios::Large)?;
            let to = folder.join("copy.img");
            File::create(&to)?.set_len(mib << 20)?;
            let start = sys::now_us();
            copy(&folder, &image, &to)?;
            File::open(&to)?.sync_all()?;
            rates.push(data / sys::seconds_since(start));
            std::fs::remove_file(&to)?;
        }
    }
    let own = Figure::of(cell, "seed with TLS, of data", &ours, "MiB/s");
    let protect = crate::stats::median(&protects).unwrap_or(0.0);
    let mut figures = vec![own.note(format!("`protect` before it {protect:.2} s"))];
    for ((name, programs, _), rates) in COPIERS.iter().zip(&theirs) {
        let title = format!("seed with TLS / {name}");
        if let Some(program) = programs.iter().find(|program| !sys::has(program)) {
            figures.push(Figure::none(cell, &title, format!("no {program}"), false));
            continue;
        }
        let pairs: Vec<f64> = ours.iter().zip(rates).map(|(a, b)| a / b).collect();
        let medians = crate::stats::median(&ours).zip(crate::stats::median(rates));
        let figure = Figure::of(cell, &title, &pairs, "x");
        let value = medians.map(|(a, b)| a / b);
        let note = medians.map_or_else(String::new, |(_, b)| format!("{b:.0} MiB/s"));
        let figure = Figure { value, note, ..figure };
        figures.push(if *name == COPIERS[0].0 { figure.at_least(0.8, 1.1) } else { figure });
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(figures)
}

/// Nothing is written meanwhile.
const JOURNAL: u64 = 256 << 20;

const COPIERS: [Copier; 3] = [
    ("nbdcopy --flush without TLS", &["nbdcopy", "nbdkit"], nbdcopy),
    ("qemu-img convert", &["qemu-img"], qemu_img),
    ("rsync --inplace", &["rsync"], rsync),
];

fn nbdcopy(folder: &Path, from: &Path, to: &Path) -> Result<()> {
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let _source = serve(&mut nbdkit_file(from, &a), &a, folder)?;
    let _sink = serve(&mut nbdkit_file(to, &b), &b, folder)?;
    let uri = |socket: &Path| format!("nbd+unix:///?socket={}", socket.display());
    let mut command = Command::new("nbdcopy");
    // The new file is known to be zeroes, as the new copy of ours is.
    command.args(["--flush", "--destination-is-zero"]).args([uri(&a), uri(&b)]);
    sys::output(&mut command).map(drop)
}

fn qemu_img(_: &Path, from: &Path, to: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-n", "--target-is-zero", "-f", "raw", "-O", "raw"]);
    sys::output(command.arg(from).arg(to)).map(drop)
}

fn rsync(_: &Path, from: &Path, to: &Path) -> Result<()> {
    sys::output(Command::new("rsync").args(["--inplace", "--whole-file"]).arg(from).arg(to))
        .map(drop)
}
