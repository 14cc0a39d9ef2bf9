//! Starts CGI runners (`cgi_runner/`), which are app processes that start a CGI program for each request.
//!
//! A runner is forked and not executed, so that it works with `--chroot`, where the file of this program is missing. It
//! keeps only its private socket and the pipe for its output, and drops its privileges before it accepts a connection.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;

use nix::sys::prctl;
use nix::unistd::{Pid, getpid, setpgid};

use super::spawn::{OF_THE_MASTER, SpawnSettings, Spawner};
use crate::cgi_runner::{CgiRunner, complain};
use crate::config::Program;
use crate::master::signals::SignalInbox;
use crate::net::publish_socket;
use crate::sys;

/// The variables of a request are larger than they were at the gateway, which adds its own.
const ROOM_FOR_VARIABLES: usize = 64 << 10;

impl Spawner {
    /// Starts a runner that accepts connections on `socket`.
    pub(super) fn start_cgi_runner(
        &self,
        program: &Program,
        settings: &SpawnSettings,
        (slot, generation): (u32, u64),
        signals: &SignalInbox,
        socket: OwnedFd,
        output: OwnedFd,
    ) -> io::Result<Pid> {
        let null = OwnedFd::from(File::open("/dev/null")?);
        let runner = CgiRunner {
            listener: socket,
            program: program.clone(),
            privileges: Arc::clone(&settings.privileges),
            max_params: settings.config.limits.max_params.saturating_mul(2).saturating_add(ROOM_FOR_VARIABLES),
        };
        let master = getpid();
        // The child must not drop the descriptors that it closes, so it does not own them.
        let (output, null) = (&output, &null);
        sys::fork(move || {
            let begun = (|| {
                signals.leave();
                prctl::set_name(c"cgi-runner")?;
                setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
                sys::announce(getpid());
                sys::replace(0, null)?;
                [1, 2].into_iter().try_for_each(|fd| sys::replace(fd, output))?;
                sys::close_all_except(&[0, 1, 2, runner.listener.as_raw_fd()]);
                sys::forget_environment(OF_THE_MASTER);
                settings.privileges.apply(slot)?;
                for (name, value) in
                    [("FORKYARD_SLOT", slot.to_string()), ("FORKYARD_GENERATION", generation.to_string())]
                {
                    sys::set_environment(name, value);
                }
                if let Some(socket) = &settings.events {
                    sys::set_environment(publish_socket::VARIABLE, socket);
                }
                // This must come after the privileges are dropped, because the kernel resets the parent-death signal when the
                // user changes.
                sys::begin_like_program(master)
            })();
            match begun {
                Ok(()) => runner.serve(),
                Err(error) => {
                    complain(&error);
                    1
                }
            }
        })
    }
}
