//! Runs programs for which some system calls do not exist, using `tests/programs/refuse.c`.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::limit::InTime as _;
use super::program;

/// Starts programs for which some system calls do not exist.
pub struct Refuse {
    _directory: TempDir,
    pub path: PathBuf,
}

impl Refuse {
    pub fn compile() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("refuse");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/refuse.c");
        let mut compiler = Command::new("gcc");
        let output = compiler.args(["-Wall", "-O1", "-o"]).arg(&path).arg(source).output_in_time();
        let output = output.expect("gcc is installed (scripts/test installs it)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { _directory: directory, path }
    }

    /// Returns a command that runs the program `name`, and for which these system calls fail.
    pub fn command(&self, errno: i32, calls: &[i64], name: &str) -> Command {
        let mut command = Command::new(&self.path);
        command.args(arguments(errno, calls)).arg(program(name));
        command
    }
}

/// System calls that were added after Linux 4.4, and that the server or its libraries use.
pub const NEWER: &[i64] = &[
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_close_range,
    libc::SYS_clone3,
    libc::SYS_openat2,
    libc::SYS_statx,
    libc::SYS_faccessat2,
    libc::SYS_epoll_pwait2,
    libc::SYS_io_uring_setup,
    libc::SYS_copy_file_range,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_rseq,
    libc::SYS_futex_waitv,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_memfd_secret,
];

/// Returns the arguments of `refuse` that precede the command.
pub fn arguments(errno: i32, calls: &[i64]) -> Vec<String> {
    let numbers = calls.iter().map(ToString::to_string);
    [errno.to_string()].into_iter().chain(numbers).chain(["--".to_owned()]).collect()
}
