//! Saves the state of a master for the program that replaces it, as JSON in a sealed memory file.
//!
//! The two programs may be different builds. A field that a later build adds must therefore have a default
//! (`#[serde(default)]`), and a build ignores unknown fields. Any other change requires a new [`FORMAT`]: a build fails
//! its upgrade check if the state has a different format.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::saved_processes::{Roster, SavedSlotState};
use super::start_command::StartCommand;
use crate::config::millis;
use crate::net::app_channel::SavedChannel;

/// The format that this build writes, and the only one that it reads.
pub(crate) const FORMAT: u32 = 1;
/// Maximum size of the state in bytes, larger than almost any state: enough for 4096 processes with 4 KiB of escaped
/// last words each. Unfinished lines of output can briefly make the state larger.
const MAX_STATE: u64 = 64 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    pub(crate) format: u32,
    /// Version of the build that wrote the state.
    pub(crate) version: String,
    /// When the state was written, by [`clock_ms`]. Ages and remaining times refer to that moment.
    #[serde(default)]
    pub(crate) written_ms: Option<u64>,
    /// Pid of the master, the same before and after the upgrade.
    pub(crate) pid: i32,
    pub(crate) start_command: StartCommand,
    pub(crate) listeners: Vec<SavedListener>,
    pub(crate) segment: SavedSegment,
    /// Both ends of the lifeline, a pipe whose end of file shows workers that the master is dead.
    pub(crate) lifeline: (RawFd, RawFd),
    /// Both ends of the channel on which workers hand connections over: first the sending end, then the receiving end.
    #[serde(default)]
    pub(crate) handover: Option<(RawFd, RawFd)>,
    pub(crate) roster: Roster,
    pub(crate) children: Vec<SavedChild>,
    /// Outputs of dead processes whose heirs and children are still alive.
    #[serde(default)]
    pub(crate) orphaned_outputs: Vec<SavedOutput>,
    /// Daemons and jobs.
    #[serde(default)]
    pub(crate) sidecars: Vec<SavedSidecar>,
    /// When the master last checked for due jobs, in Unix milliseconds.
    #[serde(default)]
    pub(crate) jobs_looked_at_ms: Option<i64>,
    #[serde(default)]
    pub(crate) quarantine: Vec<SavedRefusal>,
    #[serde(default)]
    pub(crate) control: Option<SavedControl>,
    #[serde(default)]
    pub(crate) pid_file: Option<SavedPidFile>,
    #[serde(default)]
    pub(crate) publish: Option<SavedPublish>,
    /// Pid of the relay, which exits on its own.
    #[serde(default)]
    pub(crate) relay: Option<i32>,
    #[serde(default)]
    pub(crate) guard: Option<SavedGuard>,
    /// Processes that existed before the master started.
    #[serde(default)]
    pub(crate) earlier: Vec<SavedProcess>,
    #[serde(default)]
    pub(crate) strays: Vec<SavedStray>,
    /// The app processes, if the children are gateways.
    #[serde(default)]
    pub(crate) apps: Option<SavedApps>,
}

/// The app processes behind gateways.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedApps {
    pub(crate) channel: SavedChannel,
    pub(crate) roster: Roster,
    pub(crate) children: Vec<SavedChild>,
    pub(crate) orphaned_outputs: Vec<SavedOutput>,
}

/// A process that accepts connections although its program has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedStray {
    pub(crate) process: SavedProcess,
    pub(crate) left_ms: u64,
    pub(crate) asked: bool,
    /// Whether SIGTERM terminated the process's wrapper and was not sent to the process itself.
    pub(crate) unasked: bool,
    /// The signal that asks the process to exit; SIGTERM if it is missing.
    #[serde(default)]
    pub(crate) stop_signal: Option<i32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedProcess {
    pub(crate) pid: i32,
    /// Start time, in ticks since the system booted.
    pub(crate) started: u64,
}

/// The guard, and its link to the master. The guard detects the master's death when it reads end of file from the link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedGuard {
    pub(crate) pid: i32,
    pub(crate) link: RawFd,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedListener {
    pub(crate) fd: RawFd,
    /// The `--bind` for which the listener was created.
    pub(crate) bind: String,
    /// Device and inode of the socket file that the server created.
    pub(crate) file: Option<(u64, u64)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedSegment {
    pub(crate) fd: RawFd,
    /// `--cache-file`
    pub(crate) file: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedChild {
    pub(crate) pid: i32,
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) age_ms: u64,
    pub(crate) asked_to_leave: bool,
    #[serde(default)]
    pub(crate) hung: bool,
    pub(crate) link: SavedLink,
    /// The signal that asks the process to exit; SIGTERM if it is missing.
    #[serde(default)]
    pub(crate) stop_signal: Option<i32>,
    /// The descriptor on which the process declares that it is ready.
    #[serde(default)]
    pub(crate) declaration: Option<RawFd>,
    pub(crate) output: Option<SavedOutput>,
    /// The descriptor on which the process receives the reopened log files.
    #[serde(default)]
    pub(crate) files: Option<RawFd>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SavedLink {
    Worker {
        report: RawFd,
        open: bool,
        unread: Vec<u8>,
        last_words: String,
        #[serde(default)]
        trace: String,
    },
    Program(SavedProgram),
    App {
        /// The connection that proves readiness; `None` if the process is ready.
        probe: Option<RawFd>,
        /// Whether the process is not ready, and listens on its own.
        awaits_address: bool,
        was_ready: bool,
        served_before: u64,
        awaits_idle: bool,
        max_requests: Option<u64>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedProgram {
    pub(crate) started: bool,
    /// Whether the program was seen to accept connections.
    #[serde(default)]
    pub(crate) seen: bool,
    /// Time left for the process to exit, if it has been asked to.
    #[serde(default)]
    pub(crate) leave_left_ms: Option<u64>,
    #[serde(default)]
    pub(crate) hidden: bool,
    /// The process's descendants that had the socket when the process was asked to exit.
    #[serde(default)]
    pub(crate) servers: Vec<SavedProcess>,
    #[serde(default)]
    pub(crate) reminded: bool,
    #[serde(default)]
    pub(crate) awaits_idle: bool,
}

/// The pipe with the output of a process, and its unfinished line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedOutput {
    pub(crate) slot: u32,
    pub(crate) pid: i32,
    pub(crate) fd: RawFd,
    pub(crate) partial: Vec<u8>,
}

/// A daemon or a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedSidecar {
    pub(crate) name: String,
    pub(crate) pid: i32,
    pub(crate) output: RawFd,
    /// The unfinished line of the output.
    #[serde(default)]
    pub(crate) partial: Vec<u8>,
    /// Time since the process started.
    #[serde(default)]
    pub(crate) age_ms: u64,
    /// Time left to stop, if the process has been asked to.
    #[serde(default)]
    pub(crate) stop_left_ms: Option<u64>,
}

/// A request that killed workers. It is being refused, or was refused before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedRefusal {
    pub(crate) request: String,
    pub(crate) refused: bool,
    pub(crate) left_ms: u64,
    pub(crate) time_ms: u64,
    pub(crate) times: u32,
}

/// The control socket and its clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedControl {
    pub(crate) fd: RawFd,
    pub(crate) path: PathBuf,
    pub(crate) file: Option<(u64, u64)>,
    pub(crate) clients: Vec<SavedClient>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedClient {
    pub(crate) fd: RawFd,
    pub(crate) unread: Vec<u8>,
    pub(crate) unsent: Vec<u8>,
    pub(crate) asked: bool,
    pub(crate) ending: bool,
    pub(crate) waiting: SavedWaiting,
}

/// What a client waits for. A client that waits for the upgrade is saved as waiting for the reload that follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SavedWaiting {
    No,
    Reload,
    Scale(u32),
    Stop,
}

/// The locked pid file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedPidFile {
    pub(crate) fd: RawFd,
    pub(crate) path: PathBuf,
}

/// The publish socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedPublish {
    pub(crate) fd: RawFd,
    /// `--events-socket`
    pub(crate) asked: Option<PathBuf>,
    pub(crate) path: PathBuf,
    pub(crate) file: Option<(u64, u64)>,
}

/// Returns the time of CLOCK_MONOTONIC in milliseconds. This clock is the same before and after an exec.
pub(crate) fn clock_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| millis(now.into()))
}

impl Saved {
    /// Adjusts all ages and remaining times to `now_ms`, and returns the time since the state was written. The new
    /// build's `preload` has run since then, and may have taken a long time.
    pub(crate) fn catch_up(&mut self, now_ms: u64) -> Duration {
        let passed = self.written_ms.replace(now_ms).map_or(0, |written| now_ms.saturating_sub(written));
        let age = |age_ms: &mut u64| *age_ms = age_ms.saturating_add(passed);
        let shorten = |left_ms: &mut u64| *left_ms = left_ms.saturating_sub(passed);
        let apps = self.apps.as_mut();
        let (rosters, children) = apps.map(|apps| (&mut apps.roster, &mut apps.children)).unzip();
        let rosters = [&mut self.roster].into_iter().chain(rosters);
        for slot in rosters.flat_map(|roster| &mut roster.slots) {
            match &mut slot.phase {
                SavedSlotState::Starting { left_ms } | SavedSlotState::Draining { left_ms } => shorten(left_ms),
                SavedSlotState::Ready | SavedSlotState::Killing => {}
            }
        }
        for child in self.children.iter_mut().chain(children.into_iter().flatten()) {
            age(&mut child.age_ms);
            if let SavedLink::Program(program) = &mut child.link {
                program.leave_left_ms.iter_mut().for_each(shorten);
            }
        }
        self.strays.iter_mut().for_each(|stray| shorten(&mut stray.left_ms));
        for sidecar in &mut self.sidecars {
            age(&mut sidecar.age_ms);
            sidecar.stop_left_ms.iter_mut().for_each(shorten);
        }
        self.quarantine.iter_mut().for_each(|refusal| shorten(&mut refusal.left_ms));
        Duration::from_millis(passed)
    }

    /// Returns the descriptors that the new program needs in order to start. The upgrade check receives only these.
    pub(crate) fn foundation(&self) -> Vec<RawFd> {
        self.listeners.iter().map(|listener| listener.fd).chain([self.segment.fd]).collect()
    }

    /// Returns all descriptors that the state names.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        let of_child = |child: &SavedChild| {
            let report = match child.link {
                SavedLink::Worker { report, .. } => Some(report),
                SavedLink::App { probe, .. } => probe,
                SavedLink::Program(_) => None,
            };
            [report, child.output.as_ref().map(|output| output.fd), child.files, child.declaration]
                .into_iter()
                .flatten()
        };
        let mut all = self.foundation();
        all.extend([self.lifeline.0, self.lifeline.1]);
        all.extend(self.handover.iter().flat_map(|&(send, receive)| [send, receive]));
        all.extend(self.children.iter().flat_map(of_child));
        all.extend(self.orphaned_outputs.iter().map(|output| output.fd));
        all.extend(self.sidecars.iter().map(|sidecar| sidecar.output));
        let of_control = |control: &SavedControl| {
            [control.fd].into_iter().chain(control.clients.iter().map(|client| client.fd)).collect::<Vec<_>>()
        };
        all.extend(self.control.iter().flat_map(of_control));
        all.extend(self.pid_file.iter().map(|file| file.fd));
        all.extend(self.publish.iter().map(|socket| socket.fd));
        all.extend(self.guard.iter().map(|guard| guard.link));
        if let Some(apps) = &self.apps {
            all.extend(apps.channel.descriptors());
            all.extend(apps.children.iter().flat_map(of_child));
            all.extend(apps.orphaned_outputs.iter().map(|output| output.fd));
        }
        all
    }

    /// Writes the state to a memory file that can no longer be changed.
    ///
    /// # Errors
    /// Fails if a path is not Unicode, the state is too large, or no memory is available.
    pub(crate) fn write(&self) -> io::Result<OwnedFd> {
        let json = serde_json::to_vec(self)?;
        if json.len() as u64 >= MAX_STATE {
            return Err(io::Error::other("the state is too large (try again)"));
        }
        let mut file =
            File::from(memfd_create(c"forkyard-state", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        file.write_all(&json)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all()))?;
        Ok(file.into())
    }

    /// Reads the state. Returns `Ok(None)` if the descriptor is not the result of [`Saved::write`].
    ///
    /// # Errors
    /// Returns a message for the operator if this build cannot use the saved state.
    pub(crate) fn read(descriptor: OwnedFd) -> Result<Option<Self>, String> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let sealed = fcntl(&descriptor, FcntlArg::F_GET_SEALS).is_ok_and(|seals| {
            SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW)
        });
        if !sealed {
            return Ok(None);
        }
        let mut file = File::from(descriptor);
        let mut json = Vec::new();
        let read = file.rewind().and_then(|()| file.take(MAX_STATE).read_to_end(&mut json));
        read.map_err(|error| format!("the running master's state cannot be read: {error}"))?;
        let Ok(Head { format }) = serde_json::from_slice(&json) else { return Ok(None) };
        if format != FORMAT {
            return Err(format!(
                "the running master's state has format {format}, but this build reads only format {FORMAT} (stop and \
                 start the server instead)"
            ));
        }
        let saved = serde_json::from_slice(&json);
        saved.map(Some).map_err(|error| format!("this build cannot decode the running master's state: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upgrade::saved_processes::{SavedSlot, SavedSlotState};

    fn state() -> Saved {
        let (process, phase) = (SavedProcess { pid: 82, started: u64::MAX }, SavedSlotState::Draining { left_ms: 5 });
        let slot = SavedSlot { slot: 3, generation: 2, pid: 77, phase, worn: true, replaced: false };
        let output = |fd| SavedOutput { slot: 3, pid: 77, fd, partial: vec![b'x'] };
        let refusal = SavedRefusal { request: "GET /a".to_owned(), refused: true, left_ms: 1, time_ms: 2, times: 3 };
        let client = SavedClient {
            fd: 17,
            unread: Vec::new(),
            unsent: vec![1],
            asked: true,
            ending: false,
            waiting: SavedWaiting::Scale(3),
        };
        Saved {
            format: FORMAT,
            version: "0.1.0".to_owned(),
            written_ms: Some(1000),
            pid: 1,
            start_command: StartCommand::of("/usr/bin/a b", "/", &["a", "--b"]),
            listeners: vec![SavedListener { fd: 5, bind: "http:127.0.0.1:0".to_owned(), file: Some((1, u64::MAX)) }],
            segment: SavedSegment { fd: 6, file: None },
            lifeline: (7, 8),
            handover: Some((10, 11)),
            roster: Roster {
                generation: 2,
                newest: 3,
                workers: (1, 2),
                limits: (1, 4),
                target: 1,
                reached_full_strength: true,
                slots: vec![slot],
            },
            children: vec![SavedChild {
                pid: 77,
                slot: 3,
                generation: 2,
                age_ms: 1,
                asked_to_leave: true,
                hung: true,
                stop_signal: Some(10),
                declaration: Some(21),
                link: SavedLink::Worker {
                    report: 9,
                    open: true,
                    unread: vec![0xff],
                    last_words: "\"\n".to_owned(),
                    trace: "a+1".to_owned(),
                },
                output: Some(output(12)),
                files: Some(13),
            }],
            orphaned_outputs: vec![output(14)],
            sidecars: vec![SavedSidecar {
                name: "queue".to_owned(),
                pid: 78,
                output: 15,
                partial: vec![b'y'],
                age_ms: 4,
                stop_left_ms: Some(5),
            }],
            jobs_looked_at_ms: Some(-1),
            quarantine: vec![refusal],
            control: Some(SavedControl { fd: 16, path: "/run/c".into(), file: None, clients: vec![client] }),
            pid_file: Some(SavedPidFile { fd: 18, path: "/run/p".into() }),
            publish: Some(SavedPublish { fd: 19, asked: None, path: "/run/e".into(), file: Some((1, 2)) }),
            relay: Some(80),
            guard: Some(SavedGuard { pid: 81, link: 20 }),
            earlier: vec![process],
            strays: vec![SavedStray { process, left_ms: 1000, asked: true, unasked: false, stop_signal: None }],
            apps: None,
        }
    }

    fn memory_file(text: &str, seals: SealFlag) -> OwnedFd {
        let mut file = File::from(memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        file.write_all(text.as_bytes()).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file.into()
    }

    #[test]
    fn a_state_is_read_as_it_was_written_and_names_all_descriptors() {
        let written = state().write().unwrap();
        assert_eq!(Saved::read(written).unwrap(), Some(state()));
        let mut descriptors = state().descriptors();
        descriptors.sort_unstable();
        assert_eq!(descriptors, (5..=21).collect::<Vec<_>>());
    }

    #[test]
    fn all_times_continue_until_the_state_is_read() {
        let mut state = state();
        state.sidecars[0].stop_left_ms = Some(300);
        state.quarantine[0].left_ms = 400;
        let mut starting = state.roster.slots[0];
        starting.phase = SavedSlotState::Starting { left_ms: 500 };
        state.roster.slots.push(starting);
        let leave_left_ms = Some(600);
        let program = SavedProgram {
            started: true,
            seen: true,
            leave_left_ms,
            hidden: false,
            servers: Vec::new(),
            reminded: false,
            awaits_idle: false,
        };
        let link = SavedLink::Program(program);
        state.children.push(SavedChild { link, ..state.children[0].clone() });
        let before = serde_json::to_value(&state).unwrap();
        let read = |state: &Saved| {
            let phases: Vec<SavedSlotState> = state.roster.slots.iter().map(|slot| slot.phase).collect();
            let Saved { children, sidecars, quarantine, .. } = state;
            let ages = [children[0].age_ms, sidecars[0].age_ms];
            (phases, ages, sidecars[0].stop_left_ms, quarantine[0].left_ms)
        };
        assert_eq!(state.catch_up(1100), Duration::from_millis(100));
        let phases = vec![SavedSlotState::Draining { left_ms: 0 }, SavedSlotState::Starting { left_ms: 400 }];
        assert_eq!(read(&state), (phases, [101, 104], Some(200), 300));
        assert_eq!(state.catch_up(1100), Duration::ZERO, "once");
        // Every remaining time and age (recognized by its name) was changed, and no other field.
        let (mut changed, after) = (Vec::new(), serde_json::to_value(&state).unwrap());
        differences(&before, &after, "", &mut changed);
        changed.sort_unstable();
        changed.dedup();
        assert_eq!(changed, ["age_ms", "leave_left_ms", "left_ms", "stop_left_ms", "written_ms"]);
        let text = before.to_string();
        let is_time = |name: &&str| name.ends_with("age_ms") || name.ends_with("left_ms");
        let times: std::collections::BTreeSet<&str> = text.split('"').filter(is_time).collect();
        assert_eq!(times.into_iter().collect::<Vec<_>>(), changed[..4]);
        // If the state does not contain the time at which it was written, no age or remaining time can be adjusted.
        state.written_ms = None;
        assert_eq!(state.catch_up(5000), Duration::ZERO);
    }

    fn differences(one: &serde_json::Value, other: &serde_json::Value, name: &str, found: &mut Vec<String>) {
        use serde_json::Value::{Array, Object};
        match (one, other) {
            (Object(one), Object(other)) => {
                one.iter().for_each(|(name, value)| differences(value, &other[name], name, found));
            }
            (Array(one), Array(other)) => {
                one.iter().zip(other).for_each(|(one, other)| differences(one, other, name, found));
            }
            _ if one != other => found.push(name.to_owned()),
            _ => {}
        }
    }

    #[test]
    fn fields_of_a_later_build_are_ignored_and_a_different_format_is_refused() {
        let text = serde_json::to_string(&state()).unwrap();
        let later = text.replacen('{', "{\"invented\": [1],", 1);
        assert_eq!(Saved::read(memory_file(&later, SealFlag::all())).unwrap(), Some(state()));
        let other = text.replacen("\"format\":1", "\"format\":2", 1);
        let refused = Saved::read(memory_file(&other, SealFlag::all())).unwrap_err();
        assert!(refused.contains("has format 2"), "{refused}");
        let cut = Saved::read(memory_file("{\"format\":1}", SealFlag::all())).unwrap_err();
        assert!(cut.contains("cannot decode"), "{cut}");
    }

    #[test]
    fn a_state_that_is_too_large_to_be_read_is_not_written() {
        let mut large = state();
        large.orphaned_outputs[0].partial = vec![b'x'; 22 << 20];
        assert!(large.write().unwrap_err().to_string().contains("too large"));
    }

    #[test]
    fn a_descriptor_that_is_not_a_sealed_state_is_not_read() {
        let text = serde_json::to_string(&state()).unwrap();
        assert_eq!(Saved::read(memory_file(&text, SealFlag::F_SEAL_SHRINK)).unwrap(), None, "it could still change");
        assert_eq!(Saved::read(memory_file("something else", SealFlag::all())).unwrap(), None);
        assert_eq!(Saved::read(File::open("/dev/null").unwrap().into()).unwrap(), None);
    }
}
