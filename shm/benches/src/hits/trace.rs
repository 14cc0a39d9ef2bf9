//! Generates the traces: sequences of requested objects.

use fastrand::Rng;

use crate::sample::{Sizes, Zipf};

/// A request for an object of this size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) object: u32,
    pub(crate) size: u32,
}

/// Requests for objects that are requested only once. They are made in addition to the requests that follow Zipf's law.
#[derive(Clone, Copy, Debug)]
enum Once {
    Never,
    /// Each request is for such an object with this probability.
    Mixed(f64),
    /// `length` requests for such objects in a row, after `after` other requests.
    Scans {
        length: u32,
        after: u32,
    },
}

/// The parameters with which a trace is generated, and the size of the cache as a percentage of the total size of all
/// objects.
#[derive(Debug)]
pub(crate) struct Recipe {
    exponent: f64,
    once: Once,
    cache_percent: u64,
}

const fn recipe(exponent: f64, once: Once, cache_percent: u64) -> Recipe {
    Recipe { exponent, once, cache_percent }
}

/// Scans of about 160 MiB, four times the size of a cache that has 5 % of the total size.
const SCANS: Once = Once::Scans { length: SCAN, after: BETWEEN_SCANS };
pub(crate) const SCAN: u32 = 10_000;
pub(crate) const BETWEEN_SCANS: u32 = 20_000;

const FIFTH: Once = Once::Mixed(0.2);

pub(crate) const RECIPES: [Recipe; 7] = [
    recipe(0.99, Once::Never, 5),
    recipe(0.99, Once::Never, 20),
    recipe(0.99, FIFTH, 5),
    recipe(0.99, FIFTH, 20),
    recipe(0.8, FIFTH, 5),
    recipe(0.8, FIFTH, 20),
    recipe(0.99, SCANS, 5),
];

const OBJECTS: u32 = 50_000;
const TOTAL: u64 = 787 << 20;

impl Recipe {
    pub(crate) fn name(&self) -> String {
        let Recipe { exponent, once, cache_percent } = self;
        let once = match once {
            Once::Never => String::new(),
            Once::Mixed(share) => format!(" + {:.0} % one-hit", share * 100.0),
            Once::Scans { .. } => " + scans".to_owned(),
        };
        format!("{exponent}{once}, {cache_percent} %")
    }

    /// Returns the size of the cache in bytes.
    pub(crate) fn capacity(&self) -> u64 {
        TOTAL * self.cache_percent / 100
    }
}

/// The objects, which are the same for all traces with the same seed.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) objects: u32,
    pub(crate) total: u64,
    rng: Rng,
    sizes: Vec<u32>,
    law: Sizes,
}

impl World {
    pub(crate) fn new(seed: u64) -> World {
        let mut rng = Rng::with_seed(seed);
        let (sizes, law) = Sizes::new(OBJECTS, TOTAL, &mut rng);
        World { objects: OBJECTS, total: TOTAL, rng, sizes, law }
    }

    pub(crate) fn trace(&mut self, recipe: &Recipe, length: usize) -> Vec<Request> {
        let World { objects, rng, sizes, law, .. } = self;
        let zipf = Zipf::new(*objects, recipe.exponent);
        let mut new = *objects;
        let mut phase = 0;
        let mut next = || {
            let once = match recipe.once {
                Once::Never => false,
                Once::Mixed(share) => rng.f64() < share,
                Once::Scans { length, after } => {
                    phase = (phase + 1) % (length + after);
                    phase >= after
                }
            };
            if once {
                new += 1;
                Request { object: new - 1, size: law.draw(rng) }
            } else {
                let object = zipf.draw(rng);
                Request { object, size: sizes[object as usize] }
            }
        };
        (0..length).map(|_| next()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn a_seed_repeats_a_trace() {
        let trace = |seed| World::new(seed).trace(&RECIPES[2], 1000);
        assert_eq!(trace(3), trace(3));
        assert_ne!(trace(3), trace(4));
    }

    #[test]
    fn the_share_of_objects_requested_once_is_as_configured() {
        for (recipe, share) in [(&RECIPES[0], 0.0), (&RECIPES[2], 0.2), (&RECIPES[6], 1.0 / 3.0)] {
            let trace = World::new(3).trace(recipe, 90_000);
            let mut times: HashMap<u32, u32> = HashMap::new();
            trace.iter().for_each(|request| *times.entry(request.object).or_default() += 1);
            let new: Vec<u32> = times.iter().filter(|(object, _)| **object >= OBJECTS).map(|(_, n)| *n).collect();
            assert!(new.iter().all(|&n| n == 1), "{}", recipe.name());
            assert!((new.len() as f64 / 90_000.0 - share).abs() < 0.01, "{}", recipe.name());
        }
    }
}
