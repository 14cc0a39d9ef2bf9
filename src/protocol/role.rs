//! What the application sees of FastCGI beside the request itself: the role it is asked for, and the status it may
//! end with. Section numbers are those of the FastCGI specification 1.0.

use http::Extensions;

/// What a FastCGI server asks for (section 6 of the specification): [`Role::of`] a request tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// A response (6.2). Requests of other protocols have this role too.
    #[default]
    Responder,
    /// A decision (6.3): status 200 lets the request pass, any other is sent to the client as it is. A header
    /// `variable-NAME` of a 200 gives the server a variable, with its name in capitals, for what serves the
    /// request next. The request's body is empty: it goes to whatever serves it. lighttpd (`"mode" => "authorizer"`) and Apache's mod_fcgid and
    /// mod_authnz_fcgi ask like this.
    Authorizer,
    /// A response made of the request and a file that the server sends along (6.4): [`crate::FilterData`].
    Filter,
}

impl Role {
    /// The role of a request with these extensions. (Only [`Role::Authorizer`] and [`Role::Filter`] are there as an
    /// extension; a request without one is a responder's.)
    #[must_use]
    pub fn of(extensions: &Extensions) -> Self {
        extensions.get().copied().unwrap_or_default()
    }

    /// As BEGIN_REQUEST has it (5.1).
    pub(crate) fn read(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Responder),
            2 => Some(Self::Authorizer),
            3 => Some(Self::Filter),
            _ => None,
        }
    }
}

/// An extension of a response: the `appStatus` of its FastCGI END_REQUEST (5.5), which is 0 without it.
///
/// It is what a CGI program would return by `exit`: 0 if all went well. Web servers log it at most; an own client may
/// make something of it. Other protocols have no place for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AppStatus(pub u32);
