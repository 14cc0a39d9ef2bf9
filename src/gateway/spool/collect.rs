//! Stores a whole body, so that it can be read more than once and its length is known.
//!
//! A request without side effects is repeated on another app process when its app process dies; each attempt reads the
//! body from its beginning. All bytes are in memory, or all are in the file. They stay until the [`Spooled`] and its
//! readers have been dropped. An empty body allocates nothing.

use std::error::Error;
use std::fmt;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;

use super::budget::SpoolBudget;
use super::error::SpoolError;
use super::store::{SpoolLimits, Store};

/// A complete body. Clones share the bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spooled {
    /// `None` if the body is empty.
    store: Option<Arc<Store>>,
    length: u64,
}

/// Why a body could not be collected.
#[derive(Debug)]
pub(crate) enum CollectError<E> {
    /// The body cannot be read from the client.
    Body(E),
    /// The body cannot be stored. [`SpoolError::TooLong`] is the client's fault; every other error is not.
    Spool(SpoolError),
}

/// Reads a body to its end. Trailers are discarded.
///
/// # Errors
/// Returns the error of the body, or the reason why it cannot be stored: `TooLong` if it is longer than
/// `limits.file_each`. A body whose announced length exceeds this limit is not read at all.
pub(crate) async fn collect<B: Body<Data = Bytes>>(
    body: B,
    limits: &SpoolLimits,
    budget: &SpoolBudget,
) -> Result<Spooled, CollectError<B::Error>> {
    let too_long = || Err(CollectError::Spool(SpoolError::TooLong { limit: limits.file_each }));
    if body.size_hint().lower() > limits.file_each {
        return too_long();
    }
    let (mut body, mut store, mut length) = (pin!(body), Store::new(limits, budget), 0_u64);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(CollectError::Body)?;
        let Ok(bytes) = frame.into_data() else { continue };
        length = length.saturating_add(bytes.len() as u64);
        if length > limits.file_each {
            return too_long();
        }
        if !bytes.is_empty() {
            store.put(&bytes).map_err(CollectError::Spool)?;
        }
    }
    store.settle().map_err(CollectError::Spool)?;
    Ok(Spooled { store: (length > 0).then(|| Arc::new(store)), length })
}

impl Spooled {
    pub(crate) fn len(&self) -> u64 {
        self.length
    }

    /// Returns a reader that begins at the first byte.
    pub(crate) fn reader(&self) -> SpooledReader {
        SpooledReader { spooled: self.clone(), index: 0, offset: 0 }
    }
}

/// Reads a [`Spooled`] body. It never waits.
#[derive(Debug)]
pub(crate) struct SpooledReader {
    spooled: Spooled,
    /// Number of chunks read.
    index: usize,
    /// Number of bytes read.
    offset: u64,
}

impl SpooledReader {
    /// Returns the next chunk, or `None` at the end.
    ///
    /// # Errors
    /// Returns the error from reading the temporary file. The next call tries again.
    pub(crate) fn next_chunk(&mut self) -> Result<Option<Bytes>, SpoolError> {
        let Some(store) = &self.spooled.store else { return Ok(None) };
        let chunk = store.peek(self.index, self.offset)?;
        if let Some(bytes) = &chunk {
            self.index += 1;
            self.offset += bytes.len() as u64;
        }
        Ok(chunk)
    }
}

impl Body for SpooledReader {
    type Data = Bytes;
    type Error = SpoolError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, SpoolError>>> {
        Poll::Ready(self.next_chunk().transpose().map(|chunk| chunk.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.offset == self.spooled.length
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.spooled.length - self.offset)
    }
}

impl<E: fmt::Display> fmt::Display for CollectError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Body(error) => error.fmt(f),
            Self::Spool(error) => error.fmt(f),
        }
    }
}

impl<E: Error + 'static> Error for CollectError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Body(error) => error.source(),
            Self::Spool(error) => error.source(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use http_body_util::{Empty, Full, StreamBody};

    use super::*;

    type Frames = Vec<Result<Frame<Bytes>, &'static str>>;

    fn limits(directory: &tempfile::TempDir) -> SpoolLimits {
        SpoolLimits { memory_each: 10_000, file_each: 100_000, directory: directory.path().into() }
    }

    /// A body of unknown length.
    fn in_chunks(count: usize, length: usize) -> Frames {
        let chunk = |number: usize| Bytes::from(vec![u8::try_from(number % 251).unwrap(); length]);
        (0..count).map(|number| Ok(Frame::data(chunk(number)))).collect()
    }

    fn joined(frames: &Frames) -> Vec<u8> {
        frames.iter().flatten().filter_map(Frame::data_ref).flatten().copied().collect()
    }

    async fn collected(
        frames: Frames,
        limits: &SpoolLimits,
        budget: &SpoolBudget,
    ) -> Result<Spooled, CollectError<&'static str>> {
        collect(StreamBody::new(Replay(frames.into_iter())), limits, budget).await
    }

    struct Replay(std::vec::IntoIter<Result<Frame<Bytes>, &'static str>>);

    impl futures_core::Stream for Replay {
        type Item = Result<Frame<Bytes>, &'static str>;
        fn poll_next(mut self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            Poll::Ready(self.0.next())
        }
    }

    /// A body that is announced as too long, and must not be read.
    struct Announced;

    impl Body for Announced {
        type Data = Bytes;
        type Error = &'static str;
        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
            panic!("read in spite of its length");
        }
        fn size_hint(&self) -> SizeHint {
            SizeHint::with_exact(100_001)
        }
    }

    fn read_all(spooled: &Spooled) -> Vec<u8> {
        let (mut reader, mut all) = (spooled.reader(), Vec::new());
        while let Some(bytes) = reader.next_chunk().unwrap() {
            all.extend_from_slice(&bytes);
            assert_eq!(reader.size_hint().exact(), Some(spooled.len() - all.len() as u64));
        }
        assert!(reader.is_end_stream());
        all
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_body_can_be_read_again_from_memory_and_from_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let budget = SpoolBudget::new(1 << 20, 1 << 20);
        for (count, length, memory, file) in
            [(1, 10, 10, 0), (90, 100, 9000, 0), (2, 5000, 10_000, 0), (20, 5000, 0, 100_000), (1, 90_000, 0, 90_000)]
        {
            let frames = in_chunks(count, length);
            let expected = joined(&frames);
            let spooled = collected(frames, &limits(&directory), &budget).await.unwrap();
            assert_eq!(spooled.len(), expected.len() as u64);
            assert_eq!((budget.memory_used(), budget.files_used()), (memory, file));
            let mut interrupted = spooled.reader();
            interrupted.next_chunk().unwrap();
            assert!(read_all(&spooled) == expected && read_all(&spooled) == expected);
            drop(spooled);
            assert_eq!(budget.memory_used() + budget.files_used(), memory + file, "a reader keeps the bytes");
            drop(interrupted);
            assert_eq!(budget.memory_used() + budget.files_used(), 0);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_empty_body_stores_nothing() {
        let (directory, budget) = (tempfile::tempdir().unwrap(), SpoolBudget::new(0, 0));
        let nothing: Frames = vec![Ok(Frame::data(Bytes::new())), Ok(Frame::trailers(http::HeaderMap::new()))];
        for spooled in [
            collect(Empty::new(), &limits(&directory), &budget).await.unwrap(),
            collected(nothing, &limits(&directory), &budget).await.unwrap(),
            Spooled::default(),
        ] {
            assert!(spooled.store.is_none() && spooled.len() == 0);
            assert!(spooled.reader().is_end_stream());
            assert!(spooled.reader().next_chunk().unwrap().is_none());
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_body_beyond_the_limit_is_too_long_announced_or_not() {
        let (directory, budget) = (tempfile::tempdir().unwrap(), SpoolBudget::new(1 << 20, 1 << 20));
        let full = |length: usize| Full::new(Bytes::from(vec![0; length]));
        let longest = collect(full(100_000), &limits(&directory), &budget).await.unwrap();
        assert_eq!(longest.len(), 100_000);
        let error = collect(Announced, &limits(&directory), &budget).await.unwrap_err();
        assert!(matches!(error, CollectError::Spool(SpoolError::TooLong { limit: 100_000 })), "{error}");
        let error = collected(in_chunks(11, 10_000), &limits(&directory), &budget).await.unwrap_err();
        assert!(matches!(error, CollectError::Spool(SpoolError::TooLong { limit: 100_000 })), "{error}");
        let small = SpoolLimits { file_each: 5000, ..limits(&directory) };
        let error = collected(in_chunks(6, 1000), &small, &budget).await.unwrap_err();
        assert!(
            matches!(error, CollectError::Spool(SpoolError::TooLong { limit: 5000 })),
            "not even in memory: {error}"
        );
        drop(longest);
        assert_eq!(budget.memory_used() + budget.files_used(), 0);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn without_memory_the_file_is_used_and_without_both_the_body_fails() {
        let (directory, budget) = (tempfile::tempdir().unwrap(), SpoolBudget::new(0, 50_000));
        let spooled = collected(in_chunks(3, 1000), &limits(&directory), &budget).await.unwrap();
        assert_eq!((budget.memory_used(), budget.files_used()), (0, 3000));
        let error = collected(in_chunks(60, 1000), &limits(&directory), &budget).await.unwrap_err();
        assert!(matches!(error, CollectError::Spool(SpoolError::FilesUsedUp { limit: 50_000 })), "{error}");
        assert_eq!(read_all(&spooled), joined(&in_chunks(3, 1000)), "another body is not affected");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_failed_or_dropped_collection_returns_what_it_holds() {
        let (directory, budget) = (tempfile::tempdir().unwrap(), SpoolBudget::new(1 << 20, 1 << 20));
        let mut frames = in_chunks(3, 6000);
        frames.push(Err("reset"));
        let error = collected(frames, &limits(&directory), &budget).await.unwrap_err();
        assert!(matches!(error, CollectError::Body("reset")), "{error}");
        assert_eq!(budget.memory_used() + budget.files_used(), 0);

        let source = SpoolBudget::new(1 << 20, 1 << 20);
        let (mut writer, reader) = crate::gateway::spool::spool(&limits(&directory), &source);
        writer.push(Bytes::from(vec![0; 5000])).unwrap();
        let limits = limits(&directory);
        let mut collecting = Box::pin(collect(reader, &limits, &budget));
        assert!(collecting.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        assert_eq!(budget.memory_used(), 5000);
        drop(collecting);
        assert_eq!(budget.memory_used(), 0);
        assert!(writer.is_abandoned());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_spooled_body_is_a_body_for_any_thread() {
        fn is_body<B: Body<Data = Bytes, Error: Into<crate::sys::BoxError>> + Send + 'static>(_: &B) {}
        let (directory, budget) = (tempfile::tempdir().unwrap(), SpoolBudget::new(1 << 20, 1 << 20));
        let spooled = collect(Full::<Bytes>::from("text"), &limits(&directory), &budget).await.unwrap();
        is_body(&spooled.reader());
        let read: Result<_, SpoolError> = spooled.reader().collect().await;
        assert_eq!(read.unwrap().to_bytes(), "text");
    }
}
