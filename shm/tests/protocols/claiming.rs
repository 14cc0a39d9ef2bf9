//! Models of claiming the units of app processes: `units.rs`.

use std::rc::Rc;

use loom::cell::UnsafeCell;

use crate::sync::{AtomicU64, Ordering, fence};
use crate::units::{self, Door, Taken};
use crate::{Model, check, work};

const NOW: u64 = 1_000_000;

/// Two app processes with one unit each (most models use only the first), and two gateways.
#[derive(Default)]
struct Table {
    doors: [AtomicU64; 2],
    units: [[AtomicU64; 1]; 2],
    rows: [AtomicU64; 2],
    /// The app process in slot 0. Only one gateway at a time may use it, and the master may kill it only while no gateway uses it.
    process: UnsafeCell<u32>,
    /// The numbers of wake-ups, as counted by an eventfd.
    master_woken: AtomicU64,
    woken: [AtomicU64; 2],
    /// The requests that each gateway has forwarded.
    served: [AtomicU64; 2],
    idle: AtomicU64,
}

impl Table {
    /// Returns a table in which the door of slot 0 is open.
    fn new() -> Rc<Table> {
        let table = Table::default();
        units::open(&table.doors[0], &table.units[0], usize::MAX, NOW);
        Rc::new(table)
    }

    /// Tries to claim a unit.
    fn take(&self, slot: usize, gateway: u32) -> Taken {
        let (door, [unit]) = (&self.doors[slot], &self.units[slot]);
        let seen_door = door.load(Ordering::SeqCst);
        let seen = unit.load(Ordering::SeqCst);
        if !units::is_free(seen_door, seen) {
            return Taken::Lost;
        }
        units::take((door, seen_door), (unit, seen), gateway, NOW)
    }

    /// Claims a unit that is free.
    fn hold(&self, slot: usize, gateway: u32) -> u64 {
        match self.take(slot, gateway) {
            Taken::Mine(word) => word,
            other => panic!("the unit is free: {other:?}"),
        }
    }

    fn has_free_unit(&self) -> bool {
        self.doors.iter().zip(&self.units).any(|(door, [unit])| {
            let door = door.load(Ordering::SeqCst);
            units::is_free(door, unit.load(Ordering::SeqCst))
        })
    }

    /// Wakes the gateway that waits longest, except one.
    fn wake(&self, except: Option<u32>) {
        let rows = (0..).zip(&self.rows).filter(|&(gateway, _)| Some(gateway) != except);
        if let Some(gateway) = units::longest_waiting(rows, NOW) {
            self.woken[gateway as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn wake_master(&self) {
        self.master_woken.fetch_add(1, Ordering::Relaxed);
    }

    fn is_open(&self) -> bool {
        units::state(self.doors[0].load(Ordering::SeqCst)) == Door::Open
    }
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

type Take = fn(&Table, u32) -> Taken;
type Free = fn(&AtomicU64, u64) -> bool;

fn take(table: &Table, gateway: u32) -> Taken {
    table.take(0, gateway)
}

fn free(unit: &AtomicU64, mine: u64) -> bool {
    units::free(unit, mine, NOW)
}

/// Frees a unit without a fence.
fn free_without_fence(unit: &AtomicU64, mine: u64) -> bool {
    unit.compare_exchange(mine, NOW << 24 | mine & 0xff_f000, Ordering::AcqRel, Ordering::Relaxed).is_ok()
}

/// Stores a waiting row without a fence.
fn set_waiting_without_fence(row: &AtomicU64, requests: u32, oldest_us: u64) -> bool {
    let word = if requests == 0 { 0 } else { oldest_us << 24 | u64::from(requests) };
    row.swap(word, Ordering::AcqRel) != 0 && word == 0
}

// ---- a claim against a drain ----

/// Models two gateways that claim the unit, while the master drains the app process and kills it when it is idle. Afterwards, the master has
/// found the app process idle, or has been woken.
fn claim_against_drain(take: Take, free: Free, drain: fn(&AtomicU64)) {
    check(3, move || {
        let table = Table::new();
        let gateway = move |gateway| {
            move |table: &Table| match take(table, gateway) {
                Taken::Mine(word) => {
                    table.process.with_mut(|_| ());
                    assert!(free(&table.units[0][0], word), "the slot has only one app process");
                    if !table.is_open() {
                        table.wake_master();
                    }
                }
                Taken::GivenBack => table.wake_master(),
                Taken::Lost => {}
            }
        };
        let master = move |table: &Table| {
            drain(&table.doors[0]);
            if units::busy(&table.units[0]) == 0 {
                table.process.with_mut(|_| ());
                table.idle.store(1, Ordering::Relaxed);
            }
        };
        let threads = vec![work(&table, gateway(0)), work(&table, gateway(1)), work(&table, master)];
        let afterwards = work(&table, |table| {
            assert!(count(&table.idle) + count(&table.master_woken) > 0, "the master sleeps through the end");
            assert_eq!(units::busy(&table.units[0]), 0);
        });
        Model { threads, afterwards }
    });
}

#[test]
fn an_idle_process_that_is_drained_is_not_claimed() {
    claim_against_drain(take, free, units::drain);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_claim_without_a_second_look_at_the_door_uses_a_dead_process() {
    let take = |table: &Table, gateway: u32| {
        let door = table.doors[0].load(Ordering::SeqCst);
        let [unit] = &table.units[0];
        let seen = unit.load(Ordering::SeqCst);
        let mine = seen | u64::from(gateway + 1);
        let is_mine = units::is_free(door, seen)
            && unit.compare_exchange(seen, mine, Ordering::SeqCst, Ordering::Relaxed).is_ok();
        if is_mine { Taken::Mine(mine) } else { Taken::Lost }
    };
    claim_against_drain(take, free, units::drain);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_claim_without_its_fence_uses_a_dead_process() {
    let take = |table: &Table, gateway: u32| {
        let door = table.doors[0].load(Ordering::SeqCst);
        let [unit] = &table.units[0];
        let seen = unit.load(Ordering::SeqCst);
        let mine = seen | u64::from(gateway + 1);
        if !units::is_free(door, seen)
            || unit.compare_exchange(seen, mine, Ordering::AcqRel, Ordering::Relaxed).is_err()
        {
            Taken::Lost
        } else if table.doors[0].load(Ordering::Acquire) == door {
            Taken::Mine(mine)
        } else {
            free(unit, mine);
            Taken::GivenBack
        }
    };
    claim_against_drain(take, free, units::drain);
}

#[test]
#[should_panic(expected = "sleeps through")]
fn a_drain_without_its_fence_misses_a_release() {
    claim_against_drain(take, free, |door| door.store(door.load(Ordering::Acquire) & !3 | 2, Ordering::Release));
}

#[test]
#[should_panic(expected = "sleeps through")]
fn giving_back_without_waking_the_master_leaves_it_asleep() {
    let take = |table: &Table, gateway: u32| match table.take(0, gateway) {
        Taken::GivenBack => Taken::Lost,
        other => other,
    };
    claim_against_drain(take, free, units::drain);
}

#[test]
#[should_panic(expected = "sleeps through")]
fn a_release_without_its_fence_misses_the_drain() {
    claim_against_drain(take, free_without_fence, units::drain);
}

// ---- a waiting gateway against a release, or an opened door ----

type SetWaiting = fn(&AtomicU64, u32, u64) -> bool;

/// Models a gateway that begins to wait, while `provide` makes a unit available: it releases the unit of an app process, or opens the door.
fn wait_against(wait: fn(&Table) -> Taken, start: fn(&Table) -> u64, provide: fn(&Table, u64)) {
    check(4, move || {
        let table = Table::new();
        let started = start(&table);
        let waiter = move |table: &Table| {
            if let Taken::Mine(_) = wait(table) {
                table.served[1].store(1, Ordering::Relaxed);
            }
        };
        let threads = vec![work(&table, waiter), work(&table, move |table| provide(table, started))];
        let afterwards = work(&table, |table| {
            assert!(count(&table.served[1]) + count(&table.woken[1]) > 0, "slept through its wake-up");
        });
        Model { threads, afterwards }
    });
}

fn wait(table: &Table) -> Taken {
    units::set_waiting(&table.rows[1], 1, NOW);
    table.take(0, 1)
}

fn hold(table: &Table) -> u64 {
    table.hold(0, 0)
}

fn release(table: &Table, word: u64) {
    assert!(free(&table.units[0][0], word));
    if table.is_open() {
        table.wake(None);
    }
}

#[test]
fn no_gateway_sleeps_through_a_release() {
    wait_against(wait, hold, release);
}

#[test]
#[should_panic(expected = "slept through")]
fn a_release_without_its_fence_misses_a_waiting_gateway() {
    wait_against(wait, hold, |table, word| {
        assert!(free_without_fence(&table.units[0][0], word));
        table.wake(None);
    });
}

#[test]
#[should_panic(expected = "slept through")]
fn a_waiting_gateway_without_its_fence_misses_a_release() {
    let wait = |table: &Table| {
        set_waiting_without_fence(&table.rows[1], 1, NOW);
        table.take(0, 1)
    };
    wait_against(wait, hold, release);
}

#[test]
#[should_panic(expected = "slept through")]
fn a_gateway_that_waits_after_its_last_attempt_misses_a_release() {
    let wait = |table: &Table| {
        let taken = table.take(0, 1);
        units::set_waiting(&table.rows[1], 1, NOW);
        taken
    };
    wait_against(wait, hold, release);
}

fn close(table: &Table) -> u64 {
    units::close(&table.doors[0]);
    0
}

#[test]
fn no_gateway_sleeps_through_the_opening_of_a_door() {
    wait_against(wait, close, |table, _| {
        units::open(&table.doors[0], &table.units[0], usize::MAX, NOW);
        table.wake(None);
    });
}

#[test]
#[should_panic(expected = "slept through")]
fn opening_without_a_fence_misses_a_waiting_gateway() {
    wait_against(wait, close, |table, _| {
        table.units[0][0].store(2 << 12, Ordering::SeqCst);
        table.doors[0].store(2 << 32 | 1, Ordering::SeqCst);
        table.wake(None);
    });
}

#[test]
fn no_gateway_sleeps_through_the_removal_of_a_dead_gateway() {
    wait_against(wait, hold, |table, _| {
        assert!(units::free_from_dead(&table.units[0][0], 0, NOW));
        table.wake(None);
    });
}

// ---- a wake-up that is passed on ----

/// Models two waiting gateways and two app processes. One app process has been released, and gateway 0 has been woken for it. The other is
/// released while gateway 0 stops waiting.
fn pass_on(set_waiting: SetWaiting, free: Free, looks: bool) {
    check(3, move || {
        let table = Table::new();
        units::open(&table.doors[1], &table.units[1], usize::MAX, NOW);
        let held = table.hold(1, 2);
        units::set_waiting(&table.rows[0], 1, NOW - 2);
        units::set_waiting(&table.rows[1], 1, NOW - 1);
        let woken = move |table: &Table| {
            table.hold(0, 0);
            if set_waiting(&table.rows[0], 0, 0) && looks && table.has_free_unit() {
                table.wake(Some(0));
            }
        };
        let releaser = move |table: &Table| {
            assert!(free(&table.units[1][0], held));
            table.wake(None);
        };
        let afterwards = work(&table, |table| assert!(count(&table.woken[1]) > 0, "gateway 1 is not woken"));
        Model { threads: vec![work(&table, woken), work(&table, releaser)], afterwards }
    });
}

#[test]
fn a_gateway_that_stops_waiting_passes_its_wake_up_on() {
    pass_on(units::set_waiting, free, true);
}

#[test]
#[should_panic(expected = "not woken")]
fn without_looking_for_free_units_a_wake_up_is_lost() {
    pass_on(units::set_waiting, free, false);
}

#[test]
#[should_panic(expected = "not woken")]
fn clearing_the_row_without_a_fence_loses_a_wake_up() {
    pass_on(set_waiting_without_fence, free, true);
}

#[test]
#[should_panic(expected = "not woken")]
fn releasing_without_a_fence_loses_a_wake_up() {
    pass_on(units::set_waiting, free_without_fence, true);
}

// ---- an app process and its successor ----

/// Models a gateway that releases a unit of a dead app process late, and one that began to claim it early, while the master opens the door
/// for the successor and a third gateway claims it.
fn late_for_the_successor(free: Free, open: fn(&AtomicU64, &[AtomicU64])) {
    check(3, move || {
        let table = Table::new();
        let late = table.hold(0, 0);
        units::close(&table.doors[0]);
        let releaser = move |table: &Table| {
            free(&table.units[0][0], late);
        };
        let user = move |gateway| {
            move |table: &Table| {
                if let Taken::Mine(word) = table.take(0, gateway) {
                    table.process.with_mut(|_| ());
                    assert!(free(&table.units[0][0], word), "the unit was taken from its holder");
                }
            }
        };
        let master = move |table: &Table| {
            open(&table.doors[0], &table.units[0]);
            user(1)(table);
        };
        Model {
            threads: vec![work(&table, releaser), work(&table, user(2)), work(&table, master)],
            afterwards: work(&table, |table| assert_eq!(units::busy(&table.units[0]), 0)),
        }
    });
}

fn open(door: &AtomicU64, units: &[AtomicU64]) {
    units::open(door, units, usize::MAX, NOW);
}

#[test]
fn a_late_release_does_not_free_a_unit_of_the_successor() {
    late_for_the_successor(free, open);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_release_without_a_check_frees_a_unit_of_the_successor() {
    let free = |unit: &AtomicU64, _: u64| {
        let seen = unit.load(Ordering::Acquire);
        unit.store(seen & !0xfff, Ordering::Release);
        true
    };
    late_for_the_successor(free, open);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn opening_the_door_before_the_units_are_free_takes_a_unit_from_its_holder() {
    late_for_the_successor(free, |door, units| {
        let tag = 1 << 12; // the same tag as before
        door.store(1 << 32 | 1, Ordering::SeqCst);
        units[0].store(NOW << 24 | tag, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    });
}
