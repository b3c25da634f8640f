//! Runs cells: rounds over the subjects, each brought to rest before the next.
//!
//! Peers are started fresh for each run. A protected group of ours is made once
//! and kept, because its first copy takes as long as several runs; it is made anew
//! when the journal (or, while replicating, the target's store) lacks the room
//! for one more run, and after an error.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::Options;
use crate::cells::{CELLS, Cell, Subject, Unit, has_goal};
use crate::images::{self, Content, Folios};
use crate::peers::{self, Files, Running};
use crate::report::{Report, Row, Sample};
use crate::site::{Plan, Site};
use crate::{fio, sys};

/// Everything that runs, and where.
#[derive(Debug)]
pub(crate) struct Runner {
    /// As asked for.
    pub(crate) options: Options,
    folder: PathBuf,
    sites: BTreeMap<Subject, Site>,
    /// Bytes sent to the target of a site, at most.
    stored: BTreeMap<Subject, u64>,
    journal_bytes: u64,
    made: u32,
}

impl Runner {
    /// In `folder`; refuses if the disk lacks the room for `names`.
    pub(crate) fn new(options: Options, folder: &Path, names: &[&str]) -> Result<Self> {
        let most = CELLS.iter().filter(|cell| names.contains(&cell.name) && !is_tmpfs(cell));
        let most = most.map(|cell| need(cell, &options)).max().unwrap_or(0);
        let journal_bytes = journal_for(most);
        let room = |path: &Path| -> Result<u64> {
            let fs = rustix::fs::statvfs(path)?;
            Ok(fs.f_bavail * fs.f_frsize)
        };
        let needed = 2 * journal_bytes + STORE_MAX.max(most) + 8 * (options.size_mib << 20) + SPARE;
        let free = room(folder)?;
        ensure!(
            free >= needed,
            "{} has {} MiB free and the run needs up to {}: use --dir, or fewer --seconds",
            folder.display(),
            free >> 20,
            needed >> 20
        );
        let (sites, stored) = Default::default();
        Ok(Self { options, folder: folder.to_owned(), sites, stored, journal_bytes, made: 0 })
    }

    /// Rounds of one cell into the report. Errors are rows; only a signal ends it.
    pub(crate) fn cell(&mut self, cell: &'static Cell, report: &mut Report) -> Result<()> {
        let quick = self.options.quick && cell.name != "randwrite-q16";
        let subjects: Vec<Subject> =
            cell.subjects.iter().copied().filter(|s| !quick || has_goal(cell.name, *s)).collect();
        let mut rows: Vec<Row> = subjects.iter().map(|s| Row::new(cell, *s)).collect();
        for row in &mut rows {
            let missing = row.subject.programs().iter().find(|program| !sys::has(program));
            row.missing = missing.map(|program| (*program).to_owned());
        }
        for round in 0..self.options.reps {
            for row in rows.iter_mut().filter(|row| row.missing.is_none()) {
                sys::check_stop()?;
                eprintln!(
                    "{} {}/{}: {}",
                    cell.name,
                    round + 1,
                    self.options.reps,
                    row.subject.name()
                );
                match self.sample(cell, row.subject) {
                    Ok(sample) => row.samples.push(sample),
                    Err(error) => {
                        eprintln!("bench: {error:#}");
                        row.error = Some(format!("{error:#}"));
                        self.sites.remove(&row.subject);
                    }
                }
            }
        }
        if is_tmpfs(cell) {
            // Its journal is memory that the other cells' page cache wants.
            self.sites.remove(&Subject::DownTmpfs);
        }
        report.rows.extend(rows);
        Ok(())
    }

    fn sample(&mut self, cell: &Cell, subject: Subject) -> Result<Sample> {
        let load: Vec<String> = cell.load.iter().map(|word| (*word).to_owned()).collect();
        let seconds = self.options.seconds.min(cell.seconds_max);
        let warm = self.options.warm;
        let need = need(cell, &self.options);
        let folios = if cell.unit == Unit::Iops { Folios::Small } else { Folios::Large };
        if !subject.is_site() {
            let running = self.start_peer(subject, folios)?;
            return measure(cell, &running.target, &running.roles, &load, warm, seconds);
        }
        let site = self.site(subject, need)?;
        images::cache(site.image(), folios)?;
        let target = peers::nbd_target(&site.uri);
        let mut sample = measure(cell, &target, &site.roles()?, &load, warm, seconds)?;
        (sample.backlog_bytes, sample.drain_seconds) = site.quiesce()?;
        site.check_state()?;
        sys::sync_fs(&self.folder)?;
        Ok(sample)
    }

    /// A peer on the plain image, everything that was dirty on the device.
    pub(crate) fn start_peer(&mut self, subject: Subject, folios: Folios) -> Result<Running> {
        let image = self.image("plain.img")?;
        let mirrors = matches!(subject, Subject::MirrorBlocking | Subject::MirrorBackground);
        let mirror = if mirrors { self.image("mirror.img")? } else { PathBuf::new() };
        sys::sync_fs(&self.folder)?;
        images::cache(&image, folios)?;
        if mirrors {
            images::cache(&mirror, folios)?;
        }
        let size = self.options.size_mib << 20;
        let files = Files { folder: &self.folder, image: &image, mirror: &mirror, size };
        peers::start(subject, &files)
    }

    /// A group of ours with room for `need` more bytes, made if it is not there.
    pub(crate) fn site(&mut self, subject: Subject, need: u64) -> Result<&mut Site> {
        if let Some(site) = self.sites.get(&subject) {
            let (used, capacity) = site.journal_used()?;
            let stored = self.stored.get(&subject).copied().unwrap_or(0);
            let full = used + need > capacity / 4 * 3;
            if full || (site.replicates() && stored + need > STORE_MAX.max(need)) {
                self.sites.remove(&subject);
            }
        }
        if !self.sites.contains_key(&subject) {
            let site = self.new_site(subject, need).with_context(|| subject.name())?;
            self.sites.insert(subject, site);
            self.stored.insert(subject, 0);
        }
        *self.stored.entry(subject).or_default() += need;
        self.sites.get_mut(&subject).context("just made")
    }

    /// The same, made anew whether or not there is one.
    pub(crate) fn fresh_site(&mut self, subject: Subject, need: u64) -> Result<&mut Site> {
        self.sites.remove(&subject);
        self.site(subject, need)
    }

    fn new_site(&mut self, subject: Subject, need: u64) -> Result<Site> {
        eprintln!("  making: {}", subject.name());
        let folder = self.new_folder()?;
        let image = folder.join("disk.img");
        images::make(&image, self.options.size_mib, Content::Full)?;
        let tmpfs = subject == Subject::DownTmpfs;
        let name = format!("standfast-bench-{}", std::process::id());
        let journal = tmpfs.then(|| Path::new("/dev/shm").join(name));
        let journal_bytes = if tmpfs { journal_for(need) } else { self.journal_bytes };
        let mut site = Site::start(Plan { folder, image: image.clone(), journal_bytes, journal })?;
        site.quiesce()?;
        if subject != Subject::Replicating {
            site.stop_target();
        }
        sys::sync_fs(&self.folder)?;
        Ok(site)
    }

    /// A group that was made before.
    pub(crate) fn made_site(&self, subject: Subject) -> Result<&Site> {
        self.sites.get(&subject).with_context(|| format!("{} is gone", subject.name()))
    }

    /// A new folder of the run.
    pub(crate) fn new_folder(&mut self) -> Result<PathBuf> {
        self.made += 1;
        let folder = self.folder.join(format!("s{}", self.made));
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// Gives up all groups, and the room they take.
    pub(crate) fn clear(&mut self) {
        self.sites.clear();
    }

    /// Where the run's files are.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn image(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        if !path.exists() {
            images::make(&path, self.options.size_mib, Content::Full)?;
        }
        Ok(path)
    }
}

/// Warm-up, then the run that counts, with the CPU time of all it takes.
fn measure(
    cell: &Cell,
    target: &[String],
    roles: &[(String, u32)],
    load: &[String],
    warm: u64,
    seconds: u64,
) -> Result<Sample> {
    if warm > 0 {
        fio::run(target, load, Some(warm))?;
    }
    let meter = sys::CpuMeter::start(roles);
    let run = fio::run(target, load, Some(seconds))?;
    let mut cpu = meter.end();
    cpu.insert("client".into(), run.client_us);
    cpu.values_mut().for_each(|us| *us /= run.ops);
    let value = if cell.unit == Unit::Iops { run.iops } else { run.mib };
    Ok(Sample { value, cpu_us_per_op: cpu, ..Sample::default() })
}

fn is_tmpfs(cell: &Cell) -> bool {
    cell.subjects.contains(&Subject::DownTmpfs)
}

/// Journal bytes of one run with its warm-up.
fn need(cell: &Cell, options: &Options) -> u64 {
    let seconds = options.seconds.min(cell.seconds_max) + options.warm;
    // The start of a load is quicker than the rest of it: the page cache is clean.
    if cell.journal_mib == 0 { 0 } else { seconds * (cell.journal_mib << 20) + (1 << 30) }
}

/// A journal that does not freeze before `need` bytes: it keeps a quarter of itself for
/// its redo log.
pub(crate) fn journal_for(need: u64) -> u64 {
    (need / 5 * 7).max(1 << 30)
}

/// Bytes a target's store may grow to before the group is made anew.
const STORE_MAX: u64 = 12 << 30;
/// Room that must be left over.
const SPARE: u64 = 4 << 30;
