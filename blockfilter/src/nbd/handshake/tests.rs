//! Handshakes as clients send them, good and bad.

use proptest::prelude::*;

use super::*;

fn export() -> ExportInfo {
    ExportInfo {
        size: 1 << 20,
        read_only: false,
        multi_conn: true,
        block_min: 512,
        block_preferred: 4096,
        fast_zero: true,
        trim: true,
        dirty_map: false,
        description: "a disk".to_owned(),
    }
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put64(OPTION_MAGIC);
    out.put32(option);
    out.put32(data.len() as u32);
    out.extend_from_slice(data);
    out
}

fn named(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put32(name.len() as u32);
    out.extend_from_slice(name.as_bytes());
    out.put16(infos.len() as u16);
    infos.iter().for_each(|i| out.put16(*i));
    out
}

fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put32(name.len() as u32);
    out.extend_from_slice(name.as_bytes());
    out.put32(queries.len() as u32);
    for query in queries {
        out.put32(query.len() as u32);
        out.extend_from_slice(query.as_bytes());
    }
    out
}

/// Drives a handshake with two exports, `a` and `d` which has a dirty map; gives
/// `(option, reply)` pairs and the other events.
fn run(tls: TlsMode, mut input: &[u8]) -> (Vec<(u32, u32)>, Vec<HandshakeEvent>) {
    let mut handshake = Handshake::new(HandshakeConfig { tls });
    let (mut sent, mut events) = (Vec::new(), Vec::new());
    loop {
        while let Some(event) = handshake.poll_event() {
            match &event {
                HandshakeEvent::Send(bytes) => sent.extend_from_slice(bytes),
                HandshakeEvent::ListExports => handshake.listed(["a"]),
                HandshakeEvent::OpenExport { name, .. } if name == "a" => {
                    handshake.opened(Ok(export()));
                }
                HandshakeEvent::OpenExport { name, .. } if name == "d" => {
                    handshake.opened(Ok(ExportInfo { dirty_map: true, ..export() }));
                }
                HandshakeEvent::OpenExport { name, .. } => {
                    handshake.opened(Err(OpenError::Unknown(name.clone())));
                }
                HandshakeEvent::StartTls => handshake.tls_started(),
                HandshakeEvent::Transmission(_) | HandshakeEvent::Close(_) => {}
            }
            events.push(event);
        }
        let used = handshake.handle_bytes(input);
        input = &input[used..];
        if used == 0 && handshake.events.is_empty() {
            break;
        }
    }
    let mut fields = Fields(&sent[18..]);
    let mut replies = Vec::new();
    while fields.u64() == Some(OPTION_REPLY_MAGIC) {
        replies.push((fields.u32().unwrap(), fields.u32().unwrap()));
        let len = fields.u32().unwrap() as usize;
        fields.bytes(len).unwrap();
    }
    (replies, events)
}

fn negotiated(events: &[HandshakeEvent]) -> Option<Negotiated> {
    events.iter().find_map(|e| match e {
        HandshakeEvent::Transmission(negotiated) => Some(negotiated.as_ref().clone()),
        _ => None,
    })
}

const FLAGS: [u8; 4] = [0, 0, 0, 3];

#[test]
fn go_with_all_extras_reaches_transmission() {
    let input = [
        FLAGS.to_vec(),
        option(opt::STRUCTURED_REPLY, &[]),
        option(opt::SET_META_CONTEXT, &queries("a", &["base:allocation", "x:y"])),
        option(opt::GO, &named("a", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE])),
        b"requests".to_vec(),
    ]
    .concat();
    let (replies, events) = run(TlsMode::Off, &input);
    let kinds: Vec<u32> = replies.iter().map(|r| r.1).collect();
    let infos = [rep::INFO; 4];
    let expected = [&[rep::ACK, rep::META_CONTEXT, rep::ACK], &infos[..], &[rep::ACK]].concat();
    assert_eq!(kinds, expected);
    let negotiated = negotiated(&events).unwrap();
    assert!(negotiated.structured);
    assert_eq!(negotiated.contexts, Contexts::default().with(Context::Allocation));
    assert_eq!((negotiated.name.as_str(), negotiated.block_min), ("a", 512));
}

/// Ids and names of the contexts that an option was answered with.
fn contexts(events: &[HandshakeEvent]) -> Vec<(u32, String)> {
    let bytes = events.iter().filter_map(|e| match e {
        HandshakeEvent::Send(bytes) => Some(bytes.as_slice()),
        _ => None,
    });
    let sent = bytes.collect::<Vec<_>>().concat();
    let mut fields = Fields(&sent[18..]);
    let mut found = Vec::new();
    while fields.u64() == Some(OPTION_REPLY_MAGIC) {
        let (_, kind, len) = (fields.u32(), fields.u32(), fields.u32().unwrap() as usize);
        let mut data = Fields(fields.bytes(len).unwrap());
        if kind == Some(rep::META_CONTEXT) {
            let id = data.u32().unwrap();
            found.push((id, String::from_utf8(data.0.to_vec()).unwrap()));
        }
    }
    found
}

#[test]
fn contexts_are_listed_by_namespace_and_only_where_the_export_has_them() {
    let both = ["base:allocation", "standfast:dirty"];
    for (export, asked, found) in [
        ("d", &[][..], &both[..]),
        ("d", &["standfast:", "base:"], &both),
        ("d", &["standfast:"], &both[1..]),
        ("d", &["base:allocation", "standfast:nothing"], &both[..1]),
        ("d", &["standfast:d", "standfast", ":", "", "qemu:"], &[]),
        ("a", &[], &both[..1]),
        ("a", &["standfast:dirty", "standfast:"], &[]),
    ] {
        let list = option(opt::LIST_META_CONTEXT, &queries(export, asked));
        let input = [FLAGS.to_vec(), option(opt::STRUCTURED_REPLY, &[]), list].concat();
        let (replies, events) = run(TlsMode::Off, &input);
        let expected: Vec<_> = found.iter().map(|name| (0, (*name).to_owned())).collect();
        assert_eq!(contexts(&events), expected, "{export} {asked:?}");
        assert_eq!(replies.last(), Some(&(opt::LIST_META_CONTEXT, rep::ACK)));
    }
}

#[test]
fn contexts_are_chosen_by_their_whole_name_for_one_export_and_anew_each_time() {
    let set = |export: &str, asked: &[&str]| option(opt::SET_META_CONTEXT, &queries(export, asked));
    let structured = option(opt::STRUCTURED_REPLY, &[]);
    let (allocation, dirty) = ((1, "base:allocation"), (2, "standfast:dirty"));
    let none = Contexts::default();
    let only = |context| none.with(context);
    for (options, told, agreed) in [
        (
            vec![set("d", &["standfast:dirty", "base:allocation"])],
            vec![allocation, dirty],
            Contexts::ALL,
        ),
        (vec![set("d", &["standfast:dirty"])], vec![dirty], only(Context::Dirty)),
        (vec![set("d", &["base:", "standfast:"])], vec![], none),
        (vec![set("d", &[])], vec![], none),
        (vec![set("d", &["base:allocation"]), set("d", &["x:y"])], vec![allocation], none),
        (vec![set("a", &["base:allocation", "standfast:dirty"])], vec![allocation], none),
        (
            vec![set("d", &["base:allocation"]), set("d", &["standfast:dirty"])],
            vec![allocation, dirty],
            only(Context::Dirty),
        ),
    ] {
        let go = option(opt::GO, &named("d", &[]));
        let input = [FLAGS.to_vec(), structured.clone(), options.concat(), go.clone()].concat();
        let (_, events) = run(TlsMode::Off, &input);
        let told: Vec<_> = told.into_iter().map(|(id, name)| (id, name.to_owned())).collect();
        assert_eq!(contexts(&events), told);
        assert_eq!(negotiated(&events).unwrap().contexts, agreed);
        let plain = [FLAGS.to_vec(), options.concat(), go].concat();
        let (replies, events) = run(TlsMode::Off, &plain);
        assert_eq!(replies[0], (opt::SET_META_CONTEXT, rep::ERR_INVALID));
        assert_eq!(negotiated(&events).unwrap().contexts, none, "no structured replies");
    }
}

#[test]
fn requests_behind_the_handshake_are_not_consumed() {
    let mut handshake = Handshake::new(HandshakeConfig { tls: TlsMode::Off });
    let input = [FLAGS.to_vec(), option(opt::GO, &named("a", &[]))].concat();
    let mut with_more = input.clone();
    with_more.extend_from_slice(b"more");
    assert_eq!(handshake.handle_bytes(&with_more), input.len());
    handshake.opened(Ok(export()));
    assert_eq!(handshake.handle_bytes(b"more"), 0);
}

#[test]
fn a_client_that_did_not_ask_for_block_sizes_may_use_bytes() {
    let input = [FLAGS.to_vec(), option(opt::GO, &named("a", &[]))].concat();
    assert_eq!(negotiated(&run(TlsMode::Off, &input).1).unwrap().block_min, 1);
}

#[test]
fn nothing_is_told_before_tls_where_it_is_required() {
    let meta = queries("a", &[]);
    for (opt, data) in [
        (opt::LIST, Vec::new()),
        (opt::GO, named("a", &[])),
        (opt::INFO, named("a", &[])),
        (opt::STRUCTURED_REPLY, Vec::new()),
        (opt::LIST_META_CONTEXT, meta),
        (77, Vec::new()),
    ] {
        let (replies, events) =
            run(TlsMode::Required, &[FLAGS.to_vec(), option(opt, &data)].concat());
        assert_eq!(replies, [(opt, rep::ERR_TLS_REQD)]);
        assert_eq!(events.len(), 2, "greeting and refusal only");
    }
    let input = [FLAGS.to_vec(), option(opt::EXPORT_NAME, b"a")].concat();
    let (_, events) = run(TlsMode::Required, &input);
    assert!(matches!(events.last(), Some(HandshakeEvent::Close(_))));
}

#[test]
fn what_was_sent_in_the_clear_does_not_survive_starttls() {
    let mut handshake = Handshake::new(HandshakeConfig { tls: TlsMode::Offered });
    let input = [
        FLAGS.to_vec(),
        option(opt::STRUCTURED_REPLY, &[]),
        option(opt::STARTTLS, &[]),
        option(opt::GO, &named("a", &[])),
    ]
    .concat();
    assert_eq!(handshake.handle_bytes(&input), input.len(), "the rest is thrown away");
    while handshake.poll_event().is_some() {}
    handshake.tls_started();
    assert!(handshake.poll_event().is_none());
    handshake.handle_bytes(&option(opt::GO, &named("a", &[])));
    handshake.opened(Ok(export()));
    let events: Vec<_> = std::iter::from_fn(|| handshake.poll_event()).collect();
    assert!(!negotiated(&events).unwrap().structured);
    let (replies, _) = run(TlsMode::Off, &[FLAGS.to_vec(), option(5, &[])].concat());
    assert_eq!(replies, [(opt::STARTTLS, rep::ERR_UNSUP)]);
}

#[test]
fn malformed_and_unknown_options_are_answered_and_the_next_one_works() {
    let long = "n".repeat(STRING_MAX + 1);
    for (opt, data, error) in [
        (77, vec![1; 5000], rep::ERR_UNSUP),
        (11, vec![], rep::ERR_UNSUP),
        (opt::GO, vec![0; OPTION_DATA_MAX + 1], rep::ERR_TOO_BIG),
        (opt::GO, vec![0xff; 16], rep::ERR_INVALID),
        (opt::GO, named(&long, &[]), rep::ERR_INVALID),
        (opt::INFO, named("b", &[]), rep::ERR_UNKNOWN),
        (opt::LIST, vec![0], rep::ERR_INVALID),
        (opt::STRUCTURED_REPLY, vec![0], rep::ERR_INVALID),
        (opt::SET_META_CONTEXT, queries("a", &[]), rep::ERR_INVALID),
    ] {
        let input = [FLAGS.to_vec(), option(opt, &data), option(opt::LIST, &[])].concat();
        let (replies, _) = run(TlsMode::Off, &input);
        let listed = [(opt::LIST, rep::SERVER), (opt::LIST, rep::ACK)];
        assert_eq!(replies[0], (opt, error));
        assert_eq!(replies[1..], listed);
    }
}

#[test]
fn a_handshake_is_bounded_in_options_and_bytes() {
    let mut many = FLAGS.to_vec();
    (0..300).for_each(|_| many.extend(option(77, &[])));
    let (replies, events) = run(TlsMode::Off, &many);
    assert_eq!(replies.len(), OPTIONS_MAX);
    assert!(matches!(events.last(), Some(HandshakeEvent::Close(_))));
    let mut much = FLAGS.to_vec();
    (0..40).for_each(|_| much.extend(option(77, &[0; 60_000])));
    let (_, events) = run(TlsMode::Off, &much);
    assert!(matches!(events.last(), Some(HandshakeEvent::Close(_))));
    let mut huge = [FLAGS.to_vec(), option(opt::GO, &[])].concat();
    let at = huge.len() - 4;
    huge[at..].fill(0xff);
    let (_, events) = run(TlsMode::Off, &huge);
    assert!(matches!(events.last(), Some(HandshakeEvent::Close(_))));
}

#[test]
fn export_name_answers_with_zeroes_only_when_they_are_wanted() {
    for (flags, len) in [(1u8, 134), (3, 10), (0, 134)] {
        let input = [vec![0, 0, 0, flags], option(opt::EXPORT_NAME, b"a")].concat();
        let (_, events) = run(TlsMode::Off, &input);
        assert!(negotiated(&events).is_some());
        let sent = events.iter().map(|e| match e {
            HandshakeEvent::Send(bytes) => bytes.len(),
            _ => 0,
        });
        assert_eq!(sent.sum::<usize>(), 18 + len, "flags {flags}");
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic_and_are_bounded(
        parts in proptest::collection::vec(
            (0u32..13, proptest::collection::vec(any::<u8>(), 0..40), any::<bool>()), 0..12),
    ) {
        let mut input = FLAGS.to_vec();
        for (opt, data, framed) in parts {
            if framed {
                input.extend(option(opt, &data));
            } else {
                input.extend(data);
            }
        }
        let mut handshake = Handshake::new(HandshakeConfig { tls: TlsMode::Offered });
        let mut rest = &input[..];
        for _ in 0..200 {
            while let Some(event) = handshake.poll_event() {
                match event {
                    HandshakeEvent::ListExports => handshake.listed(["a"]),
                    HandshakeEvent::OpenExport { .. } => handshake.opened(Ok(export())),
                    HandshakeEvent::StartTls => handshake.tls_started(),
                    _ => {}
                }
            }
            let used = handshake.handle_bytes(rest);
            prop_assert!(used <= rest.len());
            rest = &rest[used..];
            prop_assert!(handshake.input.len() <= OPTION_DATA_MAX);
        }
    }
}
