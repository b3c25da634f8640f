//! Latency of writes at a fixed rate, and the RPO meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::cells::Subject;
use crate::fio;
use crate::images::{self, Folios};
use crate::peers::nbd_target;
use crate::report::{Figure, Report};
use crate::runner::Runner;
use crate::site::{GROUP, Site};
use crate::stats::{median, quantile};
use crate::sys;

/// 70/30 random 4 KiB at half the rate that nbdkit reached at depth 16: nbdkit and a
/// group that replicates, in turn.
pub(super) fn run(cell: &'static str, runner: &mut Runner, report: &Report) -> Result<Vec<Figure>> {
    let peer = Subject::NbdkitFile;
    if !sys::has("nbdkit") {
        return Ok(vec![Figure::none(cell, cell, "no nbdkit".into(), false)]);
    }
    let reached = match report.row("randwrite-q16", peer).and_then(|row| row.median()) {
        Some(iops) => iops,
        None => {
            let load = ["--rw=randwrite", "--bs=4k", "--iodepth=16"].map(String::from);
            let running = runner.start_peer(peer, Folios::Small)?;
            fio::run(&running.target, &load, Some(runner.options.seconds))?.iops
        }
    };
    let rate = reached / 2.0;
    let (reads, writes) = ((rate * 0.7) as u64, (rate * 0.3) as u64);
    let load = ["--rw=randrw", "--rwmixread=70", "--bs=4k", "--iodepth=16"].map(String::from);
    let load = [&load[..], &[format!("--rate_iops={reads},{writes}")]].concat();
    let seconds = if runner.options.quick { 3 } else { 30 };
    let (mut theirs, mut ours, mut rpo) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runner.options.reps {
        sys::check_stop()?;
        runner.site(Subject::Replicating, writes * seconds * 8192)?;
        let running = runner.start_peer(peer, Folios::Small)?;
        // Asked during the peer's run too, so that both bear the cost of asking.
        let site = runner.made_site(Subject::Replicating)?;
        theirs.push(sampled(site, || fio::run(&running.target, &load, Some(seconds)))?.0);
        drop(running);
        sys::sync_fs(runner.folder())?;
        images::cache(site.image(), Folios::Small)?;
        let target = nbd_target(&site.uri);
        let (run, seen) = sampled(site, || fio::run(&target, &load, Some(seconds)))?;
        ours.push(run);
        rpo.extend(seen);
        site.quiesce()?;
        site.check_state()?;
        sys::sync_fs(runner.folder())?;
    }
    let mut figures = vec![
        ratio(cell, "p99", &ours, &theirs, |run| run.write_p99_us),
        ratio(cell, "p99.9", &ours, &theirs, |run| run.write_p999_us),
    ];
    for (title, q, limit) in [("p50", 0.5, 0.25), ("p99", 0.99, 1.0)] {
        let value = quantile(&rpo, q).context("the target never told an RPO")?;
        let figure = Figure::of(cell, &format!("RPO {title} at that rate"), &[value], "s");
        let note = format!("{} samples, {rate:.0} operations/s asked for", rpo.len());
        figures.push(figure.at_most(limit, limit).note(note));
    }
    Ok(figures)
}

fn ratio(
    cell: &'static str,
    name: &str,
    ours: &[fio::Run],
    theirs: &[fio::Run],
    of: impl Fn(&fio::Run) -> f64,
) -> Figure {
    let values = |runs: &[fio::Run]| runs.iter().map(&of).collect::<Vec<_>>();
    let rates = |runs: &[fio::Run]| median(&runs.iter().map(|r| r.iops).collect::<Vec<_>>());
    let (a, b) = (values(ours), values(theirs));
    let pairs: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a / b).collect();
    let (a, b) = (median(&a).unwrap_or(0.0), median(&b).unwrap_or(f64::NAN));
    let title = format!("{name} of writes at a fixed rate: ours, replicating / nbdkit file");
    let note = format!(
        "{a:.0} / {b:.0} us; {:.0} / {:.0} operations/s done",
        rates(ours).unwrap_or(0.0),
        rates(theirs).unwrap_or(0.0)
    );
    let figure = Figure::of(cell, &title, &pairs, "x").at_most(1.2, 0.8).note(note);
    Figure { value: Some(a / b), ..figure }
}

/// Does `work` while the target is asked for its RPO ten times a second.
fn sampled<T>(site: &Site, work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<f64>)> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut seen = Vec::new();
            while !done.load(Ordering::SeqCst) {
                let status = site.target_command(&["status", GROUP]).unwrap_or_default();
                seen.extend(status["groups"][0]["rpo_seconds"].as_f64());
                std::thread::sleep(Duration::from_millis(100));
            }
            seen
        });
        let result = work();
        done.store(true, Ordering::SeqCst);
        let seen = sampler.join().unwrap_or_default();
        Ok((result?, seen))
    })
}
