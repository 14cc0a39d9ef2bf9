//! How operators reach the master, and where its configuration was read.

use std::path::PathBuf;

use super::Config;

/// As in [`super::Config`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ControlConfig {
    /// The control socket; `None` for none.
    pub(crate) socket: Option<PathBuf>,
    /// The configuration file.
    pub(crate) file: Option<PathBuf>,
}

/// The configuration after a reload: `read`, but what cannot change in a running master is as it was in `running`. And the
/// names of the flags of which that is true and that have changed.
pub(crate) fn reloaded(running: &Config, read: Config) -> (Config, Vec<String>) {
    let mut fixed = Vec::new();
    let mut differs = |flag: &str, differs: bool| {
        if differs {
            fixed.push(format!("--{flag}"));
        }
    };
    differs("bind", running.binds != read.binds);
    differs("backlog", running.backlog != read.backlog);
    differs("socket-mode", running.socket_mode != read.socket_mode);
    differs("workers", running.workers != read.workers);
    differs("cache", running.cache.bytes != read.cache.bytes);
    differs("cache-max-entry", running.cache.max_entry != read.cache.max_entry);
    differs("cache-file", running.cache.file != read.cache.file);
    differs("start-timeout", running.start_timeout != read.start_timeout);
    differs("drain-timeout", running.drain_timeout != read.drain_timeout);
    differs("respawn-rate", running.respawn_rate != read.respawn_rate);
    differs("control", running.control != read.control);
    let config = Config {
        binds: running.binds.clone(),
        backlog: running.backlog,
        socket_mode: running.socket_mode,
        workers: running.workers,
        cache: running.cache.clone(),
        start_timeout: running.start_timeout,
        drain_timeout: running.drain_timeout,
        respawn_rate: running.respawn_rate,
        control: running.control.clone(),
        ..read
    };
    (config, fixed)
}
