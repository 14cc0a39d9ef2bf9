//! The control socket as its clients see it, and what passes over it.
//!
//! - `wire`: requests and answers (no I/O).
//! - `client`: a connection to a master. `show`: its status as a table. `cache`: the page cache, as one more process that
//!   uses it. `commands`: the sub-commands.
//!
//! May not: know the master, or run in one.

mod cache;
mod client;
pub(crate) mod commands;
mod show;
pub(crate) mod wire;

pub(crate) use self::cache::Operation as CacheOperation;
