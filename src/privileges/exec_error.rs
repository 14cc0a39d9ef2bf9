//! Explains, for the log, why a program could not be executed. The kernel's error alone identifies neither the file nor
//! the user.
//!
//! The checks run in the master, which may have more access than the user of the process.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::Visitor;
use crate::config::Program;
use crate::config::privileges::PrivilegesConfig;
use crate::sys;
use crate::sys::file_path::directory_of;

/// Returns a message with the command, the user, the directory and the cause.
pub(super) fn explain(error: &io::Error, program: &Program, config: &PrivilegesConfig) -> String {
    let directory = match (&config.chdir, &config.chroot) {
        (Some(directory), _) => directory.clone(),
        (None, Some(_)) => PathBuf::from("/"),
        (None, None) => std::env::current_dir().unwrap_or_else(|_| PathBuf::from(".")),
    };
    let path = directory.join(&program.path);
    let root = config.chroot.as_deref().unwrap_or(Path::new("/"));
    let seen = root.join(path.strip_prefix("/").unwrap_or(&path));
    let user = match &config.user {
        Some(user) => user.name.clone().unwrap_or_else(|| user.uid.to_string()),
        None => nix::unistd::geteuid().to_string(),
    };
    let cause = cause(error, &seen, config);
    format!("cannot execute {} as user {user} in {}: {cause}", program.path.display(), directory.display())
}

fn cause(error: &io::Error, seen: &Path, config: &PrivilegesConfig) -> String {
    let mode = seen.metadata().map(|found| found.permissions().mode());
    match (error.raw_os_error(), mode) {
        (Some(libc::ENOENT), Ok(_)) => {
            "its interpreter does not exist (see the first line of the script, or file(1) for the loader)".to_owned()
        }
        (Some(libc::ENOENT), Err(_)) => "there is no such file (install it, or correct the path)".to_owned(),
        (Some(libc::EACCES), mode) => {
            let barred = Visitor::of(config).and_then(|visitor| visitor.barred_at(directory_of(seen)));
            match (barred, mode) {
                (Some(directory), _) => format!("permission denied: the user cannot enter {}", directory.display()),
                (None, Ok(mode)) if mode & 0o111 == 0 => "it is not executable (use chmod +x)".to_owned(),
                (None, _) => "permission denied: the user cannot execute it or its interpreter".to_owned(),
            }
        }
        _ => sys::explain(error),
    }
}
