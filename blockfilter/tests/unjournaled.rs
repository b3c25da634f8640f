//! A group whose journal failed: its disks stay served, nothing old is replayed over them, and
//! nothing is promised that they cannot hold.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockfilter::config::GroupPaths;
use blockfilter::control::Mode;
use blockfilter::engine::queue::Op as EngineOp;
use blockfilter::engine::real::RealFiles;
use blockfilter::engine::record::{Failure, Fault, Op, Rng, SimFiles};
use blockfilter::group::serve::wait_until;
use blockfilter::group::start;
use blockfilter::group::volume::{Refusal, Volume, VolumeEvent};
use blockfilter::names::Lsn;

#[path = "common/sim.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod sim;

use sim::*;

/// Decisions 9 and 10: the journal's death costs protection, not production.
#[test]
fn a_failed_journal_leaves_the_disks_served_and_is_never_replayed() {
    for op in [Op::Write, Op::SyncData] {
        let files = SimFiles::new();
        let site = site(Path::new("/"), 6);
        site.create(&files);
        files.settle();
        let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
        let mut rng = Rng::new(5);
        let mut model = Model::new();
        for stamp in 1..40 {
            let act = random_act(&mut rng, stamp);
            carry_out(&mut volume, &mut model, &site.clock, &act);
        }
        let path = "/journal".into();
        files.fail(Fault { op: Some(op), path, skip: 1, lasting: true, failure: Failure::Io });
        for stamp in 40..120 {
            let act = random_act(&mut rng, stamp);
            carry_out(&mut volume, &mut model, &site.clock, &act);
            assert!(content(&mut volume) == model, "operation {stamp}");
        }
        carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
        assert_eq!(volume.positions().mode, Mode::Unjournaled);
        drop(volume);
        site.lose_memory();
        let log = files.log();
        let after = log.crash_with(log.entries.len(), &mut |_| false);
        let mut volume = site.open(Arc::new(after), "inline").unwrap();
        assert!(content(&mut volume) == model, "what was flushed is on the disks");
        assert_eq!(volume.positions().mode, Mode::Unjournaled);
    }
}

/// A group whose journal died under some writes.
fn unjournaled(files: &SimFiles, site: &Site, model: &mut Model) -> Volume {
    site.create(files);
    files.settle();
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    let path = "/journal".into();
    files.fail(Fault { op: Some(Op::Write), path, skip: 0, lasting: true, failure: Failure::Io });
    carry_out(&mut volume, model, &site.clock, &stripe(0, 1));
    carry_out(&mut volume, model, &site.clock, &Act::Flush);
    assert_eq!(volume.positions().mode, Mode::Unjournaled);
    volume
}

/// Decision 9: a failed sync is an error to whoever waits for it, and is not believed
/// the second time.
#[test]
fn without_a_journal_a_disk_that_fails_to_sync_fails_every_flush() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    let mut model = Model::new();
    let mut volume = unjournaled(&files, &site, &mut model);
    let path = "/d0".into();
    let op = Some(Op::SyncData);
    files.fail(Fault { op, path, skip: 0, lasting: false, failure: Failure::Io });
    carry_out(&mut volume, &mut model, &site.clock, &stripe(4096, 2));
    assert!(!volume.flush(77));
    let events = turns(&mut volume, &site.clock, 40);
    let answers: Vec<bool> = events
        .iter()
        .filter_map(|e| match e {
            VolumeEvent::Durable(77) => Some(true),
            VolumeEvent::Lost(77) => Some(false),
            _ => None,
        })
        .collect();
    assert_eq!(answers, [false]);
}

/// What a dead process had written back without a journal is not on stable storage yet.
#[test]
fn without_a_journal_a_flush_after_a_kill_still_syncs() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    let mut model = Model::new();
    let mut volume = unjournaled(&files, &site, &mut model);
    carry_out(&mut volume, &mut model, &site.clock, &stripe(4096, 2));
    turns(&mut volume, &site.clock, 3);
    let positions = volume.positions();
    assert_eq!(positions.applied, positions.admitted);
    assert!(positions.durable < positions.admitted, "applied, not synced");
    drop(volume);
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
    drop(volume);
    site.lose_memory();
    let log = files.log();
    let after = log.crash_with(log.entries.len(), &mut |_| false);
    let mut volume = site.open(Arc::new(after), "inline").unwrap();
    assert!(content(&mut volume) == model, "what was flushed is on the disks");
}

/// A start without a journal asks for no place in it.
#[test]
fn without_a_journal_a_full_one_does_not_hinder_a_restart() {
    let files = SimFiles::new();
    let mut site = site(Path::new("/"), 4);
    site.config.arena_bytes = 8 << 20;
    site.create(&files);
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    let mut model = Model::new();
    let write = |volume: &mut Volume, model: &mut Model, i: u64| {
        let data = vec![i as u8; 64 * 512];
        let act = Act::Write { disk: 0, offset: i % 3 * 32768, data, fua: false };
        carry_out(volume, model, &site.clock, &act);
    };
    let mut i = 0;
    loop {
        let (used, capacity) = volume.filter().journal_use();
        if used == capacity {
            break;
        }
        // No turn: nothing is checkpointed.
        let (offset, data) = (i % 3 * 32768, vec![i as u8; 64 * 512]);
        volume.write(0, offset, &data, false).unwrap();
        model.0[0][offset as usize..][..data.len()].copy_from_slice(&data);
        i += 1;
    }
    let path = "/journal".into();
    files.fail(Fault { op: Some(Op::Write), path, skip: 0, lasting: true, failure: Failure::Io });
    write(&mut volume, &mut model, i);
    carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
    assert_eq!(volume.positions().mode, Mode::Unjournaled);
    // Killed right after a write that begins a chunk.
    let chunk = |lsn: Lsn| lsn.0 >> 20;
    for i in i + 1.. {
        let (offset, data) = (i % 3 * 32768, vec![i as u8; 64 * 512]);
        until(&mut volume, |v| v.write(0, offset, &data, false));
        model.0[0][offset as usize..][..data.len()].copy_from_slice(&data);
        let positions = volume.positions();
        if chunk(positions.applied) < chunk(positions.admitted) && chunk(positions.admitted) > 3 {
            break;
        }
    }
    drop(volume);
    let mut volume = site.open(Arc::new(files), "inline").unwrap();
    assert!(content(&mut volume) == model);
}

/// Until it is noted that the journal must not be replayed, nothing newer reaches the disks.
#[test]
fn a_dead_journal_that_cannot_be_noted_is_not_overtaken() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    files.settle();
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    let mut model = Model::new();
    carry_out(&mut volume, &mut model, &site.clock, &stripe(0, 1));
    carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
    let promised = model.hash();
    for (op, path) in [(Op::Write, "/journal"), (Op::Create, "/unjournaled")] {
        let (op, path) = (Some(op), path.into());
        files.fail(Fault { op, path, skip: 0, lasting: true, failure: Failure::Io });
    }
    carry_out(&mut volume, &mut model, &site.clock, &stripe(0, 2));
    assert!(!volume.flush(77));
    let events = turns(&mut volume, &site.clock, 40);
    assert!(events.iter().any(|e| matches!(e, VolumeEvent::Lost(77))), "{events:?}");
    assert!(content(&mut volume) == model);
    let log = files.log();
    let after = log.crash_with(log.entries.len(), &mut |_| true);
    // The note can be written after all.
    files.heal();
    turns(&mut volume, &site.clock, 40);
    carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
    drop(volume);
    site.lose_memory();
    let mut volume = site.open(Arc::new(after), "inline").unwrap();
    assert_eq!(content(&mut volume).hash(), promised);
}

/// A journal that cannot even be read any more costs protection, not what was acknowledged.
#[test]
fn without_a_readable_journal_a_kill_loses_nothing() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    let mut model = Model::new();
    let mut volume = unjournaled(&files, &site, &mut model);
    volume.write(0, 4096, &[3; 4096], false).unwrap();
    model.0[0][4096..8192].fill(3);
    drop(volume);
    files.fail_reads(Path::new("/journal"), 0..u64::MAX);
    let mut volume = site.open(Arc::new(files), "inline").unwrap();
    assert_eq!(volume.positions().mode, Mode::Unjournaled);
    assert!(content(&mut volume) == model);
}

/// I8: without a journal a power cut takes positions back; they are not given again under
/// the same incarnation. A kill keeps all, whether or not the journal can be read again.
#[test]
fn without_a_journal_positions_are_not_given_again_under_one_incarnation() {
    let mut files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    let mut model = Model::new();
    let mut volume = unjournaled(&files, &site, &mut model);
    let mut last = volume.positions();
    for readable in [true, false, true] {
        carry_out(&mut volume, &mut model, &site.clock, &stripe(4096, 2));
        carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
        drop(volume);
        site.lose_memory();
        let log = files.log();
        files = log.crash_with(log.entries.len(), &mut |_| false);
        if !readable {
            files.fail_reads(Path::new("/journal"), 0..u64::MAX);
        }
        volume = site.open(Arc::new(files.clone()), "inline").unwrap();
        let now = volume.positions();
        assert_eq!(now.mode, Mode::Unjournaled);
        assert!(now.incarnation > last.incarnation, "{now:?} after {last:?}");
        assert!(content(&mut volume) == model);
        carry_out(&mut volume, &mut model, &site.clock, &stripe(8192, 3));
        drop(volume);
        files.heal();
        volume = site.open(Arc::new(files.clone()), "inline").unwrap();
        assert!(content(&mut volume) == model);
        assert_eq!(volume.positions().incarnation, now.incarnation);
        last = now;
    }
}

/// A failed journal that is gone keeps nobody from the disks.
#[test]
fn a_group_without_a_journal_starts_when_the_journal_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let site = site(dir.path(), 6);
    site.create(&RealFiles);
    let paths = GroupPaths::new(dir.path(), &site.config.group);
    std::fs::create_dir_all(paths.dir()).unwrap();
    std::fs::remove_file(&site.config.journal).unwrap();
    let error = start::open(&site.config, &paths).unwrap_err().to_string();
    assert!(error.contains("journal"), "{error}");
    std::fs::write(paths.dir().join("unjournaled"), "it failed\n").unwrap();
    let serve = |incarnation: u64, byte: u8| {
        let mut volume = start::open(&site.config, &paths).unwrap();
        let positions = volume.positions();
        assert_eq!((positions.mode, positions.incarnation), (Mode::Unjournaled, incarnation));
        let (_, end) = until(&mut volume, |v| v.write(0, 0, &[byte; 4096], true));
        volume.wait_durable(end, 1);
        wait_until(&mut volume, |v| v.positions().durable >= Lsn(end)).unwrap();
        drop(volume);
        let disk = std::fs::read(&site.config.disks[0].path).unwrap();
        assert!(disk[..4096] == [byte; 4096]);
    };
    serve(2, 7);
    serve(2, 8);
    site.lose_memory();
    serve(3, 9);
}

/// Decision 9: nobody is told that a failed sync, or one that was cut off, succeeded after all.
/// What it may have dropped is in memory until it is synced, and a start writes it again.
#[test]
fn without_a_journal_what_a_failed_sync_dropped_is_written_again() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    let mut model = Model::new();
    let mut volume = unjournaled(&files, &site, &mut model);
    for byte in 1..4 {
        carry_out(&mut volume, &mut model, &site.clock, &stripe(4096 * u64::from(byte), byte));
        turns(&mut volume, &site.clock, 3);
        let (op, path) = (Some(Op::SyncData), "/d0".into());
        files.fail(Fault { op, path, skip: 0, lasting: false, failure: Failure::Io });
        volume.flush(1);
        let events = turns(&mut volume, &site.clock, 30);
        assert!(events.iter().any(|e| matches!(e, VolumeEvent::Lost(1))), "{events:?}");
        assert!(volume.write(0, 0, &[2; 512], false).is_err());
        drop(volume);
        volume = site.open(Arc::new(files.clone()), "inline").unwrap();
        assert!(content(&mut volume) == model);
    }
    carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
    drop(volume);
    site.lose_memory();
    let log = files.log();
    let after = log.crash_with(log.entries.len(), &mut |_| false);
    let mut volume = site.open(Arc::new(after), "inline").unwrap();
    assert!(content(&mut volume) == model, "what was flushed is on the disks");
}

/// What is kept in memory until it is synced does not keep writes waiting: when it fills up, it
/// is synced. A start in between has it all.
#[test]
fn without_a_journal_a_full_memory_is_synced_and_a_start_finds_all_of_it() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    let mut model = Model::new();
    let mut volume = unjournaled(&files, &site, &mut model);
    let arena = site.config.arena_bytes;
    for i in 0..4 * arena / 32768 {
        let (offset, data) = (i % 3 * 32768, vec![i as u8; 32768]);
        let act = Act::Write { disk: 1, offset, data, fua: false };
        carry_out(&mut volume, &mut model, &site.clock, &act);
        let positions = volume.positions();
        assert!(positions.admitted.0 - positions.durable.0 <= arena);
        if i % 29 == 0 {
            drop(volume);
            volume = site.open(Arc::new(files.clone()), "inline").unwrap();
            assert!(content(&mut volume) == model, "write {i}");
        }
    }
    assert_eq!(volume.positions().incarnation, 1, "never cold");
}

/// Decision 9: what is not synced is neither overwritten in memory nor more than it holds, however
/// long a sync takes, and there after a kill.
#[test]
fn without_a_journal_a_sync_that_hangs_holds_writes_back_and_loses_none() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    let mut model = Model::new();
    drop(unjournaled(&files, &site, &mut model));
    let hangs = Arc::new(AtomicBool::new(false));
    let syncs = |op: &EngineOp| matches!(op, EngineOp::SyncDisks);
    let mut volume = site
        .open_with(Arc::new(files.clone()), |t| Box::new(Hanging::new(t, syncs, &hangs)))
        .unwrap();
    carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
    hangs.store(true, Ordering::SeqCst);
    let write = |volume: &mut Volume, model: &mut Model, i: u64| {
        let (offset, data) = (i % 3 * 32768, vec![i as u8; 32768]);
        volume.write(1, offset, &data, false)?;
        model.0[1][offset as usize..][..data.len()].copy_from_slice(&data);
        volume.turn(&mut Vec::new());
        Ok(())
    };
    let stalled = (0..1000).find(|i| write(&mut volume, &mut model, *i).is_err()).unwrap();
    turns(&mut volume, &site.clock, 20);
    assert_eq!(write(&mut volume, &mut model, stalled), Err(Refusal::Stalled));
    let positions = volume.positions();
    assert!(positions.applied > positions.durable, "{positions:?}");
    drop(volume);
    let mut volume = site
        .open_with(Arc::new(files.clone()), |t| Box::new(Hanging::new(t, syncs, &hangs)))
        .unwrap();
    assert_eq!(volume.positions().incarnation, positions.incarnation, "warm");
    assert!(content(&mut volume) == model);
    turns(&mut volume, &site.clock, 20);
    assert_eq!(write(&mut volume, &mut model, stalled), Err(Refusal::Stalled));
    hangs.store(false, Ordering::SeqCst);
    assert!(volume.turn(&mut Vec::new()), "there is room again");
    write(&mut volume, &mut model, stalled).unwrap();
    assert!(content(&mut volume) == model);
}

/// A flush whose writes are on the disks does not wait for what others write behind them.
#[test]
fn without_a_journal_a_flush_does_not_wait_for_the_write_back_of_later_writes() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    let mut model = Model::new();
    drop(unjournaled(&files, &site, &mut model));
    let hangs = Arc::new(AtomicBool::new(false));
    let applies = |op: &EngineOp| matches!(op, EngineOp::Apply(_));
    let mut volume =
        site.open_with(Arc::new(files), |t| Box::new(Hanging::new(t, applies, &hangs))).unwrap();
    carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
    volume.write(0, 0, &[1; 4096], false).unwrap();
    turns(&mut volume, &site.clock, 5);
    let positions = volume.positions();
    assert_eq!(positions.applied, positions.admitted);
    assert!(positions.durable < positions.applied);
    hangs.store(true, Ordering::SeqCst);
    assert!(!volume.flush(77));
    volume.write(0, 4096, &[2; 4096], false).unwrap();
    let events = turns(&mut volume, &site.clock, 5);
    assert!(events.iter().any(|e| matches!(e, VolumeEvent::Durable(77))), "{events:?}");
}

/// Who waited for a place in the journal when it failed leaves no haste behind.
#[test]
fn a_journal_that_fails_while_it_is_full_leaves_writes_gathered_as_ever() {
    let files = SimFiles::new();
    let mut site = site(Path::new("/"), 4);
    site.config.arena_bytes = 8 << 20;
    site.create(&files);
    let hangs = Arc::new(AtomicBool::new(true));
    let syncs = |op: &EngineOp| matches!(op, EngineOp::SyncDisks);
    let mut volume = site
        .open_with(Arc::new(files.clone()), |t| Box::new(Hanging::new(t, syncs, &hangs)))
        .unwrap();
    while volume.write(0, 0, &[1; 65536], false).is_ok() {
        turns(&mut volume, &site.clock, 1);
    }
    let (op, path) = (Some(Op::Write), "/journal".into());
    files.fail(Fault { op, path, skip: 0, lasting: true, failure: Failure::Io });
    hangs.store(false, Ordering::SeqCst);
    turns(&mut volume, &site.clock, 5);
    assert_eq!(volume.positions().mode, Mode::Unjournaled);
    volume.write(0, 0, &[2; 4096], false).unwrap();
    for _ in 0..5 {
        volume.turn(&mut Vec::new());
    }
    let positions = volume.positions();
    assert!(positions.applied < positions.admitted, "{positions:?}");
}
