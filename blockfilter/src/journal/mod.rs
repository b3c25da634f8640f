//! The journal: on-disk ring of chunks that hold batches of records.

pub mod format;
pub mod reader;
