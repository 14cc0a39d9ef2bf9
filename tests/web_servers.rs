//! Forkyard behind real web servers, and before real clients: nginx with fresh and with kept connections, and
//! lighttpd, each in front of the examples `pages` and `crashy` on FastCGI; `cgi-fcgi`; curl.
//!
//! What is checked is the same for each web server: the list is at the end of this file's first part.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "it is all test code, though not in a test function")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::http::{Client, Response};
use common::{Helper, Server, fastcgi, free_port, wait_until};
use tempfile::TempDir;

const MIB: usize = 1 << 20;
const FRONT_PAGE: &str = include_str!("../examples/pages.html");

/// The web servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Front {
    /// nginx as it is: a connection for each request.
    NginxFresh,
    /// nginx that keeps its connections to us.
    NginxKept,
    Lighttpd,
    /// lighttpd that asks the example `roles` about each request, and serves files.
    LighttpdAuthorizer,
}

/// A web server with two applications behind it, on a port each. The fields are dropped in this order.
struct Site {
    _front: Helper,
    pages: Server,
    crashy: Server,
    clients: Clients,
    folder: TempDir,
}

/// Where clients of the web server go.
struct Clients {
    pages: String,
    crashy: String,
}

/// Which of the two applications.
#[derive(Clone, Copy, Debug)]
enum App {
    Pages,
    Crashy,
}

impl Site {
    fn start(front: Front) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [pages, crashy] = ["pages", "crashy"].map(|name| {
            let bind = format!("fastcgi:unix:{}", folder.path().join(format!("{name}.sock")).display());
            Server::start(name, &["--workers", "2", "--bind", &bind])
        });
        let (helper, clients) = start_front(front, folder.path());
        Self { _front: helper, pages, crashy, clients, folder }
    }
}

impl Clients {
    fn connect(&self, app: App) -> Client {
        let address = match app {
            App::Pages => &self.pages,
            App::Crashy => &self.crashy,
        };
        Client::connect(address).expect("the web server lives")
    }

    /// One request on a connection of its own, which must be answered.
    fn ask(&self, app: App, method: &str, target: &str) -> Response {
        let answer = self.connect(app).request(method, target, b"");
        answer.unwrap_or_else(|error| panic!("{method} {target}: {error}"))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["front.log", "error.log"] {
                let log = std::fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
                eprintln!("--- {name} of the web server:\n{log}");
            }
        }
    }
}

fn start_front(front: Front, folder: &Path) -> (Helper, Clients) {
    // The ports were free when we looked. If one is not any more, the web server ends, and there are others.
    for _ in 0..5 {
        let ports = free_ports();
        let mut helper = Helper::start(&mut front_command(front, folder, ports));
        let up = wait_until("the web server listens, or has ended", || {
            let ended = helper.0.try_wait().expect("it is our child").is_some();
            let listens = ports.iter().all(|port| std::net::TcpStream::connect(("127.0.0.1", *port)).is_ok());
            (ended || listens).then_some(!ended)
        });
        if up {
            let [pages, crashy] = ports.map(|port| format!("127.0.0.1:{port}"));
            return (helper, Clients { pages, crashy });
        }
    }
    let log = std::fs::read_to_string(folder.join("front.log")).unwrap_or_default();
    panic!("{front:?} does not start: {log}");
}

fn free_ports() -> [u16; 2] {
    let first = free_port();
    let second = wait_until("there are two free ports", || Some(free_port()).filter(|port| *port != first));
    [first, second]
}

fn front_command(front: Front, folder: &Path, ports: [u16; 2]) -> Command {
    let config = folder.join("front.conf");
    let text = match front {
        Front::NginxFresh => nginx_config(folder, ports, "", ""),
        Front::NginxKept => nginx_config(folder, ports, "keepalive 8;", "fastcgi_keep_conn on;"),
        Front::Lighttpd => lighttpd_config(folder, ports),
        Front::LighttpdAuthorizer => lighttpd_authorizer_config(folder, ports),
    };
    std::fs::write(&config, text).unwrap();
    let mut command = match front {
        Front::NginxFresh | Front::NginxKept => {
            let mut command = Command::new(daemon("nginx"));
            command.arg("-p").arg(folder).arg("-e").arg(folder.join("error.log")).arg("-c");
            command
        }
        Front::Lighttpd | Front::LighttpdAuthorizer => {
            let mut command = Command::new(daemon("lighttpd"));
            command.args(["-D", "-f"]);
            command
        }
    };
    let log = File::create(folder.join("front.log")).unwrap();
    command.arg(config).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command
}

/// The path of a daemon. Those are in folders that not every user has in PATH.
fn daemon(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    let found = folders.map(|folder| folder.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is not installed (scripts/test installs it)"))
}

fn nginx_config(folder: &Path, ports: [u16; 2], upstream: &str, location: &str) -> String {
    let folder = folder.display();
    // The folder is its owner's alone, so the worker must be the owner. Only root is asked who that is.
    let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
    let temp: String = ["client_body", "fastcgi", "proxy", "scgi", "uwsgi"]
        .map(|name| format!("{name}_temp_path {folder}/nginx-{name};\n"))
        .concat();
    let params: String = [
        ("QUERY_STRING", "$query_string"),
        ("REQUEST_METHOD", "$request_method"),
        ("CONTENT_TYPE", "$content_type"),
        ("CONTENT_LENGTH", "$content_length"),
        ("SCRIPT_NAME", "$fastcgi_script_name"),
        ("REQUEST_URI", "$request_uri"),
        ("DOCUMENT_URI", "$document_uri"),
        ("SERVER_PROTOCOL", "$server_protocol"),
        ("GATEWAY_INTERFACE", "CGI/1.1"),
        ("REMOTE_ADDR", "$remote_addr"),
        ("REMOTE_PORT", "$remote_port"),
        ("SERVER_ADDR", "$server_addr"),
        ("SERVER_PORT", "$server_port"),
        ("SERVER_NAME", "$server_name"),
    ]
    .map(|(name, value)| format!("fastcgi_param {name} {value};\n"))
    .concat();
    let servers = [("pages", ports[0]), ("crashy", ports[1])].map(|(name, port)| {
        format!(
            "upstream {name} {{ server unix:{folder}/{name}.sock; {upstream} }}
             server {{ listen 127.0.0.1:{port}; location / {{ fastcgi_pass {name}; {location} }} }}\n"
        )
    });
    format!(
        "daemon off; {user} worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
         events {{ worker_connections 256; }}
         http {{ access_log off; client_max_body_size 64m; keepalive_requests 10000;\n{temp}{params}{} }}\n",
        servers.concat()
    )
}

fn lighttpd_config(folder: &Path, ports: [u16; 2]) -> String {
    let folder = folder.display();
    let [pages, crashy] = ["pages", "crashy"].map(|name| {
        format!(
            "fastcgi.server = (\"/\" => ((\"socket\" => \"{folder}/{name}.sock\", \"check-local\" => \"disable\")))"
        )
    });
    let [first, second] = ports;
    format!(
        "server.modules = (\"mod_fastcgi\")
         server.document-root = \"{folder}\"
         server.upload-dirs = (\"{folder}\")
         server.errorlog = \"{folder}/error.log\"
         server.max-keep-alive-requests = 10000
         server.bind = \"127.0.0.1\"
         server.port = {first}
         {pages}
         $SERVER[\"socket\"] == \"127.0.0.1:{second}\" {{ {crashy} }}\n"
    )
}

fn lighttpd_authorizer_config(folder: &Path, [first, second]: [u16; 2]) -> String {
    let folder = folder.display();
    format!(
        "server.modules = (\"mod_fastcgi\")
         server.document-root = \"{folder}\"
         server.errorlog = \"{folder}/error.log\"
         server.bind = \"127.0.0.1\"
         server.port = {first}
         $SERVER[\"socket\"] == \"127.0.0.1:{second}\" {{ }}
         fastcgi.server = (\"/\" => ((
             \"socket\" => \"{folder}/roles.sock\",
             \"mode\" => \"authorizer\",
             \"docroot\" => \"{folder}\",
             \"check-local\" => \"disable\"
         )))\n"
    )
}

// ---- what is the same whatever the web server ----

/// A row of the table: what is asked, and what must come back.
struct Case {
    app: App,
    method: &'static str,
    target: &'static str,
    body: Vec<u8>,
    status: u16,
    answer: Answer,
}

enum Answer {
    /// Exactly these bytes.
    Is(Vec<u8>),
    /// So many bytes, this among them.
    Has(usize, &'static str),
    /// Whatever it is, it ends where it should.
    Any,
}

/// Bytes of which no piece can be mistaken for another of the same length.
fn some_bytes(length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

fn table() -> Vec<Case> {
    let case = |app, method, target, body: &[u8], status, answer| Case {
        app,
        method,
        target,
        body: body.to_vec(),
        status,
        answer,
    };
    let large = some_bytes(MIB);
    let is = |bytes: &[u8]| Answer::Is(bytes.to_vec());
    vec![
        case(App::Pages, "GET", "/", b"", 200, is(FRONT_PAGE.as_bytes())),
        case(App::Pages, "HEAD", "/", b"", 200, is(b"")),
        case(App::Pages, "GET", "/page/5", b"", 200, Answer::Has(16 << 10, "<h1>Page 5</h1>")),
        case(App::Pages, "HEAD", "/page/5", b"", 200, is(b"")),
        case(App::Pages, "GET", "/page/5?with=a&query=%26", b"", 200, Answer::Has(16 << 10, "<h1>Page 5</h1>")),
        case(App::Pages, "GET", "/page/%36", b"", 200, Answer::Has(16 << 10, "<h1>Page 6</h1>")),
        case(App::Pages, "GET", "/page/six", b"", 400, Answer::Any),
        case(App::Pages, "GET", "/nowhere", b"", 404, is(b"")),
        case(App::Pages, "HEAD", "/nowhere", b"", 404, is(b"")),
        case(App::Pages, "POST", "/purge/nothing", b"", 204, is(b"")),
        // The application answers without having read any of these bodies.
        case(App::Pages, "POST", "/", &large, 405, is(b"")),
        case(App::Pages, "POST", "/nowhere", &large, 404, is(b"")),
        case(App::Crashy, "POST", "/ok", &large, 200, is(b"ok\n")),
        case(App::Crashy, "POST", "/echo", b"", 200, is(b"")),
        case(App::Crashy, "POST", "/echo", b"1", 200, is(b"1")),
        case(App::Crashy, "PUT", "/echo", &large[..65_536], 200, is(&large[..65_536])),
        case(App::Crashy, "POST", "/count", b"", 200, is(b"0\n")),
        case(App::Crashy, "POST", "/count", b"1", 200, is(b"1\n")),
        case(App::Crashy, "POST", "/count", &large, 200, is(b"1048576\n")),
        case(App::Crashy, "GET", "/bytes/0", b"", 200, is(b"")),
        case(App::Crashy, "GET", "/bytes/16", b"", 200, is(&vec![b'x'; 16 * MIB])),
        case(App::Crashy, "HEAD", "/bytes/16", b"", 200, is(b"")),
        case(App::Crashy, "GET", "/panic", b"", 500, is(b"500 Internal Server Error\n")),
        case(App::Crashy, "GET", "/ok", b"", 200, is(b"ok\n")),
    ]
}

impl Case {
    fn check(&self, client: &mut Client) {
        let what = format!("{} {} with a body of {}", self.method, self.target, self.body.len());
        let response = client.request(self.method, self.target, &self.body);
        let response = response.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(response.status, self.status, "{what}: {}", response.text());
        match &self.answer {
            // Not assert_eq: nobody reads a megabyte.
            Answer::Is(bytes) => {
                let got = response.body.len();
                assert!(response.body == *bytes, "{what}: {got} bytes came, which are not the right {}", bytes.len());
            }
            Answer::Has(length, text) => {
                assert_eq!(response.body.len(), *length, "{what}");
                assert!(response.text().contains(text), "{what}: no {text}");
            }
            Answer::Any => {}
        }
    }
}

/// Each row on a connection of its own, then all on one that the client keeps.
fn the_table_of_requests(site: &mut Site) {
    let workers = site.crashy.children();
    for case in table() {
        case.check(&mut site.clients.connect(case.app));
    }
    let mut clients = (site.clients.connect(App::Pages), site.clients.connect(App::Crashy));
    for case in table() {
        case.check(match case.app {
            App::Pages => &mut clients.0,
            App::Crashy => &mut clients.1,
        });
    }
    assert_eq!(site.crashy.children(), workers, "no worker died of a panic");
}

/// nginx stops sending a request's body once it has the head of the response, and waits. An application that
/// answers while it reads is no use behind it then, if the body is larger than the buffers on the way.
fn a_large_body_comes_back_while_it_is_sent(site: &mut Site) {
    for _ in 0..2 {
        let mut client = site.clients.connect(App::Crashy);
        for length in [MIB, 4 * MIB + 1] {
            let body = some_bytes(length);
            let response = client.request("POST", "/echo", &body).unwrap();
            assert!(response.body == body, "{} bytes came back of {length}", response.body.len());
        }
    }
}

#[test]
fn behind_lighttpd_a_large_body_comes_back_while_it_is_sent() {
    a_large_body_comes_back_while_it_is_sent(&mut Site::start(Front::Lighttpd));
}

fn a_head_tells_the_length(site: &mut Site) {
    let head = site.clients.ask(App::Pages, "HEAD", "/");
    assert_eq!(head.header("content-length"), Some(FRONT_PAGE.len().to_string().as_str()), "{head:?}");
    assert_eq!(head.header("content-type"), Some("text/html; charset=utf-8"));
    let get = site.clients.ask(App::Pages, "GET", "/");
    assert_eq!(get.header("content-type"), Some("text/html; charset=utf-8"));
}

fn headers_may_repeat_and_bodies_be_chunked(site: &mut Site) {
    let mut client = site.clients.connect(App::Crashy);
    let twice = "X-Twice: one\r\nX-Twice: two\r\nCookie: a=1\r\nCookie: b=2\r\nAccept: text/plain\r\nAccept: */*\r\n";
    let head = format!("GET /ok HTTP/1.1\r\nHost: localhost\r\n{twice}\r\n");
    client.stream.get_mut().write_all(head.as_bytes()).unwrap();
    let response = client.response(false).unwrap();
    assert_eq!((response.status, response.text().as_str()), (200, "ok\n"));

    let head = "POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
    let piece = "0123456789abcdef".repeat(256);
    let chunks = format!("1000\r\n{piece}\r\n").repeat(20);
    client.stream.get_mut().write_all(format!("{head}{chunks}0\r\n\r\n").as_bytes()).unwrap();
    let response = client.response(false).unwrap();
    assert_eq!(response.status, 200);
    assert!(response.text() == piece.repeat(20), "{} bytes came back of {}", response.body.len(), 20 << 12);
}

/// The log names the request as the client wrote it, with its query.
fn a_panic_costs_one_response(site: &mut Site) {
    let workers = site.crashy.children();
    for round in 0..4 {
        let target = format!("/panic?round={round}&text=two%20words");
        let response = site.clients.ask(App::Crashy, "GET", &target);
        assert_eq!(response.status, 500, "{}", response.text());
        let line = site.crashy.wait_for("a request panicked: ");
        assert!(line.contains("asked to") && line.contains(&format!("request=\"GET {target}\"")), "{line}");
        assert_eq!(site.clients.ask(App::Crashy, "GET", "/ok").status, 200);
    }
    assert_eq!(site.crashy.children(), workers);
}

/// The client of the request that killed the worker gets an error from the web server, and nobody else does.
fn a_crash_costs_one_response(site: &mut Site) {
    let workers = site.crashy.children();
    let response = site.clients.ask(App::Crashy, "GET", "/segv");
    assert!(matches!(response.status, 500 | 502 | 503), "{response:?}");
    for _ in 0..50 {
        assert_eq!(site.clients.ask(App::Crashy, "GET", "/ok").text(), "ok\n");
    }
    let line = site.crashy.wait_for("worker died");
    assert!(line.contains("signal=SEGV") && line.contains("GET /segv"), "{line}");
    let after = wait_until("there are two workers again", || Some(site.crashy.children()).filter(|all| all.len() == 2));
    assert_eq!(after.intersection(&workers).count(), 1, "one of {workers:?} was replaced: {after:?}");
}

/// The number after `pid ` in what the example says.
fn pid_in(text: &str) -> i32 {
    let (_, rest) = text.split_once("pid ").unwrap_or_else(|| panic!("no pid in {text:?}"));
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// Who answers, seen through the web server. A worker that has more to do than the other leaves connections to
/// it, so with eight clients at once it does not take long until each has had its turn.
fn both_workers_answer(site: &mut Site) {
    let workers = site.pages.children();
    assert_eq!(workers.len(), 2);
    let mut seen = BTreeSet::new();
    for round in 0..50 {
        seen.extend(std::thread::scope(|scope| {
            let clients = &site.clients;
            let threads = (0..8).map(|client| {
                scope.spawn(move || {
                    let page = clients.ask(App::Pages, "GET", &format!("/page/{}", round * 8 + client));
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
    panic!("of the workers {workers:?} only {seen:?} have answered");
}

/// A kept connection to each worker, past the web server.
fn connections_to_both(site: &Site) -> BTreeMap<i32, fastcgi::Client> {
    let (mut by_worker, mut others) = (BTreeMap::new(), Vec::new());
    for _ in 0..200 {
        let mut client = fastcgi::Client::connect(&site.pages.binds[0]).unwrap();
        let pid = pid_in(&String::from_utf8_lossy(client.request("GET", "/who", b"").unwrap().body()));
        // It stays open either way: the worker with fewer connections takes the next.
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

/// What one worker has rendered, the other serves, and the web server's clients see; until it is purged.
fn a_page_is_shared_and_purged(site: &mut Site) {
    let mut workers = connections_to_both(site);
    let pids: Vec<i32> = workers.keys().copied().collect();
    for (&one, &other) in [(&pids[0], &pids[1]), (&pids[1], &pids[0])] {
        let rendered = page(workers.get_mut(&one).unwrap(), 7);
        assert_eq!(renderer(&rendered), one, "the one that was asked first renders");
        assert!(page(workers.get_mut(&other).unwrap(), 7) == rendered, "the other has the same page");
        assert!(site.clients.ask(App::Pages, "GET", "/page/7").body == rendered, "so have the web server's clients");

        assert_eq!(site.clients.ask(App::Pages, "POST", "/purge/page-8").status, 204);
        assert!(page(workers.get_mut(&other).unwrap(), 7) == rendered, "another page's tag is another page's");
        assert_eq!(site.clients.ask(App::Pages, "POST", "/purge/pages").status, 204);
        let anew = page(workers.get_mut(&other).unwrap(), 7);
        assert_eq!(renderer(&anew), other, "the page is gone for all workers");
        assert!(site.clients.ask(App::Pages, "GET", "/page/7").body == anew, "and the new one is there for all");
        assert_eq!(site.clients.ask(App::Pages, "POST", "/purge/page-7").status, 204);
    }
}

/// The cache is not the worker's that filled it.
fn a_page_outlives_its_worker(site: &mut Site) {
    let rendered = site.clients.ask(App::Pages, "GET", "/page/9").body;
    let dead = renderer(&rendered);
    assert!(site.pages.children().contains(&dead));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(dead), nix::sys::signal::Signal::SIGKILL).unwrap();
    let line = site.pages.wait_for("worker died");
    assert!(line.contains(&format!("pid={dead}")) && line.contains("signal=KILL"), "{line}");
    assert!(site.clients.ask(App::Pages, "GET", "/page/9").body == rendered, "the page is still there");
    assert_eq!(site.clients.ask(App::Pages, "POST", "/purge/pages").status, 204);
    let anew = site.clients.ask(App::Pages, "GET", "/page/9").body;
    assert_ne!(renderer(&anew), dead);
}

/// 300 requests one after the other on one connection, and eight clients beside them: all get what they asked for.
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

/// A response that is shorter than it said does not pass for a whole one.
fn a_response_that_is_too_short_is_seen(site: &mut Site) {
    for _ in 0..3 {
        let answer = site.clients.connect(App::Crashy).request("GET", "/claim/10/5", b"");
        assert!(answer.is_err(), "{answer:?}");
        assert_eq!(site.clients.ask(App::Crashy, "GET", "/ok").text(), "ok\n");
    }
}

/// Nor, behind nginx, does one that breaks off and had said no length.
#[test]
fn nginx_passes_the_news_of_a_response_that_breaks_off() {
    for front in [Front::NginxFresh, Front::NginxKept] {
        let site = Site::start(front);
        let answer = site.clients.connect(App::Crashy).request("GET", "/break", b"");
        assert!(answer.is_err(), "{front:?}: {answer:?}");
        assert_eq!(site.clients.ask(App::Crashy, "GET", "/ok").text(), "ok\n");
    }
}

/// lighttpd asks the application whether it may serve a file.
#[test]
fn lighttpd_has_an_authorizer() {
    let folder = tempfile::tempdir().unwrap();
    let bind = format!("fastcgi:unix:{}", folder.path().join("roles.sock").display());
    let _roles = Server::start("roles", &["--workers", "1", "--bind", &bind]);
    std::fs::write(folder.path().join("file"), "for friends\n").unwrap();
    let (_helper, clients) = start_front(Front::LighttpdAuthorizer, folder.path());
    let ask = |target| {
        let response = Client::connect(&clients.pages).unwrap().request("GET", target, b"").unwrap();
        (response.status, response.text())
    };
    assert_eq!(ask("/file").0, 403);
    assert_eq!(ask("/file?user=ann"), (200, "for friends\n".to_owned()));
}

/// What a web server wants kept is kept, and what it does not is closed: seen by the workers' descriptors.
fn connections_are_kept_if_that_was_asked(site: &mut Site, front: Front) {
    let descriptors = || site.pages.children().into_iter().map(common::descriptors_of).sum::<usize>();
    let before = descriptors();
    for _ in 0..30 {
        assert_eq!(site.clients.ask(App::Pages, "GET", "/who").status, 200);
    }
    let open = wait_until("no connection is open that nobody asked to keep", || {
        let open = descriptors().checked_sub(before)?;
        (front == Front::NginxKept || open == 0).then_some(open)
    });
    if front == Front::NginxKept {
        assert!((1..=8).contains(&open), "nginx keeps up to eight connections, and {open} are open");
    }
}

macro_rules! behind_each_web_server {
    ($($check:ident)*) => { behind_each_web_server!(($($check)*) nginx_fresh NginxFresh, nginx_kept NginxKept, lighttpd Lighttpd); };
    ($checks:tt $($module:ident $front:ident),*) => {
        $(mod $module { behind_each_web_server!(@ $front $checks); })*
    };
    (@ $front:ident ($($check:ident)*)) => {
        $(#[test]
        fn $check() {
            super::$check(&mut super::Site::start(super::Front::$front));
        })*

        #[test]
        fn connections_are_kept_if_that_was_asked() {
            let front = super::Front::$front;
            super::connections_are_kept_if_that_was_asked(&mut super::Site::start(front), front);
        }
    };
}

behind_each_web_server! {
    the_table_of_requests
    a_head_tells_the_length
    headers_may_repeat_and_bodies_be_chunked
    a_panic_costs_one_response
    a_crash_costs_one_response
    both_workers_answer
    a_page_is_shared_and_purged
    a_page_outlives_its_worker
    many_requests_at_once
    a_response_that_is_too_short_is_seen
}

// ---- real clients ----

/// Gives a command its standard input, and returns what it said on standard output, if it ended well.
fn output_of(command: &mut Command, input: &[u8]) -> io::Result<Vec<u8>> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut output = Vec::new();
    std::thread::scope(|scope| {
        // It may end before it has read all: that is for the answer to say.
        scope.spawn(move || stdin.write_all(input));
        stdout.read_to_end(&mut output)
    })?;
    let status = child.wait()?;
    if status.success() { Ok(output) } else { Err(io::Error::other(format!("{command:?}: {status}"))) }
}

#[test]
fn cgi_fcgi_is_a_client() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("crashy.sock");
    let crashy = Server::start("crashy", &["--workers", "2", "--bind", &format!("fastcgi:unix:{}", socket.display())]);
    let ask = |variables: &[(&str, &str)], body: &[u8]| {
        let mut command = Command::new("cgi-fcgi");
        command.args(["-bind", "-connect"]).arg(&socket).env_clear().envs(variables.iter().copied());
        let output = output_of(&mut command, body).expect("cgi-fcgi ends well (scripts/test installs it)");
        let head = output.windows(4).position(|four| four == b"\r\n\r\n").expect("there is a head");
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
        assert!(echo == body, "{} bytes came back of {length}", echo.len());
    }
    // A bare call, as a health check makes it, has no method.
    assert_eq!(ask(&[], b"").0, "Status: 400 Bad Request");
    drop(crashy);
}

/// curl's answer: the version and status of the response, and the body.
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
        assert!(body == large, "{arguments:?}: {} bytes came back", body.len());
        assert_eq!(curl(arguments, &url("/count"), &large), answer("1.1 200", b"1048576\n"));
    }
    // Without a known length a response to HTTP/1.0 ends with its connection.
    let (line, body) = curl(&["--http1.0"], &url("/bytes/4"), b"");
    assert_eq!((line.as_str(), body.len()), ("1 200", 4 * MIB));
}
