//! The copy of a disk in use: what to read next, and what of it to send.
//!
//! A seed is a fuzzy copy plus the stream from `s` on: a block read at any moment
//! after `s` is too old or too new at worst, and every later write follows in
//! the stream. Owns the walk over the disks. Holds: each step carries `h`, the
//! admitted position asked *after* its read (ruling 1); holes and zero blocks
//! are omitted in a first seed and sent as ZERO in a later one (ruling 20); the
//! cursor only grows. Before it: the filter's NBD socket. After it: the shipper,
//! which sends a step once the source is durable beyond its `h`.

use blockfilter::crc32c;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use blockfilter::block::Extent;
use blockfilter::journal::format::{RecDesc, RecOp};
use blockfilter::names::Lsn;
use crossbeam::channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};

use crate::epoch::is_zero;
use crate::frame::FrameParts;
use crate::source::{Control, DiskRange, DiskSource, Source};
use crate::transport::Waker;
use crate::wire::{CodecId, FrameHdr, Kind};

/// A seed to run.
#[derive(Clone, Debug)]
pub struct SeedPlan {
    /// Where copies are ordered.
    pub s: Lsn,
    /// The target has nothing: zero blocks may be omitted.
    pub first: bool,
    /// Start here: index of the disk and byte.
    pub cursor: (u32, u64),
    /// Sizes of the disks in bytes.
    pub disks: Vec<u64>,
}

impl SeedPlan {
    /// Bytes of all disks.
    pub fn total(&self) -> u64 {
        self.disks.iter().sum()
    }

    /// Bytes before a cursor.
    pub fn done(&self, cursor: (u32, u64)) -> u64 {
        let whole: u64 = self.disks.iter().take(cursor.0 as usize).sum();
        whole + cursor.1
    }
}

/// One read, cut into what is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Records, `Write` and `Zero`, ordered at `s`.
    pub descs: Vec<RecDesc>,
    /// Their payloads.
    pub payload: Vec<u8>,
    /// Everything before this is covered when the step is applied.
    pub cursor: (u32, u64),
    /// May be sent when the source is durable to here.
    pub h: Lsn,
    /// The last step of the seed.
    pub last: bool,
}

impl Step {
    /// The step as a frame; `packed` is the payload compressed, if it was worth it.
    pub fn frame(self, plan: &SeedPlan, head: &CopyHead, packed: Option<Vec<u8>>) -> FrameParts {
        let codec = if packed.is_some() { CodecId::Zstd } else { CodecId::None };
        let hdr = FrameHdr {
            kind: Kind::Copy as u8,
            codec: codec as u8,
            group_id: head.group_id.into(),
            generation: head.generation.into(),
            incarnation: head.incarnation.into(),
            lsn_from: plan.s.0.into(),
            lsn_to: plan.s.0.into(),
            raw_len: (self.payload.len() as u32).into(),
            cursor_disk: self.cursor.0.into(),
            cursor: self.cursor.1.into(),
            ..Default::default()
        };
        FrameParts::seal(hdr, &self.descs, vec![packed.unwrap_or(self.payload).into()])
    }
}

/// What a copy's frames have in common.
#[derive(Clone, Copy, Debug)]
pub struct CopyHead {
    /// See [`crate::session::group_id`].
    pub group_id: u64,
    /// Of the source.
    pub generation: u64,
    /// Of the source.
    pub incarnation: u64,
}

/// Adds what was read at `offset` to a step: runs of blocks that are not zero as
/// writes; zero runs as Zero, or not at all in a first seed. (pure)
fn add_data(step: &mut Step, plan: &SeedPlan, disk: u8, offset: u64, data: Vec<u8>) {
    let mut at = 0;
    while at < data.len() {
        let zero = is_zero(&data[at..data.len().min(at + ZERO_BLOCK)]);
        let mut end = at;
        while end < data.len() {
            let next = data.len().min(end + ZERO_BLOCK);
            if is_zero(&data[end..next]) != zero {
                break;
            }
            end = next;
        }
        let start = offset + at as u64;
        if zero {
            add_zero(step, plan, disk, start, (end - at) as u64);
        } else {
            let run = &data[at..end];
            step.descs.push(RecDesc {
                op: RecOp::Write as u8,
                disk,
                len: (run.len() as u32).into(),
                offset: start.into(),
                lsn: plan.s.0.into(),
                payload_off: (step.payload.len() as u32).into(),
                crc: crc32c::crc32c(run).into(),
                ..Default::default()
            });
            if run.len() == data.len() && step.payload.is_empty() {
                step.payload = data;
                return;
            }
            step.payload.extend_from_slice(run);
        }
        at = end;
    }
}

/// Adds a range that reads as zeroes. (pure)
fn add_zero(step: &mut Step, plan: &SeedPlan, disk: u8, offset: u64, len: u64) {
    if plan.first {
        return;
    }
    step.descs.push(RecDesc {
        op: RecOp::Zero as u8,
        disk,
        len: (len as u32).into(),
        offset: offset.into(),
        lsn: plan.s.0.into(),
        ..Default::default()
    });
}

/// The walk over the disks.
struct Walk<'a> {
    plan: &'a SeedPlan,
    disks: Box<dyn DiskSource>,
    control: Box<dyn Control>,
    /// What is known of the disk from the cursor on, first extent first.
    extents: std::collections::VecDeque<Extent>,
    cursor: (u32, u64),
}

impl Walk<'_> {
    fn next_step(&mut self) -> io::Result<Step> {
        let mut step = Step {
            descs: Vec::new(),
            payload: Vec::new(),
            cursor: self.cursor,
            h: Lsn(0),
            last: false,
        };
        let mut covered = 0;
        while (step.payload.len() as u64) < self.piece_max()
            && covered < COVER_MAX
            && step.descs.len() < DESCS_MAX
        {
            let Some(size) = self.plan.disks.get(self.cursor.0 as usize).copied() else {
                step.last = true;
                break;
            };
            if self.cursor.1 >= size {
                if self.cursor.0 as usize + 1 == self.plan.disks.len() {
                    step.last = true;
                    break;
                }
                if covered > 0 {
                    // The cursor of one frame is in one disk.
                    break;
                }
                self.cursor = (self.cursor.0 + 1, 0);
                self.extents.clear();
                continue;
            }
            covered += self.piece(&mut step, size)?;
        }
        step.cursor = self.cursor;
        // After the reads, never before (ruling 1).
        step.h = self.control.wait(None, Duration::ZERO)?.admitted;
        Ok(step)
    }

    /// Most bytes of one read, and of a step's payload before its last read.
    fn piece_max(&self) -> u64 {
        if self.plan.first { 1 << 20 } else { 256 << 10 }
    }

    /// What is read next if `at` is where the extents that are known begin.
    fn upcoming(&self, disk: usize, mut at: u64) -> Option<DiskRange> {
        for extent in &self.extents {
            if !extent.zero {
                let len = extent.len.min(self.piece_max()) as u32;
                return Some(DiskRange { disk, offset: at, len });
            }
            at += extent.len;
        }
        None
    }

    /// Reads or skips from the cursor on; returns how far it got.
    fn piece(&mut self, step: &mut Step, size: u64) -> io::Result<u64> {
        let (disk, offset) = (self.cursor.0 as usize, self.cursor.1);
        if self.extents.is_empty() {
            let len = (size - offset).min(EXTENTS_AHEAD);
            self.extents = self.disks.extents(disk, offset, len)?.into();
            self.extents.retain(|e| e.len > 0);
        }
        let extent = self.extents.pop_front();
        let mut extent = extent.unwrap_or(Extent { len: size - offset, hole: false, zero: false });
        extent.len = extent.len.min(size - offset);
        let step_len = extent.len.min(if extent.zero { COVER_MAX } else { self.piece_max() });
        if step_len < extent.len {
            self.extents.push_front(Extent { len: extent.len - step_len, ..extent });
        }
        if extent.zero {
            add_zero(step, self.plan, disk as u8, offset, step_len);
        } else {
            let range = DiskRange { disk, offset, len: step_len as u32 };
            let data = self.disks.read(range, self.upcoming(disk, offset + step_len))?;
            add_data(step, self.plan, disk as u8, offset, data);
        }
        self.cursor.1 += step_len;
        Ok(step_len)
    }
}

/// A thread that reads the disks ahead of the shipper, a few steps at most.
#[derive(Debug)]
pub struct Copier {
    steps: Receiver<io::Result<Step>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Copier {
    /// Starts reading; `wake` is woken for each step.
    pub fn start(source: Arc<dyn Source>, plan: SeedPlan, wake: Arc<Waker>) -> io::Result<Self> {
        let (sender, steps) = bounded(STEPS_AHEAD);
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::Builder::new().name("sf-seed".into()).spawn(move || {
            copy(source.as_ref(), &plan, &sender, &stopping, &wake);
        })?;
        Ok(Self { steps, stop, thread: Some(thread) })
    }

    /// The next step, if one is read.
    pub fn next(&self) -> Option<io::Result<Step>> {
        match self.steps.recv_timeout(Duration::ZERO) {
            Ok(step) => Some(step),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                Some(Err(io::Error::other("the reading thread ended")))
            }
        }
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn copy(
    source: &dyn Source,
    plan: &SeedPlan,
    steps: &Sender<io::Result<Step>>,
    stop: &AtomicBool,
    wake: &Waker,
) {
    let walk = source.disks().and_then(|disks| {
        let control = source.control()?;
        let extents = std::collections::VecDeque::new();
        Ok(Walk { plan, disks, control, extents, cursor: plan.cursor })
    });
    let mut walk = match walk {
        Ok(walk) => walk,
        Err(error) => {
            let _ = steps.send_timeout(Err(error), Duration::from_secs(1));
            wake.wake();
            return;
        }
    };
    loop {
        let mut step = walk.next_step();
        let done = step.as_ref().map_or(true, |s| s.last);
        while let Err(SendTimeoutError::Timeout(back)) =
            steps.send_timeout(step, Duration::from_millis(100))
        {
            if stop.load(Ordering::SeqCst) {
                return;
            }
            step = back;
        }
        wake.wake();
        if done || stop.load(Ordering::SeqCst) {
            return;
        }
    }
}

/// Zero blocks are found in units of this many bytes.
const ZERO_BLOCK: usize = 4096;
/// Most bytes of holes in one step.
const COVER_MAX: u64 = 1 << 30;
const DESCS_MAX: usize = 1024;
const EXTENTS_AHEAD: u64 = 1 << 30;
const STEPS_AHEAD: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::FrameBuf;
    use blockfilter::control::Positions;

    /// The disks, and the range that was said to be next.
    struct Memory(Vec<Vec<u8>>, Option<DiskRange>);

    impl DiskSource for Memory {
        fn read(&mut self, range: DiskRange, next: Option<DiskRange>) -> io::Result<Vec<u8>> {
            let said = std::mem::replace(&mut self.1, next);
            assert!(
                said.is_none_or(|said| said == range),
                "{said:?}, not {range:?}, was asked for"
            );
            Ok(self.0[range.disk][range.offset as usize..][..range.len as usize].to_vec())
        }
        fn extents(&mut self, disk: usize, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
            let mut rest = &self.0[disk][offset as usize..][..len as usize];
            let mut extents = Vec::new();
            while !rest.is_empty() {
                let zeroes = rest.iter().take_while(|b| **b == 0).count() / 4096 * 4096;
                let data = rest.iter().take_while(|b| **b != 0).count();
                let (len, zero) = (zeroes.max(data).max(1), zeroes > 0);
                extents.push(Extent { len: len as u64, hole: zero, zero });
                rest = &rest[len..];
            }
            Ok(extents)
        }
    }

    struct Still;

    impl Control for Still {
        fn wait(&mut self, _: Option<Lsn>, _: Duration) -> io::Result<Positions> {
            Ok(Positions { admitted: Lsn(77), ..Default::default() })
        }
        fn begin_seed(&mut self) -> io::Result<Lsn> {
            Ok(Lsn(0))
        }
        fn ship_floor(&mut self, _: Lsn, _: bool) -> io::Result<Positions> {
            Ok(Positions::default())
        }
    }

    fn walked(first: bool, cursor: (u32, u64), disks: &[Vec<u8>]) -> Vec<Step> {
        let plan = SeedPlan {
            s: Lsn(50),
            first,
            cursor,
            disks: disks.iter().map(|d| d.len() as u64).collect(),
        };
        let mut walk = Walk {
            plan: &plan,
            disks: Box::new(Memory(disks.to_vec(), None)),
            control: Box::new(Still),
            extents: Default::default(),
            cursor,
        };
        let mut steps = vec![walk.next_step().unwrap()];
        while !steps[steps.len() - 1].last {
            steps.push(walk.next_step().unwrap());
        }
        steps
    }

    fn apply(steps: &[Step], disks: &mut [Vec<u8>]) {
        for step in steps {
            assert_eq!(step.h, Lsn(77));
            for desc in &step.descs {
                let range = desc.offset.get() as usize..desc.end() as usize;
                let place = &mut disks[usize::from(desc.disk)][range];
                match desc.rec_op() {
                    Some(RecOp::Zero) => place.fill(0),
                    _ => place.copy_from_slice(
                        &step.payload[desc.payload_off.get() as usize..][..desc.len.get() as usize],
                    ),
                }
            }
        }
    }

    fn disks() -> Vec<Vec<u8>> {
        let mut a = vec![0; 3 << 20];
        a[8192..20_480].fill(1);
        a[1 << 20..(2 << 20) + 512].fill(2);
        let mut b = vec![0; 10_240];
        b[9_000] = 3;
        vec![a, b]
    }

    #[test]
    fn a_first_seed_omits_zeroes_and_copies_the_rest() {
        let disks = disks();
        let steps = walked(true, (0, 0), &disks);
        let mut copy: Vec<Vec<u8>> = disks.iter().map(|d| vec![0; d.len()]).collect();
        apply(&steps, &mut copy);
        assert!(copy == disks);
        assert!(steps.iter().all(|s| s.descs.iter().all(|d| d.op == RecOp::Write as u8)));
        let last = &steps[steps.len() - 1];
        assert_eq!(last.cursor, (1, 10_240));
    }

    #[test]
    fn a_later_seed_sends_zeroes() {
        let disks = disks();
        let steps = walked(false, (0, 0), &disks);
        let mut copy: Vec<Vec<u8>> = disks.iter().map(|d| vec![9; d.len()]).collect();
        apply(&steps, &mut copy);
        assert!(copy == disks);
    }

    #[test]
    fn a_seed_goes_on_at_any_cursor_it_gave() {
        let disks = disks();
        let steps = walked(false, (0, 0), &disks);
        for cut in 0..steps.len() {
            let mut copy: Vec<Vec<u8>> = disks.iter().map(|d| vec![9; d.len()]).collect();
            apply(&steps[..=cut], &mut copy);
            apply(&walked(false, steps[cut].cursor, &disks), &mut copy);
            assert!(copy == disks, "cut after step {cut}");
        }
    }

    #[test]
    fn a_steps_frame_is_valid() {
        let disks = disks();
        let plan = SeedPlan { s: Lsn(50), first: true, cursor: (0, 0), disks: vec![3 << 20] };
        let head = CopyHead { group_id: 1, generation: 1, incarnation: 1 };
        for step in walked(true, (0, 0), &disks) {
            let frame = step.frame(&plan, &head, None).join();
            assert_eq!(FrameBuf::from_bytes(frame.bytes.clone()).unwrap(), frame);
        }
    }
}
