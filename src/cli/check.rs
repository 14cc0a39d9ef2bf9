//! What `check` tries beyond the meaning of the settings: whether this machine has what they name. Nothing is made,
//! bound or started, and one thing that is wrong hides no other.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use forkyard_shm::Segment;
use nix::unistd::{AccessFlags, access};

use super::Request;
use crate::config::privileges::PrivilegesConfig;
use crate::config::{Config, Program};
use crate::listen::Address;
use crate::privileges::Privileges;
use crate::{descriptors, listen, memory, publish_socket};

/// What stands in the way of serving, and what an operator may want to know.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) errors: Vec<String>,
    pub(crate) notes: Vec<String>,
}

/// `mistakes` are those that were found in reading the settings.
pub(crate) fn examine(request: &Request, mistakes: Vec<String>) -> Findings {
    let mut findings = Findings { errors: mistakes, notes: Vec::new() };
    let config = &request.config;
    if let Some(command) = request.program.as_ref().filter(|command| !command.is_empty())
        && let Err(cause) = Program::for_privileges(command, &config.privileges)
    {
        findings.errors.push(cause);
    }
    findings.errors.extend(unreachable_privileges(&config.privileges, request.program.is_some()));
    findings.notes.extend(config.privileges.of_root().map(ToOwned::to_owned));
    let PrivilegesConfig { chroot, chdir, .. } = &config.privileges;
    let programs = config.helpers.helpers.iter().map(|helper| helper.program(chroot.as_deref(), chdir.as_deref()));
    findings.errors.extend(programs.filter_map(Result::err));
    findings.sockets(config);
    findings.files(config);
    if let Err(error) = Segment::size(&memory::plan(config)) {
        findings.errors.push(format!("{error} (see --cache, --cache-max-entry and --events)"));
    } else {
        match memory::examine(config) {
            Ok(note) => findings.notes.extend(note),
            Err(cause) => findings.errors.push(cause),
        }
    }
    findings.notes.extend(config.contradictions(config.privileges.most_descriptors()));
    findings.errors.extend(descriptors::check(config, request.program.is_some()).err());
    findings
}

impl Findings {
    fn sockets(&mut self, config: &Config) {
        for bind in &config.binds {
            match listen::examine(bind, &config.binds) {
                Ok(None) => {}
                Ok(Some(note)) => self.notes.push(note),
                Err(cause) => self.errors.push(cause),
            }
        }
        if let Some(path) = &config.control.socket {
            match listen::examine_path(path, "--control") {
                Ok(None) => {}
                Ok(Some(note)) => self.notes.push(format!("control socket {}: {note}", path.display())),
                Err(cause) => self.errors.push(format!("control socket {}: {cause}", path.display())),
            }
        }
        match publish_socket::examine(config) {
            Ok(note) => self.notes.extend(note),
            Err(cause) => self.errors.push(cause),
        }
        self.errors.extend(taken_twice(config));
    }

    fn files(&mut self, config: &Config) {
        let logs = &config.logs;
        let access = logs.access.as_ref().and_then(|access| access.file.as_ref());
        for (file, flag) in [(logs.file.as_ref(), "--log-file"), (access, "--access-log")] {
            if let Some(file) = file
                && let Err(cause) = appendable(file)
            {
                let file = file.display();
                self.errors.push(format!("{flag}: cannot open {file}: {cause} (name a file that you can write)"));
            }
        }
        if let Some(file) = &config.privileges.pid_file
            && let Err(cause) = writable(file)
        {
            self.errors.push(format!(
                "cannot write the pid file {}: {cause} (choose another one with --pid-file)",
                file.display()
            ));
        }
        if let Some(file) = &config.cache.file {
            if config.cache.bytes == 0 {
                self.errors.push("--cache-file has no cache to keep (give its size with --cache)".to_owned());
            }
            if let Err(cause) = writable(file) {
                self.errors.push(format!(
                    "cannot keep the cache in {}: {cause} (choose another file with --cache-file)",
                    file.display()
                ));
            }
        }
    }
}

/// All that processes cannot be of what is asked for: each time one thing is found, it is looked at what is left without it.
fn unreachable_privileges(config: &PrivilegesConfig, executes: bool) -> Vec<String> {
    let mut rest = config.clone();
    let mut found = Vec::new();
    // Each turn takes something away.
    while let Err(cause) = Privileges::resolve(&rest, executes) {
        let known = take_away(&mut rest, &cause);
        if !found.contains(&cause) {
            found.push(cause);
        }
        if !known {
            break;
        }
    }
    found
}

/// Takes away what the first flag of a complaint has asked for. False if there is nothing left of it.
fn take_away(config: &mut PrivilegesConfig, cause: &str) -> bool {
    let flag = cause.split([':', ' ']).next().unwrap_or_default();
    let named = |path: &PathBuf| cause.contains(&path.display().to_string());
    match flag {
        "--chroot" => config.chroot.take().is_some(),
        "--chdir" => config.chdir.take().is_some(),
        "--cpu-affinity" => config.affinity.take().is_some(),
        "--nice" => config.nice.take().is_some(),
        "--umask" => config.umask.take().is_some(),
        // One after the other: each may have something wrong with it.
        "--rlimit" => config.limits.pop().is_some(),
        "--user" => config.user.take().is_some(),
        "--group" => config.group.take().is_some(),
        "--supplementary-groups" => config.supplementary_groups.take().is_some(),
        "--capabilities" => config.capabilities.take().is_some(),
        "--no-new-privileges" => config.no_new_privileges.take().is_some(),
        "--socket-owner" => config.socket_owner.take().is_some(),
        "--sandbox" => config.sandbox.take().is_some(),
        "--sandbox-read" | "--sandbox-write" => config.sandbox.as_mut().is_some_and(|sandbox| {
            let paths = if flag == "--sandbox-read" { &mut sandbox.read } else { &mut sandbox.write };
            let before = paths.len();
            paths.retain(|path| !named(path));
            paths.len() < before
        }),
        _ => false,
    }
}

/// Addresses that two sockets of this server are to have.
fn taken_twice(config: &Config) -> Vec<String> {
    let path = |path: &PathBuf| format!("unix:{}", path.display());
    let binds = config.binds.iter().filter_map(|bind| match &bind.address {
        // The system chooses a port for each.
        Address::Tcp(address) if address.ends_with(":0") => None,
        Address::Systemd(_) => None,
        address => Some((address.to_string(), "--bind")),
    });
    let control = config.control.socket.iter().map(|socket| (path(socket), "--control"));
    let publish = config.publish.socket.iter().filter(|_| config.events.bytes > 0);
    let publish = publish.map(|socket| (path(socket), "--events-socket"));
    let all: Vec<(String, &str)> = binds.chain(control).chain(publish).collect();
    let mut twice = Vec::new();
    for (index, (address, flag)) in all.iter().enumerate() {
        if let Some((_, first)) = all[..index].iter().find(|(other, _)| other == address) {
            twice.push(format!(
                "{address} is given twice, by {first} and by {flag} (choose another address for one of them)"
            ));
        }
    }
    twice
}

/// Whether a file can be written, or made.
fn writable(file: &Path) -> Result<(), String> {
    match file.metadata() {
        Ok(found) if found.is_dir() => Err("it is a directory".to_owned()),
        Ok(_) => access(file, AccessFlags::R_OK | AccessFlags::W_OK).map_err(|errno| errno.desc().to_lowercase()),
        Err(_) => makeable(file),
    }
}

/// Whether lines can be added to a file.
fn appendable(file: &Path) -> Result<(), String> {
    match file.metadata() {
        // Whoever reads it would take us for a writer that has left.
        Ok(found) if found.file_type().is_fifo() || found.file_type().is_socket() => {
            access(file, AccessFlags::W_OK).map_err(|errno| errno.desc().to_lowercase())
        }
        Ok(_) => {
            let opened = OpenOptions::new().append(true).custom_flags(libc::O_NONBLOCK).open(file);
            opened.map(drop).map_err(|error| error.to_string())
        }
        Err(_) => makeable(file),
    }
}

fn makeable(file: &Path) -> Result<(), String> {
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if parent.exists() && !parent.is_dir() {
        return Err(format!("{} is not a directory", parent.display()));
    }
    listen::examine_folder(file)
}
