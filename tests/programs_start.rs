//! When an external program is considered started, and how failed starts are handled: programs that exit with status 0 immediately, that
//! only appear ready, or that never use the listening socket; wrappers that fail; daemons that move to the background.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod common;

use std::os::unix::net::UnixListener;
use std::process::Command;

use common::limit::InTime as _;
use common::run::Place;
use common::{Server, is_gone, process, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Starts a server that runs the C program through a script, which the test can replace.
fn start(place: &Place, options: &[&str]) -> (Server, String) {
    let hello = place.compile_hello();
    let text = format!("#!/bin/sh\nexec {}\n", hello.display());
    let app = place.script("app", &text);
    (Server::start_command(&mut place.run(options, &[&app])), app)
}

/// Returns the number that follows this text in a line.
fn after(line: &str, what: &str) -> u128 {
    let rest = line.split_once(what).unwrap_or_else(|| panic!("no {what:?} in {line:?}")).1;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

// ---- status 0 ----

#[test]
fn a_reload_with_a_program_that_exits_with_0_immediately_fails_and_reports_its_output() {
    let place = Place::new();
    let control = place.path("control");
    let (mut server, _) = start(&place, &["--control", &control.to_string_lossy()]);
    let old = server.workers();
    for pause in ["true", "sleep 0.2"] {
        place.script("app", &format!("#!/bin/sh\necho 'configuration error: no DSN'\n{pause}\nexit 0\n"));
        let spawned = |server: &Server| server.log().matches("exited on its own").count();
        let before = spawned(&server);
        let output =
            Command::new(program("forkyard")).arg("reload").arg("--control").arg(&control).output_in_time().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("the old workers stay") && said.contains("configuration error: no DSN"), "{said}");
        let line = server.wait_for("reload failed");
        assert!(
            line.contains("said=\"configuration error: no DSN\"")
                && line.contains("was not seen to accept a connection"),
            "{line}"
        );
        assert!(spawned(&server) - before <= 10, "{}", server.log());
        assert_eq!(server.workers(), old);
        assert_eq!(place.text("/hello"), "Hello, world\n");
    }
    let hello = place.path("hello");
    place.script("app", &format!("#!/bin/sh\nexec {}\n", hello.display()));
    server.signal(Signal::SIGHUP);
    server.wait_for("reload done gen=4");
    server.stop();
}

#[test]
fn a_program_that_exits_with_0_immediately_is_retried_with_increasing_delays() {
    let place = Place::new();
    let mut server = Server::launch(&mut place.run(&[], &["true"]));
    for (failures, delay_ms) in [(1, 100), (2, 200), (3, 400), (4, 800), (5, 1600)] {
        let line = server.wait_for("workers die before they are ready");
        assert!(line.contains(&format!(" failures={failures} next_try={delay_ms}ms")), "{line}");
        assert!(line.contains("php-cgi is one, php is not"), "{line}");
    }
    server.stop();
    // Several processes at startup, then one at a time.
    assert!(server.log().matches("exited on its own").count() <= 10 + 1 + 5, "{}", server.log());
}

#[test]
fn a_program_that_exits_with_0_immediately_is_retried_with_increasing_delays_even_if_others_serve() {
    let place = Place::new();
    let (mut server, _) = start(&place, &[]);
    place.script("app", "#!/bin/sh\nexit 0\n");
    kill(Pid::from_raw(*server.workers().first().unwrap()), Signal::SIGKILL).unwrap();
    for delay_ms in [100, 200, 400] {
        let line = server.wait_for("workers die before they are ready");
        assert_eq!(after(&line, "next_try="), delay_ms, "{line}");
    }
    assert_eq!(place.text("/hello"), "Hello, world\n");
    assert!(server.log().matches("exited on its own").count() <= 10 + 4, "{}", server.log());
    server.stop();
}

// ---- readiness ----

/// The program connects to its database, takes longer than the settle time to load, and dies.
#[test]
fn a_database_connection_and_a_long_startup_do_not_count_as_readiness() {
    let place = Place::new();
    let (mut server, app) = start(&place, &[]);
    let old = server.workers();
    let database = UnixListener::bind(place.path("database")).unwrap();
    let text = format!(
        "#!/usr/bin/env python3\nimport socket, sys, time\nc = socket.socket(socket.AF_UNIX)\nc.connect('{}')\n\
         p = socket.socketpair()\ntime.sleep(1.5)\nprint('schema version mismatch')\nsys.exit(29)\n",
        place.path("database").display()
    );
    place.script("app", &text);
    server.signal(Signal::SIGHUP);
    let _connection = database.accept().unwrap();
    let line = wait_until("the reload has an outcome", || {
        server
            .log()
            .lines()
            .find(|line| line.contains("reload done") || line.contains("reload failed"))
            .map(str::to_owned)
    });
    assert!(line.contains("reload failed") && line.contains("said=\"schema version mismatch\""), "{line}");
    assert!(server.log().contains("status=29"), "{}", server.log());
    assert_eq!(server.workers(), old, "{app} has replaced no worker");
    assert_eq!(place.text("/hello"), "Hello, world\n");
    server.stop();
}

#[test]
fn a_program_with_an_event_loop_is_ready_when_it_watches_the_socket() {
    let place = Place::new();
    let gate = place.path("gate");
    let text = format!(
        "#!/usr/bin/env python3\nimport os, select, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n\
         e = select.epoll()\nprint('loading', flush=True)\nwhile not os.path.exists('{}'): time.sleep(0.005)\n\
         e.register(0, select.EPOLLIN)\nprint('watching', flush=True)\nwhile True: e.poll()\n",
        gate.display()
    );
    let app = place.script("app", &text);
    // With the settle time alone, the program would be ready only after an hour.
    let mut server = Server::launch(&mut place.run(&["--settle", "1h"], &[&app]));
    server.wait_for("| loading");
    std::fs::write(gate, "").unwrap();
    server.wait_for("ready in ");
    assert!(server.log().find("| watching").is_some() || server.log().contains("ready in"), "{}", server.log());
    server.stop();
}

#[test]
fn a_wrapper_is_ready_when_its_child_accepts_connections() {
    let place = Place::new();
    let hello = place.compile_hello();
    let text = format!("{}; true", hello.display());
    let mut server = Server::start_command(&mut place.run(&["--settle", "1h"], &["sh", "-c", &text]));
    assert_eq!(place.text("/hello"), "Hello, world\n");
    server.stop();
}

// ---- programs that never accept from the socket ----

#[test]
fn php_without_cgi_is_reported_with_a_hint_at_php_cgi() {
    let place = Place::new();
    let mut server = Server::launch(&mut place.run(&[], &["php"]));
    let line = server.wait_for("workers die before they are ready");
    // A program that accepts a connection quickly cannot be distinguished from a program that never accepts, so the message states only
    // what was observed.
    assert!(
        line.contains("was not seen to accept a connection: if it accepted none, is it a FastCGI program"),
        "{line}"
    );
    assert!(line.contains("accepts from its standard input") && line.contains("php-cgi is one, php is not"), "{line}");
    server.stop();
}

#[test]
fn php_fpm_binds_its_own_socket_and_is_reported_and_never_ready() {
    let place = Place::new();
    let fpm = std::fs::read_dir("/usr/sbin").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let fpm = fpm
        .into_iter()
        .find(|name| name.starts_with("php-fpm"))
        .expect("php-fpm is installed (scripts/test installs it)");
    let text = format!(
        "[global]\ndaemonize = no\nerror_log = {0}/fpm.log\n[www]\nuser = nobody\nlisten = {0}/fpm-${{FORKYARD_SLOT}}.sock\npm = static\npm.max_children = 1\n",
        place.path("").display()
    );
    std::fs::write(place.path("fpm.conf"), text).unwrap();
    let configuration = place.path("fpm.conf").to_string_lossy().into_owned();
    // On a busy machine php-fpm may take longer than the default settle time to close its standard input.
    let options = ["--settle", "6s", "--start-timeout", "8s"];
    let mut server =
        Server::launch(&mut place.run(&options, &[&format!("/usr/sbin/{fpm}"), "-R", "-F", "-y", &configuration]));
    let line = server.wait_for("worker cannot serve clients");
    assert!(line.contains("php-fpm does; php-cgi accepts from standard input"), "{line}");
    server.wait_for("worker killed: it was not ready in time (--start-timeout)");
    let line = server.wait_for("worker exited");
    assert!(line.contains("does it bind a socket of its own?"), "{line}");
    server.stop();
    assert!(!server.log().contains("\nready in "), "{}", server.log());
}

#[test]
fn a_program_that_closes_the_socket_after_it_was_ready_is_logged() {
    let place = Place::new();
    let go = place.path("go");
    let script = format!("until [ -e {} ]; do sleep 0.05; done; exec sleep 600 </dev/null", go.display());
    let mut server = Server::start_command(&mut place.run(&[], &["sh", "-c", &script]));
    std::fs::write(&go, "").unwrap();
    let line = server.wait_for("worker cannot serve clients");
    assert!(line.contains("it has closed the listening socket"), "{line}");
    server.stop();
}

#[test]
fn an_upgrade_remembers_whether_programs_were_seen_to_accept() {
    let place = Place::new();
    let control = place.path("control");
    let (config, ours) = (place.path("forkyard.toml"), "['sh', '-c', 'sleep 1.5; exec php-cgi']");
    let write =
        |command: &str| std::fs::write(&config, format!("command = {command}\nstart-timeout = '4s'\n")).unwrap();
    write(ours);
    let mut forkyard = Command::new(program("forkyard"));
    forkyard.args(["run", "--direct", "--bind", &place.address, "--workers", "1", "--config"]).arg(&config);
    let mut server = Server::start_command(forkyard.arg("--control").arg(&control));
    let ask = |what: &str| {
        let output =
            Command::new(program("forkyard")).arg(what).arg("--control").arg(&control).output_in_time().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // The program is considered ready after a second. It accepts its first connection a little later, and the master detects this.
    wait_until("a program that never accepts fails a reload", || {
        write("['sleep', '600']");
        let (status, said) = ask("reload");
        if status == Some(0) {
            write(ours); // the master has not yet observed that the program accepts connections
            assert_eq!(ask("reload").0, Some(0));
            return None;
        }
        assert!(said.contains("the old workers stay"), "{said}");
        Some(())
    });
    let old = server.workers();
    let (status, said) = ask("upgrade");
    assert_eq!(status, Some(1), "{said}");
    assert_eq!(server.workers(), old, "the old workers continue");
    server.stop();
}

#[test]
fn connections_that_no_program_accepts_are_logged() {
    let place = Place::new();
    let mut server = Server::start_command(&mut place.run(&["--settle", "10ms"], &["sleep", "600"]));
    let _waiting = std::os::unix::net::UnixStream::connect(place.socket()).unwrap();
    let line = server.wait_for("no process accepts the waiting connections");
    assert!(line.contains("waiting=1") && line.contains("standard input"), "{line}");
    server.stop();
}

// ---- wrappers that fail ----

#[test]
fn the_exit_status_of_a_failing_wrapper_is_a_failure_and_is_explained() {
    for (command, status, said) in [
        (&["env", "--no-such-option", "php-cgi"][..], 125, "env, timeout, nice, docker run and the like return 125"),
        (&["timeout", "10", "/etc/passwd"], 126, "could not execute it"),
        (&["nice", "no-such-program-anywhere"], 127, "did not find the command"),
    ] {
        let place = Place::new();
        let mut server = Server::launch(&mut place.run(&[], command));
        let line = server.wait_for("worker died");
        assert!(line.contains(&format!("status={status}")) && line.contains(said), "{line}");
        for _ in 0..2 {
            server.wait_for("workers die before they are ready");
        }
        server.stop();
        assert!(!server.log().contains("worker exited and asked not to be replaced"), "{}", server.log());
    }
}

#[test]
fn a_program_that_was_ready_may_ask_not_to_be_replaced() {
    let place = Place::new();
    let text = "#!/usr/bin/env python3\nimport os, socket\nsocket.socket(fileno=0).accept()\nos._exit(125)\n";
    let app = place.script("app", text);
    let mut server = Server::start_command(&mut place.run(&[], &[&app]));
    for _ in 0..2 {
        let _client = std::os::unix::net::UnixStream::connect(place.socket()).unwrap();
        server.wait_for("worker exited and asked not to be replaced");
    }
    assert_eq!(server.wait_end(), Some(1), "no program is left");
}

// ---- daemons in the background ----

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&["--bind", "http:127.0.0.1:0", "--workers", "1"], arguments].concat())
}

#[test]
fn a_daemon_that_moves_to_the_background_is_logged_started_once_and_killed_at_shutdown() {
    let mut server = crashy(&["--daemon", "d=setsid -f sleep 600"]);
    let line = server.wait_for("daemon has put itself into the background");
    assert!(line.contains("run it in the foreground") && line.contains("name=d"), "{line}");
    let first = i32::try_from(after(&line, " pid=")).unwrap();
    wait_until("the daemon is sleeping", || (process(first)?.name == "sleep").then_some(()));
    assert_eq!(server.log().matches("daemon started name=d").count(), 1, "{}", server.log());
    server.signal(Signal::SIGHUP);
    let line = server.wait_for("daemon has put itself into the background");
    let second = i32::try_from(after(&line, " pid=")).unwrap();
    wait_until("the first process is gone, because the daemon is started again", || is_gone(first).then_some(()));
    server.stop();
    assert!(is_gone(second), "{}", server.log());
    assert!(
        server.log().contains(&format!("left behind, because the server is exiting pid={second}")),
        "{}",
        server.log()
    );
}

#[test]
fn a_daemon_that_exits_with_0_immediately_is_abandoned_after_several_tries() {
    let mut server = crashy(&["--daemon", "d=true", "--daemon-tries", "3"]);
    for delay_ms in [100, 200] {
        let line = server.wait_for("daemon cannot be started, or exits immediately");
        assert_eq!(after(&line, "next_try="), delay_ms, "{line}");
    }
    let line = server.wait_for("daemon exits immediately with status 0, and is not started again before a reload");
    assert!(line.contains("--daemon-tries") && line.ends_with(" name=d tries=3"), "{line}");
    server.signal(Signal::SIGHUP);
    server.wait_for("daemon started name=d");
    server.stop();
}

#[test]
fn processes_left_by_a_job_are_killed_at_shutdown_even_in_their_own_session() {
    let directory = tempfile::tempdir().unwrap();
    let up = directory.path().join("up").display().to_string();
    let job = format!(
        "j=* * * * * *=sh -c 'setsid sh -c \"echo up > {up}; exec sleep 600\" & while [ ! -s {up} ]; do sleep 0.01; done'"
    );
    let mut server = crashy(&["--cron", &job]);
    server.wait_for("job exited name=j");
    server.stop();
    let log = server.log();
    assert!(
        log.contains("left behind, because the server is exiting") && !log.contains("outlives the server"),
        "{log}"
    );
}
