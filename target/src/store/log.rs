//! One order of records: its segments, its runs, and how they change.
//!
//! Owns the step from one durable state to the next. A change is *planned* (files
//! are written and synced), then the owner puts a manifest in force that names
//! them, then the plan is *adopted*; a crash or failure before the manifest leaves
//! only files that no manifest names. The stream and the copies of an era and the
//! writes of a drill are each one log.

use std::path::PathBuf;
use std::sync::Arc;

use super::StoreError;
use super::format::{PAGE, SegKind};
use super::index::{Memtable, Run, merge, write_run};
use super::manifest::{LogRef, RunRef, SegRef};
use super::segment::{Env, OpenSeg, Recovered, Tagged, read_footer, recover, reindex};

/// The writer's side of a log.
#[derive(Debug)]
pub(crate) struct Log {
    kind: SegKind,
    era: u32,
    /// As in the manifest in force.
    pub(crate) refs: LogRef,
    pub(crate) open: Option<OpenSeg>,
    /// Oldest first.
    runs: Vec<Arc<Run>>,
}

/// The readers' side: never changes, but the memtable grows.
#[derive(Clone, Debug, Default)]
pub(crate) struct LogSnap {
    pub(crate) memtable: Option<Arc<Memtable>>,
    /// Newest first.
    pub(crate) runs: Vec<Arc<Run>>,
}

/// A log as it is to become.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) refs: LogRef,
    open: Option<OpenSeg>,
    /// The open segment stays as it is.
    keep_open: bool,
    runs: Vec<Arc<Run>>,
    /// Files that the new state does not name.
    obsolete: Vec<PathBuf>,
}

/// A merge that is due.
#[derive(Debug)]
pub(crate) struct Due {
    kind: SegKind,
    era: u32,
    runs: Vec<Arc<Run>>,
    pub(super) meta: RunRef,
    /// What the runs are the index of.
    segs: Vec<SegRef>,
}

/// What opening a log found.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) log: Log,
    pub(crate) points: Vec<Tagged>,
    pub(crate) incarnations: Vec<(u64, u64)>,
    /// Damage: what is there can be read, nothing may be added.
    pub(crate) failure: Option<String>,
}

impl Log {
    /// A log without anything in it.
    pub(crate) fn new(kind: SegKind, era: u32) -> Self {
        Self { kind, era, refs: LogRef::default(), open: None, runs: Vec::new() }
    }

    /// Opens what the manifest names.
    pub(crate) fn open(
        env: &Env,
        kind: SegKind,
        era: u32,
        refs: LogRef,
        mut last_label: Option<u64>,
    ) -> Result<Opened, StoreError> {
        if !refs.is_consistent() {
            return Err(StoreError::damaged(&env.dir, "its manifest contradicts itself"));
        }
        let mut this = Self::new(kind, era);
        let idx = env.idx_dir();
        for meta in &refs.runs {
            match Run::open(env.files.as_ref(), &idx, env.group_id, *meta) {
                Ok(run) => this.runs.push(Arc::new(run)),
                Err(newer @ StoreError::Newer { .. }) => return Err(newer),
                Err(error) => {
                    tracing::warn!(%error, "an index run is lost; it is made again");
                    let made = rebuild(env, kind, era, &refs.segs, meta)?;
                    this.runs.extend(made.into_iter().map(Arc::new));
                }
            }
        }
        let refs = LogRef { runs: this.runs.iter().map(|r| r.meta).collect(), ..refs };
        let (mut points, mut incarnations, mut failure) = (Vec::new(), Vec::new(), None);
        for meta in &refs.segs {
            if meta.sealed.is_some() {
                env.pool.insert(meta);
                match read_footer(env, meta, era) {
                    Ok(mut more) => points.append(&mut more),
                    Err(newer @ StoreError::Newer { .. }) => return Err(newer),
                    Err(error) => failure = Some(error.to_string()),
                }
                last_label = points.last().map_or(last_label, |p: &Tagged| Some(p.0.time_us));
                continue;
            }
            let found: Recovered = recover(env, *meta, kind, era, last_label)?;
            points.extend(found.seg.points.iter().cloned());
            incarnations = found.incarnations;
            failure = failure.or(found.failure);
            this.open = Some(found.seg);
        }
        this.refs = refs;
        Ok(Opened { log: this, points, incarnations, failure })
    }

    /// Exclusive end of what is in it; `start` if nothing is.
    pub(crate) fn end(&self, start: u64) -> u64 {
        let sealed = self.refs.segs.last().and_then(|s| s.sealed).map(|s| s.to);
        self.open.as_ref().map(|o| o.lsn_to).or(sealed).unwrap_or(start)
    }

    /// Bytes of segments and runs.
    pub(crate) fn bytes(&self) -> u64 {
        let segs = self.refs.segs.iter().filter_map(|s| s.sealed).map(|s| s.bytes);
        let runs = self.refs.runs.iter().map(|r| r.bytes);
        segs.sum::<u64>() + runs.sum::<u64>() + self.open.as_ref().map_or(0, |o| o.end)
    }

    /// What readers see from now on.
    pub(crate) fn snapshot(&self) -> LogSnap {
        LogSnap {
            memtable: self.open.as_ref().map(|o| Arc::clone(&o.memtable)),
            runs: self.runs.iter().rev().cloned().collect(),
        }
    }

    /// Whether the open segment must change before the next append.
    pub(crate) fn is_due(&self, now_us: u64, roll_bytes: u64) -> bool {
        let Some(open) = &self.open else { return true };
        let age = now_us.saturating_sub(open.opened_us);
        open.broken
            || open.end >= roll_bytes
            || open.memtable.len() >= ROLL_ENTRIES
            || (open.end >= ROLL_AGED_BYTES.min(roll_bytes) && age >= ROLL_AGE_US)
            || (open.end > PAGE && age >= ROLL_OLD_US)
    }

    /// Plans the next open segment: rescues a broken one, else seals the one that
    /// is open and, if `next` has a generation, makes a new one.
    pub(crate) fn plan(
        &mut self,
        env: &Env,
        next: Option<u64>,
        start: u64,
    ) -> Result<Plan, StoreError> {
        let from = self.end(start);
        let mut plan = Plan {
            refs: self.refs.clone(),
            open: None,
            keep_open: false,
            runs: self.runs.clone(),
            obsolete: Vec::new(),
        };
        if let Some(open) = &mut self.open {
            if open.broken && open.n_frames > 0 {
                let mut rescued = open.rescue(env)?;
                plan.obsolete.push(open.path.clone());
                plan.refs.segs.pop();
                if next.is_some() {
                    plan.refs.segs.push(rescued.meta);
                    plan.open = Some(rescued);
                    return Ok(plan);
                }
                plan.seal(env, &mut rescued)?;
            } else {
                plan.refs.segs.pop();
                if open.n_frames == 0 {
                    plan.obsolete.push(open.path.clone());
                } else {
                    plan.seal(env, open)?;
                }
            }
        }
        if let Some(generation) = next {
            let open = OpenSeg::create(env, self.kind, self.era, generation, from)?;
            plan.refs.segs.push(open.meta);
            plan.open = Some(open);
        }
        assert!(plan.refs.is_consistent(), "I17: segments and runs are gap-free");
        Ok(plan)
    }

    /// Plans to replace runs by the one merged of them, if they are still there.
    pub(crate) fn plan_merge(&self, env: &Env, due: &Due, run: Run) -> Option<Plan> {
        let ids: Vec<u32> = due.runs.iter().map(|r| r.meta.id).collect();
        let at = self.refs.runs.iter().position(|r| r.id == ids[0])?;
        let here = self.refs.runs.get(at..at + ids.len())?;
        if !here.iter().map(|r| r.id).eq(ids.iter().copied()) {
            return None;
        }
        let mut plan = Plan {
            refs: self.refs.clone(),
            open: None,
            keep_open: true,
            runs: self.runs.clone(),
            obsolete: Vec::new(),
        };
        plan.refs.runs.splice(at..at + ids.len(), [run.meta]);
        plan.runs.splice(at..at + ids.len(), [Arc::new(run)]);
        plan.obsolete.extend(due.runs.iter().map(|r| env.idx_dir().join(r.meta.name())));
        assert!(plan.refs.is_consistent(), "I17: segments and runs are gap-free");
        Some(plan)
    }

    /// Takes a plan over, after the manifest that names it is in force. Files that
    /// are no longer named are removed; those that cannot be go at the next start.
    pub(crate) fn adopt(&mut self, env: &Env, plan: Plan) {
        if !plan.keep_open {
            self.open = plan.open;
        }
        self.refs = plan.refs;
        self.runs = plan.runs;
        // A rescued segment has another file now, also if it was sealed.
        for meta in self.refs.segs.iter().rev().take(2) {
            env.pool.insert(meta);
        }
        for path in plan.obsolete {
            let _ = env.files.remove(&path);
        }
    }

    /// The oldest [`MERGE_RUNS`] neighbours of one level, if there are.
    pub(crate) fn due(&self, env: &Env) -> Option<Due> {
        let mut start = 0;
        while start < self.runs.len() {
            let level = self.runs[start].meta.level;
            let same = self.runs[start..].iter().take_while(|r| r.meta.level == level).count();
            if same >= MERGE_RUNS {
                let runs = self.runs[start..start + MERGE_RUNS].to_vec();
                let (lo, hi) = (runs[0].meta.lo, runs[MERGE_RUNS - 1].meta.hi);
                let id = env.take_id();
                let meta = RunRef { id, level: level + 1, lo, hi, entries: 0, bytes: 0 };
                let inside = |s: &&SegRef| s.from >= lo && s.sealed.is_some_and(|e| e.to <= hi);
                let segs = self.refs.segs.iter().filter(inside).copied().collect();
                return Some(Due { kind: self.kind, era: self.era, runs, meta, segs });
            }
            start += same;
        }
        None
    }

    /// Number of runs that were never merged.
    pub(crate) fn unmerged(&self) -> usize {
        self.runs.iter().rev().take_while(|r| r.meta.level == 0).count()
    }
}

impl Plan {
    fn seal(&mut self, env: &Env, open: &mut OpenSeg) -> Result<(), StoreError> {
        let run_id = env.take_id();
        let sealed = open.seal(env, run_id)?;
        let (lo, hi) = (open.meta.from, sealed.to);
        let meta = RunRef { id: run_id, level: 0, lo, hi, entries: 0, bytes: 0 };
        let dir = env.idx_dir();
        let files = env.files.as_ref();
        let run = write_run(files, &dir, env.group_id, meta, &open.memtable)?;
        files.sync_dir(&dir).map_err(StoreError::io(&dir))?;
        let mut seg = open.meta;
        seg.sealed = Some(sealed);
        self.refs.segs.push(seg);
        self.refs.runs.push(run.meta);
        self.runs.push(Arc::new(run));
        Ok(())
    }
}

impl Due {
    /// Does the merge; durable on return, but not yet named by a manifest. Needs
    /// no lock: runs never change. On failure no file of it is left.
    pub(crate) fn run(&self, env: &Env) -> Result<Run, StoreError> {
        let dir = env.idx_dir();
        let mut made = Vec::new();
        let mut run = self.merge(env, &self.runs);
        if run.as_ref().is_err_and(|e| !e.is_full()) {
            run = self.repair(env, &mut made).and_then(|runs| match runs {
                Some(runs) => self.merge(env, &runs),
                None => run,
            });
        }
        for run in made {
            let _ = env.files.remove(&dir.join(run.meta.name()));
        }
        let named = run.and_then(|run| {
            env.files.sync_dir(&dir).map_err(StoreError::io(&dir))?;
            Ok(run)
        });
        if named.is_err() {
            let _ = env.files.remove(&dir.join(self.meta.name()));
        }
        named
    }

    fn merge(&self, env: &Env, runs: &[Arc<Run>]) -> Result<Run, StoreError> {
        let dir = env.idx_dir();
        let path = dir.join(self.meta.name());
        if env.files.exists(&path) {
            env.files.remove(&path).map_err(StoreError::io(&path))?;
        }
        merge(env.files.as_ref(), &dir, env.group_id, self.meta, runs)
    }

    /// The runs, with those that cannot be read made again from their segments
    /// for as long as the merge takes; None if all can be read.
    fn repair(
        &self,
        env: &Env,
        made: &mut Vec<Arc<Run>>,
    ) -> Result<Option<Vec<Arc<Run>>>, StoreError> {
        let mut runs = Vec::new();
        for run in &self.runs {
            match run.check() {
                Ok(()) => runs.push(Arc::clone(run)),
                Err(error) => {
                    tracing::warn!(%error, "an index run is lost; it is made again");
                    let again = rebuild(env, self.kind, self.era, &self.segs, &run.meta)?;
                    let again: Vec<_> = again.into_iter().map(Arc::new).collect();
                    made.extend(again.iter().cloned());
                    runs.extend(again);
                }
            }
        }
        Ok((!made.is_empty()).then_some(runs))
    }
}

/// Makes a lost run again from its segments, one run for each.
fn rebuild(
    env: &Env,
    kind: SegKind,
    era: u32,
    segs: &[SegRef],
    lost: &RunRef,
) -> Result<Vec<Run>, StoreError> {
    let dir = env.idx_dir();
    let mut runs = Vec::new();
    let sealed = segs.iter().filter_map(|s| Some((s, s.sealed?)));
    for (seg, end) in sealed.filter(|(s, end)| s.from >= lost.lo && end.to <= lost.hi) {
        let memtable = reindex(env, *seg, kind, era)?;
        let (lo, hi) = (seg.from, end.to);
        let meta = RunRef { id: env.take_id(), level: 0, lo, hi, entries: 0, bytes: 0 };
        runs.push(write_run(env.files.as_ref(), &dir, env.group_id, meta, &memtable)?);
    }
    env.files.sync_dir(&dir).map_err(StoreError::io(&dir))?;
    Ok(runs)
}

/// A segment is sealed at this size.
pub(crate) const ROLL_BYTES: u64 = 64 << 20;
/// … or with this many entries: 32 MiB of memory at most.
const ROLL_ENTRIES: usize = 1 << 19;
/// … or at this age if it is worth a file of its own …
const ROLL_AGE_US: u64 = 30_000_000;
const ROLL_AGED_BYTES: u64 = 4 << 20;
/// … or at this age in any case.
const ROLL_OLD_US: u64 = 3_600_000_000;
/// Runs of one level that are merged into one of the next.
pub(crate) const MERGE_RUNS: usize = 16;
/// With more unmerged runs than this the writer merges by itself.
pub(crate) const UNMERGED_MAX: usize = 64;
