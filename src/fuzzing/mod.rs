//! Checks the codecs with arbitrary input from a peer. Each fuzz target has one function that takes
//! any bytes and panics if a property does not hold; `fuzz/` and `docs/fuzzing.md` document how to
//! run them.
//!
//! The functions are in this module rather than in `fuzz/`, because they use private items and because `cargo test`
//! runs them too. No other code may use the functions: the module exists only in tests and with `--cfg fuzzing`.
//!
//! The expectations do not use the codecs' own helpers: the encoders and parsers here are
//! independent implementations.

mod cgi;
mod fastcgi;
mod fastcgi_script;
mod forwarded;
mod params;
mod proxy;
mod scgi;

pub use cgi::{cgi_request, cgi_response};
pub use fastcgi::fastcgi;
pub use fastcgi_script::fastcgi_script;
pub use forwarded::forwarded;
pub use params::params;
pub use proxy::proxy;
pub use scgi::{scgi, scgi_script};

/// Checks pages as they are stored in the cache's memory, to which any process may have written, with the clients'
/// headers that select a response (`Accept-Encoding`, `If-None-Match`).
#[cfg(fuzzing)]
pub use forkyard_shm::fuzzing::page;

/// Turns the fuzzer's bytes into choices. When the bytes are used up, every further choice is 0. A mutation of one byte
/// therefore changes one choice, and a shorter input is a simpler script.
struct Dice<'a>(&'a [u8]);

impl<'a> Dice<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// Returns a number below `end`, which must be at most 256.
    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    fn coin(&mut self, sides: u8) -> bool {
        self.byte() % sides == 1
    }

    /// Returns up to 255 bytes; the byte before them is their number.
    fn bytes(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()).min(self.0.len());
        self.take(length)
    }

    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }
}

/// Cuts bytes into pieces. The cuts depend only on the bytes, so that a finding can be replayed; any change to the
/// bytes changes the cuts.
struct Pieces {
    state: u64,
    longest: u64,
}

impl Pieces {
    fn of(bytes: &[u8]) -> Self {
        let mut state = 0xcbf2_9ce4_8422_2325_u64 ^ bytes.len() as u64;
        let (eights, rest) = bytes.as_chunks::<8>();
        for &eight in eights {
            state = (state ^ u64::from_le_bytes(eight)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
        for &byte in rest {
            state = (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3).rotate_left(29);
        }
        // Maximum length of a piece: 1, 8 or 60 bytes, or the whole input.
        let longest = [1, 8, 60, bytes.len() as u64];
        let longest = longest[usize::from(state.to_le_bytes()[0] % 4)].max(1);
        Self { state: state | 1, longest }
    }

    /// Takes the next piece of `rest`, which must not be empty.
    fn cut<'a>(&mut self, rest: &mut &'a [u8]) -> &'a [u8] {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let length = usize::try_from((self.state >> 11) % self.longest).map_or(1, |length| length + 1);
        let (piece, later) = rest.split_at(length.min(rest.len()));
        *rest = later;
        piece
    }
}

#[cfg(test)]
mod tests;
