//! The interface to systemd: passed sockets, and messages to the service manager, whose part the test plays. Also tests the files in
//! `scripts/systemd`.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::IoSliceMut;
use std::net::TcpListener;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::http;
use common::limit::InTime as _;
use common::{PATIENCE, Server, program, sockets_of};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Receives notifications in place of the service manager.
struct Manager {
    _directory: tempfile::TempDir,
    socket: UnixDatagram,
    path: PathBuf,
    stored: Option<OwnedFd>,
}

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { _directory: directory, socket, path, stored: None }
    }

    /// Receives the next message. A descriptor that is attached to the message is stored.
    #[expect(unsafe_code, reason = "nix returns a received descriptor as a number")]
    fn hear(&mut self) -> String {
        let mut text = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let (count, descriptor) = {
            let mut slices = [IoSliceMut::new(&mut text)];
            let got = recvmsg::<()>(self.socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty()).unwrap();
            let descriptor = got.cmsgs().unwrap().find_map(|message| match message {
                ControlMessageOwned::ScmRights(numbers) => numbers.first().copied(),
                _ => None,
            });
            (got.bytes, descriptor)
        };
        if let Some(number) = descriptor {
            // SAFETY: the kernel created the descriptor for this message, and no other code owns it.
            self.stored = Some(unsafe { OwnedFd::from_raw_fd(number) });
        }
        String::from_utf8(text[..count].to_vec()).unwrap()
    }

    /// Receives messages up to the first one that contains this line, and returns that message.
    fn wait_for(&mut self, line: &str) -> String {
        loop {
            let message = self.hear();
            if message.lines().any(|one| one == line) {
                return message;
            }
        }
    }
}

/// Starts a program as systemd does: the descriptors are numbered from 3, and environment variables describe them.
fn start(name: &str, arguments: &[&str], passed: Vec<(&str, OwnedFd)>, manager: &Manager) -> Server {
    let mut command = Command::new("sh");
    let names: Vec<&str> = passed.iter().map(|(name, _)| *name).collect();
    command.env("LISTEN_FDS", passed.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    command.env("NOTIFY_SOCKET", &manager.path);
    let mut passed = passed.into_iter().map(|(_, descriptor)| Stdio::from(descriptor));
    command.stdin(passed.next().unwrap_or_else(Stdio::null));
    command.stdout(passed.next().unwrap_or_else(Stdio::null));
    assert!(passed.next().is_none(), "this function passes at most two descriptors");
    command.arg("-c").arg("exec 3<&0 4>&1 </dev/null >/dev/null; LISTEN_PID=$$ exec \"$0\" \"$@\"");
    Server::start_command(command.arg(program(name)).args(arguments))
}

fn listener() -> (OwnedFd, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener.into(), address)
}

#[test]
fn sockets_from_systemd_are_used_and_their_names_select_the_protocols() {
    let manager = Manager::new();
    let ((web, web_at), (fast, fast_at)) = (listener(), listener());
    let mut server = start("crashy", &["--workers", "1"], vec![("app.socket", web), ("fastcgi", fast)], &manager);
    assert_eq!(server.binds, [format!("http://{web_at}"), format!("fastcgi:{fast_at}")]);
    assert_eq!(http::get(&web_at, "/ok").unwrap().status, 200);
    let mut client = common::fastcgi::Client::connect(&server.binds[1]).unwrap();
    client.send(&common::fastcgi::request(1, false, "GET", "/ok", b"")).unwrap();
    assert_eq!(client.response(1).unwrap().status(), 200);
    drop(client);

    // The sockets survive an upgrade, although they are not passed a second time.
    server.signal(Signal::SIGUSR2);
    server.wait_for("upgraded version=");
    server.wait_for("reload done");
    assert_eq!(http::get(&web_at, "/ok").unwrap().status, 200);
    server.stop();
}

#[test]
fn a_name_that_was_not_passed_is_an_error_that_lists_the_passed_names() {
    let run = |arguments: &str| {
        let (socket, _) = listener();
        let script =
            format!("exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=web exec \"$0\" {arguments}");
        let output = Command::new("sh")
            .arg("-c")
            .arg(script)
            .arg(program("hello"))
            .stdin(socket)
            .output_with_input_in_time()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = run("--bind http:systemd:other");
    assert!(said.contains("systemd passed no socket named 'other', only web (see FileDescriptorName="), "{said}");
    let output = Command::new(program("hello")).args(["--bind", "http:systemd"]).output_in_time().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("systemd passed no socket (add a .socket unit"), "{said}");
}

#[test]
fn the_service_manager_is_notified_of_every_state() {
    let mut manager = Manager::new();
    let mut server = Server::start_command(
        Command::new(program("crashy"))
            .args(["--bind", "http:127.0.0.1:0", "--workers", "1"])
            .env("NOTIFY_SOCKET", &manager.path)
            .env("WATCHDOG_USEC", "40000"),
    );
    manager.wait_for("READY=1");
    manager.wait_for("WATCHDOG=1");
    manager.wait_for("WATCHDOG=1");
    for (signal, done) in [(Signal::SIGHUP, "reload done gen=2"), (Signal::SIGUSR2, "reload done gen=3")] {
        server.signal(signal);
        let message = manager.wait_for("RELOADING=1");
        let since = message.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")).unwrap();
        assert!(since.parse::<u64>().unwrap() > 0);
        manager.wait_for("READY=1");
        server.wait_for(done);
    }
    let address = server.http();
    common::wait_until("the old worker has left", || (server.workers().len() == 1).then_some(()));
    let worker = *server.workers().first().unwrap();
    let idle = sockets_of(worker);
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| http::get(&address, "/slow/5000"));
        common::wait_until("the request is in flight", || (sockets_of(worker) > idle).then_some(()));
        server.signal(Signal::SIGTERM);
        manager.wait_for("STOPPING=1");
        manager.wait_for("EXTEND_TIMEOUT_USEC=20000000");
        manager.wait_for("WATCHDOG=1");
        assert_eq!(slow.join().unwrap().unwrap().status, 200);
    });
    assert_eq!(server.wait_end(), Some(0));
}

#[test]
fn a_busy_service_manager_is_notified_later() {
    let mut manager = Manager::new();
    // The socket's queue is full of messages from another process.
    let other = UnixDatagram::unbound().unwrap();
    other.set_nonblocking(true).unwrap();
    while other.send_to(b"X=1", &manager.path).is_ok() {}
    let arguments = ["--bind", "http:127.0.0.1:0", "--workers", "1"];
    let mut server = start("crashy", &arguments, Vec::new(), &manager);
    assert!(server.log().contains("cannot notify the service manager"), "{}", server.log());
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200, "the server continues to serve");
    manager.wait_for("READY=1");
    server.stop();
    assert_eq!(server.log().matches("cannot notify the service manager").count(), 1, "{}", server.log());
}

#[test]
fn a_cache_stored_by_systemd_is_warm_after_a_restart() {
    let mut manager = Manager::new();
    let arguments = ["--bind", "http:127.0.0.1:0", "--workers", "1", "--cache", "2M"];
    let mut server = start("pages", &arguments, Vec::new(), &manager);
    let message = manager.wait_for("FDSTORE=1");
    assert!(message.contains("FDNAME=forkyard-segment") && message.contains("FDPOLL=0"), "{message}");
    let page = http::get(&server.http(), "/page/7").unwrap().text();
    server.stop();

    let stored = manager.stored.take().expect("the message contains a descriptor");
    let again = stored.try_clone().unwrap();
    let mut server = start("pages", &arguments, vec![("forkyard-segment", stored)], &manager);
    assert!(server.log().contains("cache is warm kept_by=systemd pages=1"), "{}", server.log());
    assert_eq!(http::get(&server.http(), "/page/7").unwrap().text(), page);
    server.stop();

    // The stored memory is not used by the new server, so it must be released.
    for _ in 0..2 {
        manager.wait_for("STOPPING=1");
    }
    let none = ["--bind", "http:127.0.0.1:0", "--workers", "1", "--cache", "0"];
    let mut server = start("pages", &none, vec![("forkyard-segment", again.try_clone().unwrap())], &manager);
    let message = manager.wait_for("FDSTOREREMOVE=1");
    assert!(message.contains("FDNAME=forkyard-segment"), "{message}");
    assert!(server.log().contains("the cache that systemd stored was dropped"), "{}", server.log());
    server.stop();

    // After the memory layout has changed, the stored memory is dropped, and this is logged.
    let larger = ["--bind", "http:127.0.0.1:0", "--workers", "1", "--cache", "4M"];
    let mut server = start("pages", &larger, vec![("forkyard-segment", again)], &manager);
    assert!(server.log().contains("the memory that systemd stored was dropped"), "{}", server.log());
    assert_ne!(http::get(&server.http(), "/page/7").unwrap().text(), page);
    server.stop();
}

#[test]
fn variables_for_the_master_are_not_in_the_environment_of_a_program() {
    let manager = Manager::new();
    let directory = tempfile::tempdir().unwrap();
    let (out, socket) = (directory.path().join("variables"), directory.path().join("a.sock"));
    let bind = format!("fastcgi:unix:{}", socket.display());
    // The file is renamed into place, so that it is complete when it appears.
    let script = format!("env > {0}.new; mv {0}.new {0}; exec sleep 600", out.display());
    let run = ["run", "--direct", "--bind", &bind, "--workers", "1", "--settle", "10ms", "--", "sh", "-c", &script];
    let mut server = start("forkyard", &run, Vec::new(), &manager);
    let variables = common::wait_until("the program has written its variables", || std::fs::read_to_string(&out).ok());
    assert!(variables.contains("FORKYARD_SLOT=0"), "{variables}");
    for name in ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"] {
        assert!(!variables.contains(name), "{name} in {variables}");
    }
    server.stop();
}

#[test]
fn systemd_finds_no_fault_with_the_unit_files() {
    let directory = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/systemd");
    for name in ["forkyard.service", "forkyard.socket"] {
        // `systemd-analyze` checks whether the program exists.
        let text = std::fs::read_to_string(source.join(name)).unwrap();
        let text = text.replace("/usr/local/bin/forkyard", &program("forkyard").display().to_string());
        std::fs::write(directory.path().join(name), text.replace("/usr/bin/php-cgi", "/bin/true")).unwrap();
    }
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args(["forkyard.service", "forkyard.socket"].map(|name| directory.path().join(name)))
        .output_in_time()
        .expect("systemd-analyze is installed (scripts/test installs systemd)");
    let said = String::from_utf8_lossy(&output.stderr);
    let about_ours: Vec<&str> = said.lines().filter(|line| line.contains("forkyard")).collect();
    assert!(output.status.success() && about_ours.is_empty(), "{said}");
}
