//! The journal: the state of a worker's connections, in memory shared by the worker and its heir.
//!
//! The worker's event loop writes to the journal with plain stores and without additional system calls. The journal needs no lock, because
//! the heir reads it only after the worker's death. The last state is then exact up to the instruction at which the worker died, for three
//! reasons:
//!
//! - **Positions, not flags.** Input and output of a connection are counted in bytes, and each request holds the positions at which its
//!   response begins and ends. Comparing a position with the number of bytes written shows whether a response has been sent, even if one
//!   write sent several responses.
//! - **The intent record.** Before each system call that moves bytes, the worker stores the planned operation in the
//!   intent record. `recvmmsg(2)` and `sendmmsg(2)` store the number of bytes that they moved in the caller's memory,
//!   inside the system call; no signal can terminate the process between the move and the store. That memory is part of
//!   the intent record. The heir can therefore determine for each byte whether the worker sent or received it, even if
//!   the call never returned to the worker.
//! - **The read buffer.** Bytes are read into shared memory and copied from there. Input that the worker had read but not yet examined is
//!   not lost with the worker.
//!
//! While a request is served, the journal must not allocate and must make no system call except the one that it
//! records. A faulty worker may have overwritten the journal, so no content of the journal may compromise the heir
//! itself.
#![expect(unsafe_code, reason = "shared memory")]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

pub(crate) use self::connection::{ConnHandle, RequestIndex};
pub(crate) use self::intent::READ_BUFFER;
use self::intent::{Intent, Op};
use crate::net::handover::{HEADER, Handoff, PackedOrigin};
use crate::sys;

/// Number of descriptors that have a record in the journal. A connection with a higher number is closed when its worker dies.
pub(crate) const MAX_CONNECTIONS: usize = 1 << 16;
/// Number of requests that one connection's record can hold. Further requests are not answered when the worker dies.
pub(crate) const REQUESTS: usize = 16;

/// The protocol of a connection, as far as the heir distinguishes protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum WireProtocol {
    /// No connection: the record is free.
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

/// The record of one connection. Its index is the descriptor.
#[repr(C, align(64))]
struct ConnCells {
    wire_protocol: AtomicU32,
    listener: AtomicU32,
    /// Number of bytes read. This and all other positions wrap around.
    read: AtomicU32,
    /// The input up to this position has been handled completely.
    clean: AtomicU32,
    written: AtomicU32,
    /// Start of the unwritten output: a boundary between protocol records.
    batch: AtomicU32,
    /// End of the unwritten output: a boundary between protocol records.
    queued: AtomicU32,
    /// Nonzero if there were more simultaneous requests than entries.
    overflow: AtomicU32,
    /// Differs for each connection that has used this record.
    epoch: AtomicU32,
    /// Nonzero if the last byte of a response may be unwritten.
    ending: AtomicU32,
    /// See [`PackedOrigin`].
    origin: [AtomicU64; 3],
    requests: [RequestCells; REQUESTS],
}

#[repr(C)]
struct RequestCells {
    /// 0 for a free entry; otherwise `USED`, the flags and the id.
    word: AtomicU32,
    /// The connection's `read` position when the request was entered.
    at: AtomicU32,
    /// Position in the output at which the response begins, with [`KNOWN`] if it is set.
    from: AtomicU64,
    /// Position in the output at which the response ends, with [`KNOWN`] if it is set.
    to: AtomicU64,
}

const USED: u32 = 1 << 31;
const HEAD: u32 = 1 << 16;
const LAST: u32 = 1 << 17;
/// Marks a position as known. The position itself is in the low 32 bits.
const KNOWN: u64 = 1 << 32;

#[repr(C)]
struct Region {
    intent: Intent,
    records: [ConnCells; MAX_CONNECTIONS],
}

/// The journal of one worker. Its memory is never unmapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Journal {
    region: NonNull<Region>,
}

// SAFETY: only one thread at a time uses the journal: first the thread that created it, then the event loop's thread.
unsafe impl Send for Journal {}

/// A request, as read from the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestRecord {
    /// The request id in FastCGI.
    pub(crate) id: u16,
    /// Whether the response has no body (`HEAD`).
    pub(crate) is_head: bool,
    /// Whether the connection closes after this request.
    pub(crate) is_last: bool,
    /// The connection's `read` position when the request was entered.
    pub(crate) at: u32,
    /// Position in the output at which the response begins, if known.
    pub(crate) from: Option<u32>,
    /// Position in the output at which the response ends, if known.
    pub(crate) to: Option<u32>,
}

/// A connection, as read from the journal, including the outcome in the intent record.
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
    pub(crate) requests: Vec<RequestRecord>,
    /// The last bytes that were read, and the position of the first of these bytes. It is unknown whether the worker
    /// examined them.
    pub(crate) landed: Option<(u32, Vec<u8>)>,
}

/// The last operation of a worker.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LastOp {
    /// The records describe the state completely.
    Settled,
    /// An accepted connection without a record may exist.
    Accepting,
    /// This connection was being closed.
    Closing(RawFd),
    /// This connection was passed to another worker.
    Passed(RawFd),
    /// This connection was taken over, with this message.
    Received(RawFd, Vec<u8>),
}

impl Journal {
    /// Creates a journal. Memory is allocated only as it is used.
    ///
    /// # Errors
    /// Returns the error from `mmap(2)`.
    pub(crate) fn create() -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: this is a new mapping at an address that the kernel chooses.
        let region = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<Region>(), protection, flags, -1, 0) };
        if region == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The mapping is zeroed, page-aligned, and never unmapped. All zeroes are a valid `Region`.
        let region: NonNull<Region> = NonNull::new(region.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // The kernel must be able to write to the intent record even while the process is being killed. mlock(2) is
        // optional and may fail. SAFETY: the intent record is a part of the mapping.
        unsafe { libc::mlock(region.as_ptr().cast(), Intent::VITAL) };
        Ok(Self { region })
    }

    fn intent(&self) -> &Intent {
        // SAFETY: the mapping has the size of a `Region` and is never unmapped. It consists of atomics, and of cells that only one
        // thread accesses: the owner of the intent record while the worker is alive, and the heir afterwards.
        unsafe { &self.region.as_ref().intent }
    }

    fn record(&self, fd: RawFd) -> Option<&ConnCells> {
        // SAFETY: the mapping has the size of a `Region` and is never unmapped. Records consist of atomics only.
        let records = unsafe { &self.region.as_ref().records };
        records.get(usize::try_from(fd).ok()?)
    }

    /// Accepts a connection, like [`sys::accept`]. The caller must then open a record for the connection
    /// ([`Self::enter`]).
    ///
    /// # Errors
    /// Returns the error from [`sys::accept`].
    pub(crate) fn accept(&self, listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
        self.intent().set(Op::Accept, -1);
        let accepted = sys::accept(listener);
        if accepted.is_err() {
            self.intent().clear();
        }
        accepted
    }

    /// Takes over a connection that another worker passed on. The caller must then open a record for the connection,
    /// and only then process the bytes of the message.
    ///
    /// # Errors
    /// Returns `WouldBlock` if there is no message, and `InvalidData` for a message without a connection.
    pub(crate) fn take_over(&self, channel: BorrowedFd<'_>) -> io::Result<(OwnedFd, Handoff)> {
        let intent = self.intent();
        // This duplication fails if no descriptor is free. Without this check, the kernel would deliver the message and
        // drop the connection.
        drop(channel.try_clone_to_owned()?);
        intent.receive_message(channel.as_raw_fd())?;
        // The kernel has just created this descriptor in this process.
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
                // The bytes in the message count as input that was read.
                let header = u32::try_from(HEADER).unwrap_or(0);
                record.read.store(intent.moved().saturating_sub(header), Release);
                intent.take_as_read(number);
            }
            Op::Nothing | Op::Accept | Op::Read | Op::Write | Op::Close | Op::Pass => intent.clear(),
        }
        ConnHandle { journal: *self, fd: number, epoch }
    }
}

/// Called by the heir after the worker's death.
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

    /// Returns the descriptors that may have a record.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let top = self.intent().top.load(Acquire).min(u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX));
        (0..top.cast_signed()).filter(|&fd| self.read_record(fd).is_some())
    }

    /// Returns the state of a connection, or `None` if it has no record.
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
    fn read(&self) -> Option<RequestRecord> {
        let word = self.word.load(Acquire);
        #[expect(clippy::cast_possible_truncation, reason = "the low bits are the id and the position")]
        let (id, position) = (word as u16, |word: u64| (word & KNOWN != 0).then_some(word as u32));
        (word & USED != 0).then(|| RequestRecord {
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
