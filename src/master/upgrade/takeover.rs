//! The start of a program that takes a running master's place, or is to show that it could.
//!
//! The variables by which it knows are believed only if the descriptor that they name is a sealed state in which the master
//! is this very process (or, for the check, its parent): a stray variable in somebody's environment means nothing.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;

use super::saved::Saved;
use crate::sys;

/// Names the descriptor of the state.
pub(crate) const STATE: &str = "FORKYARD_UPGRADE_FD";
/// Set for the check: get ready, say so, and end.
pub(crate) const CHECK: &str = "FORKYARD_UPGRADE_CHECK";

/// Whether this process only shows that it could.
pub(crate) fn is_check() -> bool {
    std::env::var_os(CHECK).is_some()
}

/// What a predecessor left, as far as nobody has claimed it yet. The rest is closed when this is dropped.
#[derive(Debug)]
pub(crate) struct Takeover {
    pub(crate) saved: Saved,
    descriptors: BTreeMap<RawFd, OwnedFd>,
    /// The predecessor is still there, and wants to know whether we could.
    pub(crate) check: bool,
}

impl Takeover {
    /// What was left to this process, if anything was.
    ///
    /// # Errors
    /// A sentence for the operator, if something was, and this build cannot use it.
    pub(crate) fn find() -> Result<Option<Self>, String> {
        let number = std::env::var(STATE).ok().and_then(|text| text.parse::<RawFd>().ok());
        let check = is_check();
        let Some(number) = number else {
            return if check { Err(format!("{CHECK} is set, and no {STATE}")) } else { Ok(None) };
        };
        let saved = match sys::descriptor(number) {
            Some(descriptor) => Saved::read(descriptor)?,
            None => None,
        };
        let master = if check { nix::unistd::getppid() } else { nix::unistd::getpid() };
        let Some(saved) = saved.filter(|saved| saved.pid == master.as_raw()) else {
            return if check { Err(format!("{STATE} is not the state of the master that asks")) } else { Ok(None) };
        };
        // Nothing else was passed on for the check: other numbers may be anybody's.
        let left = if check { saved.foundation() } else { saved.descriptors() };
        let mut descriptors = sys::take_over(&[&[number], left.as_slice()].concat());
        descriptors.remove(&number);
        Ok(Some(Self { saved, descriptors, check }))
    }

    /// The sockets that were made for this `--bind`, with the device and inode of their files.
    pub(crate) fn listeners(&mut self, bind: &str) -> Vec<(OwnedFd, Option<(u64, u64)>)> {
        let (ours, others) = std::mem::take(&mut self.saved.listeners).into_iter().partition(|one| one.bind == bind);
        self.saved.listeners = others;
        let ours: Vec<super::saved::SavedListener> = ours;
        ours.into_iter().filter_map(|one| Some((self.claim(one.fd)?, one.file))).collect()
    }

    /// The shared memory, and the file that it lies in.
    pub(crate) fn segment(&mut self) -> Option<(OwnedFd, Option<PathBuf>)> {
        Some((self.claim(self.saved.segment.fd)?, self.saved.segment.file.clone()))
    }

    pub(crate) fn lifeline(&mut self) -> Option<(OwnedFd, OwnedFd)> {
        let (read, write) = self.saved.lifeline;
        Some((self.claim(read)?, self.claim(write)?))
    }

    /// A descriptor that the state names.
    pub(crate) fn claim(&mut self, number: RawFd) -> Option<OwnedFd> {
        let claimed = self.descriptors.remove(&number)?;
        debug_assert_eq!(claimed.as_raw_fd(), number, "they keep their numbers");
        Some(claimed)
    }
}
