//! Lists, closes, duplicates and takes over file descriptors by number, and raises their limit.
#![expect(unsafe_code, reason = "part of the fence: see `sys.rs`")]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit};

/// Takes ownership of a descriptor whose owner was in a dead process; `None` if it is not open.
///
/// May only be called in a process that shared its descriptors with the dead process, and for descriptors that no value
/// in this process owns.
pub(crate) fn own(fd: RawFd) -> Option<OwnedFd> {
    descriptor_flags(fd)?;
    // SAFETY: `fd` is open, and no value owns it, as the comment above requires.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The original descriptor limit of this process, if the process has raised its limit.
pub(super) static DESCRIPTOR_LIMIT: OnceLock<(u64, u64)> = OnceLock::new();

/// Makes all programs start with this descriptor limit. This is necessary because this process is about to raise its
/// own limit, and programs that use select(2) break with more than 1024 descriptors.
pub(crate) fn note_descriptor_limit(soft: u64, hard: u64) {
    let _ = DESCRIPTOR_LIMIT.set((soft, hard)); // the first call sets the original limit
}

/// Whether close_range(2) supports this flag: Linux 5.11 and later, unless a seccomp filter refuses it.
fn has_close_range() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| close_range(u32::MAX, u32::MAX, libc::CLOSE_RANGE_CLOEXEC).is_ok())
}

fn close_range(first: u32, last: u32, flags: u32) -> io::Result<()> {
    // SAFETY: plain system call with three integers. The caller is responsible for closing only descriptors that are
    // not in use.
    let outcome = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Returns the argument for [`set_close_on_exec_from`]: nothing if close_range(2) is available, otherwise the
/// descriptors that are open in this process. Must be called before a fork, because it allocates.
pub(super) fn numbers_without_close_range() -> Vec<RawFd> {
    if has_close_range() { Vec::new() } else { open_or_possible() }
}

/// Returns the descriptors that are open in this process, or that may be open if this is unknown.
fn open_or_possible() -> Vec<RawFd> {
    open_descriptors().unwrap_or_else(|_| {
        // /proc is not mounted, so all numbers up to the limit are returned, within reason.
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard);
        (0..RawFd::try_from(limit.min(1 << 20)).unwrap_or(RawFd::MAX)).collect()
    })
}

/// Sets close-on-exec on all descriptors from `first` on. `open` lists the open descriptors if close_range(2) is not
/// available, and is empty otherwise. Async-signal-safe.
pub(super) fn set_close_on_exec_from(first: u32, open: &[RawFd]) -> io::Result<()> {
    if open.is_empty() {
        return close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
    for &fd in open.iter().filter(|&&fd| u32::try_from(fd).is_ok_and(|fd| fd >= first)) {
        // SAFETY: F_SETFD accepts any number, and changes a flag of the descriptor open there, if any.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// Closes every descriptor that is not in `keep`. May only be called in a child that has just been forked.
pub(crate) fn close_all_except(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep.iter().filter_map(|&fd| u32::try_from(fd).ok()).collect();
    keep.sort_unstable();
    keep.dedup();
    if !has_close_range() {
        let is_kept = |fd: &RawFd| u32::try_from(*fd).is_ok_and(|fd| keep.binary_search(&fd).is_ok());
        for fd in open_or_possible().into_iter().filter(|fd| !is_kept(fd)) {
            // SAFETY: only descriptors that the child does not use are closed, for the reason given below.
            unsafe { libc::close(fd) };
        }
        return;
    }
    let mut first = 0;
    for fd in keep.into_iter().map(Some).chain([None]) {
        let last = match fd {
            Some(0) => None,
            Some(fd) => Some(fd - 1),
            None => Some(u32::MAX),
        };
        if let Some(last) = last.filter(|&last| first <= last) {
            // Closes descriptors by number. The values that own these descriptors in this process are the master's. The
            // child never uses these values, because it exits through `_exit`.
            let _ = close_range(first, last, 0); // `has_close_range` has shown that it works
        }
        if let Some(fd) = fd {
            first = fd + 1;
        }
    }
}

/// Returns the numbers of all descriptors that are open in this process.
///
/// # Errors
/// Returns the error from reading `/proc/self/fd`.
pub(crate) fn open_descriptors() -> io::Result<Vec<RawFd>> {
    let listed: Vec<RawFd> =
        fs::read_dir("/proc/self/fd")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    // One of the numbers was the descriptor of the directory itself, which is closed by now.
    Ok(listed.into_iter().filter(|&fd| descriptor_flags(fd).is_some()).collect())
}

/// Returns the open descriptors that this program opened itself. They are recognized because Rust opens every
/// descriptor close-on-exec, and inherited descriptors are not close-on-exec.
///
/// # Errors
/// Fails as [`open_descriptors`] does.
pub(crate) fn own_descriptors() -> io::Result<Vec<RawFd>> {
    let mut open = open_descriptors()?;
    open.retain(|&fd| fd > 2 && descriptor_flags(fd).is_some_and(|flags| flags.contains(FdFlag::FD_CLOEXEC)));
    Ok(open)
}

/// Returns the flags of a descriptor by its number, or `None` if nothing is open there.
fn descriptor_flags(fd: RawFd) -> Option<FdFlag> {
    // SAFETY: F_GETFD accepts any number, and returns -1 if nothing is open there.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    (flags >= 0).then(|| FdFlag::from_bits_retain(flags))
}

/// Returns the identity of the file behind descriptor `fd`, for comparison, or `None` if it is not open.
pub(crate) fn identity(fd: RawFd) -> Option<(u64, u64)> {
    let status = nix::sys::stat::fstat(descriptor(fd)?).ok()?;
    Some((status.st_dev, status.st_ino))
}

/// Returns a copy of descriptor `fd`, above standard error and close-on-exec, or `None` if `fd` is not open in this
/// process.
pub(crate) fn descriptor(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC accepts any number and returns EBADF if nothing is open there.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    // SAFETY: a number that F_DUPFD_CLOEXEC returned is new, open and not owned elsewhere.
    (copy >= 0).then(|| unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Makes descriptor `fd` refer to the file of `file`, atomically. `fd` must be a descriptor that stays open for this
/// process's lifetime. If `fd` is above standard error, it is close-on-exec afterwards.
///
/// # Errors
/// Returns the error from `dup3(2)`.
pub(crate) fn replace(fd: RawFd, file: &OwnedFd) -> io::Result<()> {
    let flags = if fd > 2 { libc::O_CLOEXEC } else { 0 };
    // SAFETY: `file` is open. Users and owners of `fd` still have an open descriptor afterwards.
    let outcome = unsafe { libc::dup3(file.as_raw_fd(), fd, flags) };
    if outcome >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes ownership of the inherited descriptors among `numbers`. Descriptors that this program opened itself are not touched;
/// they are recognized because Rust opens them close-on-exec. The descriptors are close-on-exec from now on.
///
/// `numbers` come from the process that became this program or started it, and that opened the descriptors for this
/// program. Each number can be taken once.
pub(crate) fn take_over(numbers: &[RawFd]) -> BTreeMap<RawFd, OwnedFd> {
    let mut taken = BTreeMap::new();
    for &fd in numbers {
        if fd <= 2 || descriptor_flags(fd).is_none_or(|flags| flags.contains(FdFlag::FD_CLOEXEC)) {
            continue;
        }
        // SAFETY: the number is open, and no value of this process owns it: it was open before `main`, and this function, the only
        // place that takes such a number, makes it close-on-exec, so that it is not taken again.
        let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
        if fcntl(&descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).is_ok() {
            taken.insert(fd, descriptor);
        }
    }
    taken
}

/// Raises the number of descriptors that this process may have open to the hard limit, if possible.
pub(crate) fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, setrlimit};
    if let Some(hard) = hard_descriptor_limit() {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard); // on failure the limit is unchanged
    }
}

/// Returns the hard descriptor limit of this process.
pub(crate) fn hard_descriptor_limit() -> Option<u64> {
    use nix::sys::resource::{Resource, getrlimit};
    getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(_, hard)| hard)
}
