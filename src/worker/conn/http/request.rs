//! Normalizes the head of a request for applications, and rejects requests that hyper accepts but no application should
//! receive.

use http::header::{self, HeaderMap, HeaderValue};
use http::uri::{PathAndQuery, Uri};
use http::{Method, Request, StatusCode, Version};

use crate::protocol::grammar::elements;
use crate::protocol::host::is_host;

const NO_HOST: &str = "an invalid host in Host or in the target";

/// Why a request is rejected before it reaches the application.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) why: &'static str,
}

/// Normalizes a request, or rejects it.
pub(super) fn settle<B>(request: &mut Request<B>) -> Result<(), Refusal> {
    let refuse = |status, why| Err(Refusal { status, why });
    let is_extended = request.extensions().get::<hyper::ext::Protocol>().is_some(); // RFC 8441
    if request.method() == Method::CONNECT && !is_extended {
        return refuse(StatusCode::NOT_IMPLEMENTED, "CONNECT, which only proxies support");
    }
    // hyper has checked that the last coding is chunked, and decodes this coding. It would pass on a body to which
    // other codings are still applied.
    let mut codings = request.headers().get_all(header::TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next()
        && (codings.next().is_some() || !coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
    {
        return refuse(StatusCode::NOT_IMPLEMENTED, "a Transfer-Encoding other than chunked");
    }
    let version = request.version();
    // RFC 9112, section 3.2. `Host` is checked even if it is ignored. Over HTTP/2, `:authority` may replace `Host`.
    let is_named = version == Version::HTTP_2 && request.uri().authority().is_some();
    let mut hosts = request.headers().get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) if version < Version::HTTP_11 || is_named => {}
        (None, _) => return refuse(StatusCode::BAD_REQUEST, "no Host"),
        (Some(_), Some(_)) => return refuse(StatusCode::BAD_REQUEST, "more than one Host"),
        (Some(host), None) if !is_host(host.as_bytes()) => return refuse(StatusCode::BAD_REQUEST, NO_HOST),
        (Some(_), None) => {}
    }
    if let Some(authority) = request.uri().authority() {
        if request.uri().scheme().is_none() {
            return refuse(StatusCode::BAD_REQUEST, "a target that is neither a path nor a URI");
        }
        if !is_host(authority.as_str().as_bytes()) {
            return refuse(StatusCode::BAD_REQUEST, NO_HOST);
        }
        // An absolute URI (RFC 9112, section 3.2.2) or :authority (RFC 9113, section 8.3.1)
        // overrides Host.
        let uri = std::mem::take(request.uri_mut()).into_parts();
        let host = uri.authority.and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
        let path = uri.path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from(path);
        if let Some(host) = host {
            request.headers_mut().insert(header::HOST, host);
        }
    }
    // RFC 9110, section 10.1.1. An expectation in an HTTP/1.0 request is ignored.
    let is_known = |expected: &[u8]| expected.eq_ignore_ascii_case(b"100-continue");
    if version >= Version::HTTP_11 && !elements(request.headers(), header::EXPECT).all(is_known) {
        return refuse(StatusCode::EXPECTATION_FAILED, "an Expect other than 100-continue");
    }
    if version == Version::HTTP_2 {
        join_cookies(request.headers_mut());
    }
    Ok(())
}

/// Joins the cookies into one header, because HTTP/2 clients may send each cookie in its own header (RFC 9113, section
/// 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(version: Version, method: &str, uri: &str, headers: &[(&str, &str)]) -> Result<Request<()>, Refusal> {
        let mut request = Request::builder().version(version).method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(()).unwrap();
        settle(&mut request).map(|()| request)
    }

    #[test]
    fn a_request_has_one_form_whatever_the_version() {
        for (version, uri, headers, path) in [
            (Version::HTTP_11, "/a?b", &[("host", "x:80")][..], "/a?b"),
            (Version::HTTP_11, "http://x:80/a?b", &[("host", "other")], "/a?b"),
            (Version::HTTP_11, "http://x:80", &[("host", "other")], "/"),
            (Version::HTTP_10, "/a", &[("host", "x:80")], "/a"),
            (Version::HTTP_2, "http://x:80/a?b", &[], "/a?b"),
            (Version::HTTP_2, "/a", &[("host", "x:80")], "/a"),
            (Version::HTTP_11, "*", &[("host", "x:80")], "*"),
        ] {
            let request = settled(version, "GET", uri, headers).unwrap();
            assert_eq!(
                (request.uri().to_string(), &request.headers()["host"]),
                (path.to_owned(), &"x:80".parse().unwrap())
            );
        }
        assert!(settled(Version::HTTP_10, "GET", "/", &[]).unwrap().headers().is_empty());
        let cookies = settled(Version::HTTP_2, "GET", "http://x/", &[("cookie", "a=1"), ("cookie", "b=2")]).unwrap();
        assert_eq!(cookies.headers().get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2"]);
    }

    #[test]
    fn what_no_application_should_see_is_refused() {
        for (method, uri, headers, status) in [
            ("GET", "/", &[][..], 400),
            ("GET", "/", &[("host", "a"), ("host", "a")], 400),
            ("GET", "/", &[("host", "a/b")], 400),
            ("GET", "/", &[("host", "a b")], 400),
            ("GET", "/", &[("host", "x:ab")], 400),
            ("GET", "http://user@x/", &[("host", "x")], 400),
            ("GET", "http://x:99999/", &[("host", "x")], 400),
            ("GET", "http://x/", &[], 400),
            ("GET", "http://x/", &[("host", "x"), ("host", "x")], 400),
            ("GET", "http://x/", &[("host", "a:b")], 400),
            ("GET", "x", &[("host", "x")], 400),
            ("CONNECT", "x:80", &[("host", "x:80")], 501),
            ("POST", "/", &[("host", "x"), ("expect", "100-continue, a-miracle")], 417),
            ("POST", "/", &[("host", "x"), ("transfer-encoding", "gzip, chunked")], 501),
            ("POST", "/", &[("host", "x"), ("transfer-encoding", "gzip"), ("transfer-encoding", "chunked")], 501),
        ] {
            let refusal = settled(Version::HTTP_11, method, uri, headers).unwrap_err();
            assert_eq!(refusal.status.as_u16(), status, "{method} {uri} {headers:?}: {}", refusal.why);
        }
        assert!(settled(Version::HTTP_11, "POST", "/", &[("host", ""), ("transfer-encoding", "Chunked")]).is_ok());
    }
}
