//! The journal: an on-disk ring of chunks that hold batches of records.
//!
//! [`format`] is the layout, [`batch`] makes and checks headers, [`chunks`] says
//! which slot holds what, [`recover`] decides what a found batch means,
//! [`open`] does the reading that recovery needs, [`reader`] serves the replicator,
//! [`note`] says beside a dead journal that it is dead.
//!
//! Comes after the filter's order and before the disk: nothing is applied that is
//! not durable here (I3). Never overwrites a slot that is still needed (I5).

pub mod batch;
pub mod chunks;
pub mod format;
pub mod note;
pub mod open;
pub mod reader;
pub mod recover;

use std::io;

use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::config::GroupConfig;
use crate::engine::{Files, Open};
use chunks::ChunkGeometry;
use format::*;

/// Makes the group's journal file: every byte of it allocated and *written* with zeroes
/// (a commit into unwritten extents takes more than twice as long), then the
/// super block. Past the page cache: journal pages left there would have to be
/// thrown out by the commits. `progress(done, total)` is called every 4 MiB; an error
/// from it stops. Fails with `AlreadyExists` if the file is there. Durable on
/// return. On an error the file is removed.
pub fn create(
    files: &dyn Files,
    config: &GroupConfig,
    progress: &mut dyn FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    files.open(&config.journal, Open::CreateNew)?;
    let made = files
        .open(&config.journal, Open::Direct)
        .and_then(|file| fill(file.as_ref(), config, progress))
        .and_then(|()| config.journal.parent().map_or(Ok(()), |dir| files.sync_dir(dir)));
    if made.is_err() {
        let _ = files.remove(&config.journal);
    }
    made
}

fn fill(
    file: &dyn crate::engine::File,
    config: &GroupConfig,
    progress: &mut dyn FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    const STEP: usize = 4 << 20;
    let sup = first_super(config)?;
    let total = geometry_of(&sup).file_len();
    file.allocate(0, total)?;
    let zeroes = vec![0; STEP + PAGE as usize];
    let zeroes = &zeroes[zeroes.as_ptr().align_offset(PAGE as usize)..];
    let mut done = 0;
    while done < total {
        let now = (total - done).min(STEP as u64);
        file.write_all_at(done, &zeroes[..now as usize])?;
        done += now;
        progress(done, total)?;
    }
    file.sync_data()?;
    file.write_all_at(batch::super_offset(0), sup.as_bytes())?;
    file.sync_data()
}

/// The super block of a new journal.
pub fn first_super(config: &GroupConfig) -> io::Result<JournalSuper> {
    let invalid = |message: String| io::Error::new(io::ErrorKind::InvalidInput, message);
    let chunk = config.chunk_bytes;
    if !chunk.is_power_of_two() || !(CHUNK_MIN..=CHUNK_MAX).contains(&chunk) {
        return Err(invalid(format!(
            "a chunk of {chunk} bytes is not a power of two from 1 to 64 MiB"
        )));
    }
    let slots = config.journal_bytes.saturating_sub(SLOTS_AT) / chunk;
    if slots < u64::from(SLOTS_MIN) || slots > u64::from(u32::MAX) {
        let least = SLOTS_AT + u64::from(SLOTS_MIN) * chunk;
        return Err(invalid(format!("the journal needs at least {least} bytes")));
    }
    if config.disks.is_empty() || config.disks.len() > DISKS_MAX {
        return Err(invalid(format!("a group has 1 to {DISKS_MAX} disks")));
    }
    let mut sup = JournalSuper {
        magic: SUPER_MAGIC,
        version: u32::from(JOURNAL_VERSION).into(),
        crc: 0.into(),
        seq: 0.into(),
        journal_uuid: *Uuid::new_v4().as_bytes(),
        group_uuid: *config.uuid.as_bytes(),
        chunk_size: chunk.into(),
        n_slots: (slots as u32).into(),
        mode: MODE_NEW,
        clean: 1,
        n_disks: config.disks.len() as u8,
        n_history: 0,
        incarnation: 1.into(),
        generation: 1.into(),
        checkpoint: PAGE.into(),
        checkpoint_prev_crc: 0.into(),
        reserved0: 0.into(),
        ship_floor: 0.into(),
        frozen_at: 0.into(),
        reserved1: [0.into(); 8],
        history: [History::default(); HISTORY_MAX],
        disks: [SuperDisk { uuid: [0; 16], size: 0.into(), name: [0; 64], reserved: 0.into() };
            DISKS_MAX],
        reserved: [0; 328],
    };
    for (slot, disk) in sup.disks.iter_mut().zip(&config.disks) {
        slot.uuid = *disk.uuid.as_bytes();
        slot.size = disk.size_bytes.into();
        let name = disk.disk.as_str().as_bytes();
        slot.name[..name.len()].copy_from_slice(name);
    }
    batch::finish_super(&mut sup);
    Ok(sup)
}

/// The sizes in a super block.
pub fn geometry_of(sup: &JournalSuper) -> ChunkGeometry {
    ChunkGeometry { chunk: sup.chunk_size.get(), slots: sup.n_slots.get() }
}
