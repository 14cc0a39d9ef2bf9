//! A queue of chunks in memory, in which small chunks are joined.
//!
//! The length counts bytes. The unused capacity of the buffer of small chunks is not counted.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Chunks smaller than this are copied together: otherwise each would keep the whole buffer that it was read into
/// allocated.
const WORTH_SHARING: usize = 4096;
/// Size from which joined chunks form a chunk of their own, so that the buffer is not copied again and again.
const JOINED: usize = 16 << 10;

#[derive(Debug, Default)]
pub(super) struct Chunks {
    queue: VecDeque<Bytes>,
    /// Small chunks, joined. They are read after the queue.
    tail: BytesMut,
    bytes: u64,
}

impl Chunks {
    pub(super) fn len(&self) -> u64 {
        self.bytes
    }

    pub(super) fn push(&mut self, bytes: Bytes) {
        self.bytes += bytes.len() as u64;
        if bytes.len() >= WORTH_SHARING {
            self.seal();
            self.queue.push_back(bytes);
            return;
        }
        self.tail.extend_from_slice(&bytes);
        if self.tail.len() >= JOINED {
            self.seal();
        }
    }

    /// Moves the joined chunks to the queue.
    pub(super) fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.queue.push_back(std::mem::take(&mut self.tail).freeze());
        }
    }

    pub(super) fn pop(&mut self) -> Option<Bytes> {
        if self.queue.is_empty() {
            self.seal();
        }
        let bytes = self.queue.pop_front()?;
        self.bytes -= bytes.len() as u64;
        Some(bytes)
    }

    /// Returns a chunk to the front after [`Chunks::pop`].
    pub(super) fn unpop(&mut self, bytes: Bytes) {
        self.bytes += bytes.len() as u64;
        self.queue.push_front(bytes);
    }

    /// Returns the chunk at `index`; the chunks must have been sealed.
    pub(super) fn at(&self, index: usize) -> Option<Bytes> {
        self.queue.get(index).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_all_sizes_leave_in_order_and_small_ones_joined() {
        let (mut chunks, mut expected) = (Chunks::default(), Vec::new());
        for length in (0..10_000).step_by(500).chain([5000, 10, 5000]) {
            let piece = vec![u8::try_from(length % 251).unwrap(); length];
            expected.extend_from_slice(&piece);
            chunks.push(piece.into());
        }
        assert_eq!(chunks.len(), expected.len() as u64);
        let (mut read, mut count) = (Vec::new(), 0);
        while let Some(bytes) = chunks.pop() {
            chunks.unpop(bytes.clone());
            assert_eq!(chunks.pop().as_ref(), Some(&bytes));
            read.extend_from_slice(&bytes);
            count += 1;
        }
        assert!(read == expected);
        assert_eq!((chunks.len(), count), (0, 1 + 11 + 3), "the first 9 chunks are small and were joined");
    }

    #[test]
    fn many_small_chunks_form_buffers_of_a_bounded_size() {
        let mut chunks = Chunks::default();
        (0..1 << 20).for_each(|_| chunks.push(Bytes::from_static(b"x")));
        let lengths: Vec<_> = std::iter::from_fn(|| chunks.pop().map(|bytes| bytes.len())).collect();
        assert!(lengths.iter().all(|&length| length == JOINED), "{lengths:?}");
    }
}
