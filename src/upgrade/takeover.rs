//! Receives the state of a running master, in a program that takes over from it or checks whether it could.
//!
//! The environment variables of an upgrade take effect only if their descriptor is a sealed state whose master is this
//! process or, in the upgrade check, its parent. A variable that was inherited from any other process has no effect.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use super::saved_state::{Saved, SavedListener, SavedPidFile, SavedPublish};
use crate::config::Config;
use crate::config::address::{Address, Bind};
use crate::net::app_channel::AppChannel;
use crate::net::control_listener::ControlListener;
use crate::net::handover::Channel;
use crate::net::listen::{self, Listener};
use crate::net::publish_socket::PublishSocket;
use crate::sys;

/// Connects the running workers of a former master to this master and its workers.
#[derive(Debug, Default)]
pub(crate) struct Ties {
    pub(crate) lifeline: Option<(OwnedFd, OwnedFd)>,
    pub(crate) handover: Option<Channel>,
}

/// The environment variable with the number of the state's descriptor.
pub(crate) const STATE: &str = "FORKYARD_UPGRADE_FD";
/// The environment variable that makes the process an upgrade check: the process gets ready, reports this, and exits.
pub(crate) const CHECK: &str = "FORKYARD_UPGRADE_CHECK";

/// Whether this process only checks that it could take over.
pub(crate) fn is_check() -> bool {
    std::env::var_os(CHECK).is_some()
}

/// The part of the former master's state that has not been claimed yet. On drop, the remaining descriptors are closed.
#[derive(Debug)]
pub(crate) struct Takeover {
    pub(crate) saved: Saved,
    /// The `--bind` of each of the former master's sockets, in their order.
    binds: Vec<String>,
    descriptors: BTreeMap<RawFd, OwnedFd>,
    /// Whether this process is an upgrade check: the former master is still running, and has started this process.
    pub(crate) check: bool,
}

impl Takeover {
    /// Finds the state that a former master left to this process.
    ///
    /// # Errors
    /// Returns a message for the operator if there is a state that this build cannot use, or if a check finds no state.
    pub(crate) fn find() -> Result<Option<Self>, String> {
        let number = std::env::var(STATE).ok().and_then(|text| text.parse::<RawFd>().ok());
        let check = is_check();
        let Some(number) = number else {
            return if check {
                Err(format!("{CHECK} is set, but {STATE} is missing or not a number"))
            } else {
                Ok(None)
            };
        };
        let saved = match sys::descriptor(number) {
            Some(descriptor) => Saved::read(descriptor)?,
            None => None,
        };
        let master = if check { nix::unistd::getppid() } else { nix::unistd::getpid() };
        let Some(saved) = saved.filter(|saved| saved.pid == master.as_raw()) else {
            let why = format!("{STATE} does not name the state of the master that started this check");
            return if check { Err(why) } else { Ok(None) };
        };
        // The check inherits only some of the descriptors. The other numbers could refer to any file.
        let left = if check { saved.foundation() } else { saved.descriptors() };
        let mut descriptors = sys::take_over(&[&[number], left.as_slice()].concat());
        descriptors.remove(&number);
        let binds = saved.listeners.iter().map(|listener| listener.bind.clone()).collect();
        Ok(Some(Self { saved, binds, descriptors, check }))
    }

    /// Returns the sockets that were created for this `--bind`, with the device and inode of their files. There may be
    /// several sockets if systemd passed them or if a name was resolved to several addresses; otherwise there is at
    /// most one. Each of several `--bind` flags with port 0 receives its own socket.
    pub(crate) fn listeners(&mut self, bind: &Bind) -> Vec<(OwnedFd, Option<(u64, u64)>)> {
        let text = bind.to_string();
        let most = if bind.address.may_be_several() { usize::MAX } else { 1 };
        let ours: Vec<SavedListener> = self.saved.listeners.extract_if(.., |one| one.bind == text).take(most).collect();
        ours.into_iter().filter_map(|one| Some((self.claim(one.fd)?, one.file))).collect()
    }

    /// Returns the shared memory, and the path of its file, if any.
    pub(crate) fn segment(&mut self) -> Option<(OwnedFd, Option<PathBuf>)> {
        Some((self.claim(self.saved.segment.fd)?, self.saved.segment.file.clone()))
    }

    pub(crate) fn ties(&mut self, listeners: &[Listener]) -> Ties {
        Ties { lifeline: self.lifeline(), handover: self.handover(listeners) }
    }

    /// Returns the channel on which the old workers hand connections over, if `listeners` are the former master's
    /// sockets in the same order: a connection in the channel identifies its listener by index.
    fn handover(&mut self, listeners: &[Listener]) -> Option<Channel> {
        let (send, receive) = self.saved.handover?;
        let now = listeners.iter().map(|listener| listener.bind.to_string());
        if !self.binds.iter().zip(now).all(|(before, now)| *before == now) {
            log::warn!(
                "connections that old workers hand over will be closed, because the listening sockets have changed"
            );
            return None;
        }
        Some(Channel::resume((self.claim(send)?, self.claim(receive)?)))
    }

    /// Checks that this build, with this configuration, can take over the app processes of the former master.
    ///
    /// # Errors
    /// Returns a message for the operator if it cannot.
    pub(crate) fn check_apps(&self, config: &Config) -> Result<(), String> {
        match (&self.saved.apps, &config.gateway) {
            (None, None) => Ok(()),
            (Some(apps), Some(gateway)) => {
                let gateways = config.of_gateways().slots();
                if !gateway.fits(apps.channel.units) {
                    return Err(format!(
                        "--app-concurrency cannot become {} in an upgrade (stop and start the server)",
                        gateway.concurrency
                    ));
                }
                apps.channel.check_size(config.slots(), gateways)
            }
            (Some(_), None) => {
                Err("the running server has gateways (remove --direct, or stop and start it)".to_owned())
            }
            (None, Some(_)) => {
                Err("the running server has no gateways (add --direct, or stop and start it)".to_owned())
            }
        }
    }

    /// Returns the channel of the gateways, if the former master had one.
    ///
    /// # Errors
    /// Returns a message for the operator if it cannot be used.
    pub(crate) fn channel(&mut self) -> Result<Option<AppChannel>, String> {
        let Some(saved) = self.saved.apps.as_ref().map(|apps| apps.channel.clone()) else { return Ok(None) };
        AppChannel::resume(saved, |number| self.claim(number)).map(Some).map_err(|error| error.to_string())
    }

    /// Returns the control socket, or `None` in a check.
    pub(crate) fn control(&mut self) -> Option<ControlListener> {
        let saved = self.saved.control.as_ref()?;
        let (path, fd, file) = (saved.path.clone(), saved.fd, saved.file);
        Some(ControlListener::adopt(path, self.claim(fd)?, file))
    }

    /// Removes the files of listening sockets that were not claimed: their `--bind` is no longer configured.
    pub(crate) fn remove_socket_files(&self) {
        for SavedListener { bind, file, .. } in &self.saved.listeners {
            if let Ok(Bind { address: Address::Path(path), .. }) = bind.parse() {
                listen::remove_own(&path, *file);
            }
        }
    }

    /// Whether the former master has a control socket at `path`.
    pub(crate) fn has_control(&self, path: &Path) -> bool {
        self.saved.control.as_ref().is_some_and(|saved| saved.path == path)
    }

    pub(crate) fn publish(&mut self) -> Option<PublishSocket> {
        let SavedPublish { fd, asked, path, file } = self.saved.publish.take()?;
        Some(PublishSocket::adopt(asked, path, self.claim(fd)?, file))
    }

    /// Whether the former master has a publish socket for the same setting.
    pub(crate) fn has_publish(&self, asked: Option<&Path>) -> bool {
        self.saved.publish.as_ref().is_some_and(|saved| saved.asked.as_deref() == asked)
    }

    /// Returns the path of the pid file, and its descriptor. The descriptor is `None` in a check.
    pub(crate) fn pid_file(&mut self) -> Option<(PathBuf, Option<OwnedFd>)> {
        let SavedPidFile { fd, path } = self.saved.pid_file.take()?;
        Some((path, self.claim(fd)))
    }

    fn lifeline(&mut self) -> Option<(OwnedFd, OwnedFd)> {
        let (read, write) = self.saved.lifeline;
        Some((self.claim(read)?, self.claim(write)?))
    }

    /// Claims a descriptor that the state names.
    pub(crate) fn claim(&mut self, number: RawFd) -> Option<OwnedFd> {
        let claimed = self.descriptors.remove(&number)?;
        debug_assert_eq!(claimed.as_raw_fd(), number, "descriptors keep their numbers");
        Some(claimed)
    }
}
