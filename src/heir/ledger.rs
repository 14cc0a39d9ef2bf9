//! The ledger: what a worker's heir has to know of the worker's connections, in memory that both of them see.
//!
//! The worker's event loop writes it as it goes: plain stores, and no system call of its own. It is never locked, since
//! nobody reads it before the worker is dead; then its last state is the truth, up to the instruction at which the worker
//! died. Three things make that exact:
//!
//! - **Positions, not flags.** What was read from a connection and written to it is counted in bytes, and a request knows at
//!   which position its response begins and ends. Whether a response has left the worker follows from two numbers, however
//!   many of them one write took along.
//! - **The desk.** Before each system call that moves something, the worker lays out on the desk what it is about to do.
//!   `recvmmsg(2)` and `sendmmsg(2)` store the number of bytes that they moved in the caller's memory, inside the system
//!   call; nothing can kill a process between the one and the other. That memory is the desk. So the heir knows of each byte
//!   whether the worker took it, even if the worker never heard.
//! - **The landing.** Bytes are read into shared memory and copied from there. What the worker had taken in and not yet
//!   looked at is not lost with it.
//!
//! May not: allocate or make a system call beyond the one that it accounts for, in what serves a request. The heir must not
//! believe any of it more than its own safety allows: the worker may have scribbled.
#![expect(unsafe_code, reason = "shared memory, and system calls that store their outcome there")]

use std::cell::UnsafeCell;
use std::io::{self, IoSlice};
use std::mem::offset_of;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64};

use tokio::io::ReadBuf;

use crate::handover::{HEADER, PackedOrigin, Parcel};
use crate::sys;

/// Descriptors that have a page in the ledger. A connection with a higher number is closed when its worker dies.
pub(crate) const PAGES: usize = 1 << 16;
/// Requests of one connection that are told apart; those beyond are not answered.
pub(crate) const REQUESTS: usize = 16;
/// Pieces of one write.
const SLICES: usize = 64;
/// Bytes of one read.
pub(crate) const LANDING: usize = 64 << 10;

/// What the event loop is doing at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Act {
    Nothing = 0,
    /// A connection is being accepted, and has no page yet.
    Accept = 1,
    Read = 2,
    Write = 3,
    Close = 4,
    /// A connection is passed on to another worker.
    Pass = 5,
    /// A connection of another worker is taken over, and has no page yet.
    Receive = 6,
}

impl Act {
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

/// What a connection speaks, as far as its heir is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Tongue {
    /// No connection: a free page.
    Nothing = 0,
    FastCgi = 1,
    Scgi = 2,
    Http1 = 3,
    Http2 = 4,
}

impl Tongue {
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

/// Control data of one descriptor, with room to spare.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);
const CONTROL: usize = 64;

#[repr(C)]
struct Desk {
    act: AtomicU32,
    fd: AtomicI32,
    /// The connection's position before the act.
    base: AtomicU32,
    /// So many bytes of what was read were not the connection's.
    skip: AtomicU32,
    /// One more than the highest descriptor that ever had a page.
    top: AtomicU32,
    message: UnsafeCell<libc::mmsghdr>,
    control: UnsafeCell<Control>,
    header: UnsafeCell<[u8; HEADER]>,
    landing: UnsafeCell<[u8; LANDING]>,
}

/// Everything that is known of one connection; its index is the descriptor.
#[repr(C, align(64))]
struct PageCells {
    tongue: AtomicU32,
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
    /// Another number for each connection that had this page.
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
    desk: Desk,
    pages: [PageCells; PAGES],
}

/// The ledger of one worker. Its memory is never given back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ledger {
    region: NonNull<Region>,
}

// SAFETY: one thread at a time uses it: the one that made it, and then the event loop's, which it is handed to.
unsafe impl Send for Ledger {}

/// A request as the ledger has it.
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

/// A connection as the ledger has it, with what was on the desk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) tongue: Tongue,
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
pub(crate) enum LastAct {
    /// Nothing that is not in the pages.
    Settled,
    /// There may be a connection that has no page.
    Accepting,
    /// This one was being closed.
    Closing(RawFd),
    /// This one is with somebody else.
    Passed(RawFd),
    /// This one had been taken over, with these bytes of a message.
    Received(RawFd, Vec<u8>),
}

impl Ledger {
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
        // SAFETY: the desk is a part of the mapping.
        unsafe { libc::mlock(region.as_ptr().cast(), offset_of!(Desk, landing)) };
        Ok(Self { region })
    }

    fn desk(&self) -> &Desk {
        // SAFETY: the mapping is as large as a `Region`, lives for ever, and is all atomics but for cells that only the one
        // thread that owns the desk touches while the worker lives, and the heir afterwards.
        unsafe { &self.region.as_ref().desk }
    }

    fn page(&self, fd: RawFd) -> Option<&PageCells> {
        let index = usize::try_from(fd).ok().filter(|&index| index < PAGES)?;
        // SAFETY: as above; a page is all atomics.
        unsafe { &(*(&raw const (*self.region.as_ptr()).pages)) }.get(index)
    }

    fn moved(&self) -> u32 {
        // SAFETY: the message is only written by the desk's owner and by the kernel on its behalf. Any value is valid.
        unsafe { (&raw const (*self.desk().message.get()).msg_len).read_volatile() }
    }

    /// Lays out a message on the desk. Nothing has moved yet.
    fn lay_out(&self, act: Act, fd: RawFd, base: u32, slices: &mut [libc::iovec], with_control: bool) {
        let desk = self.desk();
        desk.act.store(Act::Nothing as u32, Release);
        let control_length = if with_control { CONTROL } else { 0 };
        // SAFETY: `mmsghdr` is plain data, and this thread is the only one that touches it. The control data are
        // within the desk; `slices` is used by the system call that follows, within the caller's borrow.
        unsafe {
            let message = &mut *desk.message.get();
            message.msg_len = 0;
            message.msg_hdr = std::mem::zeroed();
            message.msg_hdr.msg_iov = slices.as_mut_ptr();
            message.msg_hdr.msg_iovlen = slices.len();
            message.msg_hdr.msg_control = if with_control { desk.control.get().cast() } else { std::ptr::null_mut() };
            message.msg_hdr.msg_controllen = control_length;
        }
        desk.fd.store(fd, Release);
        desk.base.store(base, Release);
        desk.skip.store(0, Release);
        desk.act.store(act as u32, Release);
    }

    fn clear(&self) {
        self.desk().act.store(Act::Nothing as u32, Release);
    }

    fn send(&self, through: RawFd) -> io::Result<u32> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message was laid out just now, and all that it names is valid for the call.
        let sent = unsafe { libc::sendmmsg(through, self.desk().message.get(), 1, flags) };
        if sent == 1 { Ok(self.moved()) } else { Err(io::Error::last_os_error()) }
    }

    fn receive(&self, from: RawFd, flags: i32) -> io::Result<u32> {
        let flags = libc::MSG_DONTWAIT | flags;
        // SAFETY: as in `send`; what is read into is the landing and the desk, which are as long as they say.
        let received = unsafe { libc::recvmmsg(from, self.desk().message.get(), 1, flags, std::ptr::null_mut()) };
        if received == 1 { Ok(self.moved()) } else { Err(io::Error::last_os_error()) }
    }

    fn landing(&self, length: usize) -> libc::iovec {
        libc::iovec { iov_base: self.desk().landing.get().cast(), iov_len: length.min(LANDING) }
    }

    /// The first bytes of the landing.
    fn landed(&self, length: usize) -> &[u8] {
        // SAFETY: the landing has so many bytes, all initialised, and nobody writes there until the next read of
        // this thread, which needs this ledger again: callers copy at once.
        unsafe { std::slice::from_raw_parts(self.desk().landing.get().cast(), length.min(LANDING)) }
    }

    /// Accepts a connection, as [`sys::accept`]. It is to be entered next.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn accept(&self, listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
        self.desk().act.store(Act::Accept as u32, Release);
        let accepted = sys::accept(listener);
        if accepted.is_err() {
            self.clear();
        }
        accepted
    }

    /// Takes over a connection that another worker passed on. It is to be entered next, and then its bytes to be read.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; `InvalidData` for a message without a connection.
    pub(crate) fn take_over(&self, channel: BorrowedFd<'_>) -> io::Result<(OwnedFd, Parcel)> {
        let header = libc::iovec { iov_base: self.desk().header.get().cast(), iov_len: HEADER };
        let mut slices = [header, self.landing(LANDING)];
        self.lay_out(Act::Receive, -1, 0, &mut slices, true);
        let received = self.receive(channel.as_raw_fd(), libc::MSG_CMSG_CLOEXEC).inspect_err(|_| self.clear())?;
        let message = self.message(received);
        let parcel = message.and_then(|message| Parcel::decode(&message));
        match (self.received_descriptor(), parcel) {
            (Some(fd), Some(parcel)) => Ok((fd, parcel)),
            _ => {
                self.clear();
                Err(io::ErrorKind::InvalidData.into())
            }
        }
    }

    /// The message that was received, put together.
    fn message(&self, length: u32) -> Option<Vec<u8>> {
        let early = (length as usize).checked_sub(HEADER)?;
        // SAFETY: the header is a part of the desk, and any bytes are valid.
        let header = unsafe { self.desk().header.get().read_volatile() };
        Some([&header[..], self.landed(early)].concat())
    }

    /// The descriptor that came with the message on the desk.
    fn received_descriptor(&self) -> Option<OwnedFd> {
        let fd = self.control_descriptor()?;
        // SAFETY: the kernel has just made this descriptor for us.
        Some(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn control_descriptor(&self) -> Option<RawFd> {
        let header = size_of::<libc::cmsghdr>();
        // SAFETY: the control data are a part of the desk, and any bytes are valid.
        let control = unsafe { self.desk().control.get().read_volatile() }.0;
        let word = |at: usize| control.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
        let level = word(offset_of!(libc::cmsghdr, cmsg_level));
        let kind = word(offset_of!(libc::cmsghdr, cmsg_type));
        // SAFETY: any bytes are a valid length.
        let filled = unsafe { (*self.desk().message.get()).msg_hdr.msg_controllen };
        let whole = filled >= header + size_of::<RawFd>();
        (whole && level == Some(libc::SOL_SOCKET) && kind == Some(libc::SCM_RIGHTS)).then(|| word(header)).flatten()
    }

    /// Opens a page for a connection.
    pub(crate) fn enter(
        &self,
        fd: BorrowedFd<'_>,
        tongue: Tongue,
        listener: u16,
        PackedOrigin(origin): PackedOrigin,
    ) -> Account {
        let number = fd.as_raw_fd();
        let Some(page) = self.page(number) else { return Account { ledger: *self, fd: number, epoch: 0 } };
        let epoch = page.epoch.load(Acquire).wrapping_add(1);
        page.epoch.store(epoch, Release);
        for word in [&page.read, &page.clean, &page.written, &page.batch, &page.queued, &page.overflow, &page.ending] {
            word.store(0, Release);
        }
        for request in &page.requests {
            if request.word.load(Acquire) != 0 {
                request.word.store(0, Release);
            }
        }
        page.listener.store(listener.into(), Release);
        for (word, part) in page.origin.iter().zip(origin) {
            word.store(part, Release);
        }
        let desk = self.desk();
        let top = number.cast_unsigned() + 1;
        if desk.top.load(Acquire) < top {
            desk.top.store(top, Release);
        }
        page.tongue.store(tongue as u32, Release);
        if Act::from_word(desk.act.load(Acquire)) == Act::Accept {
            self.clear();
        } else {
            // What came with it is as if it had been read.
            self.begin_early(number);
        }
        Account { ledger: *self, fd: number, epoch }
    }

    fn begin_early(&self, fd: RawFd) {
        let desk = self.desk();
        if Act::from_word(desk.act.load(Acquire)) == Act::Receive {
            let header = u32::try_from(HEADER).unwrap_or(0);
            desk.fd.store(fd, Release);
            desk.skip.store(header, Release);
            if let Some(page) = self.page(fd) {
                page.read.store(self.moved().saturating_sub(header), Release);
            }
            // Until here it is a message that was received; from here on, a read.
            desk.act.store(Act::Read as u32, Release);
        }
    }
}

/// For the heir, when the worker is dead.
impl Ledger {
    pub(crate) fn last_act(&self) -> LastAct {
        let desk = self.desk();
        let fd = desk.fd.load(Acquire);
        match Act::from_word(desk.act.load(Acquire)) {
            Act::Nothing | Act::Read | Act::Write => LastAct::Settled,
            Act::Accept => LastAct::Accepting,
            Act::Close => LastAct::Closing(fd),
            Act::Pass if self.moved() > 0 => LastAct::Passed(fd),
            Act::Pass => LastAct::Settled,
            Act::Receive => match (self.control_descriptor(), self.message(self.moved())) {
                (Some(fd), Some(message)) => LastAct::Received(fd, message),
                _ => LastAct::Settled,
            },
        }
    }

    /// The descriptors that may have a page.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let top = self.desk().top.load(Acquire).min(u32::try_from(PAGES).unwrap_or(u32::MAX));
        (0..top.cast_signed()).filter(|&fd| self.read_page(fd).is_some())
    }

    /// What is known of a connection; `None` if it has no page.
    pub(crate) fn read_page(&self, fd: RawFd) -> Option<Page> {
        let (page, desk) = (self.page(fd)?, self.desk());
        let tongue = Tongue::from_word(page.tongue.load(Acquire));
        if tongue == Tongue::Nothing {
            return None;
        }
        let mut read = page.read.load(Acquire);
        let mut written = page.written.load(Acquire);
        let mut landed = None;
        let base = desk.base.load(Acquire);
        match Act::from_word(desk.act.load(Acquire)) {
            Act::Read if desk.fd.load(Acquire) == fd => {
                let came = self.moved().saturating_sub(desk.skip.load(Acquire));
                read = base.wrapping_add(came);
                landed = (came > 0).then(|| (base, self.landed(came as usize).to_vec()));
            }
            Act::Write if desk.fd.load(Acquire) == fd => written = base.wrapping_add(self.moved()),
            _ => {}
        }
        Some(Page {
            tongue,
            listener: u16::try_from(page.listener.load(Acquire)).unwrap_or(u16::MAX),
            read,
            clean: page.clean.load(Acquire),
            written,
            batch: page.batch.load(Acquire),
            queued: page.queued.load(Acquire),
            overflow: page.overflow.load(Acquire) != 0,
            origin: page.origin(),
            requests: page.requests.iter().filter_map(RequestCells::read).collect(),
            landed,
        })
    }
}

impl PageCells {
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

/// The page of one connection, for the worker to write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account {
    ledger: Ledger,
    fd: RawFd,
    epoch: u32,
}

/// A request in its connection's page; none if the page had no room for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry(u8);

impl Account {
    /// None for a connection without a page, or one that is closed.
    fn page(&self) -> Option<&PageCells> {
        self.ledger.page(self.fd).filter(|page| page.epoch.load(Acquire) == self.epoch)
    }

    fn position(&self, of: impl Fn(&PageCells) -> &AtomicU32) -> u32 {
        self.page().map_or(0, |page| of(page).load(Acquire))
    }

    /// Reads what has come, at most `most` bytes, and returns how much that was; 0 at the end of the stream.
    ///
    /// # Errors
    /// What the socket says.
    pub(crate) fn read(&self, socket: BorrowedFd<'_>, buffer: &mut ReadBuf<'_>, most: usize) -> io::Result<usize> {
        let base = self.position(|page| &page.read);
        let mut slices = [self.ledger.landing(most.min(buffer.remaining()))];
        self.ledger.lay_out(Act::Read, self.fd, base, &mut slices, false);
        let read = self.ledger.receive(socket.as_raw_fd(), 0).inspect_err(|_| self.ledger.clear())?;
        buffer.put_slice(self.ledger.landed(read as usize));
        if let Some(page) = self.page() {
            page.read.store(base.wrapping_add(read), Release);
        }
        Ok(read as usize)
    }

    /// Writes what fits, as `send(2)`, and returns how much that was.
    ///
    /// # Errors
    /// What the socket says.
    pub(crate) fn write(&self, socket: BorrowedFd<'_>, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut copies = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; SLICES];
        let count = slices.len().min(SLICES);
        for (copy, slice) in copies.iter_mut().zip(slices) {
            *copy = libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() };
        }
        let offered: usize = slices[..count].iter().map(|slice| slice.len()).sum();
        if offered == 0 {
            return Ok(0);
        }
        let base = self.position(|page| &page.written);
        if base.wrapping_add(offered as u32).wrapping_sub(self.position(|page| &page.queued)).cast_signed() > 0 {
            self.queue(offered);
        }
        self.ledger.lay_out(Act::Write, self.fd, base, &mut copies[..count], false);
        let sent = self.ledger.send(socket.as_raw_fd()).inspect_err(|_| self.ledger.clear())?;
        if let Some(page) = self.page() {
            page.written.store(base.wrapping_add(sent), Release);
        }
        Ok(sent as usize)
    }

    /// So many bytes wait to be written, the last of which ends a record.
    pub(crate) fn queue(&self, length: usize) {
        let Some(page) = self.page() else { return };
        let written = page.written.load(Acquire);
        let (before, queued) = (page.queued.load(Acquire), self.output(length));
        if before != queued {
            if before == written {
                page.batch.store(written, Release);
            }
            page.queued.store(queued, Release);
        }
    }

    /// The position in the output behind `waiting` bytes that are not written yet.
    #[expect(clippy::cast_possible_truncation, reason = "positions wrap around")]
    pub(crate) fn output(&self, waiting: usize) -> u32 {
        self.position(|page| &page.written).wrapping_add(waiting as u32)
    }

    /// All that was read has been dealt with.
    pub(crate) fn clean(&self) {
        if let Some(page) = self.page() {
            page.clean.store(page.read.load(Acquire), Release);
        }
    }

    /// The connection turns out to speak this.
    pub(crate) fn set_tongue(&self, tongue: Tongue) {
        if let Some(page) = self.page() {
            page.tongue.store(tongue as u32, Release);
        }
    }

    /// A request is under way: from now on the peer is owed a response.
    pub(crate) fn begin(&self, id: u16, is_head: bool, is_last: bool) -> Entry {
        let Some(page) = self.page() else { return Entry(u8::MAX) };
        let written = page.written.load(Acquire);
        let is_free = |request: &RequestCells| match request.read() {
            None => true,
            Some(Request { to: Some(to), .. }) => written.wrapping_sub(to).cast_signed() >= 0,
            Some(_) => false,
        };
        let Some(index) = page.requests.iter().position(is_free) else {
            page.overflow.store(1, Release);
            return Entry(u8::MAX);
        };
        let request = &page.requests[index];
        request.word.store(0, Release);
        request.from.store(0, Release);
        request.to.store(0, Release);
        request.at.store(page.read.load(Acquire), Release);
        let flags = if is_head { HEAD } else { 0 } | if is_last { LAST } else { 0 };
        request.word.store(USED | flags | u32::from(id), Release);
        Entry(u8::try_from(index).unwrap_or(u8::MAX))
    }

    /// The response begins at this position of the output.
    pub(crate) fn response_from(&self, Entry(index): Entry, position: u32) {
        if let Some(request) = self.page().and_then(|page| page.requests.get(usize::from(index))) {
            request.from.store(KNOWN | u64::from(position), Release);
        }
    }

    /// Whether it is known where the response begins.
    pub(crate) fn has_begun(&self, Entry(index): Entry) -> bool {
        let request = self.page().and_then(|page| page.requests.get(usize::from(index)));
        request.is_none_or(|request| request.from.load(Acquire) & KNOWN != 0)
    }

    /// The response ends at this position of the output.
    pub(crate) fn response_to(&self, Entry(index): Entry, position: u32) {
        if let Some(request) = self.page().and_then(|page| page.requests.get(usize::from(index))) {
            request.to.store(KNOWN | u64::from(position), Release);
        }
    }

    /// All of an HTTP response has been made; its last byte is still to be written.
    pub(crate) fn response_over(&self, entry: Entry) {
        self.response_to(entry, self.output(1));
        if let Some(page) = self.page() {
            page.ending.store(1, Release);
        }
    }

    /// Nothing waits to be written.
    pub(crate) fn flushed(&self) {
        let Some(page) = self.page().filter(|page| page.ending.load(Acquire) != 0) else { return };
        let written = page.written.load(Acquire);
        for request in &page.requests {
            let ended = request.read().and_then(|request| request.to);
            if ended.is_some_and(|to| to.wrapping_sub(written).cast_signed() > 0) {
                request.to.store(KNOWN | u64::from(written), Release);
            }
        }
        page.ending.store(0, Release);
    }

    /// The bytes that were read last, if nothing before them is unfinished, and the position of the first.
    pub(crate) fn fresh_input(&self) -> Option<(u32, &[u8])> {
        let desk = self.ledger.desk();
        let base = desk.base.load(Acquire);
        let is_ours = desk.act.load(Acquire) == Act::Read as u32 && desk.fd.load(Acquire) == self.fd;
        let came = self.ledger.moved().saturating_sub(desk.skip.load(Acquire));
        (is_ours && base == self.position(|page| &page.clean)).then(|| (base, self.ledger.landed(came as usize)))
    }

    /// What was read up to this position is dealt with, or will be.
    pub(crate) fn clean_up_to(&self, position: u32) {
        if let Some(page) = self.page() {
            page.clean.store(position, Release);
        }
    }

    /// Who is at the other end is known, and the request may be read.
    pub(crate) fn set_origin(&self, PackedOrigin(origin): PackedOrigin) {
        if let Some(page) = self.page() {
            for (word, part) in page.origin.iter().zip(origin) {
                word.store(part, Release);
            }
            page.clean.store(page.read.load(Acquire), Release);
        }
    }

    /// The connection is not kept after this request.
    pub(crate) fn is_last(&self, Entry(index): Entry) {
        if let Some(request) = self.page().and_then(|page| page.requests.get(usize::from(index))) {
            request.word.store(request.word.load(Acquire) | LAST, Release);
        }
    }

    /// Passes the connection on to another worker, with what was read and not dealt with. It is to be closed here next.
    ///
    /// # Errors
    /// `WouldBlock` if too many are on their way already, or what the channel says: the connection stays here.
    pub(crate) fn pass_on(&self, channel: BorrowedFd<'_>, early: &[u8]) -> io::Result<()> {
        let Some(page) = self.page() else { return Err(io::ErrorKind::Unsupported.into()) };
        let listener = u16::try_from(page.listener.load(Acquire)).unwrap_or(u16::MAX);
        let message = Parcel { listener, origin: page.origin(), early: early.to_vec() }.encode();
        let mut slices = [libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() }];
        self.ledger.lay_out(Act::Pass, self.fd, 0, &mut slices, true);
        self.ledger.enclose(self.fd);
        self.ledger.send(channel.as_raw_fd()).inspect_err(|_| self.ledger.clear())?;
        page.tongue.store(Tongue::Nothing as u32, Release);
        self.ledger.clear();
        Ok(())
    }

    /// Closes the connection, by dropping what holds it.
    pub(crate) fn close<T>(&self, connection: T) {
        let desk = self.ledger.desk();
        self.ledger.clear();
        desk.fd.store(self.fd, Release);
        desk.act.store(Act::Close as u32, Release);
        drop(connection);
        if let Some(page) = self.page() {
            page.tongue.store(Tongue::Nothing as u32, Release);
            page.epoch.store(self.epoch.wrapping_add(1), Release);
        }
        self.ledger.clear();
    }
}

impl Ledger {
    /// Encloses a descriptor in the message on the desk.
    fn enclose(&self, fd: RawFd) {
        // SAFETY: the control data are a part of the desk, aligned and long enough for one descriptor; this thread is the
        // only one that touches them.
        unsafe {
            let header = &mut (*self.desk().message.get()).msg_hdr;
            header.msg_controllen = libc::CMSG_SPACE(4) as usize;
            let control = libc::CMSG_FIRSTHDR(header);
            (*control).cmsg_level = libc::SOL_SOCKET;
            (*control).cmsg_type = libc::SCM_RIGHTS;
            (*control).cmsg_len = libc::CMSG_LEN(4) as usize;
            libc::CMSG_DATA(control).cast::<RawFd>().write_unaligned(fd);
        }
    }
}
