//! The configuration file: its settings take effect, all its errors are reported together, and a reload reads the file again.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::http;
use common::limit::InTime as _;
use common::{Server, program, wait_until};
use nix::sys::signal::Signal;

struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes the file, and returns its path.
    fn file(&self, text: &str) -> PathBuf {
        let path = self.path("forkyard.toml");
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn with_config(name: &str, before: &[&str], file: &Path, after: &[&str]) -> Command {
    let mut command = Command::new(program(name));
    command.args(before).arg("--config").arg(file).args(after);
    command
}

#[track_caller]
fn complained(output: &Output, status: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}{}", String::from_utf8_lossy(&output.stdout));
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said:?}");
    }
}

#[test]
fn a_flag_overrides_a_variable_and_a_variable_overrides_the_file() {
    let directory = Directory::new();
    let file = directory.file(
        "# all kinds of values\nbind = ['http:127.0.0.1:0', \"fastcgi:127.0.0.1:0\"]\nworkers = 3\nthreads = 2\n\
         cache = \"1M\"\nidle_timeout = 30\nsocket-mode = 0o660\n",
    );
    let mut command = with_config("hello", &[], &file, &[]);
    let mut server = Server::start_command(&mut command);
    let log = server.log();
    assert!(log.contains("workers  3, 2 threads") && log.contains("cache    1 MiB"), "{log}");
    assert_eq!((server.binds.len(), server.workers().len()), (2, 3));
    server.stop();

    let mut server =
        Server::start_command(command.env("FORKYARD_WORKERS", "2").env("FORKYARD_BIND", "http:127.0.0.1:0"));
    assert!(server.log().contains("workers  2, 2 threads"), "{}", server.log());
    assert_eq!(server.binds.len(), 1, "the variable's list replaces the file's list");
    server.stop();

    let mut server = Server::start_command(command.args(["--workers", "1", "--cache=2M"]));
    assert!(server.log().contains("workers  1, 2 threads") && server.log().contains("cache    2 MiB"));
    server.stop();

    // The environment variable contains the path of the file.
    let mut command = Command::new(program("hello"));
    let mut server = Server::start_command(command.env("FORKYARD_CONFIG", &file));
    assert!(server.log().contains("workers  3"), "{}", server.log());
    server.stop();
}

#[test]
fn run_reads_its_command_from_the_file() {
    let directory = Directory::new();
    let socket = directory.path("a.sock");
    let file = directory.file(&format!(
        "command = ['sleep', '600']\nbind = 'fastcgi:unix:{}'\nworkers = 2\nsettle = '10ms'\ndirect = true\n",
        socket.display()
    ));
    let mut server = Server::start_command(&mut with_config("forkyard", &["run"], &file, &[]));
    assert!(server.log().contains("/sleep, on its standard input") && server.workers().len() == 2, "{}", server.log());
    server.stop();
    let mut server =
        Server::start_command(&mut with_config("forkyard", &["run"], &file, &["--", "tail", "-f", "/dev/null"]));
    assert!(server.log().contains("/tail, on its standard input"), "{}", server.log());
    server.stop();
    let file = directory.file("command = 'sleep 600'\nbind = 'fastcgi:unix:/a.sock'\n");
    complained(
        &with_config("forkyard", &["run"], &file, &[]).output_in_time().unwrap(),
        2,
        &[":1:11: 'command' must be a list"],
    );
}

#[test]
fn all_errors_are_reported_together_with_their_positions() {
    let directory = Directory::new();
    let file = directory.file(
        "workers = 'many'\nbnd = 'http:127.0.0.1:0'\nbind = ['http:127.0.0.1:0', 'gopher:1']\nqueue = [1]\n\
         idle_timeout = true\nidle-timeout = '3s'\nthreads =\nmax-body = 1.5\nhelp = true\n[section]\nvalue = 1\n",
    );
    let expected = [
        ":1:11: 'workers': 'many' is not a number of workers (expected 1 to 1024, a range as in 2..16 or 0..4, or auto)",
        ":2:1: unknown setting 'bnd' (did you mean 'bind'?)",
        ":3:29: 'bind': unknown protocol 'gopher'",
        ":4:9: 'queue' takes one value, not a list",
        ":5:16: 'idle-timeout' takes a string or a number, not a boolean",
        "'idle-timeout' is given twice",
        ":7:",
        ":8:12: 'max-body' takes a string or a number, not a float",
        ":9:1: 'help' cannot be set in a configuration file",
        ":10:2: unknown setting 'section' (did you mean 'socket-owner'?)\n",
    ];
    for (before, status) in [(&["check"][..], 1), (&[], 2)] {
        let output = with_config("hello", before, &file, &[]).output_in_time().unwrap();
        complained(&output, status, &expected);
        let said = String::from_utf8_lossy(&output.stderr);
        let lines = said.lines().filter(|line| line.contains("forkyard.toml:")).count();
        assert_eq!(lines, expected.len(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    // A setting is validated even if a flag overrides it.
    let file = directory.file("workers = 0\n");
    let output = with_config("hello", &["check"], &file, &["--workers", "2"]).output_in_time().unwrap();
    complained(&output, 1, &[":1:11: 'workers': '0' is not"]);
    complained(
        &with_config("hello", &[], &directory.path("none"), &[]).output_in_time().unwrap(),
        2,
        &["cannot read", "--config"],
    );
    complained(
        &with_config("hello", &["check"], directory.0.path(), &[]).output_in_time().unwrap(),
        1,
        &["it is not a regular file"],
    );
}

#[test]
fn check_tests_everything_that_can_be_tested_without_serving() {
    let directory = Directory::new();
    let file = directory.file("workers = 2\nbind = 'http:127.0.0.1:0'\n");
    let output = with_config("hello", &["check"], &file, &[]).output_in_time().unwrap();
    complained(&output, 0, &[]);
    assert_eq!(output.stdout, b"configuration is fine\n");

    let directory_name = directory.0.path().display();
    let file = directory.file(&format!(
        "command = ['no-such-program']\nbind = 'fastcgi:unix:{directory_name}/none/a.sock'\ncache = '1M'\n\
         cache-file = '{directory_name}/none/cache'\ncontrol = '{}'\n",
        directory.path("forkyard.toml").display()
    ));
    let output = with_config("forkyard", &["check"], &file, &[]).output_in_time().unwrap();
    complained(
        &output,
        1,
        &[
            "no program of that name in PATH",
            "/none does not exist (create it",
            "cannot store the cache in",
            "the existing file is not a socket",
        ],
    );
    assert!(output.stdout.is_empty());

    // The addresses of the running service are in use. `check` does not report them as an error, and does not disturb the service.
    let arguments = ["--bind", &format!("fastcgi:unix:{}", directory.path("a.sock").display()), "--workers", "1"];
    let control = directory.path("control.sock");
    let control = ["--control", control.to_str().unwrap()];
    let mut server = Server::start("hello", &[&arguments[..], &control].concat());
    let check = [&["check"][..], &arguments, &control].concat();
    let output = Command::new(program("hello")).args(check).output_in_time().unwrap();
    complained(&output, 0, &["a program is listening there now", "control socket"]);
    server.stop();
}

#[test]
fn a_reload_reads_the_file_again_and_an_invalid_file_changes_nothing() {
    let directory = Directory::new();
    let control = directory.path("control.sock");
    let good = format!("bind = 'http:127.0.0.1:0'\nworkers = 2\ncontrol = '{}'\n", control.display());
    let file = directory.file(&good);
    let mut server = Server::start_command(&mut with_config("crashy", &[], &file, &[]));
    let address = server.http();
    let reload =
        || Command::new(program("crashy")).args(["reload", "--control"]).arg(&control).output_in_time().unwrap();
    let posted = || http::post(&address, "/echo", &[b'x'; 2000]).unwrap().status;
    assert_eq!(posted(), 200);

    let old = server.workers();
    directory.file(&(good.clone() + "max-body = '1Q'\n"));
    complained(&reload(), 1, &["the workers stay as they are", "forkyard.toml:4:12: 'max-body'", "is not a size"]);
    server.signal(Signal::SIGHUP);
    assert!(server.wait_for("a signal to reload").contains("received a signal to reload"));
    assert!(server.wait_for("reload refused").contains("forkyard.toml:4:12"));
    assert_eq!((server.workers(), posted()), (old, 200));

    directory.file(&(good.replace("= 2", "= 5") + "max-body = '1K'\nbacklog = 7\n"));
    let output = reload();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("these settings take effect only after a restart: --backlog\n"), "{said}");
    wait_until("there are five workers", || (server.workers().len() == 5).then_some(()));
    wait_until("the new limit applies", || (posted() == 413).then_some(()));
    assert_eq!(http::get(&address, "/ok").unwrap().status, 200);

    // Flags and variables also override the file when it is reloaded.
    directory.file(&good);
    assert_eq!(reload().status.code(), Some(0));
    wait_until("the old limit applies", || (posted() == 200).then_some(()));
    wait_until("there are two workers", || (server.workers().len() == 2).then_some(()));

    // A master that was started with two workers has room for twenty processes, including draining ones.
    directory.file(&(good.replace("= 2", "= 20") + "user = 'no-such-user'\n"));
    complained(&reload(), 1, &["the workers stay as they are", "no-such-user"]);
    directory.file(&good.replace("= 2", "= 20"));
    let said = String::from_utf8_lossy(&reload().stdout).into_owned();
    assert!(said.contains("these settings take effect only after a restart: --workers\n"), "{said}");
    wait_until("there are still two workers", || (server.workers().len() == 2).then_some(()));
    server.stop();
}
