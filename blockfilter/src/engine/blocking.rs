//! The engine by plain system calls on a few threads, for where io_uring is
//! refused. The same operations, the same order, the same tests.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::queue::{Done, Engine, Lanes, Op, Target};

/// Plain system calls on helper threads.
#[derive(Debug)]
pub struct Blocking {
    lanes: Lanes,
    why: String,
}

impl Blocking {
    /// `why` is shown in `status`.
    pub fn new(target: &Arc<Target>, why: &str) -> io::Result<Self> {
        Ok(Self { lanes: Lanes::start(target, READERS)?, why: why.to_owned() })
    }
}

impl Engine for Blocking {
    fn submit(&mut self, op: Op) {
        self.lanes.submit(op);
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        self.lanes.reap(done);
    }

    fn clear(&mut self) {
        self.lanes.clear();
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.lanes.fd()
    }

    fn name(&self) -> String {
        format!("blocking ({})", self.why)
    }
}

/// Threads for reads that miss the page cache.
pub const READERS: usize = 4;
