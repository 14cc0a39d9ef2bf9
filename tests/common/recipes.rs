//! Runs a real program behind gateways as a recipe of `docs/run-anything.md` does: requests, a reload under load, a stop.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::http::{Client, Response, get, post};
use super::limit::InTime as _;
use super::{Server, StopOnDrop, is_gone, processes, program, wait_until};

/// Number of clients during a reload.
const CLIENTS: u64 = 3;
/// Number of requests before and after a reload.
const REQUESTS: u64 = 20;

/// Returns the directory with the packages that `scripts/test` and `scripts/recipes` have installed.
pub fn packages() -> PathBuf {
    program("forkyard").ancestors().nth(2).unwrap().join("recipes")
}

/// A directory with the files of an application.
pub struct Recipe {
    pub directory: TempDir,
}

impl Recipe {
    /// Creates a directory with files of `tests/programs/recipes`.
    pub fn new(files: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/recipes");
        for name in files {
            std::fs::copy(source.join(name), directory.path().join(name)).unwrap();
        }
        Self { directory }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Returns the command `forkyard run` with two gateways, and with packages that `scripts/test` has installed.
    pub fn command(&self, options: &[&str], command: &[&str]) -> Command {
        let packages = packages();
        let mut forkyard = Command::new(program("forkyard"));
        forkyard.args(["run", "--bind", "http:127.0.0.1:0", "--gateways", "2"]).args(options);
        if !options.contains(&"--workers") {
            forkyard.args(["--workers", "2"]);
        }
        forkyard.arg("--").args(command).current_dir(self.directory.path());
        forkyard.env("PYTHONPATH", packages.join("python")).env("PYTHONDONTWRITEBYTECODE", "1");
        forkyard.env("NODE_PATH", packages.join("node/node_modules"));
        forkyard
    }

    /// Creates a repository with one commit in a directory.
    pub fn commit(&self, directory: &str, message: &str) {
        git(&self.path(""), &["init", "--quiet", directory]);
        git(&self.path(directory), &["commit", "--quiet", "--allow-empty", "-m", message]);
    }

    /// Starts the server, checks that it works, and stops it. The application answers with the method, the path, the
    /// query and the length of the body.
    pub fn serves(&self, options: &[&str], command: &[&str]) {
        let mut server = Server::start_command(&mut self.command(options, command));
        let address = server.http();
        for number in 0..4 {
            echoes(&address, number).unwrap();
        }
        survives_reload(&mut server, echoes);
        stops(&mut server);
    }
}

/// Runs git in a directory, without the user's settings. Returns its output.
pub fn git(directory: &Path, arguments: &[&str]) -> String {
    let mut git = Command::new("git");
    git.args(["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]).args(arguments);
    git.current_dir(directory).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_TERMINAL_PROMPT", "0");
    let output = git.output_in_time().unwrap();
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Sends a GET and a POST on one connection.
fn echoes(address: &str, number: u64) -> Result<(), String> {
    let mut client = Client::connect(address).map_err(|error| error.to_string())?;
    let length = usize::try_from(number % 4 * 30_000).unwrap();
    let exchanges = [("GET", 0), ("POST", length)];
    for (method, length) in exchanges {
        let response = client.request(method, "/a/b?c=d", &vec![b'x'; length]).map_err(|error| error.to_string())?;
        let expected = format!("{method} /a/b c=d {length}\n");
        if response.status != 200 || response.text() != expected {
            return Err(format!("{expected:?}: {} {:?}", response.status, response.text()));
        }
    }
    Ok(())
}

/// Reloads the server while clients send requests, none of which may fail.
pub fn survives_reload(server: &mut Server, ask: impl Fn(&str, u64) -> Result<(), String> + Sync) {
    let (stop, count, failures) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(Vec::new()));
    let address = server.http();
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    if let Err(failure) = ask(&address, count.fetch_add(1, Ordering::SeqCst)) {
                        failures.lock().unwrap().push(failure);
                    }
                }
            });
        }
        let _clients_end = StopOnDrop(&stop);
        let some_requests = || {
            let enough = count.load(Ordering::SeqCst) + REQUESTS;
            wait_until("clients send requests", || (count.load(Ordering::SeqCst) >= enough).then_some(()));
        };
        some_requests();
        server.signal(Signal::SIGHUP);
        (0..2).for_each(|_| drop(server.wait_for("reload done gen=2"))); // the app processes, and the gateways
        some_requests();
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} requests failed, such as {:?}", failures.len(), failures.first());
}

/// Checks that a page contains `expected`, also during a reload, and stops the server.
pub fn serves_page(server: &mut Server, target: &str, expected: &str) {
    let ask = |address: &str, _| {
        let response = get(address, target).map_err(|error| error.to_string())?;
        if response.text().contains(expected) { Ok(()) } else { Err(format!("{response:?}")) }
    };
    survives_reload(server, ask);
    stops(server);
}

/// Stops the server. None of its processes may be left.
pub fn stops(server: &mut Server) {
    let all = descendants(server);
    assert!(all.len() >= 4, "two gateways and two app processes: {all:?}");
    server.stop();
    wait_until("no process is left", || all.iter().all(|&pid| is_gone(pid)).then_some(()));
}

/// Returns the pids of all processes below the master.
pub fn descendants(server: &Server) -> BTreeSet<i32> {
    let (all, mut found) = (processes(), BTreeSet::from([server.pid().as_raw()]));
    loop {
        let below: BTreeSet<i32> =
            all.iter().filter(|process| found.contains(&process.parent)).map(|process| process.pid).collect();
        let before = found.len();
        found.extend(below);
        if found.len() == before {
            found.remove(&server.pid().as_raw());
            return found;
        }
    }
}

/// Sends a GET that must be answered.
pub fn page(server: &Server, target: &str) -> Response {
    get(&server.http(), target).unwrap_or_else(|error| panic!("GET {target}: {error}"))
}

/// Sends a POST that must be answered.
pub fn sent(server: &Server, target: &str, body: &[u8]) -> Response {
    post(&server.http(), target, body).unwrap_or_else(|error| panic!("POST {target}: {error}"))
}
