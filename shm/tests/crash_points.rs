//! Kills a process at each marked step of each operation, and also kills the process that repairs the damage, at each marked step of the
//! repair.
//!
//! In long operations, the death of the repairing process is tested only for some of the first deaths. FORKYARD_EVERY=1 tests it for every
//! first death, and FORKYARD_SCALE=n for a random n percent of them. The test also checks that it reaches every mark, and that every repair
//! is needed.
#![expect(clippy::print_stdout, reason = "the test prints its own report")]

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use common::image::{Image, Slate};
use common::scenes::{Known, SCENES, Scene, Stage, marks};
use common::{not_longer_than, spawn};
use forkyard_shm::crash::{self, Recovery};
use forkyard_shm::{Cache, Segment};

/// Time limit that is far longer than the check of one state takes.
const HANGS: Duration = Duration::from_secs(120);
/// Upper bound for the number of marks in an operation.
const MOST_MARKS: u64 = 5000;

fn main() {
    common::run(&[
        ("every_mark_in_the_sources_is_passed", every_mark_in_the_sources_is_passed),
        ("death_at_each_mark", death_at_each_mark),
        ("each_repair_is_needed", each_repair_is_needed),
    ]);
}

/// Repairs a segment.
fn mend(cache: &Cache) {
    let _ = cache.audit();
    cache.sweep_all();
}

/// Makes a child die at a mark of an operation. Returns false if the operation finished before it reached this mark.
fn dies(segment: &Segment, at: u64, act: fn(&Cache)) -> bool {
    not_longer_than(HANGS);
    let cache = segment.cache();
    let child = spawn(|_| {
        crash::die_at(at);
        act(&cache);
    });
    !child.ended()
}

/// A scene with its prepared segment.
struct Play<'a> {
    scene: &'a Scene,
    stage: Stage,
    image: Image,
    slate: Slate,
    known: Known,
}

impl Play<'_> {
    fn of(scene: &Scene) -> Play<'_> {
        let stage = (scene.prepare)();
        let image = Image::of(&stage.segment);
        let slate = Slate::for_images_like(&image);
        let known = Known::of(scene, &image, &slate);
        Play { scene, stage, image, slate, known }
    }

    /// Returns the state after a death at each mark of the operation.
    fn deaths(&self) -> impl Iterator<Item = (u64, Segment)> {
        let segments = (0..MOST_MARKS).map(|at| (at, self.slate.pour(&self.image)));
        segments.take_while(|(at, segment)| dies(segment, *at, self.scene.act))
    }

    /// Verifies the state as a process that skips a repair.
    fn verify_without(&self, segment: &Segment, repair: Recovery) -> Result<(), String> {
        crash::skip(Some(repair));
        let result = self.known.verify(&segment.cache());
        crash::skip(None);
        result
    }
}

fn death_at_each_mark(seed: u64) {
    let every = common::number("FORKYARD_EVERY").is_some();
    let scale = common::number("FORKYARD_SCALE").unwrap_or(100);
    let mut random = fastrand::Rng::with_seed(seed);
    for scene in &SCENES {
        let play = Play::of(scene);
        let (mut deaths, mut deaths_in_repair) = (0, 0);
        for (at, segment) in play.deaths() {
            let left = Image::of(&segment);
            deaths += 1;
            if let Err(why) = play.known.verify(&segment.cache()) {
                panic!("{}, killed at mark {at}: {why}", scene.name);
            }
            drop(segment);
            let is_left_out = (deaths > 14 && deaths % 16 != 0) || random.u64(0..100) >= scale;
            if is_left_out && !every {
                continue;
            }
            for again in 0..MOST_MARKS {
                let segment = play.slate.pour(&left);
                if !dies(&segment, again, mend) {
                    break;
                }
                deaths_in_repair += 1;
                if let Err(why) = play.known.verify(&segment.cache()) {
                    panic!("{}, killed at mark {at} and at mark {again} of the repair: {why}", scene.name);
                }
            }
        }
        println!("  {}: {deaths} deaths, {deaths_in_repair} in the repair", scene.name);
        drop(play.stage.pins);
    }
}

fn each_repair_is_needed(_seed: u64) {
    for repair in [Recovery::Books, Recovery::Empty, Recovery::FreeLocks, Recovery::Unpin, Recovery::PassLeases] {
        let plays = SCENES.iter().map(Play::of);
        let missed = plays.into_iter().find_map(|play| {
            let mut deaths = play.deaths();
            deaths.find_map(|(at, segment)| {
                play.verify_without(&segment, repair).err().map(|why| format!("{}, mark {at}: {why}", play.scene.name))
            })
        });
        match missed {
            Some(why) => println!("  without {repair:?}: {why}"),
            None => panic!("no check fails without {repair:?}"),
        }
    }
}

fn every_mark_in_the_sources_is_passed(_seed: u64) {
    let mut passed = BTreeSet::new();
    for scene in &SCENES {
        let play = Play::of(scene);
        passed.extend(marks(&play.slate.pour(&play.image).cache(), scene.act));
        for (_, segment) in play.deaths() {
            // Uses a membership other than that of the dead process.
            passed.extend(marks(&play.slate.pour(&Image::of(&segment)).cache(), mend));
        }
    }
    let written = marks_of_the_sources();
    assert!(written.len() > 20, "the marks were not found: {written:?}");
    let never: Vec<&String> = written.iter().filter(|name| !passed.contains(name.as_str())).collect();
    println!("  {} marks", written.len());
    assert!(never.is_empty(), "no scene passes these marks of the sources: {never:?}");
}

/// Returns the names of all marks in `src`: each string in a line that calls `crash::point`.
fn marks_of_the_sources() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut directories = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).expect("the sources exist") {
            let path = entry.expect("entry").path();
            if path.ends_with("src/events") || path.ends_with("protocols/latest_event.rs") {
                // `tests/events.rs` covers these marks.
            } else if path.is_dir() {
                directories.push(path);
            } else {
                names.extend(marks_of(&std::fs::read_to_string(path).expect("a source is text")));
            }
        }
    }
    names
}

fn marks_of(source: &str) -> Vec<String> {
    let calls = source.lines().filter(|line| line.contains("crash::point(") && !line.trim_start().starts_with("//"));
    // Every second chunk between quotes is inside a string.
    calls.flat_map(|line| line.split('"').skip(1).step_by(2)).map(str::to_owned).collect()
}
