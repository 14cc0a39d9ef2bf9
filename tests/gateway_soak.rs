//! Many requests through gateways while app processes, their children and gateways are killed, replaced and recycled. No
//! request is lost, and no POST is executed twice.
//!
//! Each test sends about 3,000 requests. `scripts/soak gateway` sets a different number (`FORKYARD_SOAK`), uses a release
//! build, and includes the measurements in `gateway_costs.rs`. `FORKYARD_SCALE` is a percentage of the number.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Instant;

use common::gateway::{Load, Place, Site, Tolerance, scaled};
use common::nginx::start_nginx;
use common::{Helper, children_of, is_gone, wait_until};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

const CLIENTS: usize = 32;
const BINDS: [&str; 6] = ["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0", "--respawn-rate", "1000"];
const NODE: &str = include_str!("programs/gateway.js");
const PERL: &str = include_str!("programs/gateway.pl");

/// The programs behind the gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    /// Four php-cgi processes.
    Php,
    /// One php-cgi process with children.
    Children,
    Node,
    Scgi,
    /// `examples/faulty.rs`, which needs little processor time.
    Faulty,
}

/// Number of children of the php-cgi process: one for each request, and one for each gateway.
const CHILDREN: usize = 6;

impl Backend {
    /// Number of app processes.
    fn processes(self) -> usize {
        match self {
            Self::Php | Self::Scgi | Self::Faulty => 4,
            Self::Node => 2,
            Self::Children => 1,
        }
    }

    fn start(self, options: &[&str], variables: &[(&str, &str)]) -> Site {
        let workers = self.processes().to_string();
        let mut all = [&BINDS[..], options].concat();
        if !options.contains(&"--workers") {
            all.extend(["--workers", &workers]);
        }
        let place = Place::new();
        let (proto, name, text, program) = match self {
            Self::Php => return place.start_php(&all, &[], variables),
            Self::Children => {
                all.extend(["--app-concurrency", "4"]);
                let count = CHILDREN.to_string();
                let children = [("PHP_FCGI_CHILDREN", count.as_str())];
                return place.start_php(&all, &[], &[&children[..], variables].concat());
            }
            Self::Faulty => return Site::faulty(&all),
            Self::Node => ("http", "app.js", NODE, "node"),
            Self::Scgi => ("scgi", "app.pl", PERL, "perl"),
        };
        std::fs::write(place.path(name), text).unwrap();
        let file = place.text(name);
        let mut command = place.run(&[&all[..], &["--backend", proto]].concat(), &[program, &file]);
        place.start(&mut command)
    }
}

/// Returns the minimum number of requests in each test.
fn requests() -> u64 {
    let soak = std::env::var("FORKYARD_SOAK").ok();
    soak.map_or_else(|| scaled(3000), |text| text.parse().expect("FORKYARD_SOAK is a number"))
}

/// A load over HTTP, FastCGI and nginx.
struct Soak {
    site: Site,
    _nginx: Helper,
    load: Load,
    name: String,
}

impl Soak {
    fn new(name: &str, site: Site, tolerance: Tolerance) -> Self {
        let (nginx, address) = start_nginx(&site);
        let mut load = Load::new(tolerance);
        load.nginx = Some(address);
        Self { site, _nginx: nginx, load, name: name.to_owned() }
    }

    /// Repeats `act` under load, at least `least` times, until enough requests have been answered. Then the server is at
    /// rest, and is stopped. Returns its log.
    fn run(mut self, least: u64, mut act: impl FnMut(&Site, &Load)) -> String {
        let (begun, mut times) = (Instant::now(), 0);
        self.load.run(&self.site, CLIENTS, || {
            while (self.load.total() < requests() || times < least) && !self.load.has_failed() {
                act(&self.site, &self.load);
                times += 1;
            }
        });
        let seconds = begun.elapsed().as_secs_f64();
        eprintln!("{}: {} requests in {seconds:.1} s, {times} times", self.name, self.load.total());
        let mut late = self.load.answers_after_kill.lock().unwrap().clone();
        late.sort_unstable();
        if let (Some(middle), Some(last)) = (late.get(late.len() / 2), late.last()) {
            eprintln!("{}: {} received a 502, {middle:?} (median), {last:?} (slowest)", self.name, late.len());
        }
        self.site.at_rest();
        self.site.server.stop();
        self.site.server.log()
    }
}

/// Kills one of `count` processes after some requests, and waits until it has been replaced.
fn kill_one(site: &Site, load: &Load, random: &mut fastrand::Rng, count: usize, pids: fn(&Site) -> BTreeSet<i32>) {
    // 50 requests per kill in the mean.
    if !load.answered(random.u64(1..100)) {
        return;
    }
    let victim = wait_until("there is a process to kill", || {
        let victim = *pids(site).iter().nth(random.usize(..count))?;
        load.kill(victim).then_some(victim)
    });
    wait_until("the process is replaced", || (is_gone(victim) && pids(site).len() == count).then_some(()));
}

/// Returns the children of the app processes.
fn children(site: &Site) -> BTreeSet<i32> {
    site.apps().into_iter().flat_map(|pid| children_of(Pid::from_raw(pid))).collect()
}

fn app_processes_are_killed(backend: Backend, options: &[&str]) {
    let site = backend.start(options, &[]);
    let mut random = fastrand::Rng::with_seed(7);
    let soak = Soak::new(&format!("kills of app processes, {backend:?}"), site, Tolerance::Posts);
    let log = soak.run(requests() / 50, |site, load| {
        kill_one(site, load, &mut random, backend.processes(), Site::apps);
    });
    assert!(!log.contains("quarantined"), "{log}");
}

// ---- kills ----

#[test]
fn kills_of_php_processes() {
    app_processes_are_killed(Backend::Php, &[]);
}

#[test]
fn kills_of_php_with_children() {
    // A death takes the requests of all children with it. A GET may meet several deaths.
    app_processes_are_killed(Backend::Children, &[]);
}

#[test]
fn kills_of_children_of_php() {
    let site = Backend::Children.start(&[], &[]);
    wait_until("all children run", || (children(&site).len() == CHILDREN).then_some(()));
    let parent = site.apps();
    let mut random = fastrand::Rng::with_seed(7);
    let soak = Soak::new("kills of children of php-cgi", site, Tolerance::Posts);
    let log = soak.run(requests() / 50, |site, load| {
        kill_one(site, load, &mut random, CHILDREN, children);
        assert_eq!(site.apps(), parent, "the php-cgi process was not replaced");
    });
    assert!(!log.contains("quarantined"), "{log}");
}

#[test]
fn kills_of_node() {
    app_processes_are_killed(Backend::Node, &[]);
}

#[test]
fn kills_of_scgi_programs() {
    app_processes_are_killed(Backend::Scgi, &[]);
}

fn gateways_are_killed(backend: Backend) {
    // By default, php-cgi exits after 500 requests.
    let site = backend.start(&[], &[("PHP_FCGI_MAX_REQUESTS", "0")]);
    let apps = site.apps();
    let mut random = fastrand::Rng::with_seed(7);
    let soak = Soak::new(&format!("kills of gateways, {backend:?}"), site, Tolerance::All);
    let mut kills = 0;
    let sorry = std::cell::Cell::new(0);
    soak.run((requests() / 1000).max(3), |site, load| {
        // 1,000 requests per kill in the mean, so that an interrupted request belongs to one kill.
        if load.answered(random.u64(1..1800)) {
            kill_one(site, load, &mut random, 2, Site::gateways);
        }
        assert_eq!(site.apps(), apps, "no app process was replaced");
        kills += 1;
        sorry.set(load.sorry.load(Ordering::SeqCst));
    });
    // Each client has one request in flight.
    assert!(sorry.get() <= kills * CLIENTS as u64, "{} after {kills} kills", sorry.get());
}

#[test]
fn kills_of_gateways_of_php() {
    gateways_are_killed(Backend::Php);
}

#[test]
fn kills_of_gateways_of_node() {
    gateways_are_killed(Backend::Node);
}

#[test]
fn kills_of_the_master_leave_no_process() {
    for backend in [Backend::Php, Backend::Children, Backend::Node, Backend::Scgi] {
        let mut site = backend.start(&[], &[]);
        let all: BTreeSet<i32> = site.processes().union(&children(&site)).copied().collect();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let (address, answered) = (site.server.http(), std::sync::atomic::AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while !stop.load(Ordering::SeqCst) {
                        // Fails when the master is dead.
                        match common::http::get(&address, "/large?100000") {
                            Ok(_) => _ = answered.fetch_add(1, Ordering::SeqCst),
                            Err(_) => std::thread::yield_now(),
                        }
                    }
                });
            }
            let _clients_end = common::StopOnDrop(&stop);
            wait_until("requests are answered", || (answered.load(Ordering::SeqCst) >= 100).then_some(()));
            site.server.signal(Signal::SIGKILL);
            let killed = Instant::now();
            assert_eq!(site.server.wait_end(), None);
            wait_until("no process is left", || all.iter().all(|&pid| is_gone(pid)).then_some(()));
            eprintln!("kill of the master, {backend:?}: no process is left after {:?}", killed.elapsed());
        });
    }
}

// ---- replacements, during which no request fails ----

/// Lets the operator replace processes continuously. No process dies.
fn nothing_fails(
    name: &str,
    backend: Backend,
    options: &[&str],
    variables: &[(&str, &str)],
    act: fn(&Site, &Load),
) -> String {
    let site = backend.start(options, variables);
    let log = Soak::new(&format!("{name}, {backend:?}"), site, Tolerance::Nothing).run(3, act);
    assert!(!log.contains(" died "), "{log}");
    log
}

/// Runs a command that replaces all processes, and waits until the old ones have exited.
fn replace_all(site: &Site, load: &Load, command: &str) {
    let old = site.processes();
    let output = site.control(&[command]);
    assert!(output.status.success(), "{output:?}");
    wait_until("the old processes have exited", || {
        (old.iter().all(|&pid| is_gone(pid)) || load.has_failed()).then_some(())
    });
}

fn reload(site: &Site, load: &Load) {
    replace_all(site, load, "reload");
}

fn upgrade(site: &Site, load: &Load) {
    replace_all(site, load, "upgrade");
}

/// Changes the number of app processes to 8 and back to 1.
fn scale(site: &Site, load: &Load) {
    for count in [8, 1] {
        let output = site.control(&["scale", &count.to_string()]);
        assert!(output.status.success(), "{output:?}");
        wait_until("there are this many processes", || (site.apps().len() == count || load.has_failed()).then_some(()));
    }
}

fn some_requests(_: &Site, load: &Load) {
    load.answered(100);
}

#[test]
fn reloads_of_php() {
    nothing_fails("reloads", Backend::Php, &[], &[], reload);
}

#[test]
fn reloads_of_php_with_children() {
    nothing_fails("reloads", Backend::Children, &[], &[], reload);
}

#[test]
fn reloads_of_node() {
    nothing_fails("reloads", Backend::Node, &[], &[], reload);
}

#[test]
fn upgrades_of_php() {
    nothing_fails("upgrades", Backend::Php, &[], &[], upgrade);
}

#[test]
fn upgrades_of_node() {
    nothing_fails("upgrades", Backend::Node, &[], &[], upgrade);
}

#[test]
fn scaling_of_php() {
    nothing_fails("scaling", Backend::Php, &["--workers", "1"], &[], scale);
}

#[test]
fn scaling_of_node() {
    nothing_fails("scaling", Backend::Node, &["--workers", "1"], &[], scale);
}

/// Returns the log and the number of app processes that exited.
fn recycling(backend: Backend) -> (String, u64) {
    let log = nothing_fails("recycling", backend, &["--max-requests", "500~100"], &[], some_requests);
    let recycled = log.matches("app process exited").count() as u64;
    eprintln!("{recycled} app processes were recycled");
    (log, recycled)
}

fn app_processes_are_recycled(backend: Backend) {
    let (log, recycled) = recycling(backend);
    assert!(recycled >= requests() / 1500, "{recycled}\n{log}");
}

#[test]
fn recycling_of_php() {
    app_processes_are_recycled(Backend::Php);
}

#[test]
fn recycling_of_children_of_php() {
    let (log, recycled) = recycling(Backend::Children);
    assert_eq!(recycled, 1, "its children were recycled, and it has exited at the end\n{log}");
}

#[test]
fn recycling_of_node() {
    app_processes_are_recycled(Backend::Node);
}

#[test]
fn recycling_of_a_fast_program() {
    app_processes_are_recycled(Backend::Faulty);
}

#[test]
fn recycling_by_php_itself() {
    let variables = [("PHP_FCGI_MAX_REQUESTS", "500")];
    let log = nothing_fails("exits after 500 requests", Backend::Php, &[], &variables, some_requests);
    let count = log.matches("exited on its own").count() as u64;
    assert!(count >= requests() / 1500, "{count}\n{log}");
    nothing_fails("exits after 500 requests", Backend::Children, &[], &variables, some_requests);
}
