//! Stores "GET /path" in a fixed number of atomic words, in a row or in a process's private memory.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::layout::{TEXT_WORDS, Text};

/// Capacity of a text in bytes.
pub(super) const TEXT_BYTES: usize = TEXT_WORDS * 8;

/// Returns a method and a target as the scoreboard stores them: `GET /path`, in printable ASCII, truncated to 112 bytes. To compare a
/// request with a request in the scoreboard, compare the results of this function.
pub fn request_text(method: &str, target: &str) -> String {
    let (bytes, length) = cut(method, target);
    bytes[..length].iter().copied().map(printable).collect()
}

fn cut(method: &str, target: &str) -> ([u8; TEXT_BYTES], usize) {
    let mut text = [0; TEXT_BYTES];
    let mut length = 0;
    for part in [method, " ", target] {
        let room = &mut text[length..];
        let taken = part.len().min(room.len());
        room[..taken].copy_from_slice(&part.as_bytes()[..taken]);
        length += taken;
    }
    (text, length)
}

impl Text {
    pub(super) fn put(&self, method: &str, target: &str) {
        let (text, length) = cut(method, target);
        store(&self.length, &self.words, &text[..length]);
    }

    /// Copies a text. Async-signal-safe.
    pub(super) fn copy_from(&self, other: &Text) {
        let length = other.length.load(Ordering::Relaxed).min(TEXT_BYTES as u64);
        let words = usize::try_from(length.div_ceil(8)).unwrap_or(TEXT_WORDS);
        for (to, from) in self.words.iter().zip(&other.words).take(words) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.length.store(length, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> String {
        load(&self.length, &self.words)
    }
}

/// Stores a text in words, as far as it fits.
pub(crate) fn store(length: &AtomicU64, words: &[AtomicU64], text: &[u8]) {
    for (word, bytes) in words.iter().zip(text.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
    }
    length.store(text.len().min(words.len() * 8) as u64, Ordering::Relaxed);
}

/// Reads a text that was stored in words.
pub(crate) fn load(length: &AtomicU64, words: &[AtomicU64]) -> String {
    let length = usize::try_from(length.load(Ordering::Relaxed)).unwrap_or(TEXT_BYTES);
    let bytes = words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes());
    bytes.take(length).map(printable).collect()
}

/// Replaces a byte that cannot be printed, or that could affect a terminal or a log, with a question mark.
fn printable(byte: u8) -> char {
    if byte.is_ascii_graphic() || byte == b' ' { char::from(byte) } else { '?' }
}
