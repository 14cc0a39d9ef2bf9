//! Writes the death record of each process: one log line with all known facts about the death.

use forkyard_shm::{Scoreboard, Snapshot, State};
use log::kv::{Source, ToValue as _, Value};
use log::{Level, Record};
use nix::unistd::Pid;

use super::child::Child;
use super::programs;
use crate::config::in_ms;
use crate::config::privileges::ResourceLimit;
use crate::master::status::line_of;
use crate::sys::Ending;

/// Maximum number of in-flight requests to list.
const NAMED: usize = 4;

/// The facts about the death of a process, and its death record.
#[derive(Debug)]
pub(crate) struct Postmortem {
    /// Whether the worker failed, rather than exiting on request.
    pub(crate) is_crash: bool,
    /// The requests that were in flight.
    pub(crate) in_flight: Vec<String>,
    /// Whether `in_flight` is complete.
    pub(crate) complete: bool,
    /// The request that the crashing thread was working on.
    pub(crate) culprit: Option<String>,
    /// The requests that all threads were working on; `None` if they are unknown, or if the crashing thread is known to have been working
    /// on no request.
    pub(crate) running: Option<Vec<String>>,
    /// Whether the code that was running caused the death, rather than a limit on the whole process or the system.
    pub(crate) by_itself: bool,
    /// Where the process crashed; empty if that is unknown.
    pub(crate) trace: String,
    pub(crate) death_record: DeathRecord,
    /// Number of requests that the process had served.
    pub(crate) served: u64,
}

/// The log line, and the process that it describes.
#[derive(Debug, Default)]
pub(crate) struct DeathRecord {
    /// `None` if the process could not be created.
    pub(crate) pid: Option<Pid>,
    pub(crate) line: String,
    /// The process's own message about its death.
    pub(crate) last_words: String,
    /// A hint for the operator about this kind of death.
    pub(crate) hint: String,
    /// The last lines of the output of a program.
    pub(crate) last_lines: Vec<String>,
    /// The same for deaths that differ only in the process and its age.
    pub(crate) kind: String,
}

/// Signals by which the kernel and the standard library terminate a process for its own actions. SIGKILL is not among
/// them: if an operator has sent it, the process is not to blame. `oom.rs` detects a SIGKILL that the kernel sent
/// because memory ran out.
const CRASHES: [i32; 9] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGABRT,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGSYS,
    libc::SIGTRAP,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];

/// Whether the code that was running caused the death. If a limit on the whole process or the system was reached, the
/// work at that moment is only weak evidence.
fn is_by_itself(ending: Ending) -> bool {
    ![libc::SIGKILL, libc::SIGXCPU].map(Ending::Signaled).contains(&ending)
}

/// Whether the request that an app process was serving is the likely cause of its death.
pub(crate) fn is_caused_by_request(ending: Ending) -> bool {
    match ending {
        Ending::Exited(status) => status != 0,
        Ending::Signaled(signal) => CRASHES.contains(&signal),
    }
}

fn is_crash(ending: Ending, child: &Child, no_memory: bool) -> bool {
    let unasked = match ending {
        Ending::Exited(status) => ![0, 125].contains(&status),
        Ending::Signaled(signal) => CRASHES.contains(&signal) || no_memory,
    };
    child.is_worker() && (child.hung || (unasked && !child.asked_to_leave && child.sent_by.is_none()))
}

/// Whether the process had not become ready. Must be called before the process's row is marked as dead.
pub(crate) fn is_starting(pid: Pid, child: &Child, scoreboard: &Scoreboard) -> bool {
    match child.has_started() {
        Some(started) => !started,
        None => scoreboard
            .read(child.slot)
            .is_none_or(|row| i32::try_from(row.pid) != Ok(pid.as_raw()) || row.state == State::Starting),
    }
}

/// Returns a hint that lists the limits that may have prevented startup. The hint is empty if the last words contain a
/// different cause.
fn hint_on_limits(limits: &[ResourceLimit], last_words: &str) -> String {
    // Messages from the kernel, the standard library and the loader.
    const OF_LIMITS: [&str; 8] =
        ["os error 11", "os error 12", "rror 24", "emory", "Too many open", "map ", "cannot allocate", "Resource temp"];
    let vital: Vec<String> =
        limits.iter().filter(|limit| limit.is_vital()).map(|limit| format!("--rlimit {limit}")).collect();
    let is_likely = last_words.is_empty() || OF_LIMITS.iter().any(|words| last_words.contains(words));
    if vital.is_empty() || !is_likely {
        return String::new();
    }
    format!("a limit may be too low for it to start: {}", vital.join(", "))
}

/// Lists the requests that a worker was serving, with their ages.
fn in_flight(row: &Snapshot) -> String {
    let named = row.serving.iter().take(NAMED);
    let mut named: Vec<String> = named.map(|one| format!("{} {}", one.what, in_ms(one.since))).collect();
    let more = usize::try_from(row.in_flight).unwrap_or(usize::MAX).saturating_sub(named.len());
    if more > 0 {
        named.push(format!("{more} more"));
    }
    named.join(", ")
}

/// Returns the field of the log line that lists the requests that the process was running: those of an app process, or those that the
/// threads of a worker were running.
fn requests_at_its_end(
    culprit: Option<&str>,
    (of_app, running): (&[String], Option<&[String]>),
    ending: Ending,
    was_sent: bool,
) -> (&'static str, Option<String>) {
    if !of_app.is_empty() {
        return ("at_work", Some(listed(of_app)));
    }
    match (culprit, running, ending) {
        (Some(at_work), _, Ending::Signaled(_)) if was_sent => ("at_work", Some(at_work.to_owned())),
        (Some(culprit), _, Ending::Signaled(_)) => ("crashed_in", Some(culprit.to_owned())),
        (Some(culprit), _, Ending::Exited(_)) => ("exited_in", Some(culprit.to_owned())),
        (None, Some(running), _) => ("at_work", Some(running[..running.len().min(NAMED)].join(", "))),
        (None, None, _) => ("at_work", None),
    }
}

/// Lists the first of several requests.
fn listed(requests: &[String]) -> String {
    match requests.len().saturating_sub(NAMED) {
        0 => requests.join(", "),
        more => format!("{}, {more} more", requests[..NAMED].join(", ")),
    }
}

/// Logs an event. Returns the log line, for control clients.
fn log_event(level: Level, event: &str, fields: &dyn Source) -> String {
    if level <= log::STATIC_MAX_LEVEL && level <= log::max_level() {
        log::logger().log(
            &Record::builder()
                .args(format_args!("{event}"))
                .level(level)
                .target(module_path!())
                .module_path_static(Some(module_path!()))
                .key_values(fields)
                .build(),
        );
    }
    line_of(event, fields)
}

/// Logs the death. `no_memory` is the cause if the kernel killed the process because memory ran out. `limits` contains
/// the limits from `--rlimit` if the process had not become ready. `noun` is what the process is called. The dead process wrote the scoreboard row, so the
/// row's content is bounded and used as text only.
pub(crate) fn publish(
    pid: Pid,
    ending: Ending,
    child: Child,
    no_memory: Option<&str>,
    scoreboard: &Scoreboard,
    limits: Option<&[ResourceLimit]>,
    noun: &str,
) -> Postmortem {
    let (slot, generation, lived) = (child.slot, child.generation, in_ms(child.since.elapsed()));
    // If the worker was hanging, the master itself sent the signal.
    let sent_by = child.sent_by.filter(|_| !child.hung);
    // The row belongs to the child only if the child had claimed it. External programs have no row.
    let row = scoreboard.read(slot).filter(|row| i32::try_from(row.pid) == Ok(pid.as_raw()));
    let served = row.as_ref().map(|row| row.requests);
    let in_flight = row.as_ref().filter(|row| row.in_flight > 0).map(in_flight);
    let is_crash = is_crash(ending, &child, no_memory.is_some());
    let by_itself = is_by_itself(ending) || child.hung;
    let is_as_asked = matches!(ending, Ending::Exited(_)) && child.asked_to_leave;
    let running = row.as_ref().filter(|row| row.culprit.is_none() && !row.no_culprit && row.all_running);
    let running = running.map(|row| row.running.clone()).filter(|running| !running.is_empty() && !is_as_asked);
    let culprit = row.as_ref().and_then(|row| row.culprit.as_deref());
    let at_work = (child.at_work(), running.as_deref());
    let (key, requests) = requests_at_its_end(culprit, at_work, ending, sent_by.is_some());
    // A program that hangs is sent SIGTERM, whatever its stop signal is.
    let request = if child.hung { libc::SIGTERM } else { child.stop_signal as i32 };
    let as_asked = (child.asked_to_leave || child.hung && !child.is_worker())
        && (ending == Ending::Exited(0) || [request, libc::SIGKILL].map(Ending::Signaled).contains(&ending));
    let (is_worker, was_asked) = (child.is_worker(), child.asked_to_leave);
    let has_timed_out = child.hung && !is_worker;
    let is_late = was_asked && is_worker && ending == Ending::Signaled(libc::SIGALRM);
    let never_started = child.has_started() == Some(false);
    let failed = ending != Ending::Exited(0) || never_started;
    let hint = if never_started && !as_asked { programs::hint(ending) } else { "" };
    let last_lines = if is_worker { Vec::new() } else { child.last_lines.lines() };
    let was_late = limits.is_some() && ending == Ending::Signaled(libc::SIGKILL);
    let answer = child.answer_to_ready_check().filter(|_| was_late);
    let (last_words, trace) = child.mark_dead();
    let last_words = answer.unwrap_or(last_words);
    let said = Some(&last_words).filter(|words| !words.is_empty() && failed && (!as_asked || was_late));
    let by_limit = failed && !as_asked && !was_asked && no_memory.is_none() && sent_by.is_none();
    let of_limits = limits.filter(|_| by_limit).map_or_else(String::new, |limits| hint_on_limits(limits, &last_words));
    // A loader that cannot allocate memory exits with 127, as does a shell that does not find a command.
    let hint =
        if hint.is_empty() || !(of_limits.is_empty() || last_words.is_empty()) { of_limits } else { hint.to_owned() };
    let hint = if is_late { "it did not finish in time (--drain-timeout)".to_owned() } else { hint };
    let hint = if has_timed_out { "it did not answer a request in time (--request-timeout)".to_owned() } else { hint };
    let (level, event) = match ending {
        _ if is_late => (Level::Warn, "terminated itself"),
        _ if as_asked => (Level::Info, "exited"),
        Ending::Exited(0) if in_flight.is_none() => (Level::Info, "exited on its own"),
        Ending::Exited(0) => (Level::Warn, "exited on its own while it served requests"),
        Ending::Exited(125) if limits.is_none() => (Level::Warn, "exited and asked not to be replaced"),
        Ending::Exited(_) | Ending::Signaled(_) => (Level::Warn, "died"),
    };
    let line = log_event(
        level,
        &format!("{noun} {event}"),
        &[
            ("slot", Value::from(slot)),
            ("pid", pid.as_raw().into()),
            ("gen", generation.into()),
            ("status", ending.exit_status().to_value()),
            ("signal", ending.signal_name().to_value()),
            ("cause", no_memory.to_value()),
            ("sent_by", sent_by.to_value()),
            ("lived", lived.to_value()),
            ("served", served.or(is_worker.then_some(0)).to_value()),
            ("in_flight", in_flight.to_value()),
            (key, requests.to_value()),
            ("said", said.to_value()),
            ("hint", Some(&hint).filter(|hint| !hint.is_empty()).to_value()),
            ("trace", Some(&trace).filter(|trace| !trace.is_empty()).to_value()),
        ],
    );
    let kind = format!("{noun} {event} {ending:?} {generation} {last_lines:?} {last_words} {hint}");
    let death_record = DeathRecord { pid: Some(pid), line, last_words, hint, last_lines, kind };
    let (in_flight, complete, culprit) = row.map_or((Vec::new(), true, None), |row| {
        let complete = usize::try_from(row.in_flight) == Ok(row.serving.len());
        (row.serving.into_iter().map(|one| one.what).collect(), complete, row.culprit)
    });
    let served = served.unwrap_or(0);
    Postmortem { is_crash, in_flight, complete, culprit, running, by_itself, trace, death_record, served }
}
