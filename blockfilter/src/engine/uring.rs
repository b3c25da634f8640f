//! The engine on io_uring: the journal's writes go from the registered arena with
//! O_DIRECT, its syncs beside them; everything else to [`Lanes`].
//!
//! Buffered writes never go through io_uring: on ext4 they are handed to
//! kernel workers that serialise per file (engine.md §4).

#![expect(unsafe_code, reason = "io_uring takes raw pointers; here only")]

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use super::blocking::READERS;
use super::queue::{Done, Engine, Lanes, Op, Target};

/// io_uring for the journal, threads for the disks.
#[derive(Debug)]
pub struct Uring {
    ring: Ring,
    lanes: Lanes,
    target: Arc<Target>,
    fixed: bool,
    next_id: u64,
    writes: HashMap<u64, Write>,
    syncs: usize,
    failed: bool,
    /// A submission failed: reported as a failed journal write.
    broken: Option<io::Error>,
}

struct Ring(IoUring);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IoUring")
    }
}

#[derive(Clone, Copy, Debug)]
struct Write {
    at: u64,
    pos: u64,
    len: u64,
    /// A commit: durable when it is done, and answered as a sync.
    durable: bool,
}

impl Uring {
    /// Fails where io_uring is refused (EPERM, ENOSYS) or the journal is no
    /// real file. Must be called on the thread that will use it.
    pub fn new(target: &Arc<Target>) -> io::Result<Self> {
        if target.journal.fd().is_none() {
            return Err(io::Error::other("the journal is not a real file"));
        }
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(ENTRIES)
            .or_else(|_| IoUring::new(ENTRIES))?;
        let lanes = Lanes::start(target, READERS)?;
        ring.submitter().register_eventfd(lanes.fd().as_raw_fd())?;
        let (start, len) = target.arena.mapping();
        let arena = libc_iovec(start, len);
        // SAFETY: the arena's mapping lives as long as `target`, which this engine
        // holds until after the ring is dropped (field order).
        let fixed = unsafe { ring.submitter().register_buffers(&[arena]) }.is_ok();
        Ok(Self {
            ring: Ring(ring),
            lanes,
            target: target.clone(),
            fixed,
            next_id: 1,
            writes: HashMap::new(),
            syncs: 0,
            failed: false,
            broken: None,
        })
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the entry's buffer is a frozen range of the arena, which is
            // neither written nor unmapped until its completion was reaped (the
            // filter releases arena space only after the commit).
            if unsafe { self.ring.0.submission().push(entry) }.is_ok() {
                break;
            }
            self.ring.0.submit()?;
        }
        self.ring.0.submit().map(|_| ())
    }

    fn begin(&mut self, write: Write) -> io::Result<()> {
        let id = self.next_id;
        self.next_id += 1;
        self.writes.insert(id, write);
        self.write(id)
    }

    fn write(&mut self, id: u64) -> io::Result<()> {
        let Write { at, pos, len, durable } = self.writes[&id];
        let fd = self.journal_fd();
        let bytes = self.target.arena.bytes(pos, len).as_ptr();
        let len = u32::try_from(len).map_err(io::Error::other)?;
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        let entry = if self.fixed {
            opcode::WriteFixed::new(fd, bytes, len, 0).offset(at).rw_flags(flags).build()
        } else {
            opcode::Write::new(fd, bytes, len).offset(at).rw_flags(flags).build()
        };
        self.push(&entry.user_data(id))
    }

    fn sync(&mut self) -> io::Result<()> {
        let fsync = opcode::Fsync::new(self.journal_fd()).flags(types::FsyncFlags::DATASYNC);
        self.push(&fsync.build().user_data(SYNC_ID))?;
        self.syncs += 1;
        Ok(())
    }

    fn journal_fd(&self) -> types::Fd {
        let fd = self.target.journal.fd().expect("checked when the engine was made");
        types::Fd(fd.as_raw_fd())
    }

    fn reap_ring(&mut self, done: &mut Vec<Done>) {
        if self.ring.0.submission().taskrun() {
            // SAFETY: no argument is passed; GETEVENTS runs deferred completions.
            let entered = unsafe { self.ring.0.submitter().enter::<()>(0, 0, GETEVENTS, None) };
            if let Err(error) = entered {
                tracing::warn!(%error, "io_uring_enter failed; completions are taken all the same");
            }
        }
        let found: Vec<(u64, i32)> =
            self.ring.0.completion().map(|c| (c.user_data(), c.result())).collect();
        for (id, result) in found {
            if id == SYNC_ID {
                self.syncs -= 1;
                done.push(Done::JournalSync(self.outcome(result).map(|_| ())));
                continue;
            }
            let durable = self.writes.get(&id).is_some_and(|w| w.durable);
            let outcome = self.outcome(result);
            if let Some(finished) = self.handle_write(id, outcome) {
                done.push(match durable {
                    true => Done::JournalSync(finished),
                    false => Done::JournalWrite(finished),
                });
            }
        }
    }

    fn handle_write(&mut self, id: u64, outcome: io::Result<u64>) -> Option<io::Result<()>> {
        match outcome {
            Err(error) => {
                self.writes.remove(&id);
                Some(Err(error))
            }
            Ok(0) => {
                self.writes.remove(&id);
                self.failed = true;
                Some(Err(io::ErrorKind::WriteZero.into()))
            }
            Ok(count) => {
                let write = self.writes.get_mut(&id)?;
                write.at += count;
                write.pos += count;
                write.len -= count.min(write.len);
                if write.len == 0 {
                    self.writes.remove(&id);
                    return Some(Ok(()));
                }
                self.write(id).err().map(Err)
            }
        }
    }

    fn outcome(&mut self, result: i32) -> io::Result<u64> {
        if result < 0 {
            self.failed = true;
            return Err(io::Error::from_raw_os_error(-result));
        }
        if self.failed {
            return Err(io::Error::other("an earlier write or sync of the journal failed"));
        }
        Ok(result as u64)
    }
}

impl Engine for Uring {
    fn submit(&mut self, op: Op) {
        let started = match op {
            Op::JournalWrite { at, pos, len } => self.begin(Write { at, pos, len, durable: false }),
            Op::JournalCommit { at, pos, len } => self.begin(Write { at, pos, len, durable: true }),
            Op::JournalSync => self.sync(),
            other => {
                self.lanes.submit(other);
                return;
            }
        };
        if let Err(error) = started {
            // The ring itself is broken: the journal cannot be written any more.
            tracing::error!(%error, "io_uring refuses submissions");
            self.broken = Some(error);
            self.lanes.signal();
        }
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        self.lanes.reap(done);
        self.reap_ring(done);
        done.extend(self.broken.take().map(|e| Done::JournalWrite(Err(e))));
    }

    fn clear(&mut self) {
        self.lanes.clear();
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.lanes.fd()
    }

    fn name(&self) -> String {
        if self.fixed { "io_uring".into() } else { "io_uring (buffers not registered)".into() }
    }
}

/// Waits for what is in flight: nothing of ours reaches the journal later (I12).
impl Drop for Uring {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while (!self.writes.is_empty() || self.syncs > 0) && self.broken.is_none() {
            if let Err(error) = self.ring.0.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                tracing::error!(%error, "waiting for the journal's I/O failed");
                return;
            }
            self.reap_ring(&mut done);
        }
    }
}

fn libc_iovec(start: *mut u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: start.cast(), iov_len: len }
}

const ENTRIES: u32 = 128;
const SYNC_ID: u64 = 0;
const GETEVENTS: u32 = 1;
