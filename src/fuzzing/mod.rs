//! Checks the codecs with arbitrary input from a peer. Each fuzz target has one function that takes
//! any bytes and panics if a property does not hold; `fuzz/` and `docs/fuzzing.md` document how to
//! run them.
//!
//! The functions are here, and not in `fuzz/`, because they use private items, and so that `cargo
//! test` runs them too. No other code may use them: the module exists in tests and with `--cfg
//! fuzzing` only.
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

/// Checks stored pages in the cache's memory, which any process may have written, and the clients'
/// headers about the page (`Accept-Encoding`, `If-None-Match`).
#[cfg(fuzzing)]
pub use forkyard_shm::fuzzing::page;

/// Makes choices from the fuzzer's bytes; after the last byte every choice is 0. So a mutation of
/// one byte changes one choice, and a shorter input is a simpler script.
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

    /// Up to 255 bytes; the next byte is their number.
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

/// Cuts bytes into pieces. The cuts depend only on the bytes, so that a finding can be replayed,
/// and any change of the bytes results in different cuts.
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
        // Single bytes, pieces of up to 8 or 60 bytes, or few pieces in all.
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
