use super::*;
use crate::{Plan, Segment};

fn scoreboard(rows: u32) -> Scoreboard {
    Segment::create(&Plan { rows, ..Plan::default() }).unwrap().scoreboard()
}

#[test]
fn tells_what_the_owner_does() {
    let board = scoreboard(4);
    assert_eq!(board.rows(), 4);
    assert!(board.claim(4, 1, 1).is_none());
    assert!(board.read(4).is_none() && board.read(u32::MAX).is_none());
    let empty = board.read(3).unwrap();
    assert_eq!((empty.pid, empty.state, empty.started), (0, State::Empty, Duration::ZERO));

    let row = board.claim(2, 41, 7).unwrap();
    assert_eq!(board.read(2).unwrap().state, State::Starting);
    row.set_state(State::Ready);
    row.connection_opened();
    row.connection_opened();
    row.connection_closed();
    let first = row.begin("GET", "/a?b=1");
    let second = row.clone().begin("POST", "/form");
    let seen = board.read(2).unwrap();
    assert_eq!((seen.pid, seen.generation, seen.state), (41, 7, State::Ready));
    assert_eq!((seen.connections, seen.in_flight, seen.requests), (1, 2, 0));
    let mut texts: Vec<_> = seen.serving.iter().map(|request| request.what.as_str()).collect();
    texts.sort_unstable();
    assert_eq!(texts, ["GET /a?b=1", "POST /form"]);

    drop(first);
    let seen = board.read(2).unwrap();
    assert_eq!((seen.in_flight, seen.requests, row.requests()), (1, 1, 1));
    assert_eq!(seen.serving[0].what, "POST /form");
    drop(second);
    assert_eq!(board.read(2).unwrap().serving, []);
    let mut stream = row.begin("GET", "/events");
    stream.becomes_stream();
    stream.becomes_stream();
    let seen = board.read(2).unwrap();
    assert_eq!((seen.in_flight, seen.streams, seen.serving.len(), seen.requests), (0, 1, 0, 2));
    assert_eq!(row.begin("GET", "/b").cell(), Some(0), "its place is free");
    drop(stream);
    let seen = board.read(2).unwrap();
    assert_eq!((seen.in_flight, seen.streams, seen.requests), (0, 0, 4));
    assert_eq!(board.read(1).unwrap().pid, 0, "the neighbours are untouched");
    assert_eq!(board.read(3).unwrap().pid, 0);
}

#[test]
fn tells_whether_the_event_loop_gets_on_and_whom_a_crash_is_due_to() {
    let board = scoreboard(1);
    let row = board.claim(0, 41, 1).unwrap();
    let (_first, second) = (row.begin("GET", "/first"), row.begin("GET", "/second"));
    let pulse = row.pulse();
    pulse.runs_on(42);
    assert_eq!(board.read(0).unwrap().busy_since_ms, None);
    pulse.work();
    pulse.accuse(second.cell().unwrap());
    let seen = board.read(0).unwrap();
    assert!(seen.busy_since_ms.is_some_and(|since| since <= monotonic_ms()));
    assert_eq!((seen.culprit.as_deref(), seen.loop_thread), (Some("GET /second"), 42));
    row.beat();
    second.beat();
    pulse.sleep();
    let later = board.read(0).unwrap();
    assert_eq!((later.pulse, later.busy_since_ms), (seen.pulse.wrapping_add(2), None));

    let _other = board.claim(0, 43, 2).unwrap();
    pulse.work();
    pulse.accuse(0);
    let seen = board.read(0).unwrap();
    assert_eq!((seen.culprit, seen.busy_since_ms, seen.loop_thread), (None, None, 0), "it is not theirs any more");
}

#[test]
fn the_freest_is_one_that_serves_and_is_not_occupied() {
    let board = scoreboard(4);
    let rows: Vec<_> = (0..3).map(|slot| board.claim(slot, slot, 1).unwrap()).collect();
    assert_eq!(board.freest(3), None, "nobody serves yet");
    rows.iter().for_each(|row| row.set_state(State::Ready));
    rows[0].occupancy().set(true);
    (0..3).for_each(|_| rows[1].connection_opened());
    (0..2).for_each(|_| rows[2].connection_opened());
    let load = |occupied, connections| Some(Load { occupied, connections });
    assert_eq!(board.freest(3), load(false, 2));
    assert_eq!(board.freest(2), load(false, 3));
    rows[2].set_state(State::Draining);
    rows[1].occupancy().set(true);
    assert_eq!(board.freest(3), load(true, 0));
}

#[test]
fn more_requests_than_cells_are_counted_but_not_named() {
    let board = scoreboard(1);
    let row = board.claim(0, 1, 1).unwrap();
    let mut requests: Vec<_> = (0..40).map(|n| row.begin("GET", &format!("/{n}"))).collect();
    let seen = board.read(0).unwrap();
    assert_eq!((seen.in_flight, seen.serving.len()), (40, CELLS));
    requests.drain(..20);
    let again = row.begin("GET", "/again");
    let seen = board.read(0).unwrap();
    assert_eq!((seen.in_flight, seen.requests, seen.serving.len()), (21, 20, 1));
    drop((requests, again));
    let seen = board.read(0).unwrap();
    assert_eq!((seen.in_flight, seen.requests, seen.serving.len()), (0, 41, 0));
}

#[test]
fn text_is_cut_and_made_printable() {
    let board = scoreboard(1);
    let row = board.claim(0, 1, 1).unwrap();
    let long = row.begin("GET", &"/x".repeat(500));
    let what = &board.read(0).unwrap().serving[0].what;
    assert_eq!(what.len(), TEXT_BYTES);
    assert!(what.starts_with("GET /x/x") && what.ends_with("/x"));
    drop(long);
    let _odd = row.begin("GET", "/\x1b[31m\n\u{202e}\0");
    assert_eq!(board.read(0).unwrap().serving[0].what, "GET /?[31m?????");
    let _none = row.begin("", "");
    assert_eq!(board.read(0).unwrap().serving.len(), 2);
}

#[test]
fn a_claim_resets_and_silences_the_former_owner() {
    let board = scoreboard(1);
    let old = board.claim(0, 10, 1).unwrap();
    let request = old.begin("GET", "/old");
    old.connection_opened();
    let new = board.claim(0, 11, 2).unwrap();
    drop(request);
    drop(old.begin("GET", "/late"));
    old.connection_closed();
    old.set_state(State::Draining);
    let seen = board.read(0).unwrap();
    assert_eq!((seen.pid, seen.generation, seen.state), (11, 2, State::Starting));
    assert_eq!((seen.requests, seen.connections, seen.in_flight), (0, 0, 0));
    assert_eq!(seen.serving, []);
    drop(new.begin("GET", "/new"));
    assert_eq!((new.requests(), old.requests()), (1, 0));
}

#[test]
fn nonsense_in_a_row_is_read_without_harm() {
    let board = scoreboard(1);
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..500 {
        let noise: Vec<u8> = (0..ROW_BYTES).map(|_| random.u8(..)).collect();
        board.segment.map.write(board.segment.geometry.rows_at, &noise).unwrap();
        let seen = board.read(0).unwrap();
        let harmless = |text: &str| text.len() <= TEXT_BYTES && text.bytes().all(|b| (32..127).contains(&b));
        assert!(seen.serving.iter().all(|request| harmless(&request.what)), "seed {seed}");
        assert!(seen.serving.len() <= CELLS);
        assert_eq!(seen.state, State::Empty, "seed {seed}");
    }
}
