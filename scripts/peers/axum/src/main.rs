//! Serves the benchmark's pages with bare axum, to compare HTTP with and without forkyard.
//!
//! ```text
//! forkyard-peer-axum 127.0.0.1:PORT      /hello  13 bytes      /page  16 KiB from memory
//! ```
//! One process with one thread. To run several processes, start the first process with port 0, and the others with the port
//! that the first process prints. The processes share the port by `SO_REUSEPORT`, each with its own queue. An inherited
//! listener would be worse: each connection would wake all processes (tokio does not register with `EPOLLEXCLUSIVE`), and the
//! process that wakes first would get most of the keep-alive connections. With `SO_REUSEPORT`, the kernel selects a process at
//! random for each connection, so a small number of keep-alive connections may be distributed unevenly.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::process::ExitCode;

use axum::Router;
use axum::body::Bytes;
use axum::routing::get;
use axum::serve::ListenerExt as _;
use tokio::net::{TcpListener, TcpSocket};

const BACKLOG: u32 = 1024;
const PAGE_LEN: usize = 16 << 10;

fn main() -> ExitCode {
    let address = std::env::args().nth(1).and_then(|text| text.parse().ok());
    let Some(address) = address else {
        let _ = writeln!(io::stderr(), "usage: forkyard-peer-axum 127.0.0.1:PORT");
        return ExitCode::from(2);
    };
    match serve(address) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "forkyard-peer-axum: {address}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(address: SocketAddr) -> io::Result<()> {
    let page = Bytes::from("Hello, world. ".repeat(PAGE_LEN.div_ceil(14))).slice(..PAGE_LEN);
    let router =
        Router::new().route("/hello", get(async || "Hello, world\n")).route("/page", get(async move || page.clone()));
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let listener = listen(address)?;
        writeln!(io::stdout(), "listening {}", listener.local_addr()?)?;
        let listener = listener.tap_io(|connection| {
            let _ = connection.set_nodelay(true); // fails if the connection is already closed
        });
        axum::serve(listener, router).await
    })
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}
