//! php-cgi under `forkyard run` behind each web server, with the configurations of docs/web-servers.md.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod common;
#[path = "common/fronts/mod.rs"]
mod fronts;

use std::process::Command;

use common::http::Client;
use common::{Server, program};

/// Requests a script with a query, and a script that does not exist.
fn php_behind(front: fronts::Front) {
    let directory = fronts::shared_directory();
    std::fs::write(directory.path().join("sum.php"), "<?php echo 'the sum is ', $_GET['a'] + $_GET['b'];").unwrap();
    let socket = directory.path().join("app.sock").display().to_string();
    let mut command = Command::new(program("forkyard"));
    command.args([
        "run",
        "--direct",
        "--bind",
        &format!("fastcgi:unix:{socket}"),
        "--socket-mode",
        "666",
        "--workers",
        "2",
    ]);
    let mut server = Server::start_command(command.args(["--", "php-cgi", "-n"]));
    let site = fronts::Site::before(front, directory, &socket);
    let ask = |target| Client::connect(&site.address).unwrap().request("GET", target, b"").unwrap();
    for _ in 0..3 {
        let answer = ask("/sum.php?a=19&b=23");
        assert_eq!((answer.status, answer.text().as_str()), (200, "the sum is 42"), "{front}");
    }
    assert_eq!(ask("/nothing.php").status, 404, "{front}");
    server.stop();
}

#[test]
fn php_behind_nginx() {
    php_behind(fronts::NGINX_PHP);
}

#[test]
fn php_behind_lighttpd() {
    php_behind(fronts::LIGHTTPD_PHP);
}

#[test]
fn php_behind_apache() {
    php_behind(fronts::APACHE_PHP);
}
