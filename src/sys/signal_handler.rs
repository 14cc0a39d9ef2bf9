//! Makes safe functions usable as signal handlers.
//!
//! A handler may run between any two instructions of its thread, so it must be async-signal-safe (signal-safety(7)): it
//! must not allocate, take a lock or panic. The functions in this module comply with this rule, and so do the wrappers
//! of plain system calls in `nix`.
#![expect(unsafe_code, reason = "part of the fence: see `sys.rs`")]

use std::marker::PhantomData;
use std::ptr::{null, null_mut};
use std::{io, mem};

use libc::{c_int, c_void, siginfo_t, ucontext_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, Signal, sigaction};

use super::signals::all_but_sigbus;

/// A signal handler. While it runs, all signals are blocked except SIGBUS, whose handler recovers pages of a truncated file.
///
/// # Safety
/// `handle` must be async-signal-safe: it must not allocate, take a lock or panic.
pub(crate) unsafe trait HandleSignal {
    fn handle(signal: Signal, delivery: &Delivery<'_>);
}

/// Makes `H` the handler of `signal`. Async-signal-safe.
///
/// # Errors
/// Returns the error from `sigaction(2)`.
pub(crate) fn set_handler<H: HandleSignal>(signal: Signal, flags: SaFlags) -> io::Result<()> {
    set_action(signal, SigHandler::SigAction(on_signal::<H>), flags)
}

/// Sets the default action of `signal`. Async-signal-safe.
pub(crate) fn reset_handler(signal: Signal) {
    let _ = set_action(signal, SigHandler::SigDfl, SaFlags::empty()); // cannot fail: the arguments are valid
}

fn set_action(signal: Signal, handler: SigHandler, flags: SaFlags) -> io::Result<()> {
    let action = SigAction::new(handler, flags, all_but_sigbus());
    // SAFETY: the handler is the default action, or `on_signal`, which calls an async-signal-safe function.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

/// The action of a signal at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ActionOfSignal {
    signal: Signal,
    action: libc::sigaction,
}

impl ActionOfSignal {
    /// Returns the current action. Async-signal-safe.
    pub(crate) fn current(signal: Signal) -> Option<Self> {
        // SAFETY: all zeroes is a valid sigaction.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: a null pointer requests no change, and `action` is valid for writes during the whole call.
        let outcome = unsafe { libc::sigaction(signal as c_int, null(), &raw mut action) };
        (outcome == 0).then_some(Self { signal, action })
    }

    pub(crate) fn is_default(&self) -> bool {
        self.action.sa_sigaction == libc::SIG_DFL
    }

    pub(crate) fn is_ignored(&self) -> bool {
        self.action.sa_sigaction == libc::SIG_IGN
    }

    /// Calls the handler of this action. Returns false if the action is not a handler.
    pub(crate) fn call(&self, delivery: &Delivery<'_>) -> bool {
        if self.is_default() || self.is_ignored() {
            return false;
        }
        let signal = self.signal as c_int;
        if self.action.sa_flags & libc::SA_SIGINFO == 0 {
            // SAFETY: without SA_SIGINFO, the address is that of a function that takes only the signal's number.
            let handler: extern "C" fn(c_int) = unsafe { mem::transmute(self.action.sa_sigaction) };
            handler(signal);
        } else {
            // SAFETY: with SA_SIGINFO, the address is that of a function with these parameters. The arguments come from the kernel.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { mem::transmute(self.action.sa_sigaction) };
            handler(signal, delivery.info, delivery.context);
        }
        true
    }
}

/// The information that the kernel passes to a handler.
#[derive(Debug)]
pub(crate) struct Delivery<'a> {
    info: *mut siginfo_t,
    context: *mut c_void,
    during_call: PhantomData<&'a siginfo_t>,
}

impl Delivery<'_> {
    fn info(&self) -> Option<&siginfo_t> {
        // SAFETY: null, or the kernel's description of the signal, which is valid during the call of the handler.
        unsafe { self.info.as_ref() }
    }

    /// Returns `si_code`, the reason for the signal, or 0 if it is unknown. It is positive if the kernel sent the
    /// signal.
    pub(crate) fn code(&self) -> c_int {
        self.info().map_or(0, |info| info.si_code)
    }

    /// Returns the address of a fault: the accessed address, or the address of the instruction. The result is
    /// meaningless for other signals.
    pub(crate) fn address(&self) -> usize {
        // SAFETY: the field overlaps others, all of which are plain integers.
        self.info().map_or(0, |info| unsafe { info.si_addr() }.addr())
    }

    /// Returns the process that sent the signal, if it was sent by kill(2), tgkill(2) or sigqueue(3).
    pub(crate) fn sender(&self) -> Option<c_int> {
        let info =
            self.info().filter(|info| [libc::SI_USER, libc::SI_TKILL, libc::SI_QUEUE].contains(&info.si_code))?;
        // SAFETY: the kernel fills in this field for these codes.
        Some(unsafe { info.si_pid() })
    }

    /// Returns the addresses of the interrupted instruction and of the stack.
    pub(crate) fn registers(&self) -> Option<(usize, usize)> {
        // SAFETY: null, or the interrupted context, which is valid during the call of the handler.
        let context = unsafe { self.context.cast::<ucontext_t>().as_ref() }?;
        #[cfg(target_arch = "x86_64")]
        {
            let register = |number: c_int| {
                let value = context.uc_mcontext.gregs.get(usize::try_from(number).ok()?)?;
                usize::try_from(value.cast_unsigned()).ok()
            };
            register(libc::REG_RIP).zip(register(libc::REG_RSP))
        }
        #[cfg(target_arch = "aarch64")]
        {
            usize::try_from(context.uc_mcontext.pc).ok().zip(usize::try_from(context.uc_mcontext.sp).ok())
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            let _ = context;
            None
        }
    }
}

extern "C" fn on_signal<H: HandleSignal>(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the address of a variable that belongs to this thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the address is valid as long as the thread exists.
    let before = unsafe { *errno };
    if let Ok(signal) = Signal::try_from(signal) {
        H::handle(signal, &Delivery { info, context, during_call: PhantomData });
    }
    // SAFETY: the address is valid as long as the thread exists.
    unsafe { *errno = before };
}

/// Registers a function that runs when any thread calls `exit(3)`. If registration fails, the function is never called.
pub(crate) fn at_exit(function: extern "C" fn()) {
    // SAFETY: the function may be called at any time; it is never unloaded.
    unsafe { libc::atexit(function) };
}

/// Returns the size in bytes of the stack on which this thread's handlers run, or `None` if they run on the thread's
/// own stack. Async-signal-safe.
pub(crate) fn handler_stack_size() -> Option<usize> {
    current_stack().filter(|stack| stack.ss_flags & libc::SS_DISABLE == 0).map(|stack| stack.ss_size)
}

fn current_stack() -> Option<libc::stack_t> {
    // SAFETY: all zeroes is a valid stack_t.
    let mut stack: libc::stack_t = unsafe { mem::zeroed() };
    // SAFETY: a null pointer requests no change, and `stack` is valid for writes during the whole call.
    let outcome = unsafe { libc::sigaltstack(null(), &raw mut stack) };
    (outcome == 0).then_some(stack)
}

/// The stack on which a thread's handlers run, with an inaccessible page below it.
#[derive(Debug)]
pub(crate) struct HandlerStack {
    memory: *mut c_void,
    size: usize,
}

/// Size of the inaccessible page: the largest page size in use.
const GUARD_SIZE: usize = 64 << 10;

impl HandlerStack {
    /// Makes this thread's handlers run on a new stack of `size` bytes until the returned value is dropped. The value
    /// must be dropped on the same thread. Returns `None` if no memory is available; the handlers then run where they
    /// ran before.
    pub(crate) fn install(size: usize) -> Option<Self> {
        let length = size.checked_add(GUARD_SIZE)?;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory, at an address that the kernel chooses.
        let memory = unsafe { libc::mmap(null_mut(), length, access, kind, -1, 0) };
        if memory == libc::MAP_FAILED {
            return None;
        }
        let owned = Self { memory, size };
        // SAFETY: the lower part of that memory, which is not in use.
        let guarded = unsafe { libc::mprotect(memory, GUARD_SIZE, libc::PROT_NONE) };
        let stack = libc::stack_t { ss_sp: owned.bottom(), ss_flags: 0, ss_size: size };
        // SAFETY: the memory belongs to `owned`, whose drop disables the stack before it releases the memory.
        let is_set = guarded == 0 && unsafe { libc::sigaltstack(&raw const stack, null_mut()) } == 0;
        is_set.then_some(owned)
    }

    fn bottom(&self) -> *mut c_void {
        self.memory.wrapping_byte_add(GUARD_SIZE)
    }
}

impl Drop for HandlerStack {
    fn drop(&mut self) {
        if let Some(mut stack) = current_stack().filter(|stack| stack.ss_sp == self.bottom()) {
            stack.ss_flags = libc::SS_DISABLE;
            // SAFETY: disables the stack. Fails if a handler is running on it.
            if unsafe { libc::sigaltstack(&raw const stack, null_mut()) } != 0 {
                return; // the memory is in use
            }
        }
        // SAFETY: the memory of `install`, which is not used any more.
        unsafe { libc::munmap(self.memory, GUARD_SIZE + self.size) };
    }
}
