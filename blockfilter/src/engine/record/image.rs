//! Bytes of one simulated file, sparse, in pages that copies share. (pure)
//!
//! Owns content and length and nothing else: which of its bytes are durable is
//! [`super::crash`]'s business. Bytes beyond the length may be held (data that
//! reached the disk while the new size did not); [`Image::trim`] drops them.

use std::collections::BTreeMap;
use std::sync::Arc;

/// A sparse file's content. Cloning shares the pages.
#[derive(Clone, Debug, Default)]
pub(super) struct Image {
    /// Length in bytes.
    pub(super) len: u64,
    pages: BTreeMap<u64, Arc<[u8; PAGE]>>,
}

impl Image {
    /// Fills `buf` from `offset`; holes are zeroes. The caller checks the length.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) {
        each_page(offset, buf.len() as u64, |page, within, range| {
            let part = &mut buf[range];
            match self.pages.get(&page) {
                Some(data) => part.copy_from_slice(&data[within..within + part.len()]),
                None => part.fill(0),
            }
        });
    }

    /// Stores bytes without touching the length.
    pub(super) fn put(&mut self, offset: u64, data: &[u8]) {
        each_page(offset, data.len() as u64, |page, within, range| {
            let part = &data[range];
            let held = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(held)[within..within + part.len()].copy_from_slice(part);
        });
    }

    /// Makes a range a hole; page parts at its ends are zeroed.
    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let touched: Vec<u64> =
            self.pages.range(offset / SIZE..end.div_ceil(SIZE)).map(|(page, _)| *page).collect();
        for page in touched {
            let (start, stop) = (page * SIZE, (page + 1) * SIZE);
            if offset <= start && stop <= end {
                self.pages.remove(&page);
            } else if let Some(held) = self.pages.get_mut(&page) {
                let from = offset.max(start) - start;
                let to = end.min(stop) - start;
                Arc::make_mut(held)[from as usize..to as usize].fill(0);
            }
        }
    }

    /// Truncates, or extends with a hole.
    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.punch(len, u64::MAX - len);
        }
        self.len = len;
    }

    /// Drops what is held beyond the length.
    pub(super) fn trim(&mut self) {
        self.punch(self.len, u64::MAX - self.len);
    }

    /// Next written range at or after `offset`, in whole pages, below the length.
    pub(super) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        let (&first, _) = self.pages.range(offset / SIZE..).next()?;
        let mut end = first + 1;
        while self.pages.contains_key(&end) {
            end += 1;
        }
        let start = (first * SIZE).max(offset);
        (start < self.len).then(|| (start, (end * SIZE).min(self.len)))
    }

    /// Pages of the range that hold no bytes yet.
    pub(super) fn missing_pages(&self, offset: u64, len: u64) -> u64 {
        if len == 0 {
            return 0;
        }
        let (first, last) = (offset / SIZE, (offset + len - 1) / SIZE);
        last - first + 1 - self.pages.range(first..=last).count() as u64
    }

    /// Pages held.
    pub(super) fn pages(&self) -> u64 {
        self.pages.len() as u64
    }
}

/// Calls `part(page, offset in the page, range of the request)` for each page touched.
fn each_page(offset: u64, len: u64, mut part: impl FnMut(u64, usize, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = offset + done;
        let within = at % SIZE;
        let now = (SIZE - within).min(len - done);
        part(at / SIZE, within as usize, done as usize..(done + now) as usize);
        done += now;
    }
}

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;
const SIZE: u64 = PAGE as u64;
