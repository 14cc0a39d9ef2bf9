//! Builds the bytes of the request once per run. Performs no I/O.

use crate::options::Options;
use crate::target::{Protocol, Target};

/// FastCGI record types, roles and flags that a request uses.
mod wire {
    pub(super) const VERSION: u8 = 1;
    pub(super) const BEGIN_REQUEST: u8 = 1;
    pub(super) const PARAMS: u8 = 4;
    pub(super) const STDIN: u8 = 5;
    pub(super) const ROLE_RESPONDER: u8 = 1;
    pub(super) const KEEP_CONN: u8 = 1;
}

/// The id of every request. A connection has only one request at a time.
pub(crate) const REQUEST_ID: u16 = 1;

/// A browser's request headers, except the host. There is no `Accept-Encoding`, because only some servers would then compress
/// the response. There is no cookie, because a cookie can prevent a page from being cached.
const BROWSER: [(&str, &str); 4] = [
    ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
    ("Accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
    ("Accept-Language", "en-GB,en;q=0.7,de;q=0.3"),
    ("Upgrade-Insecure-Requests", "1"),
];

/// The type of the body of a POST, which PHP does not parse.
const BODY_TYPE: &str = "application/octet-stream";

/// Returns the request that `options` describe, a POST if there is a body. With `keep`, the request asks the server to keep the
/// connection open.
pub(crate) fn request(options: &Options, body: Option<&[u8]>, keep: bool) -> Vec<u8> {
    match options.connect.protocol {
        Protocol::Fastcgi => fastcgi(&params(&options.uri, body, &options.params), body.unwrap_or_default(), keep),
        Protocol::Http => http(&options.connect, &options.uri, body, keep),
    }
}

fn method(body: Option<&[u8]>) -> &'static str {
    if body.is_some() { "POST" } else { "GET" }
}

fn http(target: &Target, uri: &str, body: Option<&[u8]>, keep: bool) -> Vec<u8> {
    let mut text = format!("{} {uri} HTTP/1.1\r\nHost: {}\r\n", method(body), target.host());
    for (name, value) in BROWSER {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if let Some(body) = body {
        text.push_str(&format!("Content-Type: {BODY_TYPE}\r\nContent-Length: {}\r\n", body.len()));
    }
    text.push_str(if keep { "\r\n" } else { "Connection: close\r\n\r\n" });
    [text.as_bytes(), body.unwrap_or_default()].concat()
}

/// Returns the parameters that nginx sends with its stock `fastcgi_params`, with `overrides` applied.
fn params(uri: &str, body: Option<&[u8]>, overrides: &[(String, String)]) -> Vec<(String, String)> {
    let length = body.map(|body| body.len().to_string()).unwrap_or_default();
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let script = format!("/srv/www{path}");
    let mut params: Vec<(String, String)> = [
        ("QUERY_STRING", query),
        ("REQUEST_METHOD", method(body)),
        ("CONTENT_TYPE", if body.is_some() { BODY_TYPE } else { "" }),
        ("CONTENT_LENGTH", &length),
        ("SCRIPT_NAME", path),
        ("REQUEST_URI", uri),
        ("DOCUMENT_URI", path),
        ("DOCUMENT_ROOT", "/srv/www"),
        ("SERVER_PROTOCOL", "HTTP/1.1"),
        ("REQUEST_SCHEME", "http"),
        ("GATEWAY_INTERFACE", "CGI/1.1"),
        ("SERVER_SOFTWARE", "nginx/1.28.0"),
        ("REMOTE_ADDR", "192.0.2.44"),
        ("REMOTE_PORT", "40312"),
        ("SERVER_ADDR", "192.0.2.1"),
        ("SERVER_PORT", "80"),
        ("SERVER_NAME", "www.example.org"),
        ("REDIRECT_STATUS", "200"),
        ("SCRIPT_FILENAME", &script),
        ("HTTP_HOST", "www.example.org"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    for (name, value) in BROWSER {
        params.push((format!("HTTP_{}", name.to_uppercase().replace('-', "_")), value.into()));
    }
    for (name, value) in overrides {
        match params.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => old.clone_from(value),
            None => params.push((name.clone(), value.clone())),
        }
    }
    params
}

fn fastcgi(params: &[(String, String)], body: &[u8], keep: bool) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in params {
        push_length(&mut block, name.len());
        push_length(&mut block, value.len());
        block.extend_from_slice(name.as_bytes());
        block.extend_from_slice(value.as_bytes());
    }
    let flags = if keep { wire::KEEP_CONN } else { 0 };
    let mut out = Vec::with_capacity(block.len() + 64);
    push_record(&mut out, wire::BEGIN_REQUEST, &[0, wire::ROLE_RESPONDER, flags, 0, 0, 0, 0, 0]);
    for piece in block.chunks(usize::from(u16::MAX)) {
        push_record(&mut out, wire::PARAMS, piece);
    }
    push_record(&mut out, wire::PARAMS, &[]);
    for piece in body.chunks(usize::from(u16::MAX)) {
        push_record(&mut out, wire::STDIN, piece);
    }
    push_record(&mut out, wire::STDIN, &[]);
    out
}

/// Appends a length: one byte for lengths up to 127, otherwise four bytes with the top bit set.
fn push_length(out: &mut Vec<u8>, length: usize) {
    match u8::try_from(length) {
        Ok(short @ 0..=127) => out.push(short),
        _ => {
            let long = u32::try_from(length).expect("a command line argument is shorter than 2 GiB");
            out.extend_from_slice(&(long | 1 << 31).to_be_bytes());
        }
    }
}

/// Appends a record, padded to a multiple of eight bytes as nginx pads it.
fn push_record(out: &mut Vec<u8>, kind: u8, content: &[u8]) {
    let length = u16::try_from(content.len()).expect("callers split content that is longer than a record");
    let padding = content.len().wrapping_neg() & 7;
    out.extend_from_slice(&[wire::VERSION, kind]);
    out.extend_from_slice(&REQUEST_ID.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&[u8::try_from(padding).expect("the padding is at most 7"), 0]);
    out.extend_from_slice(content);
    out.extend_from_slice(&[0; 7][..padding]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the type and content of each record.
    fn records(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let (header, rest) = bytes.split_at(8);
            assert_eq!(header[0], 1);
            assert_eq!(u16::from_be_bytes([header[2], header[3]]), REQUEST_ID);
            let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
            found.push((header[1], rest[..length].to_vec()));
            bytes = &rest[length + usize::from(header[6])..];
        }
        found
    }

    fn pairs(mut block: &[u8]) -> Vec<(String, String)> {
        fn length(block: &mut &[u8]) -> usize {
            let (size, long) = if block[0] < 128 { (1, false) } else { (4, true) };
            let (head, rest) = block.split_at(size);
            *block = rest;
            let value = head.iter().fold(0, |sum, &byte| sum << 8 | usize::from(byte));
            if long { value & 0x7fff_ffff } else { value }
        }
        let mut found = Vec::new();
        while !block.is_empty() {
            let (name, value) = (length(&mut block), length(&mut block));
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            found.push((text(&block[..name]), text(&block[name..name + value])));
            block = &block[name + value..];
        }
        found
    }

    #[test]
    fn a_fastcgi_request_can_be_parsed_back() {
        let long = "v".repeat(200);
        let sent = params("/a/b?c=d", None, &[("LONG".into(), long), ("SCRIPT_FILENAME".into(), "/x.php".into())]);
        let found = records(&fastcgi(&sent, b"", true));
        let kinds: Vec<u8> = found.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [wire::BEGIN_REQUEST, wire::PARAMS, wire::PARAMS, wire::STDIN]);
        assert_eq!(found[0].1, [0, 1, 1, 0, 0, 0, 0, 0]);
        assert_eq!(pairs(&found[1].1), sent);
        assert!(found[2].1.is_empty() && found[3].1.is_empty());
        assert!(sent.contains(&("QUERY_STRING".into(), "c=d".into())));
        assert!(sent.contains(&("SCRIPT_NAME".into(), "/a/b".into())));
        assert!(sent.contains(&("SCRIPT_FILENAME".into(), "/x.php".into())));
        assert_eq!(sent.iter().filter(|(name, _)| name == "SCRIPT_FILENAME").count(), 1);
    }

    #[test]
    fn params_longer_than_a_record_are_split() {
        let sent = params("/", None, &[("LONG".into(), "v".repeat(100_000))]);
        let found = records(&fastcgi(&sent, b"", false));
        assert_eq!(found[0].1[2], 0);
        assert_eq!(found.iter().filter(|(kind, _)| *kind == wire::PARAMS).count(), 3);
        let block: Vec<u8> =
            found.iter().filter(|(kind, _)| *kind == wire::PARAMS).flat_map(|(_, part)| part.clone()).collect();
        assert_eq!(pairs(&block), sent);
    }

    #[test]
    fn an_http_request_can_be_parsed_back() {
        let target: Target = "http:127.0.0.1:8080".parse().unwrap();
        for keep in [true, false] {
            let bytes = http(&target, "/a?b", None, keep);
            let mut headers = [httparse::EMPTY_HEADER; 16];
            let mut parsed = httparse::Request::new(&mut headers);
            assert_eq!(parsed.parse(&bytes).unwrap(), httparse::Status::Complete(bytes.len()));
            assert_eq!((parsed.method, parsed.path), (Some("GET"), Some("/a?b")));
            let value =
                |name: &str| parsed.headers.iter().find(|header| header.name == name).map(|header| header.value);
            assert_eq!(value("Host"), Some(b"127.0.0.1:8080".as_slice()));
            assert_eq!(value("Connection").is_none(), keep);
        }
    }

    #[test]
    fn a_body_is_sent_whole() {
        let body = vec![b'b'; 100_000];
        let sent = params("/", Some(&body), &[]);
        assert!(sent.contains(&("REQUEST_METHOD".into(), "POST".into())));
        assert!(sent.contains(&("CONTENT_LENGTH".into(), "100000".into())));
        let found = records(&fastcgi(&sent, &body, true));
        let stdin: Vec<Vec<u8>> =
            found.into_iter().filter(|(kind, _)| *kind == wire::STDIN).map(|(_, part)| part).collect();
        assert_eq!(stdin.len(), 3);
        assert_eq!(stdin.concat(), body);

        let target: Target = "http:127.0.0.1:8080".parse().unwrap();
        let bytes = http(&target, "/", Some(&body), true);
        let text = String::from_utf8(bytes).unwrap();
        let (head, rest) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("POST / HTTP/1.1\r\n") && head.ends_with("\r\nContent-Length: 100000"), "{head}");
        assert_eq!(rest.as_bytes(), body);
    }
}
