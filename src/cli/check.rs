//! Implements `check`, which tests whether the settings can be used on this machine. It creates, binds and starts
//! nothing, and reports all errors rather than only the first.

use forkyard_shm::Segment;

use super::ServeRequest;
use crate::config::address::Address;
use crate::config::gateway::GatewayConfig;
use crate::config::privileges::PrivilegesConfig;
use crate::config::{Config, Program};
use crate::logging;
use crate::net::control_listener::ControlListener;
use crate::net::listen;
use crate::net::publish_socket;
use crate::privileges::Privileges;
use crate::startup::{conflicts, descriptor_limit, memory, pid_file, rlimits, systemd};

#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) errors: Vec<String>,
    pub(crate) warnings: Vec<String>,
}

/// Checks all settings. `mistakes` are the errors that were found while the settings were read.
pub(crate) fn examine(request: &ServeRequest, mistakes: Vec<String>) -> Findings {
    let mut findings = Findings { errors: mistakes, warnings: Vec::new() };
    let config = &request.config;
    if let Some(command) = request.program.as_ref().filter(|command| !command.is_empty())
        && let Err(cause) = Program::for_privileges(command, &config.privileges)
    {
        findings.errors.push(cause);
    }
    let executes = request.program.is_some();
    findings.errors.extend(Privileges::examine(&config.privileges, executes).err().into_iter().flatten());
    findings.warnings.extend(config.privileges.of_root().map(ToOwned::to_owned));
    let PrivilegesConfig { chroot, chdir, .. } = &config.privileges;
    let programs = config.sidecars.sidecars.iter().map(|sidecar| sidecar.program(chroot.as_deref(), chdir.as_deref()));
    findings.errors.extend(programs.filter_map(Result::err));
    findings.errors.extend(config.gateway.iter().flat_map(GatewayConfig::examine));
    findings.sockets(config);
    findings.files(config);
    if let Err(error) = Segment::size(&memory::plan(config)) {
        findings.errors.push(format!("{error} (see --cache, --cache-max-entry and --events)"));
    } else {
        match memory::examine(config) {
            Ok(note) => findings.warnings.extend(note),
            Err(cause) => findings.errors.push(cause),
        }
    }
    findings.errors.extend(rlimits::check(config, executes).err());
    findings.warnings.extend(config.contradictions(config.most_descriptors()));
    findings.errors.extend(descriptor_limit::check(config, executes).err());
    findings
}

impl Findings {
    fn sockets(&mut self, config: &Config) {
        for bind in &config.binds {
            match listen::examine(bind, &config.binds) {
                Ok(None) => {}
                Ok(Some(note)) => self.warnings.push(note),
                Err(cause) => self.errors.push(cause),
            }
            if let Address::Systemd(name) = &bind.address
                && let Err(cause) = systemd::sockets(name.as_deref())
            {
                self.warnings.push(format!("{bind}: for this process, {cause}"));
            }
        }
        if let Some(path) = &config.control.socket {
            match listen::examine_path(path, "--control") {
                Ok(None) => {}
                Ok(Some(note)) => self.warnings.push(format!("control socket {}: {note}", path.display())),
                Err(cause) => self.errors.push(ControlListener::fail(path, &cause)),
            }
        }
        match publish_socket::examine(config) {
            Ok(note) => self.warnings.extend(note),
            Err(cause) => self.errors.push(cause),
        }
        self.errors.extend(conflicts::find(config).into_iter().map(|conflict| conflict.text));
    }

    fn files(&mut self, config: &Config) {
        let logs = &config.logs;
        let access = logs.access.as_ref().and_then(|access| access.file.as_ref());
        for (file, flag) in [(logs.file.as_ref(), "--log-file"), (access, "--access-log")] {
            match file.map_or(Ok(None), |file| logging::examine(file, flag)) {
                Ok(note) => self.warnings.extend(note),
                Err(cause) => self.errors.push(cause),
            }
        }
        if let Some(file) = &config.privileges.pid_file {
            match pid_file::examine(file) {
                Ok(note) => self.warnings.extend(note),
                Err(cause) => self.errors.push(cause),
            }
        }
        self.errors.extend(memory::examine_file(config).err());
    }
}
