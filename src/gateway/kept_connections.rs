//! Keeps idle HTTP connections to app processes for the next request (see `http.rs`).
//!
//! A connection belongs to one process. It is closed after [`MAX_IDLE`], and checked before it is used: a process that
//! has closed it, or has sent anything, has ended it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use tokio::time::{Instant, sleep_until};

use super::Shared;
use super::attempt::Attempt;
use super::http::{Connection, Kept, MAX_IDLE};

/// The idle connections, by slot. The last one of a slot was used last.
#[derive(Debug, Default)]
pub(super) struct KeptConnections(RefCell<Idle>);

#[derive(Debug, Default)]
struct Idle {
    connections: BTreeMap<u32, Vec<Kept>>,
    /// Whether a task closes connections that are too old.
    has_closer: bool,
}

impl KeptConnections {
    /// Returns the connection of this process that was used last.
    fn take(&self, slot: u32, pid: i32) -> Option<Connection> {
        let mut idle = self.0.borrow_mut();
        let kept = idle.connections.get_mut(&slot)?;
        while let Some(Kept { pid: of, since, connection }) = kept.pop() {
            if of == pid && since.elapsed() < MAX_IDLE && connection.is_usable() {
                return Some(connection);
            }
        }
        None
    }

    /// Closes connections that are too old. Returns when the next one will be, or `None` if no connection is left.
    fn close_old(&self) -> Option<Instant> {
        let mut idle = self.0.borrow_mut();
        idle.connections.retain(|_, kept| {
            kept.retain(|kept| kept.since.elapsed() < MAX_IDLE);
            !kept.is_empty()
        });
        let oldest = idle.connections.values().flatten().map(|kept| kept.since).min();
        idle.has_closer = oldest.is_some();
        Some(oldest? + MAX_IDLE)
    }
}

impl Attempt {
    /// Returns an idle connection to the app process, if there is one.
    pub(super) fn kept_connection(&self) -> Option<Connection> {
        self.shared.kept.take(self.unit.slot(), self.unit.pid())
    }

    /// Keeps a connection that has become idle.
    pub(super) fn keep(&self, connection: Connection) {
        let mut idle = self.shared.kept.0.borrow_mut();
        let kept = idle.connections.entry(self.unit.slot()).or_default();
        kept.retain(|kept| kept.pid == self.unit.pid());
        if kept.len() < usize::try_from(self.shared.concurrency).unwrap_or(usize::MAX) {
            kept.push(Kept { pid: self.unit.pid(), since: Instant::now(), connection });
        }
        if !std::mem::replace(&mut idle.has_closer, true) {
            tokio::task::spawn_local(close_when_old(Rc::downgrade(&self.shared)));
        }
    }
}

async fn close_when_old(shared: std::rc::Weak<Shared>) {
    while let Some(next) = shared.upgrade().and_then(|shared| shared.kept.close_old()) {
        sleep_until(next).await;
    }
}
