//! A bare axum server, as one would write it without forkyard: what forkyard adds over HTTP, or takes away, shows beside it.
//!
//! ```text
//! forkyard-peer-axum 127.0.0.1:PORT      /hello  13 bytes      /page  16 KiB from memory
//! ```
//! One process with one thread. For several, start it several times: the first with port 0, the others with the port that
//! it prints. They share it by `SO_REUSEPORT`, each with a queue of its own. An inherited listener would wake all of them
//! for each connection (tokio does not register with `EPOLLEXCLUSIVE`), and leave most kept connections to the one that is
//! first. What SO_REUSEPORT does instead is to draw lots for each connection: few kept ones may spread unevenly.

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
            let _ = connection.set_nodelay(true); // it fails on a connection that is gone
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
