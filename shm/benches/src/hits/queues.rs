//! The textbook policies with one queue, LRU, FIFO and SIEVE, for objects of different sizes.

use crate::error::Error;
use crate::hits::list::{List, Place};
use crate::hits::policy::{Cached, charge};
use crate::hits::trace::Request;

/// Evicts the least recently requested object.
#[derive(Debug)]
pub(crate) struct Lru {
    capacity: u64,
    list: List,
}

/// Evicts the object that was stored first.
#[derive(Debug)]
pub(crate) struct Fifo {
    capacity: u64,
    list: List,
}

/// Evicts with a hand that moves from the oldest object to the newest. A request marks an object. The hand clears the marks that it passes,
/// and evicts the first object without a mark. The remaining objects keep their positions.
#[derive(Debug)]
pub(crate) struct Sieve {
    capacity: u64,
    list: List,
    /// Position of the hand, or `None` for the oldest object.
    hand: Option<Place>,
}

impl Lru {
    pub(crate) fn new(capacity: u64) -> Lru {
        Lru { capacity, list: List::new() }
    }
}

impl Cached for Lru {
    fn request(&mut self, request: Request) -> Result<bool, Error> {
        if let Some(place) = self.list.find(request.object) {
            self.list.renew(place);
            return Ok(true);
        }
        evict_oldest(&mut self.list, self.capacity - charge(request.size));
        self.list.push(request);
        Ok(false)
    }
}

impl Fifo {
    pub(crate) fn new(capacity: u64) -> Fifo {
        Fifo { capacity, list: List::new() }
    }
}

impl Cached for Fifo {
    fn request(&mut self, request: Request) -> Result<bool, Error> {
        if self.list.find(request.object).is_some() {
            return Ok(true);
        }
        evict_oldest(&mut self.list, self.capacity - charge(request.size));
        self.list.push(request);
        Ok(false)
    }
}

fn evict_oldest(list: &mut List, leave: u64) {
    while list.bytes > leave {
        let Some(place) = list.oldest() else { return };
        list.remove(place);
    }
}

impl Sieve {
    pub(crate) fn new(capacity: u64) -> Sieve {
        Sieve { capacity, list: List::new(), hand: None }
    }

    fn evict(&mut self, leave: u64) {
        while self.list.bytes > leave {
            let Some(place) = self.hand.or_else(|| self.list.oldest()) else { return };
            self.hand = self.list.newer(place);
            let node = self.list.node(place);
            if node.visited {
                node.visited = false;
            } else {
                self.list.remove(place);
            }
        }
    }
}

impl Cached for Sieve {
    fn request(&mut self, request: Request) -> Result<bool, Error> {
        if let Some(place) = self.list.find(request.object) {
            self.list.node(place).visited = true;
            return Ok(true);
        }
        self.evict(self.capacity - charge(request.size));
        self.list.push(request);
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the hits of a cache with room for three objects of size zero.
    fn hits(mut cache: impl Cached, objects: &[u32]) -> Vec<bool> {
        objects.iter().map(|&object| cache.request(Request { object, size: 0 }).unwrap()).collect()
    }

    #[test]
    fn lru_keeps_the_most_recently_requested_objects() {
        let found = hits(Lru::new(3 * charge(0)), &[1, 2, 3, 1, 4, 1, 2]);
        assert_eq!(found, [false, false, false, true, false, true, false]);
    }

    #[test]
    fn fifo_keeps_the_most_recently_stored_objects() {
        let found = hits(Fifo::new(3 * charge(0)), &[1, 2, 3, 1, 4, 1, 3]);
        assert_eq!(found, [false, false, false, true, false, false, true]);
    }

    #[test]
    fn the_hand_of_sieve_keeps_its_position() {
        // Object 4 clears the mark of 1 and evicts 2; object 5 evicts 3, not 1; object 6 evicts 4.
        let found = hits(Sieve::new(3 * charge(0)), &[1, 2, 3, 1, 4, 5, 6, 1, 4]);
        assert_eq!(found, [false, false, false, true, false, false, false, true, false]);
    }
}
