//! The block of memory that the reads of a thread share.
//!
//! A connection that waits therefore has no buffer, and a short read costs no allocation: the bytes are a part of the block,
//! and the next read continues after them. A caller that keeps the bytes for long must copy them, because they keep the
//! whole block allocated.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

/// Size of a block.
const BLOCK: usize = 64 << 10;
/// Minimum free space in the block for a read.
const ROOM: usize = 16 << 10;

thread_local! {
    static BLOCK_OF_THREAD: RefCell<BytesMut> = RefCell::default();
}

/// Reads the available bytes, at most 64 KiB. An empty buffer means the end of the stream.
///
/// # Errors
/// Returns the error from `io`.
pub(crate) fn poll_block(io: Pin<&mut impl AsyncRead>, context: &mut Context<'_>) -> Poll<io::Result<BytesMut>> {
    BLOCK_OF_THREAD.with_borrow_mut(|block| {
        if block.capacity() < ROOM {
            block.reserve(BLOCK);
        }
        ready!(poll_read_buf(io, context, block))?;
        Poll::Ready(Ok(block.split()))
    })
}
