//! Pages that are slow to render, kept in the cache that all workers share.
//!
//! `cargo run --release --example pages -- --workers 2`, then open http://127.0.0.1:8080

use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Html;
use axum::routing::{get, post};
use forkyard::{Context, Options};

fn main() -> ExitCode {
    forkyard::run(|cx| {
        Router::new()
            .route("/", get(front))
            .route("/page/{number}", get(page))
            .route("/purge/{tag}", post(purge))
            .route("/who", get(who))
            .route("/stats", get(stats))
            .with_state(cx)
    })
}

async fn front() -> Html<&'static str> {
    Html(include_str!("pages.html"))
}

/// Answers from the cache, or renders and stores.
async fn page(State(cx): State<Context>, Path(number): Path<u32>) -> Html<Vec<u8>> {
    let (cache, key) = (cx.cache(), format!("page {number}"));
    if let Some(page) = cache.get(&key) {
        return Html(page);
    }
    // Before rendering: should a tag be purged meanwhile, this page is out of date and will not be served.
    let clock = cache.clock();
    let page = render(&cx, number).await;
    let tags = ["pages".to_owned(), format!("page-{number}")];
    let options = Options::new().ttl(Duration::from_secs(60)).tags(tags).as_of(clock);
    if let Err(refused) = cache.set(&key, &page, &options) {
        log::warn!("page {number} was not stored: {refused}");
    }
    Html(page)
}

/// 16 KiB in 50 ms.
async fn render(cx: &Context, number: u32) -> Vec<u8> {
    tokio::time::sleep(Duration::from_millis(50)).await;
    let pid = std::process::id();
    let mut page = format!(
        "<!doctype html><title>Page {number}</title><h1>Page {number}</h1><p>Rendered by slot {} (pid {pid}).</p>",
        cx.slot()
    );
    while page.len() < 16 << 10 {
        page += "<p>Prefork servers share little, and so they fail alone.</p>";
    }
    page.truncate(16 << 10);
    page.into_bytes()
}

async fn purge(State(cx): State<Context>, Path(tag): Path<String>) -> StatusCode {
    cx.cache().purge_tag(&tag);
    StatusCode::NO_CONTENT
}

async fn who(State(cx): State<Context>) -> String {
    format!("slot {} pid {} generation {}\n", cx.slot(), std::process::id(), cx.generation())
}

async fn stats(State(cx): State<Context>) -> String {
    format!("{:#?}\n", cx.cache().stats())
}
