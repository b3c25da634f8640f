//! A source in memory that knows what every point must look like.

use blockfilter::crc32c;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockfilter::block::{Export, SECTOR};
use blockfilter::engine::record::Rng;
use blockfilter::engine::{Clock, Files};
use blockfilter::journal::format::{RecDesc, RecOp};
use blockfilter::names::{Lsn, Name};
use replicator::wire::{CodecId, FRAME_EPOCH_END, FRAME_MARK, FrameHdr, Kind};
use uuid::Uuid;

use super::super::format::REGION;
use super::super::{DiskMeta, FrameBuf, GroupMeta, GroupStore, Store};
use crate::points::{Point, PointQuery};

/// A clock that is set.
#[derive(Debug, Default)]
pub(crate) struct TestClock(pub(crate) AtomicU64);

impl Clock for TestClock {
    fn mono_us(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    fn wall_us(&self) -> u64 {
        1_700_000_000_000_000 + self.0.load(Ordering::Relaxed)
    }
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// Two disks: one of an odd number of sectors, one over many regions.
pub(crate) const SIZES: [u64; 2] = [3 * REGION + 3 * SECTOR, 40 * REGION];

pub(crate) fn meta() -> GroupMeta {
    let disk = |i: usize| DiskMeta {
        disk: name(&format!("d{i}")),
        uuid: Uuid::from_u128(i as u128),
        size_bytes: SIZES[i],
    };
    GroupMeta {
        group: name("g"),
        uuid: Uuid::from_u128(0x1122_3344_5566_7788 << 64),
        owner: "agent".to_owned(),
        disks: vec![disk(0), disk(1)],
    }
}

pub(crate) fn group_id() -> u64 {
    replicator::session::group_id(&meta().uuid)
}

pub(crate) fn dir() -> &'static std::path::Path {
    std::path::Path::new("/t")
}

pub(crate) fn create(files: &Arc<dyn Files>) -> (Store, Arc<GroupStore>) {
    let store = Store::create(Arc::clone(files), dir(), Arc::new(TestClock::default())).unwrap();
    let group = store.create_group(meta()).unwrap();
    (store, group)
}

pub(crate) fn reopen(files: &Arc<dyn Files>) -> (Store, Arc<GroupStore>) {
    let store = Store::open(Arc::clone(files), dir(), Arc::new(TestClock::default())).unwrap();
    assert!(store.unreadable().is_empty(), "{:?}", store.unreadable());
    let group = store.group(&name("g")).unwrap();
    (store, group)
}

/// What the disks hold: a stamp per sector, 0 for zeroes.
pub(crate) type Content = [Vec<u64>; 2];

/// The source.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) rng: Rng,
    pub(crate) now: Content,
    pub(crate) lsn: u64,
    pub(crate) incarnation: u64,
    pub(crate) generation: u64,
    pub(crate) wall_us: u64,
    stamp: u64,
    /// What every epoch's end must look like, oldest first.
    pub(crate) history: Vec<(Lsn, u64, Arc<Content>)>,
}

pub(crate) fn bytes_of(stamp: u64) -> [u8; SECTOR as usize] {
    let mut sector = [0; SECTOR as usize];
    for (i, word) in sector.chunks_mut(8).enumerate() {
        let value =
            if stamp == 0 { 0 } else { stamp.wrapping_mul(0x9e37_79b9).wrapping_add(i as u64 / 8) };
        word.copy_from_slice(&value.to_le_bytes());
    }
    sector
}

impl Source {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            rng: Rng::new(seed),
            now: SIZES.map(|size| vec![0; (size / SECTOR) as usize]),
            lsn: 4096,
            incarnation: 1,
            generation: 1,
            wall_us: 1_000_000,
            stamp: 0,
            history: Vec::new(),
        }
    }

    /// A range that likes edges: of blocks, regions and the disk.
    fn range(&mut self, disk: usize, long: bool) -> (usize, usize) {
        let sectors = self.now[disk].len() as u64;
        let edges = [0, 2048, sectors - 24, 4096, 9];
        let edge = edges[self.rng.below(edges.len() as u64) as usize];
        let first = (edge + self.rng.below(40)).saturating_sub(20).min(sectors - 1);
        let most = match self.rng.below(8) {
            0 => 300,
            1 if long => sectors,
            2 => 2100,
            _ => 17,
        };
        let len = 1 + self.rng.below(most.min(sectors - first));
        (first as usize, len as usize)
    }

    /// Does one random write, zero or trim; adds its record.
    fn change(&mut self, descs: &mut Vec<RecDesc>, payload: &mut Vec<u8>) {
        let disk = self.rng.below(2) as usize;
        let op = match self.rng.below(6) {
            0 => RecOp::Zero,
            1 => RecOp::Trim,
            _ => RecOp::Write,
        };
        let (first, len) = self.range(disk, op != RecOp::Write);
        let at = payload.len();
        for sector in first..first + len {
            self.stamp += 1;
            self.now[disk][sector] = if op == RecOp::Write { self.stamp } else { 0 };
            if op == RecOp::Write {
                payload.extend_from_slice(&bytes_of(self.stamp));
            }
        }
        descs.push(RecDesc {
            op: op as u8,
            disk: disk as u8,
            len: ((len as u64 * SECTOR) as u32).into(),
            offset: (first as u64 * SECTOR).into(),
            lsn: self.lsn.into(),
            payload_off: if op == RecOp::Write { at as u32 } else { 0 }.into(),
            crc: if op == RecOp::Write { crc32c::crc32c(&payload[at..]) } else { 0 }.into(),
            ..Default::default()
        });
        self.lsn += 1 + self.rng.below(3);
    }

    /// An epoch of `frames` frames of about `changes` records each.
    pub(crate) fn epoch(
        &mut self,
        frames: usize,
        changes: usize,
        tag: Option<&str>,
    ) -> Vec<FrameBuf> {
        let mut out = Vec::new();
        for i in 0..frames {
            let (mut descs, mut payload) = (Vec::new(), Vec::new());
            let from = self.lsn;
            for _ in 0..changes {
                self.change(&mut descs, &mut payload);
            }
            let end = i + 1 == frames;
            if let Some(tag) = tag.filter(|_| end) {
                descs.push(RecDesc {
                    op: RecOp::Mark as u8,
                    len: (tag.len() as u32).into(),
                    lsn: self.lsn.into(),
                    payload_off: (payload.len() as u32).into(),
                    crc: crc32c::crc32c(tag.as_bytes()).into(),
                    ..Default::default()
                });
                payload.extend_from_slice(tag.as_bytes());
            }
            self.lsn += 1;
            let mut flags = if end { FRAME_EPOCH_END } else { 0 };
            if end && tag.is_some() {
                flags |= FRAME_MARK;
            }
            out.push(self.frame(Kind::Epoch, flags, from, &descs, &payload, (0, 0)));
        }
        self.wall_us += 100_000;
        self.history.push((Lsn(self.lsn), self.incarnation, Arc::new(self.now.clone())));
        out
    }

    fn frame(
        &mut self,
        kind: Kind,
        flags: u8,
        from: u64,
        descs: &[RecDesc],
        payload: &[u8],
        cursor: (u32, u64),
    ) -> FrameBuf {
        let zstd = self.rng.below(2) == 0 && !payload.is_empty();
        let packed = if zstd { zstd::bulk::compress(payload, 1).unwrap() } else { Vec::new() };
        let zstd = zstd && packed.len() < payload.len();
        let hdr = FrameHdr {
            kind: kind as u8,
            flags,
            codec: if zstd { CodecId::Zstd } else { CodecId::None } as u8,
            group_id: group_id().into(),
            generation: self.generation.into(),
            incarnation: self.incarnation.into(),
            lsn_from: from.into(),
            lsn_to: if kind == Kind::Copy { from } else { self.lsn }.into(),
            wall_us: self.wall_us.into(),
            raw_len: (payload.len() as u32).into(),
            cursor_disk: cursor.0.into(),
            cursor: cursor.1.into(),
            ..Default::default()
        };
        FrameBuf::seal(hdr, descs, if zstd { &packed } else { payload })
    }

    /// A Copy frame of at most `len` bytes from a cursor on, as the disks are now;
    /// in a first seed zeroes are left out. Moves the cursor; None at the end.
    pub(crate) fn copy(
        &mut self,
        s: Lsn,
        first_seed: bool,
        cursor: &mut (u32, u64),
        len: u64,
    ) -> Option<FrameBuf> {
        let disk = cursor.0 as usize;
        if disk == SIZES.len() {
            return None;
        }
        let end = (cursor.1 + len).min(SIZES[disk]);
        let (mut descs, mut payload) = (Vec::new(), Vec::new());
        let sectors = (cursor.1 / SECTOR) as usize..(end / SECTOR) as usize;
        let zero = |content: &Content, i: usize| content[disk][i] == 0;
        let mut at = sectors.start;
        while at < sectors.end {
            let start = at;
            let empty = zero(&self.now, start);
            while at < sectors.end && zero(&self.now, at) == empty {
                at += 1;
            }
            let begin = payload.len();
            if !empty {
                (start..at).for_each(|i| payload.extend_from_slice(&bytes_of(self.now[disk][i])));
            } else if first_seed {
                continue;
            }
            descs.push(RecDesc {
                op: if empty { RecOp::Zero } else { RecOp::Write } as u8,
                disk: disk as u8,
                len: (((at - start) as u64 * SECTOR) as u32).into(),
                offset: (start as u64 * SECTOR).into(),
                lsn: s.0.into(),
                payload_off: if empty { 0 } else { begin as u32 }.into(),
                crc: if empty { 0 } else { crc32c::crc32c(&payload[begin..]) }.into(),
                ..Default::default()
            });
        }
        *cursor = if end == SIZES[disk] { (cursor.0 + 1, 0) } else { (cursor.0, end) };
        Some(self.frame(Kind::Copy, 0, s.0, &descs, &payload, *cursor))
    }

    /// Seeds all at once, without writes meanwhile.
    pub(crate) fn seed(&mut self, group: &GroupStore) {
        let first = group.newest().is_none();
        let s = Lsn(self.lsn);
        group.begin_seed(s, self.incarnation, self.generation).unwrap();
        let mut cursor = (0, 0);
        while let Some(frame) = self.copy(s, first, &mut cursor, 2 * REGION) {
            group.append_copy(&frame).unwrap();
        }
        assert_eq!(group.sync_copy().unwrap(), cursor);
        group.end_seed(s).unwrap();
        self.history.push((s, self.incarnation, Arc::new(self.now.clone())));
    }

    /// Every usable point of the store shows what the disks held there.
    pub(crate) fn check(&mut self, group: &GroupStore) {
        let points = group.points(PointQuery::default());
        for point in points.iter().filter(|p| p.usable) {
            self.check_point(group, point);
        }
    }

    pub(crate) fn expected(&self, point: &Point) -> Arc<Content> {
        let wanted = |h: &&(Lsn, u64, Arc<Content>)| (h.0, h.1) == (point.lsn, point.incarnation);
        let found = self.history.iter().rev().find(wanted);
        Arc::clone(&found.unwrap_or_else(|| panic!("nothing was at {}", point.id())).2)
    }

    pub(crate) fn check_point(&mut self, group: &GroupStore, point: &Point) {
        let content = self.expected(point);
        for disk in 0..2 {
            let view = group.view(disk, point).unwrap();
            let what = format!("{} disk {disk}", point.id());
            check_export(&view, &content[usize::from(disk)], &mut self.rng, &what);
        }
    }
}

/// Reads around all edges and at random places, and compares extents.
pub(crate) fn check_export(export: &dyn Export, sectors: &[u64], rng: &mut Rng, what: &str) {
    let count = sectors.len();
    let mut windows = vec![(0, 80), (2000, 100), (4070, 60), (count - 60, 60)];
    for _ in 0..10 {
        windows.push((rng.below(count as u64 - 200) as usize, 1 + rng.below(200) as usize));
    }
    for (first, len) in windows {
        let mut bytes = vec![0xaa; len * SECTOR as usize];
        export.read(first as u64 * SECTOR, &mut bytes).unwrap();
        for (i, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            let want = bytes_of(sectors[first + i]);
            assert!(sector == want, "{what}: sector {} differs", first + i);
        }
    }
    let mut at = 0;
    while at < count as u64 * SECTOR {
        let extents = export.extents(at, count as u64 * SECTOR - at, 7).unwrap();
        assert!(!extents.is_empty() && extents.windows(2).all(|w| w[0].zero != w[1].zero));
        for extent in extents {
            let range = (at / SECTOR) as usize..((at + extent.len) / SECTOR) as usize;
            let zero = sectors[range].iter().all(|s| *s == 0);
            assert!(!extent.zero || zero, "{what}: data at {at} is said to be zeroes");
            at += extent.len;
        }
    }
    assert_eq!(at, count as u64 * SECTOR);
}
