//! Frames on their way from the thread that receives them to the one that keeps them.
//!
//! Holds: frames leave in the order in which they came, at most [`AHEAD_BYTES`] are between the two (or
//! one larger frame), and who found no room is woken once half of it is free. Before it: the
//! connection. After it: the store.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use replicator::frame::FrameBuf;

/// Two ends of a queue; `wake` is called by the taking one when there is room again.
pub(super) fn handover<W: Fn()>(wake: W) -> (Giver, Taker<W>) {
    with_room(AHEAD_BYTES, wake)
}

fn with_room<W: Fn()>(room: usize, wake: W) -> (Giver, Taker<W>) {
    let (sender, receiver) = bounded(AHEAD_FRAMES);
    let waiting = Arc::new(Waiting { room, bytes: 0.into(), stuck: false.into() });
    (Giver { sender, waiting: waiting.clone() }, Taker { receiver, waiting, wake })
}

#[derive(Debug)]
struct Waiting {
    /// Bytes.
    room: usize,
    bytes: AtomicUsize,
    /// A frame found no room.
    stuck: AtomicBool,
}

/// The end of the thread that receives.
#[derive(Debug)]
pub(super) struct Giver {
    sender: Sender<FrameBuf>,
    waiting: Arc<Waiting>,
}

impl Giver {
    /// Gives a frame, or has it back: then there is no room, and the other end will wake. If that
    /// is gone the frame may be dropped.
    pub(super) fn give(&self, frame: FrameBuf) -> Option<FrameBuf> {
        let waiting = &self.waiting;
        waiting.stuck.store(false, Ordering::SeqCst);
        if self.is_full(&frame) {
            waiting.stuck.store(true, Ordering::SeqCst);
            // What was taken before `stuck` was seen woke nobody.
            if self.is_full(&frame) {
                return Some(frame);
            }
        }
        self.give_anyway(frame);
        None
    }

    fn is_full(&self, frame: &FrameBuf) -> bool {
        let bytes = self.waiting.bytes.load(Ordering::SeqCst);
        (bytes > 0 && bytes + frame.bytes.len() > self.waiting.room) || self.sender.is_full()
    }

    /// Gives a frame though many wait, once there are fewer than [`AHEAD_FRAMES`]. False: the other
    /// end is gone.
    pub(super) fn give_anyway(&self, frame: FrameBuf) -> bool {
        self.waiting.bytes.fetch_add(frame.bytes.len(), Ordering::SeqCst);
        self.sender.send(frame).is_ok()
    }
}

/// The end of the thread that keeps.
#[derive(Debug)]
pub(super) struct Taker<W> {
    receiver: Receiver<FrameBuf>,
    waiting: Arc<Waiting>,
    wake: W,
}

impl<W: Fn()> Taker<W> {
    /// The next frame, after at most `timeout`.
    pub(super) fn take(&self, timeout: Duration) -> Result<FrameBuf, RecvTimeoutError> {
        let frame = self.receiver.recv_timeout(timeout)?;
        let len = frame.bytes.len();
        let left = self.waiting.bytes.fetch_sub(len, Ordering::SeqCst) - len;
        if left <= self.waiting.room / 2 && self.waiting.stuck.load(Ordering::SeqCst) {
            (self.wake)();
        }
        Ok(frame)
    }
}

/// Bytes of frames that wait: as many as an epoch has whose source writes much.
const AHEAD_BYTES: usize = 32 << 20;
/// Their number.
const AHEAD_FRAMES: usize = 1024;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

    use std::cell::Cell;

    use replicator::wire::{FrameHdr, Kind};

    use super::*;

    const MIB: usize = 1 << 20;

    /// With a body of so many bytes.
    fn frame(len: usize) -> FrameBuf {
        let hdr =
            FrameHdr { kind: Kind::Copy as u8, raw_len: (len as u32).into(), ..Default::default() };
        FrameBuf::seal(hdr, &[], &vec![5; len])
    }

    #[test]
    fn who_found_no_room_is_woken_when_half_of_it_is_free() {
        let woken = Cell::new(0);
        let (giver, taker) = handover(|| woken.set(woken.get() + 1));
        let given = (0..99).take_while(|_| giver.give(frame(MIB)).is_none()).count();
        assert_eq!(given, 31, "each has a header, too");
        for _ in 0..14 {
            taker.take(Duration::ZERO).unwrap();
        }
        assert_eq!(woken.get(), 0);
        taker.take(Duration::ZERO).unwrap();
        assert_eq!(woken.get(), 0, "16 and their headers");
        taker.take(Duration::ZERO).unwrap();
        assert_eq!(woken.get(), 1);
        assert!(giver.give(frame(MIB)).is_none());
        taker.take(Duration::ZERO).unwrap();
        assert_eq!(woken.get(), 1, "nobody waits any more");
    }

    #[test]
    fn a_frame_larger_than_all_room_waits_alone_and_small_ones_are_counted() {
        let (giver, taker) = handover(|| ());
        assert!(giver.give(frame(AHEAD_BYTES)).is_none());
        assert!(giver.give(frame(0)).is_some());
        assert_eq!(taker.take(Duration::ZERO).unwrap().body().len(), AHEAD_BYTES);
        let given = (0..9999).take_while(|_| giver.give(frame(0)).is_none()).count();
        assert_eq!(given, AHEAD_FRAMES);
    }

    #[test]
    fn who_found_no_room_is_woken_though_it_comes_at_that_moment() {
        const COUNT: usize = 100_000;
        let (woken, wake) = bounded(1);
        // Room for none, so each waits for the one before to be taken.
        let (giver, taker) = with_room(1, move || {
            let _ = woken.try_send(());
        });
        let limit = Duration::from_secs(30);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for _ in 0..COUNT {
                    taker.take(limit).unwrap();
                }
            });
            for _ in 0..COUNT {
                let mut held = giver.give(frame(0));
                while let Some(frame) = held {
                    wake.recv_timeout(limit).expect("it is woken");
                    held = giver.give(frame);
                }
            }
        });
    }

    #[test]
    fn frames_come_in_order_and_each_end_sees_that_the_other_is_gone() {
        let (giver, taker) = handover(|| ());
        for len in [3, 1, 2] {
            assert!(giver.give_anyway(frame(len)));
        }
        drop(giver);
        for len in [3, 1, 2] {
            assert_eq!(taker.take(Duration::ZERO).unwrap().body().len(), len);
        }
        assert_eq!(taker.take(Duration::ZERO), Err(RecvTimeoutError::Disconnected));
        let (giver, taker) = handover(|| ());
        drop(taker);
        assert!(giver.give(frame(1)).is_none() && !giver.give_anyway(frame(1)));
    }
}
