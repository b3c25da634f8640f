//! One disk at one point, read-only.

use blockfilter::block::{Errno, Export, ExportInfo, Extent, ZeroFlags};

/// One disk as it was at a point.
#[derive(Debug)]
pub struct View {}

impl Export for View {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: 0,
            read_only: true,
            multi_conn: true,
            block_min: 1,
            block_preferred: 4096,
            fast_zero: false,
            trim: false,
            description: String::new(),
        }
    }
    fn read(&self, _offset: u64, _buf: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::Io)
    }
    fn write(&self, _offset: u64, _data: &[u8], _fua: bool) -> Result<(), Errno> {
        Err(Errno::Perm)
    }
    fn zero(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> Result<(), Errno> {
        Err(Errno::Perm)
    }
    fn trim(&self, _offset: u64, _len: u64, _fua: bool) -> Result<(), Errno> {
        Err(Errno::Perm)
    }
    fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }
    fn extents(&self, _offset: u64, _len: u64, _max: usize) -> Result<Vec<Extent>, Errno> {
        Err(Errno::Io)
    }
}
