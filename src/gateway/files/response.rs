//! Creates the response for an open file.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Response, StatusCode};

use super::body::{FileBody, Part};
use super::coding::Coding;
use super::conditions::{Plan, Validators, plan};
use super::ranges::ByteRange;
use super::threads::FileThreads;
use crate::gateway::beneath::OpenFile;
use crate::gateway::body::GatewayBody;
use crate::gateway::refusal;

/// An open file that is to be sent.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) file: OpenFile,
    pub(super) coding: Option<Coding>,
    /// All bytes of the file, if they have been read.
    pub(super) bytes: Option<Bytes>,
}

/// Returns the response for a file. `headers` contains the headers that do not depend on the request, such as
/// `Content-Type`. A `status` other than 200 has no parts and no conditions.
pub(super) fn respond(
    request: &Parts,
    content: Content,
    status: StatusCode,
    mut headers: HeaderMap,
    threads: &FileThreads,
) -> Response<GatewayBody> {
    let length = content.file.version.length;
    let validators = Validators::of(content.file.version, content.coding);
    let plan = match status {
        StatusCode::OK => plan(&request.method, &request.headers, &validators, length),
        _ => Plan::Whole,
    };
    if let Ok(etag) = HeaderValue::try_from(&validators.etag) {
        headers.insert(header::ETAG, etag);
    }
    if let Some(modified) = validators.last_modified() {
        headers.insert(header::LAST_MODIFIED, modified);
    }
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let all = ByteRange { start: 0, end: length };
    let (status, parts) = match plan {
        Plan::Whole => (status, vec![Part::Range(all)]),
        Plan::NotModified => {
            for name in [header::CONTENT_TYPE, header::CONTENT_ENCODING, header::ACCEPT_RANGES] {
                headers.remove(name);
            }
            return with_head(StatusCode::NOT_MODIFIED, headers, GatewayBody::Whole(Bytes::new()));
        }
        Plan::PreconditionFailed => return refusal(StatusCode::PRECONDITION_FAILED),
        Plan::Unsatisfiable => {
            let mut response = refusal(StatusCode::RANGE_NOT_SATISFIABLE);
            if let Ok(range) = HeaderValue::try_from(format!("bytes */{length}")) {
                response.headers_mut().insert(header::CONTENT_RANGE, range);
            }
            return response;
        }
        Plan::Parts(ranges) => (StatusCode::PARTIAL_CONTENT, partial(&ranges, length, &mut headers)),
    };
    let body = match content.bytes {
        _ if request.method == Method::HEAD => {
            headers.insert(header::CONTENT_LENGTH, length.into());
            return with_head(status, headers, GatewayBody::Whole(Bytes::new()));
        }
        Some(bytes) if status != StatusCode::PARTIAL_CONTENT => GatewayBody::Whole(bytes),
        Some(_) | None => GatewayBody::File(FileBody::new(content.file, parts, threads)),
    };
    let length = http_body::Body::size_hint(&body).lower();
    headers.insert(header::CONTENT_LENGTH, length.into());
    with_head(status, headers, body)
}

fn with_head(status: StatusCode, headers: HeaderMap, body: GatewayBody) -> Response<GatewayBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// Returns the body of a 206, and sets its headers. Several ranges are sent as multipart/byteranges (RFC 9110, section
/// 14.6).
fn partial(ranges: &[ByteRange], total: u64, headers: &mut HeaderMap) -> Vec<Part> {
    if let [range] = ranges {
        if let Ok(value) = HeaderValue::try_from(range.content_range(total)) {
            headers.insert(header::CONTENT_RANGE, value);
        }
        return vec![Part::Range(*range)];
    }
    let boundary = format!("{:016x}", getrandom::u64().unwrap_or(total));
    let kind = headers.get(header::CONTENT_TYPE).map(|kind| kind.as_bytes().to_vec());
    let mut parts = Vec::with_capacity(2 * ranges.len() + 1);
    for range in ranges {
        let mut head = format!("\r\n--{boundary}\r\n").into_bytes();
        if let Some(kind) = &kind {
            head.extend_from_slice(&[b"Content-Type: ", kind.as_slice(), b"\r\n"].concat());
        }
        head.extend_from_slice(format!("Content-Range: {}\r\n\r\n", range.content_range(total)).as_bytes());
        parts.extend([Part::Text(head.into()), Part::Range(*range)]);
    }
    parts.push(Part::Text(format!("\r\n--{boundary}--\r\n").into()));
    if let Ok(kind) = HeaderValue::try_from(format!("multipart/byteranges; boundary={boundary}")) {
        headers.insert(header::CONTENT_TYPE, kind);
    }
    parts
}

/// Returns the media type of a file by the extension of its name. Text is UTF-8, except HTML, which can state its own
/// encoding.
pub(super) fn content_type(name: &[u8]) -> HeaderValue {
    let extension = name.iter().rposition(|&byte| byte == b'.').and_then(|at| name.get(at + 1..)).unwrap_or_default();
    let extension = String::from_utf8_lossy(extension);
    let kind = match extension.to_ascii_lowercase().as_str() {
        "mjs" => "text/javascript",
        "map" => "application/json",
        other => mime_guess::from_ext(other).first_raw().unwrap_or("application/octet-stream"),
    };
    if kind.starts_with("text/") && kind != "text/html" {
        let kind = HeaderValue::try_from(format!("{kind}; charset=utf-8"));
        return kind.unwrap_or_else(|_| HeaderValue::from_static("text/plain"));
    }
    HeaderValue::from_static(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extension_decides_the_content_type() {
        for (name, expected) in [
            ("a.css", "text/css; charset=utf-8"),
            ("dir.html/A.JS", "text/javascript; charset=utf-8"),
            ("a.mjs", "text/javascript; charset=utf-8"),
            ("a.html", "text/html"),
            ("a.svg", "image/svg+xml"),
            ("a.woff2", "font/woff2"),
            ("a.wasm", "application/wasm"),
            ("a.js.map", "application/json"),
            ("a.txt", "text/plain; charset=utf-8"),
            ("README", "application/octet-stream"),
            ("a.", "application/octet-stream"),
            ("a.\u{e9}", "application/octet-stream"),
        ] {
            assert_eq!(content_type(name.as_bytes()), expected, "{name}");
        }
    }

    #[test]
    fn parts_of_a_file_are_separated() {
        let mut headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"))]);
        let ranges = [ByteRange { start: 0, end: 5 }, ByteRange { start: 7, end: 8 }];
        let parts = partial(&ranges, 10, &mut headers);
        let boundary = headers[header::CONTENT_TYPE].to_str().unwrap();
        let boundary = boundary.strip_prefix("multipart/byteranges; boundary=").unwrap();
        let text: String = parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => String::from_utf8(text.to_vec()).unwrap(),
                Part::Range(range) => format!("<{}>", range.length()),
            })
            .collect();
        let expected = format!(
            "\r\n--{boundary}\r\nContent-Type: text/plain\r\nContent-Range: bytes 0-4/10\r\n\r\n<5>\
             \r\n--{boundary}\r\nContent-Type: text/plain\r\nContent-Range: bytes 7-7/10\r\n\r\n<1>\
             \r\n--{boundary}--\r\n"
        );
        assert_eq!(text, expected);
        assert!(!headers.contains_key(header::CONTENT_RANGE));
    }
}
