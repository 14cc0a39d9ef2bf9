//! Tests the saved state of the supervisor, and its restoration by the next master.

use super::*;
use crate::upgrade::saved_processes::{Roster, SavedSlot, SavedSlotState};

const MS: Duration = Duration::from_millis(1);

fn policy(workers: u32) -> Policy {
    Policy {
        workers: (workers, workers),
        per_worker: 1,
        scale_down_after: 5000 * MS,
        max_unavailable: Budget::Number(1),
        slots: workers * 2 + 16,
        start_timeout: 1000 * MS,
        drain_timeout: 5000 * MS,
        settle: Duration::ZERO,
        respawn_rate: 8,
        give_up_after: Duration::ZERO,
    }
}

/// Simulates a random history. Returns the supervisor, the time, and the running processes.
fn history(random: &mut fastrand::Rng, policy: Policy) -> (Supervisor, Uptime, Vec<i32>) {
    let mut supervisor = Supervisor::new(policy);
    let (mut now, mut alive, mut next) = (Uptime::ZERO, Vec::new(), 100);
    let mut event = SupervisorEvent::Tick;
    for _ in 0..random.u32(1..200) {
        let mut actions = std::collections::VecDeque::from(supervisor.step(event, now));
        while let Some(action) = actions.pop_front() {
            if let Action::Spawn { slot, .. } = action {
                next += 1;
                alive.push(next);
                actions.extend(supervisor.step(SupervisorEvent::Spawned { slot, pid: Pid::from_raw(next) }, now));
            }
        }
        now += random.u32(0..300) * MS;
        let some = (!alive.is_empty()).then(|| random.usize(0..alive.len()));
        event = match (random.u32(0..10), some) {
            (0..4, Some(one)) => SupervisorEvent::Ready { pid: Pid::from_raw(alive[one]) },
            (4..6, Some(one)) => {
                let after_exit = random.choice([AfterExit::Replace, AfterExit::Restart]).unwrap_or(AfterExit::Replace);
                SupervisorEvent::Exited { pid: Pid::from_raw(alive.swap_remove(one)), after_exit }
            }
            (6, _) => {
                let commands = [Command::Reload, Command::Add, Command::Remove, Command::Scale(3)];
                SupervisorEvent::Command(random.choice(commands).unwrap())
            }
            (7, Some(one)) => SupervisorEvent::Recycle { pid: Pid::from_raw(alive[one]) },
            _ => SupervisorEvent::Tick,
        };
    }
    (supervisor, now, alive)
}

#[test]
fn after_any_history_everybody_is_known_again_and_is_replaced() {
    for seed in 0..400 {
        let mut random = fastrand::Rng::with_seed(seed);
        let workers = random.u32(1..6);
        let (old, before, mut alive) = history(&mut random, policy(workers));
        let roster = old.save(before).expect("it runs");
        // The next master may have different settings, and has its own clock.
        let now_workers = if random.bool() { workers } else { random.u32(1..6) };
        let mut new = Supervisor::restore(policy(now_workers), &roster, Uptime::ZERO);
        for &pid in &alive {
            let pid = Pid::from_raw(pid);
            assert_eq!(new.place_of(pid), old.place_of(pid), "seed {seed}");
        }
        if now_workers == workers {
            assert_eq!(new.save(Uptime::ZERO).as_ref(), Some(&roster), "seed {seed}");
        }
        let former = alive.clone();
        let (mut now, mut next) = (Uptime::ZERO, 10_000);
        let mut events =
            std::collections::VecDeque::from([SupervisorEvent::Command(Command::Reload), SupervisorEvent::Tick]);
        for saved in roster.slots.iter().filter(|saved| saved.phase == SavedSlotState::Killing) {
            alive.retain(|&pid| pid != saved.pid);
            events.push_back(SupervisorEvent::Exited { pid: Pid::from_raw(saved.pid), after_exit: AfterExit::Replace });
        }
        while let Some(event) = events.pop_front() {
            let mut actions = std::collections::VecDeque::from(new.step(event, now));
            while let Some(action) = actions.pop_front() {
                match action {
                    Action::Spawn { slot, generation } => {
                        assert!(slot < policy(now_workers).slots, "seed {seed}: a slot that is no more");
                        // A process that replaces an old one before the first new one is ready has the old generation.
                        assert!(generation == roster.generation || generation > roster.newest, "seed {seed}");
                        next += 1;
                        alive.push(next);
                        actions.extend(new.step(SupervisorEvent::Spawned { slot, pid: Pid::from_raw(next) }, now));
                        events.push_back(SupervisorEvent::Ready { pid: Pid::from_raw(next) });
                    }
                    Action::Terminate { pid } | Action::Kill { pid } | Action::Abort { pid } => {
                        alive.retain(|&other| other != pid.as_raw());
                        events.push_back(SupervisorEvent::Exited { pid, after_exit: AfterExit::Restart });
                    }
                    Action::Remind { .. } | Action::Notice(_) | Action::Upgrade | Action::Sample => {}
                    Action::Close { .. } | Action::Exit { .. } => panic!("seed {seed}: the server was not stopped"),
                }
            }
            if let (true, Some(deadline)) = (events.is_empty(), new.next_deadline()) {
                assert!(deadline > now, "seed {seed}: a deadline in the past is a busy loop");
                now = deadline;
                events.push_back(SupervisorEvent::Tick);
            }
            assert!(next < 11_000, "seed {seed}: it never comes to rest");
        }
        assert!(former.iter().all(|pid| !alive.contains(pid)), "seed {seed}: {alive:?} of {roster:?}");
        let target = if now_workers == workers { roster.target } else { now_workers };
        assert_eq!(new.count_ready(), target, "seed {seed}");
    }
}

#[test]
fn a_master_that_stops_has_no_successor() {
    let mut supervisor = Supervisor::new(policy(2));
    supervisor.step(SupervisorEvent::Command(Command::Drain), Uptime::ZERO);
    assert_eq!(supervisor.save(Uptime::ZERO), None);
    assert_eq!(supervisor.step(SupervisorEvent::Command(Command::Upgrade), Uptime::ZERO), []);
    let mut supervisor = Supervisor::new(policy(2));
    assert!(supervisor.step(SupervisorEvent::Command(Command::Upgrade), Uptime::ZERO).contains(&Action::Upgrade));
}

#[test]
fn a_deadline_that_has_passed_counts_only_when_all_reports_and_deaths_are_read() {
    let saved = |number: u32, phase| {
        let pid = 100 + i32::try_from(number).unwrap();
        SavedSlot { slot: number, generation: 1, pid, phase, worn: false, replaced: false }
    };
    let starting = SavedSlotState::Starting { left_ms: 0 };
    let draining = SavedSlotState::Draining { left_ms: 0 };
    let phases = [starting, starting, draining, draining];
    let slots = (0..).zip(phases).map(|(number, phase)| saved(number, phase)).collect();
    let roster = Supervisor::new(policy(2)).save(Uptime::ZERO).unwrap();
    let mut supervisor = Supervisor::restore(policy(2), &Roster { slots, ..roster }, 50 * MS);
    let [one, other, left, stuck] = [100, 101, 102, 103].map(Pid::from_raw);
    let mut actions = supervisor.step(SupervisorEvent::Ready { pid: one }, 51 * MS);
    actions.extend(supervisor.step(SupervisorEvent::Exited { pid: left, after_exit: AfterExit::Replace }, 52 * MS));
    actions.extend(supervisor.step(SupervisorEvent::Ready { pid: other }, 53 * MS));
    assert!(!actions.iter().any(|action| matches!(action, Action::Kill { .. })), "{actions:?}");
    assert!(supervisor.next_deadline().is_some_and(|deadline| deadline <= 53 * MS), "the clock is looked at next");
    let actions = supervisor.step(SupervisorEvent::Tick, 54 * MS);
    let killed: Vec<Pid> =
        actions.iter().filter_map(|action| if let Action::Kill { pid } = *action { Some(pid) } else { None }).collect();
    assert_eq!(killed, [stuck]);
    assert!(supervisor.next_deadline().is_none_or(|deadline| deadline > 54 * MS));
}
