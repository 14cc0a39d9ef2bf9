//! The intent record: the operation that the event loop is about to perform on a connection, in memory to which the kernel writes the
//! outcome.
//!
//! `recvmmsg(2)` and `sendmmsg(2)` store the number of bytes that they moved in the caller's message header before they return. The message
//! header is in shared memory, so the heir can read the number even if the worker dies inside the call.
#![expect(unsafe_code, reason = "system calls that store their outcome in shared memory")]

use std::cell::UnsafeCell;
use std::io::{self, IoSlice};
use std::marker::PhantomData;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicI32, AtomicU32};

use crate::net::handover::HEADER;

/// Maximum number of bytes per read.
pub(crate) const READ_BUFFER: usize = 64 << 10;
/// Maximum number of slices per write. The next write sends the rest.
pub(super) const SLICES: usize = 64;

const NOWHERE: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// The operation that the event loop is performing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Op {
    Nothing = 0,
    /// A connection is being accepted. It has no record yet.
    Accept = 1,
    Read = 2,
    Write = 3,
    Close = 4,
    /// A connection is being passed to another worker.
    Pass = 5,
    /// A connection from another worker is being taken over. It has no record yet.
    Receive = 6,
}

impl Op {
    fn from_word(word: u32) -> Self {
        match word {
            1 => Self::Accept,
            2 => Self::Read,
            3 => Self::Write,
            4 => Self::Close,
            5 => Self::Pass,
            6 => Self::Receive,
            0 | 7.. => Self::Nothing,
        }
    }
}

/// Ancillary data with one descriptor.
#[derive(Clone, Copy)]
#[repr(C)]
struct Rights {
    header: libc::cmsghdr,
    fd: RawFd,
}

/// Whether a message carries a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ancillary {
    Nothing,
    /// The message has room to receive one descriptor.
    Room,
    /// The message sends this descriptor.
    Descriptor(RawFd),
}

/// A message that is laid out in the intent record and not yet sent or received.
///
/// The message is in memory shared with the heir and holds the address of an array of `iovec`s in this process. The kernel
/// follows that address in the calls below, so the array must live until they return. This type therefore borrows it.
#[must_use = "a message that is laid out is to be sent, or received into"]
struct PreparedCall<'a> {
    intent: &'a Intent,
    _slices: PhantomData<&'a mut [libc::iovec]>,
}

impl PreparedCall<'_> {
    /// Sends the message through a socket.
    fn send(self, through: RawFd) -> io::Result<u32> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `prepare` has written the message. No other message has been written since, because only `prepare`
        // creates `self`, and this call consumes it. `self` borrows the array that the message points to. Each entry
        // points to memory that stays borrowed until this call returns: `Intent::send` holds the slices. The ancillary
        // data belong to the intent record. The heir shares this memory, but does not write to it while the worker is
        // alive (`heir/mod.rs`).
        let sent = unsafe { libc::sendmmsg(through, self.intent.message.get(), 1, flags) };
        self.intent.outcome(sent)
    }

    /// Receives a message from a socket.
    fn receive(self, from: RawFd, flags: i32) -> io::Result<u32> {
        let (message, flags) = (self.intent.message.get(), (flags | libc::MSG_DONTWAIT) as _);
        // SAFETY: the message and the array are valid for the reasons given in `send`. The entries point to the header
        // and the read buffer of the intent record, and stay within both (`Intent::read`, `Intent::receive_message`).
        // No reference to the header or the read buffer exists now: `with_read_buffer` lends the buffer only to a
        // function that has no access to the intent record.
        let received = unsafe { libc::recvmmsg(from, message, 1, flags, std::ptr::null_mut()) };
        self.intent.outcome(received)
    }
}

#[repr(C)]
pub(super) struct Intent {
    op: AtomicU32,
    fd: AtomicI32,
    /// The connection's position before the operation.
    base: AtomicU32,
    /// Number of bytes at the start of the message that are not input of the connection.
    skip: AtomicU32,
    /// Highest descriptor that has ever had a record, plus one.
    pub(super) top: AtomicU32,
    message: UnsafeCell<libc::mmsghdr>,
    rights: UnsafeCell<Rights>,
    header: UnsafeCell<[u8; HEADER]>,
    read_buffer: UnsafeCell<[u8; READ_BUFFER]>,
}

impl Intent {
    /// Length of the first part of the record, to which the kernel must be able to write at any time.
    pub(super) const VITAL: usize = std::mem::offset_of!(Intent, read_buffer);

    pub(super) fn op(&self) -> Op {
        Op::from_word(self.op.load(Acquire))
    }

    /// Returns the connection of the operation.
    pub(super) fn fd(&self) -> RawFd {
        self.fd.load(Acquire)
    }

    /// Returns the position in the connection's input or output at which the operation began.
    pub(super) fn base(&self) -> u32 {
        self.base.load(Acquire)
    }

    /// Records an operation that uses no message.
    pub(super) fn set(&self, op: Op, fd: RawFd) {
        self.op.store(Op::Nothing as u32, Release);
        self.fd.store(fd, Release);
        self.op.store(op as u32, Release);
    }

    /// Records that the connection records describe the state completely.
    pub(super) fn clear(&self) {
        self.op.store(Op::Nothing as u32, Release);
    }

    /// Records the received message, except its header, as input read from connection `fd`.
    pub(super) fn take_as_read(&self, fd: RawFd) {
        self.fd.store(fd, Release);
        self.base.store(0, Release);
        self.skip.store(u32::try_from(HEADER).unwrap_or(0), Release);
        self.op.store(Op::Read as u32, Release);
    }

    /// Returns the number of bytes that the last message moved.
    pub(super) fn moved(&self) -> u32 {
        // SAFETY: only the owner of the intent record, and the kernel on behalf of the owner, write to `message`. Any
        // value is valid.
        let message = unsafe { self.message.get().read_volatile() };
        message.msg_len
    }

    /// Returns the number of the moved bytes that are input of the connection.
    pub(super) fn came(&self) -> u32 {
        self.moved().saturating_sub(self.skip.load(Acquire))
    }

    /// Lays out a message; no byte of it has been sent or received yet. The message points to `slices`, and the return
    /// value borrows them. Only the return value can make the system calls, so the compiler rejects a call that
    /// outlives `slices`.
    fn prepare<'a>(
        &'a self,
        op: Op,
        (fd, base): (RawFd, u32),
        slices: &'a mut [libc::iovec],
        enclosure: Ancillary,
    ) -> PreparedCall<'a> {
        self.clear();
        // SAFETY: an all-zero mmsghdr is valid on every system.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = slices.as_mut_ptr();
        message.msg_hdr.msg_iovlen = slices.len() as _;
        if enclosure != Ancillary::Nothing {
            message.msg_hdr.msg_control = self.rights.get().cast();
            // Exactly one descriptor: the padding could hold a second one.
            let room = size_of::<libc::cmsghdr>() + size_of::<RawFd>();
            message.msg_hdr.msg_controllen = if enclosure == Ancillary::Room { room } else { size_of::<Rights>() } as _;
        }
        // SAFETY: all-zero ancillary data is valid.
        let mut rights: Rights = unsafe { std::mem::zeroed() };
        if let Ancillary::Descriptor(ancillary_descriptor) = enclosure {
            rights.header.cmsg_level = libc::SOL_SOCKET;
            rights.header.cmsg_type = libc::SCM_RIGHTS;
            rights.header.cmsg_len = (size_of::<libc::cmsghdr>() + size_of::<RawFd>()) as _;
            rights.fd = ancillary_descriptor;
        }
        // SAFETY: only this thread owns the intent record.
        unsafe { self.rights.get().write_volatile(rights) };
        // SAFETY: only this thread owns the intent record.
        unsafe { self.message.get().write_volatile(message) };
        self.fd.store(fd, Release);
        self.base.store(base, Release);
        self.skip.store(0, Release);
        self.op.store(op as u32, Release);
        PreparedCall { intent: self, _slices: PhantomData }
    }

    /// Sends `pieces` through the socket `through`, as a part of `op` on connection `fd`. Returns the number of bytes sent.
    ///
    /// # Errors
    /// Returns the error from `sendmmsg(2)`. No byte was sent, and the intent record is clear.
    pub(super) fn send(
        &self,
        op: Op,
        (fd, base): (RawFd, u32),
        pieces: &[IoSlice<'_>],
        enclosure: Ancillary,
        through: RawFd,
    ) -> io::Result<u32> {
        let mut slices = [NOWHERE; SLICES];
        let count = pieces.len().min(SLICES);
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            *slice = libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() };
        }
        // The caller lends each slice until this function returns. `sendmmsg` only reads from the slices.
        self.prepare(op, (fd, base), &mut slices[..count], enclosure).send(through)
    }

    /// Reads up to `most` bytes from connection `fd` into the read buffer. Returns the number of bytes read.
    ///
    /// # Errors
    /// Returns the error from `recvmmsg(2)`. No byte was read, and the intent record is clear.
    pub(super) fn read(&self, fd: RawFd, base: u32, most: usize) -> io::Result<u32> {
        let mut slices = [libc::iovec { iov_base: self.read_buffer.get().cast(), iov_len: most.min(READ_BUFFER) }];
        self.prepare(Op::Read, (fd, base), &mut slices, Ancillary::Nothing).receive(fd, 0)
    }

    /// Receives a handoff message from `channel`. The message's header goes to `header`, and the rest to the read
    /// buffer. Returns the length of the message.
    ///
    /// # Errors
    /// Returns the error from `recvmmsg(2)`. No message was received, and the intent record is clear.
    pub(super) fn receive_message(&self, channel: RawFd) -> io::Result<u32> {
        let header = libc::iovec { iov_base: self.header.get().cast(), iov_len: HEADER };
        let read_buffer = libc::iovec { iov_base: self.read_buffer.get().cast(), iov_len: READ_BUFFER };
        let mut slices = [header, read_buffer];
        self.prepare(Op::Receive, (-1, 0), &mut slices, Ancillary::Room).receive(channel, libc::MSG_CMSG_CLOEXEC)
    }

    fn outcome(&self, messages: i32) -> io::Result<u32> {
        if messages == 1 {
            return Ok(self.moved());
        }
        let error = io::Error::last_os_error();
        self.clear();
        Err(error)
    }

    /// Passes the first `length` bytes of the read buffer to `look`.
    pub(super) fn with_read_buffer<T>(&self, length: u32, look: impl FnOnce(&[u8]) -> T) -> T {
        let length = (length as usize).min(READ_BUFFER);
        // SAFETY: the read buffer has at least `length` bytes, all initialized. Only the read and receive calls of this
        // thread write to the buffer, and `look` cannot make such a call, because it has no access to the intent
        // record.
        look(unsafe { std::slice::from_raw_parts(self.read_buffer.get().cast(), length) })
    }

    /// Returns the received message, header included, or `None` if the message is shorter than its header.
    pub(super) fn message(&self) -> Option<Vec<u8>> {
        let early = self.moved().checked_sub(u32::try_from(HEADER).ok()?)?;
        // SAFETY: only this thread, and the kernel on behalf of this thread, write to `header`. Any bytes are valid.
        let header = unsafe { self.header.get().read_volatile() };
        Some(self.with_read_buffer(early, |landed| [&header[..], landed].concat()))
    }

    /// Whether the message was received without truncation.
    pub(super) fn is_whole(&self) -> bool {
        // SAFETY: only this thread, and the kernel on behalf of this thread, write to `message`. Any value is valid.
        let message = unsafe { self.message.get().read_volatile() };
        message.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) == 0
    }

    /// Returns the descriptor that was received with the message.
    pub(super) fn ancillary_descriptor(&self) -> Option<RawFd> {
        // SAFETY: only this thread, and the kernel on behalf of this thread, write to `rights`. Any bytes are valid.
        let rights = unsafe { self.rights.get().read_volatile() };
        let is_one = rights.header.cmsg_level == libc::SOL_SOCKET && rights.header.cmsg_type == libc::SCM_RIGHTS;
        is_one.then_some(rights.fd)
    }
}
