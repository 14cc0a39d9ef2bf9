//! Handles the truncation of mapped files.
//!
//! An access to a page beyond the end of its file raises SIGBUS, which by default kills the process. The handler in this file replaces the
//! mapping with zeroes that are private to the process. The instruction is then restarted and reads zeroes; every reader tolerates
//! corrupted data. From then on, the mapping is *lost*. A word that is shared by all processes of a chain of forks records this state, and
//! none of these processes uses the memory any more. If they did, each would have private pages that a purge in another process does not
//! reach.
//!
//! - The whole mapping is replaced rather than only the page, so that a process does not read a mixture of old data and zeroes. If there is
//!   not enough memory to replace the whole mapping, only the page is replaced.
//! - The handler is installed when the first file is mapped. For a fault at any other address, it calls the previous handler. A handler
//!   that the program installs later replaces this handler and should therefore call [`recover_lost_pages`].
//! - If a thread has SIGBUS blocked, the fault still kills the process, because the kernel cannot defer a signal caused by a fault.
//!
//! The handler must not allocate, lock or panic.
#![expect(unsafe_code, reason = "a signal handler, and the mappings that it replaces")]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use libc::{c_int, c_void, sigaction, siginfo_t};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

/// Maximum number of files that a process can have mapped at the same time.
const MAX_FILES: usize = 256;
const FREE: usize = 0;
/// Value that means that a thread is filling in the entry.
const TAKEN: usize = 1;
/// Number of bytes to replace if the whole mapping cannot be replaced. Must be a multiple of the system's page size.
const PAGE: usize = 64 << 10;

struct Entry {
    /// The address of the mapping, or [`FREE`] or [`TAKEN`].
    start: AtomicUsize,
    len: AtomicUsize,
    /// Nonzero if any process has lost pages. Shared with the children.
    lost: AtomicPtr<AtomicU32>,
}

static ENTRIES: [Entry; MAX_FILES] =
    [const { Entry { start: AtomicUsize::new(FREE), len: AtomicUsize::new(0), lost: AtomicPtr::new(null_mut()) } };
        MAX_FILES];
/// The previous action for SIGBUS.
static BEFORE: OnceLock<sigaction> = OnceLock::new();

/// Keeps a file's mapping in the table. Must be dropped before the mapping.
#[derive(Debug)]
pub(crate) struct Guarded {
    entry: usize,
    lost: &'static AtomicU32,
}

impl Guarded {
    /// Adds a mapping of the file `fd` to the table. Returns `None` if the size of the file is sealed, because such a file cannot be
    /// truncated.
    ///
    /// # Errors
    /// Fails if too many files are mapped, or if there is no memory.
    pub(crate) fn new(fd: BorrowedFd<'_>, start: *mut u8, len: usize) -> io::Result<Option<Guarded>> {
        let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_truncate);
        if seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK)) {
            return Ok(None);
        }
        install()?;
        let is_taken =
            |entry: &Entry| entry.start.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_ok();
        let free = ENTRIES.iter().position(is_taken).ok_or_else(|| io::Error::other("too many files are mapped"))?;
        let entry = &ENTRIES[free];
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: new memory, at an address that the kernel chooses.
        let word = unsafe { libc::mmap(null_mut(), size_of::<AtomicU32>(), access, kind, -1, 0) };
        if word == libc::MAP_FAILED {
            entry.start.store(FREE, Ordering::Release);
            return Err(io::Error::last_os_error());
        }
        let word = word.cast::<AtomicU32>();
        entry.lost.store(word, Ordering::Relaxed);
        entry.len.store(len, Ordering::Relaxed);
        entry.start.store(start.addr(), Ordering::Release);
        // SAFETY: a page of zeroes, which is a valid atomic; it is unmapped by `drop`, after the last use of the reference.
        Ok(Some(Guarded { entry: free, lost: unsafe { &*word } }))
    }

    /// Whether pages of the file are lost.
    #[inline]
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire) != 0
    }

    pub(crate) fn lose(&self) {
        self.lost.store(1, Ordering::SeqCst);
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let entry = &ENTRIES[self.entry];
        let word = entry.lost.swap(null_mut(), Ordering::AcqRel);
        entry.start.store(FREE, Ordering::Release);
        // SAFETY: the page was mapped by `new`. The mapping is no longer in use, so no handler reads its entry.
        unsafe { libc::munmap(word.cast(), size_of::<AtomicU32>()) };
    }
}

/// Replaces lost pages of a file that this crate has mapped, after a SIGBUS at `address`. Returns whether the instruction
/// can be restarted.
///
/// Async-signal-safe. A program that installs its own SIGBUS handler after it has opened or attached to a [`Segment`](crate::Segment) in a
/// file must call this function from its handler, because its handler replaces the handler of this crate.
pub fn recover_lost_pages(address: usize) -> bool {
    for entry in &ENTRIES {
        let start = entry.start.load(Ordering::Acquire);
        let len = entry.len.load(Ordering::Relaxed);
        if start > TAKEN && address.wrapping_sub(start) < len {
            return entry.replace(start, len, address);
        }
    }
    false
}

impl Entry {
    fn replace(&self, start: usize, len: usize, address: usize) -> bool {
        // SAFETY: null, or the word of a mapping that is in use, because this thread faulted in it.
        if let Some(lost) = unsafe { self.lost.load(Ordering::Acquire).as_ref() } {
            lost.store(1, Ordering::SeqCst);
        }
        // Another thread may have just replaced the page. Its writes since then are discarded, which is harmless because the mapping is
        // lost.
        let page = (address - start) / PAGE * PAGE;
        zeroed(start, len) || zeroed(start + page, PAGE.min(len - page))
    }
}

/// Replaces the mapping of this range with zeroes.
fn zeroed(start: usize, len: usize) -> bool {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: errno belongs to this thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: errno belongs to this thread.
    let before = unsafe { *errno };
    // SAFETY: the range is part of a mapping of this crate. The only references into it are to atomics, for which any value is valid. The
    // range stays mapped until the whole mapping is unmapped.
    let mapped = unsafe { libc::mmap(ptr::without_provenance_mut(start), len, access, kind, -1, 0) };
    // SAFETY: errno belongs to this thread. It is restored for the interrupted code.
    unsafe { *errno = before };
    mapped != libc::MAP_FAILED
}

/// Installs the handler, once for a process and its children.
fn install() -> io::Result<()> {
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // SAFETY: all zeroes is a valid sigaction.
    let mut before: sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null pointer requests no change, and `before` is valid for writes.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if BEFORE.set(before).is_err() {
        return Ok(()); // another thread installs the handler
    }
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `on_bus` is async-signal-safe, and has the signature required by SA_SIGINFO.
    let outcome = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, null_mut()) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn on_bus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo_t to the handler.
    let about = unsafe { info.as_ref() };
    if let Some(about) = about.filter(|about| about.si_code > 0)
        // SAFETY: the kernel fills in this field for a fault.
        && recover_lost_pages(unsafe { about.si_addr() }.addr())
    {
        return;
    }
    let before = BEFORE.get().filter(|before| ![libc::SIG_DFL, libc::SIG_IGN].contains(&before.sa_sigaction));
    match before {
        Some(before) if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: with SA_SIGINFO, the address is that of a function with these three parameters, and the arguments come from
            // the kernel.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(before.sa_sigaction) };
            handler(signal, info, context);
        }
        Some(before) => {
            // SAFETY: without SA_SIGINFO, the function takes only the signal number.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(before.sa_sigaction) };
            handler(signal);
        }
        None => {
            // SAFETY: all zeroes is the default action.
            let default: sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: sigaction is async-signal-safe, and the action is valid.
            unsafe { libc::sigaction(signal, &raw const default, null_mut()) };
            if about.is_none_or(|about| about.si_code <= 0) {
                // The signal was sent by a process, so no instruction will fault again. It stays pending until this handler returns.
                // SAFETY: raise is async-signal-safe.
                unsafe { libc::raise(signal) };
            }
        }
    }
}
