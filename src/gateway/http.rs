//! The exchange of a request and its response with an app process over HTTP/1.1.
//!
//! - The length of the request's body is known, because the gateway has collected the body.
//! - A response is complete when its announced length has arrived, or its last chunk. A response that only ends with its
//!   connection is complete if the app process is not exiting.
//! - A 101 turns the connection into a tunnel, which occupies the app process like a request until it ends.
//! - A connection is kept for the next request for [`MAX_IDLE`], which is less than the applications' own limits (2 s
//!   with gunicorn, 5 s with Node and uvicorn). Only requests with idempotent methods use a kept connection, because the
//!   app process may close it at the moment at which the request is sent.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response as HttpResponse, StatusCode, Uri, Version};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt as _, copy, split};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::app_stream::AppStream;
use super::attempt::{Attempt, Failure, HOLD_SIZE, HOLD_TIME, Response};
use super::spool::{Spooled, SpooledReader};
use crate::protocol::cgi::ClientInfo;
use crate::protocol::cgi::parse_response::ResponseHead;
use crate::protocol::grammar::{elements, parse_digits};
use crate::protocol::http_gateway::{request_headers, response_headers, response_trailers};

/// How long an idle connection may be used again.
pub(super) const MAX_IDLE: Duration = Duration::from_millis(1500);
/// hyper's minimum for the buffer of a head.
const MIN_HEAD: usize = 8 << 10;

/// A request.
#[derive(Debug)]
pub(super) struct Message {
    method: Method,
    target: Uri,
    headers: HeaderMap,
    body: Spooled,
    /// The client's connection, if the request offers another protocol.
    upgrade: Option<OnUpgrade>,
}

impl Message {
    /// Creates a request. `length` is the length of the body, if the request has one.
    pub(super) fn new(parts: &Parts, client: &ClientInfo, length: Option<u64>, body: Spooled) -> Self {
        // The worker leaves this extension in the request only if the request offers an upgrade.
        let upgrade = parts.extensions.get::<OnUpgrade>().cloned();
        let headers = request_headers(parts, client, length, upgrade.is_some());
        Self { method: parts.method.clone(), target: origin_form(&parts.uri), headers, body, upgrade }
    }

    fn request(&self) -> Request<SpooledReader> {
        let mut request = Request::new(self.body.reader());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.target.clone();
        *request.headers_mut() = self.headers.clone();
        request
    }

    fn may_use_kept_connection(&self) -> bool {
        self.method.is_idempotent() && self.upgrade.is_none()
    }

    /// Sends the request and takes the response.
    ///
    /// # Errors
    /// Returns the reason why the exchange has not been completed.
    pub(super) async fn exchange(&self, attempt: &Attempt, response: &Response<'_>) -> Result<(), Failure> {
        if self.may_use_kept_connection()
            && let Some(mut kept) = attempt.kept_connection()
        {
            kept.stream.reset();
            match kept.sender.send_request(self.request()).await {
                Ok(answer) => return self.take(answer, kept, attempt, response).await,
                // The request may have killed the app process. Otherwise, the process has closed the idle connection.
                Err(_) if !kept.stream.has_received() => {
                    if attempt.has_died().await {
                        return Err(Failure::Died);
                    }
                }
                Err(error) => return Err(why_failed(&error, &kept.stream, attempt, response).await),
            }
        }
        let stream = attempt.connect().await?;
        let mut connection = Connection::open(stream, response).await?;
        match connection.sender.send_request(self.request()).await {
            Ok(answer) => self.take(answer, connection, attempt, response).await,
            Err(error) => Err(why_failed(&error, &connection.stream, attempt, response).await),
        }
    }

    async fn take(
        &self,
        mut answer: HttpResponse<Incoming>,
        connection: Connection,
        attempt: &Attempt,
        response: &Response<'_>,
    ) -> Result<(), Failure> {
        attempt.answered();
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            let Some(upgrade) = self.upgrade.clone() else {
                return Err(Failure::Broken("the app process switched protocols, which was not requested".to_owned()));
            };
            let theirs = hyper::upgrade::on(&mut answer);
            response.begin_tunnel(head_of(&answer, true));
            carry(upgrade, theirs, response.what()).await;
            return Ok(());
        }
        let is_kept = stays_open(&answer);
        let ends_with_connection = ends_with_connection(&answer);
        let head = head_of(&answer, false);
        let mut body = answer.into_body();
        let arrived = if http_body::Body::is_end_stream(&body) {
            Arrived { bytes: Bytes::new(), is_complete: true }
        } else if head.content_length.is_some_and(|length| length <= HOLD_SIZE as u64) {
            match first_part(&mut body).await {
                Ok(arrived) => arrived,
                Err(error) => return Err(why_failed(&error, &connection.stream, attempt, response).await),
            }
        } else {
            Arrived { bytes: Bytes::new(), is_complete: false }
        };
        response.begin(head, arrived.bytes, arrived.is_complete);
        let mut trailers = None;
        if !arrived.is_complete {
            while let Some(frame) = body.frame().await {
                let frame = match frame {
                    Ok(frame) => frame,
                    Err(error) => return Err(why_failed(&error, &connection.stream, attempt, response).await),
                };
                attempt.answered(); // the process does not hang
                match frame.into_data() {
                    Ok(bytes) => {
                        response.push(bytes);
                        response.wait_for_room().await;
                    }
                    Err(frame) => trailers = frame.into_trailers().ok().map(|fields| response_trailers(&fields)),
                }
            }
            if ends_with_connection && attempt.is_exiting() {
                return Err(Failure::Died);
            }
        }
        response.finish(trailers);
        if is_kept {
            attempt.keep(connection);
        }
        Ok(())
    }
}

/// The part of a body that has arrived.
struct Arrived {
    bytes: Bytes,
    is_complete: bool,
}

/// Reads a small body, for up to [`HOLD_TIME`].
async fn first_part(body: &mut Incoming) -> hyper::Result<Arrived> {
    let mut chunks: Vec<Bytes> = Vec::new();
    let read = async {
        while let Some(frame) = body.frame().await {
            chunks.extend(frame?.into_data().ok());
        }
        Ok::<_, hyper::Error>(())
    };
    let is_complete = timeout(HOLD_TIME, read).await.ok().transpose()?.is_some();
    let bytes = if chunks.len() <= 1 { chunks.pop().unwrap_or_default() } else { chunks.concat().into() };
    Ok(Arrived { bytes, is_complete })
}

/// Determines why hyper could not complete an exchange.
async fn why_failed(error: &hyper::Error, stream: &AppStream, attempt: &Attempt, response: &Response<'_>) -> Failure {
    if stream.is_turned_away() {
        return Failure::NotBegun;
    }
    if error.is_user() {
        // The body could not be read from its temporary file.
        return Failure::NotSent(io::Error::other(describe(error)));
    }
    if error.is_parse() {
        return Failure::Broken(format!("the app process sent an invalid response: {}", describe(error)));
    }
    attempt.why_ended(response).await
}

fn describe(error: &hyper::Error) -> String {
    use std::error::Error as _;
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// Copies the bytes of a tunnel until the app process has ended its direction.
async fn carry(client: OnUpgrade, app: OnUpgrade, what: &str) {
    let (client, app) = match tokio::try_join!(client, app) {
        Ok((client, app)) => (TokioIo::new(client), TokioIo::new(app)),
        Err(error) => return log::debug!(request = what; "an upgrade was not completed: {error}"),
    };
    let ((mut from_client, mut to_client), (mut from_app, mut to_app)) = (split(client), split(app));
    let inbound = async {
        let copied = copy(&mut from_client, &mut to_app).await;
        let _ = to_app.shutdown().await; // the app process may have closed the connection
        match copied {
            Ok(_) => std::future::pending().await,
            Err(error) => Err(error),
        }
    };
    let outbound = async {
        copy(&mut from_app, &mut to_client).await?;
        to_client.shutdown().await
    };
    let ended: io::Result<()> = tokio::select! {
        ended = inbound => ended,
        ended = outbound => ended,
    };
    if let Err(error) = ended {
        log::debug!(request = what; "an upgraded connection ended: {error}");
    }
}

/// A connection to an app process. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct Connection {
    sender: SendRequest<SpooledReader>,
    stream: AppStream,
    driver: JoinHandle<()>,
}

impl Connection {
    async fn open(stream: AppStream, response: &Response<'_>) -> Result<Self, Failure> {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(response.max_head().max(MIN_HEAD));
        if let Some(most) = response.max_headers_to_set() {
            builder.max_headers(most);
        }
        let opened = builder.handshake(TokioIo::new(stream.clone())).await;
        let (sender, connection) = opened.map_err(|error| Failure::NotSent(io::Error::other(error)))?;
        let driver = tokio::task::spawn_local(async move {
            let _ = connection.with_upgrades().await; // the exchange receives the same error
        });
        Ok(Self { sender, stream, driver })
    }

    /// Whether the connection can be used again.
    pub(super) fn is_usable(&self) -> bool {
        self.sender.is_ready() && self.stream.is_quiet()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A tunnel has ended, or does not need the task any more, when the exchange drops the connection.
        self.driver.abort();
    }
}

/// A connection that waits for the next request.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) pid: i32,
    pub(super) since: Instant,
    pub(super) connection: Connection,
}

fn head_of(answer: &HttpResponse<Incoming>, switches: bool) -> ResponseHead {
    let headers = response_headers(answer.headers(), switches);
    let content_length = headers.get(header::CONTENT_LENGTH).map(HeaderValue::as_bytes).and_then(parse_digits);
    ResponseHead { status: answer.status(), headers, content_length }
}

fn has_option(headers: &HeaderMap, option: &[u8]) -> bool {
    elements(headers, header::CONNECTION).any(|other| other.eq_ignore_ascii_case(option))
}

/// Whether the connection stays open after the response.
fn stays_open<B>(answer: &HttpResponse<B>) -> bool {
    answer.version() == Version::HTTP_11 && !has_option(answer.headers(), b"close") && !ends_with_connection(answer)
}

/// Whether the end of the connection is the end of the body.
fn ends_with_connection<B>(answer: &HttpResponse<B>) -> bool {
    let headers = answer.headers();
    !headers.contains_key(header::CONTENT_LENGTH) && !headers.contains_key(header::TRANSFER_ENCODING)
}

/// Returns the path and query of a URI, as in the request line.
fn origin_form(uri: &Uri) -> Uri {
    let target = uri.path_and_query().map_or("/", |target| target.as_str());
    let target = match target.as_bytes().first() {
        Some(b'/' | b'*') => target.parse(),
        _ => format!("/{target}").parse(), // `http://host?query` has an empty path
    };
    target.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_is_sent_as_it_was_received() {
        for (received, sent) in [
            ("/a%2Fb//c?x=%20&y", "/a%2Fb//c?x=%20&y"),
            ("http://a.example/b?c", "/b?c"),
            ("http://a.example?c", "/?c"),
            ("*", "*"),
        ] {
            assert_eq!(origin_form(&received.parse().unwrap()).to_string(), sent, "{received}");
        }
    }

    #[test]
    fn a_response_without_a_length_ends_with_its_connection() {
        let answer = |name: &str, value: &str| HttpResponse::builder().header(name, value).body(()).unwrap();
        assert!(ends_with_connection(&answer("x", "y")) && !stays_open(&answer("x", "y")));
        assert!(stays_open(&answer("content-length", "5")) && stays_open(&answer("transfer-encoding", "chunked")));
        let mut closes = answer("content-length", "5");
        closes.headers_mut().insert("connection", HeaderValue::from_static("x, Close"));
        assert!(!stays_open(&closes));
    }
}
