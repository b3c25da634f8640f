//! Requests and replies of the transmission phase, as functions over bytes.
//!
//! Owns: what a valid request is ([`parse`]) and how answers look. Before it
//! comes [`super::handshake`], which gives [`Limits`]; after it whoever moves
//! the bytes: [`super::server`] with blocking calls, the group's engine with
//! io_uring. Holds nothing, allocates nothing, does no I/O: encoders append to
//! the caller's buffer.
//!
//! What is `Run` was checked: inside the export, within the payload limit, not
//! empty, allowed on this export. Those behind may assert it.

use super::handshake::Negotiated;
use super::proto::{
    CHUNK_LEN, Context, Contexts, Fields, Put, REQUEST_LEN, REQUEST_MAGIC, SIMPLE_REPLY_LEN,
    SIMPLE_REPLY_MAGIC, STATE_DIRTY, STATE_HOLE, STATE_ZERO, STRUCTURED_REPLY_MAGIC, chunk, cmd,
    cmd_flag,
};
use crate::block::{Errno, Extent, PAYLOAD_MAX, ZeroFlags, check_range};
use crate::dirty::DirtyExtent;

/// A request's header as sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// See [`cmd_flag`].
    pub flags: u16,
    /// See [`cmd`].
    pub kind: u16,
    /// The client's name for it.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub len: u32,
}

/// What requests are checked against; constant for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the export in bytes.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Structured replies were negotiated.
    pub structured: bool,
    /// What BLOCK_STATUS answers in.
    pub contexts: Contexts,
    /// FAST_ZERO was advertised.
    pub fast_zero: bool,
    /// Smallest request and alignment in bytes: a power of two.
    pub block_min: u32,
}

impl Limits {
    /// Of a connection.
    pub fn new(negotiated: &Negotiated) -> Self {
        Self {
            size: negotiated.export.size,
            read_only: negotiated.export.read_only,
            structured: negotiated.structured,
            contexts: negotiated.contexts,
            fast_zero: negotiated.export.fast_zero,
            block_min: negotiated.block_min,
        }
    }
}

/// A valid request. Lengths are bytes and never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Answer with the range's bytes.
    Read {
        /// In bytes.
        offset: u64,
        /// At most [`PAYLOAD_MAX`].
        len: u32,
        /// In one chunk.
        df: bool,
    },
    /// `len` bytes of payload follow the header.
    Write {
        /// In bytes.
        offset: u64,
        /// At most [`PAYLOAD_MAX`].
        len: u32,
        /// Stable when answered.
        fua: bool,
    },
    /// The range becomes zeroes.
    Zero {
        /// In bytes.
        offset: u64,
        /// Up to 4 GiB.
        len: u32,
        /// How.
        flags: ZeroFlags,
    },
    /// The range becomes a hole.
    Trim {
        /// In bytes.
        offset: u64,
        /// Up to 4 GiB.
        len: u32,
        /// Stable when answered.
        fua: bool,
    },
    /// Make stable what was answered.
    Flush,
    /// Prefetch.
    Cache {
        /// In bytes.
        offset: u64,
        /// Up to 4 GiB.
        len: u32,
    },
    /// Tell what each context that was chosen says.
    BlockStatus {
        /// In bytes.
        offset: u64,
        /// Up to 4 GiB.
        len: u32,
        /// One extent only.
        one: bool,
    },
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Do it, then answer.
    Run(Request),
    /// Nothing to do (a length of 0): answer with [`reply_ok`].
    Empty,
    /// Answer with [`reply_error`] at once; there is no payload.
    Refuse(Errno),
    /// Read and forget `len` bytes of payload, then answer with [`reply_error`].
    Drain {
        /// Bytes that follow the header.
        len: u32,
        /// The answer.
        errno: Errno,
    },
    /// The client says good-bye: finish what is in flight, answer, close.
    Goodbye,
    /// Close: a payload so large that nobody can have meant it.
    Close,
}

/// The stream is out of step or the peer does not speak NBD: close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an NBD message (magic {0:#010x})")]
pub struct BadMagic(pub u32);

/// Parses and checks the request at the start of `window`: None if its
/// [`REQUEST_LEN`] bytes are not all there. A payload, if any, follows at
/// `window[REQUEST_LEN..]`, as long as [`payload_len`] says.
pub fn parse(window: &[u8], limits: &Limits) -> Result<Option<(Header, Decision)>, BadMagic> {
    let Some(header) = decode(window)? else { return Ok(None) };
    Ok(Some((header, validate(&header, limits))))
}

/// Parses a header; None if `window` is too short.
pub fn decode(window: &[u8]) -> Result<Option<Header>, BadMagic> {
    if window.len() < REQUEST_LEN {
        return Ok(None);
    }
    let mut fields = Fields(window);
    let read = |f: &mut Fields<'_>| {
        let magic = f.u32()?;
        let (flags, kind) = (f.u16()?, f.u16()?);
        let (cookie, offset, len) = (f.u64()?, f.u64()?, f.u32()?);
        Some((magic, Header { flags, kind, cookie, offset, len }))
    };
    match read(&mut fields) {
        Some((REQUEST_MAGIC, header)) => Ok(Some(header)),
        Some((magic, _)) => Err(BadMagic(magic)),
        None => Ok(None),
    }
}

/// Bytes of payload behind a header, also of one that is refused.
pub fn payload_len(header: &Header) -> u32 {
    if header.kind == cmd::WRITE { header.len } else { 0 }
}

/// Checks a request against a connection's limits.
pub fn validate(header: &Header, limits: &Limits) -> Decision {
    if header.kind == cmd::DISC {
        return Decision::Goodbye;
    }
    if payload_len(header) > 2 * PAYLOAD_MAX {
        return Decision::Close;
    }
    match check(header, limits) {
        Ok(decision) => decision,
        Err(errno) if header.kind == cmd::WRITE => Decision::Drain { len: header.len, errno },
        Err(errno) => Decision::Refuse(errno),
    }
}

fn check(header: &Header, limits: &Limits) -> Result<Decision, Errno> {
    let Header { flags, kind, offset, len, .. } = *header;
    // FUA may be set on any command.
    let known = cmd_flag::FUA
        | match kind {
            cmd::READ if limits.structured => cmd_flag::DF,
            cmd::WRITE_ZEROES if limits.fast_zero => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE,
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            _ => 0,
        };
    if flags & !known != 0 {
        return Err(Errno::Inval);
    }
    if kind == cmd::FLUSH {
        return Ok(Decision::Run(Request::Flush));
    }
    let writes = matches!(kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
    if !writes && !matches!(kind, cmd::READ | cmd::CACHE | cmd::BLOCK_STATUS) {
        return Err(Errno::Inval);
    }
    if writes && limits.read_only {
        return Err(Errno::Perm);
    }
    check_range(offset, u64::from(len), limits.size, writes)?;
    if matches!(kind, cmd::READ | cmd::WRITE) && len > PAYLOAD_MAX {
        return Err(Errno::Inval);
    }
    let mask = u64::from(limits.block_min.max(1)) - 1;
    if (offset | u64::from(len)) & mask != 0 {
        return Err(Errno::Inval);
    }
    if len == 0 {
        return if kind == cmd::BLOCK_STATUS { Err(Errno::Inval) } else { Ok(Decision::Empty) };
    }
    request(header, limits).map(Decision::Run)
}

fn request(header: &Header, limits: &Limits) -> Result<Request, Errno> {
    let Header { flags, kind, offset, len, .. } = *header;
    let fua = flags & cmd_flag::FUA != 0;
    Ok(match kind {
        cmd::READ => Request::Read { offset, len, df: flags & cmd_flag::DF != 0 },
        cmd::WRITE => Request::Write { offset, len, fua },
        cmd::TRIM => Request::Trim { offset, len, fua },
        cmd::CACHE => Request::Cache { offset, len },
        cmd::WRITE_ZEROES => {
            let no_hole = flags & cmd_flag::NO_HOLE != 0;
            let fast = flags & cmd_flag::FAST_ZERO != 0;
            Request::Zero { offset, len, flags: ZeroFlags { no_hole, fast, fua } }
        }
        cmd::BLOCK_STATUS if !limits.contexts.is_empty() => {
            Request::BlockStatus { offset, len, one: flags & cmd_flag::REQ_ONE != 0 }
        }
        _ => return Err(Errno::Inval),
    })
}

/// Answers success without data: to everything but READ and BLOCK_STATUS of a
/// length above 0.
pub fn reply_ok(out: &mut Vec<u8>, structured: bool, header: &Header) {
    if needs_chunk(structured, header.kind) {
        chunk_header(out, header.cookie, chunk::FLAG_DONE, chunk::NONE, 0);
    } else {
        simple_reply(out, header.cookie, 0);
    }
}

/// Answers an error to any request.
pub fn reply_error(out: &mut Vec<u8>, structured: bool, header: &Header, errno: Errno) {
    if needs_chunk(structured, header.kind) {
        chunk_header(out, header.cookie, chunk::FLAG_DONE, chunk::ERROR, 6);
        out.put32(errno.code());
        out.put16(0);
    } else {
        simple_reply(out, header.cookie, errno.code());
    }
}

/// Answers a READ in one piece; exactly `len` bytes of data must be sent next.
pub fn reply_data(out: &mut Vec<u8>, structured: bool, cookie: u64, offset: u64, len: u32) {
    if structured {
        offset_data(out, cookie, offset, len, true);
    } else {
        simple_reply(out, cookie, 0);
    }
}

/// One chunk of data of a structured READ; `len` bytes must be sent next.
pub fn offset_data(out: &mut Vec<u8>, cookie: u64, offset: u64, len: u32, done: bool) {
    chunk_header(out, cookie, u16::from(done), chunk::OFFSET_DATA, len + 8);
    out.put64(offset);
}

/// One chunk of zeroes of a structured READ.
pub fn offset_hole(out: &mut Vec<u8>, cookie: u64, offset: u64, len: u32, done: bool) {
    chunk_header(out, cookie, u16::from(done), chunk::OFFSET_HOLE, 12);
    out.put64(offset);
    out.put32(len);
}

/// An error in the midst of a structured READ; with `done` its last chunk.
pub fn chunk_error(out: &mut Vec<u8>, cookie: u64, errno: Errno, done: bool) {
    chunk_header(out, cookie, u16::from(done), chunk::ERROR, 6);
    out.put32(errno.code());
    out.put16(0);
}

/// Ends a structured reply whose chunks are all sent.
pub fn chunk_done(out: &mut Vec<u8>, cookie: u64) {
    chunk_header(out, cookie, chunk::FLAG_DONE, chunk::NONE, 0);
}

/// Answers BLOCK_STATUS in `base:allocation` with at least one and at most [`EXTENTS_MAX`]
/// extents; `done`: in no other context.
pub fn allocation_status(out: &mut Vec<u8>, cookie: u64, extents: &[Extent], done: bool) {
    status_header(out, cookie, Context::Allocation, extents.len(), done);
    for extent in &extents[..extents.len().min(EXTENTS_MAX)] {
        let hole = if extent.hole { STATE_HOLE } else { 0 };
        let zero = if extent.zero { STATE_ZERO } else { 0 };
        status_extent(out, extent.len, hole | zero);
    }
}

/// The same in `standfast:dirty`.
pub fn dirty_status(out: &mut Vec<u8>, cookie: u64, extents: &[DirtyExtent], done: bool) {
    status_header(out, cookie, Context::Dirty, extents.len(), done);
    for extent in &extents[..extents.len().min(EXTENTS_MAX)] {
        status_extent(out, extent.len, if extent.dirty { STATE_DIRTY } else { 0 });
    }
}

fn status_header(out: &mut Vec<u8>, cookie: u64, context: Context, extents: usize, done: bool) {
    assert!(extents > 0, "a block status has at least one extent");
    let len = 4 + 8 * extents.min(EXTENTS_MAX) as u32;
    chunk_header(out, cookie, u16::from(done), chunk::BLOCK_STATUS, len);
    out.put32(context.id());
}

fn status_extent(out: &mut Vec<u8>, len: u64, state: u32) {
    // Requests are below 4 GiB, and so are the extents that answer them.
    out.put32(u32::try_from(len).unwrap_or(u32::MAX));
    out.put32(state);
}

/// A simple reply with an error code, or 0.
pub fn simple_reply(out: &mut Vec<u8>, cookie: u64, code: u32) {
    out.put32(SIMPLE_REPLY_MAGIC);
    out.put32(code);
    out.put64(cookie);
}

/// READ and BLOCK_STATUS must be answered by chunks once those are negotiated.
fn needs_chunk(structured: bool, kind: u16) -> bool {
    structured && matches!(kind, cmd::READ | cmd::BLOCK_STATUS)
}

fn chunk_header(out: &mut Vec<u8>, cookie: u64, flags: u16, kind: u16, len: u32) {
    out.put32(STRUCTURED_REPLY_MAGIC);
    out.put16(flags);
    out.put16(kind);
    out.put64(cookie);
    out.put32(len);
}

/// Appends a request's header (the client's side).
pub fn encode(out: &mut Vec<u8>, header: &Header) {
    out.put32(REQUEST_MAGIC);
    out.put16(header.flags);
    out.put16(header.kind);
    out.put64(header.cookie);
    out.put64(header.offset);
    out.put32(header.len);
}

/// The start of a reply (the client's side).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// The whole of it; data follows if it was a READ and `code` is 0.
    Simple {
        /// 0 or an error.
        code: u32,
        /// As asked.
        cookie: u64,
    },
    /// A chunk.
    Chunk {
        /// No more chunks.
        done: bool,
        /// See [`chunk`].
        kind: u16,
        /// As asked.
        cookie: u64,
        /// Bytes that follow: unchecked.
        len: u32,
    },
}

/// Parses the start of a reply and tells how many bytes it took: None if `window` is too short.
pub fn decode_reply(window: &[u8]) -> Result<Option<(ReplyHeader, usize)>, BadMagic> {
    let mut fields = Fields(window);
    let simple = |f: &mut Fields<'_>| {
        let (code, cookie) = (f.u32()?, f.u64()?);
        Some((ReplyHeader::Simple { code, cookie }, SIMPLE_REPLY_LEN))
    };
    let chunk = |f: &mut Fields<'_>| {
        let (flags, kind) = (f.u16()?, f.u16()?);
        let (cookie, len) = (f.u64()?, f.u32()?);
        let done = flags & chunk::FLAG_DONE != 0;
        Some((ReplyHeader::Chunk { done, kind, cookie, len }, CHUNK_LEN))
    };
    match fields.u32() {
        None => Ok(None),
        Some(SIMPLE_REPLY_MAGIC) => Ok(simple(&mut fields)),
        Some(STRUCTURED_REPLY_MAGIC) => Ok(chunk(&mut fields)),
        Some(magic) => Err(BadMagic(magic)),
    }
}

/// Most extents of one context in one answer.
pub const EXTENTS_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        size: 1 << 40,
        read_only: false,
        structured: true,
        contexts: Contexts::ALL,
        fast_zero: true,
        block_min: 1,
    };

    fn header(kind: u16, flags: u16, offset: u64, len: u32) -> Header {
        Header { flags, kind, cookie: 7, offset, len }
    }

    #[test]
    fn a_write_out_of_range_still_has_its_payload_drained() {
        let bad = header(cmd::WRITE, 0, LIMITS.size, 4096);
        let drain = Decision::Drain { len: 4096, errno: Errno::NoSpc };
        assert_eq!(validate(&bad, &LIMITS), drain);
        let read = header(cmd::READ, 0, u64::MAX, 4096);
        assert_eq!(validate(&read, &LIMITS), Decision::Refuse(Errno::Inval));
    }

    #[test]
    fn writes_to_a_read_only_export_are_refused_whatever_their_kind() {
        let limits = Limits { read_only: true, ..LIMITS };
        let write = validate(&header(cmd::WRITE, 0, 0, 512), &limits);
        assert_eq!(write, Decision::Drain { len: 512, errno: Errno::Perm });
        for kind in [cmd::TRIM, cmd::WRITE_ZEROES] {
            let decision = validate(&header(kind, 0, 0, 512), &limits);
            assert_eq!(decision, Decision::Refuse(Errno::Perm));
        }
        let flush = validate(&header(cmd::FLUSH, 0, 0, 0), &limits);
        assert_eq!(flush, Decision::Run(Request::Flush));
    }

    #[test]
    fn zero_length_is_answered_and_never_disconnects() {
        for kind in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES, cmd::CACHE] {
            assert_eq!(validate(&header(kind, 0, 0, 0), &LIMITS), Decision::Empty, "{kind}");
        }
        let status = validate(&header(cmd::BLOCK_STATUS, 0, 0, 0), &LIMITS);
        assert_eq!(status, Decision::Refuse(Errno::Inval));
    }

    #[test]
    fn fua_is_tolerated_on_any_command_and_other_flags_only_on_their_own() {
        for kind in cmd::READ..=cmd::BLOCK_STATUS {
            let decision = validate(&header(kind, cmd_flag::FUA, 0, 512), &LIMITS);
            assert!(matches!(decision, Decision::Run(_) | Decision::Goodbye), "{kind}");
        }
        for (kind, flag) in [
            (cmd::WRITE, cmd_flag::DF),
            (cmd::READ, cmd_flag::NO_HOLE),
            (cmd::READ, cmd_flag::REQ_ONE),
            (cmd::TRIM, cmd_flag::FAST_ZERO),
            (cmd::WRITE, 1 << 5),
        ] {
            let decision = validate(&header(kind, flag, 0, 512), &LIMITS);
            assert!(!matches!(decision, Decision::Run(_)), "{kind} {flag}");
        }
        let plain = Limits { structured: false, fast_zero: false, ..LIMITS };
        let df = validate(&header(cmd::READ, cmd_flag::DF, 0, 512), &plain);
        assert_eq!(df, Decision::Refuse(Errno::Inval));
        let fast = validate(&header(cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 0, 512), &plain);
        assert_eq!(fast, Decision::Refuse(Errno::Inval));
    }

    #[test]
    fn payloads_above_the_limit_are_drained_or_close() {
        let len = PAYLOAD_MAX + 1;
        let decision = validate(&header(cmd::WRITE, 0, 0, len), &LIMITS);
        assert_eq!(decision, Decision::Drain { len, errno: Errno::Inval });
        let decision = validate(&header(cmd::WRITE, 0, 0, u32::MAX), &LIMITS);
        assert_eq!(decision, Decision::Close);
        let decision = validate(&header(cmd::READ, 0, 0, len), &LIMITS);
        assert_eq!(decision, Decision::Refuse(Errno::Inval));
        let zero = validate(&header(cmd::WRITE_ZEROES, 0, 0, u32::MAX), &LIMITS);
        assert!(matches!(zero, Decision::Run(Request::Zero { len: u32::MAX, .. })));
    }

    #[test]
    fn unaligned_requests_are_refused_when_block_sizes_were_agreed() {
        let limits = Limits { block_min: 512, ..LIMITS };
        let decision = validate(&header(cmd::READ, 0, 1, 512), &limits);
        assert_eq!(decision, Decision::Refuse(Errno::Inval));
        let decision = validate(&header(cmd::READ, 0, 512, 512), &limits);
        assert!(matches!(decision, Decision::Run(_)));
    }

    #[test]
    fn replies_have_their_golden_bytes() {
        let mut out = Vec::new();
        let read = header(cmd::READ, 0, 0, 8);
        reply_error(&mut out, true, &read, Errno::Io);
        reply_ok(&mut out, true, &header(cmd::WRITE, 0, 0, 8));
        offset_hole(&mut out, 7, 4096, 512, true);
        allocation_status(&mut out, 7, &[Extent { len: 512, hole: true, zero: true }], true);
        let hex: String = out.iter().map(|b| format!("{b:02x}")).collect();
        let golden = [
            "668e33ef00018001000000000000000700000006000000050000",
            "67446698000000000000000000000007",
            "668e33ef0001000200000000000000070000000c000000000000100000000200",
            "668e33ef0001000500000000000000070000000c000000010000020000000003",
        ];
        assert_eq!(hex, golden.concat());
    }

    #[test]
    fn each_context_answers_in_a_chunk_of_its_own_and_the_last_one_ends_the_reply() {
        let mut out = Vec::new();
        allocation_status(&mut out, 7, &[Extent { len: 512, hole: true, zero: true }], false);
        let dirty = |len, dirty| DirtyExtent { len, dirty };
        dirty_status(&mut out, 7, &[dirty(1 << 16, true), dirty(512, false)], true);
        let hex: String = out.iter().map(|b| format!("{b:02x}")).collect();
        let golden = [
            "668e33ef0000000500000000000000070000000c000000010000020000000003",
            "668e33ef000100050000000000000007000000140000000200010000000000010000020000000000",
        ];
        assert_eq!(hex, golden.concat());
    }

    #[test]
    fn block_status_needs_a_context_whichever() {
        let status = header(cmd::BLOCK_STATUS, cmd_flag::REQ_ONE, 0, 4096);
        let none = Limits { contexts: Contexts::default(), ..LIMITS };
        assert_eq!(validate(&status, &none), Decision::Refuse(Errno::Inval));
        for context in Context::ALL {
            let one = Limits { contexts: Contexts::default().with(context), ..LIMITS };
            let run = Request::BlockStatus { offset: 0, len: 4096, one: true };
            assert_eq!(validate(&status, &one), Decision::Run(run));
        }
    }

    proptest! {
        #[test]
        fn what_runs_is_inside_the_export(
            kind in 0u16..9, flags: u16, offset: u64, len: u32, size: u64, read_only: bool,
        ) {
            let limits = Limits { size, read_only, ..LIMITS };
            let sent = header(kind, flags & 0x3f, offset, len);
            let mut bytes = Vec::new();
            encode(&mut bytes, &sent);
            let (back, decision) = parse(&bytes, &limits).unwrap().unwrap();
            prop_assert_eq!(back, sent);
            if let Decision::Run(request) = decision
                && request != Request::Flush
            {
                prop_assert!(offset.checked_add(u64::from(len)).is_some_and(|end| end <= size));
                prop_assert!(len > 0);
            }
            if kind == cmd::WRITE && len <= 2 * PAYLOAD_MAX {
                let drained = matches!(decision, Decision::Drain { len: l, .. } if l == len);
                let runs = matches!(decision, Decision::Run(Request::Write { .. }));
                prop_assert!(drained || runs || (len == 0 && decision == Decision::Empty));
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes, &LIMITS);
            let _ = decode_reply(&bytes);
        }
    }
}
