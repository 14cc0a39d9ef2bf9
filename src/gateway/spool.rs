//! Queues the bytes of a body between a writer and a reader of different speeds: in memory up to a limit, then in a
//! temporary file without a name.
//!
//! A gateway uses it twice. [`collect`] stores the whole body of a request before an app process is claimed. [`spool`]
//! takes a response at the speed of the application, however slowly the client reads.
//!
//! - When the memory of all spools is used up, a spool uses its file earlier.
//! - The file is read and written on the event loop (see `temp_file.rs`), as nginx does by default.
//! - A file is closed when it has been read to its end; new bytes then go to memory again. While a reader stays behind,
//!   the space that it has read is freed (FALLOC_FL_PUNCH_HOLE). On a file system that cannot do this, the file grows
//!   until the reader has caught up, and counts in full.
//! - A spool is *full* when neither its memory nor its file can take more: because of the limits, because the disk is
//!   full, because the file cannot be opened, or because it is not to have a file ([`SpoolLimits::streaming`]). The
//!   writer must then wait ([`SpoolWriter::poll_ready`]), which slows the application down to the client's pace. A
//!   failure of one spool's file has no effect on other spools. A writer that pushes without waiting receives the
//!   reason as an error, and so does the reader.
//! - A spool that is not full accepts a chunk of any size. It may therefore exceed its limits, and those of the process,
//!   by one chunk in memory. An empty spool is never full.
//!
//! The writer and the reader can be on different threads.

mod budget;
mod chunks;
mod collect;
mod error;
mod store;
mod temp_file;
#[cfg(test)]
mod tests;

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};

pub(crate) use self::budget::SpoolBudget;
pub(crate) use self::collect::{CollectError, Spooled, SpooledReader, collect};
pub(crate) use self::error::SpoolError;
pub(crate) use self::store::SpoolLimits;
use self::store::Store;

#[derive(Debug)]
struct Shared {
    store: Store,
    written: u64,
    end: End,
    /// Whether the reader has been dropped, or cannot read on. Input is then discarded.
    is_abandoned: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Debug)]
enum End {
    Open,
    /// The body is complete. The trailers follow, if there are any.
    Whole(Option<HeaderMap>),
    Failed(SpoolError),
}

/// The producer's end. Dropping it before [`SpoolWriter::finish`] breaks the body off. At most one task may wait on it.
#[derive(Debug)]
pub(crate) struct SpoolWriter(Arc<Mutex<Shared>>);

/// The consumer's end. Dropping it frees the memory and the file.
#[derive(Debug)]
pub(crate) struct SpoolReader(Arc<Mutex<Shared>>);

/// Creates an empty spool. Neither memory nor a file is used before the first push.
pub(crate) fn spool(limits: &SpoolLimits, budget: &SpoolBudget) -> (SpoolWriter, SpoolReader) {
    let shared = Arc::new(Mutex::new(Shared {
        store: Store::new(limits, budget),
        written: 0,
        end: End::Open,
        is_abandoned: false,
        reader: None,
        writer: None,
    }));
    (SpoolWriter(Arc::clone(&shared)), SpoolReader(shared))
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // Code under the lock cannot panic.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes after the lock is released.
fn wake(waker: Option<Waker>, shared: MutexGuard<'_, Shared>) {
    drop(shared);
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl SpoolWriter {
    /// Appends a chunk. Without a reader, the chunk is discarded.
    ///
    /// # Errors
    /// If the spool is full: returns the reason, discards the chunk, and makes the body fail for the reader, because its
    /// bytes would no longer be contiguous. Does not happen after [`SpoolWriter::poll_ready`] was ready.
    pub(crate) fn push(&mut self, bytes: Bytes) -> Result<(), SpoolError> {
        let mut shared = lock(&self.0);
        if let End::Failed(error) = &shared.end {
            return Err(error.clone());
        }
        if shared.is_abandoned || bytes.is_empty() {
            return Ok(());
        }
        let full = shared.store.why_full();
        match &full {
            Some(error) => shared.end = End::Failed(error.clone()),
            None => {
                shared.store.put_anyway(&bytes);
                shared.written += bytes.len() as u64;
            }
        }
        wake(shared.reader.take(), shared);
        full.map_or(Ok(()), Err)
    }

    #[cfg(test)]
    pub(crate) fn is_full(&self) -> bool {
        self.why_full().is_some()
    }

    /// Returns why the spool is full, for a log line or a status; `None` if it is not full.
    #[cfg(test)]
    pub(crate) fn why_full(&self) -> Option<SpoolError> {
        let shared = lock(&self.0);
        if shared.is_abandoned { None } else { shared.store.why_full() }
    }

    /// Becomes ready when the spool is not full, or when the reader has been dropped.
    pub(crate) fn poll_ready(&mut self, context: &Context<'_>) -> Poll<()> {
        let mut shared = lock(&self.0);
        if shared.is_abandoned || shared.store.why_full().is_none() {
            return Poll::Ready(());
        }
        shared.writer = Some(context.waker().clone());
        Poll::Pending
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        lock(&self.0).is_abandoned
    }

    /// Becomes ready when the reader has been dropped, or cannot read the file.
    pub(crate) fn poll_abandoned(&mut self, context: &Context<'_>) -> Poll<()> {
        let mut shared = lock(&self.0);
        if shared.is_abandoned {
            return Poll::Ready(());
        }
        shared.writer = Some(context.waker().clone());
        Poll::Pending
    }

    /// Number of bytes pushed so far.
    #[cfg(test)]
    pub(crate) fn len_written(&self) -> u64 {
        lock(&self.0).written
    }

    /// Number of bytes that the reader has not read.
    #[cfg(test)]
    pub(crate) fn len_buffered(&self) -> u64 {
        lock(&self.0).store.len()
    }

    /// Marks the body as complete. The reader receives the trailers after it.
    pub(crate) fn finish(self, trailers: Option<HeaderMap>) {
        self.end(End::Whole(trailers));
    }

    /// Makes the body fail. The reader receives the error after the bytes that were pushed before.
    pub(crate) fn abort(self, error: SpoolError) {
        self.end(End::Failed(error));
    }

    /// Only the first end of a body counts.
    fn end(&self, end: End) {
        let mut shared = lock(&self.0);
        if matches!(shared.end, End::Open) {
            shared.end = end;
            wake(shared.reader.take(), shared);
        }
    }
}

impl Drop for SpoolWriter {
    fn drop(&mut self) {
        self.end(End::Failed(SpoolError::BrokenOff));
    }
}

impl SpoolReader {
    /// Returns the next chunk, or `None` at the end. After an error, returns the same error again.
    pub(crate) fn poll_data(&mut self, context: &Context<'_>) -> Poll<Option<Result<Bytes, SpoolError>>> {
        let mut shared = lock(&self.0);
        match shared.store.next() {
            Ok(Some(bytes)) => {
                if shared.store.why_full().is_none() {
                    wake(shared.writer.take(), shared);
                }
                return Poll::Ready(Some(Ok(bytes)));
            }
            Ok(None) => {}
            Err(error) => {
                shared.end = End::Failed(error.clone());
                shared.abandon();
                wake(shared.writer.take(), shared);
                return Poll::Ready(Some(Err(error)));
            }
        }
        match &shared.end {
            End::Whole(_) => Poll::Ready(None),
            End::Failed(error) => Poll::Ready(Some(Err(error.clone()))),
            End::Open => {
                shared.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Shared {
    fn abandon(&mut self) {
        self.is_abandoned = true;
        self.store.clear();
    }
}

impl Drop for SpoolReader {
    fn drop(&mut self) {
        let mut shared = lock(&self.0);
        shared.abandon();
        wake(shared.writer.take(), shared);
    }
}

impl http_body::Body for SpoolReader {
    type Data = Bytes;
    type Error = SpoolError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, SpoolError>>> {
        match ready!(self.poll_data(context)) {
            Some(data) => Poll::Ready(Some(data.map(Frame::data))),
            None => match &mut lock(&self.0).end {
                End::Whole(trailers) => Poll::Ready(trailers.take().map(|trailers| Ok(Frame::trailers(trailers)))),
                End::Open | End::Failed(_) => Poll::Ready(None),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        let shared = lock(&self.0);
        shared.store.len() == 0 && matches!(shared.end, End::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        let shared = lock(&self.0);
        let mut hint = SizeHint::new();
        match shared.end {
            End::Whole(None) => hint.set_exact(shared.store.len()),
            // With a known length, HTTP/1 would have no place for trailers.
            End::Open | End::Failed(_) | End::Whole(Some(_)) => hint.set_lower(shared.store.len()),
        }
        hint
    }
}
