//! What the head of a response may say, whatever the application has put into it, for all protocols: `docs/http.md`.

use forkyard_shm::InFlight;
use http::{HeaderValue, Response, StatusCode, Version, header};
use http_body::Body as HttpBody;

use super::Served;
use crate::app::events;
use crate::protocol::cgi;

/// Whether a request may turn its connection, or its stream, over to another protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Switch {
    No,
    /// By 101 (RFC 9110, section 7.8).
    Upgrade,
    /// By 2xx: extended CONNECT (RFC 8441).
    Connect,
}

impl Switch {
    /// Whether this is the answer that does it.
    pub(crate) fn is_made_by(self, status: StatusCode) -> bool {
        match self {
            Self::No => false,
            Self::Upgrade => status == StatusCode::SWITCHING_PROTOCOLS,
            Self::Connect => status.is_success(),
        }
    }
}

/// Takes out of a response what is not the application's to say.
pub(super) fn settle<B>(response: &mut Response<B>, in_flight: &InFlight) {
    *response.version_mut() = Version::HTTP_11; // hyper panics at some others
    // How a body is framed is up to the protocol.
    if let Some(coding) = response.headers_mut().remove(header::TRANSFER_ENCODING)
        && !coding.as_bytes().eq_ignore_ascii_case(b"chunked")
    {
        log::error!("a Transfer-Encoding was left out: {coding:?} request={:?}", in_flight.what());
    }
}

/// Leaves the body out where there must be none (RFC 9110, sections 9.3.2 and 15.3.5 to 15.4.5), and says its length as far as that
/// may be said.
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
        // That of the response to GET. Routers empty the body of a response to HEAD, so an empty one says nothing of it (RFC 9110, section 8.6).
        _ => response.body().size_hint().exact().filter(|&length| length > 0),
    };
    if let Some(length) = length {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    response.map(Served::emptied)
}

/// Makes a response fit to switch protocols.
///
/// # Errors
/// If it does not say to which one.
pub(super) fn prepare_switch<B>(response: &mut Response<B>) -> Result<(), &'static str> {
    let is_upgrade = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    // It has no body (RFC 9110, sections 8.6 and 9.3.6; RFC 9112, section 6.1).
    headers.remove(header::CONTENT_LENGTH);
    headers.remove(header::TRANSFER_ENCODING);
    if is_upgrade {
        if !headers.contains_key(header::UPGRADE) {
            return Err("a response has status 101 Switching Protocols, and no Upgrade that says which protocol");
        }
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    Ok(())
}

/// A response that may go on for hours, and is not at work but for moments: it says nothing of how busy the worker is, or
/// of what it died of.
pub(super) fn is_event_stream<B>(response: &Response<B>) -> bool {
    let kind = response.headers().get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(events::TYPE.as_bytes()))
        && !response.headers().contains_key(header::CONTENT_LENGTH)
}

/// The `Content-Length` that the application itself has set for the body of a response. One that is no length
/// is taken away: servers would make different things of it.
pub(super) fn promised<B>(response: &mut Response<B>, in_flight: &InFlight) -> Option<u64> {
    if cgi::has_no_body(response.status()) {
        return None;
    }
    let mut values = response.headers().get_all(header::CONTENT_LENGTH).iter();
    let digits = values.next()?.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let length = digits.and_then(|text| text.parse().ok()).filter(|_| values.next().is_none());
    if length.is_none() {
        log::error!("a Content-Length that is no length was left out request={:?}", in_flight.what());
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    length
}
