use super::*;
use crate::{Plan, Segment};

fn log_of(events_bytes: u64) -> Events {
    Segment::create(&Plan { rows: 1, events_bytes, ..Plan::default() }).unwrap().events()
}

fn small() -> Events {
    log_of(64 * 1024)
}

fn ids(events: &[Event]) -> Vec<u64> {
    events.iter().map(|event| event.id).collect()
}

#[test]
fn what_is_published_is_read_in_order_by_all() {
    let segment = Segment::create(&Plan { rows: 1, events_bytes: 1 << 20, ..Plan::default() }).unwrap();
    let (ours, theirs) =
        (segment.events(), Segment::attach(segment.fd().try_clone_to_owned().unwrap()).unwrap().events());
    assert!(ours.epoch() != 0 && ours.epoch() == theirs.epoch() && !ours.is_none());
    let mut tail = theirs.tail();
    assert_eq!((tail.next(), theirs.last_id("a")), (Tailed::CaughtUp, 0));
    for (topic, id) in [("a", 1), ("b", 1), ("a", 2), ("ä b", 1), ("a", 3)] {
        assert_eq!(ours.publish(topic, "kind", format!("{topic} {id}").as_bytes()), Ok(id));
    }
    for (topic, id) in [("a", 1), ("b", 1), ("a", 2), ("ä b", 1), ("a", 3)] {
        let Tailed::Event(event) = tail.next() else { panic!("there is one") };
        assert_eq!((&*event.topic, event.id, &*event.name), (topic, id, "kind"));
        assert_eq!(event.data, format!("{topic} {id}").as_bytes());
    }
    assert_eq!(tail.next(), Tailed::CaughtUp);
    let since = theirs.since("a", 1, 10);
    assert_eq!((ids(&since.events), since.missed), (vec![2, 3], 0));
    assert_eq!(ids(&theirs.since("a", 0, 2).events), [1, 2]);
    assert_eq!(theirs.since("a", 3, 10), Since::default());
    assert_eq!(theirs.since("nothing", 0, 10), Since::default());
    assert_eq!((theirs.last_id("a"), theirs.last_id("nothing")), (3, 0));
    let mut topics = theirs.topics();
    topics.sort();
    assert_eq!(topics, [("a".to_owned(), 3), ("b".to_owned(), 1), ("ä b".to_owned(), 1)]);
    theirs.audit().unwrap();
}

#[test]
fn what_cannot_be_published_is_refused_and_changes_nothing() {
    let events = small();
    let long = "x".repeat(129);
    for topic in ["", "a\nb", "\0", &long] {
        assert_eq!(events.publish(topic, "", b""), Err(PublishError::BadTopic), "{topic:?}");
    }
    let most = usize::try_from(events.max_event()).unwrap();
    let too_long = vec![0; most + 1];
    assert_eq!(events.publish("a", "", &too_long), Err(PublishError::TooLong { most: events.max_event() }));
    assert_eq!(events.publish("a", "n", &too_long[..most]), Err(PublishError::TooLong { most: events.max_event() }));
    assert_eq!(events.stats().published, 0);
    assert_eq!(events.publish(&long[..128], "", &too_long[..most]), Ok(1));
    assert_eq!(events.since(&long[..128], 0, 1).events[0].data.len(), most);

    let none = Segment::create(&Plan { rows: 1, ..Plan::default() }).unwrap().events();
    assert!(none.is_none());
    assert_eq!(none.publish("a", "", b""), Err(PublishError::Off));
    assert_eq!((none.tail().next(), none.last_id("a"), none.epoch()), (Tailed::CaughtUp, 0, 0));
    none.audit().unwrap();
}

#[test]
fn the_oldest_events_are_evicted_and_a_reader_that_fell_behind_is_notified() {
    let events = small();
    let mut tail = events.tail();
    let mut random = fastrand::Rng::with_seed(1);
    for id in 1..=20_000_u64 {
        let data = vec![id.to_le_bytes()[0]; random.usize(..2000)];
        assert_eq!(events.publish("a", "", &data), Ok(id));
        if id % 512 == 0 {
            events.audit().unwrap();
        }
    }
    let stats = events.stats();
    assert!(stats.published == 20_000 && stats.evicted > 19_000 && stats.restarts == 0, "{stats:?}");
    assert!(stats.used_bytes <= stats.capacity && stats.used_bytes > stats.capacity / 2, "{stats:?}");
    let since = events.since("a", 5, usize::MAX);
    let first = since.events[0].id;
    assert_eq!(since.missed, first - 6);
    assert_eq!(ids(&since.events), (first..=20_000).collect::<Vec<_>>());
    assert_eq!(tail.next(), Tailed::Gap);
    for id in first..=20_000 {
        let Tailed::Event(event) = tail.next() else { panic!("{id}") };
        assert!(event.id == id && event.data.iter().all(|byte| *byte == id.to_le_bytes()[0]));
    }
    assert_eq!(tail.next(), Tailed::CaughtUp);
}

#[test]
fn a_topic_that_comes_back_uses_no_id_twice() {
    let events = small();
    let most = events.stats().most_topics;
    for topic in 0..most {
        events.publish(&format!("t{topic}"), "", b"").unwrap();
    }
    events.publish("t3", "", b"").unwrap();
    assert_eq!(events.publish("one more", "", b""), Ok(2), "t0 makes room, which had one");
    assert_eq!((events.last_id("t0"), events.last_id("never there")), (1, 1), "no topic will have these ids again");
    assert_eq!((ids(&events.since("t1", 0, 10).events), events.since("t1", 0, 10).missed), (vec![1], 0));
    assert_eq!(events.publish("another", "", b""), Ok(2), "t1 makes room");
    assert_eq!(events.since("t1", 0, 10), Since { events: Vec::new(), missed: 1 }, "it may have had one, nobody knows");
    assert_eq!(events.publish("t0", "", b""), Ok(2), "t2 makes room");
    assert_eq!(events.since("t0", 1, 10).missed, 0);
    events.audit().unwrap();
    for topic in 0..most - 4 {
        events.publish(&format!("u{topic}"), "", b"").unwrap();
    }
    assert_eq!(events.last_id("t3"), 2, "it was idle for less long than all others, and is there yet");
    events.publish("v", "", b"").unwrap();
    assert_eq!(events.publish("t3", "", b""), Ok(3), "it had two, and was given up");
    events.audit().unwrap();
}

/// A publisher that keeps creating topics must not replace a topic to which events are still published, and must never be refused.
#[test]
fn a_flood_of_topics_locks_nobody_out() {
    let events = log_of(1 << 20);
    let most = events.stats().most_topics;
    let mut tail = events.tail();
    let mut next = 1;
    for topic in 0..4 * most {
        events.publish(&format!("flood {topic}"), "", b"x").unwrap();
        if topic % (most / 2) == 0 {
            assert_eq!(events.publish("prices", "", b"y"), Ok(next), "its place was never taken");
            next += 1;
        }
    }
    let since = events.since("prices", 0, 1000);
    assert_eq!((ids(&since.events), since.missed), ((1..next).collect(), 0));
    // The events of the replaced topics are still in the log.
    let mut flood = 0;
    loop {
        match tail.next() {
            Tailed::Event(event) => flood += u64::from(&*event.topic != "prices"),
            Tailed::CaughtUp => break,
            Tailed::Gap => panic!("the log has room for all of them"),
        }
    }
    assert_eq!((flood, events.stats().topics), (4 * most, most));
    events.audit().unwrap();
}

#[test]
fn who_sleeps_is_woken_by_the_next_event_or_the_end_of_his_time() {
    let events = small();
    let seen = events.sequence();
    assert_eq!(events.wait(seen, Duration::from_millis(1)), seen);
    events.publish("a", "", b"").unwrap();
    assert_ne!(events.wait(seen, Duration::from_secs(600)), seen, "at once");
    let seen = events.sequence();
    std::thread::scope(|scope| {
        let sleepers: Vec<_> = (0..4).map(|_| scope.spawn(|| events.wait(seen, Duration::from_secs(600)))).collect();
        std::thread::sleep(Duration::from_millis(20)); // so that some of them are usually sleeping
        events.publish("a", "", b"").unwrap();
        for sleeper in sleepers {
            assert_ne!(sleeper.join().unwrap(), seen);
        }
    });
}

#[test]
fn readers_beside_publishers_never_see_anything_torn() {
    let events = small();
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut tail = events.tail(); // before any event could be missed
    std::thread::scope(|scope| {
        let publishers: Vec<_> = (0..2)
            .map(|publisher| {
                let events = &events;
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(publisher);
                    for _ in 0..if cfg!(miri) { 12 } else { 20_000 } {
                        let byte = random.u8(..);
                        let topic = ["x", "y", "z"][random.usize(..3)];
                        let _ = events.publish(topic, &byte.to_string(), &vec![byte; random.usize(..3000)]);
                    }
                })
            })
            .collect();
        let whole = |event: &Event| {
            let byte: u8 = event.name.parse().unwrap();
            assert!(event.data.iter().all(|other| *other == byte));
        };
        let (reading, done) = (&events, &done);
        scope.spawn(move || {
            let mut last = std::collections::HashMap::new();
            let mut fell_behind = false;
            while !done.load(Ordering::Relaxed) {
                match tail.next() {
                    Tailed::Event(event) => {
                        whole(&event);
                        let before = last.insert(event.topic.clone(), event.id).unwrap_or(0);
                        assert!(event.id > before && (fell_behind || event.id == before + 1));
                    }
                    Tailed::Gap => fell_behind = true,
                    Tailed::CaughtUp => std::thread::yield_now(),
                }
            }
        });
        scope.spawn(move || {
            let (mut after, mut place) = (0, 0);
            while !done.load(Ordering::Relaxed) {
                let since = reading.since_at("y", after, 7, &mut place);
                since.events.iter().for_each(whole);
                if let (Some(first), Some(last)) = (since.events.first(), since.events.last()) {
                    assert_eq!(first.id, after + since.missed + 1);
                    assert_eq!(ids(&since.events), (first.id..=last.id).collect::<Vec<_>>());
                    after = last.id;
                }
            }
        });
        for publisher in publishers {
            publisher.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    events.audit().unwrap();
}

#[test]
fn nothing_is_said_to_be_missing_that_is_there() {
    let events = log_of(8 << 20);
    let count = 80_000;
    std::thread::scope(|scope| {
        scope.spawn(|| (1..=count).for_each(|id| assert_eq!(events.publish("a", "", b""), Ok(id))));
        let (mut by_since, mut by_last) = (0, 0);
        while by_since < count {
            let since = events.since("a", by_since, 3);
            assert_eq!(since.missed, 0, "after {by_since}");
            assert_eq!(ids(&since.events), (by_since + 1..).take(since.events.len()).collect::<Vec<_>>());
            by_since += since.events.len() as u64;
            let last = events.last_id("a");
            assert!(last >= by_since && last >= by_last, "{last}, after {by_since} and {by_last}");
            (by_since, by_last) = (last, last); // so that the next check is for what is published now
        }
    });
}

#[test]
fn a_log_that_was_written_over_is_emptied_and_counted() {
    let segment = Segment::create(&Plan { rows: 1, events_bytes: 64 * 1024, ..Plan::default() }).unwrap();
    let events = segment.events();
    let mut random = fastrand::Rng::with_seed(3);
    for round in 0..300 {
        for _ in 0..20 {
            let _ = events.publish("a", "", &vec![1; random.usize(..4000)]);
        }
        let geometry = segment.inner.geometry;
        let most = if round % 2 == 0 { 192 } else { geometry.total - geometry.events_at - 8 };
        // The lock is left unchanged, because random bytes might name a running process as its owner.
        let at = geometry.events_at + 4 + random.u64(..most);
        segment.inner.map.write(at, &random.u64(..).to_le_bytes()[..random.usize(1..=4)]).unwrap();
        let mut tail = events.tail();
        for _ in 0..50 {
            let _ = (events.publish("a", "", &[2; 1000]), events.publish("b", "", &[2; 100]));
            let _ = (tail.next(), events.since("a", random.u64(..100), 5), events.last_id("b"), events.topics());
        }
    }
    for _ in 0..200 {
        let _ = events.publish("c", "", &[0; 1000]);
    }
}

/// A reader that continues from its place must find what a new search returns, whatever was published and evicted since its last call.
#[test]
fn piece_by_piece_it_is_the_same() {
    const TOPICS: [&str; 3] = ["a", "b", "c"];
    for seed in 0..if cfg!(miri) { 2 } else { 200 } {
        let mut random = fastrand::Rng::with_seed(seed);
        let events = small();
        let mut readers: Vec<(&str, u64, u64)> = TOPICS.map(|topic| (topic, 0, 0)).to_vec();
        let mut went_on = 0;
        for _ in 0..if cfg!(miri) { 30 } else { 300 } {
            for _ in 0..random.usize(..8) {
                let data = vec![b'x'; random.usize(..1500)];
                events.publish(random.choice(TOPICS).unwrap(), "", &data).unwrap();
            }
            let (topic, after, place) = &mut readers[random.usize(..TOPICS.len())];
            let most = random.usize(..6);
            let before = *place;
            if random.u8(..20) == 0 {
                *place = random.u64(..) & !63; // a value that `since_at` never set
            }
            let since = events.since_at(topic, *after, most, place);
            assert_eq!(since, events.since(topic, *after, most), "seed {seed}");
            went_on += u32::from(before != 0 && *place > before);
            if since.missed > 0 || random.u8(..4) > 0 {
                *after = since.events.last().map_or(*after + since.missed, |event| event.id);
            }
        }
        assert!(cfg!(miri) || went_on > 0, "seed {seed}");
    }
}
