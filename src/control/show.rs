//! Formats a master's status as text.

use std::fmt::Write as _;

use super::wire::{MasterStatus, QuarantinedStatus, QueueStatus, WorkerStatus};

const HEAD: [&str; 9] = ["SLOT", "PID", "GEN", "STATE", "AGE", "REQUESTS", "CONNS", "BUSY", "RSS"];

/// Formats a line for the master, a line for each socket, a row for each worker, the requests in flight and the
/// quarantined requests.
pub(crate) fn table(status: &MasterStatus) -> String {
    let MasterStatus { version, pid, generation, target, min, max, state, .. } = status;
    let range = if min == max { String::new() } else { format!(" ({min}..{max})") };
    let uptime = time(status.uptime_ms);
    let mut text =
        format!("forkyard {version} pid={pid} {state} up {uptime} gen={generation} workers={target}{range}\n");
    for bind in &status.binds {
        let _ = writeln!(text, "  bind  {}:{} waiting={}", bind.protocol, bind.address, bind.waiting);
    }
    if let Some(QueueStatus { requests, oldest_ms }) = &status.queued {
        let _ = writeln!(text, "  queue requests={requests} oldest={}", time(*oldest_ms));
    }
    text += &processes(&status.workers);
    if !status.gateways.is_empty() {
        text.push_str("gateways:\n");
        text += &processes(&status.gateways);
    }
    if !status.quarantined.is_empty() {
        text.push_str("quarantined:\n");
        text += &quarantine(&status.quarantined);
    }
    text
}

/// Formats a row for each process, and the requests in flight.
fn processes(processes: &[WorkerStatus]) -> String {
    let mut text = String::new();
    let rows: Vec<[String; 9]> = processes.iter().map(row).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].len());
        cells.chain([HEAD[column].len()]).max().unwrap_or(0)
    };
    let widths: [usize; 9] = std::array::from_fn(width);
    let mut line = |cells: [&str; 9]| {
        for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            // Text is left-aligned, numbers are right-aligned.
            let _ = if column == 3 { write!(text, "{gap}{cell:<width$}") } else { write!(text, "{gap}{cell:>width$}") };
        }
        text.push('\n');
    };
    line(HEAD);
    let mut lines = Vec::new();
    for (cells, worker) in rows.iter().zip(processes) {
        line(std::array::from_fn(|column| cells[column].as_str()));
        lines.extend(worker.serving.iter().map(|request| (worker.slot, request)));
    }
    if !lines.is_empty() {
        text.push_str("in flight:\n");
    }
    for (slot, request) in lines {
        let _ = writeln!(text, "  slot={slot} {:>8}  {}", time(request.for_ms), request.what);
    }
    text
}

/// Returns a line for each quarantined request.
pub(crate) fn quarantine(listed: &[QuarantinedStatus]) -> String {
    let line = |QuarantinedStatus { request, left_ms, times }: &_| {
        let left = time(*left_ms);
        format!("  left={left} times={times}  {request}\n")
    };
    listed.iter().map(line).collect()
}

fn row(worker: &WorkerStatus) -> [String; 9] {
    fn known<T: ToString>(value: Option<T>) -> String {
        value.map_or_else(|| "-".to_owned(), |value| value.to_string())
    }
    [
        worker.slot.to_string(),
        known(worker.pid),
        worker.generation.to_string(),
        match worker.hung_threads {
            None | Some(0) => worker.state.clone(),
            Some(count) if worker.state == "hung" => format!("hung ({count})"),
            Some(count) => format!("{} ({count} hung)", worker.state),
        },
        known(worker.age_ms.map(time)),
        known(worker.requests),
        known(worker.connections),
        known(worker.in_flight),
        known(worker.rss_bytes.map(|bytes| format!("{}M", bytes >> 20))),
    ]
}

/// Formats a duration, as in `340ms`, `12s`, `3m20s`, `5h07m` and `12d04h`.
pub(crate) fn time(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms}ms"),
        1..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        86400.. => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::{BindStatus, ServingStatus};

    #[test]
    fn columns_are_aligned_and_unknown_values_are_dashes() {
        let serving = vec![ServingStatus { what: "GET /slow".to_owned(), for_ms: 1500, gateway: None }];
        let known = WorkerStatus {
            slot: 10,
            pid: Some(123_456),
            generation: 2,
            state: "ready".to_owned(),
            age_ms: Some(200_000),
            requests: Some(1_234_567),
            connections: Some(3),
            in_flight: Some(1),
            hung_threads: Some(1),
            rss_bytes: Some(12 << 20),
            serving,
        };
        let waiting = WorkerStatus { slot: 3, generation: 1, state: "waiting".to_owned(), ..WorkerStatus::default() };
        let status = MasterStatus {
            version: "1.2.3".to_owned(),
            pid: 7,
            uptime_ms: 90_061_000,
            generation: 2,
            target: 2,
            min: 1,
            max: 4,
            state: "running".to_owned(),
            binds: vec![BindStatus { protocol: "http".to_owned(), address: "127.0.0.1:80".to_owned(), waiting: 5 }],
            workers: vec![known, waiting],
            gateways: Vec::new(),
            queued: None,
            quarantined: vec![QuarantinedStatus { request: "GET /items/*".to_owned(), left_ms: 59_000, times: 2 }],
        };
        assert_eq!(
            table(&status),
            "\
forkyard 1.2.3 pid=7 running up 1d01h gen=2 workers=2 (1..4)
  bind  http:127.0.0.1:80 waiting=5
SLOT     PID  GEN  STATE             AGE  REQUESTS  CONNS  BUSY  RSS
  10  123456    2  ready (1 hung)  3m20s   1234567      3     1  12M
   3       -    1  waiting             -         -      -     -    -
in flight:
  slot=10       1s  GET /slow
quarantined:
  left=59s times=2  GET /items/*
"
        );
    }

    #[test]
    fn times_are_short() {
        for (ms, text) in
            [(0, "0ms"), (999, "999ms"), (59_999, "59s"), (3_600_000, "1h00m"), (u64::MAX, "213503982334d14h")]
        {
            assert_eq!(time(ms), text);
        }
    }
}
