//! Connects gateways, app processes and the master: the private sockets, the claims in shared memory, and the
//! descriptors that wake a process.
//!
//! The master creates the channel before it forks the first gateway. Every gateway inherits all of it; an app process
//! inherits its own listening socket only.
//!
//! **A connection that no process has accepted** when its app process has died is turned away by the master: the master
//! accepts it, writes [`NOT_SERVED`], and closes it. The gateway then knows that its request was not begun, and sends it
//! to another process, whatever its method. Without this proof, a request that is not idempotent could not be repeated.
//! A gateway checks the claim again after it has connected and before it sends the request. So each connection is
//! either turned away, or is known to the gateway to be too late, or reaches a process.

use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use forkyard_shm::{AppDemand, AppProcess, AppRequest, Claims, Door, HeldUnit, Wake};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::{Pid, read, write};
use serde::{Deserialize, Serialize};

use super::app_endpoint::{AppConnection, AppEndpoint, ListenOn, SavedEndpoint};
use super::private_socket::{PrivateSocket, is_closed};
use crate::sys;

/// The byte that the master writes to a connection which no app process has accepted. No response begins with it: a
/// FastCGI record begins with 1, and the head of an HTTP or CGI response is ASCII.
pub(crate) const NOT_SERVED: u8 = 0xff;

/// A channel, for the next master. Descriptors are saved by number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedChannel {
    pub(crate) endpoints: Vec<SavedEndpoint>,
    /// Maximum number of requests that one app process serves at a time.
    pub(crate) units: u32,
    pub(crate) claims: RawFd,
    /// The descriptors that wake the gateways.
    pub(crate) gateways: Vec<RawFd>,
    pub(crate) master: RawFd,
}

impl SavedChannel {
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let endpoints = self.endpoints.iter().flat_map(SavedEndpoint::descriptors);
        endpoints.chain(self.gateways.iter().copied()).chain([self.claims, self.master])
    }

    /// Checks that a master with these numbers of processes can use the channel.
    ///
    /// # Errors
    /// Returns a message for the operator if it cannot.
    pub(crate) fn check_size(&self, processes: u32, gateways: u32) -> Result<(), String> {
        let fits = |wanted: u32, there: usize| usize::try_from(wanted).is_ok_and(|wanted| wanted <= there);
        if !fits(processes, self.endpoints.len()) {
            return Err("--workers exceeds what the running server has reserved (stop and start it)".to_owned());
        }
        if !fits(gateways, self.gateways.len()) {
            return Err("--gateways exceeds what the running server has reserved (stop and start it)".to_owned());
        }
        Ok(())
    }
}

/// The channel. The numbers of processes are the numbers of their slots.
#[derive(Debug)]
pub(crate) struct AppChannel {
    endpoints: Vec<AppEndpoint>,
    claims: Claims,
    /// Wakes the gateway in each slot.
    gateways: Vec<OwnedFd>,
    /// Wakes the master.
    master: OwnedFd,
}

impl AppChannel {
    /// Creates a channel for this number of app processes, each of which serves up to `units` requests at a time, and this
    /// number of gateways. `endpoint` creates the address of one app process.
    ///
    /// # Errors
    /// Fails if a socket, a descriptor or the memory is not available.
    pub(crate) fn create(
        processes: u32,
        units: u32,
        gateways: u32,
        endpoint: impl Fn() -> io::Result<AppEndpoint>,
    ) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = || Ok(EventFd::from_flags(flags)?.into());
        Ok(Self {
            endpoints: (0..processes).map(|_| endpoint()).collect::<io::Result<_>>()?,
            claims: Claims::create(processes, units, gateways).map_err(io::Error::other)?,
            gateways: (0..gateways).map(|_| event()).collect::<io::Result<_>>()?,
            master: event()?,
        })
    }

    /// Restores the channel of a former master. `claim` takes ownership of a descriptor.
    ///
    /// # Errors
    /// Fails if a descriptor is missing, or if this build has a different table of claims.
    pub(crate) fn resume(saved: SavedChannel, mut claim: impl FnMut(RawFd) -> Option<OwnedFd>) -> io::Result<Self> {
        let missing = || io::Error::other("a descriptor of the app processes is missing in the upgrade");
        let mut claim = |number| claim(number).ok_or_else(missing);
        let endpoints = saved.endpoints.into_iter().map(|endpoint| AppEndpoint::resume(endpoint, &mut claim));
        let endpoints = endpoints.collect::<io::Result<_>>()?;
        let gateways = saved.gateways.iter().map(|&gateway| claim(gateway)).collect::<io::Result<_>>()?;
        let master = claim(saved.master)?;
        let claims = Claims::attach(claim(saved.claims)?).map_err(io::Error::other)?;
        Ok(Self { endpoints, claims, gateways, master })
    }

    /// Returns the channel for the next master.
    pub(crate) fn save(&self) -> SavedChannel {
        SavedChannel {
            endpoints: self.endpoints.iter().map(AppEndpoint::save).collect(),
            units: self.claims.units(),
            claims: self.claims.fd().as_raw_fd(),
            gateways: self.gateways.iter().map(|event| event.as_raw_fd()).collect(),
            master: self.master.as_raw_fd(),
        }
    }

    /// Returns the descriptors that a gateway inherits.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let endpoints = self.endpoints.iter().filter_map(AppEndpoint::descriptor);
        endpoints.chain(self.gateways.iter().chain([&self.master]).map(|event| event.as_raw_fd()))
    }

    pub(crate) fn claims(&self) -> &Claims {
        &self.claims
    }

    // Used by the master.

    /// Returns the address for a new process in `slot`, and the connection that proves its readiness. Without such a
    /// connection, the process is ready when [`AppChannel::probe`] succeeds.
    ///
    /// # Errors
    /// Fails if no descriptor is available, or if a process has shut the socket down.
    pub(crate) fn prepare(&self, slot: u32) -> io::Result<(ListenOn, Option<OwnedFd>)> {
        let endpoint = self.endpoint(slot)?;
        let listen = endpoint.prepare()?;
        Ok((listen, endpoint.inherited().map(PrivateSocket::probe).transpose()?))
    }

    /// Whether the process in `slot` has accepted the connection `probe`.
    pub(crate) fn has_accepted(&self, slot: u32, probe: &OwnedFd) -> bool {
        let has_queue =
            self.endpoint(slot).is_ok_and(|endpoint| endpoint.inherited().is_some_and(PrivateSocket::has_queue));
        !has_queue || is_closed(probe)
    }

    /// Lets gateways claim the process in `slot`, which is ready, and serves `concurrency` requests at a time.
    pub(crate) fn open(&self, slot: u32, pid: Pid, concurrency: u32) {
        self.claims.open(slot, pid.as_raw().cast_unsigned(), concurrency, now_us());
        self.wake_waiting();
    }

    /// Prevents further claims on the process in `slot`. Returns whether it is idle now; otherwise, the master is woken
    /// when it is.
    pub(crate) fn drain(&self, slot: u32) -> bool {
        let is_idle = self.claims.drain(slot);
        self.claims.keepers(slot).for_each(|keeper| self.wake(Wake::Gateway(keeper)));
        is_idle
    }

    /// Whether no gateway has a claim on the process in `slot`, or keeps a connection to it.
    pub(crate) fn is_idle(&self, slot: u32) -> bool {
        self.claims.is_idle(slot)
    }

    /// Ends all claims on the process in `slot`, which has died, and turns away the connections that it has not accepted.
    pub(crate) fn close(&self, slot: u32) {
        self.claims.close(slot);
        let turned_away = self.endpoint(slot).and_then(|endpoint| endpoint.inherited().map_or(Ok(0), turn_away));
        match turned_away {
            Ok(0) => {}
            Ok(connections) => log::debug!(slot, connections; "turned away the connections of a dead app process"),
            Err(error) => log::error!(slot; "cannot turn away the connections of a dead app process: {error}"),
        }
    }

    /// Ends all claims of the gateway in `slot`, which has died. Returns the slots of the processes that it was using. If
    /// a process serves one request at a time, no gateway can claim it until it is opened again, because it may still be
    /// working on the request of the dead gateway.
    pub(crate) fn gateway_died(&self, slot: u32) -> Vec<u32> {
        if self.claims.units() == 1 {
            self.claims.used_by(slot).for_each(|process| _ = self.claims.drain(process));
        }
        let interrupted = self.claims.gateway_died(slot, now_us());
        self.wake_waiting();
        interrupted
    }

    /// Connects to the process in `slot`, to find out when it accepts connections.
    ///
    /// # Errors
    /// Fails if the process does not listen.
    pub(crate) fn probe(&self, slot: u32) -> io::Result<OwnedFd> {
        self.endpoint(slot)?.probe()
    }

    /// Connects to the process in `slot` without a claim. The connection does not block, and is perhaps not established yet.
    ///
    /// # Errors
    /// Fails if the process does not listen.
    pub(crate) fn connect_to(&self, slot: u32) -> io::Result<OwnedFd> {
        match self.endpoint(slot)?.connect()? {
            AppConnection::Unix(connection) | AppConnection::Tcp(connection) => Ok(connection),
        }
    }

    /// Returns the maximum number of requests that one process serves at a time.
    pub(crate) fn units(&self) -> u32 {
        self.claims.units()
    }

    /// Whether a process may serve several requests at a time.
    pub(crate) fn is_concurrent(&self) -> bool {
        self.claims.units() > 1
    }

    /// Returns the requests that the process in `slot` is serving, the oldest first.
    pub(crate) fn requests(&self, slot: u32) -> Vec<AppRequest> {
        self.claims.requests(slot, now_us())
    }

    /// Returns what the gateways have recorded about the process in `slot`.
    pub(crate) fn process(&self, slot: u32) -> Option<AppProcess> {
        self.claims.app_process(slot)
    }

    /// Returns the number of requests in all app processes and in the queues of all gateways.
    pub(crate) fn demand(&self) -> AppDemand {
        self.claims.demand(now_us())
    }

    /// The descriptor that is readable when an app process that the master waits for has become idle.
    pub(crate) fn wakes_master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// Acknowledges that the master is awake.
    pub(crate) fn master_is_awake(&self) {
        let mut counter = [0; 8];
        let _ = read(&self.master, &mut counter); // nothing to read if it was woken for a different reason
    }

    fn wake_waiting(&self) {
        if let Some(gateway) = self.claims.next_to_wake(None, now_us()) {
            self.wake(Wake::Gateway(gateway));
        }
    }

    // Used by gateways.

    /// Whether any app process can be claimed, now or when it is idle.
    pub(crate) fn serves(&self) -> bool {
        let mut processes = (0..self.claims.processes()).filter_map(|slot| self.claims.app_process(slot));
        processes.any(|process| process.door == Door::Open)
    }

    /// Connects to the claimed process. Returns `None` if the claim has ended, because the process has died.
    ///
    /// # Errors
    /// Returns the error from connect(2).
    pub(crate) fn connect(&self, unit: &HeldUnit) -> io::Result<Option<AppConnection>> {
        let connection = self.endpoint(unit.process())?.connect()?;
        Ok(self.claims.is_current(unit).then_some(connection))
    }

    /// Returns a copy of the descriptor that wakes the gateway in `slot`.
    ///
    /// # Errors
    /// Fails if no descriptor is available.
    pub(crate) fn wakes_gateway(&self, slot: u32) -> io::Result<OwnedFd> {
        let event = usize::try_from(slot).ok().and_then(|slot| self.gateways.get(slot));
        event.ok_or(io::ErrorKind::NotFound)?.try_clone()
    }

    /// Wakes a process after a claim was released.
    pub(crate) fn wake(&self, wake: Wake) {
        let event = match wake {
            Wake::Nobody => None,
            Wake::Master => Some(&self.master),
            Wake::Gateway(slot) => usize::try_from(slot).ok().and_then(|slot| self.gateways.get(slot)),
        };
        if let Some(event) = event {
            let _ = write(event, &1_u64.to_ne_bytes()); // if the counter is full, the process is already awake
        }
    }

    fn endpoint(&self, slot: u32) -> io::Result<&AppEndpoint> {
        let endpoint = usize::try_from(slot).ok().and_then(|slot| self.endpoints.get(slot));
        endpoint.ok_or_else(|| io::Error::other(format!("there is no app process {slot}")))
    }
}

/// Returns the time for claims, in microseconds of the monotonic clock.
pub(crate) fn now_us() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |now| u64::try_from(Duration::from(now).as_micros()).unwrap_or(u64::MAX))
}

/// Accepts and ends all queued connections. The next process makes the socket blocking again ([`AppChannel::prepare`]).
fn turn_away(socket: &PrivateSocket) -> io::Result<usize> {
    socket.make_nonblocking()?;
    let mut count = 0;
    loop {
        match sys::accept(socket.as_fd()) {
            Ok((connection, _)) => {
                let mut connection = UnixStream::from(connection);
                let _ = connection.write_all(&[NOT_SERVED]); // it may be closed
                count += 1;
            }
            Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => return Ok(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
