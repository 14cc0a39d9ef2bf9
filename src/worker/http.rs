//! One HTTP/1.1 connection. hyper does the protocol; this file joins it to the application and to the drain.

use std::cell::Cell;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body as HttpBody;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::sync::{Notify, oneshot};
use tower_service::Service;

use super::fastcgi::LINGER;
use super::serve::{Application, BoxError};
use super::socket::Socket;
use crate::body::Body;
use crate::context::Drain;
use crate::protocol::cgi::Peer;

/// Serves one connection to its end. `peer` is the address at its other end, if it has one.
pub(crate) async fn serve<S, B>(socket: Socket, peer: Option<SocketAddr>, application: Rc<Application<S>>, drain: Drain)
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    let limits = application.limits;
    let requests = Rc::new(Requests::default());
    let counted = Rc::clone(&requests);
    let answer = service_fn(move |request: Request<Incoming>| {
        let application = Rc::clone(&application);
        let under_way = counted.begin();
        async move {
            let (head, body) = request.into_parts();
            let (body, rest) = Body::http(body, limits.max_body);
            if let Some(rest) = rest {
                tokio::task::spawn_local(read_rest(rest));
            }
            let mut request = Request::from_parts(head, body);
            request.extensions_mut().insert(Peer { address: peer });
            let response = application.answer(request).await;
            drop(under_way);
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .header_read_timeout(None)
        .max_buf_size(limits.max_params)
        .serve_connection(TokioIo::new(socket), answer);
    let mut connection = pin!(connection);
    let drained = async {
        drain.wait().await;
        // hyper closes an idle connection at once. This way the next request is answered, and told that it was
        // the last one; what had begun before is told the same.
        tokio::select! {
            () = requests.one_under_way() => {}
            () = drain.wait_for_last_request() => {}
        }
    };
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = drained => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        log::debug!("an HTTP connection ended: {error}");
    }
}

/// Reads what the application did not read of a body, up to a limit: the peer may not look for the response before it
/// has sent all, and hyper closes a connection on which a body is dropped.
async fn read_rest(rest: oneshot::Receiver<Incoming>) {
    let Ok(mut body) = rest.await else { return }; // it was read to its end
    let (time, mut left) = LINGER;
    let reading = async {
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len) as u64;
            let Some(rest) = left.checked_sub(length) else { return };
            left = rest;
        }
    };
    let _ = tokio::time::timeout(time, reading).await;
}

/// Whether the application is at work for a connection.
#[derive(Default)]
struct Requests {
    under_way: Cell<bool>,
    begun: Notify,
}

impl Requests {
    fn begin(self: &Rc<Self>) -> UnderWay {
        self.under_way.set(true);
        self.begun.notify_waiters();
        UnderWay(Rc::clone(self))
    }

    async fn one_under_way(&self) {
        if !self.under_way.get() {
            self.begun.notified().await;
        }
    }
}

struct UnderWay(Rc<Requests>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.set(false);
    }
}
