//! Steps 1 to 6 of the walk of one write: from the client's bytes to the disk.
//!
//! | step | module | what it does |
//! |---|---|---|
//! | 1 | [`nbd`], [`fuse`] | bytes to requests |
//! | 2 | [`block`] | what a request promises; errors |
//! | 3 | [`filter`], [`dirty`] | order it, give it an LSN, mark what the target lacks, acknowledge, group commit |
//! | 4 | [`arena`], [`overlay`] | the one copy in RAM; the newest version of each block |
//! | 5 | [`journal`] | batches, chunks, the durable position, recovery |
//! | 6 | [`apply`] | sorted write-back, checkpoint |
//!
//! [`group`] owns one group's state and drives the pure parts; [`engine`] moves
//! the bytes; [`control`] is the local socket through which a group is asked
//! for its positions. There is no replication code here (decision 4): the
//! replicator is another process that reads the journal.

pub mod apply;
pub mod arena;
pub mod block;
pub mod config;
pub mod control;
pub mod crc32c;
pub mod dirty;
pub mod engine;
pub mod filter;
pub mod fuse;
pub mod group;
pub mod journal;
pub mod names;
pub mod nbd;
pub mod overlay;
