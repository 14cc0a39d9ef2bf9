//! Strict load: 32 clients, over each protocol, on keep-alive and on new connections, on Unix sockets and TCP. Every request must be
//! answered with 200, or with 502 if workers are killed.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Server, StopOnDrop, fastcgi, http, scgi};

/// Number of concurrent clients.
pub const CLIENTS: usize = 32;
/// Maximum number of failures that are reported in detail. Further failures are only counted.
const TOLD: usize = 10;

/// The results of all clients.
#[derive(Default)]
pub struct Load {
    stop: AtomicBool,
    /// Number of requests answered with 200.
    pub good: AtomicU64,
    /// Number of requests answered with 502.
    pub sorry: AtomicU64,
    failures: Mutex<Vec<String>>,
    begun: Mutex<Option<Instant>>,
    /// Time at which the last worker was killed.
    killed: Mutex<Option<Instant>>,
    /// For each 502, the time since the last worker was killed.
    pub answers_after_kill: Mutex<Vec<Duration>>,
}

/// The address to which a client connects, and whether it keeps the connection open.
#[derive(Clone, Debug)]
enum Way {
    FastCgi { address: String, kept: bool },
    Http { address: String, kept: bool },
    Scgi { address: String },
}

/// A connection that is kept open.
enum Kept {
    FastCgi(fastcgi::Client),
    Http(http::Client),
}

impl Load {
    /// Returns the arguments that make a server listen for all of these clients. The Unix sockets are in `directory`.
    pub fn binds(directory: &std::path::Path) -> Vec<String> {
        let file = |protocol: &str| format!("{protocol}:unix:{}", directory.join(format!("{protocol}.sock")).display());
        let all = [
            file("fastcgi"),
            "fastcgi:127.0.0.1:0".into(),
            "http:127.0.0.1:0".into(),
            file("scgi"),
            "scgi:127.0.0.1:0".into(),
        ];
        all.into_iter().flat_map(|bind| ["--bind".to_owned(), bind]).collect()
    }

    fn ways(server: &Server) -> Vec<Way> {
        let mut ways = Vec::new();
        for bind in &server.binds {
            if let Some(address) = bind.strip_prefix("http://") {
                ways.extend([true, false].map(|kept| Way::Http { address: address.to_owned(), kept }));
            } else if bind.starts_with("fastcgi:") {
                ways.extend([true, false].map(|kept| Way::FastCgi { address: bind.clone(), kept }));
            } else if bind.starts_with("scgi:") {
                ways.push(Way::Scgi { address: bind.clone() });
            }
        }
        assert_eq!(ways.len(), 8, "{:?}", server.binds);
        ways
    }

    /// Runs the clients until `operator` returns.
    pub fn run(&self, server: &mut Server, operator: impl FnOnce(&mut Server)) {
        let ways = Self::ways(server);
        *self.begun.lock().unwrap() = Some(Instant::now());
        std::thread::scope(|scope| {
            for client in 0..CLIENTS {
                let way = ways[client % ways.len()].clone();
                scope.spawn(move || self.client(client, &way));
            }
            let _clients_end = StopOnDrop(&self.stop);
            operator(server);
        });
        let failures = self.failures.lock().unwrap();
        let total = self.total();
        assert!(
            failures.is_empty(),
            "{} of {total} requests failed: {:#?}",
            failures.len(),
            &failures[..failures.len().min(TOLD)]
        );
        let seconds = self.begun.lock().unwrap().unwrap().elapsed().as_secs_f64();
        eprintln!(
            "{total} requests in {seconds:.1} s: {} answered, {} were answered with 502, 0 failed",
            self.good.load(Ordering::SeqCst),
            self.sorry.load(Ordering::SeqCst)
        );
    }

    /// Returns the number of requests so far.
    pub fn total(&self) -> u64 {
        self.good.load(Ordering::SeqCst) + self.sorry.load(Ordering::SeqCst)
    }

    pub fn has_failed(&self) -> bool {
        !self.failures.lock().unwrap().is_empty()
    }

    /// Records that a worker is about to be killed.
    pub fn kills(&self) {
        *self.killed.lock().unwrap() = Some(Instant::now());
    }

    fn client(&self, number: usize, way: &Way) {
        let mut kept = None;
        let mut count = number;
        while !self.stop.load(Ordering::SeqCst) {
            count += 1;
            let body = format!("{number}-{count}").repeat(count % 40);
            let length = format!("{}\n", body.len());
            // These responses are sent only when they are complete. If they were streamed, part of a response might have been sent before
            // the worker is killed.
            let (method, target, expected) = match count % 4 {
                0 => ("POST", "/count", length.as_str()),
                1 => ("GET", "/slow/1", "1 ms\n"),
                _ => ("GET", "/ok", "ok\n"),
            };
            let body = if method == "POST" { body.as_bytes() } else { b"" };
            let in_pieces = count % 10 > 7;
            match ask(way, &mut kept, (method, target, body), in_pieces) {
                Ok((200, answer)) if answer == expected.as_bytes() => {
                    self.good.fetch_add(1, Ordering::SeqCst);
                }
                Ok((502, _)) if self.killed.lock().unwrap().is_some() => {
                    let late = self.killed.lock().unwrap().unwrap().elapsed();
                    self.answers_after_kill.lock().unwrap().push(late);
                    self.sorry.fetch_add(1, Ordering::SeqCst);
                }
                other => {
                    kept = None;
                    let text = match other {
                        Ok((status, answer)) => format!("{status} {:?}", String::from_utf8_lossy(&answer)),
                        Err(error) => error.to_string(),
                    };
                    let at = self.begun.lock().unwrap().unwrap().elapsed();
                    let after = self.killed.lock().unwrap().map(|killed| killed.elapsed());
                    let text = format!("{way:?} {method}: {text} at={at:?} after_kill={after:?}");
                    self.failures.lock().unwrap().push(text);
                }
            }
        }
    }
}

/// Sends one request. A keep-alive connection stays open unless a response closes it. Over HTTP, requests on a keep-alive connection may be
/// sent in parts.
fn ask(
    way: &Way,
    kept: &mut Option<Kept>,
    (method, target, body): (&str, &str, &[u8]),
    in_pieces: bool,
) -> io::Result<(u16, Vec<u8>)> {
    match way {
        Way::Scgi { address } => {
            let response = scgi::Client::connect(address)?.request(method, target, body)?;
            Ok((response.status(), response.body))
        }
        Way::FastCgi { address, kept: false } => {
            let mut client = fastcgi::Client::connect(address)?;
            client.send(&fastcgi::request(1, false, method, target, body))?;
            let response = client.response(1)?;
            Ok((response.status(), response.body().to_vec()))
        }
        Way::Http { address, kept: false } => {
            let response = http::Client::connect(address)?.request(method, target, body)?;
            Ok((response.status, response.body))
        }
        Way::FastCgi { address, kept: true } => {
            if kept.is_none() {
                *kept = Some(Kept::FastCgi(fastcgi::Client::connect(address)?));
            }
            let Some(Kept::FastCgi(client)) = kept else { unreachable!("the connection was stored above") };
            let response = client.request(method, target, body)?;
            Ok((response.status(), response.body().to_vec()))
        }
        Way::Http { address, kept: true } => {
            if kept.is_none() {
                *kept = Some(Kept::Http(http::Client::connect(address)?));
            }
            let Some(Kept::Http(client)) = kept else { unreachable!("the connection was stored above") };
            let response = match in_pieces {
                true => client.request_in_pieces(method, target, body)?,
                false => client.request(method, target, body)?,
            };
            if response.header("connection") == Some("close") {
                *kept = None;
            }
            Ok((response.status, response.body))
        }
    }
}
