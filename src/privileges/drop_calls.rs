//! Makes the system calls with which a process drops privileges, and contains the signal handler that reports a refused
//! call. Part of the `unsafe` code.
//!
//! All functions can run between fork and exec: they allocate no memory and take no lock. The module `steps` decides
//! which calls are made.
#![expect(unsafe_code, reason = "capset, setpriority, prctl and a signal's context have no safe form")]

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sched::sched_setaffinity;
use nix::sys::resource::setrlimit;
use nix::sys::stat::umask;
use nix::unistd::{Pid, chdir, chroot, setgroups, setresgid, setresuid};

use super::sandbox_syscalls;
use super::steps::Step;
use crate::config::privileges::CapabilitySet;

/// Carries out one step.
///
/// # Errors
/// Returns the error from the system call.
pub(crate) fn carry_out(step: &Step) -> io::Result<()> {
    match step {
        Step::Limit { resource, soft, hard } => setrlimit(*resource, *soft, *hard)?,
        Step::Nice(nice) => set_nice(*nice)?,
        Step::Affinity(processors) => sched_setaffinity(Pid::from_raw(0), processors)?,
        Step::Umask(mode) => {
            umask(*mode);
        }
        Step::Chroot(directory) => {
            chroot(directory.as_c_str())?;
            chdir(c"/")?; // otherwise `..` leads out of the new root
        }
        Step::Bound(kept) => bound_capabilities(*kept)?,
        Step::CarryCapabilities => nix::sys::prctl::set_keepcaps(true)?,
        Step::Groups(groups) => setgroups(groups)?,
        Step::Group(group) => setresgid(*group, *group, *group)?,
        Step::User(user) => setresuid(*user, *user, *user)?,
        Step::Capabilities { kept, ambient } => set_capabilities(*kept, *ambient)?,
        Step::NoNewPrivileges => nix::sys::prctl::set_no_new_privs()?,
        Step::Chdir(directory) => chdir(directory.as_c_str())?,
    }
    Ok(())
}

/// Returns the nice value of this process.
///
/// # Errors
/// Returns the error from `getpriority(2)`.
pub(super) fn nice() -> io::Result<i32> {
    nix::errno::Errno::clear(); // -1 is a valid result too
    // SAFETY: plain system call with integers.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    if nice == -1 && nix::errno::Errno::last_raw() != 0 { Err(io::Error::last_os_error()) } else { Ok(nice) }
}

fn set_nice(nice: i32) -> io::Result<()> {
    // SAFETY: plain system call with integers.
    outcome(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }.into())
}

/// Removes all capabilities but these from the bounding set, so that no program executed later can obtain the others.
fn bound_capabilities(CapabilitySet(kept): CapabilitySet) -> io::Result<()> {
    for number in (0..64).filter(|number| kept & (1 << number) == 0) {
        // SAFETY: plain system call with integers.
        match outcome(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) }.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break, // the kernel has no higher numbers
            done => done?,
        }
    }
    Ok(())
}

/// Keeps only these capabilities, as permitted and effective ones. If `ambient`, the next program that is executed
/// keeps them too.
fn set_capabilities(CapabilitySet(kept): CapabilitySet, ambient: bool) -> io::Result<()> {
    /// As defined in `linux/capability.h`.
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let half = |bits: u64| {
        let bits = u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0);
        Sets { effective: bits, permitted: bits, inheritable: if ambient { bits } else { 0 } }
    };
    let (mut header, sets) = (Header { version: VERSION_3, pid: 0 }, [half(kept), half(kept >> 32)]);
    // SAFETY: both pointers are valid for the whole call, and have the layout of version 3 of the call: two halves.
    outcome(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) })?;
    // SAFETY: plain system call with integers.
    outcome(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) }.into())?;
    for number in (0..64_u64).filter(|number| ambient && kept & (1 << number) != 0) {
        // SAFETY: plain system call with integers.
        outcome(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, number, 0, 0) }.into())?;
    }
    Ok(())
}

fn outcome(returned: libc::c_long) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes each system call that the sandbox traps return an error. The name of each call is logged once per process.
///
/// # Errors
/// Returns the error from `sigaction(2)`.
pub(super) fn report_refused_calls() -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
    let refuse: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = refuse;
    action.sa_sigaction = refuse as *const () as libc::sighandler_t;
    // SAFETY: `action` is a complete sigaction, and its handler is async-signal-safe: atomics, write and _exit.
    outcome(unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) }.into())
}

/// One bit for each system call number, set if that call was reported.
static REPORTED: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];

extern "C" fn refuse(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    /// `si_code` of a signal sent by seccomp.
    const SYS_SECCOMP: i32 = 1;
    /// siginfo_t as the kernel fills it in for SIGSYS on 64-bit machines (sigaction(2)).
    #[repr(C)]
    struct Trapped {
        signo: i32,
        errno: i32,
        code: i32,
        padding: i32,
        address: *const libc::c_void,
        number: i32,
        arch: u32,
    }
    // SAFETY: the kernel calls this function with a valid siginfo_t. This type is larger than `Trapped` and as strictly
    // aligned.
    let trapped = unsafe { &*info.cast::<Trapped>() };
    let Some(number) = u64::try_from(trapped.number).ok().filter(|_| trapped.code == SYS_SECCOMP) else {
        // SIGSYS was sent by a process: terminate this process, as SIGSYS would without this handler. SAFETY: `_exit`
        // is async-signal-safe, and never returns.
        unsafe { libc::_exit(128 + libc::SIGSYS) }
    };
    let (word, bit) = (usize::try_from(number / 64).unwrap_or(usize::MAX), 1 << (number % 64));
    if REPORTED.get(word).is_some_and(|word| word.fetch_or(bit, Ordering::Relaxed) & bit == 0) {
        report(number);
    }
    let errno = i64::from(sandbox_syscalls::errno_of(number));
    // SAFETY: with SA_SIGINFO the third argument is this thread's ucontext_t, which no other code accesses during the handler.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    set_result(context, -errno);
}

/// Sets the result of the interrupted system call.
#[cfg(target_arch = "x86_64")]
fn set_result(context: &mut libc::ucontext_t, value: i64) {
    context.uc_mcontext.gregs[libc::REG_RAX as usize] = value;
}

/// Sets the result of the interrupted system call.
#[cfg(target_arch = "aarch64")]
fn set_result(context: &mut libc::ucontext_t, value: i64) {
    context.uc_mcontext.regs[0] = value.cast_unsigned();
}

/// Does nothing: on other architectures no filter is created, so no call is refused.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn set_result(_: &mut libc::ucontext_t, _: i64) {}

/// Writes one line to standard error, immediately, without allocating or locking.
fn report(number: u64) {
    struct Line {
        bytes: [u8; 160],
        length: usize,
    }
    impl std::fmt::Write for Line {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            let place = self.bytes.get_mut(self.length..self.length + text.len()).ok_or(std::fmt::Error)?;
            place.copy_from_slice(text.as_bytes());
            self.length += text.len();
            Ok(())
        }
    }
    // SAFETY: getpid always succeeds.
    let pid = unsafe { libc::getpid() };
    let mut line = Line { bytes: [0; 160], length: 0 };
    let name = sandbox_syscalls::name_of(number).unwrap_or("unknown");
    let _ = writeln!(line, "WARN sandbox refused a system call (--sandbox) pid={pid} call={name} number={number}"); // the line fits
    // SAFETY: the buffer has `length` bytes. If standard error is closed, the line is lost.
    unsafe { libc::write(2, line.bytes.as_ptr().cast(), line.length) };
}
