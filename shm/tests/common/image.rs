//! Images of segments. An image is a copy of a segment's memory at an instant. Another segment with the same memory can be made from it.
//!
//! Byte locks are not part of an image. All members of a segment that is made from an image are therefore dead, as if they had been killed.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use forkyard_shm::Segment;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image(Vec<u8>);

/// A memory file to which one image after another is written.
#[derive(Debug)]
pub struct Slate(File);

/// A segment's memory, and its content at the last check.
#[derive(Debug)]
pub struct Watch {
    memory: NonNull<u8>,
    pub image: Image,
}

impl Image {
    pub fn of(segment: &Segment) -> Image {
        let mut bytes = vec![0; usize::try_from(segment.len()).expect("the segment is mapped")];
        let file = File::from(segment.fd().try_clone_to_owned().expect("dup"));
        file.read_exact_at(&mut bytes, 0).expect("memory file");
        Image(bytes)
    }

    /// Overwrites the first words of the entry that is stored under this key. The entry must have one tag.
    pub fn spoil(&mut self, key: &[u8]) {
        let padded: Vec<u8> = key.iter().copied().chain([0; 8]).take(key.len().next_multiple_of(8)).collect();
        let at = self.0.windows(padded.len()).position(|bytes| bytes == padded).expect("the key is stored");
        self.0[at - 88..at - 72].fill(0xa5);
    }
}

impl Watch {
    pub fn of(segment: &Segment) -> Watch {
        let len = NonZeroUsize::new(usize::try_from(segment.len()).expect("the segment is mapped")).expect("not empty");
        // SAFETY: a new mapping, of a file whose size is sealed.
        let memory = unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, segment.fd(), 0) };
        Watch { memory: memory.expect("mmap").cast(), image: Image::of(segment) }
    }

    /// Reads the memory again, and returns whether it has changed. No process may write to the memory during the call.
    pub fn renew(&mut self) -> bool {
        // SAFETY: the mapping is never removed, and the only process that could write to it is stopped by its tracer.
        let memory = unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.image.0.len()) };
        let changed = memory != self.image.0;
        if changed {
            self.image.0.copy_from_slice(memory);
        }
        changed
    }
}

impl Slate {
    pub fn for_images_like(image: &Image) -> Slate {
        let fd = memfd_create(c"slate", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).expect("memfd");
        nix::unistd::ftruncate(&fd, i64::try_from(image.0.len()).expect("the segment is mapped")).expect("ftruncate");
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).expect("seal");
        Slate(fd.into())
    }

    /// Returns a segment with this image's memory. It replaces the segment returned by the previous call.
    pub fn pour(&self, image: &Image) -> Segment {
        self.0.write_all_at(&image.0, 0).expect("memory file");
        let fd: OwnedFd = self.0.as_fd().try_clone_to_owned().expect("dup");
        Segment::attach(fd).expect("attach")
    }
}
