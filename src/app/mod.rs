//! Provides the interface of the application: request bodies, blocking functions, pages, events and hooks.

pub(crate) mod blocking;
pub(crate) mod body;
pub mod cached_page;
pub(crate) mod context;
pub(crate) mod events;
pub(crate) mod hooks;
