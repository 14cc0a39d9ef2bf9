//! A segment in a file, so that the cache is still warm after a restart.
//!
//! The file contains the same bytes as a memory file. Only one master has the file open; flock(2) enforces this. With or without a master,
//! any number of processes may [join](Segment::join). Each holds a shared lock on one byte after the file's end while it uses the file. A
//! process that holds that byte exclusively may recreate the file, repair it, or mark it clean. The existing content is used or dropped as
//! a whole:
//!
//! | state of the file | its content is |
//! |---|---|
//! | contains something other than a segment | left unchanged, and an error is returned |
//! | is empty, has a different version, plan or size, or has a damaged header | dropped |
//! | is marked clean: its last user first wrote the contents to the disk, then the mark | used |
//! | is not clean, and the machine has not been rebooted since | used if an audit of all shards finds no fault |
//! | is not clean, and the machine has been rebooted since | dropped, because it is undefined which of its pages reached the disk |
//!
//! Unless the machine has been rebooted, the kernel has kept all bytes of the file, and a process that dies at any instruction leaves the
//! cache consistent. The audit is therefore sufficient.
//!
//! The mark is removed on disk before anything else is written. After a power failure, the file is therefore either clean or dropped. A
//! process that inherits the descriptor (`FORKYARD_SHM`) cannot attach to the file after it has been closed, because the process's
//! writes would not clear the mark, and even a lookup writes.
//!
//! A process that joins a file that is not clean uses it without an audit. This is safe, because a process that joined before the file was
//! left unclean would have continued without an audit too, and what dead members hold is released as in any segment. When a process that
//! joined exits, it does not mark the file clean; only a master does.
//!
//! When a file is reused, it has no members, so all locks, pins and leases in it belong to dead processes. Its clock continues from where
//! it stopped, plus the time that has passed.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs, statfs};
use nix::sys::statvfs::{Statvfs, fstatvfs, statvfs};

use crate::Plan;
use crate::memory::SharedMemory;
use crate::memory::clock::monotonic_ms;
use crate::memory::error::SegmentError;
use crate::memory::geometry::Geometry;
use crate::memory::layout::{MAGIC, SegmentHead};
use crate::memory::map::Map;
use crate::memory::members::Membership;
use crate::segment::{self, Segment, plan_of, system};

/// How long to wait until the processes of a former master have finished their requests and released the file's lock.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
const CLEAN: u64 = 1;
/// Offset of the byte that every user of the file locks, far above the members' bytes.
const USERS: i64 = 1 << 60;

/// What happened to the previous contents of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The previous contents are used: the cache is warm.
    Warm,
    /// The previous contents were dropped: the cache is empty.
    Dropped {
        /// Why the contents were dropped.
        why: &'static str,
    },
    /// The file is new.
    Nothing,
}

impl Segment {
    /// Creates a segment in a file, and reuses the contents of the file if possible.
    ///
    /// Waits up to 10 s for processes that are still using the file. When the segment is no longer needed, call [`close`](Segment::close).
    ///
    /// # Errors
    /// Fails if the plan is out of range, if the file cannot be opened or is in use, or if the file system does not have enough free space.
    pub fn open(path: &Path, plan: &Plan) -> Result<(Segment, Found), SegmentError> {
        let geometry = Geometry::of(plan)?;
        let file = locked(open(path)?)?;
        let begun = Instant::now();
        loop {
            if lock_users(&file, libc::F_WRLCK) {
                return prepared(file, plan, geometry);
            }
            // Processes that joined the file earlier may keep using it, if the file matches the plan.
            if lock_users(&file, libc::F_RDLCK)
                && let Some(segment) = in_use(&file)?
                && segment.inner.header().is_some_and(|header| segment::misfit(&plan_of(header), plan).is_none())
            {
                segment.scoreboard().reset();
                segment.quarantine().set([]);
                return Ok((segment, Found::Warm));
            }
            wait(&file, begun)?;
        }
    }

    /// Checks whether [`open`](Segment::open) would find a usable file and enough free space. Changes nothing, and ignores quotas.
    ///
    /// # Errors
    /// Fails if [`Segment::open`] would fail.
    pub fn examine(path: &Path, plan: &Plan) -> Result<(), SegmentError> {
        let len = Geometry::of(plan)?.total;
        segment::check_file_size(len)?;
        // For a directory or an unreadable file, the caller reports a more precise error.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        if !path.is_dir()
            && let Ok(file) = opened
        {
            refuse_others(&file)?;
        }
        let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let place = if path.exists() { path } else { directory };
        let Ok(found) = statvfs(place) else { return Ok(()) };
        let missing = len.saturating_sub(path.metadata().map_or(0, |metadata| metadata.blocks().saturating_mul(512)));
        let is_tmpfs = statfs(place).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
        if is_tmpfs {
            segment::check_memory(missing)?;
        }
        let free = free_in(&found);
        // A tmpfs without a size limit reports 0 blocks.
        if missing > free && !(is_tmpfs && found.blocks() == 0) {
            return Err(SegmentError::NoSpace { bytes: len, free: Some(free), source: Errno::ENOSPC.into() });
        }
        Ok(())
    }

    /// Opens the file, whether or not other processes are using it.
    ///
    /// Existing contents are used whatever their plan. If they are unusable, a segment is created from `plan`. The scoreboard belongs to
    /// the master and must not be used.
    ///
    /// Waits up to 10 s for a process that is preparing the file.
    ///
    /// # Errors
    /// Fails in the same cases as [`Segment::open`].
    pub fn join(path: &Path, plan: &Plan) -> Result<Segment, SegmentError> {
        let geometry = Geometry::of(plan)?;
        let file = Arc::new(open(path)?);
        let begun = Instant::now();
        loop {
            if lock_users(&file, libc::F_RDLCK) {
                if let Some(segment) = in_use(&file)? {
                    return Ok(segment);
                }
                if lock_users(&file, libc::F_WRLCK) {
                    let (plan, geometry) = plan_in(&file)?.unwrap_or((*plan, geometry));
                    return Ok(prepared(file, &plan, geometry)?.0);
                }
            }
            wait(&file, begun)?;
        }
    }

    /// Writes a file's segment to disk and marks it clean, so that its contents can be reused even after a reboot.
    ///
    /// Call this when no other process uses the segment any more. Does nothing for a memory segment.
    ///
    /// # Errors
    /// Fails if writing to the disk fails. The contents are then dropped after the next reboot.
    pub fn close(self) -> Result<(), SegmentError> {
        let Some(header) = self.inner.header().filter(|_| self.inner.file.is_some()) else { return Ok(()) };
        self.inner.bury_the_dead();
        let me = self.inner.member().map(|me| me.number);
        let alone = self.inner.file.as_ref().is_some_and(|file| lock_users(file, libc::F_WRLCK));
        if !alone || self.inner.members().any(|member| Some(member.number) != me) {
            let source = io::Error::new(io::ErrorKind::ResourceBusy, "another process still uses it");
            return Err(system("mark the cache file as clean", source));
        }
        if let Some(why) = self.damage() {
            let source = io::Error::new(io::ErrorKind::InvalidData, why);
            return Err(system("mark the cache file as clean", source));
        }
        let flush = || self.inner.map.flush().map_err(|error| system("write the cache file to its disk", error));
        header.clean_ms.store(self.inner.now_ms(), Ordering::Relaxed);
        header.clean_real_ms.store(real_ms(), Ordering::Relaxed);
        flush()?;
        header.clean.store(CLEAN, Ordering::Release);
        flush()
    }
}

impl SharedMemory {
    fn boot_and_file(&self) -> Result<[u64; 2], SegmentError> {
        self.file.as_ref().map_or(Ok([0, 0]), |file| boot_and_file(file))
    }

    /// Removes the clean mark on disk.
    fn mark_in_use(&self) -> Result<(), SegmentError> {
        let header = self.header().ok_or(segment::BAD_GEOMETRY)?;
        header.clean.store(0, Ordering::Relaxed);
        header.time_base.store(self.time_base, Ordering::Relaxed);
        for (word, part) in header.boot_id.iter().zip(self.boot_and_file()?) {
            word.store(part, Ordering::Release);
        }
        self.map.flush_start().map_err(|error| system("write the cache file to its disk", error))
    }
}

/// Whether the last user of the file has closed it.
pub(crate) fn is_clean(header: &SegmentHead) -> bool {
    header.clean.load(Ordering::Acquire) == CLEAN
}

fn open(path: &Path) -> Result<File, SegmentError> {
    // The flags prevent blocking, and prevent the side effects of opening a device.
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let opened = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = opened.map_err(|error| system("open the cache file", error))?;
    let is_other = file.metadata().is_ok_and(|found| !found.is_file());
    let other = || system("use the cache file", io::Error::other("it is not a regular file"));
    if is_other { Err(other()) } else { Ok(file) }
}

/// Prepares the segment of a file that only this process uses. Other processes may join when it returns.
fn prepared(file: Arc<File>, plan: &Plan, geometry: Geometry) -> Result<(Segment, Found), SegmentError> {
    let (segment, found) = match warm(&file, plan)? {
        Ok(segment) => (segment, Found::Warm),
        Err(found) => {
            reserve(&file, geometry.total)?;
            let fd = owned(&file)?;
            let map = Map::new(fd.as_fd(), geometry.total).map_err(|error| system("map the cache file", error))?;
            let segment = Segment::make(plan, geometry, map, fd, Some(Arc::clone(&file)))?;
            segment.inner.mark_in_use()?;
            (segment, found)
        }
    };
    // Atomically converts the exclusive lock to a shared lock. This cannot fail.
    lock_users(&file, libc::F_RDLCK);
    Ok((segment, found))
}

/// Returns the segment in a file that is in use, or whose users have died since the machine was booted. Returns `None` if neither is
/// certain.
fn in_use(file: &Arc<File>) -> Result<Option<Segment>, SegmentError> {
    let Some((map, geometry, seed)) = found_in(file)? else { return Ok(None) };
    let Some(header) = map.at::<SegmentHead>(0) else { return Ok(None) };
    let now = boot_and_file(file)?;
    let same_boot = header.boot_id.iter().zip(now).all(|(word, part)| word.load(Ordering::Acquire) == part);
    if is_clean(header) || !same_boot || boot_id() == [0, 0] {
        return Ok(None);
    }
    let time_base = header.time_base.load(Ordering::Relaxed);
    let (membership, fd) = (Membership::new(), owned(file)?);
    let inner = SharedMemory { map, geometry, seed, time_base, membership, fd, file: Some(Arc::clone(file)) };
    Ok(Some(Segment { inner: Arc::new(inner) }))
}

/// Returns the plan for which a file was created, if the file is intact.
fn plan_in(file: &File) -> Result<Option<(Plan, Geometry)>, SegmentError> {
    let Some((map, geometry, _)) = found_in(file)? else { return Ok(None) };
    Ok(map.at::<SegmentHead>(0).map(|header| (plan_of(header), geometry)))
}

fn found_in(file: &File) -> Result<Option<(Map, Geometry, u64)>, SegmentError> {
    let len = file.metadata().map_err(|error| system("look at the cache file", error))?.len();
    if len < size_of::<SegmentHead>() as u64 {
        return Ok(None);
    }
    let map = Map::new(file.as_fd(), len).map_err(|error| system("map the cache file", error))?;
    let Some(header) = map.at::<SegmentHead>(0) else { return Ok(None) };
    let checked = segment::checked_header(header, len);
    Ok(checked.ok().map(|(geometry, seed)| (map, geometry, seed)))
}

/// Locks the users' byte shared (`F_RDLCK`) or exclusively (`F_WRLCK`), or releases it (`F_UNLCK`). Returns false if that would block.
/// Processes that inherit the descriptor share the lock, until the last of them closes it.
pub(crate) fn lock_users(file: &impl AsFd, kind: i32) -> bool {
    let flock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: 0, // SEEK_SET
        l_start: USERS,
        l_len: 1,
        l_pid: 0,
    };
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&flock)) {
            Ok(_) => return true,
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

/// Releases the file for a moment, so that other processes can lock it.
///
/// # Errors
/// Fails if the timeout has passed since `begun`.
fn wait(file: &File, begun: Instant) -> Result<(), SegmentError> {
    lock_users(file, libc::F_UNLCK);
    if begun.elapsed() >= OPEN_TIMEOUT {
        return Err(busy());
    }
    std::thread::sleep(RETRY_INTERVAL);
    Ok(())
}

fn busy() -> SegmentError {
    let source = io::Error::new(io::ErrorKind::ResourceBusy, "another program is using it");
    system("lock the cache file", source)
}

/// Returns the segment in a file, or the reason why its contents are dropped.
fn warm(file: &Arc<File>, plan: &Plan) -> Result<Result<Segment, Found>, SegmentError> {
    let dropped = |why| Ok(Err(Found::Dropped { why }));
    let len = file.metadata().map_err(|error| system("look at the cache file", error))?.len();
    if len == 0 {
        return Ok(Err(Found::Nothing));
    }
    refuse_others(file)?;
    if len < size_of::<SegmentHead>() as u64 {
        return dropped("it is too short");
    }
    // Maps only the header, so that no memory is reserved for a file whose contents are dropped.
    let map =
        Map::new(file.as_fd(), size_of::<SegmentHead>() as u64).map_err(|error| system("map the cache file", error))?;
    let Some(header) = map.at::<SegmentHead>(0) else { return dropped("it is too short") };
    let (geometry, seed) = match segment::checked_header(header, len) {
        Ok(found) => found,
        Err(SegmentError::Unusable { why }) => return dropped(why),
        Err(error) => return Err(error),
    };
    if let Some(why) = segment::misfit(&plan_of(header), plan) {
        return dropped(why);
    }
    // A copied file may have holes, and writing to them would raise a signal when the disk is full.
    allocate(file, len)?;
    let fd = owned(file)?;
    let map = Map::new(fd.as_fd(), len).map_err(|error| system("map the cache file", error))?;
    let Some(header) = map.at::<SegmentHead>(0) else { return dropped("it is too short") };
    let clean = is_clean(header);
    let now = boot_and_file(file)?;
    let same_boot = header.boot_id.iter().zip(now).all(|(word, part)| word.load(Ordering::Relaxed) == part);
    if !clean && (!same_boot || boot_id() == [0, 0]) {
        return dropped("the machine went down while it was in use");
    }
    let time_base = if clean { clock_after(header) } else { header.time_base.load(Ordering::Relaxed) };
    let membership = Membership::new();
    let inner = SharedMemory { map, geometry, seed, time_base, membership, fd, file: Some(Arc::clone(file)) };
    inner.mark_in_use()?;
    inner.forget_the_dead();
    let segment = Segment { inner: Arc::new(inner) };
    segment.scoreboard().reset();
    segment.quarantine().set([]);
    if !clean && (segment.cache().audit().is_err() || segment.events().audit().is_err()) {
        return dropped("it was not closed, and contradicts itself");
    }
    Ok(Ok(segment))
}

/// Rejects a file that contains something other than a segment.
fn refuse_others(file: &File) -> Result<(), SegmentError> {
    let mut start = [0; 8];
    file.read_exact_at(&mut start, 0).or_else(not_the_end).map_err(|error| system("read the cache file", error))?;
    if start != [0; 8] && u64::from_le_bytes(start) != MAGIC {
        let source = io::Error::new(io::ErrorKind::InvalidData, "it holds something else, which would be lost");
        return Err(system("use the cache file", source));
    }
    Ok(())
}

/// Returns the clock's base after a pause. The clock advances by the time that has passed, but never goes backwards.
fn clock_after(header: &SegmentHead) -> u64 {
    let value = |word: &AtomicU64| word.load(Ordering::Relaxed);
    let passed = real_ms().saturating_sub(value(&header.clean_real_ms));
    value(&header.clean_ms).saturating_add(passed).wrapping_sub(monotonic_ms())
}

/// Takes the file's lock, which is shared by all processes that inherit the descriptor and is released when the last of them closes it. (It
/// is not unlocked explicitly, because a child that exits would then unlock it for all other processes.)
fn locked(file: File) -> Result<Arc<File>, SegmentError> {
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Arc::new(file)),
            Err(TryLockError::WouldBlock) if begun.elapsed() >= OPEN_TIMEOUT => {
                return Err(busy());
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(RETRY_INTERVAL),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(TryLockError::Error(error)) => return Err(system("lock the cache file", error)),
        }
    }
}

/// Treats an unexpected end of the file as success, so that bytes missing at the end of a short file are read as zeroes.
fn not_the_end(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::UnexpectedEof { Ok(()) } else { Err(error) }
}

/// Empties the file, then sets its length and reserves all of it.
fn reserve(file: &File, len: u64) -> Result<(), SegmentError> {
    let empty = || file.set_len(0).map_err(|error| system("empty the cache file", error));
    empty()?;
    allocate(file, len).inspect_err(|_| {
        let _ = empty(); // a partial file is useless, and the disk is full
    })
}

/// Returns the number of free bytes in a file system that are available to this process.
fn free_in(found: &Statvfs) -> u64 {
    let blocks = if nix::unistd::geteuid().is_root() { found.blocks_free() } else { found.blocks_available() };
    blocks.saturating_mul(found.fragment_size())
}

/// Reserves the whole file, so that a full disk is detected now rather than by a signal later.
fn allocate(file: &File, len: u64) -> Result<(), SegmentError> {
    let free = fstatvfs(file).ok().map(|found| free_in(&found));
    let no_room = |source: io::Error| SegmentError::NoSpace { bytes: len, free, source };
    let size = i64::try_from(len).map_err(|_| no_room(Errno::EFBIG.into()))?;
    // A file in tmpfs is memory, and its current blocks already count as used.
    let has = file.metadata().map_or(0, |metadata| metadata.blocks().saturating_mul(512));
    if fstatfs(file).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC) {
        segment::check_memory(len.saturating_sub(has))?;
    }
    segment::check_file_size(len)?;
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, size) {
            Ok(()) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(no_room(errno.into())),
        }
    }
}

fn owned(file: &File) -> Result<OwnedFd, SegmentError> {
    file.as_fd().try_clone_to_owned().map_err(|error| system("duplicate a descriptor", error))
}

/// Returns an identifier of the machine's current boot and of the file. The file is included because a copy of a file that was in use must
/// not be mistaken for that file.
fn boot_and_file(file: &File) -> Result<[u64; 2], SegmentError> {
    let metadata = file.metadata().map_err(|error| system("look at the cache file", error))?;
    let [one, other] = boot_id();
    Ok([one ^ metadata.dev(), other ^ metadata.ino()])
}

/// Returns the boot id of the machine, or zeroes if the kernel does not provide it.
fn boot_id() -> [u64; 2] {
    let mut text = String::new();
    let file = File::open("/proc/sys/kernel/random/boot_id");
    if file.and_then(|file| file.take(64).read_to_string(&mut text)).is_err() {
        return [0, 0];
    }
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let half = |from: usize| digits.get(from..from + 16).and_then(|half| u64::from_str_radix(half, 16).ok());
    [half(0).unwrap_or(0), half(16).unwrap_or(0)]
}

fn real_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(super) mod tests;
