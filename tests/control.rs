//! The control socket and the sub-commands, tested through the real command line with real masters.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::http::{self, Client};
use common::limit::InTime as _;
use common::{PATIENCE, Server, descriptors_of, program, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A master with a control socket, and the directory of the socket.
struct Controlled {
    server: Server,
    socket: PathBuf,
    name: &'static str,
    directory: tempfile::TempDir,
}

impl Controlled {
    fn start(name: &'static str, arguments: &[&str]) -> Self {
        Self::start_with(name, arguments, |_, _| {})
    }

    fn start_with(name: &'static str, arguments: &[&str], more: impl FnOnce(&mut Command, &Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let mut command = Command::new(program(name));
        command.args(["--bind", "http:127.0.0.1:0", "--control"]).arg(&socket).args(arguments);
        more(&mut command, directory.path());
        Self { server: Server::start_command(&mut command), socket, name, directory }
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(program(self.name));
        command.args(arguments).env("FORKYARD_CONTROL", &self.socket).output_in_time().unwrap()
    }

    /// Runs a sub-command that must succeed, and returns its output.
    #[track_caller]
    fn said(&self, arguments: &[&str]) -> String {
        let output = self.ask(arguments);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
        said
    }

    /// Runs a sub-command that must fail with this status, and returns the error output.
    #[track_caller]
    fn complaint(&self, arguments: &[&str], status: i32) -> String {
        let output = self.ask(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{said}{}", String::from_utf8_lossy(&output.stdout));
        said
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.said(&["status", "--json"])).unwrap()
    }

    /// Sends these bytes to the control socket, and returns the first line of the reply.
    fn answer_to(&self, bytes: &[u8]) -> String {
        let mut stream = common::connect_unix(&self.socket).unwrap();
        let _ = stream.write_all(bytes); // the master may reject the request before it has read the whole request
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    }
}

#[test]
fn status_shows_the_master_and_each_request_in_flight() {
    let mut served = Controlled::start("crashy", &["--workers", "2"]);
    let address = served.server.http();
    let mut client = Client::connect(&address).unwrap();
    std::thread::scope(|scope| {
        let slow = scope.spawn(move || client.request("GET", "/slow/600000", b""));
        let busy = wait_until("the request is in flight", || {
            let status = served.status();
            let workers = status["workers"].as_array().unwrap().clone();
            workers.into_iter().find(|worker| worker["in_flight"] == 1)
        });
        assert_eq!(busy["serving"][0]["what"], "GET /slow/600000");
        assert!(busy["serving"][0]["for_ms"].is_u64() && busy["rss_bytes"].as_u64().unwrap() > 100_000, "{busy}");
        assert!(served.server.workers().contains(&i32::try_from(busy["pid"].as_i64().unwrap()).unwrap()));
        assert_eq!(
            (&busy["state"], &busy["generation"], &busy["connections"]),
            (&"ready".into(), &1.into(), &1.into())
        );

        let status = served.status();
        assert_eq!(status["pid"], served.server.pid().as_raw());
        assert_eq!(
            (&status["state"], &status["generation"], &status["target"]),
            (&"running".into(), &1.into(), &2.into())
        );
        assert_eq!(
            (&status["version"], &status["binds"][0]["protocol"]),
            (&env!("CARGO_PKG_VERSION").into(), &"http".into())
        );
        assert_eq!(status["binds"][0]["address"], address);
        let table = served.said(&["status"]);
        for words in ["SLOT", "ready", "running", &format!("http:{address}"), "GET /slow/600000", "in flight:"] {
            assert!(table.contains(words), "no {words:?} in {table}");
        }
        let top = served.said(&["top", "--rounds", "2", "--interval", "100ms"]);
        assert_eq!((top.matches("SLOT").count(), top.contains('\x1b')), (2, false), "{top}");
        served.said(&["stop", "--now"]);
        assert_eq!(slow.join().unwrap().unwrap().status, 502);
    });
    assert_eq!(served.server.wait_end(), Some(0));
}

#[test]
fn reload_returns_when_the_new_workers_serve() {
    let mut served = Controlled::start("crashy", &["--workers", "3"]);
    let old = served.server.workers();
    let said = served.said(&["reload"]);
    assert!(said.ends_with("reload done gen=2\n") && said.matches("worker ready slot=").count() >= 3, "{said}");
    let status = served.status();
    let workers = status["workers"].as_array().unwrap();
    let ready = workers.iter().filter(|worker| worker["state"] == "ready");
    let pids: BTreeSet<i32> = ready.map(|worker| i32::try_from(worker["pid"].as_i64().unwrap()).unwrap()).collect();
    assert!(pids.len() == 3 && pids.is_disjoint(&old), "{status}");

    let lines = served.said(&["reload", "--json"]);
    let answers: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.last().unwrap()["answer"], "done");
    assert!(answers.len() > 1 && answers[..answers.len() - 1].iter().all(|answer| answer["answer"] == "progress"));
    served.server.stop();
    assert!(!served.socket.exists(), "the socket is removed with its master");
    assert!(served.complaint(&["reload"], 1).contains("no such socket"));
}

#[test]
fn a_failed_reload_reports_the_workers_last_output() {
    let mut served = Controlled::start_with("crashy", &["--workers", "2"], |command, directory| {
        command.env("CRASHY_BROKEN", directory.join("broken"));
    });
    let old = served.server.workers();
    std::fs::write(served.directory.path().join("broken"), "").unwrap();
    let complaint = served.complaint(&["reload"], 1);
    assert!(complaint.contains("reload failed; the old workers stay: worker died slot="), "{complaint}");
    assert!(complaint.contains("broken on purpose") && complaint.contains("status="), "{complaint}");
    served.server.has_only(&old);
    assert!(served.complaint(&["scale", "3"], 1).contains("broken on purpose"));
    std::fs::remove_file(served.directory.path().join("broken")).unwrap();
    assert!(served.said(&["reload"]).contains("reload done gen=3"));
    served.server.stop();
}

#[test]
fn a_client_that_disconnects_does_not_cancel_its_command() {
    let mut served = Controlled::start("crashy", &["--workers", "2"]);
    for (generation, request) in [(2, &b"{\"command\":\"reload\"}\n"[..]), (3, b"{\"command\":\"reload\"}\nmore")] {
        let mut stream = common::connect_unix(&served.socket).unwrap();
        stream.write_all(request).unwrap();
        drop(stream);
        served.server.wait_for(&format!("reload done gen={generation}"));
    }
    served.server.stop();
}

#[test]
fn scale_returns_when_the_number_of_workers_is_reached() {
    let mut served = Controlled::start("crashy", &["--workers", "2"]);
    for (asked, expected) in [("4", 4), ("1", 1), ("3", 3)] {
        assert!(served.said(&["scale", asked]).ends_with(&format!("workers={expected}\n")));
        assert_eq!(served.server.workers().len(), expected);
    }
    for asked in ["0", "20", "4294967295"] {
        assert!(served.complaint(&["scale", asked], 1).contains("1 to 19"));
    }
    assert!(served.complaint(&["scale", "many"], 2).contains("'many'"));
    assert_eq!(served.server.workers().len(), 3);
    served.server.stop();
}

#[test]
fn stop_returns_when_the_master_has_exited_and_its_requests_are_finished() {
    let mut served = Controlled::start("crashy", &["--workers", "1"]);
    let mut client = Client::connect(&served.server.http()).unwrap();
    std::thread::scope(|scope| {
        let slow = scope.spawn(move || client.request("GET", "/slow/5000", b""));
        wait_until("the request is in flight", || (served.status()["workers"][0]["in_flight"] == 1).then_some(()));
        let said = served.said(&["stop"]);
        assert!(said.contains("worker exited") && said.ends_with("stopped\n"), "{said}");
        assert_eq!(slow.join().unwrap().unwrap().status, 200);
        assert!(!served.socket.exists());
    });
    assert_eq!(served.server.wait_end(), Some(0));
}

#[test]
fn reopen_logs_has_the_same_effect_as_the_signal() {
    let mut served = Controlled::start("crashy", &["--workers", "1"]);
    served.server.signal(Signal::SIGUSR1);
    served.server.wait_for("log files reopened");
    assert!(served.said(&["reopen-logs"]).contains("log files reopened"));
    served.server.wait_for("log files reopened");
    served.server.stop();
}

#[test]
fn upgrade_returns_when_its_reload_is_done() {
    let mut served = Controlled::start("crashy", &["--workers", "2"]);
    let before = served.status()["pid"].clone();
    let said = served.said(&["upgrade"]);
    for line in [
        "upgrade: checking ",
        "upgrade: executing ",
        "upgraded from version ",
        "reload started gen=2",
        "reload done gen=2",
    ] {
        assert!(said.contains(line), "{line:?} is not in {said}");
    }
    // The upgraded master keeps its socket and pid.
    let status = served.status();
    assert_eq!((&status["pid"], &status["generation"]), (&before, &2.into()), "{status}");
    assert!(served.said(&["scale", "3"]).contains("workers=3"));
    served.said(&["upgrade"]);
    assert_eq!(served.status()["target"], 3, "the number set by command is preserved");
    served.said(&["stop"]);
    assert_eq!(served.server.wait_end(), Some(0));
    assert!(!served.socket.exists(), "the new build removes the socket file that the old build created");
}

#[test]
fn the_control_connection_closes_after_the_outcome() {
    let mut served = Controlled::start("crashy", &["--workers", "1"]);
    for request in ["status", "reopen-logs", "segment", "reload"] {
        let mut stream = common::connect_unix(&served.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap(); // without a timeout, a connection that stays open would hang the test
        writeln!(stream, "{{\"command\":\"{request}\"}}").unwrap();
        let mut answers = String::new();
        stream.read_to_string(&mut answers).unwrap();
        assert!(answers.starts_with("{\"answer\":") && answers.ends_with("}\n"), "{request}: {answers}");
    }
    served.server.stop();
}

#[test]
fn malformed_commands_are_rejected_and_leave_nothing_open() {
    let mut served = Controlled::start("crashy", &["--workers", "1"]);
    let before = descriptors_of(served.server.pid().as_raw());
    let long = [&[b' '; 5000][..], b"\n"].concat();
    let garbage: [&[u8]; 6] =
        [b"\n", b"GET / HTTP/1.1\r\n", b"{}\n", b"\xff\xfe\n", b"{\"command\":\"explode\"}\n", &long];
    for bytes in garbage {
        let line = served.answer_to(bytes);
        assert!(line.starts_with(r#"{"answer":"failed""#), "{line:?} for {:?}", bytes.escape_ascii().to_string());
    }
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..200 {
        let mut stream = common::connect_unix(&served.socket).unwrap();
        let mut bytes = vec![0; random.usize(..6000)];
        random.fill(&mut bytes);
        let _ = stream.write_all(&bytes);
        if random.bool() {
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
        }
    }
    // More clients than can be served at the same time connect and stay idle. They are disconnected, and then the next command is served.
    let silent: Vec<UnixStream> = (0..20).map(|_| common::connect_unix(&served.socket).unwrap()).collect();
    served.server.wait_for("control client disconnected");
    assert_eq!(served.status()["state"], "running");
    drop(silent);
    wait_until("all control connections are closed", || {
        (descriptors_of(served.server.pid().as_raw()) == before).then_some(())
    });
    assert_eq!(http::get(&served.server.http(), "/ok").unwrap().status, 200);
    served.server.stop();
}

#[test]
fn only_the_owner_can_use_the_socket_and_a_socket_in_use_is_not_replaced() {
    let mut served = Controlled::start("crashy", &["--workers", "1"]);
    assert_eq!(std::fs::metadata(&served.socket).unwrap().permissions().mode() & 0o777, 0o600);
    let second = |socket: &Path| {
        let mut command = Command::new(program("crashy"));
        command
            .args(["--bind", "http:127.0.0.1:0", "--workers", "1", "--control"])
            .arg(socket)
            .output_in_time()
            .unwrap()
    };
    let refused = second(&served.socket);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && said.contains("another program is listening there"), "{said}");
    assert!(said.contains("--control") && !said.contains("--bind"), "{said}");
    served.said(&["status"]);
    served.server.signal(Signal::SIGKILL);
    served.server.wait_end();
    assert!(served.socket.exists() && served.complaint(&["status"], 1).contains("is gone"));
    let mut command = Command::new(program("crashy"));
    command.args(["--bind", "http:127.0.0.1:0", "--workers", "1", "--control"]).arg(&served.socket);
    served.server = Server::start_command(&mut command);
    served.said(&["status"]);
    served.server.stop();
}

/// Changes the user of only the calling thread.
#[expect(unsafe_code, reason = "the library's function would change the user of all threads")]
fn become_nobody() {
    const NOBODY: libc::c_long = 65534;
    // SAFETY: this system call takes three integers and no pointers.
    let outcome = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
    assert_eq!(outcome, 0, "this test connects as another user: run it as root ({})", std::io::Error::last_os_error());
}

#[test]
fn another_user_is_refused_even_if_the_file_mode_allows_access() {
    let mut served = Controlled::start("crashy", &["--workers", "1"]);
    std::fs::set_permissions(served.directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let as_nobody = |socket: &Path| {
        std::thread::scope(|scope| {
            let ask = || {
                become_nobody();
                let mut stream = common::connect_unix(socket)?;
                let _ = stream.write_all(b"{\"command\":\"stop\",\"now\":true}\n");
                let mut line = String::new();
                BufReader::new(stream).read_line(&mut line).map(|_| line)
            };
            scope.spawn(ask).join().unwrap()
        })
    };
    assert_eq!(as_nobody(&served.socket).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    std::fs::set_permissions(&served.socket, PermissionsExt::from_mode(0o666)).unwrap();
    let line = as_nobody(&served.socket).unwrap();
    assert!(line.contains(r#""answer":"failed""#) && line.contains("user 65534"), "{line}");
    assert!(served.server.wait_for("control client refused").contains("user 65534"));
    assert_eq!(served.status()["state"], "running");
    served.server.stop();
}

#[test]
fn the_cache_can_be_inspected_and_purged_while_it_is_in_use() {
    for file in [false, true] {
        let mut served = Controlled::start_with("pages", &["--workers", "2", "--cache", "2M"], |command, directory| {
            if file {
                command.arg("--cache-file").arg(directory.join("pages.cache"));
            }
        });
        let address = served.server.http();
        for number in 1..=3 {
            assert_eq!(http::get(&address, &format!("/page/{number}?ms=0")).unwrap().status, 200);
        }
        let stats = || -> Value { serde_json::from_str(&served.said(&["cache", "stats", "--json"])).unwrap() };
        assert_eq!((&stats()["entries"], &stats()["stores"]), (&3.into(), &3.into()));
        assert!(served.said(&["cache", "stats"]).contains("entries          3\n"));
        let keys = || -> Vec<String> {
            let lines = served.said(&["cache", "ls", "page", "--json"]);
            let pages = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            pages.map(|page| page["key"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(keys(), ["page 1", "page 2", "page 3"]);
        assert!(served.said(&["cache", "ls"]).contains(" page 2\n"));
        assert_eq!(served.said(&["cache", "ls", "other"]).lines().count(), 1, "only the heading");
        let page = served.said(&["cache", "get", "page 2", "--headers"]);
        assert!(page.starts_with("200\ncontent-type: text/html") && page.contains("<title>Page 2</title>"), "{page}");
        assert_eq!(served.said(&["cache", "get", "page 2"]).len(), 16 << 10);

        assert_eq!(served.said(&["cache", "purge", "page 1"]), "purged\n");
        assert!(served.said(&["cache", "purge", "page 1"]).contains("there was no such page"));
        served.said(&["cache", "purge", "--tag", "page-2"]);
        assert_eq!(keys(), ["page 3"]);
        assert!(served.complaint(&["cache", "get", "page 2"], 1).contains("no valid page with the key page 2"));
        served.said(&["cache", "purge", "--prefix", "pa"]);
        assert!(keys().is_empty());
        http::get(&address, "/page/4?ms=0").unwrap();
        served.said(&["cache", "clear"]);
        assert!(keys().is_empty());
        for usage in [&["cache", "purge"][..], &["cache", "purge", "a", "--tag", "b"], &["cache"]] {
            served.complaint(usage, 2);
        }
        assert_eq!(http::get(&address, "/page/4?ms=0").unwrap().status, 200);
        served.server.stop();
    }
    let mut served = Controlled::start("hello", &["--workers", "1", "--cache", "0"]);
    assert!(served.complaint(&["cache", "stats"], 1).contains("there is no page cache"));
    served.server.stop();
}

#[test]
fn programs_that_report_nothing_have_a_status_too() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control.sock");
    let bind = format!("fastcgi:unix:{}", directory.path().join("a.sock").display());
    let mut command = Command::new(program("forkyard"));
    command.args(["run", "--direct", "--bind", &bind, "--workers", "2", "--settle", "10ms", "--control"]).arg(&socket);
    command.args(["--", "sleep", "600"]);
    let mut served = Controlled { server: Server::start_command(&mut command), socket, name: "forkyard", directory };
    let status = served.status();
    assert_eq!(status["workers"].as_array().unwrap().len(), 2, "{status}");
    assert_eq!((&status["workers"][0]["state"], &status["workers"][0]["requests"]), (&"ready".into(), &Value::Null));
    assert!(served.said(&["reload"]).contains("reload done gen=2"));
    assert!(served.said(&["status"]).contains(&bind));
    served.said(&["stop"]);
    assert_eq!(served.server.wait_end(), Some(0));
}

#[test]
fn quarantined_requests_are_listed_and_can_be_released() {
    let mut served = Controlled::start("crashy", &["--workers", "1", "--quarantine", "1"]);
    let address = served.server.http();
    let status_of = |path: &str| http::get(&address, path).unwrap().status;
    assert_eq!(served.said(&["quarantine", "ls"]), "");
    for path in ["/abort", "/segv"] {
        assert_eq!(status_of(path), 502);
        wait_until("the request is refused", || (status_of(path) == 503).then_some(()));
    }
    let status = served.status();
    let listed = status["quarantined"].as_array().unwrap();
    assert_eq!(listed.len(), 2, "{status}");
    let abort = listed.iter().find(|listed| listed["request"] == "GET /abort").unwrap();
    assert!(abort["times"] == 1 && (1..=60_000).contains(&abort["left_ms"].as_u64().unwrap()), "{status}");
    let lines = served.said(&["quarantine", "ls"]);
    assert!(lines.lines().count() == 2 && lines.contains("times=1  GET /abort\n"), "{lines}");
    assert!(served.said(&["status"]).contains("quarantined:\n  left="));
    let json = served.said(&["quarantine", "ls", "--json"]);
    let requests = json.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["request"].clone());
    assert!(requests.clone().count() == 2 && requests.into_iter().any(|request| request == "GET /abort"), "{json}");

    assert_eq!(served.said(&["quarantine", "release", "GET /abort"]), "quarantine ended request=\"GET /abort\"\n");
    assert!(served.complaint(&["quarantine", "release", "GET /abort"], 1).contains("is not quarantined"));
    assert_eq!(status_of("/abort"), 502, "the request is served again, and kills again");
    wait_until("the request is refused again", || (status_of("/abort") == 503).then_some(()));
    assert_eq!(served.said(&["quarantine", "release", "--all"]), "quarantine ended requests=2\n");
    assert_eq!(served.said(&["quarantine", "ls"]), "");
    assert!(served.complaint(&["quarantine", "release"], 2).contains("<REQUEST|--all>"));
    served.server.stop();
}

#[test]
fn status_shows_how_many_connections_wait_at_each_socket() {
    let mut served = Controlled::start("crashy", &["--workers", "1..3"]);
    let address = served.server.http();
    let status = served.status();
    assert_eq!((&status["binds"][0]["waiting"], &status["min"], &status["max"]), (&0.into(), &1.into(), &3.into()));
    assert!(served.said(&["status"]).contains("workers=1 (1..3)"));
    served.said(&["scale", "1"]);
    let [worker] = served.server.workers().into_iter().collect::<Vec<_>>()[..] else {
        panic!("the server has one worker")
    };
    let worker = nix::unistd::Pid::from_raw(worker);
    common::stop(worker);
    let waiting: Vec<Client> = (0..3).map(|_| Client::connect(&address).unwrap()).collect();
    wait_until("the waiting connections are counted", || (served.status()["binds"][0]["waiting"] == 3).then_some(()));
    assert!(served.said(&["top", "--rounds", "1"]).contains(&format!("http:{address} waiting=3\n")));
    nix::sys::signal::kill(worker, Signal::SIGCONT).unwrap();
    wait_until("the waiting connections are accepted", || (served.status()["binds"][0]["waiting"] == 0).then_some(()));
    drop(waiting);
    served.server.stop();
}

#[test]
fn completions_and_manual_pages_list_every_flag() {
    let said = |name: &str, arguments: &[&str]| {
        let output = Command::new(program(name)).args(arguments).output_in_time().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for shell in ["bash", "zsh", "fish"] {
        for (name, flag) in [("forkyard", "settle"), ("hello", "max-uri")] {
            let script = said(name, &["completions", shell]);
            assert!(script.contains(flag) && script.contains("reopen-logs") && script.contains(name), "{name} {shell}");
        }
    }
    assert!(said("hello", &["man"]).contains("\\-\\-drain\\-timeout"));
    assert!(said("forkyard", &["man", "run"]).contains("\\-\\-settle"));
    assert!(said("forkyard", &["man"]).contains("forkyard\\-status"));
    let unknown = Command::new(program("forkyard")).args(["man", "explode"]).output_in_time().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
    // Flags for serving are not valid for sub-commands, and vice versa.
    let output = Command::new(program("hello")).args(["--workers", "1", "status"]).output_in_time().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let output =
        Command::new(program("hello")).args(["status"]).env_remove("FORKYARD_CONTROL").output_in_time().unwrap();
    assert!(output.status.code() == Some(2) && String::from_utf8_lossy(&output.stderr).contains("--control"));
}

#[test]
fn status_shows_hung_threads_and_a_worker_whose_threads_are_all_hung() {
    let limits = [
        ["--workers", "1"],
        ["--threads", "2"],
        ["--request-timeout", "3s"], // the function must have begun by then, even on a busy machine
        ["--hang-timeout", "300ms"],
        ["--drain-timeout", "1h"],
    ];
    let mut one = Controlled::start_with("crashy", limits.as_flattened(), |command, directory| {
        command.env("CRASHY_BROKEN", directory.join("broken"));
    });
    // The old worker keeps running as long as no new worker can start.
    std::fs::write(one.directory.path().join("broken"), "").unwrap();
    let (address, pid) = (one.server.http(), *one.server.workers().first().unwrap());
    let becomes = |state: &str, count: u32| {
        let is_it =
            |worker: &Value| worker["pid"] == pid && worker["state"] == state && worker["hung_threads"] == count;
        wait_until("the status shows the hung threads", || {
            one.status()["workers"].as_array()?.iter().any(is_it).then_some(())
        });
    };
    becomes("ready", 0);
    assert_eq!(http::get(&address, "/thread/hang").unwrap().status, 504);
    becomes("ready", 1);
    assert!(one.said(&["status"]).contains("  ready (1 hung)  "));
    assert_eq!(http::get(&address, "/thread/sleep-8000").unwrap().status, 504);
    becomes("hung", 2);
    assert!(one.said(&["status"]).contains("  hung (2)  "));
    assert_eq!(http::get(&address, "/thread/ok").unwrap().status, 503);
    becomes("ready", 1);
    one.server.stop();
}
