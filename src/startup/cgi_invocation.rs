//! Detects whether a web server has started this program to answer one request (CGI, RFC 3875), and removes arguments that the
//! client may have chosen. `worker/conn/cgi.rs` serves the request itself.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;

use crate::net::listen;
use crate::sys;

/// Whether a web server started this process for one CGI request.
pub(crate) fn is_one() -> bool {
    is_described_by(|name| std::env::var_os(name)) && !listen::started_by_web_server()
}

fn is_described_by(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let interface = variable("GATEWAY_INTERFACE").is_some_and(|value| value.as_bytes().starts_with(b"CGI/"));
    interface && variable("REQUEST_METHOD").is_some()
}

/// Returns the arguments without those that a web server may have taken from the query string, because clients must not
/// be able to set flags. A web server passes the query string as arguments if it contains no `=` (RFC 3875, 4.4).
pub(crate) fn trusted(mut arguments: Vec<OsString>) -> Vec<OsString> {
    if is_one() && arguments_may_be_the_clients(std::env::var_os("QUERY_STRING").as_deref()) {
        arguments.truncate(1);
    }
    arguments
}

/// Takes standard output for the response, and replaces it with standard error, because later output of the application
/// and its children belongs in the web server's log.
///
/// # Errors
/// Fails if standard output is closed, or no descriptor is available.
pub(crate) fn take_output() -> io::Result<OwnedFd> {
    let output = sys::descriptor(1).ok_or(io::ErrorKind::NotConnected)?;
    let instead = match sys::descriptor(2) {
        Some(errors) => errors,
        None => File::options().write(true).open("/dev/null")?.into(),
    };
    sys::replace(1, &instead)?;
    Ok(output)
}

fn arguments_may_be_the_clients(query: Option<&OsStr>) -> bool {
    query.is_some_and(|query| !query.is_empty() && !query.as_bytes().contains(&b'='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_both_variables() {
        let is_call = |interface: &'static str, method: Option<&'static str>| {
            is_described_by(|name| match name {
                "GATEWAY_INTERFACE" => Some(interface.into()),
                "REQUEST_METHOD" => method.map(Into::into),
                other => panic!("{other} is read"),
            })
        };
        assert!(is_call("CGI/1.1", Some("GET")) && is_call("CGI/1.1", Some("")));
        assert!(!is_call("CGI/1.1", None) && !is_call("", Some("GET")) && !is_described_by(|_| None));
    }

    #[test]
    fn a_query_without_an_equals_sign_may_have_become_arguments() {
        let may = |query: &str| arguments_may_be_the_clients(Some(OsStr::new(query)));
        assert!(may("--bind+http:0.0.0.0:80") && may("--bind%3Dhttp:0.0.0.0:80") && may("a"));
        assert!(!may("") && !may("a=1") && !arguments_may_be_the_clients(None));
    }
}
