//! Models of purging pages and their fragments: `purge.rs`.

use std::rc::Rc;

use crate::sync::{AtomicU64, Ordering};
use crate::{Model, check, purge, work};

/// The clock, the two slots of a tag, the slot of another tag, and the snapshots of the pages that were composed.
struct Tags {
    clock: AtomicU64,
    tag: [AtomicU64; 2],
    other: AtomicU64,
    pages: std::sync::Mutex<[Option<u64>; 2]>,
}

/// The snapshot of a fragment with the tag.
const FRAGMENT: u64 = 5;

impl Tags {
    fn new() -> Rc<Tags> {
        let zero = || AtomicU64::new(0);
        let (clock, tag, other) = (AtomicU64::new(FRAGMENT), [zero(), zero()], zero());
        Rc::new(Tags { clock, tag, other, pages: std::sync::Mutex::default() })
    }

    fn slots(&self) -> [&AtomicU64; 2] {
        let [a, b] = &self.tag;
        [a, b]
    }

    /// Returns whether a snapshot is valid, with the same check as `freshness.rs`.
    fn is_good(&self, snapshot: u64) -> bool {
        snapshot >= self.clock.load(Ordering::SeqCst) || purge::is_current(&self.slots(), snapshot)
    }

    /// Composes a page from the fragment if the fragment is valid, and a second page from that page. Each page inherits the tag.
    fn make_pages(&self) {
        let page_of = |fragment: Option<u64>| {
            let snapshot = self.clock.load(Ordering::SeqCst);
            fragment.filter(|&fragment| self.is_good(fragment)).map(|_| snapshot)
        };
        let page = page_of(Some(FRAGMENT));
        let outer = page_of(page);
        *self.pages.lock().expect("no thread has panicked") = [page, outer];
    }

    fn assert_purged(&self) {
        assert!(!self.is_good(FRAGMENT), "the purge had no effect");
        let [page, outer] = *self.pages.lock().expect("no thread has panicked");
        assert!(!page.is_some_and(|page| self.is_good(page)), "a page outlived its fragment");
        assert!(!outer.is_some_and(|outer| self.is_good(outer)), "a page outlived its fragment's fragment");
        assert!(self.is_good(self.clock.load(Ordering::SeqCst)), "a page composed now is valid");
    }
}

/// Models pages that are composed while the tag and another tag are purged.
fn purge_of_a_fragment(purge: fn(&AtomicU64, &[&AtomicU64])) {
    check(3, move || {
        let tags = Tags::new();
        let threads = vec![
            work(&tags, move |tags| purge(&tags.clock, &tags.slots())),
            work(&tags, move |tags| purge(&tags.clock, &[&tags.other])),
            work(&tags, Tags::make_pages),
        ];
        Model { threads, afterwards: work(&tags, Tags::assert_purged) }
    });
}

#[test]
fn no_page_outlives_its_fragments() {
    purge_of_a_fragment(purge::purge);
}

#[test]
#[should_panic(expected = "outlived its fragment")]
fn a_purge_that_raises_the_clock_first_lets_a_page_escape() {
    purge_of_a_fragment(|clock, slots| {
        let time = clock.fetch_add(1, Ordering::SeqCst) + 1;
        for slot in slots {
            slot.fetch_max(time, Ordering::SeqCst);
        }
    });
}

#[test]
#[should_panic(expected = "outlived its fragment")]
fn a_purge_that_ignores_other_raises_of_the_clock_lets_a_page_escape() {
    purge_of_a_fragment(|clock, slots| {
        let time = clock.load(Ordering::SeqCst) + 1;
        for slot in slots {
            slot.fetch_max(time, Ordering::SeqCst);
        }
        clock.fetch_max(time, Ordering::SeqCst);
    });
}

/// A purger pauses between its steps, and is mistaken for dead.
#[test]
fn a_purge_finished_by_another_process_is_effective() {
    check(3, || {
        let tags = Tags::new();
        let threads = vec![
            work(&tags, |tags| purge::purge(&tags.clock, &tags.slots())),
            work(&tags, |tags| purge::finish(&tags.clock, &tags.slots())),
            work(&tags, Tags::make_pages),
        ];
        Model { threads, afterwards: work(&tags, Tags::assert_purged) }
    });
}

#[test]
fn an_unfinished_purge_is_finished_by_the_next_store() {
    check(3, || {
        let tags = Tags::new();
        // The state that the dead purger has left.
        tags.slots().into_iter().for_each(|slot| slot.store(FRAGMENT + 1, Ordering::SeqCst));
        let helper = |tags: &Tags| purge::finish(&tags.clock, &tags.slots());
        let threads = vec![work(&tags, helper), work(&tags, helper), work(&tags, Tags::make_pages)];
        Model { threads, afterwards: work(&tags, Tags::assert_purged) }
    });
}
