//! The quarantine: requests that are refused for a while because workers died while processing them. The master writes it, and all workers
//! read it.
//!
//! The quarantine is a small table in the header's page, written only by the master, with plain atomic stores; there is no lock. A process
//! that reads an entry while it is being written may miss the entry or read a time that is slightly too long. Refusing one request too
//! many or too few does not matter.
//!
//! `is_empty` and `left` must not lock, allocate or make a system call, because every request passes through them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use crate::memory::SharedMemory;
use crate::memory::clock::monotonic_ms;
use crate::memory::layout::{BARRED, QUARANTINE_AT, QuarantineTable};

/// A handle to the table. Cheap to clone, and usable from any thread.
#[derive(Clone, Debug)]
pub struct Quarantine {
    segment: Arc<SharedMemory>,
}

impl Quarantine {
    /// Maximum number of requests in the table.
    pub const ROOM: usize = BARRED;

    pub(crate) fn new(segment: Arc<SharedMemory>) -> Quarantine {
        Quarantine { segment }
    }

    /// Whether no request is refused. Costs one relaxed load.
    pub fn is_empty(&self) -> bool {
        self.table().is_none_or(|table| table.count.load(Ordering::Relaxed) == 0)
    }

    /// Returns how much longer requests with this key are refused, or `None` if they are not refused.
    pub fn left(&self, key: &str) -> Option<Duration> {
        let (hash, now_ms) = (hash(key), monotonic_ms());
        let barred = &self.table()?.barred;
        let until_ms = barred
            .iter()
            .filter(|entry| entry.key.load(Ordering::Acquire) == hash)
            .map(|entry| entry.until_ms.load(Ordering::Relaxed))
            .max()?;
        (until_ms > now_ms).then(|| Duration::from_millis(until_ms - now_ms))
    }

    /// Refuses requests with these keys for these times, and no other requests. For the master only. Keys beyond the size of the table are
    /// ignored.
    pub fn set<'a>(&self, keys: impl IntoIterator<Item = (&'a str, Duration)>) {
        let Some(table) = self.table() else { return };
        let now_ms = monotonic_ms();
        let mut keys = keys.into_iter();
        let mut count = 0;
        for entry in &table.barred {
            let Some((key, left)) = keys.next() else {
                entry.key.store(0, Ordering::Relaxed);
                continue;
            };
            let left_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
            entry.until_ms.store(now_ms.saturating_add(left_ms), Ordering::Relaxed);
            entry.key.store(hash(key), Ordering::Release);
            count += 1;
        }
        table.count.store(count, Ordering::Release);
    }

    fn table(&self) -> Option<&QuarantineTable> {
        self.segment.map.at(QUARANTINE_AT)
    }
}

/// Returns the hash of a key, never 0, which marks a free entry.
fn hash(key: &str) -> u64 {
    xxh3_64(key.as_bytes()).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Plan, Segment};

    #[test]
    fn keys_are_refused_for_their_time_and_others_are_not() {
        const MINUTE: Duration = Duration::from_secs(60);
        let segment = Segment::create(&Plan { rows: 1, ..Plan::default() }).unwrap();
        let quarantine = segment.quarantine();
        assert!(quarantine.is_empty() && quarantine.left("GET /").is_none());
        quarantine.set([("GET /poison", MINUTE), ("GET /over", Duration::ZERO)]);
        let theirs = Segment::attach(segment.fd().try_clone_to_owned().unwrap()).unwrap().quarantine();
        assert!(!theirs.is_empty());
        assert!(theirs.left("GET /poison").is_some_and(|left| left <= MINUTE && left > MINUTE / 2));
        assert_eq!((theirs.left("GET /over"), theirs.left("GET /")), (None, None));

        let names: Vec<String> = (0..100).map(|number| format!("GET /{number}")).collect();
        quarantine.set(names.iter().map(|name| (name.as_str(), MINUTE)));
        let refused = names.iter().filter(|name| theirs.left(name).is_some()).count();
        assert_eq!(refused, Quarantine::ROOM);
        quarantine.set([]);
        assert!(theirs.is_empty() && theirs.left("GET /1").is_none());
    }
}
