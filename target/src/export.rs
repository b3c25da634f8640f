//! Export names to views and branches: `GROUP.DISK@POINT`, `drill.<id>.<disk>`.

use std::sync::Arc;

use blockfilter::block::Export;

use crate::store::{Store, StoreError};

/// Opens the export that an NBD client asks for by name. Names that move
/// (`latest`, times) are resolved now and do not advertise multi-conn.
pub fn open_export(_store: &Store, _name: &str) -> Result<Arc<dyn Export>, StoreError> {
    Err(StoreError::Invalid("not built"))
}

/// Names to list: every disk's `latest`, and the drills.
pub fn list_exports(_store: &Store) -> Vec<String> {
    Vec::new()
}
