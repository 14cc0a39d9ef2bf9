//! Measures how long a request has waited before the application begins to process it, and sheds requests that have
//! waited too long (`--max-queue-time`).
//!
//! How long a request waited before this worker read it is measured in two ways: by the time that its last bytes had
//! been in the kernel (over TCP), and by the time since the proxy in front received it, according to `X-Request-Start`
//! or `X-Queue-Start`. The longer time is used.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::header::HeaderMap;
use http::{HeaderValue, Request, Response, StatusCode};

/// Minimum time between two log lines about shed requests.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// A longer wait is ignored, because the proxy's clock must be wrong.
const MAX_WAIT: Duration = Duration::from_secs(3600);

/// Request extension: the latest time at which the application may begin to process the request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BeginBy(pub(crate) Instant);

/// Request extension: how long the first request of a connection waited in the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitedInKernel(pub(crate) Duration);

impl BeginBy {
    /// Whether the deadline of this request has passed.
    pub(crate) fn is_past<B>(request: &Request<B>) -> bool {
        request.extensions().get::<Self>().is_some_and(|&Self(at)| at < Instant::now())
    }
}

/// Sets the request's [`BeginBy`]. Returns false if that time has already passed. `is_trusted` is true if the proxy's
/// headers are to be used.
pub(crate) fn admits<B>(limit: Duration, request: &mut Request<B>, is_trusted: bool) -> bool {
    let in_kernel = request.extensions().get().map_or(Duration::ZERO, |&WaitedInKernel(time)| time);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let in_front = if is_trusted { since_start(request.headers(), now) } else { None };
    let left = limit.checked_sub(in_kernel.max(in_front.unwrap_or_default()));
    if let Some(left) = left {
        request.extensions_mut().insert(BeginBy(Instant::now() + left));
    }
    left.is_some()
}

/// Returns the response to a request that has waited too long.
pub(crate) fn shed<B: From<&'static str>>() -> Response<B> {
    count();
    let mut response = Response::new(B::from("503: the request has waited too long\n"));
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(http::header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// Counts a request that has waited too long, and logs the count from time to time.
pub(crate) fn count() {
    static SHED: Mutex<(u64, Option<Instant>)> = Mutex::new((0, None));
    let mut shed = SHED.lock().unwrap_or_else(PoisonError::into_inner);
    shed.0 += 1;
    if shed.1.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
        log::warn!(count = shed.0; "requests waited too long and got 503 (--max-queue-time)");
        *shed = (0, Some(Instant::now()));
    }
}

/// Returns how long ago the proxy in front received the request, or `None` without a header, or with an invalid one.
fn since_start(headers: &HeaderMap, now: Duration) -> Option<Duration> {
    let starts = ["x-request-start", "x-queue-start"].into_iter().filter_map(|name| headers.get(name));
    let waited = starts.filter_map(|value| Some(now.saturating_sub(parse(value.to_str().ok()?)?)));
    waited.filter(|waited| *waited <= MAX_WAIT).max()
}

/// Parses a time since the epoch, with or without a leading `t=`, in seconds, milliseconds or
/// microseconds. The magnitude determines the unit.
fn parse(text: &str) -> Option<Duration> {
    let text = text.trim();
    let text = text.strip_prefix("t=").unwrap_or(text);
    if !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return None;
    }
    let number: f64 = text.parse().ok()?;
    let seconds = match number {
        1e14.. => number / 1e6,
        1e11.. => number / 1e3,
        _ => number,
    };
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proxies_write_is_read_in_any_unit() {
        for text in ["t=1700000000.250", "1700000000.25", "1700000000250", "t=1700000000250", "t=1700000000250000"] {
            let read = parse(text).unwrap();
            assert!(
                read.abs_diff(Duration::from_millis(1_700_000_000_250)) < Duration::from_micros(10),
                "{text}: {read:?}"
            );
        }
        for text in ["", "t=", "-1", "soon", "1e9", "t=1.2.3", "nan", &"9".repeat(400)] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_longest_wait_counts_and_another_clock_does_not() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let admits = |in_kernel_ms, header: Option<Duration>, is_trusted| {
            let mut request = Request::new(());
            request.extensions_mut().insert(WaitedInKernel(Duration::from_millis(in_kernel_ms)));
            if let Some(ago) = header {
                let text = format!("t={}", now.saturating_sub(ago).as_secs());
                request.headers_mut().insert("x-request-start", text.parse().unwrap());
            }
            let admits = super::admits(Duration::from_secs(60), &mut request, is_trusted);
            assert_eq!(request.extensions().get::<BeginBy>().is_some(), admits);
            admits
        };
        let old = Some(Duration::from_secs(100));
        assert!(admits(0, None, true) && admits(59_000, None, true) && !admits(61_000, None, true));
        assert!(!admits(0, old, true) && admits(0, old, false));
        assert!(admits(0, Some(Duration::from_secs(2 * 3600)), true));
    }
}
