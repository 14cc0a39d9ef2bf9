//! The segment as a whole: created once, and attached by processes that inherit or receive the descriptor.
//!
//! `create` exposes no partly initialized state, because it returns the descriptor only after the memory is reserved, the locks work and
//! the header is written. `attach` trusts nothing that it has not checked.

pub(crate) mod adopt;
pub(crate) mod file;

use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, FdFlag, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{FileStat, SFlag};
use xxhash_rust::xxh3::xxh3_64;

use crate::Plan;
use crate::cache::Cache;
use crate::events::Events;
use crate::memory::SharedMemory;
use crate::memory::error::SegmentError;
use crate::memory::geometry::Geometry;
use crate::memory::layout::{FINGERPRINT, GRAIN, MAGIC, SegmentHead, ShardHead, VERSION};
use crate::memory::map::Map;
use crate::memory::members::Membership;
use crate::memory::memory_limit::{self, Left};
use crate::scoreboard::Scoreboard;
use crate::scoreboard::quarantine::Quarantine;

/// A mapped segment: a cheap handle that can be cloned, shared between threads, and inherited by forked children.
///
/// The memory is unmapped when the last handle in the process is dropped. It is freed when the last process has released both the mapping
/// and the descriptor.
#[derive(Clone, Debug)]
pub struct Segment {
    pub(crate) inner: Arc<SharedMemory>,
}

impl Segment {
    /// Creates a segment in a sealed memory file, with its memory reserved and mapped.
    ///
    /// # Errors
    /// Fails if the plan is out of range, or if the memory or a descriptor is not available.
    pub fn create(plan: &Plan) -> Result<Segment, SegmentError> {
        let geometry = Geometry::of(plan)?;
        let fd = memory_file(geometry.total)?;
        let map = Map::new(fd.as_fd(), geometry.total).map_err(|error| system("map the shared segment", error))?;
        Segment::make(plan, geometry, map, fd, None)
    }

    /// Returns the size in bytes of the segment that a plan would create. Creates nothing.
    ///
    /// # Errors
    /// Fails if the plan is out of range.
    pub fn size(plan: &Plan) -> Result<u64, SegmentError> {
        Ok(Geometry::of(plan)?.total)
    }

    /// Initializes memory that contains only zeroes and is not shared with other processes yet.
    pub(crate) fn make(
        plan: &Plan,
        geometry: Geometry,
        map: Map,
        fd: OwnedFd,
        file: Option<Arc<File>>,
    ) -> Result<Segment, SegmentError> {
        map.warm();
        let seed = RandomState::new().build_hasher().finish(); // seeded with the system's random numbers
        let inner = SharedMemory { map, geometry, seed, time_base: 0, membership: Membership::new(), fd, file };
        inner.init_shards().ok_or(BAD_GEOMETRY)?;
        inner.init_events().ok_or(BAD_GEOMETRY)?;
        inner.write_header(plan).ok_or(BAD_GEOMETRY)?;
        Ok(Segment { inner: Arc::new(inner) })
    }

    /// Attaches to a segment that another process created.
    ///
    /// # Errors
    /// Fails if the descriptor is not a sealed memory file, or if its header, version or size differs from what this build would have
    /// created. Also fails for a file that was [closed](Segment::close), until the file is reopened.
    pub fn attach(fd: OwnedFd) -> Result<Segment, SegmentError> {
        close_on_exec(&fd)?;
        let stat = nix::sys::stat::fstat(&fd).map_err(|errno| system("stat the shared segment", errno))?;
        let is_sealed = match fcntl(&fd, FcntlArg::F_GET_SEALS) {
            Ok(seals) if SealFlag::from_bits_truncate(seals).contains(seals_of_a_segment()) => true,
            // A file on a disk does not support seals. Only the file's owner may change it, and no process recreates the file while another
            // process is using it.
            Err(Errno::EINVAL) if is_private_file(&stat) => {
                if !file::lock_users(&fd, libc::F_RDLCK) {
                    return Err(unusable("another program has the file for itself"));
                }
                false
            }
            Ok(_) => return Err(unusable("its size is not sealed")),
            Err(_) => return Err(unusable("it is not a sealed memory file")),
        };
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        if len < size_of::<SegmentHead>() as u64 {
            return Err(unusable("it is too short"));
        }
        let map = Map::new(fd.as_fd(), len).map_err(|error| system("map the shared segment", error))?;
        let header = map.at::<SegmentHead>(0).ok_or(unusable("it is too short"))?;
        let (geometry, seed) = checked_header(header, len)?;
        if !is_sealed && file::is_clean(header) {
            // Even a lookup writes. It would modify a clean file, which would then be used without checks after a power failure.
            file::lock_users(&fd, libc::F_UNLCK);
            return Err(unusable("its server has stopped, and closed the file"));
        }
        let time_base = header.time_base.load(Ordering::Relaxed);
        let membership = Membership::new();
        Ok(Segment { inner: Arc::new(SharedMemory { map, geometry, seed, time_base, membership, fd, file: None }) })
    }

    /// Returns the descriptor, which can be inherited by children or sent to another process. It is close-on-exec; a process that passes it
    /// through exec must clear that flag explicitly.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }

    /// Returns a descriptor for a process that may outlive all processes that share this process's lock on the segment's file. The
    /// descriptor does not keep the file locked. Like [`fd`](Segment::fd), it can be [attached](Segment::attach) and is close-on-exec.
    ///
    /// # Errors
    /// Fails if the file cannot be reopened, for example because there is no `/proc`.
    pub fn fd_without_lock(&self) -> io::Result<OwnedFd> {
        match self.inner.file {
            Some(_) => Ok(self.inner.open_again()?),
            None => self.fd().try_clone_to_owned(),
        }
    }

    /// Returns the size of the segment in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a segment has a header at least, so it is never empty")]
    pub fn len(&self) -> u64 {
        self.inner.geometry.total
    }

    /// Returns what is wrong with the segment, if anything. The segment is damaged if its header differs from the header that this process
    /// found when it created the segment or attached to it, or if its file was truncated. Takes no lock. For a file, makes one system call.
    pub fn damage(&self) -> Option<&'static str> {
        let Some(header) = self.inner.header() else { return Some("it has no header") };
        let found = checked_header(header, self.inner.geometry.total);
        if self.inner.is_truncated() {
            return Some("its file was truncated");
        }
        match found {
            Ok((geometry, seed)) if geometry == self.inner.geometry && seed == self.inner.seed => None,
            Ok(_) => Some("its header is that of another segment"),
            Err(SegmentError::Unusable { why }) => Some(why),
            Err(_) => Some("its header makes no sense"),
        }
    }

    /// Returns the number of times that a shard of the cache, or the event log, was found inconsistent and was emptied.
    pub fn restarts(&self) -> u64 {
        let inner = &self.inner;
        let shards =
            (0..inner.geometry.shards).filter_map(|number| inner.map.at::<ShardHead>(inner.geometry.shard_at(number)));
        let shards = shards.map(|head| head.restarts.load(Ordering::Relaxed));
        let events = inner.events_head().map(|head| head.counters.restarts.load(Ordering::Relaxed));
        shards.chain(events).fold(0, u64::wrapping_add)
    }

    /// Returns a handle to the page cache. If the plan has no cache, every lookup misses and every page is refused.
    pub fn cache(&self) -> Cache {
        Cache::new(Arc::clone(&self.inner))
    }

    /// Registers this process as a member now, rather than when it first uses the cache.
    ///
    /// Call this in a process that will not be able to reopen the segment later, because it will change its user or will no longer be able
    /// to access `/proc`. Returns false if the process cannot become a member, or if there is neither a cache nor an event log.
    pub fn enter(&self) -> bool {
        self.inner.member_at_last().is_some()
    }

    /// Returns a handle to the scoreboard.
    pub fn scoreboard(&self) -> Scoreboard {
        Scoreboard::new(Arc::clone(&self.inner))
    }

    /// Returns a handle to the event log. If the plan has no event log, nothing can be published.
    pub fn events(&self) -> Events {
        Events::new(Arc::clone(&self.inner))
    }

    /// Returns a handle to the table of quarantined requests.
    pub fn quarantine(&self) -> Quarantine {
        Quarantine::new(Arc::clone(&self.inner))
    }
}

impl SharedMemory {
    /// Whether the file is shorter than the segment, or was shorter when a process accessed the lost part. If so, marks the memory as lost.
    fn is_truncated(&self) -> bool {
        let is_short = |stat: FileStat| u64::try_from(stat.st_size).is_ok_and(|size| size < self.geometry.total);
        self.map.is_lost_if(|| nix::sys::stat::fstat(&self.fd).is_ok_and(is_short))
    }

    /// Initializes the shards. Position 0 means "none" in a slot, so the logs start after position 0.
    fn init_shards(&self) -> Option<()> {
        for number in 0..self.geometry.shards {
            let head: &ShardHead = self.map.at(self.geometry.shard_at(number))?;
            for (ring, floor) in head.rings.iter().zip(&head.floors) {
                ring.head.store(GRAIN, Ordering::Relaxed);
                ring.clear_to.store(GRAIN, Ordering::Relaxed);
                floor.store(GRAIN, Ordering::Relaxed);
            }
        }
        Some(())
    }

    fn write_header(&self, plan: &Plan) -> Option<()> {
        let header = self.map.at::<SegmentHead>(0)?;
        header.version.store(VERSION, Ordering::Relaxed);
        header.rows.store(plan.rows, Ordering::Relaxed);
        header.fingerprint.store(FINGERPRINT, Ordering::Relaxed);
        header.cache_bytes.store(plan.cache_bytes, Ordering::Relaxed);
        header.total.store(self.geometry.total, Ordering::Relaxed);
        header.seed.store(self.seed, Ordering::Relaxed);
        header.max_entry.store(plan.max_entry, Ordering::Relaxed);
        header.events_bytes.store(plan.events_bytes, Ordering::Relaxed);
        header.checksum.store(checksum(header), Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        Some(())
    }
}

/// Returns the plan for which a header was written.
pub(crate) fn plan_of(header: &SegmentHead) -> Plan {
    Plan {
        cache_bytes: header.cache_bytes.load(Ordering::Relaxed),
        rows: header.rows.load(Ordering::Relaxed),
        max_entry: header.max_entry.load(Ordering::Relaxed),
        events_bytes: header.events_bytes.load(Ordering::Relaxed),
    }
}

/// Returns why a segment that was created for one plan cannot be used for another plan, or `None` if it can. The segment may have more rows
/// than requested.
pub(crate) fn misfit(found: &Plan, wanted: &Plan) -> Option<&'static str> {
    if found.cache_bytes != wanted.cache_bytes {
        Some("its page cache has another size")
    } else if found.events_bytes != wanted.events_bytes {
        Some("its event log has another size")
    } else if found.rows < wanted.rows {
        Some("its scoreboard has too few rows for so many processes")
    } else {
        let of_its_rows = Geometry::of(&Plan { rows: found.rows, ..*wanted });
        (of_its_rows.ok() != Geometry::of(found).ok()).then_some("its largest page has another size")
    }
}

/// Error for a part that lies outside the segment. This error is never returned, because `Geometry::of` places all parts inside the
/// segment, as the tests of that function show. It only satisfies the type checker.
pub(crate) const BAD_GEOMETRY: SegmentError = SegmentError::Unusable { why: "its parts do not fit into it" };

/// Returns the geometry and the seed from a header, if it is complete and consistent.
pub(crate) fn checked_header(header: &SegmentHead, len: u64) -> Result<(Geometry, u64), SegmentError> {
    if header.magic.load(Ordering::Acquire) != MAGIC {
        return Err(unusable("it does not start like a Forkyard segment"));
    }
    if header.version.load(Ordering::Relaxed) != VERSION || header.fingerprint.load(Ordering::Relaxed) != FINGERPRINT {
        return Err(unusable("it was made by a build with another memory layout"));
    }
    if header.checksum.load(Ordering::Relaxed) != checksum(header) {
        return Err(unusable("its header is damaged"));
    }
    let geometry = Geometry::of(&plan_of(header)).map_err(|_| unusable("its header makes no sense"))?;
    if geometry.total != len || header.total.load(Ordering::Relaxed) != len {
        return Err(unusable("its size is not what its header says"));
    }
    Ok((geometry, header.seed.load(Ordering::Relaxed)))
}

fn checksum(header: &SegmentHead) -> u64 {
    let word = |word: &AtomicU64| word.load(Ordering::Relaxed);
    let words = [
        MAGIC,
        u64::from(header.version.load(Ordering::Relaxed)),
        u64::from(header.rows.load(Ordering::Relaxed)),
        word(&header.fingerprint),
        word(&header.cache_bytes),
        word(&header.total),
        word(&header.seed),
        word(&header.max_entry),
        word(&header.events_bytes),
    ];
    xxh3_64(&words.map(u64::to_le_bytes).concat())
}

/// Returns an unused descriptor. Miri uses private memory instead of the file: see `map.rs`.
#[cfg(miri)]
pub(crate) fn memory_file(_: u64) -> Result<OwnedFd, SegmentError> {
    File::open("/dev/null").map(OwnedFd::from).map_err(|error| system("open /dev/null", error))
}

/// Creates a memory file of `len` bytes, with a fixed size and all of its memory reserved.
#[cfg(not(miri))]
pub(crate) fn memory_file(len: u64) -> Result<OwnedFd, SegmentError> {
    let out_of_memory = |source: io::Error| SegmentError::no_memory(len, source);
    check_memory(len)?;
    let size = i64::try_from(len).map_err(|_| out_of_memory(Errno::EFBIG.into()))?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create(c"forkyard", flags).map_err(|errno| system("create a memory file", errno))?;
    // `fallocate` also sets the size.
    loop {
        match fallocate(&fd, FallocateFlags::empty(), 0, size) {
            Ok(()) => break,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(out_of_memory(errno.into())),
        }
    }
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals_of_a_segment())).map_err(|errno| system("seal the memory file", errno))?;
    Ok(fd)
}

/// Rejects a size that exceeds the available memory, before the memory is requested from the kernel. The kernel detects a lack of memory
/// page by page, and may kill a process (in a control group, this process) before it returns an error.
pub(crate) fn check_memory(len: u64) -> Result<(), SegmentError> {
    check_file_size(len)?;
    if let Some(Left { limit, free }) = memory_limit::tightest().filter(|left| len > left.free) {
        return Err(SegmentError::OverLimit { bytes: len, limit, free });
    }
    if memory_limit::available_in_machine().is_some_and(|available| len > available) {
        return Err(SegmentError::no_memory(len, Errno::ENOMEM.into()));
    }
    Ok(())
}

/// Rejects a size above the limit for files. The kernel sends SIGXFSZ to a process that creates a file larger than its limit.
pub(crate) fn check_file_size(len: u64) -> Result<(), SegmentError> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if len > limit => Err(SegmentError::OverFileSize { bytes: len, limit }),
        Ok(_) | Err(_) => Ok(()),
    }
}

pub(crate) fn close_on_exec(fd: &OwnedFd) -> Result<(), SegmentError> {
    let tried = "set close-on-exec on the shared segment";
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map(drop).map_err(|errno| system(tried, errno))
}

fn is_private_file(stat: &FileStat) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits() && stat.st_mode & 0o022 == 0
}

pub(crate) fn seals_of_a_segment() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

pub(crate) fn system(tried: &'static str, source: impl Into<io::Error>) -> SegmentError {
    SegmentError::System { tried, source: source.into() }
}

pub(crate) fn unusable(why: &'static str) -> SegmentError {
    SegmentError::Unusable { why }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const PLAN: Plan = Plan { cache_bytes: 512 * 1024, rows: 3, max_entry: 0, events_bytes: 0 };

    /// Creates a sealed file with these bytes.
    fn file_of(bytes: &[u8], seals: SealFlag) -> OwnedFd {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create(c"test", flags).unwrap());
        file.write_all(bytes).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file.into()
    }

    fn bytes_of(segment: &Segment) -> Vec<u8> {
        let len = segment.len();
        let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap());
        segment.inner.map.read(0, len, &mut bytes).unwrap();
        bytes
    }

    fn why(result: Result<Segment, SegmentError>) -> &'static str {
        match result {
            Err(SegmentError::Unusable { why }) => why,
            other => panic!("not refused as unusable: {other:?}"),
        }
    }

    #[test]
    fn both_sides_see_the_same_memory() {
        let made = Segment::create(&PLAN).unwrap();
        let attached = Segment::attach(made.fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(made.len(), attached.len());
        made.cache().set("k", "v", &crate::StoreOptions::new()).unwrap();
        assert_eq!(attached.cache().get("k").unwrap(), b"v");
        let row = attached.scoreboard().claim(2, 77, 5).unwrap();
        row.set_state(crate::State::Ready);
        assert_eq!(made.scoreboard().read(2).unwrap().pid, 77);
    }

    #[test]
    fn the_file_is_sealed_reserved_and_closed_on_exec() {
        let segment = Segment::create(&PLAN).unwrap();
        assert_eq!(nix::unistd::ftruncate(segment.fd(), 0), Err(Errno::EPERM));
        let grown = i64::try_from(segment.len() + 4096).unwrap();
        assert_eq!(nix::unistd::ftruncate(segment.fd(), grown), Err(Errno::EPERM));
        let stat = nix::sys::stat::fstat(segment.fd()).unwrap();
        assert!(u64::try_from(stat.st_blocks).unwrap() * 512 >= segment.len());
        assert_eq!(fcntl(segment.fd(), FcntlArg::F_GETFD), Ok(libc::FD_CLOEXEC));

        let inherited = nix::unistd::dup(segment.fd()).unwrap();
        assert_eq!(fcntl(&inherited, FcntlArg::F_GETFD), Ok(0));
        let attached = Segment::attach(inherited).unwrap();
        assert_eq!(fcntl(attached.fd(), FcntlArg::F_GETFD), Ok(libc::FD_CLOEXEC));
    }

    #[test]
    fn more_than_the_machine_has_is_an_error() {
        let result = Segment::create(&Plan { cache_bytes: 1 << 45, rows: 1, ..Plan::default() });
        assert!(matches!(result, Err(SegmentError::NoMemory { .. })), "{result:?}");
    }

    #[test]
    fn the_plan_is_compared_with_the_memory_that_there_is_before_any_is_reserved() {
        let plan = Plan { cache_bytes: 1 << 45, rows: 1, ..Plan::default() };
        assert!(plan.check_memory().is_err() && PLAN.check_memory().is_ok());
    }

    #[test]
    fn attach_refuses_what_is_not_a_whole_segment() {
        let good = bytes_of(&Segment::create(&PLAN).unwrap());
        let all = seals_of_a_segment();
        assert!(Segment::attach(file_of(&good, all)).is_ok(), "the copy itself is fine");

        assert_eq!(why(Segment::attach(file_of(&good, SealFlag::F_SEAL_GROW))), "its size is not sealed");
        let no_memfd = File::open("/dev/null").unwrap().into();
        assert_eq!(why(Segment::attach(no_memfd)), "it is not a sealed memory file");
        for len in [0, 8, 383] {
            assert_eq!(why(Segment::attach(file_of(&good[..len], all))), "it is too short");
        }
        for len in [384, 4096, good.len() - 4096, good.len() - 1] {
            assert_eq!(why(Segment::attach(file_of(&good[..len], all))), "its size is not what its header says");
        }
        let longer = [&good[..], &[0; 4096]].concat();
        assert_eq!(why(Segment::attach(file_of(&longer, all))), "its size is not what its header says");
    }

    #[test]
    fn attach_refuses_any_flipped_bit_of_the_fixed_header() {
        let good = bytes_of(&Segment::create(&Plan { rows: 3, ..Plan::default() }).unwrap());
        for bit in 0..72 * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            why(Segment::attach(file_of(&bad, seals_of_a_segment())));
        }
    }

    #[test]
    fn attach_refuses_bounds_that_lie_even_with_a_good_checksum() {
        let made = Segment::create(&PLAN).unwrap();
        let header = made.inner.map.at::<SegmentHead>(0).unwrap();
        for cache_bytes in [0, 1, 256 * 1024, 1 << 30, u64::MAX] {
            header.cache_bytes.store(cache_bytes, Ordering::Relaxed);
            header.checksum.store(checksum(header), Ordering::Relaxed);
            why(Segment::attach(made.fd().try_clone_to_owned().unwrap()));
        }
    }

    #[test]
    fn a_header_that_is_written_over_is_damage_and_a_busy_segment_is_not() {
        let segment = Segment::create(&PLAN).unwrap();
        let attached = Segment::attach(segment.fd().try_clone_to_owned().unwrap()).unwrap();
        segment.cache().set("k", "v", &crate::StoreOptions::new().tags(["t"])).unwrap();
        segment.cache().purge_tag("t");
        segment.cache().purge_prefix("k");
        segment.scoreboard().claim(0, 1, 1).unwrap();
        assert_eq!((segment.damage(), attached.damage(), segment.restarts()), (None, None, 0));
        for byte in 0..72_u64 {
            let mut before = [0];
            segment.inner.map.read_into(byte, &mut before).unwrap();
            segment.inner.map.write(byte, &[before[0] ^ 1]).unwrap();
            assert!(segment.damage().is_some() && attached.damage().is_some(), "byte {byte}");
            segment.inner.map.write(byte, &before).unwrap();
            assert_eq!(segment.damage(), None);
        }
        let other = Segment::create(&PLAN).unwrap();
        let mut header = [0; 72];
        other.inner.map.read_into(0, &mut header).unwrap();
        segment.inner.map.write(0, &header).unwrap();
        assert_eq!(segment.damage(), Some("its header is that of another segment"));
        let shard: &ShardHead = segment.inner.map.at(segment.inner.geometry.shards_at).unwrap();
        shard.restarts.store(3, Ordering::Relaxed);
        assert_eq!(segment.restarts(), 3);
    }

    #[test]
    fn the_parts_fit() {
        let inner = Segment::create(&PLAN).unwrap().inner;
        let geometry = inner.geometry;
        assert_eq!(geometry.shard_at(geometry.shards), geometry.total);
        assert!(inner.map.at::<ShardHead>(geometry.shard_at(0)).is_some());
    }
}
