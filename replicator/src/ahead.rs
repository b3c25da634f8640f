//! Reads a journal for a session: in place while it is near the end, ahead of it by a thread
//! while it is far behind, so that reading from a disk and sending take place at once.
//!
//! Holds: what is read comes in order and without gaps, one read is under way at most, and it
//! begins where the one before ended; the journal is where it is read, so nothing is shared. Before it:
//! [`Journal`]. After it: the session, which is woken when a read is over.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use blockfilter::engine::cpu::{Guest, Place};
use blockfilter::journal::reader::ReadError;
use blockfilter::names::Lsn;
use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded};

use crate::epoch::Batch;
use crate::source::Journal;
use crate::transport::Waker;

/// Batches, and the position behind them and any padding.
type Found = Result<(Vec<Batch>, Lsn), ReadError>;

/// A journal that may be read ahead.
pub(crate) struct Ahead {
    /// None while the thread has it.
    journal: Option<Box<dyn Journal>>,
    thread: Thread,
    /// Where the thread computes.
    place: Place,
}

/// A range to be read, or what was found in it, and the journal it is in.
struct Asked {
    journal: Box<dyn Journal>,
    from: Lsn,
    durable: Lsn,
    place: Place,
}

struct Thread {
    /// None only when it is to end.
    asks: Option<Sender<Asked>>,
    found: Receiver<(Box<dyn Journal>, Found)>,
    handle: Option<JoinHandle<()>>,
}

impl Ahead {
    /// Reads `journal`; `wake` is woken when a read that [`Ahead::read`] left to the thread is
    /// over.
    ///
    /// To be made while the caller may use what it always may: the thread inherits that.
    pub(crate) fn new(journal: Box<dyn Journal>, wake: Arc<Waker>) -> io::Result<Self> {
        let thread = Thread::start(wake)?;
        Ok(Self { journal: Some(journal), thread, place: Place::Anywhere })
    }

    /// Where the thread reads from its next read on.
    pub(crate) fn compute_at(&mut self, place: Place) {
        self.place = place;
    }

    /// Whether a read of these bytes is left to a thread.
    pub(crate) fn is_far(from: Lsn, durable: Lsn) -> bool {
        durable.0.saturating_sub(from.0) >= FAR_BYTES
    }

    /// Whether a read is under way.
    pub(crate) fn is_reading(&self) -> bool {
        self.journal.is_none()
    }

    /// Whole batches from `from`, which is where the last ones ended, not beyond `durable`.
    /// None: they are being read.
    pub(crate) fn read(
        &mut self,
        from: Lsn,
        durable: Lsn,
    ) -> Result<Option<(Vec<Batch>, Lsn)>, ReadError> {
        let Some(mut journal) = self.journal.take() else { return self.found(durable) };
        if Self::is_far(from, durable) {
            self.ask(Asked { journal, from, durable, place: self.place })?;
            return Ok(None);
        }
        let found = journal.read(from, durable, READ_BYTES);
        self.journal = Some(journal);
        found.map(Some)
    }

    /// What the thread read, if that is over; what comes next is read at once if it is far, too.
    fn found(&mut self, durable: Lsn) -> Result<Option<(Vec<Batch>, Lsn)>, ReadError> {
        let (journal, found) = match self.thread.found.try_recv() {
            Ok(found) => found,
            Err(TryRecvError::Empty) => return Ok(None),
            Err(TryRecvError::Disconnected) => return Err(ended().into()),
        };
        let (batches, next) = match found {
            Ok(found) => found,
            Err(error) => {
                self.journal = Some(journal);
                return Err(error);
            }
        };
        if Self::is_far(next, durable) {
            self.ask(Asked { journal, from: next, durable, place: self.place })?;
        } else {
            self.journal = Some(journal);
        }
        Ok(Some((batches, next)))
    }

    fn ask(&self, asked: Asked) -> io::Result<()> {
        let asks = self.thread.asks.as_ref();
        asks.and_then(|asks| asks.send(asked).ok()).ok_or_else(ended)
    }
}

fn ended() -> io::Error {
    io::Error::other("the thread that reads the journal ended")
}

impl Thread {
    fn start(wake: Arc<Waker>) -> io::Result<Self> {
        let (asks, asked) = bounded::<Asked>(1);
        let (finds, found) = bounded(1);
        let run = move || {
            let mut guest = Guest::default();
            for Asked { mut journal, from, durable, place } in asked {
                guest.go(place);
                let read = journal.read(from, durable, READ_BYTES);
                if finds.send((journal, read)).is_err() {
                    break;
                }
                wake.wake();
            }
        };
        let handle = std::thread::Builder::new().name("sf-journal".into()).spawn(run)?;
        Ok(Self { asks: Some(asks), found, handle: Some(handle) })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.asks = None;
        if let Some(handle) = self.handle.take() {
            // It does not panic, and if it did there is nothing left to save.
            let _ = handle.join();
        }
    }
}

/// About as many bytes are read at once.
const READ_BYTES: usize = 4 << 20;
/// From here on a read is left to a thread: less than this is in the arena, for it just came.
const FAR_BYTES: u64 = 2 * READ_BYTES as u64;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

    use std::sync::mpsc;
    use std::thread::{ThreadId, current};
    use std::time::Duration;

    use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

    use super::*;

    /// Tells who read from where, and where it computed; each read brings as many bytes as it is asked for.
    struct Told {
        reads: mpsc::Sender<(ThreadId, u64)>,
        allowed: mpsc::Sender<CpuSet>,
        broken_at: u64,
    }

    impl Journal for Told {
        fn read(&mut self, from: Lsn, durable: Lsn, max: usize) -> Found {
            self.reads.send((current().id(), from.0)).unwrap();
            let _ = self.allowed.send(sched_getaffinity(None).unwrap());
            let next = Lsn(durable.0.min(from.0 + max as u64));
            if next.0 > self.broken_at {
                return Err(ReadError::Gone(from));
            }
            Ok((Vec::new(), next))
        }
    }

    type Reads = mpsc::Receiver<(ThreadId, u64)>;

    fn ahead(broken_at: u64) -> (Ahead, Arc<Waker>, Reads) {
        let (reads, told) = mpsc::channel();
        let wake = Arc::new(Waker::new().unwrap());
        let journal = Told { reads, allowed: mpsc::channel().0, broken_at };
        (Ahead::new(Box::new(journal), wake.clone()).unwrap(), wake, told)
    }

    /// Reads until `durable`, waiting where the thread reads. What every read ended at.
    fn read_all(
        ahead: &mut Ahead,
        wake: &Waker,
        mut at: Lsn,
        durable: Lsn,
    ) -> Result<Vec<u64>, ReadError> {
        let mut ends = Vec::new();
        while at < durable {
            match ahead.read(at, durable)? {
                Some((_, next)) => {
                    ends.push(next.0);
                    at = next;
                }
                None => assert!(wake.wait(LIMIT), "whoever waits for a read is woken"),
            }
        }
        Ok(ends)
    }

    const MIB: u64 = 1 << 20;
    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn what_is_near_is_read_in_place() {
        let (mut ahead, wake, told) = ahead(u64::MAX);
        let ends = read_all(&mut ahead, &wake, Lsn(0), Lsn(8 * MIB - 1)).unwrap();
        assert_eq!(ends, [4 * MIB, 8 * MIB - 1]);
        assert!(told.try_iter().all(|(thread, _)| thread == current().id()));
    }

    #[test]
    fn what_is_far_is_read_ahead_and_in_order() {
        let (mut ahead, wake, told) = ahead(u64::MAX);
        let ends = read_all(&mut ahead, &wake, Lsn(MIB), Lsn(20 * MIB)).unwrap();
        assert_eq!(ends, [5 * MIB, 9 * MIB, 13 * MIB, 17 * MIB, 20 * MIB]);
        let reads: Vec<_> = told.try_iter().collect();
        let from: Vec<u64> = reads.iter().map(|(_, from)| from / MIB).collect();
        assert_eq!(from, [1, 5, 9, 13, 17], "each once");
        let there = |(thread, _): &(ThreadId, u64)| *thread != current().id();
        assert!(reads[..3].iter().all(there) && !reads[3..].iter().any(there));
    }

    #[test]
    fn the_next_read_begins_before_the_last_one_is_used() {
        let (mut ahead, wake, told) = ahead(u64::MAX);
        assert!(ahead.read(Lsn(0), Lsn(64 * MIB)).unwrap().is_none());
        assert!(ahead.is_reading());
        assert!(wake.wait(LIMIT));
        assert!(ahead.read(Lsn(0), Lsn(64 * MIB)).unwrap().is_some());
        assert!(ahead.is_reading());
        let from = [(); 2].map(|()| told.recv_timeout(LIMIT).unwrap().1);
        assert_eq!(from, [0, 4 * MIB]);
        drop(ahead);
        assert_eq!(told.iter().count(), 0, "its end waits for the read and begins no other");
    }

    #[test]
    fn the_thread_reads_where_it_is_told_and_then_where_it_likes() {
        let before = sched_getaffinity(None).unwrap();
        let mut two = CpuSet::new();
        (0..CpuSet::MAX_CPU).filter(|c| before.is_set(*c)).take(2).for_each(|c| two.set(c));
        sched_setaffinity(None, &two).unwrap();
        let wake = Arc::new(Waker::new().unwrap());
        let ((reads, _told), (allowed, computed)) = (mpsc::channel(), mpsc::channel());
        let journal = Box::new(Told { reads, allowed, broken_at: u64::MAX });
        let mut ahead = Ahead::new(journal, wake.clone()).unwrap();
        let cpu = sched_getcpu();
        ahead.compute_at(Place::Off(cpu));
        assert!(ahead.read(Lsn(0), Lsn(64 * MIB)).unwrap().is_none());
        let mut expected = two;
        if two.count() == 2 {
            expected.unset(cpu);
        }
        assert_eq!(computed.recv_timeout(LIMIT).unwrap(), expected);
        ahead.compute_at(Place::Anywhere);
        assert!(wake.wait(LIMIT));
        assert!(ahead.read(Lsn(0), Lsn(64 * MIB)).unwrap().is_some());
        assert_eq!(computed.recv_timeout(LIMIT).unwrap(), two);
        assert_eq!(sched_getaffinity(None).unwrap(), two, "whoever asks stays as it was");
        drop(ahead);
        sched_setaffinity(None, &before).unwrap();
    }

    #[test]
    fn an_error_comes_where_it_belongs_and_the_journal_comes_back() {
        let (mut ahead, wake, _told) = ahead(10 * MIB);
        let error = read_all(&mut ahead, &wake, Lsn(0), Lsn(64 * MIB)).unwrap_err();
        assert!(matches!(error, ReadError::Gone(Lsn(at)) if at == 8 * MIB));
        assert!(!ahead.is_reading());
        assert!(ahead.read(Lsn(0), Lsn(MIB)).unwrap().is_some());
    }
}
