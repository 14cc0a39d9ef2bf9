//! Describes the state of the server for operators: the supervisor's state, and the workers' rows in the scoreboard.
//!
//! The rows are untrusted: their content is bounded, used only as text and numbers, and omitted if a row belongs to
//! another process. This module must not take a lock.

use forkyard_shm::AppRequest;
use log::kv::Source;
use nix::unistd::Pid;

use super::Master;
use super::pool::Pool;
use super::pool::supervisor::{Phase, SlotView};
use crate::config::millis;
use crate::control::wire::{
    BindStatus, MAX_SERVING, MasterStatus, QuarantinedStatus, QueueStatus, ServingStatus, WorkerStatus,
};
use crate::logging::line::Fields;
use crate::sys;

/// Maximum number of requests that are listed for one app process, as for a worker.
const MAX_SERVING_OF_APP: usize = 16;

impl Master {
    pub(super) fn status(&self) -> MasterStatus {
        let application = self.application_pool();
        let view = application.supervisor.view();
        let state = match view.phase {
            Phase::Running => "running",
            Phase::Reloading => "reloading",
            Phase::Stopping => "stopping",
        };
        let listeners = self.pool.spawner.listeners.iter();
        let binds = listeners.map(|listener| BindStatus {
            protocol: listener.protocol.to_string(),
            address: listener.address.to_string(),
            waiting: self.pool.queue_depth.of(listener),
        });
        let quarantined = self.pool.quarantined().into_iter().map(|listed| QuarantinedStatus {
            request: listed.key,
            left_ms: millis(listed.left),
            times: listed.times,
        });
        let mut room = MAX_SERVING;
        let mut rows = |pool: &Pool| {
            let view = pool.supervisor.view();
            let rows = view.slots.iter().map(|slot_view| {
                let mut worker = worker_status(pool, slot_view);
                worker.serving.truncate(room);
                room -= worker.serving.len();
                worker
            });
            rows.collect()
        };
        let queue = application.channel().map(|channel| channel.demand());
        MasterStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: nix::unistd::getpid().as_raw(),
            uptime_ms: millis(self.now()),
            generation: view.generation,
            target: view.target,
            min: view.limits.0,
            max: view.limits.1,
            state: state.to_owned(),
            binds: binds.collect(),
            workers: rows(application),
            gateways: self.apps.as_ref().map(|_| rows(&self.pool)).unwrap_or_default(),
            queued: queue.map(|queue| QueueStatus { requests: queue.waiting, oldest_ms: queue.oldest_wait_us / 1000 }),
            quarantined: quarantined.collect(),
        }
    }
}

fn worker_status(pool: &Pool, slot_view: &SlotView) -> WorkerStatus {
    let SlotView { slot, generation, pid, state } = *slot_view;
    let state = state.to_owned();
    let mut worker = WorkerStatus { slot, generation, state, pid: pid.map(|pid| pid.as_raw()), ..Default::default() };
    let Some((pid, child)) = pid.and_then(|pid| Some((pid, pool.children.get(&pid)?))) else { return worker };
    worker.age_ms = Some(millis(child.since.elapsed()));
    worker.rss_bytes = resident_bytes(pid.as_raw());
    if let Some(process) = pool.channel().and_then(|channel| channel.process(slot))
        && i32::try_from(process.pid) == Ok(pid.as_raw())
    {
        worker.requests = Some(process.begun);
        worker.in_flight = Some(process.busy);
        let requests = pool.channel().map(|channel| channel.requests(slot)).unwrap_or_default();
        worker.serving = requests.into_iter().take(MAX_SERVING_OF_APP).map(of_app).collect();
        return worker;
    }
    // The row belongs to the child only if the child has claimed it.
    let row = pool.scoreboard.read(slot).filter(|_| child.is_worker());
    let Some(row) = row.filter(|row| i32::try_from(row.pid) == Ok(pid.as_raw())) else { return worker };
    worker.requests = Some(row.requests);
    worker.connections = Some(row.connections);
    worker.in_flight = Some(row.in_flight);
    worker.hung_threads = Some(row.hung_threads);
    if row.all_hang && worker.state == "ready" {
        "hung".clone_into(&mut worker.state);
    }
    let serving = row.serving.into_iter();
    worker.serving = serving
        .map(|request| ServingStatus { what: request.what, for_ms: millis(request.since), gateway: None })
        .collect();
    worker
}

fn of_app(request: AppRequest) -> ServingStatus {
    ServingStatus { what: request.what, for_ms: request.for_us / 1000, gateway: Some(request.gateway) }
}

/// Returns the resident memory of process `pid`.
fn resident_bytes(pid: i32) -> Option<u64> {
    sys::process_kib(Pid::from_raw(pid), "VmRSS:")?.checked_mul(1024)
}

/// Formats an event as a log line, for control clients.
pub(super) fn line_of(event: &str, fields: &dyn Source) -> String {
    format!("{event}{}", Fields::of(fields))
}
