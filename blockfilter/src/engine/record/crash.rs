//! Every state that a power cut may leave behind a recorded log. (pure)
//!
//! The model is a worst-case disk under a journaling file system: what was
//! synced is there; of everything else each 512-byte sector, each change of a
//! file's size and each name may or may not be, in any combination. Content is
//! applied in the order it was written, so an older unsynced version of a
//! sector can survive a newer one, never the reverse of a synced one. A change
//! that a *failed* sync covered stays uncertain for ever: a later successful
//! sync does not write it (Linux marks the pages clean). Names become durable
//! by `sync_dir` of their folder alone, and are lost with their folder.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::SimFiles;
use super::image::Image;

/// Number of a file, from its creation on.
pub(super) type FileId = usize;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// A folder.
    Dir,
    /// A file, by number.
    File(usize),
}

/// A change of one file.
#[derive(Clone, Debug)]
pub enum Change {
    /// Bytes at an offset.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// The range reads as zeroes.
    Punch {
        /// Where.
        offset: u64,
        /// How far.
        len: u64,
    },
    /// Truncation or extension.
    SetLen {
        /// New length.
        len: u64,
    },
    /// Allocation; extends the file if `end` is beyond its length.
    Allocate {
        /// End of the range.
        end: u64,
    },
}

/// A change of names.
#[derive(Clone, Debug)]
pub enum NameChange {
    /// A file or folder appears.
    Made(PathBuf, Node),
    /// It goes elsewhere, replacing what was there.
    Moved(PathBuf, PathBuf, Node),
    /// It goes away.
    Gone(PathBuf),
}

/// One entry of the log.
#[derive(Clone, Debug)]
pub enum Entry {
    /// A file's content or length.
    Change(usize, Change),
    /// A file's changes so far are durable.
    Synced(usize),
    /// A file's last change is durable, and none before it for that (RWF_DSYNC).
    LastSynced(usize),
    /// A file's changes so far are uncertain for ever.
    SyncFailed(usize),
    /// Names.
    Name(NameChange),
    /// A folder's names so far are durable.
    DirSynced(PathBuf),
    /// A folder's name changes so far are uncertain for ever.
    DirSyncFailed(PathBuf),
}

/// A recorded run: the state it started from (durable) and every mutation since.
#[derive(Clone, Debug, Default)]
pub struct Log {
    pub(super) names: BTreeMap<PathBuf, Node>,
    pub(super) files: Vec<Image>,
    /// Every mutation, in order.
    pub entries: Vec<Entry>,
}

/// Something not synced at the cut: the choice asks whether it survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsynced {
    /// Index of its entry in the log.
    pub entry: usize,
    /// The sector of the file (offset / 512), or None for a name, a size, a punch.
    pub sector: Option<u64>,
}

/// Which of the unsynced survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survive {
    /// Nothing.
    Nothing,
    /// All of it.
    All,
    /// Entries below this index.
    Prefix(usize),
    /// Everything but half of the newest write's sectors, chosen by the seed.
    Torn(u64),
    /// Bit i of the number decides on the i-th unsynced item.
    Subset(u64),
    /// A coin each, by this seed; how it is loaded depends on the seed too.
    Random(u64),
}

/// One power cut: replay it with [`Log::crash`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrashPoint {
    /// Entries that were executed.
    pub at: usize,
    /// What survived of the unsynced.
    pub survive: Survive,
}

impl fmt::Display for CrashPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "power cut after {} entries, surviving {:x?}", self.at, self.survive)
    }
}

impl Log {
    /// The files after a power cut right behind the first `at` entries.
    pub fn crash(&self, point: CrashPoint) -> SimFiles {
        let mut replay = Replay::new(self);
        replay.run(self, point.at);
        replay.crash(point.survive)
    }

    /// As [`Log::crash`], asking `keep` about everything unsynced, file by file.
    pub fn crash_with(&self, at: usize, keep: &mut dyn FnMut(Unsynced) -> bool) -> SimFiles {
        let mut replay = Replay::new(self);
        replay.run(self, at);
        replay.materialize(keep)
    }

    /// What is unsynced after the first `at` entries.
    pub fn unsynced(&self, at: usize) -> Vec<Unsynced> {
        let mut replay = Replay::new(self);
        replay.run(self, at);
        replay.items()
    }
}

/// How [`for_each_crash`] goes about it.
#[derive(Clone, Copy, Debug)]
pub struct Sweep {
    /// Start of the random choices; print it.
    pub seed: u64,
    /// Random states a point, besides the extremes.
    pub random: u32,
    /// With at most this many unsynced items all subsets are visited instead (up to 16).
    pub exhaustive: u32,
    /// First number of executed entries.
    pub from: usize,
    /// Visit every n-th point (1: all), and always the last.
    pub step: usize,
}

impl Default for Sweep {
    fn default() -> Self {
        Self { seed: 1, random: 4, exhaustive: 4, from: 0, step: 1 }
    }
}

/// Visits power cuts behind each entry of the log: nothing, all, a prefix, a
/// torn last write and random subsets of what was unsynced. `visit` gets the
/// files as the next start finds them. Returns the number of states.
pub fn for_each_crash(
    log: &Log,
    sweep: Sweep,
    mut visit: impl FnMut(SimFiles, CrashPoint),
) -> usize {
    let mut replay = Replay::new(log);
    let mut rng = Rng::new(sweep.seed);
    let mut states = 0;
    let mut at = sweep.from.min(log.entries.len());
    loop {
        replay.run(log, at);
        for survive in choices(&replay.items(), sweep, &mut rng) {
            visit(replay.crash(survive), CrashPoint { at, survive });
            states += 1;
        }
        if at == log.entries.len() {
            return states;
        }
        at = (at + sweep.step.max(1)).min(log.entries.len());
    }
}

fn choices(items: &[Unsynced], sweep: Sweep, rng: &mut Rng) -> Vec<Survive> {
    if items.is_empty() {
        return vec![Survive::Nothing];
    }
    if items.len() <= sweep.exhaustive.min(16) as usize {
        return (0..1 << items.len()).map(Survive::Subset).collect();
    }
    let middle = items[rng.below(items.len() as u64) as usize].entry;
    let mut all = vec![
        Survive::Nothing,
        Survive::All,
        Survive::Prefix(middle),
        Survive::Torn(rng.next_u64()),
    ];
    all.extend((0..sweep.random).map(|_| Survive::Random(rng.next_u64())));
    all
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Pending,
    Durable,
    Doomed,
}

/// The disk while a log is played: what is durable, and what waits for a sync.
#[derive(Debug)]
struct Replay {
    done: usize,
    names: BTreeMap<PathBuf, Node>,
    name_queue: VecDeque<(usize, NameChange, State)>,
    files: Vec<Image>,
    queues: Vec<VecDeque<(usize, Change, State)>>,
}

impl Replay {
    fn new(log: &Log) -> Self {
        Self {
            done: 0,
            names: log.names.clone(),
            name_queue: VecDeque::new(),
            files: log.files.clone(),
            queues: vec![VecDeque::new(); log.files.len()],
        }
    }

    fn run(&mut self, log: &Log, until: usize) {
        while self.done < until.min(log.entries.len()) {
            self.step(self.done, &log.entries[self.done]);
            self.done += 1;
        }
    }

    fn step(&mut self, index: usize, entry: &Entry) {
        match entry {
            Entry::Change(file, change) => {
                self.queues[*file].push_back((index, change.clone(), State::Pending));
            }
            Entry::Synced(file) => {
                settle(self.queues[*file].iter_mut().map(|q| &mut q.2), State::Durable);
                self.take_durable(*file);
            }
            Entry::LastSynced(file) => {
                settle(self.queues[*file].back_mut().map(|q| &mut q.2).into_iter(), State::Durable);
                self.take_durable(*file);
            }
            Entry::SyncFailed(file) => {
                settle(self.queues[*file].iter_mut().map(|q| &mut q.2), State::Doomed);
            }
            Entry::Name(change) => {
                if let NameChange::Made(_, Node::File(id)) = change {
                    let count = self.files.len().max(id + 1);
                    self.files.resize_with(count, Image::default);
                    self.queues.resize_with(count, VecDeque::new);
                }
                self.name_queue.push_back((index, change.clone(), State::Pending));
            }
            Entry::DirSynced(dir) => {
                self.settle_names(dir, State::Durable);
                while let Some((_, change, State::Durable)) = self.name_queue.front() {
                    rename(&mut self.names, change);
                    self.name_queue.pop_front();
                }
            }
            Entry::DirSyncFailed(dir) => self.settle_names(dir, State::Doomed),
        }
    }

    /// Applies what nothing uncertain is in front of.
    fn take_durable(&mut self, file: FileId) {
        while let Some((_, change, State::Durable)) = self.queues[file].front() {
            apply(&mut self.files[file], change, &mut |_| true);
            self.queues[file].pop_front();
        }
        if self.queues[file].is_empty() {
            self.files[file].trim();
        }
    }

    fn settle_names(&mut self, dir: &Path, to: State) {
        let here = self.name_queue.iter_mut().filter(|(_, change, _)| {
            let (NameChange::Made(path, _)
            | NameChange::Moved(_, path, _)
            | NameChange::Gone(path)) = change;
            path.parent() == Some(dir)
        });
        settle(here.map(|q| &mut q.2), to);
    }

    /// Everything that is not certain, in the order of the log.
    fn items(&self) -> Vec<Unsynced> {
        let mut items = Vec::new();
        for (entry, _, state) in &self.name_queue {
            if *state != State::Durable {
                items.push(Unsynced { entry: *entry, sector: None });
            }
        }
        for (entry, change, state) in self.queues.iter().flatten() {
            if *state != State::Durable {
                let mut note = |sector| {
                    items.push(Unsynced { entry: *entry, sector });
                    false
                };
                apply(&mut Image::default(), change, &mut note);
            }
        }
        items.sort_by_key(|item| item.entry);
        items
    }

    fn crash(&self, survive: Survive) -> SimFiles {
        let items = self.items();
        let last = items.iter().rev().find(|i| i.sector.is_some()).map(|i| i.entry);
        let mut rng = match survive {
            Survive::Torn(seed) | Survive::Random(seed) => Rng::new(seed),
            _ => Rng::new(0),
        };
        let odds = [1, 8, 15, 8][rng.below(4) as usize];
        let mut kept = Vec::with_capacity(items.len());
        for (i, item) in items.iter().enumerate() {
            kept.push(match survive {
                Survive::Nothing => false,
                Survive::All => true,
                Survive::Prefix(end) => item.entry < end,
                Survive::Torn(_) => Some(item.entry) != last || rng.below(2) == 0,
                Survive::Subset(bits) => bits >> i & 1 == 1,
                Survive::Random(_) => rng.below(16) < odds,
            });
        }
        let index: BTreeMap<(usize, Option<u64>), bool> =
            items.iter().map(|item| (item.entry, item.sector)).zip(kept).collect();
        self.materialize(&mut |item| index[&(item.entry, item.sector)])
    }

    fn materialize(&self, keep: &mut dyn FnMut(Unsynced) -> bool) -> SimFiles {
        let mut names = self.names.clone();
        for (entry, change, state) in &self.name_queue {
            if *state == State::Durable || keep(Unsynced { entry: *entry, sector: None }) {
                rename(&mut names, change);
            }
        }
        let held = names.clone();
        let reachable = |path: &Path| path.ancestors().skip(1).all(|a| held.contains_key(a));
        names.retain(|path, _| reachable(path));
        let mut files = self.files.clone();
        for (image, queue) in files.iter_mut().zip(&self.queues) {
            for (entry, change, state) in queue {
                let durable = *state == State::Durable;
                let mut ask = |sector| durable || keep(Unsynced { entry: *entry, sector });
                apply(image, change, &mut ask);
            }
            image.trim();
        }
        SimFiles::from_parts(names, files)
    }
}

fn settle<'a>(states: impl Iterator<Item = &'a mut State>, to: State) {
    states.filter(|state| **state == State::Pending).for_each(|state| *state = to);
}

/// Applies what `keep` lets through: the size first, then each sector.
pub(super) fn apply(image: &mut Image, change: &Change, keep: &mut dyn FnMut(Option<u64>) -> bool) {
    match change {
        Change::Write { offset, data } => {
            let end = offset + data.len() as u64;
            if end > image.len && keep(None) {
                image.len = end;
            }
            let mut at = *offset;
            while at < end {
                let stop = ((at / SECTOR + 1) * SECTOR).min(end);
                if keep(Some(at / SECTOR)) {
                    image.put(at, &data[(at - offset) as usize..(stop - offset) as usize]);
                }
                at = stop;
            }
        }
        Change::Punch { offset, len } => {
            if keep(None) {
                image.punch(*offset, *len);
            }
        }
        Change::SetLen { len } => {
            if keep(None) {
                image.set_len(*len);
            }
        }
        Change::Allocate { end } => {
            if keep(None) {
                image.len = image.len.max(*end);
            }
        }
    }
}

/// Applies a change of names.
pub(super) fn rename(names: &mut BTreeMap<PathBuf, Node>, change: &NameChange) {
    match change {
        NameChange::Made(path, node) => {
            names.insert(path.clone(), *node);
        }
        NameChange::Gone(path) => {
            names.remove(path);
        }
        NameChange::Moved(from, to, node) => {
            names.remove(from);
            let inside: Vec<PathBuf> =
                names.keys().filter(|path| path.starts_with(from)).cloned().collect();
            for path in inside {
                if let (Some(node), Ok(rest)) = (names.remove(&path), path.strip_prefix(from)) {
                    names.insert(to.join(rest), node);
                }
            }
            names.insert(to.clone(), *node);
        }
    }
}

/// A small generator of numbers that follow from their seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`; 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.next_u64() % end }
    }
}

const SECTOR: u64 = 512;
