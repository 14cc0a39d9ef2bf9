//! Models of reading entries without a lock: the pins in `pin.rs`, and the floors in `read.rs` and `eviction.rs`.

use std::rc::Rc;

use loom::cell::UnsafeCell;

use crate::pin::Pin;
use crate::sync::{AtomicU64, Ordering, fence};
use crate::{Model, check, pin, work};

/// An entry at position 0, its floor, and a cell that may pin it.
#[derive(Default)]
struct Pinnable {
    cell: AtomicU64,
    floor: AtomicU64,
    bytes: UnsafeCell<u32>,
}

const PIN: Pin = Pin { shard: 1, main: false, position: 0, size: 96 };

/// Models a reader that pins the entry, while another thread raises the floor above the entry and looks for pins.
fn pin_against_reclaim(set: fn(&Pinnable) -> bool, reclaimers_fence: bool) {
    check(4, move || {
        let all = Rc::new(Pinnable::default());
        let threads = vec![
            work(&all, move |all| {
                if set(all) {
                    all.bytes.with(|_| ());
                    pin::free(&all.cell);
                }
            }),
            work(&all, move |all| {
                all.floor.store(32, Ordering::Release);
                if reclaimers_fence {
                    fence(Ordering::SeqCst);
                }
                match pin::get(&all.cell) {
                    // The bytes are overwritten. Loom fails if a reader can read them at the same time.
                    None => all.bytes.with_mut(|_| ()),
                    Some(pin) => assert_eq!(pin, PIN),
                }
            }),
        ];
        Model { threads, afterwards: Box::new(|| ()) }
    });
}

fn set_pin(all: &Pinnable) -> bool {
    pin::set(&all.cell, PIN) && pin::holds(&all.cell, 0, &all.floor)
}

#[test]
fn a_pinned_entry_is_not_overwritten() {
    pin_against_reclaim(set_pin, true);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_the_reclaimers_fence_a_pin_is_missed() {
    pin_against_reclaim(set_pin, false);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_the_readers_fence_a_pin_is_missed() {
    let set = |all: &Pinnable| {
        all.cell.store(1 << 60, Ordering::Release);
        pin::holds(&all.cell, 0, &all.floor)
    };
    pin_against_reclaim(set, true);
}

/// A ring with room for one entry of two words, each of which contains its position.
#[derive(Default)]
struct Ring {
    slot: AtomicU64,
    floor: AtomicU64,
    words: [AtomicU64; 2],
}

/// Models a writer that replaces the entry at position 0 with the entry at position 1 (`eviction.rs`, `shard.rs`), while a reader follows
/// the slot (`read.rs`). Each side runs with or without its fence.
fn floor_against_overwriting(readers_fence: bool, writers_fence: bool) {
    check(4, move || {
        let ring = Rc::new(Ring::default());
        let threads = vec![
            work(&ring, move |ring| {
                let position = ring.slot.load(Ordering::Acquire);
                if ring.floor.load(Ordering::Acquire) > position {
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
                if writers_fence {
                    fence(Ordering::SeqCst);
                }
                ring.words.iter().for_each(|word| word.store(1, Ordering::Relaxed));
                ring.slot.store(1, Ordering::Release);
            }),
        ];
        Model { threads, afterwards: Box::new(|| ()) }
    });
}

#[test]
fn no_reader_accepts_an_overwritten_entry() {
    floor_against_overwriting(true, true);
}

#[test]
#[should_panic(expected = "torn")]
fn without_the_readers_fence_a_torn_entry_is_accepted() {
    floor_against_overwriting(false, true);
}

#[test]
#[should_panic(expected = "torn")]
fn without_the_writers_fence_a_torn_entry_is_accepted() {
    floor_against_overwriting(true, false);
}
