//! The filter alone: everything that it asks for happens at once, but for the syncs of the disks.

use zerocopy::FromZeros;

use super::*;

struct Nothing;

impl Memory for Nothing {
    fn fill(&mut self, _: u64, _: &[u8]) {}
    fn freeze(&mut self, _: u64) {}
    fn publish(&mut self, _: u64) {}
    fn release(&mut self, _: u64, _: u32, _: u64) {}
}

const MIB: u64 = 1 << 20;
const NOW: u64 = 1;

/// With a journal of 16 chunks of 1 MiB that the target has nothing of.
fn filter(mode: u8) -> Filter {
    filter_of(mode, 16, 4 * MIB)
}

/// With a journal of so many chunks, and an arena of so many bytes.
fn filter_of(mode: u8, slots: u32, arena: u64) -> Filter {
    let geometry = ChunkGeometry { chunk: MIB, slots };
    let first = geometry.normal(0);
    let mut sup = JournalSuper::new_zeroed();
    (sup.mode, sup.checkpoint, sup.ship_floor) = (mode, first.into(), first.into());
    let start = Start {
        sup,
        slots: Slots::new(geometry, Default::default()),
        applied: first,
        applied_crc: 0,
        durable: first,
        sealed: Vec::new(),
        open: Vec::new(),
        unjournaled: false,
    };
    Filter::new(FilterConfig { geometry, arena }, start, NOW)
}

/// Does what the filter asks for until it asks for nothing or for a sync of the disks: then true.
fn settle(filter: &mut Filter) -> bool {
    while let Some(action) = filter.poll_action(&mut Nothing, NOW) {
        match action {
            Action::JournalWrite { .. } => filter.handle_journal_write(&Ok(())),
            Action::JournalSync | Action::JournalCommit { .. } => {
                filter.handle_journal_sync(&Ok(()));
            }
            Action::Apply { .. } => filter.handle_apply(Ok(()), &mut Nothing, NOW),
            Action::WriteSuper(_) => filter.handle_write_super(&Ok(())),
            Action::SyncDisks => return true,
            Action::MarkUnjournaled => unreachable!("the journal works"),
        }
    }
    false
}

/// One record of 64 KiB; false if it has to wait.
fn write(filter: &mut Filter) -> bool {
    write_at(filter, NOW)
}

fn write_at(filter: &mut Filter, now: u64) -> bool {
    let payload = &[7; 64 << 10];
    let len = payload.len() as u32;
    let rec = NewRecord { op: RecOp::Write, flags: 0, disk: 0, offset: 0, len, payload };
    filter.admit(&rec, &mut Nothing, now).is_ok()
}

/// How many MiB were written back between one checkpoint and the next, while each takes as long
/// as so many MiB do.
fn distances(mut filter: Filter, during: &[u64]) -> Vec<u64> {
    let mut reached = filter.positions(NOW).checkpoint.0;
    let distance = |during: &u64| {
        while !settle(&mut filter) {
            assert!(write(&mut filter), "nothing is full yet");
        }
        let before = std::mem::replace(&mut reached, filter.positions(NOW).applied.0);
        for _ in 0..during * 16 {
            if !write(&mut filter) {
                break;
            }
            assert!(!settle(&mut filter), "one sync at a time");
        }
        filter.handle_sync_disks(Ok(()), &mut Nothing);
        (reached - before) / MIB
    };
    during.iter().map(distance).collect()
}

#[test]
fn a_quick_checkpoint_makes_the_next_one_wait_for_half_of_the_journal() {
    assert_eq!(distances(filter(MODE_NEW), &[2, 2, 2]), [4, 8, 8]);
}

#[test]
fn after_one_that_filled_the_journal_a_quarter_makes_the_next_one_due() {
    let found = distances(filter(MODE_NEW), &[2, 20, 0, 0]);
    // The third is due for what came during the second.
    assert_eq!((found[0], found[1], found[3]), (4, 8, 4));
}

#[test]
fn a_checkpoint_that_holds_clients_up_at_a_small_arena_is_no_pause_of_theirs() {
    let next_one_after = |writes| {
        let mut filter = filter_of(MODE_NEW, 64, MIB);
        while !settle(&mut filter) {
            write(&mut filter);
        }
        let fitted = (0..writes).take_while(|_| write(&mut filter)).count();
        filter.handle_sync_disks(Ok(()), &mut Nothing);
        assert!(!settle(&mut filter));
        (fitted, distances(filter, &[0])[0])
    };
    assert_eq!(next_one_after(12), (12, 16), "less than a sixteenth of 16 MiB, and they stopped");
    assert_eq!(next_one_after(99), (15, 32), "as little, but all there was room for");
}

#[test]
fn what_is_kept_for_the_target_makes_the_next_checkpoint_come_earlier() {
    assert_eq!(distances(filter(MODE_SHIPPING), &[2, 2, 1]), [4, 6, 4]);
}

/// Actions until none is due; nothing is done.
fn actions(filter: &mut Filter, now: u64) -> Vec<&'static str> {
    let next = || filter.poll_action(&mut Nothing, now);
    std::iter::from_fn(next)
        .map(|action| match action {
            Action::JournalWrite { .. } => "write",
            Action::JournalSync => "sync",
            Action::JournalCommit { .. } => "commit",
            _ => "other",
        })
        .collect()
}

/// One that a client with a flush behind every four writes of 64 KiB has taught that.
fn taught() -> Filter {
    let mut filter = filter(MODE_NEW);
    for _ in 0..5 {
        (0..4).for_each(|_| assert!(write(&mut filter)));
        filter.wait_durable(filter.admitted(), 7);
        settle(&mut filter);
        assert_eq!(filter.poll_waiter(), Some((7, true)));
    }
    filter
}

#[test]
fn half_of_what_a_flush_will_want_is_written_ahead_and_synced_with_the_rest() {
    let mut filter = taught();
    assert!(write(&mut filter));
    assert!(actions(&mut filter, NOW).is_empty());
    assert!(write(&mut filter));
    assert_eq!(actions(&mut filter, NOW), ["write"], "and no sync");
    assert!(write(&mut filter));
    assert!(actions(&mut filter, NOW).is_empty(), "it is held already");
    assert!(write(&mut filter));
    let end = filter.admitted();
    assert!(filter.wait_durable(end, 8));
    assert_eq!(actions(&mut filter, NOW), ["write"]);
    // The one begun last is done first: the sync must cover both.
    filter.handle_journal_write(&Ok(()));
    assert!(actions(&mut filter, NOW).is_empty());
    filter.handle_journal_write(&Ok(()));
    assert_eq!(actions(&mut filter, NOW), ["sync"]);
    assert_eq!(filter.poll_waiter(), None);
    filter.handle_journal_sync(&Ok(()));
    assert_eq!(filter.poll_waiter(), Some((8, true)));
    assert!(filter.positions(NOW).durable.0 >= end);
}

#[test]
fn what_was_written_ahead_for_no_flush_is_synced_with_the_rest_in_time() {
    let mut filter = taught();
    let due = NOW + COMMIT_AFTER;
    assert!(write_at(&mut filter, NOW));
    assert!(write_at(&mut filter, NOW + 5_000));
    assert_eq!(actions(&mut filter, NOW + 5_000), ["write"]);
    filter.handle_journal_write(&Ok(()));
    assert!(write_at(&mut filter, NOW + 10_000));
    assert!(actions(&mut filter, due - 1).is_empty());
    assert_eq!(filter.poll_timeout(), Some(due));
    assert_eq!(actions(&mut filter, due), ["write"]);
    filter.handle_journal_write(&Ok(()));
    assert_eq!(actions(&mut filter, due), ["sync"]);
    let end = filter.admitted();
    filter.handle_journal_sync(&Ok(()));
    assert!(filter.positions(due).durable.0 >= end);
}

type Ask<'a> = &'a dyn Fn(&mut Filter);

#[test]
fn nothing_that_wants_a_commit_waits_for_one_that_is_held() {
    let mark = |f: &mut Filter| f.admit_mark(b"m", false, &mut Nothing, NOW).map(drop).unwrap();
    let fill = |f: &mut Filter| {
        while f.undurable() < COMMIT_BYTES {
            assert!(write(f));
        }
        assert!(!f.is_awaited(), "only its bytes make it due");
    };
    let press = |f: &mut Filter| f.pressed = Some(Stall::Journal);
    let asks: [(Ask<'_>, bool); 5] = [
        (&Filter::request_commit, false),
        (&Filter::request_drain, false),
        (&press, false),
        (&mark, true),
        (&fill, true),
    ];
    for (n, (ask, more)) in asks.into_iter().enumerate() {
        let mut filter = taught();
        (0..2).for_each(|_| assert!(write(&mut filter)));
        assert_eq!(actions(&mut filter, NOW), ["write"]);
        filter.handle_journal_write(&Ok(()));
        ask(&mut filter);
        let first = filter.poll_action(&mut Nothing, NOW);
        assert_eq!(matches!(first, Some(Action::JournalWrite { .. })), more, "{n}: {first:?}");
        assert_eq!(matches!(first, Some(Action::JournalSync)), !more, "{n}: {first:?}");
    }
}

#[test]
fn a_write_ahead_that_fails_is_a_failed_journal() {
    let mut filter = taught();
    (0..2).for_each(|_| assert!(write(&mut filter)));
    let before = filter.positions(NOW).durable;
    assert_eq!(actions(&mut filter, NOW), ["write"]);
    filter.handle_journal_write(&Err(io::ErrorKind::Other.into()));
    assert_eq!(filter.positions(NOW).mode, Mode::Unjournaled);
    filter.wait_durable(filter.admitted(), 9);
    assert_eq!(filter.positions(NOW).durable, before);
    assert_eq!(filter.poll_waiter(), None);
}
