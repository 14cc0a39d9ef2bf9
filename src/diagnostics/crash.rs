//! Handles the crash of a worker: the crashing thread writes a report.
//!
//! On SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGSYS, SIGTRAP and SIGXCPU, the handler writes a line with the
//! location and the reason to the report pipe, then a line with a backtrace in addresses. Then the process dies as it
//! would have without this handler, by the same signal and with the same core dump. The addresses are symbolized by a
//! child of the master, not by this module.
//!
//! - The first line is written before any step that might not return. If the backtrace hangs (the unwinder is not
//!   designed for signal handlers), SIGALRM terminates the process; if the backtrace faults, the kernel terminates the
//!   process, because the signal is blocked.
//! - The standard library's handler, which recognizes a stack overflow, and a handler that the application set before the fork are
//!   called first, and may recover. A handler that the application sets later replaces this one.
//! - SIGBUS caused by a truncated cache file is not a crash: the page is replaced, and the instruction runs again.
//! - Only the worker itself writes a report; a child that the application forks does not.
//!
//! The handlers must not allocate, lock or panic.
#![expect(unsafe_code, reason = "signal handlers, which promise to be async-signal-safe")]

use std::cell::Cell;
use std::fmt::Write;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::{io, process};

use nix::sys::signal::{SaFlags, SigSet, Signal, raise};
use nix::unistd::{alarm, getpid, gettid, sleep, write};

use super::code_address::Modules;
use super::{current_request, unwind};
use crate::sys;
use crate::sys::signal_handler::{self, ActionOfSignal, Delivery, HandleSignal, HandlerStack};

/// The signals of a crash.
const SIGNALS: [Signal; 8] = [
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGABRT,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGSYS,
    Signal::SIGTRAP,
    Signal::SIGXCPU,
];
/// Signals caused by an instruction that runs again when the handler returns. The address in such a signal is the
/// accessed address, or the address of the instruction.
const FAULTS: [Signal; 4] = [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL];
/// Size in bytes of the handler stack in this crate's threads. The standard library's own stack has space only for the first
/// line.
const STACK_SIZE: usize = 64 << 10;
/// Size of the buffer for a line, in bytes. A write of this size to a pipe is atomic.
const MAX_LINE: usize = 2048;
/// Time limit for the backtrace, in seconds.
const BACKTRACE_TIMEOUT: u32 = 2;

/// The state that the handlers need, created before the handlers are installed.
struct CrashContext {
    process: i32,
    report: OwnedFd,
    modules: Modules,
}

static CONTEXT: OnceLock<CrashContext> = OnceLock::new();
/// The previous action for each of [`SIGNALS`] that this module handles.
static PREVIOUS: [OnceLock<ActionOfSignal>; SIGNALS.len()] = [const { OnceLock::new() }; SIGNALS.len()];
/// The thread that is writing its report.
static DYING: AtomicI32 = AtomicI32::new(0);
/// The signal that this thread received first. A second one may follow, because the standard library turns a stack
/// overflow into an abort.
static SIGNAL: AtomicI32 = AtomicI32::new(0);
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);
/// The process that sent the first signal, or this process if no other process sent it.
static SENDER: AtomicI32 = AtomicI32::new(0);
static INSTRUCTION: AtomicUsize = AtomicUsize::new(0);
static STACK_POINTER: AtomicUsize = AtomicUsize::new(0);

/// Installs the crash handler: a crash of this process writes to `report`, and records the crashing thread's request in
/// the scoreboard. The request of a thread that calls `exit(3)` is recorded too. Called once, in a new worker.
///
/// # Errors
/// Returns the error from `sigaction(2)`.
pub(crate) fn install(report: OwnedFd) -> io::Result<()> {
    unwind::initialize();
    CONTEXT.get_or_init(|| CrashContext { process: process::id().cast_signed(), report, modules: Modules::own() });
    for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS) {
        if let Some(action) = ActionOfSignal::current(signal).filter(|action| is_ours_to_take(signal, action)) {
            let _ = previous.set(action); // this function runs once
            signal_handler::set_handler::<Crash>(signal, SaFlags::SA_ONSTACK)?;
        }
    }
    signal_handler::at_exit(on_exit);
    Ok(())
}

/// Runs when the application calls `exit(3)` on this thread. The worker itself exits through `_exit`, which does not
/// run this function.
extern "C" fn on_exit() {
    if CONTEXT.get().is_some_and(|context| context.process == getpid().as_raw()) {
        current_request::accuse();
    }
}

/// Whether this module replaces the action. A handler that the application has set is kept, except for SIGSEGV and
/// SIGBUS, for which the standard library has installed a handler in any case.
fn is_ours_to_take(signal: Signal, action: &ActionOfSignal) -> bool {
    action.is_default() || (!action.is_ignored() && [Signal::SIGSEGV, Signal::SIGBUS].contains(&signal))
}

struct Crash;

// SAFETY: calls the previous handler, and otherwise only functions that are async-signal-safe. The unwinder is not written for signal
// handlers; the report is complete before it runs.
unsafe impl HandleSignal for Crash {
    fn handle(signal: Signal, delivery: &Delivery<'_>) {
        // The instruction of a fault runs again when the handler returns.
        let repeats = delivery.code() > 0 && FAULTS.contains(&signal);
        let Some(context) = CONTEXT.get() else { return die_of(signal, repeats) };
        if signal == Signal::SIGBUS && repeats && forkyard_shm::recover_lost_pages(delivery.address()) {
            return;
        }
        if getpid().as_raw() != context.process {
            if !call_previous(signal, delivery) {
                die_of(signal, repeats);
            }
            return;
        }
        let thread = gettid().as_raw();
        match DYING.compare_exchange(0, thread, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => {}
            // A second crash of the thread that is already reporting a crash: the previous handler was called for the
            // first signal and has aborted.
            Err(first) if first == thread => {
                report(context);
                return die_of(signal, repeats);
            }
            // Another thread is already reporting a crash, and will terminate this process.
            Err(_) => {
                for _ in 0..BACKTRACE_TIMEOUT + 2 {
                    sleep(1);
                }
                return die_of(signal, repeats);
            }
        }
        record(signal, delivery, context.process);
        if call_previous(signal, delivery) && ActionOfSignal::current(signal).is_some_and(|action| !action.is_default())
        {
            DYING.store(0, Ordering::SeqCst); // the handler has recovered
            return;
        }
        report(context);
        die_of(signal, repeats);
    }
}

/// Stores the data for the report, because the previous handler may abort.
fn record(signal: Signal, delivery: &Delivery<'_>, process: i32) {
    ADDRESS.store(delivery.address(), Ordering::Relaxed);
    CODE.store(delivery.code(), Ordering::Relaxed);
    SENDER.store(delivery.sender().unwrap_or(process), Ordering::Relaxed);
    SIGNAL.store(signal as i32, Ordering::Relaxed);
    let (instruction, stack) = delivery.registers().unwrap_or_default();
    INSTRUCTION.store(instruction, Ordering::Relaxed);
    STACK_POINTER.store(stack, Ordering::Relaxed);
}

/// Calls the previous handler. Returns false if there was none.
fn call_previous(signal: Signal, delivery: &Delivery<'_>) -> bool {
    let index = SIGNALS.iter().position(|known| *known == signal);
    let previous = index.and_then(|index| PREVIOUS[index].get());
    previous.is_some_and(|previous| previous.call(delivery))
}

/// Makes the process die as it would without a handler, as soon as the handler returns.
fn die_of(signal: Signal, repeats: bool) {
    signal_handler::reset_handler(signal);
    if !repeats {
        let _ = raise(signal); // the signal stays pending until this handler has returned
    }
}

/// Writes the report: records the request, writes the line that is always safe to write, and then writes the backtrace.
fn report(context: &CrashContext) {
    current_request::accuse();
    let sender = SENDER.load(Ordering::Relaxed);
    if sender != context.process {
        let mut line = Line::<32>::new("sent ");
        let _ = write!(line, "{sender}");
        line.send(&context.report);
    }
    let signal = Signal::try_from(SIGNAL.load(Ordering::Relaxed)).ok();
    let name = signal.map_or("?", sys::short_name);
    let mut line = Line::<512>::new("said ");
    let thread = sys::thread_name();
    let thread = str::from_utf8(thread.split(|&byte| byte == 0).next().unwrap_or_default()).unwrap_or("?");
    let _ = write!(line, "{name} in thread {thread}");
    let has_address = CODE.load(Ordering::Relaxed) > 0 && signal.is_some_and(|signal| FAULTS.contains(&signal));
    if has_address {
        let _ = write!(line, " at address {:#x}", ADDRESS.load(Ordering::Relaxed));
    }
    let at = INSTRUCTION.load(Ordering::Relaxed);
    let _ = line.write_str(", instruction ");
    let _ = context.modules.write(&mut line, at);
    if has_address && is_overflow() {
        let _ = line.write_str(" (stack overflow)");
    }
    line.send(&context.report);
    // The standard library's stack for handlers is too small for the unwinder.
    if signal_handler::handler_stack_size().is_none_or(|size| size >= STACK_SIZE / 2) {
        report_backtrace(context, at);
    }
}

/// Writes the backtrace, starting from the interrupted instruction `at`.
fn report_backtrace(context: &CrashContext, at: usize) {
    if signal_handler::set_handler::<BacktraceTimeout>(Signal::SIGALRM, SaFlags::empty()).is_err() {
        return;
    }
    let _ = only(Signal::SIGALRM).thread_unblock(); // the arguments are valid, so this cannot fail
    alarm::set(BACKTRACE_TIMEOUT);
    let mut frames = [0; unwind::MAX_FRAMES];
    let frames = unwind::unwind(at, &mut frames);
    alarm::cancel();
    let mut line = Line::<MAX_LINE>::new("trace");
    for &frame in frames {
        let _ = line.write_str(" ");
        let _ = context.modules.write(&mut line, frame);
    }
    line.send(&context.report);
}

/// Terminates the process when the backtrace exceeds its time limit.
struct BacktraceTimeout;

// SAFETY: makes system calls only.
unsafe impl HandleSignal for BacktraceTimeout {
    fn handle(_: Signal, _: &Delivery<'_>) {
        let signal = Signal::try_from(SIGNAL.load(Ordering::Relaxed)).unwrap_or(Signal::SIGABRT);
        signal_handler::reset_handler(signal);
        let _ = only(signal).thread_unblock();
        let _ = raise(signal);
    }
}

fn only(signal: Signal) -> SigSet {
    let mut set = SigSet::empty();
    set.add(signal);
    set
}

/// Whether the faulting access was just below the stack. Compilers touch a large frame page by page, from above.
fn is_overflow() -> bool {
    let (address, stack) = (ADDRESS.load(Ordering::Relaxed), STACK_POINTER.load(Ordering::Relaxed));
    stack != 0 && address.wrapping_sub(stack.wrapping_sub(64 << 10)) <= (68 << 10)
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

    /// Sends the line. If the pipe is full or closed, the line is lost.
    fn send(mut self, pipe: &OwnedFd) {
        let length = self.length.min(ROOM - 1);
        self.bytes[length] = b'\n';
        let _ = write(pipe, &self.bytes[..=length]);
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

thread_local! {
    static OWN_STACK: Cell<Option<HandlerStack>> = const { Cell::new(None) };
}

/// Gives this thread a stack for its signal handlers that is large enough for a backtrace. If no memory is available,
/// the thread keeps its current stack.
pub(crate) fn give_stack() {
    if let Some(stack) = HandlerStack::install(STACK_SIZE) {
        OWN_STACK.set(Some(stack));
    }
}
