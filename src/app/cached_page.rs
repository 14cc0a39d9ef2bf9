//! Converts cached pages to responses, and responses to pages that can be cached.
//!
//! ```no_run
//! use forkyard::http::{HeaderMap, Response};
//! use forkyard::{Body, page};
//!
//! # async fn example(rendered: Response<Body>, request: &HeaderMap) -> Result<(), Box<dyn std::error::Error>> {
//! let kept = page::from_response(rendered, 1 << 20).await?.gzip(); // the page to store
//! let response = page::to_response(kept, request)?; // for this client, with or without gzip, or 304
//! # Ok(()) }
//! ```

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::pin::pin;

use bytes::{BufMut as _, Bytes};
use forkyard_shm::{CorruptPage, Page};
use http::header::{self, AsHeaderName};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use http_body::Body as HttpBody;
use http_body_util::BodyExt as _;

use crate::sys::BoxError;

/// Why [`from_response`] could not turn a response into a page. The response has been consumed.
#[derive(Debug)]
#[non_exhaustive]
pub enum CollectError {
    /// The body is longer than the caller's limit.
    TooLarge {
        /// The limit, in bytes.
        limit: usize,
    },
    /// Reading the body failed.
    Body(BoxError),
}

impl fmt::Display for CollectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { limit } => {
                write!(f, "the response is longer than the {limit} bytes a page may have (send it without caching it)")
            }
            Self::Body(cause) => write!(f, "the response body failed: {cause}"),
        }
    }
}

impl Error for CollectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Body(cause) => Some(cause.as_ref()),
            Self::TooLarge { .. } => None,
        }
    }
}

/// Creates a response from a page, for a GET or HEAD request with these headers.
///
/// The response is the result of [`Page::negotiate`], with a `Content-Length`; or the 304 of [`Page::not_modified`], if
/// `If-None-Match` lists the page's `ETag` (RFC 9110 §13.1.2). Other conditional headers and ranges are ignored, and no
/// `Age` is sent. The response contains the body even for a HEAD request; the server does not send it. A status that
/// HTTP does not allow becomes 500, and headers that HTTP does not allow are omitted; both are logged. Pages from the
/// cache contain neither.
///
/// # Errors
/// Returns [`CorruptPage`] if the stored page is damaged. Render the page again, as after a miss.
pub fn to_response(page: Page, request_headers: &HeaderMap) -> Result<Response<Bytes>, CorruptPage> {
    let accept_encoding = list(request_headers, header::ACCEPT_ENCODING);
    let known = list(request_headers, header::IF_NONE_MATCH).is_some_and(|tags| page.matches(&tags));
    let page =
        if known { page.not_modified(accept_encoding.as_deref()) } else { page.negotiate(accept_encoding.as_deref())? };
    let (status, headers, body) = page.into_parts();
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or_else(|_| {
        log::error!(status; "a page has an invalid status; sent with status 500");
        StatusCode::INTERNAL_SERVER_ERROR
    });
    for (name, value) in headers {
        if let Err(name) = add(response.headers_mut(), name, value) {
            log::error!(name:% = name.escape_ascii(); "omitted a header of a page that HTTP does not allow");
        }
    }
    let status = response.status();
    // These responses have no body and so no `Content-Length` (RFC 9110 §8.6).
    if !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) && !status.is_informational() {
        let length = HeaderValue::from(response.body().len());
        response.headers_mut().insert(header::CONTENT_LENGTH, length);
    }
    Ok(response)
}

/// Creates a page from a response, with up to `limit` bytes of body.
///
/// This function waits for the complete body, however long that takes, so it is not suitable for event streams. A body
/// whose announced length exceeds `limit` is rejected before any of it is read. Trailers, extensions and the HTTP
/// version are dropped. [`Page::storable`] determines whether the page may be stored.
///
/// # Errors
/// Returns [`CollectError`] if the body is longer than `limit`, or if reading the body fails.
pub async fn from_response<B>(response: Response<B>, limit: usize) -> Result<Page, CollectError>
where
    B: HttpBody<Error: Into<BoxError>>,
{
    let (parts, body) = response.into_parts();
    let body = collect(body, limit).await?;
    let page = Page::new(body).status(parts.status.as_u16());
    Ok(parts.headers.iter().fold(page, |page, (name, value)| page.header(name, value)))
}

async fn collect<B>(body: B, limit: usize) -> Result<Vec<u8>, CollectError>
where
    B: HttpBody<Error: Into<BoxError>>,
{
    let too_large = CollectError::TooLarge { limit };
    let Some(least) = usize::try_from(body.size_hint().lower()).ok().filter(|&least| least <= limit) else {
        return Err(too_large);
    };
    let mut all = Vec::with_capacity(least);
    let mut body = pin!(body);
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame.map_err(|error| CollectError::Body(error.into()))?.into_data() else { continue };
        if bytes::Buf::remaining(&piece) > limit - all.len() {
            return Err(too_large);
        }
        all.put(piece);
    }
    Ok(all)
}

/// Joins all fields with this name into the list that they represent (RFC 9110 §5.3).
fn list(headers: &HeaderMap, name: impl AsHeaderName) -> Option<Cow<'_, [u8]>> {
    let mut values = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let first = Cow::Borrowed(values.next()?);
    Some(values.fold(first, |list, value| Cow::Owned([&list, value].join(&b", "[..]))))
}

/// Adds a header. Returns the header's name as an error if HTTP does not allow the name or the value, or if there are
/// too many headers.
fn add(headers: &mut HeaderMap, name: Vec<u8>, value: Vec<u8>) -> Result<(), Vec<u8>> {
    let made = HeaderName::from_bytes(&name).ok().zip(HeaderValue::from_maybe_shared(Bytes::from(value)).ok());
    match made.map(|(name, value)| headers.try_append(name, value)) {
        Some(Ok(_)) => Ok(()),
        Some(Err(_)) | None => Err(name),
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use http_body::{Frame, SizeHint};
    use http_body_util::{Empty, StreamBody};

    use super::*;
    use crate::app::body::{Body, BodyError};

    fn page() -> Page {
        Page::new("<li>one more line of a page</li>\n".repeat(200))
            .status(203)
            .header("Content-Type", "text/html")
            .header("ETag", "\"7\"")
            .header("Content-Length", "1")
            .header("Link", "<a>")
            .header("Link", "<b>")
    }

    fn request(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter();
        pairs.map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    fn shown(response: &Response<Bytes>) -> Vec<String> {
        let headers = response.headers().iter();
        headers.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect()
    }

    #[test]
    fn a_page_becomes_what_the_client_accepts() {
        let kept = page().gzip();
        let plain = to_response(kept.clone(), &request(&[])).unwrap();
        assert_eq!((plain.status().as_u16(), &plain.body()[..]), (203, page().body()));
        let expected = [
            "content-type: text/html",
            "etag: \"7\"",
            "link: <a>",
            "link: <b>",
            "vary: Accept-Encoding",
            "content-length: 6600",
        ];
        assert_eq!(shown(&plain), expected);

        let gzip = to_response(kept.clone(), &request(&[("accept-encoding", "gzip")])).unwrap();
        assert_eq!(gzip.body(), kept.body());
        assert_eq!(gzip.headers()["content-encoding"], "gzip");
        assert_eq!(gzip.headers()["etag"], "W/\"7\"");
        assert_eq!(gzip.headers()["content-length"], kept.body().len().to_string());
    }

    #[test]
    fn lists_over_several_fields_are_one() {
        let headers = request(&[("accept-encoding", "br"), ("accept-encoding", "gzip"), ("accept-encoding", "zstd")]);
        assert_eq!(list(&headers, header::ACCEPT_ENCODING).unwrap(), &b"br, gzip, zstd"[..]);
        assert_eq!(list(&headers, header::IF_NONE_MATCH), None);
        let response = to_response(page().gzip(), &headers).unwrap();
        assert_eq!(response.headers()["content-encoding"], "gzip");
    }

    #[test]
    fn a_client_that_has_the_page_gets_a_304() {
        for tags in ["\"7\"", "W/\"7\"", "\"6\", \"7\"", "*"] {
            let headers = request(&[("if-none-match", tags), ("accept-encoding", "gzip")]);
            let response = to_response(page().gzip(), &headers).unwrap();
            assert_eq!((response.status(), response.body().len()), (StatusCode::NOT_MODIFIED, 0), "{tags}");
            assert_eq!(shown(&response), ["etag: W/\"7\"", "link: <a>", "link: <b>", "vary: Accept-Encoding"]);
        }
        let others = [request(&[("if-none-match", "\"6\"")]), request(&[])];
        for headers in &others {
            assert_eq!(to_response(page(), headers).unwrap().status(), 203);
        }
        let known = request(&[("if-none-match", "\"7\"")]);
        assert_eq!(to_response(page().status(404), &known).unwrap().status(), 404);
    }

    #[test]
    fn no_length_where_there_is_no_body() {
        let length = |status| {
            let response = to_response(Page::new("").status(status), &HeaderMap::new()).unwrap();
            response.headers().get(header::CONTENT_LENGTH).map(|length| length.to_str().unwrap().to_owned())
        };
        assert_eq!((length(204), length(304), length(100)), (None, None, None));
        assert_eq!((length(200), length(404)), (Some("0".to_owned()), Some("0".to_owned())));
    }

    #[test]
    fn what_http_does_not_have_is_not_sent() {
        let bad = Page::new("").status(42).header("a b", "c").header("x", "a\r\nset-cookie: b").header("y", "z");
        let response = to_response(bad, &HeaderMap::new()).unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(shown(&response), ["y: z", "content-length: 0"]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_response_becomes_a_page_and_comes_back() {
        let pieces = [Frame::data(Bytes::from("<p>")), Frame::trailers(HeaderMap::new()), Frame::data("x".into())];
        let body = Body::new(StreamBody::new(futures_util::stream::iter(pieces.map(Ok::<_, BodyError>))));
        let mut response = Response::builder().status(404).header("link", "<a>").header("link", "<b>");
        response = response.header("x-umlaut", HeaderValue::from_bytes(b"\xe4").unwrap());
        let page = from_response(response.body(body).unwrap(), 4).await.unwrap();
        let expected = Page::new("<p>x").status(404).header("link", "<a>").header("link", "<b>");
        assert_eq!(page, expected.header("x-umlaut", b"\xe4"));
        assert_eq!(to_response(page, &HeaderMap::new()).unwrap().headers().get_all("link").iter().count(), 2);
        let empty = from_response(Response::new(Empty::<Bytes>::new()), 0).await.unwrap();
        assert_eq!(empty, Page::new(""));
    }

    /// A body with an announced length of five bytes that must not be read.
    struct WithLength;

    impl HttpBody for WithLength {
        type Data = Bytes;
        type Error = BodyError;

        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
            panic!("it was read");
        }

        fn size_hint(&self) -> SizeHint {
            SizeHint::with_exact(5)
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_body_beyond_the_limit_is_not_collected() {
        let known = from_response(Response::new(Body::from("12345")), 4).await;
        assert!(matches!(known, Err(CollectError::TooLarge { limit: 4 })), "{known:?}");
        let collected = from_response(Response::new(WithLength), 4).await;
        assert!(matches!(collected, Err(CollectError::TooLarge { limit: 4 })), "{collected:?}");
        let pieces = futures_util::stream::iter((0..20).map(|_| Ok::<_, BodyError>(Frame::data(Bytes::from("12345")))));
        let unknown = from_response(Response::new(StreamBody::new(pieces)), 99).await;
        assert!(matches!(unknown, Err(CollectError::TooLarge { limit: 99 })), "{unknown:?}");
        let text = unknown.unwrap_err().to_string();
        assert_eq!(text, "the response is longer than the 99 bytes a page may have (send it without caching it)");

        let broken = futures_util::stream::iter([Ok(Frame::data(Bytes::from("1"))), Err(BodyError::Cut)]);
        let broken = from_response(Response::new(StreamBody::new(broken)), 99).await.unwrap_err();
        assert_eq!(broken.to_string(), format!("the response body failed: {}", BodyError::Cut));
    }
}
