//! The body of a response that consists of parts of a file.
//!
//! A piece is read when the connection asks for the next one, so a slow client holds one piece in memory and no thread. If
//! the file is truncated or changed in place meanwhile, the body fails: the client would otherwise receive a mixture of
//! two versions. A file that is replaced by rename(2), or removed, is sent to its end, because it stays open.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::ranges::ByteRange;
use super::threads::FileThreads;
use crate::gateway::beneath::{OpenFile, Version};

/// Maximum number of bytes in one piece.
pub(super) const PIECE: u64 = 64 << 10;

/// A part of the body.
#[derive(Debug)]
pub(super) enum Part {
    Text(Bytes),
    Range(ByteRange),
}

impl Part {
    fn length(&self) -> u64 {
        match self {
            Self::Text(text) => text.len() as u64,
            Self::Range(range) => range.length(),
        }
    }
}

type Reading = Pin<Box<dyn Future<Output = io::Result<Bytes>>>>;

pub(crate) struct FileBody {
    file: Arc<OpenFile>,
    parts: VecDeque<Part>,
    /// Number of bytes that have not been returned.
    left: u64,
    threads: FileThreads,
    reading: Option<Reading>,
}

impl FileBody {
    pub(super) fn new(file: OpenFile, parts: impl IntoIterator<Item = Part>, threads: &FileThreads) -> Self {
        let parts: VecDeque<Part> = parts.into_iter().filter(|part| part.length() > 0).collect();
        let left = parts.iter().map(Part::length).sum();
        Self { file: Arc::new(file), parts, left, threads: threads.clone(), reading: None }
    }

    /// Returns the number of bytes that follow.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// Returns the next piece, or `None` at the end.
    pub(crate) fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            if let Some(reading) = &mut self.reading {
                let read = ready!(reading.as_mut().poll(context));
                self.reading = None;
                return Poll::Ready(Some(read.inspect(|piece| self.left -= piece.len() as u64)));
            }
            let range = match self.parts.front_mut() {
                None => return Poll::Ready(None),
                Some(Part::Text(text)) => {
                    let text = std::mem::take(text);
                    self.parts.pop_front();
                    self.left -= text.len() as u64;
                    return Poll::Ready(Some(Ok(text)));
                }
                Some(Part::Range(range)) => {
                    let first = ByteRange { start: range.start, end: range.end.min(range.start + PIECE) };
                    range.start = first.end;
                    if range.start == range.end {
                        self.parts.pop_front();
                    }
                    first
                }
            };
            let (file, threads) = (Arc::clone(&self.file), self.threads.clone());
            self.reading = Some(Box::pin(async move { threads.run(move || read(&file, range)).await? }));
        }
    }
}

impl fmt::Debug for FileBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileBody").field("file", &self.file).field("left", &self.left).finish_non_exhaustive()
    }
}

/// Reads a piece of a file. Blocks while the disk is read.
///
/// # Errors
/// Fails if the file does not have the state in which it was opened.
pub(super) fn read(file: &OpenFile, range: ByteRange) -> io::Result<Bytes> {
    let mut buffer = vec![0; usize::try_from(range.length()).map_err(io::Error::other)?];
    file.file.read_exact_at(&mut buffer, range.start).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::other("the file was truncated while it was sent"),
        kind => io::Error::new(kind, format!("the file cannot be read: {error}")),
    })?;
    // A write sets the time of the modification before it changes the contents.
    if Version::of(&file.file.metadata()?) != file.version {
        return Err(io::Error::other("the file was changed while it was sent (replace files with rename)"));
    }
    Ok(buffer.into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::future::poll_fn;

    use super::*;
    use crate::gateway::beneath::Beneath;

    fn opened(directory: &tempfile::TempDir, contents: &[u8]) -> OpenFile {
        fs::write(directory.path().join("file"), contents).unwrap();
        Beneath::open(directory.path(), "--static").unwrap().open_file(b"file").unwrap()
    }

    async fn collect(body: &mut FileBody) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(piece) = poll_fn(|context| body.poll_piece(context)).await {
            all.extend_from_slice(&piece?);
        }
        Ok(all)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn parts_are_sent_in_their_order() {
        let directory = tempfile::tempdir().unwrap();
        let contents: Vec<u8> = (0..300_000_u32).map(|number| u8::try_from(number % 251).unwrap()).collect();
        let file = opened(&directory, &contents);
        let text = || Part::Text(Bytes::from_static(b"text"));
        let range = |start, end| Part::Range(ByteRange { start, end });
        let parts = [text(), range(200_000, 300_000), range(5, 5), text(), range(0, 70_000)];
        let mut body = FileBody::new(file, parts, &FileThreads::default());
        assert_eq!(body.left(), 170_008);
        let all = collect(&mut body).await.unwrap();
        assert!(all == [b"text", &contents[200_000..], b"text", &contents[..70_000]].concat());
        assert_eq!(body.left(), 0);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_changed_file_breaks_the_body_off_and_a_removed_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let contents = vec![1; 200_000];
        let change = |name: &str| match name {
            "truncated" => fs::File::options().write(true).open(&path).unwrap().set_len(100_000).unwrap(),
            "changed" => {
                let file = fs::File::options().write(true).open(&path).unwrap();
                file.write_all_at(b"x", 0).unwrap();
                file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
            }
            "replaced" => {
                fs::write(directory.path().join("new"), "").unwrap();
                fs::rename(directory.path().join("new"), &path).unwrap();
            }
            _ => fs::remove_file(&path).unwrap(),
        };
        for (name, is_whole) in [("truncated", false), ("changed", false), ("replaced", true), ("removed", true)] {
            let file = opened(&directory, &contents);
            let all = Part::Range(ByteRange { start: 0, end: 200_000 });
            let mut body = FileBody::new(file, [all], &FileThreads::default());
            poll_fn(|context| body.poll_piece(context)).await.unwrap().unwrap();
            change(name);
            let rest = collect(&mut body).await;
            assert_eq!(rest.is_ok(), is_whole, "{name}: {rest:?}");
        }
    }
}
