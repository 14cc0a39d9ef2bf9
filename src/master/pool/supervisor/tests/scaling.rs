//! Tests the number of processes, and their replacement while they are running.

use super::*;

const S: Duration = Duration::from_secs(1);

impl World {
    /// Advances the clock by `time`, and stops at each deadline on the way to feed a tick. All processes react to their
    /// signals immediately.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.supervisor.next_deadline().filter(|&deadline| deadline <= end) {
            self.now = deadline;
            self.feed(SupervisorEvent::Tick);
            self.obey();
        }
        self.now = end;
    }

    /// Makes starting processes ready, and removes processes that must exit.
    fn obey(&mut self) {
        while let Some((&pid, &life)) = self.processes.iter().find(|(_, life)| **life != Life::Ready) {
            match life {
                Life::Starting => self.become_ready(Pid::from_raw(pid)),
                Life::Leaving | Life::Killed => self.die(Pid::from_raw(pid), AfterExit::Restart),
                Life::Ready => {}
            }
        }
    }

    fn all(&self, life: Life) -> Vec<i32> {
        self.processes.iter().filter(|(_, other)| **other == life).map(|(&pid, _)| pid).collect()
    }

    fn generations(&self) -> Vec<u64> {
        let places = self.processes.keys().filter_map(|&pid| self.supervisor.place_of(Pid::from_raw(pid)));
        places.map(|(_, generation)| generation).collect()
    }

    /// Returns the worker counts to which demand has scaled, in order.
    fn scaled(&self) -> Vec<u32> {
        let to = |notice: &Notice| if let Notice::Scaled { to, .. } = notice { Some(*to) } else { None };
        self.notices.iter().filter_map(to).collect()
    }

    fn age(&mut self, pid: i32) {
        self.feed(SupervisorEvent::Recycle { pid: Pid::from_raw(pid) });
    }
}

#[test]
fn constant_demand_never_flaps() {
    for seed in 0..100 {
        let outcome = std::panic::catch_unwind(|| {
            let mut random = fastrand::Rng::with_seed(seed);
            let min = random.u32(0..4);
            let max = min + random.u32(1..30);
            let mut world = World::new(range(min, max));
            world.settle();
            for _ in 0..random.u32(0..5) {
                world.requests = random.u32(0..40);
                if world.supervisor.awaits_arrival() && world.requests > 0 {
                    world.feed(SupervisorEvent::Arrival);
                }
                let time = MS * random.u32(0..30_000);
                world.pass(time);
            }
            world.requests = random.u32(0..40);
            if world.supervisor.awaits_arrival() && world.requests > 0 {
                world.feed(SupervisorEvent::Arrival);
            }
            let from = world.supervisor.target;
            world.notices.clear();
            world.pass(S * 600);
            let needed = if world.requests == 0 { 0 } else { world.requests + 1 };
            let needed = needed.clamp(min, max);
            assert_eq!((world.ready(), world.supervisor.target), (needed as usize, needed));
            let steps: Vec<u32> = std::iter::once(from).chain(world.scaled()).collect();
            let rises = steps.is_sorted();
            assert!(rises || steps.iter().rev().is_sorted(), "it went up and down: {steps:?}");
            let spawned = world.spawned;
            world.pass(S * 600);
            assert_eq!(world.spawned, spawned);
        });
        assert!(outcome.is_ok(), "seed {seed}");
    }
}

#[test]
fn it_grows_by_1_2_4_and_shrinks_one_by_one() {
    let mut world = World::new(range(1, 40));
    world.settle();
    world.requests = 1000;
    world.pass(S * 3);
    assert_eq!(world.scaled(), [2, 4, 8, 16, 32, 40]);
    // Saturation is reported when the maximum number of processes is reached and all of them are
    // working.
    let is_saturated = |notice: &&Notice| matches!(notice, Notice::Saturated { .. });
    let said: Vec<&Notice> = world.notices.iter().filter(is_saturated).collect();
    assert!(matches!(said[..], [Notice::Saturated { workers: 40, in_flight: 40, waiting: 960 }]), "{said:?}");
    assert!(matches!(world.notices.last(), Some(Notice::Saturated { .. })), "not before");
    world.notices.clear();
    world.requests = 0;
    world.pass(S * 9);
    assert_eq!(world.scaled(), [0_u32; 0], "not before they were not needed for ten seconds");
    world.pass(S * 60);
    assert_eq!(world.scaled(), (1..40).rev().collect::<Vec<_>>());
}

#[test]
fn a_need_of_one_moment_is_no_need_unless_somebody_waits() {
    let mut world = World::new(range(1, 8));
    world.settle();
    world.requests = 1;
    world.pass(MS * 1000); // one sample: all are busy, and no connection is waiting
    world.requests = 0;
    world.pass(S * 5);
    assert_eq!(world.scaled(), [0_u32; 0]);
    world.requests = 2;
    world.pass(MS * 1000);
    assert_eq!(world.scaled().first(), Some(&2), "one waits");
}

#[test]
fn what_was_let_go_and_is_wanted_again_is_kept_longer() {
    let mut world = World::new(range(1, 8));
    world.settle();
    let cycles = 240;
    for _ in 0..cycles {
        world.requests = 5;
        world.pass(S * 3);
        world.requests = 1;
        world.pass(S * 12);
    }
    let steps = world.scaled();
    let valleys = steps.windows(3).filter(|steps| steps[1] < steps[0] && steps[1] < steps[2]).count();
    assert!((1..cycles / 4).contains(&valleys), "{valleys} times in an hour");
    assert_eq!(world.supervisor.target, 6, "{steps:?}");
}

#[test]
fn with_a_lower_limit_of_0_there_is_no_worker_until_a_connection_arrives() {
    let mut world = World::new(range(0, 4));
    assert_eq!((world.notices.as_slice(), world.spawned), ([Notice::FullStrength].as_slice(), 0));
    assert!(world.supervisor.awaits_arrival() && world.supervisor.next_deadline().is_none(), "it sleeps");
    world.requests = 1;
    world.feed(SupervisorEvent::Arrival);
    assert_eq!((world.spawned, world.supervisor.awaits_arrival()), (1, false));
    world.feed(SupervisorEvent::Arrival);
    assert_eq!(world.spawned, 1, "that was the same one");
    world.pass(S * 100);
    assert_eq!(world.ready(), 2, "one works, and one is there for the next");
    (world.requests, world.connections) = (0, 1);
    world.pass(S * 100);
    assert_eq!(world.ready(), 1, "no process could take over its connections");
    world.connections = 0;
    world.pass(S * 12);
    assert_eq!((world.ready(), world.supervisor.awaits_arrival()), (0, true));
    assert_eq!(world.supervisor.next_deadline(), None, "it sleeps again");
    world.feed(SupervisorEvent::Command(Command::Reload));
    assert!(world.notices.contains(&Notice::ReloadDone { generation: 2 }), "there is no process to replace");
    world.feed(SupervisorEvent::Arrival);
    assert_eq!(world.generations(), [2]);
}

#[test]
fn who_is_at_work_stays_when_there_are_too_many() {
    let mut world = World::new(range(1, 8));
    world.settle();
    world.requests = 7;
    world.pass(S * 5);
    assert_eq!(world.ready(), 8);
    // The process in the highest slot serves a long request.
    let busy = *world.processes.keys().next_back().unwrap();
    world.requests = 1;
    world.pass(S * 100);
    assert_eq!(world.ready(), 2);
    assert!(world.processes.contains_key(&busy));
}

#[test]
fn the_operator_changes_numbers_and_ranges() {
    let mut world = World::new(range(2, 4));
    world.settle();
    for (command, limits, target) in [
        (Command::Add, (3, 5), 3),
        (Command::Remove, (2, 4), 2),
        (Command::Remove, (1, 3), 1),
        (Command::Remove, (1, 2), 1),
        (Command::Remove, (1, 1), 1),
        (Command::Remove, (1, 1), 1),
        (Command::Scale(4), (4, 4), 4),
        (Command::Scale(0), (4, 4), 4),
        (Command::Scale(1000), (4, 4), 4),
        (Command::Add, (5, 5), 5),
    ] {
        world.feed(SupervisorEvent::Command(command));
        let is = (world.supervisor.scaler.limits(), world.supervisor.target);
        assert_eq!(is, (limits, target), "{command:?}");
        world.settle();
        assert_eq!(world.ready(), target as usize);
    }
    assert_eq!(world.notices.iter().filter(|notice| matches!(notice, Notice::TargetLimit(_))).count(), 3);
    assert_eq!(world.supervisor.next_deadline(), None, "with one number there is nothing to look at");
}

#[test]
fn a_worker_that_fails_at_start_costs_few_forks_a_minute_and_a_good_reload_heals() {
    let mut world = World::new(policy(4));
    let mut of_minutes = Vec::new();
    for minute in 1..=5 {
        let before = if minute == 1 { 0 } else { world.spawned };
        loop {
            while let Some(&pid) = world.processes.keys().next() {
                world.die(Pid::from_raw(pid), AfterExit::Replace);
            }
            let deadline = world.supervisor.next_deadline().unwrap();
            if deadline > S * 60 * minute {
                break;
            }
            world.now = deadline;
            world.feed(SupervisorEvent::Tick);
        }
        of_minutes.push(world.spawned - before);
    }
    assert_eq!(of_minutes, [13, 2, 2, 2, 2]);
    world.feed(SupervisorEvent::Command(Command::Reload));
    assert_eq!(world.processes.len(), 1, "at once, and one alone");
    world.obey();
    assert_eq!(world.ready(), 4);
    assert!(world.notices.contains(&Notice::ReloadDone { generation: 2 }));
    assert_eq!(world.supervisor.next_deadline(), None);
}

#[test]
fn after_a_failed_reload_the_dead_are_replaced_by_their_own_generation() {
    let mut world = World::new(policy(3));
    world.settle();
    let old = world.all(Life::Ready);
    world.feed(SupervisorEvent::Command(Command::Reload));
    // An old process dies while the canary starts: it is replaced immediately, and not by a second canary.
    world.die(Pid::from_raw(old[0]), AfterExit::Replace);
    let new = world.all(Life::Starting);
    assert_eq!(world.generations(), [1, 1, 2, 1]);
    world.die(Pid::from_raw(new[0]), AfterExit::Replace);
    assert!(failed_with(&world, 2, new[0]));
    assert!(
        !world.notices.iter().any(|notice| matches!(notice, Notice::Failing { .. })),
        "the old ones are not to wait"
    );
    world.die(Pid::from_raw(old[1]), AfterExit::Replace);
    world.obey();
    assert_eq!((world.ready(), world.generations()), (3, vec![1, 1, 1]));
    world.feed(SupervisorEvent::Command(Command::Reload));
    world.obey();
    assert_eq!((world.ready(), world.generations()), (3, vec![3, 3, 3]));
    assert!(world.notices.contains(&Notice::ReloadDone { generation: 3 }));
}

#[test]
fn a_reload_that_fails_half_way_keeps_what_it_has() {
    let mut world = World::new(Policy { max_unavailable: Budget::Percent(50), ..policy(4) });
    world.settle();
    world.feed(SupervisorEvent::Command(Command::Reload));
    let canary = world.all(Life::Starting);
    assert_eq!(canary.len(), 1, "the first one alone, whatever the budget");
    world.become_ready(Pid::from_raw(canary[0]));
    let next = world.all(Life::Starting);
    assert_eq!((next.len(), world.all(Life::Leaving).len()), (1, 1), "two at a time");
    world.die(Pid::from_raw(next[0]), AfterExit::Replace);
    assert!(failed_with(&world, 2, next[0]));
    world.obey();
    let mut generations = world.generations();
    generations.sort_unstable();
    assert_eq!(generations, [1, 1, 1, 2]);
}

#[test]
fn all_are_worn_out_at_once_and_a_few_are_replaced_at_a_time() {
    let mut world = World::new(Policy { max_unavailable: Budget::Number(2), ..policy(6) });
    world.settle();
    let old = world.all(Life::Ready);
    for &pid in old.iter().rev() {
        world.now += MS;
        world.age(pid);
        world.age(pid);
    }
    let mut gone = Vec::new();
    loop {
        assert!(world.ready() >= 6, "the new one is ready first");
        let (starting, leaving) = (world.all(Life::Starting), world.all(Life::Leaving));
        assert!(starting.len() + leaving.len() <= 2, "{starting:?} {leaving:?}");
        if let Some(&pid) = starting.first() {
            world.become_ready(Pid::from_raw(pid));
        } else if let Some(&pid) = leaving.last() {
            world.die(Pid::from_raw(pid), AfterExit::Restart);
            gone.push(pid);
        } else {
            break;
        }
    }
    assert_eq!(gone.len(), 6);
    assert!(gone[..2].iter().all(|pid| old[4..].contains(pid)), "the longest worn first: {gone:?} of {old:?}");
    assert!(world.all(Life::Ready).iter().all(|pid| !old.contains(pid)));
    assert_eq!(world.supervisor.next_deadline(), None);
}

#[test]
fn a_worn_one_whose_replacement_fails_serves_on() {
    let mut world = World::new(policy(2));
    world.settle();
    let old = world.all(Life::Ready);
    world.age(old[0]);
    for _ in 0..5 {
        let new = world.all(Life::Starting);
        assert_eq!((new.len(), world.ready()), (1, 2));
        world.die(Pid::from_raw(new[0]), AfterExit::Replace);
        world.now = world.supervisor.next_deadline().unwrap();
        world.feed(SupervisorEvent::Tick);
    }
    world.obey();
    assert_eq!((world.ready(), world.processes.contains_key(&old[0])), (2, false));
}

#[test]
fn one_that_hangs_is_replaced_at_once_and_ended() {
    let mut world = World::new(policy(2));
    world.settle();
    let old = world.all(Life::Ready);
    world.hung(old[0]);
    assert_eq!((world.all(Life::Killed), world.all(Life::Starting).len()), (vec![old[0]], 1));
    let new = world.all(Life::Starting)[0];
    world.become_ready(Pid::from_raw(new));
    world.hung(old[0]); // already known
    world.hung(new);
    assert_eq!(world.all(Life::Killed), [old[0], new]);
    world.obey();
    assert_eq!(world.ready(), 2);
}

#[test]
fn changed_settings_take_effect_immediately_and_commands_hold_until_then() {
    let mut world = World::new(range(2, 2));
    world.settle();
    world.feed(SupervisorEvent::Command(Command::Scale(3)));
    world.settle();
    world.feed(SupervisorEvent::Policy(Policy { drain_timeout: S, ..range(2, 2) }));
    world.settle();
    assert_eq!(world.ready(), 3, "the file has not changed");
    world.feed(SupervisorEvent::Policy(range(5, 6)));
    world.settle();
    assert_eq!((world.ready(), world.supervisor.view().limits), (5, (5, 6)));
    let most = world.supervisor.view().most;
    world.feed(SupervisorEvent::Policy(range(most + 1, most + 1)));
    world.settle();
    assert_eq!((world.ready(), world.supervisor.view().most), (5, most), "there is no room for so many");
    world.feed(SupervisorEvent::Policy(range(1, 1)));
    world.settle();
    world.obey();
    assert_eq!(world.all(Life::Ready).len(), 1);
}
