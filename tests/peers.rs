//! Access control (`--allow`), and trust in forwarded client addresses (`--trust`), over each protocol.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::Command;

use common::http::Client;
use common::limit::InTime as _;
use common::raw::{self, Protocol};
use common::{PATIENCE, Server, fastcgi, program};

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];
const SCGI: [&str; 2] = ["--bind", "scgi:127.0.0.1:0"];
const FASTCGI: [&str; 2] = ["--bind", "fastcgi:127.0.0.1:0"];

fn mirror(binds: &[&str], arguments: &[&str]) -> Server {
    Server::start(
        "mirror",
        &[binds, &["--workers", "1", "--log-level", "debug,hyper=info,h2=info"], arguments].concat(),
    )
}

/// Returns the request as the application sees it, with `before` sent ahead of the request and `headers` in its head.
fn seen(address: &str, before: &[u8], headers: &str) -> String {
    let mut client = Client::connect(address).unwrap();
    let head = format!("GET / HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
    client.stream.get_mut().write_all(&[before, head.as_bytes()].concat()).unwrap();
    client.response(false).unwrap().text()
}

/// Like [`seen`], but over FastCGI. `params` are added to the parameters that a web server sends.
fn seen_over_fastcgi(address: &str, before: &[u8], params: &[(&str, &str)]) -> String {
    let mut client = fastcgi::Client::connect(address).unwrap();
    let more: Vec<u8> = params.iter().flat_map(|(name, value)| fastcgi::pair(name, value)).collect();
    let mut records = fastcgi::head(1, true, "GET", "/", None);
    records.insert(2, fastcgi::record(fastcgi::PARAMS, 1, &more, 0));
    records.push(fastcgi::record(fastcgi::STDIN, 1, b"", 0));
    records.insert(0, before.to_vec());
    client.send(&records).unwrap();
    String::from_utf8(client.response(1).unwrap().body().to_vec()).unwrap()
}

/// Like [`seen`], but over SCGI, where a request without a body ends with the comma of the netstring.
fn seen_over_scgi(address: &str, before: &[u8]) -> String {
    let mut stream = common::connect_tcp(address.strip_prefix("scgi:").unwrap()).unwrap();
    let pairs = [
        ("CONTENT_LENGTH", "0"),
        ("SCGI", "1"),
        ("REQUEST_METHOD", "GET"),
        ("REQUEST_URI", "/"),
        ("REMOTE_ADDR", "192.0.2.9"),
        ("REMOTE_PORT", "80"),
    ]
    .map(|(name, value)| format!("{name}\0{value}\0"))
    .concat();
    let request = format!("{}:{pairs},", pairs.len());
    stream.write_all(&[before, request.as_bytes()].concat()).unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    all
}

/// Returns all data that the server sends until it closes the connection.
fn all_that_comes(address: &str, bytes: &[u8]) -> String {
    let mut stream = common::connect_tcp(address).unwrap();
    let mut all = Vec::new();
    // The server may close or reset the connection before all data is written.
    let _ = stream.write_all(bytes);
    match stream.read_to_end(&mut all) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    String::from_utf8_lossy(&all).into_owned()
}

const X_FORWARDED: &str = "X-Forwarded-For: 6.6.6.6, 192.0.2.7, 127.0.0.1\r\nX-Forwarded-Proto: https\r\n\
                           X-Forwarded-Host: site.example\r\nForwarded: for=6.6.6.6;host=evil\r\n";

#[test]
fn a_trusted_proxy_determines_the_client_address() {
    let mut server = mirror(&[HTTP, FASTCGI].concat(), &["--trust", "10.0.0.0/8,127.0.0.1"]);
    let text = seen(&server.http(), b"", X_FORWARDED);
    for words in ["\npeer=192.0.2.7:0 https=true\n", "\nhost: site.example\n", "\nx-forwarded-for: 6.6.6.6, "] {
        assert!(text.contains(words), "no {words:?} in {text}");
    }
    assert!(!text.contains("evil"), "the client's own header is not used: {text}");
    let text = seen(&server.http(), b"", "X-Forwarded-Host: a/b\r\n");
    assert!(text.contains("\nhost: x\n") && text.contains("\npeer=127.0.0.1:"), "{text}");

    // Over FastCGI, a trusted proxy may be the client of the web server. REMOTE_ADDR is then the proxy's address, in this test 127.0.0.1.
    let forwarded = [("HTTP_X_FORWARDED_FOR", "192.0.2.7"), ("HTTP_X_FORWARDED_PROTO", "https")];
    let text = seen_over_fastcgi(&server.binds[1], b"", &forwarded);
    assert!(text.contains("\npeer=192.0.2.7:0 https=true\n"), "{text}");
    let text = seen_over_fastcgi(&server.binds[1], b"", &[("REMOTE_ADDR", "192.0.2.9"), forwarded[0]]);
    assert!(text.contains("\npeer=192.0.2.9:4711 https=false\n") && !text.contains("x-forwarded"), "{text}");
    assert!(!text.contains("HTTP_X_FORWARDED"), "the variables do not contain the header: {text}");
    server.stop();

    let mut server = mirror(&HTTP, &["--trust", "127.0.0.1", "--trust-header", "forwarded"]);
    let text =
        seen(&server.http(), b"", "Forwarded: for=\"[2001:db8::7]:80\";proto=https\r\nX-Forwarded-For: 6.6.6.6\r\n");
    assert!(text.contains("\npeer=[2001:db8::7]:80 https=true\n") && !text.contains("6.6.6.6"), "{text}");
    server.stop();
}

#[test]
fn an_untrusted_client_cannot_change_its_address() {
    let mut server = mirror(&HTTP, &["--trust", "192.0.2.0/24"]);
    let text = seen(&server.http(), b"", X_FORWARDED);
    assert!(text.contains("\npeer=127.0.0.1:") && text.contains(" https=false\n"), "{text}");
    assert!(text.contains("\nhost: x\n") && !text.contains("forwarded"), "untrusted headers are removed: {text}");
    // A PROXY header is not valid HTTP.
    let proxy = "PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n";
    let refused = all_that_comes(&server.http(), proxy.as_bytes());
    assert!(refused.starts_with("HTTP/1.1 400 ") && !refused.contains("200 OK"), "{refused}");
    server.wait_for("an HTTP connection ended: invalid ");
    server.stop();

    // Without --trust, forwarding headers reach the application unchanged.
    let mut server = mirror(&HTTP, &[]);
    let text = seen(&server.http(), b"", X_FORWARDED);
    assert!(text.contains("\npeer=127.0.0.1:") && text.contains("\nforwarded: for=6.6.6.6;host=evil\n"), "{text}");
    let refused =
        all_that_comes(&server.http(), b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\xc0\0\x02\x01\x12\x67\0\x50");
    assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
    server.stop();
}

/// Returns a version 2 header that reports TLS.
fn proxy_v2() -> Vec<u8> {
    let tls = [0x20, 0, 5, 1, 0, 0, 0, 0];
    let block = [&[192, 0, 2, 7, 192, 0, 2, 1, 0x12, 0x67, 0, 80][..], &tls].concat();
    [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x14"[..], &block].concat()
}

#[test]
fn a_proxy_header_from_a_load_balancer_works_with_every_protocol() {
    let mut server =
        mirror(&[HTTP, FASTCGI, SCGI].concat(), &["--proxy-protocol", "127.0.0.1", "--trust", "127.0.0.1"]);
    let v1 = b"PROXY TCP6 2001:db8::7 ::1 4711 80\r\n";
    for (header, peer) in [
        (&v1[..], "peer=[2001:db8::7]:4711 https=false"),
        (&proxy_v2(), "peer=192.0.2.7:4711 https=true"),
        (b"PROXY UNKNOWN\r\n", "peer=127.0.0.1:"),
        (b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", "peer=127.0.0.1:"),
    ] {
        let text = seen(&server.http(), header, "");
        assert!(text.contains(&format!("\n{peer}")), "no {peer:?} in {text}");
        // Over FastCGI and SCGI, the web server reports its client, and the load balancer reports only the web server.
        let text = seen_over_fastcgi(&server.binds[1], header, &[]);
        assert!(text.contains("\npeer=127.0.0.1:4711 https=false\n"), "{text}");
        assert!(seen_over_scgi(&server.binds[2], header).contains("\npeer=192.0.2.9:80 https=false\n"));
    }
    // The client named in the PROXY header is not trusted, so its forwarding headers are ignored.
    let text = seen(&server.http(), v1, X_FORWARDED);
    assert!(text.contains("\npeer=[2001:db8::7]:4711 https=false\n") && !text.contains("forwarded"), "{text}");

    // One header is sent byte by byte, and another header is followed by HTTP/2.
    let mut stream = common::connect_tcp(server.http()).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    for byte in [&proxy_v2()[..], request].concat() {
        stream.write_all(&[byte]).unwrap();
    }
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("\npeer=192.0.2.7:4711 https=true\n"), "{text}");
    let curl = ["-sS", "--haproxy-protocol", "--http2-prior-knowledge"];
    let output = Command::new("curl").args(curl).arg(format!("http://{}/", server.http())).output_in_time().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("GET / HTTP/2.0\npeer=127.0.0.1:"), "{text} {}", String::from_utf8_lossy(&output.stderr));

    for (wrong, said) in [
        (&b"PROXY TCP4 nowhere\r\nGET / HTTP/1.1\r\n\r\n"[..], "the PROXY header is malformed"),
        (b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\0", "the PROXY header has an unknown version"),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff", "the PROXY header is too long"),
    ] {
        for address in
            [server.http(), server.binds[1].trim_start_matches("fastcgi:").trim_start_matches('/').to_owned()]
        {
            assert_eq!(all_that_comes(&address, wrong), "");
            server.wait_for(&format!("a connection ended before its first request: {said}"));
        }
    }
    server.stop();
}

/// The specification: "the receiver MUST be configured to only receive the protocol described in this specification and MUST not try to
/// guess whether the protocol header is present or not".
#[test]
fn a_proxy_header_is_never_detected_automatically() {
    let header = b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r\n";
    // A trusted proxy that forwards bytes unchanged lets its client send anything.
    let mut server = mirror(&HTTP, &["--trust", "127.0.0.1"]);
    let request = [&header[..], b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"].concat();
    let text = all_that_comes(&server.http(), &request);
    assert!(text.starts_with("HTTP/1.1 400 ") && !text.contains("192.0.2.7"), "{text}");
    server.stop();

    let mut server = mirror(&[HTTP, FASTCGI, SCGI].concat(), &["--proxy-protocol", "127.0.0.1"]);
    let addresses = server.binds.clone();
    for (protocol, bind) in [Protocol::Http, Protocol::FastCgi, Protocol::Scgi].into_iter().zip(&addresses) {
        let mut stream = raw::connect(bind);
        stream.write_all(&protocol.head("GET", "/", 0)).unwrap();
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes); // if the server left data unread, the close is a reset
        assert!(bytes.is_empty(), "{protocol:?}: {}", bytes.escape_ascii());
    }
    server.wait_for("does not begin with a PROXY header");
    assert!(seen(&server.http(), header, "").contains("\npeer=192.0.2.7:4711 "));
    server.stop();

    let mut server = mirror(&HTTP, &["--proxy-protocol", "192.0.2.0/24"]);
    assert!(
        seen(&server.http(), b"", "").contains("\npeer=127.0.0.1:"),
        "this peer is not configured to send PROXY headers"
    );
    server.stop();
}

/// Waiting for the end of a header uses no CPU time, however long the wait, and a client that disconnects during the wait is detected.
#[test]
fn waiting_for_the_rest_of_a_proxy_header_uses_no_processor_time() {
    let directory = tempfile::tempdir().unwrap();
    let unix = format!("http:unix:{}", directory.path().join("a.sock").display());
    let binds = [&HTTP[..], &["--bind", &unix]].concat();
    let mut server = mirror(&binds, &["--proxy-protocol", "127.0.0.1,unix", "--header-timeout", "0"]);
    for bind in server.binds.clone() {
        let mut streams: Vec<UnixStream> = (0..10)
            .map(|_| {
                let mut stream = raw::connect(&bind);
                stream.write_all(b"PROXY TCP4 192.0.2.7 ").unwrap();
                stream
            })
            .collect();
        let worker = *server.workers().first().unwrap();
        common::wait_until("the connections are accepted", || (common::sockets_of(worker) >= 12).then_some(()));
        let switches = || {
            let threads = std::fs::read_dir(format!("/proc/{worker}/task")).unwrap();
            let thread_ids = threads.map(|thread| thread.unwrap().file_name().to_str().unwrap().parse().unwrap());
            // A thread may exit after it has been listed and before its status is read.
            thread_ids.filter_map(|thread| common::status_number(thread, "voluntary_ctxt_switches")).sum::<u64>()
        };
        let before = switches();
        std::thread::sleep(std::time::Duration::from_secs(3)); // the test measures a period without events
        let after = switches();
        let woke = after.saturating_sub(before);
        assert!(woke < 100, "{bind}: the worker woke {woke} times in 3 s");

        let gone = streams.pop().unwrap();
        gone.shutdown(Shutdown::Write).unwrap();
        let mut stream = gone;
        assert_eq!(
            stream.read(&mut [0; 9]).unwrap_or(0),
            0,
            "{bind}: the server closes the connection whose header stays incomplete"
        );
        for stream in &mut streams {
            stream.write_all(b"192.0.2.1 4711 80\r\nGET / HTTP/1.0\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert!(text.contains("\npeer=192.0.2.7:4711 "), "{bind}: {text}");
        }
    }
    server.stop();
}

#[test]
fn unix_socket_peers_are_trusted_only_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let bind = format!("http:unix:{}", path.display());
    for (trust, peer) in [("unix,127.0.0.1", "peer=192.0.2.7:0 https=true"), ("127.0.0.1", "peer=unknown https=false")]
    {
        let mut server = mirror(&["--bind", &bind], &["--trust", trust]);
        let mut stream = common::connect_unix(&path).unwrap();
        write!(stream, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{X_FORWARDED}\r\n").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.contains(&format!("\n{peer}\n")), "{text}");
        server.stop();
    }
}

#[test]
fn a_peer_that_is_not_allowed_is_disconnected() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let unix = format!("http:unix:{}", path.display());
    let binds = [&HTTP[..], &FASTCGI, &["--bind", &unix]].concat();

    let mut server = mirror(&binds, &["--allow", "192.0.2.0/24", "--allow", "unix"]);
    for _ in 0..3 {
        assert_eq!(all_that_comes(&server.http(), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "");
    }
    server.wait_for(
        "closed a connection from a client that is not allowed (see --allow) protocol=http from=127.0.0.1 count=1",
    );
    let mut stream = common::connect_unix(&path).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("\npeer=unknown "), "{text}");
    server.stop();
    assert_eq!(
        server.log().matches("closed a connection from a client").count(),
        1,
        "one line a minute: {}",
        server.log()
    );

    let mut server = mirror(&binds, &["--allow", "127.0.0.1"]);
    assert!(seen(&server.http(), b"", "").contains("\npeer=127.0.0.1:"));
    let mut stream = common::connect_unix(&path).unwrap();
    let _ = stream.write_all(b"GET / HTTP/1.0\r\n\r\n");
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text); // if the server left data unread, the close is a reset
    assert_eq!(text, "");
    server.wait_for("that is not allowed (see --allow) protocol=http from=unix count=1");
    server.stop();
}

#[test]
fn the_web_server_addresses_variable_applies_to_fastcgi_only_and_the_flag_overrides_it() {
    let start = |addresses: &str, more: &[&str]| {
        let mut command = Command::new(program("mirror"));
        command.args([&HTTP[..], &FASTCGI, &["--workers", "1"], more].concat());
        Server::start_command(command.env("FCGI_WEB_SERVER_ADDRS", addresses))
    };
    let mut server = start("192.0.2.1,192.0.2.2", &[]);
    let mut client = fastcgi::Client::connect(&server.binds[1]).unwrap();
    assert!(client.is_closed());
    server.wait_for("that is not allowed (see --allow) protocol=fastcgi from=127.0.0.1");
    assert!(seen(&server.http(), b"", "").contains("\npeer=127.0.0.1:"));
    server.stop();

    for (addresses, more) in [("127.0.0.1", &[][..]), ("", &[]), ("192.0.2.1", &["--allow", "127.0.0.1"])] {
        let mut server = start(addresses, more);
        assert!(seen_over_fastcgi(&server.binds[1], b"", &[]).starts_with("GET / "), "{addresses}");
        server.stop();
    }

    // The variable contains host names, because web servers are often configured with them.
    let mut server = start("localhost", &[]);
    assert!(seen_over_fastcgi(&server.binds[1], b"", &[]).starts_with("GET / "));
    server.stop();

    for (addresses, more) in [("no-such-host.invalid", &FASTCGI[..]), ("192.0.2.1,,192.0.2.2", &FASTCGI)] {
        let mut command = Command::new(program("mirror"));
        let output = command.args(HTTP).args(more).env("FCGI_WEB_SERVER_ADDRS", addresses).output_in_time().unwrap();
        assert_eq!(output.status.code(), Some(2), "{addresses}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("in FCGI_WEB_SERVER_ADDRS is neither an address nor a name"), "{said}");
    }
    // Without a FastCGI socket, the variable is ignored.
    let mut command = Command::new(program("mirror"));
    let mut server = Server::start_command(command.args(HTTP).env("FCGI_WEB_SERVER_ADDRS", "no-such-host.invalid"));
    assert!(seen(&server.http(), b"", "").contains("\npeer=127.0.0.1:"));
    server.stop();
}

/// nginx with the configuration of `docs/web-servers.md`, on a Unix socket.
#[test]
fn nginx_reports_the_client_address() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display();
    let mut server = mirror(&["--bind", &format!("http:unix:{path}/a.sock")], &["--trust", "unix"]);
    let port = common::free_port();
    let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
    let temporary: String = ["client_body", "fastcgi", "proxy", "scgi", "uwsgi"]
        .map(|name| format!("{name}_temp_path {path}/nginx-{name};\n"))
        .concat();
    let config = format!(
        "daemon off; {user} worker_processes 1; pid {path}/nginx.pid; error_log {path}/error.log;
         events {{ worker_connections 64; }}
         http {{ access_log off; {temporary}
           server {{ listen 127.0.0.1:{port}; location / {{
             proxy_pass http://unix:{path}/a.sock;
             proxy_http_version 1.1;
             proxy_set_header Connection \"\";
             proxy_set_header Host $host;
             proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
             proxy_set_header X-Forwarded-Proto https; # as $scheme would be on a TLS port
             proxy_set_header X-Forwarded-Host \"\";
           }} }} }}\n"
    );
    let file = directory.path().join("nginx.conf");
    std::fs::write(&file, config).unwrap();
    let daemon =
        ["/usr/sbin/nginx", "/usr/local/sbin/nginx"].into_iter().find(|path| std::path::Path::new(path).exists());
    let mut command = Command::new(daemon.unwrap_or("nginx"));
    let nginx =
        common::Helper::start(command.arg("-p").arg(directory.path()).args(["-e", "error.log", "-c"]).arg(&file));
    let address = format!("127.0.0.1:{port}");
    common::wait_until("nginx is listening", || common::connect_tcp(&address).ok());
    let text = seen(&address, b"", &format!("{X_FORWARDED}X-Forwarded-Host: evil\r\n"));
    assert!(text.contains("\npeer=127.0.0.1:0 https=true\n") && text.contains("\nhost: x\n"), "{text}");
    assert!(text.contains("\nx-forwarded-for: 6.6.6.6, 192.0.2.7, 127.0.0.1, 127.0.0.1\n"), "{text}");
    assert!(!text.contains("evil"), "{text}");
    drop(nginx);
    server.stop();
}
