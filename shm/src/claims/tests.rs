use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd as _;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;

const NOW: u64 = 7_000_000;

/// A table in which all doors are open.
fn opened(processes: u32, units: u32, gateways: u32) -> Claims {
    let claims = Claims::create(processes, units, gateways).unwrap();
    for process in 0..processes {
        claims.open(process, 100 + process, u32::MAX, NOW).unwrap();
    }
    claims
}

fn claim(claims: &Claims, gateway: u32, now_us: u64) -> Option<HeldUnit> {
    let attempt = claims.claim(gateway, now_us);
    assert!(!attempt.wake_master);
    attempt.unit
}

fn why(result: Result<Claims, SegmentError>) -> &'static str {
    match result {
        Err(SegmentError::Unusable { why }) => why,
        other => panic!("not refused as unusable: {other:?}"),
    }
}

#[test]
fn units_are_claimed_until_none_is_free() {
    let claims = opened(3, 2, 1);
    let mut held: Vec<HeldUnit> = std::iter::from_fn(|| claim(&claims, 0, NOW)).collect();
    let mut processes: Vec<u32> = held.iter().map(HeldUnit::process).collect();
    processes[..3].sort_unstable();
    processes[3..].sort_unstable();
    assert_eq!(processes, [0, 1, 2, 0, 1, 2], "the fewest busy units come first");
    let last = held.pop().unwrap();
    assert_eq!((last.pid(), last.epoch(), last.begun()), (100 + last.process(), 1, 2));
    assert_eq!(claims.demand(NOW).in_flight, 6);
    let process = last.process();
    assert_eq!(claims.release(last, NOW), Wake::Nobody);
    assert_eq!(claim(&claims, 0, NOW).map(|unit| (unit.process(), unit.begun())), Some((process, 3)));
}

#[test]
fn equal_processes_take_turns() {
    let claims = opened(5, 1, 2);
    let mut served = [0; 5];
    for _ in 0..50 {
        let unit = claim(&claims, 0, NOW).unwrap();
        served[unit.process() as usize] += 1;
        let _ = claims.release(unit, NOW);
    }
    assert_eq!(served, [10; 5]);
}

#[test]
fn a_drain_ends_with_the_last_release() {
    let claims = opened(1, 2, 2);
    let (first, second) = (claim(&claims, 0, NOW).unwrap(), claim(&claims, 1, NOW).unwrap());
    assert!(!claims.drain(0));
    assert_eq!(claims.app_process(0).map(|process| (process.door, process.busy)), Some((Door::Draining, 2)));
    assert_eq!(claims.set_waiting(1, 1, NOW, NOW), None);
    assert_eq!(claim(&claims, 1, NOW), None);
    assert_eq!(claims.release(first, NOW), Wake::Master);
    assert!(!claims.is_idle(0));
    assert_eq!(claims.release(second, NOW), Wake::Master);
    assert!(claims.is_idle(0) && claims.drain(0));
    claims.close(0);
    assert_eq!(claims.open(0, 7, u32::MAX, NOW + 1), Some(2));
    assert_eq!(claims.next_to_wake(None, NOW), Some(1));
    let now = claims.app_process(0).unwrap();
    assert_eq!((now.door, now.epoch, now.pid, now.busy), (Door::Open, 2, 7, 0));
    assert_eq!((now.begun, now.since_us), (0, NOW + 1));
}

#[test]
fn an_app_process_serves_as_many_requests_as_it_was_opened_for() {
    let claims = opened(1, 4, 1);
    for (units, expected) in [(2, 2), (1, 1), (4, 4), (9, 4), (0, 0)] {
        claims.close(0);
        claims.open(0, 7, units, NOW).unwrap();
        let held = std::iter::from_fn(|| claim(&claims, 0, NOW)).collect::<Vec<_>>();
        assert_eq!((held.len(), claims.demand(NOW).in_flight), (expected, u32::try_from(expected).unwrap()));
        held.into_iter().for_each(|unit| assert_eq!(claims.release(unit, NOW), Wake::Nobody));
        assert!(claims.is_idle(0));
    }
}

#[test]
fn a_unit_of_a_dead_app_process_is_released_without_effect() {
    let claims = opened(1, 1, 2);
    let late = claim(&claims, 0, NOW).unwrap();
    claims.close(0);
    assert_eq!((claim(&claims, 1, NOW), claims.is_idle(0), claims.demand(NOW).in_flight), (None, false, 0));
    claims.open(0, 8, u32::MAX, NOW).unwrap();
    let unit = claim(&claims, 1, NOW).unwrap();
    assert_eq!((unit.pid(), unit.epoch()), (8, 2));
    assert_eq!(claims.set_waiting(0, 1, NOW, NOW), None);
    assert_eq!(claims.release(late, NOW), Wake::Nobody);
    assert_eq!(claim(&claims, 0, NOW), None, "the successor's unit is still claimed");
    assert_eq!(claims.release(unit, NOW), Wake::Gateway(0));
}

#[test]
fn the_gateway_that_waits_longest_is_woken() {
    let claims = opened(2, 1, 3);
    let units = [claim(&claims, 0, NOW).unwrap(), claim(&claims, 0, NOW).unwrap()];
    assert_eq!(claims.set_waiting(1, 1, NOW - 10, NOW), None);
    assert_eq!(claims.set_waiting(2, 3, NOW - 20, NOW), None);
    let demand = claims.demand(NOW);
    assert_eq!((demand.in_flight, demand.waiting, demand.oldest_wait_us), (2, 4, 20));
    assert_eq!(claims.next_to_wake(Some(2), NOW), Some(1));
    // Both releases wake gateway 2, which needs only one unit, and passes the other wake-up on.
    assert_eq!(units.map(|unit| claims.release(unit, NOW)), [Wake::Gateway(2); 2]);
    let unit = claim(&claims, 2, NOW).unwrap();
    assert_eq!(claims.set_waiting(2, 2, NOW - 5, NOW), None, "it still waits, and claims again");
    assert_eq!(claims.set_waiting(2, 0, 0, NOW), Some(1));
    assert_eq!(claims.set_waiting(2, 0, 0, NOW), None);
    let other = claim(&claims, 1, NOW).unwrap();
    assert_eq!(claims.set_waiting(1, 0, 0, NOW), None);
    assert_eq!([unit, other].map(|unit| claims.release(unit, NOW)), [Wake::Nobody; 2]);
    // If no unit is free, there is no wake-up to pass on.
    let _held = [claim(&claims, 0, NOW), claim(&claims, 0, NOW)];
    assert_eq!((claims.set_waiting(1, 1, NOW, NOW), claims.set_waiting(2, 1, NOW, NOW)), (None, None));
    assert_eq!(claims.set_waiting(1, 0, 0, NOW), None);
    claims.reset_waiting();
    assert_eq!((claims.demand(NOW).waiting, claims.next_to_wake(None, NOW)), (0, None));
}

#[test]
fn a_dead_gateway_leaves_nothing() {
    let claims = opened(4, 2, 2);
    claims.gateway_started(1, 55);
    let other = claim(&claims, 0, NOW).unwrap();
    let held: Vec<HeldUnit> = std::iter::from_fn(|| claim(&claims, 1, NOW)).collect();
    assert_eq!((held.len(), claims.set_waiting(1, 9, NOW, NOW), claims.gateway(1)), (7, None, Some((55, 9))));
    claims.close(3);
    assert!(!claims.drain(2));
    assert_eq!(claims.gateway_died(1, NOW), [0, 1, 2]);
    assert_eq!((claims.gateway_died(1, NOW), claims.gateway(1)), (vec![], Some((0, 0))));
    let busy: Vec<u32> = (0..4).map(|process| claims.app_process(process).unwrap().busy).collect();
    assert_eq!((busy.iter().sum::<u32>(), busy[other.process() as usize]), (1, 1), "the other gateway keeps its unit");
}

#[test]
fn slots_that_do_not_exist_are_ignored() {
    let claims = opened(2, 1, 2);
    assert_eq!((claims.processes(), claims.units(), claims.gateways()), (2, 1, 2));
    for slot in [2, 3, 4095, u32::MAX] {
        assert_eq!((claim(&claims, slot, NOW), claims.open(slot, 1, u32::MAX, NOW)), (None, None));
        assert_eq!((claims.drain(slot), claims.is_idle(slot), claims.app_process(slot)), (true, true, None));
        assert_eq!((claims.set_waiting(slot, 1, NOW, NOW), claims.gateway(slot)), (None, None));
        claims.close(slot);
        claims.gateway_started(slot, 1);
        assert_eq!(claims.gateway_died(slot, NOW), []);
    }
    let larger = opened(9, 3, 1);
    let foreign: Vec<HeldUnit> = std::iter::from_fn(|| claim(&larger, 0, NOW)).collect();
    for unit in foreign {
        let _ = claims.release(unit, NOW);
    }
    assert_eq!(claims.demand(NOW), AppDemand::default());
}

/// A random history of all operations, compared with a model.
#[test]
fn every_unit_has_one_owner_at_any_time() {
    let seed = fastrand::u64(..);
    for round in 0..40 {
        let seed = seed.wrapping_add(round);
        let mut random = fastrand::Rng::with_seed(seed);
        let (processes, per_process, gateways) = (random.u32(1..6), random.u32(1..4), random.u32(1..5));
        let claims = opened(processes, per_process, gateways);
        let mut held: Vec<(u32, HeldUnit)> = Vec::new();
        let mut doors: HashMap<u32, (Door, u32)> = (0..processes).map(|slot| (slot, (Door::Open, 1))).collect();
        for step in 0..2000 {
            let (process, gateway, now) = (random.u32(0..processes), random.u32(0..gateways), NOW + step);
            let is_current = |doors: &HashMap<u32, (Door, u32)>, unit: &HeldUnit| doors[&unit.process].1 == unit.epoch;
            match random.u32(0..100) {
                0..45 => match claim(&claims, gateway, now) {
                    Some(unit) => {
                        assert_eq!(doors[&unit.process], (Door::Open, unit.epoch), "seed {seed}");
                        let key = |unit: &HeldUnit| (unit.process, unit.unit, unit.epoch);
                        assert!(held.iter().all(|(_, other)| key(other) != key(&unit)), "seed {seed}: two owners");
                        held.push((gateway, unit));
                    }
                    None => {
                        let open = doors.values().filter(|(door, _)| *door == Door::Open).count();
                        let used = held
                            .iter()
                            .filter(|(_, unit)| doors[&unit.process].0 == Door::Open && is_current(&doors, unit));
                        assert_eq!(used.count(), open * per_process as usize, "seed {seed}: a unit was free");
                    }
                },
                45..90 if !held.is_empty() => {
                    let (_, unit) = held.swap_remove(random.usize(0..held.len()));
                    let drains = doors[&unit.process].0 != Door::Open && is_current(&doors, &unit);
                    assert_eq!(claims.release(unit, now) == Wake::Master, drains, "seed {seed}");
                }
                90..94 => {
                    let entry = doors.get_mut(&process).unwrap();
                    if entry.0 == Door::Open {
                        entry.0 = Door::Draining;
                    }
                    let mine = held.iter().filter(|(_, unit)| unit.process == process);
                    let idle = mine.filter(|(_, unit)| unit.epoch == entry.1).count() == 0;
                    assert_eq!(claims.drain(process), idle, "seed {seed}");
                }
                94..98 => {
                    claims.close(process);
                    let epoch = claims.open(process, 1, u32::MAX, now).unwrap();
                    doors.insert(process, (Door::Open, epoch));
                }
                _ => {
                    claims.gateway_died(gateway, now);
                    held.retain(|(owner, _)| *owner != gateway);
                }
            }
            let owned = held.iter().filter(|(_, unit)| is_current(&doors, unit)).count();
            assert_eq!(claims.demand(now).in_flight as usize, owned, "seed {seed}, step {step}");
        }
    }
}

#[test]
fn a_table_full_of_garbage_is_harmless() {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let claims = Claims::create(5, 3, 4).unwrap();
    for _ in 0..2000 {
        for (_, row) in claims.table.processes() {
            row.units.iter().chain([row.door, row.pid, row.begun, row.since_us]).for_each(|word| {
                word.store(
                    random.u64(..) & [u64::MAX, 3 | 0xfff << 12 | u64::MAX << 32][random.usize(0..2)],
                    Ordering::SeqCst,
                );
            });
        }
        for (_, row) in claims.table.gateways() {
            [row.waiting, row.pid, row.turn].into_iter().for_each(|word| word.store(random.u64(..), Ordering::SeqCst));
        }
        let now = random.u64(..);
        if let Some(unit) = claims.claim(random.u32(0..4), now).unit {
            assert!(unit.process() < 5, "seed {seed}");
            let wake = claims.release(unit, now);
            assert!(!matches!(wake, Wake::Gateway(gateway) if gateway >= 4), "seed {seed}");
        }
        let _ = (claims.demand(now), claims.app_process(0), claims.drain(1), claims.gateway_died(2, now));
        claims.open(3, 1, u32::MAX, now);
        assert_eq!(
            claims.app_process(3).map(|process| (process.door, process.busy)),
            Some((Door::Open, 0)),
            "seed {seed}"
        );
    }
}

/// Returns a descriptor of a sealed file with these bytes.
fn file_of(bytes: &[u8], seals: SealFlag) -> OwnedFd {
    use std::io::Write as _;
    let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let mut file = File::from(fd);
    file.write_all(bytes).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file.into()
}

fn bytes_of(claims: &Claims) -> Vec<u8> {
    use std::os::unix::fs::FileExt as _;
    let file = File::from(claims.fd().try_clone_to_owned().unwrap());
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn an_attached_table_is_the_same_table() {
    let claims = opened(3, 2, 2);
    let attached = Claims::attach(claims.fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!((attached.processes(), attached.units(), attached.gateways()), (3, 2, 2));
    let unit = claim(&attached, 1, NOW).unwrap();
    assert_eq!(claims.demand(NOW).in_flight, 1);
    assert_eq!(claims.set_waiting(0, 1, NOW, NOW), None);
    assert_eq!(attached.release(unit, NOW), Wake::Gateway(0));
    assert_eq!(nix::unistd::ftruncate(claims.fd().as_fd(), 0), Err(nix::errno::Errno::EPERM), "the size is sealed");
}

#[test]
fn attach_refuses_what_is_not_a_table_of_this_build() {
    let good = bytes_of(&opened(3, 2, 2));
    let all = crate::segment::seals_of_a_segment();
    assert!(Claims::attach(file_of(&good, all)).is_ok());
    assert_eq!(why(Claims::attach(file_of(&good, SealFlag::F_SEAL_GROW))), "its size is not sealed");
    assert_eq!(why(Claims::attach(File::open("/dev/null").unwrap().into())), "it is not a sealed memory file");
    assert_eq!(why(Claims::attach(file_of(&good[..4095], all))), "it is too short");
    assert_eq!(
        why(Claims::attach(file_of(&[&good[..], &[0; 4096]].concat(), all))),
        "its size is not what its header says"
    );
    let segment = crate::Segment::create(&crate::Plan { rows: 1, ..crate::Plan::default() }).unwrap();
    let fd = segment.fd().try_clone_to_owned().unwrap();
    assert_eq!(why(Claims::attach(fd)), "it does not start like a table of claims");
    // Small changes of the three numbers may result in the same size, rounded up to pages.
    for bit in (0..48 * 8).filter(|bit| !(24 * 8..48 * 8).contains(bit) || bit % 64 >= 12) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        why(Claims::attach(file_of(&bad, all)));
    }
}

#[test]
fn the_numbers_are_limited() {
    for (processes, units, gateways) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 4096), (16_385, 1, 1), (1, 4097, 1)] {
        let error = Claims::create(processes, units, gateways).unwrap_err();
        assert!(matches!(error, SegmentError::ClaimsOutOfRange { .. }), "{error}");
    }
    let claims = opened(1, 4096, 4095);
    let unit = claim(&claims, 4094, NOW).unwrap();
    assert_eq!((claims.release(unit, NOW), claims.gateway_died(4094, NOW)), (Wake::Nobody, vec![]));
    let error = Claims::create(1, 1, 5000).unwrap_err();
    assert_eq!(error.to_string(), "cannot make a table for 5000 gateways: ask for 1 to 4095");
}

#[test]
fn a_kept_connection_is_in_the_way_of_other_gateways_and_of_a_drain() {
    let claims = Claims::create(2, 1, 3).unwrap();
    claims.open(0, 10, u32::MAX, 1);
    let unit = claims.claim(0, 2).unit.unwrap();
    assert_eq!((unit.keeper(), claims.is_idle(0)), (None, false));
    let (kept, wake) = claims.release_kept(unit, 3);
    let kept = kept.unwrap();
    assert_eq!((wake, claims.may_keep(&kept)), (Wake::Nobody, true));
    assert!(!claims.is_idle(0), "the app process accepts no other connection");

    // The keeper uses it again. Another process is better for another gateway.
    claims.open(1, 11, u32::MAX, 4);
    let again = claims.claim(0, 100).unit.unwrap();
    assert_eq!((again.process(), again.keeper()), (0, Some(0)));
    assert!(claims.may_keep(&kept));
    assert_eq!(claims.release_kept(again, 101), (Some(kept), Wake::Nobody));
    let other = claims.claim(1, 200).unit.unwrap();
    assert_eq!((other.process(), other.keeper()), (1, None));

    // The other gateway has no choice: the keeper must close its connection.
    let taken = claims.claim(1, 300).unit.unwrap();
    assert_eq!((taken.process(), taken.keeper()), (0, Some(0)));
    assert!(!claims.may_keep(&kept));
    assert_eq!(claims.forget(kept), Wake::Gateway(1), "it waits for this");
    assert_eq!(claims.keeper(&taken), None);
    let newer = claims.release_kept(taken, 400).0.unwrap();
    assert_eq!(claims.forget(kept), Wake::Nobody);
    assert!(claims.may_keep(&newer), "a late keeper does not remove the record of the next one");

    // A drain waits until the connection is closed.
    assert!(!claims.drain(0));
    assert_eq!(claims.keepers(0).collect::<Vec<_>>(), [1]);
    assert!(!claims.may_keep(&newer));
    assert_eq!(claims.forget(newer), Wake::Master);
    assert!(claims.is_idle(0));

    // A release after the drain has begun names the master, so that the keeper closes its connection.
    let (late, wake) = claims.release_kept(other, 500);
    let late = late.unwrap();
    assert_eq!(wake, Wake::Nobody);
    assert!(!claims.drain(1));
    claims.gateway_died(1, 600);
    assert!(claims.is_idle(1), "a dead gateway keeps nothing");

    // A gateway that releases a unit without keeping its connection keeps nothing either.
    claims.close(0);
    claims.open(0, 13, u32::MAX, 610);
    let unit = claims.claim(2, 620).unit.unwrap();
    let _ = claims.release_kept(unit, 630);
    let unit = claims.claim(2, 640).unit.unwrap();
    assert_eq!(claims.release(unit, 650), Wake::Nobody);
    assert!(claims.is_idle(0));

    // A gateway that was stopped before its release keeps nothing of the successor.
    let stopped = claims.claim(2, 660).unit.unwrap();
    claims.close(0);
    claims.open(0, 14, u32::MAX, 670);
    let successor = claims.claim(0, 680).unit.unwrap();
    let (kept, _) = claims.release_kept(successor, 690);
    assert_eq!(claims.release_kept(stopped, 700), (None, Wake::Nobody));
    assert!(claims.may_keep(&kept.unwrap()));
    claims.close(1);
    claims.open(1, 12, u32::MAX, 700);
    assert!(!claims.may_keep(&late), "the connection was to the predecessor");
}

#[test]
fn a_unit_is_used_again_unless_another_gateway_has_waited_much_longer() {
    let claims = Claims::create(1, 1, 3).unwrap();
    claims.open(0, 10, u32::MAX, 1);
    let unit = claims.claim(0, 100).unit.unwrap();
    let _ = claims.set_waiting(1, 1, 1000, 1000);
    // The requests of this gateway have waited for 3000, 3001 and 3000 us, the other one for 8000, 8001 and 8001.
    let unit = claims.reuse(unit, 6000, 9000).unwrap();
    assert_eq!((unit.begun(), claims.app_process(0).unwrap().busy), (2, 1));
    let unit = claims.reuse(unit, 6000, 9001).unwrap();
    let unit = claims.reuse(unit, 6001, 9001).unwrap_err();
    assert_eq!(unit.begun(), 3);
    // Its own waiting row does not count.
    let _ = claims.set_waiting(1, 0, 0, 9001);
    let _ = claims.set_waiting(0, 1, 1, 9001);
    let unit = claims.reuse(unit, 9000, 90_000).unwrap();

    assert!(!claims.drain(0));
    let unit = claims.reuse(unit, 90_000, 90_000).unwrap_err();
    assert_eq!(claims.release(unit, 90_000), Wake::Master);
    // The successor is not used with a unit of its predecessor.
    claims.close(0);
    claims.open(0, 11, u32::MAX, 90_000);
    let unit = claims.claim(0, 90_000).unit.unwrap();
    claims.close(0);
    claims.open(0, 12, u32::MAX, 90_001);
    let unit = claims.reuse(unit, 90_001, 90_001).unwrap_err();
    assert_eq!(claims.release(unit, 90_001), Wake::Nobody);
    assert_eq!(claims.app_process(0).unwrap().begun, 0);
}
