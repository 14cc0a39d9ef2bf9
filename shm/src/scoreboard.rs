//! The scoreboard: what each process is doing, readable by all, also after its death.
//!
//! One row for each process, on cache lines of its own and written by its owner only, with plain atomic stores; there is
//! no lock. Whoever reads a row reads gossip: numbers a moment apart, text that may be torn between two requests. So the
//! reader bounds, replaces and cuts, and never lets a decision hang on the text.
//!
//! - [`thread_slot`]: what each thread is at work on.
//! - [`surplus`]: the requests that a row has no room for.
//! - [`text`]: how a request is written down.
//!
//! May not: lock, allocate or make a system call in `begin` or at its end: they are in the path of every request.

pub(crate) mod quarantine;
mod surplus;
mod text;
pub(crate) mod thread_slot;

use std::cell::{Cell as Local, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use self::surplus::Surplus;
pub use self::text::request_text;
pub use self::thread_slot::{Before, ThreadSlot};
use self::thread_slot::{KNOWN, NOBODY};
use crate::memory::SharedMemory;
use crate::memory::clock::monotonic_ms;
use crate::memory::layout::{CELLS, Cell, ROW_BYTES, RowCells};

/// In the word of hung threads: there is no other thread.
const ALL_HANG: u32 = 1 << 31;

/// A row that is claimed by another process while it is read is read again, so many times at most.
const READS: usize = 3;

/// A handle of the scoreboard; cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub struct Scoreboard {
    segment: Arc<SharedMemory>,
}

/// What a process is doing, as it says itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Nobody is here.
    Empty,
    /// Started, not yet serving.
    Starting,
    /// Serving.
    Ready,
    /// Finishing what it has, taking nothing new.
    Draining,
}

/// How busy a process is. The less it is, the smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    /// A further request would have to wait: see [`Occupancy`].
    pub occupied: bool,
    /// Connections open.
    pub connections: u32,
}

/// A row, held by the process that it tells about, on the thread that serves.
///
/// To be claimed after the fork, by the process itself. Once somebody else has claimed the row, what its former holder
/// does has no effect.
#[derive(Clone, Debug)]
pub struct Row {
    held: Rc<Holding>,
}

/// Whether all threads of a row's process are occupied, to be said from any of them.
#[derive(Clone, Debug)]
pub struct Occupancy {
    segment: Arc<SharedMemory>,
    at: u64,
    epoch: u64,
}

/// Says of a row's process, from any of its threads and from signal handlers, whether its event loop gets on, and what
/// each thread is at work on.
#[derive(Clone, Debug)]
pub struct EventLoopBeat {
    segment: Arc<SharedMemory>,
    at: u64,
    epoch: u64,
    surplus: Arc<Surplus>,
}

/// What all clones of a row share; of this process alone.
#[derive(Debug)]
struct Holding {
    segment: Arc<SharedMemory>,
    at: u64,
    epoch: u64,
    /// One bit for each cell of the row that is in use.
    used: Local<u16>,
    surplus: Arc<Surplus>,
    /// Cells of the surplus that were made and are free, and how many were made.
    free: RefCell<Vec<usize>>,
    made: Local<usize>,
}

/// A request being served. Dropping it ends the request.
#[derive(Debug)]
#[must_use = "the request counts as served when this is dropped"]
pub struct InFlight {
    held: Rc<Holding>,
    /// Beyond those of the row, of the surplus.
    cell: usize,
    is_stream: bool,
}

/// What a row said at some moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Process id; 0 if nobody ever claimed the row.
    pub pid: u32,
    /// Generation that the process belongs to.
    pub generation: u64,
    /// What it is doing.
    pub state: State,
    /// How long ago it claimed the row.
    pub started: Duration,
    /// Requests served since.
    pub requests: u64,
    /// Connections open.
    pub connections: u32,
    /// Requests being served.
    pub in_flight: u32,
    /// Event streams, which are none of those.
    pub streams: u32,
    /// The requests being served, at most 16 of them, the oldest first.
    pub serving: Vec<Serving>,
    /// The request that the crashing thread was at work on, if that is known. It need not be one of `serving`.
    pub culprit: Option<String>,
    /// The thread that crashed was at work on no request.
    pub no_culprit: bool,
    /// The requests that threads are at work on, while all others wait for something. They need not be in `serving`.
    pub running: Vec<String>,
    /// Whether those are all: a row has 16 thread slots for threads.
    pub all_running: bool,
    /// Threads whose function hangs; and whether those are all threads, so that no request that needs one is served.
    pub hung_threads: u32,
    /// See `hung_threads`.
    pub all_hang: bool,
    /// Since when its event loop has been at work without a pause, in milliseconds of a clock that stands still in
    /// suspend; `None` if it sleeps.
    pub busy_since_ms: Option<u64>,
    /// Differs from what it was if something has been done since.
    pub pulse: u32,
    /// The thread id of the event loop; 0 if it did not tell.
    pub loop_thread: u32,
}

/// A request being served.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Serving {
    /// Method and target, as in `GET /path`; printable ASCII, cut to 112 bytes.
    pub what: String,
    /// For how long.
    pub since: Duration,
    /// The cell that it holds: see [`InFlight::cell`].
    pub cell: usize,
    /// When it began, in milliseconds of a clock that stands still in suspend.
    pub begun_ms: u64,
}

impl State {
    fn to_word(self) -> u32 {
        match self {
            State::Empty => 0,
            State::Starting => 1,
            State::Ready => 2,
            State::Draining => 3,
        }
    }

    /// Reads what is in a row; what is unknown counts as empty.
    fn from_word(word: u32) -> State {
        match word {
            1 => State::Starting,
            2 => State::Ready,
            3 => State::Draining,
            0 | 4.. => State::Empty,
        }
    }
}

impl Scoreboard {
    pub(crate) fn new(segment: Arc<SharedMemory>) -> Scoreboard {
        Scoreboard { segment }
    }

    /// How many rows there are.
    pub fn rows(&self) -> u32 {
        self.segment.geometry.rows
    }

    /// Takes a row for this process and resets it; `None` if there is no such row.
    ///
    /// The caller sees to it that the row's former owner is gone, or at least is not to be heard any more.
    pub fn claim(&self, slot: u32, pid: u32, generation: u64) -> Option<Row> {
        let (at, row) = self.row(slot)?;
        let epoch = row.epoch.fetch_add(1, Ordering::AcqRel) + 1;
        for cell in &row.cells {
            cell.stamp_ms.store(0, Ordering::Relaxed);
        }
        row.requests.store(0, Ordering::Relaxed);
        row.connections.store(0, Ordering::Relaxed);
        row.in_flight.store(0, Ordering::Relaxed);
        row.streams.store(0, Ordering::Relaxed);
        row.occupied.store(0, Ordering::Relaxed);
        row.hung.store(0, Ordering::Relaxed);
        row.culprit.stamp_ms.store(0, Ordering::Relaxed);
        row.registered_threads.store(0, Ordering::Relaxed);
        for thread_slot in &row.threads {
            thread_slot.current.store(0, Ordering::Relaxed);
        }
        row.busy_ms.store(0, Ordering::Relaxed);
        row.loop_thread.store(0, Ordering::Relaxed);
        row.started_ms.store(monotonic_ms(), Ordering::Relaxed);
        row.generation.store(generation, Ordering::Relaxed);
        row.pid.store(pid, Ordering::Relaxed);
        row.state.store(State::Starting.to_word(), Ordering::Release);
        let (segment, surplus) = (Arc::clone(&self.segment), Arc::default());
        let (used, free, made) = (Local::new(0), RefCell::default(), Local::new(0));
        Some(Row { held: Rc::new(Holding { segment, at, epoch, used, surplus, free, made }) })
    }

    /// What a row says now; `None` if there is no such row.
    pub fn read(&self, slot: u32) -> Option<Snapshot> {
        let (_, row) = self.row(slot)?;
        let mut snapshot = None;
        for _ in 0..READS {
            let epoch = row.epoch.load(Ordering::Acquire);
            snapshot = Some(Snapshot::of(row, monotonic_ms()));
            if row.epoch.load(Ordering::Acquire) == epoch {
                break;
            }
        }
        snapshot
    }

    /// Marks the row of a process that is dead, if it was that process's: for whoever reaps it. The rest of the
    /// row stays, to be read.
    pub fn mark_dead(&self, slot: u32, pid: u32) {
        if let Some((_, row)) = self.row(slot)
            && row.pid.load(Ordering::Relaxed) == pid
        {
            row.state.store(State::Empty.to_word(), Ordering::Release);
        }
    }

    /// How busy the freest of the serving processes is, apart from the one in `slot`. `None` if no other is serving.
    pub fn freest(&self, slot: u32) -> Option<Load> {
        let others = (0..self.rows()).filter(|&other| other != slot).filter_map(|other| self.row(other));
        let serving = others.filter(|(_, row)| State::from_word(row.state.load(Ordering::Relaxed)) == State::Ready);
        serving.map(|(_, row)| Load::of(row)).min()
    }

    /// Makes all rows empty: for a segment that nobody uses yet.
    pub(crate) fn reset(&self) {
        for (_, row) in (0..self.rows()).filter_map(|slot| self.row(slot)) {
            row.pid.store(0, Ordering::Relaxed);
            row.state.store(State::Empty.to_word(), Ordering::Release);
        }
    }

    fn row(&self, slot: u32) -> Option<(u64, &RowCells)> {
        if slot >= self.rows() {
            return None;
        }
        let at = self.segment.geometry.rows_at + u64::from(slot) * ROW_BYTES;
        Some((at, self.segment.map.at(at)?))
    }
}

impl Load {
    fn of(row: &RowCells) -> Load {
        let occupied = row.occupied.load(Ordering::Relaxed) != 0;
        Load { occupied, connections: row.connections.load(Ordering::Relaxed) }
    }
}

impl Row {
    /// Says what the process is doing now.
    pub fn set_state(&self, state: State) {
        if let Some(row) = self.held.row() {
            row.state.store(state.to_word(), Ordering::Release);
        }
    }

    /// For the threads of the process, to say whether they all are occupied.
    pub fn occupancy(&self) -> Occupancy {
        let Holding { segment, at, epoch, .. } = &*self.held;
        Occupancy { segment: Arc::clone(segment), at: *at, epoch: *epoch }
    }

    /// For the event loop, and for signal handlers.
    pub fn event_loop_beat(&self) -> EventLoopBeat {
        let Holding { segment, at, epoch, surplus, .. } = &*self.held;
        EventLoopBeat { segment: Arc::clone(segment), at: *at, epoch: *epoch, surplus: Arc::clone(surplus) }
    }

    /// The event loop got on with something.
    pub fn beat(&self) {
        if let Some(row) = self.held.row() {
            row.pulse.store(row.pulse.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// A connection was accepted.
    pub fn connection_opened(&self) {
        if let Some(row) = self.held.row() {
            step(&row.connections, 1);
        }
    }

    /// A connection is gone.
    pub fn connection_closed(&self) {
        if let Some(row) = self.held.row() {
            step(&row.connections, -1);
        }
    }

    /// A request is being served from now until what this returns is dropped.
    pub fn begin(&self, method: &str, target: &str) -> InFlight {
        let row = self.held.row();
        let cell = row.and_then(|_| self.held.take_shown()).unwrap_or_else(|| self.held.take_surplus());
        if let Some(row) = row {
            step(&row.in_flight, 1);
        }
        if let Some(words) = self.held.cell(cell) {
            words.fill(method, target);
        }
        InFlight { held: Rc::clone(&self.held), cell, is_stream: false }
    }

    /// Requests served since the row was claimed.
    pub fn requests(&self) -> u64 {
        self.held.row().map_or(0, |row| row.requests.load(Ordering::Relaxed))
    }
}

impl Occupancy {
    /// Says whether a further request would have to wait.
    pub fn set(&self, occupied: bool) {
        if let Some(row) = self.row() {
            row.occupied.store(occupied.into(), Ordering::SeqCst);
        }
    }

    /// Says how many threads hang, and whether those are all.
    pub fn set_hung(&self, threads: u32, all: bool) {
        if let Some(row) = self.row() {
            row.hung.store(threads & !ALL_HANG | if all { ALL_HANG } else { 0 }, Ordering::Relaxed);
        }
    }

    fn row(&self) -> Option<&RowCells> {
        let row: Option<&RowCells> = self.segment.map.at(self.at);
        row.filter(|row| row.epoch.load(Ordering::Relaxed) == self.epoch)
    }
}

impl EventLoopBeat {
    /// The event loop runs on the thread with this id.
    pub fn runs_on(&self, thread: u32) {
        if let Some(row) = self.row() {
            row.loop_thread.store(thread, Ordering::Relaxed);
        }
    }

    /// The event loop goes to work.
    pub fn work(&self) {
        if let Some(row) = self.row() {
            row.busy_ms.store(monotonic_ms(), Ordering::Relaxed);
        }
    }

    /// The event loop has nothing to do, and sleeps.
    pub fn sleep(&self) {
        if let Some(row) = self.row() {
            row.busy_ms.store(0, Ordering::Relaxed);
        }
    }

    fn row(&self) -> Option<&RowCells> {
        let row: Option<&RowCells> = self.segment.map.at(self.at);
        row.filter(|row| row.epoch.load(Ordering::Relaxed) == self.epoch)
    }
}

impl InFlight {
    /// The cell that it holds, until it becomes a stream. The row shows the first 16; further ones are in this process's own
    /// memory.
    pub fn cell(&self) -> usize {
        self.cell
    }

    /// The event loop got on with something.
    pub fn beat(&self) {
        if let Some(row) = self.held.row() {
            row.pulse.store(row.pulse.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// What is being served: "GET /path", as [`request_text`] makes it. A hyphen if another process has taken the row.
    pub fn what(&self) -> String {
        let text = self.held.cell(self.cell).map(|cell| cell.text.read());
        text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".to_owned())
    }

    /// From here on the request is none of those that are being served, but an event stream, which keeps nobody at work. It
    /// counts as served when this is dropped.
    pub fn becomes_stream(&mut self) {
        if std::mem::replace(&mut self.is_stream, true) {
            return;
        }
        let cell = self.held.take_surplus();
        if let (Some(from), Some(to)) = (self.held.cell(self.cell), self.held.cell(cell)) {
            to.text.copy_from(&from.text);
        }
        self.leave();
        self.cell = cell;
        self.held.row().inspect(|row| step(&row.streams, 1));
    }

    /// Is served no longer, and gives its cell up.
    fn leave(&mut self) {
        self.held.give_back(self.cell);
        self.held.row().inspect(|row| step(&row.in_flight, -1));
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.is_stream {
            self.held.give_back(self.cell);
            self.held.row().inspect(|row| step(&row.streams, -1));
        } else {
            self.leave();
        }
        let Some(row) = self.held.row() else { return };
        let served = row.requests.load(Ordering::Relaxed);
        row.requests.store(served.wrapping_add(1), Ordering::Relaxed);
    }
}

impl Holding {
    /// The row, as long as nobody else claimed it.
    fn row(&self) -> Option<&RowCells> {
        let row: &RowCells = self.segment.map.at(self.at)?;
        (row.epoch.load(Ordering::Relaxed) == self.epoch).then_some(row)
    }

    /// A cell that the row shows.
    fn take_shown(&self) -> Option<usize> {
        let used = self.used.get();
        let index = used.trailing_ones() as usize;
        if index >= CELLS {
            return None;
        }
        self.used.set(used | 1 << index);
        Some(index)
    }

    /// One of this process's own. They are used again; only where more are in use than ever before is one made.
    #[cold]
    fn take_surplus(&self) -> usize {
        let number = self.free.borrow_mut().pop().unwrap_or_else(|| {
            let number = self.made.get();
            self.surplus.make(number);
            self.made.set(number + 1);
            number
        });
        CELLS + number
    }

    fn give_back(&self, index: usize) {
        if index >= CELLS {
            return self.free.borrow_mut().push(index - CELLS);
        }
        self.used.set(self.used.get() & !(1 << index));
        if let Some(words) = self.cell(index) {
            words.stamp_ms.store(0, Ordering::Release);
        }
    }

    fn cell(&self, index: usize) -> Option<&Cell> {
        match index.checked_sub(CELLS) {
            None => self.row()?.cells.get(index),
            Some(number) => self.surplus.cell(number),
        }
    }
}

impl Cell {
    /// The stamp goes last: a reader that finds it set finds the text too, or a later one.
    fn fill(&self, method: &str, target: &str) {
        self.text.put(method, target);
        self.stamp_ms.store(monotonic_ms(), Ordering::Release);
    }

    /// `None` if the cell is free, or was reused while it was read.
    fn read(&self, index: usize, now_ms: u64) -> Option<Serving> {
        let stamp_ms = self.stamp_ms.load(Ordering::Acquire);
        if stamp_ms == 0 {
            return None;
        }
        let what = self.text.read();
        if self.stamp_ms.load(Ordering::Acquire) != stamp_ms {
            return None;
        }
        let since = Duration::from_millis(now_ms.saturating_sub(stamp_ms));
        Some(Serving { what, since, cell: index, begun_ms: stamp_ms })
    }
}

impl Snapshot {
    fn of(row: &RowCells, now_ms: u64) -> Snapshot {
        let cells = row.cells.iter().enumerate();
        let mut serving: Vec<Serving> = cells.filter_map(|(index, cell)| cell.read(index, now_ms)).collect();
        let found = row.culprit.stamp_ms.load(Ordering::Acquire);
        let culprit = (found == KNOWN).then(|| row.culprit.text.read()).filter(|text| !text.is_empty());
        let threads = row.threads.iter().filter_map(|thread_slot| thread_slot.read(row));
        let busy_ms = row.busy_ms.load(Ordering::Relaxed);
        serving.sort_by_key(|request| std::cmp::Reverse(request.since));
        let pid = row.pid.load(Ordering::Relaxed);
        let hung = row.hung.load(Ordering::Relaxed);
        let started_ms = if pid == 0 { now_ms } else { row.started_ms.load(Ordering::Relaxed) };
        Snapshot {
            pid,
            generation: row.generation.load(Ordering::Relaxed),
            state: State::from_word(row.state.load(Ordering::Acquire)),
            started: Duration::from_millis(now_ms.saturating_sub(started_ms)),
            requests: row.requests.load(Ordering::Relaxed),
            connections: row.connections.load(Ordering::Relaxed),
            in_flight: row.in_flight.load(Ordering::Relaxed),
            streams: row.streams.load(Ordering::Relaxed),
            serving,
            culprit,
            no_culprit: found == NOBODY,
            running: threads.filter(|text| !text.is_empty()).collect(),
            all_running: row.registered_threads.load(Ordering::Relaxed) as usize <= row.threads.len(),
            hung_threads: hung & !ALL_HANG,
            all_hang: hung & ALL_HANG != 0,
            busy_since_ms: (busy_ms != 0).then_some(busy_ms),
            pulse: row.pulse.load(Ordering::Relaxed),
            loop_thread: row.loop_thread.load(Ordering::Relaxed),
        }
    }
}

/// Counts up or down, in a word that only this thread writes. Does not fall below 0.
fn step(word: &AtomicU32, by: i32) {
    word.store(word.load(Ordering::Relaxed).saturating_add_signed(by), Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
