//! Makes room in the rings: selects the entries to evict, and determines when bytes may be overwritten.
//!
//! The policy is S3-FIFO (Yang et al., SOSP 2023), with objects weighted by their size in bytes. A ring is a log, and its oldest record
//! lies at its floor. To make room, the floor is raised record by record:
//!
//! ```text
//! small ring   requested since it was stored, or the main ring is not full -> moved to the main ring     otherwise -> evicted,
//!              and remembered as a ghost
//! main ring    requested since it was stored or moved -> moved to the head, with one visit fewer         otherwise -> evicted
//! ```
//! Records that no slot leads to, purged entries and expired entries are dropped on the way. While such dead bytes make up more than an
//! eighth of a ring, live entries at its floor are moved to its head instead of being evicted. The floor therefore reaches the dead records
//! sooner or later.
//!
//! This policy was chosen for three reasons. First, a hit writes only a visit counter, and only until the counter reaches its maximum.
//! Second, the order is determined by position alone, so there are no linked lists that a killed process could leave broken. Third, among
//! the policies with these two properties, it has the highest hit ratio (`docs/benchmarks.md`).
//!
//! Bytes are overwritten only when no reader can rely on them. First, the floor is raised above the bytes; readers detect this, because
//! they check the floor after they have copied an entry. *Then* the writer checks that no pin covers the bytes. A pinned entry stays in
//! place, and the head skips it.

use std::sync::atomic::{Ordering, fence};

use super::entry::Entry;
use super::freshness::{Freshness, FreshnessCheck};
use super::ghosts;
use super::index::{Place, Ring, Slot};
use super::shard::{Corrupt, LockedShard, add};
use crate::crash;
use crate::memory::layout::GRAIN;
use crate::protocols::pin;

/// Maximum number of entries that are moved instead of evicted to make room for one entry.
const MOVES: u32 = 64;
/// Maximum number of bytes that are moved to make room for one entry.
const MOVED_BYTES: u64 = 512 * 1024;
/// The floor is raised by at least this fraction (1/n) of a ring at a time, because each change of the floor evicts it from the CPU caches
/// of all readers.
const STRIDE: u64 = 128;
/// Fraction (1/n) of the main ring that is kept free, so that requested entries can be moved to its head. The reserve is at least
/// [`MIN_RESERVE`] bytes, or 1/[`MOST_RESERVE`] of the ring if that is less.
const RESERVE: u64 = 64;
const MIN_RESERVE: u64 = 256 * 1024;
const MOST_RESERVE: u64 = 16;
/// If dead bytes exceed this fraction (1/n) of a ring, live entries are moved rather than evicted.
const DEAD_SHARE: u64 = 8;
/// Number of visits that promote an entry from the small ring to the main ring.
const PROMOTION: u8 = 1;
/// Maximum number of pinned entries that one store skips.
const JUMPS: u32 = 256;

/// How many more moves and bytes one store may spend.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    moves: u32,
    bytes: u64,
}

/// A pinned entry, described by the positions at which the head will reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Obstacle {
    start: u64,
    end: u64,
    member: u32,
}

impl Budget {
    pub(crate) fn new(bytes: u64) -> Budget {
        Budget { moves: MOVES, bytes: bytes.max(MOVED_BYTES) }
    }

    fn take(&mut self, bytes: u64) -> bool {
        let enough = self.moves > 0 && self.bytes >= bytes;
        if enough {
            self.moves -= 1;
            self.bytes -= bytes;
        }
        enough
    }
}

impl LockedShard<'_> {
    /// Returns a position at a ring's head for a record of `size` bytes. The bytes at the position are free, contiguous and not pinned.
    /// Returns `None` if pins leave no such position.
    pub(crate) fn place(&mut self, ring: Ring, size: u64, check: &FreshnessCheck<'_>) -> Result<Option<u64>, Corrupt> {
        let bytes = self.shard.bytes(ring);
        for _ in 0..JUMPS {
            let (_, head) = self.bounds(ring)?;
            self.make_room(ring, bytes.pad_before(head, size) + size, check)?;
            let (floor, head) = self.bounds(ring)?;
            let pad = bytes.pad_before(head, size);
            if head + pad + size > floor + bytes.len {
                continue;
            }
            match self.obstacle(ring, head + pad + size)? {
                None => {
                    self.pad(ring, head, pad)?;
                    return Ok(Some(head + pad));
                }
                Some(obstacle) => self.jump_over(ring, obstacle, check)?,
            }
        }
        Ok(None)
    }

    /// Moves the head past a pinned entry.
    fn jump_over(&mut self, ring: Ring, obstacle: Obstacle, check: &FreshnessCheck<'_>) -> Result<(), Corrupt> {
        self.suspect(obstacle.member);
        let bytes = self.shard.bytes(ring);
        let (_, head) = self.bounds(ring)?;
        // The obstacle may extend beyond the end of the ring, but a record cannot.
        let to_end = bytes.len - head % bytes.len;
        let skip = (obstacle.end.saturating_sub(head)).min(to_end);
        self.make_room(ring, skip, check)?;
        let (floor, moved) = self.bounds(ring)?;
        // The size of the obstacle is rounded up, so the skip may end inside the next entry. If the next entry was pinned before the floor
        // was raised above it, the next attempt skips all of it.
        let is_clear = || self.end_of_pins(ring, head, head + skip) <= head + skip || skip == to_end;
        if moved == head && head + skip <= floor + bytes.len && is_clear() {
            self.pad(ring, head, skip)?;
        }
        Ok(())
    }

    fn pad(&mut self, ring: Ring, head: u64, size: u64) -> Result<(), Corrupt> {
        if size > 0 {
            self.shard.bytes(ring).write_pad(head, size).ok_or(Corrupt)?;
            crash::point("pad: written");
            self.raise_head(ring, head + size);
            crash::point("pad: head raised");
        }
        Ok(())
    }

    /// Raises a ring's floor until `need` bytes are free above its head.
    fn make_room(&mut self, ring: Ring, need: u64, check: &FreshnessCheck<'_>) -> Result<(), Corrupt> {
        if self.has_room(ring, need)? {
            return Ok(());
        }
        let len = self.shard.bytes(ring).len;
        let (floor, _) = self.bounds(ring)?;
        let reserve = self.reserve(ring);
        let goal = (need + reserve + len / STRIDE).min(len);
        let mut budget = Budget::new(4 * need);
        let mut at = floor;
        loop {
            let (_, head) = self.bounds(ring)?;
            if at == head || head + goal <= at + len {
                break;
            }
            at = self.pass(ring, at, check, &mut budget)?;
        }
        self.raise_floor(ring, at)
    }

    /// Whether `need` bytes plus the reserve are free above a ring's head.
    fn has_room(&self, ring: Ring, need: u64) -> Result<bool, Corrupt> {
        let (floor, head) = self.bounds(ring)?;
        Ok(head + need + self.reserve(ring) <= floor + self.shard.bytes(ring).len)
    }

    /// Whether a ring has more free space than a store ever needs, or so many dead bytes that this space can be freed when it is needed.
    fn is_not_full(&self, ring: Ring, need: u64) -> Result<bool, Corrupt> {
        let len = self.shard.bytes(ring).len;
        let (floor, _) = self.bounds(ring)?;
        Ok(self.has_room(ring, need + 2 * len / STRIDE)? || self.dead_weight(ring, floor)? > len / DEAD_SHARE)
    }

    fn reserve(&self, ring: Ring) -> u64 {
        let len = self.shard.bytes(ring).len;
        match ring {
            Ring::Small => 0,
            Ring::Main => (len / RESERVE).max(MIN_RESERVE.min(len / MOST_RESERVE)),
        }
    }

    /// Drops, moves or evicts the record at `at`. Everything below `at` must already be free. Returns the position of the next record.
    fn pass(&mut self, ring: Ring, at: u64, check: &FreshnessCheck<'_>, budget: &mut Budget) -> Result<u64, Corrupt> {
        let bytes = self.shard.bytes(ring);
        let record = bytes.record(at).ok_or(Corrupt)?;
        let (_, head) = self.bounds(ring)?;
        if record.size > head.saturating_sub(at) {
            return Err(Corrupt);
        }
        if record.is_entry {
            let entry = bytes.entry(at).ok_or(Corrupt)?;
            if let Some(slot) = self.slot_of(&entry, Place { ring, position: at }) {
                self.retire(ring, slot, &entry, at, check, budget)?;
            }
        }
        Ok(at + record.size)
    }

    /// Moves or evicts the live entry at `at`, which is the oldest in its ring.
    fn retire(
        &mut self,
        ring: Ring,
        slot: Slot<'_>,
        entry: &Entry<'_>,
        at: u64,
        check: &FreshnessCheck<'_>,
        budget: &mut Budget,
    ) -> Result<(), Corrupt> {
        let freshness = check.freshness_of(entry);
        let visits = slot.visits.load(Ordering::Relaxed);
        let from = Place { ring, position: at };
        let counters = self.shard.counters();
        if freshness.keeps() {
            let heavy = self.dead_weight(ring, at)? > self.shard.bytes(ring).len / DEAD_SHARE;
            let kept = match ring {
                Ring::Small if visits >= PROMOTION || self.is_not_full(Ring::Main, entry.size)? => {
                    budget.take(entry.size) && self.promote(slot, entry, from, check)?
                }
                Ring::Main if visits > 0 => {
                    budget.take(entry.size) && self.send_to_head(slot, entry, from, visits - 1)?
                }
                Ring::Small | Ring::Main => {
                    heavy && budget.take(entry.size) && self.send_to_head(slot, entry, from, visits)?
                }
            };
            if kept {
                add(&counters.moved_bytes, entry.size);
                return Ok(());
            }
        }
        if ring == Ring::Small && freshness == Freshness::Fresh {
            ghosts::remember(self.shard.ghosts(), &self.shard.head.ghost_seq, entry.hash());
        }
        let mut books = self.shard.books();
        books.subtract(ring, entry.size)?;
        self.change_slot(slot, 0, books);
        self.count_drop(freshness, ring);
        Ok(())
    }

    /// Returns the number of bytes between `at` and the head that no slot leads to.
    fn dead_weight(&self, ring: Ring, at: u64) -> Result<u64, Corrupt> {
        let (_, head) = self.bounds(ring)?;
        let [small, main] = self.shard.books().bytes;
        let live = if ring == Ring::Small { small } else { main };
        Ok(head.saturating_sub(at).saturating_sub(live))
    }

    /// Copies an entry from the small ring to the main ring. Returns `false` if there is no room.
    fn promote(
        &mut self,
        slot: Slot<'_>,
        entry: &Entry<'_>,
        from: Place,
        check: &FreshnessCheck<'_>,
    ) -> Result<bool, Corrupt> {
        let Some(position) = self.place(Ring::Main, entry.size, check)? else { return Ok(false) };
        self.copy_to(slot, entry, from, Place { ring: Ring::Main, position }, 0)?;
        add(&self.shard.counters().promoted, 1);
        Ok(true)
    }

    /// Copies the oldest entry of a ring to the ring's head, if that is possible without an eviction.
    fn send_to_head(&mut self, slot: Slot<'_>, entry: &Entry<'_>, from: Place, visits: u8) -> Result<bool, Corrupt> {
        let Place { ring, position: at } = from;
        // Everything below `at` has been dropped or moved, and may be overwritten.
        self.raise_floor(ring, at)?;
        let bytes = self.shard.bytes(ring);
        let (floor, head) = self.bounds(ring)?;
        let pad = bytes.pad_before(head, entry.size);
        let end = head + pad + entry.size;
        if end > floor + bytes.len || self.obstacle(ring, end)?.is_some() {
            return Ok(false);
        }
        self.pad(ring, head, pad)?;
        self.copy_to(slot, entry, from, Place { ring, position: head + pad }, visits)?;
        add(&self.shard.counters().reprieved, 1);
        Ok(true)
    }

    /// Copies an entry to a free position, and stores that position in the entry's slot.
    fn copy_to(
        &mut self,
        slot: Slot<'_>,
        entry: &Entry<'_>,
        from: Place,
        to: Place,
        visits: u8,
    ) -> Result<(), Corrupt> {
        self.shard.bytes(to.ring).copy_entry(entry, to.position).ok_or(Corrupt)?;
        crash::point("move: bytes copied");
        self.raise_head(to.ring, to.position + entry.size);
        crash::point("move: head raised");
        let mut books = self.shard.books();
        books.subtract(from.ring, entry.size)?;
        books.add(to.ring, entry.size);
        slot.visits.store(visits, Ordering::Relaxed);
        self.change_slot(slot, to.word(entry.hash()), books);
        Ok(())
    }

    /// Frees all bytes below `to`.
    fn raise_floor(&mut self, ring: Ring, to: u64) -> Result<(), Corrupt> {
        let (floor, head) = self.bounds(ring)?;
        if to > head || to < floor {
            return Err(Corrupt);
        }
        if to > floor {
            self.shard.floor(ring).store(to, Ordering::Release);
            crash::point("room: floor raised");
            // The fence must come before any freed byte is written, because readers check the floor after they have read the bytes. It must
            // also come before the pins are checked, because readers check the floor after they have set a pin.
            fence(Ordering::SeqCst);
        }
        Ok(())
    }

    /// Returns the first pinned entry between the head and `end`, if any.
    fn obstacle(&mut self, ring: Ring, end: u64) -> Result<Option<Obstacle>, Corrupt> {
        let (floor, head) = self.bounds(ring)?;
        let len = self.shard.bytes(ring).len;
        let clear_to = &ring.of(&self.shard.head.rings).clear_to;
        let known = clear_to.load(Ordering::Relaxed).clamp(head, floor + len);
        if end <= known {
            return Ok(None);
        }
        let target = end.max(known + len / STRIDE).min(floor + len);
        fence(Ordering::SeqCst);
        let obstacle = self.nearest_pin(ring, known, target);
        clear_to.store(obstacle.map_or(target, |obstacle| obstacle.start.max(known)), Ordering::Relaxed);
        Ok(obstacle.filter(|obstacle| obstacle.start < end))
    }

    /// Returns the first pinned entry that begins in `from..to`, which must be shorter than one lap. If other pinned entries overlap this
    /// entry, the result extends to the end of the last of them.
    ///
    /// The head never lies inside a pinned entry, so a pinned entry that begins before `from` also ends before it.
    fn nearest_pin(&self, ring: Ring, from: u64, to: u64) -> Option<Obstacle> {
        let by_start = |obstacle: &Obstacle| obstacle.start;
        let mut nearest = self.pins_from(ring, from).min_by_key(by_start).filter(|pin| pin.start < to)?;
        nearest.end = self.end_of_pins(ring, from, nearest.end);
        Some(nearest)
    }

    /// Returns the first position at or after `end` that is not in the middle of a pinned entry; it may be the start of one. Only pinned
    /// entries that begin at or after `from` are considered.
    ///
    /// A pin may begin inside another pinned entry, for two reasons. First, the sizes of entries are rounded up. Second, a reader may have
    /// pinned a position that is now in the middle of another entry, and may not have detected yet that its own entry is gone.
    fn end_of_pins(&self, ring: Ring, from: u64, mut end: u64) -> u64 {
        let ends = |end| self.pins_from(ring, from).filter(move |pin| pin.start < end).map(|pin| pin.end).max();
        while let Some(further) = ends(end).filter(|&further| further > end) {
            end = further;
        }
        end
    }

    /// Returns the pinned entries of a ring, described by the positions at which a head that starts at `from` will reach them.
    fn pins_from(&self, ring: Ring, from: u64) -> impl Iterator<Item = Obstacle> {
        let len = self.shard.bytes(ring).len.max(1);
        let number = self.shard.number;
        let pins = self
            .shard
            .inner
            .members()
            .flat_map(|member| member.head.pins.iter().filter_map(pin::get).map(move |pin| (member.number, pin)));
        // No entry is larger than the maximum. A pin with a larger size is invalid, and would block the ring forever.
        let most = self.shard.inner.geometry.max_record;
        let sane = pins.filter(move |(_, pin)| pin.size / 2 <= most);
        let here = sane.filter(move |(_, pin)| pin.shard == number && pin.main == (ring == Ring::Main));
        here.map(move |(member, pin)| {
            let start = from + (pin.position % len + len - from % len) % len;
            Obstacle { start, end: start.saturating_add(pin.size.next_multiple_of(GRAIN)), member }
        })
    }

    /// Raises the floors over dead records, and moves some live entries if dead bytes take up too much of a ring. Called by the sweep.
    pub(crate) fn tidy(&mut self, check: &FreshnessCheck<'_>) -> Result<(), Corrupt> {
        for ring in Ring::BOTH {
            let mut budget = Budget::new(0);
            let (floor, end) = self.bounds(ring)?;
            let mut at = floor;
            while at < end {
                let record = self.shard.bytes(ring).record(at).ok_or(Corrupt)?;
                let heavy = self.dead_weight(ring, at)? > self.shard.bytes(ring).len / DEAD_SHARE;
                if record.is_entry
                    && self.is_live(ring, at)?
                    && !(heavy && self.rotate(ring, at, check, &mut budget)?)
                {
                    break;
                }
                at += record.size;
            }
            self.raise_floor(ring, at.max(self.bounds(ring)?.0))?;
        }
        Ok(())
    }

    fn is_live(&self, ring: Ring, at: u64) -> Result<bool, Corrupt> {
        let entry = self.shard.bytes(ring).entry(at).ok_or(Corrupt)?;
        Ok(self.slot_of(&entry, Place { ring, position: at }).is_some())
    }

    /// Moves a live entry from the floor to the head and keeps its visits. Returns `false` if that is not possible.
    fn rotate(
        &mut self,
        ring: Ring,
        at: u64,
        check: &FreshnessCheck<'_>,
        budget: &mut Budget,
    ) -> Result<bool, Corrupt> {
        let entry = self.shard.bytes(ring).entry(at).ok_or(Corrupt)?;
        let Some(slot) = self.slot_of(&entry, Place { ring, position: at }) else { return Ok(true) };
        if !check.freshness_of(&entry).keeps() || !budget.take(entry.size) {
            return Ok(false);
        }
        let visits = slot.visits.load(Ordering::Relaxed);
        self.send_to_head(slot, &entry, Place { ring, position: at }, visits)
    }
}
