//! What a worker does for its logs beside writing them: it follows when the files are opened again, and finds a place for its
//! output when the master is dead.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use tokio::io::Interest;

use super::access_log::AccessLog;
use crate::logging::files::LogFiles;
use crate::{logging, sys};

/// Runs as long as the worker does.
pub(super) async fn keep(files: Arc<LogFiles>, channel: Option<OwnedFd>, access_log: Option<Rc<AccessLog>>) {
    let write = async {
        if let Some(log) = &access_log {
            log.run().await;
        }
    };
    tokio::join!(write, follow(&files, channel, access_log.as_deref()));
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
            Err(error) => return log::error!("a worker goes on with its old log files: {error}"),
        }
    }
}

/// Standard output and error, as the master has made them: pipes that it reads.
pub(super) struct Pipes([Option<(u64, u64)>; 2]);

impl Pipes {
    pub(super) fn now() -> Self {
        Self([sys::identity(1), sys::identity(2)])
    }

    /// Nobody reads the pipes any more, and whoever writes to one would fail: the log takes their place. What the application
    /// has put there itself stays.
    pub(super) fn replace(&self) {
        let Some(log) = sys::descriptor(logging::descriptor()) else { return };
        for (fd, was) in (1..).zip(self.0) {
            if was.is_some() && sys::identity(fd) == was {
                let _ = sys::replace(fd, &log); // both are open
            }
        }
    }
}
