//! External programs, which tell the master nothing: what is seen of them, whom of them signals go to, and what is done about
//! those that they leave behind.
//!
//! A program is one process, or a wrapper around the processes that serve (`sh -c 'php-cgi; …'`, php-cgi with
//! PHP_FCGI_CHILDREN, FCGI::ProcManager). What those that serve have started belongs to requests, and no graceful stop touches
//! it: a page may wait for it, or it is a background job. So:
//!
//! - TERM goes to the program's own process. If that serves itself, nobody else is asked, ever.
//! - If it does not, those below it that have the socket were noted before. When the TERM itself has ended the wrapper, they have
//!   heard nothing, and are asked. Otherwise they are asked when they are seen to wait in accept, at which nothing is
//!   lost: a second after the wrapper was asked, or when it has ended.
//! - KILL goes to the whole group, when the program has died or had to be killed.
//! - Whoever is left behind and still takes connections is a stray: asked to leave as above, and killed after the drain
//!   timeout. The server does not end before them.

use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::Master;
use super::procfs::{self, Observed, Process};
use super::reap::Kind;
use super::spawn::{Child, Launch, Link};
use super::supervisor::Now;
use crate::sys::Ending;

/// How long a program must have run to count as started, if it was never seen to accept and the operator says nothing else.
const SETTLE_TIME: Duration = Duration::from_secs(1);
/// How often a program that is starting is looked at, and how often after one has ended well without having been seen: it may have served its share
/// between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
const QUICK_POLL_INTERVAL: Duration = Duration::from_millis(1);
/// For how long after such an end.
const QUICK_POLL_TIME: Duration = Duration::from_secs(2);
/// How often strays are looked for: after a program has ended, and as long as there are orphans that may become some.
const STRAYS_INTERVAL: Duration = Duration::from_millis(50);
const ORPHANS_INTERVAL: Duration = Duration::from_secs(1);
/// A stray that waits for connections is asked again after this.
const TERMINATE_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is looked whether connections wait, and connections that wait for so long, with programs that were never seen to accept, are not going to be served.
const QUEUE_INTERVAL: Duration = Duration::from_secs(1);
const UNSERVED_TIMEOUT: Duration = Duration::from_secs(5);

/// What is said of a program that has the socket no more.
const LET_GO: &str = "it has let go of the listening socket, which was its standard input: does it bind a socket of its own? \
                      (php-fpm does; php-cgi accepts from standard input)";

/// What is known of a program.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProgramState {
    /// It counts as ready.
    pub(crate) started: bool,
    /// It, or one below it, was seen to take connections.
    pub(crate) seen: bool,
    /// When it was asked to leave.
    asked_at: Option<Now>,
    /// It could not be seen what it does when it was asked to leave.
    hidden: bool,
    /// Those below it that had the socket then, if it does not serve itself.
    servers: Vec<Process>,
    /// It was asked to leave a while ago, and has not.
    reminded: bool,
    /// Why it can serve nobody; empty if nothing is known.
    pub(crate) trouble: &'static str,
}

impl ProgramState {
    /// One that another master has started.
    pub(crate) fn restore(started: bool, seen: bool) -> Self {
        Self { started, seen, ..Self::default() }
    }

    /// None of its processes has the listening socket any more.
    fn let_go(&mut self, slot: u32, pid: Pid) {
        self.trouble = LET_GO;
        log::error!("worker can serve nobody slot={slot} pid={pid}: {LET_GO}");
    }
}

/// One that takes connections though its program has ended.
#[derive(Debug)]
struct Stray {
    process: Process,
    deadline: Now,
    asked: Option<Now>,
}

/// What is known of all programs together.
#[derive(Debug, Default)]
pub(super) struct Programs {
    /// One was seen to take connections: the others will be.
    pub(super) seen: bool,
    /// One was seen to sleep in accept: the socket must not be non-blocking.
    sleeps_in_accept: bool,
    /// Until when to look often.
    quick_until: Now,
    strays: Vec<Stray>,
    next_look: Option<Now>,
    /// Until when strays are looked for as often as that goes.
    stray_until: Now,
    /// When to look whether connections wait.
    next_count: Option<Now>,
    /// Since when connections wait that nobody takes.
    unserved_since: Option<Now>,
    unserved_said: bool,
    /// The operator wants all to end now.
    pub(super) at_once: bool,
}

impl Programs {
    pub(super) fn next_deadline(&self) -> Option<Now> {
        [self.next_look, self.next_count].into_iter().flatten().min()
    }

    /// How often programs that are starting are looked at.
    pub(super) fn pace(&self, now: Now) -> Duration {
        if now < self.quick_until { QUICK_POLL_INTERVAL } else { POLL_INTERVAL }
    }

    /// Whether nobody is left that takes connections.
    pub(super) fn is_empty(&self) -> bool {
        self.strays.is_empty()
    }

    /// All are to end now.
    pub(super) fn halt(&mut self) {
        self.at_once = true;
        for Stray { process, .. } in self.strays.drain(..).filter(|stray| stray.process.lives()) {
            let _ = kill(process.pid(), Signal::SIGKILL); // it may just have ended
        }
    }

    fn check_soon(&mut self, now: Now) {
        self.next_look = Some(now);
        self.stray_until = now + QUICK_POLL_TIME;
    }
}

impl Child {
    pub(super) fn is_unsettled_program(&self) -> bool {
        matches!(&self.link, Link::Program(program) if !program.started)
    }
}

impl Master {
    /// It counts as started when it is seen to take connections, or one below it; else after `--settle`, but not if others were
    /// seen, nor if nobody of it has the socket any more.
    pub(super) fn check_programs(&mut self) {
        let settle = self.spawner.config.settle;
        let listener = &self.spawner.listeners[0];
        let mut started = Vec::new();
        for (&pid, child) in &mut self.children {
            let lived = child.since.elapsed();
            let Link::Program(program) = &mut child.link else { continue };
            // Of one that was asked to leave, or killed, nothing can be seen any more, which is no sign of readiness.
            if program.started || child.asked_to_leave {
                continue;
            }
            let servers = procfs::servers_under(&[pid], listener);
            program.seen = !servers.is_empty();
            self.programs.seen |= program.seen;
            self.programs.sleeps_in_accept |= servers.iter().any(|(_, observed)| *observed == Observed::Accepting);
            let enough = settle.or((!self.programs.seen).then_some(SETTLE_TIME));
            program.started = program.seen || enough.is_some_and(|enough| lived >= enough && has_socket(pid, listener));
            if program.started {
                started.push(pid);
            } else if program.trouble.is_empty() && lived >= settle.unwrap_or(SETTLE_TIME) && !has_socket(pid, listener)
            {
                program.let_go(child.slot, pid);
            }
        }
        for pid in started {
            self.ready(pid);
            if !self.programs.seen && self.programs.next_count.is_none() {
                self.programs.next_count = Some(self.now() + QUEUE_INTERVAL);
            }
        }
        self.check_strays();
        self.check_queue();
    }

    /// Says once if connections wait, and none of the programs was ever seen to take any.
    fn check_queue(&mut self) {
        let now = self.now();
        if self.programs.next_count.is_none_or(|at| at > now) {
            return;
        }
        let listener = &self.spawner.listeners[0];
        let pids: Vec<Pid> = self.children.keys().copied().collect();
        let servers = procfs::servers_under(&pids, listener);
        if self.programs.unserved_said || !servers.is_empty() {
            // One was busy with its start for a while. Now it was seen, and further ones must be.
            self.programs.seen |= !servers.is_empty();
            for (&pid, child) in &mut self.children {
                if let Link::Program(program) = &mut child.link {
                    program.seen |= !procfs::servers_under(&[pid], listener).is_empty();
                }
            }
            self.programs.next_count = None;
            return;
        }
        // One that counted as started because it had the socket for long enough may give it up later.
        for (&pid, child) in &mut self.children {
            if let Link::Program(program) = &mut child.link
                && program.started
                && !child.asked_to_leave
                && program.trouble.is_empty()
                && !has_socket(pid, listener)
            {
                program.let_go(child.slot, pid);
            }
        }
        self.programs.next_count = Some(now + QUEUE_INTERVAL);
        let waiting = self.queue_depth.of(listener);
        if waiting == 0 {
            self.programs.unserved_since = None;
        } else if now >= *self.programs.unserved_since.get_or_insert(now) + UNSERVED_TIMEOUT {
            self.programs.unserved_said = true;
            log::error!(
                "nobody takes the connections that wait waiting={waiting}: does the program accept from its standard \
                 input? (php-cgi and what is linked with libfcgi do; php-fpm and php do not)"
            );
        }
    }

    /// Before a program is started: what those did that have the listening socket too is undone.
    ///
    /// # Errors
    /// A sentence for the operator, if it cannot be.
    pub(super) fn mend_socket(&mut self) -> Result<(), String> {
        if !matches!(self.spawner.launch, Launch::Program(_)) {
            return Ok(());
        }
        let listener = &self.spawner.listeners[0];
        let cause = "a process that has it, as its standard input as a rule,";
        if !listener.is_listening() && !self.closing.has_begun() {
            listener.repair(&self.spawner.config, true).map_err(|why| {
                format!("{cause} has shut the listening socket down, and it cannot be had anew: {listener}: {why}")
            })?;
            log::warn!("the listening socket was had anew: {cause} had shut it down socket={listener}");
        }
        // Programs with an event loop have set it themselves, and want it so.
        let now = self.begun.elapsed();
        let suspect = self.programs.sleeps_in_accept || self.children.is_empty() || now < self.programs.quick_until;
        if suspect && !listener.is_blocking() {
            listener.make_blocking().map_err(|error| format!("{listener}: {error}"))?;
            log::warn!("the listening socket waits in accept again: {cause} had set O_NONBLOCK socket={listener}");
        }
        Ok(())
    }

    /// Asks a worker or program to leave, or ends it.
    pub(super) fn signal(&mut self, pid: Pid, signal: Signal) {
        let now = self.now();
        let listener = &self.spawner.listeners[0];
        let Some(child) = self.children.get_mut(&pid) else { return };
        let to_group = signal == Signal::SIGKILL && !child.is_worker();
        if let Link::Program(program) = &mut child.link
            && program.asked_at.is_none()
        {
            program.asked_at = Some(now);
            let observed = procfs::of(pid, listener);
            program.hidden = observed == Observed::Hidden;
            if !observed.serves() {
                program.servers = procfs::holders_under(pid, listener).into_iter().filter_map(Process::of).collect();
            }
        }
        child.asked_to_leave = true;
        // The pid cannot have been given to another process: we have not reaped it.
        let sent = if to_group { killpg(pid, signal) } else { kill(pid, signal) };
        if let Err(errno) = sent {
            log::error!("cannot signal worker slot={} pid={pid} signal={signal}: {errno}", child.slot);
        }
    }

    /// It was asked to leave, and is still there. Our own workers miss nothing. A program may have lost the signal between a check
    /// and an accept; and to one at work a second TERM may mean "at once".
    pub(super) fn remind(&mut self, pid: Pid) {
        let now = self.now();
        let listener = &self.spawner.listeners[0];
        let Some(Child { link: Link::Program(program), .. }) = self.children.get_mut(&pid) else { return };
        if procfs::of(pid, listener) == Observed::Accepting {
            self.signal(pid, Signal::SIGTERM);
        } else if !program.servers.is_empty() {
            program.reminded = true;
            self.programs.check_soon(now);
        }
    }

    /// A child of this master has ended, and is not reaped yet: what it leaves of its group ends with it, if it has died or had
    /// to be killed.
    pub(super) fn program_ending(&mut self, pid: Pid, ending: Ending) {
        let Some(Child { link: Link::Program(program), asked_to_leave: asked, .. }) = self.children.get(&pid) else {
            return;
        };
        let signal = match ending {
            // It was the wrapper of others maybe, which cannot be seen, and have not heard the TERM that ended it.
            Ending::Signaled(libc::SIGTERM) if *asked && program.hidden => Some(Signal::SIGTERM),
            Ending::Exited(_) | Ending::Signaled(libc::SIGTERM) if *asked => None,
            Ending::Exited(0 | super::reap::STAY_DOWN) if program.started || self.programs.seen => None,
            Ending::Exited(_) | Ending::Signaled(_) => Some(Signal::SIGKILL),
        };
        if let Some(signal) = signal {
            let _ = killpg(pid, signal); // nobody may be left
        }
    }

    /// A program has ended: whoever of it still takes connections is to leave too.
    pub(super) fn program_ended(&mut self, program: ProgramState, ending: Ending) {
        let now = self.now();
        if !program.started && ending == Ending::Exited(0) {
            self.programs.quick_until = now + QUICK_POLL_TIME;
        }
        let deadline = program.asked_at.unwrap_or(now) + self.spawner.config.drain_timeout;
        for process in program.servers.into_iter().filter(|process| process.lives()) {
            if self.programs.at_once {
                let _ = kill(process.pid(), Signal::SIGKILL);
                continue;
            }
            // The TERM that ended their wrapper was for it alone.
            let unasked = ending == Ending::Signaled(libc::SIGTERM);
            let asked = (unasked && kill(process.pid(), Signal::SIGTERM).is_ok()).then_some(now);
            self.programs.strays.push(Stray { process, deadline, asked });
        }
        self.programs.check_soon(now);
    }

    /// Those that this process did not make: their parents have ended. Those that were there before the server are not among them.
    pub(super) fn orphans(&self) -> Vec<Pid> {
        let mut orphans = procfs::own_children();
        orphans.retain(|&pid| {
            self.kind_of(pid) == Kind::Orphan
                && procfs::stat(pid).is_some_and(|stat| !stat.is_zombie && stat.name != "heir")
        });
        orphans
    }

    fn check_strays(&mut self) {
        let now = self.now();
        if self.programs.next_look.is_none_or(|at| at > now) {
            return;
        }
        let orphans = self.orphans();
        let mut roots = orphans.clone();
        for (&pid, child) in &self.children {
            if matches!(&child.link, Link::Program(program) if program.reminded) {
                roots.extend(procfs::children_of(pid));
            }
        }
        let mut seen = procfs::servers_under(&roots, &self.spawner.listeners[0]);
        seen.retain(|(_, observed)| observed.accepts());
        let deadline = now + self.spawner.config.drain_timeout;
        let strays = &mut self.programs.strays;
        strays.retain(|stray| stray.process.lives());
        for process in seen.iter().filter_map(|(pid, _)| Process::of(*pid)) {
            if strays.iter().all(|stray| stray.process != process) {
                strays.push(Stray { process, deadline, asked: None });
            }
        }
        for Stray { process, deadline, asked } in &mut *strays {
            let waits = seen.iter().any(|(pid, _)| *pid == process.pid());
            let signal = match asked {
                _ if *deadline <= now => Signal::SIGKILL,
                Some(asked) if !waits || now < *asked + TERMINATE_INTERVAL => continue,
                None if !waits => continue,
                Some(_) | None => Signal::SIGTERM,
            };
            let name = procfs::stat(process.pid()).map(|stat| stat.name).unwrap_or_default();
            if signal == Signal::SIGKILL {
                let pid = process.pid;
                log::warn!(
                    "what a worker left behind does not finish in time (--drain-timeout): killed pid={pid} name={name}"
                );
            } else if asked.is_none() {
                log::info!(
                    "what a worker left behind takes connections: asked to leave pid={} name={name}",
                    process.pid
                );
            }
            *asked = Some(now);
            let _ = kill(process.pid(), signal); // it may just have ended
        }
        let left = if !strays.is_empty() || now < self.programs.stray_until {
            Some(STRAYS_INTERVAL)
        } else {
            (roots.len() > orphans.len() || !orphans.is_empty()).then_some(ORPHANS_INTERVAL)
        };
        self.programs.next_look = left.map(|left| now + left);
    }
}

/// Whether anybody of a program has the socket; true if that cannot be seen.
fn has_socket(pid: Pid, listener: &crate::net::listen::Listener) -> bool {
    procfs::family_of(&[pid]).into_iter().any(|pid| procfs::of(pid, listener) != Observed::Apart)
}

/// What an operator should know of the end of a program that was not ready.
pub(super) fn hint(ending: Ending) -> &'static str {
    match ending {
        Ending::Exited(0) => {
            "it ended well, without taking a connection: is it a FastCGI program, which accepts from its standard input? \
             (php-cgi is one, php is not)"
        }
        Ending::Exited(125) => "env, timeout, nice, docker run and the like return 125 when they themselves fail",
        Ending::Exited(126) => "126: a shell, env or the like found the command, and could not execute it",
        Ending::Exited(127) => "127: a shell, env or the like did not find the command",
        Ending::Exited(_) | Ending::Signaled(_) => "",
    }
}
