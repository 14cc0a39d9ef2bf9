//! Writes the CGI variables of a request (RFC 3875, section 4.1), for an application behind the gateway.
//!
//! [`request_variables`] is for a request that arrived over HTTP. [`forwarded_variables`] is for a request that arrived
//! over FastCGI, SCGI or CGI and therefore has the web server's variables. Both pass each variable to a function, in a
//! fixed order. [`super::request`] is the other direction: it creates the same request from the same variables.
//!
//! A header becomes a variable with the prefix `HTTP_`, its name in capitals and with `_` for `-` (4.1.18). Left out:
//! - `Proxy`, `Content-Length`, `Content-Type` and `Transfer-Encoding`, see [`is_never_a_variable`];
//! - headers that concern one connection, and those that `Connection` names, except `Host`;
//! - headers whose name contains a character other than a letter, digit or `-` ([`ambiguous_headers`]): `X_A` and `X-A`
//!   would result in the same variable, and so would `X.A` in PHP, which replaces the point by `_`.
//!
//! `Authorization` is passed on, because applications such as PHP check it themselves.

use std::net::{IpAddr, SocketAddr};

use http::header::{self, HeaderMap, HeaderName};
use http::request::Parts;
use http::{Uri, Version};

use super::response::is_of_one_connection;
use super::{ClientInfo, Variables, is_never_a_variable};
use crate::protocol::grammar::elements;
use crate::protocol::host::is_host;

/// The script that serves a request, in the bytes of the file system. A missing path has no variable, except
/// `script_name`: `SCRIPT_NAME` is required (4.1.13) and empty by default.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ScriptPaths<'a> {
    pub(crate) document_root: Option<&'a [u8]>,
    pub(crate) script_filename: Option<&'a [u8]>,
    pub(crate) script_name: Option<&'a [u8]>,
    pub(crate) path_info: Option<&'a [u8]>,
}

/// The server as the client addressed it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ServerAddress<'a> {
    /// The value of `SERVER_NAME`. `None` takes the host that the client asked for, without its port.
    pub(crate) name: Option<&'a str>,
    pub(crate) port: u16,
    pub(crate) address: Option<IpAddr>,
}

/// Passes the variables of a request that arrived over HTTP to `each`. `length` is the length of the request's body, if
/// it has one.
///
/// If the client is on a Unix socket, `REMOTE_ADDR` is empty (it is required, 4.1.8) and `REMOTE_PORT` is missing.
pub(crate) fn request_variables(
    request: &Parts,
    client: &ClientInfo,
    server: &ServerAddress<'_>,
    paths: &ScriptPaths<'_>,
    length: Option<u64>,
    mut each: impl FnMut(&[u8], &[u8]),
) {
    let mut digits = itoa::Buffer::new();
    let host = host(request);
    each(b"GATEWAY_INTERFACE", b"CGI/1.1");
    each(b"SERVER_SOFTWARE", concat!("forkyard/", env!("CARGO_PKG_VERSION")).as_bytes());
    each(b"SERVER_PROTOCOL", protocol(request.version));
    each(b"REQUEST_METHOD", request.method.as_str().as_bytes());
    let original = original_uri(&request.uri);
    match original.first() {
        Some(b'/' | b'*') => each(b"REQUEST_URI", original),
        _ => each(b"REQUEST_URI", &[b"/", original].concat()), // `http://host?query` has an empty path
    }
    scheme(client.is_https, &mut each);
    each(b"QUERY_STRING", request.uri.query().unwrap_or_default().as_bytes());
    if let Some(length) = length {
        each(b"CONTENT_LENGTH", digits.format(length).as_bytes());
    }
    if let Some(kind) = request.headers.get(header::CONTENT_TYPE) {
        each(b"CONTENT_TYPE", kind.as_bytes());
    }
    each(b"SERVER_NAME", server.name.map_or_else(|| without_port(host.unwrap_or_default()), str::as_bytes));
    each(b"SERVER_PORT", digits.format(server.port).as_bytes());
    if let Some(address) = server.address {
        each(b"SERVER_ADDR", address.to_string().as_bytes());
    }
    remote(client.address, &mut each);
    script_paths(paths, &mut each);
    each(b"REDIRECT_STATUS", b"200");
    header_variables(&request.headers, host, &mut each);
}

/// Passes the variables of a request that arrived with the web server's variables ([`ClientInfo::params`]) to `each`:
/// the web server's variables unchanged and in order, and after them those that differ.
///
/// - `length` always replaces `CONTENT_LENGTH`, because the gateway may have read a body of unknown length.
/// - Given `paths` replace the web server's. `script_name` replaces `PATH_INFO`, `PATH_TRANSLATED` and `DOCUMENT_URI`
///   too, which depend on it.
/// - The client's address and scheme, and `Host`, are replaced if a trusted proxy reports others (`--trust`).
/// - `REDIRECT_STATUS` is added if it is missing, because php-cgi requires it.
/// - Variables that [`super::request`] ignores for safety are left out, see [`is_never_a_variable`].
pub(crate) fn forwarded_variables(
    request: &Parts,
    client: &ClientInfo,
    paths: &ScriptPaths<'_>,
    length: Option<u64>,
    mut each: impl FnMut(&[u8], &[u8]),
) {
    let (mut sent, mut sent_host, mut has_redirect_status) = (Variables::default(), None, false);
    for (name, value) in client.params.iter() {
        // Invalid variables cause an error earlier, when the request is created.
        let _ = sent.take(name, value);
        has_redirect_status |= name == b"REDIRECT_STATUS";
        if name == b"HTTP_HOST" {
            sent_host = Some(value);
        }
    }
    let host = host(request).filter(|host| sent_host != Some(host));
    let is_other_address = sent.address != client.address.map(|address| address.ip());
    let is_other_scheme = sent.is_https != client.is_https;
    for (name, value) in client.params.iter() {
        let is_replaced = match name {
            b"CONTENT_LENGTH" => true,
            b"DOCUMENT_ROOT" => paths.document_root.is_some(),
            b"SCRIPT_FILENAME" => paths.script_filename.is_some(),
            b"SCRIPT_NAME" | b"DOCUMENT_URI" => paths.script_name.is_some(),
            b"PATH_INFO" => paths.script_name.or(paths.path_info).is_some(),
            b"PATH_TRANSLATED" => paths.script_name.or(paths.path_info).or(paths.document_root).is_some(),
            b"REMOTE_ADDR" | b"REMOTE_PORT" | b"REMOTE_HOST" => is_other_address,
            b"HTTPS" | b"REQUEST_SCHEME" => is_other_scheme,
            b"HTTP_HOST" => host.is_some(),
            name => name.strip_prefix(b"HTTP_").is_some_and(is_never_forwarded),
        };
        if !is_replaced {
            each(name, value);
        }
    }
    if let Some(length) = length {
        each(b"CONTENT_LENGTH", itoa::Buffer::new().format(length).as_bytes());
    }
    if is_other_scheme {
        scheme(client.is_https, &mut each);
    }
    if is_other_address {
        remote(client.address, &mut each);
    }
    replaced_paths(paths, &mut each);
    if !has_redirect_status {
        each(b"REDIRECT_STATUS", b"200");
    }
    if let Some(host) = host {
        each(b"HTTP_HOST", host);
    }
}

/// Returns the headers that have no variable because of their name.
#[cfg(test)]
pub(crate) fn ambiguous_headers(headers: &HeaderMap) -> impl Iterator<Item = &HeaderName> {
    headers.keys().filter(|name| is_ambiguous(name))
}

fn is_ambiguous(name: &HeaderName) -> bool {
    !name.as_str().bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Whether a variable, here without its prefix `HTTP_`, is a header as in [`is_never_a_variable`] in any spelling.
fn is_never_forwarded(variable: &[u8]) -> bool {
    const NAMES: [&[u8]; 4] = [b"PROXY", b"CONTENT_LENGTH", b"CONTENT_TYPE", b"TRANSFER_ENCODING"];
    let capital = |byte: &u8| if *byte == b'-' { b'_' } else { byte.to_ascii_uppercase() };
    NAMES.iter().any(|name| name.iter().copied().eq(variable.iter().map(capital)))
}

fn protocol(version: Version) -> &'static [u8] {
    match version {
        Version::HTTP_09 => b"HTTP/0.9",
        Version::HTTP_10 => b"HTTP/1.0",
        Version::HTTP_2 => b"HTTP/2.0",
        Version::HTTP_3 => b"HTTP/3.0",
        _ => b"HTTP/1.1",
    }
}

/// Returns the path and the query as received. The path is not decoded.
fn original_uri(uri: &Uri) -> &[u8] {
    uri.path_and_query().map_or("/", |path| path.as_str()).as_bytes()
}

/// Returns the host that the client asked for. The authority of the URI (HTTP/2, or an absolute URI) takes precedence
/// (RFC 9112, section 3.2.2).
fn host(request: &Parts) -> Option<&[u8]> {
    let authority = request.uri.authority().map(|authority| authority.as_str().as_bytes());
    let named = authority.or_else(|| request.headers.get(header::HOST).map(|host| host.as_bytes()));
    named.filter(|host| is_host(host))
}

/// Returns a valid host without its port. An IPv6 address keeps its brackets (4.1.14).
fn without_port(host: &[u8]) -> &[u8] {
    let end = if host.starts_with(b"[") {
        host.iter().position(|&byte| byte == b']').map(|at| at + 1)
    } else {
        host.iter().position(|&byte| byte == b':')
    };
    end.and_then(|end| host.get(..end)).unwrap_or(host)
}

fn scheme(is_https: bool, each: &mut impl FnMut(&[u8], &[u8])) {
    each(b"REQUEST_SCHEME", if is_https { b"https" } else { b"http" });
    if is_https {
        each(b"HTTPS", b"on");
    }
}

fn remote(client: Option<SocketAddr>, each: &mut impl FnMut(&[u8], &[u8])) {
    let address = client.map(|client| client.ip().to_string()).unwrap_or_default();
    each(b"REMOTE_ADDR", address.as_bytes());
    // The port is 0 if it is unknown.
    if let Some(client) = client.filter(|client| client.port() != 0) {
        each(b"REMOTE_PORT", itoa::Buffer::new().format(client.port()).as_bytes());
    }
}

fn script_paths(paths: &ScriptPaths<'_>, each: &mut impl FnMut(&[u8], &[u8])) {
    replaced_paths(paths, each);
    if paths.script_name.is_none() {
        each(b"SCRIPT_NAME", b"");
    }
}

/// Passes the variables of the given paths to `each`.
fn replaced_paths(paths: &ScriptPaths<'_>, each: &mut impl FnMut(&[u8], &[u8])) {
    let path_info = paths.path_info.unwrap_or_default();
    if let Some(root) = paths.document_root {
        each(b"DOCUMENT_ROOT", root);
    }
    if let Some(name) = paths.script_name {
        each(b"DOCUMENT_URI", &[name, path_info].concat());
        each(b"SCRIPT_NAME", name);
    }
    if let Some(file) = paths.script_filename {
        each(b"SCRIPT_FILENAME", file);
    }
    if paths.path_info.is_some() {
        each(b"PATH_INFO", path_info);
    }
    if let Some(root) = paths.document_root.filter(|_| !path_info.is_empty()) {
        each(b"PATH_TRANSLATED", &[root.strip_suffix(b"/").unwrap_or(root), path_info].concat());
    }
}

fn header_variables(headers: &HeaderMap, host: Option<&[u8]>, each: &mut impl FnMut(&[u8], &[u8])) {
    if let Some(host) = host {
        each(b"HTTP_HOST", host);
    }
    let options: Vec<&[u8]> = elements(headers, header::CONNECTION).collect();
    let (mut name, mut joined) = (Vec::with_capacity(64), Vec::new());
    for header in headers.keys() {
        let text = header.as_str().as_bytes();
        let is_left_out = *header == header::HOST
            || is_never_a_variable(header)
            || is_of_one_connection(header)
            || is_ambiguous(header)
            || options.iter().any(|option| option.eq_ignore_ascii_case(text));
        if is_left_out {
            continue;
        }
        name.clear();
        name.extend_from_slice(b"HTTP_");
        name.extend(text.iter().map(|&byte| if byte == b'-' { b'_' } else { byte.to_ascii_uppercase() }));
        let mut values = headers.get_all(header).iter();
        let Some(first) = values.next() else { continue };
        let Some(second) = values.next() else {
            each(&name, first.as_bytes());
            continue;
        };
        let separator: &[u8] = if *header == header::COOKIE { b"; " } else { b", " };
        joined.clear();
        joined.extend_from_slice(first.as_bytes());
        for value in std::iter::once(second).chain(values) {
            joined.extend_from_slice(separator);
            joined.extend_from_slice(value.as_bytes());
        }
        each(&name, &joined);
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Request};

    use super::super::request;
    use super::*;
    use crate::protocol::params::Params;

    type Pairs = Vec<(String, Vec<u8>)>;

    const SERVER: ServerAddress<'_> = ServerAddress { name: None, port: 8080, address: None };
    const PATHS: ScriptPaths<'_> = ScriptPaths {
        document_root: Some(b"/srv/www/"),
        script_filename: Some(b"/srv/www/index.php"),
        script_name: Some(b"/index.php"),
        path_info: Some(b"/caf\xe9"),
    };

    fn parts(method: &str, uri: &str, version: Version, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method(method).uri(uri).version(version);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn client(address: &str, is_https: bool) -> ClientInfo {
        ClientInfo::of_http(address.parse().ok(), is_https)
    }

    fn collected(write: impl FnOnce(&mut dyn FnMut(&[u8], &[u8]))) -> Pairs {
        let mut pairs = Vec::new();
        write(&mut |name, value| pairs.push((String::from_utf8(name.to_vec()).unwrap(), value.to_vec())));
        pairs
    }

    fn written(request: &Parts, client: &ClientInfo, paths: &ScriptPaths<'_>, length: Option<u64>) -> Pairs {
        collected(|each| request_variables(request, client, &SERVER, paths, length, each))
    }

    fn forwarded(request: &Parts, client: &ClientInfo, paths: &ScriptPaths<'_>, length: Option<u64>) -> Pairs {
        collected(|each| forwarded_variables(request, client, paths, length, each))
    }

    fn text(pairs: &Pairs) -> String {
        pairs.iter().map(|(name, value)| format!("{name}={}\n", value.escape_ascii())).collect()
    }

    fn http_variables(headers: &[(&str, &str)]) -> String {
        let request = parts("GET", "/", Version::HTTP_11, headers);
        let mut pairs = written(&request, &client("192.0.2.7:4711", false), &ScriptPaths::default(), None);
        pairs.retain(|(name, _)| name.starts_with("HTTP_"));
        text(&pairs)
    }

    /// Returns the request that the server half creates from these variables.
    fn read_again(pairs: &[(String, Vec<u8>)]) -> (Parts, ClientInfo, Option<u64>) {
        let params = Params::from_pairs(pairs.iter().map(|(name, value)| (name.as_bytes(), &value[..])));
        let (parts, length) = request(params, |length| length).unwrap().into_parts();
        let client = parts.extensions.get::<ClientInfo>().unwrap().clone();
        (parts, client, length)
    }

    #[test]
    fn a_request_for_php_has_these_variables_in_this_order() {
        let headers = [("content-type", "text/plain"), ("content-length", "5"), ("host", "a.example:80"), ("x-a", "1")];
        let request = parts("POST", "/caf%C3%A9//?a=1&b", Version::HTTP_2, &headers);
        let server = ServerAddress { name: Some("www"), port: 443, address: Some([192, 0, 2, 1].into()) };
        let pairs = collected(|each| {
            request_variables(&request, &client("[2001:db8::1]:4711", true), &server, &PATHS, Some(5), each);
        });
        let software = concat!("forkyard/", env!("CARGO_PKG_VERSION"));
        let expected = format!(
            "GATEWAY_INTERFACE=CGI/1.1\nSERVER_SOFTWARE={software}\nSERVER_PROTOCOL=HTTP/2.0\nREQUEST_METHOD=POST\n\
             REQUEST_URI=/caf%C3%A9//?a=1&b\nREQUEST_SCHEME=https\nHTTPS=on\nQUERY_STRING=a=1&b\nCONTENT_LENGTH=5\n\
             CONTENT_TYPE=text/plain\nSERVER_NAME=www\nSERVER_PORT=443\nSERVER_ADDR=192.0.2.1\n\
             REMOTE_ADDR=2001:db8::1\nREMOTE_PORT=4711\nDOCUMENT_ROOT=/srv/www/\nDOCUMENT_URI=/index.php/caf\\xe9\n\
             SCRIPT_NAME=/index.php\nSCRIPT_FILENAME=/srv/www/index.php\nPATH_INFO=/caf\\xe9\n\
             PATH_TRANSLATED=/srv/www/caf\\xe9\nREDIRECT_STATUS=200\nHTTP_HOST=a.example:80\nHTTP_X_A=1\n"
        );
        assert_eq!(text(&pairs), expected);
    }

    #[test]
    fn a_request_without_the_optional_parts_has_the_required_variables() {
        let request = parts("GET", "/", Version::HTTP_10, &[]);
        let software = concat!("forkyard/", env!("CARGO_PKG_VERSION"));
        assert_eq!(
            text(&written(&request, &client("unix", false), &ScriptPaths::default(), None)),
            format!(
                "GATEWAY_INTERFACE=CGI/1.1\nSERVER_SOFTWARE={software}\nSERVER_PROTOCOL=HTTP/1.0\nREQUEST_METHOD=GET\n\
                 REQUEST_URI=/\nREQUEST_SCHEME=http\nQUERY_STRING=\nSERVER_NAME=\nSERVER_PORT=8080\nREMOTE_ADDR=\n\
                 SCRIPT_NAME=\nREDIRECT_STATUS=200\n"
            )
        );
    }

    #[test]
    fn repeated_headers_are_joined() {
        let headers = [("cookie", "a=1"), ("accept", "x"), ("cookie", "b=2"), ("accept", "y"), ("accept", "z")];
        assert_eq!(http_variables(&headers), "HTTP_COOKIE=a=1; b=2\nHTTP_ACCEPT=x, y, z\n");
    }

    #[test]
    fn headers_that_could_forge_a_variable_or_concern_one_connection_are_left_out() {
        let headers = [
            ("proxy", "http://evil"),
            ("x_forwarded_for", "evil"),
            ("x.forwarded.for", "evil"),
            ("x~a", "evil"),
            ("connection", "close, X-Mine, Host"),
            ("x-mine", "1"),
            ("keep-alive", "5"),
            ("transfer-encoding", "chunked"),
            ("te", "x"),
            ("trailer", "y"),
            ("upgrade", "h2c"),
            ("proxy-connection", "z"),
            ("content-length", "5"),
            ("content-type", "text/plain"),
            ("proxy-authorization", "kept"),
            ("authorization", "Basic eA=="),
            ("host", "a"),
        ];
        let expected = "HTTP_HOST=a\nHTTP_PROXY_AUTHORIZATION=kept\nHTTP_AUTHORIZATION=Basic eA==\n";
        assert_eq!(http_variables(&headers), expected);
        let request = parts("GET", "/", Version::HTTP_11, &headers);
        let names: Vec<_> = ambiguous_headers(&request.headers).map(HeaderName::as_str).collect();
        assert_eq!(names, ["x_forwarded_for", "x.forwarded.for", "x~a"]);
    }

    #[test]
    fn the_host_is_that_of_the_uri_or_the_header() {
        let names = |uri: &str, headers: &[(&str, &str)]| {
            let pairs = written(
                &parts("GET", uri, Version::HTTP_2, headers),
                &client("", false),
                &ScriptPaths::default(),
                None,
            );
            let value = |wanted: &str| {
                let found = pairs.iter().find(|(name, _)| name == wanted);
                found.map(|(_, value)| String::from_utf8(value.clone()).unwrap())
            };
            (value("HTTP_HOST"), value("SERVER_NAME"), value("REQUEST_URI"))
        };
        for (uri, host, http_host, name, path) in [
            ("http://a:81/x?y", None, Some("a:81"), "a", "/x?y"),
            ("http://a/x", Some("b:82"), Some("a"), "a", "/x"),
            ("/x", Some("b:82"), Some("b:82"), "b", "/x"),
            ("/x", Some("[::1]:82"), Some("[::1]:82"), "[::1]", "/x"),
            ("/x", Some("a b"), None, "", "/x"),
            ("http://a?y", None, Some("a"), "a", "/?y"),
            ("http://a", None, Some("a"), "a", "/"),
            ("*", None, None, "", "*"),
            ("//a/../%2e?", None, None, "", "//a/../%2e?"),
        ] {
            let host: Vec<_> = host.map(|host| ("host", host)).into_iter().collect();
            let expected = (http_host.map(str::to_owned), Some(name.to_owned()), Some(path.to_owned()));
            assert_eq!(names(uri, &host), expected, "{uri}");
        }
    }

    fn random_request(random: &mut fastrand::Rng) -> (Parts, ClientInfo, Option<u64>) {
        let pick = |random: &mut fastrand::Rng, from: &[&'static str]| from[random.usize(0..from.len())];
        let methods = ["GET", "POST", "HEAD", "PROPFIND", "x"];
        let uris = ["/", "/a?b=c", "/caf%C3%A9/?", "*", "//a//b?x=http://y", "/a?q=\u{fc}", "/%00%2f;a=1"];
        let versions = [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2, Version::HTTP_3];
        let names = ["cookie", "accept", "x-a", "x-a-b", "content-type", "content-length", "x_y", "proxy", "te", "x--"];
        let mut request = parts(pick(random, &methods), pick(random, &uris), versions[random.usize(0..4)], &[]);
        if random.bool() {
            request.headers.insert(header::HOST, HeaderValue::from_static(pick(random, &["a", "a:80", "[::1]:8"])));
        }
        for _ in 0..random.usize(0..10) {
            let value: Vec<u8> =
                (0..random.usize(1..20)).map(|_| random.u8(b'!'..0x7f) | random.u8(0..2) << 7).collect();
            let value = HeaderValue::from_bytes(&value).unwrap_or(HeaderValue::from_static("~"));
            request.headers.append(pick(random, &names), value);
        }
        let client = client(pick(random, &["192.0.2.7:1", "[::1]:65535", "10.0.0.1:0", "unix"]), random.bool());
        (request, client, random.bool().then(|| random.u64(..)))
    }

    #[test]
    fn the_server_half_creates_a_request_with_the_same_variables() {
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (request, client, length) = random_request(&mut random);
            let paths = if random.bool() { PATHS } else { ScriptPaths::default() };
            let pairs = written(&request, &client, &paths, length);
            let (again, again_client, again_length) = read_again(&pairs);
            assert_eq!((&again.method, &again.uri), (&request.method, &request.uri), "seed {seed}");
            assert_eq!((again.version, again_length), (request.version, length), "seed {seed}");
            let addresses = (again_client.address, client.address);
            assert_eq!((addresses.0, again_client.is_https), (addresses.1, client.is_https), "seed {seed}");
            assert_eq!(text(&written(&again, &again_client, &paths, length)), text(&pairs), "seed {seed}");
            // Nothing differs from what the web server sent, except the position of the length.
            let (mut before, mut after) = (pairs, forwarded(&again, &again_client, &ScriptPaths::default(), length));
            if let Some(length) = length {
                assert_eq!(after.pop(), Some(("CONTENT_LENGTH".to_owned(), length.to_string().into())), "seed {seed}");
            }
            before.retain(|(name, _)| name != "CONTENT_LENGTH");
            assert_eq!(text(&after), text(&before), "seed {seed}");
        }
    }

    const SENT: [(&str, &str); 14] = [
        ("SCRIPT_FILENAME", "/old/x.php"),
        ("QUERY_STRING", ""),
        ("REQUEST_METHOD", "GET"),
        ("CONTENT_LENGTH", ""),
        ("SCRIPT_NAME", "/x.php"),
        ("PATH_INFO", "/p"),
        ("PATH_TRANSLATED", "/old/p"),
        ("DOCUMENT_ROOT", "/old"),
        ("REMOTE_ADDR", "192.0.2.1"),
        ("REMOTE_PORT", "1"),
        ("HTTP_HOST", "a"),
        ("HTTP_PROXY", "http://evil"),
        ("HTTP_TRANSFER_encoding", "chunked"),
        ("SSL_CLIENT_S_DN", "CN=x"),
    ];

    fn sent() -> (Parts, ClientInfo) {
        let pairs: Vec<_> = SENT.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect();
        let (parts, client, _) = read_again(&pairs);
        (parts, client)
    }

    #[test]
    fn the_paths_and_the_length_replace_those_of_the_web_server() {
        let (request, client) = sent();
        assert_eq!(
            text(&forwarded(&request, &client, &PATHS, Some(7))),
            "QUERY_STRING=\nREQUEST_METHOD=GET\nREMOTE_ADDR=192.0.2.1\nREMOTE_PORT=1\nHTTP_HOST=a\n\
             SSL_CLIENT_S_DN=CN=x\nCONTENT_LENGTH=7\nDOCUMENT_ROOT=/srv/www/\nDOCUMENT_URI=/index.php/caf\\xe9\n\
             SCRIPT_NAME=/index.php\nSCRIPT_FILENAME=/srv/www/index.php\nPATH_INFO=/caf\\xe9\n\
             PATH_TRANSLATED=/srv/www/caf\\xe9\nREDIRECT_STATUS=200\n"
        );
        let only_name = ScriptPaths { script_name: Some(b"/y.php"), ..ScriptPaths::default() };
        assert_eq!(
            text(&forwarded(&request, &client, &only_name, None)),
            "SCRIPT_FILENAME=/old/x.php\nQUERY_STRING=\nREQUEST_METHOD=GET\nDOCUMENT_ROOT=/old\n\
             REMOTE_ADDR=192.0.2.1\nREMOTE_PORT=1\nHTTP_HOST=a\nSSL_CLIENT_S_DN=CN=x\nDOCUMENT_URI=/y.php\n\
             SCRIPT_NAME=/y.php\nREDIRECT_STATUS=200\n"
        );
    }

    #[test]
    fn what_a_trusted_proxy_reports_replaces_the_web_servers_variables() {
        let (mut request, mut client) = sent();
        client.address = Some("203.0.113.9:0".parse().unwrap());
        client.is_https = true;
        request.headers.insert(header::HOST, HeaderValue::from_static("b"));
        let pairs = text(&forwarded(&request, &client, &ScriptPaths::default(), None));
        assert!(!pairs.contains("REMOTE_PORT") && !pairs.contains("192.0.2.1") && !pairs.contains("HTTP_HOST=a"));
        let end = "REQUEST_SCHEME=https\nHTTPS=on\nREMOTE_ADDR=203.0.113.9\nREDIRECT_STATUS=200\nHTTP_HOST=b\n";
        assert!(pairs.ends_with(end), "{pairs}");
    }

    #[test]
    fn a_redirect_status_of_the_web_server_is_kept() {
        let params = Params::from_pairs([(&b"REQUEST_METHOD"[..], &b"GET"[..]), (b"REDIRECT_STATUS", b"404")]);
        let (request, ()) = request(params, |_| ()).unwrap().into_parts();
        let client = request.extensions.get::<ClientInfo>().unwrap().clone();
        let pairs = forwarded(&request, &client, &ScriptPaths::default(), None);
        assert_eq!(text(&pairs), "REQUEST_METHOD=GET\nREDIRECT_STATUS=404\n");
    }
}
