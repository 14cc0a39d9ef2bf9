//! Privileges and restrictions of the application's processes, as reported by the kernel. The tests start processes of other users, so they
//! need root, and fail without it.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::PathBuf;
use std::process::Command;

use common::limit::InTime as _;
use common::{Server, fastcgi, http, is_gone, program, scgi, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use tempfile::TempDir;

const HTTP: [&str; 4] = ["--bind", "http:127.0.0.1:0", "--workers", "1"];
/// A user without an account.
const USER: [&str; 4] = ["--user", "4711", "--group", "4712"];

fn server(arguments: &[&str]) -> Server {
    assert!(Uid::effective().is_root(), "these tests change users: run them as root");
    Server::start("confined", &[&HTTP, arguments].concat())
}

/// Returns `forkyard run` with one process of `command`, which is considered ready immediately.
fn program_under_run(directory: &TempDir, arguments: &[&str], command: &[&str]) -> Command {
    assert!(Uid::effective().is_root(), "these tests change users: run them as root");
    let bind = format!("fastcgi:unix:{}", directory.path().join("app.sock").display());
    let mut forkyard = Command::new(program("forkyard"));
    forkyard
        .args(["run", "--direct", "--bind", &bind, "--workers", "1", "--settle", "0"])
        .args(arguments)
        .arg("--")
        .args(command);
    forkyard
}

fn child(server: &Server) -> i32 {
    wait_until("there is a worker", || server.workers().first().copied())
}

fn ask(server: &Server, target: &str) -> String {
    http::get(&server.http(), target).unwrap().text()
}

/// Creates a directory that user 4711 can write to.
fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    chown(directory.path(), Some(4711), Some(4712)).unwrap();
    directory
}

/// Returns the words after the name on a line of `/proc/PID/FILE`.
fn line(pid: i32, file: &str, name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line.split_ascii_whitespace().map(str::to_owned).collect()
}

fn status(pid: i32, name: &str) -> String {
    line(pid, "status", &format!("{name}:")).join(" ")
}

fn nice(pid: i32) -> i32 {
    common::field_of(&common::proc_of(pid), 19).unwrap()
}

/// Flags for all restrictions that apply to workers and to programs.
const ALL: [&str; 20] = [
    "--user",
    "4711",
    "--group",
    "4712",
    "--supplementary-groups",
    "4713,4714",
    "--umask",
    "027",
    "--rlimit",
    "core=0:1M",
    "--rlimit",
    "nofile=512:640",
    "--nice",
    "7",
    "--cpu-affinity",
    "spread",
    "--env",
    "COLOUR=blue",
    "--clear-env",
    "--chdir",
];

fn expect_all(pid: i32, directory: &TempDir) {
    let four = |id: u32| [id; 4].map(|id| id.to_string()).join(" ");
    assert_eq!((status(pid, "Uid"), status(pid, "Gid")), (four(4711), four(4712)));
    assert_eq!(status(pid, "Groups"), "4713 4714");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Umask"), "0027");
    assert_eq!(line(pid, "limits", "Max core file size")[..2], ["0", "1048576"]);
    assert_eq!(line(pid, "limits", "Max open files")[..2], ["512", "640"]);
    assert_eq!(nice(pid), 7);
    assert!(status(pid, "Cpus_allowed_list").parse::<u32>().is_ok(), "one processor rather than a list");
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), directory.path().canonicalize().unwrap());
}

#[test]
fn a_worker_has_the_configured_privileges_and_limits() {
    let directory = directory();
    let at = directory.path().to_string_lossy().into_owned();
    let mut server = server(&[&ALL[..], &[&at]].concat());
    expect_all(child(&server), &directory);
    let environment = ask(&server, "/env");
    let names: BTreeSet<&str> = environment.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
    assert_eq!(
        names,
        BTreeSet::from(["COLOUR", "FORKYARD_EVENTS", "FORKYARD_GENERATION", "FORKYARD_SHM", "FORKYARD_SLOT"])
    );
    assert!(environment.contains("COLOUR=blue\n"));
    assert_eq!(ask(&server, "/cache"), "true Some(\"kept\")");
    assert_eq!(ask(&server, "/write?path=new"), "written");
    let made = directory.path().join("new").metadata().unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o777), (4711, 4712, 0o640));
    assert_eq!(ask(&server, "/read?path=/etc/shadow"), "PermissionDenied");
    assert_eq!(ask(&server, "/kill-master"), "PermissionDenied");
    // A dead process is replaced by a process with the same restrictions, and no error is logged.
    let first = child(&server);
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    let next = wait_until("the process is replaced", || server.workers().into_iter().find(|&pid| pid != first));
    assert_eq!(ask(&server, "/directory"), directory.path().canonicalize().unwrap().to_string_lossy());
    expect_all(next, &directory);
    assert!(
        !server.log().contains("each new connection wakes"),
        "the worker could not inspect its event loop: {}",
        server.log()
    );
    server.stop();
}

#[test]
fn a_program_has_the_configured_privileges_and_limits() {
    let (directory, sockets) = (directory(), tempfile::tempdir().unwrap());
    let at = directory.path().to_string_lossy().into_owned();
    let mut command = program_under_run(&sockets, &[&ALL[..], &[&at]].concat(), &["sleep", "1000"]);
    let mut server = Server::start_command(command.env("SECRET", "word"));
    let pid = child(&server);
    expect_all(pid, &directory);
    let environment = std::fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    let names: BTreeSet<&str> = environment.split('\0').filter_map(|line| Some(line.split_once('=')?.0)).collect();
    let expected = ["COLOUR", "FORKYARD_GENERATION", "FORKYARD_SHM", "FORKYARD_SLOT", "PHP_FCGI_CHILDREN"];
    assert_eq!(names, BTreeSet::from(expected));
    // The socket belongs to the user that serves requests on it.
    let socket = sockets.path().join("app.sock").metadata().unwrap();
    assert_eq!((socket.uid(), socket.gid()), (4711, 4712));
    server.stop();
}

#[test]
fn privileges_that_are_not_configured_do_not_change() {
    let mut server = server(&[]);
    let (pid, master) = (child(&server), server.pid().as_raw());
    for name in ["Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Umask", "Cpus_allowed_list"] {
        assert_eq!(status(pid, name), status(master, name), "{name}");
    }
    assert_eq!(nice(pid), nice(master));
    server.stop();
}

#[test]
fn a_user_with_an_account_gets_its_groups_and_home() {
    let mut server = server(&["--user", "nobody"]);
    let account = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let pid = child(&server);
    assert_eq!(status(pid, "Uid").split(' ').next(), Some(&*account.uid.to_string()));
    assert_eq!(status(pid, "Gid").split(' ').next(), Some(&*account.gid.to_string()));
    let environment = ask(&server, "/env");
    for line in ["USER=nobody\n".to_owned(), format!("HOME={}\n", account.dir.display())] {
        assert!(environment.contains(&line), "no {line:?} in {environment}");
    }
    assert!(environment.contains("PATH="), "other variables are inherited");
    server.stop();
}

#[test]
fn kept_capabilities_survive_the_change_of_user_and_exec() {
    let keep = ["--capabilities", "net_bind_service,cap_sys_nice"];
    let expected = "0000000000800400";
    let mut workers = server(&[&USER[..], &keep].concat());
    let pid = child(&workers);
    for (set, value) in
        [("CapPrm", expected), ("CapEff", expected), ("CapBnd", expected), ("CapAmb", "0000000000000000")]
    {
        assert_eq!(status(pid, set), value, "{set}");
    }
    workers.stop();

    let directory = tempfile::tempdir().unwrap();
    let mut server =
        Server::start_command(&mut program_under_run(&directory, &[&USER[..], &keep].concat(), &["sleep", "1000"]));
    let pid = child(&server);
    for set in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), expected, "{set}");
    }
    server.stop();
}

#[test]
fn setuid_programs_work_if_the_operator_allows_them() {
    let mut server = server(&[&USER[..], &["--no-new-privileges=false"]].concat());
    assert_eq!(status(child(&server), "NoNewPrivs"), "0");
    server.stop();
}

#[test]
fn a_worker_in_another_root_serves_and_uses_the_cache() {
    let root = directory();
    std::fs::create_dir(root.path().join("inner")).unwrap();
    std::fs::set_permissions(root.path().join("inner"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let at = root.path().to_string_lossy().into_owned();
    let mut server = server(&[&USER[..], &["--chroot", &at, "--chdir", "inner"]].concat());
    let pid = child(&server);
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/root")).unwrap(), root.path().canonicalize().unwrap());
    assert_eq!(ask(&server, "/directory"), "/inner");
    assert_eq!(ask(&server, "/write?path=/new"), "written");
    assert!(root.path().join("new").exists());
    assert_eq!(ask(&server, "/read?path=/../../etc/hosts"), "NotFound");
    assert_eq!(server.log().matches("each new connection wakes all workers").count(), 1, "the new root has no /proc");
    assert_eq!(ask(&server, "/cache"), "true Some(\"kept\")");
    server.stop();
}

#[test]
fn a_program_in_another_root_is_found_there() {
    let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let source = root.path().join("wait.c");
    std::fs::write(&source, "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n").unwrap();
    let built = Command::new("gcc").args(["-static", "-o"]).arg(root.path().join("wait")).arg(&source).status_in_time();
    assert!(built.expect("gcc is installed (scripts/test installs it)").success());
    let at = root.path().to_string_lossy().into_owned();
    let arguments = [&USER[..], &["--chroot", &at]].concat();
    let mut server = Server::start_command(&mut program_under_run(&directory, &arguments, &["/wait"]));
    let pid = child(&server);
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/root")).unwrap(), root.path().canonicalize().unwrap());
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), root.path().canonicalize().unwrap());
    server.stop();

    let output = program_under_run(&directory, &arguments, &["/bin/sleep", "1"]).output_in_time().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("no such file"), "{output:?}");
}

#[test]
fn no_process_of_another_user_outlives_a_killed_master() {
    let (mut workers, directory) = (server(&USER), tempfile::tempdir().unwrap());
    let mut programs = Server::start_command(&mut program_under_run(&directory, &USER, &["sleep", "1000"]));
    for server in [&mut workers, &mut programs] {
        let pid = child(server);
        server.signal(Signal::SIGKILL);
        wait_until("the process has exited", || is_gone(pid).then_some(()));
        server.wait_end();
    }
}

#[test]
fn a_sandboxed_application_can_do_its_work_and_nothing_else() {
    let (mine, other) = (directory(), directory());
    let (at, elsewhere) = (mine.path().to_string_lossy().into_owned(), other.path().join("a"));
    std::fs::write(&elsewhere, "secret").unwrap();
    std::fs::set_permissions(&elsewhere, std::fs::Permissions::from_mode(0o666)).unwrap();
    let caches = tempfile::tempdir().unwrap();
    let cache = caches.path().join("cache").to_string_lossy().into_owned();
    let arguments = ["--sandbox", "--sandbox-write", &at, "--sandbox-read", "/etc/fstab", "--cache-file", &cache];
    let mut server = server(&[&USER[..], &arguments].concat());
    let pid = child(&server);
    assert_eq!((status(pid, "Seccomp"), status(pid, "NoNewPrivs")), ("2".to_owned(), "1".to_owned()));

    let inside = mine.path().join("file").display().to_string();
    for (target, expected) in [
        (format!("/write?path={inside}"), "written"),
        (format!("/remove?path={inside}"), "done"),
        (format!("/read?path={}", elsewhere.display()), "PermissionDenied"),
        (format!("/write?path={}", elsewhere.display()), "PermissionDenied"),
        (format!("/remove?path={}", elsewhere.display()), "PermissionDenied"),
        ("/write?path=/tmp/forkyard-test-outside".to_owned(), "PermissionDenied"),
        ("/write?path=/dev/null".to_owned(), ""),
        ("/read?path=/etc/shadow".to_owned(), "PermissionDenied"),
        ("/execute".to_owned(), "PermissionDenied"),
        ("/listen".to_owned(), "PermissionDenied"),
        ("/chroot".to_owned(), "PermissionDenied"),
        ("/kill-master".to_owned(), "PermissionDenied"),
        ("/resolve".to_owned(), "done"),
        ("/threads".to_owned(), "done"),
        ("/cache".to_owned(), "true Some(\"kept\")"),
    ] {
        assert_eq!(ask(&server, &target), expected, "{target}");
    }
    assert!(ask(&server, "/status").contains("Name:"));
    assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), "secret");
    server.wait_for(&format!(
        "sandbox refused a system call (--sandbox) pid={pid} call=chroot number={}",
        libc::SYS_chroot
    ));
    // Each violation is logged once, and the worker has survived all violations.
    ask(&server, "/chroot");
    assert_eq!(server.log().matches("call=chroot").count(), 1, "{}", server.log());
    assert_eq!(child(&server), pid);
    assert!(
        !server.log().contains("each new connection wakes"),
        "the worker could not inspect its event loop: {}",
        server.log()
    );
    server.stop();
    assert_eq!(std::fs::metadata(&cache).unwrap().uid(), 4711, "CGI calls of that user can use the file");
}

#[test]
fn the_service_example_serves_in_a_sandbox_over_every_protocol() {
    let directory = tempfile::tempdir().unwrap();
    let bind = format!("fastcgi:unix:{}", directory.path().join("app.sock").display());
    let place = format!("scgi:unix:{}", directory.path().join("scgi.sock").display());
    let arguments = [&HTTP[..], &["--bind", &bind, "--bind", &place], &USER, &["--sandbox"]].concat();
    let mut server = Server::start("service", &arguments);
    for target in ["/", "/anything?at=all"] {
        assert_eq!(ask(&server, target), "Hello, world\n");
    }
    let answer = fastcgi::Client::connect(&bind).unwrap().request("GET", "/", b"").unwrap();
    assert_eq!(answer.body(), b"Hello, world\n");
    let answer = scgi::Client::connect(&place).unwrap().request("GET", "/", b"").unwrap();
    assert_eq!(answer.text(), "Hello, world\n");
    server.stop();
    assert!(!server.log().contains("refused a system call"), "{}", server.log());
}

#[test]
fn a_privilege_that_cannot_be_set_is_reported_with_its_flag() {
    let complaint = |command: &mut Command, code: i32, words: &[&str]| {
        let output = command.output_in_time().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        for word in words {
            assert!(said.contains(word), "no {word:?} in {said}");
        }
    };
    let hello = |arguments: &[&str]| {
        let mut command = Command::new(program("hello"));
        command.args(HTTP).args(arguments);
        command
    };
    complaint(&mut hello(&["--user", "no-such-user"]), 2, &["--user", "there is no user no-such-user"]);
    complaint(&mut hello(&["--group", "no-such-group"]), 2, &["--group", "there is no group no-such-group"]);
    complaint(&mut hello(&["--rlimit", "speed=1"]), 2, &["--rlimit", "unknown limit 'speed'"]);
    complaint(&mut hello(&["--nice", "50"]), 2, &["--nice", "-20..=19"]);
    complaint(&mut hello(&["--sandbox-read", "/usr"]), 2, &["need --sandbox"]);
    complaint(&mut hello(&["--user", "4711"]), 1, &["--user", "name a group with --group"]);
    complaint(
        &mut hello(&["--chroot", "/no-such-directory"]),
        1,
        &["--chroot: /no-such-directory", "create the directory"],
    );
    complaint(&mut hello(&["--chdir", "/etc/passwd"]), 1, &["--chdir: /etc/passwd is not a directory"]);
    complaint(&mut hello(&["--cpu-affinity", "1000"]), 1, &["--cpu-affinity: processor 1000"]);
    complaint(&mut hello(&["--sandbox"]), 1, &["--sandbox", "--user"]);
    let missing = [&USER[..], &["--sandbox", "--sandbox-read", "/no-such-file"]].concat();
    complaint(&mut hello(&missing), 1, &["--sandbox-read /no-such-file"]);

    // Starts a master that lacks a capability, as if it did not run as root.
    let without = |capability: &str, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", capability, "--inh-caps", capability, "--"]).arg(program("hello"));
        command.args(HTTP).args(arguments);
        command
    };
    complaint(&mut without("-all", &USER), 1, &["--user", "it lacks CAP_SETGID"]);
    complaint(&mut without("-setuid", &USER), 1, &["--user", "it lacks CAP_SETUID"]);
    complaint(&mut without("-all", &["--chroot", "/usr"]), 1, &["--chroot", "it lacks CAP_SYS_CHROOT"]);
    let kept = ["--capabilities", "net_raw"];
    complaint(&mut without("-all", &kept), 1, &["--capabilities", "CAP_NET_RAW"]);
}

#[test]
fn a_failure_in_the_process_itself_is_reported_with_its_flag() {
    assert!(Uid::effective().is_root(), "these tests change users: run them as root");
    // This user cannot enter the directory, but root, which runs the check, can.
    let closed = tempfile::tempdir().unwrap();
    std::fs::set_permissions(closed.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let at = closed.path().to_string_lossy().into_owned();
    let arguments = [&USER[..], &["--chdir", &at]].concat();
    let mut workers = Server::launch(Command::new(program("hello")).args(HTTP).args(&arguments));
    let line = workers.wait_for("worker died");
    assert!(line.contains("said=\"--chdir: Permission denied"), "{line}");
    let directory = tempfile::tempdir().unwrap();
    let mut programs = Server::launch(&mut program_under_run(&directory, &arguments, &["sleep", "1000"]));
    let line = programs.wait_for("cannot start a worker");
    assert!(line.contains("--chdir: Permission denied"), "{line}");
    for server in [&mut workers, &mut programs] {
        server.stop();
    }
}

#[test]
fn a_limit_with_which_no_worker_can_start_is_rejected_or_logged_with_the_death() {
    assert!(Uid::effective().is_root(), "these tests change users: run them as root");
    let start = |mode: &[&str], limit: &str| {
        let mut command = Command::new(program("hello"));
        command.args(mode).args(HTTP).args(USER).args(["--rlimit", limit]);
        command
    };
    for (limit, cause) in [
        ("data=1M", "a worker needs more than"),
        ("nofile=3", "a worker needs more than 17 descriptors"),
        ("nproc=1", "1 workers need at least 2 threads"),
    ] {
        for mode in [&[][..], &["check"]] {
            let output = start(mode, limit).output_in_time().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let is_told = said.contains(&format!("--rlimit {limit}: {cause}")) && said.contains("raise the limit");
            assert!(output.status.code() == Some(1) && is_told, "{limit}: {said}");
        }
    }
    // The number of descriptors that an application needs is not known in advance.
    let hint = |limit: &str| format!("hint=\"a limit may be too low for it to start: --rlimit {limit}\"");
    let server = Server::launch(&mut start(&[], "nofile=20"));
    let line = server.logged("worker died");
    assert!(line.contains(&hint("nofile=20")), "{line}");
    drop(server);
    // `run`, with the default settle time, reports the same hint.
    let directory = tempfile::tempdir().unwrap();
    let bind = format!("fastcgi:unix:{}", directory.path().join("a.sock").display());
    let death = |limit: &str, program_and_arguments: &[&str]| {
        let mut command = Command::new(program("forkyard"));
        command.args([
            "run",
            "--direct",
            "--bind",
            &bind,
            "--workers",
            "1",
            "--rlimit",
            limit,
            "--rlimit",
            "core=0",
            "--",
        ]);
        Server::launch(command.args(program_and_arguments)).logged("worker died")
    };
    for limit in ["as=1M", "data=64K", "nofile=2"] {
        let line = death(limit, &["sleep", "1000"]);
        assert!(line.contains(&hint(limit)), "{line}");
    }
    // If the program has written output, the output is reported instead of the hint.
    let line = death("nofile=4096", &["sh", "-c", "echo no database; exit 3"]);
    assert!(line.contains("no database") && !line.contains("hint="), "{line}");
}

#[test]
fn a_pid_file_prevents_a_second_master_and_is_removed_with_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("a.pid");
    let at = path.to_string_lossy().into_owned();
    let arguments = [&HTTP[..], &["--pid-file", &at]].concat();
    let mut server = Server::start("hello", &arguments);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", server.pid()));
    let output = Command::new(program("hello")).args(&arguments).output_in_time().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("with pid {}", server.pid())) && said.contains("--pid-file"), "{said}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", server.pid()));
    // Workers do not hold the lock, so another master can start immediately after a master has been killed.
    server.signal(Signal::SIGKILL);
    server.wait_end();
    let mut next = Server::start("hello", &arguments);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", next.pid()));
    next.stop();
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

#[test]
fn socket_files_belong_to_the_configured_owner() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let bind = format!("http:unix:{}", path.display());
    let arguments = ["--bind", &bind, "--workers", "1", "--socket-owner", "4711:33", "--socket-mode", "660"];
    let mut server = Server::start("hello", &arguments);
    let socket = path.metadata().unwrap();
    assert_eq!((socket.uid(), socket.gid(), socket.mode() & 0o777), (4711, 33, 0o660));
    assert_eq!(status(child(&server), "Uid"), "0 0 0 0", "socket ownership does not change the workers' user");
    server.stop();
}
