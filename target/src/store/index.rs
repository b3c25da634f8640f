//! Where the bytes of each block are: the index of one interval of LSNs.
//!
//! Owns [`Memtable`] (of the segment that is being written) and [`Run`] (sorted,
//! on disk, never changed). Holds: runs of one log are LSN-disjoint and gap-free
//! (I17); a lookup sees everything below its LSN in a region, newest first; every
//! page is checked by CRC before an entry of it is believed. Before it: segments.
//! After it: views. Only indexes are merged, the data stays where it is.

use blockfilter::crc32c;
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use blockfilter::engine::{File, Files, Open};
use zerocopy::{FromBytes, IntoBytes};

use super::StoreError;
use super::format::{
    Entry, Fence, FormatError, PAGE, PAGE_ENTRIES, PAGE_ITEMS, PAGE_WIDE, PageHdr, REGION, RunHdr,
    Wide,
};
use super::manifest::RunRef;

/// What a walk over entries does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Walk {
    /// Go on to older entries.
    On,
    /// Nothing older is wanted.
    Stop,
}

/// The index of an open segment. Written by one, read by many.
#[derive(Debug, Default)]
pub(crate) struct Memtable {
    inner: RwLock<MemInner>,
}

#[derive(Debug, Default)]
struct MemInner {
    /// By region key, LSN ascending.
    regions: HashMap<u64, Vec<Entry>>,
    wides: Vec<Wide>,
    count: usize,
}

impl Memtable {
    /// Adds what a few frames brought, in LSN order; readers see all or nothing of it.
    pub(crate) fn push(&self, entries: &[Entry], wides: &[Wide]) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        for entry in entries {
            inner.regions.entry(entry.key()).or_default().push(*entry);
        }
        inner.wides.extend_from_slice(wides);
        inner.count += entries.len() + wides.len();
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).count
    }

    /// Entries of a region below `below`, newest first.
    pub(crate) fn visit(&self, key: u64, below: u64, see: &mut dyn FnMut(&Entry) -> Walk) {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let Some(entries) = inner.regions.get(&key) else { return };
        let end = entries.partition_point(|e| e.lsn.get() < below);
        for entry in entries[..end].iter().rev() {
            if see(entry) == Walk::Stop {
                return;
            }
        }
    }

    /// Wide extents that touch a region, below `below`, newest first.
    pub(crate) fn wides(&self, disk: u8, region: u64, below: u64, out: &mut Vec<Wide>) {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        out.extend(inner.wides.iter().rev().filter(|w| touches(w, disk, region, below)));
    }

    /// Everything, as a run wants it.
    fn sorted(&self) -> (Vec<Entry>, Vec<Wide>) {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let mut keys: Vec<u64> = inner.regions.keys().copied().collect();
        keys.sort_unstable();
        let entries = keys.iter().flat_map(|key| inner.regions[key].iter().rev()).copied();
        (entries.collect(), inner.wides.iter().rev().copied().collect())
    }
}

fn touches(wide: &Wide, disk: u8, region: u64, below: u64) -> bool {
    let start = wide.offset.get();
    wide.disk == disk
        && wide.lsn.get() < below
        && start < (region + 1) * REGION
        && start + wide.len.get() > region * REGION
}

/// A sorted index on disk. Its file stays open, so a view may use it after the
/// store dropped it.
#[derive(Debug)]
pub(crate) struct Run {
    /// As in the manifest.
    pub(crate) meta: RunRef,
    file: Arc<dyn File>,
    fences: Vec<Fence>,
    wides: Vec<Wide>,
}

impl Run {
    /// Opens a run and reads its fences and wide extents.
    pub(crate) fn open(
        files: &dyn Files,
        dir: &Path,
        group_id: u64,
        meta: RunRef,
    ) -> Result<Self, StoreError> {
        let path = dir.join(meta.name());
        let file = files.open(&path, Open::Read).map_err(StoreError::io(&path))?;
        let bad = |error: FormatError| StoreError::format(&path, error);
        let mut head = [0; size_of::<RunHdr>()];
        file.read_exact_at(0, &mut head).map_err(StoreError::io(&path))?;
        let hdr = RunHdr::check(&head).map_err(bad)?;
        let same = hdr.group_id.get() == group_id
            && hdr.id.get() == meta.id
            && (hdr.lsn_lo.get(), hdr.lsn_hi.get()) == (meta.lo, meta.hi)
            && hdr.n_entries.get() == meta.entries;
        let pages = meta.entries.div_ceil(PAGE_ITEMS as u64);
        if !same || u64::from(hdr.n_pages.get()) != pages {
            return Err(bad(FormatError::Other("content")));
        }
        let wide_pages = u64::from(hdr.n_wide.get()).div_ceil(PAGE_ITEMS as u64);
        let fences_at = PAGE * (1 + pages + wide_pages);
        let len = file.len().map_err(StoreError::io(&path))?;
        if len != fences_at + pages * size_of::<Fence>() as u64 || len != meta.bytes {
            return Err(bad(FormatError::Other("length")));
        }
        let mut fences = vec![Fence::default(); pages as usize];
        file.read_exact_at(fences_at, fences.as_mut_bytes()).map_err(StoreError::io(&path))?;
        if crc32c::crc32c(fences.as_bytes()) != hdr.fences_crc.get() {
            return Err(bad(FormatError::Crc("fences")));
        }
        let mut run = Self { meta, file, fences, wides: Vec::new() };
        for page in pages..pages + wide_pages {
            let bytes = run.page(page, PAGE_WIDE).map_err(StoreError::io(&path))?;
            run.wides.extend_from_slice(items::<Wide>(&bytes));
        }
        Ok(run)
    }

    /// Reads and checks one page.
    fn page(&self, page: u64, what: u8) -> io::Result<[u8; PAGE as usize]> {
        let mut bytes = [0; PAGE as usize];
        self.file.read_exact_at(PAGE * (1 + page), &mut bytes)?;
        let hdr = page_hdr(&bytes);
        let crc = hdr.crc.get();
        bytes[..4].fill(0);
        let good = crc == crc32c::crc32c(&bytes)
            && hdr.run_id.get() == self.meta.id
            && u64::from(hdr.page.get()) == page
            && hdr.what == what
            && usize::from(hdr.count.get()) <= PAGE_ITEMS;
        if !good {
            return Err(self.damage(page));
        }
        Ok(bytes)
    }

    fn damage(&self, page: u64) -> io::Error {
        let message = format!("page {page} of index run {} is damaged", self.meta.name());
        io::Error::new(io::ErrorKind::InvalidData, message)
    }

    /// Entries of a region below `below`, newest first.
    pub(crate) fn visit(
        &self,
        key: u64,
        below: u64,
        see: &mut dyn FnMut(&Entry) -> Walk,
    ) -> io::Result<()> {
        let before = |k: u64, lsn: u64| k < key || (k == key && lsn >= below);
        let behind = self.fences.partition_point(|f| before(f.key.get(), f.lsn.get()));
        for page in behind.saturating_sub(1)..self.fences.len() {
            if self.fences[page].key.get() > key {
                return Ok(());
            }
            let bytes = self.page(page as u64, PAGE_ENTRIES)?;
            let entries = items::<Entry>(&bytes);
            let start = entries.partition_point(|e| before(e.key(), e.lsn.get()));
            for entry in &entries[start..] {
                if entry.key() != key {
                    return Ok(());
                }
                if !entry.is_valid() {
                    return Err(self.damage(page as u64));
                }
                if see(entry) == Walk::Stop {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Reads and checks every page.
    pub(crate) fn check(&self) -> io::Result<()> {
        for page in 0..self.fences.len() as u64 {
            let bytes = self.page(page, PAGE_ENTRIES)?;
            if !items::<Entry>(&bytes).iter().all(Entry::is_valid) {
                return Err(self.damage(page));
            }
        }
        Ok(())
    }

    /// Wide extents that touch a region, below `below`, newest first.
    pub(crate) fn wides(&self, disk: u8, region: u64, below: u64, out: &mut Vec<Wide>) {
        out.extend(self.wides.iter().filter(|w| touches(w, disk, region, below)));
    }
}

/// Writes a memtable as a run of level 0; durable on return, except its name.
pub(crate) fn write_run(
    files: &dyn Files,
    dir: &Path,
    group_id: u64,
    meta: RunRef,
    memtable: &Memtable,
) -> Result<Run, StoreError> {
    let (entries, wides) = memtable.sorted();
    let mut writer = RunWriter::create(files, dir, group_id, meta)?;
    for entry in &entries {
        writer.push(entry)?;
    }
    let meta = writer.finish(&wides)?;
    Run::open(files, dir, group_id, meta)
}

/// Merges neighbouring runs, oldest first, into one; durable on return, except its name.
pub(crate) fn merge(
    files: &dyn Files,
    dir: &Path,
    group_id: u64,
    meta: RunRef,
    runs: &[Arc<Run>],
) -> Result<Run, StoreError> {
    let path = dir.join(meta.name());
    let mut writer = RunWriter::create(files, dir, group_id, meta)?;
    let mut cursors = Vec::with_capacity(runs.len());
    for run in runs.iter().rev() {
        cursors.push(Cursor::new(run).map_err(StoreError::io(&path))?);
    }
    loop {
        // Newest first: of equal regions the newer run's entries come first.
        let heads = cursors.iter().enumerate();
        let least = heads.filter_map(|(i, c)| Some((c.head()?.key(), i))).min();
        let Some((key, i)) = least else { break };
        while let Some(entry) = cursors[i].head().filter(|e| e.key() == key) {
            writer.push(&entry)?;
            cursors[i].advance().map_err(StoreError::io(&path))?;
        }
    }
    let wides: Vec<Wide> = runs.iter().rev().flat_map(|r| r.wides.iter().copied()).collect();
    let meta = writer.finish(&wides)?;
    Run::open(files, dir, group_id, meta)
}

/// Walks all entries of a run.
struct Cursor<'a> {
    run: &'a Run,
    page: u64,
    bytes: [u8; PAGE as usize],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn new(run: &'a Run) -> io::Result<Self> {
        let bytes = match run.fences.is_empty() {
            true => [0; PAGE as usize],
            false => run.page(0, PAGE_ENTRIES)?,
        };
        Ok(Self { run, page: 0, bytes, at: 0 })
    }

    fn head(&self) -> Option<Entry> {
        items::<Entry>(&self.bytes).get(self.at).copied()
    }

    fn advance(&mut self) -> io::Result<()> {
        self.at += 1;
        if self.at == items::<Entry>(&self.bytes).len()
            && self.page + 1 < self.run.fences.len() as u64
        {
            self.page += 1;
            self.at = 0;
            self.bytes = self.run.page(self.page, PAGE_ENTRIES)?;
        }
        Ok(())
    }
}

/// Writes a run from sorted entries.
struct RunWriter<'a> {
    path: std::path::PathBuf,
    file: Arc<dyn File>,
    dir: &'a Path,
    group_id: u64,
    meta: RunRef,
    page: Vec<Entry>,
    fences: Vec<Fence>,
    /// Finished pages that are not written yet, and where they go.
    buffer: Vec<u8>,
    at: u64,
}

impl<'a> RunWriter<'a> {
    fn create(
        files: &dyn Files,
        dir: &'a Path,
        group_id: u64,
        meta: RunRef,
    ) -> Result<Self, StoreError> {
        let path = dir.join(meta.name());
        let file = files.open(&path, Open::CreateNew).map_err(StoreError::io(&path))?;
        Ok(Self {
            path,
            file,
            dir,
            group_id,
            meta: RunRef { entries: 0, bytes: 0, ..meta },
            page: Vec::with_capacity(PAGE_ITEMS),
            fences: Vec::new(),
            buffer: Vec::with_capacity(BUFFER),
            at: PAGE,
        })
    }

    fn push(&mut self, entry: &Entry) -> Result<(), StoreError> {
        if self.page.is_empty() {
            self.fences.push(Fence { key: entry.key().into(), lsn: entry.lsn });
        }
        self.page.push(*entry);
        self.meta.entries += 1;
        if self.page.len() == PAGE_ITEMS { self.end_page() } else { Ok(()) }
    }

    fn end_page(&mut self) -> Result<(), StoreError> {
        let page = std::mem::take(&mut self.page);
        self.put_page(PAGE_ENTRIES, page.as_bytes(), page.len())?;
        self.page = page;
        self.page.clear();
        Ok(())
    }

    fn put_page(&mut self, what: u8, items: &[u8], count: usize) -> Result<(), StoreError> {
        let number = (self.at + self.buffer.len() as u64) / PAGE - 1;
        let mut hdr = PageHdr {
            run_id: self.meta.id.into(),
            page: (number as u32).into(),
            count: (count as u16).into(),
            what,
            ..Default::default()
        };
        let mut bytes = [0; PAGE as usize];
        bytes[size_of::<PageHdr>()..][..items.len()].copy_from_slice(items);
        bytes[..size_of::<PageHdr>()].copy_from_slice(hdr.as_bytes());
        hdr.crc = crc32c::crc32c(&bytes).into();
        bytes[..size_of::<PageHdr>()].copy_from_slice(hdr.as_bytes());
        self.buffer.extend_from_slice(&bytes);
        if self.buffer.len() >= BUFFER { self.drain() } else { Ok(()) }
    }

    fn drain(&mut self) -> Result<(), StoreError> {
        self.file.write_all_at(self.at, &self.buffer).map_err(StoreError::io(&self.path))?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn finish(mut self, wides: &[Wide]) -> Result<RunRef, StoreError> {
        if !self.page.is_empty() {
            self.end_page()?;
        }
        for some in wides.chunks(PAGE_ITEMS) {
            self.put_page(PAGE_WIDE, some.as_bytes(), some.len())?;
        }
        let fences = std::mem::take(&mut self.fences);
        self.buffer.extend_from_slice(fences.as_bytes());
        self.drain()?;
        self.meta.bytes = self.at;
        let hdr = RunHdr {
            group_id: self.group_id.into(),
            lsn_lo: self.meta.lo.into(),
            lsn_hi: self.meta.hi.into(),
            n_entries: self.meta.entries.into(),
            n_pages: (fences.len() as u32).into(),
            n_wide: (wides.len() as u32).into(),
            fences_crc: crc32c::crc32c(fences.as_bytes()).into(),
            id: self.meta.id.into(),
            level: u32::from(self.meta.level).into(),
            ..Default::default()
        }
        .seal();
        let mut head = [0; PAGE as usize];
        head[..size_of::<RunHdr>()].copy_from_slice(hdr.as_bytes());
        self.file.write_all_at(0, &head).map_err(StoreError::io(&self.path))?;
        self.file.sync_data().map_err(StoreError::io(self.dir))?;
        Ok(self.meta)
    }
}

fn page_hdr(bytes: &[u8; PAGE as usize]) -> PageHdr {
    PageHdr::read_from_prefix(bytes).map(|(hdr, _)| hdr).unwrap_or_default()
}

/// The items of a checked page.
fn items<T>(bytes: &[u8; PAGE as usize]) -> &[T]
where
    T: FromBytes + zerocopy::Immutable + zerocopy::KnownLayout + zerocopy::Unaligned,
{
    let count = usize::from(page_hdr(bytes).count.get()).min(PAGE_ITEMS);
    let body = &bytes[size_of::<PageHdr>()..];
    <[T]>::ref_from_prefix_with_elems(body, count).map_or(&[], |(items, _)| items)
}

/// Bytes of pages that are written together.
const BUFFER: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use blockfilter::engine::record::SimFiles;

    use super::super::format::{ENTRY_ZERO, region_key, split};
    use super::*;

    fn meta(id: u32, level: u8, lo: u64, hi: u64) -> RunRef {
        RunRef { id, level, lo, hi, entries: 0, bytes: 0 }
    }

    fn collect(run: &Run, key: u64, below: u64) -> Vec<u64> {
        let mut seen = Vec::new();
        run.visit(key, below, &mut |e| {
            seen.push(e.lsn.get());
            Walk::On
        })
        .unwrap();
        seen
    }

    #[test]
    fn a_large_old_write_is_found_beside_small_new_ones_through_merges() {
        let files = SimFiles::new();
        let dir = PathBuf::from("/idx");
        files.create_dir_all(&dir).unwrap();
        let mut runs = Vec::new();
        for r in 0..16u64 {
            let table = Memtable::default();
            for lsn in r * 1000..(r + 1) * 1000 {
                let like = Entry { lsn: lsn.into(), disk: (lsn % 2) as u8, ..Default::default() };
                let mut out = Vec::new();
                let (at, len) =
                    if lsn % 100 == 0 { (0, REGION) } else { (4096 * (lsn % 256), 4096) };
                split(like, at, len, 0, &mut out);
                table.push(&out, &[]);
            }
            let wide = Wide {
                flags: ENTRY_ZERO,
                len: (64 * REGION).into(),
                lsn: (r * 1000).into(),
                ..Default::default()
            };
            table.push(&[], &[wide]);
            let meta = meta(r as u32, 0, r * 1000, (r + 1) * 1000);
            runs.push(Arc::new(write_run(&files, &dir, 1, meta, &table).unwrap()));
        }
        let merged = merge(&files, &dir, 1, meta(99, 1, 0, 16_000), &runs).unwrap();
        assert_eq!(merged.meta.entries, 16_000);
        for below in [0, 1, 2, 999, 1000, 1001, 8500, 16_000, u64::MAX] {
            let want: Vec<u64> = (0..16_000u64.min(below)).rev().filter(|l| l % 2 == 0).collect();
            assert_eq!(collect(&merged, region_key(0, 0), below), want);
            let apart = runs.iter().rev().flat_map(|r| collect(r, region_key(0, 0), below));
            assert_eq!(apart.collect::<Vec<_>>(), want);
            let mut wides = Vec::new();
            merged.wides(0, 63, below, &mut wides);
            let want = (0..16u64).rev().map(|r| r * 1000).filter(|l| *l < below);
            assert!(want.eq(wides.iter().map(|w| w.lsn.get())));
        }
        assert!(collect(&merged, region_key(0, 1), u64::MAX).is_empty());
        assert!(collect(&merged, region_key(2, 0), u64::MAX).is_empty());
    }

    #[test]
    fn a_damaged_page_gives_an_error_and_no_entry() {
        let files = SimFiles::new();
        let dir = PathBuf::from("/idx");
        files.create_dir_all(&dir).unwrap();
        let table = Memtable::default();
        let mut out = Vec::new();
        split(Entry::default(), 0, 4096, 0, &mut out);
        table.push(&out, &[]);
        let run = write_run(&files, &dir, 1, meta(1, 0, 0, 1), &table).unwrap();
        for at in [0, 5, 40, 60, 4000] {
            files.flip(&dir.join(run.meta.name()), PAGE + at, 1);
            let mut seen = 0;
            let answer = run.visit(0, u64::MAX, &mut |_| {
                seen += 1;
                Walk::On
            });
            assert!(answer.is_err() && seen == 0, "byte {at}");
            files.flip(&dir.join(run.meta.name()), PAGE + at, 1);
        }
        files.flip(&dir.join(run.meta.name()), 41, 1);
        assert!(Run::open(&files, &dir, 1, run.meta).is_err());
    }
}
