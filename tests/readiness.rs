//! A reload never replaces processes that serve by processes that do not: programs that die while they load, that die soon
//! after they are ready, that load slowly, and that are not ready by their own account. With and without gateways.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::gateway::{Place, Site};
use common::limit::InTime as _;
use common::{Server, is_gone, limit, program, run, wait_until};

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs/ready.py");

fn set(directory: &Path, name: &str, text: &str) {
    let (new, file) = (directory.join(format!("{name}.new")), directory.join(name));
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, file).unwrap();
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Starts two processes of `ready.py` behind gateways.
fn behind_gateways(options: &[&str], protocol: &str) -> Site {
    let place = Place::new();
    let directory = place.text("");
    let settle: &[&str] = if options.contains(&"--settle") { &[] } else { &["--settle", "30s"] };
    let options = [&["--backend", protocol], settle, options].concat();
    let mut command = place.run(&options, &["python3", PROGRAM, protocol, &directory]);
    place.start(&mut command)
}

/// A server without gateways.
struct Direct {
    server: Server,
    place: run::Place,
}

impl Direct {
    /// Starts two processes of `ready.py`.
    fn start(options: &[&str]) -> Self {
        let place = run::Place::new();
        let (control, directory) = (place.path("control"), place.path(""));
        let (control, directory) = (control.to_string_lossy(), directory.to_string_lossy());
        let options = [&["--control", &*control], options].concat();
        let command = ["python3", PROGRAM, "fastcgi", &*directory];
        let server = Server::start_command(&mut place.run(&options, &command));
        Self { server, place }
    }

    fn directory(&self) -> PathBuf {
        self.place.path("")
    }

    fn reload(&self) -> Command {
        reload(&self.place.path("control"))
    }
}

fn reload(control: &Path) -> Command {
    let mut command = Command::new(program("forkyard"));
    command.arg("reload").arg("--control").arg(control);
    command
}

/// Waits until a process of the second generation has been starting for much longer than `--settle 50ms`.
fn still_starts(control: &Path) {
    wait_until("the new process has been starting for a second", || {
        let mut command = Command::new(program("forkyard"));
        let output = command.args(["status", "--json", "--control"]).arg(control).output_in_time().unwrap();
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let workers = status["workers"].as_array().unwrap();
        let new = workers.iter().find(|worker| worker["generation"] == 2)?;
        assert_eq!(new["state"], "starting");
        (new["age_ms"].as_u64()? >= 1000).then_some(())
    });
}

/// Checks that a reload with this scene fails with the program's own words, and returns the output of the command.
fn expect_failure(directory: &Path, scene: &str, mut reload: Command) -> String {
    set(directory, "scene", scene);
    let output = reload.output_in_time().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{scene}: {said}");
    assert!(said.contains("reload failed") && said.contains("the old workers stay"), "{scene}: {said}");
    said
}

// ---- with gateways ----

#[test]
fn a_program_that_dies_while_it_loads_replaces_no_app_process() {
    let mut site = behind_gateways(&[], "http");
    let _database = UnixListener::bind(site.path("database")).unwrap();
    let old = site.processes();
    for scene in ["database", "dies"] {
        let said = expect_failure(&site.path(""), scene, reload(&site.path("control")));
        assert!(said.contains("\n  loading the configuration\n  schema version mismatch"), "{said}");
        assert_eq!(site.processes(), old, "{scene}");
        assert_eq!(site.get("/pid").status, 200);
    }
    let line = site.server.wait_for("reload failed: a new app process did not become ready");
    assert!(line.contains("said=\"loading the configuration | schema version mismatch\""), "{line}");
    site.server.stop();
}

#[test]
fn a_program_that_dies_soon_after_it_is_ready_replaces_no_app_process() {
    let mut site = behind_gateways(&[], "http");
    let old = site.processes();
    let said = expect_failure(&site.path(""), "brief", reload(&site.path("control")));
    assert!(said.contains("died too soon after it was ready (--settle)"), "{said}");
    assert!(said.contains("schema version mismatch"), "{said}");
    assert_eq!(site.processes(), old);
    assert_eq!(site.get("/pid").status, 200);
    site.server.logged("reload failed: a new app process died too soon after it was ready (--settle)");
    site.server.stop();
}

#[test]
fn the_old_app_processes_serve_until_a_slow_program_is_ready() {
    let mut site = behind_gateways(&["--settle", "50ms"], "http");
    let old = site.apps();
    set(&site.path(""), "scene", "slow");
    let running = reload(&site.path("control")).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the program is importing", || site.path("importing").exists().then_some(()));
    still_starts(&site.path("control"));
    let pid: i32 = site.get("/pid").text().trim().parse().unwrap();
    assert!(old.contains(&pid) && site.apps() == old, "{pid} {old:?}");
    set(&site.path(""), "go", "");
    let output = limit::output_of(running, "the reload");
    assert!(output.status.success(), "{output:?}");
    wait_until("the old processes have exited", || old.iter().all(|&pid| is_gone(pid)).then_some(()));
    assert_eq!(site.get("/pid").status, 200);
    site.server.stop();
}

#[test]
fn an_app_process_is_ready_when_it_answers_the_path() {
    for protocol in ["http", "scgi", "fastcgi"] {
        let place = Place::new();
        let directory = place.text("");
        set(&place.path(""), "status", "503");
        let options = ["--backend", protocol, "--ready-path", "/ready?x=1", "--settle", "0", "--workers", "1"];
        let mut command = place.run(&options, &["python3", PROGRAM, protocol, &directory]);
        let mut server = Server::launch(&mut command);
        wait_until("the path is requested repeatedly", || {
            (std::fs::read(place.path("asked")).unwrap_or_default().len() >= 3).then_some(())
        });
        assert!(!server.log().contains("ready in "), "{}", server.log());
        set(&place.path(""), "status", "204");
        server.wait_for("ready in ");
        server.stop();
        assert!(!server.log().contains("died"), "{}", server.log());
    }
}

#[test]
fn the_path_is_requested_from_a_server_on_a_port_too() {
    let place = Place::new();
    let directory = place.text("");
    let options = ["--backend", "http", "--ready-path", "/up", "--workers", "1"];
    let server = ["python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", &directory, "{port}"];
    let mut server = Server::launch(&mut place.run(&options, &server));
    wait_until("the path is requested repeatedly", || (server.log().matches("code 404").count() >= 3).then_some(()));
    assert!(!server.log().contains("ready in "), "{}", server.log());
    set(&place.path(""), "up", "");
    server.wait_for("ready in ");
    server.stop();
}

#[test]
fn an_app_process_that_starts_during_an_upgrade_must_still_answer_the_path() {
    let place = Place::new();
    let directory = place.text("");
    set(&place.path(""), "status", "503");
    let options = ["--backend", "http", "--ready-path", "/ready", "--workers", "1", "--settle", "0"];
    let mut command = place.run(&options, &["python3", PROGRAM, "http", &directory]);
    let mut server = Server::launch(&mut command);
    let asked = || std::fs::read(place.path("asked")).unwrap_or_default().len();
    wait_until("the path is requested", || (asked() > 0).then_some(()));
    server.signal(nix::sys::signal::Signal::SIGUSR2);
    server.wait_for("upgraded version=");
    let before = asked();
    wait_until("the path is requested by the new build", || (asked() >= before + 3).then_some(()));
    assert!(!server.log().contains("ready in "), "{}", server.log());
    set(&place.path(""), "status", "200");
    server.wait_for("ready in ");
    server.stop();
}

#[test]
fn a_reload_reports_the_last_answer_of_a_process_that_is_not_ready() {
    for protocol in ["http", "scgi", "fastcgi"] {
        let mut site = behind_gateways(&["--ready-path", "/ready", "--start-timeout", "3s"], protocol);
        let old = site.processes();
        set(&site.path(""), "status", "500");
        let said = expect_failure(&site.path(""), "", reload(&site.path("control")));
        assert!(said.contains("the last answer to GET /ready (--ready-path) was: status 500"), "{said}");
        assert_eq!(site.processes(), old);
        site.server.stop();
    }
}

#[test]
fn the_path_selects_a_script_as_that_of_a_request_does() {
    let place = Place::new();
    std::fs::write(place.path("up.php"), "<?php error_log('up ' . $_SERVER['PATH_INFO']); ?>ok").unwrap();
    let (root, options) = (place.text(""), ["--ready-path", "/up.php/now", "--workers", "1"]);
    let options = [&options[..], &["--root", &root]].concat();
    let php = ["php-cgi", "-n", "-d", "log_errors=1", "-d", "fastcgi.logging=0"];
    let mut server = Server::start_command(&mut place.run(&options, &php));
    server.logged("up /now");
    server.stop();

    let options = [&["--ready-path", "/none"], &options[2..]].concat();
    let mut server = Server::launch(&mut place.run(&options, &php));
    let line = server.wait_for("cannot start an app process");
    assert!(line.contains("--ready-path /none names no script below --root"), "{line}");
    server.stop();
}

// ---- without gateways ----

#[test]
fn a_program_that_does_not_declare_itself_ready_replaces_no_program() {
    let mut direct = Direct::start(&["--ready-by", "descriptor", "--settle", "30s"]);
    let _database = UnixListener::bind(direct.place.path("database")).unwrap();
    let old = direct.server.workers();
    for scene in ["database", "dies"] {
        let said = expect_failure(&direct.directory(), scene, direct.reload());
        assert!(said.contains("\n  loading the configuration\n  schema version mismatch"), "{said}");
        assert_eq!(direct.server.workers(), old, "{scene}");
        assert_eq!(direct.place.ask("/pid", b"").unwrap().protocol_status, 0);
    }
    let said = expect_failure(&direct.directory(), "closes", direct.reload());
    assert!(said.contains("FORKYARD_READY"), "{said}");
    assert_eq!(direct.server.workers(), old);
    let said = expect_failure(&direct.directory(), "brief", direct.reload());
    assert!(said.contains("died too soon after it was ready (--settle)"), "{said}");
    assert_eq!(direct.server.workers(), old);
    direct.server.stop();
}

#[test]
fn the_old_programs_serve_until_a_slow_program_declares_itself_ready() {
    let mut direct = Direct::start(&["--ready-by", "descriptor", "--settle", "50ms"]);
    let old = direct.server.workers();
    set(&direct.directory(), "scene", "slow");
    let running = direct.reload().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the program is importing", || direct.place.path("importing").exists().then_some(()));
    still_starts(&direct.place.path("control"));
    assert!(old.iter().all(|&pid| !is_gone(pid)));
    assert!(!direct.server.log().contains("worker exited"), "{}", direct.server.log());
    set(&direct.directory(), "go", "");
    let output = limit::output_of(running, "the reload");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(direct.place.ask("/pid", b"").unwrap().protocol_status, 0);
    direct.server.stop();
}

#[test]
fn a_program_that_starts_during_an_upgrade_can_still_declare_itself_ready() {
    let place = run::Place::new();
    let directory = place.path("");
    set(&directory, "scene", "slow");
    let command = ["python3", PROGRAM, "fastcgi", &*directory.to_string_lossy()];
    let mut server = Server::launch(&mut place.run(&["--ready-by", "descriptor", "--settle", "0"], &command));
    wait_until("the program is importing", || place.path("importing").exists().then_some(()));
    server.signal(nix::sys::signal::Signal::SIGUSR2);
    server.wait_for("upgraded version=");
    assert!(!server.log().contains("ready in "), "{}", server.log());
    set(&directory, "go", "");
    server.wait_for("ready in ");
    assert_eq!(place.ask("/pid", b"").unwrap().protocol_status, 0);
    server.stop();
    assert!(!server.log().contains("died"), "{}", server.log());
}

/// A program that can be observed needs no declaration.
#[test]
fn a_program_that_is_replaced_by_one_that_dies_while_it_loads_stays() {
    let place = run::Place::new();
    let (control, hello) = (place.path("control"), place.compile_hello());
    let app = place.script("app", &format!("#!/bin/sh\nexec {}\n", hello.display()));
    let mut server = Server::start_command(&mut place.run(&["--control", &control.to_string_lossy()], &[&app]));
    let old = server.workers();
    for scene in ["sleep 2; echo schema version mismatch; exit 29", "echo schema version mismatch; exit 0"] {
        place.script("app", &format!("#!/bin/sh\n{scene}\n"));
        let output = reload(&control).output_in_time().unwrap();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("its last output:\n  schema version mismatch"), "{said}");
        assert_eq!(said.matches("exited on its own").count(), if scene.ends_with('0') { 2 } else { 0 }, "{said}");
        assert_eq!(said.contains("(the same 9 more times)"), scene.ends_with('0'), "{said}");
        assert_eq!(server.workers(), old);
        assert_eq!(place.text("/hello"), "Hello, world\n");
    }
    server.stop();
}

// ---- settings ----

#[test]
fn settings_that_have_no_effect_are_refused_with_the_reason() {
    for (arguments, reason) in [
        (&["--backend", "cgi", "--ready-path", "/x"][..], "--ready-path has no effect with --backend cgi"),
        (&["--backend", "cgi", "--stop-signal", "INT"], "--stop-signal has no effect with --backend cgi"),
        (&["--ready-by", "descriptor"], "--ready-by has no effect without --direct"),
        (&["--direct", "--ready-path", "/x"], "--ready-path is not available here"),
        (&["--ready-path", "x"], "is not a path"),
        (&["--stop-signal", "KILL"], "SIGKILL cannot ask a program to exit: a program cannot handle it"),
        (&["--stop-signal", "SIGSTOP"], "SIGSTOP cannot ask a program to exit: it suspends a process"),
        (&["--stop-signal", "NONE"], "'NONE' is not the name of a signal"),
    ] {
        let mut command = Command::new(program("forkyard"));
        command.args(["check", "--bind", "fastcgi:127.0.0.1:1"]).args(arguments).args(["--", "php-cgi"]);
        let output = command.output_in_time().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        assert!(text(&output).contains(reason), "{arguments:?}: {output:?}");
    }
}
