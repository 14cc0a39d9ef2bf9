//! The three roles of FastCGI (specification 1.0, section 6), the application status, and truncated uploads, with the example `roles`.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use common::fastcgi::{Client, DATA, Fixture, GET_VALUES, GET_VALUES_RESULT, PARAMS, STDIN, begin, head, pair, record};

const AUTHORIZER: u16 = 2;
const FILTER: u16 = 3;

fn start() -> Fixture {
    Fixture::start("roles", &[])
}

/// Returns the records of a request up to the end of its parameters.
fn ask(role: u16, keep: bool, target: &str, more: &[(&str, &str)]) -> Vec<Vec<u8>> {
    let mut params = vec![pair("REQUEST_METHOD", "GET"), pair("REQUEST_URI", target)];
    params.extend(more.iter().map(|(name, value)| pair(name, value)));
    vec![begin(1, role, keep), record(PARAMS, 1, &params.concat(), 5), record(PARAMS, 1, b"", 0)]
}

fn wait_until_read(client: &mut Client) {
    client.send(&[record(GET_VALUES, 0, b"", 0)]).unwrap();
    assert_eq!(client.record().unwrap().kind, GET_VALUES_RESULT);
}

#[test]
fn an_authorizer_responds_without_a_body() {
    let fixture = start();
    let mut client = fixture.client();
    for (keep, stdin) in [(true, false), (true, true), (false, false)] {
        if !keep {
            client = fixture.client();
        }
        // An authorizer request should have no length (6.3). If it has a length, the server does not wait for the body.
        for (target, status) in [("/?user=ann", 200), ("/", 403)] {
            client.send(&ask(AUTHORIZER, keep, target, &[("CONTENT_LENGTH", "12")])).unwrap();
            if stdin {
                client.send(&[record(STDIN, 1, b"", 0)]).unwrap();
            }
            let response = client.response(1).unwrap();
            assert_eq!(response.status(), status);
            assert_eq!(response.head().contains("Variable-REMOTE_USER: ann"), status == 200, "{}", response.head());
            if !keep {
                assert!(client.is_closed());
                client = fixture.client();
            }
        }
    }
    drop(client);
    fixture.end();
}

#[test]
fn a_filter_reads_the_file_that_follows_the_body() {
    let fixture = start();
    let mut client = fixture.client();
    let file = b"the file ".repeat(100_000);
    for body in [&b""[..], &[b'b'; 60_000], &[b'b'; 60_000]] {
        client.send(&ask(FILTER, true, "/", &[("FCGI_DATA_LENGTH", &file.len().to_string())])).unwrap();
        if !body.is_empty() {
            client.send(&[record(STDIN, 1, body, 7)]).unwrap();
        }
        client.send(&[record(STDIN, 1, b"", 0)]).unwrap();
        for piece in file.chunks(50_000) {
            client.send(&[record(DATA, 1, piece, 3)]).unwrap();
        }
        client.send(&[record(DATA, 1, b"", 1)]).unwrap();
        let response = client.response(1).unwrap();
        assert_eq!((response.status(), response.application_status), (200, 0));
        assert!(response.body() == file.to_ascii_uppercase());
    }
    drop(client);
    fixture.end();
}

#[test]
fn a_filter_may_ignore_the_file() {
    let fixture = start();
    let mut client = fixture.client();
    for _ in 0..2 {
        client.send(&ask(FILTER, true, "/cached", &[("FCGI_DATA_LENGTH", "1000000")])).unwrap();
        client.send(&[record(STDIN, 1, b"", 0)]).unwrap();
        assert_eq!(client.response(1).unwrap().body(), b"the file was not read\n");
        client.send(&vec![record(DATA, 1, &[b'x'; 50_000], 0); 20]).unwrap();
        client.send(&[record(DATA, 1, b"", 0)]).unwrap();
    }
    assert_eq!(client.request("POST", "/", b"12345").unwrap().body(), b"5 bytes\n");
    drop(client);
    fixture.end();
}

/// A function classified as quick runs on the event loop's thread, where it must not wait for the file.
#[test]
fn a_late_file_is_awaited_on_a_thread() {
    let fixture = start();
    let mut client = fixture.client();
    let file = [record(DATA, 1, b"abc", 0), record(DATA, 1, b"", 0)];
    let head = [ask(FILTER, true, "/", &[]), vec![record(STDIN, 1, b"", 0)]].concat();
    for _ in 0..200 {
        client.send(&[head.clone(), file.to_vec()].concat()).unwrap();
        assert_eq!(client.response(1).unwrap().body(), b"ABC");
    }
    for _ in 0..3 {
        client.send(&head).unwrap();
        wait_until_read(&mut client);
        client.send(&file).unwrap();
        assert_eq!(client.response(1).unwrap().body(), b"ABC");
    }
    drop(client);
    fixture.end();
}

#[test]
fn a_truncated_file_is_an_error_and_sets_the_application_status() {
    let fixture = start();
    let mut client = fixture.client();
    client.send(&ask(FILTER, true, "/", &[("FCGI_DATA_LENGTH", "4")])).unwrap();
    client.send(&[record(STDIN, 1, b"", 0), record(DATA, 1, b"abc", 0), record(DATA, 1, b"", 0)]).unwrap();
    let response = client.response(1).unwrap();
    assert_eq!((response.status(), response.application_status, response.protocol_status), (400, 1, 0));
    drop(client);
    fixture.end();
}

#[test]
fn an_upload_shorter_than_declared_is_an_error() {
    let fixture = start();
    let mut client = fixture.client();
    client.send(&head(1, true, "POST", "/", Some(10))).unwrap();
    client.send(&[record(STDIN, 1, b"12345", 0), record(STDIN, 1, b"", 0)]).unwrap();
    let response = client.response(1).unwrap();
    assert_eq!((response.status(), response.application_status), (400, 1));
    // A body that is longer than declared is used as it is, because the web server may have decompressed it.
    client.send(&head(1, true, "POST", "/", Some(2))).unwrap();
    client.send(&[record(STDIN, 1, b"12345", 0), record(STDIN, 1, b"", 0)]).unwrap();
    assert_eq!(client.response(1).unwrap().body(), b"5 bytes\n");
    drop(client);
    fixture.end();
}

/// When the client disconnects, Apache, Caddy, and nginx without request buffering close the connection without ending STDIN. The end of
/// the connection must not be treated as the end of the body.
#[test]
fn a_truncated_upload_is_an_error_for_its_reader() {
    for length in [None, Some(1_000_000)] {
        let mut fixture = start();
        let mut client = fixture.client();
        client.send(&head(1, true, "POST", "/", length)).unwrap();
        client.send(&vec![record(STDIN, 1, &[b'x'; 50_000], 0); 10]).unwrap();
        wait_until_read(&mut client); // more than a pipe holds, so the application is reading
        drop(client);
        fixture.server.wait_for("the client disconnected before the body was complete");
        fixture.end();
    }
}

/// Overload is reported by an HTTP status, which web servers understand, and never by OVERLOADED or CANT_MPX_CONN (5.5).
#[test]
fn overload_gets_503_with_retry_after() {
    let fixture = Fixture::start("roles", &["--threads", "1", "--queue", "1"]);
    let mut client = fixture.client();
    // One request occupies the thread and waits for the remaining part of its body; the other request waits for the thread.
    client.send(&head(1, true, "POST", "/", None)).unwrap();
    client.send(&vec![record(STDIN, 1, &[b'x'; 50_000], 0); 10]).unwrap();
    wait_until_read(&mut client);
    client.send(&head(2, true, "POST", "/", Some(1))).unwrap();
    for id in [3, 4] {
        client.send(&head(id, true, "POST", "/", Some(1))).unwrap();
        let refused = client.response(id).unwrap();
        assert_eq!((refused.status(), refused.protocol_status), (503, 0));
        assert!(refused.head().contains("\r\nretry-after: "), "{}", refused.head());
    }
    client.send(&[record(STDIN, 1, b"", 0)]).unwrap();
    assert_eq!(client.response(1).unwrap().body(), b"500000 bytes\n");
    client.send(&[record(STDIN, 2, b"x", 0), record(STDIN, 2, b"", 0)]).unwrap();
    assert_eq!(client.response(2).unwrap().body(), b"1 bytes\n");
    drop(client);
    fixture.end();
}
