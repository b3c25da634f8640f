//! The note beside a journal that failed: it must never be replayed, and the incarnation
//! that is in use since, because the journal's super block cannot say so any more (I8).
//!
//! Text, replaced as a whole. A line `incarnation N`; without one (an older note)
//! the super block's incarnation holds. A line `given up` if somebody gave the journal up.

use std::io;
use std::path::Path;

use crate::engine::{Files, read_file, replace_file};

/// What the note says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// In use; 0: that of the super block.
    pub incarnation: u64,
    /// The journal was given up: writes that only it held may be missing on the disks, for good.
    pub given_up: bool,
}

/// Writes the note, durably.
pub fn write(files: &dyn Files, path: &Path, note: Note) -> io::Result<()> {
    let Note { incarnation, given_up } = note;
    let why = if given_up { "given up" } else { "A write or sync of the journal failed." };
    let text = format!("{why}\nIt must not be replayed.\nincarnation {incarnation}\n");
    replace_file(files, path, text.as_bytes())
}

/// What the note says, if there is one.
pub fn read(files: &dyn Files, path: &Path) -> io::Result<Option<Note>> {
    if !files.exists(path) {
        return Ok(None);
    }
    let text = read_file(files, path, NOTE_MAX)?;
    let text = String::from_utf8_lossy(&text);
    let incarnation = text.lines().find_map(|line| line.strip_prefix("incarnation ")?.parse().ok());
    let given_up = text.lines().any(|line| line == "given up");
    Ok(Some(Note { incarnation: incarnation.unwrap_or(0), given_up }))
}

const NOTE_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::record::SimFiles;

    #[test]
    fn a_note_says_what_was_written() {
        let (files, path) = (SimFiles::new(), Path::new("/note"));
        assert_eq!(read(&files, path).unwrap(), None);
        for note in [
            Note { incarnation: 7, given_up: false },
            Note { incarnation: 0, given_up: true },
            Note { incarnation: u64::MAX, given_up: true },
        ] {
            write(&files, path, note).unwrap();
            assert_eq!(read(&files, path).unwrap(), Some(note));
        }
        replace_file(&files, path, b"it failed\n").unwrap();
        assert_eq!(read(&files, path).unwrap(), Some(Note::default()));
    }
}
