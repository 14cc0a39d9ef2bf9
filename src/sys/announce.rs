//! How each program is made known to the guard (`master/guard.rs`): by itself, between fork and exec, so that there is no moment at
//! which it runs and the guard could not know of it.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::sys::socket::{MsgFlags, send};
use nix::unistd::Pid;

/// The master's end of the link to the guard.
static LINK: AtomicI32 = AtomicI32::new(-1);

/// Has all programs be announced there, or nowhere. The descriptor stays open until another one takes its place.
pub(crate) fn announce_by(link: Option<RawFd>) {
    LINK.store(link.unwrap_or(-1), Ordering::Relaxed);
}

/// Announces a process group. Async-signal-safe, and never waits. Without a guard nobody is told; the next one looks for itself.
pub(crate) fn announce(group: Pid) {
    let link = LINK.load(Ordering::Relaxed);
    if link >= 0 {
        let _ = send(link, &group.as_raw().to_ne_bytes(), MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
    }
}
