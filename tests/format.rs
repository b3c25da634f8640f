//! Golden bytes of every fixed layout: a stored byte that moves breaks journals,
//! stores and peers in the field, so it must show here. A deliberate change (a new
//! version) is recorded with `UPDATE_GOLDEN=1 cargo test -p e2e --test format`.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fmt::Write as _;
use std::path::Path;

use blockfilter::journal::format::{
    BATCH_FLUSH, BATCH_MAGIC, BATCH_MARK, BatchHdr, CHUNK_MAGIC, ChunkHdr, History,
    JOURNAL_VERSION, JournalSuper, MODE_SHIPPING, REC_FUA, REC_NO_HOLE, RecDesc, RecOp,
    SUPER_MAGIC, SuperDisk,
};
use replicator::wire::{CodecId, FRAME_EPOCH_END, FRAME_MAGIC, FrameHdr, Kind, WIRE_VERSION};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

#[test]
fn journal_record_keeps_its_bytes() {
    golden("journal-record", &record(RecOp::Write));
}

#[test]
fn journal_batch_header_keeps_its_bytes() {
    golden("journal-batch", &batch());
}

#[test]
fn journal_chunk_header_keeps_its_bytes() {
    let hdr = ChunkHdr {
        magic: CHUNK_MAGIC.into(),
        version: u32::from(JOURNAL_VERSION).into(),
        crc: 0x0102_0304.into(),
        journal_id: 0x1112_1314_1516_1718.into(),
        chunk_no: 0x2122_2324_2526_2728.into(),
        incarnation: 0x3132_3334_3536_3738.into(),
        prev_crc: 0x4142_4344.into(),
        ..ChunkHdr::default()
    };
    golden("journal-chunk", &hdr);
}

#[test]
fn journal_super_block_keeps_its_bytes() {
    let mut disk = SuperDisk::new_zeroed();
    disk.uuid = *b"disk-uuid-------";
    disk.size = 0x0a0b_0c0d_0e0f.into();
    disk.name[..4].copy_from_slice(b"data");
    let mut hdr = JournalSuper::new_zeroed();
    hdr.magic = SUPER_MAGIC;
    hdr.version = u32::from(JOURNAL_VERSION).into();
    hdr.crc = 0x0102_0304.into();
    hdr.seq = 0x1112_1314_1516_1718.into();
    hdr.journal_uuid = *b"journal-uuid----";
    hdr.group_uuid = *b"group-uuid------";
    hdr.chunk_size = (64 << 20).into();
    hdr.n_slots = 0x2122_2324.into();
    hdr.mode = MODE_SHIPPING;
    hdr.clean = 1;
    hdr.n_disks = 1;
    hdr.n_history = 1;
    hdr.incarnation = 0x3132_3334_3536_3738.into();
    hdr.generation = 0x4142_4344_4546_4748.into();
    hdr.checkpoint = 0x5152_5354_5556_5758.into();
    hdr.checkpoint_prev_crc = 0x6162_6364.into();
    hdr.ship_floor = 0x7172_7374_7576_7778.into();
    hdr.frozen_at = 0x8182_8384_8586_8788.into();
    hdr.history[0] = History { incarnation: 0x91.into(), end: 0x9293.into() };
    hdr.disks[0] = disk;
    golden("journal-super", &hdr);
}

#[test]
fn wire_frame_header_keeps_its_bytes() {
    let hdr = FrameHdr {
        magic: FRAME_MAGIC.into(),
        version: WIRE_VERSION,
        kind: Kind::Epoch as u8,
        flags: FRAME_EPOCH_END,
        codec: CodecId::Zstd as u8,
        hdr_crc: 0x0102_0304.into(),
        desc_crc: 0x1112_1314.into(),
        body_crc: 0x2122_2324.into(),
        n_rec: 0x3132_3334.into(),
        group_id: 0x4142_4344_4546_4748.into(),
        generation: 0x5152_5354_5556_5758.into(),
        incarnation: 0x6162_6364_6566_6768.into(),
        lsn_from: 0x7172_7374_7576_7778.into(),
        lsn_to: 0x8182_8384_8586_8788.into(),
        wall_us: 0x9192_9394_9596_9798.into(),
        raw_len: 0xa1a2_a3a4.into(),
        enc_len: 0xb1b2_b3b4.into(),
        cursor_disk: 0xc1c2_c3c4.into(),
        cursor: 0xd1d2_d3d4_d5d6_d7d8.into(),
        ..FrameHdr::default()
    };
    golden("wire-frame", &hdr);
}

#[test]
fn stored_numbers_of_operations_kinds_and_codecs_never_move() {
    let ops: Vec<u8> = (0..=255).filter(|n| RecOp::from_u8(*n).is_some()).collect();
    assert_eq!(ops, [1, 2, 3, 4, 5, 6]);
    assert_eq!((RecOp::Write as u8, RecOp::Mark as u8, RecOp::Nop as u8), (1, 4, 6));
    let kinds: Vec<u8> = (0..=255).filter(|n| Kind::from_u8(*n).is_some()).collect();
    assert_eq!(kinds, [1, 2, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]);
    assert_eq!((Kind::Copy as u8, Kind::Hello as u8, Kind::Bye as u8), (2, 16, 25));
    assert_eq!((CodecId::from_u8(1), CodecId::from_u8(2)), (Some(CodecId::Zstd), None));
}

fn record(op: RecOp) -> RecDesc {
    RecDesc {
        op: op as u8,
        disk: 7,
        flags: (REC_FUA | REC_NO_HOLE).into(),
        len: 0x0102_0304.into(),
        offset: 0x1112_1314_1516_1718.into(),
        lsn: 0x2122_2324_2526_2728.into(),
        payload_off: 0x3132_3334.into(),
        crc: 0x4142_4344.into(),
        ..RecDesc::default()
    }
}

fn batch() -> BatchHdr {
    BatchHdr {
        magic: BATCH_MAGIC.into(),
        version: JOURNAL_VERSION,
        flags: BATCH_FLUSH | BATCH_MARK,
        n_rec: 0x0102.into(),
        hdr_crc: 0x1112_1314.into(),
        prev_crc: 0x2122_2324.into(),
        journal_id: 0x3132_3334_3536_3738.into(),
        incarnation: 0x4142_4344_4546_4748.into(),
        generation: 0x5152_5354_5556_5758.into(),
        lsn: 0x6162_6364_6566_6768.into(),
        total_len: 0x7172_7374.into(),
        durable: 0x8182_8384_8586_8788.into(),
        wall_us: 0x9192_9394_9596_9798.into(),
        mono_us: 0xa1a2_a3a4_a5a6_a7a8.into(),
        ..BatchHdr::default()
    }
}

/// Compares `value`'s bytes with `golden/NAME.hex`, and reads them back.
fn golden<T>(name: &str, value: &T)
where
    T: IntoBytes + FromBytes + Immutable + KnownLayout + PartialEq + std::fmt::Debug,
{
    let text = dump(value.as_bytes());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.hex"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, kept, "the layout of {name} has changed");
    assert_eq!(&T::read_from_bytes(&undump(&kept)).unwrap(), value, "{name} reads back");
}

/// Sixteen bytes a line; lines of zeroes are left out, the length ends the text.
fn dump(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (number, line) in bytes.chunks(16).enumerate() {
        if line.iter().all(|b| *b == 0) {
            continue;
        }
        let _ = write!(text, "{:04x}:", number * 16);
        for byte in line {
            let _ = write!(text, " {byte:02x}");
        }
        text.push('\n');
    }
    let _ = writeln!(text, "{:04x}", bytes.len());
    text
}

fn undump(text: &str) -> Vec<u8> {
    let number = |word: &str| usize::from_str_radix(word.trim_end_matches(':'), 16).unwrap();
    let mut bytes = vec![0; number(text.lines().last().unwrap())];
    for line in text.lines() {
        let mut words = line.split(' ');
        let at = number(words.next().unwrap());
        for (i, word) in words.enumerate() {
            bytes[at + i] = number(word) as u8;
        }
    }
    bytes
}
