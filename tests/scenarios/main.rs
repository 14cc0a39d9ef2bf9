//! Sends one table of requests over each protocol, directly and behind each web server in each configuration of docs/web-servers.md.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code outside of test functions")]

mod ask;
mod capture;
mod cgi;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/fronts/mod.rs"]
mod fronts;
mod http;
mod http2;
mod table;

use std::fmt;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ask::{Ask, Gate, Reply};
use common::Server;
use fronts::{Front, Link, Site, WebServer};
use table::{Content, Expect, Row, rows};

/// The servers and protocols between the client and the application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// No server: the client uses this protocol to connect to the application.
    Direct(Protocol),
    Behind(Front),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    FastCgi,
    FastCgiKept,
    Http,
    Http2,
    Scgi,
    Cgi,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct(protocol) => write!(f, "{protocol:?}"),
            Self::Behind(front) => write!(f, "{front}"),
        }
    }
}

impl Way {
    fn is_direct(self) -> bool {
        matches!(self, Self::Direct(_))
    }

    /// Returns whether the application is reached over HTTP.
    fn is_http(self) -> bool {
        match self {
            Self::Direct(protocol) => matches!(protocol, Protocol::Http | Protocol::Http2),
            Self::Behind(front) => front.link == Link::Http,
        }
    }

    fn is_behind(self, server: WebServer) -> bool {
        matches!(self, Self::Behind(front) if front.server == server)
    }

    /// Returns whether the application is behind this web server, over a protocol with CGI variables.
    fn is_cgi_of(self, server: WebServer) -> bool {
        self.is_behind(server) && !self.is_http()
    }

    fn is_http_of(self, server: WebServer) -> bool {
        self.is_behind(server) && self.is_http()
    }

    fn is_http2(self) -> bool {
        self == Self::Direct(Protocol::Http2)
    }

    fn is_fcgid(self) -> bool {
        self == Self::Behind(fronts::APACHE_FCGID)
    }

    /// Returns whether the application is behind Apache's mod_proxy, over FastCGI or SCGI.
    fn is_apache_proxy_cgi(self) -> bool {
        self.is_apache_proxy_fastcgi() || self == Self::Behind(fronts::APACHE_SCGI)
    }

    /// Returns whether the application is behind an Apache module that does not determine the length of a chunked body, and leaves the
    /// length of a response to Apache.
    fn is_apache_scgi_or_cgi(self) -> bool {
        self == Self::Behind(fronts::APACHE_SCGI) || self == Self::Behind(fronts::APACHE_CGI)
    }

    fn is_apache_proxy_fastcgi(self) -> bool {
        self == Self::Behind(fronts::APACHE) || self == Self::Behind(fronts::APACHE_KEPT)
    }
}

/// The processes that run during a test.
enum Running {
    Alone(#[expect(dead_code, reason = "held only to be dropped")] Server),
    Behind(#[expect(dead_code, reason = "held only to be dropped")] Site),
    ForEachRequest,
}

/// The address of the application or of the web server, for clients.
struct Address {
    protocol: Protocol,
    /// `HOST:PORT`, or the path of a socket.
    at: String,
}

fn start(way: Way) -> (Running, Address) {
    let protocol = match way {
        Way::Behind(front) => {
            let site = Site::start(front, "scenarios");
            let at = site.address.clone();
            return (Running::Behind(site), Address { protocol: Protocol::Http, at });
        }
        Way::Direct(protocol) => protocol,
    };
    let bind = match protocol {
        Protocol::Cgi => return (Running::ForEachRequest, Address { protocol, at: String::new() }),
        Protocol::Scgi => "scgi:127.0.0.1:0",
        Protocol::Http | Protocol::Http2 => "http:127.0.0.1:0",
        Protocol::FastCgi | Protocol::FastCgiKept => "fastcgi:127.0.0.1:0",
    };
    let server = Server::start("scenarios", &["--workers", "2", "--bind", bind]);
    let at = if way.is_http() { server.http() } else { server.binds[0].clone() };
    (Running::Alone(server), Address { protocol, at })
}

impl Address {
    fn connect(&self) -> io::Result<Connection> {
        Ok(match self.protocol {
            Protocol::Http2 => Connection::Http2(http2::Connection::open(&self.at)?),
            Protocol::Http => Connection::Http(http::Connection::open(&self.at)?),
            Protocol::Scgi => Connection::Scgi(cgi::Scgi::open(&self.at)?),
            Protocol::Cgi => Connection::Cgi,
            protocol => Connection::FastCgi(cgi::FastCgi::open(&self.at)?, protocol == Protocol::FastCgiKept),
        })
    }
}

enum Connection {
    Http(http::Connection),
    Http2(http2::Connection),
    /// A FastCGI connection, and whether to keep it open.
    FastCgi(cgi::FastCgi, bool),
    Scgi(cgi::Scgi),
    Cgi,
}

impl Connection {
    /// Sends the request. Returns the response, and the connection if it can be reused.
    fn ask(self, ask: &Ask, gate: &mut Gate) -> io::Result<(Reply, Option<Self>)> {
        Ok(match self {
            Self::Http(connection) => {
                let (reply, connection) = connection.ask(ask, gate)?;
                (reply, connection.map(Self::Http))
            }
            Self::Http2(connection) => {
                let (reply, connection) = connection.ask(ask, gate)?;
                (reply, connection.map(Self::Http2))
            }
            Self::Scgi(connection) => (connection.ask(ask, gate)?, None),
            Self::Cgi => (cgi::call(ask, gate)?, None),
            Self::FastCgi(connection, keep) => {
                let (reply, connection) = connection.ask(ask, gate, keep)?;
                (reply, connection.map(|connection| Self::FastCgi(connection, keep)))
            }
        })
    }
}

/// Sends one row. Returns the mismatches, and the connection if it can be reused.
fn check(
    way: Way,
    row: &Row,
    expect: &Expect,
    connection: io::Result<Connection>,
) -> (Option<String>, Option<Connection>) {
    let mut ask = row.ask.clone();
    let mut gate = Gate::of(&mut ask);
    let answer = std::thread::scope(|scope| {
        let gate = if expect.streams {
            &mut gate
        } else {
            let mut early = std::mem::replace(&mut gate, Gate::none());
            scope.spawn(move || early.open());
            &mut gate
        };
        connection?.ask(&ask, gate)
    });
    match answer {
        Ok((reply, connection)) => {
            (expect.miss(&reply).or_else(|| broken_rule(way, &ask, &reply)), connection.filter(|_| !expect.is_last))
        }
        Err(error) => (Some(error.to_string()), None),
    }
}

/// Returns the rule that a response violates, if any. Every response that comes directly from Forkyard must follow these rules, whatever
/// the application has produced (`docs/http.md`).
fn broken_rule(way: Way, ask: &Ask, reply: &Reply) -> Option<String> {
    let Way::Direct(protocol) = way else { return None };
    let has = |name: &str| !reply.all(name).is_empty();
    let is_http1 = protocol == Protocol::Http;
    let broken = [
        (
            "the response has a body",
            reply.body.length > 0 && (ask.method == "HEAD" || matches!(reply.status, 204 | 205 | 304)),
        ),
        (
            "the response has a length, although it may not have a body",
            matches!(reply.status, 204 | 304) && has("content-length"),
        ),
        ("204 has a coding", reply.status == 204 && has("transfer-encoding")),
        ("there are several lengths", reply.all("content-length").len() > 1),
        ("the response has both a length and chunks", has("content-length") && has("transfer-encoding")),
        (
            "there is a transfer coding other than chunked",
            is_http1 && reply.all("transfer-encoding").iter().any(|coding| *coding != b"chunked"),
        ),
        ("the number of Date headers is not one", way.is_http() && reply.all("date").len() != 1),
        (
            "there is a header that belongs to an HTTP/1 connection",
            !is_http1
                && ["connection", "transfer-encoding", "upgrade", "keep-alive", "proxy-connection", "te", "x-hop"]
                    .into_iter()
                    .any(has),
        ),
        ("there is a header that the web server controls", !way.is_http() && has("trailer")),
    ];
    broken.iter().find(|(_, is_so)| *is_so).map(|(what, _)| format!("{what}: {:?}", reply.headers))
}

impl Expect {
    /// Returns the difference between a response and the expected response.
    fn miss(&self, reply: &Reply) -> Option<String> {
        let text = String::from_utf8_lossy(&reply.body.bytes[..reply.body.bytes.len().min(200)]);
        if !self.statuses.contains(&reply.status) {
            return Some(format!("the status is {} and not {:?}: {text:?}", reply.status, self.statuses));
        }
        for (name, values) in &self.headers {
            if reply.all(name) != *values {
                return Some(reply.shown(name));
            }
        }
        let body = &reply.body;
        let right = match &self.body {
            Content::Is(bytes) if body.is_all_x => {
                bytes.len() as u64 == body.length && bytes.iter().all(|&b| b == b'x')
            }
            Content::Is(bytes) => *bytes == body.bytes,
            Content::Xs(length) => body.is_all_x && body.length == *length,
            Content::Any => true,
        };
        (!right).then(|| format!("the body of {} bytes is not the right one: {text:?}", body.length))
    }
}

/// Sends each row on its own connection. Then sends the small rows on one connection, which the client reuses as long as possible.
fn scenarios(way: Way) {
    let (_running, address) = start(way);
    let mut rows = rows();
    if let Ok(part) = std::env::var("SCENARIO_ROWS") {
        rows.retain(|row| row.name.contains(&part));
        assert!(!rows.is_empty(), "no row has {part:?} in its name");
    }
    let scale = std::env::var("FORKYARD_SCALE").ok().and_then(|percent| percent.parse().ok()).unwrap_or(100);
    let mut asked: Vec<(&Row, &Expect)> = Vec::new();
    for row in &rows {
        if row.takes_long() && fastrand::u32(0..100) >= scale {
            eprintln!("not sent over {way} in this run: {}", row.name);
            continue;
        }
        match row.expected(way) {
            Ok(expect) => asked.push((row, expect)),
            Err(why) => eprintln!("not sent over {way}: {}: {why}", row.name),
        }
    }
    let rows = asked;
    let failures = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some((row, expect)) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let (Some(miss), _) = check(way, row, expect, address.connect()) {
                        failures.lock().unwrap().push(format!("{}: {miss}", row.name));
                    }
                }
            });
        }
    });
    let mut kept = None;
    for (row, expect) in rows.iter().filter(|(row, _)| row.is_small()) {
        let connection = kept.take().map_or_else(|| address.connect(), Ok);
        let miss;
        (miss, kept) = check(way, row, expect, connection);
        if let Some(miss) = miss {
            failures.lock().unwrap().push(format!("{}, on a kept connection: {miss}", row.name));
        }
    }
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} failures over {way}:\n{}", failures.len(), failures.join("\n"));
}

macro_rules! ways {
    ($($name:ident $way:expr;)*) => {
        $(#[test]
        fn $name() {
            scenarios($way);
        })*
    };
}

ways! {
    fastcgi Way::Direct(Protocol::FastCgi);
    fastcgi_kept Way::Direct(Protocol::FastCgiKept);
    http_ Way::Direct(Protocol::Http);
    http_2 Way::Direct(Protocol::Http2);
    scgi Way::Direct(Protocol::Scgi);
    cgi_ Way::Direct(Protocol::Cgi);
    behind_nginx_scgi Way::Behind(fronts::NGINX_SCGI);
    behind_lighttpd_scgi Way::Behind(fronts::LIGHTTPD_SCGI);
    behind_lighttpd_cgi Way::Behind(fronts::LIGHTTPD_CGI);
    behind_apache_scgi Way::Behind(fronts::APACHE_SCGI);
    behind_apache_cgi Way::Behind(fronts::APACHE_CGI);
    behind_nginx Way::Behind(fronts::NGINX);
    behind_nginx_kept Way::Behind(fronts::NGINX_KEPT);
    behind_nginx_http Way::Behind(fronts::NGINX_HTTP);
    behind_lighttpd Way::Behind(fronts::LIGHTTPD);
    behind_lighttpd_that_starts_us Way::Behind(fronts::LIGHTTPD_STARTED);
    behind_lighttpd_http Way::Behind(fronts::LIGHTTPD_HTTP);
    behind_apache Way::Behind(fronts::APACHE);
    behind_apache_kept Way::Behind(fronts::APACHE_KEPT);
    behind_apache_fcgid Way::Behind(fronts::APACHE_FCGID);
    behind_apache_http Way::Behind(fronts::APACHE_HTTP);
    behind_haproxy Way::Behind(fronts::HAPROXY);
    behind_haproxy_multiplexed Way::Behind(fronts::HAPROXY_MULTIPLEXED);
    behind_haproxy_http Way::Behind(fronts::HAPROXY_HTTP);
    behind_caddy Way::Behind(fronts::CADDY);
    behind_caddy_http Way::Behind(fronts::CADDY_HTTP);
}
