//! A reload either applies a setting or reports that it does not. A table of all settings is checked against the programs' own help.
//!
//! A new flag needs a row here. `Seen` defines how a change is observed: in the new processes, or in the settings that the responsible part
//! of the master or of a worker logs at debug level.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::limit::InTime as _;
use common::{Server, program, wait_until};

/// A program that accepts connections from its standard input if that is a socket, declares that it is ready, and answers
/// each connection with the same FastCGI response.
const WAIT_C: &str = r#"
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
static const char answer[] = "\1\6\0\1\0\15\0\0Status: 200\n\n\1\3\0\1\0\10\0\0\0\0\0\0\0\0\0\0";
int main(void) {
    const char *ready = getenv("FORKYARD_READY");
    signal(SIGPIPE, SIG_IGN);
    if (ready && write(atoi(ready), "\n", 1) != 1) return 1;
    for (;;) {
        int c = accept(0, 0, 0);
        if (c < 0) pause();
        else if (write(c, answer, sizeof answer - 1) >= 0) close(c);
        else close(c);
    }
}
"#;

/// How the test observes that a reload has applied a setting.
#[derive(Clone, Copy)]
enum Seen {
    /// The reload does not apply the setting, and lists it in a warning.
    Named,
    /// In the settings that a new worker logs.
    InWorker,
    /// In the settings that this part of the master logs.
    InMaster(&'static str),
    /// In the kernel's information about a new worker or program.
    OfWorker(fn(i32) -> String),
    /// In the kernel's information about a new worker or program, and about a daemon.
    OfProcesses(fn(i32) -> String),
    /// In the environment of a daemon and of a program, as reported by the kernel.
    InEnvironment,
    /// In the log between the beginning and the end of the reload.
    InLog(fn(&str) -> String),
    /// In a file in the directory.
    AtFile(fn(&Path) -> String),
    /// The change cannot be observed, for this reason.
    Never(#[expect(dead_code, reason = "the reason is for readers of the table")] &'static str),
}

use Seen::{AtFile, InEnvironment, InLog, InMaster, InWorker, Named, Never, OfProcesses, OfWorker};

/// A setting, its new value, and how the change is observed. `with` contains other settings, which apply both before and after the change.
struct Row {
    name: &'static str,
    to: &'static str,
    with: &'static [(&'static str, &'static str)],
    seen: Seen,
}

const fn row(name: &'static str, to: &'static str, seen: Seen) -> Row {
    Row { name, to, with: &[], seen }
}

const fn with(name: &'static str, to: &'static str, with: &'static [(&'static str, &'static str)], seen: Seen) -> Row {
    Row { name, to, with, seen }
}

const AS_SOMEBODY: &[(&str, &str)] = &[("user", "4711"), ("group", "4711")];
const SANDBOXED: &[(&str, &str)] = &[("user", "4711"), ("group", "4711"), ("sandbox", "'best-effort'")];

/// In the values, `DIR` stands for the directory.
const TABLE: &[Row] = &[
    // Sockets.
    row("bind", "['fastcgi:unix:DIR/b.sock']", Named),
    row("backlog", "7", Named),
    row("socket-mode", "0o600", Named),
    with("socket-owner", "'4711:4712'", &[], AtFile(|directory| owner(&directory.join("a.sock")))),
    row("allow", "['10.0.0.0/8']", InWorker),
    row("trust", "['10.0.0.0/8']", InWorker),
    row("proxy-protocol", "['10.0.0.0/8']", InWorker),
    with("trust-header", "'forwarded'", &[("trust", "['unix']")], InWorker),
    row("events-socket", "'DIR/events'", Named),
    row("direct", "false", Named),
    // Processes.
    row("workers", "2", InMaster("supervisor")),
    row("max-unavailable", "'50%'", InMaster("supervisor")),
    row("scale-down-after", "'7s'", InMaster("supervisor")),
    row("start-timeout", "'7s'", InMaster("supervisor")),
    row("drain-timeout", "'7s'", InMaster("sidecars")),
    row("respawn-rate", "7", InMaster("supervisor")),
    row("give-up-after", "'7m'", InMaster("supervisor")),
    row("max-memory", "'700M'", InMaster("recycling")),
    row("memory-interval", "'7s'", InMaster("recycling")),
    row("max-age", "'7h~1h'", InMaster("recycling")),
    row("max-requests", "7000", InWorker),
    row("health-path", "'/ok'", InWorker),
    row("max-queue-time", "'7s'", InWorker),
    row("upgrade-timeout", "'7s'", InMaster("master")),
    row("settle", "'70ms'", InMaster("master")),
    row("stop-signal", "'INT'", InMaster("master")),
    row("ready-by", "'descriptor'", InMaster("master")),
    row("ready-path", "'/ready'", InMaster("master")),
    row("threads", "2", InWorker),
    row("pid-file", "'DIR/pid'", Named),
    row("command", "['DIR/wait', 'changed']", OfWorker(command_line)),
    // Gateways.
    row("gateways", "64", Named),
    row("backend", "'http'", Named),
    row("app-concurrency", "7", Named),
    row("retries", "7", InWorker),
    row("queue-timeout", "'7s'", InWorker),
    row("buffer-memory", "'7M'", InWorker),
    row("buffer-files", "'7M'", InWorker),
    row("temp-dir", "'DIR'", InWorker),
    row("root", "'DIR'", InWorker),
    with("index", "'index.php'", &[("root", "'DIR'")], InWorker),
    row("static", "['/=DIR']", InWorker),
    row("sendfile", "['DIR']", InWorker),
    // Memory and limits.
    row("cache", "'2M'", Named),
    row("cache-max-entry", "'64K'", Named),
    row("cache-file", "'DIR/cache'", Named),
    row("events", "'2M'", Named),
    row("events-backlog", "7", InWorker),
    row("max-subscribers", "7", InWorker),
    row("sse", "['/rooms/{room}=room-{room}', '/all=all']", InWorker),
    row("max-body", "'7M'", InWorker),
    row("max-params", "'9K'", InWorker),
    row("max-connections", "7", InWorker),
    row("max-connections-per-address", "7", InWorker),
    row("max-buffered", "'7M'", InWorker),
    row("queue", "7", InWorker),
    row("max-headers", "7", InWorker),
    row("max-uri", "'7K'", InWorker),
    row("max-requests-per-connection", "7", InWorker),
    row("max-multiplexed", "7", InWorker),
    row("idle-timeout", "'7s'", InWorker),
    row("header-timeout", "'7s'", InWorker),
    row("body-timeout", "'7s'", InWorker),
    row("write-timeout", "'7s'", InWorker),
    row("upgraded-timeout", "'7s'", InWorker),
    // Hangs and crashes.
    row("request-timeout", "'7s'", InWorker),
    row("hang-timeout", "'7s'", InMaster("faults")),
    row("slow-request", "'7s'", InWorker),
    row("quarantine", "7", InMaster("faults")),
    row("quarantine-window", "'7s'", InMaster("faults")),
    row("quarantine-time", "'7s'", InMaster("faults")),
    row("quarantine-by", "'path'", InMaster("faults")),
    // Privileges.
    with("user", "4712", &[("group", "4711")], OfProcesses(|pid| status_line(pid, "Uid"))),
    row("group", "4711", OfProcesses(|pid| status_line(pid, "Gid"))),
    row("supplementary-groups", "'4711,4712'", OfProcesses(|pid| status_line(pid, "Groups"))),
    with("capabilities", "'chown'", AS_SOMEBODY, OfProcesses(|pid| status_line(pid, "CapEff"))),
    row("no-new-privileges", "true", OfProcesses(|pid| status_line(pid, "NoNewPrivs"))),
    row("chroot", "'DIR/root'", OfProcesses(|pid| link(pid, "root"))),
    row("chdir", "'DIR'", OfProcesses(|pid| link(pid, "cwd"))),
    row("umask", "0o027", OfProcesses(|pid| status_line(pid, "Umask"))),
    row("rlimit", "['core=7:8']", OfProcesses(limits)),
    row("nice", "7", OfProcesses(nice)),
    row("cpu-affinity", "CPU", OfProcesses(|pid| status_line(pid, "Cpus_allowed_list"))),
    row("env", "['CHANGED=yes']", InEnvironment),
    row("clear-env", "true", InEnvironment),
    with("sandbox", "'best-effort'", AS_SOMEBODY, OfWorker(|pid| status_line(pid, "Seccomp"))),
    with("sandbox-read", "['/usr']", SANDBOXED, InWorker),
    with("sandbox-write", "['/var/tmp']", SANDBOXED, InWorker),
    // Daemons and jobs.
    row("daemon", "['d=DIR/wait changed']", InMaster("sidecars")),
    row("cron", "['c=@yearly=DIR/wait']", InMaster("sidecars")),
    row("cron-timeout", "'7s'", InMaster("sidecars")),
    row("daemon-tries", "7", InMaster("sidecars")),
    // Logging.
    row("log-level", "'debug,forkyard::master=info'", InLog(|log| log.contains("worker spawned").to_string())),
    row("log-file", "'DIR/log'", AtFile(|directory| reloads_in(&directory.join("log")))),
    row("log-format", "'json'", InLog(|log| log.contains("{\"time\"").to_string())),
    row("log-queue", "'7M'", InMaster("log")),
    row("log-rate", "7", InWorker),
    row("output-rate", "'7M'", InMaster("log")),
    row("access-log", "'DIR/access'", InWorker),
    with("access-log-format", "'json'", &[("access-log", "'DIR/access'")], InWorker),
    // Operation.
    row("control", "'DIR/other'", Named),
    row("config", "", Never("a configuration file cannot set its own path")),
];

fn status_line(pid: i32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find(|line| line.starts_with(&format!("{name}:"))).expect("the kernel reports this").to_owned()
}

fn link(pid: i32, name: &str) -> String {
    std::fs::read_link(format!("/proc/{pid}/{name}")).unwrap().display().to_string()
}

fn limits(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap()
}

fn nice(pid: i32) -> String {
    common::field_of::<i32>(&common::proc_of(pid), 19).unwrap().to_string()
}

fn command_line(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap()
}

fn environment(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/environ")).unwrap()
}

fn owner(path: &Path) -> String {
    let metadata = std::fs::metadata(path).unwrap();
    format!("{}:{}", metadata.uid(), metadata.gid())
}

fn reloads_in(path: &Path) -> String {
    std::fs::read_to_string(path).map_or(0, |text| text.matches("reload done").count()).to_string()
}

/// Returns the flags of a command, from its help.
fn flags_of(name: &str, arguments: &[&str]) -> BTreeSet<String> {
    let help = Command::new(program(name)).args(arguments).arg("--help").output_in_time().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    // Flag names have their own column, so no line of a description is mistaken for a flag.
    let names = help.lines().filter_map(|line| {
        let line = line.strip_prefix("      --").or_else(|| line.strip_prefix("  -").and_then(|line| line.get(4..)))?;
        let name = line.trim_start_matches('-').split([' ', '=', '[', '<']).next()?;
        Some(name.to_owned()).filter(|name| name != "help" && name != "version")
    });
    names.collect()
}

/// The processes that serve.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Linked,
    /// `forkyard run --direct`.
    Direct,
    /// `forkyard run`.
    Gateways,
}

impl Mode {
    fn arguments(self) -> &'static [&'static str] {
        if self == Self::Linked { &[] } else { &["run"] }
    }
}

/// A master with a configuration file.
struct Served {
    server: Server,
    directory: tempfile::TempDir,
    name: &'static str,
    mode: Mode,
    /// The pids of the worker and the daemon after the last reload.
    processes: (i32, i32),
    /// The log since the last reload was requested.
    log: String,
}

impl Served {
    fn start(name: &'static str, mode: Mode) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        std::fs::set_permissions(at, PermissionsExt::from_mode(0o755)).unwrap();
        // The program is linked statically, so that it also runs under a different root. Its path is the same there.
        let source = at.join("wait.c");
        std::fs::write(&source, WAIT_C).unwrap();
        let built = Command::new("gcc").args(["-static", "-o"]).arg(at.join("wait")).arg(&source).status_in_time();
        assert!(built.expect("gcc is installed (scripts/test installs it)").success());
        let inside = at.join("root").join(at.strip_prefix("/").unwrap());
        std::fs::create_dir_all(&inside).unwrap();
        std::fs::copy(at.join("wait"), inside.join("wait")).unwrap();

        let file = write_file(at, mode, &[]);
        let mut command = Command::new(program(name));
        command.args(mode.arguments()).arg("--config").arg(file).current_dir("/");
        let server = Server::start_command(&mut command);
        let mut served = Self { server, directory, name, mode, processes: (0, 0), log: String::new() };
        served.reload(&[]);
        served
    }

    /// Writes these settings and the common settings to the file, and reloads. Returns the output of the reload.
    fn reload(&mut self, settings: &[(&str, &str)]) -> String {
        let at = self.directory.path();
        write_file(at, self.mode, settings);
        // The log of an earlier row. The process that still writes to it is about to exit.
        let _ = std::fs::remove_file(at.join("log"));
        let before = self.server.log().len();
        let said = self.ask(&["reload"]);
        let text = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
        assert_eq!(said.status.code(), Some(0), "{settings:?}: {text}");
        let log = at.join("log");
        let all = |server: &Server| {
            let own = server.log().get(before..).unwrap_or_default().to_owned();
            own + &std::fs::read_to_string(&log).unwrap_or_default()
        };
        // The daemon is the last process to be replaced.
        let server = &self.server;
        self.log = wait_until("the daemon is replaced", || {
            let text = all(server);
            let begun = text.rsplit_once("reload started").unwrap_or_default().1;
            begun.contains("daemon started").then(|| text.clone())
        });
        let daemon = self.log.lines().rfind(|line| line.contains("daemon started")).unwrap();
        let daemon = number_behind(daemon, "pid");
        let expected =
            settings.iter().find(|(name, _)| *name == "workers").map_or(1, |(_, count)| count.parse().unwrap());
        let worker = wait_until("the workers are replaced, and the daemon is running", || {
            let children = server.children();
            let workers: Vec<i32> = children.into_iter().filter(|&pid| pid != daemon).collect();
            let settled = workers.iter().all(|&pid| !common::is_gone(pid)) && workers.len() == expected;
            settled.then(|| workers.first().copied()).flatten()
        });
        self.processes = (worker, daemon);
        text
    }

    /// Whether the settings are rejected without gateways.
    fn requires_gateways(&self, settings: &[(&str, &str)]) -> bool {
        let file = write_file(self.directory.path(), self.mode, settings);
        let checked = Command::new(program(self.name)).args(["check", "--config"]).arg(file).output_in_time().unwrap();
        [checked.stdout, checked.stderr]
            .iter()
            .any(|text| String::from_utf8_lossy(text).contains("is not available here"))
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let socket = self.directory.path().join("control");
        Command::new(program(self.name)).args(arguments).env("FORKYARD_CONTROL", socket).output_in_time().unwrap()
    }

    /// Returns the observable state of a setting.
    fn look(&self, seen: Seen) -> String {
        let (worker, daemon) = self.processes;
        match seen {
            Named | Never(_) => String::new(),
            InWorker => self.settings("worker"),
            InMaster(part) => self.settings(part),
            OfWorker(look) => look(worker),
            OfProcesses(look) => format!("{} {}", look(worker), look(daemon)),
            InEnvironment if self.mode != Mode::Linked => format!("{} {}", environment(worker), environment(daemon)),
            InEnvironment => environment(daemon),
            InLog(look) => look(&self.log),
            AtFile(look) => look(self.directory.path()),
        }
    }

    /// Returns the settings that this part of the server logged last.
    fn settings(&self, part: &str) -> String {
        let line = self.log.lines().rfind(|line| line.contains(&format!("settings part={part}")));
        let line = line.unwrap_or_else(|| panic!("{part} logs no settings in\n{}", self.log));
        // A worker's line begins with values that differ between workers, so only the part from `config=` on is compared.
        line.split_once(r#" config="Config {"#).or_else(|| line.split_once("part=")).unwrap().1.to_owned()
    }
}

fn number_behind(line: &str, key: &str) -> i32 {
    let text = line.replace('"', "");
    let at = text.rfind(&format!("{key}=")).or_else(|| text.rfind(&format!("{key}:"))).unwrap();
    let digits: String = text[at + key.len() + 1..].chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

fn write_file(directory: &Path, mode: Mode, settings: &[(&str, &str)]) -> PathBuf {
    let mut all = vec![
        ("bind", if mode != Mode::Linked { "['fastcgi:unix:DIR/a.sock']" } else { "['http:unix:DIR/a.sock']" }),
        ("workers", "1"),
        ("control", "'DIR/control'"),
        ("log-level", "'debug'"),
        ("daemon", "['d=DIR/wait']"),
        ("cache", "'1M'"),
        ("events", "'1M'"),
    ];
    if mode == Mode::Gateways {
        all.push(("gateways", "1"));
    }
    if mode != Mode::Linked {
        all.push(("command", "['DIR/wait']"));
        all.push(("settle", "'20ms'"));
    }
    if mode == Mode::Direct {
        all.push(("direct", "true"));
    }
    all.retain(|(name, _)| settings.iter().all(|(other, _)| other != name));
    let mut text = String::new();
    for (name, value) in all.iter().chain(settings) {
        let value =
            value.replace("DIR", &directory.display().to_string()).replace("CPU", &format!("'{}'", last_processor()));
        writeln!(text, "{name} = {value}").unwrap();
    }
    let path = directory.join("forkyard.toml");
    std::fs::write(&path, text).unwrap();
    path
}

fn last_processor() -> String {
    let all = status_line(std::process::id().cast_signed(), "Cpus_allowed_list");
    let all = all.split_ascii_whitespace().last().unwrap().to_owned();
    assert!(all.contains(['-', ',']), "this test needs two processors, and has {all}");
    all.rsplit(['-', ',']).next().unwrap().to_owned()
}

/// Checks all settings of this mode. A setting that requires gateways is checked with gateways, and every other setting of
/// `forkyard run` with `--direct`.
fn each_setting_is_taken_over_or_named(name: &'static str, mode: Mode) {
    let mut flags = flags_of(name, mode.arguments());
    flags.extend((mode != Mode::Linked).then(|| "command".to_owned()));
    let missing: Vec<&String> = flags.iter().filter(|flag| TABLE.iter().all(|row| row.name != **flag)).collect();
    assert!(
        missing.is_empty(),
        "these flags have no row in this file, which defines how a reload applies them: {missing:?}"
    );

    let mut served = Served::start(name, mode);
    let mut wrong = Vec::new();
    for Row { name, to, with, seen } in TABLE.iter().filter(|row| flags.contains(row.name)) {
        if let Never(_) = seen {
            continue;
        }
        let settings = [with, &[(*name, *to)][..]].concat();
        if mode != Mode::Linked {
            let of_direct = Served { mode: Mode::Direct, ..served };
            let requires_gateways = *name == "gateways" || of_direct.requires_gateways(&settings);
            served = Served { mode, ..of_direct };
            // The master applies --max-requests to each app process, and logs it nowhere.
            let is_unseen = *name == "max-requests";
            if is_unseen || requires_gateways != (mode == Mode::Gateways) {
                continue;
            }
        }
        served.reload(with);
        let before = served.look(*seen);
        let said = served.reload(&settings);
        let is_named = said.lines().any(|line| {
            let named = line.strip_prefix("these settings take effect only after a restart: ").unwrap_or_default();
            named.split(", ").any(|flag| flag == format!("--{name}"))
        });
        let after = served.look(*seen);
        match seen {
            Named if !is_named => wrong.push(format!("--{name} is not named: {said}")),
            Named => {}
            _ if is_named => wrong.push(format!("--{name} is named: {said}")),
            _ if before == after => wrong.push(format!("--{name} is not taken over: {after}")),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    served.server.stop();
}

#[test]
fn a_reload_applies_or_reports_each_setting_of_a_linked_application() {
    each_setting_is_taken_over_or_named("crashy", Mode::Linked);
}

#[test]
fn a_reload_applies_or_reports_each_setting_of_run() {
    each_setting_is_taken_over_or_named("forkyard", Mode::Direct);
}

#[test]
fn a_reload_applies_or_reports_each_setting_of_gateways() {
    each_setting_is_taken_over_or_named("forkyard", Mode::Gateways);
}

#[test]
fn every_row_describes_an_existing_flag() {
    let mut flags = flags_of("crashy", &[]);
    flags.extend(flags_of("forkyard", &["run"]));
    flags.insert("command".to_owned());
    let rows: Vec<&str> = TABLE.iter().map(|row| row.name).filter(|name| !flags.contains(*name)).collect();
    assert!(rows.is_empty(), "{rows:?}");
}
