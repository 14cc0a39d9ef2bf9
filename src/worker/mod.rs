//! A worker: a forked process with one event loop, in which the application runs.
//!
//! ```text
//! accept ─▶ http | fastcgi ─▶ serve (scoreboard, limits, panics) ─▶ the application
//! ```
//!
//! The event loop is a tokio current-thread runtime, made after the fork, on a thread of its own. That thread is
//! new, and so are its thread-local variables: random number generators that keep their state there (`rand`,
//! `fastrand`, the keys of `HashMap`) start anew in each worker, although they may have been used before the
//! fork. The first thread only waits, with all signals blocked.
//!
//! TERM drains: accept what is already waiting, finish what is being served, leave. If the loop hangs,
//! `alarm(2)` ends the process a little after the drain timeout, even when no master is left to do it.

mod accept;
mod fastcgi;
mod http;
mod outbox;
mod serve;

use std::fs::File;
use std::future::Future;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ::http::{Request, Response};
use forkyard_shm::State;
use http_body::Body as HttpBody;
use signal_hook::consts::signal::{SIGINT, SIGQUIT, SIGTERM};
use tokio::io::AsyncReadExt as _;
use tokio::task::LocalSet;
use tower_service::Service;

use self::accept::{Acceptor, Connections, Serve, Socket};
use self::serve::{Application, BoxError};
use crate::body::Body;
use crate::context::{Context, Drain};
use crate::heritage::{Heritage, READY};
use crate::listen::Protocol;
use crate::{blocking, sys};

/// Lives a worker's life: returns its exit status when it has drained.
pub(crate) fn run<F, S, B>(factory: &F, heritage: Heritage) -> u8
where
    F: Fn(Context) -> S + Sync,
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    sys::set_environment("FORKYARD_SLOT", heritage.slot.to_string());
    sys::set_environment("FORKYARD_GENERATION", heritage.generation.to_string());
    sys::set_environment("FORKYARD_SHM", sys::number_of(heritage.segment.fd()).to_string());
    std::thread::scope(|scope| {
        let life = || {
            serve::install_panic_hook();
            let mut last_words = File::from(match heritage.report.try_clone() {
                Ok(report) => report,
                Err(_) => return 1,
            });
            match catch_unwind(AssertUnwindSafe(|| live(factory, heritage))) {
                Ok(Ok(())) => 0,
                Ok(Err(error)) => fail(&mut last_words, &error.to_string()),
                Err(_) => fail(&mut last_words, "a panic outside any request, logged above"),
            }
        };
        let worker = std::thread::Builder::new().name("worker".to_owned()).spawn_scoped(scope, life);
        worker.ok().and_then(|worker| worker.join().ok()).unwrap_or(1)
    })
}

/// Tells the master why, for the line that it writes of this worker's end.
fn fail(last_words: &mut File, why: &str) -> u8 {
    let _ = last_words.write_all(why.as_bytes()); // if the master is gone, nobody wants to know
    1
}

fn live<F, S, B>(factory: &F, heritage: Heritage) -> io::Result<()>
where
    F: Fn(Context) -> S,
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    let config = &heritage.config;
    let asked_to_leave = take_signals(config.drain_timeout)?;
    sys::raise_descriptor_limit();
    blocking::configure(config.threads, config.queue);
    let scoreboard = heritage.segment.scoreboard();
    let row = scoreboard
        .claim(heritage.slot, std::process::id(), heritage.generation)
        .ok_or_else(|| io::Error::other(format!("the scoreboard has no row {}", heritage.slot)))?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = LocalSet::new();
    tasks.block_on(&runtime, async {
        let drain = Drain::default();
        let context = Context::new(heritage.slot, heritage.generation, heritage.segment.clone(), &drain);
        let service = serve::catch_panic(|| factory(context)).map_err(io::Error::other)?;
        let connections =
            Rc::new(Connections::new(config.limits.max_connections, row.clone(), scoreboard, heritage.slot));
        let application = Rc::new(Application::new(service, row.clone(), config.limits));
        let mut accepting = Vec::new();
        for listener in heritage.listeners.iter() {
            let server =
                Server { application: Rc::clone(&application), drain: drain.clone(), protocol: listener.protocol };
            let acceptor = Rc::new(Acceptor::new(listener)?);
            let (server, connections) = (Rc::new(server), Rc::clone(&connections));
            let (run, with) = (Rc::clone(&acceptor), Rc::clone(&server));
            let task = tokio::task::spawn_local(async move { run.run(&*with, &connections).await });
            accepting.push((task, acceptor, server));
        }

        row.set_state(State::Ready);
        File::from(heritage.report).write_all(&[READY])?;
        told_to_leave(asked_to_leave, heritage.lifeline).await?;

        row.set_state(State::Draining);
        for (task, acceptor, server) in accepting {
            task.abort();
            acceptor.run_dry(&*server, &connections);
        }
        drain.begin();
        connections.none().await;
        io::Result::Ok(())
    })?;
    // What still runs on a thread though its client has left: it may be half-way through something.
    blocking::finish();
    // Not the runtime's own end, which would wait for a blocking function that never returns.
    runtime.shutdown_background();
    Ok(())
}

/// What a connection is served with.
struct Server<S> {
    application: Rc<Application<S>>,
    drain: Drain,
    protocol: Protocol,
}

impl<S, B> Serve for Server<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    fn serve(&self, socket: impl Socket, peer: Option<SocketAddr>) -> impl Future<Output = ()> + 'static {
        let (application, drain, protocol) = (Rc::clone(&self.application), self.drain.clone(), self.protocol);
        async move {
            match protocol {
                Protocol::FastCgi => fastcgi::serve(socket, application, drain).await,
                Protocol::Http => http::serve(socket, peer, application, drain).await,
            }
        }
    }
}

/// Takes over this process's signals, and lets them through. Returns what becomes readable on TERM.
///
/// The master's handlers are still installed and do nothing. INT and QUIT get their default action back in
/// signal-hook's way, so that an application that takes them over (with `tokio::signal`, say) can.
fn take_signals(drain_timeout: Duration) -> io::Result<UnixStream> {
    let (term, wake) = UnixStream::pair()?;
    term.set_nonblocking(true)?;
    sys::alarm_on_term(drain_timeout)?;
    signal_hook::low_level::pipe::register(SIGTERM, wake)?;
    for signal in [SIGINT, SIGQUIT] {
        signal_hook::flag::register_conditional_default(signal, Arc::new(AtomicBool::new(true)))?;
    }
    sys::unblock_signals();
    Ok(term)
}

/// Returns when TERM has come, or the master is dead.
async fn told_to_leave(term: UnixStream, lifeline: OwnedFd) -> io::Result<()> {
    let mut term = tokio::net::UnixStream::from_std(term)?;
    let mut lifeline = tokio::net::unix::pipe::Receiver::from_owned_fd(lifeline)?;
    let (mut byte, mut end) = ([0], [0]);
    tokio::select! {
        _ = term.read(&mut byte) => {}
        _ = lifeline.read(&mut end) => log::warn!("the master is gone: this worker finishes and leaves"),
    }
    Ok(())
}
