//! The memory of the table of claims: a sealed memory file of its own, which consists of atomic words only.
//!
//! ```text
//! header    0 magic 8 | 8 version 8 | 16 fingerprint 8 | 24 processes 8 | 32 units 8 | 40 gateways 8
//! process   (at 64) 0 door 8 | 8 pid 8 | 16 begun 8 | 24 since_us 8 | 32 units n x 8 | kept n x 8, padded to 64
//! gateway   0 waiting 8 | 8 pid 8 | 16 turn 8 | 24 unused 40
//! request   0 begun_us 8 | 8 length of the text 8 | 16 text 112
//! ```
//! There is one request for each unit, behind all gateways. Requests are stored for the status only, and no decision is based on them.
//!
//! Each row has its own cache lines. The three numbers in the header are checked when a process attaches, and are never read again.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use crate::memory::error::SegmentError;
use crate::memory::layout::FINGERPRINT;
use crate::memory::map::Map;
use crate::protocols::units::MAX_GATEWAYS;
use crate::segment::{close_on_exec, memory_file, seals_of_a_segment, system, unusable};

/// "forkclms" in ASCII.
const MAGIC: u64 = u64::from_le_bytes(*b"forkclms");
/// Version of the layout. Must be incremented with every change to the layout above or to the meaning of a word.
const VERSION: u64 = 3;

const LINE: u64 = 64;
const WORD: u64 = 8;
const PAGE: u64 = 4096;
const HEADER_WORDS: usize = 6;
/// Number of words of a process's row before its units.
const PROCESS_WORDS: u64 = 4;
const GATEWAY_WORDS: u64 = 3;
const REQUEST_WORDS: u64 = 16;
const MAX_PROCESSES: u32 = 16_384;
const MAX_UNITS: u32 = 4096;

/// The mapped table, shared by all handles in this process.
#[derive(Debug)]
pub(crate) struct Table {
    map: Map,
    pub(crate) size: Size,
    pub(crate) fd: OwnedFd,
}

/// The size of a table, in rows and units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) processes: u32,
    /// Number of units of each process.
    pub(crate) units: u32,
    pub(crate) gateways: u32,
}

/// The row of an app process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProcessRow<'a> {
    pub(crate) door: &'a AtomicU64,
    pub(crate) pid: &'a AtomicU64,
    /// Number of claims since the door was opened.
    pub(crate) begun: &'a AtomicU64,
    /// When the door was opened.
    pub(crate) since_us: &'a AtomicU64,
    pub(crate) units: &'a [AtomicU64],
    /// For each unit, the gateway that keeps a connection.
    pub(crate) kept: &'a [AtomicU64],
}

/// The request of a unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestRow<'a> {
    pub(crate) begun_us: &'a AtomicU64,
    pub(crate) length: &'a AtomicU64,
    pub(crate) text: &'a [AtomicU64],
}

/// The row of a gateway.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatewayRow<'a> {
    pub(crate) waiting: &'a AtomicU64,
    pub(crate) pid: &'a AtomicU64,
    /// Number of attempts to claim a unit, for the choice between equal processes.
    pub(crate) turn: &'a AtomicU64,
}

impl Size {
    fn check(self) -> Result<Size, SegmentError> {
        let numbers = [
            ("app processes", self.processes, MAX_PROCESSES),
            ("requests per app process", self.units, MAX_UNITS),
            ("gateways", self.gateways, MAX_GATEWAYS),
        ];
        match numbers.into_iter().find(|&(_, asked, most)| asked == 0 || asked > most) {
            Some((what, asked, most)) => Err(SegmentError::ClaimsOutOfRange { what, asked, most }),
            None => Ok(self),
        }
    }

    /// The numbers are limited, so the results of the arithmetic here fit.
    fn process_bytes(self) -> u64 {
        ((PROCESS_WORDS + 2 * u64::from(self.units)) * WORD).next_multiple_of(LINE)
    }

    fn gateways_at(self) -> u64 {
        LINE + u64::from(self.processes) * self.process_bytes()
    }

    fn requests_at(self) -> u64 {
        self.gateways_at() + u64::from(self.gateways) * LINE
    }

    fn total(self) -> u64 {
        let requests = u64::from(self.processes) * u64::from(self.units);
        (self.requests_at() + requests * REQUEST_WORDS * WORD).next_multiple_of(PAGE)
    }

    /// Returns the words of the header.
    fn header(self) -> [u64; HEADER_WORDS] {
        let numbers = [self.processes, self.units, self.gateways].map(u64::from);
        [MAGIC, VERSION, FINGERPRINT, numbers[0], numbers[1], numbers[2]]
    }

    /// Decodes a header that begins a file of `len` bytes.
    fn of_header(header: [u64; HEADER_WORDS], len: u64) -> Result<Size, SegmentError> {
        let [magic, version, fingerprint, processes, units, gateways] = header;
        if magic != MAGIC {
            return Err(unusable("it does not start like a table of claims"));
        }
        if version != VERSION || fingerprint != FINGERPRINT {
            return Err(unusable("it was made by a build with another memory layout"));
        }
        let number = |word: u64| u32::try_from(word).unwrap_or(u32::MAX);
        let size = Size { processes: number(processes), units: number(units), gateways: number(gateways) };
        let size = size.check().map_err(|_| unusable("its header makes no sense"))?;
        if size.total() == len { Ok(size) } else { Err(unusable("its size is not what its header says")) }
    }
}

impl Table {
    pub(crate) fn create(size: Size) -> Result<Table, SegmentError> {
        let size = size.check()?;
        let fd = memory_file(size.total())?;
        let map = Map::new(fd.as_fd(), size.total()).map_err(|error| system("map the table of claims", error))?;
        let header = map.slice::<AtomicU64>(0, HEADER_WORDS as u64).ok_or(unusable("it is too short"))?;
        for (word, value) in header.iter().zip(size.header()) {
            word.store(value, Ordering::Release);
        }
        Ok(Table { map, size, fd })
    }

    pub(crate) fn attach(fd: OwnedFd) -> Result<Table, SegmentError> {
        close_on_exec(&fd)?;
        match fcntl(&fd, FcntlArg::F_GET_SEALS) {
            Ok(seals) if SealFlag::from_bits_truncate(seals).contains(seals_of_a_segment()) => {}
            Ok(_) => return Err(unusable("its size is not sealed")),
            Err(_) => return Err(unusable("it is not a sealed memory file")),
        }
        let stat = nix::sys::stat::fstat(&fd).map_err(|errno| system("stat the table of claims", errno))?;
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        if len < PAGE {
            return Err(unusable("it is too short"));
        }
        let map = Map::new(fd.as_fd(), len).map_err(|error| system("map the table of claims", error))?;
        let words = map.slice::<AtomicU64>(0, HEADER_WORDS as u64).and_then(<[_]>::first_chunk);
        let words: &[AtomicU64; HEADER_WORDS] = words.ok_or(unusable("it is too short"))?;
        let size = Size::of_header(std::array::from_fn(|n| words[n].load(Ordering::Acquire)), len)?;
        Ok(Table { map, size, fd })
    }

    /// Returns the row of an app process, if there is such a row.
    pub(crate) fn process(&self, process: u32) -> Option<ProcessRow<'_>> {
        if process >= self.size.processes {
            return None;
        }
        let at = LINE + u64::from(process) * self.size.process_bytes();
        self.row_of(self.map.slice(at, self.size.process_bytes() / WORD)?)
    }

    /// Returns the row of a gateway, if there is such a row.
    pub(crate) fn gateway(&self, gateway: u32) -> Option<GatewayRow<'_>> {
        if gateway >= self.size.gateways {
            return None;
        }
        let at = self.size.gateways_at() + u64::from(gateway) * LINE;
        let [waiting, pid, turn] = self.map.slice::<AtomicU64>(at, GATEWAY_WORDS)?.first_chunk()?;
        Some(GatewayRow { waiting, pid, turn })
    }

    /// Returns the place for the request of a unit.
    pub(crate) fn request(&self, process: u32, unit: usize) -> Option<RequestRow<'_>> {
        let number = u64::from(process) * u64::from(self.size.units) + u64::try_from(unit).ok()?;
        let at = self.size.requests_at() + number.checked_mul(REQUEST_WORDS * WORD)?;
        let ([begun_us, length], text) = self.map.slice::<AtomicU64>(at, REQUEST_WORDS)?.split_first_chunk()?;
        Some(RequestRow { begun_us, length, text })
    }

    /// Returns the rows of the app processes, in order. The offsets are checked once for all of them.
    pub(crate) fn processes(&self) -> impl Iterator<Item = (u32, ProcessRow<'_>)> + Clone {
        let words = self.size.process_bytes() / WORD;
        let all = self.map.slice::<AtomicU64>(LINE, u64::from(self.size.processes) * words).unwrap_or_default();
        let rows = all.chunks_exact(usize::try_from(words).unwrap_or(usize::MAX));
        (0..).zip(rows).filter_map(|(process, words)| Some((process, self.row_of(words)?)))
    }

    pub(crate) fn gateways(&self) -> impl Iterator<Item = (u32, GatewayRow<'_>)> {
        (0..self.size.gateways).filter_map(|gateway| Some((gateway, self.gateway(gateway)?)))
    }

    fn row_of<'a>(&self, words: &'a [AtomicU64]) -> Option<ProcessRow<'a>> {
        let ([door, pid, begun, since_us], rest) = words.split_first_chunk()?;
        let count = usize::try_from(self.size.units).ok()?;
        let (units, rest) = rest.split_at_checked(count)?;
        Some(ProcessRow { door, pid, begun, since_us, units, kept: rest.get(..count)? })
    }
}
