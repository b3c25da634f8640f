//! The journal and the filter over a worst-case disk: the power is cut behind
//! every write, sync and super block, with any subset of the unsynced sectors
//! surviving, during recovery too, and the process is killed in between.
//!
//! Claims, for each state that the next start may find:
//! * what was durable (and so flushed, or shipped) is there;
//! * the disks are exactly the records below the recovered end, in LSN order;
//! * the incarnation grows, and its history says where the last one ended;
//! * the target's next batches are still in the journal while it is shipping (I5).

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;

use blockfilter::control::Mode;
use blockfilter::engine::record::{CrashPoint, Rng, SimFiles, Sweep, for_each_crash};
use blockfilter::engine::{Files, Open};
use blockfilter::journal::batch::{parse_batch, payloads_ok};
use blockfilter::journal::chunks::Slots;
use blockfilter::journal::format::{BATCH_PAD, MODE_FROZEN, PAGE};
use blockfilter::journal::geometry_of;
use blockfilter::journal::open::{read_chunks, read_super};
use e2e::simgroup::{SimGroup, Written, backing, config, lose_memory, new_files};

#[test]
fn a_power_cut_anywhere_leaves_a_prefix_with_everything_promised() {
    let seed = e2e::seed("power cut");
    let config = config(u128::from(seed) << 64 | 1, 4);
    let files = new_files(&config);
    let mut life = SimGroup::start(&config, &files, Written::default(), seed).unwrap();
    for _ in 0..700 {
        life.step();
    }
    let written = life.written.clone();
    drop(life);
    let log = files.log();
    let mut again = Rng::new(seed);
    let sweep = Sweep { seed, random: 3, exhaustive: 3, step: 3, ..Sweep::default() };
    let states = for_each_crash(&log, sweep, |files, point| {
        let end = judge(&config, &files, &written, point.at, &point);
        if again.below(40) == 0 {
            cut_during_recovery(&config, &log.crash(point), &written, point, end, &mut again);
        }
    });
    lose_memory(&config);
    println!(
        "{} log entries, {} records, {states} states",
        log.entries.len(),
        written.records.len()
    );
    assert!(written.records.len() > 300);
}

#[test]
fn a_killed_process_loses_nothing_that_was_answered() {
    let seed = e2e::seed("kill");
    let config = config(u128::from(seed) << 64 | 2, 6);
    let mut files = new_files(&config);
    let mut rng = Rng::new(seed);
    let mut written = Written::default();
    lose_memory(&config);
    let mut incarnation = 1;
    for life_number in 0..60 {
        let mut life = SimGroup::start(&config, &files, written, rng.next_u64()).unwrap();
        let now = life.volume.positions();
        assert_eq!(now.incarnation, incarnation, "a kill does not start an incarnation");
        let model = life.written.disks_at(u64::MAX);
        assert!(life.read_all() == model, "life {life_number} reads something else");
        for _ in 0..rng.below(80) {
            life.step();
        }
        written = life.written.clone();
        // Dropped here with whatever was in flight: that is the kill.
        drop(life);
        if rng.below(6) == 0 {
            let at = files.log_len();
            let survive = blockfilter::engine::record::Survive::Random(rng.next_u64());
            let point = CrashPoint { at, survive };
            let crashed = files.log().crash(point);
            let end = judge(&config, &crashed, &written, at, &format!("life {life_number}"));
            written = written.cut(end);
            files = files.log().crash(point);
            // A life may end before its first super block: then the journal is clean and new.
            let journal = files.open(&config.journal, Open::Read).unwrap();
            let clean = read_super(journal.as_ref(), &config).unwrap().clean == 1;
            assert!(!clean || written.records.is_empty());
            incarnation += u64::from(!clean);
        }
    }
    let mut life = SimGroup::start(&config, &files, written, 1).unwrap();
    life.drain();
    let model = life.written.disks_at(u64::MAX);
    drop(life);
    lose_memory(&config);
    assert!(backing(&files) == model, "I25: plain images after a drain");
}

#[test]
fn a_clean_stop_is_recognised_and_replays_nothing() {
    let config = config(0x3000_0000_0000_0003, 4);
    let files = new_files(&config);
    lose_memory(&config);
    let mut life = SimGroup::start(&config, &files, Written::default(), 3).unwrap();
    for _ in 0..200 {
        life.step();
    }
    life.drain();
    let (written, at) = (life.written.clone(), files.log_len());
    let incarnation = life.volume.positions().incarnation;
    drop(life);
    lose_memory(&config);
    let sweep = Sweep { from: at, ..Sweep::default() };
    for_each_crash(&files.log(), sweep, |files, point| {
        assert!(backing(&files) == written.disks_at(u64::MAX), "{point}");
        let life = SimGroup::start(&config, &files, written.clone(), 4).unwrap();
        assert_eq!(life.volume.positions().incarnation, incarnation, "{point}");
        lose_memory(&config);
    });
}

#[test]
fn a_failed_journal_loses_no_answered_write_while_the_machine_stays_up() {
    use blockfilter::engine::record::{Failure, Fault, Op};
    let seed = e2e::seed("journal error");
    let mut rng = Rng::new(seed);
    for round in 0..30 {
        let config = config(u128::from(seed) << 64 | 0x400 | round, 4);
        let files = new_files(&config);
        lose_memory(&config);
        let mut life =
            SimGroup::start(&config, &files, Written::default(), rng.next_u64()).unwrap();
        let op = if rng.below(2) == 0 { Op::Write } else { Op::SyncData };
        files.fail(Fault {
            op: Some(op),
            path: "/journal".into(),
            skip: rng.below(30),
            lasting: true,
            failure: Failure::Io,
        });
        for _ in 0..400 {
            life.step();
        }
        assert_eq!(life.volume.positions().mode, Mode::Unjournaled, "round {round}, {op:?}");
        let model = life.written.disks_at(u64::MAX);
        assert!(life.read_all() == model, "round {round}");
        // Killed and started again: still no journal, and nothing lost.
        let written = life.written.clone();
        drop(life);
        let mut life = SimGroup::start(&config, &files, written, 5).unwrap();
        assert!(life.read_all() == model, "round {round} after a kill");
        life.drain();
        drop(life);
        lose_memory(&config);
        assert!(backing(&files) == model, "round {round} after a drain");
    }
}

/// Recovers a crashed state and checks the claims; returns the recovered end.
fn judge(
    config: &blockfilter::config::GroupConfig,
    files: &SimFiles,
    written: &Written,
    at: usize,
    what: &dyn std::fmt::Display,
) -> u64 {
    lose_memory(config);
    let promised = written.promised(at);
    let life = SimGroup::start(config, files, Written::default(), 9)
        .unwrap_or_else(|e| panic!("{what}: it does not start: {e}"));
    let now = life.volume.positions();
    drop(life);
    lose_memory(config);
    let end = now.durable.0;
    let durable = promised.map_or(0, |p| p.durable);
    assert!(end >= durable, "{what}: ends at {end}, {durable} was durable");
    let disks = backing(files);
    for (disk, (have, want)) in disks.iter().zip(written.disks_at(end)).enumerate() {
        if let Some(byte) = (0..have.len()).find(|i| have[*i] != want[*i]) {
            panic!("{what}: disk {disk} differs at byte {byte}, end {end}");
        }
    }
    if promised.is_some_and(|p| now.incarnation > p.incarnation) {
        let last = now.history.last().expect("a history entry");
        assert!(last.1.0 == end && last.0 < now.incarnation, "{what}: {now:?}");
    }
    if now.mode == Mode::Shipping {
        let floor = now.ship_floor.0.max(promised.map_or(0, |p| p.ship_floor));
        shippable(config, files, floor, end, written, what);
    }
    end
}

/// Every batch in `[floor, end)` is in the journal, whole and with its records.
fn shippable(
    config: &blockfilter::config::GroupConfig,
    files: &SimFiles,
    floor: u64,
    end: u64,
    written: &Written,
    what: &dyn std::fmt::Display,
) {
    let file = files.open(Path::new(&config.journal), Open::Read).unwrap();
    let sup = read_super(file.as_ref(), config).unwrap();
    assert_ne!(sup.mode, MODE_FROZEN);
    let slots = Slots::new(geometry_of(&sup), read_chunks(file.as_ref(), &sup, 0).unwrap());
    let mut at = geometry_of(&sup).normal(floor);
    let mut lsns = Vec::new();
    while at < end {
        let offset = slots.file_offset(at).unwrap_or_else(|| panic!("{what}: {at} is gone"));
        let mut page = vec![0; PAGE as usize];
        file.read_exact_at(offset, &mut page).unwrap();
        let (hdr, descs) = parse_batch(&page).unwrap_or_else(|| panic!("{what}: no batch at {at}"));
        assert_eq!(hdr.lsn.get(), at, "{what}");
        if hdr.flags & BATCH_PAD == 0 {
            let mut bytes = vec![0; hdr.total_len.get() as usize];
            file.read_exact_at(offset, &mut bytes).unwrap();
            assert!(payloads_ok(&hdr, &descs, &bytes), "{what}: payloads at {at}");
        }
        lsns.extend(descs.iter().filter(|d| d.op < 4).map(|d| d.lsn.get()));
        at = geometry_of(&sup).normal(at + u64::from(hdr.total_len.get()));
    }
    let wanted = written.records.iter().map(|r| r.lsn).filter(|lsn| (floor..end).contains(lsn));
    assert!(lsns == wanted.collect::<Vec<u64>>(), "{what}: records of [{floor}, {end})");
}

/// Cuts the power again while the first recovery is under way.
fn cut_during_recovery(
    config: &blockfilter::config::GroupConfig,
    files: &SimFiles,
    written: &Written,
    first: CrashPoint,
    end: u64,
    rng: &mut Rng,
) {
    lose_memory(config);
    drop(SimGroup::start(config, files, Written::default(), 9).unwrap());
    let log = files.log();
    let step = 1 + log.entries.len() / 6;
    let sweep = Sweep { seed: rng.next_u64(), random: 1, exhaustive: 0, step, ..Sweep::default() };
    for_each_crash(&log, sweep, |files, second| {
        let what = format!("{first}, then in recovery {second}");
        let again = judge(config, &files, written, first.at, &what);
        assert_eq!(again, end, "{what}");
    });
}
