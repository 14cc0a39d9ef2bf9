//! Measures the demand from the workers' rows in the scoreboard, the kernel's view of programs, and the queues of the listening sockets.

use std::collections::HashMap;

use forkyard_shm::Scoreboard;
use nix::unistd::Pid;

use super::child::Child;
use super::supervisor::{Demand, Supervisor};
use crate::master::procfs::{self, Observed};
use crate::net::listen::Listener;
use crate::net::queue_depth::QueueDepth;

/// Upper bound on the number of requests in flight that one worker can report, so that a false report cannot start too
/// many workers.
const MOST: u32 = 1 << 16;

/// Takes one sample of the demand.
pub(crate) fn sample(
    children: &HashMap<Pid, Child>,
    supervisor: &Supervisor,
    scoreboard: &Scoreboard,
    depth: &QueueDepth,
    listeners: &[Listener],
) -> Demand {
    let mut demand = Demand::default();
    for (&pid, child) in children.iter().filter(|(pid, _)| supervisor.is_ready(**pid)) {
        let (serving, streams) = if child.is_worker() {
            let row = scoreboard.read(child.slot).filter(|row| i32::try_from(row.pid) == Ok(pid.as_raw()));
            demand.connections = demand.connections.saturating_add(row.as_ref().map_or(0, |row| row.connections));
            row.map_or((0, 0), |row| (row.in_flight.min(MOST), row.streams))
        } else {
            // A wrapper may have several serving processes as descendants.
            let servers = listeners.first().map(|listener| procfs::servers_under(&[pid], listener)).unwrap_or_default();
            let serving = servers.iter().filter(|(_, observed)| *observed == Observed::Serving).count();
            (u32::try_from(serving).unwrap_or(MOST).min(MOST), 0)
        };
        demand.in_flight = demand.in_flight.saturating_add(serving);
        // Event streams do not count as requests in flight. But a worker that holds some is busy: if it exited, their
        // clients would reconnect immediately.
        if serving > 0 || streams > 0 {
            demand.busy.push(child.slot);
        }
    }
    demand.waiting = listeners.iter().map(|listener| depth.of(listener)).fold(0, u32::saturating_add);
    demand
}
