//! State that would break in a fork without precautions. This test binary is also its own application: with `--bind`, it serves requests;
//! without `--bind`, it starts itself as a server.
//!
//! The tests cover known classes of failures. A random number generator that is used before the fork gives every worker the same numbers.
//! Descriptors of the master leak into workers. A child that keeps the master's signal handlers wakes the master.

#![expect(clippy::print_stdout, reason = "the test reports like a test runner")]

mod common;

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::os::fd::OwnedFd;
use std::process::{Command, ExitCode};
use std::sync::OnceLock;

use common::Server;
use common::http::Client;
use forkyard::http::{Request, Response};
use forkyard::{Body, Builder};
use forkyard_shm::Segment;

/// Opened in `main`, before any Forkyard code runs.
static EARLY: OnceLock<std::fs::File> = OnceLock::new();
static PRELOADED: OnceLock<(String, std::fs::File)> = OnceLock::new();

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--bind") {
        EARLY.set(std::fs::File::open("/proc/self/limits").expect("the kernel provides the file")).expect("once");
        return Builder::app(|_cx| forkyard::blocking(describe)).preload(preload).run();
    }
    println!("\nrunning 1 test");
    workers_differ_where_they_must_and_share_where_they_may();
    println!("test workers_differ_where_they_must_and_share_where_they_may ... ok");
    println!("\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
    ExitCode::SUCCESS
}

/// Initializes, before the fork, state that must differ between workers after the fork.
fn preload() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let file = std::fs::File::open("/proc/self/status")?;
    let (_, _) = (fastrand::u64(..), RandomState::new().hash_one(1));
    PRELOADED.set((format!("{}", std::process::id()), file)).map_err(|_| "preload ran twice".into())
}

/// Returns facts about this worker, one per line.
fn describe(_: Request<Body>) -> Response<String> {
    let (master, file) = PRELOADED.get().expect("preload ran");
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let segment: i32 = variable("FORKYARD_SHM").parse().expect("the variable is a number");
    let path = std::fs::read_link(format!("/proc/self/fd/{segment}")).expect("the segment is open");
    let threads = std::fs::read_dir("/proc/self/task").expect("/proc").count();
    let descriptors = std::fs::read_dir("/proc/self/fd").expect("/proc").count() - 1;
    let facts = [
        ("pid", std::process::id().to_string()),
        ("random", fastrand::u64(..).to_string()),
        ("hash", RandomState::new().hash_one(1).to_string()),
        ("master", master.clone()),
        ("file", file.metadata().is_ok().to_string()),
        ("early", is_limits(EARLY.get().expect("main ran")).to_string()),
        ("slot", variable("FORKYARD_SLOT")),
        ("generation", variable("FORKYARD_GENERATION")),
        ("segment_fd", segment.to_string()),
        ("segment", path.display().to_string()),
        ("threads", threads.to_string()),
        ("descriptors", descriptors.to_string()),
    ];
    Response::new(facts.map(|(name, value)| format!("{name}={value}\n")).concat())
}

/// Returns whether the descriptor still refers to the same file.
fn is_limits(file: &std::fs::File) -> bool {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    std::fs::read_link(path).is_ok_and(|target| target.ends_with("limits"))
}

fn workers_differ_where_they_must_and_share_where_they_may() {
    let me = std::env::current_exe().expect("the test knows its own path");
    // A descriptor that the parent process has left open, and that no worker needs.
    let stray = std::fs::File::open("/dev/null").expect("/dev/null can be opened");
    nix::fcntl::fcntl(&stray, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).expect("the file is open");
    let mut server = Server::start_command(Command::new(me).args(["--bind", "http:127.0.0.1:0", "--workers", "3"]));
    drop(stray);

    let mut workers: HashMap<String, HashMap<String, String>> = HashMap::new();
    let mut connections = Vec::new(); // kept open, so that the next connection goes to another worker
    while workers.len() < 3 {
        assert!(connections.len() < 1000, "three workers never answered: {workers:?}");
        let mut client = Client::connect(&server.http()).expect("the server listens");
        let text = client.request("GET", "/", b"").expect("the server answers").text();
        connections.push(client);
        let facts: HashMap<String, String> = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        workers.insert(facts["pid"].clone(), facts);
    }
    let distinct = |name: &str| workers.values().map(|facts| facts[name].clone()).collect::<BTreeSet<_>>();
    assert_eq!(distinct("random").len(), 3, "each worker has its own random numbers");
    assert_eq!(distinct("hash").len(), 3, "each worker has its own hash keys");
    assert_eq!(distinct("slot"), BTreeSet::from(["0", "1", "2"].map(String::from)));
    assert_eq!(distinct("generation"), BTreeSet::from(["1".to_owned()]));
    assert_eq!(distinct("master"), BTreeSet::from([server.pid().to_string()]), "preload ran once, in the master");
    assert_eq!(distinct("file"), BTreeSet::from(["true".to_owned()]), "the file that preload opened stays open");
    assert_eq!(distinct("early"), BTreeSet::from(["true".to_owned()]), "the file that main opened stays open");
    // The main thread, the event loop, and the thread for blocking functions. One worker has an additional thread that sweeps the cache.
    assert!(distinct("threads").is_subset(&BTreeSet::from(["3", "4"].map(String::from))), "{workers:?}");
    assert!(distinct("segment").iter().all(|path| path.contains("memfd")), "{workers:?}");
    for (pid, facts) in &workers {
        let path = format!("/proc/{pid}/fd/{}", facts["segment_fd"]);
        let file =
            std::fs::File::options().read(true).write(true).open(path).expect("the worker is a descendant of the test");
        Segment::attach(OwnedFd::from(file)).expect("FORKYARD_SHM names the segment");
        assert!(descriptor_targets(pid).iter().all(|target| target != "/dev/null"), "a stray descriptor leaked");
    }
    drop(connections);
    server.stop();
}

/// Returns the targets of a process's descriptors above standard error.
fn descriptor_targets(pid: &str) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the process is running").filter_map(Result::ok);
    let above = entries.filter(|entry| entry.file_name().to_str().is_some_and(|fd| fd.parse().unwrap_or(0) > 2));
    above.filter_map(|entry| Some(std::fs::read_link(entry.path()).ok()?.display().to_string())).collect()
}
