//! Accepting: connections from a listener that all workers share.
//!
//! A worker that has more connections than a sibling leaves new ones to it for a moment, or until one of its
//! own ends: so that kept connections spread over the workers, and work in hand comes before more work. A
//! worker whose connections are at the limit leaves them altogether.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use forkyard_shm::{Row, Scoreboard};
use nix::sys::socket::{SockFlag, accept4};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::listen::{Family, Listener};
use crate::sys;

const SOCK_FLAGS: SockFlag = SockFlag::SOCK_NONBLOCK.union(SockFlag::SOCK_CLOEXEC);

/// How long a connection is left to siblings that have fewer.
const LEFT_TO_SIBLINGS: Duration = Duration::from_millis(1);
/// So many connections are then accepted before siblings are waited for again: enough that one that is stopped or
/// hangs does not slow the others much, and few enough that one that was merely late gets its share.
const NOT_WAITED_FOR: u32 = 4;
/// How long accepting pauses when the system has no descriptor or memory for a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// A listener, as tokio knows it.
#[derive(Debug)]
pub(crate) enum Acceptor {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// An accepted socket.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Unpin + 'static> Socket for T {}

/// What is done with an accepted connection.
pub(crate) trait Serve {
    /// Serves it to its end. `peer` is the address at its other end, if it has one.
    fn serve(&self, socket: impl Socket, peer: Option<SocketAddr>) -> impl Future<Output = ()> + 'static;
}

/// The connections that this worker holds.
#[derive(Debug)]
pub(crate) struct Connections {
    open: Cell<u32>,
    limit: u32,
    row: Row,
    scoreboard: Scoreboard,
    slot: u32,
    one_ended: Notify,
}

impl Connections {
    pub(crate) fn new(limit: u32, row: Row, scoreboard: Scoreboard, slot: u32) -> Self {
        Self { open: Cell::new(0), limit, row, scoreboard, slot, one_ended: Notify::new() }
    }

    /// Returns when the last one has ended.
    pub(crate) async fn none(&self) {
        while self.open.get() > 0 {
            self.one_ended.notified().await;
        }
    }

    /// Returns when it is this worker's turn to accept.
    async fn turn(&self, patience: &mut Patience) {
        while self.open.get() >= self.limit {
            self.one_ended.notified().await;
        }
        if patience.is_over() || !self.a_sibling_has_fewer() {
            return;
        }
        // A short request on a fresh connection is over when the tasks that wait to run have run.
        let_others_run().await;
        if self.a_sibling_has_fewer() {
            tokio::select! {
                () = self.one_ended.notified() => {}
                () = sleep(LEFT_TO_SIBLINGS) => patience.end(),
            }
        }
    }

    fn is_full(&self) -> bool {
        self.open.get() >= self.limit
    }

    fn a_sibling_has_fewer(&self) -> bool {
        let open = self.open.get();
        open > 0 && self.scoreboard.fewest_connections(self.slot).is_some_and(|fewest| fewest < open)
    }

    fn open(self: &Rc<Self>) -> Open {
        self.open.set(self.open.get() + 1);
        self.row.connection_opened();
        Open(Rc::clone(self))
    }
}

/// Siblings that had their time and did not take what waits (one of them may be stopped, or hang) are not waited
/// for again at once.
#[derive(Default)]
struct Patience {
    accepts_without: u32,
}

impl Patience {
    fn end(&mut self) {
        self.accepts_without = NOT_WAITED_FOR;
    }

    fn is_over(&mut self) -> bool {
        let over = self.accepts_without > 0;
        self.accepts_without = self.accepts_without.saturating_sub(1);
        over
    }
}

/// A connection that counts while it lives.
struct Open(Rc<Connections>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.row.connection_closed();
        self.0.one_ended.notify_waiters();
    }
}

impl Acceptor {
    /// # Errors
    /// If no descriptor can be had, or epoll refuses it.
    pub(crate) fn new(listener: &Listener) -> io::Result<Self> {
        let socket = listener.duplicate()?;
        Ok(match listener.family {
            Family::Tcp => Self::Tcp(TcpListener::from_std(socket.into())?),
            Family::Unix => Self::Unix(UnixListener::from_std(socket.into())?),
        })
    }

    /// Accepts for ever; each connection is served by a task of its own.
    pub(crate) async fn run(&self, serve: &impl Serve, connections: &Rc<Connections>) {
        let mut paused = false;
        let mut patience = Patience::default();
        loop {
            connections.turn(&mut patience).await;
            match self.accept(serve, connections).await {
                Ok(()) => paused = false,
                // It is about that one connection, which is gone already; the next one is waiting.
                Err(error) if !is_of_this_system(&error) => {}
                Err(error) => {
                    if !paused {
                        log::error!("accepting pauses until it can go on: {error}");
                        paused = true;
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Accepts what is waiting in the kernel's queue, and no more. For a worker that leaves: if all leave,
    /// nobody else would.
    pub(crate) fn run_dry(&self, serve: &impl Serve, connections: &Rc<Connections>) {
        while !connections.is_full() {
            match self.accept_waiting(serve, connections) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock || is_of_this_system(&error) => return,
                Err(_) => {} // about that one connection
            }
        }
    }

    /// Unlike [`Self::accept`] it does not go by what epoll said last.
    fn accept_waiting(&self, serve: &impl Serve, connections: &Rc<Connections>) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => {
                let socket = accept4(listener.as_raw_fd(), SOCK_FLAGS)?;
                let socket = TcpStream::from_std(sys::owned(socket).into())?;
                socket.set_nodelay(true)?;
                let peer = socket.peer_addr()?;
                start(serve.serve(socket, Some(peer)), connections);
            }
            Self::Unix(listener) => {
                let socket = accept4(listener.as_raw_fd(), SOCK_FLAGS)?;
                start(serve.serve(UnixStream::from_std(sys::owned(socket).into())?, None), connections);
            }
        }
        Ok(())
    }

    async fn accept(&self, serve: &impl Serve, connections: &Rc<Connections>) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => {
                let (socket, peer) = listener.accept().await?;
                // Answers are written whole, so there is nothing to wait for.
                socket.set_nodelay(true)?;
                start(serve.serve(socket, Some(peer)), connections);
            }
            Self::Unix(listener) => {
                let (socket, _) = listener.accept().await?;
                start(serve.serve(socket, None), connections);
            }
        }
        Ok(())
    }
}

/// Goes to the end of the event loop's queue. (tokio's `yield_now` would look at epoll in between.)
async fn let_others_run() {
    let mut last = false;
    poll_fn(|context| {
        if std::mem::replace(&mut last, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

fn start(serving: impl Future<Output = ()> + 'static, connections: &Rc<Connections>) {
    let open = connections.open();
    tokio::task::spawn_local(async move {
        serving.await;
        drop(open);
    });
}

/// No descriptor or memory is to be had: unlike whatever else `accept(2)` says, that concerns the next
/// connection too.
fn is_of_this_system(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
