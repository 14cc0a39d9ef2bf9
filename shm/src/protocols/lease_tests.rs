use super::lease::{Claim, MAX_LEASE_MS, end_turn, enter, is_held, is_over, leave, left_ms};
use super::lease::{passes, release, set_pass, take, take_from};
use super::sync::{AtomicU32, AtomicU64, Ordering};

const KEY: u64 = 5 << 47 | 77;
const OTHER_KEY: u64 = 6 << 47 | 77;
const NOW: u64 = 1_000_000;

fn mine(claim: Claim) -> u64 {
    match claim {
        Claim::Mine(word) => word,
        other => panic!("not ours: {other:?}"),
    }
}

#[test]
fn one_holds_it_and_the_others_learn_who() {
    let cell = AtomicU64::new(0);
    let word = mine(take(&cell, KEY, 3, NOW, NOW + 100));
    assert!(is_held(&cell, word) && left_ms(word, NOW + 40) == 60);
    assert_eq!(take(&cell, KEY, 4, NOW + 99, NOW + 200), Claim::Held { by: 3, word });
    assert_eq!(take(&cell, KEY, 3, NOW + 99, NOW + 200), Claim::Held { by: 3, word }, "not even by its holder again");
    assert!(release(&cell, word));
    assert!(!is_held(&cell, word) && !release(&cell, word));
    mine(take(&cell, KEY, 4, NOW, NOW + 100));
}

#[test]
fn a_cell_taken_for_another_key_is_said_to_be() {
    let cell = AtomicU64::new(0);
    let word = mine(take(&cell, KEY, 3, NOW, NOW + 100));
    assert_eq!(take(&cell, OTHER_KEY, 4, NOW, NOW + 100), Claim::OtherKey);
    assert!(release(&cell, word));
    let word = mine(take(&cell, OTHER_KEY, 4, NOW, NOW + 100));
    assert_eq!(take(&cell, KEY, 3, NOW, NOW + 100), Claim::OtherKey);
    mine(take(&cell, KEY, 3, NOW + 100, NOW + 200));
    assert!(!is_held(&cell, word), "a deadline that has passed frees it for any key");
}

#[test]
fn a_late_holder_changes_nothing() {
    let cell = AtomicU64::new(0);
    let first = mine(take(&cell, KEY, 3, NOW, NOW + 100));
    let second = mine(take(&cell, KEY, 4, NOW + 100, NOW + 200));
    assert!(!release(&cell, first) && is_held(&cell, second));
    // The process takes its own lease over, and the words still differ.
    let third = mine(take(&cell, KEY, 4, NOW + 200, NOW + 200));
    assert!(!release(&cell, second) && is_held(&cell, third));
}

#[test]
fn the_dead_hold_nothing() {
    let cell = AtomicU64::new(0);
    assert!(!take_from(&cell, 3));
    mine(take(&cell, KEY, 3, NOW, NOW + 100));
    assert!(!take_from(&cell, 4), "not its own");
    assert!(take_from(&cell, 3));
    assert_eq!(cell.load(Ordering::Relaxed), 0);
}

#[test]
fn deadlines_survive_the_wrap_of_their_32_bits() {
    for wrap in [1 << 32, 5 << 32] {
        for now_ms in [wrap - 50, wrap - 1, wrap, wrap + 1] {
            let cell = AtomicU64::new(0);
            let word = mine(take(&cell, KEY, 0, now_ms, now_ms + 100));
            for after in 0..100 {
                assert_eq!(left_ms(word, now_ms + after), 100 - after);
                assert_eq!(take(&cell, KEY, 1, now_ms + after, now_ms + 200), Claim::Held { by: 0, word });
            }
            assert!(is_over(word, now_ms + 100) && is_over(word, now_ms + (1 << 31)));
            mine(take(&cell, KEY, 1, now_ms + 100, now_ms + 200));
        }
    }
}

#[test]
fn no_deadline_is_further_than_the_longest() {
    let cell = AtomicU64::new(0);
    let word = mine(take(&cell, KEY, 0, NOW, u64::MAX));
    assert_eq!(left_ms(word, NOW), MAX_LEASE_MS);
    // Even a corrupted word, or a word that expired long ago, does not count as held for longer than the maximum.
    for bit in 0..64 {
        assert!(left_ms(word ^ 1 << bit, NOW) <= MAX_LEASE_MS);
    }
    assert!((27..32).all(|bit| is_over(word ^ 1 << bit, NOW)));
    assert!(is_over(word, NOW + MAX_LEASE_MS) && is_over(word, NOW + (1 << 32) - 1));
    // A deadline that has already passed is moved to the next millisecond.
    let word = mine(take(&AtomicU64::new(0), KEY, 0, NOW, 0));
    assert_eq!(left_ms(word, NOW), 1);
}

#[test]
fn who_waits_is_counted_and_turns_go_up() {
    let (turn, waiters) = (AtomicU32::new(u32::MAX), AtomicU32::new(0));
    assert!(!end_turn(&turn, &waiters), "nobody waits");
    assert_eq!(enter(&waiters, &turn), 0);
    assert!(end_turn(&turn, &waiters));
    assert_eq!(enter(&waiters, &turn), 1);
    leave(&waiters);
    leave(&waiters);
    leave(&waiters);
    assert_eq!(waiters.load(Ordering::Relaxed), 0, "also if one left too often");
}

#[test]
fn nobody_waits_for_what_is_not_stored() {
    let pass = AtomicU64::new(0);
    assert!(!passes(&pass, 0, 0) && !passes(&pass, KEY, NOW));
    set_pass(&pass, KEY, NOW + 100);
    assert!(passes(&pass, KEY, NOW) && passes(&pass, KEY, NOW + 99));
    assert!(!passes(&pass, OTHER_KEY, NOW) && !passes(&pass, KEY, NOW + 100));
}
