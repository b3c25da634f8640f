//! Giving records their LSN and batches their place. (pure)

use crate::crc32c;
use zerocopy::IntoBytes;

use super::{
    Admitted, BATCH_MAX, Filter, Marker, Memory, NewRecord, OpenBatch, Place, SEGMENT_MAX, Segment,
    Stall,
};
use crate::apply::SealedBatch;
use crate::control::Mode;
use crate::journal::batch::{chunk_page, finish_batch};
use crate::journal::format::*;

impl Filter {
    /// Everything sealed but not durable is written (again) to the journal.
    pub(super) fn queue_undurable(&mut self) {
        if self.mode == Mode::Unjournaled {
            return;
        }
        let chunk = self.config.geometry.chunk;
        let batches: Vec<(u64, u64, bool)> = self
            .sealed
            .iter()
            .filter(|b| b.end > self.durable)
            .map(|b| (b.lsn, b.end, b.descs.is_empty()))
            .collect();
        for (lsn, end, pad) in batches {
            if lsn % chunk == PAGE {
                assert!(self.slots.assign(lsn), "I5: it had a slot before the restart");
                self.push_segment(lsn - PAGE, PAGE);
            }
            self.push_segment(lsn, if pad { PAGE } else { end - lsn });
        }
        if !self.open.descs.is_empty() && self.open.lsn % chunk == PAGE {
            assert!(self.slots.assign(self.open.lsn), "I5: it had a slot before the restart");
            self.push_segment(self.open.lsn - PAGE, PAGE);
        }
    }

    /// Gives a record its LSN and puts it, complete, into the open batch.
    pub fn admit(
        &mut self,
        rec: &NewRecord<'_>,
        mem: &mut impl Memory,
        now: u64,
    ) -> Result<Admitted, Stall> {
        let len = rec.payload.len() as u64;
        let place = self.make_place(len, mem, now)?;
        let crc = fill_summed(mem, place.pos, rec.payload);
        Ok(self.place_record(rec, &place, len, crc, mem))
    }

    /// Makes a place for a payload that is received straight into the arena. It is the payload's
    /// if [`Filter::admit_landed`] is the next admission. None at a chunk's end: padding comes only
    /// with the record behind it.
    pub fn land(
        &mut self,
        len: u64,
        mem: &mut impl Memory,
        now: u64,
    ) -> Result<Option<u64>, Stall> {
        // A commit, which seals what is open, leaves an empty batch where it is.
        self.seal(0, mem, now);
        if self.place(len).pad {
            return Ok(None);
        }
        Ok(Some(self.make_place(len, mem, now)?.pos))
    }

    /// As [`Filter::admit`] of a write whose payload of `len` bytes is at `pos` already, where
    /// [`Filter::land`] said, and has this CRC.
    pub fn admit_landed(
        &mut self,
        rec: &NewRecord<'_>,
        (pos, len, crc): (u64, u64, u32),
        mem: &mut impl Memory,
        now: u64,
    ) -> Result<Admitted, Stall> {
        let place = self.make_place(len, mem, now)?;
        assert_eq!(place.pos, pos, "I1: the payload is where its record will look for it");
        Ok(self.place_record(rec, &place, len, crc, mem))
    }

    /// Makes room for the next record.
    fn make_place(&mut self, len: u64, mem: &mut impl Memory, now: u64) -> Result<Place, Stall> {
        assert!(len <= self.config.record_max());
        let first = self.open.descs.is_empty() && self.segments.is_empty();
        let place = self.place(len);
        if place.end > self.released() + self.config.arena {
            self.pressed = Some(Stall::Arena);
            self.spacing.waits();
            return Err(Stall::Arena);
        }
        let journaled = self.mode != Mode::Unjournaled;
        if journaled && !self.slots.assign(place.lsn) {
            self.pressed = Some(Stall::Journal);
            return Err(Stall::Journal);
        }
        if place.seal {
            self.seal(0, mem, now);
        }
        if place.pad {
            self.pad(mem, now);
        }
        assert_eq!(self.open.lsn, place.lsn, "I1: the place was computed for this batch");
        if first {
            self.open.since = now;
        }
        Ok(place)
    }

    /// Gives the record whose payload is in its place the next LSN.
    fn place_record(
        &mut self,
        rec: &NewRecord<'_>,
        place: &Place,
        len: u64,
        crc: u32,
        mem: &mut impl Memory,
    ) -> Admitted {
        self.open_chunk(mem);
        let index = self.open.descs.len();
        let lsn = place.lsn + index as u64;
        let has_payload = len > 0;
        let desc = RecDesc {
            op: rec.op as u8,
            disk: rec.disk,
            flags: rec.flags.into(),
            len: rec.len.into(),
            offset: rec.offset.into(),
            lsn: lsn.into(),
            payload_off: if has_payload { (place.pos - place.lsn) as u32 } else { 0 }.into(),
            crc: crc.into(),
            reserved: 0.into(),
        };
        let at = place.lsn + (size_of::<BatchHdr>() + index * size_of::<RecDesc>()) as u64;
        mem.fill(at, desc.as_bytes());
        if rec.op != RecOp::Mark {
            self.dirty.set(rec.disk, rec.offset, u64::from(rec.len));
        }
        self.open.descs.push(desc);
        self.open.fill = self.open.fill.max(place.pos + len);
        self.foresee.wrote();
        mem.publish(self.admitted());
        Admitted { lsn, pos: place.pos }
    }

    /// Admits a mark and seals its batch, so that nothing later enters its
    /// point (ruling 18). Returns the point's position.
    pub fn admit_mark(
        &mut self,
        tag: &[u8],
        app: bool,
        mem: &mut impl Memory,
        now: u64,
    ) -> Result<u64, Stall> {
        let flags = if app { REC_APP } else { 0 };
        let len = tag.len() as u32;
        let rec = NewRecord { op: RecOp::Mark, flags, disk: 0, offset: 0, len, payload: tag };
        self.admit(&rec, mem, now)?;
        self.seal(BATCH_MARK, mem, now);
        self.force_commit = true;
        Ok(self.open.lsn)
    }

    /// What the arena may have given up: what is on the disks and, if no journal has it, synced.
    /// At a chunk's start not yet its header page.
    pub(super) fn released(&self) -> u64 {
        let kept = if self.marker == Marker::Done { self.durable } else { self.applied };
        let starts_chunk = kept % self.config.geometry.chunk == PAGE;
        kept - if starts_chunk { PAGE } else { 0 }
    }

    /// Bytes of the arena that cannot be overwritten.
    pub fn arena_use(&self) -> u64 {
        (self.admitted() - self.released()).min(self.config.arena)
    }

    pub(super) fn place(&self, len: u64) -> Place {
        let geometry = self.config.geometry;
        let open = &self.open;
        let chunk_end = geometry.chunk_end(open.lsn);
        if open.descs.len() < RECS_MAX {
            let pos = payload_start(open.fill, len);
            let end = (pos + len).next_multiple_of(PAGE);
            if end <= chunk_end
                && end - open.lsn <= BATCH_MAX.max(PAGE + len.next_multiple_of(PAGE))
            {
                return Place { pad: false, seal: false, lsn: open.lsn, pos, end };
            }
        }
        let seal = !open.descs.is_empty();
        let next = if seal { open.fill.next_multiple_of(PAGE) } else { open.lsn };
        let fits = next + PAGE + len.next_multiple_of(PAGE) <= chunk_end;
        let lsn = if fits { next } else { chunk_end + PAGE };
        let pad = !fits && next < chunk_end;
        let pos = lsn + PAGE;
        Place { pad, seal, lsn, pos, end: (pos + len).next_multiple_of(PAGE) }
    }

    pub(super) fn seal(&mut self, flags: u8, mem: &mut impl Memory, now: u64) {
        if self.open.descs.is_empty() {
            return;
        }
        let flags = flags | if self.is_awaited() { BATCH_FLUSH } else { 0 };
        let end = self.open.fill.next_multiple_of(PAGE);
        self.close_batch(flags, end, mem, now);
    }

    pub(super) fn pad(&mut self, mem: &mut impl Memory, now: u64) {
        assert!(self.open.descs.is_empty());
        self.open_chunk(mem);
        let end = self.config.geometry.chunk_end(self.open.lsn);
        self.close_batch(BATCH_PAD, end, mem, now);
    }

    pub(super) fn close_batch(&mut self, flags: u8, end: u64, mem: &mut impl Memory, now: u64) {
        let lsn = self.open.lsn;
        let descs = std::mem::take(&mut self.open.descs);
        let mut hdr = BatchHdr {
            flags,
            prev_crc: self.prev_crc.into(),
            journal_id: self.journal_id.into(),
            incarnation: self.sup.incarnation,
            generation: self.sup.generation,
            lsn: lsn.into(),
            total_len: ((end - lsn) as u32).into(),
            durable: self.durable.into(),
            mono_us: now.into(),
            wall_us: self.wall.into(),
            ..BatchHdr::default()
        };
        finish_batch(&mut hdr, &descs);
        mem.fill(lsn, hdr.as_bytes());
        mem.freeze(end);
        let hdr_crc = hdr.hdr_crc.get();
        let written = if flags & BATCH_PAD != 0 { PAGE } else { end - lsn };
        self.push_segment(lsn, written);
        self.prev_crc = hdr_crc;
        self.sealed.push_back(SealedBatch { lsn, end, hdr_crc, descs: descs.into() });
        let next = self.config.geometry.normal(end);
        self.open = OpenBatch {
            lsn: next,
            fill: next + PAGE,
            descs: Vec::with_capacity(RECS_MAX),
            since: self.open.since,
            chunk_open: next == end,
        };
        mem.publish(next);
    }

    pub(super) fn open_chunk(&mut self, mem: &mut impl Memory) {
        if self.open.chunk_open {
            return;
        }
        let start = self.open.lsn - PAGE;
        let chunk_no = self.config.geometry.chunk_of(start);
        let incarnation = self.sup.incarnation.get();
        mem.fill(start, &chunk_page(self.journal_id, chunk_no, incarnation, self.prev_crc));
        self.push_segment(start, PAGE);
        self.open.chunk_open = true;
    }

    pub(super) fn push_segment(&mut self, pos: u64, len: u64) {
        if self.mode == Mode::Unjournaled {
            return;
        }
        if let Some(last) = self.segments.back_mut()
            && last.pos + last.len == pos
            && !pos.is_multiple_of(self.config.geometry.chunk)
            && last.len + len <= SEGMENT_MAX
        {
            last.len += len;
            return;
        }
        self.segments.push_back(Segment { pos, len });
    }
}

/// Copies a payload; its CRC. In steps, so that the second pass finds it in the cache.
fn fill_summed(mem: &mut impl Memory, mut pos: u64, payload: &[u8]) -> u32 {
    let mut crc = 0;
    for part in payload.chunks(SUM_STEP) {
        crc = crc32c::crc32c_append(crc, part);
        mem.fill(pos, part);
        pos += part.len() as u64;
    }
    crc
}

/// Half of a small first-level cache, bytes.
const SUM_STEP: usize = 16 << 10;

fn payload_start(fill: u64, len: u64) -> u64 {
    if len >= PAGE { fill.next_multiple_of(PAGE) } else { fill.next_multiple_of(512) }
}
