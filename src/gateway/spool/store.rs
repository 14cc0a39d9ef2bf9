//! The bytes of one body: the older ones in a temporary file, the newer ones in memory.
//!
//! New bytes go to memory. When the memory of the store or of the whole process is used up, everything in memory is
//! moved to the file, behind what the file already contains; therefore every unread byte of the file is older than
//! every byte in memory. The file is closed when it has been read to its end.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::budget::{Share, SpoolBudget};
use super::chunks::Chunks;
use super::error::SpoolError;
use super::temp_file::TempFile;

/// The space of bytes that have been read is freed in multiples of this number.
const FREED_AT_ONCE: u64 = 1 << 20;

/// The limits of one spool.
#[derive(Clone, Debug)]
pub(crate) struct SpoolLimits {
    /// Maximum number of bytes in memory.
    pub(crate) memory_each: u64,
    /// Maximum number of bytes in the file. 0: no file. For [`super::collect`]: the maximum length of the body.
    pub(crate) file_each: u64,
    /// The directory for the file.
    pub(crate) directory: Arc<Path>,
}

impl SpoolLimits {
    /// A default for `memory_each`: nearly all pages and forms fit.
    pub(crate) const MEMORY_EACH: u64 = 256 << 10;

    /// Returns limits without a file, for a body that must reach the client while it is being produced.
    pub(crate) fn streaming(&self) -> Self {
        Self { file_each: 0, ..self.clone() }
    }
}

#[derive(Debug)]
pub(super) struct Store {
    limits: SpoolLimits,
    memory: Chunks,
    memory_share: Share,
    file: Option<FilePart>,
    /// The bytes of the file that have not been freed.
    file_share: Share,
    /// Why the last attempt to use the file failed. While it is set, there is no further attempt.
    refused: Option<SpoolError>,
}

#[derive(Debug)]
struct FilePart {
    file: TempFile,
    written: u64,
    read: u64,
    freed: u64,
    can_free: bool,
}

impl FilePart {
    fn open(directory: &Arc<Path>) -> Result<Self, SpoolError> {
        Ok(Self { file: TempFile::open(directory)?, written: 0, read: 0, freed: 0, can_free: true })
    }

    fn unread(&self) -> u64 {
        self.written - self.read
    }

    fn read(&mut self) -> Result<Bytes, SpoolError> {
        let bytes = self.file.read_at(self.read..self.written)?;
        self.read += bytes.len() as u64;
        Ok(bytes)
    }

    /// Frees space that has been read, and returns the number of bytes freed.
    fn free(&mut self) -> u64 {
        let end = self.read / FREED_AT_ONCE * FREED_AT_ONCE;
        if end == self.freed || !self.can_free {
            return 0;
        }
        self.can_free = self.file.free(self.freed..end);
        if !self.can_free {
            return 0;
        }
        let count = end - self.freed;
        self.freed = end;
        count
    }
}

impl Store {
    pub(super) fn new(limits: &SpoolLimits, budget: &SpoolBudget) -> Self {
        Self {
            limits: limits.clone(),
            memory: Chunks::default(),
            memory_share: budget.memory(),
            file: None,
            file_share: budget.files(),
            refused: None,
        }
    }

    /// Number of unread bytes.
    pub(super) fn len(&self) -> u64 {
        self.memory.len() + self.file.as_ref().map_or(0, FilePart::unread)
    }

    fn has_memory(&self) -> bool {
        self.memory.len() < self.limits.memory_each && self.memory_share.has_room()
    }

    /// Returns why the store should not be given more bytes before it has been read; `None` if it can store more.
    ///
    /// An empty store is never full: otherwise its reader would wait forever.
    pub(super) fn why_full(&self) -> Option<SpoolError> {
        if self.has_memory() || self.len() == 0 {
            return None;
        }
        let SpoolLimits { memory_each, file_each, .. } = self.limits;
        match &self.refused {
            Some(error) => Some(error.clone()),
            None if file_each == 0 => Some(SpoolError::Unread { limit: memory_each }),
            None if self.file_share.held() >= file_each => Some(SpoolError::TooLong { limit: file_each }),
            None if !self.file_share.has_room() => Some(SpoolError::FilesUsedUp { limit: self.file_share.limit() }),
            None => None,
        }
    }

    /// Stores a chunk within the limits. If it fails, the chunk is not stored.
    pub(super) fn put(&mut self, bytes: &Bytes) -> Result<(), SpoolError> {
        if self.put_in_memory(bytes) {
            return Ok(());
        }
        self.flush()?;
        if self.put_in_memory(bytes) {
            return Ok(());
        }
        self.append(bytes)
    }

    /// Stores a chunk within the limits or, if this fails, in memory beyond the limits.
    pub(super) fn put_anyway(&mut self, bytes: &Bytes) {
        if let Err(error) = self.put(bytes) {
            self.refused = Some(error);
            self.memory_share.take_anyway(bytes.len() as u64);
            self.memory.push(bytes.clone());
        }
    }

    fn put_in_memory(&mut self, bytes: &Bytes) -> bool {
        let length = bytes.len() as u64;
        let fits = self.memory.len() + length <= self.limits.memory_each && self.memory_share.try_take(length);
        if fits {
            self.memory.push(bytes.clone());
        }
        fits
    }

    /// Moves everything from memory to the file. If it fails, the rest stays in memory.
    fn flush(&mut self) -> Result<(), SpoolError> {
        while let Some(bytes) = self.memory.pop() {
            if let Err(error) = self.append(&bytes) {
                self.memory.unpop(bytes);
                return Err(error);
            }
            self.memory_share.give_back(bytes.len() as u64);
        }
        Ok(())
    }

    /// Writes a chunk to the file. The memory must be empty, or the chunk must come from its front.
    fn append(&mut self, bytes: &[u8]) -> Result<(), SpoolError> {
        let (length, limit) = (bytes.len() as u64, self.limits.file_each);
        if limit == 0 {
            return Err(SpoolError::Unread { limit: self.limits.memory_each });
        }
        if self.file_share.held().saturating_add(length) > limit {
            return Err(SpoolError::TooLong { limit });
        }
        if !self.file_share.try_take(length) {
            return Err(SpoolError::FilesUsedUp { limit: self.file_share.limit() });
        }
        let result = self.write(bytes);
        if result.is_err() {
            self.file_share.give_back(length);
        }
        result
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SpoolError> {
        let part = match &mut self.file {
            Some(part) => part,
            None => self.file.insert(FilePart::open(&self.limits.directory)?),
        };
        let result = part.file.write_at(bytes, part.written);
        match result {
            Ok(()) => part.written += bytes.len() as u64,
            Err(_) if part.unread() == 0 => self.file = None,
            Err(_) => {}
        }
        result
    }

    /// Removes the oldest chunk and returns it, or `None` if there is none.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, SpoolError> {
        let bytes = match &mut self.file {
            Some(part) => {
                let bytes = part.read()?;
                if part.unread() == 0 {
                    self.close_file();
                } else {
                    let freed = part.free();
                    self.file_share.give_back(freed);
                }
                Some(bytes)
            }
            None => {
                let bytes = self.memory.pop();
                self.memory_share.give_back(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64));
                bytes
            }
        };
        // Not earlier: each attempt that fails adds a chunk to the memory.
        if self.has_memory() || self.len() == 0 {
            self.refused = None;
        }
        Ok(bytes)
    }

    fn close_file(&mut self) {
        self.file = None;
        self.file_share.give_all_back();
    }

    pub(super) fn clear(&mut self) {
        self.close_file();
        self.memory = Chunks::default();
        self.memory_share.give_all_back();
    }

    /// Prepares the store for [`Store::peek`]: afterwards, all bytes are in memory, or all are in the file.
    pub(super) fn settle(&mut self) -> Result<(), SpoolError> {
        self.memory.seal();
        if self.file.is_some() { self.flush() } else { Ok(()) }
    }

    /// Returns the chunk number `index`, which begins at `offset`, without removing it.
    pub(super) fn peek(&self, index: usize, offset: u64) -> Result<Option<Bytes>, SpoolError> {
        match &self.file {
            Some(part) if offset < part.written => part.file.read_at(offset..part.written).map(Some),
            Some(_) => Ok(None),
            None => Ok(self.memory.at(index)),
        }
    }

    /// The bytes counted in memory and in the file.
    #[cfg(test)]
    pub(super) fn held(&self) -> (u64, u64) {
        (self.memory_share.held(), self.file_share.held())
    }

    #[cfg(test)]
    pub(super) fn has_file(&self) -> bool {
        self.file.is_some()
    }
}
