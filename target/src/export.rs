//! Export names to views and branches: `GROUP.DISK@POINT`, `drill.<id>.<disk>`.
//!
//! Owns the meaning of names. Before it: the NBD server. After it: views and
//! branches. Names that move (`latest`, times) are resolved when a connection opens
//! them and never advertise multi-conn: four connections would see four points
//! (ruling 17).

use std::sync::Arc;

use blockfilter::block::Export;
use blockfilter::names::Name;

use crate::points::PointSpec;
use crate::store::{GroupStore, Store, StoreError};

/// Why a name cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// It is not a name of an export.
    #[error("{0:?} is not an export: use GROUP.DISK@POINT or drill.ID.DISK")]
    Name(String),
    /// The store has no such thing.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Opens the export that an NBD client asks for by name.
pub fn open_export(store: &Store, name: &str) -> Result<Arc<dyn Export>, ExportError> {
    let bad = || ExportError::Name(name.chars().take(256).collect());
    // Only points have an '@': a group may be called drill, and times have dots.
    let Some((disk, point)) = name.split_once('@') else {
        let drill = name.strip_prefix("drill.").and_then(|rest| rest.split_once('.'));
        let (id, disk) = drill.ok_or_else(bad)?;
        let id: Name = id.parse().map_err(|_| bad())?;
        let disk: Name = disk.parse().map_err(|_| bad())?;
        return Ok(store.drill_export(&id, &disk)?);
    };
    let (group, disk) = disk.split_once('.').ok_or_else(bad)?;
    let group: Name = group.parse().map_err(|_| bad())?;
    let disk: Name = disk.parse().map_err(|_| bad())?;
    let spec: PointSpec = point.parse().map_err(|_| bad())?;
    let store = store.group(&group).ok_or_else(|| StoreError::NoGroup(group.clone()))?;
    let index = disk_index(&store, &disk)?;
    let point = store.resolve(&spec).map_err(StoreError::Point)?;
    let view = store.view(index, &point)?;
    Ok(Arc::new(if spec.is_fixed() { view } else { view.single_conn() }))
}

fn disk_index(store: &GroupStore, disk: &Name) -> Result<u8, StoreError> {
    let group = || store.meta().group.clone();
    store.disk_index(disk).ok_or_else(|| StoreError::NoDisk(group(), disk.to_string()))
}

/// Names to list: every disk's `latest`, and the drills' disks.
pub fn list_exports(store: &Store) -> Vec<String> {
    let mut names = Vec::new();
    for (group, members) in store.groups() {
        if members.newest().is_some() {
            let disks = members.meta().disks.iter();
            names.extend(disks.map(|d| format!("{group}.{}@latest", d.disk)));
        }
    }
    for drill in store.drills() {
        if let Some(members) = store.group(&drill.group) {
            let disks = members.meta().disks.iter();
            names.extend(disks.map(|d| format!("drill.{}.{}", drill.id, d.disk)));
        }
    }
    names
}
