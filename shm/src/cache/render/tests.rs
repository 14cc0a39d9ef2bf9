use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::*;
use crate::protocols::lease::Claim;
use crate::{Plan, Segment};

const HOUR: Duration = Duration::from_secs(3600);
const LONG_AGO_MS: u64 = 60_000;
/// A lease deadline that no test reaches.
const LONG_MS: u64 = 1_000_000;

fn cache() -> Cache {
    Segment::create(&Plan { cache_bytes: 1 << 20, ..Plan::default() }).unwrap().cache()
}

/// Renders text.
fn text(text: &str) -> Result<Vec<u8>, Infallible> {
    Ok(text.into())
}

fn rendered(text: &str) -> Cached {
    Cached { value: text.into(), source: CacheStatus::Rendered }
}

fn fresh(text: &str) -> Cached {
    Cached { value: text.into(), source: CacheStatus::Fresh }
}

fn stale(text: &str) -> Cached {
    Cached { value: text.into(), source: CacheStatus::Stale }
}

/// Stores a page as of a minute ago, with a time to live of one second.
fn set_long_ago(cache: &Cache, key: &str, options: StoreOptions) {
    let then_ms = cache.segment.now_ms() - LONG_AGO_MS;
    let options = options.ttl(Duration::from_secs(1));
    cache.store(key.as_bytes(), b"old", &options, &Rendering::default(), then_ms).unwrap();
}

fn lease_word(cache: &Cache, key: &str) -> u64 {
    cache.segment.lease_cell(cache.key(key.as_bytes()).hash).unwrap().word.load(Ordering::SeqCst)
}

/// Takes the lease of a key directly. If bits of the hash are flipped (`flipped`), this takes the lease of another key in the same cell.
fn hold(cache: &Cache, key: &str, flipped: u64, deadline_ms: u64) -> u64 {
    let hash = cache.key(key.as_bytes()).hash;
    let (cell, me) = (cache.segment.lease_cell(hash).unwrap(), cache.segment.member().unwrap());
    let now_ms = cache.segment.now_ms();
    match lease::take(&cell.word, hash ^ flipped, me.number, now_ms, now_ms + deadline_ms) {
        Claim::Mine(word) => word,
        other => panic!("{other:?}"),
    }
}

fn let_go(cache: &Cache, key: &str, word: u64) -> bool {
    lease::release(&cache.segment.lease_cell(cache.key(key.as_bytes()).hash).unwrap().word, word)
}

#[test]
fn renders_once_and_serves_it_from_then_on() {
    let cache = cache();
    let options = StoreOptions::new().ttl(HOUR);
    assert_eq!(cache.get_or_render("k", &options, |_| text("new")), Ok(rendered("new")));
    assert_eq!(cache.get_or_render("k", &options, |_| unreachable!()), Ok::<_, Infallible>(fresh("new")));
    assert_eq!(cache.get("k").unwrap(), b"new");
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.stale_hits, stats.renders, stats.lease_waits), (2, 1, 0, 1, 0));
    assert_eq!(lease_word(&cache, "k"), 0);
}

#[test]
fn without_a_cache_it_just_renders() {
    let cache = Segment::create(&Plan { rows: 1, ..Plan::default() }).unwrap().cache();
    for n in ["1", "2"] {
        let page = cache.get_or_render("k", &StoreOptions::new(), |recorder| {
            recorder.get_or_render("inner", &StoreOptions::new(), |_| text(n)).map(|answer| answer.value)
        });
        assert_eq!(page, Ok(rendered(n)));
    }
}

#[test]
fn an_error_and_a_panic_give_the_lease_back() {
    let cache = cache();
    let turn = || cache.segment.lease_cell(cache.key(b"k").hash).unwrap().turn.load(Ordering::SeqCst);
    assert_eq!(cache.get_or_render("k", &StoreOptions::new(), |_| Err::<Vec<u8>, _>("broken")), Err("broken"));
    assert_eq!((lease_word(&cache, "k"), turn()), (0, 1));
    let panics =
        || cache.get_or_render("k", &StoreOptions::new(), |_| -> Result<Vec<u8>, Infallible> { panic!("broken") });
    catch_unwind(AssertUnwindSafe(panics)).unwrap_err();
    assert_eq!((lease_word(&cache, "k"), turn()), (0, 2));
    assert!(!Here::renders(cache.key(b"k").hash));
    assert_eq!(cache.get_or_render("k", &StoreOptions::new(), |_| text("new")), Ok(rendered("new")));
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.renders), (0, 2, 1));
}

#[test]
fn who_gets_the_lease_looks_again() {
    let cache = cache();
    let options = StoreOptions::new();
    let mut request = Request::new(&cache, b"k", &options, None);
    let cell = cache.segment.lease_cell(request.key.hash).unwrap();
    let now_ms = cache.segment.now_ms();
    set_long_ago(&cache, "k", StoreOptions::new().stale(HOUR));
    let old = request.look::<Vec<u8>>(now_ms);
    assert!(old.is_some());
    assert!(matches!(request.try_for_lease(cell, 0, now_ms, old), Step::Render(Some(_))));
    // Another caller stored the page between the lookup and the lease.
    let old = request.look::<Vec<u8>>(now_ms);
    cache.set("k", "new", &options).unwrap();
    let step = request.try_for_lease(cell, 0, now_ms, old);
    assert!(matches!(step, Step::Serve(page) if page.value == b"new"));
    assert_eq!(lease_word(&cache, "k"), 0);
}

#[test]
fn a_stale_page_is_served_while_one_renders() {
    let cache = cache();
    let options = StoreOptions::new().stale(HOUR).stale_if_error(HOUR);
    set_long_ago(&cache, "k", options.clone());
    let answer = cache.get_or_render("k", &options, |_| {
        for _ in 0..3 {
            assert_eq!(cache.get_or_render("k", &options, |_| unreachable!()), Ok::<_, Infallible>(stale("old")));
        }
        text("new")
    });
    assert_eq!(answer, Ok(rendered("new")));
    assert_eq!(cache.get_or_render("k", &options, |_| unreachable!()), Ok::<_, Infallible>(fresh("new")));
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.stale_hits, stats.renders, stats.lease_waits), (1, 1, 3, 1, 0));
}

#[test]
fn a_page_may_be_served_if_rendering_fails() {
    let cache = cache();
    for (options, expected) in [
        (StoreOptions::new().stale_if_error(HOUR), Ok(stale("old"))),
        (StoreOptions::new().stale(HOUR), Ok(stale("old"))),
        (StoreOptions::new().stale_if_error(Duration::from_secs(20)), Err("broken")),
        (StoreOptions::new(), Err("broken")),
    ] {
        set_long_ago(&cache, "k", options.clone());
        assert_eq!(cache.get_or_render("k", &options, |_| Err("broken")), expected);
    }
    set_long_ago(&cache, "k", StoreOptions::new().stale_if_error(HOUR));
    cache.purge("k");
    assert_eq!(
        cache.get_or_render("k", &StoreOptions::new(), |_| Err::<Vec<u8>, _>("broken")),
        Err("broken"),
        "but not once purged"
    );
    assert_eq!(cache.stats().stale_hits, 2);
}

#[test]
fn what_is_purged_while_it_is_rendered_is_returned_but_not_stored() {
    let cache = cache();
    let purges: [fn(&Cache); 5] = [
        |cache| assert!(!cache.purge("k")),
        |cache| cache.purge_tag("tag"),
        |cache| assert!(matches!(cache.purge("fragment"), true | false)),
        |cache| cache.purge_tag("deep"),
        Cache::clear,
    ];
    for purge in purges {
        for early in [true, false] {
            let answer = cache.get_or_render("k", &StoreOptions::new().tags(["tag"]), |recorder| {
                let fragment = |_| text("new");
                if early {
                    recorder.get_or_render("fragment", &StoreOptions::new().tags(["deep"]), fragment)?;
                }
                purge(&cache);
                let fragment = recorder.get_or_render("fragment", &StoreOptions::new().tags(["deep"]), fragment)?;
                Ok::<_, Infallible>(fragment.value)
            });
            assert_eq!(answer, Ok(rendered("new")));
            assert_eq!(cache.get("k"), None);
        }
    }
    let answer = cache.get_or_render("k", &StoreOptions::new(), |_| {
        cache.purge_tag("another");
        text("new")
    });
    assert_eq!((answer, cache.get("k")), (Ok(rendered("new")), Some(b"new".to_vec())));
}

#[test]
fn a_page_that_renders_itself_does_not_wait_for_itself() {
    let cache = cache();
    let options = StoreOptions::new();
    let answer = cache.get_or_render("k", &options, |recorder| {
        // The fragment is requested in the same thread, and in another thread that received the recorder.
        assert_eq!(cache.get_or_render("k", &options, |_| text("inner")), Ok(rendered("inner")));
        cache.purge("k");
        std::thread::scope(|scope| {
            let other = scope.spawn(|| recorder.get_or_render("k", &options, |_| text("inner")));
            assert_eq!(other.join().unwrap(), Ok(rendered("inner")));
        });
        cache.purge("k");
        let between = recorder.get_or_render("between", &options, |recorder| {
            std::thread::scope(|scope| {
                let other = scope.spawn(|| recorder.get_or_render("k", &options, |_| text("outer")));
                other.join().unwrap().map(|answer| answer.value)
            })
        });
        between.map(|answer| answer.value)
    });
    assert_eq!((answer, cache.stats().lease_waits), (Ok(rendered("outer")), 0));
}

#[test]
fn where_the_cell_is_taken_for_another_key_there_is_no_lease() {
    let cache = cache();
    let word = hold(&cache, "k", 1 << 63, LONG_MS);
    assert_eq!(cache.get_or_render("k", &StoreOptions::new(), |_| text("new")), Ok(rendered("new")));
    assert_eq!((cache.get("k").unwrap(), lease_word(&cache, "k")), (b"new".to_vec(), word));
    set_long_ago(&cache, "k", StoreOptions::new().stale(HOUR));
    let answer = cache.get_or_render("k", &StoreOptions::new(), |_| unreachable!());
    assert_eq!(answer, Ok::<_, Infallible>(stale("old")), "it is served stale until the cell is free");
    assert_eq!(cache.stats().lease_waits, 0);
}

#[test]
fn patience_has_an_end() {
    let cache = cache();
    let word = hold(&cache, "k", 0, LONG_MS);
    let options = StoreOptions::new().patience(Duration::from_millis(30));
    assert_eq!(cache.get_or_render("k", &options, |_| text("new")), Ok(rendered("new")));
    assert_eq!((cache.get("k").unwrap(), lease_word(&cache, "k")), (b"new".to_vec(), word));
    cache.purge("k");
    assert_eq!(run(cache.get_or_render_async("k", &options, async |_| text("new"))), Ok(rendered("new")));
    assert_eq!(cache.stats().lease_waits, 2);
}

#[test]
fn after_its_deadline_a_lease_is_taken_over() {
    let cache = cache();
    for asynchronous in [false, true] {
        cache.purge("k");
        let word = hold(&cache, "k", 0, 30);
        let answer = if asynchronous {
            run(cache.get_or_render_async("k", &StoreOptions::new(), async |_| text("new")))
        } else {
            cache.get_or_render("k", &StoreOptions::new(), |_| text("new"))
        };
        assert_eq!((answer, lease_word(&cache, "k")), (Ok(rendered("new")), 0));
        assert!(!let_go(&cache, "k", word));
    }
    assert_eq!(cache.stats().lease_waits, 2);
}

#[test]
fn one_who_is_too_late_does_not_store() {
    let cache = cache();
    let options = StoreOptions::new().deadline(Duration::from_millis(5));
    let answer = cache.get_or_render("k", &options, |_| {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| cache.get_or_render("k", &StoreOptions::new(), |_| text("in time")));
            assert_eq!(other.join().unwrap(), Ok(rendered("in time")));
        });
        text("too late")
    });
    assert_eq!((answer, cache.get("k").unwrap()), (Ok(rendered("too late")), b"in time".to_vec()));
    // The deadline has passed, but no other caller has started rendering, so the page is stored.
    let answer = cache.get_or_render("other", &options, |_| {
        let began_ms = cache.segment.now_ms();
        while cache.segment.now_ms() < began_ms + 10 {
            std::thread::yield_now();
        }
        text("late")
    });
    assert_eq!((answer, cache.get("other").unwrap()), (Ok(rendered("late")), b"late".to_vec()));
}

/// Makes two calls. One of them renders, and finishes when the other is waiting or has returned without waiting. Returns both results.
fn two(cache: &Cache, render: impl FnOnce(Recorder) -> Vec<u8>) -> (Cached, Cached) {
    std::thread::scope(|scope| {
        let mut other = None;
        let Ok(answer) = cache.get_or_render("k", &StoreOptions::new(), |recorder| {
            let page = render(recorder);
            let thread = scope.spawn(|| cache.get_or_render("k", &StoreOptions::new(), |_| text("other")));
            while cache.stats().lease_waits == 0 && !thread.is_finished() {
                std::thread::yield_now();
            }
            other = Some(thread);
            Ok::<_, Infallible>(page)
        });
        let Ok(other) = other.unwrap().join().unwrap();
        (answer, other)
    })
}

#[test]
fn who_waited_gets_the_page_also_if_its_time_is_over() {
    let cache = cache();
    let answers = two(&cache, |recorder| {
        recorder.borrow(cache.key(b"fragment"), [], 1);
        b"short".to_vec()
    });
    assert_eq!(answers, (rendered("short"), fresh("short")));
    assert_eq!((cache.get("k"), cache.stats().lease_waits), (None, 1));
}

#[test]
fn nobody_waits_for_a_page_that_is_too_large() {
    let cache = cache();
    let large = vec![0; 1 << 20];
    let answer = cache.get_or_render("k", &StoreOptions::new(), |_| Ok::<_, Infallible>(large.clone()));
    assert_eq!(answer, Ok(Cached { value: large.clone(), source: CacheStatus::Rendered }));
    let answers = two(&cache, |_| large);
    assert_eq!((answers.1, cache.stats().lease_waits), (rendered("other"), 0));
}

#[test]
fn a_page_is_rendered_early_by_one() {
    let cache = cache();
    let options = StoreOptions::new().ttl(HOUR);
    let early = options.clone().early(1e12);
    let get = |page| cache.get_or_render("k", &early, |_| text(page));
    assert_eq!(get("1"), Ok(rendered("1")));
    let answer = cache.get_or_render("k", &early, |_| {
        assert_eq!(get("3"), Ok(fresh("1")), "the others get the page as it is");
        text("2")
    });
    assert_eq!(answer, Ok(rendered("2")));
    assert_eq!(cache.get_or_render("k", &early, |_| Err("broken")), Ok(fresh("2")), "it is not yet too late");
    let late = options.early(1e-9);
    assert_eq!(cache.get_or_render("k", &late, |_| unreachable!()), Ok::<_, Infallible>(fresh("2")));
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.renders, stats.lease_waits), (3, 2, 2, 0));
}

#[test]
fn fragments_lend_however_they_come() {
    let cache = cache();
    let options = StoreOptions::new().tags(["deep"]).ttl(HOUR).stale(HOUR);
    let page = || {
        cache.get_or_render("k", &StoreOptions::new(), |recorder| {
            recorder.get_or_render("inner", &options, |_| text("new")).map(|answer| answer.value)
        })
    };
    let ends_ms = |key: &str| {
        let (page, _) = cache.lookup::<Vec<u8>>(cache.key(key.as_bytes()), 0, Tags::Unwanted, |_, _| true);
        page.unwrap().times.expires_ms
    };
    // The page is rendered on the first call and fresh on the second.
    for purge_inner in [true, false] {
        assert_eq!(page(), Ok(rendered("new")));
        assert!(ends_ms("k").abs_diff(ends_ms("inner")) < 1000);
        cache.purge_tag("deep");
        assert_eq!(cache.get("k"), None);
        if purge_inner {
            cache.get_or_render("inner", &options, |_| text("new")).unwrap();
        }
    }
    // A page that includes a stale fragment expires immediately.
    set_long_ago(&cache, "inner", options.clone());
    let word = hold(&cache, "inner", 0, LONG_MS);
    assert_eq!(page(), Ok(rendered("old")));
    assert_eq!((ends_ms("k"), cache.get("k")), (ends_ms("inner"), None));
    assert!(let_go(&cache, "inner", word));
}

// ---- Asynchronous calls. ----

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

#[test]
fn futures_wait_for_each_other() {
    let cache = cache();
    let ask = |cache: Cache| async move {
        let render = |_| async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            text("new")
        };
        cache.get_or_render_async("k", &StoreOptions::new(), render).await.unwrap()
    };
    let answers = run(async {
        // `tokio::spawn` requires the futures to be `Send`.
        let tasks: Vec<_> = (0..100).map(|_| tokio::spawn(ask(cache.clone()))).collect();
        let mut answers = Vec::new();
        for task in tasks {
            answers.push(task.await.unwrap());
        }
        answers
    });
    assert_eq!(answers.iter().filter(|answer| **answer == rendered("new")).count(), 1);
    assert_eq!(answers.iter().filter(|answer| **answer == fresh("new")).count(), 99);
    let stats = cache.stats();
    assert_eq!((stats.renders, stats.lease_waits, stats.hits, stats.misses), (1, 99, 99, 1));
}

#[test]
fn a_future_that_is_dropped_gives_its_lease_back() {
    let cache = cache();
    let options = StoreOptions::new();
    run(async {
        let never = |_| std::future::pending::<Result<Vec<u8>, Infallible>>();
        let never = cache.get_or_render_async("k", &options, never);
        tokio::time::timeout(Duration::from_millis(5), never).await.unwrap_err();
    });
    assert_eq!(lease_word(&cache, "k"), 0);
    assert!(!Here::renders(cache.key(b"k").hash));
}

#[test]
fn a_future_that_renders_itself_does_not_wait_for_itself() {
    let cache = cache();
    let options = StoreOptions::new();
    let answer = run(cache.get_or_render_async("k", &options, async |recorder: Recorder| {
        tokio::task::yield_now().await;
        let inner = cache.get_or_render_async("k", &options, async |_| text("inner")).await;
        assert_eq!(inner, Ok(rendered("inner")));
        cache.purge("k");
        recorder.get_or_render_async("k", &options, async |_| text("outer")).await.map(|answer| answer.value)
    }));
    assert_eq!((answer, cache.stats().lease_waits), (Ok(rendered("outer")), 0));
}
