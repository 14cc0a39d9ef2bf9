//! Runs the health check (`--health-path`): a new worker sends its own application a request before it reports that it
//! is ready, because an application that fails this request would fail the requests of clients.

use std::io;
use std::time::Duration;

use http::{Request, header};
use http_body_util::BodyExt as _;

use super::serve::{AppService, Application, ResponseBody};
use crate::app::body::Body;
use crate::config::address::Protocol;
use crate::protocol::cgi::ClientInfo;

/// Requests `path` and waits for the complete response: a body that fails is a failed check.
///
/// # Errors
/// Returns a message for the operator if the status is an error, or the response fails or does not arrive in time.
pub(crate) async fn check<S, B>(application: &Application<S>, path: &str, limit: Duration) -> io::Result<()>
where
    S: AppService<B>,
    B: ResponseBody,
{
    let fail = |what: String| io::Error::other(format!("the health check GET {path} (--health-path) failed: {what}"));
    let mut request = Request::get(path)
        .header(header::HOST, "localhost")
        .header(header::USER_AGENT, "forkyard-health")
        .body(Body::empty())
        .map_err(|error| fail(format!("invalid request: {error}")))?;
    request.extensions_mut().insert(ClientInfo::of_http(None, false));
    let exchange = async {
        let (head, body) = application.answer(Protocol::Http, request, None).await.into_parts();
        let mut body = std::pin::pin!(body);
        while let Some(frame) = body.frame().await {
            frame.map_err(|error| fail(format!("incomplete response: {error}")))?;
        }
        Ok::<_, io::Error>(head.status)
    };
    let status = tokio::time::timeout(limit, exchange)
        .await
        .map_err(|_| fail(format!("no response within {}ms (--start-timeout)", limit.as_millis())))??;
    if status.as_u16() >= 400 { Err(fail(format!("status {status}"))) } else { Ok(()) }
}
