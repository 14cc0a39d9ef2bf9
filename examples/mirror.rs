//! An application that returns each request as it was received, over any protocol. It shows what web servers and
//! proxies send.
//!
//! `cargo run --release --example mirror -- --trust 127.0.0.1`, then
//! `curl -H 'X-Forwarded-For: 192.0.2.7' http://127.0.0.1:8080/some/path?x`

use std::fmt::Write as _;
use std::process::ExitCode;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};
use forkyard::ClientInfo;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};

fn main() -> ExitCode {
    forkyard::run(|_cx| Router::new().fallback(tell))
}

/// Responds with one line for each property of the request, followed by its body. If the request has trailers, the
/// response has the same trailers.
async fn tell(request: Request<Body>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let mut text = format!("{} {} {:?}\n", head.method, head.uri, head.version);
    if let Some(peer) = head.extensions.get::<ClientInfo>() {
        let address = peer.address.map_or_else(|| "unknown".to_owned(), |address| address.to_string());
        let _ = writeln!(text, "peer={address} https={}", peer.is_https);
        for (name, value) in peer.params.iter().map(|(name, value)| (name.escape_ascii(), value.escape_ascii())) {
            let _ = writeln!(text, "variable {name}={value}");
        }
    }
    tell_fields(&mut text, &head.headers);
    text.push('\n');
    let Ok(body) = body.collect().await else { return Response::new(Body::from("the body was cut off\n")) };
    let trailers = body.trailers().cloned().unwrap_or_default();
    text.push_str(&String::from_utf8_lossy(&body.to_bytes()));
    if trailers.is_empty() {
        return Response::new(Body::from(text));
    }
    text.push('\n');
    tell_fields(&mut text, &trailers);
    let names: Vec<&str> = trailers.keys().map(HeaderName::as_str).collect();
    let names = HeaderValue::from_str(&names.join(", "));
    let frames = [Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from(text))), Ok(Frame::trailers(trailers))];
    let mut response = Response::new(Body::new(StreamBody::new(futures_util::stream::iter(frames))));
    if let Ok(names) = names {
        response.headers_mut().insert(header::TRAILER, names);
    }
    response
}

fn tell_fields(text: &mut String, fields: &HeaderMap) {
    for (name, value) in fields {
        let _ = writeln!(text, "{name}: {}", String::from_utf8_lossy(value.as_bytes()));
    }
}
