//! An application that reports what its workers can do and see, for trying `--user`, `--chroot`, `--sandbox` and
//! similar flags.
//!
//! `cargo run --release --example confined -- --user nobody --sandbox`, then
//! `curl http://127.0.0.1:8080/read?path=/etc/shadow`

use std::io;
use std::net::{TcpListener, ToSocketAddrs as _};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use axum::Router;
use axum::extract::Query;
use axum::routing::get;
use forkyard::StoreOptions;
use serde::Deserialize;

#[derive(Deserialize)]
struct Named {
    path: PathBuf,
}

fn main() -> ExitCode {
    forkyard::run(|cx| {
        let cache = cx.cache();
        Router::new()
            .route("/status", get(async || told(std::fs::read_to_string("/proc/self/status"))))
            .route("/env", get(environment))
            .route("/directory", get(async || told(std::env::current_dir().map(|path| path.display().to_string()))))
            .route("/read", get(async |named: Query<Named>| told(std::fs::read_to_string(&named.path))))
            .route("/write", get(async |named: Query<Named>| told(write(&named.path))))
            .route("/remove", get(async |named: Query<Named>| told(std::fs::remove_file(&named.path).map(|()| done()))))
            .route("/execute", get(async || told(Command::new("/bin/true").status().map(|status| status.to_string()))))
            .route("/listen", get(async || told(TcpListener::bind("127.0.0.1:0").map(|_| done()))))
            .route("/resolve", get(async || told(("localhost", 80).to_socket_addrs().map(|_| done()))))
            .route("/chroot", get(async || told(nix::unistd::chroot("/").map(|()| done()).map_err(io::Error::from))))
            .route("/kill-master", get(async || told(kill_parent().map(|()| done()))))
            .route("/threads", get(threads))
            .route(
                "/cache",
                get(async move || {
                    let stored = cache.set("page", "kept", &StoreOptions::new()).is_ok();
                    format!("{stored} {:?}", cache.get("page").map(|page| String::from_utf8_lossy(&page).into_owned()))
                }),
            )
    })
}

fn done() -> String {
    "done".to_owned()
}

/// Returns the outcome, or the kind of error.
fn told(outcome: io::Result<String>) -> String {
    outcome.unwrap_or_else(|error| format!("{:?}", error.kind()))
}

fn write(path: &std::path::Path) -> io::Result<String> {
    std::fs::write(path, "written")?;
    std::fs::read_to_string(path)
}

fn kill_parent() -> io::Result<()> {
    // No signal is sent. The kernel only checks the permission.
    Ok(nix::sys::signal::kill(nix::unistd::getppid(), None)?)
}

async fn environment() -> String {
    let mut all: Vec<String> = std::env::vars().map(|(name, value)| format!("{name}={value}\n")).collect();
    all.sort();
    all.concat()
}

/// Uses a thread, a timer and a second runtime, as real applications may do.
async fn threads() -> String {
    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    let thread = std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { tokio::net::UnixStream::pair() })?;
        std::fs::metadata("/usr").map(|_| done())
    });
    let joined = tokio::task::spawn_blocking(move || thread.join()).await;
    joined.ok().and_then(Result::ok).map_or_else(|| "panicked".to_owned(), told)
}
