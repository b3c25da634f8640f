//! A filter in memory: disks, durable batches, positions.

use blockfilter::crc32c;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use blockfilter::block::Extent;
use blockfilter::control::{Mode, Positions};
use blockfilter::journal::format::{BATCH_FLUSH, BATCH_MARK, BatchHdr, RecDesc, RecOp};
use blockfilter::journal::reader::ReadError;
use blockfilter::names::Lsn;
use replicator::epoch::Batch;
use replicator::rest::Spent;
use replicator::source::{Control, DiskRange, DiskSource, Journal, Source};
use zerocopy::IntoBytes;

#[derive(Debug)]
pub(crate) struct Written {
    pub end: u64,
    pub disk: usize,
    pub offset: usize,
    pub data: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub initial: Vec<Vec<u8>>,
    pub disks: Vec<Vec<u8>>,
    pub batches: Vec<Batch>,
    pub written: Vec<Written>,
    pub positions: Positions,
    /// Batches below are no longer in the journal.
    pub kept_from: u64,
    /// The batch at this position is damaged.
    pub damaged_at: u64,
    /// How many bytes are written in a microsecond, by the batches' time.
    pub bytes_per_us: u64,
    /// Reads of the journal ahead of what is sent.
    pub read_ahead: u32,
    pub seeds: u32,
    /// What was last told of the target: its position, and whether as a complete copy.
    pub told: (Lsn, bool),
    /// How often it was told that the target holds nothing.
    pub taken_back: u32,
    /// Everything that was told of complete copies.
    pub whole: Vec<Lsn>,
    /// How often its processors were asked for, and whether they compute all the time.
    pub looks: u64,
    pub full: bool,
    /// What was set of its priority, and how often the kernel still refuses that.
    pub background: Vec<bool>,
    pub refuses: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct MemSource(Arc<Mutex<State>>);

impl MemSource {
    pub(crate) fn new(disks: Vec<Vec<u8>>) -> Self {
        let positions = Positions {
            admitted: Lsn(4096),
            durable: Lsn(4096),
            incarnation: 1,
            generation: 1,
            ..Default::default()
        };
        Self(Arc::new(Mutex::new(State {
            initial: disks.clone(),
            disks,
            batches: Vec::new(),
            written: Vec::new(),
            positions,
            kept_from: 4096,
            damaged_at: u64::MAX,
            bytes_per_us: 1,
            read_ahead: 0,
            seeds: 0,
            told: (Lsn(0), false),
            taken_back: 0,
            whole: Vec::new(),
            looks: 0,
            full: false,
            background: Vec::new(),
            refuses: 0,
        })))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn write(&self, disk: usize, offset: usize, data: &[u8]) -> u64 {
        let mut state = self.lock();
        let desc = RecDesc {
            op: RecOp::Write as u8,
            disk: disk as u8,
            offset: (offset as u64).into(),
            len: (data.len() as u32).into(),
            payload_off: 4096.into(),
            crc: crc32c::crc32c(data).into(),
            ..Default::default()
        };
        let end = state.push(desc, data, BATCH_FLUSH);
        state.disks[disk][offset..offset + data.len()].copy_from_slice(data);
        state.written.push(Written { end, disk, offset, data: data.to_vec() });
        end
    }

    pub(crate) fn mark(&self, tag: &str) -> u64 {
        let desc = RecDesc {
            op: RecOp::Mark as u8,
            len: (tag.len() as u32).into(),
            payload_off: 4096.into(),
            crc: crc32c::crc32c(tag.as_bytes()).into(),
            ..Default::default()
        };
        self.lock().push(desc, tag.as_bytes(), BATCH_MARK)
    }

    /// The disks after everything below `lsn`.
    pub(crate) fn at(&self, lsn: u64) -> Vec<Vec<u8>> {
        let state = self.lock();
        let mut disks = state.initial.clone();
        for w in state.written.iter().filter(|w| w.end <= lsn) {
            disks[w.disk][w.offset..w.offset + w.data.len()].copy_from_slice(&w.data);
        }
        disks
    }

    pub(crate) fn durable(&self) -> Lsn {
        self.lock().positions.durable
    }
}

impl State {
    fn push(&mut self, mut desc: RecDesc, payload: &[u8], flags: u8) -> u64 {
        let lsn = self.positions.durable.0;
        desc.lsn = lsn.into();
        let total = 4096 + payload.len().next_multiple_of(4096);
        let hdr = BatchHdr {
            flags,
            n_rec: 1.into(),
            incarnation: self.positions.incarnation.into(),
            generation: self.positions.generation.into(),
            lsn: lsn.into(),
            total_len: (total as u32).into(),
            wall_us: (1_790_000_000_000_000 + lsn).into(),
            mono_us: (lsn / self.bytes_per_us).into(),
            ..Default::default()
        };
        let mut data = vec![0; total];
        data[..128].copy_from_slice(hdr.as_bytes());
        data[128..168].copy_from_slice(desc.as_bytes());
        data[4096..4096 + payload.len()].copy_from_slice(payload);
        self.batches.push(Batch { hdr, data: Arc::new(data), bytes: 0..total });
        let end = lsn + total as u64;
        (self.positions.durable, self.positions.admitted) = (Lsn(end), Lsn(end));
        end
    }
}

impl Source for MemSource {
    fn control(&self) -> io::Result<Box<dyn Control>> {
        Ok(Box::new(self.clone()))
    }
    fn journal(&self) -> Result<Box<dyn Journal>, ReadError> {
        Ok(Box::new(self.clone()))
    }
    fn disks(&self) -> io::Result<Box<dyn DiskSource>> {
        Ok(Box::new(self.clone()))
    }
    fn processors(&self) -> Option<Spent> {
        let mut state = self.lock();
        state.looks += 1;
        let idle = if state.full { 0 } else { state.looks };
        Some(Spent { all: state.looks, idle })
    }
    fn set_background(&self, background: bool) -> io::Result<()> {
        let mut state = self.lock();
        if state.refuses > 0 {
            state.refuses -= 1;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        state.background.push(background);
        Ok(())
    }
}

impl Control for MemSource {
    fn wait(&mut self, after: Option<Lsn>, timeout: Duration) -> io::Result<Positions> {
        let limit = timeout.as_millis() / 2;
        for _ in 0..limit {
            let positions = self.lock().positions.clone();
            if after.is_some_and(|lsn| positions.durable > lsn) {
                return Ok(positions);
            }
            std::thread::park_timeout(Duration::from_millis(2));
        }
        Ok(self.lock().positions.clone())
    }

    fn begin_seed(&mut self) -> io::Result<Lsn> {
        let mut state = self.lock();
        state.positions.mode = Mode::Shipping;
        state.positions.ship_floor = state.positions.durable;
        state.seeds += 1;
        Ok(state.positions.durable)
    }

    fn ship_floor(&mut self, lsn: Lsn, whole: bool) -> io::Result<Positions> {
        let mut state = self.lock();
        assert!(lsn <= state.positions.durable, "the target holds what is not durable");
        state.positions.ship_floor = state.positions.ship_floor.max(lsn);
        state.told = (lsn, whole);
        state.taken_back += u32::from((lsn, whole) == (Lsn(0), false));
        if whole {
            state.whole.push(lsn);
        }
        Ok(state.positions.clone())
    }
}

impl Journal for MemSource {
    fn read(
        &mut self,
        from: Lsn,
        durable: Lsn,
        max: usize,
    ) -> Result<(Vec<Batch>, Lsn), ReadError> {
        let mut state = self.lock();
        state.read_ahead += u32::from(std::thread::current().name() == Some("sf-journal"));
        if from < durable && from.0 < state.kept_from {
            return Err(ReadError::Gone(from));
        }
        if from < durable && from.0 == state.damaged_at {
            return Err(ReadError::Damaged(from, "a test says so"));
        }
        let (mut batches, mut bytes, mut next) = (Vec::new(), 0, from);
        let first = state.batches.partition_point(|b| b.hdr.lsn.get() < from.0);
        for batch in &state.batches[first..] {
            let lsn = batch.hdr.lsn.get();
            if lsn >= durable.0 || lsn == state.damaged_at || bytes >= max {
                break;
            }
            bytes += batch.bytes.len();
            next = Lsn(batch.hdr.lsn.get() + u64::from(batch.hdr.total_len.get()));
            batches.push(batch.clone());
        }
        Ok((batches, next))
    }
}

impl DiskSource for MemSource {
    fn read(&mut self, range: DiskRange, _: Option<DiskRange>) -> io::Result<Vec<u8>> {
        let bytes = &self.lock().disks[range.disk][range.offset as usize..];
        Ok(bytes[..range.len as usize].to_vec())
    }
    fn extents(&mut self, _: usize, _: u64, len: u64) -> io::Result<Vec<Extent>> {
        Ok(vec![Extent { len, hole: false, zero: false }])
    }
}
