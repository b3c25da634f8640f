//! Epochs against the plain order of records: a prefix stays a prefix.

use blockfilter::crc32c;
use std::convert::Infallible;

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;
use crate::frame::FrameBuf;

const SECTORS: usize = 24;
const CHUNK: u64 = 64 << 20;

#[derive(Clone, Debug)]
enum Op {
    Write { disk: u8, at: usize, len: usize, fill: u8 },
    Zero { disk: u8, at: usize, len: usize },
    Mark,
    Flush,
    NewIncarnation,
}

fn batch(lsn: u64, incarnation: u64, ops: &[Op], mono_us: u64) -> Batch {
    let mut descs = Vec::new();
    let mut payload = Vec::new();
    let mut flags = 0;
    for op in ops {
        let mut desc = RecDesc { lsn: (lsn + descs.len() as u64).into(), ..Default::default() };
        desc.payload_off = (4096 + payload.len() as u32).into();
        match op {
            Op::Write { disk, at, len, fill } => {
                desc.op = RecOp::Write as u8;
                (desc.disk, desc.offset) = (*disk, (*at as u64 * 512).into());
                let data = vec![*fill; len * 512];
                desc.len = (data.len() as u32).into();
                desc.crc = crc32c::crc32c(&data).into();
                payload.extend_from_slice(&data);
            }
            Op::Zero { disk, at, len } => {
                desc.op = RecOp::Zero as u8;
                (desc.disk, desc.offset) = (*disk, (*at as u64 * 512).into());
                desc.len = (*len as u32 * 512).into();
                (desc.payload_off, desc.crc) = (0.into(), 0.into());
            }
            Op::Mark => {
                desc.op = RecOp::Mark as u8;
                desc.len = 3.into();
                payload.extend_from_slice(b"tag");
                flags |= BATCH_MARK;
            }
            Op::Flush => {
                flags |= BATCH_FLUSH;
                continue;
            }
            Op::NewIncarnation => continue,
        }
        descs.push(desc);
    }
    let total = (4096 + payload.len()).next_multiple_of(4096);
    let hdr = BatchHdr {
        flags,
        n_rec: (descs.len() as u16).into(),
        incarnation: incarnation.into(),
        generation: 1.into(),
        lsn: lsn.into(),
        total_len: (total as u32).into(),
        mono_us: mono_us.into(),
        wall_us: (1_000_000_000_000 + mono_us).into(),
        ..Default::default()
    };
    let mut data = vec![0; total];
    data[..128].copy_from_slice(hdr.as_bytes());
    data[128..128 + descs.len() * 40].copy_from_slice(descs.as_bytes());
    data[4096..4096 + payload.len()].copy_from_slice(&payload);
    Batch { hdr, data: Arc::new(data), bytes: 0..total }
}

type Disks = [[u8; SECTORS * 512]; 2];

fn apply(disks: &mut Disks, desc: &RecDesc, payload: &[u8]) {
    let range = desc.offset.get() as usize..desc.end() as usize;
    match desc.rec_op() {
        Some(RecOp::Write) => {
            assert_eq!(crc32c::crc32c(payload), desc.crc.get());
            disks[usize::from(desc.disk)][range].copy_from_slice(payload);
        }
        Some(RecOp::Zero | RecOp::Trim) => disks[usize::from(desc.disk)][range].fill(0),
        _ => {}
    }
}

fn apply_batch(disks: &mut Disks, batch: &Batch) {
    for desc in batch.descs().unwrap() {
        let start = desc.payload_off.get() as usize;
        apply(disks, desc, &batch.data[start..start + desc.payload_len() as usize]);
    }
}

fn frames(epoch: &mut Epoch, payload: usize) -> Vec<FrameBuf> {
    let mut frames = Vec::new();
    let mut turn = 0;
    while let Some(frame) = epoch
        .next_frame::<Infallible>(7, payload, |len, raw| {
            turn += 1;
            let raw: Vec<u8> = raw.iter().flat_map(|piece| piece.as_ref()).copied().collect();
            assert_eq!(raw.len(), len);
            let packed = zstd::bulk::compress(&raw, 1).unwrap();
            Ok((turn % 2 == 0 && packed.len() < raw.len()).then_some(packed))
        })
        .unwrap()
    {
        frames.push(FrameBuf::from_bytes(frame.join().bytes).unwrap());
    }
    frames
}

fn op() -> impl Strategy<Value = Op> {
    let place = (0..2u8, 0..SECTORS, 1..8usize);
    prop_oneof![
        8 => (place.clone(), 0..4u8).prop_map(|((disk, at, len), fill)| {
            Op::Write { disk, at, len: len.min(SECTORS - at), fill }
        }),
        2 => place.prop_map(|(disk, at, len)| {
            Op::Zero { disk, at, len: len.min(SECTORS - at) }
        }),
        1 => Just(Op::Flush),
        1 => Just(Op::NewIncarnation),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Applying the frames gives, at each epoch's end, what applying the
    /// batches below that position gives; positions have no gap; marks and
    /// incarnations end epochs.
    #[test]
    fn every_epochs_end_is_a_prefix(
        plan in prop::collection::vec((prop::collection::vec(op(), 0..6), any::<bool>(), 0..40_000u64), 1..30),
        payload in 512..8192usize,
        bytes in 8192..65_536usize,
    ) {
        let limits = Limits { bytes, ..Limits::default() };
        let mut builder = Builder::new(limits, Lsn(4096));
        let (mut lsn, mut incarnation, mut now) = (4096, 1, 0);
        let (mut batches, mut epochs) = (Vec::new(), Vec::new());
        for (mut ops, mark, wait) in plan {
            incarnation += u64::from(ops.iter().any(|op| matches!(op, Op::NewIncarnation)));
            if mark && wait % 4 == 0 {
                ops.push(Op::Mark);
            }
            now += wait;
            let batch = batch(lsn, incarnation, &ops, now);
            lsn = batch.end(CHUNK) + if wait % 5 == 0 { 4096 } else { 0 };
            builder.push([batch.clone()], Lsn(lsn), now).unwrap();
            batches.push(batch);
            while let Some(epoch) = builder.poll(now, wait % 3 == 0).unwrap() {
                epochs.push(epoch);
            }
        }
        now += 1_000_000;
        while let Some(epoch) = builder.poll(now, true).unwrap() {
            epochs.push(epoch);
        }
        let (mut source, mut target): (Disks, Disks) =
            ([[9; SECTORS * 512]; 2], [[9; SECTORS * 512]; 2]);
        let mut position = 4096;
        let mut next = batches.iter().peekable();
        let mut label = 0;
        for mut epoch in epochs {
            epoch.set_writer(incarnation, 1);
            prop_assert_eq!(epoch.from.0, position);
            prop_assert!(epoch.wall_us >= label);
            label = epoch.wall_us;
            for frame in frames(&mut epoch, payload) {
                prop_assert_eq!(frame.hdr.lsn_from.get(), position);
                position = frame.hdr.lsn_to.get();
                let raw = frame.payload().unwrap().into_owned();
                for desc in frame.descs() {
                    let start = desc.payload_off.get() as usize;
                    apply(&mut target, desc, &raw[start..start + desc.payload_len() as usize]);
                }
                prop_assert_eq!(frame.hdr.is_epoch_end(), position == epoch.to.0);
            }
            while let Some(batch) = next.next_if(|b| b.hdr.lsn.get() < epoch.to.0) {
                prop_assert_eq!(batch.hdr.incarnation.get(), epoch.incarnation);
                let mark = batch.hdr.flags & BATCH_MARK != 0;
                prop_assert!(!mark || epoch.mark && batch.end(CHUNK) == epoch.to.0);
                apply_batch(&mut source, batch);
            }
            prop_assert!(source == target);
        }
        prop_assert_eq!(position, lsn);
        prop_assert!(next.peek().is_none());
    }
}

proptest! {
    /// Going back, a record is dropped if and only if every sector of it was seen already.
    #[test]
    fn dropped_is_exactly_what_later_records_overwrite(ops in prop::collection::vec(op(), 1..30)) {
        let ops: Vec<Op> =
            ops.into_iter().filter(|op| matches!(op, Op::Write { .. } | Op::Zero { .. })).collect();
        let mut seen = [[false; SECTORS]; 2];
        let mut kept = Vec::new();
        for (lsn, op) in ops.iter().enumerate().rev() {
            if let Op::Write { disk, at, len, .. } | Op::Zero { disk, at, len } = *op {
                let range = &mut seen[usize::from(disk)][at..at + len];
                if range.contains(&false) {
                    kept.insert(0, lsn as u64);
                }
                range.fill(true);
            }
        }
        let mut epoch = one_epoch(&ops);
        let frames = frames(&mut epoch, 1 << 20);
        let sent: Vec<u64> =
            frames.iter().flat_map(FrameBuf::descs).map(|desc| desc.lsn.get()).collect();
        prop_assert_eq!(sent, kept);
    }
}

fn write(at: usize, len: usize, fill: u8) -> Op {
    Op::Write { disk: 0, at, len, fill }
}

fn one_epoch(ops: &[Op]) -> Epoch {
    let mut builder = Builder::new(Limits::default(), Lsn(0));
    let batch = batch(0, 1, ops, 0);
    let end = Lsn(batch.end(CHUNK));
    builder.push([batch], end, 0).unwrap();
    builder.poll(1_000_000, true).unwrap().unwrap()
}

#[test]
fn only_records_that_are_wholly_overwritten_are_dropped() {
    let mut epoch = one_epoch(&[
        write(0, 4, 1),
        write(2, 1, 2),
        write(0, 2, 3),
        write(2, 2, 4),
        Op::Zero { disk: 1, at: 0, len: 8 },
    ]);
    let frames = frames(&mut epoch, 1 << 20);
    let lsns: Vec<u64> = frames[0].descs().iter().map(|d| d.lsn.get()).collect();
    assert_eq!(lsns, [2, 3, 4]);
}

#[test]
fn frames_are_whole_sectors_long_with_zeroes_behind_the_payload() {
    let mut epoch = one_epoch(&[write(0, 3, 1), write(4, 1, 2), write(6, 4, 3)]);
    let mut counts = Vec::new();
    while let Some(frame) = epoch.next_frame::<Infallible>(7, 2048, |_, _| Ok(None)).unwrap() {
        assert!(frame.total_len().is_multiple_of(FRAME_ALIGN));
        let frame = FrameBuf::from_bytes(frame.join().bytes).unwrap();
        let used: u32 = frame.descs().iter().map(|d| d.payload_len()).sum();
        let payload = frame.payload().unwrap();
        let rest = &payload[used as usize..];
        assert!(is_zero(rest) && (1..FRAME_ALIGN).contains(&rest.len()));
        for desc in frame.descs() {
            let bytes = &payload[desc.payload_off.get() as usize..][..desc.len.get() as usize];
            assert_eq!(crc32c::crc32c(bytes), desc.crc.get());
        }
        assert_eq!(frame.is_one_record(), frame.descs().len() == 1);
        counts.push(frame.descs().len());
    }
    assert_eq!(counts, [2, 1]);
}

#[test]
fn zero_payloads_become_zero_records() {
    let mut epoch = one_epoch(&[write(0, 4, 0)]);
    let frames = frames(&mut epoch, 1 << 20);
    assert_eq!(frames[0].descs()[0].rec_op(), Some(RecOp::Zero));
    assert_eq!(frames[0].hdr.raw_len.get(), 0);
    assert!(is_zero(&[]) && is_zero(&[0]) && !is_zero(&[1]) && !is_zero(&[0, 1]));
}

#[test]
fn an_epoch_closes_by_time_only_when_caught_up_and_sooner_after_a_flush() {
    let mut builder = Builder::new(Limits::default(), Lsn(0));
    let first = batch(0, 1, &[write(0, 1, 1)], 0);
    let next = first.end(CHUNK);
    builder.push([first], Lsn(next), 1000).unwrap();
    assert!(builder.poll(1_000_000, false).unwrap().is_none());
    assert!(builder.poll(100_999, true).unwrap().is_none());
    builder.push([batch(next, 1, &[write(1, 1, 1), Op::Flush], 10)], Lsn(next), 3000).unwrap();
    assert!(builder.poll(20_999, true).unwrap().is_none());
    assert!(builder.poll(21_000, true).unwrap().is_some());
}

#[test]
fn behind_an_epoch_spans_at_most_a_second_of_the_source() {
    let mut builder = Builder::new(Limits::default(), Lsn(0));
    let mut lsn = 0;
    for step in 0..25 {
        let batch = batch(lsn, 1, &[write(0, 1, 1)], step * 100_000);
        lsn = batch.end(CHUNK);
        builder.push([batch], Lsn(lsn), 0).unwrap();
    }
    let mut closed = 0;
    while builder.poll(0, false).unwrap().is_some() {
        closed += 1;
    }
    assert_eq!(closed, 2);
}

#[test]
fn labels_do_not_follow_small_steps_back() {
    assert_eq!(clamp_label(900, 1000), 1000);
    assert_eq!(clamp_label(1100, 1000), 1100);
    let far = STEP_BACK_US * 3;
    assert_eq!(clamp_label(far - STEP_BACK_US - 1, far), far - STEP_BACK_US - 1);
}
