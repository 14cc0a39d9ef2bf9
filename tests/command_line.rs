//! The command line: for incorrect usage, the program prints one line that names the fix, and exits with the right status.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output};

use common::limit::InTime as _;
use common::{Server, http, program};

fn run(name: &str, arguments: &[&str]) -> Output {
    Command::new(program(name)).args(arguments).output_in_time().expect("the command exits")
}

/// Runs `hello` with an invalid flag, and expects this exit status and these words in the error.
#[track_caller]
fn refused(arguments: &[&str], status: i32, words: &[&str]) {
    complained(&run("hello", arguments), status, words);
}

#[track_caller]
fn complained(output: &Output, status: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said:?}");
    }
}

#[test]
fn an_invalid_flag_is_a_usage_error() {
    refused(&["--no-such-flag"], 2, &["--no-such-flag", "--help"]);
    refused(&["--workers", "0"], 2, &["'0' is not a number of workers", "1 to 1024"]);
    refused(&["--workers", "many"], 2, &["'many' is not a number of workers", "auto"]);
    refused(&["--cache", "64X"], 2, &["'64X' is not a size", "64M"]);
    refused(&["--drain-timeout", "soon"], 2, &["'soon' is not a time", "500ms"]);
    refused(&["--socket-mode", "999"], 2, &["'999' is not a file mode", "660"]);
    refused(&["--bind", "gopher:127.0.0.1:70"], 2, &["unknown protocol 'gopher'"]);
    refused(&["--bind", "http:127.0.0.1"], 2, &["no port in '127.0.0.1'", "http:127.0.0.1:8080"]);
    refused(&["--max-params", "1K"], 2, &["out of range", "8K to 16M"]);
    refused(&["--max-uri", "64K"], 2, &["out of range", "1 to 65534"]);
    refused(&["--trust", "localhost"], 2, &["'localhost' is not an address", "10.0.0.0/8"]);
    refused(&["--allow", "10.0.0.1/8"], 2, &["names an address within the network"]);
    refused(&["--trust-header", "via"], 2, &["x-forwarded, forwarded"]);
}

#[test]
fn an_address_that_cannot_be_bound_is_a_failure() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let bind = format!("http:127.0.0.1:{port}");
    refused(&["--bind", &bind], 1, &["cannot bind", &bind, "in use by another program", "--bind"]);
    refused(&["--bind", "http:192.0.2.1:8080"], 1, &["is not an address of this machine"]);
    refused(&["--bind", "http:no-such-host.invalid:80"], 1, &["cannot resolve 'no-such-host.invalid:80'"]);
    refused(
        &["--bind", "fastcgi:unix:/no/such/directory/a.sock"],
        1,
        &["the directory /no/such/directory does not exist"],
    );
    refused(&["--bind", "fastcgi:fd:77"], 1, &["descriptor 77 is not open"]);
    refused(&["--bind", "fastcgi:fd:1"], 1, &["descriptor 1 is not a listening socket"]);
}

#[test]
fn a_unix_socket_is_not_taken_from_another_program() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("live.sock");
    let _live = UnixListener::bind(&path).unwrap();
    let bind = format!("fastcgi:unix:{}", path.display());
    refused(&["--bind", &bind], 1, &["another program is listening there"]);
    assert!(path.exists());

    let long = format!("fastcgi:unix:{}/{}", directory.path().display(), "x".repeat(120));
    refused(&["--bind", &long], 1, &["the maximum for a Unix socket is 107"]);
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    refused(&["--bind", &format!("fastcgi:unix:{}", file.display())], 1, &["is not a socket"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn an_impossible_cache_size_is_rejected() {
    let bind = ["--bind", "http:127.0.0.1:0"];
    refused(&[&bind[..], &["--cache", "1000T"]].concat(), 1, &["cannot create a shared cache of 1000 TiB", "--cache"]);
    // More memory than the machine has: the error names the requested amount, the available amount, and the flag.
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.strip_suffix("kB")).unwrap();
    let twice = (total.trim().parse::<u64>().unwrap() * 2).to_string() + "K";
    for (flag, what) in [("--cache", "a shared cache"), ("--events", "shared memory")] {
        for mode in [&[][..], &["check"]] {
            let words =
                [what, " MiB of shared memory: ", "Cannot allocate memory", " MiB available", &format!("with {flag}")];
            let limited = "the memory limit of this container";
            let output = run("hello", &[mode, &bind, &[flag, &twice]].concat());
            let words =
                if String::from_utf8_lossy(&output.stderr).contains(limited) { &words[..2] } else { &words[..] };
            complained(&output, 1, words);
        }
    }
    refused(&[&bind[..], &["--cache", "1K"]].concat(), 1, &["cannot create a shared cache of 1 KiB", "--cache"]);
    let large = ["--cache", "4M", "--cache-max-entry", "2M"];
    refused(
        &[&bind[..], &large].concat(),
        1,
        &["cannot keep entries of 2097152 bytes", "the most is", "--cache-max-entry"],
    );
    let nowhere = ["--cache-file", "/nonexistent/pages"];
    refused(
        &[&bind[..], &nowhere].concat(),
        1,
        &["in /nonexistent/pages: the directory /nonexistent does not exist", "--cache-file"],
    );
    refused(
        &[&bind[..], &nowhere, &["--cache", "0"]].concat(),
        1,
        &["--cache-file has no effect without a cache", "--cache"],
    );
}

#[test]
fn run_rejects_unsupported_flags_with_a_reason() {
    let bind = "fastcgi:unix:/tmp/never-made.sock";
    complained(
        &run("forkyard", &["run", "--direct", "--bind", bind, "--", "no-such-program"]),
        1,
        &["no program of that name in PATH"],
    );
    complained(
        &run("forkyard", &["run", "--direct", "--bind", bind, "--", "/etc/passwd"]),
        1,
        &["not an executable file"],
    );
    complained(&run("forkyard", &["run", "--direct", "--bind", bind]), 2, &["COMMAND"]);
    complained(
        &run("forkyard", &["run", "--direct", "--bind", "http:127.0.0.1:0", "--", "cat"]),
        2,
        &["over fastcgi only"],
    );
    complained(&run("forkyard", &["run", "--", "cat"]), 2, &["run needs an address to listen on", "forkyard run"]);
    let two = ["run", "--direct", "--bind", bind, "--bind", "fastcgi:127.0.0.1:0", "--", "cat"];
    complained(&run("forkyard", &two), 2, &["one --bind and got 2"]);
}

#[test]
fn help_lists_every_flag_with_its_default_and_variable() {
    for (name, arguments, flags) in [
        (
            "hello",
            &["--help"][..],
            &[
                "--threads",
                "--queue",
                "--header-timeout",
                "--max-body",
                "--max-headers",
                "--max-uri",
                "--max-requests-per-connection",
                "--allow",
                "--trust",
                "--trust-header",
                "--access-log",
                "--access-log-format",
            ][..],
        ),
        ("forkyard", &["run", "--help"], &["--direct", "--settle"]),
    ] {
        let help = String::from_utf8(run(name, arguments).stdout).unwrap();
        let help = help.split_ascii_whitespace().collect::<Vec<_>>().join(" "); // line breaks may occur anywhere
        let shared = [
            "--bind",
            "--workers",
            "--cache",
            "--backlog",
            "--drain-timeout",
            "--respawn-rate",
            "--log-level",
            "--log-file",
            "--log-format",
        ];
        for flag in shared.iter().chain(flags) {
            let variable = flag.trim_start_matches('-').replace('-', "_").to_uppercase();
            assert!(help.contains(flag), "{flag}");
            assert!(help.contains(&format!("[env: FORKYARD_{variable}")), "{flag}");
        }
        for words in ["[default: 30s]", "TERM ", "TTIN", "Exit status", "Sockets:", "Processes:"] {
            assert!(help.contains(words), "no {words:?} in {help}");
        }
    }
}

#[test]
fn an_application_reports_its_own_version_and_description() {
    let said = |name: &str, flag: &str| String::from_utf8(run(name, &[flag]).stdout).unwrap();
    assert_eq!(said("hello", "--version"), "hello\n", "not the version of another program");
    assert_eq!(said("hooks", "--version"), "hooks 7.8.9\n");
    assert!(said("hooks", "--help").starts_with("Shows when each hook runs\n"), "{}", said("hooks", "--help"));
    assert_eq!(said("forkyard", "--version"), format!("forkyard {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_banner_shows_the_settings_and_variables_take_effect() {
    let mut server = Server::start_command(
        Command::new(program("hello"))
            .env("FORKYARD_WORKERS", "3")
            .env("FORKYARD_BIND", "http:127.0.0.1:0,fastcgi:127.0.0.1:0")
            .args(["--cache", "1M", "--threads", "2"]),
    );
    let log = server.log();
    for words in ["forkyard 0.", "workers  3, 2 threads", "cache    1 MiB", "bind     http://127.0.0.1:", "ready in "] {
        assert!(log.contains(words), "no {words:?} in {log}");
    }
    assert_eq!((server.binds.len(), server.workers().len()), (2, 3));
    assert_eq!(http::get(&server.http(), "/").unwrap().body, b"Hello, world\n");
    server.stop();
}

#[test]
fn a_listening_standard_input_is_served_over_fastcgi() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut server = Server::start_command(
        Command::new(program("hello")).args(["--workers", "1"]).stdin(std::os::fd::OwnedFd::from(listener)),
    );
    let mut client = common::fastcgi::Client::connect(&address).unwrap();
    assert_eq!(client.request("GET", "/", b"").unwrap().body(), b"Hello, world\n");
    drop(client);
    server.stop();
}
