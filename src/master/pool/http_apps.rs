//! Starts app processes that speak HTTP or SCGI, and explains why such a process is not ready.
//!
//! The process gets its listening socket as descriptor 3, as from systemd (sd_listen_fds(3)), or its command contains the
//! port or the path on which it must listen. Its standard input is /dev/null; with SCGI, it is the listening socket, which
//! some SCGI programs expect there.
//!
//! Only gateways can connect to an inherited socket or to a path, and they write the forwarding headers themselves.
//! `FORWARDED_ALLOW_IPS` makes gunicorn and uvicorn believe these headers, although the peer of a Unix socket has no
//! address. Every local user can connect to a port, so a process on a port keeps the server's own default.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};

use nix::unistd::Pid;

use super::Pool;
use super::spawn::{Launch, SpawnSettings, Spawner, explain, to_pass};
use crate::config::gateway::{Backend, ListenMethod};
use crate::config::{Config, Program};
use crate::net::app_endpoint::ListenOn;
use crate::sys::{LISTEN_FD, ListenerToPass};
use crate::{privileges, sys};

/// Set by the service manager of a process. A foreign value would make SvelteKit refuse to start, for example.
const LISTEN_NAMES: &str = "LISTEN_FDNAMES";
const TRUSTED_PROXIES: &str = "FORWARDED_ALLOW_IPS";

impl Spawner {
    /// Starts an app process that accepts connections on `listen`, over HTTP or SCGI.
    pub(super) fn start_http_app(
        &self,
        program: &Program,
        settings: &SpawnSettings,
        slot: u32,
        generation: u64,
        listen: ListenOn,
        (write, read): (OwnedFd, BorrowedFd<'_>),
    ) -> io::Result<Pid> {
        let arguments = listen.fill_in(&program.arguments);
        let (listener, port) = match listen {
            ListenOn::Socket(socket) => (Some(ListenerToPass::new(socket)?), None),
            ListenOn::Port(port) => (None, Some(port)),
            ListenOn::Path(_) => (None, None),
        };
        let input = match &listener {
            Some(listener) if settings.config.backend() == Backend::Scgi => Stdio::from(listener.duplicate()?),
            Some(_) | None => Stdio::null(),
        };
        let segment = to_pass(&self.segment)?;
        let mut command = self.command(program, settings, (slot, generation), &segment, write)?;
        command.args(arguments).stdin(input).env_remove(LISTEN_NAMES);
        match port {
            Some(port) => _ = command.env("PORT", port.to_string()),
            None => set_unless_configured(&mut command, &settings.config, TRUSTED_PROXIES, "*"),
        }
        let steps = settings.privileges.steps(slot).map_err(io::Error::other)?;
        let prepare = move || privileges::carry_out_before_exec(&steps);
        let pass = [segment.as_raw_fd()];
        let child = match &listener {
            Some(listener) => {
                command.env("FORKYARD_LISTEN_FD", LISTEN_FD.to_string());
                let clear = settings.config.privileges.clear_env;
                sys::spawn_with_listener(&mut command, &program.name, clear, &pass, listener, prepare)
            }
            None => sys::spawn(&mut command, &pass, prepare),
        };
        let child = child.map_err(|error| explain(&error, read, &settings.privileges, program))?;
        Ok(Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?))
    }
}

fn set_unless_configured(command: &mut Command, config: &Config, name: &str, value: &str) {
    if !config.privileges.variables.iter().any(|variable| variable.name == name) {
        command.env(name, value);
    }
}

/// Checks that a new command listens as the running one does: the addresses are created once.
///
/// # Errors
/// Returns a message for the operator.
pub(super) fn expect_same_address(config: &Config, running: &Program, new: &Program) -> Result<(), String> {
    let method = |program: &Program| ListenMethod::of_command(config.backend(), &program.arguments);
    if method(running)? == method(new)? {
        return Ok(());
    }
    Err("COMMAND uses {fd}, {port} and {socket} differently than the running command, which requires a restart"
        .to_owned())
}

impl Pool {
    /// Returns the likely causes for a process that was not ready in time, or `None` if they are unknown.
    pub(in crate::master) fn why_not_ready(&self, pid: Pid) -> Option<String> {
        let child = self.children.get(&pid)?;
        if child.declaration.is_some() {
            return Some("it has not written to the descriptor in FORKYARD_READY (--ready-by descriptor)".to_owned());
        }
        if let Some(answer) = child.answer_to_ready_check() {
            return Some(answer);
        }
        let Launch::App(first, ..) = &self.spawner.launch else { return None };
        Some(why_not_ready(&self.spawner.current.config, first).to_owned())
    }
}

fn why_not_ready(config: &Config, program: &Program) -> &'static str {
    match (config.backend(), ListenMethod::of_command(config.backend(), &program.arguments)) {
        (Backend::Fastcgi | Backend::Cgi, _) => "it accepts no connection on descriptor 0",
        (Backend::Http | Backend::Scgi, Ok(ListenMethod::Port)) => "it does not listen on 127.0.0.1 at {port}",
        (Backend::Http | Backend::Scgi, Ok(ListenMethod::Path)) => "it does not listen on the Unix socket {socket}",
        (Backend::Scgi, Ok(ListenMethod::Inherited) | Err(_)) => {
            "it accepts no connection on descriptor 0 or 3: it may listen on an address of its own (use {port} or {socket} \
             in COMMAND)"
        }
        (Backend::Http, Ok(ListenMethod::Inherited) | Err(_)) => {
            "it accepts no connection on descriptor 3: it may listen on an address of its own (use {fd}, {port} or {socket} in COMMAND), \
             or COMMAND may be a shell that runs the server without exec"
        }
    }
}
