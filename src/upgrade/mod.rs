//! Transfers a master's state to the program that replaces it under the same pid: the saved data, the descriptors that it names,
//! and the build to execute.
//!
//! An upgrade is a form of startup, so the master depends on this module: the code that creates sockets, the segment
//! and the pid file first looks for existing ones in the saved state. [`master::upgrade`](crate::master::upgrade)
//! performs the upgrade.

pub(crate) mod saved_processes;
pub(crate) mod saved_state;
pub(crate) mod start_command;
pub(crate) mod takeover;

use self::saved_state::FORMAT;
pub(crate) use self::start_command::StartCommand;
use self::takeover::{CHECK, STATE};
pub(crate) use self::takeover::{Takeover, Ties, is_check};

/// The variables of an upgrade. They are for the master only, and are not passed on.
pub(crate) const VARIABLES: [&str; 2] = [STATE, CHECK];

/// Returns the line that the check of a new build prints when it has succeeded.
pub(crate) fn password() -> String {
    format!("forkyard: this build can take over (state format {FORMAT})")
}
