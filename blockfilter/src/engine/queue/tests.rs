//! Operations on files that are slow or broken where a test wants it.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::{OnceLock, Weak};
use std::time::Duration;

use crossbeam::channel::bounded;
use rustix::thread::{sched_getaffinity, sched_setaffinity};

use super::*;
use crate::arena::{ARENA_MAGIC, ArenaHdr};
use crate::engine::bulk::policy;
use crate::engine::cpu::tests::two;
use crate::engine::record::SimFiles;
use crate::engine::{Latched, Open};
use crate::journal::format::{RecDesc, RecOp};

const LONG: Duration = Duration::from_secs(60);

type Meanwhile = (Weak<Target>, fn(&Target));

/// A disk whose second write waits until told, and that counts its syncs and the processors
/// that each write might use, and keeps its policy.
#[derive(Debug)]
struct Slow {
    inner: Arc<dyn File>,
    computed: Mutex<Vec<(u32, i32)>>,
    begun: Sender<()>,
    go: Receiver<()>,
    syncs: AtomicUsize,
    broken: AtomicBool,
    /// What was written out, before how many syncs.
    out: Mutex<Vec<(u64, usize)>>,
    /// Done for the first of these.
    meanwhile: OnceLock<Meanwhile>,
}

impl File for Slow {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact_at(offset, buf)
    }
    fn write_all_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let might_use = sched_getaffinity(None).unwrap().count();
        self.computed.lock().unwrap().push((might_use, policy()));
        if offset > 0 {
            self.begun.send(()).unwrap();
            self.go.recv_timeout(LONG).unwrap();
        }
        self.inner.write_all_at(offset, data)
    }
    fn write_out(&self, offset: u64, _len: u64) -> io::Result<()> {
        self.out.lock().unwrap().push((offset, self.syncs.load(Ordering::SeqCst)));
        if let (Some((target, act)), true) = (self.meanwhile.get(), offset == 0) {
            act(&target.upgrade().unwrap());
        }
        match self.broken.load(Ordering::SeqCst) {
            true => Err(io::Error::other("broken")),
            false => Ok(()),
        }
    }
    fn sync_data(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        match self.broken.load(Ordering::SeqCst) {
            true => Err(io::Error::other("broken")),
            false => self.inner.sync_data(),
        }
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.punch(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.inner.next_data(offset)
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

fn target(dir: &Path) -> (Arc<Target>, Arc<Slow>, Receiver<()>, Sender<()>) {
    let files = SimFiles::new();
    let inner = files.open(Path::new("/d"), Open::CreateNew).unwrap();
    inner.set_len(1 << 20).unwrap();
    let ((begun, has_begun), (tell, go)) = (bounded(1), bounded(1));
    let (syncs, broken, computed, out, meanwhile) = Default::default();
    let slow = Arc::new(Slow { inner, computed, begun, go, syncs, broken, out, meanwhile });
    let size = 65536.into();
    let hdr = ArenaHdr { magic: ARENA_MAGIC, version: 1.into(), size, ..Default::default() };
    let arena = Arena::create(&dir.join("arena"), &hdr).unwrap();
    arena.set_bounds(0, 0);
    arena.fill(0, &[7; 8192]);
    arena.advance_head(8192);
    let target = Target {
        journal: files.open(Path::new("/j"), Open::CreateNew).unwrap(),
        disks: vec![slow.clone()],
        holes: vec![true],
        writes: vec![Writes::new(1 << 20)],
        written_again: 0.into(),
        arena: Arc::new(arena),
        calm: false.into(),
        seat: Arc::default(),
        files: Arc::new(files),
        marker: "/unjournaled".into(),
    };
    (Arc::new(target), slow, has_begun, tell)
}

/// Writes a block at each of these offsets of the first disk.
fn batch(offsets: &[u64]) -> SealedBatch {
    let desc = |offset: &u64| RecDesc {
        op: RecOp::Write as u8,
        offset: (*offset).into(),
        len: 4096.into(),
        ..RecDesc::default()
    };
    let descs = offsets.iter().map(desc).collect();
    SealedBatch { lsn: 0, end: 8192, hdr_crc: 0, descs }
}

/// I6: what is written while a sync runs is not taken for synced by it.
#[test]
fn a_sync_in_the_midst_of_an_apply_does_not_count_for_its_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (target, slow, has_begun, tell) = target(dir.path());
    let apply = Op::Apply(vec![batch(&[0, 8192])]);
    std::thread::scope(|scope| {
        let applying = scope.spawn(|| target.execute(apply));
        has_begun.recv_timeout(LONG).unwrap();
        assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Ok(()))));
        tell.send(()).unwrap();
        assert!(matches!(applying.join().unwrap(), Done::Apply(Ok(()))));
    });
    assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Ok(()))));
    assert_eq!(slow.syncs.load(Ordering::SeqCst), 2);
    assert_eq!(target.arena.word(Word::Syncing), 0);
}

#[test]
fn write_back_computes_where_it_is_offered_a_seat_and_in_bulk_while_it_keeps_up() {
    let dir = tempfile::tempdir().unwrap();
    let (target, slow, has_begun, tell) = target(dir.path());
    let (before, allowed) = two();
    target.seat.set(Place::On(rustix::thread::sched_getcpu()));
    // A turn and one more.
    let blocks: Vec<u64> = (0..14).map(|i| i * 8192).collect();
    std::thread::scope(|scope| {
        let all = scope.spawn(|| {
            let done = target.execute(Op::Apply(vec![batch(&blocks)]));
            (done, sched_getaffinity(None).unwrap(), policy())
        });
        for _ in 1..blocks.len() {
            has_begun.recv_timeout(LONG).unwrap();
            // Most of the memory waits for it.
            target.arena.advance_head(60_000);
            tell.send(()).unwrap();
        }
        let (done, after, then) = all.join().unwrap();
        assert!(matches!(done, Done::Apply(Ok(()))));
        assert_eq!((after, then), (allowed, libc::SCHED_OTHER));
    });
    let mut expected = vec![(1, libc::SCHED_BATCH); 13];
    expected.push((allowed.count(), libc::SCHED_OTHER));
    assert_eq!(*slow.computed.lock().unwrap(), expected);
    sched_setaffinity(None, &before).unwrap();
}

/// What was written again counts as unsynced until a sync of all disks succeeded.
#[test]
fn what_was_written_again_stays_noted_until_it_is_synced() {
    let dir = tempfile::tempdir().unwrap();
    let (target, slow, ..) = target(dir.path());
    target.arena.set_word(Word::Syncing, 3);
    target.written_again.store(3, Ordering::SeqCst);
    slow.broken.store(true, Ordering::SeqCst);
    assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Err(_))));
    assert_eq!(target.arena.word(Word::Syncing), 4);
    slow.broken.store(false, Ordering::SeqCst);
    target.writes[0].mark();
    assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Ok(()))));
    assert_eq!(target.arena.word(Word::Syncing), 1);
}

#[test]
fn a_question_for_holes_syncs_only_what_was_written_since_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let (target, slow, ..) = target(dir.path());
    let ask = || {
        let question = Op::Extents { token: 1, disk: 0, ranges: vec![(0, 4096)], max: 1 };
        assert!(matches!(target.execute(question), Done::Extents { result: Ok(_), .. }));
        slow.syncs.load(Ordering::SeqCst)
    };
    assert_eq!((ask(), ask()), (1, 1));
    let apply = Op::Apply(vec![batch(&[0])]);
    assert!(matches!(target.execute(apply), Done::Apply(Ok(()))));
    assert_eq!((ask(), ask()), (2, 2));
    assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Ok(()))));
    assert_eq!(slow.syncs.load(Ordering::SeqCst), 3, "the checkpoint's sync is its own");
}

/// Whoever is told of a failed sync, the next start must know.
#[test]
fn a_sync_that_failed_in_a_query_of_holes_stays_noted() {
    let dir = tempfile::tempdir().unwrap();
    let (target, slow, ..) = target(dir.path());
    slow.broken.store(true, Ordering::SeqCst);
    let query = Op::Extents { token: 1, disk: 0, ranges: vec![(0, 4096)], max: 1 };
    assert!(matches!(target.execute(query), Done::Extents { result: Err(_), .. }));
    slow.broken.store(false, Ordering::SeqCst);
    assert!(matches!(target.execute(Op::SyncDisks), Done::SyncDisks(Ok(()))));
    assert_ne!(target.arena.word(Word::Syncing), 0);
}

/// What a calm checkpoint writes out of a disk of which the first and the fourth part were written, and what it
/// says; `meanwhile` is done beside the first.
fn written_out(
    prepare: fn(&Target, &Slow),
    meanwhile: fn(&Target),
) -> (Vec<(u64, usize)>, [Done; 2], u64) {
    let dir = tempfile::tempdir().unwrap();
    let (mut target, slow, ..) = target(dir.path());
    let disk = Latched::retried_when_full(slow.clone());
    Arc::get_mut(&mut target).unwrap().disks = vec![Arc::new(disk)];
    target.calm.store(true, Ordering::SeqCst);
    let apply = Op::Apply(vec![batch(&[0])]);
    assert!(matches!(target.execute(apply), Done::Apply(Ok(()))));
    target.writes[0].parts.mark(3 * PART, 4096);
    slow.meanwhile.set((Arc::downgrade(&target), meanwhile)).unwrap();
    prepare(&target, &slow);
    let first = target.execute(Op::SyncDisks);
    slow.broken.store(false, Ordering::SeqCst);
    target.writes[0].mark();
    let out = slow.out.lock().unwrap().clone();
    let unsure = target.arena.word(Word::Syncing);
    (out, [first, target.execute(Op::SyncDisks)], unsure)
}

const PART: u64 = 256 << 10;

#[test]
fn a_checkpoint_beside_clients_that_wait_for_commits_writes_out_before_it_syncs() {
    let (out, done, unsure) = written_out(|_, _| {}, |_| {});
    assert_eq!(out, [(0, 0), (3 * PART, 0)]);
    assert!(matches!(done, [Done::SyncDisks(Ok(())), Done::SyncDisks(Ok(()))]) && unsure == 0);
    let (out, ..) = written_out(|_, _| {}, |target| target.writes[0].parts.mark(PART, 1));
    assert_eq!(out, [(0, 0), (3 * PART, 0), (PART, 0)], "and what came meanwhile");
}

#[test]
fn a_checkpoint_that_must_be_quick_only_syncs() {
    let hurry = |target: &Target| target.calm.store(false, Ordering::SeqCst);
    let (out, done, _) =
        written_out(|target, _| target.calm.store(false, Ordering::SeqCst), |_| {});
    assert!(out.is_empty() && matches!(done[0], Done::SyncDisks(Ok(()))));
    let (out, done, _) = written_out(|_, _| {}, hurry);
    assert_eq!(out, [(0, 0)], "it finds out in the midst of it");
    assert!(matches!(done[0], Done::SyncDisks(Ok(()))));
}

/// The sync behind it might not be told.
#[test]
fn a_write_back_that_fails_while_it_is_written_out_is_final_and_stays_noted() {
    let (out, done, unsure) =
        written_out(|_, slow| slow.broken.store(true, Ordering::SeqCst), |_| {});
    assert_eq!(out, [(0, 0)]);
    assert!(matches!(done[0], Done::SyncDisks(Err((0, _)))) && unsure == 1);
    assert!(matches!(done[1], Done::SyncDisks(Err(_))), "though the disk says that it is well");
}
