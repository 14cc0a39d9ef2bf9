//! An application whose startup and requests can be blocked from outside, to test signals while they are blocked.
//!
//! `STAGED=DIRECTORY cargo run --release --example staged`
//!
//! - A startup stage (`preload`, `factory`, `ready`) waits if DIRECTORY contains a FIFO with the name of the stage,
//!   until another process opens the FIFO for writing and closes it.
//! - `/until` responds when DIRECTORY contains a file `go`; `/block` blocks the event loop until this file exists.
//! - `/deaf` calls shutdown(2) on all listening sockets.

#![expect(clippy::print_stdout, reason = "the tests wait for what it prints")]

use std::collections::BTreeSet;
use std::io::{self, Read as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use nix::sys::socket::{Shutdown, shutdown};

fn main() -> ExitCode {
    forkyard::Builder::app(|_cx| {
        hold("factory").expect("the FIFO can be read");
        Router::new()
            .route("/", get(async || "ok\n"))
            .route("/pid", get(async || format!("{}\n", std::process::id())))
            .route("/until", get(until))
            .route("/block", get(block))
            .route("/deaf", get(deaf))
    })
    .preload(|| Ok(hold("preload")?))
    .on_ready(|_worker| Ok(hold("ready")?))
    .run()
}

fn directory() -> PathBuf {
    std::env::var_os("STAGED").map(PathBuf::from).unwrap_or_default()
}

fn hold(stage: &str) -> io::Result<()> {
    match std::fs::File::open(directory().join(stage)) {
        Ok(mut fifo) => fifo.read_to_end(&mut Vec::new()).map(drop),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

async fn until() -> &'static str {
    println!("waits"); // a test waits for this line
    while !directory().join("go").exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    "went\n"
}

async fn block() -> &'static str {
    println!("blocks");
    while !directory().join("go").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    "went\n"
}

/// Shuts down the listening sockets, as a process does that assumes that it is their only owner. In fact, the process
/// shares them with its siblings.
async fn deaf() -> &'static str {
    // See proc_net(5): TCP sockets have a state, and a flag marks Unix sockets that accept connections.
    let inodes = |table: &str, place: usize, value: &str, inode: usize| -> BTreeSet<String> {
        let text = std::fs::read_to_string(table).unwrap_or_default();
        let rows = text.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        let listening = rows.filter(|row| row.get(place) == Some(&value));
        listening.filter_map(|row| Some(format!("socket:[{}]", row.get(inode)?))).collect()
    };
    let listening = &inodes("/proc/net/tcp", 3, "0A", 9) | &inodes("/proc/net/unix", 3, "00010000", 6);
    for entry in std::fs::read_dir("/proc/self/fd").into_iter().flatten().filter_map(Result::ok) {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let (true, Some(number)) = (listening.contains(&*target.to_string_lossy()), number) {
            // Fails if the socket has already been shut down through another descriptor.
            let _ = shutdown(number, Shutdown::Read);
        }
    }
    "deaf\n"
}
