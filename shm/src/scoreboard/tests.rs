use super::text::TEXT_BYTES;
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
    assert_eq!(row.begin("GET", "/b").cell(), 0, "its place is free");
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
    let beat = row.event_loop_beat();
    beat.runs_on(42);
    assert_eq!(board.read(0).unwrap().busy_since_ms, None);
    beat.work();
    let thread_slot = beat.thread_slot(0).unwrap();
    let before = thread_slot.switch_to(Some(second.cell()));
    assert_eq!(board.read(0).unwrap().running, ["GET /second"]);
    thread_slot.accuse();
    thread_slot.return_to(before);
    assert_eq!(board.read(0).unwrap().running, [""; 0]);
    let seen = board.read(0).unwrap();
    assert!(seen.busy_since_ms.is_some_and(|since| since <= monotonic_ms()));
    assert_eq!((seen.culprit.as_deref(), seen.loop_thread), (Some("GET /second"), 42));
    row.beat();
    second.beat();
    beat.sleep();
    let later = board.read(0).unwrap();
    assert_eq!((later.pulse, later.busy_since_ms), (seen.pulse.wrapping_add(2), None));

    let _other = board.claim(0, 43, 2).unwrap();
    beat.work();
    assert!(beat.thread_slot(0).is_none());
    thread_slot.switch_to(Some(0));
    thread_slot.accuse();
    let seen = board.read(0).unwrap();
    assert_eq!((seen.culprit, seen.busy_since_ms, seen.loop_thread), (None, None, 0), "it is not theirs any more");
    assert_eq!(seen.running, [""; 0]);
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
    board.claim(3, 3, 1).unwrap().set_state(State::Ready);
    assert_eq!(board.freest(0), load(false, 0), "the last row, claimed later");
}

#[test]
fn of_any_number_of_requests_each_is_known_and_a_row_shows_16() {
    let board = scoreboard(1);
    let row = board.claim(0, 1, 1).unwrap();
    let beat = row.event_loop_beat();
    let thread_slot = beat.thread_slot(0).unwrap();
    let mut requests: Vec<_> = (0..1000).map(|n| row.begin("GET", &format!("/{n}"))).collect();
    let seen = board.read(0).unwrap();
    assert_eq!((seen.in_flight, seen.serving.len()), (1000, CELLS));
    for (number, request) in requests.iter().enumerate() {
        let what = format!("GET /{number}");
        assert_eq!(request.what(), what);
        thread_slot.switch_to(Some(request.cell()));
        assert_eq!(board.read(0).unwrap().running, [what.as_str()]);
        let outer = thread_slot.switch_to(Some(requests[999].cell()));
        thread_slot.return_to(outer);
        thread_slot.accuse();
        let seen = board.read(0).unwrap();
        assert_eq!((seen.culprit.as_deref(), seen.running), (Some(what.as_str()), vec![what.clone()]));
    }
    requests.drain(..980);
    let again = row.begin("GET", "/again");
    assert_eq!(again.cell(), 0);
    let seen = board.read(0).unwrap();
    assert_eq!((seen.in_flight, seen.requests, seen.serving.len()), (21, 980, 1));
    drop((requests, again));
    let seen = board.read(0).unwrap();
    assert_eq!((seen.in_flight, seen.requests, seen.serving.len()), (0, 1001, 0));
    let _more: Vec<_> = (0..1000).map(|_| row.begin("GET", "/")).collect();
    assert_eq!(row.held.made.get(), 1000 - CELLS, "the cells are used again");
}

#[test]
fn a_thread_keeps_the_text_of_a_request_whose_cell_is_given_up() {
    let board = scoreboard(1);
    let row = board.claim(0, 1, 1).unwrap();
    let beat = row.event_loop_beat();
    let (ours, others, far) =
        (beat.thread_slot(0).unwrap(), beat.thread_slot(1).unwrap(), beat.thread_slot(40).unwrap());
    assert!(!board.read(0).unwrap().all_running, "a thread sits where nobody sees it");
    let left = row.begin("GET", "/left");
    for thread_slot in [ours, far] {
        let cell = left.cell();
        thread_slot.switch_to(Some(cell));
        others.keep_text_of(cell);
        thread_slot.keep_text_of(cell);
        assert_eq!(thread_slot.cell(), None);
    }
    drop(left);
    let next = row.begin("GET", "/next");
    others.switch_to(Some(next.cell()));
    assert_eq!(board.read(0).unwrap().running, ["GET /left", "GET /next"]);
    far.accuse();
    assert_eq!(board.read(0).unwrap().culprit.as_deref(), Some("GET /left"));
    ours.switch_to(None);
    assert_eq!(board.read(0).unwrap().running, ["GET /next"]);
}

#[test]
fn a_stream_has_its_text_though_the_row_does_not_show_it() {
    let board = scoreboard(1);
    let row = board.claim(0, 1, 1).unwrap();
    let mut streams: Vec<_> = (0..40).map(|n| row.begin("GET", &format!("/events/{n}"))).collect();
    streams.iter_mut().for_each(InFlight::becomes_stream);
    for (number, stream) in streams.iter().enumerate() {
        assert_eq!(stream.what(), format!("GET /events/{number}"));
    }
    let beat = row.event_loop_beat();
    let thread_slot = beat.thread_slot(0).unwrap();
    thread_slot.switch_to(Some(streams[7].cell()));
    thread_slot.accuse();
    let seen = board.read(0).unwrap();
    assert_eq!((seen.culprit.as_deref(), seen.serving.len(), seen.in_flight), (Some("GET /events/7"), 0, 0));
}

#[test]
fn text_is_cut_and_made_printable() {
    let board = scoreboard(1);
    let row = board.claim(0, 1, 1).unwrap();
    let long = row.begin("GET", &"/x".repeat(500));
    let what = &board.read(0).unwrap().serving[0].what;
    assert_eq!(what.len(), TEXT_BYTES);
    assert!(what.starts_with("GET /x/x") && what.ends_with("/x"));
    let long_what = long.what();
    drop(long);
    assert_eq!(request_text("GET", &"/x".repeat(500)), long_what);
    let odd = row.begin("GET", "/\x1b[31m\n\u{202e}\0");
    assert_eq!((odd.what(), request_text("GET", "/\x1b[31m\n\u{202e}\0")), (odd.what(), odd.what()));
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
        let whats = seen.serving.iter().map(|request| &request.what).chain(&seen.culprit).chain(&seen.running);
        assert!(whats.into_iter().all(|text| harmless(text)), "seed {seed}");
        assert!(seen.serving.len() <= CELLS && seen.running.len() <= CELLS);
        assert_eq!(seen.state, State::Empty, "seed {seed}");
    }
}
