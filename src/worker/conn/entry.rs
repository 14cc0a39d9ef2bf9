//! The ways by which connections come to this worker, when it leaves: what is queued is accepted, and then they are closed.
//!
//! A worker that leaves accepts nothing more, whether the others go on or not, so it gives the listening sockets up. If the
//! master is dead nobody is left to close them for all, and the workers do it: the address is then free for the next start.

use std::rc::Rc;
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::accept::{Acceptor, Connections, Serve};
use crate::heir::RetainedFds;
use crate::net::listen::Listener;
use crate::worker::lifecycle::drain::Drain;

/// A task that accepts, and by what.
pub(crate) type Accepting = (JoinHandle<()>, Rc<Acceptor>);

/// The ways in of a worker that leaves.
pub(crate) struct Entry<'a> {
    pub(crate) accepting: Vec<Accepting>,
    pub(crate) listeners: Arc<[Listener]>,
    pub(crate) retained: &'a RetainedFds,
    /// The master is dead, and with it the server.
    pub(crate) is_orphan: bool,
}

impl Entry<'_> {
    /// Accepts no longer of itself. An orphan sees to it that nobody enters a queue that will be served no more.
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

    /// Accepts what is queued: the kernel may have told this worker alone of it. When nothing is left in the queues of the listening sockets
    /// they are closed. False if there is no room for all yet.
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
            self.retained.give_up(&self.listeners);
        }
        is_dry
    }

    /// Returns when the last connection is gone, or is somebody else's.
    pub(crate) async fn leave(&mut self, drain: &Drain, connections: &Connections, server: &impl Serve) {
        let mut is_dry = self.run_dry(server).await;
        loop {
            tokio::select! {
                biased;
                () = drain.stranded() => is_dry = self.run_dry(server).await,
                () = connections.one_ended(), if !is_dry => is_dry = self.run_dry(server).await,
                () = connections.none() => return,
            }
        }
    }
}
