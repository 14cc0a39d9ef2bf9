//! An application that is held up on demand, to see whether others wait for it: `/hold/PORT` answers when whoever
//! listens on that port of the loopback has closed the connection, `/count` when all of the request's body has come, and
//! anything else at once. All say which process they are.
//!
//! That runs in a blocking function; below `/loop/` it holds up the event loop itself.
//!
//! `cargo run --release --example holds -- --workers 4`

use std::convert::Infallible;
use std::future::Future;
use std::io::{self, Read as _};
use std::net::TcpStream;
use std::pin::Pin;
use std::process::ExitCode;
use std::task::{Context, Poll};

use forkyard::http::{Request, Response, StatusCode};
use forkyard::{Blocking, Body};
use tower_service::Service;

fn main() -> ExitCode {
    forkyard::run(|_cx| Holds(forkyard::blocking(answer as Answer)))
}

type Answer = fn(Request<Body>) -> Response<Body>;

#[derive(Clone)]
struct Holds(Blocking<Answer>);

impl Service<Request<Body>> for Holds {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path().starts_with("/loop/") {
            Box::pin(async { Ok(answer(request)) })
        } else {
            Box::pin(self.0.call(request))
        }
    }
}

fn answer(request: Request<Body>) -> Response<Body> {
    let answer = hold(request).map(|()| Response::new(Body::from(format!("{}\n", std::process::id()))));
    answer.unwrap_or_else(|error| {
        let mut response = Response::new(Body::from(format!("{error}\n")));
        *response.status_mut() = StatusCode::BAD_REQUEST;
        response
    })
}

fn hold(request: Request<Body>) -> io::Result<()> {
    let path = request.uri().path();
    if let Some((_, port)) = path.rsplit_once("/hold/") {
        let port: u16 = port.parse().map_err(io::Error::other)?;
        TcpStream::connect(("127.0.0.1", port))?.read_to_end(&mut Vec::new())?;
    } else if path == "/count" {
        io::copy(&mut request.into_body().reader(), &mut io::sink())?;
    }
    Ok(())
}
