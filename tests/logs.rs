//! The log and the access log of real processes: output of the application, floods, rotation, JSON, and a line for each request.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::limit::InTime as _;
use common::{Server, StopOnDrop, fastcgi, http, is_gone, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use serde_json::Value;
use tempfile::TempDir;

const HTTP: [&str; 4] = ["--bind", "http:127.0.0.1:0", "--workers", "1"];

fn start(arguments: &[&str]) -> Server {
    Server::start("chatty", &[&HTTP, arguments].concat())
}

fn worker(server: &Server) -> i32 {
    wait_until("there is a worker", || server.workers().first().copied())
}

fn get(server: &Server, target: &str) -> u16 {
    http::get(&server.http(), target).unwrap().status
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

fn wait_for_line(path: &Path, what: &str) -> String {
    wait_until(what, || read(path).lines().find(|line| line.contains(what)).map(str::to_owned))
}

/// Returns the text after the bar in each line of output.
fn words(log: &str) -> Vec<&str> {
    log.lines().filter_map(|line| line.split_once(" | ")).map(|(_, words)| words).collect()
}

#[test]
fn the_output_of_a_worker_is_logged_with_its_slot_and_pid() {
    let mut server = start(&[]);
    let pid = worker(&server);
    assert_eq!(get(&server, "/line/5"), 200);
    let line = server.wait_for("xxxxx");
    assert!(line.ends_with(&format!("] slot=0 pid={pid} | xxxxx")), "{line}");
    assert!(line.contains("INFO"), "{line}");
    server.stop();
}

#[test]
fn lines_of_64_kib_are_logged_whole_and_longer_lines_are_marked() {
    let mut server = start(&[]);
    for length in [64 << 10, (64 << 10) + 7] {
        assert_eq!(get(&server, &format!("/line/{length}")), 200);
    }
    server.stop();
    let log = server.log();
    let lengths: Vec<usize> =
        words(&log).iter().map(|words| words.bytes().filter(|&byte| byte == b'x').count()).collect();
    assert_eq!(lengths, [64 << 10, 64 << 10, 7]);
    let marked: Vec<bool> = words(&log).iter().map(|words| words.ends_with(" [continued]")).collect();
    assert_eq!(marked, [false, true, false]);
}

#[test]
fn a_flood_is_logged_whole_and_does_not_stop_the_master() {
    const LINES: u32 = 100_000;
    let mut server = start(&[]);
    let address = server.http();
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| http::get(&address, &format!("/flood/{LINES}")).unwrap().status);
        // During the flood, the master handles a signal and adds a worker.
        wait_until("the flood has begun", || server.log().contains("| number 0").then_some(()));
        server.signal(Signal::SIGTTIN);
        wait_until("there are two workers", || (server.workers().len() == 2).then_some(()));
        assert_eq!(flood.join().unwrap(), 200);
    });
    server.stop();
    let log = server.log();
    let found = words(&log);
    assert_eq!(found.len(), LINES as usize);
    assert!((0..LINES).zip(&found).all(|(number, words)| *words == format!("number {number}")), "in order, each once");
    let added = log.find("signal to add").unwrap_or(usize::MAX);
    assert!(added < log.rfind("| number").unwrap(), "the master handled the signal during the flood");
}

/// Starts a server whose standard error is `stderr`. Returns the server and its address; `Server` cannot read the log in this case.
fn start_with_stderr(directory: &Path, stderr: impl Into<Stdio>, arguments: &[&str]) -> (Server, String) {
    let address = format!("fastcgi:unix:{}", directory.join("app.sock").display());
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 2>&0 </dev/null"]).arg(program("chatty")).stdin(stderr);
    let server = Server::launch(command.args(["--bind", &address, "--workers", "1"]).args(arguments));
    wait_until("the server answers", || ask(&address, "/ok").filter(|&status| status == 200));
    (server, address)
}

fn ask(address: &str, target: &str) -> Option<u16> {
    Some(fastcgi::Client::connect(address).ok()?.request("GET", target, b"").ok()?.status())
}

#[test]
fn an_unread_log_blocks_neither_the_master_nor_a_worker() {
    const LINES: usize = 300_000;
    for is_socket in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let (mut ours, theirs): (Box<dyn Read + Send>, Stdio) = if is_socket {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_read_timeout(Some(common::PATIENCE)).unwrap();
            (Box::new(ours), OwnedFd::from(theirs).into())
        } else {
            let (ours, theirs) = nix::unistd::pipe().unwrap();
            (Box::new(File::from(ours)), theirs.into())
        };
        let endless = ["--output-rate", "0", "--hang-timeout", "1h"]; // a busy machine is no hang
        let (mut server, address) = start_with_stderr(directory.path(), theirs, &endless);
        assert_eq!(
            ask(&address, &format!("/flood/{LINES}")),
            Some(200),
            "the worker does not wait for the log's reader"
        );
        let first = worker(&server);
        server.signal(Signal::SIGTTIN);
        wait_until("there are two workers", || (server.workers().len() == 2).then_some(()));
        kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
        wait_until("the dead worker is replaced", || {
            let workers = server.workers();
            (workers.len() == 2 && !workers.contains(&first)).then_some(())
        });
        // From here on the output is read. A shutdown does not wait for a reader that has read nothing for a second, so reading begins
        // before the shutdown.
        let text = Arc::new(Mutex::new(Vec::new()));
        let copy = Arc::clone(&text);
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            while let Ok(count @ 1..) = ours.read(&mut buffer) {
                copy.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        let is_counted = || String::from_utf8_lossy(&text.lock().unwrap()).contains("log lines were lost");
        wait_until("the lost lines are counted", || is_counted().then_some(()));
        server.stop();
        reader.join().unwrap();
        let log = String::from_utf8_lossy(&text.lock().unwrap()).into_owned();
        let lost: usize = log
            .lines()
            .filter(|line| line.contains("log lines were lost"))
            .map(|line| line.rsplit_once("lost=").unwrap().1.parse::<usize>().unwrap())
            .sum();
        assert!(lost > 0, "lost lines were counted");
        let (seen, others) = (words(&log).len(), log.lines().filter(|line| !line.contains(" | ")).count());
        assert!(seen + lost >= LINES && seen + lost < LINES + 100, "{seen} seen, {lost} lost, {others} other");
        let numbers: Vec<usize> =
            words(&log).iter().filter_map(|words| words.strip_prefix("number ")?.parse().ok()).collect();
        assert!(numbers.is_sorted() && numbers.len() == seen, "no line is torn");
    }
}

#[test]
fn the_output_of_a_worker_is_limited_to_a_rate_and_dropped_lines_are_counted() {
    const LINES: usize = 100_000;
    let mut server = start(&["--output-rate", "10K"]);
    assert_eq!(get(&server, &format!("/flood/{LINES}")), 200);
    server.wait_for("output was left out of the log (--output-rate)");
    server.stop();
    let log = server.log();
    let left_out: usize = log
        .lines()
        .filter_map(|line| line.split_once("output was left out").and_then(|(_, rest)| rest.split_once("lines=")))
        .map(|(_, rest)| rest.split(' ').next().unwrap().parse::<usize>().unwrap())
        .sum();
    assert_eq!(words(&log).len() + left_out, LINES);
    assert!(left_out > 0);
}

#[test]
fn no_client_can_flood_the_log() {
    const REQUESTS: usize = 400;
    let mut server = Server::start("crashy", &[&HTTP[..], &["--log-rate", "5"]].concat());
    for _ in 0..REQUESTS {
        assert_eq!(get(&server, "/panic"), 500);
    }
    server.stop();
    let log = server.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("a request panicked")).collect();
    let left_out =
        lines.iter().filter_map(|line| line.rsplit_once(" left_out=")).map(|(_, n)| n.parse::<usize>().unwrap());
    assert_eq!(lines.len() + left_out.sum::<usize>(), REQUESTS, "{log}");
    assert!(lines.len() < REQUESTS, "{log}");
}

#[test]
fn the_names_of_the_standard_streams_work_whatever_the_streams_are() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let flags = ["--log-file", "/dev/stderr", "--access-log", "/dev/stderr"];
    let (mut server, _) = start_with_stderr(directory.path(), OwnedFd::from(theirs), &flags);
    server.stop();
    let mut text = String::new();
    (&ours).read_to_string(&mut text).unwrap();
    assert!(text.contains("\"GET /ok HTTP/1.1\" 200") && text.contains("signal to drain"), "{text}");
}

#[test]
fn a_device_that_is_always_full_is_rejected_at_startup_and_by_check() {
    for flag in ["--log-file", "--access-log"] {
        for mode in [&[][..], &["check"]] {
            let mut command = Command::new(common::program("chatty"));
            let output = command.args(mode).args(HTTP).args([flag, "/dev/full"]).output_in_time().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let words = format!("{flag}: cannot open /dev/full: it is a device that is always full");
            assert!(output.status.code() == Some(1) && said.contains(&words), "{mode:?}: {said}");
        }
    }
}

/// Sets the maximum size of the files that these processes write.
fn limit_file_size(pids: impl IntoIterator<Item = i32>, bytes: u64) {
    for pid in pids {
        let arguments = ["--pid", &pid.to_string(), &format!("--fsize={bytes}:")].map(str::to_owned);
        assert!(Command::new("prlimit").args(arguments).status_in_time().unwrap().success());
    }
}

#[test]
fn logs_that_reach_the_file_size_limit_behave_as_on_a_full_disk() {
    let directory = tempfile::tempdir().unwrap();
    let [log, access] = ["log", "access"].map(|name| directory.path().join(name));
    let [log, access] = [&log, &access].map(|path| path.to_str().unwrap());
    let masks = "masks=sh -c 'grep -E \"SigIgn|SigCgt\" /proc/self/status; exec sleep 600'";
    let mut server = start(&["--log-file", log, "--access-log", access, "--daemon", masks]);
    let pid = worker(&server);
    limit_file_size([server.pid().as_raw(), pid], 1);
    server.signal(Signal::SIGUSR1);
    server.wait_for("cannot write to the log file, its lines go to standard error: File too large");
    assert_eq!(get(&server, "/ok"), 200);
    let wait = "cannot write to the access log; its lines are lost: File too large";
    server.wait_for(wait);
    // For an upgrade, the master writes a file with the state that the new build takes over.
    server.signal(Signal::SIGUSR2);
    server.wait_for("File too large");
    assert!(server.workers().contains(&pid), "{}", server.log());
    wait_until("the daemon has begun", || (read(Path::new(log)) + &server.log()).contains("SigCgt:").then_some(()));
    limit_file_size([server.pid().as_raw(), pid], 1 << 30);
    assert_eq!(get(&server, "/ok"), 200);
    wait_for_line(Path::new(access), "GET /ok");
    wait_for_line(Path::new(log), "the access log can be written again slot=0 lost=1");
    server.stop();
    // The line may be logged before the limit is set or while it is in force.
    let (log, bit) = (read(Path::new(log)) + &server.log(), 1_u64 << (nix::libc::SIGXFSZ - 1));
    for name in ["SigIgn:", "SigCgt:"] {
        let line = log.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{name} {log}"));
        let mask = u64::from_str_radix(line.split_whitespace().next_back().unwrap(), 16).unwrap();
        assert_eq!(mask & bit, 0, "a daemon has the default action: {line}");
    }
}

#[test]
fn a_worker_whose_files_cannot_grow_does_not_die() {
    let directory = tempfile::tempdir().unwrap();
    let [log, access] = ["log", "access"].map(|name| directory.path().join(name));
    let [log, access] = [&log, &access].map(|path| path.to_str().unwrap());
    let mut server = start(&["--log-file", log, "--access-log", access, "--rlimit", "fsize=1"]);
    let pid = worker(&server);
    assert_eq!(get(&server, "/ok"), 200);
    // The master, to which the limit does not apply, writes the worker's log lines.
    let line = wait_for_line(Path::new(log), "cannot write to the access log; its lines are lost");
    assert!(line.contains("File too large"), "{line}");
    server.stop();
    assert!(read(Path::new(log)).contains(&format!("pid={pid} gen=1 status=0")), "{}", read(Path::new(log)));
}

#[test]
fn an_unread_access_log_blocks_no_worker() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("access");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut reader =
        OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&fifo).expect("the open does not block");
    let mut server = start(&["--access-log", fifo.to_str().unwrap()]);
    let mut client = http::Client::connect(&server.http()).unwrap();
    const REQUESTS: usize = 4000;
    for number in 0..REQUESTS {
        assert_eq!(client.request("GET", &format!("/ok?{number}"), b"").unwrap().status, 200);
    }
    server.wait_for("cannot write to the access log; its lines are lost: its reader is too slow");
    // From here on the access log is read.
    let mut text = Vec::new();
    wait_until("the access log is written again", || {
        let _ = reader.read_to_end(&mut text); // until no more data is available for now
        http::get(&server.http(), "/ok?last").unwrap();
        server.log().contains("the access log can be written again").then_some(())
    });
    server.stop();
    let _ = reader.read_to_end(&mut text);
    let text = String::from_utf8(text).unwrap();
    assert!(
        text.lines().all(|line| line.starts_with("127.0.0.1 - - [") && line.ends_with("protocol=http")),
        "no line is torn"
    );
    assert!(text.lines().count() < REQUESTS && text.contains("/ok?0 ") && text.contains("/ok?last "));
}

#[test]
fn a_worker_without_free_descriptors_opens_the_new_files_later() {
    let directory = tempfile::tempdir().unwrap();
    let access = directory.path().join("access");
    let mut server = start(&["--access-log", access.to_str().unwrap()]);
    let pid = worker(&server);
    assert_eq!(get(&server, "/ok?old"), 200);
    let limit = |limit: &str| {
        let status =
            Command::new("prlimit").args([format!("--pid={pid}"), format!("--nofile={limit}:")]).status_in_time();
        assert!(status.expect("scripts/test installs util-linux").success());
    };
    let before = Command::new("prlimit")
        .args([&format!("--pid={pid}"), "--nofile", "--noheadings", "--output", "SOFT"])
        .output_in_time()
        .unwrap();
    limit("3");
    std::fs::rename(&access, directory.path().join("access.1")).unwrap();
    server.signal(Signal::SIGUSR1);
    server.wait_for("cannot switch to the new log files yet");
    limit(String::from_utf8(before.stdout).unwrap().trim());
    wait_until("the worker writes to the new file", || {
        assert_eq!(get(&server, "/ok?new"), 200);
        read(&access).contains("/ok?new").then_some(())
    });
    server.stop();
}

#[test]
fn a_repeated_line_is_counted() {
    let mut server = start(&[]);
    assert_eq!(get(&server, "/again/5000"), 200);
    assert_eq!(get(&server, "/line/3"), 200);
    server.wait_for("| xxx");
    server.stop();
    let log = server.log();
    let as_it_came = words(&log).iter().filter(|words| **words == "the same").count();
    let counted = log.lines().filter(|line| line.contains("the last line of output was repeated"));
    let counts = counted.map(|line| line.rsplit_once("times=").unwrap().1.parse::<usize>().unwrap());
    assert_eq!(as_it_came + counts.sum::<usize>(), 5000);
    assert!(as_it_came < 100, "{as_it_came}");
}

#[test]
fn the_output_of_daemons_and_jobs_is_counted_and_marked_like_that_of_workers() {
    const AGAIN: &str = "sh -c 'yes again | head -n 5000; head -c 70000 /dev/zero | tr \"\\0\" x; echo; echo \"slot=7 end\"; sleep 600'";
    let (daemon, job) = (format!("d={AGAIN}"), format!("j=* * * * * *={AGAIN}"));
    let mut server = start(&["--daemon", &daemon, "--cron", &job, "--log-format", "json"]);
    for (kind, name) in [("daemon", "d"), ("cron", "j")] {
        let lines = wait_until("the process has written all lines", || {
            let log = server.log();
            let all: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            let ours: Vec<Value> = all.into_iter().filter(|line| line[kind] == name).collect();
            ours.iter().any(|line| line["message"] == "slot=7 end").then_some(ours)
        });
        let as_it_came = lines.iter().filter(|line| line["message"] == "again").count();
        let counted = lines.iter().filter(|line| line["message"] == "the last line of output was repeated");
        let counted: u64 = counted.map(|line| line["times"].as_u64().unwrap()).sum();
        assert_eq!((as_it_came, counted), (10, 4990), "{kind}");
        let marked = lines.iter().filter(|line| line["message"].as_str().unwrap().ends_with("x [continued]")).count();
        assert_eq!(marked, 1, "{kind}");
    }
    server.stop();
}

#[test]
fn the_last_output_of_a_worker_precedes_its_death_record() {
    let mut server = start(&[]);
    assert_eq!(get(&server, "/half"), 502);
    server.wait_for("| these are my last");
    server.wait_for("worker died");
    server.stop();
}

#[test]
fn output_outlives_the_master() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let server = start(&["--log-file", log.to_str().unwrap()]);
    let pid = worker(&server);
    let mut client = http::Client::connect(&server.http()).unwrap();
    assert_eq!(client.request("GET", "/ok", b"").unwrap().status, 200);
    kill(server.pid(), Signal::SIGKILL).unwrap();
    wait_for_line(&log, "the master is dead");
    // The connection may serve one more request within a second.
    if let Ok(response) = client.request("GET", "/line/9", b"") {
        assert_eq!(response.text(), "Ok(())\n", "the worker can still write");
        assert!(read(&log).lines().any(|line| line == "xxxxxxxxx"), "{}", read(&log));
    }
    wait_until("the worker has left", || is_gone(pid).then_some(()));
}

#[test]
fn a_json_log_contains_only_objects() {
    let mut server = start(&["--log-format", "json"]);
    let (master, pid) = (server.pid().as_raw(), worker(&server));
    wait_until("the server is listening", || server.log().contains("bind").then_some(()));
    let bind = server.log();
    let address = bind.split_once("http://").unwrap().1.split('"').next().unwrap().to_owned();
    assert_eq!(http::get(&address, "/line/4").unwrap().status, 200);
    assert_eq!(http::get(&address, "/half").unwrap().status, 502);
    server.wait_for("worker died");
    server.stop();
    let lines = objects(&server.log());
    for line in &lines {
        assert!(line["time"].is_string() && line["level"].is_string() && line["target"].is_string(), "{line}");
        assert!(line["pid"].is_u64() && line["message"].is_string(), "{line}");
    }
    let output = lines.iter().find(|line| line["target"] == "app").unwrap();
    assert_eq!((&output["message"], &output["slot"], &output["pid"]), (&"xxxx".into(), &0.into(), &pid.into()));
    let died = lines.iter().find(|line| line["message"] == "worker died").unwrap();
    assert_eq!((&died["pid"], &died["signal"], &died["level"]), (&pid.into(), &"ABRT".into(), &"warn".into()));
    assert!(died["in_flight"].as_str().unwrap().starts_with("GET /half"), "{died}");
    assert!(lines.iter().any(|line| line["pid"] == master));
}

/// Requests are sent continuously while the files are renamed repeatedly.
#[test]
fn no_line_is_lost_when_the_files_are_rotated_under_load() {
    assert!(Uid::effective().is_root(), "this test changes users: run it as root");
    let directory = tempfile::tempdir().unwrap();
    let (log, access) = (directory.path().join("log"), directory.path().join("access"));
    let (log_file, access_log) = (log.to_str().unwrap(), access.to_str().unwrap());
    let user = ["--user", "4711", "--group", "4712"];
    let files = ["--workers", "2", "--log-file", log_file, "--access-log", access_log];
    let mut server = Server::start("chatty", &[&["--bind", "http:127.0.0.1:0"], &user[..], &files].concat());
    let address = server.http();
    let (stop, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _clients_end = StopOnDrop(&stop);
        for client in 0..3 {
            let (address, stop, sent) = (&address, &stop, &sent);
            scope.spawn(move || {
                for number in 0.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let target = format!("/flood/1?{client}-{number}");
                    assert_eq!(http::get(address, &target).unwrap().status, 200);
                    sent.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for round in 1..=4 {
            let before = sent.load(Ordering::SeqCst);
            wait_until("requests are served", || (sent.load(Ordering::SeqCst) > before + 50).then_some(()));
            for path in [&log, &access] {
                std::fs::rename(path, path.with_extension(round.to_string())).unwrap();
            }
            server.signal(Signal::SIGUSR1);
            wait_for_line(&log, "log files reopened errors=0");
            // Both workers write to the new file, although their user cannot open it.
            let lines = || {
                read(&access)
                    .lines()
                    .filter_map(|line| line.split_once(" slot="))
                    .map(|(_, rest)| rest[..1].to_owned())
                    .collect()
            };
            wait_until("both workers write to the new file", || {
                let slots: BTreeSet<String> = lines();
                (slots.len() == 2).then_some(())
            });
        }
    });
    server.stop();
    let all = |path: &Path| -> String {
        let old = (1..=4).map(|round| read(&path.with_extension(round.to_string())));
        old.chain([read(path)]).collect()
    };
    let (logged, accessed) = (all(&log), all(&access));
    let targets: Vec<&str> = accessed.lines().map(|line| line.split(' ').nth(6).unwrap()).collect();
    let distinct: BTreeSet<&str> = targets.iter().copied().collect();
    assert_eq!((targets.len(), distinct.len()), (sent.load(Ordering::SeqCst), sent.load(Ordering::SeqCst)));
    let counted =
        logged.lines().filter_map(|line| line.rsplit_once("times=")).map(|(_, count)| count.parse::<usize>().unwrap());
    let came = logged.lines().filter(|line| line.ends_with("| number 0")).count();
    assert_eq!(came + counted.sum::<usize>(), sent.load(Ordering::SeqCst));
}

#[test]
fn each_request_is_logged_over_each_protocol() {
    let directory = tempfile::tempdir().unwrap();
    let (access, socket) = (directory.path().join("access"), directory.path().join("app.sock"));
    let address = format!("fastcgi:unix:{}", socket.display());
    let path = access.to_str().unwrap();
    let mut server = start(&["--bind", &address, "--access-log", path, "--access-log-format", "json"]);
    let pid = worker(&server);
    assert_eq!(get(&server, "/ok?a=%22b"), 200);
    assert_eq!(get(&server, "/none"), 404);
    let mut client = fastcgi::Client::connect(&address).unwrap();
    assert_eq!(client.request("GET", "/line/7", b"").unwrap().status(), 200);
    assert_eq!(read(&access), "", "the lines are still buffered");
    wait_for_line(&access, "/line/7");
    let lines = objects(&read(&access));
    let seen = |line: &Value| {
        (line["protocol"].clone(), line["target"].clone(), line["status"].clone(), line["bytes"].clone())
    };
    let expected = |protocol: &str, target: &str, status: u16, bytes: u64| {
        (protocol.into(), target.into(), status.into(), bytes.into())
    };
    assert_eq!(seen(&lines[0]), expected("http", "/ok?a=%22b", 200, 3));
    assert_eq!(seen(&lines[1]), expected("http", "/none", 404, 0));
    assert_eq!(seen(&lines[2]), expected("fastcgi", "/line/7", 200, 7));
    for line in &lines {
        assert!(line["duration_ms"].is_number() && line["time"].is_string(), "{line}");
        assert_eq!((&line["slot"], &line["gen"], &line["method"]), (&0.into(), &1.into(), &"GET".into()));
    }
    assert_eq!(lines[0]["client"], "127.0.0.1");
    server.has_only(&BTreeSet::from([pid]));
    server.stop();
    assert_eq!(objects(&read(&access)).len(), 3);
}

#[test]
fn the_lines_of_a_killed_worker_are_written_by_its_heir() {
    let directory = tempfile::tempdir().unwrap();
    let access = directory.path().join("access");
    let mut server = start(&["--access-log", access.to_str().unwrap()]);
    for _ in 0..5 {
        assert_eq!(get(&server, "/ok"), 200);
    }
    assert_eq!(get(&server, "/kill"), 502);
    server.wait_for("worker died");
    wait_until("the access log has five lines", || (read(&access).lines().count() == 5).then_some(()));
    let text = read(&access);
    let line = text.lines().next().unwrap();
    assert!(line.starts_with("127.0.0.1 - - [") && line.contains("] \"GET /ok HTTP/1.1\" 200 3 \"-\" "), "{line}");
    assert!(line.ends_with(" slot=0 gen=1 protocol=http"), "{line}");
    server.stop();
}

#[test]
fn files_that_cannot_be_opened_are_reported_and_a_failed_rotation_changes_nothing() {
    for flag in ["--log-file", "--access-log"] {
        let output =
            Command::new(program("chatty")).args(HTTP).args([flag, "/nowhere/at/all"]).output_in_time().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(1) && error.contains(flag) && error.contains("/nowhere/at/all"),
            "{error}"
        );
    }
    let directory: TempDir = tempfile::tempdir().unwrap();
    let inner = directory.path().join("logs");
    std::fs::create_dir(&inner).unwrap();
    let mut server = start(&["--access-log", inner.join("access").to_str().unwrap()]);
    assert_eq!(get(&server, "/ok"), 200);
    let moved = directory.path().join("moved");
    std::fs::rename(&inner, &moved).unwrap();
    server.signal(Signal::SIGUSR1);
    server.wait_for("--access-log: cannot open");
    server.wait_for("log files reopened errors=1");
    server.stop();
    assert_eq!(read(&moved.join("access")).lines().count(), 1);
}

#[test]
fn run_has_no_access_log_and_reports_why() {
    let arguments = ["run", "--direct", "--bind", "fastcgi:unix:/tmp/unused.sock", "--access-log", "-", "--", "true"];
    let output = Command::new(program("forkyard")).args(arguments).output_in_time().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && error.contains("web server"), "{error}");
}

#[test]
fn the_output_of_a_program_under_run_is_logged_as_json_too() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let bind = format!("fastcgi:unix:{}", directory.path().join("app.sock").display());
    let mut forkyard = Command::new(program("forkyard"));
    forkyard
        .args([
            "run",
            "--direct",
            "--bind",
            &bind,
            "--workers",
            "1",
            "--settle",
            "0",
            "--log-format",
            "json",
            "--log-file",
        ])
        .arg(&log);
    forkyard.args(["--", "sh", "-c", "echo slot=9 level=none; exec sleep 1000"]);
    let mut server = Server::launch(&mut forkyard);
    let line = wait_for_line(&log, "level=none");
    let line: Value = serde_json::from_str(&line).unwrap();
    let pid = worker(&server);
    assert_eq!((&line["message"], &line["slot"]), (&"slot=9 level=none".into(), &0.into()));
    assert_eq!((&line["pid"], &line["level"]), (&pid.into(), &"info".into()));
    assert!(kill(Pid::from_raw(pid), None).is_ok());
    server.stop();
}
