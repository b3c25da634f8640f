//! I26 over a whole group: `standfast:dirty` never calls clean what the target may lack, through
//! restarts, seeds, freezes and failures, and over NBD.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use blockfilter::control::Mode;
use blockfilter::dirty::DIRTY_BLOCK;
use blockfilter::engine::real::RealFiles;
use blockfilter::engine::record::{Failure, Fault, Op, Rng, SimFiles};
use blockfilter::group::conn::{Conn, Progress, Shared};
use blockfilter::group::volume::{Volume, VolumeEvent};

#[path = "common/sim.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod sim;

use sim::*;

/// Whether each block of 64 KiB is dirty, by disk.
fn blocks(volume: &Volume) -> Vec<Vec<bool>> {
    let of = |disk| {
        let mut blocks = Vec::new();
        for extent in volume.dirty(disk, 0, DISK, 100) {
            assert_eq!(extent.len % DIRTY_BLOCK, 0);
            blocks.resize(blocks.len() + (extent.len / DIRTY_BLOCK) as usize, extent.dirty);
        }
        assert_eq!(blocks.len() as u64, DISK / DIRTY_BLOCK);
        blocks
    };
    (0..DISKS).map(|disk| of(disk as u8)).collect()
}

fn all(dirty: bool) -> Vec<Vec<bool>> {
    vec![vec![dirty; (DISK / DIRTY_BLOCK) as usize]; DISKS]
}

fn write(volume: &mut Volume, site: &Site, disk: u8, offset: u64) {
    let act = Act::Write { disk, offset, data: vec![7; 512], fua: true };
    carry_out(volume, &mut Model::new(), &site.clock, &act);
}

/// The target holds everything that is durable, in a complete copy.
fn acknowledge(volume: &mut Volume, teller: u64) {
    let durable = volume.positions().durable;
    volume.target_holds(teller, durable.0, true);
}

/// A seeded group in sync, all clean.
fn in_sync(site: &Site, files: &SimFiles) -> Volume {
    site.create(files);
    files.settle();
    let mut volume = site.open(Arc::new(files.clone()), "inline").unwrap();
    volume.begin_seed().unwrap();
    write(&mut volume, site, 0, 0);
    acknowledge(&mut volume, 1);
    assert_eq!(blocks(&volume), all(false));
    volume
}

#[test]
fn only_a_complete_copy_makes_clean_and_then_each_block_by_itself() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    site.create(&files);
    let mut volume = site.open(Arc::new(files), "inline").unwrap();
    assert_eq!(blocks(&volume), all(true), "there is no target");
    acknowledge(&mut volume, 1);
    assert_eq!(blocks(&volume), all(true), "nothing is kept for it");
    let s = volume.begin_seed().unwrap();
    assert_eq!(volume.positions().ship_floor.0, s, "the floor begins where nothing is held yet");
    assert_eq!(blocks(&volume), all(true));
    for offset in [0, DIRTY_BLOCK] {
        write(&mut volume, &site, 1, offset);
        let durable = volume.positions().durable;
        volume.target_holds(1, durable.0, false);
        assert_eq!(volume.positions().ship_floor, durable, "the stream moves during a seed");
        assert_eq!(blocks(&volume), all(true), "and the copy is not complete");
    }
    acknowledge(&mut volume, 1);
    assert_eq!(blocks(&volume), all(false));
    volume.write(1, 2 * DIRTY_BLOCK - 1, &[1], false).unwrap();
    let one = vec![vec![false, false], vec![false, true]];
    assert_eq!(blocks(&volume), one, "answered, not yet durable");
    acknowledge(&mut volume, 1);
    assert_eq!(blocks(&volume), one, "what is held is from before");
    volume.mark(b"a-point", false).unwrap();
    carry_out(&mut volume, &mut Model::new(), &site.clock, &Act::Flush);
    acknowledge(&mut volume, 1);
    assert_eq!(blocks(&volume), all(false));
    // The whole disk is read back in one answer, from any byte.
    assert_eq!(volume.dirty(0, 100, 999, 1)[0].len, 999);
}

#[test]
fn positions_that_are_not_ours_and_other_targets_make_all_dirty() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    let mut volume = in_sync(&site, &files);
    let held = volume.positions().durable.0;
    volume.target_holds(1, held + 1, true);
    assert_eq!(blocks(&volume), all(true), "more than was ever durable here");
    acknowledge(&mut volume, 1);
    assert_eq!(blocks(&volume), all(false), "an idle disk needs no write to be clean again");
    volume.target_holds(2, held - 1, true);
    assert_eq!(blocks(&volume), all(true), "restored from a backup");
    assert_eq!(volume.positions().ship_floor.0, held, "the journal's floor stays");
    acknowledge(&mut volume, 2);
    assert_eq!(blocks(&volume), all(false));
    volume.target_holds(3, 0, false);
    acknowledge(&mut volume, 2);
    assert_eq!(blocks(&volume), all(true), "it came late, from the session before");
    volume.begin_seed().unwrap();
    assert_eq!(blocks(&volume), all(true));
}

#[test]
fn after_any_restart_all_is_dirty_until_the_target_holds_what_was_before_it() {
    for warm in [true, false] {
        let files = SimFiles::new();
        let site = site(Path::new("/"), 6);
        let mut volume = in_sync(&site, &files);
        let held = volume.positions().durable;
        write(&mut volume, &site, 0, DIRTY_BLOCK);
        drop(volume);
        if !warm {
            site.lose_memory();
        }
        let mut volume = site.open(Arc::new(files), "inline").unwrap();
        assert_eq!(volume.positions().incarnation, if warm { 1 } else { 2 });
        assert_eq!(blocks(&volume), all(true));
        volume.target_holds(9, held.0, true);
        assert_eq!(blocks(&volume), all(true), "the write from before is not known any more");
        write(&mut volume, &site, 1, 0);
        acknowledge(&mut volume, 9);
        assert_eq!(blocks(&volume), all(false));
    }
}

#[test]
fn a_frozen_group_and_failed_disks_and_journals_are_dirty_whatever_the_target_says() {
    let site = site(Path::new("/"), 6);
    for (path, op) in [("/d0", Op::SyncData), ("/d0", Op::Write), ("/journal", Op::SyncData)] {
        site.lose_memory();
        let files = SimFiles::new();
        let mut volume = in_sync(&site, &files);
        let failure = Failure::Io;
        files.fail(Fault { op: Some(op), path: path.into(), skip: 0, lasting: true, failure });
        volume.write(0, 0, &[1; 512], false).unwrap();
        for _ in 0..60 {
            site.clock.advance(200_000);
            volume.turn(&mut Vec::<VolumeEvent>::new());
        }
        assert_ne!(volume.positions().mode, Mode::Shipping, "{path} {op:?}");
        acknowledge(&mut volume, 1);
        assert_eq!(blocks(&volume), all(true), "{path} {op:?}");
    }
    site.lose_memory();
    let mut volume = in_sync(&site, &SimFiles::new());
    while volume.positions().mode != Mode::Frozen {
        site.clock.advance(30_000);
        let act = Act::Write { disk: 0, offset: 0, data: vec![9; 64 * 512], fua: false };
        carry_out(&mut volume, &mut Model::new(), &site.clock, &act);
    }
    assert_eq!(blocks(&volume), all(true));
    acknowledge(&mut volume, 1);
    assert_eq!(blocks(&volume), all(true));
    volume.begin_seed().unwrap();
    assert_eq!(blocks(&volume), all(true));
}

/// Held against content: what is called clean reads as it does in the target's prefix.
#[test]
fn what_is_called_clean_is_equal_at_the_target_through_kills_and_power_cuts() {
    let mut clean = 0;
    for seed in 1..=6 {
        let mut rng = Rng::new(seed);
        let dir = tempfile::tempdir().unwrap();
        let site = site(dir.path(), 6);
        site.create(&RealFiles);
        let mut model = Model::new();
        // What the disks were at each position.
        let mut states = vec![(0, model.clone())];
        let (mut stamp, mut teller) = (0, 1);
        for _life in 0..12 {
            let mut volume = site.open(Arc::new(RealFiles), "inline").unwrap();
            model = content(&mut volume);
            let admitted = volume.positions().admitted.0;
            states.retain(|(at, _)| *at <= admitted);
            states.push((admitted, model.clone()));
            if volume.positions().mode != Mode::Shipping {
                volume.begin_seed().unwrap();
            }
            let mut target: Option<(u64, Model)> = None;
            for _ in 0..rng.below(60) {
                stamp += 1;
                let act = random_act(&mut rng, stamp);
                carry_out(&mut volume, &mut model, &site.clock, &act);
                states.push((volume.positions().admitted.0, model.clone()));
                let durable = volume.positions().durable.0;
                // How many states the target is behind what it could hold, if it says so.
                let behind = match rng.below(20) {
                    0..8 => Some(0),
                    8..11 => Some(rng.below(4) as usize),
                    11 => Some(rng.below(30) as usize),
                    _ => None,
                };
                let mut held = states.iter().rev().filter(|(at, _)| *at <= durable);
                if let Some((at, state)) = behind.and_then(|behind| held.nth(behind)) {
                    // Only a new session finds less than was held before.
                    teller += u64::from(target.as_ref().is_some_and(|(before, _)| before > at));
                    volume.target_holds(teller, *at, true);
                    target = Some((*at, state.clone()));
                }
                for (disk, dirty) in blocks(&volume).iter().enumerate() {
                    for (block, _) in dirty.iter().enumerate().filter(|(_, dirty)| !**dirty) {
                        let range =
                            block * DIRTY_BLOCK as usize..(block + 1) * DIRTY_BLOCK as usize;
                        let (at, target) = target.as_ref().expect("it said something");
                        let equal = model.0[disk][range.clone()] == target.0[disk][range];
                        assert!(
                            equal,
                            "seed {seed}, act {stamp}: disk {disk}, block {block}, {at}"
                        );
                        clean += 1;
                    }
                }
            }
            drop(volume);
            if rng.below(2) == 0 {
                site.lose_memory();
            }
        }
    }
    println!("{clean} times clean");
    assert!(clean > 1000);
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let head = [b"IHAVEOPT".as_slice(), &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes()];
    [head.concat(), data.to_vec()].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

/// A connection to the first disk that chose these contexts, and the client's end.
fn connect(contexts: &[&str]) -> (Conn, UnixStream) {
    let (ours, mut client) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut queries = text("g.d0");
    queries.extend((contexts.len() as u32).to_be_bytes());
    contexts.iter().for_each(|context| queries.extend(text(context)));
    let go = [text("g.d0"), vec![0, 0]].concat();
    let hello = [vec![0, 0, 0, 3], option(8, &[]), option(10, &queries), option(7, &go)];
    client.write_all(&hello.concat()).unwrap();
    (Conn::new(1, ours, 0), client)
}

fn status_request(flags: u8, len: u64) -> Vec<u8> {
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend([0, flags, 0, 7]);
    request.extend(5_u64.to_be_bytes());
    request.extend(0_u64.to_be_bytes());
    request.extend((len as u32).to_be_bytes());
    request
}

/// Flags, context id and extents of a chunk of a block status.
type Chunk = (u16, u32, Vec<(u32, u32)>);

fn chunks(bytes: &[u8]) -> Vec<Chunk> {
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        assert_eq!((word(at), word(at + 4) & 0xffff, word(at + 12)), (0x668e_33ef, 5, 5));
        let (flags, end) = ((word(at + 4) >> 16) as u16, at + 20 + word(at + 16) as usize);
        let pairs = (at + 24..end).step_by(8).map(|at| (word(at), word(at + 4)));
        found.push((flags, word(at + 20), pairs.collect()));
        at = end;
    }
    found
}

fn received(conn: &mut Conn, client: &mut UnixStream) -> Vec<u8> {
    conn.flush_output(0).unwrap();
    let mut bytes = vec![0; 1 << 16];
    let count = client.read(&mut bytes).unwrap_or(0);
    bytes.truncate(count);
    bytes
}

#[test]
fn the_map_alone_asks_no_file_and_two_contexts_are_two_chunks_of_one_reply() {
    let files = SimFiles::new();
    let site = site(Path::new("/"), 6);
    let mut volume = in_sync(&site, &files);
    write(&mut volume, &site, 0, DIRTY_BLOCK);
    let mut shared = Shared::new(vec!["g.d0".into(), "g.d1".into()], 1 << 20);
    let (half, dirty) = (DIRTY_BLOCK as u32, "standfast:dirty");
    let map = [(half, 0), (half, 1)];

    let (mut conn, mut client) = connect(&[dirty]);
    assert_eq!(conn.progress(&mut volume, &mut shared, 0), Progress::Input);
    received(&mut conn, &mut client);
    for (flags, extents) in [(0, &map[..]), (8, &map[..1])] {
        client.write_all(&status_request(flags, DISK)).unwrap();
        conn.progress(&mut volume, &mut shared, 0);
        // Nothing was asked of the engine: no turn is needed.
        let answer = received(&mut conn, &mut client);
        assert_eq!(chunks(&answer), [(1, 2, extents.to_vec())]);
    }

    let (mut conn, mut client) = connect(&[dirty, "base:allocation"]);
    conn.progress(&mut volume, &mut shared, 0);
    received(&mut conn, &mut client);
    for (flags, most) in [(0, usize::MAX), (8, 1)] {
        client.write_all(&status_request(flags, DISK)).unwrap();
        conn.progress(&mut volume, &mut shared, 0);
        assert!(received(&mut conn, &mut client).is_empty(), "the file is asked first");
        let mut events = Vec::new();
        volume.turn(&mut events);
        let Some(VolumeEvent::Extents { token, result }) = events.pop() else {
            panic!("{events:?}")
        };
        conn.handle_extents(&volume, token, result);
        let chunks = chunks(&received(&mut conn, &mut client));
        let [(0, 1, allocation), (1, 2, found)] = &chunks[..] else { panic!("{chunks:?}") };
        assert!(allocation.len() <= most && allocation.iter().map(|e| e.0).sum::<u32>() > 0);
        assert_eq!(*found, map[..map.len().min(most)]);
    }
}
