//! Announces each program to the guard (`master/guard.rs`). The program's process announces itself between fork and
//! exec, so that no program ever runs unannounced. When the master reaps the last process of a group, it announces the
//! end of the group, because the group's number may then be reused.
//!
//! A message is the number of a new group, or the negative number of a group that has ended. A pair of numbers, a pid
//! and 0, announces a single process that the master has found and that may still change its group.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::errno::Errno;
use nix::sys::signal::killpg;
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::{Pid, getpgid};

/// The master's end of the link to the guard.
static LINK: AtomicI32 = AtomicI32::new(-1);

/// Sets the link on which all programs are announced; `None` if there is no guard. The descriptor must stay open until the next call.
pub(crate) fn announce_by(link: Option<RawFd>) {
    LINK.store(link.unwrap_or(-1), Ordering::Relaxed);
}

/// Announces a process group. Async-signal-safe, and never waits. Has no effect without a guard: a new guard receives
/// the existing groups from the master.
pub(crate) fn announce(group: Pid) {
    send_message(&group.as_raw().to_ne_bytes());
}

/// Announces a process that may still leave its group and create another one, as daemons that put themselves into the
/// background do.
pub(crate) fn announce_process(pid: Pid) {
    send_message([pid.as_raw().to_ne_bytes(), [0; 4]].as_flattened());
}

fn send_message(message: &[u8]) {
    let link = LINK.load(Ordering::Relaxed);
    if link >= 0 {
        let _ = send(link, message, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
    }
}

/// Returns the process groups that may end with a child that has ended but has not been reaped yet: its current group,
/// and its initial group.
pub(super) fn groups_of(pid: Pid) -> [Pid; 2] {
    [pid, getpgid(Some(pid)).unwrap_or(pid)]
}

/// Announces the end of each of these groups that no longer contains a process. Must be called right after a child is
/// reaped, before this process creates its next child: the next child may get the same number, and announces itself on
/// the same link.
pub(super) fn announce_ends(groups: [Pid; 2]) {
    for group in groups {
        if killpg(group, None) == Err(Errno::ESRCH) {
            announce(Pid::from_raw(-group.as_raw()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, recv, socketpair};

    use super::*;
    use crate::sys::reap;

    #[test]
    #[expect(clippy::zombie_processes, reason = "`reap` waits for them")]
    fn the_end_of_a_group_is_announced_when_its_last_process_is_reaped_and_not_before() {
        let (link, end) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        // Both stay open: other tests of this process may announce something here at any time.
        let end = end.into_raw_fd();
        announce_by(Some(link.into_raw_fd()));
        let sleeper = |group: i32| {
            let child = Command::new("sleep").arg("600").process_group(group).spawn().unwrap();
            Pid::from_raw(child.id().cast_signed())
        };
        let leader = sleeper(0);
        let member = sleeper(leader.as_raw());
        let announced_after_kill = |pid: Pid| {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            let deadline = Instant::now() + Duration::from_secs(60);
            while reap(pid).is_none() {
                assert!(Instant::now() < deadline, "it ends");
                std::thread::park_timeout(Duration::from_millis(1));
            }
            let mut message = [0; size_of::<i32>()];
            let messages = std::iter::from_fn(|| {
                let got = recv(end, &mut message, MsgFlags::MSG_DONTWAIT).ok();
                got.map(|_| i32::from_ne_bytes(message))
            });
            messages
                .filter(|message| [leader, member].iter().any(|pid| message.abs() == pid.as_raw()))
                .collect::<Vec<_>>()
        };
        assert_eq!(announced_after_kill(leader), Vec::<i32>::new(), "the group has a process left");
        assert_eq!(announced_after_kill(member), [-member.as_raw(), -leader.as_raw()]);
        announce_by(None);
    }
}
