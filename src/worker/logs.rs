//! Maintains a worker's logs: switches to reopened log files, writes pending lines, and redirects the worker's output
//! when the master is dead.

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

/// Time before a worker tries again to switch to the new log files.
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

/// Writes log lines that wait for a slow reader, and the counts of dropped lines. Sleeps while there are none.
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

/// Switches to new log files whenever the master sends them.
async fn follow(files: &LogFiles, channel: Option<OwnedFd>, access_log: Option<&AccessLog>) {
    let Some(channel) = channel.and_then(|channel| sys::register(channel, Interest::READABLE).ok()) else { return };
    while let Ok(mut ready) = channel.readable().await {
        if let Some(log) = access_log {
            log.flush(); // the buffered lines belong to the old file
        }
        match files.take_in(channel.as_fd()) {
            Ok(true) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            Ok(false) => return, // the master is dead
            Err(error) => {
                // For example, no descriptor is free. The new files stay in the channel.
                log::error!("cannot switch to the new log files yet: {error}");
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

/// Standard output and standard error as set up by the master: pipes from which the master reads.
pub(super) struct OutputPipes([Option<(u64, u64)>; 2]);

impl OutputPipes {
    pub(super) fn now() -> Self {
        Self([sys::identity(1), sys::identity(2)])
    }

    /// Replaces the pipes with the log, because the pipes no longer have a reader and a write to them would fail. A
    /// descriptor that the application has replaced is kept.
    pub(super) fn replace(&self) {
        let Ok(log) = logging::blocking_copy() else { return };
        for (fd, was) in (1..).zip(self.0) {
            if was.is_some() && sys::identity(fd) == was {
                let _ = sys::replace(fd, &log); // both descriptors are open
            }
        }
    }
}
