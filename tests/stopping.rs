//! Listening sockets when a server stops or is killed: new connections are refused immediately, earlier connections are served, and the
//! address is free for the next server.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{self, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::limit::InTime as _;
use common::raw::{self, ALL, Protocol};
use common::{PATIENCE, Server, free_port, is_gone, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Timeouts so long that the test fails if a process waits for one of them to expire.
const FOR_EVER: [&str; 6] = ["--drain-timeout", "10m", "--start-timeout", "10m", "--workers", "1"];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Family {
    Tcp,
    Path,
    Abstract,
}

const FAMILIES: [Family; 3] = [Family::Tcp, Family::Path, Family::Abstract];

/// A directory for `staged`, and an address.
struct Place {
    directory: TempDir,
    /// The address for `--bind`, without the protocol.
    address: String,
}

impl Place {
    fn new(family: Family) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let address = match family {
            Family::Tcp => format!("127.0.0.1:{}", free_port()),
            Family::Path => format!("unix:{}", directory.path().join("app.sock").display()),
            Family::Abstract => format!("unix:@{}", directory.path().display()),
        };
        Self { directory, address }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn go(&self) {
        std::fs::write(self.path("go"), "").unwrap();
    }

    fn bind(&self, protocol: Protocol) -> String {
        let name = match protocol {
            Protocol::Http => "http",
            Protocol::FastCgi => "fastcgi",
            Protocol::Scgi => "scgi",
        };
        format!("{name}:{}", self.address)
    }

    fn staged(&self, protocol: Protocol, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("staged"));
        command.env("STAGED", self.directory.path()).args(["--bind", &self.bind(protocol)]).args(arguments);
        command
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let stream = match self.address.strip_prefix("unix:") {
            Some(path) if path.starts_with('@') => {
                UnixStream::connect_addr(&net::SocketAddr::from_abstract_name(&path[1..])?)?
            }
            Some(path) => common::connect_unix(path)?,
            None => {
                let address: SocketAddr = self.address.parse().unwrap();
                OwnedFd::from(TcpStream::connect_timeout(&address, PATIENCE)?).into()
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Opens a connection, and sends a request on it.
    fn send(&self, protocol: Protocol, target: &str) -> UnixStream {
        let mut stream = self.connect().unwrap();
        stream.write_all(&protocol.head("GET", target, 0)).unwrap();
        stream
    }

    /// Checks that a connection is refused, if necessary after TCP's retransmissions.
    fn is_refused(&self) {
        let error = self.connect().expect_err("no process accepts").kind();
        assert!(matches!(error, ErrorKind::ConnectionRefused | ErrorKind::NotFound), "{error}");
    }
}

/// Reads the whole response.
fn answer(stream: &mut UnixStream) -> (u16, String) {
    let (status, mut response) = raw::ask(stream, b"");
    let mut piece = [0; 4096];
    while !response.ends_with(b"went\n") && !String::from_utf8_lossy(&response).contains("went") {
        let count = stream.read(&mut piece).unwrap();
        assert!(count > 0, "the response ended after {:?}", String::from_utf8_lossy(&response));
        response.extend_from_slice(&piece[..count]);
    }
    (status, String::from_utf8_lossy(&response).into_owned())
}

fn went(stream: &mut UnixStream) {
    let (status, text) = answer(stream);
    assert_eq!(status, 200, "{text}");
}

#[test]
fn a_stopping_server_refuses_new_connections_immediately_and_finishes_its_requests() {
    for protocol in ALL {
        for family in FAMILIES {
            let place = Place::new(family);
            let mut server = Server::start_command(&mut place.staged(protocol, &FOR_EVER));
            let mut served = place.send(protocol, "/until");
            server.wait_for("waits");
            server.signal(Signal::SIGTERM);
            server.wait_for("new connections are refused");
            place.is_refused();
            assert!(!place.path("app.sock").exists());
            // The next server can start while this server is still draining.
            let mut next = Server::start_command(&mut place.staged(protocol, &FOR_EVER[2..]));
            place.go();
            went(&mut served);
            went(&mut place.send(protocol, "/until"));
            drop(served);
            assert_eq!(server.wait_end(), Some(0), "{protocol:?} {family:?}");
            went(&mut place.send(protocol, "/until"));
            next.stop();
        }
    }
}

#[test]
fn connections_queued_at_a_stop_are_served_and_later_ones_are_refused() {
    for protocol in ALL {
        for family in FAMILIES {
            let place = Place::new(family);
            let mut server = Server::start_command(&mut place.staged(protocol, &FOR_EVER));
            let worker = Pid::from_raw(*server.workers().first().unwrap());
            common::stop(worker);
            let mut queued = [(); 3].map(|()| place.send(protocol, "/until"));
            server.signal(Signal::SIGTERM);
            server.wait_for("signal to drain");
            if family != Family::Tcp {
                // On Unix sockets, refusing new connections does not reset the queued connections.
                wait_until("new connections are refused", || place.connect().is_err().then_some(()));
            }
            kill(worker, Signal::SIGCONT).unwrap();
            server.wait_for("new connections are refused");
            place.is_refused();
            place.go();
            queued.iter_mut().for_each(went);
            drop(queued);
            assert_eq!(server.wait_end(), Some(0));
        }
    }
}

#[test]
fn a_worker_whose_event_loop_is_busy_does_not_keep_the_socket_open() {
    for family in FAMILIES {
        let place = Place::new(family);
        let mut server = Server::start_command(&mut place.staged(Protocol::Http, &FOR_EVER));
        let mut served = place.send(Protocol::Http, "/block");
        server.wait_for("blocks");
        server.signal(Signal::SIGTERM);
        server.wait_for("new connections are refused");
        place.is_refused();
        place.go();
        went(&mut served);
        drop(served);
        assert_eq!(server.wait_end(), Some(0));
    }
}

#[test]
fn a_signal_without_effect_in_a_drain_is_logged_as_ignored() {
    let place = Place::new(Family::Path);
    let control = place.path("control");
    let arguments = [&FOR_EVER[..], &["--control", control.to_str().unwrap()]].concat();
    let mut server = Server::start_command(&mut place.staged(Protocol::Http, &arguments));
    let mut served = place.send(Protocol::Http, "/until");
    server.wait_for("waits");
    server.signal(Signal::SIGTERM);
    server.wait_for("new connections are refused");
    let signals = [Signal::SIGHUP, Signal::SIGTTIN, Signal::SIGTTOU, Signal::SIGUSR2, Signal::SIGTERM];
    for signal in signals {
        server.signal(signal);
        let line = server.wait_for("a signal to ");
        let is_ignored = line.contains("ignored a signal to ") && line.ends_with(", because the server is stopping");
        assert!(is_ignored, "{signal}: {line}");
    }
    let reload = Command::new(program("staged")).args(["reload", "--control"]).arg(&control).output_in_time().unwrap();
    assert_eq!(reload.status.code(), Some(1));
    server.wait_for("ignored a command, because the server is stopping command=reload");
    // Commands that do not change processes still work.
    for command in [&["reopen-logs"][..], &["status"], &["quarantine", "ls"], &["cache", "stats"], &["events", "ls"]] {
        let mut asked = Command::new(program("staged"));
        let done = asked.args(command).arg("--control").arg(&control).output_in_time().unwrap();
        assert!(done.status.success(), "{command:?}: {done:?}");
    }
    server.wait_for("log files reopened errors=0");
    place.go();
    went(&mut served);
    drop(served);
    assert_eq!(server.wait_end(), Some(0));

    let place = Place::new(Family::Path);
    let mut server = Server::start_command(&mut place.staged(Protocol::Http, &FOR_EVER));
    let _served = place.send(Protocol::Http, "/until");
    server.wait_for("waits");
    server.signal(Signal::SIGTERM);
    server.wait_for("new connections are refused");
    server.signal(Signal::SIGINT);
    let line = server.wait_for("a signal to ");
    assert!(!line.contains("ignored"), "{line}");
    assert_eq!(server.wait_end(), Some(0));
}

#[test]
fn a_reload_refuses_no_connection() {
    for family in FAMILIES {
        let place = Place::new(family);
        let mut server = Server::start_command(&mut place.staged(Protocol::Http, &FOR_EVER));
        let mut served = place.send(Protocol::Http, "/until");
        server.wait_for("waits");
        let old = *server.workers().first().unwrap();
        server.signal(Signal::SIGHUP);
        server.wait_for("reload done");
        // The old worker is draining, and no longer holds a listening socket.
        wait_until("the old worker closes its listening sockets", || (listening(old) == 0).then_some(()));
        let mut next = place.send(Protocol::Http, "/until");
        server.wait_for("waits");
        place.go();
        went(&mut served);
        went(&mut next);
        drop((served, next));
        wait_until("the old worker exits", || is_gone(old).then_some(()));
        server.stop();
    }
}

/// Returns the number of listening sockets that a process holds.
fn listening(pid: i32) -> usize {
    let table = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
    let row = |line: &str| line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let tcp = table("tcp").lines().map(row).filter(|row| row[3] == "0A").map(|row| row[9].clone()).collect::<Vec<_>>();
    let unix = table("unix").lines().map(row).filter(|row| row[3] == "00010000").map(|row| row[6].clone()).collect();
    let inodes: Vec<String> = [tcp, unix].concat();
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().filter_map(Result::ok);
    let targets = links.filter_map(|link| std::fs::read_link(link.path()).ok());
    let targets = targets.map(|target| target.to_string_lossy().into_owned());
    targets.filter(|target| inodes.iter().any(|inode| *target == format!("socket:[{inode}]"))).count()
}

#[test]
fn a_socket_passed_to_the_server_continues_to_listen() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
        let place = Place::new(Family::Tcp);
        let listener = std::net::TcpListener::bind(&place.address).unwrap();
        let own = Place::new(Family::Tcp);
        let start = |listener: std::net::TcpListener, arguments: &[&str]| {
            let mut command = Command::new(program("staged"));
            command.env("STAGED", place.directory.path()).args(FOR_EVER).args(["--bind", "http:fd:0"]).args(arguments);
            Server::start_command(command.stdin(Stdio::from(OwnedFd::from(listener))))
        };
        let mut server = start(listener.try_clone().unwrap(), &["--bind", &own.bind(Protocol::Http)]);
        let mut served = place.send(Protocol::Http, "/until");
        server.wait_for("waits");
        server.signal(signal);
        wait_until("connections to the server's own address are refused", || own.connect().is_err().then_some(()));
        // This connection waits for the next server.
        let mut waiting = place.send(Protocol::Http, "/until");
        place.go();
        if signal != Signal::SIGINT {
            went(&mut served);
        }
        drop(served);
        let _ = server.wait_end();
        let mut next = start(listener, &[]);
        went(&mut waiting);
        drop(waiting);
        next.stop();
    }
}

#[test]
fn the_address_of_a_killed_master_is_free_immediately_whatever_its_workers_serve() {
    for protocol in ALL {
        for family in FAMILIES {
            for target in ["/until", "/block"] {
                if (target, family) == ("/block", Family::Abstract) {
                    continue; // the name stays in use until the event loop closes the socket
                }
                let place = Place::new(family);
                let mut killed = Server::start_command(&mut place.staged(protocol, &["--workers", "2"]));
                let mut served = place.send(protocol, target);
                killed.wait_for(if target == "/until" { "waits" } else { "blocks" });
                let idle = place.connect().unwrap();
                let workers = killed.workers();
                killed.signal(Signal::SIGKILL);
                let mut next = Server::start_command(&mut place.staged(protocol, &["--workers", "1"]));
                assert!(workers.iter().any(|&pid| !is_gone(pid)), "the workers are still serving");
                place.go();
                went(&mut served);
                went(&mut place.send(protocol, "/until"));
                drop((served, idle));
                wait_until("the workers exit", || workers.iter().all(|&pid| is_gone(pid)).then_some(()));
                went(&mut place.send(protocol, "/until"));
                next.stop();
                let _ = killed.wait_end();
            }
        }
    }
}

/// Returns the command for php-cgi with a page that blocks.
fn run_php(place: &Place, arguments: &[&str]) -> Command {
    let page =
        "<?php echo getmypid(), \" waits\\n\"; flush(); while (!file_exists(__DIR__.'/go')) usleep(5000); echo 'went';";
    std::fs::write(place.path("until.php"), page).unwrap();
    let mut command = Command::new(program("forkyard"));
    command.args(["run", "--direct", "--bind", &place.bind(Protocol::FastCgi), "--workers", "2"]).args(arguments);
    command.args(["--", "php-cgi", "-d", "output_buffering=0"]);
    command
}

fn send_to_php(place: &Place) -> UnixStream {
    use common::fastcgi::{PARAMS, STDIN, begin, pair, record};
    let script = place.path("until.php");
    let params = [("REQUEST_METHOD", "GET"), ("SCRIPT_FILENAME", script.to_str().unwrap()), ("QUERY_STRING", "")];
    let params = params.map(|(name, value)| pair(name, value)).concat();
    let records =
        [begin(1, 1, false), record(PARAMS, 1, &params, 0), record(PARAMS, 1, b"", 0), record(STDIN, 1, b"", 0)];
    let mut stream = place.connect().unwrap();
    stream.write_all(&records.concat()).unwrap();
    stream
}

/// Reads to the end of the page, and closes the connection, because php-cgi accepts no other connection before that.
fn php_went(mut stream: UnixStream) {
    read_until(&mut stream, "went");
}

fn read_until(stream: &mut UnixStream, what: &str) {
    let (mut text, mut piece) = (Vec::new(), [0; 4096]);
    while !String::from_utf8_lossy(&text).contains(what) {
        let count = stream.read(&mut piece).unwrap();
        assert!(count > 0, "the response ended after {:?}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&piece[..count]);
    }
}

#[test]
fn stopping_programs_serve_queued_connections_and_others_are_refused() {
    for family in FAMILIES {
        let place = Place::new(family);
        let mut server = Server::start_command(&mut run_php(&place, &FOR_EVER[..2]));
        let mut served = [(); 2].map(|()| send_to_php(&place));
        served.iter_mut().for_each(|stream| read_until(stream, "waits"));
        let queued = [(); 2].map(|()| send_to_php(&place));
        server.signal(Signal::SIGTERM);
        server.wait_for("signal to drain");
        if family != Family::Tcp {
            wait_until("new connections are refused", || place.connect().is_err().then_some(()));
        }
        place.go();
        served.into_iter().chain(queued).for_each(php_went);
        wait_until("new connections are refused", || place.connect().is_err().then_some(()));
        assert_eq!(server.wait_end(), Some(0), "{family:?}");
        assert!(!server.log().contains("are reset"), "{}", server.log());
    }
}

#[test]
fn programs_that_end_during_the_drain_are_replaced_while_connections_are_queued() {
    for (family, crash) in FAMILIES.into_iter().flat_map(|family| [(family, false), (family, true)]) {
        let place = Place::new(family);
        let most = if crash { "1000" } else { "2" };
        let mut server = Server::start_command(run_php(&place, &FOR_EVER[..4]).env("PHP_FCGI_MAX_REQUESTS", most));
        let mut served = [(); 2].map(|()| send_to_php(&place));
        served.iter_mut().for_each(|stream| read_until(stream, "waits"));
        let queued = [(); 5].map(|()| send_to_php(&place));
        let first = server.workers();
        server.signal(Signal::SIGTERM);
        server.wait_for("signal to drain");
        place.go();
        if crash {
            first.into_iter().for_each(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap());
        } else {
            served.into_iter().for_each(php_went);
        }
        queued.into_iter().for_each(php_went);
        assert_eq!(server.wait_end(), Some(0), "{family:?}");
        assert!(!server.log().contains("are reset"), "{}", server.log());
    }
}

#[test]
fn processes_starting_at_a_stop_serve_queued_connections() {
    for (family, is_program) in FAMILIES.into_iter().flat_map(|family| [(family, false), (family, true)]) {
        let place = Place::new(family);
        nix::unistd::mkfifo(&place.path("factory"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut command = place.staged(Protocol::Http, &[]);
        if is_program {
            run_php(&place, &[]); // creates the page
            command = Command::new(program("forkyard"));
            command.args(["run", "--direct", "--bind", &place.bind(Protocol::FastCgi), "--settle", "10m"]);
        }
        command.args(&FOR_EVER[..4]).args(["--workers", "0..2"]).current_dir(place.directory.path());
        if is_program {
            command.args(["--", "sh", "-c", "read x < factory; exec php-cgi"]);
        }
        let mut server = Server::start_command(&mut command);
        let send = || if is_program { send_to_php(&place) } else { place.send(Protocol::Http, "/until") };
        let queued = [(); 3].map(|()| send());
        let factory = hold(&place.path("factory"));
        server.signal(Signal::SIGTERM);
        server.wait_for("signal to drain");
        place.go();
        drop(factory);
        for mut stream in queued {
            if is_program { php_went(stream) } else { went(&mut stream) }
        }
        assert_eq!(server.wait_end(), Some(0), "{family:?}");
        assert!(!server.log().contains("are reset"), "{}", server.log());
    }
}

#[test]
fn stopping_programs_without_queued_connections_refuse_immediately() {
    for family in FAMILIES {
        let place = Place::new(family);
        let mut server = Server::start_command(&mut run_php(&place, &FOR_EVER[..2]));
        let mut served = send_to_php(&place);
        read_until(&mut served, "waits");
        server.signal(Signal::SIGTERM);
        server.wait_for("new connections are refused");
        place.is_refused();
        place.go();
        php_went(served);
        assert_eq!(server.wait_end(), Some(0), "{family:?}");
    }
}

#[test]
fn connections_that_programs_cannot_accept_within_half_the_drain_timeout_are_reset_and_logged() {
    let place = Place::new(Family::Tcp);
    let mut server = Server::start_command(&mut run_php(&place, &["--drain-timeout", "20s"]));
    let mut served = [(); 2].map(|()| send_to_php(&place));
    served.iter_mut().for_each(|stream| read_until(stream, "waits"));
    let _queued = send_to_php(&place);
    server.signal(Signal::SIGTERM);
    assert!(server.wait_for("are reset").contains("connections=1"));
    place.is_refused();
    place.go();
    served.into_iter().for_each(php_went);
    assert_eq!(server.wait_end(), Some(0));
}

#[test]
fn unaccepted_connections_are_counted_once_and_called_late_only_after_a_wait() {
    for (script, is_late) in [("exec sleep 600", true), ("read go < go; exit 125", false)] {
        let place = Place::new(Family::Tcp);
        nix::unistd::mkfifo(&place.path("go"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut command = Command::new(program("forkyard"));
        command.args([
            "run",
            "--direct",
            "--bind",
            &place.bind(Protocol::FastCgi),
            "--workers",
            "1",
            "--settle",
            "10ms",
        ]);
        command.args(["--drain-timeout", "2s", "--", "sh", "-c", script]).current_dir(place.directory.path());
        let mut server = Server::start_command(&mut command);
        let _queued = [(); 3].map(|()| place.connect().unwrap());
        if is_late {
            server.signal(Signal::SIGTERM);
        } else {
            place.go();
        }
        server.wait_end();
        let log = server.log();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains("are reset")).collect();
        assert!(lines.len() == 1 && lines[0].contains("connections=3"), "{log}");
        assert_eq!(lines[0].contains("in time"), is_late, "{log}");
    }
}

#[test]
fn a_stop_does_not_wait_for_a_worker_that_is_still_starting() {
    for stage in ["factory", "ready"] {
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let place = Place::new(Family::Tcp);
            nix::unistd::mkfifo(&place.path(stage), nix::sys::stat::Mode::S_IRWXU).unwrap();
            let mut server = Server::launch(&mut place.staged(Protocol::Http, &FOR_EVER));
            let _held = hold(&place.path(stage));
            server.signal(signal);
            assert_eq!(server.wait_end(), Some(0), "{stage} {signal}");
        }
    }
}

/// Waits until a process is held at the FIFO. The process continues when the returned file is dropped.
fn hold(fifo: &Path) -> std::fs::File {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::File::options();
    options.write(true).custom_flags(libc::O_NONBLOCK);
    wait_until("the process waits at its FIFO", || options.open(fifo).ok())
}

#[test]
fn a_stop_does_not_wait_for_a_program_that_has_not_started_and_ignores_it() {
    let place = Place::new(Family::Tcp);
    let mut command = Command::new(program("forkyard"));
    command.args(["run", "--direct", "--bind", &place.bind(Protocol::FastCgi), "--settle", "10m"]).args(FOR_EVER);
    command.args(["--", "sh", "-c", "trap '' TERM; echo begun; while :; do sleep 1; done"]);
    let mut server = Server::launch(&mut command);
    server.wait_for("begun");
    server.signal(Signal::SIGTERM);
    server.wait_for("worker killed: it serves no request and did not exit");
    assert_eq!(server.wait_end(), Some(0));
}

#[test]
fn a_pool_in_which_no_process_ever_became_ready_is_abandoned() {
    let place = Place::new(Family::Tcp);
    let mut program_that_fails = Command::new(program("forkyard"));
    program_that_fails.args(["run", "--direct", "--bind", &place.bind(Protocol::FastCgi), "--give-up-after", "1s"]);
    program_that_fails.args(["--", "sh", "-c", "echo no DSN; exit 3"]);
    let mut program_that_ends = Command::new(program("forkyard"));
    program_that_ends.args(["run", "--direct", "--bind", &place.bind(Protocol::FastCgi), "--give-up-after", "1s"]);
    program_that_ends.args(["--", "true"]);
    let broken = place.path("broken");
    std::fs::write(&broken, "").unwrap();
    let mut application = Command::new(program("crashy"));
    application.env("CRASHY_BROKEN", &broken);
    application.args(["--bind", &place.bind(Protocol::Http), "--give-up-after", "1s"]);
    for command in [&mut program_that_fails, &mut program_that_ends, &mut application] {
        let mut server = Server::launch(command);
        server.wait_for("no worker ever became ready");
        assert_eq!(server.wait_end(), Some(1));
        assert!(server.log().contains("--give-up-after"), "{}", server.log());
    }
}

#[test]
fn a_socket_that_was_shut_down_is_logged_and_does_not_delay_the_stop() {
    for family in [Family::Tcp, Family::Path] {
        let place = Place::new(family);
        let arguments = ["--drain-timeout", "10m", "--workers", "2"];
        let mut server = Server::start_command(&mut place.staged(Protocol::Http, &arguments));
        let mut stream = place.send(Protocol::Http, "/deaf");
        assert_eq!(raw::ask(&mut stream, b"").0, 200);
        drop(stream);
        let line = server.wait_for("cannot accept connections for now");
        assert!(line.contains("shutdown(2) on the listening socket") && line.contains(" listener=0"), "{line}");
        server.signal(Signal::SIGTERM);
        assert_eq!(server.wait_end(), Some(0), "{family:?}");
    }
}

#[test]
fn programs_whose_socket_was_shut_down_are_logged() {
    let place = Place::new(Family::Path);
    let mut command = Command::new(program("forkyard"));
    command.args([
        "run",
        "--direct",
        "--bind",
        &place.bind(Protocol::FastCgi),
        "--workers",
        "1",
        "--",
        "python3",
        "-c",
    ]);
    command.arg("import socket; s = socket.socket(fileno=0); s.accept(); s.shutdown(socket.SHUT_RDWR)");
    let mut server = Server::start_command(&mut command);
    drop(place.connect());
    let line = server.wait_for("had shut it down");
    assert!(line.contains("app.sock"), "{line}");
    server.stop();
}

#[test]
fn the_log_file_contains_the_startup() {
    for format in ["text", "json"] {
        let place = Place::new(Family::Tcp);
        let log = place.path("log");
        let arguments = ["--workers", "1", "--log-format", format, "--log-file", log.to_str().unwrap()];
        let mut server = Server::launch(&mut place.staged(Protocol::Http, &arguments));
        let text = wait_until("the server is ready", || {
            std::fs::read_to_string(&log).ok().filter(|text| text.contains("ready in"))
        });
        for fact in [&format!("forkyard {}", env!("CARGO_PKG_VERSION")), &place.address, "workers"] {
            assert!(text.contains(fact), "{fact}: {text}");
        }
        server.stop();
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.contains("signal to drain and stop"), "{text}");

        // The log also contains the reason for a failed startup.
        let taken = std::net::TcpListener::bind(&place.address).unwrap();
        let mut failed = Server::launch(&mut place.staged(Protocol::Http, &arguments));
        assert_eq!(failed.wait_end(), Some(1));
        drop(taken);
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.contains("is in use by another program"), "{text}");
    }
}

// ---- processes that do not belong to the server ----

/// Returns an entry script with a background process that has a child, and with a process that leaves a child behind once `go` exists. The
/// pids of the three sleeping processes are written to files.
fn entry_script(directory: &Path, server: &str) -> String {
    let at = |name: &str| directory.join(name).display().to_string();
    let (parent, child, late, go) = (at("parent"), at("child"), at("late"), at("go"));
    format!(
        "sh -c 'sleep 600 & echo $! > {child}; echo $$ > {parent}; wait' >/dev/null 2>&1 &\n\
         sh -c 'while [ ! -e {go} ]; do sleep 0.01; done; sleep 600 & echo $! > {late}' >/dev/null 2>&1 &\n\
         while [ ! -s {parent} ]; do sleep 0.01; done\n\
         exec {server} \"$@\"\n"
    )
}

fn pid_in(path: &Path) -> i32 {
    wait_until("the pid is in the file", || std::fs::read_to_string(path).ok()?.strip_suffix('\n')?.parse().ok())
}

#[test]
fn children_that_existed_before_the_server_are_left_alone_even_after_an_upgrade() {
    let directory = tempfile::tempdir().unwrap();
    let script = entry_script(directory.path(), program("hello").to_str().unwrap());
    let mut command = Command::new("sh");
    command.args(["-c", &script, "entry", "--bind", "http:127.0.0.1:0", "--workers", "1", "--daemon", "d=sleep 600"]);
    let mut server = Server::start_command(&mut command);
    std::fs::write(directory.path().join("go"), "").unwrap();
    let others = ["parent", "child", "late"].map(|name| pid_in(&directory.path().join(name)));
    wait_until("the parent of the process has exited", || server.children().contains(&others[2]).then_some(()));
    server.signal(Signal::SIGUSR2);
    server.wait_for("upgraded");
    server.wait_for("reload done");
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait_end(), Some(0));
    let lives = others.map(|pid| !is_gone(pid));
    others.iter().filter(|pid| !is_gone(**pid)).for_each(|pid| kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap());
    assert_eq!(lives, [true; 3], "{}", server.log());
    assert!(!server.log().contains("left behind"), "{}", server.log());
}

#[test]
fn the_children_of_an_entry_script_are_left_alone_by_process_1_too() {
    let directory = tempfile::tempdir().unwrap();
    let script = entry_script(directory.path(), program("hello").to_str().unwrap());
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &script, "entry"]);
    command.args(["--bind", "http:127.0.0.1:0", "--workers", "1"]);
    let mut server = Server::start_command(&mut command);
    std::fs::write(directory.path().join("go"), "").unwrap();
    pid_in(&directory.path().join("late"));
    let master = *server.children().first().unwrap();
    kill(Pid::from_raw(master), Signal::SIGTERM).unwrap();
    assert_eq!(server.wait_end(), Some(0));
    assert!(!server.log().contains("left behind"), "{}", server.log());
}
