//! Saves all state of a master, and restores it in the next master. Descriptors are passed by number.
//!
//! Every descriptor, and all state about processes that continue to run, must be saved and restored here. Any other
//! descriptor is closed by exec without a log line.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::config::millis;
use crate::control::wire::ControlReply;
use crate::master::apps::Which;
use crate::master::control::Waiting;
use crate::master::output::{LineReader, Output};
use crate::master::pool::apps::AppState;
use crate::master::pool::child::{Child, Link, restored_signal};
use crate::master::pool::programs::ProgramState;
use crate::master::pool::ready_descriptor::Declaration;
use crate::master::pool::spawn::Spawner;
use crate::master::pool::supervisor::{Command, Supervisor, Uptime};
use crate::master::pool::{Pool, policy, with_article};
use crate::master::{Control, EarlierChildren, Master};
use crate::sys;
use crate::upgrade::Takeover;
use crate::upgrade::saved_processes::Roster;
use crate::upgrade::saved_state::{
    FORMAT, Saved, SavedApps, SavedChild, SavedLink, SavedListener, SavedOutput, SavedSegment, SavedSidecar, clock_ms,
};

impl Master {
    /// Returns the whole state, or `None` while the server is stopping, because no upgrade takes place then.
    pub(super) fn save(&self) -> Option<Saved> {
        let (spawner, now) = (&self.pool.spawner, self.now());
        let sidecars = self.sidecars.living().into_iter().map(|one| SavedSidecar {
            name: one.name.to_owned(),
            pid: one.pid.as_raw(),
            output: one.output.as_raw_fd(),
            partial: one.partial.to_vec(),
            age_ms: millis(one.age),
            stop_left_ms: one.stop_left.map(millis),
        });
        Some(Saved {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            written_ms: Some(clock_ms()),
            pid: nix::unistd::getpid().as_raw(),
            start_command: self.start_command.clone(),
            listeners: save_listeners(spawner),
            segment: SavedSegment { fd: spawner.segment.fd().as_raw_fd(), file: spawner.config.cache.file.clone() },
            lifeline: spawner.lifeline(),
            handover: Some((spawner.handover.sender().as_raw_fd(), spawner.handover.receiver().as_raw_fd())),
            roster: self.pool.supervisor.save(now)?,
            children: save_children(&self.pool),
            strays: self.pool.programs.save_strays(now),
            apps: self.save_apps()?,
            orphaned_outputs: self.pool.orphaned_outputs.save(),
            sidecars: sidecars.collect(),
            jobs_looked_at_ms: self.sidecars.looked_at_ms(),
            quarantine: self.pool.faults.save(now),
            control: self.control.as_ref().and_then(Control::save),
            pid_file: self.pid_file.clone(),
            publish: self.relay.save_socket(),
            relay: self.relay.pid().map(Pid::as_raw),
            guard: self.guard.save(),
            earlier: self.earlier.save(),
        })
    }

    /// Returns the state of the app processes, if there are any; `None` while the server is stopping.
    fn save_apps(&self) -> Option<Option<SavedApps>> {
        let Some((apps, channel)) = self.apps.as_ref().and_then(|apps| Some((apps, apps.channel()?))) else {
            return Some(None);
        };
        Some(Some(SavedApps {
            channel: channel.save(),
            roster: apps.supervisor.save(self.now())?,
            children: save_children(apps),
            orphaned_outputs: apps.orphaned_outputs.save(),
        }))
    }

    /// Takes over the children of the former program and replaces them. Processes that are not children of this process
    /// are dropped; children that have exited are reaped as usual. A deadline that passed during the upgrade is handled
    /// last, after all deaths and reports have been read.
    pub(in crate::master) fn adopt(&mut self, mut left: Takeover) {
        let now = self.now();
        let passed = left.saved.catch_up(clock_ms());
        self.earlier = EarlierChildren::restore(&left.saved.earlier);
        let (children, roster) = (std::mem::take(&mut left.saved.children), left.saved.roster.clone());
        let outputs = std::mem::take(&mut left.saved.orphaned_outputs);
        self.pool.adopt(children, roster, outputs, &mut left, passed);
        if let (Some(saved), Some(apps)) = (left.saved.apps.take(), &mut self.apps) {
            apps.adopt(saved.children, saved.roster, saved.orphaned_outputs, &mut left, passed);
        }
        self.pool.programs.restore_strays(std::mem::take(&mut left.saved.strays), now);
        for saved in std::mem::take(&mut left.saved.sidecars) {
            let SavedSidecar { name, pid, output, partial, age_ms, stop_left_ms } = saved;
            let pid = Pid::from_raw(pid);
            if let (true, Some(output)) = (sys::is_child(pid), left.claim(output)) {
                let age = Duration::from_millis(age_ms);
                let stop_left = stop_left_ms.map(Duration::from_millis);
                self.sidecars.adopt(&name, pid, LineReader::resume(output, partial), age, stop_left);
            } else {
                let pid = pid.as_raw();
                log::error!(name, pid; "cannot take over a daemon or job: it is not a child of this process");
            }
        }
        if let Some(pid) = left.saved.relay.map(Pid::from_raw).filter(|pid| sys::is_child(*pid)) {
            self.relay.adopt(pid, now);
        }
        let guard = left.saved.guard.take().and_then(|saved| Some((Pid::from_raw(saved.pid), left.claim(saved.link)?)));
        if let Some((pid, link)) = guard.filter(|(pid, _)| sys::is_child(*pid)) {
            self.guard.adopt(pid, link);
            self.renew_guard();
        }
        if let Some(looked_at_ms) = left.saved.jobs_looked_at_ms {
            self.sidecars.resume(looked_at_ms);
        }
        self.pool.faults.restore(std::mem::take(&mut left.saved.quarantine), now);
        let clients = left.saved.control.take().map(|saved| saved.clients).unwrap_or_default();
        let clients: Vec<_> = clients.into_iter().filter_map(|client| Some((left.claim(client.fd)?, client))).collect();
        if !clients.is_empty() {
            self.control.get_or_insert_with(|| Control::new(None)).restore(clients, now);
        }
        let (version, from) = (env!("CARGO_PKG_VERSION"), &left.saved.version);
        log::info!(version, from, workers = self.application_pool().children.len(); "upgraded");
        // Clients that waited for the upgrade now wait for its reload.
        let text = format!("upgraded from version {from} to {version}");
        self.reply_to_waiting(Waiting::Reload, &ControlReply::Progress { text });
        left.remove_socket_files();
        drop(left);
        self.obey(Command::Reload);
        self.reap();
        self.pool.read_children();
        self.feed_observed(Which::Front);
        self.observe_apps();
        self.begin();
    }
}

impl Pool {
    /// Takes over the processes of this pool. `passed` is the time since the former master wrote its state.
    fn adopt(
        &mut self,
        children: Vec<SavedChild>,
        mut roster: Roster,
        outputs: Vec<SavedOutput>,
        left: &mut Takeover,
        passed: Duration,
    ) {
        let (now, noun) = (self.now(), self.noun);
        for saved in children {
            let (slot, pid) = (saved.slot, Pid::from_raw(saved.pid));
            if !sys::is_child(pid) {
                log::error!(slot, pid = pid.as_raw(); "cannot take over {}: it is not a child of this process", with_article(noun));
            } else if let Some(mut child) = Child::restore(saved, left, now) {
                child.await_answer(&self.spawner.current.config, &self.spawner.launch);
                if child.hung {
                    self.faults.told_to_die(pid, now.saturating_sub(passed));
                }
                // If one program was seen to accept connections, further programs must be seen to do so too.
                self.programs.seen |= child.program().is_some_and(|program| program.seen);
                self.recycling.spawned(pid, child.since.elapsed(), now);
                self.children.insert(pid, child);
            } else {
                log::error!(
                    slot, pid = pid.as_raw();
                    "sent SIGTERM to {}, because its reports can no longer be read", with_article(noun)
                );
                let _ = kill(pid, Signal::SIGTERM);
            }
        }
        roster.slots.retain(|slot| self.children.contains_key(&Pid::from_raw(slot.pid)));
        self.supervisor = Supervisor::restore(policy(&self.spawner.config), &roster, now);
        for saved in outputs {
            let pid = saved.pid;
            if let Some(output) = restore_output(saved, left) {
                let _ = self.orphaned_outputs.adopt(output, Pid::from_raw(pid), now); // its death was logged
            }
        }
    }
}

fn save_children(pool: &Pool) -> Vec<SavedChild> {
    pool.children.iter().map(|(pid, child)| child.save(*pid, pool.now())).collect()
}

fn save_listeners(spawner: &Spawner) -> Vec<SavedListener> {
    let save = |listener: &crate::net::listen::Listener| SavedListener {
        fd: listener.as_fd().as_raw_fd(),
        bind: listener.bind.to_string(),
        file: listener.file(),
    };
    spawner.listeners.iter().map(save).collect()
}

fn restore_output(saved: SavedOutput, left: &mut Takeover) -> Option<Output> {
    Some(Output::resume(saved.slot, left.claim(saved.fd)?, saved.partial))
}

impl Child {
    fn save(&self, pid: Pid, now: Uptime) -> SavedChild {
        let link = match &self.link {
            Link::Worker { report, open, unread, last_words, trace } => SavedLink::Worker {
                report: report.as_raw_fd(),
                open: *open,
                unread: unread.clone(),
                last_words: last_words.clone(),
                trace: trace.clone(),
            },
            Link::Program(program) => SavedLink::Program(program.save(now)),
            Link::App(app) => app.save(),
        };
        SavedChild {
            pid: pid.as_raw(),
            slot: self.slot,
            generation: self.generation,
            age_ms: millis(self.since.elapsed()),
            asked_to_leave: self.asked_to_leave,
            hung: self.hung,
            link,
            stop_signal: Some(self.stop_signal as i32),
            declaration: self.declaration.as_ref().map(Declaration::save),
            output: self.output.as_ref().map(|output| output.save(pid)),
            files: self.files.as_ref().map(|files| files.as_raw_fd()),
        }
    }

    /// Restores a child. Returns `None` if the child's reports cannot be read.
    fn restore(saved: SavedChild, left: &mut Takeover, now: Uptime) -> Option<Self> {
        let SavedChild { slot, generation, age_ms, asked_to_leave, hung, link, output, files, .. } = saved;
        let (stop_signal, declaration) = (restored_signal(saved.stop_signal), saved.declaration);
        let is_made = matches!(&link, SavedLink::Program(program) if program.started);
        let declaration = declaration.and_then(|declaration| left.claim(declaration));
        let declaration = declaration.map(|pipe| Declaration::restore(pipe, is_made));
        let link = match link {
            SavedLink::Worker { report, open, unread, last_words, trace } => {
                Link::Worker { report: left.claim(report)?.into(), open, unread, last_words, trace }
            }
            SavedLink::Program(program) => Link::Program(ProgramState::restore(program, now)),
            SavedLink::App { probe, awaits_address, was_ready, served_before, awaits_idle, max_requests } => {
                let probe = probe.and_then(|probe| left.claim(probe));
                Link::App(AppState::restore(
                    probe,
                    awaits_address,
                    (was_ready, served_before),
                    awaits_idle,
                    max_requests,
                ))
            }
        };
        let output = output.and_then(|output| restore_output(output, left));
        let files = files.and_then(|files| left.claim(files));
        let clock = Instant::now();
        let since = clock.checked_sub(Duration::from_millis(age_ms)).unwrap_or(clock);
        let new = Self::new(slot, generation, link);
        Some(Self { since, asked_to_leave, hung, output, files, stop_signal, declaration, ..new })
    }
}
