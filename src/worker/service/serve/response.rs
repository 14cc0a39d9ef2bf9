//! Corrects the head of a response for all protocols, regardless of what the application has set (see `docs/http.md`).

use http::{HeaderValue, Response, StatusCode, Version, header};
use http_body::Body as HttpBody;

use super::Served;
use crate::app::events;
use crate::protocol::cgi;
use crate::protocol::grammar::parse_digits;
use crate::worker::service::request_guard::RequestGuard;

/// How a request may switch its connection or stream to another protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Switch {
    No,
    /// With a 101 response (RFC 9110, section 7.8).
    Upgrade,
    /// With a 2xx response to an extended CONNECT (RFC 8441).
    Connect,
}

impl Switch {
    /// Whether a response with this status switches protocols.
    pub(crate) fn is_made_by(self, status: StatusCode) -> bool {
        match self {
            Self::No => false,
            Self::Upgrade => status == StatusCode::SWITCHING_PROTOCOLS,
            Self::Connect => status.is_success(),
        }
    }
}

/// Removes headers that the application must not set.
pub(super) fn settle<B>(response: &mut Response<B>, guard: &RequestGuard) {
    *response.version_mut() = Version::HTTP_11; // hyper panics on some other versions
    // The protocol determines how a body is framed.
    if let Some(coding) = response.headers_mut().remove(header::TRANSFER_ENCODING)
        && !coding.as_bytes().eq_ignore_ascii_case(b"chunked")
    {
        let value = String::from_utf8_lossy(coding.as_bytes());
        log::error!(value:%, request = guard.what(); "removed a Transfer-Encoding from a response");
    }
}

/// Removes the body where none is allowed (RFC 9110, sections 9.3.2 and 15.3.5 to 15.4.5), and sets
/// its length where that is allowed.
pub(super) fn without_body<B>(mut response: Response<Served<B>>, is_head: bool) -> Response<Served<B>>
where
    Served<B>: HttpBody,
{
    let status = response.status();
    if !is_head && !cgi::has_no_body(status) {
        return response;
    }
    let length = match status {
        StatusCode::RESET_CONTENT => Some(0),
        _ if cgi::has_no_body(status) => {
            response.headers_mut().remove(header::CONTENT_LENGTH);
            None
        }
        _ if response.headers().contains_key(header::CONTENT_LENGTH) => None,
        // The length is that of the response to GET (RFC 9110, section 8.6). Routers empty the body of a response to
        // HEAD, so an empty body says nothing about this length.
        _ => response.body().size_hint().exact().filter(|&length| length > 0),
    };
    if let Some(length) = length {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    response.map(Served::emptied)
}

/// Prepares a response that switches protocols.
///
/// # Errors
/// Fails if the response does not name the protocol.
pub(super) fn prepare_switch<B>(response: &mut Response<B>) -> Result<(), &'static str> {
    let is_upgrade = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    // A 2xx response to CONNECT has no length (RFC 9110, section 9.3.6): hyper would reset the stream. `without_body`
    // removes the length from a 101.
    headers.remove(header::CONTENT_LENGTH);
    if is_upgrade {
        if !headers.contains_key(header::UPGRADE) {
            return Err("a response has status 101 Switching Protocols but no Upgrade header");
        }
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    Ok(())
}

/// Whether a response is an event stream. A stream may last for hours and cause little work. It is therefore not
/// counted when the server measures how busy the worker is, or looks for the request that killed the worker.
pub(super) fn is_event_stream<B>(response: &Response<B>) -> bool {
    let kind = response.headers().get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(events::TYPE.as_bytes()))
        && !response.headers().contains_key(header::CONTENT_LENGTH)
}

/// Returns the `Content-Length` that the application has set for the body of a response. An invalid value is removed,
/// because web servers would interpret it in different ways.
pub(super) fn promised<B>(response: &mut Response<B>, guard: &RequestGuard) -> Option<u64> {
    if cgi::has_no_body(response.status()) {
        return None;
    }
    let mut values = response.headers().get_all(header::CONTENT_LENGTH).iter();
    let length = parse_digits(values.next()?.as_bytes()).filter(|_| values.next().is_none());
    if length.is_none() {
        log::error!(request = guard.what(); "removed an invalid Content-Length from a response");
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    length
}
