//! The chat in PHP (`examples/chat`) in a real browser, while gateways and app processes are killed and reloaded.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

#[path = "common/browser.rs"]
mod browser;
mod common;

use std::collections::BTreeSet;
use std::io::Write as _;

use browser::Browser;
use common::gateway::{Place, Site};
use common::http::Client;
use common::{is_gone, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CHAT: &str = include_str!("../examples/chat/index.php");

fn start() -> Site {
    let place = Place::new();
    std::fs::write(place.path("index.php"), CHAT).unwrap();
    let root = place.text("");
    let options = ["--events", "1M", "--root", &root, "--index", "index.php"];
    let mut command = place.run(&options, &["php-cgi", "-n"]);
    place.start(&mut command)
}

/// Sends a message in the name of another visitor. Returns the status.
fn say(site: &Site, name: &str, text: &str) -> u16 {
    let mut client = Client::connect(&site.server.http()).unwrap();
    let (length, stream) = (text.len(), client.stream.get_mut());
    write!(stream, "POST /rooms/lobby HTTP/1.1\r\nHost: localhost\r\n{name}Content-Length: {length}\r\n\r\n{text}")
        .unwrap();
    client.response(false).unwrap().status
}

/// Enters the room in the browser, through the form of the first page.
fn enter(site: &Site) -> Browser {
    let mut browser = Browser::start("");
    browser.open(&format!("http://{}/", site.server.http()));
    browser.wait_for("document.readyState === 'complete' && document.querySelector('form') !== null");
    browser.evaluate("document.querySelector('[name=name]').value = 'Änne'; document.querySelector('button').click()");
    browser.wait_for("document.getElementById('state')?.textContent === 'connected'");
    browser
}

/// The messages in the page, one per line.
const LINES: &str = "[...document.querySelectorAll('li')].map(item => item.innerText).join('\\n')";

fn sigkill(pids: &BTreeSet<i32>, running: impl Fn() -> BTreeSet<i32>) {
    for &pid in pids {
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }
    wait_until("the processes are replaced", || {
        (pids.iter().all(|&pid| is_gone(pid)) && running().len() == pids.len()).then_some(())
    });
}

#[test]
fn visitors_receive_each_message_once_whichever_process_dies() {
    let mut site = start();
    let mut browser = enter(&site);
    browser.evaluate("document.querySelector('input').value = 'hello <b>'; document.querySelector('button').click()");
    let mut expected = vec!["Ännehello <b>".to_owned()];
    let mut expect = |browser: &mut Browser, line: Option<&str>| {
        expected.extend(line.map(ToOwned::to_owned));
        let text = serde_json::to_string(&expected.join("\n")).unwrap();
        browser.wait_for(&format!("{LINES} === {text}"));
    };
    expect(&mut browser, None);
    assert_eq!(say(&site, "Cookie: name=Bob\r\n", "hi"), 204);
    expect(&mut browser, Some("Bobhi"));
    assert_eq!(say(&site, "", "without a name"), 403);
    sigkill(&site.gateways(), || site.gateways());
    assert_eq!(say(&site, "Cookie: name=Bob\r\n", "the gateways died"), 204);
    expect(&mut browser, Some("Bobthe gateways died"));
    sigkill(&site.apps(), || site.apps());
    assert_eq!(say(&site, "Cookie: name=Bob\r\n", "the processes of PHP died"), 204);
    expect(&mut browser, Some("Bobthe processes of PHP died"));
    let said = site.control(&["reload"]);
    assert!(said.status.success(), "{said:?}");
    assert_eq!(say(&site, "Cookie: name=Bob\r\n", "all were replaced"), 204);
    expect(&mut browser, Some("Boball were replaced"));
    browser.wait_for("document.getElementById('state').textContent === 'connected'");
    browser.evaluate("document.querySelector('input').value = 'bye'; document.querySelector('button').click()");
    expect(&mut browser, Some("Ännebye"));
    site.at_rest();
    site.server.stop();
}

#[test]
fn a_visitor_without_a_name_is_not_handed_over() {
    let site = start();
    for target in ["/rooms/lobby/events", "/rooms/lobby"] {
        let response = site.get(target);
        assert_eq!(
            (response.status, response.text().as_str()),
            (403, "Choose a name on the first page.\n"),
            "{target}"
        );
    }
    assert_eq!(site.get("/rooms/Lobby").status, 404);
}
