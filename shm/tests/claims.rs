//! Tests in which gateways are killed while they claim and release the units of app processes.
#![expect(unsafe_code, reason = "the tests fork and share memory")]
#![expect(clippy::print_stdout, reason = "the tests print what they covered")]

mod common;

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Child, await_stop, say_ready, spawn, stepped};
use forkyard_shm::{Claims, Door, Wake};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};

const GATEWAYS: u32 = 3;
const PROCESSES: u32 = 4;
/// Number of app processes that can be distinguished in a slot: more than a stopped gateway can miss.
const EPOCHS: usize = 4096;
/// Number of the master, which uses an app process while it replaces the process.
const MASTER: u64 = u64::MAX;

fn main() {
    common::run(&[
        ("no_unit_has_two_owners_while_gateways_are_killed", no_unit_has_two_owners_while_gateways_are_killed),
        ("a_gateway_killed_at_any_instruction_leaves_nothing", a_gateway_killed_at_any_instruction_leaves_nothing),
        (
            "a_master_killed_at_any_instruction_can_repeat_its_operation",
            a_master_killed_at_any_instruction_can_repeat_its_operation,
        ),
        ("a_stopped_gateway_does_not_block_others", a_stopped_gateway_does_not_block_others),
    ]);
}

fn now_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock can be read");
    now.tv_sec().cast_unsigned() * 1_000_000 + now.tv_nsec().cast_unsigned() / 1000
}

/// Words that the gateways share outside of the table, to check it.
#[repr(C)]
#[derive(Debug)]
struct Shared {
    /// The gateway that uses each app process, by a number that is never reused; 0 if none does.
    owners: [[AtomicU64; EPOCHS]; PROCESSES as usize],
    /// Number of requests that the gateways have forwarded.
    served: AtomicU64,
    /// Number of times that an app process had two owners.
    conflicts: AtomicU64,
    /// Number of times that the master was woken.
    master_woken: AtomicU64,
}

impl Shared {
    /// Returns the word of an app process that was started in a slot.
    fn owner(&self, process: u32, epoch: u32) -> &AtomicU64 {
        &self.owners[process as usize][epoch as usize % EPOCHS]
    }

    fn new() -> &'static Shared {
        let size = NonZeroUsize::new(size_of::<Shared>()).expect("the structure is not empty");
        // SAFETY: a new mapping, to which nothing else refers.
        let memory =
            unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED) };
        // SAFETY: the mapping is large enough, aligned to a page, zeroed (0 is a valid value of each atomic), and never unmapped.
        unsafe { memory.expect("mmap").cast().as_ref() }
    }
}

fn opened(gateways: u32) -> Claims {
    let claims = Claims::create(PROCESSES, 1, gateways).expect("table");
    for process in 0..PROCESSES {
        claims.open(process, 1000 + process, u32::MAX, now_us()).expect("slot");
    }
    claims
}

/// Claims and releases units until the process is killed.
fn forward(claims: &Claims, shared: &Shared, gateway: u32, number: u64) {
    let mut random = fastrand::Rng::with_seed(number);
    loop {
        let _ = claims.set_waiting(gateway, 1, now_us(), now_us());
        let attempt = claims.claim(gateway, now_us());
        if attempt.wake_master {
            shared.master_woken.fetch_add(1, Ordering::SeqCst);
        }
        let Some(unit) = attempt.unit else {
            std::thread::yield_now();
            continue;
        };
        let _ = claims.set_waiting(gateway, 0, 0, now_us());
        let owner = shared.owner(unit.process(), unit.epoch());
        let before = owner.swap(number, Ordering::SeqCst);
        for _ in 0..random.u32(0..200) {
            std::hint::spin_loop();
        }
        // An owner that is killed before it stores its number, or after it has cleared it, is harmless.
        if before != 0 || owner.swap(0, Ordering::SeqCst) != number {
            shared.conflicts.fetch_add(1, Ordering::SeqCst);
        }
        shared.served.fetch_add(1, Ordering::SeqCst);
        if claims.release(unit, now_us()) == Wake::Master {
            shared.master_woken.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn start(claims: &Claims, shared: &Shared, gateway: u32, number: u64) -> Child {
    let mut child = spawn(|mut pipe| {
        say_ready(&mut pipe);
        forward(claims, shared, gateway, number);
    });
    claims.gateway_started(gateway, child.pid.as_raw().cast_unsigned());
    child.await_ready();
    child
}

/// Removes a gateway that was killed. Returns the number of units that it held.
fn remove(claims: &Claims, shared: &Shared, gateway: u32, number: u64) -> usize {
    // The words must be cleared before the units are free.
    for owner in shared.owners.iter().flatten() {
        let _ = owner.compare_exchange(number, 0, Ordering::SeqCst, Ordering::SeqCst);
    }
    claims.gateway_died(gateway, now_us()).len()
}

/// Lets the gateways run until they have forwarded this many more requests.
fn let_run(shared: &Shared, requests: u64) {
    let start = shared.served.load(Ordering::SeqCst);
    while shared.served.load(Ordering::SeqCst).wrapping_sub(start) < requests {
        std::thread::yield_now();
    }
}

/// Replaces an app process, as the master does: the door is drained, and closed when no gateway holds a unit.
fn recycle(claims: &Claims, shared: &Shared, process: u32, pid: u32) {
    let mut woken = shared.master_woken.load(Ordering::SeqCst);
    let mut is_idle = claims.drain(process);
    while !is_idle {
        // The master looks again only when it has been woken, and all gateways are running.
        while shared.master_woken.load(Ordering::SeqCst) == woken {
            std::thread::yield_now();
        }
        woken = shared.master_woken.load(Ordering::SeqCst);
        is_idle = claims.is_idle(process);
    }
    let epoch = claims.app_process(process).expect("slot").epoch;
    let owner = shared.owner(process, epoch);
    assert_eq!(owner.swap(MASTER, Ordering::SeqCst), 0, "a gateway uses an idle app process");
    for _ in 0..2000 {
        std::hint::spin_loop();
    }
    assert_eq!(owner.load(Ordering::SeqCst), MASTER, "a gateway has claimed an app process that is drained");
    claims.close(process);
    claims.open(process, pid, u32::MAX, now_us());
}

fn no_unit_has_two_owners_while_gateways_are_killed(seed: u64) {
    let kills = common::number("FORKYARD_KILLS").unwrap_or(400);
    let mut random = fastrand::Rng::with_seed(seed);
    let (claims, shared) = (opened(GATEWAYS), Shared::new());
    let mut gateways: Vec<(u64, Child)> = (0..GATEWAYS)
        .map(|gateway| (u64::from(gateway) + 1, start(&claims, shared, gateway, u64::from(gateway) + 1)))
        .collect();
    let mut interrupted = 0;
    for kill in 0..kills {
        let_run(shared, random.u64(0..300));
        for _ in 0..random.u32(0..1000) {
            std::hint::spin_loop();
        }
        let (process, pid) = (random.u32(0..PROCESSES), 2000 + u32::try_from(kill).expect("few kills"));
        match random.u32(0..3) {
            0 => (0..30).for_each(|_| recycle(&claims, shared, random.u32(0..PROCESSES), pid)),
            1 => {
                // The app process dies, while gateways may use it.
                claims.close(process);
                claims.open(process, pid, u32::MAX, now_us());
            }
            _ => {}
        }
        let gateway = random.u32(0..GATEWAYS);
        let number = kill + 100;
        let (old_number, old) = gateways.remove(gateway as usize);
        old.kill();
        interrupted += remove(&claims, shared, gateway, old_number);
        gateways.insert(gateway as usize, (number, start(&claims, shared, gateway, number)));
        assert_eq!(shared.conflicts.load(Ordering::SeqCst), 0, "a unit had two owners");
    }
    let_run(shared, 1000);
    for (gateway, (number, child)) in (0..).zip(gateways) {
        child.kill();
        remove(&claims, shared, gateway, number);
    }
    let served = shared.served.load(Ordering::SeqCst);
    println!("  {kills} gateways killed, {interrupted} of them with a unit, {served} requests");
    assert_eq!(shared.conflicts.load(Ordering::SeqCst), 0, "a unit had two owners");
    assert!(interrupted > 0, "no gateway was killed while it held a unit");
    assert_all_free(&claims);
}

/// Checks that all units can be claimed, that no request waits, and that the rows of the gateways are empty.
fn assert_all_free(claims: &Claims) {
    let demand = claims.demand(now_us());
    assert_eq!((demand.in_flight, demand.waiting), (0, 0));
    let units: Vec<_> = std::iter::from_fn(|| claims.claim(0, now_us()).unit).collect();
    assert_eq!(units.len(), PROCESSES as usize);
    for unit in units {
        assert_eq!(claims.release(unit, now_us()), Wake::Nobody);
    }
}

/// Returns a copy of a table, as it would be found by other processes at this moment.
fn copy_of(image: &[u8]) -> Claims {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"copy", flags).expect("memfd"));
    file.write_all_at(image, 0).expect("write");
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all() & !SealFlag::F_SEAL_WRITE & !SealFlag::F_SEAL_FUTURE_WRITE))
        .expect("seal");
    Claims::attach(file.into()).expect("the copy is a table")
}

/// Lets a child execute an operation instruction by instruction. Calls `check` with a copy of the table for each state of the memory, as
/// if the child had been killed there.
fn step_through(claims: &Claims, act: impl FnOnce(), check: impl Fn(&Claims)) {
    let file = File::from(claims.fd().try_clone_to_owned().expect("dup"));
    let len = usize::try_from(file.metadata().expect("stat").len()).expect("a small table");
    let (mut image, mut now) = (vec![0; len], vec![0; len]);
    let child = spawn(|_| {
        ptrace::traceme().expect("traceme");
        raise(Signal::SIGSTOP).expect("raise");
        act();
    });
    await_stop(child.pid);
    let (mut instructions, mut states) = (0, 0);
    while stepped(child.pid) {
        instructions += 1;
        file.read_exact_at(&mut now, 0).expect("read");
        if now != image {
            image.copy_from_slice(&now);
            states += 1;
            check(&copy_of(&image));
        }
    }
    println!("  {instructions} instructions, {states} states");
    assert!(states > 5, "the operation was not stepped");
}

fn a_gateway_killed_at_any_instruction_leaves_nothing(_seed: u64) {
    let claims = opened(GATEWAYS);
    let now = now_us();
    // Another gateway holds a unit, and must keep it.
    let other = claims.claim(1, now).unit.expect("a unit is free");
    let act = || {
        let _ = claims.set_waiting(0, 1, now, now);
        let unit = claims.claim(0, now).unit.expect("a unit is free");
        let _ = claims.set_waiting(0, 0, 0, now);
        let _ = claims.release(unit, now);
    };
    step_through(&claims, act, |copy| {
        let held = copy.demand(now).in_flight - 1;
        assert_eq!(copy.gateway_died(0, now).len(), held as usize);
        let demand = copy.demand(now);
        assert_eq!((demand.in_flight, demand.waiting), (1, 0));
        assert_eq!(copy.app_process(other.process()).map(|process| process.busy), Some(1));
        let units: Vec<_> = std::iter::from_fn(|| copy.claim(0, now).unit).collect();
        assert_eq!(units.len(), PROCESSES as usize - 1);
    });
    assert_eq!(claims.release(other, now), Wake::Nobody);
    assert_all_free(&claims);
}

fn a_master_killed_at_any_instruction_can_repeat_its_operation(_seed: u64) {
    let claims = opened(GATEWAYS);
    let now = now_us();
    let held: Vec<_> = std::iter::from_fn(|| claims.claim(1, now).unit).collect();
    let act = || {
        let _ = claims.drain(0);
        claims.close(0);
        claims.open(0, 77, u32::MAX, now);
        claims.gateway_died(1, now);
        claims.open(0, 78, u32::MAX, now);
    };
    step_through(&claims, act, |copy| {
        let process = copy.app_process(0).expect("slot");
        // If the door is open, the units are those of the app process with this pid.
        if let Some(unit) = copy.claim(0, now).unit.filter(|unit| unit.process() == 0) {
            assert!(process.door == Door::Open && unit.pid() == process.pid && unit.epoch() == process.epoch);
            assert!(matches!((unit.epoch(), unit.pid()), (2, 77) | (3, 78)));
        }
        copy.close(0);
        copy.gateway_died(1, now);
        copy.gateway_died(0, now);
        copy.open(0, 79, u32::MAX, now);
        assert_all_free(copy);
    });
    for unit in held {
        assert_eq!(claims.release(unit, now), Wake::Nobody);
    }
    assert_all_free(&claims);
}

fn a_stopped_gateway_does_not_block_others(_seed: u64) {
    let claims = opened(GATEWAYS);
    let now = now_us();
    let child = spawn(|_| {
        let _ = claims.set_waiting(0, 1, now - 10, now);
        let _unit = claims.claim(0, now).unit.expect("a unit is free");
        raise(Signal::SIGSTOP).expect("raise");
    });
    let status = waitpid(child.pid, Some(WaitPidFlag::WUNTRACED));
    assert_eq!(status, Ok(WaitStatus::Stopped(child.pid, Signal::SIGSTOP)));
    for request in 0..100 {
        assert_eq!(claims.set_waiting(1, 1, now, now), None);
        let unit = claims.claim(1, now + request).unit.expect("units are free");
        // A unit is free, so the gateway that still waits is woken.
        assert_eq!(claims.set_waiting(1, 0, 0, now), Some(0));
        assert_eq!(claims.release(unit, now + request), Wake::Gateway(0));
    }
    let stopped = (0..PROCESSES).find(|&process| !claims.is_idle(process)).expect("the gateway holds a unit");
    assert!(!claims.drain(stopped));
    child.kill();
    assert_eq!(claims.gateway_died(0, now), [stopped]);
    assert!(claims.is_idle(stopped));
    claims.close(stopped);
    claims.open(stopped, 1, u32::MAX, now);
    assert_all_free(&claims);
}
