//! An application that blocks on demand, to test whether other requests wait for it. Each response is the worker's pid.
//!
//! - `/hold/PORT` connects to that port of 127.0.0.1, and responds when the peer closes the connection.
//! - `/page/PORT` requests a page from the cache. To render the page, a worker connects to that port and waits as for
//!   `/hold/PORT`. The page contains the pid of the worker that rendered it.
//! - `/count` responds when the request's body is complete.
//! - Any other path responds immediately.
//!
//! Requests run in a blocking function. Below `/loop/`, they block the event loop itself.
//!
//! `cargo run --release --example holds -- --workers 4`

use std::convert::Infallible;
use std::future::Future;
use std::io::{self, Read as _};
use std::net::TcpStream;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::{Context, Poll};

use forkyard::http::{Request, Response, StatusCode};
use forkyard::{Blocking, Body, Cache, StoreOptions};
use tower_service::Service;

fn main() -> ExitCode {
    forkyard::run(|cx| {
        let cache = cx.cache();
        let answer: Answer = Arc::new(move |request| answer(&cache, request));
        let function = Arc::clone(&answer);
        Holds { answer, threads: forkyard::blocking(Box::new(move |request| function(request))) }
    })
}

type Answer = Arc<dyn Fn(Request<Body>) -> Response<Body> + Send + Sync>;
type Function = Box<dyn Fn(Request<Body>) -> Response<Body> + Send + Sync>;

#[derive(Clone)]
struct Holds {
    answer: Answer,
    threads: Blocking<Function>,
}

impl Service<Request<Body>> for Holds {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path().starts_with("/loop/") {
            let answer = Arc::clone(&self.answer);
            Box::pin(async move { Ok(answer(request)) })
        } else {
            Box::pin(self.threads.call(request))
        }
    }
}

fn answer(cache: &Cache, request: Request<Body>) -> Response<Body> {
    let answer = answer_of(cache, request).map(|answer| Response::new(Body::from(answer)));
    answer.unwrap_or_else(|error| {
        let mut response = Response::new(Body::from(format!("{error}\n")));
        *response.status_mut() = StatusCode::BAD_REQUEST;
        response
    })
}

fn answer_of(cache: &Cache, request: Request<Body>) -> io::Result<Vec<u8>> {
    let own = format!("{}\n", std::process::id()).into_bytes();
    let path = request.uri().path();
    if let Some((_, port)) = path.rsplit_once("/hold/") {
        hold(port)?;
    } else if let Some((_, port)) = path.rsplit_once("/page/") {
        let render = |_| hold(port).map(|()| own);
        return Ok(cache.get_or_render(path, &StoreOptions::new(), render)?.value);
    } else if path == "/count" {
        io::copy(&mut request.into_body().reader(), &mut io::sink())?;
    }
    Ok(own)
}

fn hold(port: &str) -> io::Result<()> {
    let port: u16 = port.parse().map_err(io::Error::other)?;
    TcpStream::connect(("127.0.0.1", port))?.read_to_end(&mut Vec::new())?;
    Ok(())
}
