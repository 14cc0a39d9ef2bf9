//! The obituary: one log line for each process that ended, with all that is known of it.

use std::fmt::Write as _;

use forkyard_shm::Scoreboard;
use nix::unistd::Pid;

use super::spawn::Child;
use crate::sys::Ending;

/// So many of the requests that it was serving are named.
const NAMED: usize = 4;

/// Writes the line, and returns it. What the scoreboard says is the dead process's word: bounded, and taken as text only.
pub(crate) fn publish(pid: Pid, ending: Ending, child: Child, scoreboard: &Scoreboard) -> String {
    let mut line = format!("slot={} pid={pid} gen={} {ending}", child.slot, child.generation);
    let _ = write!(line, " lived={}ms", child.since.elapsed().as_millis());
    // The row is the child's only if the child had claimed it. A program knows nothing of the scoreboard.
    let row = scoreboard.read(child.slot).filter(|row| i32::try_from(row.pid) == Ok(pid.as_raw()));
    if row.is_none() && child.is_worker() {
        line += " served=0";
    }
    if let Some(row) = &row {
        let _ = write!(line, " served={}", row.requests);
        if row.in_flight > 0 {
            let named = row.serving.iter().take(NAMED);
            let named: Vec<String> = named.map(|one| format!("{} {}ms", one.what, one.since.as_millis())).collect();
            let more = usize::try_from(row.in_flight).unwrap_or(usize::MAX).saturating_sub(named.len());
            let more = if more > 0 { format!(", {more} more") } else { String::new() };
            let _ = write!(line, " in_flight={:?}", named.join(", ") + &more);
        }
    }
    let idle = row.is_none_or(|row| row.in_flight == 0);
    let as_asked = child.asked_to_leave
        && (ending == Ending::Exited(0) || [libc::SIGTERM, libc::SIGKILL].map(Ending::Signaled).contains(&ending));
    let last_words = child.bury(pid);
    if !last_words.is_empty() {
        let _ = write!(line, " said={last_words:?}");
    }
    let (level, what) = match ending {
        _ if as_asked => (log::Level::Info, "worker left"),
        Ending::Exited(0) if idle => (log::Level::Info, "worker left of its own accord"),
        Ending::Exited(0) => (log::Level::Warn, "worker left of its own accord, and in the middle of its work"),
        Ending::Exited(125) => (log::Level::Warn, "worker left and asks not to be replaced"),
        Ending::Exited(_) | Ending::Signaled(_) => (log::Level::Warn, "worker died"),
    };
    log::log!(level, "{what} {line}");
    format!("{what} {line}")
}
