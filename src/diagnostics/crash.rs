//! The crash handler of a worker: the crashing thread writes a report.
//!
//! On SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGSYS, SIGTRAP and SIGXCPU, the handler writes a line with the location and the reason
//! to the report pipe, then a line with a backtrace in addresses. Then the process dies as it would have without this handler: by the
//! same signal, with the same core dump. This module does not symbolize addresses; a child of the master does.
//!
//! - The first line is written before anything is tried that might not return. If the backtrace hangs (the unwinder is not designed for
//!   signal handlers), SIGALRM terminates the process; if the backtrace faults, the kernel terminates the process, because the signal
//!   is blocked.
//! - The standard library's handler, which recognizes a stack overflow, and a handler that the application set before the fork are
//!   called first, and may recover. A handler that the application sets later replaces this one.
//! - SIGBUS caused by a truncated cache file is not a crash: the page is replaced, and the instruction runs again.
//! - Only the worker itself reports: a child that the application forks reports nothing.
//!
//! The handlers must not allocate, lock or panic.
#![expect(unsafe_code, reason = "signal handlers, and the stacks they run on")]

use std::cell::Cell;
use std::fmt::Write;
use std::os::fd::{IntoRawFd as _, OwnedFd};
use std::ptr::{self, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::{io, mem, process};

use libc::{c_int, c_void, sigaction, siginfo_t, ucontext_t};

use super::code_address::Modules;
use super::current_request;

/// The signals of a crash, with their names in the log.
const SIGNALS: [(c_int, &str); 8] = [
    (libc::SIGSEGV, "SEGV"),
    (libc::SIGBUS, "BUS"),
    (libc::SIGABRT, "ABRT"),
    (libc::SIGFPE, "FPE"),
    (libc::SIGILL, "ILL"),
    (libc::SIGSYS, "SYS"),
    (libc::SIGTRAP, "TRAP"),
    (libc::SIGXCPU, "XCPU"),
];
/// Signals caused by an instruction that runs again when the handler returns. Their address is the accessed address, or the
/// instruction's own.
const FAULTS: [c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];
/// Size in bytes of the handler stack in this crate's threads. The standard library's own stack has space only for the first
/// line.
const STACK: usize = 64 << 10;
/// Maximum number of functions in a backtrace.
pub(crate) const MAX_FRAMES: usize = 48;
/// Size of the buffer of the longest line. A pipe accepts a write of this size in one piece.
const MAX_LINE: usize = 2048;
/// Time limit for the backtrace, in seconds.
const ANSWER_TIMEOUT: u32 = 2;

/// The state that the handlers need, created before they are installed.
struct CrashContext {
    process: c_int,
    report: c_int,
    modules: Modules,
    /// The previous action for each of [`SIGNALS`].
    before: [Option<sigaction>; SIGNALS.len()],
}

static CONTEXT: OnceLock<CrashContext> = OnceLock::new();
/// The thread that is writing its report.
static DYING: AtomicI32 = AtomicI32::new(0);
/// The first signal of that thread: the standard library turns a stack overflow into an abort.
static SIGNAL: AtomicI32 = AtomicI32::new(0);
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
static CODE: AtomicUsize = AtomicUsize::new(0);
/// The process that sent that signal; this process, if no other process did.
static SENDER: AtomicI32 = AtomicI32::new(0);
static INSTRUCTION: AtomicUsize = AtomicUsize::new(0);
static STACK_POINTER: AtomicUsize = AtomicUsize::new(0);

/// Makes crashes of this process write to `report`, and record the request of the crashing thread in the scoreboard. The
/// request is also recorded for a thread that calls `exit(3)`. Called once, in a new worker.
///
/// # Errors
/// Returns the error of `sigaction(2)`.
pub(crate) fn install(report: OwnedFd) -> io::Result<()> {
    let before = SIGNALS.map(|(signal, _)| action_of(signal).filter(|action| is_ours_to_take(signal, action)));
    let process = process::id().cast_signed();
    // The unwinder initializes itself on first use.
    backtrace::trace(|_| true);
    let will = CrashContext { process, report: report.into_raw_fd(), modules: Modules::own(), before };
    let taken = CONTEXT.get_or_init(|| will).before.map(|before| before.is_some());
    for ((signal, _), _) in SIGNALS.iter().zip(taken).filter(|(_, taken)| *taken) {
        set_action(*signal, on_crash as *const () as usize, libc::SA_SIGINFO | libc::SA_ONSTACK)?;
    }
    // SAFETY: `on_exit` is a function of this binary that may be called at any exit. If it cannot be registered, the report of
    // an exit does not name the request that caused it.
    unsafe { libc::atexit(on_exit) };
    Ok(())
}

/// Runs when the application calls `exit(3)` on this thread. The worker itself exits by `_exit`, which does not run
/// this.
extern "C" fn on_exit() {
    // SAFETY: async-signal-safe calls without arguments.
    let process = unsafe { libc::getpid() };
    if CONTEXT.get().is_some_and(|will| will.process == process) {
        current_request::accuse();
    }
}

/// Whether this module replaces the action. A handler that the application has set is kept, except for SIGSEGV and SIGBUS, for which
/// the standard library has a handler anyway.
fn is_ours_to_take(signal: c_int, action: &sigaction) -> bool {
    action.sa_sigaction == libc::SIG_DFL
        || (action.sa_sigaction != libc::SIG_IGN && [libc::SIGSEGV, libc::SIGBUS].contains(&signal))
}

fn action_of(signal: c_int) -> Option<sigaction> {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: sigaction = unsafe { mem::zeroed() };
    // SAFETY: a null pointer requests no change, and `action` is valid for writes during the whole call.
    let outcome = unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) };
    (outcome == 0).then_some(action)
}

/// Sets the action of a signal. While the handler runs, all signals are blocked except SIGBUS, whose handler recovers pages of a
/// truncated file.
pub(crate) fn set_action(signal: c_int, handler: usize, flags: c_int) -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: sigaction = unsafe { mem::zeroed() };
    (action.sa_sigaction, action.sa_flags) = (handler, flags);
    // SAFETY: the set is valid for writes.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    // SAFETY: the set is valid for writes, and the signal number is valid.
    unsafe { libc::sigdelset(&raw mut action.sa_mask, libc::SIGBUS) };
    // SAFETY: `handler` is SIG_DFL or one of this crate's functions for `flags`, which are async-signal-safe.
    let outcome = unsafe { libc::sigaction(signal, &raw const action, null_mut()) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn on_crash(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(will) = CONTEXT.get() else { return die_of(signal, true) };
    // SAFETY: the kernel passes a valid siginfo_t to a handler.
    let Some(about) = (unsafe { info.as_ref() }) else { return die_of(signal, true) };
    let code = about.si_code;
    let by_itself = code > 0 && FAULTS.contains(&signal); // the fault repeats when the handler returns
    // SAFETY: for a fault, the kernel fills in the field.
    if signal == libc::SIGBUS && by_itself && forkyard_shm::recover_lost_pages(unsafe { about.si_addr() }.addr()) {
        return;
    }
    // SAFETY: async-signal-safe calls without arguments.
    let thread = unsafe { libc::gettid() };
    // SAFETY: async-signal-safe calls without arguments.
    if unsafe { libc::getpid() } != will.process {
        return pass_on(will, signal, info, context).unwrap_or_else(|| die_of(signal, by_itself));
    }
    match DYING.compare_exchange(0, thread, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(_) => {}
        // A second crash of the thread that is already reporting one: the previous handler, which was called for the first
        // signal, has aborted.
        Err(first) if first == thread => {
            write_report(will);
            return die_of(signal, by_itself);
        }
        // Another thread is already reporting a crash, and will terminate this process.
        Err(_) => {
            for _ in 0..ANSWER_TIMEOUT + 2 {
                // SAFETY: async-signal-safe, and accesses no memory of this program.
                unsafe { libc::sleep(1) };
            }
            return die_of(signal, by_itself);
        }
    }
    // SAFETY: for a signal without an address this is another field, which the report does not contain.
    ADDRESS.store(unsafe { about.si_addr() }.addr(), Ordering::Relaxed);
    CODE.store(usize::try_from(code).unwrap_or(0), Ordering::Relaxed);
    let is_sent = [libc::SI_USER, libc::SI_TKILL, libc::SI_QUEUE].contains(&code);
    // SAFETY: with these codes the kernel fills in the field.
    let sender = if is_sent { unsafe { about.si_pid() } } else { will.process };
    SENDER.store(sender, Ordering::Relaxed);
    SIGNAL.store(signal, Ordering::Relaxed);
    let (instruction, stack) = registers(context).unwrap_or_default();
    INSTRUCTION.store(instruction, Ordering::Relaxed);
    STACK_POINTER.store(stack, Ordering::Relaxed);
    if pass_on(will, signal, info, context).is_some() && !is_default(signal) {
        DYING.store(0, Ordering::SeqCst); // the handler has recovered
        return;
    }
    write_report(will);
    die_of(signal, by_itself);
}

/// Calls the previous handler. Returns `None` if there was none.
fn pass_on(will: &CrashContext, signal: c_int, info: *mut siginfo_t, context: *mut c_void) -> Option<()> {
    let index = SIGNALS.iter().position(|(known, _)| *known == signal)?;
    let before = will.before[index].as_ref().filter(|before| before.sa_sigaction != libc::SIG_DFL)?;
    if before.sa_flags & libc::SA_SIGINFO == 0 {
        // SAFETY: without SA_SIGINFO the function takes only the signal's number.
        let handler: extern "C" fn(c_int) = unsafe { mem::transmute(before.sa_sigaction) };
        handler(signal);
    } else {
        // SAFETY: with SA_SIGINFO the address is that of a function with these three parameters, and the arguments come from the kernel.
        let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = unsafe { mem::transmute(before.sa_sigaction) };
        handler(signal, info, context);
    }
    Some(())
}

fn is_default(signal: c_int) -> bool {
    action_of(signal).is_none_or(|action| action.sa_sigaction == libc::SIG_DFL)
}

/// Makes the process die as it would without a handler, as soon as the handler returns.
fn die_of(signal: c_int, by_itself: bool) {
    let _ = set_action(signal, libc::SIG_DFL, 0);
    if !by_itself {
        // SAFETY: async-signal-safe. The signal stays pending until this handler has returned.
        unsafe { libc::raise(signal) };
    }
}

/// Writes the report: first the request, then the line that is safe to write, then the backtrace.
fn write_report(will: &CrashContext) {
    current_request::accuse();
    let sender = SENDER.load(Ordering::Relaxed);
    if sender != will.process {
        let mut line = Line::<32>::new("sent ");
        let _ = write!(line, "{sender}");
        line.send(will.report);
    }
    let signal = SIGNAL.load(Ordering::Relaxed);
    let name = SIGNALS.iter().find(|(known, _)| *known == signal).map_or("?", |(_, name)| name);
    let mut line = Line::<512>::new("said ");
    let mut thread = [0_u8; 16];
    // SAFETY: the kernel writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let thread = str::from_utf8(thread.split(|&byte| byte == 0).next().unwrap_or_default()).unwrap_or("?");
    let _ = write!(line, "{name} in thread {thread}");
    let has_address = CODE.load(Ordering::Relaxed) > 0 && FAULTS.contains(&signal);
    if has_address {
        let _ = write!(line, " at address {:#x}", ADDRESS.load(Ordering::Relaxed));
    }
    let at = INSTRUCTION.load(Ordering::Relaxed);
    let _ = line.write_str(", instruction ");
    let _ = will.modules.write(&mut line, at);
    if has_address && is_overflow() {
        let _ = line.write_str(" (stack overflow)");
    }
    line.send(will.report);
    if has_room() {
        trace(will, at);
    }
}

/// Writes the backtrace, starting from the interrupted instruction `at`.
fn trace(will: &CrashContext, at: usize) {
    let alarmed = set_action(libc::SIGALRM, on_alarm as *const () as usize, 0);
    // SAFETY: all zeroes is a valid set.
    let mut alarm: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: the set is valid for writes, and the signal number is valid.
    unsafe { libc::sigaddset(&raw mut alarm, libc::SIGALRM) };
    if alarmed.is_err() {
        return;
    }
    // SAFETY: async-signal-safe in practice: a system call.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const alarm, null_mut()) };
    // SAFETY: async-signal-safe.
    unsafe { libc::alarm(ANSWER_TIMEOUT) };
    let mut frames = [0; MAX_FRAMES];
    let frames = unwind(at, &mut frames);
    // SAFETY: async-signal-safe.
    unsafe { libc::alarm(0) };
    let mut line = Line::<MAX_LINE>::new("trace");
    for &frame in frames {
        let _ = line.write_str(" ");
        let _ = will.modules.write(&mut line, frame);
    }
    line.send(will.report);
}

/// Runs when the backtrace exceeds its time limit. Terminates the process by the signal of the crash.
extern "C" fn on_alarm(_: c_int) {
    let signal = SIGNAL.load(Ordering::Relaxed);
    let _ = set_action(signal, libc::SIG_DFL, 0);
    // SAFETY: all zeroes is a valid set.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: the set is valid for writes, and the signal number is valid.
    unsafe { libc::sigaddset(&raw mut set, signal) };
    // SAFETY: async-signal-safe in practice: a system call.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, null_mut()) };
    // SAFETY: async-signal-safe.
    unsafe { libc::raise(signal) };
}

/// The addresses of the instructions that this thread is executing, the innermost first, without those of the handler: `at` is
/// the interrupted instruction. For a caller, the address is that of its call.
pub(crate) fn unwind(at: usize, frames: &mut [usize; MAX_FRAMES]) -> &[usize] {
    let (mut count, mut begun) = (0, false);
    // SAFETY: the function is unsynchronized with respect to symbolization only, which is not done here.
    unsafe {
        backtrace::trace_unsynchronized(|frame| {
            let ip = frame.ip().addr();
            let is_call = begun;
            begun |= ip == at;
            if begun && ip != 0 {
                frames[count] = if is_call { ip - 1 } else { ip };
                count += 1;
            }
            count < MAX_FRAMES
        });
    }
    &frames[..count]
}

/// The address of the interrupted instruction; 0 if unknown.
pub(crate) fn instruction(context: *mut c_void) -> usize {
    registers(context).map_or(0, |(instruction, _)| instruction)
}

/// Whether the faulting access was just below the stack. Compilers touch a large frame page by page, from above.
fn is_overflow() -> bool {
    let (address, stack) = (ADDRESS.load(Ordering::Relaxed), STACK_POINTER.load(Ordering::Relaxed));
    stack != 0 && address.wrapping_sub(stack.wrapping_sub(64 << 10)) <= (68 << 10)
}

/// Instruction and stack pointer.
fn registers(context: *mut c_void) -> Option<(usize, usize)> {
    // SAFETY: the kernel passes a valid context to a handler.
    let context = unsafe { context.cast::<ucontext_t>().as_ref() }?;
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

/// Text in a fixed buffer; excess text is dropped.
struct Line<const ROOM: usize> {
    bytes: [u8; ROOM],
    length: usize,
}

impl<const ROOM: usize> Line<ROOM> {
    fn new(start: &str) -> Self {
        let mut line = Self { bytes: [0; ROOM], length: 0 };
        let _ = line.write_str(start);
        line
    }

    fn send(mut self, pipe: c_int) {
        let length = self.length.min(ROOM - 1);
        self.bytes[length] = b'\n';
        // SAFETY: the bytes are valid for the whole call. If the pipe is full or closed, the line is lost.
        unsafe { libc::write(pipe, self.bytes.as_ptr().cast(), length + 1) };
    }
}

impl<const ROOM: usize> Write for Line<ROOM> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = &mut self.bytes[self.length..ROOM - 1];
        let taken = text.len().min(room.len());
        room[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.length += taken;
        Ok(())
    }
}

/// Whether the stack of this handler is large enough for the unwinder.
fn has_room() -> bool {
    // SAFETY: all zeroes is a valid stack_t.
    let mut stack: libc::stack_t = unsafe { mem::zeroed() };
    // SAFETY: a null pointer requests no change, and `stack` is valid for writes during the whole call.
    let outcome = unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) };
    outcome == 0 && (stack.ss_flags & libc::SS_DISABLE != 0 || stack.ss_size >= STACK / 2)
}

/// An alternate signal stack, with an inaccessible page below it.
struct AlternateStack(*mut c_void);

thread_local! {
    static OWN_STACK: Cell<Option<AlternateStack>> = const { Cell::new(None) };
}

/// Size of the inaccessible page, for the largest page size in use.
const GUARD: usize = 64 << 10;

/// Gives this thread a stack for its signal handlers that is large enough for a backtrace. If no memory is available,
/// the thread keeps its current stack.
pub(crate) fn give_stack() {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory, at an address that the kernel chooses.
    let memory = unsafe { libc::mmap(null_mut(), GUARD + STACK, access, kind, -1, 0) };
    if memory == libc::MAP_FAILED {
        return;
    }
    let owned = AlternateStack(memory);
    // SAFETY: the lower part of that memory, which is not in use.
    let guarded = unsafe { libc::mprotect(memory, GUARD, libc::PROT_NONE) };
    let stack = libc::stack_t { ss_sp: memory.wrapping_byte_add(GUARD), ss_flags: 0, ss_size: STACK };
    // SAFETY: the memory belongs to this thread until `AlternateStack` is dropped, which disables the stack first.
    if guarded == 0 && unsafe { libc::sigaltstack(&raw const stack, null_mut()) } == 0 {
        OWN_STACK.set(Some(owned));
    }
}

impl Drop for AlternateStack {
    fn drop(&mut self) {
        // SAFETY: all zeroes is a valid stack_t.
        let mut stack: libc::stack_t = unsafe { mem::zeroed() };
        // SAFETY: a null pointer requests no change, and `stack` is valid for writes during the whole call.
        unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) };
        if stack.ss_sp == self.0.wrapping_byte_add(GUARD) {
            stack.ss_flags = libc::SS_DISABLE;
            // SAFETY: disables the stack; no handler runs on it now, because this code is not a handler.
            unsafe { libc::sigaltstack(&raw const stack, null_mut()) };
        }
        // SAFETY: the memory of `give_stack`, which is not used any more.
        unsafe { libc::munmap(self.0, GUARD + STACK) };
    }
}
