//! The examples as CGI programs. They are run by lighttpd, or by the tests as a web server would run them.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;
#[path = "common/fronts/mod.rs"]
mod fronts;

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::time::Duration;

use common::http;
use common::limit::{self, Pipe};
use common::scgi::Response;
use common::{Server, line_of, program, wait_until};
use forkyard_shm::{Found, Plan, Segment, StoreOptions};
use fronts::WebServer;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MIB: usize = 1 << 20;

/// Returns a CGI program with the environment that a web server gives it.
fn command(name: &str, method: &str, target: &str) -> Command {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut command = Command::new(program(name));
    command
        .env_clear()
        .envs([("GATEWAY_INTERFACE", "CGI/1.1"), ("SERVER_PROTOCOL", "HTTP/1.1"), ("REQUEST_METHOD", method)])
        .envs([("REQUEST_URI", target), ("SCRIPT_NAME", ""), ("PATH_INFO", path), ("QUERY_STRING", query)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

struct Called {
    response: Response,
    errors: String,
    status: Option<i32>,
}

/// Runs the command until it exits. Standard input stays open until the program exits, so a program that waits for the end of its input
/// would hang.
fn run(command: &mut Command, body: &[u8]) -> Called {
    finish(start(command, body))
}

fn start(command: &mut Command, body: &[u8]) -> Child {
    if !body.is_empty() {
        command.env("CONTENT_LENGTH", body.len().to_string());
    }
    let child = command.spawn().unwrap();
    let mut stdin = child.stdin.as_ref().unwrap();
    let _ = stdin.write_all(body); // the program may answer before it has read the whole body
    child
}

fn finish(mut child: Child) -> Called {
    let stdin = child.stdin.take(); // keep standard input open
    let output = limit::output_of(child, "the program");
    drop(stdin);
    let errors = String::from_utf8(output.stderr).unwrap();
    Called { response: Response::parse(&output.stdout), errors, status: output.status.code() }
}

fn call(name: &str, method: &str, target: &str) -> Called {
    run(&mut command(name, method, target), b"")
}

#[test]
fn a_call_that_cannot_create_threads_is_answered_without_a_panic() {
    assert!(nix::unistd::geteuid().is_root(), "this test changes users: run it as root");
    let call = |name: &str, method: &str, target: &str, body: &[u8]| {
        let call = command(name, method, target);
        let mut limited = Command::new("setpriv");
        limited
            .args(["--reuid", "4797", "--regid", "4797", "--clear-groups", "prlimit", "--nproc=1"])
            .arg(call.get_program())
            .env_clear()
            .envs(call.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env("PATH", std::env::var_os("PATH").unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let called = run(&mut limited, body);
        assert!(!called.errors.contains("panicked"), "{name}: {}", called.errors);
        called
    };
    assert_eq!(call("mirror", "GET", "/", b"").response.status(), 200, "the example needs no thread");
    let called = call("hello", "GET", "/", b"");
    assert_eq!(called.response.status(), 503, "{}", called.errors);
    assert!(called.errors.contains("cannot create all threads for blocking functions"), "{}", called.errors);
    let called = call("mirror", "POST", "/", b"body");
    assert!(called.response.text().contains("the body was cut off"), "{}", called.errors);
    assert!(called.errors.contains("cannot read standard input"), "{}", called.errors);
}

#[test]
fn a_call_is_answered_and_the_process_exits() {
    let large = vec![b'y'; 40 << 10];
    for (name, method, target, body, status, answer) in [
        ("hello", "GET", "/", &b""[..], 200, &b"Hello, world\n"[..]),
        ("hello", "HEAD", "/", b"", 200, b""),
        ("crashy", "GET", "/ok", b"", 200, b"ok\n"),
        ("crashy", "GET", "/slow/20", b"", 200, b"20 ms\n"),
        ("crashy", "GET", "/nowhere", b"", 404, b""),
        ("crashy", "GET", "/panic", b"", 500, b"500 Internal Server Error\n"),
        ("crashy", "GET", "/bytes/16", b"", 200, &vec![b'x'; 16 * MIB]),
        ("crashy", "HEAD", "/bytes/16", b"", 200, b""),
        ("crashy", "POST", "/echo", b"the body", 200, b"the body"),
        ("crashy", "POST", "/count", &large, 200, b"40960\n"),
        ("crashy", "POST", "/count", b"", 200, b"0\n"),
        ("crashy", "POST", "/ok", &large, 200, b"ok\n"),
        ("crashy", "GE T", "/ok", b"", 400, b"400 Bad Request\n"),
    ] {
        let called = run(&mut command(name, method, target), body);
        let what = format!("{name}: {method} {target}: {}", called.errors);
        assert_eq!((called.response.status(), called.status), (status, Some(0)), "{what}");
        assert!(called.response.body == answer, "{what}: {} bytes", called.response.body.len());
    }
    assert!(
        call("crashy", "GET", "/panic").errors.contains("a request panicked"),
        "the panic is reported to the web server's log"
    );
    assert!(call("hello", "HEAD", "/").response.head.contains("content-length: 13"));
    assert_eq!(call("pages", "GET", "/who").response.text().split(" pid ").next(), Some("slot 0"));
}

#[test]
fn the_output_of_the_application_is_not_part_of_the_response() {
    for (target, printed) in [("/flood/3", "number 0\nnumber 1\nnumber 2\n"), ("/child", "from a child\n")] {
        let called = call("chatty", "GET", target);
        assert!(called.response.head.starts_with("Status: 200 "), "{target}: {}", called.response.head);
        assert!(!called.response.text().contains("number") && !called.response.text().contains("child"));
        assert!(called.errors.contains(printed), "the output is in the log: {}", called.errors);
        assert_eq!(called.status, Some(0));
    }
    // The output is lost if standard error is closed.
    let mut command = Command::new("sh");
    let script = format!("exec {} 2>&-", program("chatty").display());
    command.args(["-c", &script]).env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.envs([("GATEWAY_INTERFACE", "CGI/1.1"), ("REQUEST_METHOD", "GET"), ("REQUEST_URI", "/flood/3")]);
    let called = finish(command.spawn().unwrap());
    assert_eq!((called.response.status(), called.response.text().as_str()), (200, "Ok(())\n"));
}

#[test]
fn a_body_streams_through() {
    let mut child = start(command("crashy", "POST", "/echo").env("CONTENT_LENGTH", "8"), b"");
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = Pipe::of(child.stdout.take().unwrap());
    stdin.write_all(b"1234").unwrap();
    let mut came = Vec::new();
    while !came.ends_with(b"\r\n\r\n1234") {
        let mut byte = [0];
        stdout.read_exact(&mut byte).unwrap();
        came.push(byte[0]);
    }
    stdin.write_all(b"5678 and what is not of the request").unwrap();
    assert_eq!(stdout.rest("the rest of the response"), b"5678");
    assert_eq!(limit::end_of(&mut child, "the program").code(), Some(0));
}

#[test]
fn limits_apply_and_incomplete_bodies_are_errors() {
    let mut limited = command("crashy", "POST", "/count");
    let called = run(limited.env("FORKYARD_MAX_BODY", "10"), &[0; 11]);
    assert_eq!((called.response.status(), called.status), (413, Some(0)));

    let mut child = start(command("crashy", "POST", "/count").env("CONTENT_LENGTH", "10"), b"");
    child.stdin.take().unwrap().write_all(b"12345").unwrap();
    assert_eq!(finish(child).response.text(), "5\n", "the example counts up to the error");

    for (name, value, status) in [
        ("HTTP_TRANSFER_ENCODING", "chunked", 411),
        ("CONTENT_LENGTH", "-1", 411),
        ("CONTENT_LENGTH", "1x", 400),
        ("CONTENT_LENGTH", "18446744073709551616", 400),
    ] {
        let called = run(command("crashy", "POST", "/count").env(name, value), b"");
        assert_eq!((called.response.status(), called.status), (status, Some(0)), "{name}={value}");
    }

    let called = call("crashy", "GET", "/break");
    assert_eq!((called.response.text().as_str(), called.status), ("a part\n", Some(1)), "{}", called.errors);
    assert!(called.errors.contains("a response body failed: broken on purpose"), "{}", called.errors);
}

#[test]
fn the_limits_of_size_and_time_apply_to_a_call_as_to_any_request() {
    let long = "x".repeat(9000);
    let called = run(command("crashy", "GET", "/ok").envs([("FORKYARD_MAX_PARAMS", "8K"), ("HTTP_X", &long)]), b"");
    assert_eq!((called.response.status(), called.status), (431, Some(0)), "{}", called.errors);

    for target in ["/slow/600000", "/thread/sleep-600000"] {
        let times = [("FORKYARD_REQUEST_TIMEOUT", "100ms"), ("FORKYARD_HANG_TIMEOUT", "100ms")];
        let called = run(command("crashy", "GET", target).envs(times), b"");
        assert_eq!((called.response.status(), called.status), (504, Some(0)), "{target}: {}", called.errors);
    }
    let mut slow = command("crashy", "POST", "/count");
    let child = start(slow.envs([("CONTENT_LENGTH", "10"), ("FORKYARD_BODY_TIMEOUT", "1s")]), b"");
    child.stdin.as_ref().unwrap().write_all(b"12345").unwrap(); // the remaining bytes are never sent, and standard input stays open
    let called = finish(child);
    assert_eq!((called.response.status(), called.status), (408, Some(0)), "{}", called.errors);
}

#[test]
fn the_operator_can_give_flags_and_a_client_cannot() {
    // The arguments that Apache derives from the URI /count?--max-body+10, and from a URI that contains %3D.
    for (query, arguments) in [("--max-body+10", &["--max-body", "10"][..]), ("--bind%3Dx", &["--bind=x"])] {
        let mut injected = command("crashy", "POST", &format!("/count?{query}"));
        let called = run(injected.args(arguments), &[0; 11]);
        assert_eq!((called.response.text().as_str(), called.status), ("11\n", Some(0)), "{}", called.errors);
    }

    let mut limited = command("crashy", "POST", "/count");
    assert_eq!(run(limited.args(["--max-body", "10"]), &[0; 11]).response.status(), 413);

    let mut server = command("hello", "GET", "/?a=b");
    server.args(["--bind", "http:127.0.0.1:0", "--workers", "1"]).stdout(Stdio::null());
    let mut server = Server::start_command(&mut server);
    assert_eq!(http::get(&server.http(), "/").unwrap().text(), "Hello, world\n");
    server.stop();
}

#[test]
fn a_call_ends_on_sigterm_or_when_the_web_server_disconnects() {
    let begin = || {
        let mut child = start(&mut command("pages", "GET", "/page/1?ms=600000"), b"");
        let line = line_of(child.stderr.as_mut().unwrap(), "a line of its log");
        assert!(line.contains("rendering page=1"), "{line}");
        child
    };
    let mut child = begin();
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    wait_until("the call exits on SIGTERM", || child.try_wait().unwrap());

    let mut child = begin();
    drop(child.stdout.take());
    assert_eq!(wait_until("the call exits when its output is not read", || child.try_wait().unwrap()).code(), Some(0));
}

fn with_cache(file: &Path, target: &str) -> Command {
    let mut command = command("pages", "GET", target);
    command.envs([("FORKYARD_CACHE", "4M"), ("FORKYARD_WORKERS", "2")]).env("FORKYARD_CACHE_FILE", file);
    command
}

fn page(file: &Path, target: &str) -> String {
    let called = run(&mut with_cache(file, target), b"");
    assert_eq!((called.response.status(), called.status), (200, Some(0)), "{}", called.errors);
    assert!(!called.errors.contains("cannot use the cache file"), "{}", called.errors);
    called.response.text()
}

fn server(file: &Path) -> Server {
    let mut command = Command::new(program("pages"));
    command.args(["--bind", "http:127.0.0.1:0", "--workers", "2", "--cache", "4M", "--cache-file"]).arg(file);
    Server::start_command(&mut command)
}

#[test]
fn calls_share_a_cache_with_each_other_and_with_a_server() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pages");
    let first = page(&file, "/page/1");
    assert_eq!(page(&file, "/page/1"), first, "the page rendered by the first call");

    let mut running = server(&file);
    assert!(running.log().contains("cache is warm"), "{}", running.log());
    assert_eq!(http::get(&running.http(), "/page/1").unwrap().text(), first);
    let second = http::get(&running.http(), "/page/2").unwrap().text();
    assert_eq!(page(&file, "/page/2"), second, "while a server uses the file");
    let third = page(&file, "/page/3");
    assert_eq!(http::get(&running.http(), "/page/3").unwrap().text(), third);
    http::post(&running.http(), "/purge/page-3", b"").unwrap();
    assert_ne!(page(&file, "/page/3"), third);
    running.stop();
    assert!(!running.log().contains("the next start may drop its content"), "{}", running.log());

    assert_eq!(page(&file, "/page/2"), second, "after the server has closed the file");
    assert_eq!(page(&file, "/page/1"), first, "while the file is in use again");
}

#[test]
fn concurrent_calls_render_once_and_leave_the_cache_intact() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pages");
    for round in 1..=3 {
        let calls: Vec<_> =
            (0..24).map(|_| start(&mut with_cache(&file, &format!("/page/{round}?ms=1")), b"")).collect();
        let pages: BTreeSet<_> = calls.into_iter().map(|call| finish(call).response.text()).collect();
        assert_eq!(pages.len(), 1, "one call renders, whichever call creates the file");
    }
    // When the segment is opened as by a master, it is audited first.
    let plan = Plan { cache_bytes: 4 << 20, rows: 20, events_bytes: 1 << 20, ..Plan::default() };
    let (segment, found) = Segment::open(&file, &plan).unwrap();
    assert_eq!((found, segment.cache().stats().entries), (Found::Warm, 3));
}

#[test]
fn one_of_several_concurrent_calls_creates_the_cache_file_and_all_share_it() {
    let plan = Plan { cache_bytes: 4 << 20, rows: 20, events_bytes: 1 << 20, ..Plan::default() };
    let directory = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let file = directory.path().join(round.to_string());
        let at_once = Barrier::new(8);
        let join = |number: u32| {
            at_once.wait();
            let segment = Segment::join(&file, &plan).unwrap();
            segment.cache().set(format!("of {number}"), "page", &StoreOptions::new()).unwrap();
            segment
        };
        let segments: Vec<_> = std::thread::scope(|scope| {
            let join = &join;
            let threads: Vec<_> = (0..8).map(|number| scope.spawn(move || join(number))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for segment in segments {
            let missing: Vec<_> =
                (0..8).filter(|number| segment.cache().get(format!("of {number}")).is_none()).collect();
            assert!(missing.is_empty(), "round {round}: {missing:?}");
        }
    }
}

#[test]
fn calls_killed_at_any_moment_leave_the_cache_intact() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pages");
    let mut random = fastrand::Rng::with_seed(11);
    for round in 0..12 {
        let mut calls: Vec<_> = (0..8)
            .map(|_| {
                let mut child = with_cache(&file, &format!("/page/{}?ms=0", random.u8(0..4))).spawn().unwrap();
                // This sleep does not wait for an event; it makes the kill happen at a random moment.
                std::thread::sleep(Duration::from_micros(random.u64(0..4000)));
                if random.bool() {
                    child.kill().unwrap();
                }
                child
            })
            .collect();
        calls.iter_mut().for_each(|call| assert!(limit::end_of(call, "a call").code() != Some(101)));
        let page_of_all = page(&file, "/page/7");
        assert_eq!(page(&file, "/page/7"), page_of_all, "round {round}");
    }
    let plan = Plan { cache_bytes: 4 << 20, rows: 20, events_bytes: 1 << 20, ..Plan::default() };
    assert_eq!(Segment::open(&file, &plan).unwrap().1, Found::Warm);
}

#[test]
fn a_server_starts_while_a_call_uses_the_cache_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pages");
    let first = page(&file, "/page/1");
    let mut child = start(&mut with_cache(&file, "/page/2?ms=3000"), b"");
    let line = line_of(child.stderr.as_mut().unwrap(), "a line of its log");
    assert!(line.contains("rendering page=2"), "{line}");
    let mut running = server(&file);
    assert!(child.try_wait().unwrap().is_none(), "the call is still rendering");
    assert_eq!(http::get(&running.http(), "/page/1").unwrap().text(), first);
    let waited_for = http::get(&running.http(), "/page/2").unwrap().text();
    assert_eq!(finish(child).response.text(), waited_for, "the server waits for the page that the call renders");
    running.stop();
}

#[test]
fn a_cache_file_of_another_size_is_used_as_it_is_and_other_files_are_left_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pages");
    let plan = Plan { cache_bytes: 1 << 20, rows: 3, ..Plan::default() };
    Segment::open(&file, &plan).unwrap().0.close().unwrap();
    let first = page(&file, "/page/1");
    assert_eq!(page(&file, "/page/1"), first);
    let (segment, found) = Segment::open(&file, &plan).unwrap();
    assert_eq!((found, segment.cache().stats().entries), (Found::Warm, 1));
    drop(segment);

    std::fs::write(&file, "something else").unwrap();
    let called = run(&mut with_cache(&file, "/page/1"), b"");
    assert_eq!((called.response.status(), called.status), (200, Some(0)), "a page without a cache");
    assert!(
        called.errors.contains("cannot use the cache file: ") && called.errors.contains("something else"),
        "{}",
        called.errors
    );
    assert_eq!(std::fs::read(&file).unwrap(), b"something else");
}

/// Apache's mod_cgid uses one socket for both directions. If the program exited with unread data, the socket would be reset and the
/// response would be lost.
#[test]
fn an_unread_body_on_a_shared_socket_does_not_lose_the_response() {
    for (name, value, status) in [("CONTENT_LENGTH", "4194304", 200), ("HTTP_TRANSFER_ENCODING", "chunked", 411)] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(common::PATIENCE)).unwrap();
        let mut command = command("crashy", "POST", "/ok");
        command.env(name, value).stderr(Stdio::null());
        command.stdin(OwnedFd::from(theirs.try_clone().unwrap())).stdout(OwnedFd::from(theirs));
        let mut child = command.spawn().unwrap();
        drop(command); // closes the command's copies of the other end
        ours.write_all(&vec![b'x'; 4 * MIB]).unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        let mut response = Vec::new();
        ours.read_to_end(&mut response).unwrap();
        assert_eq!(Response::parse(&response).status(), status);
        assert!(limit::end_of(&mut child, "the program").success());
    }
}

#[test]
fn behind_lighttpd() {
    for name in ["pages", "crashy"] {
        let directory = fronts::shared_directory();
        let config = format!(
            "server.modules += (\"mod_alias\", \"mod_setenv\", \"mod_cgi\")
                 setenv.set-environment = (\"FORKYARD_CACHE_FILE\" => \"{}\", \"FORKYARD_CACHE\" => \"4M\")
                 alias.url = (\"/\" => \"{}/\")
                 cgi.assign = (\"\" => \"\")",
            directory.path().join("cache").display(),
            program(name).display(),
        );
        let (_lighttpd, address) = fronts::start_with(WebServer::Lighttpd, directory.path(), |_| config.clone());
        if name == "pages" {
            let first = http::get(&address, "/page/5").unwrap();
            assert_eq!((first.status, first.body.len()), (200, 16 << 10), "{}", first.text());
            assert_eq!(http::get(&address, "/page/5").unwrap().body, first.body, "the page comes from the cache");
            assert_eq!(http::get(&address, "/page/five").unwrap().status, 400);
            assert_eq!(http::get(&address, "/?--help").unwrap().status, 200);
        } else {
            assert_eq!(http::post(&address, "/count", &vec![b'y'; 3 * MIB]).unwrap().text(), "3145728\n");
            assert_eq!(http::get(&address, "/bytes/16").unwrap().body.len(), 16 * MIB);
            assert_eq!(http::get(&address, "/panic").unwrap().status, 500);
        }
    }
}
