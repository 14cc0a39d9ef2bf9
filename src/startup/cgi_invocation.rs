//! Whether a web server has started this program to answer one request (CGI, RFC 3875), and what of its command line is
//! then to be believed.
//!
//! What comes after that is in `worker/cgi.rs`. This file reads the environment, sees to standard output, and decides nothing else.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;

use crate::net::listen;
use crate::sys;

/// Whether this process is a CGI call.
pub(crate) fn is_one() -> bool {
    said_by(|name| std::env::var_os(name)) && !listen::started_by_web_server()
}

fn said_by(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let interface = variable("GATEWAY_INTERFACE").is_some_and(|value| value.as_bytes().starts_with(b"CGI/"));
    interface && variable("REQUEST_METHOD").is_some()
}

/// The arguments without those that a web server may have made of the query string: it does so when there is no `=` in it
/// (RFC 3875, 4.4). They are the client's, who must not give this program flags.
pub(crate) fn trusted(mut arguments: Vec<OsString>) -> Vec<OsString> {
    if is_one() && arguments_may_be_the_clients(std::env::var_os("QUERY_STRING").as_deref()) {
        arguments.truncate(1);
    }
    arguments
}

/// Takes standard output, for the response, and has its number stand for standard error: what the application prints from here on,
/// and what programs that it starts print, is for the web server's log.
///
/// # Errors
/// If it is closed, or no descriptor is left.
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
    fn it_takes_both_variables_to_make_a_call() {
        let said = |interface: &'static str, method: Option<&'static str>| {
            said_by(|name| match name {
                "GATEWAY_INTERFACE" => Some(interface.into()),
                "REQUEST_METHOD" => method.map(Into::into),
                other => panic!("{other} is asked for"),
            })
        };
        assert!(said("CGI/1.1", Some("GET")) && said("CGI/1.1", Some("")));
        assert!(!said("CGI/1.1", None) && !said("", Some("GET")) && !said_by(|_| None));
    }

    #[test]
    fn a_query_without_an_equals_sign_may_have_become_arguments() {
        let may = |query: &str| arguments_may_be_the_clients(Some(OsStr::new(query)));
        assert!(may("--bind+http:0.0.0.0:80") && may("--bind%3Dhttp:0.0.0.0:80") && may("a"));
        assert!(!may("") && !may("a=1") && !arguments_may_be_the_clients(None));
    }
}
