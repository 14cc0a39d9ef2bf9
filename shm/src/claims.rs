//! The table through which gateways claim app processes. (A gateway is a worker that forwards requests; an app process serves them.)
//!
//! Each app process has a slot with a *door*, which the master opens and closes, and with *units*: one for each request that the process
//! serves at the same time, usually one. A gateway claims a unit, forwards a request to the app process, and releases the unit. If no unit
//! is free, the gateway stores in its own row how many requests wait and when the oldest one arrived. A process that releases a unit learns
//! from the rows which gateway must be woken.
//!
//! The table has a memory file of its own ([`table`]), which children inherit. [`choice`] decides which process a gateway claims.
//! `protocols/units.rs` defines the words and the order of reading and writing them; loom checks it.
//!
//! # Rules for the callers
//! - No function here waits, and only `create` and `attach` make system calls. The caller wakes other processes, through eventfds: the
//!   functions return which process must be woken. A wake-up must not be lost while a process is not asleep.
//! - A gateway that wants to wait calls [`set_waiting`](Claims::set_waiting), *then* tries to claim, and only then sleeps. When it is woken,
//!   it claims units until no request waits or no unit is free, and calls `set_waiting` again whenever the numbers change, even if the
//!   requests have left.
//! - A gateway that has finished a request may [use the unit](Claims::reuse) for its next one, unless a request of another gateway has waited
//!   for a few milliseconds longer.
//! - Gateways may claim units while other gateways wait. A gateway that waits also tries to claim every 20 ms, because the gateway with
//!   the oldest request, which is the one that is woken, may be stopped or hung.
//! - Only the master opens and closes doors, and removes dead gateways.
//! - Units contain the slot of a gateway, but no generation. The master must call [`gateway_died`](Claims::gateway_died) after it has reaped
//!   a gateway and before it starts a successor in the slot. No other process, such as the gateway's heir, may use the dead gateway's units.
//! - `now_us` is the time of the monotonic clock, in microseconds, in all processes.
//! - A slot that does not exist has a closed door. Operations on it have no effect.
//!
//! # Cost
//! A claim looks at all units. On a busy 2-core machine, a claim together with its release took about 0.2 us of CPU time with 4 app processes
//! of 1 unit, 0.5 us with 64 of 1 unit, and 0.4 to 0.8 us with 4 of 64 units (`forkyard-shm-bench claims`, one gateway).
//!
//! # Crash tolerance
//! Any process may be killed or stopped at any instruction. There are no locks.
//!
//! | killed while | what the other processes find |
//! |---|---|
//! | a gateway is choosing an app process | nothing: the gateway wrote nothing that is shared |
//! | a gateway has claimed a unit, but has not read the door again | the unit is claimed; `gateway_died` frees it. Until then, a drain waits for it |
//! | a gateway has claimed a unit, but has not counted the claim | one claim is missing in `begun`; `gateway_died` frees the unit |
//! | a gateway uses an app process | the unit is claimed; `gateway_died` frees it and returns the app process, which may still be busy |
//! | a gateway has given a unit back or released it, but has not woken any process | the unit is free; after `gateway_died`, the master checks drains and wakes the gateway that waits longest |
//! | a gateway has stored its waiting row, but has not tried to claim | other processes may wake the dead gateway; `gateway_died` clears the row, and the master wakes another gateway |
//! | a gateway was woken, but has not claimed the unit | the unit is free; as above |
//! | a gateway has cleared its waiting row, but has not looked for free units | the same |
//! | the master is opening a door | the door is closed, or open for an app process whose units are all free |
//! | the master is closing or draining a door, or removing a dead gateway | the next call repeats it; the repetition is harmless |
//!
//! | stopped while | what the other processes find |
//! |---|---|
//! | a gateway waits | it is woken in vain; other gateways claim the free units within 20 ms |
//! | a gateway holds a unit | the unit is claimed; a drain ends at the master's deadline |
//! | a gateway is about to claim or to release a unit of an app process that has meanwhile been replaced | the operation fails, because the units have a different tag |
//!
//! A process that overwrites the table can make units appear claimed, or free while they are in use, until the door is opened again. Slots
//! that are read from the table are checked, and the number of attempts is limited.

pub(crate) mod choice;
pub(crate) mod table;

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::choice::Candidate;
use self::table::{ProcessRow, Size, Table};
use crate::memory::error::SegmentError;
use crate::protocols::kept;
pub use crate::protocols::units::Door;
use crate::protocols::units::{self, Taken};
use crate::scoreboard::text;

/// A gateway may use a unit again although a request of another gateway has waited longer than its own, if the difference is not more than
/// this.
const HEAD_START_US: u64 = 5000;

/// Maximum number of attempts in one call, if other gateways take each chosen unit first. Each of them wakes a waiting gateway later.
const ATTEMPTS: u32 = 64;

/// A handle to the table of claims. Cheap to clone, and usable from any thread and in forked children.
#[derive(Clone, Debug)]
pub struct Claims {
    table: Arc<Table>,
}

/// A unit of an app process, held by a gateway until it is [released](Claims::release).
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the unit remains claimed until it is released or its gateway dies"]
pub struct HeldUnit {
    process: u32,
    unit: usize,
    word: u64,
    epoch: u32,
    pid: u32,
    begun: u64,
    keeper: Option<u32>,
}

/// A connection that a gateway keeps to an app process whose unit it has released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptConnection {
    process: u32,
    unit: usize,
    epoch: u32,
    gateway: u32,
}

/// The result of an attempt to claim a unit.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct ClaimAttempt {
    /// The unit, if one was free.
    pub unit: Option<HeldUnit>,
    /// Whether the master must be woken, because the gateway briefly held a unit of an app process that is draining.
    pub wake_master: bool,
}

/// The process that must be woken after a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Wake {
    /// No process waits.
    Nobody,
    /// The app process is draining, and the master waits for it.
    Master,
    /// This gateway waits for a unit. It may be the gateway that released the unit.
    Gateway(u32),
}

/// The state of an app process's slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AppProcess {
    /// The state of the door.
    pub door: Door,
    /// Number of times that the door was opened, for this app process and its predecessors.
    pub epoch: u32,
    /// Process id of the latest app process; 0 if there was none.
    pub pid: u32,
    /// Number of units that gateways hold.
    pub busy: u32,
    /// Number of claims since the door was opened.
    pub begun: u64,
    /// When the door was opened.
    pub since_us: u64,
}

/// A request that an app process is serving.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AppRequest {
    /// The slot of the gateway that has sent the request.
    pub gateway: u32,
    /// Method and target, as in `GET /path`; printable ASCII, truncated to 112 bytes.
    pub what: String,
    /// Time since the request was sent, in microseconds.
    pub for_us: u64,
}

/// How much work there is for the app processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AppDemand {
    /// Number of claimed units whose door is not closed.
    pub in_flight: u32,
    /// Number of requests that wait for a unit, in all gateways.
    pub waiting: u32,
    /// Time since the oldest of these requests arrived.
    pub oldest_wait_us: u64,
}

impl KeptConnection {
    /// Returns the epoch of the app process.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }
}

impl HeldUnit {
    /// Returns the slot of the app process.
    pub fn process(&self) -> u32 {
        self.process
    }

    /// Returns the process id of the app process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the epoch of the app process, which distinguishes it from other app processes in its slot.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Returns the number of the unit within its app process.
    pub fn unit(&self) -> usize {
        self.unit
    }

    /// Returns the gateway that keeps a connection to the app process, if any. Another gateway than the holder of the unit must be woken,
    /// so that it closes its connection.
    pub fn keeper(&self) -> Option<u32> {
        self.keeper
    }

    /// Returns the number of claims of this app process, including this one.
    pub fn begun(&self) -> u64 {
        self.begun
    }
}

/// Creating and attaching.
impl Claims {
    /// Creates a table in a sealed memory file. All doors are closed.
    ///
    /// # Errors
    /// Fails if a number is 0 or too large, or if the memory or a descriptor is not available.
    pub fn create(processes: u32, units: u32, gateways: u32) -> Result<Claims, SegmentError> {
        Ok(Claims { table: Arc::new(Table::create(Size { processes, units, gateways })?) })
    }

    /// Attaches to a table that another process created.
    ///
    /// # Errors
    /// Fails if the descriptor is not a sealed memory file, or if its header, version or size differs from what this build would have
    /// created.
    pub fn attach(fd: OwnedFd) -> Result<Claims, SegmentError> {
        Ok(Claims { table: Arc::new(Table::attach(fd)?) })
    }

    /// Returns the descriptor. It is close-on-exec.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.table.fd.as_fd()
    }

    /// Returns the number of slots for app processes.
    pub fn processes(&self) -> u32 {
        self.table.size.processes
    }

    /// Returns the maximum number of units of each app process.
    pub fn units(&self) -> u32 {
        self.table.size.units
    }

    /// Returns the number of slots for gateways.
    pub fn gateways(&self) -> u32 {
        self.table.size.gateways
    }
}

/// Operations of a gateway.
impl Claims {
    /// Tries to claim a unit for a gateway.
    pub fn claim(&self, gateway: u32, now_us: u64) -> ClaimAttempt {
        let mut attempt = ClaimAttempt { unit: None, wake_master: false };
        let Some(row) = self.table.gateway(gateway) else { return attempt };
        let turn = row.turn.load(Ordering::Relaxed);
        row.turn.store(turn.wrapping_add(1), Ordering::Relaxed);
        // The remainder is less than the number of processes.
        let start = u32::try_from(turn % u64::from(self.processes())).unwrap_or(0);
        for _ in 0..ATTEMPTS {
            let Some(best) = choice::choose(self.candidates(gateway, start, now_us)) else { break };
            let Some(process) = self.table.process(best.process) else { break };
            // The door is read before the pid and again after it, so the pid belongs to the same app process.
            let pid = pid_of(process);
            let Some(unit) = process.units.get(best.unit) else { break };
            match units::take((process.door, best.door), (unit, best.word), gateway, now_us) {
                Taken::Mine(word) => {
                    let begun = process.begun.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
                    let epoch = units::epoch(best.door);
                    let kept = process.kept.get(best.unit).map_or(0, |kept| kept.load(Ordering::SeqCst));
                    let keeper = kept::keeper(kept, epoch);
                    let (process, unit) = (best.process, best.unit);
                    attempt.unit = Some(HeldUnit { process, unit, word, epoch, pid, begun, keeper });
                    break;
                }
                Taken::Lost => {}
                Taken::GivenBack => attempt.wake_master = true,
            }
        }
        attempt
    }

    /// Lets a gateway use its unit for a further request, which has waited since `since_us`, without releasing it in between.
    ///
    /// # Errors
    /// Returns the unit, which must then be released: the app process is draining, or a request of another gateway has waited for more than
    /// 5 ms longer. If there were no such head start, and all gateways had requests waiting, the app process would change to another gateway
    /// after each request, and no connection to it could be kept.
    pub fn reuse(&self, mut unit: HeldUnit, since_us: u64, now_us: u64) -> Result<HeldUnit, HeldUnit> {
        let owner = units::owner(unit.word);
        let others = self.table.gateways().filter(|&(gateway, _)| Some(gateway) != owner);
        let words = others.map(|(_, row)| row.waiting.load(Ordering::SeqCst)).filter(|&word| units::waiting(word) > 0);
        let longest = words.map(|word| units::age_us(word, now_us)).max().unwrap_or(0);
        let Some(process) = self.table.process(unit.process) else { return Err(unit) };
        let door = process.door.load(Ordering::SeqCst);
        let is_open = units::state(door) == Door::Open && units::epoch(door) == unit.epoch;
        if !is_open || longest > now_us.saturating_sub(since_us) + HEAD_START_US {
            return Err(unit);
        }
        unit.begun = process.begun.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        Ok(unit)
    }

    /// Records the request that a unit is used for: the result of [`request_text`](crate::request_text). The latest record of a unit is
    /// shown until the unit is released.
    pub fn begin_request(&self, unit: &HeldUnit, what: &str, now_us: u64) {
        if let Some(row) = self.table.request(unit.process, unit.unit) {
            text::store(row.length, row.text, what.as_bytes());
            row.begun_us.store(now_us, Ordering::Release);
        }
    }

    /// Releases a unit, without keeping a connection. Returns the process that must be woken.
    pub fn release(&self, unit: HeldUnit, now_us: u64) -> Wake {
        let Some(process) = self.table.process(unit.process) else { return Wake::Nobody };
        let (Some(cell), Some(kept)) = (process.units.get(unit.unit), process.kept.get(unit.unit)) else {
            return Wake::Nobody;
        };
        if let Some(gateway) = unit.keeper.filter(|&keeper| units::owner(unit.word) == Some(keeper)) {
            kept::forget(kept, unit.epoch, gateway);
        }
        if units::free(cell, unit.word, now_us) { self.after_free(process, now_us) } else { Wake::Nobody }
    }

    /// Returns the process that must be woken after a unit was freed.
    fn after_free(&self, process: ProcessRow<'_>, now_us: u64) -> Wake {
        if units::state(process.door.load(Ordering::SeqCst)) != Door::Open {
            return Wake::Master;
        }
        self.longest_waiting(None, now_us).map_or(Wake::Nobody, Wake::Gateway)
    }

    /// Like [`release`](Claims::release), for a gateway that keeps a connection to the app process.
    ///
    /// Returns no connection if the unit is no longer held, because a new app process has been started in the slot: the gateway must then
    /// close the connection.
    ///
    /// If the result is [`Wake::Master`], or the gateway [must not keep](Claims::may_keep) the connection later, it must close the
    /// connection and then call [`forget`](Claims::forget).
    pub fn release_kept(&self, unit: HeldUnit, now_us: u64) -> (Option<KeptConnection>, Wake) {
        let gateway = units::owner(unit.word).unwrap_or(u32::MAX);
        let connection = KeptConnection { process: unit.process, unit: unit.unit, epoch: unit.epoch, gateway };
        let Some(process) = self.table.process(unit.process) else { return (None, Wake::Nobody) };
        let (Some(cell), Some(kept)) = (process.units.get(unit.unit), process.kept.get(unit.unit)) else {
            return (None, Wake::Nobody);
        };
        kept::keep(kept, unit.epoch, gateway);
        if !units::free(cell, unit.word, now_us) {
            kept::forget(kept, unit.epoch, gateway);
            return (None, Wake::Nobody);
        }
        (Some(connection), self.after_free(process, now_us))
    }

    /// Returns the gateway that keeps a connection to the app process of a held unit now.
    pub fn keeper(&self, unit: &HeldUnit) -> Option<u32> {
        let kept = self.table.process(unit.process)?.kept.get(unit.unit)?;
        kept::keeper(kept.load(Ordering::SeqCst), unit.epoch)
    }

    /// Whether a gateway may keep a connection: the app process serves requests, and no other gateway uses its unit.
    #[must_use]
    pub fn may_keep(&self, connection: &KeptConnection) -> bool {
        let KeptConnection { process, unit, epoch, gateway } = *connection;
        let Some(process) = self.table.process(process) else { return false };
        let (Some(cell), Some(kept)) = (process.units.get(unit), process.kept.get(unit)) else { return false };
        let door = process.door.load(Ordering::SeqCst);
        let owner = units::owner(cell.load(Ordering::SeqCst));
        units::state(door) == Door::Open
            && units::epoch(door) == epoch
            && kept::keeper(kept.load(Ordering::SeqCst), epoch) == Some(gateway)
            && owner.is_none_or(|owner| owner == gateway)
    }

    /// Records that a gateway has closed a connection. Returns the process that must be woken: the master, or the gateway that holds the
    /// unit.
    pub fn forget(&self, connection: KeptConnection) -> Wake {
        let KeptConnection { process, unit, epoch, gateway } = connection;
        let Some(process) = self.table.process(process) else { return Wake::Nobody };
        if let Some(kept) = process.kept.get(unit) {
            kept::forget(kept, epoch, gateway);
        }
        let door = process.door.load(Ordering::SeqCst);
        if units::state(door) == Door::Draining && units::epoch(door) == epoch {
            return Wake::Master;
        }
        let owner = process.units.get(unit).and_then(|cell| units::owner(cell.load(Ordering::SeqCst)));
        owner.filter(|&owner| owner != gateway).map_or(Wake::Nobody, Wake::Gateway)
    }

    /// Stores how many requests wait in a gateway, and when the oldest one arrived. If there are any, the gateway must then try to claim a
    /// unit before it sleeps.
    ///
    /// If the gateway no longer waits, another gateway may have been passed over for it. In this case, if a unit is free, returns the gateway
    /// that must be woken.
    #[must_use]
    pub fn set_waiting(&self, gateway: u32, requests: u32, oldest_us: u64, now_us: u64) -> Option<u32> {
        let row = self.table.gateway(gateway)?;
        if !units::set_waiting(row.waiting, requests, oldest_us) {
            return None;
        }
        self.candidates(gateway, 0, now_us).next()?;
        self.longest_waiting(Some(gateway), now_us)
    }
}

impl Claims {
    /// Whether the app process of a held unit is still the one for which the unit was claimed, and has not died.
    pub fn is_current(&self, unit: &HeldUnit) -> bool {
        self.table.process(unit.process).is_some_and(|process| {
            let door = process.door.load(Ordering::SeqCst);
            units::epoch(door) == unit.epoch && units::state(door) != Door::Closed
        })
    }
}

/// Operations of the master.
impl Claims {
    /// Opens the door for a new app process that serves up to `units` requests at a time. Returns its epoch, or `None` if there is no such
    /// slot. The door's previous app process must be dead, or must no longer be used. If there are fewer [units](Claims::units), they limit
    /// the number of requests.
    ///
    /// The caller must then wake the [gateway that waits longest](Claims::next_to_wake).
    pub fn open(&self, process: u32, pid: u32, units: u32, now_us: u64) -> Option<u32> {
        let row = self.table.process(process)?;
        units::close(row.door);
        row.pid.store(u64::from(pid), Ordering::SeqCst);
        row.begun.store(0, Ordering::SeqCst);
        row.since_us.store(now_us, Ordering::SeqCst);
        Some(units::open(row.door, row.units, usize::try_from(units).unwrap_or(usize::MAX), now_us))
    }

    /// Makes gateways stop claiming units of an app process. Returns whether the process is idle. If it is not, the master will be woken
    /// after each release, and must wake the [keepers](Claims::keepers) of connections.
    #[must_use]
    pub fn drain(&self, process: u32) -> bool {
        if let Some(row) = self.table.process(process) {
            units::drain(row.door);
        }
        self.is_idle(process)
    }

    /// Whether no gateway holds a unit of an app process, or keeps a connection to it.
    pub fn is_idle(&self, process: u32) -> bool {
        self.table.process(process).is_none_or(|row| units::busy(row.units) == 0)
            && self.keepers(process).next().is_none()
    }

    /// Returns the gateways that keep connections to an app process.
    pub fn keepers(&self, process: u32) -> impl Iterator<Item = u32> {
        self.table.process(process).into_iter().flat_map(|row| {
            let epoch = units::epoch(row.door.load(Ordering::SeqCst));
            row.kept.iter().filter_map(move |kept| kept::keeper(kept.load(Ordering::SeqCst), epoch))
        })
    }

    /// Closes the door of an app process that is dead. Its units keep their owners until they are released, or until the door is opened for
    /// another app process.
    pub fn close(&self, process: u32) {
        if let Some(row) = self.table.process(process) {
            units::close(row.door);
        }
    }

    /// Prepares the row of a gateway that is about to be started. Its predecessor must have been [removed](Claims::gateway_died).
    pub fn gateway_started(&self, gateway: u32, pid: u32) {
        if let Some(row) = self.table.gateway(gateway) {
            units::set_waiting(row.waiting, 0, 0);
            row.pid.store(u64::from(pid), Ordering::Relaxed);
        }
    }

    /// Returns the slots of the app processes of which a gateway holds units.
    pub fn used_by(&self, gateway: u32) -> impl Iterator<Item = u32> {
        let holds = move |unit: &AtomicU64| units::owner(unit.load(Ordering::SeqCst)) == Some(gateway);
        self.table.processes().filter(move |(_, row)| row.units.iter().any(holds)).map(|(process, _)| process)
    }

    /// Removes a dead gateway: clears its row and frees its units. Returns the slots of the app processes that it was using, unless their
    /// doors are closed. Each of these processes may still be working on the interrupted request.
    ///
    /// The caller must then check whether app processes that are draining [are idle](Claims::is_idle), and wake the
    /// [gateway that waits longest](Claims::next_to_wake), because the dead gateway may have been woken in its place.
    pub fn gateway_died(&self, gateway: u32, now_us: u64) -> Vec<u32> {
        let Some(row) = self.table.gateway(gateway) else { return Vec::new() };
        units::set_waiting(row.waiting, 0, 0);
        row.pid.store(0, Ordering::Relaxed);
        let mut interrupted = Vec::new();
        for (process, row) in self.table.processes() {
            let epoch = units::epoch(row.door.load(Ordering::SeqCst));
            row.kept.iter().for_each(|kept| kept::forget(kept, epoch, gateway));
            let freed = row.units.iter().filter(|unit| units::free_from_dead(unit, gateway, now_us)).count();
            if freed > 0 && units::state(row.door.load(Ordering::SeqCst)) != Door::Closed {
                interrupted.push(process);
            }
        }
        interrupted
    }

    /// Returns the gateway whose oldest request has waited longest, if any gateway other than `except` waits.
    #[must_use]
    pub fn next_to_wake(&self, except: Option<u32>, now_us: u64) -> Option<u32> {
        self.longest_waiting(except, now_us)
    }

    /// Clears the waiting rows of all gateways.
    pub fn reset_waiting(&self) {
        for (_, row) in self.table.gateways() {
            units::set_waiting(row.waiting, 0, 0);
        }
    }
}

/// The state of the table, for the status and for scaling. The values may be slightly inconsistent.
impl Claims {
    /// Returns how much work there is.
    pub fn demand(&self, now_us: u64) -> AppDemand {
        let mut demand = AppDemand::default();
        for (_, row) in self.table.processes() {
            if units::state(row.door.load(Ordering::SeqCst)) != Door::Closed {
                demand.in_flight = demand.in_flight.saturating_add(units::busy(row.units));
            }
        }
        for (_, row) in self.table.gateways() {
            let word = row.waiting.load(Ordering::SeqCst);
            let requests = units::waiting(word);
            if requests > 0 {
                demand.waiting = demand.waiting.saturating_add(requests);
                demand.oldest_wait_us = demand.oldest_wait_us.max(units::age_us(word, now_us));
            }
        }
        demand
    }

    /// Returns the state of an app process's slot, if there is such a slot.
    pub fn app_process(&self, process: u32) -> Option<AppProcess> {
        let row = self.table.process(process)?;
        let door = row.door.load(Ordering::SeqCst);
        Some(AppProcess {
            door: units::state(door),
            epoch: units::epoch(door),
            pid: pid_of(row),
            busy: units::busy(row.units),
            begun: row.begun.load(Ordering::Relaxed),
            since_us: row.since_us.load(Ordering::Relaxed),
        })
    }

    /// Returns the requests that an app process is serving, the oldest first. The text of a request may be torn, or that of the unit's
    /// previous request.
    pub fn requests(&self, process: u32, now_us: u64) -> Vec<AppRequest> {
        let Some(row) = self.table.process(process) else { return Vec::new() };
        let request = |(unit, cell): (usize, &AtomicU64)| {
            let gateway = units::owner(cell.load(Ordering::SeqCst))?;
            let place = self.table.request(process, unit)?;
            let for_us = now_us.saturating_sub(place.begun_us.load(Ordering::Acquire));
            Some(AppRequest { gateway, what: text::load(place.length, place.text), for_us })
        };
        let mut requests: Vec<AppRequest> = row.units.iter().enumerate().filter_map(request).collect();
        requests.sort_by_key(|request| std::cmp::Reverse(request.for_us));
        requests
    }

    /// Returns the process id of a gateway and the number of requests that wait in it. The process id is 0 if there is no gateway in the slot.
    pub fn gateway(&self, gateway: u32) -> Option<(u32, u32)> {
        let row = self.table.gateway(gateway)?;
        let pid = u32::try_from(row.pid.load(Ordering::Relaxed)).unwrap_or(0);
        Some((pid, units::waiting(row.waiting.load(Ordering::SeqCst))))
    }

    /// Returns the app processes that have a free unit, beginning with `start`.
    fn candidates(&self, gateway: u32, start: u32, now_us: u64) -> impl Iterator<Item = Candidate> {
        let rows = self.table.processes();
        let last = rows.clone().take(start as usize);
        rows.skip(start as usize).chain(last).filter_map(move |(process, row)| candidate(process, row, gateway, now_us))
    }

    fn longest_waiting(&self, except: Option<u32>, now_us: u64) -> Option<u32> {
        let rows = self.table.gateways().filter(|&(gateway, _)| Some(gateway) != except);
        units::longest_waiting(rows.map(|(gateway, row)| (gateway, row.waiting)), now_us)
    }
}

fn candidate(process: u32, row: ProcessRow<'_>, gateway: u32, now_us: u64) -> Option<Candidate> {
    let door = row.door.load(Ordering::SeqCst);
    if units::state(door) != Door::Open {
        return None;
    }
    let mut busy = 0;
    let mut idle_us = u64::MAX;
    let mut free: Option<(u8, usize, u64)> = None;
    for (unit, (cell, kept)) in row.units.iter().zip(row.kept).enumerate() {
        let word = cell.load(Ordering::SeqCst);
        if units::is_free(door, word) {
            idle_us = idle_us.min(units::age_us(word, now_us));
            let keeper = kept::keeper(kept.load(Ordering::Relaxed), units::epoch(door));
            // Among the units, one with a connection of this gateway is best.
            let rank = keeper.map_or(1, |keeper| if keeper == gateway { 0 } else { 2 });
            if free.is_none_or(|(best, ..)| rank < best) {
                free = Some((rank, unit, word));
            }
        } else {
            busy += 1;
        }
    }
    let (rank, unit, word) = free?;
    Some(Candidate { process, busy, is_kept_elsewhere: rank == 2, idle_us, door, unit, word })
}

fn pid_of(row: ProcessRow<'_>) -> u32 {
    u32::try_from(row.pid.load(Ordering::SeqCst)).unwrap_or(0)
}

#[cfg(test)]
mod tests;
