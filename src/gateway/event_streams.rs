//! Serves event streams in the gateway, so that a subscriber does not occupy an app process.
//!
//! - A path of `--sse` is served without an app process.
//! - An application hands its client over with the header [`SUBSCRIBE`], which contains the topics, in a 200 response to
//!   GET (or HEAD). The client receives the event stream instead of the application's body. The headers of the response
//!   are kept, except those that describe its body or control caches. In any other response, the header is an error.
//!
//! The streams are those of linked applications (`sse`): replay, long polling, limits and drains are the same.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Response, StatusCode};

use super::body::GatewayBody;
use super::refusal;
use crate::app::events::{Events, EventsError, sse_for};
use crate::config::sse::{SsePath, SseRoutes};
use crate::protocol::cgi::parse_response::ResponseHead;
use crate::protocol::topics;

/// The header with which an application hands its client over. It never reaches the client.
const SUBSCRIBE: HeaderName = HeaderName::from_static("x-forkyard-subscribe");
/// The name of this header in messages.
const NAME: &str = "X-Forkyard-Subscribe";

/// Headers of the application that do not apply to the stream.
const OF_THE_BODY: [HeaderName; 16] = [
    header::ACCEPT_RANGES,
    header::AGE,
    header::CACHE_CONTROL,
    header::CONTENT_DISPOSITION,
    header::CONTENT_ENCODING,
    header::CONTENT_LANGUAGE,
    header::CONTENT_LENGTH,
    header::CONTENT_LOCATION,
    header::CONTENT_RANGE,
    header::CONTENT_TYPE,
    header::ETAG,
    header::EXPIRES,
    header::LAST_MODIFIED,
    header::PRAGMA,
    header::TRAILER,
    HeaderName::from_static("content-digest"),
];

/// The event streams of a gateway.
#[derive(Debug)]
pub(super) struct EventStreams {
    events: Events,
    routes: SseRoutes,
}

impl EventStreams {
    pub(super) fn new(events: Events, routes: SseRoutes) -> Self {
        Self { events, routes }
    }

    /// Returns the response to a request for a path of `--sse`, or `None` if the request is for an app process.
    pub(super) fn serve(&self, request: &Parts) -> Option<Response<GatewayBody>> {
        let topics = match self.routes.find(request.uri.path()) {
            SsePath::Other => return None,
            _ if !may_subscribe(&request.method) => {
                let mut response = refusal(StatusCode::METHOD_NOT_ALLOWED);
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
                return Some(response);
            }
            SsePath::NoTopic => return Some(refusal(StatusCode::NOT_FOUND)),
            SsePath::Topics(topics) => topics,
        };
        Some(sse_for(&request.headers, &request.uri, &self.events, topics).response().map(GatewayBody::Events))
    }

    /// Removes the header from the head of an application's response. If the header is there, returns the response that
    /// replaces the application's.
    ///
    /// # Errors
    /// Returns the reason for a 502 if the application must not send the header in this response, or if the header is
    /// invalid.
    pub(super) fn take_over(
        &self,
        request: &Parts,
        head: &mut ResponseHead,
    ) -> Result<Option<Response<GatewayBody>>, String> {
        if !head.headers.contains_key(SUBSCRIBE) {
            return Ok(None);
        }
        let topics = topics::parse(head.headers.get_all(SUBSCRIBE).iter().map(HeaderValue::as_bytes));
        head.headers.remove(SUBSCRIBE);
        if head.status != StatusCode::OK || !may_subscribe(&request.method) {
            let (status, method) = (head.status.as_u16(), &request.method);
            return Err(format!("{NAME} in a {status} response to {method} (only a 200 response to GET can have it)"));
        }
        let topics = topics.map_err(|error| format!("{NAME}: {error}"))?;
        let stream = sse_for(&request.headers, &request.uri, &self.events, topics);
        if let Some(error @ EventsError::NoLog) = stream.error() {
            return Err(format!("{NAME}: {error}"));
        }
        let mut response = stream.response().map(GatewayBody::Events);
        if response.status() == StatusCode::OK {
            let of_stream = std::mem::take(response.headers_mut());
            *response.headers_mut() = merged(std::mem::take(&mut head.headers), of_stream);
        }
        Ok(Some(response))
    }
}

/// Whether the response to a request with this method can be an event stream. The response to HEAD is its head.
fn may_subscribe(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

/// Returns the headers of a stream to which an application has handed its client over. The application may have checked
/// the client, so no cache must store the response.
fn merged(of_app: HeaderMap, of_stream: HeaderMap) -> HeaderMap {
    let mut headers = of_app;
    for name in OF_THE_BODY {
        headers.remove(name);
    }
    headers.extend(of_stream);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_application_keeps_its_headers_except_those_of_its_body() {
        let map = |pairs: &[(&'static str, &'static str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in pairs {
                map.append(*name, HeaderValue::from_static(value));
            }
            map
        };
        let app = map(&[
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
            ("content-type", "text/html"),
            ("content-length", "5"),
            ("content-encoding", "gzip"),
            ("cache-control", "public, max-age=600"),
            ("pragma", "no-cache"),
            ("expires", "Thu, 19 Nov 1981 08:52:00 GMT"),
            ("etag", "\"x\""),
            ("x-accel-buffering", "yes"),
            ("access-control-allow-origin", "https://a.example"),
        ]);
        let stream =
            map(&[("content-type", "text/event-stream"), ("cache-control", "no-cache"), ("x-accel-buffering", "no")]);
        let mut lines: Vec<_> = merged(app, stream).iter().map(|(name, value)| format!("{name}: {value:?}")).collect();
        lines.sort();
        assert_eq!(
            lines,
            [
                "access-control-allow-origin: \"https://a.example\"",
                "cache-control: \"no-store, no-transform\"",
                "content-type: \"text/event-stream\"",
                "set-cookie: \"a=1\"",
                "set-cookie: \"b=2\"",
                "x-accel-buffering: \"no\"",
            ]
        );
    }
}
