//! Files that gateways send: static directories, and files that the application selects.
//!
//! Every trap is tried over HTTP and over FastCGI. A file that must not be sent contains the word `secret`.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;
#[path = "common/fronts/mod.rs"]
mod fronts;

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::process::Command;
use std::time::{Duration, SystemTime};

use common::fastcgi::{self, PARAMS, STDIN, begin, pair, record};
use common::gateway::{Place, Site};
use common::{Helper, free_port, http, wait_until};
use nix::sys::stat::{Mode, SFlag, mknod};

const FILES_PHP: &str = include_str!("programs/files.php");
const BINDS: [&str; 4] = ["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0"];

/// Modification time of the file `hello.txt`.
const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

/// A response over any protocol.
#[derive(Debug)]
struct Response {
    status: u16,
    head: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Response {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.iter().find(|(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn is_from_application(&self) -> bool {
        self.body.starts_with(b"application ")
    }
}

type Headers<'a> = &'a [(&'a str, &'a str)];

fn send_http(address: &str, method: &str, target: &str, headers: Headers<'_>) -> io::Result<http::Client> {
    let mut client = http::Client::connect(address)?;
    let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let stream = client.stream.get_mut();
    write!(stream, "{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n{lines}\r\n")?;
    Ok(client)
}

fn over_http(address: &str, method: &str, target: &str, headers: Headers<'_>) -> Response {
    let mut client = send_http(address, method, target, headers).unwrap();
    let http::Response { status, headers, body } = client.response(method == "HEAD").unwrap();
    Response { status, head: headers, body }
}

fn over_fastcgi(site: &Site, method: &str, target: &str, headers: Headers<'_>) -> Response {
    let bind = site.server.binds.iter().find(|bind| bind.starts_with("fastcgi:")).unwrap();
    let mut variables: Vec<(String, String)> =
        site.variables(method, target, b"").into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    variables.retain(|(name, _)| name != "SCRIPT_FILENAME");
    variables.push(("SCRIPT_FILENAME".to_owned(), site.place.text("www/index.php")));
    variables.extend(
        headers
            .iter()
            .map(|(name, value)| (format!("HTTP_{}", name.to_uppercase().replace('-', "_")), (*value).to_owned())),
    );
    let params: Vec<u8> = variables.iter().flat_map(|(name, value)| pair(name, value)).collect();
    let records =
        [begin(1, 1, true), record(PARAMS, 1, &params, 0), record(PARAMS, 1, b"", 0), record(STDIN, 1, b"", 0)];
    let mut client = fastcgi::Client::connect(bind).unwrap();
    client.send(&records).unwrap();
    let response = client.response(1).unwrap();
    let lines = response.head();
    let head: Vec<_> = lines.lines().filter_map(|line| line.split_once(':')).collect();
    let head = head.into_iter().map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
    Response { status: response.status(), head, body: response.body().to_vec() }
}

/// Sends a request over HTTP and over FastCGI. The responses must be the same, apart from headers that depend on the
/// protocol. Returns the response over HTTP.
fn ask(site: &Site, method: &str, target: &str, headers: Headers<'_>) -> Response {
    let response = over_http(&site.server.http(), method, target, headers);
    let other = over_fastcgi(site, method, target, headers);
    let boundary = |response: &Response| {
        response.header("content-type").and_then(|kind| kind.split_once("boundary=")).map(|(_, rest)| rest.to_owned())
    };
    let body = match (boundary(&response), boundary(&other)) {
        (Some(ours), Some(theirs)) => other.text().replace(&theirs, &ours).into_bytes(),
        _ => other.body,
    };
    assert_eq!((response.status, response.body.len()), (other.status, body.len()), "{method} {target}: {response:?}");
    assert!(response.body == body, "{method} {target} {headers:?}");
    response
}

fn get(site: &Site, target: &str) -> Response {
    ask(site, "GET", target, &[])
}

fn wish(headers: Headers<'_>) -> String {
    let headers: Vec<[&str; 2]> = headers.iter().map(|(name, value)| [*name, *value]).collect();
    let text = serde_json::json!({ "headers": headers }).to_string();
    text.bytes().fold("/app?".to_owned(), |query, byte| format!("{query}%{byte:02x}"))
}

/// Creates the files of all tests:
///
/// ```text
/// secret.txt       must never be sent
/// www/             the scripts and static files, below the URL /
/// assets/          static files, below the URL /assets
/// ```
fn plant(place: &Place) {
    let at = |name: &str| place.path(name);
    for directory in ["www/sub", "www/empty", "www/.well-known", "www/.git", "www/scripts", "assets/css", "assets/bare"]
    {
        fs::create_dir_all(at(directory)).unwrap();
    }
    fs::write(at("secret.txt"), "secret").unwrap();
    fs::write(at("www/index.php"), format!("{FILES_PHP}// secret")).unwrap();
    for (name, contents) in [
        ("www/hello.txt", "hello, world\n"),
        ("www/with space & ä.txt", "spaced"),
        ("www/sub/index.html", "<p>sub"),
        ("www/.well-known/token", "token"),
        ("www/.env", "secret"),
        ("www/.git/config", "secret"),
        ("www/copy.PHP", "<?php // secret"),
        ("www/old.php.gz", "secret"),
        ("www/view.phtml", "secret"),
        ("www/back\\slash.txt", "backslash"),
        ("www/percent%2e.txt", "percent"),
        ("www/zero", ""),
        ("assets/css/site.css", "body { color: black }"),
        ("assets/css/site.css.gz", "gzipped"),
        ("assets/css/site.css.br", "brotli"),
        ("assets/script.php", "<?php // secret"),
        ("assets/index.html", "<p>assets"),
    ] {
        fs::write(at(name), contents).unwrap();
    }
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
    File::options().write(true).open(at("www/hello.txt")).unwrap().set_modified(modified).unwrap();
    for (target, link) in [
        ("../secret.txt", "www/out.txt"),
        ("/etc/passwd", "www/passwd.txt"),
        ("..", "www/up"),
        ("../hello.txt", "www/sub/inside.txt"),
        ("loop", "www/loop"),
        ("nothing", "www/broken"),
        ("/dev/zero", "www/zeroes"),
    ] {
        symlink(target, at(link)).unwrap();
    }
    nix::unistd::mkfifo(&at("www/fifo"), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    // Without root, there is no device to try.
    if fronts::is_root() {
        mknod(&at("www/device"), SFlag::S_IFCHR, Mode::S_IRUSR, libc::makedev(1, 5)).unwrap();
    }
}

/// Starts a server with these options and php-cgi, in the directory with all files.
fn start_with(prepare: impl FnOnce(&Place), options: impl FnOnce(&Place) -> Vec<String>) -> Site {
    let place = Place::new();
    plant(&place);
    prepare(&place);
    let options = options(&place);
    let root = place.text("www");
    let mut all: Vec<&str> = BINDS.to_vec();
    all.extend(["--root", &root, "--index", "index.php"]);
    all.extend(options.iter().map(String::as_str));
    let mut command = place.run(&all, &["php-cgi", "-n", "-d", "expose_php=0"]);
    place.start(&mut command)
}

fn start() -> Site {
    start_with(
        |_| {},
        |place| {
            let statics = [format!("/={}", place.text("www")), format!("/assets={}", place.text("assets"))];
            statics.into_iter().flat_map(|text| ["--static".to_owned(), text]).collect()
        },
    )
}

// ---- static directories ----

#[test]
fn files_are_served_and_everything_else_goes_to_the_application() {
    let mut site = start();
    for (target, kind, body) in [
        ("/hello.txt", "text/plain; charset=utf-8", "hello, world\n"),
        ("/hello.txt?v=1", "text/plain; charset=utf-8", "hello, world\n"),
        ("//hello.txt", "text/plain; charset=utf-8", "hello, world\n"),
        ("/%68ello%2etxt", "text/plain; charset=utf-8", "hello, world\n"),
        ("/with%20space%20&%20%c3%a4.txt", "text/plain; charset=utf-8", "spaced"),
        ("/sub/", "text/html", "<p>sub"),
        ("/sub/index.html", "text/html", "<p>sub"),
        ("/sub%2finside.txt", "text/plain; charset=utf-8", "hello, world\n"),
        ("/sub/inside.txt", "text/plain; charset=utf-8", "hello, world\n"),
        ("/.well-known/token", "application/octet-stream", "token"),
        ("/back%5cslash.txt", "text/plain; charset=utf-8", "backslash"),
        ("/percent%252e.txt", "text/plain; charset=utf-8", "percent"),
        ("/zero", "application/octet-stream", ""),
        ("/assets/css/site.css", "text/css; charset=utf-8", "body { color: black }"),
        ("/assets/", "text/html", "<p>assets"),
    ] {
        let response = get(&site, target);
        assert_eq!((response.status, response.text().as_str()), (200, body), "{target}: {response:?}");
        assert_eq!(response.header("content-type"), Some(kind), "{target}");
        assert_eq!(response.header("accept-ranges"), Some("bytes"), "{target}");
        assert_eq!(response.header("content-length"), Some(body.len().to_string().as_str()), "{target}");
        let head = ask(&site, "HEAD", target, &[]);
        assert_eq!((head.status, head.body.len()), (200, 0), "{target}");
        for name in ["content-type", "content-length", "etag", "last-modified"] {
            assert_eq!(head.header(name), response.header(name), "{target} {name}");
        }
    }
    for target in ["/", "/news/7", "/empty", "/empty/", "/assetsx", "/hello.txt/", "/hello.txt/x", "/HELLO.TXT"] {
        assert!(get(&site, target).is_from_application(), "{target}");
    }
    assert!(ask(&site, "POST", "/hello.txt", &[]).is_from_application());
    for target in ["/assets/nothing", "/assets/bare", "/assets/bare/", "/assets/css", "/assets/script.php"] {
        let response = get(&site, target);
        assert_eq!((response.status, response.text().as_str()), (404, "404 Not Found\n"), "{target}");
    }
    let refused = ask(&site, "POST", "/assets/index.html", &[]);
    assert_eq!((refused.status, refused.header("allow")), (405, Some("GET, HEAD")));
    for (target, location) in
        [("/sub", "/sub/"), ("//sub", "/sub/"), ("/%73ub?a=b&c", "/sub/?a=b&c"), ("/assets", "/assets/")]
    {
        let response = get(&site, target);
        assert_eq!((response.status, response.header("location")), (301, Some(location)), "{target}");
    }
    site.at_rest();
    site.server.stop();
    assert!(!site.server.log().contains("ERROR"), "{}", site.server.log());
}

#[test]
fn no_path_leads_to_a_secret_to_a_script_or_to_something_that_is_not_a_file() {
    let site = start();
    let mut targets = vec![
        "/.env",
        "/%2eenv",
        "/.git/config",
        "/%2egit/config",
        "/./hello.txt",
        "/copy.PHP",
        "/copy.PHP/",
        "/old.php.gz",
        "/view.phtml",
        "/index.php%20",
        "/index.php.",
        "/index.php%00.txt",
        "/hello.txt%00",
        "/index%2ephp",
        "/index.php",
        "//index.php",
        "/out.txt",
        "/passwd.txt",
        "/up/secret.txt",
        "/loop",
        "/broken",
        "/zeroes",
        "/fifo",
        "/device",
        "/%5c..%5csecret.txt",
        "/assets%00/css/site.css",
        "/%",
        "/%zz",
        "/hello.txt%",
    ];
    let climbs =
        ["../", "..%2f", "%2e%2e/", "%2e%2e%2f", ".%2e/", "..%5c", "%252e%252e%252f", "..%252f", "%c0%ae%c0%ae/"];
    let climbing: Vec<String> = ["/", "/assets/", "/sub/", "/sub/../", "/assets/css/"]
        .iter()
        .flat_map(|from| climbs.iter().map(move |climb| (from, climb)))
        .flat_map(|(from, climb)| {
            let to = ["secret.txt", "etc/passwd", "www/.env", "www/index.php", "assets/script.php"];
            to.map(|to| (1..5).map(|count| format!("{from}{}{to}", climb.repeat(count))).collect::<Vec<_>>())
        })
        .flatten()
        .collect();
    targets.extend(climbing.iter().map(String::as_str));
    // Over FastCGI, the web server names the script, also for a malformed path.
    let http = site.server.http();
    let responses = targets.iter().flat_map(|target| {
        [over_http(&http, "GET", target, &[]), over_fastcgi(&site, "GET", target, &[])]
            .map(|response| (target, response))
    });
    for (target, response) in responses {
        let is_refused = response.is_from_application() || response.status == 404;
        assert!(is_refused, "{target}: {} {}", response.status, response.text());
        for word in ["secret", "root:", "<?php"] {
            let body = response.text();
            let body = body.lines().filter(|line| !line.starts_with("application ")).collect::<String>();
            assert!(!body.contains(word), "{target}: {body}");
        }
    }
    let line = site.server.logged("leads out of its directory");
    assert!(line.contains("--static"), "{line}");
}

#[test]
fn conditions_and_ranges_are_evaluated() {
    let site = start();
    let first = get(&site, "/hello.txt");
    let etag = first.header("etag").unwrap().to_owned();
    assert_eq!(first.header("last-modified"), Some(DATE));
    let weak = format!("W/{etag}");
    for (headers, status) in [
        (&[("If-None-Match", etag.as_str())][..], 304),
        (&[("If-None-Match", weak.as_str())], 304),
        (&[("If-None-Match", "*")], 304),
        (&[("If-None-Match", "\"other\"")], 200),
        (&[("If-Modified-Since", DATE)], 304),
        (&[("If-Modified-Since", "Sun, 06 Nov 1994 08:49:36 GMT")], 200),
        (&[("If-None-Match", "\"other\""), ("If-Modified-Since", DATE)], 200),
        (&[("If-Match", "\"other\"")], 412),
        (&[("If-Match", etag.as_str())], 200),
        (&[("If-Unmodified-Since", "Sun, 06 Nov 1994 08:49:36 GMT")], 412),
    ] {
        let response = ask(&site, "GET", "/hello.txt", headers);
        assert_eq!(response.status, status, "{headers:?}");
        if status == 304 {
            assert_eq!(response.header("etag"), Some(etag.as_str()));
            assert_eq!((response.header("content-type"), response.header("content-length")), (None, None));
            assert_eq!(ask(&site, "HEAD", "/hello.txt", headers).status, 304);
        }
    }
    for (range, expected) in [
        ("bytes=0-4", Some(("bytes 0-4/13", "hello"))),
        ("bytes=7-", Some(("bytes 7-12/13", "world\n"))),
        ("bytes=-6", Some(("bytes 7-12/13", "world\n"))),
        ("bytes=5-5,100-", Some(("bytes 5-5/13", ","))),
        ("bytes=4-0", None),
        ("bytes=0-12,0-12", None),
        ("lines=0-1", None),
    ] {
        let response = ask(&site, "GET", "/hello.txt", &[("Range", range)]);
        let Some((content_range, body)) = expected else {
            assert_eq!((response.status, response.body.len()), (200, 13), "{range}");
            continue;
        };
        assert_eq!((response.status, response.text().as_str()), (206, body), "{range}");
        assert_eq!(response.header("content-range"), Some(content_range), "{range}");
        assert_eq!(ask(&site, "HEAD", "/hello.txt", &[("Range", range)]).header("content-length"), Some("13"));
        for (if_range, status) in [(etag.as_str(), 206), (DATE, 206), (weak.as_str(), 200), ("\"other\"", 200)] {
            let response = ask(&site, "GET", "/hello.txt", &[("Range", range), ("If-Range", if_range)]);
            assert_eq!(response.status, status, "{if_range}");
        }
    }
    let several = ask(&site, "GET", "/hello.txt", &[("Range", "bytes=0-0,-1")]);
    let boundary = several.header("content-type").unwrap().strip_prefix("multipart/byteranges; boundary=").unwrap();
    let part = |range, body| {
        format!(
            "\r\n--{boundary}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Range: bytes {range}/13\r\n\r\n{body}"
        )
    };
    let expected = format!("{}{}\r\n--{boundary}--\r\n", part("0-0", "h"), part("12-12", "\n"));
    assert_eq!((several.status, several.text()), (206, expected));
    let beyond = ask(&site, "GET", "/hello.txt", &[("Range", "bytes=13-")]);
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some("bytes */13")));
    assert_eq!(ask(&site, "GET", "/zero", &[("Range", "bytes=0-")]).status, 200);
}

#[test]
fn a_client_receives_the_variant_that_it_accepts() {
    let site = start();
    let target = "/assets/css/site.css";
    let mut tags = Vec::new();
    for (accepts, coding, body) in [
        ("", None, "body { color: black }"),
        ("gzip", Some("gzip"), "gzipped"),
        ("gzip, deflate, br", Some("br"), "brotli"),
        ("br;q=0.1, gzip", Some("gzip"), "gzipped"),
        ("gzip;q=0", None, "body { color: black }"),
        ("identity", None, "body { color: black }"),
    ] {
        let response = ask(&site, "GET", target, &[("Accept-Encoding", accepts)]);
        assert_eq!((response.status, response.text().as_str()), (200, body), "{accepts}");
        assert_eq!(response.header("content-encoding"), coding, "{accepts}");
        assert_eq!(response.header("vary"), Some("accept-encoding"), "{accepts}");
        assert_eq!(response.header("content-type"), Some("text/css; charset=utf-8"), "{accepts}");
        let etag = response.header("etag").unwrap().to_owned();
        let known = ask(&site, "GET", target, &[("Accept-Encoding", accepts), ("If-None-Match", &etag)]);
        assert_eq!((known.status, known.header("vary")), (304, Some("accept-encoding")), "{accepts}");
        let part = ask(&site, "GET", target, &[("Accept-Encoding", accepts), ("Range", "bytes=0-1")]);
        assert_eq!((part.status, part.text().as_str()), (206, &body[..2]), "{accepts}");
        tags.push(etag);
    }
    tags.sort();
    tags.dedup();
    assert_eq!(tags.len(), 3, "each variant has its own tag: {tags:?}");
    assert_eq!(get(&site, "/hello.txt").header("vary"), None);
    // The compressed file itself can be requested too.
    assert_eq!(get(&site, "/assets/css/site.css.gz").header("content-type"), Some("application/gzip"));
}

#[test]
fn a_huge_file_is_read_only_where_it_is_requested() {
    const LENGTH: u64 = 5 << 30;
    let site = start();
    let file = File::create(site.path("www/huge")).unwrap();
    file.set_len(LENGTH).unwrap();
    file.write_all_at(b"near the end", LENGTH - 100).unwrap();
    assert_eq!(ask(&site, "HEAD", "/huge", &[]).header("content-length"), Some("5368709120"));
    let range = format!("bytes={}-{}", LENGTH - 100, LENGTH - 89);
    let response = ask(&site, "GET", "/huge", &[("Range", &range)]);
    assert_eq!((response.status, response.text().as_str()), (206, "near the end"));
    assert_eq!(response.header("content-range"), Some("bytes 5368709020-5368709031/5368709120"));
    let end = ask(&site, "GET", "/huge", &[("Range", "bytes=-100")]);
    assert_eq!((end.body.len(), &end.body[..12]), (100, &b"near the end"[..]));
    let mut whole = send_http(&site.server.http(), "GET", "/huge", &[]).unwrap();
    assert_eq!(whole.head().unwrap().0, 200);
    let mut piece = vec![1; 1 << 20];
    whole.stream.read_exact(&mut piece).unwrap();
    assert!(piece.iter().all(|&byte| byte == 0));
}

/// Reads the rest of a response of which 1 MiB has been read. Returns its length.
fn rest_of(client: &mut http::Client) -> u64 {
    let mut rest = Vec::new();
    let _ = common::read_all(&mut client.stream, &mut rest); // fails if the connection was reset
    assert!(rest.iter().all(|&byte| byte == b'a'), "only bytes of the first version are sent");
    rest.len() as u64
}

#[test]
fn a_file_that_changes_while_it_is_sent_is_broken_off_and_a_replaced_one_is_complete() {
    const LENGTH: usize = 64 << 20;
    let mut site = start();
    let path = site.path("www/large");
    let contents = vec![b'a'; LENGTH];
    let open = || File::options().write(true).open(&path).unwrap();
    type Change<'a> = (&'static str, bool, &'a dyn Fn());
    let changes: [Change<'_>; 5] = [
        ("truncated", false, &|| open().set_len(2 << 20).unwrap()),
        ("emptied", false, &|| open().set_len(0).unwrap()),
        ("overwritten", false, &|| open().write_all_at(&vec![b'b'; LENGTH], 0).unwrap()),
        ("replaced", true, &|| {
            fs::write(site.path("www/new"), "b").unwrap();
            fs::rename(site.path("www/new"), &path).unwrap();
        }),
        ("removed", true, &|| fs::remove_file(&path).unwrap()),
    ];
    for (name, is_complete, change) in changes {
        fs::write(&path, &contents).unwrap();
        let mut client = send_http(&site.server.http(), "GET", "/large", &[("Connection", "close")]).unwrap();
        let (status, _) = client.head().unwrap();
        let mut first = vec![0; 1 << 20];
        client.stream.read_exact(&mut first).unwrap();
        change();
        let rest = rest_of(&mut client);
        assert_eq!((status, rest == (LENGTH - (1 << 20)) as u64), (200, is_complete), "{name}: {rest} bytes followed");
    }
    site.server.stop();
    assert_eq!(site.server.log().matches("a response body failed: the file was").count(), 3, "{}", site.server.log());
}

#[test]
fn a_file_without_permission_is_forbidden() {
    // Root could read all files, so the gateways run as another user.
    let as_user = if fronts::is_root() { &["--user", "4711", "--group", "4711"][..] } else { &[] };
    let mode = |path: std::path::PathBuf, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let site = start_with(
        |place| {
            fs::create_dir(place.path("assets/closed")).unwrap();
            fs::write(place.path("assets/closed/a.txt"), "secret").unwrap();
            mode(place.path(""), 0o755);
            mode(place.path("secret.txt"), 0o600);
            mode(place.path("www/hello.txt"), 0o200);
            mode(place.path("assets/closed"), 0o600);
            mode(place.path("www/sub"), 0o311);
            fs::write(place.path("assets/closed.txt"), "secret").unwrap();
            mode(place.path("assets/closed.txt"), 0o200);
        },
        |place| {
            let mut options: Vec<String> = as_user.iter().map(|&text| text.to_owned()).collect();
            options.extend(["--static".to_owned(), format!("/={}", place.text("www"))]);
            options.extend(["--static".to_owned(), format!("/assets={}", place.text("assets"))]);
            options.extend(["--sendfile".to_owned(), place.text("")]);
            options
        },
    );
    for target in ["/hello.txt", "/assets/closed.txt", "/assets/closed/a.txt"] {
        let response = get(&site, target);
        assert_eq!((response.status, response.text().as_str()), (403, "403 Forbidden\n"), "{target}");
    }
    assert_eq!(get(&site, "/sub").status, 301, "a directory need not be readable");
    let line = site.server.logged("did not serve a file that the user of the gateways must not read");
    assert!(line.contains("hello.txt") && line.contains("--static"), "{line}");
    if fronts::is_root() {
        let secret = site.place.text("secret.txt");
        assert_eq!(get(&site, &wish(&[("X-Sendfile", &secret)])).status, 403);
        let line = site.server.logged("answered 403: X-Sendfile names");
        assert!(line.contains(&secret) && line.contains("--sendfile"), "{line}");
    }
}

// ---- files that the application selects ----

/// Starts a server that allows the application to select files in `www` (as `/private`) and in `assets`.
fn start_sendfile(more: &[&str]) -> Site {
    start_with(
        |place| symlink("www", place.path("link")).unwrap(),
        |place| {
            let mut options = vec!["--sendfile".to_owned(), format!("/private={}", place.text("link"))];
            options.extend(["--sendfile".to_owned(), place.text("assets")]);
            options.extend(more.iter().map(|&text| text.to_owned()));
            options
        },
    )
}

#[test]
fn the_selected_file_replaces_the_body_and_the_other_headers_are_kept() {
    let mut site = start_sendfile(&[]);
    let path = |name: &str| site.place.text(name);
    for (name, value) in [
        ("X-Sendfile", path("link/hello.txt")),
        ("X-Sendfile", path("www/hello.txt")),
        ("x-SENDFILE", path("www//sub/../hello.txt")),
        ("X-Accel-Redirect", "/private/hello.txt".to_owned()),
        ("X-Accel-Redirect", "/private/%68ello.txt?x=1".to_owned()),
    ] {
        let headers = [
            (name, value.as_str()),
            ("Content-Type", "image/x-mine"),
            ("Content-Disposition", "attachment; filename=\"a.txt\""),
            ("Cache-Control", "private"),
            ("Set-Cookie", "a=1"),
            ("Set-Cookie", "b=2"),
            ("X-Mine", "kept"),
            ("Content-Length", "5"),
            ("Content-Encoding", "gzip"),
            ("ETag", "\"theirs\""),
            ("Last-Modified", "Mon, 07 Nov 1994 08:49:37 GMT"),
            ("Accept-Ranges", "none"),
        ];
        let response = get(&site, &wish(&headers));
        assert_eq!((response.status, response.text().as_str()), (200, "hello, world\n"), "{value}");
        for (name, expected) in [
            ("content-type", Some("image/x-mine")),
            ("content-disposition", Some("attachment; filename=\"a.txt\"")),
            ("cache-control", Some("private")),
            ("x-mine", Some("kept")),
            ("content-length", Some("13")),
            ("last-modified", Some(DATE)),
            ("accept-ranges", Some("bytes")),
            ("content-encoding", None),
            ("x-sendfile", None),
            ("x-accel-redirect", None),
        ] {
            assert_eq!(response.header(name), expected, "{value}: {name}");
        }
        let cookies = response.head.iter().filter(|(name, _)| name.eq_ignore_ascii_case("set-cookie"));
        assert_eq!(cookies.count(), 2);
        let etag = response.header("etag").unwrap().to_owned();
        assert_ne!(etag, "\"theirs\"");
        let known = ask(&site, "GET", &wish(&headers), &[("If-None-Match", &etag)]);
        assert_eq!((known.status, known.header("set-cookie")), (304, Some("a=1")));
        let part = ask(&site, "GET", &wish(&headers), &[("Range", "bytes=7-11")]);
        assert_eq!((part.status, part.text().as_str()), (206, "world"));
        assert_eq!(part.header("cache-control"), Some("private"));
        let head = ask(&site, "HEAD", &wish(&headers), &[]);
        assert_eq!((head.status, head.header("content-length")), (200, Some("13")));
        let posted = ask(&site, "POST", &wish(&headers), &[("Range", "bytes=7-11"), ("If-None-Match", &etag)]);
        assert_eq!((posted.status, posted.text().as_str()), (200, "hello, world\n"));
    }
    site.at_rest();
    site.server.stop();
    assert!(!site.server.log().contains("ERROR"), "{}", site.server.log());
}

#[test]
fn names_and_statuses_are_those_of_the_application() {
    let site = start_sendfile(&[]);
    let path = |name: &str| site.place.text(name);
    let named = get(&site, &wish(&[("X-Sendfile", &path("www/with space & ä.txt"))]));
    assert_eq!(named.text(), "spaced");
    let hidden = get(&site, &wish(&[("X-Accel-Redirect", "/private/.git/config")]));
    assert_eq!(hidden.text(), "secret", "the application may select files that clients cannot request");
    for (status, range, expected, body) in [
        (410, "bytes=0-4", 410, "hello, world\n"),
        (206, "bytes=0-4", 206, "hello"),
        (206, "lines=0-4", 200, "hello, world\n"),
    ] {
        let wish =
            serde_json::json!({ "status": status, "headers": [["X-Sendfile", path("www/hello.txt")]] }).to_string();
        let wish: String = wish.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let response = ask(&site, "GET", &format!("/app?{wish}"), &[("Range", range)]);
        assert_eq!((response.status, response.text().as_str()), (expected, body), "{status} {range}");
    }
}

#[test]
fn an_application_cannot_select_files_outside_of_the_allowed_directories() {
    let site = start_sendfile(&[]);
    let path = |name: &str| site.place.text(name);
    let mut tried = Vec::new();
    for value in [
        "/etc/passwd",
        "etc/passwd",
        "hello.txt",
        &path("secret.txt"),
        &path("www/../secret.txt"),
        &path("www/sub/../../secret.txt"),
        &path("www%2f..%2fsecret.txt"),
        &path("wwwsecret.txt"),
        &path("www/out.txt"),
        &path("www/passwd.txt"),
        &path("www/up/secret.txt"),
        &path("www/zeroes"),
        &path("www/device"),
        &path("www/fifo"),
        &path("www/loop"),
        &path("www/sub"),
        &path("www/sub/"),
        &path("www/hello.txt/"),
        &path("www"),
        &path("www/nothing"),
        "/proc/self/environ",
    ] {
        tried.push(("X-Sendfile", value.to_owned()));
    }
    for value in [
        "/private/../secret.txt",
        "/private/%2e%2e/secret.txt",
        "/private/..%2fsecret.txt",
        "/private/out.txt",
        "/private/up/secret.txt",
        "/private/hello.txt%00",
        "/private/%",
        "/private/fifo",
        "/private/",
        "/private/hello.txt/",
        "/assets/css/site.css",
        "/etc/passwd",
        "@internal",
        "http://127.0.0.1/private/hello.txt",
    ] {
        tried.push(("X-Accel-Redirect", value.to_owned()));
    }
    for (name, value) in tried {
        let target = wish(&[(name, &value), ("Set-Cookie", "a=1")]);
        let response = get(&site, &target);
        assert_eq!((response.status, response.text().as_str()), (404, "404 Not Found\n"), "{name}: {value}");
        assert_eq!(response.header(name), None, "{value}");
        let line = site.server.logged(&format!("{value}\" request=").replace('"', ""));
        assert!(line.contains("--sendfile") && line.contains("answered 404"), "{line}");
    }
}

#[test]
fn without_a_directory_the_header_is_removed_and_a_web_server_in_front_receives_it() {
    let site = start_with(|_| {}, |_| Vec::new());
    let target = wish(&[("X-Sendfile", "/etc/passwd"), ("X-Accel-Redirect", "/b")]);
    let response = over_http(&site.server.http(), "GET", &target, &[]);
    assert!(response.status == 200 && response.is_from_application(), "{response:?}");
    assert_eq!((response.header("x-sendfile"), response.header("x-accel-redirect")), (None, None));
    let line = site.server.logged("removed X-Sendfile from a response");
    assert!(line.contains("/etc/passwd") && line.contains("--sendfile"), "{line}");
    let response = over_fastcgi(&site, "GET", &target, &[("X-Sendfile-Type", "X-Accel-Redirect")]);
    assert_eq!(response.header("x-accel-redirect"), Some("/b"));
    assert!(response.text().contains("HTTP_X_SENDFILE_TYPE"), "the web server may have sent this: {response:?}");
}

const STEERING: Headers<'static> = &[
    ("X-Sendfile-Type", "X-Accel-Redirect"),
    ("X-Accel-Mapping", "/=/private/"),
    ("X-Accel-Redirect", "/private/.env"),
    ("X-Sendfile", "/etc/passwd"),
    ("X-Accel-Buffering", "no"),
    ("X-Other", "kept"),
];

#[test]
fn a_client_cannot_steer_the_selection() {
    let site = start_sendfile(&[]);
    let response = ask(&site, "GET", "/app", STEERING);
    let variables: Vec<_> = response.body.split(|&byte| byte == b'\n').skip(1).map(String::from_utf8_lossy).collect();
    assert_eq!(variables, ["HTTP_X_OTHER=kept", ""], "{response:?}");
    let without = start_with(|_| {}, |_| Vec::new());
    let response = over_http(&without.server.http(), "GET", "/app", STEERING);
    assert!(!response.text().contains("SENDFILE") && !response.text().contains("ACCEL"), "{}", response.text());
}

#[test]
fn an_http_application_can_select_a_file_too() {
    let place = Place::new();
    plant(&place);
    let app = "require('http').createServer((request, response) => {
        if (request.url === '/headers') return response.end(JSON.stringify(request.headers));
        response.setHeader('X-Sendfile', decodeURIComponent(request.url.split('?')[1]));
        response.end('application ' + 'x'.repeat(1 << 20));
    }).listen({ fd: 3 });";
    let directory = place.text("www");
    let options = ["--backend", "http", "--sendfile", &directory, "--static", &format!("/={directory}")];
    let mut command = place.run(&[&BINDS[..], &options].concat(), &["node", "-e", app]);
    let site = place.start(&mut command);
    let response = get(&site, &format!("/app?{directory}/hello.txt"));
    assert_eq!((response.status, response.text().as_str()), (200, "hello, world\n"));
    assert_eq!(response.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(get(&site, &format!("/app?{directory}/../secret.txt")).status, 404);
    assert_eq!(get(&site, "/hello.txt").text(), "hello, world\n");
    for spelling in ["X-Sendfile-Type", "X_Sendfile_Type", "x-accel-mapping", "X.Accel.Mapping"] {
        let response = over_http(&site.server.http(), "GET", "/headers", &[(spelling, "steered")]);
        assert!(response.status == 200 && !response.text().contains("steered"), "{spelling}: {}", response.text());
    }
}

#[test]
fn slow_readers_hold_no_app_process() {
    const LENGTH: usize = 8 << 20; // more than the sockets' buffers can contain
    let site = start_sendfile(&["--workers", "1", "--write-timeout", "0"]); // on a busy machine, the last client waits for long
    fs::write(site.path("assets/large"), vec![b'a'; LENGTH]).unwrap();
    let target = wish(&[("X-Sendfile", &site.place.text("assets/large"))]);
    let address = site.server.http();
    let mut clients: Vec<_> = (0..100).map(|_| send_http(&address, "GET", &target, &[]).unwrap()).collect();
    for client in &mut clients {
        assert_eq!(client.head().unwrap().0, 200);
    }
    wait_until("the app process is idle", || (site.status()["workers"][0]["in_flight"] == 0).then_some(()));
    assert!(get(&site, "/app").is_from_application());
    for client in &mut clients {
        let mut body = vec![0; LENGTH];
        client.stream.read_exact(&mut body).unwrap();
        assert!(body.iter().all(|&byte| byte == b'a'));
    }
}

// ---- comparison with nginx ----

/// Starts nginx for the same files.
fn start_nginx(site: &Site) -> (Helper, String) {
    let directory = site.place.text("");
    let temporary: String = ["client_body", "fastcgi", "proxy", "scgi", "uwsgi"]
        .map(|name| format!("{name}_temp_path {directory}/nginx-{name};\n"))
        .concat();
    let user = if fronts::is_root() { "user root;" } else { "" };
    let port = free_port();
    let text = format!(
        "daemon off; {user} worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/error.log;
         events {{ worker_connections 256; }}
         http {{ access_log off; gzip_static on; gzip_vary on; default_type application/octet-stream;\n{temporary}
           types {{ text/plain txt; text/css css; text/html html; }}
           server {{ listen 127.0.0.1:{port};
             location /assets {{ alias {directory}assets; }} location / {{ root {directory}www; }} }} }}\n"
    );
    fs::write(site.path("nginx.conf"), text).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-p").arg(&directory).arg("-e").arg(site.path("error.log")).arg("-c").arg(site.path("nginx.conf"));
    let mut nginx = Helper::start(&mut command);
    let address = format!("127.0.0.1:{port}");
    wait_until("nginx listens", || {
        assert_eq!(nginx.0.try_wait().unwrap(), None, "{:?}", fs::read_to_string(site.path("error.log")));
        common::connect_tcp(&address).ok()
    });
    (nginx, address)
}

#[test]
fn the_responses_are_those_of_nginx() {
    let site = start();
    let (_nginx, address) = start_nginx(&site);
    let gzip = ("Accept-Encoding", "gzip");
    let requests: [(&str, &str, Headers<'_>); 23] = [
        ("GET", "/hello.txt", &[]),
        ("HEAD", "/hello.txt", &[]),
        ("GET", "//hello.txt", &[]),
        ("GET", "/%68ello.txt?x", &[]),
        ("GET", "/sub%2finside.txt", &[]),
        ("GET", "/with%20space%20&%20%c3%a4.txt", &[]),
        ("GET", "/percent%252e.txt", &[]),
        ("GET", "/back%5cslash.txt", &[]),
        ("GET", "/sub/", &[]),
        ("GET", "/sub", &[]),
        ("GET", "/zero", &[]),
        ("GET", "/assets/nothing", &[]),
        ("GET", "/assets/css/site.css", &[]),
        ("GET", "/assets/css/site.css", &[gzip]),
        ("GET", "/assets/css/site.css", &[("Accept-Encoding", "gzip;q=0")]),
        ("GET", "/hello.txt", &[("If-Modified-Since", DATE)]),
        ("GET", "/hello.txt", &[("If-None-Match", "\"other\""), ("If-Modified-Since", DATE)]),
        ("GET", "/hello.txt", &[("If-Match", "\"other\"")]),
        ("GET", "/hello.txt", &[("Range", "bytes=0-4")]),
        ("GET", "/hello.txt", &[("Range", "bytes=-5")]),
        ("GET", "/hello.txt", &[("Range", "bytes=13-")]),
        ("GET", "/hello.txt", &[("Range", "bytes=0-4"), ("If-Range", DATE)]),
        ("GET", "/hello.txt", &[("Range", "bytes=0-4"), ("If-Range", "\"other\"")]),
    ];
    for (method, target, headers) in requests {
        let (ours, theirs) = (ask(&site, method, target, headers), over_http(&address, method, target, headers));
        assert_eq!(ours.status, theirs.status, "{method} {target} {headers:?}");
        if matches!(ours.status, 200 | 206) {
            assert_eq!(ours.text(), theirs.text(), "{method} {target} {headers:?}");
        }
        for name in ["content-encoding", "content-range", "last-modified", "vary"] {
            let [ours, theirs] = [&ours, &theirs].map(|response| response.header(name).map(str::to_ascii_lowercase));
            // nginx sends Last-Modified with errors, and not with a 416.
            if name == "last-modified" && ours.is_none() {
                continue;
            }
            assert_eq!(ours, theirs, "{method} {target} {headers:?}: {name}");
        }
    }
}

// ---- settings ----

#[test]
fn a_setting_that_cannot_work_is_reported() {
    let place = Place::new();
    plant(&place);
    let www = place.text("www");
    for (options, message) in [
        (["--static", "/a=/nonexistent"], "--static: /nonexistent"),
        (["--sendfile", "/nonexistent"], "--sendfile: /nonexistent"),
        (["--static", &format!("/a={www}/hello.txt")], "is not a directory"),
        (["--static", &www], "expected URL=DIR"),
        (["--static", &format!("a={www}")], "must begin with a slash"),
        (["--sendfile", "files"], "is not an absolute path"),
        (["--static", &format!("/a={www},/a/={www}")], "the URL /a is given twice"),
    ] {
        use common::limit::InTime as _;
        let mut command = place.run(&options, &["php-cgi"]);
        let output = command.output_in_time().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(message), "{options:?}: {said}");
    }
}
