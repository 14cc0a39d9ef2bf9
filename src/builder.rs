//! From a command line to a running master: what [`crate::run`] and the `forkyard` command have in common.

use std::error::Error;
use std::os::fd::RawFd;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use forkyard_shm::{Plan, Segment};
use http::{Request, Response};
use http_body::Body as HttpBody;
use tower_service::Service;

use crate::body::Body;
use crate::cgi_call;
use crate::cli;
use crate::config::{CacheConfig, Config, Program};
use crate::context::Context;
use crate::heritage::WorkerMain;
use crate::listen::Listener;
use crate::master::upgrade::{Origin, Takeover};
use crate::master::{self, Launch, Start};
use crate::{banner, memory, sockets, sys, worker};

type BoxError = Box<dyn Error + Send + Sync>;
/// Answers one CGI request.
type CgiMain = Box<dyn Fn(&Config, Segment) -> Result<(), BoxError>>;
type Preload = Box<dyn FnOnce() -> Result<(), BoxError>>;

/// What [`crate::run`] does, with more to choose.
///
/// ```no_run
/// use std::process::ExitCode;
/// use forkyard::http::{Request, Response};
///
/// fn main() -> ExitCode {
///     forkyard::Builder::app(|cx| {
///         let slot = cx.slot();
///         forkyard::blocking(move |_: Request<forkyard::Body>| Response::new(format!("worker {slot}\n")))
///     })
///     .preload(|| Ok(()))
///     .run()
/// }
/// ```
#[must_use = "nothing is served before `run`"]
pub struct Builder {
    worker: WorkerMain,
    cgi: CgiMain,
    preload: Option<Preload>,
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder").field("preload", &self.preload.is_some()).finish_non_exhaustive()
    }
}

impl Builder {
    /// `factory` makes the application, once in each worker, after the fork: the place for threads, database
    /// connections and whatever else a fork would not survive. It runs inside the worker's tokio runtime.
    ///
    /// The application is any tower service: an `axum::Router`, or what [`crate::blocking`] makes of a function.
    pub fn app<F, S, B>(factory: F) -> Self
    where
        F: Fn(Context) -> S + Sync + 'static,
        S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
        S::Error: Into<BoxError>,
        B: HttpBody + 'static,
        B::Error: Into<BoxError>,
    {
        let factory = Rc::new(factory);
        let of_cgi = Rc::clone(&factory);
        Self {
            worker: Box::new(move |heritage| worker::run(&*factory, heritage)),
            cgi: Box::new(move |config, segment| worker::cgi::run(&*of_cgi, config, segment)),
            preload: None,
        }
    }

    /// `load` runs once in the master, before the first fork: what it reads into memory (statics, say), all
    /// workers share, copy on write; files that it opens stay open in them (as do those that `main` has open).
    ///
    /// It must leave no thread running and must not use tokio: neither survives a fork, and the master
    /// refuses to fork with more than one thread.
    pub fn preload(mut self, load: impl FnOnce() -> Result<(), BoxError> + 'static) -> Self {
        self.preload = Some(Box::new(load));
        self
    }

    /// Reads this program's command line and serves until it is told to stop.
    ///
    /// If a web server has started it as a CGI program, it answers that one request instead, in this process.
    ///
    /// Returns 0 if it was asked to stop, or has answered; 1 after a failure, 2 for a wrong command line; what went wrong is
    /// on standard error.
    pub fn run(self) -> ExitCode {
        let begun = Instant::now();
        let Self { worker, cgi, preload } = self;
        let arguments = cgi_call::trusted(std::env::args_os().collect());
        finish(cli::parse_linked(arguments), |request| {
            if request.cgi {
                return answer(&request.config, &request.log_level, &cgi, preload);
            }
            serve(request.config, &request.log_level, Launch::Worker(worker), preload, None, begun)
        })
    }
}

/// What the `forkyard` binary does: `forkyard run … -- COMMAND`.
#[must_use]
pub fn command_line() -> ExitCode {
    let begun = Instant::now();
    finish(cli::parse_forkyard(std::env::args_os().collect()), |request| {
        let (command, direct) = request.program.ok_or("no COMMAND")?;
        let program = Program::find(&command)?;
        let note = (!direct).then_some(
            "this version has no gateway: the program accepts for itself, as with --direct, and has no page cache",
        );
        serve(request.config, &request.log_level, Launch::Program(program), None, note, begun)
    })
}

fn finish(
    request: Result<cli::Request, clap::Error>,
    serve: impl FnOnce(cli::Request) -> Result<bool, BoxError>,
) -> ExitCode {
    let request = match request {
        Ok(request) => request,
        Err(error) => {
            // --help and --version come this way too, with status 0.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match serve(request) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            banner::complain(&"every worker asked not to be replaced (exit status 125)");
            ExitCode::FAILURE
        }
        Err(error) => {
            banner::complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// bind, map, preload, fork, supervise.
fn serve(
    config: Config,
    log_level: &str,
    launch: Launch,
    preload: Option<Preload>,
    note: Option<&str>,
    begun: Instant,
) -> Result<bool, BoxError> {
    let opened = sys::own_descriptors()?;
    start_logging(log_level);
    let mut takeover = Takeover::find()?;
    let origin = takeover.as_ref().map_or_else(Origin::record, |left| Ok(left.saved.origin.clone()))?;
    let mut listeners: Vec<Listener> = Vec::new();
    let blocking = matches!(launch, Launch::Program(_));
    let outcome = sockets::open(&config, blocking, takeover.as_mut(), &mut listeners)
        .map_err(BoxError::from)
        .and_then(|()| memory::open(&config, takeover.as_mut()))
        .and_then(|segment| Ok((segment, run_preload(preload)?)))
        .and_then(|pair| Ok(sys::expect_one_thread().map(|()| pair)?));
    if takeover.as_ref().is_some_and(|left| left.check) {
        // The running master has the others still.
        listeners.iter().filter(|listener| !listener.is_adopted()).for_each(Listener::remove_file);
        return outcome.map(|_| banner::can_take_over());
    }
    let listeners: Arc<[Listener]> = listeners.into();
    let outcome = outcome.and_then(|(segment, preloaded)| {
        if takeover.is_none() {
            let program = match &launch {
                Launch::Program(program) => Some(program.path.to_string_lossy().into_owned()),
                Launch::Worker(_) => None,
            };
            banner::show(&config, &listeners, program.as_deref());
        }
        if let Some(note) = note {
            log::warn!("{note}");
        }
        let application = [opened, preloaded].concat().into();
        let kept = segment.clone();
        let start = Start { begun, origin, takeover };
        let ended = master::run(Arc::new(config), Arc::clone(&listeners), segment, launch, application, start);
        memory::close(kept);
        ended.map_err(|error| format!("the master cannot run: {error}").into())
    });
    listeners.iter().for_each(Listener::remove_file);
    outcome
}

/// The one request of a CGI call.
fn answer(config: &Config, log_level: &str, cgi: &CgiMain, preload: Option<Preload>) -> Result<bool, BoxError> {
    start_logging(log_level);
    run_preload(preload)?;
    cgi(config, join_segment(config)?)?;
    Ok(true)
}

/// The cache of a CGI call: the one in the file, which it shares with other calls and with a server. A page without the
/// cache is better than none.
fn join_segment(config: &Config) -> Result<Segment, BoxError> {
    let CacheConfig { bytes, max_entry, file } = &config.cache;
    if let Some(path) = file.as_ref().filter(|_| *bytes > 0) {
        let plan = Plan { cache_bytes: *bytes, rows: config.slots(), max_entry: *max_entry };
        match Segment::join(path, &plan) {
            Ok(segment) => return Ok(segment),
            Err(error) => log::error!("no cache: {error} file={}", path.display()),
        }
    }
    Ok(Segment::create(&Plan { rows: 1, ..Plan::default() })?)
}

fn start_logging(filters: &str) {
    use std::io::Write as _;
    // An application's own logger, if it has set one, stays.
    let _ = env_logger::Builder::new()
        .parse_filters(filters)
        .format(|out, record| {
            let (time, pid) = (out.timestamp_millis(), std::process::id());
            writeln!(out, "{time} {:<5} [{pid}] {}", record.level(), record.args())
        })
        .try_init();
}

/// Runs the application's preload, and returns the descriptors that it left open.
fn run_preload(preload: Option<Preload>) -> Result<Vec<RawFd>, BoxError> {
    let Some(preload) = preload else { return Ok(Vec::new()) };
    let before = sys::open_descriptors()?;
    preload().map_err(|error| format!("the application cannot preload: {error}"))?;
    let mut after = sys::open_descriptors()?;
    after.retain(|fd| !before.contains(fd));
    Ok(after)
}
