//! Models of publishing, reading and waiting for events: `protocols/bell.rs`, `protocols/latest_event.rs`, and the use of the head, the floor and
//! the topic names in `events/publish.rs` and `events/read.rs`.

use std::rc::Rc;

use crate::bell::Bell;
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};
use crate::{Futex, Model, check, latest_event, work};

// ---- sleeping ----

#[derive(Default)]
struct Sleep {
    sequence: AtomicU32,
    sleepers: AtomicU32,
    woken: AtomicU32,
    futex: Futex,
}

type Announce = fn(&Sleep);

impl Sleep {
    fn bell(&self) -> Bell<'_> {
        Bell { sequence: &self.sequence, sleepers: &self.sleepers, woken: &self.woken }
    }

    /// Sleeps until there is an event after `seen`.
    fn wait(&self, seen: u32, may_sleep: fn(&Sleep, u32) -> bool) {
        if may_sleep(self, seen) {
            self.futex.wait(&self.sequence, seen, 1);
        }
    }

    fn wake_all(&self) {
        while self.futex.wake().is_some() {}
    }

    fn announce(&self) {
        if let Some(before) = self.bell().ring() {
            self.wake_all();
            self.bell().all_woken(before);
        }
    }
}

fn may_sleep(all: &Sleep, seen: u32) -> bool {
    all.bell().may_sleep(seen)
}

/// Models a reader that has read all events and goes to sleep, while another thread publishes.
fn lie_down(may_sleep: fn(&Sleep, u32) -> bool, announce: Announce) {
    check(4, move || {
        let all = Rc::new(Sleep::default());
        let threads = vec![work(&all, move |all| all.wait(0, may_sleep)), work(&all, announce)];
        Model { threads, afterwards: work(&all, |all| all.futex.assert_all_awake()) }
    });
}

#[test]
fn no_reader_sleeps_through_a_publication() {
    lie_down(may_sleep, Sleep::announce);
}

#[test]
#[should_panic(expected = "slept through")]
fn a_reader_that_sleeps_without_announcing_it_is_not_woken() {
    lie_down(|all, seen| all.sequence.load(Ordering::SeqCst) == seen, Sleep::announce);
}

#[test]
#[should_panic(expected = "slept through")]
fn a_publisher_that_checks_for_sleepers_before_it_publishes_misses_one() {
    lie_down(may_sleep, |all| {
        let sleepers = all.sleepers.load(Ordering::SeqCst);
        all.sequence.fetch_add(1, Ordering::SeqCst);
        if sleepers != all.woken.load(Ordering::Relaxed) {
            all.wake_all();
        }
    });
}

/// Models a reader that goes to sleep with the sequence number that it has read, while one thread publishes and another thread publishes
/// and dies. A third thread publishes afterwards.
fn next_publisher(announce: Announce, dies: Announce) {
    check(3, move || {
        let all = Rc::new(Sleep::default());
        let sleeper = |all: &Sleep| all.wait(all.sequence.load(Ordering::SeqCst), may_sleep);
        let threads = vec![work(&all, sleeper), work(&all, announce), work(&all, dies)];
        let afterwards = work(&all, move |all| {
            announce(all);
            all.futex.assert_all_awake();
        });
        Model { threads, afterwards }
    });
}

/// Publishes, and is killed before it has woken any reader.
fn rings_and_dies(all: &Sleep) {
    let _ = all.bell().ring();
}

#[test]
fn the_next_publisher_wakes_all_sleeping_readers() {
    next_publisher(Sleep::announce, rings_and_dies);
}

#[test]
#[should_panic(expected = "slept through")]
fn a_reader_that_fell_asleep_after_the_publication_must_not_count_as_woken() {
    let announce = |all: &Sleep| {
        if all.bell().ring().is_some() {
            let now = all.sleepers.load(Ordering::SeqCst);
            all.wake_all();
            all.bell().all_woken(now);
        }
    };
    next_publisher(announce, rings_and_dies);
}

#[test]
#[should_panic(expected = "slept through")]
fn a_publisher_that_dies_after_it_announces_the_wake_up_leaves_readers_asleep() {
    next_publisher(Sleep::announce, |all| {
        if let Some(before) = all.bell().ring() {
            all.bell().all_woken(before);
        }
    });
}

// ---- latest events ----

/// A log whose topic has event 5, at position 5.
struct Latest {
    linked: AtomicU64,
    head: AtomicU64,
    last_id: AtomicU64,
    last_at: AtomicU64,
}

impl Latest {
    /// Returns whether event 6 is found, and the latest id, like `Log::since`.
    fn look(&self, read: fn(&Latest) -> (u64, u64), unlinked_first: bool) -> (bool, u64) {
        let is_unlinked = || {
            let at = self.linked.load(Ordering::Acquire);
            self.head.load(Ordering::Acquire) > at
        };
        let before = unlinked_first && is_unlinked();
        let (id, at) = read(self);
        let is_found = before || at == 6 || !unlinked_first && is_unlinked();
        (is_found, id)
    }
}

fn read(log: &Latest) -> (u64, u64) {
    latest_event::load(&log.last_id, &log.last_at)
}

/// Models the publication of event 6, while a reader looks for events after 5, and looks again after it has been
/// notified of event 6.
fn since_against_publisher(tell: fn(&Latest), read: fn(&Latest) -> (u64, u64), unlinked_first: bool) {
    check(4, move || {
        let new = AtomicU64::new;
        let log = Rc::new(Latest { linked: new(6), head: new(6), last_id: new(5), last_at: new(5) });
        let threads = vec![
            work(&log, move |log| {
                log.head.store(7, Ordering::Release);
                tell(log);
                log.linked.store(7, Ordering::Release);
            }),
            work(&log, move |log| {
                let was_published = log.head.load(Ordering::Acquire) == 7;
                let (is_found, id) = log.look(read, unlinked_first);
                assert!(is_found || id == 5 && !was_published, "an existing event was reported missing");
            }),
        ];
        Model { threads, afterwards: Box::new(|| ()) }
    });
}

fn tell(log: &Latest) {
    latest_event::store(&log.last_id, &log.last_at, (6, 6));
}

#[test]
fn an_existing_event_is_found() {
    since_against_publisher(tell, read, true);
}

#[test]
#[should_panic(expected = "reported missing")]
fn a_publisher_that_stores_the_id_first_makes_the_event_seem_evicted() {
    let tell = |log: &Latest| {
        log.last_id.store(6, Ordering::Release);
        log.last_at.store(6, Ordering::Release);
    };
    since_against_publisher(tell, read, true);
}

#[test]
#[should_panic(expected = "reported missing")]
fn a_reader_that_reads_the_position_first_mistakes_the_event_for_evicted() {
    let read = |log: &Latest| {
        let at = log.last_at.load(Ordering::Acquire);
        (log.last_id.load(Ordering::Acquire), at)
    };
    since_against_publisher(tell, read, true);
}

#[test]
#[should_panic(expected = "reported missing")]
fn a_reader_that_checks_for_unlinked_events_first_misses_a_new_event() {
    since_against_publisher(tell, read, false);
}

// ---- records ----

/// A ring with room for one event of two words, each of which contains its position.
struct Ring {
    floor: AtomicU64,
    head: AtomicU64,
    words: [AtomicU64; 2],
}

/// Models event 1 replacing event 0, while a reader reads the event at `position`. Each side runs with or without its fence.
fn read_against_publisher(position: u64, readers_fence: bool, publishers_fence: bool, publish: Ordering) {
    check(4, move || {
        let zero = || AtomicU64::new(0);
        let ring = Rc::new(Ring { floor: zero(), head: AtomicU64::new(1), words: [zero(), zero()] });
        let threads = vec![
            work(&ring, move |ring| {
                if ring.head.load(Ordering::Acquire) <= position {
                    return;
                }
                let [a, b] = &ring.words;
                let read = [a.load(Ordering::Relaxed), b.load(Ordering::Relaxed)];
                if readers_fence {
                    fence(Ordering::Acquire);
                }
                if ring.floor.load(Ordering::Acquire) <= position {
                    assert_eq!(read, [position; 2], "torn");
                }
            }),
            work(&ring, move |ring| {
                ring.floor.store(1, Ordering::Release);
                if publishers_fence {
                    fence(Ordering::Release);
                }
                ring.words.iter().for_each(|word| word.store(1, Ordering::Relaxed));
                ring.head.store(2, publish);
            }),
        ];
        Model { threads, afterwards: Box::new(|| ()) }
    });
}

#[test]
fn no_reader_accepts_a_torn_event() {
    read_against_publisher(0, true, true, Ordering::Release);
    read_against_publisher(1, true, true, Ordering::Release);
}

#[test]
#[should_panic(expected = "torn")]
fn without_the_readers_fence_a_torn_event_is_accepted() {
    read_against_publisher(0, false, true, Ordering::Release);
}

#[test]
#[should_panic(expected = "torn")]
fn without_the_publishers_fence_a_torn_event_is_accepted() {
    read_against_publisher(0, true, false, Ordering::Release);
}

#[test]
#[should_panic(expected = "torn")]
fn raising_the_head_with_a_relaxed_store_publishes_a_torn_event() {
    read_against_publisher(1, true, true, Ordering::Relaxed);
}

// ---- topics ----

/// A cell: the name of its topic, and the topic's latest id.
struct Cell {
    name: AtomicU64,
    last_id: AtomicU64,
    last_at: AtomicU64,
}

const OLD: u64 = 1;
const NONE: u64 = 2;
const NEW: u64 = 3;

/// Models the eviction of a topic whose latest event is 5, while a reader queries the topic. The publisher runs with or without its fence,
/// and the reader with or without its second check.
fn ask_against_giving_up(publishers_fence: bool, look_again: bool) {
    check(4, move || {
        let new = AtomicU64::new;
        let cell = Rc::new(Cell { name: new(OLD), last_id: new(5), last_at: new(5) });
        let threads = vec![
            work(&cell, move |cell| {
                if cell.name.load(Ordering::Acquire) != OLD {
                    return;
                }
                let (id, _) = latest_event::load(&cell.last_id, &cell.last_at);
                if !look_again || cell.name.load(Ordering::Acquire) == OLD {
                    assert_eq!(id, 5, "another topic's");
                }
            }),
            work(&cell, move |cell| {
                cell.name.store(NONE, Ordering::Release);
                if publishers_fence {
                    fence(Ordering::Release);
                }
                cell.last_at.store(0, Ordering::Relaxed);
                cell.last_id.store(9, Ordering::Relaxed);
                cell.name.store(NEW, Ordering::Release);
            }),
        ];
        Model { threads, afterwards: Box::new(|| ()) }
    });
}

#[test]
fn no_reader_gets_the_id_of_another_topic() {
    ask_against_giving_up(true, true);
}

#[test]
#[should_panic(expected = "another topic's")]
fn a_reader_that_does_not_check_the_name_again_gets_the_id_of_another_topic() {
    ask_against_giving_up(true, false);
}

#[test]
#[should_panic(expected = "another topic's")]
fn without_the_publishers_fence_a_reader_gets_the_id_of_another_topic() {
    ask_against_giving_up(false, true);
}
