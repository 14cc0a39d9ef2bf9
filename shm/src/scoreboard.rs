//! The scoreboard: what each process is doing, readable by all, also after its death.
//!
//! One row for each process, on cache lines of its own and written by its owner only, with plain atomic stores; there is
//! no lock. Whoever reads a row reads gossip: numbers a moment apart, text that may be torn between two requests. So the
//! reader bounds, replaces and cuts, and never lets a decision hang on the text.
//!
//! May not: lock, allocate or make a system call in `begin` or at its end: they are in the path of every request.

use std::cell::Cell as Local;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::clock::monotonic_ms;
use crate::layout::{CELLS, Cell, ROW_BYTES, RowCells, TEXT_WORDS};
use crate::segment::Inner;

/// Bytes of "GET /path" that a row has room for.
const TEXT_BYTES: usize = TEXT_WORDS * 8;
/// A row that is claimed by another process while it is read is read again, so many times at most.
const READS: usize = 3;

/// A handle of the scoreboard; cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub struct Scoreboard {
    segment: Arc<Inner>,
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
    segment: Arc<Inner>,
    at: u64,
    epoch: u64,
}

/// Says of a row's process, from any of its threads and from signal handlers, whether its event loop gets on, and which
/// request a crash is due to.
#[derive(Clone, Debug)]
pub struct Pulse {
    segment: Arc<Inner>,
    at: u64,
    epoch: u64,
}

/// What all clones of a row share; of this process alone.
#[derive(Debug)]
struct Holding {
    segment: Arc<Inner>,
    at: u64,
    epoch: u64,
    /// One bit for each cell in use.
    used: Local<u16>,
}

/// A request being served. Dropping it ends the request.
#[derive(Debug)]
#[must_use = "the request counts as served when this is dropped"]
pub struct InFlight {
    held: Rc<Holding>,
    /// `None` if all cells were in use.
    cell: Option<usize>,
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
    /// The one of them that the crashing thread was at work on, if that is known.
    pub culprit: Option<String>,
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
    /// The place in the row that it holds: see [`InFlight::cell`].
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
    pub(crate) fn new(segment: Arc<Inner>) -> Scoreboard {
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
        row.culprit.store(0, Ordering::Relaxed);
        row.busy_ms.store(0, Ordering::Relaxed);
        row.loop_thread.store(0, Ordering::Relaxed);
        row.started_ms.store(monotonic_ms(), Ordering::Relaxed);
        row.generation.store(generation, Ordering::Relaxed);
        row.pid.store(pid, Ordering::Relaxed);
        row.state.store(State::Starting.to_word(), Ordering::Release);
        let held = Holding { segment: Arc::clone(&self.segment), at, epoch, used: Local::new(0) };
        Some(Row { held: Rc::new(held) })
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
    pub fn bury(&self, slot: u32, pid: u32) {
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
    pub fn pulse(&self) -> Pulse {
        let Holding { segment, at, epoch, .. } = &*self.held;
        Pulse { segment: Arc::clone(segment), at: *at, epoch: *epoch }
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
        let mut cell = None;
        if let Some(row) = self.held.row() {
            step(&row.in_flight, 1);
            cell = self.held.take_cell();
            if let Some(words) = cell.and_then(|index| row.cells.get(index)) {
                words.fill(method, target);
            }
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
        let row: Option<&RowCells> = self.segment.map.at(self.at);
        if let Some(row) = row.filter(|row| row.epoch.load(Ordering::Relaxed) == self.epoch) {
            row.occupied.store(occupied.into(), Ordering::SeqCst);
        }
    }
}

impl Pulse {
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

    /// This process is about to die, and the thread that crashed was at work on the request in `cell`. Async-signal-safe.
    pub fn accuse(&self, cell: usize) {
        if let (Some(row), Ok(word)) = (self.row(), u32::try_from(cell + 1)) {
            row.culprit.store(word, Ordering::Relaxed);
        }
    }

    fn row(&self) -> Option<&RowCells> {
        let row: Option<&RowCells> = self.segment.map.at(self.at);
        row.filter(|row| row.epoch.load(Ordering::Relaxed) == self.epoch)
    }
}

impl InFlight {
    /// The place in the row that it holds; `None` if the row had no room for it.
    pub fn cell(&self) -> Option<usize> {
        self.cell
    }

    /// The event loop got on with something.
    pub fn beat(&self) {
        if let Some(row) = self.held.row() {
            row.pulse.store(row.pulse.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// What is being served, as the scoreboard has it: "GET /path", cut. Empty if the row had no room for it.
    pub fn what(&self) -> String {
        let cell = self.cell.and_then(|index| self.held.row()?.cells.get(index));
        cell.and_then(|cell| cell.read(0, monotonic_ms())).map(|request| request.what).unwrap_or_default()
    }
}

impl InFlight {
    /// From here on the request is none of those that are being served, but an event stream, which keeps nobody at work. It
    /// counts as served when this is dropped.
    pub fn becomes_stream(&mut self) {
        if !std::mem::replace(&mut self.is_stream, true) {
            self.leave();
            self.held.row().inspect(|row| step(&row.streams, 1));
        }
    }

    /// Gives its place up.
    fn leave(&mut self) {
        let cell = self.cell.take();
        if let Some(index) = cell {
            self.held.used.set(self.held.used.get() & !(1 << index));
        }
        let Some(row) = self.held.row() else { return };
        if let Some(words) = cell.and_then(|index| row.cells.get(index)) {
            words.stamp_ms.store(0, Ordering::Release);
        }
        step(&row.in_flight, -1);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.is_stream {
            self.leave();
        }
        let Some(row) = self.held.row() else { return };
        if self.is_stream {
            step(&row.streams, -1);
        }
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

    fn take_cell(&self) -> Option<usize> {
        let used = self.used.get();
        let index = used.trailing_ones() as usize;
        if index >= CELLS {
            return None;
        }
        self.used.set(used | 1 << index);
        Some(index)
    }
}

impl Cell {
    /// The stamp goes last: a reader that finds it set finds the text too, or a later one.
    fn fill(&self, method: &str, target: &str) {
        let mut text = [0; TEXT_BYTES];
        let mut length = 0;
        for part in [method, " ", target] {
            let room = &mut text[length..];
            let taken = part.len().min(room.len());
            room[..taken].copy_from_slice(&part.as_bytes()[..taken]);
            length += taken;
        }
        for (word, bytes) in self.text.iter().zip(text[..length].chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
        }
        self.length.store(length as u64, Ordering::Relaxed);
        self.stamp_ms.store(monotonic_ms(), Ordering::Release);
    }

    /// `None` if the cell is free, or was reused while it was read.
    fn read(&self, index: usize, now_ms: u64) -> Option<Serving> {
        let stamp_ms = self.stamp_ms.load(Ordering::Acquire);
        if stamp_ms == 0 {
            return None;
        }
        let length = usize::try_from(self.length.load(Ordering::Relaxed)).unwrap_or(TEXT_BYTES);
        let bytes = self.text.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes());
        let what = bytes.take(length).map(printable).collect();
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
        let culprit = usize::try_from(row.culprit.load(Ordering::Relaxed)).unwrap_or(0).checked_sub(1);
        let culprit = culprit.and_then(|index| serving.iter().find(|request| request.cell == index));
        let culprit = culprit.map(|request| request.what.clone());
        let busy_ms = row.busy_ms.load(Ordering::Relaxed);
        serving.sort_by_key(|request| std::cmp::Reverse(request.since));
        let pid = row.pid.load(Ordering::Relaxed);
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

/// What cannot be printed, or could play tricks with a terminal or a log, becomes a question mark.
fn printable(byte: u8) -> char {
    if byte.is_ascii_graphic() || byte == b' ' { char::from(byte) } else { '?' }
}

#[cfg(test)]
mod tests;
