//! The file that a FastCGI server sends to a filter: a second body, beside that of the request.

use std::sync::{Arc, Mutex, PoisonError};

use http::Extensions;
use http_body::Body as _;

use super::Body;

/// An extension of each request whose [`crate::Role`] is `Filter`: the file to be filtered (FastCGI specification 1.0,
/// section 6.4).
///
/// Its length in bytes and the time of its last change are the parameters `FCGI_DATA_LENGTH` and
/// `FCGI_DATA_LAST_MOD` of [`crate::Origin::params`]; who can answer by these alone need not take the file. It comes after the
/// request's body: read that first, or drop it. `--max-body` does not apply, since the server chose the
/// file. If less of it comes than was announced, its end is [`crate::BodyError::Cut`].
#[derive(Clone, Debug)]
pub struct FilterData(Arc<Mutex<Option<Body>>>);

impl FilterData {
    pub(crate) fn new(body: Body) -> Self {
        Self(Arc::new(Mutex::new(Some(body))))
    }

    /// The file. `None` if it, or a clone of it, was taken before.
    #[must_use]
    pub fn take(&self) -> Option<Body> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether a request with these extensions has a file of which not all has come.
    pub(crate) fn is_coming(extensions: &Extensions) -> bool {
        let data = extensions.get::<Self>().map(|data| data.0.lock().unwrap_or_else(PoisonError::into_inner));
        data.is_some_and(|data| data.as_ref().is_some_and(|body| !body.is_end_stream()))
    }
}
