//! The maps against an oracle that remembers every write, and the ways to say clean wrongly.

use proptest::prelude::*;

use super::*;

const KIB: u64 = 1 << 10;
const SIZE: u64 = 1 << 30;

/// Offsets and ends in KiB of what is dirty.
fn dirty_of(dirty: &Dirty, disk: u8, size: u64) -> Vec<(u64, u64)> {
    let extents = dirty.extents(disk, 0, size, usize::MAX);
    let mut at = 0;
    let mut found = Vec::new();
    for extent in &extents {
        if extent.dirty {
            found.push((at / KIB, (at + extent.len) / KIB));
        }
        at += extent.len;
    }
    assert_eq!(at, size);
    assert!(extents.windows(2).all(|pair| pair[0].dirty != pair[1].dirty), "neighbours differ");
    found
}

/// The target holds everything up to position 10, where the maps begin.
fn in_sync() -> Dirty {
    let mut dirty = Dirty::new(10);
    dirty.told(1, 10, true, 10);
    assert_eq!(dirty_of(&dirty, 0, SIZE), []);
    dirty
}

const ALL: [(u64, u64); 1] = [(0, SIZE / KIB)];

#[test]
fn a_write_makes_its_blocks_dirty_and_no_others() {
    let mut dirty = in_sync();
    dirty.set(0, 65_536 + 512, 512);
    dirty.set(0, 65_536 * 5 - 1, 2);
    dirty.set(0, 65_536 * 63, 65_536 * 130);
    dirty.set(3, 0, 65_536);
    dirty.set(3, SIZE - 512, 512);
    dirty.set(3, 4096, 0);
    let expected = [(64, 128), (256, 384), (63 * 64, 193 * 64)];
    assert_eq!(dirty_of(&dirty, 0, SIZE), expected);
    assert_eq!(dirty_of(&dirty, 3, SIZE), [(0, 64), (SIZE / KIB - 64, SIZE / KIB)]);
    for disk in [1, 2, 4, 31] {
        assert_eq!(dirty_of(&dirty, disk, SIZE), []);
    }
}

#[test]
fn an_answer_has_the_range_asked_for_and_no_more_extents_than_that() {
    let mut dirty = in_sync();
    for block in (0..1000).step_by(2) {
        dirty.set(0, block * DIRTY_BLOCK, 1);
    }
    let two = dirty.extents(0, 100, 3 * DIRTY_BLOCK, 2);
    let (first, second) = (DIRTY_BLOCK - 100, DIRTY_BLOCK);
    assert_eq!(
        two,
        [DirtyExtent { len: first, dirty: true }, DirtyExtent { len: second, dirty: false }]
    );
    let one = dirty.extents(0, DIRTY_BLOCK + 7, 9, 5);
    assert_eq!(one, [DirtyExtent { len: 9, dirty: false }]);
    assert_eq!(dirty.extents(0, 0, u64::from(u32::MAX), 4096).len(), 1000);
    assert_eq!(Dirty::new(0).extents(0, 77, 99, 3), [DirtyExtent { len: 99, dirty: true }]);
}

#[test]
fn a_huge_disk_costs_what_is_written_of_it() {
    let mut dirty = in_sync();
    let end = u64::MAX / 2 / DIRTY_BLOCK * DIRTY_BLOCK;
    dirty.set(0, end - 512, 512);
    dirty.set(0, 0, u64::from(u32::MAX));
    assert_eq!(dirty.disks[0].current.0.len(), 3);
    let last = dirty.extents(0, end - 2 * DIRTY_BLOCK, 2 * DIRTY_BLOCK, 9);
    assert_eq!(last.iter().map(|e| e.dirty).collect::<Vec<_>>(), [false, true]);
    dirty.told(1, 11, true, 11);
    assert!(dirty.disks.is_empty());
}

#[test]
fn a_bit_goes_only_with_a_confirmation_of_what_was_written_after_it() {
    let mut dirty = in_sync();
    dirty.set(0, 0, 512); // LSN 10
    let (first, second) = ((0, 64), (128, 192));
    dirty.told(1, 10, true, 11);
    assert_eq!(dirty_of(&dirty, 0, SIZE), [first], "what is confirmed is from before");
    dirty.set(0, 128 * KIB, 512); // LSN 11
    dirty.told(1, 11, true, 12);
    assert!(dirty_of(&dirty, 0, SIZE).contains(&second));
    dirty.told(1, 12, true, 12);
    assert_eq!(dirty_of(&dirty, 0, SIZE), [], "an idle disk is clean with the last one");
    for lsn in 12..100 {
        dirty.set(0, 128 * KIB, 512);
        dirty.told(1, lsn, true, lsn + 1);
        assert_eq!(dirty_of(&dirty, 0, SIZE), [second], "a busy block does not age others");
    }
}

#[test]
fn without_a_complete_copy_nothing_is_clean_wherever_the_stream_is() {
    let mut dirty = Dirty::new(10);
    assert_eq!(dirty_of(&dirty, 0, SIZE), ALL);
    for floor in 10..20 {
        dirty.set(0, 0, 512);
        dirty.told(1, floor, false, floor + 1);
        assert_eq!(dirty_of(&dirty, 0, SIZE), ALL);
    }
    dirty.told(1, 19, true, 20);
    assert_eq!(dirty_of(&dirty, 0, SIZE), [(0, 64)], "what was written meanwhile is known");
    dirty.told(1, 20, false, 20);
    assert_eq!(dirty_of(&dirty, 0, SIZE), ALL, "a copy began");
}

#[test]
fn after_a_start_nothing_is_clean_before_all_older_records_are_held() {
    let mut dirty = Dirty::new(100);
    for floor in [50, 99] {
        dirty.told(1, floor, true, 101);
        assert_eq!(dirty_of(&dirty, 0, SIZE), ALL, "{floor}");
    }
    dirty.set(0, 0, 512);
    dirty.told(1, 100, true, 101);
    assert_eq!(dirty_of(&dirty, 0, SIZE), [(0, 64)]);
}

#[test]
fn a_target_that_fell_back_or_was_replaced_makes_all_dirty() {
    let mut dirty = in_sync();
    dirty.set(0, 0, 512);
    dirty.told(1, 11, true, 11);
    assert_eq!(dirty_of(&dirty, 0, SIZE), []);
    // It lost the record at 10, whose bit is gone.
    dirty.told(2, 10, true, 11);
    assert_eq!(dirty_of(&dirty, 0, SIZE), ALL);
    dirty.set(0, 128 * KIB, 512);
    dirty.told(2, 11, true, 12);
    assert_eq!(dirty_of(&dirty, 0, SIZE), [(128, 192)], "it has it again");
    dirty.told(3, 0, false, 12);
    dirty.told(3, 11, true, 12);
    assert_eq!(dirty_of(&dirty, 0, SIZE), ALL, "another one, whatever it says of before");
    dirty.forget(12);
    dirty.told(3, 12, true, 12);
    assert_eq!(dirty_of(&dirty, 0, SIZE), []);
    dirty.forget(12);
    assert_eq!(dirty_of(&dirty, 0, SIZE), ALL, "a seed begins");
}

#[test]
fn what_an_older_session_said_and_comes_late_is_not_believed() {
    let mut dirty = in_sync();
    dirty.set(0, 0, 512);
    dirty.told(7, 10, false, 11);
    dirty.told(6, 11, true, 11);
    assert_eq!(dirty_of(&dirty, 0, SIZE), ALL);
}

#[derive(Clone, Debug)]
enum Event {
    Write {
        disk: u8,
        block: u64,
        blocks: u64,
    },
    /// So far behind the head.
    Told {
        behind: u64,
        whole: bool,
    },
    /// From before the newest session.
    Late {
        behind: u64,
    },
    NewSession {
        behind: u64,
        whole: bool,
    },
    Seed,
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    let whole = prop::bool::weighted(0.8);
    prop_oneof![
        8 => (0..2_u8, 0..BLOCKS, 1..70_u64)
            .prop_map(|(disk, block, blocks)| Event::Write { disk, block, blocks }),
        8 => (0..6_u64, whole).prop_map(|(behind, whole)| Event::Told { behind, whole }),
        1 => (0..6_u64).prop_map(|behind| Event::Late { behind }),
        1 => (0..12_u64, whole).prop_map(|(behind, whole)| Event::NewSession { behind, whole }),
        1 => Just(Event::Seed),
        1 => Just(Event::Restart),
    ]
}

const BLOCKS: u64 = 200;

/// Everything that happened.
#[derive(Default)]
struct Oracle {
    head: u64,
    /// LSN, disk, blocks.
    writes: Vec<(u64, u8, std::ops::Range<u64>)>,
    /// What the target holds, as it said last, and if a complete copy.
    told: (u64, bool),
    /// From here on everything is known.
    known: u64,
}

impl Oracle {
    /// Whether the target may lack the newest version of a block.
    fn may_differ(&self, disk: u8, block: u64) -> bool {
        let (floor, whole) = self.told;
        let newer = |w: &(u64, u8, std::ops::Range<u64>)| {
            w.0 >= floor && w.1 == disk && w.2.contains(&block)
        };
        !whole || self.writes.iter().any(newer)
    }

    fn hears(&mut self, floor: u64, whole: bool) {
        if floor < self.told.0 {
            self.known = self.head;
        }
        self.told = (floor, whole);
    }
}

proptest! {
    #[test]
    fn clean_is_said_only_of_what_the_target_holds(
        events in proptest::collection::vec(event(), 1..120),
    ) {
        let (mut dirty, mut oracle, mut session) = (Dirty::new(0), Oracle::default(), 1);
        dirty.told(session, 0, false, 0);
        for event in events {
            match event {
                Event::Write { disk, block, blocks } => {
                    dirty.set(disk, block * DIRTY_BLOCK + 512, blocks * DIRTY_BLOCK - 512);
                    oracle.writes.push((oracle.head, disk, block..block + blocks));
                    oracle.head += 1;
                }
                Event::Told { behind, whole } => {
                    // In a session it only grows.
                    let floor = oracle.head.saturating_sub(behind).max(oracle.told.0);
                    oracle.hears(floor, whole);
                    dirty.told(session, floor, whole, oracle.head);
                }
                Event::Late { behind } => {
                    let floor = oracle.head.saturating_sub(behind);
                    dirty.told(session - 1, floor, true, oracle.head);
                }
                Event::NewSession { behind, whole } => {
                    session += 1;
                    let floor = oracle.head.saturating_sub(behind);
                    oracle.hears(floor, whole);
                    dirty.told(session, floor, whole, oracle.head);
                }
                Event::Seed => {
                    dirty.forget(oracle.head);
                    oracle.known = oracle.head;
                    oracle.told.1 = false;
                }
                Event::Restart => {
                    dirty = Dirty::new(oracle.head);
                    dirty.told(1, 0, false, oracle.head);
                    (oracle.known, oracle.told, session) = (oracle.head, (0, false), 1);
                }
            }
            let (floor, whole) = oracle.told;
            let known = whole && floor >= oracle.known;
            for disk in 0..2 {
                let extents = dirty.extents(disk, 0, (BLOCKS + 80) * DIRTY_BLOCK, usize::MAX);
                let mut block = 0;
                for extent in extents {
                    let end = block + extent.len / DIRTY_BLOCK;
                    for block in block..end {
                        let differs = oracle.may_differ(disk, block);
                        prop_assert!(extent.dirty || !differs, "disk {disk}, block {block}");
                        let idle = floor == oracle.head;
                        let touched = oracle.writes.iter()
                            .any(|w| w.0 >= oracle.known && w.1 == disk && w.2.contains(&block));
                        if known && (idle || !touched) {
                            prop_assert!(!extent.dirty, "disk {disk}, block {block}: no reason");
                        }
                    }
                    block = end;
                }
            }
        }
    }
}
