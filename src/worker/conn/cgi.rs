//! Serves one CGI request (RFC 3875). The request is in the environment and on standard input; the response goes to
//! standard output. In this mode, there is no master and no fork. Output that the application prints goes to standard
//! error (`cgi_invocation.rs`).
//!
//! Standard input is read up to the announced length rather than to end of file, because end of file may never come.
//! The part that the application leaves unread is read after the response, because standard input and output may be one
//! socket (Apache's mod_cgid), and closing a socket with unread bytes destroys the response in transit. Standard output
//! may be shared with other processes, so it stays blocking; this suffices for the single response that the process
//! writes.

use std::cell::Cell;
use std::fs::File;
use std::future::poll_fn;
use std::io::{self, PipeReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use bytes::BytesMut;
use forkyard_shm::{Plan, Row, Segment};
use http::{Method, Request, Response, StatusCode};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use tokio::runtime::LocalOptions;
use tokio::task::JoinHandle;

use super::linger::QUIET_TIMEOUT;
use super::reply::CgiResponseBody;
use crate::app::blocking;
use crate::app::body::{Body, pipe};
use crate::app::context::Context;
use crate::app::events::Events;
use crate::config::address::Protocol;
use crate::config::{Config, Limits};
use crate::protocol::cgi;
use crate::protocol::params::Params;
use crate::request::activity::Activity;
use crate::sys::{self, BoxError};
use crate::worker::lifecycle::watchdog::watch_bodies;
use crate::worker::service::request_guard::RequestGuard;
use crate::worker::service::serve::{self, AppService, Application, Protection, ResponseBody, Served};
use crate::worker::{on_thread, run_in_turns};

/// Maximum size of a read, and maximum total size of the small chunks that are collected before a write.
const PIECE: usize = 64 << 10;

/// Serves the request and writes the response to `stdout`. `segment` contains the cache. The segment's scoreboard
/// belongs to the server's workers; this process has its own scoreboard.
///
/// # Errors
/// Fails if the response could not be written, or if its body failed.
pub(crate) fn run<F, S, B>(factory: &F, config: &Config, segment: Segment, stdout: OwnedFd) -> Result<(), BoxError>
where
    F: Fn(Context) -> S,
    S: AppService<B>,
    B: ResponseBody,
{
    serve::install_panic_hook();
    sys::unblock_signals();
    blocking::configure(config.threads, config.queue, None);
    blocking::set_hang_timeout(config.failures.hang_timeout);
    let own = Segment::create(&Plan { rows: 1, ..Plan::default() })?;
    let row = own.scoreboard().claim(0, std::process::id(), 1).ok_or("the scoreboard has no row")?;
    let watched = stdout.try_clone()?;

    let cache = segment.cache();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    let (over, going_on) = io::pipe()?;
    let (outcome, rest) = run_in_turns(&runtime, async {
        let exchange = async {
            let activity = Arc::default();
            let (request, rest) = request(&config.limits, &activity);
            tokio::task::spawn_local(watch_bodies(activity, config.limits.timeouts.body));
            let (response, is_head) = answer(factory, config, segment, row, request).await;
            (send(response, is_head, &mut File::from(stdout)).await, rest)
        };
        tokio::select! {
            biased;
            outcome = exchange => outcome,
            () = gone(watched, over) => (Err(io::ErrorKind::BrokenPipe.into()), None),
        }
    });
    // Ends the thread of `gone`, which holds the last copy of standard output. Closing that copy marks the
    // end of the response, so the client does not wait for the rest of this function.
    drop(going_on);
    if let Some(rest) = rest {
        // This must run inside the runtime, which provides the timer.
        run_in_turns(&runtime, discard(rest));
    }
    blocking::finish();
    if cache.sweep_is_due() {
        cache.sweep();
    }
    runtime.shutdown_background();
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            log::debug!("the web server disconnected before it had received the response");
            Ok(())
        }
        outcome => Ok(outcome?),
    }
}

/// Returns the response, and whether the request was a HEAD request.
async fn answer<F, S, B>(
    factory: &F,
    config: &Config,
    segment: Segment,
    row: Row,
    request: Result<Request<Body>, Refusal>,
) -> (Response<Served<B>>, bool)
where
    F: Fn(Context) -> S,
    S: AppService<B>,
    B: ResponseBody,
{
    let request = match request {
        Ok(request) => request,
        Err((status, error)) => {
            log::warn!(status = status.as_u16(); "refused a CGI request: {error}");
            return (serve::refusal(status, RequestGuard::begin_unread(&row, None, None)), false);
        }
    };
    let is_head = request.method() == Method::HEAD;
    let events = Events::new(&segment, config.events);
    tokio::task::spawn_local(events.clone().deliver());
    let context = Context::new(0, 1, segment, Arc::default(), events);
    let response = match serve::catch_panic(|| factory(context)) {
        Ok(service) => {
            let protection = Protection { request_timeout: config.failures.request_timeout, ..Protection::default() };
            let application = Application::new(service, row, config.limits, config.trust.clone()).protected(protection);
            application.answer(Protocol::Http, request, None).await
        }
        Err(panic) => {
            log::error!("cannot create the application: {panic}");
            serve::refusal(StatusCode::INTERNAL_SERVER_ERROR, RequestGuard::begin_unread(&row, None, None))
        }
    };
    (response, is_head)
}

/// The status of the response, and the reason for the refusal.
type Refusal = (StatusCode, BoxError);

/// The part of the body that has not been read yet.
struct UnreadInput {
    /// Reads the body, and ends when the whole body has been read.
    task: JoinHandle<()>,
    /// Number of bytes of the body that have been read.
    read: Rc<Cell<u64>>,
}

/// Reads and discards the remainder of a body until the body ends, or until no data arrives within [`QUIET_TIMEOUT`].
/// Without this, a web server that sends the whole body before it reads the response (mod_cgid) would lose
/// the response.
async fn discard(mut rest: UnreadInput) {
    loop {
        let before = rest.read.get();
        if tokio::time::timeout(QUIET_TIMEOUT, &mut rest.task).await.is_ok() || rest.read.get() == before {
            return;
        }
    }
}

/// Returns the request, and the unread part of its body.
fn request(limits: &Limits, activity: &Arc<Activity>) -> (Result<Request<Body>, Refusal>, Option<UnreadInput>) {
    let variables: Vec<_> = std::env::vars_os().collect();
    let bytes: usize = variables.iter().map(|(name, value)| name.len() + value.len()).sum();
    let pairs = variables.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
    let params = Params::from_pairs(pairs);
    let said = |name| params.get(name).is_some_and(|value| !value.is_empty());
    let has_body = said("CONTENT_LENGTH") || said("HTTP_TRANSFER_ENCODING");
    let mut length = None;
    let request = match cgi::request(params, |announced| length = announced) {
        // Apache passes a request with a chunked body in this form: without a length.
        Ok(_) if has_body && length.is_none() => {
            Err((StatusCode::LENGTH_REQUIRED, "it has a body but no valid CONTENT_LENGTH".into()))
        }
        Ok(_) if bytes > limits.max_params => {
            Err((StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "its variables are larger than --max-params".into()))
        }
        request => request.map_err(|error| (error.status(), error.into())),
    };
    if !has_body || length == Some(0) {
        return (request.map(|request| request.map(|()| Body::empty())), None);
    }
    let (writer, reader) = pipe::pipe();
    // Without standard input, the body is truncated immediately.
    let stdin = sys::descriptor(0).map(File::from);
    let read = Rc::new(Cell::new(0));
    let rest = stdin.map(|stdin| {
        let task = tokio::task::spawn_local(feed(stdin, length.unwrap_or(u64::MAX), Rc::clone(&read), writer));
        UnreadInput { task, read }
    });
    let body = Body::stdin(reader, length, limits.max_body).with_activity(activity);
    (request.map(|request| request.map(|()| body)), rest)
}

/// Passes the body on as it arrives. If the body ends early, dropping the writer marks the body as truncated.
async fn feed(mut stdin: File, length: u64, so_far: Rc<Cell<u64>>, body: pipe::Writer) {
    let mut left = length;
    while left > 0 {
        poll_fn(|context| body.poll_room(context)).await;
        let most = usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
        let read = on_thread("stdin", move || {
            let mut bytes = BytesMut::zeroed(most);
            loop {
                match stdin.read(&mut bytes) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    read => return read.map(|read| (stdin, bytes.split_to(read))),
                }
            }
        });
        match read.await {
            Ok(Ok((again, bytes))) if !bytes.is_empty() => {
                stdin = again;
                left -= bytes.len() as u64;
                so_far.set(length - left);
                body.push(bytes.freeze());
            }
            Ok(Ok(_)) => return,
            Ok(Err(error)) | Err(error) => {
                return log::warn!("cannot read standard input: {}", sys::explain(&error));
            }
        }
    }
    body.finish();
}

/// Writes the response: the available part immediately, and the remainder as it becomes available.
async fn send<B>(response: Response<Served<B>>, is_head: bool, stdout: &mut File) -> io::Result<()>
where
    B: ResponseBody,
{
    let mut waiting = BytesMut::new();
    let mut reply = CgiResponseBody::begin(response, is_head, &mut waiting);
    loop {
        let next = poll_fn(|context| {
            let next = reply.poll_piece(context);
            if next.is_pending()
                && let Err(error) = write(stdout, &mut waiting)
            {
                return Poll::Ready(Some(Err(error)));
            }
            next
        });
        let Some(piece) = next.await else { return write(stdout, &mut waiting) };
        let piece = match piece {
            Ok(piece) => piece,
            Err(error) => {
                write(stdout, &mut waiting)?;
                return Err(error);
            }
        };
        if waiting.len() + piece.len() > PIECE {
            write(stdout, &mut waiting)?;
        }
        if piece.len() > PIECE {
            stdout.write_all(&piece)?;
        } else {
            waiting.extend_from_slice(&piece);
        }
    }
}

fn write(stdout: &mut File, waiting: &mut BytesMut) -> io::Result<()> {
    let written = stdout.write_all(waiting);
    waiting.clear();
    written
}

/// Returns when standard output no longer has a reader, or the other end of `over` is closed. If standard output is a
/// file, only the other end of `over` can end the wait.
async fn gone(stdout: OwnedFd, over: PipeReader) {
    // The wait runs on its own thread, because epoll does not support regular files.
    let hung_up = on_thread("stdout", move || {
        let mut sockets = [stdout.as_fd(), over.as_fd()].map(|fd| PollFd::new(fd, PollFlags::empty()));
        while let Err(Errno::EINTR) = nix::poll::poll(&mut sockets, PollTimeout::NONE) {}
    });
    if hung_up.await.is_err() {
        std::future::pending().await
    }
}
