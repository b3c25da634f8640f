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
    /// When the answer arrived, on our clock.
    pub at_us: u64,
}

#[derive(Debug)]
struct Shared {
    known: Mutex<Known>,
    floor: Mutex<Option<Lsn>>,
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
        let positions = control.wait(None, Duration::ZERO)?;
        let known = Known { positions, at_us: clock.mono_us() };
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

    /// The target holds everything below `lsn`, durably.
    pub fn set_floor(&self, lsn: Lsn) {
        *lock(&self.shared.floor) = Some(lsn);
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
        let positions = control.wait(Some(durable), FOLLOW)?;
        durable = positions.durable;
        *lock(&shared.known) = Known { positions, at_us: clock.mono_us() };
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
        if let Some(lsn) = told {
            control.ship_floor(lsn)?;
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
