//! Generates the stored data and the sequence of requests, which are the same for all stores.

use fastrand::Rng;

use crate::sample::{Key, Zipf, key};

/// The number of keys, and the size of their values in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) size: usize,
    pub(crate) keys: u32,
}

#[derive(Debug)]
pub(crate) struct Data {
    pub(crate) shape: Shape,
    pub(crate) keys: Vec<Key>,
    /// Indices of keys, drawn according to Zipf's law. The sequence repeats. Its length is a power of two.
    pub(crate) sequence: Vec<u32>,
}

const EXPONENT: f64 = 0.99;
/// Number of draws per key. It makes the sequence too long for the CPU's predictors to learn.
const DRAWS_PER_KEY: usize = 4;
const LEAST_DRAWS: usize = 1 << 20;

impl Shape {
    pub(crate) fn name(self) -> String {
        let keys = match self.keys {
            1_000_000.. => format!("{}M", self.keys / 1_000_000),
            _ => format!("{}k", self.keys / 1000),
        };
        format!("{}K/{keys}", self.size / 1024)
    }

    /// Returns the total size of all values in bytes.
    pub(crate) fn bytes(self) -> u64 {
        self.size as u64 * u64::from(self.keys)
    }

    /// Returns the value stored under the key with this index: the index, repeated, so that any part of the value identifies the key.
    pub(crate) fn value(self, index: u32) -> Vec<u8> {
        u64::from(index).to_le_bytes().repeat(self.size / 8)
    }
}

impl Data {
    pub(crate) fn new(shape: Shape, seed: u64) -> Data {
        let mut rng = Rng::with_seed(seed);
        // Frequently requested keys are not stored next to each other.
        let mut by_rank: Vec<u32> = (0..shape.keys).collect();
        rng.shuffle(&mut by_rank);
        let zipf = Zipf::new(shape.keys, EXPONENT);
        let draws = (shape.keys as usize * DRAWS_PER_KEY).max(LEAST_DRAWS).next_power_of_two();
        let sequence = (0..draws).map(|_| by_rank[zipf.draw(&mut rng) as usize]).collect();
        Data { shape, keys: (0..shape.keys).map(key).collect(), sequence }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_value_identifies_its_key() {
        let shape = Shape { size: 1024, keys: 10_000 };
        assert_eq!(shape.name(), "1K/10k");
        assert_eq!(shape.value(9999).len(), 1024);
        assert_eq!(shape.value(9999)[1016..], 9999_u64.to_le_bytes());
        assert_ne!(shape.value(1), shape.value(2));
    }

    #[test]
    fn the_sequence_requests_only_existing_keys() {
        let data = Data::new(Shape { size: 1024, keys: 1000 }, 1);
        assert!(data.sequence.len().is_power_of_two());
        assert!(data.sequence.iter().all(|&index| (index as usize) < data.keys.len()));
    }
}
