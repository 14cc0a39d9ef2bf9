//! The scoreboard shows what each process is doing. All processes can read it, even after the death of the process that it describes.
//!
//! There is one row per process, in its own cache lines. Only the row's owner writes it, with plain atomic stores; there is no lock. The
//! values that a reader obtains are unreliable: numbers may be slightly inconsistent, and text may be torn between two requests. The reader
//! therefore limits and sanitizes everything, and bases no decision on the text.
//!
//! - [`thread_slot`]: the request that each thread is processing.
//! - [`surplus`]: the requests for which a row has no room.
//! - [`text`]: the text form of a request.
//!
//! `begin`, and dropping the value that it returns, must not lock, allocate or make a system call, because every request passes through
//! them.

pub(crate) mod quarantine;
mod surplus;
pub(crate) mod text;
pub(crate) mod thread_slot;

use std::cell::{Cell as Local, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use self::surplus::Surplus;
pub use self::text::request_text;
pub use self::thread_slot::{Before, ThreadSlot};
use self::thread_slot::{CULPRIT_KNOWN, NO_REQUEST};
use crate::memory::SharedMemory;
use crate::memory::clock::monotonic_ms;
use crate::memory::layout::{CELLS, Cell, ROW_BYTES, RowCells};

/// The bit in the word of hung threads that is set if all threads have hung.
const ALL_HANG: u32 = 1 << 31;

/// Maximum number of attempts to read a row, if a process claims the row during each attempt.
const READS: usize = 3;

/// A handle to the scoreboard. Cheap to clone, and usable from any thread.
#[derive(Clone, Debug)]
pub struct Scoreboard {
    segment: Arc<SharedMemory>,
}

/// What a process is doing, as reported by the process itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The row is not in use.
    Empty,
    /// Started, but not serving yet.
    Starting,
    /// Serving.
    Ready,
    /// Finishing its requests, and no longer accepting new ones.
    Draining,
}

/// How busy a process is; a less busy process compares as smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    /// Whether another request would have to wait: see [`Occupancy`].
    pub occupied: bool,
    /// Number of open connections.
    pub connections: u32,
}

/// A row, held by the process that it describes, on the thread that serves requests.
///
/// A row must be claimed after the fork, by the process itself. Once another process has claimed the row, operations by the former holder
/// have no effect.
#[derive(Clone, Debug)]
pub struct Row {
    held: Rc<Holding>,
}

/// Reports whether all threads of a row's process are occupied. Usable from any of these threads.
#[derive(Clone, Debug)]
pub struct Occupancy {
    segment: Arc<SharedMemory>,
    at: u64,
    epoch: u64,
}

/// Reports whether the event loop of a row's process makes progress, and what each thread is processing. Usable from any thread
/// of the process and from signal handlers.
#[derive(Clone, Debug)]
pub struct EventLoopBeat {
    segment: Arc<SharedMemory>,
    at: u64,
    epoch: u64,
    surplus: Arc<Surplus>,
}

/// The state shared by all clones of a row; private to this process.
#[derive(Debug)]
struct Holding {
    segment: Arc<SharedMemory>,
    at: u64,
    epoch: u64,
    /// One bit per cell of the row. The bit is set if the cell is in use.
    used: Local<u16>,
    surplus: Arc<Surplus>,
    /// The free cells of the surplus, and the number of cells created.
    free: RefCell<Vec<usize>>,
    made: Local<usize>,
}

/// A request that is being served. Dropping this value ends the request.
#[derive(Debug)]
#[must_use = "the request counts as served when this is dropped"]
pub struct InFlight {
    held: Rc<Holding>,
    /// Cells beyond those of the row belong to the surplus.
    cell: usize,
    is_stream: bool,
}

/// The content of a row at some moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Process id; 0 if no process has ever claimed the row.
    pub pid: u32,
    /// The generation to which the process belongs.
    pub generation: u64,
    /// What the process was doing.
    pub state: State,
    /// Time since the process claimed the row.
    pub started: Duration,
    /// Number of requests served since the process claimed the row.
    pub requests: u64,
    /// Number of open connections.
    pub connections: u32,
    /// Number of requests being served.
    pub in_flight: u32,
    /// Number of open event streams, which are not included in `in_flight`.
    pub streams: u32,
    /// The requests being served, oldest first, up to 16 of them.
    pub serving: Vec<Serving>,
    /// The request that the crashing thread was processing, if known. It is not necessarily one of `serving`.
    pub culprit: Option<String>,
    /// Whether the crash was in a thread that was processing no request.
    pub no_culprit: bool,
    /// The requests that threads are running; all other requests are waiting. They are not necessarily in `serving`.
    pub running: Vec<String>,
    /// Whether `running` is complete. It may be incomplete, because a row has only 16 thread slots.
    pub all_running: bool,
    /// Number of threads whose function has hung.
    pub hung_threads: u32,
    /// Whether all threads have hung, in which case no request that requires a thread is served.
    pub all_hang: bool,
    /// When the event loop last became busy, in milliseconds of a clock that stops during suspend; `None` if the event loop is sleeping.
    pub busy_since_ms: Option<u64>,
    /// A number that changes whenever the event loop makes progress.
    pub pulse: u32,
    /// The thread id of the event loop; 0 if it has not been reported.
    pub loop_thread: u32,
}

/// A request that is being served.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Serving {
    /// Method and target, as in `GET /path`; printable ASCII, truncated to 112 bytes.
    pub what: String,
    /// Time since the request began.
    pub since: Duration,
    /// The cell of the request: see [`InFlight::cell`].
    pub cell: usize,
    /// When the request began, in milliseconds of a clock that stops during suspend.
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

    /// Decodes a row's state. Unknown values count as empty.
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

    /// Returns the number of rows.
    pub fn rows(&self) -> u32 {
        self.segment.geometry.rows
    }

    /// Claims a row for this process and resets it. Returns `None` if there is no such row.
    ///
    /// The caller must ensure that the row's former owner is gone, or that its reports may be lost.
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
        if let Some(header) = self.segment.header() {
            header.claimed_rows.fetch_max(slot.saturating_add(1), Ordering::Relaxed);
        }
        let (segment, surplus) = (Arc::clone(&self.segment), Arc::default());
        let (used, free, made) = (Local::new(0), RefCell::default(), Local::new(0));
        Some(Row { held: Rc::new(Holding { segment, at, epoch, used, surplus, free, made }) })
    }

    /// Reads a row. Returns `None` if there is no such row.
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

    /// Marks the row of a dead process, if the row still belongs to that process. Must be called when the process is reaped. Everything
    /// else in the row can still be read.
    pub fn mark_dead(&self, slot: u32, pid: u32) {
        if let Some((_, row)) = self.row(slot)
            && row.pid.load(Ordering::Relaxed) == pid
        {
            row.state.store(State::Empty.to_word(), Ordering::Release);
        }
    }

    /// Returns the load of the least busy serving process other than the process in `slot`, or `None` if no other process is serving.
    pub fn freest(&self, slot: u32) -> Option<Load> {
        // This is called for each accepted connection, so rows that have never been claimed are skipped.
        let claimed = self.segment.header().map_or(0, |header| header.claimed_rows.load(Ordering::Relaxed));
        let others = (0..claimed.min(self.rows())).filter(|&other| other != slot).filter_map(|other| self.row(other));
        let serving = others.filter(|(_, row)| State::from_word(row.state.load(Ordering::Relaxed)) == State::Ready);
        serving.map(|(_, row)| Load::of(row)).min()
    }

    /// Empties all rows, for a segment that no process uses yet.
    pub(crate) fn reset(&self) {
        if let Some(header) = self.segment.header() {
            header.claimed_rows.store(0, Ordering::Relaxed);
        }
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
    /// Reports what the process is doing now.
    pub fn set_state(&self, state: State) {
        if let Some(row) = self.held.row() {
            row.state.store(state.to_word(), Ordering::Release);
        }
    }

    /// Returns a handle with which the threads of the process report whether all of them are occupied.
    pub fn occupancy(&self) -> Occupancy {
        let Holding { segment, at, epoch, .. } = &*self.held;
        Occupancy { segment: Arc::clone(segment), at: *at, epoch: *epoch }
    }

    /// Returns a handle for the event loop and for signal handlers.
    pub fn event_loop_beat(&self) -> EventLoopBeat {
        let Holding { segment, at, epoch, surplus, .. } = &*self.held;
        EventLoopBeat { segment: Arc::clone(segment), at: *at, epoch: *epoch, surplus: Arc::clone(surplus) }
    }

    /// Records that the event loop has made progress.
    pub fn beat(&self) {
        if let Some(row) = self.held.row() {
            row.pulse.store(row.pulse.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// Counts a connection that was accepted.
    pub fn connection_opened(&self) {
        if let Some(row) = self.held.row() {
            step(&row.connections, 1);
        }
    }

    /// Counts a connection that was closed.
    pub fn connection_closed(&self) {
        if let Some(row) = self.held.row() {
            step(&row.connections, -1);
        }
    }

    /// Records that a request is being served, until the returned value is dropped.
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

    /// Returns the number of requests served since the row was claimed.
    pub fn requests(&self) -> u64 {
        self.held.row().map_or(0, |row| row.requests.load(Ordering::Relaxed))
    }
}

impl Occupancy {
    /// Sets whether another request would have to wait.
    pub fn set(&self, occupied: bool) {
        if let Some(row) = self.row() {
            row.occupied.store(occupied.into(), Ordering::SeqCst);
        }
    }

    /// Sets how many threads have hung, and whether all threads have hung.
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
    /// Records the thread id of the event loop.
    pub fn runs_on(&self, thread: u32) {
        if let Some(row) = self.row() {
            row.loop_thread.store(thread, Ordering::Relaxed);
        }
    }

    /// Records that the event loop begins to work.
    pub fn work(&self) {
        if let Some(row) = self.row() {
            row.busy_ms.store(monotonic_ms(), Ordering::Relaxed);
        }
    }

    /// Records that the event loop is about to sleep because it has nothing to do.
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
    /// Returns the cell of the request, until the request becomes a stream. The row contains the first 16 cells; further cells are in this
    /// process's private memory.
    pub fn cell(&self) -> usize {
        self.cell
    }

    /// Records that the event loop has made progress.
    pub fn beat(&self) {
        if let Some(row) = self.held.row() {
            row.pulse.store(row.pulse.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// Returns the request that is being served, such as "GET /path", in the form of [`request_text`]. Returns a hyphen if another process
    /// has claimed the row.
    pub fn what(&self) -> String {
        let text = self.held.cell(self.cell).map(|cell| cell.text.read());
        text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".to_owned())
    }

    /// Turns the request into an event stream. A stream occupies no thread and does not count as in flight. It counts as a served request
    /// when this value is dropped.
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

    /// Removes the request from the requests in flight, and frees its cell.
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
    /// Returns the row, unless another process has claimed it.
    fn row(&self) -> Option<&RowCells> {
        let row: &RowCells = self.segment.map.at(self.at)?;
        (row.epoch.load(Ordering::Relaxed) == self.epoch).then_some(row)
    }

    /// Takes a free cell of the row.
    fn take_shown(&self) -> Option<usize> {
        let used = self.used.get();
        let index = used.trailing_ones() as usize;
        if index >= CELLS {
            return None;
        }
        self.used.set(used | 1 << index);
        Some(index)
    }

    /// Takes a cell of this process's surplus. Cells are reused; a new cell is created only if more cells are in use than ever before.
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
    /// Fills the cell. The stamp is stored last, so a reader that finds it set also finds the text, or a later text.
    fn fill(&self, method: &str, target: &str) {
        self.text.put(method, target);
        self.stamp_ms.store(monotonic_ms(), Ordering::Release);
    }

    /// Reads a cell. Returns `None` if the cell is free, or was reused while it was being read.
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
        let culprit = (found == CULPRIT_KNOWN).then(|| row.culprit.text.read()).filter(|text| !text.is_empty());
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
            no_culprit: found == NO_REQUEST,
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

/// Adds `by` to a word that only this thread writes. The word does not go below 0.
fn step(word: &AtomicU32, by: i32) {
    word.store(word.load(Ordering::Relaxed).saturating_add_signed(by), Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
