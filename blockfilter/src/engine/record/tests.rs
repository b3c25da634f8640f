//! Claims about the simulated file system: the page cache's and the disk's rules.

use std::path::Path;

use super::crash::{CrashPoint, Survive, Sweep, for_each_crash};
use super::{Failure, Fault, Op, Rng, SimFiles};
use crate::engine::{Files, Open, make_dir, read_file, replace_file};

fn path(name: &str) -> &Path {
    Path::new(name)
}

fn content(files: &SimFiles, name: &str) -> Option<Vec<u8>> {
    files.exists(path(name)).then(|| read_file(files, path(name), 1 << 30).unwrap())
}

/// A file system with `/f` of `len` zero bytes, all durable.
fn with_file(len: u64) -> SimFiles {
    let files = SimFiles::new();
    files.open(path("/f"), Open::CreateNew).unwrap().set_len(len).unwrap();
    files.settle();
    files
}

#[test]
fn written_data_is_read_back_at_once_and_lost_without_a_sync() {
    let files = with_file(8192);
    let file = files.open(path("/f"), Open::ReadWrite).unwrap();
    file.write_all_at(100, b"hello").unwrap();
    let mut buf = [0; 5];
    file.read_exact_at(100, &mut buf).unwrap();
    assert_eq!(&buf, b"hello");
    let cut = |survive| files.log().crash(CrashPoint { at: files.log_len(), survive });
    assert_eq!(content(&cut(Survive::Nothing), "/f").unwrap(), vec![0; 8192]);
    assert_eq!(&content(&cut(Survive::All), "/f").unwrap()[100..105], b"hello");
    file.sync_data().unwrap();
    assert_eq!(&content(&cut(Survive::Nothing), "/f").unwrap()[100..105], b"hello");
}

#[test]
fn a_sync_covers_only_what_was_written_before_it() {
    let files = with_file(1024);
    let file = files.open(path("/f"), Open::ReadWrite).unwrap();
    file.write_all_at(0, &[1; 512]).unwrap();
    file.sync_data().unwrap();
    file.write_all_at(0, &[2; 512]).unwrap();
    let cut = CrashPoint { at: files.log_len(), survive: Survive::Nothing };
    assert_eq!(content(&files.log().crash(cut), "/f").unwrap()[0], 1);
}

#[test]
fn a_durable_write_promises_its_own_bytes_only() {
    let files = with_file(8192);
    let file = files.open(path("/f"), Open::ReadWrite).unwrap();
    file.write_all_at(0, b"before").unwrap();
    file.write_durable_at(4096, b"durable").unwrap();
    let cut = || {
        let cut = CrashPoint { at: files.log_len(), survive: Survive::Nothing };
        content(&files.log().crash(cut), "/f").unwrap()
    };
    assert_eq!((&cut()[..6], &cut()[4096..4103]), (&[0; 6][..], &b"durable"[..]));
    file.sync_data().unwrap();
    assert_eq!((&cut()[..6], &cut()[4096..4103]), (&b"before"[..], &b"durable"[..]));
}

#[test]
fn an_unsynced_write_survives_in_any_subset_of_its_sectors() {
    let files = with_file(1536);
    let file = files.open(path("/f"), Open::ReadWrite).unwrap();
    file.write_all_at(0, &[7; 1536]).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    let sweep = Sweep { from: 1, exhaustive: 4, ..Sweep::default() };
    for_each_crash(&files.log(), sweep, |files, _| {
        let data = content(&files, "/f").unwrap();
        for sector in data.chunks(512) {
            assert!(sector.iter().all(|b| *b == sector[0]), "a sector is whole");
        }
        seen.insert((data[0], data[512], data[1024]));
    });
    assert_eq!(seen.len(), 8, "every combination of three sectors");
}

#[test]
fn an_older_unsynced_version_may_survive_a_newer_one() {
    let files = with_file(512);
    let file = files.open(path("/f"), Open::ReadWrite).unwrap();
    file.write_all_at(0, &[1; 512]).unwrap();
    file.write_all_at(0, &[2; 512]).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    let sweep = Sweep { from: 2, ..Sweep::default() };
    for_each_crash(&files.log(), sweep, |files, _| {
        seen.insert(content(&files, "/f").unwrap()[0]);
    });
    assert_eq!(Vec::from_iter(seen), vec![0, 1, 2]);
}

#[test]
fn a_new_name_is_durable_only_after_its_folder_was_synced() {
    let files = SimFiles::new();
    let file = files.open(path("/f"), Open::CreateNew).unwrap();
    file.write_all_at(0, b"x").unwrap();
    file.sync_data().unwrap();
    let cut = |survive| files.log().crash(CrashPoint { at: files.log_len(), survive });
    assert_eq!(content(&cut(Survive::Nothing), "/f"), None);
    assert_eq!(content(&cut(Survive::All), "/f").unwrap(), b"x");
    files.sync_dir(path("/")).unwrap();
    assert_eq!(content(&cut(Survive::Nothing), "/f").unwrap(), b"x");
}

#[test]
fn a_name_without_synced_data_may_be_an_empty_file() {
    let files = SimFiles::new();
    files.open(path("/f"), Open::CreateNew).unwrap().write_all_at(0, b"x").unwrap();
    files.sync_dir(path("/")).unwrap();
    let cut = CrashPoint { at: files.log_len(), survive: Survive::Nothing };
    assert_eq!(content(&files.log().crash(cut), "/f").unwrap(), b"");
}

#[test]
fn files_are_lost_with_a_folder_whose_name_was_not_synced() {
    let files = SimFiles::new();
    files.create_dir_all(path("/a/b")).unwrap();
    files.open(path("/a/b/f"), Open::CreateNew).unwrap();
    files.sync_dir(path("/a/b")).unwrap();
    files.sync_dir(path("/")).unwrap();
    let cut = CrashPoint { at: files.log_len(), survive: Survive::Nothing };
    let after = files.log().crash(cut);
    assert!(after.exists(path("/a")) && !after.exists(path("/a/b")));
    assert!(!after.exists(path("/a/b/f")), "its folder is gone");
}

#[test]
fn replace_file_leaves_the_old_or_the_new_content_at_every_cut() {
    let files = SimFiles::new();
    files.create_dir_all(path("/d")).unwrap();
    replace_file(&files, path("/d/f"), b"old").unwrap();
    files.settle();
    let before = files.log_len();
    replace_file(&files, path("/d/f"), b"newer").unwrap();
    let after = files.log_len();
    assert_eq!(before, 0);
    let states = for_each_crash(&files.log(), Sweep::default(), |files, point| {
        let data = content(&files, "/d/f").expect("the file is never missing");
        assert!(data == b"old" || data == b"newer", "{point}: {data:?}");
        assert!(point.at < after || data == b"newer", "{point}: durable on return");
        replace_file(&files, path("/d/f"), b"again").expect("a leftover is no obstacle");
    });
    assert!(states > 12, "{states}");
}

#[test]
fn replacing_without_a_sync_is_caught() {
    let files = SimFiles::new();
    replace_file(&files, path("/f"), b"old").unwrap();
    files.settle();
    files.open(path("/f.new"), Open::CreateNew).unwrap().write_all_at(0, b"newer").unwrap();
    files.rename(path("/f.new"), path("/f")).unwrap();
    files.sync_dir(path("/")).unwrap();
    let mut torn = 0;
    for_each_crash(&files.log(), Sweep::default(), |files, _| {
        let data = content(&files, "/f").unwrap();
        torn += u32::from(data != b"old" && data != b"newer");
    });
    assert!(torn > 0);
}

#[test]
fn data_of_a_failed_sync_stays_readable_but_never_becomes_durable() {
    let files = with_file(512);
    let file = files.open(path("/f"), Open::ReadWrite).unwrap();
    file.write_all_at(0, &[9; 512]).unwrap();
    files.fail(Fault {
        op: Some(Op::SyncData),
        path: "/f".into(),
        skip: 0,
        lasting: false,
        failure: Failure::Io,
    });
    assert!(file.sync_data().is_err());
    file.sync_data().expect("the second sync reports success, as on Linux");
    assert_eq!(content(&files, "/f").unwrap()[0], 9);
    let cut = |survive| files.log().crash(CrashPoint { at: files.log_len(), survive });
    assert_eq!(content(&cut(Survive::Nothing), "/f").unwrap()[0], 0);
    file.write_all_at(0, &[8; 512]).unwrap();
    file.sync_data().unwrap();
    for survive in [Survive::Nothing, Survive::All] {
        assert_eq!(content(&cut(survive), "/f").unwrap()[0], 8, "written again: durable");
    }
}

#[test]
fn the_nth_mutation_fails_once_or_for_ever() {
    let files = with_file(4096);
    let file = files.open(path("/f"), Open::ReadWrite).unwrap();
    files.fail_nth(1, Failure::NoSpace, false);
    file.write_all_at(0, &[1]).unwrap();
    let error = file.write_all_at(1, &[1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    file.write_all_at(2, &[1]).unwrap();
    files.fail_nth(0, Failure::Short, true);
    assert!(file.write_all_at(10, &[5; 4]).is_err() && file.sync_data().is_err());
    assert_eq!(
        &content(&files, "/f").unwrap()[..15],
        &[1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 5, 5, 0, 0, 0]
    );
    files.heal();
    file.sync_data().unwrap();
}

#[test]
fn a_full_file_system_refuses_new_pages_and_takes_overwrites() {
    let files = SimFiles::new();
    let file = files.open(path("/f"), Open::CreateNew).unwrap();
    file.write_all_at(0, &[1; 4096]).unwrap();
    files.set_capacity(8192);
    assert_eq!(files.free_bytes(path("/")).unwrap(), 4096);
    file.write_all_at(4096, &[1; 4096]).unwrap();
    assert_eq!(file.write_all_at(8192, &[1]).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    assert!(file.allocate(0, 16384).is_err());
    file.write_all_at(0, &[2; 8192]).unwrap();
    file.punch(0, 4096).unwrap();
    file.write_all_at(8192, &[3; 4096]).unwrap();
}

#[test]
fn reads_fail_where_told_and_flipped_bits_show() {
    let files = with_file(8192);
    let file = files.open(path("/f"), Open::Read).unwrap();
    files.fail_reads(path("/f"), 4096..4097);
    let mut buf = [0; 4096];
    file.read_exact_at(0, &mut buf).unwrap();
    assert!(file.read_exact_at(1, &mut buf).is_err());
    files.flip(path("/f"), 3, 0x80);
    file.read_exact_at(0, &mut buf).unwrap();
    assert_eq!(buf[3], 0x80);
    assert!(file.write_all_at(0, b"x").is_err(), "opened for reading");
    assert!(file.read_exact_at(8000, &mut buf).is_err(), "past the end");
}

#[test]
fn holes_punches_and_lengths_read_as_a_real_file_does() {
    use crate::engine::real::RealFiles;
    let folder = tempfile::tempdir().unwrap();
    let real = RealFiles.open(&folder.path().join("f"), Open::CreateNew).unwrap();
    let sim = SimFiles::new().open(path("/f"), Open::CreateNew).unwrap();
    let mut rng = Rng::new(42);
    for step in 0..2000 {
        let (at, len) = (rng.below(60_000), 1 + rng.below(9000));
        let kind = rng.below(5);
        for file in [&real, &sim] {
            match kind {
                0 | 1 => file.write_all_at(at, &vec![step as u8 | 1; len as usize]).unwrap(),
                2 => file.punch(at, len).unwrap(),
                3 => file.set_len(at).unwrap(),
                _ => file.allocate(at, len).unwrap(),
            }
        }
        let len = real.len().unwrap();
        assert_eq!(sim.len().unwrap(), len);
        let (mut a, mut b) = (vec![0; len as usize], vec![1; len as usize]);
        real.read_exact_at(0, &mut a).unwrap();
        sim.read_exact_at(0, &mut b).unwrap();
        assert!(a == b, "step {step}, kind {kind}");
    }
}

#[test]
fn a_crash_point_replays_to_the_same_state() {
    let files = with_file(1 << 16);
    let file = files.open(path("/f"), Open::ReadWrite).unwrap();
    for i in 0..8 {
        file.write_all_at(i * 8192, &[i as u8 + 1; 8192]).unwrap();
    }
    let (log, sweep) = (files.log(), Sweep { seed: 7, ..Sweep::default() });
    for_each_crash(&log, sweep, |files, point| {
        assert_eq!(content(&files, "/f"), content(&log.crash(point), "/f"), "{point}");
    });
}

#[test]
fn a_folder_that_was_made_is_there_after_a_power_cut() {
    let files = SimFiles::new();
    files.create_dir_all(path("/a")).unwrap();
    files.settle();
    // Made by somebody who died before its name was durable.
    files.create_dir_all(path("/a/b")).unwrap();
    for folder in ["/a/b", "/a/c/d/e"] {
        make_dir(&files, path(folder)).unwrap();
        let after =
            files.log().crash(CrashPoint { at: files.log_len(), survive: Survive::Nothing });
        assert!(after.exists(path(folder)), "{folder}");
    }
}
