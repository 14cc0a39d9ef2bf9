//! Implements the guard: a process that outlives a killed master and then kills the remaining processes of its
//! programs, daemons and jobs.
//!
//! ```text
//! a program, between fork and exec ── its pid ──▶ the link, a pair of sockets ──▶ the guard
//! the master, when the last process of a group is reaped ── the negative group number ──▶ the link
//! the end of the link: the master is dead ──▶ the guard kills the remaining process groups, and exits
//! ```
//!
//! When the master is killed, the kernel kills the programs that the master has started (PR_SET_PDEATHSIG), but not the
//! processes that those programs have started: with `sh -c 'php-cgi; true'` the shell dies, and php-cgi continues to
//! serve. The messages stay in the link until they are read, so the guard receives the pid of every program that ran,
//! whenever the master dies.
//!
//! The guard kills whole process groups, and only groups that certainly belong to the server. A group keeps its number
//! as long as one of its processes exists; afterwards the number may be reused. The guard therefore forgets a group
//! when the master reports that it has reaped the group's last process. This message precedes any message about the
//! next group with the same number. If a different process reaped the group's last process, no message is sent. The
//! guard therefore also checks that a group is in the same session as before, and that the group's leader, if it still
//! exists, is the announced process.
//!
//! A daemon that puts itself into the background is announced as a single process, because it may create its group only
//! after the master has found it. The guard kills this process, and the group that it leads, if any.
//!
//! When the master stops on its own, it kills the guard after all other processes have ended. A guard that dies is replaced, and a guard
//! that is stopped is continued. A new guard starts with the groups that exist then. After an upgrade, the new build starts its own guard
//! before it kills the guard of the old build; the link stays open through the exec.
//!
//! The guard must not wait for anything but the link, and must not run application code.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getpgrp, getpid, getppid, getsid, setpgid};

use super::Master;
use super::pool::spawn::Spawner;
use super::pool::supervisor::{Breaker, Uptime};
use super::procfs;
use crate::config::in_ms;
use crate::logging;
use crate::sys::{self, Ending};
use crate::upgrade::saved_state::SavedGuard;

/// If a guard dies after it has run for this long, the delay before the next guard is the shortest one, because the
/// cause of the death is not expected to affect the next guard.
const STEADY_TIME: Duration = Duration::from_secs(1);
/// How long the guard waits to be reparented: the kernel closes a dying process's descriptors before it reparents its children.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// Maximum number of processes that are named in the log.
const NAMED: usize = 16;
/// The consequence of running without a guard, for the log.
const UNGUARDED: &str = "without a guard, processes started by programs would outlive a killed master";

/// The current guard, and the guards that it has replaced.
#[derive(Debug, Default)]
pub(super) struct Guard {
    process: Option<Process>,
    /// Guards that the master has killed but not yet reaped.
    replaced: BTreeSet<Pid>,
    breaker: Breaker,
    wanted: bool,
}

#[derive(Debug)]
struct Process {
    pid: Pid,
    since: Instant,
    link: OwnedFd,
}

impl Guard {
    pub(super) fn has(&self, pid: Pid) -> bool {
        self.replaced.contains(&pid) || self.process.as_ref().is_some_and(|process| process.pid == pid)
    }

    pub(super) fn next_deadline(&self) -> Option<Uptime> {
        (self.wanted && self.process.is_none()).then(|| self.breaker.open_until())
    }

    pub(super) fn save(&self) -> Option<SavedGuard> {
        let Process { pid, link, .. } = self.process.as_ref()?;
        Some(SavedGuard { pid: pid.as_raw(), link: link.as_raw_fd() })
    }

    /// Takes over the guard of a former master, until the new one is started.
    pub(super) fn adopt(&mut self, pid: Pid, link: OwnedFd) {
        self.put(Some(Process { pid, since: Instant::now(), link }));
    }

    /// Sends SIGCONT to the guard if another process has stopped it.
    pub(super) fn look(&self) {
        let Some(Process { pid, .. }) = self.process else { return };
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG;
        if let Ok(WaitStatus::Stopped(..)) = waitid(Id::Pid(pid), flags) {
            log::warn!(pid = pid.as_raw(); "continued the guard, which another process had stopped");
            let _ = kill(pid, Signal::SIGCONT); // it may just have exited
        }
    }

    /// Records the death of a guard.
    pub(super) fn ended(&mut self, pid: Pid, ending: Ending, now: Uptime) {
        if self.replaced.remove(&pid) {
            return;
        }
        let Some(Process { since, .. }) = self.process.take_if(|process| process.pid == pid) else { return };
        sys::announce_by(None);
        if since.elapsed() >= STEADY_TIME {
            self.breaker.close();
        }
        if let Some((_, delay)) = self.breaker.fail(now) {
            log::error!(
                pid = pid.as_raw(), status = ending.exit_status(), signal = ending.signal_name(),
                lived = in_ms(since.elapsed()),
                next_try = in_ms(delay);
                "guard exited: {UNGUARDED}"
            );
        }
    }

    fn start_failed(&mut self, now: Uptime, error: &io::Error) {
        if let Some((_, delay)) = self.breaker.fail(now) {
            let error = sys::explain(error);
            log::error!(
                next_try = in_ms(delay);
                "cannot start the guard: {error}; {UNGUARDED}"
            );
        }
    }

    /// Kills the guard, because the master is exiting and all other processes have ended.
    pub(super) fn stop(&mut self) {
        self.wanted = false;
        self.put(None);
    }

    /// Replaces the current guard.
    fn put(&mut self, process: Option<Process>) {
        sys::announce_by(process.as_ref().map(|process| process.link.as_raw_fd()));
        if let Some(Process { pid, link, .. }) = std::mem::replace(&mut self.process, process) {
            // The guard is killed before its link is closed: at the end of the link, it would kill all groups.
            let _ = kill(pid, Signal::SIGKILL);
            self.replaced.insert(pid);
            drop(link);
        }
    }
}

impl Master {
    /// Keeps a guard running if there are processes to guard. A master with pid 1 needs no guard, because the kernel
    /// kills all processes of the container when pid 1 dies.
    pub(super) fn keep_guard(&mut self) {
        let runs_programs = self.pools().any(|pool| pool.spawner.launch.executes());
        self.guard.wanted = (runs_programs || self.sidecars.has_any()) && getpid() != Pid::from_raw(1);
        if self.guard.next_deadline().is_some_and(|deadline| self.now() >= deadline) {
            self.start_guard();
        }
    }

    /// Replaces the guard after a change of the log, the shared memory or the build.
    pub(super) fn renew_guard(&mut self) {
        if self.guard.process.is_some() {
            self.start_guard();
        }
    }

    fn start_guard(&mut self) {
        let mut groups = Groups::default();
        self.groups().into_iter().for_each(|group| groups.add(group));
        let orphans = procfs::family_of(&self.orphans());
        orphans.into_iter().filter(|pid| self.sidecars.has_left(*pid)).for_each(|pid| groups.add_process(pid));
        match start(groups, &self.pool.spawner, &self.signals) {
            Ok(process) => {
                log::debug!(pid = process.pid.as_raw(); "guard started");
                self.guard.put(Some(process));
            }
            Err(error) => {
                let now = self.now();
                self.guard.start_failed(now, &error);
            }
        }
    }

    /// Returns the process groups that must end with the master.
    fn groups(&self) -> BTreeSet<i32> {
        let children = self.pools().flat_map(|pool| &pool.children);
        let programs = children.filter(|(_, child)| !child.is_worker()).map(|(pid, _)| *pid);
        let sidecars = self.sidecars.living().into_iter().map(|living| living.pid);
        let mut groups: BTreeSet<i32> = programs.chain(sidecars).map(Pid::as_raw).collect();
        let (session, own_group) = (own_session(), getpgrp().as_raw());
        let runs_programs = self.pools().any(|pool| pool.spawner.launch.executes());
        for pid in procfs::family_of(&self.orphans()) {
            // The groups of processes that workers have left behind are not announced, because workers that are still
            // serving may belong to these groups. The master's own group is not announced, because the process that
            // started the server may belong to it.
            if let Some(stat) = procfs::stat(pid).filter(|stat| stat.group != own_group)
                && (self.sidecars.has_left(pid) || (runs_programs && stat.session == session))
            {
                groups.insert(stat.group);
            }
        }
        groups
    }
}

fn start(groups: Groups, spawner: &Spawner, signals: &super::SignalInbox) -> io::Result<Process> {
    let (link, end) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let master = getpid();
    let pid = sys::fork(|| {
        signals.leave(); // all signals stay blocked: a signal to every process of a service must not terminate the guard early
        let _ = nix::sys::prctl::set_name(c"guard"); // for `ps`
        let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0)); // a signal to the master's group must not terminate it
        logging::begin_worker(&spawner.config.logs);
        let logs = spawner.current.log_files.descriptors();
        let keep: Vec<_> = [0, 1, 2, end.as_raw_fd()].into_iter().chain(logs).collect();
        sys::close_all_except(&keep);
        live(master, &end, groups)
    })?;
    Ok(Process { pid, since: Instant::now(), link })
}

/// Runs the guard; returns its exit status.
fn live(master: Pid, link: &OwnedFd, mut groups: Groups) -> u8 {
    loop {
        let mut message = [[0; size_of::<i32>()]; 2];
        match recv(link.as_raw_fd(), message.as_flattened_mut(), MsgFlags::empty()) {
            Ok(0) => break,
            Ok(length) if length == size_of_val(&message) => {
                groups.add_process(Pid::from_raw(i32::from_ne_bytes(message[0])))
            }
            Ok(_) => groups.read_child(i32::from_ne_bytes(message[0])),
            Err(Errno::EINTR) => {}
            Err(_) if getppid() == master => std::thread::sleep(POLL_INTERVAL), // for example ENOMEM
            Err(_) => break,
        }
    }
    let begun = Instant::now();
    while getppid() == master {
        if begun.elapsed() >= KILL_TIMEOUT {
            return 1; // the master is alive, but its end of the link was closed
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    let killed = groups.kill();
    if !killed.is_empty() {
        let names: Vec<String> = killed.iter().take(NAMED).map(|(pid, name)| format!("{pid} ({name})")).collect();
        log::error!(
            master = master.as_raw(), processes = killed.len(), names = names.join(", ");
            "the master has died (it may have been killed): killed the remaining processes of its programs, daemons and \
             jobs"
        );
    }
    logging::finish();
    0
}

/// Returns the process with this pid, if that process started at this time.
fn process_of(pid: i32, started: u64) -> Option<procfs::Stat> {
    procfs::stat(Pid::from_raw(pid)).filter(|stat| stat.started == started)
}

fn own_session() -> i32 {
    getsid(None).map_or(0, Pid::as_raw)
}

/// The process groups that must end with the master, by number, and single processes with their start times.
#[derive(Debug, Default)]
struct Groups {
    groups: BTreeMap<i32, Group>,
    processes: BTreeMap<i32, u64>,
}

/// Identifies a group even if the group's number is reused.
#[derive(Debug)]
struct Group {
    session: i32,
    /// Start time of the group's leader; `None` if the leader had already exited.
    leader: Option<u64>,
}

impl Groups {
    /// Handles a message, which is the number of a new group, or the negative number of a group that has ended. Every message also removes
    /// the groups that no longer exist.
    fn read_child(&mut self, message: i32) {
        self.groups.retain(|&group, _| Some(group) != message.checked_neg());
        self.groups.retain(|&group, _| killpg(Pid::from_raw(group), None) != Err(Errno::ESRCH));
        self.add(message);
    }

    fn add_process(&mut self, pid: Pid) {
        self.processes.retain(|&pid, started| process_of(pid, *started).is_some());
        if let Some(stat) = procfs::stat(pid) {
            self.processes.insert(pid.as_raw(), stat.started);
        }
    }

    fn add(&mut self, group: i32) {
        if group <= 1 {
            return; // not a group's number; kill(2) would interpret it differently
        }
        let leader = procfs::stat(Pid::from_raw(group));
        let session = leader.as_ref().map_or_else(own_session, |leader| leader.session);
        self.groups.insert(group, Group { session, leader: leader.map(|leader| leader.started) });
    }

    /// Returns the running processes in these groups, by group, each with its name.
    fn left(&self) -> BTreeMap<i32, Vec<(i32, String)>> {
        let mut left: BTreeMap<i32, Vec<(i32, String)>> = BTreeMap::new();
        for pid in procfs::all() {
            let Some(stat) = procfs::stat(pid).filter(|stat| !stat.is_zombie) else { continue };
            if self.groups.get(&stat.group).is_some_and(|group| group.session == stat.session) {
                left.entry(stat.group).or_default().push((pid.as_raw(), stat.name));
            }
        }
        // A group with a different leader is a different group with the same number.
        left.retain(|&number, _| {
            let leader = procfs::stat(Pid::from_raw(number)).map(|leader| leader.started);
            leader.is_none() || self.groups.get(&number).is_some_and(|group| group.leader == leader)
        });
        left
    }

    /// Kills the groups and the processes. Returns the killed processes.
    fn kill(&mut self) -> Vec<(i32, String)> {
        let processes = std::mem::take(&mut self.processes);
        let running = |(pid, started)| Some((pid, process_of(pid, started).filter(|stat| !stat.is_zombie)?));
        let processes: Vec<_> = processes.into_iter().filter_map(running).collect();
        for (pid, stat) in &processes {
            if stat.group == *pid {
                self.add(*pid);
            } else if let Some(group) = self.groups.get_mut(&stat.group).filter(|group| group.leader.is_none()) {
                group.session = stat.session; // the leader has ended, and this process is known to belong to the server
            }
        }
        let mut killed = Vec::new();
        for (group, processes) in self.left() {
            match killpg(Pid::from_raw(group), Signal::SIGKILL) {
                Ok(()) => killed.extend(processes),
                Err(Errno::ESRCH) => {}
                Err(errno) => log::error!(group; "cannot kill the remaining processes of a group: {errno}"),
            }
        }
        for (pid, stat) in processes {
            let is_killed = killed.iter().any(|(other, _)| *other == pid);
            if !is_killed && kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok() {
                killed.push((pid, stat.name));
            }
        }
        killed
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn sleeper() -> Child {
        sleeper_of(Pid::from_raw(0))
    }

    fn sleeper_of(group: Pid) -> Child {
        Command::new("sleep").arg("600").process_group(group.as_raw()).spawn().unwrap()
    }

    #[test]
    fn a_group_is_killed_and_a_different_group_with_its_number_is_not() {
        let (mut ours, mut other) = (sleeper(), sleeper());
        let [our, others] = [&ours, &other].map(|child| i32::try_from(child.id()).unwrap());
        let mut groups = Groups::default();
        [our, others, 0, 1, -1].into_iter().for_each(|group| groups.add(group));
        assert_eq!(
            groups.groups.keys().copied().collect::<Vec<_>>(),
            [our, others].into_iter().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
        );
        let recorded = groups.groups.get_mut(&others).unwrap();
        recorded.leader = recorded.leader.map(|started| started - 1);
        assert_eq!(groups.kill(), [(our, "sleep".to_owned())], "the other group has a different leader");
        ours.wait().unwrap();
        let recorded = groups.groups.get_mut(&others).unwrap();
        recorded.leader = recorded.leader.map(|started| started + 1);
        recorded.session -= 1;
        assert_eq!(groups.kill(), [], "it was in another session");
        assert!(other.try_wait().unwrap().is_none());
        groups.read_child(others);
        assert_eq!(groups.groups.len(), 1, "the group that has ended is forgotten");
        assert_eq!(groups.kill().len(), 1);
        other.wait().unwrap();
    }

    #[test]
    fn a_group_that_was_reported_as_ended_is_not_killed_and_a_group_without_its_leader_is() {
        let (mut ended, mut leader) = (sleeper(), sleeper());
        let [gone, left] = [&ended, &leader].map(|child| i32::try_from(child.id()).unwrap());
        let mut member = Command::new("sleep").arg("600").process_group(left).spawn().unwrap();
        let mut groups = Groups::default();
        groups.read_child(gone);
        groups.read_child(left);
        // The number now belongs to a different group, which only this message distinguishes from the old one.
        groups.read_child(-gone);
        leader.kill().unwrap();
        leader.wait().unwrap();
        groups.read_child(0);
        let killed = groups.kill();
        assert_eq!(killed, [(i32::try_from(member.id()).unwrap(), "sleep".to_owned())]);
        member.wait().unwrap();
        assert!(ended.try_wait().unwrap().is_none(), "it is running");
        // After a new announcement the group is known again.
        groups.read_child(gone);
        assert_eq!(groups.kill(), [(gone, "sleep".to_owned())]);
        ended.wait().unwrap();
    }

    #[test]
    fn a_process_that_creates_its_group_after_it_was_announced_is_killed_with_its_group() {
        let mut later = Command::new("sh");
        let mut later = later.args(["-c", "read go; exec setsid sleep 600"]).stdin(Stdio::piped()).spawn().unwrap();
        let (mut alone, mut other) = (sleeper_of(getpgrp()), sleeper_of(getpgrp()));
        let [pid, alone_pid, others] = [&later, &alone, &other].map(|child| Pid::from_raw(child.id().cast_signed()));
        let mut groups = Groups::default();
        [pid, alone_pid, others].into_iter().for_each(|pid| groups.add_process(pid));
        *groups.processes.get_mut(&others.as_raw()).unwrap() += 1;
        drop(later.stdin.take().map(|mut stdin| stdin.write_all(b"\n")));
        let deadline = Instant::now() + Duration::from_secs(60);
        while procfs::stat(pid).unwrap().name != "sleep" {
            assert!(Instant::now() < deadline, "setsid calls exec");
            std::thread::sleep(POLL_INTERVAL);
        }
        let ended: BTreeSet<i32> = groups.kill().into_iter().map(|(pid, _)| pid).collect();
        assert_eq!(ended, [pid, alone_pid].map(Pid::as_raw).into());
        later.wait().unwrap();
        alone.wait().unwrap();
        assert!(other.try_wait().unwrap().is_none(), "the number belongs to a different process");
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
