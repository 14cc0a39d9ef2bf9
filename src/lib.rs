//! Forkyard runs a web application in several worker processes: it binds the sockets, forks and supervises the
//! workers, replaces those that crash, and gives them a page cache in shared memory.
//!
//! ```no_run
//! use forkyard::http::{Request, Response};
//!
//! fn main() -> std::process::ExitCode {
//!     forkyard::run(|_cx| forkyard::blocking(|_request: Request<forkyard::Body>| Response::new("Hello, world\n")))
//! }
//! ```
//!
//! That binary has a command line: `hello --bind fastcgi:unix:/run/hello.sock --workers 4`; `hello --help` tells
//! the rest. For applications in other languages there is the `forkyard` command.
//!
//! # Architecture
//!
//! Two straight lines, each readable in one place:
//!
//! ```text
//! data     accept -> decode -> application -> encode          worker/mod.rs
//! process  bind -> map -> fork -> supervise -> replace        builder.rs, master/mod.rs
//! ```
//!
//! ```text
//! master         one thread, one poll(2); never tokio, never application code after preload, no lock in shared memory
//!  |- worker x N forked, not exec'd; one tokio event loop; runs the application           (a linked application)
//!  `- process x N fork + exec of COMMAND, the listening socket as its standard input      (forkyard run)
//! ```
//!
//! What decides is pure, what touches the kernel is thin and fenced:
//!
//! | file | what it is | imports |
//! |---|---|---|
//! | `protocol/` | bytes to events and back, no I/O, no clock | nothing of ours |
//! | `master/supervisor.rs` | events to actions, the clock passed in | nothing of ours |
//! | `config.rs`, `listen.rs`, `sys.rs` | limits; sockets; fenced system calls | each other |
//! | `heritage.rs` | what a worker inherits, by name | those, `shm` |
//! | `master/` | the loop, birth, signals, obituaries | all above but `protocol/` |
//! | `worker/` | the event loop, connections, the drain | all above but `master/` |
//! | `builder.rs` | joins master and worker | everything |
//! | `shm/` | the crate `forkyard-shm`: scoreboard and cache | nothing of ours |
//!
//! **Fork safety.** The master has one thread, and [asserts](Builder::preload) that before each fork; signals are
//! blocked around it. A child unregisters the master's signal socket, closes every descriptor that its heritage
//! does not name, joins a process group of its own, and leaves by `_exit`. Its event loop runs on a new thread,
//! so thread-local random number generators start anew. Nothing is logged before all that.
//!
//! **Deaths.** A worker that dies is reaped, written of in one log line (with what it was serving, out of the
//! scoreboard), and replaced at once. When the master dies, each worker gets SIGTERM from the kernel and sees the
//! end of a pipe; it finishes what it serves and leaves, and if it hangs, `alarm(2)` ends it. An external
//! program gets SIGKILL: nothing can be promised of its manners. A lock in shared memory whose holder died is
//! recovered by the next taker, at the price of one shard of the cache at most.

mod banner;
mod blocking;
mod body;
mod builder;
mod cli;
mod config;
mod context;
mod heritage;
mod listen;
mod master;
mod protocol;
mod sys;
mod worker;

use std::error::Error;
use std::process::ExitCode;

use http_body::Body as HttpBody;
use tower_service::Service;

pub use forkyard_shm::{Cache, Clock, Options, Refused, Stats};
pub use http;

pub use crate::blocking::{Answer, Blocking, blocking};
pub use crate::body::{Body, BodyError, BodyReader};
pub use crate::builder::{Builder, command_line};
pub use crate::context::Context;
pub use crate::protocol::cgi::Peer;
pub use crate::protocol::fastcgi::Params;

/// Serves the application that `factory` makes in each worker, as this program's command line says.
///
/// See [`Builder::app`] for the factory, and [`Builder::run`] for what is returned.
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
