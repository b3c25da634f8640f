//! Claims about merges of index runs: what they repair, leave behind and wait for.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use blockfilter::engine::record::{Failure, Fault, Op, SimFiles};
use blockfilter::engine::{File, Files, Open};
use blockfilter::names::Lsn;

use super::super::format::PAGE;
use super::super::{AppendError, GroupStore, StoreError, inspect};
use super::model::{Source, TestClock, create, dir, meta, name, reopen};

fn runs(sim: &SimFiles) -> Vec<PathBuf> {
    let idx = dir().join("groups/g/idx");
    sim.list(&idx).unwrap().iter().map(|file| idx.join(file)).collect()
}

fn append(group: &GroupStore, source: &mut Source, epochs: usize) {
    for _ in 0..epochs {
        group.append_epoch(&source.epoch(1, 2, None)).unwrap();
    }
}

#[test]
fn a_merge_makes_a_damaged_run_again_and_the_group_goes_on() {
    for (level, background) in [(0, true), (0, false), (1, true)] {
        let sim = SimFiles::new();
        let files: Arc<dyn Files> = Arc::new(sim.clone());
        let mut source = Source::new(31);
        let (store, group) = create(&files);
        source.seed(&group);
        group.set_roll_bytes(1);
        append(&group, &mut source, 20);
        if level == 1 {
            while store.maintain().unwrap() {}
            append(&group, &mut source, 15 * 16);
        }
        let damaged = runs(&sim)[2 * usize::from(level == 0)].clone();
        sim.flip(&damaged, PAGE + 100, 1);
        if background {
            while store.maintain().unwrap() {}
        } else {
            append(&group, &mut source, 80);
        }
        append(&group, &mut source, 3);
        assert_eq!(group.state().failed, None, "level {level}");
        assert!(!sim.exists(&damaged), "level {level}: the damaged run was merged");
        source.check(&group);
        drop((store, group));
        let clock = Arc::new(TestClock::default());
        assert_eq!(inspect(Arc::clone(&files), dir(), clock, false).unwrap()["damaged"], 0);
        let before = runs(&sim);
        let (_store, group) = reopen(&files);
        assert_eq!(runs(&sim), before, "level {level}: nothing was left behind");
        source.check(&group);
    }
}

/// As [`Failure::NoSpace`] at the n-th call of one kind from now on.
fn full(sim: &SimFiles, op: Op, path: &str, skip: u64) {
    let path = path.to_owned();
    sim.fail(Fault { op: Some(op), path, skip, lasting: true, failure: Failure::NoSpace });
}

#[test]
fn a_full_disk_leaves_no_file_behind() {
    let list = |sim: &SimFiles| {
        let group = dir().join("groups/g");
        ["seg", "idx", ""].map(|sub| sim.list(&group.join(sub)).unwrap())
    };
    for op in [Op::Write, Op::SyncData, Op::SyncDir, Op::Create] {
        for skip in 0..14 {
            let sim = SimFiles::new();
            let files: Arc<dyn Files> = Arc::new(sim.clone());
            let mut source = Source::new(32);
            let (store, group) = create(&files);
            source.seed(&group);
            group.set_roll_bytes(1);
            append(&group, &mut source, 17);
            full(&sim, op, "/groups/g", skip);
            let _ = store.maintain();
            for _ in 0..3 {
                let frames = source.epoch(1, 2, None);
                if matches!(group.append_epoch(&frames), Err(AppendError::Full)) {
                    assert!(matches!(group.append_epoch(&frames), Err(AppendError::Full)));
                    break;
                }
            }
            let failed = group.state().failed;
            let begun = group.begin_seed(Lsn(source.lsn), 1, 1);
            sim.heal();
            let left = list(&sim);
            drop((store, group));
            let (_store, group) = reopen(&files);
            // What is durable but was not said so is decided at the start.
            if failed.is_none() && !matches!(begun, Err(AppendError::Failed(_))) {
                assert_eq!(list(&sim), left, "{op:?} {skip}");
            }
            assert_eq!(group.state().failed, None, "{op:?} {skip}");
        }
    }
}

#[test]
fn no_space_a_quota_and_the_largest_file_are_all_full() {
    for errno in [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT, rustix::io::Errno::FBIG] {
        let error = StoreError::Io { path: PathBuf::new(), source: errno.into() };
        assert!(error.is_full(), "{errno}");
    }
}

/// Holds a merge at the sync of the index folder, while a test does something else.
#[derive(Clone, Debug)]
struct Held {
    sim: SimFiles,
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Debug, Default)]
struct State {
    armed: bool,
    merging: bool,
    /// A group's folder was moved away.
    moved: bool,
    /// … while a merge was writing there.
    raced: bool,
    go: bool,
}

impl Held {
    fn new() -> Self {
        Self { sim: SimFiles::new(), state: Arc::default() }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.0.lock().unwrap());
        self.state.1.notify_all();
    }

    fn wait(&self, limit: Duration, until: impl Fn(&State) -> bool) {
        let state = self.state.0.lock().unwrap();
        drop(self.state.1.wait_timeout_while(state, limit, |s| !until(s)).unwrap());
    }
}

impl Files for Held {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>> {
        self.sim.open(path, how)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if from.ends_with("groups/g") {
            self.change(|s| (s.moved, s.raced) = (true, s.merging));
        }
        self.sim.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.sim.remove(path)
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.sim.create_dir_all(path)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.sim.remove_dir_all(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.sim.list(dir)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let held = std::mem::take(&mut self.state.0.lock().unwrap().armed);
        if held {
            self.change(|s| s.merging = true);
            // A forget that does not wait gets through here; one that does is let off.
            self.wait(Duration::from_millis(300), |s| s.moved || s.go);
            self.change(|s| s.merging = false);
        }
        self.sim.sync_dir(dir)
    }
    fn exists(&self, path: &Path) -> bool {
        self.sim.exists(path)
    }
    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.sim.free_bytes(path)
    }
}

#[test]
fn forgetting_a_group_waits_for_its_merge() {
    let held = Held::new();
    let files: Arc<dyn Files> = Arc::new(held.clone());
    let mut source = Source::new(33);
    let (store, group) = create(&files);
    source.seed(&group);
    group.set_roll_bytes(1);
    append(&group, &mut source, 20);
    held.change(|s| s.armed = true);
    std::thread::scope(|scope| {
        let merge = scope.spawn(|| store.maintain());
        held.wait(Duration::from_secs(10), |s| s.merging);
        store.forget(&name("g")).unwrap();
        let _ = merge.join().unwrap();
    });
    assert!(!held.state.0.lock().unwrap().raced, "the folder was moved below a merge");
    drop(store.create_group(meta()).unwrap());
    assert!(runs(&held.sim).is_empty());
}

#[test]
fn a_seed_that_begins_during_a_merge_keeps_its_run() {
    let held = Held::new();
    let files: Arc<dyn Files> = Arc::new(held.clone());
    let mut source = Source::new(34);
    let (store, group) = create(&files);
    source.seed(&group);
    group.set_roll_bytes(1);
    append(&group, &mut source, 20);
    held.change(|s| s.armed = true);
    std::thread::scope(|scope| {
        let merge = scope.spawn(|| store.maintain());
        held.wait(Duration::from_secs(10), |s| s.merging);
        source.seed(&group);
        held.change(|s| s.go = true);
        assert!(merge.join().unwrap().unwrap());
    });
    drop((store, group));
    let clock = Arc::new(TestClock::default());
    assert_eq!(inspect(Arc::clone(&files), dir(), clock, false).unwrap()["damaged"], 0);
    let (_store, group) = reopen(&files);
    source.check(&group);
}
