//! Makes each event on a descriptor wake one waiting process instead of all, with EPOLLEXCLUSIVE (epoll_ctl(2)), which
//! tokio does not support.
//!
//! tokio registers a descriptor with its epoll instance under a token, and uses an event's token as the address of its record of
//! the descriptor. `/proc/self/fdinfo` contains the token. This module removes the descriptor from the instance and adds it again
//! with the same token and with EPOLLEXCLUSIVE.
//!
//! Such a token cannot dangle, whatever tokio uses it for:
//! - An event loop must accept a descriptor's token from the moment it registers the descriptor until it removes the
//!   registration, when the `AsyncFd` is dropped. [`Exclusive`] owns the `AsyncFd`, does not hand it out, and is the
//!   only code that adds the token to the instance, and only while the registration exists.
//! - The token belongs to that registration and no other: the descriptor's number was in no epoll instance before it
//!   was registered (existing entries are ignored), and there is exactly one token afterwards. If there is not exactly
//!   one token (the event loop does not use epoll, for example, or registers a copy of the descriptor), there is no
//!   exclusive registration, and every process is woken.
//! - The token is added to the instance in which it was found, through this module's own descriptor for that instance, not by a
//!   number that may refer to another file by now.
//! - An event loop that changed the token of an existing registration would use EPOLL_CTL_MOD, which the kernel refuses for an
//!   exclusive registration (EINVAL) and for a paused one (ENOENT): the event loop would get an error.
//!
//! When an [`Exclusive`] is dropped, it first adds the descriptor to the instance again if it was paused, so that tokio
//! can remove the descriptor as usual.
#![expect(unsafe_code, reason = "epoll_ctl with a token")]

use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::{fs, io};

use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

/// A descriptor to read from, watched by the event loop of this thread.
#[derive(Debug)]
pub(crate) struct Exclusive {
    fd: AsyncFd<OwnedFd>,
    /// `None` if the registration was not found. Each event then wakes all processes.
    registration: Option<Registration>,
    is_paused: Cell<bool>,
}

/// Where and how tokio has registered the descriptor.
#[derive(Debug)]
struct Registration {
    epoll: OwnedFd,
    token: u64,
}

impl Exclusive {
    /// Registers a descriptor with the event loop.
    ///
    /// # Errors
    /// Returns the error from `epoll_ctl(2)`.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let strangers = registrations_of(fd.as_raw_fd());
        let fd = super::register(fd, Interest::READABLE)?;
        let registration = Registration::find(fd.as_raw_fd(), &strangers);
        let exclusive = Self { fd, registration, is_paused: Cell::new(false) };
        exclusive.pause();
        exclusive.resume()?;
        Ok(exclusive)
    }

    /// Whether an event wakes only one process.
    pub(crate) fn is_exclusive(&self) -> bool {
        self.registration.is_some()
    }

    /// Whether events are stopped until [`Exclusive::resume`] is called.
    pub(crate) fn is_paused(&self) -> bool {
        self.is_paused.get()
    }

    /// Stops events from arriving in this process, so that other processes receive them.
    pub(crate) fn pause(&self) {
        let Some(Registration { epoll, .. }) = self.registration.as_ref().filter(|_| !self.is_paused.replace(true))
        else {
            return;
        };
        // SAFETY: plain system call with integers. If the descriptor is not registered, nothing happens.
        unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, self.fd.as_raw_fd(), std::ptr::null_mut()) };
    }

    /// Lets events arrive again, each of them at one of the waiting processes.
    ///
    /// # Errors
    /// Returns the error from `epoll_ctl(2)`.
    pub(crate) fn resume(&self) -> io::Result<()> {
        let Some(Registration { epoll, token }) = self.registration.as_ref().filter(|_| self.is_paused.get()) else {
            return Ok(());
        };
        let events = (libc::EPOLLIN | libc::EPOLLEXCLUSIVE).cast_unsigned();
        let mut event = libc::epoll_event { events, u64: *token };
        let (epoll, fd) = (epoll.as_raw_fd(), self.fd.as_raw_fd());
        // SAFETY: `event` is valid for the whole call. Its token is the token under which tokio has registered
        // `self.fd` with this instance. The token does not stay in the instance longer than that registration exists:
        // `self.fd` lives as long as `self` and, when dropped, removes the descriptor from the instance, whichever code
        // added it.
        let outcome = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) };
        if outcome != 0 {
            return Err(io::Error::last_os_error());
        }
        self.is_paused.set(false);
        Ok(())
    }

    /// Returns when the descriptor may be readable.
    ///
    /// # Errors
    /// Fails if the event loop ends.
    pub(crate) async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.fd.readable().await
    }
}

impl AsFd for Exclusive {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        // On failure, tokio finds nothing to remove, and keeps its record of the descriptor until the event loop ends.
        let _ = self.resume();
    }
}

impl Registration {
    /// Finds the new registration of `fd`; `strangers` are the registrations that existed before.
    fn find(fd: RawFd, strangers: &[(RawFd, u64)]) -> Option<Self> {
        let mut new = registrations_of(fd).into_iter().filter(|found| !strangers.contains(found));
        let (epoll, token) = new.next()?;
        // tokio has two descriptors for its one instance, so the same token may be found twice. Different tokens would
        // belong to two instances.
        if new.any(|(_, other)| other != token) {
            return None;
        }
        Some(Self { epoll: super::descriptor(epoll)?, token })
    }
}

/// Returns the epoll instances of this process in which a descriptor with this number is registered, each with its
/// token.
fn registrations_of(fd: RawFd) -> Vec<(RawFd, u64)> {
    let mut found = Vec::new();
    for epoll in super::open_descriptors().unwrap_or_default() {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{epoll}")).unwrap_or_default();
        // "tfd:        7 events:       19 data: 5634ab…  pos:0 ino:… sdev:…" for each descriptor
        for line in info.lines().filter(|line| line.starts_with("tfd:")) {
            let mut words = line.split_ascii_whitespace();
            let target = words.nth(1).and_then(|word| word.parse().ok());
            let data = words.skip_while(|word| *word != "data:").nth(1);
            let token = data.and_then(|data| u64::from_str_radix(data, 16).ok());
            found.extend(token.filter(|_| target == Some(fd)).map(|token| (epoll, token)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    async fn takes_a_byte(exclusive: &Exclusive, mut from: &UnixStream) {
        from.write_all(b"!").unwrap();
        loop {
            let mut ready = exclusive.readable().await.unwrap();
            let mut byte = [0];
            match nix::unistd::read(exclusive.as_fd(), &mut byte) {
                Ok(count) => return assert_eq!(count, 1),
                Err(_) => ready.clear_ready(),
            }
        }
    }

    fn pair() -> (OwnedFd, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours.into(), theirs)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn it_is_paused_and_resumed_and_nothing_stays_registered_after_it_is_dropped() {
        for is_paused in [false, true] {
            let (ours, theirs) = pair();
            let number = ours.as_raw_fd();
            let exclusive = Exclusive::new(ours).unwrap();
            assert!(exclusive.is_exclusive() && !exclusive.is_paused());
            takes_a_byte(&exclusive, &theirs).await;
            exclusive.pause();
            exclusive.pause();
            assert_eq!((exclusive.is_paused(), registrations_of(number)), (true, Vec::new()));
            exclusive.resume().unwrap();
            exclusive.resume().unwrap();
            takes_a_byte(&exclusive, &theirs).await;
            if is_paused {
                exclusive.pause();
            }
            // The unread bytes still cause an event.
            (&theirs).write_all(b"!").unwrap();
            let copy = exclusive.as_fd().try_clone_to_owned().unwrap();
            drop(exclusive);
            assert_eq!(registrations_of(number), []);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            drop(copy);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_foreign_registration_of_the_same_number_is_not_used() {
        const STRANGE: u64 = 0xdead_beef;
        // SAFETY: a new descriptor.
        let stranger = super::super::own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }).unwrap();
        let (before, _theirs) = pair();
        let number = before.as_raw_fd();
        let mut event = libc::epoll_event { events: libc::EPOLLIN.cast_unsigned(), u64: STRANGE };
        // SAFETY: `event` is valid for the whole call, and no thread waits for events of that instance.
        let added = unsafe { libc::epoll_ctl(stranger.as_raw_fd(), libc::EPOLL_CTL_ADD, number, &raw mut event) };
        assert_eq!(added, 0);
        let copy = before.try_clone().unwrap(); // the copy keeps the socket registered under a number that is free
        drop(before);
        let (ours, theirs) = pair();
        let ours = if ours.as_raw_fd() == number { ours } else { ours.try_clone().unwrap() };
        assert!(registrations_of(number).iter().any(|&(_, token)| token == STRANGE));
        let exclusive = Exclusive::new(ours).unwrap();
        if exclusive.as_fd().as_raw_fd() == number {
            assert_ne!(exclusive.registration.as_ref().unwrap().token, STRANGE);
        }
        takes_a_byte(&exclusive, &theirs).await;
        drop(copy);
    }
}
