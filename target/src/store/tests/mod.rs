//! Claims about the store, checked against a source in memory.

use blockfilter::crc32c;
use std::sync::Arc;

use blockfilter::block::{Errno, Export, SECTOR};
use blockfilter::engine::real::{RealClock, RealFiles};
use blockfilter::engine::record::{Failure, Fault, Op, SimFiles};
use blockfilter::engine::{Clock, Files, Open};
use blockfilter::journal::format::{RecDesc, RecOp};
use blockfilter::names::Lsn;
use proptest::prelude::*;
use replicator::wire::{FRAME_EPOCH_END, FrameHdr, Kind};

use super::format::REGION;
use super::{AppendError, FrameBuf, Store, StoreError};
use crate::points::{PointKind, PointQuery, PointSpec};

mod crash;
mod drill;
mod merge;
mod model;

use model::{Source, create, dir, meta, name, reopen};

fn sim() -> (SimFiles, Arc<dyn Files>) {
    let sim = SimFiles::new();
    (sim.clone(), Arc::new(sim))
}

#[derive(Clone, Debug)]
enum Step {
    Epoch {
        frames: usize,
        changes: usize,
        tagged: bool,
    },
    Reopen,
    Maintain,
    UncleanSource,
    /// A seed with an epoch after every few copies; given up after so many copies.
    Seed {
        epochs: bool,
        give_up: Option<usize>,
        reopen: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (1usize..4, 0usize..6, any::<bool>())
            .prop_map(|(frames, changes, tagged)| Step::Epoch { frames, changes, tagged }),
        2 => Just(Step::Reopen),
        2 => Just(Step::Maintain),
        1 => Just(Step::UncleanSource),
        1 => (any::<bool>(), proptest::option::of(0usize..20), any::<bool>())
            .prop_map(|(epochs, give_up, reopen)| Step::Seed { epochs, give_up, reopen }),
    ]
}

fn run(seed: u64, steps: &[Step]) {
    let (_, files) = sim();
    let mut source = Source::new(seed);
    let (mut store, mut group) = create(&files);
    source.seed(&group);
    let mut tags = 0;
    for step in steps {
        group.set_roll_bytes(1 + source.rng.below(60_000));
        match step {
            Step::Epoch { frames, changes, tagged } => {
                tags += 1;
                let tag = format!("t{tags}");
                let frames = source.epoch(*frames, *changes, tagged.then_some(tag.as_str()));
                assert_eq!(group.append_epoch(&frames).unwrap(), Lsn(source.lsn));
                assert_eq!(group.has_tag(&name(&tag)), *tagged);
            }
            Step::Reopen => {
                drop((group, store));
                (store, group) = reopen(&files);
            }
            Step::Maintain => while store.maintain().unwrap() {},
            Step::UncleanSource => source.incarnation += 1,
            Step::Seed { epochs, give_up, reopen: again } => {
                let first = group.newest().is_none();
                let s = Lsn(source.lsn);
                group.begin_seed(s, source.incarnation, 1).unwrap();
                let (mut cursor, mut copies) = ((0, 0), 0);
                while let Some(frame) = source.copy(s, first, &mut cursor, 5 * REGION / 2) {
                    group.append_copy(&frame).unwrap();
                    copies += 1;
                    if *give_up == Some(copies) {
                        break;
                    }
                    if *epochs && copies % 3 == 0 {
                        group.append_epoch(&source.epoch(1, 3, None)).unwrap();
                    }
                    if *again && copies == 5 {
                        drop((group, store));
                        (store, group) = reopen(&files);
                        cursor = group.state().seed.unwrap().cursor;
                        copies += 1;
                    } else if copies % 4 == 0 {
                        assert_eq!(group.sync_copy().unwrap(), cursor);
                    }
                }
                if give_up.is_none_or(|n| copies < n) {
                    group.end_seed(Lsn(source.lsn)).unwrap();
                    if source.lsn == s.0 {
                        let now = Arc::new(source.now.clone());
                        source.history.push((s, source.incarnation, now));
                    }
                    assert_eq!(group.state().seed, None);
                    assert_eq!(group.newest().unwrap().lsn, Lsn(source.lsn));
                } else {
                    source.lsn += 5000;
                    group.begin_seed(Lsn(source.lsn), source.incarnation, 1).unwrap();
                    source.seed(&group);
                }
            }
        }
        let state = group.state();
        assert_eq!((state.last, state.failed), (Lsn(source.lsn), None));
    }
    source.check(&group);
    drop((group, store));
    let (_store, group) = reopen(&files);
    assert_eq!(group.state().last, Lsn(source.lsn));
    source.check(&group);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..Default::default() })]
    #[test]
    fn every_point_shows_what_the_disks_held(
        seed in any::<u64>(),
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        run(seed, &steps);
    }
}

#[test]
fn many_segments_merge_and_still_show_every_point() {
    let (sim, files) = sim();
    let mut source = Source::new(5);
    let (store, group) = create(&files);
    source.seed(&group);
    group.set_roll_bytes(1);
    for i in 0..300 {
        group.append_epoch(&source.epoch(1, 2, None)).unwrap();
        if i == 150 {
            while store.maintain().unwrap() {}
        }
    }
    while store.maintain().unwrap() {}
    let runs = sim.list(&dir().join("groups/g/idx")).unwrap().len();
    assert!(runs < 40, "{runs} runs");
    source.check(&group);
}

#[test]
fn a_store_is_open_once_and_keeps_its_groups() {
    let temporary = tempfile::tempdir().unwrap();
    let files: Arc<dyn Files> = Arc::new(RealFiles);
    let dir = temporary.path().join("t");
    let open = || Store::open(Arc::clone(&files), &dir, Arc::new(RealClock::new()));
    assert!(matches!(open(), Err(StoreError::Missing(_))));
    let store = Store::create(Arc::clone(&files), &dir, Arc::new(RealClock::new())).unwrap();
    assert!(matches!(open(), Err(StoreError::Busy(_))));
    let group = store.create_group(meta()).unwrap();
    assert!(matches!(store.create_group(meta()), Err(StoreError::GroupExists(_))));
    let mut source = Source::new(1);
    source.seed(&group);
    for _ in 0..20 {
        group.append_epoch(&source.epoch(2, 5, None)).unwrap();
    }
    let base = std::fs::metadata(dir.join("groups/g/disk-1.1.base")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&base), 0, "zeroes are not written");
    source.check(&group);
    drop((group, store));
    let store = open().unwrap();
    source.check(&store.group(&name("g")).unwrap());
    store.forget(&name("g")).unwrap();
    assert!(store.groups().is_empty());
    assert!(files.list(&dir.join("groups")).unwrap().is_empty());
    drop(store);
    std::fs::write(dir.join("STORE"), r#"{"format":"standfast-store","version":2}"#).unwrap();
    assert!(matches!(open(), Err(StoreError::Newer { found: 2, .. })));
}

/// Somebody who has a store open until the clock was read a few times.
#[derive(Debug)]
struct Dying(RealClock, std::sync::Mutex<(u32, Option<Store>)>);

impl Clock for Dying {
    fn mono_us(&self) -> u64 {
        let mut dying = self.1.lock().unwrap();
        dying.0 += 1;
        if dying.0 == 3 {
            dying.1 = None;
        }
        self.0.mono_us()
    }
    fn wall_us(&self) -> u64 {
        self.0.wall_us()
    }
}

#[test]
fn a_store_whose_process_is_just_dying_is_waited_for() {
    let temporary = tempfile::tempdir().unwrap();
    let files: Arc<dyn Files> = Arc::new(RealFiles);
    let dir = temporary.path().join("t");
    let store = Store::create(Arc::clone(&files), &dir, Arc::new(RealClock::new())).unwrap();
    let dying = Dying(RealClock::new(), std::sync::Mutex::new((0, Some(store))));
    Store::open(files, &dir, Arc::new(dying)).unwrap();
}

#[test]
fn frames_that_do_not_continue_are_refused_and_change_nothing() {
    let (_, files) = sim();
    let (_store, group) = create(&files);
    let mut source = Source::new(2);
    let epoch = source.epoch(2, 3, None);
    assert!(matches!(group.append_epoch(&epoch), Err(AppendError::NoSeed)));
    let mut source = Source::new(2);
    source.seed(&group);
    let early = source.epoch(2, 3, None);
    let late = source.epoch(1, 3, None);
    assert!(matches!(group.append_epoch(&late), Err(AppendError::Gap { .. })));
    assert!(matches!(group.append_epoch(&early[..1]), Err(AppendError::Invalid(_))));
    assert!(matches!(group.append_epoch(&early[1..]), Err(AppendError::Gap { .. })));
    assert!(matches!(group.append_epoch(&[]), Err(AppendError::Invalid(_))));
    group.append_epoch(&early).unwrap();
    assert!(matches!(group.append_epoch(&early), Err(AppendError::Gap { .. })));
    group.raise_generation(2).unwrap();
    assert!(matches!(group.append_epoch(&late), Err(AppendError::Generation { .. })));
    assert!(matches!(group.begin_seed(Lsn(1), 9, 1), Err(AppendError::Generation { .. })));
    assert!(matches!(group.append_copy(&late[0]), Err(AppendError::Generation { .. })));
    assert_eq!(group.point_count(), 2);
    let (_store, group) = {
        drop((group, _store));
        reopen(&files)
    };
    assert!(matches!(group.append_epoch(&late), Err(AppendError::Generation { .. })));
}

#[test]
fn history_and_tags_survive_a_restart() {
    let (_, files) = sim();
    let (store, group) = create(&files);
    let mut source = Source::new(3);
    source.seed(&group);
    group.append_epoch(&source.epoch(1, 3, Some("before"))).unwrap();
    let end = Lsn(source.lsn);
    source.incarnation = 4;
    group.append_epoch(&source.epoch(1, 3, None)).unwrap();
    source.incarnation = 3;
    let old = source.epoch(1, 1, None);
    assert!(matches!(group.append_epoch(&old), Err(AppendError::Incarnation { .. })));
    let (before, points) = (group.state(), group.points(PointQuery::default()));
    assert_eq!(before.history, [(1, end)]);
    drop((store, group));
    let (_store, group) = reopen(&files);
    let state = group.state();
    assert_eq!((state.history, state.incarnation, state.last), (before.history, 4, before.last));
    assert_eq!(group.points(PointQuery::default()), points);
    let tagged = group.resolve(&"tag:before".parse().unwrap()).unwrap();
    assert_eq!((tagged.kind, tagged.lsn), (PointKind::Tagged, end));
    assert_eq!(group.points(PointQuery { tagged: true, ..Default::default() }), [tagged]);
}

#[test]
fn a_first_seed_that_starts_again_keeps_nothing_of_the_old_one() {
    let (_, files) = sim();
    let (_store, group) = create(&files);
    let mut source = Source::new(4);
    source.epoch(3, 20, None);
    let s = Lsn(source.lsn);
    group.begin_seed(s, 1, 1).unwrap();
    let mut cursor = (0, 0);
    let frame = source.copy(s, true, &mut cursor, REGION).unwrap();
    group.append_copy(&frame).unwrap();
    group.append_epoch(&source.epoch(1, 5, None)).unwrap();
    let state = group.state();
    assert!(state.seed.is_some_and(|seed| seed.first && seed.end.is_none()));
    assert!(group.newest().is_none() && state.last_consistent.is_none());
    assert!(matches!(group.resolve(&PointSpec::Latest), Err(crate::points::PointError::None)));
    // Everything became zeroes meanwhile, so nothing is copied.
    source.now.iter_mut().for_each(|disk| disk.fill(0));
    source.seed(&group);
    source.check(&group);
    assert_eq!(group.point_count(), 1);
}

#[test]
fn a_reseed_costs_no_history_and_hides_its_own_points_until_it_is_complete() {
    let (_, files) = sim();
    let (mut store, mut group) = create(&files);
    let mut source = Source::new(6);
    source.seed(&group);
    for _ in 0..5 {
        group.append_epoch(&source.epoch(1, 5, None)).unwrap();
    }
    let newest = group.newest().unwrap();
    source.epoch(1, 30, None);
    source.history.pop();
    source.lsn += 100_000;
    let s = Lsn(source.lsn);
    group.begin_seed(s, 1, 1).unwrap();
    let mut cursor = (0, 0);
    while let Some(frame) = source.copy(s, false, &mut cursor, 3 * REGION) {
        group.append_copy(&frame).unwrap();
        group.append_epoch(&source.epoch(1, 5, None)).unwrap();
        assert_eq!(group.newest().unwrap(), newest, "I15");
    }
    source.check(&group);
    let e = Lsn(source.lsn + 1);
    group.end_seed(e).unwrap();
    assert_eq!(group.newest().unwrap(), newest, "I14");
    assert!(group.state().seed.is_some());
    let hidden = group.points(PointQuery::default()).iter().filter(|p| !p.usable).count();
    for round in 0..2 {
        group.append_epoch(&source.epoch(1, 5, None)).unwrap();
        assert_eq!(group.newest().unwrap().lsn, Lsn(source.lsn));
        assert_eq!(group.state().seed, None);
        source.check(&group);
        drop((store, group));
        (store, group) = reopen(&files);
        let points = group.points(PointQuery::default());
        assert_eq!(points.iter().filter(|p| !p.usable).count(), hidden, "round {round}");
    }
}

#[test]
fn a_torn_tail_is_cut_at_the_last_whole_epoch_at_every_byte() {
    let (sim, files) = sim();
    let (store, group) = create(&files);
    let mut source = Source::new(7);
    source.seed(&group);
    let mut ends = vec![(4096, source.lsn)];
    for _ in 0..3 {
        let frames = source.epoch(2, 1, None);
        ends.push((
            ends.last().unwrap().0 + frames.iter().map(|f| f.bytes.len()).sum::<usize>(),
            source.lsn,
        ));
        group.append_epoch(&frames).unwrap();
    }
    drop((store, group));
    let seg_dir = dir().join("groups/g/seg");
    let path = seg_dir.join(&sim.list(&seg_dir).unwrap()[0]);
    let whole = blockfilter::engine::read_file(&sim, &path, 1 << 30).unwrap();
    assert_eq!(whole.len(), ends[3].0.next_multiple_of(4096), "whole pages are written");
    let cuts =
        (4096..ends[1].0 + 600).step_by(1).chain((ends[1].0 + 600..=whole.len()).step_by(97));
    for cut in cuts {
        let file = sim.open(&path, Open::ReadWrite).unwrap();
        file.set_len(0).unwrap();
        file.write_all_at(0, &whole[..cut]).unwrap();
        let (store, group) = reopen(&files);
        let last = ends.iter().rev().find(|(at, _)| *at <= cut).unwrap();
        assert_eq!(group.state().last, Lsn(last.1), "cut at {cut}");
        assert_eq!(group.state().failed, None);
        assert_eq!(file.len().unwrap(), last.0 as u64);
        drop((store, group));
    }
}

#[test]
fn damage_in_acknowledged_epochs_is_said_and_not_cut_away() {
    let (sim, files) = sim();
    let (store, group) = create(&files);
    let mut source = Source::new(8);
    source.seed(&group);
    for _ in 0..6 {
        group.append_epoch(&source.epoch(1, 2, None)).unwrap();
    }
    drop((store, group));
    let seg_dir = dir().join("groups/g/seg");
    let path = seg_dir.join(&sim.list(&seg_dir).unwrap()[0]);
    sim.flip(&path, 4096 + 300, 1);
    let (_store, group) = reopen(&files);
    assert!(group.state().failed.unwrap().contains("damaged"));
    let next = source.epoch(1, 1, None);
    assert!(matches!(group.append_epoch(&next), Err(AppendError::Failed(_))));
    source.check(&group);
}

/// A disk that answers EIO while the target starts has lost nothing yet.
#[test]
fn a_read_error_at_the_start_cuts_nothing_and_passes() {
    let (sim, files) = sim();
    let (store, group) = create(&files);
    let mut source = Source::new(15);
    source.seed(&group);
    for _ in 0..3 {
        group.append_epoch(&source.epoch(2, 3, None)).unwrap();
    }
    drop((store, group));
    // Cuts off what fills the last page.
    drop(reopen(&files));
    let seg_dir = dir().join("groups/g/seg");
    let path = seg_dir.join(&sim.list(&seg_dir).unwrap()[0]);
    let len = files.open(&path, Open::Read).unwrap().len().unwrap();
    for at in (4096..len).step_by(1999).chain([len - 1]) {
        sim.fail_reads(&path, at..at + 1);
        let (store, group) = reopen(&files);
        assert!(group.state().failed.unwrap().contains("cannot be read"), "byte {at}");
        source.check(&group);
        drop((store, group));
        sim.heal();
        assert_eq!(files.open(&path, Open::Read).unwrap().len().unwrap(), len, "byte {at}");
        let (_store, group) = reopen(&files);
        assert_eq!((group.state().failed, group.state().last), (None, Lsn(source.lsn)));
        source.check(&group);
    }
}

#[test]
fn a_damaged_frame_is_an_error_and_nothing_wrong_is_served() {
    let (sim, files) = sim();
    let (_store, group) = create(&files);
    let mut source = Source::new(9);
    source.seed(&group);
    group.set_roll_bytes(1);
    let frames = source.epoch(1, 6, None);
    group.append_epoch(&frames).unwrap();
    let point = group.newest().unwrap();
    let seg_dir = dir().join("groups/g/seg");
    let path = seg_dir.join(&sim.list(&seg_dir).unwrap()[0]);
    let mut refused = 0;
    for at in (0..frames[0].bytes.len()).step_by(61) {
        sim.flip(&path, 4096 + at as u64, 0x10);
        let content = source.expected(&point);
        for disk in 0..2 {
            let view = group.view(disk, &point).unwrap();
            for first in (0..4200).step_by(100) {
                let mut bytes = vec![0; 100 * SECTOR as usize];
                match view.read(first as u64 * SECTOR, &mut bytes) {
                    Err(error) => {
                        assert_eq!(error, Errno::Io);
                        refused += 1;
                    }
                    Ok(()) => {
                        for (i, sector) in bytes.chunks(SECTOR as usize).enumerate() {
                            let stamp = content[usize::from(disk)][first + i];
                            assert_eq!(sector, model::bytes_of(stamp));
                        }
                    }
                }
            }
        }
        sim.flip(&path, 4096 + at as u64, 0x10);
    }
    assert!(refused > 0);
    source.check(&group);
}

#[test]
fn a_full_disk_refuses_cleanly_and_goes_on_in_another_file() {
    let (sim, files) = sim();
    let (store, group) = create(&files);
    let mut source = Source::new(10);
    source.seed(&group);
    group.append_epoch(&source.epoch(1, 4, None)).unwrap();
    for round in 0..8 {
        let good = group.newest().unwrap();
        let frames = source.epoch(2, 4, None);
        let fault = |op| Fault {
            op: Some(op),
            path: ".seg".to_owned(),
            skip: 0,
            lasting: true,
            failure: Failure::NoSpace,
        };
        sim.fail(fault(if round % 2 == 0 { Op::Write } else { Op::SyncData }));
        for _ in 0..2 {
            assert!(matches!(group.append_epoch(&frames), Err(AppendError::Full)));
        }
        assert_eq!(group.newest().unwrap(), good);
        assert_eq!(group.state().failed, None);
        source.check_point(&group, &good);
        sim.heal();
        group.append_epoch(&frames).unwrap();
        source.check(&group);
    }
    drop((store, group));
    let (_store, group) = reopen(&files);
    source.check(&group);
    assert_eq!(sim.list(&dir().join("groups/g/seg")).unwrap().len(), 1);
}

/// A segment that a full disk broke is rescued by the seed that follows, which may
/// itself find the disk full at any step.
#[test]
fn a_seed_after_a_full_disk_keeps_old_points_readable_and_loses_nothing() {
    for nth in 0.. {
        let (sim, files) = sim();
        let (store, group) = create(&files);
        let mut source = Source::new(13);
        source.seed(&group);
        group.append_epoch(&source.epoch(1, 4, None)).unwrap();
        let frames = source.epoch(2, 4, None);
        sim.fail(Fault {
            op: Some(Op::Write),
            path: ".seg".to_owned(),
            skip: 0,
            lasting: true,
            failure: Failure::NoSpace,
        });
        assert!(matches!(group.append_epoch(&frames), Err(AppendError::Full)));
        sim.heal();
        sim.fail_nth(nth, Failure::NoSpace, true);
        let begun = group.begin_seed(Lsn(source.lsn), 1, 1);
        sim.heal();
        source.check(&group);
        let last = group.state().last;
        if matches!(begun, Err(AppendError::Full)) {
            group.append_epoch(&frames).unwrap();
            source.check(&group);
            assert_eq!(group.state().last, Lsn(source.lsn), "step {nth}");
        }
        let count = group.points(PointQuery::default()).len();
        drop((store, group));
        let (_store, group) = reopen(&files);
        source.check(&group);
        assert_eq!(group.points(PointQuery::default()).len(), count, "step {nth}");
        assert!(group.state().last >= last, "step {nth}");
        if begun.is_ok() {
            break;
        }
    }
}

/// A disk may hold a store's segments itself; their frames prove nothing of ours.
#[test]
fn a_torn_epoch_that_carries_frames_of_another_group_is_cut() {
    let (sim, files) = sim();
    let (store, group) = create(&files);
    let mut source = Source::new(14);
    source.seed(&group);
    group.append_epoch(&source.epoch(1, 2, None)).unwrap();
    let whole = group.state().last;
    let inner = FrameHdr {
        kind: Kind::Epoch as u8,
        flags: FRAME_EPOCH_END,
        group_id: (model::group_id() + 1).into(),
        lsn_to: 1.into(),
        ..Default::default()
    };
    let mut payload = FrameBuf::seal(inner, &[], &[]).bytes.repeat(4);
    payload.resize(payload.len().next_multiple_of(SECTOR as usize), 0);
    let desc = RecDesc {
        op: RecOp::Write as u8,
        len: (payload.len() as u32).into(),
        lsn: whole.0.into(),
        crc: crc32c::crc32c(&payload).into(),
        ..Default::default()
    };
    let hdr = FrameHdr {
        group_id: model::group_id().into(),
        generation: 1.into(),
        incarnation: 1.into(),
        lsn_from: whole.0.into(),
        lsn_to: (whole.0 + 1).into(),
        raw_len: (payload.len() as u32).into(),
        ..inner
    };
    group.append_epoch(&[FrameBuf::seal(hdr, &[desc], &payload)]).unwrap();
    drop((store, group));
    let seg_dir = dir().join("groups/g/seg");
    let path = seg_dir.join(&sim.list(&seg_dir).unwrap()[0]);
    let len = files.open(&path, Open::Read).unwrap().len().unwrap();
    sim.flip(&path, len - payload.len() as u64 - 168 + 40, 1);
    let (_store, group) = reopen(&files);
    assert_eq!(group.state().failed, None);
    assert_eq!(group.state().last, whole);
}

#[test]
fn any_other_failure_is_final_and_old_points_stay_readable() {
    for nth in 0..60 {
        let (sim, files) = sim();
        let (store, group) = create(&files);
        let mut source = Source::new(11);
        source.seed(&group);
        group.set_roll_bytes(20_000);
        sim.fail_nth(nth, Failure::Io, false);
        let mut acknowledged = source.history.len();
        let mut failed = false;
        for _ in 0..12 {
            let frames = source.epoch(1, 3, None);
            match group.append_epoch(&frames) {
                Ok(_) => {
                    assert!(!failed, "nth {nth}: accepted after a failure");
                    acknowledged = source.history.len();
                }
                Err(AppendError::Failed(_)) => failed = true,
                Err(error) => panic!("nth {nth}: {error}"),
            }
        }
        assert_eq!(group.state().failed.is_some(), failed);
        let count = group.points(PointQuery::default()).len();
        assert_eq!(count, acknowledged);
        source.check(&group);
        drop((store, group));
        sim.heal();
        let (_store, group) = reopen(&files);
        assert!(group.point_count() >= acknowledged, "nth {nth}");
        assert_eq!(group.state().failed, None, "nth {nth}");
        source.check(&group);
    }
}

#[test]
fn a_lost_index_is_made_again_from_the_segments() {
    let (sim, files) = sim();
    let mut source = Source::new(12);
    let (store, group) = create(&files);
    source.seed(&group);
    group.set_roll_bytes(1);
    for _ in 0..40 {
        group.append_epoch(&source.epoch(1, 3, None)).unwrap();
    }
    while store.maintain().unwrap() {}
    source.seed(&group);
    drop((group, store));
    let idx = dir().join("groups/g/idx");
    for (i, file) in sim.list(&idx).unwrap().iter().enumerate() {
        match i % 2 {
            0 => sim.remove(&idx.join(file)).unwrap(),
            _ => sim.flip(&idx.join(file), 20, 1),
        }
    }
    for _ in 0..2 {
        let (store, group) = reopen(&files);
        assert_eq!(group.state().failed, None);
        source.check(&group);
        while store.maintain().unwrap() {}
    }
    let (_store, group) = reopen(&files);
    source.check(&group);
}
