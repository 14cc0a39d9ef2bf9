//! Room in the rings: what is evicted for something new, and how bytes come to be written again.
//!
//! The policy is S3-FIFO (Yang and others, SOSP 2023), with objects counted by their bytes. A ring is a log: what is oldest
//! lies at its floor. To make room the floor is moved up, record by record:
//!
//! ```text
//! small ring   asked for meanwhile, or the main ring is not full -> to the main ring     else -> evicted, and remembered
//!              as a ghost
//! main ring    asked for meanwhile -> to its head again, with one visit less     else -> evicted
//! ```
//! What no slot leads to, was purged, or is over, is dropped on the way. While more than an eighth of a ring is such dead
//! weight, live entries at its floor go to its head instead of being evicted: sooner or later the floor meets the dead ones.
//!
//! Why this policy and not another: a hit writes nothing but a counter of visits, and that only at first; order is kept by
//! position alone, so there are no lists for a death to tear; and of the policies that can work so it has the highest hit
//! ratio (`docs/benchmarks.md`).
//!
//! Bytes are written again only when no reader can rely on them: the floor was raised over them *before* (readers look
//! at it after they copied), and *then* no pin was found on them. A pinned entry stays where it is, and the head jumps
//! over it.

use std::sync::atomic::{Ordering, fence};

use super::entry::Entry;
use super::freshness::{Judge, Verdict};
use super::ghosts;
use super::index::{Place, Ring, Slot};
use super::shard::{Corrupt, LockedShard, add};
use crate::crash;
use crate::memory::layout::GRAIN;
use crate::protocols::pin;

/// Entries that are moved instead of evicted, at most, each time room is made for one.
const MOVES: u32 = 64;
/// Bytes that are moved then, at most.
const MOVED_BYTES: u64 = 512 * 1024;
/// The floor moves by at least this part of a ring at a time, as every reader has it in its cache.
const STRIDE: u64 = 128;
/// Room kept in the main ring, as this part of it, so that what was asked for can go to its head: but not less than
/// [`MIN_RESERVE`] unless that is more than the [`MOST_RESERVE`] part.
const RESERVE: u64 = 64;
const MIN_RESERVE: u64 = 256 * 1024;
const MOST_RESERVE: u64 = 16;
/// Dead weight beyond this part of a ring is a reason to move live entries rather than evict them.
const DEAD_SHARE: u64 = 8;
/// Visits that take an entry from the small ring to the main one.
const PROMOTION: u8 = 1;
/// Pinned entries that one store jumps over, at most.
const JUMPS: u32 = 256;

/// What one store may still move.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    moves: u32,
    bytes: u64,
}

/// A pinned entry, as the head's log will meet it.
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
    /// A place for a record of `size` bytes at a ring's head: free, in one piece, and pinned by nobody. `None` if pins leave
    /// no such place.
    pub(crate) fn place(&mut self, ring: Ring, size: u64, judge: &Judge<'_>) -> Result<Option<u64>, Corrupt> {
        let bytes = self.shard.bytes(ring);
        for _ in 0..JUMPS {
            let (_, head) = self.bounds(ring)?;
            self.make_room(ring, bytes.pad_before(head, size) + size, judge)?;
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
                Some(obstacle) => self.jump_over(ring, obstacle, judge)?,
            }
        }
        Ok(None)
    }

    /// Moves the head behind a pinned entry.
    fn jump_over(&mut self, ring: Ring, obstacle: Obstacle, judge: &Judge<'_>) -> Result<(), Corrupt> {
        self.suspect(obstacle.member);
        let bytes = self.shard.bytes(ring);
        let (_, head) = self.bounds(ring)?;
        // The obstacle may lie beyond the end of the ring, which no record crosses.
        let to_end = bytes.len - head % bytes.len;
        let skip = (obstacle.end.saturating_sub(head)).min(to_end);
        self.make_room(ring, skip, judge)?;
        let (floor, moved) = self.bounds(ring)?;
        if moved == head && head + skip <= floor + bytes.len {
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
    fn make_room(&mut self, ring: Ring, need: u64, judge: &Judge<'_>) -> Result<(), Corrupt> {
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
            at = self.pass(ring, at, judge, &mut budget)?;
        }
        self.raise_floor(ring, at)
    }

    /// Whether `need` bytes, and the reserve, are free above a ring's head.
    fn has_room(&self, ring: Ring, need: u64) -> Result<bool, Corrupt> {
        let (floor, head) = self.bounds(ring)?;
        Ok(head + need + self.reserve(ring) <= floor + self.shard.bytes(ring).len)
    }

    /// Whether a ring has more room than is ever made at a time, or dead weight that would be found if it was needed.
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

    /// Deals with the record at `at`, below which all is free already; where the next one is.
    fn pass(&mut self, ring: Ring, at: u64, judge: &Judge<'_>, budget: &mut Budget) -> Result<u64, Corrupt> {
        let bytes = self.shard.bytes(ring);
        let record = bytes.record(at).ok_or(Corrupt)?;
        let (_, head) = self.bounds(ring)?;
        if record.size > head.saturating_sub(at) {
            return Err(Corrupt);
        }
        if record.is_entry {
            let entry = bytes.entry(at).ok_or(Corrupt)?;
            if let Some(slot) = self.slot_of(&entry, Place { ring, position: at }) {
                self.retire(ring, slot, &entry, at, judge, budget)?;
            }
        }
        Ok(at + record.size)
    }

    /// Moves or evicts the live entry at `at`, the oldest of its ring.
    fn retire(
        &mut self,
        ring: Ring,
        slot: Slot<'_>,
        entry: &Entry<'_>,
        at: u64,
        judge: &Judge<'_>,
        budget: &mut Budget,
    ) -> Result<(), Corrupt> {
        let verdict = judge.verdict(entry);
        let visits = slot.visits.load(Ordering::Relaxed);
        let from = Place { ring, position: at };
        let counters = self.shard.counters();
        if verdict.keeps() {
            let heavy = self.dead_weight(ring, at)? > self.shard.bytes(ring).len / DEAD_SHARE;
            let kept = match ring {
                Ring::Small if visits >= PROMOTION || self.is_not_full(Ring::Main, entry.size)? => {
                    budget.take(entry.size) && self.promote(slot, entry, from, judge)?
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
        if ring == Ring::Small && verdict == Verdict::Fresh {
            ghosts::remember(self.shard.ghosts(), &self.shard.head.ghost_seq, entry.hash());
        }
        let mut books = self.shard.books();
        books.subtract(ring, entry.size)?;
        self.change_slot(slot, 0, books);
        self.count_drop(verdict, ring);
        Ok(())
    }

    /// Bytes from `at` to the head that no slot leads to.
    fn dead_weight(&self, ring: Ring, at: u64) -> Result<u64, Corrupt> {
        let (_, head) = self.bounds(ring)?;
        let [small, main] = self.shard.books().bytes;
        let live = if ring == Ring::Small { small } else { main };
        Ok(head.saturating_sub(at).saturating_sub(live))
    }

    /// Copies an entry of the small ring to the main one; `false` if there is no room.
    fn promote(&mut self, slot: Slot<'_>, entry: &Entry<'_>, from: Place, judge: &Judge<'_>) -> Result<bool, Corrupt> {
        let Some(position) = self.place(Ring::Main, entry.size, judge)? else { return Ok(false) };
        self.copy_to(slot, entry, from, Place { ring: Ring::Main, position }, 0)?;
        add(&self.shard.counters().promoted, 1);
        Ok(true)
    }

    /// Copies the oldest entry of a ring to its head, if there is room without evicting anything.
    fn send_to_head(&mut self, slot: Slot<'_>, entry: &Entry<'_>, from: Place, visits: u8) -> Result<bool, Corrupt> {
        let Place { ring, position: at } = from;
        // All below is dealt with, and may be written to from now on.
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

    /// Copies an entry to a free place, and has its slot lead there.
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

    /// Makes all below `to` free.
    fn raise_floor(&mut self, ring: Ring, to: u64) -> Result<(), Corrupt> {
        let (floor, head) = self.bounds(ring)?;
        if to > head || to < floor {
            return Err(Corrupt);
        }
        if to > floor {
            self.shard.floor(ring).store(to, Ordering::Release);
            crash::point("room: floor raised");
            // Before any byte below is written: readers look at the floor after they read the bytes. And before pins
            // are looked for: readers look at the floor after they set theirs.
            fence(Ordering::SeqCst);
        }
        Ok(())
    }

    /// What is pinned between the head and `end`, if anything is.
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

    /// The first pinned entry from one position on that begins before another, less than a lap away.
    ///
    /// The head never comes to lie inside a pinned entry, so one that begins before `from` ends before it.
    fn nearest_pin(&self, ring: Ring, from: u64, to: u64) -> Option<Obstacle> {
        let by_start = |obstacle: &Obstacle| obstacle.start;
        let mut nearest = self.pins_from(ring, from).min_by_key(by_start).filter(|pin| pin.start < to)?;
        // Its size is rounded up, but what lies behind it may be pinned too.
        let next = self.pins_from(ring, nearest.start + 1).map(|pin| pin.start).min();
        nearest.end = next.map_or(nearest.end, |next| nearest.end.min(next));
        Some(nearest)
    }

    /// What is pinned in a ring, where a head that comes from `from` will meet it.
    fn pins_from(&self, ring: Ring, from: u64) -> impl Iterator<Item = Obstacle> {
        let len = self.shard.bytes(ring).len.max(1);
        let number = self.shard.number;
        let pins = self
            .shard
            .inner
            .members()
            .flat_map(|member| member.head.pins.iter().filter_map(pin::get).map(move |pin| (member.number, pin)));
        // No entry is larger than the largest, so a pin that says so is nonsense, and would be in the way for ever.
        let most = self.shard.inner.geometry.max_record;
        let sane = pins.filter(move |(_, pin)| pin.size / 2 <= most);
        let here = sane.filter(move |(_, pin)| pin.shard == number && pin.main == (ring == Ring::Main));
        here.map(move |(member, pin)| {
            let start = from + (pin.position % len + len - from % len) % len;
            Obstacle { start, end: start.saturating_add(pin.size.next_multiple_of(GRAIN)), member }
        })
    }

    /// Raises the floors over dead records, and moves some live ones if dead ones weigh a ring down: for the sweep.
    pub(crate) fn tidy(&mut self, judge: &Judge<'_>) -> Result<(), Corrupt> {
        for ring in Ring::BOTH {
            let mut budget = Budget::new(0);
            let (floor, end) = self.bounds(ring)?;
            let mut at = floor;
            while at < end {
                let record = self.shard.bytes(ring).record(at).ok_or(Corrupt)?;
                let heavy = self.dead_weight(ring, at)? > self.shard.bytes(ring).len / DEAD_SHARE;
                if record.is_entry
                    && self.is_live(ring, at)?
                    && !(heavy && self.rotate(ring, at, judge, &mut budget)?)
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

    /// Sends a live entry at the floor to the head as it is; `false` if that cannot be.
    fn rotate(&mut self, ring: Ring, at: u64, judge: &Judge<'_>, budget: &mut Budget) -> Result<bool, Corrupt> {
        let entry = self.shard.bytes(ring).entry(at).ok_or(Corrupt)?;
        let Some(slot) = self.slot_of(&entry, Place { ring, position: at }) else { return Ok(true) };
        if !judge.verdict(&entry).keeps() || !budget.take(entry.size) {
            return Ok(false);
        }
        let visits = slot.visits.load(Ordering::Relaxed);
        self.send_to_head(slot, &entry, Place { ring, position: at }, visits)
    }
}
