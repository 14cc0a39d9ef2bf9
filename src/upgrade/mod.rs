//! What one master leaves to the program that takes its place, which keeps its pid: the state, the descriptors that it names, and which
//! build is executed.
//!
//! An upgrade is a way of starting, so this lies below the master: what makes sockets, the segment and the pid file asks here first
//! whether there are some already. [`master::upgrade`](crate::master::upgrade) performs it.

pub(crate) mod roster;
pub(crate) mod saved;
pub(crate) mod start_command;
pub(crate) mod takeover;

use self::saved::FORMAT;
pub(crate) use self::start_command::StartCommand;
use self::takeover::{CHECK, STATE};
pub(crate) use self::takeover::{Takeover, Ties, is_check};

/// The variables of an upgrade, which are the master's alone.
pub(crate) const VARIABLES: [&str; 2] = [STATE, CHECK];

/// What the check of a new build prints when it has come to its end.
pub(crate) fn password() -> String {
    format!("forkyard: this build can take over (state format {FORMAT})")
}
