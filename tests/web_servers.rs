//! Forkyard behind real web servers and with real clients. The examples `pages` and `crashy` run behind each web server over FastCGI, with
//! crashes, panics, the shared cache and many concurrent requests. The clients are `cgi-fcgi` and curl. tests/scenarios covers single
//! requests and responses.
//!
//! The checks are the same for each web server. A list at the end of the first part of this file contains the checks.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code outside of test functions")]

mod common;
#[path = "common/fronts/mod.rs"]
mod fronts;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use common::http::{Client, Response};
use common::{Server, fastcgi, limit, wait_until};
use fronts::{Front, Link};

const MIB: usize = 1 << 20;
const FRONT_PAGE: &str = include_str!("../examples/pages.html");

/// Two applications, each behind its own web server. The fields are dropped in this order.
struct Site {
    _fronts: [fronts::Site; 2],
    pages: Server,
    crashy: Server,
    clients: Clients,
}

#[derive(Clone, Copy, Debug)]
enum App {
    Pages,
    Crashy,
}

/// The addresses of the web servers, for clients.
struct Clients {
    pages: String,
    crashy: String,
}

impl Site {
    fn start(front: Front) -> Self {
        let mut fronts = ["pages", "crashy"].map(|application| fronts::Site::start(front, application));
        let clients = Clients { pages: fronts[0].address.clone(), crashy: fronts[1].address.clone() };
        let [pages, crashy] =
            fronts.each_mut().map(|site| site.application.take().expect("the test has started the application"));
        Self { _fronts: fronts, pages, crashy, clients }
    }
}

impl Clients {
    fn connect(&self, app: App) -> Client {
        let address = match app {
            App::Pages => &self.pages,
            App::Crashy => &self.crashy,
        };
        Client::connect(address).expect("the web server accepts connections")
    }

    /// Sends one request on a new connection. Panics if there is no response.
    fn ask(&self, app: App, method: &str, target: &str) -> Response {
        let answer = self.connect(app).request(method, target, b"");
        answer.unwrap_or_else(|error| panic!("{method} {target}: {error}"))
    }
}

// ---- checks that are the same for each web server ----

/// Returns random bytes, so that no slice of sufficient length occurs twice.
fn some_bytes(length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

/// Checks that a panic fails one request, and that the log contains the request as the client sent it, with its query.
fn a_panic_fails_one_request(site: &mut Site) {
    let workers = site.crashy.workers();
    for round in 0..4 {
        let target = format!("/panic?round={round}&text=two%20words");
        let response = site.clients.ask(App::Crashy, "GET", &target);
        assert_eq!(response.status, 500, "{}", response.text());
        let line = site.crashy.wait_for("a request panicked: ");
        assert!(line.contains("asked to") && line.contains(&format!("request=\"GET {target}\"")), "{line}");
        assert_eq!(site.clients.ask(App::Crashy, "GET", "/ok").status, 200);
    }
    site.crashy.has_only(&workers);
}

/// Checks that only the client whose request killed the worker gets an error from the web server.
fn a_crash_fails_one_request(site: &mut Site) {
    let workers = site.crashy.workers();
    let response = site.clients.ask(App::Crashy, "GET", "/segv");
    assert!(matches!(response.status, 500 | 502 | 503), "{response:?}");
    for _ in 0..50 {
        assert_eq!(site.clients.ask(App::Crashy, "GET", "/ok").text(), "ok\n");
    }
    let line = site.crashy.wait_for("worker died");
    assert!(line.contains("signal=SEGV") && line.contains("GET /segv"), "{line}");
    let after = wait_until("there are two workers again", || Some(site.crashy.workers()).filter(|all| all.len() == 2));
    assert_eq!(after.intersection(&workers).count(), 1, "one of {workers:?} was replaced: {after:?}");
}

/// Returns the number after `pid ` in the example's output.
fn pid_in(text: &str) -> i32 {
    let (_, rest) = text.split_once("pid ").unwrap_or_else(|| panic!("no pid in {text:?}"));
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// Both workers answer requests through the web server. A worker with more load leaves connections to the other worker, so both workers
/// soon answer if there are several concurrent clients. If all clients share one multiplexed connection (`option max-reqs 64` for HAProxy),
/// more clients are needed than one connection carries.
fn both_workers_answer(site: &mut Site) {
    let workers = site.pages.workers();
    assert_eq!(workers.len(), 2);
    let mut seen = BTreeSet::new();
    let mut pages = 0..;
    for round in 3..30 {
        seen.extend(std::thread::scope(|scope| {
            let clients = &site.clients;
            let threads = pages.by_ref().take(1 << round.min(7)).map(|page| {
                scope.spawn(move || {
                    let page = clients.ask(App::Pages, "GET", &format!("/page/{page}"));
                    let who = clients.ask(App::Pages, "GET", "/who").text();
                    assert!(who.starts_with("slot ") && who.ends_with(" generation 1\n"), "{who}");
                    [pid_in(&page.text()), pid_in(&who)]
                })
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        }));
        if seen == workers {
            return;
        }
    }
    panic!("only {seen:?} of the workers {workers:?} have answered");
}

/// Opens a keep-alive connection to each worker, bypassing the web server.
fn connections_to_both(site: &Site) -> BTreeMap<i32, fastcgi::Client> {
    let (mut by_worker, mut others) = (BTreeMap::new(), Vec::new());
    for _ in 0..200 {
        let mut client = fastcgi::Client::connect(&site.pages.binds[0]).unwrap();
        let pid = pid_in(&String::from_utf8_lossy(client.request("GET", "/who", b"").unwrap().body()));
        // All connections stay open, because the worker with fewer connections accepts the next connection.
        others.extend(by_worker.insert(pid, client));
        if by_worker.len() == 2 {
            return by_worker;
        }
    }
    panic!("200 connections went to one worker");
}

fn page(client: &mut fastcgi::Client, number: u32) -> Vec<u8> {
    let response = client.request("GET", &format!("/page/{number}"), b"").unwrap();
    assert_eq!((response.status(), response.body().len()), (200, 16 << 10));
    response.body().to_vec()
}

fn renderer(page: &[u8]) -> i32 {
    pid_in(&String::from_utf8_lossy(page))
}

/// Checks that a page rendered by one worker is served by the other worker, and through the web server, until the page is purged.
fn a_page_is_shared_and_purged(site: &mut Site) {
    let mut workers = connections_to_both(site);
    let pids: Vec<i32> = workers.keys().copied().collect();
    for (&one, &other) in [(&pids[0], &pids[1]), (&pids[1], &pids[0])] {
        let rendered = page(workers.get_mut(&one).unwrap(), 7);
        assert_eq!(renderer(&rendered), one, "the worker with the first request renders the page");
        assert!(page(workers.get_mut(&other).unwrap(), 7) == rendered, "the other worker returns the same page");
        assert!(
            site.clients.ask(App::Pages, "GET", "/page/7").body == rendered,
            "clients of the web server receive the same page"
        );

        assert_eq!(site.clients.ask(App::Pages, "POST", "/purge/page-8").status, 204);
        assert!(
            page(workers.get_mut(&other).unwrap(), 7) == rendered,
            "a purge of another tag does not affect the page"
        );
        assert_eq!(site.clients.ask(App::Pages, "POST", "/purge/pages").status, 204);
        let anew = page(workers.get_mut(&other).unwrap(), 7);
        assert_eq!(renderer(&anew), other, "the purge removes the page for all workers");
        assert!(site.clients.ask(App::Pages, "GET", "/page/7").body == anew, "all workers serve the new page");
        assert_eq!(site.clients.ask(App::Pages, "POST", "/purge/page-7").status, 204);
    }
}

/// Checks that a cached page remains after the worker that rendered it has died.
fn a_page_outlives_its_worker(site: &mut Site) {
    let rendered = site.clients.ask(App::Pages, "GET", "/page/9").body;
    let dead = renderer(&rendered);
    assert!(site.pages.workers().contains(&dead));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(dead), nix::sys::signal::Signal::SIGKILL).unwrap();
    let line = site.pages.wait_for("worker died");
    assert!(line.contains(&format!("pid={dead}")) && line.contains("signal=KILL"), "{line}");
    assert!(site.clients.ask(App::Pages, "GET", "/page/9").body == rendered, "the page is still there");
    assert_eq!(site.clients.ask(App::Pages, "POST", "/purge/pages").status, 204);
    let anew = site.clients.ask(App::Pages, "GET", "/page/9").body;
    assert_ne!(renderer(&anew), dead);
}

/// Sends 300 consecutive requests on one connection, while eight other clients send requests. Each request must get the right response.
fn many_requests_at_once(site: &mut Site) {
    let clients = &site.clients;
    let one_client = |count: usize| {
        let mut client = clients.connect(App::Pages);
        for index in 0..count {
            let number = index % 7;
            let response = match index % 3 {
                0 => client.request("GET", "/who", b""),
                1 => client.request("GET", "/", b""),
                _ => client.request("GET", &format!("/page/{number}"), b""),
            };
            let response = response.unwrap_or_else(|error| panic!("request {index}: {error}"));
            assert_eq!(response.status, 200, "request {index}: {}", response.text());
            match index % 3 {
                0 => assert!(response.text().starts_with("slot "), "{}", response.text()),
                1 => assert_eq!(response.text(), FRONT_PAGE),
                _ => {
                    assert_eq!(response.body.len(), 16 << 10);
                    assert!(response.text().contains(&format!("<h1>Page {number}</h1>")));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| one_client(60));
        }
        one_client(300);
    });
}

/// Checks that a response that is shorter than its declared length is not accepted as complete.
fn a_truncated_response_is_detected(site: &mut Site) {
    for _ in 0..3 {
        let answer = site.clients.connect(App::Crashy).request("GET", "/claim/10/5", b"");
        assert!(answer.is_err(), "{answer:?}");
        assert_eq!(site.clients.ask(App::Crashy, "GET", "/ok").text(), "ok\n");
    }
}

/// Behind nginx, an incomplete response is not accepted as complete even if it has no declared length.
#[test]
fn nginx_passes_on_that_a_response_is_incomplete() {
    for front in [fronts::NGINX, fronts::NGINX_KEPT] {
        let site = Site::start(front);
        let answer = site.clients.connect(App::Crashy).request("GET", "/break", b"");
        assert!(answer.is_err(), "{front}: {answer:?}");
        assert_eq!(site.clients.ask(App::Crashy, "GET", "/ok").text(), "ok\n");
    }
}

/// lighttpd queries the application as an authorizer before it serves a file.
#[test]
fn lighttpd_uses_an_authorizer() {
    let site = fronts::Site::start(fronts::LIGHTTPD_AUTHORIZER, "roles");
    std::fs::write(site.directory().join("file"), "for friends\n").unwrap();
    let ask = |target| {
        let response = Client::connect(&site.address).unwrap().request("GET", target, b"").unwrap();
        (response.status, response.text())
    };
    assert_eq!(ask("/file").0, 403);
    assert_eq!(ask("/file?user=ann"), (200, "for friends\n".to_owned()));
}

/// Checks, by the number of the workers' sockets, that only connections that the web server wants to keep open stay open.
fn connections_are_kept_open_only_if_requested(site: &mut Site, front: Front) {
    let sockets = || site.pages.workers().into_iter().map(common::sockets_of).sum::<usize>();
    let before = sockets();
    for _ in 0..30 {
        assert_eq!(site.clients.ask(App::Pages, "GET", "/who").status, 200);
    }
    let kept = front.link == Link::FastCgiKept;
    let open = wait_until("connections without keep-alive are closed", || {
        let open = sockets().checked_sub(before)?;
        (kept || open == 0).then_some(open)
    });
    if kept {
        assert!((1..=16).contains(&open), "1 to 16 connections must stay open, and {open} are open");
    }
}

macro_rules! behind_each_web_server {
    ($($check:ident)*) => {
        behind_each_web_server!(($($check)*)
            nginx NGINX, nginx_kept NGINX_KEPT, lighttpd LIGHTTPD, apache APACHE, apache_kept APACHE_KEPT,
            haproxy HAPROXY, haproxy_multiplexed HAPROXY_MULTIPLEXED, caddy CADDY
        );
    };
    ($checks:tt $($module:ident $front:ident),*) => {
        $(mod $module { behind_each_web_server!(@ $front $checks); })*
    };
    (@ $front:ident ($($check:ident)*)) => {
        $(#[test]
        fn $check() {
            super::$check(&mut super::Site::start(super::fronts::$front));
        })*

        #[test]
        fn connections_are_kept_open_only_if_requested() {
            let front = super::fronts::$front;
            super::connections_are_kept_open_only_if_requested(&mut super::Site::start(front), front);
        }
    };
}

behind_each_web_server! {
    a_panic_fails_one_request
    a_crash_fails_one_request
    both_workers_answer
    a_page_is_shared_and_purged
    a_page_outlives_its_worker
    many_requests_at_once
    a_truncated_response_is_detected
}

// ---- real clients ----

/// Runs a command with this input, and returns its standard output if it succeeded.
fn output_of(command: &mut Command, input: &[u8]) -> io::Result<Vec<u8>> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().unwrap();
    let Output { status, stdout, .. } = std::thread::scope(|scope| {
        // The command may exit before it has read all input; its output shows the outcome.
        scope.spawn(move || stdin.write_all(input));
        limit::output_of(child, &format!("{command:?}"))
    });
    if status.success() { Ok(stdout) } else { Err(io::Error::other(format!("{command:?}: {status}"))) }
}

#[test]
fn cgi_fcgi_is_a_client() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("crashy.sock");
    let crashy = Server::start("crashy", &["--workers", "2", "--bind", &format!("fastcgi:unix:{}", socket.display())]);
    let ask = |variables: &[(&str, &str)], body: &[u8]| {
        let mut command = Command::new("cgi-fcgi");
        command.args(["-bind", "-connect"]).arg(&socket).env_clear().envs(variables.iter().copied());
        let output = output_of(&mut command, body).expect("cgi-fcgi ends well (scripts/test installs it)");
        let head = output.windows(4).position(|four| four == b"\r\n\r\n").expect("the output has a head");
        let (head, body) = (String::from_utf8_lossy(&output[..head]).into_owned(), output[head + 4..].to_vec());
        (head.lines().next().unwrap_or_default().to_owned(), body)
    };
    let answer = ask(&[("REQUEST_METHOD", "GET"), ("SCRIPT_NAME", "/ok")], b"");
    assert_eq!(answer, ("Status: 200 OK".to_owned(), b"ok\n".to_vec()));
    let answer = ask(&[("REQUEST_METHOD", "GET"), ("REQUEST_URI", "/nowhere")], b"");
    assert_eq!(answer.0, "Status: 404 Not Found");
    for length in [0, 1, 70_000, MIB] {
        let body = some_bytes(length);
        let length = length.to_string();
        let variables = [("REQUEST_METHOD", "POST"), ("SCRIPT_NAME", "/echo"), ("CONTENT_LENGTH", &length)];
        let (status, echo) = ask(&variables, &body);
        assert_eq!(status, "Status: 200 OK");
        assert!(echo == body, "{} of {length} bytes were returned", echo.len());
    }
    // A request without variables, such as a health check, has no method.
    assert_eq!(ask(&[], b"").0, "Status: 400 Bad Request");
    drop(crashy);
}

/// Runs curl. Returns the version and status of the response, and the body.
fn curl(arguments: &[&str], url: &str, input: &[u8]) -> (String, Vec<u8>) {
    let mut command = Command::new("curl");
    command.args(["-q", "--silent", "--show-error", "--noproxy", "*", "--write-out", "\n%{http_version} %{http_code}"]);
    let mut output = output_of(command.args(arguments).arg(url), input).expect("curl (scripts/test installs it)");
    let end = output.iter().rposition(|&byte| byte == b'\n').expect("the line of --write-out");
    let line = String::from_utf8_lossy(&output[end + 1..]).into_owned();
    output.truncate(end);
    (line, output)
}

#[test]
fn curl_is_a_client() {
    let crashy = Server::start("crashy", &["--workers", "2", "--bind", "http:127.0.0.1:0"]);
    let url = |path: &str| format!("http://{}{path}", crashy.http());
    let answer = |line: &str, body: &[u8]| (line.to_owned(), body.to_vec());

    assert_eq!(curl(&[], &url("/ok?query=1"), b""), answer("1.1 200", b"ok\n"));
    assert_eq!(curl(&["--http1.0"], &url("/ok"), b""), answer("1 200", b"ok\n"));
    assert_eq!(curl(&["--data", "a=1&b=2"], &url("/echo"), b""), answer("1.1 200", b"a=1&b=2"));
    assert_eq!(curl(&["--http1.0", "--data", "a=1"], &url("/echo"), b""), answer("1 200", b"a=1"));
    assert_eq!(curl(&[], &url("/nowhere"), b"").0, "1.1 404");
    assert_eq!(curl(&[], &url("/panic"), b"").0, "1.1 500");

    let (line, head) = curl(&["--head"], &url("/ok"), b"");
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    assert_eq!(line, "1.1 200");
    assert!(head.starts_with("http/1.1 200 ok\r\n") && head.contains("\r\ncontent-length: 3\r\n"), "{head}");

    let large = some_bytes(MIB);
    let chunked = ["-H", "Transfer-Encoding: chunked", "--data-binary", "@-"];
    for arguments in [&chunked[..], &["--data-binary", "@-"], &["--upload-file", "-"]] {
        let (line, body) = curl(arguments, &url("/echo"), &large);
        assert_eq!(line, "1.1 200", "{arguments:?}");
        assert!(body == large, "{arguments:?}: {} bytes were returned", body.len());
        assert_eq!(curl(arguments, &url("/count"), &large), answer("1.1 200", b"1048576\n"));
    }
    // Over HTTP/1.0, the end of the connection marks the end of a response without a known length.
    let (line, body) = curl(&["--http1.0"], &url("/bytes/4"), b"");
    assert_eq!((line.as_str(), body.len()), ("1 200", 4 * MIB));
}
