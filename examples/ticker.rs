//! A stock ticker: a page of prices that any worker can serve, and that changes in every browser at the same moment.
//!
//! `cargo run --release --example ticker -- --workers 4`, then open http://127.0.0.1:8080 in several windows, kill a
//! worker or two, and watch the prices keep changing.
//!
//! The worker that holds a lock on a file generates the prices. When this worker dies, the kernel grants the lock to
//! another worker. The worker publishes the prices, and stores them in the cache for its successor.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::Response;
use axum::response::Html;
use axum::routing::get;
use forkyard::{Builder, Context, StoreOptions, sse};

const TOPIC: &str = "prices";
const STOCKS: [(&str, &str, f64); 6] = [
    ("AMBR", "Amber & Daughters", 84.20),
    ("BRCH", "Birch Railways", 31.75),
    ("CORL", "Coral Instruments", 212.40),
    ("DUNE", "Dune Glassworks", 17.05),
    ("ELMS", "Elm Street Bakeries", 49.90),
    ("FJRD", "Fjord Shipping", 128.60),
];

/// An unnamed temporary file, which the workers lock.
static OFFICE: OnceLock<File> = OnceLock::new();

fn main() -> ExitCode {
    Builder::app(|cx| {
        let maker = cx.clone();
        std::thread::spawn(move || make_prices(&maker));
        Router::new()
            .route("/", get(page))
            .route("/prices", get(prices))
            .route("/who", get(async || format!("{}\n", std::process::id())))
            .with_state(cx)
    })
    .preload(|| {
        let _ = OFFICE.set(tempfile::tempfile()?);
        Ok(())
    })
    .run()
}

/// Streams the prices, or returns the next prices to a browser that uses long polling.
async fn prices(State(cx): State<Context>, request: Request) -> Response<forkyard::Body> {
    let mut response = sse(&request, &cx.events(), [TOPIC]).retry(Duration::from_millis(250)).response();
    response.headers_mut().insert("x-worker", std::process::id().into());
    response
}

/// Returns the page with the current prices, so that it is complete before the first event and for browsers without
/// scripts.
async fn page(State(cx): State<Context>) -> Html<String> {
    let prices = current(&cx);
    let row = |((symbol, name, _), price): (&(&str, &str, f64), &f64)| {
        format!(
            "<tr id=\"{symbol}\"><th>{symbol}<small>{name}</small></th><td class=\"chart\"><svg viewBox=\"0 0 120 32\" \
             preserveAspectRatio=\"none\"><polyline/></svg></td><td class=\"price\">{price:.2}</td><td class=\"change\">0.00 %</td></tr>"
        )
    };
    let rows: String = STOCKS.iter().zip(&prices).map(row).collect();
    let page = include_str!("ticker.html").replace("<!-- rows -->", &rows);
    Html(page.replace("<!-- worker -->", &format!("worker {}, pid {}", cx.slot(), std::process::id())))
}

/// Returns the current prices from the cache.
fn current(cx: &Context) -> Vec<f64> {
    let text = cx.cache().get(TOPIC).and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
    let prices: Vec<f64> = text.split(',').filter_map(|price| price.parse().ok()).collect();
    if prices.len() == STOCKS.len() { prices } else { STOCKS.map(|(_, _, price)| price).to_vec() }
}

/// Waits for the lock, and then generates prices until the process exits.
fn make_prices(cx: &Context) {
    // Reopening the file gives this process its own lock owner. The inherited descriptor shares the lock owner of the
    // parent.
    let Some(office) = OFFICE.get().and_then(|file| File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok())
    else {
        return log::error!("no prices: the file to lock cannot be opened");
    };
    if let Err(error) = office.lock() {
        return log::error!("no prices: {error}");
    }
    log::info!("makes the prices from now on slot={}", cx.slot());
    let mut prices = current(cx);
    let pause = std::env::var("TICKER_MS").ok().and_then(|ms| ms.parse().ok()).unwrap_or(400);
    loop {
        std::thread::sleep(Duration::from_millis(pause));
        for price in &mut prices {
            // Up or down by at most half a percent, but never to zero.
            *price = (*price * (1.0 + (fastrand::f64() - 0.5) / 100.0)).clamp(1.0, 10_000.0);
        }
        let text: Vec<String> = prices.iter().map(|price| format!("{price:.2}")).collect();
        let text = text.join(",");
        let _ = cx.cache().set(TOPIC, &text, &StoreOptions::new()); // on failure, the successor starts from older prices
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let event =
            format!("{{\"at\":{},\"maker\":{},\"prices\":[{text}]}}", since_1970.as_millis(), std::process::id());
        if let Err(error) = cx.events().publish(TOPIC, event) {
            log::error!("{error}");
        }
    }
}
