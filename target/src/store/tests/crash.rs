//! Every power cut over the store: what was acknowledged is there, the rest is
//! absent or complete, and a seed goes on where it is durable.

use std::sync::Arc;

use blockfilter::block::SECTOR;
use blockfilter::engine::Files;
use blockfilter::engine::record::{SimFiles, Sweep, for_each_crash};
use blockfilter::names::{Lsn, Name};

use super::super::format::REGION;
use super::super::{FrameBuf, Store, inspect};
use super::model::{Source, TestClock, bytes_of, create, dir, name, reopen};

/// Positions and what was acknowledged there.
struct Acks<T>(Vec<(usize, T)>);

impl<T: Copy> Acks<T> {
    fn note(&mut self, sim: &SimFiles, what: T) {
        self.0.push((sim.log_len(), what));
    }

    /// The newest acknowledged at or before a position.
    fn at(&self, position: usize) -> Option<T> {
        self.0.iter().rev().find(|(at, _)| *at <= position).map(|(_, what)| *what)
    }
}

fn open(sim: SimFiles) -> Store {
    let files: Arc<dyn Files> = Arc::new(sim);
    // I18: what the manifest names is there, before anything is made again.
    let clock = Arc::new(TestClock::default());
    let told = inspect(Arc::clone(&files), dir(), clock, false).unwrap();
    assert_eq!(told["damaged"], 0, "{told}");
    let store = Store::open(files, dir(), Arc::new(TestClock::default())).unwrap();
    assert!(store.unreadable().is_empty(), "{:?}", store.unreadable());
    store
}

#[test]
fn every_acknowledged_epoch_survives_every_power_cut() {
    let sim = SimFiles::new();
    let files: Arc<dyn Files> = Arc::new(sim.clone());
    let mut source = Source::new(21);
    let (store, group) = create(&files);
    source.seed(&group);
    sim.settle();
    let mut acks = Acks(vec![(0, source.lsn)]);
    let mut tried = vec![source.lsn];
    for i in 0..24 {
        group.set_roll_bytes(if i % 7 == 0 { 1 } else { 9000 });
        let frames = source.epoch(1 + i % 3, 2, None);
        tried.push(source.lsn);
        group.append_epoch(&frames).unwrap();
        acks.note(&sim, source.lsn);
        if i == 18 {
            group.set_roll_bytes(1);
            for _ in 0..12 {
                group.append_epoch(&source.epoch(1, 0, None)).unwrap();
                tried.push(source.lsn);
                acks.note(&sim, source.lsn);
            }
            while store.maintain().unwrap() {}
        }
    }
    let mut worst = 0;
    let states = for_each_crash(&sim.log(), Sweep { random: 2, ..Sweep::default() }, |sim, cut| {
        let group = open(sim).group(&name("g")).unwrap();
        let state = group.state();
        let acknowledged = acks.at(cut.at).unwrap();
        assert_eq!(state.failed, None, "{cut}");
        assert!(state.last.0 >= acknowledged, "{cut}: {} < {acknowledged}", state.last);
        assert!(tried.contains(&state.last.0), "{cut}: half an epoch");
        let points = group.points(Default::default());
        assert_eq!(points[0].lsn, state.last, "{cut}");
        assert_eq!(points.len(), 1 + tried.iter().position(|l| *l == state.last.0).unwrap());
        worst = worst.max(points.len());
        let any = source.rng.below(points.len() as u64) as usize;
        source.check_point(&group, &points[if cut.at % 2 == 0 { 0 } else { any }]);
    });
    println!("{states} states, up to {worst} points");
}

/// A seed whose frames are kept, so that it can go on after a power cut.
struct Seeding {
    source: Source,
    s: Lsn,
    epochs: Vec<Vec<FrameBuf>>,
}

impl Seeding {
    /// Goes on as a session would: stream from `last`, copies from the cursor.
    fn resume(&mut self, store: &Store, what: &str) {
        let group = store.group(&name("g")).unwrap();
        let state = group.state();
        assert_eq!(state.failed, None, "{what}");
        let end = Lsn(self.source.lsn);
        match state.seed {
            None if state.last == end && group.newest().is_some_and(|p| p.lsn == end) => {}
            None => self.source.seed(&group),
            Some(seed) => {
                assert_eq!(seed.s, self.s, "{what}");
                for epoch in self.epochs.iter().filter(|e| e[0].hdr.lsn_from.get() >= state.last.0)
                {
                    group.append_epoch(epoch).unwrap();
                }
                if seed.end.is_none() {
                    let mut cursor = seed.cursor;
                    let source = &mut self.source;
                    while let Some(f) = source.copy(self.s, seed.first, &mut cursor, 4 * REGION) {
                        group.append_copy(&f).unwrap();
                    }
                    group.end_seed(end).unwrap();
                }
            }
        }
        let newest = group.newest().unwrap();
        assert_eq!(newest.lsn, end, "{what}");
        self.source.check_point(&group, &newest);
        let oldest = group.oldest().unwrap();
        self.source.check_point(&group, &oldest);
    }
}

fn seed_crashes(first: bool) {
    let sim = SimFiles::new();
    let files: Arc<dyn Files> = Arc::new(sim.clone());
    let mut source = Source::new(22);
    let (_store, group) = create(&files);
    if !first {
        source.seed(&group);
        for _ in 0..3 {
            group.append_epoch(&source.epoch(1, 3, None)).unwrap();
        }
        source.epoch(1, 20, None);
        source.history.pop();
    }
    sim.settle();
    source.epoch(1, 30, None);
    source.history.pop();
    let s = Lsn(source.lsn);
    group.begin_seed(s, 1, 1).unwrap();
    let begun = sim.log_len();
    group.set_roll_bytes(30_000);
    let mut cursors = Acks(vec![(0, (0, 0))]);
    let mut epochs = Vec::new();
    let (mut cursor, mut copies) = ((0, 0), 0);
    while let Some(frame) = source.copy(s, first, &mut cursor, 2 * REGION) {
        group.append_copy(&frame).unwrap();
        copies += 1;
        if copies % 5 == 0 {
            let epoch = source.epoch(1, 2, None);
            group.append_epoch(&epoch).unwrap();
            epochs.push(epoch);
        }
        if copies % 4 == 0 {
            group.sync_copy().unwrap();
            cursors.note(&sim, cursor);
        }
    }
    group.end_seed(Lsn(source.lsn)).unwrap();
    let ended = sim.log_len();
    let mut seeding = Seeding { source, s, epochs };
    let sweep = Sweep { random: 1, exhaustive: 2, ..Sweep::default() };
    let states = for_each_crash(&sim.log(), sweep, |sim, cut| {
        let what = cut.to_string();
        let store = open(sim);
        let state = store.group(&name("g")).unwrap().state();
        if cut.at >= ended {
            assert_eq!(state.seed, None, "{what}");
        } else if cut.at >= begun
            && let Some(seed) = state.seed
            && seed.end.is_none()
        {
            assert!(seed.cursor >= cursors.at(cut.at).unwrap(), "{what}");
        }
        seeding.resume(&store, &what);
    });
    println!("{states} states");
}

#[test]
fn a_first_seed_goes_on_after_every_power_cut() {
    seed_crashes(true);
}

#[test]
fn a_reseed_goes_on_after_every_power_cut_and_old_points_stay() {
    seed_crashes(false);
}

#[test]
fn groups_and_drills_are_there_or_not_after_every_power_cut() {
    let sim = SimFiles::new();
    let files: Arc<dyn Files> = Arc::new(sim.clone());
    let mut source = Source::new(23);
    let (store, group) = create(&files);
    let created = sim.log_len();
    source.seed(&group);
    let drill = store.start_drill(&name("g"), &group.newest().unwrap()).unwrap();
    let started = sim.log_len();
    let disk = store.drill_export(&drill.id, &name("d0")).unwrap();
    disk.write(0, &bytes_of(77), false).unwrap();
    let mut flushed = usize::MAX;
    for i in 0..6u64 {
        disk.write(i * SECTOR, &bytes_of(100 + i), i == 3).unwrap();
        flushed = if i == 3 { sim.log_len() } else { flushed };
    }
    disk.flush().unwrap();
    let all = sim.log_len();
    store.finish_drill(&drill.id).unwrap();
    let finished = sim.log_len();
    store.forget(&name("g")).unwrap();
    let forgotten = sim.log_len();
    let sweep = Sweep { from: created, ..Sweep::default() };
    for_each_crash(&sim.log(), sweep, |sim, cut| {
        let store = open(sim);
        let group = store.group(&name("g"));
        assert!(group.is_some() || cut.at > finished, "{cut}");
        assert!(group.is_none() || cut.at < forgotten, "{cut}");
        let drills = store.drills();
        if (started..all).contains(&cut.at) {
            assert_eq!(drills, std::slice::from_ref(&drill), "{cut}");
        }
        if cut.at >= finished || group.is_none() {
            assert!(drills.is_empty(), "{cut}");
        }
        for drill in drills {
            let held = drill_prefix(&store, &drill.id);
            assert!(cut.at < flushed || cut.at >= all || held >= 4, "{cut}: {held}");
            assert!(cut.at < all || held == 6, "{cut}: {held}");
        }
    });
}

/// How many of the six writes are there; they must be a prefix.
fn drill_prefix(store: &Store, id: &Name) -> u64 {
    let disk = store.drill_export(id, &name("d0")).unwrap();
    let mut held = 0;
    let mut whole = true;
    for i in 0..6u64 {
        let mut sector = [0; SECTOR as usize];
        disk.read(i * SECTOR, &mut sector).unwrap();
        let here = sector == bytes_of(100 + i);
        assert!(here || sector == bytes_of(0) || (i == 0 && sector == bytes_of(77)));
        assert!(whole || !here, "a hole in the order");
        whole &= here;
        held += u64::from(here);
    }
    held
}

#[test]
fn a_start_that_is_cut_itself_loses_nothing() {
    let sim = SimFiles::new();
    let files: Arc<dyn Files> = Arc::new(sim.clone());
    let mut source = Source::new(24);
    let (store, group) = create(&files);
    source.seed(&group);
    for _ in 0..4 {
        group.append_epoch(&source.epoch(2, 3, None)).unwrap();
    }
    drop((group, store));
    let last = source.lsn;
    // The next start finds a torn epoch behind, and is cut again while it repairs.
    let seg = dir().join("groups/g/seg");
    let path = seg.join(&sim.list(&seg).unwrap()[0]);
    let file = sim.open(&path, blockfilter::engine::Open::ReadWrite).unwrap();
    let torn = source.epoch(1, 3, None);
    file.write_all_at(file.len().unwrap(), &torn[0].bytes[..torn[0].bytes.len() - 9]).unwrap();
    sim.settle();
    drop(reopen(&files));
    for_each_crash(&sim.log(), Sweep::default(), |sim, cut| {
        let group = open(sim).group(&name("g")).unwrap();
        assert_eq!((group.state().last.0, group.state().failed), (last, None), "{cut}");
        source.check(&group);
    });
}
