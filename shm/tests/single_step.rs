//! Kills a process at every single instruction of each operation on the cache.
//!
//! One child steps through the operation. After each step, the memory is as if the child had been killed there. If the memory has changed,
//! it is copied, and the copy is checked as a segment whose members are all dead (see `common/image.rs`). One run thus covers every
//! instruction of the operation.
//!
//! An instruction that copies bytes is stepped byte by byte. Of the states within such an instruction, one in sixteen is checked, or every
//! one with FORKYARD_EVERY=1. FORKYARD_SCALE=n steps through only a random n percent of the operations.
#![expect(clippy::print_stdout, reason = "the test prints its own report")]

mod common;

use std::time::{Duration, Instant};

use common::image::{Slate, Watch};
use common::scenes::{Known, SCENES, Scene, Stage};
use common::{await_stop, name, not_longer_than, spawn, stepped};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::unistd::Pid;

/// Time limit that is far longer than the check of one state takes.
const HANGS: Duration = Duration::from_secs(120);

fn main() {
    common::run(&[("killed_at_every_instruction", killed_at_every_instruction)]);
}

fn killed_at_every_instruction(seed: u64) {
    let scale = common::number("FORKYARD_SCALE").unwrap_or(100);
    let mut random = fastrand::Rng::with_seed(seed);
    for scene in SCENES.iter().filter(|_| random.u64(0..100) < scale) {
        let began = Instant::now();
        let Counts { instructions, states, looked_at, locked } = step_through(scene);
        let took = began.elapsed();
        println!(
            "  {}: {instructions} instructions, {states} states, {looked_at} checked, {locked} with the lock held, {took:?}",
            scene.name
        );
        assert!(instructions > 50 && states > 0, "the operation was not stepped");
    }
}

#[derive(Debug, Default)]
struct Counts {
    instructions: u64,
    states: u64,
    looked_at: u64,
    locked: u64,
}

fn step_through(scene: &Scene) -> Counts {
    not_longer_than(HANGS);
    let Stage { segment, pins } = (scene.prepare)();
    let cache = segment.cache();
    let mut watch = Watch::of(&segment);
    let slate = Slate::for_images_like(&watch.image);
    let known = Known::of(scene, &watch.image, &slate);
    let every = common::number("FORKYARD_EVERY").is_some();
    let child = spawn(|_| {
        ptrace::traceme().expect("traceme");
        if !scene.claims {
            drop(cache.get(name(0)));
        }
        raise(Signal::SIGSTOP).expect("raise");
        (scene.act)(&cache);
    });
    await_stop(child.pid);
    let mut counts = Counts::default();
    let mut look = true;
    while look || stepped(child.pid) {
        counts.instructions += 1;
        not_longer_than(HANGS);
        if watch.renew() || look {
            counts.states += 1;
            look = every || counts.states % 16 == 0 || !copies_bytes(child.pid);
        }
        if look {
            let copy = slate.pour(&watch.image).cache();
            counts.looked_at += 1;
            counts.locked += copy.locks_held() as u64;
            if let Err(why) = known.verify(&copy) {
                panic!("{}, killed after instruction {}: {why}", scene.name, counts.instructions);
            }
        }
        look = false;
    }
    drop(pins);
    counts
}

/// Returns whether the child is within an instruction that copies bytes, or directly before it.
fn copies_bytes(pid: Pid) -> bool {
    let registers = ptrace::getregs(pid).expect("registers");
    let code = ptrace::read(pid, registers.rip as ptrace::AddressType).expect("code");
    code.to_le_bytes().starts_with(&[0xf3, 0xa4]) // rep movsb
}
