//! A WebSocket echo server with axum's own handler. A draining worker closes its sockets with status 1001, so that
//! clients reconnect to another worker.
//!
//! `cargo run --release --example websocket -- --workers 2`, then open http://127.0.0.1:8080

use std::process::ExitCode;

use axum::Router;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::Html;
use axum::routing::{any, get};
use forkyard::Context;
use tokio::sync::Notify;

const PAGE: &str = r#"<!doctype html><title>echo</title><input autofocus><pre></pre><script>
const show = text => document.querySelector("pre").append(text + "\n");
function connect() {
    window.socket = new WebSocket(location.href.replace("http", "ws") + "ws");
    socket.onmessage = event => show(event.data);
    socket.onclose = event => { show("closed: " + event.code); setTimeout(connect, 1000); };
}
connect();
document.querySelector("input").onchange = event => { socket.send(event.target.value); event.target.value = ""; };
</script>"#;

/// Notified when this worker begins to drain.
static LEAVING: Notify = Notify::const_new();

fn main() -> ExitCode {
    forkyard::Builder::app(|cx| {
        let talks = any(async move |upgrade: WebSocketUpgrade| upgrade.on_upgrade(|socket| talk(socket, cx)));
        Router::new().route("/", get(async || Html(PAGE))).route("/ws", talks)
    })
    .on_drain(|_worker, _within| LEAVING.notify_waiters())
    .run()
}

async fn talk(mut socket: WebSocket, cx: Context) {
    let leaving = LEAVING.notified();
    tokio::pin!(leaving);
    while !cx.draining() {
        let message = tokio::select! {
            message = socket.recv() => message,
            () = &mut leaving => break,
        };
        let echoed = match message {
            Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => socket.send(message).await,
            Some(Ok(_)) => continue, // axum answers pings itself
            Some(Err(_)) | None => return,
        };
        if echoed.is_err() {
            return;
        }
    }
    let goodbye = CloseFrame { code: close_code::AWAY, reason: "the worker leaves, please come again".into() };
    let _ = socket.send(Message::Close(Some(goodbye))).await;
}
