//! Fills a store and times its operations.
//!
//! The time is divided into windows of about 2 ms, and the result is the median of their means. A window is dropped if the process got less
//! than 95 % of a CPU although it did not sleep, because another process was then running. A window in which the process did sleep is kept,
//! because waiting for a lock or a server is part of the cost of the operation.

use std::hint::black_box;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};

use crate::error::Error;
use crate::get::data::Data;
use crate::sample::Key;

/// A store for keys and values.
pub(crate) trait Store {
    /// Passes the value to `seen`, in place or as a copy. Returns whether there is a value.
    fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error>;

    /// Stores the value under the key with this index.
    fn set(&mut self, index: u32, key: &Key, value: &[u8]) -> Result<(), Error>;
}

/// The operations of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Lookups that hit.
    Get,
    /// One operation in ten stores a value; the others are lookups. A value that a lookup does not find is also stored.
    Mix,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    pub(crate) work: Work,
    pub(crate) time: Duration,
    /// Start position in the sequence.
    pub(crate) start: usize,
}

/// The result of a measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Sample {
    /// Median of the windows, or 0 if all windows were dropped.
    pub(crate) ns: f64,
    pub(crate) kept: u32,
    pub(crate) dropped: u32,
    pub(crate) operations: u64,
    pub(crate) misses: u64,
}

/// A store behind a pointer.
pub(crate) trait Timed {
    /// Stores all values and reads each value back. Returns the number of keys whose values the store does not keep, even after several
    /// attempts.
    fn fill(&mut self, data: &Data) -> Result<u32, Error>;

    /// Reads the first values back, in a process that did not store them. Returns the number of missing values.
    fn check(&mut self, data: &Data, most: usize) -> Result<u32, Error>;

    fn measure(&mut self, data: &Data, task: Task) -> Result<Sample, Error>;
}

/// Number of attempts to store the values that are not kept.
const FILLS: u32 = 6;
const WINDOW: Duration = Duration::from_millis(2);
/// Minimum share of a CPU that a process must get, in percent.
const LEAST_CPU: u32 = 95;
/// Minimum number of windows. With fewer windows, the measurement continues, for up to `MOST_TIMES` times the requested time.
const LEAST_WINDOWS: u32 = 10;
const MOST_TIMES: u32 = 4;

impl<S: Store> Timed for S {
    fn fill(&mut self, data: &Data) -> Result<u32, Error> {
        let mut missing = 0;
        for pass in 0..FILLS {
            missing = 0;
            for (index, key) in (0..).zip(&data.keys) {
                let value = data.shape.value(index);
                if pass == 0 || !is_stored(self, key, &value)? {
                    self.set(index, key, &value)?;
                    missing += 1;
                    // Lookups may cause a cache to keep this value and evict others.
                    is_stored(self, key, &value)?;
                }
            }
            if missing == 0 {
                break;
            }
        }
        Ok(missing)
    }

    fn check(&mut self, data: &Data, most: usize) -> Result<u32, Error> {
        let mut missing = 0;
        for (index, key) in (0..).zip(data.keys.iter().take(most)) {
            missing += u32::from(!is_stored(self, key, &data.shape.value(index))?);
        }
        Ok(missing)
    }

    fn measure(&mut self, data: &Data, task: Task) -> Result<Sample, Error> {
        let page = data.shape.value(0);
        let mut walk =
            Walk { store: self, data, page: &page, at: task.start, mixed: task.work == Work::Mix, misses: 0 };
        let operations = walk.warm_up(task.time / 4)?;
        walk.misses = 0;
        let mut sample = Sample::default();
        let mut windows = Vec::new();
        let began = Instant::now();
        while began.elapsed() < task.time || (sample.kept < LEAST_WINDOWS && began.elapsed() < task.time * MOST_TIMES) {
            let before = Clocks::now()?;
            walk.go(operations)?;
            let passed = Clocks::now()?.since(&before);
            sample.operations += u64::from(operations);
            if passed.ran() {
                windows.push(passed.wall.as_secs_f64() * 1e9 / f64::from(operations));
                sample.kept += 1;
            } else {
                sample.dropped += 1;
            }
        }
        sample.misses = walk.misses;
        sample.ns = median(&mut windows).unwrap_or_default();
        Ok(sample)
    }
}

fn is_stored<S: Store>(store: &mut S, key: &Key, value: &[u8]) -> Result<bool, Error> {
    let mut whole = false;
    let found = store.get(key, |seen| whole = seen == value)?;
    if found && !whole {
        return Err(Error::WrongValue { key: String::from_utf8_lossy(key).into_owned() });
    }
    Ok(found)
}

/// The path of one process through the sequence.
struct Walk<'a, S> {
    store: &'a mut S,
    data: &'a Data,
    page: &'a [u8],
    at: usize,
    mixed: bool,
    misses: u64,
}

impl<'a, S: Store> Walk<'a, S> {
    /// Runs operations for some time. Returns the number of operations that fill a window.
    fn warm_up(&mut self, time: Duration) -> Result<u32, Error> {
        let began = Instant::now();
        let mut operations: u32 = 16;
        loop {
            let window = Instant::now();
            self.go(operations)?;
            let took = window.elapsed();
            if took < WINDOW / 2 {
                operations = operations.saturating_mul(2);
            } else if began.elapsed() >= time {
                return Ok(operations);
            } else if took > WINDOW * 2 {
                operations = (operations / 2).max(1);
            }
        }
    }

    fn go(&mut self, operations: u32) -> Result<(), Error> {
        if self.mixed { self.go_mixed(operations) } else { self.go_reading(operations) }
    }

    fn go_reading(&mut self, operations: u32) -> Result<(), Error> {
        for _ in 0..operations {
            let (_, key) = self.next();
            self.misses += u64::from(!self.store.get(key, touch)?);
        }
        Ok(())
    }

    fn go_mixed(&mut self, operations: u32) -> Result<(), Error> {
        for turn in 0..operations {
            let (index, key) = self.next();
            let store = turn % 10 == 9 || {
                let missed = !self.store.get(key, touch)?;
                self.misses += u64::from(missed);
                missed
            };
            if store {
                self.store.set(index, key, self.page)?;
            }
        }
        Ok(())
    }

    /// Returns the next key and its index.
    #[inline]
    fn next(&mut self) -> (u32, &'a Key) {
        let Data { keys, sequence, .. } = self.data;
        let index = sequence[self.at & (sequence.len() - 1)];
        self.at += 1;
        (index, &keys[index as usize])
    }
}

/// Uses a value with the least work that a reader can do.
#[inline]
fn touch(value: &[u8]) {
    black_box(value.first().copied());
    // The compiler must assume that the whole value is read, so that it cannot remove a copy.
    black_box(value.as_ptr());
}

/// Clock values of this process, or differences between clock values.
#[derive(Clone, Copy, Debug)]
struct Clocks {
    wall: Duration,
    cpu: Duration,
    /// Number of times that the process went to sleep.
    sleeps: i64,
}

impl Clocks {
    fn now() -> Result<Clocks, Error> {
        let read = |clock| clock_gettime(clock).map(Duration::from).map_err(Error::errno("clock_gettime"));
        let usage = getrusage(UsageWho::RUSAGE_THREAD).map_err(Error::errno("getrusage"))?;
        Ok(Clocks {
            wall: read(ClockId::CLOCK_MONOTONIC)?,
            cpu: read(ClockId::CLOCK_THREAD_CPUTIME_ID)?,
            sleeps: usage.voluntary_context_switches(),
        })
    }

    fn since(&self, before: &Clocks) -> Clocks {
        Clocks {
            wall: self.wall.saturating_sub(before.wall),
            cpu: self.cpu.saturating_sub(before.cpu),
            sleeps: self.sleeps - before.sleeps,
        }
    }

    /// Returns whether the process was running or sleeping, and not preempted, during this time.
    fn ran(&self) -> bool {
        self.sleeps > 0 || self.cpu * 100 >= self.wall * LEAST_CPU
    }
}

/// Returns the median: the middle value, or the mean of the two middle values.
pub(crate) fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.get(values.len().checked_sub(1)? / 2)?, values.get(values.len() / 2)?);
    Some(f64::midpoint(*low, *high))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::data::Shape;
    use std::collections::HashMap;

    /// A store that drops some values, and can corrupt values.
    #[derive(Default)]
    struct Fake {
        values: HashMap<Key, Vec<u8>>,
        refuses: u32,
        garbles: bool,
        sets: u64,
    }

    impl Store for Fake {
        fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error> {
            let found = self.values.get(key);
            found.map(|value| seen(value)).map_or(Ok(false), |()| Ok(true))
        }

        fn set(&mut self, index: u32, key: &Key, value: &[u8]) -> Result<(), Error> {
            self.sets += 1;
            if index >= self.refuses {
                let value = if self.garbles { &value[1..] } else { value };
                self.values.insert(*key, value.to_vec());
            }
            Ok(())
        }
    }

    fn data() -> Data {
        Data::new(Shape { size: 64, keys: 100 }, 1)
    }

    fn task(work: Work) -> Task {
        Task { work, time: Duration::from_millis(5), start: 7 }
    }

    #[test]
    fn a_wrong_value_is_detected_and_a_lost_value_is_counted() {
        let data = data();
        assert_eq!(Fake::default().fill(&data).unwrap(), 0);
        assert_eq!(Fake { refuses: 3, ..Fake::default() }.fill(&data).unwrap(), 3);
        assert!(matches!(Fake { garbles: true, ..Fake::default() }.fill(&data), Err(Error::WrongValue { .. })));
    }

    #[test]
    fn reading_finds_everything_and_stores_nothing() {
        let (data, mut fake) = (data(), Fake::default());
        fake.fill(&data).unwrap();
        fake.sets = 0;
        let sample = fake.measure(&data, task(Work::Get)).unwrap();
        assert_eq!((sample.misses, fake.sets), (0, 0));
        assert!(sample.kept + sample.dropped > 0 && sample.operations > 0, "{sample:?}");
    }

    #[test]
    fn a_tenth_of_the_mix_is_stored() {
        let (data, mut fake) = (data(), Fake::default());
        fake.fill(&data).unwrap();
        let mut walk =
            Walk { store: &mut fake, data: &data, page: &data.shape.value(0), at: 0, mixed: true, misses: 0 };
        walk.go(1000).unwrap();
        assert_eq!(walk.misses, 0);
        assert_eq!(fake.sets, data.keys.len() as u64 + 100);
    }

    #[test]
    fn a_window_counts_if_the_process_ran_or_slept() {
        let clocks =
            |wall, cpu, sleeps| Clocks { wall: Duration::from_micros(wall), cpu: Duration::from_micros(cpu), sleeps };
        assert!(clocks(2000, 1900, 0).ran() && clocks(2000, 100, 3).ran());
        assert!(!clocks(2000, 1899, 0).ran());
        assert!(clocks(2500, 2900, 4).since(&clocks(500, 1000, 4)).ran());
    }

    #[test]
    fn medians() {
        assert_eq!(median(&mut []), None);
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
