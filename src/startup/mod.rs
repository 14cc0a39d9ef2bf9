//! Takes the server from the command line to a running master: creates everything that must exist before the first
//! worker.

pub(crate) mod abort;
pub(crate) mod abort_signal;
pub(crate) mod banner;
pub(crate) mod cgi_invocation;
pub(crate) mod conflicts;
pub(crate) mod descriptor_limit;
pub(crate) mod memory;
pub(crate) mod pid_file;
pub(crate) mod rlimits;
pub(crate) mod sockets;
pub(crate) mod systemd;
