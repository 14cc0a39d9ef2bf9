//! An application that returns parts of the request as it received them, and produces every kind of response, to test
//! how web servers in front of it change requests and responses.
//!
//! `cargo run --release --example scenarios`, then `curl http://127.0.0.1:8080/target/a%20b?c=d`

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::process::ExitCode;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Path, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use forkyard::ClientInfo;
use futures_util::stream::{StreamExt as _, once};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tower_service::Service;

const PIECE: usize = 64 << 10;

fn main() -> ExitCode {
    forkyard::run(|_cx| App(router()))
}

/// The axum routes, and responses that axum would correct if it produced them.
#[derive(Clone)]
struct App(Router);

impl Service<Request<forkyard::Body>> for App {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<forkyard::Body>) -> Self::Future {
        let (path, query) = (request.uri().path(), request.uri().query().unwrap_or_default());
        let response = if path == "*" {
            format!("{} *", request.method()).into_response()
        } else if let Some(status) = path.strip_prefix("/raw/") {
            raw(status, query, Body::from("body\n"))
        } else if let Some(status) = path.strip_prefix("/raw-stream/") {
            let pieces = ["body", "\n"].map(|piece| Ok::<_, Infallible>(Bytes::from_static(piece.as_bytes())));
            raw(status, query, Body::from_stream(futures_util::stream::iter(pieces)))
        } else {
            return Box::pin(self.0.call(request));
        };
        Box::pin(std::future::ready(Ok(response)))
    }
}

/// Returns a response with this status, the headers from the query, and a body, even if the combination is invalid.
fn raw(status: &str, query: &str, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status.parse().unwrap_or(StatusCode::BAD_REQUEST);
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        match (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(&decoded(value))) {
            (Ok(name), Ok(value)) => response.headers_mut().append(name, value),
            _ => return (StatusCode::INTERNAL_SERVER_ERROR, "no header has such a value\n").into_response(),
        };
    }
    response
}

fn decoded(text: &str) -> Vec<u8> {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let (code, rest) = piece.split_at_checked(2).unwrap_or((piece, ""));
        bytes.extend(u8::from_str_radix(code, 16));
        bytes.extend(rest.as_bytes());
    }
    bytes
}

fn router() -> Router {
    Router::new()
        .route("/method", any(async |method: Method| method.to_string()))
        .route("/target/{*rest}", any(async |uri: Uri| uri.to_string()))
        .route("/path/{*rest}", any(path))
        .route("/header/{name}", any(header_of))
        .route("/variable/{name}", any(variable))
        .route("/echo", any(async |body: Body| body))
        .route("/whole", any(async |body: Bytes| body))
        .route("/sum", any(sum))
        .route("/empty", any(async || StatusCode::OK))
        .route("/early", any(async || "the body was not read\n"))
        .route("/status/{code}", any(status))
        .route("/not-modified", any(not_modified))
        .route("/repeat", any(repeat))
        .route("/odd", any(odd))
        .route("/redirect", any(async || (StatusCode::SEE_OTHER, [(header::LOCATION, "/there?a=%20b")])))
        .route("/long/{length}", any(long))
        .route("/bytes/{length}", any(async |Path(length): Path<u64>| Body::new(Bytes64 { left: length })))
        .route("/stream/{length}", any(stream))
        .route("/gate/{port}", any(gate))
        .route("/upgrade", any(upgrade))
        .route("/switch", any(async || (StatusCode::SWITCHING_PROTOCOLS, [(header::UPGRADE, "echo")])))
        .route("/switch-to-nothing", any(async || StatusCode::SWITCHING_PROTOCOLS))
}

/// Returns SCRIPT_NAME and PATH_INFO, as decoded by the web server, or the URI's path if these variables are absent.
async fn path(request: Request) -> Vec<u8> {
    let path = request.uri().path().as_bytes();
    let origin: Option<&ClientInfo> = request.extensions().get();
    let Some(variables) = origin.map(|origin| &origin.params).filter(|params| !params.is_empty()) else {
        return path.to_vec();
    };
    ["SCRIPT_NAME", "PATH_INFO"].map(|name| variables.get(name).unwrap_or_default()).concat()
}

/// Returns the values of a header. The values are joined, because a web server may already have joined them.
async fn header_of(Path(name): Path<String>, headers: HeaderMap) -> Vec<u8> {
    let values: Vec<&[u8]> = headers.get_all(&name).iter().map(HeaderValue::as_bytes).collect();
    let glue: &[u8] = if name == "cookie" { b"; " } else { b", " };
    values.join(glue)
}

/// Returns the value of a CGI variable, or `(none)`.
async fn variable(Path(name): Path<String>, request: Request) -> Vec<u8> {
    let value = request.extensions().get::<ClientInfo>().and_then(|origin| origin.params.get(&name));
    value.unwrap_or(b"(none)").to_vec()
}

/// Returns the length of the request's body, and a checksum.
async fn sum(mut body: Body) -> Result<String, StatusCode> {
    let (mut count, mut sum) = (0, 0_u64);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| StatusCode::BAD_REQUEST)?;
        for &byte in frame.data_ref().into_iter().flatten() {
            count += 1;
            sum = sum.wrapping_mul(31).wrapping_add(byte.into());
        }
    }
    Ok(format!("{count} {sum:016x}\n"))
}

/// Returns a response with this status. The body is the status code if the status allows a body.
async fn status(Path(code): Path<u16>) -> Response {
    match StatusCode::from_u16(code) {
        Ok(status @ (StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)) => status.into_response(),
        Ok(status) => (status, format!("{code}\n")).into_response(),
        Err(_) => StatusCode::BAD_REQUEST.into_response(),
    }
}

async fn not_modified() -> impl IntoResponse {
    (StatusCode::NOT_MODIFIED, [(header::ETAG, "\"v1\""), (header::CACHE_CONTROL, "max-age=60")])
}

async fn repeat() -> Response {
    let mut response = "repeated\n".into_response();
    for value in ["a=1; Path=/", "b=2; HttpOnly"] {
        response.headers_mut().append(header::SET_COOKIE, HeaderValue::from_static(value));
    }
    for value in ["one", "two"] {
        response.headers_mut().append("x-repeated", HeaderValue::from_static(value));
    }
    response
}

/// Returns a header with non-ASCII bytes (obs-text, RFC 9110, section 5.5).
async fn odd() -> Response {
    let mut response = "odd\n".into_response();
    if let Ok(value) = HeaderValue::from_bytes(b"caf\xe9 \x80\xff") {
        response.headers_mut().insert("x-odd", value);
    }
    response
}

/// Returns a header with a value of `length` bytes.
async fn long(Path(length): Path<usize>) -> Response {
    let mut response = "long\n".into_response();
    if let Ok(value) = HeaderValue::from_str(&"v".repeat(length)) {
        response.headers_mut().insert("x-long", value);
    }
    response
}

/// A body of known length. The length may exceed 32 bits.
struct Bytes64 {
    left: u64,
}

impl HttpBody for Bytes64 {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        static X: [u8; PIECE] = [b'x'; PIECE];
        let length = usize::try_from(self.left).unwrap_or(PIECE).min(PIECE);
        self.left -= length as u64;
        Poll::Ready((length > 0).then(|| Ok(Frame::data(Bytes::from_static(&X[..length])))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// Returns the same body without a known length.
async fn stream(Path(length): Path<u64>) -> Body {
    let mut body = Bytes64 { left: length };
    Body::from_stream(futures_util::stream::poll_fn(move |context| {
        Pin::new(&mut body)
            .poll_frame(context)
            .map(|frame| Some(frame?.map(|frame| frame.into_data().unwrap_or_default())))
    }))
}

/// Upgrades the connection if possible, and echoes the data that the client sends.
async fn upgrade(mut request: Request) -> Response {
    if request.extensions().get::<hyper::upgrade::OnUpgrade>().is_none() {
        return StatusCode::UPGRADE_REQUIRED.into_response();
    }
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded.await?));
        tokio::io::copy(&mut read, &mut write).await?;
        write.shutdown().await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    });
    (StatusCode::SWITCHING_PROTOCOLS, [(header::UPGRADE, "echo")]).into_response()
}

/// Sends a first line, connects to this port of 127.0.0.1, and sends a last line when the peer closes the connection.
async fn gate(Path(port): Path<u16>) -> Body {
    let last = async move {
        let mut gate = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        gate.read_to_end(&mut Vec::new()).await?;
        Ok::<_, io::Error>(Bytes::from_static(b"last\n"))
    };
    let first = std::future::ready(Ok(Bytes::from_static(b"first\n")));
    Body::from_stream(once(first).chain(once(last)))
}
