//! Checks the file paths in settings: what exists at the path, and whether a file can be created there.
//!
//! The server makes these checks at startup before it creates a file, and `check` makes the same checks, so that both
//! report the same reason. Each message contains the flag and ends with the remedy.
//!
//! Must not create or change anything.

use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access};

/// The maximum length of a name in a path: `linux/limits.h`.
const NAME_MAX: usize = 255;
/// The maximum length of a path, without the null byte: `linux/limits.h`.
const PATH_MAX: usize = 4095;

/// Whether a symbolic link at the path stands for its target, as for open(2), or for the link itself, as for bind(2) and rename(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Links {
    Follow,
    Keep,
}

/// Returns the directory that contains `path`.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Returns the metadata of the existing file at `path`, or `None` if a file can be created there. `flag` is the flag
/// that chose the path.
///
/// # Errors
/// Returns a message for the operator if no file can have this path, or no file can be created there.
pub(crate) fn examine(path: &Path, links: Links, flag: &str) -> Result<Option<Metadata>, String> {
    let bytes = path.as_os_str().as_bytes();
    if matches!(bytes.rsplit(|&byte| byte == b'/').next(), None | Some(b"" | b"." | b"..")) {
        return Err(format!("it is the path of a directory (add the name of a file, with {flag})"));
    }
    let found = match links {
        Links::Follow => path.metadata(),
        Links::Keep => path.symlink_metadata(),
    };
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENAMETOOLONG) => Err(format!("{} (choose a shorter path with {flag})", too_long(bytes))),
            Some(libc::ELOOP) => {
                Err(format!("the symbolic links form a loop (choose another path with {flag}, or remove the link)"))
            }
            _ if links == Links::Follow => examine_directory(&leads_to(path), flag).map(|()| None),
            _ => examine_directory(path, flag).map(|()| None),
        },
    }
}

fn too_long(path: &[u8]) -> String {
    let longest = path.split(|&byte| byte == b'/').map(<[u8]>::len).max().unwrap_or(0);
    match longest {
        longest if longest > NAME_MAX => {
            format!("a name in the path has {longest} bytes, and the maximum is {NAME_MAX}")
        }
        _ if path.len() > PATH_MAX => format!("the path has {} bytes, and the maximum is {PATH_MAX}", path.len()),
        _ => "a name in the path is longer than its file system allows".to_owned(),
    }
}

/// Checks whether a file can be created in the directory of `path`.
///
/// # Errors
/// Returns a message for the operator if no file can be created there.
pub(crate) fn examine_directory(path: &Path, flag: &str) -> Result<(), String> {
    let directory = directory_of(path);
    let remedy = format!("choose another path with {flag}");
    if let Some(other) = directory.ancestors().find(|above| above.exists()).filter(|above| !above.is_dir()) {
        return Err(format!("{} is not a directory ({remedy})", other.display()));
    }
    let shown = directory.display();
    match access(directory, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) if statvfs(directory).is_ok_and(|found| found.files() > 0 && found.files_free() == 0) => {
            Err(format!("the directory {shown}: its file system has no free inodes (see df -i, or {remedy})"))
        }
        Ok(()) => Ok(()),
        Err(Errno::ENOENT) => Err(format!("the directory {shown} does not exist (create it, or {remedy})")),
        Err(errno @ (Errno::EACCES | Errno::EROFS)) => {
            let cause = errno.desc().to_lowercase();
            Err(format!("the directory {shown}: {cause} (run as a user that can write there, or {remedy})"))
        }
        Err(Errno::ENAMETOOLONG) => {
            Err(format!("{} (choose a shorter path with {flag})", too_long(path.as_os_str().as_bytes())))
        }
        Err(errno) => Err(format!("the directory {shown}: {} ({remedy})", errno.desc().to_lowercase())),
    }
}

/// Returns the kind of the file, if it is neither a regular file nor a symbolic link.
pub(crate) fn special(found: &Metadata) -> Option<&'static str> {
    let kind = found.file_type();
    match () {
        () if kind.is_dir() => Some("a directory"),
        () if kind.is_socket() => Some("a socket"),
        () if kind.is_fifo() => Some("a FIFO"),
        () if kind.is_char_device() || kind.is_block_device() => Some("a device"),
        () => None,
    }
}

/// Returns the path without symbolic links, even if no file exists there yet.
pub(crate) fn leads_to(path: &Path) -> PathBuf {
    const MAX_LINKS: usize = 40;
    let mut path = std::path::absolute(path).unwrap_or_else(|_: io::Error| path.to_owned());
    for _ in 0..MAX_LINKS {
        if let Ok(found) = path.canonicalize() {
            return found;
        }
        let directory = path.parent().map(|parent| parent.canonicalize().unwrap_or_else(|_| parent.to_owned()));
        let (Some(directory), Some(name)) = (directory, path.file_name()) else { return path };
        match path.read_link() {
            Ok(target) => path = directory.join(target),
            Err(_) => return directory.join(name),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_that_no_file_can_have_is_refused_with_the_reason_and_the_flag() {
        let top = tempfile::tempdir().unwrap();
        let at = |path: &str| top.path().join(path);
        std::fs::write(at("file"), "").unwrap();
        std::fs::create_dir(at("directory")).unwrap();
        std::os::unix::fs::symlink("loop", at("loop")).unwrap();
        std::os::unix::fs::symlink("none/x", at("dangling")).unwrap();
        std::os::unix::fs::symlink("new", at("to-new")).unwrap();
        let long = "x".repeat(256);
        let examine = |path: &str, links| examine(&at(path), links, "--flag").map(|found| found.is_some());
        for (path, both, cause) in [
            ("new/", true, "it is the path of a directory"),
            ("file/", true, "it is the path of a directory"),
            ("directory/..", true, "it is the path of a directory"),
            (&long, true, "a name in the path has 256 bytes, and the maximum is 255"),
            (&format!("{long}/x"), true, "a name in the path has 256 bytes"),
            (&"x/".repeat(3000), true, "it is the path of a directory"),
            (&format!("{}x", "x/".repeat(3000)), true, "bytes, and the maximum is 4095"),
            ("loop/x", true, "symbolic links form a loop"),
            ("loop", false, "symbolic links form a loop"),
            ("dangling", false, "none does not exist (create it"),
            ("none/x", true, "none does not exist (create it"),
            ("file/x", true, "file is not a directory"),
            ("file/x/y", true, "file is not a directory"),
        ] {
            let refused = examine(path, Links::Follow).unwrap_err();
            assert!(refused.contains(cause) && refused.contains("--flag"), "{path}: {refused}");
            match examine(path, Links::Keep) {
                Err(refused) => assert!(both && refused.contains(cause) && refused.contains("--flag"), "{refused}"),
                Ok(is_there) => assert!(!both && is_there, "{path}: the link itself"),
            }
        }
        for (path, is_there) in [("file", true), ("directory", true), ("to-new", false), ("new", false)] {
            assert_eq!(examine(path, Links::Follow), Ok(is_there), "{path}");
        }
    }
}
