//! The hot pure parts, one at a time: `cargo bench -p benches`.
//!
//! For comparing two commits on one machine. Each works on what one group commit of depth 16
//! has, unless it says otherwise.

#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first surprise")]

use blockfilter::crc32c;
use blockfilter::dirty::Dirty;
use blockfilter::journal::batch::{finish_batch, parse_batch, payloads_ok};
use blockfilter::journal::format::{BatchHdr, PAGE, RecDesc, RecOp};
use blockfilter::nbd::proto::{Contexts, cmd};
use blockfilter::nbd::transmission::{Header, Limits, encode, parse};
use blockfilter::overlay::Overlay;
use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use replicator::frame::FrameBuf;
use replicator::wire::{FrameHdr, Kind};
use target::store::format::{Entry, split};

fn main() {
    divan::main();
}

/// Descriptors of writes of 4 KiB, the first payload at `first`, and the payloads.
fn records(first: u32) -> (Vec<RecDesc>, Vec<u8>) {
    let body: Vec<u8> = (0..RECORDS * BLOCK).map(|at| ((at * 131) >> 3) as u8).collect();
    let describe = |(index, payload): (usize, &[u8])| RecDesc {
        op: RecOp::Write as u8,
        len: (payload.len() as u32).into(),
        offset: (block(index as u64) * BLOCK as u64).into(),
        lsn: (index as u64).into(),
        payload_off: (first + (index * BLOCK) as u32).into(),
        crc: crc32c::crc32c(payload).into(),
        ..RecDesc::default()
    };
    (body.chunks(BLOCK).enumerate().map(describe).collect(), body)
}

/// A scattered block number for each index.
fn block(index: u64) -> u64 {
    index.wrapping_mul(0x9E37_79B9_7F4A_7C15) % BLOCKS
}

#[divan::bench]
fn frame_encode(bencher: Bencher<'_, '_>) {
    let (descs, body) = records(0);
    let hdr = frame_header(&body);
    bencher.counter(BytesCount::new(body.len())).bench(|| FrameBuf::seal(hdr, &descs, &body));
}

#[divan::bench]
fn frame_check(bencher: Bencher<'_, '_>) {
    let (descs, body) = records(0);
    let mut bytes = FrameBuf::seal(frame_header(&body), &descs, &body);
    let bytes = std::mem::take(&mut bytes.bytes);
    bencher
        .counter(BytesCount::new(body.len()))
        .with_inputs(|| bytes.clone())
        .bench_values(|bytes| FrameBuf::from_bytes(bytes).unwrap());
}

fn frame_header(body: &[u8]) -> FrameHdr {
    FrameHdr {
        kind: Kind::Epoch as u8,
        raw_len: (body.len() as u32).into(),
        lsn_to: (RECORDS as u64).into(),
        ..FrameHdr::default()
    }
}

#[divan::bench]
fn batch_seal(bencher: Bencher<'_, '_>) {
    let (descs, body) = records(PAGE as u32);
    bencher.counter(ItemsCount::new(RECORDS)).bench(|| {
        let crcs = body.chunks(BLOCK).fold(0, |all, payload| all ^ crc32c::crc32c(payload));
        let mut hdr = BatchHdr::default();
        finish_batch(&mut hdr, black_box(&descs));
        (hdr, crcs)
    });
}

#[divan::bench]
fn batch_check(bencher: Bencher<'_, '_>) {
    let (descs, body) = records(PAGE as u32);
    let mut hdr =
        BatchHdr { total_len: (PAGE as u32 + body.len() as u32).into(), ..Default::default() };
    finish_batch(&mut hdr, &descs);
    let mut batch = zerocopy::IntoBytes::as_bytes(&hdr).to_vec();
    batch.extend_from_slice(zerocopy::IntoBytes::as_bytes(&descs[..]));
    batch.resize(PAGE as usize, 0);
    batch.extend_from_slice(&body);
    bencher.counter(ItemsCount::new(RECORDS)).bench(|| {
        let (hdr, descs) = parse_batch(black_box(&batch)).unwrap();
        assert!(payloads_ok(&hdr, &descs, &batch));
    });
}

#[divan::bench]
fn overlay_insert_and_remove(bencher: Bencher<'_, '_>) {
    let mut overlay = filled();
    let mut lsn = HELD;
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
        lsn += 1;
        let old = lsn - HELD;
        overlay.insert_write(lsn, block(lsn) * BLOCK as u64, BLOCK as u64, lsn * BLOCK as u64);
        overlay.remove_write(old, block(old) * BLOCK as u64, BLOCK as u64);
    });
}

#[divan::bench]
fn overlay_lookup(bencher: Bencher<'_, '_>) {
    let overlay = filled();
    let (mut at, mut pieces) = (0, Vec::new());
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
        at += 1;
        overlay.lookup(block(at) * BLOCK as u64, BLOCK as u64, usize::MAX, &mut pieces);
        pieces.len()
    });
}

/// What is written between two acknowledgements at 80 000 writes a second, and one of them.
#[divan::bench(args = [2, 1024])]
fn dirty_set(bencher: Bencher<'_, '_>, disk_gib: u64) {
    let mut dirty = Dirty::new(0);
    let mut lsn = 0_u64;
    bencher.counter(ItemsCount::new(BETWEEN_ACKS)).bench_local(|| {
        for _ in 0..BETWEEN_ACKS {
            // Scattered over the whole disk.
            let at = lsn.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (disk_gib << 18);
            dirty.set(0, at * BLOCK as u64, BLOCK as u64);
            lsn += 1;
        }
        dirty.told(1, lsn - BETWEEN_ACKS / 2, true, lsn);
    });
}

/// An overlay with an arena's worth of blocks.
fn filled() -> Overlay {
    let mut overlay = Overlay::default();
    for lsn in 1..=HELD {
        overlay.insert_write(lsn, block(lsn) * BLOCK as u64, BLOCK as u64, lsn * BLOCK as u64);
    }
    overlay
}

#[divan::bench]
fn nbd_request_parse(bencher: Bencher<'_, '_>) {
    let header = Header { flags: 0, kind: cmd::READ, cookie: 7, offset: 1 << 20, len: 4096 };
    let mut request = Vec::new();
    encode(&mut request, &header);
    let limits = Limits {
        size: 1 << 30,
        read_only: false,
        structured: true,
        contexts: Contexts::ALL,
        fast_zero: true,
        block_min: 1,
    };
    bencher
        .counter(ItemsCount::new(1_usize))
        .bench(|| parse(black_box(&request), black_box(&limits)).unwrap());
}

#[divan::bench]
fn index_entries_of_a_mebibyte(bencher: Bencher<'_, '_>) {
    let mut entries = Vec::new();
    bencher.bench_local(|| {
        entries.clear();
        split(Entry::default(), black_box(512 * 1024 + 512), 1 << 20, 0, &mut entries);
        entries.len()
    });
}

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Records of a batch.
const RECORDS: usize = 16;
/// Blocks that the overlay holds: a full arena of 256 MiB.
const HELD: u64 = 60_000;
/// Writes.
const BETWEEN_ACKS: u64 = 8_000;
/// Blocks of the disk: 2 GiB.
const BLOCKS: u64 = 1 << 19;
