//! The journal: what a worker's heir has to know of the worker's connections, in memory that both of them see.
//!
//! The worker's event loop writes it as it goes: plain stores, and no system call of its own. It is never locked, since
//! nobody reads it before the worker is dead; then its last state is the truth, up to the instruction at which the worker
//! died. Three things make that exact:
//!
//! - **Positions, not flags.** What was read from a connection and written to it is counted in bytes, and a request knows at
//!   which position its response begins and ends. Whether a response has left the worker follows from two numbers, however
//!   many of them one write took along.
//! - **The intent record.** Before each system call that moves something, the worker lays out on the intent record what it is about to do.
//!   `recvmmsg(2)` and `sendmmsg(2)` store the number of bytes that they moved in the caller's memory, inside the system
//!   call; nothing can kill a process between the one and the other. That memory is the intent record. So the heir knows of each byte
//!   whether the worker took it, even if the worker never heard.
//! - **The read buffer.** Bytes are read into shared memory and copied from there. What the worker had taken in and not yet
//!   looked at is not lost with it.
//!
//! May not: allocate or make a system call beyond the one that it accounts for, in what serves a request. The heir must not
//! believe any of it more than its own safety allows: the worker may have scribbled.
#![expect(unsafe_code, reason = "shared memory")]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

pub(crate) use self::connection::{ConnHandle, Entry};
pub(crate) use self::intent::READ_BUFFER;
use self::intent::{Intent, Op};
use crate::net::handover::{HEADER, Handoff, PackedOrigin};
use crate::sys;

/// Descriptors that have a record in the journal. A connection with a higher number is closed when its worker dies.
pub(crate) const MAX_CONNECTIONS: usize = 1 << 16;
/// Requests of one connection that are told apart; those beyond are not answered.
pub(crate) const REQUESTS: usize = 16;

/// What a connection speaks, as far as its heir is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum WireProtocol {
    /// No connection: a free record.
    Nothing = 0,
    FastCgi = 1,
    Scgi = 2,
    Http1 = 3,
    Http2 = 4,
}

impl WireProtocol {
    fn from_word(word: u32) -> Self {
        match word {
            1 => Self::FastCgi,
            2 => Self::Scgi,
            3 => Self::Http1,
            4 => Self::Http2,
            0 | 5.. => Self::Nothing,
        }
    }
}

/// Everything that is known of one connection; its index is the descriptor.
#[repr(C, align(64))]
struct ConnCells {
    wire_protocol: AtomicU32,
    listener: AtomicU32,
    /// Bytes that were read; this and all positions wrap around.
    read: AtomicU32,
    /// Up to here what was read has been dealt with, and nothing is half-way.
    clean: AtomicU32,
    written: AtomicU32,
    /// Where the output that is waiting begins and ends: both are borders between records.
    batch: AtomicU32,
    queued: AtomicU32,
    /// There were more requests at a time than there is room for.
    overflow: AtomicU32,
    /// Another number for each connection that had this record.
    epoch: AtomicU32,
    /// Some response's last byte may not have been written yet.
    ending: AtomicU32,
    /// See [`PackedOrigin`].
    origin: [AtomicU64; 3],
    requests: [RequestCells; REQUESTS],
}

#[repr(C)]
struct RequestCells {
    /// 0, or what [`Request`] says of it.
    word: AtomicU32,
    /// How much had been read when it was entered.
    at: AtomicU32,
    /// Positions in the output, with [`KNOWN`].
    from: AtomicU64,
    to: AtomicU64,
}

const USED: u32 = 1 << 31;
const HEAD: u32 = 1 << 16;
const LAST: u32 = 1 << 17;
/// A position that is known, beside the 32 bits of the position itself.
const KNOWN: u64 = 1 << 32;

#[repr(C)]
struct Region {
    intent: Intent,
    records: [ConnCells; MAX_CONNECTIONS],
}

/// The journal of one worker. Its memory is never given back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Journal {
    region: NonNull<Region>,
}

// SAFETY: one thread at a time uses it: the one that made it, and then the event loop's, which it is handed to.
unsafe impl Send for Journal {}

/// A request as the journal has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Over FastCGI its request id.
    pub(crate) id: u16,
    /// Its response has no body (`HEAD`).
    pub(crate) is_head: bool,
    /// The connection is not kept after it.
    pub(crate) is_last: bool,
    /// How much had been read when it was entered.
    pub(crate) at: u32,
    /// Positions in the output of its response, as far as there are any yet.
    pub(crate) from: Option<u32>,
    pub(crate) to: Option<u32>,
}

/// A connection as the journal has it, with what was on the intent record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConnRecord {
    pub(crate) wire_protocol: WireProtocol,
    pub(crate) listener: u16,
    pub(crate) read: u32,
    pub(crate) clean: u32,
    pub(crate) written: u32,
    pub(crate) batch: u32,
    pub(crate) queued: u32,
    pub(crate) overflow: bool,
    pub(crate) origin: PackedOrigin,
    pub(crate) requests: Vec<Request>,
    /// The last bytes that were read, and the position of the first of them; nobody has looked at them for certain.
    pub(crate) landed: Option<(u32, Vec<u8>)>,
}

/// The last act of a worker.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LastOp {
    /// Nothing that is not in the records.
    Settled,
    /// There may be a connection that has no record.
    Accepting,
    /// This one was being closed.
    Closing(RawFd),
    /// This one is with somebody else.
    Passed(RawFd),
    /// This one had been taken over, with these bytes of a message.
    Received(RawFd, Vec<u8>),
}

impl Journal {
    /// Makes one. Memory is taken up only as far as it is used.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    pub(crate) fn create() -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let region = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<Region>(), protection, flags, -1, 0) };
        if region == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // All zeroes, which is a valid `Region`, page-aligned, and never unmapped.
        let region: NonNull<Region> = NonNull::new(region.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // The kernel must be able to store there even for a process that is being killed. It may refuse to promise that.
        // SAFETY: the intent record is a part of the mapping.
        unsafe { libc::mlock(region.as_ptr().cast(), Intent::VITAL) };
        Ok(Self { region })
    }

    fn intent(&self) -> &Intent {
        // SAFETY: the mapping is as large as a `Region`, lives for ever, and is all atomics but for cells that only the one
        // thread that owns the intent record touches while the worker lives, and the heir afterwards.
        unsafe { &self.region.as_ref().intent }
    }

    fn record(&self, fd: RawFd) -> Option<&ConnCells> {
        // SAFETY: as above; records are all atomics.
        let records = unsafe { &self.region.as_ref().records };
        records.get(usize::try_from(fd).ok()?)
    }

    /// Accepts a connection, as [`sys::accept`]. It is to be entered next.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn accept(&self, listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
        self.intent().set(Op::Accept, -1);
        let accepted = sys::accept(listener);
        if accepted.is_err() {
            self.intent().clear();
        }
        accepted
    }

    /// Takes over a connection that another worker passed on. It is to be entered next, and then its bytes to be read.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; `InvalidData` for a message without a connection.
    pub(crate) fn take_over(&self, channel: BorrowedFd<'_>) -> io::Result<(OwnedFd, Handoff)> {
        let intent = self.intent();
        // If no number is free, the kernel would hand out the message and drop the connection.
        drop(channel.try_clone_to_owned()?);
        intent.receive_message(channel.as_raw_fd())?;
        // The kernel has just made that descriptor for us.
        let connection = intent.ancillary_descriptor().and_then(sys::own);
        let message = intent.message().filter(|_| intent.is_whole());
        let handoff = message.and_then(|message| Handoff::decode(&message));
        if let (Some(connection), Some(handoff)) = (connection, handoff) {
            return Ok((connection, handoff));
        }
        intent.clear();
        Err(io::ErrorKind::InvalidData.into())
    }

    /// Opens a record for a connection.
    pub(crate) fn enter(
        &self,
        fd: BorrowedFd<'_>,
        wire_protocol: WireProtocol,
        listener: u16,
        PackedOrigin(origin): PackedOrigin,
    ) -> ConnHandle {
        let number = fd.as_raw_fd();
        let Some(record) = self.record(number) else { return ConnHandle { journal: *self, fd: number, epoch: 0 } };
        let epoch = record.epoch.load(Acquire).wrapping_add(1);
        record.epoch.store(epoch, Release);
        for word in [
            &record.read,
            &record.clean,
            &record.written,
            &record.batch,
            &record.queued,
            &record.overflow,
            &record.ending,
        ] {
            word.store(0, Release);
        }
        for request in &record.requests {
            if request.word.load(Acquire) != 0 {
                request.word.store(0, Release);
            }
        }
        record.listener.store(listener.into(), Release);
        for (word, part) in record.origin.iter().zip(origin) {
            word.store(part, Release);
        }
        let intent = self.intent();
        let top = number.cast_unsigned() + 1;
        if intent.top.load(Acquire) < top {
            intent.top.store(top, Release);
        }
        record.wire_protocol.store(wire_protocol as u32, Release);
        match intent.op() {
            Op::Receive => {
                // What came with it is as if it had been read.
                let header = u32::try_from(HEADER).unwrap_or(0);
                record.read.store(intent.moved().saturating_sub(header), Release);
                intent.take_as_read(number);
            }
            Op::Nothing | Op::Accept | Op::Read | Op::Write | Op::Close | Op::Pass => intent.clear(),
        }
        ConnHandle { journal: *self, fd: number, epoch }
    }
}

/// For the heir, when the worker is dead.
impl Journal {
    pub(crate) fn last_op(&self) -> LastOp {
        let intent = self.intent();
        let fd = intent.fd();
        match intent.op() {
            Op::Nothing | Op::Read | Op::Write => LastOp::Settled,
            Op::Accept => LastOp::Accepting,
            Op::Close => LastOp::Closing(fd),
            Op::Pass if intent.moved() > 0 => LastOp::Passed(fd),
            Op::Pass => LastOp::Settled,
            Op::Receive => match (intent.ancillary_descriptor(), intent.message().filter(|_| intent.moved() > 0)) {
                (Some(fd), Some(message)) => LastOp::Received(fd, message),
                _ => LastOp::Settled,
            },
        }
    }

    /// The descriptors that may have a record.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let top = self.intent().top.load(Acquire).min(u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX));
        (0..top.cast_signed()).filter(|&fd| self.read_record(fd).is_some())
    }

    /// What is known of a connection; `None` if it has no record.
    pub(crate) fn read_record(&self, fd: RawFd) -> Option<ConnRecord> {
        let (record, intent) = (self.record(fd)?, self.intent());
        let wire_protocol = WireProtocol::from_word(record.wire_protocol.load(Acquire));
        if wire_protocol == WireProtocol::Nothing {
            return None;
        }
        let mut read = record.read.load(Acquire);
        let mut written = record.written.load(Acquire);
        let mut landed = None;
        let base = intent.base();
        match intent.op() {
            Op::Read if intent.fd() == fd => {
                read = base.wrapping_add(intent.came());
                landed = (intent.came() > 0).then(|| (base, intent.with_read_buffer(intent.came(), <[u8]>::to_vec)));
            }
            Op::Write if intent.fd() == fd => written = base.wrapping_add(intent.moved()),
            Op::Nothing | Op::Accept | Op::Read | Op::Write | Op::Close | Op::Pass | Op::Receive => {}
        }
        Some(ConnRecord {
            wire_protocol,
            listener: u16::try_from(record.listener.load(Acquire)).unwrap_or(u16::MAX),
            read,
            clean: record.clean.load(Acquire),
            written,
            batch: record.batch.load(Acquire),
            queued: record.queued.load(Acquire),
            overflow: record.overflow.load(Acquire) != 0,
            origin: record.origin(),
            requests: record.requests.iter().filter_map(RequestCells::read).collect(),
            landed,
        })
    }
}

impl ConnCells {
    fn origin(&self) -> PackedOrigin {
        PackedOrigin(std::array::from_fn(|part| self.origin[part].load(Acquire)))
    }
}

impl RequestCells {
    fn read(&self) -> Option<Request> {
        let word = self.word.load(Acquire);
        #[expect(clippy::cast_possible_truncation, reason = "the low bits are the id and the position")]
        let (id, position) = (word as u16, |word: u64| (word & KNOWN != 0).then_some(word as u32));
        (word & USED != 0).then(|| Request {
            id,
            is_head: word & HEAD != 0,
            is_last: word & LAST != 0,
            at: self.at.load(Acquire),
            from: position(self.from.load(Acquire)),
            to: position(self.to.load(Acquire)),
        })
    }
}

pub(crate) mod connection;
pub(crate) mod intent;
