//! A file system in memory that records every mutation, produces every state a
//! power cut may leave ([`crash`]), and fails on demand.
//!
//! Owns [`SimFiles`], an implementation of [`Files`] and [`File`] for tests:
//! what was written is read back at once, as from the page cache; what would
//! survive a power cut is decided only by what was synced. One log holds the
//! mutations of all files in the order in which they returned, so a test notes
//! [`SimFiles::log_len`] when something was acknowledged and then demands it in
//! every crash state at or behind that position.
//!
//! *Faults* ([`SimFiles::fail`], [`SimFiles::fail_reads`], [`SimFiles::flip`],
//! [`SimFiles::set_capacity`]): a failed write changes nothing, a short one
//! stores its first half. After a failed sync the unsynced data can still be
//! read but is uncertain for ever, as on Linux: a later sync reports success
//! and does not write it.
//!
//! It never looks at the clock or the machine: the same calls give the same log.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::{File, Files, Open};

pub mod crash;
mod image;

#[cfg(test)]
mod tests;

pub use crash::{CrashPoint, Log, Rng, Survive, Sweep, for_each_crash};

use crash::{Change, Entry, FileId, NameChange, Node, apply, rename};
use image::{Image, PAGE};

/// A simulated file system; clones are the same one.
#[derive(Clone, Debug)]
pub struct SimFiles {
    disk: Arc<Mutex<Disk>>,
}

/// Kinds of mutations, for [`Fault::op`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `write_all_at`, `write_vectored_at`.
    Write,
    /// `punch`.
    Punch,
    /// `set_len`.
    SetLen,
    /// `allocate`.
    Allocate,
    /// `open` that creates, `create_dir_all` for each folder made.
    Create,
    /// `rename`.
    Rename,
    /// `remove`, and `remove_dir_all` for each name.
    Remove,
    /// `sync_data`.
    SyncData,
    /// `sync_dir`.
    SyncDir,
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// EIO, nothing done.
    Io,
    /// ENOSPC, nothing done.
    NoSpace,
    /// EIO after the first half of a write; as `Io` for anything else.
    Short,
}

impl Failure {
    fn error(self) -> io::Error {
        match self {
            Self::Io | Self::Short => Errno::IO.into(),
            Self::NoSpace => Errno::NOSPC.into(),
        }
    }
}

/// A planned failure of mutations.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Only this kind, or any.
    pub op: Option<Op>,
    /// Only paths that contain this, or any (empty).
    pub path: String,
    /// Matching mutations that succeed first.
    pub skip: u64,
    /// Fail all from then on, not just one.
    pub lasting: bool,
    /// How.
    pub failure: Failure,
}

impl SimFiles {
    /// An empty file system; the root folder exists.
    pub fn new() -> Self {
        let root = BTreeMap::from([(PathBuf::from("/"), Node::Dir)]);
        Self::from_parts(root, Vec::new())
    }

    /// A file system in which everything given is durable.
    fn from_parts(names: BTreeMap<PathBuf, Node>, files: Vec<Image>) -> Self {
        let used = files.iter().map(Image::pages).sum();
        let start = Log { names: names.clone(), files: files.clone(), entries: Vec::new() };
        let disk = Disk {
            names,
            files,
            used,
            capacity: None,
            log: start,
            faults: Vec::new(),
            read_faults: Vec::new(),
            mutations: 0,
        };
        Self { disk: Arc::new(Mutex::new(disk)) }
    }

    /// Entries recorded so far: a power cut now is a cut after this many.
    pub fn log_len(&self) -> usize {
        self.lock().log.entries.len()
    }

    /// Everything recorded, with the state it started from.
    pub fn log(&self) -> Log {
        self.lock().log.clone()
    }

    /// Declares everything durable and empties the log.
    pub fn settle(&self) {
        let mut disk = self.lock();
        disk.log =
            Log { names: disk.names.clone(), files: disk.files.clone(), entries: Vec::new() };
    }

    /// Mutations tried so far, failed ones too.
    pub fn mutations(&self) -> u64 {
        self.lock().mutations
    }

    /// Plans a failure. Several may be planned.
    pub fn fail(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// Fails the n-th mutation from now (0: the next), whatever it is.
    pub fn fail_nth(&self, skip: u64, failure: Failure, lasting: bool) {
        self.fail(Fault { op: None, path: String::new(), skip, lasting, failure });
    }

    /// Fails reads that touch `range` of `path`.
    pub fn fail_reads(&self, path: &Path, range: Range<u64>) {
        let mut disk = self.lock();
        if let Some(Node::File(file)) = disk.names.get(path).copied() {
            disk.read_faults.push((file, range));
        }
    }

    /// Forgets all planned failures and the capacity.
    pub fn heal(&self) {
        let mut disk = self.lock();
        disk.faults.clear();
        disk.read_faults.clear();
        disk.capacity = None;
    }

    /// Inverts the bits of `mask` in one byte, behind everybody's back.
    pub fn flip(&self, path: &Path, offset: u64, mask: u8) {
        let mut disk = self.lock();
        if let Some(Node::File(file)) = disk.names.get(path).copied() {
            let mut byte = [0];
            disk.files[file].read(offset, &mut byte);
            disk.files[file].put(offset, &[byte[0] ^ mask]);
        }
    }

    /// From now on at most `bytes` fit, in pages of 4 KiB, what is there included.
    pub fn set_capacity(&self, bytes: u64) {
        self.lock().capacity = Some(bytes / PAGE as u64);
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for SimFiles {
    fn default() -> Self {
        Self::new()
    }
}

impl Files for SimFiles {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>> {
        let mut disk = self.lock();
        let file = match (disk.names.get(path).copied(), how) {
            (Some(_), Open::CreateNew) => return Err(Errno::EXIST.into()),
            (Some(Node::Dir), _) => return Err(Errno::ISDIR.into()),
            (Some(Node::File(file)), _) => file,
            (None, Open::Create | Open::CreateNew) => disk.create(path)?,
            (None, _) => return Err(Errno::NOENT.into()),
        };
        let writable = how != Open::Read;
        Ok(Arc::new(SimFile { files: self.clone(), file, path: path.to_owned(), writable }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.lock();
        let node = *disk.names.get(from).ok_or(Errno::NOENT)?;
        disk.parent_exists(to)?;
        disk.check(Op::Rename, to)?;
        disk.rename(NameChange::Moved(from.to_owned(), to.to_owned(), node));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.lock();
        match disk.names.get(path) {
            None => Err(Errno::NOENT.into()),
            Some(Node::Dir) => Err(Errno::ISDIR.into()),
            Some(Node::File(_)) => disk.remove(path),
        }
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.lock();
        let missing: Vec<PathBuf> = path
            .ancestors()
            .take_while(|p| !disk.names.contains_key(*p) && !p.as_os_str().is_empty())
            .map(Path::to_owned)
            .collect();
        for dir in missing.into_iter().rev() {
            disk.check(Op::Create, &dir)?;
            disk.rename(NameChange::Made(dir, Node::Dir));
        }
        match disk.names.get(path) {
            Some(Node::Dir) => Ok(()),
            _ => Err(Errno::NOTDIR.into()),
        }
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.lock();
        if !disk.names.contains_key(path) {
            return Err(Errno::NOENT.into());
        }
        let inside: Vec<PathBuf> =
            disk.names.keys().filter(|name| name.starts_with(path)).cloned().collect();
        inside.iter().rev().try_for_each(|name| disk.remove(name))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let disk = self.lock();
        match disk.names.get(dir) {
            None => return Err(Errno::NOENT.into()),
            Some(Node::File(_)) => return Err(Errno::NOTDIR.into()),
            Some(Node::Dir) => {}
        }
        let here = disk.names.keys().filter(|name| name.parent() == Some(dir));
        Ok(here.filter_map(|name| Some(name.file_name()?.to_string_lossy().into_owned())).collect())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut disk = self.lock();
        if disk.names.get(dir) != Some(&Node::Dir) {
            return Err(Errno::NOENT.into());
        }
        if let Err(failure) = disk.next(Op::SyncDir, dir) {
            disk.log.entries.push(Entry::DirSyncFailed(dir.to_owned()));
            return Err(failure.error());
        }
        disk.log.entries.push(Entry::DirSynced(dir.to_owned()));
        Ok(())
    }

    fn exists(&self, path: &Path) -> bool {
        self.lock().names.contains_key(path)
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        let disk = self.lock();
        let pages = disk.capacity.unwrap_or(1 << 40).saturating_sub(disk.used);
        Ok(pages * PAGE as u64)
    }
}

#[derive(Debug)]
struct SimFile {
    files: SimFiles,
    file: FileId,
    path: PathBuf,
    writable: bool,
}

impl SimFile {
    /// Makes room for `range`, then applies and records the change.
    fn change(&self, op: Op, change: Change) -> io::Result<()> {
        if !self.writable {
            return Err(Errno::BADF.into());
        }
        let mut disk = self.files.lock();
        let verdict = disk.next(op, &self.path);
        let (change, failed) = match (verdict, change) {
            (Err(Failure::Short), Change::Write { offset, data }) => {
                let half = Arc::from(&data[..data.len() / 2]);
                (Change::Write { offset, data: half }, Some(Failure::Short))
            }
            (Err(failure), _) => return Err(failure.error()),
            (Ok(()), change) => (change, None),
        };
        disk.change(self.file, change)?;
        failed.map_or(Ok(()), |failure| Err(failure.error()))
    }

    /// Records that a sync did this, or failed.
    fn sync(&self, done: Entry) -> io::Result<()> {
        let mut disk = self.files.lock();
        let verdict = disk.next(Op::SyncData, &self.path);
        let failed = Entry::SyncFailed(self.file);
        disk.log.entries.push(if verdict.is_ok() { done } else { failed });
        verdict.map_err(|failure| failure.error())
    }
}

impl File for SimFile {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let disk = self.files.lock();
        let end = offset.checked_add(buf.len() as u64).ok_or(Errno::INVAL)?;
        let bad = |(file, range): &(FileId, Range<u64>)| {
            *file == self.file && range.start < end && offset < range.end
        };
        if disk.read_faults.iter().any(bad) {
            return Err(Errno::IO.into());
        }
        if end > disk.files[self.file].len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        disk.files[self.file].read(offset, buf);
        Ok(())
    }

    fn write_all_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Op::Write, Change::Write { offset, data: Arc::from(data) })
    }

    fn write_vectored_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.write_all_at(offset, &parts.concat())
    }

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all_at(offset, data)?;
        self.sync(Entry::LastSynced(self.file))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync(Entry::Synced(self.file))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.files.lock().files[self.file].len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Op::SetLen, Change::SetLen { len })
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let disk = self.files.lock();
        let need = disk.files[self.file].missing_pages(offset, len);
        disk.room_for(need)?;
        drop(disk);
        self.change(Op::Allocate, Change::Allocate { end: offset + len })
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.change(Op::Punch, Change::Punch { offset, len })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        Ok(self.files.lock().files[self.file].next_data(offset))
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// What programs see now, and the log.
#[derive(Debug)]
struct Disk {
    names: BTreeMap<PathBuf, Node>,
    files: Vec<Image>,
    /// Pages of all named files.
    used: u64,
    capacity: Option<u64>,
    log: Log,
    faults: Vec<Fault>,
    read_faults: Vec<(FileId, Range<u64>)>,
    mutations: u64,
}

impl Disk {
    /// Counts a mutation and says whether a planned failure hits it.
    fn next(&mut self, op: Op, path: &Path) -> Result<(), Failure> {
        self.mutations += 1;
        let text = path.to_string_lossy();
        let mut hit = None;
        for fault in &mut self.faults {
            if fault.op.is_some_and(|o| o != op) || !text.contains(&fault.path) {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
            } else if hit.is_none() {
                hit = Some(fault.failure);
                if !fault.lasting {
                    fault.skip = u64::MAX;
                }
            }
        }
        hit.map_or(Ok(()), Err)
    }

    fn check(&mut self, op: Op, path: &Path) -> io::Result<()> {
        self.next(op, path).map_err(Failure::error)
    }

    fn room_for(&self, pages: u64) -> io::Result<()> {
        match self.capacity {
            Some(capacity) if self.used + pages > capacity => Err(Errno::NOSPC.into()),
            _ => Ok(()),
        }
    }

    fn change(&mut self, file: FileId, change: Change) -> io::Result<()> {
        if let Change::Write { offset, data } = &change {
            let end = offset.checked_add(data.len() as u64).ok_or(Errno::FBIG)?;
            self.room_for(self.files[file].missing_pages(*offset, end - offset))?;
        }
        let before = self.files[file].pages();
        apply(&mut self.files[file], &change, &mut |_| true);
        self.used = self.used + self.files[file].pages() - before;
        self.log.entries.push(Entry::Change(file, change));
        Ok(())
    }

    fn parent_exists(&self, path: &Path) -> io::Result<()> {
        match path.parent().and_then(|parent| self.names.get(parent)) {
            Some(Node::Dir) => Ok(()),
            Some(Node::File(_)) => Err(Errno::NOTDIR.into()),
            None => Err(Errno::NOENT.into()),
        }
    }

    fn create(&mut self, path: &Path) -> io::Result<FileId> {
        self.parent_exists(path)?;
        self.check(Op::Create, path)?;
        let file = self.files.len();
        self.files.push(Image::default());
        self.rename(NameChange::Made(path.to_owned(), Node::File(file)));
        Ok(file)
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        self.check(Op::Remove, path)?;
        self.rename(NameChange::Gone(path.to_owned()));
        Ok(())
    }

    fn rename(&mut self, change: NameChange) {
        let lost = match &change {
            NameChange::Gone(path) | NameChange::Moved(_, path, _) => self.names.get(path),
            NameChange::Made(..) => None,
        };
        if let Some(Node::File(file)) = lost {
            self.used = self.used.saturating_sub(self.files[*file].pages());
        }
        rename(&mut self.names, &change);
        self.log.entries.push(Entry::Name(change));
    }
}
