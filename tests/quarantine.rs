//! A request of which workers die is refused for a while; the others are answered all the time.

#![allow(clippy::unwrap_used, reason = "a test that fails here says where")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::http::{self, Client};
use common::raw::{self, ALL};
use common::{Server, wait_until};

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&["--bind", "http:127.0.0.1:0", "--workers", "3"], arguments].concat())
}

/// Also if the test fails.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Asks for what kills until it does not any more, and returns how often it did.
fn poison(address: &str, mut path: impl FnMut(usize) -> String) -> usize {
    let refused = |path: &str| http::get(address, path).is_ok_and(|response| response.status == 503);
    let mut deaths = 0;
    wait_until("it is refused", || {
        let is_refused = refused(&path(deaths));
        deaths += usize::from(!is_refused);
        is_refused.then_some(())
    });
    deaths
}

#[test]
fn poison_is_refused_after_three_deaths_and_nothing_else_is() {
    let mut server = crashy(&[]);
    let address = server.http();
    let (stop, good) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut deaths = 0;
    std::thread::scope(|scope| {
        let _stop = SetAtEnd(&stop);
        // A popular route, in flight all the time, also in the workers that die.
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(mut client) = Client::connect(&address) else { continue };
                    // By a death it may get a 502, and the connection end; any other response is the right one.
                    while let Ok(response) = client.request("GET", "/slow/5", b"") {
                        if response.status == 502 {
                            break;
                        }
                        assert_eq!(response.status, 200, "{}", response.text());
                        good.fetch_add(1, Ordering::Relaxed);
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                }
            });
        }
        // A client may ask once more before the master has drawn its conclusions.
        deaths = poison(&address, |_| "/segv?once=more".to_owned());
        assert!(deaths >= 3);
        let line = server.wait_for("quarantined request=");
        assert!(line.contains("request=\"GET /segv\" time=60s times=1"), "{line}");
        let before = good.load(Ordering::Relaxed);
        for _ in 0..20 {
            let response = http::get(&address, "/segv").unwrap();
            let seconds: u64 = response.header("retry-after").unwrap().parse().unwrap();
            assert!(response.status == 503 && (1..=61).contains(&seconds), "{seconds}");
        }
        assert_eq!(http::get(&address, "/ok").unwrap().status, 200);
        wait_until("the others are answered", || (good.load(Ordering::Relaxed) > before + 50).then_some(()));
    });
    server.stop();
    assert_eq!(server.log().matches("worker died").count(), deaths, "none since it is refused");
}

#[test]
fn what_kills_by_many_ids_is_refused_by_its_pattern() {
    let mut server = crashy(&[]);
    assert!(poison(&server.http(), |number| format!("/poison/{number}")) >= 3);
    assert!(server.wait_for("quarantined").contains("request=\"GET /poison/*\""));
    server.stop();

    let mut server = crashy(&["--quarantine-by", "path", "--quarantine", "2"]);
    assert!(poison(&server.http(), |_| "/poison/1".to_owned()) >= 2);
    assert!(server.wait_for("quarantined").contains("request=\"GET /poison/1\""));
    assert_eq!(http::get(&server.http(), "/poison/2").unwrap().status, 502, "it kills, and is not refused");
    server.stop();
}

#[test]
fn a_relapse_takes_one_death() {
    let mut server = crashy(&["--quarantine-time", "300ms"]);
    poison(&server.http(), |_| "/exit/3".to_owned());
    assert!(server.wait_for("quarantined").contains("times=1"));
    server.wait_for("let go request=\"GET /exit/3\"");
    // The workers' clock is that of the kernel's ticks.
    wait_until("it kills again", || (http::get(&server.http(), "/exit/3").unwrap().status == 502).then_some(()));
    assert!(server.wait_for("quarantined").contains("times=2"));
    server.stop();
}

#[test]
fn the_refusal_is_a_503_over_each_protocol() {
    for protocol in ALL {
        let mut server = protocol.start("crashy", &["--workers", "1", "--quarantine", "1"]);
        let ask = |server: &Server| raw::ask(&mut raw::connect(&server.binds[0]), &protocol.head("GET", "/abort", 0)).0;
        assert_eq!(ask(&server), 502, "{protocol:?}");
        server.wait_for("quarantined request=\"GET /abort\"");
        assert_eq!(ask(&server), 503, "{protocol:?}");
        server.stop();
    }
}

#[test]
fn it_can_be_switched_off() {
    let mut server = crashy(&["--quarantine", "0"]);
    for _ in 0..6 {
        assert_eq!(http::get(&server.http(), "/segv").unwrap().status, 502);
        server.wait_for("worker died");
    }
    server.stop();
}
