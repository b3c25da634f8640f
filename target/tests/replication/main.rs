//! Source and target over TLS on this machine, with the real store: seeding a
//! disk in use, following it, cutting the line anywhere, refusing strangers.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use blockfilter::block::Export;
use blockfilter::config::{DiskConfig, GroupConfig};
use blockfilter::control::Mode;
use blockfilter::engine::Clock;
use blockfilter::engine::real::{RealClock, RealFiles};
use blockfilter::names::{Lsn, Name};
use replicator::enroll::{RpcClient, RpcError, join, pki_dir};
use replicator::frame::FrameBuf;
use replicator::identity::{Authority, Role, client_tls, joining_tls};
use replicator::session::{ErrorCode, Rpc, RpcReply};
use replicator::shipper::Shipper;
use replicator::status::{Shown, State};
use replicator::token::{TokenOrder, Tokens};
use replicator::transport::Channel;
use replicator::wire::Kind;
use rustix::thread::{sched_getaffinity, sched_getcpu};
use target::points::PointQuery;
use target::server::{ReplicaState, ServerConfig, TargetHandle, start};
use target::store::Store;
use uuid::Uuid;

mod source;

use source::MemSource;

struct Site {
    dir: tempfile::TempDir,
    clock: Arc<dyn Clock>,
    store: Arc<Store>,
    handle: TargetHandle,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(RealClock::new());
        let files = Arc::new(RealFiles);
        let t = dir.path().join("t");
        Authority::create(&RealFiles, &t.join("pki"), &[], clock.wall_us()).unwrap();
        let store = Arc::new(Store::create(files.clone(), &t, clock.clone()).unwrap());
        let handle = start(store.clone(), files, clock.clone(), &config(&t)).unwrap();
        Self { dir, clock, store, handle }
    }

    /// As a target that is started again, after `change` to the folder of the group `g`.
    fn restart_with(self, change: impl FnOnce(&Path)) -> Self {
        let Self { dir, clock, store, handle } = self;
        drop(handle);
        drop(store);
        let t = dir.path().join("t");
        change(&t.join("groups/g"));
        let files = Arc::new(RealFiles);
        let store = Arc::new(Store::open(files.clone(), &t, clock.clone()).unwrap());
        let handle = start(store.clone(), files, clock.clone(), &config(&t)).unwrap();
        Self { dir, clock, store, handle }
    }

    fn token(&self, ttl_seconds: u64) -> String {
        let t = self.dir.path().join("t");
        let authority = Authority::load(&RealFiles, &t.join("pki")).unwrap();
        let order = TokenOrder {
            ca_sha256: authority.ca_sha256().to_owned(),
            addrs: vec![self.handle.local_addr().to_string()],
            role: Role::Agent,
            ttl_seconds,
            reusable: false,
        };
        let random = ring::rand::SystemRandom::new();
        let tokens = Tokens::new(&t.join("tokens"));
        tokens.create(&RealFiles, &random, &order, self.clock.wall_us()).unwrap().encode()
    }

    fn agent(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        join(&RealFiles, &self.clock, &dir, &self.token(60), name).unwrap();
        dir
    }

    fn shipper(&self, agent: &Path, source: &MemSource, target: SocketAddr) -> Shipper {
        Shipper {
            group: group(source),
            targets: vec![target.to_string()],
            tls: client_tls(&RealFiles, &pki_dir(agent)).unwrap(),
            source: Arc::new(source.clone()),
            clock: self.clock.clone(),
            shown: Shown::default(),
            retry_us: 5_000,
        }
    }

    fn state(&self) -> Option<ReplicaState> {
        self.handle.status().first().map(|s| s.state)
    }

    fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = self.clock.mono_us() + 15_000_000;
        while !done() {
            let status = self.handle.status();
            assert!(self.clock.mono_us() < deadline, "timed out: {what}; {status:?}");
            thread::park_timeout(Duration::from_millis(2));
        }
    }

    fn until_holds(&self, lsn: Lsn) {
        self.until("the target holds everything", || {
            self.handle.status().first().is_some_and(|s| {
                s.state == ReplicaState::Consistent && s.recoverable.is_some_and(|r| r >= lsn)
            })
        });
    }

    /// Every usable point is exactly what the source had there.
    fn check_points(&self, source: &MemSource, at_most: usize) -> usize {
        let store = self.store.group(&name("g")).unwrap();
        let points = store.points(PointQuery { since_us: None, tagged: false, limit: None });
        let usable: Vec<_> = points.iter().filter(|p| p.usable).collect();
        for whole in &source.lock().whole {
            // Points of a copy under way never become usable below its end.
            let held = usable.iter().any(|p| p.lsn == *whole);
            assert!(held, "a complete copy was told of at {whole}");
        }
        let step = usable.len().div_ceil(at_most).max(1);
        for point in usable.iter().step_by(step) {
            let expected = source.at(point.lsn.0);
            for (disk, expected) in expected.iter().enumerate() {
                let view = store.view(disk as u8, point).unwrap();
                let mut found = vec![1; expected.len()];
                view.read(0, &mut found).unwrap();
                let differs = found.iter().zip(expected).position(|(a, b)| a != b);
                assert_eq!(differs, None, "disk {disk} at point {}", point.id());
            }
        }
        usable.len()
    }
}

fn config(t: &Path) -> ServerConfig {
    ServerConfig { listen: "127.0.0.1:0".into(), pki: t.join("pki"), tokens: t.join("tokens") }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn group(source: &MemSource) -> GroupConfig {
    let state = source.lock();
    let disks = state.disks.iter().enumerate().map(|(i, d)| DiskConfig {
        disk: name(&format!("d{i}")),
        path: "/nowhere".into(),
        uuid: Uuid::from_u128(i as u128 + 1),
        size_bytes: d.len() as u64,
    });
    GroupConfig {
        group: name("g"),
        uuid: Uuid::from_u128(0x0102_0304_0506_0708_0910),
        disks: disks.collect(),
        journal: "/nowhere".into(),
        journal_bytes: 1 << 30,
        chunk_bytes: 1 << 40,
        arena_bytes: 1 << 30,
        fuse: None,
    }
}

/// Noise that does not repeat.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

fn disks() -> Vec<Vec<u8>> {
    let mut random = Random(7);
    let mut big = vec![0; 6 << 20];
    for block in big.chunks_mut(4096).step_by(3) {
        block.fill(random.next() as u8 | 1);
    }
    vec![big, vec![9; 64 << 10]]
}

fn scribble(source: &MemSource, random: &mut Random, count: usize) {
    for _ in 0..count {
        let disk = random.below(2);
        let size = source.lock().disks[disk].len();
        let len = 512 * (1 + random.below(16));
        let offset = random.below((size - len) / 512) * 512;
        source.write(disk, offset, &vec![random.next() as u8; len]);
    }
}

/// Runs a shipper beside `act`.
fn shipping<T>(shipper: &Shipper, act: impl FnOnce() -> T) -> T {
    let shown = shipper.shown.clone();
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| shipping_(shipper, act)));
    told.unwrap_or_else(|panic| {
        eprintln!("the shipper: {:?}", shown.get(0));
        std::panic::resume_unwind(panic)
    })
}

fn shipping_<T>(shipper: &Shipper, act: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| shipper.run(&stop));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        stop.store(true, Ordering::SeqCst);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn a_disk_in_use_is_seeded_and_every_point_is_a_prefix() {
    let site = Site::new();
    let source = MemSource::new(disks());
    let agent = site.agent("a");
    let shipper = site.shipper(&agent, &source, site.handle.local_addr());
    shipping(&shipper, || {
        let mut random = Random(1);
        site.until("seeding", || {
            scribble(&source, &mut random, 3);
            site.state() == Some(ReplicaState::Consistent)
        });
        for _ in 0..20 {
            scribble(&source, &mut random, 20);
            site.until_holds(source.durable());
        }
        let marked = source.mark("before-update");
        site.until_holds(Lsn(marked));
        let status = shipper.shown.get(site.clock.mono_us());
        assert_eq!(status.state, State::Streaming);
        assert!(status.connected && status.consistent, "{status:?}");
        site.until("rpo of an idle disk is small", || {
            site.handle.status()[0].rpo_seconds.is_some_and(|rpo| rpo < 1.0)
        });
        site.until("the floor is told", || {
            let positions = source.lock().positions.clone();
            positions.ship_floor == positions.durable
        });
        site.until("the complete copy is told of", || {
            let state = source.lock();
            state.told == (state.positions.durable, true)
        });
        assert!(site.store.group(&name("g")).unwrap().has_tag(&name("before-update")));
        assert_eq!(source.lock().seeds, 1);
    });
    assert!(site.check_points(&source, 40) >= 20);
}

#[test]
fn a_line_cut_at_any_byte_makes_no_gap_and_no_repeat() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(42);
    eprintln!("SEED={seed}");
    let site = Site::new();
    let source = MemSource::new(disks());
    let agent = site.agent("a");
    let relay = Relay::start(site.handle.local_addr());
    let shipper = site.shipper(&agent, &source, relay.addr);
    let mut random = Random(seed);
    shipping(&shipper, || {
        // First while the copy runs, then while only the stream does.
        for _ in 0..2 {
            for _ in 0..20 {
                relay.cut_after(random.below(1 << 20) as u64);
                site.until("the line is cut", || {
                    scribble(&source, &mut random, 4);
                    relay.budget.load(Ordering::SeqCst) == 0
                });
            }
            relay.cut_after(u64::MAX);
            scribble(&source, &mut random, 20);
            site.until_holds(source.durable());
        }
    });
    assert_eq!(source.lock().seeds, 1, "a cut must not start the copy again");
    assert!(site.check_points(&source, 60) > 20);
}

#[test]
fn a_source_far_behind_reads_ahead_sends_what_is_before_damage_and_is_then_copied_again() {
    let site = Site::new();
    let source = MemSource::new(vec![vec![1; 64 << 20]]);
    source.lock().bytes_per_us = 1000;
    let agent = site.agent("a");
    let shipper = site.shipper(&agent, &source, site.handle.local_addr());
    shipping(&shipper, || site.until_holds(source.durable()));
    let mut random = Random(3);
    let mut write = |at: usize| {
        let data: Vec<u8> = (0..1 << 17).flat_map(|_| random.next().to_le_bytes()).collect();
        source.write(0, at % (60 << 20) / 512 * 512, &data)
    };
    // Epochs of 32 MiB: the damage is in the second.
    let ends: Vec<u64> = (0..100).map(|i| write(i * 1_000_000)).collect();
    source.lock().damaged_at = ends[49];
    shipping(&shipper, || site.until_holds(source.durable()));
    assert!(source.lock().read_ahead > 0);
    assert_eq!(source.lock().seeds, 2);
    let store = site.store.group(&name("g")).unwrap();
    let points = store.points(PointQuery { since_us: None, tagged: false, limit: None });
    assert!(points.iter().any(|p| p.usable && p.lsn.0 == ends[49]), "what is before it is there");
    assert!(site.check_points(&source, 4) >= 3);
}

#[test]
fn a_frozen_group_is_seeded_again_and_old_points_stay() {
    let site = Site::new();
    let source = MemSource::new(disks());
    let agent = site.agent("a");
    let shipper = site.shipper(&agent, &source, site.handle.local_addr());
    let mut random = Random(3);
    shipping(&shipper, || {
        site.until("seeding", || site.state() == Some(ReplicaState::Consistent));
        scribble(&source, &mut random, 50);
        site.until_holds(source.durable());
    });
    let before = site.check_points(&source, 20);
    scribble(&source, &mut random, 50);
    {
        let mut state = source.lock();
        state.positions.mode = Mode::Frozen;
        state.kept_from = state.positions.durable.0;
    }
    scribble(&source, &mut random, 50);
    source.lock().whole.clear();
    shipping(&shipper, || {
        site.until_holds(source.durable());
        site.until("the new copy is told of", || {
            let state = source.lock();
            state.told == (state.positions.durable, true)
        });
    });
    assert_eq!(source.lock().seeds, 2);
    assert!(site.check_points(&source, 40) > before);
}

#[test]
fn a_restarted_source_goes_on_and_one_that_forgot_is_never_merged() {
    let site = Site::new();
    let source = MemSource::new(disks());
    let agent = site.agent("a");
    let shipper = site.shipper(&agent, &source, site.handle.local_addr());
    let mut random = Random(4);
    shipping(&shipper, || {
        site.until("seeding", || site.state() == Some(ReplicaState::Consistent));
        scribble(&source, &mut random, 50);
        site.until_holds(source.durable());
    });
    {
        let mut state = source.lock();
        let end = (state.positions.incarnation, state.positions.durable);
        state.positions.history.push(end);
        state.positions.incarnation += 1;
    }
    scribble(&source, &mut random, 10);
    shipping(&shipper, || site.until_holds(source.durable()));
    site.check_points(&source, 20);
    let held = site.handle.status()[0].last;
    {
        // The disk lied: the last writes are gone.
        let mut state = source.lock();
        let end = state.written[state.written.len() - 5].end;
        state.positions.history.push((2, Lsn(end)));
        state.positions.incarnation += 1;
        (state.positions.durable, state.positions.admitted) = (Lsn(end), Lsn(end));
    }
    shipping(&shipper, || {
        site.until("divergence is seen", || site.state() == Some(ReplicaState::Diverged));
        site.until("it is told", || {
            shipper.shown.get(site.clock.mono_us()).state == State::Diverged
        });
    });
    assert_eq!(source.lock().told, (Lsn(0), false), "what it holds is not what the disks hold");
    assert_eq!(site.handle.status()[0].last, held);
}

/// An agent whose source has a complete copy at the target, and was told so.
fn copied(site: &Site) -> (PathBuf, MemSource) {
    let source = MemSource::new(disks());
    let agent = site.agent("a");
    let shipper = site.shipper(&agent, &source, site.handle.local_addr());
    shipping(&shipper, || {
        site.until("the complete copy is told of", || source.lock().told.1);
    });
    (agent, source)
}

/// Goes as the other does until it is held, and stands still then.
#[derive(Debug)]
struct HeldClock {
    inner: Arc<dyn Clock>,
    /// Where it stands still; 0: it goes.
    at: AtomicU64,
    /// How often it was read there.
    reads: AtomicU64,
}

impl Clock for HeldClock {
    fn mono_us(&self) -> u64 {
        match self.at.load(Ordering::SeqCst) {
            0 => self.inner.mono_us(),
            at => {
                self.reads.fetch_add(1, Ordering::SeqCst);
                at
            }
        }
    }

    fn wall_us(&self) -> u64 {
        self.inner.wall_us()
    }
}

/// What came in a rest beside full processors is sent afterwards, or in it where `journal_bytes` are few.
fn rest_beside_full_processors(journal_bytes: u64, rests: bool) {
    let site = Site::new();
    let (agent, source) = copied(&site);
    let (inner, [at, reads]) = (site.clock.clone(), Default::default());
    let clock = Arc::new(HeldClock { inner, at, reads });
    let mut shipper = site.shipper(&agent, &source, site.handle.local_addr());
    shipper.clock = clock.clone();
    shipper.group.journal_bytes = journal_bytes;
    source.lock().full = true;
    shipping(&shipper, || {
        let (began, looks) = (site.clock.mono_us(), source.lock().looks);
        site.until("it knows of a young copy and has long asked for the processors", || {
            source.write(0, 0, &[7; 512]);
            let rpo = shipper.shown.get(0).rpo_seconds;
            let asked = source.lock().looks >= looks + 3 || !rests;
            asked && site.clock.mono_us() > began + 1_000_000 && rpo.is_some_and(|rpo| rpo < 0.5)
        });
        let rest = (site.clock.mono_us() / 40_000 + 1) * 40_000;
        clock.at.store(rest + 5_000, Ordering::SeqCst);
        // What it was doing when the clock stopped is over after a few of its turns.
        let turns = |count| {
            let until = clock.reads.load(Ordering::SeqCst) + count;
            site.until("it looks", || clock.reads.load(Ordering::SeqCst) >= until);
        };
        turns(30);
        source.write(0, 4096, &[8; 4096]);
        // A mark ends its epoch whatever the clock says.
        let end = Lsn(source.mark("meanwhile"));
        if !rests {
            site.until_holds(end);
        }
        turns(60);
        let held = site.handle.status().first().and_then(|s| s.recoverable);
        // Where all of this took long it may be too old to rest.
        let old = shipper.shown.get(0).rpo_seconds.is_some_and(|rpo| rpo >= 1.0);
        assert!(!rests || old || held.is_some_and(|held| held < end), "{held:?} {end}");
        clock.at.store(0, Ordering::SeqCst);
        site.until_holds(end);
        assert!(rests || source.lock().looks == looks, "who never rests does not ask");
    });
    assert!(site.check_points(&source, 4) >= 2);
}

#[test]
fn a_copy_beside_full_processors_rests_and_then_sends_what_came_meanwhile() {
    rest_beside_full_processors(1 << 30, true);
}

#[test]
fn a_copy_beside_full_processors_does_not_rest_where_the_journal_has_no_room() {
    rest_beside_full_processors(8 * 512, false);
}

/// Has a complete copy age: something is admitted that never becomes durable. How old it was, seconds, when it was
/// no longer in the background, and how many sessions that were.
fn leaves_the_background(journal_bytes: u64) -> (Option<f64>, u64) {
    let site = Site::new();
    let (agent, source) = copied(&site);
    source.lock().background.clear();
    source.lock().refuses = 2;
    let mut shipper = site.shipper(&agent, &source, site.handle.local_addr());
    shipper.group.journal_bytes = journal_bytes;
    shipping(&shipper, || {
        // What was refused is tried again.
        let last = || source.lock().background.last().copied();
        site.until("it is in the background", || last() == Some(true));
        source.lock().positions.admitted.0 += 4096;
        site.until("it is not any more", || last() == Some(false));
        let shown = shipper.shown.get(0);
        (shown.rpo_seconds, shown.sessions)
    })
}

#[test]
fn a_copy_is_in_the_background_until_it_is_old() {
    let (age, sessions) = leaves_the_background(1 << 30);
    assert_eq!(sessions, 1, "or another session left it");
    assert!(age.is_some_and(|age| age >= 1.0), "{age:?}: it may have starved, but not before");
}

#[test]
fn a_copy_is_not_in_the_background_where_the_journal_has_no_room() {
    let (age, sessions) = leaves_the_background(4 * 4096 - 1);
    assert_eq!(sessions, 1, "or another session left it");
    assert!(age.is_none_or(|age| age < 2.5), "{age:?}: not because it is old");
}

/// Names of the threads of this process that may use some processors, but not this one.
fn off(cpu: u32) -> BTreeSet<String> {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let statuses = threads
        .filter_map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).ok());
    let field = |status: &str, name: &str| {
        status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()))
    };
    let uses = |list: &str| {
        list.split(',').any(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            (first.parse().unwrap()..=last.parse().unwrap()).contains(&cpu)
        })
    };
    let off = |status: &String| !uses(&field(status, "Cpus_allowed_list:").unwrap());
    statuses.filter(off).filter_map(|status| field(&status, "Name:")).collect()
}

#[test]
fn a_copy_leaves_free_what_the_filter_holds_at_both_ends_until_it_is_old() {
    let site = Site::new();
    let (agent, source) = copied(&site);
    let shipper = site.shipper(&agent, &source, site.handle.local_addr());
    let cpu = u32::try_from(sched_getcpu()).unwrap();
    if sched_getaffinity(None).unwrap().count() < 2 {
        return;
    }
    shipping(&shipper, || {
        site.until("it is in session", || site.state() == Some(ReplicaState::Consistent));
        assert_eq!(off(cpu), BTreeSet::new());
        source.lock().positions.held_cpu = Some(cpu);
        site.until("both threads of the target and the source's left it", || {
            let off = off(cpu);
            off.len() == 3 && off.contains("sf-session") && off.contains("sf-keeper")
        });
        source.lock().positions.held_cpu = None;
        site.until("they are back", || off(cpu).is_empty());
        source.lock().positions.held_cpu = Some(cpu);
        site.until("they left it", || off(cpu).len() == 3);
        source.lock().positions.admitted.0 += 4096;
        site.until("the copy is old, and they are back", || off(cpu).is_empty());
    });
}

/// Its place at the target is another's now, so what it was told of its copy may not hold.
#[test]
fn a_session_that_is_replaced_is_told_and_takes_back_what_was_held() {
    let site = Site::new();
    let (agent, source) = copied(&site);
    let shipper = site.shipper(&agent, &source, site.handle.local_addr());
    shipping(&shipper, || {
        site.until("it is in session", || site.state() == Some(ReplicaState::Consistent));
        let before = source.lock().taken_back;
        let second = site.shipper(&agent, &source, site.handle.local_addr());
        shipping(&second, || {
            site.until("it is taken back", || source.lock().taken_back > before);
        });
    });
}

#[test]
fn a_target_that_cannot_read_its_copy_takes_back_what_it_held() {
    let site = Site::new();
    let (agent, source) = copied(&site);
    let site = site.restart_with(|group| {
        for entry in std::fs::read_dir(group).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::write(path, b"not what it was").unwrap();
            }
        }
    });
    let shipper = site.shipper(&agent, &source, site.handle.local_addr());
    shipping(&shipper, || {
        site.until("it is taken back", || source.lock().told == (Lsn(0), false));
    });
}

/// Another machine that answers at its address has no copy of ours, whatever it has.
#[test]
fn a_target_with_another_authority_takes_back_what_ours_held() {
    let site = Site::new();
    let (agent, source) = copied(&site);
    let other = Site::new();
    let shipper = site.shipper(&agent, &source, other.handle.local_addr());
    shipping(&shipper, || {
        site.until("it is taken back", || source.lock().told == (Lsn(0), false));
    });
}

#[test]
fn a_newer_generation_takes_a_seed_over_and_the_older_one_is_fenced() {
    let site = Site::new();
    let source = MemSource::new(disks());
    let agent = site.agent("a");
    let relay = Relay::start(site.handle.local_addr());
    let shipper = site.shipper(&agent, &source, relay.addr);
    relay.cut_after(1 << 20);
    shipping(&shipper, || {
        site.until("the copy is cut", || {
            site.state() == Some(ReplicaState::Seeding) && relay.budget.load(Ordering::SeqCst) == 0
        });
    });
    source.lock().positions.generation = 2;
    relay.cut_after(u64::MAX);
    shipping(&shipper, || {
        site.until("the newer generation is known", || site.handle.status()[0].generation == 2);
        site.until_holds(source.durable());
    });
    assert_eq!(source.lock().seeds, 1, "the copy went on");
    source.lock().positions.generation = 1;
    shipping(&shipper, || {
        site.until("the older one is refused", || shipper.shown.get(0).state == State::Refused);
    });
    assert_eq!(source.lock().told, (Lsn(0), false));
    assert_eq!(site.handle.status()[0].generation, 2);
}

#[test]
fn a_token_admits_one_machine_and_strangers_get_nothing() {
    let site = Site::new();
    let (a, b) = (site.dir.path().join("a"), site.dir.path().join("b"));
    let token = site.token(60);
    let joined = join(&RealFiles, &site.clock, &a, &token, "Host A").unwrap();
    assert!(joined.agent.starts_with("hosta-"), "{}", joined.agent);
    let again = join(&RealFiles, &site.clock, &a, &token, "Host A");
    assert!(matches!(again, Err(RpcError::Joined(_))));
    let used = join(&RealFiles, &site.clock, &b, &token, "b").unwrap_err();
    assert_eq!(used.code(), Some(ErrorCode::Token));
    // Interrupted before the certificate was stored: the same token completes it.
    std::fs::remove_file(a.join("agent.json")).unwrap();
    assert_eq!(join(&RealFiles, &site.clock, &a, &token, "x").unwrap().agent, joined.agent);

    let other = site.agent("other");
    let source = MemSource::new(disks());
    let shipper = site.shipper(&a, &source, site.handle.local_addr());
    shipping(&shipper, || site.until("there", || site.state().is_some()));
    let stranger = site.shipper(&other, &source, site.handle.local_addr());
    shipping(&stranger, || {
        site.until("refused", || stranger.shown.get(0).state == State::Refused);
    });
    assert_eq!(source.lock().told, (Lsn(0), false), "the copy there is another's");
    let config = replicator::enroll::AgentConfig::load(&RealFiles, &other).unwrap().unwrap();
    let mut client = RpcClient::connect(&RealFiles, &site.clock, &other, &config).unwrap();
    let check = Rpc::CheckGroup { group: name("g"), uuid: None };
    assert_eq!(client.ask(&check).unwrap_err().code(), Some(ErrorCode::NameTaken));
    let free = Rpc::CheckGroup { group: name("free"), uuid: None };
    assert_eq!(client.ask(&free).unwrap(), RpcReply::Group { exists: false });
}

#[test]
fn a_peer_without_certificate_may_only_join_and_say_little() {
    let site = Site::new();
    let pki = site.dir.path().join("t/pki");
    let ca = Authority::load(&RealFiles, &pki).unwrap().ca_sha256().to_owned();
    let addr = site.handle.local_addr().to_string();
    let limit = Duration::from_secs(10);
    let dial =
        || Channel::connect(&addr, joining_tls(&ca).unwrap(), site.clock.clone(), limit).unwrap();
    let mut asking = dial();
    let question = Rpc::HasTag { group: name("g"), tag: name("t") };
    asking.send(&FrameBuf::message(Kind::Rpc, &question).unwrap()).unwrap();
    let RpcReply::Refused(why) = asking.recv(limit).unwrap().parse().unwrap() else {
        panic!("a stranger was answered");
    };
    assert_eq!(why.code, ErrorCode::NotAuthorised);
    let mut talking = dial();
    let enrol = Rpc::Enrol { secret: "x".repeat(100_000), csr: String::new(), host: String::new() };
    talking.send(&FrameBuf::message(Kind::Rpc, &enrol).unwrap()).unwrap();
    assert!(talking.recv(limit).is_err(), "more than 64 KiB was read");
    assert!(site.store.groups().is_empty());
}

#[test]
fn strangers_that_hold_connections_keep_no_agent_and_no_joining_machine_out() {
    let site = Site::new();
    let agent = site.agent("a");
    let config = replicator::enroll::AgentConfig::load(&RealFiles, &agent).unwrap().unwrap();
    let silent: Vec<TcpStream> =
        (0..300).map(|_| TcpStream::connect(site.handle.local_addr()).unwrap()).collect();
    let mut client = RpcClient::connect(&RealFiles, &site.clock, &agent, &config).unwrap();
    let question = Rpc::CheckGroup { group: name("g"), uuid: None };
    assert_eq!(client.ask(&question).unwrap(), RpcReply::Group { exists: false });
    site.agent("b");
    // The oldest were cut off for the others.
    let mut oldest = &silent[0];
    oldest.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert!(matches!(oldest.read(&mut [0]), Ok(0)));
    let more: Vec<TcpStream> =
        (0..100).map(|_| TcpStream::connect(site.handle.local_addr()).unwrap()).collect();
    site.until("all are cut off for newer ones", || {
        let newest = silent.last().unwrap();
        newest.set_nonblocking(true).unwrap();
        matches!((&*newest).read(&mut [0]), Ok(0))
    });
    assert_eq!(client.ask(&question).unwrap(), RpcReply::Group { exists: false }, "not agents");
    drop(more);
}

/// Forwards connections; after `budget` bytes it cuts them.
struct Relay {
    addr: SocketAddr,
    budget: Arc<AtomicU64>,
}

impl Relay {
    fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let budget = Arc::new(AtomicU64::new(u64::MAX));
        let shared = budget.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(to) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let budget = shared.clone();
                    thread::spawn(move || forward(from, to, &budget));
                }
            }
        });
        Self { addr, budget }
    }

    fn cut_after(&self, bytes: u64) {
        self.budget.store(bytes.max(1), Ordering::SeqCst);
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, budget: &AtomicU64) {
    let mut buf = [0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buf) {
        let mut allowed = count as u64;
        let took = budget.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
            allowed = left.min(count as u64);
            Some(if left == u64::MAX { left } else { left - allowed })
        });
        let _ = took;
        if to.write_all(&buf[..allowed as usize]).is_err() || allowed < count as u64 {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
