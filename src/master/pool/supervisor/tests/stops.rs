//! Tests how processes are stopped when the server stops.

use super::*;

impl World {
    fn drain_with_queue(&mut self) {
        self.queue_waits = true;
        self.feed(SupervisorEvent::Command(Command::Drain));
    }

    fn queue(&mut self, waits: bool) {
        self.feed(SupervisorEvent::Queue { waits });
    }

    fn of(&self, life: Life) -> Vec<Pid> {
        self.processes.iter().filter(|(_, l)| **l == life).map(|(&pid, _)| Pid::from_raw(pid)).collect()
    }
}

#[test]
fn while_connections_are_queued_who_leaves_is_replaced_and_the_deadline_is_that_of_the_stop() {
    for after_exit in [AfterExit::Restart, AfterExit::Replace] {
        let mut world = World::new(policy(1));
        world.settle();
        world.drain_with_queue();
        let begun = world.now;
        for round in 1..4 {
            world.die(world.of(Life::Leaving)[0], after_exit);
            world.queue(true);
            let new = world.of(Life::Starting)[0];
            world.now = begun + 100 * MS * round;
            world.become_ready(new);
            assert_eq!(world.of(Life::Leaving), [new], "it is asked to leave as soon as it is ready");
            let slot = world.supervisor.slots.iter().find(|slot| slot.state.pid() == Some(new)).unwrap();
            let State::Draining { deadline, .. } = slot.state else { panic!("{slot:?}") };
            assert_eq!(deadline, begun + world.supervisor.policy.drain_timeout);
        }
        world.queue(false);
        world.die(world.of(Life::Leaving)[0], after_exit);
        assert_eq!(world.exited, Some(true), "no process is left, and no connection waits");
    }
}

#[test]
fn who_dies_before_it_is_ready_is_tried_again_later_until_the_queue_has_had_its_time() {
    let mut world = World::new(policy(1));
    world.settle();
    world.drain_with_queue();
    world.die(world.of(Life::Leaving)[0], AfterExit::Replace);
    for delay in [100, 200, 400] {
        world.queue(true);
        world.die(world.of(Life::Starting)[0], AfterExit::Replace);
        world.queue(true);
        assert!(world.processes.is_empty() && world.exited.is_none());
        world.now += delay * MS;
    }
    world.queue(false);
    assert_eq!(world.exited, Some(true));
}

#[test]
fn who_is_starting_at_the_stop_ends_if_nothing_is_queued_and_serves_what_is() {
    let mut world = World::new(policy(2));
    world.feed(SupervisorEvent::Command(Command::Drain));
    assert_eq!(world.of(Life::Leaving).len(), 2);
    let mut world = World::new(policy(2));
    world.drain_with_queue();
    let [first, second] = world.of(Life::Starting)[..] else { panic!("{:?}", world.processes) };
    world.become_ready(first);
    assert_eq!((world.of(Life::Leaving), world.of(Life::Starting)), (vec![first], vec![second]));
    world.queue(false);
    assert_eq!(world.of(Life::Leaving), [first, second]);
}

#[test]
fn a_process_that_requests_it_is_not_replaced_and_an_immediate_stop_replaces_none() {
    for last in [Some(Command::Halt), None] {
        let mut world = World::new(policy(1));
        world.settle();
        world.drain_with_queue();
        if let Some(halt) = last {
            world.feed(SupervisorEvent::Command(halt));
        }
        let (&pid, _) = world.processes.iter().next().unwrap();
        world.die(Pid::from_raw(pid), if last.is_some() { AfterExit::Replace } else { AfterExit::StayDown });
        assert_eq!(world.exited, Some(true));
    }
}

#[test]
fn when_every_worker_retires_the_master_fails() {
    let mut world = World::new(policy(2));
    world.settle();
    for pid in world.processes.keys().copied().collect::<Vec<_>>() {
        world.die(Pid::from_raw(pid), AfterExit::StayDown);
    }
    assert_eq!(world.exited, Some(false));
    assert_eq!(world.spawned, 2);
}

#[test]
fn who_stops_closes_the_sockets_first_and_who_reloads_does_not() {
    let closes = |actions: &[Action]| actions.iter().position(|action| matches!(action, Action::Close { .. }));
    for command in [Command::Drain, Command::Halt] {
        let mut world = World::new(policy(2));
        world.settle();
        let actions = world.supervisor.step(SupervisorEvent::Command(command), world.now);
        assert_eq!(closes(&actions), Some(0), "{command:?}: {actions:?}");
        let at_once = command == Command::Halt;
        assert_eq!(actions[0], Action::Close { at_once });
    }
    for command in [Command::Reload, Command::Add, Command::Remove, Command::Upgrade, Command::Scale(3)] {
        let mut world = World::new(policy(2));
        world.settle();
        let actions = world.supervisor.step(SupervisorEvent::Command(command), world.now);
        assert_eq!(closes(&actions), None, "{command:?}: {actions:?}");
    }
}
