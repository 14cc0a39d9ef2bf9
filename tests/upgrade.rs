//! SIGUSR2: the master executes a new build of its program, without affecting clients.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::http;
use common::limit::InTime as _;
use common::{Server, StopOnDrop, descriptors_of, process, program, sockets_of, wait_until};
use nix::sys::signal::Signal;

/// A directory with a program that the test replaces.
struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    /// Installs the program that was built for `name`.
    fn with(name: &str) -> Self {
        let place = Self { directory: tempfile::tempdir().unwrap() };
        place.install(name);
        place
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("app")
    }

    /// Installs a file like a package manager: writes the new file under a different name, then renames it over the old one. A separate
    /// process writes the file, because a child that a concurrent test forks would inherit this process's open files, and executing a file
    /// that is open for writing fails ("text file busy").
    fn put(&self, source: &Path, mode: u32) {
        let new = self.directory.path().join("app.new");
        assert!(Command::new("cp").arg(source).arg(&new).status_in_time().unwrap().success());
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(mode)).unwrap();
        std::fs::rename(new, self.path()).unwrap();
    }

    fn install(&self, name: &str) {
        self.put(&program(name), 0o755);
    }

    fn script(&self, text: &str, mode: u32) {
        let source = self.directory.path().join("text");
        std::fs::write(&source, text).unwrap();
        self.put(&source, mode);
    }

    fn start(&self, arguments: &[&str]) -> Server {
        Server::start_command(Command::new(self.path()).args(arguments))
    }
}

const ARGUMENTS: [&str; 4] = ["--bind", "http:127.0.0.1:0", "--workers", "2"];

fn upgrade(server: &mut Server) {
    server.signal(Signal::SIGUSR2);
    server.wait_for("upgraded version=");
    server.wait_for("reload done");
}

#[test]
fn the_new_build_replaces_the_old_build() {
    let place = Place::with("hello");
    let socket = place.directory.path().join("a.sock");
    let bind = format!("fastcgi:unix:{}", socket.display());
    let mut server = place.start(&[&ARGUMENTS[..], &["--bind", &bind]].concat());
    let (address, old) = (server.http(), server.workers());
    assert_eq!(http::get(&address, "/ok").unwrap().text(), "Hello, world\n");

    place.install("crashy");
    upgrade(&mut server);
    server.renewed(2, &old);
    assert_eq!(http::get(&address, "/ok").unwrap().text(), "ok\n", "the new program answers on the same port");
    let executable = std::fs::read_link(format!("/proc/{}/exe", server.pid())).unwrap();
    assert_eq!(executable, place.path(), "the process executes the new program");

    let mut client = common::fastcgi::Client::connect(&bind).unwrap();
    client.send(&common::fastcgi::request(1, false, "GET", "/ok", b"")).unwrap();
    assert_eq!(client.response(1).unwrap().status(), 200);
    drop(client);
    assert!(socket.exists());
    server.stop();
    assert!(!socket.exists(), "the new build removes the socket file, although the former build created it");
}

#[test]
fn files_of_removed_settings_are_deleted_and_the_client_gets_the_outcome_of_the_upgrade() {
    let place = Place::with("hello");
    let at = |name: &str| place.directory.path().join(name);
    let (config, text) = (at("config"), |name: &str| format!("{:?}", at(name)));
    for (control, former) in [(Some("control2"), "control1"), (None, "control2")] {
        let of = |control: Option<&str>| control.map_or_else(String::new, |name| format!("control = {}\n", text(name)));
        let before = format!(
            "bind = [\"http:127.0.0.1:0\", \"http:unix:{}\"]\n{}pid-file = {}\nevents-socket = {}\nlog-level = \"info\"\n",
            at("socket").display(),
            of(Some(former)),
            text("pid"),
            text("events"),
        );
        std::fs::write(&config, before).unwrap();
        let mut server = place.start(&["--workers", "1", "--config", config.to_str().unwrap()]);
        let files = [former, "socket", "pid", "events"];
        assert!(files.iter().all(|name| at(name).exists()), "{}", server.log());
        let old = server.workers();
        std::fs::write(&config, format!("bind = \"http:127.0.0.1:0\"\n{}", of(control))).unwrap();
        let mut command = Command::new(place.path());
        let asked = command.args(["upgrade", "--control"]).arg(at(former)).output_in_time().unwrap();
        let said = String::from_utf8_lossy(&asked.stdout);
        assert!(asked.status.success() && said.contains("reload done"), "{asked:?}");
        server.renewed(1, &old);
        for name in files {
            assert!(!at(name).exists(), "{name} is no longer configured");
        }
        assert!(control.is_none_or(|name| at(name).exists()));
        server.stop();
        assert!(control.is_none_or(|name| !at(name).exists()));
    }
}

#[test]
fn a_repeated_bind_is_two_sockets_before_and_after_an_upgrade() {
    let place = Place::with("hello");
    let mut server = place.start(&[&ARGUMENTS[..], &["--bind", "http:127.0.0.1:0"]].concat());
    let addresses: Vec<String> =
        server.binds.iter().map(|bind| bind.strip_prefix("http://").unwrap().to_owned()).collect();
    upgrade(&mut server);
    let sockets = sockets_of(server.pid().as_raw());
    upgrade(&mut server);
    assert_eq!(sockets_of(server.pid().as_raw()), sockets, "no socket is created again");
    for address in addresses {
        assert_eq!(http::get(&address, "/").unwrap().text(), "Hello, world\n");
    }
    server.stop();
}

#[test]
fn a_page_cached_before_an_upgrade_is_a_hit_after_it() {
    let place = Place::with("pages");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cache").display().to_string();
    for keep in [&[][..], &["--cache-file", &file]] {
        let mut server = place.start(&[&ARGUMENTS[..], &["--cache", "2M"], keep].concat());
        let (address, old) = (server.http(), server.workers());
        let page = http::get(&address, "/page/7").unwrap().text();
        place.install("pages");
        upgrade(&mut server);
        server.renewed(2, &old);
        assert_eq!(
            http::get(&address, "/page/7").unwrap().text(),
            page,
            "the page was rendered by a worker that is gone"
        );
        assert_eq!(server.log().matches("rendering page=7").count(), 1);
        server.stop();
        assert!(!server.log().contains("the next start may drop its content"), "a file is closed by who adopted it");
    }
}

#[test]
fn the_cache_stays_warm_when_the_number_of_workers_changes() {
    let place = Place::with("pages");
    let (file, config) = (place.directory.path().join("cache"), place.directory.path().join("config"));
    for keep in [String::new(), format!("cache-file = \"{}\"\n", file.display())] {
        let configure = |workers: &str| {
            let text = format!("bind = \"http:127.0.0.1:0\"\nworkers = \"{workers}\"\ncache = \"2M\"\n{keep}");
            std::fs::write(&config, text).unwrap();
        };
        configure("2");
        let mut server = place.start(&["--config", config.to_str().unwrap()]);
        let (address, mut old) = (server.http(), server.workers());
        let page = http::get(&address, "/page/7").unwrap().text();
        for workers in ["3", "1", "20"] {
            configure(workers);
            upgrade(&mut server);
            old = server.renewed(workers.parse().unwrap(), &old);
            assert_eq!(http::get(&address, "/page/7").unwrap().text(), page, "{workers} workers");
        }
        server.stop();
    }
}

#[test]
fn a_cache_of_another_size_starts_empty_and_this_is_logged() {
    let place = Place::with("pages");
    let mut server = Server::start_command(Command::new(place.path()).args(ARGUMENTS).env("FORKYARD_CACHE", "2M"));
    let (address, old) = (server.http(), server.workers());
    let page = http::get(&address, "/page/7").unwrap().text();
    let text = format!("#!/bin/sh\nFORKYARD_CACHE=4M exec {} \"$@\"\n", program("pages").display());
    place.script(&text, 0o755);
    server.signal(Signal::SIGUSR2);
    let line = server.wait_for("the memory of the former master cannot be used: ");
    assert!(
        line.contains("the cache and the event log start empty") && line.contains("its page cache has another size"),
        "{line}"
    );
    server.wait_for("reload done");
    let now = server.renewed(2, &old);
    assert_ne!(http::get(&address, "/page/7").unwrap().text(), page, "the page is rendered again");
    // The next upgrade executes the wrapper script.
    upgrade(&mut server);
    server.renewed(2, &now);
    server.stop();
}

#[test]
fn the_size_of_a_cache_file_in_use_cannot_be_changed() {
    let place = Place::with("pages");
    let file = place.directory.path().join("cache").display().to_string();
    let mut command = Command::new(place.path());
    command.args(ARGUMENTS).args(["--cache-file", &file]).env("FORKYARD_CACHE", "2M");
    let mut server = Server::start_command(&mut command);
    let page = http::get(&server.http(), "/page/7").unwrap().text();
    let text = format!("#!/bin/sh\nFORKYARD_CACHE=4M exec {} \"$@\"\n", program("pages").display());
    place.script(&text, 0o755);
    server.signal(Signal::SIGUSR2);
    let line = server.wait_for("cannot upgrade; nothing has changed");
    assert!(line.contains("--cache-file: the old workers still use the file"), "{line}");
    assert_eq!(http::get(&server.http(), "/page/7").unwrap().text(), page);
    server.stop();
}

#[test]
fn a_cache_file_without_room_for_all_workers_is_an_error_with_the_possible_number() {
    let place = Place::with("pages");
    let (file, config) = (place.directory.path().join("cache"), place.directory.path().join("config"));
    let configure = |workers: &str| {
        let (bind, file) = ("http:127.0.0.1:0", file.display());
        let text = format!("bind = \"{bind}\"\nworkers = \"{workers}\"\ncache = \"2M\"\ncache-file = \"{file}\"\n");
        std::fs::write(&config, text).unwrap();
    };
    configure("1..2");
    let mut server = place.start(&["--config", config.to_str().unwrap()]);
    let (address, old) = (server.http(), server.workers());
    let page = http::get(&address, "/page/7").unwrap().text();
    configure("1..25");
    server.signal(Signal::SIGUSR2);
    let line = server.wait_for("cannot upgrade; nothing has changed");
    assert!(line.contains("--cache-file") && line.contains("room for up to 24 workers"), "{line}");
    assert!(line.contains("choose --workers") && line.contains("stop and start"), "{line}");
    assert_eq!(server.workers(), old);
    // The number in the log line is exact.
    configure("1..24");
    upgrade(&mut server);
    server.renewed(1, &old);
    assert_eq!(http::get(&address, "/page/7").unwrap().text(), page);
    server.stop();
}

#[test]
fn a_script_in_place_of_the_program_gets_the_original_arguments_each_time() {
    let place = Place::with("hello");
    let mut server = place.start(&ARGUMENTS);
    let mut old = server.workers();
    // If the flag that the script adds were also passed to the script as an argument, the duplicate would be an error.
    let text = "#!/bin/sh\nprintf 'a line without an end: ' >&2; exec";
    let text = format!("{text} {} --drain-timeout 5s \"$@\"\n", program("crashy").display());
    place.script(&text, 0o755);
    for _ in 0..2 {
        upgrade(&mut server);
        old = server.renewed(2, &old);
        assert_eq!(http::get(&server.http(), "/ok").unwrap().text(), "ok\n");
    }
    server.stop();
}

#[test]
fn a_build_that_fails_its_check_changes_nothing() {
    let place = Place::with("hello");
    let mut server = place.start(&[&ARGUMENTS[..], &["--upgrade-timeout", "5s"]].concat());
    let (address, old) = (server.http(), server.workers());
    let descriptors = descriptors_of(server.pid().as_raw());
    let cases = [
        ("#!/bin/sh\necho no library >&2\nexit 1\n", 0o755, "status=1 said=\"no library\""),
        ("#!/bin/sh\nexit 0\n", 0o755, "it did not report that it can take over"),
        ("#!/bin/sh\nkill -SEGV $$\n", 0o755, "signal=SEGV"),
        (
            "#!/bin/sh\nsleep 600 & wait\n",
            0o755,
            "the new build failed its check: it took too long (--upgrade-timeout)",
        ),
        ("#!/bin/sh\nexit 0\n", 0o644, "Permission denied"),
        ("no program at all", 0o755, "status=127"),
    ];
    for (text, mode, why) in cases {
        place.script(text, mode);
        server.signal(Signal::SIGUSR2);
        let line = server.wait_for("cannot upgrade; nothing has changed");
        assert!(line.contains(why), "{why:?} is not in {line:?}");
        assert_eq!(http::get(&address, "/").unwrap().text(), "Hello, world\n");
        wait_until("the process of the check is gone", || (server.children() == old).then_some(()));
    }
    std::fs::remove_file(place.path()).unwrap();
    server.signal(Signal::SIGUSR2);
    let line = server.wait_for("cannot upgrade; nothing has changed");
    assert!(line.contains("No such file"), "{line}");
    assert_eq!(descriptors_of(server.pid().as_raw()), descriptors);

    place.install("crashy");
    upgrade(&mut server);
    server.renewed(2, &old);
    assert_eq!(http::get(&address, "/ok").unwrap().text(), "ok\n", "an upgrade to a working build succeeds");
    server.stop();
}

#[test]
fn a_state_that_cannot_be_written_prevents_an_upgrade_and_is_reported() {
    let place = Place::with("hello");
    let mut server = place.start(&ARGUMENTS);
    let (address, old) = (server.http(), server.workers());
    let pid = server.pid().to_string();
    let set_limit = |limit: &str| {
        let limit = format!("--fsize={limit}");
        assert!(Command::new("prlimit").args(["--pid", &pid, &limit]).status_in_time().unwrap().success());
    };
    let descriptors = descriptors_of(server.pid().as_raw());
    set_limit("100:");
    // In the first iteration, the limit is set before the check. In the second iteration, the script that replaces the program sets the
    // limit during the check.
    let text = format!("#!/bin/sh\nprlimit --pid $PPID --fsize=100:\nexec {} \"$@\"\n", program("hello").display());
    for is_checked in [false, true] {
        server.signal(Signal::SIGUSR2);
        let line = server.wait_for("cannot upgrade; nothing has changed");
        assert!(line.contains("this master's state cannot be written") && line.contains("ulimit -f"), "{line}");
        assert!(!line.contains("put the new build there"), "{line}");
        assert_eq!(server.log().contains("upgrade: executing"), is_checked);
        assert_eq!(server.workers(), old);
        assert_eq!(http::get(&address, "/").unwrap().text(), "Hello, world\n");
        assert_eq!(descriptors_of(server.pid().as_raw()), descriptors);
        set_limit("unlimited:");
        place.script(&text, 0o755);
    }
    place.install("hello");
    upgrade(&mut server);
    server.renewed(2, &old);
    server.stop();
}

#[test]
fn a_removed_working_directory_prevents_an_upgrade_but_not_startup() {
    let place = Place::with("hello");
    let directory = place.directory.path().join("directory");
    for when in ["before", "after"] {
        std::fs::create_dir(&directory).unwrap();
        let script = if when == "before" { "rmdir \"$PWD\"; exec \"$0\" \"$@\"" } else { "exec \"$0\" \"$@\"" };
        let mut command = Command::new("sh");
        command.current_dir(&directory).env("PWD", &directory).args(["-c", script]).arg(place.path()).args(ARGUMENTS);
        let mut server = Server::start_command(&mut command);
        let _ = std::fs::remove_dir(&directory); // the first iteration has removed it
        server.signal(Signal::SIGUSR2);
        let line = server.wait_for("cannot upgrade; nothing has changed");
        assert!(line.contains("the directory in which the server was started no longer exists"), "{line}");
        assert_eq!(http::get(&server.http(), "/").unwrap().text(), "Hello, world\n");
        server.stop();
    }
}

#[test]
fn twenty_upgrades_under_load_leak_nothing() {
    let place = Place::with("crashy");
    let mut server = place.start(&ARGUMENTS);
    let address = server.http();
    let mut least = usize::MAX;
    let (stop, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(http::get(&address, "/slow/1").unwrap().status, 200);
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..20 {
            let (old, before) = (server.workers(), count.load(Ordering::Relaxed));
            place.install("crashy");
            upgrade(&mut server);
            server.renewed(2, &old);
            wait_until("requests are answered", || (count.load(Ordering::Relaxed) > before + 5).then_some(()));
            // The first upgrade closes the descriptors that the test's own parent has left open.
            least = least.min(descriptors_of(server.pid().as_raw()));
        }
    });
    // A dead worker's pipe is closed a moment after its pid is gone, but a leaked descriptor is never closed.
    wait_until("the number of open descriptors is at its minimum", || {
        (descriptors_of(server.pid().as_raw()) <= least).then_some(())
    });
    assert!(server.children().iter().all(|&pid| process(pid).is_some_and(|child| child.state != 'Z')), "no zombies");
    assert!(!server.log().contains("worker died"), "{}", server.log());
    server.stop();
}

#[test]
fn signals_during_an_upgrade_are_not_lost() {
    for delay in 0..6 {
        let place = Place::with("hello");
        let mut server = place.start(&ARGUMENTS);
        server.signal(Signal::SIGUSR2);
        server.wait_for("upgrade: executing");
        // The signal arrives between the last line of the old build and the first line of the new build.
        for _ in 0..delay * 20_000 {
            std::hint::spin_loop();
        }
        server.signal(Signal::SIGTERM);
        assert_eq!(server.wait_end(), Some(0), "{}", server.log());
        server.wait_for("signal to drain and stop");
    }
}

#[test]
fn processes_that_die_during_an_upgrade_are_reaped_and_replaced() {
    let place = Place::with("crashy");
    let mut server = place.start(&ARGUMENTS);
    let old = server.workers();
    server.signal(Signal::SIGUSR2);
    server.wait_for("upgrade: executing");
    for &pid in &old {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    }
    server.wait_for("reload done");
    server.renewed(2, &old);
    assert_eq!(http::get(&server.http(), "/ok").unwrap().text(), "ok\n");
    server.stop();
}

#[test]
fn a_program_and_its_output_survive_an_upgrade_of_the_master() {
    let place = Place::with("forkyard");
    let bind = format!("fastcgi:unix:{}", place.directory.path().join("a.sock").display());
    // The worker's last output arrives after the upgrade, through a pipe that was created before the upgrade.
    let text = "trap 'echo parting words; exit' TERM; while :; do sleep 0.01; done";
    let run = ["run", "--direct", "--bind", &bind, "--workers", "2", "--settle", "10ms", "--", "sh", "-c", text];
    let mut server = place.start(&run);
    let old = server.workers();
    upgrade(&mut server);
    server.renewed(2, &old);
    wait_until("both programs have written their last line", || {
        (server.log().matches("| parting words").count() == 2).then_some(())
    });
    server.stop();
}

#[test]
fn process_1_can_be_upgraded() {
    let place = Place::with("hello");
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(place.path()).args(ARGUMENTS);
    let mut server = Server::start_command(&mut command);
    let master = nix::unistd::Pid::from_raw(*server.children().first().unwrap());
    place.install("crashy");
    nix::sys::signal::kill(master, Signal::SIGUSR2).unwrap();
    let line = server.wait_for("upgraded version=");
    assert!(line.contains("[1]"), "it is pid 1 there: {line}");
    server.wait_for("reload done");
    wait_until("the new build answers", || {
        http::get(&server.http(), "/ok").ok().filter(|answer| answer.text() == "ok\n")
    });
    nix::sys::signal::kill(master, Signal::SIGTERM).unwrap();
    assert_eq!(server.wait_end(), Some(0));
}
