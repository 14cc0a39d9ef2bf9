//! The example `ticker` in a real browser, behind real web servers. Prices arrive immediately, by EventSource or by long polling. When the
//! worker that serves them is killed, the page continues to receive prices, and no event is lost or delivered twice.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failing test reports its location")]

#[path = "common/browser.rs"]
mod browser;
mod common;
#[path = "common/fronts/mod.rs"]
mod fronts;

use browser::Browser;
use common::{Server, http, wait_until};
use fronts::{Front, LIGHTTPD_EVENTS, NGINX, Site};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const WITHOUT_EVENT_SOURCE: &str = "delete window.EventSource";

/// Returns the numbers of the events that the page has received.
fn received(browser: &mut Browser) -> Vec<u64> {
    let ids = browser.evaluate("ticker.ids");
    // An id looks like `9f3a61c2-17`.
    let number = |id: &Value| id.as_str().unwrap().split_once('-').unwrap().1.parse().unwrap();
    ids.as_array().unwrap().iter().map(number).collect()
}

fn wait_for_more(browser: &mut Browser, count: usize) {
    let have = received(browser).len();
    browser.wait_for(&format!("ticker.ids.length >= {}", have + count));
}

fn assert_dense(browser: &mut Browser) {
    let ids = received(browser);
    let first = *ids.first().unwrap();
    assert_eq!(ids, (first..first + ids.len() as u64).collect::<Vec<_>>(), "no event is lost or duplicated");
    assert_eq!(browser.evaluate("ticker.gaps"), 0);
}

/// Kills a worker, and waits for its replacement.
fn kill_one(server: &Server, worker: i32) {
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    wait_until("the worker is replaced", || {
        let workers = server.workers();
        (workers.len() == 2 && !workers.contains(&worker)).then_some(())
    });
}

fn prices_go_on(front: Front, script: &str, by: &str) {
    let mut site = Site::start(front, "ticker");
    let url = format!("http://{}/", site.address);
    let server = site.application();
    let mut browser = Browser::start(script);
    browser.open(&url);
    browser.wait_for("window.ticker && ticker.ids.length >= 3");
    assert_eq!(browser.evaluate("ticker.by"), by);
    assert!(browser.evaluate("document.querySelectorAll('td.price').length") == 6);
    // Kill each worker in turn, including the worker that serves the page and the worker that generates the prices.
    for _ in 0..3 {
        for worker in server.workers() {
            kill_one(server, worker);
            wait_for_more(&mut browser, 3);
        }
    }
    assert_dense(&mut browser);
    let mut lags: Vec<i64> =
        browser.evaluate("ticker.lags").as_array().unwrap().iter().filter_map(Value::as_i64).collect();
    lags.sort_unstable();
    let makers = server.log().matches("makes the prices").count();
    eprintln!(
        "{front}, {by}: {} events by {makers} makers, {} ms after their publication (median), {} ms (slowest)",
        lags.len(),
        lags[lags.len() / 2],
        lags[lags.len() - 1]
    );
    assert!(makers > 1, "another worker was elected");
    server.stop();
}

#[test]
fn behind_nginx_the_page_continues_when_its_worker_is_killed() {
    prices_go_on(NGINX, "", "EventSource");
}

#[test]
fn behind_lighttpd_the_page_continues_when_its_worker_is_killed() {
    prices_go_on(LIGHTTPD_EVENTS, "", "EventSource");
}

/// A page can subscribe in two ways, which are shown in docs/events.md.
#[test]
fn the_documented_scripts_receive_events_with_any_data() {
    const DOCUMENT: &str = include_str!("../docs/events.md");
    let scripts: Vec<&str> =
        DOCUMENT.split("\n```js\n").skip(1).map(|rest| rest.split_once("\n```").unwrap().0).collect();
    let [by_event_source, by_polling] = scripts[..] else { panic!("the document has two scripts") };
    let mut server = Server::start("stream", &["--bind", "http:127.0.0.1:0", "--workers", "1"]);
    let mut browser = Browser::start("");
    browser.open(&format!("http://{}/who", server.http()));
    browser.wait_for("document.readyState === 'complete'");
    browser.evaluate("window.polled = []; window.pushed = []; console.log = data => pushed.push(data)");
    // The path and the topic of the application under test.
    let by_event_source = by_event_source.replace("\"/events\"", "\"/events?topics=news\"");
    browser.evaluate(&format!("{by_event_source}; window.source = source"));
    browser.evaluate(&format!(
        "{by_polling}; void poll('/events?topics=news', (name, data) => polled.push([name, data]))"
    ));
    let log = server.segment().events();
    wait_until("both scripts have subscribed", || {
        let count = http::get(&server.http(), "/subscribers").unwrap().text();
        (count.trim() == "2").then_some(())
    });
    let data = ["one", "two\nlines", " spaces ", "", "\u{2028}a line of its own, to some\u{2029}", "id: 7", "\u{85}é"];
    for data in data {
        log.publish("news", "weather", data.as_bytes()).unwrap();
    }
    log.publish("news", "", b"the end").unwrap();
    for (list, last) in [("pushed", "pushed.at(-1)"), ("polled", "polled.at(-1)[1]")] {
        browser.wait_for(&format!("{list}.length > 0 && {last} === 'the end'"));
    }
    let mut pushed: Vec<_> = data.map(Value::from).into();
    pushed.push("the end".into());
    assert_eq!(browser.evaluate("pushed"), Value::from(pushed));
    let mut polled: Vec<_> = data.map(|data| Value::from(vec!["weather", data])).into();
    polled.push(Value::from(vec!["message", "the end"]));
    assert_eq!(browser.evaluate("polled"), Value::from(polled));
    server.stop();
}

#[test]
fn without_event_source_the_page_polls_behind_nginx() {
    prices_go_on(NGINX, WITHOUT_EVENT_SOURCE, "polling");
}

#[test]
fn without_event_source_the_page_polls_behind_lighttpd() {
    prices_go_on(LIGHTTPD_EVENTS, WITHOUT_EVENT_SOURCE, "polling");
}

#[test]
fn one_worker_at_a_time_generates_the_prices() {
    let mut server = Server::start("ticker", &["--bind", "http:127.0.0.1:0", "--workers", "3"]);
    for round in 0..5 {
        let makers = wait_until("a worker is elected", || {
            let log = server.log();
            let lines = log.lines().filter(|line| line.contains("makes the prices from now on"));
            let makers: Vec<i32> = lines.map(|line| line.split(['[', ']']).nth(1).unwrap().parse().unwrap()).collect();
            (makers.len() > round).then_some(makers)
        });
        assert_eq!(makers.len(), round + 1, "no worker is elected while the elected worker lives: {makers:?}");
        kill(Pid::from_raw(makers[round]), Signal::SIGKILL).unwrap();
    }
    let page = http::get(&server.http(), "/").unwrap().text();
    assert!(page.contains("FJRD") && !page.contains("<!-- rows -->"), "{page}");
    server.stop();
}
