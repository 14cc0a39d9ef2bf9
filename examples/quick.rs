//! The smallest application without threads. Its function never blocks, so the function can run on the event loop. See
//! [`forkyard::Blocking::inline`] for the requirements.
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
