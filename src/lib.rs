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
#![doc = include_str!("../docs/architecture.md")]

mod at_work;
mod banner;
mod blocking;
mod body;
mod buffered;
mod builder;
mod cgi_call;
mod cli;
mod config;
mod conflicts;
mod context;
mod control;
mod crash;
mod descriptors;
mod events;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod handover;
mod heir;
mod heritage;
mod hooks;
mod listen;
mod lock_file;
mod logging;
mod master;
mod memory;
mod modules;
mod notify;
pub mod page;
mod peers;
mod pid_file;
mod privileges;
mod protocol;
mod publish_socket;
mod pulse;
mod queue_depth;
mod queue_time;
mod relay;
mod sample;
mod sockets;
mod start_end;
mod suspect;
mod sys;
mod systemd;
mod upgrade;
mod worker;

use std::error::Error;
use std::process::ExitCode;

use http_body::Body as HttpBody;
use tower_service::Service;

pub use forkyard_shm::{
    Cache, Clock, Damaged, Distribution, Encoding, Keep, Listed, NotStorable, Options, Page, Pinned, Recorder, Refused,
    Served, Source, Stats,
};
pub use http;

pub use crate::blocking::{Answer, Blocking, blocking};
pub use crate::body::{Body, BodyError, BodyReader, FilterData};
pub use crate::builder::{Builder, command_line};
pub use crate::context::Context;
pub use crate::events::{Event, Events, EventsError, Message, Published, Sse, Subscription, sse};
pub use crate::hooks::{WorkerExit, WorkerId};
pub use crate::protocol::cgi::Origin;
pub use crate::protocol::params::Params;
pub use crate::protocol::role::{AppStatus, Role};

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
