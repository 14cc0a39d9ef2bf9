//! Writes a response's head in CGI form (RFC 3875, section 6.3).

use bytes::{BufMut as _, BytesMut};
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderName};

use crate::protocol::grammar::elements;

/// Whether a response with this status ends with its head (RFC 9110, section 6.4.1).
pub(crate) fn has_no_body(status: StatusCode) -> bool {
    matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED)
        || status.is_informational()
}

/// Writes the head of a response (6.3): the status, the headers and an empty line. The status is always written,
/// because some web servers do not infer a redirection from `Location`. `Location` comes before the status, because
/// HAProxy turns a response into a 302 if `Location` comes later. Headers that concern a single HTTP connection are
/// left out.
pub(crate) fn response_head(out: &mut BytesMut, status: StatusCode, headers: &HeaderMap, length: Option<u64>) {
    out.reserve(64 + headers.len() * 48);
    // The header names in these options are left out too (RFC 9110, section 7.6.1). There are
    // usually none.
    let options: Vec<&[u8]> = elements(headers, header::CONNECTION).collect();
    if let Some(location) = headers.get(header::LOCATION) {
        out.put_slice(b"location: ");
        out.put_slice(location.as_bytes());
        out.put_slice(b"\r\n");
    }
    out.put_slice(b"Status: ");
    out.put_slice(status.as_str().as_bytes());
    out.put_u8(b' ');
    out.put_slice(status.canonical_reason().unwrap_or("Unknown").as_bytes());
    out.put_slice(b"\r\n");
    for (name, value) in headers {
        // A web server would interpret a header named `status` as the status.
        if is_of_one_connection(name) || *name == header::LOCATION || name == "status" {
            continue;
        }
        // A response without a body has no length (RFC 9110, section 8.6).
        if status == StatusCode::NO_CONTENT && *name == header::CONTENT_LENGTH {
            continue;
        }
        if options.iter().any(|option| option.eq_ignore_ascii_case(name.as_str().as_bytes())) {
            continue;
        }
        match name.as_str().strip_prefix("variable-") {
            // An authorizer sends a variable (FastCGI 6.3), whose name must be in capitals.
            Some(variable) => {
                out.put_slice(b"Variable-");
                out.extend(variable.bytes().map(|byte| byte.to_ascii_uppercase()));
            }
            None => out.put_slice(name.as_str().as_bytes()),
        }
        out.put_slice(b": ");
        out.put_slice(value.as_bytes());
        out.put_slice(b"\r\n");
    }
    if let Some(length) = length.filter(|_| !headers.contains_key(header::CONTENT_LENGTH)) {
        out.put_slice(b"content-length: ");
        out.put_slice(itoa::Buffer::new().format(length).as_bytes());
        out.put_slice(b"\r\n");
    }
    out.put_slice(b"\r\n");
}

/// Whether a header concerns the connection to the client. Such headers are the web server's responsibility (6.3.4; RFC
/// 9110, section 7.6.1).
pub(crate) fn is_of_one_connection(name: &HeaderName) -> bool {
    matches!(*name, header::CONNECTION | header::TRANSFER_ENCODING | header::UPGRADE | header::TE | header::TRAILER)
        || matches!(name.as_str(), "keep-alive" | "proxy-connection")
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_204_has_no_length_whatever_the_application_says() {
        let headers = HeaderMap::from_iter([(header::CONTENT_LENGTH, HeaderValue::from_static("0"))]);
        let mut out = BytesMut::new();
        response_head(&mut out, StatusCode::NO_CONTENT, &headers, None);
        assert_eq!(out, "Status: 204 No Content\r\n\r\n");
    }

    #[test]
    fn a_response_head_always_has_its_status_and_variables_are_in_capitals() {
        let mut headers = HeaderMap::new();
        headers.insert("location", HeaderValue::from_static("/there"));
        headers.insert("connection", HeaderValue::from_static("close"));
        headers.insert("status", HeaderValue::from_static("200"));
        headers.insert("variable-remote_role", HeaderValue::from_static("Editor"));
        let mut out = BytesMut::new();
        response_head(&mut out, StatusCode::SEE_OTHER, &headers, Some(0));
        assert_eq!(
            out,
            "location: /there\r\nStatus: 303 See Other\r\nVariable-REMOTE_ROLE: Editor\r\ncontent-length: 0\r\n\r\n"
        );
    }
}
