//! Whole frames: building, checking, opening. (pure)
//!
//! Owns what makes a frame of [`crate::wire`] valid. Holds: a [`FrameBuf`] that
//! came out of [`FrameBuf::from_bytes`] has three right CRCs, known kind and
//! codec, sizes within the limits and descriptors that stay inside payload and
//! LSN range; nothing was decompressed for that. Before it: the channel, which
//! asks [`check_header`] before it allocates. After it: receiver and store.

use blockfilter::crc32c;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use blockfilter::journal::format::{RecDesc, RecOp};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zerocopy::{FromBytes, IntoBytes};

use crate::placed::Placed;
use crate::wire::{
    CodecId, FRAME_ALIGN, FRAME_EPOCH_END, FRAME_JSON_MAX, FRAME_MAGIC, FRAME_MARK, FRAME_RAW_MAX,
    FRAME_RECS_MAX, FrameHdr, Kind, WIRE_VERSION,
};

/// One frame as sent, received and stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameBuf {
    /// The header, decoded.
    pub hdr: FrameHdr,
    /// The whole frame, header first.
    pub bytes: Placed,
}

/// Part of a body: bytes of a buffer that others use too.
#[derive(Clone, Debug)]
pub struct Piece {
    data: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Piece {
    /// `range` of `data`, inside it.
    pub fn new(data: Arc<Vec<u8>>, range: Range<usize>) -> Self {
        Self { data, range }
    }

    /// Adds `next` to `pieces`: to the last one, if it lies right behind that.
    pub fn append(pieces: &mut Vec<Self>, next: &Self) {
        match pieces.last_mut() {
            Some(last)
                if last.range.end == next.range.start && Arc::ptr_eq(&last.data, &next.data) =>
            {
                last.range.end = next.range.end;
            }
            _ => pieces.push(next.clone()),
        }
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.data[self.range.clone()]
    }
}

impl From<Vec<u8>> for Piece {
    fn from(data: Vec<u8>) -> Self {
        let range = 0..data.len();
        Self::new(Arc::new(data), range)
    }
}

/// A frame to send, its body where it already is.
#[derive(Debug)]
pub struct FrameParts {
    /// The header, decoded.
    pub hdr: FrameHdr,
    /// Header and descriptors, as sent.
    pub head: Vec<u8>,
    /// The body, as sent, one behind the other.
    pub body: Vec<Piece>,
}

impl FrameParts {
    /// Seals a frame: fills in magic, version, lengths and CRCs. `hdr` brings
    /// kind, flags, codec, `raw_len`, positions; `body` is already encoded.
    pub fn seal(mut hdr: FrameHdr, descs: &[RecDesc], body: Vec<Piece>) -> Self {
        let head = seal(&mut hdr, descs, &body);
        Self { hdr, head, body }
    }

    /// Length of the whole frame in bytes.
    pub fn total_len(&self) -> usize {
        self.hdr.total_len()
    }

    /// The frame in one piece.
    pub fn join(&self) -> FrameBuf {
        FrameBuf { hdr: self.hdr, bytes: join(&self.head, &self.body) }
    }
}

/// Completes the header; returns it with the descriptors behind it.
fn seal(hdr: &mut FrameHdr, descs: &[RecDesc], body: &[impl AsRef<[u8]>]) -> Vec<u8> {
    let len: usize = body.iter().map(|piece| piece.as_ref().len()).sum();
    let sum = || body.iter().fold(0, |crc, piece| crc32c::crc32c_append(crc, piece.as_ref()));
    hdr.magic = FRAME_MAGIC.into();
    hdr.version = WIRE_VERSION;
    hdr.n_rec = (descs.len() as u32).into();
    hdr.enc_len = (len as u32).into();
    hdr.desc_crc = crc32c::crc32c(descs.as_bytes()).into();
    // The seed's large frames are one record each, summed just now.
    let plain = hdr.codec == CodecId::None as u8 && hdr.kind == Kind::Copy as u8;
    let only = only_record(descs, len).filter(|_| plain).map(|desc| desc.crc.get());
    debug_assert!(only.is_none_or(|crc| crc == sum()));
    hdr.body_crc = only.unwrap_or_else(sum).into();
    hdr.hdr_crc = 0.into();
    hdr.hdr_crc = hdr.crc().into();
    [hdr.as_bytes(), descs.as_bytes()].concat()
}

fn join(head: &[u8], body: &[impl AsRef<[u8]>]) -> Placed {
    let mut bytes = head.to_vec();
    body.iter().for_each(|piece| bytes.extend_from_slice(piece.as_ref()));
    bytes.into()
}

/// Why a frame is refused. Every one of these ends the session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol, or lost synchronisation.
    #[error("not a frame (magic {0:#010x})")]
    Magic(u32),
    /// Written by a newer peer.
    #[error("wire version {0} is not supported; this side speaks version {WIRE_VERSION}")]
    Version(u8),
    /// A checksum does not match.
    #[error("checksum of the frame's {0} does not match")]
    Crc(&'static str),
    /// A size limit is exceeded.
    #[error("{what} is {value}, more than {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// A field has a value that makes no sense.
    #[error("bad {0}")]
    Bad(&'static str),
    /// A JSON body does not parse.
    #[error("bad message body: {0}")]
    Json(String),
}

impl FrameHdr {
    /// The kind. Only of a checked header.
    pub fn frame_kind(&self) -> Option<Kind> {
        Kind::from_u8(self.kind)
    }

    /// Length of the whole frame in bytes. Only of a checked header.
    pub fn total_len(&self) -> usize {
        size_of::<Self>() + self.desc_len() + self.enc_len.get() as usize
    }

    /// Length of the descriptors in bytes.
    pub fn desc_len(&self) -> usize {
        self.n_rec.get() as usize * size_of::<RecDesc>()
    }

    /// Whether it is the last frame of its epoch.
    pub fn is_epoch_end(&self) -> bool {
        self.flags & FRAME_EPOCH_END != 0
    }

    fn crc(&self) -> u32 {
        let mut copy = *self;
        copy.hdr_crc = 0.into();
        crc32c::crc32c(copy.as_bytes())
    }
}

/// Checks a header: magic, version, CRC, kind, codec and every size limit, so
/// that [`FrameHdr::total_len`] may be allocated.
pub fn check_header(bytes: &[u8; size_of::<FrameHdr>()]) -> Result<FrameHdr, FrameError> {
    let hdr = FrameHdr::read_from_bytes(bytes).map_err(|_| FrameError::Bad("header"))?;
    if hdr.magic.get() != FRAME_MAGIC {
        return Err(FrameError::Magic(hdr.magic.get()));
    }
    if hdr.version != WIRE_VERSION {
        return Err(FrameError::Version(hdr.version));
    }
    if hdr.crc() != hdr.hdr_crc.get() {
        return Err(FrameError::Crc("header"));
    }
    let kind = Kind::from_u8(hdr.kind).ok_or(FrameError::Bad("kind"))?;
    let codec = CodecId::from_u8(hdr.codec).ok_or(FrameError::Bad("codec"))?;
    let (raw, enc) = (hdr.raw_len.get(), hdr.enc_len.get());
    limit("number of records", hdr.n_rec.get(), FRAME_RECS_MAX)?;
    if matches!(kind, Kind::Epoch | Kind::Copy) {
        limit("payload", raw, FRAME_RAW_MAX)?;
        limit("encoded payload", enc, raw)?;
        if hdr.lsn_from.get() > hdr.lsn_to.get() {
            return Err(FrameError::Bad("range of LSNs"));
        }
    } else {
        limit("message", enc, FRAME_JSON_MAX)?;
        limit("number of records of a message", hdr.n_rec.get(), 0)?;
    }
    if codec == CodecId::None && raw != enc {
        return Err(FrameError::Bad("length of an uncompressed body"));
    }
    if kind != Kind::Epoch && hdr.flags != 0 || hdr.flags & !(FRAME_EPOCH_END | FRAME_MARK) != 0 {
        return Err(FrameError::Bad("flags"));
    }
    Ok(hdr)
}

/// The only record with all of an uncompressed body as its payload.
fn only_record(descs: &[RecDesc], body_len: usize) -> Option<&RecDesc> {
    let whole = |d: &&RecDesc| d.payload_off.get() == 0 && d.payload_len() as usize == body_len;
    if let [desc] = descs { Some(desc).filter(whole).filter(|_| body_len > 0) } else { None }
}

fn limit(what: &'static str, value: u32, limit: u32) -> Result<(), FrameError> {
    if value > limit {
        return Err(FrameError::TooLarge { what, value: value.into(), limit: limit.into() });
    }
    Ok(())
}

impl FrameBuf {
    /// A frame in one piece; see [`FrameParts::seal`].
    pub fn seal(mut hdr: FrameHdr, descs: &[RecDesc], body: &[u8]) -> Self {
        let head = seal(&mut hdr, descs, &[body]);
        Self { hdr, bytes: join(&head, &[body]) }
    }

    /// A message with a JSON body.
    pub fn message<T: Serialize>(kind: Kind, message: &T) -> Result<Self, FrameError> {
        let body = serde_json::to_vec(message).map_err(|e| FrameError::Json(e.to_string()))?;
        let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
        limit("message", len, FRAME_JSON_MAX)?;
        let hdr = FrameHdr { kind: kind as u8, raw_len: len.into(), ..Default::default() };
        Ok(Self::seal(hdr, &[], &body))
    }

    /// Takes a whole frame from a peer or a file and checks all of it.
    pub fn from_bytes(bytes: impl Into<Placed>) -> Result<Self, FrameError> {
        let bytes = bytes.into();
        let head = bytes.first_chunk().ok_or(FrameError::Bad("length"))?;
        let hdr = check_header(head)?;
        if bytes.len() != hdr.total_len() {
            return Err(FrameError::Bad("length"));
        }
        let frame = Self { hdr, bytes };
        if crc32c::crc32c(frame.desc_bytes()) != hdr.desc_crc.get() {
            return Err(FrameError::Crc("descriptors"));
        }
        if crc32c::crc32c(frame.body()) != hdr.body_crc.get() {
            return Err(FrameError::Crc("body"));
        }
        frame.check_descs()?;
        Ok(frame)
    }

    /// The kind; frames are built with a valid one.
    pub fn kind(&self) -> Kind {
        Kind::from_u8(self.hdr.kind).expect("a checked frame has a known kind")
    }

    fn desc_bytes(&self) -> &[u8] {
        &self.bytes[size_of::<FrameHdr>()..][..self.hdr.desc_len()]
    }

    /// The descriptors.
    pub fn descs(&self) -> &[RecDesc] {
        <[RecDesc]>::ref_from_bytes(self.desc_bytes())
            .expect("RecDesc is unaligned and the length is a multiple of it")
    }

    /// The body as sent.
    pub fn body(&self) -> &[u8] {
        &self.bytes[size_of::<FrameHdr>() + self.hdr.desc_len()..]
    }

    /// The payload blob, decompressed; never more than the header's `raw_len`.
    pub fn payload(&self) -> Result<Cow<'_, [u8]>, FrameError> {
        let raw_len = self.hdr.raw_len.get() as usize;
        if self.hdr.codec == CodecId::None as u8 {
            return Ok(Cow::Borrowed(self.body()));
        }
        let raw = zstd::bulk::decompress(self.body(), raw_len)
            .map_err(|_| FrameError::Bad("compressed body"))?;
        if raw.len() != raw_len {
            return Err(FrameError::Bad("length of the decompressed body"));
        }
        Ok(Cow::Owned(raw))
    }

    /// Whether the body, whose checksum is right, is one record and what its frame is filled up
    /// with, and the record's checksum is right for that.
    pub fn is_one_record(&self) -> bool {
        let [desc] = self.descs() else { return false };
        let body = self.body();
        let Some(rest) = body.get(desc.payload_len() as usize..) else { return false };
        let only =
            desc.payload_off.get() == 0 && rest.len() < FRAME_ALIGN && rest.len() < body.len();
        only && self.hdr.codec == CodecId::None as u8
            && crc32c::crc32c_append(desc.crc.get(), rest) == self.hdr.body_crc.get()
    }

    /// The JSON body, decoded.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, FrameError> {
        serde_json::from_slice(self.body()).map_err(|e| FrameError::Json(e.to_string()))
    }

    fn check_descs(&self) -> Result<(), FrameError> {
        let copy = self.kind() == Kind::Copy;
        let (from, to) = (self.hdr.lsn_from.get(), self.hdr.lsn_to.get());
        let mut last = from;
        for desc in self.descs() {
            let op = desc.rec_op().ok_or(FrameError::Bad("operation"))?;
            let lsn = desc.lsn.get();
            let ordered = if copy { lsn == from } else { last <= lsn && lsn < to };
            if !ordered {
                return Err(FrameError::Bad("LSN of a record"));
            }
            last = lsn;
            if copy && !matches!(op, RecOp::Write | RecOp::Zero) {
                return Err(FrameError::Bad("operation of a copied block"));
            }
            if matches!(op, RecOp::Write | RecOp::Zero | RecOp::Trim)
                && desc.offset.get().checked_add(desc.len.get().into()).is_none()
            {
                return Err(FrameError::Bad("range of a record"));
            }
            let payload = desc.payload_off.get().checked_add(desc.payload_len());
            if payload.is_none_or(|end| end > self.hdr.raw_len.get()) {
                return Err(FrameError::Bad("payload range of a record"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> FrameBuf {
        let desc = RecDesc {
            op: RecOp::Write as u8,
            len: 512.into(),
            offset: 4096.into(),
            lsn: 8193.into(),
            crc: crc32c::crc32c(&[7; 512]).into(),
            ..Default::default()
        };
        let hdr = FrameHdr {
            kind: Kind::Epoch as u8,
            flags: FRAME_EPOCH_END,
            group_id: 0x1122_3344_5566_7788.into(),
            generation: 1.into(),
            incarnation: 2.into(),
            lsn_from: 8192.into(),
            lsn_to: 16384.into(),
            wall_us: 5.into(),
            raw_len: 512.into(),
            ..Default::default()
        };
        FrameBuf::seal(hdr, &[desc], &[7; 512])
    }

    #[test]
    fn a_sealed_frame_reads_back() {
        let frame = sample();
        let again = FrameBuf::from_bytes(frame.bytes.clone()).unwrap();
        assert_eq!(again, frame);
        assert_eq!(again.descs().len(), 1);
        assert_eq!(again.payload().unwrap().as_ref(), [7; 512]);
    }

    #[test]
    fn header_bytes_are_golden() {
        let frame = sample();
        let head = &frame.bytes[..128];
        assert_eq!(&head[..8], b"SFFR\x01\x01\x01\x00");
        assert_eq!(&head[20..24], &1u32.to_le_bytes());
        assert_eq!(&head[24..32], &[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        assert_eq!(&head[32..40], &1u64.to_le_bytes());
        assert_eq!(&head[40..48], &2u64.to_le_bytes());
        assert_eq!(&head[48..56], &8192u64.to_le_bytes());
        assert_eq!(&head[56..64], &16384u64.to_le_bytes());
        assert_eq!(&head[64..72], &5u64.to_le_bytes());
        assert_eq!(&head[72..80], &[0, 2, 0, 0, 0, 2, 0, 0]);
        assert!(head[80..].iter().all(|b| *b == 0));
    }

    #[test]
    fn any_flipped_bit_is_refused() {
        let frame = sample();
        for bit in 0..frame.bytes.len() * 8 {
            let mut bytes = frame.bytes.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(FrameBuf::from_bytes(bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn sizes_beyond_the_limits_are_refused_before_the_body_is_read() {
        let huge = |change: fn(&mut FrameHdr)| {
            let mut hdr = sample().hdr;
            change(&mut hdr);
            hdr.hdr_crc = hdr.crc().into();
            let bytes: [u8; 128] = hdr.as_bytes().try_into().unwrap();
            check_header(&bytes)
        };
        assert!(huge(|h| h.n_rec = 4097.into()).is_err());
        assert!(huge(|h| h.enc_len = 513.into()).is_err());
        assert!(
            huge(|h| {
                h.raw_len = (FRAME_RAW_MAX + 1).into();
                h.enc_len = h.raw_len;
            })
            .is_err()
        );
        assert!(huge(|h| h.kind = 99).is_err());
        assert!(huge(|h| h.codec = 2).is_err());
        assert!(huge(|h| h.version = 2) == Err(FrameError::Version(2)));
        assert!(huge(|_| ()).is_ok());
    }

    #[test]
    fn records_outside_payload_or_lsn_range_are_refused() {
        for change in [
            (|d: &mut RecDesc| d.payload_off = 1.into()) as fn(&mut RecDesc),
            |d| d.lsn = 16384.into(),
            |d| d.lsn = 8191.into(),
            |d| d.op = 77,
            |d| d.offset = u64::MAX.into(),
        ] {
            let good = sample();
            let mut desc = good.descs()[0];
            change(&mut desc);
            let bad = FrameBuf::seal(good.hdr, &[desc], good.body());
            assert!(FrameBuf::from_bytes(bad.bytes).is_err());
        }
    }

    #[test]
    fn a_compressed_payload_opens_to_exactly_its_length() {
        let good = sample();
        let packed = zstd::bulk::compress(&[7; 512], 1).unwrap();
        let mut hdr = good.hdr;
        hdr.codec = CodecId::Zstd as u8;
        let frame = FrameBuf::seal(hdr, good.descs(), &packed);
        assert_eq!(frame.payload().unwrap().as_ref(), [7; 512]);
        hdr.raw_len = 1024.into();
        assert!(FrameBuf::seal(hdr, good.descs(), &packed).payload().is_err());
    }
}
