//! Many processes request one page at the same moment. The page is rendered once, even if processes die, fail, are stopped or are late.
//!
//! The test does not use the test harness, because it must be single-threaded for forking to be safe. The tests do not depend on sleep
//! times: a renderer continues when the other processes are observed waiting, and the tests wait for the renderer by reading a byte from a
//! pipe. The time until another process takes over is printed, not asserted.
#![expect(unsafe_code, reason = "the test forks, and maps memory for its counters")]
#![expect(clippy::print_stdout, reason = "the test reports like the test harness that it replaces")]

use std::fs::File;
use std::sync::Barrier;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use forkyard_shm::{Cache, CacheStatus, Cached, Plan, Recorder, Segment, StoreOptions, crash};
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::pause;

use common::{Child, say_ready, spawn};
use counts::{Counts, load, until};

mod common;
#[path = "herd/counts.rs"]
mod counts;

const PROCESSES: u64 = 4;
const REQUESTS: u64 = 250;
const KEY: &str = "/page";

fn main() {
    common::run(&[
        ("many_threads_render_a_page_once", |_| many_threads_render_a_page_once()),
        ("many_tasks_render_a_page_once", |_| many_tasks_render_a_page_once()),
        ("a_killed_renderer_is_succeeded", |_| a_killed_renderer_is_succeeded()),
        ("a_failed_renderer_is_succeeded", |_| a_failed_renderer_is_succeeded()),
        ("a_cancelled_renderer_is_succeeded", |_| a_cancelled_renderer_is_succeeded()),
        ("a_stopped_renderer_is_bypassed", |_| a_stopped_renderer_is_bypassed()),
        ("killed_at_each_step", |_| killed_at_each_step()),
        ("a_page_purged_during_rendering_is_not_stored", |_| a_page_purged_during_rendering_is_not_stored()),
        ("stale_while_one_renders", |_| stale_while_one_renders()),
        ("stale_if_rendering_fails", |_| stale_if_rendering_fails()),
        ("a_fork_has_its_own_watching_thread", |_| a_fork_has_its_own_watching_thread()),
        ("a_fork_does_not_release_the_leases_of_its_parent", |_| a_fork_does_not_release_the_leases_of_its_parent()),
    ]);
}

fn cache() -> Cache {
    Segment::create(&Plan { cache_bytes: 16 << 20, rows: 8, ..Plan::default() }).expect("segment").cache()
}

/// Returns a page that differs for each renderer.
fn unique_page() -> Vec<u8> {
    format!("{} {:?}", std::process::id(), std::thread::current().id()).repeat(100).into()
}

type Failure = &'static str;

fn ask(cache: &Cache, options: &StoreOptions, render: impl FnOnce(Recorder) -> Result<Vec<u8>, Failure>) -> Cached {
    cache.get_or_render(KEY, options, render).expect("rendered")
}

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_time().build().expect("runtime").block_on(future)
}

/// Stores a page, and waits until it has expired.
fn store_expired(cache: &Cache, options: StoreOptions) {
    cache.set(KEY, "old", &options.ttl(Duration::ZERO)).expect("stored");
    until(|| cache.get(KEY).is_none());
}

// ---- many processes at the same time ----

/// Makes all processes request the page at the same time. The renderer finishes when all other processes are waiting or rendering.
fn herd(one_process: impl Fn(&Cache, &Counts, &mut File)) {
    let (cache, counts) = (cache(), Counts::new());
    store_expired(&cache, StoreOptions::new());
    let before = cache.stats();
    let mut children: Vec<Child> =
        (0..PROCESSES).map(|_| spawn(|mut pipe| one_process(&cache, &counts, &mut pipe))).collect();
    children.iter_mut().for_each(Child::await_ready);
    counts.note(0);
    counts.go.store(1, Ordering::SeqCst);
    children.into_iter().for_each(Child::join);
    let (all, stats) = (PROCESSES * REQUESTS, cache.stats());
    println!("  {all} requests had one page within {} us", counts.delays()[1]);
    assert_eq!((load(counts.rendering), load(counts.served), load(counts.stale)), (1, all, 0));
    assert_eq!((stats.renders, stats.lease_waits, stats.stores - before.stores), (1, all - 1, 1));
    assert_eq!(stats.misses - before.misses, 1);
    // A hit may not be counted if threads of one process count at the same instant (`Stats::hits`).
    assert!(stats.hits - before.hits < all);
}

fn all_others_wait(cache: &Cache, counts: &Counts) -> bool {
    load(counts.rendering) + cache.stats().lease_waits >= PROCESSES * REQUESTS
}

fn many_threads_render_a_page_once() {
    herd(|cache, counts, pipe| {
        let barrier = Barrier::new(usize::try_from(REQUESTS).expect("small") + 1);
        std::thread::scope(|scope| {
            for _ in 0..REQUESTS {
                scope.spawn(|| {
                    barrier.wait();
                    let answer = ask(cache, &StoreOptions::new(), |_| {
                        counts.rendering.fetch_add(1, Ordering::SeqCst);
                        until(|| all_others_wait(cache, counts));
                        Ok(unique_page())
                    });
                    counts.serve(&answer);
                });
            }
            say_ready(pipe);
            until(|| load(counts.go) == 1);
            barrier.wait();
        });
    });
}

fn many_tasks_render_a_page_once() {
    herd(|cache, counts, pipe| {
        run(async {
            let tasks: Vec<_> = (0..REQUESTS)
                .map(|_| {
                    let (cache, counts) = (cache.clone(), *counts);
                    tokio::spawn(async move {
                        let render = |_| async {
                            counts.rendering.fetch_add(1, Ordering::SeqCst);
                            while !all_others_wait(&cache, &counts) {
                                tokio::time::sleep(Duration::from_millis(1)).await;
                            }
                            Ok::<_, Failure>(unique_page())
                        };
                        let answer = cache.get_or_render_async(KEY, &StoreOptions::new(), render).await;
                        counts.serve(&answer.expect("rendered"));
                    })
                })
                .collect();
            say_ready(pipe);
            until(|| load(counts.go) == 1);
            for task in tasks {
                task.await.expect("the task does not panic");
            }
        });
        // The thread that executed the tasks exits when no tasks are left.
        let threads = || std::fs::read_dir("/proc/self/task").expect("/proc").count();
        until(|| threads() == 1);
    });
}

// ---- renderers that do not finish ----

/// Waits in five threads or five tasks for a page from another process, and takes over if necessary.
fn wait_in_five(cache: &Cache, counts: &Counts, threads: bool) {
    let take_over = || {
        counts.note(1);
        counts.rendering.fetch_add(1, Ordering::SeqCst);
        Ok::<_, Failure>(unique_page())
    };
    if threads {
        std::thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| counts.serve(&ask(cache, &StoreOptions::new(), |_| take_over())));
            }
        });
    } else {
        run(async {
            let options = StoreOptions::new();
            let ask = || async {
                let answer = cache.get_or_render_async(KEY, &options, async |_| take_over()).await;
                counts.serve(&answer.expect("rendered"));
            };
            tokio::join!(ask(), ask(), ask(), ask(), ask());
        });
    }
}

/// Starts a renderer twenty times while two processes wait with five requests each. On request, the renderer terminates without a page. In
/// half of the runs, the requests wait in threads.
fn succession(what: &str, renderer: impl Fn(&Cache, &Counts, &mut File), end: impl Fn(Child, &Counts)) {
    for threads in [true, false] {
        let mut delays: Vec<[u64; 2]> = Vec::new();
        for _ in 0..10 {
            let (cache, counts) = (cache(), Counts::new());
            let mut first = spawn(|mut pipe| renderer(&cache, &counts, &mut pipe));
            first.await_ready();
            let others: Vec<Child> = (0..2).map(|_| spawn(|_| wait_in_five(&cache, &counts, threads))).collect();
            until(|| cache.stats().lease_waits == 10);
            end(first, &counts);
            others.into_iter().for_each(Child::join);
            assert_eq!(
                (load(counts.rendering), load(counts.served)),
                (1, 10),
                "one process took over, and all requests received the page"
            );
            assert_eq!(cache.audit(), Ok(()));
            delays.push(counts.delays());
        }
        delays.sort_unstable();
        let ([median, all], [longest, _]) = (delays[5], delays[9]);
        let how = if threads { "threads" } else { "tasks" };
        println!("  {what}: {how} took over within {median} us (the longest: {longest} us), all done in {all} us");
    }
}

fn a_killed_renderer_is_succeeded() {
    let renderer = |cache: &Cache, _: &Counts, pipe: &mut File| {
        ask(cache, &StoreOptions::new(), |_| {
            say_ready(pipe);
            loop {
                pause();
            }
        });
    };
    succession("killed", renderer, |child, counts| {
        counts.note(0);
        child.kill();
    });
}

fn a_failed_renderer_is_succeeded() {
    let renderer = |cache: &Cache, counts: &Counts, pipe: &mut File| {
        let answer = cache.get_or_render(KEY, &StoreOptions::new(), |_| {
            say_ready(pipe);
            until(|| load(counts.go) == 1);
            counts.note(0);
            Err::<Vec<u8>, _>("broken")
        });
        // The renderer returns an error, unless its successor has stored the page before the renderer looks for a fallback.
        assert!(answer.is_err() || answer.is_ok_and(|answer| answer.source == CacheStatus::Fresh));
    };
    succession("failed", renderer, |child, counts| {
        counts.go.store(1, Ordering::SeqCst);
        child.join();
    });
}

fn a_cancelled_renderer_is_succeeded() {
    let renderer = |cache: &Cache, counts: &Counts, pipe: &mut File| {
        run(async {
            let options = StoreOptions::new();
            let never = cache.get_or_render_async(KEY, &options, |_| {
                say_ready(pipe);
                std::future::pending::<Result<Vec<u8>, Failure>>()
            });
            let told = async {
                while load(counts.go) == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                counts.note(0);
            };
            tokio::select! {
                _ = never => unreachable!(),
                () = told => {}
            }
        });
    };
    succession("cancelled", renderer, |child, counts| {
        counts.go.store(1, Ordering::SeqCst);
        child.join();
    });
}

fn a_stopped_renderer_is_bypassed() {
    let stop_while_rendering = |cache: &Cache, options: &StoreOptions| {
        let child = spawn(|_| {
            let answer = ask(cache, options, |_| {
                raise(Signal::SIGSTOP).expect("raise");
                Ok(b"late".to_vec())
            });
            assert_eq!((answer.value.as_slice(), answer.source), (&b"late"[..], CacheStatus::Rendered));
        });
        let status = waitpid(child.pid, Some(WaitPidFlag::WUNTRACED));
        assert_eq!(status, Ok(WaitStatus::Stopped(child.pid, Signal::SIGSTOP)));
        child
    };
    let go_on = |child: Child| {
        kill(child.pid, Signal::SIGCONT).expect("kill");
        child.join();
    };

    let (stale, hour) = (cache(), StoreOptions::new().stale(Duration::from_secs(3600)));
    store_expired(&stale, hour.clone());
    let child = stop_while_rendering(&stale, &hour);
    let answer = ask(&stale, &hour, |_| unreachable!());
    assert_eq!(
        (answer.value.as_slice(), answer.source, stale.stats().lease_waits),
        (&b"old"[..], CacheStatus::Stale, 0)
    );
    go_on(child);
    assert_eq!(stale.get(KEY).expect("stored"), b"late", "no process took over, so the page is stored");

    let (cache, options) = (cache(), StoreOptions::new().deadline(Duration::from_millis(50)));
    store_expired(&cache, StoreOptions::new());
    let child = stop_while_rendering(&cache, &options);
    let answer = ask(&cache, &options, |_| Ok(b"newer".to_vec()));
    assert_eq!((answer.value.as_slice(), answer.source), (&b"newer"[..], CacheStatus::Rendered));
    go_on(child);
    assert_eq!(cache.get(KEY).expect("stored"), b"newer", "a late page does not replace a newer page");
    assert_eq!(cache.stats().lease_waits, 1);
}

/// Kills a renderer at the first step, at the second step, and so on until it finishes.
fn killed_at_each_step() {
    let mut steps = 0;
    loop {
        let cache = cache();
        let child = spawn(|_| {
            crash::die_at(steps);
            ask(&cache, &StoreOptions::new(), |_| Ok(b"first".to_vec()));
        });
        let ended = match waitpid(child.pid, None).expect("waitpid") {
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => false,
            WaitStatus::Exited(_, 0) => true,
            status => panic!("after {steps} steps: {status:?}"),
        };
        let waits = StoreOptions::new().patience(Duration::from_secs(3600));
        let answer = ask(&cache, &waits.deadline(Duration::from_secs(3600)), |_| Ok(b"second".to_vec()));
        let rendered = answer.source == CacheStatus::Rendered;
        assert_eq!(answer.value, if rendered { b"second".to_vec() } else { b"first".to_vec() });
        assert_eq!((cache.audit(), cache.get(KEY)), (Ok(()), Some(answer.value)));
        if ended {
            break;
        }
        steps += 1;
    }
    crash::die_at(u64::MAX - 1);
    ask(&cache(), &StoreOptions::new(), |_| Ok(Vec::new()));
    let passed = crash::points_passed();
    crash::die_at(u64::MAX);
    println!("  killed at each of {steps} steps: {passed:?}");
    let named = ["lease: taken", "render: about to store", "render: stored", "lease: released", "lease: announced"];
    assert!(named.iter().all(|name| passed.contains(name)), "{passed:?}");
}

// ---- stale pages ----

type Purge = fn(&Cache);

fn a_page_purged_during_rendering_is_not_stored() {
    let purges: [(&str, Purge); 5] = [
        ("its key", |cache| assert!(!cache.purge(KEY))),
        ("its tag", |cache| cache.purge_tag("tag")),
        ("a fragment's key", |cache| assert!(cache.purge("fragment"))),
        ("a fragment's tag", |cache| cache.purge_tag("deep")),
        ("everything", Cache::clear),
    ];
    for (what, purge) in purges {
        let (cache, counts) = (cache(), Counts::new());
        cache.set("fragment", "f", &StoreOptions::new().tags(["deep"])).expect("stored");
        let mut child = spawn(|mut pipe| {
            let answer = ask(&cache, &StoreOptions::new().tags(["tag"]), |recorder| {
                let fragment = recorder.get("fragment").expect("stored");
                say_ready(&mut pipe);
                until(|| load(counts.go) == 1);
                Ok(fragment)
            });
            assert_eq!(answer, Cached { value: b"f".to_vec(), source: CacheStatus::Rendered });
        });
        child.await_ready();
        purge(&cache);
        counts.go.store(1, Ordering::SeqCst);
        child.join();
        assert_eq!((cache.get(KEY), cache.stats().outdated), (None, 1), "{what} was purged");
    }
}

fn stale_while_one_renders() {
    let (cache, counts) = (cache(), Counts::new());
    let options = StoreOptions::new().stale(Duration::from_secs(3600)).ttl(Duration::from_secs(3600));
    store_expired(&cache, options.clone());
    let children = (0..PROCESSES).map(|_| {
        spawn(|_| {
            let answer = ask(&cache, &options, |_| {
                counts.rendering.fetch_add(1, Ordering::SeqCst);
                // If the other requests waited for this renderer, the test would not end.
                until(|| load(counts.stale) + load(counts.rendering) == PROCESSES);
                Ok(b"new".to_vec())
            });
            assert_eq!(answer.value, if answer.source == CacheStatus::Stale { b"old" } else { b"new" });
            counts.stale.fetch_add(u64::from(answer.source == CacheStatus::Stale), Ordering::SeqCst);
        })
    });
    children.collect::<Vec<_>>().into_iter().for_each(Child::join);
    assert_eq!((load(counts.rendering), load(counts.stale)), (1, PROCESSES - 1));
    let stats = cache.stats();
    assert_eq!((stats.renders, stats.stale_hits, stats.lease_waits), (1, PROCESSES - 1, 0));
    assert_eq!(ask(&cache, &options, |_| unreachable!()).source, CacheStatus::Fresh);
}

fn stale_if_rendering_fails() {
    let (cache, counts) = (cache(), Counts::new());
    let options = StoreOptions::new().stale_if_error(Duration::from_secs(3600));
    store_expired(&cache, options.clone());
    let children = (0..PROCESSES).map(|_| {
        spawn(|_| {
            let answer = ask(&cache, &options, |_| {
                let first = counts.rendering.fetch_add(1, Ordering::SeqCst) == 0;
                until(|| !first || cache.stats().lease_waits == PROCESSES - 1);
                Err("broken")
            });
            counts.serve(&answer);
        })
    });
    children.collect::<Vec<_>>().into_iter().for_each(Child::join);
    // The processes rendered one after the other. Every rendering failed, so every process fell back to the stale page.
    assert_eq!((load(counts.rendering), load(counts.stale), load(counts.served)), (PROCESSES, PROCESSES, 0));
    assert_eq!(cache.stats().stale_hits, PROCESSES);
}

// ---- forks ----

fn a_fork_has_its_own_watching_thread() {
    let (cache, counts) = (cache(), Counts::new());
    let mut renderer = spawn(|mut pipe| {
        ask(&cache, &StoreOptions::new(), |_| {
            say_ready(&mut pipe);
            until(|| load(counts.go) == 1);
            Ok(unique_page())
        });
    });
    renderer.await_ready();
    let parent = spawn(|_| {
        std::thread::scope(|scope| {
            scope.spawn(|| wait_in_five(&cache, &counts, false));
            until(|| cache.stats().lease_waits == 5);
            // The watching thread is running, and may hold its lock at any time.
            for _ in 0..50 {
                spawn(|_| wait_in_five_with_a_patience_of_a_millisecond(&cache)).join();
            }
            counts.go.store(1, Ordering::SeqCst);
        });
    });
    parent.join();
    renderer.join();
    assert_eq!((load(counts.rendering), load(counts.served)), (0, 5));
}

fn wait_in_five_with_a_patience_of_a_millisecond(cache: &Cache) {
    run(async {
        let options = StoreOptions::new().patience(Duration::from_millis(1));
        let ask = || async {
            let answer = cache.get_or_render_async(KEY, &options, async |_| Err::<Vec<u8>, _>("impatient")).await;
            assert_eq!(answer, Err("impatient"));
        };
        tokio::join!(ask(), ask(), ask(), ask(), ask());
    });
}

fn a_fork_does_not_release_the_leases_of_its_parent() {
    let cache = cache();
    let options = StoreOptions::new().patience(Duration::from_millis(1));
    let never = cache.get_or_render_async(KEY, &options, |_| std::future::pending::<Result<Vec<u8>, Failure>>());
    let mut never = Some(Box::pin(never));
    let begun = never.as_mut().map(|never| never.as_mut().poll(&mut Context::from_waker(Waker::noop())));
    assert_eq!(begun, Some(Poll::Pending));
    spawn(|_| drop(never.take())).join();
    assert_eq!(cache.get_or_render(KEY, &options, |_| Err::<Vec<u8>, _>("impatient")), Err("impatient"));
    assert_eq!(cache.stats().lease_waits, 1, "the lease is still held");
    drop(never);
    ask(&cache, &options, |_| Ok(Vec::new()));
    assert_eq!(cache.stats().lease_waits, 1, "the lease has been released");
}
