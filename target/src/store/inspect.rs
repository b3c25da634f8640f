//! What is in a store, for people: offline, read-only, lenient.
//!
//! Uses the decoders of production and tells what each file is, goes on after
//! damage and says where it is. Takes no lock and repairs nothing, so it may be run
//! on a copy, or beside a target that stands still.

use std::path::Path;
use std::sync::Arc;

use blockfilter::engine::{Clock, Files, Open, read_file};
use blockfilter::names::Name;
use serde_json::{Value, json};

use super::StoreError;
use super::format::PAGE;
use super::index::Run;
use super::ingest::open_payload;
use super::manifest::{BranchManifest, Documents, EraRef, LogRef, Manifest, RunRef, SegRef};
use super::segment::{Env, read_footer, read_frame};

/// Describes the store in `dir`. With `deep` every frame, record and index page is
/// read and its checksums are checked. `damaged` counts the files with damage.
pub fn inspect(
    files: Arc<dyn Files>,
    dir: &Path,
    clock: Arc<dyn Clock>,
    deep: bool,
) -> Result<Value, StoreError> {
    let path = dir.join("STORE");
    if !files.exists(&path) {
        return Err(StoreError::Missing(dir.to_owned()));
    }
    let text = read_file(files.as_ref(), &path, 4096).map_err(StoreError::io(&path))?;
    let store: Value =
        serde_json::from_slice(&text).map_err(|e| StoreError::damaged(&path, e.to_string()))?;
    let mut inspector = Inspector { files, clock, deep, damaged: 0 };
    let mut groups = Vec::new();
    let at = dir.join("groups");
    for name in inspector.files.list(&at).map_err(StoreError::io(&at))? {
        if name.parse::<Name>().is_err() {
            groups.push(json!({ "leftover": name }));
            continue;
        }
        let group = inspector.group(&at.join(&name));
        groups.push(inspector.said(group, json!({ "group": name })));
    }
    Ok(json!({ "store": store, "groups": groups, "damaged": inspector.damaged, "deep": deep }))
}

struct Inspector {
    files: Arc<dyn Files>,
    clock: Arc<dyn Clock>,
    deep: bool,
    damaged: u64,
}

impl Inspector {
    /// The answer, or `about` with what is wrong.
    fn said(&mut self, answer: Result<Value, StoreError>, mut about: Value) -> Value {
        answer.unwrap_or_else(|error| {
            self.damaged += 1;
            about["damage"] = json!(error.to_string());
            about
        })
    }

    fn env(&self, dir: &Path, group_id: u64) -> Env {
        let (files, clock) = (Arc::clone(&self.files), Arc::clone(&self.clock));
        Env::new(files, dir.to_owned(), group_id, Vec::new(), clock, 0)
    }

    fn group(&mut self, dir: &Path) -> Result<Value, StoreError> {
        let (_, manifest) = Documents::read::<Manifest>(self.files.as_ref(), dir)?;
        let env = self.env(dir, replicator::session::group_id(&manifest.meta.uuid));
        let eras: Vec<Value> = manifest.eras.iter().map(|era| self.era(&env, era)).collect();
        let mut drills = Vec::new();
        for drill in &manifest.drills {
            let at = dir.join("drills").join(drill.id.as_str());
            let branch = Documents::read::<BranchManifest>(self.files.as_ref(), &at);
            let about = json!({ "drill": drill.id, "lsn": drill.lsn, "era": drill.era });
            let log = branch.map(|(_, branch)| {
                let env = self.env(&at, env.group_id);
                json!({ "drill": drill.id, "lsn": drill.lsn, "era": drill.era,
                    "log": self.log(&env, 0, &branch.log) })
            });
            drills.push(self.said(log, about));
        }
        let mut bases = Vec::new();
        if let Some(base) = &manifest.base {
            for disk in 0..manifest.meta.disks.len() {
                let path = dir.join(base.name(disk));
                let open = self.files.open(&path, Open::Read);
                let len = open.and_then(|file| file.len()).map_err(StoreError::io(&path));
                let about = json!({ "file": base.name(disk) });
                let told = len.map(|len| json!({ "file": base.name(disk), "bytes": len }));
                bases.push(self.said(told, about));
            }
        }
        Ok(json!({
            "group": manifest.meta.group,
            "uuid": manifest.meta.uuid,
            "owner": manifest.meta.owner,
            "disks": manifest.meta.disks,
            "generation": manifest.generation,
            "incarnation": manifest.incarnation,
            "history": manifest.history,
            "eras": eras,
            "bases": bases,
            "drills": drills,
        }))
    }

    fn era(&mut self, env: &Env, era: &EraRef) -> Value {
        json!({
            "era": era.era,
            "first": era.first,
            "s": era.s,
            "end": era.end,
            "stream": self.log(env, era.era, &era.stream),
            "copy": self.log(env, era.era, &era.copy),
        })
    }

    fn log(&mut self, env: &Env, era: u32, log: &LogRef) -> Value {
        let mut segments = Vec::new();
        for seg in &log.segs {
            let told = self.segment(env, era, seg);
            segments.push(self.said(told, json!({ "file": seg.name() })));
        }
        let mut runs = Vec::new();
        for run in &log.runs {
            let told = self.run(env, run);
            runs.push(self.said(told, json!({ "file": run.name() })));
        }
        json!({ "segments": segments, "runs": runs })
    }

    fn segment(&self, env: &Env, era: u32, seg: &SegRef) -> Result<Value, StoreError> {
        let path = env.seg_dir().join(seg.name());
        let Some(sealed) = seg.sealed else {
            let file = self.files.open(&path, Open::Read).map_err(StoreError::io(&path))?;
            let len = file.len().map_err(StoreError::io(&path))?;
            let (frames, end) = self.frames(&path, len)?;
            return Ok(json!({ "file": seg.name(), "open": true, "from": seg.from.to_string(),
                "bytes": len, "frames": frames, "whole_bytes": end }));
        };
        let points = read_footer(env, seg, era)?;
        let mut told = json!({ "file": seg.name(), "open": false, "from": seg.from.to_string(),
            "to": sealed.to.to_string(), "bytes": sealed.bytes, "points": points.len() });
        if self.deep {
            let (frames, end) = self.frames(&path, sealed.end_frames)?;
            told["frames"] = json!(frames);
            if end != sealed.end_frames {
                return Err(StoreError::damaged(&path, format!("the frame at byte {end}")));
            }
        }
        Ok(told)
    }

    /// Whole frames from the start on, and where they end.
    fn frames(&self, path: &Path, limit: u64) -> Result<(u64, u64), StoreError> {
        let file = self.files.open(path, Open::Read).map_err(StoreError::io(path))?;
        let (mut count, mut at) = (0, PAGE);
        while let Ok(frame) = read_frame(file.as_ref(), at, limit) {
            if self.deep && open_payload(&frame).is_err() {
                break;
            }
            at += frame.bytes.len() as u64;
            count += 1;
        }
        Ok((count, at))
    }

    fn run(&self, env: &Env, meta: &RunRef) -> Result<Value, StoreError> {
        let dir = env.idx_dir();
        let run = Run::open(self.files.as_ref(), &dir, env.group_id, *meta)?;
        if self.deep {
            let path = dir.join(meta.name());
            run.check().map_err(StoreError::io(&path))?;
        }
        Ok(json!({ "file": meta.name(), "level": meta.level, "from": meta.lo.to_string(),
            "to": meta.hi.to_string(), "entries": meta.entries, "bytes": meta.bytes }))
    }
}
