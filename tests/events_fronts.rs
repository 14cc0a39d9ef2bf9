//! Event streams through real web servers, with the configurations of docs/web-servers.md. A published event arrives while the stream stays
//! open, a client that reconnects resumes where it left off, and the application detects a client's disconnection.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code outside of test functions")]

mod common;
#[path = "common/fronts/mod.rs"]
mod fronts;

use std::io::Write as _;

use common::http::{self, Client};
use common::sse::{Source, Way};
use common::{Server, wait_until};
use fronts::{Front, Site};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Keep-alive comments are frequent, because some web servers detect a client's disconnection only when they have data to send to the
/// client.
const TARGET: &str = "/events?topics=news&keep_alive_ms=200";

fn open(site: &Site, last_id: &str) -> Source {
    let source = Source::open(Way::Http, &format!("http://{}", site.address), TARGET, last_id);
    source.unwrap_or_else(|error| panic!("no stream: {error}"))
}

fn publish(site: &Site, data: &str) {
    let answer = http::post(&site.address, "/publish/news", data.as_bytes()).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// Returns the number of event streams that the workers serve. The number of served requests cannot be used, because it starts at zero in a
/// worker that replaces a dead one.
fn open_streams(server: &Server) -> u32 {
    let board = server.segment().scoreboard();
    (0..board.rows()).filter_map(|slot| board.read(slot)).map(|row| row.streams).sum()
}

/// Disconnects the client, and waits until the application has detected the disconnection.
fn leave(site: &mut Site, source: Source) {
    let server = site.application();
    wait_until("the stream is counted", || (open_streams(server) > 0).then_some(()));
    drop(source);
    wait_until("the application has detected the disconnect", || (open_streams(server) == 0).then_some(()));
}

fn streams(front: Front) {
    let mut site = Site::start(front, "stream");
    let mut source = open(&site, "");
    assert!(source.head.contains("content-type: text/event-stream\n"), "{:?}", source.head);
    // Each event arrives before the next is published.
    for number in 1..=5_u64 {
        publish(&site, "now");
        let event = source.next();
        assert_eq!((event.number(), event.data.as_str()), (number, "now"));
    }
    let last_id = source.last_id.clone();
    leave(&mut site, source);

    publish(&site, "meanwhile");
    let mut source = open(&site, &last_id);
    assert_eq!(source.next().number(), 6);

    let mut client = Client::connect(&site.address).unwrap();
    let ask = format!("GET /events?topics=news HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nLast-Event-ID: {last_id}\r\n\r\n");
    client.stream.get_mut().write_all(ask.as_bytes()).unwrap();
    assert!(
        client.response(false).unwrap().text().ends_with("-6\ndata: meanwhile\n\n"),
        "a polling client receives the event immediately"
    );

    // However the web server reports the end of the stream to the client, another worker resumes the stream.
    for worker in site.application().workers() {
        kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    }
    let end = source.event();
    assert!(!matches!(end, Ok(Some(_))), "{end:?}");
    let mut source = wait_until("a new worker serves the stream", || {
        Source::open(Way::Http, &format!("http://{}", site.address), TARGET, &source.last_id).ok()
    });
    publish(&site, "again");
    assert_eq!(source.next().number(), 7);
    leave(&mut site, source);
    site.application().stop();
}

macro_rules! through {
    ($($name:ident $front:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                streams(fronts::$front);
            }
        )*
    };
}

through! {
    nginx NGINX, nginx_kept NGINX_KEPT, nginx_http NGINX_HTTP, nginx_scgi NGINX_SCGI,
    lighttpd LIGHTTPD_EVENTS, lighttpd_http LIGHTTPD_HTTP_EVENTS, lighttpd_scgi LIGHTTPD_SCGI_EVENTS,
    apache APACHE_EVENTS, apache_http APACHE_HTTP, apache_scgi APACHE_SCGI,
    haproxy HAPROXY_EVENTS, haproxy_http HAPROXY_HTTP,
    caddy CADDY, caddy_http CADDY_HTTP,
}
