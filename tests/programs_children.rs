//! Processes started by external programs, and their effects on the server: children that a page waits for, background jobs, wrappers
//! around the programs that serve requests, and processes left behind when the server stops.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod common;

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use common::run::Place;
use common::{Server, StopOnDrop, children_of, is_gone, process, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CHILDREN_PHP: &str = include_str!("programs/children.php");
const PHP: [&str; 6] = ["php-cgi", "-n", "-d", "log_errors=1", "-d", "fastcgi.logging=0"];

/// With this flag, a reload or recycling continues while an old process is still finishing a request.
const ALL: [&str; 2] = ["--max-unavailable", "100%"];

fn place() -> Place {
    with_page(Place::new())
}

fn with_page(place: Place) -> Place {
    std::fs::write(place.path("children.php"), CHILDREN_PHP).unwrap();
    place
}

fn start(place: &Place, options: &[&str], variables: &[(&str, &str)]) -> Server {
    let mut command = place.run(options, &PHP);
    Server::start_command(command.envs(variables.iter().copied()))
}

/// A request that waits for a program that the request has started.
struct Waiting<'a> {
    place: &'a Place,
    name: String,
    gate: File,
}

impl<'a> Waiting<'a> {
    fn new(place: &'a Place, name: &str) -> Self {
        let name = place.path(name).to_string_lossy().into_owned();
        let gate = format!("{name}.gate");
        nix::unistd::mkfifo(gate.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
        // The FIFO is also opened for reading, so that the open does not wait for a peer.
        let gate = File::options().read(true).write(true).open(gate).unwrap();
        Self { place, name, gate }
    }

    fn target(&self) -> String {
        format!("/children.php?do=wait&name={}", self.name)
    }

    /// Returns the pid of the program that the request waits for, once that program has started.
    fn has_begun(&self) -> i32 {
        number_in(Path::new(&format!("{}.in", self.name)))
    }

    fn let_go(&mut self) {
        self.gate.write_all(b"go\n").unwrap();
    }

    fn ask(&self) -> String {
        self.place.text(&self.target())
    }
}

/// Returns the number in a file that is being written.
fn number_in(path: &Path) -> i32 {
    wait_until("a process has written its pid", || {
        let text = std::fs::read_to_string(path).ok()?;
        text.strip_suffix('\n')?.parse().ok()
    })
}

/// Kills a leftover process, whether the test passes or fails.
struct Left(i32);

impl Drop for Left {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0), Signal::SIGKILL);
    }
}

fn lives(pid: i32) -> bool {
    !is_gone(pid)
}

/// Waits until `serving` is the only remaining process of those in `old`.
fn wait_until_only(serving: i32, old: &[i32]) {
    wait_until("only the serving process is left", || {
        let left: Vec<i32> = old.iter().copied().filter(|&pid| lives(pid)).collect();
        (left == [serving]).then_some(())
    });
}

/// Requests a page that waits for a program, calls `done`, and lets the program continue when `done` returns.
fn is_finished(place: &Place, name: &str, server: &mut Server, done: impl FnOnce(&mut Server)) {
    let waiting = Waiting::new(place, name);
    let mut gate = Waiting { gate: waiting.gate.try_clone().unwrap(), place, name: waiting.name.clone() };
    let answer = std::thread::scope(|scope| {
        let client = scope.spawn(|| waiting.ask());
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            waiting.has_begun();
            done(server);
        }));
        gate.let_go();
        let answer = client.join();
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        answer.unwrap()
    });
    assert_eq!(answer, "status=0 out=picture made\n", "{}", server.log());
}

// ---- processes that a page waits for ----

#[test]
fn a_reload_does_not_signal_processes_that_a_request_waits_for() {
    let place = place();
    let mut server = start(&place, &ALL, &[]);
    is_finished(&place, "a", &mut server, |server| {
        server.signal(Signal::SIGHUP);
        server.wait_for("reload done gen=2");
    });
    server.stop();
    assert!(!server.log().contains("signal="), "no process was killed: {}", server.log());
}

#[test]
fn a_stop_does_not_signal_processes_that_a_request_waits_for() {
    let place = place();
    let mut server = start(&place, &[], &[]);
    is_finished(&place, "a", &mut server, |server| {
        server.signal(Signal::SIGTERM);
        server.wait_for("worker exited"); // the other worker, which was idle
    });
    assert_eq!(server.wait_end(), Some(0));
    assert!(!server.log().contains("signal="), "no process was killed: {}", server.log());
}

#[test]
fn recycling_does_not_signal_processes_that_a_request_waits_for() {
    let place = place();
    let mut server = start(&place, &[&ALL[..], &["--max-age", "1s"]].concat(), &[]);
    is_finished(&place, "a", &mut server, |server| {
        for _ in 0..2 {
            server.wait_for("reason=max-age");
        }
        server.wait_for("worker exited");
    });
    server.stop();
}

#[test]
fn children_of_a_program_that_does_not_finish_in_time_are_killed_with_it() {
    let place = place();
    let mut server = start(&place, &["--drain-timeout", "300ms"], &[]);
    let waiting = Waiting::new(&place, "a");
    let child = std::thread::scope(|scope| {
        let client = scope.spawn(|| place.ask(&waiting.target(), b""));
        let child = waiting.has_begun();
        server.signal(Signal::SIGHUP);
        server.wait_for("worker killed: it did not finish in time (--drain-timeout)");
        assert!(client.join().unwrap().is_err());
        child
    });
    wait_until("the child is killed too", || is_gone(child).then_some(()));
    server.stop();
}

// ---- background jobs ----

#[test]
fn background_jobs_survive_recycling_and_a_reload_and_are_killed_at_shutdown() {
    let place = place();
    let mut server = start(&place, &[], &[("PHP_FCGI_MAX_REQUESTS", "1")]);
    let job: i32 = place.text("/children.php?do=background").trim().parse().unwrap();
    server.wait_for("worker exited on its own");
    let session = place.path("session");
    place.text(&format!("/children.php?do=session&name={}", session.display()));
    let apart = Left(number_in(&session));
    server.wait_for("worker exited on its own");
    server.signal(Signal::SIGHUP);
    server.wait_for("reload done gen=2");
    let before = server.workers();
    place.text("/children.php?do=pid");
    wait_until("all programs are replaced", || (server.workers() != before).then_some(()));
    assert!(lives(job) && lives(apart.0), "{}", server.log());
    server.stop();
    let log = server.log();
    assert!(log.contains(&format!("left behind, because the server is exiting pid={job} name=sleep")), "{log}");
    assert!(is_gone(job) && lives(apart.0), "a job with its own session outlives the server");
    let named = format!("still has a listening socket open pid={} name=sleep socket=fastcgi:unix:", apart.0);
    assert!(log.contains(&named), "{log}");
}

#[test]
fn a_job_is_killed_with_a_program_that_crashes() {
    let place = place();
    let mut server = start(&place, &[], &[]);
    let job: i32 = place.text("/children.php?do=background").trim().parse().unwrap();
    for pid in server.workers() {
        if process(pid).is_some_and(|process| process.name == "php-cgi") {
            kill(Pid::from_raw(pid), Signal::SIGSEGV).unwrap();
        }
    }
    server.wait_for("worker died");
    server.wait_for("worker died");
    wait_until("the job has ended", || is_gone(job).then_some(()));
    server.stop();
}

#[test]
fn a_job_that_ignores_term_is_killed_and_the_stop_does_not_wait_for_it() {
    let place = Place::new();
    let text = "trap '' TERM; sh -c 'echo job $$; exec sleep 600' & exec php-cgi";
    let mut server = Server::launch(&mut place.run(&[], &["sh", "-c", text]));
    let line = server.wait_for("| job ");
    let job: i32 = line.rsplit(' ').next().unwrap().parse().unwrap();
    wait_until("the job is sleeping", || (process(job)?.name == "sleep").then_some(()));
    server.wait_for("ready in ");
    server.stop();
    assert!(is_gone(job), "{}", server.log());
    assert!(server.log().contains(&format!("pid={job} name=sleep signal=SIGKILL")), "{}", server.log());
}

/// The process has the listening socket as its standard input, and outlives the server.
#[test]
fn a_process_that_still_holds_the_socket_is_logged_and_the_address_is_free() {
    let place = with_page(Place::with_port());
    let session = place.path("session");
    let mut server = start(&place, &[], &[]);
    place.text(&format!("/children.php?do=session&name={}", session.display()));
    let left = Left(number_in(&session));
    wait_until("the process is sleeping", || (process(left.0)?.name == "sleep").then_some(()));
    server.stop();
    let named = format!("still has a listening socket open pid={} name=sleep socket={}", left.0, place.address);
    assert!(server.log().contains(&named), "{}", server.log());
    assert!(lives(left.0));
    let refused = place.ask("/children.php?do=pid", b"").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{refused}");
    let mut next = start(&place, &[], &[]);
    assert!(place.text("/children.php?do=pid").trim().parse::<i32>().is_ok());
    next.stop();
}

// ---- wrappers ----

/// Returns all descendants of the server with this name.
fn named(server: &Server, name: &str) -> Vec<i32> {
    let mut family = vec![server.pid().as_raw()];
    let mut at = 0;
    while let Some(&pid) = family.get(at) {
        family.extend(children_of(Pid::from_raw(pid)));
        at += 1;
    }
    family.retain(|&pid| process(pid).is_some_and(|process| process.name == name && process.state != 'Z'));
    family
}

/// The wrapper either exits on SIGTERM, or ignores SIGTERM and waits for its child.
#[test]
fn a_wrapper_and_its_children_exit_together_when_the_request_is_finished() {
    for script in ["\"$@\"; true", "trap : TERM; \"$@\"; true", "trap '' TERM; (trap - TERM; exec \"$@\"); true"] {
        let place = place();
        let command = [&["sh", "-c", script, "sh"][..], &PHP].concat();
        let mut server = Server::start_command(&mut place.run(&ALL, &command));
        let old = wait_until("both wrappers have started php-cgi", || {
            Some(named(&server, "php-cgi")).filter(|all| all.len() == 2)
        });
        is_finished(&place, "a", &mut server, |server| {
            server.signal(Signal::SIGHUP);
            server.wait_for("reload done gen=2");
            wait_until("the idle process is gone", || {
                (old.iter().filter(|&&pid| is_gone(pid)).count() == 1).then_some(())
            });
        });
        wait_until("all old processes are gone", || old.iter().all(|&pid| is_gone(pid)).then_some(()));
        wait_until("there are two new processes", || (named(&server, "php-cgi").len() == 2).then_some(()));
        server.stop();
        assert!(!server.log().contains("signal=KILL"), "{script}: {}", server.log());
    }
}

/// Each process of this program serves one connection at a time. SIGTERM kills a process that does not handle it.
const SERVE: &str = r"#!/usr/bin/env python3
import os, re, select, signal, socket, struct, sys
s = socket.socket(fileno=0)
busy, leaving = [], []
def serve(c):
    request = b''
    while not request.endswith(b'\1\5\0\1\0\0\0\0'): request += c.recv(65536)
    named = re.search(rb'name=([\w/.-]+)', request)
    if named:
        name = named[1].decode()
        with open(name + '.in', 'w') as f: print(os.getpid(), file=f)
        with open(name + '.gate') as f: f.readline()
    text = b'Content-Type: text/plain\r\n\r\nstatus=0 out=picture made\n'
    c.sendall(struct.pack('>BBHHBB', 1, 6, 1, len(text), 0, 0) + text + struct.pack('>BBHHBB8x', 1, 3, 1, 8, 0, 0))
    c.close()
";

/// With this, the program exits on SIGTERM: immediately, or after its request.
const HANDLE_SIGTERM: &str = "def leave(*_):\n  print('leaves', flush=True)\n  leaving.append(1)\n  if not busy: os._exit(0)\n\
                              signal.signal(signal.SIGTERM, leave)\n";
const SERVE_UNTIL_ASKED: &str =
    "while not leaving:\n  c = s.accept()[0]\n  busy.append(1)\n  serve(c)\n  busy.clear()\n";

/// A program that only waits for its two children, which serve requests.
const TWO_CHILDREN: &str =
    "for _ in range(2):\n  if os.fork() == 0:\n    while True: serve(s.accept()[0])\nos.wait()\n";

/// The server first sends SIGTERM only to the program, and the signal kills the program. At this point, the children have not been asked to
/// exit.
#[test]
fn children_of_a_program_killed_by_sigterm_finish_their_requests() {
    let place = Place::new();
    let script = place.script("app", &format!("{SERVE}{TWO_CHILDREN}"));
    let nested = ["sh", "-c", "\"$@\"; true", "sh", &script];
    let asked = [Some(Signal::SIGHUP), Some(Signal::SIGTERM), None];
    for (index, (command, signal)) in
        [&nested[4..], &nested].into_iter().flat_map(|command| asked.map(|signal| (command, signal))).enumerate()
    {
        let options = [&ALL[..], if signal.is_none() { &["--max-age", "1s"] } else { &[] }].concat();
        let mut server = Server::start_command(&mut place.run(&options, command));
        wait_until("all processes have started", || (named(&server, "python3").len() >= 6).then_some(()));
        let name = format!("request-{index}");
        let serving = || number_in(&place.path(&format!("{name}.in")));
        is_finished(&place, &name, &mut server, |server| {
            // The processes are listed as late as possible, because --max-age may replace processes at any time. A process
            // whose parent exits during the listing may be missing.
            let old = wait_until("the serving process is in the list", || {
                Some(named(server, "python3")).filter(|all| all.contains(&serving()))
            });
            signal.iter().for_each(|signal| server.signal(*signal));
            wait_until_only(serving(), &old);
        });
        let serving = serving();
        wait_until("the serving process has exited too", || is_gone(serving).then_some(()));
        if signal == Some(Signal::SIGTERM) {
            assert_eq!(server.wait_end(), Some(0));
        } else {
            server.stop();
        }
        assert!(!server.log().contains("killed"), "{command:?} {signal:?}: {}", server.log());
    }
}

/// A request is in flight when the listening socket closes. The program handles SIGTERM, or does not.
#[test]
fn a_stop_waits_for_the_request_of_a_program_on_any_kind_of_socket() {
    for (kind, handles) in
        [("path", true), ("path", false), ("abstract", true), ("abstract", false), ("port", true), ("port", false)]
    {
        let mut place = if kind == "port" { Place::with_port() } else { Place::new() };
        if kind == "abstract" {
            place.address = format!("fastcgi:unix:@{}", place.path("app").display());
        }
        let handler = if handles { HANDLE_SIGTERM } else { "" };
        let script = place.script("app", &format!("{SERVE}{handler}{SERVE_UNTIL_ASKED}"));
        let mut server = Server::start_command(&mut place.run(&[], &[&script]));
        is_finished(&place, "request", &mut server, |server| {
            server.signal(Signal::SIGTERM);
            server.wait_for("new connections are refused");
        });
        assert_eq!(server.wait_end(), Some(0), "{kind} {handles}");
        let log = server.log();
        assert!(!log.contains("killed"), "{kind} {handles}: {log}");
        assert!(!handles || log.contains("status=0"), "{kind}: {log}");
    }
}

/// A program that uses libfcgi as its documentation shows.
const PLAIN_C: &str = r#"
#include <fcgi_stdio.h>
int main(void) {
    while (FCGI_Accept() >= 0) printf("Content-Type: text/plain\r\n\r\nhello\n");
    return 0;
}
"#;

/// Clients send short requests, so that a process often accepts a connection at the moment when it is to be sent SIGTERM.
#[test]
fn sigterm_is_sent_to_a_program_while_it_serves_no_request() {
    let place = Place::new();
    let alone = place.script("alone", &format!("{SERVE}while True: serve(s.accept()[0])\n"));
    let parent = place.script("parent", &format!("{SERVE}{TWO_CHILDREN}"));
    let plain = place.compile("plain", PLAIN_C);
    let wrapped = |command| ["sh", "-c", "\"$@\"; true", "sh", command];
    let commands =
        [&[alone.as_str()][..], &[&plain], &[&parent], &wrapped(&alone), &wrapped(&plain), &wrapped(&parent)];
    for command in commands {
        let mut server = Server::start_command(&mut place.run(&ALL, command));
        let stop = AtomicBool::new(false);
        let is_plain = command.contains(&plain.as_str());
        let expected: &[u8] = if is_plain { b"hello\n" } else { b"status=0 out=picture made\n" };
        std::thread::scope(|scope| {
            let client = || {
                while !stop.load(Ordering::SeqCst) {
                    match place.ask("/", b"") {
                        Ok(response) => assert_eq!(response.body(), expected),
                        // The server has stopped.
                        Err(error)
                            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
                        {
                            return;
                        }
                        Err(error) => panic!("{command:?}: {error}"),
                    }
                }
            };
            // libfcgi handles SIGTERM, so the server waits only a second for an idle moment, which one client leaves often.
            let count = if is_plain { 1 } else { 3 };
            let clients: Vec<_> = (0..count).map(|_| scope.spawn(client)).collect();
            let _clients_end = StopOnDrop(&stop);
            for reload in 2..8 {
                server.signal(Signal::SIGHUP);
                server.wait_for(&format!("reload done gen={reload}"));
                assert!(clients.iter().all(|client| !client.is_finished()), "{command:?}: a request failed");
            }
            server.stop();
        });
        assert!(!server.log().contains("killed"), "{command:?}: {}", server.log());
    }
}

#[test]
fn an_upgrade_does_not_change_the_drain_deadline_of_serving_children() {
    let place = Place::new();
    let script = place.script("app", &format!("{SERVE}{TWO_CHILDREN}"));
    // The drain timeout is long enough for the reload and the upgrade, even on a busy machine.
    let options = [&ALL[..], &["--drain-timeout", "10s"]].concat();
    let mut server = Server::start_command(&mut place.run(&options, &[&script]));
    let old = wait_until("all processes have started", || Some(named(&server, "python3")).filter(|all| all.len() == 6));
    let waiting = Waiting::new(&place, "request");
    std::thread::scope(|scope| {
        let client = scope.spawn(|| waiting.ask());
        let serving = waiting.has_begun();
        server.signal(Signal::SIGHUP);
        wait_until_only(serving, &old);
        server.signal(Signal::SIGUSR2);
        server.wait_for("upgraded");
        let killed = format!("did not exit in time (--drain-timeout) pid={serving} ");
        wait_until("the child is killed at its drain deadline", || server.log().contains(&killed).then_some(()));
        assert!(client.join().is_err(), "the request received no response");
    });
    server.stop();
}

/// The master may never observe a process without a connection. A program with an event loop is sent SIGTERM immediately; other programs
/// are sent SIGTERM after half of their drain timeout.
#[test]
fn children_that_handle_sigterm_are_asked_to_exit_while_they_serve() {
    let place = Place::new();
    let wait = "if sys.argv[1] == 'loop':\n  e = select.epoll()\n  e.register(0, select.EPOLLIN)\n  e.poll()\n";
    let script = place.script("app", &format!("{SERVE}{HANDLE_SIGTERM}{wait}{SERVE_UNTIL_ASKED}"));
    for (kind, drain_timeout) in [("loop", "1h"), ("blocking", "20s")] {
        let command = ["sh", "-c", "\"$@\"; true", "sh", &script, kind];
        let options = [&ALL[..], &["--drain-timeout", drain_timeout]].concat();
        let mut server = Server::start_command(&mut place.run(&options, &command));
        is_finished(&place, kind, &mut server, |server| {
            server.signal(Signal::SIGHUP);
            server.wait_for("| leaves");
            server.wait_for("| leaves"); // the other worker was idle
        });
        server.stop();
        assert!(!server.log().contains("killed"), "{kind}: {}", server.log());
    }
}

#[test]
fn children_of_php_cgi_finish_their_requests() {
    let place = place();
    let mut server = start(&place, &[&ALL[..], &["--env", "PHP_FCGI_CHILDREN=3"]].concat(), &[]);
    wait_until("php-cgi has two parents with three children each", || {
        (named(&server, "php-cgi").len() == 8).then_some(())
    });
    for (signal, line) in [(Signal::SIGHUP, "reload done gen=2"), (Signal::SIGTERM, "worker exited")] {
        let name = place.path(signal.as_str()).to_string_lossy().into_owned();
        let answer = std::thread::scope(|scope| {
            let client = scope.spawn(|| place.text(&format!("/children.php?do=wait-itself&name={name}")));
            wait_until("the page waits", || Path::new(&format!("{name}.in")).exists().then_some(()));
            server.signal(signal);
            server.wait_for(line);
            server.wait_for("worker exited");
            std::fs::write(format!("{name}.go"), "").unwrap();
            client.join().unwrap()
        });
        assert_eq!(answer, "waited\n", "{}", server.log());
    }
    assert_eq!(server.wait_end(), Some(0));
    assert!(named(&server, "php-cgi").is_empty(), "{}", server.log());
    assert!(!server.log().contains("signal=KILL"), "{}", server.log());
}

#[test]
fn the_workers_of_a_perl_manager_and_their_children_finish() {
    let place = Place::new();
    let text = "#!/usr/bin/perl\nuse FCGI; use FCGI::ProcManager;\n\
        my $manager = FCGI::ProcManager->new({ n_processes => 2 });\n\
        my %env; my $request = FCGI::Request(\\*STDIN, \\*STDOUT, \\*NOT_STDERR, \\%env);\n\
        $manager->pm_manage();\n\
        while ($request->Accept() >= 0) {\n  $manager->pm_pre_dispatch();\n\
          my ($name) = $env{QUERY_STRING} =~ /name=(.*)/;\n\
          my $said = `echo \\$\\$ > $name.in; read line < $name.gate; echo picture made`;\n\
          chomp $said; print \"Content-Type: text/plain\\r\\n\\r\\nstatus=$? out=$said\\n\";\n\
          $manager->pm_post_dispatch();\n}\n";
    let script = place.script("managed", text);
    let mut server = Server::start_command(&mut place.run(&ALL, &[&script]));
    is_finished(&place, "a", &mut server, |server| {
        server.signal(Signal::SIGHUP);
        server.wait_for("reload done gen=2");
    });
    server.stop();
    assert!(!server.log().contains("signal=KILL"), "{}", server.log());
}

/// A process that its parent program has left behind still accepts connections, so it would compete with the replacement.
#[test]
fn a_left_behind_process_that_accepts_connections_is_asked_to_exit() {
    let place = place();
    let command = [&["setsid"][..], &PHP].concat();
    // setsid forks, and the parent exits with status 0.
    let mut server = Server::launch(&mut place.run(&[], &command));
    server.wait_for("sent SIGTERM to a process that a worker left behind, because it accepts connections");
    server.wait_for("workers die before they are ready");
    server.stop();
    assert!(named(&server, "php-cgi").is_empty(), "{}", server.log());
}

// ---- changes to the listening socket by a child ----

#[test]
fn a_child_that_makes_the_socket_non_blocking_does_no_harm() {
    let place = place();
    let mut server = start(&place, &[], &[]);
    for _ in 0..3 {
        assert_eq!(place.text("/children.php?do=non-blocking"), "done\n");
        server.wait_for("made the listening socket blocking again");
    }
    for _ in 0..20 {
        place.text("/children.php?do=pid");
    }
    let left = |server: &Server| server.log().matches("exited on its own").count();
    assert!(left(&server) <= 9, "{}", server.log());
    assert_eq!(place.text("/children.php?do=non-blocking"), "done\n");
    server.signal(Signal::SIGHUP);
    server.wait_for("reload done gen=2");
    place.text("/children.php?do=pid");
    server.stop();
}

#[test]
fn a_child_that_shuts_the_socket_down_does_no_lasting_harm() {
    for place in [place(), with_page(Place::with_port())] {
        let mut server = start(&place, &["--socket-mode", "600"], &[]);
        let _ = place.ask("/children.php?do=shutdown", b""); // the result of this request does not matter
        server.wait_for("recreated the listening socket");
        wait_until("the request is answered again", || place.ask("/children.php?do=pid", b"").ok());
        server.signal(Signal::SIGHUP);
        server.wait_for("reload done gen=2");
        place.text("/children.php?do=pid");
        if place.socket().exists() {
            use std::os::unix::fs::PermissionsExt as _;
            assert_eq!(std::fs::metadata(place.socket()).unwrap().permissions().mode() & 0o777, 0o600);
        }
        server.stop();
        assert!(!place.socket().exists(), "the new file is removed too");
    }
}

/// This test uses a socket that another program has passed to the server.
#[test]
fn an_inherited_socket_that_was_shut_down_listens_again() {
    let place = with_page(Place::with_port());
    let listener = std::net::TcpListener::bind(place.address.strip_prefix("fastcgi:").unwrap()).unwrap();
    let mut command = Command::new(common::program("forkyard"));
    // Standard input is a listening socket, so --bind is not needed.
    command
        .args(["run", "--direct", "--workers", "2", "--"])
        .args(PHP)
        .stdin(std::process::Stdio::from(std::os::fd::OwnedFd::from(listener)));
    let mut server = Server::start_command(&mut command);
    let _ = place.ask("/children.php?do=shutdown", b"");
    server.wait_for("recreated the listening socket");
    wait_until("the request is answered again", || place.ask("/children.php?do=pid", b"").ok());
    server.stop();
}

/// Node, Go and similar runtimes make the socket non-blocking themselves, and rely on the socket to stay non-blocking.
#[test]
fn a_program_with_an_event_loop_keeps_its_socket_non_blocking() {
    let place = Place::new();
    let text = "#!/usr/bin/env python3\nimport os, select, signal, socket, sys\nos.set_blocking(0, False)\n\
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n\
        e = select.epoll()\ne.register(0, select.EPOLLIN)\nprint('up', flush=True)\nwhile True: e.poll()\n";
    let script = place.script("loop", text);
    let mut server = Server::start_command(&mut place.run(&[], &[&script]));
    let old = server.workers();
    kill(Pid::from_raw(*old.first().unwrap()), Signal::SIGKILL).unwrap();
    server.wait_for("worker died");
    wait_until("the program is replaced", || Some(server.workers()).filter(|all| all.len() == 2 && *all != old));
    server.signal(Signal::SIGHUP);
    server.wait_for("reload done gen=2");
    server.stop();
    assert!(!server.log().contains("blocking again"), "{}", server.log());
    assert!(
        !server.log().contains("signal=KILL") || server.log().matches("signal=KILL").count() == 1,
        "{}",
        server.log()
    );
}

// ---- fcgiwrap ----

#[test]
fn fcgiwrap_runs_any_cgi_script() {
    let place = Place::new();
    place.script(
        "hello.cgi",
        "#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\nhello from %s\\n' \"$SCRIPT_NAME\"\n",
    );
    let mut server = Server::start_command(&mut place.run(&[], &["fcgiwrap"]));
    for _ in 0..3 {
        assert_eq!(place.text("/hello.cgi"), "hello from /hello.cgi\n");
    }
    server.signal(Signal::SIGHUP);
    server.wait_for("reload done gen=2");
    assert_eq!(place.text("/hello.cgi"), "hello from /hello.cgi\n");
    server.stop();
}
