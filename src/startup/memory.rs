//! Opens the shared memory at startup: the memory of a former master or the memory that systemd stored, if it fits the
//! configuration; otherwise new memory, or a file.

use std::io::ErrorKind;
use std::path::Path;

use forkyard_shm::{Found, Plan, Segment, SegmentError};
use nix::unistd::{AccessFlags, access};

use super::systemd;
use crate::config::{CacheConfig, Config, SLOTS_PER_WORKER, SPARE_SLOTS, format_size};
use crate::privileges;
use crate::sys::BoxError;
use crate::sys::file_path::{self, Links};
use crate::upgrade::Takeover;

/// The number of scoreboard rows is rounded up to a multiple of this, so that memory of a former server still fits when
/// the number of workers changes a little.
const ROWS_STEP: u32 = 64;

/// Returns the layout of the segment.
pub(crate) fn plan(config: &Config) -> Plan {
    let CacheConfig { bytes, max_entry, .. } = config.cache;
    let rows = config.slots().checked_next_multiple_of(ROWS_STEP).unwrap_or(u32::MAX);
    Plan { cache_bytes: bytes, rows, max_entry, events_bytes: config.events.bytes }
}

/// Returns the highest number of workers for which [`plan`] needs at most `rows` rows.
fn workers_for(rows: u32) -> u32 {
    let usable = rows - rows % ROWS_STEP;
    usable.saturating_sub(SPARE_SLOTS) / SLOTS_PER_WORKER
}

/// Returns a phrase that states which parts start empty if the memory of a former server is not used.
fn contents(config: &Config) -> &'static str {
    match (config.cache.bytes > 0, config.events.bytes > 0) {
        (true, true) => "the cache and the event log start empty",
        (false, true) => "the event log starts empty",
        (_, false) => "the cache starts empty",
    }
}

/// Opens the segment of a former master or of systemd, or creates one.
///
/// # Errors
/// Returns a message for the operator if the memory or the file is not available.
pub(crate) fn open(config: &Config, takeover: Option<&mut Takeover>) -> Result<Segment, BoxError> {
    let Some(takeover) = takeover else { return open_stored(config) };
    let Some((left, file)) = takeover.segment() else { return create(config) };
    if file != config.cache.file {
        log::warn!("{}: --cache-file has changed", contents(config));
        return create(config);
    }
    match Segment::adopt(left, &plan(config)) {
        Ok(segment) => Ok(segment),
        // A file can contain only one segment, and the old workers are still using it.
        Err(SegmentError::TooFewRows { rows, .. }) if file.is_some() => Err(format!(
            "--cache-file: the old workers still use the file, which has room for up to {} workers (choose --workers up to \
             that number to keep the cache, or stop and start the server, and the cache starts empty)",
            workers_for(rows)
        )
        .into()),
        Err(error) if file.is_some() => Err(format!(
            "--cache-file: the old workers still use the file: {error} (stop and start the server instead, and the cache \
             starts empty)"
        )
        .into()),
        Err(error) => {
            log::warn!("{}: the memory of the former master cannot be used: {error}", contents(config));
            create(config)
        }
    }
}

/// Whether systemd should store the memory for the next startup. This is useful only for a cache that is not in a file.
pub(crate) fn is_worth_storing(config: &Config) -> bool {
    config.cache.bytes > 0 && config.cache.file.is_none()
}

fn open_stored(config: &Config) -> Result<Segment, BoxError> {
    match systemd::stored_segment() {
        Some(stored) if is_worth_storing(config) => match Segment::adopt_alone(stored, &plan(config)) {
            Ok(segment) => {
                log::info!(kept_by = "systemd", pages = segment.cache().stats().entries; "cache is warm");
                Ok(segment)
            }
            Err(error) => {
                log::warn!("{}: the memory that systemd stored was dropped: {error}", contents(config));
                create(config)
            }
        },
        Some(_) => {
            log::info!(
                "the cache that systemd stored was dropped: there is no cache now, or it is in a file (--cache-file)"
            );
            create(config)
        }
        None => create(config),
    }
}

/// Creates new memory in place of a damaged segment. If the segment is in a file, the file is unlinked and recreated;
/// the old file exists until the last process that uses it has exited.
///
/// # Errors
/// Fails as [`open`] does.
pub(crate) fn renew(config: &Config) -> Result<Segment, BoxError> {
    if let Some(path) = &config.cache.file {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(format!("cannot remove the damaged cache file {}: {error}", path.display()).into());
            }
            Ok(()) | Err(_) => {}
        }
    }
    create(config)
}

fn create(config: &Config) -> Result<Segment, BoxError> {
    let CacheConfig { file, .. } = &config.cache;
    let plan = plan(config);
    examine_file(config)?;
    if let Some(note) = note_on(config) {
        log::warn!("{note}");
    }
    let Some(path) = file else {
        return Segment::create(&plan).map_err(|error| explain(&error, config).into());
    };
    let (segment, found) = Segment::open(path, &plan).map_err(|error| explain_file(&error, path, config))?;
    if let Some(owner) = config.privileges.owner_of_files() {
        privileges::give(segment.fd(), owner).map_err(|error| {
            format!(
                "--user: cannot change the owner of the cache file {}: {error} (choose another file with --cache-file)",
                path.display()
            )
        })?;
    }
    match found {
        Found::Warm => log::info!(file:% = path.display(), pages = segment.cache().stats().entries; "cache is warm"),
        Found::Nothing => log::info!(file:% = path.display(); "cache is new"),
        Found::Dropped { why } => {
            log::warn!(file:% = path.display(); "{}: the content of the cache file was dropped: {why}", contents(config));
        }
    }
    Ok(segment)
}

/// Checks, without reading the file, whether `--cache-file` names a file that can contain a cache.
///
/// # Errors
/// Returns a message for the operator if the file cannot contain a cache.
pub(crate) fn examine_file(config: &Config) -> Result<(), String> {
    const FLAG: &str = "--cache-file";
    let CacheConfig { bytes, file: Some(path), .. } = &config.cache else { return Ok(()) };
    if *bytes == 0 {
        return Err(format!("{FLAG} has no effect without a cache (set its size with --cache)"));
    }
    let fail = |cause: String| format!("cannot store the cache in {}: {cause}", path.display());
    let Some(found) = file_path::examine(path, Links::Follow, FLAG).map_err(fail)? else { return Ok(()) };
    if let Some(what) = file_path::special(&found) {
        return Err(fail(format!("it is {what} (choose another file with {FLAG})")));
    }
    access(path, AccessFlags::R_OK | AccessFlags::W_OK)
        .map_err(|errno| fail(format!("{} (choose another file with {FLAG})", errno.desc().to_lowercase())))
}

fn explain(error: &SegmentError, config: &Config) -> String {
    let CacheConfig { bytes, .. } = config.cache;
    let remedy = match error {
        SegmentError::EntryTooLarge { .. } => "--cache-max-entry or --cache",
        SegmentError::LogTooSmall { .. } => "--events",
        SegmentError::CacheTooSmall { .. } => "--cache",
        // The flag of the larger consumer of the memory.
        _ if config.events.bytes > bytes => "--events",
        _ => "--cache",
    };
    let what = if bytes > 0 {
        format!("a shared cache of {}", format_size(bytes))
    } else {
        format!("shared memory with an event log of {}", format_size(config.events.bytes))
    };
    format!("cannot create {what}: {error} (choose another size with {remedy})")
}

fn explain_file(error: &SegmentError, path: &Path, config: &Config) -> String {
    format!(
        "cannot store a shared cache of {} in {}: {error} (choose another file with --cache-file, or another size with --cache)",
        format_size(config.cache.bytes),
        path.display()
    )
}

/// Returns a warning if the default size of the cache was reduced.
fn note_on(config: &Config) -> Option<String> {
    let CacheConfig { bytes, shrunk_for, .. } = config.cache;
    let limit = shrunk_for? >> 20;
    Some(format!(
        "the page cache has {}, because the memory limit of this machine, container or unit is {limit} MiB (set its size with \
         --cache)",
        format_size(bytes)
    ))
}

/// Checks, without reserving anything, whether the memory is available. May return a warning. [`examine_file`] reports
/// errors in the path of the file.
///
/// # Errors
/// Returns a message for the operator if the memory is not available.
pub(crate) fn examine(config: &Config) -> Result<Option<String>, String> {
    match &config.cache.file {
        None => plan(config).check_memory().map_err(|error| explain(&error, config))?,
        // If `examine_file` fails, it has already reported the error.
        Some(file) if examine_file(config).is_ok() => {
            Segment::examine(file, &plan(config)).map_err(|error| explain_file(&error, file, config))?;
        }
        Some(_) => {}
    }
    Ok(note_on(config))
}

/// Marks a cache file as complete, so that the next server uses it. A cache in memory exists until the last process
/// that uses it exits.
pub(crate) fn close(segment: Segment) {
    if let Err(error) = segment.close() {
        log::warn!("cannot mark the cache file as complete, the next start may drop its content: {error}");
    }
}
