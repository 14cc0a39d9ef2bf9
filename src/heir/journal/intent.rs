//! The intent record: what the event loop is about to do with a connection, laid out where the kernel can note that it is done.
//!
//! `recvmmsg(2)` and `sendmmsg(2)` write the number of bytes that they moved into the message that they are given, before they
//! return to a process that might be dead by then. The message lies here, in shared memory.
#![expect(unsafe_code, reason = "system calls that store their outcome in shared memory")]

use std::cell::UnsafeCell;
use std::io::{self, IoSlice};
use std::marker::PhantomData;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicI32, AtomicU32};

use crate::net::handover::HEADER;

/// Bytes of one read.
pub(crate) const READ_BUFFER: usize = 64 << 10;
/// Pieces of one write; what is beyond is written by the next.
pub(super) const SLICES: usize = 64;

const NOWHERE: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// What the event loop is doing at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Op {
    Nothing = 0,
    /// A connection is being accepted, and has no record yet.
    Accept = 1,
    Read = 2,
    Write = 3,
    Close = 4,
    /// A connection is passed on to another worker.
    Pass = 5,
    /// A connection of another worker is taken over, and has no record yet.
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

/// Control data that carry one descriptor.
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
    /// There is room for one.
    Room,
    /// This one.
    Descriptor(RawFd),
}

/// A message of the intent record's, laid out and not moved yet.
///
/// The message lies in memory shared with the heir and holds the address of an array of `iovec`s in this process. The
/// kernel follows that address in the calls below, so the array has to live until they return: this type borrows it.
#[must_use = "a message that is laid out is to be sent, or received into"]
struct PreparedCall<'a> {
    intent: &'a Intent,
    _slices: PhantomData<&'a mut [libc::iovec]>,
}

impl PreparedCall<'_> {
    /// Sends it through a socket.
    fn send(self, through: RawFd) -> io::Result<u32> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `prepare` has written the message, and no other message since, as `self` is made there alone and used up
        // here. The array it points to is borrowed by `self`, and each entry names memory that the caller of `prepare` lends
        // for longer than this call: `Intent::send` from slices that it borrows. The control data are the intent record's own. The heir,
        // which has the same memory, reads the intent record and never writes it while the worker lives (`settlement.rs`).
        let sent = unsafe { libc::sendmmsg(through, self.intent.message.get(), 1, flags) };
        self.intent.outcome(sent)
    }

    /// Receives into it from a socket.
    fn receive(self, from: RawFd, flags: i32) -> io::Result<u32> {
        let (message, flags) = (self.intent.message.get(), (flags | libc::MSG_DONTWAIT) as _);
        // SAFETY: as for `send`. The entries name the intent record's header and read buffer, with lengths that are not beyond theirs
        // (`Intent::read`, `Intent::receive_message`), and no reference to those exists now: `with_read_buffer` hands them out for the
        // time of a function that has no intent record.
        let received = unsafe { libc::recvmmsg(from, message, 1, flags, std::ptr::null_mut()) };
        self.intent.outcome(received)
    }
}

#[repr(C)]
pub(super) struct Intent {
    op: AtomicU32,
    fd: AtomicI32,
    /// The connection's position before the act.
    base: AtomicU32,
    /// So many bytes of what was read were not the connection's.
    skip: AtomicU32,
    /// One more than the highest descriptor that ever had a record.
    pub(super) top: AtomicU32,
    message: UnsafeCell<libc::mmsghdr>,
    rights: UnsafeCell<Rights>,
    header: UnsafeCell<[u8; HEADER]>,
    read_buffer: UnsafeCell<[u8; READ_BUFFER]>,
}

impl Intent {
    /// Bytes at its beginning that the kernel has to be able to write at any time.
    pub(super) const VITAL: usize = std::mem::offset_of!(Intent, read_buffer);

    pub(super) fn op(&self) -> Op {
        Op::from_word(self.op.load(Acquire))
    }

    /// The connection that the act is about.
    pub(super) fn fd(&self) -> RawFd {
        self.fd.load(Acquire)
    }

    /// Where in the connection's input or output the act began.
    pub(super) fn base(&self) -> u32 {
        self.base.load(Acquire)
    }

    /// Says what is done from here on, without a message.
    pub(super) fn set(&self, op: Op, fd: RawFd) {
        self.op.store(Op::Nothing as u32, Release);
        self.fd.store(fd, Release);
        self.op.store(op as u32, Release);
    }

    /// Nothing is being done that is not in the records.
    pub(super) fn clear(&self) {
        self.op.store(Op::Nothing as u32, Release);
    }

    /// What was received as a message counts from here on as read from connection `fd`, but for its header.
    pub(super) fn take_as_read(&self, fd: RawFd) {
        self.fd.store(fd, Release);
        self.base.store(0, Release);
        self.skip.store(u32::try_from(HEADER).unwrap_or(0), Release);
        self.op.store(Op::Read as u32, Release);
    }

    /// Bytes that the last message moved.
    pub(super) fn moved(&self) -> u32 {
        // SAFETY: only the intent record's one owner writes there, and the kernel on its behalf. Any value is valid.
        let message = unsafe { self.message.get().read_volatile() };
        message.msg_len
    }

    /// Of these, the connection's own.
    pub(super) fn came(&self) -> u32 {
        self.moved().saturating_sub(self.skip.load(Acquire))
    }

    /// Lays out a message. Nothing of it has moved yet. What is returned borrows `slices`, to which the message points, and
    /// is the only way to the system calls: the compiler rejects a call that the slices do not outlive.
    fn prepare<'a>(
        &'a self,
        op: Op,
        (fd, base): (RawFd, u32),
        slices: &'a mut [libc::iovec],
        enclosure: Ancillary,
    ) -> PreparedCall<'a> {
        self.clear();
        // SAFETY: all zeroes is a valid mmsghdr, on every system.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = slices.as_mut_ptr();
        message.msg_hdr.msg_iovlen = slices.len() as _;
        if enclosure != Ancillary::Nothing {
            message.msg_hdr.msg_control = self.rights.get().cast();
            // Room for one descriptor and no second, which the padding would hold.
            let room = size_of::<libc::cmsghdr>() + size_of::<RawFd>();
            message.msg_hdr.msg_controllen = if enclosure == Ancillary::Room { room } else { size_of::<Rights>() } as _;
        }
        // SAFETY: all zeroes is valid control data.
        let mut rights: Rights = unsafe { std::mem::zeroed() };
        if let Ancillary::Descriptor(ancillary_descriptor) = enclosure {
            rights.header.cmsg_level = libc::SOL_SOCKET;
            rights.header.cmsg_type = libc::SCM_RIGHTS;
            rights.header.cmsg_len = (size_of::<libc::cmsghdr>() + size_of::<RawFd>()) as _;
            rights.fd = ancillary_descriptor;
        }
        // SAFETY: this thread is the intent record's one owner.
        unsafe { self.rights.get().write_volatile(rights) };
        // SAFETY: as above.
        unsafe { self.message.get().write_volatile(message) };
        self.fd.store(fd, Release);
        self.base.store(base, Release);
        self.skip.store(0, Release);
        self.op.store(op as u32, Release);
        PreparedCall { intent: self, _slices: PhantomData }
    }

    /// Sends `slices` through socket `through`, as a part of `op` on connection `fd`. Returns how many bytes went.
    ///
    /// # Errors
    /// What `sendmmsg(2)` says; then nothing went, and nothing is being done.
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
        // Each slice is a piece that the caller lends until this function returns; `sendmmsg` only reads from it.
        self.prepare(op, (fd, base), &mut slices[..count], enclosure).send(through)
    }

    /// Reads from connection `fd` into the read buffer, at most `most` bytes. Returns how many came.
    ///
    /// # Errors
    /// What `recvmmsg(2)` says; then nothing came, and nothing is being done.
    pub(super) fn read(&self, fd: RawFd, base: u32, most: usize) -> io::Result<u32> {
        let mut slices = [libc::iovec { iov_base: self.read_buffer.get().cast(), iov_len: most.min(READ_BUFFER) }];
        self.prepare(Op::Read, (fd, base), &mut slices, Ancillary::Nothing).receive(fd, 0)
    }

    /// Receives a message with a connection from `channel`: its header, and the rest into the read buffer. Returns its length.
    ///
    /// # Errors
    /// As above.
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

    /// Looks at the first bytes of the read buffer.
    pub(super) fn with_read_buffer<T>(&self, length: u32, look: impl FnOnce(&[u8]) -> T) -> T {
        let length = (length as usize).min(READ_BUFFER);
        // SAFETY: the read buffer has so many bytes, all initialised. Only a read or a message writes there, by this thread, and
        // none of them is made while it looks: `look` has no intent record.
        look(unsafe { std::slice::from_raw_parts(self.read_buffer.get().cast(), length) })
    }

    /// The message that was received, put together. None if it is too short to be one.
    pub(super) fn message(&self) -> Option<Vec<u8>> {
        let early = self.moved().checked_sub(u32::try_from(HEADER).ok()?)?;
        // SAFETY: only this thread writes there; any bytes are valid.
        let header = unsafe { self.header.get().read_volatile() };
        Some(self.with_read_buffer(early, |landed| [&header[..], landed].concat()))
    }

    /// Whether all of the message came.
    pub(super) fn is_whole(&self) -> bool {
        // SAFETY: only this thread writes there, and the kernel on its behalf. Any value is valid.
        let message = unsafe { self.message.get().read_volatile() };
        message.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) == 0
    }

    /// The number of the descriptor that came with the message.
    pub(super) fn ancillary_descriptor(&self) -> Option<RawFd> {
        // SAFETY: only this thread writes there, and the kernel on its behalf; any bytes are valid.
        let rights = unsafe { self.rights.get().read_volatile() };
        let is_one = rights.header.cmsg_level == libc::SOL_SOCKET && rights.header.cmsg_type == libc::SCM_RIGHTS;
        is_one.then_some(rights.fd)
    }
}
