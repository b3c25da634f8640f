//! The owner of one group's state: recovery, the event loop, the connections.
//!
//! [`start`] brings the group up from what it finds; [`volume`] is the data path;
//! [`conn`] speaks NBD on one connection; [`serve`] is the loop: wait, let every ready
//! connection do its requests, let the volume take a turn, send the answers.

pub mod conn;
pub mod ctl;
mod landing;
pub mod serve;
pub mod start;
pub mod volume;

use std::io;

use crate::arena::{Arena, Word};
use crate::config::{GroupConfig, GroupPaths};
use crate::engine::real::RealFiles;
use crate::journal::note;
use serve::{Server, settle, wait_until};
use start::StartError;
use volume::Volume;

/// Why a filter process ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It could not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A disk failed: its writes are in the journal.
    #[error("a disk failed; the journal still holds its writes")]
    DiskFailed,
    /// A disk failed or a sync was cut off, and there is no journal to write it again from.
    #[error("a disk failed to sync while the group had no journal: what was written may be lost")]
    DiskLost,
    /// Its sockets or its loop failed.
    #[error("serving the group failed: {0}")]
    Serve(#[from] io::Error),
}

/// Runs the filter process of a group: recovers, calls `ready`, serves until a Stop.
/// May be killed at any instruction; the next run takes over where it was.
pub fn run(config: &GroupConfig, paths: &GroupPaths, ready: impl FnOnce()) -> Result<(), RunError> {
    let volume = start::open(config, paths)?;
    let server = Server::new(volume, config, paths)?;
    ready();
    Ok(server.run()?)
}

/// Whether the disks can be opened, locked, and are as long as they were.
pub fn check_disks(config: &GroupConfig) -> Result<(), RunError> {
    Ok(start::try_disks(config)?)
}

/// As [`drain`], for a group whose journal cannot be used: notes that it must not be
/// replayed, and `incarnation` (that of its super block; 0: it cannot be told), and writes back
/// what the arena holds, whatever failed before. True if there was an arena, and no
/// sync of the disks failed or was cut off: then all that was acknowledged is on the disks.
pub fn drain_without_journal(
    config: &GroupConfig,
    paths: &GroupPaths,
    incarnation: u64,
) -> Result<bool, RunError> {
    let marker = start::marker(paths);
    let before = note::read(&RealFiles, &marker)?;
    let synced = Arena::peek(&config.arena_path(), Word::Syncing)? == Some(0);
    if before.is_none() {
        note::write(&RealFiles, &marker, incarnation)?;
    }
    let mut volume = start::open(config, paths)?;
    volume.filter().forgive_disks();
    write_back(volume, true)?;
    // A start that found no arena noted the incarnation that it began.
    Ok(synced && note::read(&RealFiles, &marker)? == Some(before.unwrap_or(incarnation)))
}

/// Writes everything back to the disks without serving them: they are plain
/// images again on return. For `unprotect` when no filter runs.
pub fn drain(config: &GroupConfig, paths: &GroupPaths) -> Result<(), RunError> {
    let noted = note::read(&RealFiles, &start::marker(paths))?.is_some();
    if noted && Arena::peek(&config.arena_path(), Word::Syncing)?.is_some_and(|n| n != 0) {
        return Err(RunError::DiskLost);
    }
    write_back(start::open(config, paths)?, noted)
}

/// `noted`: that there is no journal, before this start.
fn write_back(mut volume: Volume, noted: bool) -> Result<(), RunError> {
    settle(&mut volume)?;
    volume.filter().request_drain();
    wait_until(&mut volume, |v| v.filter().drained() || v.filter().stall_is_final())?;
    if volume.filter().stall_is_final() {
        return Err(match volume.filter().lost_a_disk() {
            true if noted => RunError::DiskLost,
            true => RunError::DiskFailed,
            false => io::Error::other("the journal failed, and no note of that can be made").into(),
        });
    }
    volume.remove_arena();
    Ok(())
}
