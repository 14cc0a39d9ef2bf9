//! Defines, for the application, the role of a FastCGI request and the status with which it ends. Section numbers refer
//! to the FastCGI specification 1.0.

use http::Extensions;

/// The role in which a FastCGI server calls the application (section 6 of the specification). [`Role::of`] returns the
/// role of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Produce a response (6.2). Requests over other protocols also have this role.
    #[default]
    Responder,
    /// Authorize the request (6.3). If the response has status 200, the request may proceed; any other response is sent
    /// to the client unchanged.
    ///
    /// A header `variable-NAME` in a 200 response passes a variable to the web server, with its name in capitals, for
    /// use by the program that serves the request next. That program also receives the request's body, so the request
    /// of an authorizer has an empty body. lighttpd (`"mode" => "authorizer"`) and Apache's mod_fcgid and
    /// mod_authnz_fcgi use this role.
    Authorizer,
    /// Produce a response from the request and a file that the server sends along (6.4): [`crate::FilterData`].
    Filter,
}

impl Role {
    /// Returns the role of a request with these extensions. Only [`Role::Authorizer`] and [`Role::Filter`] are stored
    /// as an extension; a request without a stored role has the role [`Role::Responder`].
    #[must_use]
    pub fn of(extensions: &Extensions) -> Self {
        extensions.get().copied().unwrap_or_default()
    }

    /// Returns the role that has this number in BEGIN_REQUEST (5.1).
    pub(crate) fn read(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Responder),
            2 => Some(Self::Authorizer),
            3 => Some(Self::Filter),
            _ => None,
        }
    }
}

/// An extension of a response: the `appStatus` of its FastCGI END_REQUEST (5.5). Without it, `appStatus` is 0.
///
/// It corresponds to the exit status of a CGI program: 0 means success. Web servers at most log this status; a custom
/// FastCGI client may use it. Other protocols have no equivalent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AppStatus(pub u32);
