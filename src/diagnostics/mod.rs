//! What a worker records about itself, so that a crash, a hang or a slow request can be explained.

pub(crate) mod at_work;
pub(crate) mod crash;
pub(crate) mod modules;
pub(crate) mod sample;
pub(crate) mod suspect;
