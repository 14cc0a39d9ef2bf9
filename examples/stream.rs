//! An application that sends Server-Sent Events to clients of all workers. It supports all options, for tests and
//! experiments.
//!
//! `cargo run --release --example stream -- --workers 4`, then
//! `curl -N -H 'Accept: text/event-stream' 'http://127.0.0.1:8080/events?topics=news'` and, in another terminal,
//! `curl -d 'it rains' http://127.0.0.1:8080/publish/news`

use std::convert::Infallible;
use std::process::ExitCode;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{CONTENT_TYPE, HeaderName};
use axum::http::{Response, StatusCode};
use axum::routing::{get, post};
use forkyard::{Context, Event, Published, Sse, sse};
use serde::Deserialize;

fn main() -> ExitCode {
    forkyard::run(|cx| {
        Router::new()
            .route("/events", get(events))
            .route("/publish/{topic}", post(publish))
            .route("/flood/{topic}/{count}/{length}", post(flood))
            .route("/answer/{pieces}", get(answer))
            .route("/who", get(async || format!("{}\n", std::process::id())))
            .route("/subscribers", get(async |State(cx): State<Context>| format!("{}\n", cx.events().subscribers())))
            .with_state(cx)
    })
}

/// Query, for example `/events?topics=a,b&keep_alive_ms=200&only=even`.
#[derive(Deserialize)]
struct Wish {
    topics: String,
    keep_alive_ms: Option<u64>,
    poll_ms: Option<u64>,
    only: Option<String>,
}

async fn events(State(cx): State<Context>, Query(wish): Query<Wish>, request: Request) -> Response<forkyard::Body> {
    let stream = choose(&cx, &wish, &request);
    let mut response = stream.response();
    response.headers_mut().insert("x-worker", std::process::id().into());
    response
}

fn choose(cx: &Context, wish: &Wish, request: &Request) -> Sse {
    let mut stream = sse(request, &cx.events(), wish.topics.split(','));
    if let Some(ms) = wish.keep_alive_ms {
        stream = stream.keep_alive(Duration::from_millis(ms));
    }
    if let Some(ms) = wish.poll_ms {
        stream = stream.poll_timeout(Duration::from_millis(ms));
    }
    match wish.only.as_deref() {
        Some("even") => stream.filter(|event: &Published| event.id().is_multiple_of(2)),
        Some("shouts") => stream.map(|event: &Published| {
            let text = String::from_utf8_lossy(event.data()).into_owned();
            text.ends_with('!').then(|| Event::new(text.to_uppercase()).name("shout"))
        }),
        _ => stream,
    }
}

/// Returns an event stream that is produced without [`sse`]: `pieces` chunks, one per second, even while the worker is
/// draining.
async fn answer(Path(pieces): Path<u32>) -> ([(HeaderName, &'static str); 1], Body) {
    let mut seconds = tokio::time::interval(Duration::from_secs(1));
    let mut left = pieces;
    let pieces = futures_util::stream::poll_fn(move |context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        seconds.poll_tick(context).map(|_| {
            left -= 1;
            Some(Ok::<_, Infallible>(format!("data: {left}\n\n")))
        })
    });
    ([(CONTENT_TYPE, "text/event-stream")], Body::from_stream(pieces))
}

/// Query, for example `/publish/news?name=headline`.
#[derive(Deserialize)]
struct Named {
    #[serde(default)]
    name: String,
}

async fn publish(
    State(cx): State<Context>,
    Path(topic): Path<String>,
    Query(Named { name }): Query<Named>,
    data: Bytes,
) -> (StatusCode, String) {
    match cx.events().publish(&topic, Event::new(data).name(name)) {
        Ok(id) => (StatusCode::OK, format!("{id}\n")),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

/// Publishes `count` events of `length` bytes each.
async fn flood(
    State(cx): State<Context>,
    Path((topic, count, length)): Path<(String, u64, usize)>,
) -> Result<Body, (StatusCode, String)> {
    let data = Bytes::from(vec![b'x'; length]);
    let mut last = 0;
    for _ in 0..count {
        let published = cx.events().publish(&topic, data.clone());
        last = published.map_err(|error| (StatusCode::BAD_REQUEST, format!("{error}\n")))?;
    }
    Ok(Body::from(format!("{last}\n")))
}
