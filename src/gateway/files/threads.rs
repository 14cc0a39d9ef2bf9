//! Runs file operations on threads, because they wait for the disk.

use std::io;
use std::sync::Arc;

use tokio::sync::Semaphore;

/// Maximum number of file operations of a gateway at a time.
const MAX_OPERATIONS: usize = 32;

/// tokio's threads for blocking functions. Clones share the limit.
#[derive(Clone, Debug)]
pub(super) struct FileThreads(Arc<Semaphore>);

impl Default for FileThreads {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_OPERATIONS)))
    }
}

impl FileThreads {
    /// Runs a file operation. It runs to its end even if the future is dropped.
    ///
    /// # Errors
    /// Fails if the operation panics.
    pub(super) async fn run<T: Send + 'static>(&self, operation: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let permit = Arc::clone(&self.0).acquire_owned().await.map_err(io::Error::other)?;
        let operation = move || {
            let _permit = permit;
            operation()
        };
        tokio::task::spawn_blocking(operation).await.map_err(io::Error::other)
    }
}
