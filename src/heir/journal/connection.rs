//! Reads from and writes to one connection, and keeps the connection's journal record up to date.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Release};

use tokio::io::ReadBuf;

use super::intent::{Ancillary, Op, SLICES};
use super::{ConnCells, HEAD, Journal, KNOWN, LAST, RequestCells, RequestRecord, USED, WireProtocol};
use crate::net::handover::{Handoff, PackedOrigin};

/// Writes the journal record of one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnHandle {
    pub(super) journal: Journal,
    pub(super) fd: RawFd,
    pub(super) epoch: u32,
}

/// Index of a request in its connection's record; `u8::MAX` if the record has no free entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestIndex(u8);

impl ConnHandle {
    /// Returns the connection's record, or `None` if the connection is closed or has no record.
    fn record(&self) -> Option<&ConnCells> {
        self.journal.record(self.fd).filter(|record| record.epoch.load(Acquire) == self.epoch)
    }

    fn position(&self, of: impl Fn(&ConnCells) -> &AtomicU32) -> u32 {
        self.record().map_or(0, |record| of(record).load(Acquire))
    }

    /// Reads up to `most` bytes. Returns the number of bytes read; 0 at the end of the stream.
    ///
    /// # Errors
    /// Returns the error from `recvmmsg(2)`.
    pub(crate) fn read(&self, socket: BorrowedFd<'_>, buffer: &mut ReadBuf<'_>, most: usize) -> io::Result<usize> {
        let base = self.position(|record| &record.read);
        let intent = self.journal.intent();
        let read = intent.read(socket.as_raw_fd(), base, most.min(buffer.remaining()))?;
        intent.with_read_buffer(read, |landed| buffer.put_slice(landed));
        if let Some(record) = self.record() {
            record.read.store(base.wrapping_add(read), Release);
        }
        Ok(read as usize)
    }

    /// Writes without blocking, as `send(2)` does. Returns the number of bytes written.
    ///
    /// # Errors
    /// Returns the error from `sendmmsg(2)`.
    pub(crate) fn write(&self, socket: BorrowedFd<'_>, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let slices = &slices[..slices.len().min(SLICES)];
        let offered: usize = slices.iter().map(|slice| slice.len()).sum();
        if offered == 0 {
            return Ok(0);
        }
        let base = self.position(|record| &record.written);
        if self.output(offered).wrapping_sub(self.position(|record| &record.queued)).cast_signed() > 0 {
            self.queue(offered);
        }
        let (intent, to) = (self.journal.intent(), socket.as_raw_fd());
        let sent = intent.send(Op::Write, (self.fd, base), slices, Ancillary::Nothing, to)?;
        if let Some(record) = self.record() {
            record.written.store(base.wrapping_add(sent), Release);
        }
        Ok(sent as usize)
    }

    /// Records that `length` bytes of output are unwritten, the last of which ends a protocol record.
    pub(crate) fn queue(&self, length: usize) {
        let Some(record) = self.record() else { return };
        let written = record.written.load(Acquire);
        let (before, queued) = (record.queued.load(Acquire), self.output(length));
        if before != queued {
            if before == written {
                record.batch.store(written, Release);
            }
            record.queued.store(queued, Release);
        }
    }

    /// Returns the output position after `waiting` unwritten bytes.
    #[expect(clippy::cast_possible_truncation, reason = "positions wrap around")]
    pub(crate) fn output(&self, waiting: usize) -> u32 {
        self.position(|record| &record.written).wrapping_add(waiting as u32)
    }

    /// Records that all input read so far has been handled.
    pub(crate) fn clean(&self) {
        if let Some(record) = self.record() {
            record.clean.store(record.read.load(Acquire), Release);
        }
    }

    /// Returns the number of bytes that have been read but not yet handled. The result is negative while a part of the
    /// input being handled has not arrived.
    pub(crate) fn unfinished(&self) -> i32 {
        self.position(|record| &record.read).wrapping_sub(self.position(|record| &record.clean)).cast_signed()
    }

    pub(crate) fn set_wire_protocol(&self, wire_protocol: WireProtocol) {
        if let Some(record) = self.record() {
            record.wire_protocol.store(wire_protocol as u32, Release);
        }
    }

    /// Records the start of a request: from now on, the peer is owed a response.
    pub(crate) fn begin(&self, id: u16, is_head: bool, is_last: bool) -> RequestIndex {
        let Some(record) = self.record() else { return RequestIndex(u8::MAX) };
        let written = record.written.load(Acquire);
        let is_free = |request: &RequestCells| match request.read() {
            None => true,
            Some(RequestRecord { to: Some(to), .. }) => written.wrapping_sub(to).cast_signed() >= 0,
            Some(_) => false,
        };
        let Some(index) = record.requests.iter().position(is_free) else {
            record.overflow.store(1, Release);
            return RequestIndex(u8::MAX);
        };
        let request = &record.requests[index];
        request.word.store(0, Release);
        request.from.store(0, Release);
        request.to.store(0, Release);
        request.at.store(record.read.load(Acquire), Release);
        let flags = if is_head { HEAD } else { 0 } | if is_last { LAST } else { 0 };
        request.word.store(USED | flags | u32::from(id), Release);
        RequestIndex(u8::try_from(index).unwrap_or(u8::MAX))
    }

    /// Records the output position at which the response begins.
    pub(crate) fn response_from(&self, RequestIndex(index): RequestIndex, position: u32) {
        if let Some(request) = self.record().and_then(|record| record.requests.get(usize::from(index))) {
            request.from.store(KNOWN | u64::from(position), Release);
        }
    }

    /// Records the output position at which the response ends.
    pub(crate) fn response_to(&self, RequestIndex(index): RequestIndex, position: u32) {
        if let Some(request) = self.record().and_then(|record| record.requests.get(usize::from(index))) {
            request.to.store(KNOWN | u64::from(position), Release);
        }
    }

    /// Records that an HTTP response is complete and its last byte is not yet written.
    pub(crate) fn response_over(&self, index: RequestIndex) {
        self.response_to(index, self.output(1));
        if let Some(record) = self.record() {
            record.ending.store(1, Release);
        }
    }

    /// Records that no output is unwritten. A response passed to [`Self::response_over`] ends at the current output position.
    pub(crate) fn flushed(&self) {
        let Some(record) = self.record().filter(|record| record.ending.load(Acquire) != 0) else { return };
        let written = record.written.load(Acquire);
        for request in &record.requests {
            let ended = request.read().and_then(|request| request.to);
            if ended.is_some_and(|to| to.wrapping_sub(written).cast_signed() > 0) {
                request.to.store(KNOWN | u64::from(written), Release);
            }
        }
        record.ending.store(0, Release);
    }

    /// Records that all input read so far has been handled, except the last `unread` bytes.
    #[expect(clippy::cast_possible_truncation, reason = "positions wrap around")]
    pub(crate) fn clean_except(&self, unread: usize) {
        if let Some(record) = self.record() {
            record.clean.store(record.read.load(Acquire).wrapping_sub(unread as u32), Release);
        }
    }

    /// Passes the unhandled input and its position to `look`, if all of it is in the read buffer. Otherwise returns `None`.
    pub(crate) fn look_at_fresh<T>(&self, look: impl FnOnce(u32, &[u8]) -> Option<T>) -> Option<T> {
        let (intent, clean) = (self.journal.intent(), self.position(|record| &record.clean));
        if intent.op() != Op::Read || intent.fd() != self.fd {
            return None;
        }
        let before = clean.wrapping_sub(intent.base()) as usize;
        intent.with_read_buffer(intent.came(), |landed| look(clean, landed.get(before..)?))
    }

    /// Records that the input up to `position` has been handled, or will be.
    pub(crate) fn clean_up_to(&self, position: u32) {
        if let Some(record) = self.record() {
            record.clean.store(position, Release);
        }
    }

    /// Records the address of the peer, and all input read so far as handled.
    pub(crate) fn set_origin(&self, PackedOrigin(origin): PackedOrigin) {
        if let Some(record) = self.record() {
            for (word, part) in record.origin.iter().zip(origin) {
                word.store(part, Release);
            }
            record.clean.store(record.read.load(Acquire), Release);
        }
    }

    /// Records that the connection closes after this request.
    pub(crate) fn is_last(&self, RequestIndex(index): RequestIndex) {
        if let Some(request) = self.record().and_then(|record| record.requests.get(usize::from(index))) {
            request.word.store(request.word.load(Acquire) | LAST, Release);
        }
    }

    /// Passes the connection to a different worker, with the input that has been read but not handled. The caller must
    /// then close it in this process.
    ///
    /// # Errors
    /// Returns `WouldBlock` if the channel is full, or another error from the channel. In either case the connection
    /// stays with this worker.
    pub(crate) fn hand_off(&self, channel: BorrowedFd<'_>, early: &[u8]) -> io::Result<()> {
        let Some(record) = self.record() else { return Err(io::ErrorKind::Unsupported.into()) };
        let listener = u16::try_from(record.listener.load(Acquire)).unwrap_or(u16::MAX);
        let message = Handoff { listener, origin: record.origin(), early: early.to_vec() }.encode();
        let (intent, enclosure) = (self.journal.intent(), Ancillary::Descriptor(self.fd));
        intent.send(Op::Pass, (self.fd, 0), &[IoSlice::new(&message)], enclosure, channel.as_raw_fd())?;
        record.wire_protocol.store(WireProtocol::Nothing as u32, Release);
        intent.clear();
        Ok(())
    }

    /// Closes the connection by dropping the value that owns its descriptor.
    pub(crate) fn close<T>(&self, connection: T) {
        let intent = self.journal.intent();
        intent.set(Op::Close, self.fd);
        drop(connection);
        if let Some(record) = self.record() {
            record.wire_protocol.store(WireProtocol::Nothing as u32, Release);
            record.epoch.store(self.epoch.wrapping_add(1), Release);
        }
        intent.clear();
    }
}
