//! Records what a worker is doing, so that a crash, a hang or a slow request can be explained.

pub(crate) mod code_address;
pub(crate) mod crash;
pub(crate) mod current_request;
pub(crate) mod request_key;
pub(crate) mod stack_sampler;
mod unwind;
