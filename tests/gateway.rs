//! Gateways in front of php-cgi: what the application receives, and what the client receives, over each protocol.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeMap;
use std::process::Command;

use common::gateway::Site;
use common::limit::InTime as _;
use common::nginx::start_nginx;
use common::run::value;
use common::{fastcgi, http, scgi};

const PROTOCOLS: [&str; 6] =
    ["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0", "--bind", "scgi:127.0.0.1:0"];

/// A response over any protocol.
#[derive(Debug)]
struct Response {
    status: u16,
    head: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Response {
    /// Parses the output of an application.
    fn of_cgi(head: &str, body: &[u8]) -> Self {
        let lines = head.lines().filter_map(|line| line.split_once(':'));
        let head: Vec<_> = lines.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
        let status =
            head.iter().find(|(name, _)| name == "Status").map_or(200, |(_, value)| value[..3].parse().unwrap());
        Self { status, head, body: body.to_vec() }
    }

    fn all(&self, name: &str) -> Vec<&str> {
        let named = self.head.iter().filter(|(other, _)| other.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str()).collect()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

type Ask<'a> = Box<dyn Fn(&str, &str, &[u8]) -> Response + 'a>;

/// Returns a function for each way to send a request to this site, including through nginx.
fn ways<'a>(site: &'a Site, nginx: &'a str) -> BTreeMap<&'static str, Ask<'a>> {
    let over_http = |address: &str, method: &str, target: &str, body: &[u8]| {
        let http::Response { status, headers, body } =
            http::Client::connect(address).unwrap().request(method, target, body).unwrap();
        Response { status, head: headers, body }
    };
    let bind = |protocol: &str| site.server.binds.iter().find(|bind| bind.starts_with(protocol)).unwrap().clone();
    let [fastcgi_bind, scgi_bind] = ["fastcgi:", "scgi:"].map(bind);
    let over_fastcgi = move |method: &str, target: &str, body: &[u8]| {
        let mut client = fastcgi::Client::connect(&fastcgi_bind).unwrap();
        client.send(&site.fastcgi_request(method, target, body)).unwrap();
        let response = client.response(1).unwrap();
        Response::of_cgi(&response.head(), response.body())
    };
    let over_scgi = move |method: &str, target: &str, body: &[u8]| {
        let variables = site.variables(method, target, body);
        let pairs: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let head = scgi::netstring(&[&pairs[..], &[("SCGI", "1")]].concat());
        let mut client = scgi::Client::connect(&scgi_bind).unwrap();
        client.stream.write_all(&[&head, body].concat()).unwrap();
        let response = client.response().unwrap();
        Response::of_cgi(&response.head, &response.body)
    };
    let mut ways: BTreeMap<&str, Ask<'a>> = BTreeMap::new();
    let address = site.server.http();
    ways.insert("http", Box::new(move |method, target, body| over_http(&address, method, target, body)));
    ways.insert("nginx", Box::new(move |method, target, body| over_http(nginx, method, target, body)));
    ways.insert("fastcgi", Box::new(over_fastcgi));
    ways.insert("scgi", Box::new(over_scgi));
    ways
}

/// Returns the MD5 of some bytes, in hexadecimal, as PHP prints it.
fn md5(site: &Site, bytes: &[u8]) -> String {
    let file = site.path("bytes");
    std::fs::write(&file, bytes).unwrap();
    let output = Command::new("md5sum").arg(&file).output_in_time().unwrap();
    String::from_utf8_lossy(&output.stdout[..32]).into_owned()
}

#[test]
fn php_serves_all_kinds_of_requests_over_each_protocol_and_behind_nginx() {
    let mut site = Site::php(&PROTOCOLS, &[]);
    let (nginx, address) = start_nginx(&site);
    let mut random = fastrand::Rng::with_seed(7);
    let bodies = [1, 16 << 10, 10 << 20]
        .map(|length| -> Vec<u8> { std::iter::repeat_with(|| random.u8(..)).take(length).collect() });
    let sums = bodies.each_ref().map(|body| format!("{} {}\n", body.len(), md5(&site, body)));
    for (way, ask) in ways(&site, &address) {
        let response = ask("GET", "/pid", b"");
        let pid: i32 = response.text().trim().parse().unwrap();
        assert!(site.apps().contains(&pid), "{way}");
        assert!(response.all("content-type")[0].starts_with("text/plain"), "{way}: {response:?}");
        for (body, expected) in bodies.iter().zip(&sums) {
            assert_eq!(ask("POST", "/length", body).text(), *expected, "{way}");
        }
        assert_eq!(ask("POST", "/length", b"").text(), "0 d41d8cd98f00b204e9800998ecf8427e\n", "{way}");
        let head = ask("HEAD", "/large?5000", b"");
        assert_eq!((head.status, head.body.len()), (200, 0), "{way}: {:?}", head.head);
        let missing = ask("GET", "/nowhere", b"");
        assert_eq!((missing.status, missing.text().as_str()), (404, "no such page\n"), "{way}");
        let redirect = ask("GET", "/redirect", b"");
        assert_eq!(redirect.status, 303, "{way}: {redirect:?}");
        assert!(redirect.all("location")[0].ends_with("/elsewhere?a=1"), "{way}: {redirect:?}");
        let cookies = ask("GET", "/cookies", b"");
        assert_eq!(cookies.all("set-cookie").len(), 2, "{way}: {cookies:?}");
        assert_eq!(cookies.all("set-cookie")[0], "first=a%20b", "{way}: {cookies:?}");
        let large = ask("GET", "/large?8000000", b"");
        assert!(large.body == vec![b'x'; 8_000_000], "{way}: {} bytes", large.body.len());
    }
    drop(nginx);
    site.at_rest();
    site.server.stop();
    assert!(!site.server.log().contains("ERROR"), "{}", site.server.log());
}

#[test]
fn the_path_is_split_at_the_script_and_the_query_is_kept() {
    let site = Site::php(&PROTOCOLS[..2], &[]);
    let script =
        "<?php foreach (['SCRIPT_NAME', 'SCRIPT_FILENAME', 'PATH_INFO', 'QUERY_STRING', 'REQUEST_URI'] as $name)
        echo $name, '=', $_SERVER[$name] ?? '(none)', \"\\n\";";
    std::fs::create_dir(site.path("sub")).unwrap();
    std::fs::write(site.path("sub/show.php"), script).unwrap();
    let root = site.place.text("");
    let text = site.get("/sub/show.php/a%20b/c?x=1&y=%2F").text();
    assert_eq!(value(&text, "SCRIPT_NAME"), Some("/sub/show.php"), "{text}");
    assert_eq!(value(&text, "SCRIPT_FILENAME"), Some(format!("{root}sub/show.php").as_str()), "{text}");
    assert_eq!(value(&text, "PATH_INFO"), Some("/a b/c"), "{text}");
    assert_eq!(value(&text, "QUERY_STRING"), Some("x=1&y=%2F"), "{text}");
    assert_eq!(value(&text, "REQUEST_URI"), Some("/sub/show.php/a%20b/c?x=1&y=%2F"), "{text}");
    let text = site.get("/sub/show.php").text();
    assert_eq!(value(&text, "PATH_INFO"), Some("(none)"), "{text}");
    for path in ["/sub/../../etc/passwd.php", "/sub/show.PHP", "/sub/show.phpx"] {
        assert_eq!(site.get(path).status, 404, "{path}: the front controller answers");
    }
}

/// Returns the variables that the application receives for a request with these header lines.
fn params(site: &Site, headers: &str) -> String {
    use std::io::Write as _;
    let mut client = http::Client::connect(&site.server.http()).unwrap();
    write!(client.stream.get_mut(), "GET /params HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").unwrap();
    client.response(false).unwrap().text()
}

#[test]
fn the_application_receives_no_header_that_could_be_mistaken_for_something_else() {
    let site = Site::faulty(&[]);
    let text = params(&site, "Proxy: http://evil/\r\nX_Under_Score: a\r\nX-Plain: b\r\nContent_Length: 7\r\n");
    assert_eq!(value(&text, "HTTP_PROXY"), None, "{text}");
    assert_eq!(value(&text, "HTTP_X_UNDER_SCORE"), None, "{text}");
    assert_eq!(value(&text, "HTTP_X_PLAIN"), Some("b"), "{text}");
    assert!(matches!(value(&text, "CONTENT_LENGTH"), None | Some("" | "0")), "{text}");
    assert_eq!(value(&text, "REMOTE_ADDR"), Some("127.0.0.1"), "{text}");
    assert_eq!(value(&text, "REQUEST_SCHEME"), Some("http"), "{text}");
}

const FORWARDED: &str = "X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: other.example\r\n";

#[test]
fn the_address_of_the_client_comes_from_trusted_web_servers_only() {
    let site = Site::faulty(&["--trust", "10.0.0.0/8"]);
    let text = params(&site, FORWARDED);
    assert_eq!(value(&text, "REMOTE_ADDR"), Some("127.0.0.1"), "{text}");
    assert_ne!(value(&text, "HTTPS"), Some("on"), "{text}");
    assert!(!text.contains("192.0.2.7") && !text.contains("other.example"), "{text}");
    let site = Site::faulty(&["--trust", "127.0.0.0/8"]);
    let text = params(&site, FORWARDED);
    assert_eq!(value(&text, "REMOTE_ADDR"), Some("192.0.2.7"), "{text}");
    assert_eq!(value(&text, "HTTPS"), Some("on"), "{text}");
}

#[test]
fn two_gateways_share_four_processes_evenly() {
    let site = Site::faulty(&["--workers", "4"]);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..100).for_each(|_| assert_eq!(site.get("/pid").status, 200)));
        }
    });
    let status = site.status();
    let counts: Vec<u64> =
        status["workers"].as_array().unwrap().iter().map(|app| app["requests"].as_u64().unwrap()).collect();
    assert_eq!(counts.iter().sum::<u64>(), 800, "{counts:?}");
    assert!(counts.iter().max() <= counts.iter().min().map(|least| 2 * least).as_ref(), "{counts:?}");
}
