//! Daemons and jobs: real programs that run alongside real workers, their environment, and how they terminate.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::path::Path;
use std::process::Command;

use common::limit::InTime as _;
use common::{Server, descriptors_of, http, is_gone, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const FLAGS: [&str; 4] = ["--bind", "http:127.0.0.1:0", "--workers", "1"];

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&FLAGS, arguments].concat())
}

/// Writes a script to `directory`. Returns it as a command for a flag.
fn script(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    format!("sh '{}'", path.display())
}

fn pid_in(line: &str) -> Pid {
    let pid = line.split(' ').find_map(|word| word.strip_prefix("pid=")).unwrap();
    Pid::from_raw(pid.parse().unwrap())
}

/// Returns the position of this text in the log. Panics if the log does not contain the text.
#[track_caller]
fn place(server: &Server, what: &str) -> usize {
    server.log().find(what).unwrap_or_else(|| panic!("no {what:?}"))
}

#[test]
fn a_daemon_runs_alongside_the_workers_is_restarted_and_is_stopped_after_them() {
    let directory = tempfile::tempdir().unwrap();
    let text = "trap 'echo told to stop; exit 0' TERM\n\
        echo \"name=$FORKYARD_NAME slot=${FORKYARD_SLOT-none} shm=$(readlink /proc/self/fd/$FORKYARD_SHM)\"\n\
        while :; do sleep 0.05; done\n";
    let mail = format!("mail={}", script(directory.path(), "mail", text));
    let mut server = crashy(&["--daemon", &mail]);
    let line = server.wait_for("daemon=mail");
    assert!(line.contains("| name=mail slot=none shm=/memfd:"), "{line}");
    let first = pid_in(&line);
    assert!(place(&server, "ready in ") < place(&server, "daemon started name=mail"));

    kill(first, Signal::SIGKILL).unwrap();
    let end = server.wait_for("daemon exited name=mail");
    assert!(end.contains("signal=KILL") && end.contains("WARN"), "{end}");
    let second = pid_in(&server.wait_for("daemon=mail"));
    assert_ne!(first, second);

    server.signal(Signal::SIGHUP);
    server.wait_for("reload done gen=2");
    assert!(server.wait_for("told to stop").contains("daemon=mail"));
    let end = server.wait_for("daemon exited name=mail");
    assert!(pid_in(&end) == second && end.contains("INFO"), "{end}");
    let third = pid_in(&server.wait_for("daemon=mail"));
    assert_ne!(second, third);
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200);

    server.stop();
    assert!(is_gone(third.as_raw()));
    let log = server.log();
    let worker_left = log.rfind("worker exited").unwrap();
    assert!(worker_left < log.rfind("told to stop").unwrap(), "draining workers may need the daemon");
}

#[test]
fn daemons_wait_for_the_first_worker() {
    let directory = tempfile::tempdir().unwrap();
    let go = directory.path().join("refuse");
    std::fs::write(&go, "not yet").unwrap();
    let mut command = Command::new(program("hooks"));
    command.args(FLAGS).args(["--daemon", "idle=sleep 600"]).env("HOOKS_REFUSE", &go);
    let mut server = Server::launch(&mut command);
    server.wait_for("cannot start a worker");
    server.wait_for("cannot start a worker");
    assert!(!server.log().contains("daemon started"));
    std::fs::remove_file(&go).unwrap();
    server.wait_for("daemon started name=idle");
    assert!(place(&server, "hook: on_ready") < place(&server, "daemon started"));
    server.stop();
}

#[test]
fn a_daemon_that_cannot_start_is_retried_with_increasing_delays_and_status_125_ends_the_retries() {
    let mut server =
        crashy(&["--daemon", "broken=sh -c 'echo alas; exit 3'", "--daemon", "done=sh -c 'sleep 1.1; exit 125'"]);
    let failing = "daemon cannot be started, or exits immediately";
    assert!(server.wait_for(failing).ends_with(" name=broken failures=1 next_try=100ms"));
    assert!(server.wait_for(failing).ends_with(" name=broken failures=2 next_try=200ms"));
    assert!(server.wait_for(failing).ends_with(" name=broken failures=3 next_try=400ms"));
    let retired = "daemon exited with status 125, and is not started again before a reload name=done";
    wait_until("the other has ended", || server.log().contains(retired).then_some(()));
    assert_eq!(server.log().matches("daemon started name=done").count(), 1);
    server.signal(Signal::SIGHUP);
    server.wait_for("reload done gen=2");
    let starts = |server: &Server| server.log().matches("daemon started name=done").count();
    wait_until("the daemon is started again", || (starts(&server) == 2).then_some(()));
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200, "the workers are not affected");
    server.stop();
}

#[test]
fn a_program_that_cannot_be_executed_is_logged_with_its_user_directory_and_cause() {
    use std::os::unix::fs::PermissionsExt as _;
    assert!(nix::unistd::geteuid().is_root(), "this test drops privileges: run it as root");
    let directory = tempfile::tempdir().unwrap();
    let set = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    let executable = |path: &str, text: &str, mode| {
        let path = directory.path().join(path);
        std::fs::write(&path, text).unwrap();
        set(&path, mode);
        path.display().to_string()
    };
    std::fs::create_dir(directory.path().join("closed")).unwrap();
    set(directory.path(), 0o711);
    set(&directory.path().join("closed"), 0o700);
    let closed = executable("closed/program", "#!/bin/sh\n", 0o755);
    let roots = executable("roots", "#!/bin/sh\n", 0o700);
    let alien = executable("alien", "#!/no-such-interpreter\n", 0o755);
    let late = executable("late", "#!/bin/sh\nexec sleep 1000\n", 0o755);
    let all = [("closed", &closed), ("roots", &roots), ("alien", &alien), ("late", &late)];
    let daemons = all.map(|(name, path)| format!("{name}={path} x"));
    let job = format!("job=* * * * * *={roots}");
    let user = ["--user", "4711", "--group", "4711", "--chdir", "/usr"];
    let daemons = daemons.iter().flat_map(|daemon| ["--daemon", daemon]);
    let server = crashy(&daemons.chain(["--cron", &job]).chain(user).collect::<Vec<_>>());
    let told = |kind: &str, name: &str, path: &str, cause: &str| {
        let noun = if kind == "cron" { "job" } else { kind };
        let line = server.logged(&format!("cannot start {noun}: cannot execute {path} as user 4711 in /usr: {cause}"));
        assert!(line.ends_with(&format!(" (--{kind}) name={name}")), "{line}");
    };
    let entry = format!("permission denied: the user cannot enter {}", directory.path().join("closed").display());
    told("daemon", "closed", &closed, &entry);
    told("daemon", "roots", &roots, "permission denied: the user cannot execute it");
    told("daemon", "alien", &alien, "its interpreter does not exist");
    told("cron", "job", &roots, "permission denied: the user cannot execute it");
    // A daemon that has been running since startup.
    let line = server.logged("daemon started name=late");
    std::fs::remove_file(&late).unwrap();
    kill(pid_in(&line), Signal::SIGKILL).unwrap();
    told("daemon", "late", &late, "there is no such file");
    drop(server);

    // A program that serves requests.
    let bind = format!("fastcgi:unix:{}", directory.path().join("a.sock").display());
    let mut command = Command::new(program("forkyard"));
    command.args(["run", "--direct", "--bind", &bind, "--workers", "1"]).args(user).args(["--", &roots]);
    let server = Server::launch(&mut command);
    let line = server.logged("cannot start a worker");
    let why = format!(
        "cannot execute {roots} as user 4711 in /usr: permission denied: the user cannot execute it or its interpreter"
    );
    assert!(line.contains(&why), "{line}");
}

#[test]
fn a_daemon_that_does_not_stop_is_killed_with_its_children() {
    let directory = tempfile::tempdir().unwrap();
    let text = "trap '' TERM\nsleep 600 &\necho child=$!\nwhile :; do sleep 0.05; done\n";
    let deaf = format!("deaf={}", script(directory.path(), "deaf", text));
    let mut server = crashy(&["--daemon", &deaf, "--drain-timeout", "300ms"]);
    let line = server.wait_for("| child=");
    let child = Pid::from_raw(line.rsplit('=').next().unwrap().parse().unwrap());
    server.stop();
    assert!(server.log().contains("killed a daemon that did not stop in time (--drain-timeout) name=deaf"));
    assert!(is_gone(pid_in(&line).as_raw()));
    wait_until("the daemon's child is gone", || is_gone(child.as_raw()).then_some(()));
}

#[test]
fn sigint_ends_sidecars_immediately() {
    let directory = tempfile::tempdir().unwrap();
    let deaf =
        format!("deaf={}", script(directory.path(), "deaf", "trap '' TERM\necho up\nwhile :; do sleep 0.05; done\n"));
    let mut server = crashy(&["--daemon", &deaf, "--drain-timeout", "1h"]);
    let pid = pid_in(&server.wait_for("| up"));
    server.signal(Signal::SIGTERM);
    server.wait_for("worker exited");
    server.signal(Signal::SIGINT);
    assert_eq!(server.wait_end(), Some(0));
    assert!(is_gone(pid.as_raw()));
}

#[test]
fn a_job_runs_on_schedule_and_never_twice_at_the_same_time() {
    let directory = tempfile::tempdir().unwrap();
    let (gate, quick) = (directory.path().join("gate"), "quick=* * * * * *=echo 'it is time'");
    let text =
        format!("echo began as $FORKYARD_NAME\nwhile [ ! -e '{}' ]; do sleep 0.05; done\necho done\n", gate.display());
    let slow = format!("slow=* * * * * *={}", script(directory.path(), "slow", &text));
    let mut server = crashy(&["--cron", quick, "--cron", &slow]);
    server.wait_for("cron=slow");
    server.wait_for("job is due but not started, because its previous run continues name=slow");
    server.wait_for("job is due but not started, because its previous run continues name=slow");
    assert_eq!(server.log().matches("began as slow").count(), 1);
    wait_until("the other job has run twice", || (server.log().matches("| it is time").count() >= 2).then_some(()));
    assert!(server.log().contains("job exited name=quick"));
    std::fs::write(&gate, "").unwrap();
    server.wait_for("| done");
    server.wait_for("began as slow");
    server.stop();
    let after = server.log().split("signal to drain and stop").nth(1).unwrap().to_owned();
    assert!(!after.contains("job started"), "{after}");
}

#[test]
fn a_job_that_takes_too_long_is_stopped_and_a_job_running_at_shutdown_is_asked_to_stop() {
    let slow =
        "slow=* * * * * *=sh -c 'trap \"echo interrupted; exit 4\" TERM; echo begun; while :; do sleep 0.05; done'";
    let mut server = crashy(&["--cron", slow, "--cron-timeout", "500ms"]);
    server.wait_for("sent SIGTERM to a job that exceeded its time limit (--cron-timeout) name=slow");
    server.wait_for("| interrupted");
    server.wait_for("job exited name=slow");
    server.stop();

    let mut server = crashy(&["--cron", slow]);
    server.wait_for("| begun");
    server.stop();
    let log = server.log();
    assert!(log.rfind("worker exited").unwrap() < log.rfind("| interrupted").unwrap(), "{log}");
}

#[test]
fn no_sidecar_outlives_a_killed_master() {
    let mut server = crashy(&["--daemon", "idle=sleep 600"]);
    let pid = pid_in(&server.wait_for("daemon started name=idle"));
    let has_what_it_needs = || (descriptors_of(pid.as_raw()) == 4).then_some(());
    wait_until("the daemon has its descriptors and has loaded its libraries", has_what_it_needs);
    server.signal(Signal::SIGKILL);
    assert_eq!(server.wait_end(), None);
    wait_until("the daemon is gone", || is_gone(pid.as_raw()).then_some(()));
}

#[test]
fn sidecars_have_the_privileges_of_the_workers() {
    assert!(nix::unistd::geteuid().is_root(), "this test drops privileges: run it as root");
    let show =
        "show=sh -c 'echo $(id -u) $(id -g) $(umask) $(grep NoNewPrivs /proc/self/status) $GIVEN; exec sleep 600'";
    let flags = ["--user", "65534", "--group", "65534", "--umask", "027", "--no-new-privileges", "--env", "GIVEN=this"];
    let mut server = crashy(&[&["--daemon", show][..], &flags].concat());
    let line = server.wait_for("daemon=show");
    let words = line.split_once("| ").unwrap().1.replace('\t', " ");
    assert_eq!(words, "65534 65534 0027 NoNewPrivs: 1 this", "{line}");
    server.stop();
}

#[test]
fn variables_have_one_line_per_sidecar_and_run_supports_daemons() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(program("forkyard"));
    command.args(["run", "--direct", "--bind", &format!("fastcgi:unix:{}", directory.path().join("a.sock").display())]);
    command.args(["--workers", "1", "--settle", "10ms", "--", "sleep", "600"]);
    command.env("FORKYARD_DAEMON", "one=sh -c 'echo [$FORKYARD_DAEMON]; exec sleep 600'\ntwo=sleep 600\n");
    command.env("FORKYARD_CRON", "tick=* * * * * *=echo tick");
    let mut server = Server::start_command(&mut command);
    server.wait_for("| tick");
    for line in ["daemon started name=one", "daemon started name=two", "| []"] {
        wait_until(line, || server.log().contains(line).then_some(()));
    }
    server.stop();
}

#[test]
fn invalid_sidecars_are_rejected_before_any_file_is_created() {
    let refused = |arguments: &[&str], status: i32, words: &[&str]| {
        let output = Command::new(program("hello")).args(arguments).output_in_time().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        words.iter().for_each(|word| assert!(said.contains(word), "no {word:?} in {said:?}"));
    };
    refused(&["--daemon", "x"], 2, &["'x' is not a daemon", "expected NAME=COMMAND"]);
    refused(&["--cron", "x=* * *=y"], 2, &["'* * *' is not a schedule", "*/5 * * * *"]);
    refused(&["--daemon", "x=y", "--cron", "x=@daily=y"], 2, &["the name 'x' is used twice"]);
    refused(&["--daemon", "x=no-such-program-here"], 1, &["--daemon x", "no program of that name in PATH"]);
}
