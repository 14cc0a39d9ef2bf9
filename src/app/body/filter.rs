//! The file that a FastCGI server sends to a filter: a second body in addition to the request's.

use std::sync::{Arc, Mutex, PoisonError};

use http::Extensions;
use http_body::Body as _;

use super::Body;

/// The file that a FastCGI server sends to a filter: an extension of each request whose [`crate::Role`] is `Filter`
/// (FastCGI specification 1.0, section 6.4).
///
/// The parameters `FCGI_DATA_LENGTH` and `FCGI_DATA_LAST_MOD` of [`crate::ClientInfo::params`] hold its length in bytes
/// and its modification time; an application that can answer from these parameters alone need not take the file. The
/// file arrives after the request's body: read the body first, or drop it. `--max-body` does not apply, because the
/// server chose the file. If less of the file arrives than was announced, reading it ends with
/// [`crate::BodyError::Cut`].
#[derive(Clone, Debug)]
pub struct FilterData(Arc<Mutex<Option<Body>>>);

impl FilterData {
    pub(crate) fn new(body: Body) -> Self {
        Self(Arc::new(Mutex::new(Some(body))))
    }

    /// Takes the file. Returns `None` if it has been taken before, through this value or a clone of it.
    #[must_use]
    pub fn take(&self) -> Option<Body> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether a request with these extensions has a file that has not arrived completely.
    pub(crate) fn is_coming(extensions: &Extensions) -> bool {
        let data = extensions.get::<Self>().map(|data| data.0.lock().unwrap_or_else(PoisonError::into_inner));
        data.is_some_and(|data| data.as_ref().is_some_and(|body| !body.is_end_stream()))
    }
}
