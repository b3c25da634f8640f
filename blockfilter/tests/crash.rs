//! The filter over simulated and real files: crashes at every point, restarts,
//! engines, failures, all against a model that is simply the operations in order.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockfilter::control::Mode;
use blockfilter::engine::queue::Engine;
use blockfilter::engine::real::RealFiles;
use blockfilter::engine::record::crash::{Change, Entry, Unsynced};
use blockfilter::engine::record::{Failure, Fault, Op, Rng, SimFiles, Sweep, for_each_crash};
use blockfilter::group::serve::wait_until;
use blockfilter::group::volume::{Refusal, Volume};
use blockfilter::journal;
use blockfilter::journal::format::RecOp;
use blockfilter::journal::reader::{JournalReader, ReadError};
use blockfilter::names::Lsn;

#[path = "common/sim.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod sim;

use sim::*;

/// Cut at every mutation, with every kind of survivor: what was flushed is there, and the
/// whole is the state after some number of operations (no holes in the order).
#[test]
fn after_a_power_cut_the_disks_are_a_prefix_with_everything_flushed() {
    for seed in [1, 2, 3] {
        let mut rng = Rng::new(seed);
        let acts: Vec<Act> = (1..90).map(|stamp| random_act(&mut rng, stamp)).collect();
        cut_everywhere(seed, &acts);
    }
}

/// The same with a client that flushes after every four writes: half of each commit is
/// written ahead.
#[test]
fn after_a_power_cut_between_the_halves_of_a_commit_the_disks_are_a_prefix() {
    let write = |n: u8| {
        let data = vec![n; 16 << 10];
        Act::Write { disk: n % 2, offset: u64::from(n) % 7 * (16 << 10), data, fua: false }
    };
    let round = |r: u8| (1..=4).map(move |n| write(r * 4 + n)).chain([Act::Flush]);
    let acts: Vec<Act> = (0..9).flat_map(round).collect();
    let grew = cut_everywhere(4, &acts);
    assert_eq!(grew[40..], [false, true, false, true, false], "at half, and before the flush");
}

/// Which acts wrote anything to a file.
fn cut_everywhere(seed: u64, acts: &[Act]) -> Vec<bool> {
    println!("seed {seed}");
    let files = SimFiles::new();
    let site = site(Path::new("/"), 5);
    site.create(&files);
    files.settle();
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    let mut model = Model::new();
    let mut hashes = vec![model.hash()];
    // (log length, operations that must survive a cut from there on)
    let mut promised = vec![(0, 0)];
    let mut grew = Vec::new();
    for (n, act) in acts.iter().enumerate() {
        let before = files.log_len();
        let durable = carry_out(&mut volume, &mut model, &site.clock, act);
        assert!(content(&mut volume) == model, "seed {seed}, operation {n}: {act:?}");
        hashes.push(model.hash());
        grew.push(files.log_len() > before);
        if durable {
            promised.push((files.log_len(), hashes.len() - 1));
        }
    }
    drop(volume);
    let log = files.log();
    let sweep = Sweep { seed, random: 1, ..Sweep::default() };
    let states = for_each_crash(&log, sweep, |files, point| {
        site.lose_memory();
        let least = promised.iter().rev().find(|(at, _)| *at <= point.at).unwrap().1;
        let mut volume = site
            .open(Arc::new(files), "inline")
            .unwrap_or_else(|e| panic!("seed {seed} {point:?}: {e}"));
        let found = content(&mut volume).hash();
        let prefix = hashes[least..].contains(&found);
        assert!(prefix, "seed {seed} {point:?}: not a prefix with the first {least}");
    });
    println!("{states} crash states");
    assert!(states > 100);
    grew
}

/// A process that dies loses nothing, flushed or not.
#[test]
fn after_a_kill_every_acknowledged_write_is_there() {
    for (seed, engine) in [(1, "inline"), (2, "blocking"), (3, "io_uring"), (4, "io_uring")] {
        println!("seed {seed} {engine}");
        let mut rng = Rng::new(seed);
        let dir = tempfile::tempdir().unwrap();
        let site = site(dir.path(), 6);
        site.create(&RealFiles);
        let mut model = Model::new();
        let mut stamp = 0;
        for life in 0..30 {
            let mut volume = site.open(Arc::new(RealFiles), engine).unwrap();
            assert!(content(&mut volume) == model, "seed {seed}, life {life}");
            assert_eq!(volume.positions().incarnation, 1, "no unclean start happened");
            if life == 3 {
                volume.begin_seed().unwrap();
            }
            for _ in 0..rng.below(160) {
                stamp += 1;
                let act = random_act(&mut rng, stamp);
                carry_out(&mut volume, &mut model, &site.clock, &act);
                // A target that keeps up: slots are given up long before a super block says so.
                let durable = volume.positions().durable;
                volume.target_holds(1, durable.0, true);
            }
            assert!(content(&mut volume) == model);
        }
    }
}

/// I25: after a drain the files are plain images, equal to what was read.
#[test]
fn after_a_drain_the_files_are_the_disks_and_the_journal_is_clean() {
    let dir = tempfile::tempdir().unwrap();
    let site = site(dir.path(), 6);
    site.create(&RealFiles);
    let mut rng = Rng::new(11);
    let mut model = Model::new();
    for round in 0..3 {
        let mut volume = site.open(Arc::new(RealFiles), "io_uring").unwrap();
        assert_eq!(volume.positions().incarnation, 1, "the last stop was clean");
        for stamp in 0..80 {
            let act = random_act(&mut rng, round * 100 + stamp);
            carry_out(&mut volume, &mut model, &site.clock, &act);
        }
        volume.filter().request_drain();
        wait_until(&mut volume, |v| v.filter().drained()).unwrap();
        volume.remove_arena();
        drop(volume);
        for (disk, expect) in site.config.disks.iter().zip(&model.0) {
            assert!(std::fs::read(&disk.path).unwrap() == *expect, "round {round}");
        }
    }
}

/// What the replicator reads, applied in order, is the disk.
#[test]
fn the_reader_sees_every_record_once_and_in_order() {
    for engine in ["blocking", "io_uring"] {
        let dir = tempfile::tempdir().unwrap();
        let site = site(dir.path(), 24);
        site.create(&RealFiles);
        let mut volume = site.open(Arc::new(RealFiles), engine).unwrap();
        let s = volume.begin_seed().unwrap();
        let mut reader = JournalReader::open(&site.config).unwrap();
        let mut rng = Rng::new(21);
        let (mut model, mut copy) = (Model::new(), Model::new());
        let (mut from, mut last, mut buf, mut seen) = (Lsn(s), 0, Vec::new(), Vec::new());
        for stamp in 1..1200 {
            let act = random_act(&mut rng, stamp);
            carry_out(&mut volume, &mut model, &site.clock, &act);
            if stamp % 37 != 0 {
                continue;
            }
            carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
            let durable = volume.positions().durable;
            while from < durable {
                let (batches, next) = reader.read(from, durable, 300_000, &mut buf).unwrap();
                for batch in batches {
                    for desc in batch.descs(&buf) {
                        assert!(desc.lsn.get() > last, "I1: LSNs increase");
                        last = desc.lsn.get();
                        seen.push(last);
                        let disk = &mut copy.0[usize::from(desc.disk)];
                        let range = desc.offset.get() as usize..desc.end() as usize;
                        match desc.rec_op().unwrap() {
                            RecOp::Write => {
                                let at = batch.bytes.start + desc.payload_off.get() as usize;
                                disk[range.clone()].copy_from_slice(&buf[at..at + range.len()]);
                            }
                            RecOp::Zero | RecOp::Trim => disk[range].fill(0),
                            other => panic!("{other:?}"),
                        }
                    }
                }
                assert!(next > from);
                from = next;
            }
            assert!(copy == model, "{engine}, operation {stamp}");
        }
        // Once more, from what the arena no longer has to what it still has.
        assert!(from.0 - s > site.config.arena_bytes, "{engine}: the arena has all");
        let (mut at, mut again) = (Lsn(s), Vec::new());
        while at < from {
            let (batches, next) = reader.read(at, from, 300_000, &mut buf).unwrap();
            let descs = batches.iter().flat_map(|batch| batch.descs(&buf));
            again.extend(descs.map(|desc| desc.lsn.get()));
            assert!(next > at);
            at = next;
        }
        assert!(again == seen, "{engine}: the same, in the same order");
    }
}

/// A journal full of what the target lacks freezes; writes go on.
#[test]
fn a_full_journal_freezes_durably_and_blocks_no_write() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    volume.begin_seed().unwrap();
    let mut model = Model::new();
    for i in 0..600 {
        site.clock.advance(30_000);
        let data = vec![9; 64 * 512];
        let act = Act::Write { disk: 0, offset: i % 3 * 32768, data, fua: false };
        carry_out(&mut volume, &mut model, &site.clock, &act);
    }
    assert_eq!(volume.positions().mode, Mode::Frozen);
    drop(volume);
    let mut volume = site.open(Arc::new(files), "inline").unwrap();
    assert_eq!(volume.positions().mode, Mode::Frozen, "durably");
    assert!(content(&mut volume) == model);
    let s = volume.begin_seed().unwrap();
    assert_eq!(volume.positions().mode, Mode::Shipping);
    assert_eq!(volume.positions().ship_floor, Lsn(s));
}

/// A group whose journal holds four batches, each a page of header and one of a record.
fn with_four_batches() -> (SimFiles, Site, Volume) {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    let mut model = Model::new();
    for i in 0..4u64 {
        let data = vec![i as u8 + 1; 4096];
        let act = Act::Write { disk: 0, offset: i * 4096, data, fua: true };
        carry_out(&mut volume, &mut model, &site.clock, &act);
    }
    (files, site, volume)
}

/// Protocol-aware recovery: damage to what was durable is refused, never cut off.
#[test]
fn damage_inside_the_durable_journal_is_refused() {
    let (files, site, volume) = with_four_batches();
    drop(volume);
    site.lose_memory();
    let first_payload = journal::format::SLOTS_AT + 4096 + 4096 + 100;
    files.flip(&PathBuf::from("/journal"), first_payload, 1);
    let error = site.open(Arc::new(files), "inline").unwrap_err();
    assert!(error.contains("damaged"), "{error}");
}

/// A sector that the device has lost is damage at its batch; the batches before it are read.
#[test]
fn a_lost_sector_of_the_journal_is_damage_where_it_is_and_not_before() {
    let (files, site, volume) = with_four_batches();
    let durable = volume.positions().durable;
    // The arena is not among these files.
    let mut reader = JournalReader::open_in(Arc::new(files.clone()), &site.config).unwrap();
    let mut read = |from| reader.read(from, durable, 1 << 20, &mut Vec::new());
    let first = Lsn(journal::format::PAGE);
    let (all, end) = read(first).unwrap();
    assert_eq!((all.len(), end), (4, durable));
    let third = all[2].hdr.lsn.get();
    for page in [0, journal::format::PAGE] {
        let at = journal::format::SLOTS_AT + third + page;
        files.fail_reads(Path::new("/journal"), at..at + 1);
        let (before, next) = read(first).unwrap();
        assert_eq!((before.len(), next), (2, Lsn(third)));
        let error = read(next).unwrap_err();
        assert!(matches!(error, ReadError::Damaged(at, _) if at == next), "{error}");
        files.heal();
    }
    assert_eq!(read(first).unwrap().0.len(), 4);
}

/// A client that flushes after every two writes finds its commit done from the fifth time
/// on; one that writes on is not committed early again.
#[test]
fn a_foreseen_flush_waits_for_nothing() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let mut volume = site.open(Arc::new(files), "inline").unwrap();
    let mut model = Model::new();
    let mut awaited = Vec::new();
    for _ in 0..6 {
        for offset in [0, 4096] {
            carry_out(&mut volume, &mut model, &site.clock, &stripe(offset, 1));
        }
        awaited.push(!volume.flush(1));
        settle_all(&mut volume);
    }
    assert_eq!(awaited, [true, true, true, true, false, false]);
    for _ in 0..3 {
        carry_out(&mut volume, &mut model, &site.clock, &stripe(0, 2));
    }
    let positions = volume.positions();
    assert!(positions.durable < positions.admitted, "nobody asked for the third one");
}

/// The caller of a turn makes one client's commits, however many, while each is quick; after
/// a slow one the engine does for a while.
#[test]
fn commits_of_one_client_need_no_engine_while_each_is_quick() {
    use blockfilter::engine::queue::Op;
    let journal = |op: &Op| {
        matches!(op, Op::JournalWrite { .. } | Op::JournalSync | Op::JournalCommit { .. })
    };
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let hangs = Arc::new(AtomicBool::new(false));
    let hanging = |target| -> Box<dyn Engine> { Box::new(Hanging::new(target, journal, &hangs)) };
    let mut volume = site.open_with(Arc::new(files), hanging).unwrap();
    volume.set_alone(true);
    let commit = |volume: &mut Volume, look: u64| {
        site.clock.step.store(look, Ordering::SeqCst);
        let (_, end) = volume.write(0, 0, &[7; 4096], false).unwrap();
        volume.flush(1);
        volume.turn(&mut Vec::new());
        volume.positions().durable.0 >= end
    };
    hangs.store(true, Ordering::SeqCst);
    for n in 0..200 {
        assert!(commit(&mut volume, 100), "commit {n}");
    }
    assert!(commit(&mut volume, 6_000), "the first slow one");
    assert!(!commit(&mut volume, 100), "who knows how long");
    hangs.store(false, Ordering::SeqCst);
    settle_all(&mut volume);
    site.clock.advance(300_000);
    turns(&mut volume, &site.clock, 3);
    hangs.store(true, Ordering::SeqCst);
    assert!(commit(&mut volume, 100), "the pause is over");
}

/// The last write of one record, as `(log entry, first sector)` of its header and payload.
fn last_record(files: &SimFiles) -> (usize, u64) {
    let log = files.log();
    let found = log.entries.iter().enumerate().rev().find_map(|(i, entry)| match entry {
        Entry::Change(_, Change::Write { offset, data }) if data.len() == 8192 => {
            Some((i, offset / 512))
        }
        _ => None,
    });
    found.unwrap()
}

/// A header that an earlier incarnation left behind its end does not come back to life
/// when the payload beside it is torn off a later write of the same bytes.
#[test]
fn a_leftover_of_an_earlier_incarnation_is_never_completed() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    files.settle();
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    let mut model = Model::new();
    carry_out(&mut volume, &mut model, &site.clock, &stripe(8192, 1));
    carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
    let mut lost = model.clone();
    carry_out(&mut volume, &mut lost, &site.clock, &stripe(0, 7));
    turns(&mut volume, &site.clock, 1);
    drop(volume);
    site.lose_memory();
    let (entry, sector) = last_record(&files);
    let header = |u: Unsynced| u.entry == entry && u.sector.is_some_and(|s| s < sector + 8);
    let files = files.log().crash_with(entry + 1, &mut |u| header(u));

    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    assert!(content(&mut volume) == model);
    carry_out(&mut volume, &mut lost, &site.clock, &stripe(4096, 7));
    turns(&mut volume, &site.clock, 1);
    drop(volume);
    site.lose_memory();
    let (entry, again) = last_record(&files);
    assert_eq!(again, sector, "the same place");
    let payload = |u: Unsynced| u.entry == entry && u.sector.is_some_and(|s| s >= sector + 8);
    let files = files.log().crash_with(entry + 1, &mut |u| payload(u));
    let mut volume = site.open(Arc::new(files), "inline").unwrap();
    assert!(content(&mut volume) == model, "only what was flushed");
}

/// Ruling 6: a full file system is not the end of a disk.
#[test]
fn a_full_disk_goes_on_when_there_is_space_again() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    let mut model = Model::new();
    let (op, path) = (Some(Op::Write), "/d0".into());
    files.fail(Fault { op, path, skip: 0, lasting: true, failure: Failure::NoSpace });
    carry_out(&mut volume, &mut model, &site.clock, &stripe(0, 1));
    turns(&mut volume, &site.clock, 5);
    let refused = volume.write(0, 0, &[2; 512], false);
    assert_eq!(refused, Err(Refusal::Fail(blockfilter::block::Errno::NoSpc)));
    let said = |volume: &Volume| volume.status(0).disks[0].error.is_some();
    assert!(said(&volume), "status tells why");
    files.heal();
    turns(&mut volume, &site.clock, 40);
    assert!(!said(&volume), "and no longer than it is true");
    let positions = volume.positions();
    assert_eq!((positions.applied, positions.mode), (positions.admitted, Mode::New));
    carry_out(&mut volume, &mut model, &site.clock, &stripe(0, 2));
    assert!(content(&mut volume) == model);
}

/// A drain does not wait for somebody to free space: its clients are gone. One that comes later does
/// all of it.
#[test]
fn a_drain_ends_at_a_full_disk_and_can_be_repeated() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    let mut model = Model::new();
    let (op, path) = (Some(Op::Write), "/d0".into());
    files.fail(Fault { op, path, skip: 0, lasting: true, failure: Failure::NoSpace });
    carry_out(&mut volume, &mut model, &site.clock, &stripe(0, 1));
    turns(&mut volume, &site.clock, 5);
    assert!(volume.filter().is_full());
    for healed in [false, true] {
        if healed {
            files.heal();
        }
        volume.filter().request_drain();
        assert!(!volume.filter().drain_fails(), "it is tried once more");
        wait_until(&mut volume, |v| v.filter().drained() || v.filter().drain_fails()).unwrap();
        assert_eq!((volume.filter().drained(), volume.filter().drain_fails()), (healed, !healed));
        drop(volume);
        volume = site.open(Arc::new(files.clone()), "inline").unwrap();
        assert!(content(&mut volume) == model);
    }
}

/// A failed sync is final, whatever the error: `status` says so.
#[test]
fn a_sync_that_fails_for_want_of_space_is_told_as_a_failed_disk() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    let (op, path) = (Some(Op::SyncData), "/d0".into());
    files.fail(Fault { op, path, skip: 0, lasting: false, failure: Failure::NoSpace });
    carry_out(&mut volume, &mut Model::new(), &site.clock, &stripe(0, 1));
    turns(&mut volume, &site.clock, 30);
    assert_eq!(volume.positions().mode, Mode::BackingFailed);
    assert!(volume.status(0).disks[0].error.is_some());
}

/// A kill right after the first use of a slot that the target's word freed.
#[test]
fn a_slot_freed_by_the_target_is_free_after_a_kill_too() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 9);
    site.create(&files);
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    volume.begin_seed().unwrap();
    let mut model = Model::new();
    let chunk = |lsn: Lsn| lsn.0 >> 20;
    let data = vec![5; 64 * 512];
    for last in [6, 8] {
        while chunk(volume.positions().admitted) < last {
            let act = Act::Write { disk: 0, offset: 0, data: data.clone(), fua: false };
            carry_out(&mut volume, &mut model, &site.clock, &act);
        }
        carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
    }
    turns(&mut volume, &site.clock, 1);
    let (used, capacity) = volume.filter().journal_use();
    assert_eq!((used, volume.positions().mode), (capacity, Mode::Shipping));
    let durable = volume.positions().durable;
    volume.target_holds(1, durable.0, true);
    while chunk(volume.positions().admitted) < 9 {
        volume.write(0, 0, &data, false).unwrap();
    }
    drop(volume);
    let mut volume = site.open(Arc::new(files), "inline").unwrap();
    assert!(content(&mut volume) == model);
}

/// Decision 9: a restart does not sync once more and believe it. What the failed sync may
/// have lost is written again first.
#[test]
fn a_failed_sync_of_a_disk_is_not_believed_after_a_restart() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    files.settle();
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    let mut model = Model::new();
    let (op, path) = (Some(Op::SyncData), "/d0".into());
    files.fail(Fault { op, path, skip: 0, lasting: false, failure: Failure::Io });
    carry_out(&mut volume, &mut model, &site.clock, &stripe(0, 1));
    carry_out(&mut volume, &mut model, &site.clock, &Act::Flush);
    turns(&mut volume, &site.clock, 30);
    assert_eq!(volume.positions().mode, Mode::BackingFailed);
    drop(volume);
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    assert_eq!(volume.positions().incarnation, 1, "warm");
    turns(&mut volume, &site.clock, 30);
    let positions = volume.positions();
    assert_eq!((positions.checkpoint, positions.mode), (positions.admitted, Mode::New));
    drop(volume);
    site.lose_memory();
    let log = files.log();
    let after = log.crash_with(log.entries.len(), &mut |_| false);
    let mut volume = site.open(Arc::new(after), "inline").unwrap();
    assert!(content(&mut volume) == model, "what was flushed is there");
}

/// A reader from before a loss says so instead of handing out what has another history.
#[test]
fn a_reader_of_an_earlier_incarnation_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let site = site(dir.path(), 6);
    site.create(&RealFiles);
    let mut model = Model::new();
    let flushed = |volume: &mut Volume, model: &mut Model, byte: u8| {
        carry_out(volume, model, &site.clock, &stripe(0, byte));
        carry_out(volume, model, &site.clock, &Act::Flush);
        volume.positions().durable
    };
    let mut volume = site.open(Arc::new(RealFiles), "inline").unwrap();
    let first = flushed(&mut volume, &mut model, 1);
    let mut reader = JournalReader::open(&site.config).unwrap();
    let (mut out, start) = (Vec::new(), Lsn(4096));
    assert!(!reader.read(start, first, 1 << 20, &mut out).unwrap().0.is_empty());
    drop(volume);
    site.lose_memory();
    let mut volume = site.open(Arc::new(RealFiles), "inline").unwrap();
    let second = flushed(&mut volume, &mut model, 2);
    for arena in [true, false] {
        let error = reader.read(first, second, 1 << 20, &mut out).unwrap_err();
        let told = matches!(error, ReadError::Incarnation { expected: 1, found: 2 });
        assert!(told, "arena {arena}: {error}");
        site.lose_memory();
    }
    let mut reader = JournalReader::open(&site.config).unwrap();
    assert!(!reader.read(first, second, 1 << 20, &mut out).unwrap().0.is_empty());
}

/// I9, I10: what is written back leaves the memory over several turns; between any two of them
/// every read finds the newest, whatever of write and zero came first.
#[test]
fn reads_are_right_while_a_window_leaves_the_memory() {
    for seed in 1..=4 {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let files = SimFiles::new();
        let site = site(Path::new("/"), 6);
        site.create(&files);
        let mut volume = site.open(Arc::new(files), "inline").unwrap();
        let mut model = Model::new();
        for stamp in 0..6000 {
            let offset = rng.below(248) * 512;
            let act = match rng.below(100) {
                0 => Act::Zero { disk: 0, offset, len: 4096, trim: true },
                _ => Act::Write { disk: 0, offset, data: vec![stamp as u8; 512], fua: false },
            };
            carry_out(&mut volume, &mut model, &site.clock, &act);
            assert!(content(&mut volume) == model, "seed {seed}, operation {stamp}");
        }
    }
}
