//! Forkyard is a prefork server: a master process binds the sockets, forks worker processes that run your application,
//! supervises the workers, and replaces those that crash. All workers share a page cache and an event log in shared
//! memory, and the application can be reached over HTTP/1, HTTP/2, FastCGI, SCGI or CGI without a change to its code.
//!
//! Linux only (4.5 or later). An application is any [`tower_service::Service`], such as an axum router, or a plain
//! function that may block.
//!
//! # A complete axum application
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use axum::Router;
//! use axum::extract::{Path, State};
//! use axum::routing::get;
//! use forkyard::Context;
//!
//! fn main() -> ExitCode {
//!     // The closure runs in each worker, after the fork, inside the worker's tokio runtime.
//!     forkyard::run(|cx| {
//!         Router::new()
//!             .route("/", get(async || "Hello, world\n"))
//!             .route("/hello/{name}", get(hello))
//!             .with_state(cx)
//!     })
//! }
//!
//! async fn hello(State(cx): State<Context>, Path(name): Path<String>) -> String {
//!     format!("Hello, {name}, from worker {}\n", cx.slot())
//! }
//! ```
//!
//! # Command-line flags
//!
//! [`run`] and [`Builder::run`] read the program's command line, so the binary above already has every flag:
//!
//! ```sh
//! hello --bind http:127.0.0.1:8080 --workers 4
//! hello --bind fastcgi:unix:/run/hello.sock --max-requests 10000 --cache 256M
//! hello --help
//! ```
//!
//! `--help` lists all flags, each with its default and its `FORKYARD_…` environment variable. Flags can also be set in
//! a configuration file. Applications in other languages use the `forkyard` command instead of this crate.
//!
//! # A function that blocks
//!
//! Each worker has one event loop, on one thread; code that blocks in an async handler stalls the whole worker.
//! [`blocking()`] turns a function into an application and runs the function on the worker's threads (`--threads`):
//!
//! ```no_run
//! use forkyard::Body;
//! use forkyard::http::{Request, Response};
//!
//! fn main() -> std::process::ExitCode {
//!     forkyard::run(|_cx| forkyard::blocking(report))
//! }
//!
//! fn report(_request: Request<Body>) -> Response<String> {
//!     let text = std::fs::read_to_string("report.txt"); // may block
//!     Response::new(text.unwrap_or_else(|error| format!("no report: {error}\n")))
//! }
//! ```
//!
//! # A cached page
//!
//! [`Context::cache`] is the page cache that all workers share. When several workers need the same page, one of them
//! renders it and the others wait for the result. [`page`] turns cached pages into HTTP responses.
//!
//! ```no_run
//! use std::convert::Infallible;
//! use std::time::Duration;
//!
//! use axum::Router;
//! use axum::body::Body;
//! use axum::extract::State;
//! use axum::http::{HeaderMap, Response, StatusCode};
//! use axum::routing::{get, post};
//! use forkyard::{Context, StoreOptions, Page, page};
//!
//! fn main() -> std::process::ExitCode {
//!     forkyard::run(|cx| Router::new().route("/news", get(news)).route("/publish", post(publish)).with_state(cx))
//! }
//!
//! async fn news(State(cx): State<Context>, headers: HeaderMap) -> Result<Response<Body>, StatusCode> {
//!     let options = StoreOptions::new().ttl(Duration::from_secs(60)).stale(Duration::from_secs(10)).tags(["news"]);
//!     let render = |_| async {
//!         // Query a database here.
//!         Ok::<_, Infallible>(Page::new("<h1>News</h1>").header("Content-Type", "text/html").gzip())
//!     };
//!     let Ok(served) = cx.cache().get_or_render_async("/news", &options, render).await;
//!     let response = page::to_response(served.value, &headers).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
//!     Ok(response.map(Body::from))
//! }
//!
//! async fn publish(State(cx): State<Context>) -> StatusCode {
//!     cx.cache().purge_tag("news"); // takes effect in all workers immediately
//!     StatusCode::NO_CONTENT
//! }
//! ```
//!
//! Blocking functions use [`Cache::get_or_render`].
//!
//! # Events
//!
//! An event published in any worker reaches the subscribers of all workers. [`sse`] answers a request with a stream of
//! Server-Sent Events, or with the next events if the client uses long polling. A client that reconnects resumes where
//! it left off, even if it reconnects to a different worker.
//!
//! ```no_run
//! use axum::Router;
//! use axum::extract::{Request, State};
//! use axum::http::{Response, StatusCode};
//! use axum::routing::{get, post};
//! use forkyard::{Body, Context, sse};
//!
//! fn main() -> std::process::ExitCode {
//!     forkyard::run(|cx| Router::new().route("/events", get(events)).route("/say", post(say)).with_state(cx))
//! }
//!
//! async fn events(State(cx): State<Context>, request: Request) -> Response<Body> {
//!     sse(&request, &cx.events(), ["chat"]).response() // in the browser: new EventSource("/events")
//! }
//!
//! async fn say(State(cx): State<Context>, text: String) -> StatusCode {
//!     match cx.events().publish("chat", text) {
//!         Ok(_id) => StatusCode::NO_CONTENT,
//!         Err(_) => StatusCode::SERVICE_UNAVAILABLE,
//!     }
//! }
//! ```
//!
//! # Loading data before the fork, and hooks
//!
//! [`Builder`] takes the same factory as [`run`]. In addition, the builder can load data once, before the fork, so that
//! all workers share it copy-on-write, and it can run hooks at each step in a worker's life:
//!
//! ```no_run
//! use std::process::ExitCode;
//! use std::sync::OnceLock;
//!
//! use axum::Router;
//! use axum::routing::get;
//!
//! static DICTIONARY: OnceLock<String> = OnceLock::new();
//!
//! fn main() -> ExitCode {
//!     forkyard::Builder::app(|_cx| {
//!         let size = DICTIONARY.get().map_or(0, String::len);
//!         Router::new().route("/", get(async move || format!("{size} bytes\n")))
//!     })
//!     .version(env!("CARGO_PKG_VERSION"))
//!     .preload(|| {
//!         let _ = DICTIONARY.set(std::fs::read_to_string("/usr/share/dict/words")?); // in the master, once
//!         Ok(())
//!     })
//!     .after_fork(|worker| Ok(log::info!("a worker started in slot {}", worker.slot))) // in each worker
//!     .on_worker_exit(|exit| log::info!("worker {} exited: {}", exit.pid, exit.status)) // in the master
//!     .run()
//! }
//! ```
//!
//! # Fork safety
//!
//! - `preload` may read files into memory and keep files open. It must leave no thread running and must not use tokio.
//! - Start threads in the factory or in `after_fork`. Threads do not survive a fork, and the master does not fork while
//!   it has more than one thread; threads started by `main` count.
//! - Open connections to databases and other servers in the factory. All workers would share the socket of a connection
//!   that was opened before the fork.
//! - Thread-local random number generators are seeded again in each worker. A generator that is in a static, or that
//!   the factory captures, is copied by the fork: seed such a generator in the factory.
//! - `before_fork` and `on_worker_exit` run on the master's only thread. They must not block, because nothing is
//!   supervised while they run.
//!
//! # Further documents
//!
//! In the `docs` directory of the repository:
//!
//! - `architecture.md`: processes, fork safety, what survives which failure, memory limits
//! - `cache.md`, `events.md`, `events-from-other-languages.md`, `websockets.md`, `http.md`: for application authors
//! - `hooks-and-sidecars.md`: hooks, daemons and scheduled jobs
//! - `operations.md`, `workers.md`, `logs.md`, `systemd.md`, `upgrade.md`: running a server
//! - `privileges.md`, `crashes-and-hangs.md`, `heirs.md`: isolation and recovery
//! - `web-servers.md`: nginx, lighttpd, Apache and others in front of Forkyard
//! - `requirements.md`, `dependencies.md`, `decisions/`, `benchmarks.md`: background

mod app;
mod builder;
mod cgi_runner;
mod cli;
mod config;
mod control;
mod diagnostics;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod gateway;
mod heir;
mod inherited_by_workers;
mod logging;
mod master;
mod net;
mod privileges;
mod protocol;
mod relay;
mod request;
mod startup;
mod sys;
mod upgrade;
mod worker;

use std::error::Error;
use std::process::ExitCode;

use http_body::Body as HttpBody;
use tower_service::Service;

pub use forkyard_shm::{
    Cache, CacheStatus, CacheValue, Cached, CorruptPage, Distribution, Encoding, EntryInfo, NotStorable, Page, Pinned,
    PurgeSnapshot, Recorder, Stats, StoreError, StoreOptions,
};
pub use http;

pub use crate::app::cached_page as page;

pub use crate::app::blocking::{Blocking, BlockingFuture, blocking};
pub use crate::app::body::{Body, BodyError, BodyReader, FilterData};
pub use crate::app::context::Context;
pub use crate::app::events::{Event, Events, EventsError, Message, Published, Sse, Subscription, sse};
pub use crate::app::hooks::{WorkerExit, WorkerId};
pub use crate::builder::{Builder, command_line};
pub use crate::protocol::cgi::ClientInfo;
pub use crate::protocol::params::Params;
pub use crate::protocol::role::{AppStatus, Role};

/// Serves the application that `factory` creates in each worker, configured by this program's command line.
///
/// See [`Builder::app`] for the factory, and [`Builder::run`] for the exit code.
pub fn run<F, S, B>(factory: F) -> ExitCode
where
    F: Fn(Context) -> S + Sync + 'static,
    S: Service<http::Request<Body>, Response = http::Response<B>> + Clone + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: HttpBody + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    Builder::app(factory).run()
}
