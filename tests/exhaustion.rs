//! Running out of descriptors and processes: the errors that are logged, and the recovery once descriptors or processes are available
//! again. Also tests `--nice` and `--rlimit` values that cannot be set on processes.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::process::{Command, Output};

use common::limit::InTime as _;
use common::{Server, descriptors_of, http, is_gone, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];

/// Returns a shell command that sets a limit and then executes the program `name`.
fn after(limit: &str, name: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{limit} && exec \"$0\" \"$@\"")]).arg(program(name));
    command
}

/// Returns the lowest free descriptor number of a process. With this number as its limit, the process cannot open another descriptor.
fn lowest_free(pid: Pid) -> usize {
    (0..).find(|number| !std::path::Path::new(&format!("/proc/{pid}/fd/{number}")).exists()).unwrap()
}

/// Sets the descriptor limit of a running process.
fn set_limit(pid: Pid, most: usize) {
    let status =
        Command::new("prlimit").args(["--pid", &pid.to_string(), &format!("--nofile={most}:")]).status_in_time();
    assert!(status.unwrap().success());
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn serves(server: &Server) {
    assert_eq!(http::get(&server.http(), "/").unwrap().status, 200);
}

#[test]
fn too_few_descriptors_are_reported_with_the_required_number_before_any_address_is_bound() {
    let directory = tempfile::tempdir().unwrap();
    let [socket, pid_file] = ["sock", "pid"].map(|name| directory.path().join(name).to_string_lossy().into_owned());
    let bind = format!("http:unix:{socket}");
    for most in [5, 8, 10, 12, 16, 20, 24, 32, 48, 63] {
        for mode in [&[][..], &["check"]] {
            let mut command = after(&format!("ulimit -n {most}"), "hello");
            command.args(mode).args(["--bind", &bind, "--pid-file", &pid_file, "--workers", "8"]);
            let output = command.output_in_time().unwrap();
            let said = said(&output);
            assert_eq!(output.status.code(), Some(1), "{most} {mode:?}: {said}");
            assert!(
                said.contains("ulimit -n") || most < 8 && said.contains("shared librar"),
                "{most} {mode:?}: {said}"
            );
            assert!(
                directory.path().read_dir().unwrap().next().is_none(),
                "{most} {mode:?}: the failed startup left a file behind"
            );
        }
    }
    // The limit that the error suggests is sufficient.
    let mut command = after("ulimit -n 63", "hello");
    let daemon = ["--workers", "8", "--daemon", "beside=sleep 1000"];
    let output = command.args(["--bind", &bind]).args(daemon).output_in_time().unwrap();
    let said = said(&output);
    let needed =
        said.split_once("need up to ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<usize>().ok()).unwrap();
    let mut command = after(&format!("ulimit -n {needed}"), "hello");
    let mut server = Server::start_command(command.args(HTTP).args(daemon));
    serves(&server);
    server.signal(Signal::SIGHUP);
    server.wait_for("reload done");
    serves(&server);
    assert!(descriptors_of(server.pid().as_raw()) <= needed);
    server.stop();
    assert!(!server.log().contains("ERROR"), "{}", server.log());
}

#[test]
fn a_low_soft_limit_is_raised_for_the_master_and_programs_get_the_original_limit() {
    let limit = "echo limit=$(ulimit -n) $(ulimit -Hn); exec sleep 1000";
    let mut command = after("ulimit -Sn 50 && ulimit -Hn 4000", "forkyard");
    let directory = tempfile::tempdir().unwrap();
    let bind = format!("fastcgi:unix:{}", directory.path().join("sock").display());
    command.args(["run", "--direct", "--bind", &bind, "--workers", "60", "--settle", "0", "--", "sh", "-c", limit]);
    let mut server = Server::start_command(&mut command);
    server.logged("limit=50 4000");
    server.stop();
    assert!(!server.log().contains("ERROR"), "{}", server.log());
}

#[test]
fn a_master_without_free_descriptors_logs_this_and_recovers() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    let (control, log) = (path("control"), path("access"));
    let arguments = ["--workers", "2", "--control", &control, "--access-log", &log, "--daemon", "beside=sleep 1000"];
    let mut server = Server::start("hello", &[&HTTP[..], &arguments].concat());
    let ask = |what: &str| Command::new(program("hello")).args([what, "--control", &control]).output_in_time().unwrap();
    let before = server.workers();
    // Wait until the daemon has started, because descriptors that are open only during a spawn must not raise the limit set below.
    wait_until("the daemon is running", || server.log().contains("daemon started").then_some(()));
    set_limit(server.pid(), lowest_free(server.pid()).min(14));
    // A client of the control socket waits or gets an error; the master does not hang.
    let waiting = Command::new(program("hello")).args(["status", "--control", &control]).spawn().unwrap();
    let mut waiting = common::Helper(waiting);
    server.wait_for("cannot accept on the control socket");
    server.signal(Signal::SIGUSR1);
    server.wait_for("--access-log: cannot open");
    server.signal(Signal::SIGHUP);
    let line = server.wait_for("cannot start a worker");
    assert!(line.contains("ulimit -n") && line.contains("LimitNOFILE="), "{line}");
    server.signal(Signal::SIGUSR2);
    let line = server.wait_for("cannot upgrade");
    assert!(line.contains("state cannot be written") && line.contains("ulimit -n"), "{line}");
    assert!(!line.contains("put the new build there"), "{line}");
    assert_eq!(server.workers(), before, "the workers are still running");
    serves(&server);
    set_limit(server.pid(), 1000);
    assert!(wait_until("the client receives its reply", || waiting.0.try_wait().unwrap()).success());
    assert!(ask("reload").status.success(), "{}", server.log());
    assert!(ask("reopen-logs").status.success());
    let worker = *server.renewed(2, &before).first().unwrap();
    // Even the descriptors freed by the dead worker are not sufficient.
    set_limit(server.pid(), lowest_free(server.pid()).min(14));
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    server.wait_for("cannot start a worker");
    serves(&server); // answered by the other worker
    set_limit(server.pid(), 1000);
    wait_until("the worker is replaced", || (server.workers().len() == 2 && is_gone(worker)).then_some(()));
    assert!(ask("upgrade").status.success(), "{}", server.log());
    serves(&server);
    server.stop();
}

#[test]
fn reaching_the_process_limit_is_logged_with_the_limits_and_spawning_is_retried() {
    assert!(nix::unistd::geteuid().is_root(), "this test changes users: run it as root");
    // The limit counts the processes of a separate user. It is too low for two workers with their heirs and threads.
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", "4799", "--regid", "4799", "--clear-groups", "prlimit", "--nproc=1:1000"])
        .arg(program("hello"));
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::launch(command.args(HTTP).args(["--workers", "2"]).env("TMPDIR", directory.path()));
    let line = server.wait_for("cannot start a worker");
    assert!(line.contains("ulimit -u") && line.contains("TasksMax=") && line.contains("pids.max"), "{line}");
    let pid = server.pid().to_string();
    let set = |limit: &str| {
        let mut set = Command::new("setpriv");
        set.args(["--reuid", "4799", "--regid", "4799", "--clear-groups", "prlimit", limit, "--pid"]);
        assert!(set.arg(&pid).status_in_time().unwrap().success());
    };
    set("--nproc=1000:");
    server.wait_for("ready in ");
    serves(&server);
    set("--nproc=1:");
    server.signal(Signal::SIGUSR2);
    let line = server.wait_for("cannot upgrade");
    assert!(line.contains("cannot be started") && line.contains("ulimit -u"), "{line}");
    assert!(!line.contains("put the new build there"), "{line}");
    serves(&server);
    server.stop();
}

#[test]
fn requests_get_503_while_no_thread_for_blocking_functions_can_be_created() {
    assert!(nix::unistd::geteuid().is_root(), "this test changes users: run it as root");
    let as_user = |limit: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "4798", "--regid", "4798", "--clear-groups", "prlimit", &format!("--nproc={limit}")]);
        command
    };
    let directory = tempfile::tempdir().unwrap();
    // The limit allows the master, the worker with its event loop thread, and its heir (docs/heirs.md).
    let mut command = as_user("4:1000");
    command.arg(program("hello")).args(HTTP).args(["--workers", "1", "--threads", "2", "--cache", "1M"]);
    let mut server = Server::start_command(command.env("TMPDIR", directory.path()));
    let worker = server.workers().first().unwrap().to_string();
    let status = || http::get(&server.http(), "/").unwrap().status;
    let raise = |limit: &str| {
        assert!(as_user(limit).args(["--pid", &worker]).status_in_time().unwrap().success());
    };
    assert_eq!(status(), 503);
    let line = server.logged("cannot create all threads for blocking functions");
    assert!(line.contains("nproc") && line.contains("--threads") && line.contains("created=0 threads=2"), "{line}");
    for (limit, what) in
        [("5:", "created=1 threads=2"), ("1000:", "created all threads for blocking functions threads=2")]
    {
        raise(limit);
        wait_until(what, || (status() == 200 && server.log().contains(what)).then_some(()));
    }
    assert!(!server.log().contains("panicked"), "{}", server.log());
    server.stop();
}

#[test]
fn limits_that_cannot_be_set_are_reported_before_any_address_is_bound() {
    assert!(nix::unistd::geteuid().is_root(), "this test changes users: run it as root");
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(directory.path(), Some(4799), Some(4799)).unwrap();
    let run = |name: &str, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "4799", "--regid", "4799", "--clear-groups", "prlimit", "--nofile=256:512"]);
        let output = command.arg(program(name)).args(arguments).current_dir(directory.path()).output_in_time().unwrap();
        (output.status.code(), said(&output))
    };
    let own = std::process::id().cast_signed();
    let own_nice: i32 = common::field_of(&common::proc_of(own), 19).expect("the kernel reports the nice value");
    let nice = ("-5", &*format!("--nice -5: the lowest value that this process can set is {own_nice}"));
    let nofile = ("nofile=600", "--rlimit nofile=600: the highest value that this process can set is 512");
    for (flag, (value, what)) in [("--nice", nice), ("--rlimit", nofile)] {
        let limit = format!("{flag}={value}");
        for arguments in [
            &["--bind", "http:unix:sock", "--pid-file", "pid", &limit][..],
            &["check", "--bind", "http:unix:sock", &limit],
        ] {
            let (status, said) = run("hello", arguments);
            assert!(status == Some(1) && said.contains(what), "{arguments:?}: {status:?} {said}");
            assert!(directory.path().read_dir().unwrap().next().is_none(), "{arguments:?}: no file is created");
        }
        let (status, said) = run("forkyard", &["run", "--direct", "--bind", "fastcgi:unix:sock", &limit, "--", "cat"]);
        assert!(status == Some(1) && said.contains(what), "{status:?} {said}");
        assert!(directory.path().read_dir().unwrap().next().is_none(), "no file is created");
    }
}
