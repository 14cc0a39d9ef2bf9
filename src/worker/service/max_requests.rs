//! Limits the number of requests that a worker serves (`--max-requests`). The worker counts requests as they begin,
//! requests its replacement at the limit, and continues to serve until it must drain.

use std::cell::Cell;
use std::fs::File;
use std::io::Write as _;
use std::rc::Rc;
use std::task::{Context, Poll};

use tower_service::Service;

use crate::config::Jittered;
use crate::inherited_by_workers::Report;

/// Wraps the application and counts its remaining requests.
#[derive(Clone, Debug)]
pub(crate) struct MaxRequests<S> {
    service: S,
    lifetime: Option<Rc<Lifetime>>,
}

#[derive(Debug)]
struct Lifetime {
    left: Cell<u64>,
    report: File,
}

impl<S> MaxRequests<S> {
    /// Wraps `service`. Without a limit, requests are not counted.
    pub(crate) fn new(service: S, limit: Option<Jittered<u64>>, report: File) -> Self {
        let lifetime = limit.map(|limit| Rc::new(Lifetime { left: Cell::new(limit.draw()), report }));
        Self { service, lifetime }
    }
}

impl Lifetime {
    fn count(&self) {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        if left == 1 {
            // The write fails if the master is dead; the worker then exits anyway.
            let _ = (&self.report).write_all(Report::Recycle("max-requests".to_owned()).line().as_bytes());
        }
    }
}

impl<R, S: Service<R>> Service<R> for MaxRequests<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: R) -> S::Future {
        if let Some(lifetime) = &self.lifetime {
            lifetime.count();
        }
        self.service.call(request)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn a_worker_asks_once_and_serves_on() {
        let (mut read, write) = std::io::pipe().unwrap();
        let limit = Some(Jittered { limit: 3, jitter: 0 });
        let service = crate::blocking(|_: http::Request<crate::Body>| http::Response::new("ok"));
        let service = MaxRequests::new(service, limit, File::from(OwnedFd::from(write)));
        for _ in 0..10 {
            drop(service.clone().call(http::Request::new(crate::Body::empty())));
        }
        drop(service);
        let mut said = String::new();
        read.read_to_string(&mut said).unwrap();
        assert_eq!(said, "recycle max-requests\n");
    }
}
