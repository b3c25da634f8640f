//! Changes of the disks: from a valid request to a record in filter and overlay.

use std::io;

use super::{Refusal, SPACE_MARGIN, Volume};
use crate::block::{Errno, SECTOR, ZeroFlags};
use crate::filter::{Admitted, NewRecord, Stall};
use crate::group::landing::Landing;
use crate::journal::format::{REC_FUA, REC_NO_HOLE, RecOp};

impl Volume {
    /// Writes the first part of `data` and tells how many bytes it took and the
    /// position that must be durable for FUA. Call again with the rest.
    pub fn write(
        &mut self,
        disk: u8,
        offset: u64,
        data: &[u8],
        fua: bool,
    ) -> Result<(usize, u64), Refusal> {
        let flags = if fua { REC_FUA } else { 0 };
        self.check_writable(disk, data.len() as u64)?;
        let lead = offset % SECTOR;
        if lead != 0 || (data.len() as u64) < SECTOR {
            return self.write_part_sector(disk, offset, data, flags);
        }
        let max = (data.len() as u64 / SECTOR * SECTOR).min(self.record_max());
        let part = &data[..max as usize];
        let end = self.admit(RecOp::Write, flags, disk, offset, part.len() as u64, part)?;
        self.writes += 1;
        self.write_bytes += max;
        Ok((part.len(), end))
    }

    /// Completes less than a sector from what is there (ruling 8).
    fn write_part_sector(
        &mut self,
        disk: u8,
        offset: u64,
        data: &[u8],
        flags: u16,
    ) -> Result<(usize, u64), Refusal> {
        let lead = offset % SECTOR;
        let start = offset - lead;
        let count = (SECTOR - lead).min(data.len() as u64) as usize;
        let mut sector = self.read_blocking(disk, start, SECTOR)?;
        sector[lead as usize..lead as usize + count].copy_from_slice(&data[..count]);
        let end = self.admit(RecOp::Write, flags, disk, start, SECTOR, &sector)?;
        Ok((count, end))
    }

    /// Makes the first part of the range read as zeroes; as [`Volume::write`].
    pub fn zero(
        &mut self,
        disk: u8,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
        trim: bool,
    ) -> Result<(u64, u64), Refusal> {
        self.check_writable(disk, 0)?;
        let fua = if flags.fua { REC_FUA } else { 0 };
        if !offset.is_multiple_of(SECTOR) || len < SECTOR {
            let zeroes = [0; SECTOR as usize];
            let count = (SECTOR - offset % SECTOR).min(len) as usize;
            let (done, end) = self.write_part_sector(disk, offset, &zeroes[..count], fua)?;
            return Ok((done as u64, end));
        }
        let len = len / SECTOR * SECTOR;
        let bits = if flags.no_hole && !trim { fua | REC_NO_HOLE } else { fua };
        let op = if trim { RecOp::Trim } else { RecOp::Zero };
        let end = self.admit(op, bits, disk, offset, len, &[])?;
        self.writes += 1;
        if bits & REC_NO_HOLE == 0 {
            // The range will be a hole: later writes to it need space again.
            let disk = &mut self.disks[usize::from(disk)];
            disk.sparse = !disk.device;
        }
        Ok((len, end))
    }

    fn admit(
        &mut self,
        op: RecOp,
        flags: u16,
        disk: u8,
        offset: u64,
        len: u64,
        payload: &[u8],
    ) -> Result<u64, Refusal> {
        self.move_out();
        let rec = self.record(op, flags, disk, offset, len, payload);
        let now = self.clock.mono_us();
        let result = self.filter.admit(&rec, &mut self.memory, now);
        self.admitted(&rec, result)
    }

    fn record<'a>(
        &self,
        op: RecOp,
        flags: u16,
        disk: u8,
        offset: u64,
        len: u64,
        payload: &'a [u8],
    ) -> NewRecord<'a> {
        let size = self.disks[usize::from(disk)].size;
        assert!(offset + len <= size.next_multiple_of(SECTOR), "I1: a validated range");
        NewRecord { op, flags, disk, offset, len: len as u32, payload }
    }

    fn admitted(
        &mut self,
        rec: &NewRecord<'_>,
        result: Result<Admitted, Stall>,
    ) -> Result<u64, Refusal> {
        let admitted = result.map_err(|stall| self.refusal(stall))?;
        let overlay = &mut self.overlays[usize::from(rec.disk)];
        if rec.op == RecOp::Write {
            overlay.insert_write(admitted.lsn, rec.offset, u64::from(rec.len), admitted.pos);
        } else {
            overlay.insert_zero(admitted.lsn, rec.offset, u64::from(rec.len));
        }
        Ok(admitted.lsn + 1)
    }

    fn refusal(&self, (Stall::Arena | Stall::Journal): Stall) -> Refusal {
        match self.filter.stall_is_final() {
            true => Refusal::Fail(Errno::Io),
            false => Refusal::Stalled,
        }
    }

    /// Makes a place in the arena for a write's payload, to be received there: whole sectors, at
    /// most [`Volume::record_max`]. False if there is none now: receive it elsewhere.
    pub fn land(&mut self, owner: u64, disk: u8, len: u64) -> Result<bool, Refusal> {
        if self.landing.is_some() || self.landings_left_out > 0 {
            self.landings_left_out = self.landings_left_out.saturating_sub(1);
            return Ok(false);
        }
        self.check_writable(disk, len)?;
        let now = self.clock.mono_us();
        let place = self.filter.land(len, &mut self.memory, now);
        let place = place.map_err(|stall| self.refusal(stall))?;
        self.landing = place.map(|pos| Landing::new(owner, pos, len));
        Ok(self.landing.is_some())
    }

    /// Lets `read` put the next bytes of the owner's payload into the arena; what it returned. None
    /// if another record took the place: [`Volume::take_back`] has what came.
    pub fn receive(
        &mut self,
        owner: u64,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        let landing = self.landing.as_mut().filter(|l| l.owner == owner)?;
        Some(landing.receive(&self.memory.0, read))
    }

    /// A buffer as long as the owner's payload with the bytes that came.
    pub fn take_back(&mut self, owner: u64) -> Vec<u8> {
        if self.landing.as_ref().is_some_and(|l| l.owner == owner) {
            self.move_out();
        }
        self.moved_out.remove(&owner).unwrap_or_default()
    }

    /// As [`Volume::write`] of the owner's payload, which is complete in its place. If it is not
    /// carried out the bytes stay there.
    pub fn write_landed(
        &mut self,
        owner: u64,
        disk: u8,
        offset: u64,
        fua: bool,
    ) -> Result<u64, Refusal> {
        let landing = self.landing.as_ref().filter(|l| l.owner == owner);
        let landing = landing.expect("I1: the place is the owner's");
        let (payload, flags) =
            ((landing.pos, landing.len, landing.crc()), u16::from(fua) * REC_FUA);
        self.check_writable(disk, payload.1)?;
        let rec = self.record(RecOp::Write, flags, disk, offset, payload.1, &[]);
        let now = self.clock.mono_us();
        let result = self.filter.admit_landed(&rec, payload, &mut self.memory, now);
        let end = self.admitted(&rec, result)?;
        self.landing = None;
        self.writes += 1;
        self.write_bytes += payload.1;
        Ok(end)
    }

    /// Frees the place: something else is admitted.
    fn move_out(&mut self) {
        if let Some(landing) = self.landing.take() {
            let owner = landing.owner;
            self.landings_left_out = LEFT_OUT;
            self.moved_out.insert(owner, landing.move_out(&self.memory.0));
        }
    }

    fn check_writable(&mut self, disk: u8, len: u64) -> Result<(), Refusal> {
        if let Some(errno) = self.filter.refusal(disk) {
            return Err(Refusal::Fail(errno));
        }
        match self.is_full(usize::from(disk), len) {
            true => Err(Refusal::Fail(Errno::NoSpc)),
            false => Ok(()),
        }
    }

    /// Whether a write of `len` bytes may find no room in the disk's file system.
    pub(super) fn is_full(&self, index: usize, len: u64) -> bool {
        let disk = &self.disks[index];
        let unapplied = self.filter.admitted() - self.applied();
        let refused = self.filter.refusal(index as u8) == Some(Errno::NoSpc);
        refused || (disk.sparse && self.free[index] < unapplied + len + SPACE_MARGIN)
    }

    /// Admits a mark; its point's position. Stalled if there is no room yet.
    pub fn mark(&mut self, tag: &[u8], app: bool) -> Result<u64, Refusal> {
        let now = self.clock.mono_us();
        self.move_out();
        self.filter.admit_mark(tag, app, &mut self.memory, now).map_err(|_| Refusal::Stalled)
    }
}

/// Payloads that go the other way after one lost its place: being copied twice costs more than once.
const LEFT_OUT: u32 = 16;
