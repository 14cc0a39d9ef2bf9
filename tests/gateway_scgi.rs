//! SCGI programs behind gateways (`--backend scgi`): SCGI has no end of a response except that of the connection.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use common::http::{get, post};
use common::recipes::{Recipe, page, sent};
use common::{Server, wait_until};

fn start(options: &[&str]) -> (Server, Recipe) {
    let recipe = Recipe::new(&["scgi.pl"]);
    let options = [&["--backend", "scgi"], options].concat();
    (Server::start_command(&mut recipe.command(&options, &["perl", "scgi.pl"])), recipe)
}

#[test]
fn a_response_is_complete_with_its_length() {
    let (mut server, _recipe) = start(&[]);
    assert_eq!(page(&server, "/x%20y?z").text(), "GET /x y z 0\n");
    let body = vec![b'x'; 3 << 20];
    assert_eq!(sent(&server, "/x", &body).text(), "POST /x  3145728\n");
    let response = common::http::Client::connect(&server.http()).unwrap().request("HEAD", "/x", b"").unwrap();
    assert_eq!((response.status, response.header("content-length")), (200, Some("11")));
    server.stop();
}

#[test]
fn a_response_that_is_too_short_is_broken_off() {
    let (mut server, _recipe) = start(&[]);
    post(&server.http(), "/short", b"").map(|response| response.status).expect_err("the response is not complete");
    server.logged("the app process closed the connection in the middle of its response");
    assert_eq!(page(&server, "/x").status, 200);
    server.stop();
}

#[test]
fn the_death_of_the_process_is_never_the_end_of_a_response() {
    let (mut server, _recipe) = start(&["--retries", "1", "--quarantine", "0", "--respawn-rate", "1000"]);
    // Without a length, the end of the connection does not complete the response. A GET has not begun, and is repeated.
    assert_eq!(get(&server.http(), "/stream").unwrap().status, 502);
    server.logged("an app process died: the request is repeated");
    // A POST is never repeated.
    post(&server.http(), "/stream", b"").map(|response| response.status).unwrap_or_default();
    wait_until("all died", || (server.log().matches("] app process died").count() == 3).then_some(()));
    // All announced bytes have arrived, so the response is complete.
    assert_eq!(page(&server, "/die").text(), "GET /die  0\n");
    server.stop();
}

#[test]
fn a_command_that_listens_nowhere_is_explained() {
    let recipe = Recipe::new(&[]);
    let options = ["--backend", "scgi", "--start-timeout", "2s"];
    let mut server = Server::launch(&mut recipe.command(&options, &["sleep", "600"]));
    let line = server.wait_for("it was not ready in time");
    assert!(line.contains("descriptor 0 or 3"), "{line}");
    server.stop();
}
