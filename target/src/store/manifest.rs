//! What exists: the manifest of a group, and how one replaces another.
//!
//! ```text
//! standfast-manifest 1 <CRC-32C of the rest, 8 hex digits>
//! { JSON }
//! ```
//!
//! Owns the documents and their atomic replacement: the new one is written to
//! `MANIFEST-n` and synced, then `CURRENT` is renamed over. Holds: a durable
//! manifest names only durable files (I18); files that no manifest names are
//! left over from a crash. JSON, so that fields can be added; a change that older
//! programs would misread raises the version.

use blockfilter::crc32c;
use std::path::{Path, PathBuf};

use blockfilter::engine::{Files, Open, read_file};
use blockfilter::names::{Lsn, Name};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{GroupMeta, StoreError};

/// Everything durable about a group besides the bytes themselves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) meta: GroupMeta,
    /// Lower ones are refused (I19).
    pub(crate) generation: u64,
    pub(crate) incarnation: u64,
    pub(crate) history: Vec<(u64, Lsn)>,
    /// Oldest first; the last one is written to.
    pub(crate) eras: Vec<EraRef>,
    pub(crate) base: Option<BaseRef>,
    /// Points below are gone; a fold raises it before it touches the base (I16).
    pub(crate) oldest: Option<(u32, Lsn)>,
    pub(crate) drills: Vec<DrillRef>,
    pub(crate) next_era: u32,
    /// Segments, runs and bases take their numbers from here.
    pub(crate) next_id: u32,
    pub(crate) next_drill: u32,
}

/// What one seed began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EraRef {
    pub(crate) era: u32,
    /// Copies are in the base, and what was not copied reads as zeroes.
    pub(crate) first: bool,
    pub(crate) s: Lsn,
    /// Points at or above are usable; None: not all is copied.
    pub(crate) end: Option<Lsn>,
    /// Nothing was written during the seed: a point at `s`, with this label.
    pub(crate) start_point_us: Option<u64>,
    pub(crate) incarnation: u64,
    pub(crate) stream: LogRef,
    pub(crate) copy: LogRef,
}

/// Segments and runs of one order of records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogRef {
    /// Oldest first, gap-free.
    pub(crate) segs: Vec<SegRef>,
    /// Oldest first, LSN-disjoint and gap-free (I17).
    pub(crate) runs: Vec<RunRef>,
}

/// A segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SegRef {
    pub(crate) id: u32,
    #[serde(rename = "gen")]
    pub(crate) generation: u64,
    /// +1 each time it was rescued into another file.
    pub(crate) attempt: u32,
    pub(crate) from: u64,
    /// None: open, ends where its last whole epoch ends.
    pub(crate) sealed: Option<SealRef>,
}

/// The end of a sealed segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SealRef {
    pub(crate) to: u64,
    /// Where the frames end in the file.
    pub(crate) end_frames: u64,
    /// Length of the file.
    pub(crate) bytes: u64,
}

/// An index run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunRef {
    pub(crate) id: u32,
    pub(crate) level: u8,
    pub(crate) lo: u64,
    pub(crate) hi: u64,
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
}

/// The base images: `disk-<i>.<n>.base`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BaseRef {
    pub(crate) n: u32,
    /// They hold everything below this position (fuzzily while seeding).
    pub(crate) era: u32,
    pub(crate) lsn: Lsn,
}

/// A drill; it pins its point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DrillRef {
    pub(crate) id: Name,
    pub(crate) era: u32,
    pub(crate) lsn: Lsn,
    pub(crate) created_us: u64,
}

/// Everything durable about a drill's branch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BranchManifest {
    pub(crate) log: LogRef,
    pub(crate) next_id: u32,
}

impl SegRef {
    /// Its file's name.
    pub(crate) fn name(&self) -> String {
        match self.attempt {
            0 => format!("{:08}-{:08}.seg", self.generation, self.id),
            n => format!("{:08}-{:08}.{n}.seg", self.generation, self.id),
        }
    }
}

impl RunRef {
    /// Its file's name.
    pub(crate) fn name(&self) -> String {
        format!("{:08}.run", self.id)
    }
}

impl BaseRef {
    /// The file's name of a disk.
    pub(crate) fn name(&self, disk: usize) -> String {
        format!("disk-{disk}.{}.base", self.n)
    }
}

impl LogRef {
    /// Asserts what must hold of neighbours (I17).
    pub(crate) fn is_consistent(&self) -> bool {
        let segs = self.segs.windows(2).all(|w| w[0].sealed.is_some_and(|s| s.to == w[1].from));
        let runs = self.runs.windows(2).all(|w| w[0].hi == w[1].lo);
        let sealed_to = self.segs.iter().rev().find_map(|s| s.sealed).map(|s| s.to);
        segs && runs && self.runs.last().map(|r| r.hi) == sealed_to
    }
}

/// The documents of one folder, and which is in force.
#[derive(Debug)]
pub(crate) struct Documents {
    dir: PathBuf,
    seq: u64,
}

impl Documents {
    /// For a folder without any; the first [`Self::replace`] makes one.
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), seq: 0 }
    }

    /// Reads the document in force and removes others.
    pub(crate) fn load<T: DeserializeOwned>(
        files: &dyn Files,
        dir: &Path,
    ) -> Result<(Self, T), StoreError> {
        let (this, document) = Self::read(files, dir)?;
        let name = format!("{PREFIX}{:06}", this.seq);
        for other in files.list(dir).map_err(StoreError::io(dir))? {
            if (other.starts_with(PREFIX) && other != name) || other == CURRENT_NEW {
                let _ = files.remove(&dir.join(other));
            }
        }
        Ok((this, document))
    }

    /// Reads the document in force and changes nothing.
    pub(crate) fn read<T: DeserializeOwned>(
        files: &dyn Files,
        dir: &Path,
    ) -> Result<(Self, T), StoreError> {
        let current = dir.join(CURRENT);
        let text = read_file(files, &current, 100).map_err(StoreError::io(&current))?;
        let name = String::from_utf8_lossy(&text).trim().to_owned();
        let seq = name.strip_prefix(PREFIX).and_then(|n| n.parse().ok());
        let seq = seq.ok_or_else(|| StoreError::damaged(&current, "it names no manifest"))?;
        let path = dir.join(&name);
        let text = read_file(files, &path, MANIFEST_MAX).map_err(StoreError::io(&path))?;
        let document = decode(&path, &text)?;
        Ok((Self { dir: dir.to_owned(), seq }, document))
    }

    /// Puts `document` in force, durably. After an error for which
    /// [`StoreError::is_full`] holds the old one still is; after any other error it
    /// is not known which one is.
    pub(crate) fn replace<T: Serialize>(
        &mut self,
        files: &dyn Files,
        document: &T,
    ) -> Result<(), StoreError> {
        let seq = self.seq + 1;
        let path = self.dir.join(format!("{PREFIX}{seq:06}"));
        let new = self.dir.join(CURRENT_NEW);
        let prepared = self.prepare(files, &path, &new, document);
        if prepared.is_err() {
            let _ = files.remove(&path);
            let _ = files.remove(&new);
        }
        prepared?;
        let current = self.dir.join(CURRENT);
        let switched = files.rename(&new, &current).and_then(|()| files.sync_dir(&self.dir));
        switched.map_err(|e| StoreError::Failed(format!("{}: {e}", current.display())))?;
        if self.seq > 0 {
            let _ = files.remove(&self.dir.join(format!("{PREFIX}{:06}", self.seq)));
        }
        self.seq = seq;
        Ok(())
    }

    fn prepare<T: Serialize>(
        &self,
        files: &dyn Files,
        path: &Path,
        new: &Path,
        document: &T,
    ) -> Result<(), StoreError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for (path, data) in [(path, encode(path, document)?), (new, (name + "\n").into_bytes())] {
            if files.exists(path) {
                files.remove(path).map_err(StoreError::io(path))?;
            }
            let file = files.open(path, Open::CreateNew).map_err(StoreError::io(path))?;
            file.write_all_at(0, &data).map_err(StoreError::io(path))?;
            file.sync_data().map_err(StoreError::io(path))?;
        }
        files.sync_dir(&self.dir).map_err(StoreError::io(&self.dir))
    }
}

/// A document with its line of version and CRC.
fn encode<T: Serialize>(path: &Path, document: &T) -> Result<Vec<u8>, StoreError> {
    let json =
        serde_json::to_vec(document).map_err(|e| StoreError::damaged(path, e.to_string()))?;
    let mut text = format!("{MAGIC} {VERSION} {:08x}\n", crc32c::crc32c(&json)).into_bytes();
    text.extend_from_slice(&json);
    Ok(text)
}

fn decode<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, StoreError> {
    let damaged = |what: &str| StoreError::damaged(path, what);
    let end = text.iter().position(|b| *b == b'\n').ok_or_else(|| damaged("no first line"))?;
    let line = std::str::from_utf8(&text[..end]).map_err(|_| damaged("no first line"))?;
    let mut words = line.split(' ');
    if words.next() != Some(MAGIC) {
        return Err(damaged("it is not a manifest"));
    }
    let version = words.next().and_then(|w| w.parse::<u32>().ok());
    let version = version.ok_or_else(|| damaged("no version"))?;
    if version > VERSION {
        return Err(StoreError::Newer { path: path.to_owned(), found: version, known: VERSION });
    }
    let crc = words.next().and_then(|w| u32::from_str_radix(w, 16).ok());
    let json = &text[end + 1..];
    if crc != Some(crc32c::crc32c(json)) {
        return Err(damaged("its checksum does not match"));
    }
    serde_json::from_slice(json).map_err(|e| damaged(&e.to_string()))
}

/// Names the manifest in force.
pub(crate) const CURRENT: &str = "CURRENT";
const CURRENT_NEW: &str = "CURRENT.new";
const PREFIX: &str = "MANIFEST-";
const MAGIC: &str = "standfast-manifest";
const VERSION: u32 = 1;
/// About 100 bytes a segment: three years of history at 64 MiB a minute.
const MANIFEST_MAX: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use blockfilter::engine::record::SimFiles;

    use super::*;

    #[test]
    fn a_newer_manifest_is_refused_and_a_changed_one_is_damaged() {
        let path = Path::new("/m");
        let document = BranchManifest::default();
        let text = encode(path, &document).unwrap();
        assert_eq!(decode::<BranchManifest>(path, &text).unwrap(), document);
        assert!(text.starts_with(b"standfast-manifest 1 "));
        let newer = String::from_utf8(text.clone()).unwrap().replace("fest 1", "fest 2");
        let answer = decode::<BranchManifest>(path, newer.as_bytes());
        assert!(matches!(answer, Err(StoreError::Newer { found: 2, .. })));
        for at in 0..text.len() {
            let mut bad = text.clone();
            bad[at] ^= 0x41;
            assert!(decode::<BranchManifest>(path, &bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn replacing_keeps_one_document_and_survives_leftovers() {
        let files = SimFiles::new();
        let dir = Path::new("/g");
        files.create_dir_all(dir).unwrap();
        let mut documents = Documents::new(dir);
        let mut manifest = BranchManifest::default();
        for n in 1..4 {
            manifest.next_id = n;
            documents.replace(&files, &manifest).unwrap();
            files.open(&dir.join(CURRENT_NEW), Open::CreateNew).unwrap();
        }
        let (_, read) = Documents::load::<BranchManifest>(&files, dir).unwrap();
        assert_eq!(read, manifest);
        assert_eq!(files.list(dir).unwrap(), ["CURRENT", "MANIFEST-000003"]);
    }
}
