//! Captures the exact bytes that each web server sends to a FastCGI or SCGI application. In place of an application, the test reads the
//! request and writes the response. If the environment contains `CAPTURE_SEEDS=DIRECTORY` (scripts/capture-seeds), the bytes are stored in
//! that directory.

use std::fs::{self, Permissions};
use std::io::{self, Read, Write as _};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::ask::{Ask, Gate, Pace, Sent};
use crate::common::fastcgi::{END, GET_VALUES, GET_VALUES_RESULT, PARAMS, STDIN, STDOUT, pair, record};
use crate::common::{accepted, accepted_unix};
use crate::fronts::{self, Front, Link, Site};
use crate::http::Connection;

const ANSWER: &[u8] = b"Status: 200 OK\r\nContent-Length: 3\r\n\r\nok\n";

/// A connection that records the bytes it reads.
struct Recorder {
    /// The connection. The stream may contain a TCP socket, because reading and writing use the same system calls for both.
    stream: UnixStream,
    bytes: Vec<u8>,
}

impl Recorder {
    fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        self.bytes.extend_from_slice(&bytes);
        Ok(bytes)
    }

    /// Reads a record. Returns its type, request id and content.
    fn record(&mut self) -> io::Result<(u8, u16, Vec<u8>)> {
        let header = self.take(8)?;
        let number = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        assert_eq!(header[0], 1, "the FastCGI version is 1");
        let content = self.take(number(4).into())?;
        self.take(header[6].into())?;
        Ok((header[1], number(2), content))
    }

    /// Like [`Recorder::serve`], for SCGI. NUL bytes separate the parameters.
    fn serve_scgi(&mut self) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let mut length = 0;
        loop {
            match self.take(1)?[0] {
                digit @ b'0'..=b'9' => length = length * 10 + usize::from(digit - b'0'),
                byte => break assert_eq!(byte, b':', "the netstring's length ends with a colon"),
            }
        }
        let params = self.take(length)?;
        assert_eq!(self.take(1)?, b",", "the netstring ends with a comma");
        let text = String::from_utf8_lossy(&params);
        let (name, rest) = text.split_once('\0').expect("strings end with zero bytes");
        assert_eq!(name, "CONTENT_LENGTH", "CONTENT_LENGTH is the first header");
        let length = rest.split('\0').next().and_then(|length| length.parse().ok()).expect("the value is a length");
        let body = self.take(length)?;
        self.stream.write_all(ANSWER)?;
        Ok((params, body))
    }

    /// Reads one request and answers it. Returns its parameters and its body.
    fn serve(&mut self) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let (mut params, mut body) = (Vec::new(), Vec::new());
        loop {
            let (kind, id, content) = self.record()?;
            match kind {
                GET_VALUES => {
                    let values = [pair("FCGI_MPXS_CONNS", "1"), pair("FCGI_MAX_REQS", "64")].concat();
                    self.stream.write_all(&record(GET_VALUES_RESULT, 0, &values, 0))?;
                }
                PARAMS => params.extend(content),
                STDIN if !content.is_empty() => body.extend(content),
                STDIN => {
                    let answer =
                        [record(STDOUT, id, ANSWER, 0), record(STDOUT, id, b"", 0), record(END, id, &[0; 8], 0)];
                    self.stream.write_all(&answer.concat())?;
                    return Ok((params, body));
                }
                _ => {}
            }
        }
    }
}

fn cases() -> [(&'static str, Ask); 3] {
    let ask = |method, body| Ask {
        method,
        target: "/page/a%20b?c=d".to_owned(),
        headers: vec![("User-Agent", b"seed"), ("Cookie", b"a=1"), ("Content-Type", b"text/plain")],
        body,
        pace: Pace::Even,
        is_tls: false,
    };
    let body = || b"hello=world".as_slice().into();
    [
        ("get", ask("GET", Sent::Nothing)),
        ("post", ask("POST", Sent::Known(body()))),
        ("chunked", ask("POST", Sent::Chunked(body()))),
    ]
}

/// The listener of the application, at the address in the web server's configuration.
enum Backend {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Backend {
    /// Listens on a Unix socket in `directory`, or on a TCP port for mod_proxy_scgi, which does not support Unix sockets here.
    fn new(front: Front, directory: &Path) -> (Self, String) {
        if front == fronts::APACHE_SCGI {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap().to_string();
            return (Self::Tcp(listener), address);
        }
        let socket = directory.join("app.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
        (Self::Unix(listener), socket.display().to_string())
    }

    fn accept(&self) -> Recorder {
        let what = "the web server connects";
        let stream: UnixStream = match self {
            Self::Unix(listener) => accepted_unix(listener, what),
            Self::Tcp(listener) => OwnedFd::from(accepted(listener, what)).into(),
        };
        Recorder { stream, bytes: Vec::new() }
    }
}

fn capture(front: Front) {
    let is_scgi = front.link == Link::Scgi;
    let directory = fronts::shared_directory();
    let own_path = directory.path().display().to_string();
    let (backend, at) = Backend::new(front, directory.path());
    let site = Site::before(front, directory, &at);
    for (name, ask) in cases() {
        if front == fronts::APACHE_SCGI && matches!(ask.body, Sent::Chunked(_)) {
            continue; // mod_proxy_scgi itself answers with 411
        }
        let (params, body, bytes) = std::thread::scope(|scope| {
            let client = scope.spawn(|| Connection::open(&site.address)?.ask(&ask, &mut Gate::none()));
            let mut recorder = backend.accept();
            let (params, body) = if is_scgi { recorder.serve_scgi() } else { recorder.serve() }.unwrap();
            // If this connection stayed open, the web server would use it for the next case, but the test would not read from the
            // connection.
            drop(recorder.stream);
            let (reply, _) = client.join().unwrap().unwrap();
            assert_eq!((reply.status, reply.body.bytes.as_slice()), (200, &b"ok\n"[..]), "{front}, {name}");
            (params, body, recorder.bytes)
        });
        let has = |what: &str| params.windows(what.len()).any(|window| window == what.as_bytes());
        let between = if is_scgi { "\0" } else { "" };
        let method = format!("REQUEST_METHOD{between}{}", ask.method);
        let target = format!("REQUEST_URI{between}/page/a%20b?c=d");
        assert!(has(&method) && has(&target), "{front}, {name}");
        assert_eq!(body, ask.body.bytes(), "{front}, {name}");
        assert!(!has(&own_path), "{front}, {name}: the bytes contain a path of the machine");
        if let Some(seeds) = std::env::var_os("CAPTURE_SEEDS") {
            let protocol = if is_scgi { "scgi" } else { "fastcgi" };
            fs::write(Path::new(&seeds).join(protocol).join(format!("{front}-{name}")), bytes).unwrap();
        }
    }
}

#[test]
fn the_requests_of_each_web_server_can_be_parsed() {
    for front in [
        fronts::NGINX,
        fronts::NGINX_KEPT,
        fronts::NGINX_SCGI,
        fronts::LIGHTTPD,
        fronts::LIGHTTPD_SCGI,
        fronts::APACHE,
        fronts::APACHE_KEPT,
        fronts::APACHE_SCGI,
        fronts::HAPROXY,
        fronts::HAPROXY_MULTIPLEXED,
        fronts::CADDY,
    ] {
        capture(front);
    }
}
