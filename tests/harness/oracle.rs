//! The oracle: what a disk may contain, given what was written to it and when
//! each write was answered. (pure)
//!
//! Every sector of every write carries (disk, sector, id of the write). Several
//! writers run at once, so the order of writes in flight together is not known;
//! what is known is that a write issued after another was answered comes after
//! it. A state of the disks is a *prefix* only if:
//!
//! 1. every sector is whole and shows a write that covered it (or the start);
//! 2. take the latest issue time T among all writes that are visible on any
//!    disk: each write answered before T is included, so no sector shows
//!    something that was over before such a write to it was issued.
//!
//! Rule 2 over all disks together is the cross-disk claim: a hole is a write that
//! is missing although one issued after its answer is there.
//! Times are ticks of one counter. A write without an answer may be included or
//! not, but is over once its server is known to be gone.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One write, zero or trim.
#[derive(Clone, Copy, Debug)]
struct Act {
    disk: usize,
    first: u64,
    count: u64,
    zero: bool,
    issued: u64,
    /// When it was answered.
    answered: Option<u64>,
    /// From when on it can no longer take effect.
    over: Option<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    tick: u64,
    acts: Vec<Act>,
}

/// Everything written to the disks of one group.
#[derive(Debug, Default)]
pub struct History {
    inner: Mutex<Inner>,
    stamped: bool,
}

/// Number of a write in a [`History`]; 0 is the content from before.
pub type ActId = u64;

/// What a checked state contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Everything answered before this tick is included.
    pub until: u64,
    /// Writes that are visible somewhere.
    pub visible: usize,
}

impl History {
    /// Nothing written yet, to disks of zeroes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing written yet, to disks that hold [`start_image`].
    pub fn stamped() -> Self {
        Self { stamped: true, ..Self::default() }
    }

    /// A request is about to be sent.
    pub fn issue(&self, disk: usize, first: u64, count: u64, zero: bool) -> ActId {
        let mut inner = self.lock();
        inner.tick += 1;
        let issued = inner.tick;
        inner.acts.push(Act { disk, first, count, zero, issued, answered: None, over: None });
        inner.acts.len() as ActId
    }

    /// It was answered.
    pub fn answered(&self, id: ActId) {
        let mut inner = self.lock();
        inner.tick += 1;
        let now = inner.tick;
        let act = &mut inner.acts[id as usize - 1];
        (act.answered, act.over) = (Some(now), Some(now));
    }

    /// It was never answered, and its server has been replaced by another.
    pub fn abandoned(&self, id: ActId) {
        let mut inner = self.lock();
        inner.tick += 1;
        let now = inner.tick;
        inner.acts[id as usize - 1].over = Some(now);
    }

    /// The present: everything answered so far was answered before it.
    pub fn now(&self) -> u64 {
        let mut inner = self.lock();
        inner.tick += 1;
        inner.tick
    }

    /// Requests issued so far.
    pub fn issued(&self) -> usize {
        self.lock().acts.len()
    }

    /// Checks that `disks` together are a prefix that includes everything
    /// answered before `floor`.
    pub fn check(&self, disks: &[&[u8]], floor: u64) -> Result<Seen, String> {
        let acts = self.lock().acts.clone();
        let mut shown: Vec<Vec<Shown>> = Vec::with_capacity(disks.len());
        for (disk, data) in disks.iter().enumerate() {
            let sectors = data.chunks_exact(SECTOR).enumerate();
            let parsed: Result<Vec<Shown>, String> =
                sectors.map(|(at, bytes)| parse(disk, at as u64, bytes, &acts)).collect();
            shown.push(parsed?);
        }
        let visible: std::collections::BTreeSet<ActId> =
            shown.iter().flatten().filter_map(|s| s.id.filter(|id| *id > 0)).collect();
        let newest = visible.iter().map(|id| acts[*id as usize - 1].issued).max().unwrap_or(0);
        let until = floor.max(newest);
        for (disk, sectors) in shown.iter().enumerate() {
            check_disk(disk, sectors, &acts, until, self.stamped)?;
        }
        Ok(Seen { until, visible: visible.len() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A sector's content: the write it shows, or None for zeroes.
#[derive(Clone, Copy, Debug)]
struct Shown {
    id: Option<ActId>,
}

fn parse(disk: usize, sector: u64, bytes: &[u8], acts: &[Act]) -> Result<Shown, String> {
    if bytes.iter().all(|b| *b == 0) {
        return Ok(Shown { id: None });
    }
    let place = format!("disk {disk}, sector {sector}");
    let (first, rest) = bytes.split_at(STAMP);
    if rest.chunks_exact(STAMP).any(|part| part != first) {
        return Err(format!("{place} is torn or foreign"));
    }
    let word = |n: usize| u64::from_le_bytes(first[n * 8..n * 8 + 8].try_into().unwrap_or([0; 8]));
    if (word(0), word(1), word(2)) != (MAGIC, disk as u64, sector) {
        let (d, s) = (word(1), word(2));
        return Err(format!("{place} holds what belongs to disk {d}, sector {s}"));
    }
    let id = word(3);
    if id == 0 {
        return Ok(Shown { id: Some(0) });
    }
    match acts.get(id as usize - 1) {
        Some(a) if !a.zero && a.disk == disk && (a.first..a.first + a.count).contains(&sector) => {
            Ok(Shown { id: Some(id) })
        }
        _ => Err(format!("{place} shows write {id}, which did not cover it")),
    }
}

fn check_disk(
    disk: usize,
    sectors: &[Shown],
    acts: &[Act],
    until: u64,
    stamped: bool,
) -> Result<(), String> {
    // For each sector: the newest issue time among the writes that must be
    // included, and the latest end among zeroes (a zero does not say which it is).
    let mut required = vec![(0, 0); sectors.len()];
    let start = |sector| if stamped && starts_stamped(sector) { None } else { Some(0) };
    let mut zeroes: Vec<Option<u64>> = (0..sectors.len() as u64).map(start).collect();
    for (index, act) in acts.iter().enumerate().filter(|(_, act)| act.disk == disk) {
        let range = act.first as usize..((act.first + act.count) as usize).min(sectors.len());
        if act.zero {
            let over = act.over.unwrap_or(u64::MAX);
            zeroes[range.clone()].iter_mut().for_each(|z| *z = Some(over).max(*z));
        }
        if act.answered.is_some_and(|at| at < until) {
            let this = (act.issued, index as ActId + 1);
            required[range].iter_mut().for_each(|r| *r = this.max(*r));
        }
    }
    for (sector, shown) in sectors.iter().enumerate() {
        let over = match shown.id {
            None => zeroes[sector].ok_or_else(|| {
                format!("disk {disk}, sector {sector} lost what it held at the start")
            })?,
            Some(0) => 0,
            Some(id) => acts[id as usize - 1].over.unwrap_or(u64::MAX),
        };
        let (issued, missing) = required[sector];
        if over < issued {
            let what = acts[missing as usize - 1];
            return Err(format!(
                "hole: disk {disk}, sector {sector} shows {:?}, over at {over}, but write \
                 {missing} ({what:?}) was answered before {until} and must be included",
                shown.id
            ));
        }
    }
    Ok(())
}

/// The bytes of one sector of write `id`.
pub fn stamp(disk: usize, sector: u64, id: ActId) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for part in bytes.chunks_exact_mut(STAMP) {
        for (word, value) in [MAGIC, disk as u64, sector, id].into_iter().enumerate() {
            part[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

/// The payload of write `id` of `count` sectors from `first`.
pub fn payload(disk: usize, first: u64, count: u64, id: ActId) -> Vec<u8> {
    (first..first + count).flat_map(|sector| stamp(disk, sector, id)).collect()
}

/// A disk from before the first write: stamped, with every fourth MiB a hole.
pub fn start_image(disk: usize, size: u64) -> BTreeMap<u64, Vec<u8>> {
    let sectors = size / SECTOR as u64;
    (0..sectors)
        .step_by(MEBIBYTE as usize)
        .filter(|first| starts_stamped(*first))
        .map(|first| {
            (first * SECTOR as u64, payload(disk, first, MEBIBYTE.min(sectors - first), 0))
        })
        .collect()
}

fn starts_stamped(sector: u64) -> bool {
    sector / MEBIBYTE % 4 != 3
}

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// A MiB, in sectors.
const MEBIBYTE: u64 = (1 << 20) / SECTOR as u64;
const STAMP: usize = 32;
const MAGIC: u64 = u64::from_le_bytes(*b"standfst");

#[cfg(test)]
mod tests {
    use super::*;

    /// Two disks of four sectors; `a` then `b` answered before `c` was issued.
    fn three() -> (History, Vec<ActId>) {
        let history = History::new();
        let mut ids = Vec::new();
        for (disk, first) in [(0, 0), (1, 2), (0, 1)] {
            let id = history.issue(disk, first, 1, false);
            history.answered(id);
            ids.push(id);
        }
        (history, ids)
    }

    fn disk(disk: usize, shown: [Option<ActId>; 4]) -> Vec<u8> {
        let zero = [0; SECTOR];
        let bytes =
            |(at, id): (usize, Option<ActId>)| id.map_or(zero, |i| stamp(disk, at as u64, i));
        shown.into_iter().enumerate().flat_map(bytes).collect()
    }

    #[test]
    fn every_prefix_passes_and_a_hole_on_another_disk_is_found() {
        let (history, ids) = three();
        let (a, b, c) = (Some(ids[0]), Some(ids[1]), Some(ids[2]));
        let check = |d0, d1| history.check(&[&disk(0, d0), &disk(1, d1)], 0);
        check([None; 4], [None; 4]).unwrap();
        check([a, None, None, None], [None; 4]).unwrap();
        check([a, None, None, None], [None, None, b, None]).unwrap();
        let all = check([a, c, None, None], [None, None, b, None]).unwrap();
        assert_eq!(all.visible, 3);
        let hole = check([a, c, None, None], [None; 4]).unwrap_err();
        assert!(hole.contains("hole: disk 1, sector 2"), "{hole}");
        assert!(check([None, c, None, None], [None, None, b, None]).is_err());
    }

    #[test]
    fn the_floor_demands_what_was_answered_before_it() {
        let (history, ids) = three();
        let some = [Some(ids[0]), None, None, None];
        let check = |floor| history.check(&[&disk(0, some), &disk(1, [None; 4])], floor);
        check(0).unwrap();
        check(history.now()).unwrap_err();
    }

    #[test]
    fn an_older_version_after_a_newer_answer_is_a_hole() {
        let history = History::new();
        let old = history.issue(0, 0, 1, false);
        history.answered(old);
        let new = history.issue(0, 0, 1, true);
        history.answered(new);
        let later = history.issue(0, 3, 1, false);
        let with = |first| disk(0, [first, None, None, Some(later)]);
        history.check(&[&with(None)], 0).unwrap();
        history.check(&[&with(Some(old))], 0).unwrap_err();
    }

    #[test]
    fn an_abandoned_write_may_be_there_or_not_but_not_after_a_later_one() {
        let history = History::new();
        let lost = history.issue(0, 0, 1, false);
        history.check(&[&disk(0, [None; 4])], history.now()).unwrap();
        history.check(&[&disk(0, [Some(lost), None, None, None])], history.now()).unwrap();
        history.abandoned(lost);
        let next = history.issue(0, 0, 1, false);
        history.answered(next);
        let late = history.check(&[&disk(0, [Some(lost), None, None, None])], history.now());
        late.unwrap_err();
    }

    #[test]
    fn what_was_there_before_the_first_write_must_still_be_there() {
        let history = History::stamped();
        let zeroes = disk(0, [None; 4]);
        assert!(history.check(&[&zeroes], 0).unwrap_err().contains("lost"));
        history.check(&[&disk(0, [Some(0); 4])], 0).unwrap();
        history.answered(history.issue(0, 0, 4, true));
        history.check(&[&zeroes], history.now()).unwrap();
        history.check(&[&disk(0, [Some(0); 4])], history.now()).unwrap_err();
    }

    #[test]
    fn torn_and_misplaced_sectors_are_found() {
        let (history, ids) = three();
        let mut torn = disk(0, [Some(ids[0]), None, None, None]);
        torn[100] ^= 1;
        assert!(history.check(&[&torn], 0).unwrap_err().contains("torn"));
        let mut moved = disk(0, [None; 4]);
        moved[1024..1536].copy_from_slice(&stamp(0, 0, ids[0]));
        assert!(history.check(&[&moved], 0).unwrap_err().contains("belongs to"));
    }
}
