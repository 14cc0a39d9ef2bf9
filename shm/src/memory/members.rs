//! Registers members, which are the processes that use the cache or publish events, and cleans up after dead members.
//!
//! A process becomes a member when it first uses the cache or publishes an event. It locks the byte of the segment's file whose offset is
//! its member number, through its own open file description (`F_OFD_SETLK`). The kernel closes a process's descriptors only after it has
//! torn down the address space, so it releases the byte only when the process can no longer write to the memory. Therefore *a byte that can
//! be locked has no living owner*. A zombie's byte is free too, and the reuse of a pid does no harm.
//!
//! Everything that a member holds in shared memory identifies the member: its locks and leases contain its number, and its pins lie in its
//! own cell. A process that needs something held by a dead member [cleans up](SharedMemory::release_if_dead) after that member. It locks
//! the byte, releases everything that the member held, and unlocks the byte. The byte's lock also prevents two processes from cleaning up
//! after the same member. The byte's lock protects a new member too, because a process that claims a cell first cleans up after the cell's
//! last owner.
//!
//! Must not run while a shard's lock is held, because this code makes system calls.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;

use super::SharedMemory;
use super::fork::{self, Private};
use super::futex;
use super::layout::{LeaseCell, MEMBER_HEAD, MemberHead, ShardHead, TALLY_BYTES, Tally};
use crate::crash;
use crate::crash::Recovery;
use crate::protocols::{lease, lock, pin};

/// The membership of this process in one segment, in private memory.
#[derive(Debug)]
pub(crate) struct Membership {
    /// The fork generation (see `fork.rs`) in the high half; the member number, [`CLAIMING`] or [`NEVER`] in the low half. 0 before the
    /// first claim.
    claim: AtomicU64,
    /// The number of the descriptor through which the member's byte is locked.
    private: AtomicU32,
    /// The fork generation in which a thread is cleaning up after a member, or 0.
    releasing: AtomicU32,
}

/// Value that means that another thread of this process is claiming a cell.
const CLAIMING: u32 = u32::MAX;
/// Value that means that the process cannot become a member, because no cell is free or `/proc` is missing.
const NEVER: u32 = u32::MAX - 1;
/// Maximum number of polls while another thread is claiming a cell.
const LOOKS: u32 = 10_000;

/// A member: its number and the location of its cell.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member<'a> {
    pub(crate) number: u32,
    pub(crate) head: &'a MemberHead,
    pub(crate) tallies: &'a [Tally],
}

impl Membership {
    pub(crate) fn new() -> Membership {
        fork::watch();
        Membership { claim: AtomicU64::new(0), private: AtomicU32::new(u32::MAX), releasing: AtomicU32::new(0) }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let (generation, number) = halves(self.claim.load(Ordering::Acquire));
        // In a child of the member, the fork handler has already closed the descriptor.
        if generation == fork::generation() && number < NEVER {
            Private(self.private.load(Ordering::Relaxed)).close();
        }
    }
}

impl SharedMemory {
    /// Returns this process as a member, and registers it if necessary. Returns `None` if that is not possible.
    pub(crate) fn member(&self) -> Option<Member<'_>> {
        let (generation, number) = halves(self.membership.claim.load(Ordering::Acquire));
        if generation == fork::generation() && number < NEVER {
            return self.member_at(number);
        }
        if generation == fork::generation() && number == NEVER {
            return None;
        }
        self.claim()
    }

    /// Returns the counters of this process for a shard.
    #[inline]
    pub(crate) fn tally(&self, shard: u64) -> Option<&Tally> {
        let claim = self.membership.claim.load(Ordering::Acquire);
        if claim >> 32 != u64::from(fork::generation()) || claim & 0xffff_ffff >= u64::from(NEVER) {
            return self.member()?.tallies.get(usize::try_from(shard).ok()?);
        }
        let member_at = self.geometry.members_at + (claim & 0xffff_ffff) * self.geometry.member_bytes;
        self.map.at(member_at + MEMBER_HEAD + shard * TALLY_BYTES)
    }

    /// Returns this process as a member. Retries the registration if an earlier attempt failed.
    pub(crate) fn member_at_last(&self) -> Option<Member<'_>> {
        self.member().or_else(|| self.claim())
    }

    /// Returns all cells whose owner is alive, or is dead and has not been cleaned up after.
    pub(crate) fn members(&self) -> impl Iterator<Item = Member<'_>> {
        self.member_cells().filter(|member| member.head.pid.load(Ordering::Acquire) != 0)
    }

    /// Returns the cells of all members, whether in use or not.
    pub(crate) fn member_cells(&self) -> impl Iterator<Item = Member<'_>> {
        (0..self.geometry.members).filter_map(|number| self.member_at(number))
    }

    /// Releases everything that a member holds, if the member is dead. Returns whether it is dead.
    pub(crate) fn release_if_dead(&self, number: u32) -> bool {
        if number >= self.geometry.members {
            self.free_all_of(number);
            return true;
        }
        let Some(me) = self.member() else { return false };
        if me.number == number {
            return false;
        }
        let generation = fork::generation();
        let releasing = &self.membership.releasing;
        let seen = releasing.load(Ordering::Acquire);
        // The byte's lock belongs to the whole process, so its threads must exclude each other here.
        if seen == generation
            || releasing.compare_exchange(seen, generation, Ordering::Acquire, Ordering::Relaxed).is_err()
        {
            return false;
        }
        let private = Private(self.membership.private.load(Ordering::Relaxed));
        let dead = lock_byte(private, number, libc::F_WRLCK);
        if dead {
            self.free_all_of(number);
            crash::point("bury: all freed");
            lock_byte(private, number, libc::F_UNLCK);
        }
        releasing.store(0, Ordering::Release);
        dead
    }

    /// Checks all members once, and cleans up after the dead ones.
    pub(crate) fn bury_the_dead(&self) {
        for member in self.members() {
            self.release_if_dead(member.number);
        }
    }

    fn member_at(&self, number: u32) -> Option<Member<'_>> {
        let at = self.geometry.members_at + u64::from(number) * self.geometry.member_bytes;
        let tallies = self.map.slice(at + MEMBER_HEAD, self.geometry.shards)?;
        Some(Member { number, head: self.map.at(at)?, tallies })
    }

    fn claim(&self) -> Option<Member<'_>> {
        let claim = &self.membership.claim;
        let generation = fork::generation();
        let claiming = word(generation, CLAIMING);
        let seen = claim.load(Ordering::Acquire);
        let ours = halves(seen).0 == generation && halves(seen).1 != NEVER;
        if ours || claim.compare_exchange(seen, claiming, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return self.await_claim();
        }
        let private = Private::open(|| self.open_again().ok());
        let claimed = private.and_then(|private| self.claim_cell(private));
        if let (Some(private), None) = (private, claimed) {
            private.close();
        }
        claim.store(word(generation, claimed.unwrap_or(NEVER)), Ordering::Release);
        self.member_at(claimed?)
    }

    /// Waits while another thread is claiming a cell.
    fn await_claim(&self) -> Option<Member<'_>> {
        for _ in 0..LOOKS {
            let (_, number) = halves(self.membership.claim.load(Ordering::Acquire));
            if number != CLAIMING {
                return if number == NEVER { None } else { self.member_at(number) };
            }
            std::thread::yield_now();
        }
        None
    }

    fn claim_cell(&self, private: Private) -> Option<u32> {
        let pid = std::process::id();
        let count = self.geometry.members;
        // Each process begins with a different byte, so that processes that start at the same time do not compete for the same bytes.
        let mut numbers = (0..count).map(|step| (pid % count + step) % count);
        let number = numbers.find(|&number| lock_byte(private, number, libc::F_WRLCK))?;
        self.free_all_of(number);
        crash::point("claim: predecessor buried");
        let head = self.member_at(number)?.head;
        head.epoch.fetch_add(1, Ordering::Relaxed);
        head.pid.store(pid, Ordering::Release);
        crash::point("claim: done");
        self.membership.private.store(private.0, Ordering::Relaxed);
        Some(number)
    }

    /// Releases everything held in a file that has just been opened. Such a file has no members, so all holders are dead.
    pub(crate) fn forget_the_dead(&self) {
        for member in self.member_cells() {
            member.head.pins.iter().for_each(pin::free);
            member.head.pid.store(0, Ordering::Relaxed);
        }
        self.lease_cells().iter().for_each(|cell| cell.word.store(0, Ordering::Relaxed));
        for index in 0..self.geometry.shards {
            if let Some(head) = self.map.at::<ShardHead>(self.geometry.shard_at(index)) {
                lock::bequeath(&head.lock);
                head.suspect.store(0, Ordering::Relaxed);
            }
        }
        if let Some(head) = self.events_head() {
            lock::bequeath(&head.lock);
            head.suspect.store(0, Ordering::Relaxed);
        }
        if let Some(header) = self.header() {
            header.prefix_lock.store(0, Ordering::Relaxed);
            header.sweep_due.store(0, Ordering::Relaxed);
        }
    }

    /// Reopens the file, because an inherited file description would share its locks with the parent.
    pub(crate) fn open_again(&self) -> nix::Result<OwnedFd> {
        let path = if cfg!(miri) { "/dev/null".to_owned() } else { format!("/proc/self/fd/{}", self.fd.as_raw_fd()) };
        open(path.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
    }

    /// Releases everything held by a dead member, whose byte this process has locked.
    fn free_all_of(&self, number: u32) {
        for index in 0..self.geometry.shards {
            let head = self.map.at::<ShardHead>(self.geometry.shard_at(index));
            self.free_lock_of(head.map(|head| &head.lock), number);
        }
        self.free_lock_of(self.header().map(|header| &header.prefix_lock), number);
        self.free_lock_of(self.events_head().map(|head| &head.lock), number);
        if !crash::skips(Recovery::PassLeases) {
            for cell in self.lease_cells() {
                if lease::take_from(&cell.word, number) {
                    cell.announce();
                }
            }
        }
        if let Some(member) = self.member_at(number)
            && number < self.geometry.members
        {
            if !crash::skips(Recovery::Unpin) {
                member.head.pins.iter().for_each(pin::free);
            }
            member.head.pid.store(0, Ordering::Release);
        }
    }

    fn free_lock_of(&self, lock: Option<&AtomicU32>, number: u32) {
        if let Some(lock) = lock
            && !crash::skips(Recovery::FreeLocks)
            && lock::mark_dead(lock, number)
        {
            futex::wake(lock, 1);
        }
    }
}

impl SharedMemory {
    pub(crate) fn lease_cells(&self) -> &[LeaseCell] {
        self.map.slice(self.geometry.leases_at, self.geometry.leases).unwrap_or_default()
    }
}

impl LeaseCell {
    /// Increments the lease counter `turn`, and wakes the waiting threads.
    pub(crate) fn announce(&self) {
        if lease::end_turn(&self.turn, &self.waiters) {
            futex::wake(&self.turn, i32::MAX);
        }
    }
}

/// Always succeeds, because Miri does not support file locks, and under Miri there is only one process.
#[cfg(miri)]
fn lock_byte(private: Private, _: u32, _: i32) -> bool {
    private.get().is_some()
}

/// Locks or unlocks one byte. Returns whether this succeeded.
#[cfg(not(miri))]
fn lock_byte(private: Private, number: u32, kind: i32) -> bool {
    let Some(fd) = private.get() else { return false };
    let flock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: 0, // SEEK_SET
        l_start: number.into(),
        l_len: 1,
        l_pid: 0,
    };
    loop {
        match fcntl(fd, FcntlArg::F_OFD_SETLK(&flock)) {
            Ok(_) => return true,
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

fn halves(claim: u64) -> (u32, u32) {
    let low = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or_default();
    (low(claim >> 32), low(claim))
}

fn word(generation: u32, number: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(number)
}
