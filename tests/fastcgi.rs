//! FastCGI on the wire: unusual input, taken from the specification and from real servers, and sent by the tests' own client. Section
//! numbers refer to the FastCGI specification 1.0.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use common::Server;
use common::fastcgi::{
    ABORT, BEGIN, Client, END, Fixture, GET_VALUES, GET_VALUES_RESULT, PARAMS, Record, STDIN, STDOUT, UNKNOWN_TYPE,
    begin, head, pair, record, request,
};

fn start(arguments: &[&str]) -> Fixture {
    Fixture::start("crashy", arguments)
}

#[test]
fn a_keep_alive_connection_serves_many_requests_and_any_other_is_closed() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    for _ in 0..50 {
        let response = client.request("GET", "/ok", b"").unwrap();
        assert_eq!((response.status(), response.body()), (200, &b"ok\n"[..]));
        assert_eq!((response.application_status, response.protocol_status), (0, 0));
        assert!(response.head().contains("content-length: 3"), "{}", response.head());
    }
    client.send(&request(1, false, "GET", "/ok", b"")).unwrap();
    assert_eq!(client.response(1).unwrap().body(), b"ok\n");
    assert!(client.is_closed());
    drop(client);
    fixture.end();
}

#[test]
fn a_request_sent_byte_by_byte_is_served() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    let body = b"the body";
    for byte in request(1, true, "POST", "/echo", body).concat() {
        client.stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(client.response(1).unwrap().body(), body);
    drop(client);
    fixture.end();
}

#[test]
fn several_requests_in_one_write_are_all_answered() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    let many: Vec<Vec<u8>> = (1..=20).flat_map(|id| request(id, true, "POST", "/echo", &[b'x'; 100])).collect();
    client.send(&many).unwrap();
    let mut ended = 0;
    while ended < 20 {
        ended += usize::from(client.record().unwrap().kind == END);
    }
    drop(client);
    fixture.end();
}

#[test]
fn requests_on_one_connection_overlap() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    // The first request waits for its body, and the second request completes before it.
    client.send(&head(1, true, "POST", "/echo", Some(5))).unwrap();
    client.send(&request(3, true, "GET", "/ok", b"")).unwrap();
    let mut second = Vec::new();
    loop {
        let record = client.record().unwrap();
        if record.id == 3 && record.kind == STDOUT {
            second.extend(record.content);
        } else if record.id == 3 {
            assert_eq!(record.kind, END);
            break;
        }
    }
    assert!(second.ends_with(b"ok\n"));
    client.send(&[record(STDIN, 1, b"first", 3), record(STDIN, 1, b"", 0)]).unwrap();
    let mut first = Vec::new();
    while !first.ends_with(b"first") {
        let record = client.record().unwrap();
        assert_eq!((record.id, record.kind), (1, STDOUT));
        first.extend(record.content);
    }
    drop(client);
    fixture.end();
}

#[test]
fn management_records_are_answered_at_any_time() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    let asked =
        [pair("FCGI_MAX_CONNS", ""), pair("FCGI_MAX_REQS", ""), pair("FCGI_MPXS_CONNS", ""), pair("FCGI_COLOUR", "")];
    client.send(&head(1, true, "POST", "/count", None)).unwrap();
    client.send(&[record(GET_VALUES, 0, &asked.concat(), 7), record(99, 0, b"what", 1)]).unwrap();
    let values = client.record().unwrap();
    assert_eq!((values.kind, values.id), (GET_VALUES_RESULT, 0));
    let said = String::from_utf8_lossy(&values.content).into_owned();
    assert!(
        said.contains("FCGI_MPXS_CONNS1") && said.contains("FCGI_MAX_REQS64") && !said.contains("COLOUR"),
        "{said:?}"
    );
    let unknown = client.record().unwrap();
    assert_eq!(unknown, Record { kind: UNKNOWN_TYPE, id: 0, content: vec![99, 0, 0, 0, 0, 0, 0, 0] });
    client.send(&[record(STDIN, 1, b"12345", 0), record(STDIN, 1, b"", 255)]).unwrap();
    assert_eq!(client.response(1).unwrap().body(), b"5\n");
    drop(client);
    fixture.end();
}

#[test]
fn unknown_roles_and_excess_requests_get_their_protocol_status() {
    let fixture = start(&["--max-multiplexed", "2"]);
    let mut client = fixture.client();
    client.send(&[begin(1, 4, true)]).unwrap(); // role 4: only three roles exist
    assert_eq!(client.response(1).unwrap().protocol_status, 3, "UNKNOWN_ROLE (5.5)");
    client.send(&[begin(1, 1, true), begin(2, 1, true), begin(3, 1, true)]).unwrap();
    assert_eq!(client.response(3).unwrap().protocol_status, 1, "CANT_MPX_CONN (5.5)");
    client.send(&[record(ABORT, 1, b"", 0), record(ABORT, 2, b"", 0)]).unwrap();
    for id in [1, 2] {
        assert_eq!(client.response(id).unwrap().protocol_status, 0, "REQUEST_COMPLETE (5.4)");
    }
    assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n", "the connection still works");
    drop(client);
    fixture.end();
}

#[test]
fn an_abort_cancels_the_request_and_its_work() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    client.send(&request(1, true, "GET", "/slow/600000", b"")).unwrap();
    client.send(&[record(ABORT, 1, b"", 0)]).unwrap();
    assert_eq!(client.response(1).unwrap().protocol_status, 0);
    assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n");
    drop(client);
    fixture.end(); // drains: no request is in flight
}

#[test]
fn a_disconnect_cancels_the_work_for_the_client() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    client.send(&request(1, true, "GET", "/slow/600000", b"")).unwrap();
    client.send(&[record(GET_VALUES, 0, b"", 0)]).unwrap();
    assert_eq!(client.record().unwrap().kind, GET_VALUES_RESULT, "the request has been read");
    drop(client);
    fixture.end();
}

#[test]
fn a_head_that_is_too_large_gets_431_and_a_malformed_head_400() {
    let fixture = start(&["--max-params", "8K"]);
    let mut client = fixture.client();
    let long = pair("HTTP_X", &"x".repeat(9000));
    client
        .send(&[begin(1, 1, true), record(PARAMS, 1, &long, 0), record(PARAMS, 1, b"", 0), record(STDIN, 1, b"", 0)])
        .unwrap();
    assert_eq!(client.response(1).unwrap().status(), 431);
    let beyond = b"\x05\xff\xff\xff\xffHELLO";
    client
        .send(&[begin(1, 1, true), record(PARAMS, 1, beyond, 0), record(PARAMS, 1, b"", 0), record(STDIN, 1, b"", 0)])
        .unwrap();
    assert_eq!(client.response(1).unwrap().status(), 400);
    client.send(&[begin(1, 1, true), record(PARAMS, 1, b"", 0), record(STDIN, 1, b"", 0)]).unwrap();
    assert_eq!(client.response(1).unwrap().status(), 400, "a request without a method");
    assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n");
    drop(client);
    fixture.end();
}

#[test]
fn a_protocol_violation_closes_the_connection_cleanly() {
    let fixture = start(&[]);
    let mut version = begin(1, 1, true);
    version[0] = 2;
    for bytes in [
        version,
        record(BEGIN, 1, &[0; 4], 0),
        [begin(1, 1, true), begin(1, 1, true)].concat(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ] {
        let mut client = fixture.client();
        client.send(&[bytes]).unwrap();
        assert!(client.is_closed());
    }
    fixture.end();
}

#[test]
fn records_for_an_unknown_request_are_ignored() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    client
        .send(&[record(STDIN, 5, &[0; 65535], 255), record(PARAMS, 5, b"\x7f", 0), record(ABORT, 5, b"", 0)])
        .unwrap();
    client.send(&[record(42, 7, b"an application record of no known type", 0)]).unwrap();
    assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n");
    client.send(&[record(STDIN, 1, b"late", 0), record(STDIN, 1, b"", 0)]).unwrap();
    assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n");
    drop(client);
    fixture.end();
}

#[test]
fn a_response_sent_before_the_body_is_read_arrives_complete() {
    for keep in [true, false] {
        let fixture = start(&[]);
        let mut client = fixture.client();
        // /ok does not read the body. Part of the body is sent before the response arrives, and the remaining part afterwards.
        client.send(&head(1, keep, "POST", "/ok", Some(300_000))).unwrap();
        client.send(&[record(STDIN, 1, &[b'x'; 30_000], 0)]).unwrap();
        let response = client.response(1).unwrap();
        assert_eq!((response.status(), response.body()), (200, &b"ok\n"[..]));
        if keep {
            for _ in 0..9 {
                client.send(&[record(STDIN, 1, &[b'x'; 30_000], 0)]).unwrap();
            }
            client.send(&[record(STDIN, 1, b"", 0)]).unwrap();
            assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n");
        } else {
            assert!(client.is_closed());
        }
        drop(client);
        fixture.end();
    }
}

#[test]
fn a_response_continues_while_an_unread_body_arrives() {
    // Like Caddy, the client writes the whole request before it reads the first byte of the response.
    let fixture = start(&[]);
    let mut client = fixture.client();
    client.send(&head(1, true, "GET", "/bytes/4", Some(8 << 20))).unwrap();
    for _ in 0..256 {
        client.send(&[record(STDIN, 1, &[b'x'; 32 << 10], 0)]).unwrap();
    }
    client.send(&[record(STDIN, 1, b"", 0)]).unwrap();
    assert_eq!(client.response(1).unwrap().body().len(), 4 << 20);
    drop(client);
    fixture.end();
}

#[test]
fn a_short_response_overtakes_a_long_one() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    client.send(&request(1, true, "GET", "/bytes/64", b"")).unwrap();
    client.send(&request(2, true, "GET", "/ok", b"")).unwrap();
    let mut of_the_long_one = 0;
    loop {
        let record = client.record().unwrap();
        match (record.id, record.kind) {
            (1, STDOUT) => of_the_long_one += record.content.len(),
            (2, END) => break,
            (2, STDOUT) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(of_the_long_one < 32 << 20, "the short response arrived after {of_the_long_one} bytes of the long one");
    drop(client);
    fixture.end();
}

#[test]
fn a_body_sent_byte_by_byte_uses_little_memory() {
    let fixture = start(&[]);
    let worker = *fixture.server.workers().first().unwrap();
    let mut client = fixture.client();
    client.request("GET", "/ok", b"").unwrap();
    let before = common::status_number(worker, "VmHWM").unwrap();
    // Ten requests that never read their bodies. The server may buffer 64 KiB of each body, but not a multiple of that.
    for id in 1..=10 {
        client.send(&head(id, true, "GET", "/slow/600000", None)).unwrap();
        let byte = record(STDIN, id, b"x", 0);
        client.send(&vec![byte; 60_000]).unwrap();
    }
    client.send(&[record(GET_VALUES, 0, b"", 0)]).unwrap();
    assert_eq!(client.record().unwrap().kind, GET_VALUES_RESULT, "the server has read all records");
    let grown = common::status_number(worker, "VmHWM").unwrap() - before;
    assert!(grown < 4 << 10, "{grown} KiB");
    drop(client);
    fixture.end();
}

#[test]
fn a_body_beyond_the_limit_gets_413() {
    let fixture = start(&["--max-body", "1K"]);
    let mut client = fixture.client();
    assert_eq!(client.request("POST", "/echo", &[b'x'; 1025]).unwrap().status(), 413);
    // A body without a declared length.
    client.send(&head(1, true, "POST", "/count", None)).unwrap();
    client
        .send(&[record(STDIN, 1, &[b'x'; 1000], 0), record(STDIN, 1, &[b'x'; 25], 0), record(STDIN, 1, b"", 0)])
        .unwrap();
    assert_eq!(client.response(1).unwrap().status(), 413);
    assert_eq!(client.request("POST", "/echo", &[b'x'; 1024]).unwrap().body().len(), 1024);
    drop(client);
    fixture.end();
}

#[test]
fn a_response_to_head_has_the_length_and_no_body() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    let response = client.request("HEAD", "/ok", b"").unwrap();
    assert!(response.head().contains("content-length: 3"), "{}", response.head());
    assert_eq!(response.body(), b"");
    drop(client);
    fixture.end();
}

#[test]
fn an_abstract_socket_and_tcp_serve_alike() {
    let name = format!("fastcgi:unix:@forkyard-test-{}", std::process::id());
    let mut server = Server::start("hello", &["--bind", &name, "--bind", "fastcgi:127.0.0.1:0", "--workers", "1"]);
    let address = server.binds[1].clone();
    assert_eq!(Client::connect(&address).unwrap().request("GET", "/", b"").unwrap().body(), b"Hello, world\n");
    use std::os::linux::net::SocketAddrExt as _;
    let name = name.trim_start_matches("fastcgi:unix:@");
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
    let stream = UnixStream::connect_addr(&address).unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let mut client = Client { stream: Box::new(stream) };
    assert_eq!(client.request("GET", "/", b"").unwrap().body(), b"Hello, world\n");
    drop(client);
    server.stop();
}
