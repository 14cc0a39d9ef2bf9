//! Edge cases of FastCGI: input that is known to have broken other servers, and responses that contradict their own headers.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::ErrorKind;

use common::fastcgi::{
    ABORT, Client, END, Fixture, GET_VALUES, GET_VALUES_RESULT, PARAMS, Record, STDIN, STDOUT, UNKNOWN_TYPE, begin,
    head, pair, record, request,
};

fn start(arguments: &[&str]) -> Fixture {
    Fixture::start("crashy", arguments)
}

/// Reads until the connection is closed. Returns the output of request `id`, and whether the request was completed.
fn rest_of(client: &mut Client, id: u16) -> (Vec<u8>, bool) {
    let (mut said, mut ended) = (Vec::new(), false);
    loop {
        match client.record() {
            Ok(record) if record.id == id && record.kind == STDOUT => said.extend(record.content),
            Ok(record) => ended |= record.id == id && record.kind == END,
            Err(error) => {
                // The server sends bytes that are not a valid record, so that nginx also detects the broken response.
                assert_eq!(error.to_string(), "not a record: [0, 0, 0, 0, 0, 0, 0, 0]");
                assert!(client.is_closed());
                return (said, ended);
            }
        }
    }
}

fn wait_until_read(client: &mut Client) {
    client.send(&[record(GET_VALUES, 0, b"", 0)]).unwrap();
    assert_eq!(client.record().unwrap().kind, GET_VALUES_RESULT);
}

/// HAProxy 598527673 and php-fpm: 65535 bytes and padding.
#[test]
fn the_longest_records_with_the_longest_padding_are_read() {
    let fixture = start(&["--max-params", "128K"]);
    let mut client = fixture.client();
    let mut params = [pair("REQUEST_METHOD", "POST"), pair("REQUEST_URI", "/count")].concat();
    let rest = 65_535 - params.len() - "HTTP_X".len() - 1 - 4;
    params.extend(pair("HTTP_X", &"x".repeat(rest)));
    assert_eq!(params.len(), 65_535);
    for padding in [0, 1, 255] {
        client
            .send(&[
                begin(1, 1, true),
                record(PARAMS, 1, &params, padding),
                record(PARAMS, 1, b"", padding),
                record(STDIN, 1, &[1; 65_535], padding),
                record(STDIN, 1, b"", padding),
            ])
            .unwrap();
        assert_eq!(client.response(1).unwrap().body(), b"65535\n");
    }
    drop(client);
    fixture.end();
}

/// CVE-2025-23016: memory is not allocated from a declared length. slowcgi: records that belong to no request are not stored.
#[test]
fn declared_lengths_and_records_without_a_request_use_no_memory() {
    let fixture = start(&[]);
    let worker = fixture.worker();
    let mut client = fixture.client();
    client.request("GET", "/ok", b"").unwrap();
    let before = common::status_number(worker, "VmHWM").unwrap();
    for lengths in [[0xff; 8], [0xff, 0xff, 0xff, 0xfe, 0x80, 0, 0, 3]] {
        let params = [&lengths[..], b"ab"].concat();
        client.send(&[begin(1, 1, true), record(PARAMS, 1, &params, 0), record(PARAMS, 1, b"", 0)]).unwrap();
        assert_eq!(client.response(1).unwrap().status(), 400);
    }
    for _ in 0..1000 {
        client.send(&[record(STDIN, 7, &[0; 65_535], 255), record(PARAMS, 7, &[0; 65_535], 255)]).unwrap();
        client.send(&[record(STDIN, 0, &[0; 65_535], 255)]).unwrap();
        let reply = client.record().unwrap();
        assert_eq!(reply, Record { kind: UNKNOWN_TYPE, id: 0, content: vec![STDIN, 0, 0, 0, 0, 0, 0, 0] });
    }
    let grown = common::status_number(worker, "VmHWM").unwrap() - before;
    assert!(grown < 4 << 10, "{grown} KiB");
    drop(client);
    fixture.end();
}

/// CVE-2012-6687: libfcgi used select(2) with descriptors beyond 1024.
#[test]
fn more_than_1024_connections_are_served() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard >= 4096, "this test needs 4096 descriptors");
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard).unwrap();
    let fixture = start(&[]);
    let mut clients: Vec<Client> = (0..1100).map(|_| fixture.client()).collect();
    for client in &mut clients {
        assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n");
    }
    drop(clients);
    fixture.end();
}

#[test]
fn a_refusal_closes_a_connection_without_keep_conn() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    client.send(&[begin(1, 9, false), record(PARAMS, 1, &[0; 60_000], 0)]).unwrap();
    assert_eq!(client.response(1).unwrap().protocol_status, 3, "UNKNOWN_ROLE (5.5)");
    assert!(client.is_closed());
    let mut client = fixture.client();
    client.send(&[begin(1, 1, false), record(ABORT, 1, b"", 0)]).unwrap();
    assert_eq!(client.response(1).unwrap().protocol_status, 0);
    assert!(client.is_closed());
    drop(client);
    fixture.end();
}

#[test]
fn an_abort_is_answered_once() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    client.send(&request(1, true, "GET", "/slow/600000", b"")).unwrap();
    client.send(&vec![record(ABORT, 1, b"", 0); 3]).unwrap();
    assert_eq!(client.response(1).unwrap().protocol_status, 0);
    wait_until_read(&mut client); // fails if an earlier record arrives
    drop(client);
    fixture.end();
}

#[test]
fn a_contradictory_head_gets_400() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    let cases: [&[(&str, &str)]; 4] = [
        &[("CONTENT_LENGTH", "5"), ("CONTENT_LENGTH", "6")],
        &[("CONTENT_LENGTH", "99999999999999999999")],
        &[("HTTP_X", "a\0b")],
        &[("CONTENT_TYPE", "a\r\nb")],
    ];
    for case in cases {
        let more = case.iter().map(|(name, value)| pair(name, value));
        let params = [pair("REQUEST_METHOD", "POST"), pair("REQUEST_URI", "/count")].into_iter().chain(more);
        let params = params.collect::<Vec<_>>().concat();
        client.send(&[begin(1, 1, true), record(PARAMS, 1, &params, 0), record(PARAMS, 1, b"", 0)]).unwrap();
        client.send(&[record(STDIN, 1, b"12345", 0), record(STDIN, 1, b"", 0)]).unwrap();
        assert_eq!(client.response(1).unwrap().status(), 400, "{case:?}");
    }
    drop(client);
    fixture.end();
}

#[test]
fn an_incomplete_response_has_no_end_record() {
    for (target, part) in [("/break", "a part\n"), ("/claim/10/5", "xxxxx"), ("/claim/1/0", "")] {
        let mut fixture = start(&[]);
        let mut client = fixture.client();
        client.send(&request(1, true, "GET", target, b"")).unwrap();
        let (said, ended) = rest_of(&mut client, 1);
        assert!(said.ends_with(part.as_bytes()) && !ended, "{target}: {:?}", String::from_utf8_lossy(&said));
        fixture.server.wait_for("a response body failed");
        drop(client);
        fixture.end();
    }
}

#[test]
fn an_incomplete_response_does_not_affect_other_requests_on_its_connection() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    client.send(&head(1, true, "POST", "/count", Some(5))).unwrap();
    client.send(&request(3, true, "GET", "/break", b"")).unwrap();
    let broken = client.record().unwrap();
    assert_eq!((broken.id, broken.kind), (3, STDOUT));
    wait_until_read(&mut client);
    // A request that begins after the broken response is also served.
    client.send(&request(5, true, "GET", "/ok", b"")).unwrap();
    assert!(client.response(5).unwrap().body().ends_with(b"ok\n"));
    client.send(&[record(STDIN, 1, b"12345", 0), record(STDIN, 1, b"", 0)]).unwrap();
    let first = client.response(1).unwrap();
    assert_eq!((first.status(), first.body()), (200, &b"5\n"[..]));
    let (said, ended) = rest_of(&mut client, 3);
    assert!(said.is_empty() && !ended, "the close shows that response 3 is incomplete");
    drop(client);
    fixture.end();
}

#[test]
fn aborting_an_incomplete_response_leaves_the_connection_usable() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    client.send(&head(1, true, "POST", "/count", Some(5))).unwrap();
    client.send(&request(3, true, "GET", "/break", b"")).unwrap();
    assert_eq!(client.record().unwrap().id, 3);
    client.send(&[record(ABORT, 3, b"", 0)]).unwrap();
    assert_eq!(client.response(3).unwrap().protocol_status, 0);
    client.send(&[record(STDIN, 1, b"12345", 0), record(STDIN, 1, b"", 0)]).unwrap();
    assert_eq!(client.response(1).unwrap().body(), b"5\n");
    assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n");
    drop(client);
    fixture.end();
}

#[test]
fn a_response_longer_than_its_length_is_truncated() {
    for (target, whole) in [("/claim/5/10", "xxxxx"), ("/claim/7/100", "xxxxxxx"), ("/claim/0/5", "")] {
        let mut fixture = start(&["--bind", "http:127.0.0.1:0"]);
        let mut client = fixture.client();
        let response = client.request("GET", target, b"").unwrap();
        assert_eq!(response.body(), whole.as_bytes(), "{target}");
        fixture.server.wait_for("longer than its Content-Length");
        assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n", "the connection stays open");
        let mut client = common::http::Client::connect(&fixture.server.http()).unwrap();
        assert_eq!(client.request("GET", target, b"").unwrap().text(), whole, "{target} over HTTP");
        assert_eq!(client.request("GET", "/ok", b"").unwrap().text(), "ok\n");
        drop(client);
        fixture.end();
    }
}

#[test]
fn a_response_shorter_than_its_length_is_visibly_incomplete_over_http_too() {
    let mut fixture = start(&["--bind", "http:127.0.0.1:0"]);
    let error = common::http::get(&fixture.server.http(), "/claim/10/5").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    fixture.server.wait_for("it ended 5 bytes before its Content-Length");
    fixture.end();
}

#[test]
fn an_invalid_length_is_removed() {
    let mut fixture = start(&[]);
    for length in ["five", "-5", "18446744073709551616"] {
        let response = fixture.client().request("GET", &format!("/claim/{length}/5"), b"").unwrap();
        assert_eq!(response.body(), b"xxxxx");
        assert!(!response.head().contains("content-length"), "{}", response.head());
        fixture.server.wait_for("removed an invalid Content-Length from a response");
    }
    fixture.end();
}

#[test]
fn a_response_to_head_may_have_a_length_without_a_body() {
    let fixture = start(&[]);
    let response = fixture.client().request("HEAD", "/claim/10/5", b"").unwrap();
    assert!(response.head().contains("content-length: 10"), "{}", response.head());
    assert_eq!((response.status(), response.body()), (200, &b""[..]));
    fixture.end();
}

#[test]
fn a_head_longer_than_a_record_is_split_and_a_status_header_is_removed() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    for thousands in [1, 65, 66, 200] {
        let response = client.request("GET", &format!("/head/{thousands}000"), b"").unwrap();
        let head = response.head();
        assert_eq!((response.status(), response.body()), (200, &b"body\n"[..]));
        assert_eq!(head.matches("x-long").count(), thousands);
        assert_eq!(head.to_lowercase().matches("status:").count(), 1);
    }
    drop(client);
    fixture.end();
}

#[test]
fn a_status_that_is_not_final_becomes_500() {
    let mut fixture = start(&[]);
    assert_eq!(fixture.client().request("GET", "/status/103", b"").unwrap().status(), 500);
    let line = fixture.server.wait_for("cannot send a response with this status: an application cannot send interim");
    assert!(line.contains(" status=103 "), "{line}");
    fixture.end();
}
