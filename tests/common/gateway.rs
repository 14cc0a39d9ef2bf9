//! Starts `forkyard run` with gateways, reads its status, and loads it with requests.
//!
//! The app processes run `examples/faulty.rs`, or php-cgi with `tests/programs/gateway.php`. Both have the pages that
//! the load requests.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::fastcgi::{PARAMS, STDIN, begin, pair, record};
use super::limit::InTime as _;
use super::{Server, StopOnDrop, fastcgi, http, is_gone, program, wait_until};

pub const GATEWAY_PHP: &str = include_str!("../programs/gateway.php");

/// Returns a number of repetitions, of which FORKYARD_SCALE selects a percentage.
pub fn scaled(number: u64) -> u64 {
    let percent = std::env::var("FORKYARD_SCALE").ok();
    let percent = percent.map_or(100, |text| text.parse().expect("FORKYARD_SCALE is a number"));
    (number * percent / 100).max(10)
}

/// A directory for a server with gateways.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Returns the path of a file, as text.
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }

    /// Returns the command `forkyard run` with these options. Two gateways, two app processes, a port for HTTP, and a
    /// short `--settle` are the default.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut forkyard = Command::new(program("forkyard"));
        forkyard.args(["run", "--control"]).arg(self.path("control")).args(options);
        for (flag, value) in
            [("--bind", "http:127.0.0.1:0"), ("--gateways", "2"), ("--workers", "2"), ("--settle", "20ms")]
        {
            if !options.contains(&flag) {
                forkyard.args([flag, value]);
            }
        }
        if !command.is_empty() {
            forkyard.arg("--").args(command);
        }
        forkyard.env("FAULTY_DIR", self.0.path()).env("PHP_FCGI_CHILDREN", "0");
        forkyard
    }

    /// Starts a server whose app processes run `tests/programs/gateway.php` in php-cgi with these settings. By default, each
    /// app process is a php-cgi without children.
    pub fn start_php(self, options: &[&str], settings: &[&str], variables: &[(&str, &str)]) -> Site {
        std::fs::write(self.path("index.php"), GATEWAY_PHP).unwrap();
        let root = self.text("");
        let mut options = [options, &["--root", &root, "--index", "index.php"]].concat();
        if !options.contains(&"--app-concurrency") {
            options.extend(["--app-concurrency", "1"]);
        }
        // `-n` ignores the machine's php.ini.
        let php = ["php-cgi", "-n", "-d", "extension=posix", "-d", "post_max_size=32M", "-d", "log_errors=1"];
        let mut command = self.run(&options, &[&php[..], settings].concat());
        self.start(command.envs(variables.iter().copied()))
    }

    /// Starts this command, and waits until all processes are ready.
    pub fn start(self, command: &mut Command) -> Site {
        let site = Site { server: Server::start_command(command), place: self };
        wait_until("all processes are ready", || {
            let status = site.status();
            let all = ["workers", "gateways"].into_iter().flat_map(|pool| status[pool].as_array().unwrap());
            all.into_iter().all(|process| process["state"] == "ready").then_some(())
        });
        site
    }
}

/// A server with gateways, in its directory.
pub struct Site {
    pub server: Server,
    pub place: Place,
}

impl Site {
    /// Starts a server whose app processes run `examples/faulty.rs`.
    pub fn faulty(options: &[&str]) -> Self {
        let place = Place::new();
        let mut command = place.run(options, &[&program("faulty").to_string_lossy()]);
        place.start(&mut command)
    }

    /// Starts a server whose app processes run `tests/programs/gateway.php` as a front controller.
    pub fn php(options: &[&str], variables: &[(&str, &str)]) -> Self {
        Place::new().start_php(options, &[], variables)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.place.path(name)
    }

    pub fn control(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(program("forkyard"));
        command.args(arguments).arg("--control").arg(self.path("control")).output_in_time().unwrap()
    }

    pub fn status(&self) -> Value {
        let output = self.control(&["status", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn pids(&self, pool: &str) -> BTreeSet<i32> {
        let status = self.status();
        let pids = status[pool].as_array().unwrap().iter().filter(|process| process["state"] == "ready");
        let pids = pids.filter_map(|process| i32::try_from(process["pid"].as_i64()?).ok());
        pids.filter(|&pid| !is_gone(pid)).collect()
    }

    /// Returns the pids of the app processes that are ready.
    pub fn apps(&self) -> BTreeSet<i32> {
        self.pids("workers")
    }

    /// Returns the pids of the gateways that are ready.
    pub fn gateways(&self) -> BTreeSet<i32> {
        self.pids("gateways")
    }

    /// Returns the pids of all app processes and gateways that are ready.
    pub fn processes(&self) -> BTreeSet<i32> {
        self.apps().union(&self.gateways()).copied().collect()
    }

    /// Waits until no app process and no gateway serves a request, and none waits.
    pub fn at_rest(&self) {
        wait_until("no request is in flight", || {
            let status = self.status();
            let all = ["workers", "gateways"].into_iter().flat_map(|pool| status[pool].as_array().unwrap());
            let is_idle = all.into_iter().all(|process| process["in_flight"].as_u64().unwrap_or(0) == 0);
            (is_idle && status["queued"]["requests"] == 0).then_some(())
        });
    }

    /// Waits until this number of requests waits for an app process.
    pub fn queued(&self, count: u64) {
        wait_until(&format!("{count} requests wait"), || (self.status()["queued"]["requests"] == count).then_some(()));
    }

    /// Kills one of the app processes, or one of the gateways, and waits until it has been replaced.
    pub fn kill_one(&self, pids: impl Fn(&Self) -> BTreeSet<i32>, count: usize, random: &mut fastrand::Rng) -> i32 {
        let victim = wait_until("there is a process to kill", || {
            let all = pids(self);
            let victim = *all.iter().nth(random.usize(..count))?;
            kill(Pid::from_raw(victim), Signal::SIGKILL).ok().map(|()| victim)
        });
        wait_until("the process is replaced", || (is_gone(victim) && pids(self).len() == count).then_some(()));
        victim
    }

    pub fn get(&self, target: &str) -> http::Response {
        http::get(&self.server.http(), target).unwrap_or_else(|error| panic!("GET {target}: {error}"))
    }

    pub fn post(&self, target: &str, body: &[u8]) -> http::Response {
        http::post(&self.server.http(), target, body).unwrap_or_else(|error| panic!("POST {target}: {error}"))
    }

    /// Sends a request on a new connection, and does not read the response.
    pub fn send(&self, method: &str, target: &str) -> http::Client {
        use std::io::Write as _;
        let mut client = http::Client::connect(&self.server.http()).unwrap();
        write!(client.stream.get_mut(), "{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
            .unwrap();
        client
    }

    /// Sends a request that an app process holds until [`Site::release`]. Returns the client and the pid of the process.
    pub fn hold(&self, name: &str, path: &str) -> (http::Client, i32) {
        let client = self.send("GET", &format!("{path}?{name}"));
        let file = self.path(&format!("{name}.in"));
        let pid = wait_until("an app process has begun the request", || {
            std::fs::read_to_string(&file).ok()?.trim().parse().ok()
        });
        (client, pid)
    }

    pub fn release(&self, name: &str) {
        std::fs::write(self.path(&format!("{name}.go")), "").unwrap();
    }

    /// Returns how often `/once?NAME` has been executed.
    pub fn executions(&self, name: &str) -> usize {
        (1..).take_while(|count| self.path(&format!("{name}.{count}")).exists()).count()
    }

    /// Returns a FastCGI request as a web server sends it for this site.
    pub fn fastcgi_request(&self, method: &str, target: &str, body: &[u8]) -> Vec<Vec<u8>> {
        let params: Vec<u8> =
            self.variables(method, target, body).iter().flat_map(|(name, value)| pair(name, value)).collect();
        let mut records = vec![begin(1, 1, true), record(PARAMS, 1, &params, 0), record(PARAMS, 1, b"", 0)];
        records.extend(body.chunks(32 << 10).map(|piece| record(STDIN, 1, piece, 0)));
        records.push(record(STDIN, 1, b"", 0));
        records
    }

    /// Returns the CGI variables that a web server sends for this site. CONTENT_LENGTH is the first.
    pub fn variables(&self, method: &str, target: &str, body: &[u8]) -> Vec<(&'static str, String)> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        vec![
            ("CONTENT_LENGTH", body.len().to_string()),
            ("REQUEST_METHOD", method.to_owned()),
            ("SCRIPT_FILENAME", self.place.text("index.php")),
            ("SCRIPT_NAME", "/index.php".to_owned()),
            ("PATH_INFO", path.to_owned()),
            ("QUERY_STRING", query.to_owned()),
            ("REQUEST_URI", target.to_owned()),
            ("SERVER_PROTOCOL", "HTTP/1.1".to_owned()),
            ("REMOTE_ADDR", "127.0.0.1".to_owned()),
            ("HTTP_HOST", "localhost".to_owned()),
        ]
    }
}

/// What a load tolerates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    /// Every request is answered.
    Nothing,
    /// A POST may be answered with 502, because its app process was killed. A long response may be broken off.
    Posts,
    /// Each request may be answered with 502, because its gateway was killed.
    All,
}

/// Clients that send requests until a test has finished.
pub struct Load {
    tolerance: Tolerance,
    stop: AtomicBool,
    /// Number of requests answered with 200.
    pub good: AtomicU64,
    /// Number of requests answered with 502.
    pub sorry: AtomicU64,
    /// Number of long responses that were recognisably broken off.
    pub broken: AtomicU64,
    ids: AtomicU64,
    failures: Mutex<Vec<String>>,
    /// The address of an nginx in front of the site, which some of the clients use.
    pub nginx: Option<String>,
    /// Time at which the last process was killed.
    killed: Mutex<Option<Instant>>,
    /// For each 502, the time since the last process was killed.
    pub answers_after_kill: Mutex<Vec<Duration>>,
}

impl Load {
    pub fn new(tolerance: Tolerance) -> Self {
        let zero = AtomicU64::default;
        Self {
            tolerance,
            stop: AtomicBool::new(false),
            good: zero(),
            sorry: zero(),
            broken: zero(),
            ids: zero(),
            failures: Mutex::default(),
            nginx: None,
            killed: Mutex::default(),
            answers_after_kill: Mutex::default(),
        }
    }

    /// Returns the number of requests that have been answered.
    pub fn total(&self) -> u64 {
        self.good.load(Ordering::SeqCst) + self.sorry.load(Ordering::SeqCst)
    }

    /// Kills a process with SIGKILL. Returns false if it has exited before.
    pub fn kill(&self, pid: i32) -> bool {
        *self.killed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok()
    }

    /// Counts a request that was answered with 502.
    fn is_sorry(&self) {
        self.sorry.fetch_add(1, Ordering::SeqCst);
        if let Some(killed) = *self.killed.lock().unwrap_or_else(PoisonError::into_inner) {
            self.answers_after_kill.lock().unwrap_or_else(PoisonError::into_inner).push(killed.elapsed());
        }
    }

    /// Runs this number of clients until `operator` returns. Then checks that no request has failed, and that no POST has
    /// been executed twice.
    pub fn run(&self, site: &Site, clients: usize, operator: impl FnOnce()) {
        std::thread::scope(|scope| {
            for number in 0..clients {
                scope.spawn(move || self.client(site, number));
            }
            let _clients_end = StopOnDrop(&self.stop);
            operator();
        });
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if !failures.is_empty() {
            eprintln!("the status: {}", site.status());
        }
        assert!(failures.is_empty(), "{} requests failed: {:#?}", failures.len(), &failures[..failures.len().min(10)]);
        for id in 0..self.ids.load(Ordering::SeqCst) {
            let count = site.executions(&format!("id{id}"));
            assert!(count <= 1, "the POST {id} was executed {count} times");
        }
        let [good, sorry, broken] = [&self.good, &self.sorry, &self.broken].map(|count| count.load(Ordering::SeqCst));
        eprintln!("{good} requests were answered with 200, {sorry} with 502, {broken} were broken off");
    }

    pub fn has_failed(&self) -> bool {
        !self.failures.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Waits until this number of further requests has been answered. Returns false if a request has failed.
    pub fn answered(&self, count: u64) -> bool {
        let enough = self.good.load(Ordering::SeqCst) + count;
        wait_until("requests are answered", || {
            (self.good.load(Ordering::SeqCst) >= enough || self.has_failed()).then_some(())
        });
        !self.has_failed()
    }

    /// Whether a long response has been broken off in a way that the client can recognise. Over FastCGI, the server ends
    /// such a response with bytes that are not a record.
    fn is_broken_off(&self, target: &str, error: &io::Error) -> bool {
        let has_ended = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset].contains(&error.kind());
        let is_recognised = has_ended || error.to_string().starts_with("not a record: [0");
        self.tolerance != Tolerance::Nothing && target.starts_with("/large") && is_recognised
    }

    fn client(&self, site: &Site, number: usize) {
        let mut way = Way::new(site, self.nginx.as_deref(), number);
        let mut count = number;
        while !self.stop.load(Ordering::SeqCst) {
            count += 1;
            let (method, target) = match count % 3 {
                0 => ("POST", format!("/once?id{}", self.ids.fetch_add(1, Ordering::SeqCst))),
                1 => ("GET", "/large?100000".to_owned()),
                _ => ("GET", "/pid".to_owned()),
            };
            let outcome = way.ask(site, method, &target);
            let is_tolerated = match self.tolerance {
                Tolerance::Nothing => false,
                Tolerance::Posts => method == "POST",
                Tolerance::All => true,
            };
            let is_right = |body: &[u8]| match target.as_str() {
                "/pid" => body.ends_with(b"\n") && body.len() < 10,
                "/large?100000" => body == [b'x'; 100_000],
                _ => body == b"1\n",
            };
            match outcome {
                Ok((200, body)) if is_right(&body) => {
                    self.good.fetch_add(1, Ordering::SeqCst);
                }
                Ok((502, _)) if is_tolerated => {
                    self.is_sorry();
                }
                Err(error) if self.is_broken_off(&target, &error) => {
                    self.broken.fetch_add(1, Ordering::SeqCst);
                    way = Way::new(site, self.nginx.as_deref(), number);
                }
                other => {
                    let text = match other {
                        Ok((status, body)) => format!("{status} {:.100}", String::from_utf8_lossy(&body)),
                        Err(error) => error.to_string(),
                    };
                    let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
                    failures.push(format!("{way:?} {method} {target}: {text}"));
                    drop(failures);
                    way = Way::new(site, self.nginx.as_deref(), number);
                }
            }
        }
    }
}

/// How a client sends its requests.
enum Way {
    Fresh,
    Kept(Option<http::Client>),
    NginxFresh(String),
    NginxKept(String, Option<http::Client>),
    FastCgi { address: String, client: Option<fastcgi::Client> },
}

impl std::fmt::Debug for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fresh => "http, a new connection",
            Self::Kept(_) => "http, a kept connection",
            Self::NginxFresh(_) => "nginx, a new connection",
            Self::NginxKept(..) => "nginx, a kept connection",
            Self::FastCgi { .. } => "fastcgi",
        })
    }
}

impl Way {
    fn new(site: &Site, nginx: Option<&str>, number: usize) -> Self {
        if let (Some(nginx), 3 | 4) = (nginx, number % 5) {
            let kept = Self::NginxKept(nginx.to_owned(), None);
            return if number % 5 == 3 { kept } else { Self::NginxFresh(nginx.to_owned()) };
        }
        let fastcgi = site.server.binds.iter().find(|bind| bind.starts_with("fastcgi:"));
        match (number % 3, fastcgi) {
            (0, Some(address)) => Self::FastCgi { address: address.clone(), client: None },
            (0 | 1, _) => Self::Kept(None),
            _ => Self::Fresh,
        }
    }

    fn ask(&mut self, site: &Site, method: &str, target: &str) -> io::Result<(u16, Vec<u8>)> {
        let address = site.server.http();
        let response = match self {
            Self::Fresh => http::Client::connect(&address)?.request(method, target, b"")?,
            Self::Kept(kept) => on_kept(kept, &address, method, target)?,
            Self::NginxFresh(nginx) => http::Client::connect(nginx)?.request(method, target, b"")?,
            Self::NginxKept(nginx, kept) => on_kept(kept, nginx, method, target)?,
            Self::FastCgi { address, client } => {
                let mut kept = client.take().map_or_else(|| fastcgi::Client::connect(address), Ok)?;
                kept.send(&site.fastcgi_request(method, target, b""))?;
                let response = kept.response(1)?;
                *client = Some(kept);
                let status =
                    response.head().lines().find_map(|line| line.strip_prefix("Status: ")?.get(..3)?.parse().ok());
                return Ok((status.unwrap_or(200), response.body().to_vec()));
            }
        };
        Ok((response.status, response.body))
    }
}

/// Sends a request on a kept connection, or on a new one if there is none.
fn on_kept(kept: &mut Option<http::Client>, address: &str, method: &str, target: &str) -> io::Result<http::Response> {
    let mut client = kept.take().map_or_else(|| http::Client::connect(address), Ok)?;
    let response = client.request(method, target, b"")?;
    *kept = (response.header("connection") != Some("close")).then_some(client);
    Ok(response)
}
