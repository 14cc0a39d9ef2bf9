//! The control socket, the configuration file, and the settings that a reload can change.

use std::path::PathBuf;

use super::events::EventsConfig;
use super::gateway::GatewayConfig;
use super::privileges::PrivilegesConfig;
use super::{Config, Scaling};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ControlConfig {
    /// Path of the control socket.
    pub(crate) socket: Option<PathBuf>,
    pub(crate) file: Option<PathBuf>,
}

/// What a running master has reserved in shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reserved {
    /// Number of slots for workers or app processes.
    pub(crate) workers: u32,
    /// Number of slots for gateways.
    pub(crate) gateways: u32,
    /// Maximum number of requests that an app process serves at a time.
    pub(crate) units: u32,
}

/// Returns the configuration after a reload: `read`, but with the settings of `running` where a running master cannot
/// change them. Also returns the flags of these settings, if `read` changes them.
///
/// The sockets and the shared memory are created once and shared with running processes; the pid file and the control
/// socket stay as they are, because other programs find this master by them.
pub(crate) fn reloaded(running: &Config, read: Config, reserved: Reserved) -> (Config, Vec<String>) {
    let mut fixed = Vec::new();
    let mut differs = |flag: &str, differs: bool| {
        if differs {
            fixed.push(format!("--{flag}"));
        }
    };
    differs("bind", running.binds != read.binds);
    differs("backlog", running.backlog != read.backlog);
    differs("socket-mode", running.socket_mode != read.socket_mode);
    let workers_fit = read.workers.max < reserved.workers;
    differs("workers", !workers_fit);
    differs("cache", running.cache.bytes != read.cache.bytes);
    differs("cache-max-entry", running.cache.max_entry != read.cache.max_entry);
    differs("cache-file", running.cache.file != read.cache.file);
    differs("events", running.events.bytes != read.events.bytes);
    differs("events-socket", running.publish != read.publish);
    differs("pid-file", running.privileges.pid_file != read.privileges.pid_file);
    differs("control", running.control != read.control);
    let (gateway, keeps_children) = reloaded_gateway(running, &read, reserved, &mut differs);
    // The number of children of php-cgi depends on --workers, and so does what --max-requests applies to.
    let workers = if workers_fit && !keeps_children { read.workers } else { running.workers };
    let max_requests = if keeps_children { running.scaling.max_requests } else { read.scaling.max_requests };
    let config = Config {
        binds: running.binds.clone(),
        backlog: running.backlog,
        socket_mode: running.socket_mode,
        workers,
        cache: running.cache.clone(),
        publish: running.publish.clone(),
        events: EventsConfig { bytes: running.events.bytes, ..read.events },
        privileges: PrivilegesConfig { pid_file: running.privileges.pid_file.clone(), ..read.privileges },
        control: running.control.clone(),
        gateway,
        scaling: Scaling { max_requests, ..read.scaling },
        ..read
    };
    (config, fixed)
}

/// Returns the settings of the gateways after a reload. Whether there are gateways, and what depends on the shared memory
/// that they use, cannot change. Also returns whether php-cgi must keep the children, or the lack of children, that it has.
fn reloaded_gateway(
    running: &Config,
    read: &Config,
    reserved: Reserved,
    differs: &mut impl FnMut(&str, bool),
) -> (Option<GatewayConfig>, bool) {
    let before = running.gateway.as_ref();
    let Some((before, mut gateway)) = before.zip(read.gateway.clone()) else {
        differs("direct", running.gateway.is_some() != read.gateway.is_some());
        return (running.gateway.clone(), false);
    };
    let fits = gateway.gateways.0 < reserved.gateways;
    differs("gateways", !fits);
    differs("backend", before.backend != gateway.backend);
    gateway.backend = before.backend;
    let fits_units = gateway.fits(reserved.units);
    let keeps_children = !fits_units && before.php.or(gateway.php).is_some();
    if !fits_units {
        differs(if keeps_children { "workers" } else { "app-concurrency" }, true);
        (gateway.concurrency, gateway.php) = (before.concurrency, before.php);
    }
    if !fits {
        gateway.gateways = before.gateways;
    }
    (Some(gateway), keeps_children)
}
