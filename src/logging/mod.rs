//! The log: where its lines go, and who writes them.
//!
//! ```text
//! log::info!  in any process ──▶ the log's descriptor ──▶ standard error, or --log-file
//! println!    in a worker or program ──▶ a pipe ──▶ the master ──▶ log::info!("slot=S pid=P | …")
//! ```
//!
//! Every process writes its own lines, each with one write(2): nobody has to be alive to take them. The descriptor is a copy
//! of the master's standard error, or the file that it has opened, since a worker's own standard error is a pipe. Workers
//! need no right to open anything: after USR1 the master opens the files again, and hands them out ([`files`]). A reload may
//! change all of it ([`prepare`]); workers that are there by then keep their levels and the form of their lines.
//!
//! - [`line`] and [`json`] make lines, and [`access`] those of the access log (pure).
//! - [`line_buffer`] keeps the latter until they are written, also by a worker's heir.
//!
//! Imports the configuration, and nothing of master or worker.

pub(crate) mod access;
pub(crate) mod files;
pub(crate) mod json;
mod line;
pub(crate) mod line_buffer;

use std::io::{self, Write};
use std::os::fd::{AsRawFd as _, IntoRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{PoisonError, RwLock};

use log::{Log, Metadata, Record};

use self::line::Line;
use crate::config::logs::{LogConfig, LogFormat};
use crate::sys;

/// The target of the lines that the application's processes put out.
pub(crate) const OUTPUT: &str = "app";

/// The log's descriptor. It is never closed, and what it stands for may change.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(2);
/// It is a file, so that there is standard error as well.
static IS_FILE: AtomicBool = AtomicBool::new(false);
static IS_JSON: AtomicBool = AtomicBool::new(false);
/// The logger of this process, unless the application has set one of its own.
static LOGGER: Replaceable = Replaceable(RwLock::new(None));

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
        Some(path) => Some(files::open(path, "--log-file")?),
        None => sys::descriptor(2),
    };
    if let Some(opened) = opened {
        DESCRIPTOR.store(opened.into_raw_fd(), Ordering::Relaxed);
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
        Some(path) => Some(files::open(path, "--log-file")?),
        None => Some(sys::descriptor(2).ok_or("--log-file: standard error is closed (name a file)")?),
    };
    Ok(Change { config: config.clone(), opened })
}

/// Has this process log by another configuration. True if the log goes somewhere else now.
pub(crate) fn change(Change { config, opened }: Change) -> bool {
    let moved = opened.is_some();
    if let Some(opened) = opened {
        if descriptor() == 2 {
            // Standard error was closed at the start: it is not to become the log now.
            DESCRIPTOR.store(opened.into_raw_fd(), Ordering::Relaxed);
        } else if let Err(error) = sys::replace(descriptor(), &opened) {
            log::error!("the log goes on where it was: {error} (--log-file)");
        }
    }
    describe(&config);
    if LOGGER.with(|_| ()).is_some() {
        filter(&config);
    }
    moved
}

fn describe(config: &LogConfig) {
    IS_FILE.store(config.file.is_some(), Ordering::Relaxed);
    IS_JSON.store(config.format == LogFormat::Json, Ordering::Relaxed);
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
            let (time, message) = (out.timestamp_millis().to_string(), record.args().to_string());
            let is_output = record.target() == OUTPUT && record.module_path() == Some(OUTPUT_FROM);
            let (level, target, pid) = (record.level(), record.target(), std::process::id());
            let line = Line { time: &time, level, pid, target, message: &message, is_output };
            let mut bytes = Vec::with_capacity(message.len() + 128);
            if is_json() {
                line.write_json(&mut bytes)
            } else {
                line.write_text(&mut bytes)
            }
            out.write_all(&bytes)
        })
        .build()
}

/// Where the lines of [`OUTPUT`] are logged.
const OUTPUT_FROM: &str = concat!(env!("CARGO_CRATE_NAME"), "::master::output");

/// The log's descriptor, which children keep.
pub(crate) fn descriptor() -> RawFd {
    DESCRIPTOR.load(Ordering::Relaxed)
}

/// Whether lines are objects: then nothing else goes to standard error.
pub(crate) fn is_json() -> bool {
    IS_JSON.load(Ordering::Relaxed)
}

/// Opens the log file again.
///
/// # Errors
/// A sentence for the operator; the log goes on as before.
pub(crate) fn reopen(path: &Path) -> Result<(), String> {
    let opened = files::open(path, "--log-file")?;
    sys::replace(descriptor(), &opened).map_err(|error| format!("--log-file: {}: {error}", path.display()))
}

/// Writes to the log's descriptor, whatever that is at the moment.
struct Destination;

impl Write for Destination {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let written = sys::write_all(descriptor(), line);
        if written.is_err() && IS_FILE.load(Ordering::Relaxed) {
            // The disk is full, say. In a worker that leads to the master, who may have more luck.
            let _ = sys::write_all(io::stderr().as_raw_fd(), line);
        }
        Ok(line.len()) // who logs can do nothing about it
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
