//! Explains errors of system calls to operators.

use std::io;

use nix::sys::resource::{Resource, getrlimit};

/// Formats a system error for the operator; for a limit, with the setting to raise.
pub(crate) fn explain(error: &io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EMFILE) => {
            let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
            return format!(
                "{error}: this process may have {limit} descriptors (raise it with ulimit -n, or LimitNOFILE= in the unit)"
            );
        }
        Some(libc::ENFILE) => "the whole system has no more descriptors (raise fs.file-max)",
        Some(libc::EAGAIN) => {
            "no more processes are allowed (raise ulimit -u, TasksMax= in the unit, or pids.max of the container)"
        }
        Some(libc::EFBIG) => "files of this process may not be so large (raise ulimit -f, or LimitFSIZE= in the unit)",
        Some(libc::ENOMEM) => "there is no memory (raise the memory limit, or have fewer workers or a smaller cache)",
        _ => return error.to_string(),
    };
    format!("{error}: {hint}")
}
