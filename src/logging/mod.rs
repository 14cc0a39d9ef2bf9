//! The log: where its lines go, and which process writes them.
//!
//! ```text
//! log::info!  in any process ──▶ the log's descriptor ──▶ standard error, or --log-file
//! println!    in a worker or program ──▶ a pipe ──▶ the master ──▶ log::info!("slot=S pid=P | …")
//! ```
//!
//! Every process writes its own lines, each with one write(2): no other process has to be alive to take them. The descriptor is
//! a copy of the master's standard error, or the file that it has opened, since a worker's own standard error is a pipe. Workers
//! need no right to open anything: after USR1 the master opens the files again, and hands them out ([`files`]). A reload may
//! change all of it ([`prepare`]); workers that are there by then keep their levels and the form of their lines.
//!
//! No process ever waits for the log's reader ([`destination`]), and no client can flood the log: a worker logs so many lines
//! a second from each place in the source, and so many bytes a second of the application's ([`rate`]).
//!
//! - [`line`] and [`json`] make lines, and [`access`] those of the access log (pure).
//! - [`line_buffer`] keeps the latter until they are written, also by a worker's heir.
//!
//! Imports the configuration, and nothing of master or worker.

pub(crate) mod access;
mod destination;
pub(crate) mod files;
pub(crate) mod json;
pub(crate) mod line;
pub(crate) mod line_buffer;
pub(crate) mod rate;

use std::io::{self, Write};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use log::{Level, Log, Metadata, Record};

pub(crate) use self::destination::examine;
use self::destination::{Kind, Outcome, Queue};
use self::line::Line;
use self::rate::{ByteLimit, LeftOut, Now, Sample, SiteLimits};
use crate::config::logs::{LogConfig, LogFormat};
use crate::sys;

/// The target of the lines that the application's processes put out.
pub(crate) const OUTPUT: &str = "app";
/// Where those lines are logged.
const OUTPUT_FROM: &str = concat!(env!("CARGO_CRATE_NAME"), "::master::output");
/// The targets of our own lines begin so.
const OURS: &str = concat!(env!("CARGO_CRATE_NAME"), "::");
/// How long a process that ends waits for the readers of its logs, of all together.
const LAST_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// When it began to wait.
static LAST_FLUSH: OnceLock<Instant> = OnceLock::new();

/// The log's descriptor. It is never closed, and the file behind it may change.
static DESCRIPTOR: OnceLock<OwnedFd> = OnceLock::new();
static SINK: Mutex<Sink> = Mutex::new(Sink::new());
static IS_JSON: AtomicBool = AtomicBool::new(false);
/// The logger of this process, unless the application has set one of its own.
static LOGGER: Replaceable = Replaceable(RwLock::new(None));
/// Bytes a second of each process's output; zero is no limit.
static OUTPUT_RATE: AtomicU64 = AtomicU64::new(0);

/// The log, as this process has it.
struct Sink {
    kind: Kind,
    /// Bytes that may wait for the log's reader.
    limit: usize,
    /// It is a file, so that there is standard error as well.
    is_file: bool,
    /// Lines go to standard error in the file's place.
    is_failing: bool,
    queue: Option<Queue>,
    /// What a worker's lines are held to; the master's have no limit.
    limits: Option<Limits>,
    /// Called when there is something to do later: lines wait, or are to be counted.
    on_pending: Option<Box<dyn Fn() + Send>>,
    begun: Option<Instant>,
}

struct Limits {
    sites: SiteLimits,
    application: ByteLimit,
}

impl Sink {
    const fn new() -> Self {
        Self {
            kind: Kind::SharedPipe,
            limit: 0,
            is_file: false,
            is_failing: false,
            queue: None,
            limits: None,
            on_pending: None,
            begun: None,
        }
    }

    /// The log's own clock.
    fn now(&mut self) -> Now {
        self.begun.get_or_insert_with(Instant::now).elapsed()
    }

    fn put(&mut self, line: &[u8]) {
        let (fd, kind, limit) = (fd(), self.kind, self.limit);
        let queue = self.queue.get_or_insert_default();
        match queue.put(fd, kind, line, limit) {
            Outcome::Written => self.goes_on(),
            Outcome::Queued => self.later(),
            Outcome::Lost => {}
            Outcome::Failed(why) if self.is_file => {
                // The disk is full, say. In a worker standard error leads to the master, which may have more luck.
                if !std::mem::replace(&mut self.is_failing, true) {
                    let text =
                        format!("the log file cannot be written: {why}: its lines go to standard error (--log-file)");
                    write_to_standard_error(&own_line(Level::Error, &text));
                }
                write_to_standard_error(line);
            }
            Outcome::Failed(_) => {}
        }
    }

    /// The log is read.
    fn goes_on(&mut self) {
        let lost = self.queue.as_mut().and_then(Queue::take_lost);
        if let Some(lost) = lost {
            let text = format!("lines of the log were lost, as nobody read it (--log-queue) lost={lost}");
            self.put(&own_line(Level::Warn, &text));
        }
        if std::mem::take(&mut self.is_failing) {
            self.put(&own_line(Level::Warn, "the log file is written again"));
        }
    }

    fn later(&self) {
        if let Some(on_pending) = &self.on_pending {
            on_pending();
        }
    }

    /// Whether a line of this place in the source may be logged. If not, it is counted.
    fn admits(&mut self, record: &Record<'_>, message: &str) -> bool {
        let now = self.now();
        let Some(limits) = &mut self.limits else { return true };
        let is_ours = record.module_path().is_some_and(|path| path.starts_with(OURS));
        if is_ours && let (Some(file), Some(line)) = (record.file_static(), record.line()) {
            let sample = || Sample {
                level: record.level(),
                target: record.target().to_owned(),
                message: message.to_owned(),
                more: 0,
            };
            let admits = limits.sites.admits((file, line), now, sample);
            if !admits {
                self.later();
            }
            return admits;
        }
        let admission = limits.application.take(message.len(), now);
        if let Some(left_out) = admission.left_out {
            self.report(left_out);
        }
        if !admission.is_admitted {
            self.later();
        }
        admission.is_admitted
    }

    /// Logs what was left out, as far as it is to be told by `now`. That is a line for each place in the source, and one for the
    /// application's.
    fn report_left_out(&mut self, now: Now) {
        let Some(limits) = &mut self.limits else { return };
        let (samples, left_out) = (limits.sites.tick(now), limits.application.tick(now));
        for Sample { level, target, message, more } in samples {
            self.put(&line(level, &target, &format!("{message} left_out={more}"), false));
        }
        if let Some(left_out) = left_out {
            self.report(left_out);
        }
    }

    fn report(&mut self, LeftOut { lines, bytes }: LeftOut) {
        let text = format!("lines logged by the application were left out (--output-rate) lines={lines} bytes={bytes}");
        self.put(&own_line(Level::Warn, &text));
    }

    /// Does what is due. Returns when to come back, if there is something to come back for.
    fn tick(&mut self) -> Option<Duration> {
        let now = self.now();
        self.report_left_out(now);
        if let Some(queue) = self.queue.as_mut().filter(|queue| !queue.is_empty()) {
            let _ = queue.flush(fd(), self.kind); // the next line that is put shows that it fails
            if queue.is_empty() {
                self.goes_on();
            }
        }
        let waits = self.queue.as_ref().is_some_and(|queue| !queue.is_empty()).then_some(FLUSH_INTERVAL);
        let due = self.limits.as_ref().and_then(|limits| {
            let due = [limits.sites.due(), limits.application.due()].into_iter().flatten().min()?;
            Some(due.saturating_sub(now))
        });
        [waits, due].into_iter().flatten().min()
    }
}

/// How often a worker tries to write what waits.
const FLUSH_INTERVAL: Duration = Duration::from_millis(100);

fn sink() -> MutexGuard<'static, Sink> {
    SINK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A logger that can be exchanged for one with other filters. Forks happen on the only thread, so that no child inherits
/// the lock from a thread that it has not.
struct Replaceable(RwLock<Option<env_logger::Logger>>);

impl Replaceable {
    fn with<T>(&self, ask: impl FnOnce(&env_logger::Logger) -> T) -> Option<T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(ask)
    }

    fn set(&self, logger: env_logger::Logger) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(logger);
    }
}

impl Log for Replaceable {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.with(|logger| logger.enabled(metadata)).unwrap_or(false)
    }

    fn log(&self, record: &Record<'_>) {
        self.with(|logger| logger.log(record));
    }

    fn flush(&self) {}
}

/// Starts the log.
///
/// # Errors
/// A sentence for the operator: the file cannot be opened.
pub(crate) fn start(config: &LogConfig) -> Result<(), String> {
    let opened = match &config.file {
        Some(path) => Some(destination::open(path, "--log-file")?),
        None => sys::descriptor(2),
    };
    if let Some(opened) = opened {
        open_as_log(opened);
    }
    describe(config);
    // An application's own logger, if it has set one, stays.
    if log::set_logger(&LOGGER).is_ok() {
        filter(config);
    }
    Ok(())
}

/// Another configuration of the log, of which all that can fail is done.
#[derive(Debug)]
pub(crate) struct Change {
    config: LogConfig,
    /// What the log's descriptor is to stand for from now on, if that is something else.
    opened: Option<OwnedFd>,
}

/// Opens what another configuration needs. `running` is the one that holds.
///
/// # Errors
/// A sentence for the operator.
pub(crate) fn prepare(running: &LogConfig, config: &LogConfig) -> Result<Change, String> {
    let opened = match &config.file {
        same if *same == running.file => None,
        Some(path) => Some(destination::open(path, "--log-file")?),
        None => Some(sys::descriptor(2).ok_or("--log-file: standard error is closed (name a file)")?),
    };
    Ok(Change { config: config.clone(), opened })
}

/// Has this process log by another configuration. True if the log goes somewhere else now.
pub(crate) fn change(Change { config, opened }: Change) -> bool {
    let moved = opened.is_some();
    if let Some(opened) = opened {
        if DESCRIPTOR.get().is_none() {
            // Standard error was closed at the start: it is not to become the log now.
            open_as_log(opened);
        } else if let Err(error) = replace(opened) {
            log::error!("the log goes on where it was: {error} (--log-file)");
        }
    }
    describe(&config);
    if LOGGER.with(|_| ()).is_some() {
        filter(&config);
    }
    moved
}

fn open_as_log(opened: OwnedFd) {
    let (kind, own) = Kind::of(opened.as_fd());
    DESCRIPTOR.get_or_init(|| own.unwrap_or(opened));
    sink().kind = kind;
}

fn describe(config: &LogConfig) {
    let mut sink = sink();
    sink.is_file = config.file.is_some();
    sink.limit = usize::try_from(config.queue).unwrap_or(usize::MAX);
    IS_JSON.store(config.format == LogFormat::Json, Ordering::Relaxed);
    OUTPUT_RATE.store(config.output_rate, Ordering::Relaxed);
}

fn filter(config: &LogConfig) {
    let logger = logger(config);
    log::set_max_level(logger.filter());
    LOGGER.set(logger);
}

fn logger(config: &LogConfig) -> env_logger::Logger {
    env_logger::Builder::new()
        .parse_filters(config.filters.as_str())
        .target(env_logger::Target::Pipe(Box::new(Destination)))
        .format(|out, record| {
            let message = record.args().to_string();
            if !sink().admits(record, &message) {
                return Ok(());
            }
            let is_output = record.target() == OUTPUT && record.module_path() == Some(OUTPUT_FROM);
            out.write_all(&line(record.level(), record.target(), &message, is_output))
        })
        .build()
}

fn line(level: Level, target: &str, message: &str, is_output: bool) -> Vec<u8> {
    line_at(&format!("{:.3}", Timestamp::now()), level, target, message, is_output)
}

fn line_at(time: &str, level: Level, target: &str, message: &str, is_output: bool) -> Vec<u8> {
    let line = Line { time, level, pid: std::process::id(), target, message, is_output };
    let mut bytes = Vec::with_capacity(message.len() + 128);
    if is_json() {
        line.write_json(&mut bytes);
    } else {
        line.write_text(&mut bytes);
    }
    bytes
}

/// A line as the log would have it, with this time.
pub(crate) fn line_with(time: &str, level: Level, message: &str) -> Vec<u8> {
    line_at(time, level, env!("CARGO_CRATE_NAME"), message, false)
}

/// Whether the log is a file, so that whoever looks at standard error does not see it.
pub(crate) fn is_file() -> bool {
    sink().is_file
}

/// A line about the log itself.
fn own_line(level: Level, message: &str) -> Vec<u8> {
    line(level, module_path!(), message, false)
}

/// For a child that was just forked and is to be a worker: what waits is its master's to write; and from now on its lines have limits.
pub(crate) fn begin_worker(config: &LogConfig) {
    let mut sink = sink();
    sink.queue = None;
    sink.on_pending = None;
    let (sites, application) = (SiteLimits::new(config.rate), ByteLimit::new(config.output_rate));
    sink.limits = Some(Limits { sites, application });
}

/// Has `call` called whenever [`tick`] is to be called soon.
pub(crate) fn on_pending(call: impl Fn() + Send + 'static) {
    sink().on_pending = Some(Box::new(call));
}

/// Writes what waits, and counts what was left out, as far as that is due. Returns when to call it again, if there is anything left.
pub(crate) fn tick() -> Option<Duration> {
    sink().tick()
}

/// The descriptor to be watched until it can be written, if lines wait.
pub(crate) fn waits_for() -> Option<BorrowedFd<'static>> {
    sink().queue.as_ref().filter(|queue| !queue.is_empty()).map(|_| fd())
}

/// If the log's reader is slow: for how long those that fill it should be slowed down. None if it has stopped, for then lines are lost
/// rather than the service.
pub(crate) fn is_slow_for() -> Option<Duration> {
    sink().queue.as_ref().and_then(Queue::is_slow_for)
}

/// How long this process, which ends, may still wait for readers of its logs. Without one deadline for all, a stop would take a second
/// for each log and process.
pub(crate) fn last_flush_timeout() -> Duration {
    LAST_FLUSH_TIMEOUT.saturating_sub(LAST_FLUSH.get_or_init(Instant::now).elapsed())
}

/// Before this process ends: writes what waits, if its reader has not stopped, and reads it within a second.
pub(crate) fn finish() {
    let mut sink = sink();
    sink.report_left_out(Now::MAX);
    let kind = sink.kind;
    if let Some(queue) = sink.queue.as_mut().filter(|queue| !queue.is_empty()) {
        let limit = queue.is_slow_for().unwrap_or_default().min(last_flush_timeout());
        let _ = destination::write_lines_within(fd(), kind, &queue.take(), limit); // nobody is left to be told
        sink.goes_on();
    }
}

/// Bytes a second of each process's output that are logged; zero is no limit.
pub(crate) fn output_rate() -> u64 {
    OUTPUT_RATE.load(Ordering::Relaxed)
}

/// The limits that hold, for the log.
pub(crate) fn describe_limits() -> String {
    format!("queue={} output_rate={}", sink().limit, output_rate())
}

/// The log's descriptor, which children keep.
pub(crate) fn descriptor() -> RawFd {
    fd().as_raw_fd()
}

fn fd() -> BorrowedFd<'static> {
    static STANDARD_ERROR: OnceLock<io::Stderr> = OnceLock::new();
    match DESCRIPTOR.get() {
        Some(fd) => fd.as_fd(),
        None => STANDARD_ERROR.get_or_init(io::stderr).as_fd(),
    }
}

/// A copy of the log's descriptor for the standard output and error of other code, for which writes wait as ever.
///
/// # Errors
/// If no descriptor can be had.
pub(crate) fn blocking_copy() -> io::Result<OwnedFd> {
    destination::blocking_copy(fd())
}

/// Whether lines are objects: then nothing else goes to standard error.
pub(crate) fn is_json() -> bool {
    IS_JSON.load(Ordering::Relaxed)
}

/// Opens the file again, if the log is one.
///
/// # Errors
/// A sentence for the operator; the log goes on as before.
pub(crate) fn reopen(path: &Path) -> Result<(), String> {
    let opened = destination::open(path, "--log-file")?;
    replace(opened).map_err(|error| format!("--log-file: {}: {error}", path.display()))
}

/// Has the log go to `opened` from now on, under the same number.
fn replace(opened: OwnedFd) -> io::Result<()> {
    let mut sink = sink();
    let (kind, own) = Kind::of(opened.as_fd());
    sys::replace(fd().as_raw_fd(), &own.unwrap_or(opened))?;
    sink.kind = kind;
    Ok(())
}

/// Text that is for standard error, whatever the log is. It does not wait for a reader either.
pub(crate) fn to_standard_error(text: &[u8]) {
    if DESCRIPTOR.get().is_some() && !is_file() {
        return sink().put(text); // the log is standard error
    }
    write_to_standard_error(text);
}

/// What cannot be written at once is lost. Must not: lock the sink.
fn write_to_standard_error(text: &[u8]) {
    let stderr = io::stderr();
    let (kind, own) = Kind::of(stderr.as_fd());
    let fd = own.as_ref().map_or(stderr.as_fd(), OwnedFd::as_fd);
    let _ = destination::write_lines(fd, kind, text); // who logs can do nothing about it
}

/// Writes to the log, whatever that is at the moment.
struct Destination;

impl Write for Destination {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !line.is_empty() {
            sink().put(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_waits_of_a_process_that_ends_have_one_deadline() {
        let (_read, write) = nix::unistd::pipe().unwrap();
        let (kind, own) = Kind::of(write.as_fd());
        let fd = own.as_ref().unwrap_or(&write).as_fd();
        let lines = [b'\n'; 1 << 20];
        let outcome = destination::write_lines_within(fd, kind, &lines, last_flush_timeout()).1;
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::WouldBlock, "nobody reads");
        assert_eq!(last_flush_timeout(), Duration::ZERO, "the next one has been waited for too");
    }
}
