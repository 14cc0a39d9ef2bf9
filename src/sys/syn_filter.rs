//! Installs a filter on a listening TCP socket that keeps new connections out of the socket's queue.
#![expect(unsafe_code, reason = "setsockopt with a program")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// Makes a listening TCP socket drop segments that request a connection (SYN). Existing connections and handshakes in progress are
/// not affected.
///
/// # Errors
/// Returns the error from `setsockopt(2)`.
pub(crate) fn drop_syn_segments(listener: BorrowedFd<'_>) -> io::Result<()> {
    const FLAGS: u32 = 13; // offset of the flags in a TCP header, with which the filter's data begins
    const SYN_ACK: u32 = 0x12;
    const SYN: u32 = 0x02;
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: u16::try_from(code).unwrap_or(0), jt, jf, k };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, FLAGS),
        step(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, SYN_ACK),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, SYN),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ];
    let program = libc::sock_fprog { len: 5, filter: steps.as_mut_ptr() };
    let length = libc::socklen_t::try_from(size_of_val(&program)).unwrap_or(0);
    let place = (&raw const program).cast();
    // SAFETY: `program` and the instructions that it points to are valid for the whole call; the kernel copies and checks them.
    let outcome =
        unsafe { libc::setsockopt(listener.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, place, length) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
