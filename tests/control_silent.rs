//! Sub-commands whose master does not reply, and sub-commands whose output is not read. In both cases, the sub-command exits; if it has
//! failed, it reports an error.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::limit::end_of;
use common::{Server, program, stop};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use std::os::fd::AsRawFd as _;

fn control(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("control")
}

fn serve(directory: &tempfile::TempDir, more: &[&str]) -> Server {
    let mut command = Command::new(program("crashy"));
    command.args(["--bind", "http:127.0.0.1:0", "--workers", "2", "--control"]).arg(control(directory)).args(more);
    Server::start_command(&mut command)
}

fn ask(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("crashy"));
    command.args(arguments).env("FORKYARD_CONTROL", socket);
    command
}

/// Waits until the child exits, and returns its status and error output.
#[track_caller]
fn end(mut child: Child, what: &str) -> (Option<i32>, String) {
    let status = end_of(&mut child, what);
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status.code(), said)
}

fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn no_sub_command_waits_forever_for_a_stopped_master() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = serve(&directory, &["--events", "1M"]);
    stop(server.pid());
    for arguments in [
        &["status"][..],
        &["top"],
        &["quarantine", "ls"],
        &["quarantine", "release", "--all"],
        &["reopen-logs"],
        &["cache", "stats"],
        &["cache", "ls"],
        &["events", "ls"],
        &["events", "publish", "topic", "words"],
        &["events", "tail"],
        &["reload"],
        &["scale", "3"],
        &["upgrade"],
        &["stop"],
        &["stop", "--now"],
    ] {
        let mut command = ask(&control(&directory), &[arguments, &["--timeout", "200ms"]].concat());
        let (status, said) = end(spawn(&mut command), &arguments.join(" "));
        assert_eq!(status, Some(1), "{arguments:?}: {said}");
        let what_to_do = format!("is stopped, and does not answer (continue it: kill -CONT {})", server.pid());
        assert!(said.contains(&what_to_do), "{arguments:?}: {said}");
    }
    // The master executes the command once it is resumed.
    kill(server.pid(), Signal::SIGCONT).unwrap();
    assert_eq!(server.wait_end(), Some(0));
}

#[test]
fn a_sub_command_times_out_if_the_master_accepts_but_does_not_answer() {
    let directory = tempfile::tempdir().unwrap();
    let _master = UnixListener::bind(control(&directory)).unwrap();
    for arguments in [["status"], ["reload"], ["stop"]] {
        let mut command = ask(&control(&directory), &arguments);
        let (status, said) = end(spawn(command.env("FORKYARD_CONTROL_TIMEOUT", "200ms")), arguments[0]);
        assert_eq!(status, Some(1), "{said}");
        assert!(said.contains("has not answered for 200ms") && said.contains("--timeout"), "{said}");
    }
}

#[test]
fn a_sub_command_times_out_if_the_masters_accept_queue_is_full() {
    let directory = tempfile::tempdir().unwrap();
    let address = UnixAddr::new(&control(&directory)).unwrap();
    let new = |flags| socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    let master = new(SockFlag::SOCK_CLOEXEC);
    bind(master.as_raw_fd(), &address).unwrap();
    listen(&master, Backlog::new(1).unwrap()).unwrap();
    let mut waiting = Vec::new();
    loop {
        let client = new(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK);
        match connect(client.as_raw_fd(), &address) {
            Ok(()) => waiting.push(client),
            Err(Errno::EAGAIN) => break,
            Err(errno) => panic!("{errno}"),
        }
    }
    let (status, said) = end(spawn(&mut ask(&control(&directory), &["status", "--timeout", "200ms"])), "status");
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("has not accepted a connection for 200ms"), "{said}");
}

#[test]
fn a_long_command_is_waited_for_as_long_as_the_master_lives() {
    let directory = tempfile::tempdir().unwrap();
    let bind = format!("fastcgi:unix:{}", directory.path().join("a.sock").display());
    let mut command = Command::new(program("forkyard"));
    command.args(["run", "--direct", "--bind", &bind, "--workers", "1", "--settle", "1500ms", "--control"]);
    let mut server = Server::start_command(command.arg(control(&directory)).args(["--", "sleep", "1000"]));
    let old = server.children();
    // The reload takes far longer than `--timeout`, and more clients are waiting at the same time than the control socket can serve.
    let reloads: Vec<Child> =
        (0..20).map(|_| spawn(&mut ask(&control(&directory), &["reload", "--timeout", "300ms"]))).collect();
    for reload in reloads {
        let (status, said) = end(reload, "reload");
        assert_eq!((status, said.as_str()), (Some(0), ""));
    }
    assert!(server.children().is_disjoint(&old));
    server.stop();
}

/// Returns a pipe for standard output whose reading end is closed.
fn closed_pipe() -> OwnedFd {
    nix::unistd::pipe().unwrap().1
}

#[test]
fn unread_output_is_not_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = serve(&directory, &["--events", "1M"]);
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["top"],
        &["top", "--json"],
        &["quarantine", "ls", "--json"],
        &["cache", "stats"],
        &["cache", "ls"],
        &["cache", "clear", "--json"],
        &["events", "publish", "topic", "words"],
        &["events", "ls"],
        &["events", "tail", "--from", "1"],
        &["reload"],
        &["reload", "--json"],
        &["scale", "3"],
        &["reopen-logs"],
        &["check", "--bind", "http:127.0.0.1:0", "--user", "root"],
        &["completions", "bash"],
        &["man"],
        &["--help"],
        &["help", "reload"],
        &["--version"],
        &["stop"],
    ] {
        let mut command = ask(&control(&directory), arguments);
        if arguments[0] == "check" {
            command.env_remove("FORKYARD_CONTROL");
        }
        let child = command.stdout(closed_pipe()).stderr(Stdio::piped()).spawn().unwrap();
        let (status, said) = end(child, &arguments.join(" "));
        assert_eq!((status, said.as_str()), (Some(0), ""), "{arguments:?}");
    }
    assert_eq!(server.wait_end(), Some(0));
    assert!(server.log().contains("reload done gen=3"), "both were waited for: {}", server.log());
}

#[test]
fn top_exits_when_its_output_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = serve(&directory, &[]);
    let mut command = ask(&control(&directory), &["top", "--json", "--interval", "100ms"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with('{'), "{line}");
    drop(reader);
    assert_eq!(end(child, "top"), (Some(0), String::new()));
    server.stop();
}
