//! The smallest application: a plain function that answers every request.
//!
//! `cargo run --release --example hello -- --bind http:127.0.0.1:8080`

use std::process::ExitCode;

use forkyard::Body;
use forkyard::http::{Request, Response};

fn main() -> ExitCode {
    forkyard::run(|_cx| forkyard::blocking(hello))
}

fn hello(_request: Request<Body>) -> Response<&'static str> {
    Response::new("Hello, world\n")
}
