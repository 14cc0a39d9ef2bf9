//! Runs the sidecars (daemons and jobs): carries out the decisions of [`supervisor`](self::supervisor), and logs the sidecars' output.
//!
//! Sidecars are programs, started like those of `forkyard run`: in their own process groups, with the privileges of the workers. If the
//! master dies, the kernel kills them, and the guard kills the processes that they have started.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use forkyard_shm::Segment;
use jiff::Timestamp;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getpgid, pipe2};

use self::supervisor::{STEADY_TIME, SidecarAction, SidecarEvent, SidecarNotice, SidecarSupervisor};
use super::background_daemons::Inherited;
use super::output::{self, LineFilter, LineReader, MAX_REST, Writer};
use super::pool::spawn::{OF_THE_MASTER, blocking, explain, to_pass};
use super::pool::supervisor::{Command as Order, Uptime};
use crate::config::privileges::PrivilegesConfig;
use crate::config::sidecars::SidecarsConfig;
use crate::config::{Config, Program, in_ms};
use crate::net::publish_socket;
use crate::privileges::{self, Privileges};
use crate::sys::{self, Ending};

/// All sidecars, and the settings with which they are started.
pub(super) struct Sidecars {
    sidecars: SidecarSupervisor,
    /// The sidecars, in the order of the configuration.
    programs: Vec<Sidecar>,
    processes: HashMap<Pid, Process>,
    inherited: Inherited,
    /// `None` if no sidecar is configured.
    privileges: Option<Privileges>,
    segment: Segment,
    /// The path by which programs reach the publish socket.
    events: Option<PathBuf>,
    /// Settings that a reload has read. They are applied when the reload is done.
    read: Option<Settings>,
    begun: Instant,
}

/// The resolved and checked settings of a new configuration.
pub(super) struct Settings {
    programs: Vec<Sidecar>,
    privileges: Option<Privileges>,
    config: SidecarsConfig,
    stop_timeout: Duration,
    /// The path by which programs reach the publish socket.
    pub(super) events: Option<PathBuf>,
}

/// A sidecar in the configuration.
#[derive(Debug)]
struct Sidecar {
    label: Label,
    program: Program,
}

/// Identifies a sidecar in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Label {
    /// The flag that configures the sidecar, without dashes.
    kind: &'static str,
    name: String,
}

impl Label {
    fn is_daemon(&self) -> bool {
        self.kind == "daemon"
    }

    /// Returns the word for such a sidecar in the log.
    fn noun(&self) -> &'static str {
        if self.is_daemon() { "daemon" } else { "job" }
    }

    fn writer(&self, pid: Pid) -> Writer<'_> {
        if self.is_daemon() { Writer::daemon(&self.name, pid) } else { Writer::job(&self.name, pid) }
    }
}

/// A running sidecar process.
struct Process {
    sidecar: usize,
    label: Label,
    since: Instant,
    asked_to_leave: bool,
    output: LineReader,
    filter: LineFilter,
    open: bool,
}

/// A running process, for the next master during an upgrade.
pub(super) struct Living<'a> {
    pub(super) name: &'a str,
    pub(super) pid: Pid,
    /// The read end of the process's output pipe. It must stay open, because otherwise the next write would terminate
    /// the process.
    pub(super) output: BorrowedFd<'a>,
    /// The unfinished line of the output.
    pub(super) partial: &'a [u8],
    /// Time since the process started.
    pub(super) age: Duration,
    /// Time left for the process to stop, if it has been asked to.
    pub(super) stop_left: Option<Duration>,
}

/// Finds the programs, and resolves their privileges.
///
/// # Errors
/// Returns a message for the operator, with the flag, if a program is missing or cannot have the configured privileges.
fn resolve(config: &Config) -> Result<(Vec<Sidecar>, Option<Privileges>), String> {
    let PrivilegesConfig { chroot, chdir, .. } = &config.privileges;
    let sidecars = config.sidecars.sidecars.iter().map(|sidecar| {
        let label = Label { kind: sidecar.kind(), name: sidecar.name.clone() };
        Ok(Sidecar { label, program: sidecar.program(chroot.as_deref(), chdir.as_deref())? })
    });
    let sidecars: Vec<Sidecar> = sidecars.collect::<Result<_, String>>()?;
    let privileges = (!sidecars.is_empty()).then(|| Privileges::resolve(&config.privileges, true)).transpose()?;
    Ok((sidecars, privileges))
}

/// Checks whether all sidecars can be started.
///
/// # Errors
/// Returns a message for the operator, with the flag, if a program is missing or cannot have the configured privileges.
pub(crate) fn check_sidecars(config: &Config) -> Result<(), String> {
    resolve(config)?;
    warn_of_sandbox(config);
    Ok(())
}

fn warn_of_sandbox(config: &Config) {
    if config.privileges.sandbox.is_some() && !config.sidecars.sidecars.is_empty() {
        log::warn!("the sandbox applies to workers only, not to daemons and jobs (--sandbox, --daemon, --cron)");
    }
}

impl Sidecars {
    /// # Errors
    /// Fails if a program is missing, or if it cannot have the configured privileges.
    pub(super) fn new(config: &Config, segment: Segment, begun: Instant) -> io::Result<Self> {
        let (programs, privileges) = resolve(config).map_err(io::Error::other)?;
        let sidecars = SidecarSupervisor::new(&config.sidecars, config.drain_timeout, Timestamp::now());
        let (processes, inherited) = (HashMap::new(), Inherited::default());
        Ok(Self { sidecars, programs, processes, inherited, privileges, segment, events: None, read: None, begun })
    }

    /// Sets the path by which programs reach the publish socket.
    pub(super) fn announce_publish_socket(&mut self, events: Option<PathBuf>) {
        self.events = events;
    }

    /// Resolves and checks the settings of a new configuration.
    ///
    /// # Errors
    /// Returns a message for the operator if a program is missing or cannot have the configured privileges.
    pub(super) fn prepare(config: &Config, events: Option<PathBuf>) -> Result<Settings, String> {
        let (programs, privileges) = resolve(config)?;
        warn_of_sandbox(config);
        Ok(Settings {
            programs,
            privileges,
            config: config.sidecars.clone(),
            stop_timeout: config.drain_timeout,
            events,
        })
    }

    /// Stores the settings of a reload that begins. The old settings stay in use until the reload is done.
    pub(super) fn expect(&mut self, settings: Settings) {
        self.read = Some(settings);
    }

    /// Drops the settings of a reload that has failed.
    pub(super) fn forget(&mut self) {
        self.read = None;
    }

    fn change(&mut self, settings: Settings) {
        let Settings { programs, privileges, config, stop_timeout, events } = settings;
        // A sidecar that has been removed from the configuration may be added again before its process has exited.
        let leaving = |label: &Label| {
            self.processes.values().find(|process| process.label == *label).map(|process| process.sidecar)
        };
        let present = |label: &Label| self.programs.iter().position(|sidecar| sidecar.label == *label);
        let former: Vec<Option<usize>> =
            programs.iter().map(|sidecar| present(&sidecar.label).or_else(|| leaving(&sidecar.label))).collect();
        let now_at = self.sidecars.reconfigure(&config, stop_timeout, &former, Timestamp::now());
        for process in self.processes.values_mut() {
            // A sidecar with a process is never dropped.
            process.sidecar = now_at.get(process.sidecar).copied().flatten().unwrap_or(process.sidecar);
        }
        (self.programs, self.privileges, self.events) = (programs, privileges, events);
    }

    /// Returns the programs and time limits, for the log.
    pub(super) fn describe(&self) -> String {
        format!("{} {:?}", self.sidecars.describe(), self.programs)
    }

    /// Sets the shared memory for future processes.
    pub(super) fn move_to(&mut self, segment: Segment) {
        self.segment = segment;
    }

    fn now(&self) -> Uptime {
        self.begun.elapsed()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sidecars.is_empty()
    }

    /// Whether any sidecar is configured or still running.
    pub(super) fn has_any(&self) -> bool {
        let read = self.read.as_ref().is_some_and(|settings| !settings.programs.is_empty());
        read || !self.programs.is_empty() || !self.processes.is_empty()
    }

    pub(super) fn has(&self, pid: Pid) -> bool {
        self.processes.contains_key(&pid)
    }

    pub(super) fn next_deadline(&self) -> Option<Uptime> {
        let limits = self.processes.values().filter_map(|process| process.filter.due());
        limits.chain(self.sidecars.next_deadline()).min()
    }

    /// Returns the descriptors to watch for output.
    pub(super) fn watched(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.processes.values().filter(|process| process.open).map(|process| process.output.as_fd())
    }

    pub(super) fn living<'a>(&'a self) -> Vec<Living<'a>> {
        let living = |(&pid, process): (&Pid, &'a Process)| {
            let Process { label, output, since, .. } = process;
            let (age, stop_left) = (since.elapsed(), self.sidecars.stop_left(pid));
            Living { name: &label.name, pid, output: output.as_fd(), partial: output.partial(), age, stop_left }
        };
        self.processes.iter().map(living).collect()
    }

    /// Returns the time of the last check for due jobs, in Unix milliseconds, for the next master during an upgrade.
    pub(super) fn looked_at_ms(&self) -> Option<i64> {
        self.sidecars.looked_at().map(Timestamp::as_millisecond)
    }

    /// Continues from the time at which a former master last checked for due jobs.
    pub(super) fn resume(&mut self, looked_at_ms: i64) {
        if let Ok(looked_at) = Timestamp::from_millisecond(looked_at_ms) {
            self.sidecars.resume(looked_at);
        }
    }

    /// Takes over a child that a former master started. If no sidecar with that name is configured, the child is asked
    /// to stop. `age` is how long the child has run. If the child has already been asked to stop, `stop_left` is the
    /// time that it has left.
    pub(super) fn adopt(
        &mut self,
        name: &str,
        pid: Pid,
        output: LineReader,
        age: Duration,
        stop_left: Option<Duration>,
    ) {
        let wanted = self.programs.iter().position(|sidecar| sidecar.label.name == name);
        let label =
            wanted.map_or(Label { kind: "daemon", name: name.to_owned() }, |at| self.programs[at].label.clone());
        let sidecar = self.sidecars.adopt(wanted, pid, age, stop_left, self.now());
        self.enter(pid, sidecar, label, output);
        if let Some(process) = self.processes.get_mut(&pid) {
            process.since = process.since.checked_sub(age).unwrap_or(process.since);
            process.asked_to_leave = stop_left.is_some();
        }
    }

    fn enter(&mut self, pid: Pid, sidecar: usize, label: Label, output: LineReader) {
        let (since, filter) = (Instant::now(), LineFilter::new());
        let process = Process { sidecar, label, since, asked_to_leave: false, output, filter, open: true };
        self.processes.insert(pid, process);
    }

    /// Logs output, and carries out the actions that are due. `is_up` is true if workers exist.
    pub(super) fn turn(&mut self, is_up: bool) {
        let share = output::share(self.processes.len());
        let now = self.now();
        for (pid, process) in self.processes.iter_mut().filter(|(_, process)| process.open) {
            process.read(*pid, share, now);
        }
        self.feed(if is_up { SidecarEvent::Begin } else { SidecarEvent::Tick });
    }

    /// Applies a command from the operator.
    pub(super) fn apply(&mut self, order: Order) {
        match order {
            Order::Drain => self.feed(SidecarEvent::Closing),
            Order::Halt => self.feed(SidecarEvent::Halt),
            Order::Reload | Order::Add | Order::Remove | Order::Scale(_) | Order::Upgrade => {}
        }
    }

    /// Handles the end of a reload: applies the new settings, and restarts each daemon.
    pub(super) fn reloaded(&mut self) {
        self.inherited.end_detached();
        if let Some(settings) = self.read.take() {
            self.change(settings);
        }
        self.feed(SidecarEvent::Reloaded);
    }

    /// Stops all sidecars, because the last worker has exited.
    pub(super) fn stop(&mut self) {
        self.feed(SidecarEvent::Stop);
    }

    /// Handles the exit of a daemon or job.
    pub(super) fn ended(&mut self, pid: Pid, ending: Ending) {
        let Some(mut process) = self.processes.remove(&pid) else { return };
        process.read(pid, MAX_REST, self.now());
        process.end_output(pid, self.now());
        let Process { sidecar, label, since, asked_to_leave, .. } = process;
        let is_expected = asked_to_leave || ending == Ending::Exited(0);
        log::log!(
            if is_expected { log::Level::Info } else { log::Level::Warn },
            name = label.name, pid = pid.as_raw(), status = ending.exit_status(), signal = ending.signal_name(),
            lived = in_ms(since.elapsed());
            "{} exited", label.noun()
        );
        if ending == Ending::Exited(0) && !asked_to_leave {
            self.inherited.suspect(sidecar, since.elapsed());
        }
        self.feed(SidecarEvent::Exited { pid, after_exit: super::pool::after_exit(ending, true, false) });
    }

    /// Whether the remaining processes in this process's group must not be killed. A daemon that has exited early with
    /// 0 may be putting itself into the background, and its background process may not have left the group yet.
    pub(super) fn spares(&self, pid: Pid, ending: Ending) -> bool {
        self.processes.get(&pid).is_some_and(|process| {
            let is_early = process.since.elapsed() < STEADY_TIME && !process.asked_to_leave;
            process.label.is_daemon() && is_early && ending == Ending::Exited(0)
        })
    }

    /// Whether a sidecar has recently exited in a way that suggests that it continues in the background.
    pub(super) fn has_suspects(&self) -> bool {
        self.inherited.has_suspects()
    }

    /// Examines `orphans`, the children that this process did not start. Sidecars may have left some of these children behind.
    pub(super) fn inherit(&mut self, orphans: &[Pid]) {
        let names: Vec<&str> = self.programs.iter().map(|sidecar| sidecar.label.name.as_str()).collect();
        for (sidecar, pid) in self.inherited.take(orphans, &names) {
            if let Ok(group) = getpgid(Some(pid)) {
                sys::announce(group);
            }
            sys::announce_process(pid); // the process may still create another group
            self.feed(SidecarEvent::Detached { sidecar, pid });
        }
    }

    /// Whether this process was left behind by a sidecar.
    pub(super) fn has_left(&self, pid: Pid) -> bool {
        self.inherited.has(pid)
    }

    /// Passes an event to the supervisor and carries out the resulting actions, until none are left.
    fn feed(&mut self, event: SidecarEvent) {
        let mut actions = VecDeque::from(self.sidecars.step(event, self.now(), Timestamp::now()));
        while let Some(action) = actions.pop_front() {
            let answer = match action {
                SidecarAction::Spawn { sidecar } => self.spawn(sidecar),
                SidecarAction::Terminate { pid } => {
                    self.signal(pid, Signal::SIGTERM);
                    continue;
                }
                SidecarAction::Kill { pid } => {
                    self.signal(pid, Signal::SIGKILL);
                    continue;
                }
                SidecarAction::Notice { sidecar, notice } => {
                    self.log(sidecar, notice);
                    continue;
                }
            };
            actions.extend(self.sidecars.step(answer, self.now(), Timestamp::now()));
        }
    }

    fn spawn(&mut self, sidecar: usize) -> SidecarEvent {
        let Sidecar { label, program } = &self.programs[sidecar];
        match self.start(label, program) {
            Ok((pid, output)) => {
                log::info!(name = label.name, pid = pid.as_raw(); "{} started", label.noun());
                self.enter(pid, sidecar, label.clone(), LineReader::new(output));
                SidecarEvent::Spawned { sidecar, pid }
            }
            Err(error) => {
                let (Label { kind, name }, noun, error) = (label, label.noun(), sys::explain(&error));
                log::error!(name; "cannot start {noun}: {error} (--{kind})");
                SidecarEvent::SpawnFailed { sidecar }
            }
        }
    }

    fn start(&self, label: &Label, program: &Program) -> io::Result<(Pid, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // O_NONBLOCK is set for each end separately, and the program's end must block.
        let write = blocking(write)?;
        let segment = to_pass(&self.segment)?;
        let mut command = Command::new(&program.path);
        let privileges = self.privileges.as_ref().ok_or_else(|| io::Error::other("no privileges were resolved"))?;
        privileges.set_environment(&mut command);
        // If the program is itself a forkyard server, it must not start the same sidecars again.
        for ours in ["FORKYARD_SLOT", "FORKYARD_GENERATION", "FORKYARD_DAEMON", "FORKYARD_CRON"] {
            command.env_remove(ours);
        }
        for name in OF_THE_MASTER.iter().copied().flatten() {
            command.env_remove(name);
        }
        command
            .arg0(&program.name)
            .args(&program.arguments)
            .env("FORKYARD_NAME", &label.name)
            .env("FORKYARD_SHM", segment.as_raw_fd().to_string())
            .envs(self.events.iter().map(|socket| (publish_socket::VARIABLE, socket)))
            .stdin(Stdio::null())
            .stdout(Stdio::from(write.try_clone()?))
            .stderr(Stdio::from(write));
        let steps = privileges.steps_without_slot().map_err(io::Error::other)?;
        let prepare = move || privileges::carry_out_before_exec(&steps);
        let child = sys::spawn(&mut command, &[segment.as_raw_fd()], prepare)
            .map_err(|error| explain(&error, read.as_fd(), privileges, program))?;
        Ok((Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?), read))
    }

    fn signal(&mut self, pid: Pid, signal: Signal) {
        let Some(process) = self.processes.get_mut(&pid) else { return };
        process.asked_to_leave = true;
        // The pid cannot belong to another process, because the child has not been reaped yet.
        if let Err(errno) = killpg(pid, signal) {
            let noun = process.label.noun();
            log::error!(name = process.label.name, pid = pid.as_raw(), signal:%; "cannot signal {noun}: {errno}");
        }
    }

    fn log(&self, sidecar: usize, notice: SidecarNotice) {
        let of_process =
            || self.processes.values().find(|process| process.sidecar == sidecar).map(|process| &process.label);
        let Some(label) = self.programs.get(sidecar).map(|sidecar| &sidecar.label).or_else(of_process) else {
            return;
        };
        let (name, noun) = (&label.name, label.noun());
        match notice {
            SidecarNotice::Failing { failures, delay } => log::error!(
                name, failures, next_try = in_ms(delay);
                "{noun} cannot be started, or exits immediately (see the lines above for the cause)"
            ),
            SidecarNotice::Retired => log::warn!(
                name;
                "{noun} exited with status 125, and is not started again before a reload"
            ),
            SidecarNotice::GivenUp { tries } => log::error!(
                name, tries;
                "{noun} exits immediately with status 0, and is not started again before a reload (run it in the \
                 foreground if it puts itself into the background, or raise --daemon-tries)"
            ),
            SidecarNotice::Detached { pid } => log::error!(
                name, pid = pid.as_raw();
                "{noun} has put itself into the background, and is not started again before a reload (run it in the \
                 foreground: most daemons have an option for this, such as --no-daemonize or --foreground)"
            ),
            SidecarNotice::Skipped { pid } => log::warn!(
                name, pid = pid.as_raw();
                "{noun} is due but not started, because its previous run continues"
            ),
            SidecarNotice::RunTimeout { pid } => log::warn!(
                name, pid = pid.as_raw();
                "sent SIGTERM to a {noun} that exceeded its time limit (--cron-timeout)"
            ),
            SidecarNotice::StopTimeout { pid } => log::warn!(
                name, pid = pid.as_raw();
                "killed a {noun} that did not stop in time (--drain-timeout)"
            ),
        }
    }
}

impl Process {
    /// Logs up to `most` bytes of output.
    fn read(&mut self, pid: Pid, most: usize, now: Uptime) {
        let Self { label, output, filter, .. } = self;
        let writer = label.writer(pid);
        self.open = output.read(most, &mut |line, is_whole| filter.log(writer, line, is_whole, now));
        if self.open {
            filter.tick(writer, now);
        } else {
            self.end_output(pid, now);
        }
    }

    /// Logs the remaining output, even if its last line has no line feed.
    fn end_output(&mut self, pid: Pid, now: Uptime) {
        let Self { label, output, filter, .. } = self;
        let writer = label.writer(pid);
        output.finish(&mut |line, is_whole| filter.log(writer, line, is_whole, now));
        filter.end(writer);
    }
}

#[cfg(test)]
mod tests {
    use forkyard_shm::Plan;

    use super::*;

    /// Returns the sidecars that these flags configure.
    fn sidecars(flags: &[&str]) -> Sidecars {
        let arguments: Vec<std::ffi::OsString> = [&["x"], flags].concat().into_iter().map(Into::into).collect();
        let crate::cli::Invocation::Serve(request) =
            crate::cli::parse_linked(&arguments, &crate::cli::AppInfo::default()).unwrap()
        else {
            panic!("it serves")
        };
        let config = request.config;
        let segment = Segment::create(&Plan { rows: 1, ..Plan::default() }).unwrap();
        Sidecars::new(&config, segment, Instant::now()).unwrap()
    }

    fn end(sidecars: &mut Sidecars, pid: Pid) {
        killpg(pid, Signal::SIGKILL).unwrap();
        loop {
            if let Some(ending) = sys::reap(pid) {
                assert!(sidecars.has(pid), "{pid} is a sidecar");
                sidecars.ended(pid, ending);
                return;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }

    #[test]
    fn running_sidecars_can_be_passed_to_the_next_master() {
        let mut first = sidecars(&["--daemon", "kept=sleep 600", "--daemon", "dropped=sleep 600"]);
        first.turn(true);
        let living = first.living();
        let given: Vec<_> =
            living.iter().map(|one| (one.name.to_owned(), one.pid, one.output.try_clone_to_owned().unwrap())).collect();
        assert_eq!(given.len(), 2);

        let mut second = sidecars(&["--daemon", "kept=sleep 600"]);
        let mut pids = HashMap::new();
        for (name, pid, output) in given {
            second.adopt(&name, pid, LineReader::resume(output, b"half a line".to_vec()), Duration::ZERO, None);
            pids.insert(name, pid);
        }
        second.turn(true);
        assert_eq!(second.living().len(), 2, "no second process is started");
        assert!(second.living().iter().all(|one| one.partial == b"half a line"), "no line is split");
        assert!(second.processes[&pids["dropped"]].asked_to_leave && !second.processes[&pids["kept"]].asked_to_leave);
        end(&mut second, pids["dropped"]);
        end(&mut second, pids["kept"]);
        assert!(second.is_empty(), "the next process is started a little later");
        while second.is_empty() {
            second.turn(true);
        }
        let (name, pid) = second.living().first().map(|one| (one.name.to_owned(), one.pid)).unwrap();
        assert_eq!(name, "kept");
        second.stop();
        end(&mut second, pid);
        assert!(second.is_empty());
    }
}

pub(crate) mod supervisor;
