//! The note beside a journal that failed: it must never be replayed, and the incarnation
//! that is in use since, because the journal's super block cannot say so any more (I8).
//!
//! Text, replaced as a whole. A last line `incarnation N`; without one (an older note)
//! the super block's incarnation holds.

use std::io;
use std::path::Path;

use crate::engine::{Files, read_file, replace_file};

/// Writes the note, durably.
pub fn write(files: &dyn Files, path: &Path, incarnation: u64) -> io::Result<()> {
    let text = format!(
        "A write or sync of the journal failed. It must not be replayed.\nincarnation {incarnation}\n"
    );
    replace_file(files, path, text.as_bytes())
}

/// The incarnation in the note; 0 if it has none. None without a note.
pub fn read(files: &dyn Files, path: &Path) -> io::Result<Option<u64>> {
    if !files.exists(path) {
        return Ok(None);
    }
    let text = read_file(files, path, NOTE_MAX)?;
    let text = String::from_utf8_lossy(&text);
    let incarnation = text.lines().find_map(|line| line.strip_prefix("incarnation ")?.parse().ok());
    Ok(Some(incarnation.unwrap_or(0)))
}

const NOTE_MAX: u64 = 4096;
