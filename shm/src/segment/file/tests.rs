use std::path::PathBuf;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use super::*;
use crate::StoreOptions;

const PLAN: Plan = Plan { cache_bytes: 512 * 1024, rows: 2, max_entry: 0, events_bytes: 64 * 1024 };

/// Locked for writing by a test that forks. Until the child exits, it has a copy of each descriptor of this process, and keeps files locked
/// that other tests have just closed.
static FORKS: RwLock<()> = RwLock::new(());

pub(in crate::segment) fn nobody_forks() -> RwLockReadGuard<'static, ()> {
    FORKS.read().unwrap_or_else(PoisonError::into_inner)
}

/// A path for a file, and a guard that prevents tests from forking.
struct Scratch(
    PathBuf,
    #[expect(dead_code, reason = "released when the test ends")] Option<RwLockReadGuard<'static, ()>>,
);

impl Scratch {
    fn new(name: &str) -> Scratch {
        Scratch(Self::path(name), Some(nobody_forks()))
    }

    fn path(name: &str) -> PathBuf {
        let name = format!("forkyard-{name}-{}-{}", std::process::id(), fastrand::u64(..));
        std::env::temp_dir().join(name)
    }

    fn open(&self) -> (Segment, Found) {
        Segment::open(&self.0, &PLAN).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn header(segment: &Segment) -> &SegmentHead {
    segment.inner.header().unwrap()
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let refused = Segment::open(Path::new("/dev/null"), &PLAN).unwrap_err();
    assert!(refused.to_string().contains("it is not a regular file"), "{refused}");
}

#[test]
fn a_closed_file_is_warm_and_its_clock_goes_on() {
    let scratch = Scratch::new("closed");
    let (segment, found) = scratch.open();
    assert_eq!(found, Found::Nothing);
    let cache = segment.cache();
    cache.set("for ever", "a", &StoreOptions::new()).unwrap();
    cache.set("a minute", "b", &StoreOptions::new().ttl(Duration::from_secs(60))).unwrap();
    cache.set("tagged", "c", &StoreOptions::new().tags(["t"])).unwrap();
    cache.purge_tag("t");
    let before = segment.inner.now_ms();
    drop(cache);
    segment.close().unwrap();

    let (segment, found) = scratch.open();
    assert_eq!(found, Found::Warm);
    assert!(segment.inner.now_ms() >= before);
    let cache = segment.cache();
    let found = |key: &str| cache.get(key).is_some();
    assert_eq!(["for ever", "a minute", "tagged"].map(found), [true, true, false]);
    cache.audit().unwrap();
    drop(cache);
    segment.close().unwrap();

    // Reopened two minutes later, after a reboot.
    let (segment, _) = scratch.open();
    header(&segment).boot_id[0].fetch_xor(1, Ordering::Relaxed);
    let cache = segment.cache();
    segment.clone().close().unwrap();
    header(&segment).clean_real_ms.fetch_sub(120_000, Ordering::Relaxed);
    drop((segment, cache));
    let (segment, found) = scratch.open();
    let cache = segment.cache();
    assert_eq!((found, cache.get("a minute"), cache.get("for ever").is_some()), (Found::Warm, None, true));
}

#[test]
fn a_file_that_was_not_closed_is_warm_unless_the_machine_was_started_since() {
    let scratch = Scratch::new("killed");
    let (segment, _) = scratch.open();
    segment.cache().set("k", "v", &StoreOptions::new()).unwrap();
    // The state left by a process that is killed while it holds a lock.
    let shard: &crate::memory::layout::ShardHead = segment.inner.map.at(segment.inner.geometry.shards_at).unwrap();
    shard.lock.store(5, Ordering::Relaxed);
    drop(segment);
    let (segment, found) = scratch.open();
    assert_eq!((found, segment.cache().get("k")), (Found::Warm, Some(b"v".to_vec())));
    assert_eq!((segment.cache().stats().lock_recoveries, segment.cache().audit()), (1, Ok(())));

    header(&segment).boot_id[0].fetch_xor(1, Ordering::Relaxed);
    drop(segment);
    let (segment, found) = scratch.open();
    assert_eq!(found, Found::Dropped { why: "the machine went down while it was in use" });
    assert_eq!(segment.cache().get("k"), None);
}

#[test]
fn a_child_that_ends_does_not_give_the_file_away() {
    let scratch = Scratch::new("locked");
    let (segment, _) = scratch.open();
    let inherited = segment.inner.file.as_ref().unwrap().try_clone().unwrap();
    drop(segment);
    let other = OpenOptions::new().read(true).open(&scratch.0).unwrap();
    assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)), "one who inherited it still uses it");
    drop(inherited);
    other.try_lock().unwrap();
}

#[test]
fn who_has_the_descriptor_without_the_lock_uses_the_file_and_does_not_keep_it() {
    let scratch = Scratch::new("passed");
    let (segment, _) = scratch.open();
    let (passed, never_used) = (segment.fd_without_lock().unwrap(), segment.fd_without_lock().unwrap());
    let attached = Segment::attach(passed).unwrap();
    segment.cache().set("k", "v", &StoreOptions::new()).unwrap();
    assert_eq!(attached.cache().get("k"), Some(b"v".to_vec()));
    let refused = segment.close().unwrap_err();
    assert!(refused.to_string().contains("another process still uses it"), "{refused}");

    let (segment, found) = scratch.open();
    assert_eq!((found, segment.cache().get("k")), (Found::Warm, Some(b"v".to_vec())), "with who has attached it");
    drop(attached);
    segment.close().unwrap();
    let (segment, found) = scratch.open();
    assert_eq!(found, Found::Warm, "for itself alone");
    drop((segment, never_used));
}

#[test]
fn who_attaches_a_closed_file_is_refused_and_changes_nothing() {
    let scratch = Scratch::new("closed-attach");
    let (segment, _) = scratch.open();
    segment.cache().set("k", "v", &StoreOptions::new()).unwrap();
    let left = segment.fd_without_lock().unwrap();
    segment.close().unwrap();
    let state = || (std::fs::read(&scratch.0).unwrap(), scratch.0.metadata().unwrap().modified().unwrap());
    let before = state();
    let attached = Segment::attach(left.try_clone().unwrap());
    let refused = attached.map(|segment| segment.cache().get("k")).unwrap_err();
    assert!(refused.to_string().contains("closed the file"), "{refused}");
    assert!(state() == before, "it is as it was");

    // The process does not prevent the next server from opening the file, and can join when that server has opened it.
    let (segment, found) = scratch.open();
    assert_eq!(found, Found::Warm);
    let attached = Segment::attach(left).unwrap();
    assert_eq!(attached.cache().get("k"), Some(b"v".to_vec()));
    drop((segment, attached));
}

#[test]
fn what_contradicts_itself_or_is_not_ours_is_dropped() {
    let scratch = Scratch::new("odd");
    let (segment, _) = scratch.open();
    segment.cache().set("k", "v", &StoreOptions::new()).unwrap();
    let shard: &crate::memory::layout::ShardHead = segment.inner.map.at(segment.inner.geometry.shards_at).unwrap();
    shard.books[0].store(77, Ordering::Relaxed);
    drop(segment);
    assert_eq!(scratch.open().1, Found::Dropped { why: "it was not closed, and contradicts itself" });
    std::fs::write(&scratch.0, "something else").unwrap();
    let refused = Segment::open(&scratch.0, &PLAN).unwrap_err();
    assert!(refused.to_string().contains("it holds something else"), "{refused}");
    assert_eq!(std::fs::read(&scratch.0).unwrap(), b"something else");
    std::fs::write(&scratch.0, [0; 5000]).unwrap();
    assert_eq!(scratch.open().1, Found::Dropped { why: "it does not start like a Forkyard segment" });
    std::fs::write(&scratch.0, [0; 5]).unwrap();
    assert_eq!(scratch.open().1, Found::Dropped { why: "it is too short" });
    OpenOptions::new().write(true).open(&scratch.0).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(scratch.open().1, Found::Dropped { why: "its size is not what its header says" });
}

#[test]
fn a_file_with_more_rows_is_warm_and_any_other_misfit_is_named() {
    let scratch = Scratch::new("plan");
    let (segment, _) = scratch.open();
    segment.cache().set("k", "v", &StoreOptions::new()).unwrap();
    segment.close().unwrap();
    let (segment, found) = Segment::open(&scratch.0, &Plan { rows: 1, ..PLAN }).unwrap();
    assert_eq!((found, segment.cache().get("k")), (Found::Warm, Some(b"v".to_vec())));
    drop(segment);
    for (plan, why) in [
        (Plan { rows: 40, ..PLAN }, "its scoreboard has too few rows for so many processes"),
        (Plan { cache_bytes: 1 << 20, ..PLAN }, "its page cache has another size"),
        (Plan { events_bytes: 0, ..PLAN }, "its page cache has another size"),
        (Plan { events_bytes: 0, max_entry: 4096, ..PLAN }, "its largest page has another size"),
        (Plan { max_entry: 4096, ..PLAN }, "its event log has another size"),
    ] {
        let (_segment, found) = Segment::open(&scratch.0, &plan).unwrap();
        assert_eq!(found, Found::Dropped { why });
    }
}

/// Uses memory whose file was truncated, through every function. All calls must return.
fn use_what_is_lost(segment: &Segment) {
    let (cache, events) = (segment.cache(), segment.events());
    assert_eq!(cache.get("k"), None);
    assert_eq!(cache.pin("k").map(|_| ()), None);
    assert!(cache.set("k", "new", &StoreOptions::new()).is_err());
    for _ in 0..2 {
        let rendered = cache.get_or_render("k", &StoreOptions::new(), |_| Ok::<_, ()>(b"rendered".to_vec()));
        let rendered = rendered.unwrap();
        assert!(rendered.value == b"rendered" && rendered.source == crate::CacheStatus::Rendered);
    }
    cache.purge("k");
    cache.purge_tag("t");
    cache.purge_prefix("k");
    cache.clear();
    cache.sweep();
    assert_eq!(events.publish("a", "", b"b"), Err(crate::PublishError::Lost));
    assert_eq!((events.last_id("a"), events.since("a", 0, 1), events.topics()), (0, crate::Since::default(), vec![]));
    events.wait(events.sequence(), Duration::from_millis(1));
    assert_eq!(events.tail().next(), crate::Tailed::CaughtUp);
    drop(segment.scoreboard().claim(0, 77, 1).unwrap().begin("GET", "/"));
    segment.quarantine().set([]);
    assert_eq!(segment.damage(), Some("its file was truncated"));
}

#[test]
fn a_file_that_is_truncated_is_damage_and_ends_nobody() {
    for (len, then) in [(0, None), (4096, None), (300 << 10, None), (0, Some(1)), (PLAN.cache_bytes, None)] {
        let scratch = Scratch::new("truncated");
        let (segment, _) = scratch.open();
        let whole = segment.len();
        segment.cache().set("k", "old", &StoreOptions::new()).unwrap();
        segment.events().publish("a", "", b"old").unwrap();
        let file = OpenOptions::new().write(true).open(&scratch.0).unwrap();
        file.set_len(len).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                // The calls are concurrent, because each may be the first to access the lost part.
                scope.spawn(|| {
                    (0..segment.len() / 8).for_each(|word| {
                        touch(&segment, word * 8);
                    })
                });
            }
        });
        // The lost part was accessed, so the memory stays lost.
        if let Some(1) = then {
            file.set_len(whole).unwrap();
        }
        use_what_is_lost(&segment);
        let refused = segment.close().unwrap_err();
        assert!(refused.to_string().contains("its file was truncated"), "{refused}");
        assert!(matches!(scratch.open().1, Found::Dropped { .. } | Found::Nothing), "{len}");
    }
}

#[test]
fn a_file_that_is_too_short_is_damage_before_anybody_touches_what_is_lost() {
    let scratch = Scratch::new("truncated-end");
    let (segment, _) = scratch.open();
    let file = OpenOptions::new().write(true).open(&scratch.0).unwrap();
    file.set_len(segment.len() + 1).unwrap();
    assert_eq!(segment.damage(), None, "what is added is in nobody's way");
    file.set_len(segment.len() - 1).unwrap();
    assert_eq!(segment.damage(), Some("its file was truncated"));
    use_what_is_lost(&segment);
}

fn touch(segment: &Segment, at: u64) -> u64 {
    segment.inner.map.at::<AtomicU64>(at).unwrap().load(Ordering::Relaxed)
}

#[test]
fn who_has_attached_a_file_that_is_truncated_or_has_holes_lives_on() {
    let scratch = Scratch::new("truncated-attach");
    let (segment, _) = scratch.open();
    let attached = Segment::attach(segment.fd_without_lock().unwrap()).unwrap();
    segment.cache().set("k", "old", &StoreOptions::new()).unwrap();
    let file = OpenOptions::new().write(true).open(&scratch.0).unwrap();
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, hole, 0, i64::try_from(segment.len()).unwrap()).unwrap();
    for segment in [&segment, &attached] {
        assert_eq!(segment.cache().get("k"), None);
        assert_eq!(segment.damage(), Some("it does not start like a Forkyard segment"));
    }
    file.set_len(0).unwrap();
    touch(&attached, 0);
    use_what_is_lost(&attached);
    assert_eq!(segment.damage(), Some("its file was truncated"));
}

#[test]
fn a_child_and_its_parent_learn_from_each_other_that_pages_are_lost() {
    let _forks = FORKS.write().unwrap_or_else(PoisonError::into_inner);
    let scratch = Scratch(Scratch::path("truncated-fork"), None);
    let (segment, _) = scratch.open();
    OpenOptions::new().write(true).open(&scratch.0).unwrap().set_len(0).unwrap();
    assert!(!segment.inner.map.is_lost());
    // SAFETY: the child depends on no state of other threads: it reads a word, and exits.
    #[expect(unsafe_code, reason = "fork")]
    let child = match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Parent { child } => child,
        nix::unistd::ForkResult::Child => {
            touch(&segment, 0);
            // SAFETY: terminates the child, which must not use the locks of the test's threads.
            unsafe { libc::_exit(7) }
        }
    };
    let ended = nix::sys::wait::waitpid(child, None).unwrap();
    assert_eq!(ended, nix::sys::wait::WaitStatus::Exited(child, 7));
    assert!(segment.inner.map.is_lost(), "though this process has touched nothing");
}
