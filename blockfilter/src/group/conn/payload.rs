//! Payloads that are larger than the window: into their place in the arena, into a buffer, or
//! thrown away.

use std::io;

use super::{Conn, Job, Progress, Shared, WINDOW};
use crate::block::{Errno, SECTOR};
use crate::group::volume::{Refusal, Volume};
use crate::nbd::proto::REQUEST_LEN;
use crate::nbd::transmission::{Header, Limits, reply_error};

impl Conn {
    /// Makes room for a large payload. Not None: it has to wait, with its header.
    pub(super) fn begin_payload(
        &mut self,
        volume: &mut Volume,
        shared: &mut Shared,
        disk: u8,
        (header, offset, fua): (Header, u64, bool),
    ) -> Option<Progress> {
        let len = u64::from(header.len);
        if shared.staged > 0 && shared.staged + len > shared.staged_max {
            return Some(Progress::Budget);
        }
        let sectors = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        // With several payloads on their way each would take the place from the other.
        let lands =
            shared.staged == 0 && sectors && (LAND_MIN..=volume.record_max()).contains(&len);
        let landing = match lands.then(|| volume.land(self.id, disk, len)) {
            None | Some(Ok(false)) => false,
            Some(Ok(true)) => true,
            Some(Err(Refusal::Stalled)) => return Some(Progress::Room),
            Some(Err(Refusal::Fail(errno))) => {
                self.start += REQUEST_LEN;
                self.ahead = WINDOW;
                self.job = Some(Job::Drain { header, left: len, errno });
                return None;
            }
        };
        self.start += REQUEST_LEN;
        self.ahead = if lands { REQUEST_LEN } else { WINDOW };
        shared.staged += len;
        self.reserved = len;
        let buf = if landing { Vec::new() } else { shared.buffers.take(len as usize) };
        self.job = Some(Job::Fill { header, offset, fua, buf, filled: 0 });
        None
    }

    /// Receives more of a large payload, all that is there: its buffer and how much it has.
    pub(super) fn fill_payload(
        &mut self,
        volume: &mut Volume,
        header: &Header,
        mut buf: Vec<u8>,
        mut filled: usize,
        now: u64,
    ) -> io::Result<(Vec<u8>, usize)> {
        let id = self.id;
        while filled < header.len as usize {
            let count = if !buf.is_empty() {
                self.next_bytes(&mut buf[filled..])?
            } else if let Some(received) = volume.receive(id, |to| self.next_bytes(to)) {
                received?
            } else {
                buf = volume.take_back(id);
                continue;
            };
            if count == 0 {
                break;
            }
            filled += count;
            self.moved_at = now;
        }
        Ok((buf, filled))
    }

    /// What was received already, or else what the socket has; 0 if nothing.
    fn next_bytes(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let have = (self.end - self.start).min(to.len());
        if have == 0 {
            return self.recv_into(to);
        }
        to[..have].copy_from_slice(&self.window[self.start..self.start + have]);
        self.start += have;
        Ok(have)
    }

    /// Its part of the payload budget is free for others.
    pub(super) fn give_back(&mut self, shared: &mut Shared) {
        shared.staged -= std::mem::take(&mut self.reserved);
    }

    /// A large payload is complete, in `buf` or in the arena.
    pub(super) fn payload_done(
        &mut self,
        volume: &mut Volume,
        shared: &mut Shared,
        limits: Limits,
        disk: u8,
        (header, offset, fua): (Header, u64, bool),
        mut buf: Vec<u8>,
    ) {
        if buf.is_empty() {
            let result = volume.write_landed(self.id, disk, offset, fua);
            if !matches!(result, Err(Refusal::Stalled)) {
                volume.take_back(self.id);
                self.give_back(shared);
                self.admitted(volume, limits, header, fua, result);
                return;
            }
            buf = volume.take_back(self.id);
        }
        self.job = Some(Job::Admit { header, offset, fua, buf, done: 0 });
    }

    /// Throws away the payload of a refused write, then answers.
    pub(super) fn drain_payload(
        &mut self,
        limits: Limits,
        header: Header,
        mut left: u64,
        errno: Errno,
        now: u64,
    ) -> io::Result<Option<Progress>> {
        loop {
            let have = ((self.end - self.start) as u64).min(left);
            self.start += have as usize;
            left -= have;
            if left == 0 {
                self.out.add(|o| reply_error(o, limits.structured, &header, errno));
                return Ok(None);
            }
            if !self.receive(now)? {
                self.job = Some(Job::Drain { header, left, errno });
                return Ok(Some(Progress::Input));
            }
        }
    }
}

/// Payloads from this on are received in their place, bytes: each has a batch of its own there.
const LAND_MIN: u64 = 256 << 10;
