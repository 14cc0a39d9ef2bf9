//! An application that is a `tower` service, without a framework.
//!
//! `cargo run --release --example service -- --bind http:127.0.0.1:8080`

use std::convert::Infallible;
use std::pin::Pin;
use std::process::ExitCode;
use std::task::{Context, Poll};

use forkyard::Body;
use forkyard::http::{Request, Response};
use tower_service::Service;

fn main() -> ExitCode {
    forkyard::run(|_cx| Hello { greeting: "Hello, world\n" })
}

/// Created once in each worker and cloned for each request. Large values belong in an `Arc` or `Rc`.
#[derive(Clone)]
struct Hello {
    greeting: &'static str,
}

impl Service<Request<Body>> for Hello {
    type Response = Response<Body>;
    type Error = Infallible;
    /// The future stays on its worker's thread, so it need not be `Send`.
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>>>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let greeting = self.greeting;
        Box::pin(async move { Ok(answer(&request, greeting).await) })
    }
}

/// A real application would wait here for its database, or for the rest of the request's body.
async fn answer(_request: &Request<Body>, greeting: &'static str) -> Response<Body> {
    Response::new(Body::from(greeting))
}
