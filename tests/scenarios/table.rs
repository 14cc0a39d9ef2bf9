//! The table of requests and expected responses, for every path between the client and the application. Where a web server is known to
//! behave differently, the row gives the difference and the reason.

use std::sync::Arc;

use super::Way;
use super::ask::{Ask, Pace, Sent};
use super::fronts::{APACHE_CGI, NGINX_SCGI, WebServer};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Length that is large enough to fill every buffer between the client and the application.
const HUGE: usize = 24 * MIB;
/// Length that exceeds a 32-bit counter.
const BEYOND_32_BITS: u64 = (4 << 30) + 1;

pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) ask: Ask,
    pub(crate) expect: Expect,
    differences: Vec<Difference>,
}

/// An expectation that applies to only some of the paths.
struct Difference {
    at: fn(Way) -> bool,
    why: &'static str,
    /// The expectation, or `None` if the row is not sent.
    expect: Option<Expect>,
}

#[derive(Clone, Debug)]
pub(crate) struct Expect {
    pub(crate) statuses: &'static [u16],
    pub(crate) body: Content,
    /// Values of headers, in order. An empty list means that the header must be absent.
    pub(crate) headers: Vec<(&'static str, Vec<&'static [u8]>)>,
    /// Whether the first bytes of the response must arrive before the application has produced the last bytes.
    pub(crate) streams: bool,
    /// Whether the client must not reuse the connection.
    pub(crate) is_last: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Content {
    Is(Vec<u8>),
    /// This many bytes `x`.
    Xs(u64),
    /// Any content, such as an error page of the web server.
    Any,
}

impl Row {
    /// Returns the expectation for `way`.
    ///
    /// # Errors
    /// Returns the reason why the row is not sent over this path.
    pub(crate) fn expected(&self, way: Way) -> Result<&Expect, &'static str> {
        match self.differences.iter().find(|difference| (difference.at)(way)) {
            Some(difference) => difference.expect.as_ref().ok_or(difference.why),
            None => Ok(&self.expect),
        }
    }

    /// Returns whether the row is small enough to be sent a second time.
    pub(crate) fn is_small(&self) -> bool {
        let large = matches!(self.expect.body, Content::Xs(length) if length > MIB as u64);
        self.ask.body.bytes().len() <= MIB && !large && self.ask.pace == Pace::Even
    }

    /// Returns whether the row takes several seconds. Repeated runs send such a row only sometimes (`FORKYARD_SCALE`).
    pub(crate) fn takes_long(&self) -> bool {
        matches!(self.expect.body, Content::Xs(BEYOND_32_BITS))
    }

    fn but(mut self, at: fn(Way) -> bool, why: &'static str, expect: Expect) -> Self {
        self.differences.push(Difference { at, why, expect: Some(expect) });
        self
    }

    fn not_asked(mut self, at: fn(Way) -> bool, why: &'static str) -> Self {
        self.differences.push(Difference { at, why, expect: None });
        self
    }
}

impl Ask {
    fn with(mut self, name: &'static str, value: &'static [u8]) -> Self {
        self.headers.push((name, value));
        self
    }

    fn sending(mut self, bytes: &[u8]) -> Self {
        self.body = Sent::Known(bytes.into());
        self
    }

    fn in_chunks(mut self, bytes: &[u8]) -> Self {
        self.body = Sent::Chunked(bytes.into());
        self
    }

    fn at(mut self, pace: Pace) -> Self {
        self.pace = pace;
        self
    }

    fn over_tls(mut self) -> Self {
        self.is_tls = true;
        self
    }
}

impl Expect {
    fn with(mut self, name: &'static str, values: &[&'static [u8]]) -> Self {
        self.headers.push((name, values.to_vec()));
        self
    }

    fn last(mut self) -> Self {
        self.is_last = true;
        self
    }

    fn streaming(mut self) -> Self {
        self.streams = true;
        self
    }
}

fn row(name: &'static str, ask: Ask, expect: Expect) -> Row {
    Row { name, ask, expect, differences: Vec::new() }
}

fn ask(method: &'static str, target: &str) -> Ask {
    let target = target.to_owned();
    Ask { method, target, headers: Vec::new(), body: Sent::Nothing, pace: Pace::Even, is_tls: false }
}

fn get(target: &str) -> Ask {
    ask("GET", target)
}

fn post(target: &str) -> Ask {
    ask("POST", target)
}

fn body(bytes: impl AsRef<[u8]>) -> Expect {
    Expect {
        statuses: &[200],
        body: Content::Is(bytes.as_ref().to_vec()),
        headers: Vec::new(),
        streams: false,
        is_last: false,
    }
}

fn xs(length: usize) -> Expect {
    Expect { body: Content::Xs(length as u64), ..body("") }
}

/// Expects one of these statuses from the application, with this body.
fn status(statuses: &'static [u16], bytes: &str) -> Expect {
    Expect { statuses, ..body(bytes) }
}

/// Expects one of these statuses, from the application or from a web server.
fn refused(statuses: &'static [u16]) -> Expect {
    Expect { statuses, body: Content::Any, ..body("") }
}

/// Expects the response of `/sum` for a body.
fn sum(bytes: &[u8]) -> Expect {
    let sum = bytes.iter().fold(0_u64, |sum, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    body(format!("{} {sum:016x}\n", bytes.len()))
}

/// Returns random bytes, so that no slice of sufficient length occurs twice.
fn some_bytes(length: usize) -> Arc<[u8]> {
    let mut random = fastrand::Rng::with_seed(7);
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

pub(crate) fn rows() -> Vec<Row> {
    [
        methods(),
        targets(),
        request_headers(),
        statuses(),
        response_headers(),
        semantics(),
        uploads(),
        downloads(),
        paces(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn methods() -> Vec<Row> {
    vec![
        row("GET", get("/method"), body("GET").with("content-length", &[b"3"]))
            .but(Way::is_apache_scgi_or_cgi, "Apache computes the length itself if it has the whole body", body("GET"))
            .but(
                Way::is_apache_proxy_fastcgi,
                "mod_proxy drops the length in a CGI response, and sends chunks",
                body("GET").with("content-length", &[]),
            ),
        row("HEAD has the length and no body", ask("HEAD", "/method"), body("").with("content-length", &[b"4"]))
            .but(Way::is_apache_scgi_or_cgi, "Apache computes the length itself if it has the whole body", body(""))
            .but(
                Way::is_apache_proxy_cgi,
                "mod_proxy drops the length in a CGI response, and sends chunks",
                body("").with("content-length", &[]),
            ),
        row("HEAD of a huge body", ask("HEAD", "/bytes/67108864"), body("")),
        row("HEAD of a stream has no length", ask("HEAD", "/stream/5"), body("").with("content-length", &[])),
        row("POST without a body", post("/method").sending(b""), body("POST")),
        row("PUT", ask("PUT", "/method").sending(b"body"), body("PUT")),
        row("PATCH", ask("PATCH", "/method").sending(b"body"), body("PATCH")),
        row("DELETE", ask("DELETE", "/method"), body("DELETE")),
        row("OPTIONS", ask("OPTIONS", "/method"), body("OPTIONS")),
        row("a method of an extension", ask("PROPFIND", "/method"), body("PROPFIND")),
        row("an unknown method", ask("BREW", "/method"), body("BREW")).but(
            |way| way.is_behind(WebServer::Lighttpd),
            "lighttpd accepts only the methods in its list",
            refused(&[501]),
        ),
    ]
}

fn targets() -> Vec<Row> {
    vec![
        row("a query", get("/target/a?b=1&c=%26&d"), body("/target/a?b=1&c=%26&d")),
        row("an empty query", get("/target/a?"), body("/target/a?")),
        row("percent-encoding stays as it is", get("/target/a%20b%c3%A9/~c"), body("/target/a%20b%c3%A9/~c")).but(
            |way| way.is_http_of(WebServer::Lighttpd),
            "mod_proxy passes on the path that lighttpd has normalized",
            body("/target/a%20b%C3%A9/~c"),
        ),
        row("an encoded slash", get("/target/a%2Fb"), body("/target/a%2Fb")).but(
            |way| way.is_http_of(WebServer::Lighttpd),
            "mod_proxy passes on the path that lighttpd has normalized",
            body("/target/a/b"),
        ),
        row("an encoded percent sign", get("/target/100%25"), body("/target/100%25")).but(
            Way::is_apache_proxy_cgi,
            "Apache rejects this for an unknown reason",
            refused(&[400]),
        ),
        row("the path in CGI is decoded", get("/path/a%20b%C3%A9?c"), body("/path/a b\u{e9}"))
            .but(
                |way| way == Way::Behind(NGINX_SCGI),
                "nginx's scgi_params contain neither SCRIPT_NAME nor PATH_INFO",
                body(""),
            )
            .but(Way::is_http, "HTTP has no decoded path", body("/path/a%20b%C3%A9")),
    ]
}

fn request_headers() -> Vec<Row> {
    vec![
        row("a header", get("/header/x-some").with("X-Some", b"some thing"), body("some thing")),
        row("an empty header", get("/header/x-none").with("X-None", b""), body("")),
        row("a header twice", get("/header/x-twice").with("X-Twice", b"one").with("X-Twice", b"two"), body("one, two")),
        row("Cookie twice", get("/header/cookie").with("Cookie", b"a=1").with("Cookie", b"b=2"), body("a=1; b=2")).but(
            |way| way.is_behind(WebServer::Apache) || way.is_cgi_of(WebServer::Caddy),
            "these web servers join cookies like other headers",
            body("a=1, b=2"),
        ),
        row(
            "bytes that are not ASCII",
            get("/header/x-odd").with("X-Odd", b"caf\xe9 \x80\xff"),
            body(b"caf\xe9 \x80\xff"),
        ),
        row("a head of nearly 4 KiB", get("/header/x-long").with("X-Long", &[b'v'; 3900]), body([b'v'; 3900])),
        row(
            "Content-Type",
            post("/header/content-type").with("Content-Type", b"text/x; a=b").sending(b"1"),
            body("text/x; a=b"),
        ),
        row("Content-Length", post("/header/content-length").sending(b"12345"), body("5")),
        row("Proxy is not for the application", get("/header/proxy").with("Proxy", b"http://evil"), body(""))
            .but(|way| way.is_http_of(WebServer::Lighttpd), "lighttpd always removes the header", body(""))
            .but(Way::is_http, "only CGI turns the header into a variable that libraries trust", body("http://evil")),
        row("HTTPS is not on", get("/variable/HTTPS"), body("(none)")),
        row("HTTPS is on", get("/variable/HTTPS").over_tls(), body("on"))
            .not_asked(|way| !way.is_direct() || way.is_http(), "only the web server determines whether TLS is used"),
    ]
}

fn statuses() -> Vec<Row> {
    vec![
        row("200 with an empty body", get("/empty"), body("").with("content-length", &[b"0"])).but(
            Way::is_apache_scgi_or_cgi,
            "Apache may omit a length of 0",
            body(""),
        ),
        row("204", get("/status/204"), status(&[204], "").with("content-length", &[])),
        row("204 to a POST", post("/status/204").sending(b"body"), status(&[204], "")),
        row(
            "304",
            get("/not-modified").with("If-None-Match", b"\"v1\""),
            status(&[304], "").with("etag", &[b"\"v1\""]).with("cache-control", &[b"max-age=60"]),
        ),
        row("201", get("/status/201"), status(&[201], "201\n")),
        row("299, which has no name", get("/status/299"), status(&[299], "299\n")),
        row("400", get("/status/400"), status(&[400], "400\n")),
        row("401", get("/status/401"), status(&[401], "401\n")),
        row("404", get("/status/404"), status(&[404], "404\n")),
        row("418", get("/status/418"), status(&[418], "418\n")),
        row("499, which has no name", get("/status/499"), status(&[499], "499\n")),
        row("500", get("/status/500"), status(&[500], "500\n")),
        row("503", get("/status/503"), status(&[503], "503\n")),
        row("599, which has no name", get("/status/599"), status(&[599], "599\n")),
        row("103 is not a final response", get("/status/103"), status(&[500], "500 Internal Server Error\n")),
        row("a redirection", get("/redirect"), status(&[303], "").with("location", &[b"/there?a=%20b"])),
    ]
}

fn response_headers() -> Vec<Row> {
    vec![
        row(
            "Set-Cookie twice, and another header twice",
            get("/repeat"),
            body("repeated\n")
                .with("set-cookie", &[b"a=1; Path=/", b"b=2; HttpOnly"])
                .with("x-repeated", &[b"one", b"two"]),
        )
        .but(
            |way| way.is_cgi_of(WebServer::Apache),
            "Apache joins repeated headers from CGI, except Set-Cookie",
            body("repeated\n")
                .with("set-cookie", &[b"a=1; Path=/", b"b=2; HttpOnly"])
                .with("x-repeated", &[b"one, two"]),
        ),
        row("bytes that are not ASCII in a response", get("/odd"), body("odd\n").with("x-odd", &[b"caf\xe9 \x80\xff"])),
        row("a head of nearly 4 KiB in a response", get("/long/3900"), body("long\n").with("x-long", &[&[b'v'; 3900]])),
    ]
}

/// Requirements of RFC 9110, 9112, 9113 and 3875 that apply to any application. `/raw/STATUS?HEADERS` returns a body of 5 bytes and these
/// headers, whatever the method and the status. `/raw-stream` returns the same response without a length.
fn semantics() -> Vec<Row> {
    let direct = "the row checks what Forkyard sends, not what a web server makes of it";
    let rows = lengths_and_codings().into_iter().chain(headers_and_targets());
    rows.map(|row| row.not_asked(|way| !way.is_direct(), direct)).collect()
}

fn lengths_and_codings() -> Vec<Row> {
    vec![
        row("HEAD has the length of GET", ask("HEAD", "/raw/200"), body("").with("content-length", &[b"5"])),
        row(
            "HEAD keeps the application's length",
            ask("HEAD", "/raw/200?content-length=1234"),
            body("").with("content-length", &[b"1234"]),
        ),
        row("HEAD of unknown length", ask("HEAD", "/raw-stream/200"), body("").with("content-length", &[])),
        row(
            "HEAD of an empty body keeps the application's length",
            ask("HEAD", "/bytes/0"),
            body("").with("content-length", &[b"0"]),
        ),
        row(
            "HEAD with an invalid length",
            ask("HEAD", "/raw/200?content-length=x"),
            body("").with("content-length", &[b"5"]),
        ),
        row("HEAD of an error", ask("HEAD", "/raw/404"), status(&[404], "").with("content-length", &[b"5"])),
        row(
            "HEAD beyond a limit",
            ask("HEAD", &format!("/{}", "x".repeat(17_000))),
            status(&[414], "").with("content-length", &[b"17"]),
        ),
        row(
            "204 with a body, a length and a coding",
            get("/raw/204?content-length=5&transfer-encoding=chunked"),
            status(&[204], ""),
        ),
        row("205 with a body", get("/raw/205"), status(&[205], "").with("content-length", &[b"0"])),
        row("205 with a stream", get("/raw-stream/205"), status(&[205], "").with("content-length", &[b"0"])),
        row(
            "304 with a body and a length",
            get("/raw/304?content-length=5&etag=v"),
            status(&[304], "").with("etag", &[b"v"]),
        ),
        row(
            "a coding from the application",
            get("/raw/200?transfer-encoding=gzip&content-length=5"),
            body("body\n").with("content-length", &[b"5"]).with("transfer-encoding", &[]),
        ),
        row("chunks from the application", get("/raw-stream/200?transfer-encoding=chunked"), body("body\n")),
        row(
            "a body longer than its length is truncated",
            get("/raw/200?content-length=3"),
            body("bod").with("content-length", &[b"3"]),
        ),
        row(
            "two lengths are discarded",
            get("/raw/200?content-length=5&content-length=6"),
            body("body\n").with("content-length", &[b"5"]),
        ),
    ]
}

fn headers_and_targets() -> Vec<Row> {
    let no_url = |way: Way| way.is_http2();
    let in_variables = |way: Way| way.is_direct() && !way.is_http();
    vec![
        row(
            "headers of one connection",
            get("/raw/200?connection=x-hop&x-hop=1&keep-alive=5&proxy-connection=x&upgrade=h2c&trailer=x&te=x&x-end=1"),
            body("body\n").with("x-end", &[b"1"]),
        ),
        row(
            "CR and LF are in no header",
            get("/raw/200?x-a=a%0d%0ax-b:b"),
            status(&[500], "no header has such a value\n"),
        ),
        row("NUL is in no header", get("/raw/200?x-a=a%00b"), status(&[500], "no header has such a value\n")),
        row("an underscore in a header's name", get("/header/x_under").with("X_Under", b"v"), body("v")).but(
            in_variables,
            "in a variable's name, an underscore stands for a hyphen",
            body(""),
        ),
        row("TRACE reaches the application", ask("TRACE", "/method"), body("TRACE")),
        row("OPTIONS of all", ask("OPTIONS", "*"), body("OPTIONS *")).not_asked(no_url, "this client sends paths"),
        row("a whole URI", get("http://localhost/target/a?b"), body("/target/a?b"))
            .not_asked(no_url, "this client sends paths"),
        row("an expectation that is unknown", get("/method").with("Expect", b"a-miracle"), refused(&[417]).last()).but(
            in_variables,
            "the web server has handled the expectation",
            body("GET"),
        ),
        row("101 that was not requested", get("/switch"), status(&[500], "500 Internal Server Error\n")),
    ]
}

fn uploads() -> Vec<Row> {
    let large = some_bytes(MIB);
    let huge = some_bytes(HUGE);
    vec![
        row("an empty body", post("/sum").sending(b""), sum(b"")),
        row("a body of one byte", post("/whole").sending(b"1"), body("1")),
        row("a body of 64 KiB", ask("PUT", "/whole").sending(&large[..64 * KIB]), body(&large[..64 * KIB])),
        row("a body of 1 MiB", post("/sum").sending(&large), sum(&large)),
        row("a huge body", post("/sum").sending(&huge), sum(&huge)),
        row("an empty body in chunks", post("/sum").in_chunks(b""), sum(b"")).but(
            Way::is_apache_scgi_or_cgi,
            "the length is required",
            refused(&[411]).last(),
        ),
        row("a small body in chunks", post("/whole").in_chunks(b"0123456789"), body("0123456789")).but(
            Way::is_apache_scgi_or_cgi,
            "the length is required",
            refused(&[411]).last(),
        ),
        row("a body of 1 MiB in chunks", post("/sum").in_chunks(&large), sum(&large))
            .but(Way::is_apache_scgi_or_cgi, "the length is required", refused(&[411]).last())
            .but(
                |way| way.is_cgi_of(WebServer::Haproxy),
                "HAProxy buffers a chunked body to determine its length, and has one buffer",
                refused(&[400]).last(),
            ),
        row("a huge body in chunks", post("/sum").in_chunks(&huge), sum(&huge))
            .but(Way::is_apache_scgi_or_cgi, "the length is required", refused(&[411]).last())
            .but(
                |way| way.is_cgi_of(WebServer::Haproxy),
                "HAProxy buffers a chunked body to determine its length, and has one buffer",
                refused(&[400]).last(),
            ),
        row("a body that is not read", post("/early").sending(&large), body("the body was not read\n")).but(
            |way| way.is_cgi_of(WebServer::Haproxy),
            "HAProxy 2.6 drops a client whose request is answered before it has arrived completely",
            body("the body was not read\n").last(),
        ),
        // After its response, the server reads up to 64 MiB more.
        row("a huge body that is not read", post("/early").sending(&huge[..8 * MIB]), body("the body was not read\n")),
        row("a body is returned while it is being sent", post("/echo").sending(&large), body(&large))
            .not_asked(|way| way.is_cgi_of(WebServer::Nginx), "nginx stops sending when the response begins, and waits")
            .not_asked(Way::is_fcgid, "mod_fcgid sends the whole request before it reads")
            .not_asked(|way| way == Way::Behind(APACHE_CGI), "mod_cgid sends the whole request before it reads")
            .not_asked(
                |way| way.is_behind(WebServer::Caddy),
                "Caddy does not read the request and the response at the same time",
            ),
    ]
}

fn downloads() -> Vec<Row> {
    vec![
        row("64 KiB", get("/bytes/65536"), xs(64 * KIB).with("content-length", &[b"65536"]))
            .but(Way::is_apache_scgi_or_cgi, "Apache computes the length itself if it has the whole body", xs(64 * KIB))
            .but(
                Way::is_apache_proxy_cgi,
                "mod_proxy drops the length in a CGI response, and sends chunks",
                xs(64 * KIB).with("content-length", &[]),
            ),
        row("a huge response", get(&format!("/bytes/{HUGE}")), xs(HUGE)),
        row("no bytes, of unknown length", get("/stream/0"), body("")),
        row("a huge response of unknown length", get(&format!("/stream/{HUGE}")), xs(HUGE)),
        row(
            "more than 4 GiB",
            get(&format!("/bytes/{BEYOND_32_BITS}")),
            Expect { body: Content::Xs(BEYOND_32_BITS), ..body("").with("content-length", &[b"4294967297"]) },
        )
        .not_asked(|way| !way.is_direct(), "the row takes long, so it is sent only once for each protocol")
        .not_asked(Way::is_http2, "sending frames takes even longer, and the length is counted as over HTTP/1.1"),
        row("a response that streams", get("/gate/{gate}"), body("first\nlast\n").streaming())
            .but(|way| way.is_cgi_of(WebServer::Nginx), "nginx fills a buffer first", body("first\nlast\n"))
            .but(|way| way.is_behind(WebServer::Lighttpd), "lighttpd buffers the whole response", body("first\nlast\n"))
            .but(|way| way.is_cgi_of(WebServer::Apache), "Apache fills a buffer first", body("first\nlast\n")),
    ]
}

fn paces() -> Vec<Row> {
    let bytes = some_bytes(5000);
    vec![
        row("a client that sends slowly", post("/sum").sending(&bytes).at(Pace::SlowSender), sum(&bytes)),
        row("a client that sends chunks slowly", post("/sum").in_chunks(&bytes).at(Pace::SlowSender), sum(&bytes)).but(
            Way::is_apache_scgi_or_cgi,
            "the length is required",
            refused(&[411]).last(),
        ),
        row("a client that reads slowly", get("/bytes/4194304").at(Pace::SlowReader), xs(4 * MIB)),
        row("a client that waits for 100 Continue", post("/sum").sending(&bytes).at(Pace::AwaitsContinue), sum(&bytes))
            .not_asked(
                Way::is_http2,
                "hyper sends no 100 over HTTP/2; clients send the body on their own after a moment",
            ),
    ]
}
