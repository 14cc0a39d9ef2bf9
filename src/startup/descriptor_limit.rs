//! Checks, before anything is bound, that the master may open as many descriptors as it needs. It is better to fail at
//! startup than to run a server that cannot start half of its workers.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::Config;

/// Descriptors of the master itself: the standard descriptors, the segment, both ends of the lifeline, of the channel
/// and of the signal pipe, logs, pid file, sockets, the configuration file during a reload, and descriptors that are
/// open briefly while a process is created.
const OF_THE_MASTER: u64 = 40;
/// Connections of control socket clients.
const OF_CLIENTS: u64 = 16;
/// The output of a worker, its reports, and the socket that passes log files to it.
const PER_WORKER: u64 = 3;
/// The output of a program.
const PER_PROGRAM: u64 = 1;

/// The private socket of an app process, and the descriptor for connecting to it.
const PER_APP_SLOT: u64 = 2;
/// As for a worker, and the descriptor that wakes the gateway.
const PER_GATEWAY: u64 = PER_WORKER + 1;

/// Returns the number of descriptors that a master with this many processes may have open.
fn needed(config: &Config, runs_programs: bool, processes: u32) -> u64 {
    let per_process = if runs_programs { PER_PROGRAM } else { PER_WORKER };
    let clients = if config.control.socket.is_some() { OF_CLIENTS } else { 0 };
    let others = config.binds.len() + config.sidecars.sidecars.len();
    let of_gateways = if config.gateway.is_some() {
        u64::from(config.slots()) * PER_APP_SLOT + u64::from(config.of_gateways().slots()) * PER_GATEWAY
    } else {
        0
    };
    let others = u64::try_from(others).unwrap_or(u64::MAX / 2);
    u64::from(processes) * per_process + clients + OF_THE_MASTER + others + of_gateways
}

/// Checks the hard limit.
///
/// # Errors
/// Returns a message for the operator if the limit is too low.
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

/// Checks the hard limit, and raises the soft limit if it is too low for the master. Programs start with the original
/// soft limit: [`crate::sys::spawn`].
///
/// # Errors
/// Fails as [`check`] does, or if the limit cannot be raised.
pub(crate) fn ensure(config: &Config, runs_programs: bool) -> Result<(), String> {
    check(config, runs_programs)?;
    // All processes may be in the middle of a replacement at the same time.
    let wanted = needed(config, runs_programs, config.slots());
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < wanted.min(hard) => {
            let wanted = wanted.min(hard);
            crate::sys::note_descriptor_limit(soft, hard);
            setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).map_err(|errno| {
                format!("cannot raise the descriptor limit to {wanted}: {} (raise it with ulimit -n)", errno.desc())
            })
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_needs_descriptors() {
        let config = |workers: &str| {
            let arguments: Vec<std::ffi::OsString> = ["x", "--workers", workers].map(Into::into).to_vec();
            match crate::cli::parse_linked(&arguments, &crate::cli::AppInfo::default()).unwrap() {
                crate::cli::Invocation::Serve(request) => request.config,
                other => panic!("not a request to serve: {other:?}"),
            }
        };
        let config = config("2..100");
        assert_eq!(needed(&config, false, 100) - needed(&config, false, 1), 99 * 3);
        assert_eq!(needed(&config, true, 100) - needed(&config, true, 1), 99);
    }
}
