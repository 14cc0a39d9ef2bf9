//! Receives descriptors that another process sends along with a message (SCM_RIGHTS, unix(7)).
//!
//! Every received descriptor is owned from the first moment; descriptors for which there is no space, or which are not
//! expected, are closed. A message that arrives without all of its descriptors is an error: the kernel drops
//! descriptors if there is no space for them, or if this process has no free descriptor numbers.
#![expect(unsafe_code, reason = "descriptors by number")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Reads once from a Unix socket and receives the attached descriptor, if any. The descriptor is close-on-exec.
///
/// # Errors
/// Returns the error from `recvmsg(2)`, or [`cut_short`] if there is no space for the attached descriptors.
pub(crate) fn receive_with_descriptor(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let (bytes, descriptors) = receive_with_descriptors::<1>(socket, into, MsgFlags::empty())?;
    Ok((bytes, descriptors.into_iter().next()))
}

/// Like [`receive_with_descriptor`], with at most `MOST` descriptors, in the order in which they were sent.
///
/// # Errors
/// Fails as [`receive_with_descriptor`] does.
pub(crate) fn receive_with_descriptors<const MOST: usize>(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    flags: MsgFlags,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut room = vec![0; nix::sys::socket::cmsg_space::<RawFd>() * MOST];
    let mut pieces = [io::IoSliceMut::new(into)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut room), flags)?;
    let (bytes, is_cut) = (message.bytes, message.flags.contains(MsgFlags::MSG_CTRUNC));
    let mut descriptors = Vec::new();
    if is_cut {
        // The kernel has already created the descriptors for which there was space. nix returns an error for truncated
        // control data, so the descriptors are read here.
        descriptors.extend(descriptors_in(&room));
    } else {
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: the kernel has just created these descriptors for this process, so each is open, and not owned elsewhere.
                descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
    }
    // Excess descriptors are closed here.
    if is_cut || descriptors.len() > MOST { Err(cut_short()) } else { Ok((bytes, descriptors)) }
}

/// Returns the error for a message that arrived without all of its descriptors.
fn cut_short() -> io::Error {
    let why = "a message arrived without all of its descriptors (if too many are open, raise ulimit -n)";
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Returns the descriptors in truncated control data. The data begins with a complete header (cmsg(3)), or is all
/// zeroes.
fn descriptors_in(control: &[u8]) -> Vec<OwnedFd> {
    let header = size_of::<libc::cmsghdr>();
    let number = |at: usize| Some(i32::from_ne_bytes(control.get(at..at + size_of::<RawFd>())?.try_into().ok()?));
    let length = control.first_chunk().map_or(0, |bytes| usize::from_ne_bytes(*bytes)).min(control.len());
    let (level, kind) = (number(header - 8), number(header - 4));
    if (level, kind) != (Some(libc::SOL_SOCKET), Some(libc::SCM_RIGHTS)) {
        return Vec::new();
    }
    let numbers = (header..length).step_by(size_of::<RawFd>()).map_while(number);
    // The kernel has just created these descriptors. Only complete numbers are within the length that the kernel wrote.
    numbers.filter_map(super::own).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, pipe};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixDatagram;

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    /// Sends the reading ends of `count` pipes along with a byte, and returns the writing ends.
    fn send(through: &UnixDatagram, count: usize) -> Vec<std::io::PipeWriter> {
        let (readers, writers): (Vec<PipeReader>, Vec<_>) = (0..count).map(|_| pipe().unwrap()).unzip();
        let numbers: Vec<RawFd> = readers.iter().map(|reader| reader.as_raw_fd()).collect();
        let control = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(through.as_raw_fd(), &[io::IoSlice::new(b"!")], &control, MsgFlags::empty(), None).unwrap();
        writers
    }

    /// Whether the reading end of the pipe is closed everywhere.
    fn is_closed(writer: &std::io::PipeWriter) -> bool {
        io::Write::write(&mut &*writer, b"!").is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    }

    #[test]
    fn descriptors_that_do_not_fit_are_closed_and_the_message_is_an_error() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let mut byte = [0];
        for count in [2, 3, 9] {
            let writers = send(&theirs, count);
            let error = receive_with_descriptor(ours.as_fd(), &mut byte).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{count}");
            assert!(writers.iter().all(is_closed), "{count}: a descriptor stayed open");
        }
        let writers = send(&theirs, 1);
        let (bytes, descriptor) = receive_with_descriptor(ours.as_fd(), &mut byte).unwrap();
        assert!(bytes == 1 && descriptor.is_some() && !is_closed(&writers[0]));
        drop(descriptor);
        assert!(is_closed(&writers[0]));

        let writers = send(&theirs, 2);
        let (_, two) = receive_with_descriptors::<2>(ours.as_fd(), &mut byte, MsgFlags::MSG_DONTWAIT).unwrap();
        assert!(two.len() == 2 && !writers.iter().any(is_closed));
        theirs.send(b"!").unwrap();
        assert_eq!(
            receive_with_descriptor(ours.as_fd(), &mut byte).unwrap().0,
            1,
            "a message without descriptors is complete"
        );
    }
}
