//! Tests the sidecar supervisor with selected histories, and with random ones from a seed.

use std::collections::BTreeMap;

use jiff::tz::TimeZone;

use super::*;
use crate::config::sidecars::SidecarConfig;

const S: Duration = Duration::from_secs(1);
const STOP: Duration = Duration::from_secs(10);

/// Sidecars, their clocks, and their running processes.
struct World {
    sidecars: SidecarSupervisor,
    now: Uptime,
    wall: Timestamp,
    alive: BTreeMap<Pid, usize>,
    asked: BTreeMap<Pid, SidecarAction>,
    next_pid: i32,
    notices: Vec<(usize, SidecarNotice)>,
    /// How many times each sidecar was started.
    starts: Vec<u32>,
    fails_to_spawn: bool,
}

/// Creates a world with this many daemons, followed by one job for each schedule.
fn world(daemons: usize, schedules: &[&str], cron_timeout: Duration) -> World {
    let daemons = (0..daemons).map(|number| SidecarConfig::daemon(&format!("d{number}=x")).unwrap());
    let jobs = schedules.iter().enumerate().map(|(number, text)| {
        let mut job = SidecarConfig::job(&format!("j{number}={text}=x")).unwrap();
        job.schedule = Some(Schedule::parse(text, TimeZone::UTC).unwrap());
        job
    });
    let all: Vec<_> = daemons.chain(jobs).collect();
    let starts = vec![0; all.len()];
    let config = SidecarsConfig::new(all, cron_timeout, 4).unwrap();
    let wall = "2026-05-01T00:00:30Z".parse().unwrap();
    World {
        sidecars: SidecarSupervisor::new(&config, STOP, wall),
        now: Uptime::ZERO,
        wall,
        alive: BTreeMap::new(),
        asked: BTreeMap::new(),
        next_pid: 100,
        notices: Vec::new(),
        starts,
        fails_to_spawn: false,
    }
}

impl World {
    fn feed(&mut self, event: SidecarEvent) {
        if let SidecarEvent::Exited { pid, .. } = event {
            self.alive.remove(&pid).expect("it was running");
            self.asked.remove(&pid);
        }
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for action in self.sidecars.step(event, self.now, self.wall) {
                match action {
                    SidecarAction::Spawn { sidecar } if self.fails_to_spawn => {
                        events.push(SidecarEvent::SpawnFailed { sidecar })
                    }
                    SidecarAction::Spawn { sidecar } => {
                        assert!(!self.alive.values().any(|&other| other == sidecar), "one process for each sidecar");
                        let pid = Pid::from_raw(self.next_pid);
                        self.next_pid += 1;
                        self.alive.insert(pid, sidecar);
                        self.starts[sidecar] += 1;
                        events.push(SidecarEvent::Spawned { sidecar, pid });
                    }
                    SidecarAction::Terminate { pid } => {
                        assert!(self.alive.contains_key(&pid), "only the living are asked");
                        assert_eq!(self.asked.insert(pid, action), None, "once");
                    }
                    SidecarAction::Kill { pid } => {
                        assert!(self.alive.contains_key(&pid), "only the living are killed");
                        assert_ne!(self.asked.insert(pid, action), Some(action), "once");
                    }
                    SidecarAction::Notice { sidecar, notice } => self.notices.push((sidecar, notice)),
                }
            }
        }
        assert_eq!(self.sidecars.is_empty(), self.alive.is_empty());
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.wall += time;
        self.feed(SidecarEvent::Tick);
    }

    fn pid(&self, sidecar: usize) -> Pid {
        *self.alive.iter().find(|(_, number)| **number == sidecar).expect("it is running").0
    }

    fn end(&mut self, sidecar: usize, after_exit: AfterExit) {
        let pid = self.pid(sidecar);
        self.feed(SidecarEvent::Exited { pid, after_exit });
    }
}

#[test]
fn no_sidecar_runs_before_there_are_workers_and_jobs_wait_for_their_time() {
    let mut world = world(1, &["* * * * *"], Duration::ZERO);
    world.pass(90 * S);
    assert_eq!(world.starts, [0, 0]);
    world.feed(SidecarEvent::Begin);
    assert_eq!(world.starts, [1, 0]);
    assert_eq!(world.sidecars.next_deadline(), Some(world.now + 60 * S), "it is on the full minute now");
    world.pass(60 * S);
    assert_eq!(world.starts, [1, 1]);
}

#[test]
fn a_daemon_is_restarted_immediately_if_it_had_run_and_with_growing_delays_otherwise() {
    let mut world = world(1, &[], Duration::ZERO);
    world.feed(SidecarEvent::Begin);
    world.pass(S);
    world.end(0, AfterExit::Replace);
    assert_eq!(world.starts, [2]);
    for delay_ms in [100, 200, 400] {
        world.end(0, AfterExit::Replace);
        assert!(world.alive.is_empty());
        assert_eq!(world.sidecars.next_deadline(), Some(world.now + Duration::from_millis(delay_ms)));
        world.pass(Duration::from_millis(delay_ms));
    }
    assert_eq!(world.starts, [5]);
    assert_eq!(world.notices.len(), 3);
    world.fails_to_spawn = true;
    world.end(0, AfterExit::Restart);
    world.pass(S);
    assert!(world.alive.is_empty());
    world.fails_to_spawn = false;
    world.pass(30 * S);
    assert_eq!(world.starts, [6]);
}

#[test]
fn a_daemon_that_exits_with_125_is_not_restarted_before_a_reload_unless_it_exited_early() {
    let mut world = world(2, &[], Duration::ZERO);
    world.feed(SidecarEvent::Begin);
    world.end(0, AfterExit::StayDown);
    assert!(matches!(world.notices[..], [(0, SidecarNotice::Failing { failures: 1, .. })]), "{:?}", world.notices);
    world.pass(S);
    world.pass(S);
    world.end(0, AfterExit::StayDown);
    world.pass(3600 * S);
    assert_eq!((world.starts.as_slice(), &world.notices[1..]), (&[2, 1][..], &[(0, SidecarNotice::Retired)][..]));
    let other = world.pid(1);
    world.feed(SidecarEvent::Reloaded);
    assert_eq!(world.starts, [3, 1], "the running daemon is asked to stop first");
    assert_eq!(world.asked, BTreeMap::from([(other, SidecarAction::Terminate { pid: other })]));
    world.end(1, AfterExit::StayDown);
    assert_eq!(world.starts, [3, 2], "the status after a request to stop does not matter");
}

#[test]
fn a_daemon_that_exits_immediately_with_0_is_restarted_a_limited_number_of_times() {
    let mut world = world(2, &[], Duration::ZERO);
    world.feed(SidecarEvent::Begin);
    let mut delays = Vec::new();
    for _ in 0..3 {
        world.end(0, AfterExit::Restart);
        delays.push(world.sidecars.next_deadline().unwrap() - world.now);
        world.pass(*delays.last().unwrap());
    }
    assert_eq!(delays, [100, 200, 400].map(Duration::from_millis));
    world.end(0, AfterExit::Restart);
    assert_eq!(world.notices.last(), Some(&(0, SidecarNotice::GivenUp { tries: 4 })));
    world.pass(3600 * S);
    assert_eq!(world.starts, [4, 1]);
    world.feed(SidecarEvent::Reloaded);
    assert_eq!(world.starts[0], 5);
    // The start of the failing daemon is retried; the daemon that had run was restarted.
    for _ in 0..20 {
        world.end(0, AfterExit::Replace);
        world.pass(30 * S);
    }
    assert_eq!(world.starts[0], 25);
}

#[test]
fn a_daemon_in_the_background_is_not_started_a_second_time_before_a_reload() {
    let mut world = world(1, &["* * * * *"], Duration::ZERO);
    world.feed(SidecarEvent::Begin);
    let pid = Pid::from_raw(7);
    world.feed(SidecarEvent::Detached { sidecar: 0, pid });
    assert_eq!(world.notices, [], "it is running");
    world.end(0, AfterExit::Restart);
    world.feed(SidecarEvent::Detached { sidecar: 0, pid });
    assert_eq!(world.notices.last(), Some(&(0, SidecarNotice::Detached { pid })));
    world.feed(SidecarEvent::Detached { sidecar: 1, pid });
    assert_eq!(world.notices.len(), 2, "a job may leave processes behind");
    world.pass(3600 * S);
    assert_eq!(world.starts[0], 1);
    world.feed(SidecarEvent::Reloaded);
    assert_eq!(world.starts[0], 2);
}

#[test]
fn a_run_is_skipped_while_the_previous_run_continues_up_to_its_time_limit() {
    let mut world = world(0, &["* * * * *"], 90 * S);
    world.feed(SidecarEvent::Begin);
    world.pass(30 * S);
    let pid = world.pid(0);
    world.pass(60 * S);
    assert_eq!(world.notices, [(0, SidecarNotice::Skipped { pid })]);
    world.pass(30 * S);
    assert_eq!(world.asked[&pid], SidecarAction::Terminate { pid });
    world.pass(STOP);
    assert_eq!(world.asked[&pid], SidecarAction::Kill { pid });
    world.end(0, AfterExit::Replace);
    world.pass(20 * S);
    assert_eq!(world.starts, [2]);
}

#[test]
fn missed_runs_are_run_once_and_a_clock_set_back_does_not_stop_a_job() {
    let mut world = world(0, &["*/10 * * * *"], Duration::ZERO);
    world.feed(SidecarEvent::Begin);
    // The machine was suspended for a day: only the wall clock has advanced.
    world.wall += 24 * 3600 * S;
    world.pass(S);
    assert_eq!(world.starts, [1]);
    world.end(0, AfterExit::Restart);
    world.pass(9 * 60 * S);
    assert_eq!(world.starts, [1], "once");
    world.pass(60 * S);
    assert_eq!(world.starts, [2]);
    world.end(0, AfterExit::Restart);
    world.wall -= 24 * 3600 * S;
    world.pass(S);
    world.pass(600 * S);
    assert_eq!(world.starts, [3], "it does not wait for a day");
}

#[test]
fn sidecars_stop_in_order() {
    let mut world = world(2, &["* * * * *"], Duration::ZERO);
    world.feed(SidecarEvent::Begin);
    world.pass(30 * S);
    world.feed(SidecarEvent::Closing);
    world.end(0, AfterExit::Replace);
    world.end(2, AfterExit::Restart);
    world.pass(120 * S);
    assert_eq!(world.starts, [2, 1, 1], "draining workers may need a daemon, but no job is started");
    assert!(world.asked.is_empty());
    world.feed(SidecarEvent::Stop);
    assert_eq!(world.asked.len(), 2);
    world.end(0, AfterExit::Replace);
    world.pass(STOP);
    assert_eq!(world.notices.last(), Some(&(1, SidecarNotice::StopTimeout { pid: world.pid(1) })));
    world.end(1, AfterExit::Replace);
    assert!(world.sidecars.is_empty());
}

#[test]
fn adopted_sidecars_continue_and_unwanted_sidecars_are_stopped() {
    let mut world = world(1, &["* * * * *"], 90 * S);
    let pids = [1, 2, 3].map(Pid::from_raw);
    for (sidecar, pid) in [Some(0), Some(1), None].into_iter().zip(pids) {
        let number = world.sidecars.adopt(sidecar, pid, Duration::ZERO, None, world.now);
        world.alive.insert(pid, number);
    }
    world.feed(SidecarEvent::Begin);
    assert_eq!(world.starts, [0, 0], "they are already running");
    assert_eq!(world.asked.keys().collect::<Vec<_>>(), [&pids[2]]);
    world.feed(SidecarEvent::Exited { pid: pids[2], after_exit: AfterExit::Restart });
    world.pass(90 * S);
    assert_eq!(world.asked.keys().collect::<Vec<_>>(), [&pids[1]], "a job has a time limit");
    world.end(0, AfterExit::Replace);
    assert_eq!(world.starts, [1, 0]);
}

#[test]
fn the_exit_of_an_adopted_daemon_that_had_run_or_was_asked_to_stop_is_no_failure() {
    for (age, stop_left) in [(2 * S, None), (Duration::ZERO, Some(5 * S))] {
        let mut world = world(1, &[], S);
        let pid = Pid::from_raw(1);
        let number = world.sidecars.adopt(Some(0), pid, age, stop_left, world.now);
        world.alive.insert(pid, number);
        assert_eq!(world.sidecars.stop_left(pid), stop_left, "for the next master");
        world.feed(SidecarEvent::Begin);
        world.end(0, AfterExit::Replace);
        assert_eq!(world.starts, [1], "immediately: age={age:?} stop_left={stop_left:?}");
    }
    let mut world = world(0, &["* * * * *"], 90 * S);
    let pid = Pid::from_raw(1);
    let number = world.sidecars.adopt(Some(0), pid, 80 * S, None, world.now);
    world.alive.insert(pid, number);
    world.feed(SidecarEvent::Begin);
    world.pass(11 * S);
    assert!(world.asked.contains_key(&pid), "a job's time limit includes the time under the former master");
}

#[test]
fn a_sidecar_that_has_exited_is_not_asked_to_stop_when_its_time_limit_passed_during_an_upgrade() {
    let mut world = world(0, &["@hourly", "@hourly", "@hourly"], 90 * S);
    let pids = [1, 2, 3].map(Pid::from_raw);
    for (index, pid) in pids.into_iter().enumerate() {
        let number = world.sidecars.adopt(Some(index), pid, 100 * S, None, world.now);
        world.alive.insert(pid, number);
    }
    world.end(0, AfterExit::Restart);
    world.end(1, AfterExit::Restart);
    assert!(world.asked.is_empty() && world.notices.is_empty(), "{:?}", world.notices);
    world.feed(SidecarEvent::Begin);
    assert_eq!(world.notices, [(2, SidecarNotice::RunTimeout { pid: pids[2] })]);
}

#[test]
fn a_job_that_became_due_during_an_upgrade_is_run_once() {
    let schedules = ["* * * * *", "@hourly"];
    let mut first = world(0, &schedules, S);
    assert_eq!(first.sidecars.looked_at(), None, "no job runs yet");
    first.feed(SidecarEvent::Begin);
    let looked_at = first.sidecars.looked_at().unwrap();
    let mut second = world(0, &schedules, S);
    second.wall += 90 * S;
    second.sidecars.resume(looked_at);
    second.feed(SidecarEvent::Begin);
    assert_eq!(second.starts, [1, 0]);
    second.feed(SidecarEvent::Begin);
    assert_eq!(second.starts, [1, 0], "once");
}

/// Runs one history from a seed. The assertions in `feed` hold after every event, and the history terminates.
fn history(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let timeout = S * random.u32(0..3) * 40;
    let mut world =
        world(random.usize(0..3), &["* * * * *", "*/7 * * * * *", "@hourly"][..random.usize(0..4)], timeout);
    let (mut begun, mut closing) = (false, None);
    for _ in 0..300 {
        world.fails_to_spawn = random.u8(0..10) == 0;
        let living: Vec<Pid> = world.alive.keys().copied().collect();
        match random.u8(0..20) {
            0 => {
                begun = true;
                world.feed(SidecarEvent::Begin);
            }
            1 => world.feed(SidecarEvent::Reloaded),
            2 if random.u8(0..10) == 0 => {
                let jobs = |world: &World| world.starts.iter().sum::<u32>();
                world.feed(SidecarEvent::Closing);
                closing = closing.or(Some(jobs(&world)));
            }
            3 => world.wall -= S * random.u32(0..7200),
            4 => world.wall += S * random.u32(0..7200),
            5..12 if !living.is_empty() => {
                let pid = living[random.usize(0..living.len())];
                let after_exit = [AfterExit::Replace, AfterExit::Restart, AfterExit::StayDown][random.usize(0..3)];
                world.feed(SidecarEvent::Exited { pid, after_exit });
            }
            _ => {
                // Like the shell: wakes at the deadline, or earlier.
                let wait = world.sidecars.next_deadline().map_or(S, |at| at.saturating_sub(world.now));
                world.pass(if random.bool() { wait } else { wait.mul_f64(random.f64()) });
            }
        }
        assert!(begun || world.starts.iter().all(|&starts| starts == 0) || closing.is_some(), "nothing before Begin");
        let has_missed_deadline = world.sidecars.next_deadline().is_some_and(|at| at < world.now);
        assert!(!has_missed_deadline, "a deadline that has passed was not met");
    }
    world.fails_to_spawn = false;
    world.feed(if random.bool() { SidecarEvent::Stop } else { SidecarEvent::Halt });
    let starts = world.starts.clone();
    world.pass(STOP);
    for &pid in world.alive.keys() {
        assert_eq!(world.asked.get(&pid), Some(&SidecarAction::Kill { pid }), "a process that does not stop is killed");
    }
    for pid in world.alive.keys().copied().collect::<Vec<_>>() {
        world.feed(SidecarEvent::Exited { pid, after_exit: AfterExit::Replace });
    }
    world.pass(7200 * S);
    assert!(world.sidecars.is_empty() && world.starts == starts, "nothing is started after the end");
    assert_eq!(world.sidecars.next_deadline(), None);
}

#[test]
fn the_rules_hold_in_random_histories() {
    for seed in 0..1000 {
        let outcome = std::panic::catch_unwind(|| history(seed));
        assert!(outcome.is_ok(), "seed {seed}");
    }
}
