//! Receives the descriptors that systemd, or a program with the same protocol, passes to a service at startup
//! (`sd_listen_fds(3)`): listening sockets, and the memory that a former server stored. The descriptors are
//! distinguished by their names.

use std::os::fd::{OwnedFd, RawFd};

use crate::config::address::{Address, Bind, Protocol};
use crate::sys;
use crate::upgrade;

/// The variables of this protocol. They are meant for the master, and are not passed on to other processes.
pub(crate) const VARIABLES: [&str; 4] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"];
/// The name under which the shared memory is stored.
pub(crate) const SEGMENT: &str = "forkyard-segment";
const FIRST: RawFd = 3;
/// Upper bound, higher than any real number of descriptors.
const MOST: RawFd = 1024;

/// Returns the numbers and names of the descriptors that were passed to this process or, during an upgrade check, to
/// its parent.
fn passed() -> Vec<(RawFd, String)> {
    let variable = |name: &str| std::env::var(name).ok();
    let me = if upgrade::is_check() { nix::unistd::getppid() } else { nix::unistd::getpid() };
    read(variable, me.as_raw())
}

fn read(variable: impl Fn(&str) -> Option<String>, me: i32) -> Vec<(RawFd, String)> {
    let number = |name: &str| variable(name)?.parse::<i32>().ok();
    if number("LISTEN_PID") != Some(me) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").unwrap_or(0).clamp(0, MOST);
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned);
    (FIRST..FIRST + count).map(|fd| (fd, names.next().unwrap_or_default())).collect()
}

/// Returns the default of `--bind`: one address for each name.
pub(crate) fn binds() -> Vec<Bind> {
    binds_for(passed())
}

fn binds_for(passed: Vec<(RawFd, String)>) -> Vec<Bind> {
    let mut binds = Vec::new();
    for (_, name) in passed.into_iter().filter(|(_, name)| name != SEGMENT) {
        let bind = Bind { protocol: protocol_of(&name), address: Address::Systemd(Some(name)) };
        if !binds.contains(&bind) {
            binds.push(bind);
        }
    }
    binds
}

/// Returns the protocol with which a name begins, or HTTP if it begins with none.
fn protocol_of(name: &str) -> Protocol {
    match name {
        name if name.starts_with("fastcgi") => Protocol::FastCgi,
        name if name.starts_with("scgi") => Protocol::Scgi,
        _ => Protocol::Http,
    }
}

/// Returns the descriptors of the sockets with this name, or of all passed sockets if `name` is `None`.
///
/// # Errors
/// Returns a message for the operator if there is no such socket.
pub(crate) fn sockets(name: Option<&str>) -> Result<Vec<RawFd>, String> {
    let passed = passed();
    let ours = passed.iter().filter(|(_, other)| other != SEGMENT && name.is_none_or(|name| name == other));
    let ours: Vec<RawFd> = ours.map(|(fd, _)| *fd).collect();
    if !ours.is_empty() {
        return Ok(ours);
    }
    let names: Vec<&str> = passed.iter().map(|(_, name)| name.as_str()).collect();
    Err(match (names.as_slice(), name) {
        ([], _) => "systemd passed no socket (add a .socket unit with the service's name)".to_owned(),
        (names, name) => format!(
            "systemd passed no socket named '{}', only {} (see FileDescriptorName= in the .socket unit)",
            name.unwrap_or_default(),
            names.join(", ")
        ),
    })
}

/// Returns the shared memory that a former server stored. Must be called only once. If several descriptors have its
/// name, the last one is returned and the others are closed.
pub(crate) fn stored_segment() -> Option<OwnedFd> {
    let stored: Vec<RawFd> = passed().into_iter().filter(|(_, name)| name == SEGMENT).map(|(fd, _)| fd).collect();
    sys::take_over(&stored).into_values().last()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed_by(pid: &'static str, count: &'static str, names: Option<&'static str>) -> Vec<(RawFd, String)> {
        let variable = move |name: &str| match name {
            "LISTEN_PID" => Some(pid.to_owned()),
            "LISTEN_FDS" => Some(count.to_owned()),
            _ => names.map(str::to_owned),
        };
        read(variable, 77)
    }

    #[test]
    fn only_what_was_passed_to_this_process_is_taken() {
        assert_eq!(passed_by("77", "2", Some("a:b")), [(3, "a".to_owned()), (4, "b".to_owned())]);
        assert_eq!(passed_by("77", "2", None), [(3, String::new()), (4, String::new())]);
        for (pid, count) in [("78", "2"), ("", "2"), ("77", ""), ("77", "-1"), ("77", "x")] {
            assert_eq!(passed_by(pid, count, Some("a:b")), [], "{pid} {count}");
        }
        assert_eq!(passed_by("77", "2000000000", None).len(), 1024);
    }

    #[test]
    fn the_protocol_follows_from_the_name() {
        let binds = binds_for(passed_by("77", "5", Some("fastcgi:app.socket:forkyard-segment:scgi-old:fastcgi")));
        let texts: Vec<String> = binds.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["fastcgi:systemd:fastcgi", "http:systemd:app.socket", "scgi:systemd:scgi-old"]);
        for (bind, text) in binds.iter().zip(texts) {
            assert_eq!(text.parse::<Bind>().as_ref(), Ok(bind));
        }
    }
}
