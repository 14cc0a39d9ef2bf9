//! Runs a worker: a forked process with one event loop, in which the application runs.
//!
//! ```text
//! accept ─▶ http | fastcgi | scgi ─▶ serve (scoreboard, limits, panics) ─▶ the application
//! ```
//!
//! The event loop is a tokio current-thread runtime, created after the fork, on its own thread. Because the thread is
//! new, its thread-local variables are new too: random number generators that keep their state in such variables
//! (`rand`, `fastrand`, the keys of `HashMap`) are seeded again in each worker, even if they were used before the fork.
//! The first thread only waits, with all signals but SIGBUS blocked (`sys::block_signals`).
//!
//! SIGTERM drains the worker: it accepts the queued connections, completes the requests that have begun, and exits. If
//! the event loop has hung, `alarm(2)` kills the process shortly after the drain timeout, even without a master.

pub(crate) mod conn;
pub(crate) mod deferred_wakes;
pub(crate) mod lifecycle;
mod logs;
pub(crate) mod service;

use std::fs::File;
use std::future::{Future, poll_fn};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use ::http::{Request, Response, StatusCode};
use forkyard_shm::{Cache, EventLoopBeat, Row, Scoreboard, Segment, State};
use signal_hook::consts::signal::{SIGINT, SIGQUIT, SIGTERM};
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::runtime::{LocalOptions, LocalRuntime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tower_service::Service;

use self::conn::accept::{Acceptor, Arrival, Connections, Serve};
use self::conn::acl::Acl;
use self::conn::per_client_limit::ClientConnections;
use self::conn::socket::Socket;
use self::conn::stop_listening::{Accepting, DrainingListeners};
use self::conn::{fastcgi, http, preface, scgi};
use self::lifecycle::drain::Drain;
use self::lifecycle::slow;
use self::lifecycle::watchdog::Watchdog;
use self::logs::OutputPipes;
use self::service::access_log::AccessLog;
use self::service::max_requests::MaxRequests;
use self::service::serve::{AppService, Application, Protection, ResponseBody};
use self::service::{health, serve};
use crate::app::blocking;
use crate::app::body::Body;
use crate::app::context::Context;
use crate::app::events::Events;
use crate::app::hooks::WorkerId;
use crate::config::Config;
use crate::config::address::Protocol;
use crate::config::peers::Peers;
use crate::diagnostics::{crash, current_request};
use crate::heir::journal::{Journal, WireProtocol};
use crate::heir::{self, Heir};
use crate::inherited_by_workers::{Heritage, Report};
use crate::net::handover::{Channel, PackedOrigin};
use crate::net::listen::Listener;
use crate::protocol::cgi::ClientInfo;
use crate::request::buffered;
use crate::{logging, sys};

/// How often a worker whose drain is nearly over checks for connections that wait for their
/// clients.
const LAST_LOOKS: Duration = Duration::from_millis(50);

/// Runs the worker; returns its exit status after the drain.
pub(crate) fn run<F, S, B>(factory: &F, heritage: Heritage) -> u8
where
    F: Fn(Context) -> S + Sync,
    S: AppService<B>,
    B: ResponseBody,
{
    let heir = match heir::spawn(&heritage) {
        Ok(heir) => heir,
        Err(error) => {
            return fail(
                &mut File::from(heritage.report),
                &format!("cannot create the journal of connections: {}", sys::explain(&error)),
            );
        }
    };
    sys::set_environment("FORKYARD_SLOT", heritage.slot.to_string());
    sys::set_environment("FORKYARD_GENERATION", heritage.generation.to_string());
    sys::set_environment("FORKYARD_SHM", heritage.segment.fd().as_raw_fd().to_string());
    let (scoreboard, slot, slow) =
        (heritage.segment.scoreboard(), heritage.slot, heritage.config.failures.slow_request);
    crash::give_stack(); // for SIGBUS, which this thread does not block: it reads the scoreboard
    let first_thread = std::thread::current();
    let report = heritage.report.try_clone().map(File::from);
    let status = std::thread::scope(|scope| {
        let life = || {
            let _end = WakeAtEnd(first_thread);
            serve::install_panic_hook();
            let mut last_words = File::from(match heritage.report.try_clone() {
                Ok(report) => report,
                Err(_) => return 1,
            });
            match catch_unwind(AssertUnwindSafe(|| live(factory, heritage, heir))) {
                Ok(Ok(())) => 0,
                Ok(Err(error)) => fail(&mut last_words, &error.to_string()),
                Err(_) => fail(&mut last_words, "a panic outside of any request (logged above)"),
            }
        };
        let worker = std::thread::Builder::new().name("worker".to_owned()).spawn_scoped(scope, life);
        match worker {
            Ok(worker) => {
                if !slow.is_zero() {
                    slow::watch(&worker, &scoreboard, slot, slow);
                }
                worker.join().unwrap_or(1)
            }
            Err(error) => report.map_or(1, |mut report| {
                fail(&mut report, &format!("cannot create the thread of the event loop: {error}"))
            }),
        }
    });
    logging::finish();
    status
}

/// Wakes a thread when dropped.
struct WakeAtEnd(std::thread::Thread);

impl Drop for WakeAtEnd {
    fn drop(&mut self) {
        self.0.unpark();
    }
}

/// Reports the reason to the master, which logs it when this worker has exited.
fn fail(last_words: &mut File, why: &str) -> u8 {
    let _ = last_words.write_all(Report::LastWords(why.to_owned()).line().as_bytes()); // fails if the master is dead
    1
}

fn live<F, S, B>(factory: &F, heritage: Heritage, heir: Heir) -> io::Result<()>
where
    F: Fn(Context) -> S,
    S: AppService<B>,
    B: ResponseBody,
{
    let config = Arc::clone(&heritage.config);
    let (slot, hooks) = (heritage.slot, Arc::clone(&heritage.hooks));
    let worker = WorkerId { slot, generation: heritage.generation };
    let begun = Instant::now();
    log::debug!(part = "worker", slot, "gen" = heritage.generation, config:? = config; "settings");
    let (asked_to_leave, starts) = take_signals(config.drain_timeout)?;
    let output = OutputPipes::now();
    let scoreboard = heritage.segment.scoreboard();
    let row = prepare(&heritage, &scoreboard)?;
    hooks.after_fork(worker)?;

    let runtime = event_loop(row.event_loop_beat(), !config.failures.hang_timeout.is_zero())?;
    let life = async {
        let drain = Drain::new(Arc::clone(&heritage.handover), scoreboard.clone(), heritage.slot, config.drain_timeout);
        let flag = Arc::clone(drain.flag());
        let events = Events::new(&heritage.segment, config.events);
        let context = Context::new(heritage.slot, heritage.generation, heritage.segment.clone(), flag, events.clone());
        let service = serve::catch_panic(|| factory(context)).map_err(io::Error::other)?;
        let watchdog = Watchdog::new(config.limits.timeouts, Arc::clone(drain.flag()));
        let limit = config.limits.max_connections;
        let connections = Rc::new(Connections::new(limit, row.clone(), scoreboard, slot, Rc::clone(&watchdog)));
        let report = File::from(heritage.report);
        let service = MaxRequests::new(service, config.scaling.max_requests, report.try_clone()?);
        let application = Application::new(service, row.clone(), config.limits, config.trust.clone());
        let access_log = AccessLog::new(&heritage.log_files, heir.lines, heritage.slot, heritage.generation);
        let application = application.protected(protection(&config, &heritage.segment)).logged(access_log.clone());
        if let Some(path) = &config.scaling.health_path {
            // The limit is slightly below the master's, so that the worker can still report the reason.
            let limit = (config.start_timeout / 10 * 9).saturating_sub(begun.elapsed());
            health::check(&application, path, limit).await?;
        }
        let server = Rc::new(Server::new(&config, &heritage.listeners, Rc::new(application), drain.clone()));
        hooks.on_ready(worker)?;
        // The worker has not accepted any connection yet.
        starts.store(false, Ordering::SeqCst);
        let acceptors = acceptors(&heritage.listeners, &heritage.handover, &connections, heir.journal)?;
        let accepting = accept(acceptors, &server);

        let tasks = [
            tokio::task::spawn_local(sweep(heritage.segment.cache(), Rc::clone(&connections), row.clone())),
            tokio::task::spawn_local(deferred_wakes::run()),
            tokio::task::spawn_local(events.clone().deliver()),
            tokio::task::spawn_local(end_drain(drain.clone(), Rc::clone(&watchdog))),
            tokio::task::spawn_local(async move { watchdog.run().await }),
            tokio::task::spawn_local(miss_heir(heir.end, report.try_clone()?)),
            tokio::task::spawn_local(report_hangs(report.try_clone()?)),
            tokio::task::spawn_local(logs::keep(heritage.log_files, heritage.files, access_log.clone())),
        ];
        row.set_state(State::Ready);
        (&report).write_all(Report::Ready.line().as_bytes())?;
        let is_orphan = wait_for_leave(asked_to_leave, heritage.lifeline, &output).await?;

        row.set_state(State::Draining);
        let (listeners, retained) = (&*heritage.listeners, &heir.retained);
        let mut draining = DrainingListeners { accepting, listeners, retained, is_orphan };
        draining.begin_to_close();
        draining.run_dry(&*server).await;
        drain.begin();
        events.drain();
        hooks.on_drain(worker, config.drain_timeout);
        draining.leave(&drain, &connections, &*server).await;
        tasks.iter().for_each(JoinHandle::abort);
        server.application.report_refusals();
        access_log.iter().for_each(|log| log.finish());
        log::debug!(slot, passed_on = drain.passed_on(); "worker drained");
        io::Result::Ok(())
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| run_in_turns(&runtime, life)));
    // The event loop's work ends here, regardless of how long the following steps take.
    row.event_loop_beat().sleep();
    if let Ok(Ok(())) = outcome {
        finish_functions(slot);
        hooks.on_exit(worker);
    }
    // Dropping the runtime would wait for an application's function (`spawn_blocking`) that never
    // returns.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Waits for functions that are still running on a thread although their clients have disconnected, because such a
/// function may be in the middle of a change.
fn finish_functions(slot: u32) {
    let hanging = blocking::finish();
    if hanging > 0 {
        log::warn!(slot, count = hanging; "worker exits while blocking functions are still running (--hang-timeout)");
    }
}

/// Claims a row of the scoreboard, configures blocking functions, and prepares this thread to report a crash and the
/// request that caused it.
fn prepare(heritage: &Heritage, scoreboard: &Scoreboard) -> io::Result<Row> {
    let Config { threads, queue, failures, privileges, limits, .. } = &*heritage.config;
    if !privileges.limits_descriptors() {
        sys::raise_descriptor_limit();
    }
    let row = scoreboard
        .claim(heritage.slot, std::process::id(), heritage.generation)
        .ok_or_else(|| io::Error::other(format!("the scoreboard has no row {}", heritage.slot)))?;
    blocking::configure(*threads, *queue, Some(row.occupancy()));
    blocking::set_hang_timeout(failures.hang_timeout);
    buffered::set_limit(limits.max_buffered);
    crash::give_stack();
    current_request::note_in(row.event_loop_beat());
    current_request::register_thread();
    crash::install(heritage.report.try_clone()?)?;
    Ok(row)
}

/// Creates the event loop. With `is_watched`, the loop records when it works and when it sleeps.
fn event_loop(pulse: EventLoopBeat, is_watched: bool) -> io::Result<LocalRuntime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().on_thread_start(crash::give_stack);
    if is_watched {
        pulse.runs_on(nix::unistd::gettid().as_raw().cast_unsigned());
        pulse.work();
        let asleep = pulse.clone();
        builder.on_thread_unpark(move || pulse.work()).on_thread_park(move || asleep.sleep());
    }
    builder.build_local(LocalOptions::default())
}

fn protection(config: &Config, segment: &Segment) -> Protection {
    let (failures, max_queue_time) = (&config.failures, config.scaling.max_queue_time);
    let quarantine = (failures.quarantine.deaths > 0).then(|| segment.quarantine());
    Protection { request_timeout: failures.request_timeout, max_queue_time, quarantine, by: failures.quarantine.by }
}

/// Requests this worker's replacement when a function hangs.
async fn report_hangs(mut report: File) {
    loop {
        let what = blocking::one_hangs().await;
        let _ = report.write_all(Report::HungThread(what).line().as_bytes()); // a full pipe already has a report
    }
}

/// Sweeps the page cache, off the event loop and in one worker at a time. Sleeps while the worker has no connection.
async fn sweep(cache: Cache, connections: Rc<Connections>, row: Row) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        connections.some().await;
        ticks.tick().await;
        row.beat(); // the loop may be busy, but it makes progress
        if cache.sweep_is_due() {
            let cache = cache.clone();
            // A panic in the sweep is ignored. If no thread can be created, the next tick retries.
            let _ = on_thread("sweep", move || cache.sweep()).await;
        }
    }
}

/// Runs `work` on its own thread. tokio's `spawn_blocking` is not used, because it panics if no thread can be created.
///
/// # Errors
/// Fails if no thread can be created, or if `work` panics.
async fn on_thread<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (done, outcome) = oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(|| {
        crash::give_stack();
        let _ = done.send(work()); // fails once the event loop has ended
    })?;
    outcome.await.map_err(io::Error::other)
}

/// Runs the event loop until `life` ends and, between its iterations, the blocking functions that run inline.
fn run_in_turns<T>(runtime: &LocalRuntime, life: impl Future<Output = T>) -> T {
    let mut life = pin!(life);
    loop {
        let turn = poll_fn(|context| match life.as_mut().poll(context) {
            Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
            Poll::Pending if blocking::jobs_wait(context) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        });
        match runtime.block_on(turn) {
            Some(outcome) => return outcome,
            None => blocking::run_jobs(),
        }
    }
}

/// Creates the acceptors of all listeners and of the handover channel.
fn acceptors(
    listeners: &[Listener],
    channel: &Channel,
    connections: &Rc<Connections>,
    journal: Journal,
) -> io::Result<Vec<Acceptor>> {
    let listeners = (0..).zip(listeners);
    let of_listeners = listeners.map(|(index, listener)| Acceptor::of_listener(index, listener, connections, journal));
    of_listeners.chain([Acceptor::of_channel(channel, connections, journal)]).collect()
}

/// Starts a task for each acceptor.
fn accept(acceptors: Vec<Acceptor>, server: &Rc<impl Serve + 'static>) -> Vec<Accepting> {
    let begin = |acceptor: Acceptor| {
        let acceptor = Rc::new(acceptor);
        let (run, with) = (Rc::clone(&acceptor), Rc::clone(server));
        (tokio::task::spawn_local(async move { run.run(&*with).await }), acceptor)
    };
    acceptors.into_iter().map(begin).collect()
}

/// Cuts off clients that would delay the worker's exit until it is killed.
async fn end_drain(drain: Drain, watchdog: Rc<Watchdog>) {
    drain.wait_for_cutoff().await;
    loop {
        watchdog.end_drain();
        tokio::time::sleep(LAST_LOOKS).await; // a request that is answered now may then wait for its client
    }
}

/// Requests this worker's replacement when the heir has died.
async fn miss_heir(end: Option<OwnedFd>, mut report: File) {
    let Some(end) = end.and_then(|end| sys::register(end, Interest::READABLE).ok()) else { return };
    if end.readable().await.is_ok() {
        let _ = report.write_all(Report::Recycle("its heir died".to_owned()).line().as_bytes());
    }
}

/// The settings of a listener that apply to its connections.
struct ListenerContext {
    protocol: Protocol,
    door: Acl,
}

impl ListenerContext {
    fn new(config: &Config, protocol: Protocol) -> Self {
        Self { protocol, door: Acl::new(config, protocol) }
    }
}

struct Server<S> {
    application: Rc<Application<S>>,
    drain: Drain,
    entrances: Vec<ListenerContext>,
    client_connections: Rc<ClientConnections>,
    /// The peers whose connections begin with a PROXY header.
    proxy_protocol: Option<Peers>,
}

impl<S> Server<S> {
    fn new(config: &Config, listeners: &[Listener], application: Rc<Application<S>>, drain: Drain) -> Self {
        let entrances = listeners.iter().map(|listener| ListenerContext::new(config, listener.protocol)).collect();
        let client_connections = ClientConnections::new(config.limits.max_connections_per_address);
        Self { application, drain, entrances, client_connections, proxy_protocol: config.proxy_protocol.clone() }
    }
}

impl<S, B> Serve for Server<S>
where
    // The bound on `Response` is repeated, because the bound of a supertrait does not constrain `B`.
    S: AppService<B> + Service<Request<Body>, Response = Response<B>>,
    B: ResponseBody,
{
    fn wire_protocol(&self, listener: u16) -> WireProtocol {
        let context = self.entrances.get(usize::from(listener));
        context.map_or(WireProtocol::Nothing, |context| heir::wire_protocol_of(context.protocol))
    }

    fn serve(&self, mut socket: Socket, arrival: Arrival) -> impl Future<Output = ()> + 'static {
        let (application, drain) = (Rc::clone(&self.application), self.drain.clone());
        let context = self.entrances.get(usize::from(arrival.listener));
        let protocol = context.map(|context| context.protocol);
        let (address, is_admitted) = (arrival.origin.address(), arrival.origin.is_admitted());
        let ip = address.map(|address| address.ip());
        let sends_proxy_header = !is_admitted && self.proxy_protocol.as_ref().is_some_and(|peers| peers.contain(ip));
        let client_connections = Rc::clone(&self.client_connections);
        let permitted = is_admitted || context.is_some_and(|context| context.door.permits(address));
        let mut origin = ClientInfo::of_http(address, arrival.origin.is_tls());
        async move {
            let (Some(protocol), true) = (protocol, permitted) else { return };
            if !is_admitted && address.is_some() && application.sheds() {
                socket.ask_wait();
            }
            if sends_proxy_header {
                let time = application.limits.timeouts.header;
                let reading = tokio::select! {
                    reading = preface::read_proxy_header(&mut socket, &mut origin, time) => reading,
                    () = drain.wait_to_move() => return drain.hand_over(socket, &[]).await,
                };
                if let Err(error) = reading {
                    match error.kind() {
                        io::ErrorKind::Other => application.turned_away(
                            protocol,
                            StatusCode::BAD_REQUEST,
                            address,
                            format!("an invalid PROXY header (--proxy-protocol): {error}"),
                        ),
                        io::ErrorKind::TimedOut => application.turned_away(
                            protocol,
                            StatusCode::REQUEST_TIMEOUT,
                            address,
                            "a PROXY header that did not arrive within --header-timeout",
                        ),
                        _ => {}
                    }
                    return log::debug!("a connection ended before its first request: {error}");
                }
            }
            // A proxy connects on behalf of many clients.
            let client = origin.address.map(|address| address.ip());
            let is_proxy = application.trust.as_ref().is_some_and(|trust| trust.peers.contain(client));
            // A connection that a different worker has admitted is not refused and not counted here.
            let Some(_permit) = client_connections.admit(client.filter(|_| !is_proxy && !is_admitted)) else { return };
            if !is_admitted {
                socket.conn().set_origin(PackedOrigin::admitted(origin.address, origin.is_https));
            }
            match protocol {
                // Boxed, so that these tasks do not make the tasks of HTTP connections larger.
                Protocol::FastCgi => Box::pin(fastcgi::serve(socket, origin.address, application, drain)).await,
                Protocol::Scgi => Box::pin(scgi::serve(socket, origin.address, application, drain)).await,
                Protocol::Http => http::serve(socket, origin, application, drain).await,
            }
        }
    }
}

/// Sets up this process's signal handlers and unblocks the signals. Returns a stream that becomes readable on SIGTERM,
/// and a flag. While the flag is set, SIGTERM terminates the process immediately; this applies while the application is
/// starting and no connection is being served.
///
/// The inherited handlers of the master are still installed and do nothing. signal-hook restores the default action of
/// SIGINT and SIGQUIT in a way that lets an application replace the action (with `tokio::signal`, for example).
fn take_signals(drain_timeout: Duration) -> io::Result<(UnixStream, Arc<AtomicBool>)> {
    let (term, wake) = UnixStream::pair()?;
    term.set_nonblocking(true)?;
    let starts = Arc::new(AtomicBool::new(true));
    signal_hook::flag::register_conditional_shutdown(SIGTERM, 0, Arc::clone(&starts))?;
    sys::alarm_on_term(drain_timeout)?;
    signal_hook::low_level::pipe::register(SIGTERM, wake)?;
    for signal in [SIGINT, SIGQUIT] {
        signal_hook::flag::register_conditional_default(signal, Arc::new(AtomicBool::new(true)))?;
    }
    sys::unblock_signals();
    Ok((term, starts))
}

/// Returns false when SIGTERM was received, and true when the master is dead.
async fn wait_for_leave(term: UnixStream, lifeline: OwnedFd, output: &OutputPipes) -> io::Result<bool> {
    let mut term = tokio::net::UnixStream::from_std(term)?;
    let mut lifeline = tokio::net::unix::pipe::Receiver::from_owned_fd(lifeline)?;
    let (mut byte, mut end) = ([0], [0]);
    tokio::select! {
        biased; // when the master dies, the kernel closes its files and then sends TERM as well
        _ = lifeline.read(&mut end) => {
            output.replace();
            log::warn!("the master is dead: this worker drains and exits");
            Ok(true)
        }
        _ = term.read(&mut byte) => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use http_body::Body as HttpBody;
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::app::body::pipe;

    /// Returns the name of the thread that ran the function.
    async fn ask<S, B>(service: &mut S, path: &str, body: Body) -> String
    where
        S: Service<Request<Body>, Response = Response<B>, Error = std::convert::Infallible>,
        B: HttpBody<Error: std::fmt::Debug>,
    {
        let request = Request::get(path).body(body).unwrap();
        let Ok(response) = service.call(request).await;
        let body = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(body.to_vec()).unwrap()
    }

    #[test]
    fn a_function_that_is_declared_quick_and_is_moves_to_the_loops_thread_and_one_slow_run_moves_it_back() {
        let here = std::thread::current().name().unwrap().to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().build_local(LocalOptions::default()).unwrap();
        let mut service = crate::blocking(|request: Request<Body>| {
            assert!(tokio::runtime::Handle::try_current().is_err(), "it may bring its own runtime");
            match request.uri().path() {
                "/panic" => panic!("asked to"),
                "/slow" => {
                    let begun = Instant::now();
                    while begun.elapsed() < Duration::from_millis(2) {}
                }
                _ => {}
            }
            Response::new(std::thread::current().name().unwrap_or_default().to_owned())
        })
        .inline();
        run_in_turns(&runtime, async {
            assert!(ask(&mut service, "/", Body::empty()).await.starts_with("blocking-"), "it is not known yet");
            // On a busy machine, a run may be interrupted and therefore not be quick. Eventually, enough consecutive
            // runs are quick.
            while ask(&mut service, "/", Body::empty()).await != here {}

            let (_writer, reader) = pipe::pipe();
            let with_body = ask(&mut service, "/", Body::stdin(reader, None, 10)).await;
            assert!(with_body.starts_with("blocking-"), "a body that is still coming in needs the loop");

            let panicked = tokio::task::spawn_local(service.call(Request::get("/panic").body(Body::empty()).unwrap()));
            assert!(panicked.await.unwrap_err().is_panic());

            while ask(&mut service, "/", Body::empty()).await != here {}
            ask(&mut service, "/slow", Body::empty()).await;
            assert!(ask(&mut service, "/", Body::empty()).await.starts_with("blocking-"));
        });
    }
}
