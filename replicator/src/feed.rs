//! Two small threads between a session and the filter's control socket: one
//! follows the positions, one tells the ship floor.
//!
//! Holds: a filter that does not answer never stops the session, only what it
//! knows grows old; the ship floor told is what the target acknowledged as
//! durable, never more.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use blockfilter::control::Positions;
use blockfilter::engine::Clock;
use blockfilter::names::Lsn;

use crate::source::{Control, Source};
use crate::transport::Waker;

/// Positions, and when they were true.
#[derive(Clone, Debug)]
pub struct Known {
    /// What the filter said.
    pub positions: Positions,
    /// When the question was asked, on our clock: they were true then or later.
    pub at_us: u64,
}

#[derive(Debug)]
struct Shared {
    known: Mutex<Known>,
    floor: Mutex<Option<(Lsn, bool)>>,
    floor_changed: Condvar,
    failed: Mutex<Option<String>>,
    stop: AtomicBool,
}

/// Follows one filter for one session.
#[derive(Debug)]
pub struct Feed {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Feed {
    /// Asks once, then follows; `wake` is woken at each change.
    pub fn start(
        source: &Arc<dyn Source>,
        clock: &Arc<dyn Clock>,
        wake: &Arc<Waker>,
    ) -> io::Result<Self> {
        let mut control = source.control()?;
        let at_us = clock.mono_us();
        let positions = control.wait(None, Duration::ZERO)?;
        let known = Known { positions, at_us };
        let shared = Arc::new(Shared {
            known: Mutex::new(known),
            floor: Mutex::new(None),
            floor_changed: Condvar::new(),
            failed: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let mut feed = Self { shared: shared.clone(), threads: Vec::new() };
        let (following, clock, woken) = (shared.clone(), clock.clone(), wake.clone());
        let follower =
            std::thread::Builder::new().name("sf-positions".into()).spawn(move || {
                let ended = follow(&following, control.as_mut(), clock.as_ref(), &woken);
                following.fail(ended, &woken);
            })?;
        feed.threads.push(follower);
        let mut control = source.control()?;
        let woken = wake.clone();
        let teller = std::thread::Builder::new().name("sf-floor".into()).spawn(move || {
            let ended = tell(&shared, control.as_mut());
            shared.fail(ended, &woken);
        })?;
        feed.threads.push(teller);
        Ok(feed)
    }

    /// The newest positions; an error once the filter is gone.
    pub fn known(&self) -> io::Result<Known> {
        if let Some(why) = &*lock(&self.shared.failed) {
            return Err(io::Error::other(why.clone()));
        }
        Ok(lock(&self.shared.known).clone())
    }

    /// The target holds everything below `lsn`, durably; `whole`: and a complete copy as of it.
    pub fn set_floor(&self, lsn: Lsn, whole: bool) {
        *lock(&self.shared.floor) = Some((lsn, whole));
        self.shared.floor_changed.notify_one();
    }
}

impl Shared {
    fn fail(&self, ended: io::Result<()>, wake: &Waker) {
        if let Err(error) = ended {
            lock(&self.failed)
                .get_or_insert_with(|| format!("the filter does not answer: {error}"));
            wake.wake();
        }
    }
}

fn follow(
    shared: &Shared,
    control: &mut dyn Control,
    clock: &dyn Clock,
    wake: &Waker,
) -> io::Result<()> {
    let mut durable = lock(&shared.known).positions.durable;
    while !shared.stop.load(Ordering::SeqCst) {
        let at_us = clock.mono_us();
        let positions = control.wait(Some(durable), FOLLOW)?;
        durable = positions.durable;
        *lock(&shared.known) = Known { positions, at_us };
        wake.wake();
        // A database may commit thousands of times a second: epochs take
        // longer, and each question costs the filter time.
        std::thread::sleep(FOLLOW_EVERY);
    }
    Ok(())
}

fn tell(shared: &Shared, control: &mut dyn Control) -> io::Result<()> {
    while !shared.stop.load(Ordering::SeqCst) {
        let floor = lock(&shared.floor);
        let waited = shared.floor_changed.wait_timeout_while(floor, FLOOR_WAIT, |f| f.is_none());
        let (mut floor, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let told = floor.take();
        drop(floor);
        if let Some((lsn, whole)) = told {
            control.ship_floor(lsn, whole)?;
        }
    }
    Ok(())
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.floor_changed.notify_one();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

const FOLLOW: Duration = Duration::from_millis(50);
const FOLLOW_EVERY: Duration = Duration::from_millis(4);
const FLOOR_WAIT: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use blockfilter::journal::reader::ReadError;

    use super::*;
    use crate::source::{DiskSource, Journal};

    /// Its answers take a second.
    #[derive(Clone, Debug, Default)]
    struct Slow(Arc<AtomicU64>);

    impl Clock for Slow {
        fn mono_us(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
        fn wall_us(&self) -> u64 {
            0
        }
    }

    impl Control for Slow {
        fn wait(&mut self, after: Option<Lsn>, _: Duration) -> io::Result<Positions> {
            if after.is_some() {
                return Err(io::Error::other("the filter ended"));
            }
            let mono_us = self.0.fetch_add(1_000_000, Ordering::SeqCst);
            Ok(Positions { mono_us, ..Default::default() })
        }
        fn begin_seed(&mut self) -> io::Result<Lsn> {
            Ok(Lsn(0))
        }
        fn ship_floor(&mut self, _: Lsn, _: bool) -> io::Result<Positions> {
            Ok(Positions::default())
        }
    }

    impl Source for Slow {
        fn control(&self) -> io::Result<Box<dyn Control>> {
            Ok(Box::new(self.clone()))
        }
        fn journal(&self) -> Result<Box<dyn Journal>, ReadError> {
            Err(ReadError::Gone(Lsn(0)))
        }
        fn disks(&self) -> io::Result<Box<dyn DiskSource>> {
            Err(io::Error::other("no disks"))
        }
        fn processors(&self) -> Option<crate::rest::Spent> {
            None
        }
        fn set_background(&self, _: bool) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn positions_are_as_old_as_the_question() {
        let slow = Slow::default();
        let clock: Arc<dyn Clock> = Arc::new(slow.clone());
        let source: Arc<dyn Source> = Arc::new(slow);
        let feed = Feed::start(&source, &clock, &Arc::new(Waker::new().unwrap())).unwrap();
        let known = lock(&feed.shared.known).clone();
        assert_eq!(known.at_us, known.positions.mono_us);
    }
}
