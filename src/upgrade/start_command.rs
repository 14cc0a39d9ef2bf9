//! Records the command that started this program. An upgrade runs the same command again.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::{env, io};

use serde::{Deserialize, Serialize};

/// The command that started the server. It is recorded at the first startup, before the working directory changes, and
/// kept through upgrades.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StartCommand {
    /// The path by which the program was called. Each upgrade resolves a symbolic link in it again, so that the link may point to
    /// the next release.
    pub(crate) program: PathBuf,
    /// The directory to which relative paths on the command line refer. Empty if the directory had been removed before
    /// startup.
    pub(crate) directory: PathBuf,
    /// The arguments of the first startup. They are kept because a script in the program's place may add its own
    /// arguments at each upgrade. Empty if the first build did not record them.
    #[serde(default)]
    arguments: Vec<OsString>,
}

/// Identifies a file and its content version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileIdentity {
    inode: (u64, u64),
    size: u64,
    changed: (i64, i64),
}

impl FileIdentity {
    /// # Errors
    /// Fails if the file does not exist.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let metadata = path.metadata()?;
        Ok(Self {
            inode: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

impl StartCommand {
    /// # Errors
    /// Fails if the path of the running program is not available.
    pub(crate) fn record() -> io::Result<Self> {
        let directory = env::current_dir().unwrap_or_default();
        // The kernel returns this path with symbolic links resolved.
        let running = place_of(env::current_exe()?);
        let called = env::args_os().next().map(PathBuf::from).unwrap_or_default();
        let mut candidates = vec![directory.join(&called)];
        if called.components().count() == 1 {
            let directories = env::var_os("PATH").unwrap_or_default();
            candidates = env::split_paths(&directories).map(|place| directory.join(place).join(&called)).collect();
        }
        let is_this = |path: &PathBuf| same_file(path, Path::new("/proc/self/exe"));
        let program = candidates.into_iter().find(is_this).unwrap_or(running);
        Ok(Self { program, directory, arguments: env::args_os().collect() })
    }

    /// Returns the arguments, with the name by which the program was called.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        if self.arguments.is_empty() { env::args_os().collect() } else { self.arguments.clone() }
    }
}

/// Returns the original path of a file that was replaced after its execution: the kernel appends " (deleted)" to its
/// path.
fn place_of(executable: PathBuf) -> PathBuf {
    match executable.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(path) if !executable.exists() => PathBuf::from(OsStr::from_bytes(path)),
        Some(_) | None => executable,
    }
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((FileIdentity::of(one), FileIdentity::of(other)), (Ok(one), Ok(other)) if one.inode == other.inode)
}

#[cfg(test)]
impl StartCommand {
    pub(crate) fn of(program: &str, directory: &str, arguments: &[&str]) -> Self {
        Self {
            program: program.into(),
            directory: directory.into(),
            arguments: arguments.iter().map(OsString::from).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_is_found() {
        let start_command = StartCommand::record().unwrap();
        assert!(same_file(&start_command.program, Path::new("/proc/self/exe")), "{start_command:?}");
        assert!(start_command.program.is_absolute() && start_command.directory.is_absolute(), "{start_command:?}");
    }

    #[test]
    fn a_program_that_was_replaced_before_it_looked_is_found_in_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let (place, marked) = (directory.path().join("a"), directory.path().join("a (deleted)"));
        assert_eq!(place_of(place.clone()), place);
        assert_eq!(place_of(marked.clone()), place);
        std::fs::write(&marked, "").unwrap();
        assert_eq!(place_of(marked.clone()), marked, "the file really has this name");
    }

    #[test]
    fn a_file_that_is_written_to_has_a_different_identity() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        assert!(FileIdentity::of(&path).is_err());
        std::fs::write(&path, "one").unwrap();
        let before = FileIdentity::of(&path).unwrap();
        assert_eq!(FileIdentity::of(&path).unwrap(), before);
        std::fs::write(&path, "three").unwrap();
        assert_ne!(FileIdentity::of(&path).unwrap(), before);
    }
}
