//! Explains errors of system calls to operators.

use std::error::Error;
use std::io;

use nix::sys::resource::{Resource, getrlimit};

/// Any error that can be sent to another thread.
pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

/// Formats a system error for the operator. If a limit has caused the error, the text includes the setting to raise.
pub(crate) fn explain(error: &io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EMFILE) => {
            let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
            return format!(
                "{error}: the limit of this process is {limit} descriptors (raise it with ulimit -n, or LimitNOFILE= in the unit)"
            );
        }
        Some(libc::ENFILE) => "the system-wide limit of open files is reached (raise it with: sysctl fs.file-max)",
        Some(libc::EAGAIN) => {
            "a limit of processes is reached (raise ulimit -u, TasksMax= in the unit, or pids.max of the container)"
        }
        Some(libc::EFBIG) => {
            "the file would exceed the size limit of this process (raise ulimit -f, or LimitFSIZE= in the unit)"
        }
        Some(libc::ENOMEM) => {
            "no memory is available (raise the memory limit, or use fewer workers or a smaller cache)"
        }
        _ => return error.to_string(),
    };
    format!("{error}: {hint}")
}
