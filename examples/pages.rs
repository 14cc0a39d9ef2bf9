//! An application with slow pages, which it stores in the cache that all workers share.
//!
//! `cargo run --release --example pages -- --workers 2`, then open http://127.0.0.1:8080

use std::convert::Infallible;
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, Response, StatusCode};
use axum::response::Html;
use axum::routing::{get, post};
use forkyard::{Cached, Context, Page, StoreOptions};
use serde::Deserialize;

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

/// Query with the time that rendering takes, for example `/page/7?ms=500`.
#[derive(Deserialize)]
struct Effort {
    #[serde(default = "usual_ms")]
    ms: u64,
}

fn usual_ms() -> u64 {
    50
}

/// Returns the page from the cache. If the page is missing, one worker renders it, and other workers wait for it.
async fn page(
    State(cx): State<Context>,
    Path(number): Path<u32>,
    Query(effort): Query<Effort>,
    headers: HeaderMap,
) -> Result<Response<Body>, StatusCode> {
    let tags = ["pages".to_owned(), format!("page-{number}")];
    let options = StoreOptions::new().ttl(Duration::from_secs(60)).stale(Duration::from_secs(10)).tags(tags);
    let render = |_| async { Ok::<_, Infallible>(render(&cx, number, effort.ms).await) };
    let cache = cx.cache();
    let Ok(Cached { value, .. }) = cache.get_or_render_async(format!("page {number}"), &options, render).await;
    let response = forkyard::page::to_response(value, &headers).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(response.map(Body::from))
}

/// Renders a page of 16 KiB.
async fn render(cx: &Context, number: u32, ms: u64) -> Page {
    log::info!("rendering page={number}");
    tokio::time::sleep(Duration::from_millis(ms)).await;
    let pid = std::process::id();
    let mut page = format!(
        "<!doctype html><title>Page {number}</title><h1>Page {number}</h1><p>Rendered by slot {} (pid {pid}).</p>",
        cx.slot()
    );
    while page.len() < 16 << 10 {
        page += "<p>Prefork servers share little, and so they fail alone.</p>";
    }
    page.truncate(16 << 10);
    Page::new(page).header("Content-Type", "text/html; charset=utf-8")
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
