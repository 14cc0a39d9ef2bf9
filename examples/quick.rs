//! The smallest application that needs no thread: it waits for nothing, and has the event loop run it. See
//! [`forkyard::Blocking::inline`] for what that asks of a function.
//!
//! `cargo run --release --example quick -- --bind http:127.0.0.1:8080`

use std::process::ExitCode;

use forkyard::Body;
use forkyard::http::{Request, Response};

fn main() -> ExitCode {
    forkyard::run(|_cx| forkyard::blocking(hello).inline())
}

fn hello(_request: Request<Body>) -> Response<&'static str> {
    Response::new("Hello, world\n")
}
