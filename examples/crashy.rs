//! An application that misbehaves on demand, to test the effect on other workers and requests.
//!
//! `cargo run --release --example crashy -- --workers 4`, then `curl http://127.0.0.1:8080/segv`
//!
//! If the environment contains `CRASHY_BROKEN=FILE`, the workers fail to start as long as FILE exists. If FILE contains
//! `hang`, the workers hang during startup instead.

use std::convert::Infallible;
use std::pin::Pin;
use std::process::ExitCode;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Path;
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderValue, Request, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{any, get};
use http_body_util::BodyExt as _;
use tower_service::Service;

fn main() -> ExitCode {
    forkyard::run(|_cx| {
        if let Some(file) = std::env::var_os("CRASHY_BROKEN") {
            while std::fs::read_to_string(&file).is_ok_and(|how| how == "hang") {
                std::thread::park();
            }
            assert!(!std::path::Path::new(&file).exists(), "broken on purpose");
        }
        let router = Router::new()
            .route("/ok", any(async || "ok\n"))
            .route("/echo", any(async |body: Body| body))
            .route("/count", any(count))
            .route("/bytes/{mib}", get(bytes))
            .route("/piece/{mib}", get(async |Path(mib): Path<usize>| vec![b'x'; mib << 20]))
            .route("/break", get(break_off))
            .route("/slow/{ms}", get(slow))
            .route("/segv", get(segv))
            .route("/abort", get(abort))
            .route("/panic", get(panic))
            .route("/overflow", get(overflow))
            .route("/hang", get(hang))
            .route("/outside/hang", get(hang_outside))
            .route("/poison/{id}", get(segv))
            .route("/claim/{length}/{real}", get(claim))
            .route("/head/{bytes}", get(head))
            .route(
                "/status/{status}",
                get(async |Path(status): Path<u16>| StatusCode::from_u16(status).unwrap_or_default()),
            )
            .route("/leak/{mib}", get(leak))
            .route("/exit/{status}", get(exit))
            .route("/exit-at-once/{status}", get(exit_at_once))
            .route("/kill", get(kill));
        Crashy { router, threads: forkyard::blocking(in_a_thread as InThread) }
    })
}

type InThread = fn(Request<forkyard::Body>) -> Response<String>;

/// Requests below `/thread/` run on a thread for blocking functions, and all other requests on the event loop.
#[derive(Clone)]
struct Crashy {
    router: Router,
    threads: forkyard::Blocking<InThread>,
}

impl Service<Request<forkyard::Body>> for Crashy {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<forkyard::Body>) -> Self::Future {
        if request.uri().path().starts_with("/thread/") {
            let answer = self.threads.call(request);
            return Box::pin(async { Ok(answer.await?.map(Body::new)) });
        }
        Box::pin(self.router.call(request))
    }
}

/// Returns the number of bytes in the request's body.
async fn count(mut body: Body) -> String {
    let mut count = 0;
    while let Some(Ok(frame)) = body.frame().await {
        count += frame.data_ref().map_or(0, Bytes::len);
    }
    format!("{count}\n")
}

/// Returns a body of `mib` MiB, produced as fast as it is sent.
async fn bytes(Path(mib): Path<usize>) -> Body {
    let piece = Bytes::from(vec![b'x'; 64 << 10]);
    let pieces = std::iter::repeat_n(Ok::<_, Infallible>(piece), mib * 16);
    Body::from_stream(futures_util::stream::iter(pieces))
}

/// Returns a body that fails after its first chunk.
async fn break_off() -> Body {
    let pieces = [Ok(Bytes::from_static(b"a part\n")), Err("broken on purpose")];
    Body::from_stream(futures_util::stream::iter(pieces))
}

/// Returns a response whose `Content-Length` may be wrong.
async fn claim(Path((length, real)): Path<(String, usize)>) -> Response {
    let pieces = std::iter::repeat_n(Ok::<_, Infallible>(Bytes::from_static(b"xxxxx")), real / 5);
    ([(CONTENT_LENGTH, length)], Body::from_stream(futures_util::stream::iter(pieces))).into_response()
}

/// Returns a response with about this many bytes of headers, and with a header whose name CGI uses for the status.
async fn head(Path(bytes): Path<usize>) -> Response {
    let mut response = "body\n".into_response();
    for _ in 0..bytes / 1000 {
        response.headers_mut().append("x-long", HeaderValue::from_static(LONG));
    }
    response.headers_mut().insert("status", HeaderValue::from_static("200 OK"));
    response
}

const LONG: &str = match std::str::from_utf8(&[b'x'; 990]) {
    Ok(text) => text,
    Err(_) => "",
};

async fn slow(Path(ms): Path<u64>) -> String {
    tokio::time::sleep(Duration::from_millis(ms)).await;
    format!("{ms} ms\n")
}

#[expect(unsafe_code, reason = "this example demonstrates an invalid pointer")]
async fn segv() -> String {
    let nowhere: *const u8 = std::ptr::without_provenance(8);
    // SAFETY: none. The process is meant to crash here.
    format!("{}\n", unsafe { nowhere.read_volatile() })
}

async fn abort() {
    std::process::abort()
}

async fn panic() {
    panic!("asked to")
}

#[expect(unconditional_recursion, reason = "this example demonstrates a stack overflow")]
fn recurse(depth: &mut [u64; 512]) -> u64 {
    let mut deeper = [depth[0] + 1; 512];
    recurse(&mut deeper) + std::hint::black_box(&mut deeper)[7]
}

async fn overflow() -> String {
    format!("{}\n", recurse(&mut [0; 512]))
}

/// Sleeps, crashes or hangs on a thread for blocking functions.
#[expect(unsafe_code, reason = "this example demonstrates an invalid pointer")]
fn in_a_thread(request: Request<forkyard::Body>) -> Response<String> {
    let path = request.uri().path();
    if let Some(ms) = path.strip_prefix("/thread/sleep-").and_then(|ms| ms.parse().ok()) {
        sleep_in_a_thread(Duration::from_millis(ms));
    }
    if path.ends_with("/segv") {
        let nowhere: *const u8 = std::ptr::without_provenance(16);
        // SAFETY: none. The process is meant to crash here.
        let byte = unsafe { nowhere.read_volatile() };
        return Response::new(byte.to_string());
    }
    if path.ends_with("/hang") {
        loop {
            std::thread::park();
        }
    }
    Response::new("done\n".to_owned())
}

#[inline(never)]
fn sleep_in_a_thread(time: Duration) {
    std::thread::sleep(time);
    std::hint::black_box(time);
}

/// Blocks the event loop forever.
async fn hang() {
    loop {
        std::thread::park();
    }
}

/// Responds with 500, and leaves behind a hung thread that does not belong to the server.
async fn hang_outside() -> StatusCode {
    tokio::task::spawn_blocking(|| {
        loop {
            std::thread::park();
        }
    });
    StatusCode::INTERNAL_SERVER_ERROR
}

async fn leak(Path(mib): Path<usize>) -> String {
    // The bytes are not zero, so that the pages are written and count as used memory.
    Vec::leak(vec![1_u8; mib << 20]);
    format!("leaked {mib} MiB\n")
}

#[expect(clippy::exit, reason = "this example demonstrates a library that exits")]
async fn exit(Path(status): Path<i32>) {
    std::process::exit(status)
}

/// Exits without the cleanup of `exit(3)`.
#[expect(unsafe_code, reason = "this example demonstrates a library that exits")]
async fn exit_at_once(Path(status): Path<i32>) {
    // SAFETY: `_exit` is always sound.
    unsafe { libc::_exit(status) }
}

/// Kills the worker with SIGKILL, as the kernel or an operator might do.
async fn kill() {
    let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
}
