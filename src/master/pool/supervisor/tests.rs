//! Tests the supervisor in simulated worlds: with random histories from a seed, and each rule separately.

mod scaling;
mod settling;
mod stops;

use std::collections::BTreeMap;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn policy(workers: u32) -> Policy {
    range(workers, workers)
}

fn range(min: u32, max: u32) -> Policy {
    Policy {
        workers: (min, max),
        per_worker: 1,
        scale_down_after: 10_000 * MS,
        max_unavailable: Budget::Number(1),
        slots: max * 2 + 4,
        start_timeout: 1000 * MS,
        drain_timeout: 5000 * MS,
        settle: Duration::ZERO,
        respawn_rate: 8,
        give_up_after: Duration::ZERO,
    }
}

/// The state of a simulated process.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Life {
    Starting,
    Ready,
    Leaving,
    Killed,
}

/// A supervisor in a simulated world: processes exist when the supervisor spawns them, and its actions are checked.
struct World {
    supervisor: Supervisor,
    now: Uptime,
    processes: BTreeMap<i32, Life>,
    next_pid: i32,
    spawned: u32,
    fork_fails: bool,
    /// Whether connections are waiting while the server is stopping.
    queue_waits: bool,
    /// Number of requests, which the ready processes share.
    requests: u32,
    /// Number of connections of ready processes.
    connections: u32,
    /// The hanging process that is being aborted.
    hanging: Option<Pid>,
    notices: Vec<Notice>,
    exited: Option<bool>,
}

impl World {
    fn new(policy: Policy) -> Self {
        let mut world = Self {
            supervisor: Supervisor::new(policy),
            now: Uptime::ZERO,
            processes: BTreeMap::new(),
            next_pid: 100,
            spawned: 0,
            fork_fails: false,
            queue_waits: false,
            requests: 0,
            connections: 0,
            hanging: None,
            notices: Vec::new(),
            exited: None,
        };
        world.feed(SupervisorEvent::Tick);
        world
    }

    fn feed(&mut self, event: SupervisorEvent) {
        let mut queue = std::collections::VecDeque::from(self.supervisor.step(event, self.now));
        while let Some(action) = queue.pop_front() {
            assert_eq!(self.exited, None, "{action:?} after the end");
            let answer = match action {
                Action::Spawn { slot, .. } => self.spawn(slot),
                Action::Terminate { pid } => {
                    let serves = self.processes.get(&pid.as_raw()) == Some(&Life::Ready) && self.hanging != Some(pid);
                    let answer = self.signal(pid, Life::Leaving);
                    if serves && self.supervisor.mode == Mode::Running {
                        assert!(self.ready() >= self.supervisor.target as usize, "{pid} is missed");
                    }
                    answer
                }
                Action::Remind { pid } => self.signal(pid, Life::Leaving),
                Action::Kill { pid } | Action::Abort { pid } => self.signal(pid, Life::Killed),
                Action::Upgrade => None,
                Action::Close { at_once } => Some(SupervisorEvent::Queue { waits: self.queue_waits && !at_once }),
                Action::Sample => Some(SupervisorEvent::Demand(self.demand())),
                Action::Notice(notice) => {
                    self.notices.push(notice);
                    None
                }
                Action::Exit { success } => {
                    assert!(self.processes.is_empty(), "orphans: {:?}", self.processes);
                    self.exited = Some(success);
                    None
                }
            };
            if let Some(answer) = answer {
                queue.extend(self.supervisor.step(answer, self.now));
            }
        }
        if let Some(deadline) = self.supervisor.next_deadline() {
            assert!(deadline > self.now, "a deadline in the past is a busy loop");
        }
        self.check();
    }

    fn spawn(&mut self, slot: u32) -> Option<SupervisorEvent> {
        if self.fork_fails {
            return Some(SupervisorEvent::SpawnFailed { slot });
        }
        self.next_pid += 1;
        self.spawned += 1;
        let taken = self.processes.keys().filter_map(|&pid| self.supervisor.place_of(Pid::from_raw(pid)));
        assert!(taken.map(|(slot, _)| slot).all(|other| other != slot), "slot {slot} given twice");
        self.processes.insert(self.next_pid, Life::Starting);
        Some(SupervisorEvent::Spawned { slot, pid: Pid::from_raw(self.next_pid) })
    }

    fn signal(&mut self, pid: Pid, fate: Life) -> Option<SupervisorEvent> {
        let process = self.processes.get_mut(&pid.as_raw()).expect("a signal to a process that is gone");
        if *process != Life::Killed {
            *process = fate;
        }
        None
    }

    fn check(&self) {
        let policy = self.supervisor.policy;
        assert!(self.processes.len() <= policy.slots as usize);
        let serving = self.processes.values().filter(|&&life| matches!(life, Life::Starting | Life::Ready)).count();
        let target = self.supervisor.target;
        let budget = policy.max_unavailable.of(target);
        assert!(serving <= (target + budget) as usize, "{serving} serve, {target} wanted, {budget} more allowed");
        let (min, max) = self.supervisor.scaler.limits();
        assert!((min..=max).contains(&target), "{target} workers of {min}..{max}");
        let replaced = self.supervisor.count_slots(|slot| slot.replaced);
        let above = number(serving).saturating_sub(target);
        assert!(replaced + above <= budget, "{replaced} leave and {above} come, {budget} allowed");
        for &pid in self.processes.keys() {
            assert!(self.supervisor.place_of(Pid::from_raw(pid)).is_some(), "{pid} was forgotten");
        }
    }

    /// Returns the demand: each ready process serves one request, and the other requests wait.
    fn demand(&self) -> Demand {
        let ready = self.processes.iter().filter(|(_, life)| **life == Life::Ready);
        let slots = ready.filter_map(|(&pid, _)| self.supervisor.place_of(Pid::from_raw(pid))).map(|(slot, _)| slot);
        // The busy processes are those in the highest slots, which would be removed first if they were idle.
        let mut busy: Vec<u32> = slots.collect();
        busy.sort_unstable_by_key(|&slot| std::cmp::Reverse(slot));
        busy.truncate(self.requests as usize);
        let in_flight = number(busy.len());
        Demand { busy, in_flight, waiting: self.requests - in_flight, connections: self.connections }
    }

    fn pick(&self, random: &mut fastrand::Rng, life: Life) -> Option<Pid> {
        let of_kind: Vec<i32> = self.processes.iter().filter(|(_, l)| **l == life).map(|(pid, _)| *pid).collect();
        random.choice(of_kind).map(Pid::from_raw)
    }

    fn die(&mut self, pid: Pid, after_exit: AfterExit) {
        assert!(self.processes.remove(&pid.as_raw()).is_some());
        self.feed(SupervisorEvent::Exited { pid, after_exit });
    }

    fn hung(&mut self, pid: i32) {
        let pid = Pid::from_raw(pid);
        self.hanging = Some(pid);
        self.feed(SupervisorEvent::Hung { pid });
        self.hanging = None;
    }

    fn become_ready(&mut self, pid: Pid) {
        self.processes.insert(pid.as_raw(), Life::Ready);
        self.feed(SupervisorEvent::Ready { pid });
    }

    /// Advances the time from deadline to deadline, with all processes following their signals, until the state is stable.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let Some((&pid, &life)) = self.processes.iter().find(|(_, life)| **life != Life::Ready) else {
                let is_whole = self.supervisor.missing() == 0
                    && self.supervisor.count(|state| matches!(state, State::Backoff { .. })) == 0
                    && self.supervisor.settles_at().is_none();
                match self.supervisor.next_deadline().filter(|_| !is_whole) {
                    Some(deadline) => {
                        self.now = deadline;
                        self.feed(SupervisorEvent::Tick);
                        continue;
                    }
                    None => return,
                }
            };
            match life {
                Life::Starting => self.become_ready(Pid::from_raw(pid)),
                Life::Leaving | Life::Killed => self.die(Pid::from_raw(pid), AfterExit::Replace),
                Life::Ready => unreachable!(),
            }
        }
        panic!("never settles: {:?}", self.supervisor);
    }

    fn ready(&self) -> usize {
        self.processes.values().filter(|&&life| life == Life::Ready).count()
    }

    fn random_event(&mut self, random: &mut fastrand::Rng) {
        match random.u32(0..100) {
            0..30 => {
                if let Some(pid) = self.pick(random, Life::Starting) {
                    self.become_ready(pid);
                }
            }
            30..34 => {
                if let Some(pid) = self.pick(random, Life::Ready) {
                    self.feed(SupervisorEvent::Recycle { pid });
                }
            }
            34..35 => {
                if let Some(pid) = self.pick(random, Life::Ready) {
                    self.hung(pid.as_raw());
                }
            }
            35..40 => {
                let life = random.choice([Life::Starting, Life::Ready, Life::Leaving]).unwrap();
                if let Some(pid) = self.pick(random, life) {
                    let after_exit = match random.u32(0..20) {
                        0 => AfterExit::StayDown,
                        15 => AfterExit::Done,
                        1..10 => AfterExit::Restart,
                        _ => AfterExit::Replace,
                    };
                    self.die(pid, after_exit);
                }
            }
            40..60 => {
                let life = random.choice([Life::Leaving, Life::Killed]).unwrap();
                if let Some(pid) = self.pick(random, life) {
                    self.die(pid, AfterExit::Replace);
                }
            }
            60..85 => {
                self.now += MS * random.u32(0..700);
                self.feed(SupervisorEvent::Tick);
            }
            85..88 => self.fork_fails = !self.fork_fails,
            88..91 => self.feed(SupervisorEvent::Command(Command::Reload)),
            91..94 => self.feed(SupervisorEvent::Command(Command::Add)),
            94..97 => self.feed(SupervisorEvent::Command(Command::Remove)),
            97..98 => self.random_number(random),
            98..99 => self.feed(SupervisorEvent::Ready { pid: Pid::from_raw(1) }),
            _ => self.feed(SupervisorEvent::Exited { pid: Pid::from_raw(1), after_exit: AfterExit::StayDown }),
        }
    }

    fn random_number(&mut self, random: &mut fastrand::Rng) {
        if random.u32(0..8) == 0 {
            self.feed(SupervisorEvent::Command(Command::Scale(random.u32(0..20))));
            return;
        }
        if random.u32(0..8) == 0 {
            let min = random.u32(0..6);
            let policy = range(min, min.max(1) + random.u32(0..6));
            // A process that is already exiting cannot be kept when the budget shrinks.
            let max_unavailable = self.supervisor.policy.max_unavailable;
            return self.feed(SupervisorEvent::Policy(Policy {
                max_unavailable,
                respawn_rate: random.u32(1..16),
                ..policy
            }));
        }
        self.requests = random.u32(0..12);
        if self.requests > 0 {
            self.feed(SupervisorEvent::Arrival);
        }
    }
}

#[test]
fn random_histories_always_lead_back_to_full_strength() {
    for seed in 0..1000 {
        let outcome = std::panic::catch_unwind(|| {
            let mut random = fastrand::Rng::with_seed(seed);
            let min = random.u32(0..6);
            let policy = range(min, min.max(1) + random.u32(0..2) * random.u32(0..6));
            let settle = MS * random.choice([0, 0, 300, 2000]).unwrap();
            let max_unavailable = Budget::Number(random.u32(1..4));
            let mut world = World::new(Policy { max_unavailable, settle, ..policy });
            for _ in 0..random.u32(1..600) {
                world.random_event(&mut random);
                if world.supervisor.mode != Mode::Running {
                    break; // all have retired
                }
            }
            world.fork_fails = false;
            world.settle();
            if world.supervisor.mode == Mode::Stopped {
                assert_eq!((world.exited, world.ready()), (Some(false), 0));
                return;
            }
            assert_eq!(world.ready(), world.supervisor.target as usize);
            let last = random.choice([Command::Drain, Command::Halt]).unwrap();
            world.queue_waits = random.bool();
            world.feed(SupervisorEvent::Command(last));
            for _ in 0..random.u32(0..30) {
                if world.exited.is_none() {
                    world.feed(SupervisorEvent::Queue { waits: world.queue_waits });
                    world.random_event(&mut random);
                }
            }
            world.fork_fails = false;
            if world.exited.is_none() {
                world.feed(SupervisorEvent::Queue { waits: false });
            }
            world.settle();
            assert_eq!(world.exited, Some(true));
        });
        assert!(outcome.is_ok(), "seed {seed}");
    }
}

#[test]
fn a_crash_after_ready_is_replaced_at_once() {
    let mut world = World::new(policy(2));
    world.settle();
    assert_eq!(world.notices, [Notice::FullStrength]);
    let spawned = world.spawned;
    let pid = *world.processes.keys().next().unwrap();
    world.die(Pid::from_raw(pid), AfterExit::Replace);
    assert_eq!(world.spawned, spawned + 1, "in the same instant");
}

#[test]
fn a_storm_of_crashes_is_throttled() {
    let mut world = World::new(policy(2));
    world.settle();
    let start = (world.spawned, world.now);
    while world.now < start.1 + 10_000 * MS {
        // Each process dies as soon as it is ready.
        let mut random = fastrand::Rng::with_seed(1);
        if let Some(pid) = world.pick(&mut random, Life::Starting) {
            world.become_ready(pid);
        } else if let Some(pid) = world.pick(&mut random, Life::Ready) {
            world.die(pid, AfterExit::Replace);
        } else {
            world.now = world.supervisor.next_deadline().unwrap();
            world.feed(SupervisorEvent::Tick);
        }
    }
    let in_ten_seconds = world.spawned - start.0;
    assert!((80..=90).contains(&in_ten_seconds), "8 a second and 8 at once, got {in_ten_seconds}");
}

#[test]
fn failing_starts_back_off_and_one_alone_tries() {
    let mut world = World::new(policy(4));
    let mut spawned_at = Vec::new();
    while spawned_at.len() < 12 {
        let before = world.spawned;
        let starting: Vec<i32> = world.processes.keys().copied().collect();
        if starting.is_empty() {
            world.now = world.supervisor.next_deadline().unwrap();
            world.feed(SupervisorEvent::Tick);
            assert_eq!(world.spawned, before + 1, "one alone tries");
            spawned_at.push(world.now);
        }
        for pid in starting {
            world.die(Pid::from_raw(pid), AfterExit::Replace);
        }
    }
    let gaps: Vec<u128> = spawned_at.windows(2).map(|pair| (pair[1] - pair[0]).as_millis()).collect();
    assert_eq!(gaps, [200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000, 30_000, 30_000]);
    world.settle();
    assert_eq!(world.ready(), 4);
}

#[test]
fn a_process_that_overruns_its_start_is_killed_and_counts_as_failed() {
    let mut world = World::new(policy(1));
    world.now = 1000 * MS;
    world.feed(SupervisorEvent::Tick);
    let (&pid, &life) = world.processes.iter().next().unwrap();
    assert_eq!(life, Life::Killed);
    world.die(Pid::from_raw(pid), AfterExit::Replace);
    assert!(
        matches!(world.notices[..], [Notice::StartTimeout { .. }, Notice::Failing { failures: 1, .. }]),
        "{:?}",
        world.notices
    );
}

#[test]
fn a_reload_replaces_one_by_one_and_never_serves_with_fewer() {
    let mut world = World::new(policy(3));
    world.settle();
    world.feed(SupervisorEvent::Command(Command::Reload));
    let mut random = fastrand::Rng::with_seed(1);
    while let Some(pid) = world.pick(&mut random, Life::Starting) {
        assert!(world.ready() >= 3);
        assert_eq!(world.processes.values().filter(|&&life| life == Life::Starting).count(), 1);
        world.become_ready(pid);
        let old = world.pick(&mut random, Life::Leaving).expect("one has drained");
        assert_eq!(world.pick(&mut random, Life::Starting), None, "the next one has to wait until that is gone");
        world.die(old, AfterExit::Restart);
    }
    assert!(world.notices.contains(&Notice::ReloadDone { generation: 2 }));
    world.settle();
    for &pid in world.processes.keys() {
        assert_eq!(world.supervisor.place_of(Pid::from_raw(pid)).unwrap().1, 2);
    }
}

/// Whether this process made the reload to this generation fail.
fn failed_with(world: &World, generation: u64, new: i32) -> bool {
    let failed = |notice: &&Notice| matches!(notice, Notice::ReloadFailed { .. });
    let notice = world.notices.iter().rfind(failed).expect("it failed");
    matches!(*notice, Notice::ReloadFailed { generation: of, pid: Some(pid), .. } if (of, pid.as_raw()) == (generation, new))
}

#[test]
fn a_reload_whose_first_process_dies_keeps_the_old_ones() {
    let mut world = World::new(policy(3));
    world.settle();
    let old: Vec<i32> = world.processes.keys().copied().collect();
    world.feed(SupervisorEvent::Command(Command::Reload));
    let new = *world.processes.keys().next_back().unwrap();
    world.die(Pid::from_raw(new), AfterExit::Replace);
    assert!(failed_with(&world, 2, new));
    world.settle();
    assert_eq!(world.processes.keys().copied().collect::<Vec<_>>(), old);
}

#[test]
fn a_process_that_will_not_leave_is_asked_again_and_then_killed() {
    let mut world = World::new(policy(1));
    world.settle();
    world.feed(SupervisorEvent::Command(Command::Drain));
    let mut asked = 0;
    while world.processes.values().all(|&life| life == Life::Leaving) {
        world.now = world.supervisor.next_deadline().unwrap();
        asked += 1;
        world.feed(SupervisorEvent::Tick);
    }
    assert_eq!((asked, world.now), (5, 5000 * MS));
    world.settle();
    assert_eq!(world.exited, Some(true));
}

/// Returns the pids of some starting processes.
fn starting(world: &World) -> Vec<Pid> {
    let starting = world.processes.iter().filter(|(_, life)| **life == Life::Starting);
    starting.map(|(&pid, _)| Pid::from_raw(pid)).collect()
}

#[test]
fn a_process_that_ends_well_before_it_was_seen_ready_has_failed_only_if_that_comes_again_and_again() {
    let mut world = World::new(Policy { respawn_rate: 64, ..policy(1) });
    world.settle();
    world.die(Pid::from_raw(*world.processes.keys().next().unwrap()), AfterExit::Restart);
    let spawned = world.spawned;
    for _ in 1..MAX_UNSEEN {
        world.die(starting(&world)[0], AfterExit::Restart);
        assert_eq!(starting(&world).len(), 1, "it is replaced at once");
        world.now += MS;
    }
    world.become_ready(starting(&world)[0]);
    world.die(Pid::from_raw(*world.processes.keys().next().unwrap()), AfterExit::Restart);
    for _ in 1..MAX_UNSEEN {
        world.die(starting(&world)[0], AfterExit::Restart);
        world.now += MS;
    }
    assert_eq!(world.spawned, spawned + 2 * MAX_UNSEEN - 1, "a process that was ready has reset the count");
    assert_eq!(world.notices, [Notice::FullStrength]);
    let mut delays = Vec::new();
    while delays.len() < 11 {
        match starting(&world).first() {
            Some(&pid) => world.die(pid, AfterExit::Restart),
            None => {
                let deadline = world.supervisor.next_deadline().unwrap();
                delays.push((deadline - world.now).as_millis());
                world.now = deadline;
                world.feed(SupervisorEvent::Tick);
            }
        }
    }
    assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000, 30_000]);
    world.settle();
    assert_eq!(world.ready(), 1);
}

#[test]
fn a_reload_whose_new_processes_end_well_again_and_again_fails_and_the_old_ones_stay() {
    // Processes that run longer are given more weight, so fewer of them are enough.
    for (lived, most) in [(MS, MAX_UNSEEN), (UNSEEN_LONG, 4)] {
        let mut world = World::new(policy(3));
        world.settle();
        let (old, spawned): (Vec<i32>, _) = (world.processes.keys().copied().collect(), world.spawned);
        world.feed(SupervisorEvent::Command(Command::Reload));
        while let Some(&pid) = starting(&world).first() {
            world.now += lived;
            // Processes of the old generation recycle themselves and are seen to be ready. This does not prove the new
            // generation.
            world.die(pid, AfterExit::Restart);
        }
        assert_eq!(world.spawned - spawned, most);
        assert!(
            matches!(world.notices.last(), Some(Notice::ReloadFailed { generation: 2, .. })),
            "{:?}",
            world.notices
        );
        assert_eq!(world.processes.keys().copied().collect::<Vec<_>>(), old);
        world.feed(SupervisorEvent::Command(Command::Reload));
        world.settle();
        assert_eq!(world.notices.last(), Some(&Notice::ReloadDone { generation: 3 }));
    }
}

#[test]
fn a_reload_whose_first_process_overruns_its_start_keeps_the_old_ones() {
    let mut world = World::new(policy(3));
    world.settle();
    let old: Vec<i32> = world.processes.keys().copied().collect();
    world.feed(SupervisorEvent::Command(Command::Reload));
    let new = *world.processes.keys().next_back().unwrap();
    world.now += 1000 * MS;
    world.feed(SupervisorEvent::Tick);
    assert_eq!(world.processes[&new], Life::Killed);
    assert_eq!(world.processes.len(), 4, "no other process is tried during the delay");
    world.die(Pid::from_raw(new), AfterExit::Replace);
    assert!(failed_with(&world, 2, new));
    world.settle();
    assert_eq!(world.processes.keys().copied().collect::<Vec<_>>(), old);
}

#[test]
fn a_reload_whose_new_processes_retire_keeps_the_old_ones() {
    let mut world = World::new(policy(3));
    world.settle();
    let old: Vec<i32> = world.processes.keys().copied().collect();
    world.feed(SupervisorEvent::Command(Command::Reload));
    let new = *world.processes.keys().next_back().unwrap();
    world.die(Pid::from_raw(new), AfterExit::StayDown);
    world.settle();
    assert_eq!(world.processes.keys().copied().collect::<Vec<_>>(), old);
    assert_eq!(world.supervisor.target, 3);
}

#[test]
fn the_server_stops_if_no_process_ever_became_ready_and_a_reload_restarts_the_time() {
    let policy = Policy { give_up_after: 60_000 * MS, start_timeout: 200_000 * MS, ..policy(2) };
    let fail_for = |supervisor: &mut Supervisor, begin: SupervisorEvent, from: Duration, until: Duration| {
        let mut now = from;
        let mut actions = supervisor.step(begin, now);
        while now < until {
            for action in std::mem::take(&mut actions) {
                if let Action::Spawn { slot, .. } = action {
                    actions.extend(supervisor.step(SupervisorEvent::SpawnFailed { slot }, now));
                } else if let Action::Notice(Notice::GivenUp { .. }) = action {
                    return Some(now);
                }
            }
            now = supervisor.next_deadline().unwrap_or(now + MS).min(until); // without a deadline, the supervisor has stopped
            actions.extend(supervisor.step(SupervisorEvent::Tick, now));
        }
        None
    };
    let given_up =
        |supervisor: &mut Supervisor| fail_for(supervisor, SupervisorEvent::Tick, Uptime::ZERO, 400_000 * MS);
    assert_eq!(given_up(&mut Supervisor::new(policy)), Some(60_000 * MS));
    assert_eq!(given_up(&mut Supervisor::new(Policy { give_up_after: Uptime::ZERO, ..policy })), None);

    let mut reloaded = Supervisor::new(policy);
    assert_eq!(fail_for(&mut reloaded, SupervisorEvent::Tick, Uptime::ZERO, 50_000 * MS), None);
    let reload = SupervisorEvent::Command(Command::Reload);
    let at = fail_for(&mut reloaded, reload, 50_000 * MS, 400_000 * MS).expect("the server stops in the end");
    assert!(at >= 110_000 * MS, "{at:?}");

    // A starting process is allowed to finish starting.
    let mut slow = Supervisor::new(policy);
    for action in slow.step(SupervisorEvent::Tick, Uptime::ZERO) {
        if let Action::Spawn { slot, .. } = action {
            let pid = Pid::from_raw(100 + slot.cast_signed());
            let _ = slow.step(SupervisorEvent::Spawned { slot, pid }, Uptime::ZERO);
            if slot == 1 {
                let _ = slow.step(SupervisorEvent::Exited { pid, after_exit: AfterExit::Replace }, Uptime::ZERO);
            }
        }
    }
    let later = slow.step(SupervisorEvent::Tick, 100_000 * MS);
    assert!(!later.iter().any(|action| matches!(action, Action::Notice(Notice::GivenUp { .. }))), "{later:?}");

    // If a process has ever been ready, the supervisor never gives up.
    let mut proven = World::new(policy);
    proven.settle();
    let pid = Pid::from_raw(*proven.processes.keys().next().unwrap());
    let exit = SupervisorEvent::Exited { pid, after_exit: AfterExit::Replace };
    assert_eq!(fail_for(&mut proven.supervisor, exit, proven.now, 400_000 * MS), None);
}
