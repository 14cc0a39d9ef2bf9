//! The control socket as its clients see it, and what passes over it.
//!
//! - `wire`: requests and answers (no I/O).
//! - `client`: a connection to a master. `show`: its status as a table. `cache`, `events`: the page cache and the event
//!   log, as one more process that uses them. `commands`: the sub-commands.
//!
//! May not: know the master, or run in one.

mod cache;
pub(crate) mod client;
pub(crate) mod commands;
mod events;
mod show;
pub(crate) mod wire;

pub(crate) use self::cache::Operation as CacheOperation;
pub(crate) use self::events::Operation as EventsOperation;
