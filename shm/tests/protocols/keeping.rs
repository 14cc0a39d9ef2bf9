//! Models of connections that a gateway keeps to an app process: `kept.rs`, together with `units.rs`.

use std::rc::Rc;

use crate::kept;
use crate::sync::{AtomicU64, Ordering};
use crate::units::{self, Door, Taken};
use crate::{Model, check, work};

const NOW: u64 = 1_000_000;
const EPOCH: u32 = 1;
const KEEPER: u32 = 0;

/// An app process with one unit, which gateway 0 holds at first.
#[derive(Default)]
struct Table {
    door: AtomicU64,
    units: [AtomicU64; 1],
    kept: AtomicU64,
    /// Whether gateway 0 has been woken, so that it looks at its connection again.
    keeper_woken: AtomicU64,
    master_woken: AtomicU64,
    /// Whether gateway 0 has closed its connection.
    closed: AtomicU64,
}

type Release = fn(&Table, u64);

fn release(table: &Table, held: u64) {
    kept::keep(&table.kept, EPOCH, KEEPER);
    units::free(&table.units[0], held, NOW);
}

fn release_too_early(table: &Table, held: u64) {
    units::free(&table.units[0], held, NOW);
    kept::keep(&table.kept, EPOCH, KEEPER);
}

fn new_table() -> (Rc<Table>, u64) {
    let table = Table::default();
    assert_eq!(units::open(&table.door, &table.units, usize::MAX, NOW), EPOCH);
    let Taken::Mine(held) = take(&table, KEEPER) else { panic!("the unit is free") };
    (Rc::new(table), held)
}

fn take(table: &Table, gateway: u32) -> Taken {
    let door = table.door.load(Ordering::SeqCst);
    let unit = table.units[0].load(Ordering::SeqCst);
    if !units::is_free(door, unit) {
        return Taken::Lost;
    }
    units::take((&table.door, door), (&table.units[0], unit), gateway, NOW)
}

fn set(flag: &AtomicU64) {
    flag.store(1, Ordering::Relaxed);
}

fn is_set(flag: &AtomicU64) -> bool {
    flag.load(Ordering::Relaxed) == 1
}

/// Models the keeper's release while another gateway claims the unit. That gateway must find the keeper.
fn keep_against_claim(release: Release) {
    check(4, move || {
        let (table, held) = new_table();
        let other = |table: &Table| {
            if let Taken::Mine(_) = take(table, 1) {
                let keeper = kept::keeper(table.kept.load(Ordering::SeqCst), EPOCH);
                assert_eq!(keeper, Some(KEEPER), "a connection that is not known is in the way");
            }
        };
        Model {
            threads: vec![work(&table, move |table| release(table, held)), work(&table, other)],
            afterwards: work(&table, |_| ()),
        }
    });
}

#[test]
fn a_gateway_that_takes_a_unit_finds_its_keeper() {
    keep_against_claim(release);
}

#[test]
#[should_panic(expected = "is in the way")]
fn a_unit_that_is_freed_before_the_keeper_is_stored_has_an_unknown_connection() {
    keep_against_claim(release_too_early);
}

/// Models the keeper's release while the master drains the app process. The connection is closed, or the keeper is woken; the master never
/// finds the process idle before.
fn keep_against_drain(release: Release, looks_at_door: bool) {
    check(4, move || {
        let (table, held) = new_table();
        let keeper = move |table: &Table| {
            release(table, held);
            if looks_at_door && units::state(table.door.load(Ordering::SeqCst)) != Door::Open {
                set(&table.closed);
                kept::forget(&table.kept, EPOCH, KEEPER);
                set(&table.master_woken);
            }
        };
        let master = |table: &Table| {
            units::drain(&table.door);
            let is_free = units::busy(&table.units) == 0;
            match kept::keeper(table.kept.load(Ordering::SeqCst), EPOCH) {
                Some(_) => set(&table.keeper_woken),
                None if is_free => assert!(is_set(&table.closed), "found idle with a connection"),
                None => {}
            }
        };
        let afterwards = |table: &Table| {
            let is_closed = is_set(&table.closed);
            assert!(is_closed || is_set(&table.keeper_woken), "nobody closes the connection");
            assert!(!is_closed || is_set(&table.master_woken), "the master sleeps through the end");
        };
        Model { threads: vec![work(&table, keeper), work(&table, master)], afterwards: work(&table, afterwards) }
    });
}

#[test]
fn a_connection_is_closed_when_its_process_is_drained() {
    keep_against_drain(release, true);
}

#[test]
#[should_panic(expected = "nobody closes")]
fn a_keeper_that_does_not_look_at_the_door_keeps_its_connection() {
    keep_against_drain(release, false);
}

#[test]
#[should_panic(expected = "found idle")]
fn a_process_whose_keeper_is_stored_too_late_is_found_idle() {
    keep_against_drain(release_too_early, true);
}
