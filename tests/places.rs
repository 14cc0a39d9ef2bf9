//! Restricted environments: the server starts and serves even if directories are read-only, memory and descriptors are scarce, system calls
//! are missing, or other users interfere.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::fs::File;
use std::path::Path;
use std::process::Command;

use common::limit::InTime as _;
use common::refuse::{NEWER, Refuse};
use common::{Server, http, is_gone, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];

fn serves(server: &Server) {
    assert_eq!(http::get(&server.http(), "/").unwrap().status, 200);
}

/// Returns the number of log lines that contain this text.
fn count(server: &Server, what: &str) -> usize {
    server.log().lines().filter(|line| line.contains(what)).count()
}

// ---- locks held by other users ----

#[test]
fn a_user_with_only_read_access_cannot_prevent_a_server_from_starting() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    let locked = File::open(directory.path()).unwrap();
    locked.lock().unwrap();
    // The pid file of a killed master, readable by every user.
    std::fs::write(path("a.pid"), "4000000\n").unwrap();
    let left = File::open(path("a.pid")).unwrap();
    left.lock().unwrap();
    let bind = format!("fastcgi:unix:{}", path("a.sock"));
    let control = path("a.control");
    let arguments = ["--bind", &bind, "--workers", "1", "--pid-file", &path("a.pid"), "--control", &control];
    let mut server = Server::start("hello", &[&HTTP[..], &arguments].concat());
    serves(&server);
    assert_eq!(std::fs::read_to_string(path("a.pid")).unwrap(), format!("{}\n", server.pid()));
    // A second server still fails to start.
    let second =
        Command::new(program("hello")).args(HTTP).args(["--pid-file", &path("a.pid")]).output_in_time().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("another master uses it"), "{said}");
    server.stop();
    assert_eq!(directory.path().read_dir().unwrap().count(), 0, "no file is left, not even a lock file");
}

// ---- missing system calls ----

/// Returns whether process `pid` has a file open whose path contains this text.
fn has_open(pid: i32, what: &str) -> bool {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().filter_map(Result::ok);
    links.filter_map(|link| std::fs::read_link(link.path()).ok()).any(|to| to.to_string_lossy().contains(what))
}

#[test]
fn without_newer_system_calls_all_requests_are_served_and_one_line_lists_what_is_missing() {
    let refuse = Refuse::compile();
    let few = [libc::SYS_pidfd_open, libc::SYS_close_range];
    for (errno, calls) in [(libc::ENOSYS, NEWER), (libc::EPERM, &few[..])] {
        let directory = tempfile::tempdir().unwrap();
        let [control, pid_file] = ["control", "pid"].map(|name| directory.path().join(name));
        let mut command = refuse.command(errno, calls, "hello");
        command.args(HTTP).args(["--workers", "2", "--daemon", "beside=sleep 1000", "--cache-file"]);
        command.arg(directory.path().join("cache")).arg("--control").arg(&control).arg("--pid-file").arg(&pid_file);
        let mut server = Server::start_command(&mut command);
        serves(&server);
        // Only the master holds the pid file open, so that the lock is released when the master exits.
        let children: Vec<i32> = wait_until("the workers and the daemon are running", || {
            let children: Vec<i32> = server.children().into_iter().collect();
            let is_execed =
                |pid: &&i32| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("sleep"));
            (children.len() == 3 && children.iter().filter(is_execed).count() == 1).then_some(children)
        });
        assert!(has_open(server.pid().as_raw(), &pid_file.to_string_lossy()));
        for pid in children {
            assert!(
                !has_open(pid, &pid_file.to_string_lossy()),
                "process {pid} inherited the descriptor of the pid file"
            );
        }
        let old = wait_until("the workers and the daemon are running", || {
            Some(server.children()).filter(|all| all.len() == 3)
        });
        server.signal(Signal::SIGHUP);
        server.wait_for("reload done");
        serves(&server);
        let worker = *wait_until("the new workers are running", || {
            let new: Vec<i32> = server.children().difference(&old).copied().collect();
            (new.len() >= 2).then_some(new)
        })
        .first()
        .unwrap();
        kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
        server.wait_for("worker died");
        wait_until("the killed worker is gone", || is_gone(worker).then_some(()));
        wait_until("the request is answered", || {
            http::get(&server.http(), "/").ok().filter(|response| response.status == 200)
        });
        server.stop();
        assert_eq!(count(&server, "pidfd_open"), 1, "{}", server.log());
        assert_eq!(count(&server, "ERROR"), 0, "{}", server.log());
    }
}

// ---- no usable directory for the default publish socket ----

/// Runs `check`. Returns whether it succeeded, and its output.
fn check(command: &mut Command) -> (bool, String) {
    let output = command.arg("check").args(HTTP).output_in_time().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Returns a command in its own mount namespace, in which only the file systems in `read_only` are read-only.
fn with_read_only(read_only: &[&str], name: &str) -> Command {
    let mut command = Command::new("unshare");
    let mounts: String =
        read_only.iter().map(|path| format!("mount -t tmpfs -o ro,mode=1777 tmpfs {path} && ")).collect();
    command.args(["--mount", "sh", "-c", &format!("{mounts} exec \"$0\" \"$@\"")]).arg(program(name));
    command
}

#[test]
fn a_server_starts_without_the_default_publish_socket_and_logs_this_once() {
    assert!(nix::unistd::geteuid().is_root(), "this test mounts file systems: run it as root");
    let all = ["/tmp", "/run", "/var/tmp"];
    let long = format!("/tmp/{}", "x".repeat(110));
    for tmpdir in [None, Some("/nonexistent"), Some(long.as_str())] {
        let command = |name: &str| {
            let mut command = with_read_only(&all, name);
            command.env_remove("TMPDIR").env_remove("XDG_RUNTIME_DIR").env_remove("RUNTIME_DIRECTORY");
            command.envs(tmpdir.map(|path| ("TMPDIR", path)));
            command
        };
        let (fine, said) = check(&mut command("hello"));
        assert!(fine && said.contains("no place for the socket") && said.contains("--events-socket"), "{said}");
        let mut server = Server::start_command(command("hello").args(HTTP).args([
            "--workers",
            "2",
            "--daemon",
            "beside=sh -c 'echo events=$FORKYARD_EVENTS; sleep 1000'",
        ]));
        server.logged("| events=");
        serves(&server);
        server.stop();
        assert_eq!(count(&server, "no place for the socket"), 1, "{}", server.log());
        assert!(server.log().lines().any(|line| line.ends_with("| events=")), "{}", server.log());
        // If the path is given explicitly, the failure is an error.
        let asked = command("hello").args(HTTP).args(["--events-socket", "/tmp/events"]).output_in_time().unwrap();
        let said = String::from_utf8_lossy(&asked.stderr).into_owned();
        assert!(asked.status.code() == Some(1) && said.contains("--events-socket"), "{said}");
    }
}

#[test]
fn the_publish_socket_is_elsewhere_if_the_temporary_directory_is_unsuitable() {
    let directory = tempfile::tempdir().unwrap();
    let long = directory.path().join("x".repeat(90));
    std::fs::create_dir(&long).unwrap();
    for tmpdir in [&long, Path::new("/nonexistent")] {
        let runtime = directory.path().join("run");
        std::fs::create_dir(&runtime).unwrap();
        let mut command = Command::new(program("hello"));
        command.args(HTTP).args([
            "--workers",
            "1",
            "--daemon",
            "beside=sh -c 'echo events=$FORKYARD_EVENTS; sleep 1000'",
        ]);
        command.env("TMPDIR", tmpdir).env("XDG_RUNTIME_DIR", &runtime).env_remove("RUNTIME_DIRECTORY");
        let mut server = Server::start_command(&mut command);
        let line = server.logged("| events=");
        assert!(line.contains(&format!("events={}", runtime.display())), "{line}");
        server.stop();
        assert_eq!(count(&server, "no place for the socket"), 0, "{}", server.log());
        std::fs::remove_dir(&runtime).unwrap();
    }
}

#[test]
fn another_user_can_publish_even_if_only_root_can_use_the_temporary_directory() {
    use std::os::unix::fs::PermissionsExt as _;
    assert!(nix::unistd::geteuid().is_root(), "this test changes users: run it as root");
    let private = tempfile::tempdir().unwrap();
    std::fs::set_permissions(private.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let send = "beside=sh -c 'printf \"news\\nname\\nfrom nobody\" | socat -u - UNIX-SENDTO:$FORKYARD_EVENTS; echo sent=$?; sleep 1000'";
    let user = ["--workers", "1", "--user", "4711", "--group", "4712", "--daemon", send];
    let mut command = Command::new(program("hello"));
    command.args(HTTP).args(user).env("TMPDIR", private.path()).env_remove("XDG_RUNTIME_DIR");
    let mut server = Server::start_command(&mut command);
    server.wait_for("| sent=0");
    wait_until("the event is in the log", || (server.segment().events().stats().published > 0).then_some(()));
    server.stop();
    assert_eq!(count(&server, "WARN"), 0, "{}", server.log());

    // A path that is given explicitly is used, with a warning.
    let path = private.path().join("events").to_string_lossy().into_owned();
    let mut server = Server::start("hello", &[&HTTP[..], &user[..6], &["--events-socket", &path]].concat());
    assert_eq!(count(&server, "--user cannot publish at"), 1, "{}", server.log());
    server.stop();
}
