//! The privileges of the application's processes. The master resolves and checks them once; each process applies them before any
//! application code runs.
//!
//! - [`steps`] decides which steps are taken, and in which order (pure).
//! - [`drop_calls`] makes the system calls, also between fork and exec.
//! - [`exec_error`] explains why a program could not be executed.
//! - [`path_access`] determines whether a different user can access a path.
//! - [`sandbox`] confines a worker; [`sandbox_syscalls`] is its list of system calls.
//!
//! Imports the configuration, but nothing from master or worker.

mod drop_calls;
mod exec_error;
mod path_access;
mod sandbox;
mod sandbox_syscalls;
mod steps;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use caps::{CapSet, Capability};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Pid, Uid};

pub(crate) use self::path_access::Visitor;
use self::steps::Standing;
pub(crate) use self::steps::Step;
use crate::config::Program;
use crate::config::privileges::{Affinity, Owner, PrivilegesConfig, Variable};
use crate::sys;

/// The privileges of the application's processes, and the steps that change them.
#[derive(Clone, Debug)]
pub(crate) struct Privileges {
    config: PrivilegesConfig,
    standing: Standing,
    steps: Vec<Step>,
}

impl Privileges {
    /// Checks that `config` can be applied. `executes` is true if each process executes a program.
    ///
    /// # Errors
    /// Returns a message for the operator for every setting that cannot be applied. Each message contains the flag.
    pub(crate) fn examine(config: &PrivilegesConfig, executes: bool) -> Result<Self, Vec<String>> {
        let standing =
            standing().map_err(|error| vec![format!("cannot determine the privileges of this process: {error}")])?;
        let mut causes = Vec::new();
        let steps = steps::steps(config, &standing, executes).unwrap_or_else(|found| {
            causes = found;
            Vec::new()
        });
        causes.extend(steps::affinity(config, &standing, 0).err());
        let root = config.chroot.as_deref().unwrap_or(Path::new("/"));
        match is_directory("--chroot", root) {
            Ok(()) => causes.extend(missing_below(root, config)),
            Err(cause) => causes.push(cause),
        }
        let gives_files = config.owner_of_sockets().is_some_and(|owner| owner.user != standing.user);
        if gives_files && !standing.has(Capability::CAP_CHOWN) {
            let flag = if config.socket_owner.is_some() { "--socket-owner" } else { "--user" };
            causes.push(format!(
                "{flag}: this process cannot change the owner of files: it lacks CAP_CHOWN (start it as root)"
            ));
        }
        if causes.is_empty() { Ok(Self { config: config.clone(), standing, steps }) } else { Err(causes) }
    }

    /// Like [`examine`](Self::examine), with all errors in one message.
    ///
    /// # Errors
    /// Fails as [`examine`](Self::examine) does.
    pub(crate) fn resolve(config: &PrivilegesConfig, executes: bool) -> Result<Self, String> {
        Self::examine(config, executes).map_err(|causes| causes.join("; "))
    }

    /// Returns the steps for the process in `slot`, in order.
    ///
    /// # Errors
    /// Returns a message for the operator if a processor of `--cpu-affinity` is not available.
    pub(crate) fn steps(&self, slot: u32) -> Result<Vec<Step>, String> {
        let affinity = steps::affinity(&self.config, &self.standing, slot)?;
        Ok(affinity.into_iter().chain(self.steps.iter().cloned()).collect())
    }

    /// Returns the steps for a process without a slot: the same, except for a processor that depends on the slot.
    ///
    /// # Errors
    /// Fails as [`steps`](Self::steps) does.
    pub(crate) fn steps_without_slot(&self) -> Result<Vec<Step>, String> {
        match self.config.affinity {
            Some(Affinity::Spread) => Ok(self.steps.clone()),
            Some(Affinity::Processors(_)) | None => self.steps(0),
        }
    }

    /// Applies the privileges of its slot to this process, a worker that has just been forked and has one thread. Must
    /// run before any application code. If the user changes, the kernel cancels a parent-death signal that was
    /// requested before.
    ///
    /// # Errors
    /// Returns the step that failed, with the flag that requested it.
    pub(crate) fn apply(&self, slot: u32) -> io::Result<()> {
        self.carry_out_all(self.steps(slot))
    }

    /// Like [`apply`](Self::apply), for a process without a slot.
    ///
    /// # Errors
    /// Fails as [`apply`](Self::apply) does.
    pub(crate) fn apply_without_slot(&self) -> io::Result<()> {
        self.carry_out_all(self.steps_without_slot())
    }

    fn carry_out_all(&self, steps: Result<Vec<Step>, String>) -> io::Result<()> {
        if self.config.clear_env {
            sys::clear_environment();
        }
        for Variable { name, value } in self.config.environment() {
            sys::set_environment(&name, value);
        }
        for step in steps.map_err(io::Error::other)? {
            drop_calls::carry_out(&step).map_err(|error| {
                let (flag, detail) = (step.flag(), step.detail());
                let space = if detail.is_empty() { "" } else { " " };
                io::Error::other(format!("{flag}{space}{detail}: {error}"))
            })?;
        }
        self.config.sandbox.as_ref().map_or(Ok(()), sandbox::enter).map_err(io::Error::other)
    }

    /// Explains why `program` could not be executed with these privileges. The message contains the command, the user
    /// and the directory.
    pub(crate) fn explain_exec(&self, error: &io::Error, program: &Program) -> String {
        exec_error::explain(error, program, &self.config)
    }

    /// Whether the processes may be able to open other files than the master.
    pub(crate) fn change_access(&self) -> bool {
        !self.steps.is_empty() || self.config.sandbox.is_some()
    }

    /// Sets the environment of a program.
    pub(crate) fn set_environment(&self, command: &mut std::process::Command) {
        if self.config.clear_env {
            command.env_clear();
        }
        command.envs(self.config.environment().into_iter().map(|variable| (variable.name, variable.value)));
    }
}

/// Carries out `steps` between fork and exec; async-signal-safe. The flag of a step that fails is written to standard error.
///
/// # Errors
/// Returns the error from that step's system call.
pub(crate) fn carry_out_before_exec(steps: &[Step]) -> io::Result<()> {
    for step in steps {
        drop_calls::carry_out(step).inspect_err(|_| {
            // Only the flag and the detail are written here; the error itself is returned.
            for word in [step.flag(), " ", step.detail()] {
                let _ = nix::unistd::write(io::stderr(), word.as_bytes());
            }
        })?;
    }
    Ok(())
}

/// Changes the owner of an open file if it is a regular file or a socket, belongs to this user, and has only one name.
/// These conditions are necessary because, in a directory to which others can write, a name may lead to any file.
///
/// # Errors
/// Returns the error from the system call.
pub(crate) fn give(file: BorrowedFd<'_>, owner: Owner) -> io::Result<()> {
    give_of(file, nix::unistd::geteuid(), owner)
}

/// Like [`give`], for a file whose owner was changed to `from` before.
///
/// # Errors
/// Returns the error from the system call.
pub(crate) fn give_of(file: BorrowedFd<'_>, from: Uid, owner: Owner) -> io::Result<()> {
    let status = fstat(file)?;
    let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
    if (status.st_uid, status.st_gid) == (owner.user.as_raw(), owner.group.as_raw()) {
        return Ok(());
    }
    let ours = status.st_uid == from.as_raw() && status.st_nlink == 1;
    if !ours || ![SFlag::S_IFREG, SFlag::S_IFSOCK].contains(&kind) {
        return Err(io::Error::other("it belongs to another user, or has more than one name"));
    }
    // fchown(2) does not accept an O_PATH descriptor, but this call does.
    nix::unistd::fchownat(file, c"", Some(owner.user), Some(owner.group), nix::fcntl::AtFlags::AT_EMPTY_PATH)?;
    Ok(())
}

/// Checks the directory of `--chdir` and the paths of the sandbox below this root. Returns a message for each unusable path.
fn missing_below(root: &Path, config: &PrivilegesConfig) -> Vec<String> {
    let chdir = config.chdir.as_ref().and_then(|directory| {
        let is_below = directory.is_absolute() || config.chroot.is_some();
        let seen =
            if is_below { root.join(directory.strip_prefix("/").unwrap_or(directory)) } else { directory.clone() };
        is_directory("--chdir", &seen).err()
    });
    let sandbox = config.sandbox.as_ref().map(|sandbox| sandbox::check(sandbox, root));
    chdir.into_iter().chain(sandbox.into_iter().flatten()).collect()
}

fn is_directory(flag: &str, path: &Path) -> Result<(), String> {
    match path.metadata() {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(format!("{flag}: {} is not a directory", path.display())),
        Err(error) => {
            Err(format!("{flag}: {}: {error} (create the directory, or name another directory)", path.display()))
        }
    }
}

fn standing() -> io::Result<Standing> {
    let effective = caps::read(None, CapSet::Effective).map_err(io::Error::other)?;
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    Ok(Standing {
        user: nix::unistd::geteuid(),
        group: nix::unistd::getegid(),
        capabilities: effective.iter().map(Capability::bitmask).fold(0, |all, one| all | one),
        in_first_namespace: is_in_first_namespace(),
        processors: (0..CpuSet::count()).filter(|&processor| allowed.is_set(processor).unwrap_or(false)).collect(),
        nice: drop_calls::nice()?,
        hard_limits: hard_limits(),
        most_descriptors: number_in("/proc/sys/fs/nr_open").unwrap_or(u64::MAX),
    })
}

/// Returns the hard limits of all resources that the kernel supports.
fn hard_limits() -> Vec<(Resource, u64)> {
    let all = crate::config::privileges::resources();
    all.filter_map(|resource| Some((resource, getrlimit(resource).ok()?.1))).collect()
}

/// Whether this process is in the initial user namespace, in which every user has its own number (user_namespaces(7)).
/// True if /proc is not mounted.
fn is_in_first_namespace() -> bool {
    let Ok(map) = std::fs::read_to_string("/proc/self/uid_map") else { return true };
    map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

fn number_in(path: &str) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
