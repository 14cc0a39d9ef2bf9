//! Closes a draining worker's listeners and channel after accepting the queued connections.
//!
//! A draining worker accepts no further connections, so it closes its copies of the listening sockets, even if its
//! siblings continue. If the master is dead, no other process can shut the sockets down for all processes, so the
//! workers shut them down. The address is then free for the next server.

use std::rc::Rc;

use tokio::task::JoinHandle;

use super::accept::{Acceptor, Connections, Serve};
use crate::heir::RetainedFds;
use crate::net::listen::Listener;
use crate::request::outlasting;
use crate::worker::lifecycle::drain::Drain;

/// A task that accepts, and its acceptor.
pub(crate) type Accepting = (JoinHandle<()>, Rc<Acceptor>);

/// The acceptors and listeners of a draining worker.
pub(crate) struct DrainingListeners<'a> {
    pub(crate) accepting: Vec<Accepting>,
    pub(crate) listeners: &'a [Listener],
    pub(crate) retained: &'a RetainedFds,
    /// Whether the master is dead, in which case the server ends.
    pub(crate) is_orphan: bool,
}

impl DrainingListeners<'_> {
    /// Stops the accepting tasks. An orphaned worker also keeps new connections out of the queues, which no worker will
    /// serve.
    pub(crate) fn begin_to_close(&self) {
        self.accepting.iter().for_each(|(task, _)| task.abort());
        if self.is_orphan {
            for listener in self.own() {
                listener.hold_off();
            }
        }
    }

    fn own(&self) -> impl Iterator<Item = &Listener> {
        self.listeners.iter().filter(|listener| listener.is_own())
    }

    /// Accepts the queued connections, because the kernel may have notified only this worker of them. Closes the
    /// listening sockets when their queues are empty. Returns false if the worker cannot take all connections yet.
    pub(crate) async fn run_dry(&mut self, server: &impl Serve) -> bool {
        let mut is_dry = true;
        for (_, acceptor) in &self.accepting {
            is_dry &= acceptor.run_dry(server).await || !acceptor.is_of_listener();
        }
        let had_listeners = self.accepting.iter().any(|(_, acceptor)| acceptor.is_of_listener());
        if is_dry && had_listeners {
            if self.is_orphan {
                self.own().for_each(Listener::refuse);
            }
            self.accepting.retain(|(_, acceptor)| !acceptor.is_of_listener());
            self.retained.give_up(self.listeners);
        }
        is_dry
    }

    /// Returns when the last connection has ended or was handed over, and the tasks that outlast their requests have ended.
    pub(crate) async fn leave(&mut self, drain: &Drain, connections: &Connections, server: &impl Serve) {
        let mut is_dry = self.run_dry(server).await;
        loop {
            tokio::select! {
                biased;
                () = drain.stranded() => is_dry = self.run_dry(server).await,
                () = connections.one_ended(), if !is_dry => is_dry = self.run_dry(server).await,
                () = connections.none() => return outlasting::ended().await,
            }
        }
    }
}
