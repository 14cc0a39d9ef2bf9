//! How many descriptors the master needs, found out before anything is bound: a pool of which a half cannot be started is worse than
//! one that does not start.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::Config;

/// For the standard ones, the segment, both ends of the lifeline, of the channel and of the signals' pipe, logs, pid file and sockets,
/// a reload's look at the configuration, and what is open for a moment when a process is made.
const OF_THE_MASTER: u64 = 40;
/// Clients of the control socket.
const OF_CLIENTS: u64 = 16;
/// The output of a worker, its reports, and the way by which it gets its log files; of a program its output alone.
const PER_WORKER: u64 = 3;
const PER_PROGRAM: u64 = 1;

/// How many a master with so many processes may have open.
fn needed(config: &Config, runs_programs: bool, processes: u32) -> u64 {
    let per_process = if runs_programs { PER_PROGRAM } else { PER_WORKER };
    let clients = if config.control.socket.is_some() { OF_CLIENTS } else { 0 };
    let beside = config.binds.len() + config.sidecars.sidecars.len();
    u64::from(processes) * per_process + clients + OF_THE_MASTER + u64::try_from(beside).unwrap_or(u64::MAX / 2)
}

/// Looks whether there may be so many.
///
/// # Errors
/// A sentence for the operator.
pub(crate) fn check(config: &Config, runs_programs: bool) -> Result<(), String> {
    let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return Ok(()) };
    let workers = config.workers.max;
    let needed = needed(config, runs_programs, workers);
    if needed <= hard {
        return Ok(());
    }
    Err(format!(
        "{workers} workers need up to {needed} descriptors in the master, and the limit is {hard} (raise it with ulimit -n, or \
         LimitNOFILE= in the unit; or lower --workers)"
    ))
}

/// The same, and has this process use what it may, if it needs more than it was given. Its programs get the limit that it had:
/// [`crate::sys::spawn`].
///
/// # Errors
/// As above.
pub(crate) fn ensure(config: &Config, runs_programs: bool) -> Result<(), String> {
    check(config, runs_programs)?;
    // All may be replaced at once.
    let wanted = needed(config, runs_programs, config.slots());
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < wanted.min(hard) => {
            let wanted = wanted.min(hard);
            crate::sys::note_descriptor_limit(soft, hard);
            setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).map_err(|errno| {
                format!("cannot raise the limit of descriptors to {wanted}: {} (raise ulimit -n)", errno.desc())
            })
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_counts() {
        let config = |workers: &str| {
            let arguments: Vec<std::ffi::OsString> = ["x", "--workers", workers].map(Into::into).to_vec();
            match crate::cli::parse_linked(&arguments, &crate::cli::Identity::default()).unwrap() {
                crate::cli::Invocation::Serve(request) => request.config,
                other => panic!("it is to serve: {other:?}"),
            }
        };
        let config = config("2..100");
        assert_eq!(needed(&config, false, 100) - needed(&config, false, 1), 99 * 3);
        assert_eq!(needed(&config, true, 100) - needed(&config, true, 1), 99);
    }
}
