//! The owner of one group's state: recovery, the event loop, the connections.
//!
//! [`start`] brings the group up from what it finds; [`volume`] is the data path;
//! [`conn`] speaks NBD on one connection; [`serve`] is the loop: wait, let every ready
//! connection do its requests, let the volume take a turn, send the answers.

mod awake;
pub mod conn;
pub mod ctl;
mod landing;
mod seat;
pub mod serve;
pub mod start;
pub mod volume;

use std::io;

use crate::arena::{Arena, Word};
use crate::config::{GroupConfig, GroupPaths};
use crate::engine::real::RealFiles;
use crate::filter::Filter;
use crate::journal::note::{self, Note};
use serve::{Server, settle, wait_until};
use start::StartError;

/// Why a filter process ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It could not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A disk failed: its writes are in the journal, or without one in the arena.
    #[error("a disk failed; the journal (without one: memory, until a reboot) has its writes")]
    DiskFailed,
    /// A disk's file system is full: its writes are where those of a failed one are.
    #[error("a disk is full; the journal (without one: memory, until a reboot) has its writes")]
    DiskFull,
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

/// Whether the group's journal was given up ([`drain_without_journal`]).
pub fn is_given_up(paths: &GroupPaths) -> io::Result<bool> {
    let noted = note::read(&RealFiles, &start::marker(paths))?;
    Ok(noted.is_some_and(|note| note.given_up))
}

/// As [`drain`], for a group whose journal cannot be used: notes that it must not be
/// replayed, and `incarnation` (that of its super block; 0: it cannot be told), and writes back
/// what the arena holds. True if there was an arena, and no sync of the disks failed or was cut
/// off before: then all that was acknowledged is on the disks. If it is repeated that is
/// not known any more ([`is_given_up`]).
pub fn drain_without_journal(
    config: &GroupConfig,
    paths: &GroupPaths,
    incarnation: u64,
) -> Result<bool, RunError> {
    let marker = start::marker(paths);
    let before = note::read(&RealFiles, &marker)?;
    let first = before.is_none_or(|note| !note.given_up);
    let synced = Arena::peek(&config.arena_path(), Word::Syncing)? == Some(0);
    if before.is_none() {
        // From now on the arena has to hold all that is not synced.
        start::sync_disks(config)?;
    }
    let incarnation = before.map_or(incarnation, |note| note.incarnation);
    let note = Note { incarnation, given_up: true };
    note::write(&RealFiles, &marker, note)?;
    drain(config, paths)?;
    // A start that found no arena noted the incarnation that it began.
    Ok(first && synced && note::read(&RealFiles, &marker)? == Some(note))
}

/// Writes everything back to the disks without serving them: they are plain
/// images again on return. For `unprotect` when no filter runs.
pub fn drain(config: &GroupConfig, paths: &GroupPaths) -> Result<(), RunError> {
    let mut volume = start::open(config, paths)?;
    settle(&mut volume)?;
    volume.filter().request_drain();
    wait_until(&mut volume, |v| v.filter().drained() || v.filter().drain_fails())?;
    if let Some(error) = undrained(volume.filter()) {
        return Err(error);
    }
    volume.remove_arena();
    Ok(())
}

/// Why a drain that is over is not complete.
fn undrained(filter: &Filter) -> Option<RunError> {
    if filter.drained() {
        None
    } else if filter.lost_a_disk() {
        Some(RunError::DiskFailed)
    } else if filter.is_full() {
        Some(RunError::DiskFull)
    } else {
        let message = "the journal failed, and no note of that can be made";
        Some(io::Error::other(message).into())
    }
}
