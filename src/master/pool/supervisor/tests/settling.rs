//! Tests that a reload waits until its first new process has settled, and that it fails if a new process dies before.

use super::*;

const SETTLE: Duration = Duration::from_secs(1);

/// Returns a world with `workers` ready processes, in which a reload has begun. Its canary is the process 100 + `workers` + 1.
fn reloading(workers: u32) -> (World, Vec<i32>, Pid) {
    let mut world = World::new(Policy { settle: SETTLE, ..policy(workers) });
    world.settle();
    let old: Vec<i32> = world.processes.keys().copied().collect();
    world.feed(SupervisorEvent::Command(Command::Reload));
    let canary = Pid::from_raw(world.next_pid);
    (world, old, canary)
}

fn advance(world: &mut World, by: Duration) {
    world.now += by;
    world.feed(SupervisorEvent::Tick);
}

fn failure(world: &World) -> Option<RollFailure> {
    world.notices.iter().find_map(|notice| match notice {
        Notice::ReloadFailed { generation: 2, failure, .. } => Some(*failure),
        _ => None,
    })
}

fn are_ready(world: &World, pids: &[i32]) -> bool {
    pids.iter().all(|pid| world.processes.get(pid) == Some(&Life::Ready))
}

#[test]
fn no_old_process_drains_before_the_canary_has_settled() {
    for workers in [1, 3] {
        let (mut world, old, canary) = reloading(workers);
        world.become_ready(canary);
        assert_eq!(world.supervisor.next_deadline(), Some(world.now + SETTLE));
        advance(&mut world, SETTLE - MS);
        assert!(are_ready(&world, &old));
        advance(&mut world, MS);
        assert!(!are_ready(&world, &old));
        world.settle();
        assert_eq!(world.notices.last(), Some(&Notice::ReloadDone { generation: 2 }));
    }
}

#[test]
fn the_reload_fails_if_the_canary_dies_before_it_has_settled() {
    for workers in [1, 3] {
        for after_exit in [AfterExit::Replace, AfterExit::StayDown] {
            let (mut world, old, canary) = reloading(workers);
            world.become_ready(canary);
            advance(&mut world, SETTLE - MS);
            world.die(canary, after_exit);
            assert_eq!(failure(&world), Some(RollFailure::DiedSoon));
            world.settle();
            assert!(are_ready(&world, &old));
            assert_eq!(world.processes.len(), old.len());
            assert_eq!(world.supervisor.view().generation, 1);
        }
    }
}

#[test]
fn a_later_process_that_dies_before_it_has_settled_stops_the_reload() {
    let (mut world, old, canary) = reloading(4);
    world.become_ready(canary);
    advance(&mut world, SETTLE);
    let drained = world.pick(&mut fastrand::Rng::with_seed(1), Life::Leaving).unwrap();
    world.die(drained, AfterExit::Restart);
    let second = Pid::from_raw(world.next_pid);
    world.become_ready(second);
    world.die(second, AfterExit::Replace);
    assert_eq!(failure(&world), Some(RollFailure::DiedSoon));
    world.settle();
    assert!(world.processes.contains_key(&canary.as_raw()), "the canary stays");
    assert!(old.iter().filter(|pid| world.processes.contains_key(pid)).count() >= 2);
    let old_generation = world
        .processes
        .keys()
        .filter(|pid| world.supervisor.place_of(Pid::from_raw(**pid)).is_some_and(|(_, generation)| generation == 1));
    assert_eq!(old_generation.count(), 3, "the dead process was replaced by one of the old generation");
}

#[test]
fn a_process_that_dies_after_it_has_settled_is_replaced_by_one_of_its_generation() {
    let (mut world, _, canary) = reloading(4);
    world.become_ready(canary);
    advance(&mut world, SETTLE);
    world.die(canary, AfterExit::Replace);
    world.settle();
    assert_eq!(failure(&world), None);
    assert_eq!(world.notices.last(), Some(&Notice::ReloadDone { generation: 2 }));
}

#[test]
fn a_normal_exit_proves_the_generation_only_if_requests_were_served() {
    let (mut world, old, canary) = reloading(3);
    world.become_ready(canary);
    world.die(canary, AfterExit::Done);
    world.settle();
    assert_eq!((failure(&world), are_ready(&world, &old)), (None, false));

    let (mut world, old, mut canary) = reloading(3);
    for _ in 1..MAX_UNSEEN {
        world.become_ready(canary);
        advance(&mut world, 200 * MS);
        world.die(canary, AfterExit::Restart);
        assert_eq!(failure(&world), None);
        assert!(are_ready(&world, &old));
        canary = Pid::from_raw(world.next_pid);
    }
    world.become_ready(canary);
    world.die(canary, AfterExit::Restart);
    assert_eq!(failure(&world), Some(RollFailure::DiedSoon));
    world.settle();
    assert!(are_ready(&world, &old));
}

#[test]
fn a_process_at_the_end_of_its_lifetime_is_replaced_before_the_canary_starts() {
    let mut world = World::new(Policy { settle: SETTLE, ..policy(2) });
    world.settle();
    let old: Vec<i32> = world.processes.keys().copied().collect();
    world.feed(SupervisorEvent::Recycle { pid: Pid::from_raw(old[0]) });
    world.feed(SupervisorEvent::Command(Command::Reload));
    world.settle();
    assert_eq!(world.notices.last(), Some(&Notice::ReloadDone { generation: 2 }));
    assert!(old.iter().all(|pid| !world.processes.contains_key(pid)));
}

#[test]
fn an_old_process_that_dies_while_the_canary_settles_is_replaced_by_one_of_the_old_generation() {
    let (mut world, old, canary) = reloading(3);
    world.become_ready(canary);
    world.die(Pid::from_raw(old[0]), AfterExit::Replace);
    let (_, generation) = world.supervisor.place_of(Pid::from_raw(world.next_pid)).unwrap();
    assert_eq!(generation, 1);
    world.settle();
    assert_eq!(world.notices.last(), Some(&Notice::ReloadDone { generation: 2 }));
}
