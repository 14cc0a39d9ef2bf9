use std::path::PathBuf;

use super::*;
use crate::StoreOptions;

const PLAN: Plan = Plan { cache_bytes: 512 * 1024, rows: 2, max_entry: 0, events_bytes: 64 * 1024 };

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let name = format!("forkyard-{name}-{}-{}", std::process::id(), fastrand::u64(..));
        Scratch(std::env::temp_dir().join(name))
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

fn header(segment: &Segment) -> &Header {
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

    // Two minutes later, after another start of the machine.
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
    // As a process leaves it that is killed with a lock held.
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

    // It does not keep the next server from the file, and is let in when that has it.
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
    assert_eq!(scratch.open().1, Found::Dropped { why: "it is of another size" });
    let (other, found) = Segment::open(&scratch.0, &Plan { rows: 40, ..PLAN }).unwrap();
    assert_eq!(found, Found::Dropped { why: "it is of another size" });
    drop(other);
    assert_eq!(scratch.open().1, Found::Dropped { why: "it is of another size" });
}
