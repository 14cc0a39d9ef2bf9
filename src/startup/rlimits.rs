//! Checks that the limits of `--rlimit` allow a worker the minimum that it needs, to the extent that this minimum is
//! known before the first worker starts.
//!
//! These are lower bounds: a worker needs more, and the application needs more still. The needs of an external program are
//! not known.

use forkyard_shm::Segment;
use nix::sys::resource::Resource;
use nix::unistd::getpid;

use super::memory;
use crate::config::privileges::ResourceLimit;
use crate::config::{Config, format_size};
use crate::sys;

/// Stack size of the serving thread, the default of the standard library.
const STACK: u64 = 2 << 20;
/// Descriptors of a worker apart from its listening sockets: the standard ones, the segment, its pipes and its event
/// loop.
const DESCRIPTORS: u64 = 16;

/// Checks the limits of a worker; those of an external program are not checked.
///
/// # Errors
/// Returns a message for the operator that names every limit with which no worker can start.
pub(crate) fn check(config: &Config, executes: bool) -> Result<(), String> {
    if executes {
        return Ok(());
    }
    let limits = &config.privileges.limits;
    // The last limit for a resource takes effect.
    let last = |limit: &&ResourceLimit| limits.iter().rfind(|other| other.resource == limit.resource) == Some(*limit);
    let causes: Vec<String> = limits.iter().filter(last).filter_map(|limit| too_low(limit, config)).collect();
    if causes.is_empty() { Ok(()) } else { Err(causes.join("; ")) }
}

fn too_low(limit: &ResourceLimit, config: &Config) -> Option<String> {
    let too_low = |least: u64| limit.soft < least;
    match limit.resource {
        Resource::RLIMIT_AS => {
            // A worker begins as a copy of this process.
            let shared = Segment::size(&memory::plan(config)).ok()?;
            let least = sys::process_kib(getpid(), "VmSize:")?.saturating_mul(1024).saturating_add(shared);
            too_low(least).then(|| {
                format!(
                    "--rlimit {limit}: a worker needs more than {} MiB of address space, {} MiB of it for shared memory (raise \
                     the limit, or lower --cache or --events)",
                    least >> 20,
                    shared >> 20
                )
            })
        }
        Resource::RLIMIT_DATA => {
            let stack = if std::env::var_os("RUST_MIN_STACK").is_none() { STACK } else { 0 };
            let least = sys::process_kib(getpid(), "VmData:")?.saturating_mul(1024).saturating_add(stack);
            too_low(least).then(|| {
                let least = format_size((least >> 10) << 10);
                format!("--rlimit {limit}: a worker needs more than {least} of data (raise the limit)")
            })
        }
        Resource::RLIMIT_NOFILE => {
            let least = DESCRIPTORS + u64::try_from(config.binds.len()).ok()?;
            too_low(least)
                .then(|| format!("--rlimit {limit}: a worker needs more than {least} descriptors (raise the limit)"))
        }
        Resource::RLIMIT_NPROC => {
            let privileges = &config.privileges;
            let user = privileges.user.as_ref().map_or_else(nix::unistd::geteuid, |user| user.uid);
            let exempt = user.is_root() || privileges.capabilities.is_some();
            let least = u64::from(config.workers.min.max(1)) * 2;
            (too_low(least) && !exempt).then(|| {
                format!(
                    "--rlimit {limit}: {} workers need at least {least} threads, and the limit applies to all threads of their user \
                     (raise the limit)",
                    config.workers.min.max(1)
                )
            })
        }
        _ => None,
    }
}
