//! Settings: all errors are reported together, each with a remedy, before any process is started.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::limit::InTime as _;
use common::{Server, program};

fn run(name: &str, arguments: &[&str]) -> Output {
    Command::new(program(name)).args(arguments).output_in_time().unwrap()
}

#[track_caller]
fn complained(output: &Output, status: i32, words: &[&str]) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{said}{}", String::from_utf8_lossy(&output.stdout));
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
    said
}

fn file(directory: &tempfile::TempDir, text: &str) -> PathBuf {
    let path = directory.path().join("forkyard.toml");
    std::fs::write(&path, text).unwrap();
    path
}

fn check(name: &str, directory: &tempfile::TempDir, text: &str) -> Output {
    let path = file(directory, text);
    Command::new(program(name)).args(["check", "--config"]).arg(path).output_in_time().unwrap()
}

/// Returns the flags of a command, from its help.
fn flags_of(name: &str, arguments: &[&str]) -> BTreeSet<String> {
    let help = run(name, &[arguments, &["--help"]].concat());
    let help = String::from_utf8(help.stdout).unwrap();
    let names = help.lines().filter_map(|line| line.strip_prefix("      --")?.split([' ', '=', '[', '<']).next());
    names.map(ToOwned::to_owned).collect()
}

#[test]
fn an_unknown_log_level_is_rejected_with_a_list_of_the_valid_levels() {
    let levels = "expected off, error, warn, info, debug, trace";
    for (level, hint) in
        [("loud", ""), ("warning", "did you mean 'warn'?"), ("notice", "did you mean 'info'?"), ("info,x=nix", "'nix'")]
    {
        complained(&run("hello", &["--log-level", level]), 2, &["--log-level", levels, hint]);
        complained(&run("hello", &["check", "--log-level", level]), 1, &["--log-level", levels, hint]);
    }
    // A log level for one module does not silence the other modules.
    let mut server =
        Server::start("crashy", &["--bind", "http:127.0.0.1:0", "--workers", "1", "--log-level", "hyper=debug"]);
    server.signal(nix::sys::signal::Signal::SIGHUP);
    server.wait_for("reload done gen=2");
    server.stop();
}

#[test]
fn a_switch_is_a_boolean_in_the_configuration_file() {
    let directory = tempfile::tempdir().unwrap();
    let bind = "bind = 'http:127.0.0.1:0'\nuser = 'root'\n";
    for (name, setting) in [
        ("hello", "no-new-privileges = true"),
        ("hello", "no-new-privileges = false"),
        ("hello", "no-new-privileges = 'true'"),
        ("hello", "clear-env = true"),
        ("hello", "clear_env = false"),
        ("hello", "sandbox = false"),
        ("hello", "sandbox = 'best-effort'\nuser = 4711\ngroup = 4711"),
        ("hello", "sandbox = true\nuser = 4711\ngroup = 4711"),
        ("forkyard", "direct = true"),
        ("forkyard", "direct = false"),
        ("forkyard", "direct = true\nsettle = '1s'"),
    ] {
        let bind =
            if name == "hello" { bind } else { "bind = 'fastcgi:127.0.0.1:0'\nuser = 'root'\ncommand = ['sleep']\n" };
        let bind = if setting.contains("user") { bind.replace("user = 'root'\n", "") } else { bind.to_owned() };
        let said = complained(&check(name, &directory, &format!("{bind}{setting}\n")), 0, &[]);
        assert_eq!(said, "", "{setting}");
    }
    complained(&check("hello", &directory, "idle-timeout = true\n"), 1, &["takes a string or a number, not a boolean"]);
    complained(&check("hello", &directory, "clear-env = 'yes'\n"), 1, &["'clear-env' must be true or false"]);
}

#[test]
fn check_reports_all_errors_that_startup_would_report_one_by_one() {
    let directory = tempfile::tempdir().unwrap();
    let text = "workers = 'many'\n\
        idle-timeout = 'x'\n\
        bind = ['http:192.0.2.1:80', 'fastcgi:unix:/no-such-directory/a.sock', 'http:127.0.0.1:65000', 'fastcgi:127.0.0.1:65000']\n\
        control = '/no-such-directory/control'\n\
        events-socket = '/no-such-directory/events'\n\
        log-file = '/no-such-directory/log'\n\
        access-log = '/etc'\n\
        pid-file = '/etc/passwd/pid'\n\
        cache = '1K'\n\
        cache-file = '/no-such-directory/cache'\n\
        user = 4711\n\
        cpu-affinity = '1000'\n\
        chroot = '/no-such-root'\n\
        socket-owner = '4711:4711'\n\
        sandbox-read = ['/usr']\n\
        daemon = ['a=no-such-program', 'b=no-such-program', 'a=sleep 1']\n\
        cron = ['c=@daily=no-such-program']\n";
    let words = [
        ":1:11: 'workers': 'many' is not a number of workers",
        ":2:16: 'idle-timeout': 'x' is not a time",
        "cannot bind http:192.0.2.1:80: 192.0.2.1 is not an address of this machine",
        "cannot bind fastcgi:unix:/no-such-directory/a.sock: ",
        "--bind http:127.0.0.1:65000 and --bind fastcgi:127.0.0.1:65000 overlap",
        "cannot create the control socket /no-such-directory/control: ",
        "cannot create the publish socket /no-such-directory/events: ",
        "--log-file: cannot open /no-such-directory/log: ",
        "--access-log: cannot open /etc: ",
        "cannot write the pid file /etc/passwd/pid: /etc/passwd is not a directory",
        "the least is",
        "cannot store the cache in /no-such-directory/cache: ",
        "--user: ",
        "--cpu-affinity: processor 1000",
        "--chroot: /no-such-root: ",
        "--sandbox-read and --sandbox-write need --sandbox",
        "--daemon and --cron: the name 'a' is used twice",
    ];
    complained(&check("hello", &directory, text), 1, &words);
    // The programs of sidecars with distinct names are looked up. If a name is used twice, none of the programs is looked up.
    let text = "bind = 'fastcgi:127.0.0.1:0'\nworkers = 'many'\ncommand = ['no-such-program']\n\
        daemon = ['a=no-such-a', 'b=no-such-b']\ncron = ['c=@daily=no-such-c']\n";
    let words = ["'workers': 'many'", "no-such-program", "--daemon a: ", "--daemon b: ", "--cron c: "];
    complained(&check("forkyard", &directory, text), 1, &words);

    // A value that cannot be parsed does not cause any further errors.
    let said = complained(
        &check("forkyard", &directory, "bind = 'gopher:1'\ncommand = 'sleep 1'\n"),
        1,
        &["gopher", "must be a list"],
    );
    assert!(!said.contains("needs an address to listen on") && !said.contains("no program to run"), "{said}");

    // Errors in flags and variables are reported together with the errors in the file.
    let path = file(&directory, "queue = 'x'\ncache-file = '/no-such-directory/cache'\n");
    let output = Command::new(program("hello"))
        .args(["check", "--workers", "many", "--idle-timeout=soon", "--workers", "few", "--config"])
        .arg(path)
        .env("FORKYARD_MAX_BODY", "big")
        .output_in_time()
        .unwrap();
    let said = complained(
        &output,
        1,
        &["--workers: 'many'", "--idle-timeout: 'soon'", "--max-body: 'big'", "'queue': ", "/cache: "],
    );
    assert_eq!(said.matches("--workers").count(), 1, "{said}");
}

/// Returns each setting that takes a file, as the arguments that set it to this path.
fn settings_of_files(path: &str) -> [(&'static str, Vec<String>); 7] {
    let with = |flag: &'static str| (flag, ["--bind", "http:127.0.0.1:0", flag, path].map(ToOwned::to_owned).to_vec());
    [
        ("--bind", vec!["--bind".to_owned(), format!("fastcgi:unix:{path}")]),
        with("--control"),
        with("--events-socket"),
        with("--pid-file"),
        with("--cache-file"),
        with("--log-file"),
        with("--access-log"),
    ]
}

#[test]
fn check_and_startup_reject_the_same_paths_with_the_same_messages() {
    const LINKS: &[&str] = &["--cache-file", "--log-file", "--access-log"];
    const SOCKETS: &[&str] = &["--bind", "--control", "--events-socket"];
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &str| directory.path().join(path).display().to_string();
    std::fs::create_dir(at("directory")).unwrap();
    std::fs::write(at("file"), "").unwrap();
    std::os::unix::fs::symlink("loop", at("loop")).unwrap();
    std::os::unix::fs::symlink("none/x", at("dangling")).unwrap();
    nix::unistd::mkfifo(&directory.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    drop(std::os::unix::net::UnixListener::bind(at("stale")).unwrap());
    let long = "x".repeat(256);
    let none: &[&str] = &[];
    // The path, the error, and the settings for which the path is valid.
    for (path, cause, fine) in [
        (at("new/"), "it is the path of a directory (add the name of a file, with", none),
        (at("directory/"), "it is the path of a directory (", none),
        (at("file/"), "it is the path of a directory (", none),
        (at("directory"), "a directory", none),
        (at("loop"), "symbolic link", none),
        (at("loop/x"), "symbolic links form a loop (", none),
        (at("dangling"), "", none),
        (at(&long), "bytes, and ", none),
        (at("none/x"), "none does not exist (create it, or choose another path with", none),
        (at("file/x"), "file is not a directory (choose another path with", none),
        (at("stale"), "a socket", SOCKETS),
        (at("fifo"), "a FIFO", &["--log-file", "--access-log"]),
        ("/dev/null".to_owned(), "a device", &["--log-file", "--access-log"]),
    ] {
        for (flag, arguments) in settings_of_files(&path) {
            let all = ["--user", "root", "--workers", "1"].into_iter().chain(arguments.iter().map(String::as_str));
            let all: Vec<&str> = all.collect();
            let checked = run("hello", &[&["check"][..], &all].concat());
            if fine.contains(&flag) {
                complained(&checked, 0, &[]);
                continue;
            }
            // A setting that opens an existing file follows a link. A setting that creates the file fails because of the link itself.
            let cause = match flag {
                _ if !path.ends_with("/loop") || LINKS.contains(&flag) => cause,
                "--pid-file" => "it is a symbolic link, not a pid file",
                _ => "the existing file is not a socket",
            };
            let said = complained(&checked, 1, &[&path, cause, flag]);
            let lines: Vec<&str> = said.lines().collect();
            assert!(lines.len() == 1 && lines[0].starts_with("forkyard: error: "), "one error: {said}");
            let start = complained(&run("hello", &all), 1, &[]);
            assert_eq!(start.trim_end().replacen("forkyard: ", "forkyard: error: ", 1), lines[0]);
        }
    }
    // Problems that may disappear before startup are only warnings in `check`.
    for flag in ["--log-file", "--access-log"] {
        let fifo = at("fifo");
        let output = run("hello", &["check", "--user", "root", "--bind", "http:127.0.0.1:0", flag, &fifo]);
        complained(&output, 0, &[&format!("forkyard: warning: {flag}: a start fails unless a program reads from")]);
        let output = run("hello", &["--user", "root", "--bind", "http:127.0.0.1:0", flag, &fifo]);
        complained(&output, 1, &[flag, "no process reads this FIFO (start its reader first)"]);
    }
    assert_eq!(
        entries(directory.path()).into_iter().collect::<Vec<_>>(),
        ["dangling", "directory", "fifo", "file", "loop", "stale"]
    );
}

#[test]
fn check_distinguishes_errors_from_warnings() {
    let bind = ["check", "--bind", "http:127.0.0.1:0"];
    let said = complained(&run("hello", &bind), 0, &["forkyard: warning: the application runs as root"]);
    assert!(!said.contains("error"), "{said}");
    let wrong = ["--workers", "many", "--pid-file", "/no-such-directory/pid"];
    let said = complained(&run("hello", &[&bind[..], &wrong].concat()), 1, &[]);
    let count = |prefix: &str| said.lines().filter(|line| line.starts_with(prefix)).count();
    assert_eq!((count("forkyard: error: "), count("forkyard: warning: ")), (2, 1), "{said}");
    complained(&run("hello", &["check", "--no-such-flag"]), 2, &["--no-such-flag"]);
    for (name, help) in [("hello", ["check", "--help"]), ("forkyard", ["check", "--help"])] {
        let help = String::from_utf8(run(name, &help).stdout).unwrap();
        assert!(help.contains("'forkyard: warning: '") && help.contains("Exit status: 0"), "{help}");
    }
}

#[test]
fn intervals_between_checks_cannot_be_too_short() {
    let top = |interval| run("hello", &["top", "--control", "/x", "--interval", interval]);
    for (flag, least) in
        [("--memory-interval", "expected at least 100ms"), ("--hang-timeout", "0 for never, or at least 100ms")]
    {
        for time in ["1ms", "99ms"] {
            complained(&run("hello", &[flag, time]), 2, &[flag, least]);
        }
        complained(&run("hello", &["check", "--bind", "http:127.0.0.1:0", flag, "100ms"]), 0, &[]);
    }
    complained(&run("hello", &["--memory-interval", "0"]), 2, &["expected at least 100ms"]);
    for time in ["0", "1ms"] {
        complained(&top(time), 2, &["--interval", "expected at least 100ms"]);
    }
    complained(&top("100ms"), 1, &["/x"]);
}

#[test]
fn an_unclosed_list_is_one_error_with_its_position() {
    let directory = tempfile::tempdir().unwrap();
    let text = "workers = 'many'\nbind = ['http:127.0.0.1:0', 'fastcgi:127.0.0.1:0'\nthreads = 2\ncache = '64M'\nuser = 'root'\n";
    let said = complained(&check("hello", &directory, text), 1, &[]);
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].contains(":1:11: 'workers': 'many'"), "{said}");
    assert!(
        lines[1].contains(":2:8: 'bind': the list that begins here is not closed (']' is missing before line 3)"),
        "{said}"
    );
    assert!(lines[2..].iter().all(|line| !line.contains("forkyard.toml")), "{said}");
    // The error is the same if the list is closed on a later line, or not at all.
    for (text, place) in [
        ("bind = ['http:127.0.0.1:0'\nallow = ['unix']\n", "before line 2"),
        ("bind = ['http:127.0.0.1:0'\n", "at the end"),
        ("bind = [\n  'http:127.0.0.1:0',\n", "at the end"),
    ] {
        let said =
            complained(&check("hello", &directory, text), 1, &[":1:8: 'bind': the list that begins here", place]);
        assert_eq!(said.matches("forkyard.toml").count(), 1, "{said}");
    }
    let said = complained(&check("hello", &directory, "workers = 4\nthreads = 2\nworkers = 5\n"), 1, &[]);
    assert!(said.contains(":3:1: 'workers' is given twice"), "{said}");
}

#[test]
fn flags_that_require_gateways_are_rejected_with_direct() {
    let run_with = |flags: &[&str]| {
        let bind = ["check", "--bind", "fastcgi:127.0.0.1:0"];
        String::from_utf8(run("forkyard", &[&bind[..], flags, &["--", "sleep", "1"]].concat()).stderr).unwrap()
    };
    for flag in [
        "--max-requests=100",
        "--access-log=/dev/null",
        "--retries=1",
        "--backend=http",
        "--max-body=1M",
        "--gateways=1",
    ] {
        let name = flag.split_once('=').unwrap().0;
        let said = run_with(&[flag, "--direct"]);
        assert!(said.contains(&format!("{name} is not available here: with --direct, ")), "{said}");
        let said = run_with(&[flag]);
        assert!(!said.contains("is not available here"), "{said}");
    }
    for (flags, word) in [
        (&["--ready-by=descriptor"][..], "--ready-by has no effect without --direct"),
        (&["--index=index.php"], "--index names a script below --root"),
        (&["--backend=http", "--root=/"], "--root has no effect with --backend http"),
        (&["--root=/nonexistent/forkyard"], "--root: /nonexistent/forkyard"),
        (&["--temp-dir=/nonexistent/forkyard"], "--temp-dir: /nonexistent/forkyard"),
        (&["--gateways=0"], "'0' is not a number of gateways"),
    ] {
        let said = run_with(flags);
        assert!(said.contains(word), "{flags:?}: {said}");
    }
}

#[test]
fn flags_that_run_lacks_are_rejected_with_the_reason_and_documented() {
    let missing: Vec<String> = flags_of("hello", &[]).difference(&flags_of("forkyard", &["run"])).cloned().collect();
    assert!(missing.contains(&"threads".to_owned()) && missing.contains(&"sandbox".to_owned()), "{missing:?}");
    let flags: Vec<String> = missing.iter().map(|flag| format!("--{flag}=1")).collect();
    let arguments = [
        &["run", "--direct", "--bind", "fastcgi:127.0.0.1:0"],
        &flags.iter().map(String::as_str).collect::<Vec<_>>()[..],
    ];
    let said = complained(&run("forkyard", &[&arguments.concat()[..], &["--", "sleep", "1"]].concat()), 2, &[]);
    let directory = tempfile::tempdir().unwrap();
    let settings: String = missing.iter().map(|flag| format!("{flag} = 1\n")).collect();
    let of_file = complained(&check("forkyard", &directory, &settings), 1, &[]);
    let document = include_str!("../docs/operations.md");
    let table = document.split("## Flags that `forkyard run` lacks").nth(1).expect("the document has this section");
    let cells = table.lines().filter_map(|line| line.strip_prefix("| `--")?.split(" | ").next());
    let named: BTreeSet<&str> =
        cells.flat_map(|cell| cell.split(['`', ',', ' '])).filter(|word| !word.is_empty()).collect();
    let named: BTreeSet<&str> = named.into_iter().map(|flag| flag.trim_start_matches('-')).collect();
    for flag in &missing {
        assert!(said.contains(&format!("--{flag} is not available here: ")), "{flag}: {said}");
        assert!(of_file.contains(&format!("'{flag}' is not available here: ")), "{flag}: {of_file}");
        assert!(named.contains(flag.as_str()), "--{flag} is missing in the table in docs/operations.md");
    }
    assert!(!said.contains("tip:"), "{said}");
    let named: Vec<&str> = named.into_iter().filter(|flag| !missing.iter().any(|missing| missing == flag)).collect();
    assert!(named.is_empty(), "run has these flags: {named:?}");
    // The error is the same for a flag without its value, and for flags that only `run` has.
    complained(
        &run("forkyard", &["run", "--threads", "--", "cat"]),
        2,
        &["--threads is not available here", "forkyard run"],
    );
    complained(
        &run("hello", &["--settle", "1s"]),
        2,
        &["--settle is not available here: a worker reports when it is ready"],
    );
    complained(&run("hello", &["--direct"]), 2, &["--direct is not available here: it is a flag of forkyard run"]);
}

#[test]
fn errors_suggest_what_was_probably_meant() {
    let bind = ["run", "--direct", "--bind", "fastcgi:unix:/tmp/never-made.sock"];
    let said = run("forkyard", &[&bind[..], &["php-cgi", "-d", "memory_limit=64M"]].concat());
    let line = "forkyard run --direct --bind fastcgi:unix:/tmp/never-made.sock -- php-cgi -d 'memory_limit=64M'";
    let said = complained(&said, 2, &["unexpected argument 'php-cgi'", "come after '--'"]);
    assert!(said.contains(line) || said.contains(&line.replace('\'', "")), "{said}");
    complained(&run("forkyard", &["restart"]), 2, &["'restart'", "'reload' replaces all workers", "'upgrade'"]);
    complained(&run("hello", &["restart"]), 2, &["'restart'", "'reload' replaces all workers"]);
    // The suggested command is correct, wherever the flags and the sub-command were given.
    for (name, wrong, right) in [
        ("hello", "--control /x status", "hello status --control /x"),
        ("hello", "--control /x cache purge --tag a", "hello cache purge --control /x --tag a"),
        ("hello", "cache --control /x stats", "hello cache stats --control /x"),
        ("hello", "--timeout 3s status --control /x", "hello status --timeout 3s --control /x"),
        ("hello", "--bind http:127.0.0.1:0 check", "hello check --bind http:127.0.0.1:0"),
        ("hello", "check run --workers 2", "hello check --workers 2"),
        ("hello", "status /x", "hello status --control /x"),
        ("forkyard", "--control /x status", "forkyard status --control /x"),
        ("forkyard", "--control /x scale 4", "forkyard scale --control /x 4"),
        ("forkyard", "run --control /x status", "forkyard status --control /x"),
        (
            "forkyard",
            "--workers 2 run --bind fastcgi:fd:0 -- cat",
            "forkyard run --workers 2 --bind fastcgi:fd:0 -- cat",
        ),
        ("forkyard", "check run --bind fastcgi:fd:0 -- cat", "forkyard check --bind fastcgi:fd:0 -- cat"),
        ("forkyard", "check run --bind fastcgi:fd:0 cat -u", "forkyard check --bind fastcgi:fd:0 -- cat -u"),
        ("forkyard", "run check --bind fastcgi:fd:0 -- cat", "forkyard check --bind fastcgi:fd:0 -- cat"),
    ] {
        let said = run(name, &wrong.split(' ').collect::<Vec<_>>());
        let said = complained(&said, 2, &["  tip: ", &format!(": {right}\n")]);
        assert_eq!(said.matches("tip:").count(), 1, "{said}");
    }
    complained(&run("hello", &["run", "--", "cat"]), 2, &["'forkyard run' runs a program"]);
    // These commands would purge or release nothing.
    for what in [&[][..], &["--tag", ""], &["--prefix", ""], &[""]] {
        let said = run("hello", &[&["cache", "purge", "--control", "/x"], what].concat());
        complained(&said, 2, if what.is_empty() { &["--tag", "--prefix", "'cache clear'"] } else { &["for '"] });
    }
    complained(&run("hello", &["quarantine", "release", "--control", "/x"]), 2, &["'quarantine ls'", "--all"]);
    complained(&run("forkyard", &["shutdown"]), 2, &["'stop' stops the master"]);
    complained(&run("hello", &["--bind", "fastcgi:/run/x.sock"]), 2, &["did you mean fastcgi:unix:/run/x.sock?"]);
    complained(&run("hello", &["--bind", "unix:/run/x.sock"]), 2, &["did you mean fastcgi:unix:/run/x.sock?"]);
    complained(&run("hello", &["--bind", "127.0.0.1:8080"]), 2, &["did you mean http:127.0.0.1:8080?"]);
}

#[test]
fn an_application_that_runs_as_root_without_user_logs_a_warning() {
    const WARNING: &str = "the application runs as root (choose a user, as in --user";
    let directory = tempfile::tempdir().unwrap();
    let bind = format!("fastcgi:unix:{}", directory.path().join("a.sock").display());
    let start = |name: &str, user: &[&str]| {
        let program: &[&str] = if name == "forkyard" { &["--", "sleep", "1000"] } else { &[] };
        let run: &[&str] = if name == "forkyard" { &["run", "--direct"] } else { &[] };
        let mut server = Server::start(name, &[run, &["--bind", &bind, "--workers", "1"], user, program].concat());
        server.stop();
        server.log()
    };
    assert!(nix::unistd::geteuid().is_root(), "run this test as root");
    for name in ["hello", "forkyard"] {
        assert!(start(name, &[]).contains(WARNING), "{name}");
        for user in [&["--user", "root"][..], &["--user", "4711", "--group", "4711"]] {
            let log = start(name, user);
            assert!(!log.contains("WARN"), "{name} {user:?}: {log}");
        }
    }
    complained(&run("hello", &["check", "--bind", "http:127.0.0.1:0"]), 0, &[WARNING]);
    assert_eq!(complained(&run("hello", &["check", "--bind", "http:127.0.0.1:0", "--user", "root"]), 0, &[]), "");
}

fn entries(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn settings_with_the_same_path_are_all_reported_before_any_file_is_created() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", directory.path().join("link")).unwrap();
    let at = |path: &str| directory.path().join(path).display().to_string();
    let port = common::free_port();
    let text = format!(
        "user = 'root'\ncache = '8M'\nworkers = 1\nbind = ['http:0.0.0.0:{port}', 'http:127.0.0.1:{port}', \
         'fastcgi:unix:{}', 'scgi:unix:{}', 'http:unix:@one', 'scgi:unix:@one']\n\
         control = '{}'\nevents-socket = '{}'\nlog-file = '{}'\naccess-log = '{}'\ncache-file = '{}'\npid-file = '{}'\n",
        at("real/a.sock"),
        at("link/b.sock"),
        at("link/a.sock"),
        at("link/../real/b.sock"),
        at("real/log"),
        at("link/log"),
        at("cache"),
        at("real/../cache"),
    );
    let words = [
        &format!(
            "--bind http:0.0.0.0:{port} and --bind http:127.0.0.1:{port} overlap: both would listen on port {port}"
        ),
        &format!("--bind fastcgi:unix:{} and --control {} name the same file", at("real/a.sock"), at("link/a.sock")),
        &format!("--bind scgi:unix:{} and --events-socket {} name", at("link/b.sock"), at("link/../real/b.sock")),
        "--bind http:unix:@one and --bind scgi:unix:@one name the same socket",
        &format!("--pid-file {} and --cache-file {} name", at("real/../cache"), at("cache")),
    ];
    let before = || entries(directory.path()).into_iter().chain(entries(&directory.path().join("real")));
    let said = complained(&check("hello", &directory, &text), 1, &words);
    assert_eq!(said.matches(" and --").count(), words.len(), "the logs may share a file: {said}");
    let start = |text: &str| {
        let path = file(&directory, text);
        Command::new(program("hello")).arg("--config").arg(path).output_in_time().unwrap()
    };
    complained(&start(&text), 1, &words);
    // The reason is in the log, which is not among the files checked here.
    let log = std::fs::read_to_string(at("real/log")).unwrap();
    assert!(words.iter().all(|word| log.contains(word)), "{log}");
    std::fs::remove_file(at("real/log")).unwrap();
    assert_eq!(before().collect::<Vec<_>>(), ["forkyard.toml", "link", "real"]);

    // If another setting has the same path as the log file, a new log file is not created, and an existing file is left unchanged.
    let text = format!("bind = 'fastcgi:unix:{}'\nlog-file = '{}'\n", at("real/x"), at("link/x"));
    complained(&start(&text), 1, &["name the same file"]);
    assert_eq!(before().collect::<Vec<_>>(), ["forkyard.toml", "link", "real"]);
    for flag in ["log-file", "access-log"] {
        let path = directory.path().join("empty");
        std::fs::write(&path, "").unwrap();
        let text = format!("bind = 'http:127.0.0.1:0'\n{flag} = '{0}'\npid-file = '{0}'\n", path.display());
        for output in [start(&text), check("hello", &directory, &text)] {
            complained(&output, 1, &["name the same file", "--pid-file", &format!("--{flag}")]);
            assert_eq!(std::fs::read(&path).unwrap(), b"", "{flag}");
        }
    }
}

#[test]
fn a_cgi_call_does_not_log_into_the_file_of_its_cache() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one");
    let mut call = Command::new(program("hello"));
    call.envs([("GATEWAY_INTERFACE", "CGI/1.1"), ("REQUEST_METHOD", "GET"), ("REQUEST_URI", "/")]);
    call.env("FORKYARD_LOG_FILE", &path).env("FORKYARD_CACHE_FILE", &path).stdin(std::process::Stdio::null());
    complained(&call.output_in_time().unwrap(), 1, &["--cache-file", "--log-file", "name the same file"]);
    assert!(!path.exists());
}

#[test]
fn a_reload_does_not_open_a_log_at_the_path_of_another_setting() {
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &str| directory.path().join(path).display().to_string();
    let settings =
        format!("bind = 'http:127.0.0.1:0'\nworkers = 1\npid-file = '{}'\ncontrol = '{}'\n", at("pid"), at("control"));
    let path = file(&directory, &settings);
    let mut server = Server::start_command(Command::new(program("hello")).arg("--config").arg(path));
    for flag in ["log-file", "access-log"] {
        file(&directory, &format!("{settings}{flag} = '{}'\n", at("pid")));
        let output = run("hello", &["reload", "--control", &at("control")]);
        complained(
            &output,
            1,
            &["the workers stay as they are", "--pid-file", &format!("--{flag}"), "name the same file"],
        );
        assert_eq!(std::fs::read_to_string(at("pid")).unwrap(), format!("{}\n", server.pid()), "{flag}");
    }
    server.stop();
}

#[test]
fn check_detects_a_full_file_system_and_leaves_no_file_on_it() {
    assert!(nix::unistd::geteuid().is_root(), "this test mounts file systems: run it as root");
    let check = |options: &str, full: bool, arguments: &[&str]| {
        let fill = if full { "head -c 1M /dev/zero > /mnt/fill 2>/dev/null;" } else { "" };
        // The listing at the end shows whether a file is left behind.
        let script = format!(
            "mount -t tmpfs -o {options} tmpfs /mnt && {fill} ls -A /mnt >&2; \"$0\" \"$@\"; code=$?; ls -A /mnt >&2; exit $code"
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]).arg(program("hello"));
        let output = command.args(["check", "--bind", "http:127.0.0.1:0"]).args(arguments).output_in_time().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let left = said.lines().filter(|line| !line.starts_with("forkyard: ") && *line != "fill").count();
        assert_eq!(left, 0, "{said}");
        output
    };
    complained(&check("size=64k", true, &["--pid-file", "/mnt/pid"]), 1, &["pid file /mnt/pid: no space left"]);
    complained(&check("size=64k", false, &["--pid-file", "/mnt/pid"]), 0, &[]);
    let cache = ["--cache", "8M", "--cache-file", "/mnt/cache"];
    complained(&check("size=4m", false, &cache), 1, &["/mnt/cache: ", "No space left on device", "has 4 MiB free"]);
    complained(&check("size=64m", false, &cache), 0, &[]);
    complained(&check("size=1m,nr_inodes=1", false, &["--control", "/mnt/control"]), 1, &["has no free inodes"]);
}

#[test]
fn check_reports_missing_inherited_sockets_and_files_with_other_content() {
    let directory = tempfile::tempdir().unwrap();
    let text = "bind = ['http:fd:77', 'http:systemd']\nuser = 'root'\n";
    let words = [
        "http:fd:77: for this process, descriptor 77 is not open",
        "http:systemd: for this process, systemd passed no socket",
    ];
    complained(&check("hello", &directory, text), 0, &words);
    let notes = directory.path().join("notes");
    std::fs::write(&notes, "something of somebody").unwrap();
    for (flag, cause) in [("pid-file", "does not contain a pid"), ("cache-file", "it holds something else")] {
        let text = format!("bind = 'http:127.0.0.1:0'\n{flag} = '{}'\n", notes.display());
        complained(&check("hello", &directory, &text), 1, &[cause, &format!("--{flag}")]);
    }
}

#[test]
fn an_address_space_limit_below_the_use_of_a_worker_is_rejected() {
    let directory = tempfile::tempdir().unwrap();
    let text = |limit| format!("bind = 'http:127.0.0.1:0'\ncache = '64M'\nrlimit = ['as={limit}']\n");
    for limit in ["1M", "64M"] {
        complained(&check("hello", &directory, &text(limit)), 1, &["--rlimit as=", "for shared memory", "--cache"]);
    }
    complained(&check("hello", &directory, &text("4G")), 0, &[]);
    let output = run("hello", &["--bind", "http:127.0.0.1:0", "--rlimit", "as=1M"]);
    complained(&output, 1, &["--rlimit as=1M: a worker needs more than"]);
}

#[test]
fn all_errors_in_the_privileges_are_reported_without_consequential_errors() {
    let directory = tempfile::tempdir().unwrap();
    let text = "bind = 'http:127.0.0.1:0'\nuser = 4711\nchroot = '/no-such-root'\nchdir = '/no-such-directory'\n\
        cpu-affinity = '1000'\nrlimit = ['nofile=unlimited', 'as=1G']\nsandbox = true\nsandbox-read = ['/no-such-a', '/no-such-b']\n";
    let words = ["--user: user 4711 has no account", "--chroot: /no-such-root", "--cpu-affinity: ", "--rlimit nofile="];
    let said = complained(&check("hello", &directory, text), 1, &words);
    assert!(!said.contains("--chdir") && !said.contains("/no-such-a") && !said.contains("would run as root"), "{said}");
    let text = text.replace("chroot = '/no-such-root'\n", "");
    complained(
        &check("hello", &directory, &text),
        1,
        &["--chdir: /no-such-", "--sandbox-read /no-such-a", "--sandbox-read /no-such-b"],
    );
}

#[test]
fn the_help_of_each_flag_that_accepts_zero_explains_zero() {
    for (name, command) in [("hello", &[][..]), ("forkyard", &["run"])] {
        let help = String::from_utf8(run(name, &[command, &["--help"]].concat()).stdout).unwrap();
        let numbers = ["<N>", "<SIZE>", "<TIME>", "<N[~JITTER]>", "<TIME[~JITTER]>"];
        let mut helps: Vec<(&str, String)> = Vec::new();
        for line in help.lines() {
            if let Some(rest) = line.strip_prefix("      --") {
                let (flag, value) = rest.split_once(' ').unwrap_or((rest, ""));
                helps.push((flag, value.trim().to_owned()));
            } else if let Some((_, text)) = helps.last_mut()
                && line.starts_with("          ")
                && !line.trim_start().starts_with('[')
            {
                text.push_str(&format!(" {}", line.trim()));
            }
        }
        helps.retain(|(_, text)| numbers.iter().any(|number| text.starts_with(number)));
        assert!(helps.len() > 10, "{name}: {helps:?}");
        let flags = helps.iter().map(|(flag, _)| format!("--{flag}=0")).collect::<Vec<_>>();
        let said = run(name, &[&["check"], &flags.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat());
        let said = String::from_utf8(said.stderr).unwrap();
        for (flag, text) in helps {
            let is_refused = said.lines().any(|line| line.starts_with(&format!("forkyard: error: --{flag}: ")));
            let is_told = text.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == "0");
            assert!(is_refused || is_told, "{name} --{flag} takes 0, and its help does not explain 0:{text}");
        }
    }
}
