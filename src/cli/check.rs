//! What `check` tries beyond the meaning of the settings: whether this machine has what they name. Nothing is made,
//! bound or started.

use std::path::Path;

use nix::unistd::{AccessFlags, access};

use super::Request;
use crate::config::Program;
use crate::privileges::Privileges;
use crate::{listen, publish_socket};

/// What stands in the way of serving, and what an operator may want to know.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) errors: Vec<String>,
    pub(crate) notes: Vec<String>,
}

pub(crate) fn examine(request: &Request) -> Findings {
    let mut findings = Findings::default();
    let config = &request.config;
    if let Some((command, _)) = &request.program
        && let Err(cause) = Program::for_privileges(command, &config.privileges)
    {
        findings.errors.push(cause);
    }
    if let Err(cause) = Privileges::resolve(&config.privileges, request.program.is_some()) {
        findings.errors.push(cause);
    }
    if let Some(file) = &config.privileges.pid_file
        && let Err(cause) = writable(file)
    {
        findings.errors.push(format!(
            "cannot write the pid file {}: {cause} (choose another one with --pid-file)",
            file.display()
        ));
    }
    for bind in &config.binds {
        match listen::examine(bind) {
            Ok(None) => {}
            Ok(Some(note)) => findings.notes.push(note),
            Err(cause) => findings.errors.push(cause),
        }
    }
    if let Some(path) = &config.control.socket {
        match listen::examine_path(path, "--control") {
            Ok(None) => {}
            Ok(Some(note)) => findings.notes.push(format!("control socket {}: {note}", path.display())),
            Err(cause) => findings.errors.push(format!("control socket {}: {cause}", path.display())),
        }
    }
    match publish_socket::examine(config) {
        Ok(note) => findings.notes.extend(note),
        Err(cause) => findings.errors.push(cause),
    }
    if let Some(file) = &config.cache.file {
        if config.cache.bytes == 0 {
            findings.errors.push("--cache-file has no cache to keep (give its size with --cache)".to_owned());
        }
        if let Err(cause) = writable(file) {
            findings.errors.push(format!(
                "cannot keep the cache in {}: {cause} (choose another file with --cache-file)",
                file.display()
            ));
        }
    }
    findings
}

/// Whether a file can be written, or made.
fn writable(file: &Path) -> Result<(), String> {
    if file.exists() {
        return access(file, AccessFlags::R_OK | AccessFlags::W_OK).map_err(|errno| errno.desc().to_lowercase());
    }
    listen::examine_folder(file)
}
