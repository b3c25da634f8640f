//! The base: sparse images of the disks below the retained history.
//!
//! Owns the base files. Holds: what was never written reads as zeroes; nothing is
//! durable before [`Base::sync`]; after a failed sync the base is not used any
//! more. A first seed writes here, and only it; a reseed never does (ruling 1),
//! because old points read it. (A fold will, below the oldest point.)

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use blockfilter::block::BLOCK;
use blockfilter::engine::{File, Open};

use super::StoreError;
use super::manifest::BaseRef;
use super::segment::Env;

/// The base images of one group.
#[derive(Debug)]
pub(crate) struct Base {
    disks: Vec<Image>,
}

#[derive(Debug)]
struct Image {
    path: PathBuf,
    file: Arc<dyn File>,
    /// Nothing at or above was ever written: zeroes need no work there.
    clean_from: u64,
    dirty: bool,
}

impl Base {
    /// Makes empty images; durable on return, also their names.
    pub(crate) fn create(env: &Env, meta: &BaseRef) -> Result<Self, StoreError> {
        let mut disks = Vec::new();
        for (i, size) in env.sizes.iter().enumerate() {
            let path = env.dir.join(meta.name(i));
            env.files.open(&path, Open::CreateNew).map_err(StoreError::io(&path))?;
            let file = env.files.open(&path, Open::Disk).map_err(StoreError::io(&path))?;
            file.set_len(size.next_multiple_of(BLOCK)).map_err(StoreError::io(&path))?;
            file.sync_data().map_err(StoreError::io(&path))?;
            disks.push(Image { path, file, clean_from: 0, dirty: false });
        }
        env.files.sync_dir(&env.dir).map_err(StoreError::io(&env.dir))?;
        Ok(Self { disks })
    }

    /// Opens the images.
    pub(crate) fn open(env: &Env, meta: &BaseRef) -> Result<Self, StoreError> {
        let mut disks = Vec::new();
        for (i, size) in env.sizes.iter().enumerate() {
            let path = env.dir.join(meta.name(i));
            let file = env.files.open(&path, Open::Disk).map_err(StoreError::io(&path))?;
            let len = file.len().map_err(StoreError::io(&path))?;
            if len != size.next_multiple_of(BLOCK) {
                return Err(StoreError::damaged(&path, format!("it has {len} bytes")));
            }
            disks.push(Image { path, file, clean_from: u64::MAX, dirty: false });
        }
        Ok(Self { disks })
    }

    /// For views.
    pub(crate) fn files(&self) -> Vec<Arc<dyn File>> {
        self.disks.iter().map(|d| Arc::clone(&d.file)).collect()
    }

    /// Writes copied bytes.
    pub(crate) fn write(&mut self, disk: u8, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        let image = &mut self.disks[usize::from(disk)];
        image.dirty = true;
        image.clean_from = image.clean_from.max(offset + data.len() as u64);
        image.file.write_vectored_at(offset, &[data]).map_err(StoreError::io(&image.path))
    }

    /// Makes a range read as zeroes.
    pub(crate) fn zero(&mut self, disk: u8, offset: u64, len: u64) -> Result<(), StoreError> {
        let image = &mut self.disks[usize::from(disk)];
        let len = (offset + len).min(image.clean_from).saturating_sub(offset);
        if len == 0 {
            return Ok(());
        }
        image.dirty = true;
        image.file.punch(offset, len).map_err(StoreError::io(&image.path))
    }

    /// Makes everything written durable. Any error is final.
    pub(crate) fn sync(&mut self) -> Result<(), StoreError> {
        for image in self.disks.iter_mut().filter(|i| i.dirty) {
            let synced = image.file.sync_data();
            synced.map_err(|e: io::Error| {
                StoreError::Failed(format!("{}: {e}", image.path.display()))
            })?;
            image.dirty = false;
        }
        Ok(())
    }
}
