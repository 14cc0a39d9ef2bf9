//! From a command line to a running master: what exists before the first worker does.

pub(crate) mod banner;
pub(crate) mod cgi_call;
pub(crate) mod conflicts;
pub(crate) mod descriptors;
pub(crate) mod end_of_start;
pub(crate) mod limits;
pub(crate) mod memory;
pub(crate) mod pid_file;
pub(crate) mod sockets;
pub(crate) mod start_end;
pub(crate) mod systemd;
