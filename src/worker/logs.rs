//! What a worker does for its logs beside writing them: it follows when the files are opened again, and finds a place for its
//! output when the master is dead.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::service::access_log::AccessLog;
use crate::logging::files::LogFiles;
use crate::{logging, sys};

/// How long a worker waits before it tries again to take new log files.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Runs as long as the worker does.
pub(super) async fn keep(files: Arc<LogFiles>, channel: Option<OwnedFd>, access_log: Option<Rc<AccessLog>>) {
    let write = async {
        if let Some(log) = &access_log {
            log.run().await;
        }
    };
    tokio::join!(write, follow(&files, channel, access_log.as_deref()), write_pending());
}

/// Writes lines of the log that have to wait for its reader, and counts of those that were left out. Without any, it sleeps.
async fn write_pending() {
    let pending = Arc::new(Notify::new());
    let notify = Arc::clone(&pending);
    logging::on_pending(move || notify.notify_one());
    loop {
        pending.notified().await;
        while let Some(due) = logging::tick() {
            tokio::time::sleep(due).await;
        }
    }
}

/// Goes on with new log files whenever the master has some.
async fn follow(files: &LogFiles, channel: Option<OwnedFd>, access_log: Option<&AccessLog>) {
    let Some(channel) = channel.and_then(|channel| sys::register(channel, Interest::READABLE).ok()) else { return };
    while let Ok(mut ready) = channel.readable().await {
        if let Some(log) = access_log {
            log.flush(); // these belong to the old file
        }
        match files.take_in(channel.as_fd()) {
            Ok(true) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            Ok(false) => return, // the master is dead
            Err(error) => {
                // No descriptors, say. The new files wait in the channel.
                log::error!("a worker goes on with its old log files until it can open the new ones: {error}");
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

/// Standard output and error, as the master has made them: pipes that it reads.
pub(super) struct OutputPipes([Option<(u64, u64)>; 2]);

impl OutputPipes {
    pub(super) fn now() -> Self {
        Self([sys::identity(1), sys::identity(2)])
    }

    /// Nobody reads the pipes any more, and whoever writes to one would fail: the log takes their place. What the application
    /// has put there itself stays.
    pub(super) fn replace(&self) {
        let Ok(log) = logging::blocking_copy() else { return };
        for (fd, was) in (1..).zip(self.0) {
            if was.is_some() && sys::identity(fd) == was {
                let _ = sys::replace(fd, &log); // both are open
            }
        }
    }
}
