//! Mappings of files that somebody truncates.
//!
//! A page beyond the end of its file raises SIGBUS, whose default is death. The handler here has the mapping replaced by
//! zeroes, private to the process, and the instruction runs again: what it reads is damage, which every reader expects. The
//! mapping is then *lost*, in a word that is shared with all processes of a line of forks: none of them uses the memory
//! any more, or else each would have pages of its own, which a purge in another does not reach.
//!
//! - The whole mapping is replaced, and not the page alone, so that a process sees one state of it. If there is no memory for
//!   that, the page.
//! - The handler is installed when the first file is mapped, and what was there before is called for every other fault. A
//!   handler that the program installs later has the signal to itself, and calls [`recover`].
//! - A thread that blocks SIGBUS dies all the same: the kernel does not deliver the signal of a fault later.
//!
//! May not: allocate, lock or panic in the handler.
#![expect(unsafe_code, reason = "a signal handler, and the mappings that it replaces")]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use libc::{c_int, c_void, sigaction, siginfo_t};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

/// Files that a process may have mapped at the same time.
const MAX_FILES: usize = 256;
const FREE: usize = 0;
/// Somebody fills the entry in.
const TAKEN: usize = 1;
/// Of the page that is replaced if the whole mapping cannot be; any multiple of the machine's will do.
const PAGE: usize = 64 << 10;

struct Entry {
    /// The address, or [`FREE`] or [`TAKEN`].
    start: AtomicUsize,
    len: AtomicUsize,
    /// Not 0 when pages are lost, in whichever process; shared with the children.
    lost: AtomicPtr<AtomicU32>,
}

static ENTRIES: [Entry; MAX_FILES] =
    [const { Entry { start: AtomicUsize::new(FREE), len: AtomicUsize::new(0), lost: AtomicPtr::new(null_mut()) } };
        MAX_FILES];
/// What was to be done with SIGBUS before.
static BEFORE: OnceLock<sigaction> = OnceLock::new();

/// Keeps a mapping of a file in the table. To be dropped before the mapping.
#[derive(Debug)]
pub(crate) struct Guarded {
    entry: usize,
    lost: &'static AtomicU32,
}

impl Guarded {
    /// `None` if the size of what `fd` stands for is sealed: then nobody can truncate it.
    ///
    /// # Errors
    /// If too many files are mapped, or there is no memory.
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
        // SAFETY: new memory, at a place that the kernel chooses.
        let word = unsafe { libc::mmap(null_mut(), size_of::<AtomicU32>(), access, kind, -1, 0) };
        if word == libc::MAP_FAILED {
            entry.start.store(FREE, Ordering::Release);
            return Err(io::Error::last_os_error());
        }
        let word = word.cast::<AtomicU32>();
        entry.lost.store(word, Ordering::Relaxed);
        entry.len.store(len, Ordering::Relaxed);
        entry.start.store(start.addr(), Ordering::Release);
        // SAFETY: a page of zeroes, which is a valid atomic and is unmapped by `drop`, the last who uses the reference.
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
        // SAFETY: the page that `new` has mapped. The mapping is used by nobody now, so that no handler looks at its entry.
        unsafe { libc::munmap(word.cast(), size_of::<AtomicU32>()) };
    }
}

/// Replaces lost pages of a file that this crate has mapped, after SIGBUS at `address`. Returns whether the instruction
/// can run again.
///
/// Async-signal-safe. For the SIGBUS handler of a program that installs one after it has opened or attached to a
/// [`Segment`](crate::Segment) in a file: the handler of this crate, which that replaces, calls it by itself.
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
        // SAFETY: null, or the word of a mapping that is in use, as its thread is here because of it.
        if let Some(lost) = unsafe { self.lost.load(Ordering::Acquire).as_ref() } {
            lost.store(1, Ordering::SeqCst);
        }
        // Another thread may have done so just now. What it has written since is of no use, since the mapping is lost.
        let page = (address - start) / PAGE * PAGE;
        zeroed(start, len) || zeroed(start + page, PAGE.min(len - page))
    }
}

/// Puts zeroes into the place of what is mapped there.
fn zeroed(start: usize, len: usize) -> bool {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: errno is this thread's.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    // SAFETY: a part of a mapping of this crate's, to which there are references to atomics only, for which any value is
    // valid; it stays mapped, and is unmapped like the rest of it.
    let mapped = unsafe { libc::mmap(ptr::without_provenance_mut(start), len, access, kind, -1, 0) };
    // SAFETY: as above. The interrupted code must not see another value.
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
    // SAFETY: a null pointer asks for no change, and `before` is a valid place.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if BEFORE.set(before).is_err() {
        return Ok(()); // another thread does it
    }
    // SAFETY: as above.
    let mut action: sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `on_bus` is async-signal-safe, and a function for SA_SIGINFO.
    let outcome = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, null_mut()) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn on_bus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a handler a valid siginfo_t.
    let about = unsafe { info.as_ref() };
    if let Some(about) = about.filter(|about| about.si_code > 0)
        // SAFETY: of a fault the field is filled in.
        && recover_lost_pages(unsafe { about.si_addr() }.addr())
    {
        return;
    }
    let before = BEFORE.get().filter(|before| ![libc::SIG_DFL, libc::SIG_IGN].contains(&before.sa_sigaction));
    match before {
        Some(before) if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: with SA_SIGINFO the address is that of a function of these three, and they are the kernel's.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(before.sa_sigaction) };
            handler(signal, info, context);
        }
        Some(before) => {
            // SAFETY: without SA_SIGINFO it is one of the signal's number alone.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(before.sa_sigaction) };
            handler(signal);
        }
        None => {
            // SAFETY: all zeroes is the default action.
            let default: sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: async-signal-safe; a valid action.
            unsafe { libc::sigaction(signal, &raw const default, null_mut()) };
            if about.is_none_or(|about| about.si_code <= 0) {
                // It was sent, and no instruction faults again. The signal waits until this handler has returned.
                // SAFETY: async-signal-safe.
                unsafe { libc::raise(signal) };
            }
        }
    }
}
