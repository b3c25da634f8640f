//! Claims about drills, export names, and opening large histories.

use blockfilter::crc32c;
use std::sync::Arc;

use blockfilter::block::{Errno, Export, SECTOR, ZeroFlags};
use blockfilter::engine::Clock;
use blockfilter::engine::Files;
use blockfilter::engine::real::{RealClock, RealFiles};
use blockfilter::engine::record::{Failure, Fault, Op, Rng, SimFiles};
use blockfilter::journal::format::{RecDesc, RecOp};
use blockfilter::names::Lsn;
use replicator::wire::{FRAME_EPOCH_END, FrameHdr, Kind};

use super::super::log::MERGE_RUNS;
use super::super::{FrameBuf, GroupMeta, Store};
use super::model::{
    Source, TestClock, bytes_of, check_export, create, dir, group_id, meta, name, reopen,
};
use crate::export::{list_exports, open_export};

#[test]
fn a_drill_sees_its_own_writes_and_nobody_else_does() {
    let sim = SimFiles::new();
    let files: Arc<dyn Files> = Arc::new(sim.clone());
    let mut source = Source::new(31);
    let (mut store, mut group) = create(&files);
    source.seed(&group);
    for _ in 0..5 {
        group.append_epoch(&source.epoch(1, 6, None)).unwrap();
    }
    let point = group.newest().unwrap();
    let drill = store.start_drill(&name("g"), &point).unwrap();
    let other = store.start_drill(&name("g"), &point).unwrap();
    assert_ne!(drill.id, other.id);
    let mut content = (*source.expected(&point)).clone();
    let untouched = content.clone();
    let mut rng = Rng::new(31);
    let mut stamp = 1 << 40;
    for round in 0..6 {
        let disks = [0, 1].map(|i| {
            let disk = store.drill_export(&drill.id, &name(&format!("d{i}"))).unwrap();
            assert!(!disk.info().read_only);
            disk
        });
        for _ in 0..40 {
            let d = rng.below(2) as usize;
            let first = rng.below(4200).min(content[d].len() as u64 - 3000) as usize;
            let most = if rng.below(5) == 0 { 2500 } else { 20 };
            let len = 1 + rng.below(most) as usize;
            let (at, bytes) = (first as u64 * SECTOR, len as u64 * SECTOR);
            let kind = rng.below(4);
            let mut data = Vec::new();
            for sector in &mut content[d][first..first + len] {
                stamp += 1;
                *sector = if kind < 2 { stamp } else { 0 };
                data.extend_from_slice(&bytes_of(*sector));
            }
            match kind {
                0 | 1 => disks[d].write(at, &data, kind == 1).unwrap(),
                2 => disks[d].trim(at, bytes, false).unwrap(),
                _ => disks[d].zero(at, bytes, ZeroFlags::default()).unwrap(),
            }
        }
        // The production stream goes on beside it.
        group.append_epoch(&source.epoch(1, 5, None)).unwrap();
        disks[0].flush().unwrap();
        for d in 0..2 {
            check_export(disks[d].as_ref(), &content[d], &mut rng, "drill");
            let beside = store.drill_export(&other.id, &name(&format!("d{d}"))).unwrap();
            check_export(beside.as_ref(), &untouched[d], &mut rng, "other drill");
        }
        source.check(&group);
        if round % 2 == 0 {
            drop((disks, group, store));
            (store, group) = reopen(&files);
            assert_eq!(store.drills().len(), 2);
        }
    }
    let disk = store.drill_export(&drill.id, &name("d0")).unwrap();
    store.finish_drill(&drill.id).unwrap();
    assert_eq!(disk.write(0, &[0; 512], false), Err(Errno::Io));
    assert!(store.drill_export(&drill.id, &name("d0")).is_err());
    assert!(store.finish_drill(&drill.id).is_err());
    assert_eq!(store.drills(), [other]);
}

#[test]
fn points_of_a_group_named_drill_are_not_taken_for_a_drill() {
    let files: Arc<dyn Files> = Arc::new(SimFiles::new());
    let mut source = Source::new(35);
    source.epoch(1, 5, None);
    let clock = Arc::new(TestClock::default());
    let store = Store::create(files, dir(), clock).unwrap();
    let group = store.create_group(GroupMeta { group: name("drill"), ..meta() }).unwrap();
    source.seed(&group);
    for point in ["latest", "2030-01-01T00:00:00.5Z"] {
        let export = open_export(&store, &format!("drill.d0@{point}")).unwrap();
        assert!(export.info().read_only, "{point}");
    }
    let drill = store.start_drill(&name("drill"), &group.newest().unwrap()).unwrap();
    let export = open_export(&store, &format!("drill.{}.d0", drill.id)).unwrap();
    assert!(!export.info().read_only);
}

#[test]
fn unaligned_writes_and_trims_in_a_drill_keep_their_neighbours() {
    let files: Arc<dyn Files> = Arc::new(SimFiles::new());
    let mut source = Source::new(32);
    source.epoch(4, 30, None);
    let (store, group) = create(&files);
    source.seed(&group);
    let point = group.newest().unwrap();
    let drill = store.start_drill(&name("g"), &point).unwrap();
    let disk = store.drill_export(&drill.id, &name("d0")).unwrap();
    let size = disk.info().size;
    let mut want = vec![0; size as usize];
    disk.read(0, &mut want).unwrap();
    let mut rng = Rng::new(5);
    for i in 0..400u64 {
        let at = match rng.below(3) {
            0 => size - 1 - rng.below(3000),
            _ => rng.below(6000),
        };
        let len = (1 + rng.below(2000)).min(size - at);
        let range = at as usize..(at + len) as usize;
        match rng.below(4) {
            0 => {
                want[range].fill(0);
                disk.trim(at, len, false).unwrap();
            }
            1 => {
                want[range].fill(0);
                disk.zero(at, len, ZeroFlags::default()).unwrap();
            }
            _ => {
                want[range].fill(i as u8);
                disk.write(at, &vec![i as u8; len as usize], false).unwrap();
            }
        }
    }
    let mut have = vec![0; size as usize];
    disk.read(0, &mut have).unwrap();
    assert!(have == want);
}

#[test]
fn a_full_disk_in_a_drill_is_enospc_and_flushed_writes_stay() {
    let sim = SimFiles::new();
    let files: Arc<dyn Files> = Arc::new(sim.clone());
    let mut source = Source::new(33);
    let (store, group) = create(&files);
    source.seed(&group);
    let drill = store.start_drill(&name("g"), &group.newest().unwrap()).unwrap();
    let disk = store.drill_export(&drill.id, &name("d0")).unwrap();
    disk.write(0, &bytes_of(1), false).unwrap();
    let full = |op| Fault {
        op: Some(op),
        path: "drills".to_owned(),
        skip: 0,
        lasting: true,
        failure: Failure::NoSpace,
    };
    sim.fail(full(Op::Write));
    assert_eq!(disk.write(512, &bytes_of(2), false), Err(Errno::NoSpc));
    assert_eq!(disk.flush(), Err(Errno::NoSpc));
    sim.heal();
    disk.flush().unwrap();
    disk.write(512, &bytes_of(3), false).unwrap();
    sim.fail(full(Op::SyncData));
    assert_eq!(disk.flush(), Err(Errno::NoSpc));
    sim.heal();
    disk.flush().unwrap();
    disk.write(1024, &bytes_of(4), true).unwrap();
    drop((disk, group, store));
    let (store, _group) = reopen(&files);
    let disk = store.drill_export(&drill.id, &name("d0")).unwrap();
    let mut bytes = [0; 1536];
    disk.read(0, &mut bytes).unwrap();
    assert_eq!(bytes[..], [bytes_of(1), bytes_of(3), bytes_of(4)].concat());
}

/// Rolls a drill's log until a merge is due, lets the roll fail at each of its
/// steps for want of space, and reads what is written when there is space again.
#[test]
fn a_roll_without_space_hides_no_later_write_of_a_drill() {
    for nth in 0.. {
        let sim = SimFiles::new();
        let files: Arc<dyn Files> = Arc::new(sim.clone());
        let clock = Arc::new(TestClock::default());
        let store = Store::create(files, dir(), clock.clone()).unwrap();
        let group = store.create_group(meta()).unwrap();
        Source::new(37).seed(&group);
        let drill = store.start_drill(&name("g"), &group.newest().unwrap()).unwrap();
        let disk = store.drill_export(&drill.id, &name("d0")).unwrap();
        for stamp in 1..=MERGE_RUNS as u64 {
            disk.write(0, &bytes_of(stamp), false).unwrap();
            clock.0.fetch_add(2 * 3_600_000_000, std::sync::atomic::Ordering::Relaxed);
        }
        sim.fail_nth(nth, Failure::NoSpace, true);
        let refused = disk.write(0, &bytes_of(100), false).is_err();
        sim.heal();
        let mut bytes = [0; 512];
        match disk.write(0, &bytes_of(200), false) {
            Ok(()) => {
                disk.read(0, &mut bytes).unwrap();
                assert!(bytes == bytes_of(200), "step {nth}: an older write is read");
            }
            // Not known which manifest is in force.
            Err(error) => assert_eq!(error, Errno::Io, "step {nth}"),
        }
        if !refused {
            break;
        }
    }
}

#[test]
fn export_names_resolve_and_moving_ones_do_not_promise_multi_conn() {
    let files: Arc<dyn Files> = Arc::new(SimFiles::new());
    let mut source = Source::new(34);
    let (store, group) = create(&files);
    assert!(open_export(&store, "g.d0@latest").is_err());
    source.seed(&group);
    group.append_epoch(&source.epoch(1, 3, Some("t1"))).unwrap();
    let id = group.newest().unwrap().id();
    for (text, fixed) in
        [(id.as_str(), true), ("tag:t1", true), ("latest", false), ("2100-01-01T00:00:00Z", false)]
    {
        let info = open_export(&store, &format!("g.d1@{text}")).unwrap().info();
        assert!(info.read_only);
        assert_eq!(info.multi_conn, fixed, "{text}");
    }
    let drill = store.start_drill(&name("g"), &group.newest().unwrap()).unwrap();
    let disk = open_export(&store, &format!("drill.{}.d1", drill.id)).unwrap();
    assert!(disk.info().multi_conn && !disk.info().read_only);
    for bad in ["", "g", "g.d0", "g.dx@latest", "x.d0@latest", "g.d0@", "g.d0@tag:no", "drill.x.d0"]
    {
        assert!(open_export(&store, bad).is_err(), "{bad}");
    }
    assert_eq!(list_exports(&store).len(), 4);
}

#[test]
fn readers_beside_a_writer_see_whole_points() {
    let files: Arc<dyn Files> = Arc::new(SimFiles::new());
    let mut source = Source::new(35);
    let (store, group) = create(&files);
    source.seed(&group);
    group.set_roll_bytes(5000);
    let done = std::sync::atomic::AtomicBool::new(false);
    let order = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut opened = 0u32;
            let mut kept = Vec::new();
            while !done.load(order) {
                let point = group.newest().unwrap();
                let view = group.view(0, &point).unwrap();
                let mut first = vec![0; 64 << 10];
                view.read(0, &mut first).unwrap();
                kept.push((view, first));
                opened += 1;
            }
            for (view, first) in &kept {
                let mut again = vec![0; 64 << 10];
                view.read(0, &mut again).unwrap();
                assert!(again == *first, "a view changed");
            }
            opened
        });
        for _ in 0..300 {
            group.append_epoch(&source.epoch(1, 3, None)).unwrap();
            store.maintain().unwrap();
        }
        done.store(true, order);
        assert!(reader.join().unwrap() > 0);
    });
    source.check(&group);
}

/// Prints how long it takes to open a point over a million entries; asserts nothing
/// of time.
#[test]
fn a_million_entries_open_and_read() {
    let temporary = tempfile::tempdir().unwrap();
    let files: Arc<dyn Files> = Arc::new(RealFiles);
    let dir = temporary.path().join("t");
    let clock = RealClock::new();
    let store = Store::create(Arc::clone(&files), &dir, Arc::new(TestClock::default())).unwrap();
    let group = store.create_group(meta()).unwrap();
    group.begin_seed(Lsn(0), 1, 1).unwrap();
    group.end_seed(Lsn(0)).unwrap();
    let mut rng = Rng::new(1);
    let started = clock.mono_us();
    for epoch in 0..256u64 {
        let from = epoch * 5000;
        let descs: Vec<RecDesc> = (0..4096)
            .map(|i| RecDesc {
                op: RecOp::Write as u8,
                disk: 1,
                len: 512.into(),
                offset: (rng.below(40 << 11) * SECTOR).into(),
                lsn: (from + i).into(),
                crc: crc32c::crc32c(&[epoch as u8; 512]).into(),
                ..Default::default()
            })
            .collect();
        let hdr = FrameHdr {
            kind: Kind::Epoch as u8,
            flags: FRAME_EPOCH_END,
            group_id: group_id().into(),
            generation: 1.into(),
            incarnation: 1.into(),
            lsn_from: from.into(),
            lsn_to: (from + 5000).into(),
            raw_len: 512.into(),
            ..Default::default()
        };
        group.append_epoch(&[FrameBuf::seal(hdr, &descs, &[epoch as u8; 512])]).unwrap();
    }
    let appended = clock.mono_us();
    drop((group, store));
    let reopening = clock.mono_us();
    let store = Store::open(Arc::clone(&files), &dir, Arc::new(TestClock::default())).unwrap();
    let group = store.group(&name("g")).unwrap();
    let opened = clock.mono_us();
    let point = group.newest().unwrap();
    let view = group.view(1, &point).unwrap();
    let viewed = clock.mono_us();
    let mut block = [0; 4096];
    view.read(5 << 20, &mut block).unwrap();
    let first = clock.mono_us();
    view.read((5 << 20) + 8192, &mut block).unwrap();
    let second = clock.mono_us();
    println!(
        "1 M entries: append {} ms, store open {} ms, view open {} us, first read {} us, next {} us",
        (appended - started) / 1000,
        (opened - reopening) / 1000,
        viewed - opened,
        first - viewed,
        second - first
    );
}

#[test]
fn inspecting_finds_every_damaged_file_and_changes_nothing() {
    let sim = SimFiles::new();
    let files: Arc<dyn Files> = Arc::new(sim.clone());
    let mut source = Source::new(36);
    let (store, group) = create(&files);
    source.seed(&group);
    group.set_roll_bytes(1);
    for _ in 0..6 {
        group.append_epoch(&source.epoch(1, 4, None)).unwrap();
    }
    store.start_drill(&name("g"), &group.newest().unwrap()).unwrap();
    let before = sim.mutations();
    let look = |deep| {
        let clock = Arc::new(TestClock::default());
        crate::store::inspect(Arc::clone(&files), dir(), clock, deep).unwrap()
    };
    assert_eq!(look(true)["damaged"], 0);
    let group = dir().join("groups/g");
    let mut damaged = 0;
    for (sub, at) in [("seg", 4096 + 200), ("idx", 4096 + 50)] {
        for file in sim.list(&group.join(sub)).unwrap().iter().take(3) {
            sim.flip(&group.join(sub).join(file), at, 4);
            damaged += 1;
        }
    }
    assert_eq!(look(true)["damaged"], damaged);
    assert_eq!(look(false)["damaged"], 0);
    assert_eq!(sim.mutations(), before);
}
