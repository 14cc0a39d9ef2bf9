//! Implements the client side of the control socket, and the messages that both sides exchange.
//!
//! - `wire`: requests and replies (no I/O).
//! - `client`: a connection to a master. `show`: the master's status as a table. `cache`, `events`: the page cache and
//!   the event log, to which this process attaches. `commands`: the sub-commands.
//!
//! Must not depend on `master`, or run in a master.

mod cache;
pub(crate) mod client;
pub(crate) mod commands;
mod events;
mod show;
pub(crate) mod wire;

pub(crate) use self::cache::CacheOperation;
pub(crate) use self::events::EventsOperation;
pub(crate) use self::events::FirstId;
