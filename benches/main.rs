//! `bench`: us and the peers side by side, interleaved, with ratios.
//!
//! [`cells`] says what is measured, [`runner`] does it, [`special`] holds what is not a
//! load of fio, [`report`] tells. `scripts/bench.sh` builds and starts it; README.md says how
//! to read it.

mod cells;
mod fio;
mod images;
mod peers;
mod report;
mod runner;
mod site;
mod special;
mod stats;
mod svg;
mod sys;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;

use report::Report;
use runner::Runner;

/// Measures Standfast and its peers.
#[derive(Debug, Parser)]
struct Args {
    /// A small run that touches everything; its figures are not for publishing.
    #[arg(long)]
    quick: bool,
    /// Seconds of a run [default: 10; quick: 1].
    #[arg(long)]
    seconds: Option<u64>,
    /// Rounds of a cell [default: 5; quick: 1]; fewer than 5 are not for publishing.
    #[arg(long)]
    reps: Option<usize>,
    /// Size of the images in MiB [default: 2048; quick: 256].
    #[arg(long)]
    size: Option<u64>,
    /// Only cells whose name contains this; may be given several times.
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Where results.json and ratios.svg go.
    #[arg(long, default_value = "build/bench")]
    out: PathBuf,
    /// Where images and journals go: one file system for all [default: below --out].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Only print the cells' names.
    #[arg(long)]
    list: bool,
}

/// What was decided from the arguments.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Options {
    pub(crate) quick: bool,
    pub(crate) seconds: u64,
    /// Seconds of warm-up before each run.
    pub(crate) warm: u64,
    pub(crate) reps: usize,
    pub(crate) size_mib: u64,
    pub(crate) publishable: bool,
}

impl Options {
    fn new(args: &Args) -> Result<Self> {
        let pick = |full, quick| if args.quick { quick } else { full };
        let reps = args.reps.unwrap_or(pick(5, 1) as usize);
        let size_mib = args.size.unwrap_or(pick(2048, 256));
        let seconds = args.seconds.unwrap_or(pick(10, 1));
        ensure!(reps > 0 && seconds > 0, "--reps and --seconds are at least 1");
        ensure!(size_mib >= 64, "--size is at least 64");
        let publishable = !args.quick && reps >= 5;
        Ok(Self { quick: args.quick, seconds, warm: pick(1, 0), reps, size_mib, publishable })
    }
}

/// The program that is measured: beside this one.
pub(crate) fn program() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("standfast");
    ensure!(path.exists(), "{} is missing: cargo build --release", path.display());
    Ok(path)
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every cell was measured.
fn run(args: &Args) -> Result<bool> {
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|p| name.contains(p));
    let names: Vec<&str> = cells::CELLS.iter().map(|cell| cell.name).collect();
    let names: Vec<&str> = names.into_iter().chain(special::NAMES.iter().copied()).collect();
    let names: Vec<&str> = names.into_iter().filter(|name| wanted(name)).collect();
    if args.list {
        names.iter().for_each(|name| println!("{name}"));
        return Ok(true);
    }
    if names.is_empty() {
        bail!("no cell is called that; --list names them");
    }
    if cfg!(debug_assertions) {
        eprintln!("bench: a debug build; scripts/bench.sh makes a release build");
    }
    let options = Options::new(args)?;
    ensure!(sys::has("fio"), "fio is missing: apt-get install fio");
    sys::catch_signals()?;
    std::fs::create_dir_all(&args.out)?;
    let base = args.dir.as_ref().unwrap_or(&args.out);
    std::fs::create_dir_all(base)?;
    let base = base.canonicalize()?;
    let work = tempfile::Builder::new().prefix("bench.").tempdir_in(&base)?;
    let mut report = Report::new(&options, &base);
    let mut runner = Runner::new(options, work.path(), &names)?;
    let measured = measure(&names, &mut runner, &mut report);
    drop(runner);
    if let Err(error) = &measured {
        eprintln!("bench: {error:#}; what was measured until then follows");
    }
    report.ratios();
    print!("{}", report.text());
    let json = args.out.join("results.json");
    std::fs::write(&json, serde_json::to_vec_pretty(&report)?).context("results.json")?;
    std::fs::write(args.out.join("ratios.svg"), svg::draw(&report)).context("ratios.svg")?;
    println!("\nwritten: {}, ratios.svg", json.display());
    Ok(report.complete() && measured.is_ok())
}

fn measure(names: &[&str], runner: &mut Runner, report: &mut Report) -> Result<()> {
    for cell in cells::CELLS.iter().filter(|cell| names.contains(&cell.name)) {
        runner.cell(cell, report)?;
    }
    for name in special::NAMES.iter().filter(|name| names.contains(name)) {
        special::run(name, runner, report)?;
    }
    Ok(())
}
