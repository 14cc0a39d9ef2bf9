//! Tests the decoder with hand-written records, which must result in the same events however the bytes are split.

use super::*;

const RESPONDER: u16 = 1;
const AUTHORIZER: u16 = 2;
const FILTER: u16 = 3;
const MAX_PARAMS: usize = 66_000;

fn record(kind: u8, id: RequestId, content: &[u8], padding: usize) -> Vec<u8> {
    let mut out = BytesMut::new();
    put_header(&mut out, kind, id, content.len());
    out[6] = u8::try_from(padding).unwrap();
    out.extend_from_slice(content);
    out.extend(std::iter::repeat_n(0xEE, padding));
    out.to_vec()
}

fn begin(id: RequestId, role: u16, flags: u8) -> Vec<u8> {
    let [high, low] = role.to_be_bytes();
    record(BEGIN_REQUEST, id, &[high, low, flags, 0, 0, 0, 0, 0], 0)
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut out = BytesMut::new();
    for (name, value) in pairs {
        put_length(&mut out, name.len());
        put_length(&mut out, value.len());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(value.as_bytes());
    }
    out.to_vec()
}

fn request(id: RequestId, params: &[u8], body: &[u8]) -> Vec<u8> {
    [
        begin(id, RESPONDER, KEEP_CONN),
        record(PARAMS, id, params, 3),
        record(PARAMS, id, b"", 5),
        record(STDIN, id, body, 1),
        if body.is_empty() { Vec::new() } else { record(STDIN, id, b"", 0) },
    ]
    .concat()
}

/// Feeds `bytes` in chunks of the given sizes and collects the events; adjacent chunks of a stream are joined. An error
/// is returned together with the events before it.
fn decode(bytes: &[u8], mut piece: impl FnMut() -> usize) -> (Vec<FastCgiEvent>, Result<(), FastCgiError>) {
    let mut decoder = FastCgiDecoder::new(MAX_PARAMS, 4);
    let (mut input, mut events) = (BytesMut::new(), Vec::new());
    let mut rest = bytes;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
        rest = later;
        input.extend_from_slice(now);
        loop {
            match decoder.decode(&mut input) {
                Ok(Some(event)) => push(&mut events, event),
                Ok(None) => break,
                Err(error) => return (events, Err(error)),
            }
        }
    }
    (events, Ok(()))
}

fn push(events: &mut Vec<FastCgiEvent>, event: FastCgiEvent) {
    match (events.last_mut(), event) {
        (Some(FastCgiEvent::Stdin { id, bytes }), FastCgiEvent::Stdin { id: next, bytes: more })
        | (Some(FastCgiEvent::Data { id, bytes }), FastCgiEvent::Data { id: next, bytes: more })
            if *id == next =>
        {
            *bytes = [bytes.as_ref(), more.as_ref()].concat().into();
        }
        (_, event) => events.push(event),
    }
}

/// Returns the events of `bytes`, after checking that they are the same however the bytes are split: in two at every
/// position (in a long script at some positions), into single bytes, and at random.
fn outcome(bytes: &[u8]) -> (Vec<FastCgiEvent>, Result<(), FastCgiError>) {
    let expected = decode(bytes, || usize::MAX);
    for at in (1..bytes.len()).step_by(bytes.len() / 1000 + 1) {
        let mut first = true;
        let cut = || if std::mem::take(&mut first) { at } else { usize::MAX };
        assert_eq!(decode(bytes, cut), expected, "cut at {at}");
    }
    assert_eq!(decode(bytes, || 1), expected, "in single bytes");
    for seed in 0..50 {
        let mut random = fastrand::Rng::with_seed(seed);
        let longest = random.usize(2..=bytes.len().max(2));
        assert_eq!(decode(bytes, || random.usize(1..longest)), expected, "seed {seed}");
    }
    expected
}

fn whole(bytes: &[u8]) -> Vec<FastCgiEvent> {
    let (events, ending) = outcome(bytes);
    assert_eq!(ending, Ok(()), "{events:?}");
    events
}

fn error(bytes: &[u8]) -> FastCgiError {
    outcome(bytes).1.unwrap_err()
}

fn reply_kind(event: &FastCgiEvent) -> u8 {
    match event {
        FastCgiEvent::Reply { bytes, .. } => bytes[1],
        other => panic!("not a reply: {other:?}"),
    }
}

#[test]
fn every_split_of_the_same_bytes_gives_the_same_events() {
    let long = "v".repeat(300);
    let params = pairs(&[("REQUEST_METHOD", "POST"), ("LONG", &long), ("EMPTY", "")]);
    let bytes = [
        record(GET_VALUES, 0, &pairs(&[("FCGI_MPXS_CONNS", ""), ("OTHER", "")]), 7),
        request(1, &params, b"hello body"),
        record(42, 0, b"what", 2),
        record(STDOUT, 1, b"not for us", 0),
        request(1 << 8, &params, b""),
        begin(9, 4, 0),
        record(ABORT_REQUEST, 1, b"", 0),
    ]
    .concat();
    let events = whole(&bytes);
    assert_eq!(events.len(), 9, "{events:?}");
}

#[test]
fn params_split_inside_a_length_are_read_as_one() {
    let params = pairs(&[("A", &"x".repeat(200)), ("B", "2")]);
    let mut bytes = begin(1, RESPONDER, 0);
    for piece in params.chunks(3) {
        bytes.extend(record(PARAMS, 1, piece, 5));
    }
    bytes.extend(record(PARAMS, 1, b"", 0));
    let [FastCgiEvent::Request { params, keep_connection: false, .. }] = &whole(&bytes)[..] else { panic!() };
    assert_eq!(params.get("A"), Some("x".repeat(200).as_bytes()));
    assert_eq!(params.get("B"), Some(&b"2"[..]));
    assert_eq!(params.get("C"), None);
}

#[test]
fn a_length_beyond_the_end_is_the_peers_fault() {
    // The lengths from CVE-2025-23016. Both are near 2^31, so their sum wraps around.
    for params in [&b"\x05\x05short"[..], b"\xff\xff\xff\xff\xff\xff\xff\xffx", b"\x7f", b"\x01\x80\0\0", b"\x80"] {
        let bytes = request(1, params, b"the body is skipped");
        let events = whole(&bytes);
        let fault = Fault::ParamsMalformed;
        assert_eq!(events, [FastCgiEvent::BadRequest { id: 1, keep_connection: true, fault }], "{params:?}");
    }
}

#[test]
fn too_many_params_are_refused_and_skipped_and_the_connection_goes_on() {
    let piece = record(PARAMS, 1, &[b'a'; 30_000], 0);
    let bytes = [begin(1, RESPONDER, KEEP_CONN), piece.clone(), piece.clone(), piece, record(PARAMS, 1, b"", 0)];
    let bytes = [bytes.concat(), request(2, &pairs(&[("A", "1")]), b"")].concat();
    let events = whole(&bytes);
    assert!(matches!(events[0], FastCgiEvent::BadRequest { id: 1, fault: Fault::ParamsTooLong, .. }), "{events:?}");
    assert!(matches!(events[1], FastCgiEvent::Request { id: 2, .. }), "{events:?}");
}

#[test]
fn records_of_a_request_that_is_over_are_ignored() {
    let mut decoder = FastCgiDecoder::new(4096, 4);
    let mut input = BytesMut::from(&[begin(1, RESPONDER, 1), record(PARAMS, 1, b"", 0)].concat()[..]);
    assert!(matches!(decoder.decode(&mut input), Ok(Some(FastCgiEvent::Request { .. }))));
    input.extend_from_slice(&record(STDIN, 1, b"0123456789", 2)[..12]);
    assert!(matches!(decoder.decode(&mut input), Ok(Some(FastCgiEvent::Stdin { .. }))));
    assert!(!decoder.finish(1)); // answered before its body was read
    input.extend_from_slice(&record(STDIN, 1, b"0123456789", 2)[12..]);
    input.extend_from_slice(&record(STDIN, 1, b"more", 0));
    input.extend_from_slice(&record(STDIN, 1, b"", 0));
    input.extend_from_slice(&record(ABORT_REQUEST, 1, b"", 0));
    assert_eq!(decoder.decode(&mut input), Ok(None));
    assert!(input.is_empty() && decoder.is_idle());
}

#[test]
fn management_records_get_the_replies_that_the_specification_names() {
    let values = pairs(&[("FCGI_MAX_REQS", ""), ("FCGI_MAX_REQS", ""), ("X", "")]);
    let events = whole(&record(GET_VALUES, 0, &values, 0));
    let [FastCgiEvent::Reply { bytes, then_close: false }] = &events[..] else { panic!("{events:?}") };
    assert_eq!(bytes[..], record(GET_VALUES_RESULT, 0, &pairs(&[("FCGI_MAX_REQS", "4")]), 0)[..]);

    // A BEGIN_REQUEST with id 0 is a management record of an unknown type.
    for bytes in [record(42, 0, b"abc", 3), begin(0, RESPONDER, 1)] {
        let events = whole(&bytes);
        assert_eq!(events.iter().map(reply_kind).collect::<Vec<_>>(), [UNKNOWN_TYPE]);
    }
}

#[test]
fn a_role_or_a_request_too_many_is_refused() {
    let events = whole(&begin(7, 4, KEEP_CONN));
    let [FastCgiEvent::Reply { bytes, then_close: false }] = &events[..] else { panic!("{events:?}") };
    assert_eq!((bytes[1], bytes[3], bytes[12]), (END_REQUEST, 7, FastCgiStatus::UnknownRole as u8));

    let bytes: Vec<u8> = (1..=5).flat_map(|id| begin(id, RESPONDER, 0)).collect();
    let events = whole(&bytes);
    let [FastCgiEvent::Reply { bytes, then_close: true }] = &events[..] else { panic!("{events:?}") };
    assert_eq!((bytes[3], bytes[12]), (5, FastCgiStatus::CannotMultiplex as u8));
}

#[test]
fn an_abort_before_the_params_are_complete_ends_the_request() {
    let bytes = [begin(3, RESPONDER, KEEP_CONN), record(ABORT_REQUEST, 3, b"", 0), begin(3, RESPONDER, 0)].concat();
    let events = whole(&bytes);
    assert_eq!(events.iter().map(reply_kind).collect::<Vec<_>>(), [END_REQUEST]);
}

#[test]
fn a_second_abort_is_ignored() {
    let abort = record(ABORT_REQUEST, 1, b"", 0);
    let bytes = [request(1, &pairs(&[("A", "1")]), b""), abort.clone(), abort].concat();
    let events = whole(&bytes);
    assert_eq!(events.iter().filter(|event| matches!(event, FastCgiEvent::Abort { .. })).count(), 1, "{events:?}");
}

#[test]
fn what_has_no_reply_closes_the_connection() {
    let mut version = begin(1, RESPONDER, 0);
    version[0] = 2;
    assert_eq!(error(&version), FastCgiError::Version(2));
    for length in [0, 4, 7, 9] {
        assert_eq!(error(&record(BEGIN_REQUEST, 1, &vec![0; length.into()], 0)), FastCgiError::BeginLength(length));
    }
    let twice = [begin(1, RESPONDER, 0), begin(1, RESPONDER, 0)].concat();
    assert_eq!(error(&twice), FastCgiError::BeginTwice(1));
    let in_mid_request = [request(1, &pairs(&[("A", "1")]), b"body"), begin(1, RESPONDER, 1)].concat();
    assert_eq!(outcome(&in_mid_request).0.len(), 3, "what was before it counts");
    assert_eq!(error(&in_mid_request), FastCgiError::BeginTwice(1));
}

#[test]
fn records_before_a_begin_cost_nothing() {
    let bytes = [record(STDIN, 5, &[0; 60_000], 0), record(PARAMS, 5, &[0; 60_000], 255)].concat();
    assert_eq!(whole(&bytes), []);
}

/// HAProxy 598527673: 65535 plus the padding overflowed 16 bits, and the bytes after that were read
/// as headers. HAProxy 0aeae2305: a length lost its upper bits. The content here is full of records
/// that must not be decoded.
#[test]
fn a_record_of_the_greatest_length_with_the_greatest_padding_is_one_record() {
    let smuggled = begin(2, RESPONDER, KEEP_CONN);
    let mut value = smuggled.repeat(65_535 / smuggled.len());
    value.resize(65_535 - 6, 0);
    let mut params = vec![1];
    put_length_of(&mut params, value.len());
    params.extend_from_slice(b"N");
    params.extend_from_slice(&value);
    assert_eq!(params.len(), 65_535);
    for padding in [0, 1, 8, 255] {
        let mut bytes = begin(1, RESPONDER, KEEP_CONN);
        bytes.extend(record(PARAMS, 1, &params, padding));
        bytes.extend(record(PARAMS, 1, b"", padding));
        bytes.extend(record(STDIN, 1, &params, padding));
        bytes.extend(record(STDIN, 1, b"", padding));
        let events = whole(&bytes);
        let [
            FastCgiEvent::Request { id: 1, params: read, .. },
            FastCgiEvent::Stdin { bytes, .. },
            FastCgiEvent::StdinEnd { id: 1 },
        ] = &events[..]
        else {
            panic!("{padding}")
        };
        assert_eq!(read.get("N"), Some(&value[..]));
        assert!(bytes[..] == params[..]);
    }
}

fn put_length_of(out: &mut Vec<u8>, length: usize) {
    let mut four = BytesMut::new();
    put_length(&mut four, length);
    out.extend_from_slice(&four);
}

#[test]
fn a_filter_gets_its_file_after_its_body() {
    let bytes = [
        begin(1, FILTER, KEEP_CONN),
        record(PARAMS, 1, &pairs(&[("FCGI_DATA_LENGTH", "9")]), 0),
        record(PARAMS, 1, b"", 0),
        record(STDIN, 1, b"body", 4),
        record(STDIN, 1, b"", 1),
        record(DATA, 1, b"the ", 0),
        record(DATA, 1, b"file", 255),
        record(DATA, 1, b"", 3),
        record(DATA, 1, b"too late", 0),
    ];
    let events = whole(&bytes.concat());
    let [FastCgiEvent::Request { role: Role::Filter, .. }, rest @ ..] = &events[..] else { panic!("{events:?}") };
    let expected = [
        FastCgiEvent::Stdin { id: 1, bytes: Bytes::from_static(b"body") },
        FastCgiEvent::StdinEnd { id: 1 },
        FastCgiEvent::Data { id: 1, bytes: Bytes::from_static(b"the file") },
        FastCgiEvent::DataEnd { id: 1 },
    ];
    assert_eq!(rest, expected);
}

#[test]
fn only_a_filter_has_a_file_and_its_request_goes_on_until_that_has_ended() {
    for (role, file) in [(RESPONDER, false), (AUTHORIZER, false), (FILTER, true)] {
        let mut decoder = FastCgiDecoder::new(MAX_PARAMS, 4);
        let mut input = BytesMut::from(&begin(1, role, 1)[..]);
        input.extend_from_slice(
            &[record(PARAMS, 1, b"", 0), record(STDIN, 1, b"", 0), record(DATA, 1, b"x", 0)].concat(),
        );
        let mut events = Vec::new();
        while let Some(event) = decoder.decode(&mut input).unwrap() {
            events.push(event);
        }
        assert_eq!(events.iter().any(|event| matches!(event, FastCgiEvent::Data { .. })), file, "{events:?}");
        assert_eq!(decoder.finish(1), !file, "more can come for a filter only");
    }
}

#[test]
fn an_authorizer_needs_no_body_and_an_empty_one_does_no_harm() {
    let head = [begin(1, AUTHORIZER, KEEP_CONN), record(PARAMS, 1, b"", 0)].concat();
    assert!(matches!(whole(&head)[..], [FastCgiEvent::Request { role: Role::Authorizer, .. }]));
    let with_body = [head, record(STDIN, 1, b"", 0)].concat();
    assert!(matches!(whole(&with_body)[..], [FastCgiEvent::Request { .. }, FastCgiEvent::StdinEnd { id: 1 }]));
}

#[test]
fn params_may_be_split_anywhere() {
    let params = pairs(&[("REQUEST_METHOD", "GET"), ("LONG", &"x".repeat(200)), ("EMPTY", ""), ("B", "2")]);
    for padding in [0, 5] {
        for at in 1..params.len() {
            let (front, back) = params.split_at(at);
            let mut bytes = begin(1, RESPONDER, 0);
            bytes.extend(record(PARAMS, 1, front, padding));
            bytes.extend(record(PARAMS, 1, back, padding));
            bytes.extend(record(PARAMS, 1, b"", padding));
            let (events, ending) = decode(&bytes, || usize::MAX);
            let [FastCgiEvent::Request { params: read, .. }] = &events[..] else { panic!("split at {at}: {ending:?}") };
            assert_eq!(read, &Params::parse(params.clone().into()).unwrap(), "split at {at}");
        }
    }
}

#[test]
fn padding_is_skipped_on_every_kind_of_record() {
    for padding in [1, 7, 255] {
        let mut begun = begin(1, RESPONDER, KEEP_CONN);
        begun[6] = padding;
        begun.extend(vec![1; padding.into()]); // these bytes look like a header
        let padding = usize::from(padding);
        let bytes = [
            begun,
            record(PARAMS, 1, &pairs(&[("A", "1")]), padding),
            record(GET_VALUES, 0, &pairs(&[("FCGI_MAX_REQS", "")]), padding),
            record(PARAMS, 1, b"", padding),
            record(STDIN, 1, b"body", padding),
            record(42, 0, b"", padding),
            record(42, 1, b"", padding),
            record(STDIN, 1, b"", padding),
            record(ABORT_REQUEST, 1, b"", padding),
            record(ABORT_REQUEST, 1, b"", padding),
        ];
        let events = whole(&bytes.concat());
        assert_eq!(events.len(), 6, "{events:?}");
        assert_eq!((reply_kind(&events[0]), reply_kind(&events[3])), (GET_VALUES_RESULT, UNKNOWN_TYPE));
        assert_eq!(events[5], FastCgiEvent::Abort { id: 1 });
    }
}

#[test]
fn get_values_is_answered_in_mid_request_and_without_a_byte_more() {
    // libfcgi replies only when the next record arrives, so HAProxy waits in vain.
    let asked = pairs(&[("FCGI_MPXS_CONNS", ""), ("FCGI_COLOUR", "red"), ("", ""), ("FCGI_MAX_CONNS", "7")]);
    let expected = pairs(&[("FCGI_MPXS_CONNS", "1"), ("FCGI_MAX_CONNS", "4")]);
    let question = record(GET_VALUES, 0, &asked, 0);
    let reply = FastCgiEvent::Reply { bytes: record(GET_VALUES_RESULT, 0, &expected, 0).into(), then_close: false };
    assert_eq!(whole(&question), [reply]);

    let params = pairs(&[("A", "1")]);
    let bytes = [
        begin(1, RESPONDER, 0),
        question.clone(),
        record(PARAMS, 1, &params[..2], 0),
        question.clone(),
        record(PARAMS, 1, &params[2..], 0),
        record(PARAMS, 1, b"", 0),
        question.clone(),
        record(STDIN, 1, b"", 0),
    ];
    let events = whole(&bytes.concat());
    assert!(
        matches!(
            events[..],
            [
                FastCgiEvent::Reply { .. },
                FastCgiEvent::Reply { .. },
                FastCgiEvent::Request { .. },
                FastCgiEvent::Reply { .. },
                FastCgiEvent::StdinEnd { .. }
            ]
        ),
        "{events:?}"
    );
    for nothing_known in [&b""[..], &pairs(&[("X", "")]), b"\x7f"] {
        let reply = FastCgiEvent::Reply { bytes: record(GET_VALUES_RESULT, 0, b"", 0).into(), then_close: false };
        assert_eq!(whole(&record(GET_VALUES, 0, nothing_known, 1)), [reply]);
    }
}

/// HAProxy 3ac082b2b (an application record with id 0), and slowcgi, which stored an unbounded
/// amount of input for id 0.
#[test]
fn id_0_is_never_a_request() {
    for kind in (BEGIN_REQUEST..GET_VALUES).chain([0, 12, 42, 255]) {
        let events = whole(&record(kind, 0, b"12345678", 3));
        let [FastCgiEvent::Reply { bytes, then_close: false }] = &events[..] else { panic!("{kind}: {events:?}") };
        assert_eq!(bytes[..], record(UNKNOWN_TYPE, 0, &[kind, 0, 0, 0, 0, 0, 0, 0], 0));
    }
}

#[test]
fn answers_are_not_answered() {
    assert_eq!(whole(&record(UNKNOWN_TYPE, 0, &[9, 0, 0, 0, 0, 0, 0, 0], 0)), []);
    assert_eq!(whole(&record(GET_VALUES_RESULT, 0, &pairs(&[("FCGI_MAX_REQS", "1")]), 0)), []);
}

#[test]
fn an_application_record_of_no_known_type_leaves_its_request_alone() {
    let params = pairs(&[("A", "1")]);
    let odd = |id| {
        [0, END_REQUEST, STDOUT, 7, GET_VALUES, UNKNOWN_TYPE, 12, 255].map(|kind| record(kind, id, b"odd", 1)).concat()
    };
    let bytes = [odd(1), begin(1, RESPONDER, 0), odd(1), record(PARAMS, 1, &params, 0), odd(1), odd(2)];
    let bytes = [bytes.concat(), record(PARAMS, 1, b"", 0), odd(1), record(STDIN, 1, b"", 0), odd(1)].concat();
    let events = whole(&bytes);
    assert!(matches!(events[..], [FastCgiEvent::Request { .. }, FastCgiEvent::StdinEnd { .. }]), "{events:?}");
}

#[test]
fn a_refused_request_is_skipped_to_its_last_byte() {
    // The id of the further records is no longer in use.
    for role in [0, 4, 0x0101, 0xffff] {
        let rest = [record(PARAMS, 5, b"\x7f", 9), record(PARAMS, 5, b"", 0), record(STDIN, 5, b"body", 0)].concat();
        let bytes = [begin(5, role, KEEP_CONN), rest, request(5, &pairs(&[("A", "1")]), b"")].concat();
        let events = whole(&bytes);
        let [
            FastCgiEvent::Reply { bytes, then_close: false },
            FastCgiEvent::Request { id: 5, .. },
            FastCgiEvent::StdinEnd { .. },
        ] = &events[..]
        else {
            panic!("{events:?}")
        };
        assert_eq!((bytes[1], bytes[12]), (END_REQUEST, FastCgiStatus::UnknownRole as u8));
    }
}

#[test]
fn streams_of_several_requests_may_be_mixed() {
    let (one, two) = (pairs(&[("A", "1")]), pairs(&[("A", "2")]));
    let bytes = [
        begin(1, RESPONDER, KEEP_CONN),
        begin(0xffff, RESPONDER, KEEP_CONN),
        record(PARAMS, 1, &one[..1], 0),
        record(PARAMS, 0xffff, &two, 0),
        record(PARAMS, 1, &one[1..], 0),
        record(PARAMS, 0xffff, b"", 0),
        record(PARAMS, 1, b"", 0),
        record(STDIN, 1, b"", 0),
        record(STDIN, 0xffff, b"two", 0),
        record(STDIN, 0xffff, b"", 0),
    ];
    let events = whole(&bytes.concat());
    let [
        FastCgiEvent::Request { id: 0xffff, params: second, .. },
        FastCgiEvent::Request { id: 1, params: first, .. },
        FastCgiEvent::StdinEnd { id: 1 },
        FastCgiEvent::Stdin { id: 0xffff, .. },
        FastCgiEvent::StdinEnd { id: 0xffff },
    ] = &events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!((first.get("A"), second.get("A")), (Some(&b"1"[..]), Some(&b"2"[..])));
}

#[test]
fn records_of_the_wrong_moment_are_ignored() {
    // A body arrives before the parameters are complete, and the other parameters after it.
    let params = pairs(&[("A", "1")]);
    let bytes = [
        begin(1, RESPONDER, 0),
        record(STDIN, 1, b"early", 0),
        record(DATA, 1, b"early", 0),
        record(PARAMS, 1, &params, 0),
        record(STDIN, 1, b"", 0),
        record(PARAMS, 1, b"", 0),
        record(PARAMS, 1, &params, 0),
        record(PARAMS, 1, b"", 0),
        record(STDIN, 1, b"body", 0),
        record(STDIN, 1, b"", 0),
        record(STDIN, 1, b"late", 0),
        record(STDIN, 1, b"", 0),
    ];
    let events = whole(&bytes.concat());
    let [FastCgiEvent::Request { .. }, FastCgiEvent::Stdin { bytes, .. }, FastCgiEvent::StdinEnd { .. }] = &events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!(bytes, "body");
}

#[test]
fn the_seed_of_odd_records_gets_every_kind_of_reply() {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/fastcgi/odd");
    let events = whole(&std::fs::read(file).unwrap());
    let replies: Vec<u8> =
        events.iter().filter(|event| matches!(event, FastCgiEvent::Reply { .. })).map(reply_kind).collect();
    assert_eq!(replies, [UNKNOWN_TYPE, UNKNOWN_TYPE, UNKNOWN_TYPE, END_REQUEST, GET_VALUES_RESULT, END_REQUEST]);
    let fault = Fault::ParamsMalformed;
    assert!(events.contains(&FastCgiEvent::BadRequest { id: 2, keep_connection: true, fault }), "{events:?}");
}

/// Requests as each web server sends them. They are in fuzz/seeds, so the fuzzer also starts from them.
#[test]
fn requests_in_the_shape_of_each_web_server_are_read() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/fastcgi");
    let cases: [(&str, usize, &str, usize); 8] = [
        ("nginx-get", 1, "GET", 0),
        ("nginx-post", 1, "POST", 40_000),
        ("lighttpd-post", 1, "POST", 5),
        ("apache-chunked-post", 1, "POST", 12),
        ("haproxy-get-values", 2, "GET", 0),
        ("caddy-post", 1, "POST", 11),
        ("lighttpd-authorizer", 1, "GET", 0),
        ("filter", 1, "GET", 0),
    ];
    for (name, requests, method, length) in cases {
        let bytes = std::fs::read(directory.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let events = whole(&bytes);
        let heads: Vec<&Params> = events
            .iter()
            .filter_map(|event| match event {
                FastCgiEvent::Request { params, .. } => Some(params),
                _ => None,
            })
            .collect();
        assert_eq!(heads.len(), requests, "{name}");
        assert_eq!(heads[0].get("REQUEST_METHOD"), Some(method.as_bytes()), "{name}");
        let body =
            events.iter().map(|event| if let FastCgiEvent::Stdin { bytes, .. } = event { bytes.len() } else { 0 });
        assert_eq!(body.sum::<usize>(), length, "{name}");
    }
}

#[test]
fn arbitrary_bytes_do_no_harm_however_they_are_cut() {
    for seed in 0..2000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut bytes = Vec::new();
        for _ in 0..random.usize(1..20) {
            let content: Vec<u8> = (0..random.usize(0..40)).map(|_| random.u8(..)).collect();
            let (id, padding) = (random.u16(0..3), random.usize(0..9));
            bytes.extend(match random.u8(0..4) {
                0 => begin(id, random.u16(1..5), random.u8(0..2)),
                _ => record(random.u8(0..13), id, &content, padding),
            });
        }
        if random.bool() {
            let at = random.usize(0..bytes.len());
            bytes[at] = random.u8(..);
        }
        let once = decode(&bytes, || usize::MAX);
        let pieces = decode(&bytes, || random.usize(1..9));
        // If the bytes end in an error, the events before it are still the same.
        assert_eq!(once, pieces, "seed {seed}");
    }
}
