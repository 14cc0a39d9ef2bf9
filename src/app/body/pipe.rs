//! Passes a request body in chunks from its connection to its reader.
//!
//! The pipe is small: when more than [`CAPACITY`] bytes are unread, the connection stops reading from its socket until
//! there is room. This slows the client down to the reader's pace. The reader may be on another thread (a blocking
//! function); the writer is the connection's task.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};

use crate::request::buffered;

/// Number of unread bytes at which the connection stops reading. The last read may exceed this number.
const CAPACITY: usize = 64 << 10;
/// Like [`CAPACITY`], while memory is tight.
const LESS: usize = 4 << 10;

/// Chunks smaller than this are copied together: otherwise each would keep the whole buffer of the
/// connection allocated, and 64 KiB of single bytes would be 64 Ki chunks.
const WORTH_SHARING: usize = 4096;

#[derive(Debug, Default)]
struct Shared {
    queue: VecDeque<Bytes>,
    /// Small chunks, joined. They are read after the queue.
    tail: BytesMut,
    bytes: usize,
    end: End,
    /// Whether the reader has been dropped. Input is then discarded.
    abandoned: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    Whole,
    /// The peer disconnected or cancelled the request.
    Cut,
}

/// The connection's end. Dropping it before [`Writer::finish`] cuts the body short.
#[derive(Debug)]
pub(crate) struct Writer(Arc<Mutex<Shared>>);

/// The request's end.
#[derive(Debug)]
pub(crate) struct Reader(Arc<Mutex<Shared>>);

/// The error for a body that was cut short.
#[derive(Debug)]
pub(crate) struct Cut;

pub(crate) fn pipe() -> (Writer, Reader) {
    let shared = Arc::new(Mutex::new(Shared::default()));
    (Writer(Arc::clone(&shared)), Reader(shared))
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // Code under the lock cannot panic.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Writer {
    pub(crate) fn push(&self, bytes: Bytes) {
        let mut shared = lock(&self.0);
        if shared.abandoned {
            return;
        }
        shared.bytes += bytes.len();
        if bytes.len() < WORTH_SHARING {
            shared.tail.extend_from_slice(&bytes);
        } else {
            for part in [shared.tail.split().freeze(), bytes] {
                if !part.is_empty() {
                    shared.queue.push_back(part);
                }
            }
        }
        wake(shared.reader.take(), shared);
    }

    pub(crate) fn push_copy(&self, bytes: &[u8]) {
        let mut shared = lock(&self.0);
        if !shared.abandoned {
            shared.bytes += bytes.len();
            shared.tail.extend_from_slice(bytes);
            wake(shared.reader.take(), shared);
        }
    }

    /// Whether the reader has been dropped. Dropping the reader wakes a writer that waits for room.
    pub(crate) fn is_abandoned(&self) -> bool {
        lock(&self.0).abandoned
    }

    /// Marks the body as complete.
    pub(crate) fn finish(&self) {
        self.end(End::Whole);
    }

    /// Becomes ready when there is room, or when the reader has been dropped.
    pub(crate) fn poll_room(&self, context: &mut Context<'_>) -> Poll<()> {
        let capacity = if buffered::is_tight() { LESS } else { CAPACITY };
        let mut shared = lock(&self.0);
        if shared.bytes < capacity || shared.abandoned {
            return Poll::Ready(());
        }
        shared.writer = Some(context.waker().clone());
        Poll::Pending
    }

    fn end(&self, end: End) {
        let mut shared = lock(&self.0);
        if shared.end == End::Open {
            shared.end = end;
            wake(shared.reader.take(), shared);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end(End::Cut);
    }
}

impl Reader {
    /// Returns the next chunk, or `None` at the end.
    pub(crate) fn poll_next(&self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Cut>>> {
        let mut shared = lock(&self.0);
        let next = shared.queue.pop_front();
        let next = next.or_else(|| (!shared.tail.is_empty()).then(|| shared.tail.split().freeze()));
        if let Some(bytes) = next {
            shared.bytes -= bytes.len();
            if shared.bytes < CAPACITY {
                wake(shared.writer.take(), shared);
            }
            return Poll::Ready(Some(Ok(bytes)));
        }
        match shared.end {
            End::Whole => Poll::Ready(None),
            End::Cut => Poll::Ready(Some(Err(Cut))),
            End::Open => {
                shared.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(crate) fn is_at_end(&self) -> bool {
        let shared = lock(&self.0);
        shared.bytes == 0 && shared.end == End::Whole
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut shared = lock(&self.0);
        shared.abandoned = true;
        shared.queue.clear();
        shared.tail = BytesMut::new();
        shared.bytes = 0;
        wake(shared.writer.take(), shared);
    }
}

/// Wakes after the lock is released.
fn wake(waker: Option<Waker>, shared: MutexGuard<'_, Shared>) {
    drop(shared);
    if let Some(waker) = waker {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> Context<'static> {
        Context::from_waker(Waker::noop())
    }

    #[test]
    fn what_goes_in_comes_out_and_then_the_end() {
        let (writer, reader) = pipe();
        assert!(reader.poll_next(&mut context()).is_pending());
        writer.push(Bytes::from_static(b"a"));
        writer.push(Bytes::from_static(b"b"));
        writer.finish();
        let Poll::Ready(Some(Ok(bytes))) = reader.poll_next(&mut context()) else { panic!() };
        assert_eq!(bytes, "ab", "small pieces are put together");
        assert!(reader.is_at_end());
        assert!(matches!(reader.poll_next(&mut context()), Poll::Ready(None)));
    }

    #[test]
    fn pieces_of_all_sizes_stay_in_order() {
        let (writer, reader) = pipe();
        let mut expected = Vec::new();
        for length in [1, 5000, 2, 3, 9000, 4096, 4095, 1] {
            let piece = vec![u8::try_from(length % 251).unwrap(); length];
            expected.extend_from_slice(&piece);
            writer.push(piece.into());
        }
        writer.finish();
        let mut read = Vec::new();
        while let Poll::Ready(Some(Ok(bytes))) = reader.poll_next(&mut context()) {
            read.extend_from_slice(&bytes);
        }
        assert_eq!(read, expected);
    }

    #[test]
    fn a_full_pipe_holds_the_writer_back_until_there_is_room() {
        let (writer, reader) = pipe();
        writer.push(Bytes::from(vec![0; CAPACITY]));
        assert!(writer.poll_room(&mut context()).is_pending());
        assert!(reader.poll_next(&mut context()).is_ready());
        assert!(writer.poll_room(&mut context()).is_ready());
    }

    #[test]
    fn a_writer_that_vanishes_cuts_the_body() {
        let (writer, reader) = pipe();
        writer.push(Bytes::from_static(b"a"));
        drop(writer);
        assert!(matches!(reader.poll_next(&mut context()), Poll::Ready(Some(Ok(_)))));
        assert!(matches!(reader.poll_next(&mut context()), Poll::Ready(Some(Err(Cut)))));
    }

    #[test]
    fn without_a_reader_everything_is_thrown_away() {
        let (writer, reader) = pipe();
        drop(reader);
        writer.push(Bytes::from(vec![0; 2 * CAPACITY]));
        assert!(writer.poll_room(&mut context()).is_ready());
        assert_eq!(lock(&writer.0).bytes, 0);
    }
}
