//! S3-FIFO on whole objects, with sizes counted in bytes, for comparison with Forkyard's log, which uses the same policy.
//!
//! New objects enter a small queue with a tenth of the memory. An object at the end of the small queue moves to the main queue if it was
//! requested often enough in the small queue. Otherwise it is evicted, and its name is kept in the ghost queue. An object that misses while
//! its name is in the ghost queue enters the main queue directly. In the main queue, requested objects are reinserted, at most three times.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::error::Error;
use crate::hits::policy::{Cached, charge};
use crate::hits::trace::Request;

const SMALL_PERCENT: u64 = 10;
const MOST_HITS: u8 = 3;

/// An S3-FIFO cache. `PROMOTE` is the number of hits that move an object from the small queue to the main queue.
#[derive(Debug)]
pub(crate) struct S3Fifo<const PROMOTE: u8> {
    capacity: u64,
    objects: HashMap<u32, Object>,
    small: Queue,
    main: Queue,
    ghosts: Ghosts,
}

#[derive(Debug)]
struct Object {
    charge: u64,
    hits: u8,
}

#[derive(Debug, Default)]
struct Queue {
    objects: VecDeque<u32>,
    bytes: u64,
}

/// Names of evicted objects, in `order` from the oldest to the newest, and in `set` for lookups. When an object is stored again, its name
/// is removed from both.
#[derive(Debug, Default)]
struct Ghosts {
    order: VecDeque<u32>,
    set: HashSet<u32>,
}

impl Queue {
    fn push(&mut self, object: u32, charge: u64) {
        self.objects.push_back(object);
        self.bytes += charge;
    }
}

impl Ghosts {
    /// Adds a name, and removes the oldest names if there are more than `most`.
    fn push(&mut self, object: u32, most: usize) {
        if self.set.insert(object) {
            self.order.push_back(object);
        }
        while self.order.len() > most {
            if let Some(oldest) = self.order.pop_front() {
                self.set.remove(&oldest);
            }
        }
    }

    fn take(&mut self, object: u32) -> bool {
        let found = self.set.remove(&object);
        if found {
            self.order.retain(|&name| name != object);
        }
        found
    }
}

impl<const PROMOTE: u8> S3Fifo<PROMOTE> {
    pub(crate) fn new(capacity: u64) -> Self {
        let (small, main) = (Queue::default(), Queue::default());
        S3Fifo { capacity, objects: HashMap::new(), small, main, ghosts: Ghosts::default() }
    }

    fn evict(&mut self, leave: u64) {
        while self.small.bytes + self.main.bytes > leave {
            let small_is_full = self.small.bytes >= self.capacity * SMALL_PERCENT / 100;
            if small_is_full || self.main.objects.is_empty() { self.evict_small() } else { self.evict_main() }
        }
    }

    /// Moves objects to the main queue until one is evicted, or the queue is empty.
    fn evict_small(&mut self) {
        while let Some(object) = self.small.objects.pop_front() {
            let entry = self.objects.get_mut(&object).expect("an object in a queue is in the table");
            self.small.bytes -= entry.charge;
            if entry.hits < PROMOTE {
                self.objects.remove(&object);
                self.ghosts.push(object, self.main.objects.len());
                return;
            }
            entry.hits = 0;
            self.main.push(object, entry.charge);
        }
    }

    /// Reinserts objects until one is evicted, or the queue is empty.
    fn evict_main(&mut self) {
        while let Some(object) = self.main.objects.pop_front() {
            let entry = self.objects.get_mut(&object).expect("an object in a queue is in the table");
            if entry.hits == 0 {
                self.main.bytes -= entry.charge;
                self.objects.remove(&object);
                return;
            }
            entry.hits -= 1;
            self.main.objects.push_back(object);
        }
    }
}

impl<const PROMOTE: u8> Cached for S3Fifo<PROMOTE> {
    fn request(&mut self, Request { object, size }: Request) -> Result<bool, Error> {
        if let Some(entry) = self.objects.get_mut(&object) {
            entry.hits = (entry.hits + 1).min(MOST_HITS);
            return Ok(true);
        }
        let charge = charge(size);
        let came_back = self.ghosts.take(object);
        self.evict(self.capacity - charge);
        let queue = if came_back { &mut self.main } else { &mut self.small };
        queue.push(object, charge);
        self.objects.insert(object, Object { charge, hits: 0 });
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask<const PROMOTE: u8>(cache: &mut S3Fifo<PROMOTE>, object: u32) -> bool {
        cache.request(Request { object, size: 0 }).unwrap()
    }

    /// Returns a full cache with room for ten objects, one of which is in the small queue.
    fn full<const PROMOTE: u8>(hits: usize) -> S3Fifo<PROMOTE> {
        let mut cache = S3Fifo::new(10 * charge(0));
        assert!(!ask(&mut cache, 1));
        (0..hits).for_each(|_| assert!(ask(&mut cache, 1)));
        (2..=30).for_each(|object| assert!(!ask(&mut cache, object)));
        cache
    }

    #[test]
    fn the_threshold_determines_which_objects_are_kept() {
        assert!(!ask(&mut full::<1>(0), 1));
        assert!(ask(&mut full::<1>(1), 1));
        assert!(!ask(&mut full::<2>(1), 1));
        assert!(ask(&mut full::<2>(2), 1));
    }

    #[test]
    fn an_object_requested_again_soon_enters_the_main_queue() {
        let mut cache = full::<1>(1);
        let ghost = *cache.ghosts.order.back().unwrap();
        assert!(!ask(&mut cache, ghost));
        assert!(cache.main.objects.contains(&ghost) && !cache.ghosts.set.contains(&ghost));
        assert!(cache.small.bytes + cache.main.bytes <= cache.capacity);
    }
}
