//! Runs the checks of all targets on their seeds and on a few thousand random mutations of the seeds, so that the
//! checks compile and run without a fuzzer. The fuzzer covers more inputs.

use std::fs;
use std::path::Path;

use super::*;

type Property = fn(&[u8]);

const TARGETS: [(&str, Property); 9] = [
    ("fastcgi", fastcgi),
    ("fastcgi_script", fastcgi_script),
    ("scgi", scgi),
    ("scgi_script", scgi_script),
    ("params", params),
    ("cgi_request", cgi_request),
    ("cgi_response", cgi_response),
    ("proxy", proxy),
    ("forwarded", forwarded),
];

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let files = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut seeds: Vec<Vec<u8>> = files.map(|file| fs::read(file.unwrap().path()).unwrap()).collect();
    assert!(!seeds.is_empty(), "{target} has no seeds");
    seeds.iter_mut().for_each(|seed| seed.truncate(4096));
    seeds.push(Vec::new());
    seeds
}

#[test]
fn every_seed_and_what_changes_make_of_it_holds() {
    for (target, property) in TARGETS {
        let seeds = seeds(target);
        seeds.iter().for_each(|seed| property(seed));
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut bytes = random.choice(&seeds).unwrap().clone();
            for _ in 0..random.usize(1..8) {
                let at = random.usize(0..=bytes.len());
                match random.u8(0..4) {
                    0 => bytes.insert(at, random.u8(..)),
                    1 => bytes.truncate(at),
                    2 => bytes.extend((0..random.usize(0..40)).map(|_| random.u8(..))),
                    _ => bytes.get_mut(at).into_iter().for_each(|byte| *byte = random.u8(..)),
                }
            }
            let held = std::panic::catch_unwind(|| property(&bytes));
            assert!(held.is_ok(), "{target}, seed {seed}: {bytes:?}");
        }
    }
}
