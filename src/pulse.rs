//! What a connection is at: told by its protocol and by the bodies of its requests, looked at by the worker's watchdog
//! (`worker/socket.rs`), which cuts off whoever takes too long.
//!
//! A few stores per request, and nothing to wait for: whoever tells may be on any thread.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed};

/// What a connection's reads wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    /// The next request; nothing of it has come.
    Idle,
    /// The rest of a request's head.
    Head,
    /// A piece of a request's body, for somebody who wants to read it.
    Body,
    /// Nothing that the peer owes us: the application is at work.
    Answering,
}

/// A connection's pulse.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    stage: AtomicU8,
    requests: AtomicU32,
    read: AtomicU32,
    written: AtomicU32,
    is_writing: AtomicBool,
    has_expired: AtomicBool,
    is_closed: AtomicBool,
}

impl Pulse {
    /// The connection waits for something else now.
    pub(crate) fn set_stage(&self, stage: Stage) {
        self.stage.store(stage as u8, Relaxed);
    }

    pub(crate) fn stage(&self) -> Stage {
        match self.stage.load(Relaxed) {
            0 => Stage::Idle,
            1 => Stage::Head,
            2 => Stage::Body,
            _ => Stage::Answering,
        }
    }

    /// The head of a request is complete.
    pub(crate) fn request_came(&self) {
        self.set_stage(Stage::Answering);
        add(&self.requests, 1);
    }

    /// How many requests there were. This, as all numbers here, wraps around.
    pub(crate) fn requests(&self) -> u32 {
        self.requests.load(Relaxed)
    }

    /// Somebody waits for a piece of a body, or does so no longer.
    pub(crate) fn set_waits_for_body(&self, waits: bool) {
        self.set_stage(if waits { Stage::Body } else { Stage::Answering });
    }

    /// So many bytes came from the peer.
    pub(crate) fn add_read(&self, bytes: usize) {
        add(&self.read, bytes);
        if self.stage() == Stage::Idle {
            self.set_stage(Stage::Head);
        }
    }

    pub(crate) fn read(&self) -> u32 {
        self.read.load(Relaxed)
    }

    /// So many bytes went to the peer.
    pub(crate) fn add_written(&self, bytes: usize) {
        add(&self.written, bytes);
    }

    pub(crate) fn written(&self) -> u32 {
        self.written.load(Relaxed)
    }

    /// A write waits for the peer to read, or does so no longer.
    pub(crate) fn set_writing(&self, waits: bool) {
        self.is_writing.store(waits, Relaxed);
    }

    pub(crate) fn is_writing(&self) -> bool {
        self.is_writing.load(Relaxed)
    }

    /// The peer took too long, and is cut off.
    pub(crate) fn expire(&self) {
        self.has_expired.store(true, Relaxed);
    }

    pub(crate) fn has_expired(&self) -> bool {
        self.has_expired.load(Relaxed)
    }

    /// The connection is at its end.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, Relaxed);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Relaxed)
    }
}

/// Counts, in a word that one thread writes.
fn add(word: &AtomicU32, count: usize) {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    word.store(word.load(Relaxed).wrapping_add(count), Relaxed);
}
